"""Charts and examples of the report page: classes, ROC curves, retrievals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilmedic.checkpoints.left_out import LeftOut
from vilmedic.drawing.colours import REST, label_colour
from vilmedic.evaluation.predictions import predictions_name, read_predictions
from vilmedic.evaluation.results import number_name
from vilmedic.report.tables import Results

MOST_CLASSES = 40  # of a chart
ROC_POINTS = 200  # of a curve
EXAMPLES = 4  # best retrievals, and as many worst ones
GUESSING = {"auroc": 0.5, "side": 0.5}

Arrays = dict[str, NDArray[Any]]


@dataclass
class Chart:
    """A chart of one protocol, drawn by the page's script.

    Args:
        kind: `bars` (one row per class) or `roc` (one curve per class).
        title: what is shown.
        axis: name of the number.
        names: the classes.
        colours: of each class.
        values: the number of each class; the area under each curve.
        bounds: the interval of each number; None where there is none.
        reference: the number of guessing; None where that is not known.
        curves: false and true positive rates of each class, for `roc`.
        file: name of the file that is downloaded, without its ending.
    """

    kind: str
    title: str
    axis: str
    names: list[str]
    colours: list[str]
    values: list[float]
    bounds: list[tuple[float, float] | None] = field(default_factory=list)
    reference: float | None = None
    curves: list[tuple[list[float], list[float]]] = field(default_factory=list)
    file: str = "chart"


@dataclass
class Example:
    """An image with its report, and how far down the model ranked it.

    Args:
        line: the line of the sample in the files of the split.
        rank: place of its own report among all, from 1; the mean over ties.
        image: a data URI.
        report: its own report.
        found: the report that the model finds nearest to the image; empty where it is not known.
    """

    line: int
    rank: float
    image: str
    report: str
    found: str


@dataclass
class Retrievals:
    """The best and the worst retrievals of a split.

    Args:
        split: its name.
        protocol: the name of the protocol.
        samples: candidates of each image.
        best: those with the first ranks.
        worst: those with the last ranks.
    """

    split: str
    protocol: str
    samples: int
    best: list[Example]
    worst: list[Example]


def read_arrays(results: Results, left_out: LeftOut) -> Arrays:
    """Predictions of the protocols for a split; empty where none were written."""
    path = results.folder / predictions_name(results.split)
    arrays: Arrays = {}
    if path.exists():
        with left_out.damaged(path):
            arrays = read_predictions(path)
            if len(arrays["lines"]) != results.samples:
                arrays = {}  # of another evaluation
    return arrays


def charts(results: Results, arrays: Arrays, label_names: Sequence[str]) -> list[dict[str, Any]]:
    """Bars and ROC curves of the classes of each protocol.

    Args:
        results: of a split.
        arrays: what `read_arrays` gives.
        label_names: the labels of the data, by whose order classes are coloured.
    """
    places = {name: place for place, name in enumerate(label_names)}
    found = []
    for metric, name in results.protocols.items():
        title = f"{name}, {results.split} split"
        values = results.values["metrics"].get(metric) or {}
        some = [_bars(values.get("classes"), title, places), _roc(arrays, metric, title, places)]
        for chart in some:
            if chart is not None:
                chart.file = f"{results.headline.file.rpartition('-')[0]}-{metric}-{chart.kind}"
                found.append(asdict(chart))
    return found


def retrievals(
    results: Results, arrays: Arrays, explorer: dict[str, Any] | None
) -> Retrievals | None:
    """The best and the worst retrievals of a split, from images to reports.

    Args:
        results: of a split.
        arrays: what `read_arrays` gives.
        explorer: the content of the explorer of the split, which has images and reports.

    Returns:
        None without ranks, or without images and reports.
    """
    metrics = [one for one in results.protocols if f"{one}/image_to_text_above" in arrays]
    if not metrics or explorer is None or explorer["total"] != results.samples:
        return None
    samples = explorer["samples"]
    if not any(samples["thumbnail"]) or not any(samples["report"]):
        return None
    above, beside = (arrays[f"{metrics[0]}/image_to_text_{one}"] for one in ("above", "beside"))
    ranks = dict(zip(arrays["lines"].tolist(), (1 + above + beside / 2).tolist(), strict=True))
    found = {one["name"]: one["index"] for one in explorer["neighbours"]}
    whole = len(samples["line"]) == results.samples  # else the nearest of all is not known
    nearest = found.get("reports for this image") if whole else None
    known = [place for place, line in enumerate(samples["line"]) if line in ranks]
    order = sorted(known, key=lambda place: ranks[samples["line"][place]])

    def example(place: int) -> Example:
        thumbnail = samples["thumbnail"][place]
        return Example(
            line=samples["line"][place],
            rank=ranks[samples["line"][place]],
            image=f"data:image/webp;base64,{thumbnail}" if thumbnail else "",
            report=samples["report"][place],
            found=samples["report"][nearest[place][0]] if nearest else "",
        )

    count = min(EXAMPLES, len(order) // 2)
    if not count:
        return None
    return Retrievals(
        split=results.split,
        protocol=results.protocols[metrics[0]],
        samples=results.samples,
        best=[example(place) for place in order[:count]],
        worst=[example(place) for place in order[: -count - 1 : -1]],
    )


def _bars(classes: Any, title: str, places: dict[str, int]) -> Chart | None:
    """One bar per class with its interval: of the first number that all classes have."""
    if not isinstance(classes, dict):
        return None
    rows = {
        str(name): value if isinstance(value, dict) else {"": value}
        for name, value in classes.items()
    }
    keys = dict.fromkeys(key for row in rows.values() for key, one in row.items() if _number(one))
    usual = [key for key in ("auroc", "side") if key in keys]
    key = next(iter(usual or keys), None)
    if key is None:
        return None
    chosen = [name for name, row in rows.items() if _number(row.get(key))][:MOST_CLASSES]
    return Chart(
        kind="bars",
        title=title,
        axis=number_name(key or "auroc"),
        names=chosen,
        colours=[_colour(name, places) for name in chosen],
        values=[rows[name][key] for name in chosen],
        bounds=[_bounds(rows[name].get(f"{key}_interval")) for name in chosen],
        reference=GUESSING.get(key or "auroc"),
    )


def _roc(arrays: Arrays, metric: str, title: str, places: dict[str, int]) -> Chart | None:
    """One ROC curve per class; None without scores and labels of every sample."""
    needed = (f"{metric}/scores", f"{metric}/classes", "labels", "label_names")
    if not all(name in arrays for name in needed):
        return None
    columns = {str(name): place for place, name in enumerate(arrays["label_names"])}
    chart = Chart("roc", f"ROC, {title}", "true positive rate", [], [], [], reference=0.5)
    for place, name in enumerate(map(str, arrays[f"{metric}/classes"])):
        if name not in columns or len(chart.names) == MOST_CLASSES:
            continue
        labels, scores = arrays["labels"][:, columns[name]], arrays[f"{metric}/scores"][:, place]
        known = (labels >= 0) & np.isfinite(scores)
        curve = roc_curve(scores[known], labels[known] == 1)
        if curve is None:
            continue
        wrong, right = curve
        chart.names.append(name)
        chart.colours.append(_colour(name, places))
        chart.values.append(float(np.trapezoid(right, wrong)))
        keep = np.unique(np.linspace(0, len(wrong) - 1, ROC_POINTS).round().astype(int))
        chart.curves.append((wrong[keep].round(4).tolist(), right[keep].round(4).tolist()))
    return chart if chart.names else None


def roc_curve(
    scores: NDArray[np.float64], targets: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    Args:
        scores: [N].
        targets: [N].

    Returns:
        None without a positive or without a negative.
    """
    positives = int(targets.sum())
    if not 0 < positives < len(targets):
        return None
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    right = np.concatenate([[0], np.cumsum(targets[order])[ends]]) / positives
    wrong = np.concatenate([[0], np.cumsum(~targets[order])[ends]]) / (len(targets) - positives)
    return wrong, right


def _colour(name: str, places: dict[str, int]) -> str:
    return label_colour(places[name]) if name in places else REST


def _bounds(value: Any) -> tuple[float, float] | None:
    whole = isinstance(value, list) and len(value) == 2 and all(map(_number, value))
    return (value[0], value[1]) if whole else None


def _number(value: Any) -> bool:
    finite = isinstance(value, int | float) and not isinstance(value, bool)
    return finite and abs(value) < 1e300
