"""Quantize a checkpoint: `pmpd quantize`, as a script for `ray job submit --working-dir . -- python
jobs/quantize.py`."""

import sys

from pmpd.cli.main import main

sys.exit(main(["quantize", *sys.argv[1:]]))
