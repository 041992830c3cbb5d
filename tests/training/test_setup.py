from __future__ import annotations

import logging

import pytest
import torch

from tests.small_models import tiny_convirt
from tests.toy_models import ToyAutoencoder
from vilmedic.config.sections import TrainorSection, ValidatorSection
from vilmedic.errors import ConfigError, DataError
from vilmedic.training.parallel import (
    check_batch_size,
    check_validation_batches,
    log_batch_facts,
    prepare_network,
)

CPU = torch.device("cpu")


def told(caplog: pytest.LogCaptureFixture, model: object, **keys: int) -> str:
    with caplog.at_level(logging.INFO, logger="vilmedic"):
        log_batch_facts(model, TrainorSection(**keys))
    return caplog.text


def test_chunk_statistics_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    text = told(caplog, tiny_convirt(forward_batch_size=4), batch_size=16)
    assert "chunks of at most 4 samples, the loss all 16" in text
    assert "trainor.activation_checkpointing=true" in text


def test_nothing_is_reported_without_cause(caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, tiny_convirt(forward_batch_size=16), batch_size=16) == ""
    frozen = tiny_convirt(forward_batch_size=4)
    frozen.cnn.freeze = True
    assert told(caplog, frozen, batch_size=16) == ""
    assert told(caplog, ToyAutoencoder(), batch_size=16, grad_accu=4) == ""


def test_accumulation_adds_no_negatives(caplog: pytest.LogCaptureFixture) -> None:
    text = told(caplog, tiny_convirt(), batch_size=8, grad_accu=4)
    assert "a step has 32 samples but the negatives of 8" in text


def test_batches_without_a_loss_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainor\.batch_size: given 1"):
        check_batch_size(tiny_convirt(), 100, TrainorSection(batch_size=1))
    with pytest.raises(DataError, match="has 7 samples, fewer than"):
        check_batch_size(tiny_convirt(), 7, TrainorSection(batch_size=8))
    check_batch_size(ToyAutoencoder(), 1, TrainorSection(batch_size=1))


def test_convolutions_keep_channels_last() -> None:
    model = tiny_convirt()
    prepare_network(model, TrainorSection(), CPU)
    weights = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"trainor\.compile: torch needs a C\+\+ compiler"):
        prepare_network(tiny_convirt(), TrainorSection(compile=True), CPU)


def test_validation_batches_of_one_have_no_contrastive_loss() -> None:
    with pytest.raises(ConfigError, match=r"validator\.batch_size: given 1, but this model"):
        check_validation_batches(tiny_convirt(), ValidatorSection(batch_size=1))
    check_validation_batches(tiny_convirt(), ValidatorSection(batch_size=2))
    check_validation_batches(ToyAutoencoder(), ValidatorSection(batch_size=1))


def test_settings_that_this_run_cannot_use_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    text = told(caplog, tiny_convirt(forward_batch_size=17), batch_size=16)
    assert "model.forward_batch_size=17 has no effect in training: a batch has 16" in text
    assert "trainor.sync_bn has no effect" in told(caplog, ToyAutoencoder(), sync_bn=True)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="vilmedic"):
        log_batch_facts(ToyAutoencoder(), TrainorSection(grad_accu=4), 4)
        assert caplog.text == ""
        log_batch_facts(ToyAutoencoder(), TrainorSection(grad_accu=4), 3)
    assert "trainor.grad_accu=4, but an epoch has 3 batches" in caplog.text
