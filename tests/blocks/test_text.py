from __future__ import annotations

import dataclasses
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    DebertaV2Config,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    RobertaModel,
    T5Config,
)

from tests.datasets.test_text import REPORT, byte_pairs, sentence_pieces, word_pieces
from tests.small_models import TINY_BERT, tiny_encoder, tiny_spec, tiny_tokenizer
from vilmedic.blocks import text
from vilmedic.blocks.pretrained import Filled
from vilmedic.blocks.text import TextEncoder, WordEncoder
from vilmedic.config.load import check_arguments
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.text import word_numbers
from vilmedic.errors import ConfigError

VOCABULARY = tiny_spec().vocab_size


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY_BERT, vocab_size=VOCABULARY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a pooler, like published RoBERTa checkpoints."""
    folder = tmp_path_factory.mktemp("roberta")
    config = RobertaConfig(**TINY_BERT, vocab_size=VOCABULARY, pad_token_id=0)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def report(padded: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.zeros(2, padded, dtype=torch.long)
    ids[0, :8] = torch.tensor([2, 4, 5, 6, 7, 8, 9, 3])
    ids[1, :4] = torch.tensor([2, 9, 5, 3])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean", "max"])
@pytest.mark.parametrize("source", ["random", "bert", "roberta"])
def test_padding_does_not_change_the_embedding(
    source: str, pooling: Any, request: pytest.FixtureRequest
) -> None:
    if source == "random":
        encoder = tiny_encoder(pooling=pooling)
    else:
        proto = str(request.getfixturevalue(source))
        encoder = TextEncoder(spec=tiny_spec(), proto=proto, pooling=pooling)
    encoder.eval()
    short = encoder(**report(8))
    assert short.shape == (2, encoder.hidden_size)
    for padded in (16, 62):
        torch.testing.assert_close(encoder(**report(padded)), short, rtol=0, atol=2e-6)


def test_pooling_modes() -> None:
    encoders = {pooling: tiny_encoder(pooling=pooling) for pooling in ("cls", "mean", "max")}
    states = None
    for encoder in encoders.values():
        encoder.load_state_dict(encoders["cls"].state_dict())
        encoder.eval()
        states = encoder.network(**report()).last_hidden_state
    assert states is not None
    torch.testing.assert_close(encoders["cls"](**report())[1], states[1, 0])
    torch.testing.assert_close(encoders["mean"](**report())[1], states[1, :4].mean(dim=0))
    torch.testing.assert_close(encoders["max"](**report())[1], states[1, :4].amax(dim=0))


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_every_parameter_is_used(pooling: Any) -> None:
    encoder = tiny_encoder(pooling=pooling)
    encoder(**report()).sum().backward()
    assert [name for name, value in encoder.named_parameters() if value.grad is None] == []


def test_random_bert_takes_vocabulary_and_padding_from_the_tokenizer() -> None:
    encoder = tiny_encoder()
    config = encoder.network.config
    assert (config.vocab_size, config.pad_token_id) == (VOCABULARY, 0)
    assert (config.hidden_size, config.num_hidden_layers) == (16, 1)
    assert config._attn_implementation == "sdpa"


def test_published_weights_are_loaded(bert: Path) -> None:
    encoder = TextEncoder(spec=tiny_spec(), proto=str(bert)).eval()
    reference = BertModel.from_pretrained(bert).eval()
    torch.testing.assert_close(encoder(**report()), reference(**report()).pooler_output)


def test_settings_override_those_of_a_published_model(bert: Path) -> None:
    encoder = TextEncoder(spec=tiny_spec(), proto=str(bert), hidden_dropout_prob=0.4)
    assert encoder.network.embeddings.dropout.p == 0.4


def test_missing_pooler_is_logged_in_one_line(
    roberta: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        TextEncoder(spec=tiny_spec(), proto=str(roberta))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("vilmedic")]
    assert len(ours) == 1
    assert "pooler.dense.weight" in ours[0]
    assert "random values" in ours[0]


def test_unused_missing_pooler_is_not_logged(
    roberta: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        TextEncoder(spec=tiny_spec(), proto=str(roberta), pooling="mean")
    assert not [record for record in caplog.records if record.name.startswith("vilmedic")]


def test_frozen_encoder_has_no_gradient_and_no_dropout(bert: Path) -> None:
    encoder = TextEncoder(spec=tiny_spec(), proto=str(bert), freeze=True).train()
    first, second = encoder(**report()), encoder(**report())
    assert not first.requires_grad
    torch.testing.assert_close(first, second)


def test_missing_folder_names_the_searched_path() -> None:
    with pytest.raises(ConfigError) as caught:
        TextEncoder(spec=tiny_spec(), proto="data/SELFSUP/huggingface/biomed_roberta_base")
    message = str(caught.value)
    assert str(Path.cwd() / "data/SELFSUP/huggingface/biomed_roberta_base") in message
    assert "proto: " in message


def test_hub_name_without_network_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as caught:
        TextEncoder(spec=tiny_spec(), proto="nobody/no-such-encoder")
    message = str(caught.value)
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download nobody/no-such-encoder" in message


def test_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not hold a transformers model \(config.json"):
        TextEncoder(spec=tiny_spec(), proto=str(tmp_path))


def test_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    BertConfig(**TINY_BERT, vocab_size=VOCABULARY).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="safetensors"):
        TextEncoder(spec=tiny_spec(), proto=str(tmp_path))


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["pickle", "archive"])
def test_pickled_objects_in_weights_are_an_error_and_never_run(tmp_path: Path, form: str) -> None:
    BertConfig(**TINY_BERT, vocab_size=VOCABULARY).save_pretrained(tmp_path)
    marker, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Runs(marker), protocol=2))
    else:
        torch.save({"w": Runs(marker)}, path)
    with pytest.raises(ConfigError, match=r"Python objects, which are never executed"):
        TextEncoder(spec=tiny_spec(), proto=str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", b""),
        ("pytorch_model.bin", b"\x80\x02}q\x00."),
        ("pytorch_model.bin", b"x"),
        ("pytorch_model.bin", [1, 2]),
        ("pytorch_model.bin", {1: torch.ones(1)}),
        ("pytorch_model.bin", {"embeddings.word_embeddings.weight": 5}),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 8 + b"{}"),
        ("config.json", b"[" * 100_000),
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        ("config.json", b'{"model_type": ["bert"]}'),
        ("config.json", b'{"model_type": "bert", "hidden_size": "x"}'),
    ],
)
def test_damaged_files_of_a_model_are_named(tmp_path: Path, name: str, content: Any) -> None:
    BertModel(BertConfig(**TINY_BERT, vocab_size=VOCABULARY)).save_pretrained(tmp_path)
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ConfigError, match=f"proto: .*{tmp_path}"):
        TextEncoder(spec=tiny_spec(), proto=str(tmp_path))


def test_invalid_settings_of_a_published_model_are_refused(bert: Path) -> None:
    with pytest.raises(ConfigError, match="not a multiple"):
        TextEncoder(spec=tiny_spec(), proto=str(bert), num_attention_heads=7)


def test_settings_that_change_weight_shapes_are_refused(bert: Path) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        TextEncoder(spec=tiny_spec(), proto=str(bert), hidden_size=32)


def test_tokenizer_with_more_ids_than_embeddings(tmp_path: Path) -> None:
    BertModel(BertConfig(**TINY_BERT, vocab_size=5)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"5 embeddings, but the tokenizer gives {VOCABULARY}"):
        TextEncoder(spec=tiny_spec(), proto=str(tmp_path))


def test_vocabulary_set_too_small_for_a_random_bert() -> None:
    with pytest.raises(ConfigError, match=r"larger vocab_size"):
        tiny_encoder(vocab_size=5)


def test_reports_longer_than_the_positions(roberta: Path) -> None:
    with pytest.raises(ConfigError, match=r"BERT has positions for 64 .* reports is 65"):
        tiny_encoder(tiny_spec(max_len=65))
    with pytest.raises(ConfigError, match=r"has positions for 63 .* reports is 64"):
        TextEncoder(spec=tiny_spec(max_len=64), proto=str(roberta))
    longest = TextEncoder(spec=tiny_spec(max_len=63), proto=str(roberta))
    ids = torch.full((1, 63), 5)
    longest(ids, torch.ones_like(ids))


def test_encoder_without_pooler(tmp_path: Path) -> None:
    config = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=VOCABULARY)
    DistilBertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no pooler\. Allowed: cls, mean, max"):
        TextEncoder(spec=tiny_spec(), proto=str(tmp_path))
    encoder = TextEncoder(spec=tiny_spec(), proto=str(tmp_path), pooling="mean")
    assert encoder(**report()).shape == (2, 16)


def test_unknown_setting_names_the_nearest(bert: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'hidden_size'"):
        tiny_encoder(hiden_size=16)
    with pytest.raises(ConfigError, match="Did you mean 'hidden_dropout_prob'"):
        TextEncoder(spec=tiny_spec(), proto=str(bert), hidden_dropout=0.1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"hidden_size": 30, "num_attention_heads": 4}, "multiple"), ({"hidden_size": "x"}, "int")],
)
def test_settings_refused_by_transformers_are_an_error(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"BertConfig refuses these settings: .*{reason}"):
        tiny_encoder(**settings)


def test_unknown_pooling() -> None:
    with pytest.raises(ConfigError, match=r"pooling: given 'meen'.* Did you mean 'mean'"):
        check_arguments(TextEncoder, {"pooling": "meen"})


def test_data_without_reports() -> None:
    with pytest.raises(ConfigError, match=r"^needs reports"):
        tiny_encoder(DataSpec())


SIZES: dict[str, Any] = {**TINY_BERT, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
PADDED: dict[str, Any] = {**SIZES, "pad_token_id": 0}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
FAMILIES: dict[str, Callable[[], Any]] = {
    "BERT": lambda: BertConfig(**SIZES),
    "RoBERTa": lambda: RobertaConfig(**PADDED),
    "DistilBERT": lambda: DistilBertConfig(
        dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=VOCABULARY
    ),
    "MPNet": lambda: MPNetConfig(**PADDED),
    "DeBERTa-v2": lambda: DebertaV2Config(**SIZES, **RELATIVE),
    "ELECTRA": lambda: ElectraConfig(**SIZES, embedding_size=8),
    "ModernBERT": lambda: ModernBertConfig(
        **PADDED, local_attention=4, global_attn_every_n_layers=2, bos_token_id=2, eos_token_id=3
    ),
    "T5": lambda: T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, vocab_size=VOCABULARY
    ),
    "CLIP": lambda: CLIPTextConfig(**SIZES, eos_token_id=3),  # causal attention
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, with weights large enough to tell errors from rounding."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModel.from_config(FAMILIES[request.param]())
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder


def reference_states(folder: Path, layers: int) -> list[torch.Tensor]:
    """The states from the library itself, report by report without padding."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    network = model.get_encoder() if model.config.is_encoder_decoder else model
    states = []
    for ids, mask in zip(*report().values(), strict=True):
        output = network(input_ids=ids[mask == 1].unsqueeze(0), output_hidden_states=True)
        states.append(
            torch.stack(output.hidden_states[-layers:]).sum(dim=0)[0]
            if layers > 1
            else output.last_hidden_state[0]
        )
    return states


@torch.inference_mode()
def test_features_of_every_family_equal_those_of_the_library(family: Path) -> None:
    encoder = TextEncoder(spec=tiny_spec(), proto=str(family), pooling="mean").eval()
    expected = torch.stack([states.mean(dim=0) for states in reference_states(family, 1)])
    assert expected.std() > 0.1
    torch.testing.assert_close(encoder(**report(24)), expected, rtol=0, atol=1e-5)

    words = WordEncoder(spec=tiny_spec(), proto=str(family), last_n_layers=2).eval()
    word_ids = torch.arange(24).expand(2, 24).masked_fill(report(24)["attention_mask"] == 0, -1)
    found = words(**report(24), word_ids=word_ids).words
    for row, states in enumerate(reference_states(family, 2)):
        torch.testing.assert_close(found[row, : len(states)], states, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_expanded_gpu_mask_gives_the_same_without_a_sync(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tested on a CPU; families that do not support such a mask get the plain one."""
    encoder = TextEncoder(spec=tiny_spec(), proto=str(family), pooling="mean").eval()
    expected = encoder(**report(24))
    kernels = encoder.network.config._attn_implementation == "sdpa"
    assert encoder.expands is (kernels and "CLIP" not in type(encoder.network).__name__)
    if not encoder.expands:
        return
    monkeypatch.setattr(encoder, "mask", lambda mask: text.expanded(encoder.network, mask))
    looks: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: looks.append(self) or True)
    found = encoder(**report(24))
    monkeypatch.undo()
    assert looks == []
    torch.testing.assert_close(found, expected)


def test_attention_and_dtype_are_stated(bert: Path) -> None:
    encoder = TextEncoder(spec=tiny_spec(), proto=str(bert))
    assert "attention=sdpa, dtype=torch.float32" in repr(encoder)
    for settings in ({"proto": str(bert)}, {"proto": None, **TINY_BERT}):
        slow = TextEncoder(spec=tiny_spec(), attn_implementation="eager", **settings)
        assert "attention=eager, dtype=torch.float32" in repr(slow)
    with pytest.raises(
        ConfigError, match=r"attn_implementation: given 'flash'; allowed: one of sdpa, eager"
    ):
        check_arguments(TextEncoder, {"proto": str(bert), "attn_implementation": "flash"})


def test_weights_to_be_filled_by_a_checkpoint_are_not_read(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    for build in (TextEncoder, WordEncoder):
        options: dict[str, Any] = {"last_n_layers": 1} if build is WordEncoder else {}
        with pytest.raises(ConfigError, match="does not hold a transformers model"):
            build(spec=tiny_spec(), proto=str(folder), **options)
        filled = build(spec=tiny_spec(), proto=str(folder), filled=Filled(), **options)
        assert filled.hidden_size == 16


LAYERS = {**TINY_BERT, "num_hidden_layers": 3, "hidden_dropout_prob": 0.0}


def encode(tokenizer: Any, reports: list[str], length: int = 48) -> dict[str, torch.Tensor]:
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "word_ids": []}
    for report in reports:
        encoding = tokenizer(report).encodings[0]
        rest = length - len(encoding.ids)
        batch["input_ids"].append(encoding.ids + [tokenizer.pad_token_id] * rest)
        batch["attention_mask"].append([1] * len(encoding.ids) + [0] * rest)
        batch["word_ids"].append(word_numbers(encoding.word_ids) + [-1] * rest)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def slow_words(
    encoder: WordEncoder, batch: dict[str, torch.Tensor], row: int, closing: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Words and report as in the paper's code: token by token, layer by layer."""
    used = int(batch["attention_mask"][row].sum())
    output = encoder.text.network(
        input_ids=batch["input_ids"][row : row + 1, :used], output_hidden_states=True
    )
    layers = output.hidden_states[-encoder.last_n_layers :]
    by_layer = []
    for states in layers:
        words: list[torch.Tensor] = []
        previous = None
        for token in range(used):
            number = int(batch["word_ids"][row, token])
            if number == previous:
                words[-1] = words[-1] + states[0, token]
            else:
                words.append(states[0, token])
            previous = number
        by_layer.append(torch.stack(words))
    report = torch.stack([words.mean(dim=0) for words in by_layer]).sum(dim=0)
    summed = torch.stack(by_layer).sum(dim=0)
    return list(summed[: len(summed) - closing]), report


@pytest.mark.parametrize(
    ("make", "closing"),
    [(word_pieces, 1), (byte_pairs, 1), (sentence_pieces, 1), (tiny_tokenizer, 1)],
)
def test_words_are_sums_of_their_pieces_for_any_tokenizer(make: Any, closing: int) -> None:
    tokenizer = make()
    spec = DataSpec(tokenizer=tokenizer, tokenizer_max_len=48)
    encoder = WordEncoder(spec=spec, last_n_layers=2, **LAYERS).double().eval()
    batch = encode(tokenizer, [REPORT, "effusion", "No heart"])
    encoded = encoder(**batch)
    for row in range(3):
        words, report = slow_words(encoder, batch, row, closing)
        assert int(encoded.mask[row].sum()) == len(words)
        torch.testing.assert_close(encoded.words[row][encoded.mask[row]], torch.stack(words))
        torch.testing.assert_close(encoded.report[row], report)


def test_the_closing_token_is_only_in_the_report_embedding() -> None:
    tokenizer = word_pieces()
    encoder = WordEncoder(
        spec=DataSpec(tokenizer=tokenizer, tokenizer_max_len=48), last_n_layers=2, **LAYERS
    )
    batch = encode(tokenizer, ["pleural effusion."], length=12)
    encoded = encoder.eval()(**batch)
    assert encoded.mask[0].tolist() == [True] * 4 + [False] * 8
    torch.testing.assert_close(encoded.report[0], encoded.words[0, :5].mean(dim=0))
    assert encoded.words[0, 4].abs().sum() > 0
    assert encoded.words[0, 5:].abs().sum() == 0


def test_padding_does_not_change_words() -> None:
    tokenizer = byte_pairs()
    encoder = WordEncoder(
        spec=DataSpec(tokenizer=tokenizer, tokenizer_max_len=64), last_n_layers=3, **LAYERS
    ).eval()
    short, long = (encoder(**encode(tokenizer, [REPORT], length=n)) for n in (40, 64))
    torch.testing.assert_close(long.report, short.report)
    torch.testing.assert_close(long.words[:, :40], short.words)
    assert long.mask.sum() == short.mask.sum()


def test_layers_are_summed() -> None:
    spec = tiny_spec()
    batch = encode(spec.tokenizer, ["small left effusion"], length=8)
    sums = []
    torch.manual_seed(0)
    encoder = WordEncoder(spec=spec, last_n_layers=1, **LAYERS).eval()
    for number in (1, 2, 3):
        encoder.last_n_layers = number
        sums.append(encoder(**batch).words)
    states = encoder.text.network(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
    ).hidden_states
    torch.testing.assert_close((sums[2] - sums[1])[0, :5], states[-3][0, :5])


def test_a_frozen_encoder_does_not_change() -> None:
    encoder = WordEncoder(spec=tiny_spec(), last_n_layers=1, freeze=True, **TINY_BERT).train()
    assert not encoder.text.network.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_tokenizer_without_word_boundaries_is_refused() -> None:
    spec = DataSpec(tokenizer=sentence_pieces(split=False), tokenizer_max_len=16)
    with pytest.raises(ConfigError, match=r"tokenizer of the reports .*one word"):
        WordEncoder(spec=spec, last_n_layers=1, **TINY_BERT)


@pytest.mark.parametrize("number", [0, 5])
def test_missing_layers_are_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=r"last_n_layers.*Allowed: integer from 1 to 3"):
        WordEncoder(spec=tiny_spec(), last_n_layers=number, **LAYERS)


def test_words_without_reports_are_an_error() -> None:
    spec = dataclasses.replace(tiny_spec(), tokenizer=None)
    with pytest.raises(ConfigError, match="needs reports"):
        WordEncoder(spec=spec, **TINY_BERT)


def test_the_first_layers_are_frozen() -> None:
    encoder = TextEncoder(spec=tiny_spec(), freeze=2, **{**LAYERS, "hidden_dropout_prob": 0.5})
    encoder.train()
    trained = {name for name, value in encoder.named_parameters() if value.requires_grad}
    assert trained
    assert all("layer.2." in name or "pooler" in name for name in trained)
    dropouts = dict(encoder.network.named_modules())
    assert not dropouts["encoder.layer.1.output.dropout"].training
    assert not dropouts["embeddings.dropout"].training
    assert dropouts["encoder.layer.2.output.dropout"].training
    with pytest.raises(ConfigError, match=r"freeze: given 4, .*has 3 layers.*or 1 to 3"):
        TextEncoder(spec=tiny_spec(), freeze=4, **LAYERS)


def test_freezing_a_single_layer_network() -> None:
    encoder = TextEncoder(spec=tiny_spec(), freeze=1, **TINY_BERT)
    trained = [name for name, value in encoder.named_parameters() if value.requires_grad]
    assert trained
    assert all(name.startswith("network.pooler.") for name in trained)
    with pytest.raises(ConfigError, match=r"freeze: given 2, .*has 1 layer in.*or 1 to 1"):
        TextEncoder(spec=tiny_spec(), freeze=2, **TINY_BERT)


@pytest.mark.parametrize(("model_type", "counts"), [("fnet", True), ("bert", False)])
def test_a_model_affected_by_padding_is_logged(
    model_type: str, counts: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = AutoConfig.for_model(model_type, **TINY_BERT, vocab_size=tiny_spec().vocab_size)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    TextEncoder(spec=tiny_spec(), proto=str(tmp_path), pooling="mean")
    assert ("does not ignore padding" in caplog.text) == counts
