"""Schedules are those of transformers; optimizers are torch's with decoupled decay; their state comes back exactly."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from engine.errors import FormatError, InvalidArgumentError
from engine.jobs import TrainParams
from engine.training.optimizer import Optimizer, learning_rate
from engine.training.params import validate_params

TOTAL = 23


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_schedules_are_those_of_transformers(schedule: str, warmup_steps: int) -> None:
    """The rate of every step equals the one that a loop with transformers' scheduler uses."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=TOTAL)
    params = TrainParams(learning_rate=3e-3, schedule=schedule, warmup_steps=warmup_steps, max_steps=TOTAL)  # type: ignore[arg-type]
    for step in range(1, TOTAL + 1):
        assert learning_rate(params, step, TOTAL) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def make(params: TrainParams, seed: int = 0) -> tuple[dict[str, nn.Parameter], Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    named = {name: nn.Parameter(torch.randn(3, 4, generator=generator)) for name in ("m.lora_A", "m.lora_B")}
    return named, Optimizer(named, params)


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


PARAMS = {
    "adamw": TrainParams(optimizer="adamw", weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, max_steps=1),
    "sgd": TrainParams(optimizer="sgd", momentum=0.9, weight_decay=0.1, max_steps=1),
    "plain sgd": TrainParams(optimizer="sgd", max_steps=1),
}


@pytest.mark.parametrize("kind", PARAMS)
def test_state_comes_back_exactly(kind: str) -> None:
    """Three steps, a saved state, three more: bit for bit what six steps give."""
    named, optimizer = make(PARAMS[kind])
    resumed, second = make(PARAMS[kind])
    for step in range(6):
        if step == 3:
            for name, parameter in resumed.items():
                parameter.data.copy_(named[name].data)
            second.load_state(optimizer.state())
        give_gradients(named, step)
        optimizer.step(0.01)
        if step >= 3:
            give_gradients(resumed, step)
            second.step(0.01)
    for name in named:
        assert torch.equal(named[name], resumed[name])


@pytest.mark.parametrize("kind", PARAMS)
def test_updates_are_those_of_torch(kind: str) -> None:
    """Five steps of changing rates, the first of rate 0, in which one parameter at times has no gradient: the
    parameters and the state of torch's own optimizer, to the bit; only that its SGD couples the decay, so that there
    it is applied by hand."""
    params = PARAMS[kind]
    named, optimizer = make(params)
    theirs = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    reference: torch.optim.Optimizer
    if params.optimizer == "adamw":
        reference = torch.optim.AdamW(
            theirs.values(), betas=params.betas, eps=params.eps, weight_decay=params.weight_decay
        )
    else:
        reference = torch.optim.SGD(theirs.values(), momentum=params.momentum)
    for step, rate in enumerate((0.0, 0.02, 0.01, 0.03, 0.005)):
        for each in (named, theirs):
            give_gradients(each, step)
            if step in (0, 3):
                each["m.lora_B"].grad = None
        if params.optimizer == "sgd":
            for parameter in theirs.values():
                if parameter.grad is not None:
                    parameter.data.mul_(1 - rate * params.weight_decay)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        optimizer.step(rate)
    expected = {
        f"{name}:{quantity}": value
        for name, parameter in theirs.items()
        for quantity, value in reference.state[parameter].items()
    }
    state = optimizer.state()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key])
    for name, parameter in named.items():
        assert torch.equal(parameter, theirs[name])


def test_optimizers_import_no_compiler() -> None:
    """torch.optim's classes import torch._dynamo: 2 s, and 110 MB that a run never uses."""
    code = (
        "import sys, torch; from torch import nn; from engine.jobs import TrainParams; "
        "from engine.training.optimizer import Optimizer; "
        "p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); "
        "o = Optimizer({'a': p}, TrainParams(max_steps=1)); o.clip(); o.step(0.1); o.zero_grad(); "
        "assert float(p.detach().sum()) != 2.0; assert 'torch._dynamo' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_sgd_decay_does_not_enter_the_momentum() -> None:
    """With a zero gradient the weights shrink by the same factor each step, which coupled decay would not give."""
    named, optimizer = make(PARAMS["sgd"])
    before = named["m.lora_A"].detach().clone()
    for _ in range(3):
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(0.5)
    torch.testing.assert_close(named["m.lora_A"].detach(), before * (1 - 0.5 * 0.1) ** 3)


def test_clipping() -> None:
    """The norm is reported as it was; the gradient is scaled to the limit, or left alone below it and at 0."""
    for limit, scaled in ((0.5, True), (0.0, False), (1e6, False)):
        named, optimizer = make(TrainParams(max_grad_norm=limit, max_steps=1))
        give_gradients(named, 0)
        before = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None]).clone()
        norm = optimizer.clip()
        after = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
        assert norm == pytest.approx(float(before.norm()), rel=1e-6)
        torch.testing.assert_close(after, before * (limit / norm) if scaled else before, rtol=1e-5, atol=1e-6)


def test_state_of_other_parameters_is_refused() -> None:
    """A state that names no parameter of the run, or has another shape, is not taken."""
    _, optimizer = make(PARAMS["adamw"])
    with pytest.raises(FormatError, match=r"other\.lora_A:exp_avg"):
        optimizer.load_state({"other.lora_A:exp_avg": torch.zeros(3, 4)})
    with pytest.raises(FormatError, match=r"m\.lora_A:exp_avg"):
        optimizer.load_state({"m.lora_A:exp_avg": torch.zeros(4, 4)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("eps", 0.0), ("momentum", 1.0), ("betas", (0.9, 1.0)),
        ("weight_decay", -1.0), ("max_grad_norm", float("inf")), ("warmup_steps", -1), ("batch_size", 0),
        ("gradient_accumulation_steps", 0), ("max_seq_len", 1), ("seed", -1), ("eval_every", -1), ("max_steps", 0),
        ("epochs", 0.0), ("epochs", float("nan")), ("optimizer", "lion"), ("schedule", "step"), ("publish", "none"),
        ("forward_tolerance", 0.0),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_named(field: str, value: object) -> None:
    """Every refusal names the field."""
    given: dict[str, object] = {"max_steps": 1}
    with pytest.raises(InvalidArgumentError, match=field) as caught:
        validate_params(TrainParams(**(given | {field: value})))  # type: ignore[arg-type]
    assert caught.value.field == f"params.{field}"


def test_an_end_is_needed() -> None:
    """Without max_steps and epochs a run would never end."""
    with pytest.raises(InvalidArgumentError, match="max_steps or epochs"):
        validate_params(TrainParams())
