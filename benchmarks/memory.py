"""Is the estimate of memory right? Measured peaks of small models here, and the guide's table of its own runs.

    python -m benchmarks.memory [--rows full lora ...] [--json benchmarks/results/memory-NAME.json]

Every row is a process of its own: a small model in the real one's proportions trains on letter pages, and the most
memory it held in its second optimizer step, above what it held before there was a model, is compared with
`phi3v.train.memory.estimate`. The guide's table (8, 16 and 32 GPUs, its own code) is compared with `original_gb`, which
adds to the estimate what that code holds on top. docs/plan.md says what came out.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.bench.sample import SHAPES, SIZES, WORDS, config_of, make_examples, packs_of

from phi3v.base.config import Optim
from phi3v.base.files import write_text
from phi3v.base.hardware import DTYPES, environment
from phi3v.base.ranks import ALONE
from phi3v.data.encode import encode
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.parts import add_lora, freeze, recompute_layers
from phi3v.model.quantization import Quantization, quantize
from phi3v.packing.trees import PackLimits
from phi3v.recipes.easy_vqa import build_tokenizer
from phi3v.train.adamw import weight_dtype
from phi3v.train.engines import EngineSettings, build_engine
from phi3v.train.engines.engine import unwrap
from phi3v.train.memory import BUCKET, CONTEXT_GB, DEEPSPEED_BUFFERS, estimate
from phi3v.train.optim import build_optimizer

EMBEDDER = ("vision", "projector")
EVERYTHING: dict[str, Any] = {"frozen": (), "lora": False, "recompute": 0, "dtype": "fp32", "optimizer": "adamw"}
# What differs from EVERYTHING, by row. The last two have the arithmetic of a GPU.
ROWS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, half recomputed": {"recompute": 4},
    "full, recomputing": {"recompute": 13},
    "frozen": {"frozen": EMBEDDER},
    "lora": {"lora": True},
    "lora, recomputing": {"lora": True, "recompute": 13},
    "full, bf16": {"dtype": "bf16"},
    "full, adamw-bf16": {"dtype": "bf16", "optimizer": "adamw-bf16"},
}
LAYERS = 8


class Measured(NamedTuple):
    estimated: float
    measured: float
    """GB."""


def measure(name: str, layers: int = LAYERS) -> Measured:
    """One row, in this process, which must not have held more memory before."""
    how, shape = {**EVERYTHING, **ROWS[name]}, SHAPES["docvqa"]
    dtype = DTYPES[how["dtype"]]
    processor = Phi3VProcessor(build_tokenizer([" ".join(WORDS)]), num_crops=shape.num_crops)
    with tempfile.TemporaryDirectory() as folder:
        encoded = [encode(example, processor) for example in make_examples(Path(folder), shape, 2, 1)]
        limits = PackLimits(max_tokens_per_pack=4096, max_crops_per_pack=32)
        packs, step = packs_of(encoded, processor, frozenset({"packs", "pages"}), limits)
    before = _held()
    config = config_of(processor, {**SIZES, "num_hidden_layers": layers})
    torch.manual_seed(0)
    model: Any = Phi3VForCausalLM(config)
    freeze(model, how["frozen"])
    if how["lora"]:
        lora: dict[str, Any] = {"rank": 16, "alpha": 32, "dropout": 0.0, "init": "default"}
        model = add_lora(model, frozen=how["frozen"], dora=False, rslora=False, **lora)
    if how["recompute"]:
        recompute_layers(model, how["recompute"])
    optim = Optim(optimizer=how["optimizer"], learning_rate=1e-6)
    settings = EngineSettings(
        make_optimizer=lambda model: build_optimizer(model, optim),
        dtype=dtype,
        learning=weight_dtype(how["optimizer"]),
    )
    engine = build_engine("ddp", model.train(), ALONE, settings)
    for number in range(2):
        if number:
            _held()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        for pack in packs:
            engine.learn(pack, last=pack is packs[-1])
        if number == 0:
            engine.step()
    estimated = estimate(
        model,
        unwrap(model).config,
        tokens=max(pack.tokens for pack in packs),
        crops=step.crops // len(packs),
        rows=step.target_rows // len(packs),
        bytes_per_value=dtype.itemsize,
        recompute=how["recompute"],
        optimizer=how["optimizer"],
    )
    return Measured(estimated["total"], _status("VmHWM") - before)


def _held() -> float:
    """GB that this process holds, after giving back what it does not need."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(name))


def measure_apart(name: str) -> Measured:
    """One row, in a process of its own whose allocator gives back at once what is freed."""
    tidy = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--one", name],
        capture_output=True,
        text=True,
        env={**os.environ, **tidy},
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


# -- the guide's table -------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """A row of the guide: peak memory of a GPU on DocVQA, micro-batches of one page of 2,443 tokens and 17 crops."""

    mode: str
    card: str
    gpus: int
    flash: bool
    gb: float


GUIDE = (
    Published("full", "A100-80GB", 8, False, 42),
    Published("full", "A100-80GB", 8, True, 36),
    Published("full", "A100-80GB", 16, True, 29),
    Published("full", "A100-80GB", 32, True, 26),
    Published("frozen", "A100-80GB", 8, False, 29),
    Published("frozen", "A100-80GB", 8, True, 27),
    Published("lora", "A100-80GB", 8, False, 50),
    Published("lora", "A100-80GB", 8, True, 16),
    Published("qlora", "A100-80GB", 8, False, 32),
    Published("qlora", "A100-80GB", 8, True, 10),
    Published("full", "V100-32GB", 8, False, 32),
    Published("full", "V100-32GB", 16, False, 32),
    Published("full", "V100-32GB", 32, False, 32),
    Published("frozen", "V100-32GB", 8, False, 27),
    Published("lora", "V100-32GB", 8, False, 30),
)

NOT_RECOMPUTED = "without flash attention adapters held more than recomputing explains"
EXPLAINED = {
    GUIDE[6]: NOT_RECOMPUTED,
    GUIDE[8]: NOT_RECOMPUTED,
    GUIDE[10]: "the card was full: it had no more than 32 GB to give",
}
"""Rows that are off by more than 15 %, and why; docs/plan.md says more."""


@functools.cache
def original_model(mode: str) -> tuple[Any, Phi3VConfig]:
    """The published sizes without weights, with what learnt in the guide's runs."""
    with torch.device("meta"):
        model: Any = Phi3VForCausalLM(Phi3VConfig())
    config = model.config
    freeze(model, ("vision", "projector", "embeddings") if mode == "frozen" else ())
    if mode == "qlora":
        quantize(model, Quantization(double_quant=False, parts=EMBEDDER), compute_dtype=torch.bfloat16)
    if mode in ("lora", "qlora"):
        lora: dict[str, Any] = {"rank": 32, "alpha": 16, "dropout": 0.0, "init": "default"}
        model = add_lora(model, frozen=(), dora=False, rslora=False, **lora)
    return model, config


def original_gb(row: Published) -> dict[str, float]:
    """Our estimate of what the original code holds, GB by part: `estimate`, and what that code has on top.

    Its micro-batch is one page and every layer is computed again. All tokens get logits: bf16, twice in float32, and
    twice again in the loss. Without flash attention a layer holds its scores, in bf16 and in float32, there and back,
    and weights that do not learn are float32. DeepSpeed's step has the shard's gradients in float32, and AdamW's two
    temporaries; the allocator keeps that beside the activations.

    With a frozen embedder nothing before the head got a gradient (`recipes.table.FROZEN_LEARNT_LITTLE`): nothing is
    kept and scores are not differentiated, but the optimizer holds moments of all.
    """
    tokens, crops, adapters = 2443, 17, row.mode in ("lora", "qlora")
    model, config = original_model(row.mode)
    wide = adapters and not row.flash
    parts = estimate(
        model,
        config,
        tokens=tokens,
        crops=crops,
        rows=0,
        bytes_per_value=4 if wide else 2,
        recompute=config.num_hidden_layers + config.clip["num_hidden_layers"] - 1,
        engine="ddp" if adapters else "zero2",
        num_ranks=row.gpus,
    )
    del parts["total"]
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts["logits"] = (2 + 4 * 4) * tokens * config.vocab_size / 1e9
    if row.mode == "qlora":  # a scale for every block of 64
        parts["weights"] += sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8) * 2 / 64 * 4 / 1e9
    head = config.hidden_size * config.vocab_size
    if row.mode == "frozen":
        unused = (learn - head) * 4 / row.gpus + DEEPSPEED_BUFFERS / 2 * (BUCKET - head) * 2
        parts["gradients"] -= unused / 1e9
        parts["activations"] = 0.0
    if not row.flash:
        parts["scores"] = (
            (1 if row.mode == "frozen" else 2) * (2 + 4 + 2) * config.num_attention_heads * tokens**2 / 1e9
        )
    if not adapters:
        parts["step"] = (4 + 8) * learn / row.gpus / 1e9
    parts["context"] = CONTEXT_GB
    return {**parts, "total": sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--guide-only", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, help="write the figures here, with the environment")
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one)._asdict()))
        return
    content: dict[str, Any] = {"environment": environment(torch.device("cpu")), "measured": {}}
    print(f"{'':<24}{'estimated':>10}{'measured':>10}{'off':>8}")
    for name in [] if given.guide_only else given.rows:
        found = measure_apart(name)
        content["measured"][name] = found._asdict()
        off = found.estimated / found.measured - 1
        print(f"{name:<24}{found.estimated:>10.3f}{found.measured:>10.3f}{off:>+8.1%}", flush=True)
    content["guide"] = []
    print(f"\n{'the guide':<36}{'estimated':>10}{'published':>10}{'off':>8}")
    for row in GUIDE:
        parts = original_gb(row)
        content["guide"].append({**row._asdict(), "estimated": parts})
        name = f"{row.mode}, {row.gpus} x {row.card}{', flash' * row.flash}"
        why = f"  {EXPLAINED[row]}" if row in EXPLAINED else ""
        print(f"{name:<36}{parts['total']:>10.1f}{row.gb:>10}{parts['total'] / row.gb - 1:>+8.0%}{why}", flush=True)
    if given.json:
        write_text(given.json, json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
