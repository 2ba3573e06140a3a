"""Training examples, from records or files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from whet._generation import to_chat
from whet._values import reject
from whet.errors import InvalidArgumentError
from whet.types import Example
from whet.v1 import training_pb2

ExampleSource = str | Path | Iterable[Example]
"""Records, or the path of a .json file with a list of them, or of a .jsonl file with one a line."""

_KINDS = '{"messages"}, {"prompt", "completion"}, {"instruction", "input", "output"} or {"text"}'


def to_examples(source: ExampleSource) -> list[training_pb2.TrainExample]:
    """Examples as they travel.

    Raises:
        InvalidArgumentError: a record is of no known kind, or a file is not JSON.
        OSError: the file cannot be read.
    """
    records = load_examples(source) if isinstance(source, (str, Path)) else source
    return [to_example(record, f"examples[{index}]") for index, record in enumerate(records)]


def load_examples(path: str | Path) -> list[Any]:
    """The records of a file.

    Raises:
        InvalidArgumentError: it is neither .json nor .jsonl, or not JSON.
        OSError: it cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl"):
        reject("examples", str(path), "records, or the path of a .json or .jsonl file")
    text = path.read_text(encoding="utf-8")
    if suffix == ".json":
        records = _parse(text, str(path))
        if not isinstance(records, list):
            reject("examples", str(path), "a .json file that holds a list")
        return records
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{place} is not JSON: {error}", reason="BAD_FORMAT") from error


def to_example(record: Any, field: str) -> training_pb2.TrainExample:
    """One record. Its kind is told by its keys, in the order messages, prompt, instruction, text.

    Raises:
        InvalidArgumentError: it is of no known kind, or a value is not a string.
    """
    example = training_pb2.TrainExample()
    if not isinstance(record, Mapping):
        reject(field, record, _KINDS)
    if "messages" in record:
        example.chat.CopyFrom(to_chat(record["messages"], f"{field}.messages"))
    elif "prompt" in record and "completion" in record:
        example.prompt_completion.CopyFrom(
            training_pb2.PromptCompletion(
                prompt=_string(record, "prompt", field), completion=_string(record, "completion", field)
            )
        )
    elif "instruction" in record and "output" in record:
        example.instruction.CopyFrom(
            training_pb2.Instruction(
                instruction=_string(record, "instruction", field),
                input=_string(record, "input", field) if record.get("input") is not None else "",
                output=_string(record, "output", field),
            )
        )
    elif "text" in record:
        example.text = _string(record, "text", field)
    else:
        reject(field, dict(record), _KINDS)
    return example


def _string(record: Mapping[str, Any], key: str, field: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        reject(f"{field}.{key}", value, "a string")
    return value
