"""Files that last, and directories that appear whole: what is cleared of those that never did."""

from __future__ import annotations

from pathlib import Path

from engine.durable import clear_staging, make_staging, sync_tree, write_synced


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    for name, data in (("text", "é\n"), ("bytes", b"\x00\xff")):
        write_synced(tmp_path / name, data)
        write_synced(tmp_path / name, data)  # in place of what was there
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    sync_tree(tmp_path)


def test_what_was_left_of_one_name_is_cleared_and_of_no_other(tmp_path: Path) -> None:
    """Others may be writing theirs, under names that begin or end alike."""
    final = tmp_path / "half"
    staging = [make_staging(tmp_path / name) for name in ("half", "half", "half.abcd1234", "half-1", "other.half")]
    for path in staging:
        assert path.name.startswith(".")
        (path / "model.safetensors").touch()
    final.mkdir()
    clear_staging(final)
    assert sorted(tmp_path.iterdir()) == sorted([final, *staging[2:]])
    clear_staging(tmp_path / "nothing-of-this-name")
    assert len(list(tmp_path.iterdir())) == 4
