"""The scheduler study from labels to page, on a tiny model; and the agreement of labels made twice."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from bench import _frontier_prompts, _record, frontier, label_noise
from bench.frontier import Confirm, Decoded, Steps, Study, load
from pmpd import storage
from pmpd.cli.flags.label import LabelJob
from pmpd.cli.flags.train import TrainJob
from pmpd.cli.label import main
from pmpd.cli.train import ceiling_line
from pmpd.cli.train import main as train
from pmpd.labeling.noise import agreement, ceilings, label_sets
from pmpd.training.config import TrainConfig

CHAIN = (4, 3, 2)


@pytest.fixture(scope="module")
def labelled(dense_folder, anyprec_folder, tmp_path_factory):
    """Output folders of two label jobs by divergence, and the models."""
    folder = tmp_path_factory.mktemp("study")
    texts = folder / "texts.jsonl"
    paragraph = "Lobster number {0} is blue. It lives in cold water and eats what it finds there. " * 14
    texts.write_text("".join(json.dumps({"text": paragraph.format(i)}) + "\n" for i in range(24)))
    lines = _frontier_prompts.write(str(texts), None, folder / "texts", continuations=14, tasks=10)
    assert lines == {"continuations": 14, "instructions": 10}
    models = str(anyprec_folder()), str(dense_folder())
    for name in lines:
        job = LabelJob(
            model_path=models[0],
            reference_model_path=models[1],
            dataset=str(folder / "texts" / f"{name}.jsonl"),
            max_new_tokens=14,
            max_prompt_tokens=60,
            rule="kl",
            output_dir=str(folder / name),
            kernel="reference",
            num_workers=0,
        )
        main(job, Console(quiet=True))
    return tuple(str(folder / name) for name in lines), models


def test_the_study_runs_from_labels_to_page(labelled, tmp_path, monkeypatch):
    folders, models = labelled
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    monkeypatch.setattr(_record.write, "__defaults__", ("cpu", tmp_path))
    steps = tmp_path / "steps.json"
    Steps(models[0], steps, repeats=2).run()
    Study(folders, (2.5, 3.0), 2, 50, steps=steps, kv_classifiers=True, name="it").run()
    results = json.loads((tmp_path / "it.json").read_text())["results"]
    curves, _ = load(folders)
    assert results["prompts"] == len(curves) > 10
    assert sorted(set(curves.kinds.tolist())) == [0, 1]
    assert len(results["policies"]) == 2 * 12, "a policy is missing, or its row"
    oracles = {(row["policy"], row["target_bits"]): row["gain_percent"] for row in results["oracles"]}
    for row in results["policies"]:
        assert row["p_holm"] >= row["p"]
        assert row["gain_percent"] <= oracles["oracle", row["target_bits"]] + 1e-6
    plans = {tuple(row["sixths"]): row for row in results["plans"]}
    for uniform in ((None, None), (0, None), (0, 0)):
        assert plans[uniform]["loss"] == pytest.approx(plans[uniform]["by_curves"], rel=1e-5)
    assert plans[0, 3]["loss"] != pytest.approx(plans[0, 3]["by_curves"], rel=1e-5)
    assert {row["policy"] for row in results["decode_time"]} == {row["policy"] for row in results["policies"]}
    page = (tmp_path / "it.md").read_text()
    assert "| KV classifier, loss" in page
    assert f"{len(curves)} held-out prompts" in page


def test_policies_are_judged_on_label_sets_that_they_were_not_fitted_to(labelled, tmp_path, monkeypatch):
    folders, _ = labelled
    monkeypatch.setattr(_record.write, "__defaults__", ("cpu", tmp_path))
    Confirm(folders[:1], folders[1:], kv_classifiers=True, targets=(2.5, 3.0), resamples=50, name="it").run()
    results = json.loads((tmp_path / "it.json").read_text())["results"]
    assert (results["fitted_to"], results["prompts"]) == tuple(len(load((folder,))[0]) for folder in folders)
    policies = {row["policy"] for row in results["policies"]}
    assert {"regression, no probe", "static per kind", "KV classifier, kl", "KV classifier, loss"} <= policies
    with pytest.raises(AssertionError, match="a prompt is in both sets"):
        Confirm(folders, folders[1:], name="it").run()


def test_a_folder_that_is_no_output_of_label_is_an_error_of_a_line(tmp_path, monkeypatch):
    (tmp_path / "labels").mkdir()
    command = ["frontier", "study", "--labels", str(tmp_path / "labels")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"error: .*labels: no labels/ in it; give the whole --output-dir"):
        frontier.main()


def test_what_a_free_decode_chooses_is_judged_by_the_labels(labelled, tmp_path, monkeypatch):
    folders, models = labelled
    monkeypatch.setattr(_record.write, "__defaults__", ("cpu", tmp_path))
    config = TrainConfig(split_shares=(0.6, 0.2, 0.2))
    train(TrainJob(",".join(folders), str(tmp_path / "train"), target_bits=2.5, training=config))
    artefact = str(tmp_path / "train" / "scheduler")
    Decoded(
        artefact, models[0], folders[:1], folders[1:], (2.5, 4.0), 4, 50, kernel="reference", name="it"
    ).run()
    results = json.loads((tmp_path / "it.json").read_text())["results"]
    assert results["prompts"] == len(load(folders[1:])[0])
    half, high = results["policies"]
    assert 2 <= half["decoded_bits"] <= 3, "it switches from 3 to 2 bits alone"
    assert half["decision_share"] > 0
    assert (high["bits"], high["decoded_bits"]) == (4, 4)


def test_agreement_of_labels_made_twice_bounds_a_classifier():
    first = {str(i): 0 if i < 60 else 3 for i in range(100)}
    second = {**first, **{str(i): 3 for i in range(20)}}
    found = agreement(first, second)
    assert (found.prompts, found.agreement, found.majority) == (100, 0.8, 0.6)
    assert found.ceiling == pytest.approx(0.8**0.5)
    assert found.by_chance == pytest.approx(0.6 * 0.4 + 0.4 * 0.6)
    assert found.low < 0.8 < found.high
    assert agreement(first, first).kappa == 1
    with pytest.raises(ValueError, match="share no prompt"):
        agreement(first, {"other": 1})


def test_labels_of_two_rules_come_from_one_run():
    pair = {"high": 4, "low": 3, "label": 1, "rouge_l": [0.2, 0.4, 0.5, 0.5], "high_rouge_l": 0.5}
    rows = [
        {"prompt_id": "a", "rule": "agreement/3/v1", "pairs": [pair], "error": None},
        {"prompt_id": "b", "rule": "agreement/3/v1", "pairs": None, "error": "ValueError: bad"},
    ]
    found = label_sets(rows, {"a": "7"})
    assert found == {"agreement/3/v1": {(4, 3): {"7": 1}}, "rouge_l/3/v1": {(4, 3): {"7": 2}}}


def test_the_noise_table_joins_prompts_by_their_line(labelled, tmp_path, monkeypatch):
    folders, _ = labelled
    monkeypatch.setattr(_record.write, "__defaults__", ("cpu", tmp_path))
    rows = label_noise.main(label_noise.Config(folders[:1], folders[:1]))
    limits = ceilings(folders[0], folders[0])
    assert [limits[pair].ceiling for pair in ("4-3", "3-2")] == [1.0, 1.0]
    assert "no accuracy exceeds 100%" in ceiling_line("4-3", limits["4-3"])
    same = [row for row in rows if row["against"] == storage.base_name(folders[0])]
    assert [row["agreement"] for row in same] == [1.0, 1.0]
    assert {row["pair"] for row in rows} == {"4-3", "3-2"}
    with pytest.raises(ValueError, match="share no prompt"):
        ceilings(*folders)
    with pytest.raises(ValueError, match="nothing there; give the --output-dir"):
        ceilings(folders[0], str(tmp_path))
