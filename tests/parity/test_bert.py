"""The BERT family against transformers: hidden states of packed sequences of unequal length, through our loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from engine.errors import FormatError
from engine.models.encoder import Encoder
from tests.parity.loading import assert_same_hidden, packed_hidden, randomize, through_our_loader, token_ids

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LENGTHS = [1, 17, 2, 40, 16]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_norm_eps": 1e-3, "hidden_act": "relu", "type_vocab_size": 5},
        {"hidden_act": "gelu_new", "num_attention_heads": 1, "num_hidden_layers": 1},
    ],
    ids=["default", "relu", "one_head"],
)
def test_bert(tmp_path: Path, options: dict[str, Any]) -> None:
    """Post-LayerNorm layers, learned positions, token type 0."""
    config = BertConfig(**{**SIZES, **options})
    reference = randomize(BertModel(config), 1)
    model = through_our_loader(reference, tmp_path)
    assert_same_hidden(model, reference, token_ids(LENGTHS, config.vocab_size))


def test_bert_with_a_head_and_prefixed_names(tmp_path: Path) -> None:
    """A checkpoint of a masked language model has its encoder under "bert." and a head that is passed over."""
    reference = randomize(BertForMaskedLM(BertConfig(**SIZES)), 2)
    model = through_our_loader(reference, tmp_path)
    assert_same_hidden(model, reference.bert, token_ids(LENGTHS, 101))


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(RobertaConfig, RobertaModel), (XLMRobertaConfig, XLMRobertaModel)],
    ids=["roberta", "xlm_roberta"],
)
@pytest.mark.parametrize("pad_token_id", [1, 5])
def test_roberta(tmp_path: Path, config_class: Any, model_class: Any, pad_token_id: int) -> None:
    """Positions begin after the padding id, at the longest sequence that the table holds as at the shortest."""
    config = config_class(**SIZES, pad_token_id=pad_token_id)
    reference = randomize(model_class(config), 3)
    model = through_our_loader(reference, tmp_path)
    assert isinstance(model, Encoder)
    assert model.max_input_tokens == 64 - pad_token_id - 1
    sequences = token_ids([model.max_input_tokens, 1, 9], 101)
    # transformers counts no position for a padding id within the input; none is drawn here.
    sequences = [sequence.where(sequence != pad_token_id, 7) for sequence in sequences]
    assert_same_hidden(model, reference, sequences)


def test_distilbert(tmp_path: Path) -> None:
    """Names of its own, no token types, activation "gelu"."""
    config = DistilBertConfig(vocab_size=101, dim=48, hidden_dim=80, n_layers=3, n_heads=4, max_position_embeddings=64)
    reference = randomize(DistilBertModel(config), 4)
    model = through_our_loader(reference, tmp_path)
    assert_same_hidden(model, reference, token_ids(LENGTHS, 101))


def test_packing_does_not_mix_sequences(tmp_path: Path) -> None:
    """A sequence's states are the same alone, and between others of any length."""
    model = through_our_loader(randomize(BertModel(BertConfig(**SIZES)), 5), tmp_path)
    sequences = token_ids([23, 5, 64, 5], 101, seed=1)
    for sequence, packed in zip(sequences, packed_hidden(model, sequences), strict=True):
        alone = packed_hidden(model, [sequence])[0]
        assert torch.allclose(packed, alone, atol=1e-5)


def test_impossible_token_type_count_is_rejected(tmp_path: Path) -> None:
    """A hostile type_vocab_size is named; nothing of that size is made."""
    from engine.loading import load_hf_config
    from engine.models.base import build_model
    from engine.quantization.base import SchemeMap

    (tmp_path / "config.json").write_text('{"model_type": "bert", "type_vocab_size": 1000000000000}')
    with pytest.raises(FormatError, match="type_vocab_size is 1000000000000"):
        build_model(load_hf_config(tmp_path), SchemeMap(), torch.float32)
