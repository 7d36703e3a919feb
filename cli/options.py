"""The settings as options of a command: one list, in `profiles.Settings`, for the command line, files and help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from autotune.errors import ConfigurationError
from profiles import FIELDS, Settings
from profiles.names import ours

Command = Callable[..., None]


class SettingsCommand(TyperCommand):
    """A command that knows what its options are called elsewhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; an option that other trainers have is answered with ours."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # typer has click's errors under a private name
            name = getattr(error, "option_name", None)
            here = ours(name, FIELDS) if name else None
            if here is None:
                raise
            from cli.render.console import fail

            fail(f"there is no option {name}", f"here it is {here}")
            raise typer.Exit(ConfigurationError.exit_code) from None


def takes_settings(command: Command) -> Command:
    """Give a command every setting as an option; it gets those that were typed as the mapping `given`.

    Typer reads a command's options from its signature, so the signature is what is made here.
    """
    hints = get_type_hints(Settings)
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
    options = [_option(name, hints[name]) for name in FIELDS]

    @functools.wraps(command)
    def with_settings(**arguments: Any) -> None:
        given = {name: value for name in FIELDS if (value := arguments.pop(name)) not in (None, [])}
        command(given=given, **arguments)

    signature = inspect.Signature([*own, *options])
    with_settings.__signature__ = signature  # type: ignore[attr-defined]
    with_settings.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return with_settings


def _option(name: str, hint: Any) -> inspect.Parameter:
    field = FIELDS[name]
    many = field.default == () and isinstance(field.default, tuple)
    kind = list[str] | None if many else hint | None
    text = field.metadata["help"]
    if field.default not in (None, ()):
        text += f" [default: {field.default}]"
    option = typer.Option(
        "--" + name.replace("_", "-"),
        help=text,
        rich_help_panel=field.metadata["group"],
        metavar=field.metadata["metavar"] or None,
        show_default=False,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def as_arguments(given: dict[str, Any]) -> list[str]:
    """Return settings as they would be typed."""
    arguments = []
    for name, value in given.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            arguments += ["--" + name.replace("_", "-"), str(one)]
    return arguments
