"""Optimizers over float32 masters, learning-rate schedules, and their state as named tensors.

The updates are those of torch.optim, operation by operation and to the bit. Its classes import torch._dynamo when they
are made, to tell it to keep away from them, which costs a run 2 s and 110 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.errors import FormatError, InvalidArgumentError
from engine.jobs import TrainParams
from engine.ops.torch_threads import threads_for


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


State = dict[str, Tensor]
"""Of one parameter, by quantity: AdamW's step (a float32 number on the CPU), exp_avg and exp_avg_sq, SGD's
momentum_buffer; before its first update, nothing."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Attributes: masters: by name; state: by name and quantity."""

    masters: dict[str, Tensor]
    state: dict[str, State]


class Optimizer:
    """AdamW (arXiv:1711.05101) or SGD, with weight decay apart from the gradient in both.

    Args:
        masters: name to float32 parameter; the names key the saved state.
    """

    def __init__(self, masters: Mapping[str, nn.Parameter], params: TrainParams) -> None:
        self._masters = dict(masters)
        self._params = params
        assert all(p.dtype == torch.float32 for p in self._masters.values())
        if params.optimizer not in ("adamw", "sgd"):
            raise InvalidArgumentError(f"optimizer is {params.optimizer!r}; accepted: adamw, sgd", field="optimizer")
        self._state: dict[str, State] = {name: {} for name in self._masters}
        self._threads = threads_for(max((p.numel() for p in self._masters.values()), default=0))

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for parameter in self._masters.values():
            parameter.grad = None

    def clip(self) -> float:
        """Scales the gradients down to max_grad_norm where their norm exceeds it (0: never).

        Returns: L2 norm over all of them, before.
        """
        parameters = list(self._masters.values())
        with self._threads:
            if self._params.max_grad_norm > 0.0:
                return float(nn.utils.clip_grad_norm_(parameters, self._params.max_grad_norm))
            return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the present gradients."""
        trained = [(self._state[name], p, p.grad) for name, p in self._masters.items() if p.grad is not None]
        if not trained:
            return
        states = [state for state, _, _ in trained]
        parameters: list[Tensor] = [parameter for _, parameter, _ in trained]
        gradients = [gradient for _, _, gradient in trained]
        with self._threads:
            if self._params.weight_decay:
                torch._foreach_mul_(parameters, 1 - rate * self._params.weight_decay)
            if self._params.optimizer == "adamw":
                _adam(states, parameters, gradients, rate, self._params)
            else:
                _sgd(states, parameters, gradients, rate, self._params)

    def snapshot(self) -> Snapshot:
        """Copies of the masters and of the state."""
        state = {
            name: {quantity: value.clone() for quantity, value in state.items()} for name, state in self._state.items()
        }
        return Snapshot({name: p.detach().clone() for name, p in self._masters.items()}, state)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Takes masters and state back; the snapshot is used up."""
        for name, parameter in self._masters.items():
            parameter.copy_(snapshot.masters[name])
        self._state = snapshot.state

    @torch.no_grad()
    def interpolate(self, before: Snapshot, after: Snapshot, weight: float) -> None:
        """Sets the masters to before + weight (after - before); the state stays."""
        for name, parameter in self._masters.items():
            torch.lerp(before.masters[name], after.masters[name], weight, out=parameter.data)

    def state(self) -> dict[str, Tensor]:
        """The state as "<parameter>:<quantity>" to tensors on the CPU; of a new optimizer, nothing."""
        return {
            f"{name}:{quantity}": value.detach().cpu().contiguous()
            for name, state in self._state.items()
            for quantity, value in state.items()
        }

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
            self._state[name][quantity] = value.to(device, copy=True)


def _adam(
    states: list[State], parameters: list[Tensor], gradients: list[Tensor], rate: float, params: TrainParams
) -> None:
    """Adam (arXiv:1412.6980, algorithm 1), as torch.optim.Adam."""
    beta1, beta2 = params.betas
    for state, parameter in zip(states, parameters, strict=True):
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
    means = [state["exp_avg"] for state in states]
    squares = [state["exp_avg_sq"] for state in states]
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    steps = [float(state["step"]) for state in states]
    divisors = torch._foreach_sqrt(squares)
    torch._foreach_div_(divisors, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(divisors, params.eps)
    torch._foreach_addcdiv_(parameters, means, divisors, [-(rate / (1 - beta1**step)) for step in steps])


def _sgd(
    states: list[State], parameters: list[Tensor], gradients: list[Tensor], rate: float, params: TrainParams
) -> None:
    """Gradient descent with momentum, as torch.optim.SGD: the first gradient is the first momentum."""
    if params.momentum:
        for state, gradient in zip(states, gradients, strict=True):
            if state:
                state["momentum_buffer"].mul_(params.momentum).add_(gradient)
            else:
                state["momentum_buffer"] = gradient.clone()
        gradients = [state["momentum_buffer"] for state in states]
    torch._foreach_add_(parameters, gradients, alpha=-rate)
