"""Fine-tunes on the hateful memes: `torchrun --nproc_per_node=4 finetune_hf_trainer_hateful_memes.py --help`."""

import sys

from original import main
from phi3v.cli import status_of

if __name__ == "__main__":
    sys.exit(status_of(lambda: main("hateful_memes")))
