"""Metrics that are read from the workers' latest reports at the time of a scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.info import AdapterInfo, ModelInfo, ModelStats
from server.workers.pool import WorkerSnapshot

MAX_ADAPTER_LABELS = 1000
"""Adapters that have series of their own, over all models."""

OTHER_ADAPTERS = "other"
"""The label of all others."""

Family = GaugeMetricFamily | CounterMetricFamily


@dataclass(slots=True)
class Snapshot:
    """What the metrics show beside the counters of the front end."""

    workers: list[WorkerSnapshot] = field(default_factory=list)
    models: list[ModelInfo] = field(default_factory=list)
    adapters: list[AdapterInfo] = field(default_factory=list)

    def model_stats(self) -> list[ModelStats]:
        """Statistics of every model of every worker."""
        return [model for worker in self.workers for model in worker.stats.models]


class _Describe(Protocol):
    def __call__(self, snapshot: Snapshot) -> Iterable[Family]: ...


class SnapshotCollector(Collector):
    """Takes a snapshot at each scrape and yields the families that have samples."""

    def __init__(self, snapshot: Callable[[], Snapshot], describe: _Describe) -> None:
        self._snapshot = snapshot
        self._describe = describe

    def collect(self) -> Iterator[Metric]:
        for family in self._describe(self._snapshot()):
            if family.samples:
                yield family

    def describe(self) -> Iterable[Metric]:
        return self._describe(Snapshot())


def whet_families(snapshot: Snapshot) -> Iterator[Family]:
    """Every metric that a snapshot gives; those without samples are dropped by the collector."""
    waiting = GaugeMetricFamily("whet_requests_waiting", "Requests in the queue.", labels=["model"])
    running = GaugeMetricFamily("whet_requests_running", "Requests being computed.", labels=["model"])
    usage = GaugeMetricFamily("whet_kv_cache_usage_ratio", "Attention cache blocks in use, 0 to 1.", labels=["model"])
    slots = GaugeMetricFamily("whet_state_slots_used", "Recurrent state slots in use.", labels=["model"])
    queries = CounterMetricFamily(
        "whet_prefix_cache_queries_tokens", "Prompt tokens looked up in the prefix cache.", labels=["model"]
    )
    hits = CounterMetricFamily("whet_prefix_cache_hits_tokens", "Of these, found.", labels=["model"])
    preemptions = CounterMetricFamily("whet_preemptions", "Requests that lost their blocks.", labels=["model"])
    drafts = CounterMetricFamily("whet_draft_tokens", "Draft tokens proposed.", labels=["model"])
    accepted = CounterMetricFamily("whet_accepted_tokens", "Draft tokens accepted.", labels=["model"])
    lora_running = GaugeMetricFamily("whet_lora_adapters_running", "Adapters in the batch.", labels=["model"])
    lora_waiting = GaugeMetricFamily("whet_lora_adapters_waiting", "Adapters of queued requests.", labels=["model"])
    for stats in snapshot.model_stats():
        label = [stats.model]
        for family, value in (
            (waiting, stats.requests_waiting),
            (running, stats.requests_running),
            (usage, stats.kv_cache_usage_ratio),
            (slots, stats.state_slots_used),
            (queries, stats.prefix_cache_queries_tokens),
            (hits, stats.prefix_cache_hits_tokens),
            (preemptions, stats.preemptions),
            (drafts, stats.draft_tokens),
            (accepted, stats.accepted_tokens),
            (lora_running, len(stats.adapters_running)),
            (lora_waiting, len(stats.adapters_waiting)),
        ):
            family.add_metric(label, value)
    yield from (
        waiting,
        running,
        usage,
        slots,
        queries,
        hits,
        preemptions,
        drafts,
        accepted,
        lora_running,
        lora_waiting,
    )

    cache = GaugeMetricFamily(
        "whet_cache_config_info", "Constant 1.", labels=["model", "block_size", "num_blocks", "num_slots"]
    )
    weights = GaugeMetricFamily("whet_model_weights_bytes", "Resident bytes of weights.", labels=["model"])
    for model in snapshot.models:
        weights.add_metric([model.name], model.weights_bytes)
        if model.num_blocks:
            cache.add_metric([model.name, str(model.block_size), str(model.num_blocks), str(model.num_slots)], 1)
    adapters = GaugeMetricFamily(
        "whet_adapter_info",
        f"1 while live; of a model, beyond {MAX_ADAPTER_LABELS} adapters, the number of those left.",
        labels=["model", "adapter", "version"],
    )
    live = [adapter for adapter in snapshot.adapters if adapter.live and adapter.loaded]
    for adapter in live[:MAX_ADAPTER_LABELS]:
        adapters.add_metric([adapter.model, adapter.name, str(adapter.version)], 1)
    for model_name, number in Counter(adapter.model for adapter in live[MAX_ADAPTER_LABELS:]).items():
        adapters.add_metric([model_name, OTHER_ADAPTERS, ""], number)
    yield from (cache, weights, adapters)

    up = GaugeMetricFamily(
        "whet_worker_up",
        "1 while its loop goes round or loads a model; 0 while it starts, hangs or is down.",
        labels=["worker"],
    )
    age = GaugeMetricFamily("whet_worker_heartbeat_age_seconds", "Since its loop last went round.", labels=["worker"])
    restarts = CounterMetricFamily("whet_worker_restarts", "Times it was started again.", labels=["worker"])
    share = GaugeMetricFamily(
        "whet_job_share_ratio", "Fraction of the loop's time that jobs took.", labels=["worker", "job_kind"]
    )
    gap = GaugeMetricFamily(
        "whet_job_gap_seconds", "What jobs may take between two steps of serving, as planned now.", labels=["worker"]
    )
    for worker in snapshot.workers:
        up.add_metric([worker.worker], float(worker.up))
        restarts.add_metric([worker.worker], worker.restarts)
        if worker.heartbeat_age_seconds is not None:
            age.add_metric([worker.worker], worker.heartbeat_age_seconds)
        for kind, ratio in worker.stats.job_share.items():
            share.add_metric([worker.worker, kind], ratio)
        if worker.stats.job_gap_seconds is not None:
            gap.add_metric([worker.worker], worker.stats.job_gap_seconds)
    yield from (up, age, restarts, share, gap)
