"""What the two commands do once their configuration is checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilmedic.device import pick_device
from vilmedic.distributed import processes
from vilmedic.distributed.launch import is_main_process
from vilmedic.evaluation.ensemblor import Ensemblor
from vilmedic.log import LOGGER, start_console
from vilmedic.report.left_out import LeftOut, is_run
from vilmedic.training.trainor import Trainor

if TYPE_CHECKING:
    from vilmedic.config.load import Config


def run_training(config: Config) -> Trainor:
    """Train a model; returns what trained it."""
    _announce(config)
    with processes.process_group(pick_device(config.trainor.device)):
        trainor = Trainor(config)
        try:
            trainor.start()
        finally:
            # a run that was interrupted or failed is the one whose curves are looked at first
            write_pages(config.run_dir)
        return trainor


def run_ensemble(config: Config) -> dict[str, dict[str, Any]]:
    """Evaluate trained checkpoints; returns the results of each split."""
    _announce(config)
    with processes.process_group(pick_device(config.ensemblor.device)):
        ensemblor = Ensemblor(config)
        try:
            return ensemblor.start()
        finally:
            if config.ensemblor.report:
                write_pages(config.run_dir)


def write_pages(run_dir: Path) -> None:
    """Draw the curves and make the report of a run, if the directory is one.

    Images may be generated from a checkpoint that lies in any directory. What goes wrong here is a
    warning: the run itself is done, or has failed for another reason.
    """
    if not is_main_process() or not is_run(run_dir):
        return
    # imported here: only the end of a run needs them
    from vilmedic.report.draw_curves import write_curves
    from vilmedic.report.page import write_report

    left_out = LeftOut(run_dir)
    for write in (write_curves, write_report):
        try:
            path = write(run_dir, left_out)
        except Exception as error:
            LOGGER.warning("%s failed: %s", write.__name__, error)
        else:
            if path is not None:
                LOGGER.info("Written: %s", path)


def _announce(config: Config) -> None:
    """Open the console and say which keys of lower layers lost their meaning."""
    start_console()
    for note in config.notes:
        LOGGER.info(note)
