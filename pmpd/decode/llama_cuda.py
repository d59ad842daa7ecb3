"""A lean decode forward for Llama trees on a CUDA device: at most nine launches a layer, which all fit a
CUDA graph.

Nothing in it depends on values that the host knows: slots and positions are read on the device, so a captured
forward replays for any rows. The generic path through the model's modules stays the truth: tests compare the
two, and anything not recognised takes it.

A layer: add + norm | q, k, v | rotary + cache write + attention | o | add + norm | gate, up | silu | down.
For one or two rows the stages also split their results into digits for the int8 tensor cores
(`pmpd.kernels.triton`), which is a launch more, before o. With the matrices of `pmpd.kernels.cuda` one or two
rows take five launches: norm + q, k, v | rotary + cache write + attention | o | norm + gate, up + silu |
down; rows of two precisions share them. With dequantized matrices (`pmpd.kernels.dense`) the precisions of a
batch can be data: rows lie in tiles of one precision each (`CudaForward.tiled`).

Legend: n tokens of the flat forward (one a row), C hidden size, Hq query heads, H KV heads, D head dim, F
intermediate size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from pmpd.kernels import dense
from pmpd.kernels.cuda.launch import Norm
from pmpd.kernels.cuda.matrix import CudaMatrix
from pmpd.kernels.dense import DenseMatrix
from pmpd.kernels.step_attention import StepAttention
from pmpd.kernels.triton import (
    DIGITS_BITS,
    SPLIT_TOKENS,
    SplitActivations,
    TritonMatrix,
    merge,
    padded_rows,
    split_activations,
)
from pmpd.kernels.triton_bytes import TritonByteMatrix
from pmpd.weights.base import PrecisionLinear, Segment, head_dim
from pmpd.weights.byte_head import ByteHead


class Dense(NamedTuple):
    """An unquantized layer."""

    weight: Tensor  # [N, K]
    bias: Tensor | None = None


class Several(NamedTuple):
    """Layers of other formats (GPTQ, for one) that read the same input, multiplied one after the other."""

    linears: Sequence[PrecisionLinear | nn.Linear]

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        parts = [
            linear.multiply(x, bits) if isinstance(linear, PrecisionLinear) else linear(x)
            for linear in self.linears
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


Weight = TritonMatrix | DenseMatrix | Dense | Several

NARROW = 1024
"""Hidden size up to which tiles of 32 do for many rows: what is read twice is small then, and fewer rows are
padding."""


def tile_rows(rows: int, hidden_size: int) -> int:
    """Rows of a tile where `rows` decode together, as measured on an H200 at hidden sizes 576 and 2048."""
    return 32 if rows <= (384 if hidden_size <= NARROW else 64) else 64


@dataclass
class Layer:
    input_norm: Tensor
    qkv: Weight
    out: Weight
    post_norm: Tensor
    gate_up: Weight
    down: Weight
    window: int | None = None


@dataclass
class LlamaWeights:
    """What a decoder of the Llama family computes with; `head` [V, C], where it is dense, and `embedding`
    [V, C] may be one tensor."""

    embedding: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor | TritonByteMatrix
    inverse_frequencies: Tensor
    """float32 [D / 2]."""
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    rope_scale: float = 1.0


def llama_weights(model: PreTrainedModel) -> LlamaWeights | str:
    """The weights of a Llama, Mistral or Qwen2 tree on a CUDA device; of any other model the reason why it is
    not one, in words.

    Layers that read the same input are merged where their format allows it: the modules' own matrices become
    views, so the generic path (prefill) goes on working.
    """
    if type(model) not in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM) or type(
        model.lm_head
    ) not in (nn.Linear, ByteHead):
        return (
            f"no decode step is written out for {type(model).__name__} with a "
            f"{type(model.lm_head).__name__} as its head"
        )
    config, rotary, head = model.config, model.model.rotary_emb, model.lm_head
    if config.hidden_act != "silu" or rotary.rope_type not in ("default", "llama3", "linear"):
        return (
            f"no decode step is written out for the activation {config.hidden_act} with rotary embeddings "
            f"of type {rotary.rope_type}"
        )
    layers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = together([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = together([mlp.gate_proj, mlp.up_proj])
        window = getattr(attention, "sliding_window", None)
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        layers.append(
            Layer(
                norms[0],
                qkv,
                together([attention.o_proj]),
                norms[1],
                gate_up,
                together([mlp.down_proj]),
                window,
            )
        )
    return LlamaWeights(
        embedding=model.model.embed_tokens.weight,
        layers=layers,
        norm=model.model.norm.weight,
        head=cast("TritonByteMatrix", head.matrix) if isinstance(head, ByteHead) else head.weight,
        inverse_frequencies=rotary.inv_freq.float(),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        epsilon=config.rms_norm_eps,
        rope_scale=float(rotary.attention_scaling),
    )


def together(linears: Sequence[nn.Module]) -> Weight:
    """Layers that read the same input, as one."""
    matrices = [getattr(linear, "matrix", None) for linear in linears]
    if all(isinstance(matrix, TritonMatrix) for matrix in matrices):
        parts = cast("list[TritonMatrix]", matrices)
        if len(parts) == 1:
            return parts[0]
        try:
            return merge(parts)
        except ValueError:  # numbers of rows that tiles can't be cut at
            return Several(cast("list[PrecisionLinear | nn.Linear]", linears))
    if all(isinstance(matrix, DenseMatrix) for matrix in matrices):
        whole = cast("list[DenseMatrix]", matrices)
        return whole[0] if len(whole) == 1 else dense.merge(whole)
    if all(type(linear) is nn.Linear for linear in linears):
        return _dense(cast("list[nn.Linear]", linears))
    return Several(cast("list[PrecisionLinear | nn.Linear]", linears))


def can_tile(weight: Weight) -> TypeGuard[DenseMatrix]:
    """Whether `DenseMatrix.multiply_tiles` is for it: in float32 a GPU's tensor cores are of no use."""
    if not isinstance(weight, DenseMatrix):
        return False
    return weight.stacked.dtype != torch.float32 or weight.stacked.device.type == "cpu"


def _dense(linears: Sequence[nn.Linear]) -> Dense:
    if len(linears) == 1:
        return Dense(linears[0].weight, linears[0].bias)
    whole = torch.cat([linear.weight.detach() for linear in linears])
    start = 0
    for linear in linears:
        linear.weight = nn.Parameter(whole[start : start + linear.out_features], requires_grad=False)
        start += linear.out_features
    if all(linear.bias is None for linear in linears):
        return Dense(whole)
    return Dense(
        whole,
        torch.cat(
            [
                whole.new_zeros(linear.out_features) if linear.bias is None else linear.bias
                for linear in linears
            ]
        ),
    )


class CudaForward:
    """Logits of one decode forward. `cache` keys and values [S, H, T, D] a layer, written and read in
    place."""

    def __init__(self, weights: LlamaWeights) -> None:
        self.weights = w = weights
        self._attention = StepAttention(w.inverse_frequencies, w.heads, w.kv_heads, w.head_dim, w.rope_scale)
        every = [part for layer in w.layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        held = {part.precisions if can_tile(part) else () for part in every}
        self.tiled: tuple[int, ...] = held.pop() if len(held) == 1 else ()
        """Where it is not empty, rows can lie in tiles: their precisions, as `DenseMatrix.precisions`."""

    def tile_rows(self, rows: int) -> int:
        """Rows of a tile where `rows` decode together."""
        return tile_rows(rows, self.weights.embedding.shape[1])

    def __call__(
        self, input_ids: Tensor, slots: Tensor, positions: Tensor, segments: Sequence[Segment],
        keys: Sequence[Tensor], values: Sequence[Tensor], longest: int, which: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[n, V] for `input_ids`, `slots`, `positions` int64 [n]; the rows of a precision are a segment;
        `longest` tokens at most a row. With `which` int32 [tiles] rows lie in tiles instead, and tile i is at
        precision tiled[which[i]]."""
        w, n = self.weights, len(input_ids)
        if which is not None:
            return self._layers(input_ids, slots, positions, which, keys, values, longest, split=False)
        segments = [Segment(s.start, n if s.stop is None else s.stop, s.bits) for s in segments]
        weights = [
            weight for layer in w.layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]
        bits = tuple(s.bits for s in segments for _ in range(s.start, cast("int", s.stop)))
        if all(isinstance(weight, CudaMatrix) and weight.fits(bits) for weight in weights):
            return self._fused(input_ids, slots, positions, bits, keys, values, longest)
        split = n <= SPLIT_TOKENS and all(
            isinstance(weight, TritonMatrix) and weight.HAS_DIGITS for weight in weights
        )
        split = split and all(segment.bits in DIGITS_BITS for segment in segments)
        return self._layers(input_ids, slots, positions, segments, keys, values, longest, split)

    def _layers(
        self, input_ids: Tensor, slots: Tensor, positions: Tensor, segments: Sequence[Segment] | Tensor,
        keys: Sequence[Tensor], values: Sequence[Tensor], longest: int, split: bool,
    ) -> Tensor:  # fmt: skip
        w = self.weights
        x = nn.functional.embedding(input_ids, w.embedding)
        delta: Tensor | None = None
        for index, layer in enumerate(w.layers):
            qkv = self._product(layer.qkv, self._norm(x, delta, layer.input_norm, split), segments)
            attended = self._attention(
                qkv, keys[index], values[index], slots, positions, longest, layer.window
            )
            delta = self._product(layer.out, split_activations(attended) if split else attended, segments)
            gated = self._gate_up(
                layer.gate_up, self._norm(x, delta, layer.post_norm, split), segments, split
            )
            delta = self._product(layer.down, gated, segments)
        return self._logits(x, delta)

    def _fused(
        self, input_ids: Tensor, slots: Tensor, positions: Tensor, bits: tuple[int, ...],
        keys: Sequence[Tensor], values: Sequence[Tensor], longest: int,
    ) -> Tensor:  # fmt: skip
        """As `__call__`, row i at precision bits[i], where every layer is a `CudaMatrix` that `fits` them."""
        w = self.weights
        x = nn.functional.embedding(input_ids, w.embedding)
        delta: Tensor | None = None
        for index, layer in enumerate(w.layers):
            matrices = (layer.qkv, layer.out, layer.gate_up, layer.down)
            qkv, out, gate_up, down = cast("tuple[CudaMatrix, ...]", matrices)
            norm = Norm(layer.input_norm, w.epsilon, delta, torch.empty_like(x))
            heads = qkv.multiply_each(x, bits, norm)
            attended = self._attention(
                heads, keys[index], values[index], slots, positions, longest, layer.window
            )
            delta = out.multiply_each(attended, bits)
            x = norm.residual
            norm = Norm(layer.post_norm, w.epsilon, delta, torch.empty_like(x))
            delta = down.multiply_each(gate_up.multiply_each(x, bits, norm, gated=True), bits)
            x = norm.residual
        return self._logits(x, delta)

    def _logits(self, x: Tensor, delta: Tensor | None) -> Tensor:
        last, head = self._norm(x, delta, self.weights.norm, split=False), self.weights.head
        assert isinstance(last, Tensor)
        return nn.functional.linear(last, head) if isinstance(head, Tensor) else head.multiply(last)

    def _product(
        self, weight: Weight, x: Tensor | SplitActivations, segments: Sequence[Segment] | Tensor
    ) -> Tensor:
        if isinstance(segments, Tensor):
            assert isinstance(weight, DenseMatrix)
            assert isinstance(x, Tensor)
            return weight.multiply_tiles(x, segments)
        if isinstance(weight, Dense):
            assert isinstance(x, Tensor)
            return nn.functional.linear(x, weight.weight, weight.bias)
        if isinstance(x, Tensor):
            parts = [weight.multiply(x[s.start : s.stop], s.bits) for s in segments]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        assert isinstance(weight, TritonMatrix)  # else nothing is split
        y = torch.empty(x.tokens, weight.shape[0], dtype=weight.dtype, device=x.digits.device)
        for start, stop, bits in segments:
            assert stop is not None  # given by __call__
            weight.multiply_split(x.narrow(start, stop), bits, y[start:stop])
        return y

    def _gate_up(
        self, weight: Weight, x: Tensor | SplitActivations, segments: Sequence[Segment] | Tensor, split: bool
    ) -> Tensor | SplitActivations:
        """silu(gate) * up, in one launch where the matrix has a kernel for that."""
        if isinstance(weight, CudaMatrix) and isinstance(x, Tensor) and not isinstance(segments, Tensor):
            first, *others = segments
            if not others and weight.gates(len(x), first.bits):
                return weight.multiply_teams(x, first.bits, gated=True)
        return self._gated(self._product(weight, x, segments), split)

    def _norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, split: bool
    ) -> Tensor | SplitActivations:
        """x += delta, in place; the norm of x, split or not."""
        from pmpd.kernels import _triton_kernels as kernels

        out, digits = self._room(x, x.shape[1], split)
        kernels.add_norm_split[(len(x),)](
            x, x if delta is None else delta, weight, out, digits.digits.view(torch.int8), digits.scales[0],
            digits.scales[1],
            self.weights.epsilon, x.shape[1], out.stride(0), digits.stride,
            HAS_DELTA=delta is not None, HAS_OUT=not split, HAS_DIGITS=split, **digits.launch(),
        )  # fmt: skip
        return digits if split else out

    def _room(self, like: Tensor, width: int, split: bool) -> tuple[Tensor, SplitActivations]:
        """Where a stage puts its [n, width]: a plain tensor and digits, of which the one that is not wanted
        has no rows of its own."""
        rows = len(like)
        out = like if split else padded_rows(rows, width, like.dtype, like.device)
        return out, SplitActivations.empty(rows if split else 1, width, like.device)

    def _gated(self, gate_up: Tensor, split: bool) -> Tensor | SplitActivations:
        from pmpd.kernels import _triton_kernels as kernels

        width = gate_up.shape[1] // 2
        out, digits = self._room(gate_up, width, split)
        kernels.silu_split[(len(gate_up),)](
            gate_up, out, digits.digits.view(torch.int8), digits.scales[0], digits.scales[1], width,
            out.stride(0), digits.stride,
            HAS_DIGITS=split, **digits.launch(),
        )  # fmt: skip
        return digits if split else out
