"""Driver of OpenVINO GenAI's continuous batching, on a folder that ``optimum-cli export openvino`` has written.

Settings: any property of its CPU device, such as ``KV_CACHE_PRECISION``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import Generate, Prompts, run_driver

_GIB = 2**30


def start(options: argparse.Namespace) -> tuple[Generate, dict[str, Any]]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = max(1, options.kv_memory_bytes // _GIB)
    scheduler.max_num_seqs = options.max_num_seqs
    scheduler.max_num_batched_tokens = options.max_model_tokens
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": options.threads, **options.settings}
    pipeline = openvino_genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)

    def generate(prompts: Prompts, output_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        asked = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(asked, [config] * len(prompts))
        return [len(result.m_generation_ids[0]) for result in results]

    return generate, {"engine": "openvino-genai", "version": openvino_genai.__version__, "settings": properties}


if __name__ == "__main__":
    run_driver(start)
