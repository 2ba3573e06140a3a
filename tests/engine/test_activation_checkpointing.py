"""Activation checkpointing: the same numbers from less memory, in every family of decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.core.loaded import LoadedModel
from engine.jobs import LoRAParams, TokenizedExample, TrainCheckpoint
from engine.ops import cpu
from engine.training.batching import MicroBatch
from engine.training.dataset import Examples
from engine.training.forward import TrainingForward
from engine.training.lora_init import masters, new_adapter
from engine.training.passes import accumulate_gradients
from engine.training.trainer import train
from tests.allocations import Allocations
from tests.engine.test_gguf_weights import write as write_blocks
from tests.tiny import save_tiny_hybrid, save_tiny_llama
from tests.training_runs import events_of, load_tiny, losses, make_spec, random_examples

EXAMPLES = random_examples([40, 24, 33, 30])


def save_tiny_gemma3(directory: Path) -> Path:
    """A Gemma 3 with a sliding and a full layer of each, as a Hugging Face directory (float32)."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=256,
    )
    Gemma3ForCausalLM(config).save_pretrained(directory)
    return directory


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: save_tiny_llama(path, num_hidden_layers=4),
    "gemma3": save_tiny_gemma3,
    "hybrid": lambda path: save_tiny_hybrid(path),
    "moe": lambda path: save_tiny_hybrid(path, experts=True),
}


def gradients(
    loaded: LoadedModel, *, recomputes: bool, dropout: float, of: Sequence[TokenizedExample] = EXAMPLES
) -> tuple[float, dict[str, Tensor], int]:
    """Loss and gradients of two micro-batches that share a generator, and the peak of memory."""
    adapter = new_adapter("a", loaded.model.linears(), LoRAParams(rank=4, dropout=dropout), 0, "cpu")
    parameters = masters(adapter)
    filler = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0.0, 0.05, generator=filler)  # with B = 0, A has no gradient
    examples = Examples.of(of)
    batches = [MicroBatch.of(examples[:2]), MicroBatch.of(examples[2:])]
    forward = TrainingForward(loaded, torch.float32, recomputes=recomputes)
    generator = torch.Generator().manual_seed(2)
    count = examples.num_loss_tokens
    with Allocations() as memory:
        run = accumulate_gradients(forward, batches, adapter, count, generator if dropout else None)
        while True:
            try:
                next(run)
            except StopIteration as end:
                total = end.value
                break
    return total, {name: p.grad for name, p in parameters.items() if p.grad is not None}, memory.peak_bytes


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_to_the_bit(tmp_path: Path, family: str, dropout: float) -> None:
    """Layers that run again draw the dropout masks of their first run, and leave the generator where it was for the
    next micro-batch; so the gradients do not change in any bit, while less is alive at the peak."""
    loaded = load_tiny(FAMILIES[family](tmp_path / "model"), tmp_path / "state")
    loss, kept, kept_bytes = gradients(loaded, recomputes=False, dropout=dropout)
    again, recomputed, recomputed_bytes = gradients(loaded, recomputes=True, dropout=dropout)
    assert loss == again
    assert kept.keys() == recomputed.keys()
    assert len(kept) == 2 * len(loaded.model.linears())
    for name, gradient in kept.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, recomputed[name]), name
    assert recomputed_bytes < 0.7 * kept_bytes, (recomputed_bytes, kept_bytes)


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")
def test_layers_that_run_again_round_activations_as_before(tmp_path: Path) -> None:
    """The backward, which runs them, is outside of the block that allows it."""
    path, examples = write_blocks(tmp_path, "Q4_1"), random_examples([9, 24, 33, 30], vocab_size=32)
    results = []
    for quantization in ("auto", "off"):
        loaded = load_tiny(path, tmp_path / "state", activation_quantization=quantization)
        loss, kept, _ = gradients(loaded, recomputes=False, dropout=0.3, of=examples)
        again, recomputed, _ = gradients(loaded, recomputes=True, dropout=0.3, of=examples)
        assert loss == again
        assert all(torch.equal(gradient, recomputed[name]) for name, gradient in kept.items())
        results.append(kept)
    assert not any(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_a_run_with_it_is_the_run_without(tiny_hybrid: Path, tmp_path: Path) -> None:
    """As a parameter of a run, it changes no loss and no gradient norm."""
    runs = []
    for recomputes in (False, True):
        directory = tmp_path / str(recomputes)
        lora = LoRAParams(rank=4, alpha=8.0, dropout=0.1)
        spec = make_spec(directory, EXAMPLES, EXAMPLES[:1], lora=lora, activation_checkpointing=recomputes, max_steps=3)
        runs.append(losses(events_of(spec, load_tiny(tiny_hybrid, directory / "state"))))
    assert runs[0] == runs[1]


def test_an_interrupted_run_may_go_on_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    """A run that ran out of memory resumes with checkpointing: its losses are those of the run without."""
    whole = events_of(make_spec(tmp_path / "whole", EXAMPLES), load_tiny(tiny_llama, tmp_path / "whole" / "state"))
    spec = make_spec(tmp_path / "cut", EXAMPLES, checkpoint_every=2)
    run = train(spec, load_tiny(tiny_llama, tmp_path / "cut" / "state"))
    while not isinstance(next(run), TrainCheckpoint):
        pass
    run.close()  # type: ignore[attr-defined]
    params = dataclasses.replace(spec.params, activation_checkpointing=True)
    resumed = events_of(dataclasses.replace(spec, params=params), load_tiny(tiny_llama, tmp_path / "cut" / "state"))
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 2}
