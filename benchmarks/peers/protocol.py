"""How a comparison talks to an engine in another process and another Python: one JSON object per line.

The driver says ``{"ready": {...}}`` once, with the engine's version and settings. Then each ``{"prompts": [[ids]],
"output_tokens": n}`` on standard input is answered by ``{"duration_s": s, "output_tokens": [counts]}``. The end of
standard input ends the driver. Only the standard library is imported here: a peer's environment need not have ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[int]]  # prompts and how many tokens to answer; the length of every answer


def run_driver(start: Callable[[argparse.Namespace], tuple[Generate, dict[str, Any]]]) -> None:
    """Start the engine that the command line describes and answer until standard input ends.

    ``start`` returns what answers prompts greedily, never ending early and without a prefix cache, and what to say
    about the engine.
    """
    answers = claim_standard_output()
    options = _parser().parse_args()
    began_s = time.perf_counter()
    generate, description = start(options)
    start_s = time.perf_counter() - began_s
    print(json.dumps({"ready": {**description, "start_s": start_s}}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began_s = time.perf_counter()
        counts = generate(asked["prompts"], asked["output_tokens"])
        duration_s = time.perf_counter() - began_s
        print(json.dumps({"duration_s": duration_s, "output_tokens": counts}), file=answers, flush=True)


def claim_standard_output() -> Any:
    """Engines print as they like: what they say goes to standard error, and the real standard output is ours alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True, help="largest batch that will be asked for")
    parser.add_argument("--max-model-tokens", type=int, required=True, help="longest prompt plus answer")
    parser.add_argument("--kv-memory-bytes", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="what this run of the engine varies, as JSON")
    return parser
