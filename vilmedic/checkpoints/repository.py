"""Exported folders from a Hugging Face hub repository; nothing in them is executed."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from vilmedic.errors import CheckpointError
from vilmedic.manifest import MANIFEST, read_by_us, read_manifest


def fetch_export(name: str) -> Path:
    """The exported folder of a repository, as the local cache of the hub has it.

    What the manifest lists is fetched and nothing else: weights, JSON and words, and no programs.

    Args:
        name: `user/name`.

    Raises:
        CheckpointError: there is none that can be reached, or it holds no export.
    """
    try:
        if not isinstance(try_to_load_from_cache(name, MANIFEST), str):
            # one question: without a network the download asks again for half a minute
            get_hf_file_metadata(hf_hub_url(name, MANIFEST))
        folder = Path(hf_hub_download(name, MANIFEST)).parent
        for file in read_by_us(read_manifest(folder)):
            hf_hub_download(name, file, revision=folder.name)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # the hub was not asked, or did not answer
            raise CheckpointError(_unreachable(name, error)) from error
        raise CheckpointError(
            f"{name}: the repository is no complete export: it has no {_entry(error)}. An export "
            "is what bin/export.py writes."
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: the repository is there, but its owner has to give access first. Ask for it "
            "on its page, and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: there is no such run directory, checkpoint or repository, or the repository "
            "is private. Log in with `hf auth login` if it is yours."
        ) from error
    except CheckpointError:  # of the manifest
        raise
    except Exception as error:  # of the connection, of the server, of the cache
        raise CheckpointError(_unreachable(name, error)) from error
    return folder


def _entry(error: EntryNotFoundError) -> str:
    """The file that is missing, as the end of its address has it."""
    response = getattr(error, "response", None)
    url = "" if response is None else str(response.url)
    return url.rpartition("/")[2] or "file that it lists"


def _unreachable(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return (
        f"{name}: there is no such run directory or checkpoint, and a repository of that name "
        f"could not be fetched ({type(error).__name__}: {reason})."
    )
