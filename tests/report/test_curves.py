from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.report.runs import write_curves
from vilmedic.report.curves import (
    Line,
    Panel,
    arrange,
    best_steps,
    draw_panel,
    line_labels,
    panel_colours,
    read_curves,
    shorter,
    smoothed,
)
from vilmedic.report.curves import write_curves as draw


def test_every_metric_becomes_a_line_per_seed(tmp_path: Path) -> None:
    write_curves(tmp_path, seed=1)
    write_curves(tmp_path, seed=2, steps=4)

    lines = {(line.name, line.seed): line for line in read_curves(tmp_path)}

    assert lines["loss", 2].values == [2.0, 1.0, 2 / 3, 0.5]
    assert lines["loss", 2].steps == [1, 2, 3, 4]
    assert lines["validation_loss", 1].steps == [10, 20, 30]
    assert ("epoch", 1) not in lines
    assert ("time", 1) not in lines


def test_non_numbers_leave_a_gap(tmp_path: Path) -> None:
    entries = [{"seed": 1, "step": s, "loss": v} for s, v in ((1, 1.0), (2, None), (3, "x"))]
    text = "".join(json.dumps(one) + "\n" for one in entries)
    (tmp_path / "metrics.jsonl").write_text(text + '{"seed": 1, "step": 4, "loss": NaN}\n')
    [line] = read_curves(tmp_path)
    assert line.steps == [1]


def test_panels_group_related_metrics_in_order(tmp_path: Path) -> None:
    write_curves(tmp_path, seed=1)
    panels = {p.title: [line.name for line in p.lines] for p in arrange(read_curves(tmp_path))}

    assert list(panels) == [
        "Loss",
        "Retrieval, validate split",
        "Retrieval, median rank, validate split",
        "Loss over ln(batch), 1 is guessing",
        "Spread of the embeddings, 0 is collapsed",
        "Learning rate",
        "Gradient norm",
        "Samples per second",
    ]
    assert panels["Loss"] == ["loss", "train_loss", "validation_loss"]


def test_six_panels_are_shown_including_the_checkpoint_score() -> None:
    names = [f"validation_{metric}_auroc" for metric in ("knn", "zero_shot", "linear_probe")]
    names += ["validation_classification_f1", "loss", "lr", "feature_std_visual", "data_wait"]
    lines = [Line(name, 1, [1, 2, 3], [0.1, 0.3, 0.2]) for name in names]
    score = "validation_classification_f1"
    best = best_steps(lines, score, "higher")
    assert best == {1: 2}
    assert best_steps(lines, score, "lower") == {1: 1}
    assert best_steps(lines, score, None) == {}
    panels = arrange(lines, score=score, best=best)
    assert [panel.title for panel in panels if not panel.folded] == [
        "Loss",
        "Classification, validate split",
        "kNN, validate split",
        "Zero shot, validate split",
        "Spread of the embeddings, 0 is collapsed",
        "Learning rate",
    ]
    assert panels[0].best == {1: 2}


def test_step_ticks_are_integers_and_the_best_checkpoint_is_marked() -> None:
    axis = Figure().subplots()
    line = Line("loss", 1, [1, 2, 3], [3.0, 1.0, 2.0])
    draw_panel(axis, Panel("Loss", [line], best={1: 2}), {"loss": "#123456"})
    assert all(float(tick).is_integer() for tick in axis.get_xticks())
    assert [list(one.get_xdata()) for one in axis.lines][1] == [2, 2]
    assert axis.lines[0].get_color() == "#123456"


def test_a_metric_has_one_colour_in_all_panels() -> None:
    names = (
        "loss",
        "validation_knn_auroc",
        "validation_zero_shot_auroc",
        "validation_knn_accuracy",
    )
    colours = panel_colours(arrange([Line(name, 1, [1], [1.0]) for name in names]))
    assert colours["validation_knn_auroc"] == colours["validation_zero_shot_auroc"]
    assert colours["validation_knn_auroc"] != colours["validation_knn_accuracy"]


def test_thinning_keeps_the_mean() -> None:
    values = np.random.default_rng(0).random(1000).tolist()
    thin = Line("x", 1, list(range(1000)), values).thinned(100)
    assert len(thin.values) == 100
    assert thin.steps[-1] == 999
    assert np.mean(thin.values) == pytest.approx(np.mean(values))


def test_smoothing_is_a_moving_average() -> None:
    values = np.random.default_rng(0).random(200)
    line = Line("x", 1, list(range(200)), values.tolist())
    expected = [values[max(0, i - 5) : i + 6].mean() for i in range(200)]
    assert np.allclose(smoothed(line), expected)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    assert draw(tmp_path) is None
    write_curves(tmp_path, seed=1, steps=200)
    write_curves(tmp_path, seed=2)
    path = draw(tmp_path)
    assert path == tmp_path / "curves.png"
    assert min(Image.open(path).size) > 500


def test_names_are_shortened() -> None:
    assert shorter(["a_b_c", "a_b_d_e"]) == ["c", "d_e"]
    assert shorter(["loss", "train_loss"]) == ["loss", "train_loss"]
    assert shorter(["a_b"]) == ["a_b"]


def test_the_two_training_losses_have_distinct_labels() -> None:
    labels = line_labels(["loss", "train_loss", "validation_loss"])
    assert labels == ["loss of single steps", "train_loss, mean of the epoch", "validation_loss"]
    assert line_labels(["loss", "validation_loss"]) == ["loss", "validation_loss"]


@pytest.mark.parametrize(("value", "limits"), [(0.1, (0.09, 0.11)), (0.0, (-1.0, 1.0))])
def test_a_constant_is_drawn_in_the_middle(value: float, limits: tuple[float, float]) -> None:
    axis = Figure().subplots()
    line = Line("temperature", 1, list(range(100)), [value] * 100)
    draw_panel(axis, Panel("Temperature", [line], logarithmic=True), {"temperature": "black"})
    assert axis.get_ylim() == pytest.approx(limits)
