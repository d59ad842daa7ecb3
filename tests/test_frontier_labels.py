"""Label sets of the scheduler study, from texts to the small folder that the study reads, on a tiny model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from bench import _frontier_kv, _frontier_pack, _frontier_prompts, _frontier_texts, _record
from bench._frontier_kv import FoldLabels, KvFits
from bench._frontier_model import OnlineExact, exact_losses, given_tokens
from bench.frontier import AnswersStudy, Fit, Pack, Study, load
from bench.frontier_labels import Config, main
from pmpd import PMPDForCausalLM
from pmpd.evaluation.curve_set import folds
from pmpd.labeling.rule import RULES
from pmpd.schedulers.budget import choose_classes
from pmpd.weights.base import PrecisionLinear

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
SETS = ("main", "cost", "bfloat16", "space", "cut", "tokens")


@pytest.fixture(scope="module")
def study(dense_folder, anyprec_folder, tmp_path_factory):
    """Folder of a study with every set, made in two parts."""
    folder = tmp_path_factory.mktemp("study")
    models = []
    for name, source in (("anyprec", anyprec_folder()), ("dense", dense_folder())):
        shutil.copytree(source, folder / name)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
        models.append(str(folder / name))
    paragraph = "Lobster number {0} is blue. It lives in cold water and eats what it finds there. " * 14
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": paragraph.format(i)}) + "\n" for i in range(24)))
    _frontier_prompts.write(str(texts), None, folder / "texts", 16, 16, whole=True)
    settings = {
        "texts": folder / "texts",
        "model_path": models[0],
        "reference_model_path": models[1],
        "output": folder,
        "sets": (*SETS, "more"),
        "size": 20,
        "more_size": 32,
        "noise_size": 12,
        "max_new_tokens": 16,
        "max_prompt_tokens": 500,
        "slots": 8,
        "kernel": "reference",
    }
    for part in ("0/2", "1/2"):
        main(Config(**settings, part=part))
    main(Config(**settings, finish=True))
    Pack(folder, folder / "pack").run()
    return folder


def test_parts_make_every_row_once_and_a_set_made_again_in_the_same_way_agrees(study):
    sets = _frontier_pack.read_labels(study / "pack" / _frontier_pack.LABELS)
    assert set(sets) == set(SETS)
    for rules in sets.values():
        assert set(rules) == {"kl", "agreement", "rouge_l"}
    first, again = sets["main"], sets["cost"]
    assert len(first["kl"].lines) == len(set(first["kl"].lines)) >= 24
    for rule in first:
        mine, other = first[rule].joined(again[rule])
        assert len(mine) == len(again[rule].lines) >= 8
        assert np.array_equal(first[rule].labels[mine], again[rule].labels[other]), rule
        assert np.allclose(first[rule].scores[mine], again[rule].scores[other]), rule
    assert not np.allclose(*(judged.scores[:8] for judged in (first["kl"], sets["tokens"]["kl"]))), (
        "half the tokens are another set"
    )


def test_labels_of_rouge_come_from_the_decodes_of_the_rule_agreement(study):
    rules = _frontier_pack.read_labels(study / "pack" / _frontier_pack.LABELS)["main"]
    rouge = rules["rouge_l"]
    assert np.array_equal(rouge.tokens, rules["agreement"].tokens)
    for row, labels in zip(rouge.scores, rouge.labels, strict=True):
        for scores, label in zip(row, labels, strict=True):
            assert label == RULES["rouge_l"].label(scores.tolist(), float(scores[3]))


def test_curves_are_what_they_were_but_for_their_last_digits(study):
    packed = _frontier_pack.read_curves(study / "pack")
    curves, _ = load(tuple(str(study / "main" / "kl" / kind) for kind in ("continuations", "instructions")))
    assert packed.keys == curves.keys
    assert packed.chain == curves.chain
    assert np.array_equal(packed.groups, curves.groups)
    assert np.array_equal(packed.valid, curves.valid)
    assert np.allclose(packed.loss, curves.loss, rtol=1e-3, atol=1e-6)
    assert np.allclose(packed.features, curves.features)
    assert np.allclose(packed.plan_loss, curves.plan_loss)
    assert np.array_equal(packed.plan_bits, curves.plan_bits)


def test_the_study_reads_the_small_folder_and_says_what_each_rule_is_worth(study, tmp_path, monkeypatch):
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    monkeypatch.setattr(_record.write, "__defaults__", ("cpu", tmp_path))
    pack = study / "pack"
    for rule in ("rouge_l", "agreement", "kl", "loss"):
        Fit(study, pack, rule, folds=2, epochs=2).run()
    Study((), (2.5, 3.0), 2, 50, name="it", pack=pack).run()
    results = json.loads((tmp_path / "it.json").read_text())["results"]
    policies = {row["policy"] for row in results["policies"]}
    assert {f"KV classifier, {rule}" for rule in ("rouge_l", "agreement", "kl", "loss")} <= policies
    assert {row["rule"] for row in results["classifiers"]} == {"rouge_l", "agreement", "kl"}
    noise = {(row["against"], row["rule"]) for row in results["rule_noise"]}
    assert noise == {(name, rule) for name in SETS[2:] for rule in ("rouge_l", "agreement", "kl")}
    assert {row["rule"] for row in results["whole_answers"]} == {"agreement", "kl"}
    steps = {(cost["set"], cost["step"]) for cost in results["costs"]}
    assert ("main", "references") in steps
    assert ("tokens", "agreement") in steps
    page = (tmp_path / "it.md").read_text()
    assert "| rouge_l | 4-3 | space" in page


def test_a_classifier_is_judged_on_prompts_of_its_own_fold_only(study):
    pack = study / "pack"
    Fit(study, pack, "kl", folds=3, epochs=1).run()
    curves = _frontier_pack.read_curves(pack)
    fits = KvFits.read(pack / "kv-kl.npz")
    fold = folds(curves, 3, 0)
    assert np.array_equal(fits.fold, fold)
    for f in range(3):
        assert np.array_equal(fits.splits[f] == 2, fold == f), "a held-out prompt was trained on"
    assert choose_classes(fits.outputs[0], curves.chain, 0.0, fits.kind).shape == (len(curves), 2)
    (pack / "kv-kl.npz").unlink()


def test_exact_forwards_of_a_plan_of_one_precision_are_its_curve(study):
    curves = _frontier_pack.read_curves(study / "pack")
    given = given_tokens([str(study / "main" / "kl" / kind) for kind in ("continuations", "instructions")])
    rows = [given[key] for key in curves.keys]
    models = [PMPDForCausalLM(study / name, kernel="reference").eval() for name in ("anyprec", "dense")]
    length = curves.loss.shape[2]
    wander = np.where(np.arange(length) % 2, 4, 2)
    plans = [np.full(length, bits) for bits in curves.chain] + [np.tile(wander, (len(curves), 1))]
    found = exact_losses(*models, rows, plans, curves.chain[0])
    for exact, loss in zip(found, curves.loss.transpose(1, 0, 2), strict=False):
        assert np.allclose(exact, loss.sum(1), rtol=5e-3, atol=1e-4)
    by_curves = curves.summed(np.where(np.arange(length) % 2, 0, 2)[None].repeat(len(curves), 0)).loss
    assert not np.allclose(found[-1], by_curves, rtol=1e-3), "a cache of two precisions is not one's own"


def test_tokens_of_a_precision_are_multiplied_together_wherever_they_stand(anyprec_model):
    model = anyprec_model().model
    linear = next(m for m in model.modules() if isinstance(m, PrecisionLinear))
    x = torch.randn(12, linear.in_features)
    linear.state.set_tokens([4, 2, 3, 3, 2, 4, 4, 2, 3, 2, 4, 3])
    apart = linear(x)
    linear.state.gather(x.device)
    assert len(linear.state.gathered) == 3
    assert torch.allclose(linear(x), apart, atol=1e-6)
    linear.state.set_uniform(3)
    assert linear.state.gathered == ()
    assert torch.allclose(linear(x), linear.multiply(x, 3)), "what was gathered is forgotten"


def test_online_is_judged_exactly_beside_the_static_plans(study):
    pack, models = study / "pack", (str(study / "anyprec"), str(study / "dense"))
    shared = {"targets": (2.5, 3.5), "folds": 2, "resamples": 20, "candidates": 24, "kernel": "reference"}
    OnlineExact(pack, study, *models, study / "online.json", **shared).run()
    rows = json.loads((study / "online.json").read_text())["rows"]
    assert [row["target_bits"] for row in rows] == [2.5, 3.5]
    assert all(2 <= row["bits"] <= 4 for row in rows)


def alternating(labels: FoldLabels, config) -> np.ndarray:
    held = np.asarray([key in labels.held_out for key in labels.ids])
    return np.where(held, 2, np.cumsum(~held) % 2)


def test_whole_answers_are_judged_from_labels_alone(study, tmp_path, monkeypatch):
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    monkeypatch.setattr(_record.write, "__defaults__", ("cpu", tmp_path))
    monkeypatch.setattr(_frontier_kv, "VALIDATION_SHARE", 0.4)  # of so few prompts
    labels = str(study / "main" / "agreement" / "continuations" / "labels")
    monkeypatch.setattr(FoldLabels, "splits", alternating)  # 16 prompts may leave no one to validate on
    AnswersStudy(labels, targets=(2.5, 3.0), folds=2, resamples=50, epochs=1, seed=1, name="it").run()
    found = json.loads((tmp_path / "it.json").read_text())["results"]["answers"]
    assert [(plan["pair"], plan["class"]) for plan in found["plans"]] == [
        *(("4-3", k) for k in (3, 2, 1)),
        *(("3-2", k) for k in (3, 2, 1, 0)),
    ]
    assert np.all(np.diff([plan["bits"] for plan in found["plans"]]) <= 0)
    names = {row["policy"] for row in found["policies"]}
    assert {"static per cluster", "KV classifier, rouge_l", "KV classifier, loss of ROUGE-L"} <= names
    best = {row["target_bits"]: row["gain_percent"] for row in found["oracles"]}
    assert all(row["gain_percent"] <= best[row["target_bits"]] + 1 for row in found["policies"])
    assert "KV classifier, rouge_l" in (tmp_path / "it.md").read_text()


def test_texts_are_prose_of_neighbouring_records(tmp_path):
    folder = tmp_path / "usr" / "share" / "doc"
    folder.mkdir(parents=True)
    prose = "A paragraph of the manual says what a program does and when. It goes on for a while. " * 8
    (folder / "manual.txt").write_text(
        "\n\n".join(["Contents", "1. one ..... 1\n2. two ..... 2", *([prose] * 14)])
    )
    count = _frontier_texts.write([tmp_path], [], tmp_path / "texts.jsonl", most=5)
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert count == len(texts) == 5
    assert all(len(text) >= 2 * _frontier_prompts.PART_CHARACTERS for text in texts)
    assert not any("....." in text or "Contents" in text for text in texts)
