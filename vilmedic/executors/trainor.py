"""The training loop, the same for every model."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vilmedic.config.build import build
from vilmedic.datasets.image_tokens import cache_tokens
from vilmedic.datasets.loader import make_loader
from vilmedic.errors import CheckpointError, ConfigError, DataError
from vilmedic.executors import checkpoint
from vilmedic.executors.device import pick_device
from vilmedic.executors.log import LOGGER, MetricsLog
from vilmedic.executors.optimization import Schedule, make_optimizer
from vilmedic.executors.random_state import random_state, restore_random_state, seed_everything
from vilmedic.executors.run_directory import choose_seed, write_provenance
from vilmedic.executors.score import improves
from vilmedic.executors.training_step import StepResult, TrainingStep
from vilmedic.executors.validator import Validator
from vilmedic.registry import DATASETS, MODELS

if TYPE_CHECKING:
    from vilmedic.config.load import Config


@dataclass
class Progress:
    """How far a run has come.

    Args:
        epoch: the next epoch to train, counted from 0.
        step: optimizer steps taken or skipped.
        best: the best score so far.
        stale: evaluations in a row without improvement.
        bad_steps: steps skipped because the loss or a gradient was not a number.
        bad_in_a_row: how many of these came last, without a good step between.
    """

    epoch: int = 0
    step: int = 0
    best: float | None = None
    stale: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0


class Trainor:
    """Trains a model as a configuration says.

    Args:
        config: the checked configuration; with `ckpt` the run of that checkpoint continues.

    Raises:
        ConfigError: a value fits the schema but not the data or this machine.
        DataError: the training or a validation split cannot be used.
        CheckpointError: `ckpt` cannot be continued with this configuration.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.section = config.trainor
        self.run_dir = config.run_dir
        self.device = pick_device(self.section.device)
        state, self.seed = self._seed_and_state()
        seed_everything(self.seed)
        self.run_dir.mkdir(parents=True, exist_ok=True)

        self.data = build(
            DATASETS,
            config.dataset,
            where="dataset",
            split="train",
            training=True,
            seed=self.seed,
            run_dir=self.run_dir,
        )
        self.model = build(MODELS, config.model, where="model", spec=self.data.spec)
        self.model.to(self.device)
        cache_tokens(self.data, self.model, self.device, self.section.num_workers)
        self._check_batch_size()
        self.loader = make_loader(
            self.data,
            batch_size=self.section.batch_size,
            training=True,
            seed=self.seed,
            drop_last=self.model.cross_sample,
            num_workers=self.section.num_workers,
        )
        self.steps_per_epoch = math.ceil(len(self.loader) / self.section.grad_accu)
        self.optimizer = make_optimizer(self.model, self.section)
        total_steps = self.steps_per_epoch * self.section.epochs
        self.schedule = Schedule(self.optimizer, self.section, total_steps)
        self.validator = Validator(config, seed=self.seed, device=self.device)
        self.step = TrainingStep(
            self.model, self.data.prepare, self.optimizer, self.section, self.device
        )
        self.progress = Progress()
        if state is not None:
            self._restore(*state)

    def start(self) -> None:
        """Train until the last epoch or the early stop, then say where the best checkpoint is."""
        write_provenance(self.config, self.run_dir, self.seed, str(self.device))
        self.log = MetricsLog(self.run_dir, self.seed, self.progress.step)
        LOGGER.info(
            "Run %s, seed %d, on %s: %d training samples, %d steps an epoch, %s parameters",
            self.run_dir,
            self.seed,
            self.device,
            len(self.data),
            self.steps_per_epoch,
            f"{sum(p.numel() for p in self.step.parameters):,}",
        )
        try:
            while self.progress.epoch < self.section.epochs and not self._stopped_early():
                self._epoch(self.progress.epoch)
        except KeyboardInterrupt:
            if (self.run_dir / checkpoint.last_name(self.seed)).exists():
                last = checkpoint.last_name(self.seed)
                LOGGER.warning("Interrupted; ckpt=%s continues after the last whole epoch", last)
            raise
        finally:
            self.log.close()
        self._report_end()

    def _epoch(self, epoch: int) -> None:
        """Train on every batch once, evaluate, and save."""
        train_loss = self._train_on_all_batches(epoch)
        self.schedule.after_epoch()
        self.progress.epoch = epoch + 1
        improved = False
        if epoch >= self.section.eval_start:
            pictures = self.run_dir / "pictures" / f"{self.seed}_{self.progress.step}"
            scores = self.validator.score(self.model, pictures)
            self.log.pictures(self.progress.step, pictures)
            self.log.metrics(
                self.progress.step, {"epoch": epoch, "train_loss": train_loss, **scores}
            )
            improved = self._judge(epoch, scores)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
            mark = "  (best so far)" if improved else ""
            LOGGER.info("Epoch %d  train_loss %.4g  %s%s", epoch, train_loss, shown, mark)
        else:
            self.log.metrics(self.progress.step, {"epoch": epoch, "train_loss": train_loss})
            LOGGER.info("Epoch %d  train_loss %.4g", epoch, train_loss)
        self._save(epoch, improved)

    def _train_on_all_batches(self, epoch: int) -> float:
        """One pass over the training split; returns the mean loss of the steps that counted."""
        self.model.train()
        self.loader.set_epoch(epoch)
        losses: list[float] = []
        started, samples = time.perf_counter(), 0
        bar = tqdm(self._groups(), total=self.steps_per_epoch, desc=f"Epoch {epoch}", disable=None)
        for group in bar:
            lr = self.optimizer.param_groups[0]["lr"]
            scheduled = self.model.schedule(self.progress.step + 1)
            result = self.step(group)
            self.progress.step += 1
            self._count_bad(result, group)
            if not result.taken:
                continue
            self.schedule.after_step()
            losses.append(result.loss)
            samples += result.samples
            rate = samples / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{result.loss:.4g}", lr=f"{lr:.2e}", samples_s=f"{rate:.1f}")
            if self.progress.step % self.section.log_every == 0:
                numbers = {"epoch": epoch, "loss": result.loss, "lr": lr}
                numbers["grad_norm"] = result.grad_norm
                self.log.metrics(self.progress.step, {**numbers, **scheduled})
                self.log.timing(self.progress.step, {"samples_per_second": round(rate, 2)})
        self.data.report_skipped()
        return sum(losses) / len(losses) if losses else math.nan

    def _groups(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of an epoch in groups of `grad_accu`, the last one possibly shorter."""
        batches = iter(self.loader)
        smallest = 2 if self.model.cross_sample else 1
        usable = (batch for batch in batches if len(batch["index"]) >= smallest)
        while group := list(itertools.islice(usable, self.section.grad_accu)):
            yield group

    def _count_bad(self, result: StepResult, group: list[dict[str, Any]]) -> None:
        """Count a skipped step; stop the run after too many in a row."""
        if result.taken:
            self.progress.bad_in_a_row = 0
            return
        self.progress.bad_steps += 1
        self.progress.bad_in_a_row += 1
        what = f"loss {result.loss}, gradient norm {result.grad_norm}"
        LOGGER.warning("Step %d skipped: %s", self.progress.step, what)
        if self.progress.bad_in_a_row >= self.section.max_bad_steps:
            lines = [line for batch in group for line in self.data.lines(batch["index"].tolist())]
            raise DataError(
                f"{self.progress.bad_in_a_row} steps in a row were skipped ({what}; "
                f"trainor.max_bad_steps={self.section.max_bad_steps}). A smaller learning rate, "
                "trainor.clip_grad_norm or trainor.precision=fp32 may help. Samples of the last "
                "step:\n  " + "\n  ".join(lines)
            )

    def _judge(self, epoch: int, scores: dict[str, float]) -> bool:
        """Step a plateau schedule and the early stop; returns whether the score is the best."""
        metric = self.section.early_stop_metric
        if metric not in scores:
            raise ConfigError(
                f"trainor.early_stop_metric: given '{metric}', but an evaluation gives "
                f"{', '.join(scores) or 'no score'}."
            )
        score = scores[metric]
        if epoch >= self.section.decay_metric_start:
            self.schedule.after_evaluation(score)
        if epoch < self.section.early_stop_start:
            return False
        if improves(score, self.progress.best, metric):
            self.progress.best, self.progress.stale = score, 0
            return True
        self.progress.stale += 1
        return False

    def _stopped_early(self) -> bool:
        patience = self.section.early_stop
        return patience is not None and self.progress.stale >= patience

    def _save(self, epoch: int, improved: bool) -> None:
        """Write the newest state, and on improvement the best one, keeping `keep` of them."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random_state(),
            "progress": asdict(self.progress),
            "metric": self.section.early_stop_metric,
            "score": self.progress.best if improved else None,
            "epoch": epoch,
            "seed": self.seed,
            "config": self.config.data,
        }
        if improved:
            assert self.progress.best is not None
            name = checkpoint.best_name(self.progress.best, epoch, self.seed)
            checkpoint.save_checkpoint(state, self.run_dir / name)
            ranked = checkpoint.list_best(self.run_dir, self.section.early_stop_metric)
            for extra in [best for best in ranked if best.seed == self.seed][self.section.keep :]:
                extra.path.unlink()
        checkpoint.save_checkpoint(state, self.run_dir / checkpoint.last_name(self.seed))

    def _seed_and_state(self) -> tuple[tuple[Any, Any] | None, int]:
        """The checkpoint to continue, if any, and the seed: its own, the given or a drawn one."""
        if self.config.ckpt is None:
            return None, choose_seed(self.run_dir, self.section.seed)
        path = checkpoint.locate(self.config.ckpt, self.run_dir)
        state = checkpoint.load_checkpoint(path)
        if "progress" not in state:
            raise CheckpointError(f"{path}: holds weights only, so training cannot continue.")
        if self.section.seed not in (None, state["seed"]):
            raise ConfigError(
                f"trainor.seed: given {self.section.seed}, but {path} continues a run with seed "
                f"{state['seed']}. Leave the key out."
            )
        return (path, state), state["seed"]

    def _restore(self, path: Any, state: dict[str, Any]) -> None:
        """Continue exactly where the checkpoint was written."""
        checkpoint.load_weights(self.model, state, path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: optimizer state does not fit: {error}") from error
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])
        restore_random_state(state["random"])
        LOGGER.info("Continuing %s after epoch %d", path, state["epoch"])

    def _check_batch_size(self) -> None:
        """A loss that compares samples needs full batches of at least two."""
        if not self.model.cross_sample:
            return
        if self.section.batch_size < 2:
            raise ConfigError(
                f"trainor.batch_size: given {self.section.batch_size}, but this model compares the "
                "samples of a batch and needs at least 2."
            )
        if len(self.data) < self.section.batch_size:
            raise DataError(
                f"The training split has {len(self.data)} samples, fewer than "
                f"trainor.batch_size={self.section.batch_size}; this model trains on full batches "
                f"only. Allowed: 2 to {len(self.data)}."
            )

    def _report_end(self) -> None:
        """Say why the run ended and where its best checkpoint is."""
        done = self.progress.epoch
        reason = "early stop" if self._stopped_early() else "last epoch"
        if self.progress.bad_steps:
            LOGGER.warning("%d steps were skipped in this run", self.progress.bad_steps)
        ranked = checkpoint.list_best(self.run_dir, self.section.early_stop_metric)
        own = [best for best in ranked if best.seed == self.seed]
        best = f"; best checkpoint {own[0].path}" if own else ""
        LOGGER.info("Finished after %d epochs (%s)%s", done, reason, best)
