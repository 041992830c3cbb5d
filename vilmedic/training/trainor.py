"""The training loop, the same for every model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vilmedic.blocks.pretrained import Filled
from vilmedic.checkpoints.checkpoint import improves
from vilmedic.checkpoints.run_directory import FIGURES, write_provenance
from vilmedic.config import build, build_calls, fetch
from vilmedic.config.transformers_fields import HF, TIMM, backbone_of
from vilmedic.datasets.loader import LostWorker, features_ready, make_loader, tokens_ready
from vilmedic.device import (
    float32_products,
    pick_device,
    pick_precision,
    seed_everything,
    uses_tf32,
)
from vilmedic.distributed import processes
from vilmedic.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    before_training,
)
from vilmedic.log import LOGGER, counted
from vilmedic.loggers.contract import Run
from vilmedic.registry import DATASETS, LOGGERS, MODELS
from vilmedic.training.metrics_log import MetricsLog, NoLog
from vilmedic.training.monitor import StepProfiler, StepWatch
from vilmedic.training.optimization import common_rate, described_groups, make_optimizer
from vilmedic.training.parallel import (
    Group,
    check_batch_size,
    check_validation_batches,
    frozen_cache_gib,
    groups,
    log_batch_facts,
    prepare_network,
    seed_this_process,
)
from vilmedic.training.resume import Start, claim_start
from vilmedic.training.saver import Interruption, Saver
from vilmedic.training.state import TrainState, restore_weights
from vilmedic.training.step import TrainingStep
from vilmedic.training.validator import Validator

if TYPE_CHECKING:
    from vilmedic.config.load import Config


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
        self.config, self.section, self.run_dir = config, config.trainor, config.run_dir
        self.loggers = build_calls(LOGGERS, config.calls("trainor", "loggers"))
        self.device = pick_device(self.section.device)
        start, self.lock = claim_start(config)
        try:
            with self._products(), before_training():
                self._prepare(start)
        except BaseException:
            self._unlock()
            raise

    def _prepare(self, start: Start) -> None:
        """Create the parts of the run in their state at the start."""
        config = self.config
        began = start.saved.get("trainor")
        kept = began.get("precision") if isinstance(began, dict) else None
        precision = pick_precision(self.section.precision, self.device, kept)
        config.settle("trainor", "precision", precision)
        self.seed, self.started_from = start.seed, start.path
        seed_everything(self.seed)

        if start.state is None:  # known before data is read and a vocabulary built
            with processes.main_first():
                fetch(MODELS, config.model)
        if backbone_of(config.data["model"]).startswith((HF, TIMM)):
            from vilmedic.training.published_pixels import with_published_pixels

            with processes.main_first():
                config = self.config = with_published_pixels(config, start.state)
        with processes.main_first():
            self.data = build(
                DATASETS,
                config.dataset,
                split="train",
                training=True,
                seed=self.seed,
                run_dir=self.run_dir,
            )
        saved = None if start.state is None else start.state.get("networks") or {}
        filled = None if saved is None else Filled(saved, adapters=True)
        self.model = build(
            MODELS, config.model, spec=self.data.spec, filled=filled, read_encoder=_read_encoder
        )
        restore_weights(self.model, start, config.data)
        check_batch_size(self.model, len(self.data), self.section)
        check_validation_batches(self.model, config.validator)
        prepare_network(self.model, self.section, self.device)
        tokens_ready(self.data, self.model, self.device, self.section.num_workers)
        features_ready(
            self.data,
            self.model,
            self.device,
            precision=self.section.precision,
            gib=frozen_cache_gib(self.section),
            folder=self.run_dir,
            num_workers=self.section.num_workers,
        )
        self.loader = make_loader(
            self.data,
            batch_size=self.section.batch_size,
            training=True,
            seed=self.seed,
            drop_last=self.model.cross_sample,
            num_workers=self.section.num_workers,
        )
        self.validator = Validator(config, seed=self.seed, device=self.device)
        every = config.validator.every
        number, by_epochs = int(every.rstrip("epochs")), not every.isdigit()
        self._every_epochs = number if by_epochs else None
        self._every_steps = None if by_epochs else number
        metric = self.section.early_stop_metric
        better = self.validator.better(metric, ema=self.section.ema is not None)
        optimizer = make_optimizer(self.model, self.section)
        self.step = TrainingStep(
            self.model, self.data.prepare, optimizer, self.section, self.device
        )
        self.state = TrainState(
            config,
            start,
            self.step,
            spec=self.data.spec,
            batches=len(self.loader),
            better=better,
        )
        self.started_at = self.state.progress.step
        seed_this_process(self.seed)
        self.state.restore(start)
        if self.state.ema is not None and not self.state.ema.has_frozen_weights():
            self.validator.compute_features()
        self.log: MetricsLog | NoLog = NoLog()  # until the run starts
        self.saver = Saver(
            self.run_dir,
            self.seed,
            self.section,
            better,
            before=lambda: self.log.flush(),
            started_from=self.started_from,
        )
        self.watch = StepWatch(
            self.section, self.model, self.data, self.state.tally, self.state.epochs
        )
        traced = self.section.profile if processes.is_main() else None
        self.profiler = StepProfiler(traced, self.run_dir, self.seed, self.device)
        self.interruption = Interruption()

    def start(self) -> None:
        """Train until the last epoch or the early stop, then log the best checkpoint.

        Raises:
            Interrupted: a signal ended the run after its state was saved.
            LostWorker: a loading process was killed; the state was saved.
            CheckpointError: training finished, but its last state is not on the disk.
        """
        try:
            with self._products():
                self._start()
        finally:
            self._unlock()

    def _products(self) -> AbstractContextManager[None]:
        """How float32 products are computed in this run."""
        return float32_products(self.device, tf32=self.section.tf32)

    def _unlock(self) -> None:
        """Release the lock, so that other processes can train this run."""
        if self.lock is not None:
            self.lock.release()

    def _start(self) -> None:
        with before_training():
            self._begin()
        progress = self.state.progress
        try:
            with self.interruption, self.profiler:
                while not self._finished():
                    self._epoch(progress.epoch)
                self._make_sure_of_the_last_state()
        except LostWorker as error:
            raise LostWorker(f"{error} {self._saved_after_fault()}") from None
        finally:
            self.loader.close()
            self.watch.close()
            self.log.close()
        self._report_end()

    def _begin(self) -> None:
        """Check the evaluations, write and log what the run is, and open its logs."""
        self.validator.check(self.model)
        progress = self.state.progress
        tf32 = uses_tf32(self.device, self.section.tf32)
        if processes.is_main():
            write_provenance(self.config, self.run_dir, self.seed, str(self.device), tf32=tf32)
        log_batch_facts(self.model, self.section, len(self.loader))
        LOGGER.info(
            "Run %s, seed %d, on %s, %s%s: %s, %s per epoch, %s",
            self.run_dir,
            self.seed,
            self.device,
            self.section.precision,
            " with TF32 products" if tf32 else "",
            counted(len(self.data), "training sample"),
            counted(self.state.steps_per_epoch, "step"),
            self._parameters(),
        )
        for line in described_groups(self.state.optimizer):
            LOGGER.info(line)
        if processes.is_main():
            self.log = self.watch.log = self._open_log()
        self.saver.set_aside(progress)
        if progress.best is not None:
            # What was set aside may have replaced it: the next has to beat what is on the disk.
            progress.best = self.saver.best_score()

    def _parameters(self) -> str:
        """Return the number of parameters, and of trainable ones if some are frozen."""
        trained = sum(p.numel() for p in self.step.parameters)
        every = sum(p.numel() for p in self.model.parameters())
        of = "" if trained == every else f"{trained:,} trained of "
        return f"{of}{every:,} parameters"

    def _open_log(self) -> MetricsLog:
        """Open the files of the run's numbers and the loggers."""
        step = self.state.progress.step
        run = Run(self.config.name, self.run_dir, self.seed, step, self.config.data)
        for _, logger in self.loggers:
            logger.open(run)
        return MetricsLog(self.run_dir, self.seed, step, self.state.progress.lines, self.loggers)

    def _finished(self) -> bool:
        """Return whether nothing is left to train or evaluate."""
        progress = self.state.progress
        if self._stopped_early() or self.section.steps is None:
            return self._stopped_early() or progress.epoch >= self.section.epochs
        return self._took_all_steps() and progress.evaluated == progress.step

    def _took_all_steps(self) -> bool:
        """Return whether the run goes by steps, and the last one was taken."""
        steps = self.section.steps
        return steps is not None and self.state.progress.step >= steps

    def _epoch(self, epoch: int) -> None:
        """Train on every batch once, or to the last step; evaluate when it is time, and save."""
        progress = self.state.progress
        before = (progress.step, progress.batch)
        self._train_on_all_batches(epoch)
        endless = self.section.steps is not None and not self._took_all_steps()
        if endless and before == (progress.step, 0):
            raise DataError("trainor.steps: an epoch of the training split holds no batch.")
        ended = progress.batch >= len(self.loader)
        last = ended and self.section.steps is None and epoch + 1 >= self.section.epochs
        last = (last or self._took_all_steps()) and progress.evaluated != progress.step
        due = self._every_epochs is not None and (epoch + 1) % self._every_epochs == 0
        if last or (ended and due):
            self._validate(epoch, ended=ended)
        elif ended:
            self._end_epoch(epoch)
            if self._save_due:
                self._save()

    def _end_epoch(self, epoch: int) -> None:
        """Start the next epoch."""
        self.state.schedule.after_epoch()
        self.state.progress.epoch, self.state.progress.batch = epoch + 1, 0

    def _validate(self, epoch: int, *, ended: bool) -> None:
        """Evaluate, score and save.

        Args:
            epoch: the epoch that is being trained.
            ended: whether that was its last step.
        """
        state, progress = self.state, self.state.progress
        scores = self._evaluate(epoch)
        # Signals wait from here to the save, so that a checkpoint has all of this or nothing.
        if ended:
            self._end_epoch(epoch)
        progress.evaluated = progress.step
        improved = self._rank(epoch, scores)
        numbers = {"train_loss": state.tally.mean_loss(), **scores}
        self.log.metrics(progress.step, {"epoch": epoch, **numbers})
        shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        when = f"Epoch {epoch + 1}"  # people count from 1, keys and metrics.jsonl from 0
        if not self._every_epochs:
            when += f", step {progress.step}"
        LOGGER.info("%s  %s%s", when, shown, "  (best so far)" if improved else "")
        state.tally.start_epoch()
        self._save(improved)

    def _due_after_step(self) -> bool:
        """Return whether an evaluation within an epoch is due."""
        progress = self.state.progress
        if self._every_steps is None or progress.evaluated == progress.step:
            return False
        return progress.step % self._every_steps == 0

    def _train_on_all_batches(self, epoch: int) -> None:
        """Train one epoch, or the rest of one, up to the end of the run."""
        state, progress = self.state, self.state.progress
        self._save_due = False
        if self._due_after_step():
            self._validate(epoch, ended=False)  # the run was stopped in it
        if self._took_all_steps() or self._stopped_early():
            return
        self.model.train()
        self.loader.set_epoch(epoch, progress.batch)
        done = progress.batch // self.section.grad_accu
        self.watch.start_epoch(epoch, state.steps_per_epoch, done)
        smallest = 2 if self.model.cross_sample else 1
        accu = self.section.grad_accu
        found = groups(self.loader, self.data, accu, smallest, self._signals)
        for group in self.watch.waiting_for(found):
            self._train_on(group)
            if self._took_all_steps() or self._stopped_early():
                break
        else:
            progress.batch = len(self.loader)
        self.watch.end_epoch()

    def _train_on(self, group: Group) -> None:
        """Take a step, then log, evaluate and save if due."""
        state, progress = self.state, self.state.progress
        stop, due = group.signals
        lr = common_rate(state.optimizer)
        scheduled = self.model.schedule(progress.step + 1)
        with self.watch.observing(progress.step + 1):
            result = self.step(group.batches, group.parts)
        progress.step += 1
        progress.batch = self.loader.position
        state.schedule.after_step()
        state.tally.add(result)
        if state.ema is not None:
            state.ema.update(progress.step, result.taken)
        self.watch.after_step(progress.step, result, {"lr": lr, **scheduled}, group)
        self.profiler.after_step()
        if stop or self._told_to_stop():
            raise self._stop()
        if self._due_after_step():
            self._validate(self.state.progress.epoch, ended=False)
            self.watch.throughput.restart()
            return
        self._save_due = due
        if due and progress.batch < len(self.loader):
            self._save()

    def _signals(self) -> tuple[bool, bool]:
        """Return whether this process was asked to stop, and whether a save is due next step."""
        due = processes.is_main() and self.saver.due(self.state.progress.step + 1)
        return self.interruption.received is not None, due

    def _told_to_stop(self) -> bool:
        """Return whether any process got a signal during the step; all processes must agree."""
        return processes.world_size() == 1 and self.interruption.received is not None

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """Return the scores of the model and of its averaged copy; a signal ends this at once."""
        scores: dict[str, float] = {}
        if epoch < self.section.eval_start:
            return scores
        self.state.share_buffers()
        try:
            with self.interruption.may_come_at_once():
                figures = self.run_dir / FIGURES / f"{self.seed}_{self.state.progress.step}"
                scores |= self.validator.score(self.model, figures)
                self.log.figures(self.state.progress.step, figures)
            if self.state.ema is not None:
                # Signals wait during the swap with the averages: half of it must not be saved.
                with self.state.ema.in_place(), self.interruption.may_come_at_once():
                    averaged = self.validator.score(self.model)
                scores |= {f"ema_{name}": value for name, value in averaged.items()}
        except Interrupted:
            raise self._stop() from None
        # All processes use the scores of one: rounding must not make them decide differently.
        scores = processes.on_main(lambda: scores)
        self._check_metric(scores)
        return scores

    def _check_metric(self, scores: dict[str, float]) -> None:
        """Save the epoch, and refuse a metric that cannot rank it."""
        metric = self.section.early_stop_metric
        if metric in scores:
            return
        problem = (
            f"trainor.early_stop_metric: given '{metric}', but an evaluation gives "
            f"{', '.join(scores) or 'no score'}."
        )
        if self._save():
            problem += f" {self.saver.last} holds the epoch: ckpt=auto continues."
        raise ConfigError(problem)

    def _rank(self, epoch: int, scores: dict[str, float]) -> bool:
        """Step a plateau schedule and the early stop; returns whether the score is the best."""
        state, progress = self.state, self.state.progress
        metric = self.section.early_stop_metric
        if epoch < self.section.eval_start:
            return False
        score = scores[metric]
        if epoch >= self.section.decay_metric_start:
            state.schedule.after_evaluation(score)
        if epoch < self.section.early_stop_start:
            return False
        if improves(score, progress.best, state.better):
            progress.best, progress.stale = score, 0
            return True
        progress.stale += 1
        return False

    def _stopped_early(self) -> bool:
        patience = self.section.early_stop
        return patience is not None and self.state.progress.stale >= patience

    def _save(self, improved: bool = False) -> bool:
        """Write the newest state, and on improvement the best checkpoint; returns success."""
        progress = self.state.progress
        state = self.state.capture(progress.best if improved else None, self.log.lines)
        if improved:
            assert progress.best is not None
            if not self.saver.save_best(state, progress.best, state["epoch"]):
                # The next evaluation has to beat the best score on the disk, not the lost one.
                progress.best = self.saver.best_score()
                state = self.state.capture(None, self.log.lines)
        return self.saver.save_last(state)

    def _make_sure_of_the_last_state(self) -> None:
        """Make sure that the final state of the run is on the disk.

        Raises:
            CheckpointError: it is not there.
        """
        saver, step = self.saver, self.state.progress.step
        if self.started_from is not None and step == self.started_at:
            return  # nothing was trained: the state is the one that was resumed
        if saver.saved != step:
            self._save()  # the disk may have space again
        there, problem = processes.on_main(lambda: [saver.last.is_file(), saver.problem])
        if there and saver.saved == step:
            return
        found = self.started_from if saver.saved is None else saver.last
        saved = self.started_at if saver.saved is None else saver.saved
        if found is None or (found == saver.last and not there):
            left = f"nothing: there is no {saver.last}"
        else:
            left = f"{found}, after step {saved}"
        raise CheckpointError(
            f"Trained to the end, but the state after step {step} is not on the disk"
            f"{f' ({problem})' if problem else ''}. Last saved: {left}. "
            "With free disk space, ckpt=auto trains the rest again."
        )

    def _saved_after_fault(self) -> str:
        """Save after a loading process failed between two steps; returns how to continue."""
        if processes.world_size() == 1 and self._save():
            return (
                f"{self.saver.last} holds the state after step {self.state.progress.step}; "
                "ckpt=auto continues."
            )
        return "ckpt=auto continues what was saved before."

    def _stop(self) -> Interrupted:
        """Save because of a signal; returns the error that ends the run."""
        if self._save():
            what = f"{self.saver.last} holds the state; ckpt=auto continues"
        else:
            what = "the state could not be saved; ckpt=auto continues what was saved before"
        return self.interruption.stop(f"after step {self.state.progress.step}, {what}")

    def _report_end(self) -> None:
        """Log why the run ended and its best checkpoint."""
        last = "last epoch" if self.section.steps is None else "last step"
        reason = "early stop" if self._stopped_early() else last
        bad, _ = self.state.tally.bad_steps()
        if bad:
            LOGGER.warning("Skipped in this run: %s", counted(bad, "step"))
        best = self.saver.best()
        where = f"; best checkpoint {best[0].path}" if best else ""
        epochs = counted(self.state.progress.epoch, "epoch")
        LOGGER.info("Finished after %s (%s)%s", epochs, reason, where)


def _read_encoder(*arguments: Any) -> Any:
    """See `read_encoder`, which is imported only for models that take another run's weights."""
    from vilmedic.checkpoints.encoders import read_encoder

    return read_encoder(*arguments)
