"""A lean decode forward for Llama trees on a CUDA device: eleven launches a layer, every one of them fit for a CUDA graph.

Nothing in it depends on values that the host knows: slots and positions are read on the device, so a captured forward replays for any
rows. The generic path through the model's modules stays the truth: tests compare the two, and anything not recognised takes it.

A layer: add + norm + split | q, k, v | rotary + cache write | attention, its join, split | o | add + norm + split | gate, up |
silu + split | down; "split" prepares the activations for the int8 tensor cores (`pmpd.kernels.triton`).

Legend: n tokens of the flat forward (one a row), C hidden size, Hq query heads, H KV heads, D head dim, F intermediate size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from pmpd.kernels.triton import DIGITS_BITS, FUSED_TOKENS, SplitActivations, TritonMatrix, decode_attention, merge, split_activations
from pmpd.weights.base import Segment

Weight = TritonMatrix | Tensor
"""A matrix of several precisions, or an unquantized one [N, K]."""


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
    """What a decoder of the Llama family computes with; `head` [V, C] and `embedding` [V, C] may be one tensor."""

    embedding: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor
    inverse_frequencies: Tensor
    """float32 [D / 2]."""
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    rope_scale: float = 1.0


def llama_weights(model: PreTrainedModel) -> LlamaWeights | None:
    """The weights of a Llama, Mistral or Qwen2 tree on a CUDA device whose linears all multiply with `TritonMatrix`; else None.

    q, k, v and gate, up are merged: the modules' own matrices become views, so the generic path (prefill) goes on working.
    """
    if type(model) not in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM) or type(model.lm_head) is not nn.Linear:
        return None
    config, rotary = model.config, model.model.rotary_emb
    if config.hidden_act != "silu" or rotary.rope_type not in ("default", "llama3", "linear"):
        return None
    layers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        matrices = [[getattr(linear, "matrix", None) for linear in group] for group in groups]
        if not all(isinstance(matrix, TritonMatrix) for group in matrices for matrix in group):
            return None
        try:
            qkv, out, gate_up, down = (
                group[0] if len(group) == 1 else merge(group) for group in cast("list[list[TritonMatrix]]", matrices)
            )
        except ValueError:  # odd numbers of rows
            return None
        window = getattr(attention, "sliding_window", None)
        layers.append(Layer(layer.input_layernorm.weight, qkv, out, layer.post_attention_layernorm.weight, gate_up, down, window))
    return LlamaWeights(
        embedding=model.model.embed_tokens.weight,
        layers=layers,
        norm=model.model.norm.weight,
        head=model.lm_head.weight,
        inverse_frequencies=rotary.inv_freq.float(),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        epsilon=config.rms_norm_eps,
        rope_scale=float(rotary.attention_scaling),
    )


class CudaForward:
    """Logits of one decode forward. `cache` keys and values [S, H, T, D] a layer, written and read in place."""

    def __init__(self, weights: LlamaWeights) -> None:
        self.weights = weights

    def __call__(
        self, input_ids: Tensor, slots: Tensor, positions: Tensor, segments: Sequence[Segment],
        keys: Sequence[Tensor], values: Sequence[Tensor], longest: int,
    ) -> Tensor:  # fmt: skip
        """[n, V] for `input_ids`, `slots`, `positions` int64 [n]; the rows of a precision are a segment; `longest` tokens at most a row."""
        w, n = self.weights, len(input_ids)
        segments = [Segment(s.start, n if s.stop is None else s.stop, s.bits) for s in segments]
        split = n <= FUSED_TOKENS and all(isinstance(layer.qkv, TritonMatrix) for layer in w.layers[:1])
        split = split and all(segment.bits in DIGITS_BITS for segment in segments)
        x = nn.functional.embedding(input_ids, w.embedding)
        delta: Tensor | None = None
        for index, layer in enumerate(w.layers):
            qkv = self._product(layer.qkv, self._norm(x, delta, layer.input_norm, split), segments)
            q = self._rotate_write(qkv, slots, positions, keys[index], values[index])
            attended = decode_attention(q, keys[index], values[index], slots, positions, w.head_dim**-0.5, layer.window, longest, extra=1)
            attended = attended.view(n, -1)
            delta = self._product(layer.out, split_activations(attended) if split else attended, segments)
            gate_up = self._product(layer.gate_up, self._norm(x, delta, layer.post_norm, split), segments)
            delta = self._product(layer.down, self._gated(gate_up, split), segments)
        last = self._norm(x, delta, w.norm, split=False)
        assert isinstance(last, Tensor)
        return nn.functional.linear(last, w.head)

    def _product(self, weight: Weight, x: Tensor | SplitActivations, segments: Sequence[Segment]) -> Tensor:
        if isinstance(weight, Tensor):
            assert isinstance(x, Tensor)
            return nn.functional.linear(x, weight)
        if isinstance(x, Tensor):
            parts = [weight.multiply(x[s.start : s.stop], s.bits) for s in segments]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        y = torch.empty(x.tokens, weight.shape[0], dtype=weight.dtype, device=x.digits.device)
        for start, stop, bits in segments:
            assert stop is not None  # given by __call__
            weight.multiply_split(x.narrow(start, stop), bits, y[start:stop])
        return y

    def _norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, split: bool) -> Tensor | SplitActivations:
        """x += delta, in place; the norm of x, split or not."""
        from pmpd.kernels import _triton_kernels as kernels

        n, width = x.shape
        digits = SplitActivations.empty(n if split else 1, width, x.device)
        out = x if split else torch.empty_like(x)
        launch = digits.launch() if split else {"BLOCK": 1 << (width - 1).bit_length(), "num_warps": 8}
        kernels.add_norm_split[(n,)](
            x, x if delta is None else delta, weight, out, digits.digits.view(torch.int8), digits.scales[0], digits.scales[1],
            self.weights.epsilon, width, digits.stride,
            HAS_DELTA=delta is not None, HAS_OUT=not split, HAS_DIGITS=split, **launch,
        )  # fmt: skip
        return digits if split else out

    def _rotate_write(self, qkv: Tensor, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from pmpd.kernels import _triton_kernels as kernels

        w, n = self.weights, len(slots)
        q = torch.empty(n, w.heads, w.head_dim, dtype=qkv.dtype, device=qkv.device)
        half = w.head_dim // 2
        kernels.rotate_write[(n, w.heads + 2 * w.kv_heads)](
            qkv, w.inverse_frequencies, positions, slots, q, keys, values, w.rope_scale,
            *keys.stride()[:3], *values.stride()[:3],
            HEADS=w.heads, KV_HEADS=w.kv_heads, HALF=half, HALF_PADDED=1 << (half - 1).bit_length(), num_warps=1,
        )  # fmt: skip
        return q

    def _gated(self, gate_up: Tensor, split: bool) -> Tensor | SplitActivations:
        from pmpd.kernels import _triton_kernels as kernels

        width = gate_up.shape[1] // 2
        if not split:
            return nn.functional.silu(gate_up[:, :width]) * gate_up[:, width:]
        digits = SplitActivations.empty(len(gate_up), width, gate_up.device)
        kernels.silu_split[(len(gate_up),)](
            gate_up, digits.digits.view(torch.int8), digits.scales[0], digits.scales[1], width, digits.stride, **digits.launch()
        )
        return digits
