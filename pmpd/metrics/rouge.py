"""ROUGE-L F1 of texts in any script, with a bit-parallel longest common subsequence.

The tokens of Latin text are `rouge_score`'s own, so the scores are those of published results; a test holds
both to equal numbers. `rouge_score` drops every other letter, so texts in other scripts all score 0 there.
Here they are words of letters, marks and digits; where a script puts no spaces between words, each
character is a token.

Labeling scores several continuations a prompt, and `rouge_score`'s table of Python integers would take as
long as decoding them on a small model.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache

from rouge_score.tokenizers import DefaultTokenizer

_TOKENIZERS = {stemmed: DefaultTokenizer(use_stemmer=stemmed) for stemmed in (False, True)}

_UNSPACED = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "YI ", "TANGUT", "NUSHU",
    "THAI", "LAO ", "KHMER", "MYANMAR", "TIBETAN", "TAI ", "NEW TAI", "JAVANESE", "BALINESE",
)  # fmt: skip
"""How the names of characters begin whose scripts put no spaces between words."""


_FULL_WIDTH = {0x3000: 0x20} | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""East Asian texts write Latin letters and digits in the width of their own characters, too."""

_SYMBOLS = (("\xaa", "\xba"), ("\u02b0", "\u02ff"), ("\u2100", "\u214f"), ("\U0001d400", "\U0001d7ff"))
"""Letters that Latin texts use as symbols: ordinals, modifiers, letterlike and mathematical ones."""


@lru_cache(maxsize=4096)
def rouge_l(prediction: str, reference: str, stemmed: bool = False) -> float:
    """ROUGE-L F1 in 0..1 (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.1),
    of words or, where Latin, of their Porter stems; 0 for a text without a word (`words`)."""
    predicted, target = words(prediction, stemmed), words(reference, stemmed)
    if not predicted or not target:
        return 0.0
    common = longest_common_subsequence(target, predicted)
    precision, recall = common / len(predicted), common / len(target)
    return 2 * precision * recall / (precision + recall) if common else 0.0


@lru_cache(maxsize=10_000)
def words(text: str, stemmed: bool = False) -> tuple[str, ...]:
    """The tokens of a text in lower case; () where it has nothing to score (symbols only)."""
    latin = _TOKENIZERS[stemmed].tokenize
    if text.isascii():
        return tuple(latin(text))
    text = text.translate(_FULL_WIDTH).lower()
    kinds: list[str] = []
    for char in text:  # a mark belongs to the character before it
        kind = _kind(char)
        kinds.append(kind if kind != "mark" else kinds[-1] if kinds else "latin")
    found: list[str] = []
    for kind, pairs in itertools.groupby(zip(kinds, text, strict=True), key=lambda pair: pair[0]):
        run = "".join(char for _, char in pairs)
        if kind == "latin":
            found += latin(run)
        elif kind == "word":
            found.append(unicodedata.normalize("NFKC", run))
        else:
            starts = [index for index, char in enumerate(run) if _kind(char) != "mark"]
            found += [run[i:j] for i, j in itertools.pairwise([*starts, len(run)])]
    return tuple(found)


@cache
def _kind(char: str) -> str:
    """latin (all that `rouge_score` decides on: Latin letters, ASCII digits, spaces, symbols), word,
    unspaced, or mark."""
    category, name = unicodedata.category(char), unicodedata.name(char, "")
    if category[0] == "M" or char in "\u200c\u200d":  # the joiners of Persian and Indic words
        return "mark"
    if char.isascii() or category not in ("Lu", "Ll", "Lt", "Lm", "Lo", "Nd"):
        return "latin"
    if name.startswith(_UNSPACED):
        return "unspaced"
    symbol = any(first <= char <= last for first, last in _SYMBOLS)
    return "latin" if symbol or "LATIN" in name else "word"


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Its length, with one big-integer step per item of `right` (Hyyrö, "Bit-Parallel LCS-length Computation
    Revisited", 2004)."""
    positions: dict[str, int] = {}
    for index, item in enumerate(left):
        positions[item] = positions.get(item, 0) | 1 << index
    everything = (1 << len(left)) - 1
    unmatched = everything
    for item in right:
        update = unmatched & positions.get(item, 0)
        unmatched = (unmatched + update | unmatched - update) & everything
    return len(left) - unmatched.bit_count()
