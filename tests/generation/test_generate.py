from __future__ import annotations

import pytest

from vilmedic.config.sections import GenerationSection, RerankSection
from vilmedic.errors import ConfigError
from vilmedic.generation.generate import _most_alike, _slug


def test_prompts_with_the_same_start_get_different_folders() -> None:
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
def test_invalid_sampling_values_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GenerationSection(**options)  # type: ignore[arg-type]


class Reports:
    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def describe(self, index: int) -> dict[str, str]:
        return {"report": self.texts[index]}


def test_a_prompt_is_shown_with_the_image_of_the_most_similar_report() -> None:
    datasets = {
        "validate": Reports("The lungs are clear.", "The heart is large."),
        "test": Reports("Small left effusion.", "Large LEFT effusion.", "Large left effusion."),
    }
    prompts = ["large left effusion", "A small effusion on the left.", "Zebra."]
    found = _most_alike(datasets, prompts)
    assert list(found.values()) == [("test", 1), ("test", 0), None]
