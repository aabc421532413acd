"""The checkpoint that all engines of a comparison read: transformers reads it as its own, and so do we."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_checkpoint import FIRST_TEXT_TOKEN_ID, checkpoint_folder, write_random_checkpoint

from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.llm import LLM

transformers = pytest.importorskip("transformers")

PROMPT = list(range(FIRST_TEXT_TOKEN_ID, FIRST_TEXT_TOKEN_ID + 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(folder, "tiny")
    return folder


def test_transformers_and_we_answer_alike(folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    ours = LLM(folder, dtype="float32").generate([PROMPT], params)[0].outputs[0].token_ids
    assert list(ours) == theirs[0, len(PROMPT) :].tolist()


def test_the_tokenizer_fills_the_vocabulary_with_tokens_that_are_texts_of_their_own(folder: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = tokenizer.batch_decode([[token_id] for token_id in range(FIRST_TEXT_TOKEN_ID, len(tokenizer))])
    assert len(tokenizer) == 1024
    assert len(set(texts)) == len(texts) and all(text.isprintable() for text in texts)


def test_a_checkpoint_that_is_there_is_used_as_it_is(tmp_path: Path):
    weights = checkpoint_folder("tiny", tmp_path) / "model.safetensors"
    before_ns = weights.stat().st_mtime_ns
    assert checkpoint_folder("tiny", tmp_path) == weights.parent
    assert weights.stat().st_mtime_ns == before_ns
