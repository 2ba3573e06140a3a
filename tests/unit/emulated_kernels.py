"""The CPU kernels with every instruction level, on a CPU that has AVX2 alone.

SIMDe (https://github.com/simd-everywhere/simde, Debian's libsimde-dev) computes each AVX-512 and AVX-VNNI intrinsic by
what the CPU has. The sources are those of the package. Of those for such levels, ``#pragma GCC target`` goes, with
which the compiler would use the instructions by itself; and of all, ``#pragma GCC unroll``, which is for speed and
takes most of the time to compile.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine.ops.cpu

INTRINSICS = """#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <cstring>

// What version 0.7.4 lacks, or has under another form's name, by halves.
template <typename To, typename From, typename HalfTo, typename HalfFrom>
inline To by_halves(From from, HalfTo (*half)(HalfFrom)) {
  HalfFrom parts[2];
  HalfTo results[2];
  To to;
  std::memcpy(parts, &from, sizeof(from));
  results[0] = half(parts[0]);
  results[1] = half(parts[1]);
  std::memcpy(&to, results, sizeof(to));
  return to;
}
inline simde__m512i with_zeros(__m256i lower) {
  simde__m512i to = simde_mm512_setzero_si512();
  std::memcpy(&to, &lower, sizeof(lower));
  return to;
}
#define _mm512_zextsi256_si512(lower) with_zeros(lower)
inline __m256 half_of(simde__m512 v, int which) {
  __m256 parts[2];
  std::memcpy(parts, &v, sizeof(v));
  return parts[which];
}
#define _mm512_extractf32x8_ps(v, which) half_of(v, which)
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm256_dpbusd_avx_epi32(sum, a, b) simde_mm256_dpbusd_epi32(sum, a, b)
#define _mm512_cvtepi32_ps(v) \\
  by_halves<simde__m512, simde__m512i, __m256, __m256i>(v, [](__m256i half) { return _mm256_cvtepi32_ps(half); })
#define _mm512_cvtps_epi32(v) \\
  by_halves<simde__m512i, simde__m512, __m256i, __m256>(v, [](__m256 half) { return _mm256_cvtps_epi32(half); })
#define _mm512_cvtph_ps(v) \\
  by_halves<simde__m512, __m256i, __m256, __m128i>(v, [](__m128i half) { return _mm256_cvtph_ps(half); })
#define _mm512_roundscale_ps(v, how) \\
  by_halves<simde__m512, simde__m512, __m256, __m256>(v, [](__m256 half) { return _mm256_round_ps(half, how); })
#define _mm512_cvtepi8_epi32(v) \\
  by_halves<simde__m512i, __m128i, __m256i, int64_t>( \\
      v, [](int64_t half) { return _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(half)); })
#define _mm512_cvtepu16_epi32(v) \\
  by_halves<simde__m512i, __m256i, __m256i, __m128i>(v, [](__m128i half) { return _mm256_cvtepu16_epi32(half); })
"""

FLAGS = [
    *("-std=c++20", "-shared", "-fPIC", "-w", "-Wno-psabi", "-pthread", "-mavx2", "-mfma", "-mf16c"),
    *("-fno-math-errno", "-DWHET_EMULATED"),
]


def why_not() -> str | None:
    """What is missing for it; None if nothing is."""
    if (compiler := shutil.which("g++")) is None:
        return "there is no g++"
    found = subprocess.run(
        [compiler, "-fsyntax-only", "-x", "c++", "-"], input=b"#include <simde/x86/avx512.h>", capture_output=True
    )
    return "SIMDe is not installed (Debian: libsimde-dev)" if found.returncode else None


def build(directory: Path) -> ctypes.PyDLL:
    """The library, made in a directory of its own.

    Raises:
        subprocess.CalledProcessError: the sources do not compile.
    """
    (directory / "emulated.h").write_text(INTRINSICS)
    emulated, plain = [], []
    for path in sorted(Path(engine.ops.cpu.__file__).parent.iterdir()):
        if path.suffix in (".h", ".inl", ".cpp"):
            text = re.sub(r"(?m)^#pragma GCC unroll.*$", "", path.read_text())
            beyond = re.search(r"(?m)^#pragma GCC target.*\b(avx512|avxvnni)", text) is not None
            if beyond:
                text = re.sub(r"(?m)^#pragma GCC target.*$", "", text)
                text = text.replace("#include <immintrin.h>", '#include "emulated.h"')
            (directory / path.name).write_text(text)
            if path.suffix == ".cpp":
                (emulated if beyond else plain).append(path.name)
    # Two files of several sources each: reading SIMDe takes longer than compiling one.
    units = []
    for which, names in (("first", emulated[0::2]), ("second", emulated[1::2])):
        (directory / f"{which}.cpp").write_text("".join(f'#include "{name}"\n' for name in names))
        units.append((f"{which}.cpp", "-Og"))
    units += [(name, "-O0") for name in plain]

    def compile_one(unit: tuple[str, str]) -> str:
        name, level = unit
        output = os.fspath(directory / f"{name}.o")
        command = ["g++", *FLAGS, level, f"-I{directory}", "-c", os.fspath(directory / name), "-o", output]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return output

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, units))
    library = directory / "kernels.so"
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", os.fspath(library)], check=True)
    return ctypes.PyDLL(os.fspath(library))
