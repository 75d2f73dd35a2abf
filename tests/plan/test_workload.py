"""What a plan is made for: known lengths of the recipes, counted ones of other data, and sizes of models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phi3v.base.errors import InputError
from phi3v.data.encode import Example, Turn, encode
from phi3v.plan.workload import KNOWN, PUBLISHED, EstimatingProcessor, find_config, find_processor, known_lengths
from phi3v.recipes import easy_vqa


@pytest.mark.parametrize("name", KNOWN)
def test_known_lengths_are_of_as_many_pages_and_questions(name: str) -> None:
    known = KNOWN[name]
    lengths = known_lengths(known, 16)
    assert (len(lengths), lengths.num_pages) == (known.examples, known.pages)
    assert np.bincount(lengths.page).min() >= known.examples // known.pages
    assert (lengths.tokens - lengths.prefix > lengths.num_targets).all()


def test_a_page_of_docvqa_is_a_letter() -> None:
    lengths = known_lengths(KNOWN["docvqa"], 16)
    assert set(lengths.prefix) == {2509 + 4}
    assert set(lengths.crops) == {17}
    assert set(known_lengths(KNOWN["docvqa"], 4).crops) == {5}


def test_a_frames_tokens_are_those_of_the_recipe() -> None:
    assert set(known_lengths(KNOWN["ucf101"], 4).prefix) == {8 * 757 + 11}


def test_texts_are_estimated_and_images_count_as_they_are() -> None:
    turn = Turn(user="what is it", assistant="a dog", images=("one.png", "two.png"))
    encoded = encode(Example(id="1", turns=(turn,)), EstimatingProcessor(4), lambda image: (672, 672))  # type: ignore[arg-type]
    assert encoded.crops == 2 * 5
    assert encoded.tokens - encoded.prefix_tokens == pytest.approx(15, abs=5)
    assert encoded.prefix_tokens == pytest.approx(2 * 757, abs=8)


def test_sizes_of_the_published_models_are_known_without_them() -> None:
    for name in PUBLISHED:
        config = find_config(name)
        assert (config.hidden_size, config.num_hidden_layers, config.clip["num_hidden_layers"]) == (3072, 32, 24)
    assert find_config(str(easy_vqa.MODEL)).hidden_size == easy_vqa.DECODER["hidden_size"]


def test_sizes_and_tokenizer_of_a_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert find_config(str(tiny_model_dir)).hidden_size == 32
    assert find_processor(str(tiny_model_dir), 3).num_crops == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        find_processor(str(tmp_path / "empty"), None)


def test_a_tokenizer_that_is_not_here_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: object, **hub: object) -> str:
        assert hub["local_files_only"]
        raise OSError("not here")

    monkeypatch.setattr("phi3v.data.processor.snapshot_download", fetch)
    for model, num_crops in PUBLISHED.items():
        assert find_processor(model, None).num_crops == num_crops
