"""Training at the real size on one GPU: examples/s, MFU and peak memory, by what learns and how.

    python -m benchmarks.gpu [--rows full lora ...] [--steps 5] [--pages 16] [--json benchmarks/results/NAME.json]
    python -m benchmarks.gpu --tiny            # on a CPU, a small model: does every row run?

First the tests of tests/gpu, then a row after another, each in a process of its own, so that one that fails (memory, a
package that is missing) costs no other. Weights are random, pages are letters of 17 crops; a row runs the steps of
`phi3v train`: its packs, its engine, its optimizer. MFU counts what the objective needs (phi3v.train.flops).

Expected from arithmetic, bf16 on one H100 (989 TFLOP/s) at 45 % of it, four questions a page: full 22 questions/s,
frozen 29, LoRA 33, LoRA over a frozen tower 37; with one question a page 5.9, 7.1, 8.7.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.bench.sample import SHAPES, SIZES, WORDS, config_of, make_examples, packs_of

from phi3v.base.config import Optim
from phi3v.base.files import write_text
from phi3v.base.hardware import environment, peak_memory_gb, pick_device, why_not_compile
from phi3v.base.ranks import ALONE
from phi3v.data.encode import encode
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VForCausalLM
from phi3v.model.backend import pick_attention
from phi3v.model.compiling import compile_layers
from phi3v.model.fp8 import learn_in_fp8
from phi3v.model.parts import add_lora, freeze, recompute_layers
from phi3v.model.quantization import Quantization, quantize
from phi3v.packing.trees import PackLimits
from phi3v.recipes.easy_vqa import build_tokenizer
from phi3v.train.adamw import weight_dtype
from phi3v.train.engines import EngineSettings, build_engine
from phi3v.train.flops import achieved, peak_tflops, training_flops
from phi3v.train.optim import build_optimizer

EVERYTHING: dict[str, Any] = {"questions": 4, "frozen": (), "adapters": False, "nf4": False, "recompute": False}
EVERYTHING |= {"optimizer": "adamw-bf16", "attention": "auto", "compile": True, "fp8": False}
EMBEDDER = ("vision", "projector")

# What differs from EVERYTHING, by row.
ROWS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, one question": {"questions": 1},
    "full, recomputing": {"recompute": True},
    "full, 8-bit moments, recomputing": {"optimizer": "adamw-8bit", "recompute": True},
    "full, float32 moments, recomputing": {"optimizer": "adamw", "recompute": True},
    "full, not compiled": {"compile": False},
    "full, fp8": {"fp8": True},
    "full, sdpa": {"attention": "sdpa"},
    "full, flex_attention": {"attention": "flex_attention"},
    "full, flash_attention_2": {"attention": "flash_attention_2"},
    "frozen": {"frozen": EMBEDDER},
    "frozen, one question": {"frozen": EMBEDDER, "questions": 1},
    "lora": {"adapters": True, "optimizer": "adamw"},
    "lora, one question": {"adapters": True, "optimizer": "adamw", "questions": 1},
    "lora, not compiled": {"adapters": True, "optimizer": "adamw", "compile": False},
    "lora, frozen": {"adapters": True, "frozen": EMBEDDER, "optimizer": "adamw"},
    "qlora": {"adapters": True, "nf4": True, "optimizer": "adamw"},
}


def build(how: dict[str, Any], processor: Phi3VProcessor, dtype: torch.dtype, *, tiny: bool) -> Any:
    """Random weights on the device, with what learns."""
    config = config_of(processor, SIZES if tiny else {})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with pick_device():
        model: Any = Phi3VForCausalLM(config)
    torch.set_default_dtype(before)
    model.config._attn_implementation = pick_attention(how["attention"], pick_device(), dtype)
    freeze(model, how["frozen"])
    if how["fp8"]:
        learn_in_fp8(model, emulate=tiny)
    if how["nf4"]:
        quantize(model, Quantization(), compute_dtype=dtype, device=pick_device())
    if how["adapters"]:
        lora: dict[str, Any] = {"rank": 64, "alpha": 256, "dropout": 0.0, "init": "default"}
        model = add_lora(model, frozen=how["frozen"], dora=False, rslora=False, **lora)
    if how["recompute"]:
        recompute_layers(model, config.num_hidden_layers + config.clip["num_hidden_layers"] - 1)
    return model.train()


def measure(name: str, *, pages: int, steps: int, tiny: bool) -> dict[str, Any]:
    """One row."""
    how, device, shape = {**EVERYTHING, **ROWS[name]}, pick_device(), SHAPES["docvqa"]
    dtype = torch.bfloat16 if device.type == "cuda" or how["optimizer"] == "adamw-bf16" else torch.float32
    processor = Phi3VProcessor(build_tokenizer([" ".join(WORDS)]), num_crops=shape.num_crops)
    model = build(how, processor, dtype, tiny=tiny)
    config = model.get_base_model().config if how["adapters"] else model.config
    flops = training_flops(model, config)
    compiled = how["compile"] and not why_not_compile(device)
    if compiled:
        compile_layers(model)
    optim = Optim(optimizer=how["optimizer"], learning_rate=1e-6)
    settings = EngineSettings(
        make_optimizer=lambda model: build_optimizer(model, optim),
        dtype=dtype,
        learning=weight_dtype(how["optimizer"]),
    )
    engine = build_engine("ddp", model, ALONE, settings)
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(Path(folder), shape, pages, how["questions"])
        limits = PackLimits(max_tokens_per_pack=8192, max_crops_per_pack=64)
        packs, step = packs_of(
            [encode(e, processor) for e in examples], processor, frozenset({"packs", "pages"}), limits
        )
    packs = [pack.to(device) for pack in packs]
    seconds, norms = [], []
    for _ in range(steps + 2):  # two to warm up and compile
        started = time.perf_counter()
        for number, pack in enumerate(packs, start=1):
            engine.learn(pack, last=number == len(packs))
        norms.append(engine.step().norm)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    took = statistics.median(seconds[2:])
    return {
        "row": name,
        **{key: how[key] for key in ("questions", "optimizer", "recompute")},
        "attention": config._attn_implementation,
        "compiled": compiled,
        "dtype": str(dtype).removeprefix("torch."),
        "pages_per_s": step.pages / took,
        "questions_per_s": step.examples / took,
        "tokens_per_s": step.tokens / took,
        **achieved(flops.of(step), took, 1, peak_tflops(device, dtype)),
        "peak_gb": peak_memory_gb(device),
        "gradient_norm": norms[-1],
        "seconds": seconds[2:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--pages", type=int, default=16, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after two that are not")
    parser.add_argument("--tiny", action="store_true", help="a small model, also on a CPU")
    parser.add_argument("--no-tests", action="store_true", help="do not run tests/gpu first")
    parser.add_argument("--json", type=Path, help="write the figures here, with the environment")
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, pages=given.pages, steps=given.steps, tiny=given.tiny)))
        return
    if not torch.cuda.is_available() and not given.tiny:
        raise SystemExit("the real size needs a CUDA device; --tiny runs a small model anywhere")

    content: dict[str, Any] = {"environment": environment(pick_device()), "tests": None, "rows": [], "failed": {}}
    if not given.no_tests:
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/gpu"], capture_output=True, text=True
        )
        content["tests"] = tests.stdout.strip().splitlines()[-1]
        print(f"tests/gpu: {content['tests']}", flush=True)
    print(f"{'':<36}{'pages/s':>9}{'questions/s':>13}{'TFLOP/s':>9}{'MFU':>6}{'GB':>7}")
    size = ["--pages", str(given.pages), "--steps", str(given.steps), *(["--tiny"] if given.tiny else [])]
    for name in given.rows:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", "--one", name, *size], capture_output=True, text=True
        )
        if done.returncode:
            content["failed"][name] = done.stderr.strip().splitlines()[-1]
            print(f"{name:<36}failed: {content['failed'][name]}", flush=True)
        else:
            row = json.loads(done.stdout.splitlines()[-1])
            content["rows"].append(row)
            mfu = f"{row['mfu']:.0%}" if "mfu" in row else ""
            print(
                f"{name:<36}{row['pages_per_s']:>9.3g}{row['questions_per_s']:>13.3g}{row['tflops']:>9.3g}{mfu:>6}"
                f"{row['peak_gb']:>7.1f}",
                flush=True,
            )
        if given.json:  # after every row: the card may be taken away
            write_text(given.json, json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
