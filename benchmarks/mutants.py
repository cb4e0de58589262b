"""Small faults for benchmarks/mutation.py: makes them from a module's source, and puts one into the running module."""

from __future__ import annotations

import ast
import functools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMPARISONS: dict[str, tuple[type[ast.cmpop], ...]] = {
    "Lt": (ast.LtE, ast.GtE), "LtE": (ast.Lt, ast.Gt), "Gt": (ast.GtE, ast.Lt), "GtE": (ast.Gt, ast.LtE),
    "Eq": (ast.NotEq,), "NotEq": (ast.Eq,), "Is": (ast.IsNot,), "IsNot": (ast.Is,), "In": (ast.NotIn,),
    "NotIn": (ast.In,),
}  # fmt: skip
_ARITHMETIC: dict[str, type[ast.operator]] = {"Add": ast.Sub, "Sub": ast.Add, "Mult": ast.FloorDiv, "Div": ast.Mult}
_NEVER_RAISED = "ZeroDivisionError"


@dataclass(frozen=True)
class Mutant:
    """One fault: ``before`` at a place of a module becomes ``after``. ``function`` is "" outside functions."""

    module: str
    function: str
    line: int
    column: int
    kind: str
    start: int  # bytes of the source
    end: int
    before: str
    after: str
    text: str  # the source line

    @property
    def key(self) -> str:
        """Names the fault as long as its line stays the same."""
        return f"{self.module}:{self.function}: {self.text}: {_one_line(self.before)} -> {_one_line(self.after)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def mutants_of(path: Path, module: str) -> list[Mutant]:
    """All faults for the source of a module."""
    source = path.read_bytes()
    lines = source.split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    found = []
    for function, node, kind, after in _walk(ast.parse(source), "", False):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        found.append(
            Mutant(module, function, node.lineno, node.col_offset, kind, start, end, source[start:end].decode(), after,
                   lines[node.lineno - 1].decode().strip())
        )  # fmt: skip
    return found


def _walk(node: ast.AST, function: str, inside: bool) -> Iterator[tuple[str, Any, str, str]]:
    """Faults below a node: function, node, kind, text that stands in its place."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        is_class = isinstance(node, ast.ClassDef)
        for child in node.body:  # decorators, defaults and types are left as they are
            if not is_class or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _walk(child, f"{function}.{node.name}".lstrip("."), not is_class)
        return
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield from _walk(node.value, function, inside)
        return
    faults = _inside(node) if inside else _outside(node)
    for kind, after in faults:
        yield function, node, kind, after
    if inside:
        for child, kind, after in _parts(node):
            yield function, child, kind, after
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, function, inside)


def _parts(node: ast.AST) -> Iterator[tuple[ast.expr, str, str]]:
    """Faults in a part of a statement: a condition is turned round, a loop does nothing, an error is not caught."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        if not isinstance(node.test, (ast.Compare, ast.UnaryOp, ast.Constant)):
            yield node.test, "condition", f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.For):
        yield node.iter, "loop", "()"
    elif isinstance(node, ast.ExceptHandler) and node.type is not None:
        yield node.type, "exception", _NEVER_RAISED


def _outside(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Faults in a module's own statements: numbers, and elements that are missing."""
    if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.Tuple)):
        numbers = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for place, number in enumerate(numbers):
            if isinstance(number, ast.Constant) and type(number.value) in (int, float) and number.value:
                changed = [ast.unparse(each) for each in numbers]
                changed[place] = repr(number.value * 2 + 1)
                yield f"number {place}", f"{ast.unparse(node.targets[0])} = {', '.join(changed)}"
    if isinstance(node, (ast.Tuple, ast.Set, ast.List)) and len(node.elts) > 1 and all(map(_is_word, node.elts)):
        for place in range(len(node.elts)):
            kept = node.elts[:place] + node.elts[place + 1 :]
            yield f"element {place}", ast.unparse(type(node)(elts=kept))
    if isinstance(node, ast.Dict) and len(node.keys) > 1:
        for place in range(len(node.keys)):
            keys, values = node.keys[:place] + node.keys[place + 1 :], node.values[:place] + node.values[place + 1 :]
            yield f"element {place}", ast.unparse(ast.Dict(keys=keys, values=values))


def _inside(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Faults in a statement or an expression of a function."""
    yield from _statement(node)
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in _COMPARISONS[type(operator).__name__]:
                operators = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                yield f"comparison {place}", f"({ast.unparse(ast.Compare(node.left, operators, node.comparators))})"
    elif isinstance(node, ast.BoolOp):
        other_way = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and/or", f"({ast.unparse(ast.BoolOp(other_way, node.values))})"
        for place in range(len(node.values)):
            rest = node.values[:place] + node.values[place + 1 :]
            yield "part left out", f"({ast.unparse(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "constant", repr(not node.value)
        elif isinstance(node.value, (int, float)):
            yield "constant", repr(node.value + 1)
            yield "constant", f"({node.value - 1!r})"
    elif isinstance(node, ast.BinOp) and type(node.op).__name__ in _ARITHMETIC and not _is_text(node):
        other = _ARITHMETIC[type(node.op).__name__]()
        yield "arithmetic", f"({ast.unparse(ast.BinOp(node.left, other, node.right))})"


def _statement(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await))):
        yield "statement left out", "pass"
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
        if len(node.targets) == 1:
            yield "statement left out", "pass"
    elif isinstance(node, ast.AugAssign):
        yield "statement left out", "pass"
        if isinstance(node.op, (ast.Add, ast.Sub)) and not isinstance(node.value, ast.Tuple):
            sign = "-=" if isinstance(node.op, ast.Add) else "+="
            yield "arithmetic", f"{ast.unparse(node.target)} {sign} {ast.unparse(node.value)}"
    elif isinstance(node, ast.Return) and node.value is not None:
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield "return", "return None"
    elif isinstance(node, ast.Break):
        yield "break", "continue"
    elif isinstance(node, ast.Continue):
        yield "break", "break"


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) or _is_word(side) for side in sides)


def _is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def mutated(source: bytes, mutant: Mutant) -> bytes:
    """The source with the fault."""
    return source[: mutant.start] + mutant.after.encode() + source[mutant.end :]


# -- into the running module


def put_in(mutant: Mutant) -> None:
    """Change the functions, or the values, of the loaded module. Raises what the changed source raises."""
    module = sys.modules[mutant.module]
    source = Path(str(module.__file__)).read_bytes()
    code = compile(mutated(source, mutant), str(module.__file__), "exec", dont_inherit=True)
    if mutant.function:
        codes = dict(_codes(code, ""))
        for name, function in _functions(module):
            function.__code__ = codes[name]
        return
    before, after = ({"__name__": module.__name__, "__file__": module.__file__} for _ in range(2))
    exec(compile(source, str(module.__file__), "exec", dont_inherit=True), before)
    exec(code, after)
    for name, value in after.items():
        plain = isinstance(value, (int, float, bytes, str, tuple, frozenset, set, dict)) and not name.startswith("__")
        if plain and value != before[name]:
            old = module.__dict__[name]
            for other in list(sys.modules.values()):
                if other.__name__.startswith("disagg") and other.__dict__.get(name) is old:
                    setattr(other, name, value)


def _codes(code: types.CodeType, prefix: str) -> Iterator[tuple[str, types.CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            name = f"{prefix}.{constant.co_name}".lstrip(".")
            yield name, constant
            yield from _codes(constant, name)


def _functions(module: types.ModuleType) -> Iterator[tuple[str, types.FunctionType]]:
    """Functions and methods that the module's source has defined."""
    for owner in (module, *(each for each in vars(module).values() if isinstance(each, type))):
        if owner is not module and owner.__module__ != module.__name__:
            continue
        for value in list(vars(owner).values()):
            for function in _unwrapped(value):
                known = function.__module__ == module.__name__ and function.__code__.co_filename == module.__file__
                if known and "<lambda>" not in function.__qualname__:
                    yield function.__qualname__, function


def _unwrapped(value: Any) -> Iterator[types.FunctionType]:
    if isinstance(value, property):
        yield from (each for each in (value.fget, value.fset) if isinstance(each, types.FunctionType))
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, functools._lru_cache_wrapper):
        value.cache_clear()
        yield value.__wrapped__
    elif isinstance(value, types.FunctionType):
        yield value
