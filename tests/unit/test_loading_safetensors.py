"""Safetensors directories: single file, shards, and every way they can be broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import FormatError, NotFoundError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model_path
from tests.unit.loading_files import TINY_LLAMA, write_directory

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12.0).view(3, 4),
    "model.norm.weight": torch.ones(4, dtype=torch.bfloat16),
    "lm_head.weight": torch.zeros(3, 4, dtype=torch.float16),
}


def write_sharded(path: Path, weight_map: dict[str, str] | None = None) -> Path:
    """Two shards and their index."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY_LLAMA))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    first, *others = TENSORS
    save_file({first: TENSORS[first]}, path / names[0])
    save_file({name: TENSORS[name] for name in others}, path / names[1])
    index = {first: names[0], **dict.fromkeys(others, names[1])} if weight_map is None else weight_map
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_views_of_the_mapping(tmp_path: Path, layout: str) -> None:
    """Both layouts give the same names, types and values, and reading twice allocates nothing."""
    path = write_directory(tmp_path / "m", TENSORS) if layout == "single" else write_sharded(tmp_path / "m")
    checkpoint = open_checkpoint(path)
    assert sorted(checkpoint.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        got = checkpoint.get(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.get(name).data_ptr() == got.data_ptr()
    assert checkpoint.digest() == open_checkpoint(path).digest()


def test_paths_that_mean_the_same_model(tmp_path: Path) -> None:
    """A directory, a shard and the index all resolve to the directory; the only .gguf of a directory to that file."""
    path = write_sharded(tmp_path / "m")
    for name in ("", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        assert resolve_model_path(path / name) == path
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "x.gguf").touch()
    assert resolve_model_path(tmp_path / "g") == tmp_path / "g" / "x.gguf"


@pytest.mark.parametrize("name", ["empty", "x.bin", "lonely/model.safetensors", "two"])
def test_paths_that_are_no_model(tmp_path: Path, name: str) -> None:
    """The message says what would be accepted."""
    for folder in ("empty", "lonely", "two"):
        (tmp_path / folder).mkdir()
    for file in ("x.bin", "lonely/model.safetensors", "two/a.gguf", "two/b.gguf"):
        (tmp_path / file).touch()
    with pytest.raises(FormatError, match="accepted: a Hugging Face directory"):
        open_checkpoint(tmp_path / name)
    with pytest.raises(NotFoundError, match="absent"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    "shard",
    ["../m/model-00001-of-00002.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", "absent.safetensors",
     "..\\x.safetensors", "x\0.safetensors", ""],
)  # fmt: skip
def test_index_names_files_of_its_directory_alone(tmp_path: Path, shard: str) -> None:
    path = write_sharded(tmp_path / "m", dict.fromkeys(TENSORS, shard))
    with pytest.raises(FormatError):
        open_checkpoint(path)


def test_links_out_of_the_directory_are_refused_but_for_the_hub_cache(tmp_path: Path) -> None:
    """snapshots/<revision>/file -> ../../blobs/<hash> is how huggingface_hub stores models; no other link is read."""
    outside = write_directory(tmp_path / "outside", TENSORS)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "config.json").write_text(json.dumps(TINY_LLAMA))
    (linked / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(FormatError, match="leaves its directory"):
        open_checkpoint(linked)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "abcdef")
    (snapshot / "config.json").write_text(json.dumps(TINY_LLAMA))
    (snapshot / "model.safetensors").symlink_to(blobs / "abcdef")
    assert sorted(open_checkpoint(snapshot).names()) == sorted(TENSORS)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    """A name that no shard holds is an error that names it."""
    shard = "model-00001-of-00002.safetensors"
    path = write_sharded(tmp_path / "m", {"model.embed_tokens.weight": shard, "model.ghost.weight": shard})
    with pytest.raises(FormatError, match=r"model\.ghost\.weight"):
        open_checkpoint(path)


def with_header(header: object, data: bytes = bytes(64)) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header of 2^62 bytes": struct.pack("<Q", 1 << 62) + b"{}",
    "not JSON": with_header(b"{{{{"),
    "deep JSON": with_header(b'{"a":' * 50_000),
    "shape overflows": with_header({"t": entry([1 << 62, 1 << 62], 0, 64)}),
    "past the end": with_header({"t": entry([1 << 20], 0, 4 << 20)}),
    "overlap": with_header({"t": entry([8], 0, 32), "u": entry([12], 16, 64)}),
    "gap": with_header({"t": entry([4], 0, 16), "u": entry([4], 48, 64)}),
    "trailing bytes": with_header({"t": entry([4], 0, 16)}),
    "negative offset": with_header({"t": entry([4], -16, 0)}),
    "unknown type": with_header({"t": {"dtype": "Q4", "shape": [16], "data_offsets": [0, 64]}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    """The error names the file."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzzed_files_raise_format_errors_alone(tmp_path: Path, data: st.DataObject) -> None:
    """A valid file with bytes changed or cut off either loads or raises FormatError."""
    write_directory(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    fault = file.name
    try:
        checkpoint = open_checkpoint(tmp_path)
        for name in checkpoint.names():
            checkpoint.get(name)
        checkpoint.digest()
    except FormatError as error:
        fault = str(error)
    assert file.name in fault
