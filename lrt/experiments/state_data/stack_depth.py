"""How deep the stack is at every instruction of a code object, and how many handlers lie around it. CPython 3.11 on.

The depth follows from each instruction's effect along all ways through the code, jumps and exceptions included, as
CPython's compiler computes it for `co_stacksize`. Two ways that disagree, or a depth that CPython did not reserve, are
an error: this Python's bytecode would not be understood.
"""

from __future__ import annotations

import dis
from bisect import bisect_left
from types import CodeType
from typing import Any, NamedTuple

NO_SUCCESSOR = frozenset(
    {
        "RETURN_VALUE",
        "RETURN_CONST",
        "RAISE_VARARGS",
        "RERAISE",
        "JUMP_FORWARD",
        "JUMP_BACKWARD",
        "JUMP_BACKWARD_NO_INTERRUPT",
    }
)
"""Instructions, of all versions, behind which the next one is not run."""
JUMPS = (frozenset(dis.hasjrel) | frozenset(dis.hasjabs)) - {dis.opmap["END_ASYNC_FOR"]}
"""END_ASYNC_FOR says from 3.14 on where it came from, and jumps nowhere."""


class Step(NamedTuple):
    """An instruction that can be reached; EXTENDED_ARG is part of the one it extends."""

    name: str
    argument: int | None
    """As `dis` has it, not yet looked up. None for instructions that take none."""
    jump: int | None
    """Where it jumps to, in instructions from here. None where it does not jump."""
    before: int
    """Values on the stack when it begins."""
    after: int
    """Values on the stack where it ends and does not jump."""
    falls: bool
    """Whether the next instruction can follow it."""
    blocks: int
    """Handlers that an exception here passes if each of them raises in turn: that of its entry in the exception table,
    that of the handler's first instruction, and so on."""


class Entry(NamedTuple):
    """An entry of the exception table, its places counted in instructions."""

    start: int
    end: int
    target: int
    depth: int
    """Values on the stack where the handler begins: what is kept, the exception, and the place if it is kept too."""


class Instruction(NamedTuple):
    """An instruction with what extends it."""

    name: str
    argument: int | None
    target: int | None
    """Where it jumps to: the number of an instruction."""

    def effect(self, jump: bool) -> int:
        """What it adds to the stack's depth."""
        return stack_effect(self.name, self.argument, jump)


def stack_effect(name: str, argument: int | None, jump: bool = False) -> int:
    """What an instruction adds to the stack's depth: `dis.stack_effect`, but for three that the interpreter runs else.

    3.11 takes a call's arguments off in CALL, `dis` in PRECALL. A generator is on the stack from RETURN_GENERATOR on,
    3.11 and 3.12 count it before.
    """
    if name == "CALL":
        return -1 - int(argument or 0)
    if name in ("PRECALL", "RETURN_GENERATOR"):
        return int(name == "RETURN_GENERATOR")
    return dis.stack_effect(dis.opmap[name], argument, jump=jump)


def read_steps(code: CodeType) -> tuple[list[Step], int]:
    """The reachable instructions of a code object (not of those within it), in order, and how many cannot be reached.

    ValueError where the depth is not one number, or above `co_stacksize`.
    """
    instructions, entries = read_instructions(code)
    handler = handlers(entries, len(instructions))
    depth = stack_depths(instructions, handler)
    if (deepest := max(depth.values())) > code.co_stacksize or min(depth.values()) < 0:
        raise ValueError(
            f"{code.co_qualname} has a depth of {deepest} and a stack of {code.co_stacksize}; "
            "use a CPython whose bytecode is known, 3.11 to 3.14"
        )
    steps = [make_step(n, instructions[n], depth[n], count_blocks(n, handler, len(entries))) for n in sorted(depth)]
    return steps, len(instructions) - len(steps)


def make_step(number: int, instruction: Instruction, before: int, blocks: int) -> Step:
    """One instruction with the state around it."""
    name, argument, target = instruction
    jump = None if target is None else target - number
    after = before + instruction.effect(jump=False)
    return Step(name, argument, jump, before, after, name not in NO_SUCCESSOR, blocks)


def read_instructions(code: CodeType) -> tuple[list[Instruction], list[Entry]]:
    """All instructions and the exception table, in both of which places are numbers of instructions."""
    bytecode: Any = dis.Bytecode(code)  # Any: `exception_entries` is missing from its stubs
    plain, starts, start = [], [], None
    for instruction in bytecode:
        start = instruction.offset if start is None else start
        if instruction.opname != "EXTENDED_ARG":
            plain.append(instruction)
            starts.append(start)
            start = None
    number = {offset: n for n, offset in enumerate(starts)}
    instructions = [Instruction(i.opname, i.arg, number[i.argval] if i.opcode in JUMPS else None) for i in plain]
    entries = [
        Entry(bisect_left(starts, e.start), bisect_left(starts, e.end), number[e.target], e.depth + e.lasti + 1)
        for e in bytecode.exception_entries
    ]
    return instructions, entries


def handlers(entries: list[Entry], length: int) -> list[Entry | None]:
    """The entry of each instruction: where an exception in it goes. Ranges do not overlap."""
    handler: list[Entry | None] = [None] * length
    for entry in entries:
        handler[entry.start : entry.end] = [entry] * (entry.end - entry.start)
    return handler


def stack_depths(instructions: list[Instruction], handler: list[Entry | None]) -> dict[int, int]:
    """The depth before each instruction that can be reached. ValueError where two ways to one disagree."""
    depth = {0: 0}
    waiting = [0]
    while waiting:
        number = waiting.pop()
        for following, there in successors(number, instructions[number], depth[number], handler[number]):
            if following not in depth:
                depth[following] = there
                waiting.append(following)
            elif depth[following] != there:
                raise ValueError(
                    f"instruction {following} has depth {depth[following]} on one way and {there} on another; "
                    "use a CPython whose bytecode is known, 3.11 to 3.14"
                )
    return depth


def successors(number: int, instruction: Instruction, depth: int, entry: Entry | None) -> list[tuple[int, int]]:
    """What can come after an instruction, each with the depth there."""
    following = []
    if instruction.name not in NO_SUCCESSOR:
        following.append((number + 1, depth + instruction.effect(jump=False)))
    if instruction.target is not None:
        following.append((instruction.target, depth + instruction.effect(jump=True)))
    if entry is not None:
        following.append((entry.target, entry.depth))
    return following


def count_blocks(number: int, handler: list[Entry | None], entries: int) -> int:
    """`Step.blocks`. ValueError where handlers lead to themselves."""
    count = 0
    while (entry := handler[number]) is not None:
        number, count = entry.target, count + 1
        if count > entries:
            raise ValueError(f"the handlers of instruction {number} never end; leave this code out")
    return count
