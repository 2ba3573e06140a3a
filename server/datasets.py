"""The examples of a run: taken from the wire within limits, tokenised as they come, and written for the worker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from engine.errors import InvalidArgumentError
from engine.tokenizer import Tokenizer
from engine.training.data import DatasetBuilder, write_dataset
from server import convert_training as convert_runs
from server.config import ServerConfig
from server.convert import from_enum
from server.errors import over_limit
from whet.v1 import training_pb2


class RunDataset:
    """Collects the dataset of one run. ``add`` and ``write`` take their time: call them in a thread.

    Args:
        loss_on: "completion" or "all".
        max_seq_len: of an example, tokens.
    """

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer, *, loss_on: str, max_seq_len: int) -> None:
        self._config = config
        self._builder = DatasetBuilder(
            tokenizer,
            loss_on=loss_on,  # type: ignore[arg-type]
            max_seq_len=max_seq_len,
        )
        self._num_bytes = 0
        self._counts = {"train": 0, "eval": 0}

    def add(self, examples: Sequence[training_pb2.TrainExample], split: int, num_bytes: int) -> None:
        """Takes the examples of one message.

        Args:
            split: the enum's number; unspecified is train.
            num_bytes: of the message.
        Raises:
            InvalidArgumentError: an example is empty, or they are too many.
        """
        name = from_enum(split, convert_runs.SPLITS, "train", "examples.split")
        self._num_bytes += num_bytes
        if self._num_bytes > self._config.max_train_bytes:
            raise over_limit("examples", self._num_bytes, self._config.max_train_bytes, "bytes in all")
        count = sum(self._counts.values()) + len(examples)
        if count > self._config.max_train_examples:
            raise over_limit("examples", count, self._config.max_train_examples, "examples")
        for example in examples:
            record = convert_runs.from_example(example, f"examples[{self._counts[name]}]")
            self._builder.add(record, name)  # type: ignore[arg-type]
            self._counts[name] += 1

    def refuse_rejections(self) -> None:
        """Raises InvalidArgumentError if an example was rejected."""
        report = self._builder.report
        if report.rejected:
            first = report.rejected[0]
            field = f"examples[{first.index}]"
            raise InvalidArgumentError(f"{field}: {first.message}", field=field, reason=first.reason)

    def write(self, path: Path, *, eval_fraction: float, seed: int, hold_out_all: bool = False) -> str:
        """Writes the dataset; returns what became of the examples, as JSON for the archive.

        Args:
            hold_out_all: evaluate on the very examples that are trained on.
        Raises:
            InvalidArgumentError: nothing is left to train on, or both a fraction and examples are held out.
        """
        dataset = self._builder.finish(eval_fraction=eval_fraction, seed=seed)
        write_dataset(path, dataset.train, dataset.train if hold_out_all else dataset.evaluation)
        report = self._builder.report
        return json.dumps(
            {
                "num_rejected": report.num_rejected,
                "num_truncated": report.num_truncated,
                "rejected": [dataclasses.asdict(rejection) for rejection in report.rejected],
            }
        )
