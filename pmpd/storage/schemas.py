"""The Arrow schema of every table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised when a column changes its meaning; tables of different versions are never mixed."""


_IDS = pa.list_(pa.int32())


def table_schema(name: str, fields: Sequence[tuple[str, pa.DataType]], **metadata: str) -> pa.Schema:
    """A schema that carries its table's name and version. Only the first field, the row's key, can't be
    null."""
    columns = [pa.field(column, type_, nullable=index > 0) for index, (column, type_) in enumerate(fields)]
    return pa.schema(
        columns, metadata={"pmpd.table": name, "pmpd.schema_version": str(SCHEMA_VERSION), **metadata}
    )


DOCUMENTS = table_schema(
    "documents",
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),  # as in PROMPTS
        ("text", pa.string()),  # what is tokenized of it; "" where there is a problem
        ("problem", pa.string()),  # why no prompt can be made of it: becomes the prompt's error
    ],
)
"""Records on their way to prompts; removed when those are whole."""


PROMPTS = table_schema(
    "prompts",
    [
        ("prompt_id", pa.string()),  # 16 hex digits, see pmpd.labeling.prompts
        ("source", pa.string()),  # where the record came from, for people: "file.json.gz:17", "topics/if"
        ("prompt_tokens", pa.int32()),
        ("document_tokens", pa.int32()),  # of the whole document, before truncation
        ("prompt_text", pa.string()),
        ("input_ids", _IDS),
        ("error", pa.string()),
    ],
)


REFERENCES = table_schema(
    "references",
    [
        ("prompt_id", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("reference_text", pa.string()),
        ("reference_ids", _IDS),  # new tokens, end-of-sequence included
        ("finish_reason", pa.string()),  # eos, length, error
        ("seconds", pa.float32()),
        ("worker", pa.string()),
        ("error", pa.string()),
    ],
)


PAIR = pa.struct(
    [
        ("high", pa.int8()),
        ("low", pa.int8()),
        ("label", pa.int8()),  # switch class 0..3
        (
            "scores",
            pa.list_(pa.float32()),
        ),  # of branches 0..3 by the label rule, not rounded; null: no candidate
        (
            "rouge_l",
            pa.list_(pa.float32()),
        ),  # of branches 0..3, not rounded (the label rule rounds); null where not computed
        ("high_rouge_l", pa.float32()),
        ("high_text", pa.string()),
        ("high_ids", _IDS),
        ("branch_tokens", _IDS),  # new tokens of branches 0..3; null where not computed
    ]
)


LABELLED_PROMPTS = table_schema(
    "labelled_prompts",
    [
        *((column.name, column.type) for column in PROMPTS),
        ("pairs", pa.list_(PAIR)),  # labels that came with the prompts
    ],
)


_FLOATS = pa.list_(pa.float32())

CURVE = pa.struct(
    [
        ("bits", pa.int8()),
        ("divergence", _FLOATS),  # nats: KL(unquantized, this precision) of decode forwards 1..m
        ("top_probability", _FLOATS),  # of this precision's distributions, likewise
        ("margin", _FLOATS),
        ("entropy", _FLOATS),
        ("agrees", pa.list_(pa.bool_())),  # whether its likeliest token is the reference's
        ("probe_divergence", pa.float32()),  # nats from the highest precision, over the prompt's last tokens
    ]
)
"""Teacher forcing: one precision's way along the reference output (`pmpd.labeling.curves`)."""


PLAN = pa.struct(
    [
        ("steps", pa.list_(pa.int32())),  # decode forwards before each pair's switch: `switch_steps`
        ("divergence", pa.float32()),  # nats, mean over the decode forwards
    ]
)
"""Teacher forcing: what a progressive plan loses, run as a decode would have it."""


PROMPT_STATE = pa.struct(
    [
        ("loss", pa.float32()),  # nats, mean over the prompt's last tokens at the highest precision
        ("entropy", pa.float32()),
        ("margin", pa.float32()),
        ("last_entropy", pa.float32()),  # behind the last token alone
        ("last_margin", pa.float32()),
    ]
)


def features_type(head_dim: int) -> pa.DataType:
    """KV features of one row: T prompt tokens of `head_dim` halves."""
    return pa.list_(pa.list_(pa.float16(), head_dim))


@cache
def labels_schema(head_dim: int) -> pa.Schema:
    """LABELS: one row per prompt with the labels of every pair and the KV features `keys`, `values` float16
    [T, head_dim]."""
    return table_schema(
        "labels",
        [
            ("prompt_id", pa.string()),
            ("prompt_tokens", pa.int32()),
            ("prompt_text", pa.string()),
            ("input_ids", _IDS),
            ("rule", pa.string()),  # name, digits and version of the label rule: rouge_l/3/v1
            ("reference_text", pa.string()),
            ("reference_ids", _IDS),
            ("pairs", pa.list_(PAIR)),
            ("keys", features_type(head_dim)),
            ("values", features_type(head_dim)),
            ("feature_tokens", pa.int32()),  # T
            ("prompt_state", PROMPT_STATE),  # these three by teacher-forced rules only
            ("curves", pa.list_(CURVE)),  # one per precision, descending
            ("plans", pa.list_(PLAN)),  # in the order of `chain.sixths_plans`
            ("seconds", pa.float32()),
            ("worker", pa.string()),
            ("error", pa.string()),
        ],
        **{"pmpd.head_dim": str(head_dim)},
    )


TRACE = pa.list_(pa.struct([("bits", pa.int8()), ("count", pa.int32())]))
"""Run-length encoded precisions of the forwards that produced the tokens, prefill first."""


CONVERSATIONS = table_schema(
    "conversations",
    [
        (
            "conversation_id",
            pa.string(),
        ),  # run, question and choice; sorts by run: the farm's item, all turns on one worker
        ("prompt_id", pa.string()),  # the question, whatever run answers it: what runs are joined by
        ("benchmark", pa.string()),
        ("benchmark_version", pa.string()),
        ("split", pa.string()),
        ("question_id", pa.string()),  # the record's own key
        ("category", pa.string()),
        ("model_id", pa.string()),
        ("run", pa.string()),  # short name of the scheduler setting: static-42/84
        ("kind", pa.string()),  # fp, uniform, or a scheduler's registered name
        ("scheduler", pa.string()),  # JSON: Scheduler.describe(), prefill_bit, max_new_tokens
        ("choice", pa.int16()),
        ("template", pa.string()),  # conversation template of the prompts
        ("turns", pa.list_(pa.string())),
        ("references", pa.list_(pa.string())),  # one per turn, null where the data set has none
    ],
)


GENERATIONS = table_schema(
    "generations",
    [
        ("row_id", pa.string()),  # 16 hex digits over conversation, setting and turn: one row each
        ("conversation_id", pa.string()),
        ("prompt_id", pa.string()),
        ("benchmark", pa.string()),
        ("benchmark_version", pa.string()),
        ("split", pa.string()),
        ("question_id", pa.string()),
        ("category", pa.string()),
        ("model_id", pa.string()),
        ("model_fingerprint", pa.string()),
        ("run", pa.string()),
        ("kind", pa.string()),
        ("scheduler", pa.string()),
        ("choice", pa.int16()),
        ("turn", pa.int8()),  # 1, 2, …; null where the whole conversation failed
        ("template", pa.string()),
        ("prompt_text", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("dropped_tokens", pa.int32()),  # cut from the prompt's left to fit the model's positions
        ("reused_tokens", pa.int32()),  # of the prompt, taken from the cache of the turn before
        ("input_ids", _IDS),
        ("reference_text", pa.string()),
        ("output_text", pa.string()),  # without special tokens, cut at the template's stop string
        ("output_tokens", pa.int32()),
        ("output_ids", _IDS),  # new tokens, end-of-sequence included
        ("output_pieces", pa.list_(pa.string())),  # the text that each new token added
        ("finish_reason", pa.string()),  # eos, stop, length, error
        ("precision_trace", TRACE),
        ("switch_steps", _IDS),  # high_bit_steps per pair, as decided; empty under an online scheduler
        ("classes", pa.list_(pa.int8())),  # switch class per pair, null for schedulers that decide no class
        ("decision_scores", pa.list_(pa.list_(pa.float32()))),  # logits per pair and class
        ("prefill_seconds", pa.float32()),
        ("decode_seconds", pa.float32()),  # the decision included
        ("decision_seconds", pa.float32()),  # of these, what the scheduler's decision took
        (
            "forward_seconds",
            pa.list_(
                pa.struct(
                    [
                        ("bits", pa.int8()),
                        ("seconds", pa.float32()),  # of a decode forward of a row alone: median
                        ("repeats", pa.list_(pa.float32())),  # the measurements, precisions in turn
                        ("idle", pa.bool_()),  # whether the machine did nothing else; null: can't be told
                    ]
                )
            ),
        ),
        ("device", pa.string()),
        ("worker", pa.string()),
        ("error", pa.string()),
    ],
)


_MATCH_FIELDS = [
    ("judgment_id", pa.string()),  # 16 hex digits over all that the judge is asked
    ("mode", pa.string()),  # single (a rating) or pair (a comparison)
    ("run", pa.string()),
    ("other_run", pa.string()),  # pair: what `run` is compared with
    ("position", pa.string()),  # pair: first, second: where the answer of `run` is shown
    ("prompt_id", pa.string()),
    ("question_id", pa.string()),
    ("category", pa.string()),
    ("choice", pa.int16()),
    ("turn", pa.int8()),
    ("prompt_name", pa.string()),  # of the judge's prompts
]


MATCHES = table_schema(
    "matches",
    [*_MATCH_FIELDS, ("system_text", pa.string()), ("prompt_text", pa.string())],
)


JUDGMENTS = table_schema(
    "judgments",
    [
        *_MATCH_FIELDS,
        ("judge", pa.string()),
        ("judgment_text", pa.string()),  # what the judge said
        ("score", pa.float32()),  # single: 1 to 10
        ("winner", pa.string()),  # pair: run, other, tie
        ("seconds", pa.float32()),
        ("worker", pa.string()),
        ("error", pa.string()),  # also where the judge gave no verdict
    ],
)


SCORES = table_schema(
    "scores",
    [
        ("benchmark", pa.string()),
        ("benchmark_version", pa.string()),
        ("split", pa.string()),
        ("model_id", pa.string()),
        ("run", pa.string()),
        ("kind", pa.string()),
        ("scheduler", pa.string()),
        ("turn", pa.int32()),  # null: all turns together
        ("metric", pa.string()),  # rouge_l, rouge_l_stemmed, bleu, bert_score, exact_match, first_divergence
        ("against", pa.string()),  # dataset, reference_output
        ("value", pa.float64()),
        ("low", pa.float64()),  # 95 % interval by paired bootstrap over questions
        ("high", pa.float64()),
        (
            "difference",
            pa.float64(),
        ),  # value minus that of the uniform highest precision, on the same questions
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        (
            "nearest_uniform",
            pa.string(),
        ),  # the uniform run of the nearest average bits; null for uniform and unquantized runs
        ("nearest_difference", pa.float64()),  # value minus that run's, paired likewise
        ("nearest_difference_low", pa.float64()),
        ("nearest_difference_high", pa.float64()),
        ("rows", pa.int64()),  # turns scored
        ("error_rows", pa.int64()),  # turns of this run that failed; excluded from `value`
        ("unpaired_rows", pa.int64()),  # turns left out because another run has no answer to them
        ("average_bits", pa.float64()),  # mean over decode forwards of the turns scored
        ("average_bits_low", pa.float64()),
        ("average_bits_high", pa.float64()),
        ("decode_time_ratio", pa.float64()),  # to the uniform highest precision, by the speed model
        ("decode_time_ratio_low", pa.float64()),  # lowest and highest of single measurements
        ("decode_time_ratio_high", pa.float64()),
        ("decode_time_ratio_16", pa.float64()),  # to the unquantized model
        ("decode_time_ratio_16_low", pa.float64()),
        ("decode_time_ratio_16_high", pa.float64()),
        ("decision_share", pa.float64()),  # of the measured decode seconds: decisions; null: not measured
    ],
)
