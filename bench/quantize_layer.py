"""Where `pmpd quantize` spends its time on one decoder layer: seconds of each part, for random weights of a
Llama's shape.

    python -m bench.quantize_layer --model 8B --name quantize_layer_h200

Linears that share an input are one matrix, as in `pmpd quantize`. What a part takes the first time (capturing
graphs, compiling) is beside what it takes from then on. Times the layers (and, of moments and tuning, the
pieces of text and the steps of the default settings) that is what a whole model takes, but for reading,
writing, embeddings, attention and the unquantized model's runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from bench import _record
from bench.decode import SHAPES
from pmpd import gpu
from pmpd.kernels import bitplanes
from pmpd.quantize import feedback
from pmpd.quantize.config import QuantizeConfig
from pmpd.quantize.kmeans import QuantizedRows, quantize_rows
from pmpd.quantize.moments import InputMoments, add_input_moments
from pmpd.quantize.tuning import TunedLinear, basis
from pmpd.weights.base import compute_dtype

SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PIECES = 8
"""Of text, of which the moments are timed."""


@dataclass(frozen=True)
class Options:
    model: str = "8B"
    """135M, 1.1B or 8B."""
    rounds: int = 2
    """Times that the layer is quantized: the first is told apart."""
    name: str | None = None
    """Write bench/results/NAME.json."""


class Layer(nn.Module):
    """A linear layer as a model that is run on nothing but given inputs."""

    def __init__(self, linear: nn.Linear, pieces_STK: Tensor) -> None:
        super().__init__()
        self.linear, self.pieces, self.device = linear, pieces_STK, pieces_STK.device

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.linear(self.pieces[int(input_ids[0, 0])])


class Parts:
    """Seconds by part of a round."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        watch = gpu.Stopwatch(self.device)
        result = work()
        self.seconds[part] += watch.stop()()
        return result


def one_matrix(parts: Parts, n: int, k: int, blocks: feedback.StepGraphs, generator: torch.Generator) -> None:
    """All that is done to a matrix [n, k] of random weights."""
    config, device = QuantizeConfig(), parts.device
    precisions = config.precisions
    seed, parent = config.seed_precision, config.parent_precision
    linear = nn.Linear(k, n, bias=False, device=device, dtype=compute_dtype(device)).requires_grad_(False)
    linear.weight.normal_(0, 0.02, generator=generator)
    pieces = torch.randn(PIECES, config.calibration_length, k, device=device, generator=generator)
    pieces = pieces.to(linear.weight.dtype)
    moments, model, numbers = InputMoments(), Layer(linear, pieces), torch.arange(PIECES).unsqueeze(1)
    parts.timed("moments", lambda: add_input_moments(model, ["linear"], numbers, moments))  # type: ignore[arg-type]
    weight = linear.weight.float()
    hessian = feedback.damped(moments.of("linear"))
    importance = hessian.diagonal().float().expand(n, k)
    rows = parts.timed(
        "k-means", lambda: quantize_rows(weight, importance, seed, parent, feedback.SEED_CANDIDATES)
    )
    factor = parts.timed("factor", lambda: feedback.error_factor(hessian))
    codes = parts.timed("codes", lambda: feedback.choose_codes(weight, factor, rows.tables, blocks))
    chosen = QuantizedRows(codes, rows.tables)
    fitted, metric = parts.timed("tables", lambda: feedback.refit_tables(weight, hessian, chosen))
    parts.timed("packing", lambda: bitplanes.pack(codes, parent))
    parts.timed("bases", lambda: [basis(metric, bits) for bits in precisions])
    tuned, x = TunedLinear(linear, fitted), pieces[:1, : config.calibration_length // 2].requires_grad_(True)
    for bits in precisions:
        tuned.bits = bits
        tuned.tables[bits].requires_grad_(True)
        parts.timed(f"tuning, {bits} bits", lambda: tuned(x).sum().backward())


def main(options: Options) -> dict[str, Any]:
    device = torch.device("cuda" if gpu.available() else "cpu")
    shape, config = SHAPES[options.model], QuantizeConfig()
    blocks = feedback.block_steps(config.precisions, device)
    rounds = []
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(options.rounds):
        parts = Parts(device)
        for names in SHARED:
            sizes = [size for name, size in shape.linears().items() if name.split(".")[-1] in names]
            one_matrix(parts, sum(n for n, _ in sizes), sizes[0][1], blocks, generator)
        rounds.append({part: round(seconds, 4) for part, seconds in parts.seconds.items()})
        print(rounds[-1], flush=True)
    later = rounds[-1]
    times: dict[str, float] = defaultdict(lambda: 1.0)
    times["moments"] = config.num_calibration_samples / PIECES
    for bits in config.precisions:
        times[f"tuning, {bits} bits"] = -(-config.tuning_steps // 2 ** (bits - config.seed_precision))
    layers = shape.num_hidden_layers
    whole = {part: round(layers * times[part] * seconds, 1) for part, seconds in later.items()}
    results = {
        "model": options.model,
        "graphs": blocks.why_eager or "captured",
        "first_round": rounds[0],
        "last_round": later,
        "seconds_of_the_model": {**whole, "all": round(sum(whole.values()), 1)},
    }
    print(results)
    if options.name is not None:
        print(_record.write(options.name, results, device.type))
    return results


if __name__ == "__main__":
    main(tyro.cli(Options))
