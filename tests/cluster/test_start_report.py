from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from eagleray.cluster.progress import (
    PROCESS_PHASE,
    REPORT_INTERVAL_S,
    KernelsChosen,
    Note,
    PhaseEnded,
    ProgressListener,
    ProgressReporter,
    TensorsLoaded,
)
from eagleray.cluster.start_report import LAST_PHASE, StartReport
from eagleray.core.clock import ManualClock

WAIT_S = 5.0


def heard_by_a_listener(*notes: Note) -> list[Note]:
    """What arrives of what a worker tells."""
    heard: list[Note] = []
    listener = ProgressListener(heard.append)
    clock = ManualClock()
    reporter = ProgressReporter(listener.address, "decode a", clock)
    clock.advance(10 * REPORT_INTERVAL_S)  # before the first tensor much is imported
    for note in notes:
        if isinstance(note, KernelsChosen):
            reporter.kernels_chosen(note.description)
        elif isinstance(note, PhaseEnded):
            reporter.phase_ended(note.phase, note.duration_s)
        else:
            reporter.tensors_loaded(note.loaded, note.total)
        clock.advance(0.3 * REPORT_INTERVAL_S)
    reporter.close()
    listener.close()
    return heard


def test_a_listener_hears_everything_that_was_told_before_it_closed() -> None:
    notes = [
        PhaseEnded("decode a", "import", 1.5),
        KernelsChosen("decode a", "torch"),
        PhaseEnded("decode a", "weights", 0.25),
    ]
    assert heard_by_a_listener(*notes) == notes


@pytest.mark.parametrize(("total", "told"), [(4, []), (7, [5, 7]), (12, [5, 9, 12])])
def test_of_many_tensors_some_are_told_and_the_last_and_of_those_loaded_at_once_none(
    total: int, told: list[int]
) -> None:
    heard = heard_by_a_listener(*(TensorsLoaded("decode a", count, total) for count in range(1, total + 1)))
    assert heard == [TensorsLoaded("decode a", count, total) for count in told]


def test_nothing_is_left_and_telling_goes_on_when_nobody_listens_any_more() -> None:
    listener = ProgressListener(lambda note: None)
    listener.close()
    assert not Path(listener.address).parent.exists()
    for address in (listener.address, None):
        ProgressReporter(address, "decode a", ManualClock()).phase_ended("import", 1.0)


def test_what_is_no_note_is_passed_over() -> None:
    arrived = threading.Event()
    listener = ProgressListener(lambda note: arrived.set())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"nonsense", listener.address)
    ProgressReporter(listener.address, "decode a", ManualClock()).phase_ended("import", 1.0)
    assert arrived.wait(WAIT_S)
    listener.close()


def test_a_worker_becomes_one_line_and_its_process_is_measured_from_outside() -> None:
    clock, lines = ManualClock(), []
    report = StartReport(clock, lines.append)
    clock.advance(3.0)
    report.phases.end("Serve")
    clock.advance(1.25)
    report.heard(PhaseEnded("decode a", PROCESS_PHASE, 0.0))
    report.heard(TensorsLoaded("decode a", 3, 74))
    report.heard(PhaseEnded("decode a", "weights", 0.5))
    report.heard(PhaseEnded("decode a", LAST_PHASE, 0.01))
    assert lines == [
        "Serve: 3.00 s",
        "decode a: 3 of 74 tensors loaded",
        "decode a: process 1.25 s, weights 0.50 s, channel 0.01 s",
    ]


def test_the_kernels_of_each_worker_and_why_they_are_not_the_best_are_told() -> None:
    lines: list[str] = []
    report = StartReport(ManualClock(), lines.append)
    report.heard(KernelsChosen("decode a", "torch (no C compiler on this machine; install one, such as gcc)"))
    assert lines == ["decode a computes with torch (no C compiler on this machine; install one, such as gcc)"]


def test_a_description_of_any_length_arrives() -> None:
    (heard,) = heard_by_a_listener(KernelsChosen("decode a", "ä" * 10_000))
    assert isinstance(heard, KernelsChosen) and len(heard.description) > 500


@pytest.mark.parametrize("module", ["eagleray.cluster.serve_app", "eagleray.cluster.ingress_process"])
def test_who_does_not_compute_does_not_import_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_worker_does_not_import_transformers_nor_the_http_front() -> None:
    script = (
        "import sys, eagleray.cluster.worker_process, eagleray.cluster.deployments;"
        "sys.exit(bool({'transformers', 'eagleray.api.app'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_worker_does_not_import_what_torch_has_for_compilers_until_something_asks_for_it() -> None:
    script = """
import sys
from eagleray.cluster.deferred_import import defer_what_only_compilers_need
defer_what_only_compilers_need()
import eagleray.cluster.worker_process, torch
assert "torch._refs" not in sys.modules
assert torch._meta_registrations.register_meta
assert "torch._refs" in sys.modules and sys.modules["torch._meta_registrations"].__file__
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
