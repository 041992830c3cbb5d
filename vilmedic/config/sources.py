"""Python files as text: the names in a module and where they come from, without importing it."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from functools import cache
from pathlib import Path

import griffe


@cache
def find_file(module: str) -> Path | None:
    """The file of a module; no package but the top-level one is looked at by the import system."""
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
    """The names of a module, read from its text; None when there is no such Python file."""
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
    """An empty stand-in for the package of a module, which relative imports are counted from."""
    package, _, _ = module.rpartition(".")
    if not package:
        return None
    name = package.rpartition(".")[2]
    return griffe.Module(name, filepath=Path("__init__.py"), parent=_package(package))


def resolve(module: griffe.Module, name: str) -> str:
    """The absolute dotted path of a name as a module sees it: `Opt` -> `typing.Optional`."""
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
    """The class, function or attribute at an absolute dotted path; re-exports are followed."""
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
    """The absolute dotted paths of the classes that a class derives from."""
    return [resolve(cls.module, str(base).partition("[")[0]) for base in cls.bases]
