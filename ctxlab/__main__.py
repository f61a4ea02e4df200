"""`python -m ctxlab`: the same as the `ctxlab` command."""

from __future__ import annotations

import sys

from ctxlab.cli.main import main

sys.exit(main())
