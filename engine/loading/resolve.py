"""From the path that an operator gives to the model that it means. Free of torch."""

from __future__ import annotations

from pathlib import Path

from engine.errors import FormatError, NotFoundError

INDEX_SUFFIX = ".safetensors.index.json"
ACCEPTED = "a Hugging Face directory, a .safetensors file or index beside its config.json, or a .gguf file"


def resolve_model_path(path: Path | str) -> Path:
    """The .gguf file, or the directory that holds config.json and safetensors.

    A .safetensors file or index stands for the directory that it lies in. A directory without config.json that holds
    exactly one .gguf file stands for that file.

    Raises:
        NotFoundError: there is no such path.
        FormatError: it is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or directory; accepted: {ACCEPTED}", reason="MODEL_PATH_NOT_FOUND")
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        candidates = sorted(path.glob("*.gguf"))
        if len(candidates) == 1:
            return candidates[0]
        found = f"{len(candidates)} .gguf files" if candidates else "neither config.json nor a .gguf file"
        raise FormatError(f"{path}: the directory holds {found}; accepted: {ACCEPTED}")
    if path.suffix == ".gguf":
        return path
    if path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX):
        if not (path.parent / "config.json").is_file():
            raise FormatError(f"{path}: there is no config.json beside it; accepted: {ACCEPTED}")
        return path.parent
    raise FormatError(f"{path}: of an unknown kind; accepted: {ACCEPTED}")
