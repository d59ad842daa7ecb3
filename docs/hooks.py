"""Pages of the reference that come from the code: the flags of the commands, the columns of the tables. And
the results that pages link to, which lie outside of this folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

from pmpd.cli.main import COMMANDS, main
from pmpd.storage import schemas

RESULTS = "bench-results"

TABLES = {
    "prompts": schemas.PROMPTS,
    "references": schemas.REFERENCES,
    "labels": schemas.labels_schema(64),
    "conversations": schemas.CONVERSATIONS,
    "generations": schemas.GENERATIONS,
    "judgments": schemas.JUDGMENTS,
    "scores": schemas.SCORES,
}


def on_page_markdown(markdown: str, page, **_) -> str:
    """Puts the generated part where the page says `<!-- generated -->`."""
    markdown = re.sub(
        r"\]\((?:\.\./)+bench/results/", f"]({'../' * page.file.src_uri.count('/')}{RESULTS}/", markdown
    )
    if page.file.src_uri.startswith(f"{RESULTS}/"):  # and a result that links to a page
        markdown = markdown.replace("](../../docs/", "](../")
    make = {"reference/commands.md": commands, "reference/tables.md": tables}.get(page.file.src_uri)
    return markdown.replace("<!-- generated -->", make()) if make else markdown


def on_files(files, config):
    """A page links to a result as a reader of the repository follows it; the site has them in `RESULTS`."""
    for path in sorted(Path(config.docs_dir).parent.glob("bench/results/*.*")):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def commands() -> str:
    return "\n\n".join(f"## pmpd {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS)


def help_of(name: str) -> str:
    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([name, "--help"])
    return out.getvalue().strip()


def tables() -> str:
    return "\n\n".join(
        f"## {name}\n\n| column | type |\n|---|---|\n"
        + "\n".join(f"| `{field.name}` | `{str(field.type).replace('|', '/')}` |" for field in schema)
        for name, schema in TABLES.items()
    )
