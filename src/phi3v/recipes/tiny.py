"""A tiny model on data of your own: the whole way from images to answers, on any computer.

    phi3v convert imagefolder photos --question "What is this?" --out data --val-fraction 0.2
    phi3v train tiny --train data/train.jsonl --eval data/val.jsonl --out runs/tiny

Task      whatever the data asks, in few words: it is for trying out, not for use
Source    your own jsonl
Split     your own
Model     easy-VQA's: the published architecture and layout, small, from random weights; its tokenizer has whole words
          for the words of your training data. It has never seen an image before: colours and simple shapes it learns
          to tell apart, photographs that the real model knows at once it does not
Scores    none: they are those of your data
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from phi3v.base.config import Base, Data, Evaluation, Keeping, Optim, Run
from phi3v.recipes.easy_vqa import build_checkpoint

MODEL = "tiny"
"""Stands for the model that is made of the training data, in the folder `tiny-model` beside it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The task can be asked for nothing besides the flags of a run."""


def settings(options: Options = Options()) -> Run:
    """A run that learns little data well in minutes; every value can be overridden."""
    return Run(
        base=Base(model=MODEL),
        data=Data(batch_size=8, max_tokens_per_pack=16384),
        optim=Optim(epochs=10, learning_rate=1.5e-3, warmup_steps=10),
        evaluation=Evaluation(max_new_tokens=16),
        keeping=Keeping(out=Path("runs/tiny")),
    )


def prepare(run: Run, options: Options = Options()) -> Run:
    """Makes the checkpoint, unless another model is named or this data has one already."""
    if run.base.model != MODEL or run.data.train is None:
        return run
    folder = run.data.train.parent / "tiny-model"
    build_checkpoint(folder, run.data.train)
    return replace(run, base=replace(run.base, model=str(folder)))
