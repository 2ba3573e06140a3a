"""How much memory a model's cache may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.context import PagedCache, RecurrentStates
from engine.core.machine import free_bytes
from engine.errors import OutOfMemoryError

CPU_CACHE_FRACTION = 0.25
CUDA_CACHE_FRACTION = 0.85
CPU_CACHE_LIMIT_BYTES = 4 << 30


def block_bytes(config: ModelConfig, num_layers: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of all attention layers."""
    return 2 * num_layers * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


def state_slot_bytes(config: ModelConfig, num_layers: int) -> int:
    """Bytes of one slot: windows and matrices of all recurrent layers, float32."""
    shape = config.linear_attention
    if shape is None:
        return 0
    window = (shape.conv_width - 1) * shape.conv_dim
    matrix = shape.num_value_heads * shape.key_head_dim * shape.value_head_dim
    return num_layers * (window + matrix) * torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What a model's cache consists of.

    Attributes:
        num_blocks: of the attention cache, the null block included.
        num_slots: of recurrent state, the null slot included; 0 for models without.
        max_sequences: that the slots allow to run together; the other slots are for checkpoints.
    """

    num_blocks: int
    num_slots: int
    max_sequences: int


def plan_cache(
    config: ModelConfig,
    engine_config: EngineConfig,
    num_attention_layers: int,
    num_recurrent_layers: int,
    max_model_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> CachePlan:
    """Shares the memory for caches among blocks and slots.

    Recurrent states take at most half: what every running sequence needs, and as much again for checkpoints where
    prefixes are shared. The rest is for blocks, at most what all running sequences fill.

    Raises:
        OutOfMemoryError: not even one sequence of one block would fit.
    """
    size = block_bytes(config, num_attention_layers, engine_config.block_size, dtype)
    slot_size = state_slot_bytes(config, num_recurrent_layers)
    budget = engine_config.kv_cache_bytes
    if budget is None:
        if device.type == "cuda":
            budget = int(free_bytes(device) * CUDA_CACHE_FRACTION)
        else:
            budget = min(int(free_bytes(device) * CPU_CACHE_FRACTION), CPU_CACHE_LIMIT_BYTES)
    running, num_slots = engine_config.max_running_requests, 0
    if slot_size:
        wanted = running * (2 if engine_config.enable_prefix_caching else 1)
        share = budget // 2 if size else budget
        # The null slot, and one for a sequence, have to be.
        usable = min(max(share // slot_size - 1, 1), wanted)
        num_slots = usable + 1
        running = min(running, usable - usable // 2 if engine_config.enable_prefix_caching else usable)
    left = budget - num_slots * slot_size
    wanted = engine_config.max_running_requests * -(-max_model_len // engine_config.block_size) + 1
    num_blocks = min(left // size, wanted) if size else wanted
    if left < 0 or num_blocks < 2:
        needed = 2 * size + (2 * slot_size if slot_size else 0)
        raise OutOfMemoryError(
            f"the cache may take {budget} bytes; at least {needed} are needed for two blocks of "
            f"{engine_config.block_size} tokens{' and two slots of recurrent state' if slot_size else ''}",
            field="kv_cache_bytes",
        )
    return CachePlan(num_blocks, num_slots, running)


def make_states(config: ModelConfig, num_layers: int, num_slots: int, device: torch.device) -> RecurrentStates:
    """Slots of recurrent state. On the CPU their pages become resident as they are first written.

    Raises:
        OutOfMemoryError: the device refuses it.
    """
    shape = config.linear_attention
    assert shape is not None
    window = (num_slots, shape.conv_width - 1, shape.conv_dim)
    matrix = (num_slots, shape.num_value_heads, shape.key_head_dim, shape.value_head_dim)
    try:
        return RecurrentStates(
            windows=[_zeros(window, device, torch.float32) for _ in range(num_layers)],
            matrices=[_zeros(matrix, device, torch.float32) for _ in range(num_layers)],
        )
    except (RuntimeError, MemoryError) as error:
        size = state_slot_bytes(config, num_layers) * num_slots
        raise OutOfMemoryError(f"{size} bytes of recurrent state cannot be allocated on {device}: {error}") from error


def make_cache(
    config: ModelConfig, num_layers: int, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> PagedCache:
    """An attention cache. On the CPU its pages become resident as they are first written.

    Raises:
        OutOfMemoryError: the device refuses it.
    """
    shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
    try:
        keys = [_zeros(shape, device, dtype) for _ in range(num_layers)]
        values = [_zeros(shape, device, dtype) for _ in range(num_layers)]
    except (RuntimeError, MemoryError) as error:
        size = block_bytes(config, num_layers, block_size, dtype) * num_blocks
        raise OutOfMemoryError(f"{size} bytes of attention cache cannot be allocated on {device}: {error}") from error
    return PagedCache(keys=keys, values=values, block_size=block_size)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; NumPy's come from the system as zeros and take memory only once they are written.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
