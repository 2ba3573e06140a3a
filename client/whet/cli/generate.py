"""chat, generate, compare, tokenize."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from whet import Client, WhetError
from whet.cli.app import Settings, given, pick_model, progress_console, read_text, settings_options, split_version
from whet.types import AdapterChoice, Prompt, Reply

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("max-tokens", int, "Completion tokens at most."),
    ("min-tokens", int, "Completion tokens at least."),
    ("temperature", float, "0 is greedy."),
    ("top-k", int, "Keep the k likeliest tokens."),
    ("top-p", float, "Keep the likeliest tokens up to this probability."),
    ("min-p", float, "Drop tokens less likely than this times the likeliest."),
    ("repetition-penalty", float, "1 is none."),
    ("presence-penalty", float, "0 is none."),
    ("frequency-penalty", float, "0 is none."),
    ("seed", int, "Same seed, same output."),
)
_ADAPTER: tuple[tuple[str, Any, str], ...] = (
    ("adapter", str, "LoRA adapter of the model."),
    ("adapter-version", int, "Default: the live one."),
)


def sampling_options(*, one_adapter: bool = True, **defaults: float) -> Callable[[FunctionT], FunctionT]:
    """The options of chat, generate and compare; those without a default here have the server's.

    Args:
        one_adapter: with --adapter and --adapter-version.
    """

    def decorate(function: FunctionT) -> FunctionT:
        for name, kind, text in reversed((*_SAMPLING, *(_ADAPTER if one_adapter else ()))):
            default = defaults.get(name.replace("-", "_"))
            shown = text if default is None else f"{text} Default: {default}."
            function = click.option(f"--{name}", type=kind, default=default, help=shown)(function)
        function = click.option("--stop", multiple=True, help="Ends the answer; repeatable.")(function)
        return click.option("--model", "-m", default=None, help="Default: the only one that is loaded.")(function)

    return decorate


def _stream(settings: Settings, client: Client, prompt: Prompt, model: str, options: dict[str, Any]) -> Reply:
    """Prints an answer as it comes."""
    with client.generate(prompt, model=model, **options) as stream:
        for chunk in stream:
            settings.emit("chunk", chunk, lambda chunk=chunk: print(chunk.text, end="", flush=True))  # type: ignore[misc]
        reply = stream.result()
    settings.emit("reply", reply, lambda: print(flush=True))
    return reply


@click.command()
@click.argument("prompt", required=False)
@click.option("--file", "-f", type=click.Path(allow_dash=True), help="Read the prompt from this file.")
@sampling_options(max_tokens=256)
@click.option("--n", type=int, default=None, help="Completions to make; several are printed one after the other.")
@click.option("--logprobs", type=int, default=None, help="With --json: of each token and so many alternatives.")
@click.option("--prompt-logprobs", type=int, default=None, help="With --json: the same of the prompt.")
@click.option("--echo", is_flag=True, default=None, help="Print the prompt, too.")
@click.option("--ignore-eos", is_flag=True, default=None, help="Do not end at end-of-sequence tokens.")
@settings_options
@click.pass_obj
def generate(settings: Settings, /, prompt: str | None, file: str | None, model: str | None, **options: Any) -> None:
    """Continue PROMPT (standard input if it is - or missing)."""
    text = read_text(prompt, file)
    with settings.client() as client:
        name = pick_model(client, model, "generate")
        if (options["n"] or 1) > 1 and not settings.json:
            # Chunks of several completions come interleaved; people read them one after the other.
            reply = client.complete(text, model=name, **given(options))
            for completion in reply.completions:
                print(f"--- {completion.index} ({completion.finish_reason})\n{completion.text}")
            return
        reply = _stream(settings, client, text, name, given(options))
        if not settings.json and progress_console.is_terminal:
            _remark(reply)


def _remark(reply: Reply) -> None:
    speed = reply.timings.tokens_per_second
    first = reply.timings.time_to_first_token_seconds
    progress_console.print(
        f"[dim]{reply.usage.prompt_tokens} + {reply.usage.completion_tokens} tokens, {reply.finish_reason}"
        + (f", first after {first:.2f} s" if first is not None else "")
        + (f", {speed:.1f} tokens/s" if speed is not None else "")
        + "[/dim]"
    )


def _adapter_choice(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[AdapterChoice]:
    """NAME[:VERSION], each."""
    choices: list[AdapterChoice] = []
    for value in values:
        try:
            name, version = split_version(value)
        except ValueError:
            raise click.BadParameter(f"{value!r}; accepted: NAME[:VERSION]") from None
        choices.append(name if version is None else (name, version))
    return choices


@click.command()
@click.argument("prompt", required=False)
@click.option("--file", "-f", type=click.Path(allow_dash=True), help="Read the prompt from this file.")
@click.option(
    "--adapter", "-a", "adapters", multiple=True, callback=_adapter_choice, help="NAME[:VERSION]; repeatable."
)
@click.option("--base/--no-base", default=True, help="The base model, too.")
@sampling_options(one_adapter=False, max_tokens=256)
@settings_options
@click.pass_obj
def compare(
    settings: Settings,
    /,
    prompt: str | None,
    file: str | None,
    model: str | None,
    adapters: list[AdapterChoice],
    base: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with each of several adapters, side by side."""
    choices = [*([None] if base else []), *adapters]
    if not choices:
        raise click.UsageError("give --adapter, or leave out --no-base")
    text = read_text(prompt, file)
    with settings.client() as client:
        replies = client.compare(text, model=pick_model(client, model, "generate"), adapters=choices, **given(options))
    for choice, reply in zip(choices, replies, strict=True):
        name = choice[0] if isinstance(choice, tuple) else choice
        shown = "base" if name is None else f"{name} version {reply.adapter_version}"
        settings.emit(
            "reply",
            {"adapter": name, **dataclasses.asdict(reply)},
            lambda shown=shown, reply=reply: print(f"--- {shown} ({reply.finish_reason})\n{reply.text}"),  # type: ignore[misc]
        )


@click.command()
@click.argument("message", required=False)
@click.option("--system", default=None, help="System message.")
@sampling_options(max_tokens=512, temperature=0.7, top_p=0.9)
@settings_options
@click.pass_obj
def chat(settings: Settings, /, message: str | None, system: str | None, model: str | None, **options: Any) -> None:
    """Talk with a model; with MESSAGE, ask once.

    Ctrl-C stops an answer; /reset begins anew; /exit or Ctrl-D leaves.
    """
    opening = [{"role": "system", "content": system}] if system is not None else []
    with settings.client() as client:
        name = pick_model(client, model, "generate")
        if message is not None:
            _stream(settings, client, [*opening, {"role": "user", "content": message}], name, given(options))
            return
        _converse(settings, client, name, opening, given(options))


def _converse(
    settings: Settings, client: Client, model: str, opening: list[dict[str, str]], options: dict[str, Any]
) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # gives input() line editing and history

        progress_console.print(f"[dim]{settings.server}, {model}. /reset begins anew, /exit or Ctrl-D leaves.[/dim]")
    history = list(opening)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            history = list(opening)
            continue
        if not line:
            continue
        history.append({"role": "user", "content": line})
        try:
            reply = _stream(settings, client, history, model, options)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            history.pop()  # an answer that was not heard to its end is not part of the talk
        except WhetError as error:
            if not interactive:
                raise
            progress_console.print(f"{error.code}: {error.message}", style="red", markup=False)
            history.pop()
        else:
            history.append({"role": "assistant", "content": reply.text})


@click.command()
@click.argument("text", required=False)
@click.option("--file", "-f", type=click.Path(allow_dash=True), help="Read the text from this file.")
@click.option("--model", "-m", default=None, help="Default: the only one that is loaded.")
@settings_options
@click.pass_obj
def tokenize(settings: Settings, text: str | None, file: str | None, model: str | None) -> None:
    """Print the token ids of TEXT."""
    text = read_text(text, file)
    with settings.client() as client:
        ids = client.tokenize(text, model=pick_model(client, model, "generate"))
    settings.emit("tokens", {"token_ids": ids}, lambda: print(*ids))
