"""Python snippets of a model card that load each part without this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vilmedic.datasets.report_text import chain_name
from vilmedic.export.parts import HEADS, Part
from vilmedic.manifest import DALLE_FOLDER, IMAGE_ENCODER, ONNX_FOLDER, TEXT_ENCODER, VAE_FOLDER
from vilmedic.models.from_checkpoint import Loaded

PROJECT = (
    "def project(given, head):",
    '    hidden = relu(linear(given, heads[f"{head}.0.weight"], heads[f"{head}.0.bias"]))',
    '    return linear(hidden, heads[f"{head}.2.weight"], heads[f"{head}.2.bias"])',
)
"""The head of Zhang et al. (2020): linear, ReLU, linear."""
ARRAYS = {
    "images": "pixels.numpy()",
    "input_ids": "ids.numpy()",
    "attention_mask": "mask.numpy()",
    "word_ids": "word_ids.numpy()",
    "codes": "logits.reshape(*logits.shape[:2], -1).argmax(1)",
}
RESULTS = {
    "image_encoder": "on_images",
    "text_encoder": "on_texts",
    "vae_encoder": "[logits]",
    "vae_decoder": "[made]",
}
IMAGE = "image.png"
MORE_PIXELS = (
    "# What the processor leaves out: between resizing and cropping, images also go through",
    "# `transforms` of preprocessor_config.json. Without them the features are others.",
)
TEXTS = '["No acute findings.", "Large left pleural effusion."]'


def loading(parts: Sequence[Part]) -> list[str]:
    """Lines that load every part of an export, imports first."""
    by_name = {part.name: part for part in parts}
    imports, lines = [], ['folder = "."  # where this file is']
    if VAE_FOLDER in by_name:
        return _loading_of_codes(by_name)
    if (image := by_name.get(IMAGE_ENCODER)) is not None:
        imports += {
            "timm": ["import timm"],
            "torchvision": ["import torch", "import torchvision"],
        }.get(image.library, [])
        lines += _image_encoder(image)
        lines.append("processor = CLIPImageProcessor.from_pretrained(folder)")
    names = ["AutoModel"] if image is not None and image.library == "transformers" else []
    names += ["CLIPImageProcessor"] if image is not None else []
    if (text := by_name.get(TEXT_ENCODER)) is not None:
        names += ["AutoModel", "AutoTokenizer"]
        whole = f'AutoModel.from_pretrained(f"{{folder}}/{TEXT_ENCODER}")'
        encoder = f"{whole}.get_encoder()" if text.said["encoder_of_two"] else whole
        lines.append(f"text_encoder = {encoder}.eval()")
        tokenizer = f'AutoTokenizer.from_pretrained(f"{{folder}}/{TEXT_ENCODER}")'
        lines.append(f"tokenizer = {tokenizer}")
    lines.append('heads = load_file(f"{folder}/heads.safetensors")')
    imports.append("from safetensors.torch import load_file")
    imports.append(f"from transformers import {', '.join(sorted(set(names)))}")
    return [*imports, "", *lines]


def features(loaded: Loaded, parts: Sequence[Part]) -> list[str]:
    """Lines that compute the features of an image and of texts with the loaded parts."""
    by_name = {part.name: part for part in parts}
    heads: list[str] = next((list(part.said["names"]) for part in parts if part.name == HEADS), [])
    grey = loaded.pixels is not None and loaded.pixels.color == "grey"
    text = by_name.get(TEXT_ENCODER)
    projects = any(name.startswith("projection.") for name in heads)
    lines = ["import torch", "from PIL import Image"]
    lines += ["from torch.nn.functional import linear, relu"] if projects else []
    lines += [""] if not projects else ["", "", *PROJECT, "", ""]
    lines.append(f'image = Image.open("{IMAGE}").convert("{"L" if grey else "RGB"}")')
    lines += MORE_PIXELS if loaded.pixels is not None and loaded.pixels.own_list else ()
    lines.append('pixels = processor([image], return_tensors="pt")["pixel_values"]')
    if text is not None:
        cleaning = chain_name("" if loaded.reports is None else loaded.reports.processing or "")
        note = f"  # those of the training were cleaned by '{cleaning}'" if cleaning else ""
        lines.append(f"texts = {TEXTS}{note}")
        options = 'padding=True, truncation=True, return_tensors="pt"'
        lines.append(f"tokens = tokenizer(texts, {options})")
        lines.append('ids, mask = tokens["input_ids"], tokens["attention_mask"]')
    inside = [*_image_lines(loaded, by_name), *_head_lines("visual", "backbone", heads)]
    if text is not None:
        inside += [*_text_lines(text.said), *_head_lines("linguistic", "reports", heads)]
        inside.append("cosines = torch.cosine_similarity(visual[:, None], linguistic[None], dim=2)")
    return [*lines, "with torch.inference_mode():", *(f"    {line}" for line in inside)]


def codes(loaded: Loaded, parts: Sequence[Part]) -> list[str]:
    """Lines that make codes of an image and an image of codes, and score codes with a text."""
    by_name = {part.name: part for part in parts}
    grey = loaded.pixels is not None and loaded.pixels.color == "grey"
    one_channel = by_name[VAE_FOLDER].said["channels"] == 1
    dalle = by_name.get(DALLE_FOLDER)
    lines = [
        "from PIL import Image",
        "",
        f'image = Image.open("{IMAGE}").convert("{"L" if grey else "RGB"}")',
        'pixels = processor([image], return_tensors="pt")["pixel_values"]',
    ]
    lines += MORE_PIXELS if loaded.pixels is not None and loaded.pixels.own_list else ()
    lines += ["pixels = pixels.mean(dim=1, keepdim=True)"] if one_channel else []
    if dalle is not None:
        lines += [
            f'options = {{"padding": "max_length", "max_length": {dalle.said["text_seq_len"]}}}',
            'text = tokenizer(["Large left pleural effusion."], truncation=True, **options)',
            'ids, mask = torch.tensor(text["input_ids"]), torch.tensor(text["attention_mask"])',
        ]
    lines += [
        "with torch.inference_mode():",
        "    codes = vae.get_codebook_indices(pixels)  # [1, N], rows from the top",
        "    again = vae.decode(codes)  # scaled as the VAE sees images",
    ]
    lines += (
        [] if dalle is None else ["    scores = dalle(ids * mask, codes)  # 0 is behind the end"]
    )
    return lines


def onnx(described: Mapping[str, Any]) -> list[str]:
    """Lines that run the ONNX files on the same inputs."""
    lines = ["import onnxruntime", "", f'place = f"{{folder}}/{ONNX_FOLDER}"']
    for file, said in described["files"].items():
        stem = file.removesuffix(".onnx")
        if "word_ids" in said["inputs"]:
            lines.append("padded = torch.nn.utils.rnn.pad_sequence")
            lines.append("word_ids = padded(numbers, batch_first=True, padding_value=-1)")
        lines.append(f'session = onnxruntime.InferenceSession(f"{{place}}/{file}")')
        given = ", ".join(f'"{name}": {ARRAYS[name]}' for name in said["inputs"])
        outputs = ", ".join(said["outputs"])
        lines.append(f"given = {{{given}}}")
        lines.append(f"{RESULTS[stem]} = session.run(None, given)  # {outputs}")
    return lines


def _image_encoder(part: Part) -> list[str]:
    """Lines that load the image encoder."""
    place = f'f"{{folder}}/{part.name}"'
    if part.library == "timm":
        load = f'timm.create_model(f"local-dir:{{folder}}/{part.name}", pretrained=True)'
        return [f"image_encoder = {load}.eval()"]
    if part.library == "transformers":
        whole = f"AutoModel.from_pretrained({place})"
        return [f"image_encoder = {whole}.eval()"]
    network = f'torchvision.models.get_model("{part.said["architecture"]}", weights=None)'
    lines = [
        f"image_encoder = {network}.eval()",
        "weights = image_encoder.state_dict()  # with the version that some networks ask for",
        f'weights.update(load_file(f"{{folder}}/{part.name}/model.safetensors"))  # no classifier',
        "image_encoder.load_state_dict(weights)",
    ]
    if part.said["layer"] is None:
        lines.append(f"image_encoder.{part.said['classifier']} = torch.nn.Identity()")
    return lines


def _image_lines(loaded: Loaded, by_name: Mapping[str, Part]) -> list[str]:
    """Lines from `pixels` to `backbone`, the pooled features of the image encoder."""
    part = by_name[IMAGE_ENCODER]
    lines = []
    given = "pixels"
    if (side := getattr(loaded.model, "upsample", None)) is not None:
        given = "large"
        options = f'size=({side}, {side}), mode="bilinear", align_corners=True'
        lines.append(f"large = torch.nn.functional.interpolate(pixels, {options})")
    if part.library == "transformers":
        more = ", interpolate_pos_encoding=True" if part.said["interpolate_pos_encoding"] else ""
        lines.append(f"found = image_encoder({given}{more})")
        if part.said["output"] != "last_hidden_state" and part.said["pools"]:
            return [*lines, "backbone = found.pooler_output.flatten(1)"]
        mean = "dim=(2, 3)" if part.said["maps"] else "dim=1"
        return [*lines, f"backbone = found.last_hidden_state.mean({mean})"]
    if part.said.get("layer") is not None:
        positions = tuple(part.said["positions"])
        mean = f".mean(dim={positions})" if positions else ""
        seen = "given[0]" if part.said["before"] else "output"
        rectified = ".relu()" if part.said["rectified"] else ""
        return [
            *lines,
            "seen = []",
            f'layer = image_encoder.get_submodule("{part.said["layer"]}")',
            f"hook = layer.register_forward_hook(lambda _, given, output: seen.append({seen}))",
            f"image_encoder({given})",
            "hook.remove()",
            f"backbone = seen[0]{rectified}{mean}",
        ]
    if part.said["output"] == "forward_features":
        mean = f"mean(dim={tuple(part.said['positions'])})"
        return [*lines, f"backbone = image_encoder.forward_features({given}).{mean}"]
    return [*lines, f"backbone = image_encoder({given})"]


def _text_lines(said: Mapping[str, Any]) -> list[str]:
    """Lines from `tokens` to `reports`, one vector a text."""
    pooling = said["pooling"]
    call = "text_encoder(input_ids=ids, attention_mask=mask"
    if pooling == "pooler":
        return [f"reports = {call}).pooler_output"]
    if pooling == "cls":
        return [f"reports = {call}).last_hidden_state[:, 0]"]
    if pooling == "mean":
        return [
            f"states = {call}).last_hidden_state",
            "reports = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
        ]
    if pooling == "max":
        return [
            f"states = {call}).last_hidden_state",
            'reports = states.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)',
        ]
    last = said["last_n_layers"]
    return [
        f"found = {call}, output_hidden_states=True)",
        f"layers = torch.stack(found.hidden_states[-{last}:])",
        "numbers = []  # of the word of each token; a special token is a word of its own",
        "for encoding, kept in zip(tokens.encodings, mask):",
        "    words = [word for word, one in zip(encoding.word_ids, kept) if one]",
        "    new = [word is None or word != last for word, last in zip(words, [None, *words])]",
        "    numbers.append(torch.tensor(new).cumsum(0) - 1)",
        "counts = torch.stack([number[-1] + 1 for number in numbers])",
        "reports = (layers.sum(0) * mask[..., None]).sum(1) / counts[:, None]",
    ]


def _head_lines(result: str, given: str, names: Sequence[str]) -> list[str]:
    """Lines from the features of an encoder to the space in which images and texts are compared."""
    if f"projection.{result}.0.weight" in names:
        return [f'{result} = project({given}, "projection.{result}")']
    if result == "visual" and "global_embedder.weight" in names:
        return [
            'weights = heads["global_embedder.weight"], heads["global_embedder.bias"]',
            f"visual = torch.nn.functional.linear({given}, *weights)",
        ]
    return [f"{result} = {given}"]


def _loading_of_codes(by_name: Mapping[str, Part]) -> list[str]:
    """Lines that load a VAE, and DALLE where there is one."""
    dalle = DALLE_FOLDER in by_name
    classes = "DALLE, DiscreteVAE" if dalle else "DiscreteVAE"
    names = "AutoTokenizer, CLIPImageProcessor" if dalle else "CLIPImageProcessor"
    lines = [
        "import json",
        "import torch",
        f"from dalle_pytorch import {classes}  # version 1.6.6",
        "from safetensors.torch import load_file",
        f"from transformers import {names}",
        "",
        'folder = "."  # where this file is',
        f'vae = DiscreteVAE(**json.load(open(f"{{folder}}/{VAE_FOLDER}/config.json")))',
        f'vae.load_state_dict(load_file(f"{{folder}}/{VAE_FOLDER}/model.safetensors"))',
        "processor = CLIPImageProcessor.from_pretrained(folder)",
    ]
    if dalle:
        lines += [
            f'dalle = DALLE(vae=vae, **json.load(open(f"{{folder}}/{DALLE_FOLDER}/config.json")))',
            f'weights = load_file(f"{{folder}}/{DALLE_FOLDER}/model.safetensors")',
            "dalle.load_state_dict(weights, strict=False)  # those of the VAE are in it already",
            "dalle.eval()",
            'tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")',
        ]
    return lines
