"""What came of guesses: for who decides how much to guess, and for users."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.engine.scheduling.plan import ScheduledRun, StepPlan, StepResult
from eagleray.engine.speculation.controller import DraftPolicy, StepTimes
from eagleray.engine.speculation.tree import DraftShape


class GuessAccounts:
    """Tells a policy of the steps that have ended, in order, each while the next one computes."""

    def __init__(self, policy: DraftPolicy) -> None:
        self._policy = policy
        self._guessed: DraftShape | None = None  # by the last step
        self._verified: DraftShape | None = None  # by the last one: what the one before it had guessed
        self._drafted: dict[str, int] = {}  # guesses that it made, for each request for which it tried
        self._num_untold = 0  # plain steps that the policy need not be told of
        self._untold_size = 0  # of so many requests each

    def note(
        self, plan: StepPlan, result: StepResult, counted: Sequence[tuple[ScheduledRun, int]], outside_s: float
    ) -> None:
        """``counted``: the runs of requests that were still there, with the tokens that each sampled. ``outside_s``:
        what the step took besides computing and guessing."""
        guessed, self._guessed = self._guessed, plan.shape
        is_decode_only = bool(plan.runs) and plan.is_decode_only
        is_like_the_last, self._verified = guessed == self._verified, guessed
        is_plain = is_decode_only and guessed is None and plan.shape is None
        if is_plain and self._num_untold > 0 and len(plan.runs) == self._untold_size:
            self._num_untold -= 1  # as in most steps where guessing does not pay
            return
        self._num_untold = 0
        if guessed is not None and self._drafted:
            self._note_acceptance(guessed, counted)
        self._drafted = {}
        if plan.shape is not None:
            drafts = result.drafts
            self._drafted = {
                run.spec.request_id: len(drafts.get(run.spec.request_id, ())) for run, _ in counted if run.may_draft
            }
        if is_decode_only:
            self._untold_size = len(plan.runs)
            self._num_untold = self._policy.note_times(
                self._times(plan, result, counted, guessed, outside_s, is_like_the_last)
            )

    def _note_acceptance(self, guessed: DraftShape, counted: Sequence[tuple[ScheduledRun, int]]) -> None:
        """Not of those that had no guesses, or were cut short, for want of room or because they have just come here:
        that does not tell how often guesses come true. Where none was found, none did."""
        counts = [
            (len(run.draft or ()), num_sampled)
            for run, num_sampled in counted
            if num_sampled and self._drafted.get(run.spec.request_id) == len(run.draft or ())
        ]
        if counts:
            num_guesses, gained = zip(*counts, strict=True)
            self._policy.note_acceptance(guessed, sum(num_guesses), gained)

    def _times(
        self,
        plan: StepPlan,
        result: StepResult,
        counted: Sequence[tuple[ScheduledRun, int]],
        guessed: DraftShape | None,
        outside_s: float,
        is_like_the_last: bool,
    ) -> StepTimes:
        num_caught_up = 0
        if self._policy.may_defer:
            num_caught_up = sum([run.num_deferred for run in plan.runs if not run.defers])
        num_rows = sum([run.num_rows for run in plan.runs])
        return StepTimes(
            len(plan.runs),
            num_rows,
            result.verify_s,
            result.draft_s,
            plan.shape,
            guessed,
            num_caught_up,
            outside_s,
            is_like_the_last,
            sum([num_sampled for _, num_sampled in counted]) / len(counted) if counted else 1.0,
        )


def acceptances_of(
    runs: Sequence[ScheduledRun], result: StepResult
) -> tuple[Sequence[Acceptance | None], Acceptance | None]:
    """What came of guesses as they were verified, whatever requests took of them: (of each run, None unless it decoded;
    of the step, whose time they share)."""
    verify_s, draft_s = result.verify_s, result.draft_s
    without = Acceptance(num_steps=1, verify_s=verify_s, draft_s=draft_s)  # of whoever has no guesses
    if len(runs) == 1 and runs[0].draft is None:  # what a small model's steps are, who have no time for more
        part = without if runs[0].samples and runs[0].num_tokens == 1 else None
        return (part,), part
    parts: list[Acceptance | None] = []
    guessed: list[Acceptance] = []
    num_without = 0
    for run in runs:
        if not run.samples or run.num_tokens > 1:
            parts.append(None)
        elif run.draft is None:
            parts.append(without)
            num_without += 1
        else:
            num_accepted = len(result.sampled[run.spec.request_id]) - 1
            guessed.append(Acceptance.of_step(len(run.draft), max(run.draft.depths), num_accepted, verify_s, draft_s))
            parts.append(guessed[-1])
    if not guessed:
        return parts, msgspec.structs.replace(without, num_steps=num_without) if num_without else None
    total = total_acceptance([Acceptance(num_steps=num_without), *guessed])
    return parts, None if total is None else msgspec.structs.replace(total, verify_s=verify_s, draft_s=draft_s)
