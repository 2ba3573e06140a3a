"""The thread pool of the CPU kernels, compiled with delays at the places where two threads may meet."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import engine.ops.cpu

SOURCES = Path(engine.ops.cpu.__file__).parent

DELAY = """
#pragma once
// Some hundred turns now and then: long enough for the other thread to come to the same place.
static inline void delay() {
  static thread_local unsigned state = 7;
  state = state * 1664525u + 1013904223u;
  if ((state >> 20) % 2 == 0)
    for (volatile unsigned i = 0; i < (state >> 10) % 600; i = i + 1) {}
}
#define WHET_DELAY delay
"""

PROGRAM = """
#include <atomic>
#include <cstdio>
#include <new>
#include <vector>
#include "kernels.h"

struct Job {
  std::vector<std::atomic<int>>* runs;
  int64_t total;
};

void body(void* context, int64_t index) {
  Job& job = *static_cast<Job*>(context);
  if (index < job.total) (*job.runs)[index].fetch_add(1);
}

void lacking(void* context, int64_t) {
  static_cast<std::atomic<int>*>(context)->fetch_add(1);
  throw std::bad_alloc();
}

int main() {
  constexpr int kCalls = 200000;
  whet::set_num_threads(3);
  std::vector<std::atomic<int>> runs(32);
  unsigned state = 1;
  long wrong = 0;
  long caught = 0;
  for (int call = 0; call < 1000; ++call) {
    std::atomic<int> ran{0};
    try {
      whet::parallel_for(lacking, &ran, 4);
    } catch (const std::bad_alloc&) {
      ++caught;
    }
    wrong += ran.load() != 4;
  }
  wrong += caught != 1000;
  for (int call = 0; call < kCalls; ++call) {
    state = state * 1664525u + 1013904223u;
    Job job{&runs, 2 + (state >> 16) % 4};
    for (auto& count : runs) count.store(0);
    whet::parallel_for(body, &job, job.total, (state >> 12) % 2 == 0);
    for (int i = 0; i < job.total; ++i) wrong += runs[i].load() != 1;
  }
  std::printf("%ld", wrong);
}
"""


def test_each_piece_has_run_once_when_the_call_returns(tmp_path: Path) -> None:
    """Jobs of changing size and kind, one right after the other, with threads that are late from the job before; and
    before those some whose pieces find no memory, which the caller is told when all of them are over."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "delay.h").write_text(DELAY)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    program = tmp_path / "main"
    sources = [str(tmp_path / "main.cpp"), str(SOURCES / "pool.cpp")]
    options = ["-std=c++20", "-O2", "-pthread", "-include", str(tmp_path / "delay.h"), f"-I{SOURCES}"]
    subprocess.run([compiler, *options, *sources, "-o", str(program)], check=True, capture_output=True)
    found = subprocess.run([str(program)], check=True, capture_output=True, text=True, timeout=300)
    assert found.stdout == "0"
