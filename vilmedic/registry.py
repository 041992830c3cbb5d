"""Registries: names that a configuration can use, and their classes.

Built-ins stand in lazy tables, so that listing them imports nothing and a missing optional
dependency hurts only its own users. Other packages add to them with `register` in a module that a
configuration lists under `plugins`, or through an entry point: in the group `vilmedic.models`, the
entry `MyModel = "my_pkg.models:MyModel"` adds a model without importing it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from vilmedic.errors import ConfigError, nearest

C = TypeVar("C", bound=type)


class Registry:
    """The classes of one kind, by the name a configuration gives them.

    Args:
        kind: what the classes are, as messages say it (`model`).
        table: built-in name to `module:Class`, imported when first used.
        aliases: other names that published configurations use, to the built-in name.
        group: the entry point group that adds to it; None for a registry without one.
        runtime: the `Runtime` arguments that the framework gives to what it builds of this kind.
    """

    def __init__(
        self,
        kind: str,
        table: dict[str, str],
        aliases: dict[str, str] | None = None,
        group: str | None = None,
        runtime: tuple[str, ...] = (),
    ) -> None:
        self.kind = kind
        self.group = group
        self.runtime = runtime
        self._table = dict(table)
        self._aliases = dict(aliases or {})
        self._registered: dict[str, type] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator that adds a class under a name.

        Args:
            name: what a configuration calls the class.

        Raises:
            ConfigError: the name belongs to another class; both places are named.
        """

        def add(cls: C) -> C:
            self._add(name, f"{cls.__module__}:{cls.__qualname__}")
            self._registered[name] = cls
            return cls

        return add

    def names(self, pattern: str = "*") -> list[str]:
        """All names that match a pattern, aliases left out, sorted.

        Args:
            pattern: a name in which `*` and `?` stand for any text and any letter.
        """
        self._scan()
        return sorted(name for name in self._table if fnmatchcase(name, pattern))

    def aliases(self) -> dict[str, str]:
        """Other names that are understood, each with the name that it stands for."""
        return dict(self._aliases)

    def locations(self) -> list[str]:
        """`module:Class` of every class known so far."""
        return list(self._table.values())

    def location(self, name: str) -> str:
        """`module:Class` behind a name or alias, without importing it.

        Raises:
            ConfigError: there is no such name.
        """
        resolved = self._aliases.get(name, name)
        if resolved not in self._table:
            self._scan()
        if resolved not in self._table:
            allowed = ", ".join(self.names()) or "none"
            raise ConfigError(
                f"there is no {self.kind} named '{name}'. Allowed: {allowed}."
                f"{nearest(str(name), [*self._table, *self._aliases])}"
            )
        return self._table[resolved]

    def get(self, name: str) -> Any:
        """The class behind a name or alias, imported if need be.

        Raises:
            ConfigError: there is no such name, or what it needs cannot be imported.
        """
        location = self.location(name)
        resolved = self._aliases.get(name, name)
        if resolved in self._registered:
            return self._registered[resolved]
        return import_class(location, f"the {self.kind} '{name}'")

    def _add(self, name: str, here: str) -> None:
        there = self._table.get(self._aliases.get(name, name), here)
        if there != here:
            raise ConfigError(
                f"the {self.kind} '{name}' is registered twice: by {there} and by {here}."
            )
        self._table[name] = here

    def _scan(self) -> None:
        """Add what installed packages offer; done once, and only when a name is not built in."""
        if self.group is None or self._scanned:
            return
        self._scanned = True
        from importlib.metadata import entry_points

        for entry in entry_points(group=self.group):
            self._add(entry.name, entry.value)


def import_class(location: str, what: str) -> Any:
    """The class at `module:Class`.

    Args:
        location: where it is.
        what: what it is to the user, for the message.

    Raises:
        ConfigError: a module that it needs is not installed, or the class is not there.
    """
    module, _, attribute = location.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if missing == module or module.startswith(f"{missing}."):
            raise ConfigError(f"{what} should be in {location}, which does not exist.") from error
        package = missing.partition(".")[0]
        raise ConfigError(
            f"{what} needs the package '{package}', which is not installed."
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{what} should be {location}, which does not exist.") from error
    return found


def import_plugins(modules: Iterable[str]) -> list[str]:
    """Import modules that register classes; the working directory is searched as well.

    Args:
        modules: dotted module names.

    Returns:
        One text for each module that could not be imported.
    """
    problems = []
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            problems.append(f"cannot import '{module}': {type(error).__name__}: {error}")
    return problems


def own_packages() -> set[str]:
    """The top-level packages whose classes a configuration can build."""
    locations = (place for registry in REGISTRIES.values() for place in registry.locations())
    return {"vilmedic", *(place.partition(":")[0].partition(".")[0] for place in locations)}


MODELS = Registry(
    "model",
    {
        "Classifier": "vilmedic.models.classifier:Classifier",
        "ConVIRT": "vilmedic.models.convirt:ConVIRT",
        "DALLE": "vilmedic.models.dalle:DALLE",
        "GLoRIA": "vilmedic.models.gloria:GLoRIA",
        "SimCLR": "vilmedic.models.simclr:SimCLR",
        "VAE": "vilmedic.models.vae:VAE",
    },
    group="vilmedic.models",
    runtime=("spec", "filled", "read_encoder"),
)
DATASETS = Registry(
    "dataset",
    {
        "ImageDataset": "vilmedic.datasets.image:ImageDataset",
        "TextDataset": "vilmedic.datasets.text:TextDataset",
        "LabelDataset": "vilmedic.datasets.label:LabelDataset",
        "ImSeq": "vilmedic.datasets.pairs:ImSeq",
        "ImSeqLabel": "vilmedic.datasets.pairs:ImSeqLabel",
        "ImSeqShards": "vilmedic.datasets.pairs:ImSeqShards",
        "ImLabel": "vilmedic.datasets.pairs:ImLabel",
    },
    group="vilmedic.datasets",
    runtime=("split", "training", "seed", "run_dir"),
)
BLOCKS = Registry(
    "block",
    {
        "CNN": "vilmedic.blocks.vision:VisionEncoder",
    },
    aliases={"VisualEncoder": "CNN"},
    group="vilmedic.blocks",
    runtime=("spec", "filled", "read_encoder"),
)
LOSSES = Registry(
    "loss",
    {
        "BarlowTwinsLoss": "vilmedic.losses.barlow_twins:BarlowTwinsLoss",
        "ConVIRTLoss": "vilmedic.losses.convirt:ConVIRTLoss",
        "GLoRIALoss": "vilmedic.losses.gloria:GLoRIALoss",
        "InfoNCELoss": "vilmedic.losses.info_nce:InfoNCELoss",
        "NTXentLoss": "vilmedic.losses.ntxent:NTXentLoss",
        "SigLIPLoss": "vilmedic.losses.siglip:SigLIPLoss",
        "VICRegLoss": "vilmedic.losses.vicreg:VICRegLoss",
    },
    group="vilmedic.losses",
)
METRICS = Registry(
    "metric",
    {
        "retrieval": "vilmedic.metrics.retrieval:Retrieval",
        "zero_shot": "vilmedic.metrics.zero_shot:ZeroShot",
        "classification": "vilmedic.metrics.decisions:Classification",
        "linear_probe": "vilmedic.metrics.linear_probe:LinearProbe",
        "knn": "vilmedic.metrics.knn:NearestNeighbours",
        "representation": "vilmedic.metrics.representation:Representation",
        "prompted_findings": "vilmedic.metrics.prompted_findings:PromptedFindings",
        "pointing_game": "vilmedic.metrics.pointing_game:PointingGame",
        "reconstruction": "vilmedic.metrics.reconstruction:Reconstruction",
    },
    group="vilmedic.metrics",
)
POST_PROCESSING = Registry(
    "post_processing",
    {
        "explore_representation": (
            "vilmedic.post_processing.explore_representation:ExploreRepresentation"
        ),
        "plot_attention": "vilmedic.post_processing.plot_attention:PlotAttention",
        "plot_reconstruction": "vilmedic.post_processing.plot_reconstruction:PlotReconstruction",
        "plot_representation": "vilmedic.post_processing.plot_representation:PlotRepresentation",
        "save_representation": "vilmedic.post_processing.save_representation:SaveRepresentation",
    },
    group="vilmedic.post_processing",
)
LOGGERS = Registry(
    "logger",
    {
        "mlflow": "vilmedic.loggers.mlflow:MLflowLogger",
        "tensorboard": "vilmedic.loggers.tensorboard:TensorBoardLogger",
        "wandb": "vilmedic.loggers.wandb:WandbLogger",
    },
    group="vilmedic.loggers",
)
REGISTRIES = {
    registry.kind: registry
    for registry in (MODELS, DATASETS, BLOCKS, LOSSES, METRICS, POST_PROCESSING, LOGGERS)
}
