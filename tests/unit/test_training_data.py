"""From records to tokens and masks: every kind of example, what is cut, what is refused and why, and the file."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.errors import FormatError, InvalidArgumentError
from engine.jobs import TokenizedExample
from engine.tokenizer import Tokenizer
from engine.training.data import (
    DatasetBuilder,
    Examples,
    RejectedExampleError,
    read_dataset,
    split_held_out,
    tokenize,
    write_dataset,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3's: the last turn is rendered with an empty thought that earlier ones do not have."""
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHOUTING = "{% for m in messages %}{{ m['content'] | upper if not loop.last else m['content'] }}|{% endfor %}"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(
    directory: Path, template: str | None = None, *, eos: str = "</s>", add_bos: bool = True
) -> Tokenizer:
    """A real byte-level tokenizer of 256 bytes, one merge ("ab"), and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "ab"])}
    backend = Backend(models.BPE(vocab, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": eos, "add_bos_token": add_bos, "add_eos_token": False}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_path(directory)


@pytest.fixture
def plain(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "plain")


@pytest.fixture
def chat(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "chat", CHATML, eos="<|im_end|>", add_bos=False)


def learnt(example: TokenizedExample, tokenizer: Tokenizer) -> str:
    """The text whose tokens count, runs of it separated by a bar."""
    parts, run = [], []
    for token, keep in [*zip(example.token_ids, example.loss_mask, strict=True), (0, False)]:
        if keep:
            run.append(token)
        elif run:
            parts.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return "|".join(parts)


def whole(example: TokenizedExample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.token_ids, skip_special_tokens=False)


def test_prompt_and_completion(plain: Tokenizer) -> None:
    """The completion and the end of sequence count; the beginning of sequence comes once."""
    example, truncated = tokenize({"prompt": "2+2=", "completion": "4"}, plain, "completion", 100)
    assert whole(example, plain) == "<s>2+2=4</s>"
    assert learnt(example, plain) == "4</s>"
    assert not truncated
    example, _ = tokenize({"prompt": "2+2=", "completion": "4"}, plain, "all", 100)
    assert learnt(example, plain) == "2+2=4</s>", "the first token is never predicted"


def test_the_border_is_tokenised_as_serving_does(plain: Tokenizer) -> None:
    """Where the whole would merge characters across the border, the prompt keeps the tokens that it has alone."""
    prompt = plain.encode("xa")
    example, _ = tokenize({"prompt": "xa", "completion": "bc"}, plain, "completion", 100)
    assert example.token_ids[: len(prompt)] == prompt
    assert learnt(example, plain) == "bc</s>"


def test_an_empty_prompt(plain: Tokenizer, chat: Tokenizer) -> None:
    """With a beginning of sequence all of the completion counts; without, all but its first token."""
    example, _ = tokenize({"prompt": "", "completion": "xyz"}, plain, "completion", 100)
    assert learnt(example, plain) == "xyz</s>"
    example, _ = tokenize({"prompt": "", "completion": "xyz"}, chat, "completion", 100)
    assert learnt(example, chat) == "yz<|im_end|>"


def test_text(plain: Tokenizer) -> None:
    """All of a text counts, whatever loss_on says."""
    for loss_on in ("completion", "all"):
        example, _ = tokenize({"text": "hello"}, plain, loss_on, 100)  # type: ignore[arg-type]
        assert whole(example, plain) == "<s>hello</s>"
        assert learnt(example, plain) == "hello</s>"


def test_alpaca_without_a_chat_template(plain: Tokenizer) -> None:
    """Alpaca's own prompts, with and without an input."""
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    example, _ = tokenize(record, plain, "completion", 1000)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>" in whole(example, plain)
    assert learnt(example, plain) == "3</s>"
    for empty in ({"input": ""}, {"input": None}, {}):
        example, _ = tokenize({"instruction": "Add.", "output": "3", **empty}, plain, "completion", 1000)
        assert "### Input" not in whole(example, plain)


def test_alpaca_with_a_chat_template(chat: Tokenizer) -> None:
    """Instruction and input are the user's turn, the output is the assistant's."""
    example, _ = tokenize({"instruction": "Add.", "input": "1 2", "output": "3"}, chat, "completion", 1000)
    assert whole(example, chat) == ("<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n")
    assert learnt(example, chat) == "3<|im_end|>"


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


def test_every_assistant_turn_counts(chat: Tokenizer) -> None:
    """Each with its end-of-turn token and without the line break after it; nothing of the others."""
    example, _ = tokenize({"messages": CONVERSATION}, chat, "completion", 1000)
    assert learnt(example, chat) == "Hello<|im_end|>|So long<|im_end|>"
    assert example.token_ids == chat.encode_chat(CONVERSATION, add_generation_prompt=False)[0]
    trailing = [*CONVERSATION, {"role": "user", "content": "?"}]
    example, _ = tokenize({"messages": trailing}, chat, "completion", 1000)
    assert learnt(example, chat) == "Hello<|im_end|>|So long<|im_end|>"


def test_serving_prompts_are_prefixes(chat: Tokenizer) -> None:
    """What precedes the last turn's first learnt token is the prompt that serving would make of the messages."""
    example, _ = tokenize({"messages": CONVERSATION}, chat, "completion", 1000)
    start = len(example.loss_mask) - 1 - example.loss_mask[::-1].index(True)
    while example.loss_mask[start - 1]:
        start -= 1
    assert example.token_ids[:start] == chat.encode_chat(CONVERSATION[:-1], add_generation_prompt=True)[0]


def test_a_template_that_forgets_thoughts(tmp_path: Path) -> None:
    """Where past turns are rendered otherwise than the last one, both are still found."""
    tokenizer = make_tokenizer(tmp_path, FORGETFUL, eos="<|im_end|>", add_bos=False)
    example, _ = tokenize({"messages": CONVERSATION}, tokenizer, "completion", 1000)
    assert learnt(example, tokenizer) == "Hello<|im_end|>|<think></think>So long<|im_end|>"


def test_a_template_without_an_end_of_turn(tmp_path: Path) -> None:
    """The last turn gets the end-of-sequence token, or the model would never learn to stop."""
    tokenizer = make_tokenizer(tmp_path, PLAIN)
    example, _ = tokenize({"messages": CONVERSATION[1:3]}, tokenizer, "completion", 1000)
    assert learnt(example, tokenizer).endswith("</s>")
    assert learnt(example, tokenizer).startswith("Hello")


def test_a_template_that_changes_past_turns_is_refused(tmp_path: Path) -> None:
    """If a turn cannot be told from the rest, no mask is guessed."""
    tokenizer = make_tokenizer(tmp_path, SHOUTING)
    with pytest.raises(RejectedExampleError, match=r"messages\[2\]") as caught:
        tokenize({"messages": CONVERSATION}, tokenizer, "completion", 1000)
    assert caught.value.reason == "TEMPLATE"


def test_smollm2_masks(smollm2_gguf: Path) -> None:
    """With a real model's tokenizer and template."""
    tokenizer = Tokenizer.from_path(smollm2_gguf)
    example, _ = tokenize({"messages": CONVERSATION}, tokenizer, "completion", 1000)
    assert learnt(example, tokenizer) == "Hello<|im_end|>|So long<|im_end|>"
    example, _ = tokenize({"instruction": "Say hi.", "input": "", "output": "Hi!"}, tokenizer, "completion", 1000)
    assert learnt(example, tokenizer) == "Hi!<|im_end|>"


# --------------------------------------------------------------------------------------------------------- truncation


def test_the_left_of_the_prompt_goes_first(plain: Tokenizer, chat: Tokenizer) -> None:
    """The beginning of sequence and the whole completion stay."""
    example, truncated = tokenize({"prompt": "0123456789", "completion": "xyz"}, plain, "completion", 8)
    assert truncated
    assert whole(example, plain) == "<s>789xyz</s>"
    assert learnt(example, plain) == "xyz</s>"
    example, truncated = tokenize({"prompt": "0123456789", "completion": "xyz"}, chat, "completion", 6)
    assert truncated
    assert whole(example, chat) == "89xyz<|im_end|>"


def test_a_completion_that_does_not_fit_is_refused(plain: Tokenizer) -> None:
    """Half a completion without its prompt would teach the wrong thing."""
    tokenize({"prompt": "p", "completion": "xyz"}, plain, "completion", 5)
    with pytest.raises(RejectedExampleError, match="4 tokens; accepted: at most 3") as caught:
        tokenize({"prompt": "p", "completion": "xyz"}, plain, "completion", 4)
    assert caught.value.reason == "TOO_LONG"


def test_conversations_lose_their_oldest_turns(chat: Tokenizer) -> None:
    """The last answer stays whole; what follows it goes before anything else does."""
    example, truncated = tokenize({"messages": CONVERSATION}, chat, "completion", 30)
    assert truncated
    assert len(example.token_ids) == 30
    assert learnt(example, chat) == "So long<|im_end|>"
    messages = [*CONVERSATION[:3], {"role": "user", "content": "x" * 200}]
    length = len(chat.encode_chat(CONVERSATION[:3], add_generation_prompt=False)[0]) - 1
    example, truncated = tokenize({"messages": messages}, chat, "completion", length)
    assert truncated
    assert whole(example, chat).endswith("Hello<|im_end|>")
    assert len(example.token_ids) == length


def test_texts_lose_their_end(plain: Tokenizer) -> None:
    """A text has no prompt to lose."""
    example, truncated = tokenize({"text": "0123456789"}, plain, "completion", 5)
    assert truncated
    assert whole(example, plain) == "<s>0123"


@given(
    prompt=st.text("ab c", max_size=12), completion=st.text("ab c", min_size=1, max_size=12), limit=st.integers(2, 20)
)
@settings(max_examples=150, deadline=None)
def test_no_example_exceeds_the_limit_or_lacks_something_to_learn(prompt: str, completion: str, limit: int) -> None:
    """Whatever is cut: at most max_seq_len tokens, the whole completion and the end, at least one token before it."""
    tokenizer = _SHARED
    record = {"prompt": prompt, "completion": completion}
    whole_example, _ = tokenize(record, tokenizer, "completion", 1000)
    if sum(whole_example.loss_mask) >= limit:
        with pytest.raises(RejectedExampleError, match="accepted: at most"):
            tokenize(record, tokenizer, "completion", limit)
        return
    example, truncated = tokenize(record, tokenizer, "completion", limit)
    assert 2 <= len(example.token_ids) <= limit
    assert len(example.token_ids) == len(example.loss_mask)
    assert not example.loss_mask[0]
    assert learnt(example, tokenizer) == completion + "</s>"
    assert truncated == (len(whole_example.token_ids) > limit)
    assert truncated or example == whole_example


@pytest.fixture(autouse=True, scope="module")
def _shared_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _SHARED
    _SHARED = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


_SHARED: Tokenizer

# --------------------------------------------------------------------------------------------------------- rejections

REJECTED: list[tuple[Any, str]] = [
    ("a string", "MALFORMED"),
    ({}, "MALFORMED"),
    ({"prompt": "x"}, "MALFORMED"),
    ({"text": "x", "prompt": "y", "completion": "z"}, "MALFORMED"),
    ({"text": 5}, "MALFORMED"),
    ({"messages": "hello"}, "MALFORMED"),
    ({"messages": []}, "MALFORMED"),
    ({"messages": [{"role": "robot", "content": "x"}, CONVERSATION[2]]}, "MALFORMED"),
    ({"text": ""}, "EMPTY"),
    ({"prompt": "x", "completion": ""}, "NO_COMPLETION"),
    ({"instruction": "x", "output": ""}, "NO_COMPLETION"),
    ({"messages": CONVERSATION[:2]}, "NO_COMPLETION"),
    ({"messages": [CONVERSATION[1], {"role": "assistant", "content": ""}]}, "NO_COMPLETION"),
    ({"text": "\ud800"}, "MALFORMED"),
]


@pytest.mark.parametrize(("record", "reason"), REJECTED)
def test_what_cannot_be_used_is_counted_with_its_reason(chat: Tokenizer, record: Any, reason: str) -> None:
    """It is neither dropped silently nor does it end the run."""
    builder = DatasetBuilder(chat)
    assert builder.add({"text": "good"})
    assert not builder.add(record)
    assert builder.report.rejected_by_reason == {reason: 1}
    rejection = builder.report.rejected[0]
    assert (rejection.split, rejection.index, rejection.reason) == ("train", 1, reason)
    assert "accepted:" in rejection.message or reason == "TEMPLATE"
    assert len(builder.finish().train) == 1


def test_messages_without_a_template(plain: Tokenizer) -> None:
    """A model without a chat template cannot take conversations, and the rejection says so."""
    builder = DatasetBuilder(plain)
    assert not builder.add({"messages": CONVERSATION})
    assert builder.report.rejected_by_reason == {"TEMPLATE": 1}


def test_nothing_left(chat: Tokenizer) -> None:
    """A dataset without a usable example is an error that says what was wrong with the first."""
    builder = DatasetBuilder(chat)
    builder.add({"text": ""})
    with pytest.raises(InvalidArgumentError, match="1 EMPTY; the first: text is empty"):
        builder.finish()


def test_only_the_first_rejections_are_listed(chat: Tokenizer) -> None:
    """All are counted, a hundred are listed."""
    builder = DatasetBuilder(chat)
    for _ in range(250):
        builder.add({})
    assert builder.report.num_rejected == 250
    assert len(builder.report.rejected) == 100


# -------------------------------------------------------------------------------------------------- splits and files


@given(num=st.integers(0, 200), fraction=st.floats(0, 0.999), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=100, deadline=None)
def test_splits_are_partitions_and_repeatable(num: int, fraction: float, seed: int) -> None:
    """Each example is on one side; the same seed gives the same sides; neither side of a real split is empty."""
    train, held_out = split_held_out(num, fraction, seed)
    assert sorted(train + held_out) == list(range(num))
    assert (train, held_out) == split_held_out(num, fraction, seed)
    if fraction > 0 and num >= 2:
        assert train
        assert held_out


def test_held_out_fraction(plain: Tokenizer) -> None:
    """A fifth of ten; another seed chooses others; a fraction together with held-out examples is refused."""

    def build(seed: int) -> list[str]:
        builder = DatasetBuilder(plain)
        for number in range(10):
            builder.add({"text": f"number {number}"})
        dataset = builder.finish(eval_fraction=0.2, seed=seed)
        assert (len(dataset.train), len(dataset.evaluation)) == (8, 2)
        return [plain.decode(e.token_ids.tolist()) for e in dataset.evaluation]

    assert build(0) == build(0)
    assert any(build(0) != build(seed) for seed in range(1, 5))
    builder = DatasetBuilder(plain)
    builder.add({"text": "a"})
    builder.add({"text": "b"}, "eval")
    with pytest.raises(InvalidArgumentError, match="one of the two"):
        builder.finish(eval_fraction=0.5)


def test_files_bring_back_what_was_written(tmp_path: Path) -> None:
    """Tokens, masks and borders of both splits; first tokens never count; the digest tells files apart."""
    train = [TokenizedExample(token_ids=[1, 2, 70000], loss_mask=[True, False, True])] * 2
    path = tmp_path / "dataset.safetensors"
    write_dataset(path, train, [TokenizedExample(token_ids=[5, 6], loss_mask=[False, True])])
    dataset = read_dataset(path)
    assert [e.token_ids.tolist() for e in dataset.train] == [[1, 2, 70000]] * 2
    assert [e.loss_mask.tolist() for e in dataset.train] == [[False, False, True]] * 2
    assert dataset.evaluation[-1].token_ids.tolist() == [5, 6]
    assert (dataset.train.num_tokens, dataset.train.num_loss_tokens, dataset.train.longest) == (6, 2, 3)
    digest = dataset.digest
    write_dataset(path, train)
    assert len(read_dataset(path).evaluation) == 0
    assert read_dataset(path).digest != digest
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.safetensors"], "no temporary file is left"


def test_the_digest_of_the_training_data_is_of_its_content(tmp_path: Path) -> None:
    """A known value, so that it is the same on every machine; it sees tokens, masks and borders, not what is held out
    nor how a file is laid out."""

    def digest(*examples: tuple[list[int], list[bool]], held_out: int = 0) -> str:
        given = [TokenizedExample(token_ids=ids, loss_mask=mask) for ids, mask in examples]
        write_dataset(tmp_path / "d", given, given[:held_out])
        dataset = read_dataset(tmp_path / "d")
        assert dataset.train_digest == Examples.of(given).digest()
        return dataset.train_digest

    one, two = ([1, 2, 70000], [False, True, True]), ([3, 4], [False, True])
    known = hashlib.sha256(
        b"token_ids <i4 5\n" + struct.pack("<5i", 1, 2, 70000, 3, 4)
        + b"loss_mask <u1 5\n" + bytes([0, 1, 1, 0, 1])
        + b"starts <i8 3\n" + struct.pack("<3q", 0, 3, 5)
    ).hexdigest()  # fmt: skip
    assert digest(one, two) == digest(one, two, held_out=1) == known
    others = [digest(two, one), digest(one), digest(([1, 2, 70000], [False, True, False]), two)]
    others.append(digest(([1, 2], [False, True]), ([70000, 3, 4], [False, False, True])))
    assert len({known, *others}) == 5


@pytest.mark.parametrize("fault", ["bytes", "missing", "dtype", "starts", "lengths", "short"])
def test_files_of_another_kind_are_refused(tmp_path: Path, fault: str) -> None:
    """Garbage, a lacking array, another type, borders that do not fit: FormatError, never an IndexError later."""
    path = tmp_path / "dataset.safetensors"
    write_dataset(path, [TokenizedExample(token_ids=[1, 2, 3, 4], loss_mask=[False, True, True, True])])
    tensors = load_file(str(path))
    if fault == "bytes":
        path.write_bytes(b"\x80\x04]\x94.")
    else:
        if fault == "missing":
            del tensors["evaluation.starts"]
        elif fault == "dtype":
            tensors["train.token_ids"] = tensors["train.token_ids"].astype(np.int64)
        elif fault == "starts":
            tensors["train.starts"] = np.array([0, 7], np.int64)
        elif fault == "lengths":
            tensors["train.loss_mask"] = tensors["train.loss_mask"][:2]
        else:
            tensors["train.starts"] = np.array([0, 1, 4], np.int64)
        save_file(tensors, str(path))
    with pytest.raises(FormatError):
        read_dataset(path)


def test_examples_are_a_sequence() -> None:
    """Indexing from both ends, slices, and the ends of the range."""
    examples = Examples.of([TokenizedExample(token_ids=[i, i + 1], loss_mask=[False, True]) for i in range(4)])
    assert examples[-1].token_ids.tolist() == [3, 4]
    assert [e.token_ids[0] for e in examples[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        examples[4]


def test_torch_is_not_imported() -> None:
    """The front end builds datasets without the engine proper."""
    code = "import sys, engine.training.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
