"""The lean CUDA forward against transformers' own modules: on the GPU where there is one, else in Triton's
interpreter."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pmpd.decode import llama_cuda
from pmpd.decode.llama_cuda import CudaForward, Dense, Layer, LlamaWeights, Several, Weight
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.byte_rows import byte_rows
from pmpd.kernels.cuda.matrix import CudaMatrix
from pmpd.kernels.reference import ReferenceMatrix
from pmpd.kernels.triton import TritonMatrix, merge
from pmpd.kernels.triton_bytes import TritonByteMatrix
from pmpd.weights.base import Segment
from tests.host_kernel import COMPILER, stand_in, stand_in_teams
from tests.test_kernels_triton import (
    DEVICE,
    TOLERANCE,
    activations,
    error,
    expected_product,
    interpreter_only_here,
    packed_weights,
)

pytestmark = interpreter_only_here
HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE, VOCABULARY = 32, 2, 1, 16, 32, 40


def small_model(layers: int, dtype: torch.dtype) -> tuple[LlamaForCausalLM, list[dict[str, PackedWeights]]]:
    """A Llama of random quantized layers: transformers' modules (weights of 4 bits for now) and the packed
    weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        intermediate_size=INTERMEDIATE, vocab_size=VOCABULARY, max_position_embeddings=64,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE, dtype).eval()
    shapes = {
        "q_proj": (HEADS * DIM, HIDDEN),
        "k_proj": (KV_HEADS * DIM, HIDDEN),
        "v_proj": (KV_HEADS * DIM, HIDDEN),
        "o_proj": (HIDDEN, HEADS * DIM),
    }
    shapes |= {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    packed = [
        {
            name: packed_weights(*shape, (2, 3, 4), seed=10 * index + i)
            for i, (name, shape) in enumerate(shapes.items())
        }
        for index in range(layers)
    ]
    return model, packed


def set_precision(model: LlamaForCausalLM, packed: list[dict[str, PackedWeights]], bits: int) -> None:
    for layer, weights in zip(model.model.layers, packed, strict=True):
        for name, weight in weights.items():
            linear = getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name)
            linear.weight.data = ReferenceMatrix(weight, linear.weight.dtype).dequantize(bits)


def lean(
    model: LlamaForCausalLM,
    packed: list[dict[str, PackedWeights]],
    dtype: torch.dtype,
    matrix: type[TritonMatrix] = TritonMatrix,
) -> CudaForward:
    def product(*parts: PackedWeights) -> Weight:
        matrices = [matrix(part, dtype) for part in parts]
        return merge(matrices) if len(matrices) > 1 else matrices[0]

    layers = [
        Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=product(w["q_proj"], w["k_proj"], w["v_proj"]),
            out=product(w["o_proj"]),
            post_norm=layer.post_attention_layernorm.weight,
            gate_up=product(w["gate_proj"], w["up_proj"]),
            down=product(w["down_proj"]),
        )
        for layer, w in zip(model.model.layers, packed, strict=True)
    ]
    rotary = model.model.rotary_emb
    return CudaForward(
        LlamaWeights(
            model.model.embed_tokens.weight, layers, model.model.norm.weight, model.lm_head.weight,
            rotary.inv_freq, HEADS, KV_HEADS, DIM,
            model.config.rms_norm_eps,
        )
    )  # fmt: skip


def check_replays(matrix: type[TritonMatrix]) -> None:
    """On a GPU: a step of two rows over eight layers and hundreds of cached tokens, with a head of bytes, as
    a graph, against itself."""
    model, packed = small_model(layers=8, dtype=torch.float16)
    forward = lean(model, packed, torch.float16, matrix)
    forward.weights.head = TritonByteMatrix(byte_rows(model.lm_head.weight))
    caches = [activations(3, KV_HEADS, 1024, DIM, seed=seed) for seed in range(16)]
    tokens, slots = torch.tensor([5, 7], device=DEVICE), torch.tensor([2, 0], device=DEVICE)
    at = torch.tensor([700, 3], device=DEVICE)

    def step() -> torch.Tensor:
        segments = [Segment(0, 1, 3), Segment(1, None, 4)]
        return forward(tokens, slots, at, segments, caches[:8], caches[8:], 1024)

    eager = step()
    assert eager.isfinite().all()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        logits.fill_(float("nan"))
        graph.replay()
        different += (logits != eager).any()
    assert different.item() == 0, "launches overlap wrongly"


@pytest.mark.soak
@torch.no_grad()
def test_each_row_decodes_at_its_own_precision_position_and_slot_as_transformers_does(monkeypatch):
    """Two steps by the plain products (any precision), the third by digits: they share all but the
    products."""
    model, packed = small_model(layers=1, dtype=torch.float32)
    forward = lean(model, packed, torch.float32)
    keys, values = ([torch.zeros(4, KV_HEADS, 16, DIM, device=DEVICE)] for _ in range(2))
    tokens = torch.randint(0, VOCABULARY, (2, 3), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    slots, bits = torch.tensor([2, 0], device=DEVICE), (4, 3)
    segments = [Segment(0, 1, 4), Segment(1, None, 3)]
    for position in range(3):
        monkeypatch.setattr(llama_cuda, "DIGITS_BITS", (2, 3, 4) if position == 2 else ())
        logits = forward(
            tokens[:, position], slots, torch.full((2,), position, device=DEVICE), segments, keys, values, 16
        )
    for row in range(2):
        set_precision(model, packed, bits[row])
        expected = model(tokens[row : row + 1]).logits[0, -1]
        assert error(logits[row], expected) < 2e-3, f"row {row} at {bits[row]} bits"
    assert not keys[0][[1, 3]].any(), "a slot that is not in the forward was written"


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@torch.no_grad()
def test_two_rows_of_two_precisions_share_the_launches_of_a_fused_step(monkeypatch, tmp_path):
    """The step of `pmpd.kernels.cuda`: norm and silu within the products, against transformers' modules."""
    launched = stand_in(monkeypatch, tmp_path) if DEVICE.type == "cpu" else None
    model, packed = small_model(layers=2, dtype=torch.float16)
    forward = lean(model, packed, torch.float16, CudaMatrix)
    shape = (3, KV_HEADS, 16, DIM)
    keys, values = ([torch.zeros(shape, device=DEVICE).half() for _ in range(2)] for _ in range(2))
    tokens = torch.randint(0, VOCABULARY, (2, 2), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    slots, bits = torch.tensor([2, 0], device=DEVICE), (3, 4)  # the higher precision second
    segments = [Segment(0, 1, 3), Segment(1, None, 4)]
    for position in range(2):
        at = torch.full((2,), position, device=DEVICE)
        logits = forward(tokens[:, position], slots, at, segments, keys, values, 16)
    for row in range(2):
        set_precision(model, packed, bits[row])
        expected = model.float()(tokens[row : row + 1]).logits[0, -1]
        model.half()
        assert error(logits[row], expected) < 1e-2, f"row {row} at {bits[row]} bits"
    assert not keys[0][1].any(), "a slot that is not in the forward was written"
    if launched is not None:
        assert len(launched) == 2 * 2 * 4, "four products a layer and step"
        assert sum("NORM, GATED" in name for name in launched) == 4


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@torch.no_grad()
def test_rows_of_one_precision_have_silu_within_the_product_of_teams(monkeypatch, tmp_path):
    if DEVICE.type != "cpu":
        pytest.skip("a stand-in for the GPU")
    launched = stand_in_teams(monkeypatch, tmp_path)
    model, packed = small_model(layers=1, dtype=torch.float16)
    forward = lean(model, packed, torch.float16, CudaMatrix)
    keys, values = ([torch.zeros(3, KV_HEADS, 16, DIM).half()] for _ in range(2))
    tokens, at = torch.tensor([3, 11, 5]), torch.zeros(3, dtype=torch.int64)
    logits = forward(tokens, torch.tensor([2, 0, 1]), at, [Segment(0, None, 3)], keys, values, 16)
    set_precision(model, packed, 3)
    for row in range(3):
        expected = model.float()(tokens[row : row + 1, None]).logits[0, -1]
        model.half()
        assert error(logits[row], expected) < 1e-2, f"row {row}"
    assert ["GATED" in name for name in launched] == [False, False, True, False]


def test_merged_layers_are_views_and_multiply_as_before():
    parts = [packed_weights(rows, 64, (2, 3), bias=rows == 16, seed=rows) for rows in (32, 16, 40)]
    matrices = [TritonMatrix(part, torch.float32) for part in parts]
    whole = merge(matrices)
    x = activations(1, 64, dtype=torch.float32)
    expected = [expected_product(part, x, 3) for part in parts]
    assert error(whole.multiply(x, 3, "fused"), torch.cat(expected, 1)) < 1e-5
    for matrix, product in zip(matrices, expected, strict=True):
        assert error(matrix.multiply(x, 3, "fused"), product) < 1e-5
        assert (
            matrix._tiles.planes.untyped_storage().data_ptr()
            == whole._tiles.planes.untyped_storage().data_ptr()
        )
    assert error(matrices[1].multiply(x, 3, "digits"), expected[1]) < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="multiples of 16"):
        merge([matrices[2], matrices[0]])


@pytest.mark.parametrize("head_bits", [16, 8])
@torch.no_grad()
def test_precisions_without_digits_and_unquantized_weights_take_the_same_forward(head_bits):
    dtype = torch.float32 if head_bits == 16 else torch.float16
    model, _ = small_model(layers=1, dtype=dtype)
    head: torch.Tensor | TritonByteMatrix = model.lm_head.weight
    if head_bits == 8:
        head = TritonByteMatrix(byte_rows(model.lm_head.weight))
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    dense = Layer(
        layer.input_layernorm.weight, Dense(qkv), Several([attention.o_proj]),
        layer.post_attention_layernorm.weight, Dense(gate_up),
        Dense(mlp.down_proj.weight),
    )  # fmt: skip
    forward = CudaForward(
        LlamaWeights(
            model.model.embed_tokens.weight, [dense], model.model.norm.weight, head,
            model.model.rotary_emb.inv_freq,
            HEADS, KV_HEADS, DIM, model.config.rms_norm_eps,
        )
    )  # fmt: skip
    keys, values = ([torch.zeros(2, KV_HEADS, 16, DIM, device=DEVICE, dtype=dtype)] for _ in range(2))
    tokens = torch.tensor([5, 7], device=DEVICE)
    for position in range(2):
        logits = forward(tokens[position : position + 1], torch.tensor([1], device=DEVICE),
        torch.tensor([position], device=DEVICE),
                         [Segment(0, None, 16)], keys, values, 16)  # fmt: skip
    if isinstance(head, TritonByteMatrix):
        model.float().lm_head.weight.data = head.rows.dequantize()
    assert error(logits[0], model(tokens[None]).logits[0, -1]) < (1e-5 if head_bits == 16 else 3e-3)
