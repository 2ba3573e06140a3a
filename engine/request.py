"""What goes in and out of generation: Request, SamplingParams, RequestOutput. Free of torch.

All types here are plain dataclasses of scalars, lists and dicts, so that msgspec can carry them between processes
without conversion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import InvalidArgumentError

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""stop: an end-of-sequence or stop token, or a stop string; length: max_tokens or the context is used up."""

MAX_TOP_LOGPROBS = 64
MAX_LOGIT_BIAS = 1024
MAX_N = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Defaults mean: plain sampling at temperature 1, no filter, no penalty.

    Attributes:
        max_tokens: completion tokens at most; None: as many as the context holds.
        min_tokens: end-of-sequence and stop tokens cannot be sampled before this many completion tokens.
        temperature: 0 is greedy.
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the smallest set whose probability reaches this, (0, 1].
        min_p: drop tokens less likely than this times the likeliest, [0, 1].
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens in prompt or completion.
        presence_penalty: [-2, 2]; subtracted once from each token of the completion so far.
        frequency_penalty: [-2, 2]; subtracted per occurrence in the completion so far.
        seed: [0, 2^63); same seed, same output, whatever else is in the batch. None: unpredictable.
        stop_token_ids: end the completion, with "stop"; not part of the text.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        logit_bias: token id to a finite addend.
        logprobs: top-k alternatives to report per completion token; 0: the chosen one alone; None: no logprobs.
        prompt_logprobs: the same, for prompt tokens.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def validate(self, vocab_size: int) -> None:
        """Checks every field.

        Raises:
            InvalidArgumentError: naming the field, its value, and what would be accepted.
        """
        _at_least("max_tokens", self.max_tokens, 1)
        _at_least("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _reject("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        _within("temperature", self.temperature, 0.0, 100.0)
        _at_least("top_k", self.top_k, 0)
        _within("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            _reject("seed", self.seed, "an integer in [0, 2^63)")
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                _reject("stop_token_ids", token, f"token ids in [0, {vocab_size})")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            _reject("logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS} entries")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                _reject("logit_bias", token, f"token ids in [0, {vocab_size})")
            if not math.isfinite(bias):
                _reject("logit_bias", bias, "finite values")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= min(MAX_TOP_LOGPROBS, vocab_size):
                _reject(name, count, f"an integer in [0, {min(MAX_TOP_LOGPROBS, vocab_size)}]")


def _reject(name: str, value: object, accepted: str) -> None:
    raise InvalidArgumentError(f"{name} is {value}; accepted: {accepted}", field=name)


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        _reject(name, value, f"an integer of at least {low}")


def _within(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    # Written so that NaN fails.
    if not ((low < value if low_open else low <= value) and value <= high):
        _reject(name, value, f"a number in {'(' if low_open else '['}{low:g}, {high:g}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation request, as the engine takes it.

    Attributes:
        request_id: unique among live requests; chosen by the server, never by a caller.
        model: name of a loaded generative model.
        prompt_token_ids: at least one id.
        sampling: see SamplingParams.
        n: completions to make of one prompt; each has its index in RequestOutput.
        adapter: name of an adapter of this model, or None for the base.
        adapter_version: None: the live version at the time of arrival.
        priority: lower runs first; ties by arrival.
        cache_salt: keeps the prefix cache of one tenant apart from another's.
    """

    request_id: str
    model: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    adapter: str | None = None
    adapter_version: int | None = None
    priority: int = 0
    cache_salt: str = ""


@dataclass(slots=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability under the model (before temperature, penalties and filters).

    Attributes:
        rank: 1 for the likeliest token.
        top: the likeliest alternatives, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Timings:
    """Seconds, measured by the engine's clock.

    Attributes:
        queue_seconds: arrival to first being scheduled.
        prefill_seconds: first being scheduled to the first token.
        decode_seconds: first to last token.
        time_to_first_token_seconds: arrival to first token; None if there was none.
        total_seconds: arrival to end.
    """

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    time_to_first_token_seconds: float | None = None
    total_seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """What one step brought one completion of a request. A delta, not the whole.

    Attributes:
        request_id: of the Request.
        index: which of the n completions.
        token_ids: new completion tokens of this step, a stop token included (the server keeps it out of the text).
        logprobs: one per entry of token_ids, if asked for.
        prompt_logprobs: once, with the first output, if asked for; the first prompt token has None.
        finish_reason: None while it goes on.
        stop_token_id: the token that ended it, if one did.
        num_prompt_tokens, num_cached_tokens, num_completion_tokens: totals so far.
        adapter_version: which version made the tokens; None for the base.
        timings: with the last output only.
        error_code, error_message, error_reason: with finish_reason "error".
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    adapter_version: int | None = None
    timings: Timings | None = None
    error_code: str = ""
    error_message: str = ""
    error_reason: str = ""
