"""The figures of the report, as matplotlib figures: no files, no global state."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pmpd.evaluation.compare import BASE_KINDS, UNIFORM_KINDS, AnsweredRun, Comparison
from pmpd.metrics.base import AGAINST, get_metric
from pmpd.report.style import INK, KINDS, WIDTH, kind_of

# ------------------------------------------------------------------------------------------------------------


def quality(comparison: Comparison, scores: Sequence[Mapping[str, Any]], metric: str, against: str) -> Figure:
    """Score against average bits, with 95 % intervals both ways. `scores`: rows of SCORES of this
    comparison."""
    rows = [
        row for row in scores if row["metric"] == metric and row["against"] == against and row["turn"] is None
    ]
    higher = get_metric(metric).higher_is_better
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    axes = figure.add_subplot()
    for kind in dict.fromkeys((*KINDS, *(row["kind"] for row in rows))):
        label, color, marker = kind_of(kind)
        chosen = sorted(
            (row for row in rows if row["kind"] == kind and row["average_bits"] is not None),
            key=lambda row: row["average_bits"],
        )
        if not chosen:
            continue
        if kind == "fp":
            _unquantized_line(axes, chosen[0], against)
            continue
        bits, values = [row["average_bits"] for row in chosen], [row["value"] for row in chosen]
        if kind in (*UNIFORM_KINDS, "static"):
            line = _frontier(bits, values, higher) if kind == "static" else (bits, values)
            axes.plot(
                *line,
                color=color,
                linewidth=1.0,
                alpha=0.6,
                zorder=2,
                linestyle="-" if kind == "static" else "--",
            )
        sides = (
            [row["value"] - row["low"] for row in chosen],
            [row["high"] - row["value"] for row in chosen],
        )
        width = (
            [row["average_bits"] - row["average_bits_low"] for row in chosen],
            [row["average_bits_high"] - row["average_bits"] for row in chosen],
        )
        axes.errorbar(
            bits,
            values,
            np.maximum(sides, 0),
            np.maximum(width, 0),
            fmt="none",
            ecolor=color,
            elinewidth=0.9,
            alpha=0.45,
            zorder=2,
        )
        size = {"static": 22, "oracle": 110, "uniform": 34}.get(kind, 48)
        axes.scatter(
            bits,
            values,
            s=size,
            color=color,
            marker=marker,
            label=label,
            zorder=4,
            edgecolors="white",
            linewidths=0.4,
        )
        if kind == "uniform":
            for row in chosen:
                name = f"{round(row['average_bits'])} bit"
                axes.annotate(
                    name,
                    (row["average_bits"], row["value"]),
                    (0, -13),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
    axes.set_xlabel("average bits per decode forward")
    axes.set_ylabel(f"{get_metric(metric).label} against the\n{AGAINST[against]}")
    if not higher:
        axes.invert_yaxis()
    axes.margins(x=0.08, y=0.1)
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.4)
    return figure


def _frontier(
    bits: Sequence[float], values: Sequence[float], higher: bool
) -> tuple[list[float], list[float]]:
    """Of points in ascending order of bits, those that no cheaper point equals: a chain of three has many
    plans at similar bits."""
    best = list(itertools.accumulate(values, max if higher else min))
    kept = [index for index in range(len(bits)) if index == 0 or best[index] != best[index - 1]]
    return [bits[index] for index in kept], [values[index] for index in kept]


def _unquantized_line(axes: Axes, row: Mapping[str, Any], against: str) -> None:
    label, color, _ = KINDS["fp"]
    if (
        against == "reference_output"
    ):  # 1 (or 100) by definition: a line there would squeeze everything else into a corner
        text = f"{label}, 16 bit: {row['value']:g} by definition (above)"
        axes.text(0.02, 0.98, text, transform=axes.transAxes, ha="left", va="top", fontsize=8, color=color)
        return
    axes.axhline(
        row["value"], color=color, linewidth=1.1, linestyle=(0, (4, 3)), label=f"{label}, 16 bit", zorder=1
    )
    axes.axhspan(row["low"], row["high"], color=color, alpha=0.1, linewidth=0, zorder=0)


_BINS = 12


def switching_runs(comparison: Comparison) -> list[AnsweredRun]:
    """The runs whose switch steps may differ between rows."""
    runs = [run for run in comparison.runs.values() if run.kind not in (*BASE_KINDS, "static")]
    # an online scheduler has no switch steps
    return [
        run for run in runs if run.kind == "oracle" or any(row["switch_steps"] for row in run.rows.values())
    ]


def switch_shares(run: AnsweredRun) -> dict[tuple[int, int], np.ndarray]:
    """Per pair of the chain: share of turns [13] by high-precision decode forwards, in twelfths of
    max_new_tokens - 1."""
    chain = _chain(run)
    counts = {pair: np.zeros(_BINS + 1) for pair in itertools.pairwise(chain)}
    for row in run.rows.values():
        m = _max_new_tokens(run, row) - 1
        # none where the row ended before it could switch, or where the oracle has chosen never to
        steps = list(row["switch_steps"] or ()) or [m] * len(counts)
        for pair, step in zip(counts, steps, strict=False):
            counts[pair][min(round(step / max(m, 1) * _BINS), _BINS)] += 1
    return {pair: count / max(count.sum(), 1) for pair, count in counts.items()}


def _chain(run: AnsweredRun) -> list[int]:
    if run.kind != "oracle":
        return run.settings["precisions"]
    return max((json.loads(row["scheduler"])["precisions"] for row in run.rows.values()), key=len)


def _max_new_tokens(run: AnsweredRun, row: Mapping[str, Any]) -> int:
    return json.loads(row["scheduler"])["max_new_tokens"]


def switches(comparison: Comparison) -> Figure:
    """When each run switches: a histogram per run (rows) and pair of the chain (columns)."""
    shares = {run.name: switch_shares(run) for run in switching_runs(comparison)}
    pairs = sorted({pair for share in shares.values() for pair in share}, reverse=True)
    figure = Figure(figsize=(WIDTH, 0.75 + 0.95 * len(shares)), layout="constrained")
    grid = figure.subplots(len(shares), len(pairs), sharex=True, sharey=True, squeeze=False)
    for line, (name, share) in zip(grid, shares.items(), strict=True):
        color = kind_of(comparison.runs[name].kind).color
        for axes, pair in zip(line, pairs, strict=True):
            if pair in share:
                axes.bar(np.arange(_BINS + 1), 100 * share[pair], width=0.85, color=color)
            axes.set_ylim(0, 100)
            axes.set_yticks([0, 50, 100])
            axes.grid(axis="x", visible=False)
        head, _, tail = name.rpartition("-")  # a line is as high as a dozen letters are long
        shown = f"{head}-\n{tail}" if len(name) > 12 and head else name
        line[0].set_ylabel(f"{shown}\n% of turns", fontsize=8.5)
    for axes, (high, low) in zip(grid[0], pairs, strict=True):
        axes.set_title(f"{high} → {low} bit")
    for axes in grid[-1]:
        axes.set_xticks([0, 4, 8, 12], ["0", "⅓", "⅔", "never"])
    figure.supxlabel("switch step, as a share of the decode forwards", fontsize=9.5)
    return figure


def speed(comparison: Comparison) -> Figure:
    """Milliseconds of a decode forward by precision."""
    model = comparison.speed
    widths = list(model.seconds)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(widths)), layout="constrained")
    axes = figure.add_subplot()
    values = np.asarray([1e3 * model.seconds[bits] for bits in widths])
    spread = np.asarray(
        [
            [1e3 * (model.seconds[bits] - model.low[bits]) for bits in widths],
            [1e3 * (model.high[bits] - model.seconds[bits]) for bits in widths],
        ]
    )
    colors = [KINDS["fp" if bits == 16 else "uniform"].color for bits in widths]
    places = np.arange(len(widths))[::-1]
    axes.barh(
        places,
        values,
        xerr=spread if spread.any() else None,
        color=colors,
        height=0.62,
        error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 3},
    )
    base = model.seconds.get(comparison.high_bits or 0)
    for place, bits, value, over in zip(places, widths, values, spread[1], strict=True):
        ratio = f"  ({model.seconds[bits] / base:.2f}×)" if base and bits != comparison.high_bits else ""
        axes.annotate(
            f"{value:.2f} ms{ratio}",
            (value + over, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(places, [f"{bits} bit" for bits in widths])
    axes.set_xlim(0, float((values + spread[1]).max()) * 1.42)
    axes.set_xlabel("milliseconds per decode forward, one row")
    axes.grid(axis="y", visible=False)
    return figure


LENGTH_SHARE = 0.05
"""Of the longest answer: what runs must differ by, for a figure of lengths to show it."""


def lengths_differ(comparison: Comparison) -> bool:
    """Whether median or quartiles of the answers' lengths differ between runs: where all end at the limit
    there is nothing to see."""
    quartiles = [
        np.percentile([run.rows[key]["output_tokens"] for key in comparison.shared], (25, 50, 75))
        for run in comparison.runs.values()
    ]
    return bool((np.ptp(quartiles, axis=0) > LENGTH_SHARE * np.max(quartiles)).any())


def lengths(comparison: Comparison) -> Figure:
    """New tokens per answer: median, quartiles and 5th to 95th percentile of every run."""
    runs = list(comparison.runs.values())
    figure = Figure(figsize=(WIDTH, 1.0 + 0.24 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    data = [[run.rows[key]["output_tokens"] for key in comparison.shared] for run in runs]
    places = np.arange(len(runs))[::-1]
    boxes = axes.boxplot(
        data, positions=places, orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.6,
        patch_artist=True,
        medianprops={"color": INK, "linewidth": 1.4}, whiskerprops={"color": INK}, capprops={"color": INK},
    )  # fmt: skip
    for box, run in zip(boxes["boxes"], runs, strict=True):
        box.set(facecolor=kind_of(run.kind).color, edgecolor=INK, linewidth=0.7, alpha=0.75)
    axes.set_yticks(places, [run.name for run in runs], fontsize=8.5)
    axes.set_xlabel("new tokens per answer (median, quartiles, 5–95 %)")
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    return figure
