"""Scores -> one self-contained HTML page, figures and Markdown. No torch, no Ray, no network.

Everything a reader needs to check a number stands on the page: which data set folder it came from, what made
that folder (its manifest), how many turns are behind it and which were left out.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd import storage
from pmpd.benchmarks import BENCHMARKS
from pmpd.errors import UserError
from pmpd.evaluation.compare import Comparison, Run
from pmpd.evaluation.score import ScoreConfig
from pmpd.metrics.base import DATASET, REFERENCE_OUTPUT
from pmpd.metrics.precision import decode_forwards
from pmpd.metrics.rouge import rouge_l
from pmpd.metrics.text import bleu_signature, first_divergence
from pmpd.report import figures, page
from pmpd.report.figures import AGAINST_LABELS, KINDS, METRIC_LABELS

BROWSER_QUESTIONS = 60
"""Turns of a benchmark that the browser of answers holds; more would make the page too heavy for a phone."""


@dataclass(frozen=True)
class Source:
    """A data set that rows were read from."""

    number: int
    folder: str
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """All that goes on the page."""

    comparisons: Sequence[Comparison]
    scores: Sequence[Mapping[str, Any]]
    """Rows of SCORES."""
    sources: Sequence[Source]
    run_sources: Mapping[tuple[str, str, str], Sequence[int]]
    """(benchmark, split, run) -> numbers of the sources its rows came from."""
    config: ScoreConfig


def main_metric(comparison: Comparison, scores: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(metric, against) of the quality figure: the benchmark's own if it was scored, else the first that was.
    `scores`: its own rows."""
    known = {(row["metric"], row["against"]) for row in scores}
    if not known:
        raise UserError(
            f"{comparison.benchmark}: nothing to compare the answers with: it has no references of its own "
            f"and no answers of the "
            "unquantized model are among the inputs; run pmpd generate --schedulers fp, or give its "
            "folder too"
        )
    benchmark = BENCHMARKS.get(comparison.benchmark)
    wanted = [(benchmark.metric, benchmark.reference)] if benchmark else []
    for choice in (*wanted, ("rouge_l", REFERENCE_OUTPUT), ("rouge_l", DATASET)):
        if choice in known:
            return choice
    return sorted(known)[0]


def write_report(report: Report, folder: Path) -> dict[str, Path]:
    """Writes report.html, report.md and figures/*.png and *.svg; returns name -> path of what it wrote."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    sections, markdown = [], []
    for comparison in report.comparisons:
        drawn = _draw(comparison, report)
        for name, (figure, _) in drawn.items():
            stem = f"{_slug(comparison)}-{name}"
            for suffix, content in ((".png", figures.to_png(figure)), (".svg", figures.to_svg(figure))):
                path = folder / "figures" / (stem + suffix)
                path.write_bytes(content)
                written[stem + suffix] = path
        sections.append(_section(comparison, report, drawn))
        markdown.append(_markdown(comparison, report, drawn))
    title = (
        f"Precision and quality: "
        f"{', '.join(sorted({comparison.model_id for comparison in report.comparisons}))}"
    )
    body = (
        _header(report, title)
        + "<main>"
        + "".join(sections)
        + _provenance(report)
        + "</main>"
        + _footer(report)
    )
    written["report.html"] = folder / "report.html"
    text = page.PAGE.format(title=html.escape(title), css=page.CSS, body=body, script=page.SCRIPT)
    written["report.html"].write_text(text, encoding="utf-8")
    written["report.md"] = folder / "report.md"
    written["report.md"].write_text(
        f"# {title}\n\n" + "\n".join(markdown) + _markdown_provenance(report), encoding="utf-8"
    )
    return written


def _slug(comparison: Comparison) -> str:
    return (
        comparison.benchmark if comparison.split == "test" else f"{comparison.benchmark}-{comparison.split}"
    )


def _of(report: Report, comparison: Comparison) -> list[Mapping[str, Any]]:
    return [
        row
        for row in report.scores
        if row["benchmark"] == comparison.benchmark and row["split"] == comparison.split
    ]


def _draw(comparison: Comparison, report: Report) -> dict[str, tuple[Any, str]]:
    """Name -> (figure, caption), for the figures that this comparison has data for."""
    scores = _of(report, comparison)
    metric, against = main_metric(comparison, scores)
    drawn = {
        "quality": (
            figures.draw(lambda: figures.quality(comparison, scores, metric, against)),
            f"Quality against cost: {METRIC_LABELS[metric]} against the {AGAINST_LABELS[against]} by average "
            f"bits. Bars are 95 % "
            "intervals. Higher and further left is better; the static line joins the plans that no cheaper "
            "one equals.",
        ),
        "lengths": (
            figures.draw(lambda: figures.lengths(comparison)),
            "Length of the answers. Runs that ramble or stop early stand out here.",
        ),
    }
    if comparison.speed.seconds:
        devices = ", ".join(comparison.speed.devices) or "an unnamed device"
        count = max(comparison.speed.workers.values())
        drawn["speed"] = (
            figures.draw(lambda: figures.speed(comparison)),
            f"Decode speed by precision, one row alone, measured by the run's own {count} "
            f"worker{'s' * (count > 1)} on {devices}.",
        )
    if figures.switching_runs(comparison):
        drawn["switches"] = (
            figures.draw(lambda: figures.switches(comparison)),
            "When each scheduler switches: share of turns by the number of decode forwards at the higher "
            "precision of a pair.",
        )
    return {name: drawn[name] for name in ("quality", "speed", "switches", "lengths") if name in drawn}


# ------------------------------------------------------------------------------------------------------------


def _header(report: Report, title: str) -> str:
    links = "".join(f'<li><a href="#{_slug(c)}">{html.escape(_name(c))}</a></li>' for c in report.comparisons)
    lead = (
        "Decoding may start in a high weight precision and go on in lower ones. Each benchmark below shows "
        "how much quality each way of "
        "choosing the switch costs, and how many bits it saves."
    )
    return (
        f'<header><h1>{html.escape(title)}</h1><p class="lead">{lead}</p>'
        f'<nav aria-label="Contents"><ul>{links}<li><a '
        f'href="#provenance">Provenance</a></li></ul></nav></header>'
    )


def _name(comparison: Comparison) -> str:
    return comparison.benchmark + ("" if comparison.split == "test" else f" ({comparison.split})")


def _section(comparison: Comparison, report: Report, drawn: Mapping[str, tuple[Any, str]]) -> str:
    scores = _of(report, comparison)
    slug = _slug(comparison)
    graphics = "".join(
        f'<figure id="{slug}-{name}">'
        f"{figures.to_inline_svg(figure, f'{slug}-{name}', html.escape(caption, quote=True))}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, (figure, caption) in drawn.items()
    )
    return (
        f"<section "
        f'id="{slug}"><h2>{html.escape(_name(comparison))}</h2><p>{html.escape(_counts(comparison))}</p>'
        + _cards(comparison, scores)
        + f'<div class="figures">{graphics}</div>'
        + "<h3>All runs</h3>"
        + _table(comparison, report, scores)
        + _metrics_table(comparison, scores)
        + "<h3>Answers, token by token</h3>"
        + _browser(comparison)
        + "</section>"
    )


def _counts(comparison: Comparison) -> str:
    questions = len({key[0] for key in comparison.shared})
    failed = {
        run.name: len(run.errors) for run in comparison.runs.values() if run.errors and run.kind != "oracle"
    }
    left_out = len(
        set().union(*(set(run.rows) | set(run.errors) for run in comparison.runs.values()))
        - set(comparison.shared)
    )
    text = (
        f"{len(comparison.shared)} turns of {questions} questions, answered by all {len(comparison.runs)} "
        f"runs"
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


def _unanswered(run: Run) -> str:
    first = next(iter(run.errors.values())).splitlines()[0]
    return (
        f"{run.name} is in no number, since all its {len(run.errors)} turns failed, the first with: {first}."
    )


def _cards(comparison: Comparison, scores: Sequence[Mapping[str, Any]]) -> str:
    """The learned scheduler and what stands beside it, each in one sentence."""
    metric, against = main_metric(comparison, scores)
    rows = {
        row["run"]: row
        for row in scores
        if (row["metric"], row["against"], row["turn"]) == (metric, against, None)
    }
    cards = []
    for kind in ("kv_cache", "confidence", "random", "oracle"):
        row = next(
            (row for row in rows.values() if row["kind"] == kind and row["average_bits"] is not None), None
        )
        if row is None:
            continue
        label, color, _ = KINDS[kind]
        text = f"average bits; {METRIC_LABELS[metric]} {row['value']:.3f}"
        if row.get("difference") is not None:
            low, high = _signed(row["difference_low"]), _signed(row["difference_high"])
            text += (
                f", {_signed(row['difference'])} to uniform {comparison.high_bits} bit (95 % {low} to {high})"
            )
        if row.get("decode_time_ratio"):
            text += f"; decode time × {row['decode_time_ratio']:.2f}"
        cards.append(
            f'<li style="--c:{color}">{html.escape(label)}<b>{row["average_bits"]:.2f}</b>'
            f'<span class="soft">{html.escape(text)}</span></li>'
        )
    return f'<ul class="cards">{"".join(cards)}</ul>' if cards else ""


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _difference(row: Mapping[str, Any], which: str = "") -> tuple[str, str, str] | None:
    """A paired difference, the ends of its interval, as text. `which`: "" to the highest width, "nearest_" to
    that of nearest bits."""
    if row.get(f"{which}difference") is None:
        return None
    value, low, high = (_signed(row[f"{which}difference{end}"]) for end in ("", "_low", "_high"))
    return value, low, high


def _difference_cell(row: Mapping[str, Any], which: str = "") -> str:
    """Coloured where the interval excludes zero."""
    difference = _difference(row, which)
    if difference is None:
        return "–"
    sure = (
        "worse"
        if row[f"{which}difference_high"] < 0
        else "better"
        if row[f"{which}difference_low"] > 0
        else ""
    )
    return (
        f"<span class='{sure}'>{difference[0]}</span><br><span class='ci'>{difference[1]} to "
        f"{difference[2]}</span>"
    )


def _nearest(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Which uniform run is nearest in average bits, and how many more or fewer this one has."""
    name = row.get("nearest_uniform")
    if name is None:
        return ""
    bits = next(other["average_bits"] for other in rows if other["run"] == name)
    return f"to {name} ({_signed(row['average_bits'] - bits)} bits)"


def _table(comparison: Comparison, report: Report, scores: Sequence[Mapping[str, Any]]) -> str:
    metric, against = main_metric(comparison, scores)
    rows = [row for row in scores if (row["metric"], row["against"], row["turn"]) == (metric, against, None)]
    high = f"{comparison.high_bits} bit"
    titles = (
        "Run", "Average<br>bits", f"{METRIC_LABELS[metric]}<br>and 95 % interval", f"Difference "
                                                                                   f"to<br>uniform {high}",
        "Difference to uniform<br>of nearest bits", f"Decode time<br>to {high}", "Decode time<br>to 16 bit",
        "Exact<br>answers",
        "Ended<br>by itself", "Turns", "Failed", "Source",
    )  # fmt: skip
    head = "".join(f"<th scope='col'>{title}</th>" for title in titles)
    exact = {
        row["run"]: row["value"] for row in scores if row["metric"] == "exact_match" and row["turn"] is None
    }
    lines = []
    for row in rows:
        run = comparison.runs[row["run"]]
        _, color, _ = KINDS.get(run.kind, ("", "#5f6b76", ""))
        nearest = _nearest(row, rows)
        cells = [
            _number(row["average_bits"], 3),
            f"{row['value']:.4f}<br><span class='ci'>{row['low']:.3f} to {row['high']:.3f}</span>",
            _difference_cell(row),
            _difference_cell(row, "nearest_")
            + (f"<br><span class='ci'>{html.escape(nearest)}</span>" if nearest else ""),
            _number(row["decode_time_ratio"], 2, "×"),
            _number(row["decode_time_ratio_16"], 2, "×"),
            _number(None if run.name not in exact else 100 * exact[run.name], 0, " %"),
            f"{100 * _ended(comparison, run):.0f} %",
            str(row["rows"]),
            str(row["error_rows"]),
            _source_links(report, comparison, run),
        ]
        name = f'<span class="dot" style="--c:{color}"></span>{html.escape(run.name)}'
        lines.append(f"<tr><th scope='row'>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    note = (
        f"Against the {AGAINST_LABELS[against]}. Average bits: mean over decode forwards. Decode time: speed "
        f"model, forwards by precision "
        "× measured seconds of one. Differences are paired by question; coloured where the 95 % interval "
        "excludes zero. Whether mixing "
        "precisions is worth it at equal cost is the difference to the uniform run of nearest average bits. "
        "The oracle chose, "
        "with hindsight, the cheapest of the static plans that is as good as never switching, per "
        "conversation."
    )
    return (
        f'<div class="scroll"><table id="{_slug(comparison)}-runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="note">{html.escape(note)}</p>'
    )


def _ended(comparison: Comparison, run: Run) -> float:
    return sum(run.rows[key]["finish_reason"] == "eos" for key in comparison.shared) / len(comparison.shared)


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def _source_links(report: Report, comparison: Comparison, run: Run) -> str:
    numbers = report.run_sources.get((comparison.benchmark, comparison.split, run.name), ())
    if run.kind == "oracle":
        return "derived"
    return " ".join(f'<a href="#source-{number}">[{number}]</a>' for number in numbers) or "–"


def _columns(scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    seen = dict.fromkeys((row["metric"], row["against"]) for row in scores)
    return list(seen)


def _metrics_table(comparison: Comparison, scores: Sequence[Mapping[str, Any]]) -> str:
    """Every metric of every run, also by turn, folded away."""
    columns = _columns(scores)
    by_cell = {(row["run"], row["turn"], row["metric"], row["against"]): row for row in scores}
    turns = sorted({row["turn"] for row in scores}, key=lambda turn: turn or 0)
    names = [
        f"{METRIC_LABELS[metric]}<br><span class='ci'>{against.replace('_', ' ')}</span>"
        for metric, against in columns
    ]
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("Run", "Turn", *names))
    lines = []
    for run in comparison.runs.values():
        for turn in turns:
            cells = [by_cell.get((run.name, turn, metric, against)) for metric, against in columns]
            text = "".join(f"<td>{_value_cell(row)}</td>" for row in cells)
            lines.append(
                f"<tr><th scope='row'>{html.escape(run.name)}</th><td>{turn or 'all'}</td>{text}</tr>"
            )
    note = (
        "Values with 95 % intervals. SacreBLEU on its scale of 0 to 100, first divergence in tokens, the "
        "others on 0 to 1."
    )
    return (
        f'<details><summary>Every metric, by turn</summary><div class="scroll"><table '
        f'id="{_slug(comparison)}-metrics">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div><p "
        f'class="note">{note}</p></details>'
    )


def _value_cell(row: Mapping[str, Any] | None) -> str:
    return (
        "–"
        if row is None
        else f"{row['value']:.3f}<br><span class='ci'>{row['low']:.3f} to {row['high']:.3f}</span>"
    )


def _browser(comparison: Comparison) -> str:
    keys = comparison.shared[:BROWSER_QUESTIONS]
    runs = [run for run in comparison.runs.values() if run.kind != "oracle"]
    keys = sorted(
        keys, key=lambda key: (runs[0].rows[key]["category"], runs[0].rows[key]["question_id"], key)
    )
    reference = comparison.unquantized
    questions, answers = [], []
    for key in keys:
        row = runs[0].rows[key]
        title = f"{row['category']} · {row['question_id']} · turn {row['turn']}" + (
            f" · choice {row['choice']}" if row["choice"] else ""
        )
        # The prompt of the first run; from the second turn on, each run's prompt holds its own first answer.
        questions.append({"title": title, "prompt": row["prompt_text"], "reference": row["reference_text"]})
        answers.append([_answer(run.rows[key], reference.rows[key] if reference else None) for run in runs])
    names = [run.name for run in runs]
    left = names.index("kv_cache") if "kv_cache" in names else len(names) - 1
    data = {"questions": questions, "answers": answers, "runs": names, "left": left, "right": 0}
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # no text of a model becomes markup
    widths = sorted({bits for run in runs for key in keys for bits in _widths(run.rows[key])}, reverse=True)
    legend = "".join(f'<span class="b{bits}">{bits} bit</span>' for bits in widths)
    limited = len(comparison.shared) - len(keys)
    note = (
        f"The first {len(keys)} of {len(comparison.shared)} turns, to keep the page light; all are in the "
        f"Parquet. "
        if limited
        else ""
    )
    note += (
        "From the second turn on, a run's prompt holds its own first answer; the prompt shown is that of "
        "the first run in the list."
    )
    return page.BROWSER.format(data=embedded, key=legend) + f'<p class="note">{html.escape(note)}</p>'


def _widths(row: Mapping[str, Any]) -> list[int]:
    return [part["bits"] for part in row["precision_trace"]]


def _answer(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    forwards = decode_forwards(row["precision_trace"])
    total = sum(forwards.values())
    note = (
        f"{row['output_tokens']} tokens, ended by "
        f"{'itself' if row['finish_reason'] == 'eos' else 'the limit'}"
    )
    note += f", {sum(bits * count for bits, count in forwards.items()) / total:.2f} bits" if total else ""
    if reference is not None and reference is not row:
        same = first_divergence(row["output_ids"], reference["output_ids"])
        note += (
            f", ROUGE-L {rouge_l(row['output_text'], reference['output_text']):.3f} to the unquantized "
            f"answer, first {same} tokens equal"
        )
    return {
        "pieces": row["output_pieces"],
        "trace": [[part["bits"], part["count"]] for part in row["precision_trace"]],
        "note": note,
    }


def _provenance(report: Report) -> str:
    parts = ['<section id="provenance"><h2>Provenance</h2>', f"<p>{html.escape(_method(report))}</p>"]
    for source in report.sources:
        manifest = source.manifest
        facts = {
            "written": manifest.get("written"),
            "commit": manifest.get("git_commit"),
            "device": manifest.get("device"),
            "rows": (manifest.get("counts") or {}).get("rows"),
            "seconds": manifest.get("seconds"),
            "models": "; ".join(
                f"{role}: {_compact(model)}" for role, model in (manifest.get("models") or {}).items()
            ),
            "complete": manifest.get("complete"),
        }
        lines = "".join(
            f"<tr><th scope='row'>{key}</th><td class='wide'>{html.escape(str(value))}</td></tr>"
            for key, value in facts.items()
        )
        raw = html.escape(json.dumps(manifest, indent=1, ensure_ascii=False, default=str))
        parts.append(
            f'<h3 id="source-{source.number}">[{source.number}] {html.escape(source.folder)}</h3>'
            f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'
            f"<details><summary>Whole manifest</summary><pre>{raw}</pre></details>"
        )
    return "".join(parts) + "</section>"


def _compact(model: Any) -> str:
    return (
        ", ".join(f"{key} {value}" for key, value in model.items())
        if isinstance(model, Mapping)
        else str(model)
    )


def _method(report: Report) -> str:
    version = importlib.metadata.version
    bert = f"BERTScore: {report.config.bert_score}. " if report.config.bert_score else ""
    return (
        f"ROUGE-L: tokens and F1 of rouge_score {version('rouge_score')}. BLEU: sacrebleu "
        f"{version('sacrebleu')}, signature "
        f"{bleu_signature()}. {bert}Intervals: 95 % percentiles of {report.config.resamples} bootstrap "
        f"resamples of the questions, seed "
        f"{report.config.seed}, the same resamples for all runs. Rows are joined by prompt id, choice and "
        f"turn. Numbers in the tables come "
        "from the sources named in their last column."
    )


def _footer(report: Report) -> str:
    return (
        f'<footer class="soft"><p>Made {time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())} by '
        f"{html.escape(_made_by())}.</p></footer>"
    )


# ------------------------------------------------------------------------------------------------------------


def _markdown(comparison: Comparison, report: Report, drawn: Mapping[str, tuple[Any, str]]) -> str:
    scores = _of(report, comparison)
    metric, against = main_metric(comparison, scores)
    rows = [row for row in scores if (row["metric"], row["against"], row["turn"]) == (metric, against, None)]
    high = f"{comparison.high_bits} bit"
    lines = [
        f"## {_name(comparison)}",
        "",
        _counts(comparison),
        "",
        f"{METRIC_LABELS[metric]} against the {AGAINST_LABELS[against]}; in brackets the 95 % interval.",
        "",
        f"| run | average bits | {METRIC_LABELS[metric]} | difference to uniform {high} | difference to "
        f"uniform of nearest bits "
        f"| decode time to {high} | to 16 bit | turns "
        "| failed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        differences = [_difference(row, which) for which in ("", "nearest_")]
        high_difference, nearest_difference = (
            "–" if d is None else f"{d[0]} [{d[1]}, {d[2]}]" for d in differences
        )
        cells = (
            row["run"],
            _number(row["average_bits"], 3),
            f"{row['value']:.4f} [{row['low']:.3f}, {row['high']:.3f}]",
            high_difference,
            f"{nearest_difference} {_nearest(row, rows)}".rstrip(),
            _number(row["decode_time_ratio"], 2, "×"),
            _number(row["decode_time_ratio_16"], 2, "×"),
            str(row["rows"]),
            str(row["error_rows"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [
        f"![{caption}](figures/{_slug(comparison)}-{name}.png)\n" for name, (_, caption) in drawn.items()
    ]
    return "\n".join(lines) + "\n"


def _markdown_provenance(report: Report) -> str:
    lines = ["\n## Provenance\n", _method(report), ""]
    for source in report.sources:
        manifest = source.manifest
        models = "; ".join(
            f"{role}: {_compact(model)}" for role, model in (manifest.get("models") or {}).items()
        )
        facts = (
            f"written {manifest.get('written')}, commit {manifest.get('git_commit')}, "
            f"{manifest.get('device')}, {models}"
        )
        lines.append(f"{source.number}. `{source.folder}`: {facts}")
    lines.append(f"\nMade by {_made_by()}.\n")
    return "\n".join(lines)


def _made_by() -> str:
    versions = ", ".join(
        f"{name} {version}"
        for name, version in storage.package_versions().items()
        if name in ("pmpd", "numpy", "pyarrow")
    )
    return f"{versions}, commit {storage.git_commit() or 'unknown'}"


def unfinished(sources: Sequence[Source]) -> list[str]:
    """Folders whose manifest says that their run has not finished."""
    return [source.folder for source in sources if not source.manifest.get("complete")]
