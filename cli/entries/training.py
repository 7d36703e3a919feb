"""What is typed to plan and to train."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.entries.shared import Config, Debug, NoCache, Offline, Profile, ShowConfig, guarded
from cli.options import SettingsCommand, takes_settings

commands = typer.Typer()


@commands.command(cls=SettingsCommand)
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
    plot: Annotated[bool, typer.Option("--plot", help="Also draw peak and speed over the micro-batch.")] = False,
    no_cache: NoCache = False,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Print the batch that would run here, what it costs, and why it is not larger."""
    from cli.commands.plan import plan_command
    from cli.planning import Remembering

    plan_command(
        given,
        profile,
        config,
        as_json=as_json,
        show_config=show_config,
        explain=explain,
        plot=plot,
        gpu=gpu,
        gpus=gpus * nodes,
        compare=compare,
        varied=vary or [],
        remembering=Remembering(not no_cache, offline),
    )


@commands.command(cls=SettingsCommand)
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
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="Try it first, and leave: two steps on the longest samples, evaluation, save, kill, resume.",
        ),
    ] = False,
    show_config: ShowConfig = False,
    no_cache: NoCache = False,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Train a model, and leave one that transformers loads."""
    from cli.commands.train import Asked, train_command
    from cli.planning import Remembering
    from cli.runs import Resuming
    from profiles import resolve

    resolved, remembering = resolve(given, config, profile), Remembering(not no_cache, offline)
    asked = Asked(resolved, given, profile, config, plan_file, auto, remembering)
    resuming = Resuming(resume, resume_from, resume_weights_only)
    train_command(asked, resuming, show_config=show_config, rehearsing=rehearse)


@commands.command()
@guarded
def profiles(debug: Debug = False) -> None:
    """List the profiles."""
    from cli.render.settings import print_profiles
    from profiles import load_profile, profile_names

    print_profiles({name: load_profile(name) for name in profile_names()})
