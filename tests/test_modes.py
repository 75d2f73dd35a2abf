"""What learns in every mode, that all of it does, and ten pinned steps of each kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v import train as training
from phi3v.audit import GradientAudit
from phi3v.config import Base, Data, Keeping, Optim, Run, Tuning
from phi3v.data.chat import encode
from phi3v.data.loader import Reading, training_packs
from phi3v.data.plan import PlanSettings, plan_epoch
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.data.tree import Lengths, PackLimits
from phi3v.loss import weighted_cross_entropy
from phi3v.optim import build_optimizer

MODES = {
    "full": Tuning(),
    "freeze-vision": Tuning(freeze=("vision",)),
    "freeze-vision-projector": Tuning(freeze=("vision", "projector")),
    "freeze-vision-projector-embeddings": Tuning(freeze=("vision", "projector", "embeddings")),
    "lora": Tuning(lora=True, lora_rank=4),
    "lora-frozen-vision": Tuning(lora=True, lora_rank=4, freeze_vision_model=True),
    "dora": Tuning(lora=True, lora_rank=4, dora=True),
}
GOLDEN = Path(__file__).parent / "golden" / "trainable"

# Zero by analysis at every step: softmax does not see what is added to all keys.
ALWAYS_ZERO = ".self_attn.k_proj.bias"
# Zero at the first step: the other half of the adapter, B, starts at zero.
ZERO_AT_FIRST = ".lora_A."


def built(folder: Path, tuning: Tuning) -> Any:
    """The model as a run builds it."""
    run = Run(base=Base(model=str(folder), dtype="fp32"), data=Data(train=Path("unused")), tuning=tuning)
    run.check()
    torch.manual_seed(0)
    return training._build_model(run, torch.float32, torch.device("cpu")).train()


@pytest.mark.parametrize("mode", MODES)
def test_golden_names(tiny_checkpoint_dir: Path, mode: str, refresh_golden: bool) -> None:
    """The names of what learns, in tests/golden/trainable; `pytest --refresh-golden` writes them anew."""
    names = [name for name, p in built(tiny_checkpoint_dir, MODES[mode]).named_parameters() if p.requires_grad]
    file = GOLDEN / f"{mode}.txt"
    if refresh_golden:
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(names) + "\n")
    assert names == file.read_text().splitlines()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("mode", MODES)
def test_all_that_learns_is_reached_and_nothing_else(tiny_checkpoint_dir, tiny_data, mode, recompute):
    """A finite gradient that is not zero, for every trainable parameter, within two steps with images."""
    processor = Phi3VProcessor.from_pretrained(tiny_checkpoint_dir)
    encoded = [encode(example, processor) for example in read_jsonl(tiny_data)]
    limits = PackLimits(max_tokens_per_pack=1000, max_crops_per_pack=100, original_max=360)
    plan = plan_epoch(Lengths.of(encoded), PlanSettings(batch_size=len(encoded) // 2, limits=limits), seed=0, epoch=0)
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)

    model = built(tiny_checkpoint_dir, replace(MODES[mode], activation_memory=recompute))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(model, Optim(learning_rate=1e-3))
    audit = GradientAudit(model)
    untouched = {name: p.detach().clone() for name, p in model.named_parameters() if name not in learns}
    unreached = []
    reached: set[str] = set()
    for micro in training_packs(encoded, plan, reading):
        weighted_cross_entropy(model(pack=micro.pack).logits, micro.pack.targets, micro.pack.weights).backward()
        if not micro.last:
            continue
        assert micro.step.crops > 0
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == learns, "every parameter that learns has a gradient, no other has"
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        reached |= {name for name, gradient in gradients.items() if gradient.any()}
        unreached.append({name for name in learns - reached if not name.endswith(ALWAYS_ZERO)})
        audit.check(images=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert len(unreached) == 2
    assert unreached[0] == {name for name in learns if ZERO_AT_FIRST in name}
    assert unreached[1] == set()
    assert audit.done
    assert all(torch.equal(p, untouched[name]) for name, p in model.named_parameters() if name in untouched)


# Ten losses of every kind, made with torch 2.13. With the oldest transformers they are the same, bit for bit; without
# vector instructions, or with other matrix kernels, they differ by 3e-7 at most (relative).
PINNED = {
    "full": "6.769596 6.792910 6.421140 4.949989 4.465824 4.421313 3.774612 3.531055 2.580259 3.079109",
    "freeze-vision-projector-embeddings": (
        "6.769596 6.792910 6.477729 4.855563 4.486712 4.180414 3.676682 3.502769 2.637645 3.030320"
    ),
    "lora": "6.769596 6.792910 6.798525 5.993670 5.795293 5.586763 5.247420 5.167684 4.517159 5.065476",
}
TOLERANCE = 1e-5


@pytest.mark.parametrize("mode", PINNED)
def test_pinned_losses(tiny_checkpoint_dir, tiny_data, tmp_path, monkeypatch, mode):
    """Ten steps of the whole training loop, one or two packs each, over four epochs."""
    monkeypatch.setattr(training, "pick_device", lambda: torch.device("cpu"))
    run = Run(
        base=Base(model=str(tiny_checkpoint_dir), dtype="fp32"),
        data=Data(train=tiny_data, batch_size=5, max_tokens_per_pack=700, num_workers=0),
        tuning=MODES[mode],
        optim=Optim(max_steps=10, learning_rate=3e-3, warmup_steps=2),
        keeping=Keeping(out=tmp_path / "run", progress=False),
    )
    training.train(run)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if entry["kind"] == "step"]
    assert losses == pytest.approx([float(loss) for loss in PINNED[mode].split()], rel=TOLERANCE)
