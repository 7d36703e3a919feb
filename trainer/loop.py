"""Epochs of steps, and what is measured of each: yields metrics, prints nothing. The order of samples is the seed's."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from autotune.errands import Saving, Train
from autotune.errors import MachineError, NothingFitsError, TrainingFailedError
from autotune.remaining import Pace
from trainer import checkpoint, manifest
from trainer.data import Order, TokenStore
from trainer.evaluate import Evaluator, Metrics, special_tokens
from trainer.manifest import DamagedError, Found, Origin
from trainer.memory import PeakMeter, prepare_heap
from trainer.microbatch import MicroBatch, lay_out, target_count
from trainer.model import save_model
from trainer.opening import find_resumed, identity_of, prepare
from trainer.progress import PATIENCE, Progress, place_of, seed_of, told_differences
from trainer.ranks import ALONE, MemoryRanOutError, Ranks
from trainer.schedule import steps_in
from trainer.step import FIRST_LOSS_SCALE, TrainState, accumulate, start, trained, update
from trainer.tally import Tally, utilization
from trainer.timetable import Timetable

WAITS = ("cpu",)
"""Devices that compute while they are asked to: on others a step runs on while the next is laid out."""
PLAN_AGAIN = (
    "another program has taken memory since the plan was made: close it, and go on with --resume; where the plan no "
    "longer fits then, it is made anew"
)
NOT_FINITE = "not-finite.json"
"""In the folder of a run: the samples of the step that ended it."""
TRIES = 3
"""Of a step whose memory runs out, each but the first in micro-batches of half the rows."""


def train(errand: Train, stop: Callable[[], bool], ranks: Ranks = ALONE) -> Iterator[Metrics]:
    """Train a plan to its end, or until `stop` says so, from the beginning or from where a checkpoint left it.

    Yields a `train` row for each step; for each evaluation a `sample` row for each fixed prompt, and a `validation` row
    where there is validation data; and `event` rows: where it goes on from, the start, what went wrong, each
    checkpoint, and at last how it ended. The model is saved at the end, and beside it the one with the least validation
    loss, where the two are not the same. Raises ConfigurationError for a checkpoint of another run, and
    NothingFitsError where memory runs out even for smaller micro-batches.
    """
    errand, model, store, verified = prepare(errand)
    found = find_resumed(errand, store, model, ranks)
    run = Run(errand, model, store, ranks, stop)
    del model
    if found is not None:
        yield run.restore(found)
    yield verified
    started = {"kind": "event", "event": "started", "step": run.progress.step, "samples": len(store)} | run.begin()
    run.pace.add(started)
    yield started
    counted, tally = utilization(errand.plan, run.state.model), Tally(run.progress.step)
    for row in run.rows():
        timed = tally.timed(row, counted)
        run.pace.add(timed)
        yield timed
    ended = "stopped" if run.stopped else "finished"
    yield tally.against(errand.plan, run.progress.step)
    yield {"kind": "event", "event": ended, "step": run.progress.step} | run.leave()


@dataclass
class Run:
    """A training under way: takes steps, evaluates between them, saves, undoes a step that memory has no room for."""

    errand: Train
    model: Any
    store: TokenStore
    ranks: Ranks
    stop: Callable[[], bool]
    progress: Progress = field(default_factory=Progress)
    stopped: bool = False
    unread: Metrics | None = None
    """The row of a step whose loss and norm are still on the device."""
    pace: Pace = field(default_factory=Pace)
    """What the rows so far took."""

    def __post_init__(self) -> None:
        plan, recipe = self.errand.plan, self.errand.recipe
        self.workload, self.device = plan.workload, torch.device(plan.hardware.device)
        self.meter = PeakMeter(self.device)
        self.evaluator = Evaluator(self.errand, self.store, self.model, self.meter, self.ranks, self.stop)
        self.state: TrainState = start(self.model, self.workload, recipe.weight_decay)
        self.asked_steps = steps_in(len(self.store), plan.batching.effective_batch_size, recipe)
        self.steps_per_epoch = math.ceil(len(self.store) / plan.batching.effective_batch_size)
        self.rows_at_once = plan.batching.micro_batch_size
        """Of a micro-batch: the plan's, or less where memory once ran out."""
        self.clock = SaveClock(self.errand.saving, self.steps_per_epoch)
        self.checkpoints = Path(self.errand.output_dir) / manifest.FOLDER
        self.origin = Origin(identity_of(self.errand, self.store), recipe, plan)
        limit = self.errand.time_limit
        self._began_at, self._seconds_before = limit.began_at if limit else time.time(), 0.0
        self._orders: dict[int, Order] = {}
        self._special = special_tokens(self.model, self.errand)
        del self.model  # which the state has

    def restore(self, found: Found) -> Metrics:
        """Go on from a checkpoint, or from its weights alone at the first step; say what of it was verified.

        Also says what is not as it was when it was saved: the recipe, and by that the schedule, may have changed.
        """
        assert self.errand.resume is not None
        given_up: list[Path] = []
        if self.errand.resume.weights_only:
            checkpoint.restore_weights(found.folder, self.state.model)
        else:
            self.progress = checkpoint.restore(found, self.state)
            self._seconds_before = self.progress.seconds
            if self.ranks.leads and found.folder.parent.resolve() == self.checkpoints.resolve():
                given_up = checkpoint.give_up_after(self.checkpoints, self.progress.step)
            if self.workload.precision == "fp16" and found.manifest.plan != self.origin.plan_hash:
                self.state.loss_scale.fill_(FIRST_LOSS_SCALE)  # that of another precision says nothing
        then, recipe = found.manifest, self.origin.recipe
        changed = told_differences(then.recipe.model_dump(), recipe.model_dump())
        return {
            "kind": "event",
            "event": "resumed",
            "step": self.progress.step,
            "evaluated_at": self.progress.evaluated_at,
            "checkpoint": str(found.folder),
            "weights_only": self.errand.resume.weights_only,
            "verified_bytes": sum(file.bytes for file in then.files.values()),
            "damaged": list(found.damaged),
            "given_up": [str(folder) for folder in given_up],
            "changed": [*changed, *told_differences(then.versions, checkpoint.VERSIONS)],
            "same_plan": then.plan == self.origin.plan_hash,
        }

    def rows(self) -> Iterator[Metrics]:
        """Take steps to the end; a row is read when the device has begun the next step, where it can."""
        if self._evaluation_is_due() and self.progress.evaluated_at < self.progress.step:
            yield from self._evaluate()  # which a stop broke off
            (self.stopped,) = self.ranks.any(self.stop())
            yield from self._save(last=self.stopped)
        while self.progress.step < self.timetable.total_steps and not self._is_out_of_patience() and not self.stopped:
            taken = yield from self._step()
            yield from self._read()
            self.unread = taken
            yield from self._recount()
            self.stopped, saves = self.ranks.any(self.stop(), self.clock.is_due(self.progress.step))
            evaluates = not self.stopped and self._evaluation_is_due()
            ends = self.stopped or self.progress.step == self.timetable.total_steps
            if ends or saves or evaluates or self.device.type in WAITS:
                yield from self._read()
            if evaluates:
                improved = yield from self._evaluate()
                yield from self._recount()  # which no longer has it before it
                (self.stopped,) = self.ranks.any(self.stop())
                saves, ends = saves or improved, ends or self.stopped or self._is_out_of_patience()
            if ends or saves:
                yield from self._save(last=ends)

    def _recount(self) -> Iterator[Metrics]:
        told = self.timetable.recount()
        if told is not None:
            yield told

    def _is_out_of_patience(self) -> bool:
        return self.progress.best.without >= (self.errand.recipe.early_stopping or math.inf)

    def begin(self) -> Metrics:
        """Say how many steps there are, and when evaluations and checkpoints come between them.

        Raises ConfigurationError where no time is left of what the run was given.
        """
        errand, progress, saving = self.errand, self.progress, self.errand.saving
        self.timetable = Timetable(
            self.asked_steps, progress, errand.time_limit, errand.recipe, errand.plan, self.ranks, self.pace
        )
        return {
            "schedule_done": progress.position,
            "total_steps": self.timetable.total_steps,
            "evaluates_every": self._evaluates_every,
            "saves_every": saving.every_steps or (self.steps_per_epoch if saving.each_epoch else None),
            "saves_every_seconds": saving.every_seconds,
            "saves_best": self.evaluator.validation is not None,
        }

    @property
    def _evaluates_every(self) -> int:
        """Return after how many steps an evaluation comes: those asked for, an epoch's, or without data all."""
        asked = self.errand.recipe.eval_every
        return asked or (self.steps_per_epoch if self.evaluator.validation else self.asked_steps)

    def _evaluation_is_due(self) -> bool:
        """Say whether the step that is done is followed by an evaluation; the last one is."""
        step = self.progress.step
        return step > 0 and (step % self._evaluates_every == 0 or step == self.timetable.total_steps)

    def _evaluate(self) -> Generator[Metrics, None, bool]:
        """Evaluate, in smaller micro-batches where memory runs out; return whether the model is the best so far."""
        best, improved = self.progress.best, False
        for row in self._evaluated():
            if row["kind"] == "validation":
                improved = row["best"] = best.take(self.progress.step, row["loss"])
            if row["kind"] == "validation" or row.get("event") == "sampled":
                self.progress.evaluated_at = self.progress.step
            yield row
        if self._is_out_of_patience():
            ending = {"kind": "event", "event": "early_stopping", "step": self.progress.step}
            yield ending | {"evaluations": best.without} | best.told()
        return improved

    def _evaluated(self) -> Iterator[Metrics]:
        rows = self.rows_at_once
        for _ in range(TRIES):
            try:
                yield from self.evaluator.evaluate(self.state.model, self.progress.step, rows)
            except MemoryRanOutError as error:
                message = str(error)
            else:
                return
            self._drop_gradients()
            yield self._out_of_memory("evaluation", message, rows, max(1, rows // 2))
            rows = max(1, rows // 2)
        yield from self._give_up(f"the evaluation after step {self.progress.step}, of {rows} rows too ({message})")

    def _step(self) -> Generator[Metrics, None, Metrics]:
        """Take one step of the effective batch; return its row, whose loss and norm are still on the device."""
        plan, recipe, progress = self.errand.plan, self.errand.recipe, self.progress
        epoch, place = place_of(progress.step, len(self.store), plan.batching.effective_batch_size)
        ids: Any = self._order(epoch)[place]
        rate = self.timetable.next_rate()
        prepare_heap(self.device, self.workload.cpu_allocator)
        self.meter.reset()
        began = time.perf_counter()
        targets = target_count(ids, self.store)
        batches, loss, data_seconds = yield from self._accumulate(ids, targets, began)
        norm = update(self.state, loss, self.workload, rate, recipe.clip)
        progress.step += 1
        progress.samples += len(ids)
        tokens, padded, count = self.ranks.total(
            sum(batch.tokens for batch in batches), sum(batch.padded_tokens for batch in batches), len(batches)
        )
        (peak,) = self.ranks.most(self.meter.peak_bytes())
        return {
            "kind": "train",
            "step": progress.step,
            "epoch": epoch + 1,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "samples": len(ids),
            "tokens": int(tokens),
            "target_tokens": targets,
            "padded_tokens": int(padded),
            "micro_batches": int(count),
            "data_seconds": data_seconds,
            "peak_memory_bytes": int(peak),
        }

    def _accumulate(
        self, ids: Any, targets: int, began: float
    ) -> Generator[Metrics, None, tuple[list[MicroBatch], Tensor, float]]:
        """Add up the gradient of all ranks; where memory runs out on any of them, all begin anew with fewer rows.

        Nothing has changed until then but gradients, which are dropped; random numbers are drawn again as they were.
        """

        def own() -> tuple[list[MicroBatch], Tensor, float]:
            batches = lay_out(self.ranks.share(ids), self.rows_at_once, self.store, self.workload, self._special)
            data_seconds = time.perf_counter() - began
            return batches, accumulate(self.state, batches, targets, self.workload), data_seconds

        for left in reversed(range(TRIES)):
            torch.manual_seed(seed_of(self.errand.recipe.seed, self.progress.step, self.ranks.rank))
            try:
                batches, loss, data_seconds = self.ranks.together(own)
                return batches, self.ranks.add_gradients(trained(self.state), loss), data_seconds
            except MemoryRanOutError as error:
                message = str(error)
            self._drop_gradients()
            rows, self.rows_at_once = self.rows_at_once, max(1, self.rows_at_once // 2)
            again = left > 0 and self.rows_at_once < rows
            yield self._out_of_memory("step", message, rows, self.rows_at_once if again else None)
            if not again:
                break
        where = f"step {self.progress.step + 1} with micro-batches of {rows} rows too ({message})"
        return (yield from self._give_up(where))

    def _give_up(self, where: str) -> Generator[Metrics, None, NoReturn]:
        """Save what was trained, and end: memory has run out for good."""
        yield from self._save(last=True)
        self.ranks.any(False)  # an error of another rank would end the one that saves
        raise NothingFitsError(
            f"memory ran out in {where}; what was trained until then is saved in {self.checkpoints}", PLAN_AGAIN
        )

    def _out_of_memory(self, where: str, message: str, rows: int, rows_now: int | None) -> Metrics:
        event = {"kind": "event", "event": "out_of_memory", "step": self.progress.step, "where": where}
        return event | {"message": message, "rows": rows, "rows_now": rows_now}

    def _drop_gradients(self) -> None:
        self.state.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            self._orders = {epoch: Order(len(self.store), self.errand.recipe.seed, epoch)}
        return self._orders[epoch]

    def _read(self) -> Iterator[Metrics]:
        """Read what the last step left on the device, which waits for it, and say what is odd about it."""
        if self.unread is None:
            return
        unread, self.unread = self.unread, None
        row = unread | {name: unread[name].item() for name in ("loss", "gradient_norm")}
        yield row
        watch, event = self.progress.watch, {"kind": "event", "step": row["step"]}
        finite = math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])
        # In fp16 a gradient beyond its range is how a scale is found, and no sign of anything.
        if finite or not (self.workload.precision == "fp16" and math.isfinite(row["loss"])):
            leapt = watch.look(row["loss"], row["gradient_norm"])
            if leapt:
                yield event | {"event": "spike"} | leapt
        if finite:
            return
        epoch, place = place_of(row["step"] - 1, len(self.store), self.errand.plan.batching.effective_batch_size)
        skipped = event | {"event": "skipped_step", "samples": self._order(epoch)[place].tolist()}
        yield skipped
        if watch.not_finite >= PATIENCE:
            self._fail(row["step"], skipped["samples"])

    def _fail(self, step: int, ids: Sequence[int]) -> NoReturn:
        """End the run, with the samples of the last step in a file for people to look at."""
        file = Path(self.errand.output_dir) / NOT_FINITE
        written = f"the samples of the last are in {file}"
        if self.ranks.leads:
            samples = [{"sample": i, "tokens": self.store.tokens(i).tolist()} for i in ids]
            try:
                file.write_text(json.dumps({"step": step, "samples": samples}), encoding="utf-8")
            except OSError as error:
                written = f"the samples of the last could not be written to {file}: {error.strerror}"
        self.ranks.any(False)  # an error of another rank would end the one that writes
        raise TrainingFailedError(
            f"{PATIENCE} steps in a row, up to step {step}, had a loss or a gradient that is not finite, "
            f"and changed no weight; {written}",
            "go on from the last checkpoint with a lower --learning-rate: --resume; or with --precision bf16 or fp32",
        )

    def _save(self, *, last: bool) -> Iterator[Metrics]:
        """Commit a checkpoint. One that cannot be written is an event, but for the last, without which all is lost."""
        yield from self._read()
        event = {"kind": "event", "event": "checkpoint", "step": self.progress.step}
        self.clock.saved()
        self.progress.seconds = self._seconds_before + time.time() - self._began_at
        if not self.ranks.leads:
            return
        try:
            folder = checkpoint.save(
                self.checkpoints, self.state, self.progress, self.origin, self.errand.saving.keep_last
            )
        except MachineError as error:
            if last:
                raise
            yield event | {"event": "save_failed", "message": error.message}
        else:
            yield event | {"checkpoint": str(folder), "bytes": sum(file.stat().st_size for file in folder.iterdir())}

    def leave(self) -> Metrics:
        """Save the model, and the best beside it; return what the last row says of them."""
        folder, tokenizer, best = Path(self.errand.output_dir), Path(self.errand.tokenizer_dir), self.progress.best
        model = self.state.model
        # A save serialises the weights: what only training needs goes first.
        del self.state
        told: Metrics = {"model": str(folder / "model")} | best.told()
        if not self.ranks.leads:
            return told
        save_model(model, tokenizer, folder / "model")
        if best.step is None:
            return told
        shutil.rmtree(folder / "best", ignore_errors=True)  # of an earlier stop
        if best.step == self.progress.step:
            return told | {"best_model": told["model"]}
        kept = self.checkpoints / manifest.name_of(best.step)
        try:
            manifest.verify(kept)
        except DamagedError as error:
            return told | {"best_model": None, "best_lost": f"{kept.name}: {error}"}
        checkpoint.restore_weights(kept, model)
        save_model(model, tokenizer, folder / "best")
        return told | {"best_model": str(folder / "best")}


@dataclass
class SaveClock:
    """Says when a checkpoint is due."""

    saving: Saving
    steps_per_epoch: int

    def __post_init__(self) -> None:
        self.saved()

    def saved(self) -> None:
        """Count from now on."""
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Say whether one is due after this step."""
        every, seconds = self.saving.every_steps, self.saving.every_seconds
        return (
            (every is not None and step % every == 0)
            or (self.saving.each_epoch and step % self.steps_per_epoch == 0)
            or (seconds is not None and time.monotonic() - self._last >= seconds)
        )
