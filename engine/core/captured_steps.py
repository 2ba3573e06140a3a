"""Which way of capturing decode steps a device has."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from torch import Tensor

from engine.context import PagedCache, RecurrentStates
from engine.core.cuda_graphs import CudaGraphs
from engine.core.decode_graphs import DecodeGraphs
from engine.core.loaded import LoadedModel
from engine.lora.adapter import Adapter
from engine.models.base import CausalLM
from engine.ops import cpu
from engine.ops.backends import uses_triton


class CapturedSteps(Protocol):
    """Decode steps that are captured once and replayed (engine.core.decode_graphs, engine.core.cuda_graphs)."""

    def logits(
        self,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapters: Seq[Adapter | None],
    ) -> Tensor | None:
        """Runs a step of S sequences.

        Args:
            tokens: S ids, each the new token of a sequence.
            computed: per sequence, its tokens in the cache, at least 1.
            block_tables: per sequence, blocks that hold all its tokens, the new one included.
            state_slots: per sequence; empty for models without recurrent layers.
            adapters: per sequence.

        Returns: [S, V] float32, valid until the next step; None if such steps cannot be captured.
        """
        ...


def captured_steps(
    loaded: LoadedModel, model: CausalLM, cache: PagedCache, states: RecurrentStates | None, max_sequences: int
) -> CapturedSteps | None:
    """For the model's device; None where nothing is captured."""
    max_model_len = loaded.info.max_model_len
    if not loaded.engine_config.enable_decode_graphs:
        return None
    if loaded.device.type == "cpu" and cpu.available():
        return DecodeGraphs(model, cache, states, max_model_len)
    # In torch's own operations lengths come from the host, so that no step is like another.
    if loaded.device.type == "cuda" and uses_triton(loaded.device):
        return CudaGraphs(model, cache, states, max_model_len, max_sequences)
    return None
