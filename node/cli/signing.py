"""What the commands share that change the ledger: whose key signs, the node it is sent to, the receipt it ends with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from contracts.errors import NotAllowed
from node.cli import common

if TYPE_CHECKING:
    from contracts.calls import Call
    from ledger.keys import Key
    from node.rpc.client import RpcClient

F = TypeVar("F", bound=Callable[..., Any])

RECEIPT_TIMEOUT_S = 60.0
POLL_S = 0.1


@dataclass(frozen=True)
class Signer:
    """The account that signs, and the node to send to; both are opened when they are first needed."""

    key_path: Path | None
    data_dir: Path
    password_file: Path | None
    rpc_url: str
    token: str | None
    as_json: bool

    @cached_property
    def key(self) -> Key:
        return common.open_key(self.key_path, self.data_dir, self.password_file)

    @cached_property
    def rpc(self) -> RpcClient:
        return common.client(self.rpc_url, self.token)

    def send(self, call: Call, method: str = "sendRawTransaction") -> dict[str, Any]:
        """Sign a call, submit it, and wait for its receipt. Raises NotAllowed with the contract's reason."""
        from ledger.transactions import CALL_GAS, sign

        key, rpc = self.key, self.rpc
        chain = rpc.call("getChainInfo")
        account = rpc.call("getAccount", account=f"0x{key.address.hex()}")
        raw = sign(key, chain["chain_id"], account["nonce"], call.to, call.encode(), CALL_GAS)
        transaction_hash = rpc.call(method, transaction=f"0x{raw.hex()}")["transaction_hash"]
        deadline = time.monotonic() + RECEIPT_TIMEOUT_S
        while (receipt := rpc.call("getTransactionReceipt", transaction_hash=transaction_hash)) is None:
            if time.monotonic() > deadline:
                raise NotAllowed(
                    f"transaction {transaction_hash} is in no block after {RECEIPT_TIMEOUT_S:.0f} s: "
                    "is the authority's node running and reachable?"
                )
            time.sleep(POLL_S)
        if not receipt["succeeded"]:
            raise NotAllowed(f"the contract refused it: {receipt['reason']}")
        answer: dict[str, Any] = receipt
        return answer

    def show(self, done: Any, line: str) -> None:
        """What was done, as JSON or as a line."""
        if self.as_json:
            common.show_json(done)
        else:
            click.echo(line)


def options(function: F) -> F:
    """Options of a command that sends transactions; it takes them as its `signer`."""

    @common.key_options
    @common.rpc_options
    @common.json_option
    @functools.wraps(function)
    def command(
        key_path: Path | None,
        data_dir: Path,
        password_file: Path | None,
        rpc_url: str,
        token: str | None,
        as_json: bool,
        **arguments: Any,
    ) -> Any:
        signer = Signer(key_path, data_dir, password_file, rpc_url, token, as_json)
        return function(signer=signer, **arguments)

    return command  # type: ignore[return-value]
