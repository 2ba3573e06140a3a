"""From examples as people write them to tokens and loss masks. Free of torch.

Four kinds of record: {"prompt", "completion"}, {"messages": [{"role", "content"}, …]}, {"text"}, and Alpaca's
{"instruction", "input", "output"}. What cannot be used is counted with its reason, never dropped silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from engine.errors import EngineError, InvalidArgumentError
from engine.jobs import TokenizedExample
from engine.training.dataset import (
    Dataset,
    Example,
    Examples,
    ExamplesWriter,
    read_dataset,
    split_held_out,
    write_dataset,
)

LossOn = Literal["completion", "all"]
Split = Literal["train", "eval"]
Reason = Literal["MALFORMED", "EMPTY", "NO_COMPLETION", "TOO_LONG", "TEMPLATE"]
"""MALFORMED: none of the four kinds, or a value of a wrong type. EMPTY: nothing in it. NO_COMPLETION: no assistant
turn, or an empty completion. TOO_LONG: what is to be learnt does not fit into max_seq_len. TEMPLATE: the chat template
refuses the messages, or renders them such that the assistant's turns cannot be told from the rest."""

MAX_LISTED_REJECTIONS = 100

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of github.com/tatsu-lab/stanford_alpaca, which models without a chat template were commonly tuned on."""


class ExampleTokenizer(Protocol):
    """What is asked of engine.tokenizer.Tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def has_chat_template(self) -> bool: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str: ...


class RejectedExampleError(Exception):
    """An example that cannot be used.

    Args:
        reason: one of Reason.
        message: what is wrong with it, with the value, and what would be accepted.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Rejection:
    """One example that was not used.

    Attributes:
        index: among the examples of its split as they came, from 0.
    """

    split: Split
    index: int
    reason: Reason
    message: str


@dataclass(slots=True)
class DatasetReport:
    """What became of the examples.

    Attributes:
        num_truncated: examples that lost tokens to max_seq_len.
        rejected_by_reason: how many were rejected for each reason that occurred.
        rejected: the first of them, at most MAX_LISTED_REJECTIONS.
    """

    num_truncated: int = 0
    rejected_by_reason: Counter[Reason] = field(default_factory=Counter)
    rejected: list[Rejection] = field(default_factory=list)

    @property
    def num_rejected(self) -> int:
        """For all reasons."""
        return self.rejected_by_reason.total()


class DatasetBuilder:
    """Tokenises examples as they arrive.

    Args:
        loss_on: "completion": completions, assistant turns and outputs count, and of a text all; "all": every token.
        max_seq_len: of an example, tokens, at least 2; see ``tokenize`` for longer ones.

    Attributes:
        report: grows with every example.
    """

    def __init__(self, tokenizer: ExampleTokenizer, *, loss_on: LossOn = "completion", max_seq_len: int = 1024) -> None:
        if loss_on not in ("completion", "all"):
            raise InvalidArgumentError(f"loss_on is {loss_on!r}; accepted: completion, all", field="loss_on")
        if max_seq_len < 2:
            raise InvalidArgumentError(
                f"max_seq_len is {max_seq_len}; accepted: an integer of at least 2", field="max_seq_len"
            )
        self.report = DatasetReport()
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._max_seq_len = max_seq_len
        self._writers: dict[Split, ExamplesWriter] = {"train": ExamplesWriter(), "eval": ExamplesWriter()}
        self._seen: Counter[Split] = Counter()

    def add(self, record: object, split: Split = "train") -> bool:
        """Takes in one record; False if it was rejected, which the report then says."""
        index = self._seen[split]
        self._seen[split] += 1
        try:
            example, truncated = tokenize(record, self._tokenizer, self._loss_on, self._max_seq_len)
        except RejectedExampleError as error:
            self.report.rejected_by_reason[error.reason] += 1
            if len(self.report.rejected) < MAX_LISTED_REJECTIONS:
                self.report.rejected.append(Rejection(split, index, error.reason, error.message))
            return False
        self.report.num_truncated += truncated
        self._writers[split].append(example.token_ids, example.loss_mask)
        return True

    def finish(self, *, eval_fraction: float = 0.0, seed: int = 0) -> Dataset:
        """The dataset. With eval_fraction, that part of the training examples is held out, chosen by the seed.

        Raises:
            InvalidArgumentError: eval_fraction is out of [0, 1), or held-out examples were added as well; or no
                training example is left.
        """
        train, evaluation = self._writers["train"].finish(), self._writers["eval"].finish()
        if eval_fraction and self._seen["eval"]:
            raise InvalidArgumentError(
                f"eval_fraction is {eval_fraction} and {self._seen['eval']} held-out examples were given; "
                "accepted: one of the two",
                field="eval_fraction",
            )
        kept, held_out = split_held_out(len(train), eval_fraction, seed)
        if held_out:
            evaluation = Examples.of(train[i] for i in held_out)
            train = Examples.of(train[i] for i in kept)
        if len(train) == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.report.rejected_by_reason.most_common())
            raise InvalidArgumentError(
                f"no training example is left of {self._seen['train']}"
                + (f" (rejected: {reasons}; the first: {self.report.rejected[0].message})" if reasons else "")
                + "; accepted: at least one",
                field="examples",
                reason="NO_EXAMPLES",
            )
        if self._seen["eval"] and len(evaluation) == 0:
            raise InvalidArgumentError(
                f"no held-out example is left of {self._seen['eval']}; accepted: at least one, or none at all",
                field="examples",
                reason="NO_EXAMPLES",
            )
        return Dataset(train, evaluation)


# --------------------------------------------------------------------------------------------------------- tokenising


@dataclass(slots=True)
class _Spans:
    """A whole example: its tokens, and the ranges of them that are to be learnt, ascending; keep_end says which end of
    an example that is too long holds what matters."""

    token_ids: list[int]
    learnt: list[tuple[int, int]]
    keep_end: bool = True


def tokenize(
    record: object, tokenizer: ExampleTokenizer, loss_on: LossOn, max_seq_len: int
) -> tuple[TokenizedExample, bool]:
    """One record as tokens.

    An example that is longer than max_seq_len loses tokens on the left, all but a beginning-of-sequence token: the
    prompt's, and of a conversation those of older turns. Its last completion stays whole, after at least one token. A
    text loses its end.

    Returns: the example, and whether it lost tokens.
    Raises:
        RejectedExampleError: it cannot be used.
    """
    try:
        spans = _spans(record, tokenizer)
    except EngineError as error:  # of the tokenizer or the template
        reason: Reason = "TEMPLATE" if "template" in error.message else "MALFORMED"
        raise RejectedExampleError(reason, error.message) from error
    ids = spans.token_ids
    mask = [loss_on == "all"] * len(ids)
    for start, end in spans.learnt:
        mask[start:end] = [True] * (end - start)
    if not any(mask[1:]):
        raise RejectedExampleError("EMPTY", f"{len(ids)} tokens, none of them to be learnt; accepted: at least one")
    excess = len(ids) - max_seq_len
    if excess <= 0:
        return _example(ids, mask), False
    if not spans.keep_end:
        return _example(ids[:max_seq_len], mask[:max_seq_len]), True
    start, end = spans.learnt[-1]
    if end - start + 1 > max_seq_len:
        raise RejectedExampleError(
            "TOO_LONG",
            f"a completion of {end - start} tokens; accepted: at most {max_seq_len - 1}, one below max_seq_len",
        )
    ids, mask = ids[:end], mask[:end]  # what follows the last completion teaches nothing
    if len(ids) > max_seq_len:
        cut = len(ids) - max_seq_len
        if ids[0] == tokenizer.bos_token_id:
            ids, mask = ids[:1] + ids[cut + 1 :], mask[:1] + mask[cut + 1 :]
        else:
            ids, mask = ids[cut:], mask[cut:]
    return _example(ids, mask), True


def _example(ids: list[int], mask: list[bool]) -> TokenizedExample:
    return TokenizedExample(token_ids=ids, loss_mask=[False, *mask[1:]])


def _spans(record: object, tokenizer: ExampleTokenizer) -> _Spans:
    if not isinstance(record, Mapping):
        raise RejectedExampleError("MALFORMED", f"an example is a {type(record).__name__}; accepted: an object")
    keys = record.keys()
    kinds = [kind for kind, needed in _KINDS.items() if needed <= keys]
    if len(kinds) != 1:
        shown = ", ".join(sorted(map(str, keys))) or "none"
        raise RejectedExampleError(
            "MALFORMED",
            f"an example has the keys {shown[:200]}; accepted: those of one of {{prompt, completion}}, {{messages}}, "
            "{text}, {instruction, input, output}",
        )
    if kinds[0] == "messages":
        return _of_messages(record["messages"], tokenizer)
    if kinds[0] == "prompt":
        return _of_completion(_text(record, "prompt"), _text(record, "completion"), tokenizer)
    if kinds[0] == "text":
        return _of_text(_text(record, "text"), tokenizer)
    return _of_instruction(record, tokenizer)


_KINDS: dict[str, set[str]] = {
    "prompt": {"prompt", "completion"},
    "messages": {"messages"},
    "text": {"text"},
    "instruction": {"instruction", "output"},
}


def _text(record: Mapping[Any, Any], key: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RejectedExampleError("MALFORMED", f"{key} is a {type(value).__name__}; accepted: a string")
    return value


def _of_text(text: str, tokenizer: ExampleTokenizer) -> _Spans:
    if not text:
        raise RejectedExampleError("EMPTY", "text is empty; accepted: some text")
    ids = _with_eos(tokenizer.encode(text), tokenizer)
    return _Spans(ids, [(0, len(ids))], keep_end=False)


def _of_completion(prompt: str, completion: str, tokenizer: ExampleTokenizer) -> _Spans:
    if not completion:
        raise RejectedExampleError("NO_COMPLETION", "completion is empty; accepted: some text")
    before = _without_eos(tokenizer.encode(prompt), prompt, tokenizer)
    whole = tokenizer.encode(prompt + completion)
    if whole[: len(before)] != before:
        # The whole merges characters across the border. Serving encodes the prompt alone, so training does as well.
        whole = before + tokenizer.encode(completion, add_special_tokens=False)
    ids = _with_eos(whole, tokenizer)
    start = len(before)
    if start == 0:  # without a prompt, and without a token that begins a sequence, nothing predicts the first token
        start = 1
    if start >= len(ids):
        raise RejectedExampleError("EMPTY", f"prompt and completion are {len(ids)} tokens; accepted: at least 2")
    return _Spans(ids, [(start, len(ids))])


def _of_instruction(record: Mapping[Any, Any], tokenizer: ExampleTokenizer) -> _Spans:
    instruction, context = _text(record, "instruction"), _text(record, "input", "")
    output = _text(record, "output")
    if not output:
        raise RejectedExampleError("NO_COMPLETION", "output is empty; accepted: some text")
    if tokenizer.has_chat_template:
        content = f"{instruction}\n\n{context}" if context else instruction
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": output}]
        return _of_messages(messages, tokenizer)
    template = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
    return _of_completion(template.format(instruction=instruction, input=context), output, tokenizer)


def _of_messages(messages: object, tokenizer: ExampleTokenizer) -> _Spans:
    """A conversation. The template is applied to each prefix that ends where an assistant's turn begins or ends; where
    that text ends, the turn does."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RejectedExampleError("MALFORMED", "messages is no list of messages; accepted: at least one message")
    turns = [i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "assistant"]
    if not turns or not any(_is_filled(messages[i]) for i in turns):
        raise RejectedExampleError("NO_COMPLETION", "messages hold no assistant turn with text; accepted: at least one")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    learnt = []
    for turn in turns:
        start, end = _turn_in_text(messages, turn, text, tokenizer)
        first = _tokens_before(start, text, ids, tokenizer)
        last = _tokens_before(end, text, ids, tokenizer)
        last = _trim_after_special(ids, first, last, tokenizer)
        if turn == len(messages) - 1 and ids[last - 1] not in tokenizer.special_ids:
            ids = _with_eos(ids[:last], tokenizer)  # a template that marks no end of turn
            last = len(ids)
        if first < last:
            learnt.append((first, last))
    if not learnt:
        raise RejectedExampleError("NO_COMPLETION", "the assistant's turns render to nothing; accepted: some text")
    return _Spans(ids, learnt)


def _is_filled(message: Mapping[str, Any]) -> bool:
    return bool(message.get("content")) or bool(message.get("tool_calls"))


def _turn_in_text(messages: Sequence[Any], turn: int, text: str, tokenizer: ExampleTokenizer) -> tuple[int, int]:
    """First and past-the-last character of an assistant's turn, from what it generates to its end-of-turn mark."""
    before = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True) if turn else ""
    if not text.startswith(before):
        # Some templates open the turn with more than they keep of it once it is past (an empty thought).
        before = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=False)
    through = tokenizer.apply_chat_template(messages[: turn + 1], add_generation_prompt=False)
    if text.startswith(before):
        if text.startswith(through) and len(through) > len(before):
            return len(before), len(through)
        # The turn reads otherwise when it is the last one. Its text and what closes it are still to be found.
        content = str(messages[turn].get("content") or "").strip()
        at = text.find(content, len(before))
        if content and at >= 0:
            closing = through[through.rfind(content) + len(content) :]
            end = at + len(content)
            if text.startswith(closing, end):
                return len(before), end + len(closing)
    raise RejectedExampleError(
        "TEMPLATE",
        f"messages[{turn}]: the chat template renders this turn otherwise within the conversation than at its end; "
        "accepted: conversations whose turns stay as they are",
    )


def _tokens_before(position: int, text: str, ids: list[int], tokenizer: ExampleTokenizer) -> int:
    """Tokens of ``ids`` that lie wholly before a character of the text they encode."""
    prefix = tokenizer.encode(text[:position], add_special_tokens=False)
    count = 0
    for whole, part in zip(ids, prefix, strict=False):
        if whole != part:
            break
        count += 1
    return count


def _trim_after_special(ids: list[int], first: int, last: int, tokenizer: ExampleTokenizer) -> int:
    """The end of a turn without the white space that templates put after the end-of-turn token: at the end of a turn
    generation stops, so it never makes what follows."""
    end = last
    while end > first and ids[end - 1] not in tokenizer.special_ids:
        end -= 1
    if first < end < last and not tokenizer.decode(ids[end:last]).strip():
        return end
    return last


def _with_eos(ids: list[int], tokenizer: ExampleTokenizer) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def _without_eos(ids: list[int], text: str, tokenizer: ExampleTokenizer) -> list[int]:
    """Ids of a prompt without the end that some tokenizers add."""
    eos = tokenizer.eos_token_id
    if eos is None or not ids or ids[-1] != eos:
        return ids
    plain = tokenizer.encode(text, add_special_tokens=False)
    return ids if plain and plain[-1] == eos else ids[:-1]


__all__ = [
    "Dataset",
    "DatasetBuilder",
    "DatasetReport",
    "Example",
    "Examples",
    "LossOn",
    "Reason",
    "RejectedExampleError",
    "Rejection",
    "Split",
    "TokenizedExample",
    "read_dataset",
    "split_held_out",
    "tokenize",
    "write_dataset",
]
