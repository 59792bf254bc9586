"""Periodic work: each function is one turn of a loop, and safe beside the same loop elsewhere."""

from collections.abc import Awaitable, Callable

from hostler_capacity.fleet import FleetView
from hostler_capacity.ledger import Ledger
from hostler_common import db, idempotency

Turn = Callable[[], Awaitable[object]]

FORGET_SECONDS = 3600.0


def refresh(view: FleetView) -> Turn:
    """Follow the database."""
    return view.refresh


def sweep(ledger: Ledger) -> Turn:
    """End claims whose time is up."""
    return ledger.sweep


def audit(ledger: Ledger) -> Turn:
    """Compare counters with the sum of their claims."""
    return ledger.audit


def forget_old_keys(pool: db.Pool) -> Turn:
    """Drop idempotency keys that nobody will send again."""

    async def turn() -> None:
        await idempotency.forget_old(pool)

    return turn
