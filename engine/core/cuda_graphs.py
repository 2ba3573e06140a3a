"""Decode steps as CUDA graphs: the forward of a batch, its logits and the choice of its tokens are one launch.

A graph has a fixed number of rows, so there is one for each of a few sizes, captured when a batch first needs it. A
batch runs in the smallest that holds it; the rows that are left over decode a token of nobody: they write into the null
block and the null slot, which are never a sequence's, and their logits are dropped.

Adapters are found through a table of slots (engine.lora.slots), so that a graph is for those that touch the same
modules, whichever they are.

All graphs read the same tensors, in which each step puts its numbers: a copy from pinned memory for those of the rows,
and one for each block table that has grown. The forward is recorded with nothing on the host but the number of rows: an
operation that would need a length there fails in the capture, and steps of that size then run as they would without.

A step finds its tokens where the host or the step before it put them, so it can be launched before that one's tokens
have been read (engine.core.scheduler.Scheduler.follow). A row for which that step chose none is a row of nobody.
Requests whose tokens cannot be chosen on the device (engine.sampling.on_device) have steps that end with the logits.

Shapes: S sequences, R rows of a graph, V vocabulary, W blocks of the longest sequence.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Literal

import torch
from torch import Tensor

from engine.cache.block_pool import NULL_BLOCK
from engine.context import DecodeInputs, ForwardContext, PagedCache, RecurrentStates
from engine.lora.adapter import Adapter
from engine.lora.slots import AdapterSlots, Reach, SlotLoRA
from engine.models.base import CausalLM
from engine.sampling.on_device import choose

logger = logging.getLogger(__name__)

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Records what a step does and returns its replay. It may run the step as well, which then must do no harm."""

MAX_ROWS = 256
MAX_REACHES = 8
"""Kinds of adapters (engine.lora.slots.Reach) that steps are captured for, none included. Others run one by one."""

NULL_SLOT = 0

Kind = Literal["logits", "greedy", "drawn", "filtered"]
"""What a step ends with: logits, or tokens that are the likeliest, drawn, or drawn after top_k and top_p."""

Key = tuple[int, Reach | None, Kind]


def sizes(max_sequences: int) -> list[int]:
    """Numbers of rows that are captured: 1, 2, 4 and multiples of 8, up to what holds all sequences."""
    every = [1, 2, 4, *range(8, MAX_ROWS + 1, 8)]
    return every[: bisect_left(every, max_sequences) + 1]


class CudaGraphs:
    """Captured decode steps of one model (engine.core.captured_steps.CapturedSteps).

    Args:
        max_model_len: tokens of the longest sequence, for the width of block tables.
        max_sequences: that decode together.
        capture: None: as a CUDA graph.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: PagedCache,
        states: RecurrentStates | None,
        max_model_len: int,
        max_sequences: int,
        capture: Capture | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._cache = cache
        self._states = states
        self._sizes = sizes(max_sequences)
        max_blocks = -(-max_model_len // cache.block_size)
        if cache.keys:
            max_blocks = min(max_blocks, cache.keys[0].shape[0])
        self._inputs = StepInputs(self._sizes[-1], max_blocks, cache.block_size, device)
        self._slots = AdapterSlots(list(model.linears()), device, model.compute_dtype)
        self._capture = capture or CudaCapture(device)
        self._replays: dict[Key, Step | None] = {}
        self._logits: Tensor | None = None
        # Of the last step that chose tokens and of the one before: what the logits of a row can be had from again.
        hidden_size = model.config.hidden_size
        self._hidden = torch.zeros(2, self._sizes[-1], hidden_size, dtype=model.compute_dtype, device=device)
        self._chosen = [_Readback(self._sizes[-1], device) for _ in range(2)]
        self._num_launched = 0

    def logits(
        self,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapters: Seq[Adapter | None],
    ) -> Tensor | None:
        """See CapturedSteps."""
        size = self._replayed("logits", tokens, computed, block_tables, state_slots, adapters)
        if size is None:
            return None
        assert self._logits is not None
        return self._logits[: len(tokens)]

    def launch(
        self,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapters: Seq[Adapter | None],
        draws: tuple[Seq[float], bool],
        sources: Seq[int] = (),
    ) -> LaunchedStep | None:
        """Starts a step that chooses the next tokens, of S sequences; does not wait for it.

        Args:
            tokens, computed, block_tables, state_slots, adapters: see CapturedSteps.
            draws: from engine.sampling.on_device.row_numbers.
            sources: per sequence, its row in the step that was launched last, whose choice is the token in place of
                that in ``tokens``; none: no sequence takes that. With sources nothing is captured, as that would run
                between the two.

        Returns: None if there is no such step.
        """
        numbers, filters = draws
        kind: Kind = "filtered" if filters else "drawn" if numbers else "greedy"
        if self._replayed(kind, tokens, computed, block_tables, state_slots, adapters, numbers, sources) is None:
            return None
        self._num_launched += 1
        chosen = self._chosen[self._num_launched % 2]
        chosen.copy(self._inputs.sampled[: len(tokens)])
        return LaunchedStep(self, self._num_launched, chosen)

    def _replayed(
        self,
        kind: Kind,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapters: Seq[Adapter | None],
        draws: Seq[float] = (),
        sources: Seq[int] = (),
    ) -> int | None:
        """Launches a step and returns its rows; None if there is no such step."""
        count = len(tokens)
        if count > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, count)]
        assigned = self._slots.assign(adapters)
        if assigned is None:
            return None
        rows, reach = assigned
        key: Key = (size, reach if reach.modules else None, kind)
        if key not in self._replays:
            reaches = {captured for _, captured, _ in self._replays} | {key[1], None}
            if sources or len(reaches) > MAX_REACHES:
                return None
            self._replays[key] = self._captured(*key)
        replay = self._replays[key]
        if replay is None:
            return None
        self._inputs.write(size, tokens, computed, block_tables, state_slots, rows, draws, sources)
        replay()
        return size

    def _captured(self, size: int, reach: Reach | None, kind: Kind) -> Step | None:
        """The replay of a step of so many rows; None, and a word in the log, if it cannot be captured."""
        self._inputs.write(size, (), (), (), (), ())  # a capture runs the step, which must be nobody's
        try:
            if kind == "logits" and self._logits is None:
                # One for all sizes, and not of a graph's own memory, of which each size would hold its part.
                self._logits = self._inputs.new(self._sizes[-1], self._model.head.out_features)
            return self._capture(lambda: self._step(size, reach, kind))
        except Exception as error:  # noqa: BLE001 - whatever an operation raises that cannot be captured
            logger.warning("decode steps of %d rows (%s) are not captured and run one by one: %r", size, kind, error)
            return None

    def _step(self, size: int, reach: Reach | None, kind: Kind) -> None:
        inputs = self._inputs
        token_ids, slot_mapping, state_slots = inputs.given(size) if kind == "logits" else inputs.fed(size)
        ctx = ForwardContext(
            positions=inputs.positions[:size],
            cu_seqlens=inputs.rows32[: size + 1],
            seq_starts=range(size + 1),
            kv_lens=(),
            cache=self._cache,
            block_tables=inputs.tables[:size],
            slot_mapping=slot_mapping,
            decode=DecodeInputs(
                inputs.rows[:size], inputs.kv_lens[:size], None if self._states is None else state_slots
            ),
            states=self._states,
            lora=None if reach is None else SlotLoRA(self._slots, inputs.adapter_slots[:size], reach),
            scratch={},
        )
        hidden = self._model(token_ids, ctx)
        logits = self._model.compute_logits(hidden)
        if kind == "logits":
            assert self._logits is not None
            self._logits[:size].copy_(logits)
            return
        self._hidden[1].copy_(self._hidden[0])
        self._hidden[0, :size].copy_(hidden)
        draws = None if kind == "greedy" else inputs.draws[:size]
        inputs.sampled[:size].copy_(choose(logits, draws, kind == "filtered"))

    def _logits_again(self, number: int, rows: Seq[int]) -> Tensor:
        """Of some rows of that launched step, which is the last or the one before it: [n, V] float32."""
        age = self._num_launched - number
        assert age < 2, "hidden states are kept of two steps"
        return self._model.compute_logits(self._hidden[age, list(rows)])


class LaunchedStep:
    """A step under way. It can be asked until the second step after it is launched."""

    def __init__(self, graphs: CudaGraphs, number: int, chosen: _Readback) -> None:
        self._graphs = graphs
        self._number = number
        self._chosen = chosen

    def token_ids(self) -> list[int]:
        """Waits for the step: the token of each sequence, -1 where the host has to choose (on_device.choose)."""
        return self._chosen.read()

    def logits(self, rows: Seq[int]) -> Tensor:
        """Of some sequences, [n, V] float32, multiplied again from what the model gave; waits for all steps."""
        return self._graphs._logits_again(self._number, rows)


class _Readback:
    """Tokens on their way to the host."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = torch.zeros(num_rows, dtype=torch.int64, pin_memory=pinned)
        self._done = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._count = 0

    def copy(self, tokens: Tensor) -> None:
        self._count = len(tokens)
        self._host[: self._count].copy_(tokens, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def read(self) -> list[int]:
        if self._done is not None:
            self._done.synchronize()
        found: list[int] = self._host[: self._count].tolist()
        return found


class StepInputs:
    """What steps read, on the device, and its like on the host, from where it is copied.

    Attributes:
        token_ids, positions, slot_mapping, kv_lens, state_slots: [R] int64; see ForwardContext and DecodeInputs.
        adapter_slots: [R] int64, see engine.lora.slots; -1: none.
        sampled: [R] int64, the tokens that the last step chose, which no ``write`` changes; below 0: none.
        sources: [R] int64, where in ``sampled`` and ``token_ids``, one behind the other, a row's token is.
        draws: [R, 5] float64, see engine.sampling.on_device.choose.
        tables: [R, W] int32, block tables. What stands behind a sequence's blocks means nothing.
        rows, rows32: 0, 1, 2 …: [R] int64, [R + 1] int32.
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._device = device
        self._block_size = block_size
        self._num_rows = num_rows
        # All numbers of rows in one tensor, so that they are one copy: eight of int64, and five of float64 a row.
        self._numbers_host = torch.zeros(13 * num_rows, dtype=torch.int64, pin_memory=pinned)
        self._tables_host = torch.zeros(num_rows, max_blocks, dtype=torch.int32, pin_memory=pinned)
        self._numbers = self._numbers_host.to(device)
        self.tables = self._tables_host.to(device, copy=True)
        if device.type == "cpu":
            self._numbers = self._numbers_host
        by_row = self._numbers[: 8 * num_rows].view(8, num_rows)
        self.sampled, self.token_ids, self.slot_mapping, self.state_slots, *others = by_row.unbind()
        self.sources, self.positions, self.kv_lens, self.adapter_slots = others
        self.draws = self._numbers[8 * num_rows :].view(torch.float64).view(num_rows, 5)
        self._choices = self._numbers[: 2 * num_rows]
        self._places = by_row[2:4]
        self.rows = torch.arange(num_rows, device=device)
        self.rows32 = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        # numpy writes a list into memory in a fraction of what an operation of torch costs.
        self._arrays = list(self._numbers_host[num_rows : 8 * num_rows].view(7, num_rows).numpy())
        self._draws_array = self._numbers_host[8 * num_rows :].view(torch.float64).numpy()
        self._table_array = self._tables_host.numpy()
        self._written: list[list[int]] = [[] for _ in range(num_rows)]  # per row, the table that the device has
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def new(self, *shape: int) -> Tensor:
        """Room for results: float32, on the device."""
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def given(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, slots of the cache and slots of states as the host wrote them, [size] each."""
        return self.token_ids[:size], self.slot_mapping[:size], self.state_slots[:size]

    def fed(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same with tokens from where ``sources`` says; a row that has none there is a row of nobody."""
        token_ids = self._choices[self.sources[:size]]
        # The null block begins at 0, which is the null slot as well.
        places = self._places[:, :size].masked_fill(token_ids < 0, NULL_BLOCK * self._block_size + NULL_SLOT)
        return token_ids.clamp_min_(0), places[0], places[1]

    def write(
        self,
        size: int,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapter_slots: Seq[int],
        draws: Seq[float] = (),
        sources: Seq[int] = (),
    ) -> None:
        """Puts a step of ``size`` rows in; rows beyond the sequences are nobody's. See CapturedSteps.logits and
        CudaGraphs.launch."""
        if self._copied is not None:
            self._copied.synchronize()  # long done, as the tokens of the step before the last have been read
        count, block_size = len(tokens), self._block_size
        ids, slots, states, fed, positions, kv_lens, adapters = self._arrays
        ids[:count] = tokens
        positions[:count] = computed
        states[: len(state_slots)] = state_slots
        adapters[:count] = adapter_slots
        fed[:size] = range(self._num_rows, self._num_rows + size)
        fed[: len(sources)] = sources
        for row, (position, table) in enumerate(zip(computed, block_tables, strict=True)):
            slots[row] = table[position // block_size] * block_size + position % block_size
            kv_lens[row] = position + 1
            self._write_table(row, table)
        ids[count:size] = positions[count:size] = 0
        slots[count:size] = NULL_BLOCK * block_size
        kv_lens[count:size] = 1
        states[count:size] = NULL_SLOT
        adapters[count:size] = -1
        self._draws_array[: len(draws)] = draws
        self._draws_array[len(draws) : 5 * size] = 0.0  # greedy
        for row in range(count, size):
            self._write_table(row, (NULL_BLOCK,))
        if self._numbers is not self._numbers_host:
            self._numbers[self._num_rows :].copy_(self._numbers_host[self._num_rows :], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _write_table(self, row: int, table: Seq[int]) -> None:
        """Copies what the device does not have yet: as a rule nothing, or the block that was added."""
        written = self._written[row]
        kept = len(written)
        if kept > len(table) or written != list(table[:kept]):
            kept = 0
        if kept == len(table):
            return
        self._table_array[row, kept : len(table)] = table[kept:]
        self.tables[row, kept : len(table)].copy_(self._tables_host[row, kept : len(table)], non_blocking=True)
        self._written[row] = list(table)


class CudaCapture:
    """Captures steps as CUDA graphs, which share one pool of memory: one runs at a time, and none reads what another
    left there."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Runs the step once, so that kernels are compiled and libraries have their workspaces, and records it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile; that is no part of this step.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph.replay
