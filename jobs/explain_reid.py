"""Explain ReID queries on the cluster that this runs in: `python explain_reid.py market1501.yaml`.

For clusters that start a script of their own accord, such as KubeRay's RayJob; from outside use
`mcrise submit`.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int | str:
    """Run the ReID job file named; returns the exit code, or how this is used."""
    if len(arguments) != 1:
        return "usage: python explain_reid.py JOB_FILE"

    from mcrise_ray.driver import run_here
    from mcrise_ray.errors import MCRiseError
    from mcrise_ray.jobfiles import load_job

    try:
        kind = load_job(arguments[0]).kind
    except MCRiseError as error:
        return f"error: {error}"
    if kind != "reid":
        return f"error: {arguments[0]}: expected a job of kind reid, found {kind}; see explain_dataset.py"
    return run_here(arguments[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
