"""What the two commands do once their configuration is checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vilmedic import distributed
from vilmedic.executors.device import pick_device
from vilmedic.executors.ensemblor import Ensemblor
from vilmedic.executors.log import LOGGER, start_console
from vilmedic.executors.trainor import Trainor

if TYPE_CHECKING:
    from vilmedic.config.load import Config


def run_training(config: Config) -> None:
    """Train a model."""
    _announce(config)
    with distributed.process_group(pick_device(config.trainor.device)):
        Trainor(config).start()


def run_ensemble(config: Config) -> None:
    """Evaluate trained checkpoints."""
    _announce(config)
    with distributed.process_group(pick_device(config.ensemblor.device)):
        Ensemblor(config).start()


def _announce(config: Config) -> None:
    """Open the console and say which keys of lower layers lost their meaning."""
    start_console()
    for note in config.notes:
        LOGGER.info(note)
