"""``python -m jaxreg``: the command line."""

import sys

from jaxreg.cli import main

sys.exit(main())
