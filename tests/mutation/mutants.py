"""Small wrong versions of a module: one operator, constant or call changed at a time."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = {
    "max": "min",
    "min": "max",
    "maximum": "minimum",
    "minimum": "maximum",
    "amax": "amin",
    "amin": "amax",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "mean": "sum",
    "expm1": "exp",
    "ones_like": "zeros_like",
    "zeros_like": "ones_like",
    "add_": "sub_",
    "sub_": "add_",
}
DROPPED_METHODS = {"clamp", "detach", "abs", "square", "exp", "neg", "masked_fill", "div_", "to"}
DROPPED_FUNCTIONS = {"zero_outside", "reversed", "relu", "float"}


@dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        key: Names the change without line numbers: function, before, after.
        source: The module's text.
    """

    key: str
    source: str


def mutants_of(source: str) -> Iterator[Mutant]:
    """Every mutant of a module, in reading order.

    Args:
        source: The module's text.

    Yields:
        One mutant at a time.
    """
    seen: Counter[str] = Counter()
    for number in range(len(list(_sites(ast.parse(source))))):
        tree = ast.parse(source)
        site = list(_sites(tree))[number]
        before, after = ast.unparse(site.node), ast.unparse(site.replacement)
        key = f"{site.function}: {before} => {after}"
        seen[key] += 1
        if seen[key] > 1:
            key += f" #{seen[key]}"
        _replace(site)
        yield Mutant(key, ast.unparse(ast.fix_missing_locations(tree)))


@dataclass(frozen=True)
class _Site:
    function: str
    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    replacement: ast.AST


def _replace(site: _Site) -> None:
    if site.index is None:
        setattr(site.parent, site.field, site.replacement)
    else:
        getattr(site.parent, site.field)[site.index] = site.replacement


def _sites(node: ast.AST, function: str = "module") -> Iterator[_Site]:
    """Everywhere something can be changed, annotations and error messages left out."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = node.name
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "keywords", "decorator_list"} and not (
            field == "keywords" and isinstance(node, ast.Call)
        ):
            continue
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Import):
                continue
            place = index if isinstance(value, list) else None
            for replacement in _replacements(child):
                yield _Site(function, node, field, place, child, replacement)
            yield from _sites(child, function)


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        yield _with(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield _with(node, ops=[SWAPS[type(node.ops[0])]()])
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.If):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant):
        yield from _other_constants(node.value)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.keyword) and node.arg in {"min", "max"}:
        yield _with(node, arg=NAMES[node.arg])


def _other_constants(value: object) -> Iterator[ast.AST]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1)
        if value not in (0, 1):
            yield ast.Constant(value / 2 if isinstance(value, float) else value - 1)


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    match node.func:
        case ast.Attribute(value=receiver, attr=name):
            if name in NAMES:
                yield _with(node, func=ast.Attribute(receiver, NAMES[name], ast.Load()))
            if name in DROPPED_METHODS and not _is_module(receiver):
                yield receiver
            if name in DROPPED_FUNCTIONS and _is_module(receiver):
                yield node.args[0]
        case ast.Name(id=name):
            if name in NAMES:
                yield _with(node, func=ast.Name(NAMES[name], ast.Load()))
            if name in DROPPED_FUNCTIONS:
                yield node.args[0]


def _is_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in {"torch", "math"}


def _with(node: ast.AST, **changes: object) -> ast.AST:
    """A copy of one node, its children shared, with some fields replaced."""
    other = copy.copy(node)
    for field, value in changes.items():
        setattr(other, field, value)
    return other
