"""Statistics of one worker that survive its restarts."""

from __future__ import annotations

from collections import defaultdict

from engine.info import EngineStats, ModelStats

COUNTERS = (
    "prefix_cache_queries_tokens",
    "prefix_cache_hits_tokens",
    "preemptions",
    "draft_tokens",
    "accepted_tokens",
)
"""The fields of ModelStats that only ever grow in one life of a worker."""


class StatsAccumulator:
    """Merges what the lives of a worker report: counters stay monotonic, observations are handed out once."""

    def __init__(self) -> None:
        self._latest = EngineStats()
        self._totals: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTERS, 0))
        self._seen: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTERS, 0))
        self._observations: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._job_slices: dict[str, list[float]] = defaultdict(list)

    def add(self, stats: EngineStats) -> None:
        """Takes one report of the worker."""
        self._latest = stats
        for model in stats.models:
            totals, seen = self._totals[model.model], self._seen[model.model]
            for name in COUNTERS:
                value: int = getattr(model, name)
                # A counter that fell began anew: the worker or the model was loaded again.
                totals[name] += value - seen[name] if value >= seen[name] else value
                seen[name] = value
            for name, values in model.observations.items():
                self._observations[model.model][name].extend(values)
        for kind, seconds in stats.job_slice_seconds.items():
            self._job_slices[kind].extend(seconds)

    def worker_lost(self) -> None:
        """The worker ended: its gauges fall to zero, its counters stay."""
        self._latest = EngineStats()
        self._seen.clear()

    def drain(self) -> EngineStats:
        """Gauges as last reported, counters in total, and the observations since the last call.

        A model that is gone stays, with its counters, so that a scrape never sees a counter fall.
        """
        latest = {model.model: model for model in self._latest.models}
        models = []
        for name in {**self._totals, **latest}:
            gauges = latest.get(name) or ModelStats(model=name)
            models.append(
                ModelStats(
                    model=name,
                    requests_waiting=gauges.requests_waiting,
                    requests_running=gauges.requests_running,
                    kv_cache_usage_ratio=gauges.kv_cache_usage_ratio,
                    state_slots_used=gauges.state_slots_used,
                    adapters_running=gauges.adapters_running,
                    adapters_waiting=gauges.adapters_waiting,
                    observations={key: list(values) for key, values in self._observations[name].items()},
                    **self._totals[name],
                )
            )
        slices = dict(self._job_slices)
        self._observations.clear()
        self._job_slices = defaultdict(list)
        return EngineStats(
            models=models,
            job_share=self._latest.job_share,
            job_slice_seconds=slices,
            job_gap_seconds=self._latest.job_gap_seconds,
            memory=self._latest.memory,
        )
