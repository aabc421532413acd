"""Where the time of one answer went, as a line and as a table."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from eagleray.cli.client import ChatAnswer
from eagleray.cli.terminal import format_ms
from eagleray.core.acceptance import Acceptance
from eagleray.core.telemetry import Phase, TimeAccount


def spent_s(account: TimeAccount, client_total_s: float) -> dict[Phase, float]:
    """Seconds per phase that sum to what the client measured.

    What the client measured beyond the server's total lies between the two, so it counts as network.
    """
    spent: dict[Phase, float] = {phase: getattr(account, f"{phase.value}_s") for phase in Phase}
    spent[Phase.NETWORK] += client_total_s - account.total_s
    return spent


def timing_line(answer: ChatAnswer) -> str:
    """All of it in one line."""
    account, first_token_s = answer.account, answer.time_to_first_token_s
    parts = [f"{answer.total_s:.2f} s"]
    if first_token_s is not None:
        parts.append(f"first token {format_ms(first_token_s)}")
    if account is not None:
        parts.insert(0, f"{account.num_output_tokens} tokens")
        parts += [f"{phase.value} {format_ms(seconds)}" for phase, seconds in spent_s(account, answer.total_s).items()]
        parts.append(f"{account.num_cached_tokens} of {account.num_prompt_tokens} prompt tokens reused")
        if account.acceptance is not None:
            parts.append(tokens_per_step(account.acceptance))
    return " · ".join(parts)


def timing_table(answer: ChatAnswer, account: TimeAccount) -> Table:
    """One row: the phases, their sum, and what was measured at this end of the wire."""
    spent = spent_s(account, answer.total_s)
    first_token_s = answer.time_to_first_token_s
    columns = {
        **{phase.value + "*" * (phase is Phase.NETWORK): format_ms(seconds) for phase, seconds in spent.items()},
        "= sum": format_ms(sum(spent.values())),
        "client total": format_ms(answer.total_s),
        "client TTFT": "-" if first_token_s is None else format_ms(first_token_s),
        "prompt": str(account.num_prompt_tokens),
        "reused": str(account.num_cached_tokens),
        "output": str(account.num_output_tokens),
    }
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*columns.values())
    return table


def tokens_per_step(acceptance: Acceptance) -> str:
    """What guessing ahead has brought, in words."""
    return f"{acceptance.tokens_per_step:.2f} tokens per step"


def workers_of(account: TimeAccount) -> str:
    """Which workers served it, in words."""
    if account.prefill_worker is None or account.prefill_worker == account.decode_worker:
        return f"prefilled and decoded on {account.decode_worker}"
    return f"prefilled on {account.prefill_worker}, decoded on {account.decode_worker}"
