"""Metrics: the names that dashboards rely on, in an exposition that Prometheus reads."""

from __future__ import annotations

import dataclasses
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.info import AdapterInfo, EngineStats, ModelInfo, ModelStats
from server.metrics import Metrics
from server.snapshot import Snapshot
from server.workers.pool import WorkerSnapshot

NAMES = """
requests_waiting requests_running kv_cache_usage_ratio state_slots_used cache_config_info
prefix_cache_queries_tokens_total prefix_cache_hits_tokens_total prompt_tokens_total generation_tokens_total
requests_total admission_rejections_total preemptions_total draft_tokens_total accepted_tokens_total
time_to_first_token_seconds inter_token_latency_seconds request_queue_seconds request_prefill_seconds
request_decode_seconds request_duration_seconds request_prompt_tokens request_generation_tokens step_tokens
adapter_info lora_adapters_running lora_adapters_waiting train_loss train_evaluation_loss train_gradient_norm
train_learning_rate train_step train_tokens_per_second train_steps_total train_skipped_steps_total train_runs_total
train_checkpoint_seconds job_slice_seconds job_share_ratio quantize_bytes_in_total quantize_bytes_out_total
perplexity_tokens_total embed_texts_total rpc_total rpc_duration_seconds worker_up worker_heartbeat_age_seconds
worker_restarts_total model_weights_bytes build_info
"""

VLLM_NAMES = """
num_requests_waiting num_requests_running kv_cache_usage_perc cache_config_info lora_requests_info prompt_tokens_total
generation_tokens_total request_success_total num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total
time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds request_queue_time_seconds
"""


def model_info() -> ModelInfo:
    return ModelInfo(
        name="m", path="/m", model_type="llama", task="generate", dtype="float32", quantization="none",
        num_parameters=1, weights_bytes=4, vocab_size=8, hidden_size=2, num_layers=1, max_model_len=16, num_blocks=3,
        block_size=16, kv_cache_bytes=9, linear_modules=[], weights_digest="", tokenizer_path="",
        embedding_dimensions=2, device="cpu",
    )  # fmt: skip


def adapter_info() -> AdapterInfo:
    return AdapterInfo(
        model="m", name="tone", version=3, live=True, loaded=True, rank=8, alpha=16.0, use_rslora=False,
        target_modules=[], num_parameters=1, path="/a",
    )  # fmt: skip


def snapshot(heartbeat: float | None = 0.1) -> Snapshot:
    stats = EngineStats(
        models=[ModelStats(model="m", requests_waiting=2, preemptions=5, adapters_running=["tone"])],
        job_share={"train": 0.25},
    )
    worker = WorkerSnapshot(
        worker="0", device="cpu", state="up", up=True, heartbeat_age_seconds=heartbeat, restarts=1, busy="", pid=1,
        models=["m"], num_streams=0, num_jobs=0, stats=stats,
    )  # fmt: skip
    return Snapshot([worker], [model_info()], [adapter_info()])


def populated(*, compat_vllm: bool = False) -> Metrics:
    metrics = Metrics("1.0", compat_vllm=compat_vllm)
    metrics.attach(snapshot)
    for histogram in metrics.histograms.values():
        histogram.labels("m").observe(0.5)
    for counter in (metrics.prompt_tokens_total, metrics.generation_tokens_total):
        counter.labels("m", "tone").inc(3)
        counter.labels("m", "").inc(4)
    for reason in ("stop", "length", "cancelled"):
        metrics.requests_total.labels("m", "", reason).inc()
    metrics.admission_rejections_total.labels("queue_full").inc()
    metrics.rpc_total.labels("s", "M", "OK").inc()
    metrics.rpc_duration_seconds.labels("s", "M", "OK").observe(1)
    for gauge in metrics.train_gauges.values():
        gauge.labels("m", "tone").set(1)
    metrics.train_steps_total.labels("m", "tone").inc()
    metrics.train_skipped_steps_total.labels("m", "tone").inc()
    metrics.train_runs_total.labels("m", "finished").inc()
    metrics.train_checkpoint_seconds.labels("train").observe(1)
    metrics.job_slice_seconds.labels("train").observe(1)
    for counter in (metrics.quantize_bytes_in_total, metrics.quantize_bytes_out_total):
        counter.labels("m").inc()
    metrics.perplexity_tokens_total.labels("m").inc()
    metrics.embed_texts_total.labels("m").inc()
    return metrics


def samples(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_every_promised_name_is_exported() -> None:
    found = samples(populated())
    for name in NAMES.split():
        assert any(full in found for full in (f"whet_{name}", f"whet_{name}_count")), name
    assert not any(":" in name or name.endswith("_created") for name in found)


def test_every_metric_has_help_and_a_legal_name() -> None:
    text = populated().render().decode()
    documented = set(re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE))
    typed = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    assert documented == typed
    assert all(re.fullmatch(r"whet_[a-z0-9_]+", name) for name in typed)


def test_compatibility_names() -> None:
    found = samples(populated(compat_vllm=True))
    for name in VLLM_NAMES.split():
        assert any(full in found for full in (f"vllm:{name}", f"vllm:{name}_count")), name
    assert found["vllm:prompt_tokens_total"] == [({"model_name": "m"}, 7.0)]  # summed over adapters
    reasons = {labels["finished_reason"] for labels, _ in found["vllm:request_success_total"]}
    assert reasons == {"stop", "length"}
    [(labels, _)] = found["vllm:lora_requests_info"]
    assert labels == {"max_lora": "1", "running_lora_adapters": "tone", "waiting_lora_adapters": ""}


def test_without_compatibility_there_are_no_other_names() -> None:
    assert all(name.startswith("whet_") for name in samples(populated()))


def test_what_is_not_known_is_left_out() -> None:
    metrics = Metrics("1.0")
    metrics.attach(lambda: snapshot(heartbeat=None))
    found = samples(metrics)
    assert "whet_worker_heartbeat_age_seconds" not in found
    assert found["whet_worker_up"] == [({"worker": "0"}, 1.0)]
    empty = Metrics("1.0")
    empty.attach(Snapshot)
    assert set(samples(empty)) == {"whet_build_info"}


def test_observations_of_a_report_are_entered() -> None:
    metrics = Metrics("1.0")
    observed = ModelStats(model="m", observations={"step_tokens": [1.0, 2.0], "unheard_of": [1.0]})
    metrics.observe(EngineStats(models=[observed], job_slice_seconds={"train": [0.1]}))
    found = samples(metrics)
    assert found["whet_step_tokens_count"] == [({"model": "m"}, 2.0)]
    assert found["whet_job_slice_seconds_count"] == [({"job_kind": "train"}, 1.0)]
    assert "whet_unheard_of_count" not in found


def test_a_run_that_ended_is_no_longer_live() -> None:
    metrics = populated()
    metrics.forget_run("m", "tone")
    found = samples(metrics)
    assert "whet_train_loss" not in found
    assert found["whet_train_steps_total"] == [({"model": "m", "adapter": "tone"}, 1.0)]


def test_forgetting_a_run_that_brought_nothing_does_no_harm() -> None:
    Metrics("1.0").forget_run("m", "never")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("time_to_first_token_seconds", 0.001, 2560), ("inter_token_latency_seconds", 0.001, 80)],
)
def test_bucket_ranges(name: str, low: float, high: float) -> None:
    bounds = [float(labels["le"]) for labels, _ in samples(populated())[f"whet_{name}_bucket"]]
    assert bounds[0] == low
    assert bounds[-2] == high
    assert bounds == sorted(bounds)


def test_many_adapters_share_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones keep theirs, whatever comes later; the base has none and is always itself."""
    monkeypatch.setattr("server.metrics.MAX_ADAPTER_LABELS", 2)
    metrics = Metrics("1.0")
    for _ in range(2):
        labels = [metrics.adapter_label("m", name) for name in ("a", "", "b", "c", "d")]
        assert labels == ["a", "", "b", "other", "other"]
    assert metrics.adapter_label("n", "a") == "other", "another model's adapter is another adapter"
    assert metrics.adapter_label("m", "b") == "b"


def test_live_adapters_beyond_the_limit_are_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.snapshot.MAX_ADAPTER_LABELS", 2)
    infos = [
        dataclasses.replace(adapter_info(), model=model, name=name, live=live)
        for model, name, live in (("m", "a", True), ("m", "b", False), ("m", "c", True), ("m", "d", True),
                                  ("n", "e", True), ("n", "f", True))
    ]  # fmt: skip
    metrics = Metrics("1.0")
    metrics.attach(lambda: dataclasses.replace(snapshot(), adapters=infos))
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    shown = {tuple(sample.labels.values()): sample.value for sample in families["whet_adapter_info"].samples}
    assert shown == {("a", "m", "3"): 1.0, ("c", "m", "3"): 1.0, ("other", "m", ""): 1.0, ("other", "n", ""): 2.0}
