"""Accounts and snapshots as JSON shows them: of guesses not only the counts, which add up, but also what follows from
them."""

from __future__ import annotations

from typing import Any

import msgspec

from eagleray.core.snapshot import WorkerSnapshot
from eagleray.core.telemetry import TimeAccount
from eagleray.router.service import ServiceStatus


def account_report(account: TimeAccount | None) -> dict[str, Any] | None:
    """None before the end."""
    return None if account is None else _with_rates(account)


def status_report(status: ServiceStatus) -> dict[str, Any]:
    return {**msgspec.to_builtins(status), "workers": [_with_rates(worker) for worker in status.workers]}


def _with_rates(told: TimeAccount | WorkerSnapshot) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(told)
    if told.acceptance is not None:
        fields["acceptance"] |= {
            "acceptance_length": told.acceptance.acceptance_length,
            "rate_per_position": told.acceptance.rate_per_position,
        }
    return fields
