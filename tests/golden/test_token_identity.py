"""The first promise: however a request is served, it gets the tokens that it gets alone.

One oracle (each prompt by itself, computed whole, nothing cached), one table of ways to serve, the same 64 prompts.
Each way also asserts that what it is named after has really happened, and that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from ways_to_serve import stop

from eagleray.cluster.local import LocalCluster
from eagleray.core.config import DEMO_MODEL_PATH, Config, ModelConfigSection, PoolConfig, parse_config
from eagleray.core.errors import TransferError
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.engine.execution.core_turns import OwnCores, SharedCores
from eagleray.engine.execution.executor import LocalExecutor, LocalStep, build_executor
from eagleray.engine.llm import LLM
from eagleray.engine.request_output import Logprob, OutputCollector, RequestOutput
from eagleray.engine.scheduling.plan import StepResult
from eagleray.kv_transfer.transport import BlockStore, Transport
from eagleray.kv_transfer.transports.loopback import Fault, LoopbackTransport, no_fault
from eagleray.kv_transfer.transports.select import make_transports
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.text.fake import save_byte_tokenizer
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer

NUM_PROMPTS = 64
MAX_TOKENS = 12
LONGEST_PROMPT = 200
LOGPROB_TOLERANCE = 1e-4
RANDOM_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
WORDS = (
    """def return for in if else self value index list 0 1 2 = + ( ) : hello what is the a of and été 東京""".split()
)


# ---- what is asked


@dataclass(frozen=True)
class Case:
    token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    tokenizer: Tokenizer
    cases: tuple[Case, ...]


def make_sampling(tokenizer: Tokenizer) -> list[SamplingParams]:
    """Greedy and seeded, each alone and with what else changes, reports or ends an answer."""
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    often_ab = {a: 6.0, b: 6.0}  # so that stop strings are met
    greedy: list[dict[str, Any]] = [
        {},
        {"logprobs": 3},
        {"repetition_penalty": 1.3},
        {"stop": ["ab", "ba"], "logit_bias": often_ab, "presence_penalty": 1.0},
        {"prompt_logprobs": 2, "logprobs": 0},
    ]
    seeded: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
        {"stop": "ab", "logit_bias": often_ab, "include_stop_str_in_output": True},
        {"n": 2},
        {"n": 2, "logprobs": 1, "top_k": 20},
        {"min_p": 0.02, "stop_token_ids": [a], "logit_bias": often_ab, "min_tokens": 3},
        {"prompt_logprobs": 0},
    ]
    return [
        *(SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, **more) for more in greedy),
        *(SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=MAX_TOKENS, **more) for more in seeded),
    ]


def make_cases(tokenizer: Tokenizer) -> tuple[Case, ...]:
    """Lengths around block and chunk sizes; a third of the prompts share one of two stems; some are equal."""
    chance = random.Random(11)

    def text_ids(num_tokens: int) -> tuple[int, ...]:
        return tuple(tokenizer.encode(" ".join(chance.choices(WORDS, k=num_tokens)))[:num_tokens])

    lengths = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65, LONGEST_PROMPT]
    prompts = [text_ids(length) for length in lengths]
    for stem in (text_ids(64), text_ids(101)):
        prompts += [stem + text_ids(chance.randint(1, 60)) for _ in range(12)]
    tail = text_ids(40)  # equal blocks that are no prefix of each other
    prompts += [text_ids(16) + tail for _ in range(4)]
    prompts += [text_ids(chance.randint(1, LONGEST_PROMPT)) for _ in range(16)]
    prompts += chance.choices(prompts, k=NUM_PROMPTS - len(prompts))
    return tuple(map(Case, prompts, itertools.cycle(make_sampling(tokenizer))))


@pytest.fixture(scope="module", params=["random", pytest.param("demo", marks=pytest.mark.slow)])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "demo":
        shutil.copytree(DEMO_MODEL_PATH, folder, dirs_exist_ok=True)
    else:
        save_random_checkpoint(folder, RANDOM_LLAMA, seed=5)
        save_byte_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return Checkpoint(folder, tokenizer, make_cases(tokenizer))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Answers = list[RequestOutput]  # per prompt
Serve = Callable[[Checkpoint], Answers]


# ---- offline


def serve_offline(
    checkpoint: Checkpoint,
    *,
    rounds: int = 1,
    expect: Callable[[LLM, Answers], None] | None = None,
    **engine: Any,
) -> Answers:
    """Answers of the last of ``rounds`` of all prompts at once."""
    engine = {"num_blocks": 1024, "enable_prefix_caching": False, **engine}
    llm = LLM(str(checkpoint.folder), dtype="float32", num_threads=1, **engine)
    kv = llm.engine.kv
    for _ in range(rounds):
        with mock.patch.object(kv, "swap_in", wraps=kv.swap_in) as swap_in:
            outputs = llm.generate(
                [case.token_ids for case in checkpoint.cases], [case.sampling for case in checkpoint.cases]
            )
    assert bool(swap_in.called) == ("num_host_blocks" in engine)
    assert (llm.engine.scheduler.num_preemptions > 0) == (expect is was_preempted)
    if expect is not None:
        expect(llm, outputs)
    llm.engine.check_integrity()
    assert kv.pool.num_free == kv.pool.num_blocks
    return outputs


def was_preempted(llm: LLM, outputs: Answers) -> None:
    assert llm.engine.scheduler.num_preemptions >= 3


def found_nothing(llm: LLM, outputs: Answers) -> None:
    assert not any(output.num_cached_tokens for output in outputs)


def found_prefixes(llm: LLM, outputs: Answers) -> None:
    cached = sum(output.num_cached_tokens for output in outputs)
    assert cached > sum(len(output.prompt_token_ids) for output in outputs) / 2


# ---- clusters

CLUSTER: Mapping[str, Any] = {
    "prefill": {"replicas": 2, "engine": {"num_blocks": 512, "max_num_batched_tokens": 64}},
    "decode": {"replicas": 2, "engine": {"num_blocks": 512, "max_num_seqs": 63, "max_num_batched_tokens": 64}},
    "router": {"local_prefill_tokens": 8, "stall_deadline_s": 30.0, "submit_deadline_s": 30.0},
}
# Every worker has its share of the prompts, and prefill takes a while.
SPREAD: Mapping[str, Any] = {
    "router": {**CLUSTER["router"], "policy": "round_robin"},
    "prefill": {"replicas": 2, "engine": {"num_blocks": 512, "max_num_batched_tokens": 16}},
}


@dataclass(frozen=True)
class Traces:
    """What a cluster shows of how it served: its workers' last words, and how many decode workers each prompt had."""

    snapshots: Sequence[WorkerSnapshot]
    attempts: Sequence[int]

    @property
    def moved_bytes(self) -> int:
        return sum(snapshot.transfer_bytes_total for snapshot in self.snapshots)

    @property
    def lost_transfers(self) -> int:
        return sum(snapshot.transfer_failures_total for snapshot in self.snapshots)


Expect = Callable[[Traces], bool]


def serve_cluster(
    checkpoint: Checkpoint, *, expect: Expect, fault: Fault | None = None, kill: Role | None = None, **changes: object
) -> Answers:
    """All prompts at once; ``kill`` stops a worker of that role in the middle of its work."""
    config = parse_config({**CLUSTER, **changes})
    # Decode workers have long enough to do; and one that is held takes no reservations.
    held = Held(Role.PREFILL if kill is Role.PREFILL else None)

    async def serve() -> Answers:
        async with running_cluster(checkpoint, config, fault, held) as cluster:
            tasks = [
                asyncio.create_task(follow(cluster, index, case, checkpoint.tokenizer))
                for index, case in enumerate(checkpoint.cases)
            ]
            if kill is not None:
                busy = held.first(cluster) if held.role else wait_for_busy_worker(cluster, kill)
                await stop(cluster, await busy, held.released)
            answers, attempts = zip(*await asyncio.gather(*tasks), strict=True)
            await wait_until_all_is_free(cluster, attempts, expect)
            return list(answers)

    return asyncio.run(serve())


@dataclass(frozen=True)
class Held:
    """Once a worker of ``role`` has brought tokens none of its steps ends until ``released``. So however late it is
    stopped, that is in the middle of its work."""

    role: Role | None
    released: threading.Event = field(default_factory=threading.Event)
    waiting: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)  # workers, in the order of their making

    def follow(self, role: Role, executor: LocalExecutor, number: int) -> LocalExecutor:
        if role is self.role:
            submit, has_brought = executor.submit, threading.Event()
            executor.submit = lambda plan: _HeldStep(  # type: ignore[method-assign,assignment,return-value]
                self, number, submit(plan), has_brought
            )
        return executor

    async def first(self, cluster: LocalCluster) -> str:
        """The worker that waits first."""
        return list(cluster.workers)[await asyncio.to_thread(self.waiting.get, timeout=30)]


@dataclass(frozen=True)
class _HeldStep:
    held: Held
    number: int
    handle: LocalStep
    has_brought: threading.Event

    def result(self) -> StepResult:
        result = self.handle.result()
        if self.has_brought.is_set() and not self.held.released.is_set():
            self.held.waiting.put(self.number)
            assert self.held.released.wait(60), "nobody has released it"
        if result.sampled:
            self.has_brought.set()
        return result


@asynccontextmanager
async def running_cluster(
    checkpoint: Checkpoint, config: Config, fault: Fault | None, held: Held
) -> AsyncIterator[LocalCluster]:
    executors: list[LocalExecutor] = []
    turns: list[SharedCores] = []

    def new_executor(role: Role, pool: PoolConfig) -> LocalExecutor:
        model = ModelConfigSection(path=str(checkpoint.folder), dtype="float32")
        if config.cores == "shared":
            turns.append(SharedCores(checkpoint.folder / "turns", deadline_s=30.0))
        executor = build_executor(
            model,
            pool.engine,
            num_threads=pool.num_threads or 1,
            shared_kv=True,
            turns=turns[-1] if turns else OwnCores(),
        )
        executors.append(held.follow(role, executor, len(executors)))
        return executors[-1]

    def new_text(spec: RequestSpec) -> OutputText:
        return OutputText(checkpoint.tokenizer, spec.sampling, spec.token_ids[: spec.num_prompt_tokens])

    def faulty(names: Sequence[str], stores: Mapping[str, BlockStore]) -> list[Transport]:
        return [LoopbackTransport(stores, fault or no_fault)]

    async with LocalCluster(config, new_executor, new_text, faulty if fault else make_transports) as cluster:
        yield cluster
    for executor in executors:
        executor.close()
    for turn in turns:
        turn.close()


async def follow(cluster: LocalCluster, index: int, case: Case, tokenizer: Tokenizer) -> tuple[RequestOutput, int]:
    """The answers to a prompt, and the attempts that its first one took."""
    spec = RequestSpec(
        request_id=str(index),
        token_ids=case.token_ids,
        num_prompt_tokens=len(case.token_ids),
        sampling=case.sampling,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    collector = OutputCollector(spec.request_id, spec, tokenizer)
    generation = cluster.coordinator.generate(spec)
    async for output in generation:
        collector.add(output)
    assert generation.account is not None
    return collector.output, generation.account.attempts


async def wait_for_busy_worker(cluster: LocalCluster, role: Role) -> str:
    """One that has emitted tokens and holds several requests."""

    def is_busy(seen: WorkerSnapshot) -> bool:
        num_held = seen.num_waiting + seen.num_running + seen.num_reserved
        return seen.role is role and seen.output_tokens_total > 0 and num_held >= 8

    pool = cluster.coordinator.pool
    async with asyncio.timeout(30):
        while not (busy := [id_ for id_, client in pool.workers().items() if is_busy(client.snapshot)]):
            await pool.wait_for_change(0.5)
    return busy[0]


async def wait_until_all_is_free(cluster: LocalCluster, attempts: Sequence[int], expect: Expect) -> None:
    """Within seconds every block of every worker is free, and its snapshot tells of what was expected."""
    pool, deadline_s = cluster.coordinator.pool, cluster.clock.now_s() + 10
    while True:
        traces = Traces([client.snapshot for client in pool.workers().values()], attempts)
        is_free = all(snapshot.blocks_free == snapshot.blocks_total for snapshot in traces.snapshots)
        if is_free and expect(traces):
            break
        assert cluster.clock.now_s() < deadline_s, f"{is_free=}, {traces}"
        await pool.wait_for_change(0.5)
    for worker in cluster.workers.values():
        await asyncio.to_thread(worker.check_integrity)


def every_fifth(fault: Callable[[Sequence[memoryview]], None]) -> Fault:
    """``fault`` on every fifth block that is read."""
    reads = itertools.count(1)

    def maybe_fault(slot: int, views: Sequence[memoryview]) -> None:
        if next(reads) % 5 == 0:
            fault(views)

    return maybe_fault


def corrupt(views: Sequence[memoryview]) -> None:
    views[0][0] ^= 1


def cut(views: Sequence[memoryview]) -> None:
    raise TransferError("the connection broke")


# ---- the table

serve_alone = partial(serve_offline, max_num_seqs=1, max_num_batched_tokens=4096)
cached = partial(serve_offline, enable_prefix_caching=True, rounds=2, expect=found_prefixes)
preempted = partial(serve_offline, num_blocks=17, watermark=0.0, expect=was_preempted)
split = partial(serve_cluster, expect=lambda traces: traces.moved_bytes > 0 == traces.lost_transfers)
broken = partial(serve_cluster, expect=lambda traces: traces.lost_transfers > 0)
WAYS: Mapping[str, Serve] = {
    "batched": partial(serve_offline, max_num_batched_tokens=4096),
    "shortest-prompt-first": partial(serve_offline, scheduling_policy="shortest_prompt_first", max_num_seqs=7),
    "chunks-of-16": partial(serve_offline, max_num_seqs=15, max_num_batched_tokens=16),
    "chunks-of-64": partial(serve_offline, max_num_seqs=63, max_num_batched_tokens=64),
    "blocks-of-5": partial(serve_offline, block_size_tokens=5, max_num_seqs=63, max_num_batched_tokens=64),
    "prefix-miss": partial(cached, max_num_batched_tokens=16384, rounds=1, expect=found_nothing),
    "prefix-hit": cached,
    "prefix-hit-in-chunks": partial(cached, max_num_seqs=15, max_num_batched_tokens=16),
    "preempted-by-recompute": preempted,
    "preempted-by-recompute-with-prefix-cache": partial(preempted, enable_prefix_caching=True),
    "preempted-by-swap": partial(preempted, num_host_blocks=256),
    "aggregated": partial(serve_cluster, prefill={"replicas": 0}, expect=lambda traces: not traces.moved_bytes),
    "split-over-shared-memory": partial(split, transfer={"transports": ["shared_memory"]}),
    "split-over-tcp": partial(split, transfer={"transports": ["tcp"]}),
    "split-over-loopback": partial(split, transfer={"transports": ["loopback"]}),
    "split-on-shared-cores": partial(
        split,
        cores="shared",
        prefill={**CLUSTER["prefill"], "num_threads": 2},
        decode={**CLUSTER["decode"], "num_threads": 2},
    ),
    "corrupted-transfers": partial(broken, fault=every_fifth(corrupt)),
    "cut-transfers": partial(broken, fault=every_fifth(cut)),
    "prefill-worker-dies": partial(broken, **SPREAD, kill=Role.PREFILL),
    "decode-worker-dies": partial(
        serve_cluster, **SPREAD, kill=Role.DECODE, expect=lambda traces: max(traces.attempts) > 1
    ),
}


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint) -> Answers:
    """The oracle."""
    return serve_alone(checkpoint)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_each_prompt_alone(way: str, checkpoint: Checkpoint, alone: Answers) -> None:
    served = WAYS[way](checkpoint)
    differing = {
        index: (exact(ours), exact(theirs))
        for index, (ours, theirs) in enumerate(zip(served, alone, strict=True))
        if exact(ours) != exact(theirs)
    }
    assert not differing
    for ours, theirs in zip(served, alone, strict=True):
        assert scores(ours) == [pytest.approx(entry, abs=LOGPROB_TOLERANCE) for entry in scores(theirs)]


def exact(output: RequestOutput) -> list[tuple[object, ...]]:
    return [(answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason) for answer in output.outputs]


def scores(output: RequestOutput) -> list[dict[int, float]]:
    """Log-probabilities by token id, of every prompt token and every token of every answer that asked for them."""
    entries = [*(output.prompt_logprobs or ())]
    for answer in output.outputs:
        entries += answer.logprobs or ()
    return [values_of(entry) for entry in entries if entry is not None]


def values_of(entry: dict[int, Logprob]) -> dict[int, float]:
    return {token_id: logprob.logprob for token_id, logprob in entry.items()}


def test_the_prompts_exercise_every_way_to_end(checkpoint: Checkpoint, alone: Answers) -> None:
    answers = [answer for output in alone for answer in output.outputs]
    ends = {(answer.finish_reason, type(answer.stop_reason)) for answer in answers}
    assert ends >= {("length", type(None)), ("stop", str), ("stop", int)}
    assert len(checkpoint.cases) == NUM_PROMPTS > len({case.token_ids for case in checkpoint.cases})
    pairs = [output.outputs for output in alone if len(output.outputs) == 2]
    assert pairs and all(first.token_ids != second.token_ids for first, second in pairs)


# ---- transformers


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def test_greedy_tokens_are_those_of_transformers(
    checkpoint: Checkpoint, alone: Answers, reference: transformers.PreTrainedModel
) -> None:
    for case, output in zip(checkpoint.cases, alone, strict=True):
        if not case.sampling.is_greedy or case.sampling.logit_bias is not None:
            continue
        prompt = torch.tensor([case.token_ids])
        generated = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            repetition_penalty=case.sampling.repetition_penalty,
            eos_token_id=list(checkpoint.tokenizer.eos_token_ids),
            pad_token_id=0,
            temperature=None,
            top_p=None,
        )
        assert output.outputs[0].token_ids == generated[0, len(case.token_ids) :].tolist()


def test_logprobs_are_those_of_transformers(
    checkpoint: Checkpoint, alone: Answers, reference: transformers.PreTrainedModel
) -> None:
    num_scored = 0
    for case, output in zip(checkpoint.cases, alone, strict=True):
        answer = output.outputs[0]
        token_ids = [*case.token_ids, *answer.token_ids]
        with torch.no_grad():
            rows = reference(torch.tensor([token_ids])).logits[0].log_softmax(-1)  # [tokens, V]: row i of token i + 1
        begin = len(case.token_ids)
        scored = [*enumerate(output.prompt_logprobs or ()), *enumerate(answer.logprobs or (), start=begin)]
        for position, entry in scored:
            if entry is not None:
                assert_scored(entry, rows[position - 1], token_ids[position])
                num_scored += 1
    assert num_scored > NUM_PROMPTS


def assert_scored(entry: dict[int, Logprob], row: torch.Tensor, token_id: int) -> None:
    """``entry`` holds the token itself and the best of its ``row`` [V], each with its log-probability and rank."""
    assert next(iter(entry)) == token_id
    assert {id_: row[id_].item() for id_ in entry} == pytest.approx(values_of(entry), abs=LOGPROB_TOLERANCE)
    by_rank = row.sort(descending=True).values
    ranks = {id_: by_rank[logprob.rank - 1].item() for id_, logprob in entry.items()}
    assert ranks == pytest.approx(values_of(entry), abs=LOGPROB_TOLERANCE)
