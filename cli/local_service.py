"""A service on this machine for as long as a command runs: a port that is free, a start one can follow, a clean end."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from eagleray.cli.client import ApiClient
from eagleray.core.clock import Clock
from eagleray.core.config import Config, HTTPConfig, prepare_ray_environment, read_environment
from eagleray.core.errors import ConfigError, EagleRayError
from eagleray.core.start_phases import StartPhases
from eagleray.engine.checkpoint import check_checkpoint
from eagleray.engine.execution.host_abilities import read_host_abilities
from eagleray.engine.execution.host_memory import available_host_bytes
from eagleray.engine.execution.memory_plan import plan_memory

READY_DEADLINE_S: Final = 60.0
POLL_INTERVAL_S: Final = 0.05


class StopSignals:
    """SIGINT and SIGTERM: the first raises ``KeyboardInterrupt``, one during the stop ends the process at once.

    Ray's processes and the index's server ask the kernel to be ended with their parent, so even then nothing is left.
    ``on_stop`` is called once, at the first signal or when the stop begins: undoing a start takes seconds.
    """

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self._on_stop = on_stop
        self._is_stopping = False

    def install(self) -> None:
        """Take over both signals. Ray takes SIGTERM when it starts, so do it again afterwards."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def begin_stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            with contextlib.suppress(OSError, RuntimeError):  # nobody reads it, or a signal came amid another print
                self._on_stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_stopping:
            os._exit(128 + number)
        self.begin_stop()
        raise KeyboardInterrupt


@contextlib.contextmanager
def local_service(
    config: Config, on_progress: Callable[[str], None], clock: Clock, log_level: str | None = None
) -> Iterator[str]:
    """Yields the address of a service whose workers all answer; afterwards it is stopped, whatever happened.

    What cannot be served is refused before Ray is started. SIGINT and SIGTERM become ``KeyboardInterrupt``. Without
    ``log_level`` Ray's own words about starting and stopping are not shown; a failure raises ``EagleRayError``.
    """
    plan_memory(config, check_checkpoint(config.model.folder), available_host_bytes(), host=read_host_abilities())
    require_free_port(config.http)
    signals = StopSignals(lambda: on_progress("stopping (Ctrl-C ends it at once)"))
    signals.install()
    prepare_ray_environment()
    phases = StartPhases(clock, lambda phase, duration_s: on_progress(f"{phase}: {duration_s:.2f} s"))
    with _log(log_level):
        from eagleray.cluster.serve_app import LocalService  # takes seconds: not for those who only mistyped

        phases.end("imports")
        try:
            service = LocalService(config, read_environment(), on_progress, clock)
        except SystemExit:  # what Ray makes of SIGTERM while it starts
            raise KeyboardInterrupt from None
    try:
        signals.install()
        phases = StartPhases(clock, lambda phase, duration_s: on_progress(f"{phase}: {duration_s:.2f} s"))
        wait_until_ready(service.address, config, clock)
        phases.end("workers joined")
        yield service.address
    finally:
        signals.begin_stop()
        with _log(log_level):
            service.stop()
        on_progress("stopped")


def require_free_port(http: HTTPConfig) -> None:
    """Raises ``ConfigError`` when nobody could listen there now."""
    reason = why_not_free(http.host, http.port)
    if reason is None:
        return
    if reason == errno.EADDRINUSE:
        raise ConfigError("http.port", http.port, "is in use; choose another with --port, or --port 0 for any free one")
    raise ConfigError("http.host", http.host, f"cannot listen on port {http.port} there: {os.strerror(reason)}")


def why_not_free(host: str, port: int) -> int | None:
    """The ``errno`` of listening there, None when it is possible."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose connections just ended is free
        try:
            probe.bind((host, port))
        except socket.gaierror:
            return errno.EADDRNOTAVAIL
        except OSError as error:
            return error.errno or errno.EINVAL
    return None


def wait_until_ready(address: str, config: Config, clock: Clock) -> None:
    """Until the server can serve and has met every worker. Raises ``EagleRayError`` after ``READY_DEADLINE_S``."""
    num_workers = config.prefill.replicas + config.decode.replicas
    deadline_s = clock.now_s() + READY_DEADLINE_S
    pause = threading.Event()
    with ApiClient(address, clock, config.http.api_key) as client:
        while True:
            status = client.status()
            if status.ready and len(status.workers) >= num_workers:
                return
            if clock.now_s() > deadline_s:
                seen = f"{len(status.workers)} of {num_workers} workers answer"
                raise EagleRayError(f"not ready after {READY_DEADLINE_S:.0f} s: {status.reason or seen}")
            pause.wait(POLL_INTERVAL_S)


def wait_for_signal() -> None:
    """Until a stop signal raises ``KeyboardInterrupt``."""
    while True:
        signal.pause()


def print_snippets(address: str, config: Config) -> None:
    """How to use a service that is up, to be copied. A key is named, never shown."""
    url, model = address.replace("//0.0.0.0:", "//127.0.0.1:"), config.model.name
    needs_key = config.http.api_key is not None
    first = "\nFirst set EAGLERAY_API_KEY to the server's http.api_key.\n" if needs_key else ""
    header = ' -H "Authorization: Bearer $EAGLERAY_API_KEY"' if needs_key else ""
    imports = "\n  import os" if needs_key else ""
    key = 'os.environ["EAGLERAY_API_KEY"]' if needs_key else '"none"'
    print(f"""{first}
Ask it from a shell:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Reverse a string."}}]}}'

or from Python:
{imports}
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key={key})
  messages = [{{"role": "user", "content": "Reverse a string."}}]
  print(client.chat.completions.create(model="{model}", messages=messages).choices[0].message.content)

or with `eagleray chat --url {url}`; watch it with `eagleray status --watch --url {url}`.
Ctrl-C stops everything.""", flush=True)  # fmt: skip


@contextlib.contextmanager
def _log(level: str | None) -> Iterator[None]:
    """Show the log from ``level`` on, or hide what Ray prints."""
    if level is not None:
        logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        yield
        return
    nowhere = _Nowhere()  # Ray prints on both streams; our own progress keeps the one it was given
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


class _Nowhere(io.TextIOBase):
    """Swallows what is written. Never closed: log handlers that were made meanwhile keep it."""

    def write(self, text: str) -> int:
        return len(text)
