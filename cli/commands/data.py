"""What `chatlm data` does: data as tokens, printed."""

from __future__ import annotations

import json
from typing import Any

from autotune.errands import DataSummary
from cli.choices import padding_by_layout
from cli.planning import (
    look_at_data,
    read_hardware_of,
)
from cli.render.console import print_json
from cli.render.data import print_data, sides
from cli.render.settings import print_config
from profiles import resolve


def data_command(
    files: list[str],
    given: dict[str, Any],
    profile: str | None,
    config: str | None,
    *,
    as_json: bool,
    show: int,
    show_config: bool,
) -> None:
    """Tokenize data, or find it tokenized, and print what it holds."""
    if files:
        given = given | {"data": [*given.get("data", []), *files]}
    resolved = resolve(given, config, profile)
    if show_config:
        print_config(resolved)
        return
    settings = resolved.settings
    facts = look_at_data(settings, read_hardware_of(settings).cores, demo=True, show=show)
    data = facts.data
    assert data is not None
    padding = padding_by_layout(settings, facts)
    if as_json:
        held_out = facts.validation and _as_data(facts.validation)
        tokens = [[token.model_dump() for token in sample] for sample in facts.shown]
        print_json(json.dumps(_as_data(data) | {"padding": padding, "validation": held_out, "shown": tokens}))
    else:
        print_data(data, facts.validation, padding, facts.shown)


def _as_data(data: DataSummary) -> dict[str, Any]:
    """Return a summary with the percentiles that people look for."""
    points = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    lengths = {
        side: {name: data.percentile(i, share) for name, share in points.items()} for i, side in enumerate(sides(data))
    }
    return data.model_dump(mode="json") | {"percentiles": lengths}
