"""What settings are called elsewhere: names of transformers' Trainer, of ChatLM-mini-Chinese and MiniMind -> ours."""

from __future__ import annotations

from collections.abc import Collection

ELSEWHERE = {
    # transformers (5.x and what earlier versions called it) and its example scripts
    "activation_checkpointing": "--gradient-checkpointing on",
    "auto_find_batch_size": "chatlm train --auto",
    "bf16": "--precision bf16",
    "dataset_name": "--data FILE: files are read, nothing is fetched",
    "early_stopping_patience": "--early-stopping",
    "eval_steps": "--eval-every",
    "eval_strategy": "--validation FILE: each epoch, or --eval-every STEPS",
    "evaluation_strategy": "--validation FILE: each epoch, or --eval-every STEPS",
    "fp16": "--precision fp16",
    "global_batch_size": "--effective-batch-size",
    "group_by_length": "--layout sorted, or auto",
    "load_best_model_at_end": "nothing: with --validation FILE the best model is kept in best/, the last in model/",
    "logging_steps": "nothing: metrics.jsonl has every step",
    "lr_scheduler_type": "--schedule",
    "max_grad_norm": "--clip",
    "max_length": "--max-seq-len",
    "max_seq_length": "--max-seq-len",
    "max_source_length": "--max-seq-len",
    "max_target_length": "--max-target-len",
    "max_train_samples": "--limit",
    "model_max_length": "--max-seq-len",
    "model_name_or_path": "--model",
    "num_train_epochs": "--epochs",
    "optim": "--optimizer",
    "torch_compile": "--compile",
    "packing": "--layout packed, or auto",
    "padding_free": "--layout packed, or auto",
    "per_device_eval_batch_size": "nothing: evaluation takes the micro-batch that the plan measured",
    "per_device_train_batch_size": "--batch-size-per-gpu, or nothing: --auto finds it",
    "per_gpu_train_batch_size": "--batch-size-per-gpu, or nothing: --auto finds it",
    "predict_with_generate": "nothing: with --validation FILE there is BLEU, of --bleu-rows rows",
    "tokenizer_name": "--tokenizer",
    "train_batch_size": "--batch-size-per-gpu, or nothing: --auto finds it",
    "warmup_ratio": "--warmup, below 1",
    "warmup_steps": "--warmup",
    # ChatLM-mini-Chinese
    "is_finetune": "--freeze embedding,encoder with --model FOLDER",
    "learn_rate": "--learning-rate, which is the peak: theirs times div_factor",
    "mixed_precision": "--precision",
    "tokenizer_dir": "--tokenizer",
    "train_file": "--data",
    "use_fast_config": "--profile fast",
    "use_small_config": "--profile small",
    "validation_file": "--validation",
    # MiniMind
    "accumulation_steps": "--effective-batch-size: rows of all micro-batches of a step together",
    "batch_size": "--batch-size-per-gpu for a micro-batch, --effective-batch-size for a step",
    "data_path": "--data",
    "dtype": "--precision",
    "from_weight": "--model FOLDER",
    "grad_clip": "--clip",
    "save_dir": "--output-dir",
}


def ours(name: str, known: Collection[str]) -> str | None:
    """Return what a name, as typed after its dashes, is called here: one of `known`, or words; None if unheard of."""
    name = name.lstrip("-").replace("-", "_")
    if name in known:
        return "--" + name.replace("_", "-")
    return ELSEWHERE.get(name)
