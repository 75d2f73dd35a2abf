"""The gradient audit names the parameter that does not learn, or learns without leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phi3v.base.errors import InputError
from phi3v.base.ranks import Ranks
from phi3v.train.audit import STEPS_TO_REACH_ALL, GradientAudit


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(2, 2), nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.head, self.frozen = Attention(), nn.Linear(2, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def gradients(model: nn.Module, *without: str, **special: Tensor) -> dict[str, Tensor | None]:
    """Ones for what learns, nothing for the rest and for `without`; `special` ones with _ for a dot."""
    found = {
        name: torch.ones_like(parameter) if parameter.requires_grad and name not in without else None
        for name, parameter in model.named_parameters()
    }
    return found | {name.replace("_", "."): gradient for name, gradient in special.items()}


def test_it_is_over_once_everything_was_reached() -> None:
    model = Model()
    audit = GradientAudit(model)
    audit.check(gradients(model, "head.weight").items(), images=True)
    assert not audit.done
    audit.check(gradients(model, "head.bias", "self_attn.k_proj.bias").items(), images=True)
    assert audit.done

    def unread() -> Iterator[tuple[str, Tensor | None]]:
        raise AssertionError("it costs nothing any more")
        yield

    audit.check(unread(), images=True)


def test_an_unreached_parameter_is_named_after_some_steps_with_images() -> None:
    model = Model()
    audit = GradientAudit(model)
    # A gradient, but of nothing: the same as none.
    found = gradients(model, "self_attn.v_proj.bias", head_weight=torch.zeros(2, 2))
    for _ in range(5):
        audit.check(found.items(), images=False)
    for _ in range(STEPS_TO_REACH_ALL - 1):
        audit.check(found.items(), images=True)
    with pytest.raises(InputError, match=r"head\.weight and 1 more should learn, but got no gradient in 3 steps"):
        audit.check(found.items(), images=True)


def test_a_frozen_parameter_with_a_gradient_is_named() -> None:
    model = Model()
    audit = GradientAudit(model)
    with pytest.raises(InputError, match=r"frozen\.bias is frozen, but it has a gradient"):
        audit.check(gradients(model, frozen_bias=torch.zeros(2)).items(), images=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_does_not_count(value: float) -> None:
    """The loop says what becomes of it: such a gradient has reached nothing, and is no reason to give up either."""
    model = Model()
    audit = GradientAudit(model)
    unreached = set(audit.unreached)
    for _ in range(2 * STEPS_TO_REACH_ALL):
        bad = gradients(model, "self_attn.v_proj.bias", head_weight=torch.tensor([[0.0, value], [0.0, 0.0]]))
        audit.check(bad.items(), images=True)
    assert (audit.unreached, audit.steps_with_images, audit.done) == (unreached, 0, False)
    audit.check(gradients(model).items(), images=True)
    assert audit.done


@dataclass(frozen=True, kw_only=True)
class Two(Ranks):
    """The first of two ranks; what the other one says is given."""

    num: int = 2
    finite: bool = True
    gathered: Iterator[list[str]]

    def any(self, flag: bool) -> bool:
        return flag or not self.finite

    def gather(self, items: Sequence[Any]) -> list[list[Any]]:
        return [list(items), next(self.gathered)]


def test_what_another_rank_has_seen_counts() -> None:
    model = Model()
    audit = GradientAudit(model)
    mine = gradients(model, "head.weight")
    audit.check(mine.items(), images=True, ranks=Two(finite=False, gathered=iter([])))
    assert audit.steps_with_images == 0
    audit.check(mine.items(), images=True, ranks=Two(gathered=iter([[], []])))
    assert audit.unreached == {"head.weight"}
    with pytest.raises(InputError, match=r"frozen\.bias is frozen, but it has a gradient"):
        audit.check(mine.items(), images=True, ranks=Two(gathered=iter([["frozen.bias"], []])))
    audit.check(mine.items(), images=True, ranks=Two(gathered=iter([[], ["head.weight"]])))
    assert audit.done


def test_only_the_keys_bias_is_exempt_because_softmax_does_not_see_it() -> None:
    model = Model()
    assert GradientAudit(model).unreached == {
        *("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.v_proj.bias"),
        *("head.weight", "head.bias"),
    }
