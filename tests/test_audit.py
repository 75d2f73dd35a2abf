"""The gradient audit names the parameter that does not learn, or learns without leave."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phi3v.audit import STEPS_TO_REACH_ALL, GradientAudit
from phi3v.errors import InputError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(2, 2), nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.head, self.frozen = Attention(), nn.Linear(2, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def give_gradients(model: nn.Module, *without: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad and name not in without else None


def test_it_is_over_once_everything_was_reached() -> None:
    model = Model()
    audit = GradientAudit(model)
    give_gradients(model, "head.weight")
    audit.check(images=True)
    assert not audit.done
    give_gradients(model, "head.bias", "self_attn.k_proj.bias")
    audit.check(images=True)
    assert audit.done
    model.frozen.weight.grad = torch.ones(2, 2)
    audit.check(images=True)  # costs nothing any more, and says nothing


def test_an_unreached_parameter_is_named_after_some_steps_with_images() -> None:
    model = Model()
    audit = GradientAudit(model)
    give_gradients(model, "head.weight", "self_attn.v_proj.bias")
    model.head.weight.grad = torch.zeros(2, 2)  # a gradient, but of nothing
    for _ in range(5):
        audit.check(images=False)
    for _ in range(STEPS_TO_REACH_ALL - 1):
        audit.check(images=True)
    with pytest.raises(InputError, match=r"head\.weight and 1 more should learn, but got no gradient in 3 steps"):
        audit.check(images=True)


def test_a_frozen_parameter_with_a_gradient_is_named() -> None:
    model = Model()
    audit = GradientAudit(model)
    give_gradients(model)
    model.frozen.bias.grad = torch.zeros(2)
    with pytest.raises(InputError, match=r"frozen\.bias is frozen, but it has a gradient"):
        audit.check(images=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named_unless_the_step_is_skipped(value: float) -> None:
    model = Model()
    audit = GradientAudit(model)
    give_gradients(model)
    model.head.weight.grad = torch.tensor([[0.0, value], [0.0, 0.0]])
    audit.check(images=True, skipped=True)
    with pytest.raises(InputError, match=r"the gradient of head\.weight is not finite"):
        audit.check(images=True)


def test_only_the_keys_bias_is_exempt_because_softmax_does_not_see_it() -> None:
    model = Model()
    assert GradientAudit(model).unreached == {
        *("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.v_proj.bias"),
        *("head.weight", "head.bias"),
    }
