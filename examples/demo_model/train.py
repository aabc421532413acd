"""Train the demo model on the rows that ``corpus.py`` wrote.

The learning rate warms up, stays, and falls linearly to zero at the end.  When the
end comes is decided by ``--tokens``, or at any time by SIGUSR1 or a file
``STOP_DECAY`` in the work folder (whose content, if any, is the number of tokens
that the decay takes).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import time
from pathlib import Path

from data import KINDS, Batches, held_out_batch, load_rows
from trainer import DECAY_SHARE, Progress, Trainer

SEED = 1
STOP_DECAY = "STOP_DECAY"
REPORT_EVERY_STEPS = 20


class DecaySignal:
    """Set by SIGUSR1 or by the file ``STOP_DECAY``."""

    def __init__(self, work_folder: Path) -> None:
        self._path = work_folder / STOP_DECAY
        self._was_signalled = False
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "_was_signalled", True))

    def poll(self, progress: Progress) -> None:
        """Begin the decay where it was asked for."""
        if self._path.exists():
            content = self._path.read_text().strip()
            progress.start_decay(int(content) if content else None)
        elif self._was_signalled:
            progress.start_decay(None)


def batches_for(progress: Progress, current: Batches | None, arguments: argparse.Namespace) -> Batches:
    """Batches of the phase's length: longer windows in the decay, when few tokens are left."""
    length = arguments.decay_length if progress.is_decaying else arguments.length
    if current is not None and current.length == length:
        return current
    seed = SEED + progress.is_decaying
    return Batches(load_rows(arguments.work_folder, "train"), length, seed)


def begin(arguments: argparse.Namespace, trainer: Trainer, checkpoint: Path) -> Progress:
    """A new run, or the one that the checkpoint holds."""
    if arguments.resume:
        return trainer.load(checkpoint)
    (arguments.work_folder / STOP_DECAY).unlink(missing_ok=True)  # of an earlier run
    decay_tokens = int(arguments.tokens * DECAY_SHARE)
    return Progress(decay_starts_at_tokens=arguments.tokens - decay_tokens, decay_tokens=decay_tokens)


def run(arguments: argparse.Namespace) -> None:
    """Train until the decay has ended."""
    folder: Path = arguments.work_folder
    checkpoint = folder / "checkpoint.pt"
    trainer = Trainer(arguments.muon_rate, arguments.adam_rate, not arguments.no_compile, SEED)
    progress = begin(arguments, trainer, checkpoint)
    held_out = {
        kind: held_out_batch(row, arguments.length, count=24) for kind, row in load_rows(folder, "held_out").items()
    }
    decay_signal = DecaySignal(folder)
    batches: Batches | None = None
    last_save = last_report = time.monotonic()
    average = math.nan
    while progress.tokens_seen < progress.ends_at_tokens:
        began = time.monotonic()
        decay_signal.poll(progress)
        batches = batches_for(progress, batches, arguments)
        share = arguments.decay_chat_share if progress.is_decaying else arguments.chat_share
        rows = batches.batch(progress.steps, arguments.batch_tokens, share)
        loss, norm = trainer.step(rows, progress.learning_rate_scale())
        average = loss if math.isnan(average) else 0.95 * average + 0.05 * loss
        progress.count(rows, time.monotonic() - began)
        if progress.steps % REPORT_EVERY_STEPS == 0:
            seconds = time.monotonic() - last_report
            report(progress, average, norm, REPORT_EVERY_STEPS * arguments.batch_tokens / seconds)
            last_report = time.monotonic()
        if progress.steps % arguments.held_out_every == 0:
            losses = trainer.held_out_loss(held_out)
            print("held out", *(f"{kind} {losses[kind]:.3f}" for kind in KINDS), flush=True)
        if time.monotonic() - last_save > arguments.save_every_seconds:
            trainer.save(checkpoint, progress)
            last_save = time.monotonic()
    trainer.save(checkpoint, progress)
    print("done", dataclasses.asdict(progress), flush=True)


def report(progress: Progress, loss: float, norm: float, tokens_per_second: float) -> None:
    """One line about how it goes."""
    minutes_left = (progress.ends_at_tokens - progress.tokens_seen) / tokens_per_second / 60
    print(
        f"{time.strftime('%H:%M:%S', time.gmtime())} step {progress.steps} "
        f"tokens {progress.tokens_seen / 1e6:.2f}M loss {loss:.3f} norm {norm:.2f} "
        f"rate {progress.learning_rate_scale():.3f} {tokens_per_second:.0f} tokens/s "
        f"{minutes_left:.0f} min left",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--decay-length", type=int, default=1024)
    parser.add_argument("--chat-share", type=float, default=0.4)
    parser.add_argument("--decay-chat-share", type=float, default=0.6)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=4e-3)
    parser.add_argument("--held-out-every", type=int, default=100, help="steps")
    parser.add_argument("--save-every-seconds", type=float, default=150.0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
