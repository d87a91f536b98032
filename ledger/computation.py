"""py-evm's computation of one call, with runs of plain opcodes executed at a stroke.

py-evm spends some ten Python calls on an opcode as small as PUSH1, and nine in ten opcodes of a compiled contract are
of that size. `Code` stands where py-evm's own CodeStream does: py-evm's loop asks it for the next opcode, and what it
hands out is only what is not plain (state, logs, other accounts, calls, the end). The plain ones before it are done
already, a run at a time (ledger.runs).

A run is executed here only when its whole gas is there and the stack stays within its bounds. Whatever cannot be paid,
is not there or is not allowed is handed to py-evm opcode by opcode, with stack, memory, gas and program counter as
they are then: every error is py-evm's own. The tests hold both ways against each other on random code. py-evm's
debug2 trace shows what py-evm executes, so no plain opcodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from eth.constants import GAS_COPY, GAS_SHA3WORD
from eth.vm import opcode_values as op
from eth.vm.code_stream import CodeStream
from eth.vm.computation import memory_gas_cost
from eth.vm.forks.cancun.computation import CancunComputation
from eth_hash.auto import keccak

from ledger.runs import WORD_MAX, Kind, Run, program_of


class Code(CodeStream):
    """The code of one call. Iterating over it executes its plain opcodes and gives the others.

    The stack it leaves to py-evm has integers only; py-evm's has bytes too, wherever an opcode happened to have them.
    """

    program_counter: int

    def __init__(self, code: bytes, computation: Any) -> None:
        super().__init__(code)
        self.code = code
        self.computation = computation
        self.values: list[Any] = computation._stack.values
        self.memory = computation._memory
        self.meter = computation._gas_meter
        self.data = bytes(computation.msg.data)

    def __iter__(self) -> Iterator[int]:
        program, meter, values, size = program_of(self.code), self.meter, self.values, len(self.code)
        runs, destinations = program.runs, program.destinations
        while True:
            at = self.program_counter
            run = runs.get(at) or program.run(at)
            if run.end != at and run.cost <= meter.gas_remaining and run.needs <= len(values) <= run.room:
                meter.gas_remaining -= run.cost
                if self._execute(run, destinations):
                    continue
                at = self.program_counter
            if at < size:
                self.program_counter = at + 1
                yield self.code[at]
            else:
                yield op.STOP
            if values and type(values[-1]) is bytes:
                values[-1] = int.from_bytes(values[-1], "big")

    def _execute(self, run: Run, destinations: frozenset[int]) -> bool:  # noqa: PLR0912
        """Do the steps of a run that is paid for. False when the opcode at the program counter has to be py-evm's."""
        values, memory = self.values, self.memory._bytes
        push, pop = values.append, values.pop
        for kind, argument, at, ahead in run.steps:
            if kind <= DUP:
                push(argument if kind == PUSH else values[argument])
            elif kind <= ADD_CONSTANT:
                if kind == BINARY:
                    values[-1] = argument(pop(), values[-1])
                elif kind == UNARY:
                    values[-1] = argument(values[-1])
                elif kind == POP:
                    pop()
                else:
                    values[-1] = (values[-1] + argument) & WORD_MAX
            elif kind <= MSTORE:
                start = values[-1] if argument is None else argument
                if start + 32 > len(memory):
                    if not self.reach(start + 32, 0):
                        return self._hand_over(at, ahead)
                    memory = self.memory._bytes
                if argument is None:
                    pop()
                if kind == MLOAD:
                    push(int.from_bytes(memory[start : start + 32], "big"))
                else:
                    memory[start : start + 32] = pop().to_bytes(32, "big")
            elif kind == JUMP_IF_TO:
                self.program_counter = argument if pop() else run.end
                return True
            elif kind == OTHER:
                if not OPCODES[argument](self):
                    return self._hand_over(at, ahead)
                memory = self.memory._bytes
            elif kind == SWAP:
                values[-1], values[argument] = values[argument], values[-1]
            else:
                taken = kind == JUMP or values[-2]
                if taken and values[-1] not in destinations:
                    return self._hand_over(at, ahead)
                self.program_counter = values[-1] if taken else run.end
                del values[-1 if kind == JUMP else -2 :]
                return True
        self.program_counter = run.end
        return True

    def _hand_over(self, at: int, ahead: int) -> bool:
        """Leave the opcode at `at` to py-evm, and give back what it and those after it cost."""
        self.meter.gas_remaining += ahead
        self.program_counter = at
        return False

    def reach(self, end: int, fee: int) -> bool:
        """Pay `fee` and make memory reach `end`; False, with nothing changed, when the gas is not there for both."""
        size = len(self.memory)
        if end > size:
            new_size = end + 31 & ~31
            fee += memory_gas_cost(new_size) - memory_gas_cost(size)
            if fee > self.meter.gas_remaining:
                return False
            self.memory.extend(size, new_size - size)
        elif fee > self.meter.gas_remaining:
            return False
        self.meter.gas_remaining -= fee
        return True


PUSH, DUP, BINARY, UNARY, POP, ADD_CONSTANT, MLOAD, MSTORE, JUMP_IF_TO, OTHER, SWAP, JUMP, JUMP_IF = map(int, Kind)
"""Plain numbers, which the loop compares faster than members."""


def _words(size: int) -> int:
    return (size + 31) // 32


def _sha3(code: Code) -> bool:
    values = code.values
    start, size = values[-1], values[-2]
    if not code.reach(start + size if size else 0, GAS_SHA3WORD * _words(size)):
        return False
    values.pop()
    values[-1] = int.from_bytes(keccak(code.memory.read_bytes(start, size)), "big")
    return True


def _copy(code: Code, source: bytes) -> bool:
    """Memory from a source that has zeros behind its end."""
    values = code.values
    to, start, size = values[-1], values[-2], values[-3]
    if not code.reach(to + size if size else 0, GAS_COPY * _words(size)):
        return False
    del values[-3:]
    if size:
        code.memory._bytes[to : to + size] = source[start : start + size].ljust(size, b"\0")
    return True


def _mcopy(code: Code) -> bool:
    values = code.values
    to, start, size = values[-1], values[-2], values[-3]
    if not code.reach(max(to, start) + size if size else 0, GAS_COPY * _words(size)):
        return False
    del values[-3:]
    if size:
        memory = code.memory._bytes
        memory[to : to + size] = memory[start : start + size]
    return True


def _calldataload(code: Code) -> bool:
    start = code.values[-1]
    code.values[-1] = int.from_bytes(code.data[start : start + 32].ljust(32, b"\0"), "big")
    return True


def _pushes(value: Callable[[Code], int]) -> Callable[[Code], bool]:
    def push(code: Code) -> bool:
        code.values.append(value(code))
        return True

    return push


OPCODES: Final[dict[int, Callable[[Code], bool]]] = {
    op.SHA3: _sha3,
    op.ADDRESS: _pushes(lambda code: int.from_bytes(code.computation.msg.storage_address, "big")),
    op.CALLER: _pushes(lambda code: int.from_bytes(code.computation.msg.sender, "big")),
    op.CALLVALUE: _pushes(lambda code: code.computation.msg.value),
    op.CALLDATALOAD: _calldataload,
    op.CALLDATASIZE: _pushes(lambda code: len(code.data)),
    op.CALLDATACOPY: lambda code: _copy(code, code.data),
    op.CODECOPY: lambda code: _copy(code, code.code),
    op.RETURNDATASIZE: _pushes(lambda code: len(code.computation.return_data)),
    op.MCOPY: _mcopy,
}
"""The plain opcodes of Kind.OTHER: each True when done, False with nothing changed when py-evm has to do it."""


class LedgerComputation(CancunComputation):
    """A call by the rules of Cancun. Nothing differs but how fast."""

    def __init__(self, state: Any, message: Any, transaction_context: Any) -> None:
        super().__init__(state, message, transaction_context)
        self.code = Code(message.code, self)
