"""What the parity tests share: a transformers model goes to disk and comes back through our own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.context import packed_context
from engine.loading import load_weights, open_checkpoint
from engine.models.base import CausalLM, Model, build_model
from engine.quantization.base import scheme_map

TOLERANCE = 1e-4
"""Largest accepted absolute difference in float32."""


def through_our_loader(reference: Any, path: Path, **save: Any) -> Model:
    """Saves a transformers model and loads what was written."""
    reference.save_pretrained(path, **save)
    return load(path)


def load(path: Path) -> Model:
    """A checkpoint as a float32 model on the CPU."""
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config, scheme_map(checkpoint.config.quantization_config), torch.float32)
    load_weights(model, checkpoint, torch.float32, torch.device("cpu"))
    return model.eval()


def randomize(reference: Any, seed: int) -> Any:
    """Random values for every parameter, those included that initialise to 0 or 1 and would hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)
    return reference.eval()


def token_ids(lengths: list[int], vocab_size: int, seed: int = 0) -> list[Tensor]:
    """Random sequences of those lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def packed_hidden(model: Model, sequences: list[Tensor]) -> list[Tensor]:
    """Hidden states of sequences that run packed in one forward."""
    lengths = [len(sequence) for sequence in sequences]
    ctx = packed_context(lengths, causal=isinstance(model, CausalLM))
    return list(model(torch.cat(sequences), ctx).split(lengths))


@torch.no_grad()
def assert_same_logits(model: Model, reference: Any, sequences: list[Tensor], **kwargs: Any) -> None:
    """Every logit of every sequence, packed in ours and alone in the reference."""
    assert isinstance(model, CausalLM)
    for sequence, hidden in zip(sequences, packed_hidden(model, sequences), strict=True):
        expected = reference(input_ids=sequence[None], use_cache=False, **kwargs).logits[0].float()
        assert expected.std() > 0.05, "logits that are all alike would prove nothing"
        difference = (model.compute_logits(hidden) - expected).abs().max().item()
        assert difference < TOLERANCE, f"length {len(sequence)}: {difference:.2e}"


@torch.no_grad()
def assert_same_hidden(model: Model, reference: Any, sequences: list[Tensor]) -> None:
    """Every hidden state of every sequence, packed in ours and alone in the reference."""
    for sequence, hidden in zip(sequences, packed_hidden(model, sequences), strict=True):
        expected = reference(input_ids=sequence[None]).last_hidden_state[0]
        difference = (hidden - expected).abs().max().item()
        assert difference < TOLERANCE, f"length {len(sequence)}: {difference:.2e}"
