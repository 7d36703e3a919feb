"""How true plans are, on a zoo of small models: against the largest size there truly is, and against real steps.

    python benchmarks/plan.py                 presets by their trace, and all cases; an hour on two cores
    python benchmarks/plan.py llama t5        those cases whose name begins so

On a GPU it plans five other workloads, presets among them, on cards of 8, 24 and 80 GB that are imitated: the limit is
told to the planner, and the allocator of its workers refuses more.

Each case is planned at two limits, as `chatlm plan --prefer largest` does. Beside it, by the same measurement in fresh
processes: doubling from one row and bisection (which also finds the truth), and 30 real training steps, of worst-case
rows and of micro-batches of many lengths, each with an evaluation. Prints one table, and writes
benchmarks/results/plan-DEVICE.json.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from rich.console import Console
from rich.table import Table

from autotune.account import LIBRARIES_BYTES, process_bytes
from autotune.errands import Dry, Recipe, Saving, TokenIds, TraceReport, Train
from autotune.evidence import fit
from autotune.hardware import read_hardware
from autotune.inputs import Course, PlanInputs
from autotune.measure import Workers, trace_sizes, try_size
from autotune.plan import Hardware, Plan, Request, Trial, Workload
from autotune.planner import Planner
from autotune.process import Worker
from autotune.search import is_safe
from trainer.data import Order, write_store
from trainer.encode import Sample
from trainer.microbatch import WorstCase
from trainer.model import freeze, load_config

RESULTS = Path(__file__).parent / "results"
VOCABULARY, SHARE, STEPS = 4096, 240, 30
MIXED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the worst-case length, for a run of micro-batches of many lengths."""
SIZES = (4, 10)
"""Rows that the two limits of a case are made for."""
GIB, MIB = 2**30, 2**20
SAVING = Saving(every_steps=None, every_seconds=None, each_epoch=False, keep_last=2)

RECIPE = Recipe(
    epochs=1, max_steps=STEPS, learning_rate=1e-4, schedule="constant", warmup=0, div_factor=25, weight_decay=0.1,
    clip=1.0, seed=42, samples=0, bleu_rows=0, prompts=(), eval_every=None, early_stopping=None,
)  # fmt: skip


@dataclass
class Case:
    """A shape, and how it is trained."""

    name: str
    build: Callable[[], Any]
    max_seq_len: int
    max_target_len: int = 0
    precision: str = "bf16"
    checkpointing: str = "off"
    frozen: tuple[str, ...] = ()
    layout: str = "fixed"
    preset: str = ""
    """Name of the preset that is built."""


@dataclass
class Row:
    """What came of a case at one limit."""

    case: str
    limit_bytes: int
    before_any_trial: float
    """Predicted peak of the chosen size, by trace and process alone, over the measured one."""
    largest: int
    truly_largest: int
    trials: int
    dry_steps: int
    out_of_memory: int
    real_over_planned: float
    """Peak of 30 real worst-case steps, evaluation included, over the plan's."""
    mixed_over_planned: float
    """The same of micro-batches that are padded to many lengths, as those of real data are."""
    real_within_budget: bool
    mixed_within_limit: bool
    """The headroom is there for what lengths that were never tried hold in kernels and in pieces of the heap."""
    plan_seconds: float
    bisection_seconds: float


def llama(width: int, layers: int, **more: Any) -> Callable[[], Any]:
    return lambda: t.LlamaForCausalLM(t.LlamaConfig(**_decoder(width, layers), **more))


def _decoder(width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "max_position_embeddings": 1024,
    }  # fmt: skip


def t5(kind: Any, config: Any, width: int, layers: int) -> Callable[[], Any]:
    def build() -> Any:
        return kind(
            config(
                vocab_size=VOCABULARY, d_model=width, d_ff=3 * width, d_kv=width // 4, num_heads=4,
                num_layers=layers, num_decoder_layers=layers, decoder_start_token_id=0,
            )
        )  # fmt: skip

    return build


def bart() -> Any:
    return t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=VOCABULARY, d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=384, decoder_ffn_dim=384, max_position_embeddings=1024,
        )
    )  # fmt: skip


CASES = [
    Case("gpt2-256", lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=4, n_head=4, n_positions=1024)), 256),
    Case("llama-256", llama(128, 4), 256),
    Case("llama-512", llama(128, 4), 512),
    Case("llama-256-fp32", llama(128, 4), 256, precision="fp32"),
    Case("llama-512-checkpointed", llama(128, 4), 512, checkpointing="on"),
    Case("llama-128-wide", llama(256, 3), 128),
    Case("qwen3-256", lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_decoder(128, 4))), 256),
    Case("gemma3-256", lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_decoder(128, 4))), 256),
    Case("t5-128-128", t5(t.T5ForConditionalGeneration, t.T5Config, 128, 2), 128, 128),
    Case("t5-256-64-checkpointed", t5(t.T5ForConditionalGeneration, t.T5Config, 128, 2), 256, 64, checkpointing="on"),
    Case("t5-128-128-frozen", t5(t.T5ForConditionalGeneration, t.T5Config, 128, 2), 128, 128,
         frozen=("embedding", "encoder")),
    Case("llama-256-frozen", llama(128, 4), 256, frozen=("embedding", "*layers.0.*", "*layers.1.*")),
    Case("llama-256-packed", llama(128, 4), 256, layout="packed"),
    Case("t5-128-128-packed", t5(t.T5ForConditionalGeneration, t.T5Config, 128, 2), 128, 128, layout="packed"),
    Case("mt5-128-128", t5(t.MT5ForConditionalGeneration, t.MT5Config, 128, 2), 128, 128),
    Case("bart-128-128", bart, 128, 128),
    Case("bart-128-128-packed", bart, 128, 128, layout="packed"),
]  # fmt: skip


def preset(name: str, max_seq_len: int, max_target_len: int = 0, checkpointing: str = "off") -> Case:
    def build() -> Any:
        config = load_config(name, None, None)
        kind = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM
        return kind.from_config(config)  # type: ignore[no-untyped-call]

    lengths = "-".join(str(length) for length in (max_seq_len, max_target_len) if length)
    title = f"{name}-{lengths}" + "-checkpointed" * (checkpointing == "on")
    return Case(title, build, max_seq_len, max_target_len, checkpointing=checkpointing, preset=name)


PRESETS = [
    preset("minimind-26m", 512),
    preset("minimind-104m", 512),
    preset("minimind-3", 512),
    preset("minimind-3", 512, checkpointing="on"),
    preset("chatlm-t5", 192, 192),
]
TRACED_ROWS = (1, 8, 32)
ON_CARDS = [*PRESETS, Case("llama-512-fp32", llama(512, 8), 512, precision="fp32")]
CARDS_GIB = (8, 24, 80)


def save_model(case: Case, folder: Path) -> Workload:
    """Save a model of this shape, and say how it is trained."""
    model = case.build()
    model.save_pretrained(folder)
    return workload(case, str(folder), model)


def workload(case: Case, name: str, model: Any) -> Workload:
    freeze(model, case.frozen)
    parameters, config = list(model.parameters()), model.config
    attention = config._attn_implementation or "sdpa"
    return Workload.model_validate(
        {
            "model": name, "task": "seq2seq" if case.max_target_len else "causal", "stage": "sft",
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "vocabulary_size": config.vocab_size,
            "max_seq_len": case.max_seq_len, "max_target_len": case.max_target_len, "precision": case.precision,
            "optimizer": "adamw", "gradient_checkpointing": case.checkpointing, "frozen": case.frozen, "dropout": None,
            "layout": case.layout, "starting_tokens": 256, "loss_head": "full", "attention": attention,
            "compile": "off",
            "deterministic": "off",
            "cpu_allocator": "tight", "tokenizer_fingerprint": None, "data_fingerprint": None,
        }
    )  # fmt: skip


@dataclass
class Traced:
    """What the trace says of a preset."""

    preset: str
    parameters: int
    lengths: tuple[int, int]
    checkpointing: str
    peak_bytes: dict[int, int]
    """By rows, of tensors alone."""
    seconds: float
    """Of all sizes together, the start of the worker included."""


def trace_preset(case: Case, hardware: Hardware) -> Traced:
    with torch.device("meta"):
        model = case.build()
    work = workload(case, case.preset, model)
    began = time.perf_counter()
    (report,) = trace_sizes([work], hardware, TRACED_ROWS)
    return Traced(
        preset=case.preset,
        parameters=work.parameters,
        lengths=(case.max_seq_len, case.max_target_len),
        checkpointing=case.checkpointing,
        peak_bytes={traced.micro_batch_size: max(traced.phases.values()) for traced in report.traced},
        seconds=time.perf_counter() - began,
    )


def run(case: Case, hardware: Hardware) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = save_model(case, folder / "model")
        if hardware.device == "cuda":
            for gib in CARDS_GIB:
                yield at_limit(case, work, hardware, gib * GIB, folder)
            return
        (report,) = trace_sizes([work], hardware, (*SIZES, SHARE))
        model = fit((), report.traced, report.process_bytes + LIBRARIES_BYTES)
        assert model is not None
        for rows in SIZES:
            # A budget for half a row more than `rows`, and the least headroom on top of it.
            budget = (model.peak_bytes(rows) + model.peak_bytes(rows + 1)) // 2
            yield at_limit(case, work, hardware, budget + 128 * MIB, folder)


def at_limit(case: Case, work: Workload, hardware: Hardware, limit: int, folder: Path) -> Row:
    request = Request(
        effective_batch_size=SHARE, micro_batch_size=None, prefer="largest", checkpointing="given", layout="given",
        compile="given", memory_limit_bytes=limit, headroom=None, backend=None, offline=False,
    )  # fmt: skip
    began = time.perf_counter()
    with Workers() as workers:
        planner = Planner(PlanInputs(work, hardware, request, Course(RECIPE, SAVING, None, None)), workers)
        list(planner.make())
    plan_seconds = time.perf_counter() - began
    plan, evidence = planner.plan, planner.evidence
    assert plan is not None
    explored = evidence.explored[0]
    report = TraceReport(process_bytes=explored.process_bytes, traced=explored.traced)
    untried = fit((), explored.traced, process_bytes(report, hardware))
    assert untried is not None
    chosen = plan.batching.micro_batch_size
    truth, bisection_seconds = bisect(work, hardware, plan.memory.budget_bytes, limit)
    peak = plan.memory.measured_peak_bytes
    assert peak is not None
    real, mixed = train(plan, folder, (1.0,)), train(plan, folder, MIXED)
    return Row(
        case=case.name,
        limit_bytes=limit,
        before_any_trial=untried.peak_bytes(chosen) / peak,
        largest=plan.batching.largest_safe_micro_batch_size,
        truly_largest=truth,
        trials=len(plan.evidence.trials),
        dry_steps=plan.evidence.dry_steps,
        out_of_memory=plan.evidence.out_of_memory_count,
        real_over_planned=real / peak,
        mixed_over_planned=mixed / peak,
        real_within_budget=real <= plan.memory.budget_bytes,
        mixed_within_limit=mixed <= plan.memory.limit_bytes,
        plan_seconds=plan_seconds,
        bisection_seconds=bisection_seconds,
    )


def bisect(work: Workload, hardware: Hardware, budget: int, limit: int) -> tuple[int, float]:
    """Double from one row until a size is not safe, then halve the bracket to its end."""
    began = time.perf_counter()

    def trial(rows: int) -> Trial:
        return try_size(
            Dry(
                workload=work, device=hardware.device, micro_batch_size=rows, ranks=1, backend=None, verify=True,
                budget_bytes=limit, limit_bytes=limit, excerpt=None,
            ),
            hardware,
        )  # fmt: skip

    low, high = 0, 1
    while high <= SHARE and is_safe(trial(high), budget):
        low, high = high, 2 * high
    high = min(high, SHARE + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_safe(trial(middle), budget) else (low, middle)
    return low, time.perf_counter() - began


def worst_samples(work: Workload, shares: Iterable[float]) -> Iterator[Sample]:
    """Yield samples that take these shares of the worst-case length."""
    for i, share in enumerate(shares):
        worst = WorstCase(work, share)
        ((start, end),) = worst.spans(i)
        yield Sample(worst.tokens(i).tolist(), [(int(start), int(end))])


def train(plan: Plan, folder: Path, shares: tuple[float, ...]) -> int:
    """Train 30 steps of two micro-batches, and evaluate on worst-case rows; return the highest peak in bytes.

    Rows take these shares of the worst-case length. The order is a run's own, a permutation by the seed.
    """
    work, rows = plan.workload, plan.batching.micro_batch_size
    count = STEPS * 2 * rows
    place = np.argsort(Order(count, RECIPE.seed, 0)[:])
    stores: dict[str, list[float]] = {
        "train": [shares[int(at) // rows % len(shares)] for at in place],
        "validation": [1.0] * (2 * rows),
    }
    for name, lengths in stores.items():
        (folder / name).mkdir(exist_ok=True)
        write_store(worst_samples(work, lengths), folder / name, work.task, work.vocabulary_size)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "run").mkdir(exist_ok=True)
    batching = plan.batching.model_copy(update={"effective_batch_size": 2 * rows})
    errand = Train(
        plan=plan.model_copy(update={"batching": batching}), recipe=RECIPE, store=str(folder / "train"),
        validation_store=str(folder / "validation"), tokenizer_dir=str(folder / "tokenizer"),
        ids=TokenIds(pad=0, eos=1, bos=None), output_dir=str(folder / "run"), tensorboard=False,
        time_limit=None, longest=None, data_contents="", resume=None, backend=None, heartbeat_seconds=60,
        saving=SAVING,
    )  # fmt: skip
    with Worker(plan.hardware.cores, work.cpu_allocator) as worker:
        worker.give(errand)
        rows_seen = [event["row"] for event in worker.events() if event["event"] == "metrics"]
        assert sum(row["kind"] == "train" for row in rows_seen) == STEPS, worker.last_words()
    return max(int(row["peak_memory_bytes"]) for row in rows_seen if "peak_memory_bytes" in row)


def print_table(rows: list[Row]) -> None:
    table = Table()
    for name in ("case", "limit", "before any trial", "largest", "truly", "trials", "dry steps", "oom",
                 "real / plan", "mixed / plan", "in budget", "plan s", "bisection s"):  # fmt: skip
        table.add_column(name, justify="left" if name == "case" else "right")
    for r in rows:
        table.add_row(
            r.case, f"{r.limit_bytes / 2**30:.2f}", f"{r.before_any_trial - 1:+.1%}", str(r.largest),
            str(r.truly_largest), str(r.trials), str(r.dry_steps), str(r.out_of_memory),
            f"{r.real_over_planned - 1:+.1%}",
            f"{r.mixed_over_planned - 1:+.1%}", "yes" if r.real_within_budget and r.mixed_within_limit else "NO",
            f"{r.plan_seconds:.0f}",
            f"{r.bisection_seconds:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    wanted = sys.argv[1:]
    hardware = read_hardware(Path())
    rows: list[Row] = []
    presets = [trace_preset(case, hardware) for case in PRESETS if not wanted]
    for traced in presets:
        print(traced)
    for case in ON_CARDS if hardware.device == "cuda" else CASES:
        if not wanted or case.name.startswith(tuple(wanted)):
            rows += run(case, hardware)
            print_table(rows)
            write(rows, presets, hardware)


def write(rows: list[Row], presets: list[Traced], hardware: Hardware) -> None:
    """Write what there is, after each case: a run that is cut short leaves something."""
    RESULTS.mkdir(exist_ok=True)
    errors = [abs(r.before_any_trial - 1) for r in rows]
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{hardware.device_name}, {hardware.cores} cores, {platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "median_error_before_any_trial": float(np.median(errors)),
        "mean_dry_steps": float(np.mean([r.dry_steps for r in rows])),
        "plan_over_bisection_seconds": sum(r.plan_seconds for r in rows) / sum(r.bisection_seconds for r in rows),
        "rows": [asdict(r) for r in rows],
        "presets": [asdict(p) for p in presets],
    }
    file = RESULTS / f"plan-{hardware.device}.json"
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print({name: value for name, value in found.items() if name not in ("rows", "presets")})


if __name__ == "__main__":
    main()
