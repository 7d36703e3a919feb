"""What was decided for the user, and why: one line for each setting that was left to us. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from autotune.errands import Preprocessed
from autotune.plan import Plan
from autotune.planner import LONG_SECONDS
from cli.choices import MUCH, WORTH_PACKING, choose_layout, has_compiler, step_limits
from cli.render.notes import balanced_note
from cli.render.sentences import why_not_larger
from cli.render.units import count
from cli.wiring import LEARNING_RATES
from profiles import Resolved

UNDER_USED = 0.5
"""Share of the budget below which it is said that more would fit."""


class Decision(NamedTuple):
    """A setting, the value that it has, and the reason."""

    name: str
    value: str
    reason: str


def decisions(resolved: Resolved, plan: Plan, facts: Preprocessed, *, by_plan: bool) -> list[Decision]:
    """Return what nobody gave and no profile says, in the order in which people ask; `by_plan` is one made before."""
    told = list(_decided(resolved, plan, facts))
    if by_plan:
        return [d._replace(reason="as the plan has it") if d.name in OF_A_PLAN else d for d in told]
    return told


OF_A_PLAN = ("micro-batch", "precision", "layout", "loss head", "gradient checkpointing", "compile", "malloc")


def _decided(resolved: Resolved, plan: Plan, facts: Preprocessed) -> Iterator[Decision]:
    settings, work = resolved.settings, plan.workload
    if settings.stage is None:
        trained = "answers alone are trained on" if work.stage == "sft" else "all tokens are trained on"
        yield Decision("stage", work.stage, f"by the data's columns: {trained}")
    if settings.tokenizer is None and facts.model.random_weights:
        yield Decision("tokenizer", f"{work.vocabulary_size:,} entries", "trained on this data, and kept for the next")
    if settings.learning_rate is None:
        yield Decision("learning rate", f"{LEARNING_RATES[work.stage]:g}", f"what {work.stage} usually begins with")
    yield from _batch(resolved, plan)
    if settings.precision == "auto":
        yield Decision("precision", work.precision, _why_precision(plan, facts))
    if settings.layout == "auto":
        yield Decision("layout", work.layout, _why_layout(resolved, plan, facts))
    if settings.loss_head == "auto":
        yield Decision("loss head", work.loss_head, _why_loss_head(plan, facts))
    if settings.gradient_checkpointing == "auto":
        yield Decision("gradient checkpointing", work.gradient_checkpointing, _why_checkpointing(plan))
    if settings.compile == "auto":
        yield Decision("compile", work.compile, _why_compile(plan))
    if plan.hardware.device == "cpu":
        ample = "memory is ample: pages are kept" if work.cpu_allocator == "fast" else "memory binds: it is given back"
        yield Decision("malloc", work.cpu_allocator, ample)
    if settings.save_every is None:
        yield Decision("checkpoints", "each epoch and every 30 min", f"the last {settings.keep_last} and the best stay")


def _batch(resolved: Resolved, plan: Plan) -> Iterator[Decision]:
    batching, asked = plan.batching, resolved.settings.effective_batch_size
    if batching.effective_batch_size != asked:
        why = "all samples there are" if batching.effective_batch_size < asked else "that of the batch that was given"
        yield Decision("effective batch", str(batching.effective_batch_size), f"{why}, in place of {asked}")
    if batching.limited_by != "user":
        yield Decision("micro-batch", count(batching.micro_batch_size, "row"), why_not_larger(plan))
    if not resolved.given_by_hand("gradient_accumulation_steps") and plan.workload.layout == "fixed":
        note = balanced_note(batching)
        yield Decision(
            "accumulation",
            str(batching.gradient_accumulation_steps),
            "micro-batches that reach the effective batch exactly" + f", {note}" * bool(note),
        )


def _why_precision(plan: Plan, facts: Preprocessed) -> str:
    machine = plan.hardware
    device = "card" if machine.device == "cuda" else "processor"
    if plan.workload.precision == "bf16":
        return f"this {device} has arithmetic for it"
    if "t5" in facts.model.family and machine.device == "cuda":
        return "this card has no bf16, and T5 overflows in fp16"
    return f"this {device} has no arithmetic for bf16"


def _why_layout(resolved: Resolved, plan: Plan, facts: Preprocessed) -> str:
    layout = plan.workload.layout
    first = choose_layout(resolved.settings, facts, step_limits(resolved.settings, facts))
    if layout != first:
        inexact = any(first in trial.inexact for trial in plan.evidence.trials)
        return f"{first} rows change this model's gradient" if inexact else f"measured to be faster than {first}"
    if layout == "packed":
        return "the least padding, exact for this model, and nothing was faster by 5 %"
    if layout == "sorted":
        return "samples of this model cannot share a row; those of like length share a micro-batch"
    return f"less than {WORTH_PACKING:.0%} of plain rows is padding"


def _why_loss_head(plan: Plan, facts: Preprocessed) -> str:
    if plan.workload.loss_head == "chunked":
        return f"all logits of a step could take more than 1/{1 / MUCH:.0f} of memory; the gradient is the same"
    if not facts.model.chunks:
        return f"it is not known what a {facts.model.family} model does to its logits"
    return "the logits of a step take little memory"


def _why_checkpointing(plan: Plan) -> str:
    if plan.workload.gradient_checkpointing == "off":
        return "not needed: it would cost a second forward"
    plain = [other for other in plan.alternatives if other.change.endswith("checkpointing off")]
    fits = any(other.largest_micro_batch_size for other in plain)
    return "measured to be faster: larger micro-batches fit" if fits else "without it nothing fits"


def _why_compile(plan: Plan) -> str:
    if plan.workload.compile == "on":
        return "measured to save more than twice what compiling takes"
    if not has_compiler():
        return "no C++ compiler is here"
    cast = plan.forecast
    if cast is not None and cast.total_seconds < LONG_SECONDS:
        return f"a run of less than {LONG_SECONDS / 60:.0f} min does not repay it"
    if plan.hardware.device == "cpu" and plan.workload.cpu_allocator == "tight":
        return "memory binds, and the compiler takes some too"
    return "what it saves would not repay compiling"


def advice(plan: Plan) -> list[str]:
    """Say what could be had for the asking: a card that is hardly used, a fixed batch that could grow."""
    batching, memory, machine = plan.batching, plan.memory, plan.hardware
    peak = memory.measured_peak_bytes or memory.predicted_peak_bytes or 0
    used = peak / memory.budget_bytes
    if used >= UNDER_USED:
        return []
    if batching.limited_by == "user" and batching.expected_micro_batches_per_step > 1:
        return [
            f"the batch that was given, {count(batching.micro_batch_size, 'row')}, takes {used:.0%} of the budget: "
            "--auto, without --batch-size-per-gpu, takes larger micro-batches for the same step"
        ]
    if machine.device == "cuda" and batching.limited_by in ("effective_batch", "data"):
        return [
            f"the card is used to {peak / machine.device_memory_total_bytes:.0%}: one micro-batch holds all of a step; "
            "a larger model, longer rows or a larger --effective-batch-size would fit"
        ]
    return []
