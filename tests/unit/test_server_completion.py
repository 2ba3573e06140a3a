"""Completions in the front end: text in whole characters, stop strings that never leak, ends that are counted right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import RequestOutput, Timings, TokenLogprob
from engine.tokenizer import Tokenizer
from server.completion import MAX_COALESCED_TOKENS, Completion, coalesced
from tests.rpc.tiny_tokenizer import BYTE_OFFSET, EOS, save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_path(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ids(text: str) -> list[int]:
    return [BYTE_OFFSET + byte for byte in text.encode()]


def output(token_ids: list[int], finish: str | None = None, **more: object) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        token_ids=token_ids,
        finish_reason=finish,  # type: ignore[arg-type]
        timings=Timings(total_seconds=1.0) if finish else None,
        **more,  # type: ignore[arg-type]
    )


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    completion = Completion(0, tokenizer, [], 0)
    texts = [completion.push(output([token])).text for token in ids("é😀")]
    assert texts == ["", "é", "", "", "", "😀"]


def test_an_unfinished_character_ends_as_a_replacement(tokenizer: Tokenizer) -> None:
    completion = Completion(0, tokenizer, [], 0)
    delta = completion.push(output(ids("é")[:1], "length"))
    assert (delta.text, delta.finish_reason) == ("\ufffd", "length")


def test_a_stop_string_ends_it_and_is_never_seen(tokenizer: Tokenizer) -> None:
    completion = Completion(0, tokenizer, ["STOP"], 0)
    deltas = [completion.push(output([token])) for token in ids("go STOP more")]
    assert "".join(delta.text for delta in deltas) == "go "
    assert (completion.finish_reason, completion.stop_string, completion.num_tokens) == ("stop", "STOP", 7)
    assert sum(delta.finish_reason is not None for delta in deltas) == 1
    # Its timings are the engine's, which comes to its end a little later.
    assert completion.timings is None
    assert completion.push(output([], "stop", num_completion_tokens=12)).text == ""
    assert (completion.timings, completion.num_timed_tokens) == (Timings(total_seconds=1.0), 12)
    assert completion.num_tokens == 7


def test_a_stop_string_on_the_last_token_takes_the_timings_that_came_with_it(tokenizer: Tokenizer) -> None:
    completion = Completion(0, tokenizer, ["STOP"], 0)
    delta = completion.push(output(ids("STOP"), "length"))
    assert (delta.text, delta.finish_reason, completion.stop_string) == ("", "stop", "STOP")
    assert completion.timings is not None


def test_tokens_after_the_stop_string_in_one_output_are_dropped(tokenizer: Tokenizer) -> None:
    completion = Completion(0, tokenizer, ["x"], 0)
    logprobs = [TokenLogprob(token_id=token, logprob=-1.0, rank=1) for token in ids("axb")]
    delta = completion.push(output(ids("axb"), logprobs=logprobs))
    assert (delta.text, delta.token_ids) == ("a", ids("ax"))
    assert delta.logprobs is not None
    assert len(delta.logprobs) == 2
    assert completion.push(output(ids("c"))).token_ids == []


def test_what_was_held_back_comes_when_the_end_comes_otherwise(tokenizer: Tokenizer) -> None:
    completion = Completion(0, tokenizer, ["STOP"], 0)
    assert completion.push(output(ids("ST"))).text == ""
    delta = completion.push(output(ids("O"), "length"))
    assert (delta.text, completion.stop_string) == ("STO", None)


def test_a_stop_string_does_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    completion = Completion(0, tokenizer, ["a"], min_tokens=3)
    deltas = [completion.push(output([token])) for token in ids("aaaa")]
    assert "".join(delta.text for delta in deltas) == "aaa"
    assert completion.num_tokens == 4


def test_a_stop_token_is_no_text(tokenizer: Tokenizer) -> None:
    completion = Completion(0, tokenizer, [], 0)
    delta = completion.push(output([*ids("a"), ids("!")[0]], "stop", stop_token_id=ids("!")[0]))
    assert (delta.text, delta.token_ids, completion.stop_token_id) == ("a", ids("a!"), ids("!")[0])
    completion = Completion(0, tokenizer, [], 0)
    assert completion.push(output([EOS], "stop", stop_token_id=EOS)).text == ""


@given(text=st.text(max_size=40), stop=st.lists(st.text(min_size=1, max_size=3), max_size=3), data=st.data())
def test_the_outcome_does_not_depend_on_the_chunks(
    tokenizer: Tokenizer, text: str, stop: list[str], data: st.DataObject
) -> None:
    """However tokens are grouped into outputs, text, count and end are those of one token at a time."""
    tokens = ids(text)
    one = Completion(0, tokenizer, stop, 0)
    expected = "".join(one.push(output([token])).text for token in tokens) + one.push(output([], "length")).text
    many = Completion(0, tokenizer, stop, 0)
    shown, rest = "", tokens
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += many.push(output(rest[:size])).text
        rest = rest[size:]
    shown += many.push(output([], "length")).text
    assert (shown, many.num_tokens, many.stop_string) == (expected, one.num_tokens, one.stop_string)
    if many.stop_string is None:
        assert shown == text
        assert not any(string in text for string in stop)
    else:
        assert text.startswith(shown + many.stop_string)


@given(
    text=st.text(alphabet="aé😀STOP", max_size=30),
    cuts=st.lists(st.integers(1, 9), max_size=12),
    stop=st.sampled_from([[], ["STOP"], ["aa"]]),
    ends_with_eos=st.booleans(),
)
def test_outputs_that_have_gathered_say_what_each_would_have(
    tokenizer: Tokenizer, text: str, cuts: list[int], stop: list[str], ends_with_eos: bool
) -> None:
    """However many outputs come as one: the same text, tokens, log-probabilities and end."""

    def outputs() -> list[RequestOutput]:
        tokens = ids(text) + ([EOS] if ends_with_eos else [])
        made = [
            output([t], logprobs=[TokenLogprob(token_id=t, logprob=-float(i), rank=1)], num_completion_tokens=i + 1)
            for i, t in enumerate(tokens)
        ]
        last = made[-1] if made else output([])
        last.finish_reason, last.timings = ("stop" if ends_with_eos else "length"), Timings(total_seconds=2.0)
        last.stop_token_id = EOS if ends_with_eos else None
        return made or [last]

    def told(groups: list[list[RequestOutput]]) -> tuple[object, ...]:
        completion = Completion(0, tokenizer, stop, 0)
        deltas = [completion.push(one) for group in groups for one in group]
        logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
        tokens = [token for delta in deltas for token in delta.token_ids]
        shown = "".join(delta.text for delta in deltas)
        end = (completion.finish_reason, completion.stop_string, completion.stop_token_id, completion.num_tokens)
        return shown, tokens, logprobs, end, completion.timings, completion.num_timed_tokens

    whole = told([outputs()])
    rest, groups = outputs(), []
    for cut in cuts:
        groups.append(coalesced(rest[:cut]))
        rest = rest[cut:]
    groups.append(coalesced(rest))
    assert told(groups) == whole
    assert all(len(group) <= 1 for group in groups)


def test_completions_stay_apart_and_messages_bounded() -> None:
    """Each completion's outputs are merged by themselves, in order, up to a bound; an error is never merged."""
    gathered = [RequestOutput(request_id="r", index=i % 2, token_ids=[i]) for i in range(2 * MAX_COALESCED_TOKENS + 4)]
    gathered.append(RequestOutput(request_id="r", index=1, finish_reason="error", error_code="internal"))
    merged = coalesced(gathered)
    assert [(one.index, len(one.token_ids)) for one in merged] == [
        (0, MAX_COALESCED_TOKENS), (1, MAX_COALESCED_TOKENS), (0, 2), (1, 2), (1, 0),
    ]  # fmt: skip
    assert merged[1].token_ids[:3] == [1, 3, 5]
    assert merged[-1].finish_reason == "error"
