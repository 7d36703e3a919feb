"""The contracts: what a plan and an errand hold, that JSON keeps it all, and what the planner's arithmetic promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from facts import (
    GIB,
    MIB,
    batching,
    completed,
    hardware,
    out_of_memory,
    plan,
    processor,
    recipe,
    speed,
    timed,
    traced,
    workload,
)
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from autotune.errands import (
    DRY_LENGTHS,
    DRY_MICRO_BATCHES,
    ERRAND,
    DataSummary,
    Dry,
    DryReport,
    Excerpt,
    ModelSummary,
    Preprocess,
    Preprocessed,
    Recipe,
    TokenIds,
    Trace,
    TraceReport,
    Train,
)
from autotune.errors import (
    KINDS,
    ConfigurationError,
    DataError,
    MachineError,
    NothingFitsError,
    UserError,
)
from autotune.plan import (
    SCHEMA,
    Batching,
    EvidenceSummary,
    Forecast,
    Memory,
    Plan,
    Speed,
    Timed,
    Timing,
    Trial,
)
from autotune.planner import SHORTEST_SEQUENCE, itemise, milder, set_budget
from profiles import FIELDS

ROOT = Path(__file__).resolve().parents[1]

finite = st.floats(allow_nan=False, allow_infinity=False)
maybe_bytes = st.none() | st.integers(0, 2**60)
trials = st.builds(
    Trial,
    peak_bytes=maybe_bytes,
    resident_bytes=maybe_bytes,
    timed=st.lists(st.builds(Timed, seconds=st.lists(finite, max_size=2).map(tuple)), max_size=2).map(tuple),
    evaluation_seconds=st.none() | finite,
    timings=st.lists(st.builds(Timing, seconds=finite, update_seconds=finite), max_size=3).map(tuple),
    seconds=finite,
)
plans = st.builds(
    Plan,
    schema=st.just(SCHEMA),
    workload=st.builds(workload, model=st.text(), dropout=st.none() | finite, frozen=st.lists(st.text()).map(tuple)),
    hardware=st.builds(hardware, device_name=st.text(), compute_capability=st.none() | st.just((9, 0))),
    batching=st.builds(Batching, expected_micro_batches_per_step=finite),
    memory=st.builds(Memory),
    speed=st.none() | st.builds(Speed, **dict.fromkeys(Speed.model_fields, finite)),
    forecast=st.none()
    | st.builds(
        Forecast,
        **dict.fromkeys(
            ("epochs", "seconds_per_epoch", "validation_seconds", "total_seconds", "padded_tokens_per_sample"), finite
        ),
    ),
    evidence=st.builds(EvidenceSummary, trials=st.lists(trials, max_size=3).map(tuple), seconds=finite),
)


def objects_in(value: Any, at: str = "plan") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object that is one of our types, with where it stands; tables by name are free in their keys."""
    if isinstance(value, dict):
        if at.rpartition(".")[2] not in ("phases", "items"):
            yield at, value
        for key, inner in value.items():
            yield from objects_in(inner, f"{at}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from objects_in(inner, f"{at}.{i}")


# A plan.


@given(plans)
def test_a_plan_goes_to_json_and_back_unchanged(made: Plan) -> None:
    assert Plan.from_json(made.to_json()) == made


def test_json_of_a_plan_goes_to_a_plan_and_back_unchanged() -> None:
    text = plan().to_json()
    assert Plan.from_json(text).to_json() == text


def test_a_plan_says_its_schema_first_under_the_key_schema() -> None:
    made = plan().to_json()
    assert next(iter(json.loads(made).items())) == ("schema", "chatlm.plan/1")
    with pytest.raises(ValidationError, match="schema"):
        Plan.from_json(made.replace("chatlm.plan/1", "chatlm.plan/2"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_what_is_not_a_plan_is_refused_with_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="Plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("place", [at for at, _ in objects_in(json.loads(plan().to_json()))])
def test_an_unknown_field_is_refused_wherever_it_stands(place: str) -> None:
    data = json.loads(plan().to_json())
    dict(objects_in(data))[place]["micro_batch"] = 20
    with pytest.raises(ValidationError, match="micro_batch\n"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("place", [at for at, _ in objects_in(json.loads(plan().to_json()))])
def test_no_field_has_a_default(place: str) -> None:
    for key in dict(objects_in(json.loads(plan().to_json())))[place]:
        data = json.loads(plan().to_json())
        del dict(objects_in(data))[place][key]
        with pytest.raises(ValidationError, match=f"{key}\n"):
            Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "fact", [plan(), workload(), hardware(), batching(), speed(), plan().memory, plan().forecast, plan().evidence]
)
def test_a_fact_is_frozen(fact: BaseModel) -> None:
    for field in type(fact).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(fact, field, getattr(fact, field))


def test_the_keys_are_those_that_others_read() -> None:
    keys = {at: set(value) for at, value in objects_in(json.loads(plan().to_json()))}
    assert keys["plan"] == {
        "schema",
        "workload",
        "hardware",
        "batching",
        "memory",
        "speed",
        "forecast",
        "evidence",
    }
    assert keys["plan.batching"] == {
        "micro_batch_size",
        "gradient_accumulation_steps",
        "expected_micro_batches_per_step",
        "world_size",
        "effective_batch_size",
        "largest_safe_micro_batch_size",
        "limited_by",
    }
    assert keys["plan.speed"] == {
        "tokens_per_second",
        "samples_per_second",
        "seconds_per_step",
        "alpha_seconds",
        "beta_seconds_per_token",
        "update_seconds",
        "evaluation_seconds_per_token",
    }
    assert keys["plan.forecast"] == {
        "rows",
        "epochs",
        "steps_per_epoch",
        "total_steps",
        "seconds_per_epoch",
        "validation_seconds",
        "total_seconds",
        "padded_tokens_per_sample",
    }
    assert keys["plan.evidence"] == {
        "kind",
        "dry_steps",
        "timing_steps",
        "trials",
        "out_of_memory_count",
        "seconds",
    }


def test_the_keys_of_the_other_sections_are_there_whatever_else_is() -> None:
    keys = {at: set(value) for at, value in objects_in(json.loads(plan().to_json()))}
    assert keys["plan.workload"] >= {
        "model",
        "task",
        "stage",
        "parameters",
        "trainable_parameters",
        "vocabulary_size",
        "max_seq_len",
        "max_target_len",
        "precision",
        "optimizer",
        "gradient_checkpointing",
        "frozen",
        "dropout",
        "layout",
        "loss_head",
        "attention",
        "compile",
        "cpu_allocator",
        "tokenizer_fingerprint",
        "data_fingerprint",
    }
    assert keys["plan.hardware"] >= {
        "device",
        "device_name",
        "world_size",
        "device_memory_total_bytes",
        "device_memory_free_bytes",
        "host_memory_total_bytes",
        "host_memory_available_bytes",
    }
    assert keys["plan.memory"] >= {
        "limit_bytes",
        "headroom_bytes",
        "budget_bytes",
        "predicted_peak_bytes",
        "measured_peak_bytes",
        "expected_peak_bytes",
        "phases",
        "items",
        "host_budget_bytes",
        "host_peak_bytes",
    }
    for i in range(3):
        assert keys[f"plan.evidence.trials.{i}"] >= {
            "micro_batch_size",
            "outcome",
            "peak_bytes",
            "predicted_peak_bytes",
            "seconds",
        }


@pytest.mark.parametrize("field", ["micro_batch_size", "gradient_accumulation_steps", "world_size"])
def test_there_is_no_batch_of_nothing(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        batching(**{field: 0})


def test_a_row_costs_its_source_and_its_target() -> None:
    assert workload(max_seq_len=512, max_target_len=0).tokens_per_row == 512
    assert workload(task="seq2seq", max_seq_len=96, max_target_len=32).tokens_per_row == 128


@pytest.mark.parametrize("outcome", ["out_of_memory", "killed", "timed_out"])
def test_only_a_trial_that_ran_to_the_end_is_completed(outcome: str) -> None:
    assert completed(1, {"optimizer": 1}).completed
    assert not out_of_memory(1, outcome=outcome).completed


@pytest.mark.parametrize("module", ["plan", "errands"])
def test_the_contracts_load_without_a_warning_and_without_torch(module: str) -> None:
    code = f"import autotune.{module}, sys; sys.exit('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


# Errands and their answers.

IDS = TokenIds(pad=0, eos=(1, 2), bos=None)
DATA = DataSummary(
    files=("chat.jsonl",),
    store="/cache/store",
    fingerprint="a91b",
    stage="sft",
    rows=3,
    samples=4,
    tokens=70,
    target_tokens=30,
    lengths=(((10, 3), (40, 1)), ((2, 1), (5, 3))),
    cuts={"answer_cut": 1},
    unknown_share=0.01,
)
PREPROCESS = Preprocess(
    model="small",
    tokenizer=None,
    dropout=0.1,
    data=(),
    validation=(),
    stage=None,
    max_seq_len=512,
    max_target_len=128,
    limit=None,
    cache_dir="/cache",
)
RECIPE = recipe(epochs=0.5, weight_decay=0.0, clip=0.0)
EXCERPT = Excerpt(store="/cache/tokens/5f0c", seed=42, sizes=(4, 2))
ERRANDS = [
    PREPROCESS,
    Trace(workload=workload(), micro_batch_sizes=(1, 4)),
    Dry(workload=workload(), device="cpu", micro_batch_size=4, excerpt=EXCERPT),
    Train(
        plan=plan(),
        recipe=RECIPE,
        store="/cache/store",
        validation_store=None,
        tokenizer_dir="/cache/tokenizer",
        ids=IDS,
        output_dir="runs/one",
    ),
]
ANSWERS = [
    Preprocessed(
        model=ModelSummary(
            task="causal",
            family="llama",
            parameters=26_000_000,
            trainable_parameters=26_000_000,
            vocabulary_size=6400,
            attention="sdpa",
            random_weights=True,
            longest_input=None,
        ),
        tokenizer_dir="/cache/tokenizer",
        tokenizer_fingerprint="5f0c",
        ids=IDS,
        data=DATA,
        validation=None,
    ),
    TraceReport(process_bytes=MIB, traced=(traced(1, {"forward_backward": GIB}),)),
    DryReport(
        peak_bytes=GIB,
        phases={"forward_backward": GIB},
        resident_bytes=MIB,
        host_peak_bytes=GIB,
        timings=timed(1, (512, 0.5)).timings,
        timed=(Timed(rows=4, samples=4, seconds=(0.1, 0.2)),),
        evaluation_seconds=0.1,
    ),
]


@pytest.mark.parametrize("errand", ERRANDS, ids=lambda errand: errand.errand)
def test_an_errand_arrives_as_the_same_errand_of_the_same_type(errand: BaseModel) -> None:
    assert ERRAND.validate_json(errand.model_dump_json(by_alias=True)) == errand
    assert ERRAND.validate_json(errand.model_dump_json()) == errand


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_an_answer_arrives_unchanged(answer: BaseModel) -> None:
    assert type(answer).model_validate_json(answer.model_dump_json()) == answer


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"errand": "sweep"}', "'preprocess', 'trace', 'dry', 'train'"),
        ("{}", "errand"),
        ('{"errand": "dry", "micro_batch_size": 4}', "dry.workload"),
    ],
)
def test_what_is_not_an_errand_is_refused_with_what_it_should_have_been(text: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ERRAND.validate_json(text)


def test_the_longest_of_a_side_is_its_last_length() -> None:
    assert DATA.longest(0) == 40
    assert DATA.longest(1) == 5


def test_a_dry_step_meets_resident_gradients_and_its_worst_case_once_the_first_step_is_over() -> None:
    assert DRY_MICRO_BATCHES >= 2
    assert all(0 < share <= 1 for share in DRY_LENGTHS)
    assert max(DRY_LENGTHS[1:]) == 1
    assert len(set(DRY_LENGTHS[1:])) >= 2, "one length alone tells nothing of what a shorter row costs"


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0.0},
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"warmup": -1.0},
        {"weight_decay": -0.1},
        {"clip": -1.0},
        {"schedule": "linear"},
    ],
)
def test_a_recipe_that_could_not_train_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        Recipe.model_validate(RECIPE.model_dump() | change)


# Errors.


def test_an_error_of_the_user_has_one_sentence_a_hint_and_its_own_exit_code() -> None:
    error = DataError("chat.jsonl, row 7: no text", "give the column's name")
    assert (str(error), error.message, error.hint) == (
        "chat.jsonl, row 7: no text",
        "chat.jsonl, row 7: no text",
        "give the column's name",
    )
    assert UserError("so").hint == ""
    kinds = [NothingFitsError, ConfigurationError, DataError, MachineError, UserError]
    assert [kind.exit_code for kind in kinds] == [1, 2, 3, 4, 70]


def test_every_kind_of_error_crosses_from_the_worker_by_its_name() -> None:
    assert set(KINDS.values()) == set(UserError.__subclasses__())
    assert all(KINDS[kind.__name__] is kind for kind in KINDS.values())


# The budget.


def test_a_twentieth_of_what_is_free_is_kept_back() -> None:
    budget = set_budget(hardware(device_memory_free_bytes=20 * GIB), None, None)
    assert (budget.limit_bytes, budget.headroom_bytes, budget.budget_bytes) == (20 * GIB, GIB, 19 * GIB)
    assert budget.limit_from == "free device memory"


def test_at_least_256_mib_are_kept_back_on_a_card_and_128_on_a_processor() -> None:
    assert set_budget(hardware(device_memory_free_bytes=2 * GIB), None, None).headroom_bytes == 256 * MIB
    assert set_budget(processor(device_memory_free_bytes=GIB), None, None).headroom_bytes == 128 * MIB


def test_on_a_processor_the_limit_is_named_after_what_binds_there() -> None:
    assert set_budget(processor(), None, None).limit_from == "control group"


@pytest.mark.parametrize("make", [hardware, processor])
def test_a_memory_limit_binds_and_is_named_only_where_it_is_lower_than_what_is_free(make: Any) -> None:
    machine = make(device_memory_free_bytes=4 * GIB)
    free = set_budget(machine, None, None)
    assert set_budget(machine, 8 * GIB, None) == free
    assert set_budget(machine, 4 * GIB, None) == free
    lower = set_budget(machine, 3 * GIB, None)
    assert (lower.limit_bytes, lower.limit_from) == (3 * GIB, "--memory-limit")


def test_headroom_is_a_share_of_the_limit_below_1_and_bytes_from_1_on() -> None:
    machine = hardware(device_memory_free_bytes=8 * GIB)
    assert set_budget(machine, None, 0.25).headroom_bytes == 2 * GIB
    assert set_budget(machine, 4 * GIB, 0.25).headroom_bytes == GIB
    assert set_budget(machine, None, 3 * MIB).headroom_bytes == 3 * MIB
    assert set_budget(machine, None, 1).headroom_bytes == 1
    assert set_budget(machine, None, 0).headroom_bytes == 0


@given(
    free=st.integers(GIB, 200 * GIB),
    limit=st.none() | st.integers(GIB, 200 * GIB),
    headroom=st.none() | st.floats(0, 0.99) | st.integers(1, GIB - 1),
)
def test_budget_and_headroom_are_the_limit_and_the_limit_is_never_more_than_is_free(
    free: int, limit: int | None, headroom: float | None
) -> None:
    budget = set_budget(hardware(device_memory_free_bytes=free), limit, headroom)
    assert budget.limit_bytes == min(free, limit or free)
    assert budget.headroom_bytes >= 0
    assert budget.budget_bytes == budget.limit_bytes - budget.headroom_bytes > 0


@pytest.mark.parametrize(
    ("machine", "limit", "headroom"),
    [
        (hardware(device_memory_free_bytes=256 * MIB), None, None),
        (processor(device_memory_free_bytes=64 * MIB), None, None),
        (hardware(), 256 * MIB, None),
        (hardware(), GIB, float(GIB)),
        (hardware(), GIB, 2.0 * GIB),
        (hardware(device_memory_free_bytes=0), None, 0.0),
    ],
)
def test_headroom_that_leaves_nothing_of_the_limit_is_an_error_with_both_numbers(
    machine: Any, limit: int | None, headroom: float | None
) -> None:
    with pytest.raises(NothingFitsError, match=r"limit of \d+\.\d\d GiB \(.+\) .* \d+\.\d\d GiB of headroom") as caught:
        set_budget(machine, limit, headroom)
    assert caught.value.hint


# The changes that would need less memory.


def test_checkpointing_comes_first_then_half_the_length_and_half_of_that() -> None:
    changes = milder(workload(max_seq_len=512))
    assert [(w.gradient_checkpointing, w.max_seq_len) for _, w in changes] == [
        ("on", 512),
        ("on", 256),
        ("on", 128),
        ("on", SHORTEST_SEQUENCE),
    ]
    assert [options for options, _ in changes] == [
        "--gradient-checkpointing on",
        "--gradient-checkpointing on --max-seq-len 256",
        "--gradient-checkpointing on --max-seq-len 128",
        "--gradient-checkpointing on --max-seq-len 64",
    ]


def test_what_is_on_already_is_not_advised_and_what_is_short_already_is_not_cut() -> None:
    assert [w.max_seq_len for _, w in milder(workload(gradient_checkpointing="on", max_seq_len=256))] == [128, 64]
    assert milder(workload(gradient_checkpointing="on", max_seq_len=2 * SHORTEST_SEQUENCE - 1)) == []


seq2seq = {"task": "seq2seq", "gradient_checkpointing": "on"}
kinds_of_work = [
    pytest.param(workload(), id="causal"),
    pytest.param(workload(gradient_checkpointing="on"), id="causal with checkpointing"),
    pytest.param(workload(**seq2seq, max_target_len=512), id="seq2seq"),
    pytest.param(
        workload(**seq2seq, max_target_len=128),
        id="seq2seq with a short target",
    ),
    pytest.param(
        workload(**seq2seq, max_seq_len=128, max_target_len=512),
        id="seq2seq with a short source",
    ),
]


@pytest.mark.parametrize("work", kinds_of_work)
def test_each_change_is_made_by_options_that_exist_and_that_make_the_workload_it_speaks_of(work: Any) -> None:
    for options, changed in milder(work):
        typed = {name.replace("-", "_"): value for name, value in re.findall(r"--(\S+) (\S+)", options)}
        assert typed.keys() <= FIELDS.keys()
        values = {name: int(value) if value.isdigit() else value for name, value in typed.items()}
        assert work.model_copy(update=values) == changed


@given(
    seq2seq=st.booleans(),
    checkpointing=st.sampled_from(["off", "on"]),
    source=st.integers(1, 4096),
    target=st.integers(1, 4096),
)
def test_each_change_is_harder_than_the_one_before_and_no_side_grows(
    seq2seq: bool, checkpointing: str, source: int, target: int
) -> None:
    work = workload(
        task="seq2seq" if seq2seq else "causal",
        gradient_checkpointing=checkpointing,
        max_seq_len=source,
        max_target_len=target if seq2seq else 0,
    )
    before = work
    for _, changed in milder(work):
        assert changed != before
        assert changed.gradient_checkpointing == "on"
        assert changed.max_seq_len <= before.max_seq_len
        assert changed.max_target_len <= before.max_target_len
        longest_before, longest = (max(w.max_seq_len, w.max_target_len) for w in (work, changed))
        assert longest >= min(SHORTEST_SEQUENCE, longest_before)
        before = changed


# What a peak is made of.


@given(
    parameters=st.integers(0, 10**10),
    share=st.floats(0, 1),
    process=st.integers(0, 10**10),
    grown=st.integers(0, 10**11),
)
def test_the_items_sum_to_the_peak(parameters: int, share: float, process: int, grown: int) -> None:
    work = workload(parameters=parameters, trainable_parameters=int(share * parameters))
    state = 4 * work.parameters + 12 * work.trainable_parameters
    items = itemise(work, state + process, state + process + grown)
    assert sum(items.values()) == state + process + grown
    assert items == {
        "weights": 4 * work.parameters,
        "gradients": 4 * work.trainable_parameters,
        "optimizer_state": 8 * work.trainable_parameters,
        "process": process,
        "activations_and_temporaries": grown,
    }


def test_frozen_weights_have_neither_gradients_nor_optimizer_state() -> None:
    items = itemise(workload(trainable_parameters=0), 0, 0)
    assert (items["gradients"], items["optimizer_state"]) == (0, 0)


@given(resident=st.integers(0, 2**40), peak=st.integers(0, 2**40))
def test_no_item_is_negative_whatever_was_measured(resident: int, peak: int) -> None:
    assert min(itemise(workload(), resident, peak).values()) >= 0
