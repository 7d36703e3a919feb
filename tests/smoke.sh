#!/usr/bin/env bash
# The installed command plans and trains both shapes on a machine without a GPU, and plain transformers loads the result.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export XDG_CACHE_HOME="$work/cache"
cd "$work" # so that nothing is found but what was installed

chatlm --help > /dev/null
chatlm profiles
plan_and_train() {
    local model="$1" asked=(--model "$1" --max-seq-len 64 --effective-batch-size 8)
    chatlm plan "${asked[@]}" --memory-limit 2GiB --json > "$model.json"
    chatlm plan "${asked[@]}" --memory-limit 2GiB --offline # the same, for people, from what was measured
    chatlm train --auto "${asked[@]}" --max-steps 5 --output-dir "auto-$model"
    chatlm train --plan "$model.json" --max-seq-len 64 --max-steps 3 --output-dir "planned-$model"
}
# Side by side, on a thread each: most of it is what starts, which takes one core.
export OMP_NUM_THREADS=1
plan_and_train tiny > tiny.log 2>&1 &
decoder=$!
plan_and_train tiny-t5 > tiny-t5.log 2>&1 &
encoder_decoder=$!
for run in "$decoder" "$encoder_decoder"; do
    wait "$run" || { tail -n 99 ./*.log; exit 1; }
done
tail -n 99 ./*.log
chatlm report auto-tiny planned-tiny
chatlm plan --plot --gpu T4 --max-seq-len 64 --effective-batch-size 8
python - <<'PY'
import json
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

for run, auto in (("auto-tiny", AutoModelForCausalLM), ("auto-tiny-t5", AutoModelForSeq2SeqLM)):
    model, tokenizer = auto.from_pretrained(f"{run}/model"), AutoTokenizer.from_pretrained(f"{run}/model")
    answer = model.generate(**tokenizer("你好", return_tensors="pt", return_token_type_ids=False), max_new_tokens=8)
    assert answer.shape[0] == 1 and answer.shape[1] > 1, answer
    rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5], rows
    print(f"{run}: transformers loads it and generates {answer.tolist()}")
PY
echo "smoke: all passed"
