"""The client of Whet: serve, fine-tune, quantize, evaluate and embed with the models of a Whet server.

    from whet import Client

    with Client("localhost:50051") as whet:
        for chunk in whet.generate("Once", model="smollm2-135m", max_tokens=64):
            print(chunk.text, end="")

``AsyncClient`` has the same names, for asyncio.
"""

from whet._async_streams import AsyncGeneration, AsyncMergeJob, AsyncQuantizeJob, AsyncTrainingRun
from whet._channel import TLS
from whet._retry import RetryPolicy
from whet._streams import Generation, MergeJob, QuantizeJob, TrainingRun
from whet.aio import AsyncClient
from whet.client import Client
from whet.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RunFailedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    WhetError,
)
from whet.events import (
    Checkpoint,
    Evaluation,
    Finished,
    Published,
    RejectedExample,
    RunStarted,
    Step,
    TrainEvent,
    Warned,
)
from whet.types import (
    Adaptation,
    AdapterChoice,
    AdapterInfo,
    AdapterVersion,
    Chunk,
    Completion,
    Embeddings,
    Example,
    MergeProgress,
    MergeReport,
    ModelInfo,
    PerplexityProgress,
    PerplexityResult,
    Prompt,
    QuantizeProgress,
    QuantizeReport,
    Reply,
    RunError,
    RunInfo,
    TensorError,
    Timings,
    TokenLogprob,
    Usage,
    WeightedAdapter,
)

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "Adaptation",
    "AdapterChoice",
    "AdapterInfo",
    "AdapterVersion",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncMergeJob",
    "AsyncQuantizeJob",
    "AsyncTrainingRun",
    "CancelledError",
    "Checkpoint",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "Embeddings",
    "Evaluation",
    "Example",
    "FailedPreconditionError",
    "FieldViolation",
    "Finished",
    "Generation",
    "InternalError",
    "InvalidArgumentError",
    "MergeJob",
    "MergeProgress",
    "MergeReport",
    "ModelInfo",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "PerplexityProgress",
    "PerplexityResult",
    "Prompt",
    "Published",
    "QuantizeJob",
    "QuantizeProgress",
    "QuantizeReport",
    "RejectedExample",
    "Reply",
    "RetryPolicy",
    "RunError",
    "RunFailedError",
    "RunInfo",
    "RunStarted",
    "Step",
    "TensorError",
    "Timings",
    "TokenLogprob",
    "TrainEvent",
    "TrainingRun",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
    "Warned",
    "WeightedAdapter",
    "WhetError",
]
