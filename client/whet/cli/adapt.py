"""adapt."""

from __future__ import annotations

from typing import Any

import click

from whet.cli.app import Settings, given, pick_model, settings_options
from whet.types import Adaptation

_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("steps", int, "Optimizer steps, each on all examples. Default: 1."),
    ("learning-rate", float, ""),
    ("optimizer", click.Choice(["adamw", "sgd"]), ""),
    ("momentum", float, "Of SGD."),
    ("weight-decay", float, ""),
    ("max-grad-norm", float, "Clip the gradient; 0: never."),
    ("max-kl", float, "How far from the base the adapter may go on the probes, nats per token."),
    ("max-seq-len", int, "Tokens of an example at most."),
    ("loss-on", click.Choice(["completion", "all"]), ""),
    ("seed", int, "Of the initialisation of a new adapter."),
    ("rank", int, "Of a new adapter."),
    ("alpha", float, "Of a new adapter."),
    ("dropout", float, "Of a new adapter."),
    ("request-id", str, "Idempotency key."),
)


def _adapt_options(function: Any) -> Any:
    for name, kind, text in reversed(_OPTIONS):
        function = click.option(f"--{name}", type=kind, default=None, help=text)(function)
    text = "Of a new adapter: routed experts, as mlp.experts.down_proj. Repeatable."
    function = click.option("--target-parameter", "target_parameters", multiple=True, help=text)(function)
    function = click.option("--target-module", "target_modules", multiple=True, help="Of a new adapter. Repeatable.")(
        function
    )
    return click.option(
        "--probe-prompt", "probe_prompts", multiple=True, help="Text to compare with the base on. Repeatable."
    )(function)


@click.command()
@click.argument("examples", type=click.Path(exists=True, dir_okay=False))
@click.option("--adapter", "-a", required=True, help="To go on from, or to begin.")
@click.option("--model", "-m", default=None, help="Default: the only one that is loaded.")
@_adapt_options
@settings_options
@click.pass_obj
def adapt(settings: Settings, /, examples: str, adapter: str, model: str | None, **options: Any) -> None:
    """Take a few steps on EXAMPLES, a .json or .jsonl file of a handful, and make the new version live."""
    with settings.client() as client:
        done = client.adapt(examples, model=pick_model(client, model, "generate"), adapter=adapter, **given(options))
    settings.emit("adaptation", done, lambda: print(describe(done, adapter)))


def describe(done: Adaptation, adapter: str) -> str:
    """What adaptation did, in a line."""
    parts = [f"loss {done.loss_before:.4f} before, {done.loss_after:.4f} after {done.steps} steps ({done.stop_reason})"]
    if done.kl is not None:
        parts.append(f"KL from the base {done.kl:.4g}")
    if done.num_truncated:
        parts.append(f"{done.num_truncated} examples were longer than max_seq_len and lost tokens")
    parts.append("nothing was published" if done.version is None else f"{adapter} version {done.version} is live")
    return "; ".join(parts)
