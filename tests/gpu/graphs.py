"""Decode steps as CUDA graphs give the tokens of steps that are not captured."""

from __future__ import annotations

import dataclasses
import tempfile

import torch

from engine.core.cuda_graphs import CudaGraphs, Step
from engine.engine import Engine
from engine.ops import backends
from engine.request import Request
from engine.sampling.on_device import choose, parameters, row_numbers
from tests.gpu.checks import Skipped, check
from tests.gpu.elementwise import needs_triton
from tests.gpu.models import CPU, PROMPTS, engine_on, generate, kinds, random_adapter
from tests.gpu.sampling import PARAMS, sequences


def use_graphs(engine: Engine, device: torch.device, max_sequences: int) -> CudaGraphs:
    """Has the engine's model decode through graphs; without a GPU, a replay runs the forward once more."""

    def again(step: Step) -> Step:
        step()
        return step

    runner = engine._models["tiny"].runner
    assert runner is not None
    capture = None if device.type == "cuda" else again
    graphs = CudaGraphs(runner._model, runner._cache, runner._states, 128, max_sequences, capture)
    runner._graphs = graphs
    return graphs


@check
def tokens_of_graphs(device: torch.device) -> float:
    """Five sequences in eight rows, and as they end in four, two and one: the tokens of the CPU in plain torch, with
    graphs and without."""
    needs_triton(device)
    long = device.type == "cuda"
    prompts = {f"p{i}": prompt for i, prompt in enumerate(PROMPTS if long else PROMPTS[1:4])}
    for kind in kinds(device):
        count = 24 if long else 3
        with backends.allow(triton=False, fla=False):
            expected = generate(engine_on(CPU, kind), prompts, count)
        engine = engine_on(device, kind)
        graphs = use_graphs(engine, device, len(prompts))
        for attempt in range(2):  # the first captures
            got = generate(engine, prompts, count)
            for name, (tokens, _) in expected.items():
                assert got[name][0] == tokens, f"{kind}, {name}, run {attempt}: {got[name][0]}, not {tokens}"
        assert graphs._replays, f"{kind}: nothing was captured"
        assert all(ends != "logits" for _, _, ends in graphs._replays), f"{kind}: tokens were not chosen in the graph"
        refused = [(size, ends) for (size, _, ends), replay in graphs._replays.items() if replay is None]
        assert not refused, f"{kind}: steps of {refused} were not captured"
        if long:
            assert isinstance(engine_on(device, kind)._models["tiny"].runner._graphs, CudaGraphs)  # type: ignore[union-attr]
            plain = generate(engine_on(device, kind, enable_decode_graphs=False), prompts, count)
            assert all(plain[name][0] == tokens for name, (tokens, _) in expected.items()), f"{kind}, graphs off"
    return 0.0


@check
def tokens_of_overlapped_steps(device: torch.device) -> float:
    """Greedy, drawn and filtered rows that end at different steps, by length and by a token: the same with each step
    launched before the tokens of the last are read, one by one, and without graphs."""
    needs_triton(device)
    long = device.type == "cuda"
    count = 40 if long else 4
    prompts = PROMPTS if long else PROMPTS[1:3]

    def run(kind: str, overlap: bool, captured: bool = True) -> dict[str, list[int]]:
        engine = engine_on(device, kind, enable_overlap=overlap, enable_decode_graphs=captured)
        if captured:
            use_graphs(engine, device, len(PROMPTS))
        runner = engine._models["tiny"].runner
        assert runner is not None
        tokens: dict[str, list[int]] = {}
        for i, (prompt, params) in enumerate(zip(prompts, PARAMS, strict=False)):
            sampling = dataclasses.replace(
                params, max_tokens=count - i * long, ignore_eos=True, stop_token_ids=list(range(9))
            )
            engine.add_request(Request(request_id=str(i), model="tiny", prompt_token_ids=prompt, sampling=sampling))
        ahead = 0
        while engine.has_requests():
            for output in engine.step():
                assert output.finish_reason != "error", output.error_message
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
            ahead += runner._under_way is not None
        assert bool(ahead) == overlap, f"{kind}: {ahead} steps were launched ahead"
        return tokens

    for kind in kinds(device):
        wanted = run(kind, False)
        got = run(kind, True)
        assert got == wanted, f"{kind}: {got}, not {wanted}"
        if long:
            assert run(kind, False, False) == wanted, f"{kind}, graphs off"
    return 0.0


@check
def tokens_of_graphs_with_adapters(device: torch.device) -> float:
    """Rows with an adapter over all linears beside rows without: the tokens of the CPU in plain torch."""
    needs_triton(device)
    long = device.type == "cuda"
    prompts = {f"p{i}": prompt for i, prompt in enumerate(PROMPTS if long else PROMPTS[1:4])}
    adapters = {"p1": "a", "p2": "a"}

    def run(where: torch.device, captured: bool) -> dict[str, list[int]]:
        with tempfile.TemporaryDirectory(prefix="whet-gpu-") as folder:
            engine = engine_on(where, kind, state_dir=folder)
            loaded = engine._models["tiny"]
            loaded.adapters.publish(random_adapter(loaded))
            graphs = use_graphs(engine, where, len(prompts)) if captured else None
            tokens = {name: found for name, (found, _) in generate(engine, prompts, count, adapters).items()}
        if graphs is not None:
            assert any(reach is not None for _, reach, _ in graphs._replays), (
                f"{kind}: no step with adapters was captured"
            )
            assert None not in graphs._replays.values(), f"{kind}: some steps were not captured"
        return tokens

    for kind in kinds(device):
        count = 12 if long else 2
        with backends.allow(triton=False, fla=False):
            expected = run(CPU, False)
        got = run(device, True)
        assert got == expected, f"{kind}: {got}, not {expected}"
    return 0.0


@check
def steps_never_wait(device: torch.device) -> float:
    """From the numbers of a captured step to its tokens on the device, tables that grow included, and on to a step that
    takes them, without the host waiting for the device."""
    if device.type != "cuda":
        raise Skipped("only a CUDA device can be waited for")
    for kind in kinds(device):
        engine = engine_on(device, kind)
        graphs = use_graphs(engine, device, 3)
        states = [1, 2, 3] if kind != "llama" else []
        chosen = sequences(PARAMS[3:])
        # Twice in the same blocks, and once in one more.
        for attempt, last in enumerate((4, 4, 8)):
            tables = [[1 + 4 * s + i for i in range(last // 4 + 1)] for s in range(3)]
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            try:
                with torch.inference_mode():
                    logits = graphs.logits([5, 6, 7], [last] * 3, tables, states, [None] * 3)
                    assert logits is not None, f"{kind}: not captured"
                    choose(logits, *parameters(chosen, device))
                    for sources in ((), (2, 0, 1)):
                        step = graphs.launch(
                            [5, 6, 7], [last] * 3, tables, states, [None] * 3, row_numbers(chosen), sources
                        )
                        assert step is not None, f"{kind}: the choice of tokens was not captured"
            except RuntimeError as error:
                raise AssertionError(f"{kind}: {error}") from error
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return 0.0
