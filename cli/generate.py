"""``eagleray generate``: answers to prompts, computed in this process."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eagleray.cli.options import add_model_arguments, add_sampling_arguments, given
from eagleray.cli.terminal import printable
from eagleray.core.sampling_params import SamplingParams

if TYPE_CHECKING:  # torch, which takes seconds to import: not before the options are known to be right
    from eagleray.engine.request_output import RequestOutput

OnLoaded = Callable[[int, int], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="none, or '-': standard input is the prompt")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message to the chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt and line")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    asked = given(arguments, "sampling")
    if arguments.chat:
        asked.setdefault("max_tokens", None)  # an answer is as long as it is, as over HTTP
    sampling = SamplingParams(**asked)
    prompts = [_stdin_text() if prompt == "-" else prompt for prompt in arguments.prompts or ["-"]]
    outputs = _answer(prompts, sampling, arguments)
    for prompt, output in zip(prompts, outputs, strict=True):
        if arguments.json:
            print(json.dumps(_as_json(prompt, output), ensure_ascii=False))
        else:
            heading = f"=== {prompt}\n" if len(prompts) > 1 else ""
            print(printable(heading + output.outputs[0].text))
        if output.outputs[0].finish_reason == "length" and sampling.max_tokens is not None:
            print(f"(stopped after --max-tokens {sampling.max_tokens})", file=sys.stderr)
    return 0


def _answer(prompts: Sequence[str], sampling: SamplingParams, arguments: argparse.Namespace) -> list[RequestOutput]:
    from eagleray.engine.llm import LLM

    model = given(arguments, "model")
    if "path" in model:
        model["model"] = model.pop("path")
    with _loading_bar() as on_loaded:
        llm = LLM(**model, progress=on_loaded)
    if not arguments.chat:
        return llm.generate(list(prompts), sampling)
    return llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling)


def _as_json(prompt: str, output: RequestOutput) -> dict[str, object]:
    answer = output.outputs[0]
    return {
        "prompt": prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
    }


def _stdin_text() -> str:
    if sys.stdin.isatty():
        print("The prompt, then Ctrl-D:", file=sys.stderr)
    return sys.stdin.read()


@contextmanager
def _loading_bar() -> Iterator[OnLoaded | None]:
    """Gives what shows how many weights are loaded; None when nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading weights")
        yield lambda loaded, total: progress.update(task, completed=loaded, total=total)
