"""Teacher-forced divergence: equal to the plain float64 sum over the vocabulary, whatever the batch; and the
labels that are made from it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console

from pmpd import PMPDForCausalLM, storage
from pmpd.cli.flags.label import LabelJob
from pmpd.cli.label import main
from pmpd.decode.slots import TokenPlaces
from pmpd.farm.label_task import LabelTask
from pmpd.labeling import curves as curves_module
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.curves import curves_columns, exact_divergence, forced_rows, plain_divergence
from pmpd.labeling.label import label_prompts
from pmpd.labeling.rule import RULES, LabelRule
from pmpd.schedulers.chain import chain_bits, class_steps, sixths_plans
from pmpd.storage.summary import read_summary
from pmpd.weights.model_spec import ModelSpec
from tests.test_engine import random_prompts

CHAIN = (4, 3, 2)


@pytest.fixture(scope="module")
def models(dense_folder, anyprec_model):
    return anyprec_model("llama"), PMPDForCausalLM(dense_folder("llama"), kernel="reference").eval()


@pytest.fixture(scope="module")
def texts():
    """Prompts and references of all lengths: prompts shorter than the probe and longer, a reference of two
    tokens."""
    prompts = random_prompts(7, 60, seed=4)
    references = [[3, *tokens, 4] for tokens in random_prompts(7, 30, seed=5)]
    prompts[0], references[1] = prompts[0][:1], references[1][:2]
    keys = [f"{index:016x}" for index in range(7)]
    assert max(map(len, prompts)) > curves_module.PROBE_TOKENS
    return dict(zip(keys, prompts, strict=True)), dict(zip(keys, references, strict=True))


def test_curves_are_the_plain_divergence_at_every_precision(models, texts, monkeypatch):
    quantized, unquantized = models
    prompts, references = texts
    vocabulary = unquantized.model.config.vocab_size
    monkeypatch.setitem(curves_module.LOGIT_BYTES, "cpu", 4 * vocabulary * 130)  # some rows a batch
    rows = {row.key: row for row in forced_rows(quantized, unquantized, prompts, references, CHAIN, 31)}
    assert set(rows) == set(prompts)
    for key, row in rows.items():
        m = len(references[key]) - 1
        assert [curve.bits for curve in row.curves] == list(CHAIN)
        for curve in row.curves:
            plain = plain_divergence(
                quantized, unquantized, prompts[key], references[key], CHAIN[0], [curve.bits] * m
            )
            np.testing.assert_allclose(curve.divergence, plain, rtol=1e-3, atol=2e-6, err_msg=key)
            assert curve.agrees.shape == (m,)
            assert curve.statistics["entropy"].shape == (m,)
        assert row.features[0].shape == (len(prompts[key]), quantized.head_dim)
        assert [curve.probe_divergence is None for curve in row.curves] == [True, False, False]
    means = [np.mean([row.curves[i].divergence.mean() for row in rows.values()]) for i in range(3)]
    assert 0 < means[0] < means[1] < means[2], "fewer bits must be farther from the unquantized model"


def test_an_exact_plan_is_the_plain_one_and_no_curve(models, texts):
    quantized, unquantized = models
    prompts, references = texts
    key = max(references, key=lambda key: len(references[key]))
    m = len(references[key]) - 1
    mixed = [(4, 2, 3)[t % 3] for t in range(m)]
    found = exact_divergence(quantized, unquantized, prompts[key], references[key], 4, [mixed, [2] * m])
    for plan, divergence in zip((mixed, [2] * m), found, strict=True):
        plain = plain_divergence(quantized, unquantized, prompts[key], references[key], 4, plan)
        np.testing.assert_allclose(divergence, plain, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("together", [False, True])
def test_the_plans_of_a_row_are_the_plain_ones(models, texts, monkeypatch, together):
    """A switching plan costs a forward over its tail alone, against the cache of the plan that it left, and
    has the divergence of a decode of it from its start, in batches of rows of other lengths; also where the
    rows of a forward attend together, as on a GPU."""
    quantized, unquantized = models
    if together:
        padded = []

        def places(*some, **more):
            padded.append(TokenPlaces(*some, **{**more, "together": True}))
            return padded[-1]

        monkeypatch.setattr("pmpd.decode.forced.TokenPlaces", places)
    prompts, references = texts
    vocabulary = unquantized.model.config.vocab_size
    monkeypatch.setitem(curves_module.LOGIT_BYTES, "cpu", 4 * vocabulary * 130)  # some rows a batch
    seen, apart = {}, 0.0
    for row in forced_rows(quantized, unquantized, prompts, references, CHAIN, 40):
        m = len(references[row.key]) - 1
        assert list(row.steps) == [tuple(plan) for plan in sixths_plans(2).tolist()]
        assert set(row.plans) == set(row.steps)
        forwards = np.arange(1, m + 1)
        bits = {
            plan: chain_bits(CHAIN, np.tile(steps, (m, 1)), forwards).tolist()
            for plan, steps in row.steps.items()
        }
        exact = exact_divergence(
            quantized, unquantized, prompts[row.key], references[row.key], 4, list(bits.values())
        )
        for (plan, plan_bits), found in zip(bits.items(), exact, strict=True):
            np.testing.assert_allclose(row.plans[plan], found, rtol=2e-3, atol=2e-6, err_msg=str(plan))
            seen[tuple(plan_bits)] = plan_bits
        plan = (2, 4)
        plain = plain_divergence(quantized, unquantized, prompts[row.key], references[row.key], 4, bits[plan])
        np.testing.assert_allclose(row.plans[plan], plain, rtol=1e-3, atol=2e-6)
        by_curves = {curve.bits: curve.divergence for curve in row.curves}
        summed = np.where(forwards <= row.steps[0, 3][1], by_curves[3], by_curves[2])
        apart = max(apart, abs(summed.mean() / row.plans[0, 3].mean() - 1))
        stored = curves_columns(row)["plans"]
        assert [each["divergence"] for each in stored] == [
            pytest.approx(found.mean(), rel=1e-3) for found in exact
        ]
    if together:
        assert any(each.padded is not None and each.padded.begun for each in padded)
    assert len(seen) > 60
    assert apart > 0.01, "a plan is no sum of uniform curves"


def test_the_kv_features_and_the_state_are_those_of_a_prefill_at_the_highest_precision(models, texts):
    quantized, unquantized = models
    prompts, references = texts
    for row in forced_rows(quantized, unquantized, prompts, references, CHAIN, 31):
        ids = torch.tensor([list(prompts[row.key])])
        quantized.engine().state.set_uniform(4)
        with torch.no_grad():
            output = quantized.model(ids, use_cache=True)
        layer = output.past_key_values.layers[-1]
        np.testing.assert_allclose(row.features[0], layer.keys[0].mean(0).numpy(), rtol=2e-3, atol=2e-3)
        probe = output.logits[0, -curves_module.PROBE_TOKENS :].log_softmax(-1)
        entropies = -(probe.exp() * probe).sum(-1)
        assert row.state["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-4)
        assert row.state["last_entropy"] == pytest.approx(float(entropies[-1]), rel=1e-4)
        if len(probe) > 1:
            seen = ids[0, -len(probe) + 1 :, None]
            assert row.state["loss"] == pytest.approx(float(-probe[:-1].gather(1, seen).mean()), rel=1e-4)


def test_the_label_is_the_smallest_class_within_the_tolerance(models, texts):
    quantized, unquantized = models
    prompts, references = texts
    rows = [{"prompt_id": key, "prompt_text": "", "input_ids": ids} for key, ids in prompts.items()]
    given = {
        key: {"error": None, "reference_text": "", "reference_ids": ids} for key, ids in references.items()
    }
    short = rows[0]["prompt_id"]
    given[short]["reference_ids"] = given[short]["reference_ids"][:1]
    tolerance = 0.002
    rule = LabelRule("kl", 1, RULES["kl"].score, branches="teacher_forced", tolerance=tolerance)
    config = LabelConfig(CHAIN, 31, rule=rule)
    labelled = {row["prompt_id"]: row for row in label_prompts(quantized, rows, given, config, unquantized)}
    assert "the reference has one token" in labelled.pop(short)["error"]
    steps, seen = class_steps(31), set()
    for key, row in labelled.items():
        losses_of = {tuple(plan["steps"]): plan["divergence"] for plan in row["plans"]}
        for place, pair in enumerate(row["pairs"]):
            losses = [losses_of[(0, step) if place else (step, steps[-1])] for step in steps]
            np.testing.assert_allclose(pair["scores"], -np.asarray(losses), rtol=1e-5)
            good = [k for k, loss in enumerate(losses) if loss <= losses[3] + tolerance]
            assert pair["label"] == good[0], (key, losses)
            seen.add(pair["label"])
    assert len(seen) > 1, "all labels are alike: this shows little"
    assert rule.identity == "kl/0.002/v1"


def test_the_job_labels_by_divergence_without_a_decode(dense_folder, anyprec_folder, tmp_path):
    lines = "".join(json.dumps({"text": f"text number {index} " * 5}) + "\n" for index in range(5))
    (tmp_path / "texts.jsonl").write_text(lines)
    job = LabelJob(
        model_path=str(anyprec_folder()),
        reference_model_path=str(dense_folder()),
        dataset=str(tmp_path / "texts.jsonl"),
        max_new_tokens=12,
        rule="kl",
        output_dir=str(tmp_path / "out"),
        kernel="reference",
        num_workers=0,
        prompt_form="whole",
        max_prompt_tokens=50,
    )
    main(job, Console(quiet=True))
    table = storage.read_table(storage.join(job.output_dir, "labels"))
    summary = read_summary(storage.join(job.output_dir, "labels"))
    taken = sum(summary["runs"][-1]["forwards"].values()) / len(table)
    task = LabelTask(ModelSpec(job.model_path), CHAIN, job.max_new_tokens, None, RULES["kl"])
    assert 0.75 * task.most_forwards < taken <= task.most_forwards, "what the first ETA is reckoned with"
    assert set(table["rule"].to_pylist()) == {"kl/0.05/v2"}
    assert pa.types.is_list(table["curves"].type)
    for row in table.to_pylist():
        assert row["prompt_tokens"] == 50
        m = len(row["reference_ids"]) - 1
        assert [curve["bits"] for curve in row["curves"]] == list(CHAIN)
        assert {len(curve["divergence"]) for curve in row["curves"]} == {m}
        assert row["pairs"][0]["branch_tokens"] == [None] * 4
