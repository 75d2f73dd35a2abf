"""One target under atheris, in a process of its own: `python explore.py TARGET PLACE FOLDER SECONDS`.

FOLDER gets a corpus and, in `crashes`, the first input of every distinct failure; `result.json` says how many inputs
there were. A failure that ends the process (a signal, more than MAX_MB of memory, more than MAX_SECONDS for an input)
leaves its input in `crashes` as well, by the hand of libFuzzer.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["phi3v", "PIL", "tarfile", "zipfile", "peft.config"]):
    from targets import TARGETS

from mutate import mutated_bytes, mutated_json

MAX_MB, MAX_SECONDS, MAX_BYTES = 4096, 60, 2**17


def main(name: str, place: Path, folder: Path, seconds: int) -> None:
    target, counts, seen = TARGETS[name], {"inputs": 0, "crashes": 0}, set()
    corpus, crashes = folder / "corpus", folder / "crashes"
    for made in (corpus, crashes):
        made.mkdir(parents=True)
    for number, content in enumerate(target.honest(place)):
        (corpus / f"{number}").write_bytes(content)

    def tried(content: bytes) -> None:
        counts["inputs"] += 1
        try:
            target(place, content)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            counts["crashes"] += 1
            where = tuple((frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)[-3:])
            if (kind := (type(error), where)) not in seen:
                seen.add(kind)
                file = crashes / hashlib.sha256(content).hexdigest()[:16]
                file.write_bytes(content)
                file.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
        if counts["inputs"] % 10 == 1:
            (folder / "result.json").write_text(json.dumps(counts))

    def varied(content: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        match random.randrange(4):
            case 0 | 1:
                changed = mutated_json(content, random)
            case 2:
                changed = mutated_bytes(content, random)
            case _:
                changed = content
        return (atheris.Mutate(content, max_size) if changed == content else changed)[:max_size]

    options = (f"-max_total_time={seconds}", f"-rss_limit_mb={MAX_MB}", f"-timeout={MAX_SECONDS}")
    options += (f"-max_len={MAX_BYTES}", f"-artifact_prefix={crashes}/", "-print_final_stats=1", "-len_control=0")
    atheris.Setup([sys.argv[0], *options, str(corpus)], tried, custom_mutator=varied)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
