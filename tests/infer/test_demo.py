"""The page in a real browser, its conversation without one, and what is refused before a model is loaded."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch

from phi3v.base.errors import InputError
from phi3v.data.encode import Turn
from phi3v.infer import answering
from phi3v.infer import demo as room
from phi3v.infer.answering import Loading
from phi3v.infer.demo import Speaker, converse, demo, load_speakers, served
from phi3v.infer.stream import Sampling

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture
def red(tiny_data: Path) -> str:
    return str(tiny_data.parent / "images/red.png")


@pytest.fixture(scope="module")
def talker(scripted_model_dir: Path) -> Speaker:
    (speaker,) = load_speakers(str(scripted_model_dir), None)
    return speaker


class Scripted(Speaker):
    """Writes its answers word by word, or raises them."""

    def __init__(self, *answers: str | Exception) -> None:
        super().__init__(title="scripted <b>model</b>", answerer=None)
        object.__setattr__(self, "answers", list(answers))
        object.__setattr__(self, "heard", [])

    def answer(self, turns: Any, sampling: Sampling) -> Any:
        self.heard.append((turns, sampling))
        if isinstance(said := self.answers.pop(0), Exception):
            raise said
        words = said.split(" ")
        return (" ".join(words[: k + 1]) for k in range(len(words)))


# -- a conversation --------------------------------------------------------------------------------------------------


def test_the_answers_grow_one_speaker_after_the_other() -> None:
    speakers = [one := Scripted("a red one", "no"), two := Scripted("the other", "yes it is")]
    talks: list[Any] = [(), ()]
    seen = list(converse(speakers, talks, " what is it ", [], SHORT))
    said = [[talk[-1].assistant for talk in talks] for talks in seen]
    assert said == [
        [None, None],
        ["a", None],
        ["a red", None],
        ["a red one", None],
        ["a red one", "the"],
        ["a red one", "the other"],
    ]
    *_, talks = converse(speakers, seen[-1], "is it", [], SHORT)
    for speaker, talk, first in zip((one, two), talks, ("a red one", "the other"), strict=True):
        assert speaker.heard[1][0] == (
            *speaker.heard[0][0][:-1],
            Turn(user="what is it", assistant=first),
            talk[-1].__class__(user="is it", assistant=None),
        )
        assert len(talk) == 2


def test_an_empty_answer_is_an_answer() -> None:
    """Before there is text, as during the first half of a character, nothing is shown; at the end it is said."""
    seen = [talk[-1].assistant for (talk,) in converse([Scripted("")], [()], "what", [], SHORT)]
    assert seen == [None, ""]
    seen = [talk[-1].assistant for (talk,) in converse([Scripted(" word")], [()], "what", [], SHORT)]
    assert seen == [None, " word"]
    shown = [
        message["content"] for message in room._messages((Turn(user="a", assistant=""), Turn(user="b", assistant=None)))
    ]
    assert shown == ["a", "(nothing)", "b", "…"]


def test_what_was_stopped_before_its_first_word_was_not_asked() -> None:
    speaker = Scripted("never heard", "an answer")
    first = converse([speaker], [()], "one", [], SHORT)
    stopped = next(first)
    first.close()
    *_, (talk,) = converse([speaker], stopped, "two", [], SHORT)
    assert talk == (Turn(user="two", assistant="an answer"),)


def test_what_cannot_be_asked_is_said_in_one_line(talker: Speaker, red: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for text, files, message in [
        ("", [red], "write a question to go with the images"),
        (" ", [], "write a question"),
        ("what", [str(tmp_path / "broken.png")], r"broken\.png: .*"),
        ("what", [str(tmp_path / "gone.png")], r"gone\.png: no such image"),
        ("<|image_2|> what", [red], r"prompt has 1 image tags \(2\), 1 images were given.*"),
        ("<|image|>", [], r"the text holds a literal <\|image\|>.*"),
    ]:
        with pytest.raises(InputError) as caught:
            next(converse([talker], [()], text, files, SHORT))
        assert re.fullmatch(message, str(caught.value))
    with pytest.raises(InputError, match=r"the conversation's \d+ tokens and --max-new-tokens 131,072"):
        next(converse([talker], [()], "what", [red], Sampling(max_new_tokens=131072)))


# -- who answers -----------------------------------------------------------------------------------------------------


def last(speaker: Speaker, question: str, red: str) -> str:
    *_, (talk,) = converse([speaker], [()], question, [red], SHORT)
    return talk[-1].assistant


@pytest.mark.parametrize("named", ["base", "by its folder"])
def test_the_base_of_an_adapter_is_not_loaded_twice(
    named: str, scripted_adapter_dir: Path, scripted_model_dir: Path, red: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = list[Any](), answering.load_model
    monkeypatch.setattr(answering, "load_model", lambda *a, **k: loaded.append(a) or load(*a, **k))
    folder = f"{scripted_model_dir}/../{scripted_model_dir.name}"
    tuned, base = load_speakers(str(scripted_adapter_dir), "base" if named == "base" else folder)
    assert len(loaded) == 1
    assert tuned.answerer is base.answerer
    assert last(base, "what is this", red) == "a red picture"
    assert last(tuned, "what is this", red) == "square", "the adapter is back on"


def test_the_adapter_stays_off_until_the_end_of_an_answer(scripted_adapter_dir: Path, red: str) -> None:
    """An answer that was stopped may not have ended yet when the next question comes, in another thread."""
    tuned, base = load_speakers(str(scripted_adapter_dir), "base")
    stopped = converse([base], [()], "what is this", [red], SHORT)
    next(stopped), next(stopped)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(last, tuned, "what is this", red)
        assert wait([answer], timeout=0.3).not_done, "it is the base's turn"
        stopped.close()
        assert answer.result(timeout=60) == "square"


def test_both_models_are_loaded_as_the_flags_say(scripted_model_dir: Path, tiny_checkpoint_dir: Path) -> None:
    one, other = load_speakers(str(scripted_model_dir), str(tiny_checkpoint_dir), Loading(dtype="fp16"))
    assert {speaker.answerer.dtype for speaker in (one, other)} == {torch.float16}
    assert one.answerer.processor.num_crops == other.answerer.processor.num_crops == 1  # the checkpoint's own is 2


def test_the_base_of_a_whole_model_is_the_one_its_run_began_with(
    finished_run: Path, tiny_model_dir: Path, lora_run: Path
) -> None:
    tuned, base = load_speakers(str(finished_run), "base")
    assert (tuned.title, base.title) == (str(finished_run), str(tiny_model_dir))
    assert tuned.answerer is not base.answerer
    _, other = load_speakers(str(finished_run), str(lora_run))
    assert other.title == str(lora_run)


def test_who_cannot_answer_is_named(finished_run: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(InputError, match=r"--compare base: .* does not say what it was fine-tuned from"):
        load_speakers(str(tiny_model_dir), "base")
    with pytest.raises(InputError, match="/no/such/model: no such model folder"):
        load_speakers(str(finished_run), "/no/such/model")
    with pytest.raises(InputError, match="/no/such/model: no such model folder"):
        load_speakers("/no/such/model", None)


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Serves some speakers and opens their page; after it, every request must have gone to the loopback."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'phi3v[demo]'")
    from contextlib import ExitStack

    requests, problems = list[str](), list[str]()
    with ExitStack() as stack:

        def opened(*speakers: Speaker, sampling: Sampling = SHORT) -> Any:
            address = stack.enter_context(served(speakers, sampling, "127.0.0.1", None))
            page = stack.enter_context(browser.new_page(viewport={"width": 1200, "height": 900}))
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(address)
            page.get_by_role("textbox").first.wait_for()
            return page

        yield opened
    hosts = {urlparse(url).hostname for url in requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
    assert problems == []


def ask(page: Any, question: str, *files: str) -> None:
    if files:
        page.locator("input[type=file]").first.set_input_files(list(files))
        page.locator(".thumbnails img").nth(len(files) - 1).wait_for()
    page.locator("textarea").first.fill(question)
    page.locator("textarea").first.press("Enter")


def bot(page: Any, number: int = 0, chat: int = 0) -> Any:
    return page.locator(".talk").nth(chat).get_by_test_id("bot").nth(number)


def test_pictures_and_a_question_get_their_answer_and_so_does_the_next(
    open_page: Callable[..., Any], talker: Speaker, red: str
) -> None:
    page = open_page(talker)
    ask(page, "what is this", red)
    bot(page).filter(has_text=re.compile("^a red picture$")).wait_for()
    assert page.locator(".talk img").count() == 1
    assert page.locator("textarea").first.input_value() == ""
    ask(page, "and is it blue")
    bot(page, 1).filter(has_text=re.compile("^no$")).wait_for()
    assert bot(page).inner_text().strip() == "a red picture"


def test_two_models_answer_side_by_side(open_page: Callable[..., Any], scripted_adapter_dir: Path, red: str) -> None:
    page = open_page(*load_speakers(str(scripted_adapter_dir), "base"))
    ask(page, "what is this", red, red)
    for chat, answer in enumerate(("square", "a red picture")):
        bot(page, 0, chat).filter(has_text=re.compile(f"^{answer}$")).wait_for()
        assert page.locator(".talk").nth(chat).locator("img").count() == 2
    boxes = [page.locator(".talk").nth(chat).bounding_box() for chat in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


def test_what_is_written_stays_text(open_page: Callable[..., Any]) -> None:
    evil = "<script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\"> **bold** $$x$$"
    page = open_page(Scripted(evil))
    ask(page, f"say {evil}")
    bot(page).filter(has_text="$$x$$").wait_for()
    assert bot(page).inner_text().strip() == evil
    assert page.get_by_test_id("user").inner_text().strip() == f"say {evil}"
    assert page.locator(".talk script, .talk img[src=x]").count() == 0
    assert page.title() == "phi3v demo"


def test_an_error_is_shown_and_the_question_stays(open_page: Callable[..., Any], tmp_path: Path) -> None:
    page = open_page(speaker := Scripted(InputError("too many <b>tokens</b>"), "fine"))
    ask(page, "a long question")
    toast = page.get_by_test_id("toast-body")
    toast.filter(has_text="too many <b>tokens</b>").wait_for()
    assert page.locator("textarea").first.input_value() == "a long question"
    page.locator("textarea").first.press("Enter")
    bot(page).filter(has_text="fine").wait_for()
    assert [len(turns) for turns, _ in speaker.heard] == [1, 1]


def test_a_file_that_is_no_picture_is_refused_by_its_name(open_page: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page = open_page(Scripted())
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "broken.png"))
    page.locator(".thumbnails img, .thumbnail-item").first.wait_for()
    page.locator("textarea").first.fill("what is it")
    page.locator("textarea").first.press("Enter")
    toast = page.get_by_test_id("toast-body").filter(has_text="broken.png: ")
    toast.wait_for()
    assert "/" not in toast.inner_text()


def test_stop_keeps_what_was_said_and_a_new_conversation_forgets_it(
    open_page: Callable[..., Any], talker: Speaker, red: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a token is written after it was stopped."""
    written, forward = [0], talker.answerer.model.forward

    def endless(*args: Any, **kwargs: Any) -> Any:
        written[0] += 1
        out = forward(*args, **kwargs)
        out.logits[..., list(talker.answerer.processor.stop_token_ids)] = -1e9
        threading.Event().wait(0.02)
        return out

    monkeypatch.setattr(talker.answerer.model, "forward", endless)
    page = open_page(talker, sampling=Sampling(max_new_tokens=4000))
    ask(page, "what is this", red)
    bot(page).filter(has_text="a red picture").wait_for()
    page.get_by_role("button", name="Stop").click()
    while any(thread.name.startswith("answer") for thread in threading.enumerate()):
        threading.Event().wait(0.05)
    assert 3 < written[0] < 4000
    monkeypatch.undo()
    ask(page, "and is it blue")
    bot(page, 1).filter(has_text="no").wait_for()
    page.get_by_role("button", name="New conversation").click()
    bot(page).wait_for(state="detached")
    ask(page, "answer briefly")
    bot(page).filter(has_text="yes").wait_for()


def test_how_answers_are_chosen_is_folded_away_and_counts(open_page: Callable[..., Any]) -> None:
    page = open_page(speaker := Scripted("one", "two"), sampling=Sampling(max_new_tokens=7, temperature=0.5))
    assert not page.get_by_label("Longest answer").first.is_visible()
    page.get_by_text("Sampling").click()  # now, as Gradio builds it only then and a browser is quicker than that
    ask(page, "first")
    bot(page).filter(has_text="one").wait_for()
    for name, value in (("Longest answer", "9"), ("Temperature", "0")):
        number = page.get_by_role("spinbutton", name=re.compile(name))
        number.fill(value)
        number.press("Tab")
    ask(page, "second")
    bot(page, 1).filter(has_text="two").wait_for()
    assert [sampling for _, sampling in speaker.heard] == [
        Sampling(max_new_tokens=7, temperature=0.5),
        Sampling(max_new_tokens=9, temperature=0.0),
    ]


# -- the command -----------------------------------------------------------------------------------------------------


def test_flags_are_refused_before_a_model_is_loaded() -> None:
    for flags, message in [
        ({"port": 0}, "--port 0: must be at least 1"),
        ({"port": 70000}, "--port 70000: must be at most 65535"),
        ({"max_new_tokens": 5000}, "--max-new-tokens 5000: must be at most 4096"),
        ({"temperature": -1.0}, "--temperature -1.0: must be at least 0"),
        ({"loading": Loading(num_crops=0)}, "--num-crops 0: must be at least 1"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            demo("/no/such/model", **flags)


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"phi3v demo needs Gradio \(.*\): pip install 'phi3v\[demo\]'"):
        demo("/no/such/model")


def test_a_port_that_is_taken_is_named() -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'phi3v[demo]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=rf"--host 127\.0\.0\.1 --port {port}: .*{port}"),
            served([Scripted()], SHORT, "127.0.0.1", port),
        ):
            pass


def test_uploads_are_gone_when_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'phi3v[demo]'")
    monkeypatch.setattr(room.tempfile, "tempdir", str(tmp_path))
    with served([Scripted()], SHORT, "127.0.0.1", None) as address:
        (uploads,) = tmp_path.glob("phi3v-demo-*")
        port = urlparse(address).port
        with socket.create_connection(("127.0.0.1", port)):
            pass
    assert not uploads.exists()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("host", "inside"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_what_lets_others_in(host: str, inside: bool) -> None:
    assert (host in room.LOOPBACK) is inside


def test_the_command_serves_until_ctrl_c(tiny_model_dir: Path) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'phi3v[demo]'")
    command = [sys.executable, "-m", "phi3v", "demo", str(tiny_model_dir)]
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  (not so in the background)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen(command, text=True, preexec_fn=heard, **pipes)
    assert started.stdout is not None
    line = next(line for line in started.stdout if line.startswith("demo"))
    address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    assert address, line
    with socket.create_connection(("127.0.0.1", int(address[1]))):
        pass
    started.send_signal(signal.SIGINT)
    rest, _ = started.communicate()
    assert rest.endswith("ended\n")  # and before it what was not yet written when the signal came
    assert started.returncode == 0
