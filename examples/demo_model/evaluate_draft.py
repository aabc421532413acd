"""How many tokens a step brings with a draft head, on chats that it has not learned from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eagleray import LLM, SamplingParams
from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.engine.engine import StepOutcome

SHAPES = {
    "chain of 3": {"num_speculative_tokens": 3},
    "chain of 5": {"num_speculative_tokens": 5},
    "tree of 15, 5 deep": {"num_speculative_tokens": 5, "tree_branching": 4, "tree_nodes": 15},
    "tree of 31, 6 deep": {"num_speculative_tokens": 6, "tree_branching": 5, "tree_nodes": 31},
}


def count(llm: LLM, prompts: list[list[dict[str, str]]], sampling: SamplingParams) -> Acceptance:
    """What came of the guesses in all answers."""
    steps: list[Acceptance | None] = []
    take_step = llm.engine.step

    def counted_step() -> StepOutcome:
        outcome = take_step()
        steps.append(outcome.acceptance)
        return outcome

    llm.engine.step = counted_step  # type: ignore[method-assign]
    llm.chat(prompts, sampling)
    llm.engine.step = take_step  # type: ignore[method-assign]
    return total_acceptance(steps) or Acceptance()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chats", type=Path, help="JSON lines with messages, as chats_as_jsonl.py writes them")
    parser.add_argument("--draft", default="demo", help="folder of the head, or demo")
    parser.add_argument("--num-chats", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--num-threads", type=int, default=1)
    arguments = parser.parse_args()
    lines = arguments.chats.read_text(encoding="utf-8").splitlines()[: arguments.num_chats]
    prompts = [json.loads(line)["messages"][:-1] for line in lines]
    for name, shape in SHAPES.items():
        speculation = {"method": "eagle3", "model": arguments.draft, "adaptive": False, **shape}
        llm = LLM("demo", num_threads=arguments.num_threads, num_blocks=4096, speculation=speculation)
        for temperature in (0.0, 0.7):
            sampling = SamplingParams(temperature=temperature, max_tokens=arguments.max_tokens, seed=1)
            found = count(llm, prompts, sampling)
            shares = " ".join(f"{share:.2f}" for share in found.rate_per_position)
            print(f"{name}, temperature {temperature}: {found.tokens_per_step:.2f} tokens per step, accepted {shares}")


if __name__ == "__main__":
    main()
