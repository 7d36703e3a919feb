"""A checkpoint is there whole or not at all; what was not written as it stands there is named and not used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import facts
import pytest
import torch
from tiny_models import build, workload

from autotune.errors import ConfigurationError, MachineError
from trainer import checkpoint, manifest
from trainer.checkpoint import restore, save
from trainer.manifest import DamagedError, Identity, Origin, find, verify
from trainer.progress import Best, Progress, Watch
from trainer.step import TrainState, start

IDENTITY = Identity(
    data="d1", samples=9, tokenizer="t1", effective_batch_size=8, seed=42, optimizer="adamw", frozen=()
)  # fmt: skip
ORIGIN = Origin(IDENTITY, facts.recipe(), facts.plan())
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def new_state(family: str = "llama", optimizer: str = "adamw", seed: int = 0) -> TrainState:
    """A state of which every number is some random one."""
    state = start(build(family), workload(family, optimizer=optimizer), 0.1)
    generator = torch.Generator().manual_seed(seed)
    for p in state.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    state.optimizer.grad_scale, state.optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore[attr-defined]
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
    state.optimizer.step()
    state.loss_scale.fill_(1024.0 * 2**seed)
    state.steps_since_overflow.fill_(seed)
    return state


def tensors(state: TrainState) -> dict[str, Any]:
    names = {p: name for name, p in state.model.named_parameters()}
    moments = {f"{key} {names[p]}": value for p, kept in state.optimizer.state.items() for key, value in kept.items()}
    own = {"scale": state.loss_scale, "since": state.steps_since_overflow}
    return dict(state.model.state_dict()) | moments | own


def saved(folder: Path, *steps: int, best: int | None = None, keep_last: int = 9) -> list[str]:
    for step in steps:
        progress = Progress(step=step, best=Best(step=best, loss=1.0))
        save(folder / "checkpoints", new_state(seed=step), progress, ORIGIN, keep_last)
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_what_is_restored_is_what_was_saved_to_the_bit(family: str, optimizer: str, tmp_path: Path) -> None:
    before, after = new_state(family, optimizer, seed=1), new_state(family, optimizer, seed=2)
    kept = Progress(7, 55, 6, 12.5, 1 / 3, Best(4, 1.25, 2), Watch([0.1, 1 / 3], [2.0, 1e-17], 1))
    folder = save(tmp_path / "checkpoints", before, kept, ORIGIN, 3)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    found = find(tmp_path)
    assert found is not None
    assert not all(torch.equal(value, tensors(after)[name]) for name, value in tensors(before).items())
    assert restore(found, after) == kept
    for name, value in tensors(before).items():
        assert torch.equal(value, tensors(after)[name]), name


def test_a_run_without_a_finite_loss_so_far_is_kept_as_json(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", new_state(), Progress(best=Best(without=3)), ORIGIN, 3)
    state = json.loads((folder / "state.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert state["progress"]["best"] == {"step": None, "loss": None, "without": 3}


def flipped(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at // 8] ^= 1 << at % 8
    file.write_bytes(content)


def damages(folder: Path, other: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways in which each file may not be what was written, by the name that has to be told."""
    for name in FILES:
        file = folder / name
        bits = file.stat().st_size * 8
        for at in {0, 7, 100, bits // 2, bits - 9, *range(0, bits, bits // 9)}:
            yield name, lambda file=file, at=at: flipped(file, at)  # type: ignore[misc]
        for size in (0, 1, file.stat().st_size - 1):
            yield name, lambda file=file, size=size: os.truncate(file, size)  # type: ignore[misc]
        yield name, file.unlink
        if name != "manifest.json":
            yield name, lambda name=name: shutil.copy(other / name, folder / name)  # type: ignore[misc]
    yield "manifest.json", lambda: shutil.copy(other / "manifest.json", folder / "manifest.json")


def test_whatever_is_damaged_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10)
    newest, older = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (10, 5))
    kept = tmp_path / "kept"
    shutil.copytree(newest, kept)
    count = len(list(damages(newest, older)))
    for i in range(count):
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
        name, damage = list(damages(newest, older))[i]
        damage()
        found = find(tmp_path)
        assert found is not None
        assert found.folder == older, f"{name}: damage {i} was not seen"
        (told,) = found.damaged
        assert told.startswith("step-00000010: ")
        assert name in told or "under another name" in told
    assert count > 60


def test_where_none_is_whole_nothing_is_begun_over_it(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    saved(tmp_path, 5)
    (tmp_path / "checkpoints" / "step-00000005" / "state.json").unlink()
    with pytest.raises(
        MachineError, match=r"no checkpoint is whole: step-00000005: state.json cannot be read"
    ) as error:
        find(tmp_path)
    assert error.value.exit_code == 4


def test_a_folder_that_was_left_half_written_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000005", folder / ".step-00000009.partial")
    found = find(tmp_path)
    assert found is not None
    assert (found.folder.name, found.damaged) == ("step-00000005", ())
    checkpoint.recover(folder)
    assert [p.name for p in folder.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("ending", ["partial", "removed"])
def test_one_that_a_kill_left_whole_without_its_name_has_it_again(ending: str, tmp_path: Path) -> None:
    """Between the moment when the older one of a step goes, and that when the new one takes its name."""
    saved(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000005").rename(folder / f".step-00000005.{ending}")
    assert find(tmp_path) is None
    checkpoint.recover(folder)
    found = find(tmp_path)
    assert found is not None
    assert [p.name for p in folder.iterdir()] == ["step-00000005"]


def test_the_best_of_each_that_stays_stays_too(tmp_path: Path) -> None:
    """So that a run which goes on from an older one, the newest being damaged, still has its best."""
    saved(tmp_path, 1, 2, best=1)
    assert saved(tmp_path, 3, best=3, keep_last=2) == ["step-00000001", "step-00000002", "step-00000003"]
    assert saved(tmp_path, 4, best=3, keep_last=2) == ["step-00000003", "step-00000004"]


def test_the_last_stay_and_the_best_and_never_fewer_than_two(tmp_path: Path) -> None:
    assert saved(tmp_path / "a", 1, 2, 3, 4, keep_last=3) == ["step-00000002", "step-00000003", "step-00000004"]
    assert saved(tmp_path / "b", 1, 2, 3, keep_last=1) == ["step-00000002", "step-00000003"]
    names = ["step-00000001", "step-00000003", "step-00000004"]
    assert saved(tmp_path / "c", 1, 2, 3, 4, best=1, keep_last=2) == names


def test_none_goes_while_fewer_than_two_of_those_that_stay_are_whole(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    flipped(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors", 5000)
    names = ["step-00000001", "step-00000002", "step-00000003"]
    assert saved(tmp_path, 3, keep_last=2) == names, "only the third would be left"
    assert saved(tmp_path, 4, keep_last=2) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_under_a_name_that_is_taken_takes_its_place(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    (tmp_path / "checkpoints" / "step-00000005" / "state.json").unlink()
    saved(tmp_path, 5)
    assert verify(tmp_path / "checkpoints" / "step-00000005").step == 5


def test_later_ones_are_moved_aside_not_lost(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    checkpoint.give_up_after(tmp_path / "checkpoints", 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found = find(tmp_path / "checkpoints-given-up" / "step-00000003")
    assert found is not None
    assert found.manifest.step == 3


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    found = find(tmp_path)
    assert found is not None
    manifest.check_identity(found, IDENTITY)
    for field, value in {"data": "d2", "tokenizer": None, "effective_batch_size": 9, "frozen": ("encoder",)}.items():
        with pytest.raises(ConfigurationError, match=f"another {field.replace('_', ' ')}") as error:
            manifest.check_identity(found, IDENTITY.model_copy(update={field: value}))
        assert "--resume-weights-only" in error.value.hint
    checkpoint.check_model(found.folder, build("llama"))
    with pytest.raises(ConfigurationError, match=r"of another model: \d+ of its weights differ, first"):
        checkpoint.check_model(found.folder, build("qwen3"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_leaves_what_was_there_and_says_what_it_takes(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is written; and, where the disk seems to have room, when it has not."""
    folder = small_disk / "checkpoints"
    monkeypatch.setattr(checkpoint, "SMALL_FILES_BYTES", 0)
    save(folder, new_state(), Progress(step=1), ORIGIN, 3)
    fill = small_disk / "fill"
    size = checkpoint.size_of(new_state())
    fill.write_bytes(bytes(shutil.disk_usage(small_disk).free - size // 2))
    with pytest.raises(MachineError, match=r"step-00000002 could not be saved: it takes 0 MiB, and the disk has 0 MiB"):
        save(folder, new_state(), Progress(step=2), ORIGIN, 3)
    monkeypatch.setattr(checkpoint, "_check_room", lambda *_: None)
    with pytest.raises(MachineError, match="No space left on device") as error:
        save(folder, new_state(), Progress(step=2), ORIGIN, 3)
    assert error.value.exit_code == 4
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    assert verify(folder / "step-00000001").step == 1
    fill.unlink()
    save(folder, new_state(), Progress(step=2), ORIGIN, 3)


def test_what_was_written_for_another_version_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    folder = tmp_path / "checkpoints" / "step-00000005"
    written = (folder / "manifest.json").read_bytes()
    body = written.split(b"\n", 1)[1].replace(b"chatlm.checkpoint/1", b"chatlm.checkpoint/9")
    import hashlib

    (folder / "manifest.json").write_bytes(
        b'{"checksum": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body
    )
    with pytest.raises(DamagedError, match="another version"):
        verify(folder)
