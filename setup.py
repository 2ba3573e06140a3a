"""Builds the CPU kernels. Everything else about the package is in pyproject.toml.

They are a plain shared library that engine.ops.cpu opens; where no compiler is found, the package installs without it,
and engine.ops.cpu says so.
"""

from glob import glob

from setuptools import Extension, setup

SOURCES = (
    *("entry", "ops", "pool", "choose", "sequence", "encoder", "low_rank", "avx2", "avx512", "avx512vnni"),
    *("gemm", "gemm_avx2", "gemm_avxvnni", "gemm_avx512", "gemm_avx512vnni"),
)

setup(
    ext_modules=[
        Extension(
            "engine.ops.cpu._kernels",
            sources=[f"engine/ops/cpu/{name}.cpp" for name in SOURCES],
            depends=[*glob("engine/ops/cpu/*.h"), *glob("engine/ops/cpu/*.inl")],
            # No fast-math: results are those of the written operations, and NaN stays NaN.
            # GCC 12 warns of variables in its own intrinsics (its bug 105593).
            extra_compile_args=[
                *("-std=c++20", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-pthread", "-g0"),
                *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
            ],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]
)
