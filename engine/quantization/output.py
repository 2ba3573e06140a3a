"""A new model directory, which appears whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config import ModelConfig
from engine.durable import make_staging, sync, sync_tree
from engine.errors import AlreadyExistsError, OverloadedError
from engine.loading import Checkpoint
from engine.names import validate_name
from engine.quantization.export import copy_companions, write_generation_config
from engine.tokenizer import Tokenizer
from engine.tokenizer.hf_files import FILES


def refuse_taken(name: str, output: Path) -> None:
    """Checks the name of a new model.

    Raises:
        InvalidArgumentError: it could be no model's.
        AlreadyExistsError: there is something at its directory.
    """
    validate_name(name, "output_name")
    if output.exists():
        raise AlreadyExistsError(f"output {name!r} exists; accepted: a name that is not taken", field="output_name")


@contextmanager
def new_model(output: Path) -> Iterator[Path]:
    """A directory to fill. When the body ends without an error it is flushed and renamed to ``output``; else it goes.

    What a process that dies leaves bears a name that begins with a dot, and is no model.

    Raises:
        OverloadedError: the disk is full, or cannot be written.
        AlreadyExistsError: ``output`` came to exist meanwhile.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = make_staging(output)
    except OSError as error:
        raise _disk_error(output, error) from error
    try:
        yield staging
        _publish(staging, output)
    except OSError as error:
        raise _disk_error(output, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already, if it was published


def save_companions(checkpoint: Checkpoint, config: ModelConfig, tokenizer_path: Path, directory: Path) -> bool:
    """Saves the tokenizer and whatever else of the source, besides weights and config.json, the new model needs.

    Returns: whether the source has a tokenizer.
    """
    source = checkpoint.path
    if source.is_dir():
        copy_companions(source, directory)
    elif config.task == "generate":
        write_generation_config(directory, config)
    if tokenizer_path.is_dir() and not any((tokenizer_path / name).is_file() for name in FILES):
        return False
    Tokenizer.from_path(tokenizer_path).save(directory)
    return True


def _publish(staging: Path, output: Path) -> None:
    """Flushes what is staged and gives it its name."""
    sync_tree(staging)
    staging.chmod(0o755)  # mkdtemp keeps it to its owner
    if output.exists():
        raise AlreadyExistsError(f"{output.name!r} came to exist meanwhile", field="output_name")
    staging.rename(output)
    sync(output.parent)


def _disk_error(output: Path, error: OSError) -> OverloadedError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OverloadedError(
        f"cannot write model {output.name!r}: {error.strerror or error}", reason="DISK_FULL" if full else "DISK_ERROR"
    )
