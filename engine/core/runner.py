"""Runs generation on one model: validates requests, schedules, forwards, samples, reports."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence as Seq
from typing import Literal

import torch
from torch import Tensor

from engine.cache.full import FullAttentionManager
from engine.cache.hybrid import HybridManager
from engine.context import PagedCache, RecurrentStates, StateSave
from engine.core.batch import pack
from engine.core.captured_steps import captured_steps
from engine.core.cuda_graphs import CudaGraphs
from engine.core.failures import as_engine_error
from engine.core.launched import LaunchedBatch
from engine.core.loaded import LoadedModel
from engine.core.memory import CachePlan
from engine.core.repeated import repeated_steps
from engine.core.scheduled import ScheduledBatch, ScheduledSequence
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence, new_sequences
from engine.errors import EngineError, InternalError, InvalidArgumentError
from engine.info import ModelStats
from engine.models.base import CausalLM
from engine.ops import cpu
from engine.ops.transfer import to_device
from engine.request import MAX_N, Request, RequestOutput
from engine.sampling.logprobs import prompt_logprobs
from engine.sampling.on_cpu import CpuSampler
from engine.sampling.on_device import DeviceSampler, row_numbers

logger = logging.getLogger(__name__)

PROMPT_LOGPROB_ROWS = 128
"""Positions of a prompt whose logits exist at one time: 73 MiB at a vocabulary of 150k."""


class Runner:
    """Generation on one model.

    Args:
        loaded: the model and its adapters.
        model: its CausalLM.
        cache: its attention cache.
        plan: what the cache consists of.
        states: of its recurrent layers; None if it has none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: CausalLM,
        cache: PagedCache,
        plan: CachePlan,
        states: RecurrentStates | None = None,
    ) -> None:
        config = loaded.engine_config
        self._loaded = loaded
        self._model = model
        self._cache = cache
        self._states = states
        self._manager: FullAttentionManager | HybridManager
        if states is None:
            self._manager = FullAttentionManager(
                plan.num_blocks, cache.block_size, enable_prefix_caching=config.enable_prefix_caching
            )
        else:
            self._manager = HybridManager(
                plan.num_blocks,
                cache.block_size,
                plan.num_slots,
                plan.max_sequences,
                checkpoint_interval=config.state_checkpoint_interval,
                enable_prefix_caching=config.enable_prefix_caching,
            )
        self._scheduler = Scheduler(
            loaded.info.name,
            self._manager,
            max_batch_tokens=config.max_batch_tokens,
            max_running=plan.max_sequences,
            max_waiting=config.max_waiting_requests,
            max_model_len=loaded.info.max_model_len,
        )
        self._device_sampler = DeviceSampler()
        self._sampler = CpuSampler() if loaded.device.type == "cpu" else self._device_sampler
        self._graphs = captured_steps(loaded, model, cache, states, plan.max_sequences)
        self._repeats = repeated_steps(self._graphs, self._device_sampler, self._sample, has_states=states is not None)
        self._under_way: LaunchedBatch | None = None
        self._observations: dict[str, list[float]] = defaultdict(list)

    # ----------------------------------------------------------------------------------------------------- requests

    def add(self, request: Request) -> None:
        """Validates and queues a request.

        Raises:
            InvalidArgumentError, OutOfRangeError: naming the field, its value, and what is accepted.
            NotFoundError: no such adapter or version.
            OverloadedError: the queue is full.
        """
        vocab_size = self._loaded.config.vocab_size
        if not request.prompt_token_ids:
            raise InvalidArgumentError("the prompt has no tokens; accepted: at least one", field="prompt")
        low, high = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise InvalidArgumentError(
                f"the prompt holds token id {bad}; accepted: ids in [0, {vocab_size})", field="prompt"
            )
        if not 1 <= request.n <= MAX_N:
            raise InvalidArgumentError(f"n is {request.n}; accepted: an integer in [1, {MAX_N}]", field="n")
        request.sampling.validate(vocab_size)
        adapter = None
        if request.adapter is not None:
            adapter = self._loaded.adapters.get(request.adapter, request.adapter_version)
        elif request.adapter_version is not None:
            raise InvalidArgumentError(
                f"adapter_version is {request.adapter_version} without an adapter", field="adapter_version"
            )
        sequences = new_sequences(
            request,
            eos_token_ids=self._loaded.config.eos_token_ids,
            max_model_len=self._scheduler.max_model_len,
            adapter=adapter,
        )
        self._scheduler.add(sequences)

    def abort(self, request_id: str, index: int | None, reason: Literal["cancelled", "stop"]) -> list[RequestOutput]:
        """Ends a request, or one completion of it, and frees its blocks at once. See Engine.abort."""
        ended = self._scheduler.abort(request_id, index, reason)
        return [self._output(sequence, []) for sequence in ended] if reason == "stop" else []

    def has_requests(self) -> bool:
        """Whether step has work."""
        return self._scheduler.has_unfinished()

    def only_decodes(self) -> bool:
        """Whether the next step computes no prompt."""
        return self._scheduler.only_decodes()

    def is_live(self, request_id: str) -> bool:
        """Whether a completion of that request has not ended."""
        return self._scheduler.is_live(request_id)

    # --------------------------------------------------------------------------------------------------------- step

    def step(self, *, overlap: bool = True) -> list[RequestOutput]:
        """One batch: schedule, forward, sample. A failure ends the sequences of the batch with an error, no others.

        Args:
            overlap: the next step may be under way on return, where steps can be launched ahead of what they gave.
        """
        if self._under_way is not None and self._under_way.is_over:
            self._under_way = None
        if self._under_way is None:
            batch = self._scheduler.schedule()
            self._observations["step_tokens"].append(batch.num_tokens)
            try:
                if self._repeats is not None and self._repeats.takes(batch):
                    sampled = self._repeats.run()
                else:
                    sampled = self._begin(batch)
            except Exception as error:  # noqa: BLE001 - reported to each caller; the engine goes on
                return self._fail(batch, error)
            if self._under_way is None:
                return [self._report(entry, sampled.get(id(entry.sequence))) for entry in batch.entries]
        return self._read(self._under_way, overlap and self._loaded.engine_config.enable_overlap)

    @torch.inference_mode()
    def _begin(self, batch: ScheduledBatch) -> dict[int, int | EngineError]:
        """Launches the step, or runs it at once. Returns what ``_execute`` does, nothing where it was launched."""
        with cpu.int8_activations(self._loaded.engine_config.rounds_activations):
            self._under_way = self._launch(batch)
            return {} if self._under_way is not None else self._execute(batch)

    @torch.inference_mode()
    def _read(self, launched: LaunchedBatch, overlap: bool) -> list[RequestOutput]:
        """Reports the step under way, after the one that follows it has been launched, if it can be."""
        self._under_way = None
        following = self._scheduler.follow(launched.batch) if overlap else None
        failure: Exception | None = None
        if following is not None:
            try:
                with cpu.int8_activations(self._loaded.engine_config.rounds_activations):
                    self._under_way = self._launch(following, launched)
            except Exception as error:  # noqa: BLE001 - reported to each caller; the engine goes on
                failure = error
            else:
                if self._under_way is not None:
                    self._observations["step_tokens"].append(following.num_tokens)
        try:
            sampled, left = launched.results(self._device_sampler)
        except Exception as error:  # noqa: BLE001 - reported to each caller; the engine goes on
            self._under_way = None
            return self._fail(launched.batch, error)
        live = [entry for entry in launched.batch.entries if not entry.sequence.is_finished]
        outputs = [self._report(entry, sampled[id(entry.sequence)]) for entry in live]
        if following is not None and failure is not None:
            outputs += self._fail(following, failure)
        if self._under_way is not None:
            self._under_way.drop(left)
        return outputs

    def _launch(self, batch: ScheduledBatch, after: LaunchedBatch | None = None) -> LaunchedBatch | None:
        """Starts a step in which each sequence decodes; None if it cannot be left to the device.

        Args:
            after: the step under way, whose tokens are this one's; None: the tokens are known.
        """
        if not isinstance(self._graphs, CudaGraphs):
            return None
        if after is None:
            batch.sort_by_adapter()
        sequences = [entry.sequence for entry in batch.entries]
        if not self._device_sampler.takes(sequences) or not (after or batch.decodes):
            return None
        slots, saves = self._prepare_states(sequences)
        step = self._graphs.launch(
            [s.token_ids[-1] for s in sequences],
            [s.num_computed_tokens for s in sequences],
            [s.block_table for s in sequences],
            slots,
            [s.adapter for s in sequences],
            row_numbers(sequences, ahead=0 if after is None else 1),
            () if after is None else [after.rows[id(s)] for s in sequences],
        )
        if step is None:
            return None
        self._keep_states(slots, saves)
        return LaunchedBatch(batch, step)

    def _execute(self, batch: ScheduledBatch) -> dict[int, int | EngineError]:
        """Runs the model. Returns, by id of the sequence, the token that follows it, or why there is none."""
        batch.sort_by_adapter()
        entries = batch.entries
        sequences = [entry.sequence for entry in entries]
        slots, saves = self._prepare_states(sequences)
        logits = self._replay(sequences, slots) if batch.decodes else None
        if self._repeats is not None:
            self._repeats.ran(None if logits is None else batch)
        if logits is not None:
            self._keep_states(slots, saves)
            return self._sample(logits, sequences)
        token_ids, ctx = pack(
            [
                s.token_ids[s.num_computed_tokens : s.num_computed_tokens + entry.num_tokens]
                for entry, s in zip(entries, sequences, strict=True)
            ],
            [s.num_computed_tokens for s in sequences],
            [s.block_table for s in sequences],
            [s.adapter for s in sequences],
            self._cache,
            self._loaded.device,
            states=self._states,
            state_slots=slots,
            state_saves=saves,
        )
        hidden = self._model(token_ids, ctx)
        for row, entry in enumerate(entries):
            if entry.sequence.collects_prompt_logprobs:
                self._score_prompt(entry, hidden[ctx.seq_starts[row] : ctx.seq_starts[row + 1]])
        ending = [row for row, entry in enumerate(entries) if entry.reaches_end]
        if not ending:
            return {}
        last = to_device([ctx.seq_starts[row + 1] - 1 for row in ending], hidden.device)
        logits = self._model.compute_logits(hidden[last])
        return self._sample(logits, [sequences[row] for row in ending])

    def _replay(self, sequences: Seq[Sequence], slots: Seq[int]) -> Tensor | None:
        """Logits of a step in which each sequence decodes, from a captured step; None if there is no such."""
        if self._graphs is None:
            return None
        return self._graphs.logits(
            [s.token_ids[-1] for s in sequences],
            [s.num_computed_tokens for s in sequences],
            [s.block_table for s in sequences],
            slots,
            [s.adapter for s in sequences],
        )

    def _sample(self, logits: Tensor, ended: Seq[Sequence]) -> dict[int, int | EngineError]:
        """The next token of each, or why there is none, by id of the sequence."""
        sampled = self._sampler.sample(logits, ended)
        for sequence, logprob in zip(ended, sampled.logprobs, strict=True):
            if logprob is not None:
                sequence.logprobs.append(logprob)
        return {id(s): sampled.errors.get(i, sampled.token_ids[i]) for i, s in enumerate(ended)}

    def _prepare_states(self, sequences: Seq[Sequence]) -> tuple[list[int], list[StateSave]]:
        """Brings recurrent states to where their sequences go on. Returns a slot per sequence, and states to keep."""
        if self._states is None:
            return [], []
        assert isinstance(self._manager, HybridManager)
        for source, target in self._manager.slots.take_copies():
            self._states.copy(source, target)
        saves = [
            StateSave(row, position - sequence.num_computed_tokens, slot)
            for row, sequence in enumerate(sequences)
            for position, slot in self._manager.planned_states(sequence)
        ]
        return [self._manager.state_slot(sequence) for sequence in sequences], saves

    def _keep_states(self, slots: Seq[int], saves: Seq[StateSave]) -> None:
        """After a step of one token a sequence, where the states to keep are those that it leaves."""
        if self._states is not None and saves:
            assert all(save.num_tokens == 1 for save in saves)
            sources, targets = [slots[save.row] for save in saves], [save.slot for save in saves]
            device = self._loaded.device
            self._states.copy_each(to_device(sources, device), to_device(targets, device))

    def _score_prompt(self, entry: ScheduledSequence, hidden: Tensor) -> None:
        """Adds the logprobs of the prompt tokens that this chunk's positions predict. hidden: [n, D] of the chunk."""
        sequence = entry.sequence
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        first = len(sequence.prompt_logprobs)
        # A preempted sequence computes positions again that it has reported.
        skip = first - 1 - sequence.num_computed_tokens
        end = min(sequence.num_computed_tokens + entry.num_tokens + 1, sequence.num_prompt_tokens)
        if skip < 0 or end <= first:
            return
        targets = sequence.token_ids[first:end]
        num_top = sequence.sampling.prompt_logprobs or 0
        for start in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            part = targets[start : start + PROMPT_LOGPROB_ROWS]
            logits = self._model.compute_logits(hidden[skip + start : skip + start + len(part)])
            sequence.prompt_logprobs.extend(prompt_logprobs(logits, part, num_top))

    def _report(self, entry: ScheduledSequence, result: int | EngineError | None) -> RequestOutput:
        """Takes the step into the sequence's state and says what came of it."""
        sequence = entry.sequence
        if isinstance(result, EngineError):
            self._scheduler.finish(sequence, "error", result)
            return self._output(sequence, [])
        before = sequence.last_token_time
        computed = 0 if entry.is_committed else entry.num_tokens
        accepted = self._scheduler.update(sequence, computed, [] if result is None else [result])
        if accepted and before is not None and sequence.last_token_time is not None:
            self._observations["inter_token_latency_seconds"].append(sequence.last_token_time - before)
        return self._output(sequence, accepted)

    def _output(self, sequence: Sequence, token_ids: list[int]) -> RequestOutput:
        sampling = sequence.sampling
        is_first = bool(token_ids) and sequence.num_output_tokens == len(token_ids)
        output = RequestOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_ids=token_ids,
            finish_reason=sequence.finish_reason,
            stop_token_id=sequence.stop_token_id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            num_completion_tokens=sequence.num_output_tokens,
            adapter_version=sequence.adapter_version,
        )
        if sampling.logprobs is not None:
            output.logprobs, sequence.logprobs = sequence.logprobs, []
        if is_first and sequence.index == 0 and sampling.prompt_logprobs is not None:
            output.prompt_logprobs = sequence.prompt_logprobs
        if sequence.is_finished:
            output.timings = sequence.timings()
            self._observe(sequence)
            if sequence.error is not None:
                output.error_code = sequence.error.code
                output.error_message = sequence.error.message
                output.error_reason = sequence.error.reason
        return output

    def _fail(self, batch: ScheduledBatch, error: Exception) -> list[RequestOutput]:
        reported = as_engine_error(error, "the step")
        if isinstance(reported, InternalError):
            logger.error("a step of model %s failed", self._loaded.info.name, exc_info=error)
        outputs = []
        for entry in batch.entries:
            if not entry.sequence.is_finished:
                self._scheduler.finish(entry.sequence, "error", reported)
                outputs.append(self._output(entry.sequence, []))
        return outputs

    # -------------------------------------------------------------------------------------------------------- stats

    def _observe(self, sequence: Sequence) -> None:
        timings = sequence.timings()
        observe = self._observations
        observe["request_queue_seconds"].append(timings.queue_seconds)
        observe["request_duration_seconds"].append(timings.total_seconds)
        if timings.time_to_first_token_seconds is not None:
            observe["time_to_first_token_seconds"].append(timings.time_to_first_token_seconds)
            observe["request_prefill_seconds"].append(timings.prefill_seconds)
            observe["request_decode_seconds"].append(timings.decode_seconds)
        observe["request_prompt_tokens"].append(sequence.num_prompt_tokens)
        observe["request_generation_tokens"].append(sequence.num_output_tokens)

    def drain_stats(self) -> ModelStats:
        """Gauges and counters now, and observations since the last call."""
        observations, self._observations = dict(self._observations), defaultdict(list)
        scheduler = self._scheduler
        return ModelStats(
            model=self._loaded.info.name,
            requests_waiting=scheduler.num_waiting,
            requests_running=scheduler.num_running,
            kv_cache_usage_ratio=self._manager.usage,
            state_slots_used=self._manager.slots.num_holding if isinstance(self._manager, HybridManager) else 0,
            prefix_cache_queries_tokens=scheduler.stats.prefix_queries_tokens,
            prefix_cache_hits_tokens=scheduler.stats.prefix_hits_tokens,
            preemptions=scheduler.stats.preemptions,
            adapters_running=scheduler.adapters_running(),
            adapters_waiting=scheduler.adapters_waiting(),
            observations=observations,
        )

    def adapters_held(self) -> set[tuple[str, int]]:
        """Names and versions of the adapters of all live requests."""
        return self._scheduler.adapters_held()
