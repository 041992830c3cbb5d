"""The keys of the section `ensemblor` that say how images are generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from vilmedic.config.types import AtLeast, Below, Between, Portion, Temperature, UsedWith
from vilmedic.errors import ConfigError


@dataclass(kw_only=True)
class RerankSection:
    """What generated images are put in order by.

    Args:
        ckpt: a checkpoint of ConVIRT, a path: images that agree with the report come first.
    """

    ckpt: str | None = None


@dataclass(kw_only=True)
class GenerationSection:
    """How images are generated from reports.

    Args:
        generate_images: make images of reports, instead of an evaluation.
        num_images: images a report.
        num_samples: reports of each split, from the first on.
        prompt: a report, or a list of reports, to use instead of those of the splits.
        temperature: divides the logits; below 1 images get more alike, above 1 more varied.
        filter_thres: share of the logits that is dropped at each token, the smallest ones; it
            counts the text vocabulary too.
        top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
        cond_scale: guidance by the text; 1 is none, 3 is much. Needs training with
            model.dalle.null_cond_prob above 0.
        prime: share of the image, from the top, whose tokens are those of a real image; below 1, as
            something has to be left to draw.
        prime_image: the file of that real image; null takes the image of the report.
        rerank: puts the images of a report in order, best first.
    """

    generate_images: bool = False
    num_images: Annotated[int, UsedWith("generate_images", mode=True), Between(1, 65536)] = 4
    num_samples: Annotated[
        int, UsedWith("generate_images", mode=True), UsedWith("prompt", (None,)), AtLeast(1)
    ] = 1
    prompt: Annotated[str | list[str] | None, UsedWith("generate_images", mode=True)] = None
    temperature: Annotated[Temperature, UsedWith("generate_images", mode=True)] = 1.0
    filter_thres: Annotated[float, UsedWith("generate_images", mode=True), AtLeast(0), Below(1)] = (
        0.9
    )
    top_p: Annotated[Portion, UsedWith("generate_images", mode=True)] = 1.0
    cond_scale: Annotated[float, UsedWith("generate_images", mode=True), Between(0, 1000)] = 1.0
    prime: Annotated[float, UsedWith("generate_images", mode=True), AtLeast(0), Below(1)] = 0.0
    prime_image: Annotated[
        str | None, UsedWith("generate_images", mode=True), UsedWith("prime")
    ] = None
    rerank: Annotated[RerankSection, UsedWith("generate_images", mode=True)] = field(
        default_factory=RerankSection
    )

    def __post_init__(self) -> None:
        """Read the nested section, and refuse what cannot be drawn from.

        Raises:
            ConfigError: a prompt is empty, or there is no image to take a part of.
        """
        if isinstance(self.rerank, dict):
            self.rerank = RerankSection(**self.rerank)
        problems = []
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if prompts is not None and not all(prompt.strip() for prompt in prompts or [""]):
            problems.append("ensemblor.prompt: is empty; allowed: a report, or a list of reports.")
        if self.prime and prompts and self.prime_image is None:
            problems.append(
                "ensemblor.prime: needs a real image, and a prompt has none. Name one with "
                "ensemblor.prime_image."
            )
        if problems:
            raise ConfigError(problems)
