"""N ranks = 1 rank: how far apart are losses, gradient norms and weights, for every engine and mode?

    python -m benchmarks.ranks [--ranks 2 4] [--engines ddp fsdp2 zero1 zero2 zero3] [--modes full frozen lora qlora]
                               [--optimizers sgd adamw] [--dtype fp32] [--json FILE]

A tiny random model learns ten steps with everything in them that makes ranks differ: pages and texts mixed, several
packs or hardly one, so that ranks run empty packs or have no picture, steps without any. Every process does them
alone first, then all together (gloo, on CPUs). What is said are the largest relative differences: of the losses, of the
gradient norms, of a parameter (L2 norms), and of the way it has come (where a gradient that is lost would show as 1).

AdamW divides by the size of a gradient, so that it moves weights whose gradient is nothing but rounding. How much, is
measured: `noise` is one rank against itself with other packs. Parameters whose gradients are below QUIET of the whole
are listed, and compared no further.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from phi3v.base.config import Optim
from phi3v.base.hardware import DTYPES, environment, pick_device
from phi3v.base.ranks import ALONE, Ranks, join, leave
from phi3v.data.encode import Encoded
from phi3v.data.image import hd_size
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.parts import add_lora, freeze
from phi3v.model.quantization import Quantization, quantize
from phi3v.packing.loader import MicroBatch, Reading, training_packs
from phi3v.packing.schedule import EpochSchedule, ScheduleSettings
from phi3v.packing.trees import Lengths, PackLimits
from phi3v.train.audit import ALWAYS_ZERO
from phi3v.train.engines import Engine, EngineSettings, build_engine
from phi3v.train.optim import build_optimizer, reach

IMAGE_TOKEN, NUM_CROPS, VOCABULARY = 431, 2, 432
QUIET = 1e-6
FIGURES = ("loss", "norm", "weights", "way")

# Two questions on each of four pages (the last one of three crops), then eight texts.
PAGES, TEXTS = range(8), range(8, 16)
STEPS: tuple[tuple[int, ...], ...] = (
    (0, 2, 6, 8),
    (9, 10),  # no picture: vision sleeps
    (4,),  # one pack: the other ranks have nothing to do
    tuple(range(16)),  # several packs for each of four ranks
    (11,),
    (2, 3, 12),  # one rank has the picture, the other the text
    (8, 13, 14, 15),
    (0, 1, 6, 7),
    (5, 8, 9, 10, 11),
    (0, 2, 4, 6, 12, 14),
)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What learns, and how."""

    frozen: tuple[str, ...] = ()
    adapter: dict[str, Any] | None = None
    quantized: bool = False
    recompute: bool = False
    tied: bool = False
    crops_per_call: int = 64
    optim: dict[str, Any] = field(default_factory=dict)


LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "init": "gaussian", "dora": False, "rslora": False}
MODES = {
    "full": Mode(),
    "frozen": Mode(frozen=("vision", "projector")),
    "lora": Mode(adapter=LORA),
    "qlora": Mode(adapter=LORA, quantized=True),
    "dora": Mode(adapter={**LORA, "dora": True, "rslora": True}),
    "recompute": Mode(recompute=True),
    "tied": Mode(tied=True),
    "chunks": Mode(frozen=("vision",), crops_per_call=2),
    "rates": Mode(optim={"vision_learning_rate": 1e-4, "projector_learning_rate": 3e-3, "weight_decay": 0.1}),
}


class Course(NamedTuple):
    """What became of the ten steps."""

    losses: list[float]
    norms: list[float]
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    """The weights that learn, before and after."""
    quiet: set[str]
    """Those with hardly any gradient."""


@dataclass(frozen=True, eq=False)
class Data:
    encoded: list[Encoded]

    @functools.cache  # noqa: B019  (the packs are the same for every engine)
    def packs(self, ranks: Ranks, max_tokens_per_pack: int) -> list[MicroBatch]:
        """Those of this rank."""
        limits = PackLimits(max_tokens_per_pack=max_tokens_per_pack, max_crops_per_pack=4)
        order = np.array([example for step in STEPS for example in step])
        bounds = np.cumsum([0, *map(len, STEPS)])
        plan = EpochSchedule(Lengths.of(self.encoded), ScheduleSettings(batch_size=1, limits=limits), order, bounds)
        reading = Reading(image_token_id=IMAGE_TOKEN, num_crops=NUM_CROPS)
        return list(training_packs(self.encoded, plan, reading, rank=ranks.rank, num_ranks=ranks.num))


def make_data(folder: Path) -> Data:
    """Random tokens; pictures of one tile, and of two."""
    random = np.random.default_rng(0)
    sizes = [(48, 40), (40, 48), (32, 32), (60, 30)]
    for number, (width, height) in enumerate(sizes):
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")

    def example(number: int) -> Encoded:
        page = number // 2 if number in PAGES else None
        start = [1] if page is None else [1, IMAGE_TOKEN]
        text = random.integers(3, IMAGE_TOKEN, 12 + 7 * (number % 5))
        ids = np.array([*start, *text], dtype=np.int32)
        return Encoded(
            ids=ids,
            loss_mask=np.arange(len(ids)) >= len(ids) - 3 - number % 4,
            prefix=0 if page is None else len(start),
            images=() if page is None else (str(folder / f"{page}.png"),),
            image_sizes=() if page is None else (hd_size(*sizes[page], NUM_CROPS),),
            id=f"e{number}",
            where=f"ranks.py:{number}",
        )

    return Data([example(number) for number in [*PAGES, *TEXTS]])


def build_model(mode: Mode, dtype: torch.dtype) -> Any:
    config = Phi3VConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
        rope_scaling={"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        image_token_id=IMAGE_TOKEN,
        pad_token_id=0,
        tie_word_embeddings=mode.tied,
        initializer_range=0.2,  # or CLIP's attention would be flat, and its gradients nothing
    )
    torch.manual_seed(0)
    model: Any = Phi3VForCausalLM(config)
    model.model.vision_embed_tokens.frozen_crops_per_call = mode.crops_per_call
    freeze(model, mode.frozen)
    if mode.quantized:
        quantize(model, Quantization(), compute_dtype=dtype)
    if mode.adapter:
        model = add_lora(model, frozen=mode.frozen, **mode.adapter)
    if mode.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def make_optimizer(name: str, mode: Mode) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, Optim(learning_rate=1e-3, **mode.optim))

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        kept = ("params", "needs_images", "asleep")
        groups = [{key: group[key] for key in kept} for group in adamw(model).param_groups]
        return torch.optim.SGD(groups, lr=0.1)

    return {"adamw": adamw, "sgd": sgd}[name]


def train(
    engine_name: Any, mode: Mode, optimizer: str, ranks: Ranks, data: Data, *, dtype: torch.dtype, tokens: int = 700
) -> Course:
    """The ten steps."""
    model = build_model(mode, dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    settings = EngineSettings(make_optimizer=make_optimizer(optimizer, mode), dtype=dtype)
    engine: Engine = build_engine(engine_name, model, ranks, settings)
    loss, losses, norms = 0.0, list[float](), list[float]()
    squares = dict.fromkeys(start, 0.0)
    for micro in data.packs(ranks, tokens):
        loss += float(engine.learn(micro.pack.to(ranks.device), last=micro.last))
        if not micro.last:
            continue
        reach(engine.optimizer, images=micro.step.crops > 0)
        if ranks.num == 1:
            for name, gradient in engine.gradients():
                squares[name] = squares.get(name, 0.0) + (0.0 if gradient is None else float(gradient.square().sum()))
        norms.append(engine.step().norm)
        losses.append(ranks.total(loss)[0])
        loss = 0.0
    end = {name: p.detach().cpu() for name, p in engine.final(None).named_parameters() if name in start}
    hardly = QUIET**2 * sum(squares.values())
    quiet = {name for name in start if squares[name] <= hardly or name.endswith(ALWAYS_ZERO)}
    return Course(losses, norms, start, end, quiet)


def compare(course: Course, alone: Course) -> dict[str, Any]:
    """The largest differences, and the parameter whose way differs most."""
    apart = {name: float((course.end[name] - end).norm()) for name, end in alone.end.items() if name not in alone.quiet}
    ways = {name: gap / float((alone.end[name] - alone.start[name]).norm()) for name, gap in apart.items()}
    return {
        "loss": _relative(course.losses, alone.losses),
        "norm": _relative(course.norms, alone.norms),
        "weights": max(gap / float(alone.end[name].norm()) for name, gap in apart.items()),
        "way": max(ways.values()),
        "widest": max(ways, key=ways.__getitem__),
    }


def _relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    found = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return math.nan if any(math.isnan(one) for one in found) else max(found)


def work(given: argparse.Namespace) -> None:
    """What every process does; the first one writes what it found to `given.json`."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    ranks, dtype = join(120), DTYPES[given.dtype]
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for mode_name in given.modes:
            mode = MODES[mode_name]
            for optimizer in given.optimizers:
                course = functools.partial(train, mode=mode, optimizer=optimizer, data=data, dtype=dtype)
                alone = course("ddp", ranks=ALONE)
                about = {"mode": mode_name, "optimizer": optimizer}
                noise = compare(course("ddp", ranks=ALONE, tokens=350), alone)
                rows.append({"engine": "noise", "ranks": 1, **about, **noise, "quiet": sorted(alone.quiet)})
                for engine in given.engines:
                    found = compare(course(engine, ranks=ranks), alone)
                    rows.append({"engine": engine, "ranks": ranks.num, **about, **found})
                    if ranks.is_first:
                        print(line(rows[-1]), file=sys.stderr, flush=True)
    if ranks.is_first:
        given.json.write_text(json.dumps(rows, indent=1))
    leave()


def line(row: dict[str, Any]) -> str:
    numbers = "".join(f"{row[key]:>10.1e}" for key in FIGURES)
    return f"{row['mode']:<10}{row['optimizer']:<7}{row['engine']:<6}{row['ranks']:>6}{numbers}  {row['widest']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2", "zero1", "zero2", "zero3"])
    parser.add_argument("--modes", nargs="+", default=["full", "frozen", "lora", "qlora"], choices=MODES)
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--json", type=Path, help="write the figures here, with the environment")
    given = parser.parse_args()
    if "RANK" in os.environ:
        work(given)
        return

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in given.ranks:
            part = Path(folder) / f"{ranks}.json"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            flags = ["--engines", *given.engines, "--modes", *given.modes, "--optimizers", *given.optimizers]
            command = [sys.executable, *launch, __file__, *flags, "--dtype", given.dtype, "--json", str(part)]
            subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
            rows += [row for row in json.loads(part.read_text()) if row not in rows]
    heads = "".join(f"{name:>10}" for name in FIGURES)
    print(f"{'mode':<10}{'':<7}{'engine':<6}{'ranks':>6}{heads}  widest at")
    for row in rows:
        print(line(row))
    quiet = sorted({name for row in rows for name in row.get("quiet", ())})
    print(f"near zero gradients, not compared: {', '.join(quiet) or 'none'}")
    if given.json:
        figures = {"steps": len(STEPS), "dtype": given.dtype, "rows": rows, "environment": environment(pick_device())}
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
