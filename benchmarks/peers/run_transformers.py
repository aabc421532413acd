"""Driver of ``transformers``' own ``generate``. Settings: any argument of ``from_pretrained``."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from protocol import Generate, Prompts, run_driver


def start(options: argparse.Namespace) -> tuple[Generate, dict[str, Any]]:
    torch.set_num_threads(options.threads)
    settings = {"dtype": "bfloat16", **options.settings}
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, **settings).eval()

    @torch.inference_mode()
    def generate(prompts: Prompts, output_tokens: int) -> list[int]:
        token_ids = torch.tensor(prompts)
        answers = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
        )
        return [answers.shape[1] - token_ids.shape[1]] * len(prompts)

    return generate, {"engine": "transformers", "version": transformers.__version__, "settings": settings}


if __name__ == "__main__":
    run_driver(start)
