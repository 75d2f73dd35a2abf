"""Does cost grow linearly with the length of a pack? Training steps over the same pages in packs of 4k to 32k tokens.

    python -m benchmarks.packs [--tokens 4096 8192 16384 32768] [--rounds 2] [--json FILE]

Pages are letters of 17 crops with four questions; the model is the small one of `benchmarks.bench`, its image embedder
frozen, on a CPU with every layer recomputed, so that 32k tokens fit in memory. The lengths take turns. A branch sees
its own page alone, so attention costs the same in any pack: tokens/s should not change by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.bench.sample import SHAPES, WORDS, build_model, make_examples, packs_of
from benchmarks.bench.training import Timed, run_step
from benchmarks.bench.ways import SAVINGS, Variant

from phi3v.base.config import Optim
from phi3v.base.files import write_text
from phi3v.base.hardware import environment, pick_device, pick_dtype
from phi3v.data.encode import encode
from phi3v.data.processor import Phi3VProcessor
from phi3v.packing.trees import PackLimits
from phi3v.recipes.easy_vqa import build_tokenizer
from phi3v.train.optim import build_optimizer

QUESTIONS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--pages", type=int, default=12, help="of a step; as many as fill the longest pack")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    shape, device = SHAPES["docvqa"], pick_device()
    dtype = pick_dtype("auto", device)
    processor = Phi3VProcessor(build_tokenizer([" ".join(WORDS)]), num_crops=shape.num_crops)
    model = build_model("frozen", processor, device, dtype)
    optimizer = build_optimizer(model, Optim(learning_rate=0.0))
    savings = frozenset(SAVINGS) - ({"recompute"} if device.type == "cpu" else set())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(Path(folder), shape, arguments.pages, QUESTIONS)
        encoded = [encode(example, processor) for example in examples]
        for tokens in arguments.tokens:
            limits = PackLimits(max_tokens_per_pack=tokens, max_crops_per_pack=10**6)
            packs, step = packs_of(encoded, processor, savings, limits)
            variant = Variant(name=f"{tokens:,} tokens a pack", savings=savings, questions=QUESTIONS)
            found.append(Timed(variant=variant, packs=packs, step=step, flops=0.0, needed=0.0))
    run_step(model, optimizer, replace(found[0], packs=found[0].packs[:1], seconds=[]), shape.num_crops, dtype)
    for number in range(1, arguments.rounds + 1):
        print(f"round {number} of {arguments.rounds}", flush=True)
        for timed in found:
            run_step(model, optimizer, timed, shape.num_crops, dtype)
    rows = []
    for timed in found:
        pace = [timed.step.tokens / seconds for seconds in timed.seconds]
        ratios = [own / first for own, first in zip(found[0].seconds, timed.seconds, strict=True)]
        rows.append(
            {
                "variant": timed.variant.name,
                "packs": len(timed.packs),
                "longest_pack": max(pack.tokens for pack in timed.packs),
                "tokens_per_s": statistics.median(pace),
                "times_as_fast": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
                "peak_gb": timed.peak_gb,
                "loss": timed.loss,
            }
        )
        times = rows[-1]["times_as_fast"]
        print(
            f"{timed.variant.name}: {len(timed.packs)} packs, the longest {rows[-1]['longest_pack']:,} tokens, "
            f"{rows[-1]['tokens_per_s']:,.0f} tokens/s, {times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f}) "
            f"times the first, {timed.peak_gb:.1f} GB"
        )
    if arguments.json:
        content = {"rows": rows, "pages": arguments.pages, "environment": environment(device)}
        write_text(arguments.json, json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
