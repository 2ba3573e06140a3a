"""An engine on tiny random models, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_tiny_hybrid, save_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen3.5."""
    return save_tiny_hybrid(tmp_path_factory.mktemp("tiny") / "hybrid")


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen3.5 with experts."""
    return save_tiny_hybrid(tmp_path_factory.mktemp("tiny") / "moe", experts=True)


@pytest.fixture(scope="session", params=["llama", "hybrid", "moe"])
def tiny_model(request: pytest.FixtureRequest) -> Path:
    """Directory of a tiny random model of each kind: blocks alone; blocks and states; these with experts."""
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path
