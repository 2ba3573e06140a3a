import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from whet.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class QuantizeScheme(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTIZE_SCHEME_UNSPECIFIED: _ClassVar[QuantizeScheme]
    QUANTIZE_SCHEME_Q8: _ClassVar[QuantizeScheme]
    QUANTIZE_SCHEME_Q4: _ClassVar[QuantizeScheme]

class QuantizeStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTIZE_STAGE_UNSPECIFIED: _ClassVar[QuantizeStage]
    QUANTIZE_STAGE_QUANTIZING: _ClassVar[QuantizeStage]
    QUANTIZE_STAGE_WRITING: _ClassVar[QuantizeStage]
    QUANTIZE_STAGE_EVALUATING: _ClassVar[QuantizeStage]
QUANTIZE_SCHEME_UNSPECIFIED: QuantizeScheme
QUANTIZE_SCHEME_Q8: QuantizeScheme
QUANTIZE_SCHEME_Q4: QuantizeScheme
QUANTIZE_STAGE_UNSPECIFIED: QuantizeStage
QUANTIZE_STAGE_QUANTIZING: QuantizeStage
QUANTIZE_STAGE_WRITING: QuantizeStage
QUANTIZE_STAGE_EVALUATING: QuantizeStage

class QuantizeRequest(_message.Message):
    __slots__ = ("request_id", "model", "scheme", "output", "group_size", "symmetric", "quantize_embeddings", "quantize_head", "eval_text", "eval_token_ids", "dry_run", "load")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    SYMMETRIC_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_HEAD_FIELD_NUMBER: _ClassVar[int]
    EVAL_TEXT_FIELD_NUMBER: _ClassVar[int]
    EVAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    scheme: QuantizeScheme
    output: str
    group_size: int
    symmetric: bool
    quantize_embeddings: bool
    quantize_head: bool
    eval_text: str
    eval_token_ids: _common_pb2.TokenIds
    dry_run: bool
    load: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., scheme: _Optional[_Union[QuantizeScheme, str]] = ..., output: _Optional[str] = ..., group_size: _Optional[int] = ..., symmetric: _Optional[bool] = ..., quantize_embeddings: _Optional[bool] = ..., quantize_head: _Optional[bool] = ..., eval_text: _Optional[str] = ..., eval_token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., dry_run: _Optional[bool] = ..., load: _Optional[bool] = ...) -> None: ...

class QuantizeResponse(_message.Message):
    __slots__ = ("progress", "report")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    progress: QuantizeProgress
    report: QuantizeReport
    def __init__(self, progress: _Optional[_Union[QuantizeProgress, _Mapping]] = ..., report: _Optional[_Union[QuantizeReport, _Mapping]] = ...) -> None: ...

class QuantizeProgress(_message.Message):
    __slots__ = ("stage", "tensors_done", "tensors_total", "tensor")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_DONE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    stage: QuantizeStage
    tensors_done: int
    tensors_total: int
    tensor: str
    def __init__(self, stage: _Optional[_Union[QuantizeStage, str]] = ..., tensors_done: _Optional[int] = ..., tensors_total: _Optional[int] = ..., tensor: _Optional[str] = ...) -> None: ...

class QuantizeReport(_message.Message):
    __slots__ = ("request_id", "output", "path", "bytes_in", "bytes_out", "ratio", "tensors", "num_quantized", "num_kept", "logit_kl", "perplexity_before", "perplexity_after", "num_eval_tokens", "duration", "loaded")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUANTIZED_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    LOGIT_KL_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_BEFORE_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_AFTER_FIELD_NUMBER: _ClassVar[int]
    NUM_EVAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    output: str
    path: str
    bytes_in: int
    bytes_out: int
    ratio: float
    tensors: _containers.RepeatedCompositeFieldContainer[TensorError]
    num_quantized: int
    num_kept: int
    logit_kl: float
    perplexity_before: float
    perplexity_after: float
    num_eval_tokens: int
    duration: _duration_pb2.Duration
    loaded: bool
    def __init__(self, request_id: _Optional[str] = ..., output: _Optional[str] = ..., path: _Optional[str] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., ratio: _Optional[float] = ..., tensors: _Optional[_Iterable[_Union[TensorError, _Mapping]]] = ..., num_quantized: _Optional[int] = ..., num_kept: _Optional[int] = ..., logit_kl: _Optional[float] = ..., perplexity_before: _Optional[float] = ..., perplexity_after: _Optional[float] = ..., num_eval_tokens: _Optional[int] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., loaded: _Optional[bool] = ...) -> None: ...

class TensorError(_message.Message):
    __slots__ = ("name", "relative_rmse", "max_abs", "num_elements", "bits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_RMSE_FIELD_NUMBER: _ClassVar[int]
    MAX_ABS_FIELD_NUMBER: _ClassVar[int]
    NUM_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    relative_rmse: float
    max_abs: float
    num_elements: int
    bits: float
    def __init__(self, name: _Optional[str] = ..., relative_rmse: _Optional[float] = ..., max_abs: _Optional[float] = ..., num_elements: _Optional[int] = ..., bits: _Optional[float] = ...) -> None: ...
