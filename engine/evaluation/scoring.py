"""Next-token scores of long text in strided windows: which window scores which token, and the logits for it.

Shapes: N scored positions, V vocabulary, D hidden size, T tokens of one packed forward.

Perplexity, and the comparison of two models over the same positions, both build on ``plan_windows`` and
``iter_window_logits``. The second gives equal chunks for equal arguments, so that two models compare with one ``zip``:

    before, after = (iter_window_logits(model, ids, windows, max_tokens=2048) for model in (base, quantized))
    for a, b in zip(before, after, strict=True):
        kl += token_kl(a.logits, b.logits).sum()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.context import packed_context
from engine.core.chunked import chunked_hidden
from engine.errors import InvalidArgumentError, OutOfRangeError
from engine.lora.adapter import Adapter, LoRABatch
from engine.models.base import CausalLM
from engine.ops import cpu

LOGITS_CHUNK_BYTES = 64 << 20
"""Float32 logits that exist at a time; at 262,144 entries of vocabulary that is 64 positions."""

CPU_LOGITS_ROWS = 128
"""Positions of a chunk on a CPU, at most. With more the product is no faster, while their memory is fresh for each
chunk: of SmolLM2's logits, one thread of a Zen 3 made 256 rows at 560 us each, and 128 at 460."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, end) go through the model; those in [first_scored, end) are scored, each by its predecessors."""

    start: int
    end: int
    first_scored: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_scored(self) -> int:
        return self.end - self.first_scored


class WindowPlan(Sequence[Window]):
    """The windows of plan_windows, each made when it is asked for: a long text at a small stride has millions."""

    def __init__(self, num_tokens: int, window: int, stride: int) -> None:
        self._num_tokens = num_tokens
        self._window = window
        self._step = min(stride, window - 1)

    def __len__(self) -> int:
        return 1 + -(-max(0, self._num_tokens - self._window) // self._step)

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = (index % len(self)) * self._step
        end = min(start + self._window, self._num_tokens)
        return Window(start, end, 1 if start == 0 else start - self._step + self._window)


@dataclass(slots=True)
class LogitsChunk:
    """Logits for some of the scored positions, in order of the text; for none, while a long window is under way.

    Attributes:
        indices: [N] int64 on the host, of the scored tokens in the text.
        targets: [N] int64, the tokens at those indices.
        logits: [N, V] float32, the model's prediction of each from the tokens before it in its window.
        ends_forward: the next chunk, if there is one, comes from other windows.
    """

    indices: Tensor
    targets: Tensor
    logits: Tensor
    ends_forward: bool


def plan_windows(num_tokens: int, window: int, stride: int) -> WindowPlan:
    """Windows that score every token but the first exactly once.

    The first window scores its tokens from the second on. Each next one begins ``stride`` tokens later and scores the
    tokens that no window before it held, so a token has at least ``window - stride`` tokens of context once the text is
    that long. Where the stride equals the window, windows still share one token: a window's first token has no
    predecessor in it and could not be scored.

    The last window may be shorter. The windows are those of the strided perplexity in transformers' documentation
    (https://huggingface.co/docs/transformers/perplexity) for every stride below the window; at stride = window that
    text leaves the first token of each window unscored.

    Raises:
        InvalidArgumentError: fewer than 2 tokens, a window below 2, or a stride outside of [1, window].
    """
    if num_tokens < 2:
        raise InvalidArgumentError(
            f"the text has {num_tokens} tokens; accepted: at least 2, as the first is never predicted",
            field="token_ids",
            reason="TOO_SHORT",
        )
    if window < 2:
        raise InvalidArgumentError(f"window is {window}; accepted: an integer of at least 2", field="window")
    if not 1 <= stride <= window:
        raise InvalidArgumentError(
            f"stride is {stride}; accepted: an integer in [1, {window}], the window", field="stride"
        )
    return WindowPlan(num_tokens, window, stride)


def validate_text(token_ids: Sequence[int], window: int, max_context: int, vocab_size: int) -> None:
    """Checks tokens against the vocabulary and the window against the context.

    Raises:
        OutOfRangeError: the window exceeds max_context.
        InvalidArgumentError: a token id is out of range.
    """
    if window > max_context:
        raise OutOfRangeError(
            f"window is {window}; accepted: at most {max_context}, the model's context", field="window"
        )
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        index = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        raise InvalidArgumentError(
            f"token_ids[{index}] is {token_ids[index]}; accepted: [0, {vocab_size})", field="token_ids"
        )


def take_windows(windows: Sequence[Window], start: int, max_tokens: int) -> Sequence[Window]:
    """The next windows from ``start`` on that fit together into max_tokens, at least one."""
    end, num_tokens = start, 0
    while end < len(windows) and (end == start or num_tokens + windows[end].num_tokens <= max_tokens):
        num_tokens += windows[end].num_tokens
        end += 1
    return windows[start:end]


def iter_window_logits(
    model: CausalLM,
    token_ids: Tensor,
    windows: Sequence[Window],
    *,
    max_tokens: int,
    adapter: Adapter | None = None,
    chunk_bytes: int = LOGITS_CHUNK_BYTES,
) -> Iterator[LogitsChunk]:
    """Logits of every scored position of the windows, in chunks of bounded size.

    Args:
        token_ids: [num_tokens] int64, the whole text, on the model's device.
        windows: from plan_windows.
        max_tokens: of one packed forward; a window that is longer runs alone and in parts, with a chunk of no
            positions after each part but the last.
        chunk_bytes: at most so many bytes of float32 logits in a chunk, but one position at least.
    """
    done = 0
    while done < len(windows):
        batch = take_windows(windows, done, max_tokens)
        if batch[0].num_tokens > max_tokens:
            window, parts = batch[0], []
            ids = token_ids[window.start : window.end].tolist()
            for ((_, part),) in chunked_hidden(model, [ids], max_tokens=max_tokens, adapter=adapter):
                parts.append(part)
                if sum(map(len, parts)) < len(ids):
                    nothing = torch.empty(0, dtype=torch.int64)
                    yield LogitsChunk(nothing, token_ids[:0], _logits(model, part[:0]), ends_forward=False)
            hidden, indices = _scored_rows(torch.cat(parts), [window])
        else:
            hidden, indices = _scored_hidden(model, token_ids, batch, adapter)
        rows = max(1, chunk_bytes // (4 * model.config.vocab_size))
        if hidden.is_cpu:
            rows = min(rows, CPU_LOGITS_ROWS)
        for start in range(0, len(indices), rows):
            chunk = indices[start : start + rows]
            yield LogitsChunk(
                indices=chunk,
                targets=token_ids[chunk.to(token_ids.device)],
                logits=_logits(model, hidden[start : start + rows]),
                ends_forward=start + rows >= len(indices),
            )
        done += len(batch)


@torch.no_grad()
def _scored_hidden(
    model: CausalLM, token_ids: Tensor, windows: Sequence[Window], adapter: Adapter | None
) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] from which the scored tokens are predicted, and those tokens' indices [N] on the host."""
    device = token_ids.device
    lengths = [window.num_tokens for window in windows]
    total = sum(lengths)
    packed = torch.cat([token_ids[window.start : window.end] for window in windows])
    lora = None if adapter is None else LoRABatch([(adapter, 0, total)], total)
    return _scored_rows(model(packed, packed_context(lengths, device=device, lora=lora)), windows)


def _scored_rows(hidden: Tensor, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Of hidden states [T, D] of packed windows, those that predict scored tokens; and those tokens' indices."""
    rows, indices, offset = [], [], 0
    for window in windows:
        scored = torch.arange(window.first_scored, window.end)
        indices.append(scored)
        rows.append(scored - window.start - 1 + offset)  # the token before the scored one predicts it
        offset += window.num_tokens
    return hidden[torch.cat(rows).to(hidden.device)], torch.cat(indices)


@torch.no_grad()
def _logits(model: CausalLM, hidden: Tensor) -> Tensor:
    return model.compute_logits(hidden)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats: [N] float64, from float32 log-softmax of logits [N, V].

    Raises:
        IndexError: a target is not in [0, V).
    """
    if cpu.takes(logits) and len(logits):
        return cpu.token_nll(logits, targets)
    return F.cross_entropy(logits.float(), targets, reduction="none").double()


def token_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL divergence of each row's distribution from ``logits`` to ``other``, both [N, V], in nats: [N] float64."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_q = F.log_softmax(other.float(), dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1, dtype=torch.float64)
