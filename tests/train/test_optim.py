"""The optimizer's groups and the schedule, against arithmetic by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
import torch

from phi3v.base.config import Optim
from phi3v.model import Phi3VForCausalLM
from phi3v.model.parts import add_lora, freeze, part_of, set_precision
from phi3v.train.adamw import weight_dtype
from phi3v.train.optim import IMAGE_PARTS, build_optimizer, build_schedule, reach


@pytest.fixture
def model(tiny_model_dir: Path) -> Phi3VForCausalLM:
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
    freeze(model, ())
    return model


def settings_by_name(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter the optimizer has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


@pytest.mark.parametrize(("rule", "vectors"), [("original", 0.5), ("matrices", 0.0)])
def test_every_trainable_parameter_is_in_one_group_with_its_own_settings(
    rule: Literal["original", "matrices"], vectors: float, model: Phi3VForCausalLM
) -> None:
    """`vectors` is the decay of RMSNorm weights and of CLIP's class embedding."""
    rates = {"learning_rate": 1.0, "vision_learning_rate": 2.0, "projector_learning_rate": 3.0}
    optim = Optim(weight_decay=0.5, decay=rule, **rates)
    found = settings_by_name(model, build_optimizer(model, optim))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    embedder = "model.vision_embed_tokens."
    layer = f"{embedder}img_processor.vision_model.encoder.layers.0."
    expected = {
        "model.embed_tokens.weight": (1.0, 0.5),
        "lm_head.weight": (1.0, 0.5),
        "model.layers.0.self_attn.qkv_proj.weight": (1.0, 0.5),
        "model.layers.0.input_layernorm.weight": (1.0, vectors),
        "model.norm.weight": (1.0, vectors),
        f"{embedder}glb_GN": (3.0, 0.5),
        f"{embedder}sub_GN": (3.0, 0.5),
        f"{embedder}img_projection.0.weight": (3.0, 0.5),
        f"{embedder}img_projection.0.bias": (3.0, 0.0),
        f"{layer}self_attn.q_proj.weight": (2.0, 0.5),
        f"{layer}self_attn.q_proj.bias": (2.0, 0.0),
        f"{layer}layer_norm1.weight": (2.0, 0.0),
        f"{embedder}img_processor.vision_model.embeddings.class_embedding": (2.0, vectors),
        f"{embedder}img_processor.vision_model.embeddings.patch_embedding.weight": (2.0, 0.5),
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("rule", "magnitudes"), [("original", 0.5), ("matrices", 0.0)])
def test_adapters_decay_by_either_rule_and_magnitudes_by_the_original_one(
    rule: Literal["original", "matrices"], magnitudes: float, model: Phi3VForCausalLM
) -> None:
    adapted = add_lora(model, frozen=(), rank=2, alpha=4, dropout=0.0, init="gaussian", dora=True, rslora=False)
    found = settings_by_name(adapted, build_optimizer(adapted, Optim(weight_decay=0.5, decay=rule)))
    assert {decay for name, (_, decay) in found.items() if "magnitude" in name} == {magnitudes}
    assert {decay for name, (_, decay) in found.items() if "magnitude" not in name} == {0.5}


def test_without_rates_of_their_own_all_parts_learn_alike(model: Phi3VForCausalLM) -> None:
    found = settings_by_name(model, build_optimizer(model, Optim(learning_rate=7.0)))
    assert {rate for rate, _ in found.values()} == {7.0}


def test_a_rate_of_zero_is_a_rate(model: Phi3VForCausalLM) -> None:
    found = settings_by_name(model, build_optimizer(model, Optim(learning_rate=7.0, vision_learning_rate=0.0)))
    assert {rate for name, (rate, _) in found.items() if "img_processor" in name} == {0.0}


def test_the_rate_that_is_shown_is_the_decoders_also_with_adapters(model: Phi3VForCausalLM) -> None:
    adapted = add_lora(model, frozen=(), rank=2, alpha=4, dropout=0.0, init="gaussian", dora=False, rslora=False)
    optim = Optim(learning_rate=1.0, vision_learning_rate=2.0, projector_learning_rate=3.0, warmup_steps=0)
    optimizer = build_optimizer(adapted, optim)
    found = settings_by_name(adapted, optimizer)
    assert all("lora_" in name for name in found)
    assert {rate for name, (rate, _) in found.items() if "img_processor" in name} == {2.0}
    assert {rate for name, (rate, _) in found.items() if "img_projection" in name} == {3.0}
    assert build_schedule(optimizer, optim, 10).get_last_lr()[0] == 1.0


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [
        ("linear", lambda k: (10 - k) / 6),
        ("cosine", lambda k: (1 + math.cos(math.pi * (k - 4) / 6)) / 2),
        ("constant", lambda k: 1.0),
    ],
)
def test_warmup_then_the_schedule(schedule: str, after_warmup, model: Phi3VForCausalLM) -> None:
    optim = Optim(learning_rate=0.5, projector_learning_rate=2.0, schedule=schedule, warmup_steps=4)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, optim)
    plan = build_schedule(optimizer, optim, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        plan.step()
    expected = [k / 4 if k < 4 else after_warmup(k) for k in range(10)]
    for found, factor in zip(rates, expected, strict=True):
        assert sorted(found) == pytest.approx(sorted({0.5 * factor, 2.0 * factor}))


def test_a_step_is_adamw_by_hand(model: Phi3VForCausalLM) -> None:
    optim = Optim(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-3)
    optimizer = build_optimizer(model, optim)
    weight = model.lm_head.weight
    before, gradient = weight.detach().clone(), torch.full_like(weight, 0.25)
    others = {name: p.detach().clone() for name, p in model.named_parameters() if p is not weight}
    weight.grad = gradient.clone()
    optimizer.step()
    first, second = 0.2 * gradient / (1 - 0.8), 0.1 * gradient**2 / (1 - 0.9)
    expected = before * (1 - 0.1 * 0.5) - 0.1 * first / (second.sqrt() + 1e-3)
    torch.testing.assert_close(weight.detach(), expected)
    # What got no gradient is left alone, also by the decay.
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if p is not weight)


# -- sleep -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = ["adamw", "adamw-8bit", "adamw-bf16"]


def built(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    set_precision(model, torch.float32, learning=weight_dtype(kind))
    return build_optimizer(model, Optim(optimizer=kind, learning_rate=0.1, weight_decay=0.5))  # type: ignore[arg-type]


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, images: bool, missing: bool = False) -> None:
    """One with gradients of ones; what only images reach gets zeros without any, or with `missing` none at all."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            asleep = not images and part_of(name) in IMAGE_PARTS
            parameter.grad = None if asleep and missing else torch.full_like(parameter, 0.0 if asleep else 1.0)
    reach(optimizer, images=images)
    optimizer.step()


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[torch.Tensor]]:
    """Weight, moments and step count of every parameter that learns, or the weight alone if it never moved."""
    return {
        name: [value.detach().clone() for value in (p, *optimizer.state.get(p, {}).values())]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("missing", [True, False], ids=["no gradients", "zero gradients"])
def test_what_no_image_reaches_sleeps(missing: bool, kind: str, model: Phi3VForCausalLM) -> None:
    """Weight, moments and count stay as they were, whatever the decay; the rest learns, and all do so next time."""
    optimizer = built(model, kind)
    take_step(model, optimizer, images=True)
    before = everything(model, optimizer)
    assert {len(values) for values in before.values()} == ({4, 6} if kind == "adamw-8bit" else {4})
    take_step(model, optimizer, images=False, missing=missing)
    after = everything(model, optimizer)
    slept = {name for name in before if all(map(torch.equal, before[name], after[name]))}
    assert slept == {name for name in before if "vision_embed_tokens" in name}
    take_step(model, optimizer, images=True)
    counts = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters() if p.requires_grad}
    assert {counts[name] for name in slept} == {2}
    assert {counts[name] for name in counts.keys() - slept} == {3}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sleep_before_the_first_image_leaves_no_trace(kind: str, model: Phi3VForCausalLM) -> None:
    optimizer = built(model, kind)
    before = everything(model, optimizer)
    take_step(model, optimizer, images=False)
    after = everything(model, optimizer)
    for name in before:
        if "vision_embed_tokens" in name:
            assert len(after[name]) == 1, "no moments yet"
            assert torch.equal(before[name][0], after[name][0])
        else:
            assert len(after[name]) in (4, 6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_who_sleeps_changes_nothing_for_the_others(kind: str, tiny_model_dir: Path) -> None:
    """Not even the noise that they are rounded with."""
    found = []
    for images in (True, False):
        model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
        freeze(model, ())
        optimizer = built(model, kind)
        take_step(model, optimizer, images=images)
        found.append(everything(model, optimizer))
    awake, asleep = found
    same = {name for name in awake if all(map(torch.equal, awake[name], asleep[name]))}
    assert same == {name for name in awake if "vision_embed_tokens" not in name}


def test_sleep_is_for_a_step_not_for_the_schedule(model: Phi3VForCausalLM) -> None:
    """The learning rates of sleeping groups go on, and no group is lost."""
    optim = Optim(learning_rate=0.1, warmup_steps=0)
    optimizer = build_optimizer(model, optim)
    schedule, groups = build_schedule(optimizer, optim, 4), list(optimizer.param_groups)
    for _ in range(2):
        take_step(model, optimizer, images=False)
        schedule.step()
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in groups] == pytest.approx([0.05] * len(groups))
    assert any(group["asleep"] for group in groups)
    assert not all(group["asleep"] for group in groups)
