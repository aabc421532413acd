"""A draft goes on wherever its request goes: the same guesses, of which as many come true, however it was served.

What a draft head needs lies in the request's blocks. So the guesses after n tokens, and how many of them come true, are
a function of those n tokens alone. The oracle computes them from nothing: an engine that has never seen the request is
given its first n tokens as they are, for every n. Then the request is served in all the ways that there are; each guess
that any of its workers makes must be the oracle's, and each step must accept as many as the oracle's come true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import pytest
from agreeing_draft import save_agreeable_target, save_agreeing_draft

from eagleray.cluster.local import LocalCluster
from eagleray.core.clock import SystemClock
from eagleray.core.config import Config, ModelConfigSection, PoolConfig, parse_config
from eagleray.core.errors import TransferError
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role
from eagleray.engine.engine import Engine
from eagleray.engine.execution.executor import LocalExecutor, LocalStep, build_executor
from eagleray.engine.scheduling.plan import StepPlan, StepResult
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.engine.speculation.controller import DraftPolicy
from eagleray.engine.speculation.tree import DraftShape, DraftTree
from eagleray.engine.speculation.verify import accepted_nodes
from eagleray.kv_transfer.transport import BlockStore
from eagleray.kv_transfer.transports.loopback import LoopbackTransport
from eagleray.kv_transfer.transports.select import make_transports
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.registry import load_model_config
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText
from eagleray.workers.build import WorkerExecutor

TOKENIZER = byte_tokenizer()
BLOCK_SIZE_TOKENS, NUM_NEW_TOKENS, MAX_DEPTH, VOCAB_SIZE = 8, 40, 4, 61
NO_TOKEN = -1
TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
TREE = {"tree_branching": 2, "tree_nodes": 6, "num_speculative_tokens": MAX_DEPTH}
FIXED_TREE = {"tree_paths": [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0, 0]]}
SAMPLING: Sequence[Mapping[str, Any]] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 0.0, "frequency_penalty": 0.6},
    {"temperature": 1.0, "seed": 6, "top_p": 0.9, "presence_penalty": 0.3},
)


# ---- a target, and drafts for it


@dataclass(frozen=True)
class Checkpoints:
    target: Path
    speculation: Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("models")
    target = root / "target"
    save_agreeable_target(target, TARGET, seed=1)
    for method in ("eagle", "eagle3", "medusa", "draft_model"):
        save_agreeing_draft(root / method, method, target, seed=2)
    save_random_draft(root / "two_layers", "eagle", load_model_config(target), seed=2, num_hidden_layers=2)
    chain, early_exit = {"num_speculative_tokens": MAX_DEPTH}, {"method": "early_exit", "early_exit_layers": 2}
    methods: dict[str, dict[str, Any]] = {
        "eagle": {"method": "eagle", "model": str(root / "eagle"), **TREE},
        "eagle3": {"method": "eagle3", "model": str(root / "eagle3"), **TREE},
        "eagle, fixed tree": {"method": "eagle", "model": str(root / "eagle"), **FIXED_TREE},
        "eagle of two layers": {"method": "eagle", "model": str(root / "two_layers"), **TREE},
        "medusa": {"method": "medusa", "model": str(root / "medusa"), **TREE},
        "draft_model": {"method": "draft_model", "model": str(root / "draft_model"), **chain},
        "draft_model, trees": {"method": "draft_model", "model": str(root / "draft_model"), **TREE},
        "early_exit": {**early_exit, **chain},
        "early_exit, trees": {**early_exit, **TREE},
    }
    return Checkpoints(target, {name: {"adaptive": False, **method} for name, method in methods.items()})


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


@dataclass
class Records:
    """What executors were seen to guess and to accept. Keys: index of the request, its known tokens."""

    guesses: dict[tuple[str, int], set[DraftTree]] = field(default_factory=dict)
    accepted: dict[tuple[str, int], list[tuple[DraftTree, int]]] = field(default_factory=dict)
    decode_steps: list[int] = field(default_factory=list)  # tokens that each brought a request; but see ``note``
    num_first_steps: int = 0  # without guesses, as a hand-over leaves them
    num_moved: int = 0  # guesses two deep or deeper that came true and lay elsewhere than their KV belongs

    def clear(self) -> None:
        self.guesses.clear(), self.accepted.clear(), self.decode_steps.clear()
        self.num_first_steps = self.num_moved = 0

    def follow(self, executor: LocalExecutor) -> LocalExecutor:
        submit = executor.submit
        executor.submit = lambda plan: _FollowedStep(self, plan, submit(plan))  # type: ignore[method-assign]
        return executor

    def note(self, plan: StepPlan, result: StepResult) -> None:
        for run in plan.runs:
            request_id = run.spec.request_id
            index, num_sampled = request_id.partition(".")[0], len(result.sampled.get(request_id, ()))
            if request_id in result.drafts:
                self.guesses.setdefault((index, run.end + num_sampled), set()).add(result.drafts[request_id])
            if run.draft is not None:
                self.accepted.setdefault((index, run.end), []).append((run.draft, num_sampled - 1))
                self.num_moved += num_moved(run.draft, [token.token_id for token in result.sampled[request_id]])
            num_got_here = run.end - len(run.spec.token_ids)
            num_left = run.spec.num_prompt_tokens + (run.spec.sampling.max_tokens or 0) - run.end
            if num_got_here == 1 and run.draft is None:
                self.num_first_steps += 1
            elif num_got_here > 0 and num_left > MAX_DEPTH:  # the last guesses are cut to what is left
                self.decode_steps.append(num_sampled)

    @property
    def mean_accepted(self) -> float:
        """Guesses that came true, per step that had any to verify."""
        return fmean(accepted for steps in self.accepted.values() for _, accepted in steps)


def num_moved(draft: DraftTree, sampled: Sequence[int]) -> int:
    chosen = [sampled[depth] if depth < len(sampled) else NO_TOKEN for depth in (0, *draft.depths)]
    nodes = accepted_nodes(draft, chosen)
    return sum(node != place for place, node in enumerate(nodes) if place > 0)


@dataclass(frozen=True)
class _FollowedStep:
    records: Records
    plan: StepPlan
    handle: LocalStep

    def result(self) -> StepResult:
        result = self.handle.result()
        self.records.note(self.plan, result)
        return result


Tokens = dict[str, list[int]]


@dataclass(frozen=True)
class Served:
    tokens: Tokens  # after the prompt, by request
    records: Records


# ---- ways to serve


@contextmanager
def running_engine(
    checkpoints: Checkpoints,
    speculation: Mapping[str, Any] | None,
    records: Records,
    with_policy: Callable[[DraftPolicy], DraftPolicy] = lambda policy: policy,
    **changes: Any,
) -> Iterator[Engine]:
    settings = {"block_size_tokens": BLOCK_SIZE_TOKENS, "num_blocks": 256, "max_num_batched_tokens": 1024}
    pools = {"prefill": {"replicas": 0}, "decode": {"engine": settings | changes}}
    config = parse_config({"speculation": speculation, **pools})
    executor = build_executor(
        ModelConfigSection(path=str(checkpoints.target)),
        config.decode.engine,
        num_threads=1,
        speculation=config.speculation,
    )
    policy = with_policy(build_draft_policy(config.speculation, executor.has_draft_network))
    yield Engine(records.follow(executor), config.decode.engine, SystemClock(), new_text, policy)
    executor.close()


class SeldomDrafts:
    """Implements ``DraftPolicy``: guesses in two steps of eleven; between them a draft model's KV waits."""

    listens = False

    def __init__(self, always: DraftPolicy) -> None:
        self.slots_needed, self.note_acceptance = always.slots_needed, always.note_acceptance
        self.note_times, self.may_defer = always.note_times, always.may_defer
        self._always = always
        self._num_steps = 0

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        self._num_steps += 1
        return self._always.choose(num_decoding, max_rows) if self._num_steps % 11 < 2 else None


def new_text(spec: RequestSpec) -> OutputText:
    return OutputText(TOKENIZER, spec.sampling, spec.token_ids)


def tokens_of(engine: Engine, requests: Iterable[RequestSpec]) -> Tokens:
    tokens: Tokens = {}
    for spec in requests:
        engine.add(spec)
    while engine.has_work:
        for output in engine.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    engine.check_integrity()
    return tokens


def serve_offline(
    checkpoints: Checkpoints,
    speculation: Mapping[str, Any],
    expect: Callable[[Engine], bool] = lambda engine: engine.scheduler.num_preemptions == 0,
    rounds: int = 1,
    num_new_tokens: int = NUM_NEW_TOKENS,
    **changes: Any,
) -> Served:
    """The last of ``rounds``, in which the requests come again to an engine that has cached their blocks."""
    records = Records()
    with running_engine(checkpoints, speculation, records, **changes) as engine:
        for _ in range(rounds):
            records.clear()
            tokens = tokens_of(engine, specs(num_new_tokens))
        assert expect(engine)
    return Served(tokens, records)


ENGINE = {"block_size_tokens": BLOCK_SIZE_TOKENS, "num_blocks": 256, "max_num_batched_tokens": 64}
CLUSTER: Mapping[str, Any] = {
    "prefill": {"replicas": 1, "engine": ENGINE | {"max_num_batched_tokens": 16}},
    "decode": {"replicas": 1, "engine": ENGINE},
    "router": {"local_prefill_tokens": 4, "stall_deadline_s": 30.0, "submit_deadline_s": 30.0},
}


@dataclass(frozen=True)
class Trace:
    """What a cluster shows of how it served."""

    moved_bytes: int
    lost_transfers: int
    cached_tokens: int
    attempts: Sequence[int]


def serve_cluster(
    checkpoints: Checkpoints,
    speculation: Mapping[str, Any],
    expect: Callable[[Trace], bool],
    *,
    rounds: int = 1,
    num_new_tokens: int = NUM_NEW_TOKENS,
    every_nth_block_breaks: int = 0,
    kill: Role | None = None,
    **changes: Any,
) -> Served:
    """The last of ``rounds``; ``kill`` stops a worker of that role when it has begun to answer."""
    config = parse_config({**CLUSTER, "speculation": speculation, **changes})
    records, new_policy = Records(), partial(draft_policy_of, config)

    async def serve() -> Tokens:
        with closing_executors(checkpoints, config, records) as new_executor:
            transports = partial(breaking, every_nth_block_breaks) if every_nth_block_breaks else make_transports
            async with LocalCluster(config, new_executor, new_text, transports, new_policy) as cluster:
                for _ in range(rounds):
                    records.clear()
                    has_begun = {role: asyncio.Event() for role in Role}
                    tasks = [asyncio.create_task(follow(cluster, spec, has_begun)) for spec in specs(num_new_tokens)]
                    if kill is not None:
                        await asyncio.wait_for(has_begun[kill].wait(), 30)
                        await cluster.stop_worker(next(id_ for id_ in cluster.workers if id_.startswith(kill.value)))
                    answers = await asyncio.gather(*tasks)
                await wait_until(cluster, expect, [attempts for _, attempts in answers])
        return {spec.request_id: tokens for spec, (tokens, _) in zip(specs(), answers, strict=True)}

    return Served(asyncio.run(serve()), records)


def draft_policy_of(config: Config, executor: WorkerExecutor) -> DraftPolicy:
    return build_draft_policy(config.speculation, executor.has_draft_network)


@contextmanager
def closing_executors(
    checkpoints: Checkpoints,
    config: Config,
    records: Records,
    speculation: Mapping[Role, Mapping[str, Any] | None] | None = None,  # of roles that do not keep to the config
) -> Iterator[Callable[[Role, PoolConfig], LocalExecutor]]:
    executors: list[LocalExecutor] = []

    def new_executor(role: Role, pool: PoolConfig) -> LocalExecutor:
        model, guesses = ModelConfigSection(path=str(checkpoints.target)), config.speculation
        if role in (speculation or {}):
            guesses = parse_config({"speculation": (speculation or {})[role]}).speculation
        executor = build_executor(model, pool.engine, num_threads=1, shared_kv=True, speculation=guesses)
        executors.append(records.follow(executor))
        return executor

    yield new_executor
    for executor in executors:
        executor.close()


def breaking(every_nth: int, names: Sequence[str], stores: Mapping[str, BlockStore]) -> list[LoopbackTransport]:
    count = 0

    def fault(slot: int, views: Sequence[memoryview]) -> None:
        nonlocal count
        count += 1
        if count % every_nth == 0:
            raise TransferError("the connection broke")

    return [LoopbackTransport(stores, fault)]


async def follow(
    cluster: LocalCluster, spec: RequestSpec, has_begun: Mapping[Role, asyncio.Event]
) -> tuple[list[int], int]:
    """(tokens, attempts)"""
    generation = cluster.coordinator.generate(spec)
    tokens: list[int] = []
    async for output in generation:
        tokens += output.token_ids
        has_begun[Role.PREFILL if output.position == 0 else Role.DECODE].set()
    assert generation.account is not None
    return tokens, generation.account.attempts


async def wait_until(cluster: LocalCluster, expect: Callable[[Trace], bool], attempts: Sequence[int]) -> None:
    """Until all blocks are free and snapshots tell what is expected."""
    pool, deadline_s = cluster.coordinator.pool, cluster.clock.now_s() + 10
    while True:
        seen = [client.snapshot for client in pool.workers().values()]
        trace = Trace(
            sum(snapshot.transfer_bytes_total for snapshot in seen),
            sum(snapshot.transfer_failures_total for snapshot in seen),
            sum(snapshot.cached_tokens_total for snapshot in seen),
            attempts,
        )
        if expect(trace) and all(snapshot.blocks_free == snapshot.blocks_total for snapshot in seen):
            return
        assert cluster.clock.now_s() < deadline_s, trace
        await pool.wait_for_change(0.2)


split = partial(serve_cluster, expect=lambda trace: trace.moved_bytes > 0 == trace.lost_transfers)
preempted = partial(
    serve_offline, num_blocks=25, watermark=0.0, expect=lambda engine: engine.scheduler.num_preemptions > 2
)
SLOW_PREFILL = {"prefill": {"replicas": 1, "engine": ENGINE | {"max_num_batched_tokens": 2}}}
TWO_DECODERS = {"decode": {"replicas": 2, "engine": ENGINE}, "router": {**CLUSTER["router"], "policy": "round_robin"}}
WAYS: Mapping[str, Callable[..., Served]] = {
    "aggregated": serve_offline,
    "one by one": partial(serve_offline, max_num_seqs=1),
    "chunks": partial(serve_offline, max_num_batched_tokens=13),
    "prefix hit": partial(serve_offline, rounds=2),
    "preempted by recompute": partial(preempted, enable_prefix_caching=False),
    "preempted by recompute, with a cache": preempted,
    "preempted by swap": partial(preempted, num_host_blocks=128),
    "guessed for now and then": partial(serve_offline, with_policy=SeldomDrafts),
    "guessed for now and then, prefix hit": partial(serve_offline, with_policy=SeldomDrafts, rounds=3),
    "guessed for now and then, preempted by recompute": partial(preempted, with_policy=SeldomDrafts),
    "guessed for now and then, preempted by swap": partial(preempted, with_policy=SeldomDrafts, num_host_blocks=128),
    "split over shared memory": partial(split, transfer={"transports": ["shared_memory"]}),
    "split over tcp": partial(split, transfer={"transports": ["tcp"]}),
    "split over loopback": partial(split, transfer={"transports": ["loopback"]}),
    "split, prefix hit": partial(split, rounds=2, expect=lambda trace: trace.cached_tokens > 0),
    "transfers break": partial(serve_cluster, every_nth_block_breaks=3, expect=lambda trace: trace.lost_transfers > 0),
    "prefill worker dies": partial(
        serve_cluster, kill=Role.PREFILL, expect=lambda trace: trace.lost_transfers > 0, **SLOW_PREFILL
    ),
    "decode worker dies": partial(
        serve_cluster, kill=Role.DECODE, expect=lambda trace: max(trace.attempts) > 1, **TWO_DECODERS
    ),
}


# ---- the oracle


@dataclass(frozen=True)
class Oracle:
    tokens: Tokens
    guesses: Mapping[tuple[str, int], DraftTree]  # by request and known tokens

    def places(self, index: str) -> range:
        """Numbers of known tokens after which it guesses."""
        begin = specs()[int(index)].num_prompt_tokens + 1
        return range(begin, begin + NUM_NEW_TOKENS)

    def num_accepted(self, index: str, num_known: int, draft: DraftTree) -> int:
        """How many of the guesses come true."""
        known = (*specs()[int(index)].token_ids, *self.tokens[index])
        return len(accepted_nodes(draft, [known[num_known + depth] for depth in (0, *draft.depths)]))


def make_oracle(checkpoints: Checkpoints, speculation: Mapping[str, Any]) -> Oracle:
    """Tokens without guesses, a few more than are asked for; guesses for requests of which nothing is computed."""
    with running_engine(checkpoints, None, Records()) as engine:
        tokens = tokens_of(engine, specs(NUM_NEW_TOKENS + MAX_DEPTH))
    records = Records()
    beginnings = [
        RequestSpec(
            request_id=f"{spec.request_id}.{count}",
            token_ids=spec.token_ids + tuple(tokens[spec.request_id][:count]),
            num_prompt_tokens=spec.num_prompt_tokens,
            sampling=msgspec.structs.replace(spec.sampling, max_tokens=count + 3),  # fewer need no guess
        )
        for spec in specs()
        for count in range(NUM_NEW_TOKENS)
    ]
    room = {"enable_prefix_caching": False, "num_blocks": 8192}  # nobody goes without guesses for want of blocks
    with running_engine(checkpoints, speculation, records, **room) as engine:
        tokens_of(engine, beginnings)
    return Oracle(tokens, {key: guess for key, [guess] in records.guesses.items()})


@pytest.fixture(scope="module")
def oracles(checkpoints: Checkpoints) -> Mapping[str, Oracle]:
    return {name: make_oracle(checkpoints, method) for name, method in checkpoints.speculation.items()}


# Usual draft heads in every way; others in the ways that move or lose KV.
OTHERS = (
    "eagle, fixed tree",
    "eagle of two layers",
    "medusa",
    "draft_model",
    "draft_model, trees",
    "early_exit",
    "early_exit, trees",
)
MOVING = (
    "guessed for now and then",
    "prefix hit",
    "preempted by swap",
    "split over tcp",
    "split, prefix hit",
    "decode worker dies",
)
CASES = [
    *((method, way) for method in ("eagle", "eagle3") for way in WAYS),
    *((method, way) for method in OTHERS for way in MOVING),
]


@pytest.mark.parametrize(("method", "way"), CASES)
def test_guesses_and_what_comes_true_depend_on_the_tokens_alone(
    checkpoints: Checkpoints, oracles: Mapping[str, Oracle], method: str, way: str
) -> None:
    oracle, served = oracles[method], WAYS[way](checkpoints, checkpoints.speculation[method])
    assert served.tokens == {index: tokens[:NUM_NEW_TOKENS] for index, tokens in oracle.tokens.items()}
    for (index, num_known), guesses in served.records.guesses.items():
        if num_known in oracle.places(index):  # else of a step beyond the end of the request
            assert guesses == {oracle.guesses[index, num_known]}, (index, num_known)
    assert served.records.accepted
    for (index, num_known), steps in served.records.accepted.items():
        for draft, num_accepted in steps:
            assert draft == oracle.guesses[index, num_known].first(len(draft))  # a full step verifies only the first
            assert num_accepted == oracle.num_accepted(index, num_known, draft), (index, num_known)


@pytest.fixture(scope="module")
def alone_in_long(checkpoints: Checkpoints) -> Callable[[str], Records]:
    """Of aggregated serving, by method. Answers are as long as the model allows."""
    return cache(lambda method: serve_offline(checkpoints, checkpoints.speculation[method], num_new_tokens=100).records)


@pytest.mark.parametrize("method", ["eagle", "eagle3", "medusa", "draft_model", "early_exit"])
@pytest.mark.parametrize("way", ["split over tcp", "prefix hit", "split, prefix hit", "decode worker dies"])
def test_tokens_per_step_differ_by_less_than_one_percent_from_aggregated_serving(
    checkpoints: Checkpoints, alone_in_long: Callable[[str], Records], way: str, method: str
) -> None:
    """Over all steps that decode, but for one of each request that is handed over, the first: whoever reads KV has no
    guesses yet, as only its writer had the hidden states to guess from. Answers are as long as the model allows, so
    that it matters little with which of its tokens a request's steps begin."""
    alone = alone_in_long(method)
    served = WAYS[way](checkpoints, checkpoints.speculation[method], num_new_tokens=100).records
    assert alone.num_first_steps == 0 and (served.num_first_steps == 0) == (way == "prefix hit")
    assert fmean(served.decode_steps) == pytest.approx(fmean(alone.decode_steps), rel=0.01)


MADE_TO_AGREE = (
    *("eagle", "eagle, fixed tree", "eagle3", "medusa", "draft_model", "draft_model, trees"),
    *("early_exit", "early_exit, trees"),
)


@pytest.mark.parametrize("method", MADE_TO_AGREE)
def test_guesses_of_drafts_made_to_agree_come_true(
    alone_in_long: Callable[[str], Records], checkpoints: Checkpoints, method: str
) -> None:
    """A check on the tests above: they compare something, and in trees the KV of deep guesses is brought to its place.
    In long answers: the last guesses are cut to what is left."""
    records, speculation = alone_in_long(method), checkpoints.speculation[method]
    assert records.mean_accepted > 1.5
    assert (records.num_moved > 100) == ("tree_branching" in speculation or "tree_paths" in speculation)


@pytest.mark.parametrize("other", [None, "seed"], ids=["no draft", "another draft"])
def test_a_prefill_worker_with_another_draft_is_not_read(
    checkpoints: Checkpoints, oracles: Mapping[str, Oracle], tmp_path: Path, other: str | None
) -> None:
    """While a pool is replaced: requests are served by the decode worker alone, which says why."""
    save_random_draft(tmp_path / "other", "eagle", load_model_config(checkpoints.target), seed=9)
    mine = checkpoints.speculation["eagle"]
    theirs = None if other is None else {**mine, "model": str(tmp_path / "other")}
    config = parse_config({**CLUSTER, "speculation": mine})

    async def serve() -> None:
        with closing_executors(checkpoints, config, Records(), {Role.PREFILL: theirs}) as new_executor:
            async with LocalCluster(config, new_executor, new_text) as cluster:
                generation = cluster.coordinator.generate(specs()[-1])
                tokens = [token async for output in generation for token in output.token_ids]
        assert tokens == oracles["eagle"].tokens["7"][:NUM_NEW_TOKENS]
        assert generation.account is not None and generation.account.prefill_worker is None
        assert "KV of prefill-1 cannot be read" in generation.account.route_reason
        assert ("layer groups" if other is None else "draft") in generation.account.route_reason

    asyncio.run(serve())
