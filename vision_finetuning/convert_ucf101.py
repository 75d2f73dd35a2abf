"""Makes jsonl and frames of UCF101: `python convert_ucf101.py --out_dir DIR`; `--help` shows all flags."""

import sys

import tyro

from phi3v.cli import status_of
from phi3v.recipes.ucf101 import convert

if __name__ == "__main__":
    sys.exit(status_of(lambda: tyro.cli(convert, use_underscores=True)))
