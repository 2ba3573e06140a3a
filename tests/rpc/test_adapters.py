"""Managing adapters through the SDK and a real server: where they come from, their names, which of them stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import whet
from tests.rpc.conftest import MODEL
from tests.rpc.harness import ServerProcess
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
