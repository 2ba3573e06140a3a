"""Runs the checks without pytest and prints a table.

python -m tests.gpu [--device cuda] [--interpret] [--json] [PREFIX ...]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass

import torch

from engine.ops import backends
from tests.gpu import attention, elementwise, graphs, interpreter, kernels, lora, models, quantized, sampling, training  # noqa: F401 - they register checks
from tests.gpu.checks import CHECKS, Skipped


@dataclass(slots=True)
class Result:
    """Of one check. figure: the worst error as a part of what is allowed."""

    name: str
    outcome: str
    seconds: float
    figure: float | None = None
    detail: str = ""


def run_check(name: str, device: torch.device) -> Result:
    """Runs one check; nothing that it raises gets out."""
    begin = time.monotonic()
    try:
        figure = CHECKS[name](device)
        return Result(name, "ok", time.monotonic() - begin, figure)
    except Skipped as missing:
        return Result(name, "skipped", time.monotonic() - begin, detail=str(missing))
    except AssertionError as wrong:
        return Result(name, "WRONG", time.monotonic() - begin, detail=str(wrong) or traceback.format_exc())
    except Exception:  # noqa: BLE001 - one broken check must not hide the others
        return Result(name, "BROKEN", time.monotonic() - begin, detail=traceback.format_exc())


def versions(device: torch.device) -> str:
    """One line: what the figures were had with."""
    parts = [f"python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    for package in ("triton", "fla", "transformers"):
        found = importlib.util.find_spec(package) is not None
        module = importlib.import_module(package) if found else None
        parts.append(f"{package} {getattr(module, '__version__', '?') if found else 'not installed'}")
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join(parts)


def main() -> int:
    """Returns 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="of the names of checks to run; none: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--interpret", action="store_true", help="kernels on the CPU; set TRITON_INTERPRET=1 as well")
    parser.add_argument("--json", action="store_true", help="one JSON line a check, in place of the table")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    names = [name for name in CHECKS if not args.prefixes or name.startswith(tuple(args.prefixes))]
    results = []
    if args.interpret:
        interpreter.prepare()
    with backends.allow(device_types=("cuda", "cpu")) if args.interpret else contextlib.nullcontext():
        for name in names:
            results.append(run_check(name, device))
            if args.json:
                print(json.dumps(asdict(results[-1])), flush=True)
            else:
                print(f"{name}: {results[-1].outcome}", file=sys.stderr, flush=True)
        used = backends.implementations(device)
    wrong = [r for r in results if r.outcome not in ("ok", "skipped")]
    if not args.json:
        for result in wrong:
            print(f"\n{result.name}:\n{result.detail}")
        print(f"\n{versions(device)}")
        print(", ".join(f"{operation}: {form}" for operation, form in used.items()))
        print(f"\n{'check':<44} {'result':<8} {'error / bound':>13} {'seconds':>8}")
        for r in results:
            figure = "" if r.figure is None else f"{r.figure:.3f}"
            note = f"  {r.detail}" if r.outcome == "skipped" else ""
            print(f"{r.name:<44} {r.outcome:<8} {figure:>13} {r.seconds:>8.1f}{note}")
        print(f"{len(results)} checks, {len(wrong)} wrong")
    return 1 if wrong or not results else 0


if __name__ == "__main__":
    sys.exit(main())
