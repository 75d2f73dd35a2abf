"""The place that hostile files are put in; the targets, which a process of their own uses as well, are importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from phi3v.base.config import Base, Data, Evaluation, Keeping, Optim, Run, Tuning
from phi3v.train.loop import train

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def place(tiny_model_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place of `targets`: a model, a LoRA run of two steps on it, its adapter, data, a checkpoint."""
    from targets import make_place

    folder = tmp_path_factory.mktemp("fuzz")
    train(
        Run(
            base=Base(model=str(tiny_model_dir), dtype="fp32"),
            data=Data(train=tiny_data, eval=tiny_data, batch_size=4, num_workers=0),
            tuning=Tuning(lora=True, lora_rank=4),
            optim=Optim(max_steps=2, warmup_steps=0),
            evaluation=Evaluation(max_new_tokens=2, eval_before=False),
            keeping=Keeping(out=folder / "run", progress=False),
        )
    )
    return make_place(folder / "place", model=tiny_model_dir, run=folder / "run", data=tiny_data)
