"""Where versions come from, what they are called, and which of them stay: lineage, rename, force, prune."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ShapeError,
)
from engine.info import AdapterInfo, AdapterSource
from engine.lora.adapter import Adapter
from engine.lora.lineage import Lineage
from engine.lora.peft import WEIGHTS_NAME
from engine.lora.peft_config import CONFIG_NAME
from engine.lora.store import AdapterStore
from engine.lora.versions import StoredVersions
from tests.unit.test_lora_store import filled, open_store, value_of


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return open_store(tmp_path)


def versions(store: AdapterStore, name: str = "tone") -> list[tuple[int, bool]]:
    return [(info.version, info.live) for info in store.list() if info.name == name]


def publish(store: AdapterStore, count: int, name: str = "tone") -> None:
    for value in range(1, count + 1):
        store.publish(filled(float(value), name))


# ------------------------------------------------------------------------------------------------------------ lineage


def test_a_version_tells_all_of_its_origin(store: AdapterStore, tmp_path: Path) -> None:
    """What publish is told is on disk, in the infos, and there again after a restart."""
    sources = [AdapterSource(name="a", version=1, weight=0.5), AdapterSource(name="b", version=2, weight=-1.0)]
    store.publish(filled(1.0), run_id="r1", data_digest="d" * 64, best_nll=2.5)
    store.publish(filled(2.0), run_id="r2", data_digest="e" * 64, parent=("tone", 1))
    store.publish(filled(3.0), sources=sources, combination="cat", forced=True)
    for opened in (store, open_store(tmp_path)):
        first, second, third = opened.list()
        assert (first.parent, first.data_digest, first.run_id, first.base_digest) == (None, "d" * 64, "r1", "base")
        assert (second.parent, second.data_digest, second.forced) == (("tone", 1), "e" * 64, False)
        assert (third.sources, third.combination, third.forced, third.parent) == (sources, "cat", True, None)
        assert all(info.created_at for info in (first, second, third))


@pytest.mark.parametrize(
    "damage", [{"sources": 3}, {"sources": [{"name": "a"}]}, {"parent": "tone"}, {"data_digest": 5, "forced": "yes"}]
)
def test_what_is_malformed_in_a_lineage_stays_unknown(store: AdapterStore, damage: dict[str, object]) -> None:
    directory = Path(store.publish(filled(1.0), run_id="r").path)
    values = json.loads((directory / "lineage.json").read_text())
    (directory / "lineage.json").write_text(json.dumps(values | damage))
    lineage = Lineage.read(directory)
    assert lineage.run_id == "r"
    assert (lineage.sources, lineage.parent, lineage.data_digest, lineage.forced) == ((), None, "", False)


def test_exported_files_tell_their_base(store: AdapterStore, tmp_path: Path) -> None:
    """The digest is in the tensors' metadata, which PEFT passes over; so an import elsewhere knows it."""
    info = store.publish(filled(1.0))
    with safe_open(str(Path(info.path) / "adapter_model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base_weights_digest": "base"}


# ------------------------------------------------------------------------------------------------------------- rename


def test_rename_keeps_versions_state_and_holders(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, 3)
    store.load("tone", 2)
    held, old = store.get("tone"), store.get("tone", 1)
    store.rename("tone", "voice")
    assert versions(store, "voice") == [(1, False), (2, True), (3, False)]
    assert versions(store) == []
    assert value_of(held) == value_of(store.get("voice")) == 2.0
    assert (held.name, store.get("voice").name) == ("tone", "voice")
    assert store.get("voice", 1).modules is old.modules, "what was in memory stays there"
    with pytest.raises(NotFoundError):
        store.get("tone")
    again = open_store(tmp_path)
    assert value_of(again.get("voice")) == 2.0
    assert again.publish(filled(9.0, "voice")).version == 4


def test_a_name_that_was_given_up_goes_on_with_new_numbers(store: AdapterStore, tmp_path: Path) -> None:
    """So a name and a number never stand for two things, also not after a restart."""
    publish(store, 3)
    store.rename("tone", "voice")
    assert store.publish(filled(7.0)).version == 4
    store.delete("tone")
    store.delete("voice")
    assert open_store(tmp_path).publish(filled(8.0)).version == 5
    assert open_store(tmp_path).publish(filled(8.0, "voice")).version == 4


def test_parents_are_found_under_their_present_name(store: AdapterStore) -> None:
    """Through any number of renames, and with the old name in use by another adapter; on disk nothing is rewritten."""
    store.publish(filled(1.0))
    store.publish(filled(2.0), parent=("tone", 1))
    child = store.publish(filled(3.0, "child"), parent=("tone", 2))
    mixed = store.publish(filled(4.0, "mixed"), sources=[AdapterSource(name="tone", version=1, weight=2.0)])
    store.rename("tone", "voice")
    store.rename("voice", "accent")
    store.publish(filled(5.0), parent=("tone", 2))  # the name lives on, from version 3
    store.rename("tone", "other")
    assert store.info("child").parent == ("accent", 2)
    assert store.info("accent", 2).parent == ("accent", 1)
    assert store.info("mixed").sources == [AdapterSource(name="accent", version=1, weight=2.0)]
    assert [info.parent for info in store.list() if info.name == "other"] == [("accent", 2)]
    assert store.present("tone", 3) == ("other", 3)
    assert Lineage.read(Path(child.path)).parent == ("tone", 2)
    assert Lineage.read(Path(mixed.path)).sources[0].name == "tone"
    store.delete("accent", 2)
    assert store.info("child").parent == ("accent", 2), "a parent that is gone is still told"


def test_rename_and_back(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, 2)
    store.publish(filled(3.0, "child"), parent=("tone", 2))
    store.rename("tone", "voice")
    publish(store, 1, "voice")
    store.rename("voice", "tone")
    assert versions(store) == [(1, False), (2, False), (3, True)]
    assert store.info("child").parent == ("tone", 2)
    assert open_store(tmp_path).publish(filled(1.0, "voice")).version == 4


def test_a_rename_that_died_halfway_leaves_either_name(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 2)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        store.rename("tone", "voice")
    monkeypatch.undo()
    again = open_store(tmp_path)
    assert versions(again) == [(1, False), (2, True)]
    assert value_of(again.get("tone")) == 2.0
    again.rename("tone", "voice")
    assert versions(again, "voice") == [(1, False), (2, True)]


def test_another_process_follows_a_rename(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, 2)
    other = open_store(tmp_path)
    store.rename("tone", "voice")
    other.rename("tone", "voice", on_disk=False)
    assert value_of(other.get("voice")) == 2.0
    with pytest.raises(NotFoundError):
        other.get("tone")


def test_renames_that_are_refused_change_nothing(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, 2)
    publish(store, 1, "taken")
    shutil.copytree(store.path("tone", 1), tmp_path.with_name("outside"), dirs_exist_ok=True)
    store.add_from_path("given", tmp_path.with_name("outside"))
    with pytest.raises(AlreadyExistsError, match="taken") as caught:
        store.rename("tone", "taken")
    assert (caught.value.field, caught.value.reason) == ("new_name", "ADAPTER_EXISTS")
    with pytest.raises(AlreadyExistsError):
        store.rename("tone", "tone")
    with pytest.raises(AlreadyExistsError):
        store.rename("tone", "given")
    with pytest.raises(NotFoundError):
        store.rename("unknown", "voice")
    with pytest.raises(InvalidArgumentError, match="new_name"):
        store.rename("tone", "../voice")
    with pytest.raises(FailedPreconditionError, match="operator"):
        store.rename("given", "voice")
    assert versions(store) == [(1, False), (2, True)]
    assert versions(store, "taken") == [(1, True)]


# -------------------------------------------------------------------------------------------------------------- force


def test_a_version_of_other_weights_is_forced_once(store: AdapterStore, tmp_path: Path) -> None:
    """Force is remembered for this base alone; the version then serves, and says that it was forced."""
    publish(store, 2)
    other = open_store(tmp_path, digest="other")
    for attempt in (lambda: other.load("tone", 1), lambda: other.get("tone", 1), lambda: other.read_exact("tone", 1)):
        with pytest.raises(FailedPreconditionError, match="force") as caught:
            attempt()
        assert caught.value.reason == "ADAPTER_BASE_MISMATCH"
    assert not other.info("tone", 1).forced
    assert other.load("tone", 1, force=True).forced
    assert value_of(other.get("tone")) == 1.0
    again = open_store(tmp_path, digest="other")
    assert value_of(again.get("tone")) == 1.0, "a restart serves it as before"
    assert again.info("tone", 1).forced
    assert value_of(again.read_exact("tone")) == 1.0
    assert not again.info("tone", 2).forced
    with pytest.raises(FailedPreconditionError):
        again.get("tone", 2)
    with pytest.raises(FailedPreconditionError):
        open_store(tmp_path, digest="a third").load("tone", 1)
    assert again.publish(filled(3.0), parent=("tone", 1)).version == 3
    assert again.info("tone", 1).forced, "publishing forgets nothing"


def test_force_without_need_forces_nothing(store: AdapterStore) -> None:
    publish(store, 2)
    assert not store.load("tone", 1, force=True).forced


def staged(store: AdapterStore, to: Path) -> Path:
    """An upload of the live version: its PEFT files alone."""
    shutil.copytree(store.path("tone"), to)
    (to / "lineage.json").unlink()
    return to


def test_an_import_of_other_weights_is_refused_unless_forced(tmp_path: Path) -> None:
    store, other = open_store(tmp_path / "a"), open_store(tmp_path / "b", digest="other")
    store.publish(filled(1.0))
    with pytest.raises(FailedPreconditionError) as caught:
        other.import_staged("copy", staged(store, tmp_path / "s1"))
    assert caught.value.reason == "ADAPTER_BASE_MISMATCH"
    assert other.list() == []
    info = other.import_staged("copy", staged(store, tmp_path / "s2"), force=True)
    assert (info.forced, info.base_digest, info.live) == (True, "base", True)
    again = open_store(tmp_path / "b", digest="other")
    assert value_of(again.get("copy")) == 1.0
    assert again.info("copy").forced


def test_shapes_must_fit_even_so(tmp_path: Path) -> None:
    store, other = open_store(tmp_path / "a"), open_store(tmp_path / "b", digest="other")
    adapter = filled(1.0)
    adapter.modules = {name: (a[:, :-1], b) for name, (a, b) in adapter.modules.items()}
    store.publish(adapter)
    with pytest.raises(ShapeError):
        other.import_staged("copy", staged(store, tmp_path / "s"), force=True)
    assert other.list() == []
    shutil.copytree(tmp_path / "a" / "tone", tmp_path / "b" / "tone")
    with pytest.raises(ShapeError):
        other.load("tone", 1, force=True)
    assert not other.info("tone", 1).forced


def test_a_directory_of_the_operators_is_checked_as_well(tmp_path: Path) -> None:
    store, other = open_store(tmp_path / "a"), open_store(tmp_path / "b", digest="other")
    path = Path(store.publish(filled(1.0)).path)
    with pytest.raises(FailedPreconditionError):
        other.add_from_path("given", path)
    info = other.add_from_path("given", path, force=True)
    assert (info.forced, info.base_digest, info.version) == (True, "base", 0)
    assert other.list()[0].forced
    assert value_of(other.read_exact("given")) == 1.0


# -------------------------------------------------------------------------------------------------------------- prune


def pruned(infos: list[AdapterInfo]) -> list[tuple[str, int]]:
    return [(info.name, info.version) for info in infos]


@pytest.mark.parametrize("damaged", [WEIGHTS_NAME, CONFIG_NAME])
def test_a_damaged_version_does_not_stop_prune(
    store: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    """It is named in the log and stays; what can be told of is pruned."""
    for value in (1.0, 2.0, 3.0, 4.0):
        store.publish(filled(value))
    (tmp_path / "tone" / "2" / damaged).write_bytes(b"{")
    other = open_store(tmp_path)
    for dry_run in (True, False):
        caplog.clear()
        assert pruned(list(other.prune("tone", 1, dry_run=dry_run))) == [("tone", 1), ("tone", 3)]
        assert "adapter tone version 2 of tiny" in caplog.text
    assert sorted(path.name for path in (tmp_path / "tone").iterdir() if path.is_dir()) == ["2", "4"]
    other.delete("tone", 2)
    assert pruned(list(other.list())) == [("tone", 4)]


def test_prune_keeps_live_newest_and_needed(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, 6)
    publish(store, 2, "other")
    store.load("tone", 2)
    held = store.get("tone", 1)
    expected = [("tone", 1), ("tone", 4)]
    keep = {("tone", 3), ("unknown", 1)}
    assert pruned(list(store.prune("tone", 2, keep=keep, dry_run=True))) == expected
    assert len(versions(store)) == 6
    gone = list(store.prune("tone", 2, keep=keep))
    assert pruned(gone) == expected
    assert gone[0].loaded, "told as they were"
    assert versions(store) == [(2, True), (3, False), (5, False), (6, False)]
    assert value_of(held) == 1.0
    assert versions(store, "other") == [(1, False), (2, True)]
    assert pruned(list(store.prune(None, 0))) == [("other", 1), ("tone", 3), ("tone", 5), ("tone", 6)]
    assert store.publish(filled(7.0)).version == 7
    assert [path.name for path in sorted(tmp_path.rglob("*.safetensors"))] == ["adapter_model.safetensors"] * 3


def test_prune_keeps_what_a_rename_moved(store: AdapterStore) -> None:
    """Who needs a version needs it under any name; what is unloaded keeps the version that load would choose."""
    publish(store, 4)
    store.unload("tone")
    store.rename("tone", "voice")
    assert pruned(list(store.prune("voice", 1, keep={("tone", 2)}))) == [("voice", 1), ("voice", 3)]
    assert store.load("voice").version == 4


def test_prune_refuses_what_makes_no_sense(store: AdapterStore) -> None:
    publish(store, 2)
    with pytest.raises(InvalidArgumentError, match="keep_last is -1"):
        store.prune("tone", -1)
    with pytest.raises(NotFoundError):
        store.prune("unknown", 1)
    with pytest.raises(InvalidArgumentError):
        store.prune("../tone", 1)
    assert len(versions(store)) == 2


def test_a_version_that_another_process_deleted_is_gone_here(store: AdapterStore, tmp_path: Path) -> None:
    publish(store, 2)
    other = open_store(tmp_path)
    other.get("tone", 1)
    store.prune("tone", 1)
    with pytest.raises(NotFoundError):
        other.get("tone", 1)


def test_exact_means_float32(store: AdapterStore, tmp_path: Path) -> None:
    """In memory A and B have the model's type; what is merged or combined are the stored values."""
    adapter = filled(1.0 + 2**-12)
    store.publish(adapter)
    resident, exact = store.get("tone"), store.read_exact("tone")
    for name, (a, b) in adapter.modules.items():
        assert torch.equal(exact.modules[name][0], a)
        assert torch.equal(exact.modules[name][1], b)
        assert not torch.equal(resident.modules[name][0].float(), a)
    assert (exact.version, exact.alpha) == (1, 3.0)
    assert dataclasses.replace(exact, modules={}) == Adapter(name="tone", version=1, rank=2, alpha=3.0)
    assert StoredVersions(tmp_path).exists("tone", 1)
