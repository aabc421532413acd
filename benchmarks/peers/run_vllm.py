"""Driver of vLLM's offline engine. Settings: any argument of its ``LLM``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from protocol import Generate, Prompts, run_driver


def start(options: argparse.Namespace) -> tuple[Generate, dict[str, Any]]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, options.kv_memory_bytes // 2**30))  # GiB
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options.threads - 1}"  # by default it leaves a core to others
    import vllm

    settings = {"dtype": "bfloat16", **options.settings}
    llm = vllm.LLM(
        options.model,
        max_model_len=options.max_model_tokens,
        max_num_seqs=options.max_num_seqs,
        enable_prefix_caching=False,
        **settings,
    )

    def generate(prompts: Prompts, output_tokens: int) -> list[int]:
        params = vllm.SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [len(output.outputs[0].token_ids) for output in llm.generate(asked, params, use_tqdm=False)]

    return generate, {"engine": "vllm", "version": vllm.__version__, "settings": settings}


if __name__ == "__main__":
    run_driver(start)
