"""``python -m rse_fast.cli``, as torchrun starts it."""

import sys

from rse_fast.cli import main

sys.exit(main())
