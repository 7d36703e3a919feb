"""Commands that take a model there is: they ask a worker, since a model takes torch."""

from __future__ import annotations

import json
import tomllib
from math import inf
from pathlib import Path
from typing import Any, get_args

from autotune.disk import remove
from autotune.errands import Choosing, Errand, Evaluate, Evaluated, Export, Exported, Format, Import, Imported
from autotune.errors import ConfigurationError, MachineError, RunExistsError
from autotune.hardware import read_hardware
from autotune.measure import KILLED, SILENT_SECONDS
from autotune.plan import Precision
from autotune.process import WorkerCrashedError, ask
from cli.chat import Manner, chat, check_device
from cli.places import Found, find_saved
from cli.planning import look_at_data
from cli.render.console import print_json, say, tell, warn
from cli.render.models import print_evaluated
from cli.render.units import size
from cli.wiring import make_workload
from profiles import Settings

GIB = 2**30
SMALLER = "close other programs, or give a smaller model"
MOST_ROOM_BYTES = 2 * GIB
READING_SECONDS = 600.0
"""For a file, and for each GiB of it: what takes longer is no file of weights."""


def import_command(source: str, output: str, tokenizer: str | None, heads: int | None) -> None:
    """Have weights read, held against their model, and written; say what they were."""
    _check_new(Path(output))
    path = Path(source)
    if not path.exists():
        raise ConfigurationError(f"{source}: no such file or folder", "give a .pth or .bin file, or a model's folder")
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").exists():
        raise ConfigurationError(f"{tokenizer}: no tokenizer.json in this folder")
    errand = Import(source=source, output=output, tokenizer=tokenizer, heads=heads)
    files = (file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())
    size = sum(file.stat().st_size for file in files)
    try:
        made = Imported.model_validate(_answer(errand, READING_SECONDS * (1 + size / GIB)))
    except WorkerCrashedError as error:
        if not error.args[0].startswith("the worker was not done"):
            raise
        raise ConfigurationError(f"{source} takes longer to read than weights of its size can need") from None
    if made.assumed:
        warn(f"{source}: assumed {made.assumed}")
    if made.tokenizer is None:
        warn(f"no tokenizer was found beside {source}: give --tokenizer DIR here, or when it is trained")
    tell(f"{output}: {made.what}, {made.parameters / 1e6:,.1f} M parameters, {made.dtype}")
    if made.tokenizer is not None:
        say(f"tokenizer from {made.tokenizer}")


def export_command(place: str, output: str, form: str, precision: str | None) -> None:
    """Have a model written for another program, and say what that has to be told."""
    if form not in get_args(Format):
        raise ConfigurationError(f"--format {form} is none of {', '.join(get_args(Format))}")
    if precision is not None and precision not in get_args(Precision):
        raise ConfigurationError(f"--precision {precision} is none of {', '.join(get_args(Precision))}")
    if form == "transformers":
        _check_new(Path(output))
    elif Path(output).exists():
        raise RunExistsError(f"{output} is there already", "give --output a new file")
    elif not Path(output).absolute().parent.is_dir():
        raise ConfigurationError(f"{output}: no such folder", "give --output a file in one that is there")
    saved = find_saved(place).saved
    errand = Export.model_validate({"saved": saved, "output": output, "precision": precision, "format": form})
    made = Exported.model_validate(_answer(errand))
    tell(f"{output}: {made.precision}, {size(made.bytes)}")
    if saved.tokenizer is None:
        warn(f"{place} has no tokenizer, so none was written")
    if made.needs:
        said = ", ".join(f"{name}={value}" for name, value in made.needs.items())
        tell(f"its configuration: {said}")


def chat_command(
    place: str,
    compared: list[str],
    prompts: list[str],
    system: str | None,
    exchanges: int | None,
    choosing: Choosing,
    device: str,
    *,
    as_json: bool,
) -> None:
    """Talk with a model, or with several side by side."""
    if as_json and not prompts:
        raise ConfigurationError("--json is for answers to --prompt", "give --prompt TEXT")
    hardware = read_hardware(Path())
    found = [find_saved(name) for name in (place, *compared)]
    there = check_device(device, hardware.device)
    chat(found, there, hardware.cores, Manner(choosing, system, exchanges), prompts, as_json=as_json)


def evaluate_command(places: list[str], given: dict[str, Any], answers: int, *, as_json: bool) -> None:
    """Say what models are worth on a file, one by one; as a table where there are several."""
    if not given.get("data"):
        raise ConfigurationError("on what is to be evaluated?", "give --data FILE")
    scored: dict[str, Evaluated] = {}
    alike: set[tuple[object, ...]] = set()
    for found in map(find_saved, places):
        settings = _settings_of(found, given)
        hardware = read_hardware(Path())
        facts = look_at_data(settings, hardware.cores, demo=False)
        assert facts.data is not None
        assert facts.ids is not None
        assert facts.tokenizer_dir is not None
        alike.add((facts.tokenizer_fingerprint, facts.data.stage, settings.max_seq_len, settings.max_target_len))
        free = hardware.host_memory_available_bytes
        if hardware.device == "cuda":
            free = min(free, hardware.device_memory_free_bytes)
        errand = Evaluate(
            saved=found.saved,
            workload=make_workload(settings, facts, hardware),
            device=hardware.device,
            store=facts.data.store,
            tokenizer_dir=facts.tokenizer_dir,
            ids=facts.ids,
            answers=answers,
            room_bytes=min(MOST_ROOM_BYTES, free // 4),
        )
        scored[found.saved.place] = Evaluated.model_validate(_answer(errand))
    if len(alike) > 1:
        warn(
            "the models do not predict the same tokens: their tokenizers, their stages, or the lengths that rows are "
            "cut at differ, and so losses, perplexities and accuracies do not compare"
        )
    if as_json:
        print_json(json.dumps({name: made.model_dump() for name, made in scored.items()}, indent=2))
    else:
        print_evaluated(scored)


def _settings_of(found: Found, given: dict[str, Any]) -> Settings:
    """Return the settings of an evaluation: what was typed, else what the run was trained with."""
    told: dict[str, Any] = {}
    if found.run is not None and (found.run / "config.toml").exists():
        with (found.run / "config.toml").open("rb") as file:
            told = tomllib.load(file)
    if found.saved.tokenizer is None:
        raise ConfigurationError(
            f"{found.saved.place}: its tokenizer is not there any more",
            "put its tokenizer.json into the model's folder",
        )
    kept = {name: told[name] for name in ("max_seq_len", "max_target_len", "precision", "stage") if name in told}
    # No layout needs proof that pads, and the losses of all are the same.
    values: dict[str, Any] = (
        kept | given | {"layout": "sorted"} | {"model": found.saved.model, "tokenizer": found.saved.tokenizer}
    )
    return Settings(**values)


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunExistsError(f"{folder} is there already", "give --output a new folder")


def _answer(errand: Errand, most_seconds: float = inf) -> Any:
    """Have a worker do an errand, tell what it says, and return its result."""
    answer = None
    try:
        for event in ask(errand, read_hardware(Path()).cores, SILENT_SECONDS, most_seconds):
            if event["event"] == "note":
                say(str(event.get("message")))
            elif event["event"] == "result":
                answer = event.get("result")
            elif event["event"] == "out_of_memory":
                raise MachineError(f"memory ran out: {event.get('message')}", SMALLER)
    except WorkerCrashedError as error:
        if f"exit code {KILLED}:" in str(error):
            raise MachineError("its process was killed, as it is where memory runs out", SMALLER) from None
        raise
    finally:
        if isinstance(errand, Import | Export):  # what a worker that was ended has left
            folder = Path(errand.output).absolute()
            remove(folder.with_name(f".{folder.name}.partial"))
    return answer
