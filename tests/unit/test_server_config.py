"""Options: one spelling per source, one order of sources, one line per mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidArgumentError
from server.config import ServerConfig, default_state_dir, load_config, parse_bytes


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", *ServerConfig.model_fields):
        monkeypatch.delenv(f"WHET_{name.upper()}", raising=False)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "whet.yaml"
    file.write_text("port: 1\nmetrics-port: 1\nmax_n: 3\nmodel:\n  a: /a\n")
    assert load_config(file=file).port == 1
    monkeypatch.setenv("WHET_PORT", "2")
    monkeypatch.setenv("WHET_METRICS_PORT", "2")
    config = load_config({"port": "3"}, file)
    assert (config.port, config.metrics_port, config.max_n) == (3, 2, 3)
    assert config.model == {"a": Path("/a")}
    assert config.max_batch_tokens == 2048


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "whet.yaml"
    file.write_text("max_n: 5\n")
    monkeypatch.setenv("WHET_CONFIG", str(file))
    assert load_config().max_n == 5


@pytest.mark.parametrize("value", [["a=/x", "b=/y"], "a=/x,b=/y", {"a": "/x", "b": "/y"}])
def test_models_read_alike_from_flags_environment_and_file(value: Any) -> None:
    assert load_config({"model": value}).model == {"a": Path("/x"), "b": Path("/y")}


def test_models_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHET_MODEL", "a=/x,b=/y")
    monkeypatch.setenv("WHET_ADAPTER", "t=a:/p")
    config = load_config()
    assert set(config.model) == {"a", "b"}
    assert config.adapter["t"].model == "a"
    assert config.adapter["t"].path == Path("/p")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("1KiB", 1024), ("2G", 2 << 30), ("1.5 MiB", 3 << 19), ("3GB", 3 * 10**9), ("2gib", 2 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert load_config({"kv_cache_bytes": text}).kv_cache_bytes == size


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": "-1"}, "port"),
        ({"port": "65536"}, "port"),
        ({"port": "many"}, "port"),
        ({"model": ["a"]}, "NAME=VALUE"),
        ({"model": ["../a=/x"]}, "'../a'"),
        ({"model": ["a=/x", "a=/y"]}, "twice"),
        ({"adapter": ["t=/p"]}, "NAME=MODEL:PATH"),
        ({"model": ["a=/x"], "adapter": ["t=b:/p"]}, "'b'"),
        ({"kv_cache_bytes": "lots"}, "lots"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"block_size": "17"}, "block_size"),
        ({"job_share": "0"}, "job_share"),
        ({"job_share": "nan"}, "job_share"),
        ({"tls_cert": "x.pem"}, "tls_key"),
        ({"tls_client_ca": "x.pem"}, "tls_client_ca"),
        ({"auth_token": "x", "auth_token_file": "f"}, "auth_token"),
        ({"bogus": "1"}, "bogus"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load_config(flags)
    assert named in caught.value.message
    assert "\n" not in caught.value.message


def test_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config({"auth_token": "hunter2"})
    assert "hunter2" not in repr(config)
    with pytest.raises(InvalidArgumentError) as caught:
        load_config({"auth_token": ["hunter2"]})
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "unknown_option: 1", "\x00"])
def test_a_malformed_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "whet.yaml"
    file.write_text(content)
    with pytest.raises(InvalidArgumentError, match="config"):
        load_config(file=file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="No such file"):
        load_config(file=tmp_path / "none.yaml")


def test_the_token_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    assert load_config({"auth_token_file": str(file)}).token() == "secret"
    file.write_text("\n")
    with pytest.raises(InvalidArgumentError, match="no token"):
        load_config({"auth_token_file": str(file)}).token()


def test_every_option_is_documented() -> None:
    for name, field in ServerConfig.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_the_engine_gets_its_part() -> None:
    config = load_config({"job_slice_ms": "20", "threads": "2", "prefix_caching": "false", "state_dir": "/s"})
    engine = config.engine_config()
    assert engine.job_slice_seconds == pytest.approx(0.02)
    assert engine.num_threads == 2
    assert engine.enable_prefix_caching is False
    assert engine.state_dir == "/s"


def test_a_tilde_in_a_file_means_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    file = tmp_path / "whet.yaml"
    file.write_text("state_dir: ~/state\n")
    assert load_config(file=file).state_dir == Path("/home/someone/state")


def test_state_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/x")
    assert default_state_dir() == Path("/var/x/whet")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_state_dir() == Path("/home/someone/.local/state/whet")
