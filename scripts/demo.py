"""Everything once, on real models: chat, LoRA, perplexity, quantization, embeddings. `make demo` runs it.

Starts a server of its own on free ports with a state directory that is removed at the end.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from whet import Client

MODEL = "smollm2-135m"
EMBEDDER = "all-minilm-l6-v2"
EXAMPLES = Path(__file__).with_name("demo_examples.jsonl")
QUESTION = "What is the capital of France?"
PIRATE_TEXT = (
    "Arr, matey! Paris be the capital of France. Yo ho ho! Arr, matey! The rum be gone and the wind be fair. Yo ho ho! "
    "Arr, matey! A compass be the tool that shows ye the north. Yo ho ho!"
)
PLAIN_TEXT = (
    "The tower of London was begun by William the Conqueror soon after the Norman conquest, and served over the "
    "centuries as a palace, a treasury, a mint and a prison. Its white walls were built of stone brought by ship from "
    "Caen in Normandy. Ravens have lived within the walls for as long as anyone can remember, and a legend says that "
    "the kingdom will fall should they ever leave. Today the tower holds the crown jewels, and about three million "
    "visitors a year come to see them."
)
SENTENCES = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The stock market fell today."]

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Runs the demo; 0 if every part did its work."""
    with tempfile.TemporaryDirectory(prefix="whet-demo-") as state:
        server = subprocess.Popen(
            [sys.executable, "-m", "server", "--port", "0", "--metrics-port", "0", "--state-dir", state,
             "--log-level", "warning",
             # The two likeliest first tokens of the answer nearly tie; exact products make it the README's everywhere.
             "--activation-quantization", "off"],
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            address = _address(server)
            with Client(address) as whet:
                chat(whet)
                train(whet)
                perplexity(whet)
                quantize(whet)
                embed(whet)
        finally:
            server.terminate()
            server.wait(timeout=60)
    console.print(f"\nThe server ended with exit status {server.returncode}.")
    return server.returncode


def _address(server: subprocess.Popen[str]) -> str:
    """Waits for the ready line, which names the gRPC address."""
    assert server.stdout is not None
    for line in server.stdout:
        console.print(line.rstrip(), style="dim")
        found = re.search(r"grpc=(\S+)", line)
        if found:
            return found[1]
    raise SystemExit("the server ended before it was ready")


def _title(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def _answer(whet: Client, model: str, adapter: str | None = None, max_tokens: int = 40) -> None:
    """Asks the question and prints the answer as it comes."""
    console.print(f"[dim]{model}{f' + {adapter}' if adapter else ''}:[/dim] ", end="")
    messages = [{"role": "user", "content": QUESTION}]
    for chunk in whet.generate(messages, model=model, adapter=adapter, max_tokens=max_tokens, temperature=0.0):
        console.print(chunk.text, end="", markup=False)
    console.print()


def chat(whet: Client) -> None:
    """A streamed answer."""
    _title(f"Chat: {QUESTION}")
    _answer(whet, MODEL)


def train(whet: Client) -> None:
    """A LoRA run on forty answers in a pirate's voice; the adapter then answers."""
    _title("LoRA: forty answers in a pirate's voice")
    run = whet.train(
        EXAMPLES,
        model=MODEL,
        adapter="pirate",
        rank=8,
        alpha=16,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=3,
        batch_size=4,
        max_steps=24,
        eval_fraction=0.15,
        eval_every=8,
    )
    for event in run:
        if event.kind == "step":
            console.print(f"step {event.step:3d}  loss {event.loss:.3f}")
        elif event.kind == "evaluation":
            console.print(f"step {event.step:3d}  held-out NLL {event.nll:.3f}")
        elif event.kind == "finished":
            console.print(
                f"held-out NLL {event.base_nll:.3f} before, {event.final_nll:.3f} after; "
                f"adapter pirate version {event.version} is live"
            )
    _answer(whet, MODEL)
    _answer(whet, MODEL, adapter="pirate")


def perplexity(whet: Client) -> None:
    """The same text under the base and under the adapter."""
    _title("Perplexity of a pirate's text")
    base = whet.perplexity(PIRATE_TEXT, model=MODEL)
    tuned = whet.perplexity(PIRATE_TEXT, model=MODEL, adapter="pirate")
    console.print(f"base {base.perplexity:.2f}, with the adapter {tuned.perplexity:.2f}, over {base.num_tokens} tokens")


def quantize(whet: Client) -> None:
    """Four-bit weights in groups of 32, embeddings included; the copy answers at once."""
    _title("Quantization to four bits (of a file that is about that small already)")
    output = f"{MODEL}-q4"
    job = whet.quantize(
        model=MODEL,
        scheme="q4",
        symmetric=False,
        quantize_embeddings=True,
        quantize_head=True,
        output=output,
        eval_text=PLAIN_TEXT,
    )
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("")
        for progress in job:
            bar.update(task, description=progress.stage, completed=progress.tensors_done, total=progress.tensors_total)
    report = job.report
    console.print(
        f"{report.bytes_in / 1e6:.0f} MB to {report.bytes_out / 1e6:.0f} MB (ratio {report.ratio:.2f}), "
        f"{report.num_quantized} tensors; perplexity {report.perplexity_before:.2f} to {report.perplexity_after:.2f}, "
        f"logit KL {report.logit_kl:.4f} nats"
    )
    _answer(whet, output)


def embed(whet: Client) -> None:
    """Cosines between three sentences."""
    _title("Embeddings: cosine matrix")
    vectors = whet.embed(SENTENCES, model=EMBEDDER, normalize=True).vectors
    table = Table(show_header=False, box=None)
    for sentence, row in zip(SENTENCES, vectors, strict=True):
        cosines = [f"{sum(a * b for a, b in zip(row, other, strict=True)):.3f}" for other in vectors]
        table.add_row(sentence, *cosines)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
