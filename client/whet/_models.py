"""Models and adapters: conversions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from whet._values import enum_value, enum_word, fill, moment, new_request_id, optional, reject, seconds
from whet.errors import FailedPreconditionError, NotFoundError
from whet.types import AdapterInfo, AdapterVersion, ModelInfo, WeightedAdapter
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
        num_mtp_layers=model.num_mtp_layers,
        linear_modules=list(model.linear_modules),
        expert_parameters=list(model.expert_parameters),
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
        target_parameters=list(adapter.target_parameters),
        num_parameters=adapter.num_parameters,
        created_at=moment(adapter, "create_time"),
        run_id=adapter.run_id,
        base_digest=adapter.base_digest,
        best_nll=optional(adapter, "best_nll"),
        parent=_from_version(adapter.parent) if adapter.HasField("parent") else None,
        data_digest=adapter.data_digest,
        sources=[from_weighted(source) for source in adapter.sources],
        combination_method=enum_word(model_pb2.CombinationMethod, "COMBINATION_METHOD_", adapter.combination_method),
        forced=adapter.forced,
    )


def _from_version(version: model_pb2.AdapterVersion) -> AdapterVersion:
    return AdapterVersion(name=version.name, version=optional(version, "version"))


def from_weighted(source: model_pb2.WeightedAdapter) -> WeightedAdapter:
    """A version and its weight."""
    return WeightedAdapter(name=source.adapter.name, version=optional(source.adapter, "version"), weight=source.weight)


def ancestors(name: str, version: int | None, adapters: Sequence[AdapterInfo]) -> list[AdapterInfo]:
    """What a version came from, and itself: each after all that it came from. Versions that were deleted are missing.

    Args:
        version: None: the live one.
        adapters: all of one model.
    Raises:
        NotFoundError: there is no such version.
    """
    known: dict[tuple[str, int | None], AdapterInfo] = {(a.name, a.version): a for a in adapters}
    chosen = next(
        (a for a in adapters if a.name == name and (a.live if version is None else a.version == version)), None
    )
    if chosen is None:
        what = "live version" if version is None else f"version {version}"
        raise NotFoundError(f"there is no {what} of an adapter {name!r}", reason="ADAPTER_VERSION_NOT_FOUND")
    ordered: dict[tuple[str, int], AdapterInfo] = {}
    waiting = [chosen]
    while waiting:
        adapter = waiting[-1]
        origins: list[AdapterVersion | WeightedAdapter] = [
            *([adapter.parent] if adapter.parent else ()),
            *adapter.sources,
        ]
        found = (known.get((origin.name, origin.version or 0)) for origin in origins)
        missing = [a for a in found if a is not None and (a.name, a.version) not in ordered and a not in waiting]
        if missing:
            waiting.append(missing[0])
        else:
            ordered[adapter.name, adapter.version] = waiting.pop()
    return list(ordered.values())


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


def load_adapter_request(
    name: str, model: str, version: int | None, force: bool = False
) -> model_pb2.LoadAdapterRequest:
    """One adapter to bring into memory."""
    request = model_pb2.LoadAdapterRequest(request_id=new_request_id(None), model=model, name=name, force=force)
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


def version_before(live: AdapterInfo) -> int:
    """The version of the same name that the live one went on from.

    Raises:
        FailedPreconditionError: there is none.
    """
    if live.parent is None or live.parent.name != live.name or live.parent.version is None:
        began = f"went on from {live.parent}" if live.parent is not None else "went on from no other version"
        raise FailedPreconditionError(
            f"version {live.version} of adapter {live.name!r} {began}; name the version of it to go back to",
            reason="NO_EARLIER_VERSION",
        )
    return live.parent.version


def rename_adapter_request(name: str, new_name: str, model: str) -> model_pb2.RenameAdapterRequest:
    """One adapter to rename."""
    return model_pb2.RenameAdapterRequest(request_id=new_request_id(None), model=model, name=name, new_name=new_name)


def prune_adapters_request(
    name: str | None, model: str, keep_last: int, dry_run: bool
) -> model_pb2.PruneAdapterVersionsRequest:
    """Versions to delete."""
    request = model_pb2.PruneAdapterVersionsRequest(
        request_id=new_request_id(None), model=model, name=name or "", dry_run=dry_run
    )
    fill(request, {"keep_last": keep_last}, ("keep_last",))
    return request


AdapterSources = Mapping[str, float] | Sequence[WeightedAdapter]
"""Names to weights, or versions with weights."""


def to_sources(sources: AdapterSources, field: str = "sources") -> list[model_pb2.WeightedAdapter]:
    """Adapters with weights.

    Raises:
        InvalidArgumentError: something else was given.
    """
    if isinstance(sources, Mapping):
        sources = [WeightedAdapter(name=name, weight=weight) for name, weight in sources.items()]
    messages = []
    for index, source in enumerate(sources):
        if not isinstance(source, WeightedAdapter):
            reject(f"{field}[{index}]", source, "a WeightedAdapter; or, for all of them, names to weights")
        message = model_pb2.WeightedAdapter()
        fill(message.adapter, {"name": source.name, "version": source.version}, ("name", "version"))
        fill(message, {"weight": source.weight}, ("weight",))
        messages.append(message)
    return messages


def combine_adapters_request(
    name: str, sources: AdapterSources, model: str, method: str | None, force: bool
) -> model_pb2.CombineAdaptersRequest:
    """Several adapters to make one of."""
    return model_pb2.CombineAdaptersRequest(
        request_id=new_request_id(None),
        model=model,
        name=name,
        sources=to_sources(sources),
        method=enum_value(model_pb2.CombinationMethod, "COMBINATION_METHOD_", method, "method"),
        force=force,
    )


def export_adapter_request(name: str, model: str, version: int | None) -> model_pb2.ExportAdapterRequest:
    """One adapter to download."""
    request = model_pb2.ExportAdapterRequest(request_id=new_request_id(None), model=model, name=name)
    fill(request, {"version": version}, ("version",))
    return request
