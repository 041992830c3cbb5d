"""Types and bounds of configuration values.

The checker reads signatures as text, without importing the module that holds them. Plain
annotations (`int`, `str | None`, `Literal["a", "b"]`, `list[str]`, `dict[str, float]`) have their
usual meaning, and an annotation that names a class of this package (`cnn: VisionEncoder`) means a
nested section that becomes an instance of that class. The marks below cover the rest. The types
that the checker makes of them, from `Basic` to `Marked`, are at the end.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

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
    """For `**settings` or a mapping: the fields of a transformers configuration class.

    Args:
        default: the model type if nothing else sets it (`bert`); None if it is then unknown.
        key: the sibling key that may name a local model folder, whose `config.json` sets the type.
    """

    default: str | None
    key: str


@dataclass(frozen=True)
class _Limit:
    """A bound of a number to one side; several bounds on one value all hold.

    Whatever the bounds, a number of a configuration is finite and fits into 64 bits.

    Args:
        limit: the number that the value is compared with.
    """

    limit: float
    sign: ClassVar[str]
    compare: ClassVar[Callable[[float, float], bool]]

    def allows(self, number: float) -> bool:
        """Return whether a number is within the bound."""
        return type(self).compare(number, self.limit)

    def words(self) -> str:
        """The bound as messages and `--help` say it."""
        return f"{self.sign} {_spelt(self.limit)}"


class AtLeast(_Limit):
    """The value is a number that is not smaller: `Annotated[int, AtLeast(1)]`."""

    sign, compare = ">=", operator.ge


class Above(_Limit):
    """The value is a number that is larger: `Annotated[float, Above(0)]`."""

    sign, compare = ">", operator.gt


class Below(_Limit):
    """The value is a number that is smaller: `Annotated[float, AtLeast(0), Below(1)]`."""

    sign, compare = "<", operator.lt


class AtMost(_Limit):
    """The value is a number that is not larger: `Annotated[float, Above(0), AtMost(1)]`."""

    sign, compare = "<=", operator.le


@dataclass(frozen=True)
class Between:
    """The value is a number from one to another, both allowed: `Annotated[float, Between(0, 1)]`.

    Args:
        minimum: the smallest number allowed.
        maximum: the largest number allowed.
    """

    minimum: float
    maximum: float

    def allows(self, number: float) -> bool:
        """Return whether a number is within the bounds."""
        return self.minimum <= number <= self.maximum

    def words(self) -> str:
        """The bounds as messages and `--help` say them."""
        if self.minimum == self.maximum:
            return f"equal to {_spelt(self.minimum)}"
        return f"from {_spelt(self.minimum)} to {_spelt(self.maximum)}"


BOUNDS = (AtLeast, Above, Below, AtMost, Between)
"""The marks that bound a number, each with `allows` and `words`."""


def _spelt(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


@dataclass(frozen=True)
class Lengths:
    """The value is a list of one of some lengths: `Annotated[list[float], Lengths((1, 3))]`.

    Args:
        allowed: the lengths.
    """

    allowed: tuple[int, ...]


@dataclass(frozen=True)
class AsLongAs:
    """The value is a list that has as many entries as the list of a sibling key.

    Args:
        key: the sibling key.
    """

    key: str


@dataclass(frozen=True)
class FolderName:
    """The value is text that names a folder inside another one, or a folder in such a folder."""


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
        key: the sibling key, or `key.option` for an option in its mapping.
        values: its values with which this one is used; by default any but null, false and 0.
        mode: whether the sibling key chooses what a command does, mostly on the command line:
            files may then hold keys for either, and only the command line is checked.
    """

    key: str
    values: tuple[Any, ...] = ()
    mode: bool = False


@dataclass(frozen=True)
class Within:
    """The value is an index from 0 below the value of a sibling key.

    Handled as `UsedWith` where it is larger.

    Args:
        key: the sibling key.
        unless: another sibling key that replaces it; if that is set, the value is not checked.
    """

    key: str
    unless: str | None = None


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


Width = Annotated[int, Between(1, 65536)]
"""Channels or features of a layer: a layer between two such widths takes 16 GiB at most."""
Side = Annotated[int, Between(1, 16384)]
"""Pixels along a side of an image."""
Count = Annotated[int, Between(1, 1048576)]
"""A number of items that take memory, such as the codes of a codebook."""
Temperature = Annotated[float, Above(0), AtMost(1000)]
"""A temperature or scale of logits or similarities."""
Dropout = Annotated[float, AtLeast(0), Below(1)]
"""A dropout rate below 1: nothing could be learned from 1."""
Share = Annotated[float, Between(0, 1)]
"""A share from 0 to 1."""
Portion = Annotated[float, Above(0), AtMost(1)]
"""A share above 0, up to 1."""
Frozen = Annotated[int, Between(1, 1024)]
"""Number of frozen layers of a network, from the first on."""
Weight = Annotated[float, Between(0, 1000000)]
"""A factor of a term of a loss."""
Normalization = tuple[
    list[Annotated[float, Between(-1000, 1000)]], list[Annotated[float, Above(0), AtMost(1000)]]
]
"""The means of the channels of an image, and their standard deviations."""
Means = Annotated[list[Annotated[float, Between(-1000, 1000)]], Lengths((1, 3))]
"""The mean of each colour channel, or one for all, of pixels in 0..1."""
Spreads = Annotated[list[Annotated[float, Above(0), AtMost(1000)]], Lengths((1, 3))]
"""The standard deviation of each colour channel, or one for all, of pixels in 0..1."""
Device = Annotated[str, Matching("cpu|cuda(:[0-9]{1,3})?|mps", "cpu, cuda, cuda:N or mps")]
"""A device."""
Seed = Annotated[int, Between(0, 4294967295)]
"""A seed for all random generators."""
Resamples = Annotated[int, Between(0, 1000000)]
"""Number of bootstrap resamples; 0 leaves out intervals."""

# -- types of the checker

AnyMark = (
    NameIn
    | OptionsOf
    | Calls
    | ConfigOf
    | AtLeast
    | Above
    | Below
    | AtMost
    | Between
    | Lengths
    | AsLongAs
    | FolderName
    | Matching
    | UsedWith
    | Within
    | Overruled
)


@dataclass(frozen=True)
class Basic:
    """A plain value: null, bool, int, float, text, path, any, or foreign.

    Foreign values cannot be in a configuration (a tensor, a function) and are never checked.
    """

    name: str


@dataclass(frozen=True)
class Choice:
    """One of some literal values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class ListOf:
    """A list of any length; `container` is what a constructor gets: list, tuple or set."""

    item: Type
    container: str = "list"


@dataclass(frozen=True)
class TupleOf:
    """A list of a fixed length."""

    items: tuple[Type, ...]


@dataclass(frozen=True)
class MapOf:
    """A mapping from text."""

    value: Type


@dataclass(frozen=True)
class AnyOf:
    """A value of any of several types."""

    options: tuple[Type, ...]


@dataclass(frozen=True)
class Instance:
    """A mapping that is built into an object of a class of this package or of a plugin."""

    path: str


@dataclass(frozen=True)
class Marked:
    """A type with a mark."""

    base: Type
    mark: AnyMark


Type = Basic | Choice | ListOf | TupleOf | MapOf | AnyOf | Instance | Marked
ANY = Basic("any")
NUMBERS = (Basic("int"), Basic("float"))
LARGEST = 2**63 - 1
"""The largest integer: torch and numpy use 64 bits."""
UNFIT = object()
"""Result of `read_scalar` for a value of the wrong type."""


def is_number(given: Any) -> bool:
    """Return whether a value is a number and not a boolean."""
    return isinstance(given, int | float) and not isinstance(given, bool)


def is_usable(given: Any) -> bool:
    """Return whether every number in a value is finite and fits into 64 bits."""
    if isinstance(given, dict):
        return all(is_usable(one) for one in given.values())
    if isinstance(given, list):
        return all(is_usable(one) for one in given)
    if not is_number(given):
        return True
    return math.isfinite(given) if isinstance(given, float) else -LARGEST <= given <= LARGEST


def largest_in(given: Any) -> float:
    """The magnitude of the largest number in a value and its lists; 0 where there is none."""
    if isinstance(given, list):
        return max(map(largest_in, given), default=0)
    return abs(given) if is_number(given) else 0


def plain(kind: Type) -> Type:
    """A type without its marks."""
    return plain(kind.base) if isinstance(kind, Marked) else kind


def options(kind: Type) -> tuple[Type, ...]:
    """The alternatives that a type consists of."""
    if isinstance(kind, AnyOf):
        return tuple(option for part in kind.options for option in options(part))
    return (kind,)


def instance_of(kind: Type) -> Instance | None:
    """The class that a mapping of a type becomes; None when it stays a mapping."""
    found = [one for one in options(plain(kind)) if isinstance(one, Instance)]
    return found[0] if found else None


def spell(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def read_scalar(kind: Type, given: Any, raw: str | None) -> Any:
    """Convert a value to a plain type.

    Args:
        kind: the type.
        given: the value as YAML reads it.
        raw: the original text if parsing changes it: text keys take what was typed.

    Returns:
        The value, or `UNFIT`. An integer becomes a float if the type is float, but not the reverse,
        and a boolean is not a number. Numbers must be finite and fit into 64 bits.
    """
    if isinstance(kind, Choice):
        for value in kind.values:
            if type(value) is type(given) and value == given:
                return value
        return raw if raw is not None and raw in kind.values else UNFIT
    if not isinstance(kind, Basic):
        return UNFIT
    if kind.name in ("any", "foreign"):
        return given if is_usable(given) else UNFIT
    if kind.name == "null":
        return None if given is None else UNFIT
    if kind.name == "bool":
        return given if isinstance(given, bool) else UNFIT
    if kind.name == "int":
        return given if is_number(given) and isinstance(given, int) and is_usable(given) else UNFIT
    if kind.name == "float":
        return float(given) if is_number(given) and is_usable(given) else UNFIT
    return UNFIT if given is None else _text(given, raw)


def _text(given: Any, raw: str | None) -> Any:
    if isinstance(given, str):
        return given
    if raw is not None:
        return raw
    # an interpolation may give a number to a key for text
    return UNFIT if isinstance(given, dict | list) else spell(given)


def wrong_folder_name(name: str) -> str:
    """Return why text cannot be the name of a folder inside another one; empty if it can.

    Several parts, `group/run`, are a folder in a folder.
    """
    parts = name.split("/")
    if len(name.encode("utf-8", "replace")) > 200:
        return "allowed: at most 200 bytes."
    if any(not character.isprintable() for character in name):
        return "allowed: no line breaks and no control characters."
    if "\\" in name or any(part.strip() in ("", ".", "..") for part in parts):
        return "allowed: the name of a folder inside ckpt_dir, such as my_run or group/my_run."
    return ""
