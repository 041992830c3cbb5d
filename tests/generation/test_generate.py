from __future__ import annotations

import pytest

from vilmedic.config.sections import GenerationSection, RerankSection
from vilmedic.errors import ConfigError
from vilmedic.generation.generate import _slug


def test_prompts_that_start_alike_get_folders_of_their_own() -> None:
    long = "There is a large left pleural effusion with blunting of the costophrenic angle"
    names = {_slug(text) for text in (long, f"{long}.", "Heart: normal", "heart normal")}
    assert len(names) == 4
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)
    assert max(map(len, names)) < 50


def test_a_nested_section_may_be_a_mapping() -> None:
    section = GenerationSection(rerank={"ckpt": "a.pth"})  # type: ignore[arg-type]
    assert section.rerank == RerankSection(ckpt="a.pth")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": " "}, "ensemblor.prompt: is empty"),
        ({"prompt": []}, "ensemblor.prompt: is empty"),
        ({"prompt": "x", "prime": 0.5}, "ensemblor.prime_image"),
    ],
)
def test_values_that_nothing_can_be_drawn_with(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GenerationSection(**options)  # type: ignore[arg-type]
