from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.factories import tiny_tokenizer
from vilmedic.datasets.spec import DataSpec
from vilmedic.errors import ConfigError


def test_the_size_of_the_vocabulary_is_that_of_its_largest_id() -> None:
    """Ids of a tokenizer may have gaps, and embeddings are looked up by them."""
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
def test_pixels_other_than_0_to_1_are_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"VAE takes pixels in 0\.\.1.*Set mean=\[0\] and std"):
        DataSpec(normalization=(mean, std)).check_pixels("VAE")


def test_pixels_in_0_to_1_are_taken() -> None:
    DataSpec().check_pixels("VAE")
    DataSpec(normalization=([0], [1])).check_pixels("VAE")
    DataSpec(normalization=([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])).check_pixels("VAE")
