"""Products in fp8, rounded as the hardware does: close to exact, not exact, in the decoder alone, while it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from phi3v.base.config import Run
from phi3v.cli import main
from phi3v.model import Phi3VForCausalLM
from phi3v.model.compiling import compile_layers
from phi3v.model.fp8 import learn_in_fp8
from phi3v.packing.layout import Layout, Tree
from phi3v.train.loop import train

LAYOUT = Layout.of([Tree(20, (3, 4, 7), False), Tree(0, (9,), False)])
ROWS = torch.arange(1, LAYOUT.tokens, 3)


@pytest.fixture
def model(tiny_checkpoint_dir: Path) -> Phi3VForCausalLM:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'phi3v[fp8]'")
    return Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir).train()


def learn(model: Phi3VForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    """What comes out of the decoder, and the gradients of its weights."""
    model.zero_grad()
    x = torch.randn(LAYOUT.tokens, 64, generator=torch.Generator().manual_seed(0))
    y = model.model.decode_layout(x, LAYOUT, ROWS)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_the_decoder_learns_in_fp8_and_answers_exactly(model: Phi3VForCausalLM) -> None:
    exact, gradients = learn(model)
    before = dict(model.named_parameters())
    learn_in_fp8(model, emulate=True)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    changed = {name for name, module in model.named_modules() if "Fp8" in type(module).__name__}
    assert len(changed) == 4 * model.config.num_hidden_layers
    assert all(name.startswith("model.layers.") for name in changed)

    found, rounded = learn(model)
    assert 1e-3 < difference(found, exact) < 0.1  # three bits of mantissa
    assert rounded.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert difference(rounded[name], gradient) < 0.35, name  # attention over sharp weights makes the most of it

    model.eval()
    assert difference(learn(model)[0], exact) < 1e-6


def test_layers_in_fp8_are_compiled_in_one_piece(model: Phi3VForCausalLM) -> None:
    learn_in_fp8(model, emulate=True)
    expected, counter = learn(model), CompileCounter()
    torch._dynamo.reset()
    compile_layers(model, backend=counter, fullgraph=True)
    found = learn(model)
    assert counter.frame_count > 0
    assert difference(found[0], expected[0]) < 1e-5


def test_where_it_cannot_be_had(settings_for: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which may well have fp8")
    with pytest.raises(ValueError, match="--fp8: it needs a GPU of the Hopper or Ada generation"):
        train(settings_for(fp8=True))
    assert main(["train", "--fp8", "--lora", "--train", "x.jsonl", "--out", "x"]) == 2
    assert "--fp8 is for trained weights" in capsys.readouterr().err
