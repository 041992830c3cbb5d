from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vilmedic.errors import ConfigError, VilmedicError
from vilmedic.export import onnx
from vilmedic.export.onnx import Tower, compare
from vilmedic.run import load


class Double(nn.Module):
    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * given[0], given[0] > 0


def rows(size: int, number: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(size, 3, generator=torch.Generator().manual_seed(number))}


TOWER = Tower("double", Double(), rows, {"x": {0: "batch"}}, ("twice", "positive"))


def answer(add: float = 0.0, **changed: Any) -> Any:
    def run(given: dict[str, Any]) -> list[Any]:
        twice = 2 * given["x"] + add
        return [changed.get("twice", twice), changed.get("positive", given["x"] > 0)]

    return run


def test_matching_outputs_are_accepted_with_their_largest_difference() -> None:
    assert compare(TOWER, answer()) == 0
    assert compare(TOWER, answer(5e-5)) == pytest.approx(5e-5, rel=1e-2)


def test_differing_outputs_are_refused() -> None:
    with pytest.raises(VilmedicError) as caught:
        compare(TOWER, answer(2e-4))
    message = str(caught.value)
    assert message.startswith("double.onnx: 'twice' of x [1, 3] is not what PyTorch computes: the ")
    assert "the largest difference is 0.0002" in message
    assert "Allowed: at most 0.0001, and a cosine above 0.99999. Nothing is exported." in message
    with pytest.raises(VilmedicError, match=r"it is \[1, 2\] where \[1, 3\] was expected"):
        compare(TOWER, answer(twice=torch.zeros(1, 2).numpy()))
    with pytest.raises(VilmedicError, match=r"'positive' of .*: 3 of 3 values are others"):
        compare(TOWER, lambda given: [2 * given["x"], given["x"] <= 0])
    nan = torch.full((1, 3), float("nan")).numpy()
    with pytest.raises(VilmedicError, match="the largest difference is nan"):
        compare(TOWER, answer(twice=nan))


def test_small_vectors_must_have_the_same_direction() -> None:
    """A difference below the bound can change the direction of a small vector."""

    def small(size: int, number: int) -> dict[str, torch.Tensor]:
        return {"x": rows(size, number)["x"] * 1e-5}

    tower = Tower("double", Double(), small, {}, ("twice", "positive"))
    assert compare(tower, answer()) == 0
    with pytest.raises(VilmedicError, match=r"least cosine 0\.|least cosine -0\."):
        compare(tower, answer(5e-5))
    zero = Tower("zero", Double(), lambda size, _: {"x": torch.zeros(size, 3)}, {}, TOWER.outputs)
    assert compare(zero, answer()) == 0


def test_several_batch_sizes_are_checked() -> None:
    seen: list[int] = []

    def run(given: dict[str, Any]) -> list[Any]:
        seen.append(len(given["x"]))
        if len(given["x"]) > 1:
            raise RuntimeError("Got invalid dimensions\nmore")
        return list(answer()(given))

    with pytest.raises(
        VilmedicError, match=r"double\.onnx: fails on x \[2, 3\]: RuntimeError: Got"
    ):
        compare(TOWER, run)
    assert seen == [1, 2]
    assert len(set(onnx.BATCHES)) >= 3


def test_text_inputs_have_different_lengths(made: Path) -> None:
    loaded = load(made / "run", device="cpu")._loaded
    towers = {tower.name: tower for tower in onnx._towers(loaded)}
    assert set(towers) == {"image_encoder", "text_encoder"}
    tower = towers["text_encoder"]
    given = [tower.inputs(size, number) for number, size in enumerate(onnx.BATCHES)]
    assert len({one["input_ids"].shape[1] for one in given}) >= 2
    assert any((one["attention_mask"] == 0).any() for one in given)
    assert tower.dynamic["input_ids"] == {0: "batch", 1: "tokens"}
    assert tower.outputs == ("linguistic",)


def test_a_failed_onnx_export_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **more: Any) -> None:
        raise RuntimeError("first") from ValueError("aten::odd is not supported\nmore")

    monkeypatch.setattr("torch.onnx.export", fail)
    model = load(made / "run", device="cpu")
    with pytest.raises(
        VilmedicError, match=r"torch cannot export .*: ValueError: aten::odd is not s"
    ):
        model.export(tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())


def test_missing_onnx_names_the_extra(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = onnx.find_spec
    monkeypatch.setattr(onnx, "find_spec", lambda n: None if n == "onnxscript" else find(n))
    model = load(made / "run", device="cpu")
    with pytest.raises(ConfigError, match=r"--onnx: needs onnxscript, which the extra \[onnx\]"):
        model.export(tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())
