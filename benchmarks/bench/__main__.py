"""`python -m benchmarks.bench`, from the root of a checkout; `--help` lists the flags."""

import sys

import tyro
from benchmarks.bench.command import bench

from phi3v.cli import status_of

if __name__ == "__main__":
    sys.exit(status_of(lambda: tyro.cli(bench, prog="python -m benchmarks.bench", config=[tyro.conf.DisallowNone])))
