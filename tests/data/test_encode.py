from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.data.encode import Encoded, Example, Turn, encode, expand, messages, prompt_text, questions
from phi3v.data.image import num_image_tokens
from phi3v.data.processor import Phi3VProcessor

SIZES = {"a.png": (640, 480), "b.png": (100, 30), "c.png": (30, 333), "d.png": (336, 336)}


@pytest.fixture(scope="module", params=["tiny", "real"])
def processor(request: pytest.FixtureRequest) -> Phi3VProcessor:
    name = {"tiny": "tiny_processor_dir", "real": "real_tokenizer_dir"}[request.param]
    return Phi3VProcessor.from_pretrained(request.getfixturevalue(name), num_crops=4)


def example(*turns: tuple[str, str | None] | tuple[str, str | None, str], **fields: object) -> Example:
    """Turns as (user, assistant, "a.png b.png")."""
    made = [Turn(user=turn[0], assistant=turn[1], images=tuple("".join(turn[2:]).split())) for turn in turns]
    return Example(id="x", where="train.jsonl:3", turns=tuple(made), **fields)  # type: ignore[arg-type]


def coded(one: Example, processor: Phi3VProcessor) -> Encoded:
    return encode(one, processor, SIZES.__getitem__)


def supervised_spans(encoded: Encoded) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.loss_mask, [False]]).astype(int)))
    return [encoded.ids[start:end].tolist() for start, end in edges.reshape(-1, 2)]


EXAMPLES = {
    "text": example(("what is the color", "red")),
    "image": example(("what is the color", "red", "a.png")),
    "two images": example(("the same?", "yes no", "a.png b.png")),
    "tags": example(("first <|image_1|>, then\n<|image_2|>?", "no", "a.png b.png")),
    "turns": example(("what is this?", "red", "a.png"), ("and in <|image_1|>?", "blue", "c.png"), ("sure", "yes")),
    "late": example(("hello", "yes"), ("what is\nthis", "a circle", "d.png a.png")),
    "odd text": example((" \n é▁ <|placeholder1|>  \t", "\n naïve\u3000日本 \n", "b.png"), ("", "  x")),
    "system": example(("what is this?", "red", "a.png"), ("sure", "yes"), system="Answer\nin German."),
    "empty answer": example(("what", "", "a.png"), ("and", "")),
}


@pytest.fixture(params=list(EXAMPLES))
def one(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]


def test_ids_are_those_of_the_whole_text(one: Example, processor: Phi3VProcessor) -> None:
    """Chat template, tokenized at once by the plain tokenizer, cut at its image tags only."""
    text = processor.apply_chat_template(messages(one)) + "<|endoftext|>"
    expected: list[int] = []
    for number, chunk in enumerate(re.split(r"<\|image_\d+\|>", text)):
        expected += [processor.image_token_id] if number else []
        expected += processor.tokenizer(chunk)["input_ids"]
    assert coded(one, processor).ids.tolist() == expected


def test_expanded_ids_are_the_processor_s(processor: Phi3VProcessor, tmp_path: Path) -> None:
    for name, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / name)
    for one in EXAMPLES.values():
        turns = tuple(replace(t, images=tuple(str(tmp_path / image) for image in t.images)) for t in one.turns)
        encoded = encode(replace(one, turns=turns), processor)
        batch = processor(processor.apply_chat_template(messages(one)) + "<|endoftext|>", list(encoded.images))
        counts = [num_image_tokens(h, w) for h, w in encoded.image_sizes]
        assert expand(encoded.ids, processor.image_token_id, counts).tolist() == batch["input_ids"][0].tolist()
        assert encoded.tokens == batch["input_ids"].shape[1]
        if encoded.images:
            assert [list(size) for size in encoded.image_sizes] == batch["image_sizes"].tolist()


def test_supervised_are_exactly_the_answers(one: Example, processor: Phi3VProcessor) -> None:
    encoded = coded(one, processor)
    spans = supervised_spans(encoded)
    expected = [
        processor.token_ids(f"{turn.assistant.lstrip()}<|end|>\n") for turn in one.turns if turn.assistant is not None
    ]
    expected[-1].append(processor.end_of_text_id)
    assert spans == expected
    assert encoded.num_targets == sum(map(len, expected))
    assert not encoded.loss_mask[encoded.ids == processor.image_token_id].any()


def test_answers_without_loss_are_read_and_not_learned(processor: Phi3VProcessor) -> None:
    one = example(("what", "a draft", "a.png"), ("again", "red", "b.png"))
    draft = replace(one, turns=(replace(one.turns[0], loss=False), one.turns[1]))
    learned = coded(draft, processor)
    assert learned.ids.tolist() == coded(one, processor).ids.tolist()
    assert supervised_spans(learned) == supervised_spans(coded(one, processor))[1:]
    assert learned.ids[: learned.prefix][-1] == processor.image_token_id, "nothing is learned before the second image"
    (question,) = questions(draft)
    assert (question.id, question.turns[0].assistant, question.answers) == ("x", "a draft", ("red",))


def test_known_ids(processor: Phi3VProcessor) -> None:
    if processor.image_token_id != 32044:
        pytest.skip("ids of the real tokenizer")
    encoded = coded(example(("What is it?", "foo", "a.png")), processor)
    prompt = [1, 32010, 29871, 13, 32044, 1, 29871, 13, 5618, 338, 372, 29973, 32007, 29871, 13, 32001]
    assert encoded.ids.tolist() == [*prompt, 7953, 32007, 29871, 13, 32000]
    assert encoded.loss_mask.tolist() == [False] * len(prompt) + [True] * 5
    assert (encoded.prefix, encoded.prefix_tokens, encoded.tokens, encoded.crops) == (5, 4 + 757, 20 + 757, 5)


@pytest.mark.parametrize("closed", [False, True])
def test_prompt_is_prefix_of_training(one: Example, closed: bool, processor: Phi3VProcessor) -> None:
    one = replace(one, closed_turns=closed)
    whole = coded(one, processor)
    asked = questions(one)
    assert len(asked) == len(one.turns)
    starts = np.flatnonzero(np.diff(whole.loss_mask.astype(int)) == 1) + 1
    for question, start in zip(asked, starts, strict=True):
        prompt = coded(question, processor)
        assert prompt.ids.tolist() == whole.ids[:start].tolist()
        assert not prompt.loss_mask.any()
        assert prompt.images == one.images[: len(prompt.images)]
        assert prompt.ids[-1] == processor.token_ids("<|assistant|>")[0]
        if not closed:
            assert processor.token_ids(prompt_text(question)) == prompt.ids[1:].tolist()


def test_closed_turns_are_the_turns_one_by_one(one: Example, processor: Phi3VProcessor) -> None:
    """As the original recipe for NLVR2 joins them: each with its own <s> and <|endoftext|>."""
    whole = coded(replace(one, closed_turns=True), processor)
    alone = [coded(replace(one, turns=(turn,), system=""), processor) for turn in one.turns[1:]]
    alone.insert(0, coded(replace(one, turns=one.turns[:1]), processor))  # the system text stands once
    assert whole.ids.tolist() == np.concatenate([turn.ids for turn in alone]).tolist()
    assert whole.loss_mask.tolist() == np.concatenate([turn.loss_mask for turn in alone]).tolist()
    assert whole.prefix == coded(one, processor).prefix
    if len(one.turns) == 1:
        assert whole.ids.tolist() == coded(one, processor).ids.tolist()


def test_questions_keep_the_answers() -> None:
    single = example(("what", "red"), answers=("red", "dark red"))
    (question,) = questions(single)
    assert (question.id, question.answers, question.turns[0].assistant) == ("x", ("red", "dark red"), None)
    first, second = questions(example(("what", "red", "a.png"), ("and", "blue"), answers=("blue", "azure")))
    assert (first.id, first.answers) == ("x#1", ("red",))
    assert (second.id, second.answers) == ("x#2", ("blue", "azure"))
    assert [turn.assistant for turn in second.turns] == ["red", None]
    assert second.where == "train.jsonl:3"
    assert example(("what", "red")).answers == ("red",)


def test_prefix_ends_with_the_last_image(processor: Phi3VProcessor) -> None:
    for name, number in {"text": 0, "image": 1, "two images": 2, "tags": 2, "turns": 0, "late": 0}.items():
        encoded = coded(EXAMPLES[name], processor)
        assert (encoded.ids[: encoded.prefix] == processor.image_token_id).sum() == number
        if number:
            assert encoded.ids[encoded.prefix - 1] == processor.image_token_id
            assert not encoded.loss_mask[: encoded.prefix].any()
            counts = [num_image_tokens(h, w) for h, w in encoded.image_sizes]
            expanded = expand(encoded.ids, processor.image_token_id, counts)
            assert encoded.prefix_tokens == np.flatnonzero(expanded == processor.image_token_id)[-1] + 1
    prompt = coded(questions(EXAMPLES["turns"])[2], processor)  # no targets: history may be in the prefix
    assert prompt.prefix == np.flatnonzero(prompt.ids == processor.image_token_id)[1] + 1


def test_examples_of_a_page_share_their_prefix(processor: Phi3VProcessor) -> None:
    red, blue = (coded(example((text, "yes", "a.png b.png")), processor) for text in ("is it red?", "is it blue?"))
    assert red.prefix == blue.prefix > 0
    assert red.ids[: red.prefix].tolist() == blue.ids[: blue.prefix].tolist()


def test_numbering_within_the_turn_or_through_the_conversation(processor: Phi3VProcessor) -> None:
    first = ("<|image_1|>\nwhat", "red", "a.png")
    within = example(first, ("<|image_1|> or <|image_2|>", "blue", "b.png c.png"))
    through = example(first, ("<|image_2|> or <|image_3|>", "blue", "b.png c.png"))
    assert messages(within) == messages(through)
    assert messages(within)[2]["content"] == "<|image_2|> or <|image_3|>"
    assert coded(within, processor).ids.tolist() == coded(through, processor).ids.tolist()
    bare = example(("what", "red", "a.png"), ("or", "blue", "b.png c.png"))
    assert messages(bare)[0]["content"] == "<|image_1|>\nwhat"
    assert messages(bare)[2]["content"] == "<|image_2|><|image_3|>\nor"


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (example(("<|image_1|> <|image_2|>", "x", "a.png b.png c.png")), "2 image tags (1, 2), 3 images were given"),
        (example(("<|image_2|> <|image_1|>", "x", "a.png b.png")), "2 image tags (2, 1), 2 images were given"),
        (example(("<|image_1|>", "x")), "1 image tags (1), 0 images were given"),
        (example(("a", "x", "a.png"), ("<|image_3|>", "x", "b.png")), "1 image tags (3), 1 images were given"),
        (example(("a", "look: <|image_1|>", "a.png")), "an answer cannot hold an image tag"),
        (example(("a", "<|image|>")), "literal <|image|>"),
        (example(("<|image|>", "a")), "literal <|image|>"),
        (example((f"<|image_{'1' * 5000}|>", "a")), "1 image tags (1000000000), 0 images were given"),
    ],
)
def test_refusals_name_the_example(one: Example, message: str, processor: Phi3VProcessor) -> None:
    with pytest.raises(InputError) as error:
        coded(one, processor)
    assert str(error.value).startswith("train.jsonl:3: ")
    assert message in str(error.value)


def test_unreadable_image_names_example_and_file(processor: Phi3VProcessor, tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    one = Example(id="x", where="train.jsonl:3", turns=(Turn(user="a", assistant="b", images=(str(missing),)),))
    with pytest.raises(InputError, match=r"^train.jsonl:3: .*missing.png: no such image"):
        encode(one, processor)
