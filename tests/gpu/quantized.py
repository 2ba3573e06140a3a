"""Products by weights as they are stored, against products by the weight made wide, in float64 on the CPU."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from engine.context import packed_context
from engine.layers.linear import Linear
from engine.loading.gguf_blocks import BLOCK_TYPES
from engine.quantization.gguf import GGUFBlocks
from engine.quantization.int4 import Int4Grouped
from engine.quantization.int8 import Int8PerChannel
from engine.quantization.packing import unpack_outputs
from tests.gpu.checks import Worst, check
from tests.gpu.elementwise import needs_triton
from tests.gpu.kernels import ROUNDING, TYPES, Numbers, wide


@check
def int8_linear(device: torch.device) -> float:
    """One row and many, beyond what the kernel takes too; sizes that are no multiple of a block; strided rows."""
    needs_triton(device)
    worst = Worst()
    # (rows, inputs, outputs)
    shapes = [(1, 24, 40), (3, 130, 17), (20, 300, 70), (300, 16, 8)]
    if device.type == "cuda":
        shapes += [(1, 1024, 3584), (128, 3584, 1024), (7, 1024, 248320)]
    for (rows, inputs, outputs), dtype in itertools.product(shapes, TYPES):
        draw = Numbers(device, rows)
        linear = Linear(inputs, outputs, name="l", scheme=Int8PerChannel("int-quantized"), dtype=dtype)
        stored = torch.randint(-127, 128, (outputs, inputs), generator=draw.generator, dtype=torch.int8).to(device)
        scale = draw.normal(outputs, 1, dtype=dtype).abs() * 0.01
        linear.register_parameter("weight", nn.Parameter(stored, requires_grad=False))
        linear.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))
        x = draw.normal(rows, 2 * inputs, dtype=dtype)[:, :inputs]
        with torch.inference_mode():
            got = linear(x, packed_context([rows], device=device))
        x_, stored_, scale_ = wide(x, stored, scale)
        assert got.dtype == dtype
        # The torch form, which takes more rows than the kernel, rounds the wide weight.
        bound = ROUNDING[dtype] * (2 if rows > 256 else 1)
        worst.compare(got, F.linear(x_, stored_ * scale_), bound, f"{rows} x {inputs} to {outputs}, {dtype}")
    return worst.figure


@check
def grouped_linear(device: torch.device) -> float:
    """GGUF's blocks and our 4 bits, with and without zero points: one row and many, beyond what the kernel takes too;
    sizes that are no multiple of a block; strided rows."""
    needs_triton(device)
    worst = Worst()
    # (rows, inputs, outputs)
    shapes = [(1, 256, 40), (20, 768, 70), (300, 256, 8)]
    schemes = [*map(GGUFBlocks, BLOCK_TYPES.values()), Int4Grouped(32), Int4Grouped(128, symmetric=False)]
    cases = list(itertools.product(shapes, TYPES, schemes))
    if device.type == "cuda":
        large = [(1, 1024, 3584), (128, 3584, 1024), (7, 1024, 60000)]
        cases += itertools.product(large, TYPES[1:], (GGUFBlocks(BLOCK_TYPES["q4_1"]), schemes[-1]))
    for (rows, inputs, outputs), dtype, scheme in cases:
        draw = Numbers(device, rows)
        linear = Linear(inputs, outputs, name="l", scheme=scheme, dtype=dtype)
        for name, parameter in list(linear.named_parameters()):
            if parameter.is_floating_point():
                filled = draw.normal(*parameter.shape, dtype=parameter.dtype, scale=0.05)
            else:
                low, high = {torch.uint8: (0, 256), torch.int8: (-32, 32)}.get(parameter.dtype, (-(2**31), 2**31))
                filled = torch.randint(low, high, parameter.shape, generator=draw.generator, dtype=parameter.dtype)
            linear.register_parameter(name, nn.Parameter(filled.to(device), requires_grad=False))
        if isinstance(scheme, Int4Grouped):
            zero_point = None if scheme.symmetric else linear.get_parameter("weight_zero_point").data
            if zero_point is not None:
                zero = unpack_outputs(zero_point, outputs, 4).to(dtype)
                linear.register_buffer("zero_point", zero, persistent=False)
        x = draw.normal(rows, 2 * inputs, dtype=dtype)[:, :inputs]
        with torch.inference_mode():
            got = linear(x, packed_context([rows], device=device))
            x_, weight_ = wide(x, scheme.dequantize(linear))
        assert got.dtype == dtype
        # The weight is rounded to the type of x.
        what = f"{scheme.name}, {rows} x {inputs} to {outputs}, {dtype}"
        worst.compare(got, F.linear(x_, weight_), 2 * ROUNDING[dtype], what)
    return worst.figure
