"""Fine-tunes on UCF101: `torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --help`."""

import sys

from phi3v.cli import status_of
from phi3v.original import main

if __name__ == "__main__":
    sys.exit(status_of(lambda: main("ucf101")))
