"""Splits, rebalancing, fitting and metrics, on made-up labels."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pmpd import Scheduler
from pmpd.errors import UserError
from pmpd.schedulers.artefact import load_artefact
from pmpd.training.config import SPLITS, TrainConfig
from pmpd.training.data import (
    NO_LABEL,
    Features,
    Labels,
    check_same_pairs,
    features_from_table,
    join_features,
    labels_from_table,
)
from pmpd.training.evaluate import compare, confusion, evaluate, measures, policies
from pmpd.training.fit import DivergedError, TrainState, Workers, class_weights, epoch_order, train
from pmpd.training.result import artefact, outputs_of

DIM = 4
PAIRS = ((4, 3), (3, 2))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def key(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()[:16]


def made_up(rows: int = 120, seed: int = 0) -> tuple[Labels, Features]:
    """Class 0 or 3 of pair (4,3), told by the sign of one token's value; pair (3,2) is the opposite."""
    generator = np.random.default_rng(seed)
    ids = sorted(key(i) for i in range(rows))
    lengths = generator.integers(2, 9, rows)
    keys = generator.normal(size=(lengths.sum(), DIM)).astype(np.float16)
    values = generator.normal(size=(lengths.sum(), DIM)).astype(np.float16)
    marked = np.cumsum(lengths) - 1
    side = generator.integers(0, 2, rows)
    keys[marked] = [6, 0, 0, 0]
    values[marked] = np.where(side[:, None] == 1, 2.0, -2.0)
    labels = np.stack([3 * side, 3 * (1 - side)], axis=1)
    return Labels(tuple(ids), PAIRS, labels), Features(
        tuple(ids), *map(torch.from_numpy, (keys, values, lengths))
    )


def table(labels: Labels, features: Features, order=None, errors: int = 0) -> pa.Table:
    """A labels table in shuffled order, with some error rows without features."""
    order = range(len(labels.ids)) if order is None else order
    ends = np.cumsum(features.lengths.numpy())
    vector = pa.list_(pa.list_(pa.float16(), DIM))

    def column(tensor):
        rows = [list(tensor[ends[i] - features.lengths[i] : ends[i]].numpy()) for i in order]
        return pa.array([*[[list(token) for token in row] for row in rows], *[None] * errors], vector)

    pairs = [
        [
            {"high": h, "low": low, "label": int(k)}
            for (h, low), k in zip(labels.pairs, labels.labels[i], strict=True)
        ]
        for i in order
    ]
    return pa.table(
        {
            "prompt_id": [*[labels.ids[i] for i in order], *[f"{i:016x}" for i in range(errors)]],
            "pairs": [*pairs, *[None] * errors],
            "keys": column(features.keys),
            "values": column(features.values),
            "error": [*[None] * len(pairs), *["boom"] * errors],
        }
    )


CONFIG = TrainConfig(num_train_epochs=5, learning_rate=0.01, batch_size=16, dropout=0.1)


def test_tables_give_back_labels_and_features_exactly_whatever_the_row_order():
    labels, features = made_up(20)
    shuffled = table(labels, features, np.random.default_rng(1).permutation(20), errors=3)
    assert labels_from_table(shuffled).ids == labels.ids
    assert np.array_equal(labels_from_table(shuffled).labels, labels.labels)
    parts = [
        features_from_table(shuffled.slice(0, 7)),
        features_from_table(shuffled.slice(7)),
    ]
    joined = join_features(parts)
    assert joined.ids == features.ids
    assert torch.equal(joined.keys, features.keys)
    assert torch.equal(joined.values, features.values)
    assert torch.equal(joined.lengths, features.lengths)
    assert labels_from_table(shuffled, [(3, 2)]).fingerprint() != labels.fingerprint()
    with pytest.raises(ValueError, match="no label of the pair 4-2, these are of 4-3, 3-2"):
        labels_from_table(shuffled, [(4, 2)])
    with pytest.raises(ValueError, match="twice"):
        labels_from_table(pa.concat_tables([shuffled, shuffled]))


def test_labels_of_some_pairs_are_those_of_a_table_of_these_pairs():
    labels, features = made_up(20)
    losses = np.random.default_rng(0).random((20, 2, 4), dtype=np.float32)
    part = replace(labels, losses=losses).within([(3, 2)])
    assert part.pairs == ((3, 2),)
    assert np.array_equal(part.labels, labels.labels[:, 1:])
    assert np.array_equal(part.losses, losses[:, 1:])
    read = labels_from_table(table(labels, features), [(3, 2)])
    assert read.fingerprint() == part.fingerprint()


def test_labels_of_several_chains_are_told_by_their_chains():
    """Not as prompts that occur twice, which these do too."""
    labels, features = made_up(20)
    both, low = table(labels, features), table(labels.within([(3, 2)]), features)
    check_same_pairs({"here": both, "there": both})
    with pytest.raises(UserError, match="several precision chains: here of 4,3,2; there of 3,2; train on"):
        check_same_pairs({"here": both, "there": low})


def test_batches_are_zero_padded_and_hold_their_rows():
    _, features = made_up(20)
    keys, _, lengths = features.batch([4, 0, 19])
    starts = np.cumsum(features.lengths.numpy()) - features.lengths.numpy()
    for b, row in enumerate([4, 0, 19]):
        assert lengths[b] == features.lengths[row]
        assert torch.equal(
            keys[b, : lengths[b]], features.keys[starts[row] : starts[row] + lengths[b]].float()
        )
        assert not keys[b, lengths[b] :].any()


def test_the_split_is_by_prompt_and_does_not_depend_on_the_other_rows():
    labels, _ = made_up(2000)
    splits = dict(zip(labels.ids, labels.splits(TrainConfig()), strict=True))
    shares = np.bincount(list(splits.values())) / 2000
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.03)
    part = Labels(labels.ids[::3], labels.pairs, labels.labels[::3])
    assert dict(zip(part.ids, part.splits(TrainConfig()), strict=True)).items() <= splits.items()
    assert (labels.splits(TrainConfig()) != labels.splits(TrainConfig(seed=1))).any()
    halves = labels.splits(TrainConfig(split_shares=(0.5, 0.5, 0.0)))
    assert np.allclose(np.bincount(halves, minlength=3) / 2000, [0.5, 0.5, 0], atol=0.03)
    with pytest.raises(UserError, match="seed -1: 0 or more"):
        TrainConfig(seed=-1)


def test_only_the_training_split_is_rebalanced():
    column = np.asarray([0] * 70 + [1] * 20 + [3] * 10)
    rows = np.arange(0, 100, 2)
    order = epoch_order(column, rows, "oversample", np.random.default_rng(0))
    assert set(order) == set(rows), "rows of another split were drawn, or some were lost"
    assert Counter(column[order].tolist()) == {0: 35, 1: 35, 3: 35}
    assert sorted(epoch_order(column, rows, "none", np.random.default_rng(0))) == sorted(rows)
    weights = class_weights(column, rows, "weights")
    assert weights[2] == 0
    assert torch.allclose(weights[torch.from_numpy(column[rows])].mean(), torch.tensor(1.0))
    labels, features = made_up()
    state = train(labels, features, 2, CONFIG)
    report = evaluate(labels, labels.splits(TrainConfig()), state.logits)
    assert sum(report["4-3"]["test"]["label_counts"]) == (labels.splits(TrainConfig()) == 2).sum()


@pytest.mark.parametrize("rebalance", ["oversample", "weights"])
def test_a_two_class_toy_problem_is_learned_by_both_pairs(rebalance):
    labels, features = made_up(240)
    config = TrainConfig(num_train_epochs=8, learning_rate=0.01, batch_size=16, rebalance=rebalance)
    state = train(labels, features, 2, config, heads=["kv_cache"])
    report = evaluate(labels, labels.splits(TrainConfig()), state.logits)
    for pair in ("4-3", "3-2"):
        learned, majority = (
            report[pair]["test"]["policies"][name]["accuracy"] for name in ("learned", "majority")
        )
        assert learned >= 0.9, (pair, learned)
        assert majority < 0.75


def fitted(**changes) -> TrainState:
    labels, features = made_up()
    return train(labels, features, 2, replace(CONFIG, **changes), heads=["mean_pooled"])


def test_accumulated_micro_batches_step_as_one_large_batch():
    """The loss is a mean over the rows of a step, so four times 16 rows are 64 rows; they are not four
    steps."""
    large, accumulated, small = (
        fitted(batch_size=size, gradient_accumulation_steps=n) for size, n in ((64, 1), (16, 4), (16, 1))
    )
    torch.testing.assert_close(
        accumulated.logits["mean_pooled/4-3"], large.logits["mean_pooled/4-3"], rtol=1e-3, atol=1e-4
    )
    assert not torch.allclose(
        accumulated.logits["mean_pooled/4-3"], small.logits["mean_pooled/4-3"], atol=1e-2
    )


def test_weight_decay_pulls_the_weights_towards_zero():
    free, decayed = (
        fitted(weight_decay=decay).fits["mean_pooled/4-3"].model["head.weight"].norm() for decay in (0.0, 5.0)
    )
    assert decayed < 0.8 * free


def test_training_is_deterministic_on_cpu():
    labels, features = made_up()
    first, second = (train(labels, features, 2, CONFIG) for _ in range(2))
    for name, logits in first.logits.items():
        assert torch.equal(logits, second.logits[name])
    other = train(labels, features, 2, TrainConfig(**{**vars(CONFIG), "seed": 1}), heads=["kv_cache"])
    assert not torch.equal(first.logits["kv_cache/4-3"], other.logits["kv_cache/4-3"])


def test_training_neither_draws_from_the_process_wide_generator_nor_sets_it():
    """Other threads draw from it too: seeding it would give two trainings, or a training and its process,
    each other's numbers."""
    labels, features = made_up()
    before = torch.get_rng_state()
    first = train(labels, features, 2, CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(
        train(labels, features, 2, CONFIG).logits["kv_cache/4-3"], first.logits["kv_cache/4-3"]
    )


def test_a_resumed_training_ends_as_an_undisturbed_one():
    labels, features = made_up()
    undisturbed = train(labels, features, 2, CONFIG)

    saved = io.BytesIO()

    class Killed(Exception):
        pass

    def kill(state, line):
        if (line["head"], line["pair"], line["epoch"]) == ("kv_cache", "3-2", 3):
            torch.save(state.to_plain(), saved)
            raise Killed

    with pytest.raises(Killed):
        train(labels, features, 2, CONFIG, on_epoch=kill)
    saved.seek(0)
    state = TrainState.from_plain(torch.load(saved, weights_only=True))
    resumed = train(labels, features, 2, CONFIG, state=state)
    assert resumed.history() == undisturbed.history()
    for name, logits in undisturbed.logits.items():
        assert torch.equal(logits, resumed.logits[name]), name


def test_two_workers_with_half_the_features_fit_what_one_does():
    """Two workers in lockstep: each computes its half, sums go through a barrier."""
    import threading

    labels, features = made_up(80)
    config = TrainConfig(num_train_epochs=2, learning_rate=0.01, batch_size=16, dropout=0.0)
    alone = train(labels, features, 2, config, heads=["kv_cache"])
    barrier, inbox, results = threading.Barrier(2), [None, None], [None, None]

    def run(rank: int) -> None:
        def add(tensor):
            inbox[rank] = tensor.clone()
            barrier.wait(30)
            tensor.copy_(inbox[0] + inbox[1])
            barrier.wait(30)

        mine = np.arange(rank, 80, 2)
        keys, values, lengths = features.batch(mine)
        valid = torch.arange(keys.shape[1])[None, :] < lengths[:, None]
        part = Features(
            tuple(features.ids[i] for i in mine), keys[valid].half(), values[valid].half(), lengths
        )
        results[rank] = train(labels, part, 2, config, workers=Workers(rank, 2, add), heads=["kv_cache"])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, logits in alone.logits.items():
        torch.testing.assert_close(results[0].logits[name], logits, rtol=1e-3, atol=1e-3)
        first, second = (result.fits[name].best_model for result in results)
        assert all(torch.equal(first[tensor], second[tensor]) for tensor in first), (
            "the workers hold different weights"
        )


def test_early_stopping_keeps_the_weights_of_the_lowest_validation_loss():
    labels, features = made_up()
    noise = np.random.default_rng(3).integers(0, 2, labels.labels.shape) * 3
    labels = Labels(labels.ids, labels.pairs, noise)
    config = TrainConfig(num_train_epochs=60, learning_rate=0.03, batch_size=16, patience=3)
    state = train(labels, features, 2, config, heads=["kv_cache"])
    fit = state.fits["kv_cache/4-3"]
    losses = [line["validation_loss"] for line in fit.history]
    assert len(losses) < 60, "nothing can be learned from noise, so it must stop early"
    assert len(losses) - 1 - int(np.argmin(losses)) == 3
    rows = np.nonzero(labels.splits(TrainConfig()) == 1)[0]
    loss = torch.nn.functional.cross_entropy(
        state.logits["kv_cache/4-3"][rows], torch.from_numpy(labels.labels[rows, 0])
    )
    assert loss == pytest.approx(min(losses), abs=1e-6)


def test_rows_without_a_label_for_a_pair_are_left_out_of_that_pair():
    labels, features = made_up()
    labels.labels[:40, 1] = NO_LABEL
    state = train(labels, features, 2, TrainConfig(num_train_epochs=1), heads=["mean_pooled"])
    report = evaluate(labels, labels.splits(TrainConfig()), state.logits)
    assert sum(split["rows"] for split in report["4-3"].values()) == 120
    assert sum(split["rows"] for split in report["3-2"].values()) == 80


def test_a_training_that_diverges_says_so_and_its_state_goes_on():
    labels, features = made_up()
    state = TrainState()
    with pytest.raises(
        DivergedError,
        match=r"pair 4-3, epoch 1: the validation loss is .*lower --learning-rate, it is 1e\+30",
    ):
        train(labels, features, 2, replace(CONFIG, learning_rate=1e30), state=state)
    state = TrainState.from_plain(state.to_plain())
    resumed = train(labels, features, 2, CONFIG, state=state, heads=["kv_cache"])
    assert resumed.history() == train(labels, features, 2, CONFIG, heads=["kv_cache"]).history()


def test_labels_that_are_no_class_are_refused():
    labels, features = made_up(20)
    labels.labels[3, 1] = 7
    with pytest.raises(ValueError, match=r"\[7\] are no classes, those are 0 to 3"):
        labels_from_table(table(labels, features))


def test_measures_by_hand():
    labels, chosen = np.asarray([0, 1, 3, 3]), np.asarray([0, 2, 1, 3])
    measured = measures(confusion(labels, np.eye(4)[chosen]), (4, 2))
    assert measured["accuracy"] == pytest.approx(0.5)
    assert measured["quality_loss"] == pytest.approx(0.25), "one row of four got less than its label"
    assert measured["average_bits"] == pytest.approx(2 + 2 * (0 + 2 / 3 + 1 / 3 + 1) / 4)
    assert measured["macro_f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_every_baseline_is_reported_and_the_oracle_is_one():
    labels = np.asarray([0] * 6 + [1] * 2 + [2] + [3])
    report = compare(labels, policies(np.asarray([0, 0, 3]), labels, {"learned": labels}), (3, 2))
    reported = report["policies"]
    assert set(reported) == {
        "learned",
        "majority",
        "static_0",
        "static_1",
        "static_2",
        "static_3",
        "random",
        "oracle",
    }
    assert reported["oracle"]["accuracy"] == 1
    assert reported["oracle"]["quality_loss"] == 0
    assert reported["majority"]["accuracy"] == reported["static_0"]["accuracy"] == pytest.approx(0.6)
    assert reported["random"]["accuracy"] == pytest.approx(2 / 3 * 0.6 + 1 / 3 * 0.1)
    assert reported["static_3"]["average_bits"] == 3
    assert reported["learned"]["accuracy_minus_majority"] == pytest.approx(0.4)
    low, high = reported["majority"]["interval"]["accuracy"]
    assert low < 0.6 < high


@pytest.mark.parametrize(
    "bad",
    [
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"weight_decay": float("nan")},
        {"num_train_epochs": 0},
        {"dropout": 1.0},
        {"rebalance": "some"},
        {"split_shares": (0.8, 0.1)},
        {"split_shares": (0.9, 0.0, 0.1)},
        {"split_shares": (0.8, 0.1, 0.2)},
        {"split_shares": (0.8, float("nan"), 0.2)},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainConfig(**bad)


def test_a_pair_with_too_few_labels_is_refused():
    labels, features = made_up(3)
    with pytest.raises(ValueError, match="label more prompts"):
        train(labels, features, 2, CONFIG)
    labels, _ = made_up()
    labels.labels[labels.splits(CONFIG) == 1, 1] = NO_LABEL
    assert len(labels.rows(0, CONFIG)["validation"]) > 0
    with pytest.raises(ValueError, match=r"pair 3-2: .*leave the validation split empty"):
        labels.rows(1, CONFIG)


def test_the_artefact_reports_both_heads_beside_the_baselines():
    labels, features = made_up()
    config = replace(CONFIG, num_train_epochs=1, split_shares=(0.6, 0.2, 0.2))
    files, metrics = artefact(labels, train(labels, features, 2, config), 2, config, "m1")
    assert list(files)[-1] == "config.json", "a folder without it is not finished"
    for splits in metrics.values():
        for name, report in splits.items():
            heads = {"learned", "mean_pooled"}
            assert set(report["policies"]) == heads | {"majority", "random", "oracle"} | {
                f"static_{k}" for k in range(4)
            }
            assert report["rows"] == (labels.splits(config) == SPLITS.index(name)).sum()


def test_what_a_class_loses_is_learned_as_a_number_and_a_budget_chooses_by_it():
    labels, features = made_up(240, seed=3)
    side = (labels.labels[:, :1] == 3).astype(np.float32)[:, :, None]  # the prompts that need many bits
    falling = np.asarray([1.0, 0.6, 0.3, 0.0], dtype=np.float32)
    losses = np.concatenate([0.02 + 0.3 * side * falling, 0.02 + 2.0 * side * falling], axis=1)
    assert losses.shape == (240, 2, 4)
    with_losses = replace(labels, losses=losses)
    config = TrainConfig(objective="loss", num_train_epochs=40, learning_rate=5e-3, dropout=0.0, seed=1)
    with pytest.raises(ValueError, match="these labels say no losses"):
        train(labels, features, 2, config)
    state = train(with_losses, features, 2, config, heads=("kv_cache",))
    said = -outputs_of(with_losses, state, config)
    test = labels.splits(config) == 2
    assert np.abs(said[test] - losses[test]).mean() < 0.25 * losses[test].mean(), "in nats, near what it is"
    files, metrics = artefact(with_losses, state, 2, config, None, target_bits=3.0)
    about = json.loads(files["config.json"])
    assert about["outputs"] == "losses"
    assert about["labels_fingerprint"] != labels.fingerprint()
    learned = metrics["3-2"]["test"]["policies"]["learned"]
    majority = metrics["3-2"]["test"]["policies"]["majority"]
    assert 2 < learned["average_bits"] < 3, "the budget chooses neither all nor nothing"
    assert learned["quality_loss"] < majority["quality_loss"] or majority["quality_loss"] == 0


def test_an_artefact_of_losses_gives_nats_and_serves_a_budget_only(tmp_path):
    labels, features = made_up(120, seed=5)
    losses = np.abs(np.random.default_rng(0).normal(size=(120, 2, 4))).astype(np.float32)
    with_losses = replace(labels, losses=losses)
    config = TrainConfig(objective="loss", num_train_epochs=2)
    state = train(with_losses, features, 2, config)
    files, _ = artefact(with_losses, state, 2, config, None, target_bits=3.0)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = load_artefact(tmp_path, PAIRS)
    batch = features.batch(np.arange(120))
    outputs = torch.stack([classifier(*batch) for classifier in loaded.classifiers], dim=1).numpy()
    np.testing.assert_allclose(outputs, outputs_of(with_losses, state, config), rtol=1e-4, atol=1e-5)
    assert Scheduler.get_scheduler("budget", precisions=[4, 3, 2], save_dir=tmp_path).target_bits == 3.0
    with pytest.raises(ValueError, match="use --schedulers budget"):
        Scheduler.get_scheduler("kv_cache", precisions=[4, 3, 2], save_dir=tmp_path)


def test_losses_are_read_where_the_rule_decoded_nothing():
    pairs = [{"high": 4, "low": 3, "label": 1, "scores": [-0.4, -0.3, -0.2, -0.1], "high_rouge_l": None}]
    rows = pa.table({"prompt_id": ["a", "b"], "pairs": [pairs, pairs]})
    assert labels_from_table(rows).losses.tolist() == np.float32([[[0.4, 0.3, 0.2, 0.1]]] * 2).tolist()
    rouge = [{**pairs[0], "high_rouge_l": 0.5}]
    assert labels_from_table(pa.table({"prompt_id": ["a"], "pairs": [rouge]})).losses is None
