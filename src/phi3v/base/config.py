"""The settings of a run, and which of them exclude each other.

The command line is derived from these dataclasses: a field is a flag, its docstring the help text, its type the limits.
A run folder keeps the resolved values in `config.json`; `run_of` reads them back and validates every field.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from tyro.conf import arg

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, Fraction, NonNegative, NonNegativeInt, Positive, convert, problem_of, read_bytes

Key = TypeVar("Key")
Value = TypeVar("Value")
Part = Literal["vision", "projector", "embeddings"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"]
Metric = Literal["exact_match", "anls", "anls_official", "vqa_accuracy", "rouge_l", "bleu", "chrf"]
Optimizer = Literal["adamw", "adamw-8bit", "adamw-bf16"]
Orientation = Literal["ignore", "apply"]
Colors = Literal["published", "visible"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The checkpoint that training starts from, and how it is computed."""

    model: str = "microsoft/Phi-3.5-vision-instruct"
    """A folder in the published layout, or a name on the Hugging Face Hub."""

    num_crops: Count | None = None
    """Largest number of tiles an image is cut into, not counting its global view: 16 suits single images, 4 several
    frames. Default: the checkpoint's own."""

    exif_orientation: Orientation | None = None
    """ignore: images are seen as they are stored. apply: they are turned as their EXIF orientation says. The model
    keeps it for evaluation, chat, demo and export. Default: the checkpoint's own; the published ones ignore it."""

    image_colors: Colors | None = None
    """published: values outside 0..255 are clipped and transparency is dropped. visible: such values are scaled to
    0..255, and transparent images laid on white. Kept as `--exif-orientation`. Default: the checkpoint's own."""

    attention: Attention = "auto"
    """Attention backend; all compute the same function. auto: flash_attention_2 (PyTorch's own kernel) on CUDA in bf16
    or fp16, otherwise sdpa."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the layers with torch.compile: the same arithmetic in fewer kernels, after a slow start. auto: on for
    CUDA, unless the weights are split over processes or `--dora` is on."""

    fp8: bool = False
    """Train the decoder with fp8 matrix products: approximate, faster on Hopper, Ada and later, needs torchao."""

    deterministic: bool = False
    """Use deterministic algorithms only, so that a resumed run on a GPU repeats the same bits. Slower; an operation
    without a deterministic form is an error."""

    dtype: Precision = "auto"
    """Precision of the computation. Trainable weights are kept in float32, frozen ones in this precision. auto: bf16
    where the hardware supports it, otherwise fp16 with loss scaling on CUDA and fp32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data, and how it is divided into steps and packs."""

    train: tuple[Path, ...] = ()
    """Training conversations, one JSON object per line, in one file or several. FILE:W counts W times in an epoch: of
    b.jsonl:0.5 every epoch sees another half, c.jsonl:2 is seen twice."""

    eval: tuple[Path, ...] = ()
    """Conversations to evaluate on, in the same format. Several files, FILE or NAME=FILE, are scored separately; the
    first decides which model is the best."""

    image_root: Path | None = None
    """Folder that image paths are relative to. Default: the folder `images` beside each data file."""

    batch_size: Count = 16
    """Examples (with `--questions all`) or pages per optimizer step, over all processes and packs."""

    questions: Literal["all", "expected", "random"] = "all"
    """How pages with several questions count. all: every question is an example. expected: the page counts once, its
    questions averaged. random: the page counts once, with one question drawn every epoch."""

    weighting: Literal["example", "token"] = "example"
    """example: mean over the target tokens of each example, then over examples. token: mean over all target
    tokens."""

    share_prefix: bool = True
    """Compute a page once for all its questions. Off: the same loss, slower."""

    pack: bool = True
    """Put several pages into one forward pass. Off: the same loss, slower."""

    max_tokens_per_pack: Count | None = None
    """Tokens per forward pass. More keep a GPU busier, as long as memory suffices; the result is the same. Default:
    8192 on a GPU, 4096 on a CPU."""

    max_crops_per_pack: Count = 64
    """Crops of 336x336 pixels per forward pass, counting tiles and one global view for each image."""

    num_workers: NonNegativeInt | None = None
    """Processes that read images. Default: one per core but one, at most 4; none on two cores or fewer."""

    on_bad_example: Literal["stop", "skip"] = "stop"
    """When an image becomes unreadable during the run. stop: end and name it. skip: continue without its examples
    (the mean is over the others), list them in log.jsonl and count them in the report."""

    def __post_init__(self) -> None:
        for name in ("train", "eval"):  # one file may be given as itself
            object.__setattr__(self, name, as_files(getattr(self, name)))

    @property
    def train_files(self) -> dict[Path, float]:
        """The training files, each with its share of an epoch. Raises InputError for one that is named twice."""
        parts = [re.fullmatch(r"(.+?)(?::(\d+\.?\d*|\.\d+))?", str(file), re.DOTALL) for file in self.train]
        return _unique("train", [(Path(part[1]), float(part[2] or 1)) for part in parts if part])

    @property
    def eval_files(self) -> dict[str, Path]:
        """The evaluation files by name, by default the file's own. Raises InputError for a name that is given twice."""
        parts = [re.fullmatch(r"(?:([\w-]+)=)?(.+)", str(file), re.DOTALL) for file in self.eval]
        return _unique("eval", [(part[1] or Path(part[2]).stem, Path(part[2])) for part in parts if part])


def as_files(value: Any) -> tuple[Any, ...]:
    """Several files as they are, one file as the only one, None as none."""
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (Path(value),)


def _unique(flag: str, pairs: list[tuple[Key, Value]]) -> dict[Key, Value]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"--{flag}: {twice[0]} is there twice")
    return dict(pairs)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Which weights are trained."""

    freeze: tuple[Part, ...] = ()
    """Parts that are not trained. vision: CLIP. projector: image projection and separators. embeddings: tokens."""

    freeze_vision_model: bool = False
    """Freeze the image embedder: short for `--freeze vision projector`."""

    lora: bool = False
    """Train low-rank adapters (LoRA) on the decoder, its head, and the parts that are not frozen."""

    qlora: bool = False
    """LoRA on a base model whose decoder weights are quantized to four bits (nf4)."""

    quantize: tuple[Literal["vision", "projector"], ...] = ()
    """Further parts that `--qlora` quantizes."""

    double_quant: bool = False
    """With `--qlora`: quantize the scales as well, which saves 0.4 bits per weight."""

    lora_rank: Count = 64
    """Rank of the adapters."""

    lora_alpha: Positive | None = None
    """LoRA alpha, the scale of the adapters. Default: twice the rank."""

    lora_dropout: Fraction = 0.0
    """Dropout before the adapters."""

    lora_init: Literal["gaussian", "default", "pissa", "olora"] = "gaussian"
    """Initialization of the adapters. default: PEFT's Kaiming uniform."""

    dora: bool = False
    """Decompose the weights into direction and magnitude (DoRA)."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""

    activation_checkpointing: Annotated[Literal["auto", "none", "full"], arg(aliases=["--activation-memory"])] = "auto"
    """full: keep only the inputs of the layers and recompute the rest in the backward pass. none: keep all
    activations. auto: on a GPU recompute as few layers as its free memory requires, on a CPU none."""

    @property
    def frozen(self) -> tuple[Part, ...]:
        named = {*self.freeze, *(("vision", "projector") if self.freeze_vision_model else ())}
        return tuple(part for part in typing.get_args(Part) if part in named)

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained instead of the weights."""
        return self.lora or self.qlora

    @property
    def alpha(self) -> float:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedule. The defaults are the original recipe's."""

    optimizer: Optimizer = "adamw"
    """adamw: float32, 16 bytes per trained weight. adamw-8bit: moments in eight bits, 10 bytes (pip install
    'phi3v[qlora]'). adamw-bf16: weights, gradients and moments in bf16 with stochastic rounding, 8 bytes."""

    epochs: Positive = 1.0
    """Passes over the data; may be fractional."""

    max_steps: Count | None = None
    """Number of optimizer steps, instead of `--epochs`."""

    learning_rate: Positive = 4e-5
    """Learning rate of everything that has no learning rate of its own."""

    vision_learning_rate: NonNegative | None = None
    """Learning rate of CLIP."""

    projector_learning_rate: NonNegative | None = None
    """Learning rate of the image projection and separators."""

    weight_decay: NonNegative = 0.01
    """Weight decay, applied to the groups that `--decay` names."""

    decay: Literal["original", "matrices"] = "original"
    """Which weights decay. original: all but biases and LayerNorm weights, as in the original trainer. matrices: only
    weights of two dimensions or more."""

    beta1: Fraction = 0.9
    """Decay of the first moment."""

    beta2: Fraction = 0.95
    """Decay of the second moment."""

    eps: Positive = 1e-7
    """AdamW's epsilon."""

    max_grad_norm: Positive = 1.0
    """Clip gradients to this global norm."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule after the warm-up."""

    warmup_steps: NonNegativeInt = 50
    """Steps over which the learning rate rises from zero."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Several processes (`torchrun --nproc_per_node=N -m phi3v train ...`)."""

    parallel: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """ddp: every GPU holds everything. zero1, zero2: the optimizer state (and the gradients) are sharded. fsdp2, zero3:
    the weights as well. auto: zero2 for the whole model (fsdp2 without DeepSpeed); ddp for adapters, on CPUs, and for
    every `--optimizer` but adamw, the only one that can be sharded."""

    rank_timeout_minutes: Positive = 30.0
    """Report a process that keeps the others waiting for longer than this, and end the job."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation on the questions of `--eval`."""

    eval_before: bool = True
    """Evaluate before training."""

    eval_every_steps: Count | None = None
    """Evaluate after every this many steps."""

    eval_limit: Count | None = None
    """Number of questions, evenly spread, in evaluations before and during training; the final one uses all."""

    best: str = "loss"
    """Which of the evaluated models becomes `final/`: the best by this metric of the first file of `--eval` (of another
    one: NAME/METRIC), by default the validation loss. last: the model after the last step, whatever its scores."""

    early_stopping: Count | None = None
    """End the training after this many evaluations in a row that are no better by `--best`."""

    metrics: tuple[Metric, ...] = ()
    """Scores of the answers, beside the accuracy. Default: exact_match, anls, anls_official and vqa_accuracy for short
    answers; rouge_l, bleu and chrf for sentences. The functions of a recipe's METRICS are added."""

    max_new_tokens: Count = 64
    """Maximum length of an answer, in tokens."""

    score: Literal["generate", "labels", "both"] = "generate"
    """generate: score the text the model generates. labels: choose the most likely of a closed set of labels, in one
    forward pass. both: score generated answers, and the labels beside them (accuracy, AUROC)."""

    labels: tuple[str, ...] = ()
    """The closed set of labels. Default: the answers of the training data, if there are few."""


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """The run folder, checkpoints and logging."""

    out: Path = Path("runs/latest")
    """The run folder. A finished run is never overwritten."""

    save_every_steps: Count | None = None
    """Save a checkpoint after every this many steps; one is always saved at the end."""

    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, besides the best one."""

    resume: Literal["no", "auto"] = "no"
    """auto: continue exactly from the newest intact checkpoint in the run folder, or start if there is none."""

    max_minutes: Positive | None = None
    """Save a checkpoint and stop after this time, to be resumed."""

    seed: NonNegativeInt = 42
    """Seed of the data order, the adapters and dropout."""

    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Experiment trackers that receive the log."""

    profile_steps: str | None = None
    """Write a trace of these steps, FIRST:LAST, to `profile/` in the run folder (chrome://tracing or Perfetto)."""

    progress: bool = True
    """Show a progress bar."""

    dry_run: bool = False
    """Check the data, print all settings and the estimated memory, and stop."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run."""

    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    tuning: Tuning = field(default_factory=Tuning)
    optim: Optim = field(default_factory=Optim)
    scaling: Scaling = field(default_factory=Scaling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    keeping: Keeping = field(default_factory=Keeping)

    def check(self) -> None:
        """Raises InputError, naming the flag to change, for settings that exclude each other."""
        if not self.data.train:
            raise InputError("--train is missing: name the .jsonl file of training conversations")
        if not all(self.data.train_files.values()):
            raise InputError(f"--train {' '.join(map(str, self.data.train))}: a file cannot count 0 times")
        if self.evaluation.labels and self.evaluation.score == "generate":
            raise InputError("--labels has no effect with --score generate: choose labels or both")
        if not self.data.eval_files and self.evaluation.eval_every_steps is not None:
            raise InputError("--eval-every-steps needs --eval")
        for name in ("best", "early_stopping"):
            if self.evaluation.eval_every_steps is None and getattr(self.evaluation, name) not in (
                None,
                "loss",
                "last",
            ):
                raise InputError(f"--{name.replace('_', '-')} needs --eval-every-steps")
        groups = [getattr(self, group.name) for group in dataclasses.fields(self)]
        values = {name: value for group in groups for name, value in vars(group).items()}
        for group in groups:
            check_flags(vars(group), type(group))
        for part in self.tuning.frozen:
            if values.get(f"{part}_learning_rate") is not None:
                raise InputError(f"--{part}-learning-rate has no effect: the {part} is frozen")
        for tracker in self.keeping.track:
            if importlib.util.find_spec(tracker) is None:  # before anything is loaded
                raise InputError(f"--track {tracker}: it is not installed (pip install 'phi3v[track]')")
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_init", "dora", "rslora"):
            if not self.tuning.adapters and values[name] != getattr(Tuning, name):
                raise InputError(f"--{name.replace('_', '-')} has no effect without --lora or --qlora")
        for name in ("quantize", "double_quant"):
            if not self.tuning.qlora and values[name]:
                raise InputError(f"--{name.replace('_', '-')} has no effect without --qlora")
        if self.tuning.qlora and self.tuning.lora_init in ("pissa", "olora"):
            raise InputError(f"--lora-init {self.tuning.lora_init} decomposes the weights, which --qlora quantizes")
        if self.base.fp8 and self.tuning.adapters:
            raise InputError("--fp8 is for trained weights: it cannot be combined with --lora or --qlora")
        optimizer, parallel = self.optim.optimizer, self.scaling.parallel
        if optimizer != "adamw" and parallel not in ("auto", "ddp"):
            raise InputError(f"--optimizer {optimizer} cannot be sharded by --parallel {parallel}: choose ddp")
        if optimizer == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("--optimizer adamw-8bit needs bitsandbytes: pip install 'phi3v[qlora]'")
        if optimizer == "adamw-bf16" and (dtype := self.base.dtype) not in ("auto", "bf16"):
            raise InputError(f"--optimizer adamw-bf16 cannot be combined with --dtype {dtype}: its weights are bf16")
        if "embeddings" in self.tuning.frozen and self.tuning.adapters:
            raise InputError("--freeze embeddings has no effect with --lora: the embeddings have no adapters")

    @property
    def precision(self) -> Precision:
        """Precision of the computation, for `pick_dtype`: bf16 weights are multiplied in bf16 on any hardware."""
        return "bf16" if self.optim.optimizer == "adamw-bf16" else self.base.dtype

    def to_dict(self) -> dict[str, Any]:
        """The settings as `config.json` holds them: nested, with paths as strings."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain


def check_flags(values: Mapping[str, Any], of: Callable[..., Any]) -> None:
    """Raises InputError, naming the flag, for a value outside the limits that the type of its parameter sets.

    `of` is the function or dataclass whose parameters have these values: `check_flags(locals(), evaluate)`. The fields
    of a dataclass among them are checked as well.
    """
    for name, kind in typing.get_type_hints(of, include_extras=True).items():
        value = values.get(name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_flags(vars(value), type(value))
        elif name in values and (problem := problem_of(value, kind)):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"--{name.replace('_', '-')} {shown}: {problem}")


# Settings of earlier versions: those that have another name now, and those that are gone.
RENAMED = {"activation_memory": "activation_checkpointing"}
REMOVED = {"vision_cache", "vision_cache_dir", "on_nonfinite", "on_full_disk"}
BEFORE = {"decay": "matrices", "best": "last"}
"""What runs did that were started before there was a choice."""


def read_config(file: Path, default: Run) -> Run:
    """`default` with the settings of a YAML file, or of a run's config.json: in their groups, or without.

    Raises InputError, naming file and setting, for what cannot be.
    """
    try:
        content = yaml.safe_load(read_bytes(file))
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    groups, settings = typing.get_type_hints(Run), default.to_dict()
    home = {field.name: group for group, kind in groups.items() for field in dataclasses.fields(kind)}
    for key, value in convert(content, dict[str, Any], str(file)).items():
        name = key.replace("-", "_")
        if name in groups:
            settings[name] |= convert(value, dict[str, Any], f"{file}: {name}")
        elif name in home:
            settings[home[name]][name] = value
        else:
            raise InputError(f"{file}: {key}: no such setting")
    return run_of(settings, str(file), strict=False)


def run_of(content: Mapping[str, Any], place: str, *, strict: bool = True) -> Run:
    """The run whose settings a config.json holds; `place` names the file.

    Settings of earlier versions are understood. Raises InputError, naming the field, for a value that cannot be.
    """
    groups = typing.get_type_hints(Run)
    settings: dict[str, dict[str, Any]] = {}
    for name, values in convert(content, dict[str, dict[str, Any]], place).items():
        if name not in groups:
            raise InputError(f"{place}: unknown group {name!r}; the groups are {', '.join(groups)}")
        known = {field.name for field in dataclasses.fields(groups[name])}
        values = {RENAMED.get(key, key): value for key, value in values.items() if key not in REMOVED}
        if unknown := sorted(values.keys() - known):
            raise InputError(f"{place}: {name}.{unknown[0]}: no such setting")
        values |= {key: as_files(values[key]) for key in known & values.keys() & {"train", "eval"}}
        settings[name] = {key: value for key, value in BEFORE.items() if key in known} | values
    return convert(settings, Run, place, strict=strict)
