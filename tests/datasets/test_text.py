from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.small_models import tiny_tokenizer
from vilmedic.datasets.aligned import SampleKey
from vilmedic.datasets.report_text import CLEANERS
from vilmedic.datasets.text import (
    TextDataset,
    has_word_boundaries,
    load_tokenizer,
    special_tokens_around,
    text_hash,
    word_numbers,
)
from vilmedic.errors import ArgumentError, DataError

Args = Callable[..., dict[str, Any]]
Write = Callable[[str, Sequence[str]], Path]


NO_EFFUSION = -5482747047193401504
REPORT = "No pleural effusion. Heart-size is normal"
PIECES = ["effus", "##ion", "pl", "##eu", "##ral", "no", "heart", "-", "size", "is", "normal", "."]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def words(dataset: TextDataset, ids: Sequence[int]) -> str:
    return dataset.tokenizer.decode(ids)


def test_evaluation_uses_the_vocabulary_of_training(text_args: Args, tmp_path: Path) -> None:
    train = TextDataset(**text_args())
    validate = TextDataset(**text_args(split="validate", training=False))
    assert validate.tokenizer.get_vocab() == train.tokenizer.get_vocab()
    again = TextDataset(**text_args(training=False))
    assert again.spec.vocab_size == train.spec.vocab_size
    assert train.spec.tokenizer_max_len == 128
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()


def test_evaluation_before_training_names_the_remedy(text_args: Args) -> None:
    for split, training in (("validate", False), ("train", False)):
        with pytest.raises(DataError, match="Train the run first, or set tokenizer"):
            TextDataset(**text_args(split=split, training=training))


def test_sample_holds_the_cleaned_report(text_args: Args, root: Path) -> None:
    dataset = TextDataset(**text_args(processing="r2gen_clean_report"))
    sample = dataset[SampleKey(0)]
    expected = "[CLS] no pleural effusion . heart size is normal . [SEP]"
    assert words(dataset, sample["ids"]) == expected
    assert not sample["truncated"]
    assert dataset.describe(0) == {"report": "No pleural effusion. Heart size is normal."}
    assert dataset.lines([1]) == [f"{root}/train.report.tok:2"]


def test_batches_are_padded_to_the_longest_report_in_multiples_of_eight(text_args: Args) -> None:
    dataset = TextDataset(**text_args())
    short = dataset.collate([dataset[SampleKey(3)]])
    assert short["input_ids"].shape == (1, 8)
    batch = dataset.collate([dataset[SampleKey(index)] for index in (2, 3)])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [15, 7]
    assert torch.equal(batch["input_ids"][1, :8], short["input_ids"][0])
    assert (batch["input_ids"][1, 7:] == dataset.tokenizer.pad_token_id).all()


def test_long_reports_are_truncated(text_args: Args) -> None:
    dataset = TextDataset(**text_args(tokenizer_max_len=12))
    sample = dataset[SampleKey(2)]
    assert sample["truncated"]
    assert words(dataset, sample["ids"]).endswith("no effusion [SEP]")
    assert dataset.collate([sample])["input_ids"].shape == (1, 12)


def test_encode_text_cleans_like_the_samples(text_args: Args) -> None:
    dataset = TextDataset(**text_args(processing="gloria_clean_report_chexpert"))
    prompts = ["Right upper-lobe pneumonia!", "Zebra seen."]
    batch = dataset.encode_text(prompts)
    assert words(dataset, batch["input_ids"][0, :6]) == "[CLS] right upper lobe pneumonia [SEP]"
    assert batch["input_ids"][0, :6].tolist() == dataset[SampleKey(3)]["ids"]
    assert batch["input_ids"][1, 1] == dataset.tokenizer.unk_token_id


@pytest.mark.parametrize("processing", [None, "r2gen_clean_report", "gloria_clean_report_chexpert"])
def test_sentences_are_drawn_by_seed_epoch_and_sample(
    text_args: Args, processing: str | None
) -> None:
    settings = text_args(sample_sentence=True, processing=processing)
    dataset = TextDataset(**settings)
    drawn = [words(dataset, dataset[SampleKey(2, epoch)]["ids"]) for epoch in range(40)]
    stop = "" if processing == "gloria_clean_report_chexpert" else ". "
    sentences = ("moderate cardiomegaly", "the lungs are clear", "no effusion is seen")
    assert set(drawn) == {f"[CLS] {sentence} {stop}[SEP]" for sentence in sentences}
    again = TextDataset(**settings)
    assert drawn == [words(again, again[SampleKey(2, epoch)]["ids"]) for epoch in range(40)]
    whole = TextDataset(**text_args(sample_sentence=True, processing=processing, training=False))
    assert len(whole[SampleKey(2)]["ids"]) > 9


@pytest.mark.parametrize("processing", [None, *CLEANERS])
def test_shuffled_reports_have_all_sentences_in_another_order(
    text_args: Args, processing: str | None
) -> None:
    settings = text_args(shuffle_sentences=True, processing=processing)
    dataset = TextDataset(**settings)
    assert dataset.random
    drawn = [words(dataset, dataset[SampleKey(2, epoch)]["ids"]) for epoch in range(60)]
    assert len(set(drawn)) == 6  # all orders of three sentences
    whole = TextDataset(**text_args(shuffle_sentences=True, processing=processing, training=False))
    assert not whole.random
    expected = words(whole, whole[SampleKey(2)]["ids"])
    assert expected in drawn
    assert {tuple(sorted(text.split())) for text in drawn} == {tuple(sorted(expected.split()))}
    again = TextDataset(**settings)  # depends on seed, epoch and line, not on order or worker
    assert drawn[7:] == [words(again, again[SampleKey(2, n)]["ids"]) for n in range(7, 60)]
    other = TextDataset(**{**settings, "seed": 2})
    assert drawn != [words(other, other[SampleKey(2, epoch)]["ids"]) for epoch in range(60)]


def test_sampled_sentences_may_be_shuffled_too(text_args: Args) -> None:
    both = TextDataset(**text_args(sample_sentence=True, max_sentences=2, shuffle_sentences=True))
    drawn = {words(both, both[SampleKey(2, epoch)]["ids"]) for epoch in range(60)}
    assert len(drawn) == 9  # one of three, or two in either order


def test_several_cleaners_are_applied_in_order(
    text_args: Args, write: Write, tmp_path: Path
) -> None:
    write(
        "train.report.tok", ["Stable cardiomegaly since ___. No effusion.", "Clear; seen by ___."]
    )
    chain = ["remove_prior_references", "remove_deidentification", "r2gen_clean_report"]
    dataset = TextDataset(**text_args(processing=chain))
    assert list(dataset.cleaned) == ["cardiomegaly . no effusion .", "clear seen ."]
    prompt = dataset.encode_text(["Stable cardiomegaly since ___. No effusion."])
    assert prompt["input_ids"][0].tolist() == dataset.collate([dataset[0]])["input_ids"][0].tolist()
    assert "cardiomegaly" in dataset.words("Unchanged cardiomegaly.")
    assert "unchanged" not in dataset.words("Unchanged cardiomegaly.")
    assert dataset.tokenizer.get_vocab().keys().isdisjoint({"stable", "since"})
    settings = json.loads((tmp_path / "run" / "tokenizer" / "vocabulary.json").read_text())
    assert settings["processing"] == chain
    with pytest.raises(DataError, match="other processing"):
        TextDataset(**text_args(processing=chain[:2]))


def test_a_list_of_one_cleaner_equals_that_cleaner(text_args: Args) -> None:
    one = TextDataset(**text_args(processing="ifcc_clean_report"))
    listed = TextDataset(**text_args(processing=["ifcc_clean_report"]))  # with the same vocabulary
    assert list(listed.cleaned) == list(one.cleaned)
    assert listed.reports.processing == "ifcc_clean_report"
    assert TextDataset.__init__.__kwdefaults__["processing"] is None


def test_draws_of_several_sentences_keep_their_order(text_args: Args) -> None:
    dataset = TextDataset(**text_args(sample_sentence=True, max_sentences=2))
    drawn = {words(dataset, dataset[SampleKey(2, epoch)]["ids"]) for epoch in range(80)}
    singles = {text for text in drawn if text.count(".") == 1}
    assert len(singles) == 3
    assert len(drawn) == 6
    order = ["cardiomegaly", "clear", "effusion"]
    for text in drawn - singles:
        places = [text.lower().index(word) for word in order if word in text.lower()]
        assert len(places) == 2
        assert places == sorted(places)


def test_reports_that_cleaning_empties_are_an_error(text_args: Args, write: Write) -> None:
    write("train.report.tok", ["No effusion."] * 150 + ["___"] + ["Heart is normal."] * 49)
    settings = {"processing": "r2gen_clean_report"}
    with pytest.raises(DataError, match=r"1 report: \S+train\.report\.tok:151: '___' with nothing"):
        TextDataset(**text_args(**settings))
    dataset = TextDataset(**text_args(**settings, on_error="skip"))
    assert len(dataset) == 199
    assert dataset.lines([150]) == [dataset.texts.where(151)]


def test_unknown_processing_names_the_nearest(text_args: Args) -> None:
    with pytest.raises(ValueError, match="Did you mean 'r2gen_clean_report'"):
        TextDataset(**text_args(processing="r2gen_clean_reports"))


def test_tokenizer_from_a_folder(text_args: Args, tmp_path: Path) -> None:
    made = TextDataset(**text_args())
    made.tokenizer.save_pretrained(tmp_path / "mine")
    dataset = TextDataset(**text_args(tokenizer=str(tmp_path / "mine"), run_dir=tmp_path / "other"))
    assert dataset[SampleKey(1)] == made[SampleKey(1)]
    assert not (tmp_path / "other").exists()


def test_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the folder holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_missing_tokenizer_names_its_key(text_args: Args, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        TextDataset(**text_args(tokenizer=str(tmp_path / "nowhere")))
    assert list(caught.value.arguments) == ["tokenizer"]
    assert "there is no such folder" in caught.value.arguments["tokenizer"]


def test_tokenizer_without_padding(text_args: Args, tmp_path: Path) -> None:
    tokenizer = TextDataset(**text_args()).tokenizer
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no padding token"):
        load_tokenizer(str(tmp_path / "bare"))


def test_a_tokenizer_with_python_code_is_read_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("a question was asked"))
    tiny_tokenizer().save_pretrained(tmp_path)
    trace = tmp_path / "executed"
    (tmp_path / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    own = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": own}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own-bert"}))

    tokenizer = load_tokenizer(str(tmp_path))

    assert tokenizer("no acute effusion .").input_ids == [2, 4, 5, 11, 14, 3]
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    assert tokenizer.special_tokens_map == roles
    assert "not executed; its tokenizer.json is used, with " in caplog.text
    assert "pad_token [PAD]" in caplog.text
    assert not trace.exists()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"never executed\. Without it a tokenizer needs"):
        load_tokenizer(str(tmp_path))
    assert not trace.exists()


def test_an_empty_report_writes_no_vocabulary(
    text_args: Args, write: Write, tmp_path: Path
) -> None:
    write("train.report.tok", ["No effusion.", "...", "Lungs are clear."])
    with pytest.raises(DataError, match=r"1 report.* with nothing left after processing"):
        TextDataset(**text_args(processing="gloria_clean_report_chexpert"))
    assert not (tmp_path / "run" / "tokenizer").exists()


def word_pieces() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {piece: number for number, piece in enumerate([*specials, *PIECES])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def byte_pairs() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([REPORT] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def sentence_pieces(*, split: bool = True) -> PreTrainedTokenizerFast:
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁No": -2.0, "▁pleural": -3.0}
    letters = dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzNH.-", -9.0)
    tokenizer = Tokenizer(models.Unigram(list((scores | letters).items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


Make = Callable[[], PreTrainedTokenizerFast]


@pytest.fixture
def dataset(text_args: Callable[..., dict[str, Any]], tmp_path: Any) -> Callable[..., TextDataset]:
    def make(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> TextDataset:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return TextDataset(**text_args(tokenizer=str(tmp_path / "tokenizer"), **changes))

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (word_pieces, "[CLS] No pleural effusion . Heart - size is normal [SEP]"),
        (byte_pairs, "<s> No pleural effusion . Heart - size is normal </s>"),
        (sentence_pieces, "No pleural effusion. Heart-size is normal </s>"),
        (tiny_tokenizer, "[CLS] No pleural effusion . Heart - size is normal [SEP]"),
    ],
)
def test_word_ids_match_the_words_of_the_report(
    dataset: Callable[..., TextDataset], make: Make, words: str
) -> None:
    data = dataset(make())
    assert data.words(REPORT) == words.split()
    batch = data.encode_text([REPORT, "No"])
    used = batch["attention_mask"].bool()
    assert (batch["word_ids"][~used] == -1).all()
    numbers = batch["word_ids"][0, used[0]].tolist()
    assert sorted(set(numbers)) == list(range(len(words.split())))
    assert numbers == sorted(numbers)


def test_pieces_of_a_word_share_its_word_id(dataset: Callable[..., TextDataset]) -> None:
    data = dataset(word_pieces())
    batch = data.encode_text(["pleural effusion."])
    assert data.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])[:8] == [
        *("[CLS]", "pl", "##eu", "##ral", "effus", "##ion", ".", "[SEP]")
    ]
    assert batch["word_ids"][0].tolist() == [0, 1, 1, 1, 2, 2, 3, 4]


def test_samples_and_prompts_have_the_same_words(dataset: Callable[..., TextDataset]) -> None:
    data = dataset(byte_pairs())
    batch = data.collate([data[SampleKey(0)], data[SampleKey(3)]])
    again = data.encode_text([data.describe(0)["report"], data.describe(3)["report"]])
    assert batch["word_ids"].tolist() == again["word_ids"].tolist()


def test_a_truncated_report_keeps_its_closing_token(dataset: Callable[..., TextDataset]) -> None:
    data = dataset(word_pieces(), tokenizer_max_len=6)
    assert data.encode_text(["pleural effusion."])["word_ids"].tolist() == [[0, 1, 1, 1, 2, 3]]
    assert data.words("pleural effusion.") == ["[CLS]", "pleural", "effus", "[SEP]"]


def test_two_special_tokens_are_two_words() -> None:
    assert word_numbers([None, None, 0, 0, 1, None, None]) == [0, 1, 2, 2, 3, 4, 5]


def test_special_tokens_and_word_boundaries_are_known() -> None:
    assert special_tokens_around(word_pieces()) == (1, 1)
    assert special_tokens_around(sentence_pieces()) == (0, 1)
    for make in (word_pieces, byte_pairs, sentence_pieces, tiny_tokenizer):
        assert has_word_boundaries(make())
    assert not has_word_boundaries(sentence_pieces(split=False))


def test_reports_with_equal_tokens_have_the_same_hash(text_args: Args, write: Write) -> None:
    lines = ["No  effusion!", "no effusion", "Large effusion.", "no effusion . heart normal"]
    write("train.report.tok", lines)
    data = TextDataset(**text_args(processing="multilingual_clean_report"))
    samples = [data[SampleKey(number)] for number in range(4)]
    assert "report_hash" not in data.collate(samples)
    data.hashes = True
    samples = [data[SampleKey(number)] for number in range(4)]
    hashes = data.collate(samples)["report_hash"]
    assert hashes.dtype == torch.int64
    # The hash is compared between machines, so it must not depend on the process.
    assert hashes[:2].tolist() == [text_hash("no effusion")] * 2 == [NO_EFFUSION] * 2
    assert len(set(hashes.tolist())) == 3


def test_reports_truncated_to_the_same_text_have_the_same_hash(
    dataset: Callable[..., TextDataset],
) -> None:
    data = dataset(word_pieces(), tokenizer_max_len=6)
    data.hashes = True
    cut, whole = data.reports.tokens("pleural effusion."), data.reports.tokens("pleural effus")
    assert ("pleural effusion."[: cut["end"]], cut["truncated"]) == ("pleural effus", True)
    assert ("pleural effus"[: whole["end"]], whole["truncated"]) == ("pleural effus", False)


def test_hashes_are_of_the_sampled_sentence(text_args: Args) -> None:
    data = TextDataset(**text_args(sample_sentence=True, processing=None))
    data.hashes = True
    samples = [data[SampleKey(2, epoch)] for epoch in range(20)]
    drawn = {words(data, sample["ids"]): sample["hash"] for sample in samples}
    assert len(set(drawn.values())) == len(drawn) > 1


def test_the_hash_does_not_depend_on_sentence_order(text_args: Args) -> None:
    data = TextDataset(**text_args(shuffle_sentences=True))
    data.hashes = True
    samples = [data[SampleKey(2, epoch)] for epoch in range(20)]
    assert len({words(data, sample["ids"]) for sample in samples}) > 1
    assert len({sample["hash"] for sample in samples}) == 1
