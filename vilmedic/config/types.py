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

    Several bounds on one value all hold: `Annotated[float, AtLeast(0), Below(1)]`. Whatever the
    bounds, a number of a configuration is finite and fits into 64 bits.

    Args:
        minimum: the smallest number allowed.
    """

    minimum: float

    def allows(self, number: float) -> bool:
        """Whether a number is within the bound."""
        return number >= self.minimum

    def words(self) -> str:
        """The bound as messages and `--help` say it."""
        return f">= {_spelt(self.minimum)}"


@dataclass(frozen=True)
class Above:
    """The value is a number that is larger: `Annotated[float, Above(0)]`.

    Args:
        limit: the largest number that is not allowed.
    """

    limit: float

    def allows(self, number: float) -> bool:
        """Whether a number is within the bound."""
        return number > self.limit

    def words(self) -> str:
        """The bound as messages and `--help` say it."""
        return f"> {_spelt(self.limit)}"


@dataclass(frozen=True)
class Below:
    """The value is a number that is smaller: `Annotated[float, Below(1)]`.

    Args:
        limit: the smallest number that is not allowed.
    """

    limit: float

    def allows(self, number: float) -> bool:
        """Whether a number is within the bound."""
        return number < self.limit

    def words(self) -> str:
        """The bound as messages and `--help` say it."""
        return f"< {_spelt(self.limit)}"


@dataclass(frozen=True)
class AtMost:
    """The value is a number that is not larger: `Annotated[float, Above(0), AtMost(1)]`.

    Args:
        maximum: the largest number allowed.
    """

    maximum: float

    def allows(self, number: float) -> bool:
        """Whether a number is within the bound."""
        return number <= self.maximum

    def words(self) -> str:
        """The bound as messages and `--help` say it."""
        return f"<= {_spelt(self.maximum)}"


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
        """Whether a number is within the bounds."""
        return self.minimum <= number <= self.maximum

    def words(self) -> str:
        """The bounds as messages and `--help` say them."""
        if self.minimum == self.maximum:
            return f"equal to {_spelt(self.minimum)}"
        return f"from {_spelt(self.minimum)} to {_spelt(self.maximum)}"


BOUNDS = (AtLeast, Above, Below, AtMost, Between)
"""The marks that bound a number; each `allows` some and has `words` for that."""


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


Width = Annotated[int, Between(1, 65536)]
"""Channels or features of a layer: a layer between two such widths takes 16 GiB at most."""
Side = Annotated[int, Between(1, 16384)]
"""Pixels along a side of an image."""
Count = Annotated[int, Between(1, 1048576)]
"""How many of something that takes memory, such as the codes of a codebook."""
Temperature = Annotated[float, Above(0), AtMost(1000)]
"""What logits or similarities are divided by, or multiplied with."""
Dropout = Annotated[float, AtLeast(0), Below(1)]
"""Share that is dropped; of all of it nothing could be learned."""
Share = Annotated[float, Between(0, 1)]
"""A part of a whole."""
Portion = Annotated[float, Above(0), AtMost(1)]
"""A part of a whole that is not nothing."""
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
Device = Annotated[str, Matching("cpu|cuda(:[0-9]{1,3})?", "cpu, cuda or cuda:N")]
"""Where is computed."""
Seed = Annotated[int, Between(0, 4294967295)]
"""A seed, as every generator of random numbers takes it."""
Resamples = Annotated[int, Between(0, 1000000)]
"""How often a bootstrap draws; 0 leaves intervals out."""
