from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

import vilmedic
from tests.crash.systems import CONVIRT, DALLE, GLORIA, SIMCLR, SYSTEMS, VAE, System
from tests.finished_runs import EVALUATION, ROOT, Runs
from tests.models.test_original_checkpoints import head, image_part, text_part
from tests.older_files import write_dalle_pytorch_dalle, write_vilmedic
from tests.small_dalles import TINY_TRANSFORMER, save_vae, tiny_dalle
from tests.small_dalles import TINY_VAE as VAE_OF_DALLE
from tests.small_models import TINY_BERT, TINY_VAE, WORDS, tiny_spec, tiny_tokenizer, tiny_vae
from vilmedic.config.sections import GenerationSection
from vilmedic.errors import CheckpointError, ConfigError, DataError, VilmedicError
from vilmedic.evaluation.local_features import LocalFeatures
from vilmedic.generation.generate import generate_images, token_drawing
from vilmedic.run import write_pages

PROMPTS = str(ROOT / "config/phantom/prompts-impression.yml")
TEXTS = ["Large left pleural effusion.", "Clear lungs and a heart of normal size."]
ABILITIES = {
    "ConVIRT": {"embed_images", "embed_texts", "similarity", "zero_shot"},
    "SimCLR": {"embed_images"},
    "GLoRIA": {
        *("embed_images", "embed_texts", "similarity", "zero_shot"),
        *("local_similarity", "attention"),
    },
    "VAE": {"encode", "decode", "reconstruct"},
    "DALLE": {"encode", "decode", "reconstruct", "generate"},
}


PLAIN = "~ensemblor.post_processing"  # skip the plots of the contrastive systems


def evaluate(trained: Runs, system: System, *words: str) -> dict[str, Any]:
    """The results on the test split with the given overrides."""
    config, *rest = trained.words(system)
    if system is SIMCLR:
        config = str(ROOT / "config/phantom/simclr-eval.yml")
        rest = [word for word in rest if not word.startswith("dataset.")]
        rest += [f"dataset.{part}.root={trained.data}" for part in ("image", "label")]
        rest += ["dataset.image.resize=32", "dataset.image.crop=32"]
    path = trained(system)
    words = (*EVALUATION, PLAIN, f"ckpt_dir={path.parent}", *words)
    return vilmedic.evaluate(config, *rest, *words)["test"]


def representation(trained: Runs, system: System, *words: str) -> dict[str, np.ndarray]:
    """The output of save_representation for the test split."""
    saved = evaluate(
        trained, system, "ensemblor.metrics={}", "ensemblor.post_processing={save_representation: }"
    )
    folder = trained(system) / "evaluations" / saved["evaluation"]
    with np.load(folder / "test_representation.npz") as arrays:
        return dict(arrays)


def unit(rows: np.ndarray) -> Tensor:
    return functional.normalize(torch.from_numpy(rows), dim=1)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_load_returns_the_trained_model(trained: Runs, system: System) -> None:
    model = vilmedic.load(trained(system))
    assert set(model.abilities) == ABILITIES[system.name]
    assert not any(module.training for module in model.model.modules())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    for name in set().union(*ABILITIES.values()) - ABILITIES[system.name]:
        given = {"decode": [torch.zeros(1, 4)], "zero_shot": [[], {}]}
        given |= {"similarity": [[], []], "attention": ["", ""], "local_similarity": [[], []]}
        with pytest.raises(VilmedicError, match=f"{system.name} has no {name}. It has ") as caught:
            getattr(model, name)(*given.get(name, [[]]))
        assert all(able in str(caught.value) for able in ABILITIES[system.name])


@pytest.mark.parametrize("system", [CONVIRT, SIMCLR, GLORIA], ids=lambda system: system.name)
def test_embeddings_equal_those_of_save_representation(trained: Runs, system: System) -> None:
    saved = representation(trained, system)
    model = vilmedic.load(trained(system), device="cpu")
    paths = trained.images()
    for name in ("visual", "visual_backbone"):
        expected = unit(saved[name])
        found = model.embed_images(paths, features=name, batch_size=4)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), name
        plain = model.embed_images(paths, features=name, batch_size=4, normalize=False)
        assert np.array_equal(plain.numpy(), saved[name]), name
        for size in (1, 3, 32):
            found = model.embed_images(paths, features=name, batch_size=size)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        order = [7, 0, 3, 3]
        found = model.embed_images([paths[i] for i in order], features=name, batch_size=3)
        torch.testing.assert_close(found, expected[order], atol=1e-5, rtol=0)
    assert expected.std(dim=0).max() > 1e-3  # rows differ
    if "linguistic" in saved:
        texts = model.embed_texts(trained.reports(), batch_size=4)
        assert torch.equal(texts, unit(saved["linguistic"]))
        cosines = model.similarity(paths, trained.reports())
        wanted = unit(saved["visual"]) @ unit(saved["linguistic"]).T
        torch.testing.assert_close(cosines, wanted, atol=1e-5, rtol=0)
        rows = model.embed_images(paths, normalize=False), model.embed_texts(trained.reports())
        torch.testing.assert_close(model.similarity(*rows), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("system", "similarity"),
    [(CONVIRT, "global"), (GLORIA, "global"), (GLORIA, "local"), (GLORIA, "both")],
    ids=lambda one: getattr(one, "name", one),
)
def test_zero_shot_scores_equal_those_of_the_metric(
    trained: Runs, system: System, similarity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def report_classes(scores: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        seen.append(scores(slice(None)))
        return {"classes": {}}

    monkeypatch.setattr("vilmedic.metrics.classification.report_classes", report_classes)
    settings = f"prompts: {PROMPTS}, similarity: {similarity}, on_missing: skip"
    evaluate(trained, system, f"ensemblor.metrics={{zero_shot: {{{settings}}}}}")
    model = vilmedic.load(trained(system), device="cpu")
    found = model.zero_shot(trained.images(), PROMPTS, similarity=similarity)  # type: ignore[arg-type]
    [scores] = seen
    np.testing.assert_allclose(found.numpy(), scores, atol=1e-5)
    assert np.ptp(scores, axis=0).min() > 1e-4  # images differ
    if similarity == "global":
        rows = model.embed_images(trained.images())
        torch.testing.assert_close(model.zero_shot(rows, PROMPTS), found, atol=1e-5, rtol=0)
        own = {"mine": {"positive": TEXTS[:1], "negative": TEXTS[1:]}}
        cosines = model.similarity(rows, TEXTS)
        wanted = cosines[:, :1] - cosines[:, 1:]
        torch.testing.assert_close(model.zero_shot(rows, own), wanted, atol=1e-5, rtol=0)


def test_malformed_prompts_are_refused(trained: Runs, tmp_path: Path) -> None:
    model = vilmedic.load(trained(CONVIRT))
    rows = torch.ones(1, 8)
    for wrong in ({}, {"a": "yes"}, {"a": {"positive": ["x"]}}, {"a": {"positive": "x"}}):
        with pytest.raises(DataError, match=r"Expected: \{class: \{positive"):
            model.zero_shot(rows, wrong)
    with pytest.raises(ConfigError, match=r"there is no file .*none\.yml"):
        model.zero_shot(rows, tmp_path / "none.yml")


def test_gloria_local_similarity_equals_that_of_the_metrics(
    trained: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}
    for name in ("similarity", "attention"):
        own = getattr(LocalFeatures, name)

        def kept(self: Any, *given: Any, own: Any = own, name: str = name) -> Any:
            found[name] = given, own(self, *given)
            return found[name][1]

        monkeypatch.setattr(LocalFeatures, name, kept)
    metrics = f"retrieval: {{similarity: local}}, pointing_game: {{root: '{trained.data}'}}"
    evaluate(trained, GLORIA, f"ensemblor.metrics={{{metrics}}}")
    model = vilmedic.load(trained(GLORIA), device="cpu")
    (_, texts, aggregation), expected = found["similarity"]
    similarity = model.local_similarity(
        trained.images(), list(texts), aggregation=aggregation, batch_size=4
    )
    torch.testing.assert_close(similarity, expected, atol=1e-5, rtol=1e-5)
    (dataset, indices), maps = found["attention"]
    assert len(maps) > 1
    for index, expected in zip(indices, maps, strict=True):
        report = dataset.describe(index)["report"]
        attention = model.attention(trained.images()[index], report)
        assert attention.words == dataset.words(report)[: len(expected)]
        torch.testing.assert_close(attention.maps, expected, atol=1e-6, rtol=1e-4)


def test_parts_are_plain_modules(trained: Runs) -> None:
    model = vilmedic.load(trained(CONVIRT))
    image = model.preprocess(trained.images()[0])
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
    features = model.image_encoder(image[None])
    expected = model.embed_images(
        trained.images()[:1], features="visual_backbone", normalize=False, device="cpu"
    )
    torch.testing.assert_close(features.flatten(1), expected)
    assert isinstance(model.text_encoder, torch.nn.Module)
    assert model.labels
    with pytest.raises(VilmedicError, match=r"SimCLR has no text encoder\. It has embed_images"):
        _ = vilmedic.load(trained(SIMCLR)).text_encoder


def test_a_vae_encodes_and_decodes(trained: Runs) -> None:
    model = vilmedic.load(trained(VAE), device="cpu")
    paths = trained.images()
    codes = model.encode(paths, batch_size=4)
    assert (codes.shape, codes.dtype) == ((len(paths), 64), torch.int64)
    assert torch.equal(codes, model.encode(paths, batch_size=1))
    images = model.decode(codes, batch_size=3)
    assert images.shape == (len(paths), 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, model.reconstruct(paths, batch_size=3))
    own = model.model.get_codebook_indices(torch.stack([model.preprocess(p) for p in paths]))
    assert torch.equal(codes, own)
    for wrong in (codes + 24, -codes - 1):
        with pytest.raises(DataError, match="the codebook has 24, numbered from 0"):
            model.decode(wrong)
    for wrong in (codes.float(), codes[0], codes[:0]):
        with pytest.raises(DataError, match=r"decode: given .* allowed: codes as whole numbers"):
            model.decode(wrong)
    with pytest.raises(DataError, match="square"):
        model.decode(codes[:, :5])


def test_dalle_generates_the_same_images_as_the_command(trained: Runs) -> None:
    prompts = [*TEXTS, "Large left zebra."]
    config, *words = trained.words(DALLE)
    options = ["num_images=3", "seed=11", "temperature=0.9", "top_p=0.95", "cond_scale=2.0"]
    options += [f"prompt=[{', '.join(prompts)}]", "generate_images=True", "filter_thres=0.5"]
    path = trained(DALLE)
    arguments = [*EVALUATION, "ensemblor.batch_size=2", *(f"ensemblor.{one}" for one in options)]
    vilmedic.evaluate(config, *words, *arguments)
    model = vilmedic.load(path, device="cpu")
    sampling = {"temperature": 0.9, "top_p": 0.95, "cond_scale": 2.0, "filter_thres": 0.5}
    for text in prompts:
        [folder] = [
            found.parent
            for found in path.glob("evaluations/*/generated/*/settings.json")
            if json.loads(found.read_text())["report"] == text
        ]
        made = model.generate(text, num_images=3, seed=11, batch_size=2, **sampling)  # type: ignore[arg-type]
        for number, image in enumerate(made, start=1):
            with Image.open(folder / f"{number}.png") as expected:
                assert image.mode == expected.mode
                assert np.array_equal(np.asarray(image), np.asarray(expected)), (text, number)
    different = model.generate(prompts[0], num_images=1, seed=12, **sampling)  # type: ignore[arg-type]
    first = model.generate(prompts[0], num_images=1, seed=11, **sampling)  # type: ignore[arg-type]
    assert np.asarray(first[0]).tolist() != np.asarray(different[0]).tolist()
    with pytest.raises(ConfigError, match="temperature"):
        model.generate("x", temperature=-1.0)
    with pytest.raises(ConfigError, match="num_images"):
        model.generate("x", num_images=0)


# -- loading runs from elsewhere


def embedding(path: Path, trained: Runs) -> Tensor:
    model = vilmedic.load(path, device="cpu")
    return torch.cat([model.embed_images(trained.images()), model.embed_texts(TEXTS)])


def test_moved_runs_and_single_checkpoints_load(trained: Runs, tmp_path: Path) -> None:
    run_dir = trained(CONVIRT)
    expected = embedding(run_dir, trained)
    shutil.copytree(run_dir, tmp_path / "a" / "copy")
    assert torch.equal(embedding(tmp_path / "a" / "copy", trained), expected)
    [best] = run_dir.glob("[0-9]*.pth")
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(best, tmp_path / "alone" / "model.pth")
    assert torch.equal(embedding(alone, trained), expected)
    assert vilmedic.load(alone).labels == vilmedic.load(run_dir).labels
    assert torch.equal(embedding(tmp_path / "alone", trained), expected)  # the only file there


def test_a_run_loads_without_the_data(tmp_path: Path, trained: Runs) -> None:
    own = Runs(tmp_path / "data", tmp_path / "ckpt")
    shutil.copytree(trained.data, own.data)
    run_dir = own(CONVIRT)
    shutil.rmtree(own.data)
    shutil.rmtree(run_dir / "tokenizer")
    assert embedding(run_dir, trained).isfinite().all()


def test_a_run_loads_without_its_text_encoder_folder(trained: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(**TINY_BERT, vocab_size=len(tokenizer))).save_pretrained(folder)
    config, *words = trained.words(CONVIRT)
    words = [word for word in words if not word.startswith("model.encoder.")]
    words += [f"model.encoder.proto={folder}", f"dataset.seq.tokenizer={folder}"]
    words += ["trainor.epochs=1", f"ckpt_dir={tmp_path}", "name=bert"]
    removed = [f"~model.encoder.{key}" for key in TINY_BERT if key != "max_position_embeddings"]
    run = vilmedic.train(config, *words, *removed)
    assert run.best is not None
    shutil.rmtree(folder)
    moved = shutil.move(run.best, tmp_path / "moved.pth")
    assert embedding(moved, trained).isfinite().all()


def test_dalle_loads_without_the_run_of_its_vae(trained: Runs, tmp_path: Path) -> None:
    config, *words = trained.words(VAE)
    vae = vilmedic.train(config, *words, "trainor.epochs=1", f"ckpt_dir={tmp_path}", name="vae")
    config, *words = trained.words(DALLE)
    words = [word for word in words if not word.startswith("model.vae.")]
    words += [
        *(
            f"model.vae.{key}={value}"
            for key, value in vae.load().config["model"].items()
            if key in ("num_layers", "num_tokens", "codebook_dim", "hidden_dim")
        ),
        "model.vae.image_size=32",
        "model.vae.num_resnet_blocks=1",
        "dataset.image.resize=32",
        "dataset.image.crop=32",
        f"model.vae.ckpt={vae.directory}",
        f"ckpt_dir={tmp_path}",
        "trainor.epochs=1",
    ]
    dalle = vilmedic.train(config, *words, name="dalle")
    assert dalle.best is not None
    expected = dalle.load(device="cpu").generate(TEXTS[0], num_images=2)
    shutil.rmtree(vae.directory)
    moved = shutil.move(dalle.best, tmp_path / "moved.pth")
    model = vilmedic.load(moved, device="cpu")
    for one, other in zip(model.generate(TEXTS[0], num_images=2), expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert model.encode(trained.images()).shape == (10, 64)


def test_loads_a_folder_of_the_original_vilmedic(trained: Runs, tmp_path: Path) -> None:
    """One .pth without configuration, `config.yml` with older keys, and a word list."""
    folder = tmp_path / "selfsup" / "convirt"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    original = torch.nn.Module()
    original.linguistic, original.visual = text_part(pooler=True), image_part()
    original.vis_proj, original.lin_proj = head(512), head(16)
    original.eval()
    path = folder / "0.31_7_99.pth"
    torch.save({"model": original.state_dict()}, path)
    image = {"root": "gone", "file": "image.tok", "load_memory": False, "resize": 40, "crop": 32}
    seq = {"root": "gone", "file": "report.tok", "tokenizer": None, "tokenizer_max_len": 16}
    text = {"proto": None, **TINY_BERT, "num_hidden_layers": 2}
    config = {
        "dataset": {"proto": "ImSeq", "image": image, "seq": {**seq, "source": "src"}},
        "model": {
            "proto": "ConVIRT",
            "encoder": {**text, "add_pooling_layer": False},
            "cnn": {"proto": "CNN", "backbone": "resnet18", "pretrained": True},
            "projection": {
                "visual_embedding_dim": 512,
                "textual_embedding_dim": 16,
                "projection_dim": 8,
            },
            "loss": {"proto": "ConVIRTLoss", "tau": 0.1, "lambda_": 0.75},
        },
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match="was saved without its vocabulary"):
        vilmedic.load(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    (folder / "vocab.src").write_text("\n".join(words))
    for source in (folder, path):
        model = vilmedic.load(source, device="cpu")
        found = model.embed_images(trained.images(), normalize=False)
        shown = torch.stack([model.preprocess(image) for image in trained.images()])
        assert shown.shape == (10, 3, 32, 32)
        with torch.inference_mode():
            expected = original.vis_proj(original.visual.cnn(shown).flatten(1))
            ids = torch.tensor([[words.index(word) for word in ("no", "acute", "effusion")]])
            first = original.linguistic.encoder(ids).last_hidden_state[:, 0]
            pooled = original.linguistic.pooler.dense(first).tanh()
            texts = original.lin_proj(pooled)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        one = model.embed_texts("no acute effusion", normalize=False)
        torch.testing.assert_close(one, texts, rtol=1e-4, atol=1e-4)


def write_config(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


def test_original_checkpoints_with_transform_code_are_refused(
    trained: Runs, tmp_path: Path
) -> None:
    vae = tiny_vae(seed=3)
    write_vilmedic(tmp_path / "vae.pth", vae, TINY_VAE)
    with pytest.raises(CheckpointError, match=r"custom_transform_train: it is Python code.*mean: "):
        vilmedic.load(tmp_path / "vae.pth")
    pixels = {"resize": 16, "crop": 16, "mean": [0], "std": [1]}
    config = write_config(
        tmp_path / "vae.yml",
        dataset={"proto": "ImageDataset", "root": "gone", **pixels},
        model={"proto": "VAE", **TINY_VAE},
    )
    model = vilmedic.load(tmp_path / "vae.pth", config=config, device="cpu")
    shown = torch.stack([model.preprocess(image) for image in trained.images()])
    assert torch.equal(model.encode(trained.images()), vae.get_codebook_indices(shown))
    state = torch.load(trained(VAE) / "last_3.pth", weights_only=True)
    del state["config"]["dataset"]["mean"], state["config"]["dataset"]["std"]
    torch.save(state, tmp_path / "mean.pth")
    with pytest.raises(CheckpointError, match=r"has mean=\[0.485, .* but VAE works with \[0\] or"):
        vilmedic.load(tmp_path / "mean.pth")


def test_loads_dalle_pytorch_files(trained: Runs, tmp_path: Path) -> None:
    """They hold the shape of the model; a configuration gives the rest."""
    dalle = tiny_dalle(save_vae(tmp_path / "vae.pth"))
    told = {**TINY_TRANSFORMER, "num_text_tokens": 4 + len(WORDS), "attn_types": ("full",)}
    told |= {"shift_tokens": True, "rotary_emb": True, "stable": False}
    path = tmp_path / "dalle.pt"
    write_dalle_pytorch_dalle(path, dalle.state_dict(), hparams=told, vae_params=VAE_OF_DALLE)
    with pytest.raises(CheckpointError, match=r"dalle\.pt: holds weights without the config"):
        vilmedic.load(path)
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    pixels = {"resize": 16, "crop": 16, "mean": [0], "std": [1]}
    seq = {"root": "gone", "tokenizer": str(tmp_path / "words"), "tokenizer_max_len": 6}
    sections: dict[str, Any] = {
        "dataset": {"proto": "ImSeq", "image": {"root": "gone", **pixels}, "seq": seq},
        "model": {"proto": "DALLE", "vae": {"ckpt": str(path)}, "dalle": TINY_TRANSFORMER},
    }
    config = write_config(tmp_path / "dalle.yml", **sections)
    model = vilmedic.load(path, config=config, device="cpu")
    shown = torch.stack([model.preprocess(image) for image in trained.images()])
    assert torch.equal(model.encode(trained.images()), dalle.vae.get_codebook_indices(shown))
    images = model.generate("no acute effusion", num_images=2, seed=5)
    assert [image.size for image in images] == [(16, 16)] * 2
    settings = GenerationSection(generate_images=True, num_images=2, prompt="no acute effusion")
    ids = tiny_spec(6).tokenizer("no acute effusion", return_tensors="pt")  # type: ignore[misc]
    batch = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
    with token_drawing([dalle.eval()], settings, "fp32") as drawing:
        expected = generate_images(
            drawing, batch, "no acute effusion", num_images=2, seed=5, batch_size=32
        ).mean(dim=1)
    for image, one in zip(images, expected, strict=True):
        np.testing.assert_allclose(np.asarray(image), one.numpy() * 255, atol=1)
    sections["model"]["dalle"] = {**TINY_TRANSFORMER, "shift_tokens": False}
    config = write_config(tmp_path / "other.yml", **sections)
    with pytest.raises(CheckpointError, match="shift_tokens is True, the configuration says False"):
        vilmedic.load(path, config=config)


def test_older_checkpoints_name_what_is_missing(trained: Runs, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained(CONVIRT), tmp_path / "run")
    expected = embedding(run_dir, trained)
    [best] = run_dir.glob("[0-9]*.pth")
    state = torch.load(best, weights_only=True)
    older = {name: value for name, value in state.items() if name not in ("data", "networks")}
    torch.save(older, best)
    assert torch.equal(embedding(run_dir, trained), expected)  # the vocabulary is beside it
    shutil.copy(best, tmp_path / "alone.pth")
    with pytest.raises(CheckpointError, match=r"alone\.pth: was saved without its vocabulary"):
        vilmedic.load(tmp_path / "alone.pth")
    torch.save({"model": state["model"]}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth: .*without the configuration"):
        vilmedic.load(tmp_path / "weights.pth")
    torch.save(older | {"data": {"tokenizer": 3}}, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=r"damaged\.pth: is damaged"):
        vilmedic.load(tmp_path / "damaged.pth")
    torch.save(state | {"model": {}}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"empty\.pth: "):
        vilmedic.load(tmp_path / "empty.pth")


def test_non_paths_are_refused() -> None:
    for wrong in (None, 3, b"run"):
        with pytest.raises(CheckpointError, match=r"load: given .*, allowed: a run directory or a"):
            vilmedic.load(wrong)  # type: ignore[arg-type]
        for call in (vilmedic.train, vilmedic.evaluate):
            with pytest.raises(ConfigError, match=r"config: given .*, allowed: a YAML file"):
                call(wrong)  # type: ignore[operator]
        with pytest.raises(DataError, match=r"images_in: given .*, allowed: a folder"):
            vilmedic.images_in(wrong)  # type: ignore[arg-type]
    for wrong in ("a\0b", "a" * 5000):
        with pytest.raises(CheckpointError, match="there is no such run directory or checkpoint"):
            vilmedic.load(wrong)
        with pytest.raises(DataError, match="there is no such folder"):
            vilmedic.images_in(wrong)
    with pytest.raises(ConfigError, match="given 3, allowed: words such as 'key=value'"):
        vilmedic.train("config.yml", 3)  # type: ignore[arg-type]


def test_folders_without_a_run_are_refused(trained: Runs, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such run directory"):
        vilmedic.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no checkpoint with a score"):
        vilmedic.load(tmp_path)
    for name, content in (("a.txt", b"hello"), ("b.pth", b""), ("c.pth", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            vilmedic.load(tmp_path / name)
    shutil.copy(trained.images()[0], tmp_path / "image.pth")
    with pytest.raises(CheckpointError, match=r"image\.pth"):
        vilmedic.load(tmp_path / "image.pth")
    run_dir = trained(CONVIRT)
    with pytest.raises(CheckpointError, match=r"last_7\.pth"):
        vilmedic.load(run_dir, ckpt="last_7.pth")
    [best] = run_dir.glob("[0-9]*.pth")
    with pytest.raises(CheckpointError, match="has no meaning"):
        vilmedic.load(best, ckpt="last_3.pth")
    for device in ("tpu", 3):
        with pytest.raises(ConfigError, match=f"device: given '{device}'"):
            vilmedic.load(run_dir, device=device)  # type: ignore[arg-type]
    assert vilmedic.load(run_dir, device=torch.device("cpu")).device == torch.device("cpu")
    with pytest.raises(ConfigError, match=rf"config: {best} holds its configuration"):
        vilmedic.load(best, config=run_dir / "config_3.yml")


def test_checkpoint_and_ema_can_be_selected(trained: Runs) -> None:
    run_dir = trained(CONVIRT)
    last = vilmedic.load(run_dir, ckpt="last_3.pth", device="cpu")
    assert last.path.name == "last_3.pth"
    plain = vilmedic.load(run_dir, device="cpu").embed_images(trained.images())
    averaged = vilmedic.load(run_dir, ema=True, device="cpu").embed_images(trained.images())
    assert not torch.allclose(plain, averaged, atol=1e-4)


# -- training and evaluation


def test_config_errors_are_raised_as_exceptions(trained: Runs, tmp_path: Path) -> None:
    config, *words = trained.words(CONVIRT)
    with pytest.raises(ConfigError, match=r"trainor\.batchsize .*Did you mean 'trainor.batch_size"):
        vilmedic.train(config, *words, "trainor.batchsize=3")
    with pytest.raises(ConfigError, match=r"none\.yml"):
        vilmedic.train(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match=r"trainor: is a section"):
        vilmedic.train(config, *words, trainor={"batch_size": 4})
    with pytest.raises(DataError, match="nodata"):
        vilmedic.train(
            config, *words, f"dataset.image.root={tmp_path}/nodata", f"ckpt_dir={tmp_path}"
        )
    with pytest.raises(CheckpointError, match="empty: there is no such run directory"):
        vilmedic.evaluate(config, *words, *EVALUATION, PLAIN, f"ckpt_dir={tmp_path}", name="empty")


def test_evaluate_returns_the_written_results(trained: Runs) -> None:
    results = evaluate(trained, CONVIRT, "ensemblor.metrics={retrieval: }")
    written = json.loads((trained(CONVIRT) / "results_test.json").read_text())
    assert json.loads(json.dumps(results)) == written
    assert results["samples"] == 10


def test_train_returns_the_run_directory(trained: Runs, tmp_path: Path) -> None:
    config, *words = trained.words(SIMCLR)
    words += ["trainor.epochs=1", f"ckpt_dir={tmp_path}"]
    run = vilmedic.train(config, *words, name="two words")
    assert run.directory == tmp_path / "two words"
    assert run.seed == 3
    assert run.best is not None
    assert run.best.is_file()
    assert run.last.name == "last_3.pth"
    assert run.load().path == run.best
    again = vilmedic.train(config, *words, "trainor.epochs=2", name="two words", ckpt="auto")
    lines = (again.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines if "validation_loss" in line] == [0, 1]


# -- options


def test_options_are_checked(trained: Runs) -> None:
    model = vilmedic.load(trained(CONVIRT))
    paths = trained.images()
    with pytest.raises(ConfigError, match="batch_size: given 0"):
        model.embed_images(paths, batch_size=0)
    with pytest.raises(ConfigError, match="precision: given 'fp8'"):
        model.embed_images(paths, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="features: given 'linguistic', allowed: visual, visual_"):
        model.embed_images(paths, features="linguistic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="on_error: given 'ignore', allowed: raise, skip"):
        model.embed_images(paths, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="workers: given 0"):
        model.embed_images(paths, workers=0)
    with pytest.raises(DataError, match="no images are given"):
        model.embed_images([])
    for wrong in ([], ["a", ""], ["a", 3]):
        with pytest.raises(DataError, match=r"[Nn]o texts|text 1: given"):
            model.embed_texts(wrong)  # type: ignore[arg-type]
    half = model.embed_images(paths, precision="bf16")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model.embed_images(paths), atol=0.1, rtol=0)
    assert not torch.equal(half, model.embed_images(paths))


def test_images_of_several_sizes_keep_their_order(trained: Runs) -> None:
    def image(height: int, width: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)

    images = [image(32, 64, 0), image(64, 32, 1), image(32, 64, 2), image(64, 32, 3)]
    gloria = vilmedic.load(trained(GLORIA), device="cpu")
    vae = vilmedic.load(trained(VAE), device="cpu")
    for model in (gloria, vae):
        model.preprocess.pixels.resize = model.preprocess.pixels.crop = None
    alone = torch.cat([gloria.local_similarity([one], TEXTS) for one in images])
    found = gloria.local_similarity(images, TEXTS)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    codes = torch.cat([vae.encode([one]) for one in images])
    assert len(codes.unique(dim=0)) > 1
    assert torch.equal(vae.encode(images), codes)
    with pytest.raises(DataError, match="several sizes have 64 to 128 codes"):
        vae.encode([*images, image(32, 32, 4)])


def test_embeddings_may_be_arrays(trained: Runs) -> None:
    model = vilmedic.load(trained(CONVIRT), device="cpu")
    rows, texts = model.embed_images(trained.images()), model.embed_texts(TEXTS)
    cosines = model.similarity(rows, texts)
    assert cosines.shape == (len(rows), len(TEXTS))
    for kind in (np.float32, np.float64):
        found = model.similarity(rows.numpy().astype(kind), texts.numpy().astype(kind))
        torch.testing.assert_close(found, cosines, atol=1e-6, rtol=0)
    prompts = {"mine": {"positive": TEXTS[:1], "negative": TEXTS[1:]}}
    assert torch.equal(
        model.zero_shot(rows.numpy(), prompts),
        model.zero_shot(rows, prompts),
    )
    for call in (
        lambda: model.similarity(rows[:, :3], texts),
        lambda: model.zero_shot(rows[:, :3], prompts),
    ):
        with pytest.raises(DataError, match=r"have 3 numbers each and those of the texts 8"):
            call()


def test_invalid_embeddings_are_refused(trained: Runs) -> None:
    model = vilmedic.load(trained(CONVIRT), device="cpu")
    rows, texts = model.embed_images(trained.images()), model.embed_texts(TEXTS)
    prompts = {"mine": {"positive": TEXTS[:1], "negative": TEXTS[1:]}}
    for wrong in (texts[0], texts[None], texts.long(), texts.numpy()[0], torch.tensor(1.0)):
        with pytest.raises(DataError, match=r"texts: given (int64|float32) \[.*\], allowed: texts"):
            model.similarity(rows, wrong)
    for wrong in (rows[0], rows.numpy()[0], torch.tensor(1.0)):
        for call in (
            lambda wrong: model.similarity(wrong, texts),
            lambda wrong: model.zero_shot(wrong, prompts),
        ):
            with pytest.raises(DataError, match=r"images: given float32 \[.*\], allowed: images"):
                call(wrong)
    for wrong in (None, texts):
        with pytest.raises(DataError, match=r"prompts: given a .*, allowed: mapping"):
            model.zero_shot(rows, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="similarity: given 'mine', allowed: global, local, both"):
        model.zero_shot(rows, prompts, similarity="mine")  # type: ignore[arg-type]


def test_lone_surrogates_are_refused(trained: Runs) -> None:
    """For example from `surrogateescape` decoding of a file name in another encoding."""
    model, dalle = vilmedic.load(trained(GLORIA)), vilmedic.load(trained(DALLE))
    image = trained.images()[0]
    half = "Large effusion.\udc80"
    prompts = {"mine": {"positive": ["Clear lungs."], "negative": [half]}}
    for number, call in (
        (1, lambda: model.embed_texts(["Clear lungs.", half])),
        (0, lambda: model.similarity([image], half)),
        (1, lambda: model.zero_shot([image], prompts)),
        (0, lambda: model.local_similarity([image], [half])),
        (0, lambda: model.attention(image, half)),
        (0, lambda: dalle.generate(half)),
    ):
        with pytest.raises(DataError, match=rf"text {number}: .*half of a character"):
            call()


def test_arguments_of_wrong_types_are_refused(trained: Runs) -> None:
    model, vae = vilmedic.load(trained(CONVIRT)), vilmedic.load(trained(VAE))
    paths = trained.images()
    for wrong in (None, 3):
        with pytest.raises(DataError, match=f"images: given {wrong}, allowed: a path"):
            model.embed_images(wrong)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=f"texts: given {wrong}, allowed: a text"):
            model.embed_texts(wrong)  # type: ignore[arg-type]
    for size in ("3", 2.5, None):
        with pytest.raises(ConfigError, match=f"batch_size: given {size!r}, allowed: integer"):
            model.embed_images(paths, batch_size=size)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="workers: given 'a'"):
        model.embed_images(paths, workers="a")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="cannot be read"):
        model.embed_images("a" * 5000)
    with pytest.raises(DataError, match="generate: given None, allowed: one text"):
        vilmedic.load(trained(DALLE)).generate(None)  # type: ignore[arg-type]
    for seed in (-1, "x", 2**32, None):
        with pytest.raises(ConfigError, match=f"seed: given {seed!r}, allowed: integer from 0"):
            vilmedic.load(trained(DALLE)).generate("x", seed=seed)  # type: ignore[arg-type]
    codes = vae.encode(paths[:2])
    assert torch.equal(vae.decode(codes.numpy()), vae.decode(codes))
    for given in (codes.tolist(), codes > 0, codes.numpy().astype("U8")):
        with pytest.raises(DataError, match=r"decode: given .* allowed: codes as whole numbers"):
            vae.decode(given)  # type: ignore[arg-type]
    for call in (lambda: vae.encode(paths, batch_size=0), lambda: vae.decode(codes, batch_size=0)):
        with pytest.raises(ConfigError, match="batch_size: given 0"):
            call()
    low = torch.arange(1024, dtype=torch.bfloat16).reshape(32, 32)
    assert torch.equal(model.embed_images([low]), model.embed_images([low.float()]))


def test_unreadable_images_raise_or_are_skipped(trained: Runs, tmp_path: Path) -> None:
    model = vilmedic.load(trained(CONVIRT), device="cpu")
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(trained.images()[0]).read_bytes()[:60])
    good = trained.images()[:3]
    mixed = [good[0], str(bad), *good[1:], tmp_path / "none.png"]
    with pytest.raises(DataError, match=r"bad\.png"):
        model.embed_images(mixed)
    for size in (1, 2, 8):
        found = model.embed_images(mixed, on_error="skip", batch_size=size)
        assert found.shape == (5, 8)
        assert found[[1, 4]].isnan().all()
        expected = model.embed_images(good)
        torch.testing.assert_close(found[[0, 2, 3]], expected, atol=1e-5, rtol=0)
    alone = model.embed_images([bad], on_error="skip")
    assert alone.shape == (1, 8)
    assert alone.isnan().all()
    [(rows, errors)] = model.stream_images(mixed, on_error="skip")
    assert [bool(error) for error in errors] == [False, True, False, False, True]
    assert "bad.png" in errors[1]
    assert rows.shape == (5, 8)


def test_the_image_cache_does_not_change_embeddings(trained: Runs, tmp_path: Path) -> None:
    model = vilmedic.load(trained(CONVIRT), device="cpu")
    expected = model.embed_images(trained.images())
    for _ in range(2):
        assert torch.equal(model.embed_images(trained.images(), cache=tmp_path), expected)
    assert any(tmp_path.iterdir())


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, vilmedic;"
        "slow = {'torch', 'torchvision', 'transformers', 'numpy', 'PIL', 'omegaconf', 'griffe'};"
        "print(sorted((slow | {'yaml'}) & set(sys.modules)));"
        "print(sorted(name for name in dir(vilmedic) if name in vilmedic.__all__));"
        "print(vilmedic.VilmedicError.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines() == ["[]", str(sorted(vilmedic.__all__)), "vilmedic.errors"]
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = vilmedic.lode


def test_report_refuses_a_folder_without_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "1.66_4_406122.pth").touch()  # a downloaded checkpoint
    (tmp_path / "generated").mkdir()
    write_pages(tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert "write_report" not in caplog.text

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seed": 0, "train_loss": 0.5}\n')
    write_pages(tmp_path)
    assert (tmp_path / "report.html").exists()
