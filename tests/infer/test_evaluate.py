"""Answers to a data set: the same from the loop, from a run folder and from a model folder, and never over a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import phi3v
from phi3v.base.errors import InputError
from phi3v.data.image import load_image
from phi3v.data.schema import read_jsonl
from phi3v.infer import answering
from phi3v.infer.answering import Loading, Packing, evenly, model_folder, read_questions
from phi3v.infer.chat import chat
from phi3v.infer.demo import load_speakers
from phi3v.infer.evaluate import evaluate
from phi3v.model.loading import load_model

FP32 = Loading(dtype="fp32")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_run_and_its_model_answer_as_the_run_did_at_its_end(
    finished_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    expected = json.loads((finished_run / "metrics.json").read_text())["final"]
    del expected["loss"]
    flags = {"data": tiny_data, "max_new_tokens": 6, "loading": FP32, "progress": False}
    assert evaluate(str(finished_run), out=tmp_path / "run", **flags) == expected
    assert evaluate(str(finished_run / "final"), out=tmp_path / "model", **flags) == expected
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == expected
    assert records(tmp_path / "run") == records(tmp_path / "model") == records(finished_run)


def test_answers_are_those_of_generate(tiny_checkpoint_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    flags = {"max_new_tokens": 6, "loading": FP32, "progress": False}
    evaluate(str(tiny_checkpoint_dir), data=tiny_data, out=tmp_path, **flags)
    model, processor = load_model(tiny_checkpoint_dir)
    for record in records(tmp_path):
        images = [load_image(path) for path in record["images"]]
        if record["id"].startswith("e13"):
            continue  # of two turns
        text = processor.apply_chat_template(
            [{"role": "user", "content": ("<|image_1|>\n" if images else "") + record["user"]}],
            add_generation_prompt=True,
        )
        inputs = processor(text, images or None)
        with torch.no_grad():
            out = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record["prediction"] == said.strip()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "auto"])
def test_a_precision_is_computed_on_any_machine(
    dtype: str, scripted_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The scripted model answers the same in every precision."""
    evaluate(str(scripted_model_dir), data=tiny_data, out=tmp_path, loading=Loading(dtype=dtype), progress=False)
    said = {record["user"]: record["prediction"] for record in records(tmp_path)}
    assert (said["what is the color"], said["what is this"], said["and is it blue"]) == ("blue", "a red picture", "no")


def test_every_answered_turn_is_a_question_with_its_history(tiny_data: Path) -> None:
    questions = read_questions(tiny_data, None)
    assert len(read_jsonl(tiny_data)) == 14
    assert [question.id for question in questions[-2:]] == ["e13#1", "e13#2"]
    assert [len(question.turns) for question in questions[-2:]] == [1, 2]
    assert questions[-1].answers == ("no",)
    assert len(questions) == 15


def test_a_limit_spreads_evenly() -> None:
    items = list(range(10))
    assert evenly(items, 3) == [0, 3, 6]  # type: ignore[arg-type, comparison-overlap]
    assert evenly(items, 10) == evenly(items, 99) == evenly(items, None) == items  # type: ignore[arg-type, comparison-overlap]


def test_results_go_beside_the_model_by_default(finished_run: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    evaluate(str(run), data=tiny_data, limit=4, max_new_tokens=6, loading=FP32)
    assert len(records(run / "evaluation/train")) == 4
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert "questions       4" in said


def test_files_of_one_name_do_not_replace_each_others_answers(
    scripted_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(scripted_model_dir, model := tmp_path / "model")
    lines = tiny_data.read_text().splitlines(keepends=True)
    for name, some in {"a": lines[:3], "b": lines[3:5]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(some))
    flags: dict = {"image_root": tiny_data.parent / "images", "max_new_tokens": 6, "loading": FP32, "progress": False}
    for name in ("a", "b", "a", "b"):
        evaluate(str(model), data=tmp_path / name / "test.jsonl", **flags)
    first, second = sorted((model / "evaluation").iterdir())
    assert (first.name, second.name[:5], len(second.name)) == ("test", "test-", 13)
    assert [len(records(folder)) for folder in (first, second)] == [3, 2]
    with pytest.raises(InputError, match=r"--out .*test holds the answers to another file: choose another folder"):
        evaluate(str(model), data=tmp_path / "b/test.jsonl", out=first, **flags)
    evaluate(str(model), data=tmp_path / "a/test.jsonl", out=first, **flags)


def test_a_run_is_not_written_over(finished_run: Path, tiny_data: Path) -> None:
    before = (finished_run / "metrics.json").read_bytes()
    with pytest.raises(InputError, match=r"--out .*finished holds a run or a model: choose another folder"):
        evaluate(str(finished_run), data=tiny_data, out=finished_run)
    assert (finished_run / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"limit": 0}, "--limit 0: must be at least 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be at least 1"),
        ({"packing": Packing(num_workers=-1)}, "--num-workers -1: must be at least 0"),
    ],
)
def test_flags_are_checked(flags: dict, message: str, finished_run: Path, tiny_data: Path) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(str(finished_run), data=tiny_data, **flags)


def test_an_unfinished_run_has_no_model_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        InputError, match=r"is an unfinished run: finish it with `phi3v train \.\.\. --out .* --resume auto`"
    ):
        model_folder(tmp_path)


def test_float32_arithmetic_is_float32_also_for_half_weights(
    changed_model, tiny_model_dir: Path, tiny_data: Path, monkeypatch
) -> None:
    """A CPU without bf16 would take a hundred times as long, and the answers would be rounded."""
    halves = {name: tensor.bfloat16() for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    folder = changed_model({"torch_dtype": "bfloat16"}, halves)
    seen = []

    def answer(model, *arguments, dtype, **named):
        seen.append((dtype, {p.dtype for p in model.parameters()}))
        return real(model, *arguments, dtype=dtype, **named)

    real = answering.answer
    monkeypatch.setattr(answering, "answer", answer)
    evaluate(str(folder), data=tiny_data, limit=1, max_new_tokens=2, loading=FP32, progress=False)
    assert seen == [(torch.float32, {torch.float32})]


def test_a_run_of_an_earlier_version_answers(old_run: Path, tiny_data: Path) -> None:
    assert evaluate(str(old_run), data=tiny_data, limit=2, max_new_tokens=6, progress=False)["questions"] == 2
    chat(str(old_run), "what is this", max_new_tokens=6)
    _, base = load_speakers(str(old_run), "base")
    assert base.title == json.loads((old_run / "config.json").read_text())["base"]["model"]


def test_a_model_is_asked_in_two_lines(scripted_model_dir: Path, tiny_data: Path, tower_calls: list[int]) -> None:
    images = tiny_data.parent / "images"
    model = phi3v.load(scripted_model_dir)
    assert model.ask(images / "red.png", "what is the color") == "blue"
    assert model.ask(None, "answer briefly") == "yes"
    assert model.ask([str(images / "red.png"), images / "blue.png"], "what is this") == "a red picture"
    tower_calls.clear()
    pairs = [(images / "red.png", "what is the color"), (None, "answer briefly"), (images / "red.png", "what is this")]
    assert model.ask_all(pairs, max_new_tokens=9) == ["blue", "yes", "a red picture"]
    assert sum(tower_calls) == 1, "the image is encoded once"
    with pytest.raises(InputError, match=r"gone\.png: no such image"):
        model.ask("gone.png", "what is this")
