"""How much memory a run will take, counted before it starts, so that one that does not fit is refused in time.

The count is of what the run adds to the resident model and its cache. It errs on the side of too much: measured peaks
of tiny models of each family and of SmolLM2-135M are between two fifths of it and all of it
(tests/engine/test_training_memory.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from engine.core.loaded import LoadedModel
from engine.core.machine import free_bytes
from engine.core.memory import block_bytes, state_slot_bytes
from engine.errors import FailedPreconditionError
from engine.jobs import TrainSpec
from engine.layers.linear import Embedding, Linear
from engine.lora.adapter import Adapter
from engine.ops.delta_rule import plan_chunks
from engine.ops.quantized import CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS
from engine.training.activations import WIDE, Packing, layer_bytes
from engine.training.dataset import Dataset
from engine.training.loss import chunk_rows

LOGITS_COPIES = 3
"""Of a chunk of logits that exist together: in float32, in the compute type, and their gradient in that."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak.

    Attributes:
        micro_batch_tokens: that it is for.
        adapter: A and B in float32, and their gradients.
        optimizer: its state, and what a bound copies of state and masters.
        activations: kept for the backward, or the cache with which the first batch is proven where that is more.
        layer: what a layer's forward and backward take beside what is kept.
        logits: of one chunk, while the loss is computed.
        update: temporaries of an optimizer step or of writing a checkpoint.
    """

    micro_batch_tokens: int
    adapter: int
    optimizer: int
    activations: int
    layer: int
    logits: int
    update: int

    @property
    def num_bytes(self) -> int:
        """Of what exists together."""
        return self.adapter + self.optimizer + max(self.activations + max(self.layer, self.logits), self.update)

    def __str__(self) -> str:
        parts = ("adapter", "optimizer", "activations", "layer", "logits")
        listed = ", ".join(f"{part} {_mib(getattr(self, part))}" for part in parts)
        return f"{_mib(self.num_bytes)} ({listed}; {self.micro_batch_tokens} tokens a forward)"


class MemoryPlanner:
    """Estimates for one run.

    Args:
        adapter: of the run's shape; its tensors may be on the meta device.
        dtype: that the run computes in.
    """

    def __init__(
        self, spec: TrainSpec, dataset: Dataset, loaded: LoadedModel, adapter: Adapter, dtype: torch.dtype
    ) -> None:
        self._spec = spec
        self._dataset = dataset
        self._loaded = loaded
        self._dtype = dtype
        self._num_parameters = adapter.num_parameters()
        self._ranks = {name: a.shape[-2] for name, (a, _) in adapter.modules.items()}
        self._dropout = adapter.dropout
        lengths = np.sort(np.diff(dataset.train.starts))
        self._largest_batch = int(lengths[-spec.params.batch_size :].sum())
        model = loaded.causal_lm()
        self._layers = list(model.get_submodule("model.layers").children())
        self._num_states = model.num_recurrent_layers
        self._num_caches = model.num_attention_layers

    def estimate(self, micro_batch_tokens: int) -> MemoryEstimate:
        """Of the run, if its forwards have so many tokens, or those of one example that is longer."""
        config, params = self._loaded.config, self._spec.params
        longest, held_out = self._dataset.train.longest, self._dataset.evaluation.longest
        num_tokens = max(longest, min(micro_batch_tokens, self._largest_batch))
        packing = self._packing(num_tokens, longest)
        layers = [self._layer_bytes(layer, packing) for layer in self._layers]
        kept, layer = sum(layers), max(layers) // 2
        if params.activation_checkpointing:
            kept = len(layers) * num_tokens * config.hidden_size * packing.itemsize
            layer = max(layers) + layer
        most_tokens = max(num_tokens, held_out)
        if held_out > num_tokens:  # nothing is kept then
            alone = self._packing(held_out, held_out)
            layer = max(layer, *(self._layer_bytes(module, alone) for module in self._layers))
        ends = 4 * most_tokens * config.hidden_size * WIDE  # embeddings, final norm, hidden states and their gradient
        rows = min(most_tokens, chunk_rows(config.vocab_size))
        state = self._optimizer_numbers()
        copies = 2 * (self._num_parameters + state) if self._spec.bound is not None else 0
        return MemoryEstimate(
            micro_batch_tokens=micro_batch_tokens,
            adapter=2 * WIDE * self._num_parameters,
            optimizer=WIDE * (state + copies),
            activations=max(kept, self._proof_bytes(packing)) + ends,
            layer=layer + self._widened_bytes(),
            logits=LOGITS_COPIES * WIDE * rows * config.vocab_size,
            # safetensors copies tensors to write them.
            update=WIDE * max(self._num_parameters, state) + ends,
        )

    def _layer_bytes(self, layer: torch.nn.Module, packing: Packing) -> int:
        return layer_bytes(layer, packing, self._ranks, self._dropout)

    def _packing(self, num_tokens: int, longest: int) -> Packing:
        on_cpu = self._loaded.device.type == "cpu"
        chunk = plan_chunks([longest], device=self._loaded.device.type).size
        lengths = np.diff(self._dataset.train.starts)
        filled = float((-(-lengths // chunk) * chunk).sum() / lengths.sum())  # on average
        return Packing(
            num_tokens=num_tokens,
            num_sequences=min(self._spec.params.batch_size, -(-num_tokens // max(1, int(lengths.mean())))),
            longest=longest,
            chunk_size=chunk,
            chunked_tokens=-(-int(num_tokens * filled) // chunk) * chunk,
            itemsize=self._dtype.itemsize,
            on_cpu=on_cpu,
        )

    def _optimizer_numbers(self) -> int:
        """Of its state."""
        params = self._spec.params
        return self._num_parameters * (2 if params.optimizer == "adamw" else int(params.momentum > 0.0))

    def _proof_bytes(self, packing: Packing) -> int:
        """Cache and states with which the serving forward runs over a micro-batch."""
        config, size = self._loaded.config, self._loaded.engine_config.block_size
        num_blocks = 1 + packing.num_tokens // size + packing.num_sequences
        cache = num_blocks * block_bytes(config, self._num_caches, size, self._loaded.dtype)
        return cache + (1 + packing.num_sequences) * state_slot_bytes(config, self._num_states)

    def _widened_bytes(self) -> int:
        """Rows of a weight that is stored narrow, as they are multiplied."""
        sizes = [
            module.in_features * module.out_features
            for module in self._loaded.model.modules()
            if isinstance(module, Linear | Embedding) and module.scheme.name != "none"
        ]
        chunk = CPU_CHUNK_ELEMENTS if self._loaded.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
        return 2 * WIDE * min(chunk, max(sizes, default=0))

    def fit(self, micro_batch_tokens: int, *, fixed: bool = False) -> MemoryEstimate:
        """The estimate for as many tokens in a forward as fit, up to so many; none fewer than the longest example.

        Args:
            fixed: just so many: a run that is resumed must cut as it did.
        Raises:
            FailedPreconditionError: not even the least fits; it says what would make the run smaller.
        """
        free = available_bytes(self._loaded.device)
        floor = min(self._dataset.train.longest, micro_batch_tokens)
        tokens = micro_batch_tokens
        while (estimate := self.estimate(tokens)).num_bytes > free:
            if fixed or tokens <= floor:
                raise FailedPreconditionError(
                    f"the run would take {estimate}, and {_mib(free)} are free; "
                    f"smaller: {', '.join(self._remedies(estimate))}",
                    reason="RUN_DOES_NOT_FIT",
                )
            tokens = max(tokens // 2, floor)
        return estimate

    def _remedies(self, estimate: MemoryEstimate) -> list[str]:
        """What would make it smaller, the most helpful first."""
        params = self._spec.params
        options: Mapping[str, int] = {
            "a lower max_seq_len": estimate.activations if self._dataset.train.longest > 16 else 0,
            "activation_checkpointing": 0 if params.activation_checkpointing else estimate.activations,
            "a lower rank or fewer target_modules": estimate.adapter + estimate.optimizer,
        }
        return sorted((word for word in options if options[word]), key=lambda word: -options[word])


def available_bytes(device: torch.device) -> int:
    """Memory that a run can have: what is free, and what torch's allocator holds without using it."""
    free = free_bytes(device)
    if device.type == "cuda":
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"
