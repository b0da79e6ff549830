"""Runs every benchmark and writes its figures to results/: ``python -m apportion.recipes.bench``.

Times are shares within one run, medians of several; memory is counted in bytes and is the same in every run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apportion.recipes import bench_entries, bench_memory, bench_overhead


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the memory bars, the overhead of the callback's hooks, the bars of single entries; 1 if one is missed.

    Args:
        arguments: Command line: ``--out FOLDER``, by default results/.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return max([bench_memory.main(given), bench_overhead.main(given), bench_entries.main(given)])


if __name__ == "__main__":
    sys.exit(main())
