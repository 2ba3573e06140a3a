"""Tiny models through the engine on the device, against the same engine on the CPU in plain torch."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.context import RecurrentStates, packed_context
from engine.core.batch import pack
from engine.core.chunked import serving_logits
from engine.core.loaded import LoadedModel
from engine.core.memory import make_cache, make_states
from engine.core.model_loader import load_model
from engine.engine import Engine
from engine.jobs import TokenizedExample
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.lora.adapter import Adapter
from engine.ops import backends
from engine.request import Request, SamplingParams
from engine.training.batching import MicroBatch
from engine.training.data import Examples
from engine.training.forward import TrainingForward
from tests.gpu.checks import Skipped, Worst, check, needs
from tests.tiny import save_tiny_hybrid, save_tiny_llama

CPU = torch.device("cpu")
CONFIG = EngineConfig(device="cpu", dtype="float32", num_threads=1, kv_cache_bytes=4 << 20, block_size=4)


def kinds(device: torch.device) -> tuple[str, ...]:
    """Models to check; Triton's interpreter on the CPU has time for the one that has all kernels."""
    return ("llama", "hybrid", "experts") if device.type == "cuda" else ("hybrid",)


@lru_cache
def directory(kind: str) -> Path:
    """A tiny model on disk, for the time of the process."""
    needs("transformers")
    root = Path(tempfile.mkdtemp(prefix="whet-gpu-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    if kind == "llama":
        return save_tiny_llama(root / kind)
    # Each token takes all experts: where it takes some, a rounding can change which, and from there runs part.
    return save_tiny_hybrid(
        root / kind,
        experts=kind == "experts",
        initializer_range=0.1,
        **({"num_experts_per_tok": 6} if kind == "experts" else {}),
    )


def load(kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model; in batches of at most 24 tokens, so that prompts come in chunks, beside decodes."""
    return load_model("tiny", directory(kind), dataclasses.replace(CONFIG, max_batch_tokens=24), device, dtype)


def ids(seed: int, length: int) -> list[int]:
    """A prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


PROMPTS = [ids(i, length) for i, length in enumerate((40, 1, 9, 70, 24))]


def reference_logits(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of all prompts, on the CPU in plain torch."""
    with backends.allow(triton=False, fla=False):
        return torch.cat(serving_logits(load(kind, CPU, dtype), PROMPTS))


@check
def logits_in_float32(device: torch.device) -> float:
    """Logits of whole and chunked prompts equal those of the CPU, for each kind of model."""
    worst = Worst()
    for kind in kinds(device):
        got = torch.cat(serving_logits(load(kind, device), PROMPTS))
        worst.compare(got, reference_logits(kind), 1e-4, kind)
    return worst.figure


@check
def logits_in_bfloat16(device: torch.device) -> float:
    """Logits in bfloat16 are as near to those in float32 as plain torch's in bfloat16 on the CPU: within twice that."""
    worst = Worst()
    for kind in kinds(device):
        expected = reference_logits(kind)
        allowed = 2 * (reference_logits(kind, torch.bfloat16) - expected).std().item()
        got = torch.cat(serving_logits(load(kind, device, torch.bfloat16), PROMPTS)).cpu()
        worst.add((got - expected).std().item(), allowed, kind)
    return worst.figure


def generate(
    engine: Engine, prompts: dict[str, list[int]], max_tokens: int = 3, adapters: dict[str, str] | None = None
) -> dict[str, tuple[list[int], int]]:
    """Greedy tokens by name, and how many prompt tokens were cached. adapters: of some names."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for name, prompt in prompts.items():
        asked = Request(request_id=name, model="tiny", prompt_token_ids=prompt, sampling=sampling)
        engine.add_request(dataclasses.replace(asked, adapter=(adapters or {}).get(name)))
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    cached: dict[str, int] = {}
    while engine.has_requests():
        for output in engine.step():
            assert output.finish_reason != "error", output.error_message
            tokens[output.request_id] += output.token_ids
            cached[output.request_id] = output.num_cached_tokens
    return {name: (tokens[name], cached[name]) for name in prompts}


def engine_on(device: torch.device, kind: str, **changes: object) -> Engine:
    """An engine that holds the model as "tiny", in float32."""
    engine = Engine(dataclasses.replace(CONFIG, device=str(device), **changes))  # type: ignore[arg-type]
    engine.load_model("tiny", directory(kind))
    return engine


@check
def greedy_tokens(device: torch.device) -> float:
    """In one batch with chunked prefill, each alone, and with the kernels off: the tokens of the CPU."""
    chosen = PROMPTS if device.type == "cuda" else PROMPTS[1:3] + PROMPTS[4:]
    prompts = {f"p{i}": prompt for i, prompt in enumerate(chosen)}
    count = 12 if device.type == "cuda" else 3
    for kind in kinds(device):
        with backends.allow(triton=False, fla=False):
            expected = {name: tokens for name, (tokens, _) in generate(engine_on(CPU, kind), prompts, count).items()}
            plain = generate(engine_on(device, kind), prompts, count)
        together = generate(engine_on(device, kind, max_batch_tokens=24), prompts, count)
        for name, tokens in expected.items():
            assert len(tokens) == count
            assert plain[name][0] == tokens, f"{kind}, {name}, kernels off: {plain[name][0]}, not {tokens}"
            assert together[name][0] == tokens, f"{kind}, {name} in a batch: {together[name][0]}, not {tokens}"
        alone = engine_on(device, kind, enable_prefix_caching=False)
        for name in list(prompts) if device.type == "cuda" else ["p1"]:
            got = generate(alone, {name: prompts[name]}, count)[name][0]
            assert got == expected[name], f"{kind}, {name} alone: {got}, not {expected[name]}"
    return 0.0


@check
def prefix_hits(device: torch.device) -> float:
    """A request that goes on from another's blocks and state checkpoint gives what it gives without them."""
    for kind in kinds(device):
        engine = engine_on(device, kind, state_checkpoint_interval=3)
        without = engine_on(device, kind, enable_prefix_caching=False)
        shared = ids(50, 16)
        first, cached = generate(engine, {"first": shared})["first"]
        assert cached == 0
        for name, prompt in {"same": shared, "turn": [*shared, *first, 7, 8], "half": shared[:13] + ids(51, 5)}.items():
            got, cached = generate(engine, {name: prompt})[name]
            assert cached >= 12, f"{kind}, {name}: {cached} tokens were cached"
            expected, _ = generate(without, {name: prompt})[name]
            assert got == expected, f"{kind}, {name}: {got} with a hit, {expected} without"
    return 0.0


def random_adapter(loaded: LoadedModel, dtype: torch.dtype = torch.float32) -> Adapter:
    """Over every linear, with a B that is not zero; the same numbers on each device."""
    generator = torch.Generator().manual_seed(5)

    def factor(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) * shape[1] ** -0.5
        return drawn.to(dtype).to(loaded.device).requires_grad_()

    modules = {
        name: (factor(3, m.in_features), factor(m.out_features, 3)) for name, m in loaded.model.linears().items()
    }
    return Adapter(name="a", version=1, rank=3, alpha=3.0, modules=modules)


def gradients(loaded: LoadedModel) -> tuple[float, dict[str, Tensor]]:
    """Loss over packed examples, and the gradient of every A and B."""
    adapter = random_adapter(loaded)
    examples = [
        TokenizedExample(token_ids=prompt, loss_mask=[i >= 3 for i in range(len(prompt))])
        for prompt in PROMPTS
        if len(prompt) > 4
    ]
    batch = MicroBatch.of(list(Examples.of(examples)), loaded.device)
    forward = TrainingForward(loaded, loaded.dtype)
    loss = forward.nll_sum(forward.hidden(batch, adapter), batch) / batch.num_loss_tokens
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, pair in adapter.modules.items():
        for letter, factor in zip("AB", pair, strict=True):
            assert factor.grad is not None
            found[f"{name}.{letter}"] = factor.grad.double().cpu()
    return loss.item(), found


@check
def lora_gradients_in_float32(device: torch.device) -> float:
    """Of A and B of every linear: those of the CPU."""
    worst = Worst()
    for kind in kinds(device):
        with backends.allow(triton=False, fla=False):
            expected_loss, expected = gradients(load(kind, CPU))
        loss, got = gradients(load(kind, device))
        worst.add(abs(loss - expected_loss) / expected_loss, 1e-5, f"loss of {kind}")
        for name, gradient in got.items():
            assert expected[name].norm() > 1e-6, f"{name} has no effect"
            error = (gradient - expected[name]).norm() / expected[name].norm()
            worst.add(error.item(), 1e-3, f"gradient of {name} of {kind}")
    return worst.figure


@check
def lora_gradients_in_bfloat16(device: torch.device) -> float:
    """The form that trains on a GPU, kernels of others included: all gradients together are as near to those in float32
    as plain torch's in bfloat16 on the CPU, within twice that."""
    worst = Worst()
    for kind in kinds(device):
        with backends.allow(triton=False, fla=False):
            _, expected = gradients(load(kind, CPU))
            _, narrow = gradients(load(kind, CPU, torch.bfloat16))
        _, got = gradients(load(kind, device, torch.bfloat16))
        for letter in "AB":
            names = [name for name in expected if name.endswith(f".{letter}")]
            # Each by its own norm, so that small ones count as large ones do.
            allowed, error = (
                torch.stack([(found[n] - expected[n]).norm() / expected[n].norm() for n in names])
                .square()
                .mean()
                .sqrt()
                for found in (narrow, got)
            )
            worst.add(error.item(), 2 * allowed.item(), f"gradients of {letter} of {kind}")
    return worst.figure


@check
def training_forward_is_the_serving_forward(device: torch.device) -> float:
    """Hidden states of packed whole sequences give the logits that serving gives."""
    worst = Worst()
    for kind in kinds(device):
        loaded = load(kind, device)
        with torch.inference_mode():
            ctx = packed_context([len(p) for p in PROMPTS], device=device)
            hidden = loaded.model(torch.tensor([t for p in PROMPTS for t in p], device=device), ctx)
            whole = loaded.causal_lm().compute_logits(hidden)
        worst.compare(torch.cat(serving_logits(loaded, PROMPTS)), whole, 1e-4, kind)
    return worst.figure


@check
def delta_net_never_waits(device: torch.device) -> float:
    """Decode and prefill of a delta-net layer, its index tensors included, without the host waiting for the device."""
    if device.type != "cuda":
        raise Skipped("only a CUDA device can be waited for")
    loaded = load("hybrid", device, torch.bfloat16)
    layer = next(m for m in loaded.model.modules() if isinstance(m, GatedDeltaNet))
    model = loaded.causal_lm()
    cache = make_cache(loaded.config, model.num_attention_layers, 64, 4, device, torch.bfloat16)
    states: RecurrentStates = make_states(loaded.config, model.num_recurrent_layers, 8, device)
    for lengths in ([1, 1, 1], [1, 9, 1, 30]):
        for attempt in range(2):  # the first compiles kernels
            tables = [list(range(1 + 10 * s, 11 + 10 * s)) for s in range(len(lengths))]
            slots = [3, 1, 6, 2][: len(lengths)]
            tokens = [ids(s, n) for s, n in enumerate(lengths)]
            none = [None] * len(lengths)
            _, ctx = pack(tokens, [3] * len(lengths), tables, none, cache, device, states=states, state_slots=slots)
            x = torch.randn(sum(lengths), loaded.config.hidden_size, device=device, dtype=torch.bfloat16)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            try:
                with torch.inference_mode():
                    layer(x, ctx)
            except RuntimeError as error:
                raise AssertionError(f"lengths {lengths}: {error}") from error
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return 0.0
