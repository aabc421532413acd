from __future__ import annotations

import contextlib
import os
import queue
import selectors
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from eagleray.kv_transfer.fake import Calls
from eagleray.kv_transfer.reactor import Next, Reactor


class Recorder:
    """A handler that counts, and checks that it is alone. Without ``on_quick`` all that it does takes long."""

    def __init__(
        self,
        descriptor: int = -1,
        on_serve: Callable[[], Next] = lambda: Next.WAIT,
        on_quick: Callable[[], Next] = lambda: Next.WORK,
    ) -> None:
        self._descriptor = descriptor
        self._on_serve, self._on_quick = on_serve, on_quick
        self._alone = threading.Lock()
        self.served: Calls[bool] = Calls()
        self.served_quickly: Calls[bool] = Calls()
        self.finished: Calls[bool] = Calls()
        self.over = False

    def interest(self) -> tuple[int, int]:
        return self._descriptor, selectors.EVENT_READ

    def serve(self, *, may_take_long: bool) -> Next:
        alone = self._alone.acquire(blocking=False)
        try:
            return self._on_serve() if may_take_long else self._on_quick()
        finally:
            if alone:
                self._alone.release()
            (self.served if may_take_long else self.served_quickly)(alone)

    def tick(self) -> None:
        """Nothing is due."""

    def is_over(self) -> bool:
        return self.over

    def finish(self) -> None:
        self.finished(self._alone.acquire(blocking=False))


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor("test", 4, on_tick=lambda: False)
    yield reactor
    reactor.stop()


def test_a_handler_is_served_when_added_when_poked_and_when_its_socket_is_ready(reactor: Reactor) -> None:
    left, right = socket.socketpair()
    handler = Recorder(left.fileno(), on_serve=lambda: handler_reads(left))
    reactor.add(handler)
    handler.served.wait(1)
    reactor.poke(handler)
    handler.served.wait(2)
    right.send(b"x")
    handler.served.wait(3)
    handler.over = True
    reactor.poke(handler)
    handler.finished.wait()
    left.close()
    right.close()


def handler_reads(end: socket.socket) -> Next:
    end.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        end.recv(16)
    return Next.WAIT


def test_what_is_quick_is_done_although_all_threads_are_busy(reactor: Reactor) -> None:
    go_on = threading.Event()
    busy = [Recorder(on_serve=lambda: waits_for(go_on)) for _ in range(4)]
    left, right = socket.socketpair()
    quick = Recorder(left.fileno(), on_quick=lambda: handler_reads(left))
    for handler in [*busy, quick]:
        reactor.add(handler)
    quick.served_quickly.wait(1)
    right.send(b"x")
    quick.served_quickly.wait(2)
    assert not quick.served.values
    go_on.set()
    for handler in [*busy, quick]:
        handler.over = True
    reactor.stop()
    left.close()
    right.close()


def test_a_handler_that_waits_to_write_is_served_when_it_can(reactor: Reactor) -> None:
    left, right = socket.socketpair()
    wanted = [selectors.EVENT_READ]

    class Writer(Recorder):
        def interest(self) -> tuple[int, int]:
            return left.fileno(), wanted[0]

    writer = Writer(on_quick=lambda: Next.WAIT)
    reactor.add(writer)
    writer.served_quickly.wait(1)
    wanted[0] |= selectors.EVENT_WRITE
    reactor.poke(writer)
    writer.served_quickly.wait(3)  # poked, and then because its socket takes bytes
    writer.over = True
    reactor.stop()
    left.close()
    right.close()


def waits_for(event: threading.Event) -> Next:
    return Next.WAIT if event.wait(10.0) else Next.END


def test_a_handler_is_never_entered_by_two_threads(reactor: Reactor) -> None:
    def let_others_in() -> Next:
        os.sched_yield()
        return Next.WAIT

    handler = Recorder(on_serve=let_others_in)
    reactor.add(handler)
    pokers = [threading.Thread(target=lambda: [reactor.poke(handler) for _ in range(200)]) for _ in range(4)]
    for poker in pokers:
        poker.start()
    for poker in pokers:
        poker.join()
    handler.over = True
    reactor.poke(handler)
    assert handler.finished.wait() == [True]
    assert all(handler.served.values) and all(handler.served_quickly.values)


def test_a_poke_while_a_handler_is_served_serves_it_once_more(reactor: Reactor) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> Next:
        inside.set()
        return waits_for(go_on)

    handler = Recorder(on_serve=hold)
    reactor.add(handler)
    assert inside.wait(10.0)
    reactor.poke(handler)
    go_on.set()
    handler.served.wait(2)
    handler.over = True


def test_a_handler_that_is_over_ends_although_all_threads_are_busy(reactor: Reactor) -> None:
    go_on = threading.Event()
    busy = [Recorder(on_serve=lambda: waits_for(go_on)) for _ in range(4)]
    waiting = Recorder()
    for handler in [*busy, waiting]:
        reactor.add(handler)
    waiting.over = True
    reactor.poke(waiting)
    assert waiting.finished.wait(timeout_s=1.0) == [True]
    go_on.set()
    for handler in busy:
        handler.over = True
    reactor.stop()
    assert [len(handler.finished.values) for handler in [*busy, waiting]] == [1] * 5
    assert not waiting.served.values


def test_a_handler_that_fails_is_finished_and_the_others_go_on(reactor: Reactor) -> None:
    def fail() -> Next:
        raise RuntimeError("a bug")

    bad, good = Recorder(on_serve=fail), Recorder(on_serve=lambda: Next.END)
    reactor.add(bad)
    bad.finished.wait()
    reactor.add(good)
    good.finished.wait()


@pytest.mark.parametrize("following", [Next.WAIT, Next.WORK], ids=["served quickly", "served by the pool"])
@pytest.mark.parametrize("fails_at", [1, 2], ids=["at first", "when it was watched already"])
def test_a_handler_that_fails_to_say_what_it_waits_for_is_finished_and_the_others_go_on(
    reactor: Reactor, following: Next, fails_at: int
) -> None:
    class Failing(Recorder):
        num_asked = 0

        def interest(self) -> tuple[int, int]:
            self.num_asked += 1
            if self.num_asked == fails_at:
                raise RuntimeError("a bug")
            return super().interest()

    (left, right), (other_left, other_right) = socket.socketpair(), socket.socketpair()
    bad = Failing(left.fileno(), on_quick=lambda: following)
    good = Recorder(other_left.fileno(), on_quick=lambda: handler_reads(other_left))
    reactor.add(good)
    reactor.add(bad)
    if fails_at > 1:
        (bad.served if following is Next.WORK else bad.served_quickly).wait(1)
        right.send(b"x")
    assert bad.finished.wait() == [True]
    num_served = len(bad.served_quickly.values)
    right.send(b"x")
    other_right.send(b"x")
    good.served_quickly.wait(2)
    reactor.poke(bad)
    reactor.poke(good)
    good.served_quickly.wait(3)
    assert len(bad.finished.values) == 1 and len(bad.served_quickly.values) == num_served
    good.over = True
    reactor.stop()
    for end in (left, right, other_left, other_right):
        end.close()


def test_it_looks_up_regularly_only_while_somebody_waits_for_a_moment_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: queue.SimpleQueue[float | None] = queue.SimpleQueue()

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            timeouts.put(timeout)
            return super().select(timeout)

    def until(ticks: bool) -> None:
        while (timeouts.get(timeout=5) is not None) is not ticks:
            pass

    monkeypatch.setattr(selectors, "DefaultSelector", Selector)
    waits = threading.Event()
    reactor = Reactor("test", 1, on_tick=waits.is_set)
    until(ticks=False)
    timeless, timed = Recorder(), Recorder()
    reactor.add(timeless, needs_ticks=False)
    timeless.served.wait(1)
    until(ticks=False)
    reactor.add(timed)
    until(ticks=True)
    timed.over = True
    timed.finished.wait(1)
    until(ticks=False)
    waits.set()
    reactor.wake()
    until(ticks=True)
    timeless.over = True
    reactor.stop()


def test_ticks_go_on_after_one_that_failed() -> None:
    ticks: Calls[None] = Calls()

    def tick() -> bool:
        ticks(None)
        raise ZeroDivisionError

    reactor = Reactor("test", 1, on_tick=tick)
    reactor.wake()
    ticks.wait(4)  # the first may be the start's, the second the request's
    reactor.stop()
