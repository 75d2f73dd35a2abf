"""The command line: help, one line and status 2 for what a user can mend, and nothing lost."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phi3v import __version__
from phi3v.base.config import Run
from phi3v.base.runfolder import RunFolder
from phi3v.cli import COMMANDS, main, parse
from phi3v.model.loading import load_model
from phi3v.train import checkpoint


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with status 2; gives its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


def words_of(printed: str) -> str:
    """The text in tyro's boxes, on one line."""
    return " ".join(re.sub("[─│╭╮╰╯•]", " ", printed).split())


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        return words_of(capsys.readouterr().out)

    return run


@pytest.fixture
def training(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """`phi3v train` with the tiny model and data; flags by their names, True for a bare flag."""

    def arguments(**flags: object) -> list[object]:
        chosen: dict[str, object] = {
            "model": tiny_model_dir,
            "train": tiny_data,
            "out": tmp_path / "run",
            "dtype": "fp32",
        }
        chosen |= {"batch_size": 4, "max_steps": 2, **flags}
        words: list[object] = ["train"]
        for name, value in chosen.items():
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
        return words

    return arguments


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# -- what goes well --------------------------------------------------------------------------------------------------


def test_the_overview_lists_every_command(help_of: Callable[..., str], capsys) -> None:
    overview = help_of("--help")
    assert help_of() == overview
    for name, command in COMMANDS.items():
        assert f"{name} {command.purpose}" in overview
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"phi3v {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_its_purpose_and_examples(command: str, help_of: Callable[..., str]) -> None:
    text = help_of(command, "--help")
    assert text.startswith(f"usage: phi3v {command} ")
    assert COMMANDS[command].purpose in text
    for example in COMMANDS[command].examples:
        assert " ".join(example.split()) in text


def test_the_examples_of_the_help_parse() -> None:
    for command in COMMANDS.values():
        for example in command.examples:
            if "--help" not in example:
                assert callable(parse(shlex.split(re.split(r" > |    ", example)[0])[1:]))


def test_the_help_of_train_explains_every_flag_in_its_group(help_of: Callable[..., str]) -> None:
    text = help_of("train", "--help")
    for group in dataclasses.fields(Run):
        shown = text.partition(f" {group.name} options ")[2].partition(" options ")[0]
        for field in dataclasses.fields(getattr(Run(), group.name)):
            assert f" --{field.name.replace('_', '-')} " in shown.replace(",", " "), field.name
    assert (
        "--save-every-steps INT Save a checkpoint after every this many steps; one is always saved at the end." in text
    )
    assert "--recipe PATH" in text


def test_a_recipe_brings_flags_and_defaults_into_the_help(help_of: Callable[..., str]) -> None:
    text = help_of("train", "docvqa", "--mode", "lora", "--help")
    assert "--full-train" in text
    assert re.search(r"--learning-rate FLOAT [^(]*\(default: 0.0002\)", text)
    assert re.search(r"--out PATH [^(]*\(default: runs/docvqa\)", text)


def test_a_recipe_in_a_file_brings_them_as_well(help_of: Callable[..., str], tmp_path: Path, capsys) -> None:
    assert main(["recipes", "forkme"]) == 0
    file = tmp_path / "mine.py"
    file.write_text(capsys.readouterr().out.replace("my-task", "from-a-file"))
    for words in (["--recipe", str(file)], [f"--recipe={file}"], ["--lora", "--recipe", str(file)]):
        assert "(default: runs/from-a-file)" in help_of("train", *words, "--help")


@pytest.mark.parametrize("grouped", [True, False])
def test_a_configuration_in_yaml_sets_defaults_over_a_recipe_and_flags_win(
    grouped: bool, tmp_path: Path, help_of: Callable[..., str]
) -> None:
    file = tmp_path / "run.yaml"
    plain = "train: [a.jsonl, 'b.jsonl:0.5']\neval: val.jsonl\nlearning-rate: 2e-4\nlora: true\n"
    groups = (
        "data: {train: [a.jsonl, 'b.jsonl:0.5'], eval: val.jsonl}\noptim: {learning_rate: 2e-4}\ntuning: {lora: true}\n"
    )
    file.write_text(groups if grouped else plain)
    run = parse(["train", "--config", str(file), "--eval", "x.jsonl"]).keywords["run"]  # type: ignore[attr-defined]
    assert run.data.train == (Path("a.jsonl"), Path("b.jsonl:0.5"))
    assert run.data.eval == (Path("x.jsonl"),)
    assert (run.optim.learning_rate, run.tuning.lora) == (2e-4, True)
    run = parse(["train", "docvqa", f"--config={file}", "--no-lora"]).keywords["run"]  # type: ignore[attr-defined]
    assert (run.base.num_crops, run.optim.learning_rate, run.tuning.lora) == (16, 2e-4, False)
    assert "--config PATH" in help_of("train", "docvqa", "--help")


def test_the_config_json_of_a_run_is_a_configuration(finished_run: Path) -> None:
    words = ["train", "--config", str(finished_run / "config.json"), "--out", "x"]
    run = parse(words).keywords["run"]  # type: ignore[attr-defined]
    kept = RunFolder(finished_run).config
    assert run == dataclasses.replace(kept, keeping=dataclasses.replace(kept.keeping, out=Path("x")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 3", "run.yaml: lr: no such setting"),
        ("optim: {lr: 3}", "run.yaml: optim.lr: no such setting"),
        ("learning_rate: fast", "run.yaml: optim.learning_rate: must be a number, not a string"),
        ("labels: [yes, no]", "run.yaml: evaluation.labels[0]: must be a string, not true or false"),
        ("a: [", "run.yaml: not YAML: "),
        ("- a", "run.yaml: must be an object, not a list"),
    ],
)
def test_a_configuration_that_cannot_be(content: str, message: str, fails, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(content)
    assert fails("train", "--config", "run.yaml").startswith(message)


def test_the_metrics_of_a_recipe_are_scored(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["recipes", "forkme"]) == 0
    own = "\n\ndef half(prediction: str, answers: list[str]) -> float:\n    return 0.5\n\n\nMETRICS = (half,)\n"
    (tmp_path / "mine.py").write_text(capsys.readouterr().out + own)
    seen: dict[str, Any] = {}
    monkeypatch.setattr("phi3v.train.loop.train", lambda run, **more: seen.update(more))
    files = ["--train", "a.jsonl", "--eval", "b.jsonl"]
    assert main(["train", "--recipe", str(tmp_path / "mine.py"), *files]) == 0
    assert [metric("x", ["y"]) for metric in seen["metrics"]] == [0.5]


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["check", "--help"], ["train", "--nosuch"], ["fly"]]
)
def test_help_and_typing_errors_do_not_wait_for_torch(words: list[str]) -> None:
    code = "import atexit, sys; sys.argv[0] = 'phi3v'; atexit.register(lambda: print(*sys.modules)); "
    code += "from phi3v.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert "phi3v.cli" in done.stdout.split()
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())


def test_importing_the_package_registers_the_architecture() -> None:
    """Also of a script whose name is not ours, and before or after transformers."""
    code = "import phi3v; from transformers import AutoConfig; print(AutoConfig.for_model('phi3_v').model_type)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "phi3_v\n"


def test_from_the_command_line_to_a_report_with_nothing_said_in_between(
    training, capsys, tiny_data: Path, tmp_path: Path
) -> None:
    """Libraries are silent: every line is ours."""
    assert main([str(word) for word in training(eval=tiny_data, eval_limit=2, lora=True, lora_rank=2)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for noise in ("torch_dtype", "Writing", "Loading", "Warning", "it/s"):
        assert noise not in captured.out
    assert (tmp_path / "run/report.html").is_file()
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert (
        main(["evaluate", str(tmp_path / "merged"), "--data", str(tiny_data), "--limit", "2", "--max-new-tokens", "2"])
        == 0
    )
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err == ""


def test_the_question_may_come_after_the_pictures(finished_run: Path, tiny_data: Path, capsys) -> None:
    images = tiny_data.parent / "images"
    flags = ["--image", str(images / "red.png"), "--max-new-tokens", "6"]
    assert main(["chat", str(finished_run), *flags, "what is the color"]) == 0
    expected = json.loads((finished_run / "predictions.jsonl").read_text().splitlines()[0])["prediction"]
    assert capsys.readouterr().out.strip() == expected


def test_check_says_what_is_wrong_and_its_status_says_whether(tiny_data: Path, tmp_path: Path, capsys) -> None:
    assert main(["check", str(tiny_data)]) == 0
    bad = tmp_path / "bad.jsonl"
    bad.write_text(tiny_data.read_text().replace("red.png", "rot.png", 1))
    assert main(["check", str(bad), "--image-root", str(tiny_data.parent / "images")]) == 2
    captured = capsys.readouterr()
    assert "bad.jsonl:1: " in captured.out
    assert "rot.png: no such image" in captured.out
    assert captured.err == ""


def test_an_interrupted_command_has_the_shells_status(training, monkeypatch, capsys) -> None:
    def interrupt(run: Any, **unused: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("phi3v.train.loop.train", interrupt)
    assert main([str(word) for word in training()]) == 130


def test_a_bug_of_ours_keeps_its_traceback(training, monkeypatch) -> None:
    def bug(run: Any, **unused: Any) -> None:
        raise ValueError("not the user's fault")

    monkeypatch.setattr("phi3v.train.loop.train", bug)
    with pytest.raises(ValueError, match="not the user's fault"):
        main([str(word) for word in training()])


# -- what goes wrong with the model ----------------------------------------------------------------------------------


def test_a_missing_model_folder(training, fails, tiny_data: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command in (
        training(model=missing),
        ["evaluate", missing, "--data", tiny_data],
        ["chat", missing, "hello"],
        ["merge", missing, "--out", tmp_path / "merged"],
    ):
        assert fails(*command) == f"{missing}: no such model folder"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_model_folder(training, fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert fails(*training(model=tmp_path / "empty")).startswith(str(tmp_path / "empty"))


@pytest.mark.parametrize("content", ["{", '{"hidden_size": "large"}', '{"hidden_size": 33, "num_attention_heads": 2}'])
def test_a_broken_config_json(content: str, training, fails, changed_model) -> None:
    folder = changed_model()
    (folder / "config.json").write_text(content)
    fails(*training(model=folder))


def test_a_checkpoint_with_a_missing_tensor(training, fails, changed_model, tmp_path: Path) -> None:
    folder = changed_model(tensors={"model.layers.1.mlp.down_proj.weight": None})
    assert "model.layers.1.mlp.down_proj.weight is missing" in fails(*training(model=folder))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_a_misshapen_tensor(training, fails, changed_model) -> None:
    folder = changed_model(tensors={"lm_head.weight": torch.zeros(432, 31)})
    assert "lm_head.weight has shape [432, 31], expected [432, 32]" in fails(*training(model=folder))


def test_a_truncated_checkpoint(training, fails, changed_model) -> None:
    file = changed_model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "changed_model" in fails(*training(model=file.parent))


def test_a_tokenizer_without_the_image_token(training, fails, changed_model) -> None:
    file = changed_model() / "tokenizer.json"
    file.write_text(file.read_text().replace("<|image|>", "<|other|>"))
    assert "no token <|image|>" in fails(*training(model=file.parent))


# -- what goes wrong with the data -----------------------------------------------------------------------------------


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny data with its line 3 replaced by a turn, or a text."""

    def write(line: str | dict[str, object]) -> Path:
        folder = tmp_path / "data"
        shutil.copytree(tiny_data.parent, folder)
        if isinstance(line, dict):
            line = json.dumps({"id": "new", "conversations": [{"user": "what", "assistant": "yes", **line}]})
        lines = (folder / "train.jsonl").read_text().splitlines()
        (folder / "train.jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))
        return folder / "train.jsonl"

    return write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('{"id": "x"}', "conversations: is missing"),
        ({"images": ["nothing.png"]}, "nothing.png: no such image"),
        ({"images": ["../../secret.png"]}, "leads out of the image root"),
        (
            {"images": ["red.png"], "user": "<|image_1|><|image_2|> what"},
            "prompt has 2 image tags (1, 2), 1 images were given",
        ),
        (
            {"images": ["red.png", "blue.png"], "user": "<|image_1|> what"},
            "prompt has 1 image tags (1), 2 images were given",
        ),
        ({"assistant": " "}, "the answer is missing"),
    ],
)
def test_bad_data_is_named_by_file_and_line(line: Any, message: str, data, training, fails, tmp_path: Path) -> None:
    file = data(line)
    said = fails(*training(train=file))
    assert said.startswith(f"{file}:3: ")
    assert message in said
    assert not (tmp_path / "run").exists()
    said = fails(*training(eval=file))  # the evaluation data is checked before the training as well
    assert said.startswith(f"{file}:3: ")


def test_an_unreadable_image_is_named(data, training, fails) -> None:
    file = data({})
    (file.parent / "images/blue.png").write_bytes(b"\x89PNG no more")
    said = fails(*training(train=file))
    assert said.startswith(f"{file}:4: ")
    assert "blue.png" in said
    assert "(and 2 more: phi3v check" in said


def test_an_image_that_breaks_during_training_is_named(data, training, fails, monkeypatch, tmp_path: Path) -> None:
    """As on a network drive that goes away."""
    from phi3v.train.runlog import RunLog

    file = data({})
    log_step = RunLog.step

    def step(self: RunLog, entry: dict[str, Any]) -> None:
        log_step(self, entry)
        for picture in (file.parent / "images").iterdir():
            picture.write_bytes(b"gone")

    monkeypatch.setattr(RunLog, "step", step)
    assert ".png" in fails(*training(train=file, max_steps=8))


def test_missing_data(training, fails, tmp_path: Path) -> None:
    assert fails(*training(train=tmp_path / "no.jsonl")) == f"{tmp_path / 'no.jsonl'}: No such file or directory"
    assert "--image-root" in fails(*training(image_root=tmp_path / "nowhere"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "no examples" in fails(*training(train=tmp_path / "empty.jsonl"))


def test_a_batch_larger_than_the_data(training, fails) -> None:
    assert fails(*training(batch_size=15)) == "--batch-size 15 is larger than the training data (14 examples)"
    assert fails(*training(batch_size=6, questions="expected")).endswith("is larger than the training data (5 pages)")


# -- what goes wrong with flags and folders --------------------------------------------------------------------------


def test_flags_that_exclude_each_other(training, fails, tmp_path: Path) -> None:
    assert "--weighting token" in fails(*training(questions="expected", weighting="token"))
    assert fails(*training(lora_rank=4)) == "--lora-rank has no effect without --lora or --qlora"
    assert fails(*training(freeze="vision", vision_learning_rate=1.0)).startswith(
        "--vision-learning-rate has no effect"
    )
    assert list(tmp_path.iterdir()) == []


def test_flex_attention_cannot_drop(training, fails, changed_model) -> None:
    folder = changed_model({"attention_dropout": 0.1})
    assert fails(*training(model=folder, attention="flex_attention")).startswith(
        "--attention flex_attention has no dropout"
    )


def test_flex_attention_on_a_cpu(training, fails, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fails(*training(attention="flex_attention")) == (
        "--attention flex_attention has no backward pass on a CPU: choose sdpa"
    )


def test_flash_attention_on_a_cpu(training, fails, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fails(*training(attention="flash_attention_2")) == (
        "--attention flash_attention_2: it needs a CUDA device; choose sdpa"
    )


def test_what_cannot_be_compiled(training, fails, monkeypatch) -> None:
    asked = training(compile="on", lora=True, dora=True)
    assert fails(*asked) == "--compile on: PEFT's --dora cannot be compiled in one piece"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fails(*training(compile="on")) == "--compile on: it needs a C compiler, such as gcc"


def test_an_unknown_recipe(fails) -> None:
    assert fails("train", "easy-vqs") == "no recipe easy-vqs: did you mean easy-vqa?"
    assert fails("train", "mine.jsonl") == "no recipe mine.jsonl: did you mean --train mine.jsonl?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("docvqa", "docvqa is a recipe: phi3v train docvqa"),
        ("bench", "phi3v bench is no longer a command: run `python -m benchmarks.bench` in a checkout"),
        ("train --lora docvqa", "the recipe comes first: phi3v train docvqa ..."),
        ("train --train a.jsonl docvqa", "the recipe comes first: phi3v train docvqa ..."),
        ("train docvqa --recipe mine.py", "--recipe mine.py: a recipe is named already"),
        ("train --recipe no.py", "--recipe no.py: no such file; `phi3v recipes forkme` prints a template"),
        ("report", "report needs a run folder: phi3v report RUN [RUN ...]"),
        ("check data.jsonl --num-workers -2", "--num-workers -2: must be at least 0"),
        ("check data.jsonl --num-crops 0", "--num-crops 0: must be at least 1"),
        ("check data.jsonl --max-tokens 9", "--max-tokens needs --model, whose tokenizer counts them"),
        ("--completion tcsh", "--completion tcsh: it must be bash, zsh, fish"),
    ],
)
def test_what_is_no_command_or_recipe(words: str, message: str, fails) -> None:
    assert fails(*words.split()) == message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("trian", ["trian", "train"]),
        ("--verson", ["--verson", "phi3v --help"]),
        ("train --learnin-rate 1", ["--learnin-rate", "Perhaps you meant: --learning-rate", "phi3v train --help"]),
        ("train --learnin_rate=1", ["--learnin_rate", "--learning-rate"]),
        ("train --no-packs", ["--no-packs", "--no-pack "]),
        ("train docvqa --full-trian", ["--full-trian", "--full-train"]),
        ("train docvqa --mode lra", ["'lra'", "'--mode'", "'lora'"]),
        ("train --dtype fp61", ["'fp61'", "'--dtype'", "('auto', 'bf16', 'fp16', 'fp32')"]),
        ("train --freeze vison", ["'vison'", "'--freeze'", "'vision'"]),
        ("train --batch-size many", ["--batch-size: ", "'many'"]),
        ("train --epochs two", ["--epochs: ", "'two'"]),
        ("train --batch-size", ["Missing value for argument '--batch-size'"]),
        ("train --out runs/a b", ["'b'", "'easy-vqa'"]),
        ("check a.jsonl b.jsonl", ["b.jsonl", "phi3v check --help"]),
        ("evaluate x", ["Missing from phi3v evaluate: --data PATH"]),
        ("evaluate x --dta y", ["--data PATH", "--dta"]),
    ],
)
def test_a_typing_error_names_what_is_wrong_and_what_may_be_right(words: str, named: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in named:
        assert text in words_of(captured.err)


@pytest.mark.parametrize("words", [["train", "--nosuch"], ["train", "--batch-size", "many"], ["train", "--help"]])
def test_only_the_first_process_of_a_job_prints_help_and_typing_errors(words: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        main(words)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_a_script_that_knows_commands_and_flags(shell: str, capsys) -> None:
    assert main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "--learning-rate", "flex_attention"):
        assert word in script


def test_completion_in_a_real_bash(tmp_path: Path) -> None:
    """As `source <(phi3v --completion bash)` does it."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    script = tmp_path / "phi3v.bash"
    script.write_text(
        subprocess.run([sys.executable, "-m", "phi3v", "--completion", "bash"], capture_output=True, text=True).stdout
    )

    def offered(line: str) -> list[str]:
        """What a tab at the end of the line offers."""
        words = line.split(" ")
        typed = " ".join(f"'{word}'" for word in words)
        code = (
            f"source {script}; set -- $(complete -p phi3v); while [ $# -gt 2 ] && [ $1 != -F ]; do shift; done; "
            f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMP_POINT={len(line)}; "
            f"$2 phi3v '{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run([bash, "--norc", "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert set(offered("phi3v ")) >= {*COMMANDS}
    assert offered("phi3v ev") == ["evaluate"]
    assert offered("phi3v train --learning") == ["--learning-rate"]
    assert offered("phi3v train --dtype b") == ["bf16"]
    assert offered("phi3v check pict") == []  # bash offers files then, which -o default asks for
    registered = subprocess.run(
        [bash, "--norc", "-c", f"source {script}; complete -p phi3v"], capture_output=True, text=True
    )
    assert "-o default" in registered.stdout


def test_a_finished_run_is_never_touched(training, fails, tmp_path: Path, capsys) -> None:
    """To start it again is refused, to go on with it leaves nothing to do: it is announced, and all is well."""
    run = tmp_path / "run"
    assert main([str(word) for word in training()]) == 0
    before = files(run)
    assert fails(*training()) == f"--out {run} holds a finished run: choose another folder"
    assert fails(*training(resume="auto", max_steps=3)).startswith("--resume: --max-steps was 2 in ")
    capsys.readouterr()
    assert main([str(word) for word in training(resume="auto")]) == 0
    captured = capsys.readouterr()
    assert f"{run} holds this run, finished: nothing is left to do" in captured.out
    assert f"report {run / 'report.html'}" in " ".join(captured.out.split())
    assert captured.err == ""
    assert files(run) == before


def test_an_unfinished_run_is_gone_on_with_only_when_asked(training, fails, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("phi3v.model.phi3v.Phi3VForCausalLM.save_pretrained", full_disk)
        fails(*training())
    before = files(run)
    assert "holds an unfinished run: add --resume auto to continue it" in fails(*training())
    assert "holds an unfinished run: add --resume auto to continue it" in fails(*training(resume="no"))
    assert "--learning-rate was 4e-05" in fails(*training(resume="auto", learning_rate=1.0))
    assert files(run) == before
    assert main([str(word) for word in training(resume="auto")]) == 0


def test_where_there_is_nothing_to_go_on_with_a_run_begins(training, tmp_path: Path, capsys) -> None:
    """So that the same command can be given again and again, as a queue does."""
    (tmp_path / "run").mkdir()
    assert main([str(word) for word in training(resume="auto")]) == 0
    assert "resuming" not in capsys.readouterr().out
    assert (tmp_path / "run/metrics.json").is_file()


def test_a_folder_that_holds_something_else_is_not_written_into(training, fails, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("precious")
    for resume in ("no", "auto"):
        assert fails(*training(resume=resume)) == f"--out {run} is not empty and holds no run: choose another folder"
    assert files(run) == {"thesis.tex": b"precious"}


def test_a_folder_that_cannot_be_made(training, fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in fails(*training(out=tmp_path / "file" / "run"))
    assert fails(*training(out=tmp_path / "file")) == f"--out {tmp_path / 'file'} is a file: choose another folder"


def full_disk(*unused: Any, **named: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_saving(training, fails, tmp_path: Path, monkeypatch) -> None:
    write = checkpoint.save_file

    def fill(tensors: Any, path: Path, metadata: Any) -> None:
        if "step-000004" in str(path):
            path.write_bytes(b"half")
            full_disk()
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", fill)
    said = fails(*training(max_steps=6, save_every_steps=2))
    checkpoints = tmp_path / "run/checkpoints"
    assert said.startswith(f"cannot write {checkpoints / 'step-000004'}: ")
    assert "No space left on device" in said
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    assert checkpoint.damage(checkpoints / "step-000002") is None


def test_a_full_disk_while_logging(training, fails, monkeypatch) -> None:
    from phi3v.train import runlog

    class Full(io.TextIOWrapper):
        write = full_disk

    real = open
    opened = lambda file, mode: Full(real(file, "ab")) if mode == "a" else real(file, mode)  # noqa: E731
    monkeypatch.setattr(runlog, "open", opened, raising=False)
    assert "log.jsonl: [Errno 28] No space left on device" in fails(*training())


def test_a_loss_that_is_not_finite(training, fails, changed_model, tiny_model_dir: Path) -> None:
    head = load_file(tiny_model_dir / "model.safetensors")["lm_head.weight"]
    head[3] = float("nan")
    said = fails(*training(model=changed_model(tensors={"lm_head.weight": head})))
    assert said.startswith("step 1: the loss is not finite; its examples are e")


def test_an_adapter_of_another_base(lora_run: Path, fails, changed_model, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(lora_run / "final", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    base = changed_model({"intermediate_size": 40})
    model, _ = load_model(config["base_model_name_or_path"])
    small = type(model)(type(model.config).from_pretrained(base))
    small.save_pretrained(base)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    assert str(folder) in fails("merge", folder, "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
