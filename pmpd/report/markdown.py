"""The report as Markdown: the same texts as the page's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pmpd.report.judged import Judged
from pmpd.report.view import Section, TableRow

COLUMNS = (0, 1, 2, 3, 4, 5, 8, 9)
"""Which cells of the page's table of runs are in the Markdown's, too."""


def plain(text: str) -> str:
    """One line whose characters mean themselves in Markdown."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def section_text(section: Section, captions: Mapping[str, str], judged: Sequence[Judged]) -> str:
    """A benchmark's part. `captions`: figure's file name without ending -> what is under it."""
    titles = [section.table.titles[0].plain(), *(section.table.titles[i + 1].plain() for i in COLUMNS)]
    lines = [
        f"## {plain(section.name)}",
        "",
        *(f"{plain(one.conclusion)}\n" for one in judged if one.conclusion),
        plain(section.conclusion),
        "",
        plain(section.counts),
        "",
        f"{section.measure}; in brackets the 95 % interval.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" + "|---:" * (len(titles) - 1) + "|",
        *(f"| {plain(row.name)} | {' | '.join(_cells(row))} |" for row in section.table.rows),
        "",
        *_judged_lines(judged),
        *(f"![{plain(caption)}](figures/{name}.png)\n" for name, caption in captions.items()),
    ]
    return "\n".join(lines) + "\n"


def _judged_lines(judged: Sequence[Judged]) -> list[str]:
    lines: list[str] = []
    for one in judged:
        titles = [title.plain() for title in one.table.titles[:-1]]
        lines += [f"### {plain(one.title)}", "", one.table.note, "", f"| {' | '.join(map(plain, titles))} |"]
        lines.append("|---" + "|---:" * (len(titles) - 1) + "|")
        lines += [
            f"| {plain(row.name)} | {' | '.join(cell.plain() for cell in row.cells)} |"
            for row in one.table.rows
        ]
        lines.append("")
    return lines


def _cells(row: TableRow) -> list[str]:
    """A value with its interval in brackets: `0.41 [0.35, 0.47]`."""
    texts = []
    for index in COLUMNS:
        first, *rest = [line.text for line in row.cells[index].lines]
        if rest and " to " in rest[0]:
            low, high = rest[0].split(" to ")
            rest[0] = f"[{low}, {high}]"
        texts.append(" ".join([first, *rest]))
    return texts


def page_text(values: Mapping[str, Any], sections: Sequence[str]) -> str:
    """The whole file. `values`: what the page's template gets."""
    lines = [f"# {plain(values['title'])}", "", *(f"> {plain(note)}\n" for note in values["notes"])]
    end = ["", "## Provenance", "", values["method"], ""]
    for source in values["sources"]:
        facts = dict(source["facts"])
        told = f"written {facts['written']}, commit {facts['commit']}, {facts['device']}, {facts['models']}"
        end.append(f"{source['number']}. `{source['folder'].replace('`', '')}`: {plain(told)}")
    end += ["", f"Made by {values['made_by']}."]
    return "\n".join(lines) + "\n" + "\n".join(sections) + "\n".join(end) + "\n"
