"""Fit the scheduler: `pmpd train`, as a script for `ray job submit --working-dir . -- python
jobs/train.py`."""

import sys

from pmpd.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
