"""The embedded default: a tiny trained Llama, its Any-Precision checkpoint, and texts of the Python
installation."""

from pathlib import Path

DENSE = Path(__file__).parent / "model"
"""The unquantized demo model (float16 safetensors, config and tokenizer)."""

ANYPREC = Path(__file__).parent / "anyprec"
"""The same model in the Any-Precision format, precisions 2 to 4."""
