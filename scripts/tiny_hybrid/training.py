"""The model's shape, its start and its training: this project's model code with float32 parameters that are trained.

Shapes: B sequences of L tokens, packed: T = B L.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.context import packed_context
from engine.loading.hf_config import model_config
from engine.models.base import build_model
from engine.models.qwen3_5_text import Qwen3_5ForCausalLM
from engine.quantization.base import scheme_map
from scripts.tiny_hybrid.text import END_ID, VOCAB_SIZE

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 160,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attn_output_gate": True,
    "attention_bias": False,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
    "use_cache": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the model is trained.

    Attributes:
        length: L, tokens of a sequence. batch: B.
        learning_rate: after the warm-up; falls to a tenth of it along a cosine.
        mtp_weight: of the loss of the multi-token prediction head, beside that of the model.
    """

    seed: int = 0
    steps: int = 3000
    batch: int = 2
    length: int = 512
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    mtp_weight: float = 0.2

    @property
    def num_tokens(self) -> int:
        """That the model sees; two more are predicted."""
        return self.steps * self.batch * self.length

    def rate(self, step: int) -> float:
        """Of a step, from 1."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))


def new_model(seed: int) -> Qwen3_5ForCausalLM:
    """The model of CONFIG at the start of training, float32.

    Matrices are normal with 1 / fan-in, those that write to the residual stream less by the number of their additions;
    decays start as in Mamba-2 (arXiv:2405.21060): time constants from a few to a thousand tokens.
    """
    model = build_model(model_config(CONFIG, "scripts/tiny_hybrid"), scheme_map(None), torch.float32)
    assert isinstance(model, Qwen3_5ForCausalLM)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    depth = CONFIG["num_hidden_layers"]
    for name, parameter in model.named_parameters():
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind == "A_log":
            parameter.uniform_(1.0, 16.0, generator=generator).log_()
        elif kind == "dt_bias":
            times = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            parameter.copy_(times + torch.log(-torch.expm1(-times)))  # softplus of it is ``times``
        elif kind == "conv1d":
            parameter.uniform_(-0.5, 0.5, generator=generator)
        elif parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("linear_attn.norm.weight") else 0.0)  # the others are shifted by 1
        else:
            std = 0.05 if kind == "embed_tokens" else parameter.shape[1] ** -0.5
            if kind in ("o_proj", "out_proj", "down_proj"):
                std /= math.sqrt(2 * depth)
            parameter.normal_(0.0, std, generator=generator)
    return model.train().requires_grad_()


def losses(model: Qwen3_5ForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean NLL of the next tokens and, by the head, of those after them.

    Args:
        windows: [B, L + 2] int64; L tokens are read.
    """
    batch, length = windows.shape[0], windows.shape[1] - 2
    ctx = packed_context([length] * batch)
    now, following, after = (windows[:, i : i + length].flatten() for i in range(3))
    hidden = model(now, ctx)
    nll = F.cross_entropy(model.compute_logits(hidden), following)
    drafted = model.mtp_hidden(hidden, following, ctx)
    return nll, F.cross_entropy(model.compute_logits(drafted), after)


def train(recipe: Recipe, ids: np.ndarray, log_every: int = 50) -> tuple[Qwen3_5ForCausalLM, float]:
    """Trains on windows of ``ids`` in an order that the seed fixes, each once.

    Returns: the model, and the seconds that it took.
    """
    model = new_model(recipe.seed)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    order = np.random.default_rng(recipe.seed).permutation(recipe.steps * recipe.batch) * recipe.length
    stream = torch.from_numpy(ids.astype(np.int64))
    begin = time.monotonic()
    seen = np.zeros(2)
    for step in range(1, recipe.steps + 1):
        starts = order[(step - 1) * recipe.batch : step * recipe.batch]
        windows = torch.stack([stream[start : start + recipe.length + 2] for start in starts])
        nll, mtp_nll = losses(model, windows)
        (nll + recipe.mtp_weight * mtp_nll).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seen += nll.item(), mtp_nll.item()
        if step % log_every == 0 or step == recipe.steps:
            seconds = time.monotonic() - begin
            rate = step * recipe.batch * recipe.length / seconds
            print(
                f"step {step}/{recipe.steps}  nll {seen[0] / log_every:.4f}  mtp {seen[1] / log_every:.4f}"
                f"  |g| {norm:.2f}  lr {recipe.rate(step):.2e}  {rate:.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
            seen[:] = 0.0
    return model.eval().requires_grad_(False), time.monotonic() - begin
