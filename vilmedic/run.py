"""Functions to load, train and evaluate, used by the commands and from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from vilmedic.checkpoints import checkpoint
from vilmedic.config.load import Config
from vilmedic.config.load import load as load_config
from vilmedic.device import pick_device
from vilmedic.distributed import processes
from vilmedic.distributed.launch import is_main_process
from vilmedic.errors import CheckpointError, ConfigError, before_training, nearest
from vilmedic.log import LOGGER, Progress, start_console

# Training, evaluation, loading and reports are imported by the functions that need them.
if TYPE_CHECKING:
    from vilmedic.trained_model import TrainedModel
    from vilmedic.training.trainor import Trainor


def load(
    source: str | Path,
    *,
    ckpt: str | None = None,
    config: str | Path | None = None,
    ema: bool = False,
    device: str | torch.device | None = None,
) -> TrainedModel:
    """A trained model, ready to be used.

    Args:
        source: a run directory, whose best checkpoint is taken; a checkpoint; a folder that
            `export` wrote, or the name of a repository that holds one, `user/name`.
        ckpt: a checkpoint of the run directory instead of the best: its file name, or `last`.
        config: the configuration of a checkpoint that holds none, as those of dalle-pytorch, or
            one whose images were transformed by Python code, as some of the original vilmedic; its
            `dataset.seq.tokenizer` says where the vocabulary is.
        ema: take the averaged weights that `trainor.ema` kept.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; None takes a CUDA GPU when there is one.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it lacks what a model needs.
        ConfigError: the configuration or the device cannot be used.
    """
    from vilmedic.models.from_checkpoint import from_checkpoint
    from vilmedic.trained_model import TrainedModel

    if not isinstance(source, str | Path):
        raise CheckpointError(f"load: given {source!r}, allowed: a run directory or a checkpoint.")
    path = find_checkpoint(Path(source), None if ckpt is None else str(ckpt))
    given = None if config is None else _config(config, (), {}).data
    return TrainedModel(from_checkpoint(path, ema=ema, config=given), device=device)


@dataclass(frozen=True)
class Run:
    """A run that was trained.

    Args:
        directory: its directory.
        seed: its seed.
        best: its best checkpoint; None when none has a score.
        last: its newest state, from which `ckpt=auto` continues.
    """

    directory: Path
    seed: int
    best: Path | None
    last: Path

    def load(self, **options: Any) -> TrainedModel:
        """The model of the best checkpoint, or of the newest state without one; see `load`."""
        return load(self.best or self.last, **options)


def train(config: str | Path, *overrides: str, **values: Any) -> Run:
    """Train a model as `bin/train.py` does, with the same checks; messages come as exceptions.

    Args:
        config: the YAML file.
        overrides: words of the command line, such as `trainor.batch_size=32` or `~trainor.ema`.
        values: top-level keys, such as `name="x"` or `ckpt="auto"`.

    Raises:
        VilmedicError: user errors, for which the command exits with status 2.
        Interrupted: a signal ended the run; its state is saved, unless training had not begun.
    """
    trainor = run_training(_config(config, overrides, values))
    best = trainor.saver.best()
    return Run(trainor.run_dir, trainor.seed, best[0].path if best else None, trainor.saver.last)


def evaluate(config: str | Path, *overrides: str, **values: Any) -> dict[str, dict[str, Any]]:
    """Evaluate a run as `bin/ensemble.py` does.

    Args:
        config: see `train`, as for the others.
        overrides: see `train`.
        values: see `train`.

    Returns:
        The results of each split, as they are written to `results_<split>.json`.
    """
    return run_ensemble(_config(config, overrides, values))


def run_training(config: Config) -> Trainor:
    """Train a model; returns the trainor."""
    with before_training():
        from vilmedic.training.trainor import Trainor

        _announce(config)
        device = pick_device(config.trainor.device)
    with processes.process_group(device):
        trainor = Trainor(config)
        try:
            trainor.start()
        finally:
            # also after a failure, when the curves are needed most
            write_pages(config.run_dir)
        return trainor


def plan_training(config: Config, *, card: str, samples: int | None = None) -> str:
    """Memory and time estimate of a training, as text.

    Args:
        config: the checked configuration.
        card: the GPU, a name of `vilmedic.training.cards.CARDS`.
        samples: of the training split; None takes the lines of its file, where it is there.

    Raises:
        ConfigError: there is no such GPU, or the model cannot be built.
    """
    from vilmedic.training.cards import CARDS
    from vilmedic.training.plan import count_samples, make_plan

    if card not in CARDS:
        raise ConfigError(
            f"--card: given '{card}', allowed: {', '.join(CARDS)}.{nearest(card, list(CARDS))}"
        )
    with Progress("Planning"):
        return make_plan(config, card=card, samples=samples or count_samples(config)).text()


def run_ensemble(config: Config, embeddings: Path | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate trained checkpoints, or embeddings of another program.

    Args:
        config: the checked configuration.
        embeddings: the file of these; None evaluates checkpoints.

    Returns:
        The results of each split.
    """
    from vilmedic.evaluation.ensemblor import Ensemblor

    _announce(config)
    with processes.process_group(pick_device(config.ensemblor.device)):
        if embeddings is None:
            ensemblor = Ensemblor(config, _generate)
        else:
            from vilmedic.evaluation.given import GivenEnsemblor

            ensemblor = GivenEnsemblor(config, embeddings)
        try:
            return ensemblor.start()
        finally:
            if config.ensemblor.report:
                write_pages(config.run_dir)
            ensemblor.print_tables()


def write_pages(run_dir: Path) -> None:
    """Draw the curves and make the report page, if the directory is a run.

    Images may be generated from a checkpoint in any directory. Errors here are logged as warnings:
    the run itself is done, or has failed for another reason.
    """
    from vilmedic.checkpoints.left_out import LeftOut, is_run

    if not is_main_process() or not is_run(run_dir):
        return
    from vilmedic.report.curves import write_curves
    from vilmedic.report.page import write_report

    left_out = LeftOut(run_dir)
    for write in (write_curves, write_report):
        try:
            with Progress("Curves and report page"):
                path = write(run_dir, left_out)
        except Exception as error:
            LOGGER.warning("%s failed: %s", write.__name__, error)
        else:
            if path is not None:
                LOGGER.info("Written: %s", path)


def _generate(*arguments: Any, **options: Any) -> list[Path]:
    from vilmedic.generation.generate import generate_from_checkpoints

    return generate_from_checkpoints(*arguments, **options)


def _announce(config: Config) -> None:
    """Start console logging and log the keys of lower layers that were dropped."""
    start_console()
    for note in config.notes:
        LOGGER.info(note)


def _config(path: str | Path, overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
    if not isinstance(path, str | Path):
        raise ConfigError(f"config: given {path!r}, allowed: a YAML file.")
    if wrong := [word for word in overrides if not isinstance(word, str)]:
        raise ConfigError(f"given {word!r}, allowed: words such as 'key=value'." for word in wrong)
    nested = [name for name, value in values.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"{name}: is a section; give its keys as words, such as '{name}.key=value'."
            for name in nested
        )
    words = [f"{name}={_word(value)}" for name, value in values.items()]
    return load_config(path, [*overrides, *words])


def _word(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, str | Path):
        return str(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def find_checkpoint(source: Path, ckpt: str | None) -> Path:
    """The checkpoint of a run directory, or the one that is named; an export is one itself.

    Raises:
        CheckpointError: there is none.
    """
    from vilmedic.manifest import is_export, is_repository

    if not os.path.lexists(source) and is_repository(str(source)):
        from vilmedic.checkpoints.repository import fetch_export

        source = fetch_export(str(source))
    if is_export(source):
        if ckpt is not None:
            raise CheckpointError(f"{source}: is an export, so ckpt='{ckpt}' has no meaning.")
        return source
    # not Path.is_dir, which raises for what cannot be a name
    if not os.path.isdir(source):
        if not os.path.exists(source):
            raise CheckpointError(f"{source}: there is no such run directory or checkpoint.")
        if ckpt is not None:
            raise CheckpointError(f"{source}: is a file, so ckpt='{ckpt}' has no meaning.")
        return source
    if ckpt is not None:
        return checkpoint.locate(ckpt, source)
    files = sorted(source.glob("*.pth"))
    if len(files) == 1:
        return files[0]  # such as a folder of the original vilmedic's model zoo
    return checkpoint.find_checkpoints(source, "best-1", remedy="Name one with ckpt=")[0]
