"""``eagleray train-draft``: a draft head for any model that is served."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from eagleray.cli.options import add_model_arguments, given
from eagleray.cli.terminal import Progress
from eagleray.core.acceptance import Acceptance
from eagleray.core.clock import Clock, SystemClock
from eagleray.core.config import DEMO_MODEL, parse_config
from eagleray.core.errors import ConfigError
from eagleray.core.sampling_params import SamplingParams

if TYPE_CHECKING:  # torch, which takes seconds to import: not before the options are known to be right
    from eagleray.training.run import RunSettings
    from eagleray.training.trainer import Progress as StepProgress


CHAIN_LENGTH: Final = 3  # for which tokens per step are shown: what speculation.num_speculative_tokens is by default
_REPORTED_STEPS: Final = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--method", choices=("eagle3", "medusa"), default="eagle3", help="default: eagle3")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="of the head; OUTPUT/training has the run's state"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, given the same options")
    parser.add_argument("--num-threads", type=int, metavar="N", help="torch threads; default: torch's")
    _add_data_arguments(parser.add_argument_group("data"))
    _add_head_arguments(parser.add_argument_group("head"))
    _add_plan_arguments(parser.add_argument_group("training"))


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help=".jsonl with messages, conversations, prompt (and completion) or text in each line; else plain text",
    )
    group.add_argument(
        "--held-out",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="to measure on; default: part of the data",
    )
    group.add_argument("--num-documents", type=int, metavar="N", help="of the data, from its beginning; default: all")
    group.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of prompt and answer; default: 512")
    group.add_argument(
        "--self-generate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="learn from the model's own answers rather than from those in the data (default)",
    )
    group.add_argument(
        "--temperatures", nargs="+", type=float, default=[0.0, 0.7, 1.0], metavar="T", help="of its answers, in turn"
    )


def _add_head_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-guesses", type=int, default=4, metavar="N", help="guesses of a chain while training")
    group.add_argument("--draft-vocab-size", type=int, metavar="N", help="the most common tokens only; eagle3")
    group.add_argument(
        "--capture-layers", nargs="+", type=int, metavar="LAYER", help="whose inputs it reads; default: the authors'"
    )


def _add_plan_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, default=3, metavar="N", help="passes over the data; default: 3")
    group.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="in one step; default: 4096")
    group.add_argument(
        "--learning-rate", type=float, default=0.015, metavar="RATE", help="at its highest; default: 0.015"
    )
    group.add_argument(
        "--check-every-steps", type=int, default=100, metavar="N", help="held-out acceptance, and a checkpoint"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N")


def run(arguments: argparse.Namespace) -> int:
    settings, clock = _settings(arguments), SystemClock()
    is_begun = settings.checkpoint.exists()
    _check_output(settings, arguments.resume)
    import torch

    from eagleray.training.run import (
        build_trainer,
        check_head,
        export_head,
        gather_documents,
        layers_note,
        load_target,
    )
    from eagleray.training.trainer import fastest_dtype

    check_head(settings)
    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    show = Progress(clock, sys.stdout)
    trainer = build_trainer(settings, gather_documents(settings, show), load_target(settings))
    if is_begun:
        trainer.resume()
        if trainer.computes_in != fastest_dtype():
            show(f"goes on in {trainer.computes_in}, as it began; on this machine {fastest_dtype()} would be faster")
    speed = _Speed(clock)
    for progress in trainer.run():
        speed.note(progress)
        if progress.held_out is not None and progress.step < progress.num_steps:
            export_head(settings, trainer)
        if progress.held_out is not None or progress.step % _REPORTED_STEPS == 0:
            show(f"{speed.line(progress)}{_acceptance(progress.held_out)}")
    export_head(settings, trainer)  # not in the loop: a run that was interrupted behind its last step has none of it
    if (note := layers_note(trainer)) is not None:
        show(note)
    show(f"the head is in {settings.output}; serve it with")
    model = "" if settings.model.path == DEMO_MODEL else f" --model {settings.model.path}"
    model += "" if settings.model.dtype == "auto" else f" --dtype {settings.model.dtype}"
    model += "" if settings.model.quantization is None else f" --quantization {settings.model.quantization}"
    method = f"--set speculation.method={settings.method}"
    print(f"  eagleray serve{model} {method} --set speculation.model={settings.output}")
    return 0


def _check_output(settings: RunSettings, resume: bool) -> None:
    """Nothing that lies in the folder may be lost. Raises ``ConfigError``."""
    output = settings.output
    if output.exists() and not output.is_dir():
        raise ConfigError("--output", str(output), "is a file; name a folder")
    if settings.checkpoint.exists() and not resume:
        raise ConfigError("--output", str(output), "holds a run; add --resume to go on, or name another")
    if output.exists() and any(output.iterdir()) and not settings.work_folder.is_dir():
        raise ConfigError("--output", str(output), "holds files of something else; name another folder")


class _Speed:
    """Loss, tokens per second and the time that is left, over the steps since the last line."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._since_s = clock, clock.now_s()
        self._losses: list[float] = []
        self._num_tokens = 0

    def note(self, progress: StepProgress) -> None:
        self._losses.append(progress.loss)
        self._num_tokens += progress.num_tokens

    def line(self, progress: StepProgress) -> str:
        spent_s = max(1e-9, self._clock.now_s() - self._since_s)
        left_min = (progress.num_steps - progress.step) * spent_s / len(self._losses) / 60
        loss = sum(self._losses) / len(self._losses)
        line = f"step {progress.step}/{progress.num_steps}  loss {loss:.3f}  {self._num_tokens / spent_s:.0f} tokens/s"
        self._since_s, self._losses, self._num_tokens = self._clock.now_s(), [], 0
        return f"{line}  {left_min:.0f} min left"


def _acceptance(held_out: Acceptance | None) -> str:
    if held_out is None:
        return ""
    shares = " ".join(f"{share:.2f}" for share in held_out.rate_per_position)
    return f"  held out: accepted {shares}, {held_out.tokens_per_step:.2f} tokens per step with {CHAIN_LENGTH} guesses"


def _settings(arguments: argparse.Namespace) -> RunSettings:
    from eagleray.training.run import RunSettings
    from eagleray.training.trainer import TrainingPlan

    for name in (
        "epochs",
        "batch_tokens",
        "check_every_steps",
        "max_tokens",
        "num_guesses",
        "num_documents",
        "num_threads",
    ):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be at least 1")
    if not arguments.learning_rate > 0:
        raise ConfigError("--learning-rate", arguments.learning_rate, "must be more than 0")
    for temperature in arguments.temperatures:
        SamplingParams(temperature=temperature)  # refuses what cannot be sampled
    plan = TrainingPlan(
        num_epochs=arguments.epochs,
        batch_tokens=arguments.batch_tokens,
        learning_rate=arguments.learning_rate,
        check_every_steps=arguments.check_every_steps,
        chain_length=min(CHAIN_LENGTH, arguments.num_guesses),
        seed=arguments.seed,
    )
    return RunSettings(
        model=parse_config({"model": given(arguments, "model")}).model,
        method=arguments.method,
        data=tuple(arguments.data),
        output=arguments.output,
        plan=plan,
        held_out=tuple(arguments.held_out),
        num_documents=arguments.num_documents,
        max_tokens=arguments.max_tokens,
        temperatures=tuple(arguments.temperatures) if arguments.self_generate else (),
        capture_layers=tuple(arguments.capture_layers) if arguments.capture_layers else None,
        draft_vocab_size=arguments.draft_vocab_size,
        num_guesses=arguments.num_guesses,
    )
