"""An engine in a process and a Python of its own, asked over pipes: the other end of ``peers/protocol.py``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from process_cpu import has_loaded, share_in_huge_pages

_LONGEST_LINE_BYTES: Final = 2**20
_STOP_TIMEOUT_S: Final = 20.0


class DriverError(RuntimeError):
    """The engine did not start or did not answer; the text has its last words."""


class Driver:
    """A started engine."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process, self._log = process, log

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_loaded(self, library: str) -> bool:
        """Whether the engine, or a process that it started, has a file of such a name in its memory."""
        return has_loaded(self.pid, library)

    def share_in_huge_pages(self, file: str) -> float | None:
        """Of what the engine has in memory of mapped files with such a name; None if that is nothing."""
        return share_in_huge_pages(self.pid, file)

    def kill(self) -> None:
        """The engine and all that it started, whatever they are doing."""
        _kill(self._process)

    async def ready(self, timeout_s: float) -> dict[str, Any]:
        """What the engine says about itself. Raises ``DriverError``."""
        description: dict[str, Any] = (await self._answer(timeout_s))["ready"]
        return description

    async def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, timeout_s: float) -> float:
        """Seconds that it took, in the engine's process. Raises ``DriverError``, also for answers of another length."""
        assert self._process.stdin is not None
        line = json.dumps({"prompts": prompts, "output_tokens": output_tokens}) + "\n"
        self._process.stdin.write(line.encode())
        answer = await self._answer(timeout_s)
        if answer["output_tokens"] != [output_tokens] * len(prompts):
            raise DriverError(f"asked for {output_tokens} tokens each, got {answer['output_tokens']}")
        return float(answer["duration_s"])

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise DriverError(f"no answer in {timeout_s:g} s") from None
        if not line:
            raise DriverError(f"ended: {last_line(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def end_on_sigterm() -> None:
    """Let the running task end as Ctrl-C would: what it started goes with it, also what was stopped by a signal."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def last_line(log: Path) -> str:
    """Where a program says why it ends."""
    return log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]


@asynccontextmanager
async def start_driver(
    python: Path, script: Path, arguments: Mapping[str, str], environment: Mapping[str, str], log: Path
) -> AsyncIterator[Driver]:
    """Afterwards the engine and all that it started are gone. Its standard error goes to ``log``."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            python, script, *(word for pair in arguments.items() for word in pair),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
            env={**os.environ, **environment}, limit=_LONGEST_LINE_BYTES, start_new_session=True,
        )  # fmt: skip
    try:
        yield Driver(process, log)
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """First by the end of its input, then by force: its whole session, because engines start processes of their own."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    _kill(process)
    await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
