"""Pages in a real browser: what their script does, by keyboard, on a phone, in the dark, and with hostile text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.publish.look import look
from phi3v.publish.report import write_report

ATTACK = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>"
NUM_QUESTIONS = 300
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{name}.png" for name in ("red", "teal", "gold")]
    for file in files:
        Image.new("RGB", (64, 48), file.stem).save(file)
    return files


def make_run(folder: Path, pictures: list[Path], wrong_every: int) -> Path:
    """A finished run: the answer of question n is yes or no, and every so many are wrong. Number 5 is hostile."""
    folder.mkdir()
    lines = []
    for n in range(NUM_QUESTIONS):
        answer = ("yes", "no")[n % 2]
        said = {"yes": "no", "no": "yes"}[answer] if n % wrong_every == 0 else answer
        images = [str(pictures[(n + k) % 3]) for k in range(1 + n % 4)]
        line = {"id": f"q{n}", "source": "t", "where": f"t.jsonl:{n + 1}", "images": images, "answers": [answer]}
        line |= {"user": f"is it number {n:03}?", "prediction": said, "correct": said == answer, "num_tokens": 1}
        if n == 5:
            line |= {"id": ATTACK, "user": f"hostile {ATTACK}", "prediction": ATTACK, "correct": False}
        lines.append({**line, "anls": float(line["correct"])})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [{"kind": "step", "step": n, "loss": 3 / n, "examples_per_s": 8.0} for n in range(1, 31)]
    (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "config.json").write_text(json.dumps({"optim": {"learning_rate": 1 / wrong_every}}))
    (folder / "metrics.json").write_text(json.dumps({"final": {"accuracy": 0.9, "questions": NUM_QUESTIONS}}))
    return folder


@pytest.fixture(scope="module")
def report_page(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_report(make_run(folder / "one", pictures, wrong_every=10))


@pytest.fixture(scope="module")
def both_page(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name, pictures, wrong_every=n) for name, n in (("first", 10), ("second", 20))]
    return write_report(*runs, out=folder / "both.html")


@pytest.fixture(scope="module")
def look_page(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    Image.new("RGB", (900, 300), "teal").save(folder / "images" / "wide.png")
    turn = {"images": ["wide.png"], "user": "what is this", "assistant": "a red picture"}
    examples = [{"id": f"e{n}", "conversations": [turn]} for n in range(4)]
    examples[1]["conversations"] = [{**turn, "images": ["gone.png"]}]
    examples[2]["conversations"] = [turn, {"user": ATTACK, "assistant": "no"}]
    lines = [*map(json.dumps, examples), f"broken {ATTACK}"]
    (folder / "train.jsonl").write_text("\n".join(lines))
    page = folder / "page.html"
    assert look(folder / "train.jsonl", model=str(tiny_model_dir), num_crops=4, out=page) == 2
    return page


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a page; at the end, nothing but the file was asked for, no script failed, and no text had its way."""
    contexts, asked, said = [], [], []

    def open_page(file: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hurt") is None
        context.close()
    assert said == []
    assert {re.match(r"file:|data:", url) is not None for url in asked} == {True}


def shown(page: Any) -> str:
    return page.locator("#count").inner_text()


def first_cards(page: Any, count: int) -> list[str]:
    """The questions of the first cards."""
    return page.locator("button.entry .asked").all_text_contents()[:count]


# -- finding an example ----------------------------------------------------------------------------------------------


def test_the_gallery_is_shown_page_by_page(report_page: Path, opened: Open) -> None:
    page = opened(report_page)
    cards, more = page.locator("button.entry"), page.locator("#more")
    assert shown(page) == f"{NUM_QUESTIONS} found"
    assert cards.count() == 50
    assert more.inner_text() == "Show 50 more of 250"
    more.click()
    assert cards.count() == 100
    assert page.evaluate("document.activeElement.dataset.place") == "50"  # the first new one
    page.keyboard.press("End")
    assert cards.count() == NUM_QUESTIONS
    assert not more.is_visible()
    page.get_by_role("button", name="Wrong").click()
    assert cards.count() == 31
    assert not more.is_visible()


def test_filters_and_search(report_page: Path, opened: Open) -> None:
    page = opened(report_page)
    page.get_by_role("button", name="Wrong").click()
    assert shown(page) == "31 found"
    assert first_cards(page, 3) == ["is it number 000?", f"hostile {ATTACK}", "is it number 010?"]
    page.get_by_label("Search").fill("number 27")
    assert shown(page) == "1 found"
    assert first_cards(page, 3) == ["is it number 270?"]
    page.get_by_role("button", name="All").click()
    assert shown(page) == "13 found"  # 27, 127, 227, and 270 to 279
    page.get_by_label("Search").fill("nothing of the kind")
    assert shown(page) == "Nothing matches"
    assert page.locator("button.entry").count() == 0


def test_orders(report_page: Path, opened: Open) -> None:
    page = opened(report_page)
    assert first_cards(page, 2) == ["is it number 000?", f"hostile {ATTACK}"]  # wrong ones first
    page.get_by_label("Order").select_option("As in the file")
    assert first_cards(page, 3) == ["is it number 000?", "is it number 001?", "is it number 002?"]
    page.get_by_label("Order").select_option("Longest answer first")
    assert first_cards(page, 1) == [f"hostile {ATTACK}"]


def test_a_number_of_the_confusion_table_leads_to_its_questions(report_page: Path, opened: Open) -> None:
    page = opened(report_page)
    page.locator("td.wrong button").first.click()
    assert shown(page) == "30 found"
    chip = page.locator("#cell")
    assert chip.inner_text() == "answer: yes, model: no ×"
    assert first_cards(page, 2) == ["is it number 000?", "is it number 010?"]
    chip.click()
    assert shown(page) == f"{NUM_QUESTIONS} found"
    assert not chip.is_visible()


def test_runs_side_by_side(both_page: Path, opened: Open) -> None:
    page = opened(both_page)
    assert shown(page) == "600 found"
    page.get_by_label("Run").select_option("second")
    page.get_by_role("button", name="Wrong").click()
    assert shown(page) == "16 found"
    page.get_by_label("Run").select_option("first")
    assert shown(page) == "31 found"
    page.get_by_label("Search").fill("number 010?")
    page.locator("button.entry").first.click()
    dialog = page.locator("dialog")
    assert dialog.locator(".other").inner_text().split() == ["second", "model", "yes", "\N{CHECK MARK}"]


# -- one example -----------------------------------------------------------------------------------------------------


def test_the_keyboard_is_enough(report_page: Path, opened: Open) -> None:
    page = opened(report_page)
    page.keyboard.press("/")
    page.keyboard.type("number 1")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('button.entry')"):
            break
    place = "document.activeElement.dataset.place"
    assert page.evaluate(place) == "0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(place) == "6"  # five in a row
    page.keyboard.press("End")
    assert page.evaluate(f"Number({place}) + 1") == int(shown(page).split()[0])
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    dialog, title = page.locator("dialog"), page.locator("#entry-title")
    assert dialog.is_visible()
    assert title.inner_text() == "is it number 010?"  # the wrong ones are first
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == "is it number 100?"
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.wait_for_function(f"{place} === '1'")  # and the focus is back where the dialog was left


def test_the_dialog_shows_all_there_is(report_page: Path, opened: Open) -> None:
    page = opened(report_page)
    page.get_by_label("Search").fill("number 003?")
    page.locator("button.entry").first.click()
    dialog = page.locator("dialog")
    assert dialog.locator("img").count() == 4
    assert dialog.locator("img").evaluate_all("images => images.every(image => image.naturalWidth === 64)")
    text = dialog.inner_text()
    for part in ("is it number 003?", "1 of 1", "answer\nno", "right, ANLS 100.0", "q3", "t.jsonl:4"):
        assert part in text
    page.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()


def test_curves_are_read_by_the_arrow_keys(report_page: Path, opened: Open) -> None:
    page = opened(report_page)
    chart = page.get_by_role("img", name=re.compile("^Loss"))
    chart.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".reading.on text").text_content().startswith("step 30: ")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".reading.on text").text_content().startswith("step 29: ")
    page.keyboard.press("Tab")
    assert page.locator(".reading.on").count() == 0


def test_text_of_a_model_stays_text(report_page: Path, opened: Open) -> None:
    page = opened(report_page)
    page.get_by_label("Search").fill("hostile")
    card = page.locator("button.entry")
    assert card.locator(".asked").text_content() == f"hostile {ATTACK}"  # inner_text is "" until the card is painted
    card.click()
    assert page.locator("dialog .turn p").inner_text() == f"hostile {ATTACK}"
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("script").count() == 2  # ours


# -- anywhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report_page", "both_page", "look_page"])
def test_on_a_phone_nothing_sticks_out(name: str, request: pytest.FixtureRequest, opened: Open) -> None:
    page = opened(request.getfixturevalue(name), viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 360
    page.evaluate("document.getElementById('examples').scrollIntoView()")
    for place in range(2):  # with one picture, and with two
        page.locator(f"button.entry[data-place='{place}']").tap()
        assert page.locator("dialog").is_visible()
        assert page.evaluate(width) == 360
        sticking_out = (
            "[...document.querySelectorAll('dialog *')].filter(node => node.getBoundingClientRect().right > 360)"
        )
        assert page.evaluate(f"{sticking_out}.map(node => node.className)") == []
        page.get_by_role("button", name="Close").tap()
        page.wait_for_function("document.activeElement.matches('button.entry')")


@pytest.mark.parametrize("name", ["report_page", "look_page"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_follow_the_system_and_can_be_read(
    scheme: str, name: str, request: pytest.FixtureRequest, opened: Open
) -> None:
    page = opened(request.getfixturevalue(name), color_scheme=scheme)
    page.evaluate("document.getElementById('examples').scrollIntoView()")
    channel = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
    assert (int(page.evaluate(channel)) < 60) == (scheme == "dark")
    places = ["h1", ".lead", ".rows .label", ".rows .bad", ".entry .foot", ".facts span, .bar small", "#count"]
    for place in places:
        assert page.evaluate(CONTRAST, place) >= 4.5, place  # WCAG AA


CONTRAST = """selector => {
  const node = document.querySelector(selector);
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  let behind = node;
  while (behind && numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const light = (text) => numbers(text).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const [ink, paper] = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor].map(light);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}"""


# -- look ------------------------------------------------------------------------------------------------------------


def test_problems_are_shown_at_their_example(look_page: Path, opened: Open) -> None:
    page = opened(look_page)
    page.get_by_role("button", name="Problems").click()
    assert shown(page) == "2 found"
    first, second = page.locator("button.entry").all()
    assert "no such image" in first.inner_text()
    assert "image missing" in first.inner_text()
    assert second.locator(".asked").inner_text() == f"broken {ATTACK}"
    assert "not JSON" in second.inner_text()
    assert "train.jsonl:2: " in page.locator(".problems").inner_text()


def test_crops_and_tokens_are_those_of_the_model(look_page: Path, opened: Open) -> None:
    page = opened(look_page)
    page.get_by_role("button", name="Fine").click()
    page.locator("button.entry").first.click()
    dialog = page.locator("dialog")
    assert dialog.locator(".tiles b").all_inner_texts() == ["1", "2", "3"]
    assert dialog.locator(".padding").count() == 0
    box = dialog.locator(".frame").first.bounding_box()
    assert (box["width"], round(box["height"])) == (360, 120)
    assert dialog.locator("figcaption").all_inner_texts() == ["900×300 as 1008×336: 3 crops", "global crop"]
    sizes = dialog.locator("img").evaluate_all(
        "images => images.map(image => [image.naturalWidth, image.naturalHeight])"
    )
    assert sizes == [[504, 168], [168, 168]]
    assert dialog.locator(".token.image").inner_text() == "<|image|> × 601"
    learnt = "".join(dialog.locator(".tokens .learnt").all_inner_texts())
    assert learnt == " a red picture<|end|> ↵<|endoftext|>"
