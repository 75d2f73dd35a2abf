"""The memory estimate: arithmetic on sizes, the same for an empty shell as for weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.memory import estimate, layers_to_recompute
from phi3v.model import Phi3VForCausalLM
from phi3v.model.loading import load_config
from phi3v.model.parts import freeze
from phi3v.model.quantization import Quantization, quantize

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
    found = estimate(shell, shell.config, tokens=100, crops=2, rows=7, bytes_per_value=2, recompute=0)
    expected = {
        "weights": (4 + 2) * learn + 2 * frozen,  # autocast's copies
        "gradients": 4 * learn,
        "optimizer": 8 * learn,
        "activations": 2 * (2 * (8 * 32 + 3 * 48) * 100),  # two layers; a frozen tower keeps nothing
        "logits": 3 * 4 * 7 * 432,
    }
    assert {name: found[name] * GIGA for name in expected} == pytest.approx(expected)
    assert found["total"] * GIGA == pytest.approx(sum(expected.values()))


def test_a_tower_that_learns_keeps_its_activations_and_recomputing_saves_them(shell: Phi3VForCausalLM) -> None:
    sizes = {"tokens": 1000, "crops": 10, "rows": 10, "bytes_per_value": 4}
    kept = estimate(shell, shell.config, **sizes, recompute=0)["activations"]
    recomputed = estimate(shell, shell.config, **sizes, recompute=4)["activations"]
    freeze(shell, ("vision",))
    frozen = estimate(shell, shell.config, **sizes, recompute=0)["activations"]
    assert recomputed < kept
    assert kept - frozen == pytest.approx(4 * 2 * (8 * 16 + 2 * 24) * 10 * 577 / GIGA)


def test_the_first_layers_are_computed_again_as_many_as_must_be(shell: Phi3VForCausalLM) -> None:
    """Two of the decoder, then two of CLIP; each saves what it kept but its input."""
    sizes: dict[str, Any] = {"tokens": 1000, "crops": 10, "rows": 10, "bytes_per_value": 4}

    def needed(layers: int) -> float:
        return estimate(shell, shell.config, **sizes, recompute=layers)["total"]

    assert needed(0) - needed(1) == pytest.approx(4 * (8 * 32 + 3 * 48 - 32) * 1000 / GIGA)
    assert needed(2) - needed(3) == pytest.approx(4 * (8 * 16 + 2 * 24 - 16) * 10 * 577 / GIGA)
    assert layers_to_recompute(1.0, 4, needed) == 0
    assert layers_to_recompute(needed(1), 4, needed) == 1
    assert layers_to_recompute(needed(3), 4, needed) == 3
    assert layers_to_recompute(0.0, 4, needed) == 4


@pytest.mark.parametrize(
    ("optimizer", "weight", "gradient", "moments"),
    [("adamw", 4 + 2, 4, 8), ("adamw-8bit", 4 + 2, 4, 2 + 8 / 256), ("adamw-bf16", 2, 2, 4)],
)
def test_what_an_optimizer_keeps_of_a_weight(
    optimizer: Any, weight: float, gradient: float, moments: float, shell: Phi3VForCausalLM
) -> None:
    freeze(shell, ("vision",))
    learn = sum(p.numel() for p in shell.parameters() if p.requires_grad)
    sizes: dict[str, Any] = {"tokens": 100, "crops": 2, "rows": 7, "bytes_per_value": 2, "recompute": 0}
    found = estimate(shell, shell.config, **sizes, optimizer=optimizer)
    assert found["weights"] * GIGA == pytest.approx(weight * learn + 2 * 24_600)
    assert found["gradients"] * GIGA == pytest.approx(gradient * learn)
    assert found["optimizer"] * GIGA == pytest.approx(moments * learn)


@pytest.mark.parametrize(
    ("engine", "shared"),
    [
        ("ddp", set()),
        ("zero1", {"optimizer"}),
        ("zero2", {"optimizer", "gradients"}),
        ("zero3", {"optimizer", "gradients", "weights"}),
        ("fsdp2", {"optimizer", "gradients", "weights"}),
    ],
)
def test_ranks_share_out_what_their_engine_shares_out(engine: Any, shared: set[str], shell: Phi3VForCausalLM) -> None:
    sizes: dict[str, Any] = {"tokens": 100, "crops": 2, "rows": 7, "bytes_per_value": 2, "recompute": 0}
    sizes["bytes_per_value"] = 4  # or ddp alone would hold copies
    alone = estimate(shell, shell.config, **sizes)
    found = estimate(shell, shell.config, **sizes, engine=engine, num_ranks=4)
    parts = alone.keys() - {"total"}
    assert {name for name in parts if found[name] == alone[name] / 4} == shared
    assert {name for name in parts if found[name] == alone[name]} == parts - shared
    assert found["total"] == pytest.approx(sum(found[name] for name in parts))


def test_four_bits_are_half_a_byte_whatever_the_precision(tiny_model_dir: Path) -> None:
    """And the floating-point weights around them are in the run's."""
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    with torch.device("meta"):
        model = Phi3VForCausalLM(load_config(tiny_model_dir))
    packed = quantize(model, Quantization(), compute_dtype=torch.bfloat16)
    model.requires_grad_(False)
    whole = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    for size in (2, 4):
        found = estimate(model, model.config, tokens=1, crops=0, rows=1, bytes_per_value=size, recompute=0)
        assert found["weights"] * GIGA == pytest.approx(packed / 2 + size * whole)
        assert found["optimizer"] == found["gradients"] == 0
