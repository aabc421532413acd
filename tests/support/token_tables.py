"""A target and a guesser that are tables, so that the probability of every answer is known, and Pearson's test.

Both are logits over six tokens, by the last two tokens. Answers have three tokens.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.speculation.growth import Level
from eagleray.engine.speculation.tree import DraftShape

VOCAB_SIZE: Final = 6
NUM_NEW_TOKENS: Final = 3
PROMPT: Final = (2, 4)
SIGNIFICANCE: Final = 1e-3
CHAIN: Final = DraftShape(2)
TREE: Final = DraftShape(2, branching=2, num_nodes=4)
EVERY_TOKEN: Final = torch.arange(VOCAB_SIZE)
SOME_TOKENS: Final = torch.tensor([3, 1, 0, 2])  # of a guesser whose vocabulary is a part of the target's
BIASED_AND_CUT_OFF: Final[Mapping[str, Any]] = {
    "temperature": 1.2, "logit_bias": {1: 0.9, 5: -0.4}, "top_k": 5, "top_p": 0.93, "min_p": 0.08,
}  # fmt: skip

Answer = tuple[int, ...]


def make_table(seed: int) -> Tensor:
    """Logits [before the last token, last token, next token]."""
    return torch.randn(VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


TARGET: Final = make_table(1)
GUESSER: Final = TARGET + 1.2 * make_table(2)  # agrees often, not always


@dataclass
class TableGuesser:
    """Implements ``Guesser`` for B requests, over V of the target's tokens."""

    last_two_B2: Tensor
    target_ids_V: Tensor = EVERY_TOKEN
    _last_two_BF2: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._last_two_BF2 = self.last_two_B2[:, None]

    def root_logits(self) -> Tensor:
        return GUESSER[self.last_two_B2[:, 0], self.last_two_B2[:, 1]][:, self.target_ids_V]

    def expand(self, level: Level) -> Tensor:
        before = self._last_two_BF2[..., 1].gather(1, level.parents_BF)
        self._last_two_BF2 = torch.stack((before, level.token_ids_BF), dim=-1)
        return GUESSER[before, level.token_ids_BF][..., self.target_ids_V]

    def target_ids(self, token_ids: Tensor) -> Tensor:
        return self.target_ids_V[token_ids]


def next_probabilities(known: Sequence[int], sampling: SamplingParams) -> list[float]:
    """As the API's documents say: bias, penalties, temperature, the best k, of these the fewest with a share p, and of
    these those that are likely enough."""
    logits = TARGET[known[-2], known[-1]].tolist()
    output = known[len(PROMPT) :]
    for token in range(VOCAB_SIZE):
        logits[token] += (sampling.logit_bias or {}).get(token, 0.0)
        if token in known:
            logits[token] *= sampling.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        logits[token] -= sampling.presence_penalty * (token in output) + sampling.frequency_penalty * output.count(
            token
        )
    weights = [math.exp(logit / sampling.temperature) for logit in logits]
    ranked = sorted(range(VOCAB_SIZE), key=lambda token: -weights[token])[: sampling.top_k or VOCAB_SIZE]
    ranked_sum, kept, kept_sum = sum(weights[token] for token in ranked), [], 0.0
    for token in ranked:
        if kept_sum < sampling.top_p * ranked_sum and weights[token] >= sampling.min_p * weights[ranked[0]]:
            kept.append(token)
            kept_sum += weights[token]
    return [weights[token] / kept_sum if token in kept else 0.0 for token in range(VOCAB_SIZE)]


def answer_probabilities(sampling: SamplingParams, num_tokens: int = NUM_NEW_TOKENS) -> dict[Answer, float]:
    found: dict[Answer, float] = {(): 1.0}
    for _ in range(num_tokens):
        found = {
            (*answer, token): probability * p
            for answer, probability in found.items()
            for token, p in enumerate(next_probabilities((*PROMPT, *answer), sampling))
            if p > 0.0
        }
    return found


def p_values(answers: Counter[Answer], expected: Mapping[Answer, float]) -> dict[str, float]:
    """Of each token, and of tokens together, by Pearson's test."""
    parts: dict[str, Callable[[Answer], Answer]] = {
        "first": lambda answer: answer[:1],
        "second": lambda answer: answer[1:2],
        "third": lambda answer: answer[2:],
        "first and second": lambda answer: answer[:2],
        "second and third": lambda answer: answer[1:],
        "all": lambda answer: answer,
    }
    return {name: p_value(summed(answers, part), summed(expected, part)) for name, part in parts.items()}


def summed(counts: Mapping[Answer, Any], part: Callable[[Answer], Answer]) -> dict[Answer, float]:
    sums: dict[Answer, float] = {}
    for answer, count in counts.items():
        sums[part(answer)] = sums.get(part(answer), 0.0) + count
    return sums


def p_value(counts: Mapping[Answer, float], expected: Mapping[Answer, float]) -> float:
    """Cells of which fewer than five are expected count as one. What cannot be has probability zero."""
    if counts.keys() - expected.keys():
        return 0.0
    total = sum(counts.values())
    wanted = {cell: p * total for cell, p in expected.items()}
    rare = [cell for cell, count in wanted.items() if count < 5]
    cells = [(counts.get(cell, 0.0), count) for cell, count in wanted.items() if count >= 5]
    if rare:
        cells.append((sum(counts.get(cell, 0.0) for cell in rare), sum(wanted[cell] for cell in rare)))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    # The chi-square distribution's upper tail is the regularised incomplete gamma function.
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))


def p_values_if_moved(shift: float, counts: Mapping[Answer, float], expected: Mapping[Answer, float]) -> list[float]:
    """Of each cell and each other one: had this share of all draws come out as the other."""
    moved, found = shift * sum(counts.values()), []
    for taken_from, given_to in itertools.permutations(expected, 2):
        assert counts[taken_from] > moved
        shifted = {taken_from: counts[taken_from] - moved, given_to: counts[given_to] + moved}
        found.append(p_value({**counts, **shifted}, expected))
    return found
