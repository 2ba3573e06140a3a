"""The checks under pytest: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import attention, elementwise, graphs, kernels, lora, models, quantized, sampling, training  # noqa: F401 - they register checks
from tests.gpu.checks import CHECKS, Skipped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_on_cuda(name: str) -> None:
    """The check's own docstring says what it proves."""
    try:
        figure = CHECKS[name](torch.device("cuda", 0))
    except Skipped as missing:
        pytest.skip(str(missing))
    assert figure <= 1.0
