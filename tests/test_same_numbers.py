from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import same_numbers
from tests.same_numbers import _compare, _numbers


def run_of(folder: Path, **state: object) -> dict[str, object]:
    folder.mkdir()
    torch.save({"config": {"place": str(folder)}, **state}, folder / "last_3.pth")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    (folder / "results_test.json").write_text('{"checkpoints": [1], "loss": 0.5}')
    return dict(_numbers(folder))


def test_equal_runs_have_no_difference(tmp_path: Path) -> None:
    weight = torch.tensor([0.1, float("nan")])
    one, other = (run_of(tmp_path / name, model={"a": weight}, lr=[1, None]) for name in "ab")
    assert _compare(one, other) == ("6", "0", "0", "")


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ({"model": {"a": torch.tensor([-0.0])}}, ("5", "1", "0", "last_3.pth model a")),
        ({"model": {"a": torch.tensor([0.0]).double()}}, ("5", "1", "0", "last_3.pth model a")),
        ({"model": {"a": torch.zeros(1, 1)}}, ("5", "1", "0", "last_3.pth model a")),
        ({"lr": 1.0}, ("5", "1", "0", "last_3.pth lr")),
        ({"ema": None}, ("5", "0", "1", "last_3.pth ema")),
    ],
)
def test_any_changed_bit_or_key_is_a_difference(
    changed: dict[str, object], counts: tuple[str, ...], tmp_path: Path
) -> None:
    state: dict[str, object] = {"model": {"a": torch.zeros(1)}, "lr": 1}
    one = run_of(tmp_path / "a", **state)
    assert _compare(one, run_of(tmp_path / "b", **{**state, **changed})) == counts


@pytest.mark.parametrize(("differs", "status"), [(False, 0), (True, 1)])
def test_exit_status_is_1_for_differences(
    differs: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"first": {"ConVIRT": {"loss": 0.5}}, "second": {"ConVIRT": {"loss": 0.5 + differs}}}
    monkeypatch.setattr(same_numbers, "_git", lambda *words: words[-1])
    monkeypatch.setattr(same_numbers, "_runs", lambda commit, folder, processes: found[commit])
    monkeypatch.setattr("sys.argv", ["same_numbers", "first", "second"])
    assert same_numbers.main() == status
    assert "ConVIRT" in capsys.readouterr().out
