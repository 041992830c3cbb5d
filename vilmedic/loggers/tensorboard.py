"""TensorBoard logger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
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

    def picture(self, step: int, path: Path) -> None:
        """Show a PNG file that was made at an optimizer step, under its stem."""
        with Image.open(path, formats=("PNG",)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(path.stem, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush what is buffered."""
        self._writer.close()
