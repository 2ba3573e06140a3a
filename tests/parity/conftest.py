"""What several comparisons with transformers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="package")
def smollm2_reference(smollm2_gguf: Path) -> tuple[Any, Any]:
    """transformers' own load of SmolLM2's GGUF file, in float32, and its tokenizer. Not to be changed: loading it takes
    longer than most of what it is compared with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, name = str(smollm2_gguf.parent), smollm2_gguf.name
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(directory, gguf_file=name)
