"""How long the plan of an epoch takes, its memory, and how full its packs are. `python -m benchmarks.plan --help`.

The mix is synthetic: document pages (17 or 13 crops, 2 to 6 questions), photographs (13 crops, one question), pairs of
photographs (26 crops) and text-only conversations, in equal parts.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import resource
import time

import numpy as np

from phi3v.packing.schedule import ScheduleSettings, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits


def realistic_lengths(num_examples: int, seed: int = 0) -> Lengths:
    random = np.random.default_rng(seed)
    kind = random.integers(0, 4, num_examples)  # of each page; more pages than needed
    questions = np.where(kind == 0, random.integers(2, 7, num_examples), 1)
    page = np.repeat(np.arange(num_examples), questions)[:num_examples]
    sizes = np.array([[2509, 17], [1921, 13], [3842, 26], [0, 0]])[kind]
    portrait = (kind == 0) & (random.random(num_examples) < 0.3)
    sizes[portrait] = [1933, 13]
    prefix = np.where(kind == 3, 0, sizes[:, 0] + 4)[page]
    text = np.where(kind[page] == 3, random.integers(50, 1500, num_examples), random.integers(15, 60, num_examples))
    return Lengths(
        page=page,
        tokens=prefix + text,
        prefix=prefix,
        crops=sizes[page, 1],
        num_targets=random.integers(3, 15, num_examples),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-tokens-per-pack", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--num-ranks", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()

    lengths = realistic_lengths(arguments.examples)
    print(f"{len(lengths):,} examples on {lengths.num_pages:,} pages, mean {lengths.tokens.mean():.0f} tokens")
    print(f"numpy {np.__version__}, python {platform.python_version()}, {platform.machine()}")
    for max_tokens, num_ranks in itertools.product(arguments.max_tokens_per_pack, arguments.num_ranks):
        limits = PackLimits(max_tokens_per_pack=max_tokens, max_crops_per_pack=max_tokens // 128)
        settings = ScheduleSettings(batch_size=arguments.batch_size, limits=limits)
        start = time.perf_counter()
        plan = schedule_epoch(lengths, settings, seed=0, epoch=0)
        order = time.perf_counter() - start
        tokens = packs = slowest = 0
        for number in range(len(plan)):
            step, ranks = plan.packs(number, num_ranks)
            tokens += step.tokens
            packs += step.packs * num_ranks
            for side_by_side in zip(*ranks, strict=True):
                slowest += max(sum(tree.tokens for tree in pack) for pack in side_by_side)
        every = time.perf_counter() - start - order
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{max_tokens:,} tokens a pack, {num_ranks} ranks, {len(plan):,} steps: order {order:.2f} s, all packs "
            f"{every:.2f} s ({1e3 * every / len(plan):.2f} ms a step); peak memory {memory:.2f} GiB; packs "
            f"{tokens / (packs * max_tokens):.1%} full; ranks busy {tokens / (slowest * num_ranks):.1%}"
        )


if __name__ == "__main__":
    main()
