"""The KV-cache classifier and its artefacts."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from pmpd.schedulers.artefact import (
    ArtefactConfig,
    classifier_file,
    load_artefact,
    published_state,
    save_artefact,
)
from pmpd.schedulers.classifier import KVCacheClassifier, MeanPooledClassifier

DIM, HEADS = 8, 3


def rows(*lengths: int, dim: int = DIM, pad: int = 0):
    """Random keys, values [B, T, D] with `pad` extra tokens of garbage behind the longest row, and lengths
    [B]."""
    generator = torch.Generator().manual_seed(0)
    tokens = max(lengths) + pad
    keys, values = torch.randn(2, len(lengths), tokens, dim, generator=generator)
    return keys, values, torch.tensor(lengths)


def classifier(seed: int = 0, **options) -> KVCacheClassifier:
    torch.manual_seed(seed)
    return KVCacheClassifier(DIM, HEADS, **options)


def test_gradients_reach_the_queries_and_every_other_parameter():
    model = classifier(dropout=0.1)
    keys, values, lengths = rows(5, 9, 2)
    torch.nn.functional.cross_entropy(model(keys, values, lengths), torch.tensor([0, 1, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_it_returns_logits_not_probabilities():
    logits = classifier()(*rows(5, 9, 2))
    assert logits.shape == (3, 4)
    assert not torch.allclose(logits.sum(-1), torch.ones(3)), (
        "a softmax before the cross-entropy flattens its gradient"
    )


@pytest.mark.parametrize("model", [classifier(), MeanPooledClassifier(DIM)])
def test_padding_and_batch_mates_change_nothing(model):
    model.eval()
    keys, values, lengths = rows(5, 9, 2, pad=7)
    together = model(keys, values, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(keys[row : row + 1, :length], values[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    model = classifier(dropout=0.5)
    batch = rows(5, 9, 2)
    assert not torch.equal(model.train()(*batch), model(*batch))
    assert torch.equal(model.eval()(*batch), model(*batch))


def test_attention_equals_its_formula_written_out():
    model = classifier().eval()
    keys, values, lengths = rows(6)
    groups = []
    for group in range(HEADS):
        attended = []
        for query in model.queries[group]:
            weights = torch.softmax(keys[0] @ query / DIM**0.5, 0)
            attended.append(weights @ values[0])
        groups.append(torch.stack(attended).mean(0))
    expected = model.head(torch.relu(model.hidden(model.norm(torch.cat(groups)))))
    torch.testing.assert_close(model(keys, values, lengths)[0], expected)


def artefact(folder, **changes):
    config = ArtefactConfig(DIM, HEADS, ((4, 3), (3, 2)), model_fingerprint="m1", labels_fingerprint="l1")
    config = dataclasses.replace(config, **changes)
    models = {pair: classifier(seed) for seed, pair in enumerate(config.pairs)}
    save_artefact(folder, config, {pair: model.state_dict() for pair, model in models.items()})
    return models


def test_artefact_round_trip_is_exact_and_a_subset_of_its_pairs_loads(tmp_path):
    models = artefact(tmp_path)
    loaded = load_artefact(tmp_path, [(3, 2)], dim=DIM, num_heads=HEADS, model_fingerprint="m1")
    assert loaded.config.labels_fingerprint == "l1"
    batch = rows(5, 9, 2)
    assert torch.equal(loaded.classifiers[0](*batch), models[3, 2].eval()(*batch))
    assert loaded.fingerprint != load_artefact(tmp_path, [(4, 3)]).fingerprint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dim": 16}, "dim 16.*have dim 8"),
        ({"num_heads": 4}, "num_heads 4.*have num_heads 3"),
        ({"model_fingerprint": "m2"}, "m1.*m2"),
        ({"pairs": [(4, 2)]}, r"\(4, 2\).*it holds.*\(4, 3\)"),
    ],
)
def test_an_artefact_that_does_not_fit_is_refused_with_the_reason(tmp_path, options, reason):
    artefact(tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_artefact(tmp_path, **{"pairs": [(4, 3)], **options})


def test_a_folder_without_an_artefact_says_what_is_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"neither config\.json nor classifier_4_3\.pt"):
        load_artefact(tmp_path, [(4, 3)])


def test_misshapen_tensors_are_named(tmp_path):
    artefact(tmp_path, dim=DIM + 1)
    with pytest.raises(ValueError, match="expected tensors"):
        load_artefact(tmp_path, [(4, 3)])


class Published(nn.Module):
    """The published computation, stated on its own: groups of queries attend, and the group means are
    flattened with the head running fastest (entry d * H + h of the flat vector is channel d of group h)."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(HEADS, HEADS, DIM))
        width = HEADS * DIM
        layers = OrderedDict(
            ln=nn.LayerNorm(width), fc1=nn.Linear(width, width), act=nn.ReLU(), fc2=nn.Linear(width, 4)
        )
        self.classifier = nn.Sequential(layers)
        nn.init.normal_(self.classifier.ln.weight)
        nn.init.normal_(self.classifier.ln.bias)

    def forward(self, keys, values):
        """Logits [4] of one row: keys and values [T, D]."""
        flat = torch.empty(DIM * HEADS)
        for h in range(HEADS):
            mean = torch.stack(
                [torch.softmax(keys @ query / DIM**0.5, 0) @ values for query in self.q[h]]
            ).mean(0)
            for d in range(DIM):
                flat[d * HEADS + h] = mean[d]
        return self.classifier(flat)


def published(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {**Published().state_dict(), **extra}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_state_dict_decides_as_published_whatever_its_tensors_are_called(tmp_path, prefix):
    torch.manual_seed(3)
    model = Published()
    torch.save(
        {prefix + name: tensor for name, tensor in model.state_dict().items()},
        tmp_path / classifier_file((4, 3), "pt"),
    )
    loaded = load_artefact(tmp_path, [(4, 3)], dim=DIM, num_heads=HEADS)
    keys, values, lengths = rows(5, 9, 2)
    with torch.no_grad():
        expected = torch.stack(
            [model(keys[b, :length], values[b, :length]) for b, length in enumerate(lengths)]
        )
    torch.testing.assert_close(loaded.classifiers[0](keys, values, lengths), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="num_heads 5"):
        load_artefact(tmp_path, [(4, 3)], num_heads=5)


def test_tensors_that_the_classifier_does_not_have_are_ignored():
    plain = published_state(published())
    more = published_state(
        published(**{"other.weight": torch.zeros(7), "steps": torch.tensor(3), "kept": torch.zeros(2, 3, 4)})
    )
    assert set(more) == set(classifier().state_dict())
    assert all(torch.equal(more[name], plain[name]) for name in plain)


@pytest.mark.parametrize("change", ["missing", "twice", "shape", "no bias"])
def test_a_foreign_state_dict_that_is_something_else_is_refused(change):
    state = published()
    if change == "missing":
        del state["classifier.fc2.weight"]
    if change == "twice":
        state |= {"other.weight": torch.zeros(4, HEADS * DIM), "other.bias": torch.zeros(4)}
    if change == "shape":
        state["q"] = torch.zeros(HEADS, HEADS + 1, DIM)
    if change == "no bias":
        del state["classifier.ln.bias"]
    with pytest.raises(ValueError, match="not a KV-cache classifier"):
        published_state(state)


def damage(folder, change: str) -> None:
    weights, config = folder / "classifier_4_3.safetensors", folder / "config.json"
    described = json.loads(config.read_text())
    if change == "no weights":
        weights.unlink()
    elif change == "half the weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif change == "no pairs":
        del described["pairs"]
    elif change == "unknown key":
        described["colour"] = "red"
    elif change == "another version":
        described["version"] = 99
    elif change == "a word for a number":
        described["dim"] = "wide"
    config.write_text(
        "[1]" if change == "a list" else json.dumps(described)[: -9 if change == "half a config" else None]
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("no weights", r"classifier_4_3\.safetensors: missing"),
        ("half the weights", r"classifier_4_3\.safetensors: damaged"),
        ("no pairs", r"config\.json: .*pairs"),
        ("unknown key", r"config\.json: .*colour"),
        ("another version", r"config\.json: .*99"),
        ("a word for a number", r"config\.json: .*wide"),
        ("half a config", r"config\.json: not the description"),
        ("a list", r"config\.json: not the description"),
    ],
)
def test_a_damaged_artefact_is_refused_with_the_file_and_the_reason(tmp_path, change, reason):
    artefact(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=reason):
        load_artefact(tmp_path, [(4, 3)])


def test_an_artefact_written_over_another_is_never_a_mixture(tmp_path, monkeypatch):
    artefact(tmp_path)
    write, written = Path.write_bytes, []

    def stop_after_one(path, content):
        if written:
            raise OSError("disk full")
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", stop_after_one)
    with pytest.raises(OSError, match="disk full"):
        artefact(tmp_path, labels_fingerprint="l2")
    with pytest.raises(ValueError, match=r"neither config\.json"):
        load_artefact(tmp_path, [(4, 3)])


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path):
    torch.save(classifier(), tmp_path / classifier_file((4, 3), "pt"))
    with pytest.raises(ValueError, match="not a plain state dict"):
        load_artefact(tmp_path, [(4, 3)])
