"""train and runs."""

from __future__ import annotations

import contextlib
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from whet import TrainingRun, WhetError
from whet.cli.app import Settings, given, pick_model, progress_console, settings_options
from whet.events import Step, TrainEvent

_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("rank", int, "Of a new adapter."),
    ("alpha", float, "The update is scaled by alpha / rank."),
    ("dropout", float, "On the adapter's input."),
    ("learning-rate", float, ""),
    ("optimizer", click.Choice(["adamw", "sgd"]), ""),
    ("schedule", click.Choice(["constant", "linear", "cosine"]), "After the warm-up."),
    ("warmup-steps", int, ""),
    ("weight-decay", float, ""),
    ("momentum", float, "Of SGD."),
    ("max-grad-norm", float, "Clip the gradient; 0: never."),
    ("batch-size", int, "Sequences of an optimizer step."),
    ("gradient-accumulation-steps", int, "Micro-batches of a batch."),
    ("max-steps", int, "Ends the run; this or --epochs is needed."),
    ("epochs", float, "Ends the run."),
    ("max-seq-len", int, "Tokens of an example at most."),
    ("seed", int, "Of order, initialisation and dropout."),
    ("compute-dtype", click.Choice(["auto", "float32", "bfloat16"]), ""),
    ("loss-on", click.Choice(["completion", "all"]), ""),
    ("eval-fraction", float, "Hold out this fraction of the examples."),
    ("eval-every", int, "Steps between evaluations."),
    ("early-stopping-patience", int, "Evaluations without improvement that end the run."),
    ("checkpoint-every", int, "Steps between resumable checkpoints."),
    ("publish-every", int, "Steps between new live versions."),
    ("publish", click.Choice(["best", "last"]), "Which weights go live at the end."),
    ("init-adapter", str, "Continue from this adapter."),
    ("init-adapter-version", int, ""),
    ("request-id", str, "Idempotency key."),
)


def _train_options(function: Any) -> Any:
    for name, kind, text in reversed(_OPTIONS):
        function = click.option(f"--{name}", type=kind, default=None, help=text)(function)
    for name in ("packing", "shuffle", "use-rslora", "activation-checkpointing"):
        function = click.option(f"--{name}/--no-{name}", default=None)(function)
    text = "Of routed experts, as mlp.experts.down_proj. Repeatable."
    function = click.option("--target-parameter", "target_parameters", multiple=True, help=text)(function)
    function = click.option("--target-module", "target_modules", multiple=True, help="Repeatable.")(function)
    return click.option("--layer", "layers", type=int, multiple=True, help="Repeatable.")(function)


@click.command()
@click.argument("examples", type=click.Path(exists=True, dir_okay=False))
@click.option("--adapter", "-a", required=True, help="Name under which versions are published.")
@click.option("--model", "-m", default=None, help="Default: the only one that is loaded.")
@click.option("--eval-examples", type=click.Path(exists=True, dir_okay=False), help="Held-out examples.")
@_train_options
@click.option("--detach", is_flag=True, help="Print the run's id and leave it running.")
@settings_options
@click.pass_obj
def train(
    settings: Settings,
    /,
    examples: str,
    adapter: str,
    model: str | None,
    eval_examples: str | None,
    detach: bool,
    **options: Any,
) -> None:
    """Train a LoRA adapter on EXAMPLES, a .json or .jsonl file.

    Ctrl-C cancels the run; `whet runs resume` goes on with it.
    """
    with settings.client() as client:
        run = client.train(
            examples,
            model=pick_model(client, model, "generate"),
            adapter=adapter,
            eval_examples=eval_examples,
            **given(options),
        )
        if detach:
            run_id = run.id
            settings.emit("run", {"id": run_id}, lambda: print(run_id))
            run.close()
            return
        _follow(settings, run, cancel=True)


def _follow(settings: Settings, run: TrainingRun, *, cancel: bool) -> None:
    """Prints a run's events; steps in one live line where a person looks on."""
    live = Live(Text(), console=progress_console, refresh_per_second=8, transient=True)
    with run, live if progress_console.is_terminal and not settings.json else contextlib.nullcontext():
        try:
            for event in run:
                if settings.json:
                    settings.emit(event.kind, event)
                elif isinstance(event, Step) and progress_console.is_terminal:
                    live.update(Text(describe(event)))
                else:
                    print(describe(event), flush=True)
        except KeyboardInterrupt:
            if cancel:
                with contextlib.suppress(WhetError):
                    state = run.cancel()
                    progress_console.print(
                        f"run {state.id} is {state.state} at step {state.step}; `whet runs resume {state.id}` goes on",
                        markup=False,
                    )
            raise


def describe(event: TrainEvent) -> str:
    """An event in a line."""
    match event.kind:
        case "run_started":
            resumed = f", resumed from step {event.resumed_from_step}" if event.resumed_from_step else ""
            rejected = f", {event.num_rejected} rejected" if event.num_rejected else ""
            reasons = "".join(
                f"\n  {entry.split}[{entry.index}] {entry.reason}: {entry.message}" for entry in event.rejected
            )
            return (
                f"run {event.run_id}: {event.num_trainable_parameters} parameters, {event.num_examples} examples "
                f"({event.num_loss_tokens} loss tokens), {event.num_eval_examples} held out{rejected}, "
                f"{event.total_steps} steps{resumed}{reasons}"
            )
        case "step":
            parts = [f"step {event.step}", f"loss {event.loss:.4f}", f"lr {event.learning_rate:.2e}"]
            if event.grad_norm is not None:
                parts.append(f"grad {event.grad_norm:.3f}")
            if event.tokens_per_second is not None:
                parts.append(f"{event.tokens_per_second:.0f} tokens/s")
            if event.eta_seconds is not None:
                parts.append(f"{event.eta_seconds:.0f} s left")
            return "  ".join(parts) + ("  skipped" if event.skipped else "")
        case "evaluation":
            return f"step {event.step}  held-out NLL {event.nll:.4f}{' (best)' if event.is_best else ''}"
        case "checkpoint":
            return f"step {event.step}  checkpoint{' (best)' if event.is_best else ''}"
        case "published":
            return f"step {event.step}  {event.adapter} version {event.version} is live"
        case "warning":
            return f"warning: {event.reason}: {event.message}"
        case "finished":
            nlls = ", ".join(
                f"{name} NLL {nll:.4f}"
                for name, nll in (("base", event.base_nll), ("final", event.final_nll), ("best", event.best_nll))
                if nll is not None
            )
            version = f"; version {event.version} is live" if event.version is not None else ""
            return f"finished at step {event.step} ({event.stop_reason}){': ' + nlls if nlls else ''}{version}"


@click.group(invoke_without_command=True)
@settings_options
@click.pass_context
def runs(context: click.Context) -> None:
    """Training runs, past and present. Lists them, unless told otherwise."""
    if context.invoked_subcommand is None:
        context.invoke(list_runs)


@runs.command("list")
@click.option("--model", "-m", default=None)
@click.option("--adapter", "-a", default=None)
@click.option("--state", default=None, help="queued, running, finished, failed, cancelled or interrupted.")
@settings_options
@click.pass_obj
def list_runs(settings: Settings, model: str | None, adapter: str | None, state: str | None) -> None:
    """List runs, newest first."""
    with settings.client() as client:
        found = client.runs(model=model, adapter=adapter, state=state)
    columns = ("id", "state", "model", "adapter", "step", "total_steps", "loss", "best_nll", "version", "created_at")
    settings.emit_table("run", found, columns)


@runs.command()
@click.argument("run_id")
@settings_options
@click.pass_obj
def show(settings: Settings, run_id: str) -> None:
    """Print a run's record."""
    with settings.client() as client:
        record = client.run(run_id)
    settings.emit("run", record, lambda: Console(highlight=False).print(record))


@runs.command()
@click.argument("run_id")
@click.option("--from-step", type=int, default=0, help="Leave out events of earlier steps.")
@settings_options
@click.pass_obj
def watch(settings: Settings, run_id: str, from_step: int) -> None:
    """Print a run's events, past and to come. Ctrl-C leaves the run running."""
    with settings.client() as client:
        _follow(settings, client.watch(run_id, from_step=from_step), cancel=False)


@runs.command()
@click.argument("run_id")
@settings_options
@click.pass_obj
def resume(settings: Settings, run_id: str) -> None:
    """Go on with a run that was interrupted or cancelled."""
    with settings.client() as client:
        _follow(settings, client.resume(run_id), cancel=True)


@runs.command()
@click.argument("run_id")
@settings_options
@click.pass_obj
def cancel(settings: Settings, run_id: str) -> None:
    """End a run after its present slice."""
    with settings.client() as client:
        record = client.cancel_run(run_id)
    settings.emit("run", record, lambda: print(f"{record.id} {record.state}"))
