"""How to reach a server: address, security, message sizes, keepalive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_TIMEOUT_SECONDS = 600.0
DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE_SECONDS = 30
KEEPALIVE_TIMEOUT_SECONDS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """Transport security.

    Attributes:
        root_certificates: PEM file of the authorities to trust; None: the system's.
        client_certificate, client_key: PEM files that authenticate this client (mutual TLS); both or neither.
        server_name: expected in the server's certificate, where it is not the address.
    """

    root_certificates: str | Path | None = None
    client_certificate: str | Path | None = None
    client_key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("client_certificate and client_key belong together; accepted: both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.root_certificates),
            private_key=_read(self.client_key),
            certificate_chain=_read(self.client_certificate),
        )


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


def channel_options(max_message_bytes: int, tls: TLS | None) -> list[tuple[str, Any]]:
    """gRPC channel arguments."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A long quiet stream (training between steps) would otherwise stop pinging after two pings.
        ("grpc.http2.max_pings_without_data", 0),
        # Retries are ours: gRPC's own would not know which calls are safe to repeat.
        ("grpc.enable_retries", 0),
        ("grpc.primary_user_agent", "whet-python"),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of every call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def resolve_tls(tls: TLS | bool | None) -> TLS | None:
    """True means TLS with the system's authorities."""
    if isinstance(tls, bool):
        return TLS() if tls else None
    return tls
