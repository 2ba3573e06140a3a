"""The loss of engine.training.loss in pieces of bounded work, with a pause before each.

Shapes: N positions whose prediction counts, D hidden size, V vocabulary.

A product with a head of 50,000 rows takes as long as several decoder layers, so it is cut along the vocabulary: the
logits of a part of it are made at a time, then softmax goes over some positions at a time, then the gradient of the
hidden states is summed part by part. Rows of the head are read as often as by the whole, where a cut along the
positions would read it once for each. The cut hangs on shapes alone, never on the clock, so a run repeats to the bit.
Reference: chunked_cross_entropy (tests/unit/test_training_loss_slices.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.jobs import Pause
from engine.ops.cross_entropy import nll_and_gradient
from engine.training.loss import LOGITS_CHUNK_BYTES, chunk_rows

HEAD_PIECE_PRODUCTS = 1 << 28
"""Multiplications of one piece of the product with the head: some milliseconds of a core."""

MIN_PART_ELEMENTS = 1 << 19
"""Elements of the head that one piece multiplies by at least."""

SOFTMAX_PIECE_ELEMENTS = 1 << 20
"""Logits that one piece takes the softmax of, but those of one position at least."""

HeadPart = Callable[[Tensor, int, int], Tensor]
"""(hidden [n, D], start, end) to logits [n, end - start] float32, without a graph where gradients are off."""

Loss = tuple[float, Tensor | None]
"""Sum of the NLLs in nats, and its gradient [N, D] in the type of the hidden states; None where none was asked for."""


class LogitsBuffer:
    """Memory of logits, which the next chunk takes again: the system clears every page of what is mapped anew.

    On the CPU it is mapped apart. Amid the allocator's memory it would lie where a forward keeps its activations, which
    then need 180 MB more (SmolLM2-135M, 1,024 tokens, all linears adapted; with q and v alone, nothing).
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialized, of that shape; what was taken before is overwritten."""
        size = shape[0] * shape[1]
        if self._memory is None or self._memory.numel() < size or self._memory.dtype != dtype:
            self._memory = None  # before there is another
            if device.type == "cpu":
                self._memory = torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype)
            else:
                self._memory = torch.empty(size, dtype=dtype, device=device)
        return self._memory[:size].view(shape)


def nll_slices(
    hidden: Tensor,
    targets: Tensor,
    head: HeadPart,
    vocab_size: int,
    *,
    gradient: bool,
    numerics: Callable[[], AbstractContextManager[object]] = nullcontext,
    chunk_bytes: int = LOGITS_CHUNK_BYTES,
    part_elements: int | None = None,
    buffer: LogitsBuffer | None = None,
) -> Generator[Pause, None, Loss]:
    """The sum of the negative log-likelihoods of the targets, and its gradient.

    Args:
        hidden: [N, D]; its graph is not touched.
        targets: [N] int64.
        gradient: whether to form that of ``hidden``.
        numerics: entered around each product with the head.
        chunk_bytes: at most so many bytes of float32 logits exist at a time.
        part_elements: of the head in one piece; None: as many as HEAD_PIECE_PRODUCTS allow.
        buffer: of the logits; None: one for these alone.
    """
    buffer = buffer or LogitsBuffer()
    rows = chunk_rows(vocab_size, chunk_bytes, len(hidden))
    total = 0.0
    gradients = torch.empty_like(hidden) if gradient else None
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        inputs = hidden[chunk].detach()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = buffer.take((len(inputs), vocab_size), dtype, hidden.device)
        nll, formed = yield from _chunk(inputs, targets[chunk], logits, head, gradient, numerics, part_elements)
        total += nll
        if gradients is not None and formed is not None:
            gradients[chunk] = formed
    return total, gradients


def head_parts(num: int, width: int, vocab_size: int, part_elements: int | None = None) -> list[tuple[int, int]]:
    """Bounds of the parts of the vocabulary for a product of [num, width] with the head; see nll_slices."""
    if part_elements is None:
        part_elements = max(MIN_PART_ELEMENTS, HEAD_PIECE_PRODUCTS // max(1, num))
    step = max(1, part_elements // width)
    return [(start, min(start + step, vocab_size)) for start in range(0, vocab_size, step)]


def _chunk(
    hidden: Tensor,
    targets: Tensor,
    logits: Tensor,
    head: HeadPart,
    gradient: bool,
    numerics: Callable[[], AbstractContextManager[object]],
    part_elements: int | None,
) -> Generator[Pause, None, Loss]:
    (num, width), vocab_size = hidden.shape, logits.shape[1]
    parts = head_parts(num, width, vocab_size, part_elements)
    hidden = hidden.requires_grad_(gradient)
    edges = []
    for start, end in parts:
        yield Pause("head", num)
        with torch.set_grad_enabled(gradient), numerics():
            part = head(hidden, start, end)
        logits[:, start:end] = part.detach()
        if gradient:
            # The edge keeps the graph of the part, and not the part.
            edges.append(torch.autograd.graph.get_gradient_edge(part))
        del part
    total = logits.new_zeros(())
    at_once = max(1, SOFTMAX_PIECE_ELEMENTS // vocab_size)
    for row in range(0, num, at_once):
        piece = slice(row, row + at_once)
        yield Pause("softmax", at_once)
        if gradient:
            # In their place the gradient of the logits, softmax - one_hot(targets).
            total += nll_and_gradient(logits[piece], targets[piece], logits[piece])[0]
        else:
            total += F.cross_entropy(logits[piece], targets[piece], reduction="sum")
    if not gradient:
        return float(total), None
    summed = torch.zeros_like(hidden, dtype=logits.dtype)
    for (start, end), edge in zip(parts, edges, strict=True):
        yield Pause("head gradient", num)
        # float32 between the parts: sums of a narrow type would lose what the product of the whole keeps.
        summed += torch.autograd.grad([edge], [hidden], [logits[:, start:end]])[0]
    return float(total), summed.to(hidden.dtype)
