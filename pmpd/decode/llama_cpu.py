"""A lean decode forward for model trees that are recognised exactly: the same arithmetic with fewer, larger
operations.

A decode step of a small model on a CPU is mostly module overhead. For the plain Llama tree (also Mistral's
and Qwen2's, which are the same modules) the forward is written out here: one multiplication for q, k and v,
one for gate and up, fused norms, and, where the dequantized matrices of all precisions fit a budget, weights
in oneDNN's own layout. Where all matrices are in fixed point, a decode step is one call of the native library
(`pmpd.kernels.llama_step`). The generic path through the model's modules stays the truth: tests compare the
two, and anything not recognised takes it.

Legend: n tokens of the flat forward, C hidden size, Hq query heads, H KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from pmpd.decode.slots import SlotCache, TokenPlaces, attend_slots
from pmpd.kernels import pages
from pmpd.kernels.cpu_fixed import ByteMatrix, FixedMatrix
from pmpd.kernels.llama_step import COLUMNS_MULTIPLE, LayerWeights, NativeStep
from pmpd.weights.base import PrecisionLinear, PrecisionState, head_dim
from pmpd.weights.byte_head import ByteHead

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

DENSE_BYTES = 512 << 20
"""Dequantized matrices are kept only where those of all layers and precisions fit in here; larger models
multiply from their codes."""

_TREES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class LeanForward:
    """The written-out forward of one recognised model on a CPU."""

    def __init__(self, model: PreTrainedModel, state: PrecisionState) -> None:
        self.model = model
        self.state = state
        tree, config = model.model, model.config
        self.embedding = tree.embed_tokens.weight
        self.rotary = tree.rotary_emb
        self.norm = tree.norm
        self.head_dim = head_dim(config)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.scaling = tree.layers[0].self_attn.scaling
        self.native = _native_step(self)
        keep = self.native is None and _dense_bytes(model) <= DENSE_BYTES
        # one precision and no codes, so the head alone is worth a second copy in oneDNN's layout (1.1 B
        # model: 7 ms a step instead of 10)
        keep_head = self.native is None and _head_bytes(model) <= DENSE_BYTES
        head = model.lm_head
        self.head = head if isinstance(head, ByteHead) else _Product([head], keep or keep_head)
        self.layers = [
            (
                layer.input_layernorm,
                _Product([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj], keep),
                _window(layer.self_attn),
                _Product([layer.self_attn.o_proj], keep),
                layer.post_attention_layernorm,
                _Product([layer.mlp.gate_proj, layer.mlp.up_proj], keep),
                _Product([layer.mlp.down_proj], keep),
            )
            for layer in tree.layers[: config.num_hidden_layers]
        ]

    def __call__(
        self, input_ids: Tensor, places: TokenPlaces, keep: Tensor | None, cache: SlotCache
    ) -> Tensor:
        """Logits [len(keep), V] (None: of all tokens) of the flat forward `input_ids` int64 [n]."""
        segments, n = self.state.segments, len(input_ids)
        if self.native is not None and not places.stretches and keep is None:
            return self._native(self.native, input_ids, places, cache)
        x = self.embedding[input_ids]  # [n, C]
        cos, sin = (table[0, :, None] for table in self.rotary(x, places.positions[None]))  # [n, 1, D]
        half = self.head_dim // 2
        sin = torch.cat(
            [-sin[..., :half], sin[..., half:]], dim=-1
        )  # rotate_half's sign, once a step instead of twice a layer
        rotated = self.heads + self.kv_heads
        cache.places = places
        for index, (norm, qkv, window, out, post_norm, gate_up, down) in enumerate(self.layers):
            h = qkv(_rms_norm(norm, x), segments).view(n, rotated + self.kv_heads, self.head_dim)
            qk, v = h[:, :rotated], h[:, rotated:]
            qk = torch.addcmul(qk * cos, torch.cat([qk[..., half:], qk[..., :half]], dim=-1), sin)
            keys, values = cache.write(qk[:, self.heads :], v, index)
            attended = attend_slots(places, qk[:, : self.heads], keys, values, self.scaling, window)
            x = x + out(attended.reshape(n, -1), segments)
            gate, up = gate_up(_rms_norm(post_norm, x), segments).chunk(2, dim=-1)
            x = x + down(nn.functional.silu(gate) * up, segments)
        x = _rms_norm(self.norm, x if keep is None else x[keep])
        return self.head(x) if isinstance(self.head, ByteHead) else self.head(x, ())

    def _native(self, step: NativeStep, input_ids: Tensor, places: TokenPlaces, cache: SlotCache) -> Tensor:
        """A decode step: float32 logits [n, V]."""
        some = self.embedding.new_empty(1, 0, dtype=torch.float32)
        cos, sin = (table[0] for table in self.rotary(some, places.positions[None]))  # [n, D]
        like = self.embedding.new_empty(0, self.kv_heads, self.head_dim)
        cache.allocate(len(self.layers) - 1, like, like)
        return step(
            input_ids, places.slots, places.lengths, cos, sin, self.state.segments, cache.keys, cache.values
        )


def _native_step(forward: LeanForward) -> NativeStep | None:
    """The whole step in the native library where every matrix is in fixed point, else None."""
    model = forward.model
    config, tree = model.config, model.model
    sizes = (config.hidden_size, config.intermediate_size, 2 * forward.head_dim)
    if any(size % COLUMNS_MULTIPLE for size in sizes):
        return None
    head = model.lm_head
    if forward.embedding.dtype != torch.bfloat16 or getattr(head, "bias", None) is not None:
        return None
    layers = []
    for layer in tree.layers[: config.num_hidden_layers]:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
        matrices = [
            matrix for linear in linears if isinstance(matrix := getattr(linear, "matrix", None), FixedMatrix)
        ]
        if len(matrices) < len(linears):
            return None
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if any(norm.variance_epsilon != forward.norm.variance_epsilon for norm in norms):
            return None
        layers.append(LayerWeights(norms[0].weight, norms[1].weight, matrices, _window(attention)))
    return NativeStep(
        layers,
        forward.embedding.detach().contiguous(),
        forward.norm.weight,
        cast("ByteMatrix", head.matrix) if isinstance(head, ByteHead) else _in_huge_pages(head.weight),
        forward.heads,
        forward.kv_heads,
        forward.head_dim,
        forward.norm.variance_epsilon,
        forward.scaling,
    )


def recognise(model: PreTrainedModel, state: PrecisionState) -> LeanForward | None:
    """The lean forward where `model` is exactly a tree it knows, on a CPU; else None."""
    if type(model) not in _TREES or next(model.parameters()).device.type != "cpu":
        return None
    if type(model.lm_head) not in (nn.Linear, ByteHead):
        return None
    config = model.config
    if config.hidden_act != "silu" or getattr(config, "pretraining_tp", 1) != 1:
        return None
    for layer in model.model.layers:
        trees = ((layer, _LAYER), (layer.self_attn, _ATTENTION), (layer.mlp, _MLP))
        if any({name for name, _ in module.named_children()} != names for module, names in trees):
            return None
        linears = [
            child
            for name, child in (*layer.self_attn.named_children(), *layer.mlp.named_children())
            if name != "act_fn"
        ]
        if any(
            not isinstance(linear, PrecisionLinear) and type(linear) is not nn.Linear for linear in linears
        ):
            return None
        if type(layer.input_layernorm).__name__ not in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"):
            return None
    return LeanForward(model, state)


class _Product:
    """x times the concatenated outputs of some linear layers, each token at its precision."""

    def __init__(self, linears: Sequence[PrecisionLinear | nn.Linear], keep_dense: bool) -> None:
        self.linears = linears
        self.keep_dense = keep_dense
        self.precise = any(isinstance(linear, PrecisionLinear) for linear in linears)
        self._dense: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, x: Tensor, segments) -> Tensor:
        if not self.precise:
            return self._multiply(x, 0)
        if len(segments) == 1:
            return self._multiply(x, segments[0].bits)
        return torch.cat([self._multiply(x[start:stop], bits) for start, stop, bits in segments])

    def _multiply(self, x: Tensor, bits: int) -> Tensor:
        if not self.keep_dense:
            parts = [
                linear.multiply(x, bits) if isinstance(linear, PrecisionLinear) else linear(x)
                for linear in self.linears
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if bits not in self._dense:
            self._dense[bits] = self._concatenate(bits, x.dtype)
        weight, bias = self._dense[bits]
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return nn.functional.linear(x, weight, bias)

    def _concatenate(self, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        matrices = [
            linear.dequantize(bits) if isinstance(linear, PrecisionLinear) else linear.weight
            for linear in self.linears
        ]
        biases = [
            linear.bias_vector() if isinstance(linear, PrecisionLinear) else linear.bias
            for linear in self.linears
        ]
        weight = torch.cat(matrices).to(dtype).contiguous()
        bias = None
        if any(part is not None for part in biases):
            zeros = [
                weight.new_zeros(len(matrix)) if part is None else part.to(dtype)
                for part, matrix in zip(biases, matrices, strict=True)
            ]
            bias = torch.cat(zeros)
        if _has_own_layout(dtype):
            with torch.no_grad():
                weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return weight, bias


def _has_own_layout(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of `dtype` in a layout of its own on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _rms_norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _window(attention: nn.Module) -> int | None:
    """The layer's sliding window as its own forward would pass it."""
    if hasattr(attention, "sliding_window"):
        return cast("int | None", attention.sliding_window)
    return (
        getattr(attention.config, "sliding_window", None) if "Mistral" in type(attention).__name__ else None
    )


def _in_huge_pages(weight: nn.Parameter) -> Tensor:
    """The values of `weight`, which it shares from now on."""
    if not pages.holds(weight):
        weight.data = pages.moved(weight.data)
    return weight.detach()


def _head_bytes(model: PreTrainedModel) -> int:
    return 0 if isinstance(model.lm_head, ByteHead) else model.lm_head.weight.nbytes


def _dense_bytes(model: PreTrainedModel) -> int:
    """Memory of the dequantized matrices of all precisions, and of the head."""
    total = _head_bytes(model)
    for module in model.model.layers.modules():
        if isinstance(module, PrecisionLinear):
            total += 4 * module.in_features * module.out_features * len(module.precisions)
        elif isinstance(module, nn.Linear):
            total += module.weight.nbytes
    return total
