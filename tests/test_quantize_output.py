"""Codes and tables chosen for a layer's output, and tables tuned for the model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pmpd import gpu
from pmpd.quantize import feedback
from pmpd.quantize import moments as moments_module
from pmpd.quantize.feedback import (
    RowMetric,
    block_steps,
    choose_codes,
    damped,
    error_factor,
    output_errors,
    refit_tables,
    tf32_parts,
)
from pmpd.quantize.kmeans import QuantizedRows, quantize_rows
from pmpd.quantize.moments import NORM_LIMIT, InputMoments, add_input_moments
from pmpd.quantize.tuning import TunedLinear, basis, better_tables, divergence, tune_tables, with_tables
from tests.helpers import write_dense


def example(rows: int = 24, columns: int = 192, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and damped second moments of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mix = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(2000, columns // 4, generator=generator) @ mix
    x += 0.3 * torch.randn(2000, columns, generator=generator)
    return weight, damped(x.T @ x)


def by_precision(metric: RowMetric) -> torch.Tensor:
    return torch.stack([metric.errors[bits] for bits in sorted(metric.errors)]).double()


def seeds(weight: torch.Tensor, hessian: torch.Tensor, parent: int = 4) -> QuantizedRows:
    return quantize_rows(weight, hessian.diagonal().float().expand(weight.shape), 2, parent)


@pytest.mark.parametrize(("parent", "most"), [(3, 0.5), (4, 0.6), (6, 0.8)])
def test_feedback_beats_rounding_at_every_precision(parent: int, most: float) -> None:
    weight, hessian = example()
    rows = seeds(weight, hessian, parent)
    codes = choose_codes(weight, error_factor(hessian), rows.tables)
    before = output_errors(weight, hessian, rows).sum(1)
    after = output_errors(weight, hessian, QuantizedRows(codes, rows.tables)).sum(1)
    assert (after < before).all(), (before, after)
    assert (after / before).log().mean().exp() < most, "the more precisions share a code, the less for each"


def test_the_error_factor_is_the_upper_root_of_the_inverse() -> None:
    _, hessian = example(columns=96)
    order, upper = error_factor(hessian)
    diagonal = hessian.diagonal()[order]
    assert (diagonal.diff() <= 0).all()
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    unit = upper.double().T @ upper.double() @ hessian[order][:, order]
    torch.testing.assert_close(unit, torch.eye(96).double(), rtol=0, atol=1e-5)


def plain_codes(
    weight: torch.Tensor, factor: tuple[torch.Tensor, torch.Tensor], tables: dict[int, torch.Tensor]
) -> torch.Tensor:
    """Each column's error passed on to all later columns at once: no blocks, no buffers."""
    order, upper = factor
    left = weight[:, order].repeat(len(tables), 1, 1)
    candidates, codes = feedback._candidates(tables, left[0]), torch.empty(weight.shape, dtype=torch.uint8)
    for column in range(weight.shape[1]):
        code, chosen = feedback._best(candidates, left[:, :, column])
        codes[:, order[column]] = code[:, 0].to(torch.uint8)
        error = (left[:, :, column] - chosen) / upper[column, column]
        left[:, :, column + 1 :] -= upper[column, column + 1 :] * error.unsqueeze(2)
    return codes


@pytest.mark.parametrize("parent", [2, 4, 6])
def test_blocks_of_columns_choose_what_plain_feedback_chooses(
    parent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = example(96, 300)
    rows, factor = seeds(weight, hessian, parent), error_factor(hessian)
    plain = plain_codes(weight, factor, rows.tables)
    monkeypatch.setattr(feedback, "_BLOCK", 300)
    assert torch.equal(choose_codes(weight, factor, rows.tables), plain), "one block: the same sums"
    monkeypatch.setattr(feedback, "_BLOCK", 64)  # the last one is shorter
    blocks = choose_codes(weight, factor, rows.tables)
    # sums of another order tip a code here and there, and with it what comes after in its row
    assert (blocks == plain).float().mean() > 0.95
    errors = [
        output_errors(weight, hessian, QuantizedRows(codes, rows.tables)).sum(1) for codes in (blocks, plain)
    ]
    torch.testing.assert_close(*errors, rtol=0.01, atol=0)


def test_blocks_serve_matrix_after_matrix() -> None:
    blocks = block_steps((2, 3, 4), torch.device("cpu"))
    for rows, columns, seed in ((24, 192, 0), (24, 100, 1), (40, 192, 2), (24, 192, 3)):
        weight, hessian = example(rows, columns, seed)
        quantized, factor = seeds(weight, hessian), error_factor(hessian)
        alone = choose_codes(weight, factor, quantized.tables)
        assert torch.equal(choose_codes(weight, factor, quantized.tables, blocks), alone)


@pytest.mark.gpu
@pytest.mark.parametrize("parent", [2, 3, 4, 6])
def test_captured_blocks_choose_the_same_codes(parent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = replays = 0
    capture = gpu.capture

    def counted(step: Callable[[], None], prepare: Callable[[], None]) -> Callable[[], None]:
        nonlocal captures
        captures += 1
        replay = capture(step, prepare)

        def again() -> None:
            nonlocal replays
            replays += 1
            replay()

        return again

    monkeypatch.setattr(gpu, "capture", counted)
    blocks = block_steps(range(2, parent + 1), torch.device("cuda"))
    for seed in (0, 1):
        weight, hessian = (tensor.cuda() for tensor in example(96, 300, seed))
        tables, factor = seeds(weight, hessian, parent).tables, error_factor(hessian)
        found = choose_codes(weight, factor, tables, blocks)
        assert (captures, replays) == (1, 5 * (seed + 1)), blocks.why_eager
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "capture", lambda step, prepare: step)
            assert torch.equal(found, choose_codes(weight, factor, tables))


def test_without_correlation_feedback_rounds_to_the_nearest_value() -> None:
    """H diagonal: no column can make up for another, so one precision alone gives plain rounding."""
    weight, _ = example()
    hessian = torch.diag(torch.rand(192, generator=torch.Generator().manual_seed(1)).double() + 0.1)
    rows = quantize_rows(weight, None, 3, 3)
    codes = choose_codes(weight, error_factor(hessian), rows.tables)
    distance = (weight.unsqueeze(2) - rows.tables[3].float().unsqueeze(1)).abs()
    chosen = distance.gather(2, codes.long().unsqueeze(2))[..., 0]
    torch.testing.assert_close(chosen, distance.amin(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("parent", [2, 4, 5])
def test_a_refit_never_raises_an_error_and_knows_it(parent: int) -> None:
    weight, hessian = example()
    rows = seeds(weight, hessian, parent)
    fitted, metric = refit_tables(weight, hessian, rows)
    errors = by_precision(metric)
    before = output_errors(weight, hessian, rows)
    assert (errors <= before * (1 + 1e-4)).all()
    assert (errors.sum(1) < 0.95 * before.sum(1)).all()
    torch.testing.assert_close(errors, output_errors(weight, hessian, fitted), rtol=1e-2, atol=1e-3)
    assert torch.equal(fitted.codes, rows.codes)
    assert all(table.dtype == torch.float16 for table in fitted.tables.values())


def test_a_refit_is_the_least_squares_solution() -> None:
    """Against a search with nothing of ours: no table value can be moved for the better."""
    weight, hessian = example(rows=3, columns=64)
    fitted, _ = refit_tables(weight, hessian, seeds(weight, hessian, 3))
    best = output_errors(weight, hessian, fitted)
    for bits in fitted.tables:
        for column in range(2**bits):
            for factor in (0.97, 1.03):
                moved = {b: table.clone() for b, table in fitted.tables.items()}
                moved[bits][:, column] *= factor
                worse = output_errors(weight, hessian, QuantizedRows(fitted.codes, moved))
                assert (worse >= best * (1 - 1e-3)).all()


@pytest.mark.parametrize(("seed", "parent"), [(2, 4), (3, 6), (5, 6)])
def test_the_metric_says_what_moving_a_table_costs(seed: int, parent: int) -> None:
    """At the table of least squares, any change δ costs δᵀ M δ; columns of the basis cost the row's error."""
    weight, hessian = example(rows=5, columns=64)
    rows = quantize_rows(weight, hessian.diagonal().float().expand(weight.shape), seed, parent)
    fitted, metric = refit_tables(weight, hessian, rows)
    best = by_precision(metric)
    highest = max(seed, 4)
    assert metric.sums.shape == (5, 2**highest, 2**highest)
    for index, bits in enumerate(range(seed, highest + 1)):
        table = fitted.tables[bits].float()
        change = 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(bits)).double()
        moved = QuantizedRows(fitted.codes, {**fitted.tables, bits: table + change.float()})
        cost = output_errors(weight, hessian, moved)[index] - best[index]
        expected = torch.einsum("ni,nij,nj->n", change, metric.of(bits), change)
        torch.testing.assert_close(cost, expected, rtol=0.05, atol=1e-6)
        costs = basis(metric, bits).double().transpose(1, 2) @ metric.of(bits) @ basis(metric, bits).double()
        used = torch.stack([(fitted.codes >> (parent - bits) == c).any(1) for c in range(2**bits)], 1)
        found = costs.diagonal(dim1=1, dim2=2) / best[index].unsqueeze(1)
        assert (found <= 1 + 1e-3).all(), "the ridge only shortens steps"
        assert found[used].median() > 0.5


def test_rows_and_runs_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = example()
    whole, metric = feedback.quantize_for_output(weight, hessian, 2, 4)
    errors = by_precision(metric)
    again, _ = feedback.quantize_for_output(weight, hessian, 2, 4)
    assert torch.equal(whole.codes, again.codes)
    monkeypatch.setattr(feedback, "_FIT_ELEMENTS", 1)
    half_errors = by_precision(feedback.quantize_for_output(weight[:9], hessian, 2, 4)[1])
    # a sum that rounds differently may tip one code, and with it what comes after
    assert (half_errors / errors[:, :9] - 1).abs().median() < 0.01
    kept = hessian.clone()
    feedback.quantize_for_output(weight, hessian, 2, 4)
    assert torch.equal(kept, hessian), "what the caller has stays as it is"


def test_two_parts_in_tf32_are_nearly_the_whole() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 1000)
    upper, lower = tf32_parts(values)
    assert torch.equal(upper + lower, values)
    cut = [
        (part.view(torch.int32) & -(1 << 13)).view(torch.float32) for part in (upper, lower)
    ]  # as TF32 does
    assert torch.equal(cut[0], upper)
    assert ((sum(cut) - values) / values).abs().max() < 2**-20


@pytest.mark.gpu
def test_a_gpu_fits_the_tables_that_a_cpu_fits() -> None:
    weight, hessian = example(40, 320)
    rows = seeds(weight, hessian)
    there = QuantizedRows(rows.codes.cuda(), {bits: table.cuda() for bits, table in rows.tables.items()})
    metric = refit_tables(weight, hessian, rows)[1]
    found = refit_tables(weight.cuda(), hessian.cuda(), there)[1]
    assert (found.sums.cpu() - metric.sums).abs().max() < 1e-5 * metric.sums.abs().max()
    # H in one part would lose 4e-4 of the sums, and a tenth of the errors, small differences of large numbers
    torch.testing.assert_close(by_precision(found).cpu(), by_precision(metric), rtol=0.01, atol=0)


def test_values_that_no_column_uses_stay() -> None:
    weight, hessian = example(rows=2, columns=32)
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    codes[:, ::2] = 1
    tables = {2: torch.full((2, 4), 7.0).half()}
    fitted, _ = refit_tables(weight, hessian, QuantizedRows(codes, tables))
    assert (fitted.tables[2][:, 2:] == 7).all()
    assert (fitted.tables[2][:, :2].abs() < 1).all()


def test_moments_are_sums_over_tokens_and_shared_by_those_who_read_the_same(tmp_path: Path) -> None:
    folder = write_dense(tmp_path, "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    layer = "model.layers.1"
    names = [f"{layer}.self_attn.{n}_proj" for n in "qkvo"] + [f"{layer}.mlp.down_proj"]
    moments = InputMoments()
    add_input_moments(model, names, samples[:1], moments)
    add_input_moments(model, names, samples, moments)  # goes on with the second
    assert moments.samples == 3
    assert moments.key_of[names[1]] == moments.key_of[names[2]] == names[0]
    assert sorted(moments.sums) == sorted([names[0], names[3], names[4]])
    seen = []
    with torch.no_grad():
        model.get_submodule(names[4]).register_forward_pre_hook(lambda _, a: seen.append(a[0][0]))
        for sample in samples:
            model(sample.unsqueeze(0))
    assert all(x.norm(dim=1).max() < NORM_LIMIT * x.norm(dim=1).median() for x in seen)
    torch.testing.assert_close(moments.of(names[4]), sum(x.T @ x for x in seen), rtol=1e-4, atol=1e-4)


def test_a_massive_token_does_not_hide_the_others() -> None:
    linear = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0] *= 1e4

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.device = linear, torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.linear(x)

    moments = InputMoments()
    add_input_moments(Model(), ["linear.0"], torch.zeros(1, 2).long(), moments)  # type: ignore[arg-type]
    median = x[0].norm(dim=1).median()
    assert float(moments.of("linear.0").trace()) <= (NORM_LIMIT**2 + 4 * 50) * median**2


def second_moment_of(x: torch.Tensor) -> torch.Tensor:
    return moments_module._second_moment(x, "linear")


def test_inputs_of_16_bits_are_multiplied_as_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextmanager
    def tensor_float32() -> Iterator[None]:
        entered.append(1)
        yield

    monkeypatch.setattr(gpu, "tensor_float32", tensor_float32)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    second_moment_of(x)
    assert not entered
    second_moment_of(x.bfloat16())
    assert entered


@pytest.mark.parametrize("name", ["fp32_precision", "allow_tf32"])
def test_tf32_is_off_again_behind_what_asked_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.backends.cuda.matmul
    if name == "allow_tf32":  # a torch that has no other name for it
        settings = SimpleNamespace(allow_tf32=False)
        monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    before = getattr(settings, name)

    def fail() -> None:
        assert getattr(settings, name) in ("tf32", True)
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"), gpu.tensor_float32():
        fail()
    assert getattr(settings, name) == before
    assert not torch.backends.cuda.matmul.allow_tf32, "raises where the two names disagree"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_on_a_gpu_lose_nothing_to_tf32(dtype: torch.dtype) -> None:
    x = torch.randn(512, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double().T @ x.double()
    found = second_moment_of(x.cuda()).double().cpu()
    assert (found - expected).abs().max() < 1e-5 * expected.diagonal().mean()


def small_model(tmp_path: Path) -> tuple[nn.Module, dict[str, QuantizedRows], dict[str, RowMetric]]:
    folder = write_dense(tmp_path, "qwen2")  # with biases
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fitted = {
        name: refit_tables(
            module.weight.detach(),
            torch.eye(module.in_features).double(),
            quantize_rows(module.weight.detach(), None, 2, 3),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    }
    return model, *({name: pair[index] for name, pair in fitted.items()} for index in (0, 1))


def test_a_layer_with_tables_has_the_gradient_of_its_dequantized_weights() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 6)
    rows = quantize_rows(linear.weight.detach(), None, 2, 3)
    layer = TunedLinear(linear, rows)
    x = torch.randn(2, 5, 32, requires_grad=True)
    for bits in (2, 3):
        layer.bits = bits
        tuned = layer.tables[bits].requires_grad_(True)
        layer(x).square().sum().backward()
        found, found_x = tuned.grad, x.grad
        x.grad = None
        plain = rows.tables[bits].float().requires_grad_(True)
        weight = plain.gather(1, (rows.codes >> (3 - bits)).long())
        nn.functional.linear(x, weight, linear.bias).square().sum().backward()
        torch.testing.assert_close(found, plain.grad)
        torch.testing.assert_close(found_x, x.grad)
        x.grad = None


def test_divergence_and_its_gradient() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(300, 9, requires_grad=True), torch.randn(300, 9)
    target = target.log_softmax(1)
    value, gradient = divergence(logits.detach(), target)
    loss = nn.functional.kl_div(logits.log_softmax(1), target, log_target=True, reduction="batchmean")
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, logits.grad)
    assert divergence(target, target)[0] == pytest.approx(0, abs=1e-6)


def test_tuning_lowers_the_divergence_goes_on_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, quantized, metrics = small_model(tmp_path)
    samples = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(0)).expand(8, -1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    states: list[dict[str, torch.Tensor]] = []

    def keep(state) -> None:
        states.append({name: tensor.clone() for name, tensor in state.tensors.items()})

    tuned, state = tune_tables(model, quantized, metrics, samples, 0.2, on_step=keep)
    for bits in (2, 3):
        values = [step[bits] for step in state.divergence if bits in step]
        assert len(values) == (8 if bits == 2 else 4)
        assert values[-1] < 0.9 * values[0]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(torch.equal(tuned[name].codes, rows.codes) for name, rows in quantized.items())
    state.step, state.tensors, state.divergence = 3, states[2], state.divergence[:3]
    resumed, _ = tune_tables(model, quantized, metrics, samples, 0.2, state)
    for name, rows in tuned.items():
        for bits, table in rows.tables.items():
            assert torch.equal(table, resumed[name].tables[bits])


def test_tuning_that_makes_a_precision_worse_is_not_kept(tmp_path: Path) -> None:
    model, fitted, metrics = small_model(tmp_path)
    samples = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(0))
    tuned, _ = tune_tables(model, fitted, metrics, samples, 0.2)
    kept, perplexity = better_tables(fitted, {"2": 9.0, "3": 5.0}, tuned, {"2": 8.0, "3": 6.0})
    assert perplexity == {"2": 8.0, "3": 5.0}
    for name, rows in kept.items():
        assert not torch.equal(tuned[name].tables[2], fitted[name].tables[2]), "the tuning changed nothing"
        assert torch.equal(rows.tables[2], tuned[name].tables[2])
        assert torch.equal(rows.tables[3], fitted[name].tables[3])


def test_a_layer_switches_between_its_weights_and_its_tables(tmp_path: Path) -> None:
    model, quantized, _ = small_model(tmp_path)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        plain = model(ids).logits
        with with_tables(model, quantized) as linears:
            assert torch.equal(model(ids).logits, plain)
            for linear in linears.values():
                linear.bits = 2
            assert not torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)
    assert math.isfinite(plain.sum())


@pytest.mark.gpu
def test_a_gpu_quantizes_as_well_as_a_cpu() -> None:
    weight, hessian = example()
    here = by_precision(feedback.quantize_for_output(weight, hessian, 2, 4)[1])
    there = by_precision(feedback.quantize_for_output(weight.cuda(), hessian.cuda(), 2, 4)[1])
    torch.testing.assert_close(there.cpu().sum(1), here.sum(1), rtol=0.03, atol=0)


def test_the_benchmark_of_a_layer_times_every_part() -> None:
    from bench.quantize_layer import Parts, one_matrix

    device = torch.device("cpu")
    parts, blocks = Parts(device), block_steps((2, 3, 4), device)
    one_matrix(parts, 8, 64, blocks, torch.Generator().manual_seed(0))
    assert sorted(parts.seconds) == [
        *("bases", "codes", "factor", "k-means", "moments", "packing", "tables"),
        *(f"tuning, {bits} bits" for bits in (2, 3, 4)),
    ]
    assert all(seconds > 0 for seconds in parts.seconds.values())
