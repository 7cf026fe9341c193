"""Small faults that could be in Python code, as edits of its text: the operators of `benchmarks/mutants.py`.

Each operator looks at a node of the syntax tree and gives the edits that it would make. Edits replace text, so that
line numbers stay. Left out, since no test should notice: docstrings, texts of errors, annotations, imports, assertions
(ours to fail, never a user's), log lines and `__repr__`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

Edit = tuple[int, int, str]
"""Where the replaced text begins and ends, in bytes of the source, and what stands there instead."""


@dataclass(frozen=True)
class Mutant:
    """One edit of one file."""

    file: str
    function: str
    """Qualified name of the function or class around it; empty at the top of a module."""
    lines: range
    """The lines of the statement, without a body of its own: whoever runs one of them runs the mutant."""
    scope: range
    """The lines of the function around it."""
    operator: str
    edit: Edit
    source: bytes

    @cached_property
    def mutated(self) -> bytes:
        start, end, text = self.edit
        return self.source[:start] + text.encode() + self.source[end:]

    @property
    def line(self) -> int:
        """The line of the change, from 1."""
        return self.source.count(b"\n", 0, self.edit[0]) + 1

    @property
    def diff(self) -> tuple[str, str]:
        """The changed lines before and after, each stripped and joined to one."""
        start = self.source.rfind(b"\n", 0, self.edit[0]) + 1
        end = self.source.find(b"\n", self.edit[1])
        after = self.mutated[start : end + len(self.mutated) - len(self.source)]
        before, after = (" ".join(text.decode().split()) for text in (self.source[start:end], after))
        return before, after

    @property
    def key(self) -> str:
        """What names it among the mutants of a tree."""
        return f"{self.file}:{self.edit[0]}-{self.edit[1]}:{self.edit[2]}"

    def parses(self) -> bool:
        """Whether it is Python."""
        try:
            ast.parse(self.mutated)
        except SyntaxError:
            return False
        return True


class Text:
    """Source with the positions of its nodes."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.starts = list(accumulate((len(line) for line in source.split(b"\n")), lambda at, n: at + n + 1, initial=0))

    def start(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        return self.source[self.start(node) : self.end(node)].decode()

    def replace(self, node: ast.AST, text: str) -> Edit:
        return self.start(node), self.end(node), text

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Edit]:
        """Replace the operator `old` that stands between two nodes."""
        start, gap = self.end(left), self.source[self.end(left) : self.start(right)].decode()
        pattern = r"\s+".join(map(re.escape, old.split()))
        if place := re.search(rf"\b{pattern}\b" if old[0].isalpha() else pattern, gap):
            before, token = len(gap[: place.start()].encode()), len(place.group().encode())
            yield start + before, start + before + token, new


# --- operators --------------------------------------------------------------------------------------------------------

COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}
STRINGS = {ast.JoinedStr}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
OPPOSITES = {"min": "max", "max": "min"}
CONVERSIONS = {"detach", "clone", "contiguous", "float", "double", "to"}
GRADIENTS = {"no_grad", "inference_mode"}


def comparison(node: ast.AST, text: Text) -> Iterator[Edit]:
    """Another comparison: its boundary, its opposite."""
    if isinstance(node, ast.Compare):
        for (left, right), operator in zip(pairwise([node.left, *node.comparators]), node.ops, strict=True):
            old, others = COMPARISONS[type(operator)]
            for new in others:
                yield from text.between(left, right, old, new)


def arithmetic(node: ast.AST, text: Text) -> Iterator[Edit]:
    """Another operation on two numbers, or on a variable in place."""
    if (
        isinstance(node, ast.BinOp)
        and type(node.op) in ARITHMETIC
        and not {type(node.left), type(node.right)} & STRINGS
    ):
        yield from text.between(node.left, node.right, *ARITHMETIC[type(node.op)])
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        old, new = ARITHMETIC[type(node.op)]
        yield from text.between(node.target, node.value, old + "=", new + "=")


def boolean(node: ast.AST, text: Text) -> Iterator[Edit]:
    """`and` for `or`, and the other way round."""
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in pairwise(node.values):
            yield from text.between(left, right, old, new)


def number(node: ast.AST, text: Text) -> Iterator[Edit]:
    """Another constant: one more, one less, twice, zero; the other truth value."""
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield text.replace(node, str(not node.value))
    elif isinstance(node.value, int):
        others = {node.value + 1, node.value - 1, 2 * node.value, 0} - {node.value}
        yield from (text.replace(node, f"({other})" if other < 0 else str(other)) for other in sorted(others))
    elif isinstance(node.value, float):
        others = {node.value + 1, 2 * node.value, 0.0} - {node.value}
        yield from (text.replace(node, repr(other)) for other in sorted(others))


def negation(node: ast.AST, text: Text) -> Iterator[Edit]:
    """A condition negated, a `not` or a minus removed. Of a comparison, the opposite is its negation."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield text.replace(node, f"({text.of(node.operand)})")
    conditions = node.ifs if isinstance(node, ast.comprehension) else [getattr(node, "test", None)]
    for condition in conditions:
        if condition is not None and not isinstance(condition, ast.Compare | ast.UnaryOp | ast.Constant):
            yield text.replace(condition, f"(not ({text.of(condition)}))")


def statement(node: ast.AST, text: Text) -> Iterator[Edit]:
    """A statement left out, a value that is None instead."""
    if isinstance(node, ast.Return) and node.value is not None and not is_none(node.value):
        yield text.replace(node, "return None")
    elif isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Break | ast.Continue) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    ):
        yield text.replace(node, "pass")
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not is_none(node.value):
        yield text.replace(node.value, "None")


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def bounds(node: ast.AST, text: Text) -> Iterator[Edit]:
    """A slice without its lower or upper bound; the smallest for the largest."""
    if isinstance(node, ast.Slice):
        yield from (text.replace(bound, "") for bound in (node.lower, node.upper) if bound is not None)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OPPOSITES:
        yield text.replace(node.func, OPPOSITES[node.func.id])
    if isinstance(node, ast.keyword) and node.arg in OPPOSITES:
        yield text.start(node), text.start(node) + 3, OPPOSITES[node.arg]


def tensors(node: ast.AST, text: Text) -> Iterator[Edit]:
    """A conversion, a copy, a `dtype` or a `detach` left out; gradients where there should be none."""
    if not isinstance(node, ast.Call):
        return
    if isinstance(node.func, ast.Attribute) and node.func.attr in CONVERSIONS:
        yield text.replace(node, text.of(node.func.value))
    if isinstance(node.func, ast.Attribute) and node.func.attr in GRADIENTS:
        yield text.replace(node, "torch.enable_grad()")
    arguments = [*node.args, *node.keywords]
    for before, argument in pairwise([None, *arguments]):
        if isinstance(argument, ast.keyword) and argument.arg in ("dtype", "device"):
            yield (text.start(argument) if before is None else text.end(before)), text.end(argument), ""


OPERATORS: tuple[Callable[[ast.AST, Text], Iterator[Edit]], ...] = (
    comparison,
    arithmetic,
    boolean,
    number,
    negation,
    statement,
    bounds,
    tensors,
)

# --- where they apply -------------------------------------------------------------------------------------------------

LOGGING = re.compile(r"^(print|warn|warnings\.warn|log(ger)?\.\w+|logging\.\w+)\(")
UNTOUCHED = (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)
ANNOTATIONS = {"annotation", "returns", "type_params"}


@dataclass(frozen=True)
class Place:
    """A node that may be mutated, and where it stands."""

    node: ast.AST
    function: str
    lines: range
    scope: range


def places(node: ast.AST, text: Text, at: Place) -> Iterator[Place]:
    """`node` and what is inside, but for what no test should notice."""
    if isinstance(node, UNTOUCHED) or is_exempt(node, text):
        return
    function, lines, scope = at.function, at.lines, at.scope
    if isinstance(node, ast.stmt):
        body = getattr(node, "body", None)
        lines = range(node.lineno, (max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or 0) + 1)
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
        scope = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    here = Place(node, function, lines, scope)
    yield here
    if not isinstance(node, ast.Raise):  # its words
        for name, child in ast.iter_fields(node):
            for inner in child if isinstance(child, list) else [child]:
                if name == "decorator_list" and text.of(inner).split("(")[0].split(".")[-1] not in GRADIENTS:
                    continue
                if name not in ANNOTATIONS and isinstance(inner, ast.AST):
                    yield from places(inner, text, here)


def is_exempt(node: ast.AST, text: Text) -> bool:
    """Whether it is a docstring, a log line, a `__repr__` or for type checkers only."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or LOGGING.match(text.of(node.value)) is not None
    if isinstance(node, ast.FunctionDef):
        return node.name in ("__repr__", "__str__")
    return isinstance(node, ast.If) and text.of(node.test) == "TYPE_CHECKING"


def mutants(file: str, source: bytes) -> list[Mutant]:
    """Every mutant of a file, in the order of the text; several of one operator at one node lie side by side."""
    tree, text = ast.parse(source), Text(source)
    module = Place(tree, "", range(0), range(1, source.count(b"\n") + 2))
    return [
        Mutant(file, place.function, place.lines, place.scope, operator.__name__, edit, source)
        for place in places(tree, text, module)
        for operator in OPERATORS
        if place.function or operator is not statement  # a table that is None fails at import
        for edit in operator(place.node, text)
    ]


def by_hand(file: str, source: bytes, old: str, new: str) -> Mutant:
    """The mutant that replaces `old`, which must stand in the file once. ValueError otherwise."""
    count = source.count(old.encode())
    if count != 1:
        raise ValueError(f"{old!r} stands in {file} {count} times; a named mutant replaces text that stands there once")
    start = source.index(old.encode())
    tree, text = ast.parse(source), Text(source)
    line = source.count(b"\n", 0, start) + 1
    module = Place(tree, "", range(0), range(1, source.count(b"\n") + 2))
    around = [place for place in places(tree, text, module) if line in place.lines]
    place = around[-1] if around else module
    return Mutant(
        file, place.function, place.lines, place.scope, "by_hand", (start, start + len(old.encode()), new), source
    )
