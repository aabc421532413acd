"""Measure the demo model on held-out text, or ask it something.

The loss is computed in float32 from the exported bf16 weights, over the whole of
each held-out row, cut into windows that do not overlap.  A window's first tokens
are predicted from little context, so a longer ``--length`` lowers the number.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from data import KINDS, load_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOWS_PER_BATCH = 4


def load(model_folder: Path) -> Any:
    """The exported bf16 weights in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.eval()
    return model


@torch.no_grad()
def total_nats(model: Any, row: torch.Tensor, length: int) -> float:
    """The summed loss of every token but the first of each window."""
    whole = len(row) // length * length
    windows = list(torch.split(row[:whole].view(-1, length), WINDOWS_PER_BATCH))
    if len(row) - whole > 1:
        windows.append(row[whole:].unsqueeze(0))
    total = 0.0
    for rows in windows:
        logits = model(rows, use_cache=False).logits[:, :-1]
        targets = rows[:, 1:].reshape(-1)
        total += float(functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="sum"))
    return total


def held_out_losses(model_folder: Path, work_folder: Path, length: int) -> None:
    """Print nats per token and bits per byte for each kind of held-out text."""
    model = load(model_folder)
    sizes = json.loads((work_folder / "sizes.json").read_text())
    for kind in KINDS:
        row = torch.from_numpy(load_rows(work_folder, "held_out")[kind].astype("int64"))
        scored = len(row) - math.ceil(len(row) / length)
        nats_per_token = total_nats(model, row, length) / scored
        bytes_per_token = sizes[f"held_out_{kind}_bytes"] / len(row)
        print(
            f"held-out {kind}: {len(row)} tokens, {nats_per_token:.4f} nats/token, "
            f"{nats_per_token / math.log(2) / bytes_per_token:.4f} bits/byte",
            flush=True,
        )


@torch.no_grad()
def answer(model_folder: Path, question: str, temperature: float, seed: int) -> str:
    """The model's answer to a one-turn chat; a temperature of 0 is greedy."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = load(model_folder)
    prompt = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": 0.95} if temperature > 0 else {}
    output = model.generate(ids, max_new_tokens=300, do_sample=temperature > 0, **sampling)
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work-folder", type=Path, help="with the rows that corpus.py wrote")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ask", action="append", default=[], help="a question; may be repeated")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.work_folder is not None:
        held_out_losses(arguments.model, arguments.work_folder, arguments.length)
    for question in arguments.ask:
        print(f">>> {question}")
        print(answer(arguments.model, question, arguments.temperature, arguments.seed))


if __name__ == "__main__":
    main()
