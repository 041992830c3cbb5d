"""Static reading of class signatures from source text; nothing is imported.

The arguments of a class are the schema of its node, so that a typo is reported before torch is
loaded.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import griffe

from vilmedic.config.types import (
    ANY,
    AnyMark,
    AnyOf,
    Basic,
    Choice,
    Instance,
    ListOf,
    MapOf,
    Marked,
    TupleOf,
    Type,
)
from vilmedic.registry import own_packages

_MARKS = {f"{mark.__module__}.{mark.__name__}": mark for mark in get_args(AnyMark)}
_RUNTIME = f"{Marked.__module__}.Runtime"
_BASIC = {
    "None": "null",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "text",
    "pathlib.Path": "path",
    "os.PathLike": "path",
    "typing.Any": "any",
    "object": "any",
    "numbers.Number": "float",
    "numbers.Real": "float",
    "numbers.Integral": "int",
}
_LISTS = {
    "list": "list",
    "typing.List": "list",
    "tuple": "tuple",
    "typing.Tuple": "tuple",
    "set": "set",
    "frozenset": "set",
    **{
        f"{module}.{name}": "list"
        for module in ("typing", "collections.abc")
        for name in ("Sequence", "Iterable", "Collection", "MutableSequence")
    },
}
_MAPS = {"dict", "typing.Dict", "typing.Mapping", "collections.abc.Mapping"}


@dataclass(frozen=True)
class Param:
    """One argument of a constructor.

    Args:
        name: its name.
        type: its type.
        required: whether it has no default.
        default: the default if it is a literal; None otherwise.
        default_text: the default as text.
        runtime: whether the framework gives it, not the configuration.
    """

    name: str
    type: Type
    required: bool = True
    default: Any = None
    default_text: str = ""
    runtime: bool = False


@dataclass(frozen=True)
class Signature:
    """The arguments of a class.

    Args:
        path: dotted path of the class.
        params: its arguments by name, in order.
        extras: the type of `**settings`; None without such an argument.
        docstrings: docstrings that describe its arguments, the most specific first.
    """

    path: str
    params: dict[str, Param]
    extras: Type | None = None
    docstrings: tuple[griffe.Docstring, ...] = field(default=(), compare=False)

    @property
    def settable(self) -> dict[str, Param]:
        """The arguments that come from the configuration."""
        return {name: param for name, param in self.params.items() if not param.runtime}

    def without(self, hidden: set[str]) -> Signature:
        """Return the signature without some arguments."""
        kept = {name: param for name, param in self.params.items() if name not in hidden}
        return replace(self, params=kept)

    @property
    def summary(self) -> str:
        """The first line of the class docstring."""
        for docstring in self.docstrings:
            return docstring.value.strip().partition("\n")[0]
        return ""

    def docs(self) -> dict[str, str]:
        """The description of each argument in the docstrings, on one line."""
        found: dict[str, str] = {}
        for docstring in self.docstrings:
            for section in docstring.parse("google", warnings=False):
                if isinstance(section, griffe.DocstringSectionParameters):
                    for entry in section.value:
                        name = entry.name.lstrip("*")
                        found.setdefault(name, " ".join(entry.description.split()))
        return found


@cache
def read_signature(path: str) -> Signature | None:
    """Read the constructor arguments of the class at a dotted path or `module:Class` location.

    Args:
        path: the location of the class.

    Returns:
        Its signature; None when the source text does not show the class.
    """
    cls = find_class(path)
    return None if cls is None else _class_signature(cls, depth=0)


def derives_from(path: str, ancestor: str) -> bool:
    """Return whether the class at a path is another one or a subclass of it, by its source."""
    cls = find_class(path)
    if cls is None:
        return False
    if cls.path == ancestor:
        return True
    return any(derives_from(base, ancestor) for base in bases(cls) if base != path)


def _class_signature(cls: griffe.Class, depth: int) -> Signature:
    docstrings = [cls.docstring] if cls.docstring else []
    constructor = cls.members.get("__init__")
    if isinstance(constructor, griffe.Function):
        params, extras = function_params(constructor)
        if constructor.docstring:
            docstrings.append(constructor.docstring)
        open_ended = extras is not None and extras == ANY
    elif _is_dataclass(cls):
        params, extras, open_ended = field_params(cls), None, True
    else:
        params, extras, open_ended = {}, None, True
    # arguments that this class does not name are passed to its base class
    inherited = _inherited(cls, depth) if open_ended else None
    if inherited is not None:
        own = params
        params = {**inherited.params, **own} if _is_dataclass(cls) else {**own}
        for name, param in inherited.params.items():
            params.setdefault(name, param)
        extras = inherited.extras
        docstrings += inherited.docstrings
    return Signature(cls.path, params, extras, tuple(docstrings))


def _inherited(cls: griffe.Class, depth: int) -> Signature | None:
    near = own_packages() | {cls.path.partition(".")[0]}
    for base in bases(cls):
        if base.partition(".")[0] in near and depth < 10:
            found = find_class(base)
            if found is not None and found.path != cls.path:
                return _class_signature(found, depth + 1)
    return None


def function_params(function: griffe.Function) -> tuple[dict[str, Param], Type | None]:
    """Return the arguments of a function, and the type of its `**` argument."""
    params: dict[str, Param] = {}
    extras: Type | None = None
    module = function.module
    for parameter in function.parameters:
        text = None if parameter.annotation is None else str(parameter.annotation)
        if parameter.kind is griffe.ParameterKind.var_keyword:
            extras = parse_annotation(text, module)
        elif parameter.kind is not griffe.ParameterKind.var_positional and not (
            parameter.name in ("self", "cls") and not params
        ):
            default = None if parameter.default is None else str(parameter.default)
            params[parameter.name] = _param(parameter.name, text, default, module)
    return params, extras


def _param(name: str, annotation: str | None, default: str | None, module: griffe.Module) -> Param:
    if is_runtime(annotation, module):
        return Param(name, ANY, default is None, runtime=True)
    kind = parse_annotation(annotation, module)
    if default is None:
        return Param(name, kind)
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError, TypeError):
        return Param(name, kind, False, None, default)
    return Param(name, kind, False, value, default)


def _is_dataclass(cls: griffe.Class) -> bool:
    texts = [str(decorator.value) for decorator in cls.decorators]
    return any(text.partition("(")[0].endswith("dataclass") for text in texts)


def field_params(cls: griffe.Class) -> dict[str, Param]:
    """The annotated attributes of a class, as arguments."""
    params: dict[str, Param] = {}
    for name, member in cls.members.items():
        if not isinstance(member, griffe.Attribute) or member.annotation is None:
            continue
        annotation = str(member.annotation)
        # class variables are no fields
        if "instance-attribute" in member.labels and not name.startswith("_"):
            default = None if member.value is None else _field_default(str(member.value))
            params[name] = _param(name, annotation, default, cls.module)
    return params


def _field_default(text: str) -> str | None:
    """The text of a dataclass field's default; None when it has none."""
    call = ast.parse(text, mode="eval").body
    if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith("field")):
        return text
    given = {one.arg: one.value for one in call.keywords}
    if "default" in given:
        return ast.unparse(given["default"])
    factory = given.get("default_factory")
    if isinstance(factory, ast.Lambda):
        return ast.unparse(factory.body)
    if factory is None:
        return None
    name = ast.unparse(factory)
    return {"dict": "{}", "list": "[]", "tuple": "()", "str": "''"}.get(name, f"{name}()")


# -- annotations


def parse_annotation(text: str | None, module: griffe.Module) -> Type:
    """Return the type of an annotation.

    Args:
        text: the annotation as written; None without one.
        module: the module whose imports resolve its names.

    Returns:
        The type; annotations that are not understood allow anything.
    """
    if text is None:
        return ANY
    try:
        return _Parser(module).type(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        return ANY


def is_runtime(text: str | None, module: griffe.Module) -> bool:
    """Return whether an annotation holds `Runtime[...]`."""
    if text is None or "Runtime" not in text:
        return False
    try:
        tree = ast.parse(text.strip("'\""), mode="eval")
    except SyntaxError:
        return False
    names = (_name(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    return any(absolute_name(module, name) == _RUNTIME for name in names if name)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and _name(node.value):
        return f"{_name(node.value)}.{node.attr}"
    return ""


class _Parser:
    def __init__(self, module: griffe.Module) -> None:
        self.module = module

    def type(self, node: ast.expr) -> Type:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return self.type(ast.parse(node.value.strip(), mode="eval").body)
            return Basic("null") if node.value is None else ANY
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return AnyOf((self.type(node.left), self.type(node.right)))
        if isinstance(node, ast.Subscript):
            return self.subscript(node)
        name = _name(node)
        return self.named(absolute_name(self.module, name)) if name else ANY

    def named(self, path: str) -> Type:
        if path in _BASIC:
            return Basic(_BASIC[path])
        if path in _LISTS:
            return ListOf(ANY, _LISTS[path])
        if path in _MAPS:
            return MapOf(ANY)
        if path.partition(".")[0] not in own_packages():
            return Basic("foreign")
        found = find_object(path)
        if isinstance(found, griffe.Class):
            return Instance(found.path)
        if isinstance(found, griffe.Attribute) and found.value is not None:
            return parse_annotation(str(found.value), found.module)
        return Basic("foreign")

    def subscript(self, node: ast.Subscript) -> Type:
        path = absolute_name(self.module, _name(node.value)).replace(
            "typing_extensions.", "typing."
        )
        inner = node.slice
        parts = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
        if path == "typing.Optional":
            return AnyOf((self.type(parts[0]), Basic("null")))
        if path == "typing.Union":
            return AnyOf(tuple(self.type(part) for part in parts))
        if path == "typing.Literal":
            return Choice(tuple(ast.literal_eval(part) for part in parts))
        if path == "typing.Annotated":
            kind = self.type(parts[0])
            for part in parts[1:]:
                mark = self.mark(part)
                kind = kind if mark is None else Marked(kind, mark)
            return kind
        if path in _LISTS:
            if _LISTS[path] == "tuple" and not (
                isinstance(parts[-1], ast.Constant) and parts[-1].value is ...
            ):
                return TupleOf(tuple(self.type(part) for part in parts))
            return ListOf(self.type(parts[0]), _LISTS[path])
        if path in _MAPS:
            return MapOf(self.type(parts[-1]))
        if path == _RUNTIME:
            return self.type(parts[0])
        return self.named(path)

    def mark(self, node: ast.expr) -> AnyMark | None:
        if not isinstance(node, ast.Call):
            return None
        cls = _MARKS.get(absolute_name(self.module, _name(node.func)))
        if cls is None:
            return None
        given = [ast.literal_eval(argument) for argument in node.args]
        named = {one.arg: ast.literal_eval(one.value) for one in node.keywords if one.arg}
        mark: AnyMark = cls(*given, **named)
        return mark


# -- Python files as text


@cache
def find_file(module: str) -> Path | None:
    """Find the file of a module; only the top-level package is found by the import system."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded and loaded.endswith(".py"):
        return Path(loaded)
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not parts:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder, *parts)
        for file in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def read_module(module: str) -> griffe.Module | None:
    """Read the names of a module from its text; None if there is no such Python file."""
    file = find_file(module)
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
        return griffe.visit(module.rpartition(".")[2], file, text, parent=_package(module))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


@cache
def _package(module: str) -> griffe.Module | None:
    """Return an empty stand-in for the package of a module, to resolve relative imports."""
    package, _, _ = module.rpartition(".")
    if not package:
        return None
    name = package.rpartition(".")[2]
    return griffe.Module(name, filepath=Path("__init__.py"), parent=_package(package))


def absolute_name(module: griffe.Module, name: str) -> str:
    """Return the absolute dotted path of a name in a module: `Opt` -> `typing.Optional`."""
    first, dot, rest = name.partition(".")
    if first in module.imports:
        return module.imports[first] + dot + rest
    if first in module.members:
        return f"{module.path}.{name}"
    for pattern in wildcard_imports(module):
        found = find_object(f"{pattern}.{name}")
        if found is not None:
            return found.path
    return name if hasattr(builtins, first) else f"{module.path}.{name}"


def wildcard_imports(module: griffe.Module) -> list[str]:
    """The modules that a module imports everything from."""
    return [
        member.target_path
        for member in module.members.values()
        if isinstance(member, griffe.Alias) and member.wildcard
    ]


def find_object(path: str) -> griffe.Object | None:
    """Find the class, function or attribute at a dotted path, following re-exports."""
    for _ in range(10):
        parts = path.split(".")
        for length in range(len(parts) - 1, 0, -1):
            module = read_module(".".join(parts[:length]))
            if module is not None:
                break
        else:
            return None
        first = parts[length]
        if first in module.imports and module.imports[first] != path:
            path = ".".join([module.imports[first], *parts[length + 1 :]])
            continue
        found: griffe.Object | griffe.Alias | None = module
        for part in parts[length:]:
            found = found.members.get(part) if found is not None else None
            if found is None or isinstance(found, griffe.Alias):
                break
        if isinstance(found, griffe.Object):
            return found
        for target in wildcard_imports(module):
            if target != module.path:
                inner = find_object(".".join([target, *parts[length:]]))
                if inner is not None:
                    return inner
        return None
    return None


def find_class(path: str) -> griffe.Class | None:
    """The class at a dotted path or a `module:Class` location."""
    found = find_object(path.replace(":", "."))
    return found if isinstance(found, griffe.Class) else None


def bases(cls: griffe.Class) -> list[str]:
    """Return the absolute dotted paths of the base classes of a class."""
    return [absolute_name(cls.module, str(base).partition("[")[0]) for base in cls.bases]
