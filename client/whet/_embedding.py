"""Embed: requests and responses."""

from __future__ import annotations

from collections.abc import Sequence

from whet._generation import to_token_ids
from whet._values import adapter_selector, enum_value, fill, known_seconds, new_request_id, optional
from whet.types import Embeddings
from whet.v1 import embedding_pb2

EmbedInputs = str | Sequence[str] | Sequence[Sequence[int]]
"""One text, or texts, or token ids of each input."""

INPUTS_PER_REQUEST = 256
"""Larger batches travel in several requests, so that no batch meets the server's limits of one request."""


def embed_requests(
    inputs: EmbedInputs,
    *,
    model: str,
    normalize: bool | None,
    dimensions: int | None,
    pooling: str | None,
    input_type: str | None,
    instruction: str | None,
    adapter: str | None,
    adapter_version: int | None,
    request_id: str | None,
) -> list[embedding_pb2.EmbedRequest]:
    """The requests of ``embed``; at least one, so that the server answers for an empty batch, too."""
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    template = embedding_pb2.EmbedRequest(
        request_id=new_request_id(request_id),
        model=model,
        pooling=enum_value(embedding_pb2.Pooling, "POOLING_", pooling, "pooling"),
        input_type=enum_value(embedding_pb2.InputType, "INPUT_TYPE_", input_type, "input_type"),
        adapter=adapter_selector(adapter, adapter_version),
    )
    options = {"normalize": normalize, "dimensions": dimensions, "instruction": instruction}
    fill(template, options, options)
    requests = []
    for begin in range(0, max(1, len(texts)), INPUTS_PER_REQUEST):
        request = embedding_pb2.EmbedRequest()
        request.CopyFrom(template)
        for index, text in enumerate(texts[begin : begin + INPUTS_PER_REQUEST], start=begin):
            if isinstance(text, str):
                request.inputs.add(text=text)
            else:
                request.inputs.add(token_ids=to_token_ids(text, f"inputs[{index}]"))
        requests.append(request)
    return requests


def from_embeddings(responses: Sequence[embedding_pb2.EmbedResponse]) -> Embeddings:
    """What ``embed`` returns, of all its requests."""
    return Embeddings(
        request_id=responses[0].request_id,
        vectors=[list(embedding.values) for response in responses for embedding in response.embeddings],
        dimensions=responses[0].dimensions,
        num_tokens=sum(response.num_tokens for response in responses),
        seconds=sum(known_seconds(response, "duration") for response in responses),
        adapter_version=optional(responses[-1], "adapter_version"),
    )
