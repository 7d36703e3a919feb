"""What people should know beside a plan, in a sentence each."""

from __future__ import annotations

from math import ceil

from autotune.errands import Preprocessed
from autotune.plan import Batching, Plan
from profiles import Settings

UNKNOWN_SHARE = 0.01
"""Of a data set's tokens, from which on the tokenizer is taken to be of another language."""


def balanced_note(batching: Batching) -> str:
    """Say that a fixed batch is reached in balanced micro-batches, where it does not divide the share."""
    share = ceil(batching.effective_batch_size / batching.world_size)
    used = ceil(share / batching.gradient_accumulation_steps)
    return f"cut evenly: {used} rows at most" if used < batching.micro_batch_size else ""


def model_notes(settings: Settings, facts: Preprocessed) -> list[str]:
    """Say which weights are random, and will be trained on little or not at all."""
    said: list[str] = []
    if facts.data is None:
        return said
    if facts.data.stage == "sft" and facts.model.random_weights:
        said.append(
            f"fine-tuning (SFT) starts from RANDOM weights: {settings.model} is a preset, not a pretrained model; "
            "to start from one give its folder, --model DIR"
        )
    if facts.model.random_weights and settings.freeze:
        said.append(
            f"{', '.join(settings.freeze)} will stay RANDOM: {settings.model} is a preset, and what is frozen is not "
            "trained; to start from a pretrained model give its folder, --model DIR"
        )
    return said


def data_notes(facts: Preprocessed) -> list[str]:
    """Say which rows were cut, and whether the tokenizer knows too little of them."""
    said: list[str] = []
    for summary, name in ((facts.data, "data"), (facts.validation, "validation")):
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
