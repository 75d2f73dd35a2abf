"""What is timed computes one and the same thing, and does the work it is said to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import tyro
from benchmarks.bench import sample
from benchmarks.bench.answering import WAYS
from benchmarks.bench.command import bench
from benchmarks.bench.sample import SHAPES, Mode, Shape, make_examples, packs_of, prepare
from benchmarks.bench.ways import SAVINGS, hardware_flops, loss_of, variants
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from phi3v.cli import status_of
from phi3v.data.encode import encode
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VForCausalLM
from phi3v.model.vision import PATCHES
from phi3v.packing.pack import Pack
from phi3v.packing.schedule import Step
from phi3v.packing.trees import PackLimits
from phi3v.train.engines.engine import unwrap

SHAPE = Shape(2, (200, 60), 4)
"""Two pictures of 3 tiles each, with room for 4."""


@pytest.fixture
def processor(tiny_checkpoint_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_checkpoint_dir, num_crops=SHAPE.num_crops)


def model_for(folder: Path, mode: Any) -> Any:
    return prepare(Phi3VForCausalLM.from_pretrained(folder), mode, torch.float32)


def laid_out(savings: frozenset[str], processor: Phi3VProcessor, folder: Path) -> tuple[list[Pack], Step]:
    encoded = [encode(example, processor) for example in make_examples(folder, SHAPE, pages=2, questions=2)]
    return packs_of(encoded, processor, savings, PackLimits(max_tokens_per_pack=99_999, max_crops_per_pack=99))


def learnt(model: Any, packs: list[Pack], savings: frozenset[str]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step and the gradients of all weights that got one."""
    inner = unwrap(model)
    inner.gradient_checkpointing_disable()
    if "recompute" not in savings:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    loss = 0.0
    for pack in packs:
        part = loss_of(model, pack, savings, SHAPE.num_crops)
        part.backward()
        loss += part.item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, gradients


@pytest.mark.parametrize("mode", get_args(Mode))
def test_all_variants_learn_the_same(
    mode: str, tiny_checkpoint_dir: Path, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    if mode == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'phi3v[qlora]'")
    model = model_for(tiny_checkpoint_dir, mode)
    sides = dict.fromkeys(variant.savings for variant in variants(2, ablation=True))
    assert set.union(*map(set, sides)) == set(SAVINGS)
    losses, gradients = zip(
        *(learnt(model, laid_out(savings, processor, tmp_path)[0], savings) for savings in sides), strict=True
    )
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    # Gradients that are zero by analysis (CLIP's k_proj.bias) are rounding: so small a one is held to the largest.
    largest = max(float(gradient.norm()) for gradient in gradients[0].values())
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, expected in gradients[0].items():
            assert float((other[name] - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-2 * largest), name


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_the_work_is_what_torch_counts(
    mode: str, tiny_checkpoint_dir: Path, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    """Attention aside, which torch counts as if nothing were masked."""
    model = model_for(tiny_checkpoint_dir, mode)
    aten = torch.ops.aten
    products: list[tuple[int, float]] = []
    for variant in variants(2, ablation=True):
        packs, step = laid_out(variant.savings, processor, tmp_path)
        with FlopCounterMode(display=False) as counter:
            learnt(model, packs, variant.savings)
        counts = counter.get_flop_counts()["Global"]
        counted = sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.bmm))
        products.append((counted, weights_only(model, step, variant.savings)))
    for counted, ours in products:
        assert ours == pytest.approx(counted, rel=0.05)
    assert products[0][0] > 1.8 * products[-1][0]


def weights_only(model: Any, step: Step, savings: frozenset[str]) -> float:
    """`hardware_flops` without attention: no pairs, and CLIP's patches attending nobody."""
    clip = model.config.clip
    dim, layers = clip["hidden_size"], clip["num_hidden_layers"] - 1
    learns = any(p.requires_grad for name, p in model.named_parameters() if "img_processor" in name)
    of_a_layer = 4 * PATCHES * PATCHES * dim
    crops = step.crops if "crops" in savings else step.examples * SHAPE.images * (SHAPE.num_crops + 1)
    attention = of_a_layer * layers * crops * (3 if learns else 1)
    attention += of_a_layer * crops * ("crops" not in savings)
    attention += of_a_layer * layers * crops * (learns and "recompute" not in savings)
    return hardware_flops(model, model.config, step._replace(pairs=0), savings, SHAPE) - attention


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "docvqa", SHAPE)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(sample, "SIZES", {"vocab_size": 512, **small, "vision_config": tower})
    file = tmp_path / "bench.json"
    flags = ["--pages", "1", "--questions", "3", "--rounds", "2", "--no-ablation", "--dtype", "fp32"]
    tyro.cli(bench, args=[*flags, "--json", str(file)])
    found = json.loads(file.read_text())
    names = [row["variant"] for row in found["rows"]]
    assert names == ["original", *(v.name for v in variants(3, ablation=False))][1:]
    told = capsys.readouterr().out
    assert all(name in told for name in names)
    for row in found["rows"]:
        assert row["times_as_fast"]["min"] <= row["times_as_fast"]["median"] <= row["times_as_fast"]["max"]
        assert row["peak_gb"] > 0
        assert 0 < row["of_limit"] < row["gflops_per_s"] / found["peak_gflops_per_s"] * 1.001
    shared = found["rows"][names.index("phi3v, 3 questions a page")]
    assert shared["fewer_operations"] > 2
    assert shared["pages_per_s"] == pytest.approx(shared["questions_per_s"] / 3)
    assert [row["variant"] for row in found["answering"]] == list(WAYS)
    assert all(row["variant"] in told and row["questions_per_s"] > 0 for row in found["answering"])
    assert found["environment"]["torch"]


def test_what_cannot_be_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(lambda: tyro.cli(bench, args=["--rounds", "0"])) == 2
    assert "--rounds is 0, it must be at least 1" in capsys.readouterr().err
