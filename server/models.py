"""What the front end knows of models: their names, where they lie, whether they are ready, and their tokenizers.

Clients only ever name models. A name is known when the operator configured it or Quantize wrote it below the state
directory; no path comes from a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from engine.durable import clear_staging
from engine.errors import (
    AlreadyExistsError,
    CancelledError,
    EngineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from engine.evaluation.embedding_config import NO_PROMPTS, Prompts, read_prompts
from engine.info import ModelInfo
from engine.names import validate_name
from engine.tokenizer import Tokenizer

logger = logging.getLogger("whet.models")

T = TypeVar("T")
ModelState = Literal["unloaded", "loading", "ready", "failed"]


class ModelHost(Protocol):
    """Who holds models in memory: the worker pool."""

    async def load_model(self, name: str, path: str) -> ModelInfo: ...

    async def unload_model(self, name: str) -> None: ...

    async def wait_loaded(self) -> None: ...

    def end_streams(self, model: str, error: EngineError) -> None: ...

    def models(self) -> dict[str, ModelInfo]: ...


@dataclass(slots=True, eq=False)
class ModelEntry:
    """One known model.

    Attributes:
        configured: named by the operator; the server is ready only when all of these are.
        error: why it is "failed".
        info, tokenizer: None until it is loaded.
        prompts: prefixes that the model's files define for embedding.
    """

    name: str
    path: Path
    configured: bool
    state: ModelState = "unloaded"
    error: str = ""
    info: ModelInfo | None = None
    tokenizer: Tokenizer | None = None
    prompts: Prompts = NO_PROMPTS
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0
    _guarded: set[asyncio.Task[None]] = field(default_factory=set)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Counts a user of the model while the body runs."""
        self.num_users += 1
        try:
            yield
        finally:
            self.num_users -= 1

    async def guard(self, source: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """Yields what ``source`` yields, which is a job on this model that an unload by force may end. Generation does
        without: its host ends it, and a task more is a seventh of what the front end spends on a token.

        ``source`` runs in a task of its own: that can be cancelled at any time, where a call's own task, amid a write
        to the wire, cannot.

        Raises:
            CancelledError: the model was unloaded by force meanwhile.
        """
        items: list[T] = []
        arrived, taken = asyncio.Event(), asyncio.Event()

        async def pump() -> None:
            async with aclosing(source):
                async for item in source:
                    items.append(item)
                    arrived.set()
                    # One is ready, no more: where the caller is slower than ``source``, it is to gather what comes.
                    await taken.wait()
                    taken.clear()

        task = asyncio.create_task(pump())
        task.add_done_callback(lambda _: arrived.set())
        self._guarded.add(task)
        try:
            while items or not task.done():
                if items:
                    taken.set()
                    yield items.pop()
                else:
                    await arrived.wait()
                    arrived.clear()
            if task.cancelled():
                raise self.unloaded_error()
            task.result()
        finally:
            self._guarded.discard(task)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def unloaded_error(self) -> CancelledError:
        """What work on the model ends with when it is unloaded by force."""
        return CancelledError(f"model {self.name!r} was unloaded", reason="MODEL_UNLOADED")

    async def evict(self) -> None:
        """Ends all guarded work on the model, and waits until the workers have been told."""
        guarded = set(self._guarded)
        for task in guarded:
            task.cancel()
        if guarded:
            await asyncio.wait(guarded)


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A model that can work: what services need of it."""

    entry: ModelEntry
    info: ModelInfo
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """Its name."""
        return self.entry.name


class ModelRegistry:
    """All known models.

    Args:
        host: loads and unloads.
        configured: name to path, as the operator gave them.
        models_dir: where Quantize writes; its directories are known by their names once ``refresh`` has seen them.

    Attributes:
        on_change: awaited whenever a model became ready or ceased to be, before the caller hears of it.
    """

    def __init__(self, host: ModelHost, configured: Mapping[str, Path], models_dir: Path) -> None:
        self._host = host
        self._models_dir = models_dir
        self._entries = {name: ModelEntry(name, path, configured=True) for name, path in configured.items()}
        self.on_change: Callable[[], Awaitable[None]] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._being_written: set[str] = set()
        self._readings: dict[str, _Reading] = {}

    async def refresh(self) -> None:
        """Looks which written models there are: new ones become known, removed ones are forgotten once unloaded."""
        written = await asyncio.to_thread(_written, self._models_dir)
        for name, path in written.items():
            self._entries.setdefault(name, ModelEntry(name, path, configured=False))
        for entry in list(self._entries.values()):
            if not (entry.configured or entry.name in written or entry.lock.locked() or self._holds(entry)):
                del self._entries[entry.name]

    def entries(self) -> list[ModelEntry]:
        """All known models, by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def configured(self) -> list[ModelEntry]:
        """Those that the operator named."""
        return [entry for entry in self._entries.values() if entry.configured]

    def path_of_output(self, name: str) -> Path:
        """Where Quantize writes a model of that name."""
        return self._models_dir / validate_name(name, "output")

    @asynccontextmanager
    async def claim_output(self, name: str) -> AsyncIterator[Path]:
        """Takes the name of a new model while the body writes it; yields its directory. What a worker that died left
        half written is cleared.

        Raises:
            InvalidArgumentError: the name could be no model's.
            AlreadyExistsError: a model has it, or another call is writing one of it.
        """
        path = self.path_of_output(name)
        await self.refresh()
        is_there = await asyncio.to_thread(path.exists)
        if is_there or name in self._entries.keys() | self._host.models().keys() | self._being_written:
            raise AlreadyExistsError(f"output is {name!r}, which exists; accepted: a new name", field="output")
        self._being_written.add(name)
        try:
            yield path
        except UnavailableError as error:
            if error.reason == "WORKER_LOST":  # its writer is dead, and the name still ours
                await asyncio.to_thread(clear_staging, path)
            raise
        finally:
            self._being_written.discard(name)

    def get(self, name: str, field: str = "model") -> ModelEntry:
        """A known model, loaded or not.

        Raises:
            InvalidArgumentError: the name could be no model's.
            NotFoundError: it is not known.
        """
        validate_name(name, field)
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self._entries)) or "none"
            raise NotFoundError(f"there is no model {name!r}; known: {known}", field=field, reason="MODEL_NOT_FOUND")
        return entry

    def ready(self, name: str, *, task: str | None = None) -> ReadyModel:
        """A model that is loaded.

        Args:
            task: what it must be made for ("generate"), if that matters.
        Raises:
            NotFoundError: it is not known.
            FailedPreconditionError: it is not loaded, or made for another task.
        """
        entry = self.get(name)
        if entry.state != "ready" or entry.info is None or entry.tokenizer is None:
            because = f": {entry.error}" if entry.error else ""
            raise FailedPreconditionError(
                f"model {name!r} is {entry.state}{because}", field="model", reason="MODEL_NOT_READY"
            )
        if task is not None and entry.info.task != task:
            raise FailedPreconditionError(
                f"model {name!r} is made for task {entry.info.task!r}; this call needs one for {task!r}",
                field="model",
                reason="WRONG_TASK",
            )
        return ReadyModel(entry, entry.info, entry.tokenizer)

    async def load(self, name: str) -> ModelEntry:
        """Loads a known model, with its tokenizer. Does nothing if it is loaded.

        Goes on when its caller is cancelled: half a model is of no use to anybody.

        Raises:
            EngineError: it cannot be loaded; the entry says why from then on.
        """
        return await self._to_the_end(self._load(self.get(name, "name")))

    async def _load(self, entry: ModelEntry) -> ModelEntry:
        name = entry.name
        async with entry.lock:
            if entry.state == "ready" and self._holds(entry):
                return entry
            entry.state, entry.error = "loading", ""
            tokenizer = _Reading(entry.path)
            try:
                info = await self._host.load_model(name, str(entry.path))
                await self._equip(entry, info, tokenizer)
            except BaseException as error:
                entry.state = "failed"
                entry.error = str(error) if isinstance(error, EngineError) else "the server failed on it"
                raise
        await self._announce()
        logger.info("model %s is ready", name, extra={"model": name, "seconds": round(info.load_seconds, 3)})
        return entry

    def read_configured(self) -> None:
        """Begins to read the tokenizers of the configured models, which ``load_configured`` takes up."""
        self._readings = {entry.name: _Reading(entry.path) for entry in self.configured()}

    async def load_configured(self) -> None:
        """Waits for the host to load the configured models, which it was started with, and takes them up.

        Raises:
            EngineError: the first that cannot be loaded.
        """
        await self.refresh()
        for entry in self.configured():
            entry.state = "loading"
        await self._host.wait_loaded()
        infos = self._host.models()
        for entry in self.configured():
            reading = self._readings.pop(entry.name, None) or _Reading(entry.path)
            await self._equip(entry, infos[entry.name], reading)
        await self._announce()

    async def adopt(self, name: str, info: ModelInfo) -> ModelEntry:
        """Takes up a model that a job has written and loaded."""
        await self.refresh()
        entry = self.get(name)
        async with entry.lock:
            await self._equip(entry, info, _Reading(Path(info.tokenizer_path)))
        await self._announce()
        return entry

    async def unload(self, name: str, *, force: bool) -> ModelEntry:
        """Frees a model's memory. Does nothing if it is not loaded.

        Goes on when its caller is cancelled, so that what is known here and what is in memory stay the same.

        Args:
            force: end the calls that use it first.
        Raises:
            FailedPreconditionError: it is in use.
        """
        return await self._to_the_end(self._unload(self.get(name, "name"), force))

    async def _unload(self, entry: ModelEntry, force: bool) -> ModelEntry:
        async with entry.lock:
            if entry.state != "ready" and not self._holds(entry):
                return entry
            if entry.num_users and not force:
                raise FailedPreconditionError(
                    f"model {entry.name!r} is in use by {entry.num_users} calls; wait for them, or force",
                    field="name",
                    reason="MODEL_BUSY",
                )
            before = entry.state
            entry.state = "unloaded"  # from here on nobody begins to use it
            try:
                await entry.evict()
                self._host.end_streams(entry.name, entry.unloaded_error())
                with contextlib.suppress(NotFoundError):  # then it is unloaded, as it should be
                    await self._host.unload_model(entry.name)
            finally:
                if self._holds(entry):
                    entry.state = before
                else:
                    entry.info, entry.tokenizer, entry.error = None, None, ""
        await self._announce()
        return entry

    def _holds(self, entry: ModelEntry) -> bool:
        """Whether the model is in memory: the host alone knows."""
        return entry.name in self._host.models()

    async def _to_the_end(self, change: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _announce(self) -> None:
        if self.on_change is not None:
            await self.on_change()

    async def _equip(self, entry: ModelEntry, info: ModelInfo, reading: _Reading) -> None:
        path = Path(info.tokenizer_path)
        if path != reading.path:
            reading = _Reading(path)
        entry.tokenizer, entry.prompts = await reading.result()
        entry.info, entry.state, entry.error = info, "ready", ""


class _Reading:
    """The tokenizer and the prompts of a model, being read in a thread: meanwhile a worker starts or loads weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._task = asyncio.create_task(asyncio.to_thread(lambda: (Tokenizer.from_path(path), read_prompts(path))))
        # Where the model cannot be loaded, nobody asks for what has become of this.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def result(self) -> tuple[Tokenizer, Prompts]:
        """Waits for both.

        Raises:
            FormatError: one is malformed.
        """
        return await asyncio.shield(self._task)


def _written(models_dir: Path) -> dict[str, Path]:
    """The models that lie in a directory, by name."""
    found: dict[str, Path] = {}
    if not models_dir.is_dir():
        return found
    for path in models_dir.iterdir():
        with contextlib.suppress(InvalidArgumentError):  # a name that no request could give
            validate_name(path.name, "model")
            if (path / "config.json").is_file():
                found[path.name] = path
    return found
