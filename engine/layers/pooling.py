"""From hidden states of tokens to one vector per sequence, over packed sequences and without padding.

Shapes: T packed tokens, S sequences, D hidden size, M <= D dimensions kept.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import OutOfRangeError, ShapeError


def pool(hidden: Tensor, cu_seqlens: Tensor, pooling: Literal["mean", "cls", "last"]) -> Tensor:
    """One vector per sequence.

    Args:
        hidden: [T, D].
        cu_seqlens: [S + 1], ascending, from 0 to T; no sequence is empty.
        pooling: "mean" of all tokens; "cls": the first token; "last": the last token.

    Returns: [S, D] float32. Each row depends on its own sequence alone.

    Raises:
        ShapeError: cu_seqlens does not end at T.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or int(cu_seqlens[-1]) != hidden.shape[0]:
        raise ShapeError(f"cu_seqlens is {cu_seqlens.tolist()}; accepted: offsets from 0 to {hidden.shape[0]}")
    offsets = cu_seqlens.to(torch.int64)
    if pooling == "cls":
        return hidden[offsets[:-1]].float()
    if pooling == "last":
        return hidden[offsets[1:] - 1].float()
    return torch.segment_reduce(hidden.float(), "mean", offsets=offsets, axis=0)


def validate_dimensions(dimensions: int | None, width: int) -> int:
    """The number of dimensions to keep.

    Raises:
        OutOfRangeError: not in [1, width].
    """
    if dimensions is None:
        return width
    if not 1 <= dimensions <= width:
        raise OutOfRangeError(
            f"dimensions is {dimensions}; accepted: an integer in [1, {width}], the width of this model's embeddings",
            field="dimensions",
        )
    return dimensions


def finish(vectors: Tensor, *, dimensions: int | None, normalize: bool) -> Tensor:
    """Matryoshka truncation (arXiv:2205.13147), then scaling to length 1.

    Args:
        vectors: [S, D] float32.
        dimensions: M; None keeps all.

    Returns: [S, M] float32, contiguous.

    Raises:
        OutOfRangeError: dimensions is not in [1, D].
    """
    kept = vectors[:, : validate_dimensions(dimensions, vectors.shape[1])]
    if normalize:
        kept = F.normalize(kept, dim=-1)
    return kept.contiguous()
