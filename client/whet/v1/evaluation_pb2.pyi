import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from whet.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PerplexityRequest(_message.Message):
    __slots__ = ("request_id", "model", "adapter", "text", "token_ids", "window", "stride", "max_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    adapter: _common_pb2.AdapterSelector
    text: str
    token_ids: _common_pb2.TokenIds
    window: int
    stride: int
    max_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., adapter: _Optional[_Union[_common_pb2.AdapterSelector, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., window: _Optional[int] = ..., stride: _Optional[int] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class PerplexityResponse(_message.Message):
    __slots__ = ("progress", "result")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    progress: PerplexityProgress
    result: PerplexityResult
    def __init__(self, progress: _Optional[_Union[PerplexityProgress, _Mapping]] = ..., result: _Optional[_Union[PerplexityResult, _Mapping]] = ...) -> None: ...

class PerplexityProgress(_message.Message):
    __slots__ = ("windows_done", "windows_total", "num_tokens", "nll")
    WINDOWS_DONE_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NLL_FIELD_NUMBER: _ClassVar[int]
    windows_done: int
    windows_total: int
    num_tokens: int
    nll: float
    def __init__(self, windows_done: _Optional[int] = ..., windows_total: _Optional[int] = ..., num_tokens: _Optional[int] = ..., nll: _Optional[float] = ...) -> None: ...

class PerplexityResult(_message.Message):
    __slots__ = ("request_id", "nll", "perplexity", "standard_error", "num_tokens", "num_windows", "duration", "adapter_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NLL_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    nll: float
    perplexity: float
    standard_error: float
    num_tokens: int
    num_windows: int
    duration: _duration_pb2.Duration
    adapter_version: int
    def __init__(self, request_id: _Optional[str] = ..., nll: _Optional[float] = ..., perplexity: _Optional[float] = ..., standard_error: _Optional[float] = ..., num_tokens: _Optional[int] = ..., num_windows: _Optional[int] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., adapter_version: _Optional[int] = ...) -> None: ...
