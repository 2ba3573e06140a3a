"""Tokenised examples in memory and on disk. Free of torch.

On disk a dataset is one safetensors file of flat arrays: no pickle, and a reader can map it. In memory the arrays stay
flat too: a million tokens are 5 MB here and some 40 MB as lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from engine.durable import sync
from engine.errors import FormatError, InvalidArgumentError
from engine.jobs import TokenizedExample
from engine.training.seeds import derive_seed

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

SPLITS = ("train", "evaluation")
_ARRAYS = {"token_ids": np.int32, "loss_mask": np.uint8, "starts": np.int64}


@dataclass(frozen=True, slots=True)
class Example:
    """Views of one example's tokens.

    Attributes:
        token_ids: [n] int32.
        loss_mask: [n] bool: whether predicting that token counts; never the first.
    """

    token_ids: Int32Array
    loss_mask: BoolArray

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens whose prediction counts."""
        return int(self.loss_mask.sum())


class Examples(Sequence[Example]):
    """Examples laid end to end.

    Args:
        token_ids: [T] of all examples.
        loss_mask: [T].
        starts: [N + 1], where examples begin; the last is T.
    """

    def __init__(self, token_ids: Int32Array, loss_mask: BoolArray, starts: npt.NDArray[np.int64]) -> None:
        self.token_ids = token_ids
        self.loss_mask = loss_mask
        self.starts = starts

    @classmethod
    def of(cls, examples: Iterable[TokenizedExample | Example]) -> Examples:
        """Lays examples end to end."""
        writer = ExamplesWriter()
        for example in examples:
            writer.append(example.token_ids, example.loss_mask)
        return writer.finish()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        return Example(self.token_ids[start:end], self.loss_mask[start:end])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Of all examples."""
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Of all examples."""
        return int(self.loss_mask.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest example; 0 if there is none."""
        return int(np.diff(self.starts).max()) if len(self) else 0

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the examples in their order: tokens, and which of them count. The same on every
        machine."""
        state = hashlib.sha256()
        for name, dtype in (("token_ids", "<i4"), ("loss_mask", "<u1"), ("starts", "<i8")):
            values = np.ascontiguousarray(getattr(self, name).astype(dtype, copy=False))
            state.update(f"{name} {dtype} {len(values)}\n".encode())
            state.update(values.data)
        return state.hexdigest()


class ExamplesWriter:
    """Collects examples into flat arrays."""

    def __init__(self) -> None:
        self._token_ids = array("i")
        self._loss_mask = bytearray()
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, token_ids: Iterable[int], loss_mask: Iterable[bool]) -> None:
        """Adds one example; both have the same length, at least 2."""
        before = len(self._token_ids)
        self._token_ids.extend(int(token) for token in token_ids)
        self._loss_mask.extend(bool(keep) for keep in loss_mask)
        assert len(self._token_ids) == len(self._loss_mask) >= before + 2
        self._loss_mask[before] = 0  # nothing predicts a first token
        self._starts.append(len(self._token_ids))

    def finish(self) -> Examples:
        """The examples; the writer is not to be used afterwards."""
        return Examples(
            np.frombuffer(self._token_ids, dtype=np.int32) if self._token_ids else np.zeros(0, np.int32),
            np.frombuffer(self._loss_mask, dtype=np.bool_) if self._loss_mask else np.zeros(0, np.bool_),
            np.frombuffer(self._starts, dtype=np.int64),
        )


@dataclass(slots=True)
class Dataset:
    """What a run trains on and what it holds out.

    Attributes:
        evaluation: never trained on; may be empty.
        digest: hexadecimal SHA-256 of the file it was read from, or "".
        train_digest: of ``train``, for lineage: see Examples.digest; "" if it was not read from a file.
    """

    train: Examples
    evaluation: Examples = field(default_factory=lambda: Examples.of(()))
    digest: str = ""
    train_digest: str = ""


def split_held_out(num_examples: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Which examples are trained on and which are held out.

    Args:
        fraction: held out, [0, 1); at least one example where it is above 0 and there are two.
        seed: the same seed gives the same split.
    Returns: indices of both, ascending, together each index once.
    Raises:
        InvalidArgumentError: the fraction is out of its range.
    """
    if not 0.0 <= fraction < 1.0:
        raise InvalidArgumentError(f"eval_fraction is {fraction}; accepted: a number in [0, 1)", field="eval_fraction")
    if fraction == 0.0 or num_examples < 2:
        return list(range(num_examples)), []
    count = min(max(1, round(num_examples * fraction)), num_examples - 1)
    held_out = set(random.Random(derive_seed(seed, "held-out")).sample(range(num_examples), count))
    return [i for i in range(num_examples) if i not in held_out], sorted(held_out)


def write_dataset(
    path: Path,
    train: Examples | Sequence[TokenizedExample],
    evaluation: Examples | Sequence[TokenizedExample] = (),
) -> None:
    """Writes a dataset so that the file is there either whole or not at all."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for split, given in zip(SPLITS, (train, evaluation), strict=True):
        examples = given if isinstance(given, Examples) else Examples.of(given)
        for name, dtype in _ARRAYS.items():
            tensors[f"{split}.{name}"] = np.ascontiguousarray(getattr(examples, name).astype(dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, str(temporary))
        sync(temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read_dataset(path: Path) -> Dataset:
    """Reads what write_dataset wrote.

    Raises:
        FormatError: there is no such file, or it holds something else.
    """
    try:
        tensors = load_file(str(path))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: cannot be read as a dataset: {error}", field="dataset_path") from error
    train, evaluation = (_read_split(path, split, tensors) for split in SPLITS)
    return Dataset(train, evaluation, digest, train.digest())


def _read_split(path: Path, split: str, tensors: dict[str, npt.NDArray[Any]]) -> Examples:
    arrays = []
    for name, dtype in _ARRAYS.items():
        value = tensors.get(f"{split}.{name}")
        if value is None or value.dtype != dtype or value.ndim != 1:
            raise FormatError(
                f"{path}: {split}.{name} is missing or no vector of {np.dtype(dtype)}", field="dataset_path"
            )
        arrays.append(value)
    token_ids, loss_mask, starts = arrays
    consistent = (
        len(token_ids) == len(loss_mask) and len(starts) >= 1 and starts[0] == 0 and starts[-1] == len(token_ids)
    )
    if not consistent or bool((np.diff(starts) < 2).any()):
        raise FormatError(f"{path}: {split}.starts does not lie over its tokens", field="dataset_path")
    return Examples(token_ids, loss_mask.astype(np.bool_), starts)
