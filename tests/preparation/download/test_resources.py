from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.errors import ConfigError
from vilmedic.preparation.download.jobs import Subset, parse_subset, read_sums
from vilmedic.preparation.download.resources import load_table

SHIPPED = Path(__file__).parents[3] / "data" / "resources.yml"


def test_the_shipped_table_is_valid() -> None:
    table = load_table(SHIPPED)
    images = table.resources["mimic-cxr-images-512"].images
    assert images is not None
    assert (images.short_side, images.quality) == (512, 95)
    assert images.base == "https://physionet.org/files/mimic-cxr-jpg/2.1.0/"
    for name, resource in table.resources.items():
        assert resource.terms, name
        assert resource.target, name
        for file in resource.files:
            assert file.url.startswith("https://"), name
            assert file.sums or file.sha256 or "openi" in file.url, name
        for script, *_ in resource.after:
            assert (SHIPPED.parent / f"{script}.py").is_file(), name
    models = {model.repo for model in table.resources["SELFSUP"].models}
    assert models == {"allenai/biomed_roberta_base", "emilyalsentzer/Bio_ClinicalBERT"}


GOOD = """
resources:
  a: {what: w, size: s, terms: t, target: x}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the file holds a list. Allowed: a mapping of keys to values"),
        (
            "resources: {a: {what: w, size: s, terms: t}}",
            "resources.a.target: missing under 'resources.a' (",
        ),
        (GOOD.replace("target: x", "target: x, fils: []"), "Did you mean 'resources.a.files'?"),
        (GOOD.replace("what: w", "what: [w]"), "table.yml:3): given [w]; allowed: text"),
        (
            GOOD.replace("target: x", "target: x, account: b"),
            "table.yml:3): given 'b'; allowed: none",
        ),
        (
            GOOD.replace("target: x", "target: x, files: [{url: u, path: p, bytes: big}]"),
            "resources.a.files.0.bytes (",
        ),
        ("resources: {a: *nothing}", "table.yml:1:16: not valid YAML"),
        ("resources: !!python/object/apply:os.getcwd []", "is not allowed in a configuration"),
    ],
)
def test_mistakes_in_a_table_are_reported(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.yml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_table(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "subset"),
    [
        ("500", Subset("", 500)),
        ("validate", Subset("validate")),
        ("test:20", Subset("test", 20)),
    ],
)
def test_subsets(text: str, subset: Subset) -> None:
    assert parse_subset(text) == subset


@pytest.mark.parametrize("text", ["0", "-5", "5:validate", "validate:", "1.5", "dev:3"])
def test_bad_subsets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--subset"):
        parse_subset(text)


def test_published_checksum_formats(tmp_path: Path) -> None:
    (tmp_path / "sums").write_text(
        f"{'a' * 64} files/one.jpg\n{'B' * 64}  files/two.jpg\n{'c' * 64} *./three\nnot a sum\n"
    )
    got = read_sums(tmp_path / "sums", {"files/one.jpg", "files/two.jpg", "three", "four"})
    assert got == {"files/one.jpg": "a" * 64, "files/two.jpg": "b" * 64, "three": "c" * 64}
