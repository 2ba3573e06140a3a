"""The same model in transformers, and its adapters in peft: both are asked for only where they are installed.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.context import packed_context
from engine.core.loaded import LoadedModel
from engine.loading import Checkpoint
from engine.lora.adapter import Adapter
from engine.models.base import CausalLM, Model
from engine.training.forward import TrainingForward
from engine.verification.figures import Measured, Unmeasurable
from engine.verification.forwards import LOGIT_TOLERANCE, micro_batch, probed
from engine.verification.layers import Recorder, decoder_layers

LAYER_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
"""Both relative to the norm of what transformers has: of a token's state, and of a whole gradient."""

_LOADING_FAULTS = (ValueError, OSError, ImportError, RuntimeError, LookupError, AttributeError, TypeError)


def load_reference(checkpoint: Checkpoint, model: Model) -> Any:
    """transformers' model in float32, of as many layers as ours.

    Raises:
        Unmeasurable: transformers is not installed, or does not read this model.
    """
    if checkpoint.config.quantization_config:
        raise Unmeasurable("the model is quantized; compare the one that it was made from")
    if importlib.util.find_spec("transformers") is None:
        raise Unmeasurable("transformers is not installed")
    import transformers

    if checkpoint.kind == "gguf":
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": str(checkpoint.path.parent),
            "gguf_file": checkpoint.path.name,
        }
    else:
        source = {"pretrained_model_name_or_path": str(checkpoint.path)}
    auto = transformers.AutoModelForCausalLM if isinstance(model, CausalLM) else transformers.AutoModel
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(**source, local_files_only=True)
        _shorten(config, model.config.num_hidden_layers)
        return auto.from_pretrained(**source, config=config, dtype=torch.float32, local_files_only=True).eval()
    except _LOADING_FAULTS as error:
        first = " ".join(str(error).split())[:160]
        raise Unmeasurable(
            f"transformers {transformers.__version__} does not load this {model.config.model_type}: {first}"
        ) from None
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _shorten(config: Any, num_layers: int) -> None:
    """Leaves the first layers of a transformers configuration."""
    text = config.get_text_config()
    if getattr(text, "num_hidden_layers", num_layers) == num_layers:
        return
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types[:num_layers])


def reference_layers(reference: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """transformers' list of the layers that ours has under ``name``, and what it is called there.

    Raises:
        Unmeasurable: there is none of that length.
    """
    ours = name.split(".")[-1]
    for theirs, module in reference.named_modules():
        if isinstance(module, nn.ModuleList) and theirs.split(".")[-1] == ours and "visual" not in theirs.split("."):
            return theirs, module
    raise Unmeasurable(f"{type(reference).__name__} has no list of layers called {ours!r}")


@torch.no_grad()
def compare_forward(
    loaded: LoadedModel, reference: Any, sequences: Sequence[Sequence[int]]
) -> tuple[Measured, Measured]:
    """The results and every layer's output: ours of all sequences packed, theirs of each alone.

    Returns: of the logits (of an encoder: the last hidden states), and of the worst layer.
    """
    model, config = loaded.model, loaded.config
    lengths = [len(ids) for ids in sequences]
    named = decoder_layers(model)
    _, theirs = reference_layers(reference, named[0][0].rpartition(".")[0])
    flat = torch.tensor([token for ids in sequences for token in ids])
    difference = torch.zeros((), dtype=torch.float64)
    largest = torch.zeros((), dtype=torch.float64)
    with (
        Recorder({i: layer for i, (_, layer) in enumerate(named)}) as ours_seen,
        Recorder(dict(enumerate(theirs))) as theirs_seen,
    ):
        hidden = model(flat, packed_context(lengths, causal=isinstance(model, CausalLM)))
        for ids, own in zip(sequences, hidden.split(lengths), strict=True):
            if isinstance(model, CausalLM):
                expected = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
                own = model.compute_logits(own)
            else:
                expected = reference(input_ids=torch.tensor([ids])).last_hidden_state[0]
            difference = torch.maximum(difference, (own - expected).abs().amax().double())
            largest = torch.maximum(largest, expected.abs().amax().double())
    what = "logit" if isinstance(model, CausalLM) else "hidden value"
    accepted = LOGIT_TOLERANCE * max(1.0, float(largest))
    logits = Measured(float(difference), accepted, f"{len(flat)} tokens; the largest {what} is {float(largest):.3g}")
    errors = []
    for index in range(config.num_hidden_layers):
        own, expected = ours_seen.given[index][0], torch.cat(theirs_seen.given[index])
        relative = (own - expected).norm(dim=-1) / expected.norm(dim=-1)
        errors.append(float(relative.nan_to_num(nan=float("inf")).amax()))
    worst = max(range(len(errors)), key=errors.__getitem__)
    layers = Measured(errors[worst], LAYER_TOLERANCE, f"relative; {len(errors)} layers, the worst is {worst}")
    return logits, layers


def compare_gradients(
    loaded: LoadedModel, reference: Any, sequences: Sequence[Sequence[int]], rank: int, seed: int
) -> Measured:
    """Gradients of every A and B for the mean NLL, with a B that is not zero; ours of all sequences packed.

    Raises:
        Unmeasurable: peft is not installed, or does not take this model.
    """
    if importlib.util.find_spec("peft") is None:
        raise Unmeasurable("peft is not installed")
    adapter = probed(loaded, rank, seed)
    theirs = _peft_factors(reference, loaded.model, adapter)
    batch = micro_batch(sequences)
    total = torch.zeros(())
    for ids in sequences:
        logits = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    (total / batch.num_loss_tokens).backward()  # type: ignore[no-untyped-call]
    ours = {name: (a.requires_grad_(), b.requires_grad_()) for name, (a, b) in adapter.modules.items()}
    forward = TrainingForward(loaded, torch.float32)
    with torch.enable_grad():
        (forward.nll_sum(forward.hidden(batch, adapter), batch) / batch.num_loss_tokens).backward()  # type: ignore[no-untyped-call]
    worst, where = -1.0, ""
    for name, pair in ours.items():
        for factor, own, other in zip(("lora_A", "lora_B"), pair, theirs[name], strict=True):
            if own.grad is None or other.grad is None or not bool(other.grad.any()):
                raise Unmeasurable(f"{name}.{factor} has no gradient in transformers or here")
            error = float((own.grad - other.grad).norm() / other.grad.norm())
            if not error <= worst:  # NaN counts as worst
                worst, where = error, f"{name}.{factor}"
    nll = float(total.detach()) / batch.num_loss_tokens
    return Measured(
        worst, GRADIENT_TOLERANCE, f"relative; {2 * len(ours)} tensors at an NLL of {nll:.4f}, the worst is {where}"
    )


def _peft_factors(reference: Any, model: Model, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Puts the adapter on transformers' model; our name of each module to its A and B there."""
    from peft import LoraConfig, get_peft_model

    ours = decoder_layers(model)[0][0].rpartition(".")[0]
    theirs, _ = reference_layers(reference, ours)
    names = {name: theirs + name.removeprefix(ours) for name in adapter.modules}
    modules = dict(reference.named_modules())
    missing = [name for name, other in names.items() if other not in modules]
    if missing:
        raise Unmeasurable(f"{type(reference).__name__} has no module for {missing[0]}")
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(names.values()))
    get_peft_model(reference, config)
    found = {}
    for name, other in names.items():
        module = reference.get_submodule(other)
        pair = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for parameter, value in zip(pair, adapter.modules[name], strict=True):
            parameter.data.copy_(value)
        found[name] = pair
    return found
