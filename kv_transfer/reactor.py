"""Many connections, few threads: one thread waits on all that are idle and does what is quick, a pool does the rest.

So a pull that waits for its prefill costs no thread, and one that is cut ends at once even when all threads are busy.
Most frames wake one thread only: each further one waits for the interpreter's lock as well. (Schmidt and Cranor,
"Half-Sync/Half-Async: an architectural pattern for efficient and well-structured concurrent I/O", 1995.)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol, TypeVar

T = TypeVar("T")

_logger: Final = logging.getLogger(__name__)

_TICK_S: Final = 0.1
_STOP_DEADLINE_S: Final = 10.0


class Next(Enum):
    """What a handler asks for when it was served."""

    WAIT = "wait"  # until its descriptor has news, or it is poked
    WORK = "work"  # what there is to do may take long: to be served on a thread of the pool
    END = "end"


class Handler(Protocol):
    """One connection and what is to be done on it. At most one thread is inside a handler at any time, apart from
    ``is_over``. Compared and hashed by identity."""

    def interest(self) -> tuple[int, int]:
        """File descriptor and selector events to wait for while idle; a descriptor of -1 waits for a poke alone."""
        ...

    def serve(self, *, may_take_long: bool) -> Next:
        """Do what can be done now. ``may_take_long``: on a pool thread; else on the reactor's, which the others wait
        for: then only what is done at once, and ``Next.WORK``, from there alone, when there is more."""
        ...

    def tick(self) -> None:
        """Called regularly while idle, on the reactor's thread: must not block."""
        ...

    def is_over(self) -> bool:
        """Whether to end without being served again. Thread-safe, must not block."""
        ...

    def finish(self) -> None:
        """Called exactly once, last, when no thread is inside. Must not block."""
        ...


class _State(Enum):
    IDLE = "idle"  # with the selector, or on the way to it
    QUEUED = "queued"  # waits for a pool thread
    RUNNING = "running"
    POKED = "poked"  # running, and to be looked at once more


class Reactor:
    """Runs until ``stop``. ``on_tick`` is called on the reactor's thread, regularly and after each request to it, and
    returns whether it waits for a moment to come. While neither it nor a handler does, the reactor sleeps."""

    def __init__(self, name: str, num_threads: int, on_tick: Callable[[], bool]) -> None:
        self._on_tick = on_tick
        self._states: dict[Handler, _State] = {}
        self._timeless: set[Handler] = set()
        self._lock = threading.Lock()  # around these two
        self._requests: deque[Callable[[], None]] = deque()  # from any thread to the reactor's
        self._ready: queue.SimpleQueue[Handler | None] = queue.SimpleQueue()
        self._stopping = False
        self._selector = selectors.DefaultSelector()  # this and what is registered: reactor's thread only
        self._registered: dict[Handler, tuple[int, int]] = {}
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True)]
        self._threads += [
            threading.Thread(target=self._serve_queued, name=f"{name}-{n}", daemon=True) for n in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, handler: Handler, *, needs_ticks: bool = True) -> None:
        """Take on a handler and serve it soon. Thread-safe, as are ``poke`` and ``wake``."""
        with self._lock:
            self._states[handler] = _State.IDLE
            if not needs_ticks:
                self._timeless.add(handler)
        self.poke(handler)

    def poke(self, handler: Handler) -> None:
        """Something changed: end the handler if it is over, else serve it once more. Nothing happens after its end."""
        self._request(lambda: self._poked(handler))

    def wake(self) -> None:
        """Call ``on_tick`` soon."""
        self._request(lambda: None)

    def stop(self) -> None:
        """Finish every handler and join the threads. All handlers must be over by now. Not from a reactor's thread."""
        self._stopping = True
        self.wake()
        deadline_s = time.monotonic() + _STOP_DEADLINE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _request(self, action: Callable[[], None]) -> None:
        self._requests.append(action)
        with contextlib.suppress(OSError):  # full: it wakes up anyway; closed: it has stopped
            self._wake_writer.send(b"\0")

    # ---- the reactor's thread

    def _run(self) -> None:
        timeout_s: float | None = _TICK_S
        while not self._stopping or self._states:
            self._select(timeout_s)
            while self._requests:
                run_guarded(self._requests.popleft())
            for handler in list(self._states):
                self._tick(handler)
            is_waiting = run_guarded(self._on_tick)  # None: it failed, and nobody knows
            with self._lock:
                timeout_s = _TICK_S if is_waiting is not False or self._states.keys() - self._timeless else None
        for _ in self._threads[1:]:
            self._ready.put(None)
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _select(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wake_reader.recv(4096)
            else:
                run_guarded(functools.partial(self._poked, key.data))

    def _poked(self, handler: Handler) -> None:
        over = handler.is_over()
        with self._lock:
            state = self._states.get(handler)
            if state is _State.RUNNING:
                self._states[handler] = _State.POKED
            if state is not _State.IDLE and not (state is _State.QUEUED and over):
                return
        if over:
            self._end(handler)
        else:
            self._serve_here(handler)

    def _serve_here(self, handler: Handler) -> None:
        following = run_guarded(functools.partial(handler.serve, may_take_long=False)) or Next.END
        if following is Next.END or handler.is_over():
            self._end(handler)
        elif following is Next.WAIT:
            self._watch(handler)
        else:
            with self._lock:
                self._states[handler] = _State.QUEUED
            self._unwatch(handler)
            self._ready.put(handler)

    def _tick(self, handler: Handler) -> None:
        if self._states.get(handler) is _State.IDLE:  # only this thread moves a handler out of IDLE
            run_guarded(handler.tick)
        if handler.is_over():
            run_guarded(functools.partial(self._poked, handler))

    def _watch(self, handler: Handler) -> None:
        """Have an idle handler served at the next event that it is interested in; again and again does no harm."""
        with self._lock:
            if self._states.get(handler) is not _State.IDLE:
                return
        try:
            wanted = handler.interest()
            if self._registered.get(handler) != wanted:
                self._unwatch(handler)
                descriptor, events = wanted
                if descriptor >= 0:
                    self._selector.register(descriptor, events, handler)
                    self._registered[handler] = wanted
        except Exception:  # such as no room for one more: nobody would ever serve it again
            _logger.exception("KV transfer: a connection cannot be watched and is ended")
            self._end(handler)

    def _unwatch(self, handler: Handler) -> None:
        descriptor, _ = self._registered.pop(handler, (-1, 0))
        if descriptor >= 0:
            self._selector.unregister(descriptor)

    def _end(self, handler: Handler) -> None:
        """Of one that no other thread is inside of."""
        with self._lock:
            self._forget(handler)
        self._unwatch(handler)
        run_guarded(handler.finish)

    def _forget(self, handler: Handler) -> None:
        """With the lock held."""
        del self._states[handler]
        self._timeless.discard(handler)

    # ---- the pool's threads

    def _serve_queued(self) -> None:
        while (handler := self._ready.get()) is not None:
            with self._lock:
                if self._states.get(handler) is not _State.QUEUED:
                    continue  # it ended while it waited here
                self._states[handler] = _State.RUNNING
            following = run_guarded(functools.partial(handler.serve, may_take_long=True)) or Next.END
            goes_on = following is not Next.END and not handler.is_over()
            with self._lock:
                poked = self._states[handler] is _State.POKED
                if goes_on:
                    self._states[handler] = _State.IDLE
                else:
                    self._forget(handler)
            if not goes_on:
                run_guarded(handler.finish)
                self.wake()
            elif poked:
                self._request(functools.partial(self._poked, handler))
            else:
                self._request(functools.partial(self._watch, handler))


def run_guarded(action: Callable[[], T]) -> T | None:
    """A bug in one handler must not end the threads that serve all others."""
    try:
        return action()
    except Exception:
        _logger.exception("KV transfer: unexpected error")
        return None
