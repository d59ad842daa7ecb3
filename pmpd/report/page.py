"""The page of the report: `page.html.j2` filled in, with its style and script inside, so that one file holds
everything and asks the network for nothing.

Whatever comes from a model, a data set or a folder's name is escaped by the template. The page's own policy
lets the browser run the one script and use the one style sheet that are known here by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pmpd.report.style import KINDS, OTHER_KIND

HERE = Path(__file__).parent


class StyleSheet:
    """The page's rules: `page.css`, a colour for each kind of run, and one class for every different style
    attribute of the figures, since the policy forbids attributes."""

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}

    def class_of(self, style: str) -> str:
        return self._classes.setdefault(style, f"f{len(self._classes)}")

    def lift(self, svg: str) -> str:
        """The SVG with classes in the place of its style attributes, and without style elements."""
        svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)
        return re.sub(r'\bstyle="([^"]*)"', lambda found: f'class="{self.class_of(found[1])}"', svg)

    def text(self) -> str:
        kinds = {**{kind: style.color for kind, style in KINDS.items()}, "other": OTHER_KIND.color}
        rules = [f".k-{kind} {{ --c: {color}; }}" for kind, color in kinds.items()]
        rules += [f".{name} {{ {style} }}" for style, name in self._classes.items()]
        return (HERE / "page.css").read_text(encoding="utf-8") + "\n".join(rules) + "\n"


def kind_class(kind: str) -> str:
    """Name after `k-` of the class with the kind's colour."""
    return kind if kind in KINDS else "other"


def embedded_json(data: Any) -> Markup:
    """JSON for a script element of the type application/json: no text of a model becomes markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return Markup(re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text))


def render(values: Mapping[str, Any], style: StyleSheet) -> str:
    """The page. `values`: what `page.html.j2` names, besides style, script and policy."""
    css, script = style.text(), (HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    policy = f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(script)}; base-uri 'none'"
    return environment.get_template("page.html.j2").render(
        **values, css=Markup(css), script=Markup(script), policy=Markup(policy)
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
