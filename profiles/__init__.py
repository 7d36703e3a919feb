"""What can be set, by whom it was set, and the profiles: a name for a set of values.

The command line wins over a configuration file, that over a profile, that over the default; where each value came from
is kept. An unknown key is an error. No torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from autotune.errands import TimeLimit
from autotune.errors import ConfigurationError
from profiles.names import ours
from profiles.values import parse_duration, parse_moment

FOLDER = Path(__file__).parent


def _setting(default: Any, group: str, text: str, metavar: str = "", *, commas: bool = False) -> Any:
    return field(default=default, metadata={"group": group, "help": text, "metavar": metavar, "commas": commas})


@dataclass(frozen=True)
class Settings:
    """Every value that can be given on the command line, in a file or by a profile, with the words that explain it."""

    model: str = _setting("tiny", "Model", "Preset, or folder of a checkpoint (safetensors).", "NAME|DIR")
    tokenizer: str | None = _setting(
        None,
        "Model",
        "Folder of a tokenizer; else the checkpoint's own, or one trained from the data.",
        "DIR",
    )
    dropout: float | None = _setting(None, "Model", "Dropout in place of the model's own.")
    freeze: tuple[str, ...] = _setting(
        (),
        "Model",
        "What is not trained: embedding (with an output layer that is tied to it), encoder, decoder, or a pattern of "
        "parameter names; with commas, or repeated.",
        "PART,PART",
        commas=True,
    )
    data: tuple[str, ...] = _setting(
        (), "Data", "Parquet or jsonl file, or folder of such; may be repeated.", "FILE|DIR"
    )
    validation: tuple[str, ...] = _setting(
        (), "Data", "The same, to evaluate on: each epoch, or --eval-every.", "FILE|DIR"
    )
    validation_split: float | None = _setting(
        None,
        "Data",
        "Hold out this share of the rows instead, such as 0.01: by content, so that no row is on both sides.",
        "SHARE",
    )
    stage: Literal["pretrain", "sft"] | None = _setting(
        None, "Data", "What is trained on: all, or answers; by the data's columns where not given."
    )
    limit: int | None = _setting(None, "Data", "Use the first N rows.", "N")
    max_seq_len: int = _setting(512, "Data", "Longest sequence, or source, in tokens.", "TOKENS")
    max_target_len: int | None = _setting(
        None,
        "Data",
        "Longest target of a seq2seq model in tokens; as --max-seq-len where not given.",
        "TOKENS",
    )
    batch_size_per_gpu: int | None = _setting(
        None, "Batch", "Rows in one forward/backward, fixed: measured, never changed.", "ROWS"
    )
    effective_batch_size: int = _setting(
        32, "Batch", "Samples per optimizer step over all ranks: reached exactly.", "SAMPLES"
    )
    gradient_accumulation_steps: int | None = _setting(
        None, "Batch", "Micro-batches per step; with a fixed batch it gives the effective one.", "N"
    )
    epochs: float = _setting(1.0, "Training", "Times through the data.")
    max_steps: int | None = _setting(None, "Training", "End after so many optimizer steps.", "N")
    max_time: str | None = _setting(
        None,
        "Training",
        "Time that the run may take, planning included, such as 6h: the steps that fit are taken, and the learning "
        "rate ends with them.",
        "TIME",
    )
    finish_by: str | None = _setting(None, "Training", "The same by the clock, such as 08:00.", "TIME")
    learning_rate: float | None = _setting(
        None, "Training", "Peak learning rate; 5e-4 for pretraining, 1e-4 for SFT where not given."
    )
    schedule: Literal["cosine", "linear", "constant", "one-cycle"] = _setting(
        "cosine", "Training", "After the warm-up: down to a tenth, to nothing, level, or one cycle to nearly nothing."
    )
    warmup: float = _setting(0.03, "Training", "Steps; below 1 a share of all steps.")
    div_factor: float = _setting(
        25.0, "Training", "One cycle begins at the rate over this; the rate itself is the peak."
    )
    weight_decay: float = _setting(0.1, "Training", "Weight decay, of matrices alone.")
    clip: float = _setting(1.0, "Training", "Largest gradient norm; 0 does not clip.")
    deterministic: Literal["off", "on"] = _setting(
        "off",
        "Training",
        "Kernels that add in one order alone: on a card a run goes on to the bit by them; a processor's always do.",
    )
    optimizer: Literal["adamw", "adafactor"] = _setting(
        "adamw", "Training", "adafactor keeps squared gradients by rows and columns: 8 bytes a parameter less to hold."
    )
    seed: int = _setting(42, "Training", "Decides weights, dropout and the order of samples.")
    eval_every: int | None = _setting(
        None, "Evaluation", "Evaluate after so many steps, and not after each epoch; the last one always is.", "STEPS"
    )
    early_stopping: int | None = _setting(
        None, "Evaluation", "End after so many evaluations in a row without a lesser validation loss.", "N"
    )
    bleu_rows: int = _setting(
        64, "Evaluation", "Rows of the validation data that are answered for BLEU, the same each time; 0 for none.", "N"
    )
    samples: int = _setting(
        3,
        "Evaluation",
        "First prompts of the validation data, or else of the data, that are answered into samples.jsonl at each "
        "evaluation; 0 for none.",
        "N",
    )
    prompt: tuple[str, ...] = _setting(
        (), "Evaluation", "A prompt of your own that is answered there too; may be repeated.", "TEXT"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _setting(
        "auto",
        "Memory",
        "auto: bf16 where the hardware has it, else fp16 on a GPU (never for T5), else fp32.",
    )
    gradient_checkpointing: Literal["auto", "off", "on"] = _setting(
        "auto",
        "Memory",
        "Compute activations again instead of keeping them; auto: where nothing fits without, or where it is faster.",
    )
    layout: Literal["auto", "packed", "sorted", "fixed"] = _setting(
        "auto",
        "Batch",
        "How samples share micro-batches: packed into full rows, those of like length together, or as they come; "
        "neither the samples of a step nor their gradient change. auto: the fastest that is exact.",
    )
    loss_head: Literal["auto", "full", "chunked"] = _setting(
        "auto",
        "Memory",
        "The logits of all targets at once, or of a few hundred at a time: the same gradient in less memory. auto: in "
        "chunks where the logits of a step could take a sixteenth of memory.",
    )
    compile: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Batch",
        "Kernels of its own for the model's layers (torch.compile). auto: where the gain that is measured here repays "
        "making them in the steps that there are; tried for runs from a quarter of an hour on.",
    )
    memory_limit: str | None = _setting(None, "Memory", "Most device memory to use, such as 6GiB.", "BYTES")
    headroom: str | None = _setting(
        None, "Memory", "What is kept back of it, such as 5% or 512MiB (default 5 %).", "SHARE|BYTES"
    )
    prefer: Literal["auto", "largest"] = _setting(
        "auto", "Memory", "Largest micro-batch unless a smaller one is measured faster, or the largest."
    )
    report_to: Literal["none", "tensorboard"] = _setting(
        "none", "Output", "Also write the run for TensorBoard, into its folder; metrics.jsonl is always there."
    )
    ranks: int = _setting(
        1,
        "Ranks",
        "Processes that train together on this machine, each on a card of its own, or with its share of cores.",
        "N",
    )
    backend: Literal["auto", "gloo", "nccl"] = _setting(
        "auto", "Ranks", "What carries gradients between ranks; auto: nccl between cards, else gloo."
    )
    heartbeat: float = _setting(60.0, "Ranks", "End all where a rank has given no sign of life for so long.", "SECONDS")
    save_every: str | None = _setting(
        None,
        "Output",
        "Save a checkpoint after so many steps, or so much time, such as 500 or 10m; each epoch and every 30 minutes "
        "where not given. One is saved at the end, at a stop and at the best evaluation too.",
        "STEPS|TIME",
    )
    keep_last: int = _setting(3, "Output", "Checkpoints that stay; two at least, and that of the best evaluation.", "N")
    output_dir: str | None = _setting(None, "Output", "Folder of the run (default runs/MODEL-DATE).", "DIR")


FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(Settings)}


@dataclass(frozen=True)
class Resolved:
    """Settings, and by name where each came from."""

    settings: Settings
    origins: Mapping[str, str]
    replaced: Mapping[str, Any]
    """Of what was given on the command line or in a file, what stood there before: a profile's value, or a default."""
    limit: TimeLimit | None
    """When what was asked has to end, counted from when it was resolved."""

    def given_by_hand(self, name: str) -> bool:
        """Whether a value was typed on the command line or stands in a configuration file, not in a profile."""
        return not self.origins[name].startswith(("default", "profile"))


def resolve(given: Mapping[str, Any], config: str | None = None, profile: str | None = None) -> Resolved:
    """Merge what was typed, a file and a profile over the defaults; raises ConfigurationError for no setting."""
    values: dict[str, Any] = {}
    origins = dict.fromkeys(FIELDS, "default")
    replaced: dict[str, Any] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if profile is not None:
        layers.append((f"profile {profile}", _without_about(load_profile(profile))))
    if config is not None:
        layers.append((config, _read(Path(config))))
    layers.append(("command line", given))
    for origin, layer in layers:
        for name in WAYS_TO_END if layer.keys() & set(WAYS_TO_END) else ():  # the later word on it holds
            values.pop(name, None)
            origins[name] = "default"
        for name, value in layer.items():
            if not origin.startswith("profile"):
                replaced.setdefault(name, values.get(name, FIELDS[name].default))
            values[name] = tuple(value) if isinstance(value, list) else value
            if FIELDS[name].metadata["commas"]:
                values[name] = _parts(value)
            origins[name] = origin
    settings = _validated(values, origins)
    return Resolved(settings, origins, replaced, _time_limit(settings, datetime.now()))


WAYS_TO_END = ("max_time", "finish_by")


def _time_limit(settings: Settings, now: datetime) -> TimeLimit | None:
    """Say when what is asked now, a local time, has to end; None where it may take what it takes."""
    began_at = now.timestamp()
    if settings.max_time is not None:
        return TimeLimit(began_at=began_at, ends_at=began_at + parse_duration(settings.max_time), of_run=True)
    if settings.finish_by is not None:
        ends_at = parse_moment(settings.finish_by, now).timestamp()
        return TimeLimit(began_at=began_at, ends_at=ends_at, of_run=False)
    return None


def load_profile(name: str) -> dict[str, Any]:
    """Return the values of a profile, by name or by the path of a TOML file; `about` says what it is for."""
    if name.endswith(".toml"):
        return _read(Path(name))
    file = FOLDER / f"{name}.toml"
    if name not in profile_names():
        raise ConfigurationError(f"no profile {name!r}", did_you_mean(name, profile_names()))
    return _read(file)


def profile_names() -> list[str]:
    """Return the names of the profiles that come with the program."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the nearest known word as a hint, or all of them."""
    known = list(known)
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def _parts(value: Any) -> Any:
    """Split at commas, so that `a,b` is `a` and `b`, in one order: a plan's workload holds them."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        return value  # which is then refused
    return tuple(sorted({part.strip() for word in words for part in word.split(",") if part.strip()}))


def _read(file: Path) -> dict[str, Any]:
    """Read a flat TOML file, names with dashes or underscores."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: not TOML: {error}") from None
    values = {name.replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in FIELDS and name != "about":
            here = ours(name, FIELDS)
            hint = f"here it is {here}" if here else did_you_mean(name, FIELDS)
            raise ConfigurationError(f"{file}: unknown key {name!r}", hint)
    return _without_about(values) if file.parent != FOLDER else values


def _without_about(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "about"}


AT_LEAST: dict[str, float] = {
    "limit": 1,
    "max_seq_len": 8,
    "max_target_len": 8,
    "batch_size_per_gpu": 1,
    "effective_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "warmup": 0,
    "div_factor": 1,
    "weight_decay": 0,
    "clip": 0,
    "dropout": 0,
    "seed": 0,
    "eval_every": 1,
    "early_stopping": 1,
    "bleu_rows": 0,
    "samples": 0,
    "keep_last": 1,
    "ranks": 1,
}


def _validated(values: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    """Check types and ranges; each error names the setting and where it came from."""
    from pydantic import TypeAdapter, ValidationError

    try:
        settings: Settings = TypeAdapter(Settings).validate_python(values)
    except ValidationError as errors:
        error = errors.errors()[0]
        name = str(error["loc"][0])
        raise ConfigurationError(f"{name} = {values[name]!r} ({origins[name]}): {error['msg'].lower()}") from None
    for name, least in AT_LEAST.items():
        value = getattr(settings, name)
        if value is not None and not value >= least:  # so that nan is refused too
            raise ConfigurationError(f"{name} = {value} ({origins[name]}) must be at least {least:g}")
    for name in ("epochs", "learning_rate", "heartbeat"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigurationError(f"{name} = {value} ({origins[name]}) must be above 0")
    if settings.validation_split is not None and not 0 < settings.validation_split < 1:
        origin = origins["validation_split"]
        raise ConfigurationError(f"validation_split = {settings.validation_split} ({origin}) must be between 0 and 1")
    if settings.max_time is not None and settings.finish_by is not None:
        raise ConfigurationError(
            f"max_time = {settings.max_time} ({origins['max_time']}) and finish_by = {settings.finish_by} "
            f"({origins['finish_by']}) both say when to end",
            "leave one of them out",
        )
    if settings.dropout is not None and not settings.dropout < 1:
        raise ConfigurationError(f"dropout = {settings.dropout} ({origins['dropout']}) must be below 1")
    if settings.early_stopping is not None and not (settings.validation or settings.validation_split):
        raise ConfigurationError(
            f"early_stopping = {settings.early_stopping} ({origins['early_stopping']}) needs data to evaluate on",
            "give --validation FILE or --validation-split 0.01, or leave it out",
        )
    return settings
