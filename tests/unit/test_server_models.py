"""The model registry: what it says of a model is what is in memory, whoever goes away meanwhile."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import CancelledError, EngineError, FailedPreconditionError, NotFoundError, UnavailableError
from engine.info import ModelInfo
from server.models import ModelRegistry
from tests.rpc.tiny_tokenizer import save_tiny_tokenizer

INFO = ModelInfo(
    name="m",
    path="",
    model_type="llama",
    task="generate",
    dtype="float32",
    quantization="none",
    num_parameters=1,
    weights_bytes=4,
    vocab_size=300,
    hidden_size=8,
    num_layers=1,
    max_model_len=64,
    num_blocks=1,
    block_size=16,
    kv_cache_bytes=1,
    linear_modules=["q_proj"],
    weights_digest="",
    embedding_dimensions=8,
    device="cpu",
    load_seconds=0.0,
    tokenizer_path="",
)


class Host:
    """Holds names, as slowly as a test wishes; like the worker pool it ends what it has begun."""

    def __init__(self) -> None:
        self.held: dict[str, ModelInfo] = {}
        self.loads = 0
        self.ended: list[tuple[str, EngineError]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.error: EngineError | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    def models(self) -> dict[str, ModelInfo]:
        return dict(self.held)

    async def wait_loaded(self) -> None:
        await self.go.wait()

    async def load_model(self, name: str, path: str) -> ModelInfo:
        self.loads += 1
        await self.go.wait()
        self.held[name] = replace(INFO, name=name, path=path, tokenizer_path=path)
        return self.held[name]

    def end_streams(self, model: str, error: EngineError) -> None:
        self.ended.append((model, error))

    async def unload_model(self, name: str) -> None:
        async def unload() -> None:
            await self.go.wait()
            if self.error is not None:
                raise self.error
            if name not in self.held:
                raise NotFoundError(f"{name} is not loaded")
            del self.held[name]

        task = asyncio.create_task(unload())
        self.tasks.add(task)
        await asyncio.shield(task)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def registry(host: Host, tmp_path: Path) -> ModelRegistry:
    path = save_tiny_tokenizer(tmp_path / "m")
    return ModelRegistry(host, {"m": path}, tmp_path / "written")


def written(tmp_path: Path, name: str) -> Path:
    directory = save_tiny_tokenizer(tmp_path / "written" / name)
    (directory / "config.json").write_text("{}")
    return directory


@contextmanager
def held_up(host: Host) -> Iterator[None]:
    host.go.clear()
    try:
        yield
    finally:
        host.go.set()


async def settled(registry: ModelRegistry) -> None:
    async with registry.get("m").lock:
        pass


async def test_a_cancelled_unload_goes_on_and_the_model_loads_again(registry: ModelRegistry, host: Host) -> None:
    await registry.load("m")
    with held_up(host):
        call = asyncio.create_task(registry.unload("m", force=False))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.wait({call})
    await settled(registry)
    assert registry.get("m").state == "unloaded"
    assert "m" not in host.held
    await registry.load("m")
    assert "m" in host.held
    assert host.loads == 2
    assert registry.ready("m").info.name == "m"


async def test_a_cancelled_load_goes_on(registry: ModelRegistry, host: Host) -> None:
    with held_up(host):
        call = asyncio.create_task(registry.load("m"))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.wait({call})
    await settled(registry)
    assert registry.get("m").state == "ready"
    assert host.loads == 1


async def test_what_the_host_no_longer_holds_counts_as_unloaded(registry: ModelRegistry, host: Host) -> None:
    await registry.load("m")
    host.held.clear()
    assert (await registry.unload("m", force=False)).state == "unloaded"
    await registry.load("m")
    host.held.clear()
    await registry.load("m")  # not taken for loaded
    assert "m" in host.held


async def test_what_the_host_refuses_to_unload_stays_ready(registry: ModelRegistry, host: Host) -> None:
    await registry.load("m")
    host.error = FailedPreconditionError("busy", reason="MODEL_BUSY")
    with pytest.raises(FailedPreconditionError, match="busy"):
        await registry.unload("m", force=False)
    assert registry.ready("m").info.name == "m"


async def test_what_was_loaded_but_has_no_tokenizer_can_be_unloaded(
    registry: ModelRegistry, host: Host, tmp_path: Path
) -> None:
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError):
        await registry.load("m")
    assert registry.get("m").state == "failed"
    assert (await registry.unload("m", force=False)).state == "unloaded"
    assert host.held == {}


async def test_force_ends_the_work_on_it(registry: ModelRegistry, host: Host) -> None:
    async def work() -> AsyncGenerator[int]:
        yield 1
        await asyncio.Event().wait()

    await registry.load("m")
    entry = registry.get("m")
    source = entry.guard(work())
    with entry.use():
        assert await anext(source) == 1
        with pytest.raises(FailedPreconditionError):
            await registry.unload("m", force=False)
        assert not host.ended
        await registry.unload("m", force=True)
    with pytest.raises(CancelledError):
        await anext(source)
    [(model, error)] = host.ended
    assert (model, type(error), error.reason) == ("m", CancelledError, "MODEL_UNLOADED")


async def test_a_failed_unload_tells_its_caller(registry: ModelRegistry, host: Host) -> None:
    await registry.load("m")
    host.error = UnavailableError("lost")
    with pytest.raises(UnavailableError):
        await registry.unload("m", force=True)


# ---------------------------------------------------------------------------------------------------- written models


async def test_written_models_come_and_go_with_their_directories(
    registry: ModelRegistry, host: Host, tmp_path: Path
) -> None:
    for name in ("kept", "gone", "loaded"):
        written(tmp_path, name)
    written(tmp_path, ".half-written")
    (tmp_path / "written" / "no-model").mkdir()
    await registry.refresh()
    assert [entry.name for entry in registry.entries()] == ["gone", "kept", "loaded", "m"]
    await registry.load("loaded")
    for name in ("gone", "loaded"):
        shutil.rmtree(tmp_path / "written" / name)
    await registry.refresh()
    assert [entry.name for entry in registry.entries()] == ["kept", "loaded", "m"]
    await registry.unload("loaded", force=False)
    await registry.refresh()
    assert [entry.name for entry in registry.entries()] == ["kept", "m"]
    with pytest.raises(NotFoundError, match="known: kept, m"):
        registry.get("gone")


async def test_listing_reads_no_directory(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Iterator[Path]:
        raise AssertionError(f"{path} was listed on the event loop")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert [entry.name for entry in registry.entries()] == ["m"]
    with pytest.raises(NotFoundError):
        registry.get("other")
