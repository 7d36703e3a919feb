"""Presets and local checkpoints -> model, and a model -> a folder that plain transformers loads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
)

from autotune.disk import put_in_place, remove, sync
from autotune.errands import ModelSummary, TokenIds
from autotune.errors import ConfigurationError, MachineError
from autotune.plan import Task, Workload
from trainer.compiled import compile_layers
from trainer.folders import INDEX, check_links, check_weights
from trainer.forward import forward
from trainer.loss import KNOWN_TAILS
from trainer.memory import is_memory_error


def _t5(d_model: int, d_ff: int, heads: int, layers: int, vocabulary: int) -> Callable[[], T5Config]:
    return lambda: T5Config(
        d_model=d_model,
        d_ff=d_ff,
        d_kv=d_model // heads,
        num_heads=heads,
        num_layers=layers,
        num_decoder_layers=layers,
        vocab_size=vocabulary,
    )


def _llama(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> Callable[[], LlamaConfig]:
    return lambda: LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=6400,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def _minimind_3() -> Qwen3Config:
    return Qwen3Config(
        hidden_size=768,
        intermediate_size=2432,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=96,
        vocab_size=6400,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )


PRESETS: dict[str, Callable[[], Any]] = {
    "tiny": _llama(128, 352, 4, 4, 2),
    "tiny-t5": _t5(128, 512, 4, 2, 6400),
    "minimind-26m": _llama(512, 1408, 8, 8, 2),
    "minimind-104m": _llama(768, 2048, 16, 8, 2),
    "minimind-3": _minimind_3,
    "chatlm-t5": _t5(768, 3072, 12, 10, 29298),
}
"""Shapes by name: ChatLM-mini-Chinese's T5, MiniMind of 2025 (Llama) and of 2026 (Qwen3), and two for a processor."""


def convert_hint(model: str) -> str:
    """Say how to make of pickled weights what is read."""
    return f"chatlm import {shlex.quote(model)} --output NEW reads them without running any; then give NEW as --model"


MOST_LAYERS = 10_000
ONE_FILE = "1000GB"
TRAINED = "what was trained is in the last checkpoint"

DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
)
"""Names under which configurations keep their dropout."""


def load_config(model: str, vocabulary_size: int | None, dropout: float | None) -> Any:
    """Return the configuration of a preset or of a local folder.

    A preset's vocabulary follows the tokenizer; a checkpoint's is its own. Raises ConfigurationError for a name that
    is neither, a dropout that the model has no place for, or a vocabulary smaller than the tokenizer's.
    """
    if model in PRESETS:
        config = PRESETS[model]()
        if vocabulary_size is not None:
            config.vocab_size = vocabulary_size
    else:
        config = _checkpoint_config(model)
        if vocabulary_size is not None and vocabulary_size > config.vocab_size:
            raise ConfigurationError(
                f"the tokenizer has {vocabulary_size} tokens, the model in {model} only {config.vocab_size}",
                "give the tokenizer that the model was trained with",
            )
    if dropout is not None:
        names = [name for name in DROPOUTS if hasattr(config, name)]
        if not names:
            raise ConfigurationError(f"the model {model} has no dropout that could be set to {dropout}")
        for name in names:
            setattr(config, name, dropout)
    return config


def _checkpoint_config(folder: str) -> Any:
    from difflib import get_close_matches

    path = Path(folder)
    if path.is_file():
        raise ConfigurationError(f"{folder} is a file, and a model is a folder", convert_hint(folder))
    if not (path / "config.json").exists():
        near = get_close_matches(folder, PRESETS, n=1)
        raise ConfigurationError(
            f"model {folder!r} is neither a preset nor a folder with a config.json",
            f"did you mean {near[0]}?" if near else f"presets are {', '.join(PRESETS)}",
        )
    if not any(path.glob("*.safetensors")):
        raise ConfigurationError(
            f"{folder}: no safetensors weights; pickled ones (.bin, .pth) can run code and are not read",
            convert_hint(folder),
        )
    return read_config(folder)


def read_config(folder: str) -> Any:
    """Read a folder's config.json; raises ConfigurationError for what transformers does not know, or asks for more."""
    check_links(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 # whatever transformers makes of a stranger's file
        raise ConfigurationError(f"{folder}: not a model that transformers knows: {_said(error)}") from None
    _check_strange(folder, config)
    return config


def _check_strange(folder: str, config: Any) -> None:
    """Raise ConfigurationError for a config.json or index that asks for code or files from elsewhere, or for no model.

    transformers takes kernels that are named like a repository from a hub, and runs them; it opens the files that an
    index of weights names wherever they are.
    """
    check_weights(folder, str(getattr(config, "transformers_weights", None) or INDEX))
    for kind in ("attn", "experts"):
        asked = getattr(config, f"_{kind}_implementation_internal", None)
        if asked is not None and (not isinstance(asked, str) or not asked.isidentifier()):
            raise ConfigurationError(
                f"{folder}: its config.json asks for the kernels {asked!r}, which are code from elsewhere",
                f"take _{kind}_implementation_internal out of it",
            )
    for name, value in chain.from_iterable(vars(part).items() for part in _parts(config)):
        if name.endswith(("layers", "n_layer")) and isinstance(value, int) and not 0 <= value <= MOST_LAYERS:
            raise ConfigurationError(f"{folder}: {name} is {value:,} in its config.json, {MOST_LAYERS:,} at most")
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ConfigurationError(
            f"{folder}: a model of type {config.model_type} is not one of text alone: its config.json has no vocab_size"
        )


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those in it, of a model that sees or hears too."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _said(error: Exception) -> str:
    """Return the first line of an error of transformers' own, or what it is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def task_of(config: Any) -> Task:
    """Say whether a configuration is of a decoder alone or of an encoder and a decoder."""
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"


def freeze(model: Any, parts: Sequence[str]) -> None:
    """Stop training these parts: embedding, encoder, decoder, or a pattern (fnmatch) of parameter names.

    A tied weight is one, by any of its names: an output layer tied to the embedding is frozen with it, and an embedding
    that encoder and decoder share is neither's. Raises ConfigurationError for a part there is not, or where nothing is
    left to train.
    """
    if not parts:
        return
    named = dict(model.named_parameters(remove_duplicate=False))
    embedding = set(model.get_input_embeddings().parameters())
    known = {"embedding": embedding}
    if model.config.is_encoder_decoder:
        known["encoder"] = set(model.get_encoder().parameters()) - embedding
        known["decoder"] = set(model.get_decoder().parameters()) - embedding
    for part in parts:
        chosen = known.get(part) or {p for name, p in named.items() if fnmatchcase(name, part)}
        if not chosen:
            raise ConfigurationError(
                f"freeze {part!r} fits no parameter of the model",
                f"parts are {', '.join(known)}; patterns fit names such as {next(iter(named))}",
            )
        for parameter in chosen:
            parameter.requires_grad_(requires_grad=False)
    if not any(p.requires_grad for p in named.values()):
        raise ConfigurationError(f"nothing is left to train with {', '.join(parts)} frozen", "freeze less")


def summarise(
    model: str, vocabulary_size: int | None, dropout: float | None, frozen: Sequence[str] = ()
) -> ModelSummary:
    """Count parameters and so on without a weight in memory."""
    config = load_config(model, vocabulary_size, dropout)
    auto = AutoModelForSeq2SeqLM if task_of(config) == "seq2seq" else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            empty = auto.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 # as above
        raise ConfigurationError(f"{model}: transformers builds no such model: {_said(error)}") from None
    freeze(empty, frozen)
    # T5's n_positions is of no consequence: its positions are relative.
    absolute = getattr(config, "max_position_embeddings", None)
    return ModelSummary(
        task=task_of(config),
        family=config.model_type,
        parameters=sum(p.numel() for p in empty.parameters()),
        trainable_parameters=sum(p.numel() for p in empty.parameters() if p.requires_grad),
        vocabulary_size=config.vocab_size,
        attention=config._attn_implementation,
        random_weights=model in PRESETS,
        longest_input=absolute,
        chunks=config.model_type in KNOWN_TAILS,
        packs=_packs(empty),
        window=getattr(config, "sliding_window", None),
    )


def _packs(empty: Any) -> bool:
    """Say whether a model, without its weights, goes through a forward of a row that several samples share.

    Some know no such mask (BLOOM, state-space models). Whether one that does is also exact, a proof tells.
    """
    two = torch.tensor([[1, 1, 2, 2]], device="meta")
    inputs = {"input_ids": two, "segments": two, "position_ids": two}
    if empty.config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": two for name in tuple(inputs)}
    try:
        forward(empty, inputs)
    except Exception:  # noqa: BLE001 # whatever the model's own code makes of it
        return False
    return True


def build_for(workload: Workload, ids: TokenIds | None, device: torch.device, *, weights: bool = True) -> Any:
    """Build a preset with random weights from torch's generator, or load a checkpoint; weights are fp32.

    Without `weights` a checkpoint's shape is built, its weights are not read, and nothing is compiled. `ids` are set in
    a preset's configuration, and in the generation configuration of either.
    """
    model, task = workload.model, workload.task
    config = load_config(model, workload.vocabulary_size if model in PRESETS else None, workload.dropout)
    auto = AutoModelForSeq2SeqLM if task == "seq2seq" else AutoModelForCausalLM
    if ids is not None:
        set_ids(config, ids, special=model in PRESETS or not weights)
    if model in PRESETS or not weights:
        built = auto.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, attn_implementation=workload.attention
        )
    else:
        built = load_weights(auto, workload.model, config, workload.attention)
    if ids is not None:
        set_generation_ids(built, ids)
    freeze(built, workload.frozen)
    if workload.gradient_checkpointing == "on":
        # transformers renamed it late in version 5, and warns of the old name.
        enable = getattr(built, "activation_checkpointing_enable", None) or built.gradient_checkpointing_enable
        enable()
    if workload.compile == "on" and weights:
        compile_layers(built)
    return built.to(device) if weights else built


def set_ids(config: Any, ids: TokenIds, *, special: bool) -> None:
    """Set with what a target begins, where a configuration does not say, and if `special` its pad, end and begin."""
    if task_of(config) == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = ids.pad
    if special:
        config.pad_token_id, config.eos_token_id, config.bos_token_id = ids.pad, _listed(ids.eos), ids.bos


def set_generation_ids(model: Any, ids: TokenIds) -> None:
    """Set at which tokens generation ends, and from which it begins."""
    seq2seq = task_of(model.config) == "seq2seq"
    model.generation_config.update(
        pad_token_id=ids.pad,
        eos_token_id=_listed(ids.eos),
        bos_token_id=ids.bos,
        decoder_start_token_id=model.config.decoder_start_token_id if seq2seq else None,
    )


def make_deterministic() -> None:
    """Have torch take kernels that add in one order alone; raises where an operator has none, in the first step.

    cuBLAS reads its workspace when it is first used (NVIDIA, cuBLAS documentation, "Results Reproducibility").
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def load_weights(auto: Any, folder: str, config: Any, attention: str | None) -> Any:
    """Load a checkpoint whole; raises ConfigurationError for weights that are damaged, missing or of another shape."""
    try:
        built, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        if is_memory_error(error):
            raise
        raise ConfigurationError(f"{folder}: its weights do not load: {_said(error)}") from None
    missing = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if missing:
        raise ConfigurationError(
            f"{folder}: {len(missing)} weights are missing or of another shape, first {missing[0]}",
            "they would be random: save the whole model with save_pretrained",
        )
    return built


def _listed(ids: int | tuple[int, ...]) -> int | list[int]:
    """Return ids as configurations take them."""
    return list(ids) if isinstance(ids, tuple) else ids


def save_model(model: Any, tokenizer_dir: Path | None, folder: Path, left: str = TRAINED) -> None:
    """Write weights (safetensors), configurations and tokenizer; an older folder is replaced when all is on the disk.

    Raises MachineError where the disk is full or fails: an older folder is then there still, and what is `left` besides
    the hint says.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        remove(partial)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, max_shard_size=ONE_FILE)
        for file in tokenizer_dir.iterdir() if tokenizer_dir is not None else ():
            (partial / file.name).write_bytes(file.read_bytes())
        for file in (*partial.iterdir(), partial):
            sync(file)
        put_in_place(partial, folder)
    except BaseException as error:
        remove(partial)
        if not isinstance(error, OSError | SafetensorError):
            raise
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MachineError(f"{folder} could not be saved: {said}", f"free some of the disk; {left}") from None
