"""OpenVINO GenAI over a GGUF file; runs in its own environment: ``python openvino_process.py FILE THREADS``.

The prefix cache is off, as random prompts would not meet it. Questions: {"do": "first", "prompts": [ids]} and
{"do": "generate", "prompts": [ids, …], "new_tokens": n}; prompts of one question have one length.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from answering import serve


def main() -> None:
    file, threads = sys.argv[1], int(sys.argv[2])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = 1  # GiB
    pipeline = openvino_genai.LLMPipeline(file, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        ids = np.array(question["prompts"], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = 1 if question["do"] == "first" else question["new_tokens"]
        config.ignore_eos, config.do_sample = True, False
        began = time.perf_counter()
        result = pipeline.generate(inputs, config)
        seconds = time.perf_counter() - began
        counts = [len(row) for row in result.tokens]
        if set(counts) != {config.max_new_tokens}:
            raise RuntimeError(f"{config.max_new_tokens} tokens were asked for, {counts} came")
        # In milliseconds: when each token of the batch came.
        times = list(result.perf_metrics.raw_metrics.m_new_token_times)
        return {"seconds": seconds, "decode_seconds": (times[-1] - times[0]) / 1000}

    serve({"version": openvino_genai.__version__.split("-")[0]}, answer)


main()
