from __future__ import annotations

import json
import pickle
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerFast

from phi3v.base.errors import InputError
from phi3v.data.image import ImageRules
from phi3v.data.processor import IMAGE_TAG, Phi3VProcessor, expand

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "tokenizer" / "cases.json").read_text())
IMAGES = [GOLDEN / "images" / f"{name}.png" for name in CASES["image_files_in_order"]]
RUNS = [
    pytest.param(case, run, id=f"{kind}{number}-nc{run['num_crops']}")
    for kind in ("chats", "raw_image_prompts")
    for number, case in enumerate(CASES[kind])
    for run in case["runs"]
]


@pytest.fixture(scope="module")
def real(real_tokenizer_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(real_tokenizer_dir)


@pytest.fixture(scope="module")
def tiny(tiny_processor_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_processor_dir)


# --- against the original -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["texts"], ids=lambda case: repr(case["text"])[:24])
def test_golden_texts(real: Phi3VProcessor, case: dict[str, Any]) -> None:
    assert real.tokenizer(case["text"])["input_ids"] == case["ids"]
    assert real.decode(case["ids"]) == case["decoded"]
    assert real.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]
    if "<|image" in case["text"]:  # on purpose: without images the original took these for plain text
        with pytest.raises(InputError):
            real(case["text"])
    else:
        assert real.token_ids(case["text"]) == case["ids_no_special"]
        assert real(case["text"])["input_ids"].tolist() == [case["ids"]]


@pytest.mark.parametrize("case", CASES["chats"], ids=lambda case: repr(case["text"])[:40])
@pytest.mark.parametrize("which", ["tiny", "real"])
def test_golden_chat_template(which: str, request: pytest.FixtureRequest, case: dict[str, Any]) -> None:
    processor = request.getfixturevalue(which)
    text = processor.apply_chat_template(case["messages"], add_generation_prompt=case["add_generation_prompt"])
    assert text == case["text"]


@pytest.mark.parametrize(("case", "run"), RUNS)
def test_golden_prompts(real: Phi3VProcessor, case: dict[str, Any], run: dict[str, Any]) -> None:
    processor = Phi3VProcessor(real.tokenizer, num_crops=run["num_crops"])
    images = IMAGES[: run["n_images"]]
    numbers = [int(number) for number in IMAGE_TAG.findall(case["text"])]
    if numbers != sorted(numbers):  # on purpose: the original filled descending tags in image order
        with pytest.raises(InputError, match="2 image tags \\(2, 1\\), 2 images were given"):
            processor(case["text"], images)
        return
    batch = processor(case["text"], images)
    golden = list(chain.from_iterable([number] * count for number, count in run["ids_rle"]))
    assert len(golden) == run["length"]
    assert batch["input_ids"].tolist() == [[32044 if number < 0 else number for number in golden]]
    assert batch["attention_mask"].all()
    if images:
        assert batch["image_sizes"].tolist() == run["image_sizes"]
        assert list(batch["pixel_values"].shape) == run["pixel_values_shape"]
    else:
        assert "pixel_values" not in batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_golden_padding(real: Phi3VProcessor, side: str) -> None:
    case = CASES[f"text_batch_{side}_pad"]
    batch = real(case["texts"], padding=True, padding_side=side)
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert batch["attention_mask"].tolist() == case["attention_mask"]


def test_special_ids(real: Phi3VProcessor) -> None:
    assert (real.bos_token_id, real.image_token_id, real.pad_token_id) == (1, 32044, 32000)
    assert real.stop_token_ids == (32007, 32000)
    assert real.batch_decode([[1, 22172], [1, 7251]], skip_special_tokens=True) == ["hello", "hi"]


# --- properties, with any tokenizer -----------------------------------------------------------------------------------


def picture(width: int, height: int, color: int = 0) -> Image.Image:
    return Image.new("RGB", (width, height), (color, color, color))


def test_batch_is_its_prompts_one_by_one(tiny: Phi3VProcessor) -> None:
    texts = ["<|image_1|>\nwhat is this", "no picture", "<|image_1|> and\n<|image_2|>?"]
    images = [[picture(40, 30, 9)], None, [picture(30, 70, 50), picture(500, 90, 99)]]
    batch = tiny(texts, images, padding=True, padding_side="left")
    alone = [tiny(text, image) for text, image in zip(texts, images, strict=True)]
    for ids, mask, one in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        assert torch.equal(ids[mask.bool()], one["input_ids"][0])
        assert torch.equal(mask, mask.sort().values)
        assert (ids[~mask.bool()] == tiny.pad_token_id).all()
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in alone if name in one]))
    lists = tiny(texts, images, return_tensors=None)
    assert lists["input_ids"] == [one["input_ids"][0].tolist() for one in alone]


def test_number_of_image_ids_is_number_of_vectors(tiny: Phi3VProcessor) -> None:
    batch = tiny("<|image_1|>", picture(640, 480))
    assert batch["image_sizes"].tolist() == [[672, 672]]
    assert (batch["input_ids"] == tiny.image_token_id).sum() == 757


@pytest.mark.parametrize("which", ["tiny", "real"])
def test_cut_before_special_tokens_changes_nothing(which: str, request: pytest.FixtureRequest) -> None:
    processor = request.getfixturevalue(which)
    rng = np.random.default_rng(0)
    parts = [" ", "\n", "what", " is", "é", "▁", "\t", "<|image_1|>", "yes no", "\u3000", "\x1c", "<|"]
    specials = ["<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>", "</s>", "<s>", "<|placeholder1|>"]
    for _ in range(300):
        pieces = ["".join(rng.choice(parts, size=rng.integers(0, 4))) for _ in range(4)]
        pieces[1:] = [rng.choice(specials) + piece for piece in pieces[1:]]
        joined = [number for piece in pieces for number in processor.token_ids(piece)]
        assert processor.token_ids("".join(pieces)) == joined


def test_truncation_left_behind_does_not_cut(tiny: Phi3VProcessor) -> None:
    whole = tiny.token_ids("what is the color")
    tiny.tokenizer(["what is the color"], truncation=True, max_length=3, padding="max_length")
    assert tiny.token_ids("what is the color") == whole


@pytest.mark.parametrize(
    ("text", "num_images", "message"),
    [
        ("<|image_1|><|image_2|>", 3, "prompt has 2 image tags (1, 2), 3 images were given"),
        ("<|image_1|>", 0, "prompt has 1 image tags (1), 0 images were given"),
        ("nothing", 1, "prompt has 0 image tags, 1 images were given"),
        ("<|image_2|><|image_1|>", 2, "prompt has 2 image tags (2, 1), 2 images were given"),
        ("<|image_1|><|image_1|>", 2, "prompt has 2 image tags (1, 1), 2 images were given"),
        ("<|image_0|>", 1, "prompt has 1 image tags (0), 1 images were given"),
        ("a <|image|> b", 0, "literal <|image|>"),
    ],
)
def test_tags_against_images(tiny: Phi3VProcessor, text: str, num_images: int, message: str) -> None:
    with pytest.raises(InputError) as error:
        tiny(text, [picture(8, 8)] * num_images)
    assert message in str(error.value)


def test_misuse(tiny: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match="padding=True"):
        tiny(["a", "what is this"])
    with pytest.raises(InputError, match="2 prompts, 1 lists"):
        tiny(["a", "b"], [[picture(8, 8)]])
    for num_crops in (0, 10**9, "4", 4.5, None):
        with pytest.raises(InputError, match=rf"num_crops is {num_crops!r}, it must be a whole number from 1 to 1024"):
            Phi3VProcessor(tiny.tokenizer, num_crops=num_crops)


def test_image_items_become_tags(tiny: Phi3VProcessor, tmp_path: Path) -> None:
    path = tmp_path / "b.png"
    picture(8, 8, 200).save(path)
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": picture(8, 8)}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "red"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and "},
                {"type": "image", "path": path},
                {"type": "image", "image": picture(8, 8)},
                {"type": "text", "text": "?"},
            ],
        },
    ]
    text = (
        "<|user|>\n<|image_1|>\nwhat<|end|>\n<|assistant|>\nred<|end|>\n"
        "<|user|>\nand <|image_2|><|image_3|>\n?<|end|>\n<|assistant|>\n"
    )
    assert tiny.apply_chat_template(conversation, add_generation_prompt=True) == text
    batch = tiny.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
    expected = tiny(text, [picture(8, 8), path, picture(8, 8)])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert tiny.apply_chat_template([conversation, conversation], add_generation_prompt=True) == [text, text]
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    given = tiny.apply_chat_template(bare, tokenize=True, images=path)
    assert torch.equal(given["pixel_values"], expected["pixel_values"][1:2])


# --- files ------------------------------------------------------------------------------------------------------------


def same_files(a: Path, b: Path) -> bool:
    return {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_save_and_load_are_inverse(tiny_processor_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_processor_dir, source)
    settings = {"auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"}, "num_crops": 4, "mine": [1]}
    (source / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (source / "processing_phi3_v.py").write_text("raise SystemExit('never run')\n")
    Phi3VProcessor.from_pretrained(source).save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "processor_config.json").exists()
    (tmp_path / "same" / "processor_config.json").unlink()
    assert same_files(source, tmp_path / "same")

    changed = Phi3VProcessor.from_pretrained(source, num_crops=16)
    changed.save_pretrained(tmp_path / "changed")
    assert json.loads((tmp_path / "changed" / "preprocessor_config.json").read_text()) == settings | {"num_crops": 16}
    assert Phi3VProcessor.from_pretrained(tmp_path / "changed").num_crops == 16
    upright = Phi3VProcessor.from_pretrained(source, exif_orientation="apply")
    upright.save_pretrained(tmp_path / "upright")
    rules = {"exif_orientation": "apply"}
    assert json.loads((tmp_path / "upright" / "preprocessor_config.json").read_text()) == settings | rules
    again = Phi3VProcessor.from_pretrained(tmp_path / "upright", exif_orientation="ignore")
    assert again.rules == ImageRules()
    again.save_pretrained(tmp_path / "upright")
    assert Phi3VProcessor.from_pretrained(tmp_path / "upright").rules == ImageRules()
    (tmp_path / "upright" / "preprocessor_config.json").write_text('{"image_colors": "pale"}')
    with pytest.raises(InputError, match=r"preprocessor_config.json: image_colors: must be published, visible, not"):
        Phi3VProcessor.from_pretrained(tmp_path / "upright")


def test_save_of_a_tokenizer_that_was_not_loaded_or_was_changed(tiny_processor_dir: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_processor_dir)
    Phi3VProcessor(tokenizer, num_crops=2).save_pretrained(tmp_path / "fresh")
    fresh = Phi3VProcessor.from_pretrained(tmp_path / "fresh")
    text = "<|user|>\n what is the color <|end|>\n"
    assert fresh.num_crops == 2
    assert fresh.token_ids(text) == Phi3VProcessor(tokenizer).token_ids(text)
    assert fresh.tokenizer.chat_template == tokenizer.chat_template
    fresh.tokenizer.add_tokens(["turquoise"])
    fresh.save_pretrained(tmp_path / "changed")
    again = Phi3VProcessor.from_pretrained(tmp_path / "changed")
    assert len(again.token_ids("turquoise")) < len(Phi3VProcessor(tokenizer).token_ids("turquoise"))


def test_published_files_stay_published(real: Phi3VProcessor, real_tokenizer_dir: Path, tmp_path: Path) -> None:
    real.save_pretrained(tmp_path)
    for file in real_tokenizer_dir.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["num_crops"] == 4


def test_pickle(tiny: Phi3VProcessor) -> None:
    again = pickle.loads(pickle.dumps(tiny))
    assert again.token_ids("what is") == tiny.token_ids("what is")


def test_bad_folders(tiny_processor_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        Phi3VProcessor.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no tokenizer.json"):
        Phi3VProcessor.from_pretrained(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_processor_dir, broken)
    (broken / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"broken/preprocessor_config.json"):
        Phi3VProcessor.from_pretrained(broken)
    (broken / "preprocessor_config.json").unlink()
    assert Phi3VProcessor.from_pretrained(broken).num_crops == 4
    content = (broken / "tokenizer.json").read_text()
    (broken / "tokenizer.json").write_text(content.replace("<|image|>", "<|picture|>"))
    with pytest.raises(InputError, match=r"broken: no token <\|image\|>"):
        Phi3VProcessor.from_pretrained(broken)
    (broken / "tokenizer.json").write_text(content[:1000])
    with pytest.raises(InputError, match=r"broken/tokenizer.json"):
        Phi3VProcessor.from_pretrained(broken)


def test_expand() -> None:
    assert expand([1, 7, 1, 7, 3], 7, [2, 3]).tolist() == [1, 7, 7, 1, 7, 7, 7, 3]
    assert expand([1, 3], 7, []).tolist() == [1, 3]
    with pytest.raises(ValueError):
        expand([1, 7, 7], 7, [2, 2, 2])


def test_auto_processor_finds_it_and_runs_no_code(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "processing_phi3_v.py").write_text("raise SystemExit('remote code was run')")
    for options in ({}, {"trust_remote_code": False}, {"num_crops": 3}):
        found = AutoProcessor.from_pretrained(folder, **options)
        assert type(found) is Phi3VProcessor
        assert found.num_crops == options.get("num_crops", 1)
