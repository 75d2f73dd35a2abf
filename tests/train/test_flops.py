"""Counted arithmetic against what torch counts, operation by operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from phi3v.data.encode import Encoded, Example, Turn, encode
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.parts import add_lora, freeze
from phi3v.packing.layout import Layout
from phi3v.packing.loader import Reading, training_packs
from phi3v.packing.loss import weighted_cross_entropy
from phi3v.packing.schedule import ScheduleSettings, Step, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits
from phi3v.train.flops import achieved, peak_tflops, training_flops

LORA: dict[str, Any] = {"alpha": 2, "dropout": 0.0, "init": "default", "dora": False, "rslora": False}


@pytest.fixture
def processor(tiny_checkpoint_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_checkpoint_dir)


@pytest.fixture
def encoded(processor: Phi3VProcessor, tmp_path: Path) -> list[Encoded]:
    """Three questions on a page of three crops, one on another of three, one without a picture."""
    for name, (width, height) in {"wide": (100, 40), "tall": (40, 100)}.items():
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / f"{name}.png")
    asked = [
        ("wide", "what color"),
        ("wide", "what shape is it"),
        ("wide", "is it red"),
        ("tall", "what"),
        ("", "no?"),
    ]
    turns = [Turn(user=q, assistant="no", images=(str(tmp_path / f"{p}.png"),) if p else ()) for p, q in asked]
    return [encode(Example(id=str(n), turns=(turn,)), processor) for n, turn in enumerate(turns)]


def products(model: Any, encoded: list[Encoded], processor: Phi3VProcessor) -> tuple[float, Step]:
    """Operations in matrix products, forward and backward, without those of attention, and the step they are of."""
    limits = PackLimits(max_tokens_per_pack=9999, max_crops_per_pack=99)
    plan = schedule_epoch(
        Lengths.of(encoded), ScheduleSettings(batch_size=len(encoded), limits=limits), seed=0, epoch=0
    )
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    (micro,) = training_packs(encoded, plan, reading)
    with FlopCounterMode(display=False) as counter:
        logits = model(pack=micro.pack).logits
        weighted_cross_entropy(logits, micro.pack.targets, micro.pack.loss_weights).backward()
    aten = torch.ops.aten
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.bmm)), micro.step


@pytest.mark.parametrize(
    ("frozen", "lora"),
    [
        ((), False),
        (("vision",), False),
        (("vision", "projector"), False),
        (("vision", "projector", "embeddings"), False),
        ((), True),
        (("vision", "projector"), True),
    ],
)
def test_weights_cost_what_torch_counts(
    frozen: tuple[str, ...], lora: bool, tiny_checkpoint_dir: Path, encoded: list[Encoded], processor: Phi3VProcessor
) -> None:
    model: Any = Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir).train()
    config: Phi3VConfig = model.config
    if lora:
        model = add_lora(model, frozen=frozen, rank=1, **LORA)
    else:
        freeze(model, frozen)
    counted, step = products(model, encoded, processor)
    cost = training_flops(model, config)
    clip = config.clip
    crop_pairs = 4 * 577 * 577 * clip["hidden_size"] * (clip["num_hidden_layers"] - 1) * step.crops
    learns_vision = "vision" not in frozen
    ours = cost.of(step) - cost.per_pair * step.pairs - (3 if learns_vision else 1) * crop_pairs
    # Adapters are of rank 1, yet of weights that are not wide; the first layers of all have no input to differentiate,
    # and adapters see the whole input of the last layer.
    assert ours == pytest.approx(counted, rel=0.12 if lora else 0.03)


def test_pairs_are_those_of_the_dense_mask(encoded: list[Encoded], processor: Phi3VProcessor) -> None:
    for share in (True, False):
        limits = PackLimits(max_tokens_per_pack=9999, max_crops_per_pack=99, share_prefix=share)
        plan = schedule_epoch(
            Lengths.of(encoded), ScheduleSettings(batch_size=len(encoded), limits=limits), seed=0, epoch=0
        )
        reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
        (micro,) = training_packs(encoded, plan, reading)
        layout: Layout = micro.pack.layout
        everything = torch.arange(layout.tokens)
        assert micro.step.pairs == int(layout.visible(everything, everything, None).sum())
        assert micro.step.target_rows == micro.pack.target_rows.shape[0]


def test_the_real_model_costs_what_its_sizes_say() -> None:
    """A page of 17 crops, 2443 tokens with 10 of them targets: 17.7 TFLOP in the decoder's weights, forward."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig())
    freeze(model, ())
    cost = training_flops(model, model.config)
    step = Step(number=0, examples=1, pages=1, tokens=2443, crops=17, packs=1, target_rows=10, pairs=2443 * 2444 // 2)
    assert cost.per_token * step.tokens / 3 == pytest.approx(17.71e12 * 31 / 32, rel=0.01)
    assert cost.per_pair * step.pairs / 3 == pytest.approx(1.17e12 * 31 / 32, rel=0.01)
    assert cost.per_crop * step.crops / 3 == pytest.approx(6.21e12 + 0.11e12, rel=0.01)
    assert cost.of(step) == pytest.approx(75.6e12, rel=0.03)


def test_only_a_known_card_in_half_precision_has_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(card: str, dtype: torch.dtype) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
        return peak_tflops(torch.device("cuda"), dtype)

    assert peak("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989
    assert peak("Tesla T4", torch.float16) == 65
    assert peak("NVIDIA H100 80GB HBM3", torch.float32) is None
    assert peak("Graphcard 9000", torch.bfloat16) is None
    assert peak_tflops(torch.device("cpu"), torch.bfloat16) is None


def test_what_is_achieved_is_of_each_device() -> None:
    assert achieved(8e12, 2.0, 2, None) == {"tflops": 2.0}
    assert achieved(8e12, 2.0, 2, 8.0) == {"tflops": 2.0, "mfu": 0.25}
