"""Models and adapters: conversions."""

from __future__ import annotations

from whet._values import enum_word, fill, moment, new_request_id, optional, seconds
from whet.types import AdapterInfo, ModelInfo
from whet.v1 import model_pb2

PAGE_SIZE = 500


def from_model(model: model_pb2.Model) -> ModelInfo:
    """A model; what is not known before it is loaded stays None."""
    state = enum_word(model_pb2.ModelState, "MODEL_STATE_", model.state)
    if not model.num_parameters:
        return ModelInfo(name=model.name, state=state, error=model.error)
    return ModelInfo(
        name=model.name,
        state=state,
        error=model.error,
        model_type=model.model_type,
        task=enum_word(model_pb2.Task, "TASK_", model.task),
        dtype=model.dtype,
        quantization=model.quantization,
        num_parameters=model.num_parameters,
        weights_bytes=model.weights_bytes,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        max_model_len=model.max_model_len,
        num_blocks=model.num_blocks,
        block_size=model.block_size,
        kv_cache_bytes=model.kv_cache_bytes,
        num_slots=model.num_slots,
        state_bytes=model.state_bytes,
        linear_modules=list(model.linear_modules),
        weights_digest=model.weights_digest,
        embedding_dimensions=model.embedding_dimensions,
        device=model.device,
        load_seconds=seconds(model, "load_duration"),
        has_chat_template=optional(model, "has_chat_template"),
    )


def from_adapter(adapter: model_pb2.Adapter) -> AdapterInfo:
    """One version of an adapter."""
    return AdapterInfo(
        model=adapter.model,
        name=adapter.name,
        version=adapter.version,
        live=adapter.live,
        loaded=adapter.loaded,
        rank=adapter.rank,
        alpha=adapter.alpha,
        use_rslora=adapter.use_rslora,
        target_modules=list(adapter.target_modules),
        num_parameters=adapter.num_parameters,
        created_at=moment(adapter, "create_time"),
        run_id=adapter.run_id,
        base_digest=adapter.base_digest,
        best_nll=optional(adapter, "best_nll"),
    )


def list_adapters_request(
    model: str | None, name: str | None, live_only: bool, page_token: str
) -> model_pb2.ListAdaptersRequest:
    """One page of adapters."""
    return model_pb2.ListAdaptersRequest(
        request_id=new_request_id(None),
        page_size=PAGE_SIZE,
        page_token=page_token,
        model=model or "",
        name=name or "",
        live_only=live_only,
    )


def get_adapter_request(name: str, model: str, version: int | None) -> model_pb2.GetAdapterRequest:
    """One adapter."""
    request = model_pb2.GetAdapterRequest(request_id=new_request_id(None), model=model, name=name)
    fill(request, {"version": version}, ("version",))
    return request


def load_adapter_request(name: str, model: str, version: int | None) -> model_pb2.LoadAdapterRequest:
    """One adapter to bring into memory."""
    request = model_pb2.LoadAdapterRequest(request_id=new_request_id(None), model=model, name=name)
    fill(request, {"version": version}, ("version",))
    return request


def unload_adapter_request(name: str, model: str, version: int | None) -> model_pb2.UnloadAdapterRequest:
    """One adapter to free."""
    request = model_pb2.UnloadAdapterRequest(request_id=new_request_id(None), model=model, name=name)
    fill(request, {"version": version}, ("version",))
    return request


def delete_adapter_request(name: str, model: str, version: int | None) -> model_pb2.DeleteAdapterRequest:
    """One adapter to remove."""
    request = model_pb2.DeleteAdapterRequest(request_id=new_request_id(None), model=model, name=name)
    fill(request, {"version": version}, ("version",))
    return request


def export_adapter_request(name: str, model: str, version: int | None) -> model_pb2.ExportAdapterRequest:
    """One adapter to download."""
    request = model_pb2.ExportAdapterRequest(request_id=new_request_id(None), model=model, name=name)
    fill(request, {"version": version}, ("version",))
    return request
