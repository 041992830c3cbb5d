from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.running import write_pages


def test_a_folder_that_is_no_run_gets_no_pages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "1.66_4_406122.pth").touch()  # a checkpoint that was downloaded
    (tmp_path / "generated").mkdir()
    write_pages(tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert "write_report" not in caplog.text

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seed": 0, "train_loss": 0.5}\n')
    write_pages(tmp_path)
    assert (tmp_path / "report.html").exists()
