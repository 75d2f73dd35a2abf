"""The table of cards: found by what people type and by what torch calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phi3v.base import cards
from phi3v.base.cards import card_of_device, find_card, load_cards
from phi3v.base.errors import InputError


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("A100-80GB", "A100-80GB"),
        ("a100 80gb", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("rtx a6000", "A6000"),
        ("Quadro RTX 8000", "RTX-8000"),
        ("V100-32", "V100-32GB"),
        ("h100", "H100"),
        ("Tesla T4", "T4"),
    ],
)
def test_a_card_by_what_somebody_types(typed: str, name: str) -> None:
    assert find_card(typed).name == name


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("A100", "choose A100-40GB, A100-80GB"),
        ("V100", "choose V100-16GB, V100-32GB"),
        ("Voodoo2", "choose B200, GH200, H200"),
        ("", "choose B200"),
    ],
)
def test_an_unknown_card_is_refused_with_what_there_is(typed: str, hint: str) -> None:
    with pytest.raises(InputError, match="--gpu") as caught:
        find_card(typed)
    assert hint in str(caught.value)


def test_every_name_finds_its_own_card() -> None:
    assert [find_card(card.name) for card in load_cards()] == list(load_cards())


def test_a_mistake_in_the_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cards.toml"
    file.write_text('cards = [{ name = "T4", device = "T4", memory_gib = -15, capability = [7, 5] }]')
    monkeypatch.setattr(cards, "FILE", file)
    with pytest.raises(InputError, match=r"cards\.toml: .*memory_gib: must be greater than 0"):
        load_cards.__wrapped__()


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX A4000", None),  # which is no A40
    ],
)
def test_a_card_by_what_torch_calls_it(device: str, name: str | None) -> None:
    found = card_of_device(device)
    assert (found.name if found else None) == name


def test_precision_and_attention_are_those_of_the_generation() -> None:
    assert find_card("A100-80GB").dtype == torch.bfloat16
    assert find_card("A100-80GB").attention == "flash_attention_2"
    for old in ("V100-32GB", "T4", "RTX-8000"):
        assert find_card(old).dtype == torch.float16
        assert find_card(old).attention == "sdpa"
    assert find_card("A100-80GB").memory_gb == pytest.approx(85.9, abs=0.1)
