"""Text encoders of the hub."""

from __future__ import annotations

import importlib
from pathlib import Path

from vilmedic.preparation.download.errors import NoAccess, NotThere, Unreachable
from vilmedic.preparation.download.table import Model

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def has_model(folder: Path) -> bool:
    """Whether a folder holds a configuration, weights and a vocabulary."""
    weights = any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
    words = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
    return (folder / "config.json").is_file() and weights and words


def fetch_model(model: Model, folder: Path, parallel: int) -> bool:
    """Fetch a model unless it is there; huggingface_hub resumes what was interrupted.

    Returns:
        Whether it had to be fetched.

    Raises:
        DataError: the hub has none of that name, gives no access, or cannot be reached.
    """
    if has_model(folder):
        return False
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        hub.snapshot_download(
            model.repo,
            local_dir=folder,
            allow_patterns=list(model.patterns) or None,
            max_workers=parallel,
        )
    except errors.GatedRepoError:
        raise NoAccess(
            f"The model {model.repo} needs your consent: give it at "
            f"https://huggingface.co/{model.repo}, then run `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotThere(f"The hub has no model {model.repo}.") from None
    except Exception as error:  # the hub client raises errors of many libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unreachable(
            f"The model {model.repo} could not be fetched ({reason}). Is HF_HUB_OFFLINE set, or "
            "the network down? Run the same command again to go on."
        ) from None
    if not has_model(folder):
        raise NotThere(f"{folder}: {model.repo} has no weights or vocabulary of a known form.")
    return True
