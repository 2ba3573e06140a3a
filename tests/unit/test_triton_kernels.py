"""Triton kernels in Triton's interpreter on the CPU: the checks of tests/gpu, in a process of their own, because the
interpreter is chosen for a whole process before Triton is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.gpu import attention, elementwise, graphs, kernels, lora, models, quantized, sampling, training  # noqa: F401 - they register checks
from tests.gpu.checks import CHECKS

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed (make env installs it)"
    ),
    pytest.mark.timeout(1200),  # half a minute on an idle core; beside other work, as long as that takes
]
# The package's kernels take minutes in the interpreter (test_flash_linear_attention). Of whole models, the one
# that decodes through the kernels: most others would compare the CPU with itself. What graphs need of the engine, and
# sampling, have tests that take less time (tests/engine/test_cuda_graphs.py, tests/unit/test_sampling_on_device.py).
SHORT = ("kernels.", "attention.", "elementwise.", "lora.", "quantized.", "training.")
NAMES = [name for name in CHECKS if name.startswith(SHORT) and not name.endswith("by_fla")]
NAMES.append("models.greedy_tokens")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What each check gave, by name."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--interpret", "--json", *NAMES],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(NAMES), done.stderr
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(results: dict[str, dict[str, Any]], name: str) -> None:
    """The check's own docstring says what it proves."""
    result = results[name]
    assert result["outcome"] in ("ok", "skipped"), result["detail"]
    if result["outcome"] == "skipped":
        pytest.skip(result["detail"])


def test_every_check_says_what_it_proves() -> None:
    """And is of one of the modules that run.sh runs."""
    assert all((function.__doc__ or "").strip() for function in CHECKS.values())
