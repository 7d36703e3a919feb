"""What is taken where nothing was typed: by rule, from facts. What can be weighed by measuring is left to the plan."""

from __future__ import annotations

import os
import shutil
from math import ceil

from autotune.batching import PADDING_MULTIPLE, STARTING_TOKENS, largest_share
from autotune.errands import DataSummary, Preprocessed
from autotune.errors import ConfigurationError
from autotune.plan import Hardware, Layout, LossHead, Plan, Precision
from autotune.shapes import padding_share
from profiles import Settings
from profiles.values import parse_bytes

WORTH_PACKING = 0.05
"""Share of padding below which plain rows are taken."""
TOGETHER = 32
"""Plain rows in a micro-batch, where padding is judged: so many are as long as a few of the longest."""
BYTES_OF_LOGIT = 8
"""With its gradient, in fp32."""
MUCH = 1 / 16
LAYOUTS: tuple[Layout, ...] = ("packed", "sorted", "fixed")


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
        if padding_share(facts.data, "fixed", limits, together, together, 0) < WORTH_PACKING:
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
    limit = parse_bytes(settings.memory_limit) if settings.memory_limit else hardware.device_memory_total_bytes
    logits_bytes = rows * target_tokens * facts.model.vocabulary_size * BYTES_OF_LOGIT
    return "chunked" if facts.model.chunks and logits_bytes > limit * MUCH else "full"


def padding_by_layout(settings: Settings, facts: Preprocessed) -> dict[Layout, float]:
    """Return the share of padding that each layout would have, in steps of the effective batch on one rank."""
    data, limits = facts.data, step_limits(settings, facts)
    assert data is not None
    share = min(data.samples, settings.effective_batch_size)
    rows = min(share, settings.batch_size_per_gpu or share)
    return {layout: padding_share(data, layout, limits, rows, share, STARTING_TOKENS["cpu"]) for layout in LAYOUTS}


def planned_padding(plan: Plan, data: DataSummary) -> dict[Layout, float]:
    """Return the share of padding that each layout would have, in the steps of a plan."""
    batching, work = plan.batching, plan.workload
    share = largest_share(min(data.samples, batching.effective_batch_size), batching.world_size)
    rows, start = batching.micro_batch_size, work.starting_tokens
    return {layout: padding_share(data, layout, work.limits, rows, share, start) for layout in LAYOUTS}


def step_limits(settings: Settings, facts: Preprocessed) -> tuple[int, ...]:
    """Return the longest row there can be, by side."""
    source = _worst_case(settings.max_seq_len, facts, 0)
    if facts.model.task == "causal":
        return (source,)
    return (source, _worst_case(settings.max_target_len or settings.max_seq_len, facts, 1))


def _worst_case(limit: int, facts: Preprocessed, side: int) -> int:
    """Return the longest row there can be: the longest sample padded as micro-batches are, or the limit."""
    sets = [data for data in (facts.data, facts.validation) if data is not None]
    if not sets:
        return limit
    longest = max(data.longest(side) for data in sets)
    return min(limit, ceil(longest / PADDING_MULTIPLE) * PADDING_MULTIPLE)


def has_compiler() -> bool:
    """Say whether there is a C++ compiler, as torch.compile looks for one; Triton on a card needs one too."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl"))
