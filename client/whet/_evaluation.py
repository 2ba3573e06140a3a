"""Perplexity: requests and responses."""

from __future__ import annotations

from collections.abc import Sequence

from whet._generation import to_token_ids
from whet._values import adapter_selector, fill, incomplete, known_seconds, new_request_id, optional
from whet.types import PerplexityProgress, PerplexityResult
from whet.v1 import evaluation_pb2


def perplexity_request(
    text: str | Sequence[int],
    *,
    model: str,
    adapter: str | None,
    adapter_version: int | None,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    request_id: str | None,
) -> evaluation_pb2.PerplexityRequest:
    """The request of ``perplexity``."""
    request = evaluation_pb2.PerplexityRequest(
        request_id=new_request_id(request_id), model=model, adapter=adapter_selector(adapter, adapter_version)
    )
    if isinstance(text, str):
        request.text = text
    else:
        request.token_ids.CopyFrom(to_token_ids(text, "text"))
    fill(request, {"window": window, "stride": stride, "max_tokens": max_tokens}, ("window", "stride", "max_tokens"))
    return request


class PerplexityReader:
    """Makes progress of a Perplexity stream's responses. Attributes: result: set by the terminal event."""

    def __init__(self, request: evaluation_pb2.PerplexityRequest) -> None:
        self.request_id = request.request_id
        self.result: PerplexityResult | None = None

    def feed(self, response: evaluation_pb2.PerplexityResponse) -> list[PerplexityProgress]:
        """Takes the next response; returns the progress that it brings."""
        match response.WhichOneof("event"):
            case "progress":
                progress = response.progress
                return [
                    PerplexityProgress(
                        windows_done=progress.windows_done,
                        windows_total=progress.windows_total,
                        num_tokens=progress.num_tokens,
                        nll=progress.nll,
                    )
                ]
            case "result":
                self.result = _from_result(response.result)
                return []
            case _:  # of a newer server
                return []

    def end(self) -> None:
        """Raises InternalError if the stream ended too early."""
        if self.result is None:
            raise incomplete("Perplexity", self.request_id)


def _from_result(result: evaluation_pb2.PerplexityResult) -> PerplexityResult:
    return PerplexityResult(
        request_id=result.request_id,
        perplexity=result.perplexity,
        nll=result.nll,
        standard_error=optional(result, "standard_error"),
        num_tokens=result.num_tokens,
        num_windows=result.num_windows,
        seconds=known_seconds(result, "duration"),
        adapter_version=optional(result, "adapter_version"),
    )
