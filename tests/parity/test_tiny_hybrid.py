"""The small trained hybrid that the repository carries (``make tiny-hybrid``), against transformers and peft."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.config import EngineConfig
from engine.context import packed_context
from engine.engine import Engine
from engine.jobs import PerplexityFinished, PerplexitySpec
from engine.models.qwen3_5_text import Qwen3_5ForCausalLM
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer
from tests.conftest import REPOSITORY
from tests.mtp_reference import ReferenceMTP
from tests.parity.loading import TOLERANCE, assert_same_logits, load
from tests.rpc.harness import running_server
from whet import Client

MODEL = REPOSITORY / "tests" / "models" / "tiny-hybrid"
HELD_OUT = (MODEL / "held_out.txt").read_bytes().decode()
MAX_PERPLEXITY = 150.0
"""Of the held-out text. The frequencies of single tokens give more than 1,000: see the model card."""

NEW_TOKENS = 32
STEPS = 50
LINEARS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj",
    "gate_proj", "up_proj", "down_proj",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small, threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out() -> list[int]:
    return Tokenizer.from_path(MODEL).encode(HELD_OUT)


def test_the_tokenizer_goes_there_and_back(held_out: list[int]) -> None:
    """Any text comes back byte for byte, and transformers reads the same tokens."""
    from transformers import AutoTokenizer

    tokenizer, theirs = Tokenizer.from_path(MODEL), AutoTokenizer.from_pretrained(MODEL)
    for text in (HELD_OUT, "naïve  café\t\n\n 12345 — 日本語 🙂\u0301 x", "\x00\x7f\r\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == theirs(text)["input_ids"]
    assert len(HELD_OUT.encode()) > 2.5 * len(held_out), "merges make tokens of several bytes"
    assert tokenizer.eos_token_id == theirs.eos_token_id == 0


def test_logits_and_greedy_tokens(held_out: list[int]) -> None:
    """Through our loader the model has transformers' logits, and decodes the tokens that are its argmax."""
    model = reference()
    sequences = [torch.tensor(held_out[start : start + n]) for start, n in ((0, 1), (40, 33), (200, 64), (300, 260))]
    assert_same_logits(load(MODEL), model, sequences)
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=16 << 20, num_threads=1))
    engine.load_model("tiny-hybrid", MODEL)
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [ids.tolist() for ids in sequences]
    for number, prompt in enumerate(prompts):
        engine.add_request(
            Request(request_id=str(number), model="tiny-hybrid", prompt_token_ids=prompt, sampling=sampling)
        )
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_requests():
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
    for prompt, completion in zip(prompts, tokens, strict=True):
        assert len(completion) == NEW_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion


def test_perplexity(held_out: list[int]) -> None:
    """The Perplexity job on a held-out page: far below what single tokens' frequencies give, and transformers' NLL."""
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=16 << 20, num_threads=1))
    engine.load_model("tiny-hybrid", MODEL)
    engine.start_job(PerplexitySpec(job_id="1", model="tiny-hybrid", token_ids=held_out, window=2048, stride=2048))
    events: list[Any] = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    finished = events[-1]
    assert isinstance(finished, PerplexityFinished), finished
    assert finished.num_tokens == len(held_out) - 1
    assert finished.perplexity < MAX_PERPLEXITY
    ids = torch.tensor(held_out)
    with torch.no_grad():
        logits = reference()(ids[None], use_cache=False).logits[0, :-1]
    assert finished.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[1:]).item(), abs=1e-5)


@torch.no_grad()
def test_the_head_drafts(held_out: list[int]) -> None:
    """The stored head's logits are those of one made of transformers' layers, and its greedy draft is what the model
    takes itself far more often than chance, or a constant guess, would have it."""
    theirs, model = reference(), load(MODEL)
    assert isinstance(model, Qwen3_5ForCausalLM)
    assert model.num_mtp_layers == 1
    ids = torch.tensor(held_out[:512])
    hidden = model(ids, packed_context([len(ids)]))
    drafted = model.compute_logits(model.mtp_hidden(hidden[:-1], ids[1:], packed_context([len(ids) - 1])))
    theirs.config._attn_implementation = "eager"
    head = ReferenceMTP(theirs.config).eval()
    tensors = load_file(MODEL / "model.safetensors")
    head.load_state_dict({name.removeprefix("mtp."): t for name, t in tensors.items() if name.startswith("mtp.")})
    states = theirs.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    expected = theirs.lm_head(head(states[:-1], ids[1:], theirs.model.embed_tokens))
    assert (drafted - expected).abs().max() < TOLERANCE
    wanted = model.compute_logits(hidden[1:]).argmax(-1)
    accepted = (drafted.argmax(-1) == wanted).float().mean().item()
    constant = wanted.bincount().max().item() / len(wanted)
    print(f"accepted {accepted:.1%}, a constant guess {constant:.1%}")
    assert accepted > max(0.35, 2 * constant)


def examples() -> list[dict[str, str]]:
    """Short texts of one style."""
    lines = (REPOSITORY / "scripts" / "demo_examples.jsonl").read_text().splitlines()
    turns = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    return [{"text": f"Q: {question}\nA: {answer}"} for question, answer in turns]


def mean_loss(model: Any, sequences: list[list[int]]) -> Tensor:
    """Mean NLL of all tokens but the first of each, padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sequences])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.timeout(600)
def test_training_over_the_wire_follows_peft(tmp_path: Path) -> None:
    """LoRA on all linears of both kinds of layer, 50 steps through the Train RPC, from an adapter of peft's with a B
    that is not zero: losses, gradient norms and held-out NLLs are those of transformers and peft to 1e-3."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoTokenizer

    start = get_peft_model(reference(), LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in start.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            elif "lora_B" in name:
                parameter.normal_(0.0, 0.02, generator=generator)
    start.save_pretrained(tmp_path / "start")
    records = examples()
    train, held_out = records[:32], records[32:]
    with (
        running_server(tmp_path / "state", "--model", f"tiny-hybrid={MODEL}", "--dtype", "float32") as server,
        Client(server.address) as client,
    ):
        assert client.model("tiny-hybrid").num_mtp_layers == 1
        client.import_adapter("start", model="tiny-hybrid", directory=tmp_path / "start")
        run = client.train(
            train, model="tiny-hybrid", adapter="tone", init_adapter="start", eval_examples=held_out, eval_every=10,
            max_steps=STEPS, batch_size=4, shuffle=False, learning_rate=2e-3, optimizer="adamw",
            schedule="constant", weight_decay=0.01, max_grad_norm=0.6, max_seq_len=128, loss_on="all", publish="last",
        )  # fmt: skip
        events = list(run)
        client.export_adapter("tone", model="tiny-hybrid", directory=tmp_path / "trained")
    steps = {event.step: event for event in events if event.kind == "step"}
    evaluations = {event.step: event.nll for event in events if event.kind == "evaluation"}
    assert events[-1].kind == "finished"
    assert steps.keys() == set(range(STEPS + 1))
    assert set(range(10, STEPS + 1, 10)) <= evaluations.keys()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = [[*tokenizer(record["text"])["input_ids"], tokenizer.eos_token_id] for record in records]
    model = PeftModel.from_pretrained(reference(), tmp_path / "start", is_trainable=True).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * (6 * (5 + 3) + 2 * (4 + 3))
    optimizer = torch.optim.AdamW(trainable, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    with torch.no_grad():
        expected = {0: mean_loss(model, tokens[32:]).item()}
    worst = 0.0
    for step in range(1, STEPS + 1):
        batch = [tokens[index % 32] for index in range(4 * (step - 1), 4 * step)]
        loss = mean_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trainable, 0.6).item()
        optimizer.step()
        optimizer.zero_grad()
        assert steps[step].grad_norm == pytest.approx(norm, rel=1e-3), f"step {step}"
        worst = max(worst, abs(steps[step].loss / loss.item() - 1))
        assert worst < 1e-3, f"step {step}"
        if step in evaluations:
            with torch.no_grad():
                expected[step] = mean_loss(model, tokens[32:]).item()
            assert evaluations[step] == pytest.approx(expected[step], rel=1e-3), f"step {step}"
    print(f"largest relative difference of a loss {worst:.1e}; held-out NLL {expected[0]:.3f} to {expected[STEPS]:.3f}")
    assert evaluations[STEPS] < 0.7 * expected[0]
    trained = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    ours = {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): t
        for name, t in trained.items()
    }
    theirs = dict(model.named_parameters())
    assert len(ours) == len(trainable)
    for name, value in ours.items():
        assert (value - theirs[name]).norm() < 1e-3 * theirs[name].norm(), name
