"""`python -m pmpd`: the command `pmpd`."""

import sys

from pmpd.cli.main import main

sys.exit(main())
