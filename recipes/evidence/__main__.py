"""``python -m apportion.recipes.evidence``: see `apportion.recipes.evidence.cli`."""

import sys

from apportion.recipes.evidence.cli import main

sys.exit(main())
