"""Our computation against py-evm's own: the same outcome on random code, and bit for bit the same blocks."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from eth.exceptions import OutOfGas, Revert
from eth.vm import opcode_values as op
from eth.vm.forks.cancun.computation import CancunComputation
from eth.vm.message import Message
from eth_hash.auto import keccak
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ledger import runs
from ledger.computation import Frame, executed
from ledger.runs import CALCULATED, DONE, ENDING, GUARDED, PUSHED, RUN_OPCODES_MAX, STACK_MAX, START, HandOver

SELF, CALLER, OTHER = b"\x11" * 20, b"\x22" * 20, b"\x44" * 20
WORD_MAX = (1 << 256) - 1

EDGES = (0, 1, 2, 31, 32, 33, 64, 95, 255, 256, 1 << 16, 1 << 64, (1 << 255) - 1, 1 << 255, WORD_MAX - 31, WORD_MAX)


class Accounts:
    """As much of py-evm's state as calls that create nothing ask for. Everything is cold when first used; what a call
    that failed warmed or wrote is so again, as with py-evm's."""

    coinbase = b"\x33" * 20
    timestamp = 1_700_000_000

    def __init__(self, codes: Mapping[bytes, bytes]) -> None:
        self.codes = codes
        self.slots: dict[tuple[bytes, int], int] = {(SELF, slot): slot % 3 for slot in range(9)}
        self.before = dict(self.slots)
        self.warm: set[object] = set()
        self.execution_context = SimpleNamespace(chain_id=1)

    def snapshot(self) -> tuple[dict[tuple[bytes, int], int], set[object]]:
        return dict(self.slots), set(self.warm)

    def revert(self, snapshot: tuple[dict[tuple[bytes, int], int], set[object]]) -> None:
        self.slots, self.warm = snapshot

    def commit(self, snapshot: object) -> None:
        pass

    def touch_account(self, address: bytes) -> None:
        pass

    def is_address_warm(self, address: bytes) -> bool:
        return address in self.warm

    def mark_address_warm(self, address: bytes) -> None:
        self.warm.add(address)

    def is_storage_warm(self, address: bytes, slot: int) -> bool:
        return (address, slot) in self.warm

    def mark_storage_warm(self, address: bytes, slot: int) -> None:
        self.warm.add((address, slot))

    def get_storage(self, address: bytes, slot: int, from_journal: bool = True) -> int:
        return (self.slots if from_journal else self.before).get((address, slot), 0)

    def set_storage(self, address: bytes, slot: int, value: int) -> None:
        assert type(value) is int
        self.slots[address, slot] = value

    def get_code(self, address: bytes) -> bytes:
        return self.codes.get(address, b"")

    def account_exists(self, address: bytes) -> bool:
        return address in self.codes

    def account_is_empty(self, address: bytes) -> bool:
        return address not in self.codes

    def get_balance(self, address: bytes) -> int:
        return 7

    def delta_balance(self, address: bytes, delta: int) -> None:
        """Whoever pays and is paid has 7 again."""


class Ours(CancunComputation):
    """py-evm's computation with a transaction's call done by ours, so that all it leaves can be compared."""

    @classmethod
    def apply_computation(
        cls, state: Any, message: Any, transaction_context: Any, parent_computation: Any = None
    ) -> Ours:
        is_first = parent_computation is None and not message.is_create
        frame = executed_over(state, message) if is_first else None
        if frame is None:
            return super().apply_computation(state, message, transaction_context, parent_computation)
        with cls(state, message, transaction_context) as computation:
            computation.contracts_created = []
            if frame.is_starved:
                raise OutOfGas
            computation._gas_meter.gas_remaining = frame.gas
            computation.output = frame.output
            if frame.is_reverted:
                raise Revert(frame.output)
            computation._gas_meter.gas_refunded = frame.scope.refund
            for slot, new in frame.written():
                state.set_storage(message.to, slot, new)
            for log in frame.scope.logs:
                computation.add_log_entry(*log)
        return computation


def executed_over(state: Any, message: Any) -> Frame | None:
    """A call done by ours over py-evm's state; None when it is py-evm's to execute."""

    def is_warm(address: bytes, slot: int | None) -> bool:
        if slot is None:
            return bool(state.is_address_warm(address))
        return bool(state.is_storage_warm(address, slot))

    to, sender, value, data = message.to, message.sender, message.value, bytes(message.data)
    try:
        return executed(state, int(state.timestamp), is_warm, to, sender, value, data, message.gas)
    except HandOver:
        return None


def outcome(kind: type[Any], code: bytes, data: bytes, gas: int, other: bytes) -> dict[str, Any]:
    """Everything that a call leaves behind, `other` being the code of the account OTHER."""
    state = Accounts({SELF: code, OTHER: other})
    state.warm |= {SELF, CALLER, (SELF, 1)}  # a slot out of the transaction's access list
    message = Message(gas, SELF, CALLER, 5, data, code, should_transfer_value=False)
    context = SimpleNamespace(origin=CALLER, gas_price=0, get_next_log_counter=iter(range(1 << 20)).__next__)
    done = kind.apply_message(state, message, context)
    logs = done.get_log_entries()
    assert all(type(topic) is int for _, topics, _ in logs for topic in topics)
    return {
        "error": type(done.error) if done.is_error else None,
        "gas": done.get_gas_remaining(),
        "refund": done.get_gas_refund(),
        "output": done.output,
        "logs": logs,
        "slots": state.slots,
    }


def is_ours(code: bytes, data: bytes, gas: int, other: bytes) -> bool:
    """Whether py-evm is not asked to execute it."""
    message = Message(gas, SELF, CALLER, 5, data, code, should_transfer_value=False)
    return executed_over(Accounts({SELF: code, OTHER: other}), message) is not None


def same(code: bytes, data: bytes = b"", gas: int = 100_000, other: bytes = b"") -> dict[str, Any]:
    """The outcome, which has to be py-evm's."""
    ours = outcome(Ours, code, data, gas, other)
    assert ours == outcome(CancunComputation, code, data, gas, other), code.hex()
    return ours


def same_inside(code: bytes, data: bytes = b"", gas: int = 100_000, other: bytes = b"", stack: int = 1) -> Any:
    """The outcome when all that is in memory, and so many stack items, is returned at the end."""
    stored = b"".join(push(32 * i + 4_096) + b"\x52" for i in range(stack))
    return same(code + stored + push(4_096 + 32 * stack) + b"\x5f\xf3", data, gas, other)


def push(value: int) -> bytes:
    size = (value.bit_length() + 7) // 8
    return bytes([op.PUSH0 + size]) + value.to_bytes(size, "big")


def call(to: bytes, gas: int, size: int = 32) -> bytes:
    """A static call that passes the first word of memory and gets the answer behind it."""
    return b"".join(map(push, (size, 32, 32, 0, int.from_bytes(to, "big"), gas))) + bytes([op.STATICCALL])


OURS = sorted({*CALCULATED, *GUARDED, *PUSHED, *DONE, op.POP, op.MLOAD, op.MSTORE, op.JUMP, op.JUMPI, op.JUMPDEST})
THEIRS = [op.PC, op.MSIZE, op.MSTORE8, op.EXP, op.SDIV, op.ADDMOD, op.SIGNEXTEND, op.SAR, op.ORIGIN, op.CHAINID]
THEIRS += [op.CALL, op.DELEGATECALL, op.EXTCODESIZE, 0x0C, 0xFE]

numbers = st.one_of(st.sampled_from(EDGES), st.integers(0, 300), st.integers(0, WORD_MAX))
opcodes = st.one_of(st.integers(op.DUP1, op.SWAP16), *[st.sampled_from([*OURS, op.GAS])] * 2)
any_opcodes = st.one_of(*[opcodes] * 12, st.sampled_from([*ENDING, *THEIRS]))
calls = st.builds(call, st.sampled_from([SELF, OTHER, CALLER, bytes([4]).rjust(20, b"\0")]), st.integers(0, 3_000))
jumps = st.tuples(st.sampled_from([op.JUMP, op.JUMPI, op.JUMPI, op.JUMPI]), st.integers(0, 5))
simple = st.one_of(
    *[numbers.map(push)] * 2, *[st.integers(0, 40).map(push)] * 3, *[opcodes.map(lambda o: bytes([o]))] * 6, calls
)
pieces = st.one_of(*[simple] * 5, st.just(b"\x5b"), jumps)
any_pieces = st.one_of(*[pieces] * 3, any_opcodes.map(lambda opcode: bytes([opcode])))


def assembled(items: list[int], pieces: list[bytes | tuple[int, int]]) -> bytes:
    """Code that pushes the items and goes on with the pieces; the jumps among them lead to one of its JUMPDESTs."""
    code = b"".join(map(push, items)) + b"\x5b"
    places, jumps = [len(code) - 1], []
    for piece in pieces:
        if isinstance(piece, bytes):
            places += [len(code)] if piece == b"\x5b" else []
            code += piece
        else:
            jumps.append((len(code) + 1, piece[1]))
            code += b"\x61\0\0" + bytes(piece[:1])
    for at, number in jumps:
        code = code[:at] + places[-1 - number % len(places)].to_bytes(2, "big") + code[at + 2 :]
    return code


items = st.lists(numbers, min_size=8, max_size=20)
programs = st.builds(assembled, items, st.lists(pieces, max_size=40))
any_programs = st.builds(assembled, items, st.lists(any_pieces, max_size=60))
gases = st.sampled_from([5, 60, 400, 3_000, 10_000, 100_000, 100_000, 100_000])


@settings(max_examples=300)
@given(code=programs, other=programs, data=st.binary(max_size=80), gas=gases)
@example(code=b"\x5b" * 20 + push(0) + b"\x56", other=b"", data=b"", gas=500)  # round and round until no gas is left
@example(code=push(3) + b"\x56\x60\x5b", other=b"", data=b"", gas=500)  # a jump into the data of a PUSH
@example(code=b"\x63\xaa", other=b"", data=b"", gas=500)  # a PUSH that goes on behind the end
def test_any_code_ends_as_under_py_evm(code: bytes, other: bytes, data: bytes, gas: int) -> None:
    same_inside(code, data, gas, other, stack=3)


@settings(max_examples=300)
@given(code=any_programs, other=any_programs, data=st.binary(max_size=80), gas=gases)
def test_any_code_with_what_is_not_ours_ends_as_under_py_evm(code: bytes, other: bytes, data: bytes, gas: int) -> None:
    same(code, data, gas, other)


@settings(max_examples=200)
@given(code=st.binary(max_size=200), gas=st.integers(0, 20_000))
def test_any_bytes_end_as_under_py_evm(code: bytes, gas: int) -> None:
    creating = {op.CREATE, op.CREATE2, op.SELFDESTRUCT, op.CALL, op.CALLCODE}
    state = {op.BALANCE, op.EXTCODECOPY, op.EXTCODEHASH, op.BLOCKHASH, *range(0x41, 0x4B), op.TLOAD, op.TSTORE}
    same(bytes(opcode for opcode in code if opcode not in creating | state), b"data", gas)


@pytest.mark.parametrize("opcode", [*CALCULATED, *GUARDED])
def test_arithmetic_at_its_edges(opcode: int) -> None:
    """Of items that only the call knows, and of ones that the code says: these are calculated when it is written."""
    one = opcode in {op.ISZERO, op.NOT}
    for below in EDGES[::3] if not one else (1,):
        for above in EDGES:
            data = below.to_bytes(32, "big") + above.to_bytes(32, "big")
            unknown = [push(0) + b"\x35", push(32) + b"\x35"]
            for lower in (unknown[0], push(below)):
                for upper in (unknown[1], push(above)):
                    code = lower + upper + bytes([opcode])
                    assert same_inside(code, data)["error"] is None
                    assert is_ours(code, data, 100, b"")


@pytest.mark.parametrize("opcode", [*DONE, op.MLOAD, op.MSTORE, op.RETURN, op.REVERT])
def test_memory_and_data_at_their_edges(opcode: int) -> None:
    for first in (0, 1, 32, 4_000, 1 << 30, WORD_MAX):
        for second in (0, 1, 33, 1 << 64):
            for third in (0, 1, 65):
                data = b"".join(number.to_bytes(32, "big") for number in (third, second, first))
                stored = push(0xABCDEF) + b"\x5f\x52"
                known = push(9) * 3 + push(third) + push(second) + push(first)
                unknown = push(9) * 3 + b"".join(push(32 * i) + b"\x35" for i in range(3))
                for code in (known, unknown):
                    same_inside(stored + code + bytes([opcode]), data, 50_000)


WRITES = [(0, 0), (0, 5), (1, 0), (1, 5), (2, 2), (9, 9), (30, 1), (30, 0)]


@pytest.mark.parametrize("first", WRITES)
@pytest.mark.parametrize("second", WRITES)
def test_slots_cost_and_refund_what_they_do(first: tuple[int, int], second: tuple[int, int]) -> None:
    """Any two writes, and the first again, of slots that hold 0, 1 and 2 and are cold and warm."""
    code = b"".join(push(value) + push(slot) + b"\x55" for slot, value in (first, second, first))
    code += push(first[0]) + b"\x54" + push(3) + b"\x54"
    whole = same_inside(code, stack=2)
    assert whole["error"] is None
    assert is_ours(code, b"", 100_000, b"")
    for gas in (*range(2_300, 2_320), 2_400, 5_000, 22_099, 22_100, 22_101, 100_000 - whole["gas"] - 1):
        same(code, gas=gas)


def test_no_write_with_less_than_2301_gas() -> None:
    """Not even one that changes nothing, of a warm slot, and to the unit."""
    for gas in range(2_290, 2_340):
        error = same(push(1) + push(1) + b"\x55" + b"\x5f\x50" * 9, gas=gas)["error"]
        assert (error is None) == (gas >= 2_301 + 6)


def test_a_loop_keeps_what_lies_below() -> None:
    """Two items that it reads and one that it changes, in a run of its own."""
    start = push(3) + push(7) + push(5)
    loop = b"\x5b" + push(1) + b"\x90\x03\x82\x82\x01\x50\x80" + push(len(start)) + b"\x57"
    for count in (1, 2, 3):
        assert same_inside(start + loop, stack=count)["error"] is None
    assert is_ours(start + loop, b"", 1_000, b"")


INNER = {
    "answers": push(7) + b"\x5f\x52" + push(64) + b"\x5f\xf3",
    "reverts": push(1) + b"\x54" + push(8) + b"\x5f\x52" + push(40) + b"\x5f\xfd",
    "has no gas": b"\x5f" * 900 + push(1 << 40) + b"\x51",
    "is bad": b"\xfe",
    "writes": push(1) + push(1) + b"\x55",
    "logs": b"\x5f\x5f\xa0",
    "loads": push(1) + b"\x54\x50" + push(2) + b"\x54" + b"\x5f\x52" + push(32) + b"\x5f\xf3",
    "calls back": push(3) + b"\x54\x50" + call(SELF, 40_000) + b"\x5f\x52" + push(64) + b"\x5f\xf3",
    "calls back and reverts": push(3) + b"\x54\x50" + call(SELF, 40_000) + b"\x5f\x5f\xfd",
    "has no code": b"",
    "tells its gas": b"\x5a\x5f\x52" + push(32) + b"\x5f\xf3",
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("given", [10, 2_200, 60_000, WORD_MAX])
def test_calls_inside_calls(inner: str, given: int) -> None:
    """Twice, so that what is called is warm then. Called back, the outer one loads what it has written."""
    load = push(2) + b"\x54" + push(3) + b"\x54\x01\x5f\x52" + push(32) + b"\x5f\xf3"
    calling = (call(OTHER, given) + b"\x3d\x3d\x5f" + push(96) + b"\x3e") * 2
    main = push(5) + push(2) + b"\x55" + calling + push(3) + b"\x54"
    main += b"".join(push(32 * i + 4_096) + b"\x52" for i in range(5)) + push(5_000) + b"\x5f\xf3"
    head = push(int.from_bytes(OTHER, "big")) + b"\x33\x14\x61"
    code = head + (len(head) + 3 + len(main)).to_bytes(2, "big") + b"\x57" + main + b"\x5b" + load
    whole = same(code, gas=200_000, other=INNER[inner])
    assert whole["error"] is None or given == WORD_MAX
    for gas in range(1_000, 200_000 - whole["gas"] + 200, 2_503):
        same(code, gas=gas, other=INNER[inner])


def test_every_amount_of_gas_ends_alike() -> None:
    """A call that writes, hashes, loops, copies and returns, cut off after every unit of gas there is."""
    loop = push(5) + b"\x5b" + push(1) + b"\x90\x03\x80" + push(2) + b"\x57"
    code = loop + push(7) + push(64) + b"\x52" + push(96) + b"\x5f\x20" + push(200) + b"\x52" + push(40) + b"\x5f"
    code += push(300) + b"\x5e" + push(32) + push(200) + b"\xf3"
    whole = same(code, gas=10_000)
    assert whole["error"] is None
    assert whole["output"] == keccak(bytes(64) + (7).to_bytes(32, "big"))
    for gas in range(10_000 - whole["gas"] + 2):
        ended = same(code, gas=gas)
        assert (ended["error"] is None) == (gas >= 10_000 - whole["gas"])
        assert is_ours(code, b"", gas, b"")


@pytest.mark.parametrize(("jump", "cost"), [(op.JUMP, 3 + 3 + 8), (op.JUMPI, 3 + 3 + 10)])
def test_bad_jump_is_told_from_missing_gas_to_the_unit(jump: int, cost: int) -> None:
    for gas in range(cost + 3):
        error = same(push(1) + push(9) + bytes([jump]), gas=gas)["error"].__name__
        assert error == ("OutOfGas" if gas < cost else "InvalidJumpDestination")


def test_reading_behind_an_answer_is_told_from_missing_gas_to_the_unit() -> None:
    code = push(1) + b"\x5f\x5f\x3e" + b"\x5f\x50" * 9
    for gas in range(40):
        error = same(code, gas=gas)["error"].__name__
        assert error == ("OutOfGas" if gas < 10 else "OutOfBoundsRead")


def test_stack_is_full_at_1024_and_not_before() -> None:
    assert same(b"\x5f" * STACK_MAX)["error"] is None
    assert same(b"\x5f" * (STACK_MAX + 1))["error"].__name__ == "FullStack"
    assert same(b"\x5f" * (STACK_MAX - 1) + b"\x80\x50\x80")["error"] is None
    assert same(b"\x5f" * STACK_MAX + b"\x80")["error"].__name__ == "FullStack"
    assert same(b"\x5f" * 2 + b"\x50" * 3)["error"].__name__ == "InsufficientStack"
    assert is_ours(b"\x5f" * STACK_MAX, b"", 10_000, b"")


def test_a_run_is_cut_where_it_is_long_and_goes_on() -> None:
    code = (push(1) + b"\x01") * RUN_OPCODES_MAX
    code = push(0) + b"\x35" + code
    assert same_inside(code)["output"][4_096:] == RUN_OPCODES_MAX.to_bytes(32, "big")
    program = runs.program_of(code)
    assert is_ours(code, b"", 10_000, b"")
    assert START in program.runs
    assert len(program.runs) > 1
    for place in (*(~place for place in program.runs), 3):  # no jump leads where one goes on
        with pytest.raises(HandOver):
            program.run(abs(place))


def test_programs_are_remembered_up_to_a_maximum() -> None:
    runs.program_of.cache_clear()
    for number in range(runs.PROGRAMS_MAX + 5):
        runs.program_of(push(number))
    assert runs.program_of.cache_info().currsize == runs.PROGRAMS_MAX
