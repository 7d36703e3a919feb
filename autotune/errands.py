"""What the supervisor asks of a worker, and the facts that come back: the contract of the pipe between the two.

An errand goes in as one JSON object. Events come out as JSON lines: `progress`, `note`, `metrics`, `result`, and
`error` for a mistake of the user's. No files, no clock, no environment.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, TypeAdapter

from autotune.plan import (
    Answering,
    Backend,
    Device,
    Fact,
    Layout,
    Plan,
    Precision,
    Stage,
    Task,
    Timed,
    Timing,
    Traced,
    Workload,
)

LOST_A_PEER = 76
"""Exit code of a worker that failed for want of another rank: EX_PROTOCOL of sysexits.h."""
DRY_MICRO_BATCHES = 2
"""Micro-batches in a dry step: the second one meets resident gradients, as all but the first do in training."""
DRY_LENGTHS = (1.0, 0.5, 1.0, 1.0)
"""Share of the worst-case length in each dry step. A first step is no guide.

A shorter one tells what a shorter row costs in seconds, and makes an allocator cut what it keeps: with two lengths a
peak was read 1 to 2 % above that of many full steps, with three 3 to 5 %.
"""
EXPLORING_LENGTHS = (1.0, 1.0)
"""Of a trial that only tells where to look: the second step meets the optimizer's moments."""


class ModelSummary(Fact):
    """What a model is, without its weights in memory."""

    task: Task
    family: str
    """transformers' model type: llama, t5, ..."""
    parameters: int
    trainable_parameters: int
    vocabulary_size: int
    attention: str
    random_weights: bool
    longest_input: int | None
    """Tokens that the model has positions for; None where there is no such limit."""
    chunks: bool
    """Whether its loss head can be taken in chunks: it is known what it does to its logits."""
    packs: bool
    """Whether it takes the masks by which several samples may share a row."""
    window: int | None
    """Tokens that some layers look back over, of which such masks know nothing; None where all see all."""


class DataSummary(Fact):
    """What a set of files holds once it is tokens."""

    files: tuple[str, ...]
    store: str
    """Folder of the token store."""
    fingerprint: str
    """Of the files as they lie there, the tokenizer and the rules."""
    contents: str
    """Hash of the samples themselves, whatever the files are called."""
    stage: Stage
    rows: int
    samples: int
    """Rows, except that documents longer than the limit become several samples."""
    tokens: int
    target_tokens: int
    lengths: tuple[tuple[tuple[int, int], ...], ...]
    """Histograms of (tokens, samples): of sequences (causal), or of sources and of targets (seq2seq)."""
    longest_row: tuple[int, str]
    """Tokens of the longest row before it was cut, and the file and line where it stands."""
    cuts: dict[str, int]
    """Rows that a rule cut, by rule: dropped_turns, prompt_cut, answer_cut, source_cut, target_cut, split."""
    unknown_share: float
    """Share of tokens that the tokenizer did not know."""

    def longest(self, side: int) -> int:
        """Return the tokens of the longest sample on this side: 0 sequence or source, 1 target."""
        return self.lengths[side][-1][0]

    def percentile(self, side: int, share: float) -> int:
        """Return the length that this share of the samples does not exceed."""
        seen = list(accumulate(count for _, count in self.lengths[side]))
        return self.lengths[side][bisect_left(seen, share * seen[-1])][0]


class TokenIds(Fact):
    """Ids of a tokenizer's special tokens, as a model's configurations hold them."""

    pad: int
    eos: int | tuple[int, ...]
    bos: int | None


class Preprocess(Fact):
    """Say what the model is; turn data into a token store, once."""

    errand: Literal["preprocess"] = "preprocess"
    model: str
    tokenizer: str | None
    dropout: float | None
    freeze: tuple[str, ...]
    """As in `Workload.frozen`."""
    data: tuple[str, ...] | None
    """Files or folders; an empty tuple is the demo data, None no data."""
    validation: tuple[str, ...]
    validation_split: Annotated[float, Field(gt=0, lt=1)] | None
    """Share of the rows that is held out, by their content."""
    stage: Stage | None
    max_seq_len: PositiveInt
    max_target_len: PositiveInt
    limit: int | None
    show: int
    """Samples to show token by token."""
    cache_dir: str


class ShownToken(Fact):
    """A token as text, or several that are one character together."""

    text: str
    tokens: int
    trained: bool


class Preprocessed(Fact):
    """The answer to `Preprocess`."""

    model: ModelSummary
    tokenizer_dir: str | None
    tokenizer_fingerprint: str | None
    ids: TokenIds | None
    data: DataSummary | None
    validation: DataSummary | None
    shown: tuple[tuple[ShownToken, ...], ...]
    """The first samples."""


class Trace(Fact):
    """Say what tensors the step of each workload holds at each of these sizes, without taking it.

    Answered by one result a workload, in their order.
    """

    errand: Literal["trace"] = "trace"
    device: Device
    fast_bf16: bool
    """Of what it would run on: both decide the kernel of attention."""
    workloads: tuple[Workload, ...]
    micro_batch_sizes: tuple[PositiveInt, ...]


class TraceReport(Fact):
    """The answer to `Trace`, for one workload."""

    process_bytes: int
    """What a worker holds on the host before there is a model."""
    traced: tuple[Traced, ...]


class Excerpt(Fact):
    """The first samples of a run, as it will take them: what micro-batches of several sizes are timed on."""

    store: str
    seed: int
    share: PositiveInt
    """Samples that a rank takes of a step."""
    sizes: tuple[PositiveInt, ...]
    """Under the workload's layout; the first always, the others as long as it takes little."""
    layouts: tuple[Layout, ...]
    """To be timed beside it, at the first size."""
    answered: tuple[str, PositiveInt] | None
    """The store whose rows an evaluation has answered, and how many; None where it has none."""


class Dry(Fact):
    """Take dry steps of one size, and say what they held and how long they took."""

    errand: Literal["dry"] = "dry"
    workload: Workload
    device: Device
    micro_batch_size: PositiveInt
    ranks: PositiveInt
    """That take these steps at the same time on this machine, and add their gradients."""
    backend: Backend | None
    verify: bool
    """Whether to take all dry steps, or those that tell where to look."""
    budget_bytes: int
    """What it should hold: a size that holds more after the first steps is not worth the others."""
    limit_bytes: int
    """What it may hold: on a GPU its allocator refuses more, as on a smaller card."""
    excerpt: Excerpt | None
    """What to time beside; None without data."""


class DryReport(Fact):
    """The answer to `Dry`: bytes by phase, seconds by step; of several ranks the most that any of them took."""

    verified: bool
    """Whether all dry steps were taken."""
    peak_bytes: PositiveInt
    """On CUDA what the allocator reserved, context included; the phases say what of it was allocated."""
    phases: dict[str, int]
    resident_bytes: int
    host_peak_bytes: int
    timings: tuple[Timing, ...]
    timed: tuple[Timed, ...]
    evaluation_seconds: float
    expected_peak_bytes: int | None
    inexact: tuple[Layout, ...]
    """Layouts that were seen to change this model's gradient; only looked for beside an excerpt."""
    matrix_flops: dict[Precision, float]
    """Operations a second of dense matrix products, at the workload's precision and in fp32."""
    answering: Answering | None


class SavedModel(Fact):
    """A model that lies on the disk: a folder that transformers loads, or a checkpoint with the shape of its run."""

    place: str
    """As it was named."""
    model: str
    """A folder, or a preset."""
    vocabulary_size: int | None
    """Of the run's model; a folder has its own."""
    checkpoint: str | None
    """Where the weights are, if not in that folder: a checkpoint, or a run, of which the newest is taken."""
    tokenizer: str | None
    stage: Stage
    """What it was trained on last."""


class Recipe(Fact):
    """What a run needs besides a plan: nothing here changes memory."""

    epochs: Annotated[float, Field(gt=0)]
    max_steps: PositiveInt | None
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear", "constant", "one-cycle"]
    warmup: Annotated[float, Field(ge=0)]
    """Steps; below 1 a share of all steps."""
    div_factor: Annotated[float, Field(ge=1)]
    """One cycle begins at the rate over this."""
    weight_decay: Annotated[float, Field(ge=0)]
    clip: Annotated[float, Field(ge=0)]
    """Largest gradient norm; 0 does not clip."""
    seed: int
    eval_every: PositiveInt | None
    """Steps between evaluations; None evaluates after each epoch. The last step is evaluated in any case."""
    early_stopping: PositiveInt | None
    """Evaluations without a lesser loss after which the run ends."""
    bleu_rows: Annotated[int, Field(ge=0)]
    """Rows of the validation data that are answered for BLEU."""
    samples: Annotated[int, Field(ge=0)]
    """Prompts of the data that are answered for people, at each evaluation."""
    prompts: tuple[str, ...]
    """Of the user's own, beside them."""


class Saving(Fact):
    """When a run is saved, beside its end, a wish to stop, and an evaluation that is the best so far."""

    every_steps: PositiveInt | None
    every_seconds: Annotated[float, Field(gt=0)] | None
    each_epoch: bool
    keep_last: PositiveInt
    """Checkpoints that stay; never fewer than two, and the best."""


class Resume(Fact):
    """Where a run goes on from."""

    place: str
    """A checkpoint, or the folder of a run: of it the newest checkpoint that is whole."""
    weights_only: bool
    """Whether to begin anew, from its weights."""


class TimeLimit(Fact):
    """When a run has to end, its model saved."""

    began_at: float
    """When the command did, in seconds since the clock's epoch."""
    ends_at: float
    of_run: bool
    """Whether what the run took before, in other processes, counts too."""

    @property
    def seconds(self) -> float:
        """That the command may take."""
        return self.ends_at - self.began_at


class Train(Fact):
    """Train a plan."""

    errand: Literal["train"] = "train"
    plan: Plan
    recipe: Recipe
    store: str
    validation_store: str | None
    tokenizer_dir: str
    ids: TokenIds
    output_dir: str
    data_contents: str
    """Hash of the samples (`DataSummary.contents`)."""
    saving: Saving
    time_limit: TimeLimit | None
    longest: PositiveInt | None
    """Samples that are trained on, the longest there are, and as many to evaluate on: a rehearsal's; None for all."""
    resume: Resume | None
    backend: Backend | None
    heartbeat_seconds: Annotated[float, Field(gt=0)]
    """Without a sign of life of a rank, after which all end."""
    tensorboard: bool
    """Whether rows of metrics also go where TensorBoard reads them."""


class Follow(Fact):
    """Train what the first rank is told, on what of it lies on this machine: for ranks that somebody else launched."""

    errand: Literal["follow"] = "follow"
    device: Device
    store: str
    validation_store: str | None
    tokenizer_dir: str
    data_contents: str
    """As in `Train`: ranks that were given other data train nothing."""
    backend: Backend | None
    heartbeat_seconds: Annotated[float, Field(gt=0)]


class Import(Fact):
    """Make a folder that transformers loads of weights as another program left them."""

    errand: Literal["import"] = "import"
    source: str
    """A file, or a folder with a configuration."""
    output: str
    tokenizer: str | None
    heads: PositiveInt | None
    """Of attention, where the weights do not tell."""


class Imported(Fact):
    """The answer to `Import`."""

    what: str
    """Whose weights they were."""
    family: str
    parameters: int
    dtype: str
    assumed: str
    """What neither the weights nor the command said; empty where nothing."""
    tokenizer: str | None
    """Where it was taken from; None where there was none."""


Format = Literal["transformers", "minimind", "minimind-2025-04", "chatlm-mini"]


class Export(Fact):
    """Write a model for another program."""

    errand: Literal["export"] = "export"
    saved: SavedModel
    output: str
    precision: Precision | None
    """None: half precision, fp16 but for T5, whose activations it does not hold."""
    format: Format


class Exported(Fact):
    """The answer to `Export`."""

    precision: Precision
    bytes: int
    needs: dict[str, int | float]
    """What the other program has to be told, by its own names."""


class Evaluate(Fact):
    """Say what a model is worth on a token store."""

    errand: Literal["evaluate"] = "evaluate"
    saved: SavedModel
    workload: Workload
    device: Device
    store: str
    tokenizer_dir: str
    ids: TokenIds
    answers: Annotated[int, Field(ge=0)]
    """Rows that are answered, for BLEU and chrF."""
    room_bytes: int
    """That generating them may take."""


class Evaluated(Fact):
    """The answer to `Evaluate`: means over all target tokens, and scores of the rows that were answered."""

    loss: float | None
    """None, as the next, where it is no number."""
    perplexity: float | None
    accuracy: float
    samples: int
    target_tokens: int
    answered: int
    """Rows; 0 of documents, which have no answers."""
    bleu: float | None
    bleu_signature: str | None
    chrf: float | None
    chrf_signature: str | None
    seconds: float


class Choosing(Fact):
    """How the next token is chosen."""

    max_new_tokens: PositiveInt
    temperature: Annotated[float, Field(ge=0)]
    """0 takes the likeliest."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0)]
    """0 leaves all."""
    repetition_penalty: Annotated[float, Field(gt=0)]
    seed: int


class Chat(Fact):
    """Answer the conversations that come on the following lines of stdin, each a `Conversation`, until they end."""

    errand: Literal["chat"] = "chat"
    saved: SavedModel
    device: Device
    longest_prompt: PositiveInt | None
    """Tokens; None where the model's positions alone decide."""
    choosing: Choosing


class Conversation(Fact):
    """What was said so far: roles and words, a question last."""

    turns: tuple[tuple[str, str], ...]


class Answered(Fact):
    """The answer to one `Conversation`, whose words went before it as they came."""

    text: str
    tokens: int
    seconds: float
    dropped: int
    """Of the oldest turns, for which there was no room."""
    ended: bool
    """Whether the model ended it; else its length did, or the user."""


class Probe(Fact):
    """Say what torch sees of this machine, and how fast the device is."""

    errand: Literal["probe"] = "probe"
    device: Device
    """That is measured, where torch sees it."""
    precisions: tuple[Precision, ...]


class Probed(Fact):
    """The answer to `Probe`."""

    sees_card: bool
    """Whether CUDA is there for torch."""
    why_not: str
    """What CUDA says where a card was to be measured and torch does not see it."""
    architectures: tuple[str, ...]
    """Of cards that this build of torch has kernels for (sm_86), or code to compile for later ones (compute_90)."""
    instructions: str
    """The largest set of a processor's vector instructions that torch uses."""
    threads: int
    matrix_flops: dict[Precision, float]
    """Operations a second of dense matrix products."""
    copy_bytes: float | None
    """Bytes a second, read and written, of a large copy."""
    failed: str
    """Why a rate is missing; empty where none is."""
    seconds: float


Errand = Annotated[
    Preprocess | Trace | Dry | Train | Follow | Import | Export | Evaluate | Chat | Probe,
    Field(discriminator="errand"),
]
ERRAND: TypeAdapter[Errand] = TypeAdapter(Errand)
