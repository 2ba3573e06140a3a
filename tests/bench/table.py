"""``python -m tests.bench.table RESULTS.jsonl``: the table of docs/performance.md from the lines of a run.

A row is a measure; of several peers, the best is named. The last column is for what stands between ours and the floor,
which a person fills in; what is said there already of a row is kept with ``--keep DOCUMENT``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

AIMS: dict[str, str] = {
    "decode_1": ">= 1.4, >= 65% of the floor",
    "decode_1_q8": ">= 1.4, >= 65% of the floor",
    "decode_1_float": ">= 1.1, >= 85% of the floor",
    "prefill": ">= 1.4",
    "streams_8": ">= 1.3",
    "train_qv": ">= 1.4",
    "train_qv_memory": ">= 2",
    "train": ">= 1.4",
    "train_memory": ">= 2",
    "perplexity": ">= 1.5",
    "embed": ">= 1.4",
    "hybrid_decode_1_q8": ">= 3",
    "hybrid_prefill": ">= 1.6",
    "hybrid_prefill_q8": ">= 1.6",
    "hybrid_train_qv": ">= 1.5",
    "hybrid_train_qv_q8": ">= 1.5",
    "start": ">= 0.5",
    "start_memory": ">= 0.5",
    "grpc_overhead": ">= 0.97",
    "grpc_64": ">= 0.90",
    "front_end": "< 1 core",
}
"""Ratios to the best peer, above 1 where ours is better: half its memory is a ratio of 2."""

HEAD = ("measure", "command", "ours", "best peer", "ratio", "aim", "of the floor", "what is left")


def number(value: float, unit: str) -> str:
    """A value with its unit, three digits."""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def rows(lines: Iterable[dict[str, Any]], remarks: dict[str, str]) -> list[tuple[str, ...]]:
    """A row for each measure, in the order of AIMS and then of the lines, against the peer that is best at it."""
    measures: dict[str, list[dict[str, Any]]] = {measure: [] for measure in AIMS}
    for line in lines:
        measures.setdefault(line["measure"], []).append(line)
    table = []
    for measure, found in measures.items():
        command = f"`python -m tests.bench {measure.removesuffix('_memory')}`"
        if not found:
            table.append((f"`{measure}`", command, "not measured", "", "", AIMS[measure], "", remarks.get(measure, "")))
            continue
        compared = [line for line in found if line["peer"] is not None]
        best = min(compared, key=lambda line: line["ratio"]) if compared else found[0]
        fraction = best.get("floor_fraction")
        table.append(
            (
                f"`{measure}` {best['model']}",
                command,
                number(best["value"], best["unit"]),
                f"{best['peer']}: {number(best['peer_value'], best['unit'])}" if compared else "",
                f"{best['ratio']:.2f}" if compared else "",
                AIMS.get(measure, ""),
                "" if fraction is None else f"{fraction:.0%}",
                remarks.get(measure, ""),
            )
        )
    return table


def markdown(lines: list[dict[str, Any]], remarks: dict[str, str]) -> str:
    """The table, and below it where and when it was measured and what the machine can do."""
    table = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows(lines, remarks))]
    runs: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for line in lines:
        runs.setdefault((line["date"], line["machine"], line["threads"]), []).append(line["limits"])
    return "\n".join([*table, "", *(_conditions(*run, limits) for run, limits in sorted(runs.items()))])


def _conditions(date: str, machine: str, threads: int, limits: list[dict[str, float]]) -> str:
    """Where and when, and between what the machine's limits were from measure to measure."""

    def between(name: str) -> str:
        found = sorted({f"{each[name]:.0f}" for each in limits}, key=int)
        return " to ".join(found if len(found) < 3 else (found[0], found[-1]))

    return (
        f"{date}, {machine}, {threads} threads: reads {between('read_gb_per_second')} GB/s, "
        f"float32 {between('float32_gflop_per_second')} GFLOP/s, int8 {between('int8_gop_per_second')} GOP/s."
    )


def remarks_of(document: str) -> dict[str, str]:
    """The last column of such a table in a document, by measure."""
    found = {}
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == len(HEAD) and cells[0].startswith("`"):
            found[cells[0].split("`")[1]] = cells[-1]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.table", description="A run's lines as a table.")
    parser.add_argument("results", type=Path, help="what python -m tests.bench printed; - is standard input")
    parser.add_argument("--keep", type=Path, help="a document whose table's last column is kept")
    options = parser.parse_args(arguments)
    text = sys.stdin.read() if str(options.results) == "-" else options.results.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    if not lines:
        parser.error(f"results is {str(options.results)!r}, which has no line of JSON")
    if any(line["quick"] for line in lines):
        parser.error(f"results is {str(options.results)!r}, of a --quick run; its figures mean nothing")
    remarks = remarks_of(options.keep.read_text(encoding="utf-8")) if options.keep else {}
    print(markdown(lines, remarks))


if __name__ == "__main__":
    main()
