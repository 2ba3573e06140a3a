"""GGUF containers: agreement with the gguf package, configurations, tensors, and every way a file can be broken."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import FormatError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.gguf_config import gguf_config
from engine.loading.gguf_file import BLOCK_SIZES, GGUFFile
from tests.unit.loading_files import llama_metadata, llama_tensors, write_gguf

FUZZ_SECONDS = 10.0
"""Of this process, whoever else wants the cores: what it catches are loops over counts that a file claims."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    extra = {"general.name": "tiny", "tokenizer.ggml.tokens": [f"t{i}" for i in range(32)], "x.flags": [True, False]}
    kinds = {"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q8_0, "token_embd.weight": gguf.GGMLQuantizationType.Q4_1}
    return write_gguf(path, llama_tensors(), metadata={**llama_metadata(), **extra}, types=kinds)


def read_all(path: Path) -> None:
    """What loading a model does with a file, short of building it."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        assert tuple(checkpoint.get(name).shape) == checkpoint.shape(name)
    checkpoint.digest()


def test_reader_agrees_with_the_gguf_package(smollm2_gguf: Path) -> None:
    """Every metadata value and every tensor's type, shape and place are what gguf.GGUFReader reads."""
    ours, theirs = GGUFFile(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == expected
    assert [(t.name, t.shape, t.type_id, t.offset, t.num_bytes) for t in ours.tensors.values()] == [
        (t.name, tuple(t.shape.tolist())[::-1], int(t.tensor_type), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    assert {int(kind): size for kind, size in gguf.constants.GGML_QUANT_SIZES.items()} == BLOCK_SIZES


def test_values_are_those_of_the_file_in_hugging_face_layout(tiny: Path) -> None:
    """q and k rows are un-permuted to rotate-half order, the rest is unchanged, float32 tensors are not copied."""
    stored, checkpoint = llama_tensors(), open_checkpoint(tiny)
    up = checkpoint.get("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(up, torch.from_numpy(stored["blk.1.ffn_up.weight"]))
    assert up.data_ptr() == checkpoint.get("model.layers.1.mlp.up_proj.weight").data_ptr()
    # Row 2i of a head is the i-th of the first half, row 2i + 1 the i-th of the second.
    k = stored["blk.1.attn_k.weight"].reshape(2, 8, 2, 64)
    expected = np.concatenate([k[:, :, 0], k[:, :, 1]], axis=1).reshape(32, 64)
    assert torch.equal(checkpoint.get("model.layers.1.self_attn.k_proj.weight"), torch.from_numpy(expected))
    with pytest.raises(KeyError):
        checkpoint.get("model.layers.9.mlp.up_proj.weight")


def test_large_tensors_are_dequantized_in_chunks_to_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk size does not show in the result; the last chunk is a partial one."""
    kinds = dict.fromkeys(llama_tensors(), gguf.GGMLQuantizationType.Q5_0)
    kinds = {name: kind for name, kind in kinds.items() if "norm" not in name}
    path = write_gguf(tmp_path / "q.gguf", llama_tensors(), metadata=llama_metadata(), types=kinds)
    whole = open_checkpoint(path).get("model.layers.0.mlp.gate_proj.weight")
    monkeypatch.setattr("engine.loading.gguf_checkpoint.CHUNK_VALUES", 64 * 7)
    chunked = open_checkpoint(path).get("model.layers.0.mlp.gate_proj.weight")
    assert torch.equal(whole, chunked)
    assert (whole - torch.from_numpy(llama_tensors()["blk.0.ffn_gate.weight"])).abs().max() < 0.2


@pytest.mark.parametrize(
    "kind",
    [k for k in gguf.GGMLQuantizationType if k in gguf.quants._type_traits or k.name in ("F32", "F16")],
    ids=lambda k: k.name,
)
def test_every_type_that_gguf_dequantizes_loads(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Stored bytes of each type give what gguf.dequantize gives."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = max(block, 64)
    raw = np.random.default_rng(1).integers(0, 255, (3, columns // block * block_bytes), dtype=np.uint8)
    raw[:, 1::2] &= 0x3F  # keeps half-precision scales finite
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for key, value in llama_metadata().items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    stored = raw.view(np.float32) if kind.name == "F32" else raw.view(np.float16) if kind.name == "F16" else raw
    writer.add_tensor("token_embd.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "t.gguf")
    expected = torch.from_numpy(np.array(gguf.dequantize(stored, kind), np.float32)).view(3, columns)
    torch.testing.assert_close(
        checkpoint.get("model.embed_tokens.weight").to(torch.float32), expected, rtol=0, atol=0, equal_nan=True
    )


def test_llama3_frequency_factors_become_long_rope(tmp_path: Path) -> None:
    """The divisors that rope_freqs.weight holds are applied as they are, whatever the length."""
    factors = np.linspace(1, 8, 8).astype(np.float32)
    path = write_gguf(
        tmp_path / "l3.gguf", {**llama_tensors(), "rope_freqs.weight": factors}, metadata=llama_metadata()
    )
    rope = open_checkpoint(path).config.rope["full_attention"]
    assert rope.rope_type == "longrope"
    assert rope.parameters["short_factor"] == rope.parameters["long_factor"] == pytest.approx(factors.tolist())
    assert rope.parameters["attention_factor"] == 1.0


def test_absent_head_is_tied(tmp_path: Path) -> None:
    tensors = llama_tensors()
    assert not open_checkpoint(
        write_gguf(tmp_path / "a.gguf", tensors, metadata=llama_metadata())
    ).config.tie_word_embeddings
    del tensors["output.weight"]
    assert open_checkpoint(
        write_gguf(tmp_path / "b.gguf", tensors, metadata=llama_metadata())
    ).config.tie_word_embeddings


def test_gemma3_has_two_ropes_a_pattern_and_shifted_norms(tmp_path: Path) -> None:
    """Metadata of Gemma 3 becomes gemma3_text, and norm weights lose the 1 that the converter added."""
    metadata = {
        key.replace("llama.", "gemma3."): value
        for key, value in llama_metadata(**{"llama.block_count": 7, "llama.rope.freq_base": 1e6}).items()
        if "rope.dimension" not in key
    }
    metadata |= {"gemma3.attention.key_length": 32, "gemma3.attention.value_length": 32}
    metadata |= {"gemma3.attention.sliding_window": 16}
    tensors = {"token_embd.weight": np.ones((32, 64)), "blk.0.post_ffw_norm.weight": np.full(64, 1.5)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "g.gguf", tensors, "gemma3", metadata))
    config = checkpoint.config
    assert (config.model_type, config.head_dim, config.sliding_window, config.qk_norm) == ("gemma3_text", 32, 16, True)
    assert config.layer_types == ("sliding_attention",) * 5 + ("full_attention", "sliding_attention")
    assert {kind: rope.theta for kind, rope in config.rope.items()} == {"sliding_attention": 1e4, "full_attention": 1e6}
    assert config.query_scale == 32**-0.5
    assert config.embedding_multiplier == 8.0
    norm = checkpoint.get("model.layers.0.post_feedforward_layernorm.weight")
    assert torch.equal(norm, torch.full((64,), 0.5))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"general.architecture": "mamba"}, "general.architecture"),
    "no layers": ({"llama.block_count": 0}, "block_count"),
    "layers beyond belief": ({"llama.block_count": 1 << 30}, "block_count"),
    "heads do not divide": ({"llama.attention.head_count_kv": 3}, "num_key_value_heads"),
    "experts": ({"llama.expert_count": 8}, "expert_count"),
    "unequal head sizes": ({"llama.attention.key_length": 8}, "rope.dimension_count"),
    "text for a number": ({"llama.embedding_length": "64"}, "embedding_length"),
    "unknown scaling": ({"llama.rope.scaling.type": "magic"}, "rope.scaling.type"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    "not a number": ({"llama.rope.freq_base": float("nan")}, "rope.freq_base"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_faults_are_named(tmp_path: Path, fault: str) -> None:
    """The message names the file and the key."""
    changes, named = FAULTS[fault]
    metadata = llama_metadata(**{k: v for k, v in changes.items() if k != "general.architecture"})
    arch = changes.get("general.architecture", "llama")
    path = write_gguf(tmp_path / "bad.gguf", llama_tensors(), arch, metadata)
    with pytest.raises(FormatError, match=named) as caught:
        gguf_config(GGUFFile(path))
    assert "bad.gguf" in str(caught.value)


def header(tensors: int, entries: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor_info(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "mapped"),
    "not GGUF": (b"PK\x03\x04" + bytes(64), "GGUF"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "2^60 tensors": (header(1 << 60, 0), "too short"),
    "2^63 entries": (header(0, 1 << 63), "too short"),
    "key of 2^62 bytes": (header(0, 1, struct.pack("<Q", 1 << 62) + bytes(64)), "metadata key"),
    "string of 2^62 bytes": (header(0, 1, text(b"k") + struct.pack("<IQ", 8, 1 << 62) + bytes(64)), "'k'"),
    "array of 2^61 numbers": (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61) + bytes(64)), "ends within"),
    "array of 2^61 strings": (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61) + bytes(64)), "too short"),
    "array of arrays": (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)), "array"),
    "unknown value type": (header(0, 1, text(b"k") + struct.pack("<I", 99) + bytes(64)), "type 99"),
    "key twice": (header(0, 2, 2 * (text(b"k") + struct.pack("<IB", 0, 1)) + bytes(64)), "twice"),
    "key not UTF-8": (header(0, 1, text(b"\xff\xfe") + struct.pack("<IB", 0, 1) + bytes(64)), "UTF-8"),
    "shape overflows": (header(1, 0, tensor_info(b"t", [1 << 33, 1 << 33]) + bytes(64)), "too short"),
    "shape of zero": (header(1, 0, tensor_info(b"t", [0, 4]) + bytes(64)), "shape"),
    "five dimensions": (header(1, 0, tensor_info(b"t", [1] * 5) + bytes(64)), "dimensions"),
    "half a block": (header(1, 0, tensor_info(b"t", [31], 8) + bytes(128)), "blocks"),
    "unknown tensor type": (header(1, 0, tensor_info(b"t", [4], 77) + bytes(64)), "type 77"),
    "offset past the end": (header(1, 0, tensor_info(b"t", [4], 0, 1 << 40) + bytes(64)), "too short"),
    "odd offset": (header(1, 0, tensor_info(b"t", [4], 0, 3) + bytes(64)), "multiple"),
    "overlap": (header(2, 0, tensor_info(b"t", [16]) + tensor_info(b"u", [16], 0, 32) + bytes(256)), "overlap"),
    "tensor twice": (header(2, 0, 2 * tensor_info(b"t", [4]) + bytes(256)), "twice"),
    "trailing bytes": (header(1, 0, tensor_info(b"t", [4]) + bytes(4096)), "trailing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_at_once(tmp_path: Path, case: str) -> None:
    """A count, length or shape that the file cannot hold is refused before anything is allocated for it."""
    content, named = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(FormatError, match=named) as caught:
        _ = GGUFFile(path).tensors
    assert "hostile.gguf" in str(caught.value)
    assert time.process_time() - started < FUZZ_SECONDS


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzzed_files_raise_format_errors_alone(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A valid file with bytes changed, cut out or put in either loads or raises FormatError, soon."""
    content = bytearray(tiny.read_bytes())
    header_bytes = GGUFFile(tiny).header_bytes
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers are where a change matters; the rest is numbers.
        at = data.draw(st.integers(0, header_bytes - 1))
        match data.draw(st.sampled_from(["set", "word", "cut", "insert", "truncate"])):
            case "set":
                content[at] = data.draw(st.integers(0, 255))
            case "word":
                content[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, (1 << 64) - 1)))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 64))]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=64))
            case "truncate":
                del content[data.draw(st.integers(0, len(content))) :]
        if len(content) < header_bytes:
            break
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(content)
    started = time.process_time()
    fault = path.name
    try:
        read_all(path)
    except FormatError as error:
        fault = str(error)
    assert path.name in fault
    assert time.process_time() - started < FUZZ_SECONDS


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf", {**llama_tensors(), "blk.0.mystery.weight": np.ones(4)}, metadata=llama_metadata()
    )
    with pytest.raises(FormatError, match=r"blk\.0\.mystery\.weight"):
        open_checkpoint(path)


def test_digest_tells_weights_apart(tmp_path: Path) -> None:
    """The same file content gives the same digest; one changed weight another."""
    a = write_gguf(tmp_path / "a.gguf", llama_tensors(), metadata=llama_metadata())
    b = write_gguf(tmp_path / "b.gguf", llama_tensors(), metadata=llama_metadata())
    changed = llama_tensors()
    changed["blk.1.ffn_down.weight"][3, 5] += 1
    c = write_gguf(tmp_path / "c.gguf", changed, metadata=llama_metadata())
    assert open_checkpoint(a).digest() == open_checkpoint(b).digest() != open_checkpoint(c).digest()
