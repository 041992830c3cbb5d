"""Finished runs of every system, trained once per test session."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

import vilmedic
from tests.crash.systems import System
from vilmedic.phantom.write import Plan, build

ROOT = Path(__file__).parents[1]
SMALL = (
    "trainor.epochs=6",  # enough for the running statistics of batch normalisation
    "trainor.grad_accu=1",
    "trainor.num_workers=0",
    "trainor.save_every=null",
    "trainor.keep=1",
    "trainor.early_stop_metric=validation_loss",
)
EVALUATION = (
    "ensemblor.batch_size=4",
    "ensemblor.num_workers=0",
    "ensemblor.precision=fp32",
    "ensemblor.device=cpu",
    "ensemblor.splits=[test]",
    "ensemblor.baselines=[]",
    "ensemblor.report=False",
)


@dataclass
class Runs:
    """Trains a system when its run is first used.

    Args:
        data: the phantom data set: 21, 9 and 10 samples of 48 x 48 pixels.
        ckpt_dir: the folder of the runs.
    """

    data: Path
    ckpt_dir: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def __call__(self, system: System) -> Path:
        """The directory of the run."""
        if system.name not in self._made:
            config, *words = self.words(system)
            run = vilmedic.train(config, *words, *SMALL)
            self._made[system.name] = run.directory
        return self._made[system.name]

    def words(self, system: System) -> list[str]:
        """The configuration of a system, and overrides for its size and folders."""
        config, *rest = system.arguments(self.data)
        return [str(ROOT / config), *rest, f"ckpt_dir={self.ckpt_dir}", f"name={system.name}"]

    def images(self, split: str = "test") -> list[str]:
        """The paths of the images of a split, in the order of its lines."""
        lines = (self.data / f"{split}.image.tok").read_text().split()
        return [str(self.data / "images" / line) for line in lines]

    def reports(self, split: str = "test") -> list[str]:
        """The reports of a split."""
        return (self.data / f"{split}.impression.tok").read_text().splitlines()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Finished runs of all systems."""
    folder = tmp_path_factory.mktemp("trained")
    build(folder / "data", Plan(train=21, validate=9, test=10, size=48), force=False, workers=1)
    return Runs(folder / "data", folder / "ckpt")
