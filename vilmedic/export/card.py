"""Model card of an export: description, training, metrics and usage."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vilmedic.config.declared import IMAGES, REPORTS
from vilmedic.config.trained import data_parts
from vilmedic.datasets.report_text import chain_name
from vilmedic.errors import CheckpointError, escaped
from vilmedic.evaluation.evaluations import FOLDER, read_index
from vilmedic.evaluation.results import results_name, source, table_cells
from vilmedic.export import snippets
from vilmedic.export.parts import HEADS, PREPROCESSOR, Part
from vilmedic.log import LOGGER
from vilmedic.manifest import (
    DALLE_FOLDER,
    IMAGE_ENCODER,
    MANIFEST,
    ONNX_FOLDER,
    TEXT_ENCODER,
    VAE_FOLDER,
)
from vilmedic.models.from_checkpoint import Loaded

CARD = "README.md"
SUMMARIES = {
    "ConVIRT": "An image encoder and a text encoder for chest X-rays and their reports, trained to "
    "bring an image and its report together (ConVIRT, arXiv 2010.00747).",
    "GLoRIA": "An image encoder and a text encoder for chest X-rays and their reports, compared as "
    "wholes and word by region (GLoRIA, ICCV 2021).",
    "SimCLR": "An image encoder for chest X-rays, trained without labels and without reports "
    "(SimCLR, arXiv 2002.05709).",
    "VAE": "A discrete variational autoencoder for chest X-rays: images become a grid of codes, "
    "and codes become images (arXiv 2102.12092, section 2.1).",
    "DALLE": "A transformer that makes chest X-rays of reports, with the discrete autoencoder that "
    "its images are made of (DALL-E, arXiv 2102.12092).",
}
TASKS = {
    "ConVIRT": "zero-shot-image-classification",
    "GLoRIA": "zero-shot-image-classification",
    "SimCLR": "image-feature-extraction",
    "DALLE": "text-to-image",
}
BASELINES = {
    "untrained": "the same network before training (`untrained`)",
    "raw_pixels": "what small images themselves give (`raw_pixels`)",
}
MAKES_IMAGES = ("VAE", "DALLE")
COPIED = (
    *("run", "system", "split", "samples", "checkpoints", "models_used", "ema", "seed"),
    *("batch_size", "precision", "changed", "protocols"),
)
"""Fields of a split's results that a card shows besides the numbers."""


def gather(loaded: Loaded) -> dict[str, Any]:
    """Content of a model card beyond the weights: training and evaluation.

    Args:
        loaded: the model. Its run directory is asked, or the export that it was loaded from.

    Returns:
        `environment`, and `results`: for each split the results of these weights. If none, `other`
        names the newest evaluation of other weights.

    Raises:
        CheckpointError: the description in the export is damaged.
    """
    if (known := loaded.header.get("export")) is not None:
        about: dict[str, Any] = known["about"]
        try:
            _training(loaded, about), _numbers(about)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{loaded.path}: its description of the run is damaged: {error!r}."
            ) from None
        return about
    run_dir = loaded.path.parent
    about = {"environment": _environment(run_dir, loaded.header.get("seed")), "results": {}}
    newest = None
    for entry in reversed(read_index(run_dir)):
        if entry.get("generated") or not entry.get("numbers"):
            continue
        newest = newest or entry
        files = [one.get("file") for one in entry.get("checkpoints") or ()]
        if files == [loaded.path.name] and bool(entry.get("ema")) == loaded.ema:
            about["results"] = _results(run_dir / FOLDER / entry["folder"])
        if about["results"]:
            break
    if newest is not None and not about["results"]:
        about["other"] = source(
            str(newest.get("system")),
            newest.get("checkpoints") or [],
            ema=bool(newest.get("ema")),
        )
    return about


def write_card(
    loaded: Loaded,
    parts: Sequence[Part],
    about: Mapping[str, Any],
    onnx: Mapping[str, Any] | None,
    folder: Path,
) -> None:
    """Write README.md."""
    sections = [
        _front(loaded),
        _summary(loaded),
        _not_for(loaded),
        _licence(),
        _contents(parts, onnx),
        _loading(loaded, parts, onnx),
        _training(loaded, about),
        _numbers(about),
    ]
    text = "\n\n".join(section.strip() for section in sections) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def shortened(value: Any) -> Any:
    """Replace the home directory by `~` in nested values, for privacy."""
    if isinstance(value, Mapping):
        return {key: shortened(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(one) for one in value]
    home = str(Path.home())
    return value.replace(home, "~") if isinstance(value, str) and len(home) > 1 else value


def _environment(run_dir: Path, seed: Any) -> dict[str, Any]:
    """Return the command and versions recorded by the run; empty if they are missing."""
    try:
        content = json.loads((run_dir / f"environment_{seed}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    kinds = {"command": list, "overrides": list, "versions": dict, "python": str, "git_commit": str}
    found = {name: content[name] for name in kinds if isinstance(content.get(name), kinds[name])}
    return dict(shortened(found))


def _results(folder: Path) -> dict[str, Any]:
    """Return for each split its results and settings, and the rows of its table."""
    found = {}
    for path in sorted(folder.glob(results_name("*"))):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            said = {name: results[name] for name in COPIED}
            said["tf32"] = bool(results.get("tf32"))
            said["cells"] = table_cells(results)
            _numbers({"results": {"": said}})
            found[str(results["split"])] = shortened(said)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            LOGGER.warning("%s is left out of the model card: it is damaged (%r)", path, error)
    return found


def _front(loaded: Loaded) -> str:
    system = type(loaded.model).__name__
    content: dict[str, Any] = {"library_name": "vilmedic"}
    if system in TASKS:
        content["pipeline_tag"] = TASKS[system]
    content["tags"] = ["chest-x-ray", "radiology", "self-supervised-learning", system.lower()]
    rest = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    comment = "# fill in: the licence under which others may use these weights"
    return f"---\nlicense: unknown  {comment}\n{rest}---"


def _summary(loaded: Loaded) -> str:
    system = type(loaded.model).__name__
    what = SUMMARIES.get(system, f"A model of the system {system}, trained on chest X-rays.")
    averaged = " The weights are averages over training." if loaded.ema else ""
    return (
        f"# {_name(loaded)}\n\n{what}{averaged} It was trained with vilmedic; what is here loads "
        "without it."
    )


def _not_for(loaded: Loaded) -> str:
    lines = [
        "- Not for diagnosis, triage or any other decision about a patient: it is no medical "
        "device, and nobody has tested it as one.",
        "- Not for images of other kinds than it was trained on: other parts of the body, other "
        "projections, other devices or other populations may fail without a sign.",
        "- Not for finding out who somebody is, nor anything about a person beyond research.",
    ]
    if type(loaded.model).__name__ in MAKES_IMAGES:
        lines.append(
            "- Images that it makes are no X-rays of anybody. They must not be passed off as such, "
            "nor be mixed into clinical data."
        )
    else:
        lines.append(
            "- Similarities and scores rank; they are no probabilities, and no threshold on them "
            "has been validated."
        )
    return "## What it must not be used for\n\n" + "\n".join(lines)


def _licence() -> str:
    return (
        "## Licence\n\n"
        "**To be filled in** by whoever shares these weights, here and in `license` above.\n\n"
        "> **Weights trained on credentialed data may not be public.** Agreements such as those of "
        "MIMIC-CXR, PadChest or a hospital can forbid passing on what was derived from the data, "
        "and weights can give away parts of what they were trained on. Read the agreement of the "
        "data below before anybody else gets this folder."
    )


def _contents(parts: Sequence[Part], onnx: Mapping[str, Any] | None) -> str:
    rows = []
    for part in parts:
        if part.library == "timm":
            what = f"image encoder, {part.said['architecture']} as a folder of timm"
            if "classifier" in part.said:  # a network of torchvision
                what += "; torchvision's network takes the same weights, all but the classifier's"
        elif part.name == IMAGE_ENCODER:
            what = f"image encoder, as {part.library} has it"
        elif part.name == TEXT_ENCODER:
            what = "text encoder and tokenizer, as transformers has them"
        elif part.name == HEADS:
            what = "heads behind the encoders: " + ", ".join(_modules(part.said["names"]))
        elif part.name == VAE_FOLDER:
            what = "VAE, in the names of dalle-pytorch's `DiscreteVAE`"
        elif part.name == DALLE_FOLDER:
            what = "transformer, in the names of dalle-pytorch's `DALLE`"
        elif part.name.startswith(TEXT_ENCODER):
            continue  # the tokenizer beside it
        else:
            what = "tokenizer, as transformers has it"
        rows.append((part.name if part.name == HEADS else f"{part.name}/", what))
    rows = [(name.replace("/tokenizer.json/", "/"), what) for name, what in rows]
    rows.append((PREPROCESSOR, "what images go through first"))
    if onnx is not None:
        rows.append((f"{ONNX_FOLDER}/", f"the same as ONNX, opset {onnx['opset']}"))
    rows.append((MANIFEST, "what `vilmedic.load` needs, and the digests of all files"))
    table = "\n".join(f"| `{name}` | {what} |" for name, what in rows)
    return f"## What is here\n\n| | |\n|---|---|\n{table}"


def _loading(loaded: Loaded, parts: Sequence[Part], onnx: Mapping[str, Any] | None) -> str:
    names = {part.name for part in parts}
    text = "## Load it\n\n" + _python(snippets.loading(parts))
    for part in parts:
        if unused := part.said.get("unused"):
            named = " and ".join(f"`{name}`" for name in unused)
            text += (
                f"\n\nOf `{part.name}/` transformers prints that weights of {named} are missing "
                "and newly initialised: they were not trained, and the features below do not use "
                "them."
            )
    if VAE_FOLDER in names:
        text += "\n\nCodes of an image, and images of codes:\n\n" + _python(
            snippets.codes(loaded, parts)
        )
    elif IMAGE_ENCODER in names:
        text += "\n\nFeatures, as `vilmedic` computes them:\n\n"
        text += _python(snippets.features(loaded, parts))
    if onnx is not None:
        text += "\n\nThe same with ONNX Runtime, for any number of images and texts:\n\n"
        text += _python(snippets.onnx(onnx))
    with_us = ["import vilmedic", "", 'model = vilmedic.load(".")  # or the name of the repository']
    return text + "\n\nWith vilmedic:\n\n" + _python(with_us)


def _training(loaded: Loaded, about: Mapping[str, Any]) -> str:
    said, environment = loaded.header, about.get("environment") or {}
    rows = [("System", type(loaded.model).__name__)]
    rows += _data_rows(loaded)
    if (targets := getattr(loaded.model, "targets", None)) is not None:
        rows.append(("Targets", targets.extra_repr()))
    command = list(environment.get("command") or ())
    if command and Path(str(command[0])).name in ("train.py", "vilmedic-train"):
        words = ["python", *command] if str(command[0]).endswith(".py") else command
        rows.append(("Command", f"`{shlex.join(map(str, words))}`"))
    elif environment.get("overrides"):
        rows.append(("Settings", f"`{shlex.join(map(str, environment['overrides']))}`"))
    if said.get("epoch") is not None:
        step = "" if said.get("step") is None else f", step {said['step']}"
        rows.append(("Checkpoint", f"epoch {said['epoch'] + 1}{step}, seed {said.get('seed')}"))
    if said.get("metric") is not None and said.get("score") is not None:
        better = {"lower": "lower is better", "higher": "higher is better"}.get(said["better"], "")
        score = f"{said['metric']} = {said['score']:.6g}"
        rows.append(("Chosen by", f"{score} ({better})" if better else score))
    versions = dict(environment.get("versions") or {})
    if environment.get("python"):
        versions["python"] = environment["python"]
    if versions:
        rows.append(("Versions", ", ".join(f"{name} {one}" for name, one in versions.items())))
    if environment.get("git_commit"):
        rows.append(("Commit", f"`{environment['git_commit']}`"))
    table = "\n".join(_row(row) for row in rows)
    return f"## How it was trained\n\n| | |\n|---|---|\n{table}"


def _data_rows(loaded: Loaded) -> list[tuple[str, str]]:
    """Return the data settings, for a table."""
    dataset = shortened(loaded.config["dataset"])
    nodes = {cls: node for cls, (_, node) in data_parts(dataset)}
    image, text = nodes.get(IMAGES), nodes.get(REPORTS)
    rows = [("Data", f"`{dataset.get('proto')}`")]
    roots = dict.fromkeys(str(node["root"]) for node in (image, text) if node and "root" in node)
    if roots:
        places = ", ".join(f"`{one}`" for one in roots)
        rows[0] = ("Data", f"`{dataset.get('proto')}` of {places}")
    if loaded.pixels is not None:
        pixels = loaded.pixels
        sizes = f"short side {pixels.resize}" if pixels.resize else "as large as their files"
        cut = f", middle {pixels.crop} x {pixels.crop}" if pixels.crop else ""
        scale = f"mean {pixels.mean}, std {pixels.std}"
        rows.append(("Images", f"{pixels.color}, {sizes}{cut}, {scale}"))
    if loaded.reports is not None and text is not None:
        cleaned = loaded.reports.processing
        clean = f"cleaned by `{chain_name(cleaned)}`" if cleaned else "as they are"
        file = f"`{text['file']}`, " if "file" in text else ""
        rows.append(("Texts", f"{file}{clean}, at most {loaded.reports.max_len} tokens"))
    if loaded.spec.labels:
        targets = getattr(loaded.model, "targets", None)
        soft = targets is not None and targets.needs == "labels"
        used = "(trained on, as soft targets)" if soft else "(not trained on)"
        rows.append(("Labels", f"{', '.join(loaded.spec.labels)} {used}"))
    return rows


def _numbers(about: Mapping[str, Any]) -> str:
    results = about.get("results") or {}
    if not results:
        text = "These weights were not evaluated."
        if about.get("other"):
            text += f" The newest evaluation of the run is of others: {about['other']}."
        return f"## Numbers\n\n{text}"
    tables = [said["cells"] for said in results.values()]
    blocks = ["## Numbers"]
    if any("[" in cell for table in tables for row in table for cell in row):
        blocks.append("Brackets are intervals of 95% over bootstrap samples of the split.")
    for said in results.values():
        head, *rows = said["cells"]
        lines = [_row(head), f"|---{'|---:' * (len(head) - 1)}|", *map(_row, rows)]
        blocks.append("\n".join(lines))
    first = next(iter(results.values()))
    evaluated = source(first["system"], first["checkpoints"], ema=first["ema"])
    sizes = ", ".join(f"{split}: {said['samples']} samples" for split, said in results.items())
    arithmetic = first["precision"] + (" with TF32 products" if first.get("tf32") else "")
    how = f"batches of {first['batch_size']} in {arithmetic}, seed {first['seed']}"
    beside = [BASELINES[name] for name in BASELINES if any(name in table[0] for table in tables)]
    more = f" Beside it: {' and '.join(beside)}." if beside else ""
    blocks.append(f"Of {evaluated}; {sizes}; {how}.{more}")
    if first.get("changed"):
        blocks.append(f"Evaluated otherwise than trained: `{json.dumps(first['changed'])}`.")
    protocols = yaml.safe_dump(first["protocols"], sort_keys=False, allow_unicode=True, width=100)
    blocks.append(f"The protocol of each number:\n\n```yaml\n{protocols.rstrip()}\n```")
    return "\n\n".join(blocks)


def _row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table, with escaped cells."""
    plain = [escaped(" ".join(cell.split())).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(plain)} |"


def _modules(names: Sequence[str]) -> list[str]:
    """Return the common prefixes of weight names, without the layers inside."""
    return list(dict.fromkeys(f"`{'.'.join(name.split('.')[:2])}`" for name in names))


def _name(loaded: Loaded) -> str:
    run = loaded.config.get("name")
    system = type(loaded.model).__name__
    title = f"{system} for chest X-rays"
    return f"{escaped(' '.join(str(run).split()))}: {title}" if run else title


def _python(lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"
