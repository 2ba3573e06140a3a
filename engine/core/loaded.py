"""A model in memory and what belongs to it; handed to requests and jobs alike, so that all share one copy of W."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from engine.config import EngineConfig, ModelConfig
from engine.core.slice_budget import SliceBudget
from engine.errors import FailedPreconditionError
from engine.info import ModelInfo
from engine.models.base import CausalLM, Model

if TYPE_CHECKING:
    from engine.core.runner import Runner
    from engine.lora.store import AdapterStore


@dataclass(slots=True)
class LoadedModel:
    """One resident model.

    Attributes:
        model: eval mode, parameters without gradients.
        adapters: versions of this model's adapters, in memory and on disk.
        runner: cache and scheduler of generation; None for models that only embed.
        is_serving: whether the engine has requests, of this model or another, or had some a moment ago; jobs size their
            slices by it.
    """

    info: ModelInfo
    config: ModelConfig
    engine_config: EngineConfig
    model: Model
    device: torch.device
    dtype: torch.dtype
    adapters: AdapterStore
    runner: Runner | None = None
    is_serving: Callable[[], bool] = lambda: False
    _budgets: dict[str, SliceBudget] = field(default_factory=dict, init=False, repr=False)

    def slice_budget(self, kind: str) -> SliceBudget:
        """What a slice of such jobs may hold, as measured on those before: a short one is over before it would know."""
        if kind not in self._budgets:
            config = self.engine_config
            self._budgets[kind] = SliceBudget(config.job_slice_seconds, config.max_batch_tokens, self.is_serving)
        return self._budgets[kind]

    def causal_lm(self) -> CausalLM:
        """The model as a CausalLM.

        Raises:
            FailedPreconditionError: it is an encoder, or was saved without its head.
        """
        if not isinstance(self.model, CausalLM) or self.config.task != "generate":
            kind = "has no head" if isinstance(self.model, CausalLM) else "is an encoder"
            raise FailedPreconditionError(
                f"model {self.info.name!r} {kind} ({self.info.model_type}); this needs a generative model",
                field="model",
                reason="NOT_GENERATIVE",
            )
        return self.model
