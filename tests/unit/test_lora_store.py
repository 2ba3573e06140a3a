"""The adapter store: versions appear whole or not at all, no number is used twice, requests keep what they hold."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import FailedPreconditionError, FormatError, InvalidArgumentError, NotFoundError
from engine.lora.adapter import Adapter
from engine.lora.peft import WEIGHTS_NAME
from engine.lora.store import MAX_RESIDENT_OLD_VERSIONS, AdapterStore
from engine.lora.targets import LinearLike
from tests.unit.test_lora_peft import LINEARS

Q0 = "model.layers.0.self_attn.q_proj"


class Targets:
    """The two facts of a model that the store asks for."""

    compute_dtype = torch.bfloat16

    def lora_targets(self) -> Mapping[str, LinearLike]:
        return LINEARS


def open_store(root: Path | None, digest: str = "base") -> AdapterStore:
    return AdapterStore("tiny", root, Targets(), base_digest=digest)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return open_store(tmp_path)


def filled(value: float, name: str = "tone") -> Adapter:
    modules = {
        module: (torch.full((2, shape.in_features), value), torch.full((shape.out_features, 2), value))
        for module, shape in LINEARS.items()
    }
    return Adapter(name=name, version=0, rank=2, alpha=3.0, modules=modules)


def value_of(adapter: Adapter) -> float:
    return float(adapter.modules[Q0][0][0, 0])


def test_publish_makes_a_version_live(store: AdapterStore, tmp_path: Path) -> None:
    """The next version, on disk in float32 with its lineage, in memory in the model's type, live at once."""
    first = store.publish(filled(1.0), run_id="r1", best_nll=2.5)
    second = store.publish(filled(2.0), run_id="r2", parent=("tone", 1))
    assert (first.version, second.version) == (1, 2)
    assert [(i.version, i.live, i.run_id, i.best_nll) for i in store.list()] == [
        (1, False, "r1", 2.5),
        (2, True, "r2", None),
    ]
    assert value_of(store.get("tone")) == 2.0
    assert store.get("tone").modules[Q0][0].dtype == torch.bfloat16
    assert store.path("tone") == tmp_path / "tone" / "2"
    lineage = json.loads((tmp_path / "tone" / "2" / "lineage.json").read_text())
    assert lineage["parent"] == ["tone", 1]
    assert lineage["base_digest"] == "base"
    info = store.info("tone", 1)
    assert (info.rank, info.alpha, info.target_modules) == (2, 3.0, ["q_proj", "up_proj"])
    assert info.num_parameters == filled(1.0).num_parameters()


def test_a_request_keeps_the_version_it_holds(store: AdapterStore) -> None:
    """Publishing, unloading and deleting leave the tensors of an adapter that somebody holds as they were."""
    source = filled(1.0)
    store.publish(source)
    held = store.get("tone")
    source.modules[Q0][0].fill_(9.0)
    store.publish(filled(2.0))
    store.unload("tone")
    store.delete("tone")
    assert value_of(held) == 1.0
    assert held.version == 1


def test_restart_brings_back_what_was_live(store: AdapterStore, tmp_path: Path) -> None:
    """A new store on the same directory serves the live version; one that was unloaded stays so until it is loaded."""
    store.publish(filled(1.0))
    store.publish(filled(2.0))
    store.load("tone", 1)
    again = open_store(tmp_path)
    assert value_of(again.get("tone")) == 1.0
    again.unload("tone")
    third = open_store(tmp_path)
    with pytest.raises(NotFoundError, match="not loaded") as caught:
        third.get("tone")
    assert caught.value.reason == "ADAPTER_NOT_LOADED"
    with pytest.raises(NotFoundError):
        third.get("tone", 2)
    assert [(i.version, i.live, i.loaded) for i in third.list()] == [(1, False, False), (2, False, False)]
    assert third.load("tone").version == 2
    assert value_of(third.get("tone")) == 2.0


def test_versions_are_never_used_twice(store: AdapterStore, tmp_path: Path) -> None:
    """After deleting the newest, or all, the numbers go on; also in a new process."""
    for value in (1.0, 2.0, 3.0):
        store.publish(filled(value))
    store.delete("tone", 3)
    assert value_of(store.get("tone")) == 2.0, "the newest that is left is live"
    assert store.publish(filled(4.0)).version == 4
    store.delete("tone")
    assert store.list() == []
    with pytest.raises(NotFoundError):
        store.get("tone")
    assert open_store(tmp_path).publish(filled(5.0)).version == 5


def test_deleting_an_old_version_leaves_the_live_one(store: AdapterStore) -> None:
    """Only the named version goes."""
    store.publish(filled(1.0))
    store.publish(filled(2.0))
    store.delete("tone", 1)
    assert [i.version for i in store.list()] == [2]
    assert value_of(store.get("tone")) == 2.0
    with pytest.raises(NotFoundError, match="has no version 1; it has 2"):
        store.get("tone", 1)


def test_what_no_load_would_take_is_not_published(store: AdapterStore) -> None:
    """Values that are not finite: the version before stays live."""
    store.publish(filled(1.0))
    for value in (float("inf"), float("nan")):
        with pytest.raises(FormatError, match="not finite"):
            store.publish(filled(value))
    assert [(i.version, i.live) for i in store.list()] == [(1, True)]


def test_a_deletion_that_leaves_nothing_to_load_is_done_all_the_same(store: AdapterStore, tmp_path: Path) -> None:
    """Of two versions the older is of other base weights: without the newer one none is live, until it is forced."""
    store.publish(filled(1.0))
    other = open_store(tmp_path, digest="other")
    other.publish(filled(2.0))
    other.delete("tone", 2)
    assert [(i.version, i.live) for i in other.list()] == [(1, False)]
    with pytest.raises(NotFoundError):
        other.get("tone")
    assert other.load("tone", force=True).live


def test_old_versions_are_read_on_demand_and_few_stay(store: AdapterStore) -> None:
    """A request may name any stored version; the least recently used of them leave memory."""
    count = MAX_RESIDENT_OLD_VERSIONS + 3
    for value in range(1, count + 1):
        store.publish(filled(float(value)))
    for version in range(1, count):
        assert value_of(store.get("tone", version)) == version
    loaded = [i.version for i in store.list() if i.loaded]
    assert loaded == [*range(count - MAX_RESIDENT_OLD_VERSIONS, count), count]


def test_another_process_sees_a_new_version(store: AdapterStore, tmp_path: Path) -> None:
    """Two stores on one directory: what one publishes the other can load, and their numbers do not collide."""
    other = open_store(tmp_path)
    store.publish(filled(1.0))
    assert value_of(other.get("tone", 1)) == 1.0
    assert other.publish(filled(2.0)).version == 2
    assert store.load("tone", 2).live
    assert value_of(store.get("tone")) == 2.0


def test_a_failed_write_leaves_nothing(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the old version stays live, no half-written one is listed, and the next publish succeeds."""
    store.publish(filled(1.0))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("engine.lora.peft.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            store.publish(filled(2.0))
    assert [i.version for i in store.list()] == [1]
    assert sorted(p.name for p in (tmp_path / "tone").iterdir()) == ["1", "state.json"]
    assert value_of(open_store(tmp_path).get("tone")) == 1.0
    assert store.publish(filled(3.0)).version == 2


def test_a_crash_before_the_rename_is_cleared(store: AdapterStore, tmp_path: Path) -> None:
    """A directory that a dead process left unfinished is no version, and is removed once it is old."""
    store.publish(filled(1.0))
    for name, age in ((".new-1", 7200.0), (".new-2", 0.0)):
        left = tmp_path / "tone" / name
        left.mkdir()
        (left / WEIGHTS_NAME).write_bytes(b"half")
        os.utime(left, (time.time() - age,) * 2)
    again = open_store(tmp_path)
    assert [i.version for i in again.list()] == [1]
    assert not (tmp_path / "tone" / ".new-1").exists()
    assert (tmp_path / "tone" / ".new-2").exists(), "it may be another process at work"


def test_lost_state_falls_back_to_the_newest(store: AdapterStore, tmp_path: Path) -> None:
    """Without state.json, or with a malformed one, the newest version is live."""
    store.publish(filled(1.0))
    store.publish(filled(2.0))
    for content in (None, "not json", '{"live": 77, "loaded": true, "next": 1}'):
        path = tmp_path / "tone" / "state.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        again = open_store(tmp_path)
        assert value_of(again.get("tone")) == 2.0
    assert again.publish(filled(3.0)).version == 3


def test_import_checks_before_it_stores(store: AdapterStore, tmp_path: Path) -> None:
    """A good upload becomes a version and is used up, its other files left behind; a bad one changes nothing."""
    store.publish(filled(1.0))
    staged = tmp_path.parent / f"{tmp_path.name}-staged"
    shutil.copytree(store.path("tone"), staged)
    (staged / "README.md").write_text("hello")
    info = store.import_staged("tone", staged)
    assert (info.version, info.live, info.run_id) == (2, True, "")
    assert not staged.exists()
    assert sorted(p.name for p in store.path("tone").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lineage.json",
    ]  # fmt: skip
    shutil.copytree(store.path("tone"), staged)
    (staged / WEIGHTS_NAME).write_bytes(b"\x00" * 100)
    with pytest.raises(FormatError):
        store.import_staged("tone", staged)
    assert [i.version for i in store.list()] == [1, 2]


def test_adapter_of_the_operator(store: AdapterStore, tmp_path: Path) -> None:
    """It is version 0, live, and not copied; it can be unloaded, not deleted; a published version takes over."""
    elsewhere = open_store(tmp_path / "elsewhere")
    elsewhere.publish(filled(7.0))
    path = elsewhere.path("tone")
    mine = open_store(tmp_path / "mine")
    info = mine.add_from_path("given", path)
    assert (info.version, info.live, info.path) == (0, True, str(path))
    assert value_of(mine.get("given")) == 7.0
    assert mine.path("given") == path
    with pytest.raises(FailedPreconditionError, match="can be unloaded"):
        mine.delete("given")
    assert mine.publish(filled(8.0, "given")).version == 1
    assert value_of(mine.get("given")) == 8.0
    assert value_of(mine.get("given", 0)) == 7.0
    assert mine.load("given", 0).live
    mine.unload("given")
    with pytest.raises(NotFoundError):
        mine.get("given")
    assert path.exists()


def test_adapters_of_other_weights_are_refused(store: AdapterStore, tmp_path: Path) -> None:
    """A model of the same name with other weights does not serve the adapters of the old ones."""
    store.publish(filled(1.0))
    other = open_store(tmp_path, digest="other")
    with pytest.raises(NotFoundError):
        other.get("tone")
    with pytest.raises(FailedPreconditionError, match="other weights") as caught:
        other.load("tone", 1)
    assert caught.value.reason == "ADAPTER_BASE_MISMATCH"


def test_unknown_names_say_what_there_is(store: AdapterStore) -> None:
    """The error lists the adapters of the model; a name that is no name never becomes a path."""
    store.publish(filled(1.0))
    with pytest.raises(NotFoundError, match="it has: tone"):
        store.get("voice")
    for call in (store.path, store.info, store.load, store.unload, store.delete):
        with pytest.raises(NotFoundError):
            call("voice")
    for name in ("../tone", "a/b", "", "."):
        with pytest.raises(InvalidArgumentError):
            store.load(name)
        with pytest.raises(InvalidArgumentError):
            store.publish(filled(1.0, name))


def test_a_deleted_adapter_is_not_named_any_more(store: AdapterStore) -> None:
    """Its directory remembers the next version, but there is nothing to ask for."""
    for name in ("t1", "t2"):
        store.publish(filled(1.0, name))
    store.delete("t2")
    with pytest.raises(NotFoundError, match=r"it has: t1$"):
        store.get("t2")


def test_without_a_directory_nothing_is_published(tmp_path: Path) -> None:
    """Loading the operator's adapter works; publishing says what is missing."""
    store = open_store(None)
    assert not store.can_publish
    assert store.list() == []
    with pytest.raises(FailedPreconditionError, match="state directory"):
        store.publish(filled(1.0))
