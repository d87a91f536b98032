"""Calls with the code executed as Python (ledger.runs), for ledger.shortcut.

py-evm spends some ten Python calls on an opcode as small as PUSH1, and more on a call from contract to contract than
on what is called. Here a transaction's call and the static calls inside it are done over a state without changing it;
what the first one wrote and logged is taken over by whoever asked for it. What runs do not know, and any error but out
of gas, is py-evm's to execute. The tests hold both ways against each other on random code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from eth.constants import GAS_COPY, GAS_LOGDATA, GAS_LOGTOPIC, GAS_SHA3WORD
from eth.exceptions import OutOfGas
from eth.vm.computation import memory_gas_cost
from eth.vm.forks.berlin.constants import COLD_ACCOUNT_ACCESS_COST, COLD_SLOAD_COST, WARM_STORAGE_READ_COST
from eth.vm.forks.cancun.computation import CancunComputation
from eth.vm.forks.london.storage import GAS_SCHEDULE_EIP3529 as GAS_SCHEDULE
from eth_hash.auto import keccak

from ledger.runs import START, HandOver, program_of

DEPTH_MAX: Final = 16
"""Calls inside calls that are done here; EIP-150's limit of 1024 is py-evm's to find."""

SSTORE_GAS_MIN: Final = 2301
"""With less gas than this SSTORE fails (EIP-2200)."""

PRECOMPILES: Final = frozenset(CancunComputation.get_precompiles())


IsWarm = Callable[[bytes, int | None], bool]
"""Of a contract, or one of its slots: whether it is warm from the start (EIP-2929). Sender and proposer are, and
have no code to call."""


class State(Protocol):
    """As much of a state as calls ask for."""

    def get_code(self, address: bytes) -> bytes: ...

    def get_storage(self, address: bytes, slot: int) -> int: ...


class Scope:
    """What the calls of one transaction share: the state as they leave it, which the one below does not know yet."""

    def __init__(self, state: State, address: bytes, timestamp: int, is_warm: IsWarm) -> None:
        self._state = state
        self._is_warm = is_warm
        self.timestamp = timestamp
        self.slots: dict[bytes, dict[int, int]] = {address: {}}
        """The accounts that are warm, and of each the slots that are, and what is in them."""
        self.warmed: list[tuple[bytes, int | None]] = []
        """Accounts and slots in the order in which they became it."""
        self.original: dict[int, int] = {}
        """What was in the slots that were written. All are the first call's account's: the calls inside are static."""
        self.refund = 0
        self.logs: list[tuple[bytes, tuple[int, ...], bytes]] = []

    def load(self, address: bytes, slot: int) -> int:
        """What is in a slot that is not here yet; what that costs has to be charged before."""
        value = int(self._state.get_storage(address, slot))
        self.slots[address][slot] = value
        self.warmed.append((address, slot))
        return value

    def slot_cost(self, address: bytes, slot: int) -> int:
        """What it costs to come to a slot that is not here yet."""
        return WARM_STORAGE_READ_COST if self._is_warm(address, slot) else COLD_SLOAD_COST

    def code(self, address: bytes) -> tuple[int, bytes]:
        """What it costs to come to a contract, and its code. Raises HandOver when it has none of its own."""
        cost = WARM_STORAGE_READ_COST
        if address not in self.slots:
            if not self._is_warm(address, None):
                cost = COLD_ACCOUNT_ACCESS_COST
            self.slots[address] = {}
            self.warmed.append((address, None))
        code = self._state.get_code(address)
        if not code or address in PRECOMPILES:
            raise HandOver
        return cost, code

    def cool(self, count: int) -> None:
        """Forget what became warm after the first `count`: a call that fails leaves it cold (EIP-2929)."""
        for address, slot in reversed(self.warmed[count:]):
            if slot is None:
                del self.slots[address]
            else:
                del self.slots[address][slot]
        del self.warmed[count:]


class Frame:
    """One call: what its runs work on. Most methods take the gas there is and give back what is left of it; they raise
    OutOfGas when it does not suffice, HandOver when py-evm has to execute all this."""

    def __init__(
        self, scope: Scope, code: bytes, address: bytes, caller: bytes, value: int, data: bytes, gas: int, depth: int
    ) -> None:
        self.scope = scope
        self.code = code
        self.address, self.own, self.caller = address, int.from_bytes(address), int.from_bytes(caller)
        self.value = value
        self.data, self.data_size = data + bytes(32), len(data)
        self.gas = gas
        self.depth = depth
        self.slots = scope.slots[address]
        self.stack: list[int] = []
        self.memory = bytearray()
        self.returned = b""
        """What the last call inside this one returned."""
        self.output = b""
        self.is_reverted = self.is_starved = False

    def execute(self) -> None:
        program = program_of(self.code)
        runs = program.runs
        place: int | None = START
        while place is not None:
            run = runs.get(place) or program.run(place)
            place = run(self)

    def end(self, gas: int, start: int, size: int) -> None:
        self.gas = self.grow(gas, start + size) if size else gas
        self.output = bytes(self.memory[start : start + size])

    def revert(self, gas: int, start: int, size: int) -> None:
        self.end(gas, start, size)
        self.is_reverted = True

    def starve(self) -> None:
        """It ran out of gas: all is gone."""
        self.gas, self.output, self.is_starved = 0, b"", True

    def written(self) -> Iterator[tuple[int, int]]:
        """The slots that were written, and what is in them now."""
        return ((slot, int(self.slots[slot])) for slot in self.scope.original)

    # Memory

    def grow(self, gas: int, end: int) -> int:
        """Have memory up to `end`."""
        size = len(self.memory)
        if end > size:
            new_size = end + 31 & ~31
            gas -= memory_gas_cost(new_size) - memory_gas_cost(size)
            if gas < 0:
                raise OutOfGas
            self.memory += bytes(new_size - size)
        return gas

    def hash(self, gas: int, start: int, size: int) -> tuple[int, int]:
        gas = self._pay_words(gas, GAS_SHA3WORD, start, size)
        return gas, int.from_bytes(keccak(bytes(self.memory[start : start + size])))

    def copy(self, gas: int, source: bytes, to: int, start: int, size: int) -> int:
        """From a source with zeros behind its end."""
        gas = self._pay_words(gas, GAS_COPY, to, size)
        self.memory[to : to + size] = source[start : start + size].ljust(size, b"\0") if size else b""
        return gas

    def copy_returned(self, gas: int, to: int, start: int, size: int) -> int:
        if start + size > len(self.returned):
            raise HandOver
        return self.copy(gas, self.returned, to, start, size)

    def copy_within(self, gas: int, to: int, start: int, size: int) -> int:
        gas = self._pay_words(gas, GAS_COPY, max(to, start), size)
        self.memory[to : to + size] = self.memory[start : start + size]
        return gas

    def _pay_words(self, gas: int, cost: int, start: int, size: int) -> int:
        """Pay `cost` for each word, and have memory for them."""
        gas -= cost * ((size + 31) // 32)
        if gas < 0:
            raise OutOfGas
        return self.grow(gas, start + size) if size else gas

    # State

    def load(self, gas: int, slot: int) -> tuple[int, int]:
        value = self.slots.get(slot)
        gas -= WARM_STORAGE_READ_COST if value is not None else self.scope.slot_cost(self.address, slot)
        if gas < 0:
            raise OutOfGas
        return gas, self.scope.load(self.address, slot) if value is None else value

    def store(self, gas: int, slot: int, value: int) -> int:
        """EIP-2200 with the costs of EIP-2929 and EIP-3529."""
        if self.depth:
            raise HandOver  # a static call may not
        if gas < SSTORE_GAS_MIN:
            raise OutOfGas
        scope = self.scope
        current = self.slots.get(slot)
        if current is None:
            if scope.slot_cost(self.address, slot) == COLD_SLOAD_COST:
                gas -= COLD_SLOAD_COST
            current = scope.load(self.address, slot)
        original = scope.original.setdefault(slot, current)
        if value == current or current != original:
            gas -= GAS_SCHEDULE.sload_gas
        else:
            gas -= GAS_SCHEDULE.sstore_reset_gas if original else GAS_SCHEDULE.sstore_set_gas
        if gas < 0:
            raise OutOfGas
        scope.refund += _refund(original, current, value)
        self.slots[slot] = value
        return gas

    def log(self, gas: int, start: int, size: int, topics: tuple[int, ...]) -> int:
        if self.depth:
            raise HandOver  # a static call may not
        gas -= GAS_LOGDATA * size + GAS_LOGTOPIC * len(topics)
        if gas < 0:
            raise OutOfGas
        gas = self.grow(gas, start + size) if size else gas
        self.scope.logs.append((self.address, tuple(map(int, topics)), bytes(self.memory[start : start + size])))
        return gas

    def static_call(
        self, gas: int, wanted: int, to: int, start: int, size: int, out: int, out_size: int
    ) -> tuple[int, int]:
        """Whether it ended well is pushed, 1 or 0."""
        if self.depth == DEPTH_MAX:
            raise HandOver
        gas = self.grow(gas, start + size) if size else gas
        gas = self.grow(gas, out + out_size) if out_size else gas
        address, scope = (to & (1 << 160) - 1).to_bytes(20), self.scope
        cost, code = scope.code(address)
        gas -= cost
        if gas < 0:
            raise OutOfGas
        given = min(wanted, gas - gas // 64)
        inside = len(scope.warmed)
        data = bytes(self.memory[start : start + size])
        call = Frame(scope, code, address, self.address, 0, data, given, self.depth + 1)
        try:
            call.execute()
        except OutOfGas:
            call.starve()
        failed = call.is_reverted or call.is_starved
        if failed:
            scope.cool(inside)
        self.returned = call.output
        found = call.output[:out_size]
        self.memory[out : out + len(found)] = found
        return gas - given + call.gas, not failed


def _refund(original: int, current: int, value: int) -> int:
    """What a write adds to the refund (EIP-3529), by what was there before the transaction and before the write."""
    refund = 0
    if value == current:
        return 0
    if original and not current:
        refund -= GAS_SCHEDULE.sstore_clears_schedule
    if original and not value:
        refund += GAS_SCHEDULE.sstore_clears_schedule
    if current != original and value == original:
        cost = GAS_SCHEDULE.sstore_reset_gas if original else GAS_SCHEDULE.sstore_set_gas
        refund += cost - GAS_SCHEDULE.sload_gas
    return refund


def executed(
    state: State, timestamp: int, is_warm: IsWarm, address: bytes, caller: bytes, value: int, data: bytes, gas: int
) -> Frame:
    """A transaction's call, executed. The state is not changed by it. Raises HandOver when py-evm has to do it."""
    code = state.get_code(address)
    if not code or address in PRECOMPILES:
        raise HandOver
    frame = Frame(Scope(state, address, timestamp, is_warm), code, address, caller, value, data, gas, 0)
    try:
        frame.execute()
    except OutOfGas:
        frame.starve()
    return frame
