"""`python -m ldm` is the command `ldm`."""

import sys

from ldm.cli import main

sys.exit(main())
