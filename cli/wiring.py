"""What was said -> what is done: settings become an errand, a workload, a request, a recipe. Prints nothing."""

from __future__ import annotations

import os
import shutil
import time
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from autotune.batching import PADDING_MULTIPLE, balanced_cuts, largest_share
from autotune.errands import DataSummary, ModelSummary, Preprocess, Preprocessed, Recipe
from autotune.errors import ConfigurationError, MachineError, RunExistsError
from autotune.forecast import padding_share
from autotune.inputs import PlanInputs
from autotune.plan import Batching, Hardware, Layout, LossHead, Plan, Precision, Request, Workload
from profiles import Resolved, Settings, parse_bytes, parse_headroom

WORTH_PACKING = 0.05
"""Share of padding below which plain rows are taken."""
TOGETHER = 32
"""Plain rows in a micro-batch, where padding is judged: so many are as long as a few of the longest."""
BYTES_OF_LOGIT = 8
"""With its gradient, in fp32."""
MUCH = 1 / 16
LEARNING_RATES = {"pretrain": 5e-4, "sft": 1e-4}
MIB = 2**20


def check_reporting(settings: Settings) -> None:
    """Raise ConfigurationError where a run is to be reported to what is not installed."""
    if settings.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigurationError("TensorBoard is not installed", "pip install 'chatlm[tensorboard]'")


def cache_dir() -> Path:
    """Return where token stores and trained tokenizers are kept: $XDG_CACHE_HOME/chatlm, or ~/.cache/chatlm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatlm"


def preprocess_errand(settings: Settings, *, demo: bool, show: int = 0) -> Preprocess:
    """Ask what the model and the data are; without data nothing is tokenized, unless the demo's is to be used.

    Raises ConfigurationError where validation data is both given and split off.
    """
    if settings.validation and settings.validation_split:
        raise ConfigurationError(
            f"--validation and --validation-split {settings.validation_split:g} both say what is not trained on",
            "leave one of them out",
        )
    return Preprocess(
        model=settings.model,
        tokenizer=settings.tokenizer,
        dropout=settings.dropout,
        freeze=settings.freeze,
        data=settings.data or (() if demo else None),
        validation=settings.validation,
        validation_split=settings.validation_split,
        stage=settings.stage,
        max_seq_len=settings.max_seq_len,
        max_target_len=settings.max_target_len or settings.max_seq_len,
        limit=settings.limit,
        show=show,
        cache_dir=str(cache_dir()),
    )


def choose_precision(asked: str, family: str, hardware: Hardware) -> Precision:
    """Take what was asked for, or bf16 where the hardware has it, else fp16 on a GPU (never for T5), else fp32."""
    t5 = "t5" in family
    if asked == "fp16" and t5:
        raise ConfigurationError(
            "T5 overflows in fp16: its losses become NaN",
            "use --precision bf16, or fp32 where that is not to be had",
        )
    if asked in ("fp32", "bf16", "fp16"):
        return asked  # type: ignore[return-value] # mypy does not narrow str by a tuple
    if hardware.fast_bf16:
        return "bf16"
    return "fp16" if hardware.device == "cuda" and not t5 else "fp32"


def choose_layout(settings: Settings, facts: Preprocessed, limits: tuple[int, ...]) -> Layout:
    """Take what was asked for, or packed rows, which a plan then weighs against the others; raises ConfigurationError.

    Not where samples cannot share a row: attention that looks back over a window, or a model that takes no mask. And
    not where there is hardly any padding to save: masks are not for nothing.
    """
    model = facts.model
    packs = model.packs and (model.window is None or model.window >= settings.max_seq_len)
    if settings.layout == "packed" and not packs:
        why = "it takes no mask that keeps them apart"
        if model.packs:
            why = f"some of its layers look back over {model.window} tokens of {settings.max_seq_len}"
        raise ConfigurationError(
            f"samples cannot share rows in this {model.family} model: {why}", "use --layout sorted, or leave it out"
        )
    if settings.layout != "auto":
        return settings.layout
    if facts.data is not None:
        together = min(facts.data.samples, TOGETHER)
        if padding_share(facts.data, "fixed", limits, together, together) < WORTH_PACKING:
            return "fixed"
    return "packed" if packs else "sorted"


def choose_loss_head(settings: Settings, facts: Preprocessed, hardware: Hardware, target_tokens: int) -> LossHead:
    """Take what was asked for, or chunks where the logits of all of a rank's step, each with its gradient, are much.

    Where they are little, all at once is as fast or faster by up to 5 %; and where it is not known what the model does
    to its logits, there is no other way. `target_tokens` are those of the longest row.
    """
    if settings.loss_head != "auto":
        return settings.loss_head
    rows = largest_share(settings.effective_batch_size, hardware.world_size)
    limit = memory_wishes(settings)[0] or hardware.device_memory_free_bytes
    logits_bytes = rows * target_tokens * facts.model.vocabulary_size * BYTES_OF_LOGIT
    return "chunked" if facts.model.chunks and logits_bytes > limit * MUCH else "full"


def padding_by_layout(settings: Settings, facts: Preprocessed) -> dict[Layout, float]:
    """Return the share of padding that each layout would have, in steps of the effective batch on one rank."""
    data, limits = facts.data, step_limits(settings, facts)
    assert data is not None
    share = min(data.samples, settings.effective_batch_size)
    rows = min(share, settings.batch_size_per_gpu or share)
    layouts: tuple[Layout, ...] = ("packed", "sorted", "fixed")
    return {layout: padding_share(data, layout, limits, rows, share) for layout in layouts}


def step_limits(settings: Settings, facts: Preprocessed) -> tuple[int, ...]:
    """Return the longest row there can be, by side."""
    source = _worst_case(settings.max_seq_len, facts, 0)
    if facts.model.task == "causal":
        return (source,)
    return (source, _worst_case(settings.max_target_len or settings.max_seq_len, facts, 1))


def make_workload(settings: Settings, facts: Preprocessed, hardware: Hardware) -> Workload:
    """Put together what decides a step's memory and numbers, at the worst case that the data or the limits allow."""
    model = facts.model
    limits = step_limits(settings, facts)
    return Workload(
        model=settings.model,
        task=model.task,
        stage=facts.data.stage if facts.data else settings.stage or "sft",
        parameters=model.parameters,
        trainable_parameters=model.trainable_parameters,
        vocabulary_size=model.vocabulary_size,
        max_seq_len=limits[0],
        max_target_len=limits[1] if model.task == "seq2seq" else 0,
        precision=choose_precision(settings.precision, model.family, hardware),
        optimizer=settings.optimizer,
        gradient_checkpointing="on" if settings.gradient_checkpointing == "on" else "off",
        frozen=settings.freeze,
        dropout=settings.dropout,
        layout=choose_layout(settings, facts, limits),
        loss_head=choose_loss_head(settings, facts, hardware, limits[-1]),
        attention=model.attention,
        compile="on" if settings.compile == "on" else "off",
        cpu_allocator="fast" if hardware.device == "cpu" else "tight",
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        data_fingerprint=facts.data.fingerprint if facts.data else None,
    )


def _worst_case(limit: int, facts: Preprocessed, side: int) -> int:
    """Return the longest row there can be: the longest sample padded as micro-batches are, or the limit."""
    sets = [data for data in (facts.data, facts.validation) if data is not None]
    if not sets:
        return limit
    longest = max(data.longest(side) for data in sets)
    return min(limit, ceil(longest / PADDING_MULTIPLE) * PADDING_MULTIPLE)


def make_inputs(settings: Settings, facts: Preprocessed, hardware: Hardware, request: Request) -> PlanInputs:
    """Put together all that a plan is made from."""
    workload = make_workload(settings, facts, hardware)
    recipe = make_recipe(settings, workload.stage)
    return PlanInputs(workload, hardware, request, recipe, facts.data, facts.validation)


def make_request(resolved: Resolved, world_size: int, *, search: bool, offline: bool = False) -> Request:
    """Say which batch is wanted: of rows, accumulation and effective batch, what was typed wins over a profile's.

    Rows that were typed are fixed; a profile's are, unless a search was asked for. Raises ConfigurationError where all
    that was typed does not go together.
    """
    settings, typed = resolved.settings, resolved.given_by_hand
    rows, accumulation = settings.batch_size_per_gpu, settings.gradient_accumulation_steps
    effective = settings.effective_batch_size
    if rows is not None and typed("batch_size_per_gpu"):
        counted = accumulation if accumulation is not None and typed("gradient_accumulation_steps") else None
        reached = rows * world_size * (counted or 1)
        if counted is not None or reached > effective:
            if typed("effective_batch_size") and reached != effective:
                raise ConfigurationError(
                    f"{rows} rows x {counted or 1} accumulation x {world_size} ranks are {reached} samples, "
                    f"not the effective batch of {effective}",
                    "leave one of the three out",
                )
            effective = reached
    elif accumulation is not None and typed("gradient_accumulation_steps"):
        rows = ceil(effective / (world_size * accumulation))
        _check_accumulation(effective, world_size, accumulation, rows)
    else:  # what stands there is a profile's
        if rows is not None and accumulation is not None and resolved.origins["effective_batch_size"] == "default":
            effective = rows * accumulation * world_size
        elif rows is None and accumulation is not None:
            rows = ceil(effective / (world_size * accumulation))
        if rows is not None:
            rows = None if search else min(rows, largest_share(effective, world_size))
    limit, headroom = memory_wishes(settings)
    return Request(
        effective_batch_size=effective,
        micro_batch_size=rows,
        prefer=settings.prefer,
        checkpointing="auto" if settings.gradient_checkpointing == "auto" else "given",
        layout="auto" if settings.layout == "auto" else "given",
        compile="auto" if settings.compile == "auto" and _has_compiler() else "given",
        offline=offline,
        memory_limit_bytes=limit,
        headroom=headroom,
    )


def _has_compiler() -> bool:
    """Say whether there is a C++ compiler, as torch.compile looks for one; Triton on a card needs one too."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl"))


def memory_wishes(settings: Settings) -> tuple[int | None, float | None]:
    """Return the memory limit in bytes, and the headroom in bytes or, below 1, as a share; None where not given."""
    limit = parse_bytes(settings.memory_limit) if settings.memory_limit else None
    return limit, parse_headroom(settings.headroom) if settings.headroom else None


def _check_accumulation(effective: int, world_size: int, accumulation: int, rows: int) -> None:
    """Raise ConfigurationError for a count of micro-batches that equal ones do not come to: 9 samples in 4 go 3 x 3."""
    reached = len(balanced_cuts(largest_share(effective, world_size), rows))
    if reached != accumulation:
        raise ConfigurationError(
            f"{effective} samples over {world_size} ranks do not go into {accumulation} equal micro-batches: "
            f"{rows} rows each reach them in {reached}",
            f"--gradient-accumulation-steps {reached} gives the same step, in fewer",
        )


def make_recipe(settings: Settings, stage: str) -> Recipe:
    """Say how to train what the plan describes."""
    return Recipe(
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate or LEARNING_RATES[stage],
        schedule=settings.schedule,
        warmup=settings.warmup,
        div_factor=settings.div_factor,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        seed=settings.seed,
        eval_every=settings.eval_every,
        early_stopping=settings.early_stopping,
        bleu_rows=settings.bleu_rows,
        samples=settings.samples,
        prompts=settings.prompt,
    )


def read_plan(file: str) -> Plan:
    """Read a plan; raises ConfigurationError for what is none."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: {error}", "make one: chatlm plan --json > plan.json") from None
    try:
        return Plan.from_json(text)
    except ValueError as error:
        first = str(error).splitlines()
        raise ConfigurationError(
            f"{file}: not a plan of chatlm.plan/1: {' '.join(first[1:3]).strip()}",
            "make one: chatlm plan --json > plan.json",
        ) from None


def settings_of_plan(plan: Plan, resolved: Resolved) -> Settings:
    """Return the settings with the plan's workload in force; raises ConfigurationError where one typed differs."""
    workload, batching = plan.workload, plan.batching
    values: dict[str, Any] = {
        "model": workload.model,
        "stage": workload.stage,
        "dropout": workload.dropout,
        "freeze": workload.frozen,
        "optimizer": workload.optimizer,
        "precision": workload.precision,
        "gradient_checkpointing": workload.gradient_checkpointing,
        "layout": workload.layout,
        "loss_head": workload.loss_head,
        "compile": workload.compile,
        "effective_batch_size": batching.effective_batch_size,
        "batch_size_per_gpu": batching.micro_batch_size,
        "gradient_accumulation_steps": batching.gradient_accumulation_steps,
    }
    for name, planned in values.items():
        typed = getattr(resolved.settings, name)
        if resolved.given_by_hand(name) and typed not in (planned, "auto"):
            raise ConfigurationError(
                f"the plan has {name} {planned}, {resolved.origins[name]} {typed}", "leave it out, or plan again"
            )
    return Settings(**{**vars(resolved.settings), **values})


def fit_plan(plan: Plan, facts: Preprocessed) -> Plan:
    """Return the plan with this data in it; raises ConfigurationError where the data is larger than was planned for."""
    workload, data = plan.workload, facts.data
    assert data is not None
    if plan.batching.world_size > 1:
        raise ConfigurationError(
            f"the plan is for {plan.batching.world_size} ranks, and one trains here",
            "plan again with --auto: the effective batch stays the same",
        )
    limits = [workload.max_seq_len, workload.max_target_len][: len(data.lengths)]
    for side, limit in enumerate(limits):
        longest = max(d.longest(side) for d in (data, facts.validation) if d is not None)
        if longest > limit:
            option = ("--max-seq-len", "--max-target-len")[side]
            raise ConfigurationError(
                f"the plan holds for rows of {limit} tokens, the longest here has {longest}",
                f"plan again with this data, or cut it: {option} {limit}",
            )
    if facts.model.vocabulary_size > workload.vocabulary_size or facts.model.task != workload.task:
        raise ConfigurationError(
            f"the plan is for a {workload.task} model with a vocabulary of {workload.vocabulary_size}, "
            f"this is {facts.model.task} with {facts.model.vocabulary_size}",
            "plan again with this data and tokenizer",
        )
    changed = {
        "parameters": facts.model.parameters,
        "trainable_parameters": facts.model.trainable_parameters,
        "vocabulary_size": facts.model.vocabulary_size,
        "tokenizer_fingerprint": facts.tokenizer_fingerprint,
        "data_fingerprint": data.fingerprint,
    }
    same_data = data.fingerprint == workload.data_fingerprint
    return plan.model_copy(
        update={
            "workload": workload.model_copy(update=changed),
            "forecast": plan.forecast if same_data else None,
        }
    )


def run_folder(settings: Settings) -> Path:
    """Return the folder of the run; raises RunExistsError for one that holds a run."""
    name = f"{Path(settings.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(settings.output_dir or Path("runs") / name)
    metrics = folder / "metrics.jsonl"
    if (folder / "model").exists() or (metrics.exists() and metrics.stat().st_size):
        raise RunExistsError(f"{folder} already holds a run", "give another --output-dir, or move that folder away")
    return folder


def make_folder(folder: Path, model: ModelSummary, hardware: Hardware) -> None:
    """Make the folder of the run; raises MachineError where it cannot be made, or the model would not fit the disk."""
    needed = 2 * 4 * model.parameters + 16 * MIB
    if hardware.disk_free_bytes < needed:
        raise MachineError(
            f"the disk of {folder} has {hardware.disk_free_bytes / MIB:,.0f} MiB free, "
            f"saving the model takes {needed / MIB:,.0f} MiB",
            "free some, or give an --output-dir on another disk",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror}", "give an --output-dir that can be written") from None


def write_run(folder: Path, resolved: Resolved, settings: Settings, plan: Plan, evidence: str | None) -> None:
    """Write what the run was given: `config.toml` with the origin of every value, `plan.json`, `evidence.json`."""
    import json

    # What this run alone decided is a comment: the file can be given as --config to another.
    lines = [
        f"{'# ' * (origin in OF_THIS_RUN)}{name} = {json.dumps(value, ensure_ascii=False)}  # {origin}"
        for name, (value, origin) in _decided(resolved, settings, plan, folder).items()
        if value is not None
    ]
    (folder / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
    if evidence is not None:
        (folder / "evidence.json").write_text(evidence + "\n", encoding="utf-8")


OF_THIS_RUN = ("plan", "this run")


def _decided(resolved: Resolved, settings: Settings, plan: Plan, folder: Path) -> dict[str, tuple[Any, str]]:
    """Return every setting with its value in force and its origin: what was left to us says by what it was decided."""
    batching, workload = plan.batching, plan.workload
    by_rule: dict[str, Any] = {
        "learning_rate": LEARNING_RATES[workload.stage],
        "precision": workload.precision,
        "stage": workload.stage,
        "gradient_checkpointing": workload.gradient_checkpointing,
        "layout": workload.layout,
    }
    by_plan = {
        "output_dir": str(folder),
        "batch_size_per_gpu": batching.micro_batch_size,
        "effective_batch_size": batching.effective_batch_size,
        "gradient_accumulation_steps": batching.gradient_accumulation_steps,
    }
    decided = {}
    for name, value in vars(settings).items():
        asked, origin = getattr(resolved.settings, name), resolved.origins[name]
        if value in (None, "auto") and name in by_rule:
            decided[name] = (by_rule[name], "rule")
        elif (planned := by_plan.get(name, value)) != asked:
            decided[name] = (planned, "this run" if name == "output_dir" else "plan")
        else:
            decided[name] = (value, origin)
    return decided


def balanced_note(batching: Batching) -> str:
    """Say that a fixed batch is reached in balanced micro-batches, where it does not divide the share."""
    share = ceil(batching.effective_batch_size / batching.world_size)
    used = ceil(share / batching.gradient_accumulation_steps)
    return f"cut evenly: {used} rows at most" if used < batching.micro_batch_size else ""


def notes(settings: Settings, facts: Preprocessed) -> list[str]:
    """Say what the user should know before it runs: random weights, rows cut, a tokenizer that knows too little."""
    said: list[str] = []
    data = facts.data
    if data is None:
        return said
    if data.stage == "sft" and facts.model.random_weights:
        said.append(
            f"fine-tuning (SFT) starts from RANDOM weights: {settings.model} is a preset, not a pretrained model; "
            "to start from one give its folder, --model DIR"
        )
    if facts.model.random_weights and settings.freeze:
        said.append(
            f"{', '.join(settings.freeze)} will stay RANDOM: {settings.model} is a preset, and what is frozen is not "
            "trained; to start from a pretrained model give its folder, --model DIR"
        )
    for summary, name in ((data, "data"), (facts.validation, "validation")):
        if summary is not None and summary.cuts:
            rules = ", ".join(f"{rule} {count:,}" for rule, count in summary.cuts.items())
            said.append(f"{name}: rows over the limit were cut, by rule: {rules} of {summary.rows:,}")
        if summary is not None and summary.unknown_share > UNKNOWN_SHARE:
            said.append(
                f"{name}: {summary.unknown_share:.0%} of the tokens are unknown to the tokenizer "
                "(chatlm-mini's own does not know the space mark); a trained one (no --tokenizer) knows all"
            )
    return said


def slower_precision(plan: Plan) -> str:
    """Say that half precision, which the rule took for fast, was measured to be slower here; else nothing."""
    rates, precision = plan.speed.matrix_flops if plan.speed else {}, plan.workload.precision
    own, full = rates.get(precision, 0.0), rates.get("fp32", 0.0)
    if not own < full:
        return ""
    return (
        f"{precision} matrices were multiplied at {own / 1e9:,.0f} GFLOP/s here, fp32 ones at {full / 1e9:,.0f}: "
        "--precision fp32 is faster"
    )


UNKNOWN_SHARE = 0.01


def percentile(data: DataSummary, side: int, share: float) -> int:
    """Return the length that this share of the samples does not exceed."""
    seen = 0
    for length, count in data.lengths[side]:
        seen += count
        if seen >= share * data.samples:
            return length
    return data.longest(side)
