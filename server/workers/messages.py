"""What the front end and a worker say to each other: msgspec Structs in MessagePack.

The engine's own dataclasses travel inside as they are. msgspec tells the members of a union apart only by a tag, which
plain dataclasses have not, so a job's spec and its events go as ``Tagged``: the name of the type beside its encoding.
Decoding is typed throughout: bytes that are not exactly one of these messages raise msgspec.DecodeError.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import msgspec

from engine.config import EngineConfig
from engine.errors import ERRORS_BY_CODE, EngineError, InternalError
from engine.info import EngineStats
from engine.jobs import JobEvent, JobSpec, WeightedAdapter
from engine.request import Request, RequestOutput

T = TypeVar("T")


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with: one line of JSON on its standard input.

    Attributes:
        endpoint: ZeroMQ address of the front end.
        identity: names this start of this worker; replies that bear another are of an earlier start.
        heartbeat_interval_seconds: between heartbeats, and between statistics.
        stream_interval_seconds: least time between two reports of outputs; see OutputSender.
        log_level, log_format: as ServerConfig's.
    """

    endpoint: str
    identity: str
    engine: EngineConfig
    heartbeat_interval_seconds: float = 0.5
    stream_interval_seconds: float = 0.0
    log_level: str = "info"
    log_format: Literal["json", "text"] = "text"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An EngineError on its way to another process."""

    code: str
    message: str
    field: str = ""
    reason: str = ""
    retry_after_seconds: float | None = None

    @classmethod
    def of(cls, error: EngineError) -> Failure:
        """The failure that describes ``error``."""
        return cls(
            code=error.code,
            message=error.message,
            field=error.field,
            reason=error.reason,
            retry_after_seconds=error.retry_after_seconds,
        )

    def to_error(self) -> EngineError:
        """The error to raise. A code that has no class of its own is a fault of ours."""
        return ERRORS_BY_CODE.get(self.code, InternalError)(
            self.message, field=self.field, reason=self.reason, retry_after_seconds=self.retry_after_seconds
        )


class Tagged(msgspec.Struct, frozen=True, array_like=True):
    """A dataclass of engine.jobs and the name of its type."""

    kind: str
    body: msgspec.Raw

    @classmethod
    def of(cls, value: JobSpec | JobEvent) -> Tagged:
        """Wraps a spec or an event."""
        return cls(type(value).__name__, msgspec.Raw(_encoder.encode(value)))

    def spec(self) -> JobSpec:
        """The job spec inside.

        Raises:
            msgspec.ValidationError: it is something else.
        """
        return _unwrap(self, _SPECS)  # type: ignore[no-any-return]

    def event(self) -> JobEvent:
        """The job event inside.

        Raises:
            msgspec.ValidationError: it is something else.
        """
        return _unwrap(self, _EVENTS)  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------- front end to worker


class Command(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message to a worker."""


class AddRequest(Command, frozen=True, kw_only=True):
    """Outputs follows for it, or RequestFailed."""

    request: Request


class Abort(Command, frozen=True, kw_only=True):
    """Ends a request. Has no reply: it may just have ended.

    Attributes:
        index: of the one completion to end; None: all of them.
        reason: "cancelled": nothing more comes. "stop": Outputs follows with the end of each that had not ended.
    """

    request_id: str
    index: int | None = None
    reason: Literal["cancelled", "stop"] = "cancelled"


class Call(Command, frozen=True, kw_only=True):
    """A command that is answered by one Reply with the same call_id."""

    call_id: int


class LoadModel(Call, frozen=True, kw_only=True):
    """Replies a ModelInfo."""

    name: str
    path: str


class UnloadModel(Call, frozen=True, kw_only=True):
    """Replies None."""

    name: str


class StartJob(Call, frozen=True, kw_only=True):
    """Replies None once the job is accepted; JobEvents follow."""

    job: Tagged


class CancelJob(Call, frozen=True, kw_only=True):
    """Replies None; the job's terminal event comes as JobEvents first."""

    job_id: str


class CheckpointJobs(Call, frozen=True, kw_only=True):
    """Ends training runs, resumably; other jobs go on. Replies None; their terminal events come as JobEvents first."""


class ListAdapters(Call, frozen=True, kw_only=True):
    """Replies a list of AdapterInfo; ``model`` None: of all models."""

    model: str | None


class LoadAdapter(Call, frozen=True, kw_only=True):
    """Loads a directory that the operator named; force: also onto other base weights. Replies an AdapterInfo."""

    model: str
    name: str
    path: str
    force: bool = False


class LoadAdapterVersion(Call, frozen=True, kw_only=True):
    """Makes a stored version the live one; None: the newest; force: also onto other base weights. Replies an
    AdapterInfo."""

    model: str
    name: str
    version: int | None
    force: bool = False


class ImportAdapter(Call, frozen=True, kw_only=True):
    """Publishes an uploaded directory as a new version; force: also onto other base weights. Replies an AdapterInfo."""

    model: str
    name: str
    staged_dir: str
    force: bool = False


class UnloadAdapter(Call, frozen=True, kw_only=True):
    """Replies None."""

    model: str
    name: str


class DeleteAdapter(Call, frozen=True, kw_only=True):
    """Replies None."""

    model: str
    name: str
    version: int | None


class RenameAdapter(Call, frozen=True, kw_only=True):
    """Replies None. Attributes: on_disk: False: another worker has done that part."""

    model: str
    name: str
    new_name: str
    on_disk: bool = True


class AdaptersInUse(Call, frozen=True, kw_only=True):
    """Replies a list of (name, version): the adapters of this worker's requests and jobs."""

    model: str


class PruneAdapters(Call, frozen=True, kw_only=True):
    """Replies a list of AdapterInfo: what was deleted, or would be.

    Attributes:
        name: None: every adapter of the model.
        keep: names and versions that are needed elsewhere.
    """

    model: str
    name: str | None
    keep_last: int
    keep: list[tuple[str, int]]
    dry_run: bool


class CombineAdapters(Call, frozen=True, kw_only=True):
    """Publishes a combination of adapters as a new version of ``name``. Replies an AdapterInfo."""

    model: str
    name: str
    sources: list[WeightedAdapter]
    method: str
    force: bool
    max_rank: int


class AdapterPath(Call, frozen=True, kw_only=True):
    """Replies the PEFT directory of a version as a string; None: of the live one."""

    model: str
    name: str
    version: int | None


class Shutdown(Command, frozen=True, kw_only=True):
    """The worker ends cleanly, at once."""


AnyCommand = (
    AddRequest
    | Abort
    | LoadModel
    | UnloadModel
    | StartJob
    | CancelJob
    | CheckpointJobs
    | ListAdapters
    | LoadAdapter
    | LoadAdapterVersion
    | ImportAdapter
    | UnloadAdapter
    | DeleteAdapter
    | RenameAdapter
    | AdaptersInUse
    | PruneAdapters
    | CombineAdapters
    | AdapterPath
    | Shutdown
)


# ----------------------------------------------------------------------------------------------- worker to front end


class Report(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message from a worker."""


class Ready(Report, frozen=True, kw_only=True):
    """The first message: the engine stands and takes commands."""

    device: str


class StartFailed(Report, frozen=True, kw_only=True):
    """The first and last message: there can be no engine with this configuration."""

    failure: Failure


class Heartbeat(Report, frozen=True, kw_only=True):
    """The process is alive; the loop may be or not. Comes from a thread of its own, under an identity of its own.

    Attributes:
        doing: what the loop is at ("a step", "loading model x").
        announced: whether the loop said beforehand that this may take minutes.
        seconds: since the loop last went round, which is how long it has been at this.
    """

    doing: str
    announced: bool = False
    seconds: float = 0.0


class Statistics(Report, frozen=True, kw_only=True):
    """What the engine counted and observed since the last such report."""

    stats: EngineStats


class Outputs(Report, frozen=True, kw_only=True):
    """What a step brought, or some short ones, of all requests, in the order of the steps."""

    outputs: list[RequestOutput]


class RequestFailed(Report, frozen=True, kw_only=True):
    """The request was not accepted, or cannot go on."""

    request_id: str
    failure: Failure


class JobEvents(Report, frozen=True, kw_only=True):
    """What one round of slices brought, of all jobs."""

    events: list[Tagged]


class Reply(Report, frozen=True, kw_only=True):
    """The answer to a Call: its value in MessagePack, or its failure."""

    call_id: int
    body: msgspec.Raw = msgspec.Raw(b"\xc0")
    failure: Failure | None = None

    def value(self, kind: type[T]) -> T:
        """The value, as the type that the call promises.

        Raises:
            EngineError: the one that the call failed with.
            msgspec.ValidationError: the value is of another type.
        """
        if self.failure is not None:
            raise self.failure.to_error()
        return msgspec.msgpack.decode(self.body, type=kind)


AnyReport = Ready | StartFailed | Heartbeat | Statistics | Outputs | RequestFailed | JobEvents | Reply


# ------------------------------------------------------------------------------------------------------------- codec

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[AnyCommand] = msgspec.msgpack.Decoder(AnyCommand)
_reports: msgspec.msgpack.Decoder[AnyReport] = msgspec.msgpack.Decoder(AnyReport)
_SPECS: dict[str, msgspec.msgpack.Decoder[Any]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind) for kind in get_args(JobSpec)
}
_EVENTS: dict[str, msgspec.msgpack.Decoder[Any]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind) for kind in get_args(JobEvent)
}


def encode(message: Command | Report) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode_command(data: bytes) -> AnyCommand:
    """Reads a message to a worker.

    Raises:
        msgspec.DecodeError: the bytes are no such message.
    """
    return _commands.decode(data)


def decode_report(data: bytes) -> AnyReport:
    """Reads a message from a worker.

    Raises:
        msgspec.DecodeError: the bytes are no such message.
    """
    return _reports.decode(data)


def reply(call_id: int, value: object) -> Reply:
    """The successful answer to a call."""
    return Reply(call_id=call_id, body=msgspec.Raw(_encoder.encode(value)))


def _unwrap(tagged: Tagged, decoders: dict[str, msgspec.msgpack.Decoder[Any]]) -> Any:
    decoder = decoders.get(tagged.kind)
    if decoder is None:
        raise msgspec.ValidationError(f"kind is {tagged.kind!r}; accepted: {', '.join(decoders)}")
    return decoder.decode(tagged.body)
