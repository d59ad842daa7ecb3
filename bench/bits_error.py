"""What the 16-bit fixed point of the CUDA kernel costs on a model's own activations, and what a head of 8
bits costs beside 16-bit activations, computed on a CPU.

`python -m bench.bits_error` forwards texts through every layer in float32: with exact products, with a head
that holds the values of 8 bits, and with the activations that the kernel's fixed point stands for. It prints
the errors of the products against float64 and the perplexities. `--model-path smollm2/anyprec --dataset
texts.jsonl` for another model.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from bench import _record
from bench.fixed_point import loss_of, parsed
from pmpd import PMPDForCausalLM
from pmpd.evaluation.perplexity import token_stream
from pmpd.kernels import dispatch
from pmpd.kernels.base import PackedWeights
from pmpd.kernels.byte_rows import byte_rows
from pmpd.kernels.cuda.cut import cut
from pmpd.kernels.cuda.emulation import represented
from pmpd.kernels.reference import ReferenceMatrix
from pmpd.labeling.prompts import PromptConfig, records

NAME = "fixed point of the CUDA kernel"
ERRORS: dict[int, list[float]] = {}
"""By precision: of each product of each layer, a token at a time."""


class RoundedMatrix(ReferenceMatrix):
    """The reference on activations as the kernel holds them; notes each error."""

    def multiply(self, x: Tensor, bits: int) -> Tensor:
        weight = self.dequantize(bits).double()
        x_MK = x.reshape(-1, self.shape[1])
        made = cut(*self.shape, (bits,))
        assert made is not None
        exact, y = x_MK.double() @ weight.T, represented(x_MK, made).double() @ weight.T
        ERRORS.setdefault(bits, []).extend(((y - exact).norm(dim=1) / exact.norm(dim=1)).tolist())
        if self._bias is not None:
            y = y + self._bias.double()
        return y.to(x.dtype).view(*x.shape[:-1], self.shape[0])


def build(packed: PackedWeights, dtype: torch.dtype) -> RoundedMatrix:
    return RoundedMatrix(packed, dtype)


@torch.inference_mode()
def main() -> None:
    options = parsed(__doc__, rows=4, tokens=64)
    dispatch.register(NAME, dispatch.Kernel(lambda device, dtype: None, build))
    losses: dict[str, dict[int, float]] = {}
    tokens_RT = None
    for kernel in ("reference", NAME):
        model = PMPDForCausalLM(options.model_path, dtype=torch.float32, kernel=kernel).eval()
        if tokens_RT is None:
            source = PromptConfig(options.dataset, None, options.split)
            texts = (text for _, text, problem in records(source) if problem is None)
            size = options.rows * options.tokens
            tokens_RT = token_stream(texts, model.tokenizer, size).view(options.rows, options.tokens)
        losses[kernel] = {bits: loss_of(model, kernel, bits, tokens_RT) for bits in model.precisions}
        if kernel == "reference":
            head = model.model.lm_head
            head.weight = torch.nn.Parameter(byte_rows(head.weight).dequantize().float(), requires_grad=False)
            losses["head"] = {bits: loss_of(model, kernel, bits, tokens_RT) for bits in model.precisions}
    figures = []
    for bits, errors in ERRORS.items():
        found = torch.tensor(errors, dtype=torch.float64)
        before, after, head = losses["reference"][bits], losses[NAME][bits], losses["head"][bits]
        figures.append(
            {
                "bits": bits,
                "products": len(errors),
                "median_error": float(found.median()),
                "worst_error": float(found.max()),
                "perplexity": math.exp(before),
                "change_percent": 100 * (math.exp(after - before) - 1),
                "head_of_8_bits_change_percent": 100 * (math.exp(head - before) - 1),
            }
        )
        print(
            f"{bits} bits: {len(errors)} products, error median {found.median():.1e}, worst "
            f"{found.max():.1e}; perplexity {math.exp(before):.3f}, {figures[-1]['change_percent']:+.3f} %, "
            f"a head of 8 bits {figures[-1]['head_of_8_bits_change_percent']:+.3f} %",
            flush=True,
        )
    result = {"model": Path(options.model_path).name, "rows": options.rows, "tokens": options.tokens}
    print(_record.write("bits_error", result | {"figures": figures}, folder=options.out))


if __name__ == "__main__":
    main()
