"""The memory estimate: arithmetic on sizes, the same for an empty shell as for weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phi3v.memory import estimate
from phi3v.model import Phi3VForCausalLM
from phi3v.model.loading import load_config
from phi3v.model.parts import freeze

GIGA = 1e9


@pytest.fixture
def shell(tiny_model_dir: Path) -> Phi3VForCausalLM:
    with torch.device("meta"):
        model = Phi3VForCausalLM(load_config(tiny_model_dir))
    freeze(model, ())
    return model


def test_the_parts_by_hand(shell: Phi3VForCausalLM) -> None:
    freeze(shell, ("vision",))
    learn = sum(p.numel() for p in shell.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in shell.parameters() if not p.requires_grad)
    assert frozen == 24_600  # the whole CLIP tower
    found = estimate(shell, shell.config, tokens=100, crops=2, rows=7, bytes_per_value=2, recompute=False)
    expected = {
        "weights": 4 * learn + 2 * frozen,
        "gradients": 4 * learn,
        "optimizer": 8 * learn,
        "activations": 2 * (2 * (8 * 32 + 3 * 48) * 100),  # two layers; a frozen tower keeps nothing
        "logits": 3 * 4 * 7 * 432,
    }
    assert {name: found[name] * GIGA for name in expected} == pytest.approx(expected)
    assert found["total"] * GIGA == pytest.approx(sum(expected.values()))


def test_a_tower_that_learns_keeps_its_activations_and_recomputing_saves_them(shell: Phi3VForCausalLM) -> None:
    sizes = {"tokens": 1000, "crops": 10, "rows": 10, "bytes_per_value": 4}
    kept = estimate(shell, shell.config, **sizes, recompute=False)["activations"]
    recomputed = estimate(shell, shell.config, **sizes, recompute=True)["activations"]
    freeze(shell, ("vision",))
    frozen = estimate(shell, shell.config, **sizes, recompute=False)["activations"]
    assert recomputed < kept
    assert kept - frozen == pytest.approx(4 * 2 * (8 * 16 + 2 * 24) * 10 * 577 / GIGA)
