from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vilmedic.config.load import Config, load
from vilmedic.errors import ConfigError
from vilmedic.registry import REGISTRIES

NUMBERS = itertools.count()

PACKAGE = '''
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from vilmedic.config.types import AtLeast, Calls, ConfigOf, NameIn, Runtime
from vilmedic.errors import ArgumentError
from vilmedic.registry import BLOCKS, DATASETS, LOSSES, METRICS, MODELS

if TYPE_CHECKING:
    from pathlib import Path as Folder

    from vilmedic.datasets.aligned import DataSpec

Sides = int | tuple[int, int]


class Recorder:
    """Keeps its arguments."""

    def keep(self, arguments: dict[str, Any]) -> None:
        self.given = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}


@BLOCKS.register("Net")
class Net(Recorder):
    """Pixels to features.

    Args:
        backbone: the architecture.
        permute: the order of its axes,
            on two lines.
    """

    def __init__(
        self,
        *,
        backbone: str,
        permute: Literal["batch_first", "none"] = "batch_first",
        freeze: bool = False,
        dropout: float = 0.0,
        width: Annotated[int, AtLeast(1)] = 8,
    ) -> None:
        self.keep(locals())


@BLOCKS.register("WideNet")
class WideNet(Net):
    """A net with a factor."""

    def __init__(self, *, factor: int = 2, **others: Any) -> None:
        super().__init__(**others)
        self.factor = factor


class Encoder(Recorder):
    """Text to features."""

    def __init__(
        self,
        *,
        proto: str | None,
        spec: Runtime[DataSpec],
        **settings: Annotated[Any, ConfigOf("bert", key="proto")],
    ) -> None:
        self.keep(locals())


@LOSSES.register("Near")
class Near(Recorder):
    def __init__(self, *, tau: float = 0.1) -> None:
        if tau <= 0:
            raise ValueError("tau has to be above 0")
        self.keep(locals())


@LOSSES.register("Far")
class Far(Recorder):
    def __init__(self, *, margin: float = 1.0) -> None:
        self.keep(locals())


@MODELS.register("Pair")
class Pair(Recorder):
    """Image-report pairs.

    Args:
        net: encodes images.
        encoder: encodes reports.
    """

    def __init__(
        self,
        *,
        net: Net,
        encoder: Encoder,
        loss: Near,
        spec: Runtime[DataSpec],
        sides: Sides = 4,
        where: Optional[Folder] = None,
        pretrained: bool | str = True,
        parts: list[Near] | None = None,
    ) -> None:
        self.keep(locals())


@MODELS.register("Alone")
class Alone(Recorder):
    """Images only."""

    def __init__(self, *, net: Net, loss: Far, views: int = 2) -> None:
        self.keep(locals())


@MODELS.register("Wary")
class Wary(Recorder):
    def __init__(self, *, net: Net) -> None:
        given = net.given["backbone"]
        raise ArgumentError(
            {"net.backbone": f"given {given!r}, which is too small", "": "cannot be made"}
        )


@DATASETS.register("Lines")
class Lines(Recorder):
    """Lines of a file.

    Args:
        root: where the files are.
    """

    def __init__(
        self,
        *,
        root: Path,
        split: Runtime[str],
        seed: Runtime[int] = 0,
        augment: Annotated[list[Any] | None, Calls("torchvision.transforms.v2")] = None,
    ) -> None:
        self.keep(locals())


@METRICS.register("counting")
class Counting(Recorder):
    def __init__(self, *, of: str, often: int = 1) -> None:
        self.keep(locals())


@METRICS.register("picky")
class Picky:
    def __init__(self) -> None:
        raise ValueError("there is no table")
'''

BASE = """\
plugins: [{package}.parts]
dataset:
  proto: Lines
  root: data
model:
  proto: Pair
  net:
    proto: Net
    backbone: small
  encoder:
    proto: null
    hidden_size: 64
  loss:
    proto: Near
    tau: 0.5
trainor:
  optimizer: RAdam
  optim_params: {{lr: 5e-5, decoupled_weight_decay: true}}
  lr_decay: ReduceLROnPlateau
  lr_decay_params: {{factor: 0.5, patience: 5}}
"""


@dataclass
class Project:
    """The working directory, with a plugin package and configuration files."""

    root: Path
    package: str

    def write(self, name: str, text: str) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    def load(self, *words: str, path: str = "base.yml") -> Config:
        return load(path, words)

    def problems(self, *words: str, path: str = "base.yml") -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(path, words)
        return caught.value.problems

    def problem(self, *words: str, path: str = "base.yml") -> str:
        (problem,) = self.problems(*words, path=path)
        return problem


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    package = f"plugin_{next(NUMBERS)}"
    found = Project(tmp_path, package)
    found.write(f"{package}/__init__.py", "")
    found.write(f"{package}/parts.py", PACKAGE)
    found.write("base.yml", BASE.format(package=package))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in REGISTRIES.values():
        monkeypatch.setattr(registry, "_table", dict(registry._table))
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield found
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[module]
