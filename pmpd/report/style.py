"""How the figures look, and how they become files and parts of the page.

Colours are Okabe and Ito's, which people with any colour vision tell apart; every kind of run also has its
own marker.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from pmpd.report import fonts

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, GRID = "#1c2733", "#d5dbe1"
"""Text and grid lines; inside the page they become CSS variables, so that they follow its light or dark
scheme."""


class Kind(NamedTuple):
    """How a kind of run looks."""

    label: str
    color: str
    marker: str


KINDS: dict[str, Kind] = {
    "fp": Kind("unquantized", "#5f6b76", "_"),
    "uniform": Kind("uniform", "#0072b2", "s"),
    "uniform_prefill": Kind("uniform, high prefill", "#7570b3", "v"),
    "static": Kind("static", "#56b4e9", "o"),
    "kv_cache": Kind("learned (kv_cache)", "#d55e00", "D"),
    "regression": Kind("learned (regression)", "#882255", "d"),
    "confidence": Kind("confidence", "#009e73", "^"),
    "random": Kind("random", "#cc79a7", "X"),
    "oracle": Kind("oracle (hindsight)", "#e69f00", "*"),
}
"""The kinds of run that have a look of their own, in the order of legends."""

OTHER_KIND = Kind("another scheduler", "#7a5195", "P")
"""The look of every other kind."""

WIDTH = 5.2
"""Inches. Narrow on purpose: on a phone the text stays near its nominal size."""


def kind_of(name: str) -> Kind:
    """The look of a kind of run; one that is not in `KINDS` goes by its own name."""
    return KINDS.get(name, OTHER_KIND._replace(label=name))


_STYLE: dict[RcKeyType, Any] = {
    "font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK,
    "grid.color": GRID, "grid.linewidth": 0.7, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "pmpd",
    "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.linewidth": 0.8,
    "text.parse_math": False,  # a $ in the name of a run is a $
}  # fmt: skip


def draw(make: Callable[[], Figure]) -> Figure:
    """The figure that `make` returns, in the report's style."""
    with rc_context({**_STYLE, "font.family": fonts.families()}):
        return make()


def to_png(figure: Figure) -> bytes:
    return _save(figure, "png", facecolor="white", dpi=180)


def to_svg(figure: Figure) -> str:
    """The SVG of a figure, on no ground."""
    text = _save(figure, "svg", metadata={"Date": None}).decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def on_white(svg: str) -> str:
    """A file of its own, for readers whose ground may be dark."""
    begin = svg.index(">") + 1
    return f'{svg[:begin]}<rect width="100%" height="100%" fill="white"/>{svg[begin:]}'


def for_page(svg: str, identifier: str, description: str) -> str:
    """An SVG element for the page: colours that follow its scheme, ids that no other figure has, no width of
    its own. `identifier`: letters, digits, hyphens and underscores only."""
    text = re.sub(r'\bid="([^"]+)"', rf'id="{identifier}-\1"', svg)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{identifier}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{identifier}-\1)", text)
    for color, variable in ((INK, "ink"), (GRID, "grid"), (KINDS["fp"].color, "soft")):
        text = text.replace(color, f"var(--{variable})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    head = (
        f'<svg role="img" aria-label="{escape(description)}" viewBox="0 0 {width} {height}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + text[text.index(">") + 1 :]


def _save(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with rc_context({**_STYLE, "font.family": fonts.families()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the report says so, once
        figure.savefig(buffer, format=kind, **options)
    figure.set_layout_engine("none")  # laid out once is enough
    return buffer.getvalue()
