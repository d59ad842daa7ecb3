"""Generations and references -> scores with paired confidence intervals. No model, no I/O.

Legend: Q questions, R bootstrap resamples, C components of a statistic.

Rows of different runs are joined by (prompt_id, choice, turn), never by position. All runs of a benchmark are scored on the same turns:
those that every run answered, and bits and time are counted over the very turns that the score is of. A turn that failed in a run is
left out everywhere and counted, in the open; a run without any answer is left out as a whole, and named.

Confidence intervals: the bootstrap resamples *questions* (turns and choices of one question depend on each other), with the same
resamples for all runs, so differences between runs are paired.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pmpd.rouge import rouge_l

DATASET = "dataset"
REFERENCE_OUTPUT = "reference_output"
"""The unquantized model's answer to the same turn."""

TurnKey = tuple[str, int, int]
"""(prompt_id, choice, turn)."""

Row = Mapping[str, Any]
"""A row of `tables.GENERATIONS`; its turn is known (`results.read_generations` sees to that)."""


@dataclass(frozen=True)
class ScoreConfig:
    resamples: int = 2000
    """Bootstrap resamples behind the 95 % intervals."""
    seed: int = 0
    """Seed of the resamples."""
    bert_score: str | None = None
    """Folder or name of the model for BERTScore; none: BERTScore is not computed."""
    by_turn: bool = True
    """Also score each turn by itself, where a benchmark has several."""

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"--resamples {self.resamples}: 100 at least, or the intervals mean nothing")


# ------------------------------------------------------------------------------------------------------------------ text overlap


def bleu_statistics(prediction: str, reference: str) -> np.ndarray:
    """What a sentence adds to corpus BLEU, int64 [10]: matches of 1- to 4-grams, their totals, both lengths (sacrebleu, 13a tokens)."""
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

    # effective_order only changes a single sentence's score, which is not used; it keeps sacrebleu from warning about that score.
    return BLEU(effective_order=True)


def bert_scores(predictions: Sequence[str], references: Sequence[str], model: str) -> list[float]:
    """BERTScore F1 of each pair (Zhang et al. 2020); 0 where a text is empty.

    ValueError where the package or its model is missing or can't score: never a silent skip.
    """
    try:
        import bert_score
    except ImportError:
        raise ValueError(
            "--bert-score: the package bert-score is not installed; run pip install 'pmpd[bertscore]', or drop the flag"
        ) from None
    layers = None if model in bert_score.utils.model2layers else _hidden_layers(model)
    try:
        scorer = bert_score.BERTScorer(model_type=model, num_layers=layers)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--bert-score {model}: its model could not be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "give a local folder with the model, or run once where the Hugging Face hub can be reached"
        ) from error
    positions = getattr(scorer._model.config, "max_position_embeddings", 512)
    if scorer._tokenizer.model_max_length > positions:  # a tokenizer that does not say: texts would not be cut to what the model holds
        scorer._tokenizer.model_max_length = positions - 2  # RoBERTa keeps two positions to itself
    pairs = list(zip(predictions, references, strict=True))
    full = [pair for pair in pairs if all(text.strip() for text in pair)]
    try:
        scores = iter(scorer.score(*map(list, zip(*full, strict=True)))[2].tolist() if full else ())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise ValueError(
            f"--bert-score {model}: its model can't score these texts ({reason}); give another model, or drop the flag"
        ) from error
    return [next(scores) if all(text.strip() for text in pair) else 0.0 for pair in pairs]


def _hidden_layers(model: str) -> int:
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(model).num_hidden_layers)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--bert-score {model}: no such model ({str(error).splitlines()[0]}); give a folder with a model, or a known name"
        ) from error


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """Number of leading tokens that agree with the reference output."""
    agree = 0
    for ours, theirs in zip(tokens, reference, strict=False):
        if ours != theirs:
            break
        agree += 1
    return agree


# --------------------------------------------------------------------------------------------------------------------- precision


def decode_forwards(trace: Iterable[Mapping[str, int]]) -> Counter[int]:
    """Decode forwards by precision, from a precision trace: the first token is the prefill's and does not count."""
    forwards: Counter[int] = Counter()
    first = True
    for run in trace:
        forwards[run["bits"]] += run["count"] - first
        first = False
    return +forwards


def average_bits(forwards: Mapping[int, int]) -> float | None:
    """Mean precision of decode forwards, None where there is none (an answer of one token)."""
    total = sum(forwards.values())
    return sum(bits * count for bits, count in forwards.items()) / total if total else None


@dataclass(frozen=True)
class SpeedModel:
    """Seconds of one decode forward of a row alone, by precision, as the run's own workers measured them."""

    seconds: Mapping[int, float]
    """Median over workers."""
    low: Mapping[int, float]
    high: Mapping[int, float]
    """Fastest and slowest worker."""
    workers: Mapping[int, int]
    devices: tuple[str, ...]

    def ratio(self, forwards: Mapping[int, float], to_bits: int) -> float | None:
        """Decode time of `forwards` over that of as many forwards at `to_bits`; None where a precision was not measured."""
        total = sum(forwards.values())
        if not total or to_bits not in self.seconds or any(bits not in self.seconds for bits in forwards):
            return None
        return sum(count * self.seconds[bits] for bits, count in forwards.items()) / (total * self.seconds[to_bits])


def speed_model(rows: Iterable[Row]) -> SpeedModel:
    by_worker: dict[tuple[str, int], float] = {}
    devices = set()
    for row in rows:
        for measured in row.get("forward_seconds") or ():
            by_worker[(row.get("worker") or "", measured["bits"])] = measured["seconds"]
            devices.add(row.get("device") or "")
    values: dict[int, list[float]] = defaultdict(list)
    for (_, bits), seconds in by_worker.items():
        values[bits].append(seconds)
    ordered = sorted(values, reverse=True)
    return SpeedModel(
        seconds={bits: statistics.median(values[bits]) for bits in ordered},
        low={bits: min(values[bits]) for bits in ordered},
        high={bits: max(values[bits]) for bits in ordered},
        workers={bits: len(values[bits]) for bits in ordered},
        devices=tuple(sorted(devices - {""})),
    )


# -------------------------------------------------------------------------------------------------------------- joining the rows


@dataclass
class Run:
    """The rows of one scheduler setting."""

    name: str
    kind: str
    scheduler: str
    rows: dict[TurnKey, Row] = field(default_factory=dict)
    errors: dict[TurnKey, str] = field(default_factory=dict)
    """Turns that failed, with why."""

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.scheduler)


@dataclass
class Comparison:
    """All runs of one benchmark, split and model, joined."""

    benchmark: str
    benchmark_version: str
    split: str
    model_id: str
    runs: dict[str, Run]
    shared: list[TurnKey]
    """Turns that every run answered, sorted."""
    speed: SpeedModel
    high_bits: int | None
    """The highest quantized precision."""
    unanswered: dict[str, Run]
    """Runs without a single answer: they are in no number."""

    def find(self, kind: str) -> Run | None:
        return next((run for run in self.runs.values() if run.kind == kind), None)

    @property
    def unquantized(self) -> Run | None:
        return self.find("fp")

    @property
    def uniform_high(self) -> Run | None:
        return self.runs.get(f"uniform-{self.high_bits}")

    def turns(self) -> list[int]:
        return sorted({turn for _, _, turn in self.shared})


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Joins generation rows to comparisons, one per benchmark and split, and adds the oracle's rows where they can be known.

    ValueError: rows of several models or benchmark versions, different questions under one id, one turn twice, turns that the
    unquantized run lacks, no turn that all runs answered.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[(row["benchmark"], row["split"])].append(row)
    _check_models([row for group in groups.values() for row in group])
    return [_compare(group) for _, group in sorted(groups.items())]


def _check_models(rows: Sequence[Row]) -> None:
    """ValueError where rows, of whatever benchmark, are of several models."""
    model_ids = _examples(rows, "model_id")
    if len(model_ids) > 1:
        raise ValueError(f"rows of different model_id ({_told(model_ids)}) in one report; report them apart")
    for of_fp, name in ((True, "unquantized"), (False, "quantized")):
        # A row of a conversation that failed as a whole doesn't know its model.
        known = [row for row in rows if (row["kind"] == "fp") == of_fp and row["model_fingerprint"] is not None]
        fingerprints = _examples(known, "model_fingerprint")
        if len(fingerprints) > 1:
            raise ValueError(
                f"rows of {len(fingerprints)} {name} models (fingerprints {_told(fingerprints)}) under one --model-id "
                f"{next(iter(model_ids))}; give each model its own id and its own report"
            )


def _examples(rows: Iterable[Row], column: str) -> dict[str, str]:
    """Value of the column -> a benchmark that has it."""
    return {row[column]: row["benchmark"] for row in rows}


def _told(examples: Mapping[str, str]) -> str:
    return ", ".join(f"{value} in {benchmark}" for value, benchmark in sorted(examples.items()))


def _compare(rows: list[Row]) -> Comparison:
    benchmark, versions = rows[0]["benchmark"], _examples(rows, "benchmark_version")
    if len(versions) > 1:
        raise ValueError(
            f"{benchmark}: rows of different benchmark_version ({', '.join(sorted(versions))}) in one report; report them apart"
        )
    runs: dict[str, Run] = {}
    for row in rows:
        run = runs.setdefault(row["run"], Run(row["run"], row["kind"], row["scheduler"]))
        if run.scheduler != row["scheduler"]:
            raise ValueError(f"run {row['run']} of {benchmark} has two settings: {run.scheduler} and {row['scheduler']}; report them apart")
        key = (row["prompt_id"], row["choice"], row["turn"])
        if key in run.rows or key in run.errors:
            raise ValueError(f"run {row['run']} of {benchmark}: turn {key} is there twice; was one folder given twice?")
        if row["error"] is not None:
            run.errors[key] = row["error"]
        else:
            run.rows[key] = row
    unquantized = next((run for run in runs.values() if run.kind == "fp"), None)
    if unquantized is not None:
        _check_references(unquantized, runs.values(), benchmark)
    _check_questions(runs.values(), benchmark)
    unanswered = {name: run for name, run in runs.items() if not run.rows}
    runs = {name: run for name, run in runs.items() if run.rows}
    if not runs:
        name, run = next(iter(unanswered.items()))
        raise ValueError(
            f"{benchmark}: no run has an answer; the first error of {name}: {next(iter(run.errors.values()))}; cure it and run "
            "jobs/generate.py --retry-errors"
        )
    _add_oracle(runs)
    shared = sorted(set.intersection(*(set(run.rows) for run in runs.values())))
    if not shared:
        counts = ", ".join(f"{run.name} {len(run.rows)} (+{len(run.errors)} failed)" for run in runs.values())
        raise ValueError(f"{benchmark}: no turn was answered by all runs; answered turns: {counts}")
    widths = [
        bits for run in runs.values() if run.kind != "fp" for row in run.rows.values() for bits in decode_forwards(row["precision_trace"])
    ]
    return Comparison(
        benchmark, rows[0]["benchmark_version"], rows[0]["split"], rows[0]["model_id"], dict(sorted(runs.items(), key=_run_order)), shared,
        speed_model(rows), max(widths, default=None), unanswered,
    )  # fmt: skip


def _check_questions(runs: Iterable[Run], benchmark: str) -> None:
    """ValueError where one id stands for different questions: ids do not know the text (of a second turn's prompt, the answer is part)."""
    seen: dict[tuple[TurnKey, str], tuple[str, str | None]] = {}
    for run in runs:
        for key, row in run.rows.items():
            for column in ("template", "reference_text", *(["prompt_text"] if key[2] == 1 else [])):
                name, value = seen.setdefault((key, column), (run.name, row[column]))
                if value != row[column]:
                    raise ValueError(
                        f"{benchmark}: {name} and {run.name} answered different questions under the id {row['question_id']} "
                        f"(turn {key[2]}: {column} {_short(value)} and {_short(row[column])}); give both one question file and template"
                    )


def _short(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 60 else text[:60] + "…")


def _check_references(unquantized: Run, runs: Iterable[Run], benchmark: str) -> None:
    have = set(unquantized.rows) | set(unquantized.errors)
    missing = sorted({key for run in runs for key in (*run.rows, *run.errors)} - have)
    if missing:
        examples = ", ".join(f"{prompt} (choice {choice}, turn {turn})" for prompt, choice, turn in missing[:3])
        raise ValueError(
            f"{benchmark}: the unquantized model has no answer to {len(missing)} turns that others answered, e.g. {examples}; "
            "run jobs/generate.py --schedulers fp with the same questions"
        )


KINDS = ("fp", "uniform", "static", "kv_cache", "confidence", "random", "oracle")
"""The order of tables and legends."""


def _run_order(item: tuple[str, Run]) -> tuple[int, list[float], str]:
    run = item[1]
    steps = run.settings.get("high_bit_steps") or run.settings.get("precisions") or []
    order = KINDS.index(run.kind) if run.kind in KINDS else len(KINDS)
    return order, [-float(step) for step in steps], run.name


def _add_oracle(runs: dict[str, Run]) -> None:
    """Adds the run `oracle`: per conversation the cheapest fixed plan that is as good as never switching, chosen with hindsight.

    As good: in every turn round(ROUGE-L F1 vs the reference output, 3) is at least that of the uniform highest precision (the rule by
    which labels are made, applied to whole conversations). It costs no further generation: the plans are the static runs at hand.
    """
    unquantized = next((run for run in runs.values() if run.kind == "fp"), None)
    uniform = [run for run in runs.values() if run.kind == "uniform"]
    static = [run for run in runs.values() if run.kind == "static"]
    if unquantized is None or not uniform or len(static) < 2:
        return
    high = max(uniform, key=lambda run: run.settings["precisions"][0])
    conversations: dict[tuple[str, int], list[TurnKey]] = defaultdict(list)
    for key in sorted(set.intersection(*(set(run.rows) for run in (unquantized, high, *static)))):
        conversations[key[:2]].append(key)
    oracle = Run("oracle", "oracle", json.dumps({"name": "oracle", "plans": [high.name, *sorted(run.name for run in static)]}))
    for turns in conversations.values():
        wanted = [_label_score(high, unquantized, key) for key in turns]
        good = [
            run for run in static if all(_label_score(run, unquantized, key) >= least for key, least in zip(turns, wanted, strict=True))
        ]
        chosen = min((high, *good), key=lambda run: (_mean_bits(run.rows[key] for key in turns), run.name))
        for key in turns:
            oracle.rows[key] = {**chosen.rows[key], "run": "oracle", "kind": "oracle", "chosen": chosen.name}
    for run in (high, *static):
        oracle.errors.update(run.errors)
    runs["oracle"] = oracle


def _label_score(run: Run, unquantized: Run, key: TurnKey) -> float:
    return round(rouge_l(run.rows[key]["output_text"], unquantized.rows[key]["output_text"]), 3)


def _mean_bits(rows: Iterable[Row]) -> float:
    return average_bits(sum((decode_forwards(row["precision_trace"]) for row in rows), Counter())) or 0.0


# ------------------------------------------------------------------------------------------------------------------------ scores


class Statistic(Protocol):
    """From sums over questions [..., C] to the score [...]."""

    def __call__(self, sums: np.ndarray) -> np.ndarray: ...


def mean_statistic(sums: np.ndarray) -> np.ndarray:
    """A ratio of sums: [..., 2] (numerator, denominator)."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


def bleu_statistic(sums: np.ndarray) -> np.ndarray:
    flat = sums.reshape(-1, sums.shape[-1])
    return np.asarray([bleu_of_statistics(total) for total in flat]).reshape(sums.shape[:-1])


def bootstrap_weights(questions: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each question: int32 [R, Q]. The same for all runs and metrics, which is what pairs them."""
    rng = np.random.default_rng(seed)
    weights = np.empty((resamples, questions), dtype=np.int32)
    for start in range(0, resamples, 256):  # in slices: the draw itself is int64
        count = min(256, resamples - start)
        weights[start : start + count] = rng.multinomial(questions, np.full(questions, 1 / questions), size=count)
    return weights


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval."""
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Metric:
    name: str
    against: str
    statistic: Statistic
    of_pair: Callable[[Row, str, Sequence[int]], Sequence[float] | np.ndarray]
    """(row, reference text, reference tokens) -> components [C] that are summed over rows."""


def _mean_of(score: Callable[[Row, str, Sequence[int]], float]) -> Callable[[Row, str, Sequence[int]], Sequence[float]]:
    return lambda row, text, tokens: (score(row, text, tokens), 1.0)


METRICS: tuple[Metric, ...] = (
    *(
        metric
        for against in (DATASET, REFERENCE_OUTPUT)
        for metric in (
            Metric("rouge_l", against, mean_statistic, _mean_of(lambda row, text, _: rouge_l(row["output_text"], text))),
            Metric(
                "rouge_l_stemmed", against, mean_statistic, _mean_of(lambda row, text, _: rouge_l(row["output_text"], text, stemmed=True))
            ),
            Metric("bleu", against, bleu_statistic, lambda row, text, _: bleu_statistics(row["output_text"], text)),
        )
    ),
    Metric(
        "exact_match", REFERENCE_OUTPUT, mean_statistic, _mean_of(lambda row, _, tokens: float(list(row["output_ids"]) == list(tokens)))
    ),
    Metric(
        "first_divergence", REFERENCE_OUTPUT, mean_statistic, _mean_of(lambda row, _, tokens: first_divergence(row["output_ids"], tokens))
    ),
)


def score(comparison: Comparison, config: ScoreConfig) -> list[dict[str, Any]]:
    """Rows of `tables.SCORES`: every run x metric, for all turns together (`turn` null) and for each turn."""
    turns: list[int | None] = [None]
    if config.by_turn and len(comparison.turns()) > 1:
        turns += comparison.turns()
    metrics = [*METRICS, *(_bert_metrics(comparison, config.bert_score) if config.bert_score else ())]
    return [row for turn in turns for row in _score_turns(comparison, config, metrics, turn)]


def _score_turns(comparison: Comparison, config: ScoreConfig, metrics: Sequence[Metric], turn: int | None) -> list[dict[str, Any]]:
    keys = [key for key in comparison.shared if turn in (None, key[2])]
    result = []
    for against in (DATASET, REFERENCE_OUTPUT):
        pairs = _reference_of(comparison, against, keys)
        if not pairs:
            continue
        questions = {prompt: index for index, prompt in enumerate(sorted({key[0] for key in pairs}))}
        weights = bootstrap_weights(len(questions), config.resamples, config.seed)
        costs = {run.name: _costs(comparison, run, keys, pairs, questions, weights, turn) for run in comparison.runs.values()}
        for metric in metrics:
            if metric.against == against:
                result += _score_metric(comparison, metric, pairs, questions, weights, costs, turn)
    return result


def _score_metric(
    comparison: Comparison, metric: Metric, pairs: Pairs, questions: Mapping[str, int], weights: np.ndarray, costs: Mapping[str, Any],
    turn: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    sums = {run.name: _sums(run, pairs, metric, questions) for run in comparison.runs.values()}
    values = {name: float(metric.statistic(total.sum(axis=0))) for name, total in sums.items()}
    samples = {name: metric.statistic(weights @ total) for name, total in sums.items()}
    base = comparison.uniform_high.name if comparison.uniform_high else None
    nearest = _nearest_uniform(comparison, costs)
    result = []
    for run in comparison.runs.values():
        low, high = interval(samples[run.name])
        row = {
            "benchmark": comparison.benchmark, "benchmark_version": comparison.benchmark_version, "split": comparison.split,
            "model_id": comparison.model_id, "run": run.name, "kind": run.kind, "scheduler": run.scheduler, "turn": turn,
            "metric": metric.name, "against": metric.against, "value": values[run.name], "low": low, "high": high,
            "rows": len(pairs), "nearest_uniform": nearest.get(run.name), **costs[run.name],
        }  # fmt: skip
        for prefix, other in (("", base), ("nearest_", nearest.get(run.name))):
            if other is not None:
                least, most = interval(samples[run.name] - samples[other])
                row |= {
                    f"{prefix}difference": values[run.name] - values[other],
                    f"{prefix}difference_low": least,
                    f"{prefix}difference_high": most,
                }
        result.append(row)
    return result


def _nearest_uniform(comparison: Comparison, costs: Mapping[str, Any]) -> dict[str, str]:
    """Run that mixes precisions -> the uniform run of the nearest average bits: what it must beat to be worth its mixing."""
    bits = {name: cost["average_bits"] for name, cost in costs.items() if cost["average_bits"] is not None}
    uniform = [run.name for run in comparison.runs.values() if run.kind == "uniform" and run.name in bits]
    mixing = [run.name for run in comparison.runs.values() if run.kind not in ("fp", "uniform") and run.name in bits]
    return {name: min(uniform, key=lambda other: abs(bits[other] - bits[name])) for name in mixing} if uniform else {}


Pairs = Mapping[TurnKey, tuple[str, Sequence[int]]]
"""(text, tokens) of the reference of each turn that has one."""


def _reference_of(comparison: Comparison, against: str, keys: Sequence[TurnKey]) -> Pairs:
    if against == REFERENCE_OUTPUT:
        run = comparison.unquantized
        return {key: (run.rows[key]["output_text"], run.rows[key]["output_ids"]) for key in keys} if run else {}
    anyone = next(iter(comparison.runs.values()))
    return {key: (anyone.rows[key]["reference_text"], ()) for key in keys if anyone.rows[key]["reference_text"] is not None}


def _sums(run: Run, pairs: Pairs, metric: Metric, questions: Mapping[str, int]) -> np.ndarray:
    """Components summed per question: [Q, C]."""
    components = {key: np.asarray(metric.of_pair(run.rows[key], *reference), dtype=np.float64) for key, reference in pairs.items()}
    sums = np.zeros((len(questions), len(next(iter(components.values())))))
    for key, values in components.items():
        sums[questions[key[0]]] += values
    return sums


def _costs(
    comparison: Comparison, run: Run, keys: Sequence[TurnKey], pairs: Pairs, questions: Mapping[str, int], weights: np.ndarray,
    turn: int | None,
) -> dict[str, Any]:  # fmt: skip
    """What the run cost on the turns that are scored, `pairs`: average bits with their interval, ratios of decode time; and how many of
    its turns are not among those that all runs answered, `keys`."""
    total: Counter[int] = Counter()
    sums = np.zeros((len(questions), 2))
    for key in pairs:
        forwards = decode_forwards(run.rows[key]["precision_trace"])
        total += forwards
        sums[questions[key[0]]] += (sum(bits * count for bits, count in forwards.items()), sum(forwards.values()))
    low, high = interval(mean_statistic(weights @ sums)) if total else (None, None)
    answered = sum(turn in (None, key[2]) for key in run.rows)
    return {
        "average_bits": average_bits(total),
        "average_bits_low": low,
        "average_bits_high": high,
        "decode_time_ratio": comparison.speed.ratio(total, comparison.high_bits) if comparison.high_bits else None,
        "decode_time_ratio_16": comparison.speed.ratio(total, 16),
        "error_rows": sum(turn in (None, key[2]) for key in run.errors),
        "unpaired_rows": answered - len(keys),
    }


def _bert_metrics(comparison: Comparison, model: str) -> list[Metric]:
    """BERTScore as metrics: all pairs are scored in one pass first, since the model wants batches."""
    wanted: dict[tuple[str, str], float] = {}
    for against in (DATASET, REFERENCE_OUTPUT):
        for key, (text, _) in _reference_of(comparison, against, comparison.shared).items():
            for run in comparison.runs.values():
                wanted[(run.rows[key]["output_text"], text)] = 0.0
    pairs = sorted(wanted)
    scores = dict(zip(pairs, bert_scores([pair[0] for pair in pairs], [pair[1] for pair in pairs], model), strict=True))
    of_pair = _mean_of(lambda row, text, _: scores[(row["output_text"], text)])
    return [Metric("bert_score", against, mean_statistic, of_pair) for against in (DATASET, REFERENCE_OUTPUT)]


# ----------------------------------------------------------------------------------------------------------------- static search


def pick_static(scores: Iterable[Mapping[str, Any]], metric: str, against: str, budget: float) -> dict[str, Any]:
    """The cheapest static setting whose score loses at most `budget` (a share of the uniform highest precision's score) to it.

    Cheapest: fewest average bits, then the better score. The setting of never switching always qualifies. ValueError where the
    scores hold no static run or no uniform one to compare with.
    """
    chosen = [row for row in scores if row["metric"] == metric and row["against"] == against and row["turn"] is None]
    static = [row for row in chosen if row["kind"] == "static"]
    if not static or any(row.get("difference") is None for row in static):
        raise ValueError(f"static search: no static and uniform runs with {metric} against {against} were scored")
    least = (static[0]["value"] - static[0]["difference"]) * (1 - budget)
    good = [row for row in static if row["value"] >= least]
    if not good:
        raise ValueError(f"static search: no setting keeps {metric} >= {least:.4f}; raise --quality-budget ({budget}) or widen the grid")
    return dict(min(good, key=lambda row: (row["average_bits"], -row["value"])))
