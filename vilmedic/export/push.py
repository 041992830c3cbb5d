"""Upload of an export to the Hugging Face hub, private by default."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from vilmedic.errors import ConfigError, VilmedicError
from vilmedic.export.card import CARD
from vilmedic.export.parts import HEADS
from vilmedic.log import LOGGER
from vilmedic.manifest import FOLDERS, MANIFEST, check_files, read_manifest


def check_name(name: str) -> None:
    """Refuse an invalid repository name.

    Raises:
        ConfigError: it is not `user/name`.
    """
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise ConfigError(
            f"--push: given '{name}', allowed: user/name, of letters, digits, '-', '_' and '.' "
            f"({error})."
        ) from error


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload an export, as one commit.

    Files whose content the hub already has are not sent again, so that the same call resumes an
    interrupted upload.

    Args:
        folder: a complete export.
        name: `user/name`; the repository is made when there is none.
        public: let everybody see it.

    Returns:
        Its address.

    Raises:
        ConfigError: the repository is public, and that was not asked for.
        VilmedicError: the hub cannot be reached or refuses; what to do about it.
    """
    check_name(name)
    manifest = read_manifest(folder)
    check_files(folder, manifest, manifest["files"])
    api = HfApi()
    begun = False
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.model_info(name).private:
            raise ConfigError(
                f"--push: the repository {name} is public, so everybody would see these weights. "
                "Make it private on its page, name another one, or say --public."
            )
        begun = True
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Export of a run",
            allow_patterns=[CARD, "LICENSE*", MANIFEST, *manifest["files"]],
            # left by an earlier export with other parts; other files stay
            delete_patterns=[HEADS, *(f"{part}/*" for part in FOLDERS)],
        )
    except VilmedicError:
        raise
    except RepositoryNotFoundError as error:
        raise VilmedicError(
            f"--push: {name} cannot be written to. Log in with `hf auth login` as somebody who may."
        ) from error
    except Exception as error:  # connection, server and upload threads raise many kinds
        raise VilmedicError(_failed(name, error, begun=begun)) from error
    LOGGER.info("Uploaded: %s (%s)", url, "public" if public else "private")
    return str(url)


def _failed(name: str, error: Exception, *, begun: bool) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HfHubHTTPError) and status in (401, 403):
        return (
            f"--push: the hub refuses to write {name} ({status}). Log in with `hf auth login` as "
            "somebody who may, with a token that can write."
        )
    cause = error.__cause__ or error
    reason = str(cause).strip().partition("\n")[0].rstrip(".")
    if not begun:
        return (
            f"--push: nothing was uploaded to {name}: the hub cannot be reached "
            f"({type(cause).__name__}: {reason}). The export itself is complete; the same command "
            "uploads it later."
        )
    return (
        f"--push: {name} was not uploaded completely ({type(cause).__name__}: {reason}). The same "
        "command resumes the upload, without sending files again."
    )
