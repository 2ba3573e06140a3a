"""Sampling on the device chooses what the plain sampler chooses, and the host does not wait for it."""

from __future__ import annotations

import torch

from engine.core.sequence import Sequence, new_sequences
from engine.request import Request, SamplingParams
from engine.sampling.on_device import DeviceSampler, choose, parameters
from engine.sampling.sampler import Sampler
from tests.gpu.checks import check
from tests.gpu.kernels import Numbers

PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.6, min_p=0.05),
    SamplingParams(seed=3, top_k=20),
    SamplingParams(seed=4, top_p=0.5),
    SamplingParams(seed=5, top_p=0.9, top_k=50, temperature=1.3),
)


def sequences(some: tuple[SamplingParams, ...]) -> list[Sequence]:
    """One for each."""
    made = []
    for params in some:
        request = Request(request_id="r", model="m", prompt_token_ids=[1], sampling=params)
        made += new_sequences(request, eos_token_ids=[0], max_model_len=1000)
    return made


@check
def tokens_on_the_device(device: torch.device) -> float:
    """Greedy, drawn and filtered rows: the tokens of the plain sampler on the same device; nothing waits for them."""
    vocab_size = 150_000 if device.type == "cuda" else 3000
    for some in (PARAMS[:1] * 5, PARAMS[:3], PARAMS):
        chosen = sequences(some)
        for seed in range(5):
            logits = Numbers(device, seed).normal(len(some), vocab_size, scale=5.0)
            wanted = Sampler().sample(logits.clone(), chosen).token_ids
            got = DeviceSampler().sample(logits, chosen).token_ids
            assert got == wanted, f"{got}, not {wanted}"
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                choose(logits, *parameters(chosen, device))
            except RuntimeError as error:
                raise AssertionError(f"{len(some)} rows: {error}") from error
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
    return 0.0
