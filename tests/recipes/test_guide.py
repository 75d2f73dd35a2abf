"""Every command of the guide, as written, from the data to the scores, on small data sets in their published schemas.

Only the placeholders, the number of processes and nodes, the data root and the model folder are substituted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from phi3v.data.processor import Phi3VProcessor
from phi3v.model.loading import load_model

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "vision_finetuning"
PAGES = ("recipes.md", "recetas.es.md")
ROWS = 566  # of the Cauldron the first 500 are evaluated on; batches have up to 64 examples
CLASSES = ("ApplyEyeMakeup", "Archery", "BabyCrawling")
QUICK = "finetune_hf_trainer_docvqa.py"


def commands(page: str) -> list[str]:
    """The `python` and `torchrun` commands of a page, one a line."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [" ".join(line.split()) for line in lines if line.startswith(("python ", "torchrun "))]


COMMANDS = commands(PAGES[0])
TRAINING = [command for command in COMMANDS if "finetune_hf_trainer" in command]


def test_both_languages_have_the_same_commands() -> None:
    assert commands(PAGES[1]) == COMMANDS
    assert len(COMMANDS) == 11
    assert len(TRAINING) == 10


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees five hundred pairs of pictures of many crops in a minute or two."""
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "vision_config": tower}
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    return make_model(processor, tmp_path_factory.mktemp("model"), **sizes)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory, published: ModuleType, make_video: Callable[..., Path]) -> Path:
    """What PHI3V_DATA points to. Pictures are banners: 9 crops, where a square takes 17."""

    def picture(number: int) -> bytes:
        return published.picture(number, size=(177, 22))

    root = tmp_path_factory.mktemp("downloads")
    published.write_mini(root / "docvqa", train=20)
    texts = [("who?\nKeep it short and to the point.", "Ada."), ("when?\nOffer a terse response.", "1843.")]
    published.write_cauldron(root / "docvqa", "docvqa", [([picture(n)], texts) for n in range(66)])
    answers = ("Yes.", "No.")
    memes = [([picture(n)], [("hateful?\nAnswer yes or no.", answers[n % 2])]) for n in range(ROWS)]
    published.write_cauldron(root / "hateful_memes", "hateful_memes", memes)
    said = [("so? Answer yes or no.", "Yes."), ("and so? Answer yes or no.", "No.")]
    pairs = [([picture(2 * n), picture(2 * n + 1)], said[: n % 2 + 1]) for n in range(ROWS)]
    published.write_cauldron(root / "nlvr2", "nlvr2", pairs)
    clip = make_video(root / "clip.avi", 12)
    (root / "ucf101").mkdir()
    with tarfile.open(root / "ucf101" / "UCF101_subset.tar.gz", "w:gz") as archive:
        splits = [*["train"] * 6, "val", "test"]
        for number, (split, label) in enumerate((s, c) for s in splits for c in CLASSES):
            archive.add(clip, f"UCF101_subset/{split}/{label}/v_{label}_g{number:02d}_c01.avi")
    return root


@pytest.fixture(scope="module")
def converted(downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guide's conversion writes."""
    command = next(command for command in COMMANDS if "convert_ucf101" in command)
    out = tmp_path_factory.mktemp("ucf101") / "converted"
    done = run(command.replace("/path/to/converted_ucf101", str(out)), PHI3V_DATA=str(downloads))
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command from inside vision_finetuning/, with this Python."""
    program, *words = shlex.split(command)
    words = ["-m", "torch.distributed.run", *words] if program == "torchrun" else words
    return subprocess.run(
        [sys.executable, *words],
        cwd=SCRIPTS,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_conversion_writes_the_tree_of_the_guide(converted: Path) -> None:
    files = {split: converted / f"ucf101_{split}.jsonl" for split in ("train", "val", "test")}
    assert [len(file.read_text().splitlines()) for file in files.values()] == [18, 3, 3]
    first = json.loads(files["val"].read_text().splitlines()[0])
    assert first["id"] == "val-0000000018"
    assert first["source"] == "ucf101"
    turn = first["conversations"][0]
    assert len(turn["images"]) == 8
    assert turn["images"][0].startswith(f"val/{turn['assistant']}/v_{turn['assistant']}_")
    assert turn["images"][0].endswith(".0.jpg")
    assert all((converted / "images" / image).is_file() for image in turn["images"])
    assert turn["user"].startswith("Classify the video into one of the following classes: ApplyEyeMakeup, ")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=() if command.endswith(QUICK) else pytest.mark.slow, id=f"command {number}")
        for number, command in enumerate(TRAINING, start=1)
    ],
)
def test_a_command_of_the_guide_runs_to_the_end(
    command: str, request: pytest.FixtureRequest, downloads: Path, model_dir: Path, tmp_path: Path
) -> None:
    task = re.search(r"finetune_hf_trainer_(\w+)\.py", command)[1]  # type: ignore[index]
    command = re.sub(r"--nproc_per_node=\d+", "--nproc_per_node=2", command)
    command = re.sub(r"--nnodes=.*?--node_rank=\$NODE_RANK", "--standalone", command)
    if "--standalone" not in command:
        command = command.replace("torchrun", "torchrun --standalone")
    if "/path/to/converted_ucf101" in command:
        command = command.replace("/path/to/converted_ucf101", str(request.getfixturevalue("converted")))
    output = tmp_path / task
    for placeholder, value in (("<output_dir>", str(output)), ("<lr>", "1e-5"), ("<epochs>", "1")):
        command = command.replace(placeholder, value)
    if "--output_dir" not in command:
        command += f" --output_dir {output}"  # or the checkout would get an output/
    done = run(command, PHI3V_DATA=str(downloads), PHI3V_MODEL=str(model_dir))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "fp32 instead" in done.stdout  # on a CPU
    scores = {"docvqa": "anls"}.get(task, "accuracy")
    for when in ("before", "after"):
        written = json.loads((output / f"eval_{when}.json").read_text())
        assert len(written["answers_unique"]) == len(written["generated_texts_unique"]) > 0
        assert 0 <= written[scores] <= 1
    model, _ = load_model(output)
    assert hasattr(model, "peft_config") == ("--use_lora" in command)
    assert (output / "run" / "report.html").is_file()
