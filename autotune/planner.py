"""Ties the rooms together: hardware + workload -> Plan. Decides by the pure rooms, measures by `explore`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Literal, NoReturn

from autotune.account import DRIFT, GIB, check_host, measured_account, state_bytes
from autotune.alternatives import CHECKPOINTING, advise, checkpointed, size_rows, what_would_fit
from autotune.batching import largest_share
from autotune.errors import ConfigurationError, NothingFitsError
from autotune.evidence import Evidence, alike
from autotune.explore import Exploration, Measuring, Timing, Trials
from autotune.forecast import forecast_run, longest
from autotune.inputs import PlanInputs
from autotune.plan import (
    SCHEMA,
    Alternative,
    Batching,
    EvidenceSummary,
    Forecast,
    Layout,
    LimitedBy,
    Plan,
    SizeRow,
    Speed,
    Trial,
    Workload,
)
from autotune.process import WorkerCrashedError
from autotune.search import EXPLORED, is_safe, is_within
from autotune.shapes import expect
from autotune.speed import beats, compile_seconds, fastest, measure_speed, seconds_per_sample

FASTER = 1.05
"""A smaller micro-batch, or another layout, is taken when it was faster by this factor in each of its repeats."""
LAYOUTS: tuple[Layout, ...] = ("packed", "sorted", "fixed")
"""Each is exact for all models that the one before it is."""
LONG_SECONDS = 900.0
"""A shorter run is not worth a trial of compiled layers, which takes one to three minutes."""
REPAYS = 2.0
"""Compiling is taken where it is forecast to save a run so many times what it costs."""
RECOMPUTING = 1 / 3
"""Checkpointing runs each forward again: a third of what forward and backward take (Chen et al. 2016, 1604.06174)."""


class Planner:
    """Makes one plan: iterate `make` for the trials as they end, then read `plan` and `evidence`."""

    def __init__(self, inputs: PlanInputs, measuring: Measuring, known: Evidence | None = None) -> None:
        self._inputs, self._hardware, self._request = inputs, inputs.hardware, inputs.request
        self._measuring = measuring
        self.budget = inputs.budget
        self._known = known
        self._explorations = [self._explore(inputs.workload)]
        self._alternatives: list[Alternative] = []
        self.plan: Plan | None = None

    @property
    def evidence(self) -> Evidence:
        """What the plan rests on: replayed, it gives the same plan."""
        explored = [exploration.explored for exploration in self._explorations]
        # What this plan had no use for, another of the same may.
        known = self._known.explored if self._known else ()
        unused = [old for old in known if not any(alike(old.workload, new.workload) for new in explored)]
        return Evidence(hardware=self._hardware, request=self._request, explored=(*explored, *unused))

    def make(self) -> Trials:
        """Yield each trial as it ends; raises NothingFitsError, with the changes that would fit."""
        chosen, rows, limited_by = yield from self._decide()
        if self._kind == "cached" and not self._request.offline and not (yield from self._still_holds(chosen, rows)):
            self._forget()
            chosen, rows, limited_by = yield from self._decide()
        self.plan = self._write(chosen, rows, limited_by)

    def _decide(self) -> Generator[Trial, None, tuple[Exploration, int, LimitedBy]]:
        plain, fixed = self._explorations[0], self._request.micro_batch_size
        if fixed is not None:
            chosen = yield from self._fix(plain, fixed)
            chosen = yield from self._choose_layout(chosen, fixed)
            chosen = yield from self._choose_compile(chosen, fixed, "user")
            return chosen, fixed, "user"
        yield from plain.search()
        chosen = plain
        too_slow = plain.largest == 0 and any(t.outcome == "timed_out" for t in plain.trials)
        takes_all = plain.largest >= plain.sizes[-1]
        if self._request.checkpointing == "auto" and not takes_all and not too_slow:
            chosen = yield from self._weigh_checkpointing(plain)
        if chosen.largest == 0:
            self._explain_nothing_fits(chosen)
        chosen = yield from self._choose_layout(chosen, chosen.largest)
        rows, limited_by = yield from self._choose_size(chosen)
        chosen = yield from self._choose_compile(chosen, rows, limited_by)
        return chosen, rows, limited_by

    @property
    def _kind(self) -> Literal["measured", "cached"]:
        """Whether anything had to be tried for this plan."""
        return "measured" if any(e.tried[e.remembered :] for e in self._explorations) else "cached"

    def _still_holds(self, exploration: Exploration, rows: int) -> Generator[Trial, None, bool]:
        """Take the chosen size once more, shortly: what was remembered is of another day."""
        trial = exploration.check(rows)
        yield trial
        return is_within(trial, round(EXPLORED * exploration.budget_bytes))

    def _forget(self) -> None:
        self._known, self._alternatives = None, []
        self._explorations = [self._explore(self._inputs.workload)]

    def _explore(self, workload: Workload) -> Exploration:
        data, request = self._inputs.data, self._request
        timing = None
        if data is not None:
            smaller = request.prefer == "auto" and request.micro_batch_size is None
            # Of what was chosen, and verified after, no other is timed again.
            asked = self._inputs.workload
            compiled = workload.compile != asked.compile
            smaller = smaller and not compiled
            chosen = request.layout == "given" or workload.layout != asked.layout or compiled
            others = () if chosen else LAYOUTS[LAYOUTS.index(workload.layout) + 1 :]
            share = largest_share(self._inputs.samples, self._hardware.world_size)
            recipe = self._inputs.recipe
            answers = max(recipe.bleu_rows if self._inputs.validation else 0, recipe.samples, len(recipe.prompts))
            answered = ((self._inputs.validation or data).store, answers) if answers else None
            timing = Timing(data.store, recipe.seed, share, smaller, others, answered)
        exploration = Exploration(
            workload=workload,
            hardware=self._hardware,
            limit_bytes=self.budget.limit_bytes,
            budget_bytes=round(self.budget.budget_bytes / (1 + DRIFT[self._hardware.device])),
            sizes=self._inputs.sizes,
            backend=self._request.backend,
            timing=timing,
            measuring=self._measuring,
        )
        for explored in self._known.explored if self._known else ():
            if alike(explored.workload, workload):
                exploration.remember(explored)
        return exploration

    def _fix(self, plain: Exploration, rows: int) -> Generator[Trial, None, Exploration]:
        """Try the size that the user gave, with gradient checkpointing where it does not fit without."""
        yield from plain.fix(rows)
        if self._request.checkpointing == "auto" and not is_safe(plain.tried[-1], plain.budget_bytes):
            other = self._explore(checkpointed(plain.workload))
            yield from other.fix(rows)
            if is_safe(other.tried[-1], other.budget_bytes):
                self._explorations.append(other)
                return other
        self._check_fixed(plain.tried[-1])
        return plain

    def _weigh_checkpointing(self, plain: Exploration) -> Generator[Trial, None, Exploration]:
        """Take gradient checkpointing where nothing fits without it, or where fewer micro-batches make it faster."""
        other = self._explore(checkpointed(plain.workload))
        self._explorations.append(other)
        other.trace()
        if plain.largest == 0:
            yield from other.search()
            return other if other.largest else plain
        rows = other.predicted_largest
        if rows <= plain.largest:
            return plain
        speed, recomputed = self._speed(plain, plain.largest), None
        if speed is not None and self._could_be_faster(speed, plain.largest, rows):
            yield from other.search()
            rows = other.largest
            recomputed = self._speed(other, rows) if rows > plain.largest else None
        self._alternatives = [
            self._alternative("--gradient-checkpointing off", plain, plain.largest, speed),
            self._alternative("--gradient-checkpointing on", other, rows, recomputed),
        ]
        if recomputed is not None and beats(other.trial_of(rows), plain.trial_of(plain.largest), FASTER):
            return other
        return plain

    def _could_be_faster(self, speed: Speed, rows: int, recomputed_rows: int) -> bool:
        """Say whether what fewer micro-batches save may outweigh the second forward."""
        before, after = (
            self._inputs.reach(r, r, "memory").gradient_accumulation_steps for r in (rows, recomputed_rows)
        )
        micro_batches = speed.seconds_per_step - speed.update_seconds
        saved = (before - after) * speed.alpha_seconds
        return saved > RECOMPUTING * (micro_batches - before * speed.alpha_seconds)

    def _alternative(self, change: str, exploration: Exploration, rows: int, speed: Speed | None) -> Alternative:
        measured = exploration.has_verified(rows)
        model = exploration.model
        assert model is not None
        return Alternative(
            change=change,
            largest_micro_batch_size=rows,
            gradient_accumulation_steps=self._inputs.reach(rows, rows, "memory").gradient_accumulation_steps,
            peak_bytes=(exploration.trial_of(rows).peak_bytes or 0) if measured else model.peak_bytes(rows),
            seconds_per_step=speed.seconds_per_step if speed else None,
            measured=measured,
        )

    def _choose_layout(self, exploration: Exploration, rows: int) -> Generator[Trial, None, Exploration]:
        """Take another layout where it was faster on real samples, or where the workload's own is not exact.

        Raises ConfigurationError where that one was asked for.
        """
        trial, own = exploration.trial_of(rows), exploration.workload.layout
        inexact = own in trial.inexact
        if inexact and self._request.layout == "given":
            raise ConfigurationError(
                f"{own} rows change the gradient of {exploration.workload.model}", "leave --layout out, or give another"
            )
        timed = [t for t in trial.timed if t.rows == rows]
        better = fastest(timed, FASTER)
        safer = [*(t.layout for t in timed), *LAYOUTS[LAYOUTS.index(own) + 1 :], own]
        layout = better.layout if better else safer[0] if inexact else own
        if layout == own:
            return exploration
        other = self._explore(exploration.workload.model_copy(update={"layout": layout}))
        self._explorations.append(other)
        other.trace()
        if not other.has_verified(rows):
            yield from other.try_size(rows)
        if self._request.micro_batch_size is None:
            yield from other.search()
        return other if inexact or other.largest >= rows else exploration

    def _choose_size(self, exploration: Exploration) -> Generator[Trial, None, tuple[int, LimitedBy]]:
        """Take the largest safe size, or a smaller one where it was faster on real samples."""
        rows, layout = exploration.largest, exploration.workload.layout
        if self._request.prefer == "auto":
            timed = [t for t in exploration.trial_of(rows).timed if t.layout == layout]
            found = fastest(timed, FASTER)
            if found is not None:
                faster = found.rows
                if not exploration.has_verified(faster):
                    yield from exploration.try_size(faster)
                if any(
                    t.micro_batch_size == faster and is_safe(t, exploration.budget_bytes) for t in exploration.trials
                ):
                    return faster, "speed"
        return rows, self._inputs.limited_by(rows)

    def _choose_compile(
        self, exploration: Exploration, rows: int, limited_by: LimitedBy
    ) -> Generator[Trial, None, Exploration]:
        """Take compiled layers where what they save of this run, as measured, repays making them.

        On a processor only where memory is ample: the compiler takes some too, while a step holds its own.
        """
        plain = self._write(exploration, rows, limited_by)
        tight = self._hardware.device == "cpu" and exploration.workload.cpu_allocator == "tight"
        if self._request.compile == "given" or tight or not plain.forecast:
            return exploration
        if plain.forecast.total_seconds < LONG_SECONDS:
            return exploration
        other = self._explore(exploration.workload.model_copy(update={"compile": "on"}))
        other.report = exploration.report  # it computes the same
        self._explorations.append(other)
        if not other.has_verified(rows) and not self._is_known_to_fail(other.workload):
            # A compiler may be there and not compile this, or what it makes may crash: then there is no trial.
            with suppress(ConfigurationError, WorkerCrashedError):
                yield from other.try_size(rows)
        if other.largest < rows:
            return exploration
        compiled = self._write(other, rows, limited_by)
        assert compiled.forecast is not None
        self._alternatives += [
            self._alternative(f"--compile {plan.workload.compile}", e, rows, plan.speed)
            for e, plan in ((exploration, plain), (other, compiled))
        ]
        saved = plain.forecast.total_seconds - compiled.forecast.total_seconds
        return other if saved > REPAYS * compile_seconds(other.trial_of(rows)) else exploration

    def _is_known_to_fail(self, workload: Workload) -> bool:
        known = self._known.explored if self._known else ()
        return any(alike(e.workload, workload) and not any(t.completed for t in e.trials) for e in known)

    @property
    def _budget_words(self) -> str:
        drift = DRIFT[self._hardware.device]
        return str(self.budget) + (f" and {drift:.0%} for what many steps hold beyond a few" if drift else "")

    def _check_fixed(self, trial: Trial) -> None:
        if is_safe(trial, self._explorations[0].budget_bytes):
            return
        needs = f"needs {trial.peak_bytes / GIB:.2f} GiB" if trial.peak_bytes else f"did not fit ({trial.message})"
        tokens = self._explorations[0].workload.tokens_per_row
        raise NothingFitsError(
            f"a batch of {trial.micro_batch_size} rows of {tokens} tokens {needs}; {self._budget_words}",
            "leave --batch-size-per-gpu out and give --auto: the effective batch stays the same",
        )

    def _explain_nothing_fits(self, exploration: Exploration) -> NoReturn:
        """Raise NothingFitsError with what one row needs, and the changes that would fit by their trace."""
        first, workload = min(exploration.trials, key=lambda t: t.micro_batch_size), exploration.workload
        row = f"one row of {workload.tokens_per_row} tokens"
        if first.outcome == "timed_out":
            raise NothingFitsError(f"{row} is too slow for this machine: {first.message}", "take a smaller model")
        needs = f"{row} needs {first.peak_bytes / GIB:.2f} GiB" if first.peak_bytes else f"{row} does not fit"
        raise NothingFitsError(
            f"{needs}; {self._budget_words}, and the weights, gradients and optimizer state alone take "
            f"{state_bytes(workload) / GIB:.2f} GiB",
            advise(
                [
                    other
                    for other in what_would_fit(
                        self._measuring.trace_sizes,
                        workload,
                        self._hardware,
                        exploration.budget_bytes,
                        exploration.sizes,
                    )
                    if len(self._explorations) == 1 or other.change != CHECKPOINTING  # which was tried, and did not fit
                ]
            ),
        )

    def _speed(self, exploration: Exploration, rows: int) -> Speed | None:
        return measure_speed(exploration.trial_of(rows), exploration.workload, self._inputs.reach(rows, rows, "memory"))

    def _write(self, exploration: Exploration, rows: int, limited_by: LimitedBy) -> Plan:
        trial = exploration.trial_of(rows)
        check_host(self._hardware, exploration.workload, trial)
        batching = self._inputs.reach(rows, max(rows, exploration.largest), limited_by)
        batching = expect(batching, self._inputs.data, exploration.workload)
        speed = measure_speed(trial, exploration.workload, batching)
        tried = [t for e in self._explorations for t in e.tried]
        return Plan(
            schema_name=SCHEMA,
            workload=exploration.workload,
            hardware=self._hardware,
            batching=batching,
            memory=measured_account(self.budget, self._hardware, exploration.workload, exploration.report, trial),
            speed=speed,
            forecast=self._forecast(exploration, batching, speed),
            alternatives=tuple(self._alternatives),
            sizes=self._sizes(exploration, rows, speed),
            evidence=summarise(tried, self._kind, exploration.tried),
        )

    def _sizes(self, exploration: Exploration, rows: int, speed: Speed | None) -> tuple[SizeRow, ...]:
        trials, model = exploration.trials, exploration.model
        assert model is not None
        trial, layout = exploration.trial_of(exploration.largest or rows), exploration.workload.layout
        timed = [t for t in trial.timed if t.layout == layout]
        return size_rows(
            model.peak_bytes,
            max(rows, exploration.largest),
            rows,
            exploration.sizes,
            {t.micro_batch_size: t.peak_bytes for t in trials if t.verified and t.peak_bytes},
            lambda size: seconds_per_sample(size, timed, speed, exploration.workload.tokens_per_row),
        )

    def _forecast(self, exploration: Exploration, batching: Batching, speed: Speed | None) -> Forecast | None:
        if speed is None:
            return None
        rows, layout = batching.micro_batch_size, exploration.workload.layout
        timed = [t for tried in exploration.trials for t in tried.timed if (t.rows, t.layout) == (rows, layout)]
        answering = next((t.answering for t in reversed(exploration.trials) if t.answering), None)
        return forecast_run(
            self._inputs.course, exploration.workload, batching, speed, longest(timed), answering, measured=True
        )


def summarise(
    tried: Sequence[Trial], kind: Literal["measured", "estimated", "cached"], shown: Sequence[Trial] = ()
) -> EvidenceSummary:
    """Count what was tried, and show the trials of the workload that was chosen."""
    return EvidenceSummary(
        kind=kind,
        dry_steps=sum(len(t.timings) for t in tried),
        timing_steps=sum(len(timed.seconds) for t in tried for timed in t.timed),
        trials=tuple(shown),
        out_of_memory_count=sum(t.outcome in ("out_of_memory", "killed") for t in tried),
        seconds=sum(t.seconds for t in tried),
    )
