"""The account of a run for people, and as metrics."""

from __future__ import annotations

from datetime import timedelta

from rich.table import Table

from pipeline.goodput.accounting import CAUSES, Account


def account_table(account: Account) -> Table:
    """Where the time went: a row for each cause that took any."""
    lives = f"{account.attempts} attempts" if account.attempts > 1 else "one attempt"
    title = f"where the time went, over {lives}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("cause", "time", "share"):
        table.add_column(name, justify="left" if name == "cause" else "right", no_wrap=True)
    table.add_column("what it is")
    notes = dict(CAUSES)
    if account.mfu is not None:
        notes["compute"] += (
            f"; MFU {account.mfu:.1%} of {account.peak / 1e9:,.0f} GFLOP/s ({account.peak_name})"
        )
    for cause, count in (("redone", account.redone), ("skipped", account.skipped)):
        notes[cause] += f" ({count:,})"
    for cause, seconds in account.seconds.items():
        if seconds > 0:
            table.add_row(cause, _clock(seconds), f"{seconds / account.wall:.1%}", notes[cause])
    table.add_row("all", _clock(account.wall), "", f"goodput {account.goodput:.1%}: the share of compute")
    return table


def account_metrics(account: Account) -> dict[str, float]:
    """``goodput/share``, ``goodput/CAUSE_s`` and ``goodput/redone_steps``, as they stand in MLflow."""
    metrics = {f"goodput/{cause}_s": seconds for cause, seconds in account.seconds.items()}
    metrics |= {"goodput/share": account.goodput, "goodput/redone_steps": float(account.redone)}
    metrics |= {"goodput/attempts": float(account.attempts)}
    if account.mfu is not None:
        metrics["goodput/mfu"] = account.mfu
    return metrics


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return str(timedelta(seconds=round(seconds)))
