"""Output of the data check: table, JSON, histograms and sample images."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from vilmedic.drawing.colours import series_colours
from vilmedic.errors import escaped
from vilmedic.files import text_table
from vilmedic.preparation.checking import Findings, SplitFacts
from vilmedic.preparation.image_facts import SampleImage
from vilmedic.preparation.report_facts import repeated_share

MOST_LABELS = 20
BINS = 40
# Fonts with the letters of Chinese, Japanese and Korean, of which computers have one or none.
_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Malgun Gothic", "Arial Unicode MS"),
)
COLUMNS = 6
_WIDTH, _LINES = 38, 9  # letters and lines of a report that are shown
_NAME = 34
_READ = {"image": "images", "seq": "reports", "label": "labels"}


@contextmanager
def plain_text() -> Iterator[None]:
    """Draw texts of the data as they are: dollar signs too, and letters of any script with a font.

    matplotlib draws boxes for letters that no font has, and would print a warning for each.
    """
    known = set(fontManager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _FONTS if name in known)]
    with (
        rc_context({"text.parse_math": False, "font.family": fonts}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def as_values(findings: Findings) -> dict[str, Any]:
    """All figures of a check as plain values, for a JSON file."""
    return {
        "errors": findings.errors,
        "warnings": findings.warnings,
        "advice": findings.advice,
        "splits": {name: _figures(facts) for name, facts in findings.splits.items()},
    }


def as_lists(findings: Findings) -> str:
    """Return the complete lists behind the messages, one item per line below its heading."""
    return "\n".join(
        "\n".join([name, *(f"  {item}" for item in items), ""])
        for name, items in findings.named.items()
    )


def as_table(findings: Findings) -> str:
    """Return the figures as a text table with a column per split."""
    columns = {name: _flat(_figures(facts)) for name, facts in findings.splits.items()}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [["", *columns]]
    rows += [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    return "\n".join(text_table(rows))


def data_title(dataset: Mapping[str, Any], findings: Findings) -> str:
    """The title of both pages: the folders of the data, and the samples of each split.

    Args:
        dataset: the section `dataset` of the configuration.
        findings: the result of a check.
    """
    sections = [dataset, *(part for part in dataset.values() if isinstance(part, Mapping))]
    roots = dict.fromkeys(str(part["root"]) for part in sections if part.get("root"))
    sizes = [f"{name} {max(f.lines.values(), default=0):,}" for name, f in findings.splits.items()]
    return _shown(f"{', '.join(roots)}: {', '.join(sizes)} samples")


@plain_text()
def draw_page(findings: Findings, path: Path, title: str) -> None:
    """Write a page of histograms as PNG: sizes, brightness, report lengths, labels, duplicates."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontweight="bold")
    axes = figure.subplots(2, 3).ravel()
    draw: list[tuple[Callable[[Axes, dict[str, SplitFacts]], bool], str]]
    draw = [(_short_sides, "image"), (_aspects, "image"), (_means, "image")]
    draw += [(_lengths, "seq"), (_labels, "label"), (_duplicates, "seq")]
    for axis, (plot, part) in zip(axes, draw, strict=True):
        if not plot(axis, findings.splits):
            axis.set_axis_off()
            none = "none" if part in findings.parts else f"this data set reads no {_READ[part]}"
            axis.text(0.5, 0.5, none, ha="center", color="#888888", transform=axis.transAxes)
    handles, names = next(
        (h for h in (a.get_legend_handles_labels() for a in axes) if h[0]), ([], [])
    )
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, len(names)))
    figure.savefig(path, dpi=110)


@plain_text()
def draw_samples(findings: Findings, path: Path, title: str) -> bool:
    """Write a page of the samples of all splits as PNG, each over the report of its line.

    Returns:
        Whether there were any; without, no file is written.
    """
    cells = [
        (split, sample, facts.texts)
        for split, facts in findings.splits.items()
        for sample in (facts.images.samples if facts.images else ())
    ]
    if not cells:
        return False
    rows = -(-len(cells) // COLUMNS)
    figure = Figure(figsize=(15, 0.6 + 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontweight="bold")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (split, sample, texts) in zip(axes, cells, strict=False):
        report = texts[sample.line] if sample.line < len(texts) else ""
        _draw(axis, split, sample, report)
    figure.savefig(path, dpi=90)
    return True


def _figures(facts: SplitFacts) -> dict[str, Any]:
    figures: dict[str, Any] = {"lines": max(facts.lines.values(), default=0)}
    figures["patients"] = None if facts.patients is None else len(set(facts.patients))
    if facts.images is not None:
        images = facts.images
        figures |= {
            "images": len(facts.named),
            "missing images": facts.missing,
            "decoded": images.looked_at,
            "unreadable": len(images.unreadable),
            "blank": len(images.blank),
            "doubtful": sum(map(len, images.doubtful.values())),
        }
        if images.sizes:
            short = [min(size) for size in images.sizes]
            figures["short side"] = [min(short), int(np.median(short)), max(short)]
        figures["modes"] = dict(images.modes.most_common())
    if facts.reports is not None:
        exact, near = facts.reports
        figures |= {
            "empty reports": facts.empty,
            "repeated reports": round(repeated_share(exact), 4),
            "nearly repeated": round(repeated_share(near), 4),
        }
        if facts.lines.get("seq"):
            text, count = facts.most_frequent
            figures["most frequent"] = {text[:60]: count}
    if facts.lengths is not None and len(facts.lengths):
        middle, high = np.percentile(facts.lengths, [50, 95])
        figures["ids a report"] = [int(middle), int(high), int(facts.lengths.max())]
        figures[f"over {facts.max_len} ids"] = round(
            float((facts.lengths > facts.max_len).mean()), 4
        )
    if facts.unknown is not None:
        figures["unknown words"] = round(facts.unknown.share, 4)
    if facts.lost is not None:
        figures["letters that cleaning drops"] = round(facts.lost.share, 4)
    if facts.labels:
        figures["labels"] = dict(facts.labels.most_common())
    return figures


def _flat(figures: dict[str, Any]) -> dict[str, str]:
    """Figures as a column of the table; nested ones get rows of their own."""
    column: dict[str, str] = {}
    for name, value in figures.items():
        if value is None:
            column[name] = "unknown"
        elif name == "most frequent":
            column["most frequent report"] = f"{max(value.values()):,}"
        elif name == "short side":
            column["short side: min, median, max"] = " ".join(str(n) for n in value)
        elif name == "ids a report":
            column["ids a report: median, 95%, max"] = " ".join(str(n) for n in value)
        elif name == "labels":
            lines = max(1, figures["lines"])
            shown = list(value.items())[:MOST_LABELS]
            column |= {f"label {key}": f"{n:,} ({n / lines:.1%})" for key, n in shown}
            if len(value) > len(shown):
                column["further labels"] = f"{len(value) - len(shown):,}"
        elif isinstance(value, dict):
            column |= {f"{name.rstrip('s')} {key}": f"{count:,}" for key, count in value.items()}
        elif isinstance(value, float):
            column[name] = f"{value:.1%}"
        else:
            column[name] = f"{value:,}"
    return column


def _histograms(axis: Axes, values: dict[str, np.ndarray], title: str, unit: str) -> bool:
    """Histograms of all splits over each other, each with its samples as shares."""
    shown = {name: array for name, array in values.items() if len(array)}
    if not shown:
        axis.set_title(title)
        return False
    every = np.concatenate(list(shown.values()))
    low, high = float(every.min()), float(np.percentile(every, 99.5))
    edges = np.linspace(low, max(high, low + 1e-3 + abs(low) * 0.02), BINS + 1)
    colours = series_colours([list(values)])
    for name, array in values.items():
        if len(array):
            axis.hist(
                np.clip(array, edges[0], edges[-1]),
                bins=edges.tolist(),
                weights=np.full(len(array), 1 / len(array)),
                histtype="step",
                linewidth=1.6,
                color=colours[name],
                label=name,
            )
    axis.set(title=title, xlabel=unit, ylabel="share of the split")
    return True


def _sizes(splits: dict[str, SplitFacts]) -> dict[str, np.ndarray]:
    return {
        name: np.array(facts.images.sizes if facts.images else [], dtype=float).reshape(-1, 2)
        for name, facts in splits.items()
    }


def _short_sides(axis: Axes, splits: dict[str, SplitFacts]) -> bool:
    values = {
        name: sizes.min(axis=1) if len(sizes) else sizes for name, sizes in _sizes(splits).items()
    }
    return _histograms(axis, values, "Short side of the images", "pixels")


def _aspects(axis: Axes, splits: dict[str, SplitFacts]) -> bool:
    values = {name: sizes[:, 1] / sizes[:, 0] for name, sizes in _sizes(splits).items()}
    return _histograms(axis, values, "Width over height", "ratio")


def _means(axis: Axes, splits: dict[str, SplitFacts]) -> bool:
    values = {n: np.array(f.images.means if f.images else []) for n, f in splits.items()}
    return _histograms(axis, values, "Mean brightness", "grey level, 0 to 255")


def _lengths(axis: Axes, splits: dict[str, SplitFacts]) -> bool:
    values = {
        name: facts.lengths.astype(float) if facts.lengths is not None else np.zeros(0)
        for name, facts in splits.items()
    }
    drawn = _histograms(axis, values, "Length of the reports", "ids, special tokens included")
    longest = max((facts.max_len for facts in splits.values()), default=0)
    if drawn and longest:
        axis.axvline(longest, color="#555555", linestyle="--", linewidth=1)
        beyond = longest > sum(axis.get_xlim()) / 2  # the label is on the side with more space
        axis.text(
            longest,
            0.98,
            "tokenizer_max_len " if beyond else " tokenizer_max_len",
            va="top",
            ha="right" if beyond else "left",
            fontsize=8,
            color="#555555",
            transform=axis.get_xaxis_transform(),
        )
    return drawn


def _labels(axis: Axes, splits: dict[str, SplitFacts]) -> bool:
    axis.set_title("Labels")
    total = sum((facts.labels for facts in splits.values()), start=type(SplitFacts().labels)())
    names = [name for name, _ in total.most_common(MOST_LABELS)][::-1]
    if not names:
        return False
    height = 0.8 / len(splits)
    colours = series_colours([list(splits)])
    for place, (split, facts) in enumerate(splits.items()):
        lines = max(1, facts.lines.get("label", 1))
        shares = [facts.labels[name] / lines for name in names]
        at = np.arange(len(names)) + 0.4 - height * (place + 0.5)
        axis.barh(at, shares, height, color=colours[split], label=split)
    axis.set_yticks(np.arange(len(names)), [escaped(name) for name in names], fontsize=7)
    axis.set_xlabel("share of the split")
    return True


def _duplicates(axis: Axes, splits: dict[str, SplitFacts]) -> bool:
    axis.set_title("Reports that repeat another one")
    known = {name: facts.reports for name, facts in splits.items() if facts.reports is not None}
    if not known:
        return False
    for place, (name, groups) in enumerate(known.items()):
        shares = [repeated_share(group) for group in groups]
        at = np.arange(2) + 0.8 * ((place + 0.5) / len(known) - 0.5)
        colour = series_colours([list(splits)])[name]
        bars = axis.bar(at, shares, 0.8 / len(known), color=colour, label=name)
        axis.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8)
    axis.set_xticks([0, 1], ["word for word", "nearly"])
    axis.set(ylabel="share of the split", ylim=(0, 1.1))  # space for the labels
    return True


def _draw(axis: Axes, split: str, sample: SampleImage, report: str) -> None:
    axis.imshow(sample.pixels, cmap="gray", vmin=0, vmax=255, aspect="equal")
    name = _shown(os.path.basename(sample.place))
    name = name if len(name) <= _NAME else f"...{name[-_NAME + 3 :]}"
    axis.set_title(f"{split}, line {sample.line + 1}\n{name}", fontsize=8)
    text = textwrap.fill(_shown(report), _WIDTH, max_lines=_LINES, placeholder=" ...")
    axis.text(0, -0.02, text, va="top", fontsize=7, transform=axis.transAxes, clip_on=False)


def _shown(text: str) -> str:
    """A text without letters that cannot be drawn."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
