"""Copies a checkpoint into a model that was built on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from engine.errors import FormatError, ShapeError
from engine.loading.checkpoint import Checkpoint

SHOWN_NAMES = 5

_PREFIXES = (
    ("model.language_model.", "model."),  # Gemma 3 with vision, transformers 5
    ("language_model.model.", "model."),  # Gemma 3 with vision, transformers 4
    ("language_model.", ""),
    ("bert.", ""),
    ("roberta.", ""),
    ("distilbert.", ""),
    ("mpnet.", ""),
    ("", "model."),  # saved from the base model, without its head
    ("model.", ""),
)
"""What stands before a parameter's name in one checkpoint or another, and what stands there in the model."""

_IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|(.*\.)?position_ids|(.*\.)?masked_bias"
    r"|mtp\..*|(model\.)?(vision_tower|multi_modal_projector|visual)\..*"
)
"""Buffers that are computed, and parts of a checkpoint that the language model does not have: towers of other
modalities, and heads for multi-token prediction (``mtp``) that the configuration does not announce."""

_IGNORED_OF_ENCODERS = re.compile(
    r"(cls|classifier|lm_head|pooler|qa_outputs|score|pre_classifier|vocab_\w+|(bert|roberta|mpnet)\.pooler)(\..*)?"
)
"""Heads of encoders: they are trained with one and used without."""


def load_weights(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int:
    """Gives every parameter and persistent buffer of ``model`` its value.

    Optional modules (``Model.optional_modules``) of which the checkpoint has nothing are taken from the model.

    Each becomes a tensor of the type that the model declares for it. Where that is the stored type and the device is
    the CPU, it is a view of the memory map: nothing is copied, and processes that load one file share its pages.

    Args:
        model: built on the meta device; its names are Hugging Face's.
        dtype: the compute type that the model was built for.
        device: where the tensors go.

    Returns: resident bytes of the loaded tensors.

    Raises:
        FormatError: the checkpoint lacks names that the model has, or has names that the model lacks.
        ShapeError: a tensor has another shape than its parameter.
    """
    wanted = _named_tensors(model)
    assert any(t.dtype == dtype for t in wanted.values()), f"the model was not built for {dtype}"
    sources = match_names(checkpoint.names(), wanted, encoder=checkpoint.config.task == "embed")
    wanted = _without_absent(model, wanted, sources)
    if "lm_head.weight" not in wanted:
        sources.pop("lm_head.weight", None)
    missing = [name for name in wanted if name not in sources]
    if missing:
        raise FormatError(f"{checkpoint.path}: lacks {_few(missing)}, which a {checkpoint.config.model_type} model has")
    for name, expected in wanted.items():
        shape = checkpoint.shape(sources[name])
        if shape != tuple(expected.shape):
            raise ShapeError(
                f"{checkpoint.path}: tensor {sources[name]!r} has shape {list(shape)}; accepted: {list(expected.shape)}"
            )
    total = 0
    owners = _owners(model)
    for name, expected in wanted.items():
        value = checkpoint.get(sources[name])
        if value.is_floating_point() != expected.is_floating_point():
            raise FormatError(
                f"{checkpoint.path}: tensor {sources[name]!r} is {value.dtype}; accepted: a type like {expected.dtype}"
            )
        value = value.to(device).to(expected.dtype)
        _replace(model, name, expected, value, owners)
        total += value.numel() * value.element_size()
    return total


def _without_absent(model: nn.Module, wanted: dict[str, Tensor], found: Mapping[str, str]) -> dict[str, Tensor]:
    """Takes those optional modules from the model of which the checkpoint has nothing, and their names from ``wanted``.
    One that it has in part stays, so that what it lacks is told."""
    for name in getattr(model, "optional_modules", ()):
        if not any(key.startswith(f"{name}.") for key in found):
            setattr(model, name, None)
            wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith(f"{name}.")}
    return wanted


def match_names(stored: Iterable[str], wanted: Mapping[str, object], *, encoder: bool = False) -> dict[str, str]:
    """Finds for each wanted name the stored name that means it.

    Args:
        stored: names in a checkpoint.
        wanted: names in a model.
        encoder: also passes over the heads that encoders are trained with.

    Returns: wanted name to stored name; wanted names without one are absent.

    Raises:
        FormatError: stored names that mean nothing to the model, or two that mean the same.
    """
    found: dict[str, str] = {}
    unexpected = []
    for name in stored:
        target = _translate(name, wanted)
        if target is None:
            if not (_IGNORED.fullmatch(name) or name == "lm_head.weight" or (encoder and _headless(name))):
                unexpected.append(name)
        elif found.setdefault(target, name) != name:
            raise FormatError(f"the checkpoint has both {found[target]!r} and {name!r} for {target!r}")
    if unexpected:
        raise FormatError(f"the checkpoint has {_few(unexpected)}, for which the model has no place")
    return found


def _translate(name: str, wanted: Mapping[str, object]) -> str | None:
    # TensorFlow's names of LayerNorm parameters, in old BERT checkpoints.
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    if name in wanted:
        return name
    for stored, ours in _PREFIXES:
        if name.startswith(stored) and (candidate := ours + name[len(stored) :]) in wanted:
            return candidate
    return None


def _headless(name: str) -> bool:
    return _IGNORED_OF_ENCODERS.fullmatch(name) is not None


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, shared ones once."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


Owners = dict[int, list[tuple[nn.Module, str]]]


def _owners(model: nn.Module) -> Owners:
    """The modules that have a parameter, and its name there, by the parameter's id: one may be shared."""
    owners: Owners = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, key))
    return owners


def _replace(model: nn.Module, name: str, old: Tensor, value: Tensor, owners: Owners) -> None:
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=False)
        for module, key in owners[id(old)]:
            module._parameters[key] = new
    else:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = value


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(repr(name) for name in names[:SHOWN_NAMES]) + more
