"""`python -m tunesmith` is the command `tunesmith`."""

from __future__ import annotations

import sys

from tunesmith.cli import main

sys.exit(main())
