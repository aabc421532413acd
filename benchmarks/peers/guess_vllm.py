"""vLLM's offline engine answers greedily, guessing ahead or not: its tokens, and what came of its guesses.

``{"settings": {arguments of LLM}, "prompts": [[ids]], "output_tokens": n}`` on standard input is answered by one JSON
object on standard output.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from protocol import Prompts, claim_standard_output

_COUNTERS: Final = {
    "vllm:spec_decode_num_drafts": "num_drafts",
    "vllm:spec_decode_num_draft_tokens": "num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_per_position",
}


def answer(settings: dict[str, Any], prompts: Prompts, output_tokens: int) -> dict[str, Any]:
    import vllm

    llm = vllm.LLM(**settings)
    params = vllm.SamplingParams(max_tokens=output_tokens, temperature=0.0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return {
        "version": vllm.__version__,
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "guesses": {
            _COUNTERS[metric.name]: metric.values if hasattr(metric, "values") else metric.value
            for metric in llm.get_metrics()
            if metric.name in _COUNTERS
        },
    }


if __name__ == "__main__":  # its engine is a process of its own, which imports this again
    answers = claim_standard_output()
    print(json.dumps(answer(**json.load(sys.stdin))), file=answers, flush=True)
