"""How much memory a model's cache may take."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.context import PagedCache
from engine.core.machine import free_bytes
from engine.errors import OutOfMemoryError

CPU_CACHE_FRACTION = 0.25
CUDA_CACHE_FRACTION = 0.85
CPU_CACHE_LIMIT_BYTES = 4 << 30


def block_bytes(config: ModelConfig, num_layers: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of all attention layers."""
    return 2 * num_layers * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


def plan_num_blocks(
    config: ModelConfig,
    engine_config: EngineConfig,
    num_layers: int,
    max_model_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Blocks of the attention cache, the null block included.

    Raises:
        OutOfMemoryError: not even one sequence of one block would fit.
    """
    size = block_bytes(config, num_layers, engine_config.block_size, dtype)
    budget = engine_config.kv_cache_bytes
    if budget is None:
        if device.type == "cuda":
            budget = int(free_bytes(device) * CUDA_CACHE_FRACTION)
        else:
            budget = min(int(free_bytes(device) * CPU_CACHE_FRACTION), CPU_CACHE_LIMIT_BYTES)
    wanted = engine_config.max_running_requests * -(-max_model_len // engine_config.block_size) + 1
    num_blocks = min(budget // size, wanted)
    if num_blocks < 2:
        raise OutOfMemoryError(
            f"the attention cache may take {budget} bytes; at least {2 * size} are needed for two blocks of "
            f"{engine_config.block_size} tokens",
            field="kv_cache_bytes",
        )
    return num_blocks


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
