"""Which release this is."""

from __future__ import annotations


def server_version() -> str:
    """The installed release, or "0+unknown" in a tree that is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("whet-server")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
