"""Contract code as Python: the opcodes from one position on, written as one function, compiled once.

A run follows the code as far as what comes next is known: through jumps to constant places and past the JUMPIs that are
not taken. Within it the EVM's stack is names and constants of the function; only what is left on it at the end is
put on the real one. What an opcode costs whatever it is given is charged for many at once, up to the next place where
the gas itself matters (GAS, SSTORE, a call, a way out). That may find out of gas earlier than opcode by opcode, and
ends the same: all gas of the call is gone, all that it did is undone. Gas costs are read off py-evm's table.

A run that comes to what it does not know, or that ends in any error but that one, raises HandOver: the call is py-evm's
from its beginning, nothing being changed yet. Knows no state: ledger.computation has what runs work on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final

from eth.exceptions import OutOfGas
from eth.vm import opcode_values as op
from eth.vm.forks.cancun.opcodes import CANCUN_OPCODES

STACK_MAX: Final = 1024
PROGRAMS_MAX: Final = 64
"""Contracts whose runs are remembered; this ledger has five."""

RUN_OPCODES_MAX: Final = 200
"""Where a run is cut, wherever its code leads: what one costs to write is bounded."""

START: Final = ~0
"""Where code begins. A position is negative, -1 less it, where no jump leads: there a run goes on that was cut."""

_MAX: Final = hex((1 << 256) - 1)
_SIGN: Final = hex(1 << 255)

Run = Callable[[Any], int | None]
"""Works on a ledger.computation.Frame; where to go on, None at the end of the call."""


class HandOver(Exception):
    """py-evm has to execute this call."""


CALCULATED: Final[dict[int, str]] = {
    op.ADD: f"({{a}} + {{b}}) & {_MAX}",
    op.MUL: f"({{a}} * {{b}}) & {_MAX}",
    op.SUB: f"({{a}} - {{b}}) & {_MAX}",
    op.LT: "{a} < {b}",
    op.GT: "{a} > {b}",
    op.SLT: f"({{a}} ^ {_SIGN}) < ({{b}} ^ {_SIGN})",
    op.SGT: f"({{a}} ^ {_SIGN}) > ({{b}} ^ {_SIGN})",
    op.EQ: "{a} == {b}",
    op.AND: "{a} & {b}",
    op.OR: "{a} | {b}",
    op.XOR: "{a} ^ {b}",
    op.ISZERO: "not {a}",
    op.NOT: f"{{a}} ^ {_MAX}",
}
"""Of the topmost stack item a and the one below it b, what replaces them. True and False stand for 1 and 0."""

GUARDED: Final[dict[int, tuple[str, str]]] = {
    op.DIV: ("{a} // {b}", "{b} != 0"),
    op.MOD: ("{a} % {b}", "{b} != 0"),
    op.BYTE: ("{b} >> (248 - 8 * {a}) & 255", "{a} < 32"),
    op.SHL: (f"({{b}} << {{a}}) & {_MAX}", "{a} < 256"),
    op.SHR: ("{b} >> {a}", "{a} < 256"),
}
"""The same, each with the condition without which it is 0."""

PUSHED: Final[dict[int, str]] = {
    op.ADDRESS: "f.own",
    op.CALLER: "f.caller",
    op.CALLVALUE: "f.value",
    op.CALLDATASIZE: "f.data_size",
    op.RETURNDATASIZE: "len(f.returned)",
    op.TIMESTAMP: "f.scope.timestamp",
}
"""What is pushed with nothing taken."""

DONE: Final[dict[int, tuple[int, str]]] = {
    op.CALLDATALOAD: (1, "{new} = from_bytes(f.data[{0}:{0} + 32])"),
    op.CALLDATACOPY: (3, "gas = f.copy(gas, f.data, {0}, {1}, {2})"),
    op.CODECOPY: (3, "gas = f.copy(gas, f.code, {0}, {1}, {2})"),
    op.RETURNDATACOPY: (3, "gas = f.copy_returned(gas, {0}, {1}, {2})"),
    op.MCOPY: (3, "gas = f.copy_within(gas, {0}, {1}, {2})"),
    op.SHA3: (2, "gas, {new} = f.hash(gas, {0}, {1})"),
    op.SLOAD: (1, "gas, {new} = f.load(gas, {0})"),
    op.SSTORE: (2, "gas = f.store(gas, {0}, {1})"),
    op.STATICCALL: (6, "gas, {new} = f.static_call(gas, {0}, {1}, {2}, {3}, {4}, {5})"),
    op.LOG0: (2, "gas = f.log(gas, {0}, {1}, ())"),
    op.LOG1: (3, "gas = f.log(gas, {0}, {1}, ({2},))"),
    op.LOG2: (4, "gas = f.log(gas, {0}, {1}, ({2}, {3}))"),
    op.LOG3: (5, "gas = f.log(gas, {0}, {1}, ({2}, {3}, {4}))"),
    op.LOG4: (6, "gas = f.log(gas, {0}, {1}, ({2}, {3}, {4}, {5}))"),
}
"""How many stack items are taken, the topmost first, and the statement; `new`, where it names one, is pushed."""

ENDING: Final[dict[int, tuple[int, str]]] = {
    op.STOP: (0, "return f.end(gas, 0, 0)"),
    op.RETURN: (2, "return f.end(gas, {0}, {1})"),
    op.REVERT: (2, "return f.revert(gas, {0}, {1})"),
}
"""The same of what ends a call."""

_EXACT: Final = frozenset({op.SSTORE, op.STATICCALL, op.RETURNDATACOPY})
"""These look at the gas that is left, or may end the call in another error than out of gas: all that comes before them
is charged before, and nothing that comes after."""


class Program:
    """One contract's code: where jumps may go, and its runs, each written when it is first come to."""

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.destinations = frozenset(_destinations(code))
        self.runs: dict[int, Run] = {}

    def run(self, place: int) -> Run:
        """The run from a place on. Raises HandOver for one where no jump may go."""
        if place >= 0 and place not in self.destinations:
            raise HandOver
        run = self.runs[place] = _Writer(self).run(place if place >= 0 else ~place)
        return run


class _Writer:
    """Writes one run. Stack items are names in it or numbers known already."""

    def __init__(self, program: Program) -> None:
        self._code = program.code
        self._destinations = program.destinations
        self._passed: set[int] = set()
        self._lines: list[str] = []
        self._names = 0
        self._stack: list[str | int] = []
        self._taken = 0
        """How many of the items that the run finds on the stack it has read; `_stack` stands in for them."""
        self._highest = 0
        self._memory = 0
        """Bytes of memory that are there for certain."""
        self._cost = 0

    def run(self, at: int) -> Run:
        self._begin_charge()
        for _ in range(RUN_OPCODES_MAX):
            following = self._step(at)
            if following is None:
                break
            at = following
        else:
            self._leave(str(~at))
        self._end_charge()
        head = [
            "def run(f):",
            " stack, memory, gas = f.stack, f.memory, f.gas",
            f" if not {self._taken} <= len(stack) <= {STACK_MAX - self._highest}: raise HandOver",
        ]
        scope: dict[str, Any] = {"HandOver": HandOver, "OutOfGas": OutOfGas, "from_bytes": int.from_bytes}
        exec("\n".join((*head, *self._lines)), scope)
        run: Run = scope["run"]
        return run

    def _write(self, line: str) -> None:
        self._lines.append(f" {line}")

    # Gas

    def _begin_charge(self) -> None:
        """From here on costs add up, to be charged here."""
        self._cost, self._charge_at = 0, len(self._lines)

    def _end_charge(self) -> None:
        if self._cost:
            charge = [f" gas -= {self._cost}", " if gas < 0: raise OutOfGas"]
            self._lines[self._charge_at : self._charge_at] = charge

    # Stack

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def _reach(self, depth: int) -> None:
        """Have names for so many items."""
        while len(self._stack) < depth:
            self._taken += 1
            self._write(f"s{self._taken} = stack[-{self._taken}]")
            self._stack.insert(0, f"s{self._taken}")

    def _pop(self, count: int) -> list[str | int]:
        """The topmost item first."""
        self._reach(count)
        return [self._stack.pop() for _ in range(count)]

    def _push(self, item: str | int) -> None:
        self._stack.append(item)
        self._highest = max(self._highest, len(self._stack) - self._taken)

    def _leave(self, place: str, indent: str = "") -> None:
        """Put on the stack what is not there already, and go on elsewhere."""
        items, taken = self._stack, self._taken
        while taken and items and items[0] == f"s{taken}":
            items, taken = items[1:], taken - 1
        if taken:
            self._write(f"{indent}del stack[-{taken}:]")
        if items:
            self._write(f"{indent}stack += ({', '.join(map(str, items))},)")
        self._write(f"{indent}f.gas = gas")
        self._write(f"{indent}return {place}")

    # Opcodes

    def _step(self, at: int) -> int | None:  # noqa: PLR0912
        """Write the opcode at a position; the position of the one after it, None where the run ends."""
        opcode = self._code[at] if at < len(self._code) else op.STOP
        if opcode in _EXACT or opcode in ENDING:
            self._end_charge()
            self._begin_charge()
        if opcode in CANCUN_OPCODES:
            self._cost += CANCUN_OPCODES[opcode].gas_cost
        if op.PUSH0 <= opcode <= op.PUSH32:
            count = opcode - op.PUSH0
            # Beyond the end of the code are zeros.
            self._push(int.from_bytes(self._code[at + 1 : at + 1 + count].ljust(count, b"\0")))
            at += count
        elif op.DUP1 <= opcode <= op.DUP16:
            self._reach(opcode - op.DUP1 + 1)
            self._push(self._stack[op.DUP1 - opcode - 1])
        elif op.SWAP1 <= opcode <= op.SWAP16:
            depth = opcode - op.SWAP1 + 2
            self._reach(depth)
            self._stack[-1], self._stack[-depth] = self._stack[-depth], self._stack[-1]
        elif opcode == op.POP:
            self._pop(1)
        elif opcode in CALCULATED or opcode in GUARDED:
            self._calculate(opcode)
        elif opcode in PUSHED:
            self._assign(PUSHED[opcode])
        elif opcode in DONE:
            self._do(*DONE[opcode])
            if opcode in _EXACT:
                self._end_charge()
                self._begin_charge()
        elif opcode == op.MLOAD:
            (start,) = self._pop(1)
            self._reserve(start)
            self._assign(f"from_bytes(memory[{start}:{start} + 32])")
        elif opcode == op.MSTORE:
            start, value = self._pop(2)
            self._reserve(start)
            self._write(f"memory[{start}:{start} + 32] = ({value}).to_bytes(32)")
        elif opcode in {op.JUMP, op.JUMPI}:
            return self._jump(opcode, at)
        elif opcode == op.GAS:
            self._end_charge()
            self._assign("gas")
            self._begin_charge()
        elif opcode in ENDING:
            self._do(*ENDING[opcode])
            return None
        elif opcode != op.JUMPDEST:
            self._write("raise HandOver")
            return None
        return at + 1

    def _assign(self, expression: str) -> None:
        name = self._name()
        self._write(f"{name} = {expression}")
        self._push(name)

    def _calculate(self, opcode: int) -> None:
        names = dict(zip("ab", self._pop(1 if opcode in {op.ISZERO, op.NOT} else 2), strict=False))
        expression, guard = GUARDED.get(opcode) or (CALCULATED[opcode], None)
        whole = expression.format(**names)
        if guard is not None:
            condition = guard.format(**names)
            if isinstance(names["b" if "{b}" in guard else "a"], int):
                whole = whole if eval(condition) else "0"
            else:
                whole = f"{whole} if {condition} else 0"
        if all(isinstance(item, int) for item in names.values()) or whole == "0":
            self._push(int(eval(whole)))
        else:
            self._assign(whole)

    def _do(self, count: int, statement: str) -> None:
        """A statement of `count` items; what it makes is pushed."""
        items, name = self._pop(count), self._name()
        self._write(statement.format(*items, new=name))
        if "{new}" in statement:
            self._push(name)

    def _reserve(self, start: str | int) -> None:
        """Memory for a word."""
        if not isinstance(start, int):
            self._write(f"if len(memory) < {start} + 32: gas = f.grow(gas, {start} + 32)")
        elif start + 32 > self._memory:
            self._write(f"if len(memory) < {start + 32}: gas = f.grow(gas, {start + 32})")
            self._memory = start + 32

    def _jump(self, opcode: int, at: int) -> int | None:
        (to,) = self._pop(1)
        condition = self._pop(1)[0] if opcode == op.JUMPI else 1
        self._end_charge()
        if isinstance(condition, int):
            if not condition:
                self._begin_charge()
                return at + 1
            if isinstance(to, int) and to in self._destinations and to not in self._passed:
                self._passed.add(to)
                self._begin_charge()
                return to
            self._leave(str(to))
            self._cost = 0
            return None
        self._write(f"if {condition}:")
        self._leave(str(to), " ")
        self._begin_charge()
        return at + 1


def _destinations(code: bytes) -> Iterator[int]:
    """Every JUMPDEST that is not inside the data of a PUSH."""
    at = 0
    while at < len(code):
        opcode = code[at]
        if opcode == op.JUMPDEST:
            yield at
        at += 1 + (opcode - op.PUSH0 if op.PUSH1 <= opcode <= op.PUSH32 else 0)


program_of = lru_cache(PROGRAMS_MAX)(Program)
"""The program of a code, remembered: writing it is pure."""
