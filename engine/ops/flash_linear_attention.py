"""The chunked gated delta rule by flash-linear-attention (github.com/fla-org/flash-linear-attention), where installed.

Its function takes packed sequences with states before and gives those after; states within are had by cutting the
sequences there. Shapes: as in engine.ops.delta_rule; S sequences.

Proof: tests/unit/test_flash_linear_attention.py, tests/gpu.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MINIMUM = (0, 5)
"""The first version whose function shares key heads among value heads and takes lengths from the host."""


@lru_cache
def load() -> Callable[..., Any] | None:
    """Its ``chunk_gated_delta_rule``; None, and a word in the log, where the package is not there or of no use."""
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        package = importlib.import_module("fla")
        function: Callable[..., Any] = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except Exception as error:  # noqa: BLE001 - whatever a package for another Triton raises on import
        logger.warning("flash-linear-attention cannot be imported, the torch form serves: %r", error)
        return None
    version = str(getattr(package, "__version__", ""))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MINIMUM:
        logger.warning("flash-linear-attention %s is too old, the torch form serves; 0.5 or later is used", version)
        return None
    return function


@dataclass(slots=True)
class _Round:
    """One call: a piece of some of the sequences.

    Attributes:
        rows: [n] int64, its tokens among T; None: all of them in order.
        cu_seqlens, cu_seqlens_host: [pieces + 1] int64, where pieces begin among its tokens; last is n.
        sequences: [pieces] int64; None: all in order.
        captures: (which capture, which piece has its state at the end).
    """

    rows: Tensor | None
    cu_seqlens: Tensor
    cu_seqlens_host: Tensor
    sequences: Tensor | None
    captures: list[tuple[int, int]]


@dataclass(slots=True)
class FlaPlan:
    """How packed sequences go through the function; the same for all layers of a forward.

    Attributes:
        rounds: each goes on from the states that the one before left.
        num_captures: states wanted on the way.
        places: [T] int64, where each token's output is among those of all rounds; None: in order.
    """

    rounds: list[_Round]
    num_captures: int
    places: Tensor | None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As ``gated_delta_rule`` of engine.ops.delta_rule. Gradients are the package's own."""
        function = load()
        assert function is not None
        state = initial_state
        outputs: list[Tensor] = []
        captured: dict[int, Tensor] = {}
        for part in self.rounds:
            inputs = [x if part.rows is None else x.index_select(0, part.rows) for x in (q, k, v, g, beta)]
            # The first round is of all sequences, so what a later one goes on from is there.
            before = state if part.sequences is None or state is None else state.index_select(0, part.sequences)
            out, after = function(
                *(x[None].contiguous() for x in inputs),
                scale=k.shape[-1] ** -0.5,
                initial_state=before,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                cu_seqlens=part.cu_seqlens,
                cu_seqlens_cpu=part.cu_seqlens_host,
            )
            outputs.append(out[0])
            for capture, piece in part.captures:
                captured[capture] = after[piece]
            state = after if part.sequences is None or state is None else state.index_copy(0, part.sequences, after)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self.places is not None:
            out = out.index_select(0, self.places)
        assert state is not None
        return out, state, [captured[i] for i in range(self.num_captures)]


def plan_fla(lengths: Sequence[int], captures: Sequence[tuple[int, int]], device: torch.device) -> FlaPlan:
    """Cuts sequences where states are wanted; the n-th pieces of all that have one make the n-th round.

    Args:
        lengths: tokens of each sequence, each at least 1.
        captures: (sequence, number of its leading tokens).
    """
    starts = [0, *accumulate(lengths)]
    ends = [sorted({length, *(n for seq, n in captures if seq == s)}) for s, length in enumerate(lengths)]
    rounds: list[_Round] = []
    order: list[Tensor] = []
    for step in range(max(len(e) for e in ends)):
        sequences = [s for s, e in enumerate(ends) if len(e) > step]
        spans = [(ends[s][step - 1] if step else 0, ends[s][step]) for s in sequences]
        rows = torch.cat(
            [torch.arange(starts[s] + a, starts[s] + b) for s, (a, b) in zip(sequences, spans, strict=True)]
        )
        offsets = torch.tensor([0, *accumulate(b - a for a, b in spans)])
        at = {(s, b): piece for piece, (s, (_, b)) in enumerate(zip(sequences, spans, strict=True))}
        whole = len(rows) == starts[-1]
        rounds.append(
            _Round(
                rows=None if whole else rows.to(device),
                cu_seqlens=offsets.to(device),
                cu_seqlens_host=offsets,
                sequences=None if len(sequences) == len(lengths) else torch.tensor(sequences, device=device),
                captures=[(i, at[capture]) for i, capture in enumerate(captures) if capture in at],
            )
        )
        order.append(rows)
    places = torch.cat(order).argsort().to(device) if len(rounds) > 1 else None
    return FlaPlan(rounds, len(captures), places)
