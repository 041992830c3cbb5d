"""The generation command: prompts, models, and the files that are written."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.sections import EnsemblorSection, GenerationSection
from vilmedic.datasets.aligned import stable_seed
from vilmedic.datasets.decode import MAX_PIXELS, UndecodableImage, check_size, decode_image
from vilmedic.datasets.image import image_part
from vilmedic.datasets.image_source import crop_square, resize_short_side, resized_shape
from vilmedic.datasets.lines import words
from vilmedic.device import move, widest_float
from vilmedic.drawing.images import draw_image_sheet, pixels
from vilmedic.errors import ConfigError
from vilmedic.generation.generators import load_generators
from vilmedic.generation.sampling import Sampling, TokenDrawing
from vilmedic.log import Progress
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.dalle import DALLE
from vilmedic.models.from_checkpoint import from_checkpoint

LOGGER = logging.getLogger("vilmedic")
FOLDER = "generated"
RERANK = "ensemblor.rerank.ckpt"
MOST_COMPARED = 5000  # most reports of a split that a prompt is compared with


@dataclass(frozen=True)
class Report:
    """A report to generate images from.

    Args:
        folder: name of the folder for its images.
        text: the report.
        source: where it comes from, `test, line 3` or `prompt`.
        real: its real image, or for a prompt that of the most similar report, uint8 [C, H, W];
            None without such a report.
        like: for a prompt, the origin of that image and its report.
    """

    folder: str
    text: str
    source: str
    real: Tensor | None = None
    like: str = ""


def generate_from_checkpoints(
    model: nn.Module,
    paths: Sequence[Path],
    datasets: dict[str, Any],
    section: EnsemblorSection,
    *,
    device: torch.device,
    origin: dict[str, Any],
    out_dir: Path,
) -> list[Path]:
    """Generate images for the configured reports, with an ensemble of checkpoints.

    Args:
        model: the configured model, on the device.
        paths: the checkpoints.
        datasets: those of the splits, by name.
        section: the options of generation.
        device: where the model is.
        origin: see `ImageGeneration`.
        out_dir: the folder of the evaluation.

    Returns:
        The folders written, one per report.

    Raises:
        ConfigError: the model makes no images.
        CheckpointError: a checkpoint does not fit, or holds another VAE.
    """
    generation = ImageGeneration(
        models=load_generators(model, paths, section, ema=section.ema),
        section=section,
        seed=section.seed,
        batch_size=section.batch_size,
        device=device,
        precision=section.precision,
        origin=origin,
        out_dir=out_dir,
    )
    return generation.start(datasets)


def token_drawing(
    models: Sequence[DALLE], section: GenerationSection, precision: str
) -> TokenDrawing:
    """Token sampler of a configuration.

    Args:
        models: one or several, in evaluation mode on their device.
        section: how to draw.
        precision: `fp32`, `bf16` or `fp16`.
    """
    sampling = Sampling(
        section.temperature, section.filter_thres, section.top_p, section.cond_scale
    )
    return TokenDrawing(models, sampling, precision=precision)


def generate_images(
    drawing: TokenDrawing,
    encoded: Mapping[str, Tensor],
    text: str,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    start: Tensor | None = None,
    progress: Callable[[int], object] = lambda _tokens: None,
) -> Tensor:
    """Images of one text.

    Args:
        drawing: the token sampler, within its `with` statement.
        encoded: `input_ids` and `attention_mask` [1, T] of the text.
        text: the text; the draws depend on it.
        num_images: how many.
        seed: of the draws; see `ImageGeneration`.
        batch_size: images made at once.
        start: first tokens of the images, int64 [1, n]; None draws all.
        progress: called with the number of tokens drawn.

    Returns:
        float32 [num_images, C, H, W] in 0..1, on the CPU.
    """
    model, device = drawing.models[0], drawing.device
    images = []
    for first in range(0, num_images, batch_size):
        numbers = range(first, min(first + batch_size, num_images))
        draws = torch.stack([_draws(model, text, seed, number) for number in numbers])
        size = len(numbers)
        tokens = drawing(
            encoded["input_ids"].expand(size, -1).to(device),
            encoded["attention_mask"].expand(size, -1).to(device),
            draws.to(device, widest_float(device)),
            start=None if start is None else start.expand(size, -1),
            progress=progress,
        )
        with torch.inference_mode():
            images.append(model.vae.decode(tokens).float().cpu())
    return torch.cat(images)


def _draws(model: DALLE, text: str, seed: int, number: int) -> Tensor:
    """The random numbers of one image, one per token."""
    random = torch.Generator().manual_seed(stable_seed(f"generate {text}", seed, number))
    return torch.rand(model.image_seq_len, generator=random, dtype=torch.float64)


@dataclass(kw_only=True)
class ImageGeneration:
    """Makes images of reports with one model or the mean of several.

    Each report gets a folder `generated/<split>_<line>` or `prompt_<words>` with
    the images `1.png`, `2.png`, ..., best first if they are ranked, `sheet.png`, and
    `settings.json`.

    Args:
        models: the models, in evaluation mode on their device.
        section: what to make.
        seed: seed of the draws. An image depends on it, the report and its own number, but not
            on the number of images.
        batch_size: images made at once.
        device: where the models are.
        precision: `fp32` or `bf16`.
        origin: fields about the models for `settings.json`: run, model, checkpoints, ema.
        out_dir: the folder of the evaluation.
    """

    models: Sequence[DALLE]
    section: GenerationSection
    seed: int
    batch_size: int
    device: torch.device
    precision: str
    origin: dict[str, Any]
    out_dir: Path

    def __post_init__(self) -> None:
        """Load the ranking model, before any image is generated."""
        ckpt = self.section.rerank.ckpt
        self.reranker = None if ckpt is None else Reranker(ckpt, self.device)

    def reports(self, datasets: dict[str, Any]) -> list[Report]:
        """Return the configured reports.

        Args:
            datasets: those of the splits, by name.
        """
        prompt = self.section.prompt
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            alike = _most_alike(datasets, prompts)
            reports = []
            for text in prompts:
                report = Report(f"prompt_{_slug(text)}", text, "prompt")
                if (nearest := alike[text]) is not None:
                    split, index = nearest
                    dataset = datasets[split]
                    line = int(dataset.lines([index])[0].rpartition(":")[2])
                    like = f"{split}, line {line}: {dataset.describe(index)['report']}"
                    real = image_part(dataset).images(line - 1)[0]
                    report = replace(report, real=real, like=like)
                reports.append(report)
            return reports
        found = []
        for split, dataset in datasets.items():
            for index in range(min(self.section.num_samples, len(dataset))):
                line = int(dataset.lines([index])[0].rpartition(":")[2])
                text = dataset.describe(index)["report"]
                real = image_part(dataset).images(line - 1)[0]
                found.append(Report(f"{split}_{line}", text, f"{split}, line {line}", real))
        return found

    def start(self, datasets: dict[str, Any]) -> list[Path]:
        """Make and write the images.

        Args:
            datasets: those of the splits, by name; the first one's tokenizer reads prompts.

        Returns:
            The folders written, one per report.
        """
        dataset = next(iter(datasets.values()))
        reports = self.reports(datasets)
        for report in reports:
            _warn_of_losses(dataset, report.text)
        folders = []
        drawn = self.models[0].image_seq_len - self._primed()
        total = len(reports) * self.section.num_images * drawn
        with (
            Progress("Generating", total, "tokens") as bar,
            token_drawing(self.models, self.section, self.precision) as drawing,
        ):
            for report in reports:
                images = self.generate(drawing, dataset, report, bar)
                folders.append(self._write(report, images, dataset))
        return folders

    def generate(self, drawing: TokenDrawing, dataset: Any, report: Report, bar: Any) -> Tensor:
        """The images of a report in the order of their numbers, [num_images, C, H, W] in 0..1."""
        made = generate_images(
            drawing,
            dataset.encode_text([report.text]),
            report.text,
            num_images=self.section.num_images,
            seed=self.seed,
            batch_size=self.batch_size,
            start=self._start(dataset, report),
            progress=bar.update,
        )
        grey = image_part(dataset).color == "grey"
        return made.mean(dim=1, keepdim=True) if grey else made

    def _primed(self) -> int:
        """Return the number of tokens taken from a real image."""
        return int(self.section.prime * self.models[0].image_seq_len)

    def _start(self, dataset: Any, report: Report) -> Tensor | None:
        """The first tokens of a real image, int64 [1, n]."""
        if not self._primed():
            return None
        vae, part = self.models[0].vae, image_part(dataset)
        image = report.real
        if self.section.prime_image is not None:
            path = Path(self.section.prime_image)
            try:
                image = decode_image(path, part.color)
                size = resized_shape(image.shape[1], image.shape[2], vae.image_size)
                check_size(*size, MAX_PIXELS, f"{path}, resized to {vae.image_size},")
            except (UndecodableImage, OSError) as error:
                raise ConfigError(f"ensemblor.prime_image: {error}.") from None
            image = crop_square(
                resize_short_side(image, vae.image_size), vae.image_size, random=False
            )
        assert image is not None  # the section refuses a prompt without an image
        batch = part.finish({"images": image[None].to(self.device)})
        return self.models[0].image_tokens(batch)[:, : self._primed()]

    def _write(self, report: Report, images: Tensor, dataset: Any) -> Path:
        folder = self.out_dir / FOLDER / report.folder
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.png"):
            stale.unlink()
        order, scores = list(range(len(images))), None
        if self.reranker is not None:
            scores = self.reranker.scores(report.text, images)
            order.sort(key=scores.__getitem__, reverse=True)
        entries = []
        for place, number in enumerate(order, start=1):
            Image.fromarray(pixels(images[number])).save(folder / f"{place}.png")
            entry: dict[str, Any] = {"file": f"{place}.png", "number": number + 1}
            if scores is not None:
                entry["agreement"] = round(scores[number], 4)
            entries.append(entry)
        real = None if report.real is None else report.real.float() / 255
        made_by = f"{self.origin['run']}, {self.origin['model']}"
        draw_image_sheet(
            folder / "sheet.png",
            [images[number] for number in order],
            [
                f"{entry['number']}: agreement {entry['agreement']:.2f}"
                if scores is not None
                else str(entry["number"])
                for entry in entries
            ],
            real=real,
            real_title="real, similar report" if report.like else "real image",
            primed=self._primed() / self.models[0].image_seq_len,
            report=report.text,
            caption=f"{report.source}; {made_by}; seed {self.seed}"
            + (f"; real image: {report.like}" if report.like else ""),
        )
        section = self.section
        settings = {
            **self.origin,
            "report": report.text,
            "source": report.source,
            "real_image": report.like or (None if report.real is None else report.source),
            "seed": self.seed,
            "temperature": section.temperature,
            "filter_thres": section.filter_thres,
            "top_p": section.top_p,
            "cond_scale": section.cond_scale,
            "primed_tokens": self._primed(),
            "prime_image": section.prime_image,
            "precision": self.precision,
            "rerank": section.rerank.ckpt,
            "images": entries,
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "settings.json").write_text(text + "\n", encoding="utf-8")
        return folder


class Reranker:
    """Scores images by the cosine similarity of their embedding and that of the report.

    The model, its tokenizer and the preparation of its images are those of the run that wrote the
    checkpoint; the data of that run are not needed.

    Args:
        ckpt: path of the checkpoint.
        device: where to compute.

    Raises:
        ConfigError: the checkpoint is not one of ConVIRT.
        CheckpointError: it is missing, damaged or holds no configuration.
    """

    def __init__(self, ckpt: str, device: torch.device) -> None:
        found = from_checkpoint(Path(ckpt))
        if not isinstance(found.model, ConVIRT):
            kind = type(found.model).__name__
            raise ConfigError(f"{RERANK}: {ckpt} is a checkpoint of {kind}; allowed: ConVIRT.")
        if found.reports is None or found.pixels is None:
            raise ConfigError(f"{RERANK}: {ckpt} was not trained on images and reports.")
        self.device = device
        self.reports, self.pixels = found.reports, found.pixels
        self.model = found.model.to(device)

    @torch.inference_mode()
    def scores(self, report: str, images: Tensor) -> list[float]:
        """The agreement of images with a report, -1 to 1 each; the same for equal images.

        Args:
            report: the text.
            images: [B, 1 or 3, H, W] in 0..1.
        """
        batch = move(self.reports.encode([report]), self.device)
        wanted = self.model.encode_text(batch)["linguistic"]
        distinct, places = images.unique(dim=0, return_inverse=True)
        found = self.model.encode({"images": self._prepare(distinct)})["visual"]
        exact = widest_float(self.device)
        scores = functional.cosine_similarity(found.to(exact), wanted.to(exact))
        agreement: list[float] = scores[places].tolist()
        return agreement

    def _prepare(self, images: Tensor) -> Tensor:
        pixels = (images * 255).round().to(torch.uint8)
        if self.pixels.channels == 1:
            pixels = pixels.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
        plain = torch.stack([self.pixels.plain(image) for image in pixels.cpu()])
        return self.pixels.normalized(plain.to(self.device))


def _most_alike(
    datasets: Mapping[str, Any], prompts: Sequence[str]
) -> dict[str, tuple[str, int] | None]:
    """Find the sample with the most similar report for each prompt: split and number, or None.

    Similarity is the share of common words, weighted by their rarity over reports. The first of
    equal ones is taken.
    """
    reports = [
        (split, index, frozenset(words(dataset.describe(index)["report"].lower())))
        for split, dataset in datasets.items()
        for index in range(min(len(dataset), MOST_COMPARED))
    ]
    counts = Counter(word for _, _, found in reports for word in found)

    def weight(some: frozenset[str]) -> float:
        return sum(math.log1p(len(reports) / (1 + counts[word])) for word in sorted(some))

    alike: dict[str, tuple[str, int] | None] = {}
    for prompt in prompts:
        wanted = frozenset(words(prompt.lower()))
        best = 0.0
        alike[prompt] = None
        for split, index, found in reports:
            common = weight(wanted & found)
            share = common / weight(wanted | found) if common else 0.0
            if share > best:
                best, alike[prompt] = share, (split, index)
    return alike


def _slug(text: str) -> str:
    """Return the first words of a prompt with a hash, as others may start with the same words."""
    words = "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:40].strip("-")
    return f"{words}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _warn_of_losses(dataset: Any, text: str) -> None:
    """Log unknown words of a report, and whether it was truncated."""
    tokenizer, longest = dataset.spec.tokenizer, dataset.spec.tokenizer_max_len
    clean = getattr(getattr(dataset, "seq", dataset), "clean", str)
    ids = tokenizer(clean(text))["input_ids"]
    if len(ids) > longest:
        LOGGER.warning(
            "The report '%.60s ...' has %d tokens; the last %d are cut off, as "
            "tokenizer_max_len is %d.",
            text,
            len(ids),
            len(ids) - longest,
            longest,
        )
    encoded = dataset.encode_text([text])
    unknown = encoded["input_ids"][0] == tokenizer.unk_token_id
    words = dataset.words(text)
    missed = {words[n] for n in encoded["word_ids"][0][unknown].tolist() if 0 <= n < len(words)}
    if missed:
        LOGGER.warning(
            "The vocabulary of the model does not have: %s. It reads them as unknown words.",
            ", ".join(sorted(missed)),
        )
