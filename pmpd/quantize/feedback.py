"""Codes and tables of a linear layer chosen for its output, at all precisions at once.

Starting from the tables of `kmeans`, two steps:

* `choose_codes` goes through the columns and lets the columns that are still to come make up for the error of
  each (GPTQ, Frantar et al., 2023, arXiv:2210.17323, with its order by how much a column matters). One code
  serves every precision by its top bits (Any-Precision LLM, Park et al., 2024, arXiv:2402.10517), so each
  precision has a copy of the weights with an error of its own, and the code is the one whose errors, each
  against what is usual at its precision, have the smallest sum.
* `refit_tables` then gives each row and precision the table of least squares for the codes at hand, against
  the layer's output (as GuidedQuant's LNQ does, Kim et al., 2025, arXiv:2505.07004). A second round of
  both lowers the errors by 1 % or less, so there is one.

Legend: N rows (out_features), K columns (in_features), B precisions, P the highest, C = 2**P codes, H [K, K]
second moments of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmpd import gpu
from pmpd.decode.graphs import Buffers, StepGraphs
from pmpd.quantize.kmeans import QuantizedRows, chunk_factor, quantize_rows

DAMPING = 0.01
"""Added to the diagonal of H, times its mean, as in GPTQ: directions that calibration texts never show get a
little weight."""

_JOINT_BITS = 4
"""Codes of up to so many bits are chosen among all; of longer ones first so many bits, then the rest."""

SEED_CANDIDATES = 32
"""Of the k-means that gives the first tables: with four times as many it takes five times as long, and the
errors in the end differ by a few parts in a thousand, either way."""

_BLOCK = 64
"""Columns after which the errors are passed on to all later columns."""

MAX_METRIC_BITS = 4
"""Of the metric that is kept: 2**b values squared for each row."""

_FIT_ELEMENTS = 4 * 1024 * 1024
"""Of the one-hot matrix of one chunk of rows; `chunk_factor` times as many on a GPU."""


def damped(hessian: Tensor) -> Tensor:
    """H with its diagonal raised; a column that is never used counts as one of average use."""
    result = hessian.to(torch.float64, copy=True)
    diagonal = result.diagonal()
    mean = float(diagonal.mean())
    diagonal.add_(DAMPING * mean if mean > 0 else 1.0)
    return result


@torch.no_grad()
def quantize_for_output(
    weight: Tensor, hessian: Tensor, seed_bits: int, parent_bits: int, blocks: StepGraphs | None = None
) -> tuple[QuantizedRows, RowMetric]:
    """`weight` [N, K] quantized so that tr((W − Ŵ) H (W − Ŵ)ᵀ) is small at each precision seed..parent (H
    damped); with the rows' parts of it and what moving their tables would cost.

    Works on the device of `weight`; `hessian` float [K, K] symmetric, not negative. A row's result does not
    depend on the other rows. `blocks`: of `block_steps`, where there are more matrices. ValueError: see
    `quantize_rows`.
    """
    hessian = damped(hessian)
    importance = hessian.diagonal().float().expand(weight.shape)
    weight = weight.float()
    rows = quantize_rows(weight, importance, seed_bits, parent_bits, SEED_CANDIDATES)
    codes = choose_codes(weight, error_factor(hessian), rows.tables, blocks)
    return refit_tables(weight, hessian, QuantizedRows(codes, rows.tables))


def output_errors(weight: Tensor, damped_hessian: Tensor, rows: QuantizedRows) -> Tensor:
    """float64 [B, N], lowest precision first: (w − ŵ)ᵀ H (w − ŵ) of every row."""
    errors = [(weight.double() - rows.dequantize(bits)) for bits in sorted(rows.tables)]
    return torch.stack([((error @ damped_hessian.double()) * error).sum(1) for error in errors])


def error_factor(damped_hessian: Tensor) -> tuple[Tensor, Tensor]:
    """(order int64 [K], U float32 [K, K] upper triangular) with H⁻¹ = Uᵀ U for H in that order of columns:
    the columns that matter most come first. U's row k says how the error of column k is passed on."""
    order = damped_hessian.diagonal().argsort(descending=True)
    # Of the columns backwards, H' = L Lᵀ; L⁻¹ with rows and columns backwards is U, and H⁻¹ is never made.
    backwards = order.flip(0)
    lower = torch.linalg.cholesky(damped_hessian[backwards][:, backwards])
    unit = torch.eye(len(order), dtype=lower.dtype, device=lower.device)
    return order, torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1).float()


def block_steps(precisions: Sequence[int], device: torch.device) -> StepGraphs:
    """What chooses the codes of a block of columns, for matrices of any number of rows. On a GPU a block is
    one CUDA graph, captured at the first matrix of so many rows; on a CPU it is done operation by
    operation."""
    return StepGraphs(
        lambda buffers, _: _choose_block(buffers),
        lambda rows: _block_buffers(rows, precisions, device),
        (),
        gpu.capture if device.type == "cuda" else None,
    )


def choose_codes(
    weight: Tensor,
    factor: tuple[Tensor, Tensor],
    tables: dict[int, Tensor],
    blocks: StepGraphs | None = None,
) -> Tensor:
    """Codes uint8 [N, K] at the highest precision of `tables`, with the error of each column passed on to
    later ones. `blocks`: of these precisions on this device, where there are more matrices."""
    order, upper = factor
    n, k = weight.shape
    left_BNK = weight.float()[:, order].expand(len(tables), n, k).clone()
    blocks = blocks or block_steps(tuple(tables), weight.device)
    block = blocks.buffers(n)
    for name, values in _candidates(tables, left_BNK[0]).items():
        block[name].copy_(values)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        size = stop - start  # columns behind it keep what they had: no earlier one depends on them
        block["weights"][:size] = left_BNK[:, :, start:stop].permute(2, 0, 1)
        block["factor"][:size, :size] = upper[start:stop, start:stop]
        blocks.run(n, None)
        codes[:, start:stop] = block["codes"][:size].T
        if stop < k:
            flat = block["errors"].permute(1, 2, 0).reshape(-1, size)
            left_BNK[:, :, stop:] -= (flat @ upper[start:stop, stop:]).view(len(tables), n, -1)
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def _block_buffers(rows: int, precisions: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """What `_choose_block` reads and writes, for `_BLOCK` columns of a matrix."""
    weights = torch.zeros(_BLOCK, len(precisions), rows, device=device)
    tables = {bits: torch.zeros(rows, 2**bits, device=device) for bits in precisions}
    return {
        "weights": weights,  # [column, B, N]; columns take up the errors of earlier ones
        "factor": torch.eye(_BLOCK, device=device),  # of these rows and columns of U
        "codes": torch.zeros(_BLOCK, rows, dtype=torch.uint8, device=device),
        "errors": torch.zeros_like(weights),  # to be passed on to the columns behind the block
        **_candidates(tables, weights[0, 0].unsqueeze(1)),
    }


def _choose_block(buffers: Buffers) -> None:
    """The codes of a block's columns, one after the other. Ten small operations a column: launching them
    takes a GPU far longer than doing them."""
    weights, factor, codes, errors = (buffers[name] for name in ("weights", "factor", "codes", "errors"))
    for column, row in enumerate(factor):
        code, chosen_BN = _best(buffers, weights[column])
        codes[column] = code[:, 0]
        error = torch.sub(weights[column], chosen_BN, out=errors[column])
        error /= row[column]
        weights[column + 1 :].addcmul_(row[column + 1 :].view(-1, 1, 1), error, value=-1)


def _candidates(tables: dict[int, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """What `_best` compares the weights of a column with.

    Up to `_JOINT_BITS` bits all codes are compared. Beyond, first all prefixes of so many bits, where a
    higher precision counts by how far its weight is from the values under the prefix; then what follows.
    """
    precisions = sorted(tables)
    parent = precisions[-1]
    prefix = min(parent, max(precisions[0], _JOINT_BITS))
    values = [tables[bits].float() for bits in precisions]
    low = sum(bits <= prefix for bits in precisions)  # precisions that a prefix settles
    spread = [_spread(value, bits, parent) for value, bits in zip(values, precisions, strict=True)]
    leaves_BNPL = torch.stack(spread).unflatten(2, (2**prefix, -1))  # prefix, what follows
    return {
        "share": _shares(weight, values).unsqueeze(2),  # [B, N, 1]
        "leaves": leaves_BNPL,
        "prefixes": leaves_BNPL[:low, :, :, 0].contiguous(),
        "under": leaves_BNPL[low:].amin(3),
        "over": leaves_BNPL[low:].amax(3),
    }


def _best(candidates: Buffers, now_BN: Tensor) -> tuple[Tensor, Tensor]:
    """(code int64 [N, 1], its values [B, N]) for the weights of one column: the code whose squared errors,
    summed over the precisions with a share for each, are smallest."""
    share, leaves_BNPL, prefixes_BNP = (candidates[name] for name in ("share", "leaves", "prefixes"))
    low = len(prefixes_BNP)
    now = now_BN.unsqueeze(2)
    cost = (now[:low] - prefixes_BNP).square_().mul_(share[:low]).sum(0)
    if low == len(share):
        prefix = cost.argmin(1, keepdim=True)
        return prefix, prefixes_BNP.gather(2, prefix.expand(low, -1, -1))[:, :, 0]
    outside = (candidates["under"] - now[low:]).clamp_(min=0) + (now[low:] - candidates["over"]).clamp_(min=0)
    cost += outside.square_().mul_(share[low:]).sum(0)
    prefix = cost.argmin(1, keepdim=True)
    leaves_BNL = leaves_BNPL[:, torch.arange(len(prefix), device=prefix.device), prefix[:, 0]]
    leaf = (now - leaves_BNL).square_().mul_(share).sum(0).argmin(1, keepdim=True)
    values = leaves_BNL.gather(2, leaf.expand(len(leaves_BNL), -1, -1))[:, :, 0]
    return prefix * leaves_BNPL.shape[3] + leaf, values


def _spread(table: Tensor, bits: int, parent: int) -> Tensor:
    """[N, 2**bits] -> [N, 2**parent]: the value that each code of `parent` bits has at precision `bits`."""
    return table.repeat_interleave(2 ** (parent - bits), dim=1)


def _shares(weight: Tensor, tables: list[Tensor]) -> Tensor:
    """float32 [B, N]: one over the squared error of rounding to the nearest centroid, so that each precision
    has the same say in the choice of a code, whatever the size of its errors."""
    shares = []
    for table in tables:
        ascending = table.sort(1).values
        middles = (ascending[:, 1:] + ascending[:, :-1]) / 2
        nearest = ascending.gather(1, torch.searchsorted(middles.contiguous(), weight.contiguous()))
        shares.append(1 / (weight - nearest).square().mean(1).clamp(min=1e-12))
    return torch.stack(shares)


@dataclass(frozen=True)
class RowMetric:
    """The error of a row's output as a function of its tables: `errors` precision b -> float32 [N], at the
    tables there are; `sums` float32 [N, C, C] = Sᵀ H S, S marking each column's code at C = 2**b codes, of
    the highest precision b ≤ `MAX_METRIC_BITS` (all tables are above it: of the lowest)."""

    errors: dict[int, Tensor]
    sums: Tensor

    def to(self, device: torch.device) -> RowMetric:
        """A copy whose `sums` are there; the errors, few, stay."""
        return RowMetric(self.errors, self.sums.to(device))

    def of(self, bits: int) -> Tensor:
        """float64 [N, 2**bits, 2**bits]: a table moved by δ costs δᵀ M δ; `bits` at most those of `sums`."""
        return _merged(self.sums.double(), bits)


def refit_tables(
    weight: Tensor, damped_hessian: Tensor, rows: QuantizedRows
) -> tuple[QuantizedRows, RowMetric]:
    """The same codes with, for each row and precision, the table t that minimizes (w − St)ᵀ H (w − St), where
    S [K, 2**b] marks each column's code, stored as float16; values that no column uses stay. And these
    errors."""
    precisions = sorted(rows.tables)
    parent = precisions[-1]
    kept = max([bits for bits in precisions if bits <= MAX_METRIC_BITS], default=precisions[0])
    sums = torch.empty(len(weight), 2**kept, 2**kept, device=weight.device)
    tables = {bits: table.clone() for bits, table in rows.tables.items()}
    n, k = weight.shape
    errors = torch.empty(len(precisions), n, dtype=torch.float64, device=weight.device)
    hessian = damped_hessian.float()
    first, *rest = [hessian] if weight.device.type == "cpu" else tf32_parts(hessian)
    elements = _FIT_ELEMENTS * chunk_factor(weight.device)
    for start in range(0, n, step := max(1, elements // (k * 2**parent))):
        part = slice(start, start + step)
        codes, target = rows.codes[part].long(), weight[part].float() @ hessian  # w H: [r, K]
        whole = (target * weight[part]).sum(1, dtype=torch.float64)  # wᵀ H w
        marks = torch.zeros(*codes.shape, 2**parent, device=weight.device).scatter_(
            2, codes.unsqueeze(2), 1.0
        )
        columns = marks.transpose(0, 1).reshape(k, -1)
        with gpu.tensor_float32():  # zeros and ones are exact in it, as are the parts of H
            spread = first @ columns
            for summand in rest:
                spread.addmm_(summand, columns)
        spread = spread.view(k, -1, 2**parent).transpose(0, 1)  # H S: [r, K, C]
        normal = (marks.transpose(1, 2) @ spread).double()  # Sᵀ H S: [r, C, C]
        right = (marks.transpose(1, 2) @ target.unsqueeze(2)).double()  # Sᵀ H w: [r, C, 1]
        for index, bits in reversed(list(enumerate(precisions))):
            normal, right = _merged(normal, bits), right.view(len(right), 2**bits, -1).sum(2, keepdim=True)
            if bits == kept:
                sums[part] = normal.float()
            table = _better_table(normal, right, tables[bits][part])
            value = table.double().unsqueeze(2)
            tables[bits][part] = table
            errors[index][part] = (whole + _change(normal, right, value)).clamp(min=0)
    by_precision = {bits: row.float() for bits, row in zip(precisions, errors, strict=True)}
    return QuantizedRows(rows.codes, tables), RowMetric(by_precision, sums)


def tf32_parts(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 summands of `values`: the first exact in TF32, the second but for its last two bits. The
    errors of rows, small differences of large numbers, would be off by a tenth with the first alone."""
    upper = (values.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return upper, values - upper


def _merged(metric: Tensor, bits: int) -> Tensor:
    """[N, 2**b, 2**b], b ≥ bits -> [N, 2**bits, 2**bits]: codes with the same top bits become one."""
    n, size, times = len(metric), 2**bits, metric.shape[1] >> bits
    return metric.view(n, size, times, size, times).sum((2, 4))


def _change(normal: Tensor, right: Tensor, table: Tensor) -> Tensor:
    """[r]: the error of tables [r, C, 1], less that of tables of zeros."""
    return (table.transpose(1, 2) @ (normal @ table - 2 * right))[:, 0, 0]


def _better_table(normal: Tensor, right: Tensor, before: Tensor) -> Tensor:
    """float16 [r, C] of normal [r, C, C] t = right [r, C, 1], held near `before` where it is not determined;
    `before` itself in rows where rounding made it worse."""
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal.mean(1, keepdim=True).clamp(min=1e-30) + (diagonal <= 0)
    system = normal + torch.diag_embed(ridge)
    old = before.double().unsqueeze(2)
    found = torch.linalg.solve(system, right + ridge.unsqueeze(2) * old).half()
    usable = (found.abs() < torch.finfo(torch.float16).max).all(1) & (
        _change(normal, right, found.double()) <= _change(normal, right, old)
    ).unsqueeze(1)
    return torch.where(usable, found[..., 0], before)
