"""The command line, the only voice of the program: parses, wires, prints, ends with an exit code. Never loads torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from autotune.errors import UserError, disk_error
from cli.options import SettingsCommand, takes_settings

INTERNAL_ERROR = 70
EXIT_CODES = (
    "Exit codes: 0 ok; 1 nothing fits; 2 usage or configuration; 3 data; 4 device or disk; 5 output folder in use; "
    "70 internal error; 75 stopped and saved: go on with --resume; 130, 143 ended by a signal."
)

chatlm = typer.Typer(
    name="chatlm",
    help="Finds the largest safe batch for a small language model on this machine, and trains it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
)

tokenizer_commands = typer.Typer(help="Train a tokenizer, or look at one.", no_args_is_help=True)
chatlm.add_typer(tokenizer_commands, name="tokenizer")

Profile = Annotated[
    str | None, typer.Option("--profile", help="Profile, or a TOML file of one's own.", metavar="NAME|FILE")
]
Config = Annotated[
    str | None, typer.Option("--config", help="TOML file of settings; wins over the profile.", metavar="FILE")
]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print every value and where it came from, and leave.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Plan anew, whatever was measured here before.")]
Offline = Annotated[
    bool, typer.Option("--offline", help="Trust what was measured here before, without a dry step to check it.")
]
Output = Annotated[str, typer.Option("--output", help="Parquet file to write.", metavar="FILE")]
ValidationOutput = Annotated[
    str | None,
    typer.Option("--validation-output", help="Write rows for validation too; no content is in both.", metavar="FILE"),
]
ValidationRatio = Annotated[
    float,
    typer.Option("--validation-ratio", min=1.0, max=1e6, help="Rows of training to one of validation.", metavar="N"),
]
Place = Annotated[str, typer.Argument(help="Run, checkpoint, or folder of a model.", metavar="RUN|DIR")]
Report = Annotated[str | None, typer.Option("--report", help="Write what is told as JSON.", metavar="FILE")]
AsJson = Annotated[bool, typer.Option("--json", help="Tell it as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can mend into one sentence and an exit code; anything else is a bug, and says so."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        debug = arguments.pop("debug")
        try:
            command(**arguments)
        except (typer.Exit, KeyboardInterrupt):
            raise
        except Exception as error:
            from cli.render.console import fail

            told: UserError | None = disk_error(error) if isinstance(error, OSError) else None
            if isinstance(error, UserError):
                told = error
            if told is not None:
                fail(told.message, told.hint)
            if debug:
                raise
            if told is not None:
                raise typer.Exit(told.exit_code) from None
            fail(
                f"internal error: {type(error).__name__}: {error}",
                "run again with --debug, and report what it shows",
            )
            raise typer.Exit(INTERNAL_ERROR) from None

    return run


@chatlm.command(cls=SettingsCommand)
@takes_settings
@guarded
def plan(
    given: dict[str, Any],
    profile: Profile = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON of chatlm.plan/1.")] = False,
    show_config: ShowConfig = False,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Estimate for a card that is not here, such as 'RTX 3090'.", metavar="CARD"),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many of it, on one machine.", metavar="N")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="How many such machines.", metavar="N")] = 1,
    compare: Annotated[bool, typer.Option("--compare", help="Put profiles and this plan side by side.")] = False,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", help="Table what a lever does; may be repeated.", metavar="NAME=VALUE,VALUE"),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also say what the peak is made of, by phase.")] = False,
    no_cache: NoCache = False,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Print the batch that would run here, what it costs, and why it is not larger."""
    from cli.commands import Remembering, plan_command

    plan_command(
        given,
        profile,
        config,
        as_json=as_json,
        show_config=show_config,
        explain=explain,
        gpu=gpu,
        gpus=gpus * nodes,
        compare=compare,
        varied=vary or [],
        remembering=Remembering(not no_cache, offline),
    )


@chatlm.command(cls=SettingsCommand)
@takes_settings
@guarded
def train(
    given: dict[str, Any],
    auto: Annotated[bool, typer.Option("--auto", help="Plan first: search the largest safe batch.")] = False,
    plan_file: Annotated[str | None, typer.Option("--plan", help="Train a plan made earlier.", metavar="FILE")] = None,
    profile: Profile = None,
    config: Config = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint of the run, to the bit.")
    ] = False,
    resume_from: Annotated[
        str | None,
        typer.Option("--resume-from", help="The same, from this checkpoint, or this run.", metavar="DIR"),
    ] = None,
    resume_weights_only: Annotated[
        bool, typer.Option("--resume-weights-only", help="Begin a new run, from the weights there alone.")
    ] = False,
    show_config: ShowConfig = False,
    no_cache: NoCache = False,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Train a model, and leave one that transformers loads."""
    from cli.commands import Remembering, train_command
    from cli.runs import Resuming

    train_command(
        given,
        profile,
        config,
        auto=auto,
        plan_file=plan_file,
        show_config=show_config,
        remembering=Remembering(not no_cache, offline),
        resuming=Resuming(resume, resume_from, resume_weights_only),
    )


@chatlm.command(cls=SettingsCommand)
@takes_settings
@guarded
def data(
    given: dict[str, Any],
    files: Annotated[
        list[str] | None, typer.Argument(help="Parquet or jsonl files, or folders of such.", metavar="FILE...")
    ] = None,
    profile: Profile = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    show: Annotated[int, typer.Option("--show", min=0, help="Samples to print token by token.", metavar="N")] = 2,
    show_config: ShowConfig = False,
    debug: Debug = False,
) -> None:
    """Print how long the rows of data are, what is cut, padded and trained on, and the first samples by token."""
    from cli.commands import data_command

    data_command(files or [], given, profile, config, as_json=as_json, show=show, show_config=show_config)


@chatlm.command()
@guarded
def sample(
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="Parquet or jsonl file, or folder of such; may be repeated.", metavar="FILE|DIR"),
    ],
    output: Output,
    num_samples: Annotated[int | None, typer.Option("--num-samples", min=1, help="Rows to draw.", metavar="N")] = None,
    fraction: Annotated[
        float | None, typer.Option("--fraction", min=0.0, max=1.0, help="Share of the rows instead.", metavar="SHARE")
    ] = None,
    smart: Annotated[
        bool,
        typer.Option("--smart", help="Drop what is worth nothing first, then keep lengths and topics in their shares."),
    ] = False,
    validation_output: ValidationOutput = None,
    validation_ratio: ValidationRatio = 10.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63, help="Another draws others.")] = 42,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Tell lengths in its tokens too.", metavar="DIR")
    ] = None,
    report: Report = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw rows of data files, at random or of the best, and say what went and why."""
    from autotune.errors import ConfigurationError
    from cli.files import sample_command
    from trainer.sampling import Wanted

    if (num_samples is None) == (fraction is None):
        raise ConfigurationError("how many rows are to be drawn?", "give --num-samples N or --fraction SHARE")
    validation = 1 / validation_ratio if validation_output is not None else 0.0
    wanted = Wanted(num_samples, 1.0 if fraction is None else fraction, validation, smart, seed)
    sample_command(inputs, output, wanted, validation_output, tokenizer, report, as_json=as_json)


@chatlm.command()
@guarded
def prepare(
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", help="json, jsonl, csv or parquet, or folder of such; may be repeated.", metavar="FILE|DIR"
        ),
    ],
    output: Output,
    kind: Annotated[
        str | None,
        typer.Option("--as", help="pairs, conversations or text; else what the first row is.", metavar="KIND"),
    ] = None,
    validation_output: ValidationOutput = None,
    validation_ratio: ValidationRatio = 10.0,
    test_output: Annotated[
        str | None, typer.Option("--test-output", help="The same for a test at the end.", metavar="FILE")
    ] = None,
    test_ratio: Annotated[
        float, typer.Option("--test-ratio", min=1.0, max=1e6, help="Rows of training to one of the test.", metavar="N")
    ] = 100.0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read the first N rows.", metavar="N")] = None,
    report: Report = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make clean parquet of data files as they are found, and say what was cleaned and what rejected."""
    from cli.files import prepare_command
    from trainer.preparing import Side

    # A ratio is to the rows of training: of what is left after those before it.
    parts = [(test_output, 1 / test_ratio), (validation_output, 1 / validation_ratio)]
    whole = 1.0 + sum(part for name, part in parts if name is not None)
    sides, below = [], 0.0
    for name, part in parts:
        if name is not None:
            below += part / whole
            sides.append(Side(Path(name), below))
    prepare_command(inputs, [*sides, Side(Path(output), 1.0)], kind, limit, report, as_json=as_json)


@chatlm.command("import")
@guarded
def import_weights(
    source: Annotated[
        str, typer.Argument(help="A .pth, .bin, .safetensors or .gguf file, or a model's folder.", metavar="FILE|DIR")
    ],
    output: Annotated[str, typer.Option("--output", help="Folder to make.", metavar="DIR")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Its tokenizer; else the one beside it.", metavar="DIR")
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", min=1, help="Heads of attention, where they are not MiniMind's 8.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a model's folder of weights of MiniMind, ChatLM-mini-Chinese or others; runs no code of theirs."""
    from cli.models import import_command

    import_command(source, output, tokenizer, heads)


@chatlm.command()
@guarded
def export(
    place: Place,
    output: Annotated[
        str, typer.Option("--output", help="Folder to make, or file for another program's own code.", metavar="PATH")
    ],
    layout: Annotated[
        str,
        typer.Option("--format", help="transformers, minimind, minimind-2025-04 or chatlm-mini.", metavar="FORMAT"),
    ] = "transformers",
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="fp16, bf16 or fp32; else fp16, and bf16 for T5.", metavar="PRECISION"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a model in half precision and one file, for transformers or as MiniMind's own code loads it."""
    from cli.models import export_command

    export_command(place, output, layout, precision)


@chatlm.command()
@guarded
def chat(
    place: Place,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Another, to answer beside it; may be repeated.", metavar="RUN|DIR"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Answer this and leave; may be repeated, each by itself.", metavar="TEXT"),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="What stands before the conversation.", metavar="TEXT")
    ] = None,
    history: Annotated[
        int | None,
        typer.Option("--history", min=0, help="Exchanges before that are given; all, of T5 none.", metavar="N"),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, max=100_000, help="Of an answer, at most.", metavar="TOKENS")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=100.0, help="Above 0 samples; 0 takes the likeliest.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.001, max=1.0, help="Sample of the likeliest with this share.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample of so many; 0 of all.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=0.01, max=100.0, help="Above 1 shuns what was said.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Another samples others.")] = 42,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.", metavar="DEVICE")] = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Talk with a model, by its own template; several answer side by side."""
    from autotune.errands import Choosing
    from autotune.errors import ConfigurationError
    from cli.models import chat_command

    if temperature == 0 and (top_p < 1 or top_k):
        raise ConfigurationError(
            "--top-p and --top-k choose among tokens that are sampled, and at temperature 0 none are",
            "give --temperature 0.8 too, or leave them out",
        )
    choosing = Choosing(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    chat_command(place, compare or [], prompt or [], system, history, choosing, device, as_json=as_json)


@chatlm.command()
@guarded
def evaluate(
    places: Annotated[list[str], typer.Argument(help="Runs, checkpoints, or folders of models.", metavar="RUN|DIR...")],
    data: Annotated[
        list[str],
        typer.Option("--data", help="Parquet or jsonl file, or folder of such; may be repeated.", metavar="FILE|DIR"),
    ],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N rows.", metavar="N")] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option("--max-seq-len", min=2, help="As in training; else what the run had, or 512.", metavar="TOKENS"),
    ] = None,
    max_target_len: Annotated[
        int | None, typer.Option("--max-target-len", min=2, help="Of a seq2seq model's targets.", metavar="TOKENS")
    ] = None,
    answers: Annotated[
        int, typer.Option("--answers", min=0, help="Rows to answer, for BLEU and chrF.", metavar="ROWS")
    ] = 64,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print a model's loss, perplexity, accuracy, BLEU-4 and chrF on a file; of several, a table."""
    from cli.models import evaluate_command

    told = {"limit": limit, "max_seq_len": max_seq_len, "max_target_len": max_target_len}
    given = {name: value for name, value in told.items() if value is not None} | {"data": tuple(data)}
    evaluate_command(places, given, answers, as_json=as_json)


@tokenizer_commands.command("train")
@guarded
def train_tokenizer(
    inputs: Annotated[
        list[str],
        typer.Option("--data", help="Parquet or jsonl file, or folder of such; may be repeated.", metavar="FILE|DIR"),
    ],
    output: Annotated[str, typer.Option("--output", help="Folder to make.", metavar="DIR")],
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=300, max=1_000_000, help="Entries, at most.")] = 6400,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63, help="Another draws other rows.")] = 42,
    report: Report = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train byte-level BPE on rows drawn from files, and say how it cuts others."""
    from cli.files import train_tokenizer_command

    train_tokenizer_command(inputs, output, vocab_size, seed, report, as_json=as_json)


@tokenizer_commands.command("inspect")
@guarded
def inspect_tokenizer(
    folder: Annotated[str, typer.Argument(help="Folder of a tokenizer.", metavar="DIR")],
    inputs: Annotated[
        list[str] | None, typer.Option("--data", help="Files to cut with it; may be repeated.", metavar="FILE|DIR")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63, help="Another draws other rows.")] = 42,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a tokenizer has and lacks, and how it cuts texts."""
    from cli.files import inspect_tokenizer_command

    inspect_tokenizer_command(folder, inputs or [], seed, as_json=as_json)


@chatlm.command()
@guarded
def profiles(debug: Debug = False) -> None:
    """List the profiles."""
    from cli.render.settings import print_profiles
    from profiles import load_profile, profile_names

    print_profiles({name: load_profile(name) for name in profile_names()})


def app() -> None:
    """Run the command line."""
    chatlm()


if __name__ == "__main__":
    app()
