"""What judges said, as tables of the page and of the Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pmpd.evaluation.compare import Comparison
from pmpd.evaluation.judge_scores import ALL, JudgeScore, JudgeTable
from pmpd.metrics.base import Metric, get_metric, mean_of
from pmpd.report.page import kind_class
from pmpd.report.source import Report
from pmpd.report.view import (
    Cell,
    Line,
    ScoreRow,
    Table,
    TableRow,
    cell,
    conclusion,
    main_rows,
    signed,
    subject,
)


@dataclass(frozen=True)
class Judged:
    """One judge in one mode."""

    title: str
    conclusion: str
    """What it says of mixing, in one sentence; "" where it judged one question, or no run that mixes."""
    table: Table


def judged_of(comparison: Comparison, report: Report) -> list[Judged]:
    """The judges of this comparison's answers, in the order of the inputs."""
    rows = main_rows(comparison, report)
    return [
        Judged(_title(table), _conclusion(table, comparison, rows), _table(table, comparison, number))
        for benchmark, number, table in report.judged
        if benchmark == comparison.benchmark
    ]


def _title(table: JudgeTable) -> str:
    what = "ratings" if table.mode == "single" else "comparisons in pairs"
    return f"Judged by {table.judge}: {what}"


def _conclusion(table: JudgeTable, comparison: Comparison, rows: Sequence[ScoreRow]) -> str:
    """`rows`: the scores by the main metric, which know each run's bits."""
    of_all = [score for score in table.scores if score.category == ALL]
    if table.questions < 2:  # its intervals would have no width
        return ""
    if table.mode == "single":
        found = {score.run: asdict(score) for score in of_all}
        rating = Metric("rating", f"mean rating by {table.judge}", mean_of(lambda *_: 0.0), scale="1 to 10")
        rated = [
            {**row, "decode_time_ratio": None, **found[row["run"]]} for row in rows if row["run"] in found
        ]
        told = subject(rated, rating)
        return "" if told is None or told["difference"] is None else conclusion(comparison, rating, rated)
    others = {score.other_run for score in of_all}
    high = comparison.uniform_high.name if comparison.uniform_high else None
    against = high if high in others or len(others) > 1 else others.pop()
    won = {score.run: score for score in of_all if score.other_run == against}
    row = subject([row for row in rows if row["run"] in won], get_metric(rows[0]["metric"]))
    if row is None:
        return ""
    score = won[row["run"]]
    grade = "not surely different from"
    if not score.low <= 0.5 <= score.high:
        grade = "more than" if score.low > 0.5 else "less than"
    return (
        f"{row['run']}, at {row['average_bits']:.2f} bits on average, won {score.value:.3f} of its "
        f"comparisons with {against} by {table.judge}, a tie as half a win: {grade} half "
        f"(95 % {score.low:.3f} to {score.high:.3f})."
    )


def _table(table: JudgeTable, comparison: Comparison, number: int) -> Table:
    categories = list(dict.fromkeys(score.category for score in table.scores))
    cells = {(score.run, score.other_run, score.category): score for score in table.scores}
    rows = []
    for run, other in dict.fromkeys((score.run, score.other_run) for score in table.scores):
        kind = comparison.runs[run].kind if run in comparison.runs else ""
        found = [cells.get((run, other, category)) for category in categories]
        judged = found[0].judged if found[0] else 0
        rows.append(
            TableRow(
                run if other is None else f"{run} against {other}",
                kind_class(kind),
                [*map(_cell, found), cell(str(judged)), cell(str(table.errors.get(run, 0)))],
                (number,),
            )
        )
    counted = "Turns" if table.mode == "single" else "Compared"
    return Table(
        [cell("Run"), *map(cell, categories), cell(counted), cell("No verdict"), cell("Source")],
        rows,
        _note(table),
    )


def _cell(score: JudgeScore | None) -> Cell:
    if score is None:
        return cell("–")
    if score.questions < 2:  # its interval would have no width
        told = "" if score.difference is None else f", {signed(score.difference)}"
        return Cell((Line(f"{score.value:.2f}"), Line(f"one question{told}", "ci")))
    lines = [Line(f"{score.value:.2f}"), Line(f"{score.low:.2f} to {score.high:.2f}", "ci")]
    if (
        score.difference is not None
        and score.difference_low is not None
        and score.difference_high is not None
    ):
        low, high = score.difference_low, score.difference_high
        sure = "worse" if high < 0 else "better" if low > 0 else ""
        lines += [Line(signed(score.difference), sure), Line(f"{signed(low)} to {signed(high)}", "ci")]
    return Cell(tuple(lines))


def _note(table: JudgeTable) -> str:
    if table.mode == "single":
        base = f" Below each: the difference to {table.base} on the same turns." if table.base else ""
        return (
            f"Mean rating from 1 to 10 with its 95 % interval over {table.questions} questions, on the turns "
            f"that have a rating in every run.{base}"
        )
    return (
        f"Share of comparisons that the first run won, a tie as half a win, with its 95 % interval over "
        f"{table.questions} questions. Each comparison was asked twice, with the answers in both orders; it "
        f"is won only where both verdicts agree."
    )
