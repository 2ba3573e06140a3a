"""Prometheus metrics of the server, in a registry of their own.

What the front end sees is counted here as it happens. What a worker knows (queues, caches, jobs) is read from the
latest statistics that it sent, at the time of the scrape; a value that is not known is left out of the scrape.

A series that was once there stays until the process ends, and callers make as many adapters as they like: so the first
MAX_ADAPTER_LABELS that are counted have labels of their own, and all others share OTHER_ADAPTERS.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

from engine.info import EngineStats
from server.metrics_vllm import VllmView, vllm_families
from server.snapshot import MAX_ADAPTER_LABELS, OTHER_ADAPTERS, Snapshot, SnapshotCollector, whet_families

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80,
)  # fmt: skip
SECONDS_BUCKETS = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960, 1920,
)  # fmt: skip
SIZE_BUCKETS = tuple(2**power for power in range(21))

HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Arrival of a request to its first token.", TTFT_BUCKETS),
    "inter_token_latency_seconds": ("Time between two tokens of one completion.", TOKEN_BUCKETS),
    "request_queue_seconds": ("Arrival of a request to its first being scheduled.", SECONDS_BUCKETS),
    "request_prefill_seconds": ("First being scheduled to the first token.", SECONDS_BUCKETS),
    "request_decode_seconds": ("First to last token.", SECONDS_BUCKETS),
    "request_duration_seconds": ("Arrival of a request to its end.", SECONDS_BUCKETS),
    "request_prompt_tokens": ("Prompt tokens of a request.", SIZE_BUCKETS),
    "request_generation_tokens": ("Completion tokens of a request.", SIZE_BUCKETS),
    "step_tokens": ("Tokens that one engine step processed.", SIZE_BUCKETS),
}
"""Histograms by model: name without prefix, to help and upper bounds."""


class Metrics:
    """The metrics and their registry.

    Args:
        version: of the server, for whet_build_info.
        compat_vllm: also export what dashboards and scalers for vLLM read.
    """

    def __init__(self, version: str, *, compat_vllm: bool = False) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter, unread
        self.registry = CollectorRegistry()
        self._labelled: set[tuple[str, str]] = set()
        self.compat_vllm = compat_vllm
        self.histograms = {name: self._histogram(name, *spec, ["model"]) for name, spec in HISTOGRAMS.items()}
        self.prompt_tokens_total = self._counter("prompt_tokens", "Prompt tokens taken.", ["model", "adapter"])
        self.generation_tokens_total = self._counter("generation_tokens", "Tokens generated.", ["model", "adapter"])
        self.requests_total = self._counter(
            "requests", "Completions that ended.", ["model", "adapter", "finish_reason"]
        )
        self.admission_rejections_total = self._counter("admission_rejections", "Calls that were refused.", ["reason"])
        self.rpc_total = self._counter("rpc", "Calls that ended.", ["service", "method", "code"])
        self.rpc_duration_seconds = self._histogram(
            "rpc_duration_seconds", "Duration of calls.", SECONDS_BUCKETS, ["service", "method", "code"]
        )
        labels = ["model", "adapter"]
        self.train_gauges = {
            "train_loss": self._gauge("train_loss", "Loss of the last step of a live run, nats.", labels),
            "train_evaluation_loss": self._gauge("train_evaluation_loss", "Last held-out NLL of a live run.", labels),
            "train_gradient_norm": self._gauge("train_gradient_norm", "Gradient norm before clipping.", labels),
            "train_learning_rate": self._gauge("train_learning_rate", "Learning rate of the last step.", labels),
            "train_step": self._gauge("train_step", "Last step of a live run.", labels),
            "train_tokens_per_second": self._gauge("train_tokens_per_second", "Training throughput.", labels),
        }
        self.train_steps_total = self._counter("train_steps", "Optimizer steps done.", labels)
        self.train_skipped_steps_total = self._counter(
            "train_skipped_steps", "Steps skipped for a loss or gradient that was not finite.", labels
        )
        self.train_runs_total = self._counter("train_runs", "Runs that ended.", ["model", "outcome"])
        self.train_checkpoint_seconds = self._histogram(
            "train_checkpoint_seconds", "Time to write a checkpoint.", SECONDS_BUCKETS, ["job_kind"]
        )
        self.job_slice_seconds = self._histogram(
            "job_slice_seconds", "Duration of slices of jobs.", TOKEN_BUCKETS, ["job_kind"]
        )
        self.quantize_bytes_in_total = self._counter("quantize_bytes_in", "Bytes of weights read.", ["model"])
        self.quantize_bytes_out_total = self._counter("quantize_bytes_out", "Bytes of weights written.", ["model"])
        self.perplexity_tokens_total = self._counter("perplexity_tokens", "Tokens scored.", ["model"])
        self.embed_texts_total = self._counter("embed_texts", "Inputs embedded.", ["model"])
        build = self._gauge("build_info", "Constant 1.", ["version", "python"])
        build.labels(version, platform.python_version()).set(1)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"whet_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"whet_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], labels: list[str]) -> Histogram:
        return Histogram(f"whet_{name}", text, labels, buckets=tuple(buckets), registry=self.registry)

    def adapter_label(self, model: str, adapter: str) -> str:
        """What stands for an adapter in the counters that have a label for it: its name, or OTHER_ADAPTERS; "" for the
        base."""
        key = (model, adapter)
        if adapter and key not in self._labelled:
            if len(self._labelled) >= MAX_ADAPTER_LABELS:
                return OTHER_ADAPTERS
            self._labelled.add(key)
        return adapter

    def observe(self, stats: EngineStats) -> None:
        """Enters the observations that a worker made since its last report. Call it once per report."""
        for model in stats.models:
            for name, values in model.observations.items():
                histogram = self.histograms.get(name)
                if histogram is not None:
                    bound = histogram.labels(model.model)
                    for value in values:
                        bound.observe(value)
        for kind, durations in stats.job_slice_seconds.items():
            slices = self.job_slice_seconds.labels(kind)
            for seconds in durations:
                slices.observe(seconds)

    def forget_run(self, model: str, adapter: str) -> None:
        """Takes a run's gauges off the scrape: it is not live any more."""
        for gauge in self.train_gauges.values():
            gauge.remove_by_labels({"model": model, "adapter": adapter})

    def attach(self, snapshot: Callable[[], Snapshot]) -> None:
        """Adds the metrics that are read at the time of a scrape."""
        self.registry.register(SnapshotCollector(snapshot, whet_families))
        if self.compat_vllm:
            self.registry.register(SnapshotCollector(snapshot, vllm_families))
            self.registry.register(
                VllmView(self.prompt_tokens_total, self.generation_tokens_total, self.requests_total, self.histograms)
            )

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self.registry)
