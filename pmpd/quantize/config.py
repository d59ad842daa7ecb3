"""What a quantization is asked for. Imports nothing heavy: a command line is read without torch."""

from __future__ import annotations

from dataclasses import dataclass

from pmpd.errors import UserError

MIN_BITS, MAX_BITS = 2, 8
"""Precisions that the format can hold (the same as in `pmpd.kernels.bitplanes`)."""


def check_precisions(seed_bits: int, parent_bits: int) -> None:
    """UserError unless 2 ≤ seed ≤ parent ≤ 8."""
    if not MIN_BITS <= seed_bits <= MAX_BITS or not MIN_BITS <= parent_bits <= MAX_BITS:
        raise UserError(
            f"seed precision {seed_bits}, parent precision {parent_bits}: allowed are {MIN_BITS}..{MAX_BITS}"
        )
    if seed_bits > parent_bits:
        raise UserError(
            f"seed precision {seed_bits} is above parent precision {parent_bits}: the seed is the lowest "
            f"precision, the parent the highest"
        )


@dataclass(frozen=True)
class QuantizeConfig:
    """How one model is quantized."""

    seed_precision: int = 2
    """Lowest precision, in bits (2..8): the weights of each row are clustered at it."""
    parent_precision: int = 4
    """Highest precision, in bits (2..8): each bit from the seed on splits every cluster in two."""
    weighted: bool = True
    """Choose codes and tables for what the layers see on calibration texts; off: all weights of a row count
    alike (no model run needed, far worse below 4 bits)."""
    num_calibration_samples: int = 24
    """Pieces of text on which the inputs of the layers are measured."""
    calibration_length: int = 512
    """Tokens of each piece."""
    tuning_steps: int = 12
    """Steps of tuning the tables of the lowest precision for what the whole model says, each on another piece
    of text of half that length; every higher precision takes half as many as the one below. 0: no tuning."""
    tuning_rate: float = 0.05
    """Highest step size of the tuning, as a share of the errors that quantizing made."""
    seed: int = 0
    """Of the order of the calibration texts."""

    def __post_init__(self) -> None:
        check_precisions(self.seed_precision, self.parent_precision)
        if self.num_calibration_samples < 1:
            raise UserError(f"--num-calibration-samples {self.num_calibration_samples}: give at least 1")
        if self.calibration_length < 2:
            raise UserError(f"--calibration-length {self.calibration_length}: give at least 2 tokens")
        if self.tuning_steps < 0:
            raise UserError(f"--tuning-steps {self.tuning_steps}: give 0 (no tuning) or more")
        if not 0 < self.tuning_rate < 1:
            raise UserError(f"--tuning-rate {self.tuning_rate}: give a rate between 0 and 1, like 0.05")

    @property
    def precisions(self) -> range:
        return range(self.seed_precision, self.parent_precision + 1)
