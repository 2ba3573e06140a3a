"""What the front end knows of models: their names, where they lie, whether they are ready, and their tokenizers.

Clients only ever name models. A name is known when the operator configured it or Quantize wrote it below the state
directory; no path comes from a request.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from engine.errors import CancelledError, EngineError, FailedPreconditionError, FormatError, NotFoundError
from engine.info import ModelInfo
from engine.names import validate_name
from engine.tokenizer import Tokenizer

logger = logging.getLogger("whet.models")

T = TypeVar("T")
ModelState = Literal["unloaded", "loading", "ready", "failed"]
_PROMPTS_FILE = "config_sentence_transformers.json"


class ModelHost(Protocol):
    """Who holds models in memory: the worker pool."""

    async def load_model(self, name: str, path: str) -> ModelInfo: ...

    async def unload_model(self, name: str) -> None: ...

    async def wait_loaded(self) -> None: ...

    def models(self) -> dict[str, ModelInfo]: ...


@dataclass(slots=True, eq=False)
class ModelEntry:
    """One known model.

    Attributes:
        configured: named by the operator; the server is ready only when all of these are.
        error: why it is "failed".
        info, tokenizer: None until it is loaded.
        prompts: prefixes that the model's files define for embedding, by purpose ("query", "document").
    """

    name: str
    path: Path
    configured: bool
    state: ModelState = "unloaded"
    error: str = ""
    info: ModelInfo | None = None
    tokenizer: Tokenizer | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
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
        """Yields what ``source`` yields, which is work on this model that an unload by force may end.

        ``source`` runs in a task of its own: that can be cancelled at any time, where a call's own task, amid a write
        to the wire, cannot.

        Raises:
            CancelledError: the model was unloaded by force meanwhile.
        """
        items: asyncio.Queue[T | _End] = asyncio.Queue()

        async def pump() -> None:
            async with aclosing(source):
                async for item in source:
                    items.put_nowait(item)

        task = asyncio.create_task(pump())
        task.add_done_callback(lambda _: items.put_nowait(_END))
        self._guarded.add(task)
        try:
            while not isinstance(item := await items.get(), _End):
                yield item
            if task.cancelled():
                raise CancelledError(f"model {self.name!r} was unloaded", reason="MODEL_UNLOADED")
            task.result()
        finally:
            self._guarded.discard(task)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def evict(self) -> None:
        """Ends all guarded work on the model, and waits until the workers have been told."""
        guarded = set(self._guarded)
        for task in guarded:
            task.cancel()
        if guarded:
            await asyncio.wait(guarded)


class _End:
    """After the last item."""


_END = _End()


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
        models_dir: where Quantize writes; its directories are known by their names.

    Attributes:
        on_change: awaited whenever a model became ready or ceased to be, before the caller hears of it.
    """

    def __init__(self, host: ModelHost, configured: Mapping[str, Path], models_dir: Path) -> None:
        self._host = host
        self._models_dir = models_dir
        self._entries = {name: ModelEntry(name, path, configured=True) for name, path in configured.items()}
        self.on_change: Callable[[], Awaitable[None]] | None = None

    def entries(self) -> list[ModelEntry]:
        """All known models, by name."""
        self._find_written()
        return [self._entries[name] for name in sorted(self._entries)]

    def configured(self) -> list[ModelEntry]:
        """Those that the operator named."""
        return [entry for entry in self._entries.values() if entry.configured]

    def path_of_output(self, name: str) -> Path:
        """Where Quantize writes a model of that name."""
        return self._models_dir / validate_name(name, "output")

    def get(self, name: str, field: str = "model") -> ModelEntry:
        """A known model, loaded or not.

        Raises:
            InvalidArgumentError: the name could be no model's.
            NotFoundError: it is not known.
        """
        validate_name(name, field)
        if name not in self._entries:
            self._find_written()
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

        Raises:
            EngineError: it cannot be loaded; the entry says why from then on.
        """
        entry = self.get(name, "name")
        async with entry.lock:
            if entry.state == "ready":
                return entry
            entry.state, entry.error = "loading", ""
            try:
                info = await self._host.load_model(name, str(entry.path))
                await self._equip(entry, info)
            except BaseException as error:
                entry.state = "failed"
                entry.error = str(error) if isinstance(error, EngineError) else "the server failed on it"
                raise
        await self._announce()
        logger.info("model %s is ready", name, extra={"model": name, "seconds": round(info.load_seconds, 3)})
        return entry

    async def load_configured(self) -> None:
        """Waits for the host to load the configured models, which it was started with, and takes them up.

        Raises:
            EngineError: the first that cannot be loaded.
        """
        for entry in self.configured():
            entry.state = "loading"
        await self._host.wait_loaded()
        infos = self._host.models()
        for entry in self.configured():
            await self._equip(entry, infos[entry.name])
        await self._announce()

    async def adopt(self, name: str, info: ModelInfo) -> ModelEntry:
        """Takes up a model that a job has written and loaded."""
        entry = self.get(name)
        async with entry.lock:
            await self._equip(entry, info)
        await self._announce()
        return entry

    async def unload(self, name: str, *, force: bool) -> ModelEntry:
        """Frees a model's memory. Does nothing if it is not loaded.

        Args:
            force: end the calls that use it first.
        Raises:
            FailedPreconditionError: it is in use.
        """
        entry = self.get(name, "name")
        async with entry.lock:
            if entry.state != "ready":
                return entry
            if entry.num_users and not force:
                raise FailedPreconditionError(
                    f"model {name!r} is in use by {entry.num_users} calls; wait for them, or force",
                    field="name",
                    reason="MODEL_BUSY",
                )
            entry.state = "unloaded"  # from here on nobody begins to use it
            try:
                await entry.evict()
                await self._host.unload_model(name)
            except BaseException:
                entry.state = "ready"
                raise
            entry.info, entry.tokenizer = None, None
        await self._announce()
        return entry

    async def _announce(self) -> None:
        if self.on_change is not None:
            await self.on_change()

    async def _equip(self, entry: ModelEntry, info: ModelInfo) -> None:
        path = Path(info.tokenizer_path)
        entry.tokenizer = await asyncio.to_thread(Tokenizer.from_path, path)
        entry.prompts = _read_prompts(path)
        entry.info, entry.state, entry.error = info, "ready", ""

    def _find_written(self) -> None:
        if not self._models_dir.is_dir():
            return
        for path in self._models_dir.iterdir():
            if path.name not in self._entries and (path / "config.json").is_file():
                self._entries[path.name] = ModelEntry(path.name, path, configured=False)


def _read_prompts(path: Path) -> dict[str, str]:
    """The prefixes of a sentence-transformers model; none where its files define none."""
    file = path / _PROMPTS_FILE
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        prompts = content.get("prompts") or {}
        return {str(purpose): str(prefix) for purpose, prefix in prompts.items()}
    except (ValueError, AttributeError, OSError) as error:
        raise FormatError(f"{file} is malformed: {error}") from None
