"""Our planner, as a finder among others: plans, then trains that plan. Run by `peers.py`.

python ours.py ERRAND     the errand is JSON: see `peers.prepare`

Like chatlm itself it loads no torch: the workers that it starts do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from reports import Reports

from autotune.errands import Recipe, Saving, TokenIds, Train
from autotune.hardware import read_hardware
from autotune.inputs import Course, PlanInputs
from autotune.measure import Workers
from autotune.plan import Request, Workload
from autotune.planner import Planner
from autotune.process import Worker

SAVING = Saving(every_steps=None, every_seconds=None, each_epoch=False, keep_last=2)


def main() -> None:
    report, errand = Reports(), json.loads(sys.argv[1])
    recipe = Recipe(
        epochs=1, max_steps=errand["steps"], learning_rate=1e-4, schedule="constant", warmup=0, div_factor=25,
        weight_decay=0.01, clip=1.0, seed=42, samples=0, bleu_rows=0, prompts=(), eval_every=None, early_stopping=None,
    )  # fmt: skip
    request = Request(
        effective_batch_size=errand["effective_batch_size"], micro_batch_size=None, prefer="largest",
        checkpointing="given", layout="given", compile="given", memory_limit_bytes=None, headroom=None, backend=None,
        offline=False,
    )  # fmt: skip
    workload = Workload.model_validate(errand["workload"])
    with Workers() as workers:
        planner = Planner(
            PlanInputs(workload, read_hardware(Path()), request, Course(recipe, SAVING, None, None)), workers
        )
        for trial in planner.make():
            report("forward", trial.micro_batch_size)
            for _ in trial.timings:
                report("step")
            if trial.outcome == "out_of_memory":
                report("out_of_memory")
    plan = planner.plan
    assert plan is not None
    report("found", plan.batching.largest_safe_micro_batch_size)

    folder = errand["folder"]
    train = Train(
        plan=plan, recipe=recipe, store=f"{folder}/store", validation_store=None, tokenizer_dir=f"{folder}/tokenizer",
        ids=TokenIds(pad=0, eos=1, bos=None), output_dir=f"{folder}/run", tensorboard=False,
        time_limit=None, longest=None, data_contents="", resume=None, backend=None, heartbeat_seconds=60,
        saving=SAVING,
    )  # fmt: skip
    with Worker(plan.hardware.cores, plan.workload.cpu_allocator) as worker:
        worker.give(train)
        for event in worker.events():
            if event["event"] == "metrics" and event["row"]["kind"] == "train":
                report("step")
                report("effective", event["row"]["samples"])
        assert worker.exit_code == 0, worker.last_words()


if __name__ == "__main__":
    main()
