from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vilmedic.config import build
from vilmedic.datasets.subset import SUBSET_FILE, share_of
from vilmedic.errors import ConfigError, DataError
from vilmedic.registry import DATASETS

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


def population(size: int = 2000) -> list[list[str]]:
    """Labels with the frequencies of a clinical data set: most samples have none."""
    random = np.random.default_rng(0)
    chances = {"Effusion": 0.3, "Mass": 0.1, "Hernia": 0.02}
    return [[k for k, p in chances.items() if random.random() < p] for _ in range(size)]


def share(labels: Sequence[Sequence[str]], fraction: float, **keys: Any) -> set[int]:
    groups = keys.pop("groups", [f"{n}.png" for n in range(len(labels))])
    lines = np.arange(len(labels))
    found = share_of(lines, fraction, groups=groups, labels=labels, **{"seed": 0, **keys})
    assert found.tolist() == sorted(set(found.tolist()))
    return set(found.tolist())


def test_smaller_fractions_are_subsets_of_larger_ones() -> None:
    labels = population()
    shares = [share(labels, fraction) for fraction in SHARES]
    assert [len(one) for one in shares] == [round(fraction * 2000) for fraction in SHARES]
    for smaller, larger in itertools.pairwise(shares):
        assert smaller < larger


@pytest.mark.parametrize("seed", range(5))
def test_fractions_are_stratified_by_label(seed: int) -> None:
    labels = population()
    counts = Counter(name for own in labels for name in own)
    sets = Counter(tuple(own) for own in labels)
    taken = share(labels, 0.1, seed=seed)
    for name, count in counts.items():
        found = sum(name in labels[line] for line in taken)
        # With random sampling the standard deviation of Effusion would be 7.
        assert abs(found - count / 10) <= 2.5, name
    for kind, count in sets.items():
        found = sum(tuple(labels[line]) == kind for line in taken)
        assert abs(found - count / 10) <= 2, kind


def test_another_seed_selects_other_samples() -> None:
    labels = population()
    first, second = (share(labels, 0.1, seed=seed) for seed in (0, 1))
    assert len(first & second) < 60


def test_whole_groups_are_selected() -> None:
    labels = population()
    groups = [f"p{n // 4}" for n in range(2000)]
    shares = [share(labels, fraction, groups=groups) for fraction in SHARES]
    for fraction, taken in zip(SHARES, shares, strict=True):
        assert {n for n in range(2000) if n // 4 in {line // 4 for line in taken}} == taken
        assert abs(len(taken) - fraction * 2000) <= 2
    for smaller, larger in itertools.pairwise(shares):
        assert smaller < larger
    mass = sum("Mass" in labels[line] for line in shares[3])
    assert abs(mass - 0.3 * sum("Mass" in own for own in labels)) <= 5


def test_the_order_of_the_lines_does_not_matter() -> None:
    labels = population(300)
    groups = [f"{n}.png" for n in range(300)]
    taken = {groups[line] for line in share(labels, 0.2)}
    turned = share(labels[::-1], 0.2, groups=groups[::-1])
    assert {groups[::-1][line] for line in turned} == taken


def test_the_fraction_is_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; from vilmedic.datasets.subset import share_of; "
        "print(share_of(np.arange(50), 0.2, groups=[f'{n}.png' for n in range(50)], "
        "labels=[['a'] if n % 3 else ['b', 'c'] for n in range(50)], seed=4).tolist())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    labels = [["a"] if n % 3 else ["b", "c"] for n in range(50)]
    assert found == {f"{sorted(share(labels, 0.2, seed=4))}\n"}


def test_at_least_one_group_is_selected() -> None:
    assert len(share(population(20), 0.001)) == 1


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty images of twenty patients in train, four in validate."""
    folder = tmp_path / "data"
    (folder / "images" / "a").mkdir(parents=True)
    for split, size in (("train", 40), ("validate", 4)):
        names = [f"a/{split}{n}.png" for n in range(size)]
        for name in names:
            Image.new("L", (8, 8)).save(folder / "images" / name)
        (folder / f"{split}.image.tok").write_text("\n".join(names) + "\n")
        labels = [("Mass" if n % 4 == 0 else "No Finding") for n in range(size)]
        (folder / f"{split}.label.tok").write_text("\n".join(labels) + "\n")
    (folder / "train.patient.tok").write_text("\n".join(f"p{n // 2}" for n in range(40)) + "\n")
    return folder


def made(root: Path, split: str = "train", training: bool = True, **keys: Any) -> Any:
    image = {"root": str(root), "resize": 8, "crop": 8}
    node = {"proto": "ImLabel", "image": image, "label": {"root": str(root)}, **keys}
    run_dir = root.parent / "run"
    return build(DATASETS, node, split=split, training=training, seed=0, run_dir=run_dir)


def test_the_written_list_selects_the_same_samples(root: Path) -> None:
    data = made(root, fraction=0.2)
    assert len(data) == 8
    assert sorted(Counter(line // 2 for line in data.kept.tolist()).values()) == [2, 2, 2, 2]
    assert data.spec.positives[0] == 2, "labels are counted in the samples used"
    listed = root.parent / "run" / SUBSET_FILE
    assert listed.read_text().splitlines() == [f"a/train{n}.png" for n in data.kept]
    again = made(root, ids=str(listed))
    assert again.kept.tolist() == data.kept.tolist()
    assert data[0]["index"] == 0
    assert data.describe(0)["image"] == [str(root / "images" / f"a/train{data.kept[0]}.png")]


def test_other_splits_stay_whole_and_evaluation_writes_nothing(root: Path) -> None:
    assert len(made(root, "validate", training=False, fraction=0.2)) == 4
    assert len(made(root, training=False, fraction=0.2)) == 8, "samples of the probe"
    assert not (root.parent / "run" / SUBSET_FILE).exists()


def test_names_without_their_folder_are_found(root: Path) -> None:
    file = root / "one_percent.txt"
    file.write_text("train7.png\n\na/train3.png\n/elsewhere/a/train3.png\n")
    assert made(root, ids=str(file)).kept.tolist() == [3, 7]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a/train1.png\na/train99.png\n", r"ids\.txt:2: .*train\.image\.tok has no sample"),
        ("b/train1.png\n", r"ids\.txt:1: .*has no sample 'b/train1\.png'"),
        ("\n", "names no sample"),
    ],
)
def test_invalid_lists_are_refused(root: Path, content: str, problem: str) -> None:
    file = root / "ids.txt"
    file.write_text(content)
    with pytest.raises(DataError, match=problem):
        made(root, ids=str(file))
    with pytest.raises(DataError, match=r"dataset\.ids: .*none\.txt cannot be read"):
        made(root, ids=str(root / "none.txt"))


def test_an_ambiguous_name_is_refused(root: Path) -> None:
    lines = (root / "train.image.tok").read_text().splitlines()
    (root / "images" / "b").mkdir()
    Image.new("L", (8, 8)).save(root / "images" / "b" / "train0.png")
    (root / "train.image.tok").write_text("\n".join([*lines[:-1], "b/train0.png"]) + "\n")
    (root / "ids.txt").write_text("train0.png\n")
    with pytest.raises(DataError, match=r"ids\.txt:1: 'train0\.png' may be any of 2 samples"):
        made(root, ids=str(root / "ids.txt"))


def test_a_mismatched_patient_file_is_refused(root: Path) -> None:
    (root / "train.patient.tok").write_text("p0\n")
    with pytest.raises(DataError, match=r"patient\.tok has 1"):
        made(root, fraction=0.5)


@pytest.mark.parametrize(
    "keys", [{"fraction": 0.0}, {"fraction": 1.5}, {"ids": "x", "fraction": 1}]
)
def test_invalid_keys_are_refused(root: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"fraction"):
        made(root, **keys)
