"""MergeAdapter: requests and responses."""

from __future__ import annotations

from whet._models import AdapterSources, from_weighted, to_sources
from whet._values import enum_value, fill, incomplete, known_seconds, new_request_id
from whet.types import MergeProgress, MergeReport
from whet.v1 import model_pb2


def merge_request(
    adapters: str | AdapterSources,
    *,
    model: str,
    output: str,
    dtype: str | None,
    force: bool,
    load: bool | None,
    request_id: str | None,
) -> model_pb2.MergeAdapterRequest:
    """The request of ``merge_adapter``."""
    request = model_pb2.MergeAdapterRequest(
        request_id=new_request_id(request_id),
        model=model,
        adapters=to_sources({adapters: 1.0} if isinstance(adapters, str) else adapters, "adapters"),
        output=output,
        dtype=enum_value(model_pb2.MergeDtype, "MERGE_DTYPE_", dtype, "dtype"),
        force=force,
    )
    fill(request, {"load": load}, ("load",))
    return request


class MergeReader:
    """Makes progress of a MergeAdapter stream's responses. Attributes: report: set by the terminal event."""

    def __init__(self, request: model_pb2.MergeAdapterRequest) -> None:
        self.request_id = request.request_id
        self.report: MergeReport | None = None

    def feed(self, response: model_pb2.MergeAdapterResponse) -> list[MergeProgress]:
        """Takes the next response; returns the progress that it brings."""
        match response.WhichOneof("event"):
            case "progress":
                progress = response.progress
                return [
                    MergeProgress(
                        tensors_done=progress.tensors_done,
                        tensors_total=progress.tensors_total,
                        tensor=progress.tensor,
                    )
                ]
            case "report":
                self.report = _from_report(response.report)
                return []
            case _:  # of a newer server
                return []

    def end(self) -> None:
        """Raises InternalError if the stream ended too early."""
        if self.report is None:
            raise incomplete("MergeAdapter", self.request_id)


def _from_report(report: model_pb2.MergeReport) -> MergeReport:
    return MergeReport(
        request_id=report.request_id,
        output=report.output,
        path=report.path,
        adapters=[from_weighted(adapter) for adapter in report.adapters],
        num_merged=report.num_merged,
        num_kept=report.num_kept,
        bytes_out=report.bytes_out,
        dtype=report.dtype,
        relative_change=report.relative_change,
        seconds=known_seconds(report, "duration"),
        loaded=report.loaded,
    )
