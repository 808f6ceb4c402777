"""Whose weight the code of a module reads, told by its source."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import nn

# From `self` to a submodule, by attributes: `"*"` is any child.
Path: TypeAlias = tuple[str, ...]

# What may be asked of what stands for the weight of a compressed layer: it is true of its other tensors as well.
HARMLESS_ATTRIBUTES = {"dtype", "device", "requires_grad", "is_cuda", "is_meta"}
# Of a module, to which its `forward` may lead.
MOST_FUNCTIONS = 200
# They give the entries of what they are handed.
PASSING_ON = {"zip", "enumerate", "reversed", "list", "tuple", "iter"}


class Called(NamedTuple):
    """
    A function, and which of its arguments are the module or parts of it. Of one that another function defines, that
    other one, the names that it knows, and its own part of the source.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Path]
    inner: ast.AST | None = None


def weights_read_by(module_class: type) -> frozenset[Path]:
    """
    Paths from `self` to the submodules whose `weight` is read, as `("self_attn", "out_proj")`: in `forward`, and in
    the methods and functions that it calls with itself or with a submodule.
    """
    return _read_from(module_class, getattr(module_class, "forward", None))


@functools.lru_cache(maxsize=1024)
def _read_from(module_class: type, _: Callable[..., Any] | None) -> frozenset[Path]:
    # A class may get another forward, of which the second argument tells.
    paths: set[Path] = set()
    pending = [*_methods(module_class, "forward", [()], {})]
    seen: set[object] = set()
    while pending and len(seen) < MOST_FUNCTIONS:
        called = pending.pop()
        key = (called.function, frozenset(called.arguments.items()), called.inner)
        if key in seen:
            continue
        seen.add(key)
        tree = called.inner or _tree(called.function)
        if tree is None:
            continue
        names = _local_names(tree, called.arguments)
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            path = _path(node, names)
            if path and path[-1] == "weight" and not _is_harmless(node, parents[node]):
                paths.add(path[:-1])
            if isinstance(node, ast.Call):
                pending += _calls(node, called.function, module_class, names)
                pending += _calls_inside(node, called.function, tree, names)
    return frozenset(paths)


def _calls(
    node: ast.Call, caller: Callable[..., Any], module_class: type, names: Mapping[str, Path]
) -> Iterator[Called]:
    """What a call may run of the module's methods, and of functions that are handed the module or parts of it."""
    given = [_path(argument, names) for argument in node.args]
    named = {keyword.arg: _path(keyword.value, names) for keyword in node.keywords if keyword.arg}
    method = _path(node.func, names)
    if method is not None and len(method) == 1:
        yield from _methods(module_class, method[0], [(), *given], named)
    elif any(path is not None for path in (*given, *named.values())):
        function = _function(node.func, caller)
        if function is not None:
            yield _called(function, given, named)


def _calls_inside(
    node: ast.Call, caller: Callable[..., Any], tree: ast.AST, names: Mapping[str, Path]
) -> Iterator[Called]:
    """What a call may run of the functions that its own function defines."""
    given = [_path(argument, names) for argument in node.args]
    function: ast.FunctionDef | ast.Lambda
    for inner in ast.walk(tree):
        if isinstance(inner, ast.FunctionDef):
            name, function = inner.name, inner
        elif isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Lambda):
            name, function = getattr(inner.targets[0], "id", ""), inner.value
        else:
            continue
        if isinstance(node.func, ast.Name) and node.func.id == name:
            handed = zip([argument.arg for argument in function.args.args], given, strict=False)
            yield Called(caller, {**names, **{name: path for name, path in handed if path is not None}}, function)


def _methods(
    module_class: type, name: str, given: list[Path | None], named: Mapping[str, Path | None]
) -> Iterator[Called]:
    """A method of the module and of the classes that it is derived from, which it may call."""
    for base in module_class.__mro__:
        if base is nn.Module:
            return
        function = base.__dict__.get(name)
        if isinstance(function, staticmethod):
            yield _called(function.__func__, given[1:], named)
        elif callable(function):
            yield _called(function, given, named)


def _called(function: Callable[..., Any], given: list[Path | None], named: Mapping[str, Path | None]) -> Called:
    try:
        parameters = [*inspect.signature(function).parameters]
    except (ValueError, TypeError):  # built in
        parameters = []
    arguments = {**dict(zip(parameters, given, strict=False)), **named}
    return Called(function, {name: path for name, path in arguments.items() if path is not None})


def _function(node: ast.expr, caller: Callable[..., Any]) -> Callable[..., Any] | None:
    """The Python function that an expression stands for, where it is one that is known before the code runs."""
    found = _value(node, inspect.unwrap(caller))
    if not inspect.isfunction(found):
        return None
    # What torch is handed, it calls.
    return None if str(found.__module__).startswith("torch.") else found


def _value(node: ast.expr, caller: Any) -> Any:
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, caller)
        found = None if owner is None else inspect.getattr_static(owner, node.attr, None)
        return found.__func__ if isinstance(found, staticmethod) else found
    if not isinstance(node, ast.Name) or not inspect.isfunction(caller):
        return None
    cells = dict(zip(caller.__code__.co_freevars, caller.__closure__ or (), strict=False))
    try:
        return cells[node.id].cell_contents if node.id in cells else caller.__globals__.get(node.id)
    except ValueError:  # not filled yet
        return None


@functools.lru_cache(maxsize=4096)
def _tree(function: Callable[..., Any]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source: built in, or made at run time
        return None


def _local_names(tree: ast.AST, arguments: Mapping[str, Path]) -> dict[str, Path]:
    """The paths that local names stand for: `self`, `x = self.proj`, `for x in self.layers`."""
    names = dict(arguments)
    for node in [*ast.walk(tree)] * 2:  # a name may be used before the line that is walked to first
        if isinstance(node, ast.Assign):
            for target in node.targets:
                _bind(target, node.value, names)
        elif isinstance(node, ast.NamedExpr):
            _bind(node.target, node.value, names)
        elif isinstance(node, (ast.For, ast.comprehension)):
            _bind_entries(node.target, node.iter, names)
    return names


def _bind(target: ast.expr, value: ast.expr, names: dict[str, Path]) -> None:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, of_one in zip(target.elts, value.elts, strict=True):
            _bind(one, of_one, names)
    elif isinstance(target, ast.Name) and (path := _path(value, names)):
        names[target.id] = path


def _bind_entries(target: ast.expr, value: ast.expr, names: dict[str, Path]) -> None:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in PASSING_ON:
        targets = target.elts if isinstance(target, ast.Tuple) else [target] * len(value.args)
        for one, of_one in zip(targets[-len(value.args) :], value.args, strict=False):
            _bind_entries(one, of_one, names)
    elif isinstance(target, ast.Name) and (path := _path(value, names)):
        names[target.id] = (*path, "*")


def _path(node: ast.AST, names: Mapping[str, Path]) -> Path | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        path = _path(node.value, names)
        part = node.attr if isinstance(node, ast.Attribute) else "*"
        return None if path is None else (*path, part)
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr" and len(node.args) > 1:
        path, name = _path(node.args[0], names), node.args[1]
        return (*path, str(name.value)) if path is not None and isinstance(name, ast.Constant) else None
    return None


def _is_harmless(node: ast.AST, parent: ast.AST) -> bool:
    if isinstance(parent, ast.Attribute):
        return parent.attr in HARMLESS_ATTRIBUTES
    if isinstance(parent, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops)
    return isinstance(parent, ast.Call) and getattr(parent.func, "id", None) in ("isinstance", "hasattr")
