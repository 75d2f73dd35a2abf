"""The GPUs that a run is planned for: cards by name, or those of this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from phi3v.base.cards import Card, card_of_device, find_card, load_cards
from phi3v.base.errors import InputError
from phi3v.train.memory import CONTEXT_GB, MEMORY_TO_USE

UTILIZATION = {"flash_attention_2": 0.4, "sdpa": 0.25}
"""Fraction of the peak that training is assumed to reach, by attention backend. Good trainers of models of this size
reach 45 to 60 % on A100 and H100, the guide's runs 35 %, and 24 % on V100 (docs/plan.md)."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One or several nodes, each with the same number of equal GPUs."""

    card: Card
    num_gpus: int
    """GPUs per node."""
    nodes: int
    here: bool = False
    """Whether these are the GPUs of this machine."""

    @property
    def devices(self) -> int:
        return self.num_gpus * self.nodes

    @property
    def budget_gb(self) -> float:
        """The memory of one GPU that an estimate may fill."""
        return MEMORY_TO_USE * (self.card.memory_gb - CONTEXT_GB)

    @property
    def utilization(self) -> float:
        return UTILIZATION[self.card.attention]

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.num_gpus} x {self.card.name} with {self.card.memory_gb:.0f} GB"


def find_hardware(gpu: str | None, num_gpus: int | None, nodes: int) -> Hardware:
    """Nodes of the GPUs named by `gpu`, one by default; without a name, the GPUs of this machine.

    Raises InputError for an unknown name, and for no name on a machine without GPUs.
    """
    if gpu is not None:
        return Hardware(card=find_card(gpu), num_gpus=num_gpus or 1, nodes=nodes)
    if not torch.cuda.is_available():
        names = ", ".join(card.name for card in load_cards())
        raise InputError(f"this machine has no GPU: name the cards to plan for, such as --gpu 4090 (known are {names})")
    device = torch.cuda.get_device_properties(0)
    known = card_of_device(device.name)
    card = Card(
        name=device.name,
        device=device.name,
        memory_gib=device.total_memory / 2**30,
        tflops=known.tflops if known else None,
        capability=(device.major, device.minor),
    )
    return Hardware(card=card, num_gpus=num_gpus or torch.cuda.device_count(), nodes=nodes, here=True)
