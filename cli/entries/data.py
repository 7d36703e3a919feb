"""What is typed to look at data, and to make data files and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.entries.shared import (
    AsJson,
    Config,
    Debug,
    Output,
    Profile,
    Report,
    ShowConfig,
    ValidationOutput,
    ValidationRatio,
    guarded,
)
from cli.options import SettingsCommand, takes_settings

commands = typer.Typer()
tokenizer_commands = typer.Typer(help="Train a tokenizer, or look at one.", no_args_is_help=True)
commands.add_typer(tokenizer_commands, name="tokenizer")


@commands.command(cls=SettingsCommand)
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
    from cli.commands.data import data_command

    data_command(files or [], given, profile, config, as_json=as_json, show=show, show_config=show_config)


@commands.command()
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
    from cli.commands.files import sample_command
    from trainer.sampling import Wanted

    if (num_samples is None) == (fraction is None):
        raise ConfigurationError("how many rows are to be drawn?", "give --num-samples N or --fraction SHARE")
    validation = 1 / validation_ratio if validation_output is not None else 0.0
    wanted = Wanted(num_samples, 1.0 if fraction is None else fraction, validation, smart, seed)
    sample_command(inputs, output, wanted, validation_output, tokenizer, report, as_json=as_json)


@commands.command()
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
    from cli.commands.files import prepare_command
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
    from cli.commands.files import train_tokenizer_command

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
    from cli.commands.files import inspect_tokenizer_command

    inspect_tokenizer_command(folder, inputs or [], seed, as_json=as_json)
