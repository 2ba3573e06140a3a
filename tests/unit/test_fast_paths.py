"""Every fast path of the engine, with the plain form that it must agree with and the tests that show it.

A new kernel fails here until it is listed, and a listed reference or test that is gone fails as well. Functions with a
backward of their own have such a list in engine.verification (tests/unit/test_function_gradients.py).
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import engine.ops.triton
from engine.ops.cpu.library import KINDS

ROOT = Path(__file__).parents[2]
CPU_KERNELS, CPU_OPS = "tests/unit/test_cpu_kernels.py", "tests/unit/test_cpu_ops.py"
CPU_GRADIENTS = "tests/unit/test_cpu_gradients.py"
LOW_RANK = "tests/unit/test_low_rank.py::test_the_kernels_are_the_plain_operations_in_float64"
TRITON = "tests/unit/test_triton_kernels.py"

FAST_PATHS: dict[str, tuple[str, str]] = {
    # Operations of the library for CPUs (engine/ops/cpu/kernels.h).
    "cpu linear": ("torch.nn.functional.linear", f"{CPU_KERNELS}::test_products_are_those_of_the_stored_values"),
    "cpu widen_rows": (
        "engine.quantization.gguf.GGUFBlocks.dequantize",
        f"{CPU_KERNELS}::test_rows_are_the_stored_values_to_one_rounding",
    ),
    "cpu gather": ("torch.nn.functional.embedding", f"{CPU_KERNELS}::test_rows_by_number_are_the_stored_values"),
    "cpu rms_norm": ("engine.ops.root_norm.root_norm_reference", f"{CPU_OPS}::test_rms_norm"),
    "cpu rope_table": ("engine.layers.rope.RotaryEmbedding.cos_sin", f"{CPU_OPS}::test_rotation"),
    "cpu rope": ("engine.layers.rope.apply_rope", f"{CPU_OPS}::test_rotation"),
    "cpu attention": ("engine.ops.attention.attention_reference", f"{CPU_OPS}::test_decode_attention"),
    "cpu tiled_attention": ("engine.ops.attention.attention_reference", f"{CPU_OPS}::test_tiled_attention"),
    "cpu gated_activation": ("engine.ops.elementwise.ACTIVATIONS", f"{CPU_OPS}::test_gated_activation"),
    "cpu add": ("torch.add", f"{CPU_OPS}::test_add"),
    "cpu conv_step": ("engine.ops.causal_conv.causal_conv_step_slots", f"{CPU_OPS}::test_convolution_step"),
    "cpu delta_step": ("engine.ops.delta_rule.recurrent_gated_delta_rule", f"{CPU_OPS}::test_delta_step"),
    "cpu conv": ("engine.ops.causal_conv.taps_reference", f"{CPU_OPS}::test_convolution"),
    "cpu delta_chunk": (
        "engine.ops.delta_rule.recurrent_gated_delta_rule",
        f"{CPU_OPS}::test_delta_rule_of_a_sequence",
    ),
    "cpu float_product": (
        "torch.nn.functional.linear",
        f"{CPU_KERNELS}::test_products_of_many_rows_are_those_of_the_stored_values_and_so_are_their_gradients",
    ),
    "cpu layer_norm": ("torch.nn.functional.layer_norm", f"{CPU_OPS}::test_layer_norm"),
    "cpu bias_activation": ("engine.ops.elementwise.ACTIVATIONS", f"{CPU_OPS}::test_bias_and_activation"),
    "cpu lora_rows": ("engine.lora.slots.add_rows_reference", "tests/unit/test_lora_rows.py"),
    "cpu choose": ("engine.sampling.sampler.Sampler", "tests/unit/test_cpu_choose.py"),
    "cpu encoder_layers": (
        "engine.models.bert.BertLayer",
        "tests/unit/test_encoder_layers.py::test_layers_of_floats",
    ),
    "cpu token_likelihood": ("torch.nn.functional.cross_entropy", f"{CPU_OPS}::test_likelihood_of_tokens"),
    "cpu rms_norm_gradient": ("engine.ops.root_norm.root_norm_reference", f"{CPU_GRADIENTS}::test_rms_norm"),
    "cpu attention_gradient": ("engine.ops.attention.attention_reference", f"{CPU_GRADIENTS}::test_attention"),
    "cpu conv_gradient": ("engine.ops.causal_conv.taps_reference", f"{CPU_GRADIENTS}::test_convolution"),
    "cpu delta_chunk_gradient": (
        "engine.ops.delta_rule_gradient.gated_delta_rule_gradient",
        f"{CPU_GRADIENTS}::test_delta_rule",
    ),
    "cpu gated_activation_gradient": (
        "engine.ops.elementwise.gated_activation_reference",
        f"{CPU_GRADIENTS}::test_gated_activation",
    ),
    "cpu low_rank": ("engine.ops.low_rank.add_low_rank", LOW_RANK),
    "cpu low_rank_gradient": ("engine.ops.low_rank.add_low_rank", LOW_RANK),
    # Whole steps of them.
    "captured decode steps": (
        "engine.core.runner.Runner",
        "tests/engine/test_decode_graphs.py::test_captured_steps_give_the_same_tokens",
    ),
    "decode steps of the batch of the step before": (
        "engine.core.runner.Runner",
        "tests/engine/test_repeated_steps.py::test_the_same_tokens",
    ),
    "CUDA graphs of decode steps": (
        "engine.core.runner.Runner",
        "tests/engine/test_cuda_graphs.py::test_padded_steps_give_the_same_tokens",
    ),
    "decode steps launched ahead of the tokens of the last": (
        "engine.core.runner.Runner",
        "tests/engine/test_overlap.py::test_the_same_tokens",
    ),
    # Products by int8 activations.
    "cpu linear, rounded, many rows": (
        "engine.ops.cpu.gemm.rounded",
        "tests/unit/test_cpu_gemm.py::test_only_the_activations_are_rounded",
    ),
    "cpu linear, rounded, one row": (
        "engine.ops.cpu.gemm.rounded",
        f"{CPU_KERNELS}::test_integer_products_are_those_of_a_rounded_row",
    ),
    "16-bit floats as they are stored": (
        "engine.quantization.base.Unquantized",
        "tests/engine/test_half_weights.py::test_results_are_those_of_wide_weights",
    ),
    "sampling on the device": (
        "engine.sampling.sampler.Sampler",
        "tests/unit/test_sampling_on_device.py::test_the_same_tokens",
    ),
    # Forms of torch.
    "attention by scaled_dot_product_attention": (
        "engine.ops.attention.attention_reference",
        "tests/unit/test_attention.py",
    ),
    "delta rule by chunks": ("engine.ops.delta_rule.recurrent_gated_delta_rule", "tests/unit/test_delta_rule.py"),
    "linears of one input, which is rounded once": (
        "engine.layers.linear.Linear",
        "tests/unit/test_joint_linears.py::test_what_is_rounded_for_integers_is_rounded_once",
    ),
    "linears of one input as one product": (
        "engine.layers.linear.Linear",
        "tests/unit/test_joint_linears.py::test_the_same_outputs",
    ),
    # Kernels for CUDA, here in Triton's interpreter; on a device: tests/gpu.
    "triton conv_step": ("engine.ops.causal_conv.causal_conv_step_slots", TRITON),
    "triton delta_step": ("engine.ops.delta_rule.gated_delta_step_slots", TRITON),
    "triton paged_attention": ("engine.ops.attention.attention_reference", TRITON),
    "triton gated_activation": ("engine.ops.elementwise.ACTIVATIONS", TRITON),
    "triton rope": ("engine.layers.rope.apply_rope", TRITON),
    "triton int8_rows": ("engine.quantization.int8.Int8PerChannel.dequantize", TRITON),
    "triton grouped_rows": ("engine.quantization.gguf.GGUFBlocks.dequantize", TRITON),
    "triton lora_rows": ("engine.lora.slots.add_rows_reference", TRITON),
    "triton lora_segments": ("engine.lora.adapter.Adapter.delta", TRITON),
    "triton softmax_gradient": ("engine.ops.cross_entropy.nll_and_gradient_reference", TRITON),
    "triton rms_norm": ("engine.ops.norm.rms_norm", TRITON),
}


def resolve(path: str) -> object:
    """The object of a dotted path."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def test_every_kernel_is_listed() -> None:
    cpu = {f"cpu {kind}" for kind in KINDS}
    triton = {f"triton {module.name}" for module in pkgutil.iter_modules(engine.ops.triton.__path__)}
    assert cpu | triton <= set(FAST_PATHS)
    listed = {name for name in FAST_PATHS if name.split()[0] in ("cpu", "triton") and "," not in name}
    assert listed == cpu | triton


def test_references_and_tests_exist() -> None:
    for reference, test in FAST_PATHS.values():
        found = resolve(reference)
        assert callable(found) or isinstance(found, dict)
        assert not isinstance(found, ModuleType)
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in names if name else any(found.startswith("test_") for found in names)
