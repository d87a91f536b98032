"""The EVM chains that `make bench-ledger` measures the ledger beside: eth-tester, hardhat and anvil.

Each gets our contracts by ordinary creation transactions, the same calls to them with the same gas, signed for its own
chain id and with the fee it insists on. Each keeps its chain in memory: none seals a block, checks one from a peer,
decodes events or writes to disk. Knows how to run them, not what is measured.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from eth._utils.address import generate_contract_address
from eth_account import Account
from eth_tester import PyEVMBackend
from eth_tester.backends.pyevm.main import get_default_account_state

from contracts.addresses import ADDRESSES, CONTRACT_NAMES
from contracts.calls import Call
from contracts.deployment import deployment
from contracts.types import Address
from ledger.keys import Key
from tests.benchmarks.report import BUILD

Step = tuple[Key, Call]

DEPLOY_GAS = 10_000_000
GAS_PRICE = 10**10
TIP = 10**9
COINS = 10**24
"""What each account gets, so that the peers' fees are paid."""

START_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 60

LOCK = Path(__file__).parent / "npm"
NPM = BUILD / "npm"
HARDHAT_CONFIG = """\
module.exports = {
  solidity: "0.8.24", // hardhat wants one named; nothing is compiled
  networks: { hardhat: { hardfork: "cancun", blockGasLimit: %d, loggingEnabled: false } },
};
"""


class Peer(ABC):
    """A chain in memory with our contracts deployed and set up. Subclasses know how blocks are made on it."""

    name: str

    def __init__(self, deployer: Key, chain_id: int, gas: int) -> None:
        self._deployer = deployer
        self._chain_id = chain_id
        self._gas = gas
        self._nonces: dict[Address, int] = {}
        self._addresses: dict[Address, Address] = {}

    def prepare(self, setting: Sequence[Step], work: Sequence[Step]) -> None:
        """Create the contracts, run `setting`, one block for each step, and sign `work` for later."""
        there = {
            name: Address(bytes(generate_contract_address(self._deployer.address, nonce)))
            for nonce, name in enumerate(CONTRACT_NAMES)
        }
        self._addresses = {ADDRESSES[name]: there[name] for name in CONTRACT_NAMES}
        creations = [
            self._signed(self._deployer, b"", deploy.init_code, DEPLOY_GAS)
            for deploy in deployment(self._deployer.address, there)
        ]
        for raw in (*creations, *map(self._sign, setting)):
            self.seal([raw])
            self.check([raw])
        self.raws = [self._sign(step) for step in work]

    def _sign(self, step: Step) -> bytes:
        key, call = step
        return self._signed(key, self._addresses[call.to], call.encode(), self._gas)

    def _signed(self, key: Key, to: bytes, data: bytes, gas: int) -> bytes:
        nonce = self._nonces.get(key.address, 0)
        self._nonces[key.address] = nonce + 1
        fields = {"type": 2, "chainId": self._chain_id, "nonce": nonce, "to": to, "value": 0, "gas": gas, "data": data}
        fees = {"maxFeePerGas": GAS_PRICE, "maxPriorityFeePerGas": TIP}
        return bytes(Account.sign_transaction({**fields, **fees}, key.secret).raw_transaction)

    def measure(self, block_transactions: int) -> float:
        """Transactions a second; that each of them succeeded is checked when the time is taken."""
        blocks = [self.raws[i : i + block_transactions] for i in range(0, len(self.raws), block_transactions)]
        began = time.perf_counter()
        for raws in blocks:
            self.seal(raws)
        taken = time.perf_counter() - began
        self.check(self.raws)
        return len(self.raws) / taken

    @abstractmethod
    def seal(self, raws: Sequence[bytes]) -> None:
        """One block of these transactions."""

    @abstractmethod
    def check(self, raws: Sequence[bytes]) -> None:
        """Assert that these transactions are in blocks and succeeded."""


class EthTester(Peer):
    """eth-tester's py-evm backend, called without the validation and normalising of the EthereumTester around it."""

    name = f"eth-tester {version('eth-tester')}"

    def __init__(self, deployer: Key, accounts: Sequence[Key], gas: int, gas_limit: int) -> None:
        self._backend = PyEVMBackend(
            genesis_parameters=PyEVMBackend.generate_genesis_params({"gas_limit": gas_limit}),
            genesis_state={key.address: get_default_account_state() for key in (deployer, *accounts)},
        )
        self._hashes: dict[bytes, bytes] = {}
        super().__init__(deployer, self._backend.chain.chain_id, gas)

    def seal(self, raws: Sequence[bytes]) -> None:
        for raw in raws:
            self._hashes[raw] = self._backend.send_raw_transaction(raw)
        self._backend.mine_blocks(1)

    def check(self, raws: Sequence[bytes]) -> None:
        for raw in raws:
            assert self._backend.get_transaction_receipt(self._hashes[raw])["status"] == 1


class DevelopmentNode(Peer):
    """hardhat or anvil, spoken to as it is meant to be: JSON-RPC over HTTP, one connection, sends in a batch.

    A block of one transaction is what automatic mining makes of a send; a larger one is sent with it off, then mined.
    anvil answers a send before the block is there, so that several can end in one: it is always told to mine.
    """

    def __init__(
        self, name: str, port: int, mines_at_once: bool, deployer: Key, accounts: Sequence[Key], gas: int
    ) -> None:
        self.name = name
        self._mines_at_once = mines_at_once
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)
        self._hashes: dict[bytes, str] = {}
        super().__init__(deployer, int(self._call("eth_chainId"), 16), gas)
        for key in (deployer, *accounts):
            self._call("hardhat_setBalance", f"0x{key.address.hex()}", hex(COINS))

    def measure(self, block_transactions: int) -> float:
        """As often as one likes: the chain is put back to where it was."""
        self._http.close()  # opened again by the next request: these nodes close what was idle for some seconds
        snapshot = self._call("evm_snapshot")
        self._call("evm_setAutomine", self._mines_at_once and block_transactions == 1)
        try:
            return super().measure(block_transactions)
        finally:
            self._call("evm_setAutomine", self._mines_at_once)
            self._call("evm_revert", snapshot)

    def seal(self, raws: Sequence[bytes]) -> None:
        hashes = self._batch([("eth_sendRawTransaction", f"0x{raw.hex()}") for raw in raws])
        self._hashes.update(zip(raws, hashes, strict=True))
        if len(raws) > 1 or not self._mines_at_once:
            self._call("evm_mine")

    def check(self, raws: Sequence[bytes]) -> None:
        for receipt in self._batch([("eth_getTransactionReceipt", self._hashes[raw]) for raw in raws]):
            assert receipt["status"] == "0x1", receipt

    def _call(self, method: str, *params: object) -> Any:
        return self._batch([(method, *params)])[0]

    def _batch(self, calls: Sequence[tuple[object, ...]]) -> list[Any]:
        """The results in order; a single call is sent as such."""
        sent = [
            {"jsonrpc": "2.0", "id": i, "method": method, "params": params} for i, (method, *params) in enumerate(calls)
        ]
        body = msgspec.json.encode(sent if len(sent) > 1 else sent[0])
        self._http.request("POST", "/", body, {"content-type": "application/json"})
        found = msgspec.json.decode(self._http.getresponse().read())
        answers = sorted(found, key=lambda answer: answer["id"]) if len(sent) > 1 else [found]
        for answer in answers:
            assert "result" in answer, f"{self.name}: {answer}"
        return [answer["result"] for answer in answers]


def install() -> str | None:
    """Install hardhat and anvil as the package-lock says, unless they are there; why not, when it cannot be done."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return "npm or node is not installed"
    lock = (LOCK / "package-lock.json").read_bytes()
    done = NPM / "installed.json"
    if done.exists() and done.read_bytes() == lock:
        return None
    NPM.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(LOCK / name, NPM / name)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    ran = subprocess.run(command, cwd=NPM, capture_output=True, text=True, check=False)
    if ran.returncode:
        return f"npm ci failed: {ran.stderr.strip().splitlines()[-1:]}"
    done.write_bytes(lock)
    return None


def _version(package: str) -> str:
    return str(msgspec.json.decode((NPM / "node_modules" / package / "package.json").read_bytes())["version"])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _hardhat(port: int, gas_limit: int) -> list[str]:
    (NPM / "hardhat.config.js").write_text(HARDHAT_CONFIG % gas_limit)
    return ["node_modules/.bin/hardhat", "node", "--hostname", "127.0.0.1", "--port", str(port)]


def _anvil(port: int, gas_limit: int) -> list[str]:
    command = ["node_modules/.bin/anvil", "--quiet", "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--no-mining", "--hardfork", "cancun", "--gas-limit", str(gas_limit)]


NODES: dict[str, tuple[str, bool, Callable[[int, int], list[str]]]] = {
    "hardhat": ("hardhat", True, _hardhat),
    "anvil": ("@foundry-rs/anvil", False, _anvil),
}
"""Each development node's npm package, whether it mines at once what it is sent, and how it is started."""


@contextmanager
def running(which: str, deployer: Key, accounts: Sequence[Key], gas: int, gas_limit: int) -> Iterator[DevelopmentNode]:
    """A development node while the body runs; `install` comes first."""
    package, at_once, command = NODES[which]
    port = _free_port()
    quiet = {"HARDHAT_DISABLE_TELEMETRY_PROMPT": "true", "PATH": os.environ["PATH"], "HOME": str(NPM)}
    process = subprocess.Popen(
        command(port, gas_limit), cwd=NPM, env=quiet, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait_for(port, process)
        yield DevelopmentNode(f"{which} {_version(package)}", port, at_once, deployer, accounts, gas)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # these start children of their own
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, f"{process.args!r} ended at once"
            assert time.monotonic() < deadline, f"{process.args!r} does not listen after {START_TIMEOUT_S} s"
            time.sleep(0.1)
