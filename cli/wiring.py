"""What was said -> what is done: settings become an errand, a workload, a request, a recipe. Prints nothing."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autotune.batching import STARTING_TOKENS, balanced_cuts, largest_share
from autotune.errands import Preprocess, Preprocessed, Recipe, Saving
from autotune.errors import ConfigurationError
from autotune.inputs import Course, PlanInputs
from autotune.plan import Backend, Hardware, Plan, Request, Workload
from cli.choices import choose_layout, choose_loss_head, choose_precision, has_compiler, step_limits
from profiles import Resolved, Settings
from profiles.values import parse_bytes, parse_every, parse_headroom

SAVE_SECONDS = 30.0 * 60
LEARNING_RATES = {"pretrain": 5e-4, "sft": 1e-4}


def check_reporting(settings: Settings) -> None:
    """Raise ConfigurationError where a run is to be reported to what is not installed."""
    if settings.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigurationError("TensorBoard is not installed", "pip install 'chatlm[tensorboard]'")


def cache_dir() -> Path:
    """Return where token stores and trained tokenizers are kept: $XDG_CACHE_HOME/chatlm, or ~/.cache/chatlm.

    Raises ConfigurationError for a user without a home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatlm"
    except RuntimeError:
        raise ConfigurationError(
            "this user has no home folder, in which a cache could be", "export XDG_CACHE_HOME=DIR, or HOME=DIR"
        ) from None


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
        starting_tokens=STARTING_TOKENS[hardware.device],
        loss_head=choose_loss_head(settings, facts, hardware, limits[-1]),
        attention=model.attention,
        compile="on" if settings.compile == "on" else "off",
        deterministic=settings.deterministic,
        cpu_allocator="fast" if hardware.device == "cpu" else "tight",
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        data_fingerprint=facts.data.fingerprint if facts.data else None,
    )


def make_inputs(resolved: Resolved, facts: Preprocessed, hardware: Hardware, request: Request) -> PlanInputs:
    """Put together all that a plan is made from."""
    workload = make_workload(resolved.settings, facts, hardware)
    return PlanInputs(workload, hardware, request, make_course(resolved, facts))


def make_course(resolved: Resolved, facts: Preprocessed, begun_steps: int = 0, spent_seconds: float = 0.0) -> Course:
    """Say what a run is to do from now on, of which steps are done and time is spent in other processes."""
    settings, limit = resolved.settings, resolved.limit
    stage = facts.data.stage if facts.data else settings.stage or "sft"
    left = None
    if limit is not None:
        left = limit.ends_at - time.time() - (spent_seconds if limit.of_run else 0.0)
    recipe = make_recipe(settings, stage)
    return Course(recipe, make_saving(settings), facts.data, facts.validation, left, begun_steps)


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
        if counted is not None or rows > largest_share(effective, world_size):
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
        compile="auto" if settings.compile == "auto" and has_compiler() else "given",
        backend=choose_backend(settings),
        offline=offline,
        memory_limit_bytes=limit,
        headroom=headroom,
    )


def choose_backend(settings: Settings) -> Backend | None:
    """Return what was asked to carry gradients between ranks; None where the devices decide."""
    return None if settings.backend == "auto" else settings.backend


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


def make_saving(settings: Settings) -> Saving:
    """Say when to save; raises ConfigurationError for what is neither steps nor a time."""
    steps, seconds = parse_every(settings.save_every) if settings.save_every else (None, SAVE_SECONDS)
    return Saving(
        every_steps=steps,
        every_seconds=seconds,
        each_epoch=settings.save_every is None,
        keep_last=settings.keep_last,
    )


def read_plan(file: str) -> Plan:
    """Read a plan; raises ConfigurationError for what is none."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: {error}", "make one: chatlm plan --json > plan.json") from None
    try:
        return Plan.from_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise ConfigurationError(
            f"{file}: not a plan of chatlm.plan/1: {place}{first['msg']}",
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
        "deterministic": workload.deterministic,
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


def check_same_hardware(plan: Plan, hardware: Hardware) -> None:
    """Raise ConfigurationError where a plan was made for another device: its numbers would be others here."""
    then, now = plan.hardware.device_name, hardware.device_name
    if then != now:
        raise ConfigurationError(f"it is for {then}, here is {now}")


def check_ranks(plan: Plan, hardware: Hardware) -> None:
    """Raise ConfigurationError where a plan is for more or fewer ranks than train here."""
    then, now = plan.batching.world_size, hardware.world_size
    if then != now:
        raise ConfigurationError(
            f"the plan is for {then} rank{'s' * (then > 1)}, and {now} train{'s' * (now == 1)} here",
            f"give --ranks {then}, or plan again with --auto: the effective batch stays the same",
        )


def fit_plan(plan: Plan, facts: Preprocessed) -> Plan:
    """Return the plan with this data in it; raises ConfigurationError where the data is larger than was planned for."""
    workload, data = plan.workload, facts.data
    assert data is not None
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
