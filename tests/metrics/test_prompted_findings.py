from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.small_dalles import save_vae, tiny_dalle
from vilmedic.errors import ConfigError
from vilmedic.metrics.pointing_game import Finding
from vilmedic.metrics.prompted_findings import (
    ImageClassifier,
    PromptedFindings,
    _read_prompt,
    _table,
)

PROMPTS: dict[str, dict[str, str | None]] = {
    "clear": {"prompt": "The lungs are clear."},
    "left": {"prompt": "Left effusion.", "finding": "Effusion", "side": "left"},
}


def test_prompts_match_findings_of_real_images() -> None:
    left, right = (Finding("Effusion", side, ()) for side in ("left", "right"))
    both, heart = Finding("Effusion", None, ()), Finding("Cardiomegaly", None, ())
    clear, effusion = (_read_prompt(name, given) for name, given in PROMPTS.items())

    assert clear.shown_by([])
    assert not clear.shown_by([heart])
    assert effusion.shown_by([heart, left])
    assert effusion.shown_by([both])
    assert not effusion.shown_by([right])


def test_the_table_of_prompts_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["clear lungs", "effusion left", "cardiomegaly", "pneumothorax right"]
    areas = {**dict.fromkeys(names, 0.5), "cardiomegaly": None}
    monkeypatch.setenv("COLUMNS", "70")
    lines = _table(names, torch.full((4, 4), 0.25), areas).splitlines()
    assert max(map(len, lines)) <= 70
    assert lines[1].split("   ")[0] == "prompt, seen as"
    assert [line.split()[-1] for line in lines[-5:]] == ["AUROC", "0.50", "0.50", "-", "0.50"]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"a": PROMPTS["clear"]}, "at least two"),
        ({**PROMPTS, "b": {"prompt": "x", "sides": "left"}}, "'sides' is not known"),
        ({**PROMPTS, "b": {"finding": "x"}}, "no 'prompt'"),
        ({**PROMPTS, "b": {"prompt": "x", "side": "up"}}, "allowed: left, right"),
    ],
)
def test_prompts_without_findings_are_refused(prompts: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PromptedFindings(root="data", prompts=prompts)


def test_guidance_without_text_dropout_training_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = '{"Effusion": {"side": "left"}}\n{}\n'
    (tmp_path / "train.finding.jsonl").write_text(lines)
    vae = save_vae(tmp_path / "vae.pth")
    metric = PromptedFindings(root=str(tmp_path), prompts=PROMPTS, cond_scale=3.0)
    for dropped in (0.1, 0.0):
        assert "guidance does not work" not in caplog.text
        model = tiny_dalle(vae, null_cond_prob=dropped)
        networks = SimpleNamespace(members=[lambda model=model: model])
        metric.check(SimpleNamespace(networks=networks, title="run, DALLE"))  # type: ignore[arg-type]
    assert "prompted_findings.cond_scale is 3, but run, DALLE was trained with" in caplog.text


def test_the_classifier_distinguishes_sides() -> None:
    """A bright spot on the left, the right or both sides; exposure varies."""
    random = torch.Generator().manual_seed(0)
    labels = torch.rand(240, 2, generator=random) > 0.5
    images = torch.rand(240, 1, 32, 32, generator=random) * 40
    for column, place in enumerate((4, 20)):
        images[labels[:, column], :, 10:18, place : place + 8] += 60
    images *= 0.5 + torch.rand(240, 1, 1, 1, generator=random)
    pixels = images.clamp(max=255).byte()
    state = torch.get_rng_state()

    classifier = ImageClassifier(pixels[:200], labels[:200], epochs=25, seed=0)

    assert torch.equal(torch.get_rng_state(), state)
    correct = (classifier.logits(pixels[200:]) > 0) == labels[200:]
    assert correct.float().mean() > 0.9


def test_areas_under_the_curve_have_intervals_over_the_images() -> None:
    metric = PromptedFindings(root="data", prompts=PROMPTS, bootstrap=200)
    logits = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.eye(2).repeat_interleave(20, dim=0)
    run: Any = SimpleNamespace(seed=3, name="run", split="test")
    found = metric._report(logits + labels, labels, run, "images", one_class=True)
    right = ((logits + labels).argmax(dim=1) == labels.argmax(dim=1)).double().mean()
    assert found["accuracy"] == pytest.approx(right.item())
    for column, name in enumerate(PROMPTS):
        expected = roc_auc_score(labels[:, column], (logits + labels)[:, column])
        assert found["classes"][name]["auroc"] == pytest.approx(expected)
        low, high = found["classes"][name]["auroc_interval"]
        assert 0.5 < low < expected < high < 1
    assert found == metric._report(logits + labels, labels, run, "images", one_class=True)


def test_equal_images_get_equal_logits_in_every_batch() -> None:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (262, 1, 32, 32), generator=random, dtype=torch.uint8)
    pixels[258:] = pixels[:4]  # after the first 256, so in a batch of another size
    classifier = ImageClassifier(pixels[:64], torch.rand(64, 2) > 0.5, epochs=1, seed=0)
    logits = classifier.logits(pixels)
    assert torch.equal(logits[258:], logits[:4])
    assert torch.equal(classifier.logits(pixels[4:6]).argsort(dim=0), logits[4:6].argsort(dim=0))
