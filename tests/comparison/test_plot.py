"""The plot over a key: its lines and points, and refused inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.comparison.runs import write_run
from vilmedic import cli
from vilmedic.comparison.plot import series_along
from vilmedic.comparison.table import compare
from vilmedic.errors import ConfigError

ROOT = Path(__file__).parents[2]
KEY = "dataset.fraction"


@pytest.fixture
def grid(tmp_path: Path) -> list[Path]:
    """Two encoders on three label fractions, with two seeds each."""
    return [
        write_run(
            tmp_path / f"{encoder}-{fraction}-{seed}".replace("/", "_"),
            seed=seed,
            skill=skill + fraction,
            draw=seed,
            dataset__fraction=fraction,
            dataset__fraction_seed=seed,
            model__cnn={"pretrained": encoder},
        )
        for encoder, skill in (("ckpt/run", 1.0), (False, 0.2))
        for fraction in (1.0, 0.01, 0.1)
        for seed in (0, 1)
    ]


def test_a_line_for_each_encoder_with_the_numbers_of_the_table(grid: list[Path]) -> None:
    found = compare(grid, number=50)
    panels = series_along(found, KEY)
    assert list(panels) == [column.name for column in found.columns]
    lines = panels["zero_shot auroc"]
    assert [line.name for line in lines] == ["pretrained=ckpt/run", "pretrained=False"]
    column = next(one for one in found.columns if one.name == "zero_shot auroc")
    rows = list(found.settings)
    assert len(rows) == 6
    for line in lines:
        assert list(line.places) == [0.01, 0.1, 1.0]
        for place, value, interval in zip(line.places, line.values, line.intervals, strict=True):
            row = next(r for r in rows if line.name in r and f"fraction={place}" in r)
            estimate = column.cells[rows.index(row)].estimate
            assert estimate is not None
            assert (value, interval) == (estimate.value, estimate.interval)


def test_plotting_with_given_keys(grid: list[Path]) -> None:
    by = ["model.cnn.pretrained", KEY]
    lines = series_along(compare(grid, number=0, by=by), KEY, by)["zero_shot auroc"]
    assert [line.name for line in lines] == ["pretrained=ckpt/run", "pretrained=False"]
    one = series_along(compare(grid, number=0, by=[KEY]), KEY, [KEY])["zero_shot auroc"]
    assert [(line.name, len(line.places)) for line in one] == [("", 3)]


def test_the_command_writes_a_figure_beside_the_runs(
    grid: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--plot", KEY, "--bootstrap", "20", "--format", "csv"]
    assert cli.compare([*map(str, grid), *words]) == 0
    path = tmp_path / "comparison_fraction.png"
    told = capsys.readouterr()
    assert told.err == f"Written: {path}\n"
    assert "Written" not in told.out
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    # the figure beside the runs is not taken for a run
    assert cli.compare([*map(str, sorted(tmp_path.iterdir())), "--bootstrap", "0"]) == 0


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("dataset.fractoin", "has no key 'dataset.fractoin'. Did you mean 'dataset.fraction'?"),
        ("model.proto", "given model.proto=ConVIRT; allowed: a key with a number"),
        ("trainor.seed", "given trainor.seed=0, 1; allowed: a key with a number as its value"),
    ],
)
def test_other_keys_are_refused(grid: list[Path], key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        series_along(compare(grid, number=0), key)
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e200, [0.1]])
def test_a_non_numeric_value_is_refused(tmp_path: Path, value: object) -> None:
    runs = [
        write_run(tmp_path / f"r{seed}", seed=seed, dataset__fraction=one)
        for seed, one in enumerate((value, 0.5))
    ]
    with pytest.raises(ConfigError, match="allowed: a key with a number as its value"):
        series_along(compare(runs, number=0), KEY)


def test_plotting_needs_no_torch(grid: list[Path]) -> None:
    script = (
        "import sys; from vilmedic import cli; status = cli.compare(sys.argv[1:]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    words = [*map(str, grid), "--plot", KEY, "--bootstrap", "0"]
    assert subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT).returncode == 0
