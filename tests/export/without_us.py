"""Load exports with the snippets of their model cards, in a process without vilmedic.

    python without_us.py <image> <image in colour> <reference.py> <folder> ...

The arrays that the snippets compute for a folder are written to `<folder>.npz`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import Any

import numpy as np


class Refuses:
    """An import hook that makes importing vilmedic fail."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "vilmedic":
            raise ModuleNotFoundError(f"{name} must not be needed")


def snippets(folder: str, image: str) -> list[str]:
    """The Python snippets of a card, except the last one, which uses vilmedic."""
    with open(f"{folder}/README.md", encoding="utf-8") as stream:
        found = re.findall(r"^```python\n(.*?)^```$", stream.read(), re.M | re.S)
    assert "import vilmedic" in found.pop()
    return [
        code.replace('"image.png"', repr(image)).replace('folder = "."', f"folder = {folder!r}")
        for code in found
    ]


def run(folder: str, image: str) -> dict[str, Any]:
    """The arrays that the snippets of a card define."""
    names: dict[str, Any] = {}
    for code in snippets(folder, image):
        exec(compile(code, f"{folder}/README.md", "exec"), names)
    found = {}
    for name, value in names.items():
        if name in ("on_images", "on_texts"):
            found |= {f"{name}_{i}": one for i, one in enumerate(value)}
        elif type(value).__name__ in ("Tensor", "ndarray"):
            found[name] = np.asarray(value)
    return found


def torchvision_features(folder: str, pixels: Any) -> tuple[list[str], Any]:
    """The weights missing for torchvision's ResNet, and its features without classifier."""
    import torch
    from safetensors.torch import load_file
    from torchvision import models

    network = models.resnet18(weights=None).eval()
    weights = load_file(f"{folder}/image_encoder/model.safetensors")
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    network.fc = torch.nn.Identity()
    with torch.inference_mode():
        return missing, network(torch.from_numpy(pixels)).numpy()


def main(grey: str, color: str, reference: str, *folders: str) -> None:
    sys.meta_path.insert(0, Refuses())  # type: ignore[arg-type]
    spec = importlib.util.spec_from_file_location("reference", reference)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load_reference()
    for folder in folders:
        found = run(folder, color if "simclr" in folder else grey)
        if folder.endswith("/convirt"):
            found["missing"], found["torchvision"] = torchvision_features(folder, found["pixels"])
        np.savez(f"{folder}.npz", **found)
    assert "vilmedic" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
