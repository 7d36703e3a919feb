"""The command: gathers, judges, prints, and bundles what an issue needs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import typer

from autotune.errors import ConfigurationError, RunExistsError
from cli.doctor.bundle import write_bundle
from cli.doctor.facts import SCHEMA, Facts, Finding
from cli.doctor.findings import find
from cli.doctor.gather import gather, read_private
from cli.history import find_runs
from cli.masking import Private, mask_data, mask_text
from cli.render.console import out, print_json, say
from cli.render.doctor import print_report

CHECK_FAILED = 1


def doctor_command(run: str | None, bundle: str | None, *, as_json: bool) -> None:
    """Say what this machine is and what is wrong with it; leaves with 1 where something is."""
    folder = _check(run, bundle)
    say("looking at this machine and measuring it, which takes a few seconds")
    facts, private = gather(), read_private()
    findings = find(facts)
    report = as_data(facts, findings, private)
    if as_json:
        print_json(report)
    else:
        print_report(facts, findings, partial(as_shown, private=private))
    if bundle is not None:
        names = write_bundle(Path(bundle), report + "\n", folder, private)
        say(f"{bundle}: {', '.join(names)}; secrets are masked, look at it before you attach it")
    if any(finding.severity == "problem" for finding in findings):
        raise typer.Exit(CHECK_FAILED)


def as_shown(text: str, private: Private) -> str:
    """Return a text masked, and as the terminal can show it: a folder's name may have letters that it lacks."""
    return mask_text(text, private).encode(out.encoding, "backslashreplace").decode(out.encoding)


def as_data(facts: Facts, findings: tuple[Finding, ...], private: Private) -> str:
    """Return all of it as JSON, masked."""
    told: dict[str, Any] = {"schema": SCHEMA, **facts.model_dump(mode="json")}
    told["findings"] = [finding.model_dump(mode="json") for finding in findings]
    return json.dumps(mask_data(told, private), indent=2)


def _check(run: str | None, bundle: str | None) -> Path | None:
    """Return the folder of the run that is bundled; raises for names that cannot be, before anything is measured."""
    if run is not None and bundle is None:
        raise ConfigurationError("a run is named for what a bundle has of it", f"chatlm doctor --bundle FILE.zip {run}")
    if bundle is not None:
        _check_file(Path(bundle))
    return find_runs([run])[0] if run is not None else None


def _check_file(file: Path) -> None:
    if file.suffix != ".zip":
        raise ConfigurationError(f"{file}: a bundle is a zip", "give it a name that ends in .zip")
    if file.exists():
        raise RunExistsError(f"{file} is there already", "give --bundle a new file")
    if not file.absolute().parent.is_dir():
        raise ConfigurationError(f"{file}: no such folder", "give --bundle a file in one that is there")
