"""Driver of eagleray's offline engine. Settings: any argument of ``LLM``."""

from __future__ import annotations

import argparse
from typing import Any

from protocol import Generate, Prompts, run_driver

from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.llm import LLM


def start(options: argparse.Namespace) -> tuple[Generate, dict[str, Any]]:
    settings = {"dtype": "bfloat16", **options.settings}
    llm = LLM(
        options.model,
        num_threads=options.threads,
        max_model_len=options.max_model_tokens,
        max_num_seqs=options.max_num_seqs,
        kv_memory_bytes=options.kv_memory_bytes,
        enable_prefix_caching=False,
        **settings,
    )

    def generate(prompts: Prompts, output_tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        return [len(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]

    return generate, {"engine": "eagleray", "settings": settings}


if __name__ == "__main__":
    run_driver(start)
