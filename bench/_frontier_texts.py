"""Real English texts for the scheduler study, from what everybody can fetch: manuals and essays that Debian
packages (anarchism, jargon-text, debian-reference-en), and any file of records beside them.

    apt-get download anarchism jargon-text debian-reference-en && for f in *.deb; do dpkg -x $f debian; done
    python -m bench.frontier texts --documents debian --records wikitext.jsonl --output texts.jsonl

Of a file of records the second half is taken: a quantizer that was calibrated on the first half has seen
none of them. Five neighbouring records of a document stay together (`_frontier_prompts.GROUP_LINES`).
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench._frontier_prompts import GROUP_LINES, PART_CHARACTERS
from pmpd.labeling.prompts import PromptConfig, records

RECORD_CHARACTERS = 2 * PART_CHARACTERS + 100
TOGETHER = GROUP_LINES // 2
"""Records of a document that stay together: each gives two prompts."""

SUFFIXES = (".txt.gz", ".md.gz", ".txt", ".md")


def prose(text: str) -> Iterator[str]:
    """Its paragraphs of prose, one line each: no headings, tables, code or contents."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
        line = re.sub(r"(\*\*|_)\s*(.+?)\s*\1", r"\2", line)
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line) >= 120 and letters >= 0.85 * len(line) and line[0].isupper() and ". " in line:
            yield line


def joined(paragraphs: Iterable[str]) -> Iterator[str]:
    """Neighbouring paragraphs as records of `RECORD_CHARACTERS` at least."""
    held = ""
    for paragraph in paragraphs:
        held = f"{held}\n\n{paragraph}".strip()
        if len(held) >= RECORD_CHARACTERS:
            yield held
            held = ""


def documents(folder: Path) -> Iterator[list[str]]:
    """The records of each text file under `folder`, by path."""
    for path in sorted(p for p in folder.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()):
        if "changelog" in path.name.lower() or "NEWS" in path.name:
            continue
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        yield list(joined(prose(content.decode(errors="ignore"))))


def write(folders: Sequence[Path], files: Sequence[str], output: Path, most: int, seed: int = 0) -> int:
    """Writes JSON lines (field `text`): parts of `TOGETHER` neighbouring records, shuffled, `most` records of
    each folder or file. How many lines."""
    sources = [list(documents(folder)) for folder in folders]
    for file in files:
        texts = [text for _, text, problem in records(PromptConfig(file)) if problem is None]
        sources.append([[text for text in texts[len(texts) // 2 :] if len(text) >= 2 * PART_CHARACTERS]])
    draw = random.Random(seed)
    parts = []
    for source in sources:
        of_source = [
            texts[at : at + TOGETHER]
            for texts in source
            for at in range(0, len(texts) - TOGETHER + 1, TOGETHER)
        ]
        draw.shuffle(of_source)
        parts += of_source[: most // TOGETHER]
    draw.shuffle(parts)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for part in parts for text in part]
    output.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)
