"""Fonts for the scripts that names may be written in. The page leaves that to the browser; figures can't."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

FIRST = "DejaVu Sans"
"""Comes with matplotlib."""
FURTHER = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans",
    "WenQuanYi Zen Hei", "Hiragino Sans", "PingFang SC", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic",
    "Noto Sans Arabic", "Noto Naskh Arabic", "Geeza Pro",
    "Noto Sans Devanagari", "Noto Serif Devanagari", "Lohit Devanagari", "Mangal", "Kohinoor Devanagari",
    "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Noto Sans Hebrew", "FreeSans",
    "Arial Unicode MS",
)  # fmt: skip
"""Tried in this order for characters that the one before lacks, where they are installed."""


@functools.cache
def families() -> list[str]:
    """The fonts of `FIRST` and `FURTHER` that this machine has, those installed since matplotlib listed them
    included."""
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in listed:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError, UnicodeError):  # no outline font
                continue
    there = set(font_manager.fontManager.get_font_names())
    return [FIRST, *(name for name in FURTHER if name in there)]


def missing_characters(texts: Iterable[str]) -> str:
    """The characters that none of the fonts has, in order."""
    wanted = {character for text in texts for character in text if not character.isspace()}
    for name in families():
        if not wanted:
            break
        wanted -= {character for character in wanted if ord(character) in _characters(name)}
    return "".join(sorted(wanted))


@functools.cache
def _characters(family: str) -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont(family)).get_charmap())
