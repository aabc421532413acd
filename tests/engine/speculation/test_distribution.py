"""Both rules of verification draw from the target's own distribution, whatever is guessed: chi-square tests.

Target and guesser are tables of logits over six tokens, by the last two tokens, so the probability of every answer of
three tokens is known exactly. Answers are drawn as an engine draws them: a first token without guesses, then guesses
with the noise of the positions they are for, verified, until there are three tokens; what a refusal leaves is guessed
again with the same noise. Everything between the tables and the tokens is the code that serves.

Power. With n answers, a shift of the distribution p by d, cell by cell, has noncentrality n * sum(d^2 / p), which is at
least n * (sum |d|)^2, whatever the cells. A shift of one percent, sum |d| = 2 %, has at least 160 with 400,000
answers: for single tokens (5 degrees of freedom, critical value 20.5 at 0.1 %) and for pairs (35 and 66.6) it is found
always. So many are drawn with the growth and the walk that serve, over chains and trees, where only the parameters of
rows are made for many requests at once (slow; 100,000 by default, which find two percent), and with the rule of
rejection. The 30,000 answers drawn through everything between the tables and the tokens, and the 8,000 of a whole
engine, find what is grossly wrong. Seeds are fixed, so a run that passes passes always.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace as replace_field
from torch import Tensor

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig, ModelConfigSection, SpeculationConfig
from eagleray.core.messages import TokenLogprobs
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution import runner
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.execution.sampler import Choice, TokenRule, choices_of, choose_tokens
from eagleray.engine.execution.verified import VerifiedRun
from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.engine.speculation import rejection
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.engine.speculation.growth import GrowDrafts, Level, draw_chains, grow_trees
from eagleray.engine.speculation.noise import ChoiceNoise
from eagleray.engine.speculation.rejection import choose_by_rejection
from eagleray.engine.speculation.tree import DraftShape, DraftTree, fixed_tree
from eagleray.engine.speculation.verify import accepted_nodes
from eagleray.kernels.sampling.api import sample_tokens
from eagleray.kernels.sampling.batch import Penalties, RandomRows, SamplingBatch
from eagleray.kernels.sampling.noise import NO_TOKEN, gumbel_noise, row_keys, token_uniform
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.router import coordinator
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

VOCAB_SIZE, NUM_NEW_TOKENS, NUM_ANSWERS, BATCH_SIZE = 6, 3, 30_000, 2_000
PROMPT = (2, 4)
SIGNIFICANCE = 1e-3
CHAIN, TREE = DraftShape(2), DraftShape(2, branching=2, num_nodes=4)


def make_table(seed: int) -> Tensor:
    """Logits [before the last token, last token, next token]."""
    return torch.randn(VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


TARGET = make_table(1)
GUESSER = TARGET + 1.2 * make_table(2)  # agrees often, not always


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- drawing answers


@dataclass
class TableGuesser:
    """Implements ``Guesser`` for B requests."""

    last_two_B2: Tensor
    _last_two_BF2: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._last_two_BF2 = self.last_two_B2[:, None]

    def root_logits(self) -> Tensor:
        return GUESSER[self.last_two_B2[:, 0], self.last_two_B2[:, 1]]

    def expand(self, level: Level) -> Tensor:
        before = self._last_two_BF2[..., 1].gather(1, level.parents_BF)
        self._last_two_BF2 = torch.stack((before, level.token_ids_BF), dim=-1)
        return GUESSER[before, level.token_ids_BF]

    def target_ids(self, token_ids: Tensor) -> Tensor:
        return token_ids


@dataclass(frozen=True)
class Method:
    """How guesses are made and verified."""

    rule: TokenRule
    grow: GrowDrafts = grow_trees
    shape: DraftShape = CHAIN
    sampling: dict[str, Any] = field(default_factory=dict)

    def guess(self, runs: Sequence[VerifiedRun]) -> list[DraftTree]:
        last_two = torch.tensor([run.token_ids(run.num_known - 2, run.num_known) for run in runs])
        return self.grow(TableGuesser(last_two), self.shape, ChoiceNoise.of(runs, "cpu"))

    def verify(self, runs: Sequence[ScheduledRun]) -> list[VerifiedRun]:
        choices = [choices_of(run) for run in runs]
        flat = list(itertools.chain.from_iterable(choices))
        rows = torch.tensor([choice.history[-2:] for choice in flat])
        chosen = iter(self.rule(TARGET[rows[:, 0], rows[:, 1]], flat).tolist())
        return [runner._walk(run, 0, [next(chosen) for _ in own]) for run, own in zip(runs, choices, strict=True)]


def draw_answers(method: Method, count: int) -> Counter[tuple[int, ...]]:
    """How often each answer of three tokens came; each request has a seed of its own."""
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    requests = (new_run(PROMPT, SamplingParams(seed=seed, **method.sampling)) for seed in seeds)
    answers: Counter[tuple[int, ...]] = Counter()
    while runs := list(itertools.islice(requests, BATCH_SIZE)):
        while runs:
            verified = method.verify(runs)
            answers.update(answer_of(run) for run in verified if has_ended(run))
            verified = [run for run in verified if not has_ended(run)]
            drafts = method.guess(verified) if verified else []
            runs = [
                new_run(run.token_ids(0, run.num_known), run.run.spec.sampling, draft)
                for run, draft in zip(verified, drafts, strict=True)
            ]
    return answers


def new_run(known: Sequence[int], sampling: SamplingParams, draft: DraftTree | None = None) -> ScheduledRun:
    spec = RequestSpec(request_id="", token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=sampling)
    return ScheduledRun(spec, known, len(known) - 1, 1, (), samples=True, draft=draft)


def has_ended(run: VerifiedRun) -> bool:
    return run.num_known >= len(PROMPT) + NUM_NEW_TOKENS


def answer_of(run: VerifiedRun) -> tuple[int, ...]:
    return tuple(run.token_ids(len(PROMPT), len(PROMPT) + NUM_NEW_TOKENS))


# ---- what they should be


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


def answer_probabilities(sampling: SamplingParams) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_NEW_TOKENS):
        found = {
            (*answer, token): probability * p
            for answer, probability in found.items()
            for token, p in enumerate(next_probabilities((*PROMPT, *answer), sampling))
            if p > 0.0
        }
    return found


def p_values(answers: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> dict[str, float]:
    """Of each token, and of tokens together, by Pearson's test."""
    parts: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
        "first": lambda answer: answer[:1],
        "second": lambda answer: answer[1:2],
        "third": lambda answer: answer[2:],
        "first and second": lambda answer: answer[:2],
        "second and third": lambda answer: answer[1:],
        "all": lambda answer: answer,
    }
    return {name: _p_value(_summed(answers, part), _summed(expected, part)) for name, part in parts.items()}


def _summed(
    counts: dict[tuple[int, ...], Any], part: Callable[[tuple[int, ...]], tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    sums: dict[tuple[int, ...], float] = {}
    for answer, count in counts.items():
        sums[part(answer)] = sums.get(part(answer), 0.0) + count
    return sums


def _p_value(counts: dict[tuple[int, ...], float], expected: dict[tuple[int, ...], float]) -> float:
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


# ---- the rules


def certain_chains(guesser: TableGuesser, shape: DraftShape, noise: Any) -> list[DraftTree]:
    """The guesser's best, whatever the noise: text look-up is such a guesser."""
    return grow_trees(guesser, shape)


TARGET_TOKEN = partial(choose_tokens, sample_tokens)
REJECTION = partial(choose_by_rejection, sample_tokens)
PENALISED = {
    "temperature": 0.8, "presence_penalty": 0.6, "frequency_penalty": 0.3, "logit_bias": {1: 0.9, 5: -0.4},
    "repetition_penalty": 1.2, "top_p": 0.9, "min_p": 0.05,
}  # fmt: skip
TRUNCATED = {"temperature": 1.3, "top_k": 4, "top_p": 0.95}
METHODS = {
    "target token, chain": Method(TARGET_TOKEN),
    "target token, tree": Method(TARGET_TOKEN, shape=TREE),
    "target token, tree, penalties": Method(TARGET_TOKEN, shape=TREE, sampling=PENALISED),
    "target token, truncated": Method(TARGET_TOKEN, sampling=TRUNCATED),
    "rejection, drawn guesses": Method(REJECTION, draw_chains),
    "rejection, certain guesses": Method(REJECTION, certain_chains),
    "rejection, penalties": Method(REJECTION, draw_chains, sampling=PENALISED),
    "rejection, truncated": Method(REJECTION, draw_chains, sampling=TRUNCATED),
}


MAIN = (
    "target token, tree",
    "target token, truncated",
    "rejection, drawn guesses",
    "rejection, penalties",
)


@pytest.mark.parametrize(
    "name", [name if name in MAIN else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_answers_have_the_targets_own_distribution(name: str) -> None:
    method = METHODS[name]
    answers = draw_answers(method, NUM_ANSWERS)
    found = p_values(answers, answer_probabilities(SamplingParams(**method.sampling)))
    assert min(found.values()) > SIGNIFICANCE, found


# ---- very often, grown and walked by what serves: a shift of one percent is found


NUM_OFTEN, FEWER = 400_000, 100_000
REPEATED = {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
PATHS = fixed_tree([(0,), (1,), (0, 0), (0, 1), (1, 0)])


def draw_often(shape: DraftShape, sampling: SamplingParams, count: int) -> Counter[tuple[int, ...]]:
    """As ``draw_answers`` by the target's own token; rows have their parameters as tensors, for many requests."""
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(6))
    answers: Counter[tuple[int, ...]] = Counter()
    end = len(PROMPT) + NUM_NEW_TOKENS
    for seed_B in seeds.split(50_000):
        known, drafts = [PROMPT] * len(seed_B), None
        while known:
            chosen = choose_often(known, drafts, seed_B, sampling)
            known = list(map(walked, known, drafts or [None] * len(known), chosen))
            answers.update(tokens[len(PROMPT) : end] for tokens in known if len(tokens) >= end)
            going_on = [index for index, tokens in enumerate(known) if len(tokens) < end]
            known, seed_B = [known[index] for index in going_on], seed_B[going_on]
            drafts = guess_often(known, shape, seed_B, sampling) if known else None
    return answers


SPEC = RequestSpec(request_id="", token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=SamplingParams())


def walked(known: tuple[int, ...], draft: DraftTree | None, chosen: list[int]) -> tuple[int, ...]:
    run = ScheduledRun(SPEC, known, len(known) - 1, 1, (), samples=True, draft=draft)
    return known + runner._walk(run, 0, chosen).sampled


def guess_often(
    known: Sequence[tuple[int, ...]], shape: DraftShape, seed_B: Tensor, sampling: SamplingParams
) -> list[DraftTree]:
    position_B, zero_B = torch.tensor([len(tokens) for tokens in known]), torch.zeros_like(seed_B)
    temperature_B = torch.full_like(seed_B, sampling.temperature, dtype=torch.float32)
    noise = ChoiceNoise(temperature_B, temperature_B > 0, seed_B, zero_B, position_B)
    return grow_trees(TableGuesser(torch.tensor([tokens[-2:] for tokens in known])), shape, noise)


def choose_often(
    known: Sequence[tuple[int, ...]], drafts: list[DraftTree] | None, seed_B: Tensor, sampling: SamplingParams
) -> list[list[int]]:
    """The target's own tokens after the last known one, then after each guess."""
    histories_RH, lengths_R = histories(known, drafts)
    num_rows, at_once = len(lengths_R), torch.arange(len(lengths_R))
    last_two = histories_RH.gather(1, torch.stack((lengths_R - 2, lengths_R - 1), dim=1))
    history_rows, places = (torch.arange(histories_RH.shape[1]) < lengths_R[:, None]).nonzero(as_tuple=True)
    penalties = Penalties(
        at_once,
        torch.full((num_rows,), sampling.repetition_penalty),
        torch.full((num_rows,), sampling.presence_penalty),
        torch.full((num_rows,), sampling.frequency_penalty),
        history_rows,
        histories_RH[history_rows, places],
        places >= len(PROMPT),
    )
    seed_R = seed_B.repeat_interleave(num_rows // len(seed_B))
    temperature = torch.full((num_rows,), sampling.temperature)
    rows = RandomRows(at_once, temperature, seed_R, torch.zeros_like(seed_R), lengths_R)
    logits = TARGET[last_two[:, 0], last_two[:, 1]]
    return sample_tokens(logits, SamplingBatch(None, penalties, rows)).view(len(seed_B), -1).tolist()


def histories(known: Sequence[tuple[int, ...]], drafts: list[DraftTree] | None) -> tuple[Tensor, Tensor]:
    """(Tokens [R, H] before each row's choice, padded with zeros, their number [R]); a request's rows follow each
    other."""
    room = len(PROMPT) + NUM_NEW_TOKENS + TREE.depth
    lengths_BN = torch.tensor([len(tokens) for tokens in known])[:, None]
    tokens_BNH = torch.tensor([tokens + (0,) * (room - len(tokens)) for tokens in known])[:, None]
    if drafts is not None:
        guesses_BN = torch.tensor([draft.token_ids for draft in drafts])
        rows_B = torch.arange(len(known))
        for node, parents_B in enumerate(torch.tensor([draft.parents for draft in drafts]).T):
            own_BH, length_B = tokens_BNH[rows_B, parents_B + 1].clone(), lengths_BN[rows_B, parents_B + 1]
            own_BH[rows_B, length_B] = guesses_BN[:, node]
            tokens_BNH = torch.cat((tokens_BNH, own_BH[:, None]), dim=1)
            lengths_BN = torch.cat((lengths_BN, length_B[:, None] + 1), dim=1)
    return tokens_BNH.flatten(0, 1), lengths_BN.flatten()


OFTEN = {
    "chain": (CHAIN, {}),
    "tree": (TREE, {}),
    "tree, penalties": (TREE, REPEATED),
    "fixed tree": (PATHS, {}),
    "chain, penalties": (CHAIN, REPEATED),
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, FEWER) for name in ("chain", "tree, penalties")),
        *(pytest.param(name, NUM_OFTEN, marks=pytest.mark.slow) for name in OFTEN),
    ],
)
def test_many_walked_answers_have_the_targets_own_distribution(name: str, count: int) -> None:
    shape, fields = OFTEN[name]
    sampling = SamplingParams(**fields)
    found = p_values(draw_often(shape, sampling, count), answer_probabilities(sampling))
    assert min(found.values()) > SIGNIFICANCE, found


@pytest.mark.parametrize(
    ("shape", "count", "shift"),
    [
        (TREE, FEWER, 0.02),
        *(pytest.param(shape, NUM_OFTEN, 0.01, marks=pytest.mark.slow) for shape in (CHAIN, TREE)),
    ],
    ids=["tree, fewer", "chain", "tree"],
)
def test_a_walk_that_follows_a_few_wrong_guesses_is_found_out(
    monkeypatch: pytest.MonkeyPatch, shape: DraftShape, count: int, shift: float
) -> None:
    """So few that pairs of tokens shift by just that: the second token then comes from p + share * (q - p)."""
    p, q = (table[PROMPT[1]].softmax(-1) for table in (TARGET, GUESSER))  # [first, second]
    first = TARGET[PROMPT].softmax(-1)
    share = shift / float((first * (p - q).clamp(min=0.0).sum(-1)).sum())
    chance = random.Random(7)

    def wrong_now_and_then(tree: DraftTree, chosen: Sequence[int]) -> list[int]:
        return [0] if chance.random() < share else accepted_nodes(tree, chosen)  # the first is the best guess

    monkeypatch.setattr(runner, "accepted_nodes", wrong_now_and_then)
    found = p_values(draw_often(shape, SamplingParams(), count), answer_probabilities(SamplingParams()))
    assert found["first and second"] < SIGNIFICANCE, found


# ---- very often, by rejection, without objects: any shift of one percent is found


NUM_AT_ONCE = 400_000
ChooseAtOnce = Callable[[Tensor, RandomRows, Tensor, Tensor], Tensor]  # (target's logits, rows, drafts, guesses)


def draw_at_once(choose: ChooseAtOnce) -> Counter[tuple[int, ...]]:
    """As ``draw_answers`` with chains: whether a guess is the first of a step or follows one that came true, it is made
    after the same tokens and with the same noise."""
    seed = torch.randint(2**62, (NUM_AT_ONCE,), generator=torch.Generator().manual_seed(4))
    zero, temperature = torch.zeros_like(seed), torch.ones(NUM_AT_ONCE)
    known = [torch.full_like(seed, token) for token in PROMPT]
    for _ in range(NUM_NEW_TOKENS):
        position = torch.full_like(seed, len(known))
        target, draft = TARGET[known[-2], known[-1]], GUESSER[known[-2], known[-1]]
        noise = ChoiceNoise(temperature, temperature > 0, seed, zero, position)
        guesses = noise.perturb(draft[:, None], torch.arange(VOCAB_SIZE), depth=1)[:, 0].argmax(dim=-1)
        rows = RandomRows(torch.arange(NUM_AT_ONCE), temperature, seed, zero, position)
        known.append(choose(target, rows, draft, guesses))
    first, second, third = known[len(PROMPT) :]
    counts = ((first * VOCAB_SIZE + second) * VOCAB_SIZE + third).bincount(minlength=VOCAB_SIZE**3).tolist()
    return Counter(dict(zip(itertools.product(range(VOCAB_SIZE), repeat=NUM_NEW_TOKENS), counts, strict=True)))


def kept_or_drawn_anew(target: Tensor, rows: RandomRows, draft: Tensor, guesses: Tensor) -> Tensor:
    p, q = (logits.double().softmax(-1) for logits in (target, draft))
    return rejection.keep_or_draw_anew(p, q, guesses, *rejection._chance(rows, VOCAB_SIZE))


def test_many_answers_by_rejection_have_the_targets_own_distribution() -> None:
    found = p_values(draw_at_once(kept_or_drawn_anew), answer_probabilities(SamplingParams()))
    assert min(found.values()) > SIGNIFICANCE, found


def test_a_rejection_that_shifts_one_percent_by_keeping_a_few_wrong_guesses_is_found_out() -> None:
    """Of the first token alone, as if it were the only one: there the shift is one percent exactly. A share of the
    guesses counts whatever the rule says, so that tokens come from p + share * (q - p)."""
    p, q = (table[PROMPT].softmax(-1) for table in (TARGET, GUESSER))
    share = 0.01 / float((p - q).clamp(min=0.0).sum())
    chance = torch.Generator().manual_seed(5)

    def lenient(target: Tensor, rows: RandomRows, draft: Tensor, guesses: Tensor) -> Tensor:
        is_kept = torch.rand(NUM_AT_ONCE, generator=chance) < share
        return torch.where(is_kept, guesses, kept_or_drawn_anew(target, rows, draft, guesses))

    found = p_values(draw_at_once(lenient), answer_probabilities(SamplingParams()))
    assert found["first"] < SIGNIFICANCE and found["all"] < SIGNIFICANCE, found


def test_one_percent_moved_from_any_token_to_any_other_is_found_out() -> None:
    answers, expected = draw_at_once(kept_or_drawn_anew), answer_probabilities(SamplingParams())
    for place in range(NUM_NEW_TOKENS):
        cells = _summed(expected, lambda answer, place=place: (answer[place],))
        counts = _summed(answers, lambda answer, place=place: (answer[place],))
        moved = 0.01 * NUM_AT_ONCE
        for taken_from, given_to in itertools.permutations(cells, 2):
            shifted = counts | {taken_from: counts[taken_from] - moved, given_to: counts[given_to] + moved}
            assert counts[taken_from] > moved and _p_value(shifted, cells) < SIGNIFICANCE


# ---- rules that are wrong in one point each: the same statistics refuse them


def assert_found_out(method: Method) -> None:
    found = p_values(draw_answers(method, NUM_ANSWERS // 3), answer_probabilities(SamplingParams()))
    assert min(found.values()) < SIGNIFICANCE, found


def assert_rejection_is_found_out() -> None:
    found = p_values(draw_at_once(kept_or_drawn_anew), answer_probabilities(SamplingParams()))
    assert min(found.values()) < SIGNIFICANCE, found


def always_kept(target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
    return guessed


def drawn_anew_from_the_target(
    target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor
) -> Tensor:
    p, q = (table.gather(1, guessed[:, None])[:, 0] for table in (target, draft))
    return torch.where(uniform * q < p, guessed, (target.log() + noise).argmax(dim=-1))


def drawn_anew_from_all_but_the_guess(
    target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor
) -> Tensor:
    others = target * (1.0 - one_hot(guessed))
    return drawn_anew_from_the_target(target, draft, guessed, uniform, noise + others.log() - target.log())


def one_hot(token_ids: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(token_ids, VOCAB_SIZE).to(torch.float64)


@pytest.mark.parametrize(
    "wrong",
    [always_kept, drawn_anew_from_the_target, drawn_anew_from_all_but_the_guess],
)
def test_a_rejection_that_keeps_or_draws_wrongly_is_found_out(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(rejection, "keep_or_draw_anew", wrong)
    assert_rejection_is_found_out()


def guesses_noise_draws_anew(random: RandomRows, num_tokens: int) -> tuple[Tensor, Tensor]:
    keys = row_keys(random.seed, random.choice, ~random.position)
    return token_uniform(keys, NO_TOKEN), gumbel_noise(random.seed, random.choice, random.position, num_tokens)


def guesses_noise_keeps(random: RandomRows, num_tokens: int) -> tuple[Tensor, Tensor]:
    keys = row_keys(random.seed, random.choice, random.position)
    below_zero = gumbel_noise(random.seed, random.choice, ~random.position, num_tokens)
    return token_uniform(keys[:, None], torch.arange(num_tokens)).amax(dim=-1), below_zero


@pytest.mark.parametrize("wrong", [guesses_noise_draws_anew, guesses_noise_keeps])
def test_a_rejection_that_uses_the_noise_of_the_guess_again_is_found_out(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    monkeypatch.setattr(rejection, "_chance", wrong)
    assert_rejection_is_found_out()


def one_noise_for_all_positions(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    return choose_tokens(sample_tokens, logits, [replace(choice, guessed=()) for choice in choices])


def whatever_is_guessed(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    own = choose_tokens(sample_tokens, logits, choices)
    guessed = [choice.guess.token_id if choice.guess else token for choice, token in zip(choices, own, strict=True)]
    return torch.tensor(guessed)


@pytest.mark.parametrize("wrong", [one_noise_for_all_positions, whatever_is_guessed])
def test_a_wrong_rule_of_the_targets_own_token_is_found_out(wrong: TokenRule) -> None:
    assert_found_out(Method(wrong))


def test_a_walk_down_the_likeliest_branch_whatever_the_target_chose_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "accepted_nodes", lambda tree, chosen: tree.path(len(tree) - 1)[:1])
    assert_found_out(Method(TARGET_TOKEN, shape=TREE))


# ---- a whole engine


TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
NUM_OF_ENGINE = 8_000


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_random_checkpoint(folder, TINY, seed=1)
    return folder


Seeded = Callable[[RequestSpec], RequestSpec]  # what an engine gets, of what was asked


def own_seed(spec: RequestSpec) -> RequestSpec:
    return replace_field(spec, sampling=replace_field(spec.sampling, seed=int(spec.request_id)))


def serve(
    model: Path,
    speculation: SpeculationConfig | None,
    prompts: Sequence[tuple[int, ...]],
    sampling: dict[str, Any],
    seeded: Seeded = own_seed,
) -> tuple[list[list[int]], list[TokenLogprobs], Acceptance]:
    """(Answers, log-probabilities of their first tokens, what came of the guesses.)"""
    config = EngineConfig(block_size_tokens=8, num_blocks=1024, max_num_seqs=256, enable_prefix_caching=False)
    executor = build_executor(ModelConfigSection(path=str(model)), config, num_threads=1, speculation=speculation)
    policy, tokenizer = build_draft_policy(speculation, executor.has_draft_network), byte_tokenizer()
    engine = Engine(executor, config, ManualClock(), lambda spec: OutputText(tokenizer, spec.sampling, ()), policy)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(ignore_eos=True, **sampling)
        spec = RequestSpec(request_id=str(index), token_ids=prompt, num_prompt_tokens=len(prompt), sampling=params)
        engine.add(seeded(spec))
    answers: list[list[int]] = [[] for _ in prompts]
    first: dict[int, TokenLogprobs] = {}
    steps: list[Acceptance | None] = []
    while engine.has_work:
        outcome = engine.step()
        steps.append(outcome.acceptance)
        for output in outcome.outputs:
            answers[int(output.request_id)].extend(output.token_ids)
            if output.position == 0 and output.logprobs:
                first[int(output.request_id)] = output.logprobs[0]
    executor.close()
    return answers, [first[index] for index in sorted(first)], total_acceptance(steps) or Acceptance()


def engines_probabilities(model: Path) -> dict[tuple[int, ...], float]:
    """Of each answer, by what the target itself says after each of its beginnings."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_NEW_TOKENS):
        prompts = [(*PROMPT, *beginning) for beginning in found]
        _, scores, _ = serve(model, None, prompts, {"max_tokens": 1, "temperature": 0.0, "logprobs": VOCAB_SIZE})
        found = {
            (*beginning, token): probability * math.exp(logprob)
            for (beginning, probability), of_next in zip(found.items(), scores, strict=True)
            for token, logprob in zip(of_next.top_ids, of_next.top_logprobs, strict=True)
        }
    return found


EARLY_EXIT = {"method": "early_exit", "early_exit_layers": 1, "num_speculative_tokens": 2, "adaptive": False}


def p_values_of_engine(
    model: Path, speculation: dict[str, Any], seeded: Seeded = own_seed, count: int = NUM_OF_ENGINE
) -> dict[str, float]:
    config = SpeculationConfig(**EARLY_EXIT, **speculation)
    drawn, _, acceptance = serve(model, config, [PROMPT] * count, {"max_tokens": NUM_NEW_TOKENS + 2}, seeded)
    assert 0.2 < acceptance.rate_per_position[0] < 0.9  # guesses are taken, and refused
    answers = Counter(tuple(answer[:NUM_NEW_TOKENS]) for answer in drawn)  # for the last tokens less is guessed
    return p_values(answers, engines_probabilities(model))


@pytest.mark.parametrize("verification", ["target_token", "rejection"])
def test_answers_of_an_engine_have_the_targets_own_distribution(tiny_model: Path, verification: Any) -> None:
    found = p_values_of_engine(tiny_model, {"verification": verification})
    assert min(found.values()) > SIGNIFICANCE, found


def test_answers_to_requests_without_seeds_have_the_targets_own_distribution(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trees, and the seeds that the router draws for them."""
    monkeypatch.setattr(coordinator.secrets, "randbits", random.Random(8).getrandbits)
    found = p_values_of_engine(tiny_model, {"tree_branching": 2, "tree_nodes": 4}, coordinator.with_seed)
    assert min(found.values()) > SIGNIFICANCE, found


def test_an_engine_that_walks_wrongly_is_found_out(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        runner, "accepted_nodes", lambda tree, chosen: accepted_nodes(tree, chosen) or [0][: hash(tuple(chosen)) % 2]
    )
    found = p_values_of_engine(tiny_model, {}, count=NUM_OF_ENGINE // 4)
    assert min(found.values()) < SIGNIFICANCE, found


def test_an_engine_whose_requests_have_few_seeds_is_found_out(tiny_model: Path) -> None:
    def one_of_few(spec: RequestSpec) -> RequestSpec:
        return replace_field(spec, sampling=replace_field(spec.sampling, seed=int(spec.request_id) % 50))

    found = p_values_of_engine(tiny_model, {}, one_of_few, count=NUM_OF_ENGINE // 4)
    assert min(found.values()) < SIGNIFICANCE, found
