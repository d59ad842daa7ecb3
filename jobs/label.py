"""Label prompts: `pmpd label`, as a script for `ray job submit --working-dir . -- python jobs/label.py`."""

import sys

from pmpd.cli.main import main

sys.exit(main(["label", *sys.argv[1:]]))
