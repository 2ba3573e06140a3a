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


def root_hash(model: str, weights: bytes = b"", cache_salt: str = "") -> bytes:
    """The parent of the first block: all that must be equal, besides tokens, for keys and values to be equal.

    An adapter counts by what it does, not by name: no update of it can meet a stale prefix, while equal weights under
    two names, or an adapter that does nothing and the base, share theirs.

    Args:
        model: name of the model.
        weights: identifies what acts besides the base (engine.lora.adapter.Adapter.weights_digest); empty for nothing.
        cache_salt: keeps tenants apart, so that one cannot time what another has asked.
    """
    hasher = blake2b(digest_size=DIGEST_BYTES, person=b"whet-prefix")
    for part in (model.encode("utf-8", "surrogatepass"), weights, cache_salt.encode("utf-8", "surrogatepass")):
        hasher.update(len(part).to_bytes(8, "little") + part)  # no two different tuples are written alike
    return hasher.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block.

    Args:
        parent: hash of the block before it, or ``root_hash``.
        token_ids: all tokens of this block.
    """
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES, person=b"whet-block").digest()
