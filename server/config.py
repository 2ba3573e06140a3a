"""Configuration of the server: one typed object, and the only place that reads the environment.

Every option is one field of ServerConfig and has three spellings that mean the same: the flag ``--max-batch-tokens``,
the variable ``WHET_MAX_BATCH_TOKENS`` and the key ``max_batch_tokens`` of the YAML file that ``--config`` names. Flags
win over the environment, the environment over the file, the file over the defaults here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from engine.config import ActivationQuantization, DTypeName, EngineConfig, GGUFWeights, HalfWeights
from engine.errors import EngineError, InvalidArgumentError
from engine.names import validate_name

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", re.IGNORECASE)


class AdapterSource(NamedTuple):
    """A PEFT directory to load at start-up, and the model that it belongs to."""

    model: str
    path: Path


def parse_bytes(value: str) -> int:
    """Reads a size such as ``"512MiB"``, ``"2G"`` or ``"1000000"``.

    Raises:
        ValueError: naming the text and the accepted forms.
    """
    match = _SIZE.fullmatch(value)
    unit = match[2].upper() if match else ""
    if unit in {"K", "M", "G", "KI", "MI", "GI"}:
        unit = unit[0] + "IB"
    if match is None or unit not in _UNITS:
        raise ValueError(f"{value!r} is not a size; accepted: bytes, or a number with KiB, MiB, GiB, KB, MB or GB")
    return int(float(match[1]) * _UNITS[unit])


def _pairs(value: Any) -> Any:
    """``NAME=VALUE`` items, as a list or comma-separated, or a mapping: all become a mapping."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    if isinstance(value, (list, tuple)):
        pairs: dict[str, Any] = {}
        for item in value:
            name, separator, rest = str(item).partition("=")
            if not separator or not rest:
                raise ValueError(f"{item!r} is not NAME=VALUE")
            if name in pairs:
                raise ValueError(f"{name!r} is given twice")
            pairs[name] = rest
        return pairs
    return value


class ServerConfig(BaseSettings):
    """All options of ``whet-server``.

    Attributes are documented by their ``description``, which ``whet-server --help`` prints.
    """

    model_config = SettingsConfigDict(env_prefix="WHET_", frozen=True, extra="forbid", env_ignore_empty=True)

    # ------------------------------------------------------------------------------------------------ what is served
    model: Annotated[dict[str, Path], NoDecode] = Field(
        default_factory=dict,
        description="NAME=PATH of a model: a Hugging Face directory, a .safetensors file or a .gguf file; repeatable. "
        "Without any, the models of the demo packages are served.",
    )
    adapter: Annotated[dict[str, AdapterSource], NoDecode] = Field(
        default_factory=dict,
        description="NAME=MODEL:PATH of a PEFT adapter directory to load for a model; repeatable.",
    )
    force_adapters: bool = Field(
        default=False,
        description="Load the adapters of --adapter also where they were trained on other weights than the model's.",
    )
    state_dir: Path = Field(
        default_factory=lambda: default_state_dir(),
        description="Directory of adapters, checkpoints, the run archive and quantized models.",
    )

    # ------------------------------------------------------------------------------------------------- where it listens
    host: str = Field(default="127.0.0.1", description="Address to listen on, for gRPC and HTTP. 0.0.0.0: all IPv4.")
    port: int = Field(default=50051, ge=0, le=65535, description="Port of gRPC; 0 takes a free one.")
    metrics_port: int = Field(
        default=9090, ge=0, le=65535, description="Port of /metrics, /livez and /readyz; 0 takes a free one."
    )
    metrics_compat: Literal["none", "vllm"] = Field(
        default="none", description="vllm: also export the metric names that dashboards and scalers for vLLM read."
    )
    auth_token: SecretStr | None = Field(
        default=None, description="Bearer token that every call but health checks must carry."
    )
    auth_token_file: Path | None = Field(default=None, description="File that holds the bearer token.")
    tls_cert: Path | None = Field(default=None, description="PEM certificate chain; with --tls-key, gRPC speaks TLS.")
    tls_key: Path | None = Field(default=None, description="PEM private key of --tls-cert.")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM certificates of authorities; clients must present a certificate of theirs."
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, le=3600, description="Seconds that running streams get to finish after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level to log.")
    log_format: Literal["json", "text"] = Field(default="text", description="One JSON object a line, or plain text.")

    # ----------------------------------------------------------------------------------------------------- the engine
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N. auto prefers CUDA."
    )
    dtype: DTypeName = Field(
        default="auto",
        description="Compute type: auto, float32 (exact), bfloat16 or float16. auto: float32 on the CPU.",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="Threads of the CPU backend; 0: as many as cores.")
    max_batch_tokens: int = Field(
        default=2048, ge=16, le=1 << 20, description="Tokens that one engine step may process."
    )
    max_running_requests: int = Field(default=128, ge=1, le=65536, description="Completions that decode together.")
    max_model_len: int | None = Field(
        default=None, ge=16, description="Longest context to serve, tokens; default: the model's own."
    )
    kv_cache_bytes: int | None = Field(
        default=None, ge=1, description="Attention cache per model, such as 2GiB; default: planned from free memory."
    )
    block_size: int = Field(default=16, description="Tokens of one attention cache block: 8, 16, 32, 64 or 128.")
    prefix_caching: bool = Field(default=True, description="Share cache blocks among requests with equal prefixes.")
    decode_graphs: bool = Field(
        default=True,
        description="Capture decode steps once and replay them, which spares the interpreter's time; the results are "
        "the same.",
    )
    overlap: bool = Field(
        default=True,
        description="On CUDA, launch a decode step before the tokens of the one before have been read; the results are "
        "the same.",
    )
    gguf_weights: GGUFWeights = Field(
        default="auto",
        description="How quantized matrices of GGUF files are held: as stored, or wide in the compute type; auto: as "
        "stored where the CPU kernels multiply by them.",
    )
    half_weights: HalfWeights = Field(
        default="auto",
        description="How matrices that a checkpoint has in bfloat16 or float16 are held where the compute type is "
        "float32: as stored, which takes half the memory, or wide; auto: as stored where the CPU kernels multiply by "
        "them. The numbers are the same.",
    )
    activation_quantization: ActivationQuantization = Field(
        default="auto",
        description="Whether activations are rounded to int8, in groups of 32, where they meet weights that are stored "
        "as integers on the CPU, which makes products faster; auto: unless --dtype float32 is given; off: never. "
        "Training rounds them in its forward, as serving does, and computes gradients by floats.",
    )
    stream_interval_ms: float = Field(
        default=20.0,
        ge=0,
        le=10_000,
        description="Tokens of decode steps that follow each other within so many milliseconds go out in one message, "
        "as a message takes the time of a token of a small model; 0: each step's at once. First tokens and ends never "
        "wait, nor does anything while a prompt is computed, a request waits for its turn or a job runs.",
    )
    state_checkpoint_interval: int = Field(
        default=64,
        ge=0,
        le=1 << 20,
        description="Cache blocks between checkpoints of recurrent state, from which hybrid models share prefixes; "
        "0: only at the ends of prompts and completions.",
    )
    job_slice_ms: float = Field(
        default=50.0, gt=0, le=60_000, description="Most milliseconds that one slice of a job is planned to take."
    )
    job_share: float = Field(
        default=0.5, gt=0, le=1, description="Fraction of the engine's time that jobs may take while requests run."
    )
    job_max_slowdown: float = Field(
        default=1.4,
        gt=1,
        le=1000,
        description="Largest factor by which jobs may stretch the time between two tokens of a stream. With 1.4, what "
        "jobs do between two steps is planned to take at most two fifths of a step.",
    )
    heartbeat_stale_seconds: float = Field(
        default=20.0,
        gt=0,
        le=3600,
        description="A worker that is silent, or in one step, for so long is not healthy; loading a model is no step.",
    )
    heartbeat_timeout_seconds: float = Field(
        default=60.0, gt=0, le=3600, description="A worker that is silent for so long is killed and started again."
    )
    step_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="A worker that is alive, yet in one step or slice of a job for so long, is killed and started "
        "again. Longer than the longest forward of max_batch_tokens.",
    )
    max_worker_restarts: int = Field(
        default=10, ge=0, description="Restarts in a row after which a worker that keeps dying stays down."
    )

    # --------------------------------------------------------------------------------------------------------- limits
    max_message_bytes: int = Field(
        default=64 << 20, ge=1 << 20, le=(1 << 31) - 1, description="Largest gRPC message, either way."
    )
    max_concurrent_streams: int = Field(
        default=1024, ge=1, le=1 << 20, description="Calls at once on one connection; further ones wait."
    )
    max_active_requests: int = Field(
        default=1024,
        ge=1,
        le=1 << 20,
        description="Completions, and other calls, in work at once; more get RESOURCE_EXHAUSTED.",
    )
    max_waiting_requests: int = Field(
        default=1024, ge=1, le=1 << 20, description="Completions that may queue in the engine."
    )
    max_prompt_tokens: int = Field(
        default=1 << 20, ge=1, description="Tokens of a prompt; the model's context limits it as well."
    )
    max_prompt_chars: int = Field(default=4 << 20, ge=1, description="Characters of a prompt, before tokenising.")
    max_chat_messages: int = Field(default=1024, ge=1, description="Messages of a chat prompt.")
    max_n: int = Field(default=64, ge=1, le=64, description="Completions of one request.")
    max_stop_strings: int = Field(default=16, ge=0, le=1024, description="Stop strings of one request.")
    max_stop_string_chars: int = Field(default=256, ge=1, le=65536, description="Characters of one stop string.")
    max_stop_token_ids: int = Field(default=256, ge=0, le=65536, description="Stop token ids of one request.")
    max_active_runs: int = Field(default=8, ge=1, le=1024, description="Training runs that are queued or running.")
    max_train_examples: int = Field(default=200_000, ge=1, description="Examples of one training run, both splits.")
    max_train_bytes: int = Field(default=1 << 30, ge=1, description="Bytes of examples of one training run.")
    max_example_tokens: int = Field(default=65_536, ge=2, description="Largest max_seq_len of a training run.")
    max_train_steps: int = Field(default=1_000_000, ge=1, description="Largest max_steps of a training run.")
    max_batch_size: int = Field(default=4096, ge=1, description="Largest batch_size of a training run.")
    max_lora_rank: int = Field(default=512, ge=1, description="Largest rank of an adapter to train.")
    max_adapter_versions: int = Field(
        default=0,
        ge=0,
        le=1 << 20,
        description="Newest versions of an adapter to keep when one is published, besides the live one and those that "
        "are in use; 0: all.",
    )
    max_adapt_examples: int = Field(default=64, ge=1, description="Examples of one Adapt call.")
    max_adapt_steps: int = Field(default=100, ge=1, description="Steps of one Adapt call.")
    max_adapt_probes: int = Field(default=32, ge=0, description="Probe prompts of one Adapt call.")
    max_adapt_probe_tokens: int = Field(
        default=4096, ge=1, description="Tokens of all probe prompts of one Adapt call; after each step all are scored."
    )
    max_embed_inputs: int = Field(default=2048, ge=1, description="Inputs of one Embed call.")
    max_embed_tokens: int = Field(default=1 << 20, ge=1, description="Tokens of all inputs of one Embed call.")
    max_perplexity_tokens: int = Field(default=4 << 20, ge=2, description="Tokens of one Perplexity call.")
    max_perplexity_window: int = Field(default=32_768, ge=2, description="Largest window of one Perplexity call.")
    max_upload_bytes: int = Field(default=2 << 30, ge=1, description="Bytes of one uploaded adapter.")
    max_page_size: int = Field(default=1000, ge=1, le=1000, description="Largest page of a list.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    @field_validator("kv_cache_bytes", "max_message_bytes", "max_train_bytes", "max_upload_bytes", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("state_dir", "auth_token_file", "tls_cert", "tls_key", "tls_client_ca")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return value.expanduser() if value is not None else None

    @field_validator("block_size")
    @classmethod
    def _check_block_size(cls, value: int) -> int:
        if value not in (8, 16, 32, 64, 128):
            raise ValueError("accepted: 8, 16, 32, 64, 128")
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _read_models(cls, value: Any) -> Any:
        pairs = _pairs(value)
        if isinstance(pairs, Mapping):
            for name in pairs:
                validate_name(str(name), "model")
        return pairs

    @field_validator("adapter", mode="before")
    @classmethod
    def _read_adapters(cls, value: Any) -> Any:
        pairs = _pairs(value)
        if not isinstance(pairs, Mapping):
            return pairs
        adapters = {}
        for name, source in pairs.items():
            validate_name(str(name), "adapter")
            if isinstance(source, str):
                model, separator, path = source.partition(":")
                if not separator or not path:
                    raise ValueError(f"{name}={source} is not NAME=MODEL:PATH")
                source = AdapterSource(validate_name(model, "adapter"), Path(path))
            adapters[name] = source
        return adapters

    @model_validator(mode="after")
    def _agree(self) -> ServerConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; one of them is missing")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.auth_token is not None and self.auth_token_file is not None:
            raise ValueError("auth_token and auth_token_file are both given; one is enough")
        for name, source in self.adapter.items():
            if self.model and source.model not in self.model:
                raise ValueError(f"adapter {name!r} is of model {source.model!r}, which --model does not name")
        return self

    def engine_config(self) -> EngineConfig:
        """The part that the engine of each worker is configured with."""
        return EngineConfig(
            device=self.device,
            dtype=self.dtype,
            num_threads=self.threads,
            max_batch_tokens=self.max_batch_tokens,
            max_running_requests=self.max_running_requests,
            max_waiting_requests=self.max_waiting_requests,
            max_model_len=self.max_model_len,
            kv_cache_bytes=self.kv_cache_bytes,
            block_size=self.block_size,
            enable_prefix_caching=self.prefix_caching,
            enable_decode_graphs=self.decode_graphs,
            enable_overlap=self.overlap,
            gguf_weights=self.gguf_weights,
            half_weights=self.half_weights,
            activation_quantization=self.activation_quantization,
            state_checkpoint_interval=self.state_checkpoint_interval,
            job_slice_seconds=self.job_slice_ms / 1000,
            job_share=self.job_share,
            job_max_slowdown=self.job_max_slowdown,
            state_dir=str(self.state_dir),
        )

    def token(self) -> str | None:
        """The bearer token, from the option or its file; None: calls need none.

        Raises:
            InvalidArgumentError: the file cannot be read or holds no token.
        """
        if self.auth_token is not None:
            return self.auth_token.get_secret_value()
        if self.auth_token_file is None:
            return None
        token = read_file(self.auth_token_file, "auth_token_file").decode().strip()
        if not token:
            raise InvalidArgumentError(f"{self.auth_token_file} holds no token", field="auth_token_file")
        return token


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/whet``, or ``~/.local/state/whet``."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "whet"


def read_file(path: Path, field: str) -> bytes:
    """The bytes of a file that an option names.

    Raises:
        InvalidArgumentError: naming the option and the reason.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"{field}: {path}: {error.strerror}", field=field) from None


def load_config(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> ServerConfig:
    """Merges flags, environment, file and defaults.

    Args:
        flags: options given on the command line, by field name; those left out must be absent.
        file: YAML file of options; None: the one that WHET_CONFIG names, if any.

    Raises:
        InvalidArgumentError: one line that names each wrong option and what it accepts.
    """
    if file is None and os.environ.get("WHET_CONFIG"):
        file = Path(os.environ["WHET_CONFIG"])
    from_file = _read_yaml(file) if file is not None else {}
    in_environment = {
        name for name in ServerConfig.model_fields if os.environ.get(f"WHET_{name.upper()}") not in (None, "")
    }
    options = {name: value for name, value in from_file.items() if name not in in_environment}
    options.update(flags or {})
    try:
        return ServerConfig(**options)
    except ValidationError as error:
        raise InvalidArgumentError(_explain(error)) from None
    except EngineError as error:
        raise InvalidArgumentError(error.message, field=error.field) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_file(path, "config"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"config: {path} is not YAML: {' '.join(str(error).split())}", field="config"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"config: {path} holds no mapping of options to values", field="config")
    options = {str(key).replace("-", "_"): value for key, value in content.items()}
    unknown = sorted(options.keys() - ServerConfig.model_fields.keys())
    if unknown:
        raise InvalidArgumentError(f"config: {path}: unknown option {unknown[0]!r}", field="config")
    return options


def _explain(error: ValidationError) -> str:
    """One line out of pydantic's several, without the values of secrets."""
    lines = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ")
        shown = "" if not name or "token" in name else f" (given: {item['input']!r})"
        lines.append(f"{name}: {message}{shown}" if name else message)
    return "; ".join(lines)
