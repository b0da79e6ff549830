"""``python -m apportion.recipes.bench``: see `apportion.recipes.bench.suite`."""

import sys

from apportion.recipes.bench.suite import main

sys.exit(main())
