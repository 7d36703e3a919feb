"""What if: the plan with one thing changed, and profiles side by side. From settings to tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.errands import DataSummary, Preprocessed
from autotune.errors import ConfigurationError
from autotune.hardware import imagine_hardware
from autotune.inputs import PlanInputs
from autotune.levers import with_length, with_rows
from autotune.plan import Hardware
from cli.wiring import make_inputs, make_recipe, make_request
from profiles import FIELDS, Resolved, Settings, did_you_mean, resolve

COMPARED = ("small", "fast", "standard")
"""The profiles that people know from the tables of ChatLM-mini-Chinese."""
LENGTHS = ("max_seq_len", "max_target_len")
LEVERS = (
    "rows",
    "gpus",
    "max_seq_len",
    "max_target_len",
    "effective_batch_size",
    "batch_size_per_gpu",
    "epochs",
    "precision",
    "gradient_checkpointing",
    "layout",
    "loss_head",
    "memory_limit",
    "headroom",
)
"""What can be varied; `rows` are those of the data, `gpus` needs --gpu."""


def parse_lever(text: str) -> tuple[str, list[str]]:
    """Read NAME=VALUE,VALUE; raises ConfigurationError for what is no lever."""
    match = re.fullmatch(r"(?:--)?([a-z][a-z_-]*)=(.+)", text)
    if match is None:
        raise ConfigurationError(f"{text!r} varies nothing", "write it like max-seq-len=192,256,512")
    name = match[1].replace("-", "_")
    if name not in LEVERS:
        known = [lever.replace("_", "-") for lever in LEVERS]
        raise ConfigurationError(f"{match[1]!r} cannot be varied", did_you_mean(match[1], known))
    return name, match[2].split(",")


def check_levers(
    levers: Sequence[tuple[str, Sequence[str]]],
    given: Mapping[str, Any],
    profile: str | None,
    config: str | None,
    gpu: str | None,
) -> None:
    """Raise ConfigurationError for a value that cannot be, before any data is read."""
    for name, values in levers:
        if name == "gpus" and gpu is None:
            raise ConfigurationError("gpus can be varied only for a card that is named", "give --gpu CARD")
        for value in values:
            read = _read(name, value)
            if name in FIELDS:
                resolve({**given, name: read}, config, profile)


@dataclass(frozen=True)
class Stage:
    """Where scenes are set: what was asked, on which data and hardware."""

    given: Mapping[str, Any]
    profile: str | None
    config: str | None
    hardware: Hardware
    facts: Preprocessed
    gpu: str | None
    """Name of the card, where it is not here."""

    def levers(self, levers: Sequence[tuple[str, Sequence[str]]]) -> dict[str, PlanInputs]:
        """Set a scene for what was asked, and one for each value of each lever."""
        scenes = {"as asked": self._scene(self._resolved({}), search=True)}
        for name, values in levers:
            for value in values:
                scenes[f"{name.replace('_', '-')} {value}"] = self._changed(name, value)
        return scenes

    def profiles(self) -> dict[str, PlanInputs]:
        """Set a scene for each profile with its own batch, and one that searches."""
        names = dict.fromkeys([*COMPARED, *([self.profile] if self.profile else [])])
        as_asked = self._scene(self._resolved({}), search=True)
        scenes = {}
        for name in names:  # its batch and its epochs: model, data and lengths are those that were asked for
            theirs = resolve(self.given, self.config, name)
            request = make_request(theirs, self.hardware.world_size, search=False)
            recipe = make_recipe(theirs.settings, as_asked.workload.stage)
            scenes[name] = as_asked._replace(request=request, course=as_asked.course._replace(recipe=recipe))
        return scenes | {"auto": as_asked}

    def _resolved(self, changes: Mapping[str, Any]) -> Resolved:
        return resolve({**self.given, **changes}, self.config, self.profile)

    def _changed(self, name: str, value: str) -> PlanInputs:
        if name == "rows":
            scene = self._scene(self._resolved({}), search=True)
            if scene.data is None:
                raise ConfigurationError("rows can be varied only where there are some", "give --data")
            return scene._replace(course=scene.course._replace(data=with_rows(scene.data, _whole(name, value))))
        if name == "gpus" and self.gpu is not None:
            hardware = imagine_hardware(self.gpu, _whole(name, value), Path())
            return self._scene(self._resolved({}), search=True, hardware=hardware)
        return self._scene(self._resolved({name: _read(name, value)}), search=True)

    def _scene(self, resolved: Resolved, *, search: bool, hardware: Hardware | None = None) -> PlanInputs:
        settings, hardware = resolved.settings, hardware or self.hardware
        target = settings.max_target_len or settings.max_seq_len
        facts = self.facts.model_copy(
            update={
                "data": _cut(self.facts.data, settings.max_seq_len, target),
                "validation": _cut(self.facts.validation, settings.max_seq_len, target),
            }
        )
        return make_inputs(resolved, facts, hardware, make_request(resolved, hardware.world_size, search=search))


def _cut(data: DataSummary | None, source: int, target: int) -> DataSummary | None:
    return with_length(data, source, target) if data else None


def _read(name: str, value: str) -> int | str:
    """Return what is counted as a number, all else as it is: it is read with the settings."""
    return _whole(name, value) if name not in FIELDS or "int" in str(FIELDS[name].type) else value


def _whole(name: str, value: str) -> int:
    try:
        number = int(value.replace("_", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigurationError(f"{name.replace('_', '-')} = {value!r} is no whole number above 0")
    return number


def longest_asked(settings: Settings, levers: Sequence[tuple[str, Sequence[str]]]) -> Settings:
    """Return settings with the longest limits asked for and varied: data is read so, and cut for each scene."""
    values = {name: [_whole(name, v) for lever, all_ in levers if lever == name for v in all_] for name in LENGTHS}
    source = max([settings.max_seq_len, *values["max_seq_len"]])
    target = max([settings.max_target_len or source, *values["max_target_len"]])
    return replace(settings, max_seq_len=source, max_target_len=target)
