"""Names of cached prefixes: a chain of strong hashes, one per full block.

A block's hash covers its parent's hash and its own tokens, so that equal hashes mean equal tokens from the very start
of the sequence (the idea: vLLM's automatic prefix caching, https://docs.vllm.ai/en/latest/design/prefix_caching.html).
Two callers who can choose their tokens must not be able to make two prefixes collide, so the hash is a cryptographic
one of 256 bits; Python's ``hash`` would not do.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 32


def root_hash(
    model: str, adapter: str | None, adapter_version: int | None, cache_salt: str = "", generation: int = 0
) -> bytes:
    """The parent of the first block: all that must be equal, besides tokens, for keys and values to be equal.

    Args:
        model: name of the model.
        adapter: name of the adapter; None for the base, which differs from an adapter named "".
        adapter_version: None for the base.
        cache_salt: keeps tenants apart, so that one cannot time what another has asked.
        generation: grows when other weights may appear under the same adapter name and version.
    """
    hasher = blake2b(digest_size=DIGEST_BYTES, person=b"whet-prefix")
    for part in (model, adapter, adapter_version, cache_salt, generation):
        # Kind and length before each part: no two different tuples are written alike.
        kind = b"n" if part is None else b"i" if isinstance(part, int) else b"s"
        data = b"" if part is None else str(part).encode("utf-8", "surrogatepass")
        hasher.update(kind + len(data).to_bytes(8, "little") + data)
    return hasher.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block.

    Args:
        parent: hash of the block before it, or ``root_hash``.
        token_ids: all tokens of this block.
    """
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES, person=b"whet-block").digest()
