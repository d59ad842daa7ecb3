"""A metric added from outside, with one entry, is in the scores, the figures and the report."""

from pathlib import Path

import pytest

from pmpd import storage
from pmpd.cli.flags.report import ReportJob
from pmpd.cli.report import main
from pmpd.evaluation.compare import compare
from pmpd.evaluation.score import ScoreConfig, pick_static, score
from pmpd.metrics.base import METRICS, Metric, mean_of
from pmpd.report import figures
from tests.generation_rows import generation_rows, write_generations


def wrong_words(row, text: str, _) -> float:
    """Words that are not the reference's: 0 is best."""
    return sum(a != b for a, b in zip(row["output_text"].split(), text.split(), strict=False))


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Metric:
    metric = Metric(
        "wrong_words",
        "words <b>wrong</b>",
        mean_of(wrong_words),
        against=("reference_output",),
        scale="in words",
        higher_is_better=False,
    )
    monkeypatch.setitem(METRICS, metric.name, metric)
    return metric


def test_one_entry_is_enough_for_scores_figures_and_report(entry: Metric, tmp_path: Path) -> None:
    rows = generation_rows(questions=6, two_turns=2)
    write_generations(tmp_path / "in", rows)
    page = main(
        ReportJob((str(tmp_path / "in"),), str(tmp_path / "out"), metric=entry.name, resamples=200)
    ).read_text()
    scores = storage.read_table(tmp_path / "out" / "scores").to_pylist()
    mine = {row["run"]: row for row in scores if row["metric"] == entry.name and row["turn"] is None}
    assert mine["fp"]["value"] == 0 < mine["uniform-4"]["value"] < mine["uniform-2"]["value"]
    assert page.count("words &lt;b&gt;wrong&lt;/b&gt;") > 3, "headline, table of runs, table of metrics"
    assert "words <b>" not in page
    assert "words &lt;b&gt;wrong&lt;/b&gt; in words (lower is better)" in page
    table = page[page.index('id="demo-runs"') : page.index("</table>", page.index('id="demo-runs"'))]
    line = table[table.index("</span>uniform-2</th>") :].partition("</tr>")[0]
    assert f'<span class="worse">+{mine["uniform-2"]["difference"]:.3f}</span>' in line, "more is worse here"


def test_lower_values_are_higher_up_in_the_figure_and_within_a_budget(entry: Metric) -> None:
    (comparison,) = compare(generation_rows(questions=6, two_turns=2))
    scores = score(comparison, ScoreConfig(resamples=200))
    (axes,) = figures.quality(comparison, scores, entry.name, "reference_output").axes
    assert entry.label in axes.get_ylabel()
    assert axes.yaxis_inverted()
    static = [
        row for row in scores if (row["kind"], row["metric"], row["turn"]) == ("static", entry.name, None)
    ]
    best = min(static, key=lambda row: row["value"])
    high = best["value"] - best["difference"]
    chosen = pick_static(scores, entry.name, "reference_output", best["value"] / high - 1 + 1e-9)
    assert chosen["run"] == best["run"]


def test_a_metric_is_scored_only_where_its_benchmarks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    only = Metric("only", "only", mean_of(lambda *_: 1.0), benchmarks=frozenset({"cnn_dm"}))
    monkeypatch.setitem(METRICS, "only", only)
    for benchmark, there in (("demo", False), ("cnn_dm", True)):
        (comparison,) = compare(generation_rows(questions=3, two_turns=1, benchmark=benchmark))
        assert there == ("only" in {row["metric"] for row in score(comparison, ScoreConfig(resamples=200))})
