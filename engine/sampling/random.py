"""Counter-based randomness: the draw for token k of a completion depends on its seed, its index and k alone.

So a seeded completion is the same whatever else is in the batch, and a sequence that is preempted and recomputed goes
on as if nothing had happened: there is no generator state to save. Free of torch.
"""

from __future__ import annotations

import os
from hashlib import blake2b

KEY_BYTES = 32


def sampling_key(seed: int | None, index: int) -> bytes:
    """The key of one completion's draws.

    Args:
        seed: [0, 2^63); None: unpredictable.
        index: which of the n completions of a request; each has draws of its own.
    """
    if seed is None:
        return os.urandom(KEY_BYTES)
    data = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return blake2b(data, digest_size=KEY_BYTES, person=b"whet-sampling").digest()


def uniform(key: bytes, counter: int) -> float:
    """Draw number ``counter`` of this key: uniform on the 2^53 multiples of 2^-53 in [0, 1)."""
    digest = blake2b(counter.to_bytes(8, "little"), digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
