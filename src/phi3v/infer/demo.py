"""`phi3v demo`: a conversation in the browser, with one model or two side by side.

The page and its server use no network but the loopback (or the address of `--host`): no analytics, no fonts or scripts
from elsewhere, no tunnel. Text of a model or a user is shown as text, never as markup.
"""

from __future__ import annotations

import html
import os
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from rich.markup import escape
from tyro.conf import arg

from phi3v.base.config import check_flags
from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import NonNegative
from phi3v.data.encode import Turn
from phi3v.data.image import load_image
from phi3v.infer.answering import Answerer, Loading, model_folder, started_from
from phi3v.infer.stream import Sampling
from phi3v.model.adapter import read_adapter_config
from phi3v.model.loading import ADAPTER_CONFIG

Turns = tuple[Turn, ...]
LONGEST_ANSWER = 4096
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Hides Gradio's buttons on a chat: one clears what is shown but not the conversation, another shares it on the web.
CSS = ".talk { min-height: 22rem } .talk .message-buttons, .talk [aria-label=Clear] { display: none !important }"


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """Who answers: a model, or the base of an adapter that is loaded anyway."""

    title: str
    answerer: Answerer
    without_adapter: bool = False
    system: str = ""
    speaking: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held during an answer. Speakers that share a model share it: the adapter must stay on or off until the end."""

    def answer(self, turns: Turns, sampling: Sampling) -> Generator[str, None, None]:
        """As `Answerer.stream`; raises InputError at once for what cannot be asked."""
        return self._alone(self.answerer.stream(turns, sampling, self.system))

    def _alone(self, answer: Generator[str, None, None]) -> Generator[str]:
        with self.speaking, self.answerer.model.disable_adapter() if self.without_adapter else nullcontext():
            yield from answer


def demo(
    model: str,
    /,
    *,
    compare: str | None = None,
    system: str = "",
    max_new_tokens: Annotated[int, Meta(ge=1, le=LONGEST_ANSWER)] = 256,
    temperature: NonNegative = 0.0,
    host: str = "127.0.0.1",
    port: Annotated[int, Meta(ge=1, le=65535)] | None = None,
    loading: Annotated[Loading, arg(name="")] = Loading(),
) -> None:
    """Talk to a model in the browser: several images, several turns, answers as they are written.

    Args:
        model: A run folder (its final model), or a model or adapter folder, or a name on the Hub.
        compare: Another model that answers beside it. `base`: the one that the first was fine-tuned from.
        system: System text in front of every conversation, as in the training data.
        max_new_tokens: Longest answer, in tokens. It can be changed on the page.
        temperature: 0 always takes the most likely token; higher is more varied. It can be changed on the page.
        host: Address to listen on. Any but 127.0.0.1 lets others in, without a password.
        port: Port to listen at. Default: the first free one from 7860 on.
    """
    check_flags(locals(), demo)
    _gradio()  # fails before the models are loaded, which take their time
    speakers = [replace(speaker, system=system) for speaker in load_speakers(model, compare, loading)]
    with served(speakers, Sampling(max_new_tokens=max_new_tokens, temperature=temperature), host, port) as address:
        try:
            say(f"demo  [bold]{escape(address)}[/]  (Ctrl-C ends it)")
            if host not in LOOPBACK:
                say(f"[yellow]note[/]  whoever reaches --host {escape(host)} can use the model: there is no password")
            threading.Event().wait()
        except KeyboardInterrupt:
            say("ended")


def load_speakers(model: str, compare: str | None, loading: Loading = Loading()) -> list[Speaker]:
    """The model, and the one that `--compare` names. The base of an adapter is not loaded a second time."""
    folder = Path(model_folder(model))
    adapted = (folder / ADAPTER_CONFIG).is_file()
    base = loading.base or read_adapter_config(folder)["base_model_name_or_path"] if adapted else None
    if compare == "base" and base is None and (compare := started_from(model)) is None:
        raise InputError(f"--compare base: {model} does not say what it was fine-tuned from; name that model instead")
    speaker = Speaker(title=model, answerer=Answerer.load(model, loading))
    if compare is None:
        return [speaker]
    if base is not None and (compare in ("base", base) or Path(compare).resolve() == Path(base).resolve()):
        return [speaker, replace(speaker, title=f"{base} (without the adapter)", without_adapter=True)]
    processor = speaker.answerer.processor
    other = Answerer.load(compare, replace(loading, base=None, num_crops=processor.num_crops, **vars(processor.rules)))
    return [speaker, Speaker(title=compare, answerer=other)]


# -- the page --------------------------------------------------------------------------------------------------------


@contextmanager
def served(speakers: Sequence[Speaker], sampling: Sampling, host: str, port: int | None) -> Iterator[str]:
    """Serve the page and yield its address. At the end of the block the server and all uploaded images are gone."""
    gr = _gradio()
    with tempfile.TemporaryDirectory(prefix="phi3v-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(speakers, sampling)
        system = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        try:
            _, address, _ = page.queue().launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                footer_links=[],
                enable_monitoring=False,
                theme=gr.themes.Default(**system),  # Gradio's own fonts come from a font server
                css=CSS,
            )
        except (OSError, ValueError) as error:
            at = f"--host {host}" + (f" --port {port}" if port is not None else "")
            raise InputError(f"{at}: {str(error).strip().splitlines()[0]}") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def build_page(speakers: Sequence[Speaker], sampling: Sampling) -> Any:
    """The Gradio page: a conversation with every speaker, all of whom are asked the same questions."""
    gr, hot = _gradio(), sampling.temperature
    with gr.Blocks(title="phi3v demo", analytics_enabled=False, fill_height=True) as page:
        talks = gr.State([()] * len(speakers))
        with gr.Row():
            shown = [
                gr.Chatbot(
                    label=speaker.title,
                    render_markdown=False,
                    latex_delimiters=[],
                    height="60vh",
                    buttons=[],
                    allow_file_downloads=False,
                    elem_classes="talk",
                    placeholder="Add images, ask a question.",
                )
                for speaker in speakers
            ]
        box = gr.MultimodalTextbox(
            file_types=["image"], file_count="multiple", placeholder="Ask about the images", show_label=False
        )
        with gr.Row():
            new = gr.Button("New conversation", size="sm")
            stop = gr.Button("Stop", size="sm")
        with gr.Accordion("Sampling", open=False):
            knobs = [
                gr.Slider(0, max(2, hot), hot, step=0.05, label="Temperature (0: the most likely token)"),
                gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top-p (where the temperature is not 0)"),
                gr.Slider(1, LONGEST_ANSWER, sampling.max_new_tokens, step=1, label="Longest answer, in tokens"),
            ]

        def ask(
            message: dict[str, Any], talks: list[Turns], temperature: float, top_p: float, most: float
        ) -> Iterator[list[Any]]:
            chosen = Sampling(max_new_tokens=int(most), temperature=temperature, top_p=top_p)
            emptied = gr.MultimodalTextbox(value=None)
            try:
                for answered in converse(speakers, talks, message["text"], message["files"], chosen):
                    yield [emptied, answered, *map(_messages, answered)]
                    emptied = gr.skip()  # the user may be typing the next question
            except InputError as error:  # as a warning: Gradio's errors cover the conversation
                gr.Warning(html.escape(str(error)), duration=None)
                yield [gr.skip()] * (2 + len(speakers))

        asked = box.submit(
            ask, [box, talks, *knobs], [box, talks, *shown], api_visibility="private", show_progress="hidden"
        )
        stop.click(None, cancels=[asked], api_visibility="private")
        blank = [None, [()] * len(speakers), *([] for _ in speakers)]
        new.click(lambda: blank, None, [box, talks, *shown], cancels=[asked], api_visibility="private")
    return page


def converse(
    speakers: Sequence[Speaker], talks: Sequence[Turns], text: str, files: Sequence[str], sampling: Sampling
) -> Iterator[list[Turns]]:
    """Yield the conversations, one per speaker, while one speaker after the other answers the next question.

    Raises InputError before the first, naming an image by its own name, for what cannot be asked.
    """
    if not text.strip():
        raise InputError("write a question to go with the images" if files else "write a question")
    for file in files:
        try:
            load_image(file)
        except InputError as error:
            raise InputError(str(error).replace(str(Path(file).parent) + os.sep, "")) from error
    turn = Turn(user=text.strip(), assistant=None, images=tuple(files))
    # A turn that was stopped before its first word has no answer, and is dropped.
    conversations = [(*(turn for turn in talk if turn.assistant is not None), turn) for talk in talks]
    answers = [speaker.answer(talk, sampling) for speaker, talk in zip(speakers, conversations, strict=True)]
    yield list(conversations)
    for number, answer in enumerate(answers):
        with closing(answer):  # the model must not go on when this generator is closed
            written = ""
            for written in filter(None, answer):
                conversations[number] = (*conversations[number][:-1], replace(turn, assistant=written))
                yield list(conversations)
        if not written:
            conversations[number] = (*conversations[number][:-1], replace(turn, assistant=""))
            yield list(conversations)


def _messages(turns: Turns) -> list[dict[str, Any]]:
    """The messages of a Gradio chat. It renders HTML even with Markdown switched off, so text is escaped."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        found += [{"role": "user", "content": {"path": image}} for image in turn.images]
        answer = "…" if turn.assistant is None else turn.assistant or "(nothing)"
        found.append({"role": "user", "content": html.escape(turn.user, quote=False)})
        found.append({"role": "assistant", "content": html.escape(answer, quote=False)})
    return found


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"phi3v demo needs Gradio ({error}): pip install 'phi3v[demo]'") from error
    return gradio
