"""An engine on a tiny random Llama, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
