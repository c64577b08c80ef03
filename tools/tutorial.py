"""The main job, `make tutorial`: slides, features, training, tables, figures and executed notebooks.

Every step keeps what it made, in the cache (`HDMIL_CACHE`) or in `build/` (`HDMIL_BUILD`): run it again
after an interruption and it goes on from there. `HDMIL_FAST=1` makes everything smaller. Seconds and peak
memory of each step are added to `build/timing.json`.
"""

import sys


def main() -> int:
    # Worker processes import this file again: the steps are imported here, so that workers start fast.
    import matplotlib
    import tutorial_steps

    import hdmil_lib
    from hdmil_lib.errors import HDMILError

    matplotlib.use("Agg")
    try:
        tutorial_steps.run(hdmil_lib.setup(seed=0))
    except HDMILError as error:
        print(f"\nerror: {error}\nRun the same command again: finished steps are kept.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
