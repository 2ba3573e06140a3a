"""MiniLM in onnxruntime or sentence-transformers; runs in their own environment:
``python embedding_process.py onnxruntime|sentence-transformers MODEL_DIR WORK_DIR THREADS``.

Both are given token ids, as the engine is. Question: {"inputs": [ids, …], "batch_size": n, "vectors": bool}; the texts
are padded to the longest of their batch, longest texts first, as sentence-transformers does by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from answering import serve


def onnx_encoder(model_dir: Path, work_dir: Path, threads: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The model exported by optimum, with all graph optimisations that onnxruntime has."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    target = work_dir / "onnx"
    if not (target / "model.onnx").exists():
        ORTModelForFeatureExtraction.from_pretrained(model_dir, export=True).save_pretrained(target)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(target / "model.onnx", options, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}

    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = session.run(None, {name: value for name, value in feeds.items() if name in wanted})[0]
        weights = mask[..., None].astype(np.float32)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)

    return encode


def torch_encoder(model_dir: Path, work_dir: Path, threads: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """sentence-transformers' own pipeline of modules."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(model_dir), device="cpu").eval()

    @torch.inference_mode()
    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return model(features)["sentence_embedding"].numpy()

    return encode


def main() -> None:
    peer, model_dir, work_dir, threads = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    encode = (onnx_encoder if peer == "onnxruntime" else torch_encoder)(model_dir, work_dir, threads)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        inputs, size = question["inputs"], question["batch_size"]
        began = time.perf_counter()
        order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
        vectors: list[Any] = [None] * len(inputs)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            width = max(len(inputs[row]) for row in rows)
            ids = np.zeros((len(rows), width), dtype=np.int64)
            mask = np.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(inputs[row])] = inputs[row]
                mask[place, : len(inputs[row])] = 1
            for row, vector in zip(rows, encode(ids, mask).tolist(), strict=True):
                vectors[row] = vector
        seconds = time.perf_counter() - began
        return {"seconds": seconds} | ({"vectors": vectors} if question.get("vectors") else {})

    serve({"version": version(peer)}, answer)


main()
