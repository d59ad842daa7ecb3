"""Data sets that were written with torch.save, as the published ones are: what is read, what is refused, and
that both stages go all the way."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import BatchEncoding

from pmpd import storage
from pmpd.cli.flags.label import LabelJob
from pmpd.cli.flags.train import TrainJob
from pmpd.cli.given_labels import labels_of_file
from pmpd.cli.label import main as label
from pmpd.cli.train import main as train
from pmpd.errors import UserError
from pmpd.farm.options import FarmOptions
from pmpd.farm.train import read_labels
from pmpd.labeling.prompts import PromptConfig, make_prompts, records
from pmpd.labeling.torch_records import TorchRecords, features_of, labels_of, token_ids
from pmpd.labeling.torch_rows import label_rows, prompt_rows
from pmpd.schedulers.artefact import load_artefact
from pmpd.training.config import TrainConfig
from tests.helpers import byte_tokenizer
from tests.ray_sessions import local_ray

IDS = [[72, 101, 108, 108, 111], [65, 66, 67, 68, 69], [49, 50, 51, 52, 53]]
RAGGED = [[72, 101, 108], [65, 66, 67, 68, 69], [49, 50]]
PADDED = torch.tensor([[72, 101, 108, 257, 257], [65, 66, 67, 68, 69], [257, 257, 257, 49, 50]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])


def saved(tmp_path, value, name="data.pt") -> TorchRecords:
    torch.save(value, tmp_path / name)
    return TorchRecords.read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        ([{"input_ids": ids} for ids in RAGGED], RAGGED),
        ([{"input_ids": torch.tensor(ids)} for ids in RAGGED], RAGGED),
        ([{"input_ids": torch.tensor([ids])} for ids in RAGGED], RAGGED),
        ([OrderedDict(text="", tokens=np.asarray(ids)) for ids in RAGGED], RAGGED),
        ([torch.tensor(ids, dtype=torch.int32) for ids in RAGGED], RAGGED),
        (RAGGED, RAGGED),
        (torch.tensor(IDS), IDS),
        (np.asarray(IDS), IDS),
        ({"input_ids": torch.tensor(IDS), "size": 3, "model": "vicuna"}, IDS),
        ({"input_ids": RAGGED, "length": [3, 5, 2]}, RAGGED),
        ({"input_ids": PADDED, "attention_mask": MASK}, RAGGED),
        ([{"input_ids": a, "attention_mask": b} for a, b in zip(PADDED, MASK, strict=True)], RAGGED),
        ({"data": [{"prompt_ids": ids} for ids in RAGGED], "seed": 0}, RAGGED),
        ({"train": {"ids": RAGGED}}, RAGGED),
        ({f"row {i}": {"token_ids": ids} for i, ids in enumerate(RAGGED)}, RAGGED),
        (tuple({"input_ids": [torch.tensor(t) for t in ids]} for ids in RAGGED), RAGGED),
    ],
)
def test_token_ids_are_read_from_each_layout(tmp_path, value, ids):
    source = saved(tmp_path, value)
    assert [token_ids(record) for record in source.records] == ids
    rows = list(prompt_rows(source, byte_tokenizer(), 512, 99, Counter()))
    assert [row["input_ids"] for row in rows] == ids, "prompts of a file are not cut at random"
    assert rows[0]["prompt_text"] == byte_tokenizer().decode(ids[0])


@pytest.mark.parametrize(
    ("record", "pairs", "expected"),
    [
        ({"label": 2}, [(3, 2)], {(3, 2): 2}),
        ({"labels": torch.tensor(3)}, [(3, 2)], {(3, 2): 3}),
        ({"target": torch.tensor([1.0])}, [(3, 2)], {(3, 2): 1}),
        ({"label": np.int64(0)}, [(4, 2)], {(4, 2): 0}),
        ({"label": [1, 3]}, [(4, 3), (3, 2)], {(4, 3): 1, (3, 2): 3}),
        ({"labels": torch.tensor([1, -100])}, [(4, 3), (3, 2)], {(4, 3): 1, (3, 2): None}),
        ({"labels": {"4,3": 1, "3,2": 0}}, [(3, 2)], {(3, 2): 0}),
        ({"labels": {(4, 3): 1, (3, 2): 0}}, None, {(4, 3): 1, (3, 2): 0}),
        ({"label_4_3": torch.tensor(1), "label_3_2": 2}, None, {(4, 3): 1, (3, 2): 2}),
    ],
)
def test_labels_are_read_by_pair(record, pairs, expected):
    assert labels_of(record, pairs) == expected


@pytest.mark.parametrize(
    ("record", "pairs", "reason"),
    [
        ({"label": 85}, [(3, 2)], "85 is no switch class, those are 0 to 3"),
        ({"label": 2}, None, "pairs that are not named; give --precisions of a chain of 2"),
        ({"label": 2}, [(4, 3), (3, 2)], "1 label.*--precisions of a chain of 2"),
        ({"labels": IDS[0]}, [(3, 2)], "5 label"),
        ({"labels": {"4,3": 1}}, [(3, 2)], "no label for the pair"),
        ({"labels": {"high": 1}}, [(3, 2)], "named like '4,3', these are high"),
        ({"input_ids": [1], "layer_3_2": 1}, [(3, 2)], "needs a label, called label, labels.*has input_ids"),
    ],
)
def test_labels_that_do_not_fit_are_named(record, pairs, reason):
    with pytest.raises(ValueError, match=reason):
        labels_of(record, pairs)


def test_kv_features_are_the_last_layers_averaged_over_heads():
    """In every shape that a cache is kept in."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 5, 4).unbind()  # [H, T, D]
    other = torch.zeros(2, 5, 4)
    mean = (keys.mean(0).half().numpy(), values.mean(0).half().numpy())
    for record, heads in (
        ({"keys": keys, "values": values}, 2),
        ({"key": keys[None], "value": values[None]}, 2),
        ({"keys": keys.mean(0), "values": values.mean(0)}, None),
        ({"k": keys.mean(0).tolist(), "v": values.mean(0).tolist()}, None),
        ({"past_key_values": ((other, other), (keys, values))}, 2),
        ({"past_key_values": [[other[None], other[None]], [keys[None], values[None]]]}, 2),
        ({"kv_cache": torch.stack([keys, values])}, 2),
        ({"features": (keys, values)}, 2),
    ):
        found = features_of({"input_ids": IDS[0], **record})
        np.testing.assert_array_equal(found.keys, mean[0], err_msg=str(list(record)))
        np.testing.assert_array_equal(found.values, mean[1], err_msg=str(list(record)))
        assert found.heads == heads
    padded = {"attention_mask": [1, 1, 1, 0, 0], "input_ids": PADDED[0], "keys": keys, "values": values}
    assert features_of(padded).keys.shape == (3, 4), "padding is left out of the features too"
    assert features_of({"input_ids": IDS[0]}) is None
    with pytest.raises(ValueError, match="KV features of 5 tokens for a prompt of 3"):
        features_of({"input_ids": IDS[0][:3], "keys": keys, "values": values})
    with pytest.raises(ValueError, match="not finite"):
        features_of({"keys": keys * torch.inf, "values": values})


def test_columns_with_labels_by_pair_and_features(tmp_path):
    keys = torch.randn(3, 5, 4)
    source = saved(
        tmp_path,
        {
            "input_ids": IDS,
            "labels": {"4,3": torch.tensor([0, 1, 2]), "3,2": [3, 3, 9]},
            "keys": keys,
            "values": keys,
        },
    )
    rows = list(label_rows(source, None, 4))
    assert [row["error"] is None for row in rows] == [True, True, False], "class 9 costs its record only"
    assert rows[1]["pairs"] == [{"high": 4, "low": 3, "label": 1}, {"high": 3, "low": 2, "label": 3}]
    np.testing.assert_array_equal(rows[1]["keys"], keys[1].half().numpy())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (datasets.Dataset.from_dict({"input_ids": IDS}), "Dataset, which .*weights_only=False"),
        ([BatchEncoding({"input_ids": IDS[0]})], "BatchEncoding, which loading would run code for.*plain.pt"),
        ([], "an empty list, no records"),
        ({"weight": torch.ones(3)}, "a dict of weight, no records; give a list.*input_ids"),
        (torch.ones(3), r"a Tensor of shape \[3\], no records"),
        ([{"text": "words"}], "fields text; none is usable: record 1: a record needs token ids.*it has text"),
        ([{"input_ids": torch.ones(3)}], "token ids must be whole numbers"),
        ([{"input_ids": [5, 999]}], "tokenizer has 0 to 257: another model's prompts"),
    ],
)  # fmt: skip
def test_what_is_not_such_a_data_set_is_refused_by_name(tmp_path, value, reason):
    torch.save(value, tmp_path / "data.pt")
    with pytest.raises(UserError, match=f"(?s){reason}"):
        list(make_prompts(PromptConfig(str(tmp_path / "data.pt")), byte_tokenizer(), 512))


def test_a_file_that_torch_did_not_write_or_that_is_cut_short(tmp_path):
    torch.save(IDS * 100, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for name, part in (("half.pt", content[: len(content) // 2]), ("none.pt", b""), ("text.pt", b"words")):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(UserError, match=r"not a file that torch\.save wrote"):
            TorchRecords.read(str(tmp_path / name))
    with pytest.raises(UserError, match="a file of token ids, for `pmpd label`"):
        list(records(PromptConfig(str(tmp_path / "whole.pt"))))
    with pytest.raises(UserError, match="no splits"):
        PromptConfig(str(tmp_path / "whole.pt"), split="train")
    with pytest.raises(UserError, match="no such file"):
        PromptConfig(str(tmp_path / "absent.pt")).kind  # noqa: B018


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, dense_folder, anyprec_folder):
    """(prompt -> its LABELS row, what the command printed) of a first-stage file that was labeled."""
    folder = tmp_path_factory.mktemp("stages")
    generator = np.random.default_rng(0)
    prompts = [generator.integers(33, 127, size).tolist() for size in generator.integers(4, 24, 40)]
    first = folder / "1st_stage_train_dataset_tiny_40.pt"
    torch.save({"input_ids": [*prompts, [999]]}, first)
    job = LabelJob(
        model_path=str(anyprec_folder()), reference_model_path=str(dense_folder()), dataset=str(first),
        size=100, precisions="3,2", max_new_tokens=4, rule="agreement", num_workers=0, kernel="reference",
        output_dir=str(folder / "label"),
    )  # fmt: skip
    console = Console(record=True, width=200)
    result = label(job, console)
    assert (result.rows, result.errors) == (41, 1)
    rows = storage.read_table(str(folder / "label" / "labels")).to_pylist()
    found = {tuple(row["input_ids"]): row for row in rows if row["error"] is None}
    assert set(found) == set(map(tuple, prompts)), "the prompts are taken as they are"
    return found, console.export_text()


def second_stage(labelled, path, features: bool) -> None:
    records = []
    for ids, row in labelled.items():
        record = {"input_ids": torch.tensor(ids), "label": row["pairs"][0]["label"]}
        if features:
            record |= {name: torch.tensor(np.asarray(row[name])) for name in ("keys", "values")}
        records.append(record)
    torch.save(records, path)


def same_as(dataset, labelled) -> None:
    made = storage.read_table(str(dataset)).to_pylist()
    assert len(made) == len(labelled)
    for row in made:
        expected = labelled[tuple(row["input_ids"])]
        assert row["error"] is None
        assert row["pairs"][0]["label"] == expected["pairs"][0]["label"]
        for part in ("keys", "values"):
            given = [np.asarray(one[part], np.float32) for one in (row, expected)]
            np.testing.assert_allclose(*given, atol=2e-3)


TRAINING = TrainJob(precisions="3,2", training=TrainConfig(num_train_epochs=1, split_shares=(0.6, 0.2, 0.2)))


def test_a_first_stage_file_is_labeled_and_told(labelled):
    assert "1st_stage_train_dataset_tiny_40.pt: 41 records with the fields input_ids" in labelled[1]


def test_a_second_stage_file_with_features_is_a_labels_dataset(labelled, tmp_path, anyprec_folder):
    path, output = str(tmp_path / "second.pt"), str(tmp_path / "out")
    second_stage(labelled[0], path, features=True)
    job = replace(TRAINING, data_path=path, output_dir=output)
    with pytest.raises(UserError, match=r"averaged over the kv heads.*give --num-heads, or --model-path"):
        train(job)
    source = labels_of_file(replace(job, model_path=str(anyprec_folder())), output, Console(quiet=True))
    assert source.num_heads == 2, "the model says how many heads the features were averaged over"
    same_as(source.path, labelled[0])
    assert len(read_labels(source.path, pairs=[(3, 2)]).ids) == 40
    again = labels_of_file(replace(job, num_heads=2), output, Console(quiet=True))
    assert again.path == source.path
    second_stage(dict(list(labelled[0].items())[:9]), path, features=True)
    with pytest.raises(UserError, match="made with another configuration"):
        labels_of_file(replace(job, num_heads=2), output, Console(quiet=True))


def test_prefills_give_the_features_that_a_label_run_has(labelled, tmp_path, anyprec_folder):
    path, output = str(tmp_path / "second.pt"), tmp_path / "out"
    second_stage(labelled[0], path, features=False)
    job = replace(TRAINING, data_path=path, output_dir=str(output))
    with pytest.raises(UserError, match="fields input_ids, label, no KV features; give --model-path"):
        train(job)
    job = replace(job, model_path=str(anyprec_folder()))
    options = FarmOptions(num_workers=0, unit_rows=16)
    source = labels_of_file(job, str(output), Console(quiet=True), options)
    assert source.num_heads == 2
    assert source.model_fingerprint, "features of a model are bound to that model"
    same_as(source.path, labelled[0])


@pytest.mark.slow
def test_a_second_stage_file_trains(labelled, tmp_path, anyprec_folder):
    path, output = str(tmp_path / "second.pt"), tmp_path / "out"
    second_stage(labelled[0], path, features=False)
    job = replace(TRAINING, data_path=path, output_dir=str(output), model_path=str(anyprec_folder()))
    with local_ray(2):
        train(job)
    load_artefact(output, [(3, 2)], dim=16, num_heads=2)
    config = json.loads((output / "scheduler" / "config.json").read_text())
    assert config["model_fingerprint"], "features of a model are bound to that model"
