"""Checks of TrainParams, for callers that come without a server in between."""

from __future__ import annotations

import math

from engine.errors import InvalidArgumentError
from engine.jobs import TrainParams


def validate_params(params: TrainParams) -> None:
    """Checks every field.

    Raises:
        InvalidArgumentError: naming the field, its value and what is accepted.
    """
    _number(params, "learning_rate", 0.0, 1e3, low_open=True)
    _number(params, "eps", 0.0, 1.0, low_open=True)
    _number(params, "momentum", 0.0, 1.0, high_open=True)
    _number(params, "weight_decay", 0.0, 1e3)
    _number(params, "max_grad_norm", 0.0, 1e9)
    _number(params, "forward_tolerance", 0.0, 1e3, low_open=True)
    for beta in params.betas:
        if not 0.0 <= beta < 1.0:
            _reject("betas", params.betas, "two numbers in [0, 1)")
    for name, low in (
        ("warmup_steps", 0),
        ("batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("max_seq_len", 2),
        ("seed", 0),
        ("eval_every", 0),
        ("early_stopping_patience", 0),
        ("checkpoint_every", 0),
        ("publish_every", 0),
    ):
        if getattr(params, name) < low:
            _reject(name, getattr(params, name), f"an integer of at least {low}")
    for name, accepted in (
        ("optimizer", ("adamw", "sgd")),
        ("schedule", ("constant", "linear", "cosine")),
        ("publish", ("best", "last")),
    ):
        if getattr(params, name) not in accepted:
            _reject(name, repr(getattr(params, name)), ", ".join(accepted))
    if params.max_steps is None and params.epochs is None:
        _reject("max_steps", None, "max_steps or epochs, or both")
    if params.max_steps is not None and params.max_steps < 1:
        _reject("max_steps", params.max_steps, "an integer of at least 1")
    if params.epochs is not None and not 0.0 < params.epochs < math.inf:
        _reject("epochs", params.epochs, "a finite number above 0")


def _number(
    params: TrainParams, name: str, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> None:
    value = getattr(params, name)
    # Written so that NaN fails.
    if not ((low < value if low_open else low <= value) and (value < high if high_open else value <= high)):
        accepted = f"a number in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        _reject(name, value, accepted)


def _reject(name: str, value: object, accepted: str) -> None:
    raise InvalidArgumentError(f"{name} is {value}; accepted: {accepted}", field=f"params.{name}")
