"""How good the stored model is: what is measured is the bfloat16 file, loaded as the service loads it.

Shapes: n positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.config import EngineConfig
from engine.context import packed_context
from engine.core.model_loader import load_model
from engine.engine import Engine
from engine.jobs import JobFailed, PerplexityFinished, PerplexitySpec
from engine.models.qwen3_5_text import Qwen3_5ForCausalLM
from scripts.tiny_hybrid.training import CONFIG

WINDOW, STRIDE = 512, 256
ENGINE = EngineConfig(device="cpu", dtype="float32", num_threads=1, kv_cache_bytes=64 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one text, from its second token on.

    Attributes:
        num_tokens: that were scored. num_bytes: of the text.
        nll: mean per token, nats.
        unigram_nll: the same of the frequencies of single tokens in the training text.
    """

    num_tokens: int
    num_bytes: int
    nll: float
    unigram_nll: float

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nll)

    @property
    def unigram_perplexity(self) -> float:
        """Per token."""
        return math.exp(self.unigram_nll)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the tokens cost, over the bytes of the text."""
        return self.nll * self.num_tokens / math.log(2) / self.num_bytes


def score(directory: Path, ids: np.ndarray, num_bytes: int, train_ids: np.ndarray) -> Score:
    """Scores a text with the Perplexity job, windows of WINDOW tokens every STRIDE."""
    engine = Engine(ENGINE)
    engine.load_model("tiny-hybrid", directory)
    spec = PerplexitySpec(job_id="score", model="tiny-hybrid", token_ids=ids.tolist(), window=WINDOW, stride=STRIDE)
    engine.start_job(spec)
    finished: PerplexityFinished | None = None
    while engine.has_jobs():
        for event in engine.advance_jobs():
            if isinstance(event, JobFailed):
                raise RuntimeError(event.error_message)
            if isinstance(event, PerplexityFinished):
                finished = event
    assert finished is not None
    counts = np.bincount(train_ids, minlength=CONFIG["vocab_size"]) + 1.0  # so that no token is impossible
    unigram = -np.log(counts / counts.sum())[ids[1:].astype(np.int64)].mean()
    return Score(num_tokens=finished.num_tokens, num_bytes=num_bytes, nll=finished.nll, unigram_nll=float(unigram))


@torch.no_grad()
def acceptance(directory: Path, ids: np.ndarray) -> float:
    """How often the head's greedy draft is what the model itself takes greedily.

    In a text x, the head drafts token t + 2 from h_t and x_{t+1}; verified, it stands if the model's own choice after
    x_{t+1} is the same.
    """
    loaded = load_model("tiny-hybrid", directory, ENGINE, torch.device("cpu"), torch.float32)
    model = loaded.model
    assert isinstance(model, Qwen3_5ForCausalLM)
    accepted = drafted = 0
    for window in torch.from_numpy(ids.astype(np.int64)).split(WINDOW):
        if len(window) < 2:
            continue
        hidden = model(window, packed_context([len(window)]))
        draft = model.mtp_hidden(hidden[:-1], window[1:], packed_context([len(window) - 1]))
        same = model.compute_logits(draft).argmax(-1) == model.compute_logits(hidden[1:]).argmax(-1)
        accepted, drafted = accepted + int(same.sum()), drafted + len(same)
    return accepted / drafted
