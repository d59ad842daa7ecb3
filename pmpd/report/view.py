"""A comparison as a reader sees it: plain texts in tables, cards and sentences, laid out by the page and by
the Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pmpd.evaluation.compare import BASE_KINDS, AnsweredRun, Comparison
from pmpd.metrics.base import AGAINST, Metric, get_metric
from pmpd.report.page import kind_class
from pmpd.report.source import Report, main_metric
from pmpd.report.style import kind_of

ScoreRow = Mapping[str, Any]
"""A row of SCORES."""


class Line(NamedTuple):
    """A line of a table's cell, and its class in the style sheet."""

    text: str
    css: str = ""


class Cell(NamedTuple):
    """A table's cell."""

    lines: tuple[Line, ...]

    def plain(self) -> str:
        return " ".join(line.text for line in self.lines)


def cell(*lines: str | tuple[str, str]) -> Cell:
    return Cell(tuple(Line(line) if isinstance(line, str) else Line(*line) for line in lines))


@dataclass(frozen=True)
class TableRow:
    """A row of a table: the run, its cells, the sources behind it."""

    name: str
    css: str
    cells: Sequence[Cell]
    sources: Sequence[int] = ()
    derived: bool = False


@dataclass(frozen=True)
class Table:
    """A table of runs."""

    titles: Sequence[Cell]
    rows: Sequence[TableRow]
    note: str


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    css: str
    label: str
    bits: str
    text: str


@dataclass(frozen=True)
class Section:
    """All that is said about one comparison, but for its figures and answers."""

    name: str
    metric: Metric
    against: str
    measure: str
    """The main metric and what it compares with, in words."""
    scores: Sequence[ScoreRow]
    conclusion: str
    counts: str
    cards: Sequence[Card]
    table: Table
    metrics: Table


def section_of(comparison: Comparison, report: Report) -> Section:
    scores = report.scores_of(comparison)
    name, against = main_metric(report, comparison)
    metric = get_metric(name)
    rows = main_rows(comparison, report)
    title = comparison.benchmark + ("" if comparison.split == "test" else f" ({comparison.split})")
    return Section(
        title,
        metric,
        against,
        f"{metric.label} against the {AGAINST[against]}",
        scores,
        conclusion(comparison, metric, rows),
        counts(comparison),
        cards(comparison, metric, rows),
        runs_table(comparison, report, metric, against, scores),
        metrics_table(comparison, scores),
    )


def main_rows(comparison: Comparison, report: Report) -> list[ScoreRow]:
    """The scores by the main metric, of all turns together: a row for each run."""
    main = (*main_metric(report, comparison), None)
    return [
        row for row in report.scores_of(comparison) if (row["metric"], row["against"], row["turn"]) == main
    ]


# ------------------------------------------------------------------------------------------------------------


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def number(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def counts(comparison: Comparison) -> str:
    """How many turns are behind the numbers, and which are not."""
    questions = len({key[0] for key in comparison.shared})
    failed = {
        run.name: len(run.errors) for run in comparison.runs.values() if run.errors and run.kind != "oracle"
    }
    left_out = len(
        set().union(*(set(run.rows) | set(run.errors) for run in comparison.runs.values()))
        - set(comparison.shared)
    )
    text = f"{len(comparison.shared)} turns of {questions} questions, answered by " + (
        f"all {len(comparison.runs)} runs" if len(comparison.runs) > 1 else "the one run"
    )
    lost = "".join(f" {_unanswered(run)}" for run in comparison.unanswered.values())
    if not left_out:
        return text + "; none failed or was left out." + lost
    errors = (
        f" ({', '.join(f'{count} failed in {name}' for name, count in failed.items())})" if failed else ""
    )
    return (
        text + f"; {left_out} turns are left out of every number, because not all runs have an answer to "
        f"them{errors}." + lost
    )


def _unanswered(run: AnsweredRun) -> str:
    first = next(iter(run.errors.values())).splitlines()[0]
    return (
        f"{run.name} is in no number, since all its {len(run.errors)} turns failed, the first with: {first}."
    )


def verdict(row: ScoreRow, metric: Metric, which: str = "") -> str:
    """ "better", "worse" or "" (the interval holds zero) of a paired difference. `which`: "" to the highest
    width, "nearest_" to that of nearest bits."""
    low, high = row[f"{which}difference_low"], row[f"{which}difference_high"]
    if low <= 0 <= high:
        return ""
    return "better" if (low > 0) == metric.higher_is_better else "worse"


def best_static(rows: Sequence[ScoreRow], metric: Metric) -> ScoreRow | None:
    """The cheapest static plan that is not surely worse than the uniform highest precision, else the one with
    the best score: chosen with these very turns in sight."""
    plans = [
        row
        for row in rows
        if row["kind"] == "static" and row["average_bits"] is not None and row.get("difference") is not None
    ]
    good = [row for row in plans if verdict(row, metric) != "worse"]
    sign = 1 if metric.higher_is_better else -1
    if good:
        return min(good, key=lambda row: (row["average_bits"], -sign * row["value"]))
    return max(plans, key=lambda row: sign * row["value"], default=None)


def subject(rows: Sequence[ScoreRow], metric: Metric) -> ScoreRow | None:
    """The run that the conclusion is about: the learned scheduler, else one that decides by itself, else the
    best static plan."""
    by_kind = {row["kind"]: row for row in reversed(rows) if row["average_bits"] is not None}
    others = [kind for kind in by_kind if kind not in (*BASE_KINDS, "static", "oracle", "random")]
    for kind in ("kv_cache", "regression", "confidence", *others):
        if kind in by_kind:
            return by_kind[kind]
    return best_static(rows, metric) or by_kind.get("random")


def conclusion(comparison: Comparison, metric: Metric, rows: Sequence[ScoreRow]) -> str:
    """What the numbers say, in one sentence."""
    row = subject(rows, metric)
    if row is None or row.get("difference") is None:
        were = "run was" if len(rows) == 1 else "runs were"
        return (
            f"{len(rows)} {were} scored by {metric.label}; without a run that mixes precisions and one of "
            f"uniform precision beside it nothing follows about mixing."
        )
    high, bits = comparison.high_bits or 0, row["average_bits"]
    grade = {"": "not surely different from", "better": "better than", "worse": "worse than"}

    def graded(which: str = "") -> str:
        ends = [row[f"{which}difference{end}"] for end in ("", "_low", "_high")]
        return "equal to" if not any(ends) else grade[verdict(row, metric, which)]

    text = (
        f"{row['run']} decoded at {bits:.2f} bits on average instead of {high}; its {metric.label} of "
        f"{row['value']:.3f} is {graded()} that of uniform {high} bit ({_range(row)})"
    )
    if row.get("nearest_difference") is not None and row["nearest_uniform"] != f"uniform-{high}":
        text += (
            f", and {graded('nearest_')} {row['nearest_uniform']}'s, the uniform run of "
            f"nearest bits ({_range(row, 'nearest_')}{_more_bits(row, rows)})"
        )
    if row.get("decode_time_ratio"):
        low, most = row.get("decode_time_ratio_low"), row.get("decode_time_ratio_high")
        spread = f"measured from {low:.2f} to {most:.2f}" if low and most else "measured"
        busy = "" if comparison.speed.idle else " on a machine not known to be idle"
        text += (
            f", at {row['decode_time_ratio']:.2f} times the decode time of uniform {high} bit "
            f"({spread}{busy})"
        )
    other = best_static(rows, metric)
    if other is not None and other is not row:
        plan = "the best fixed plan"
        if verdict(other, metric) != "worse":
            plan = f"the cheapest fixed plan that is not surely worse than uniform {high} bit"
        text += f"; {plan}, {_scored(other)}"
    rival = best_within(rows, metric, bits) if row["kind"] != "static" else None
    if rival is not None and rival is not other:
        text += f"; in hindsight the best fixed plan with no more bits, {_scored(rival)}"
    return text + "."


def best_within(rows: Sequence[ScoreRow], metric: Metric, bits: float) -> ScoreRow | None:
    """The static plan of the best score among those of at most `bits` average bits, chosen with these very
    turns in sight."""
    sign = 1 if metric.higher_is_better else -1
    plans = [row for row in rows if row["kind"] == "static" and (row["average_bits"] or bits + 1) <= bits]
    return max(plans, key=lambda row: sign * row["value"], default=None)


def _scored(row: ScoreRow) -> str:
    return f"{row['run']}, has {row['value']:.3f} at {row['average_bits']:.2f} bits"


def _more_bits(row: ScoreRow, rows: Sequence[ScoreRow]) -> str:
    """How many more or fewer bits the uniform run of nearest bits has, where that can be seen."""
    nearest = next(other["average_bits"] for other in rows if other["run"] == row["nearest_uniform"])
    more = round(nearest - row["average_bits"], 2)
    return f"; that run has {abs(more):.2f} bits {'more' if more > 0 else 'less'}" if more else ""


def _range(row: ScoreRow, which: str = "") -> str:
    value, low, high = (signed(row[f"{which}difference{end}"]) for end in ("", "_low", "_high"))
    return f"{value}, 95 % {low} to {high}"


def cards(comparison: Comparison, metric: Metric, rows: Sequence[ScoreRow]) -> list[Card]:
    """The schedulers that decide by themselves, the best static plan, the oracle: each in one sentence."""
    found = [row for row in rows if row["kind"] not in (*BASE_KINDS, "static", "oracle")]
    static = best_static(rows, metric)
    found += [static] if static is not None else []
    found += [row for row in rows if row["kind"] == "oracle"]
    result = []
    for row in found:
        if row["average_bits"] is None:
            continue
        text = f"average bits; {metric.label} {row['value']:.3f}"
        if row.get("difference") is not None:
            low, high = signed(row["difference_low"]), signed(row["difference_high"])
            text += (
                f", {signed(row['difference'])} to uniform {comparison.high_bits} bit (95 % {low} to {high})"
            )
        if row.get("decode_time_ratio"):
            text += f"; decode time × {row['decode_time_ratio']:.2f}"
        label = kind_of(row["kind"]).label
        if row["kind"] == "static":
            label = f"best static plan: {row['run'].removeprefix('static-')} (hindsight)"
        result.append(Card(kind_class(row["kind"]), label, f"{row['average_bits']:.2f}", text))
    return result


# ------------------------------------------------------------------------------------------------------------


def _difference_lines(row: ScoreRow, metric: Metric, which: str = "") -> list[tuple[str, str]]:
    """A paired difference and its interval, coloured where that excludes zero."""
    if row.get(f"{which}difference") is None:
        return [("–", "")]
    value, low, high = (signed(row[f"{which}difference{end}"]) for end in ("", "_low", "_high"))
    return [(value, verdict(row, metric, which)), (f"{low} to {high}", "ci")]


def _nearest(row: ScoreRow, rows: Sequence[ScoreRow]) -> str:
    """Which uniform run is nearest in average bits, and how many more or fewer this one has."""
    name = row.get("nearest_uniform")
    if name is None:
        return ""
    bits = next(other["average_bits"] for other in rows if other["run"] == name)
    return f"to {name} ({signed(row['average_bits'] - bits)} bits)"


def runs_table(
    comparison: Comparison, report: Report, metric: Metric, against: str, scores: Sequence[ScoreRow]
) -> Table:
    rows = [
        row for row in scores if (row["metric"], row["against"], row["turn"]) == (metric.name, against, None)
    ]
    high = f"{comparison.high_bits} bit"
    titles = (
        cell("Run"), cell("Average", "bits"), cell(metric.label, "and 95 % interval"),
        cell("Difference to", f"uniform {high}"), cell("Difference to uniform", "of nearest bits"),
        cell("Decode time", f"to {high}"), cell("Decode time", "to 16 bit"), cell("Exact", "answers"),
        cell("Ended", "by itself"), cell("Turns"), cell("Failed"), cell("Source"),
    )  # fmt: skip
    exact = {
        row["run"]: row["value"] for row in scores if row["metric"] == "exact_match" and row["turn"] is None
    }
    lines = []
    for row in rows:
        run = comparison.runs[row["run"]]
        nearest = _nearest(row, rows)
        cells = (
            cell(number(row["average_bits"], 3)),
            cell(f"{row['value']:.4f}", (f"{row['low']:.3f} to {row['high']:.3f}", "ci")),
            cell(*_difference_lines(row, metric)),
            cell(*_difference_lines(row, metric, "nearest_"), *([(nearest, "ci")] if nearest else [])),
            _time_cell(row, "decode_time_ratio", *_decisions(row)),
            _time_cell(row, "decode_time_ratio_16"),
            cell(number(None if run.name not in exact else 100 * exact[run.name], 0, " %")),
            cell(f"{100 * _ended(comparison, run):.0f} %"),
            cell(str(row["rows"])),
            cell(str(row["error_rows"])),
        )
        sources = report.run_sources.get((comparison.benchmark, comparison.split, run.name), ())
        derived = run.kind == "oracle"
        lines.append(
            TableRow(run.name, kind_class(run.kind), cells, () if derived else tuple(sources), derived)
        )
    note = (
        f"Against the {AGAINST[against]}. Average bits: mean over decode forwards. Decode time: speed model, "
        "forwards by precision × measured seconds of one; below it the lowest and highest of the single "
        f"measurements, {speed_caveat(comparison)}. Differences are paired by question; coloured where "
        "the 95 % interval excludes zero. Whether mixing precisions is worth it at equal cost is the "
        "difference to the uniform run of nearest average bits. The oracle chose, with hindsight, the "
        "cheapest of the static plans that is as good as never switching, per conversation."
    )
    return Table(titles, lines, note)


def _time_cell(row: ScoreRow, name: str, *more: tuple[str, str]) -> Cell:
    value, low, high = (row.get(name + end) for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return cell(number(value, 2, "×"), *more)
    return cell(number(value, 2, "×"), (f"{low:.2f} to {high:.2f}", "ci"), *more)


TOLD_SHARE = 0.005
"""Of the decode seconds: decisions that took less are not worth a line."""


def _decisions(row: ScoreRow) -> list[tuple[str, str]]:
    """What the scheduler's decisions took, which the speed model knows nothing of."""
    share = row.get("decision_share") or 0.0
    return [(f"and {share:.0%} for decisions", "ci")] if share >= TOLD_SHARE else []


def speed_caveat(comparison: Comparison) -> str:
    """Whether the measurements are worth trusting."""
    if comparison.speed.idle:
        return "made while the machine did nothing else"
    return "made while the machine was not known to be idle: take them as rough"


def _ended(comparison: Comparison, run: AnsweredRun) -> float:
    ended = sum(run.rows[key]["finish_reason"] in ("eos", "stop") for key in comparison.shared)
    return ended / len(comparison.shared)


def metrics_table(comparison: Comparison, scores: Sequence[ScoreRow]) -> Table:
    """Every metric of every run, also by turn."""
    columns = list(dict.fromkeys((row["metric"], row["against"]) for row in scores))
    by_cell = {(row["run"], row["turn"], row["metric"], row["against"]): row for row in scores}
    turns = sorted({row["turn"] for row in scores}, key=lambda turn: turn or 0)
    titles = [cell("Run"), cell("Turn")]
    titles += [cell(get_metric(metric).label, (AGAINST[against], "ci")) for metric, against in columns]
    lines = []
    for run in comparison.runs.values():
        for turn in turns:
            found = [by_cell.get((run.name, turn, metric, against)) for metric, against in columns]
            lines.append(
                TableRow(run.name, kind_class(run.kind), [cell(str(turn or "all")), *map(_value_cell, found)])
            )
    scales = "; ".join(
        f"{metric.label} {metric.scale}" + ("" if metric.higher_is_better else " (lower is better)")
        for metric in map(get_metric, dict.fromkeys(metric for metric, _ in columns))
    )
    return Table(titles, lines, f"Values with 95 % intervals. Scales: {scales}.")


def _value_cell(row: ScoreRow | None) -> Cell:
    return (
        cell("–")
        if row is None
        else cell(f"{row['value']:.3f}", (f"{row['low']:.3f} to {row['high']:.3f}", "ci"))
    )
