"""The scheduler: each step hands out a token budget so that computed tokens catch up with known tokens.

There are no phases in it. A decoding request lacks one token, a new one lacks its prompt, a resumed one lacks prompt
and output, one with a prefix hit lacks the rest; they differ by a number. (The rule is vLLM's V1 scheduler's.)

    waiting --admit--> running --caught up--> samples a token, lacks one again
       ^                 | |
       +---preempt-------+ +--swap out--> swapped --swap in--> running
    reserved --commit--> running          running --hand over--> held for its reader --release--> gone
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import Final

from eagleray.core.config import EngineConfig
from eagleray.core.request import Request, RequestState
from eagleray.engine.scheduling.kv_manager import KVManager
from eagleray.engine.scheduling.plan import BlockCopy, ScheduledRun, StepPlan
from eagleray.engine.scheduling.policy import ORDERS
from eagleray.engine.scheduling.shares import StepBudget, even_shares, half
from eagleray.engine.speculation.controller import DraftPolicy, NoDrafts
from eagleray.engine.speculation.tree import DraftShape, DraftTree

_COMPUTING: Final = (RequestState.PREFILLING, RequestState.DECODING)
_HAS_GIVEN_WAY: Final = (RequestState.QUEUED, RequestState.SWAPPED)
# While nothing is guessed a draft model's KV waits until many tokens lack it: one pass over them costs little more than
# one over a single token. Blocks become findable as much later.
_MAX_DEFERRED_TOKENS: Final = 256  # of all requests
_MAX_DEFERRED_TOKENS_EACH: Final = 32


class Scheduler:
    """Owns the requests of one engine and decides each step. Pure of time, text and tensors."""

    def __init__(
        self, config: EngineConfig, kv: KVManager, draft_policy: DraftPolicy, max_model_tokens: int | None = None
    ) -> None:
        self._config = config
        self._max_model_tokens = max_model_tokens or kv.pool.num_blocks * kv.block_size_tokens
        self._kv = kv
        self._draft_policy = draft_policy
        self._drafts: dict[str, DraftTree] = {}  # guesses to verify in a request's next run
        self._stretched: list[Request] = []  # by the last step: hold blocks beyond their known tokens, for guesses
        self._order = ORDERS[config.scheduling_policy]
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # in order
        self._running: list[Request] = []  # in order
        self._swapped: list[Request] = []
        self._may_defer = False  # in the step that is being scheduled
        self._watermark_blocks = int(config.watermark * kv.pool.num_blocks)
        self.num_preemptions = 0

    # ---- requests in and out

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._swapped)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._swapped)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=self._order)

    def reserve(self, request: Request) -> bool:
        """Hold blocks for all known tokens and one more of a request whose KV will come from elsewhere; False, and
        nothing changed, when there is no room. Its cached prefix counts as computed."""
        matched = self._kv.match_prefix(request)
        room_needed = request.num_tokens + 1
        spoken_for = self._blocks_to_keep_free() + self._blocks_wanted_before(request)
        if self._kv.room_for(request, room_needed, matched) < spoken_for:
            return False
        self._hold(request, matched)
        self._kv.grow(request, room_needed)
        request.move(RequestState.RESERVED)
        self._requests[request.request_id] = request
        return True

    def commit(self, request: Request, num_computed_tokens: int, token_ids: tuple[int, ...]) -> None:
        """KV of a reserved request is in up to ``num_computed_tokens``, and ``token_ids`` were sampled elsewhere.
        What is missing, after a broken transfer all of it, is computed here like anything else."""
        request.token_ids.extend(token_ids)
        last = request.num_tokens - 1  # is computed here in any case
        if num_computed_tokens > last:
            # The block that it lies in was written further than that, and a draft's feature in it is of a later token.
            num_computed_tokens = last // self._kv.block_size_tokens * self._kv.block_size_tokens
        computed = max(request.num_computed_tokens, num_computed_tokens)
        self._kv.note_computed(request, computed)
        request.move(RequestState.PREFILLING)
        insort(self._running, request, key=self._order)

    def hand_over(self, request: Request) -> None:
        """Nothing more to compute here; its blocks stay until ``end``."""
        request.move(RequestState.HANDED_OVER)
        self._running.remove(request)
        self._drafts.pop(request.request_id, None)

    def end(self, request: Request, state: RequestState) -> None:
        """Finish, abort or fail a request, wherever it is: all its blocks become free at once."""
        request.move(state)
        self._kv.free(request)
        self._drafts.pop(request.request_id, None)
        del self._requests[request.request_id]
        for queue in (self._waiting, self._running, self._swapped):
            if request in queue:
                queue.remove(request)

    # ---- the step

    def schedule(self) -> StepPlan:
        """Decide the next step. Running requests come first, those that lack one token before those that lack many:
        somebody waits for each of their tokens. New ones are admitted only if nobody had to give way."""
        self._give_back_for_guesses()
        lacking_one, lacking_many = self._by_lack()
        never_guesses = isinstance(self._draft_policy, NoDrafts)  # nobody need ask what there is room for
        prompts = [] if never_guesses else self._prompts(len(lacking_one), lacking_many)
        rows_for_guesses = 0 if never_guesses else self._rows_for_guesses(len(lacking_one), prompts)
        num_decoding = len(lacking_one) or self._num_that_begin(prompts)
        shape = self._draft_policy.choose(num_decoding, num_decoding + rows_for_guesses)
        self._share_out(lacking_one, rows_for_guesses)
        self._may_defer = self._draft_policy.may_defer and not self._has_deferred_enough()
        # Who is to be handed over after its prompt waits for no tokens here.
        has_decoding = any(request.output_limit is None for request in lacking_one)
        budget = StepBudget(self._config.max_num_batched_tokens, has_decoding)
        runs, swap_out, preempted = self._schedule_running(lacking_one + lacking_many, shape, budget)
        swap_in: list[BlockCopy] = []
        if not preempted:
            swap_in = self._bring_back()
            self._admit(runs, shape, budget)
        return StepPlan(tuple(runs), tuple(swap_out), tuple(swap_in), shape)

    def runs_that_count(self, plan: StepPlan) -> list[tuple[ScheduledRun, Request]]:
        """Of a step that has been computed: the runs of requests that have not ended or been handed over meanwhile."""
        requests = self._requests
        return [
            (run, request)
            for run in plan.runs
            if (request := requests.get(run.spec.request_id)) is not None
            and request.spec is run.spec
            and request.state in _COMPUTING
        ]

    def note_computed(self, run: ScheduledRun, request: Request, num_guessed: int, draft: DraftTree | None) -> None:
        """A run has been computed, and what it sampled has been appended to its request, ``num_guessed`` tokens of it
        guesses that came true: those tokens count as computed, full blocks become findable. ``draft`` is for the next
        run."""
        num_computed = run.end + num_guessed
        self._kv.note_computed(request, num_computed, request.num_complete_tokens if run.defers else num_computed)
        if request.state is RequestState.PREFILLING and run.samples:
            request.move(RequestState.DECODING)
        if draft is not None:  # the last token it may still get needs no guess
            self._drafts[request.request_id] = draft.no_deeper(self._num_left(request) - 1)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless every block is accounted for."""
        self._kv.check_integrity(
            request.request_id for request in self._requests.values() if request.state is not RequestState.QUEUED
        )

    # ---- parts of the step

    def _by_lack(self) -> tuple[list[Request], list[Request]]:
        """Running requests that lack one token, and those that lack many; each in order."""
        one: list[Request] = []
        many: list[Request] = []
        for request in self._running:
            (many if request.num_uncomputed_tokens > 1 else one).append(request)
        return one, many

    def _prompts(self, num_decoding: int, lacking_many: list[Request]) -> list[tuple[Request, int]]:
        """What else there is to compute for, begun and about to be, with the tokens that are missing: enough of it to
        know what is left for guesses, and who begins to decode if nobody does yet."""
        if not (lacking_many or self._waiting):
            return []  # as in most steps
        left = max(0, self._config.max_num_batched_tokens - num_decoding)
        begun = [(request, request.num_uncomputed_tokens) for request in lacking_many]
        enough = (half(left) if num_decoding else left) - sum(num_tokens for _, num_tokens in begun)
        return begun + self._to_admit(enough)

    def _rows_for_guesses(self, num_decoding: int, prompts: list[tuple[Request, int]]) -> int:
        """What known tokens leave of the budget: first one of each request that lacks no more, then prompts. Those may
        take half of the rest at most, as guesses may: neither keeps the other waiting for ever."""
        left = max(0, self._config.max_num_batched_tokens - num_decoding)
        return left - min(sum(num_tokens for _, num_tokens in prompts), half(left))

    def _num_that_begin(self, prompts: list[tuple[Request, int]]) -> int:
        """Requests that will decode after this step, if none does yet: their first guesses are made in it."""
        budget, count = self._config.max_num_batched_tokens, 0
        for request, num_tokens in prompts:
            budget -= num_tokens
            if budget < 0:
                break
            count += request.output_limit is None
        return count

    def _to_admit(self, enough: int) -> list[tuple[Request, int]]:
        """Those waiting whom seats and blocks allow, with the tokens to compute; until these are ``enough``."""
        if self._swapped:
            return []
        found: list[tuple[Request, int]] = []
        num_blocks = 0
        for request in self._waiting[: max(0, self._config.max_num_seqs - len(self._running))]:
            if enough <= 0:
                break
            matched = self._kv.match_prefix(request)
            room = self._kv.room_for(request, request.num_tokens + 1, matched) - num_blocks
            if room < self._blocks_to_keep_free():
                break  # nobody overtakes
            num_blocks = self._kv.pool.num_free - room
            found.append((request, request.num_tokens - len(matched) * self._kv.block_size_tokens))
            enough -= found[-1][1]
        return found

    def _share_out(self, requests: list[Request], num_rows: int) -> None:
        """Cut the guesses to be verified to ``num_rows``."""
        if not self._drafts:
            return
        guessed = [request.request_id for request in requests if request.request_id in self._drafts]
        shares = even_shares([len(self._drafts[request_id]) for request_id in guessed], num_rows)
        for request_id, share in zip(guessed, shares, strict=True):
            self._drafts[request_id] = self._drafts[request_id].first(share)

    def _num_left(self, request: Request) -> int:
        """Tokens that it may still get."""
        return request.most_tokens(self._max_model_tokens) - request.num_tokens

    def _schedule_running(
        self, requests: list[Request], shape: DraftShape | None, budget: StepBudget
    ) -> tuple[list[ScheduledRun], list[BlockCopy], bool]:
        """(runs, copies to host memory, whether anybody had to give way)."""
        runs: list[ScheduledRun] = []
        swap_out: list[BlockCopy] = []
        preempted = False
        for request in requests:
            num_tokens = budget.share(request.num_uncomputed_tokens)
            if num_tokens == 0 or len(runs) == self._config.max_num_seqs:
                break
            if request.state in _HAS_GIVEN_WAY:
                continue  # to an earlier one in this very step
            while not self._kv.grow(request, request.num_computed_tokens + num_tokens):
                preempted = True
                victim = max(self._may_give_way(runs), key=self._order)
                swap_out.extend(self._preempt(victim))
                if victim is request:
                    break
            else:
                run = self._run(request, num_tokens, shape)
                runs.append(run)
                budget.take(run)
        return runs, swap_out, preempted

    def _run(self, request: Request, num_tokens: int, shape: DraftShape | None) -> ScheduledRun:
        """A run of ``num_tokens``, for which there are blocks. Guesses come on top if blocks allow."""
        start = request.num_computed_tokens
        end = start + num_tokens
        samples = end == request.num_tokens
        draft = self._drafts.pop(request.request_id, None) if samples else None
        if draft is not None:
            draft = draft if len(draft) and self._grow_for_guesses(request, end + len(draft)) else None
        num_rows = num_tokens + (len(draft) if draft is not None else 0)
        # Of two tokens left this run brings one, and the other needs no guess.
        may_draft = shape is not None and samples and request.output_limit is None and self._num_left(request) > 2
        if shape is not None and may_draft:
            may_draft = self._grow_for_guesses(request, start + num_rows + self._draft_policy.slots_needed(shape))
        return ScheduledRun(
            spec=request.spec,
            known_token_ids=request.token_ids,
            start=start,
            num_tokens=num_tokens,
            block_ids=self._kv.table(request.request_id),
            samples=samples,
            draft=draft,
            may_draft=may_draft,
            num_deferred=start - request.num_complete_tokens,
            defers=self._may_defer and num_tokens == 1 and request.output_limit is None and not may_draft,
        )

    def _has_deferred_enough(self) -> bool:
        deferred = [request.num_computed_tokens - request.num_complete_tokens for request in self._running]
        return sum(deferred) >= _MAX_DEFERRED_TOKENS or max(deferred, default=0) >= _MAX_DEFERRED_TOKENS_EACH

    def _grow_for_guesses(self, request: Request, num_tokens: int) -> bool:
        """Only while every running request could still get a block: nobody gives way for guesses."""
        if self._kv.room_for(request, num_tokens) < len(self._running) or not self._kv.grow(request, num_tokens):
            return False
        self._stretched.append(request)
        return True

    def _give_back_for_guesses(self) -> None:
        """The blocks that the last step's guesses needed. Who has ended has none; another may have its id by now."""
        for request in self._stretched:
            if self._requests.get(request.request_id) is request:
                self._kv.shrink(request, request.num_tokens)
        self._stretched.clear()

    def _may_give_way(self, runs: list[ScheduledRun]) -> Iterator[Request]:
        """Not what is already part of the step, and not what is being handed over: others read its blocks. (That never
        needs to grow, so whoever lacks a block may give way itself.)"""
        settled = {run.spec.request_id for run in runs}
        return (r for r in self._running if r.request_id not in settled and r.output_limit is None)

    def _preempt(self, victim: Request) -> list[BlockCopy]:
        """Take the blocks of a running request: to host memory when that has room, else to be computed again."""
        self.num_preemptions += 1
        self._running.remove(victim)
        self._drafts.pop(victim.request_id, None)
        copies = self._kv.swap_out(victim) if victim.num_computed_tokens else None
        if copies is not None:
            victim.move(RequestState.SWAPPED)
            insort(self._swapped, victim, key=self._order)
            return copies
        victim.move(RequestState.QUEUED)
        self._kv.free(victim)
        insort(self._waiting, victim, key=self._order)
        return []

    def _bring_back(self) -> list[BlockCopy]:
        """Swap in, in order, while there is room for the request and its next token. They run from the next step on."""
        copies: list[BlockCopy] = []
        while self._swapped and len(self._running) < self._config.max_num_seqs:
            request = self._swapped[0]
            if self._kv.room_for(request, request.num_computed_tokens + 1) < self._blocks_to_keep_free():
                break
            copies.extend(self._kv.swap_in(self._swapped.pop(0)))
            request.move(RequestState.DECODING if request.num_uncomputed_tokens <= 1 else RequestState.PREFILLING)
            insort(self._running, request, key=self._order)
        return copies

    def _admit(self, runs: list[ScheduledRun], shape: DraftShape | None, budget: StepBudget) -> None:
        """Admit waiting requests in order, while budget, seats and memory for *all* their known tokens last. All their
        blocks are taken at once, so that two half-computed prompts never starve each other."""
        if not self._waiting:
            return  # as in most steps
        while self._waiting and not self._swapped and budget.is_left and len(self._running) < self._config.max_num_seqs:
            request = self._waiting[0]
            matched = self._kv.match_prefix(request)
            if self._kv.room_for(request, request.num_tokens + 1, matched) < self._blocks_to_keep_free():
                break
            self._waiting.pop(0)
            self._hold(request, matched)
            self._kv.grow(request, request.num_tokens)
            request.move(RequestState.PREFILLING)
            insort(self._running, request, key=self._order)
            runs.append(self._run(request, budget.share(request.num_uncomputed_tokens), shape))
            budget.take(runs[-1])

    def _blocks_to_keep_free(self) -> int:
        """So that running requests can grow for a while; none when there is nobody to grow."""
        return self._watermark_blocks if self._running else 0

    def _blocks_wanted_before(self, request: Request) -> int:
        """By those that wait here and come before ``request``: reservations must not keep them waiting for ever."""
        place = self._order(request)
        earlier = (other for other in (*self._waiting, *self._swapped) if self._order(other) <= place)
        return sum(self._kv.blocks_for(other.num_tokens + 1) for other in earlier)

    def _hold(self, request: Request, matched: list[int]) -> None:
        self._kv.adopt_prefix(request, matched)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.spec.num_prompt_tokens)
