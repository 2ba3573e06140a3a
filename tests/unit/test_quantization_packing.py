"""Packing of integers into words, and the arithmetic that makes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from engine.quantization.packing import Bits, pack, pack_outputs, packed_width, unpack, unpack_outputs
from engine.quantization.quantize import quantize_rows
from engine.quantization.safetensors_writer import SafetensorsWriter, TensorEntry

BITS = st.sampled_from([4, 8])


def integers(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), bits=BITS, seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_packing_is_that_of_compressed_tensors_and_reverses(rows: int, columns: int, bits: Bits, seed: int) -> None:
    values = integers(rows, columns, bits, seed)
    packed = pack(values, bits)
    assert torch.equal(packed, pack_to_int32(values, bits))
    assert packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack(packed, columns, bits), values)


@given(rows=st.integers(1, 40), columns=st.integers(1, 9), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_zero_points_pack_along_the_outputs_as_in_compressed_tensors(rows: int, columns: int, seed: int) -> None:
    values = integers(rows, columns, 4, seed)
    packed = pack_outputs(values, 4)
    assert torch.equal(packed, pack_to_int32(values, 4, packed_dim=0))
    assert torch.equal(unpack_outputs(packed, rows, 4), values)
    assert torch.equal(unpack_from_int32(packed, 4, values.shape, packed_dim=0), values)


WEIGHTS = st.tuples(
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([1e-6, 1e-2, 1.0, 300.0]),
    st.floats(-3.0, 3.0),
    st.integers(0, 999),
)
"""Rows, groups, standard deviation, mean in deviations, seed."""


def weight(shape: tuple[int, int, float, float, int], group_size: int) -> torch.Tensor:
    rows, groups, deviation, mean, seed = shape
    generator = torch.Generator().manual_seed(seed)
    return deviation * (torch.randn(rows, groups * group_size, generator=generator) + mean)


@given(shape=WEIGHTS, bits=BITS, symmetric=st.booleans())
@settings(deadline=None, max_examples=100)
def test_without_search_no_value_is_further_than_half_a_step(
    shape: tuple[int, int, float, float, int], bits: Bits, symmetric: bool
) -> None:
    w = weight(shape, 32)
    quantized = quantize_rows(w, bits=bits, group_size=32, symmetric=symmetric, search=False)
    step = quantized.scale.repeat_interleave(32, dim=1)
    assert bool(((w - quantized.dequantize()).abs() <= 0.5 * step * (1 + 1e-4)).all())


@given(shape=WEIGHTS, symmetric=st.booleans())
@settings(deadline=None, max_examples=60)
def test_search_never_has_more_squared_error_in_any_group(
    shape: tuple[int, int, float, float, int], symmetric: bool
) -> None:
    w = weight(shape, 32)
    errors = []
    for search in (False, True):
        quantized = quantize_rows(w, bits=4, group_size=32, symmetric=symmetric, search=search)
        errors.append((w - quantized.dequantize()).square().view(w.shape[0], -1, 32).sum(-1))
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())


def test_search_lowers_the_error_of_normal_weights_by_a_tenth() -> None:
    """Where it gained nothing, the search would be a waste of time."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    plain, searched = (
        (w - quantize_rows(w, bits=4, group_size=128, search=search).dequantize()).square().mean()
        for search in (False, True)
    )
    assert searched < 0.9 * plain


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_tiny_values_give_finite_scales(symmetric: bool, dtype: torch.dtype) -> None:
    w = torch.zeros(3, 64)
    w[1] = 1e-9
    quantized = quantize_rows(w, bits=4, group_size=32, symmetric=symmetric, scale_dtype=dtype)
    assert quantized.scale.dtype == dtype
    assert bool((quantized.scale > 0).all())
    assert bool((quantized.dequantize() - w).abs().max() <= 1e-9)
    assert torch.equal(quantized.dequantize()[0], torch.zeros(64))


@pytest.mark.parametrize("shard_bytes", [1 << 30, 100])
def test_written_tensors_read_back_whole_or_in_shards(tmp_path: Path, shard_bytes: int) -> None:
    tensors = {
        "a": torch.arange(12, dtype=torch.int32).view(3, 4),
        "b": torch.randn(5, 3).to(torch.bfloat16),
        "c": torch.tensor([7, 9]),
        "d": torch.randn(0, 2),
        "e": torch.randn(4, 10).T,
    }
    entries = [TensorEntry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(tmp_path, entries, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        size = writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert size == sum(file.stat().st_size for file in files)
    assert (len(files) > 1) == (shard_bytes == 100)
    found = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            found.update({name: (opened.get_tensor(name), file.name) for name in opened.keys()})  # noqa: SIM118
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name][0], tensor)
        assert found[name][0].dtype == tensor.dtype
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for name, (_, file) in found.items()}
        assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in entries)
