"""The vectorised k-means against searches that try everything, on rows small enough for that."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.quantize import kmeans
from pmpd.quantize.kmeans import quantize_rows, weighted_error


def interval_error(values: list[float], weights: list[float], start: int, stop: int) -> float:
    total = sum(weights[start:stop])
    if total == 0:
        return 0.0
    mean = sum(w * x for w, x in zip(weights[start:stop], values[start:stop], strict=True)) / total
    return sum(w * (x - mean) ** 2 for w, x in zip(weights[start:stop], values[start:stop], strict=True))


def optimal_error(values: list[float], weights: list[float], clusters: int) -> float:
    """The lowest error of any clustering, by recursion over all borders."""
    pairs = sorted(zip(values, weights, strict=True))
    x, w = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    @cache
    def best(stop: int, count: int) -> float:
        if count == 1:
            return interval_error(x, w, 0, stop)
        return min(best(start, count - 1) + interval_error(x, w, start, stop) for start in range(stop + 1))

    return best(len(x), clusters)


def example(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    importance = torch.randn(rows, columns, generator=generator).square() * 1e-7
    return weight, importance


def rounding(weight: torch.Tensor, importance: torch.Tensor) -> float:
    """What float16 centroids can add to an error: half a unit in the last place of the largest, for every
    weight."""
    return float(importance.sum() * (weight.abs().max() * 2**-11) ** 2)


@settings(max_examples=25, deadline=None)
@given(columns=st.integers(5, 24), bits=st.integers(2, 3), seed=st.integers(0, 2**31))
def test_seed_clusters_of_a_short_row_are_the_optimum(columns: int, bits: int, seed: int) -> None:
    weight, importance = example(2, columns, seed)
    rows = quantize_rows(weight, importance, bits, bits)
    error, _ = weighted_error(weight, importance, rows, bits)
    optimum = sum(
        optimal_error(x, w, 2**bits)
        for x, w in zip(weight.double().tolist(), importance.double().tolist(), strict=True)
    )
    assert error <= optimum * 1.001 + rounding(weight, importance) + 2e-6 * float(
        importance.sum() * weight.var()
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_every_split_is_the_best_of_all_cuts(weighted: bool) -> None:
    weight, importance = example(4, 200)
    if not weighted:
        importance = torch.ones_like(weight)
    rows = quantize_rows(weight, importance if weighted else None, 2, 4)
    for bits in (3, 4):
        best = 0.0
        for row in range(len(weight)):
            for parent in range(2 ** (bits - 1)):
                inside = rows.codes[row] >> (4 - bits + 1) == parent
                x, order = weight[row][inside].double().sort()
                w = importance[row][inside][order].double()
                cuts = [
                    interval_error(x.tolist(), w.tolist(), 0, c)
                    + interval_error(x.tolist(), w.tolist(), c, len(x))
                    for c in range(len(x))
                ]
                best += min(cuts, default=0.0)
        error, _ = weighted_error(weight, importance, rows, bits)
        assert error <= best * 1.001 + rounding(weight, importance)


@pytest.mark.parametrize("seed_bits", [2, 3, 6])
def test_error_falls_with_every_bit(seed_bits: int) -> None:
    weight, importance = example(16, 2048)
    rows = quantize_rows(weight, importance, seed_bits, 8)
    errors = [weighted_error(weight, importance, rows, bits)[0] for bits in range(seed_bits, 9)]
    assert all(after < 0.4 * before for before, after in pairwise(errors)), errors
    assert sorted(rows.tables) == list(range(seed_bits, 9))
    assert rows.codes.dtype == torch.uint8
    assert all(
        table.dtype == torch.float16 and table.shape == (16, 2**bits) for bits, table in rows.tables.items()
    )


@settings(max_examples=15, deadline=None)
@given(columns=st.integers(3, 300), parent=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_every_code_is_the_nearest_stored_centroid_its_parent_allows(
    columns: int, parent: int, seed: int
) -> None:
    weight, importance = example(3, columns, seed)
    rows = quantize_rows(weight, importance, 2, parent)
    for bits, table in rows.tables.items():
        codes = rows.codes.long() >> (parent - bits)
        value = table.float().gather(1, codes)
        if bits == 2:
            allowed = (weight.unsqueeze(2) - table.float().unsqueeze(1)).abs().amin(2)
        else:
            allowed = torch.minimum(
                (weight - value).abs(), (weight - table.float().gather(1, codes ^ 1)).abs()
            )
        assert torch.equal((weight - value).abs(), allowed)
        assert (table.float().diff(dim=1) >= 0).all(), "a table ascends"


def test_importance_decides_where_centroids_go() -> None:
    weight, importance = example(8, 1024)
    importance[:, ::2] *= 1000
    weighted, plain = quantize_rows(weight, importance, 2, 4), quantize_rows(weight, None, 2, 4)
    for bits in (2, 3, 4):
        assert (
            weighted_error(weight, importance, weighted, bits)[0]
            < 0.999 * weighted_error(weight, importance, plain, bits)[0]
        )
        assert weighted_error(weight, None, weighted, bits)[0] > weighted_error(weight, None, plain, bits)[0]


def test_a_row_does_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = example(7, 320)
    whole = quantize_rows(weight, importance, 2, 4)
    monkeypatch.setattr(kmeans, "_CHUNK_ELEMENTS", 2 * 320)
    parts = quantize_rows(weight, importance, 2, 4)
    assert torch.equal(whole.codes, parts.codes)
    assert all(torch.equal(whole.tables[bits], parts.tables[bits]) for bits in whole.tables)


def test_rows_with_few_values_are_held_exactly() -> None:
    values = torch.tensor([-1.5, 0.0, 0.25, 2.0])
    weight = values[torch.randint(0, 4, (5, 256), generator=torch.Generator().manual_seed(0))]
    weight[0], weight[1] = 0.0, 0.5  # constant rows
    for importance in (None, torch.rand(weight.shape), torch.zeros_like(weight)):
        rows = quantize_rows(weight, importance, 2, 5)
        for bits in rows.tables:
            assert torch.equal(rows.dequantize(bits), weight)


def test_weights_without_a_gradient_still_get_sensible_centroids() -> None:
    weight, importance = example(4, 512)
    plain = quantize_rows(weight, None, 2, 4)
    assert torch.equal(quantize_rows(weight, torch.zeros_like(weight), 2, 4).codes, plain.codes), (
        "no gradients at all: as unweighted"
    )
    importance[:, weight[0] > 0] = 0  # half of the values of a row never mattered
    rows = quantize_rows(weight, importance, 2, 4)
    assert all(table.isfinite().all() for table in rows.tables.values())
    for table in rows.tables.values():
        assert (table.float().amin(1) >= weight.amin(1) - 1e-3).all()
        assert (table.float().amax(1) <= weight.amax(1) + 1e-3).all()


def test_long_rows_with_outliers_stay_near_the_optimum() -> None:
    """Beyond 128 columns the borders are searched among candidates: bunched outliers must not fall between
    them."""
    weight, importance = example(1, 1600)
    weight[:, :6] = torch.tensor([5.0, 5.1, 5.2, 9.0, 9.1, 9.2])
    importance[:, :6] = importance.sum()
    error, _ = weighted_error(weight, importance, quantize_rows(weight, importance, 2, 2), 2)
    x, order = weight[0].double().sort()
    w = importance[0][order].double()
    sums = [torch.cat([torch.zeros(1), part.cumsum(0)]) for part in (w, w * x, w * x * x)]
    weights, values, squares = (
        part.unsqueeze(0) - part.unsqueeze(1) for part in sums
    )  # [from border, to border]
    cost = (squares - values**2 / weights.clamp(min=1e-300)).triu(1) + torch.full_like(
        weights, torch.inf
    ).tril(-1).nan_to_num(0, torch.inf)
    best = cost[0]
    for _ in range(3):
        best = (best.unsqueeze(1) + cost).amin(0)
    assert error <= 1.02 * float(best[-1]) + rounding(weight, importance)


def test_what_cannot_be_clustered_is_refused() -> None:
    weight, importance = example(2, 32)
    with pytest.raises(ValueError, match=r"seed precision 5 is above parent precision 4"):
        quantize_rows(weight, None, 5, 4)
    with pytest.raises(ValueError, match=r"allowed are 2\.\.8"):
        quantize_rows(weight, None, 2, 9)
    with pytest.raises(ValueError, match=r"allowed are 2\.\.8"):
        quantize_rows(weight, None, 1, 4)
    with pytest.raises(ValueError, match="NaN or values beyond"):
        quantize_rows(torch.full((2, 32), float("nan")), None, 2, 4)
    with pytest.raises(ValueError, match="NaN or values beyond"):
        quantize_rows(torch.full((2, 32), 7e4), None, 2, 4)
    with pytest.raises(ValueError, match="importance holds"):
        quantize_rows(weight, -importance, 2, 4)
    with pytest.raises(ValueError, match="must be equal"):
        quantize_rows(weight, importance[:1], 2, 4)


@pytest.mark.slow
def test_error_is_no_worse_than_that_of_flash1dkmeans() -> None:
    pytest.importorskip("flash1dkmeans")
    from bench.kmeans import Config, main

    record = main(Config(rows=256, columns=2048, parent_precision=6, threads=1, repeats=1))
    errors = record["relative_weighted_error"]
    assert all(errors["pmpd"][bits] <= errors["flash1dkmeans"][bits] for bits in errors["pmpd"])


@pytest.mark.gpu
def test_a_gpu_clusters_as_well_as_a_cpu() -> None:
    weight, importance = example(64, 4096)
    expected = quantize_rows(weight, importance, 2, 4)
    rows = quantize_rows(weight.cuda(), importance.cuda(), 2, 4)
    for bits in (2, 3, 4):
        here, there = (
            weighted_error(weight, importance, expected, bits)[0],
            weighted_error(weight.cuda(), importance.cuda(), rows, bits)[0],
        )
        assert there == pytest.approx(here, rel=1e-3)


def test_a_gpu_takes_as_many_rows_at_once_as_its_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for free in (0, 8 * 2**30, 100 * 2**30):
        monkeypatch.setattr(kmeans.gpu, "free_bytes", lambda device, free=free: free)
        found.append(kmeans.chunk_factor(torch.device("cuda")))
    assert found == [16, 32, 64]
    assert kmeans.chunk_factor(torch.device("cpu")) == 1
