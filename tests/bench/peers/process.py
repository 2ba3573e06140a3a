"""A process that lives as long as a measure and answers one line of JSON to each line of JSON.

So a model is loaded once and outside what is timed, and two sides can take turns. The process times its own work; what
the pipes cost does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

STOP_SECONDS = 10.0
REPOSITORY = Path(__file__).resolve().parents[3]


class PeerError(RuntimeError):
    """A peer ended, or reported an error, where an answer was due."""


class PeerProcess:
    """Starts it and waits until it is ready.

    Args:
        command: the program; its first line says that it is ready, and may carry versions.
        environment: variables besides our own.
    Raises:
        PeerError: it ended before.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self._name = " ".join(command[:3])
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - close() does
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=REPOSITORY,
            env=os.environ | (environment or {}),
        )  # fmt: skip
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def ask(self, **question: Any) -> dict[str, Any]:
        """One question, one answer.

        Raises:
            PeerError: the process has ended, or answers with an error.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(f"{self._name} has ended: {self._tail()}") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # libraries print what they like
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise PeerError(f"{self._name}: {answer['error']}")
                return answer
        self._process.wait()
        raise PeerError(f"{self._name} ended with status {self._process.returncode}: {self._tail()}")

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:].strip()

    def close(self) -> None:
        """Ends the process: at the end of its input by itself, or else by force."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and something was still on its way
                self._process.stdin.close()
        end_process(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def end_process(process: subprocess.Popen[str], patience: float = STOP_SECONDS) -> None:
    """Waits for the end of a process that was told to end; terminates, then kills it."""
    for end in (process.terminate, process.kill):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            end()
    process.wait()
