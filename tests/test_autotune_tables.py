"""Autotune tables that are damaged, or of another version: kernels are cut by rules, and that is logged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import _cuda
from pmpd import gpu
from pmpd.kernels import triton
from pmpd.kernels.cuda import halves, launch, matrix, teams
from pmpd.kernels.cuda.cut import H100, cut
from tests.test_kernels_triton import packed_weights

CUDA = torch.device("cuda:0")
SHAPE = (4096, 4096)
BITS = dict.fromkeys(matrix.MEASURED, 1) | {"warps": 4, "us": 1.0}
TEAMS = dict.fromkeys(teams.MEASURED, 1) | {"warps": 8, "slots": 2, "held": 16}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """content of a table -> (cut of bits, of teams, of clusters, warps) that a GPU with it takes."""

    def caches() -> None:
        for cached in (triton.settings, triton.warn_of_entry, matrix.cut_of, teams.cut_of, halves.cut_of):
            cached.cache_clear()

    def found(content: bytes) -> tuple:
        path = tmp_path / "gpu.json"
        path.write_bytes(content)
        monkeypatch.setattr(triton, "settings_file", lambda name: path)
        monkeypatch.setattr(launch, "gpu_of", lambda device: H100)
        monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
        caches()
        return (
            matrix.cut_of("gpu", CUDA, *SHAPE, (4,)),
            teams.cut_of("gpu", CUDA, *SHAPE, 4, 8),
            halves.cut_of("gpu", CUDA, *SHAPE, 4, 8),
            triton.warps_of("gpu", "halves", *SHAPE, 4, 8),
        )

    yield found
    caches()


def by_rules() -> tuple:
    return cut(*SHAPE, (4,), H100), None, None, 8


def test_a_whole_table_is_taken(read, caplog):
    table = {
        "gpu": "a name",
        "bits": {"4096x4096x4": BITS},
        "teams": {"4096x4096x4x8": TEAMS},
        "clusters": {"4096x4096x4x8": {"cut": [4, 2, 4, 2, 2, 1], "us": 1.0}},
        "halves": {"4096x4096x4x8": {"warps": 16, "us": 1.0}},
    }
    found = read(json.dumps(table).encode())
    assert [made.warps for made in found[:3]] == [4, 8, 2]
    assert found[0].splits == 1
    assert found[3] == 16
    assert not caplog.records


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\0", b'"x"'])
def test_a_damaged_table_counts_as_none(read, caplog, content):
    assert read(content) == by_rules()
    assert [record.message.count("not an autotune table") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("route", "shape", "entry"),
    [
        ("bits", "4096x4096x4", {"warps": 4, "slots": 4, "blocks": 2, "us": 6.2}),
        ("bits", "4096x4096x4", BITS | {"splits": 0}),
        ("bits", "4096x4096x4", BITS | {"warps": "4"}),
        ("bits", "4096x4096x4", None),
        ("teams", "4096x4096x4x8", {"warps": 8}),
        ("teams", "4096x4096x4x8", []),
        ("teams", "4096x4096x4x8", TEAMS | {"splits": 3}),
        ("teams", "4096x4096x4x8", TEAMS | {"slots": 1}),
        ("teams", "4096x4096x4x8", TEAMS | {"held": 3}),
        ("teams", "4096x4096x4x8", TEAMS | {"slots": 64}),
        ("teams", "4096x4096x4x8", TEAMS | {"resident": 4}),
        ("clusters", "4096x4096x4x8", {"us": 1.0}),
        ("clusters", "4096x4096x4x8", {"cut": [4, 2], "us": 1.0}),
        ("clusters", "4096x4096x4x8", {"cut": [4, 2, 4, 2, 200, 1], "us": 1.0}),
        ("clusters", "4096x4096x4x8", {"cut": [3, 2, 4, 2, 2, 1], "us": 1.0}),
        ("halves", "4096x4096x4x8", {"warps": None}),
    ],
)
def test_an_entry_of_another_version_is_left_out(read, caplog, route, shape, entry):
    """`bits` had no `splits` and `live` once: what was left of it was mixed with rules of today."""
    assert read(json.dumps({route: {shape: entry}}).encode()) == by_rules()
    told = [
        record.message for record in caplog.records if f"{route}, {shape} is not an entry" in record.message
    ]
    assert len(told) == (entry is not None)


@pytest.mark.parametrize("route", ["bits", "teams", "clusters", "halves"])
def test_a_route_that_is_no_table_is_left_out(read, route):
    assert read(json.dumps({route: []}).encode()) == by_rules()


@pytest.mark.parametrize(
    "path", sorted(triton.settings_file("x").parent.glob("*.json")), ids=lambda p: p.stem
)
def test_every_entry_of_the_tables_in_the_package_is_taken(read, caplog, path):
    """Or the kernel was changed so that it can't be cut like that any more."""
    content = path.read_bytes()
    read(content)
    for route, entries in json.loads(content).items():
        for shape, entry in entries.items() if route in ("bits", "teams", "clusters") else ():
            rows, columns, last, *tokens = shape.split("x")
            if route == "bits":
                made = matrix.cut_of("gpu", CUDA, int(rows), int(columns), tuple(map(int, last.split("+"))))
                assert made == replace(made, **{name: entry[name] for name in matrix.MEASURED}), shape
            else:
                of = teams if route == "teams" else halves
                assert of.cut_of("gpu", CUDA, int(rows), int(columns), int(last), int(tokens[0])), shape
    assert not caplog.records


def test_where_dequantizing_was_faster_it_is_taken(read, monkeypatch, tmp_path):
    """From the smallest number of tokens on at which it was, and at every larger one that was timed."""

    def row(bits: int, tokens: int, impl: str, us: float, shape: str = "14336x4096") -> dict:
        return {"shape": shape, "n": 1, "k": 1, "bits": bits, "tokens": tokens, "impl": impl, "us": us}

    rows = [
        row(8, 1, "halves w4", 20), row(8, 1, "dense", 19),
        row(8, 8, "halves w4", 30), row(8, 8, "dense", 40),
        row(8, 32, "halves w4", 50), row(8, 32, "halves w8", 60), row(8, 32, "dense", 45),
        row(8, 64, "halves w4", 90), row(8, 64, "dense", 45),
        row(7, 64, "halves w4", 20), row(7, 64, "dense", 45),
        row(8, 8, "dense", 1, "gptq"), row(4, 8, "dense", 1), {"shape": "x", "bits": 8, "refused": "why"},
    ]  # fmt: skip
    best = _cuda.best_settings(rows)
    assert best["dense"] == {"8": {"from": 32}, "7": {"from": 65}}
    read(json.dumps({"dense": best["dense"]}).encode())
    assert [triton.dense_from("gpu", bits) for bits in (8, 7, 6)] == [32, 65, 65]
    packed = packed_weights(16, 64, (3, 8))
    for kind in (triton.TritonMatrix, matrix.CudaMatrix):
        made = kind(packed, torch.float16)
        assert [made.route(tokens, 8) for tokens in (3, 31, 32)] == ["halves", "halves", "dense"]
        assert made.route(32, 3) == "halves"


def test_a_table_says_with_which_commit_each_route_was_measured(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"halves": {"a": {"us": 1.0}}, "commits": {"halves": "old", "teams": "old"}}))
    monkeypatch.setattr(_cuda, "settings_file", lambda name: path)
    monkeypatch.setattr(_cuda._record, "commit", lambda: "new")
    at = {"n": 16, "k": 256, "bits": 4, "tokens": 1, "impl": "halves w4", "us": 2.0}
    _cuda.write_settings("gpu", _cuda.best_settings([at]), [at])
    table = json.loads(path.read_text())
    assert table["halves"].keys() == {"a", "16x256x4x1"}
    assert table["commits"] == {"halves": "new", "teams": "old"}
