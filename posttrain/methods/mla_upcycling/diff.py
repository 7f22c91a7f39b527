"""What differs between two saved conversions.

    python -m posttrain.methods.mla_upcycling.diff FOLDER FOLDER

The folders are `conversion` outputs of `mla_upcycle`. One line for each difference; exit code 0 for equal plans, 1 for
different ones, 2 for a folder without a plan.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.replay import require


def main(arguments: list[str] | None = None) -> int:
    """Print the differences; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.methods.mla_upcycling.diff", description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    try:
        for folder in (options.first, options.second):
            require(folder)
        from posttrain.methods.mla_upcycling.plan import MlaPlan

        lines = MlaPlan.load(options.first).diff(MlaPlan.load(options.second))
    except (RecipeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines) or "the plans are equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
