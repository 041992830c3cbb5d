"""The arguments of a class, read from its source text: the schema of the node that builds it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import griffe

from vilmedic.config.annotations import ANY, Type, is_runtime, parse_annotation
from vilmedic.config.sources import bases, find_class
from vilmedic.registry import own_packages


@dataclass(frozen=True)
class Param:
    """One argument of a constructor.

    Args:
        name: its name.
        type: what its value may be.
        required: whether it has no default.
        default: the default, when it is a literal; None otherwise.
        default_text: the default as shown to a reader.
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
        extras: what `**settings` may hold; None when there is no such argument.
        docstrings: where its arguments are described, the most telling first.
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
        """The same without some arguments."""
        kept = {name: param for name, param in self.params.items() if name not in hidden}
        return replace(self, params=kept)

    @property
    def summary(self) -> str:
        """The first line of the class docstring."""
        for docstring in self.docstrings:
            return docstring.value.strip().partition("\n")[0]
        return ""

    def docs(self) -> dict[str, str]:
        """What the docstrings say of each argument, in one line each."""
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
    """The constructor arguments of the class at a dotted path or `module:Class` location.

    Args:
        path: where the class is.

    Returns:
        Its signature; None when the source text does not show the class.
    """
    cls = find_class(path)
    return None if cls is None else _class_signature(cls, depth=0)


def derives_from(path: str, ancestor: str) -> bool:
    """Whether the class at a path is another one or derives from it, as far as the text shows."""
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
    # what this class does not name itself reaches the class that it derives from
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
    """The arguments of a function, and what its `**` argument may hold."""
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
        # what belongs to the class alone is no field
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
