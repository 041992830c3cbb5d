"""TensorBoard event files."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from vilmedic.loggers.contract import Logger, Run


class TensorBoardLogger(Logger):
    """Event files in `<run directory>/tensorboard/<seed>`, for `tensorboard --logdir ckpt`."""

    def open(self, run: Run) -> None:
        """Begin; on resume what lies beyond the checkpoint is hidden."""
        purge = run.step + 1 if run.step else None
        self._writer = SummaryWriter(
            str(run.run_dir / "tensorboard" / str(run.seed)), purge_step=purge
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of an optimizer step."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush what is buffered."""
        self._writer.close()
