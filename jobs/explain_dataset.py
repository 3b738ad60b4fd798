"""Explain a data set on the cluster that this runs in: `python explain_dataset.py job.yaml`.

For clusters that start a script of their own accord, such as KubeRay's RayJob; from outside use
`mcrise submit`.
"""

from __future__ import annotations

import sys

from mcrise_ray.driver import run_here

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python explain_dataset.py JOB_FILE")
    sys.exit(run_here(sys.argv[1]))
