"""A report of the data check as lines for people."""

from __future__ import annotations

from collections.abc import Iterator

from training.utils.data_check import Figures, FileReport
from training.utils.data_figures import Lengths

_BAR = 16


def report_lines(report: FileReport) -> Iterator[str]:
    """All that is known of one file: figures, findings by weight, rows that are lost."""
    yield report.summary
    if report.figures:
        yield from _figures(report.figures)
    for level in ("error", "warning", "note"):
        for finding in report.findings:
            if finding.level == level:
                yield f"  {level}[{finding.name}]: {finding}"
    if len(report.losses) > 1 or report.lost > len(report.listed):
        yield "  why rows are lost:"
        yield from (f"    {loss}" for loss in report.losses)
    if report.listed:
        yield "  rows:"
        yield from (f"    line {row.line}: {row.outcome}: {row.reason}" for row in report.listed)
    if report.lost > len(report.listed):
        yield f"    and {report.lost - len(report.listed):,} more; --all lists them"


def _figures(figures: Figures) -> Iterator[str]:
    wide = max(12, *(len(name) + 1 for name in figures.lengths))
    yield f"  {figures.unit:<{wide}}{'min':>8}{'median':>9}{'mean':>9}{'p95':>8}{'max':>8}"
    for name, some in figures.lengths.items():
        yield (
            f"  {name:<{wide}}{some.minimum:>8,}{some.median:>9,.0f}{some.mean:>9,.1f}{some.p95:>8,.0f}"
            f"{some.maximum:>8,}"
        )
    yield from _histogram(figures.lengths)
    yield f"  different prompts: {figures.prompts:,}"
    if figures.unit == "tokens" and figures.saved_by_sharing:
        yield f"  not computed, since answers begin alike: {figures.saved_by_sharing:.1%} of the tokens"
    if figures.longer_is_chosen is not None and figures.longer_is_chosen.out_of:
        yield f"  the longer response is the chosen one: {figures.longer_is_chosen}"


def _histogram(lengths: dict[str, Lengths]) -> Iterator[str]:
    """A column of bars for each, of the same bins."""
    counts = [{each.up_to: each.rows for each in some.bins} for some in lengths.values()]
    most = max(max(column.values()) for column in counts)
    yield f"  {'up to':>10}  " + "".join(f"{name:<{_BAR + 10}}" for name in lengths).rstrip()
    for end in sorted(set().union(*counts)):
        cells = [column.get(end, 0) for column in counts]
        bars = [f"{'█' * -(-count * _BAR // most)} {count:,}" if count else "" for count in cells]
        yield f"  {end:>10,}  " + "".join(f"{bar:<{_BAR + 10}}" for bar in bars).rstrip()
