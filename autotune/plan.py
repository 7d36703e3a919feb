"""The contract: what was asked, what there is, what was decided. Frozen types that go to JSON and back unchanged.

The supervisor writes a plan and the worker obeys it; nothing that changes memory or numbers lies outside `Workload`
and `Batching`. No files, no clock, no environment.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

SCHEMA = "chatlm.plan/1"

Task = Literal["causal", "seq2seq"]
Stage = Literal["pretrain", "sft"]
Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["cuda", "cpu"]
Layout = Literal["packed", "sorted", "fixed"]
LossHead = Literal["full", "chunked"]
Optimizer = Literal["adamw", "adafactor"]
CpuAllocator = Literal["fast", "tight"]
Switch = Literal["on", "off"]
Backend = Literal["gloo", "nccl"]
LimitedBy = Literal["memory", "effective_batch", "speed", "data", "user"]
Outcome = Literal["completed", "out_of_memory", "killed", "timed_out"]


class Fact(BaseModel):
    """A frozen value with named fields; an unknown field is an error, and so is a number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Workload(Fact):
    """All that decides the memory and the numbers of one step, whatever the batch."""

    model: str
    task: Task
    stage: Stage
    parameters: int
    trainable_parameters: int
    vocabulary_size: int
    max_seq_len: PositiveInt
    """Worst-case tokens of one row: of the sequence (causal) or of the source (seq2seq)."""
    max_target_len: int
    """Worst-case tokens of one target row (seq2seq); 0 for a causal model."""
    precision: Precision
    optimizer: Optimizer
    gradient_checkpointing: Switch
    frozen: tuple[str, ...]
    dropout: float | None
    """None leaves the model's own."""
    layout: Layout
    starting_tokens: PositiveInt
    """What a micro-batch costs to begin, in tokens: by that, layouts other than `fixed` are cut."""
    loss_head: LossHead
    attention: str
    compile: Switch
    deterministic: Switch
    """Kernels that add in one order alone: on a card a run goes on to the bit by them."""
    cpu_allocator: CpuAllocator
    tokenizer_fingerprint: str | None
    data_fingerprint: str | None

    @property
    def optimizer_state_bytes(self) -> int:
        """What the optimizer keeps: two moments of AdamW's; Adafactor's rows and columns are next to nothing."""
        return 8 * self.trainable_parameters if self.optimizer == "adamw" else 0

    @property
    def limits(self) -> tuple[int, ...]:
        """Worst-case tokens of a row, by side: of the sequence, or of source and target."""
        return (self.max_seq_len,) if self.task == "causal" else (self.max_seq_len, self.max_target_len)

    @property
    def tokens_per_row(self) -> int:
        """Worst-case tokens that one row costs, source and target together."""
        return sum(self.limits)


class Request(Fact):
    """What is wanted of a plan, besides the workload."""

    effective_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    """Fixed by the user: measured, never changed."""
    prefer: Literal["auto", "largest"]
    checkpointing: Literal["auto", "given"]
    """`auto` takes gradient checkpointing where nothing fits without it, or where it is faster; else the workload's."""
    layout: Literal["auto", "given"]
    """`auto` takes another than the workload's where it is faster, or where that one is not exact."""
    compile: Literal["auto", "given"]
    """`auto` compiles where the steps there are repay it, by measuring; else the workload's."""
    memory_limit_bytes: int | None
    headroom: float | None
    """Bytes from 1 on, below 1 a share of the limit, None the default."""
    backend: Backend | None
    """What carries gradients between ranks; None: nccl between cards, else gloo."""
    offline: bool
    """Whether what is remembered holds without a look at the machine."""


class CardProcess(Fact):
    """Somebody else on the card."""

    process_id: int
    name: str
    """Empty if it is not known."""
    bytes: int | None
    """What it holds of the card's memory; None where NVML does not tell, as on Windows."""


class Hardware(Fact):
    """What the machine has and has free, before anything of ours was started."""

    device: Device
    device_name: str
    world_size: PositiveInt
    local_world_size: PositiveInt
    """Ranks on this machine, each on a device of its own, or on its share of the processor."""
    device_memory_total_bytes: int
    device_memory_free_bytes: int
    """What one more process may take on the device: the same as `host_memory_available_bytes` on a CPU, and on a
    card that shares the host's memory."""
    host_memory_total_bytes: int
    host_memory_available_bytes: int
    """The least that the system, the control groups above us and our resource limits leave."""
    host_memory_limited_by: str
    """Which of them that is, for people."""
    disk_free_bytes: int
    cores: PositiveInt
    """Processor cores that we may use: affinity and control-group quota."""
    compute_capability: tuple[int, int] | None
    fast_bf16: bool
    """Whether bf16 arithmetic is done by the hardware: capability 8.0 and above, avx512_bf16 or amx."""
    others: tuple[CardProcess, ...]
    """Who else is on the card, as far as NVML tells, the largest first."""
    notes: tuple[str, ...]
    """What people should know of how it was read: why a card is not used, what of it is not known."""


class Batching(Fact):
    """How the effective batch is reached, exactly."""

    micro_batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    expected_micro_batches_per_step: float
    world_size: PositiveInt
    effective_batch_size: PositiveInt
    largest_safe_micro_batch_size: PositiveInt
    limited_by: LimitedBy


class Memory(Fact):
    """The account of the chosen micro-batch, at the worst case that the data or the limits allow."""

    limit_bytes: int
    limit_from: str
    """Which limit binds, for people."""
    headroom_bytes: int
    budget_bytes: int
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    expected_peak_bytes: int | None
    phases: dict[str, int]
    items: dict[str, int]
    host_budget_bytes: int
    host_peak_bytes: int


class Speed(Fact):
    """Of the chosen micro-batch, at full length; seconds of a step = update + its micro-batches' alpha + beta x tokens.

    Tokens count padding.
    """

    tokens_per_second: float
    samples_per_second: float
    seconds_per_step: float
    alpha_seconds: float
    beta_seconds_per_token: float
    least_seconds: float
    """Of a micro-batch, however short its rows."""
    update_seconds: float
    """Of the optimizer, once a step."""
    evaluation_seconds_per_token: float
    matrix_flops: dict[Precision, float]
    """Operations a second of dense matrix products on this device: at the workload's precision, and in fp32."""


class Forecast(Fact):
    """What the run will take on this data."""

    rows: int
    epochs: float
    steps_per_epoch: int
    total_steps: int
    seconds_per_epoch: float
    """Of its steps alone."""
    validation_seconds: float
    """Of one pass over the validation data; 0 without any."""
    answer_seconds: float
    """Of the answers that one evaluation has the model give, at their longest."""
    saving_seconds: float
    """Of one checkpoint, at the rate of a slow disk."""
    evaluations: int
    checkpoints: int
    asked_steps: int
    """Without a limit of time."""
    total_seconds: float
    """Of all of them together."""
    left_seconds: float
    """The same of the steps that were not done when it was made: all, but of a run that goes on."""
    error: float
    """Share by which the total may be wrong, either way, in two of three runs."""
    padded_tokens_per_sample: float
    """Mean tokens that a sample costs, padding included, under the plan's layout."""


class Timing(Fact):
    """How long a dry step took."""

    padded_tokens: int
    """Of one micro-batch."""
    seconds: float
    """Of one micro-batch, forward and backward."""
    update_seconds: float
    """Of the optimizer."""


class Timed(Fact):
    """How long forward and backward of so many samples of the data took, in micro-batches of at most so many rows.

    Repeats take other samples, the same for every size and layout.
    """

    layout: Layout
    rows: PositiveInt
    samples: PositiveInt
    padded_tokens: tuple[int, ...]
    """Of each repeat: their mean length is not that of all the data."""
    seconds: tuple[float, ...]


class Answering(Fact):
    """How long a model takes to answer rows of the data, many at a time, as an evaluation has it do."""

    rows_at_once: PositiveInt
    """That there is room for between two steps."""
    prompt_tokens: float
    """Mean."""
    longest_answer: PositiveInt
    """Tokens, of as many rows as are scored by default: so far the answers to all of them may go on."""
    seconds_of_token: float
    """Of one row."""
    seconds_of_further_row: float
    """For the same token of each row beside it."""


class Trial(Fact):
    """One size tried, and what happened."""

    micro_batch_size: PositiveInt
    cpu_allocator: CpuAllocator
    """What was tried under one setting tells nothing of the other."""
    gradient_checkpointing: Switch
    outcome: Outcome
    peak_bytes: int | None
    """None when the trial did not live to tell."""
    predicted_peak_bytes: int | None
    phases: dict[str, int]
    """Peak of each phase: start (the model alone), forward_backward, optimizer, evaluation."""
    resident_bytes: int | None
    """Held whatever the size: process, weights, gradients, optimizer state."""
    host_peak_bytes: int | None
    timings: tuple[Timing, ...]
    """Of its dry steps in their order; the first one warms up."""
    timed: tuple[Timed, ...]
    """Of its own size first, then of smaller ones."""
    verified: bool
    """Whether it took all the dry steps there are: a shorter trial tells where to look, and is never the answer."""
    evaluation_seconds: float | None
    """Of one evaluation batch at full length."""
    expected_peak_bytes: int | None
    """Peak at the heaviest micro-batches that an epoch of the data will bring; None without data."""
    inexact: tuple[Layout, ...]
    """Layouts that were seen to change this model's gradient."""
    matrix_flops: dict[Precision, float]
    """Operations a second of dense matrix products, at the workload's precision and in fp32; empty if not measured."""
    answering: Answering | None
    """None where it was not measured, as without data."""
    seconds: float
    """Wall time of the trial, imports and model included."""
    message: str

    @property
    def completed(self) -> bool:
        """Whether all of its steps ran to the end."""
        return self.outcome == "completed"


class Work(Fact):
    """What a device has to do, whatever device it is."""

    operators: int
    """Kernels that are started one after another."""
    flops: int
    """Of matrix products and attention."""
    moved_bytes: int
    """Read and written by all other operators."""


class Rates(Fact):
    """What a device does in a second at best."""

    flops: float
    """Of dense matrix products at the workload's precision."""
    bytes: float
    """Moved to and from its memory."""
    operator_seconds: float
    """That an operator takes to be started."""
    overlaps: bool
    """Whether operators are started while others work, as on a card."""


class Traced(Fact):
    """One size traced: bytes of tensors alone, without process, context and what an allocator adds."""

    micro_batch_size: PositiveInt
    phases: dict[str, int]
    """Peak of each phase: forward_backward, optimizer, evaluation."""
    items: dict[str, int]
    """What the highest of them is made of: weights, gradients, optimizer_state, activations, logits_and_loss,
    temporaries, inputs."""
    work: Work
    """Of forward and backward of one micro-batch."""
    update: Work
    """Of the optimizer."""


class Alternative(Fact):
    """Another way to take the same step, and what it would come to."""

    change: str
    """The options that make it."""
    largest_micro_batch_size: int
    """0 where not even one row would fit."""
    gradient_accumulation_steps: int
    peak_bytes: int
    """Of the largest micro-batch that fits, else of one row."""
    seconds_per_step: float | None
    measured: bool
    """Else by the trace."""


class SizeRow(Fact):
    """What one micro-batch size comes to."""

    micro_batch_size: PositiveInt
    peak_bytes: int
    samples_per_second: float | None
    """Of the data where it is known, else of rows at full length."""
    peak_measured: bool
    speed_measured: bool


class EvidenceSummary(Fact):
    """What the plan rests on."""

    kind: Literal["measured", "estimated", "cached"]
    dry_steps: int
    timing_steps: int
    trials: tuple[Trial, ...]
    out_of_memory_count: int
    seconds: float


class Plan(BaseModel):
    """What would run here, and why. `to_json` and `from_json` are inverse to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_name: Literal["chatlm.plan/1"] = Field(alias="schema")
    workload: Workload
    hardware: Hardware
    batching: Batching
    memory: Memory
    speed: Speed | None
    forecast: Forecast | None
    alternatives: tuple[Alternative, ...]
    """What the plan was weighed against."""
    sizes: tuple[SizeRow, ...]
    """1, 2, 4 ..., the chosen one, the largest safe one, and the next that would save a micro-batch, which is not."""
    evidence: EvidenceSummary

    def to_json(self) -> str:
        """Return the plan as an indented JSON object of schema `chatlm.plan/1`."""
        return self.model_dump_json(by_alias=True, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; raises `pydantic.ValidationError`, a `ValueError`, for anything else."""
        return cls.model_validate_json(text)
