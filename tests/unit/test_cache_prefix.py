"""Names of cached prefixes: equal only where all that determines keys and values is equal."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.prefix import DIGEST_BYTES, block_hash, root_hash

roots = st.tuples(st.text(max_size=6), st.binary(max_size=6), st.text(max_size=6))


@given(roots, roots)
def test_roots_are_equal_only_for_equal_parts(a: tuple[str, bytes, str], b: tuple[str, bytes, str]) -> None:
    """Model, weights and salt each count; none runs into its neighbour."""
    assert (root_hash(*a) == root_hash(*b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("m", b"", ""), ("m", b"\0", "")),
        (("m", b"a", "s"), ("m", b"a", "t")),
        (("m", b"as", ""), ("m", b"a", "s")),
        (("ab", b"c", ""), ("a", b"bc", "")),
    ],
)
def test_near_roots_differ(a: tuple[str, bytes, str], b: tuple[str, bytes, str]) -> None:
    """The cases that a careless concatenation would confuse."""
    assert root_hash(*a) != root_hash(*b)


def test_block_hash_depends_on_parent_tokens_and_order() -> None:
    """Any change to what came before changes every later hash."""
    root = root_hash("m")
    first = block_hash(root, [1, 2, 3, 4])
    assert len(first) == DIGEST_BYTES
    assert first == block_hash(root, [1, 2, 3, 4])
    others = [
        block_hash(root, [1, 2, 4, 3]),
        block_hash(root, [1, 2, 3]),
        block_hash(root_hash("n"), [1, 2, 3, 4]),
        block_hash(first, [1, 2, 3, 4]),
        block_hash(root, [1 << 32, 2, 3, 4]),
    ]
    assert len({first, *others}) == 6


def test_hashes_do_not_depend_on_the_process() -> None:
    """Python's hash() is seeded per process and weak; these are neither."""
    code = "from engine.cache.prefix import *; print(block_hash(root_hash('m', b'a', 's'), [1, 2]).hex())"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert runs == {block_hash(root_hash("m", b"a", "s"), [1, 2]).hex()}
