"""Requests to a target with drafts that mostly agree with it, and what steps tell of guesses: for tests that serve the
same requests in several ways."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from agreeing_draft import AgreeingDraft, save_agreeable_target, save_agreeing_draft

from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution.executor import LocalExecutor, LocalStep
from eagleray.engine.scheduling.plan import StepPlan, StepResult
from eagleray.engine.speculation.tree import DraftShape, DraftTree
from eagleray.engine.speculation.verify import accepted_nodes
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.registry import load_model_config

BLOCK_SIZE_TOKENS, NUM_NEW_TOKENS, MAX_DEPTH, VOCAB_SIZE = 8, 40, 4, 61
NO_TOKEN = -1
HOLD_DEADLINE_S = 60.0
TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "chain": {"num_speculative_tokens": MAX_DEPTH},
    "tree": {"tree_branching": 2, "tree_nodes": 6, "num_speculative_tokens": MAX_DEPTH},
    "fixed tree": {"tree_paths": [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0, 0]]},
}
MADE_TO_AGREE: Sequence[AgreeingDraft] = ("eagle", "eagle3", "medusa", "draft_model")
SAMPLING: Sequence[Mapping[str, Any]] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 0.0, "frequency_penalty": 0.6},
    {"temperature": 1.0, "seed": 6, "top_p": 0.9, "presence_penalty": 0.3},
    {
        "temperature": 0.9, "seed": 7, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.2,
        "logit_bias": {3: 2.0, 11: -100.0},
    },
)  # fmt: skip


# ---- a target, and drafts for it


@dataclass(frozen=True)
class Checkpoints:
    target: Path
    speculation: Mapping[str, Mapping[str, Any]]  # each method in each shape: "eagle3, chain"


def save_checkpoints(root: Path) -> Checkpoints:
    target = root / "target"
    save_agreeable_target(target, TARGET, seed=1)
    for method in MADE_TO_AGREE:
        save_agreeing_draft(root / method, method, target, seed=2)
    save_random_draft(root / "two_layers", "eagle", load_model_config(target), seed=2, num_hidden_layers=2)
    save_random_draft(root / "random", "eagle3", load_model_config(target), seed=2)
    drafts: dict[str, dict[str, Any]] = {
        **{method: {"method": method, "model": str(root / method)} for method in MADE_TO_AGREE},
        "eagle of two layers": {"method": "eagle", "model": str(root / "two_layers")},
        "random eagle3": {"method": "eagle3", "model": str(root / "random")},
        "early_exit": {"method": "early_exit", "early_exit_layers": 2},
    }
    speculation = {
        f"{name}, {shape}": {"adaptive": False, **draft, **fields}
        for name, draft in drafts.items()
        for shape, fields in SHAPES.items()
    }
    return Checkpoints(target, speculation)


# ---- what is asked, and what steps tell


def specs(num_new_tokens: int = NUM_NEW_TOKENS) -> list[RequestSpec]:
    """Prompts around the sizes of blocks and chunks; pairs of them begin with the same blocks."""
    lengths = (7, 8, 9, 16, 17, 33, 80, 150)
    return [
        RequestSpec(
            request_id=str(index),
            token_ids=tuple((11 * place * (index // 2 + 1) + place // 5) % VOCAB_SIZE for place in range(length)),
            num_prompt_tokens=length,
            sampling=SamplingParams(max_tokens=num_new_tokens, ignore_eos=True, **SAMPLING[index % len(SAMPLING)]),
        )
        for index, length in enumerate(lengths)
    ]


class VerifiedDraft(NamedTuple):
    draft: DraftTree
    num_accepted: int
    attempt: int  # of a router, each with a number of its own: another one after each worker that a request lost


@dataclass(frozen=True)
class Hold:
    """Steps with a request that has ``num_tokens`` or more of its answer do not end until ``released``. What the steps
    before them brought is told."""

    num_tokens: int
    released: threading.Event = field(default_factory=threading.Event)

    def wait(self, plan: StepPlan) -> None:
        if any(run.end - run.spec.num_prompt_tokens >= self.num_tokens for run in plan.runs):
            assert self.released.wait(HOLD_DEADLINE_S), "nobody has released it"


@dataclass
class Records:
    """What executors were seen to guess and to accept. Keys: index of the request, its known tokens."""

    guesses: dict[tuple[str, int], set[DraftTree]] = field(default_factory=dict)
    accepted: dict[tuple[str, int], list[VerifiedDraft]] = field(default_factory=dict)
    decode_steps: list[int] = field(default_factory=list)  # tokens that each brought a request; but see ``note``
    num_first_steps: int = 0  # without guesses, as a hand-over leaves them
    num_unguessed: int = 0  # other steps without guesses that brought a token
    num_moved: int = 0  # guesses two deep or deeper that came true and lay elsewhere than their KV belongs
    num_swapped: int = 0  # blocks that went to host memory
    shapes: set[DraftShape | None] = field(default_factory=set)  # that were asked for while requests only decoded

    def clear(self) -> None:
        self.guesses.clear(), self.accepted.clear(), self.decode_steps.clear(), self.shapes.clear()
        self.num_first_steps = self.num_unguessed = self.num_moved = self.num_swapped = 0

    def follow(self, executor: LocalExecutor, hold: Hold | None = None) -> LocalExecutor:
        submit = executor.submit
        executor.submit = lambda plan: _FollowedStep(self, plan, submit(plan), hold)  # type: ignore[method-assign]
        return executor

    def note(self, plan: StepPlan, result: StepResult) -> None:
        self.num_swapped += len(plan.swap_out)
        if plan.runs and plan.is_decode_only:
            self.shapes.add(plan.shape)
        for run in plan.runs:
            request_id = run.spec.request_id
            index, num_sampled = request_id.partition(".")[0], len(result.sampled.get(request_id, ()))
            if request_id in result.drafts:
                self.guesses.setdefault((index, run.end + num_sampled), set()).add(result.drafts[request_id])
            if run.draft is not None:
                verified = VerifiedDraft(run.draft, num_sampled - 1, int(request_id.rpartition(".")[2]))
                self.accepted.setdefault((index, run.end), []).append(verified)
                self.num_moved += num_moved(run.draft, [token.token_id for token in result.sampled[request_id]])
            num_got_here = run.end - len(run.spec.token_ids)
            num_left = run.spec.num_prompt_tokens + (run.spec.sampling.max_tokens or 0) - run.end
            if num_got_here == 1 and run.draft is None:
                self.num_first_steps += 1
            elif num_got_here > 0 and num_left > MAX_DEPTH:  # the last guesses are cut to what is left
                self.decode_steps.append(num_sampled)
                self.num_unguessed += run.draft is None

    def num_accepted(self, index: str) -> int:
        """Guesses for one request that came true."""
        return sum(step.num_accepted for (of, _), steps in self.accepted.items() if of == index for step in steps)

    @property
    def mean_accepted(self) -> float:
        """Guesses that came true, per step that had any to verify."""
        return fmean(step.num_accepted for steps in self.accepted.values() for step in steps)


def num_moved(draft: DraftTree, sampled: Sequence[int]) -> int:
    chosen = [sampled[depth] if depth < len(sampled) else NO_TOKEN for depth in (0, *draft.depths)]
    nodes = accepted_nodes(draft, chosen)
    return sum(node != place for place, node in enumerate(nodes) if place > 0)


@dataclass(frozen=True)
class _FollowedStep:
    records: Records
    plan: StepPlan
    handle: LocalStep
    hold: Hold | None

    def result(self) -> StepResult:
        if self.hold is not None:
            self.hold.wait(self.plan)
        result = self.handle.result()
        self.records.note(self.plan, result)
        return result


Tokens = dict[str, list[int]]


@dataclass(frozen=True)
class Served:
    tokens: Tokens  # after the prompt, by request
    records: Records
