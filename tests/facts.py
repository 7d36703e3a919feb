"""Hand-made facts for tests: a small Llama and the middling card it is to train on. Fields are changed by name."""

from __future__ import annotations

from typing import Any

from autotune.errands import DataSummary, ModelSummary, Preprocessed, Recipe, Saving
from autotune.inputs import Course
from autotune.plan import (
    SCHEMA,
    Batching,
    EvidenceSummary,
    Forecast,
    Hardware,
    Memory,
    Plan,
    Request,
    SizeRow,
    Speed,
    Timed,
    Timing,
    Traced,
    Trial,
    Work,
    Workload,
)

MIB = 2**20
GIB = 2**30


def workload(**changes: Any) -> Workload:
    """A causal model of 26 million parameters at 512 tokens, without checkpointing."""
    facts = {
        "model": "small",
        "task": "causal",
        "stage": "sft",
        "parameters": 26_000_000,
        "trainable_parameters": 26_000_000,
        "vocabulary_size": 6400,
        "max_seq_len": 512,
        "max_target_len": 0,
        "precision": "bf16",
        "optimizer": "adamw",
        "gradient_checkpointing": "off",
        "frozen": (),
        "dropout": None,
        "layout": "fixed",
        "starting_tokens": 256,
        "loss_head": "full",
        "attention": "sdpa",
        "compile": "off",
        "deterministic": "off",
        "cpu_allocator": "fast",
        "tokenizer_fingerprint": "5f0c",
        "data_fingerprint": "a91b",
    }
    return Workload.model_validate(facts | changes)


def hardware(**changes: Any) -> Hardware:
    """Two cards of 20 GiB, of which half a gibibyte is taken."""
    facts = {
        "device": "cuda",
        "device_name": "NVIDIA GeForce RTX 3080",
        "world_size": 2,
        "device_memory_total_bytes": 20 * GIB,
        "device_memory_free_bytes": 20 * GIB - 512 * MIB,
        "host_memory_total_bytes": 64 * GIB,
        "host_memory_available_bytes": 48 * GIB,
        "host_memory_limited_by": "available memory",
        "disk_free_bytes": 500 * GIB,
        "cores": 16,
        "compute_capability": (8, 6),
        "fast_bf16": True,
        "others": (),
        "notes": (),
    }
    return Hardware.model_validate(facts | {"local_world_size": changes.get("world_size", 2)} | changes)


def processor(**changes: Any) -> Hardware:
    """Hardware without a card, where 3 GiB are free and a control group is what binds."""
    facts = {
        "device": "cpu",
        "device_name": "AMD EPYC 7763",
        "world_size": 1,
        "device_memory_total_bytes": 16 * GIB,
        "device_memory_free_bytes": 3 * GIB,
        "host_memory_total_bytes": 16 * GIB,
        "host_memory_available_bytes": 3 * GIB,
        "host_memory_limited_by": "control group",
        "compute_capability": None,
    }
    return hardware(**facts | changes)


def request(**changes: Any) -> Request:
    """64 samples a step, everything else left to the planner."""
    facts = {
        "effective_batch_size": 64,
        "micro_batch_size": None,
        "prefer": "auto",
        "checkpointing": "auto",
        "layout": "given",
        "compile": "given",
        "memory_limit_bytes": None,
        "headroom": None,
        "backend": None,
        "offline": False,
    }
    return Request.model_validate(facts | changes)


def completed(rows: int, phases: dict[str, int], **changes: Any) -> Trial:
    """A trial that ran to the end and held these bytes."""
    facts = {
        "micro_batch_size": rows,
        "cpu_allocator": "tight",
        "gradient_checkpointing": "off",
        "outcome": "completed",
        "peak_bytes": max(phases.values()),
        "predicted_peak_bytes": None,
        "phases": phases,
        "resident_bytes": 0,
        "host_peak_bytes": None,
        "timings": (),
        "timed": (),
        "verified": True,
        "evaluation_seconds": None,
        "expected_peak_bytes": None,
        "inexact": (),
        "matrix_flops": {},
        "answering": None,
        "seconds": 8.0,
        "message": "",
    }
    return Trial.model_validate(facts | changes)


def out_of_memory(rows: int, **changes: Any) -> Trial:
    """A trial that did not live to tell."""
    facts = {
        "outcome": "out_of_memory",
        "peak_bytes": None,
        "phases": {},
        "resident_bytes": None,
        "message": "CUDA out of memory",
    }
    return completed(rows, {"forward_backward": 0}).model_copy(update=facts | changes)


def timed(rows: int, *timings: tuple[int, float], update_seconds: float = 0.0, **changes: Any) -> Trial:
    """A completed trial whose dry steps took these seconds a micro-batch, each after its padded tokens."""
    steps = tuple(
        Timing(padded_tokens=tokens, seconds=seconds, update_seconds=update_seconds) for tokens, seconds in timings
    )
    return completed(rows, {"forward_backward": GIB}, timings=steps, **changes)


def clocked(rows: int, *seconds: float) -> Timed:
    """What 16 samples took, again and again, in plain micro-batches of so many rows."""
    return Timed(layout="fixed", rows=rows, samples=16, padded_tokens=(1024,) * len(seconds), seconds=seconds)


def traced(rows: int, phases: dict[str, int]) -> Traced:
    """A size whose tensors take these bytes, all of them activations."""
    nothing = Work(operators=0, flops=0, moved_bytes=0)
    return Traced(
        micro_batch_size=rows, phases=phases, items={"activations": max(phases.values())}, work=nothing, update=nothing
    )


def recipe(**changes: Any) -> Recipe:
    """One epoch of AdamW at 1e-3, with a warm-up and a cosine."""
    facts = {
        "epochs": 1,
        "max_steps": None,
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "div_factor": 25.0,
        "warmup": 0.03,
        "weight_decay": 0.1,
        "clip": 1.0,
        "seed": 42,
        "eval_every": None,
        "early_stopping": None,
        "bleu_rows": 4,
        "samples": 1,
        "prompts": (),
    }
    return Recipe.model_validate(facts | changes)


def saving(**changes: Any) -> Saving:
    """Checkpoints at the end alone, the last three of them."""
    return Saving(**{"every_steps": None, "every_seconds": None, "each_epoch": False, "keep_last": 3} | changes)


def course(data: DataSummary | None = None, validation: DataSummary | None = None, **changes: Any) -> Course:
    """A run of `recipe` on such data, that may take what it takes; `left_seconds` and fields of the recipe change."""
    left = changes.pop("left_seconds", None)
    return Course(recipe(**changes), changes.pop("saving", saving()), data, validation, left)


def batching(**changes: Any) -> Batching:
    """240 samples a step over two ranks: six micro-batches of 20 rows, where 23 would fit."""
    facts = {
        "micro_batch_size": 20,
        "gradient_accumulation_steps": 6,
        "expected_micro_batches_per_step": 6.0,
        "world_size": 2,
        "effective_batch_size": 240,
        "largest_safe_micro_batch_size": 23,
        "limited_by": "memory",
    }
    return Batching.model_validate(facts | changes)


def speed(**changes: Any) -> Speed:
    """Half a second for a step of `batching`, most of it in proportion to tokens."""
    facts = {
        "tokens_per_second": 245_760.0,
        "samples_per_second": 480.0,
        "seconds_per_step": 0.5,
        "alpha_seconds": 0.004,
        "beta_seconds_per_token": 7.75e-6,
        "least_seconds": 0.0,
        "update_seconds": 0.0,
        "evaluation_seconds_per_token": 2.5e-6,
        "matrix_flops": {"bf16": 4e14, "fp32": 5e13},
    }
    return Speed.model_validate(facts | changes)


def size_row(rows: int, peak_bytes: int, **changes: Any) -> SizeRow:
    """A size that holds so much, measured."""
    facts = {
        "micro_batch_size": rows,
        "peak_bytes": peak_bytes,
        "samples_per_second": None,
        "peak_measured": True,
        "speed_measured": True,
    }
    return SizeRow.model_validate(facts | changes)


def plan(**changes: Any) -> Plan:
    """All of the above in one plan, with a forecast for 24,000 samples."""
    first = completed(1, {"forward_backward": 900 * MIB, "optimizer": 800 * MIB}, resident_bytes=700 * MIB)
    chosen = timed(20, (10_240, 0.2), (10_240, 0.0834), (5_120, 0.0437), peak_bytes=5 * GIB, resident_bytes=700 * MIB)
    facts = {
        "schema_name": SCHEMA,
        "workload": workload(),
        "hardware": hardware(),
        "batching": batching(),
        "memory": Memory(
            limit_bytes=20_000 * MIB,
            limit_from="free device memory",
            headroom_bytes=1_000 * MIB,
            budget_bytes=19_000 * MIB,
            predicted_peak_bytes=5 * GIB + 3 * MIB,
            measured_peak_bytes=5 * GIB,
            expected_peak_bytes=None,
            phases={"forward_backward": 5 * GIB},
            items={"weights": 104_000_000, "activations_and_temporaries": 5 * GIB - 104_000_000},
            host_budget_bytes=45 * GIB,
            host_peak_bytes=2 * GIB,
        ),
        "speed": speed(),
        "forecast": Forecast(
            rows=24_000,
            epochs=2.0,
            steps_per_epoch=100,
            total_steps=200,
            seconds_per_epoch=30.0,
            validation_seconds=0.0,
            answer_seconds=0.0,
            saving_seconds=0.0,
            evaluations=2,
            checkpoints=2,
            asked_steps=200,
            total_seconds=60.0,
            left_seconds=60.0,
            error=0.15,
            padded_tokens_per_sample=208.5,
        ),
        "alternatives": (),
        "sizes": (
            size_row(1, 900 * MIB, samples_per_second=4.0),
            size_row(20, 5 * GIB, samples_per_second=480.0),
            size_row(24, 21 * GIB, peak_measured=False, speed_measured=False),
        ),
        "evidence": EvidenceSummary(
            kind="measured",
            dry_steps=3,
            timing_steps=0,
            trials=(first, chosen, out_of_memory(120, predicted_peak_bytes=21 * GIB)),
            out_of_memory_count=1,
            seconds=24.0,
        ),
    }
    return Plan.model_validate(facts | changes)


def preprocessed(**changes: Any) -> Preprocessed:
    """A Llama of 26 M without data."""
    model = ModelSummary(
        task="causal",
        family="llama",
        parameters=26_000_000,
        trainable_parameters=26_000_000,
        vocabulary_size=6400,
        attention="sdpa",
        random_weights=True,
        longest_input=None,
        chunks=True,
        packs=True,
        window=None,
    )
    facts: dict[str, Any] = {
        "model": model, "tokenizer_dir": None, "tokenizer_fingerprint": None, "ids": None, "data": None,
        "validation": None, "shown": (),
    }  # fmt: skip
    return Preprocessed(**facts | changes)
