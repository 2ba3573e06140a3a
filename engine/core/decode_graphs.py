"""Decode steps that are captured once and replayed: what a CUDA graph is to a GPU, for the kernels of CPUs.

A step in which every sequence has one new token runs the same operations each time; only the numbers in a few index
tensors differ. So the operations are recorded as they first run (engine.ops.cpu.capture), over tensors that stay, and
later steps write the numbers and run the record in one call: Python's part no longer grows with the depth of the model.
A step of the sequences of the step before writes the few numbers that are new.
Adapters are found through a table of slots (engine.lora.slots), so that a captured step is for all adapters that update
the same modules.
The recorded operations are those that the model called, so a replay computes what the model would. A step of which
torch computed a part cannot be replayed, which the capture notices; then every step runs as it would without.

Shapes: S sequences, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.context import DecodeInputs, ForwardContext, LoRADelta, PagedCache, RecurrentStates
from engine.lora.adapter import Adapter
from engine.lora.slots import AdapterSlots, SlotLoRA
from engine.models.base import CausalLM
from engine.ops import cpu

logger = logging.getLogger(__name__)

MAX_REACHES = 8
"""Sets of modules that adapters update for which steps are captured, the empty one included. Steps with others are run
as they are."""


class DecodeGraphs:
    """Captured decode steps of one model (engine.core.captured_steps.CapturedSteps), one for each number of sequences.

    Args:
        max_model_len: tokens of the longest sequence, for the width of block tables.
    """

    def __init__(self, model: CausalLM, cache: PagedCache, states: RecurrentStates | None, max_model_len: int) -> None:
        self._model = model
        self._cache = cache
        self._states = states
        self._max_blocks = -(-max_model_len // cache.block_size)
        self._arena = cpu.Arena()
        self._graphs: dict[tuple[int, frozenset[str]], _Graph | None] = {}
        self._slots = AdapterSlots(list(model.linears()), torch.device("cpu"), model.compute_dtype)
        self._last: _Graph | None = None
        self._refused = False

    def logits(
        self,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapters: Seq[Adapter | None],
    ) -> Tensor | None:
        """See CapturedSteps."""
        self._last = None
        assigned = self._slots.assign(adapters)
        if assigned is None:
            return None
        rows, reach = assigned
        key = (len(tokens), reach.modules)
        graph = self._graphs.get(key)
        if graph is None:
            if key in self._graphs or len({modules for _, modules in self._graphs} | {key[1]}) > MAX_REACHES:
                return None
            graph = _Graph(len(tokens), self._max_blocks, self._cache.block_size)
            graph.write(tokens, computed, block_tables, state_slots, rows)
            held = len(self._arena)
            lora = SlotLoRA(self._slots, graph.adapter_slots, reach) if reach.modules else None
            foreign = graph.capture(self._model, self._arena, self._cache, self._states, lora)
            self._graphs[key] = self._last = graph if foreign is None else None
            if foreign is not None:
                self._arena.shrink(held)
                if not self._refused:
                    logger.info("steps of %d sequences are not captured: torch computes %s", key[0], foreign)
                self._refused = True
            return graph.output
        graph.write(tokens, computed, block_tables, state_slots, rows)
        graph.program.replay()
        self._last = graph
        return graph.output

    @property
    def can_go_on(self) -> bool:
        """Whether the last step can be followed by ``next_tokens``."""
        return self._last is not None

    def next_tokens(
        self,
        tokens: Iterable[int],
        computed: Iterable[int],
        block_tables: Iterable[Seq[int]],
        params: Seq[float] = (),
    ) -> tuple[list[int], Tensor]:
        """``logits`` of the sequences of the last step, in its order and with its state slots, each one token further
        on. Runs no operation of torch.

        Args:
            params: what engine.ops.cpu.choose needs of the sequences, row after row; of all steps of them or of none.
                Empty: all rows are greedy, as ``logits`` left them.

        Returns: per sequence, the token that is chosen, or -1 where that is left to the sampler; the logits.
        """
        graph = self._last
        assert graph is not None
        graph.advance(tokens, computed, block_tables, params)
        graph.program.replay()
        return graph.chosen.tolist(), graph.output


class _Graph:
    """The tensors that a step of S sequences reads, and the operations over them."""

    def __init__(self, count: int, max_blocks: int, block_size: int) -> None:
        def index(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        self.token_ids = index(count)
        self._positions = index(count)
        self._slots = index(count)
        self._kv_lens = index(count)
        self._state_slots = index(count)
        self.adapter_slots = index(count)
        self._tables = index(count, max_blocks, dtype=torch.int32)
        # numpy writes a list into memory in a fraction of what an operation of torch costs, and a memoryview a number.
        self._arrays = [t.numpy() for t in (self.token_ids, self._positions, self._slots, self._kv_lens)]
        self._table_array = self._tables.numpy()
        self._state_array = self._state_slots.numpy()
        self._adapter_array = self.adapter_slots.numpy()
        self._numbers = [array.data for array in self._arrays]
        self._table_rows = [row.data for row in self._table_array]
        self._block_size = block_size
        self.program = cpu.Program()
        self.output = torch.empty(0)
        self._params = torch.zeros(count, 5, dtype=torch.float64)  # see engine.ops.cpu.choose
        self._param_array = self._params.view(-1).numpy()
        self.chosen = memoryview(b"")  # [S] int64; see DecodeGraphs.next_tokens

    def write(
        self,
        tokens: Seq[int],
        computed: Seq[int],
        block_tables: Seq[Seq[int]],
        state_slots: Seq[int],
        adapter_slots: Seq[int],
    ) -> None:
        """Puts the numbers of a step into the tensors."""
        size = self._block_size
        ids, positions, slots, kv_lens = self._arrays
        ids[:] = tokens
        positions[:] = computed
        for row, (position, table) in enumerate(zip(computed, block_tables, strict=True)):
            slots[row] = table[position // size] * size + position % size
            kv_lens[row] = position + 1
            self._table_array[row, : len(table)] = table
        if state_slots:
            self._state_array[:] = state_slots
        self._adapter_array[:] = adapter_slots
        self._param_array[:] = 0.0  # all rows are greedy: what is chosen is not looked at

    def advance(
        self,
        tokens: Iterable[int],
        computed: Iterable[int],
        block_tables: Iterable[Seq[int]],
        params: Seq[float],
    ) -> None:
        """``write`` for the sequences that were written last, each with one token more in the cache: of its blocks only
        that of the new token can be new."""
        if params:
            self._param_array[:] = params
        size = self._block_size
        ids, positions, slots, kv_lens = self._numbers
        for row, (token, position, table) in enumerate(zip(tokens, computed, block_tables, strict=True)):
            index = position // size
            block = table[index]
            ids[row] = token
            positions[row] = position
            slots[row] = block * size + position % size
            kv_lens[row] = position + 1
            self._table_rows[row][index] = block

    def capture(
        self,
        model: CausalLM,
        arena: cpu.Arena,
        cache: PagedCache,
        states: RecurrentStates | None,
        lora: LoRADelta | None,
    ) -> str | None:
        """Runs the step that was written and records it. Returns the operation that prevents a replay, or None."""
        count = len(self.token_ids)
        ctx = ForwardContext(
            positions=self._positions,
            cu_seqlens=torch.arange(count + 1, dtype=torch.int32),
            seq_starts=range(count + 1),
            kv_lens=self._kv_lens.tolist(),
            cache=cache,
            block_tables=self._tables,
            slot_mapping=self._slots,
            decode=DecodeInputs(torch.arange(count), self._kv_lens, None if states is None else self._state_slots),
            states=states,
            state_slots=self._state_slots.tolist() if states is not None else (),
            lora=lora,
            scratch={},
        )
        with cpu.capture(arena) as self.program:
            self.output = model.compute_logits(model(self.token_ids, ctx))
            if self.program.foreign is None:
                self.chosen = cpu.choose(self.output, self._params).numpy().data
        return self.program.foreign
