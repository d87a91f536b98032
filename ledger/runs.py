"""Contract code cut into runs: plain opcodes in a row, with what they cost and need of the stack, found once.

A plain opcode touches nothing but its own call's stack, memory and program counter, and what it computes depends on
nothing but these, the call's data and its code. Gas costs are read off py-evm's table. Knows no execution: see
ledger.computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

from eth.vm import opcode_values as op
from eth.vm.forks.cancun.opcodes import CANCUN_OPCODES

WORD_MAX: Final = (1 << 256) - 1
STACK_MAX: Final = 1024
PROGRAMS_MAX: Final = 64
"""Contracts whose runs are remembered; this ledger has five."""

RUN_OPCODES_MAX: Final = 64
"""Where a run is cut, so that cutting a code anew at each of its positions takes no longer than that many times it."""

_SIGN: Final = 1 << 255


class Kind(IntEnum):
    """What a step does, in the order in which ledger.computation asks: it halves them first, frequent ones in front."""

    PUSH = 0
    DUP = 1
    BINARY = 2
    UNARY = 3
    POP = 4
    ADD_CONSTANT = 5
    MLOAD = 6
    MSTORE = 7
    JUMP_IF_TO = 8
    OTHER = 9
    SWAP = 10
    JUMP = 11
    JUMP_IF = 12


Step = tuple[int, Any, int, int]
"""One opcode, or a PUSH and the one after it: its kind, its argument, where it begins in the code, and what it and all
after it in its run cost. The last two tell where to go on and what to give back when py-evm has to do it. A plain tuple
with plain numbers: Python has short cuts for these, and none for what derives from them.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """Plain opcodes from one position on, to the first one that is not plain, or behind the first jump.

    It ends where it begins when the opcode there is not plain.

    `needs` stack items have to be there, at most `room` may be, so that no opcode of it finds too few or one too many.
    """

    steps: tuple[Step, ...]
    cost: int
    needs: int
    room: int
    end: int


BINARY: Final[dict[int, Callable[[int, int], int]]] = {
    op.ADD: lambda a, b: (a + b) & WORD_MAX,
    op.MUL: lambda a, b: (a * b) & WORD_MAX,
    op.SUB: lambda a, b: (a - b) & WORD_MAX,
    op.DIV: lambda a, b: a // b if b else 0,
    op.MOD: lambda a, b: a % b if b else 0,
    op.LT: lambda a, b: 1 if a < b else 0,
    op.GT: lambda a, b: 1 if a > b else 0,
    op.SLT: lambda a, b: 1 if a ^ _SIGN < b ^ _SIGN else 0,
    op.SGT: lambda a, b: 1 if a ^ _SIGN > b ^ _SIGN else 0,
    op.EQ: lambda a, b: 1 if a == b else 0,
    op.AND: lambda a, b: a & b,
    op.OR: lambda a, b: a | b,
    op.XOR: lambda a, b: a ^ b,
    op.BYTE: lambda a, b: b >> (248 - 8 * a) & 0xFF if a < 32 else 0,
    op.SHL: lambda a, b: b << a & WORD_MAX if a < 256 else 0,
    op.SHR: lambda a, b: b >> a if a < 256 else 0,
}
"""Of the topmost stack item and the one below it, the item that replaces both."""

UNARY: Final[dict[int, Callable[[int], int]]] = {
    op.ISZERO: lambda a: 0 if a else 1,
    op.NOT: lambda a: a ^ WORD_MAX,
}

OTHER: Final[dict[int, tuple[int, int]]] = {
    op.SHA3: (2, 1),
    op.ADDRESS: (0, 1),
    op.CALLER: (0, 1),
    op.CALLVALUE: (0, 1),
    op.CALLDATALOAD: (1, 1),
    op.CALLDATASIZE: (0, 1),
    op.CALLDATACOPY: (3, 0),
    op.CODECOPY: (3, 0),
    op.RETURNDATASIZE: (0, 1),
    op.MCOPY: (3, 0),
}
"""How many stack items each takes and leaves. ledger.computation has a function for each of them."""

_KINDS: Final = {
    op.POP: (Kind.POP, 1, 0),
    op.MLOAD: (Kind.MLOAD, 1, 1),
    op.MSTORE: (Kind.MSTORE, 2, 0),
    op.JUMP: (Kind.JUMP, 1, 0),
    op.JUMPI: (Kind.JUMP_IF, 2, 0),
}

_JUMPS: Final = (Kind.JUMP, Kind.JUMP_IF, Kind.JUMP_IF_TO)


class _Plain(NamedTuple):
    """One plain opcode read: `taken` and `left` are stack items, `kind` is None when there is nothing to do."""

    kind: Kind | None
    argument: Any
    taken: int
    left: int
    size: int


def _read(code: bytes, at: int) -> _Plain | None:
    """The opcode at a position, None when it is not plain."""
    opcode = code[at]
    if op.PUSH0 <= opcode <= op.PUSH32:
        count = opcode - op.PUSH0
        # Beyond the end of the code are zeros.
        value = int.from_bytes(code[at + 1 : at + 1 + count].ljust(count, b"\0"), "big")
        return _Plain(Kind.PUSH, value, 0, 1, 1 + count)
    if op.DUP1 <= opcode <= op.DUP16:
        depth = opcode - op.DUP1 + 1
        return _Plain(Kind.DUP, -depth, depth, depth + 1, 1)
    if op.SWAP1 <= opcode <= op.SWAP16:
        depth = opcode - op.SWAP1 + 2
        return _Plain(Kind.SWAP, -depth, depth, depth, 1)
    if opcode == op.JUMPDEST:
        return _Plain(None, None, 0, 0, 1)
    if opcode in BINARY:
        return _Plain(Kind.BINARY, BINARY[opcode], 2, 1, 1)
    if opcode in UNARY:
        return _Plain(Kind.UNARY, UNARY[opcode], 1, 1, 1)
    if opcode in OTHER:
        return _Plain(Kind.OTHER, opcode, *OTHER[opcode], 1)
    if opcode in _KINDS:
        kind, taken, left = _KINDS[opcode]
        return _Plain(kind, None, taken, left, 1)
    return None


class Program:
    """One contract's code: where jumps may go, and its runs, each found when it is first come to."""

    def __init__(self, code: bytes) -> None:
        self.destinations = frozenset(_destinations(code))
        self.runs: dict[int, Run] = {}
        self._code = code

    def run(self, start: int) -> Run:
        """The run that begins at a position."""
        found: list[tuple[Kind, object, int, int]] = []
        depth = lowest = highest = cost = 0
        at = start
        for _ in range(RUN_OPCODES_MAX):
            plain = _read(self._code, at) if at < len(self._code) else None
            if plain is None:
                break
            if plain.kind is not None:
                self._append(found, plain, at, cost)
            lowest = min(lowest, depth - plain.taken)
            depth += plain.left - plain.taken
            highest = max(highest, depth)
            cost += CANCUN_OPCODES[self._code[at]].gas_cost
            at += plain.size
            if plain.kind in _JUMPS:
                break
        steps = tuple((int(kind), argument, place, cost - before) for kind, argument, place, before in found)
        run = self.runs[start] = Run(steps, cost, -lowest, STACK_MAX - highest, at)
        return run

    def _append(self, found: list[tuple[Kind, object, int, int]], plain: _Plain, at: int, before: int) -> None:
        """Add a step, or make the PUSH before it and this one a single step."""
        assert plain.kind is not None
        joined = self._joined(found[-1][1], plain) if found and found[-1][0] is Kind.PUSH else None
        if joined:
            found[-1] = (*joined, *found[-1][2:])
        else:
            found.append((plain.kind, plain.argument, at, before))

    def _joined(self, constant: Any, plain: _Plain) -> tuple[Kind, object] | None:
        """PUSH of a constant and the opcode after it as one step; None when that is not one of those worth it."""
        match plain.kind:
            case Kind.BINARY if plain.argument is BINARY[op.ADD]:
                return Kind.ADD_CONSTANT, constant
            case Kind.BINARY:
                return Kind.UNARY, partial(plain.argument, constant)
            case Kind.MLOAD | Kind.MSTORE:
                return plain.kind, constant
            case Kind.JUMP_IF if constant in self.destinations:
                return Kind.JUMP_IF_TO, constant
        return None


def _destinations(code: bytes) -> Iterator[int]:
    """Every JUMPDEST that is not inside the data of a PUSH."""
    at = 0
    while at < len(code):
        opcode = code[at]
        if opcode == op.JUMPDEST:
            yield at
        at += 1 + (opcode - op.PUSH0 if op.PUSH1 <= opcode <= op.PUSH32 else 0)


program_of = lru_cache(PROGRAMS_MAX)(Program)
"""The program of a code, remembered: cutting is pure."""
