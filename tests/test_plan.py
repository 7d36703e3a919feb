"""The contracts: what a plan and an errand hold, that JSON keeps it all, and what the planner's arithmetic promises."""

from __future__ import annotations

import json
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
    preprocessed,
    recipe,
    saving,
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
    EXPLORING_LENGTHS,
    DataSummary,
    Dry,
    DryReport,
    Excerpt,
    Preprocess,
    Recipe,
    Resume,
    TimeLimit,
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
    Alternative,
    Answering,
    Batching,
    EvidenceSummary,
    Forecast,
    Memory,
    Plan,
    SizeRow,
    Speed,
    Timed,
    Timing,
    Trial,
)

ROOT = Path(__file__).resolve().parents[1]

finite = st.floats(allow_nan=False, allow_infinity=False)
maybe_bytes = st.none() | st.integers(0, 2**60)
rates = st.dictionaries(st.sampled_from(["fp32", "bf16"]), finite)
trials = st.builds(
    Trial,
    peak_bytes=maybe_bytes,
    resident_bytes=maybe_bytes,
    timed=st.lists(st.builds(Timed, seconds=st.lists(finite, max_size=2).map(tuple)), max_size=2).map(tuple),
    evaluation_seconds=st.none() | finite,
    answering=st.none()
    | st.builds(Answering, **dict.fromkeys(("prompt_tokens", "seconds_of_token", "seconds_of_further_row"), finite)),
    matrix_flops=rates,
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
    speed=st.none() | st.builds(Speed, **(dict.fromkeys(Speed.model_fields, finite) | {"matrix_flops": rates})),
    forecast=st.none()
    | st.builds(
        Forecast,
        **dict.fromkeys([name for name, field in Forecast.model_fields.items() if field.annotation is float], finite),
    ),
    alternatives=st.lists(st.builds(Alternative, seconds_per_step=st.none() | finite), max_size=2).map(tuple),
    sizes=st.lists(st.builds(SizeRow, samples_per_second=st.none() | finite), max_size=2).map(tuple),
    evidence=st.builds(EvidenceSummary, trials=st.lists(trials, max_size=3).map(tuple), seconds=finite),
)


def objects_in(value: Any, at: str = "plan") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object that is one of our types, with where it stands; tables by name are free in their keys."""
    if isinstance(value, dict):
        if at.rpartition(".")[2] not in ("phases", "items", "matrix_flops"):
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
        "alternatives",
        "sizes",
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
        "least_seconds",
        "update_seconds",
        "evaluation_seconds_per_token",
        "matrix_flops",
    }
    assert keys["plan.forecast"] == {
        "rows",
        "epochs",
        "steps_per_epoch",
        "total_steps",
        "seconds_per_epoch",
        "validation_seconds",
        "answer_seconds",
        "saving_seconds",
        "evaluations",
        "checkpoints",
        "asked_steps",
        "total_seconds",
        "left_seconds",
        "error",
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
        "starting_tokens",
        "loss_head",
        "attention",
        "compile",
        "deterministic",
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
    contents="c0de",
    stage="sft",
    rows=3,
    samples=4,
    tokens=70,
    target_tokens=30,
    lengths=(((10, 3), (40, 1)), ((2, 1), (5, 3))),
    longest_row=(90, "data.jsonl: line 3"),
    cuts={"answer_cut": 1},
    unknown_share=0.01,
)
PREPROCESS = Preprocess(
    model="small",
    tokenizer=None,
    dropout=0.1,
    freeze=(),
    data=(),
    validation=(),
    validation_split=None,
    stage=None,
    max_seq_len=512,
    max_target_len=128,
    limit=None,
    show=0,
    cache_dir="/cache",
)
RECIPE = recipe(epochs=0.5, weight_decay=0.0, clip=0.0)
EXCERPT = Excerpt(
    store="/cache/tokens/5f0c", seed=42, share=16, sizes=(4, 2), layouts=("sorted",), answered=("/cache/tokens/77", 64)
)
ERRANDS = [
    PREPROCESS,
    Trace(device="cpu", fast_bf16=True, workloads=(workload(),), micro_batch_sizes=(1, 4)),
    Dry(
        workload=workload(),
        device="cpu",
        micro_batch_size=4,
        ranks=1,
        backend=None,
        verify=True,
        budget_bytes=GIB,
        limit_bytes=GIB,
        excerpt=EXCERPT,
    ),
    Train(
        plan=plan(),
        recipe=RECIPE,
        store="/cache/store",
        validation_store=None,
        tokenizer_dir="/cache/tokenizer",
        ids=IDS,
        output_dir="runs/one",
        data_contents="c0de",
        saving=saving(),
        resume=Resume(place="runs/one", weights_only=False),
        backend="gloo",
        heartbeat_seconds=60.0,
        tensorboard=False,
        time_limit=TimeLimit(began_at=1.0, ends_at=3.5, of_run=True),
        longest=None,
    ),
]
ANSWERS = [
    preprocessed(tokenizer_dir="/cache/tokenizer", tokenizer_fingerprint="5f0c", ids=IDS, data=DATA),
    TraceReport(process_bytes=MIB, traced=(traced(1, {"forward_backward": GIB}),)),
    DryReport(
        verified=True,
        peak_bytes=GIB,
        phases={"forward_backward": GIB},
        resident_bytes=MIB,
        host_peak_bytes=GIB,
        timings=timed(1, (512, 0.5)).timings,
        timed=(Timed(layout="fixed", rows=4, samples=4, padded_tokens=(64, 80), seconds=(0.1, 0.2)),),
        evaluation_seconds=0.1,
        expected_peak_bytes=None,
        inexact=(),
        matrix_flops={"bf16": 4e14, "fp32": 5e13},
        answering=Answering(
            rows_at_once=64,
            prompt_tokens=20.0,
            longest_answer=100,
            seconds_of_token=0.01,
            seconds_of_further_row=0.001,
        ),
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
    assert EXPLORING_LENGTHS[1:] == (1.0,)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0.0},
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"warmup": -1.0},
        {"weight_decay": -0.1},
        {"clip": -1.0},
        {"schedule": "triangular"},
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


def test_a_percentile_is_the_shortest_length_that_no_more_than_the_others_exceed() -> None:
    lengths = ((10, 50), (20, 45), (30, 4), (40, 1))
    data = DATA.model_copy(update={"lengths": (lengths,), "samples": 100})
    assert [data.percentile(0, share) for share in (0.01, 0.5, 0.51, 0.95, 0.99, 1.0)] == [10, 10, 20, 20, 30, 40]


def test_a_command_may_take_what_lies_between_its_beginning_and_its_end() -> None:
    assert TimeLimit(began_at=1.0, ends_at=3.5, of_run=True).seconds == 2.5
