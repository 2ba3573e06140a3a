"""Uploads: the files that were announced, whole, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import InvalidArgumentError
from server.uploads import ADAPTER_FILES, MAX_CONFIG_BYTES, Upload

CONFIG, WEIGHTS = ADAPTER_FILES
SIZES = {CONFIG: 3, WEIGHTS: 5}


def upload(tmp_path: Path, sizes: dict[str, int] = SIZES, max_bytes: int = 100) -> Upload:
    return Upload(tmp_path / "staged", sizes, len(sizes), max_bytes)


def test_the_files_arrive(tmp_path: Path) -> None:
    taking = upload(tmp_path)
    taking.open()
    for name, data in ((CONFIG, b"abc"), (WEIGHTS, b"de"), (WEIGHTS, b"fgh")):
        taking.write(name, data)
    taking.finish()
    assert {path.name: path.read_bytes() for path in (tmp_path / "staged").iterdir()} == {
        CONFIG: b"abc",
        WEIGHTS: b"defgh",
    }


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {CONFIG: 3},
        {CONFIG: 3, WEIGHTS: 5, "README.md": 1},
        {CONFIG: 3, "adapter_model.bin": 5},
        {CONFIG: 3, "../adapter_model.safetensors": 5},
        {CONFIG: 3, "/etc/passwd": 5},
        {CONFIG: 0, WEIGHTS: 5},
        {CONFIG: 3, WEIGHTS: -1},
        {CONFIG: MAX_CONFIG_BYTES + 1, WEIGHTS: 5},
        {CONFIG: 3, WEIGHTS: 98},
    ],
)
def test_an_announcement_of_anything_else_is_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"header\.files"):
        upload(tmp_path, sizes)
    assert list(tmp_path.iterdir()) == []


def test_a_name_announced_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError):
        Upload(tmp_path / "staged", SIZES, 3, 100)


@pytest.mark.parametrize("name", ["../x", "/x", "", "adapter_model.safetensors\x00", CONFIG.upper()])
def test_a_chunk_of_another_file_is_refused(tmp_path: Path, name: str) -> None:
    taking = upload(tmp_path)
    taking.open()
    with pytest.raises(InvalidArgumentError, match=r"chunk\.name"):
        taking.write(name, b"x")


def test_more_or_less_than_announced_is_refused(tmp_path: Path) -> None:
    taking = upload(tmp_path)
    taking.open()
    with pytest.raises(InvalidArgumentError, match="more than the 3 bytes"):
        taking.write(CONFIG, b"abcd")
    taking = Upload(tmp_path / "other", SIZES, 2, 100)
    taking.open()
    taking.write(CONFIG, b"abc")
    with pytest.raises(InvalidArgumentError, match="0 of 5"):
        taking.finish()
