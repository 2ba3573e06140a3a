"""Short ways to make the requests that many tests make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tests.rpc.conftest import CONTEXT, MODEL
from tests.rpc.harness import Stubs
from whet.v1 import common_pb2, generation_pb2, training_pb2

TIMEOUT = 180.0  # of a call that hangs; where the cores are busy, many take long
# Completions that take tens of seconds: for tests that do something to a request while it surely runs.
LASTING: dict[str, Any] = {"max_tokens": CONTEXT - 100, "n": 16, "temperature": 1.0}


def text_prompt(text: str) -> common_pb2.Prompt:
    """A prompt as text."""
    return common_pb2.Prompt(text=text)


def request(
    prompt: str | common_pb2.Prompt = "Once upon a time", *, model: str = MODEL, **fields: Any
) -> generation_pb2.GenerateRequest:
    """A greedy request; fields of SamplingParams go there, all others to the request."""
    sampling = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    names = {field.name for field in generation_pb2.SamplingParams.DESCRIPTOR.fields}
    sampling |= {name: fields.pop(name) for name in list(fields) if name in names}
    return generation_pb2.GenerateRequest(
        model=model,
        prompt=text_prompt(prompt) if isinstance(prompt, str) else prompt,
        sampling=generation_pb2.SamplingParams(**sampling),
        **fields,
    )


class Reply:
    """A Generate stream, collected and checked to be one started, deltas, one finished."""

    def __init__(self, responses: Iterable[generation_pb2.GenerateResponse]) -> None:
        events = list(responses)
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[0] == "started", kinds
        assert kinds[-1] == "finished", kinds
        assert set(kinds[1:-1]) <= {"delta"}, kinds
        self.started = events[0].started
        self.deltas = [event.delta for event in events[1:-1]]
        self.finished = events[-1].finished

    def text(self, index: int = 0) -> str:
        """The text of one completion."""
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def token_ids(self, index: int = 0) -> list[int]:
        """The tokens of one completion."""
        return [token for delta in self.deltas if delta.index == index for token in delta.token_ids]


def generate(stubs: Stubs, prompt: str | common_pb2.Prompt = "Once upon a time", **fields: Any) -> Reply:
    """A whole Generate call."""
    return Reply(stubs.generation.Generate(request(prompt, **fields), timeout=TIMEOUT))


def examples(count: int = 8, salt: str = "") -> list[training_pb2.TrainExample]:
    """Short examples that a tiny model can learn."""
    return [
        training_pb2.TrainExample(
            prompt_completion=training_pb2.PromptCompletion(prompt=f"{salt}{number} is", completion=" a number.")
        )
        for number in range(count)
    ]


def train_messages(
    *,
    adapter: str = "tone",
    model: str = MODEL,
    train: list[training_pb2.TrainExample] | None = None,
    held_out: list[training_pb2.TrainExample] | None = None,
    params: dict[str, Any] | None = None,
    **config: Any,
) -> Iterator[training_pb2.TrainRequest]:
    """The messages of a Train call: configuration, training examples, held-out examples."""
    values = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "max_seq_len": 64} | (params or {})
    yield training_pb2.TrainRequest(
        config=training_pb2.TrainConfig(
            model=model, adapter=adapter, params=training_pb2.TrainParams(**values), **config
        )
    )
    splits = ((training_pb2.SPLIT_TRAIN, examples() if train is None else train), (training_pb2.SPLIT_EVAL, held_out))
    for split, batch in splits:
        if batch:
            yield training_pb2.TrainRequest(examples=training_pb2.TrainExamples(split=split, examples=batch))


def train(stubs: Stubs, **fields: Any) -> list[training_pb2.TrainEvent]:
    """A whole Train call: its events, numbered without gaps."""
    responses = stubs.training.Train(train_messages(**fields), timeout=TIMEOUT)
    events = [response.event for response in responses]
    assert [event.sequence for event in events] == list(range(len(events)))
    return events
