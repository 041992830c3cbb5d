"""Evaluation results as a JSON file and as a printed table."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vilmedic.files import replace_text, text_table
from vilmedic.log import columns

logger = logging.getLogger(__name__)


def results_name(split: str) -> str:
    """The name of the results file of a split."""
    return f"results_{split}.json"


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write `results_<split>.json`, whole or not at all.

    Args:
        results: what `Ensemblor.start` returns for a split; numbers that are not finite become
            null, which JSON can hold.
        folder: where to.
    """
    path = folder / results_name(results["split"])
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(path, text + "\n")
    return path


def source(system: str, checkpoints: Sequence[dict[str, Any]], *, ema: bool = False) -> str:
    """Describe the evaluated model for tables, plots and titles: `ConVIRT, epoch 16, seed 0`.

    Epochs are counted from 1 there, as people do, and from 0 in files and file names.

    Args:
        system: the model.
        checkpoints: what the results say of each checkpoint.
        ema: whether its averaged weights were taken.
    """
    each = [_checkpoint(entry) for entry in checkpoints]
    several = f"ensemble of {len(each)} ({'; '.join(each)})"
    parts = [system, each[0] if len(each) == 1 else several]
    return ", ".join([*parts, "averaged weights"] if ema else parts)


def _checkpoint(entry: dict[str, Any]) -> str:
    if entry.get("epoch") is None or entry.get("seed") is None:
        return str(entry["file"])  # of another project, which says nothing else
    return f"epoch {entry['epoch'] + 1}, seed {entry['seed']}"


def protocol_names(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name protocols for people, such as `zero shot, global similarity`.

    The similarity is always said; of several protocols of one kind, the options that differ too.

    Args:
        protocols: the options of each protocol, by its name in a results file.
    """
    kinds = {name: re.sub(r"_\d+$", "", name) for name in protocols}
    names = {}
    for name, options in protocols.items():
        others = [protocols[one] for one, kind in kinds.items() if kind == kinds[name]]
        parts = [protocol_name(kinds[name])]
        if "similarity" in options:
            which = options["similarity"]
            parts.append("both similarities" if which == "both" else f"{which} similarity")
        for key, value in options.items():
            if key != "similarity" and any(one.get(key) != value for one in others):
                shown = Path(value).name if isinstance(value, str) else value
                parts.append(f"{key.replace('_', ' ')} {shown}")
        names[name] = ", ".join(parts)
    return names


def protocol_name(metric: str) -> str:
    """A metric in words: `zero shot`, `kNN`."""
    return "kNN" if metric == "knn" else metric.replace("_", " ")


def number_name(key: str) -> str:
    """Name a number of a protocol: `image to text, recall at 5`, `AUROC`."""
    text = re.sub(r"_r(\d+)$", r", recall at \1", key)
    text = re.sub(r"_p(\d+)$", r", precision at \1", text)
    text = re.sub(r"_(median|mean)_rank$", r", \1 rank", text)
    text = text.replace("_", " ")
    return re.sub(r"\b(auroc|f1|mcc)\b", lambda found: found[1].upper(), text)


def headline(system: dict[str, Any]) -> dict[str, Any]:
    """The loss and the headline numbers of every metric, null where one is undefined.

    Args:
        system: the model or a baseline in a results file.
    """
    found = {"loss": system["loss"]}
    for metric, values in system["metrics"].items():
        for key, value in values.items():
            if not (key.endswith("_interval") or isinstance(value, dict | list | str | bool)):
                found[f"{metric} {key}"] = value
    return found


def table(results: dict[str, Any]) -> str:
    """The headline numbers of a split, the model beside the baselines.

    Numbers of single classes are in the file only, and those of fractions but for the AUROC. Where
    the screen is too narrow for all systems, blocks of some of them follow on each other.
    """
    title = (
        f"{results['run']}, split {results['split']}: {results['samples']} samples, "
        f"{source(results['system'], results['checkpoints'], ema=results['ema'])}"
    )
    rows = table_cells(results)
    text = [title]
    for part in fitting(rows, columns()):
        block = [[row[0], *row[1:][part]] for row in rows]
        if part.start:  # what the first systems alone have is not said again
            block = [row for row in block if any(cell != "-" for cell in row[1:])]
        lines = text_table(block, between="   ")
        rule = "-" * len(lines[0])
        text += [rule, lines[0], rule, *lines[1:]]
    return "\n".join([*text, rule])


def fitting(rows: Sequence[Sequence[str]], width: int | None) -> list[slice]:
    """The columns behind the first one, in blocks that fit beside it, one column at least.

    Args:
        rows: the cells of a table.
        width: columns of the screen; None takes all in one block.
    """
    first, *widths = (max(map(len, column)) + 3 for column in zip(*rows, strict=True))
    blocks, start, used = [], 0, first - 3
    for number, size in enumerate(widths):
        if width is not None and number > start and used + size > width:
            blocks.append(slice(start, number))
            start, used = number, first - 3
        used += size
    return [*blocks, slice(start, len(widths))]


def table_cells(results: dict[str, Any]) -> list[list[str]]:
    """The rows of that table: the split and the systems, then a number and its values each."""
    used, system = results["models_used"], results["system"]
    systems = {system if used == 1 else f"ensemble of {used}": results} | results["baselines"]
    columns = {name: dict(_headline(system)) for name, system in systems.items()}
    rows = list(dict.fromkeys(key for column in columns.values() for key in column))
    head = [results["split"], *columns]
    return [head, *([row, *(one.get(row, "-") for one in columns.values())] for row in rows)]


def grouped(paths: Iterable[Path]) -> list[str]:
    """Paths with those that differ in their endings only on one line: `test_full.{png,csv}`."""
    endings: dict[Path, list[str]] = {}
    for path in paths:
        endings.setdefault(path.with_suffix(""), []).append(path.suffix[1:])
    return [
        f"{stem}.{ends[0]}" if len(ends) == 1 else f"{stem}.{{{','.join(ends)}}}"
        for stem, ends in endings.items()
    ]


def _headline(system: dict[str, Any]) -> Iterable[tuple[str, str]]:
    numbers = headline(system)
    yield "loss", _show(numbers.pop("loss"))
    for metric, values in system["metrics"].items():
        for key in values:
            if f"{metric} {key}" in numbers:
                yield f"{metric} {key}", _with_interval(values, key)
        for part in values.get("fractions", ())[:-1]:  # the last one is the headline
            share = f"{100 * part['fit']['fraction']:.4g}%"
            yield f"{metric} auroc, {share} of labels", _with_interval(part, "auroc")


def _with_interval(values: dict[str, Any], key: str) -> str:
    bounds = values.get(f"{key}_interval")
    spread = "" if bounds is None else f" [{_show(bounds[0])}, {_show(bounds[1])}]"
    return _show(values[key]) + spread


def _show(value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def _finite(value: Any, path: str = "") -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, path) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        logger.warning("%s is %s; written as null.", path, value)
        return None
    return value
