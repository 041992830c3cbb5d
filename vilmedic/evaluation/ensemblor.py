"""Evaluation of trained checkpoints: numbers first, then figures and files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vilmedic.blocks.pretrained import Filled
from vilmedic.checkpoints import checkpoint
from vilmedic.checkpoints.encoders import read_encoder
from vilmedic.checkpoints.run_directory import make_run_directory
from vilmedic.config import build
from vilmedic.config.namespaces import entries
from vilmedic.config.sections import GenerationSection
from vilmedic.config.trained import as_trained
from vilmedic.device import (
    float32_products,
    pick_device,
    pick_precision,
    seed_everything,
    uses_tf32,
)
from vilmedic.distributed import processes
from vilmedic.errors import ConfigError, VilmedicError
from vilmedic.evaluation.evaluation import Ensemble, Splits, data_name
from vilmedic.evaluation.evaluations import EvaluationFolder
from vilmedic.evaluation.features import RawPixels
from vilmedic.evaluation.predictions import pack_predictions
from vilmedic.evaluation.results import grouped, results_name, source, table
from vilmedic.files import sha256_of
from vilmedic.log import LOGGER, Progress, counted
from vilmedic.models.contract import Model
from vilmedic.registry import MODELS

if TYPE_CHECKING:
    from vilmedic.config.load import Config

EXPLORER = "explore_representation"
CACHES = ("cache", "spool", "spool_gib")
"""Keys of a data set that only change the time it takes."""
WHAT_IS_MADE = ("generate_images", "num_images", "num_samples", "prompt")
"""Keys that choose which images are generated, not how: each has its own folder."""


class Ensemblor:
    """Evaluates the best checkpoints of a run as its configuration says.

    Several processes share the passes over the splits; one of them writes and draws.

    One pass over each split gives the features that all metrics and post-processing share. The
    numbers of the model are written before baselines are measured and figures drawn, so that
    what fails there loses none of them.

    Args:
        config: the checked configuration; its section `ensemblor` says what is done.
        generate: makes images of reports, for `generate_images`: `generate_from_checkpoints` of
            `vilmedic.generation.generate`.

    Raises:
        ConfigError: a value fits the schema but not the data, the model or this machine.
        DataError: a split cannot be used.
        CheckpointError: there is no such checkpoint, or it does not fit the model.
    """

    def __init__(self, config: Config, generate: Callable[..., list[Path]] | None = None) -> None:
        self.config = config
        self.section = config.ensemblor
        if self.section.generate_images and generate is None:
            raise ConfigError(
                "ensemblor.generate_images: this Ensemblor was made without `generate`, which "
                "makes the images. Run the command vilmedic-ensemble, or call vilmedic.evaluate."
            )
        self._make_images = generate
        self.run_dir = config.run_dir
        self.device = pick_device(self.section.device)
        self.paths = self._find_checkpoints()
        headers = {path: checkpoint.read_header(path) for path in self.paths}
        self.checkpoints = [describe_checkpoint(*one) for one in headers.items()]
        self.changed = self._follow(headers)
        self.networks = {} if self.changed else next(iter(headers.values())).get("networks") or {}
        self.system = str(self.config.model.get("proto", "model"))
        name = self.section.mode if self._ckpt is None else self.paths[0].stem
        self._set_up(name, headers, ema=self.section.ema)

    def _set_up(self, name: str, headers: dict[Path, dict[str, Any]], *, ema: bool) -> None:
        """Prepare the evaluations and the folder of this evaluation."""
        self.results: dict[str, dict[str, Any]] = {}
        settled: dict[str, Any] = {"precision": pick_precision(self.section.precision, self.device)}
        self.section = replace(self.section, **settled)
        self.source = source(self.system, self.checkpoints, ema=ema)
        self.splits = Splits(
            self.config,
            where="ensemblor",
            metrics=self.config.calls("ensemblor", "metrics"),
            post_processing=self._steps(),
            seed=self.section.seed,
            batch_size=self.section.batch_size,
            num_workers=self.section.num_workers,
            precision=self.section.precision,
            device=self.device,
            source=self.source,
        )
        self.folder = EvaluationFolder(
            self.run_dir,
            name,
            ema=ema,
            settings=self._settings(headers),
            about={
                "system": self.system,
                "checkpoints": self.checkpoints,
                "generated": self.section.generate_images,
            },
        )

    def start(self) -> dict[str, dict[str, Any]]:
        """Evaluate, write `results_<split>.json`, and run post-processing.

        Both go to the folder of this evaluation (see `vilmedic.evaluation.evaluations`).

        Returns:
            The contents of the results file of each split; nothing when images are generated.

        Raises:
            VilmedicError: post-processing failed, after everything else was done.
        """
        with float32_products(self.device, tf32=self.section.tf32):
            return self._evaluate()

    def print_tables(self) -> None:
        """Print the result tables, after everything else that logs."""
        for results in self.results.values():
            LOGGER.info("%s", table(results))

    def _evaluate(self) -> dict[str, dict[str, Any]]:
        make_run_directory(self.run_dir)  # a checkpoint may come from elsewhere
        with processes.main_first():
            for split in self.section.splits:
                self.splits.dataset(split)
        if self.section.generate_images:
            if processes.is_main():
                with processes.alone():
                    self._generate()
            return {}
        model = self._trained()
        for split in self.section.splits:
            self.splits.tokens_ready(split, model.members[0]())
        with processes.alone():
            for split in self.section.splits:
                self.splits.check(model, split)
        names = ", ".join(path.name for path in self.paths)
        some = counted(len(self.paths), "checkpoint")
        LOGGER.info("Evaluating %s of %s: %s", some, self.run_dir, names)

        results = {}
        for split in self.section.splits:
            results[split] = self._header(split, model) | self._measure(model, split, record=True)
            self._write(results[split])
        for name in dict.fromkeys(self.section.baselines):
            LOGGER.info("Measuring the baseline %s", name)
            try:
                baseline = self.splits.networks([self._baseline(name)])
            except ConfigError as error:  # weights that training began with and that are gone
                LOGGER.warning("The baseline %s is left out: %s", name, error)
                continue
            for split in self.section.splits:
                measured = self._measure(baseline, split, baseline=name)
                results[split]["baselines"][name] = measured
                self._write(results[split])
            baseline.forget()
        failures = processes.on_main(lambda: self._post_process(model))
        for split in self.section.splits:
            LOGGER.info("Written: %s", self.folder.path / results_name(split))
        self.results = results
        if failures:
            raise VilmedicError(
                f"Post-processing failed, the metrics above are complete: {'; '.join(failures)}."
            )
        return results

    def _generate(self) -> None:
        """Make images of reports with all checkpoints together."""
        assert self._make_images is not None  # checked in `__init__`
        folders = self._make_images(
            self._build_model(filled=True),
            self.paths,
            {split: self.splits.dataset(split) for split in self.section.splits},
            self.section,
            device=self.device,
            origin={
                "run": self.config.name,
                "model": self.source,
                "checkpoints": [path.name for path in self.paths],
                "ema": self.section.ema,
                "changed": self.changed,
            },
            out_dir=self.folder.path,
        )
        for folder in folders:
            LOGGER.info("Written: %s", folder / "sheet.png")
        self.folder.note()

    def _write(self, results: dict[str, Any]) -> None:
        if processes.is_main():
            self.folder.write(results)

    def _measure(
        self, networks: Ensemble, split: str, *, record: bool = False, baseline: str = ""
    ) -> dict[str, Any]:
        """The loss and every metric of a split.

        Args:
            networks: what is measured.
            split: name of the split.
            record: write the predictions for every sample.
            baseline: the baseline that the networks are; empty for the trained model.
        """
        evaluation = self.splits.evaluation(
            networks, split, out_dir=self.folder.path, baseline=baseline
        )
        recorded = {}

        def measure() -> dict[str, Any]:
            found = {}
            for name, metric in self.splits.metrics:
                evaluation.recorded = {} if record else None
                with Progress(f"{name} of {split}"):
                    found[name] = metric(evaluation)
                if evaluation.recorded:
                    recorded[name] = evaluation.recorded
            return found

        metrics = networks.once(measure)
        if recorded:
            content = pack_predictions(evaluation.samples(), recorded)
            LOGGER.info("Written: %s", self.folder.write_predictions(split, content))
        return {"loss": evaluation.features.loss, "metrics": metrics}

    def _post_process(self, networks: Ensemble) -> list[str]:
        """Make figures and files; returns failures after making all others."""
        failures = []
        steps = itertools.product(self.splits.post_processing, self.section.splits)
        for (name, action), split in steps:
            try:
                with processes.alone(), Progress(f"{name} of {split}"):
                    evaluation = self.splits.evaluation(networks, split, out_dir=self.folder.path)
                    written = action(evaluation)
                for line in grouped(written):
                    LOGGER.info("Written: %s", line)
            except Exception as error:
                LOGGER.exception("%s failed on the split %s", name, split)
                failures.append(f"{name} on {split}: {error}")
        return failures

    def _header(self, split: str, networks: Ensemble) -> dict[str, Any]:
        """Return the provenance of the numbers: everything needed to cite them."""
        return {
            "run": self.config.name,
            "evaluation": self.folder.name,
            "system": self.system,
            "targets": self.config.model.get("targets"),
            "data": data_name(self.splits.dataset(split)),
            "split": split,
            "samples": len(networks.split(split)),
            "checkpoints": self.checkpoints,
            "models_used": len(self.checkpoints),
            "ema": self.section.ema,
            "seed": self.section.seed,
            "batch_size": self.section.batch_size,
            "precision": self.section.precision,
            "tf32": uses_tf32(self.device, self.section.tf32),
            "changed": self.changed,
            "protocols": {name: metric.options() for name, metric in self.splits.metrics},
            "loss": None,
            "metrics": {},
            "baselines": {},
        }

    def _steps(self) -> Any:
        """Return the configured post-processing, followed by steps for the report."""
        steps = self.config.calls("ensemblor", "post_processing")
        if not self.section.report or EXPLORER in dict(entries(self.section.post_processing)):
            return steps
        return [*steps, EXPLORER]

    @property
    def _ckpt(self) -> str | None:
        """Return the configured checkpoint; None if the mode chooses."""
        ckpt = self.section.ckpt or self.config.ckpt
        return None if ckpt == "auto" else ckpt

    def _find_checkpoints(self) -> list[Path]:
        if self._ckpt is not None:
            return [checkpoint.locate(self._ckpt, self.run_dir)]
        return checkpoint.find_checkpoints(
            self.run_dir,
            self.section.mode,
            metric=self.config.trainor.early_stop_metric,
            rank_by=self.section.rank_by,
        )

    def _follow(self, headers: dict[Path, dict[str, Any]]) -> dict[str, Any]:
        """Take the model, the tokenizer and the image preprocessing from the checkpoints.

        Checkpoints of other projects lack these; there the configuration is used.

        Returns:
            The values that the command line changes, for the results.
        """
        saved = {
            path: state["config"]
            for path, state in headers.items()
            if "progress" in state and state.get("config")
        }
        if len(saved) < len(headers):
            return {}
        found = as_trained(self.config, saved, allow=self.section.changed == "allow")
        self.config = found.config
        if found.taken:
            LOGGER.info("As the checkpoint was trained:\n  %s", "\n  ".join(found.taken))
        for key, values in found.changed.items():
            LOGGER.warning("%s: not as in training: %s", key, values)
        return found.changed

    def _settings(self, headers: dict[Path, dict[str, Any]]) -> dict[str, Any]:
        """Return everything that the numbers and figures of this evaluation depend on."""
        section, where = self.section, self.run_dir.resolve()
        settings: dict[str, Any] = {
            "checkpoints": [
                {
                    **one,
                    "folder": "" if path.parent.resolve() == where else str(path.parent.resolve()),
                    "step": headers[path].get("progress", {}).get("step"),
                }
                for one, path in zip(self.checkpoints, self.paths, strict=True)
            ],
            "model": dict(self.config.model),
            "dataset": without(dict(self.config.dataset), CACHES),
            "ema": section.ema,
            "seed": section.seed,
            "precision": section.precision,
        }
        if uses_tf32(self.device, section.tf32):
            settings["tf32"] = True
        if section.generate_images:
            names = [one.name for one in fields(GenerationSection) if one.name not in WHAT_IS_MADE]
            own = asdict(section)
            return settings | {"generation": {name: own[name] for name in names}}
        return settings | {
            "batch_size": section.batch_size,
            "protocols": {name: with_contents(one.options()) for name, one in self.splits.metrics},
            "baselines": sorted(set(section.baselines)),
            "post_processing": [list(one) for one in entries(section.post_processing)],
        }

    def _trained(self) -> Ensemble:
        """Return the networks to evaluate."""
        return self.splits.networks(self._trained_members())

    def _trained_members(self) -> list[Callable[[], nn.Module]]:
        """A function for each checkpoint that fills the one model with its weights."""
        model = self._build_model(filled=True)
        held: list[Path] = []

        def fill(path: Path) -> Model:
            if held != [path]:
                state = checkpoint.load_checkpoint(path)
                checkpoint.load_weights(model, state, path, ema=self.section.ema)
                if step := state.get("progress", {}).get("step"):
                    model.schedule(step)
                held[:] = [path]
            return model

        return [lambda path=path: fill(path) for path in self.paths]  # type: ignore[misc]

    def _baseline(self, name: str) -> Callable[[], nn.Module]:
        network = RawPixels() if name == "raw_pixels" else self._build_model()
        return lambda: network

    def _build_model(self, *, filled: bool = False) -> Model:
        """Build the model with untrained weights from the seed.

        Args:
            filled: whether a checkpoint fills it, so that published weights are not looked for.
        """
        known = Filled(self.networks) if filled else None
        seed_everything(self.section.seed)
        spec = self.splits.dataset(self.section.splits[0]).spec
        model: Model = build(
            MODELS, self.config.model, spec=spec, filled=known, read_encoder=read_encoder
        )
        return model.to(self.device)


def without(value: Any, keys: Sequence[str]) -> Any:
    """Return nested mappings without some keys."""
    if not isinstance(value, dict):
        return value
    return {key: without(one, keys) for key, one in value.items() if key not in keys}


def with_contents(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a protocol, with a hash of each file in them, such as prompts."""
    files = {
        key: Path(value)
        for key, value in options.items()
        if isinstance(value, str) and Path(value).is_file()
    }
    return options | {f"{key}_sha256": sha256_of(path) for key, path in files.items()}


def describe_checkpoint(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The entry of a checkpoint in the results: file, epoch, score, metric and seed."""
    return {"file": path.name} | {
        key: state.get(key) for key in ("epoch", "metric", "score", "seed")
    }
