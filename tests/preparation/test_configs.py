"""The shipped configurations can read what the builders write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.preparation.archives import make_mimic, write_csv, write_images, write_mimic
from tests.preparation.builders.test_indiana import many as indiana_reports
from tests.preparation.builders.test_indiana import write_reports
from tests.preparation.builders.test_padchest import HEADER as PADCHEST_HEADER
from tests.preparation.builders.test_padchest import TABLE
from tests.preparation.builders.test_padchest import many as padchest_rows
from tests.small_models import tiny_tokenizer
from vilmedic.config import build
from vilmedic.config.load import load
from vilmedic.preparation.builders import indiana, mimic_cxr, padchest
from vilmedic.registry import DATASETS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(ROOT.glob("config/SELFSUP/*.yml"))
SPLITS = ("train", "validate", "test")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ as the documented commands build it, from small generated releases."""
    home = tmp_path_factory.mktemp("home")
    raw, built, images = home / "raw", home / "data" / "SELFSUP", home / "data" / "images"
    mimic = make_mimic(patients=30)
    write_mimic(raw / "mimic", mimic)
    write_images(images / "mimic-cxr-images-512", mimic.images)
    options = ["--reports", str(raw / "mimic"), "--tables", str(raw / "mimic"), "--workers", "1"]
    assert mimic_cxr.main([*options, "--root", str(built / "mimic-cxr")]) == 0
    balanced = ["--root", str(built / "mimic-cxr-balanced"), "--balanced"]
    assert mimic_cxr.main([*options, *balanced]) == 0
    clip = ["--root", str(home / "data" / "CLIP" / "mimic-cxr"), "--section", "impression"]
    assert mimic_cxr.main([*options, *clip]) == 0

    write_reports(raw, indiana_reports())
    names = [f"CXR{uid}_IM-{uid:04d}-{n}001.png" for uid in indiana_reports() for n in (1, 2)]
    write_images(images / "indiana-images-512", names)
    options = ["--reports", str(raw / "ecgen-radiology"), "--root", str(built / "indiana")]
    assert indiana.main([*options, "--images", str(images / "indiana-images-512")]) == 0

    write_csv(raw / TABLE, PADCHEST_HEADER, padchest_rows())
    write_images(images / "padchest-images-512", [row[1] for row in padchest_rows()])
    assert padchest.main(["--table", str(raw), "--root", str(built / "padchest")]) == 0

    for name in ("biomed_roberta_base", "Bio_ClinicalBERT"):
        tiny_tokenizer().save_pretrained(built / "huggingface" / name)
    return home


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_split_of_every_configuration_can_be_read(
    path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    overrides = []
    if "convirt" in path.stem or "gloria" in path.stem:
        root = load(path).dataset["image"]["root"]
        overrides = ["dataset.proto=ImSeqLabel", f"dataset.label.root={root}"]
    node = load(path, overrides).dataset
    for split in SPLITS:
        dataset = build(
            DATASETS, node, split=split, training=split == "train", seed=0, run_dir=tmp_path
        )
        image = node.get("image", node)
        listed = Path(image["root"], f"{split}.{image['file']}").read_text().splitlines()
        assert len(dataset) == len(listed) > 0
        shown = dataset.describe(0)
        assert Path(shown["image"][0]).is_file()
        if overrides:
            assert shown["report"]
            assert shown["labels"]


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("config/CLIP/*.yml")) + CONFIGS, ids=lambda path: path.stem
)
def test_the_line_files_of_a_configuration_are_built_and_aligned(
    path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sources = list(_sources(load(path).dataset))
    assert sources
    for split in SPLITS:
        files = [home / root / f"{split}.{file}" for root, file in sources]
        for file in files:
            assert file.is_file(), f"{file.relative_to(home)} is written by no builder"
        assert len({len(file.read_text().splitlines()) for file in files}) == 1


def _sources(node: Any) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        if "root" in node and "file" in node:
            yield node["root"], node["file"]
        for value in node.values():
            yield from _sources(value)
