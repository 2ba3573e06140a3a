"""The metrics of the server under the names of vLLM, for dashboards, autoscalers and gateways that read those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.snapshot import Family, Snapshot


def vllm_families(snapshot: Snapshot) -> Iterator[Family]:
    """What is read at the time of a scrape."""
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "As whet_requests_waiting.", labels=["model_name"])
    running = GaugeMetricFamily("vllm:num_requests_running", "As whet_requests_running.", labels=["model_name"])
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "As whet_kv_cache_usage_ratio.", labels=["model_name"])
    preemptions = CounterMetricFamily("vllm:num_preemptions", "As whet_preemptions_total.", labels=["model_name"])
    queries = CounterMetricFamily(
        "vllm:prefix_cache_queries", "As whet_prefix_cache_queries_tokens_total.", labels=["model_name"]
    )
    hits = CounterMetricFamily(
        "vllm:prefix_cache_hits", "As whet_prefix_cache_hits_tokens_total.", labels=["model_name"]
    )
    lora = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters of running and waiting requests.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    running_adapters: set[str] = set()
    waiting_adapters: set[str] = set()
    for stats in snapshot.model_stats():
        label = [stats.model]
        waiting.add_metric(label, stats.requests_waiting)
        running.add_metric(label, stats.requests_running)
        usage.add_metric(label, stats.kv_cache_usage_ratio)
        preemptions.add_metric(label, stats.preemptions)
        queries.add_metric(label, stats.prefix_cache_queries_tokens)
        hits.add_metric(label, stats.prefix_cache_hits_tokens)
        running_adapters.update(stats.adapters_running)
        waiting_adapters.update(stats.adapters_waiting)
    loaded = len({(adapter.model, adapter.name) for adapter in snapshot.adapters if adapter.loaded})
    if loaded:
        lora.add_metric([str(loaded), ",".join(sorted(running_adapters)), ",".join(sorted(waiting_adapters))], 1)
    cache = GaugeMetricFamily(
        "vllm:cache_config_info", "Constant 1.", labels=["model_name", "block_size", "num_gpu_blocks"]
    )
    for model in snapshot.models:
        if model.num_blocks:
            cache.add_metric([model.name, str(model.block_size), str(model.num_blocks)], 1)
    yield from (waiting, running, usage, preemptions, queries, hits, lora, cache)


_HISTOGRAMS: Mapping[str, str] = {
    "time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "request_duration_seconds": "vllm:e2e_request_latency_seconds",
    "request_queue_seconds": "vllm:request_queue_time_seconds",
}


class VllmView(Collector):
    """Counters and histograms of the front end under their other names; counters are summed over adapters."""

    def __init__(
        self,
        prompt_tokens: Counter,
        generation_tokens: Counter,
        requests: Counter,
        histograms: Mapping[str, Histogram],
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._generation_tokens = generation_tokens
        self._requests = requests
        self._histograms = histograms

    def collect(self) -> Iterator[Metric]:
        by_model = {"model": "model_name"}
        yield _summed(self._prompt_tokens, "vllm:prompt_tokens", by_model)
        yield _summed(self._generation_tokens, "vllm:generation_tokens", by_model)
        yield _summed(
            self._requests,
            "vllm:request_success",
            {"model": "model_name", "finish_reason": "finished_reason"},
            finish_reasons=("stop", "length"),
        )
        for source, name in _HISTOGRAMS.items():
            for metric in self._histograms[source].collect():
                renamed = Metric(name, f"As whet_{source}.", "histogram")
                for sample in metric.samples:
                    labels = dict(sample.labels)
                    labels["model_name"] = labels.pop("model")
                    renamed.add_sample(sample.name.replace(f"whet_{source}", name), labels, sample.value)
                yield renamed

    def describe(self) -> Iterable[Metric]:
        return ()


def _summed(
    counter: Counter, name: str, labels: Mapping[str, str], finish_reasons: tuple[str, ...] | None = None
) -> Metric:
    """One sample per combination of ``labels`` (ours to theirs), summed over all other labels."""
    sums: dict[tuple[str, ...], float] = {}
    text = ""
    for metric in counter.collect():
        text = metric.documentation
        for sample in metric.samples:
            if not sample.name.endswith("_total"):
                continue
            if finish_reasons is not None and sample.labels["finish_reason"] not in finish_reasons:
                continue
            key = tuple(sample.labels[label] for label in labels)
            sums[key] = sums.get(key, 0.0) + sample.value
    family = CounterMetricFamily(name, text, labels=list(labels.values()))
    for key, value in sums.items():
        family.add_metric(list(key), value)
    return family
