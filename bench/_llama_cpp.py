"""llama.cpp as a peer: GGUF files of random weights in the shape of `bench._random_llama`, and what a step
takes.

Block contents are random bytes with small scales: what they are does not change what a product costs.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from bench._random_llama import Shape

MIXES = {4: ("Q4_K", "Q4_0"), 3: ("Q3_K",), 2: ("Q2_K",)}
"""Width -> the formats of llama.cpp that are nearest."""

HEADS = {16: ("F16",), 8: ("Q8_0", "Q6_K")}
"""Head width -> formats; Q6_K is what llama.cpp's own mixes have there."""

_HALF_FIELDS = {
    "Q4_K": (0, 2), "Q4_0": (0,), "Q3_K": (108,), "Q2_K": (80, 82), "Q8_0": (0,), "Q6_K": (208,)
}  # fmt: skip
"""Byte offsets of the float16 scales of a block."""


def missing() -> str | None:
    """None where the peer can be measured, else what is missing."""
    lacking = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"{', '.join(lacking)} missing: CMAKE_ARGS=-DGGML_NATIVE=ON pip install gguf llama-cpp-python "
        "(built from source), into this environment or into a folder that PYTHONPATH names"
    )


def build() -> str:
    """Version, and what the library was built with."""
    import llama_cpp

    features = llama_cpp.llama_print_system_info().decode().strip(" |")
    return f"llama-cpp-python {llama_cpp.__version__}; {features}"


def write(path: Path, shape: Shape, kind: str, head: str) -> None:
    """A model whose layers are `kind` and whose head is `head`."""
    import gguf

    random = np.random.Generator(np.random.SFC64(0))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_attention_heads)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        if kind == "F16":
            values = (0.02 * random.standard_normal((rows, columns), dtype=np.float32)).astype(np.float16)
            writer.add_tensor(name, values)
            return
        dtype = getattr(gguf.GGMLQuantizationType, kind)
        block, size = gguf.GGML_QUANT_SIZES[dtype]
        data = random.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
        for offset in _HALF_FIELDS[kind]:
            data[:, offset : offset + 2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=dtype)

    def add_ones(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.hidden_size, np.float32))

    add("token_embd.weight", shape.vocab_size, shape.hidden_size, "F16")
    add("output.weight", shape.vocab_size, shape.hidden_size, head)
    add_ones("output_norm.weight")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for index in range(shape.num_hidden_layers):
        add_ones(f"blk.{index}.attn_norm.weight")
        add_ones(f"blk.{index}.ffn_norm.weight")
        for module, (rows, columns) in shape.linears().items():
            add(f"blk.{index}.{names[module]}.weight", rows, columns, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """One loaded model."""

    def __init__(self, path: Path, threads: int, rows: int, length: int) -> None:
        import llama_cpp as api

        self.api: Any = api
        api.llama_backend_init()
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = (
            rows * length,
            512,
            512,
            rows,
        )
        settings.n_threads = settings.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.batch = api.llama_batch_init(512, 0, 1)

    def forward(self, tokens: list[int], rows: list[int], positions: list[int], keep: bool) -> None:
        """One decode call; `keep`: logits of every token, else of the last only."""
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, positions[i]
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, rows[i]
            self.batch.logits[i] = keep or i == len(tokens) - 1
        self.batch.n_tokens = len(tokens)
        if self.api.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        self.api.llama_synchronize(self.context)

    def clear(self) -> None:
        """Forgets all rows."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
