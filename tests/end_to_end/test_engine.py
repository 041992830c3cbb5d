from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.end_to_end.conftest import Run


def test_all_engine_options_together_and_a_changed_configuration(
    run_here: Run, tiny: list[str], tmp_path: Path
) -> None:
    """bfloat16, averaged weights, activation checkpointing, chunks, accumulation, profiling."""
    arguments = [
        *tiny,
        f"ckpt_dir={tmp_path}",
        "name=all",
        "trainor.precision=bf16",
        "trainor.ema=0.9",
        "trainor.activation_checkpointing=true",
        "trainor.grad_accu=2",
        "trainor.profile=1",
        "trainor.save_every=1",
        "trainor.early_stop_metric=ema_validation_loss",
        "model.forward_batch_size=4",
        "ckpt=auto",
    ]
    done = run_here("bin/train.py", *arguments, "trainor.seed=5", "trainor.epochs=2")

    folder = tmp_path / "all"
    assert "nothing to continue" in done.stdout
    assert "batch normalisation sees the statistics of chunks of at most 4 samples" in done.stdout
    assert "a step has 16 samples but the negatives of 8" in done.stdout
    events = json.loads((folder / "profile_5.json").read_text())["traceEvents"]
    assert {"data", "forward", "backward", "update"} <= {event.get("name") for event in events}
    assert "forward" in (folder / "profile_5.txt").read_text()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert all(
        {"loss", "grad_norm", "image_to_text", "text_to_image"} <= step.keys() for step in steps
    )
    evaluations = [line for line in lines if "ema_validation_loss" in line]
    assert [line["epoch"] for line in evaluations] == [0, 1]
    assert all(line["ema_validation_loss"] != line["validation_loss"] for line in evaluations)
    state = torch.load(folder / "last_5.pth", weights_only=True)
    assert state["ema"].keys() == state["model"].keys()
    assert state["progress"]["step"] == 6

    more = ["trainor.epochs=3", "trainor.optim_params.lr=5e-4", "trainor.lr_decay=null"]
    done = run_here("bin/train.py", *arguments, *more)
    assert "Continuing" in done.stdout
    assert "trainor.epochs: 2 -> 3" in done.stdout
    assert "trainor.optim_params.lr: 0.001 -> 0.0005" in done.stdout
    assert "the schedule starts from the beginning" in done.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6, 9]
    assert [line["lr"] for line in lines if "lr" in line][-1] == 5e-4

    plain = ["ensemblor.splits=[test]", "ensemblor.post_processing={}", "ensemblor.metrics={}"]
    losses = []
    for ema in ("false", "true"):
        run_here("bin/ensemble.py", *arguments[:-1], *plain, "ckpt=last", f"ensemblor.ema={ema}")
        results = json.loads((folder / "results_test.json").read_text())
        assert results["ema"] is (ema == "true")
        losses.append(results["loss"])
    assert losses[0] != losses[1]
