"""Memory of training: the estimate against what tensors take, runs that do not fit, peaks on the CPU, and logits."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import FailedPreconditionError
from engine.jobs import LoRAParams, TrainCheckpoint, TrainStarted, TrainStep
from engine.training import memory
from engine.training.loss import chunked_cross_entropy
from engine.training.progress import peak_memory_bytes, reset_peak_memory
from engine.training.trainer import train
from tests.allocations import Allocations
from tests.engine.test_activation_checkpointing import save_tiny_gemma3
from tests.tiny import save_tiny_hybrid, save_tiny_llama
from tests.training_runs import events_of, load_tiny, losses, make_spec, of_type, random_examples, told

pytestmark = pytest.mark.usefixtures("one_thread")

FACTOR = 2.5
"""How far above the measured peak the estimate may be. It is never below."""

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: save_tiny_llama(path, num_hidden_layers=4),
    "gemma3": save_tiny_gemma3,
    "hybrid": lambda path: save_tiny_hybrid(path),
    "moe": lambda path: save_tiny_hybrid(path, experts=True),
}
OPTIONS: dict[torch.dtype, list[tuple[list[int], dict[str, Any]]]] = {
    torch.float32: [
        ([100, 10, 18], {"optimizer": "sgd", "momentum": 0.9, "lora": LoRAParams(rank=16, dropout=0.1)}),
        ([30] * 12, {"activation_checkpointing": True}),
    ],
    torch.bfloat16: [([128], {})],
}


def measure(path: Path, directory: Path, lengths: list[int], dtype: torch.dtype, **options: Any) -> tuple[int, int]:
    """Estimate and measured peak of a whole run: a step, evaluations, checkpoints and publication."""
    loaded = load_tiny(path, directory / "state", dtype=dtype)
    values: dict[str, Any] = {"lora": LoRAParams(rank=8), "max_steps": 1, "batch_size": len(lengths)}
    spec = make_spec(directory, random_examples(lengths), random_examples([20]), **(values | options))
    with Allocations() as allocations:
        [started] = of_type(events_of(spec, loaded), TrainStarted)
    assert started.estimated_memory_bytes is not None
    return started.estimated_memory_bytes, allocations.peak_bytes


@pytest.mark.parametrize("dtype", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_holds_what_is_measured(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Of every family, the estimate is not below the peak of all tensors alive together, and within FACTOR of it."""
    path = FAMILIES[family](tmp_path / "model")
    for number, (lengths, options) in enumerate(OPTIONS[dtype]):
        estimate, measured = measure(path, tmp_path / str(number), lengths, dtype, **options)
        assert measured <= estimate <= FACTOR * measured, (options, estimate, measured)


def test_the_estimate_holds_on_a_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    """SmolLM2-135M: of 30 layers and a vocabulary of 49,152."""
    estimate, measured = measure(smollm2_gguf, tmp_path, [96], torch.float32)
    assert measured <= estimate <= FACTOR * measured, (estimate, measured)


def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error tells the estimate, what is free, and what would help; nothing has been written."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 20)
    spec = make_spec(tmp_path, random_examples([200]))
    with pytest.raises(FailedPreconditionError) as caught:
        train(spec, load_tiny(tiny_llama, tmp_path / "state"))
    assert caught.value.reason == "RUN_DOES_NOT_FIT"
    for part in ("1.0 MiB are free", "a lower max_seq_len", "activation_checkpointing", "a lower rank"):
        assert part in caught.value.message
    assert not Path(spec.run_dir).exists()


def test_less_memory_means_smaller_forwards_and_a_resumed_run_keeps_them(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where forwards of the usual size do not fit, smaller ones are taken, with the losses of the larger ones but for
    rounding. A resumed run has the cut that it began with; where that does not fit any more, it is refused."""
    examples = random_examples([30] * 8)
    whole = events_of(make_spec(tmp_path / "whole", examples, batch_size=8), load_tiny(tiny_llama, tmp_path / "s1"))
    [started] = of_type(whole, TrainStarted)
    assert started.estimated_memory_bytes is not None
    less = started.estimated_memory_bytes * 2 // 3
    monkeypatch.setattr(memory, "available_bytes", lambda device: less)
    spec = make_spec(tmp_path / "less", examples, batch_size=8, checkpoint_every=2)
    run = train(spec, load_tiny(tiny_llama, tmp_path / "s2"))
    begun = []
    while not isinstance(event := next(run), TrainCheckpoint):
        begun += told([event])
    run.close()  # type: ignore[attr-defined]
    [smaller] = of_type(begun, TrainStarted)
    assert smaller.estimated_memory_bytes is not None
    assert smaller.estimated_memory_bytes <= less
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 40)
    resumed = events_of(spec, load_tiny(tiny_llama, tmp_path / "s2"))
    [again] = of_type(resumed, TrainStarted)
    assert again.estimated_memory_bytes == smaller.estimated_memory_bytes
    seen = losses(begun) | losses(resumed)
    assert seen.keys() == losses(whole).keys()
    for step, (loss, _) in losses(whole).items():
        assert seen[step][0] == pytest.approx(loss, rel=1e-4)
    monkeypatch.setattr(memory, "available_bytes", lambda device: less // 2)
    with pytest.raises(FailedPreconditionError, match="are free"):
        train(dataclasses.replace(spec), load_tiny(tiny_llama, tmp_path / "s2"))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is Linux's to tell")
def test_the_peak_on_the_cpu_is_the_resident_set_since_the_run_began(tiny_llama: Path, tmp_path: Path) -> None:
    """Memory that was taken and given back before does not count; memory taken since does; each step tells it."""
    cpu = torch.device("cpu")
    large = torch.ones(64 << 20)  # 256 MiB
    before = peak_memory_bytes(cpu)
    del large
    gc.collect()
    reset_peak_memory(cpu)
    after = peak_memory_bytes(cpu)
    assert before is not None
    assert after is not None
    assert after < before - (200 << 20)
    large = torch.ones(64 << 20)
    del large
    grown = peak_memory_bytes(cpu)
    assert grown is not None
    assert grown > after + (200 << 20)
    loaded = load_tiny(tiny_llama, tmp_path / "state")
    steps = of_type(events_of(make_spec(tmp_path, random_examples([20])), loaded), TrainStep)
    assert all(step.peak_memory_bytes is not None for step in steps)
    assert steps[-1].peak_memory_bytes is not None
    assert steps[-1].peak_memory_bytes < grown


def test_logits_of_a_large_vocabulary_never_exist_together() -> None:
    """2,048 tokens of a vocabulary of 248,320 would be 2 GB of logits, and as much again for their gradient. Loss and
    gradient take less than a quarter of the first, in tensors of at most 128 MiB; where a part of the positions is
    compared, the gradient is that of the plain loss in float64, but for float32 sums over the vocabulary."""
    num_tokens, vocab_size, hidden_size = 2048, 248_320, 8
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocab_size, hidden_size, generator=generator)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    whole_bytes = 4 * num_tokens * vocab_size
    assert whole_bytes > 2e9
    with Allocations() as allocations:
        loss = chunked_cross_entropy(hidden, targets, lambda x: x @ head.T, vocab_size)
        loss.backward()  # type: ignore[no-untyped-call]
    assert allocations.largest_bytes <= 128 << 20
    assert allocations.peak_bytes < whole_bytes / 4
    gradient = hidden.grad
    assert gradient is not None
    some = slice(100, 108)
    part = hidden.detach()[some].double().requires_grad_()
    plain = torch.nn.functional.cross_entropy(part @ head.double().T, targets[some], reduction="sum")
    plain.backward()  # type: ignore[no-untyped-call]
    assert part.grad is not None
    torch.testing.assert_close(gradient[some].double(), part.grad, rtol=0.0, atol=2e-3)
