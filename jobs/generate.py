"""Answer a benchmark: `pmpd generate`, as a script for `ray job submit --working-dir . -- python
jobs/generate.py`."""

import sys

from pmpd.cli.main import main

sys.exit(main(["generate", *sys.argv[1:]]))
