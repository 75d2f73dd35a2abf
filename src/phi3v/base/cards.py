"""GPU cards and their data sheets: memory, peak speed, compute capability, from `cards.toml`.

One table for every user: what `phi3v plan` can plan for, and the peak that `mfu` is a fraction of.
"""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Positive, convert

FILE = Path(__file__).with_name("cards.toml")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card of `cards.toml`, where its fields are explained."""

    name: str
    device: str
    memory_gib: Positive
    tflops: Positive | None = None
    """None if unknown, as of a card of this machine that is not in the table."""
    capability: tuple[int, int]

    @property
    def memory_gb(self) -> float:
        return self.memory_gib * 2**30 / 1e9

    @property
    def dtype(self) -> torch.dtype:
        """The precision that `--dtype auto` chooses: bf16 from Ampere on, else fp16."""
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float16

    @property
    def attention(self) -> str:
        """The backend that `--attention auto` chooses: flash attention from Ampere on, else sdpa."""
        return "flash_attention_2" if self.capability >= (8, 0) else "sdpa"


@functools.cache
def load_cards() -> tuple[Card, ...]:
    """All cards, in the order of the file."""
    return convert(tomllib.loads(FILE.read_text(encoding="utf-8"))["cards"], tuple[Card, ...], FILE.name)


def card_of_device(name: str) -> Card | None:
    """The card with this name in torch; None if it is not in the table."""
    words = set(re.findall(r"\w+", name))
    return next((card for card in load_cards() if words.issuperset(card.device.split())), None)


def find_card(name: str) -> Card:
    """The card that a person means by "A100-80GB" or "nvidia rtx 4090". Raises InputError with the names."""
    wanted = _plain(name)
    cards = {_plain(card.name): card for card in load_cards()}
    if wanted in cards:
        return cards[wanted]
    near = [card for plain, card in cards.items() if plain.startswith(wanted)]  # "A100" matches two, "V100-32" one
    if len(near) == 1:
        return near[0]
    raise InputError(f"--gpu {name}: no such card: choose {', '.join(c.name for c in near or cards.values())}")


def _plain(name: str) -> str:
    """The name without brands, capitals and hyphens."""
    words = re.sub(r"nvidia|geforce|tesla|quadro|rtx|sxm\d?", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)
