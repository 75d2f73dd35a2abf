"""What sharing a page among its questions is worth: training steps with and without, alternating in one run.

    python benchmarks/sharing.py [--pages 8] [--questions 4] [--num-crops 4] [--repeats 5]

Same model (random, the real one's proportions in small), same pictures, same examples, same loss; only `share_prefix`
changes. Expected from arithmetic: with q questions a page, the page's tokens and crops run once instead of q times, so
close to q times less work when pages are long and questions short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from phi3v.data.chat import Example, Turn, encode
from phi3v.data.loader import MicroBatch, Reading, training_packs
from phi3v.data.plan import PlanSettings, plan_epoch
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.tree import Lengths, PackLimits
from phi3v.hardware import environment, pick_device
from phi3v.loss import weighted_cross_entropy
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.parts import freeze
from phi3v.recipes.easy_vqa import build_tokenizer

TEXTS = ["\nwhat is written in line number one two three four five six seven", "ten eleven twelve"]


def build(num_crops: int) -> tuple[Phi3VForCausalLM, Phi3VProcessor]:
    """Hidden 256, 4 layers, CLIP hidden 96, 4 layers."""
    processor = Phi3VProcessor(build_tokenizer(TEXTS), num_crops=num_crops)
    ones = [1.0] * 32
    config = Phi3VConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=256,
        intermediate_size=682,
        num_hidden_layers=4,
        num_attention_heads=4,
        rope_scaling={"type": "su", "short_factor": ones, "long_factor": ones},
        vision_config={"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3},
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
    )
    torch.manual_seed(0)
    model = Phi3VForCausalLM(config).to(pick_device()).train()
    freeze(model, ())
    return model, processor


def examples_in(folder: Path, pages: int, questions: int) -> list[Example]:
    """`questions` questions about each of `pages` generated letter pages."""
    random, words = np.random.default_rng(0), TEXTS[0].split()
    found = []
    for page in range(pages):
        file = folder / f"{page}.png"
        Image.fromarray(random.integers(0, 255, (660, 510, 3), dtype=np.uint8)).save(file)
        for question in range(questions):
            user = " ".join(random.choice(words, 12))
            turn = Turn(user=user, assistant="ten eleven twelve", images=(str(file),))
            found.append(Example(id=f"{page}-{question}", turns=(turn,)))
    return found


def step(model: Phi3VForCausalLM, packs: list[MicroBatch]) -> tuple[float, float]:
    """Seconds and loss of one forward and backward pass over the packs of a step."""
    started, loss = time.perf_counter(), 0.0
    for micro in packs:
        pack = micro.pack.to(pick_device())
        part = weighted_cross_entropy(model(pack=pack).logits, pack.targets, pack.weights)
        part.backward()
        loss += part.item()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"pages": 8, "questions": 4, "num-crops": 4, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="write the figures here, with the environment")
    given = parser.parse_args()

    model, processor = build(given.num_crops)
    with tempfile.TemporaryDirectory() as folder:
        encoded = [encode(e, processor) for e in examples_in(Path(folder), given.pages, given.questions)]
        reading = Reading(image_token_id=processor.image_token_id, num_crops=given.num_crops)
        sides = {}
        for share in (False, True):
            limits = PackLimits(max_tokens_per_pack=8192, max_crops_per_pack=64, share_prefix=share)
            plan = plan_epoch(
                Lengths.of(encoded), PlanSettings(batch_size=len(encoded), limits=limits), seed=0, epoch=0
            )
            sides[share] = list(training_packs(encoded, plan, reading))
    for packs in sides.values():
        step(model, packs)  # warm up
    seconds: dict[bool, list[float]] = {False: [], True: []}
    losses = {}
    for _ in range(given.repeats):
        for share, packs in sides.items():
            took, losses[share] = step(model, packs)
            seconds[share].append(took)
    ratios = [alone / shared for alone, shared in zip(seconds[False], seconds[True], strict=True)]
    counts = {share: packs[0].step for share, packs in sides.items()}
    figures = {
        "loss": [losses[False], losses[True]],
        "tokens": [counts[False].tokens, counts[True].tokens],
        "crops": [counts[False].crops, counts[True].crops],
        "questions_per_s": [len(encoded) / statistics.median(seconds[share]) for share in (False, True)],
        "speedup": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
    print(f"{given.pages} pages with {given.questions} questions each, {given.repeats} repeats, alternating")
    print(f"{'':12}{'alone':>12}{'shared':>12}")
    for name in ("loss", "tokens", "crops", "questions_per_s"):
        print(f"{name:<16}{figures[name][0]:>12,.4g}{figures[name][1]:>12,.4g}")
    spread = figures["speedup"]
    print(f"shared is {spread['median']:.2f}x as fast (from {spread['min']:.2f}x to {spread['max']:.2f}x)")
    if given.json:
        given.json.write_text(json.dumps({**figures, "environment": environment(pick_device())}, indent=1))


if __name__ == "__main__":
    main()
