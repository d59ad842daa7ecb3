"""The tables and the figure of a study, from its JSON.

python -m bench.frontier page --results bench/results/frontier_demo.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """The result as a page."""
    chain = ", ".join(map(str, results["chain"]))
    lines = [
        f"# Policies against the static frontier: {results['prompts']} held-out prompts, chain {chain}",
        "",
        f"{results['forwards']:.0f} decode forwards, {results['groups']} groups of documents, "
        f"{results['settings']['folds']} folds, "
        f"{results['settings']['resamples']} paired resamples, {results['cpu_seconds']:.0f} CPU seconds for "
        f"this table. Loss: KL(unquantized, plan) along the unquantized model's own output, nats a forward.",
        *made_on(results.get("made_on")),
        "",
        "| precision | loss | by kind | entropy |",
        "|---|---|---|---|",
    ]
    for row in results["uniform"]:
        kinds = " / ".join(f"{value:.4f}" for key, value in row.items() if key.startswith("loss_kind"))
        lines.append(f"| {row['bits']} | {row['loss']:.4f} | {kinds} | {row['entropy']:.2f} |")
    quarters = "; ".join(_segment(row) for row in results["by_segment"])
    lines += ["", f"By quarter of the decode: {quarters}", ""]
    lines += policies(results["policies"] + results["oracles"])
    if "answers" in results:
        lines += answers_lines(results["answers"])
    lines += rules(results)
    lines += ["", "Static plans, switches in sixths of the answer:"]
    lines += table(
        results["plans"],
        {
            "switches": lambda row: ", ".join("never" if at is None else f"{at}/6" for at in row["sixths"]),
            "bits": _number("bits", 3),
            "loss": _number("loss", 4),
            "by the sum of uniform curves": _number("by_curves", 4),
        },
    )
    if "online" in results:
        found = results["online"]
        lines += ["", f"`online`, on {found['prompts']} prompts that it was not fitted to, run exactly:", ""]
        lines += policies([{**row, "oracle_share": None} for row in found["rows"]])
    if "noise" in results:
        lines += ["", "| rule | pair | labelled again | agreement | no accuracy exceeds | majority |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {row['rule']} | {row['pair']} | {row['against']} ({row['prompts']}) | {row['agreement']:.2f} "
            f"[{row['low']:.2f}, {row['high']:.2f}] | {row['ceiling']:.2f} | {row['majority']:.2f} |"
            for row in results["noise"]["results"]
        ]
    lines += table(
        results.get("decode_time", []),
        {
            "policy": _word("policy"),
            "target bits": _number("target_bits"),
            "decode time of the highest precision": _number("of_highest", 3),
            "decisions": lambda row: f"{row['decision_share']:.1%}",
            "bits saved at equal loss": _number("bits_saved", 3),
            "time saved at equal loss, %": _number("time_saved_percent", 1),
        },
    )
    return "\n".join(lines) + "\n"


def made_on(told: dict[str, Any] | None) -> list[str]:
    return [f"Labels made on: {told['hardware']}, commit {told['commit']}."] if told else []


def _segment(row: dict[str, float]) -> str:
    return ", ".join(f"{bits}: {row[bits]:.4f}" for bits in row if bits != "segment")


def answers_page(results: dict[str, Any]) -> str:
    """Of `bench.frontier answers`."""
    lines = [
        f"# Whole answers: policies against static plans, {results['answers']['prompts']} held-out prompts"
    ]
    lines += rules(results) + answers_lines(results["answers"])
    return "\n".join(lines) + "\n"


def answers_lines(answers: dict[str, Any]) -> list[str]:
    lines = ["", f"Whole answers: loss 1 - ROUGE-L, {answers['prompts']} prompts, plans of two precisions."]
    lines += table(
        answers["plans"],
        {
            "pair": _word("pair"),
            "class": _word("class"),
            "bits": _number("bits", 3),
            "ROUGE-L": _number("rouge_l", 4),
        },
    )
    return [*lines, "", *policies(answers["policies"] + answers["oracles"])]


def policies(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of policies; bold marks what is shown after the correction."""
    lines = [
        "| policy | target bits | bits | loss | static at these bits | gain, % | 95 % | p | p (Holm) | "
        "share of the oracle | prompts to see 1 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "" if row["oracle_share"] is None else f"{row['oracle_share']:.2f}"
        needed, mark = row.get("prompts_for_1_percent", ""), ""
        if row["p_holm"] < 0.05 and "prompts_for_1_percent" in row:
            mark = " **" if row["gain_percent"] > 0 else " (worse)"
        lines.append(
            f"| {row['policy']}{mark} | {row['target_bits']:g} | {row['bits']:.3f} | {row['loss']:.4f} | "
            f"{row['static_loss']:.4f} | {row['gain_percent']:+.2f} | [{row['low_percent']:+.2f}, "
            f"{row['high_percent']:+.2f}] | {row['p']:.2g} | {row['p_holm']:.2g} | {share} | {needed} |"
        )
    return lines


def table(rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> list[str]:
    """A markdown table; [] without rows."""
    if not rows:
        return []
    head = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return head + [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]


def _number(name: str, digits: int = 2) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get(name) is None else f"{row[name]:.{digits}f}"


def _numbers(name: str, digits: int = 2) -> Callable[[dict[str, Any]], str]:
    return lambda row: " / ".join(f"{value:.{digits}f}" for value in row[name])


def _word(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: str(row[name])


def rules(results: dict[str, Any]) -> list[str]:
    """What each label rule costs, says, says again, and is worth."""
    lines = table(
        cost_of_rules(results.get("costs", [])),
        {
            "rule": _word("rule"),
            "kernel": _word("kernel"),
            "prompts": _word("prompts"),
            "device seconds a prompt": _number("seconds", 4),
        },
    )
    lines += table(
        results.get("classes", []),
        {
            "rule": _word("rule"),
            "pair": _word("pair"),
            "labels 0 / 1 / 2 / 3": _numbers("shares"),
            "mean score of class 0 / 1 / 2 / 3": _numbers("scores", 4),
            "a lower class beats never switching": _number("beats"),
        },
    )
    lines += table(
        results.get("rule_noise", []),
        {
            "rule": _word("rule"),
            "pair": _word("pair"),
            "labelled again": lambda row: f"{row['against']} ({row['prompts']})",
            "agreement": lambda row: f"{row['agreement']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
            "kappa": _number("kappa"),
            "no accuracy exceeds": _number("ceiling"),
            "majority": _number("majority"),
            "correlation of what class 0 loses": _number("loss_correlation"),
        },
    )
    lines += table(
        results.get("classifiers", []),
        {
            "KV classifier on": _word("rule"),
            "pair": _word("pair"),
            "prompts": _word("prompts"),
            "accuracy": _number("accuracy", 3),
            "majority class": _number("majority", 3),
        },
    )
    lines += table(
        results.get("whole_answers", []),
        {
            "rule": _word("rule"),
            "pair": _word("pair"),
            "prompts in a group": _word("prompts_in_a_group"),
            "groups": _word("groups"),
            "correlation with the loss of ROUGE-L of whole answers": lambda row: (
                f"{row['correlation']:.2f} ± {row['deviation']:.2f}"
            ),
        },
    )
    return lines


def cost_of_rules(costs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds a prompt of each rule and of the references, by kernel, from the set `cost`, which ran alone:
    of each kind of prompt the last run, which had everything compiled."""
    last = {(cost["name"], cost["step"], cost["kind"]): cost for cost in costs if cost["set"] == "cost"}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (name, step, _), cost in last.items():
        found.setdefault((name.removeprefix("cost_"), step), []).append(cost)
    return [
        {
            "rule": step,
            "kernel": kernel,
            "prompts": sum(cost["prompts"] for cost in some),
            "seconds": sum(cost["seconds"] for cost in some) / max(1, sum(cost["prompts"] for cost in some)),
        }
        for (kernel, step), some in found.items()
    ]


SHOWN = ("static per kind", "regression", "stopping", "stopping, decode alone", "KV classifier, loss")


def figure(results: dict[str, Any], path: Path) -> None:
    """PNG: loss against bits of the static frontier, of policies, and of the oracles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(drawn)
    left, right = drawn.subplots(1, 2)
    points = results["static_frontier"]
    left.plot([p["bits"] for p in points], [p["loss"] for p in points], color="0.3", label="static frontier")
    for name in dict.fromkeys(row["policy"] for row in results["oracles"]):
        rows = [row for row in results["oracles"] if row["policy"] == name]
        left.plot([r["bits"] for r in rows], [r["loss"] for r in rows], "--", color="0.6", label=name)
    for name in SHOWN:
        rows = [row for row in results["policies"] if row["policy"] == name]
        if not rows:
            continue
        (line,) = left.plot([r["bits"] for r in rows], [r["loss"] for r in rows], ".", label=name)
        shift = 0.012 * SHOWN.index(name)
        right.errorbar(
            [r["bits"] + shift for r in rows],
            [r["gain_percent"] for r in rows],
            yerr=[
                [r["gain_percent"] - r["low_percent"] for r in rows],
                [r["high_percent"] - r["gain_percent"] for r in rows],
            ],
            fmt=".",
            color=line.get_color(),
            capsize=2,
        )
    right.axhline(0, color="0.3", linewidth=1)
    left.set(xlabel="bits", ylabel="KL from the unquantized model, nats a forward", yscale="log")
    right.set(xlabel="bits", ylabel="loss less than static at equal bits, % (95 %)")
    left.legend(fontsize=7)
    drawn.savefig(path, dpi=110)
