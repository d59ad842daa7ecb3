"""Text metrics: BLEU, BERTScore, where two token sequences part."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pmpd.errors import UserError

# ------------------------------------------------------------------------------------------------------------


def bleu_statistics(prediction: str, reference: str) -> np.ndarray:
    """What a sentence adds to corpus BLEU, int64 [10]: matches of 1- to 4-grams, their totals, both lengths
    (sacrebleu, 13a tokens)."""
    score = _bleu().sentence_score(prediction, [reference])
    return np.asarray([*score.counts, *score.totals, score.sys_len, score.ref_len], dtype=np.int64)


def bleu_of_statistics(total: np.ndarray) -> float:
    """Corpus BLEU in [0, 100] from summed `bleu_statistics` [10]."""
    from sacrebleu.metrics import BLEU

    counts, totals = [int(n) for n in total[:4]], [int(n) for n in total[4:8]]
    return BLEU.compute_bleu(counts, totals, int(total[8]), int(total[9]), smooth_method="exp").score


def bleu_signature() -> str:
    bleu = _bleu()
    bleu.corpus_score(["a"], [["a"]])
    return str(bleu.get_signature())


@functools.cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    # effective_order only changes a single sentence's score, which is not used; it keeps sacrebleu from
    # warning about that score.
    return BLEU(effective_order=True)


def bert_scores(pairs: Sequence[tuple[str, str]], model: str) -> list[float]:
    """BERTScore F1 of each (answer, reference) (Zhang et al. 2020); 0 where a text is empty.

    ValueError where the package or its model is missing or can't score: never a silent skip.
    """
    try:
        import bert_score
    except ImportError:
        raise UserError(
            "--bert-score: the package bert-score is not installed; run pip install 'pmpd[bertscore]', or "
            "drop the flag"
        ) from None
    layers = None if model in bert_score.utils.model2layers else _hidden_layers(model)
    try:
        scorer = bert_score.BERTScorer(model_type=model, num_layers=layers)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--bert-score {model}: its model could not be loaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); "
            "give a local folder with the model, or run once where the Hugging Face hub can be reached"
        ) from error
    positions = getattr(scorer._model.config, "max_position_embeddings", 512)
    if (
        scorer._tokenizer.model_max_length > positions
    ):  # a tokenizer that does not say: texts would not be cut to what the model holds
        scorer._tokenizer.model_max_length = positions - 2  # RoBERTa keeps two positions to itself
    full = [pair for pair in pairs if all(text.strip() for text in pair)]
    try:
        scores = iter(scorer.score(*map(list, zip(*full, strict=True)))[2].tolist() if full else ())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise UserError(
            f"--bert-score {model}: its model can't score these texts ({reason}); give another model, or "
            f"drop the flag"
        ) from error
    return [next(scores) if all(text.strip() for text in pair) else 0.0 for pair in pairs]


def _hidden_layers(model: str) -> int:
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(model).num_hidden_layers)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--bert-score {model}: no such model ({str(error).splitlines()[0]}); give a folder with a "
            f"model, or a known name"
        ) from error


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """Number of leading tokens that agree with the reference output."""
    agree = 0
    for ours, theirs in zip(tokens, reference, strict=False):
        if ours != theirs:
            break
        agree += 1
    return agree
