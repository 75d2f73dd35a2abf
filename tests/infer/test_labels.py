"""Scores of labels: those of one forward pass per label, however pages, questions and labels share their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.base.ranks import Ranks
from phi3v.base.stopping import Stopped
from phi3v.data.encode import Encoded, Example, Turn, encode, messages
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.answering import answer, read_questions
from phi3v.infer.labels import Branches, closed_answers, label_tokens, score_labels, share
from phi3v.model import Phi3VForCausalLM
from phi3v.model.parts import add_lora
from phi3v.packing.loader import Reading
from phi3v.packing.trees import Lengths, PackLimits, make_trees

# Measured on one core of an AVX2 CPU: 1e-7 of a score at most, which is 5e-6, as they go down to -100.
TOLERANCE = {"rtol": 1e-6, "atol": 0.0}
BORDER = 360  # tokens of the longest example in the short RoPE regime; a picture of one crop has 313
LABELS = ("red", "a red circle", "no", "blue, or so they say")
LONG = "is the color of the circle in this picture red or is it blue, and "


@pytest.fixture(scope="module")
def processor(tiny_checkpoint_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_checkpoint_dir)


@pytest.fixture
def model(tiny_checkpoint_dir: Path) -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pictures")
    for name, (width, height) in {"square": (64, 64), "wide": (100, 40), "tall": (40, 90)}.items():
        pixels = np.random.default_rng(len(name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return lambda name: str(folder / f"{name}.png")


@pytest.fixture(scope="module")
def prompts(picture: Any) -> list[Example]:
    def ask(*turns: tuple[str, str, str | None]) -> Example:
        """Turns as (images, user, assistant)."""
        return Example(
            id="x",
            turns=tuple(
                Turn(user=user, assistant=reply, images=tuple(map(picture, shown.split())))
                for shown, user, reply in turns
            ),
        )

    return [
        ask(("square", "what color", None)),
        ask(("square", "is the shape a circle", None)),
        ask(("square", "z" * 28, None)),  # the labels lie on both sides of the border
        ask(("square", "what color", None)),  # the same question once more
        ask(("wide", LONG * 2, None)),  # the only question on its page
        ask(("wide tall", "which one is red", None)),
        ask(("wide tall", "which one is round", None)),
        ask(("tall", "what is this", "a circle"), ("square", "and <|image_2|> this", None)),
        ask(("tall", "what is this", "a circle"), ("", "is it red", "yes, it is"), ("wide square", "same?", None)),
        ask(("", "answer briefly", None)),
    ]


def one_by_one(
    model: Any, processor: Phi3VProcessor, prompts: Sequence[Example], labels: Sequence[str]
) -> torch.Tensor:
    """[P, L]: one forward pass of plain text and pictures for every prompt with every label."""
    model.eval()

    def score(prompt: Example, label: str) -> float:
        text = processor.apply_chat_template(messages(prompt), add_generation_prompt=True)
        asked = processor(text, list(prompt.images) or None)["input_ids"].shape[1]
        inputs = processor(f"{text}{label}<|end|>", list(prompt.images) or None)
        with torch.no_grad():
            log_probs = model(**inputs).logits[0, asked - 1 : -1].double().log_softmax(-1)
        return float(log_probs.gather(1, inputs["input_ids"][0, asked:, None]).sum())

    return torch.tensor([[score(prompt, label) for label in labels] for prompt in prompts], dtype=torch.float64)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint_dir: Path, processor, prompts) -> torch.Tensor:
    torch.set_num_threads(1)
    model = Phi3VForCausalLM.from_pretrained(tiny_checkpoint_dir, dtype=torch.float32)
    return one_by_one(model, processor, prompts, LABELS)


def how(processor: Phi3VProcessor, tokens: int = 10**6, shared: bool = True) -> dict[str, Any]:
    return {
        "limits": PackLimits(
            max_tokens_per_pack=tokens, max_crops_per_pack=10**6, original_max=BORDER, share_prefix=shared
        ),
        "reading": Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops),
        "dtype": torch.float32,
        "progress": False,
    }


@pytest.mark.parametrize(
    ("tokens", "shared"), [(10**6, True), (450, True), (10**6, False)], ids=["one pack", "several", "nothing shared"]
)
def test_scores_are_those_of_separate_forwards(model, processor, prompts, expected, tokens: int, shared: bool) -> None:
    model.train()
    found = score_labels(model, processor, prompts, LABELS, **how(processor, tokens, shared))
    assert model.training
    torch.testing.assert_close(found, expected, **TOLERANCE)
    lengths = [encode(prompts[2], processor).tokens + len(ids) for ids in label_tokens(LABELS, processor)]
    assert min(lengths) <= BORDER < max(lengths), "labels of one question in both RoPE regimes"


def test_scores_under_adapters_are_those_of_separate_forwards(model, processor, prompts) -> None:
    torch.manual_seed(1)
    model = add_lora(model, rank=4, alpha=8.0, dropout=0.5, init="gaussian", dora=False, rslora=False, frozen=())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = one_by_one(model, processor, prompts[3:6], LABELS)
    model.train()  # as in the middle of training
    torch.testing.assert_close(
        score_labels(model, processor, prompts[3:6], LABELS, **how(processor)), expected, **TOLERANCE
    )


class Mute(Ranks):
    """One of several ranks that hears nothing of the others."""

    def total(self, *values: float) -> list[float]:
        return list(values)


def test_the_sum_over_ranks_is_the_whole(model, processor, prompts, expected) -> None:
    parts = [
        score_labels(model, processor, prompts, LABELS, ranks=Mute(rank=rank, num=3), **how(processor, 800))
        for rank in range(3)
    ]
    torch.testing.assert_close(sum(parts), expected, **TOLERANCE)
    scorers = sum((part != 0).int() for part in parts)
    assert bool((scorers == 1).all()), "every label is scored by one rank"
    assert all(bool((part != 0).any()) for part in parts)


def test_scoring_leaves_off_between_packs(model, processor, prompts) -> None:
    asked = iter([False, True])
    with pytest.raises(Stopped):
        score_labels(model, processor, prompts, LABELS, leave_off=lambda: next(asked), **how(processor, 450))


@pytest.mark.parametrize("tokenizer", ["tiny_processor_dir", "real_tokenizer_dir"])
def test_label_tokens_are_those_of_training(tokenizer: str, request: pytest.FixtureRequest) -> None:
    processor = Phi3VProcessor.from_pretrained(request.getfixturevalue(tokenizer))
    labels = ["Yes.", " a red circle ", "naïve 日本", "1,000", "\n\nno", "ApplyEyeMakeup"]
    for label, ids in zip(labels, label_tokens(labels, processor), strict=True):
        answered = encode(Example(id="x", turns=(Turn(user="which?", assistant=label),)), processor)
        learnt = answered.ids[answered.loss_mask].tolist()
        rest = [*processor.token_ids("<|end|>\n"), processor.end_of_text_id][1:]
        assert learnt == [*ids.tolist(), *rest]
        assert ids[-1] == processor.stop_token_ids[0]


def prompt_of(page: int, num_image_ids: int, question: int) -> Encoded:
    """A prompt on a page of so many ids; `num_image_ids` 0 is text only."""
    ids = np.concatenate([np.full(num_image_ids, page), np.arange(question)]).astype(np.int32)
    return Encoded(
        ids=ids,
        loss_mask=np.zeros(len(ids), dtype=np.bool_),
        prefix=num_image_ids,
        images=(),
        image_sizes=(),
        id="",
        where="",
    )


PAGES = st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1)


@given(PAGES, st.integers(2, 5))
def test_the_cheaper_sharing_is_chosen(pages: list[tuple[int, list[int]]], num_labels: int) -> None:
    """Tokens of all trees, counted on the trees themselves: per page the lesser of the two ways."""
    endings = [np.arange(n, dtype=np.int32) for n in range(1, num_labels + 1)]
    limits = PackLimits(max_tokens_per_pack=10**6, max_crops_per_pack=10**6)

    def tokens(prompts: Sequence[Encoded]) -> int:
        lengths = Lengths.of(Branches(prompts, endings))
        return sum(t.tokens for t in make_trees(np.arange(len(lengths)), np.zeros(len(lengths)), lengths, limits))

    expected, everything = 0, []
    for number, (shared, questions) in enumerate(pages):
        distinct = sorted(set(questions))  # equal ones would be one tree
        prompts = [prompt_of(number, shared, question) for question in distinct]
        expected += min(tokens(prompts), tokens([replace(prompt, prefix=len(prompt.ids)) for prompt in prompts]))
        everything += prompts
    texts = [shared for shared, _ in pages].count(0)
    assert tokens(share(everything, num_labels)) == expected or texts > 1  # equal texts become one tree, too


def test_branches_are_made_in_order() -> None:
    branches = Branches([prompt_of(0, 3, 2), prompt_of(1, 3, 4)], [np.array([7, 8], np.int32), np.array([9], np.int32)])
    assert [len(branch.ids) for branch in branches] == [7, 6, 9, 8]
    assert [branch.ids[branch.loss_mask].tolist() for branch in branches] == [[7, 8], [9]] * 2


def conversations(*answers: str | None) -> list[Example]:
    return [Example(id="x", turns=(Turn(user="?", assistant=text),)) for text in answers]


def test_closed_answers() -> None:
    assert closed_answers(conversations("yes", "No.", "yes", "No.")) == ("No.", "yes")
    assert closed_answers(conversations("Yes", "yes.", " yes.", "no", "no", None)) == ("no", "yes.")
    assert closed_answers(conversations("yes", "no", "maybe")) is None, "free text: every answer is its own"
    assert closed_answers(conversations("yes", "yes")) is None
    assert closed_answers(conversations(*map(str, range(101)), *map(str, range(101)))) is not None
    assert closed_answers(conversations(*map(str, range(102)), *map(str, range(102)))) is None
    assert closed_answers([]) is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes"], "--labels needs at least 2 labels, got 1"),
        (["yes", " "], "--labels: a label is empty"),
        (["yes", "no", "Yes."], "--labels: 'yes' and 'Yes.' are the same answer"),
        (["yes", "yes"], "--labels: 'yes' and 'yes' are the same answer"),
        (["yes", "<|image_1|>"], "an answer cannot hold an image tag"),
    ],
)
def test_labels_that_cannot_compete_are_refused(labels: list[str], message: str, processor) -> None:
    with pytest.raises(InputError) as error:
        label_tokens(labels, processor)
    assert message in str(error.value)


def test_images_in_several_turns_are_evaluated(model, processor, picture, tmp_path: Path) -> None:
    """The original fails: its image tags begin anew in every turn, while its images accumulate."""
    turns = [
        {"images": ["tall.png"], "user": "<|image_1|>\nwhat is this", "assistant": "a circle"},
        {"images": ["wide.png", "square.png"], "user": "<|image_1|> or <|image_2|>", "assistant": "no"},
        {"user": "is it red", "assistant": "red"},
    ]
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"id": "a", "conversations": turns}))
    asked = read_questions(file, Path(picture("tall")).parent)
    said = answer(model, processor, asked, max_new_tokens=8, **how(processor))
    assert [len(line["images"]) for line in said] == [1, 3, 3]
    assert [line["answers"] for line in said] == [["a circle"], ["no"], ["red"]]
    model.eval()
    for prompt, line in zip(asked, said, strict=True):
        inputs = processor(
            processor.apply_chat_template(messages(prompt), add_generation_prompt=True), list(prompt.images)
        )
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=list(processor.stop_token_ids))
        text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line["prediction"] == text.strip()
    torch.testing.assert_close(
        score_labels(model, processor, asked, LABELS, **how(processor)),
        one_by_one(model, processor, asked, LABELS),
        **TOLERANCE,
    )
