import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from whet.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Split(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPLIT_UNSPECIFIED: _ClassVar[Split]
    SPLIT_TRAIN: _ClassVar[Split]
    SPLIT_EVAL: _ClassVar[Split]

class OnDisconnect(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_DISCONNECT_UNSPECIFIED: _ClassVar[OnDisconnect]
    ON_DISCONNECT_CONTINUE: _ClassVar[OnDisconnect]
    ON_DISCONNECT_CANCEL: _ClassVar[OnDisconnect]

class Optimizer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMIZER_UNSPECIFIED: _ClassVar[Optimizer]
    OPTIMIZER_ADAMW: _ClassVar[Optimizer]
    OPTIMIZER_SGD: _ClassVar[Optimizer]

class LrSchedule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LR_SCHEDULE_UNSPECIFIED: _ClassVar[LrSchedule]
    LR_SCHEDULE_CONSTANT: _ClassVar[LrSchedule]
    LR_SCHEDULE_LINEAR: _ClassVar[LrSchedule]
    LR_SCHEDULE_COSINE: _ClassVar[LrSchedule]

class ComputeDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPUTE_DTYPE_UNSPECIFIED: _ClassVar[ComputeDtype]
    COMPUTE_DTYPE_AUTO: _ClassVar[ComputeDtype]
    COMPUTE_DTYPE_FLOAT32: _ClassVar[ComputeDtype]
    COMPUTE_DTYPE_BFLOAT16: _ClassVar[ComputeDtype]

class LossOn(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_ON_UNSPECIFIED: _ClassVar[LossOn]
    LOSS_ON_COMPLETION: _ClassVar[LossOn]
    LOSS_ON_ALL: _ClassVar[LossOn]

class Publish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUBLISH_UNSPECIFIED: _ClassVar[Publish]
    PUBLISH_BEST: _ClassVar[Publish]
    PUBLISH_LAST: _ClassVar[Publish]

class StopReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_REASON_UNSPECIFIED: _ClassVar[StopReason]
    STOP_REASON_MAX_STEPS: _ClassVar[StopReason]
    STOP_REASON_EPOCHS: _ClassVar[StopReason]
    STOP_REASON_EARLY_STOPPING: _ClassVar[StopReason]
    STOP_REASON_CANCELLED: _ClassVar[StopReason]

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_QUEUED: _ClassVar[RunState]
    RUN_STATE_RUNNING: _ClassVar[RunState]
    RUN_STATE_FINISHED: _ClassVar[RunState]
    RUN_STATE_FAILED: _ClassVar[RunState]
    RUN_STATE_CANCELLED: _ClassVar[RunState]
    RUN_STATE_INTERRUPTED: _ClassVar[RunState]
SPLIT_UNSPECIFIED: Split
SPLIT_TRAIN: Split
SPLIT_EVAL: Split
ON_DISCONNECT_UNSPECIFIED: OnDisconnect
ON_DISCONNECT_CONTINUE: OnDisconnect
ON_DISCONNECT_CANCEL: OnDisconnect
OPTIMIZER_UNSPECIFIED: Optimizer
OPTIMIZER_ADAMW: Optimizer
OPTIMIZER_SGD: Optimizer
LR_SCHEDULE_UNSPECIFIED: LrSchedule
LR_SCHEDULE_CONSTANT: LrSchedule
LR_SCHEDULE_LINEAR: LrSchedule
LR_SCHEDULE_COSINE: LrSchedule
COMPUTE_DTYPE_UNSPECIFIED: ComputeDtype
COMPUTE_DTYPE_AUTO: ComputeDtype
COMPUTE_DTYPE_FLOAT32: ComputeDtype
COMPUTE_DTYPE_BFLOAT16: ComputeDtype
LOSS_ON_UNSPECIFIED: LossOn
LOSS_ON_COMPLETION: LossOn
LOSS_ON_ALL: LossOn
PUBLISH_UNSPECIFIED: Publish
PUBLISH_BEST: Publish
PUBLISH_LAST: Publish
STOP_REASON_UNSPECIFIED: StopReason
STOP_REASON_MAX_STEPS: StopReason
STOP_REASON_EPOCHS: StopReason
STOP_REASON_EARLY_STOPPING: StopReason
STOP_REASON_CANCELLED: StopReason
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_QUEUED: RunState
RUN_STATE_RUNNING: RunState
RUN_STATE_FINISHED: RunState
RUN_STATE_FAILED: RunState
RUN_STATE_CANCELLED: RunState
RUN_STATE_INTERRUPTED: RunState

class TrainRequest(_message.Message):
    __slots__ = ("config", "examples")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    config: TrainConfig
    examples: TrainExamples
    def __init__(self, config: _Optional[_Union[TrainConfig, _Mapping]] = ..., examples: _Optional[_Union[TrainExamples, _Mapping]] = ...) -> None: ...

class TrainExamples(_message.Message):
    __slots__ = ("split", "examples")
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    split: Split
    examples: _containers.RepeatedCompositeFieldContainer[TrainExample]
    def __init__(self, split: _Optional[_Union[Split, str]] = ..., examples: _Optional[_Iterable[_Union[TrainExample, _Mapping]]] = ...) -> None: ...

class TrainExample(_message.Message):
    __slots__ = ("prompt_completion", "chat", "text", "instruction")
    PROMPT_COMPLETION_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    prompt_completion: PromptCompletion
    chat: _common_pb2.Chat
    text: str
    instruction: Instruction
    def __init__(self, prompt_completion: _Optional[_Union[PromptCompletion, _Mapping]] = ..., chat: _Optional[_Union[_common_pb2.Chat, _Mapping]] = ..., text: _Optional[str] = ..., instruction: _Optional[_Union[Instruction, _Mapping]] = ...) -> None: ...

class PromptCompletion(_message.Message):
    __slots__ = ("prompt", "completion")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    completion: str
    def __init__(self, prompt: _Optional[str] = ..., completion: _Optional[str] = ...) -> None: ...

class Instruction(_message.Message):
    __slots__ = ("instruction", "input", "output")
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    instruction: str
    input: str
    output: str
    def __init__(self, instruction: _Optional[str] = ..., input: _Optional[str] = ..., output: _Optional[str] = ...) -> None: ...

class TrainConfig(_message.Message):
    __slots__ = ("request_id", "model", "adapter", "lora", "init_adapter", "params", "eval_fraction", "on_disconnect")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    INIT_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    EVAL_FRACTION_FIELD_NUMBER: _ClassVar[int]
    ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    adapter: str
    lora: LoRAConfig
    init_adapter: _common_pb2.AdapterSelector
    params: TrainParams
    eval_fraction: float
    on_disconnect: OnDisconnect
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., adapter: _Optional[str] = ..., lora: _Optional[_Union[LoRAConfig, _Mapping]] = ..., init_adapter: _Optional[_Union[_common_pb2.AdapterSelector, _Mapping]] = ..., params: _Optional[_Union[TrainParams, _Mapping]] = ..., eval_fraction: _Optional[float] = ..., on_disconnect: _Optional[_Union[OnDisconnect, str]] = ...) -> None: ...

class LoRAConfig(_message.Message):
    __slots__ = ("rank", "alpha", "dropout", "use_rslora", "target_modules", "layers")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    USE_RSLORA_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., dropout: _Optional[float] = ..., use_rslora: _Optional[bool] = ..., target_modules: _Optional[_Iterable[str]] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class TrainParams(_message.Message):
    __slots__ = ("learning_rate", "optimizer", "beta1", "beta2", "eps", "momentum", "weight_decay", "schedule", "warmup_steps", "max_grad_norm", "batch_size", "gradient_accumulation_steps", "max_steps", "epochs", "max_seq_len", "packing", "shuffle", "seed", "compute_dtype", "loss_on", "eval_every", "early_stopping_patience", "checkpoint_every", "publish_every", "publish", "forward_tolerance")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQ_LEN_FIELD_NUMBER: _ClassVar[int]
    PACKING_FIELD_NUMBER: _ClassVar[int]
    SHUFFLE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    LOSS_ON_FIELD_NUMBER: _ClassVar[int]
    EVAL_EVERY_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_PATIENCE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_EVERY_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_EVERY_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    FORWARD_TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    optimizer: Optimizer
    beta1: float
    beta2: float
    eps: float
    momentum: float
    weight_decay: float
    schedule: LrSchedule
    warmup_steps: int
    max_grad_norm: float
    batch_size: int
    gradient_accumulation_steps: int
    max_steps: int
    epochs: float
    max_seq_len: int
    packing: bool
    shuffle: bool
    seed: int
    compute_dtype: ComputeDtype
    loss_on: LossOn
    eval_every: int
    early_stopping_patience: int
    checkpoint_every: int
    publish_every: int
    publish: Publish
    forward_tolerance: float
    def __init__(self, learning_rate: _Optional[float] = ..., optimizer: _Optional[_Union[Optimizer, str]] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., momentum: _Optional[float] = ..., weight_decay: _Optional[float] = ..., schedule: _Optional[_Union[LrSchedule, str]] = ..., warmup_steps: _Optional[int] = ..., max_grad_norm: _Optional[float] = ..., batch_size: _Optional[int] = ..., gradient_accumulation_steps: _Optional[int] = ..., max_steps: _Optional[int] = ..., epochs: _Optional[float] = ..., max_seq_len: _Optional[int] = ..., packing: _Optional[bool] = ..., shuffle: _Optional[bool] = ..., seed: _Optional[int] = ..., compute_dtype: _Optional[_Union[ComputeDtype, str]] = ..., loss_on: _Optional[_Union[LossOn, str]] = ..., eval_every: _Optional[int] = ..., early_stopping_patience: _Optional[int] = ..., checkpoint_every: _Optional[int] = ..., publish_every: _Optional[int] = ..., publish: _Optional[_Union[Publish, str]] = ..., forward_tolerance: _Optional[float] = ...) -> None: ...

class TrainResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: TrainEvent
    def __init__(self, event: _Optional[_Union[TrainEvent, _Mapping]] = ...) -> None: ...

class TrainEvent(_message.Message):
    __slots__ = ("run_id", "sequence", "create_time", "started", "step", "evaluation", "checkpoint", "published", "warning", "finished", "failed")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    sequence: int
    create_time: _timestamp_pb2.Timestamp
    started: RunStarted
    step: RunStep
    evaluation: RunEvaluation
    checkpoint: RunCheckpoint
    published: RunPublished
    warning: RunWarning
    finished: RunFinished
    failed: RunFailed
    def __init__(self, run_id: _Optional[str] = ..., sequence: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., started: _Optional[_Union[RunStarted, _Mapping]] = ..., step: _Optional[_Union[RunStep, _Mapping]] = ..., evaluation: _Optional[_Union[RunEvaluation, _Mapping]] = ..., checkpoint: _Optional[_Union[RunCheckpoint, _Mapping]] = ..., published: _Optional[_Union[RunPublished, _Mapping]] = ..., warning: _Optional[_Union[RunWarning, _Mapping]] = ..., finished: _Optional[_Union[RunFinished, _Mapping]] = ..., failed: _Optional[_Union[RunFailed, _Mapping]] = ...) -> None: ...

class RunStarted(_message.Message):
    __slots__ = ("num_trainable_parameters", "dataset", "target_modules", "total_steps", "resumed_from_step", "forward_difference")
    NUM_TRAINABLE_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    FORWARD_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    num_trainable_parameters: int
    dataset: Dataset
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    total_steps: int
    resumed_from_step: int
    forward_difference: float
    def __init__(self, num_trainable_parameters: _Optional[int] = ..., dataset: _Optional[_Union[Dataset, _Mapping]] = ..., target_modules: _Optional[_Iterable[str]] = ..., total_steps: _Optional[int] = ..., resumed_from_step: _Optional[int] = ..., forward_difference: _Optional[float] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("num_examples", "num_eval_examples", "num_tokens", "num_loss_tokens", "num_rejected", "rejected", "num_truncated")
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_EVAL_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    NUM_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    num_examples: int
    num_eval_examples: int
    num_tokens: int
    num_loss_tokens: int
    num_rejected: int
    rejected: _containers.RepeatedCompositeFieldContainer[RejectedExample]
    num_truncated: int
    def __init__(self, num_examples: _Optional[int] = ..., num_eval_examples: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_loss_tokens: _Optional[int] = ..., num_rejected: _Optional[int] = ..., rejected: _Optional[_Iterable[_Union[RejectedExample, _Mapping]]] = ..., num_truncated: _Optional[int] = ...) -> None: ...

class RejectedExample(_message.Message):
    __slots__ = ("split", "index", "reason", "message")
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    split: Split
    index: int
    reason: str
    message: str
    def __init__(self, split: _Optional[_Union[Split, str]] = ..., index: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class RunStep(_message.Message):
    __slots__ = ("step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "num_loss_tokens", "tokens_per_second", "step_duration", "eta", "peak_memory_bytes", "skipped")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    STEP_DURATION_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_loss_tokens: int
    tokens_per_second: float
    step_duration: _duration_pb2.Duration
    eta: _duration_pb2.Duration
    peak_memory_bytes: int
    skipped: bool
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[float] = ..., loss: _Optional[float] = ..., learning_rate: _Optional[float] = ..., grad_norm: _Optional[float] = ..., num_tokens: _Optional[int] = ..., num_loss_tokens: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., step_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., eta: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., peak_memory_bytes: _Optional[int] = ..., skipped: _Optional[bool] = ...) -> None: ...

class RunEvaluation(_message.Message):
    __slots__ = ("step", "nll", "num_loss_tokens", "is_best", "duration")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NLL_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_BEST_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    nll: float
    num_loss_tokens: int
    is_best: bool
    duration: _duration_pb2.Duration
    def __init__(self, step: _Optional[int] = ..., nll: _Optional[float] = ..., num_loss_tokens: _Optional[int] = ..., is_best: _Optional[bool] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RunCheckpoint(_message.Message):
    __slots__ = ("step", "path", "is_best", "duration")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    IS_BEST_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    path: str
    is_best: bool
    duration: _duration_pb2.Duration
    def __init__(self, step: _Optional[int] = ..., path: _Optional[str] = ..., is_best: _Optional[bool] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RunPublished(_message.Message):
    __slots__ = ("step", "adapter", "version")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    step: int
    adapter: str
    version: int
    def __init__(self, step: _Optional[int] = ..., adapter: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class RunWarning(_message.Message):
    __slots__ = ("step", "reason", "message")
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    step: int
    reason: str
    message: str
    def __init__(self, step: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class RunFinished(_message.Message):
    __slots__ = ("step", "stop_reason", "base_nll", "final_nll", "best_nll", "best_step", "version", "adapter_path", "checkpoint_path", "duration", "num_tokens")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    BASE_NLL_FIELD_NUMBER: _ClassVar[int]
    FINAL_NLL_FIELD_NUMBER: _ClassVar[int]
    BEST_NLL_FIELD_NUMBER: _ClassVar[int]
    BEST_STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PATH_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_PATH_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    step: int
    stop_reason: StopReason
    base_nll: float
    final_nll: float
    best_nll: float
    best_step: int
    version: int
    adapter_path: str
    checkpoint_path: str
    duration: _duration_pb2.Duration
    num_tokens: int
    def __init__(self, step: _Optional[int] = ..., stop_reason: _Optional[_Union[StopReason, str]] = ..., base_nll: _Optional[float] = ..., final_nll: _Optional[float] = ..., best_nll: _Optional[float] = ..., best_step: _Optional[int] = ..., version: _Optional[int] = ..., adapter_path: _Optional[str] = ..., checkpoint_path: _Optional[str] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class RunFailed(_message.Message):
    __slots__ = ("step", "error")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    step: int
    error: RunError
    def __init__(self, step: _Optional[int] = ..., error: _Optional[_Union[RunError, _Mapping]] = ...) -> None: ...

class RunError(_message.Message):
    __slots__ = ("code", "reason", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("run_id", "state", "config", "create_time", "start_time", "end_time", "step", "total_steps", "loss", "base_nll", "final_nll", "best_nll", "best_step", "version", "error")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    BASE_NLL_FIELD_NUMBER: _ClassVar[int]
    FINAL_NLL_FIELD_NUMBER: _ClassVar[int]
    BEST_NLL_FIELD_NUMBER: _ClassVar[int]
    BEST_STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    state: RunState
    config: TrainConfig
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    step: int
    total_steps: int
    loss: float
    base_nll: float
    final_nll: float
    best_nll: float
    best_step: int
    version: int
    error: RunError
    def __init__(self, run_id: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., config: _Optional[_Union[TrainConfig, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., loss: _Optional[float] = ..., base_nll: _Optional[float] = ..., final_nll: _Optional[float] = ..., best_nll: _Optional[float] = ..., best_step: _Optional[int] = ..., version: _Optional[int] = ..., error: _Optional[_Union[RunError, _Mapping]] = ...) -> None: ...

class WatchRunRequest(_message.Message):
    __slots__ = ("request_id", "run_id", "from_step")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    from_step: int
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., from_step: _Optional[int] = ...) -> None: ...

class WatchRunResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: TrainEvent
    def __init__(self, event: _Optional[_Union[TrainEvent, _Mapping]] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("request_id", "run_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ...) -> None: ...

class GetRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("request_id", "page_size", "page_token", "model", "adapter", "state")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    page_size: int
    page_token: str
    model: str
    adapter: str
    state: RunState
    def __init__(self, request_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., model: _Optional[str] = ..., adapter: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ...) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs", "next_page_token")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    next_page_token: str
    def __init__(self, runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelRunRequest(_message.Message):
    __slots__ = ("request_id", "run_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ...) -> None: ...

class CancelRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class ResumeRunRequest(_message.Message):
    __slots__ = ("request_id", "run_id", "on_disconnect")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    on_disconnect: OnDisconnect
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., on_disconnect: _Optional[_Union[OnDisconnect, str]] = ...) -> None: ...

class ResumeRunResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: TrainEvent
    def __init__(self, event: _Optional[_Union[TrainEvent, _Mapping]] = ...) -> None: ...

class AdaptRequest(_message.Message):
    __slots__ = ("request_id", "model", "adapter", "lora", "examples", "steps", "learning_rate", "max_grad_norm", "max_seq_len", "loss_on", "seed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQ_LEN_FIELD_NUMBER: _ClassVar[int]
    LOSS_ON_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    adapter: str
    lora: LoRAConfig
    examples: _containers.RepeatedCompositeFieldContainer[TrainExample]
    steps: int
    learning_rate: float
    max_grad_norm: float
    max_seq_len: int
    loss_on: LossOn
    seed: int
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., adapter: _Optional[str] = ..., lora: _Optional[_Union[LoRAConfig, _Mapping]] = ..., examples: _Optional[_Iterable[_Union[TrainExample, _Mapping]]] = ..., steps: _Optional[int] = ..., learning_rate: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., max_seq_len: _Optional[int] = ..., loss_on: _Optional[_Union[LossOn, str]] = ..., seed: _Optional[int] = ...) -> None: ...

class AdaptResponse(_message.Message):
    __slots__ = ("loss_before", "loss_after", "version", "steps", "num_tokens", "num_loss_tokens", "duration")
    LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    loss_before: float
    loss_after: float
    version: int
    steps: int
    num_tokens: int
    num_loss_tokens: int
    duration: _duration_pb2.Duration
    def __init__(self, loss_before: _Optional[float] = ..., loss_after: _Optional[float] = ..., version: _Optional[int] = ..., steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_loss_tokens: _Optional[int] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
