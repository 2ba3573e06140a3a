"""The container of a GGUF file: metadata and where each tensor lies. Free of torch.

``gguf.GGUFReader`` trusts its input: a count of 2^60 elements keeps it busy for ever. This reader checks every count
and length against the bytes that are left before it acts on it, so a hostile file costs time and memory in proportion
to its size. Decoding stays the ``gguf`` package's, which is imported only for it: it takes a tenth of a second.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Reference: tests/parity/test_gguf_loading.py.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine.errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q")

# fmt: off
BLOCK_SIZES: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}
# fmt: on
"""Values of a block of each of ggml's types, and bytes of one (GGML_QUANT_SIZES of gguf.constants)."""
_MIN_ENTRY_BYTES = 8 + 1 + 4 + 1  # key length, a one-byte key, type, the smallest value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, a one-byte name, rank, one dimension, type, offset


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies.

    Attributes:
        shape: rows first, as torch has it (GGUF stores the reverse).
        type_id: of ggml; see gguf.GGMLQuantizationType.
        offset: of its first byte in the file.
        num_bytes: as stored.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int


class GGUFFile:
    """A memory-mapped GGUF file, its metadata parsed; tensor places are parsed at first use.

    Args:
        path: a little-endian file of version 2 or 3, not split.

    Raises:
        FormatError: naming the file and the fault.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # A private mapping: pages are shared with other readers until written, and no write reaches the file.
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: cannot be mapped: {error}") from error
        self._size = len(self.map)
        self._at = 0
        if self._take(4) != MAGIC:
            self._fault("does not begin with the four bytes GGUF")
        version = self._unpack("<I")
        if version not in VERSIONS:
            self._fault(f"has version {version}; accepted: little-endian version 2 or 3")
        self.num_tensors = int(self._unpack("<Q"))
        num_entries = int(self._unpack("<Q"))
        if self.num_tensors * _MIN_TENSOR_BYTES + num_entries * _MIN_ENTRY_BYTES > self._size:
            self._fault(
                f"claims {self.num_tensors} tensors and {num_entries} metadata entries; it is too short for them"
            )
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string("a metadata key", MAX_NAME_BYTES)
            if key in self.metadata:
                self._fault(f"has the metadata key {key!r} twice")
            self.metadata[key] = self._value(key, int(self._unpack("<I")))
        if int(self.metadata.get("split.count", 1) or 1) > 1:
            self._fault("is one part of a split model; accepted: the merged file (llama-gguf-split --merge)")
        self._tensors_at = self._at

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self._size

    @cached_property
    def header_bytes(self) -> int:
        """Length of everything before the tensor data."""
        return self._data_start(self._tensor_section[1])

    @cached_property
    def tensors(self) -> dict[str, GGUFTensor]:
        """Name to place, in file order; checked to lie inside the file without overlap.

        Raises:
            FormatError: naming the tensor and the fault.
        """
        tensors = self._tensor_section[0]
        end = start = self.header_bytes
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                self._fault(f"has tensor {tensor.name!r} overlap the one before it")
            end = tensor.offset + tensor.num_bytes
            if end > self._size:
                self._fault(f"is too short: tensor {tensor.name!r} ends at byte {end} of {self._size}")
        if self._size - max(end, min(start, self._size)) >= self.alignment:
            self._fault(f"has {self._size - end} trailing bytes after its last tensor")
        return tensors

    @cached_property
    def alignment(self) -> int:
        """Of tensor offsets, in bytes."""
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            self._fault(f"has general.alignment {value}; accepted: a power of two of at most {MAX_ALIGNMENT}")
        return value

    def data(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, a view of the mapping, [num_bytes] uint8."""
        import numpy as np  # not for those who read metadata alone, as the server's front end does

        return np.frombuffer(self.map, np.uint8, tensor.num_bytes, tensor.offset)

    def release(self, tensor: GGUFTensor | None = None) -> None:
        """Gives the memory of a tensor's pages back, for one that has been copied, or of all; reading them again maps
        them again."""
        start, end = 0, self._size
        if tensor is not None:
            start = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.offset + tensor.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _data_start(self, end: int) -> int:
        return -(-end // self.alignment) * self.alignment

    @cached_property
    def _tensor_section(self) -> tuple[dict[str, GGUFTensor], int]:
        self._at = self._tensors_at
        found: list[tuple[str, tuple[int, ...], int, int, int]] = []
        names: set[str] = set()
        for _ in range(self.num_tensors):
            name = self._string("a tensor name", MAX_NAME_BYTES)
            if name in names:
                self._fault(f"has the tensor {name!r} twice")
            names.add(name)
            rank = int(self._unpack("<I"))
            if not 1 <= rank <= MAX_DIMENSIONS:
                self._fault(f"has tensor {name!r} of {rank} dimensions; accepted: 1 to {MAX_DIMENSIONS}")
            dims = struct.unpack(f"<{rank}Q", self._take(8 * rank))
            type_id, offset = int(self._unpack("<I")), int(self._unpack("<Q"))
            if type_id not in BLOCK_SIZES:
                self._fault(f"has tensor {name!r} of the unknown type {type_id}")
            block, block_bytes = BLOCK_SIZES[type_id]
            count = 1
            for dim in dims:  # Python integers: the product cannot overflow
                count *= dim
            if count == 0 or dims[0] % block:
                self._fault(f"has tensor {name!r} of shape {dims}; accepted: rows of whole blocks of {block} values")
            if offset % self.alignment:
                self._fault(f"has tensor {name!r} at offset {offset}, which is not a multiple of {self.alignment}")
            num_bytes = count // block * block_bytes
            if offset + num_bytes > self._size:
                self._fault(f"is too short for tensor {name!r}: {num_bytes} bytes at offset {offset}")
            found.append((name, dims[::-1], type_id, offset, num_bytes))
        end = self._at
        base = self._data_start(end)
        return {n: GGUFTensor(n, shape, kind, base + offset, size) for n, shape, kind, offset, size in found}, end

    def _fault(self, what: str) -> NoReturn:
        raise FormatError(f"{self.path}: the GGUF file {what}")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            self._fault(f"ends within its header, at byte {self._size}")
        at, self._at = self._at, self._at + count
        return self.map[at : self._at]

    def _unpack(self, form: str) -> int | float:
        value: int | float = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _string(self, what: str, max_bytes: int) -> str:
        length = int(self._unpack("<Q"))
        if length > max_bytes:
            self._fault(f"has {what} of {length} bytes; accepted: at most {max_bytes}")
        data = self._take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self._fault(f"has {what} that is not UTF-8: {data[:40]!r}")

    def _strings(self, what: str, count: int) -> list[str]:
        """As ``_string``, which would take most of the time of opening a file for a vocabulary and its merges."""
        if count * _LENGTH.size > self._size - self._at:
            self._fault(f"is too short for {count} strings: {what}")
        content, at, last = self.map, self._at, self._size - _LENGTH.size
        found: list[str] = []
        for _ in range(count):
            if at > last:
                self._fault(f"ends within its header, at byte {self._size}")
            (length,) = _LENGTH.unpack_from(content, at)
            at += _LENGTH.size
            end = at + length
            if end > self._size:
                self._fault(f"has {what} of {length} bytes; accepted: at most {self._size - at}")
            try:
                found.append(content[at:end].decode())
            except UnicodeDecodeError:
                self._fault(f"has {what} that is not UTF-8: {content[at : min(end, at + 40)]!r}")
            at = end
        self._at = at
        return found

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(f"a value of {key!r}", self._size)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self._fault(f"has metadata {key!r} of the unknown type {kind}")
        value = self._unpack(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> list[Any]:
        kind, count = int(self._unpack("<I")), int(self._unpack("<Q"))
        if kind == _STRING:
            return self._strings(f"a value of {key!r}", count)
        if kind not in _SCALARS:
            self._fault(f"has metadata {key!r}, an array of the type {kind}; accepted: scalars or strings")
        values = struct.iter_unpack(_SCALARS[kind], self._take(count * struct.calcsize(_SCALARS[kind])))
        return [bool(value) for (value,) in values] if kind == _BOOL else [value for (value,) in values]
