"""Prompted findings: a classifier of real images tests whether generated ones match prompts."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import AtLeast, Below, Between, Resamples, Temperature
from vilmedic.datasets.aligned import stable_seed
from vilmedic.datasets.image import image_part
from vilmedic.device import widest_float
from vilmedic.errors import ArgumentError
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.evaluation.results import fitting
from vilmedic.files import text_table
from vilmedic.generation.generators import warn_of_guidance
from vilmedic.generation.sampling import Sampling, TokenDrawing
from vilmedic.log import columns
from vilmedic.metrics.classification import report_classes
from vilmedic.metrics.contract import Metric
from vilmedic.metrics.pointing_game import SIDES, Finding, read_findings
from vilmedic.models.dalle import DALLE

logger = logging.getLogger(__name__)
KEY = "prompted_findings"
FIELDS = ("prompt", "finding", "side")

# of the classifier
WIDTHS = (24, 48, 96, 96)
BATCH = 64
MOST_BLUR = 3  # average pooling of 1 to this many pixels
SHIFT = 4  # pixels


@dataclass(frozen=True)
class _Prompt:
    name: str
    text: str
    finding: str | None
    side: str | None

    def shown_by(self, findings: list[Finding]) -> bool:
        """Return whether a real image with these findings has what the prompt asks for."""
        if self.finding is None:
            return not findings
        return any(
            found.name == self.finding and (self.side is None or found.side in (self.side, None))
            for found in findings
        )


class PromptedFindings(Metric):
    """How well a classifier of real images finds in generated ones what their prompts ask for.

    A small convolutional network learns on the real images of the training split to tell, for each
    prompt on its own, images that show its finding. It then scores images that are generated from
    the prompts. `auroc` is the mean over prompts of the area under the curve that tells the images
    of a prompt from those of the others; guessing gives 0.5. `accuracy` is the share of images for
    which the class of their prompt stands out most among the classes, guessing gives
    `accuracy_chance`. What the classifier can do at all is `real_auroc`, on real images of the
    split, and `reconstruction_auroc`, on these after they went through the VAE. Each has a 95%
    interval over the images, `<name>_interval`; `classes` has the AUROC of each prompt.

    Args:
        root: folder that holds the line files of findings, as phantom data sets have them.
        prompts: what to generate: a name for each prompt, and under it `prompt` (the report),
            `finding` (its name; none for images without any) and `side` (left or right of the
            patient; none for either).
        file: name of the line files after the split.
        train_split: the split whose real images the classifier learns from.
        num_images: images generated for each prompt.
        epochs: passes of the classifier over the real images.
        temperature: of the draws, as ensemblor.temperature.
        filter_thres: of the draws, as ensemblor.filter_thres.
        cond_scale: of the draws, as ensemblor.cond_scale.
        bootstrap: resamples of the images behind each 95% interval; 0 leaves intervals out.
    """

    numbers: ClassVar = {
        "auroc": "higher",
        "accuracy": "higher",
        "accuracy_chance": "neither",
        "real_auroc": "higher",
        "reconstruction_auroc": "higher",
    }

    def __init__(
        self,
        *,
        root: str,
        prompts: dict[str, dict[str, str | None]],
        file: str = "finding.jsonl",
        train_split: str = "train",
        num_images: Annotated[int, Between(2, 65536)] = 16,
        epochs: Annotated[int, AtLeast(1)] = 8,
        temperature: Temperature = 1.0,
        filter_thres: Annotated[float, AtLeast(0), Below(1)] = 0.9,
        cond_scale: Annotated[float, Between(0, 1000)] = 1.0,
        bootstrap: Resamples = 1000,
    ) -> None:
        self.root, self.prompts, self.file = root, prompts, file
        self.train_split, self.num_images, self.epochs = train_split, num_images, epochs
        self.temperature, self.filter_thres = temperature, filter_thres
        self.cond_scale, self.bootstrap = cond_scale, bootstrap
        self._wanted = [_read_prompt(name, given) for name, given in prompts.items()]
        if len(self._wanted) < 2:
            raise ArgumentError({"prompts": "needs at least two prompts to compare."})

    def check(self, evaluation: Evaluation) -> None:
        """Refuse models that make no images, and findings that no training image has.

        Guidance that the model was not trained for is a warning.
        """
        model = evaluation.networks.members[0]()
        if not isinstance(model, DALLE):
            raise ArgumentError({"": f"{type(model).__name__} makes no images of reports."})
        dropped = model.null_cond_prob
        warn_of_guidance(f"{KEY}.cond_scale", self.cond_scale, dropped, evaluation.title)
        findings = read_findings(self.root, self.train_split, self.file)
        for prompt in self._wanted:
            if not any(prompt.shown_by(found) for found in findings):
                known = sorted({one.name for found in findings for one in found})
                raise ArgumentError(
                    {
                        f"prompts.{prompt.name}": f"no image of {self.root} shows "
                        f"'{prompt.finding}' there. Findings: {', '.join(known)}."
                    }
                )

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """The numbers above, and `probabilities`: of each class in the images of each prompt."""
        learned_from, labels = self._real(evaluation, self.train_split)
        classifier = ImageClassifier(learned_from, labels, epochs=self.epochs, seed=evaluation.seed)
        real, real_labels = self._real(evaluation, evaluation.split)
        models = [copy.deepcopy(member()).eval() for member in evaluation.networks.members]
        through = _reconstruct(models[0], real, evaluation)
        sampling = Sampling(self.temperature, self.filter_thres, 1.0, self.cond_scale)
        precision = evaluation.networks.precision
        with TokenDrawing(models, sampling, precision=precision) as drawing:
            generated = torch.stack([self._generate(drawing, p, evaluation) for p in self._wanted])
        count = len(self._wanted)
        logits = classifier.logits(generated.flatten(0, 1)).view(count, self.num_images, count)
        usual = torch.logit(labels.float().mean(dim=0), eps=1e-4)
        probabilities = logits.sigmoid().mean(dim=1)
        names = [prompt.name for prompt in self._wanted]
        asked = torch.eye(count).repeat_interleave(self.num_images, dim=0)
        above = logits.flatten(0, 1).double() - usual  # shifts of a class change no AUROC
        found = self._report(above, asked, evaluation, "generated images", one_class=True)
        logger.info(
            "%s", _table(names, probabilities, {k: v["auroc"] for k, v in found["classes"].items()})
        )
        able = {
            name: self._report(classifier.logits(images), real_labels, evaluation, what)
            for name, images, what in (
                ("real", real, "real images"),
                ("reconstruction", through, "reconstructed images"),
            )
        }
        return {
            "auroc": found["auroc"],
            "auroc_interval": found["auroc_interval"],
            "accuracy": found["accuracy"],
            "accuracy_interval": found["accuracy_interval"],
            "accuracy_chance": 1 / count,
            **{
                f"{name}_{key}": one[key]
                for name, one in able.items()
                for key in ("auroc", "auroc_interval")
            },
            "classes": {
                name: {key: one[key] for key in ("auroc", "auroc_interval")}
                for name, one in found["classes"].items()
            },
            "probabilities": {
                name: dict(zip(names, row, strict=True))
                for name, row in zip(names, probabilities.tolist(), strict=True)
            },
        }

    def _report(
        self,
        logits: Tensor,
        labels: Tensor,
        evaluation: Evaluation,
        what: str,
        *,
        one_class: bool = False,
    ) -> dict[str, Any]:
        """AUROC of logits [N, C] for labels [N, C], with intervals over the images.

        With one class per image also the accuracy of the largest logit.
        """
        return report_classes(
            lambda block: logits[:, block].double().numpy(),
            csr_array(labels.bool().numpy()),
            [prompt.name for prompt in self._wanted],
            multi_label=False if one_class else None,
            bootstrap=self.bootstrap,
            seed=evaluation.seed,
            context=f"{KEY}, {evaluation.name}, split {evaluation.split}, {what}",
        )

    def _real(self, evaluation: Evaluation, split: str) -> tuple[Tensor, Tensor]:
        """The real images of a split, uint8 [N, 1, H, W], and what they show, [N, prompts]."""
        dataset = evaluation.networks.dataset(split)
        part = image_part(dataset)
        findings = read_findings(self.root, split, self.file)
        lines = dataset.kept.tolist()
        images = torch.stack([_grey(part.images(line)[0]) for line in lines])
        shown = [[prompt.shown_by(findings[line]) for prompt in self._wanted] for line in lines]
        return images, torch.tensor(shown)

    def _generate(self, drawing: TokenDrawing, prompt: _Prompt, evaluation: Evaluation) -> Tensor:
        model, device = drawing.models[0], drawing.device
        encoded = evaluation.dataset.encode_text([prompt.text])
        random = torch.Generator().manual_seed(stable_seed(prompt.text, evaluation.seed))
        shape = (self.num_images, model.image_seq_len)
        numbers = torch.rand(shape, generator=random, dtype=torch.float64)
        tokens = drawing(
            encoded["input_ids"].expand(self.num_images, -1).to(device),
            encoded["attention_mask"].expand(self.num_images, -1).to(device),
            numbers.to(device, widest_float(device)),
        )
        with torch.inference_mode():
            return _pixels(model.vae.decode(tokens))


class ImageClassifier:
    """Tells which of some classes grey images have, each on its own.

    Images are shifted and blurred at random in training, so that sharpness, which generated images
    lack, does not decide. Training starts from the seed and leaves the caller's random state alone.

    Args:
        images: uint8 [N, 1, H, W].
        labels: multi-hot, [N, C].
        epochs: passes over the images.
        seed: of weights, order and augmentation.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = _network(labels.shape[1])
            self._fit(images, labels.float(), epochs)
        self.network.eval()

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits of the classes, [N, C], of uint8 images [N, 1, H, W]; equal of equal ones."""
        # In batches of different size an image gets logits that differ by rounding.
        distinct, places = images.unique(dim=0, return_inverse=True)
        return torch.cat([self.network(_normalise(part)) for part in distinct.split(256)])[places]

    def _fit(self, images: Tensor, labels: Tensor, epochs: int) -> None:
        self.network(_normalise(images[:2]))  # makes the last layer
        self.network.train()
        steps = epochs * -(-len(images) // BATCH)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(len(images)).split(BATCH):
                    logits = self.network(_normalise(_augment(images[rows])))
                    loss = functional.binary_cross_entropy_with_logits(logits, labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()


def _read_prompt(name: str, given: dict[str, str | None]) -> _Prompt:
    unknown = [key for key in given if key not in FIELDS]
    if unknown or not given.get("prompt"):
        what = f"'{unknown[0]}' is not known" if unknown else "it has no 'prompt'"
        raise ArgumentError({f"prompts.{name}": f"{what}. Allowed: {', '.join(FIELDS)}."})
    side = given.get("side")
    if side not in (None, *SIDES):
        raise ArgumentError({f"prompts.{name}.side": f"given {side}, allowed: left, right."})
    return _Prompt(name, str(given["prompt"]), given.get("finding"), side)


def _reconstruct(model: DALLE, images: Tensor, evaluation: Evaluation) -> Tensor:
    """Images after the VAE made tokens and then images of them again."""
    part, device = image_part(evaluation.dataset), evaluation.networks.device
    found = []
    with torch.inference_mode():
        for chunk in images.split(64):
            batch = part.finish({"images": chunk.to(device)})
            found.append(_pixels(model.vae.decode(model.image_tokens(batch))))
    return torch.cat(found)


def _pixels(images: Tensor) -> Tensor:
    """Images in 0..1 [B, C, H, W] as grey uint8 [B, 1, H, W] on the CPU."""
    return (images.mean(dim=1, keepdim=True) * 255).round().byte().cpu()


def _grey(image: Tensor) -> Tensor:
    return image.float().mean(dim=0, keepdim=True).round().byte()


def _table(names: list[str], probabilities: Tensor, areas: dict[str, float | None]) -> str:
    """Prompts down, what the classifier sees across; columns that do not fit follow in blocks."""
    rows = [["prompt, seen as", *names, "AUROC"]]
    for name, row in zip(names, probabilities.tolist(), strict=True):
        area = areas[name]
        last = "-" if area is None else f"{area:.2f}"
        rows.append([name, *(f"{value:.2f}" for value in row), last])
    text = ["Mean probability of each finding in the images of each prompt:"]
    for part in fitting(rows, columns()):
        text += text_table([[row[0], *row[1:][part]] for row in rows], "   ")
    return "\n".join(text)


def _network(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 1
    for width in WIDTHS:
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    # Positions count: a side is where something is.
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(classes)
    )


def _normalise(images: Tensor) -> Tensor:
    """Each image with mean 0 and deviation 1, whatever its exposure."""
    values = images.float().flatten(1)
    spread, mean = torch.std_mean(values, dim=1, keepdim=True)
    return ((values - mean) / spread.clamp(min=1e-3)).view(images.shape)


def _augment(images: Tensor) -> Tensor:
    """Images moved by a few pixels and blurred, one draw a batch."""
    down, across = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    values = functional.pad(images.float(), [SHIFT] * 4, mode="replicate")
    height, width = images.shape[-2:]
    values = values[..., SHIFT + down :, SHIFT + across :][..., :height, :width]
    blur = int(torch.randint(1, MOST_BLUR + 1, ()))
    if blur > 1:
        size = (height, width)
        values = functional.avg_pool2d(values, blur, ceil_mode=True)
        values = functional.interpolate(values, size=size, mode="bilinear", align_corners=False)
    return values
