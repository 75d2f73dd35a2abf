"""Makes jsonl and frames of UCF101: `python convert_ucf101.py --out_dir DIR`; `--help` shows all flags."""

import os
import sys
from functools import partial
from pathlib import Path

import tyro

from phi3v.cli import status_of
from phi3v.recipes.ucf101 import convert

if __name__ == "__main__":
    if root := os.environ.get("PHI3V_DATA"):  # a folder with the data sets as they were downloaded
        convert = partial(convert, archive=Path(root) / "ucf101")
    sys.exit(status_of(lambda: tyro.cli(convert, use_underscores=True, config=[tyro.conf.DisallowNone])))
