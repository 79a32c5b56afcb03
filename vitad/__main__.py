"""`python -m vitad` is the command `vitad`."""

import sys

from vitad.cli import main

sys.exit(main())
