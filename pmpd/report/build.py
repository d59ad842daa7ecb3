"""Scores -> one self-contained HTML page, figures and Markdown. No torch, no Ray, no network.

Everything a reader needs to check a number stands on the page: which data set folder it came from, what made
that folder (its manifest), how many turns are behind it and which were left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pmpd.evaluation.compare import Comparison
from pmpd.report import figures, fonts, markdown, provenance, style
from pmpd.report.browser import browser
from pmpd.report.judged import judged_of
from pmpd.report.page import StyleSheet, render
from pmpd.report.source import Report, Source, slugs_of
from pmpd.report.view import Section, section_of, speed_caveat


def write_report(report: Report, folder: Path) -> dict[str, Path]:
    """Writes report.html, report.md and figures/*.png and *.svg; returns name -> path of what it wrote.
    Nothing is written where a comparison is refused."""
    written: dict[Path, bytes] = {}
    sheet = StyleSheet()
    sections: list[dict[str, Any]] = []
    texts: list[str] = []
    for slug, comparison in slugs_of(report.comparisons):
        section = section_of(comparison, report)
        drawn = _draw(comparison, section)
        graphics = []
        for name, (figure, caption) in drawn.items():
            stem, svg = f"{slug}-{name}", style.to_svg(figure)
            for suffix, content in ((".png", style.to_png(figure)), (".svg", style.on_white(svg).encode())):
                written[folder / "figures" / (stem + suffix)] = content
            shown = sheet.lift(style.for_page(svg, stem, caption))
            graphics.append({"id": stem, "caption": caption, "svg": Markup(shown)})
        judged = judged_of(comparison, report)
        more = {"slug": slug, "figures": graphics, "browser": browser(comparison), "judged": judged}
        more["settings"] = provenance.settings(report, comparison)
        sections.append({**vars(section), **more})
        captions = {f"{slug}-{name}": caption for name, (_, caption) in drawn.items()}
        texts.append(markdown.section_text(section, captions, judged))
    models = ", ".join(sorted({comparison.model_id for comparison in report.comparisons}))
    values = {
        "title": f"Precision and quality: {models}",
        "notes": notes(report),
        "sections": sections,
        "method": provenance.method(report.config),
        "sources": [provenance.shown(source) for source in report.sources],
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "made_by": provenance.made_by(),
    }
    written[folder / "report.html"] = render(values, sheet).encode()
    written[folder / "report.md"] = markdown.page_text(values, texts).encode()
    for path, content in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {path.name: path for path in written}


def _draw(comparison: Comparison, section: Section) -> dict[str, tuple[Any, str]]:
    """Name -> (figure, caption), for the figures that this comparison has data for."""
    metric, against, scores = section.metric, section.against, section.scores
    better = "Higher" if metric.higher_is_better else "Further up (lower values)"
    drawn = {
        "quality": (
            style.draw(lambda: figures.quality(comparison, scores, metric.name, against)),
            f"Quality against cost: {section.measure} by average bits. Bars are 95 % intervals. {better} and "
            f"further left is better; the static line joins the plans that no cheaper one equals.",
        ),
    }
    if comparison.speed.seconds:
        devices = ", ".join(comparison.speed.devices) or "an unnamed device"
        count = max(comparison.speed.workers.values())
        drawn["speed"] = (
            style.draw(lambda: figures.speed(comparison)),
            f"Decode speed by precision, one row alone, measured by the run's own {count} "
            f"worker{'s' * (count > 1)} on {devices}, {speed_caveat(comparison)}. Bars: fastest and slowest "
            f"measurement.",
        )
    if figures.switching_runs(comparison):
        drawn["switches"] = (
            style.draw(lambda: figures.switches(comparison)),
            "When each scheduler switches: share of turns by the number of decode forwards at the higher "
            "precision of a pair.",
        )
    if figures.lengths_differ(comparison):
        drawn["lengths"] = (
            style.draw(lambda: figures.lengths(comparison)),
            "Length of the answers. Runs that ramble or stop early stand out here.",
        )
    return drawn


def conclusions(report: Report) -> list[str]:
    """What each benchmark's section says first, a line each."""
    told = []
    for comparison in report.comparisons:
        section = section_of(comparison, report)
        found = [*(one.conclusion for one in judged_of(comparison, report)), section.conclusion]
        told += [f"{section.name}: {conclusion}" for conclusion in found if conclusion]
    return told


def notes(report: Report) -> list[str]:
    """What a reader must know before the numbers."""
    names = [name for comparison in report.comparisons for name in comparison.runs]
    missing = fonts.missing_characters(names)
    if not missing:
        return []
    return [
        f"The figures show boxes in the place of {missing}: no font on the machine that drew them has these "
        f"characters. Install one (Noto Sans for the script: fonts-noto-cjk, fonts-noto-core) and make the "
        f"report again."
    ]


def unfinished(sources: Sequence[Source]) -> list[str]:
    """Folders whose manifest says that their run has not finished."""
    return [source.folder for source in sources if not source.manifest.get("complete")]
