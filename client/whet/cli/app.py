"""What all commands share: how to reach the server, how to print, how to fail."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from whet import TLS, Client, WhetError
from whet._channel import DEFAULT_ADDRESS

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

progress_console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress and remarks go to stderr, so that stdout holds results alone."""

# Behind gRPC's own words, which name the address and the cause.
_NO_SERVER = "; `whet-server` starts a server, --server or WHET_SERVER names another one"


@dataclasses.dataclass
class Settings:
    """How to reach the server, and how to print.

    Attributes:
        json: print one JSON object a line.
    """

    server: str = DEFAULT_ADDRESS
    token: str | None = None
    tls_ca: str | None = None
    tls: bool = False
    json: bool = False

    def client(self) -> Client:
        """A new client."""
        tls = TLS(root_certificates=self.tls_ca) if self.tls_ca else self.tls
        return Client(self.server, token=self.token, tls=tls)

    def emit(self, kind: str, value: object, text: Callable[[], object] | None = None) -> None:
        """Prints a result: as JSON if asked for, else as ``text`` does.

        Args:
            kind: tells the objects of one command apart.
            value: a dataclass or a mapping.
        """
        if self.json:
            print(to_json(kind, value), flush=True)
        elif text is not None:
            text()

    def emit_table(self, kind: str, rows: Sequence[Any], columns: Sequence[str]) -> None:
        """Prints rows, dataclasses all: as JSON objects, or ``columns`` of them as a table."""
        if self.json:
            for row in rows:
                self.emit(kind, row)
            return
        table = Table(box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(shown(getattr(row, column)) for column in columns))
        # A pipe has no width; folding a table to 80 columns would break lines for the program that reads it.
        width = None if sys.stdout.isatty() else 10_000
        Console(highlight=False, width=width).print(table)


def progress_bar(settings: Settings) -> Progress:
    """A bar on stderr, for people alone."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=progress_console,
        transient=True,
        disable=settings.json or not progress_console.is_terminal,
    )


def shown(value: object) -> str:
    """A value in a table."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case datetime.datetime():
            return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        case list() | tuple():
            return ",".join(map(str, value))
        case _:
            return str(value)


def to_json(kind: str, value: object) -> str:
    """One line of JSON. Numbers that JSON does not have become null."""
    fields = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    assert isinstance(fields, Mapping)
    return json.dumps({"kind": kind} | _plain(fields), ensure_ascii=False)


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case datetime.datetime():
            return value.isoformat()
        case float() if value != value or value in (float("inf"), float("-inf")):
            return None
        case _:
            return value


def _setting(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        settings = context.ensure_object(Settings)
        from_environment = context.get_parameter_source(name) is ParameterSource.ENVIRONMENT
        # Given after the command's name, it replaces what stood before it; the environment replaces neither.
        if value not in (None, False) and not (from_environment and context.parent is not None):
            setattr(settings, name, value)

    return store


def settings_options(function: FunctionT) -> FunctionT:
    """The options that may stand before and after a command's name."""
    options: Iterable[Callable[[Any], Any]] = (
        click.option(
            "--server",
            envvar="WHET_SERVER",
            metavar="HOST:PORT",
            show_envvar=True,
            help=f"Default: {DEFAULT_ADDRESS}.",
            expose_value=False,
            callback=_setting("server"),
        ),
        click.option(
            "--token",
            envvar="WHET_TOKEN",
            show_envvar=True,
            help="Bearer token.",
            expose_value=False,
            callback=_setting("token"),
        ),
        click.option(
            "--tls", is_flag=True, help="Trust the system's authorities.", expose_value=False, callback=_setting("tls")
        ),
        click.option(
            "--tls-ca",
            type=click.Path(exists=True, dir_okay=False),
            help="TLS; trust the authorities of this PEM file.",
            expose_value=False,
            callback=_setting("tls_ca"),
        ),
        click.option(
            "--json",
            is_flag=True,
            help="Print one JSON object a line.",
            expose_value=False,
            callback=_setting("json"),
        ),
    )
    for option in reversed(list(options)):
        function = option(function)
    return function


def pick_model(client: Client, name: str | None, task: str) -> str:
    """The model to use: the one that was named, or the only one that is loaded for the task.

    Raises:
        click.UsageError: none or several are.
    """
    if name is not None:
        return name
    names = [model.name for model in client.models() if model.state == "ready" and model.task == task]
    if len(names) == 1:
        return names[0]
    if not names:
        raise click.UsageError("the server has no model loaded for this; name one with --model")
    raise click.UsageError(f"name a model with --model; loaded: {', '.join(names)}")


def read_text(text: str | None, file: str | None) -> str:
    """The argument, a file, or standard input where the argument is "-" or missing."""
    if file is not None:
        if text is not None:
            raise click.UsageError("give a text or --file, not both")
        with click.open_file(file, encoding="utf-8") as stream:
            return str(stream.read())
    if text is None and sys.stdin.isatty():
        raise click.UsageError("give a text, --file, or standard input")
    return sys.stdin.read() if text in (None, "-") else str(text)


def split_version(text: str) -> tuple[str, int | None]:
    """Reads NAME[:VERSION], which is also how versions are printed.

    Raises:
        ValueError: it is something else.
    """
    name, colon, version = text.partition(":")
    if not name or (colon and not (version.isascii() and version.isdecimal())):
        raise ValueError(text)
    return name, int(version) if colon else None


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; the server has the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. Errors are one line on stderr."""
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name="whet", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        print(f"whet: {_one_line(error.format_message())}", file=sys.stderr)
        return error.exit_code
    except WhetError as error:
        reference = f" (request {error.request_id})" if error.request_id else ""
        hint = _NO_SERVER if "failed to connect" in error.message else ""
        print(f"whet: {error.code}: {_one_line(error.message)}{hint}{reference}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"whet: {_one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split())
