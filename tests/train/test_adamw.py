"""AdamW in less memory goes where float32 AdamW goes; its rounding is unbiased and the same for everybody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phi3v.train import adamw
from phi3v.train.adamw import BYTES, AdamW8bit, AdamWBf16, round_stochastically_, weight_dtype

KINDS = ["adamw-8bit", "adamw-bf16"]
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-7}


def build(kind: str, *parameters: nn.Parameter, lr: float, weight_decay: float = 0.0, **other: Any) -> Any:
    """An optimizer with one group for every parameter."""
    groups = [{"params": [parameter], "lr": lr, "weight_decay": weight_decay} for parameter in parameters]
    settings = {**SETTINGS, **other}
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if kind == "adamw-bf16":
        return AdamWBf16(groups, **{"seed": 3, **settings})
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    return AdamW8bit(groups, **settings)


def parameter(*shape: int, kind: str = "adamw-bf16", scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape) * scale).to(weight_dtype(kind)))


# -- against float32 -------------------------------------------------------------------------------------------------


def regress(kind: str) -> tuple[Tensor, Tensor, float]:
    """Sixty steps of a linear regression, 8,256 weights: those at the start, at the end, and the last loss."""
    torch.manual_seed(1)
    x = torch.randn(256, 128)
    y = x @ torch.randn(128, 64) / 11
    weight, bias = parameter(128, 64, kind=kind, scale=1 / 11), nn.Parameter(torch.zeros(64, dtype=weight_dtype(kind)))
    optimizer = build(kind, weight, bias, lr=0.02, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 60)
    start, loss = weight.detach().float().clone(), torch.zeros(())
    for _ in range(60):
        loss = (x @ weight.float() + bias.float() - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return start, weight.detach().float(), loss.item()


@pytest.mark.parametrize("chunk", [2**22, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_where_float32_goes(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After sixty steps it is off by 1 % of the way (8 bits: 0.8 %, bf16: 0.7 %), at the same loss to 3 %."""
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    start, expected, expected_loss = regress("adamw")
    _, found, loss = regress(kind)
    assert (found - expected).norm() < 0.01 * (expected - start).norm()
    assert loss == pytest.approx(expected_loss, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_adamw_by_hand(kind: str) -> None:
    weight = parameter(64, 65, kind=kind)
    before, gradient = weight.detach().float().clone(), 0.25
    optimizer = build(kind, weight, lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-3)
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient + 1e-3)
    assert torch.equal(optimizer.state[weight]["step"], torch.tensor(1.0))
    if kind == "adamw-8bit":
        torch.testing.assert_close(weight.detach(), expected)
    else:  # one of the two neighbours
        assert ((weight.detach().float() - expected).abs() < 2**-7 * expected.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_as_many_bytes_as_it_says(kind: str) -> None:
    weight = parameter(64, 1024, kind=kind)
    weight.grad = torch.zeros_like(weight)
    optimizer = build(kind, weight, lr=0.1)
    optimizer.step()
    moments = [value for name, value in optimizer.state[weight].items() if name != "step"]
    found = [sum(value.numel() * value.element_size() for value in kept) for kept in ([weight], [weight.grad], moments)]
    assert [size / weight.numel() for size in found] == list(BYTES[kind])


def test_small_parameters_keep_float32_moments() -> None:
    """As in bitsandbytes; a step is then float32 AdamW's."""
    ends = []
    for kind in ("adamw", "adamw-8bit"):
        torch.manual_seed(0)
        weight = parameter(4095, kind=kind)
        optimizer = build(kind, weight, lr=0.1, weight_decay=0.1)
        for _ in range(5):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        ends.append(weight.detach())
        assert {v.dtype for v in optimizer.state[weight].values()} == {torch.float32}
    torch.testing.assert_close(*ends)


# -- rounding --------------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.001, -1.001, 0.02000001, 3.14159e-20, -7.77e10, 1.0038])
def test_rounding_is_unbiased(value: float) -> None:
    """The mean of 200,000 roundings is the value, within five standard errors; each is one of its two neighbours."""
    exact = torch.tensor(value)
    found = round_stochastically_(exact.repeat(200_000), generator()).double()
    low, high = found.unique()  # no third one
    assert low < exact < high
    assert int(low.bfloat16().view(torch.int16)) - int(high.bfloat16().view(torch.int16)) in (1, -1)
    chance = (exact.double() - low) / (high - low)
    error = (high - low) * (chance * (1 - chance) / 200_000).sqrt()
    assert abs(found.mean() - exact.double()) < 5 * error


def test_what_is_bf16_already_stays() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.3895e38, 1e-40, float("inf"), float("-inf")]).bfloat16().float()
    for seed in range(20):
        assert torch.equal(round_stochastically_(special.clone(), generator(seed)), special)
    assert round_stochastically_(torch.tensor([float("nan")]), generator()).isnan().all()


def test_small_steps_are_not_lost() -> None:
    """200 steps of 5e-6, a learning rate of full fine-tuning, where to the nearest not a single weight would move."""
    weight = nn.Parameter(torch.empty(64, 64).uniform_(0.015, 0.03).bfloat16())
    start = weight.detach().float().clone()
    assert torch.equal((start - 5e-6).bfloat16().float(), start)
    optimizer = build("adamw-bf16", weight, lr=5e-6)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert (weight.detach().float() - start).mean() == pytest.approx(-200 * 5e-6, rel=0.02)  # each is off by 3e-4 or so


def test_a_second_moment_falls_when_gradients_do() -> None:
    """By 0.1 % a step with beta2 = 0.999: less than the least that bf16 can show."""
    weight = parameter(64, 64)
    optimizer = build("adamw-bf16", weight, lr=0.0, betas=(0.9, 0.999))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = optimizer.state[weight]["exp_avg_sq"].float().mean()
    weight.grad = torch.zeros_like(weight)
    for _ in range(100):
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].float().mean() / before == pytest.approx(0.999**100, rel=0.01)


# -- the noise -------------------------------------------------------------------------------------------------------


def walk(seed: int = 3, skip: bool = False) -> Iterator[Tensor]:
    """A weight after each of three steps, beside one that may sleep; torch's own generator is anywhere."""
    other, weight = (nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = build("adamw-bf16", other, weight, lr=1e-3, seed=seed)
    for _ in range(3):
        torch.rand(7)
        other.grad, weight.grad = None if skip else torch.ones_like(other), torch.ones_like(weight)
        optimizer.step()
        yield weight.detach().clone()


def test_the_noise_is_the_seeds_the_parameters_and_the_steps() -> None:
    torch.manual_seed(5)
    first, again, skipping, other = list(walk()), list(walk()), list(walk(skip=True)), list(walk(seed=4))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, skipping))
    assert not torch.equal(first[0], other[0])
    moved = [a != b for a, b in zip([torch.ones(500).bfloat16(), *first], first, strict=False)]
    assert not torch.equal(moved[0], moved[1]), "the noise of every step is its own"


def test_parameters_alike_are_rounded_each_in_its_way() -> None:
    one, two = (nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = build("adamw-bf16", one, two, lr=1e-3)
    one.grad, two.grad = torch.ones_like(one), torch.ones_like(two)
    state = torch.get_rng_state()
    optimizer.step()
    assert not torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's generator is touched"
