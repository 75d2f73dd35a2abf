"""phi3v in a job of which one process has trouble: `torchrun ... troubled.py TROUBLE RANK train ...`"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from phi3v.base.errors import InputError
from phi3v.cli import main
from phi3v.packing import pack

if __name__ == "__main__":
    trouble, rank, *words = sys.argv[1:]

    def troubled(path: Any, rules: Any) -> Any:
        if trouble == "hangs":
            time.sleep(600)
        raise InputError(f"{path}: broken for once")

    if os.environ["RANK"] == rank and trouble == "elsewhere":
        os.chdir("/")
    elif os.environ["RANK"] == rank:
        pack.load_image = troubled
    sys.exit(main(words))
