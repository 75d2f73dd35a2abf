"""A tiny model on your own data: the whole way from images to answers, on any computer.

    phi3v convert imagefolder photos --question "What is this?" --out data --val-fraction 0.2
    phi3v train tiny --train data/train.jsonl --eval data/val.jsonl --out runs/tiny

Task      whatever the data asks, answered in few words: for trying things out, not for use
Source    your own jsonl
Split     your own
Model     that of easy-VQA: the published architecture and layout, small, with random weights; its tokenizer has the
          words of your training data as whole tokens. It has never seen an image: it learns to distinguish colors and
          simple shapes, but not what photographs show
Scores    none
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from phi3v.base.config import Base, Data, Evaluation, Keeping, Optim, Run
from phi3v.recipes.easy_vqa import build_checkpoint

MODEL = "tiny"
"""Stands for the model that is created from the training data, in the folder `tiny-model` beside it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The task has no options besides the flags of a run."""


def settings(options: Options = Options()) -> Run:
    """A run that fits a small data set in minutes; a flag overrides each value."""
    return Run(
        base=Base(model=MODEL),
        data=Data(batch_size=8, max_tokens_per_pack=16384),
        optim=Optim(epochs=10, learning_rate=1.5e-3, warmup_steps=10),
        evaluation=Evaluation(max_new_tokens=16),
        keeping=Keeping(out=Path("runs/tiny")),
    )


def prepare(run: Run, options: Options = Options()) -> Run:
    """Create the checkpoint, unless another model is named or the data already has one."""
    if run.base.model != MODEL or not run.data.train:
        return run
    files = list(run.data.train_files)
    folder = files[0].parent / "tiny-model"
    build_checkpoint(folder, *files)
    return replace(run, base=replace(run.base, model=str(folder)))
