"""The ``whet`` command against a real server in this process: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.wire_server import WireServer, failure, wire_server
from whet.cli.app import run
from whet.cli.commands import cli
from whet.v1 import embedding_pb2, evaluation_pb2, generation_pb2, model_pb2, quantization_pb2, training_pb2

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> Iterator[WireServer]:
    with wire_server() as running:
        models = [
            model_pb2.Model(name=name, state=model_pb2.MODEL_STATE_READY, num_parameters=1, task=task)
            for name, task in (("talker", model_pb2.TASK_GENERATE), ("embedder", model_pb2.TASK_EMBED))
        ]
        running.on("ListModels", lambda *_: model_pb2.ListModelsResponse(models=models))
        running.on("Generate", _answer)
        yield running


def _answer(request: generation_pb2.GenerateRequest, _: Any) -> Any:
    yield generation_pb2.GenerateResponse(started=generation_pb2.GenerationStarted(request_id="r"))
    turns = len(request.prompt.chat.messages)
    for text in ("Hello", f" {turns}"):
        yield generation_pb2.GenerateResponse(delta=generation_pb2.GenerationDelta(text=text))
    finished = generation_pb2.GenerationFinished(request_id="r")
    finished.completions.add(finish_reason=generation_pb2.FINISH_REASON_STOP)
    yield generation_pb2.GenerateResponse(finished=finished)


def whet_command(server: WireServer, *arguments: str) -> int:
    """Runs the command in this process."""
    return run(cli, ["--server", server.address, *arguments])


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_generate_prints_the_text_with_the_only_model_there_is(
    server: WireServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whet_command(server, "generate", "hi", "--max-tokens", "3", "--temperature", "0", "--stop", "x") == 0
    assert capsys.readouterr().out == "Hello 0\n"
    request = server.calls[-1].request
    assert (request.model, request.prompt.text, request.sampling.max_tokens) == ("talker", "hi", 3)
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert list(request.stop) == ["x"]


def test_json_prints_one_object_a_line_before_or_after_the_command(
    server: WireServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whet_command(server, "--json", "generate", "hi") == 0
    before = capsys.readouterr().out
    assert whet_command(server, "generate", "hi", "--json") == 0
    assert capsys.readouterr().out == before
    assert [line["kind"] for line in _lines(before)] == ["chunk", "chunk", "reply"]
    assert _lines(before)[-1]["completions"][0]["text"] == "Hello 0"


def test_chat_asks_once_with_a_message(server: WireServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet_command(server, "chat", "hi", "--system", "be kind") == 0
    assert capsys.readouterr().out == "Hello 2\n"


def test_chat_keeps_its_history_until_reset(server: WireServer) -> None:
    done = _process(server, "chat", input="one\ntwo\n\n/reset\nthree\n/exit\nnot sent\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Hello 1\nHello 3\nHello 1\n"


def test_flags_win_over_the_environment_wherever_they_stand(
    server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHET_SERVER", "localhost:1")
    monkeypatch.setenv("WHET_TOKEN", "from-environment")
    assert run(cli, ["--server", server.address, "models"]) == 0
    assert run(cli, ["models", "list", "--server", server.address, "--token", "flag"]) == 0
    assert [call.metadata["authorization"] for call in server.calls] == ["Bearer from-environment", "Bearer flag"]


def test_an_error_is_one_line_on_stderr_and_exit_1(server: WireServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.on(
        "GetModel",
        lambda _, context: failure(context, grpc.StatusCode.NOT_FOUND, "model 'x'\nis not known", request_id="r7"),
    )
    assert whet_command(server, "models", "show", "x") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "whet: NOT_FOUND: model 'x' is not known (request r7)\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--max-tokens", "many", "x"],
        ["nonsense"],
        ["embed"],
        ["quantize", "--scheme", "q5", "--output", "o"],
        ["train", "/none.jsonl", "-a", "x"],
        [],
    ],
)
def test_wrong_usage_is_exit_2(server: WireServer, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert whet_command(server, *arguments) == 2
    assert capsys.readouterr().out == ""


def test_several_models_must_be_told_apart(server: WireServer, capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        model_pb2.Model(name=name, state=model_pb2.MODEL_STATE_READY, num_parameters=1, task=model_pb2.TASK_GENERATE)
        for name in ("a", "b")
    ]
    server.on("ListModels", lambda *_: model_pb2.ListModelsResponse(models=models))
    assert whet_command(server, "generate", "hi") == 2
    assert "loaded: a, b" in capsys.readouterr().err


def test_train_prints_its_events_and_sends_its_options(
    server: WireServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def train(_: Any, __: Any) -> Any:
        events = (
            {"started": training_pb2.RunStarted(total_steps=1)},
            {"step": training_pb2.RunStep(step=0, loss=float("nan"), skipped=True)},
            {"evaluation": training_pb2.RunEvaluation(nll=1.5)},
            {"finished": training_pb2.RunFinished(stop_reason=training_pb2.STOP_REASON_MAX_STEPS, version=2)},
        )
        for sequence, event in enumerate(events):
            yield training_pb2.TrainResponse(
                event=training_pb2.TrainEvent(run_id="r1", sequence=sequence, **event)  # type: ignore[arg-type]
            )

    server.on("Train", train)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    arguments = ["train", str(data), "-a", "tone", "--max-steps", "1", "--no-shuffle", "--target-module", "q_proj"]
    arguments += ["--target-parameter", "mlp.experts.down_proj"]
    assert whet_command(server, *arguments, "--json") == 0
    lines = _lines(capsys.readouterr().out)
    assert [line["kind"] for line in lines] == ["run_started", "step", "evaluation", "finished"]
    assert lines[1]["loss"] is None  # JSON has no NaN
    assert whet_command(server, *arguments) == 0
    assert "finished at step 0 (max_steps); version 2 is live" in capsys.readouterr().out
    config = server.calls[-1].request[0].config
    assert (config.adapter, config.model, config.params.max_steps) == ("tone", "talker", 1)
    assert config.params.HasField("shuffle")
    assert not config.params.HasField("packing")
    assert list(config.lora.target_modules) == ["q_proj"]
    assert list(config.lora.target_parameters) == ["mlp.experts.down_proj"]


def test_adapt_sends_its_bounds_and_tells_the_outcome(
    server: WireServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    arguments = ["adapt", str(data), "-a", "tone", "--steps", "2", "--max-kl", "0.1", "--probe-prompt", "p"]
    kept = training_pb2.AdaptResponse(
        loss_before=2.0, loss_after=1.5, version=4, steps=2, kl=0.05, stop_reason=training_pb2.STOP_REASON_MAX_STEPS
    )
    server.on("Adapt", lambda *_: kept)
    assert whet_command(server, *arguments, "--probe-prompt", "q", "--optimizer", "sgd") == 0
    expected = "loss 2.0000 before, 1.5000 after 2 steps (max_steps); KL from the base 0.05; tone version 4 is live\n"
    assert capsys.readouterr().out == expected
    request = server.calls[-1].request
    assert (request.model, request.adapter, request.steps, request.max_kl) == ("talker", "tone", 2, 0.1)
    assert [prompt.text for prompt in request.probe_prompts] == ["p", "q"]
    assert request.optimizer == training_pb2.OPTIMIZER_SGD
    assert not request.HasField("lora")
    refused = training_pb2.AdaptResponse(loss_before=2.0, loss_after=2.0, stop_reason=training_pb2.STOP_REASON_MAX_KL)
    server.on("Adapt", lambda *_: refused)
    assert whet_command(server, *arguments) == 0
    assert capsys.readouterr().out == "loss 2.0000 before, 2.0000 after 0 steps (max_kl); nothing was published\n"
    assert whet_command(server, *arguments, "--json") == 0
    [line] = _lines(capsys.readouterr().out)
    assert (line["kind"], line["version"], line["kl"]) == ("adaptation", None, None)


def test_perplexity_embed_quantize_and_tokenize_print_their_results(
    server: WireServer, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluation_pb2.PerplexityResult(perplexity=7.5, nll=2.0149, num_tokens=9, num_windows=1)
    server.on("Perplexity", lambda *_: iter([evaluation_pb2.PerplexityResponse(result=result)]))
    assert whet_command(server, "perplexity", "some text", "--window", "8") == 0
    assert capsys.readouterr().out.startswith("perplexity 7.5000, NLL 2.0149 nats, 9 tokens in 1 windows")
    assert server.calls[-1].request.window == 8

    vectors = [embedding_pb2.Embedding(values=[0.5, -0.25])] * 2
    server.on("Embed", lambda *_: embedding_pb2.EmbedResponse(embeddings=vectors, dimensions=2))
    assert whet_command(server, "embed", "a", "b", "--no-normalize") == 0
    assert capsys.readouterr().out == "0.5 -0.25\n0.5 -0.25\n"
    assert server.calls[-1].request.model == "embedder"
    assert not server.calls[-1].request.HasField("instruction")
    assert whet_command(server, "embed", "a", "b", "--instruction", "Find the sea") == 0
    assert server.calls[-1].request.instruction == "Find the sea"
    capsys.readouterr()

    report = quantization_pb2.QuantizeReport(bytes_in=10)
    progress = quantization_pb2.QuantizeProgress(stage=quantization_pb2.QUANTIZE_STAGE_QUANTIZING, tensors_done=1)
    responses = [
        quantization_pb2.QuantizeResponse(progress=progress),
        quantization_pb2.QuantizeResponse(report=report),
    ]
    server.on("Quantize", lambda *_: iter(responses))
    assert whet_command(server, "quantize", "--scheme", "q8", "-o", "out", "--dry-run", "--json") == 0
    lines = _lines(capsys.readouterr().out)
    assert [line["kind"] for line in lines] == ["progress", "report"]
    assert (lines[1]["bytes_in"], lines[1]["bytes_out"], lines[1]["ratio"]) == (10, None, None)
    assert server.calls[-1].request.dry_run

    server.on("Tokenize", lambda *_: generation_pb2.TokenizeResponse(token_ids=[1, 2]))
    assert whet_command(server, "tokenize", "ab") == 0
    assert capsys.readouterr().out == "1 2\n"


def _environment(server: WireServer) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "client"), "WHET_SERVER": server.address}


def _process(server: WireServer, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "whet.cli", *arguments],
        env=_environment(server),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_ctrl_c_cancels_the_run_and_exits_130(server: WireServer, tmp_path: Path) -> None:
    cancelled: list[str] = []

    def train(_: Any, context: grpc.ServicerContext) -> Any:
        started = training_pb2.TrainEvent(run_id="r1", started=training_pb2.RunStarted(total_steps=9))
        yield training_pb2.TrainResponse(event=started)
        while context.is_active() and not cancelled:
            time.sleep(0.01)

    def cancel(request: training_pb2.CancelRunRequest, _: Any) -> training_pb2.CancelRunResponse:
        cancelled.append(request.run_id)
        return training_pb2.CancelRunResponse(
            run=training_pb2.Run(run_id=request.run_id, state=training_pb2.RUN_STATE_CANCELLED, step=4)
        )

    server.on("Train", train)
    server.on("CancelRun", cancel)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    with subprocess.Popen(
        [sys.executable, "-m", "whet.cli", "train", str(data), "-a", "x", "--max-steps", "9"],
        env=_environment(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline().startswith("run r1")
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=60)
    assert command.returncode == 130
    assert cancelled == ["r1"]
    assert "whet runs resume r1" in " ".join(errors.split())
    assert "Traceback" not in errors


def test_where_no_server_listens_the_error_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert run(cli, ["--server", address, "models"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert address in printed
    assert "WHET_SERVER" in printed
    assert "--server" in printed


def test_a_reader_that_leaves_does_not_bring_a_traceback(server: WireServer) -> None:
    def talk(_: Any, __: Any) -> Any:
        for _ in range(2000):  # more than a pipe holds
            yield generation_pb2.GenerateResponse(delta=generation_pb2.GenerationDelta(text="x" * 200))

    server.on("Generate", talk)
    command = f"{sys.executable} -m whet.cli generate hi --json | head -c 1"
    done = subprocess.run(
        command, shell=True, env=_environment(server), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "{"
    assert done.stderr == ""
