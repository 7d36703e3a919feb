"""What is typed for models there are: to bring them in and out, talk with them, score them."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.entries.shared import AsJson, Debug, Place, guarded

commands = typer.Typer()


@commands.command("import")
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
    from cli.commands.models import import_command

    import_command(source, output, tokenizer, heads)


@commands.command()
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
    from cli.commands.models import export_command

    export_command(place, output, layout, precision)


@commands.command()
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
    from cli.commands.models import chat_command

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


@commands.command()
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
    from cli.commands.models import evaluate_command

    told = {"limit": limit, "max_seq_len": max_seq_len, "max_target_len": max_target_len}
    given = {name: value for name, value in told.items() if value is not None} | {"data": tuple(data)}
    evaluate_command(places, given, answers, as_json=as_json)
