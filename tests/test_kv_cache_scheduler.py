"""The learned scheduler: from prefill features to switch steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pmpd import demo
from pmpd.decode import oracle
from pmpd.decode.requests import Request
from pmpd.schedulers.artefact import ArtefactConfig, save_artefact
from pmpd.schedulers.base import PrefillState, Scheduler
from pmpd.schedulers.chain import chain_bits, class_steps, pairs_of
from pmpd.schedulers.classifier import KVCacheClassifier
from pmpd.schedulers.kv_cache import DEMO_ARTEFACT, KVCacheScheduler
from pmpd.weights.checkpoint import Checkpoint

DIM, HEADS = 8, 2
CHAIN = [4, 3, 2]


def constant(chosen: int) -> dict[str, torch.Tensor]:
    """A classifier that chooses one class whatever it sees."""
    model = KVCacheClassifier(DIM, HEADS)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.nn.functional.one_hot(torch.tensor(chosen), 4).float()
    return model.state_dict()


@pytest.fixture
def folder(tmp_path):
    save_artefact(
        tmp_path,
        ArtefactConfig(DIM, HEADS, ((4, 3), (3, 2)), model_fingerprint="m1", labels_fingerprint="l1"),
        {(4, 3): constant(1), (3, 2): constant(2)},
    )
    return tmp_path


@pytest.fixture
def random_folder(tmp_path):
    torch.manual_seed(0)
    states = {}
    for pair in ((4, 3), (3, 2)):
        model = KVCacheClassifier(DIM, HEADS)
        torch.nn.init.normal_(model.head.weight, std=3.0)
        states[pair] = model.state_dict()
    save_artefact(tmp_path, ArtefactConfig(DIM, HEADS, ((4, 3), (3, 2))), states)
    return tmp_path


def prefilled(lengths, max_new_tokens=256) -> tuple[PrefillState, list[int]]:
    generator = torch.Generator().manual_seed(1)
    keys, values = 3 * torch.randn(2, len(lengths), max(lengths), DIM, generator=generator)
    calls: list[int] = []

    def features():
        calls.append(len(lengths))
        return keys, values, torch.tensor(lengths)

    state = PrefillState(
        [f"{i:016x}" for i in range(len(lengths))], [max_new_tokens] * len(lengths), lengths, features
    )
    return state, calls


def row(state: PrefillState, b: int) -> PrefillState:
    def features():
        keys, values, lengths = state.features()
        return keys[b : b + 1, : lengths[b]], values[b : b + 1, : lengths[b]], lengths[b : b + 1]

    return PrefillState([state.keys[b]], [state.max_new_tokens[b]], [state.prompt_lengths[b]], features)


def test_a_chain_of_three_has_two_independent_decisions(folder):
    scheduler = Scheduler.get_scheduler(
        "kv_cache", precisions=CHAIN, save_dir=folder, dim=DIM, num_heads=HEADS
    )
    state, _ = prefilled([3, 7])
    steps = scheduler.begin(state).switch_steps
    assert steps.tolist() == [[85, 170], [85, 170]], (
        "a value shared by two pairs makes the second switch fire at once"
    )
    bits = [chain_bits(CHAIN, steps, np.asarray([t, t]))[0] for t in (85, 86, 170, 171)]
    assert bits == [4, 3, 3, 2]


def test_a_batch_decides_as_its_rows_alone_and_reads_the_features_once(random_folder):
    scheduler = KVCacheScheduler(CHAIN, save_dir=random_folder)
    state, calls = prefilled([3, 40, 7, 1, 12, 9, 30, 5])
    decision = scheduler.begin(state)
    assert calls == [8]
    together, scores = decision.switch_steps, decision.scores
    assert scores.shape == (8, 2, 4)
    assert (
        np.take_along_axis(np.asarray([class_steps(256)] * 8), scores.argmax(-1), axis=1) == together
    ).all()
    assert len({tuple(steps) for steps in together.tolist()}) > 1, (
        "the rows must differ for this test to say anything"
    )
    for b in range(8):
        alone = scheduler.begin(row(state, b))
        assert alone.switch_steps.tolist() == together[b : b + 1].tolist()
        np.testing.assert_allclose(alone.scores[0], scores[b], rtol=1e-4, atol=1e-6)


def test_it_decides_on_the_features_as_the_labels_store_them(random_folder):
    """Labels hold float16; a row on the edge of two classes must not get another one in generation."""
    scheduler = KVCacheScheduler(CHAIN, save_dir=random_folder)
    state, _ = prefilled([3, 40, 7])
    scores = scheduler.begin(state).scores
    keys, values, lengths = state.features()
    stored = [keys.half().float(), values.half().float(), lengths]
    again = PrefillState(state.keys, state.max_new_tokens, state.prompt_lengths, lambda: stored)
    assert np.array_equal(scores, scheduler.begin(again).scores)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 64, 100, 256])
def test_switch_steps_follow_the_classes_of_each_row(folder, max_new_tokens):
    scheduler = KVCacheScheduler([3, 2], save_dir=folder)
    state, _ = prefilled([3], max_new_tokens)
    assert scheduler.begin(state).switch_steps.tolist() == [[class_steps(max_new_tokens)[2]]]


@pytest.mark.parametrize(
    ("points", "steps"),
    [((0, 1 / 3, 2 / 3, 1), 170), ((0, 0.25, 0.5, 1), 127), ((0, 10, 20, 300), 20), ((0, 85, 170, 255), 170)],
)
def test_precision_switch_points_are_fractions_or_steps(folder, points, steps):
    scheduler = KVCacheScheduler([3, 2], precision_switch_points=points, save_dir=folder)
    state, _ = prefilled([3])
    assert scheduler.begin(state).switch_steps.tolist() == [[steps]]


@pytest.mark.parametrize("points", [{(4, 3), (3, 2)}, [(4, 3), (3, 2)]])
def test_the_published_options_give_the_default_switch_points(folder, points):
    options = {
        "precisions": CHAIN,
        "precision_switch_points": points,
        "save_dir": folder,
        "dim": DIM,
        "num_heads": HEADS,
    }
    scheduler = Scheduler.get_scheduler("kv_cache", **options, max_new_tokens=256, dropout_prob=0.1)
    assert scheduler.describe() == KVCacheScheduler(CHAIN, save_dir=folder).describe()
    with pytest.raises(ValueError, match=r"the chain's pairs \[\(3, 2\)\]"):
        Scheduler.get_scheduler("kv_cache", **{**options, "precisions": [3, 2]})


def test_a_uri_is_read_as_the_folder_is(folder):
    there = KVCacheScheduler(CHAIN, save_dir=folder.as_uri())
    assert there.describe() == KVCacheScheduler(CHAIN, save_dir=folder).describe()
    with pytest.raises(ValueError, match="neither config"):
        KVCacheScheduler(CHAIN, save_dir=f"{folder.as_uri()}/nothing")


@pytest.mark.parametrize(
    "points",
    [
        (0, 0.5, 1),
        (0, 0.6, 0.3, 1),
        (-1, 0, 0.5, 1),
        (0, 0.5, 10, 20),
        (0, 1, 2, float("nan")),
        (0, 1, 2, float("inf")),
        ("a", "b", "c", "d"),
        ([0], 1, 2, 3),
        5,
    ],
)
def test_bad_switch_points_are_refused(folder, points):
    with pytest.raises(ValueError, match="precision_switch_points"):
        KVCacheScheduler([3, 2], precision_switch_points=points, save_dir=folder)


def test_a_model_that_does_not_fit_is_refused(folder):
    options = {"precisions": [3, 2], "save_dir": folder}
    with pytest.raises(ValueError, match="dim 128"):
        Scheduler.get_scheduler("kv_cache", **options, dim=128, num_heads=HEADS)
    with pytest.raises(ValueError, match=r"m1.*m2"):
        Scheduler.get_scheduler("kv_cache", **options, model_fingerprint="m2")
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        Scheduler.get_scheduler("kv_cache", precisions=[4, 2], save_dir=folder)
    scheduler = KVCacheScheduler([3, 2], save_dir=folder)
    scheduler.check_model("m1", DIM, HEADS)
    with pytest.raises(ValueError, match=r"m1.*m2"):
        scheduler.check_model("m2", DIM, HEADS)


def test_features_of_another_head_dim_are_refused(folder):
    scheduler = KVCacheScheduler([3, 2], save_dir=folder)
    wide = torch.zeros(1, 4, DIM * 2)
    with pytest.raises(ValueError, match="head dim 16"):
        scheduler.begin(PrefillState(["0" * 16], [8], [4], lambda: (wide, wide, torch.tensor([4]))))


def test_a_row_without_finite_features_is_never_lowered_and_its_mates_decide(folder):
    scheduler = KVCacheScheduler([3, 2], save_dir=folder)
    keys = torch.randn(2, 4, DIM)
    keys[0] = float("nan")
    values = keys.clone()
    steps = scheduler.begin(
        PrefillState(["0" * 16, "1" * 16], [256, 256], [4, 4], lambda: (keys, values, torch.tensor([4, 4])))
    ).switch_steps
    assert steps.tolist() == [[255], [170]]


def test_description_names_the_weights_and_what_they_were_trained_on(folder):
    described = KVCacheScheduler(CHAIN, save_dir=folder).describe()
    assert described["name"] == "kv_cache"
    assert described["precisions"] == CHAIN
    assert (described["labels_fingerprint"], described["model_fingerprint"]) == ("l1", "m1")
    assert (
        described["classifier_fingerprint"]
        != KVCacheScheduler([3, 2], save_dir=folder).describe()["classifier_fingerprint"]
    )


@pytest.mark.parametrize("chain", [(4, 3), (4, 3, 2)])
def test_engine_equals_oracle_with_the_learned_scheduler(anyprec_model, tmp_path, chain):
    model = anyprec_model("llama")
    dim, heads = 16, 2
    torch.manual_seed(2)
    states = {}
    for pair in pairs_of(chain):
        classifier = KVCacheClassifier(dim, heads)
        torch.nn.init.normal_(classifier.queries, std=4.0)
        torch.nn.init.normal_(classifier.head.weight, std=4.0)
        states[pair] = classifier.state_dict()
    save_artefact(tmp_path, ArtefactConfig(dim, heads, tuple(states)), states)
    scheduler = KVCacheScheduler(chain, save_dir=tmp_path, dim=dim, num_heads=heads)
    generator = torch.Generator().manual_seed(0)
    prompts = {
        f"{n:016x}": torch.randint(0, 256, (n,), generator=generator).tolist()
        for n in (1, 7, 40, 3, 100, 12, 65, 30)
    }
    requests = [Request(key, prompt, 13) for key, prompt in prompts.items()]
    decided = set()
    for completion in model.engine(3, 128).run(requests, scheduler, 4, model.eos_token_ids):
        expected = oracle.decode(
            model.model,
            prompts[completion.key],
            13,
            4,
            model.eos_token_ids,
            KVCacheScheduler(chain, save_dir=tmp_path),
            key=completion.key,
        )
        assert list(completion.switch_steps) == expected.switch_steps, completion.key
        assert completion.tokens == expected.tokens, completion.key
        assert completion.classes.tolist() == completion.scores.argmax(-1).tolist()
        assert list(completion.switch_steps) == [class_steps(13)[k] for k in completion.classes]
        decided.add(tuple(expected.switch_steps))
    assert len(decided) > 1, "all rows decided alike: this shows nothing"


def test_the_embedded_scheduler_fits_the_embedded_model():
    fingerprint = Checkpoint(demo.ANYPREC).fingerprint()
    scheduler = Scheduler.get_scheduler(
        "kv_cache", precisions=CHAIN, dim=32, num_heads=2, model_fingerprint=fingerprint
    )
    assert scheduler.artefact.config.model_fingerprint == fingerprint, (
        "train the demo scheduler again: it belongs to another demo model"
    )
    assert sum(path.stat().st_size for path in DEMO_ARTEFACT.iterdir()) <= 2_000_000
