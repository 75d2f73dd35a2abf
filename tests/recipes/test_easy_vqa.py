"""The embedded recipe, on the real package: its data, its baselines, its tokenizer and its checkpoint."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.pool import forked_map
from phi3v.base.runfolder import RunFolder
from phi3v.data.encode import encode, questions
from phi3v.data.schema import read_jsonl
from phi3v.infer.metrics import baselines
from phi3v.recipes import easy_vqa, find_recipe

package = pytest.importorskip("easy_vqa", reason="easy-VQA is not installed: pip install 'phi3v[easy-vqa]'")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the recipe was prepared."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("work")
    os.chdir(folder)
    try:
        easy_vqa.prepare(easy_vqa.settings())
    finally:
        os.chdir(before)
    return folder / easy_vqa.FOLDER


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(prepared / "model")


def test_recipe_is_found_by_its_name() -> None:
    assert find_recipe("easy-vqa") is find_recipe("easy_vqa") is easy_vqa
    with pytest.raises(InputError, match="no recipe easy-vqs: did you mean easy-vqa"):
        find_recipe("easy-vqs")
    with pytest.raises(InputError, match=r"no recipe x: the recipes are .*easy-vqa"):
        find_recipe("x")


def test_settings_are_a_run_that_checks(tmp_path: Path) -> None:
    run = easy_vqa.settings()
    run.check()
    (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
    assert RunFolder(tmp_path).config == run


def test_published_split(prepared: Path) -> None:
    train, test = read_jsonl(prepared / "train.jsonl"), read_jsonl(prepared / "test.jsonl")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({example.images for example in train}) == 4_000
    assert len({example.images for example in test}) == 1_000
    assert {example.answers[0] for example in test} == set(package.get_answers())
    assert len({example.id for example in [*train, *test]}) == 48_248
    first = json.loads((prepared / "train.jsonl").read_text().splitlines()[0])
    assert first == {
        "id": "train-0",
        "source": "easy_vqa",
        "conversations": [{"images": ["train/0.png"], "user": "what is the blue shape?", "assistant": "rectangle"}],
    }


@pytest.mark.parametrize(("split", "paths"), [("train", "get_train_image_paths"), ("test", "get_test_image_paths")])
def test_images_are_those_of_the_package(prepared: Path, split: str, paths: str) -> None:
    originals = getattr(package, paths)()
    folder = prepared / "images" / split
    assert {path.name for path in folder.iterdir()} == {f"{number}.png" for number in originals}
    for number in list(originals)[::97]:
        copy = folder / f"{number}.png"
        assert not copy.is_symlink()
        assert copy.read_bytes() == Path(originals[number]).read_bytes()


def test_baselines_of_the_published_split(prepared: Path) -> None:
    train, test = read_jsonl(prepared / "train.jsonl"), read_jsonl(prepared / "test.jsonl")
    scores = baselines(train, [question for example in test for question in questions(example)])
    assert {name: round(100 * score, 1) for name, score in scores.items()} == {"majority": 37.3, "blind": 67.0}


def test_preparing_again_changes_nothing(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [*prepared.iterdir(), *(prepared / "model").iterdir()]}

    before = state()
    monkeypatch.chdir(prepared.parents[len(easy_vqa.FOLDER.parts) - 1])
    run = easy_vqa.settings()
    assert easy_vqa.prepare(run) == run
    assert state() == before
    assert capsys.readouterr().out == ""


def test_a_run_with_its_own_data_and_model_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    easy_vqa.prepare(Run())
    assert not list(tmp_path.iterdir())


class Few:
    """An easy-VQA of two images; the second one may be missing on the disk."""

    def __init__(self, folder: Path, *, broken: bool) -> None:
        self.paths = {0: str(folder / "a.png"), 1: str(folder / "b.png")}
        for path in list(self.paths.values())[: 1 if broken else 2]:
            Path(path).write_bytes(b"image")
        self.questions = (["red?", "big?"], ["yes", "no"], [0, 1])

    def __getattr__(self, name: str) -> Any:
        return lambda: self.paths if name.endswith("paths") else self.questions


def test_conversion_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", Few(tmp_path, broken=True))
    folder = tmp_path / "data" / "vqa"
    with pytest.raises(InputError, match=f"cannot write {re.escape(str(folder))}"):
        easy_vqa.convert(folder)
    assert [path.name for path in folder.parent.iterdir()] == [".vqa.lock"]

    leftover = folder.with_name(".vqa.unfinished")  # of a conversion that was killed
    leftover.mkdir()
    (leftover / "junk").touch()
    monkeypatch.setitem(sys.modules, "easy_vqa", Few(tmp_path, broken=False))
    list(forked_map(lambda _: easy_vqa.convert(folder), range(2), 2))  # both at once: one waits for the other
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        *("0.png", "0.png", "1.png", "1.png", "test.jsonl", "train.jsonl")
    ]
    assert not leftover.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        easy_vqa.convert(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError, match=r"pip install 'phi3v\[easy-vqa\]'"):
        easy_vqa.convert(tmp_path / "vqa")


# -- tokenizer -------------------------------------------------------------------------------------------------------


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 487
    for answer in package.get_answers():
        assert tokenizer.tokenize(answer) == [f"▁{answer}"]
    texts, _, _ = package.get_test_questions()
    for text in set(texts):
        words = re.findall(r"\w+|\?", text)
        assert len(tokenizer.tokenize(f"\n{text}")) == 2 + len(words)  # the newline is ▁ and a byte, as in the real one


def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    train, test = package.get_train_questions(), package.get_test_questions()
    texts = {*train[0], *train[1], *test[0], *test[1], "Grüße, 漢字!", "a  b\n\nc", "0123 ~"}
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_text_around_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<|user|>\nwhat is the blue shape?<|end|>\n<|assistant|>\nyes<|end|>\n<|endoftext|>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    # fmt: off
    assert tokens == [
        "<s>", "<|user|>", "▁", "<0x0A>", "what", "▁is", "▁the", "▁blue", "▁shape", "?", "<|end|>", "▁", "<0x0A>",
        "<|assistant|>", "▁yes", "<|end|>", "▁", "<0x0A>", "<|endoftext|>",
    ]
    # fmt: on


def test_pinned_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every version of transformers and tokenizers must build and read the same: weights depend on it."""
    assert tokenizer.encode("<|user|>\nwhat is the blue shape?") == [1, 452, 353, 13, 382, 387, 356, 437, 365, 289]
    assert tokenizer.encode("Gü </s>") == [1, 353, 297, 198, 191, 353, 2]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|end|>", "<|image|>")}
    assert ids == {"<|endoftext|>": 442, "<|end|>": 449, "<|image|>": 486}


def test_auto_tokenizer_reads_the_same(prepared: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    auto = AutoTokenizer.from_pretrained(prepared / "model")
    texts, _, _ = package.get_test_questions()
    for text in [*set(texts), "<|user|>\nhi<|end|>\n<|assistant|>\nyes", "Grüße </s> x"]:
        assert auto.encode(text) == tokenizer.encode(text)
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == ("<s>", "<|endoftext|>", "<|endoftext|>")
    assert json.loads((prepared / "model/tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_tokenizer_is_built_like_the_real_one(real_tokenizer_dir: Path, prepared: Path) -> None:
    real = json.loads((real_tokenizer_dir / "tokenizer.json").read_text())
    ours = json.loads((prepared / "model/tokenizer.json").read_text())
    for key in ("normalizer", "pre_tokenizer", "decoder", "truncation", "padding"):
        assert ours[key] == real[key], key
    for key in ("single", "pair", "special_tokens"):
        assert ours["post_processor"][key] == real["post_processor"][key]
    for key in ("type", "unk_token", "fuse_unk", "byte_fallback", "dropout"):
        assert ours["model"][key] == real["model"][key], key

    def without_id(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in token.items() if key != "id"} for token in tokens]

    assert without_id(ours["added_tokens"]) == without_id(real["added_tokens"])  # the same tokens, flags and order
    bytes_of = [
        {token: number for token, number in one["model"]["vocab"].items() if token.startswith("<0x")}
        for one in (ours, real)
    ]
    assert bytes_of[0] == bytes_of[1]

    template = json.loads((real_tokenizer_dir / "tokenizer_config.json").read_text())["chat_template"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(prepared / "model")
    messages = [{"role": "system", "content": " a "}, {"role": "user", "content": "b"}]
    for turns in (messages, [*messages, {"role": "assistant", "content": "c"}]):
        for prompt in (True, False):
            texts = [
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, chat_template=one)
                for one in (template, None)
            ]
            assert texts[0] == texts[1]


def test_words_of_the_tokenizer_come_from_the_texts() -> None:
    tokenizer = easy_vqa.build_tokenizer(["\nsee the cat?", "cat", "the"])
    assert tokenizer.tokenize("the cat") == ["▁the", "▁cat"]
    assert tokenizer.tokenize("\nsee") == ["▁", "<0x0A>", "see"]
    assert isinstance(tokenizer.added_tokens_decoder[0], AddedToken)
    again = easy_vqa.build_tokenizer(["\nsee the cat?", "cat", "the"])
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


# -- checkpoint ------------------------------------------------------------------------------------------------------


def test_checkpoint_loads_and_answers_for_its_images(prepared: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(prepared / "model")
    model = Phi3VForCausalLM.from_pretrained(prepared / "model", dtype=torch.float32).eval()
    assert processor.num_crops == 1
    assert model.config.image_token_id == processor.image_token_id
    assert tuple(model.config.stop_token_ids) == tuple(processor.stop_token_ids)
    prompt = "<|user|>\n<|image_1|>\nwhat is the blue shape?<|end|>\n<|assistant|>\n"
    batch = processor(prompt, prepared / "images/train/0.png")
    with torch.inference_mode():
        logits = model(**batch).logits[0, -1]
    assert logits.shape == (model.config.vocab_size,)
    assert logits.isfinite().all()


def test_checkpoint_is_small_and_always_the_same(prepared: Path, tmp_path: Path) -> None:
    easy_vqa.build_checkpoint(tmp_path / "model", prepared / "train.jsonl")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (prepared / "model" / name).read_bytes(), name
    assert (tmp_path / "model/model.safetensors").stat().st_size < 40e6
    assert [path.name for path in tmp_path.glob(".*")] == [".model.lock"]


def test_building_leaves_the_random_state_alone(prepared: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    easy_vqa.build_checkpoint(tmp_path / "model", prepared / "train.jsonl")
    assert torch.equal(torch.rand(3), expected)


def test_examples_encode_to_few_tokens(prepared: Path) -> None:
    """A page has 313 image vectors, and a question with its answer fits in two dozen tokens."""
    processor = Phi3VProcessor.from_pretrained(prepared / "model")
    examples = read_jsonl(prepared / "train.jsonl")[:200]
    lengths = Counter[int]()
    for example in examples:
        encoded = encode(example, processor)
        answer = processor.tokenizer.encode(example.answers[0], add_special_tokens=False)
        ends = processor.tokenizer.encode("<|end|>\n<|endoftext|>", add_special_tokens=False)
        assert encoded.ids[encoded.loss_mask].tolist() == [*answer, *ends]
        lengths[encoded.tokens - 313] += 1
    assert max(lengths) <= 26
