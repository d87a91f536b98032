"""Our computation against py-evm's own: the same outcome on random code, and bit for bit the same blocks."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from eth.vm import opcode_values as op
from eth.vm.forks.cancun.computation import CancunComputation
from eth.vm.forks.cancun.opcodes import CANCUN_OPCODES
from eth.vm.message import Message
from eth_hash.auto import keccak
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ledger import runs
from ledger.computation import OPCODES, LedgerComputation
from ledger.runs import BINARY, OTHER, STACK_MAX, UNARY, Program

SELF, CALLER = b"\x11" * 20, b"\x22" * 20
WORD_MAX = (1 << 256) - 1

EDGES = (0, 1, 2, 31, 32, 33, 64, 95, 255, 256, 1 << 16, 1 << 64, (1 << 255) - 1, 1 << 255, WORD_MAX - 31, WORD_MAX)


class Storage:
    """As much of py-evm's state as code without calls asks for: slots of one account, cold when first used."""

    coinbase = b"\x33" * 20

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.warm: set[object] = set()
        self.execution_context = SimpleNamespace(chain_id=1)

    def mark_address_warm(self, address: bytes) -> None:
        self.warm.add(address)

    def is_storage_warm(self, address: bytes, slot: int) -> bool:
        return slot in self.warm

    def mark_storage_warm(self, address: bytes, slot: int) -> None:
        self.warm.add(slot)

    def get_storage(self, address: bytes, slot: int, from_journal: bool = True) -> int:
        return self.slots.get(slot, 0) if from_journal else 0

    def set_storage(self, address: bytes, slot: int, value: int) -> None:
        self.slots[slot] = value

    def get_balance(self, address: bytes) -> int:
        return 7


def outcome(kind: type[Any], code: bytes, data: bytes, gas: int, stack: Iterable[int] = ()) -> dict[str, Any]:
    """Everything that a call leaves behind."""
    state = Storage()
    message = Message(gas=gas, to=SELF, sender=CALLER, value=5, data=data, code=code)
    context = SimpleNamespace(origin=CALLER, gas_price=0, get_next_log_counter=iter(range(1 << 20)).__next__)
    seen: list[Any] = []

    class Kept(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._stack.values.extend(stack)
            seen.append(self)

    Kept.apply_computation(state, message, context)
    (done,) = seen
    error = done.error if done.is_error else None
    return {
        "error": type(error),
        "gas": done._gas_meter.gas_remaining,
        "refund": done._gas_meter.gas_refunded,
        "output": done.output,
        "logs": done._log_entries,
        "slots": state.slots,
        # After an error nobody sees these again, and an opcode that fails may have popped some of its items or none.
        "stack": None if error else [v if isinstance(v, int) else int.from_bytes(v, "big") for v in done._stack.values],
        "memory": None if error else bytes(done._memory._bytes),
        "next": None if error else done.code.program_counter,
    }


def same(code: bytes, data: bytes = b"", gas: int = 100_000, stack: Iterable[int] = ()) -> dict[str, Any]:
    """The outcome, which has to be py-evm's."""
    ours = outcome(LedgerComputation, code, data, gas, stack)
    assert ours == outcome(CancunComputation, code, data, gas, stack), code.hex()
    return ours


def push(value: int) -> bytes:
    size = (value.bit_length() + 7) // 8
    return bytes([op.PUSH0 + size]) + value.to_bytes(size, "big")


PLAIN = sorted({*BINARY, *UNARY, *OTHER, op.POP, op.MLOAD, op.MSTORE, op.JUMP, op.JUMPI, op.JUMPDEST})
NOT_PLAIN = [op.SLOAD, op.SSTORE, op.GAS, op.PC, op.MSIZE, op.MSTORE8, op.RETURN, op.REVERT, op.STOP, op.LOG1, op.EXP]
NOT_PLAIN += [op.SDIV, op.ADDMOD, op.SIGNEXTEND, op.SAR, op.RETURNDATACOPY, op.ORIGIN, op.CHAINID, 0x0C, 0xFE]

numbers = st.one_of(st.sampled_from(EDGES), st.integers(0, 300), st.integers(0, WORD_MAX))
opcodes = st.one_of(
    st.integers(op.DUP1, op.SWAP16), st.sampled_from(PLAIN), st.sampled_from(PLAIN), st.sampled_from(NOT_PLAIN)
).map(lambda opcode: bytes([opcode]))
pieces = st.one_of(numbers.map(push), st.integers(0, 40).map(push), opcodes, opcodes, opcodes)
programs = st.lists(pieces, max_size=60).map(b"".join)
stacks = st.one_of(st.lists(numbers, max_size=20), st.integers(1020, 1024).map(lambda size: [1] * size))


@settings(max_examples=400)
@given(code=programs, data=st.binary(max_size=80), gas=st.sampled_from([0, 5, 60, 400, 3_000, 100_000]), stack=stacks)
@example(code=b"\x5b" * 20 + push(0) + b"\x56", data=b"", gas=500, stack=[])  # round and round until the gas is gone
@example(code=push(3) + b"\x56\x60\x5b", data=b"", gas=500, stack=[])  # a jump into the data of a PUSH
@example(code=b"\x63\xaa", data=b"", gas=500, stack=[])  # a PUSH that goes on behind the end
def test_any_code_ends_as_under_py_evm(code: bytes, data: bytes, gas: int, stack: list[int]) -> None:
    same(code, data, gas, stack)


@settings(max_examples=200)
@given(code=st.binary(max_size=200), gas=st.integers(0, 20_000))
def test_any_bytes_end_as_under_py_evm(code: bytes, gas: int) -> None:
    calls = {op.CREATE, op.CALL, op.CALLCODE, op.DELEGATECALL, op.CREATE2, op.STATICCALL, op.SELFDESTRUCT}
    state = {op.BALANCE, op.EXTCODESIZE, op.EXTCODECOPY, op.EXTCODEHASH, op.BLOCKHASH, *range(0x41, 0x4B)}
    state |= {op.TLOAD, op.TSTORE}
    same(bytes(opcode for opcode in code if opcode not in calls | state), b"data", gas)


@pytest.mark.parametrize("opcode", [*BINARY, *UNARY])
def test_arithmetic_at_its_edges(opcode: int) -> None:
    """With both items from the stack, and with the upper one pushed just before, which makes it another step."""
    for below in EDGES[::3] if opcode in BINARY else (1,):
        stacked = b"".join(push(below) + push(above) + b"\x5f\x50" + bytes([opcode]) for above in EDGES)
        pushed = b"".join(push(below) + push(above) + bytes([opcode]) for above in EDGES)
        for code in (stacked, pushed):
            assert same(code)["error"] is type(None)


@pytest.mark.parametrize("opcode", [*OTHER, op.MLOAD, op.MSTORE])
def test_memory_and_data_at_their_edges(opcode: int) -> None:
    for first in (0, 1, 32, 4_000, 1 << 30, WORD_MAX):
        for second in (0, 1, 33, 1 << 64):
            for third in (0, 1, 65):
                stack = [third, second, first]
                same(push(0xABCDEF) + b"\x5f\x52" + bytes([opcode]), bytes(range(1, 60)), 50_000, stack)
                same(push(third) + push(first) + bytes([opcode]), bytes(range(1, 60)), 50_000, stack)


def test_every_amount_of_gas_ends_alike() -> None:
    """A call that writes, hashes, loops, copies and returns, cut off after every unit of gas there is."""
    loop = push(5) + b"\x5b" + push(1) + b"\x90\x03\x80" + push(2) + b"\x57"
    code = loop + push(7) + push(64) + b"\x52" + push(96) + b"\x5f\x20" + push(200) + b"\x52" + push(40) + b"\x5f"
    code += push(300) + b"\x5e" + push(32) + push(200) + b"\xf3"
    whole = same(code, gas=10_000)
    assert whole["error"] is type(None)
    assert whole["output"] == keccak(bytes(64) + (7).to_bytes(32, "big"))
    for gas in range(10_000 - whole["gas"] + 2):
        ended = same(code, gas=gas)
        assert (ended["error"] is type(None)) == (gas >= 10_000 - whole["gas"])


@pytest.mark.parametrize(("jump", "cost"), [(op.JUMP, 3 + 3 + 8), (op.JUMPI, 3 + 3 + 10)])
def test_bad_jump_is_told_from_missing_gas_to_the_unit(jump: int, cost: int) -> None:
    for gas in range(cost + 3):
        error = same(push(1) + push(9) + bytes([jump]), gas=gas)["error"].__name__
        assert error == ("OutOfGas" if gas < cost else "InvalidJumpDestination")


def test_stack_is_full_at_1024_and_not_before() -> None:
    assert same(b"\x5f" * STACK_MAX)["error"] is type(None)
    assert same(b"\x5f" * (STACK_MAX + 1))["error"].__name__ == "FullStack"
    assert same(b"\x80", stack=[1] * STACK_MAX)["error"].__name__ == "FullStack"
    assert same(b"\x50" * 3, stack=[1, 2])["error"].__name__ == "InsufficientStack"


def test_each_plain_opcode_has_one_static_cost_and_a_function() -> None:
    assert set(OTHER) == set(OPCODES)
    for opcode in (*PLAIN, *range(op.PUSH0, op.SWAP16 + 1)):
        assert CANCUN_OPCODES[opcode].gas_cost >= 0
        program = Program(bytes([opcode]))
        assert program.run(0).cost == CANCUN_OPCODES[opcode].gas_cost


def test_programs_are_remembered_up_to_a_maximum() -> None:
    runs.program_of.cache_clear()
    for number in range(runs.PROGRAMS_MAX + 5):
        runs.program_of(push(number))
    assert runs.program_of.cache_info().currsize == runs.PROGRAMS_MAX
