"""Weights & Biases logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import wandb

from vilmedic.errors import ConfigError
from vilmedic.loggers.contract import Logger, Run, remembered


class WandbLogger(Logger):
    """A run of Weights & Biases, whose files are in `<run directory>/wandb`.

    Without a network `WANDB_MODE=offline`, or `mode: offline`, keeps everything there, for
    `wandb sync` later.

    Args:
        project: the project that the run belongs to.
        entity: the user or team; null takes the default of the account.
        group: name under which runs are shown together; null takes the run's name, so that its
            seeds are.
        tags: words to find the run by.
        mode: online, offline or disabled; null takes WANDB_MODE, or else online.
    """

    def __init__(
        self,
        *,
        project: str = "vilmedic",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] = [],  # noqa: B006  (never changed)
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        self.project, self.entity, self.group = project, entity, group
        self.tags, self.mode = list(tags), mode

    def open(self, run: Run) -> None:
        """Start or resume the run of the same seed.

        Raises:
            ConfigError: there is no account on this machine, say.
        """
        path = remembered(run, "wandb")
        known = path.read_text(encoding="utf-8").strip() if run.step and path.exists() else None
        try:
            self._run: Any = wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group or run.name,
                tags=self.tags,
                name=run.title,
                id=known,
                resume="allow" if known else None,
                mode=self.mode,
                dir=str(run.run_dir),
                config=run.config,
                settings=wandb.Settings(console="off"),
            )
        except Exception as error:
            raise ConfigError(
                f"trainor.loggers: wandb cannot start: {error}. Without an account or a network "
                "set WANDB_MODE=offline."
            ) from error
        path.write_text(f"{self._run.id}\n", encoding="utf-8")
        # The step is a number like any other: its own counter refuses steps after a resume.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of an optimizer step."""
        self._run.log({"step": step, **values})

    def figure(self, step: int, path: Path) -> None:
        """Show a PNG file that was made at an optimizer step, under its stem."""
        self._run.log({"step": step, path.stem: wandb.Image(str(path))})

    def close(self) -> None:
        """Flush what is buffered."""
        self._run.finish()
