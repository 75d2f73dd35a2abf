"""Graphics cards: how much they hold and how fast they compute, from the makers' data sheets; and machines of them.

One table for everybody: what `phi3v plan` can plan for, and the peak that `mfu` is a share of.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from phi3v.base.errors import InputError
from phi3v.base.hardware import available_memory, pick_dtype

GIB = 2**30 / 1e9
"""GB in a GiB: cards are sold, and tell their memory, in the latter; we count in the former."""


class Card(NamedTuple):
    name: str
    """As typed for `--gpu`."""
    memory_gib: float
    """As nvidia-smi tells it."""
    tflops: float
    """Of dense bf16 (fp16 on cards without), accumulated in float32."""
    capability: tuple[int, int]
    """CUDA's compute capability."""
    words: tuple[str, ...]
    """All of them are in what `torch.cuda.get_device_name` calls the card."""

    @property
    def memory_gb(self) -> float:
        return self.memory_gib * GIB

    @property
    def dtype(self) -> torch.dtype:
        """Precision that `--dtype auto` takes: bf16 from Ampere on, else fp16."""
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float16

    @property
    def attention(self) -> str:
        """What `--attention auto` takes: flash attention from Ampere on, else sdpa."""
        return "flash_attention_2" if self.capability >= (8, 0) else "sdpa"


USED = {"flash_attention_2": 0.4, "sdpa": 0.25, "cpu": 0.5}
"""Share of a card's peak that is assumed, by its attention; of a CPU's, as measured. Good trainers of models of this
size reach 45 to 60 % on A100 and H100, the guide's own runs 35 %, and 24 % on V100 (docs/plan.md)."""

# The first whose words are all in a device's name is that device's.
CARDS = (
    Card("B200", 179, 2250, (10, 0), ("B200",)),
    Card("GH200", 95, 989, (9, 0), ("GH200",)),
    Card("H200", 140, 989, (9, 0), ("H200",)),
    Card("H100-PCIe", 79.6, 756, (9, 0), ("H100", "PCIe")),
    Card("H100-NVL", 93.6, 835, (9, 0), ("H100", "NVL")),
    Card("H100", 79.6, 989, (9, 0), ("H100",)),
    Card("A100-40GB", 40, 312, (8, 0), ("A100", "40GB")),
    Card("A100-80GB", 80, 312, (8, 0), ("A100",)),
    Card("L40S", 45, 362, (8, 9), ("L40S",)),
    Card("L40", 45, 181, (8, 9), ("L40",)),
    Card("A40", 45, 150, (8, 6), ("A40",)),
    Card("A30", 24, 165, (8, 0), ("A30",)),
    Card("A10G", 22.5, 70, (8, 6), ("A10G",)),
    Card("A10", 22.5, 125, (8, 6), ("A10",)),
    Card("L4", 22.5, 121, (8, 9), ("L4",)),
    Card("RTX-6000-Ada", 48, 364, (8, 9), ("RTX 6000 Ada",)),
    Card("A6000", 48, 155, (8, 6), ("RTX A6000",)),
    Card("RTX-8000", 48, 130, (7, 5), ("RTX 8000",)),
    Card("5090", 31.8, 210, (12, 0), ("RTX 5090",)),
    Card("4090", 24, 165, (8, 9), ("RTX 4090",)),
    Card("3090", 24, 71, (8, 6), ("RTX 3090",)),
    Card("V100-16GB", 16, 125, (7, 0), ("V100", "16GB")),
    Card("V100-32GB", 32, 125, (7, 0), ("V100",)),
    Card("T4", 15, 65, (7, 5), ("T4",)),
)


def card_of_device(name: str) -> Card | None:
    """The card that torch calls by this name; None if it is not in the table."""
    return next((c for c in CARDS if all(re.search(rf"\b{word}\b", name) for word in c.words)), None)


def find_card(name: str) -> Card:
    """The card somebody means, "A100-80GB" or "nvidia rtx 4090". Raises InputError, naming the nearest."""
    wanted = _plain(name)
    by_name = {_plain(card.name): card for card in CARDS}
    if wanted in by_name:
        return by_name[wanted]
    # "A100" begins several, "V100-32" one.
    begun = [card.name for plain, card in by_name.items() if wanted and plain.startswith(wanted)]
    if len(begun) == 1:
        return by_name[_plain(begun[0])]
    near = begun or [by_name[plain].name for plain in difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"the cards are {', '.join(card.name for card in CARDS)}"
    raise InputError(f"--gpu {name}: no such card: {hint}")


def _plain(name: str) -> str:
    """Without what makers put around it: capitals, hyphens, brands."""
    words = re.sub(r"nvidia|geforce|tesla|quadro|rtx|sxm\d?", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)


# -- the machine -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a run is planned for. All devices are alike."""

    name: str
    card: Card | None
    """None: a CPU."""
    memory_gb: float
    """Of a device."""
    tflops: float | None
    """Of a device at its best; None if unknown."""
    num_gpus: int
    """Of a node; 1 for a CPU."""
    nodes: int
    here: bool
    """Whether that is this machine."""

    @property
    def devices(self) -> int:
        return self.num_gpus * self.nodes

    @property
    def dtype(self) -> torch.dtype:
        return pick_dtype("auto", torch.device("cpu")) if self.card is None else self.card.dtype

    @property
    def attention(self) -> str:
        return "sdpa" if self.card is None else self.card.attention

    @property
    def share_used(self) -> float:
        return USED["cpu" if self.card is None else self.attention]

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        number = f"{self.num_gpus} x " if self.num_gpus > 1 else ""
        return f"{nodes}{number}{self.name}, {self.memory_gb:.0f} GB" + (" each" if self.devices > 1 else "")


def find_hardware(gpu: str | None, num_gpus: int | None, nodes: int) -> Hardware:
    """The cards of that name, else those of this machine, else its CPU."""
    if gpu is not None:
        card = find_card(gpu)
        return Hardware(
            name=card.name,
            card=card,
            memory_gb=card.memory_gb,
            tflops=card.tflops,
            num_gpus=num_gpus or 1,
            nodes=nodes,
            here=False,
        )
    if not torch.cuda.is_available():
        if num_gpus is not None or nodes > 1:
            raise InputError("--num-gpus and --nodes need --gpu: this machine has no GPU to go by")
        return Hardware(
            name=f"CPU with {len(os.sched_getaffinity(0))} cores",
            card=None,
            memory_gb=available_memory() / 1e9,
            tflops=cpu_tflops(pick_dtype("auto", torch.device("cpu"))),
            num_gpus=1,
            nodes=1,
            here=True,
        )
    about = torch.cuda.get_device_properties(0)
    known = card_of_device(about.name)
    memory = about.total_memory / 1e9
    card = Card(about.name, memory / GIB, known.tflops if known else 0.0, (about.major, about.minor), ())
    return Hardware(
        name=about.name,
        card=card,
        memory_gb=memory,
        tflops=known.tflops if known else None,
        num_gpus=num_gpus or torch.cuda.device_count(),
        nodes=nodes,
        here=True,
    )


def cpu_tflops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """What a product of matrices reaches here, in a moment."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started) / 1e12
