"""Optimizers over float32 masters, learning-rate schedules, and their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import FormatError, InvalidArgumentError
from engine.jobs import TrainParams


def learning_rate(params: TrainParams, step: int, total_steps: int) -> float:
    """The rate of one optimizer step, as transformers' get_{constant,linear,cosine}_schedule_with_warmup give it.

    Args:
        step: from 1. The first warm-up step has rate 0.
    """
    done = step - 1
    if done < params.warmup_steps:
        return params.learning_rate * done / params.warmup_steps
    if params.schedule == "constant":
        return params.learning_rate
    progress = (done - params.warmup_steps) / max(1, total_steps - params.warmup_steps)
    if params.schedule == "linear":
        return params.learning_rate * max(0.0, 1.0 - progress)
    return params.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Attributes: masters: by name; state: by name and quantity."""

    masters: dict[str, Tensor]
    state: dict[str, dict[str, Any]]


class Optimizer:
    """AdamW (arXiv:1711.05101) or SGD, with weight decay apart from the gradient in both.

    Args:
        masters: name to float32 parameter; the names key the saved state.
    """

    def __init__(self, masters: Mapping[str, nn.Parameter], params: TrainParams) -> None:
        self._masters = dict(masters)
        self._params = params
        parameters = list(self._masters.values())
        assert all(p.dtype == torch.float32 for p in parameters)
        self._optimizer: torch.optim.Optimizer
        if params.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(
                parameters,
                lr=params.learning_rate,
                betas=params.betas,
                eps=params.eps,
                weight_decay=params.weight_decay,
            )
        elif params.optimizer == "sgd":
            # torch's SGD adds the decay to the gradient, and so to the momentum; here it is decoupled, as in AdamW.
            self._optimizer = torch.optim.SGD(parameters, lr=params.learning_rate, momentum=params.momentum)
        else:
            raise InvalidArgumentError(f"optimizer is {params.optimizer!r}; accepted: adamw, sgd", field="optimizer")

    def zero_grad(self) -> None:
        """Frees all gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Scales the gradients down to max_grad_norm where their norm exceeds it (0: never).

        Returns: L2 norm over all of them, before.
        """
        parameters = list(self._masters.values())
        if self._params.max_grad_norm > 0.0:
            return float(nn.utils.clip_grad_norm_(parameters, self._params.max_grad_norm))
        return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the present gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._params.optimizer == "sgd" and self._params.weight_decay:
            for parameter in self._masters.values():
                parameter.mul_(1.0 - rate * self._params.weight_decay)
        self._optimizer.step()

    def snapshot(self) -> Snapshot:
        """Copies of the masters and of the state."""
        state = {
            name: {
                quantity: value.clone() if isinstance(value, Tensor) else value
                for quantity, value in self._optimizer.state.get(parameter, {}).items()
            }
            for name, parameter in self._masters.items()
        }
        return Snapshot({name: p.detach().clone() for name, p in self._masters.items()}, state)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Takes masters and state back; the snapshot is used up."""
        for name, parameter in self._masters.items():
            parameter.copy_(snapshot.masters[name])
            self._optimizer.state.pop(parameter, None)
            if snapshot.state[name]:
                self._optimizer.state[parameter] = snapshot.state[name]

    @torch.no_grad()
    def interpolate(self, before: Snapshot, after: Snapshot, weight: float) -> None:
        """Sets the masters to before + weight (after - before); the state stays."""
        for name, parameter in self._masters.items():
            torch.lerp(before.masters[name], after.masters[name], weight, out=parameter.data)

    def state(self) -> dict[str, Tensor]:
        """The state as "<parameter>:<quantity>" to tensors on the CPU; of a new optimizer, nothing."""
        tensors = {}
        for name, parameter in self._masters.items():
            for quantity, value in self._optimizer.state.get(parameter, {}).items():
                if value is not None:  # SGD without momentum
                    tensors[f"{name}:{quantity}"] = torch.as_tensor(value).detach().cpu().contiguous()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what ``state`` gave.

        Raises:
            FormatError: it belongs to other parameters.
        """
        for key, value in tensors.items():
            name, _, quantity = key.rpartition(":")
            parameter = self._masters.get(name)
            if parameter is None or (value.dim() > 0 and value.shape != parameter.shape):
                raise FormatError(f"optimizer state {key!r} belongs to no parameter of this run")
            # Adam counts its steps in a tensor that stays on the CPU.
            device = parameter.device if value.dim() > 0 else torch.device("cpu")
            self._optimizer.state[parameter][quantity] = value.to(device, copy=True)
