"""Managing adapters through the SDK and a real server: where they come from, their names, which of them stay."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import whet
from tests.rpc.calls import LASTING
from tests.rpc.conftest import CONTEXT, MODEL
from tests.rpc.harness import ServerProcess
from tests.rpc.tiny_tokenizer import save_tiny_tokenizer
from tests.tiny import save_tiny_llama
from whet import Client
from whet.cli.app import run as run_command
from whet.cli.commands import cli

EXAMPLES = [{"prompt": f"{number} is", "completion": " a number."} for number in range(8)]


@pytest.fixture(scope="module")
def client(rpc_server: ServerProcess) -> Iterator[Client]:
    with Client(rpc_server.address) as made:
        yield made


def train(client: Client, adapter: str, examples: Any = EXAMPLES, **options: Any) -> str:
    """A short run; returns its id."""
    values = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2, "max_seq_len": 64, "rank": 4} | options
    if "init_adapter" in values:
        del values["rank"]
    run = client.train(examples, model=MODEL, adapter=adapter, **values)
    run.result()
    return run.id


def names(infos: list[whet.AdapterInfo]) -> list[tuple[str, int]]:
    return [(info.name, info.version) for info in infos]


def versions(client: Client, name: str) -> list[tuple[int, bool]]:
    return [(info.version, info.live) for info in client.adapters(model=MODEL, name=name)]


def command(server: ServerProcess, *arguments: str) -> int:
    return run_command(cli, ["--server", server.address, *arguments])


# ------------------------------------------------------------------------------------------------------------ lineage


def test_a_run_and_what_went_on_from_it(
    client: Client, rpc_server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each version names its run, its data and its parent, by Train and by Adapt; the same data has the same digest."""
    first = train(client, "line")
    second = train(client, "line-next", init_adapter="line")
    client.adapt(EXAMPLES[:2], model=MODEL, adapter="line-next", learning_rate=1e-2)
    a, b, c = client.adapter_lineage("line-next", model=MODEL)
    assert names([a, b, c]) == [("line", 1), ("line-next", 1), ("line-next", 2)]
    assert [a.parent, b.parent, c.parent] == [
        None, whet.AdapterVersion(name="line", version=1), whet.AdapterVersion(name="line-next", version=1),
    ]  # fmt: skip
    assert (a.run_id, b.run_id) == (first, second)
    assert len(a.data_digest) == 64
    assert a.data_digest == b.data_digest != c.data_digest
    assert {info.base_digest for info in (a, b, c)} == {client.model(MODEL).weights_digest}
    assert all(info.created_at is not None and not info.forced for info in (a, b, c))
    assert names(client.adapter_lineage("line-next", model=MODEL, version=1)) == [("line", 1), ("line-next", 1)]
    assert command(rpc_server, "adapters", "lineage", "line-next", "-m", MODEL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        [MODEL, "-", "-"], ["line", "1", "base"], ["line-next", "1", "line:1"], ["line-next", "2", "line-next:1"],
    ]  # fmt: skip
    assert command(rpc_server, "adapters", "show", "line", "-m", MODEL) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["data_digest"], shown["run_id"], shown["parent"]) == (a.data_digest, first, "-")
    client.delete_adapter("line", model=MODEL)
    left = client.adapter_lineage("line-next", model=MODEL)
    assert names(left) == [("line-next", 1), ("line-next", 2)]
    assert left[0].parent == whet.AdapterVersion(name="line", version=1), "what is deleted is still named"


# ------------------------------------------------------------------------------------------------------ rename, revert


def test_an_adapter_is_renamed_under_a_request(client: Client) -> None:
    """The stream that began under the old name goes on to its end and is what it would have been; from then on only
    the new name is known, and says the same."""
    train(client, "name-old")
    train(client, "name-old")
    options: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "ignore_eos": True}
    alone = client.complete("3 is", adapter="name-old", max_tokens=300, **options)
    stream = client.generate("3 is", adapter="name-old", max_tokens=300, **options)
    next(stream)
    renamed = client.rename_adapter("name-old", "name-new", model=MODEL)
    assert names(renamed) == [("name-new", 1), ("name-new", 2)]
    assert stream.result().token_ids == alone.token_ids
    after = client.complete("3 is", adapter="name-new", max_tokens=300, **options)
    assert (after.token_ids, after.adapter_version) == (alone.token_ids, 2)
    with pytest.raises(whet.NotFoundError):
        client.complete("3 is", adapter="name-old", max_tokens=1, **options)


def test_no_prefix_of_the_old_name_is_served(client: Client) -> None:
    """Blocks go by the weights that act, not by the name: after a rename the same prompt finds those of its own
    weights, and never those that were cached under the name before, in either direction."""
    prompt = "a prompt of many blocks, so that there is something to share. " * 3
    options: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    train(client, "swap-a", rank=4, max_steps=3, learning_rate=5e-2)
    train(client, "swap-b", rank=8, max_steps=3, learning_rate=5e-2, seed=1)
    texts = {name: client.complete(prompt, adapter=name, **options) for name in ("swap-a", "swap-b")}
    assert client.complete(prompt, adapter="swap-a", **options).usage.cached_prompt_tokens > 0
    assert texts["swap-a"].token_ids != texts["swap-b"].token_ids
    client.rename_adapter("swap-a", "swap-c", model=MODEL)
    client.rename_adapter("swap-b", "swap-a", model=MODEL)
    first = client.complete(prompt, adapter="swap-a", **options)
    assert first.usage.cached_prompt_tokens > 0, "the same weights act"
    assert first.token_ids == texts["swap-b"].token_ids
    moved = client.complete(prompt, adapter="swap-c", **options)
    assert moved.usage.cached_prompt_tokens > 0, "the same weights act"
    assert moved.token_ids == texts["swap-a"].token_ids


def test_renames_that_are_refused(client: Client) -> None:
    """Unknown, taken, no name; and while a run trains one of the names, or goes on from the old one."""
    train(client, "keep")
    train(client, "keep-too")
    for name, new_name, error, told in (
        ("unknown", "new", whet.NotFoundError, "'unknown'"),
        ("keep", "keep-too", whet.AlreadyExistsError, "new_name is 'keep-too'"),
        ("keep", "keep", whet.AlreadyExistsError, "new_name is 'keep'"),
        ("keep", "../new", whet.InvalidArgumentError, "new_name"),
        ("", "new", whet.InvalidArgumentError, "name"),
    ):
        with pytest.raises(error, match=told):
            client.rename_adapter(name, new_name, model=MODEL)
    run = client.train(
        EXAMPLES, model=MODEL, adapter="keep-run", init_adapter="keep", max_steps=5000, batch_size=4, max_seq_len=64,
        on_disconnect="cancel",
    )  # fmt: skip
    try:
        assert run.id
        for name, new_name, field in (("keep", "new", "name"), ("keep-too", "keep-run", "new_name")):
            with pytest.raises(whet.FailedPreconditionError, match=f"^{field} is .* {run.id} ") as busy:
                client.rename_adapter(name, new_name, model=MODEL)
            assert busy.value.reason == "ADAPTER_BUSY"
    finally:
        run.cancel()
    assert versions(client, "keep") == [(1, True)]
    client.rename_adapter("keep", "kept", model=MODEL)


def test_revert_and_go_on(client: Client, rpc_server: ServerProcess) -> None:
    """Back along the version's own parents; Adapt then goes on from there, under a new number."""
    train(client, "back")
    for _ in range(2):
        client.adapt(EXAMPLES[:2], model=MODEL, adapter="back", learning_rate=1e-2)
    assert client.revert_adapter("back", model=MODEL).version == 2
    assert client.revert_adapter("back", model=MODEL).version == 1
    with pytest.raises(whet.FailedPreconditionError, match="no other version") as caught:
        client.revert_adapter("back", model=MODEL)
    assert caught.value.reason == "NO_EARLIER_VERSION"
    assert client.adapt(EXAMPLES[:2], model=MODEL, adapter="back", learning_rate=1e-2).version == 4
    assert client.adapter("back", model=MODEL).parent == whet.AdapterVersion(name="back", version=1)
    assert client.revert_adapter("back", model=MODEL, version=3).version == 3
    with pytest.raises(whet.NotFoundError):
        client.revert_adapter("back", model=MODEL, version=9)
    assert command(rpc_server, "adapters", "revert", "back", "-m", MODEL) == 0
    assert versions(client, "back") == [(1, False), (2, True), (3, False), (4, False)]


# ---------------------------------------------------------------------------------------------------------- retention


def test_prune(client: Client, rpc_server: ServerProcess) -> None:
    train(client, "prune")
    for _ in range(4):
        client.adapt(EXAMPLES[:2], model=MODEL, adapter="prune", learning_rate=1e-2)
    client.revert_adapter("prune", model=MODEL, version=2)
    would = client.prune_adapters("prune", model=MODEL, keep_last=1, dry_run=True)
    assert names(would) == [("prune", 1), ("prune", 3), ("prune", 4)]
    assert len(versions(client, "prune")) == 5
    assert command(rpc_server, "adapters", "prune", "prune", "-m", MODEL, "--keep-last", "1") == 0
    assert versions(client, "prune") == [(2, True), (5, False)]
    with pytest.raises(whet.NotFoundError):
        client.complete("x", model=MODEL, adapter="prune", adapter_version=3, max_tokens=1)
    for name, keep_last, error in (
        ("unknown", 1, whet.NotFoundError),
        ("prune", -1, whet.InvalidArgumentError),
        ("a/b", 1, whet.InvalidArgumentError),
    ):
        with pytest.raises(error):
            client.prune_adapters(name, model=MODEL, keep_last=keep_last)
    assert client.prune_adapters("prune", model=MODEL, keep_last=0) != []
    assert versions(client, "prune") == [(2, True)]


def test_prune_keeps_what_runs_and_requests_need(client: Client) -> None:
    """The version of a stream that is under way, and the one that a run which is queued or running went on from until
    it has a checkpoint of its own."""
    train(client, "need")
    for _ in range(3):
        client.adapt(EXAMPLES[:2], model=MODEL, adapter="need", learning_rate=1e-2)
    stream = client.generate("x", model=MODEL, adapter="need", adapter_version=1, ignore_eos=True, **LASTING)
    next(stream)
    run = client.train(
        EXAMPLES, model=MODEL, adapter="need-run", init_adapter="need", init_adapter_version=2, max_steps=5000,
        batch_size=4, max_seq_len=64,
    )  # fmt: skip
    assert run.id
    assert names(client.prune_adapters("need", model=MODEL, keep_last=1)) == [("need", 3)]
    run.cancel()
    stream.close()
    assert names(client.prune_adapters("need", model=MODEL, keep_last=1)) in ([("need", 1)], []), "it may end later"
    assert (2, False) in versions(client, "need"), "the run can be resumed, and has no checkpoint"
    client.delete_adapter("need", model=MODEL)


def test_the_policy_of_the_server(start_server: Any) -> None:
    """--max-adapter-versions, at each publication: by Train, Adapt, import and combination."""
    server = start_server("--max-adapter-versions", "2")
    with Client(server.address) as client:
        train(client, "tone", publish_every=1, max_steps=4)
        assert versions(client, "tone") == [(3, False), (4, True)]
        client.adapt(EXAMPLES[:2], model=MODEL, adapter="tone", learning_rate=1e-2)
        assert versions(client, "tone") == [(4, False), (5, True)]
        client.load_adapter("tone", model=MODEL, version=4)
        client.combine_adapters("tone", {"tone": 0.5}, model=MODEL)
        assert versions(client, "tone") == [(5, False), (6, True)]
        assert [str(source) for source in client.adapter("tone", model=MODEL).sources] == ["0.5*tone:4"]


# ----------------------------------------------------------------------------------------------------- force, combine


def test_an_adapter_of_another_base(start_server: Any, tmp_path: Path) -> None:
    """Refused by import, by load after the model was replaced, and at start-up; taken by force, and told."""
    other = save_tiny_tokenizer(save_tiny_llama(tmp_path / "other", seed=1, max_position_embeddings=CONTEXT))
    server = start_server()
    with Client(server.address) as client:
        train(client, "tone")
        client.export_adapter("tone", model=MODEL, directory=tmp_path / "out")
    server.stop()
    replaced = ["--model", f"{MODEL}={other}"]
    server = start_server(models=replaced)
    with Client(server.address) as client:
        for attempt in (
            lambda: client.load_adapter("tone", model=MODEL),
            lambda: client.import_adapter("copy", model=MODEL, directory=tmp_path / "out"),
            lambda: client.combine_adapters("mixed", [whet.WeightedAdapter(name="tone", version=1)], model=MODEL),
        ):
            with pytest.raises(whet.FailedPreconditionError, match="force") as caught:
                attempt()
            assert caught.value.reason == "ADAPTER_BASE_MISMATCH"
        assert names(client.adapters(model=MODEL)) == [("tone", 1)]
        assert client.load_adapter("tone", model=MODEL, force=True).forced
        assert client.complete("x", model=MODEL, adapter="tone", max_tokens=2).adapter_version == 1
        assert client.import_adapter("copy", model=MODEL, directory=tmp_path / "out", force=True).forced
        assert client.combine_adapters("mixed", {"tone": 1.0, "copy": 1.0}, model=MODEL).forced
        assert command(server, "adapters", "load", "tone", "-m", MODEL, "--force") == 0
    server.stop()
    server = start_server(models=replaced)
    with Client(server.address) as client:
        assert client.adapter("tone", model=MODEL).forced
        assert client.complete("x", model=MODEL, adapter="tone", max_tokens=2).adapter_version == 1
    server.stop()
    given = ["--adapter", f"given={MODEL}:{tmp_path / 'out'}"]
    with pytest.raises(AssertionError, match="force"):
        start_server(*given, models=replaced, state="fresh")
    server = start_server(*given, "--force-adapters", models=replaced, state="forced")
    with Client(server.address) as client:
        info = client.adapter("given", model=MODEL)
        assert (info.version, info.forced, info.live) == (0, True, True)
        assert info.base_digest != client.model(MODEL).weights_digest


def test_combine(client: Client, rpc_server: ServerProcess) -> None:
    """Both ways, from the SDK and from the command; a sum of two halves of one adapter says what the adapter says."""
    train(client, "mix-a", rank=4, learning_rate=5e-2)
    train(client, "mix-b", rank=4, learning_rate=5e-2, seed=1)
    halves = [whet.WeightedAdapter(name="mix-a", version=1, weight=0.5), whet.WeightedAdapter(name="mix-a", weight=0.5)]
    half = client.combine_adapters("mix-half", halves, model=MODEL)
    assert (half.rank, half.combination_method, half.live, half.forced) == (8, "cat", True, False)
    options: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    whole = client.complete("3 is", adapter="mix-a", prompt_logprobs=True, **options)
    twice = client.complete("3 is", adapter="mix-half", prompt_logprobs=True, **options)
    assert whole.prompt_logprobs is not None
    assert twice.prompt_logprobs is not None
    assert twice.prompt_logprobs[1:] == pytest.approx(whole.prompt_logprobs[1:], abs=1e-4)
    linear = client.combine_adapters("mix", {"mix-a": 0.7, "mix-b": -0.3}, model=MODEL, method="linear")
    assert (linear.rank, linear.combination_method) == (4, "linear")
    assert [str(source) for source in linear.sources] == ["0.7*mix-a:1", "-0.3*mix-b:1"]
    assert command(rpc_server, "adapters", "combine", "mix", "mix-a:1=0.7", "mix-b", "-m", MODEL) == 0
    assert [str(source) for source in client.adapter("mix", model=MODEL).sources] == ["0.7*mix-a:1", "1*mix-b:1"]
    client.rename_adapter("mix-a", "mix-c", model=MODEL)
    chain = client.adapter_lineage("mix", model=MODEL)
    assert names(chain) == [("mix-c", 1), ("mix-b", 1), ("mix", 2)]
    assert str(chain[-1].sources[0]) == "0.7*mix-c:1"
    assert command(rpc_server, "adapters", "combine", "mix", "mix-a:x=1", "-m", MODEL) == 2


@pytest.mark.parametrize(("sources", "method", "field"), [
    ({}, None, "sources"),
    ({"bad-a": float("nan")}, None, "sources[0].weight"),
    ({"bad-a": 1.0, "bad-b": float("inf")}, None, "sources[1].weight"),
    ({"a/b": 1.0}, None, "sources[0].adapter.name"),
    ({"bad-a": 1.0, "bad-b": 1.0}, "linear", "sources"),
    ({"bad-a": 1.0}, "average", "method"),
])  # fmt: skip
def test_what_cannot_be_combined(client: Client, sources: dict[str, float], method: str | None, field: str) -> None:
    if not versions(client, "bad-b"):
        train(client, "bad-a", rank=4)
        train(client, "bad-b", rank=2)
    with pytest.raises(whet.InvalidArgumentError) as caught:
        client.combine_adapters("bad", sources, model=MODEL, method=method)
    assert [violation.field for violation in caught.value.field_violations] == [field]
    with pytest.raises(whet.NotFoundError):
        client.combine_adapters("bad", {"unknown": 1.0}, model=MODEL)
    assert versions(client, "bad") == []


# -------------------------------------------------------------------------------------------------------------- merge


def test_merge(client: Client, rpc_server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """The new model is listed and loaded, and gives every token of the prompt the log-probability that base and adapter
    give it; a repeated call finds the first one's report; the command does the same."""
    train(client, "fuse", learning_rate=5e-2)
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "prompt_logprobs": True}
    expected = client.complete("3 is a", model=MODEL, adapter="fuse", **options)
    job = client.merge_adapter("fuse", model=MODEL, output="fused", request_id="fuse-once")
    progress = list(job)
    report = job.report
    assert [p.tensors_done for p in progress] == list(range(1, progress[-1].tensors_total + 1))
    assert (report.output, report.dtype, report.loaded) == ("fused", "float32", True)
    assert report.num_merged + report.num_kept == progress[-1].tensors_total
    assert report.adapters == [whet.WeightedAdapter(name="fuse", version=1, weight=1.0)]
    assert 0.0 < report.relative_change < 1.0
    model = client.model("fused")
    assert (model.state, model.quantization) == ("ready", "none")
    assert model.weights_digest != client.model(MODEL).weights_digest
    alone = client.complete("3 is a", model="fused", **options)
    assert expected.prompt_logprobs is not None
    assert alone.prompt_logprobs is not None
    assert alone.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=1e-4)
    assert alone.text == expected.text
    assert client.merge_adapter("fuse", model=MODEL, output="fused", request_id="fuse-once").report == report
    arguments = ("fuse:1=0.5", "-m", MODEL, "-o", "fused-half", "--no-load", "--dtype", "bfloat16")
    assert command(rpc_server, "adapters", "merge", *arguments) == 0
    assert "0.5*fuse:1" in capsys.readouterr().out
    assert client.model("fused-half").state == "unloaded"
    assert client.load_model("fused-half").state == "ready"
    for name in ("fused", "fused-half"):
        client.unload_model(name)


def test_what_cannot_be_merged(client: Client, rpc_server: ServerProcess) -> None:
    """Each is refused with the field or the value at fault; no model appears."""
    train(client, "unfused")
    before = [model.name for model in client.models()]
    for adapters, values, field in (
        ({}, {}, "adapters"),
        ({"unfused": float("nan")}, {}, "adapters[0].weight"),
        ({"a/b": 1.0}, {}, "adapters[0].adapter.name"),
        ("unfused", {"output": "../x"}, "output"),
        ("unfused", {"output": ""}, "output"),
        ("unfused", {"dtype": "int8"}, "dtype"),
    ):
        with pytest.raises(whet.InvalidArgumentError) as caught:
            client.merge_adapter(adapters, **({"model": MODEL, "output": "x"} | values)).result()  # type: ignore[arg-type]
        assert [violation.field for violation in caught.value.field_violations] == [field]
    for name, values, error in (
        ("unknown", {}, whet.NotFoundError),
        ("unfused", {"model": "unknown"}, whet.NotFoundError),
        ("unfused", {"output": MODEL}, whet.AlreadyExistsError),
    ):
        with pytest.raises(error):
            client.merge_adapter(name, **({"model": MODEL, "output": "x"} | values)).result()  # type: ignore[arg-type]
    assert [model.name for model in client.models()] == before
    assert list((rpc_server.state_dir / "models").glob(".*")) == []


def test_a_worker_killed_in_a_merge_leaves_no_model(start_server: Any, tmp_path: Path) -> None:
    """The call ends with UNAVAILABLE, ListModels knows nothing of the half, its files are gone, and its name is free
    once the worker is back. What a server that died as well left, its next start clears."""
    deep = save_tiny_tokenizer(
        save_tiny_llama(tmp_path / "deep", num_hidden_layers=40, max_position_embeddings=CONTEXT)
    )
    server = start_server("--job-slice-ms", "0.001", models=["--model", f"{MODEL}={deep}"])
    written = server.state_dir / "models"
    with Client(server.address, retry=None) as client:
        client.adapt(EXAMPLES[:2], model=MODEL, adapter="tone")
        for attempt in range(20):  # until it is caught in the middle
            job = client.merge_adapter("tone", model=MODEL, output=f"half-{attempt}", load=False)
            next(job)
            os.kill(server.worker_pid(), signal.SIGKILL)
            try:
                job.result()
            except whet.UnavailableError:
                break
        else:
            pytest.fail("every merge had ended before its worker was killed")
        assert list(written.glob(".*")) == []
        assert f"half-{attempt}" not in [model.name for model in client.models()]
        assert not (written / f"half-{attempt}").exists()
        merged = client.merge_adapter("tone", model=MODEL, output=f"half-{attempt}", load=False).report
        assert merged.num_merged == 40 * 7
    server.stop()
    (written / ".half.abcd1234").mkdir()
    start_server(models=["--model", f"{MODEL}={deep}"])
    assert list(written.glob(".*")) == []


async def test_asyncio(rpc_server: ServerProcess) -> None:
    """The same calls, awaited."""
    async with whet.AsyncClient(rpc_server.address) as client:
        await client.adapt(EXAMPLES[:2], model=MODEL, adapter="async")
        await client.adapt(EXAMPLES[:2], model=MODEL, adapter="async")
        assert (await client.revert_adapter("async", model=MODEL)).version == 1
        await client.combine_adapters("async", {"async": 2.0}, model=MODEL)
        await client.rename_adapter("async", "async-new", model=MODEL)
        assert names(await client.adapter_lineage("async-new", model=MODEL)) == [("async-new", 1), ("async-new", 3)]
        job = client.merge_adapter("async-new", model=MODEL, output="async-merged", load=False)
        assert (await anext(job)).tensors_done == 1
        assert (await job.result()).adapters == [whet.WeightedAdapter(name="async-new", version=3, weight=1.0)]
        gone = await client.prune_adapters("async-new", model=MODEL, keep_last=1)
        assert names(gone) == [("async-new", 1), ("async-new", 2)]
