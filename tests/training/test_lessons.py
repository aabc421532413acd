"""What is taught and how it is weighed: against torch, and against the networks that serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eagleray.core.config import ModelConfigSection
from eagleray.core.errors import ConfigError
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.llm import LLM
from eagleray.kernels.paged_attention.api import plan_attention
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.load import load_draft
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.training.acceptance import _steps
from eagleray.training.batches import epoch_batches
from eagleray.training.lesson import Lesson, Teacher
from eagleray.training.loss import soft_cross_entropy
from eagleray.training.run import export_head, load_target
from eagleray.training.start import common_tokens, default_capture_layers
from eagleray.training.texts import Document


def test_the_loss_and_its_gradient_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 40, generator=generator).requires_grad_()
    probabilities = torch.rand(50, 40, generator=generator)
    rows = torch.randint(50, (300,), generator=generator)
    loss = soft_cross_entropy(logits, probabilities, rows)
    loss.backward()
    assert logits.grad is not None
    gradient = logits.grad.clone()
    logits.grad = None
    wanted = (probabilities / probabilities.sum(-1, keepdim=True))[rows]
    oracle = torch.nn.functional.cross_entropy(logits, wanted)
    oracle.backward()
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(gradient, logits.grad)


def test_a_lesson_is_the_same_for_a_document_alone_and_among_others(
    target: Decoder, documents: Sequence[Document]
) -> None:
    teacher = Teacher(target, (0, 2, 3))
    together, alone = teacher.teach(documents[:5]), teacher.teach(documents[3:4])
    length = len(documents[3].token_ids)
    torch.testing.assert_close(together.features_BTC[3, :length], alone.features_BTC[0])
    starts = together.chains(2)
    rows = together.label_rows(2)[starts[0] == 3]
    torch.testing.assert_close(together.probabilities_NV[rows], alone.probabilities_NV[alone.label_rows(2)])


@pytest.mark.parametrize("quantization", ["w8a8", "int8"])
def test_a_quantized_target_teaches_what_it_computes_when_it_is_served(
    new_settings: Any, folder: Path, documents: Sequence[Document], quantization: Any
) -> None:
    settings = new_settings(model=ModelConfigSection(path=str(folder), quantization=quantization))
    prompt = documents[4].token_ids
    lesson = Teacher(load_target(settings), (0, 2, 3)).teach([documents[4]])
    taught = lesson.probabilities_NV[-1].log().tolist()
    served, of_another = (
        next_logprobs(LLM(folder, num_threads=1, num_blocks=16, quantization=name), prompt)
        for name in (quantization, None)
    )
    assert served == pytest.approx({token: taught[token] for token in served}, abs=1e-4)
    assert of_another != pytest.approx({token: taught[token] for token in of_another}, abs=1e-4)


def next_logprobs(llm: LLM, prompt: Sequence[int]) -> dict[int, float]:
    """Of the likeliest tokens."""
    [output] = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, logprobs=20))
    [logprobs] = output.outputs[0].logprobs or []
    return {token: scored.logprob for token, scored in logprobs.items()}


def test_a_format_that_cannot_hold_the_target_is_refused_by_name(new_settings: Any, folder: Path) -> None:
    settings = new_settings(model=ModelConfigSection(path=str(folder), quantization="int4"))
    with pytest.raises(ConfigError, match="--quantization='int4': int4 takes groups of 128"):
        load_target(settings)


def test_chains_guess_tokens_of_the_answer_and_none_beyond_it() -> None:
    lesson = Lesson(
        torch.zeros(2, 6, dtype=torch.int64),
        torch.tensor([6, 4]),
        torch.tensor([2, 1]),
        torch.zeros(2, 6, 1),
        torch.zeros(10, 1),
    )
    assert [part.tolist() for part in lesson.chains(1)] == [[0, 0, 0, 1, 1], [1, 2, 3, 0, 1]]
    assert [part.tolist() for part in lesson.chains(3)] == [[0], [1]]
    assert lesson.label_rows(1).tolist() == [2, 3, 4, 7, 8]


@pytest.mark.parametrize("vocabulary", [None, 120])
def test_an_exported_eagle3_head_computes_the_logits_it_was_trained_with(
    new_settings: Any, new_trainer: Any, documents: Sequence[Document], vocabulary: int | None
) -> None:
    settings = new_settings(plan={"num_epochs": 1}, draft_vocab_size=vocabulary)
    trainer = new_trainer(settings)
    list(trainer.run())
    round_weights(trainer)
    export_head(settings, trainer)
    document = documents[4]
    lesson = trainer.teacher.teach([document])
    with torch.no_grad():
        trained = next(trainer.trainee.guess(lesson))
    head = load_draft(settings.output, trainer.teacher.decoder)
    assert isinstance(head, EagleHead)
    torch.testing.assert_close(first_guesses(head, lesson)[document.num_prompt_tokens - 1 : -1], trained)
    if vocabulary is not None:
        assert torch.equal(head.target_ids(torch.arange(vocabulary)), trainer.teacher.draft_vocabulary_V)


def test_exported_medusa_heads_compute_the_logits_they_were_trained_with(
    new_settings: Any, new_trainer: Any, documents: Sequence[Document]
) -> None:
    settings = new_settings(method="medusa", plan={"num_epochs": 1})
    trainer = new_trainer(settings)
    list(trainer.run())
    round_weights(trainer)
    export_head(settings, trainer)
    lesson = trainer.teacher.teach(documents[4:5])
    heads = load_draft(settings.output, trainer.teacher.decoder)
    assert isinstance(heads, MedusaHeads)
    served = heads.forward(lesson.features_BTC[0])
    for head, trained in enumerate(trainer.trainee.guess(lesson)):
        torch.testing.assert_close(served[lesson.chains(head + 1)[1], head], trained.detach())


def round_weights(trainer: Any) -> None:
    """To what is stored."""
    with torch.no_grad():
        for weight in trainer.trainee.weights.values():
            weight.copy_(weight.bfloat16())


def first_guesses(head: EagleHead, lesson: Lesson) -> Tensor:
    """Logits after each pair of a single document's tokens."""
    length = lesson.token_ids_BT.shape[1]
    block = head.layer_group("float32").block_shape(length)
    plan = plan_attention([0, length - 1], [1], [[0]], length, "cpu", first_key=1)
    features = head.project(lesson.features_BTC[0, :-1])
    positions = torch.arange(1, length)
    hidden = head.forward(lesson.token_ids_BT[0, 1:], features, positions, torch.zeros(1, *block), plan)
    return head.compute_logits(hidden)


def test_every_epoch_has_all_documents_once_in_batches_that_fit(documents: Sequence[Document]) -> None:
    epochs = [epoch_batches(documents, 64, seed=1, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert Counter(chain.from_iterable(batches)) == Counter(documents)
        assert all(len(batch) * max(len(document.token_ids) for document in batch) <= 64 for batch in batches)
    assert epochs[0] != epochs[1]
    assert epochs[0] == epoch_batches(documents, 64, seed=1, epoch=0)
    assert epoch_batches(documents[:3], 5, seed=1, epoch=0)  # none of them fits: one by one


def test_steps_are_counted_as_an_engine_takes_them() -> None:
    # The prompt's step brings token 2; chains then start at 1, and wherever the last verification ended.
    assert accepted([0, 0, 0, 0, 0, 0], first=1, end=6) == [0, 0, 0]
    assert accepted([0, 2, 0, 0, 0, 0], first=1, end=6) == [2]
    assert accepted([0, 3, 0, 0, 0, 0], first=1, end=6) == [2]
    assert accepted([0, 1, 9, 0, 0, 0], first=1, end=6) == [1, 0]
    assert accepted([0, 3], first=1, end=3) == []


def accepted(lengths: list[int], first: int, end: int) -> list[int]:
    return [step.num_accepted_tokens for step in _steps(lengths, first, end, chain_length=3)]


def test_the_draft_vocabulary_is_what_answers_consist_of() -> None:
    documents = [Document((9, 9, 9, 5, 5, 3), 3), Document((9, 7, 3), 1)]
    assert common_tokens(documents, 10, 2).tolist() == [3, 5]
    assert common_tokens(documents, 10, 4).tolist() == [0, 3, 5, 7]


@pytest.mark.parametrize(("num_layers", "layers"), [(32, (2, 16, 29)), (8, (2, 4, 5)), (4, (0, 2, 3)), (3, (0, 1, 2))])
def test_a_head_reads_low_middle_and_high_layers(num_layers: int, layers: tuple[int, ...]) -> None:
    assert default_capture_layers(num_layers) == layers
