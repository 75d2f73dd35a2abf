"""An answer while it is written: all of it, nothing more, and no token after the consumer has left."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.base.errors import InputError
from phi3v.data.encode import Turn
from phi3v.infer.answering import Answerer, Loading
from phi3v.infer.stream import Sampling, stream
from phi3v.model.loading import load_model


@pytest.fixture(scope="module")
def talker(scripted_model_dir: Path) -> tuple[Any, Any]:
    model, processor = load_model(scripted_model_dir)
    return model.eval(), processor


@pytest.fixture
def asked(tiny_data: Path) -> tuple[Turn, ...]:
    return (Turn(user="what is this", assistant=None, images=(str(tiny_data.parent / "images/red.png"),)),)


def test_an_answer_grows_token_by_token_to_what_generate_says(talker: Any, asked: tuple[Turn, ...]) -> None:
    model, processor = talker
    seen = list(stream(model, processor, asked, Sampling(max_new_tokens=12)))
    inputs = processor("<|user|>\n<|image_1|>\nwhat is this<|end|>\n<|assistant|>\n", list(asked[0].images))
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert seen[-1] == processor.decode(out, skip_special_tokens=True).strip() == "a red picture"
    assert len(seen) == len(out) > 3
    assert all(after.startswith(before) for before, after in pairwise(seen))
    assert int(out[-1]) in processor.stop_token_ids, "it ended by itself"


def test_a_system_text_comes_first(talker: Any, asked: tuple[Turn, ...], monkeypatch) -> None:
    model, processor = talker
    prompts: list[Any] = []
    monkeypatch.setattr(model, "generate", lambda **inputs: prompts.append(inputs["input_ids"]))
    list(stream(model, processor, asked, Sampling(), system="Be brief."))
    text = "<|system|>\nBe brief.<|end|>\n<|user|>\n<|image_1|>\nwhat is this<|end|>\n<|assistant|>\n"
    assert prompts[0].tolist() == processor(text, list(asked[0].images))["input_ids"].tolist()


@pytest.mark.parametrize("stop", [0, 1])
def test_every_stop_token_ends_it(stop: int, talker: Any, asked: tuple[Turn, ...], monkeypatch) -> None:
    model, processor = talker
    forward = model.forward

    def says_stop(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits[..., processor.stop_token_ids[stop]] = 1e9
        return out

    monkeypatch.setattr(model, "forward", says_stop)
    assert list(stream(model, processor, asked, Sampling(max_new_tokens=12))) == [""]


def test_the_longest_answer_is_kept_to(talker: Any, asked: tuple[Turn, ...]) -> None:
    seen = list(stream(*talker, asked, Sampling(max_new_tokens=2)))
    assert seen == ["a", "a red"]


def test_the_precision_holds_in_the_thread_that_writes(scripted_model_dir: Path, asked: Any, monkeypatch) -> None:
    answerer, seen = Answerer.load(scripted_model_dir, Loading(dtype="fp16")), set()
    forward = answerer.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(answerer.model, "forward", watched)
    assert list(answerer.stream(asked, Sampling(max_new_tokens=12)))[-1] == "a red picture"
    assert seen == {torch.float16}
    assert not torch.is_autocast_enabled("cpu")


def test_nothing_is_written_after_nobody_waits(talker: Any, asked: tuple[Turn, ...], monkeypatch) -> None:
    model, processor = talker
    calls, forward = [0], model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        out = forward(*args, **kwargs)
        out.logits[..., list(processor.stop_token_ids)] = -1e9  # it would go on to the end
        return out

    monkeypatch.setattr(model, "forward", counted)
    threads = threading.active_count()
    answer = stream(model, processor, asked, Sampling(max_new_tokens=500))
    next(answer)
    answer.close()
    made = calls[0]
    assert made < 500
    assert threading.active_count() == threads
    assert calls[0] == made


def test_half_a_character_is_not_shown(talker: Any, asked: tuple[Turn, ...], monkeypatch) -> None:
    """é takes two tokens here, as bytes do that no word has."""
    model, processor = talker
    script = [*processor.token_ids("é")[-2:], processor.stop_token_ids[0]]
    forward = model.forward

    def scripted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits[..., script[len(said)]] = 1e9
        said.append(1)
        return out

    said: list[int] = []
    monkeypatch.setattr(model, "forward", scripted)
    assert list(stream(model, processor, asked, Sampling(max_new_tokens=12))) == ["", "é", "é"]


def test_an_error_of_the_model_is_raised_by_the_generator(talker: Any, asked: Any, monkeypatch) -> None:
    model, processor = talker

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    answer = stream(model, processor, asked, Sampling())
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        next(answer)


def test_what_cannot_be_asked_is_refused_before_anything_is_written(talker: Any, asked: tuple[Turn, ...]) -> None:
    with pytest.raises(InputError, match=r"1 image tags \(1\), 0 images were given"):
        stream(*talker, (Turn(user="<|image_1|> what", assistant=None),), Sampling())
    with pytest.raises(InputError, match=r"3\d\d tokens and --max-new-tokens 131,000 together exceed .* 131,072"):
        stream(*talker, asked, Sampling(max_new_tokens=131_000))


def test_a_temperature_draws_and_top_p_keeps_the_most_likely(talker: Any, asked: tuple[Turn, ...]) -> None:
    hot = Sampling(max_new_tokens=6, temperature=50.0)
    assert len({list(stream(*talker, asked, hot))[-1] for _ in range(4)}) > 1
    sure = Sampling(max_new_tokens=12, temperature=1.0, top_p=1e-6)
    assert {list(stream(*talker, asked, sure))[-1] for _ in range(3)} == {"a red picture"}
    assert Sampling().settings == {"max_new_tokens": 256, "do_sample": False}
