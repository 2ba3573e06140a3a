"""From a path to a LoadedModel."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.core.half_weights import copy_halves, keep_halves, keeps_halves
from engine.core.heap import keep_for_forwards
from engine.core.huge_pages import prefer_huge_pages
from engine.core.loaded import LoadedModel
from engine.core.memory import make_cache, make_states, plan_cache
from engine.core.runner import Runner
from engine.errors import OutOfMemoryError
from engine.info import ModelInfo
from engine.layers.joint import join_linears
from engine.layers.linear import Embedding, Linear
from engine.loading import Checkpoint, load_weights, open_checkpoint
from engine.lora.store import AdapterStore
from engine.lora.targets import module_kinds, parameter_kinds, parameter_names
from engine.models.base import CausalLM, Model, build_model
from engine.models.encoder import Encoder
from engine.ops import cpu
from engine.ops.backends import implementations
from engine.quantization.base import scheme_map

logger = logging.getLogger(__name__)


def load_model(
    name: str, path: Path, engine_config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> LoadedModel:
    """Reads a checkpoint, builds its model and plans its cache.

    Raises:
        NotFoundError: there is nothing at the path.
        FormatError: malformed or of an unsupported kind.
        OutOfMemoryError: it does not fit.
    """
    checkpoint = open_checkpoint(path, keep_blocks=keeps_blocks(engine_config, device, dtype))
    loaded = load_checkpoint(name, checkpoint, engine_config, device, dtype)
    loaded.info.path = str(path)
    return loaded


def load_checkpoint(
    name: str, checkpoint: Checkpoint, engine_config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> LoadedModel:
    """The same from a checkpoint that is open."""
    begin = time.monotonic()
    config = checkpoint.config
    model = build_model(config, scheme_map(config.quantization_config), dtype)
    if keeps_halves(engine_config, device, dtype):
        keep_halves(model, checkpoint, dtype)
    try:
        load_weights(model, checkpoint, dtype, device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"model {name!r} does not fit on {device}: {error}") from error
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            module.scheme.after_loading(module)
    copy_halves(model)
    if device.type == "cuda" or isinstance(model, Encoder):
        join_linears(model)
    model.eval()
    prefer_huge_pages(model)
    info = _info(name, checkpoint.path, checkpoint, model, device, dtype, _max_model_len(model, engine_config))
    root = Path(engine_config.state_dir) / "adapters" / name if engine_config.state_dir else None
    loaded = LoadedModel(
        info=info,
        config=config,
        engine_config=engine_config,
        model=model,
        device=device,
        dtype=dtype,
        adapters=AdapterStore(name, root, model, device=device, base_digest=info.weights_digest),
    )
    if isinstance(model, CausalLM) and config.task == "generate":
        layers, recurrent = model.num_attention_layers, model.num_recurrent_layers
        plan = plan_cache(config, engine_config, layers, recurrent, info.max_model_len, device, dtype)
        cache = make_cache(config, layers, plan.num_blocks, engine_config.block_size, device, dtype)
        states = make_states(config, recurrent, plan.num_slots, device) if recurrent else None
        loaded.runner = Runner(loaded, model, cache, plan, states)
        info.num_blocks = plan.num_blocks
        info.block_size = engine_config.block_size
        info.num_slots = plan.num_slots
        if states is not None:
            info.state_bytes = sum(t.numel() * t.element_size() for t in (*states.windows, *states.matrices))
        info.kv_cache_bytes = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
        # One sequence can never hold more than the whole pool.
        info.max_model_len = min(info.max_model_len, (plan.num_blocks - 1) * engine_config.block_size)
    if device.type == "cpu":
        keep_for_forwards()
    info.load_seconds = time.monotonic() - begin
    held = info.dtype if info.quantization == "none" else info.quantization
    logger.info("model %s computes in %s; its weights are held in %s", name, info.dtype, held)
    if device.type != "cpu":
        used = ", ".join(f"{operation}: {form}" for operation, form in implementations(device).items())
        logger.info("model %s on %s runs %s", name, device, used)
    return loaded


def keeps_blocks(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GGUF file's quantized weights stay as the file has them. By themselves they do where our kernels
    multiply by them; elsewhere making them wide for each product would cost more than it saves."""
    if config.gguf_weights == "auto":
        return device.type == "cpu" and dtype == torch.float32 and cpu.available()
    return config.gguf_weights == "stored"


def _max_model_len(model: Model, engine_config: EngineConfig) -> int:
    return min(model.max_input_tokens, engine_config.max_model_len or model.max_input_tokens)


def _num_parameters(model: Model) -> int:
    """Of the model as trained, however narrow its linears are stored."""
    total = 0
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            total += module.in_features * module.out_features
            bias = getattr(module, "bias", None)
            total += 0 if bias is None else bias.numel()
        else:
            total += sum(p.numel() for p in module.parameters(recurse=False))
    return total


def _info(
    name: str,
    path: Path,
    checkpoint: Checkpoint,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
) -> ModelInfo:
    config = model.config
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    schemes = {m.scheme.name for m in model.modules() if isinstance(m, Linear)} - {"none"}
    return ModelInfo(
        name=name,
        path=str(path),
        model_type=config.model_type,
        task=config.task,
        dtype=str(dtype).removeprefix("torch."),
        quantization="+".join(sorted(schemes)) or "none",
        num_parameters=_num_parameters(model),
        weights_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        max_model_len=max_model_len,
        num_blocks=0,
        block_size=0,
        kv_cache_bytes=0,
        linear_modules=module_kinds(model.linears()),
        expert_parameters=parameter_kinds(parameter_names(model.lora_targets())),
        weights_digest=checkpoint.digest(),
        tokenizer_path=str(checkpoint.path),
        embedding_dimensions=config.hidden_size,
        device=str(device),
        num_mtp_layers=model.num_mtp_layers if isinstance(model, CausalLM) else 0,
    )
