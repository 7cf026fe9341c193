"""The depth of the stack: by a second analysis, by the running interpreter, by hand."""

from __future__ import annotations

import ctypes
import dis
import opcode
import sys
import sysconfig
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lrt.data.corpus import stdlib_paths
from lrt.experiments.state_data.stack_depth import read_steps

STDLIB = Path(sysconfig.get_path("stdlib"))


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def compiled(*names: str) -> list[types.CodeType]:
    """All code objects of modules of the standard library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [code for name in names for code in codes(compile((STDLIB / name).read_bytes(), name, "exec"))]


# --- a second analysis: bytes, sweeps until nothing changes --------------------------------------------------------


def decode(code: types.CodeType) -> dict[int, tuple[str, int, int, int]]:
    """Offset of each instruction, with what extends it -> name, argument, offset of the next, and of itself alone."""
    raw, at, instructions = code.co_code, 0, {}
    while at < len(raw):
        begin, argument = at, raw[at + 1]
        while opcode.opname[raw[at]] == "EXTENDED_ARG":
            at += 2
            argument = argument << 8 | raw[at + 1]
        alone, name = at, opcode.opname[raw[at]]
        at += 2
        while at < len(raw) and opcode.opname[raw[at]] == "CACHE":
            at += 2
        instructions[begin] = (name, argument, at, alone)
    return instructions


def exception_table(code: types.CodeType) -> list[tuple[int, int, int, int]]:
    """First offset, end, handler, and depth there: Objects/exception_handling_notes.txt of CPython."""
    numbers, value, entries = [], 0, []
    for byte in code.co_exceptiontable:
        value = value << 6 | byte & 63
        if not byte & 64:
            numbers.append(value)
            value = 0
    for start, length, handler, depth in zip(*[iter(numbers)] * 4, strict=True):
        entries.append((2 * start, 2 * (start + length), 2 * handler, (depth >> 1) + (depth & 1) + 1))
    return entries


def effect_of(name: str, argument: int, jump: bool) -> int:
    has_none = opcode.opmap[name] < opcode.HAVE_ARGUMENT
    return dis.stack_effect(opcode.opmap[name], None if has_none else argument, jump=jump)


def depths_by_sweeps(code: types.CodeType) -> dict[int, int]:
    """The depth before each reachable instruction, by offset, as `dis.stack_effect` counts."""
    instructions, table = decode(code), exception_table(code)
    generator = code.co_flags & (0x20 | 0x80 | 0x200) and sys.version_info < (3, 13)
    depth = {0: 1 if generator else 0}
    changed = True
    while changed:
        changed = False
        for at, (name, argument, following, _) in instructions.items():
            if at not in depth:
                continue
            ways = [(target, there) for start, end, target, there in table if start <= at < end]
            if not name.startswith(("RETURN_V", "RETURN_C", "RAISE", "RERAISE", "JUMP_F", "JUMP_B")):
                ways.append((following, depth[at] + effect_of(name, argument, False)))
            if "JUMP" in name or name in ("FOR_ITER", "SEND"):
                target = following + 2 * argument * (-1 if "BACKWARD" in name else 1)
                ways.append((target, depth[at] + effect_of(name, argument, True)))
            for target, there in ways:
                changed = changed or target not in depth
                assert depth.setdefault(target, there) == there
    return depth


def blocks_by_recursion(table: list[tuple[int, int, int, int]], at: int) -> int:
    targets = [target for start, end, target, _ in table if start <= at < end]
    assert len(targets) <= 1
    return 1 + blocks_by_recursion(table, targets[0]) if targets else 0


def test_depths_and_blocks_are_those_of_a_second_analysis():
    instructions = generators = 0
    for code in compiled("json/decoder.py", "asyncio/tasks.py", "contextlib.py", "argparse.py", "tokenize.py"):
        steps, unreachable = read_steps(code)
        depth, table, decoded = depths_by_sweeps(code), exception_table(code), decode(code)
        assert unreachable == len(decoded) - len(depth)
        assert [step.name for step in steps] == [decoded[at][0] for at in sorted(depth)]
        assert [step.blocks for step in steps] == [blocks_by_recursion(table, at) for at in sorted(depth)]
        before_call = 0  # 3.11: `dis` takes arguments off before CALL
        inside = not code.co_flags & (0x20 | 0x80 | 0x200) or sys.version_info >= (3, 13)
        for step, at in zip(steps, sorted(depth), strict=True):
            expected = depth[at] + before_call - (not inside)
            assert step.before == expected
            before_call = decoded[at][1] if step.name == "PRECALL" else 0
            inside = inside or step.name == "RETURN_GENERATOR"
        instructions += len(steps)
        generators += any(step.name == "RETURN_GENERATOR" for step in steps)
    assert instructions > 10_000
    assert generators > 10


# --- the running interpreter ---------------------------------------------------------------------------------------

STACKTOP = 64
"""Of 3.11's interpreter frame: the offset of the number of values in use, local variables counted."""
FRAME = 24
"""Of its frame object: where the pointer to that is."""


def stack_size(frame: types.FrameType) -> int:
    """Values on the stack of a frame that is being traced."""
    inner = ctypes.c_void_p.from_address(id(frame) + FRAME).value
    assert inner is not None
    code = frame.f_code
    slots = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    return ctypes.c_int.from_address(inner + STACKTOP).value - len(slots)


def watch(run: Callable[[], object]) -> dict[types.CodeType, set[tuple[int, int]]]:
    """Run something: the offsets reached, with the depth, of code of the standard library and of this file."""
    visited: dict[types.CodeType, set[tuple[int, int]]] = {}

    def trace(frame: types.FrameType, event: str, _: object) -> object:
        if not frame.f_code.co_filename.startswith((str(STDLIB), __file__)):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            visited.setdefault(frame.f_code, set()).add((frame.f_lasti, stack_size(frame)))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return visited


def busy() -> None:
    """Something that runs loops, generators, coroutines, handlers and with-blocks of the standard library."""
    import argparse
    import asyncio
    import contextlib
    import json.scanner
    import textwrap
    import tokenize

    decoder = json.JSONDecoder()
    decoder.scan_once = json.scanner.py_make_scanner(decoder)
    for text in ('{"a": [1, 2.5, null, "b"], "c": {}}', "[1,", '{"a" 1}'):
        with contextlib.suppress(ValueError):
            decoder.decode(text)
    list(json.JSONEncoder(indent=1).iterencode({"a": [1, {"b": None}], "c": (1.5, True)}))
    textwrap.fill("some words, rather-long, to be wrapped. " * 3, 20)
    with open(textwrap.__file__, "rb") as file:
        for _, _ in zip(tokenize.tokenize(file.readline), range(200), strict=False):
            pass
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, nargs="+")
    parser.parse_args(["--n", "1", "2"])
    parser.format_help()
    with contextlib.suppress(KeyError), contextlib.ExitStack() as stack:
        stack.callback(print, end="")
        stack.enter_context(contextlib.closing(types.SimpleNamespace(close=lambda: None)))
        raise KeyError

    async def wait() -> None:
        async with asyncio.Lock(), asyncio.timeout(1):
            await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.001)

    asyncio.run(wait())


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="reads the interpreter's frame, which is 3.11's here")
def test_depths_are_those_of_the_running_interpreter():
    compared, kinds = 0, set()
    for code, reached in watch(busy).items():
        steps, unreachable = read_steps(code)
        assert unreachable == 0
        instructions = list(decode(code).items())
        by_offset = {}
        for step, (begin, (name, _, _, alone)) in zip(steps, instructions, strict=True):
            assert step.name == name
            by_offset |= {begin: step, alone: step}
        for offset, depth in reached:
            if offset in by_offset:  # else an EXTENDED_ARG between
                assert (code.co_qualname, offset, by_offset[offset].before) == (code.co_qualname, offset, depth)
                kinds.add(by_offset[offset].name)
                compared += 1
    assert compared > 5000
    assert kinds >= {"FOR_ITER", "YIELD_VALUE", "SEND", "WITH_EXCEPT_START", "RERAISE", "PUSH_EXC_INFO", "CALL", "SWAP"}


# --- by hand -------------------------------------------------------------------------------------------------------


def arithmetic(a: int, b: int, c: int) -> int:
    return a + b * (c - 1)


def loop(items: list[list[int]]) -> int:
    total = 0
    for row in items:
        for item in row:
            total += item
    return total


def blocks(f: Callable[..., types.SimpleNamespace]) -> None:
    f(0)
    try:
        f(1)
        with f(2):  # type: ignore[attr-defined]
            f(3)
    except ValueError:
        f(4)
    f(5)


def numbered(code: types.CodeType) -> dict[object, int]:
    """Handlers around the instructions that load each constant."""
    steps, _ = read_steps(code)
    plain = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    return {
        i.argval: step.blocks
        for i, step in zip(plain, steps, strict=True)
        if i.opname in ("LOAD_CONST", "LOAD_SMALL_INT")
    }


def test_depths_by_hand():
    steps, _ = read_steps(arithmetic.__code__)
    assert [step.after for step in steps if step.name == "BINARY_OP"] == [3, 2, 1]
    assert max(step.after for step in steps) == 4
    assert steps[-1].after == 0
    assert not steps[-1].falls
    steps, _ = read_steps(loop.__code__)
    assert [step.before for step in steps if step.name == "FOR_ITER"] == [1, 2]
    assert [step.after for step in steps if step.name == "FOR_ITER"] == [2, 3]
    assert [step.after for step in steps if step.name == "BINARY_OP"] == [3]  # two iterators and the sum
    assert [step.jump < 0 for step in steps if step.name == "JUMP_BACKWARD" and step.jump] == [True, True]


def test_blocks_by_hand():
    around = numbered(blocks.__code__)
    # A try's body has its handler and the cleanup of that, a handler's body its cleanup; so has a with-block.
    assert [around[n] for n in range(6)] == [0, 2, 2, 4, 1, 0]


@pytest.mark.skipif(sys.version_info[:2] not in ((3, 11), (3, 12)), reason="later ones may reserve more than is used")
def test_the_deepest_stack_is_what_cpython_reserves():
    for code in compiled("argparse.py", "asyncio/tasks.py", "dataclasses.py", "tarfile.py"):
        steps, _ = read_steps(code)
        assert max(max(step.before, step.after) for step in steps) == code.co_stacksize


@pytest.mark.slow
def test_the_whole_library_is_understood():
    exact = sys.version_info[:2] in ((3, 11), (3, 12))
    for code in compiled(*stdlib_paths()):
        steps, _ = read_steps(code)
        deepest = max(max(step.before, step.after) for step in steps)
        assert deepest == code.co_stacksize or (not exact and deepest < code.co_stacksize)


def test_code_that_is_not_understood_is_refused():
    small = arithmetic.__code__.replace(co_stacksize=2)
    with pytest.raises(ValueError, match="has a depth of 4 and a stack of 2; use a CPython whose bytecode is known"):
        read_steps(small)
    growing = bytes([dis.opmap[n] if isinstance(n, str) else n for n in ("RESUME", 0, "LOAD_CONST", 0)])
    backward = bytes([dis.opmap["JUMP_BACKWARD_NO_INTERRUPT"], 3])
    with pytest.raises(ValueError, match="instruction 0 has depth 0 on one way and 1 on another"):
        read_steps(arithmetic.__code__.replace(co_code=growing + backward, co_exceptiontable=b""))
