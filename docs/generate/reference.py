"""Reference pages of the site: every key of a configuration, and the public Python API.

Made from the signatures and docstrings that `--help` and the checks of a configuration read, as
text: nothing that is documented is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import griffe

from vilmedic.config.load import root_signature
from vilmedic.config.namespaces import is_node, names, registry_of, signature
from vilmedic.config.signature import Param, Signature, find_class, find_object, read_signature
from vilmedic.config.types import (
    Calls,
    ConfigOf,
    Marked,
    NameIn,
    OptionsOf,
    instance_of,
    options,
    spell,
)
from vilmedic.config.wording import describe
from vilmedic.registry import REGISTRIES, Registry

TITLES = {
    "model": ("Models", "under `model`"),
    "dataset": ("Data sets", "under `dataset`"),
    "block": ("Image encoders", "under the key of the model that takes one, such as `model.cnn`"),
    "loss": ("Losses", "under `model.loss`"),
    "metric": ("Metrics", "under `validator.metrics.<name>` and `ensemblor.metrics.<name>`"),
    "post_processing": (
        "Post-processing",
        "under `validator.post_processing.<name>` and `ensemblor.post_processing.<name>`",
    ),
    "logger": ("Loggers", "under `trainor.loggers`, as in `[{wandb: {project: xrays}}]`"),
}
PUBLIC = {
    "Runs and trained models": (
        "vilmedic.run.load",
        "vilmedic.run.train",
        "vilmedic.run.evaluate",
        "vilmedic.run.Run",
        "vilmedic.trained_model.TrainedModel",
        "vilmedic.trained_model.Attention",
        "vilmedic.embedder.Embedder",
        "vilmedic.inputs.images_in",
    ),
    "Errors": (
        "vilmedic.errors.VilmedicError",
        "vilmedic.errors.ConfigError",
        "vilmedic.errors.ArgumentError",
        "vilmedic.errors.DataError",
        "vilmedic.errors.CheckpointError",
    ),
    "To extend the package": (
        "vilmedic.registry.Registry",
        "vilmedic.models.contract.Model",
        "vilmedic.models.contract.ContrastiveModel",
        "vilmedic.losses.learned.LearnedLoss",
        "vilmedic.datasets.aligned.DataSpec",
        "vilmedic.datasets.aligned.AlignedDataset",
        "vilmedic.datasets.aligned.AlignedPart",
        "vilmedic.metrics.contract.Metric",
        "vilmedic.evaluation.evaluation.Evaluation",
        "vilmedic.post_processing.contract.PostProcessing",
        "vilmedic.loggers.contract.Logger",
    ),
}
"""The classes and functions of the Python page, under its headings."""

_CODE = re.compile(r"(`+[^`]*`+)")


def pages() -> dict[str, str]:
    """Every page of the reference: its path in the site to its Markdown."""
    made = {"reference/configuration.md": configuration(), "reference/python.md": python()}
    for kind, registry in REGISTRIES.items():
        made[f"reference/{page_of(registry)}"] = registered(kind, registry)
    return made


def page_of(registry: Registry) -> str:
    """The file of a registry's page."""
    return f"{TITLES[registry.kind][0].lower().replace(' ', '-')}.md"


# -- keys of a configuration


def configuration() -> str:
    """The page of the keys that the framework itself owns."""
    root = root_signature()
    sections = {name: one for name, one in root.settable.items() if instance_of(one.type)}
    lines = [
        "# Configuration keys",
        "",
        "Every key of the sections that are the same for all systems. The keys of `model` and "
        "`dataset` depend on their `proto`: [models](models.md), [data sets](data-sets.md). "
        "`python bin/train.py <file> --help trainor` shows the same with the values of a file.",
        "",
        "## The run",
        "",
    ]
    docs = root.docs()
    for name, param in root.settable.items():
        if name not in sections:
            lines += _entry(name, param, docs.get(name, ""), "")
    for name, param in sections.items():
        instance = instance_of(param.type)
        read = read_signature(instance.path) if instance else None
        if read is not None:
            lines += [f"## {name}", "", prose(read.summary), "", *_keys(read, f"{name}.")]
    return "\n".join(lines)


def registered(kind: str, registry: Registry) -> str:
    """The page of the classes of a registry, each with its keys."""
    title, where = TITLES[kind]
    lines = [f"# {title}", "", f"Their keys stand {where}.", ""]
    aliases = registry.aliases()
    for name in registry.names():
        read = signature(kind, name)
        if read is None:
            continue
        lines += [f"## {name}", "", *_text(read)]
        others = [f"`{alias}`" for alias, of in aliases.items() if of == name]
        if others:
            lines += [f"Also called {', '.join(others)}.", ""]
        lines += list(_keys(read, "", f"{name}.")) or ["It has no keys.", ""]
    return "\n".join(lines)


def _text(read: Signature) -> list[str]:
    """Return the paragraphs of the first docstring of a class before its arguments."""
    for docstring in read.docstrings:
        for section in docstring.parse("google", warnings=False):
            if isinstance(section, griffe.DocstringSectionText):
                return [prose(section.value), ""]
    return []


def _keys(read: Signature, prefix: str, anchor: str = "", depth: int = 0) -> Iterator[str]:
    """The entries of the keys of a class, and of the sections in it."""
    docs = read.docs()
    for name, param in read.settable.items():
        yield from _entry(f"{prefix}{name}", param, docs.get(name, ""), anchor)
        instance = instance_of(param.type)
        if instance is not None and registry_of(param.type) is None and depth < 6:
            inner = read_signature(instance.path)
            if inner is not None:
                yield from _keys(inner, f"{prefix}{name}.", anchor, depth + 1)
    if isinstance(read.extras, Marked) and isinstance(read.extras.mark, ConfigOf):
        yield from ["And the settings of the transformers configuration of its model type.", ""]


def _entry(key: str, param: Param, doc: str, anchor: str) -> list[str]:
    """A definition: the key with its anchor, then type, default and meaning."""
    registry = registry_of(param.type)
    if registry is not None:
        kind = f"a section with a `proto` out of [{TITLES[registry.kind][0].lower()}]"
        kind += f"({page_of(registry)})"
    elif is_node(param.type):
        kind = "a section"
    else:
        kind = prose(describe(param.type))
    if param.required:
        kind += "; required"
    elif not is_node(param.type) and param.default_text:
        kind += f"; default `{_default(param)}`"
    note = _names(param)
    body = " ".join(text for text in (prose(doc[:1].upper() + doc[1:]), note) if text)
    identifier = f"{anchor}{key}".lower()
    return [f"`{key}`{{ #{identifier} }}", f":   *{kind}*", "", f"    {body}", ""]


def _default(param: Param) -> str:
    text = param.default_text
    if text in ("dict()", "list()"):
        return {"dict()": "{}", "list()": "[]"}[text]
    if param.default is None and text != "None":
        return text
    value = param.default
    return "''" if value == "" else text if isinstance(value, list | dict) else spell(value)


def _names(param: Param) -> str:
    """Return the names that a key allows, if its type does not list them."""
    for option in options(param.type):
        mark = option.mark if isinstance(option, Marked) else None
        if isinstance(mark, OptionsOf):
            return f"`--help` lists those of the class that `{mark.key}` names."
        if isinstance(mark, NameIn | Calls) and not is_node(param.type):
            if mark.namespace in REGISTRIES:
                registry = REGISTRIES[mark.namespace]
                return f"One of [{TITLES[registry.kind][0].lower()}]({page_of(registry)})."
            if isinstance(mark, NameIn):
                listed = ", ".join(f"`{name}`" for name in names(mark.namespace))
                return f"Names: {listed}."
    return ""


# -- the Python API


def python() -> str:
    """The page of the public functions and classes."""
    lines = [
        "# Python API",
        "",
        "`import vilmedic` gives `load`, `train`, `evaluate`, `TrainedModel`, `images_in` and "
        "`VilmedicError`; the other names are imported from the modules shown.",
        "",
    ]
    for title, paths in PUBLIC.items():
        lines += [f"## {title}", ""]
        for path in paths:
            lines += documented(path)
    return "\n".join(lines)


def documented(path: str) -> list[str]:
    """A function, or a class with its public methods, as Markdown.

    Raises:
        LookupError: the source text does not show it.
    """
    found = find_object(path)
    if isinstance(found, griffe.Function):
        return _function(found, path, "###")
    cls = find_class(path)
    if cls is None:
        raise LookupError(f"{path} is not in the source text")
    lines = [f"### {cls.name}", "", f"```python\nfrom {path.rpartition('.')[0]} import {cls.name}"]
    lines += ["```", "", *_sections(cls.docstring)]
    for name, member in cls.members.items():
        if isinstance(member, griffe.Function) and not name.startswith("_"):
            lines += _function(member, f"{cls.name}.{name}", "####")
        elif isinstance(member, griffe.Attribute) and member.docstring and name[0] != "_":
            lines += [f"#### {cls.name}.{name}", "", *_sections(member.docstring)]
    return lines


def _function(function: griffe.Function, path: str, hashes: str) -> list[str]:
    name = path if path.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")) else path.split(".")[-1]
    return [f"{hashes} {name}", "", *_call(function), "", *_sections(function.docstring)]


def _call(function: griffe.Function) -> list[str]:
    """How a function is called: one line, or one an argument where that gets too long."""
    parts, keyword_only = [], False
    for one in function.parameters:
        if one.name in ("self", "cls"):
            continue
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(
            one.kind.value if one.kind else "", ""
        )
        if one.kind is griffe.ParameterKind.keyword_only and not keyword_only:
            keyword_only = True
            parts += [] if any(part.startswith("*") for part in parts) else ["*"]
        text = f"{stars}{one.name}" + (f": {one.annotation}" if one.annotation else "")
        default = one.default if not stars else None
        parts.append(text + (f" = {default}" if default is not None else ""))
    returns = f" -> {function.returns}" if function.returns else ""
    line = f"{function.name}({', '.join(parts)}){returns}"
    if len(line) > 80:
        listed = "\n".join(f"    {part}," for part in parts)
        line = f"{function.name}(\n{listed}\n){returns}"
    return ["```python", line, "```"]


def _sections(docstring: griffe.Docstring | None) -> list[str]:
    lines: list[str] = []
    for section in docstring.parse("google", warnings=False) if docstring else ():
        if isinstance(section, griffe.DocstringSectionText):
            lines += [prose(section.value), ""]
        elif isinstance(section, griffe.DocstringSectionParameters):
            lines += ["**Arguments**", ""]
            lines += [f"- `{one.name}`: {_inline(one.description)}" for one in section.value]
            lines.append("")
        elif isinstance(section, griffe.DocstringSectionReturns | griffe.DocstringSectionYields):
            said = " ".join(_returned(docstring) or (one.description for one in section.value))
            lines += [f"**Returns** {_inline(said)}", ""]
        elif isinstance(section, griffe.DocstringSectionRaises):
            lines += ["**Raises**", ""]
            lines += [f"- `{one.annotation}`: {_inline(one.description)}" for one in section.value]
            lines.append("")
    return lines


def _returned(docstring: griffe.Docstring | None) -> list[str]:
    """The text under `Returns:` or `Yields:`, whose first words a parser takes for a type."""
    text = docstring.value if docstring else ""
    found = re.search(r"^(?:Returns|Yields):\n((?: +.*\n?|\n)+)", text, re.MULTILINE)
    return [line.strip() for line in found[1].splitlines()] if found else []


def _inline(text: str) -> str:
    return prose(" ".join(text.split()))


def prose(text: str) -> str:
    """Text of a docstring as Markdown: what is not in backticks stands for itself."""
    parts = _CODE.split(text)
    for number in range(0, len(parts), 2):
        escaped = re.sub(r"([*\[\]])", r"\\\1", parts[number])
        parts[number] = escaped.replace("<", "&lt;")
    return "".join(parts)
