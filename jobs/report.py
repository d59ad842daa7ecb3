"""Score answers and write the report: `pmpd report`, as a script for `ray job submit --working-dir . --
python jobs/report.py`."""

import sys

from pmpd.cli.main import main

sys.exit(main(["report", *sys.argv[1:]]))
