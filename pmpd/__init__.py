"""Progressive mixed-precision decoding (PMPD, ICLR 2025): model, schedulers, and the farm that labels and evaluates them."""

from pmpd.model import PMPDForCausalLM
from pmpd.schedulers import Scheduler

__all__ = ["PMPDForCausalLM", "Scheduler"]
__version__ = "0.1.0"
