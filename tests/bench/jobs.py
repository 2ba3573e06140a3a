"""Training, embedding and scoring on the engine in this process."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

from engine.jobs import EmbedSpec, LoRAParams, PerplexitySpec, TokenizedExample, TrainParams, TrainSpec, TrainStep
from engine.training.dataset import write_dataset
from tests.bench.setup import EMBEDDER, GENERATOR, HYBRID, Bench, load_reference, random_tokens, run_job, seconds

_numbers = itertools.count()
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DELTA_NET_TARGETS = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
RANK = 8


def _train_rate(bench: Bench, name: str, targets: list[str], batch_size: int) -> float:
    """Tokens per second of a LoRA run's steps, the first left out: it pays for what later ones find ready."""
    scale = bench.scale
    run_id = f"train-{next(_numbers)}"
    run_dir = bench.work_dir / run_id
    mask = [False] + [True] * (scale.train_tokens - 1)
    examples = [
        TokenizedExample(token_ids=random_tokens(scale.train_tokens, seed), loss_mask=mask)
        for seed in range(batch_size * scale.train_steps)
    ]
    write_dataset(run_dir / "dataset.safetensors", examples)
    spec = TrainSpec(
        job_id=run_id,
        model=name,
        adapter="bench",
        lora=LoRAParams(rank=RANK, alpha=16.0, target_modules=targets),
        params=TrainParams(
            batch_size=batch_size,
            max_steps=scale.train_steps,
            max_seq_len=scale.train_tokens,
            shuffle=False,
            compute_dtype="float32",
        ),
        dataset_path=str(run_dir / "dataset.safetensors"),
        run_dir=str(run_dir),
    )
    steps = [event for event in run_job(bench.load(name), spec) if isinstance(event, TrainStep) and event.step > 1]
    return statistics.median(step.num_tokens / step.step_seconds for step in steps if step.step_seconds)


class _ReferenceTrainer:
    """The same run by peft and transformers: the same rank, targets, optimizer and shapes."""

    def __init__(self, bench: Bench, name: str, targets: list[str], batch_size: int) -> None:
        from peft import LoraConfig, get_peft_model

        self._scale = bench.scale
        self._batch_size = batch_size
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        bench.forget_reference(name)
        self._model = get_peft_model(load_reference(bench.path(name), name), config).train()
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        self._parameters = parameters

    def rate(self) -> float:
        """Tokens per second, the first step left out."""
        scale, taken = self._scale, []
        for step in range(scale.train_steps):
            batch = torch.tensor(
                [random_tokens(scale.train_tokens, step * self._batch_size + row) for row in range(self._batch_size)]
            )
            began = time.perf_counter()
            self._model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            taken.append(batch.numel() / (time.perf_counter() - began))
        return statistics.median(taken[1:])


def _train(bench: Bench, measure: str, name: str, targets: list[str], batch_size: int) -> None:
    sides = {"whet": lambda: _train_rate(bench, name, targets, batch_size)}
    if bench.compare:
        sides["transformers"] = _ReferenceTrainer(bench, name, targets, batch_size).rate
    scale = bench.scale
    bench.report(
        measure,
        "tokens/s",
        name,
        bench.medians(sides, rounds=scale.train_rounds, warm_up=0),
        rounds=scale.train_rounds,
        batch=batch_size,
        seq_len=scale.train_tokens,
    )


def train(bench: Bench) -> None:
    """Tokens per second of a LoRA run on all linear layers."""
    _train(bench, "train", GENERATOR, TARGETS, bench.scale.train_batch)


def hybrid_train_qv(bench: Bench) -> None:
    """Tokens per second of a LoRA run on q_proj and v_proj of the hybrid, one example a step."""
    _train(bench, "hybrid_train_qv", HYBRID, ["q_proj", "v_proj"], 1)


def hybrid_train_all(bench: Bench) -> None:
    """Tokens per second of a LoRA run on all linear layers of the hybrid, one example a step."""
    _train(bench, "hybrid_train_all", HYBRID, TARGETS + DELTA_NET_TARGETS, 1)


def embed(bench: Bench) -> None:
    """Texts of equal length per second, mean-pooled."""
    scale = bench.scale
    engine = bench.load(EMBEDDER)

    def ours() -> float:
        inputs = [random_tokens(scale.embed_tokens) for _ in range(scale.embed_texts)]
        spec = EmbedSpec(job_id=f"embed-{next(_numbers)}", model=EMBEDDER, inputs=inputs, pooling="mean")
        return scale.embed_texts / seconds(lambda: run_job(engine, spec))

    @torch.inference_mode()
    def reference() -> float:
        model = bench.reference(EMBEDDER)
        inputs = torch.tensor([random_tokens(scale.embed_tokens) for _ in range(scale.embed_texts)])
        return scale.embed_texts / seconds(
            lambda: torch.nn.functional.normalize(model(inputs).last_hidden_state.mean(1), dim=-1).tolist()
        )

    sides = {"whet": ours} | ({"transformers": reference} if bench.compare else {})
    bench.report("embed", "texts/s", EMBEDDER, bench.medians(sides), tokens_per_text=scale.embed_tokens)


def perplexity(bench: Bench) -> None:
    """Scored tokens per second, with windows that overlap by half."""
    scale = bench.scale
    engine = bench.load(GENERATOR)
    window, stride = scale.perplexity_window, scale.perplexity_window // 2
    token_ids = random_tokens(scale.perplexity_tokens, seed=0)
    num_scored = len(token_ids) - 1

    def ours() -> float:
        spec = PerplexitySpec(
            job_id=f"perplexity-{next(_numbers)}", model=GENERATOR, token_ids=token_ids, window=window, stride=stride
        )
        return num_scored / seconds(lambda: run_job(engine, spec))

    @torch.inference_mode()
    def run_reference() -> None:
        model = bench.reference(GENERATOR)
        scored = 1
        for start in range(0, len(token_ids), stride):
            ids = torch.tensor([token_ids[start : start + window]])
            end = start + ids.shape[1]
            new = end - scored
            logits = model(ids, use_cache=False, logits_to_keep=new + 1).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits.float(), ids[0, -new:], reduction="sum").item()
            scored = end
            if end == len(token_ids):
                break

    sides = {"whet": ours}
    if bench.compare:
        sides["transformers"] = lambda: num_scored / seconds(run_reference)
    bench.report("perplexity", "tokens/s", GENERATOR, bench.medians(sides), window=window, stride=stride)
