"""The models that are measured: where they lie, what they are called, and the files that are made from them.

GENERATOR is SmolLM2-135M as the demo package has it, a GGUF file of 4-bit blocks. GENERATOR_Q8 is the same numbers
stored as Q8_0 and GENERATOR_HALF as F16, GENERATOR_FLOAT the first file held in float32. EMBEDDER is MiniLM-L6 of the
demo package, and EMBEDDER_Q8 its copy with linear layers in our own 8-bit format. HYBRID has the published shape of
Qwen3.5-0.8B and random weights in bfloat16, as it is published; HYBRID_Q8 is its copy in our own 8-bit format.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.jobs import QuantizeSpec
from engine.loading.defaults import embedded_models
from tests.bench.hybrid_model import save_hybrid
from tests.bench.work import run_job

GENERATOR = "generator"
GENERATOR_Q8 = "generator-q8"
GENERATOR_HALF = "generator-half"
GENERATOR_FLOAT = "generator-float"
EMBEDDER = "embedder"
EMBEDDER_Q8 = "embedder-q8"
HYBRID = "hybrid"
HYBRID_Q8 = "hybrid-q8"
DEFAULT_MODELS = {GENERATOR: "smollm2-135m", EMBEDDER: "all-minilm-l6-v2"}


@dataclass(slots=True)
class Models:
    """Paths of models; what has to be made is made when it is first asked for.

    Args:
        work_dir: holds what is made; found there, it is not made again.
        quick: tiny random models in place of the real ones.
        generator: in place of the demo package's.
        hybrid_layers: fewer than the published 24 take less memory and time.
    """

    work_dir: Path
    quick: bool
    generator: Path | None
    hybrid_layers: int

    def path(self, name: str) -> Path:
        """Where a model lies."""
        match name:
            case "hybrid":
                return self._make(f"hybrid-{self.hybrid_layers}-bf16", self._save_hybrid)
            case "hybrid-q8":
                return self._make(f"hybrid-{self.hybrid_layers}-bf16-q8", lambda to: save_q8(self.path(HYBRID), to))
            case "embedder-q8":
                return self._make("embedder-q8", lambda to: save_q8(self.path(EMBEDDER), to, linears_only=True))
            case "generator-float":
                return self.path(GENERATOR)
            case "generator-half":
                return self.gguf("F16") or self.path(GENERATOR)
            case "generator-q8":
                return self.gguf("Q8_0") or self._make("generator-q8", lambda to: save_q8(self.path(GENERATOR), to))
        if self.quick:
            return self.tiny()
        if name == GENERATOR and self.generator is not None:
            return self.generator
        wanted, models = DEFAULT_MODELS[name], embedded_models()
        if wanted not in models:
            raise SystemExit(f"the package of {wanted} is not installed; make env installs it, or give --model PATH")
        return models[wanted]

    def tiny(self) -> Path:
        """A tiny random Llama with a tokenizer of bytes."""
        return self._make("tiny", _save_tiny)

    def label(self, name: str) -> str:
        """Name of a model in the results."""
        if name in (HYBRID, HYBRID_Q8):
            shape = "tiny-qwen3.5" if self.quick else f"qwen3.5-0.8b-shape ({self.hybrid_layers} layers)"
            return shape + (" q8" if name == HYBRID_Q8 else "")
        if name in (EMBEDDER, EMBEDDER_Q8):
            base = "tiny-llama" if self.quick else DEFAULT_MODELS[EMBEDDER]
            return base + (" q8" if name == EMBEDDER_Q8 else "")
        given = self.generator.stem if self.generator is not None else DEFAULT_MODELS[GENERATOR]
        path = self.path(name)
        if path.suffix == ".gguf":
            stored = file_type(path)
            return f"{given} {stored}" + (" widened to float32" if name == GENERATOR_FLOAT else "")
        kinds = {GENERATOR_Q8: " q8", GENERATOR_FLOAT: " float32"}
        return ("tiny-llama" if self.quick else given) + kinds.get(name, "")

    def gguf(self, kind: str | None = None) -> Path | None:
        """The generator as a GGUF file of blocks of a kind ("Q8_0", "F16", "F32"); None: as it is.

        Returns: None where the generator is no GGUF file.
        """
        path = self.path(GENERATOR)
        if path.suffix != ".gguf":
            return None
        if kind is None:
            return path
        return self._make(f"{path.stem}-{kind}.gguf", lambda to: convert_gguf(path, to, kind))

    def reference_path(self, name: str) -> Path:
        """A Hugging Face directory of the same numbers, for transformers: a GGUF file is widened once."""
        path = self.path(name)
        if path.suffix != ".gguf":
            return path

        def save(to: Path) -> None:
            from transformers import AutoModelForCausalLM

            kwargs: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
            widened = AutoModelForCausalLM.from_pretrained(str(path.parent), **kwargs)
            config = widened.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # of the file; the weights are wide now
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(widened.state_dict())
            plain.save_pretrained(to)

        return self._make(f"{path.stem}-reference", save)

    def _save_hybrid(self, to: Path) -> None:
        if self.quick:
            from tests.tiny import save_tiny_hybrid

            save_tiny_hybrid(to)
        else:
            save_hybrid(to, self.hybrid_layers)

    def _make(self, name: str, make: Callable[[Path], object]) -> Path:
        """Made under another name first, so that what lies there is whole."""
        path = self.work_dir / name
        if not path.exists():
            part = self.work_dir / f"part-{name}"
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(path)
        return path


def load_reference(path: Path, *, encoder: bool = False) -> Any:
    """A model of transformers on the CPU in float32."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = AutoModel if encoder else AutoModelForCausalLM
    return kind.from_pretrained(str(path), dtype=torch.float32).eval()


def convert_gguf(source: Path, target: Path, kind: str) -> None:
    """Writes a GGUF file's matrices anew as blocks of another kind; vectors and metadata stay as they are.

    llama-quantize does the same; this needs no more than the gguf package.
    """
    wanted = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, field in reader.fields.items():
        if name in skipped or name.startswith("GGUF."):
            continue
        sub_type = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_q8(source: Path, target: Path, *, linears_only: bool = False) -> None:
    """Quantizes a model to 8 bits in our own format, embeddings and head as well unless ``linears_only``."""
    target.mkdir(parents=True)
    engine = Engine(EngineConfig(device="cpu", state_dir=str(target / "state"), kv_cache_bytes=64 << 20))
    engine.load_model("source", source)
    spec = QuantizeSpec(
        job_id="quantize", model="source", scheme="q8", output_dir=str(target / "model"), output_name="target",
        quantize_embeddings=not linears_only, quantize_head=not linears_only, load=False,
    )  # fmt: skip
    run_job(engine, spec)
    for file in (target / "model").iterdir():
        file.rename(target / file.name)
    (target / "model").rmdir()
    shutil.rmtree(target / "state", ignore_errors=True)


def file_type(path: Path) -> str:
    """Kind of most of a GGUF file's matrices."""
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1]
    return max(sorted(set(kinds)), key=kinds.count)


def _save_tiny(directory: Path) -> None:
    from tests.rpc.tiny_tokenizer import save_tiny_tokenizer
    from tests.tiny import save_tiny_llama

    save_tiny_llama(directory)
    save_tiny_tokenizer(directory)
