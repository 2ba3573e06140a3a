"""Seeds of independent random streams. Free of torch.

A run draws from several streams: the held-out split, the order of each epoch, the initial A, the dropout of each step.
Each is derived from the run's seed and what it is for, so no generator state has to survive between steps: a resumed
run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A seed in [0, 2^63) for one stream.

    Args:
        purpose: names the stream.
        index: of the epoch or step, where there is one stream for each.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
