"""GGUF tensor names to Hugging Face's, and what a GGUF converter did to the values. Free of torch.

Source: ``gguf/tensor_mapping.py`` and the ``modify_tensors`` methods of llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Change = Literal["none", "permuted", "shifted"]
"""permuted: rows of each head go from rotate-half to interleaved pairs. shifted: 1 was added (Gemma's norms)."""


@dataclass(frozen=True, slots=True)
class Target:
    """A Hugging Face name, and what to undo on the way to it."""

    name: str
    change: Change = "none"


_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_DECODER_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_BLOCK = {
    **_DECODER_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BERT = {
    "token_embd": "embeddings.word_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
_BERT_BLOCK = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_SPLIT = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<stem>[A-Za-z0-9_]+)\.(?P<kind>weight|bias)")

COMPUTED = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that belong to the configuration and not to the weights."""


def hf_target(architecture: str, name: str) -> Target | None:
    """The Hugging Face name of a GGUF tensor, or None if the architecture has no such tensor.

    Args:
        architecture: ``general.architecture``.
        name: as in the file ("blk.3.attn_q.weight").
    """
    match = _SPLIT.fullmatch(name)
    if match is None:
        return None
    layer, stem, kind = match["layer"], match["stem"], match["kind"]
    if architecture == "bert":
        top, block, layers = _BERT, _BERT_BLOCK, "encoder.layer"
    else:
        top, layers = _DECODER, "model.layers"
        block = _GEMMA3_BLOCK if architecture == "gemma3" else _DECODER_BLOCK
    module = top.get(stem) if layer is None else block.get(stem)
    if module is None:
        return None
    full = f"{module}.{kind}" if layer is None else f"{layers}.{int(layer)}.{module}.{kind}"
    change: Change = "none"
    if architecture == "llama" and stem in ("attn_q", "attn_k"):
        change = "permuted"
    elif architecture == "gemma3" and stem.endswith("_norm"):
        change = "shifted"
    return Target(full, change)
