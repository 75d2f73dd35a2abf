"""How smooth is a report of many predictions? Measured in a headless Chromium, up to the frame that is painted.

    python -m benchmarks.report --questions 5000

Makes a run folder with as many questions on as many different images, writes its report as `phi3v report` does, and
says, as medians of several rounds, how long it takes until

    first render   the page is opened, its script has run and the first frame after that is painted
    search         a letter is typed, the list is filtered and sorted, and the next frame is painted
    filter         "Wrong" is pressed, and the next frame is painted
    more           "Show 50 more" is pressed, and the next frame is painted: the slowest of ten
    dialog         an entry is pressed, and its dialog is painted

Needs playwright and a Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from phi3v.publish.gallery import Options
from phi3v.publish.report import write_report

PAINTED = "await new Promise(done => requestAnimationFrame(() => setTimeout(done)));"
TIMED = "async () => { const start = performance.now(); %s " + PAINTED + " return performance.now() - start; }"
MORE = (
    "async () => { let most = 0; const button = document.getElementById('more');"
    "for (let turn = 0; turn < 10; turn++) { const start = performance.now(); button.click();"
    + PAINTED
    + "most = Math.max(most, performance.now() - start); } return most; }"
)
ACTIONS = {
    "search": TIMED
    % "const box = document.getElementById('search'); box.value = '7'; box.dispatchEvent(new Event('input'));",
    "filter": TIMED % "document.querySelector('[data-group=wrong]').click();",
    "more": MORE,
    "dialog": TIMED % "document.querySelector('button.entry').click();",
}


def make_run(folder: Path, num_questions: int) -> None:
    """Predictions on an image each, a tenth of them wrong."""
    random = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True)
    with (folder / "predictions.jsonl").open("w") as file:
        for n in range(num_questions):
            coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize((320, 240), Image.Resampling.BICUBIC).save(images / f"{n}.jpg")
            answer, said = str(n % 7), str((n + (n % 10 == 0)) % 7)
            line = {
                "id": f"q{n}",
                "source": "bench",
                "where": f"test.jsonl:{n + 1}",
                "images": [str(images / f"{n}.jpg")],
            }
            line |= {"user": f"What is the number of this picture, counted from {n}?", "answers": [answer]}
            line |= {"prediction": said, "correct": said == answer, "anls": float(said == answer), "num_tokens": 2}
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--picture-mb", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        run = Path(place) / "run"
        make_run(run, options.questions)
        started = time.monotonic()
        page_file = write_report(run, options=Options(limit=options.questions, picture_mb=options.picture_mb))
        print(f"written in {time.monotonic() - started:.1f} s, {page_file.stat().st_size / 1e6:.1f} MB")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        times: dict[str, list[float]] = {"first render": [], **{name: [] for name in ACTIONS}}
        for _ in range(options.rounds):
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            started = time.monotonic()
            page.goto(page_file.as_uri())
            page.evaluate("async () => { " + PAINTED + " }")
            times["first render"].append(1000 * (time.monotonic() - started))
            for name, action in ACTIONS.items():
                times[name].append(page.evaluate(action))
            page.close()
        print(f"Chromium {browser.version}, {options.questions:,} questions, median of {options.rounds} rounds (most)")
        for name, found in times.items():
            print(f"  {name:<13}{statistics.median(found):7.0f} ms   ({max(found):.0f})")
        browser.close()


if __name__ == "__main__":
    main()
