"""`mcrise bench` as an entry point of a cluster job; `python jobs/benchmark.py --help` says more."""

import sys

from mcrise_ray.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]])
