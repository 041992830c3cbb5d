from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.end_to_end.conftest import Run
from tests.end_to_end.test_real import COVID, needs_covid
from tests.older_files import write_dalle_pytorch_dalle
from tests.parity.reference import load_reference, missing_packages
from tests.small_dalles import TINY_VAE, save_vae
from vilmedic.datasets.decode import decode_image
from vilmedic.datasets.image_source import crop_square, resize_short_side
from vilmedic.datasets.report_text import r2gen_clean_report
from vilmedic.datasets.text import load_tokenizer
from vilmedic.generation.generate import Reranker
from vilmedic.models.vae import load_vae

TRANSFORMER = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_head": 12,
    "text_seq_len": 24,
    "null_cond_prob": 0.2,
}


@pytest.fixture(scope="module")
def small(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of both commands for a small DALLE on a VAE with random weights."""
    vae = save_vae(tmp_path_factory.mktemp("frozen") / "vae.pth")
    return [
        "config/phantom/dalle.yml",
        f"dataset.image.root={phantom}",
        f"dataset.seq.root={phantom}",
        *(f"model.vae.{name}={value}" for name, value in TINY_VAE.items()),
        *(f"model.dalle.{name}={value}" for name, value in TRANSFORMER.items()),
        f"model.vae.ckpt={vae}",
        "trainor.batch_size=16",
        "trainor.num_workers=0",
        "ensemblor.num_workers=0",
        "trainor.log_every=1",
        "trainor.lr_decay=null",
    ]


@pytest.fixture(scope="module")
def trained(run_here: Run, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two epochs with seed 5."""
    ckpt = tmp_path_factory.mktemp("dalle")
    run_here(
        "bin/train.py",
        *small,
        f"ckpt_dir={ckpt}",
        "name=two",
        "trainor.seed=5",
        "trainor.epochs=2",
    )
    return ckpt / "two"


def generated(run_dir: Path, pattern: str) -> Path:
    """The folder of the images generated last for a report."""
    found = run_dir.glob(f"evaluations/*/generated/{pattern}")
    return max(found, key=lambda folder: (folder / "settings.json").stat().st_mtime_ns)


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


def test_training_learns_and_keeps_the_tokens(trained: Path) -> None:
    first, second = evaluations(trained)
    assert second["validation_loss"] < first["validation_loss"]
    names = sorted(path.name.split("_")[0] for path in (trained / "tokens").glob("[!.]*"))
    assert names == ["train", "validate"]


def test_a_run_without_the_token_cache_is_the_same(
    run_here: Run, small: list[str], trained: Path, tmp_path: Path
) -> None:
    options = ["name=again", "trainor.seed=5", "trainor.epochs=2", "dataset.image.tokens=null"]
    run_here("bin/train.py", *small, f"ckpt_dir={tmp_path}", *options)
    again = evaluations(tmp_path / "again")
    for found, expected in zip(again, evaluations(trained), strict=True):
        assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-3)


@pytest.mark.slow
def test_evaluation_uses_a_classifier_of_real_images(
    run_here: Run, small: list[str], trained: Path
) -> None:
    metric = "ensemblor.metrics.prompted_findings"
    done = run_here(
        "bin/ensemble.py",
        *small,
        f"ckpt_dir={trained.parent}",
        "name=two",
        f"{metric}.num_images=2",
        f"{metric}.epochs=1",
    )
    results = json.loads((trained / "results_test.json").read_text())
    found = results["metrics"]["prompted_findings"]
    for name in ("auroc", "accuracy", "real_auroc", "reconstruction_auroc"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low <= found[name] <= high <= 1
    areas = [one["auroc"] for one in found["classes"].values()]
    assert found["auroc"] == pytest.approx(sum(areas) / 4)
    assert found["accuracy_chance"] == 0.25
    assert set(found["probabilities"]) == set(found["classes"])
    assert "pneumothorax right" in done.stdout
    assert results["loss"] > 0


def test_generates_images_for_reports(run_here: Run, small: list[str], trained: Path) -> None:
    arguments = [*small, f"ckpt_dir={trained.parent}", "name=two", "ensemblor.generate_images=True"]
    options = ["ensemblor.num_images=3", "ensemblor.num_samples=2", "ensemblor.mode=all"]
    done = run_here("bin/ensemble.py", *arguments, *options)

    for line in (1, 2):
        folder = generated(trained, f"test_{line}")
        pictures = [folder / f"{n}.png" for n in (1, 2, 3)]
        assert [Image.open(path).size for path in pictures] == [(16, 16)] * 3
        assert len({path.read_bytes() for path in pictures}) == 3
        assert min(Image.open(folder / "sheet.png").size) > 300
        settings = json.loads((folder / "settings.json").read_text())
        assert settings["filter_thres"] == 0.97
        assert settings["report"]
        assert [image["number"] for image in settings["images"]] == [1, 2, 3]
        assert len(settings["checkpoints"]) == len(list(trained.glob("[0-9]*_5.pth")))
    assert "sheet.png" in done.stdout


def test_images_of_prompts_do_not_depend_on_other_prompts(
    run_here: Run, small: list[str], trained: Path
) -> None:
    arguments = [*small, f"ckpt_dir={trained.parent}", "name=two", "ensemblor.generate_images=True"]
    prompt = "Large left zebra."
    done = run_here(
        "bin/ensemble.py",
        *arguments,
        f"ensemblor.prompt=[Severe cardiomegaly., {prompt}]",
        "ensemblor.num_images=2",
    )
    assert "does not have: zebra" in done.stdout
    folder = generated(trained, "prompt_large-left-zebra*")
    first = (folder / "1.png").read_bytes()

    run_here(
        "bin/ensemble.py",
        *arguments,
        f"ensemblor.prompt={prompt}",
        "ensemblor.num_images=1",
        "ensemblor.batch_size=1",
    )
    assert (folder / "1.png").read_bytes() == first
    assert not (folder / "2.png").exists()


def test_priming_keeps_the_top_of_the_real_image(
    run_here: Run, small: list[str], trained: Path, phantom: Path
) -> None:
    image = phantom / "images" / (phantom / "test.image.tok").read_text().split()[0]
    arguments = [*small, f"ckpt_dir={trained.parent}", "name=two", "ensemblor.generate_images=True"]
    run_here(
        "bin/ensemble.py",
        *arguments,
        "ensemblor.prompt=Heart size is normal.",
        "ensemblor.prime=0.75",
        f"ensemblor.prime_image={image}",
    )
    folder = generated(trained, "prompt_heart-size*")
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["primed_tokens"] == 12
    assert settings["ema"] is False

    pixels = decode_image(image, "grey")
    pixels = crop_square(resize_short_side(pixels, 16), 16, random=False)
    vae = load_vae(next(word[15:] for word in small if word.startswith("model.vae.ckpt=")), {})
    codes = vae.get_codebook_indices(pixels[None].expand(-1, 3, -1, -1) / 255)
    changed = codes.clone()
    changed[:, 12:] = (codes[:, 12:] + 1) % 24
    first, second = vae.decode(codes).mean(1)[0], vae.decode(changed).mean(1)[0]
    # pixel rows that do not depend on the last quarter of the tokens
    rows = int((first == second).all(dim=1).sum())
    assert 1 <= rows < 16
    for number in (1, 2, 3):
        made = torch.from_numpy(np.array(Image.open(folder / f"{number}.png").convert("L"))).float()
        torch.testing.assert_close(made[:rows], (first[:rows] * 255).round(), atol=1.0, rtol=0)

    refused = run_here(
        "bin/ensemble.py", *arguments, "ensemblor.prompt=x", "ensemblor.prime=0.5", status=2
    )
    assert "ensemblor.prime_image" in refused.stderr


def test_convirt_reranks_images(
    run_here: Run, small: list[str], trained: Path, tiny: list[str], tmp_path: Path
) -> None:
    run_here(
        "bin/train.py",
        *tiny,
        f"ckpt_dir={tmp_path}",
        "name=convirt",
        "trainor.seed=0",
        "trainor.epochs=1",
    )
    ranker = tmp_path / "convirt" / "last_0.pth"
    arguments = [*small, f"ckpt_dir={trained.parent}", "name=two", "ensemblor.generate_images=True"]
    arguments += ["ensemblor.num_images=3"]
    run_here("bin/ensemble.py", *arguments)
    folder = generated(trained, "test_1")
    unordered = {number: (folder / f"{number}.png").read_bytes() for number in (1, 2, 3)}
    run_here("bin/ensemble.py", *arguments, f"ensemblor.rerank.ckpt={ranker}")
    assert generated(trained, "test_1") != folder, "another protocol"
    folder = generated(trained, "test_1")
    settings = json.loads((folder / "settings.json").read_text())
    agreement = [image["agreement"] for image in settings["images"]]
    assert agreement == sorted(agreement, reverse=True)
    assert sorted(image["number"] for image in settings["images"]) == [1, 2, 3]
    for place, image in enumerate(settings["images"], start=1):
        assert image["file"] == f"{place}.png"
        assert (folder / image["file"]).read_bytes() == unordered[image["number"]]
    pictures = [Image.open(folder / f"{n}.png").convert("L") for n in (1, 2, 3)]
    pixels = (
        torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))[:, None] / 255
    )
    scores = Reranker(str(ranker), torch.device("cpu")).scores(settings["report"], pixels)
    assert scores == pytest.approx(agreement, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.vae.ckpt=nowhere/vae.pth"], "nowhere/vae.pth"),
        (["model.vae.num_tokens=32"], "num_tokens is 24, the configuration says 32"),
        (["model.dalle.reversible=True"], "activation_checkpointing"),
        (["dataset.seq.tokenizer_max_len=30"], "tokenizer_max_len of the reports is 30"),
        (
            ["model.dalle.num_text_tokens=12"],
            "num_text_tokens (command line): given 12",
        ),
        (["dataset.image.preset=resize_crop"], "preset=center_crop"),
        (["dataset.image.resize=32", "dataset.image.crop=32", "dataset.image.tokens=null"], "16 x"),
    ],
)
def test_bad_input_is_reported_before_training(
    run_here: Run, small: list[str], tmp_path: Path, changes: list[str], words: str
) -> None:
    done = run_here(
        "bin/train.py", *small, f"ckpt_dir={tmp_path}", "trainor.seed=0", *changes, status=2
    )
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_vae_is_not_averaged(
    run_here: Run, small: list[str], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "two")
    [path, *_] = sorted((tmp_path / "two").glob("[0-9]*_5.pth"))
    state = torch.load(path, weights_only=True)
    state["model"]["vae.codebook.weight"] += 1
    torch.save(state, path.with_name("0.5_9_7.pth"))
    done = run_here(
        "bin/ensemble.py",
        *small,
        f"ckpt_dir={tmp_path}",
        "name=two",
        "ensemblor.generate_images=True",
        "ensemblor.mode=all",
        status=2,
    )
    assert re.search(r"its VAE is another one", done.stderr)


def test_a_run_does_not_resume_with_another_vae(
    run_here: Run, small: list[str], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "tokens")
    vae = save_vae(tmp_path / "other.pth")
    state = torch.load(vae, weights_only=True)
    state["model"]["codebook.weight"] += 1
    torch.save(state, vae)
    arguments = [*small, f"ckpt_dir={tmp_path}", "name=two", f"model.vae.ckpt={vae}"]
    for script in ("bin/train.py", "bin/ensemble.py"):
        done = run_here(script, *arguments, "ckpt=last_5.pth", status=2)
        assert re.search(rf"last_5\.pth: .*VAE is another one .*{vae}", done.stderr)
    assert not (tmp_path / "two" / "tokens").exists()  # no tokens of the wrong VAE

    changed = [*arguments, "model.dalle.heads=3", "model.dalle.dim_head=8", "ckpt=last_5.pth"]
    done = run_here("bin/train.py", *changed, status=2)
    assert "heads is 2, the configuration says 3" in done.stderr


needs_reference = pytest.mark.skipif(
    bool(missing_packages()), reason="dalle-pytorch is not installed (make reference)"
)
OLD = {name: TRANSFORMER[name] for name in ("dim", "depth", "heads", "dim_head", "text_seq_len")}


def reference_dalle(words: int, **options: Any) -> Any:
    """A DALLE of dalle-pytorch with weights that depend on the text."""
    reference = load_reference()
    torch.manual_seed(0)
    model = reference.DALLE(
        vae=reference.DiscreteVAE(**TINY_VAE), num_text_tokens=words, **OLD, **options
    )
    for name, parameter in model.named_parameters():
        if not name.startswith("vae."):
            parameter.data = torch.randn_like(parameter) * 0.5
    return model.eval()


def likeliest_image(model: Any, ids: list[int]) -> Any:
    """The image that the reference generates for a text with greedy sampling."""
    text, tokens = torch.tensor([ids]), torch.empty(1, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(16):
            best = model(text, tokens)[:, -1].argmax(dim=1, keepdim=True)
            tokens = torch.cat((tokens, best - model.num_text_tokens), dim=1)
        pixels = model.vae.decode(tokens) * 0.5 + 0.5
    return pixels.clamp(0, 1).mean(dim=1)[0].mul(255).round().numpy()


GREEDY = [
    "ensemblor.generate_images=True",
    "ensemblor.num_images=1",
    "ensemblor.filter_thres=0.999",
    "ensemblor.cond_scale=1",
]


@needs_reference
def test_an_original_run_with_its_word_list(
    run_here: Run, small: list[str], phantom: Path, tmp_path: Path
) -> None:
    """A run of the original vilmedic: weights under two names, and `vocab.src`."""
    run_dir = tmp_path / "old"
    run_dir.mkdir()
    lines = (phantom / "test.impression.tok").read_text().splitlines()
    reports = [r2gen_clean_report(line).strip() for line in lines]
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *sorted({w for r in reports for w in r.split()})]
    (run_dir / "vocab.src").write_text("\n".join(words))
    model = reference_dalle(len(words))
    weights = {f"dalle.{name}": value for name, value in model.state_dict().items()}
    weights |= {f"vae.vae.{name}": value for name, value in model.vae.state_dict().items()}
    config = OmegaConf.create(
        {"model": {"proto": "DALLE", "vae": {**TINY_VAE, "ckpt": "x"}, "dalle": OLD}}
    )
    path = run_dir / "1.66_4_406122.pth"
    torch.save({"model": weights, "config": config, "__version__": "1.2"}, path)
    arguments = [
        *small,
        f"ckpt_dir={tmp_path}",
        "name=old",
        f"ckpt={path.name}",
        f"model.vae.ckpt={path}",
        "dataset.seq.processing=r2gen_clean_report",
        "ensemblor.metrics={}",
    ]
    done = run_here("bin/ensemble.py", *arguments, *GREEDY)
    assert "does not have" not in done.stdout  # the report was cleaned like the vocabulary
    assert "write_report" not in done.stdout  # without training there is no page
    ids = [words.index(word) for word in reports[0].split()][:24]
    expected = likeliest_image(model, ids + [words.index("[PAD]")] * (24 - len(ids)))
    found = np.asarray(Image.open(generated(run_dir, "test_1") / "1.png").convert("L"))
    np.testing.assert_allclose(found, expected, atol=1)

    run_here("bin/ensemble.py", *arguments)
    assert json.loads((run_dir / "results_test.json").read_text())["loss"] > 0


@needs_reference
def test_generates_from_a_dalle_pytorch_file(
    run_here: Run, small: list[str], trained: Path, phantom: Path, tmp_path: Path
) -> None:
    tokenizer = trained / "tokenizer"
    words = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    model = reference_dalle(len(words), shift_tokens=False, rotary_emb=False)
    path = tmp_path / "dalle.pt"
    hparams = {**OLD, "num_text_tokens": len(words), "attn_types": ("full",), "stable": False}
    hparams |= {"shift_tokens": False, "rotary_emb": False}
    write_dalle_pytorch_dalle(path, model.state_dict(), hparams=hparams, vae_params=TINY_VAE)
    arguments = [
        *small,
        f"ckpt_dir={tmp_path}",
        "name=theirs",
        f"ckpt={path}",
        f"model.vae.ckpt={path}",
        f"dataset.seq.tokenizer={tokenizer}",
        *GREEDY,
    ]
    done = run_here("bin/ensemble.py", *arguments, status=2)
    assert "shift_tokens is False, the configuration says True" in done.stderr
    assert "rotary_emb is False, the configuration says True" in done.stderr

    switches = ["model.dalle.shift_tokens=False", "model.dalle.rotary_emb=False"]
    run_here("bin/ensemble.py", *arguments, *switches)
    report = (phantom / "test.impression.tok").read_text().splitlines()[0]
    ids = load_tokenizer(str(tokenizer))(report)["input_ids"][:24]
    expected = likeliest_image(model, ids + [0] * (24 - len(ids)))
    picture = generated(tmp_path / "theirs", "test_1") / "1.png"
    np.testing.assert_allclose(np.asarray(Image.open(picture).convert("L")), expected, atol=1)


@needs_covid
@pytest.mark.slow
def test_an_epoch_on_real_xrays_and_notes(run_here: Run, small: list[str], tmp_path: Path) -> None:
    arguments = [
        *small,
        f"dataset.image.root={COVID}",
        f"dataset.seq.root={COVID}",
        "dataset.seq.file=report.tok",
        "dataset.seq.sample_sentence=False",
        f"ckpt_dir={tmp_path}",
        "name=real",
    ]
    done = run_here("bin/train.py", *arguments, "trainor.seed=1", "trainor.epochs=1")
    assert "were longer than tokenizer_max_len and were cut" in done.stdout
    assert evaluations(tmp_path / "real")[0]["validation_loss"] > 0
    run_here("bin/ensemble.py", *arguments, "ensemblor.generate_images=True", "ckpt=last_1.pth")
    assert (generated(tmp_path / "real", "test_1") / "sheet.png").exists()
