"""Explain a data set on the cluster that this runs in: `python explain_dataset.py job.yaml`.

For clusters that start a script of their own accord, such as KubeRay's RayJob; from outside use
`mcrise submit`. `--retry-errors` tries images again that have an error row.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int | str:
    """Run the job file named; returns the exit code, or how this is used."""
    files = [argument for argument in arguments if argument != "--retry-errors"]
    if len(files) != 1:
        return "usage: python explain_dataset.py JOB_FILE [--retry-errors]"

    from mcrise_ray.driver import run_here

    return run_here(files[0], retry_errors=len(files) < len(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
