"""Quantize: requests and responses."""

from __future__ import annotations

from whet._generation import to_token_ids
from whet._values import check_options, enum_value, enum_word, fill, incomplete, known_seconds, new_request_id, optional
from whet.options import QuantizeOptions
from whet.types import QuantizeProgress, QuantizeReport, TensorError
from whet.v1 import quantization_pb2


def quantize_request(
    model: str, scheme: str, output: str, options: QuantizeOptions
) -> quantization_pb2.QuantizeRequest:
    """The request of ``quantize``."""
    check_options("quantize", options, QuantizeOptions)
    request = quantization_pb2.QuantizeRequest(
        request_id=new_request_id(options.get("request_id")),
        model=model,
        scheme=enum_value(quantization_pb2.QuantizeScheme, "QUANTIZE_SCHEME_", scheme, "scheme"),
        output=output,
    )
    text = options.get("eval_text")
    if isinstance(text, str):
        request.eval_text = text
    elif text is not None:
        request.eval_token_ids.CopyFrom(to_token_ids(text, "eval_text"))
    fill(request, options, ("group_size", "symmetric", "quantize_embeddings", "quantize_head", "dry_run", "load"))
    return request


class QuantizeReader:
    """Makes progress of a Quantize stream's responses. Attributes: report: set by the terminal event."""

    def __init__(self, request: quantization_pb2.QuantizeRequest) -> None:
        self.request_id = request.request_id
        self.report: QuantizeReport | None = None

    def feed(self, response: quantization_pb2.QuantizeResponse) -> list[QuantizeProgress]:
        """Takes the next response; returns the progress that it brings."""
        match response.WhichOneof("event"):
            case "progress":
                return [_from_progress(response.progress)]
            case "report":
                self.report = _from_report(response.report)
                return []
            case _:  # of a newer server
                return []

    def end(self) -> None:
        """Raises InternalError if the stream ended too early."""
        if self.report is None:
            raise incomplete("Quantize", self.request_id)


def _from_progress(progress: quantization_pb2.QuantizeProgress) -> QuantizeProgress:
    return QuantizeProgress(
        stage=enum_word(quantization_pb2.QuantizeStage, "QUANTIZE_STAGE_", progress.stage),
        tensors_done=progress.tensors_done,
        tensors_total=progress.tensors_total,
        tensor=progress.tensor,
    )


def _from_report(report: quantization_pb2.QuantizeReport) -> QuantizeReport:
    return QuantizeReport(
        request_id=report.request_id,
        output=report.output,
        path=report.path,
        bytes_in=report.bytes_in,
        bytes_out=optional(report, "bytes_out"),
        ratio=optional(report, "ratio"),
        tensors=[
            TensorError(
                name=tensor.name,
                relative_rmse=tensor.relative_rmse,
                max_abs=tensor.max_abs,
                num_elements=tensor.num_elements,
                bits=tensor.bits,
            )
            for tensor in report.tensors
        ],
        num_quantized=report.num_quantized,
        num_kept=report.num_kept,
        logit_kl=optional(report, "logit_kl"),
        perplexity_before=optional(report, "perplexity_before"),
        perplexity_after=optional(report, "perplexity_after"),
        num_eval_tokens=report.num_eval_tokens,
        seconds=known_seconds(report, "duration"),
        loaded=report.loaded,
    )
