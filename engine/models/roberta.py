"""RoBERTa (arXiv:1907.11692) and XLM-RoBERTa (arXiv:1911.02116): BERT whose positions begin after the padding id.

Source: transformers' ``models/roberta`` and ``models/xlm_roberta``.
"""

from __future__ import annotations

from engine.models.base import models
from engine.models.bert import BertModel


@models.register("roberta", "xlm-roberta")
class RobertaModel(BertModel):
    """The first ``pad_token_id + 1`` rows of the position table are not used, so 514 rows hold 512 tokens.

    transformers numbers only tokens other than the padding id; a padding id within an input has no meaning here and
    takes a position like any other.
    """

    @property
    def position_offset(self) -> int:
        pad = self.config.pad_token_id
        return 1 + (1 if pad is None else pad)
