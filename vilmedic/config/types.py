"""Marks in constructor signatures and sections that say how a configuration value is judged.

The checker reads signatures as text, without importing the module that holds them. Plain
annotations (`int`, `str | None`, `Literal["a", "b"]`, `list[str]`, `dict[str, float]`) speak for
themselves, and an annotation that names a class of this package (`cnn: VisionEncoder`) means a
nested section that is built into an instance of that class. The marks below cover the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

T = TypeVar("T")

Runtime = Annotated[T, "given by the framework, not by the configuration"]
"""A constructor argument that `build` fills in: `spec: Runtime[DataSpec]`."""


@dataclass(frozen=True)
class NameIn:
    """The value is the name of a class in a namespace: `Annotated[str, NameIn("torch.optim")]`.

    Args:
        namespace: a module (`torch.optim`) or the kind of a registry (`metric`).
    """

    namespace: str


@dataclass(frozen=True)
class OptionsOf:
    """The value holds keyword arguments of the class that a sibling key names.

    Args:
        namespace: where that class is looked up, as for `NameIn`.
        key: the sibling key that holds its name.
        filled: required arguments that the framework works out when they are not given.
    """

    namespace: str
    key: str
    filled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calls:
    """The value maps names to keyword arguments: `{zero_shot: {prompts: p.yml}, retrieval: }`.

    A list of such one-entry mappings, or of bare names, keeps its order and may repeat a name.

    Args:
        namespace: where the names are looked up, as for `NameIn`.
    """

    namespace: str


@dataclass(frozen=True)
class ConfigOf:
    """For `**settings`: the fields of a transformers configuration class.

    Args:
        default: the model type when nothing else says (`bert`).
        key: the sibling key that may name a local model folder, whose `config.json` then decides.
    """

    default: str
    key: str


@dataclass(frozen=True)
class AtLeast:
    """The value is a number that is not smaller: `Annotated[int, AtLeast(1)]`.

    Args:
        minimum: the smallest number allowed.
    """

    minimum: float


@dataclass(frozen=True)
class Matching:
    """The value is text of a certain form: `Annotated[str, Matching("best-[0-9]+", "best-N")]`.

    Args:
        pattern: a regular expression that the whole text matches.
        words: the form in words, for messages.
    """

    pattern: str
    words: str


@dataclass(frozen=True)
class UsedWith:
    """The value has an effect only while a sibling key says so.

    `Annotated[int, UsedWith("early_stop")]`. Where it has none, a key of the command line or of the
    same file is refused, and one of a weaker file is left out with a line. Written first among the
    marks.

    Args:
        key: the sibling key.
        values: its values with which this one is used; by default any but null, false and 0.
        mode: whether the sibling key chooses what a command does, which is mostly done on the
            command line: files may then hold what is for either, and only the command line is
            judged.
    """

    key: str
    values: tuple[Any, ...] = ()
    mode: bool = False


@dataclass(frozen=True)
class Within:
    """The value is a number counted from 0 of which a sibling key says how many there are.

    Handled as `UsedWith` where it is larger.

    Args:
        key: the sibling key.
    """

    key: str


@dataclass(frozen=True)
class Overruled:
    """An option in the mapping has no effect while another key is set to something else.

    Handled as `UsedWith`. A mapping may have several of these marks.

    Args:
        option: the option.
        by: the sibling key that is used instead, or `key.option` for an option in its mapping.
        instead: what to do, for messages; `{section}` is where the mapping stands.
    """

    option: str
    by: str
    instead: str
