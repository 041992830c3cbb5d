from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.small_models import tiny_spec, tiny_tokenizer
from vilmedic.datasets.aligned import DataSpec, seeded, stable_seed
from vilmedic.errors import ConfigError


def test_the_vocabulary_size_is_its_largest_id_plus_one() -> None:
    """Token ids may have gaps, and embeddings are indexed by id."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "heart": 40}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
    assert DataSpec(tokenizer=tokenizer).vocab_size == 41
    assert DataSpec(tokenizer=tiny_tokenizer()).vocab_size == len(tiny_tokenizer())
    assert DataSpec().vocab_size is None


@pytest.mark.parametrize(("mean", "std"), [([0.5], [1.0]), ([0.0], [0.5]), ([0, 0, 0.1], [1])])
def test_normalised_pixels_are_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"VAE takes pixels in 0\.\.1.*Set mean=\[0\] and std"):
        DataSpec(normalization=(mean, std)).check_pixels("VAE")


def test_pixels_in_0_to_1_are_accepted() -> None:
    DataSpec().check_pixels("VAE")
    DataSpec(normalization=([0], [1])).check_pixels("VAE")
    DataSpec(normalization=([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])).check_pixels("VAE")


def test_properties_survive_as_plain_values() -> None:
    tokenizer = tiny_tokenizer()
    spec = DataSpec(
        tokenizer=tokenizer,
        tokenizer_max_len=12,
        labels=("Edema", "Mass"),
        multi_label=True,
        filler=0,
        normalization=([0.5], [0.25]),
    )
    again = DataSpec.from_plain(json.loads(json.dumps(spec.to_plain())))
    assert again.tokenizer is not None
    text = "Small left pleural effusion unheard-of ."
    assert again.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    for name in ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token"):
        assert getattr(again.tokenizer, name) == getattr(tokenizer, name)
    assert dataclasses.replace(again, tokenizer=None) == dataclasses.replace(spec, tokenizer=None)
    assert DataSpec.from_plain(DataSpec().to_plain()) == DataSpec()
    with pytest.raises(ValueError, match="damaged"):
        DataSpec.from_plain(spec.to_plain() | {"tokenizer": {"json": "{", "special": {}}})


def test_the_last_truncation_does_not_change_the_saved_tokenizer() -> None:
    """So that checkpoints of a resumed run equal those of an uninterrupted one."""
    spec = tiny_spec()
    assert spec.tokenizer is not None
    before = spec.to_plain()
    spec.tokenizer(["no acute effusion"], truncation=True, max_length=3, padding="max_length")
    assert spec.to_plain() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer_max_len": None}, "tokenizer_max_len is None"),
        ({"tokenizer_max_len": 0}, "tokenizer_max_len is 0"),
        ({"tokenizer_max_len": "9"}, "tokenizer_max_len is '9'"),
        ({"filler": 1000}, "filler is 1000, which is no word"),
        ({"filler": {}}, "which is no word"),
        ({"labels": ["Edema", None]}, "a label is no text"),
        ({"tokenizer": {"special": {"unk_token": "[UNK]"}}}, "has no padding token"),
    ],
)
def test_invalid_plain_values_are_refused(changed: dict[str, Any], message: str) -> None:
    plain = tiny_spec().to_plain()
    if "tokenizer" in changed:
        changed = {"tokenizer": plain["tokenizer"] | changed["tokenizer"]}
    with pytest.raises(ValueError, match=message):
        DataSpec.from_plain(plain | changed)


def test_seed_is_the_same_in_every_process() -> None:
    code = "from vilmedic.datasets.aligned import stable_seed; print(stable_seed('image', 1, 2, 3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == stable_seed("image", 1, 2, 3)


def test_seed_depends_on_everything_it_is_given() -> None:
    seeds = {
        stable_seed("image", 1, 2, 3),
        stable_seed("sentence", 1, 2, 3),
        stable_seed("image", 2, 2, 3),
        stable_seed("image", 1, 23),
        stable_seed("image", 12, 3),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_seeded_block_keeps_the_random_state_of_the_caller() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    with seeded(stable_seed("image", 0)):
        inside = torch.rand(1)
    with seeded(stable_seed("image", 0)):
        assert torch.equal(torch.rand(1), inside)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
