#!/usr/bin/env bash
# The installed command plans and trains both shapes on a machine without a GPU, and plain transformers loads the result.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export XDG_CACHE_HOME="$work/cache"
cd "$work" # so that nothing is found but what was installed

chatlm --help > /dev/null
chatlm profiles
chatlm plan --max-seq-len 64 --effective-batch-size 8
chatlm plan --gpu T4 --max-seq-len 64 --effective-batch-size 8
for model in tiny tiny-t5; do
    chatlm plan --model "$model" --max-seq-len 64 --effective-batch-size 8 --memory-limit 2GiB --json > plan.json
    chatlm train --auto --model "$model" --max-seq-len 64 --effective-batch-size 8 --max-steps 5 --output-dir "auto-$model"
    chatlm train --plan plan.json --max-seq-len 64 --max-steps 3 --output-dir "planned-$model"
done
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
