"""Decode steps as CUDA graphs: the whole forward of a batch is one launch.

A graph has a fixed number of rows, so there is one for each of a few sizes, captured when a batch first needs it. A
batch runs in the smallest that holds it; the rows that are left over decode a token of nobody: they write into the null
block and the null slot, which are never a sequence's, and their logits are dropped.

Adapters are found through a table of slots (engine.lora.slots), so that a graph is for those that touch the same
modules, whichever they are.

All graphs read the same tensors, in which each step puts its numbers: a copy from pinned memory for those of the rows,
and one for each block table that has grown. The forward is recorded with nothing on the host but the number of rows: an
operation that would need a length there fails in the capture, and steps of that size then run as they would without.

Shapes: S sequences, R rows of a graph, V vocabulary, W blocks of the longest sequence.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.cache.block_pool import NULL_BLOCK
from engine.context import DecodeInputs, ForwardContext, PagedCache, RecurrentStates
from engine.lora.adapter import Adapter
from engine.lora.slots import AdapterSlots, Reach, SlotLoRA
from engine.models.base import CausalLM

logger = logging.getLogger(__name__)

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Records what a step does and returns its replay. It may run the step as well, which then must do no harm."""

MAX_ROWS = 256
MAX_REACHES = 8
"""Kinds of adapters (engine.lora.slots.Reach) that steps are captured for, none included. Others run one by one."""

NULL_SLOT = 0


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
        self._replays: dict[tuple[int, Reach | None], Step | None] = {}
        self._logits: Tensor | None = None

    def logits(
        self,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapters: Seq[Adapter | None],
    ) -> Tensor | None:
        """See CapturedSteps."""
        count = len(tokens)
        if count > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, count)]
        assigned = self._slots.assign(adapters)
        if assigned is None:
            return None
        rows, reach = assigned
        key = (size, reach if reach.modules else None)
        if key not in self._replays:
            if len({captured for _, captured in self._replays} | {key[1], None}) > MAX_REACHES:
                return None
            self._replays[key] = self._captured(*key)
        replay = self._replays[key]
        if replay is None:
            return None
        self._inputs.write(size, tokens, computed, block_tables, state_slots, rows)
        replay()
        assert self._logits is not None
        return self._logits[:count]

    def _captured(self, size: int, reach: Reach | None) -> Step | None:
        """The replay of a step of so many rows; None, and a word in the log, if it cannot be captured."""
        self._inputs.write(size, (), (), (), (), ())  # a capture runs the step, which must be nobody's
        try:
            if self._logits is None:
                # One for all sizes, and not of a graph's own memory, of which each size would hold its part.
                self._logits = self._inputs.new(self._sizes[-1], self._model.head.out_features)
            return self._capture(lambda: self._step(size, reach))
        except Exception as error:  # noqa: BLE001 - whatever an operation raises that cannot be captured
            logger.warning("decode steps of %d rows are not captured and run one by one: %r", size, error)
            return None

    def _step(self, size: int, reach: Reach | None) -> None:
        inputs = self._inputs
        ctx = ForwardContext(
            positions=inputs.positions[:size],
            cu_seqlens=inputs.rows32[: size + 1],
            seq_starts=range(size + 1),
            kv_lens=(),
            cache=self._cache,
            block_tables=inputs.tables[:size],
            slot_mapping=inputs.slot_mapping[:size],
            decode=DecodeInputs(
                inputs.rows[:size],
                inputs.kv_lens[:size],
                None if self._states is None else inputs.state_slots[:size],
            ),
            states=self._states,
            lora=None if reach is None else SlotLoRA(self._slots, inputs.adapter_slots[:size], reach),
            scratch={},
        )
        assert self._logits is not None
        hidden = self._model(inputs.token_ids[:size], ctx)
        self._logits[:size].copy_(self._model.compute_logits(hidden))


class StepInputs:
    """What steps read, on the device, and its like on the host, from where it is copied.

    Attributes:
        token_ids, positions, slot_mapping, kv_lens, state_slots: [R] int64; see ForwardContext and DecodeInputs.
        adapter_slots: [R] int64, see engine.lora.slots; -1: none.
        tables: [R, W] int32, block tables. What stands behind a sequence's blocks means nothing.
        rows, rows32: 0, 1, 2 …: [R] int64, [R + 1] int32.
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._device = device
        self._block_size = block_size
        self._numbers_host = torch.zeros(6, num_rows, dtype=torch.int64, pin_memory=pinned)
        self._tables_host = torch.zeros(num_rows, max_blocks, dtype=torch.int32, pin_memory=pinned)
        self._numbers = self._numbers_host.to(device)
        self.tables = self._tables_host.to(device, copy=True)
        if device.type == "cpu":
            self._numbers = self._numbers_host
        self.token_ids, self.positions, self.slot_mapping, self.kv_lens, *slots = self._numbers.unbind()
        self.state_slots, self.adapter_slots = slots
        self.rows = torch.arange(num_rows, device=device)
        self.rows32 = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        # numpy writes a list into memory in a fraction of what an operation of torch costs.
        self._arrays = list(self._numbers_host.numpy())
        self._table_array = self._tables_host.numpy()
        self._written: list[list[int]] = [[] for _ in range(num_rows)]  # per row, the table that the device has
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def new(self, *shape: int) -> Tensor:
        """Room for results: float32, on the device."""
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def write(
        self,
        size: int,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapter_slots: Seq[int],
    ) -> None:
        """Puts a step of ``size`` rows in; rows beyond the sequences are nobody's. See CapturedSteps.logits."""
        if self._copied is not None:
            self._copied.synchronize()  # long done, as the tokens of the step before have been read
        count, block_size = len(tokens), self._block_size
        ids, positions, slots, kv_lens, states, adapters = self._arrays
        ids[:count] = tokens
        positions[:count] = computed
        states[: len(state_slots)] = state_slots
        adapters[:count] = adapter_slots
        for row, (position, table) in enumerate(zip(computed, block_tables, strict=True)):
            slots[row] = table[position // block_size] * block_size + position % block_size
            kv_lens[row] = position + 1
            self._write_table(row, table)
        ids[count:size] = positions[count:size] = 0
        slots[count:size] = NULL_BLOCK * block_size
        kv_lens[count:size] = 1
        states[count:size] = NULL_SLOT
        adapters[count:size] = -1
        for row in range(count, size):
            self._write_table(row, (NULL_BLOCK,))
        if self._numbers is not self._numbers_host:
            self._numbers.copy_(self._numbers_host, non_blocking=True)
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
