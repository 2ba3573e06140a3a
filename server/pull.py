"""Fetches a model from the Hugging Face hub, for those who can reach it."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
)
"""What is fetched. Pickled weights and code are left where they are."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def pull_model(repository: str, revision: str | None, directory: Path) -> Path:
    """Downloads a repository into a directory and returns it.

    Raises:
        InvalidArgumentError: the name is not ORG/NAME.
        FailedPreconditionError: huggingface_hub is not installed.
        NotFoundError: the hub cannot be reached, or has no such repository.
    """
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise InvalidArgumentError(f"{repository!r} is no repository; accepted: ORG/NAME", field="repository")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise FailedPreconditionError(
            "pull needs huggingface_hub, which is not installed; install the 'hub' extra (whet-server[hub])"
        ) from None
    try:
        snapshot_download(repository, revision=revision, local_dir=directory, allow_patterns=list(PATTERNS))
    except (HfHubHTTPError, OSError) as error:
        raise NotFoundError(f"{repository} could not be fetched: {' '.join(str(error).split())}") from None
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise NotFoundError(f"{repository} holds no config.json with safetensors weights")
    return directory
