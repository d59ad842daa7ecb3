"""Autotune tables that are damaged, or of another version: kernels are cut by rules, and that is logged."""

from __future__ import annotations

import json

import pytest
import torch

from pmpd import gpu
from pmpd.kernels import triton
from pmpd.kernels.cuda import halves, launch, matrix, teams
from pmpd.kernels.cuda.cut import H100, cut

CUDA = torch.device("cuda:0")
SHAPE = (4096, 4096)
BITS = dict.fromkeys(matrix.MEASURED, 1) | {"warps": 4, "us": 1.0}
TEAMS = dict.fromkeys(teams.MEASURED, 1) | {"warps": 8}


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
        ("clusters", "4096x4096x4x8", {"us": 1.0}),
        ("clusters", "4096x4096x4x8", {"cut": [4, 2], "us": 1.0}),
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
