"""Named checks on what a request is about: the model, the tier, the signer. Knows the node through its port."""

from __future__ import annotations

from contracts.errors import BadInput, Conflict, NotAllowed, NotFound
from contracts.types import Address, ModelId, Version
from node.rpc import params
from node.rpc.caller import Caller, require_on_ledger
from node.rpc.port import NodePort
from node.rpc.values import ModelInfo, SignedTransaction, TierCheck


def find_model(node: NodePort, model_id: ModelId, version: Version | None) -> ModelInfo:
    """The registered model. Raises NotFound."""
    model = node.model(model_id, version)
    if model is None:
        name = (
            params.shown(model_id) if version is None else f"{params.shown(model_id)} version {params.shown(version)}"
        )
        raise NotFound(f"no model {name} is registered here: listModels (`aigen model list`) shows those that are")
    return model


def find_active_model(node: NodePort, model_id: ModelId, version: Version | None) -> ModelInfo:
    """The registered model, still in service. Raises NotFound or Conflict."""
    model = find_model(node, model_id, version)
    if model.retired:
        raise Conflict(f"{model.model_id} version {model.version} is retired: ask for another version or model")
    return model


async def require_tier(node: NodePort, account: Address, model: ModelInfo) -> TierCheck:
    """The decision, taken on the ledger. Raises NotAllowed when it is no."""
    require_on_ledger(node, account)
    check = await node.check_tier(account, model.model_id, model.version)
    if not check.granted:
        shown = f"0x{account.hex()}"
        raise NotAllowed(
            f"{model.model_id} needs tier {check.required} or higher and account {shown} holds {check.held or 'none'} "
            f"(check 0x{check.transaction_hash.hex()}): an admin runs `aigen tier grant {shown} {check.required}`"
        )
    return check


def require_admin(node: NodePort, transaction: SignedTransaction) -> None:
    """Raise NotAllowed unless an admin signed."""
    if not node.account(transaction.sender).admin:
        raise NotAllowed(
            f"account 0x{transaction.sender.hex()} signed this and is no admin: an admin's key has to sign"
        )


def subject(caller: Caller, method: str, account: str | None) -> Address:
    """The account a read is about: the one named, else the caller's. Raises BadInput when there is neither."""
    if account is not None:
        return params.address("account", account)
    if caller.account is None:
        raise BadInput(f'{method} needs {{"account": "0x..."}} when no token says who asks')
    return caller.account
