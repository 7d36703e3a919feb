"""Models of other programs -> a folder that transformers loads, and back. What is read runs no code of strangers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from autotune.disk import sync
from autotune.errands import Export, Exported, Import, Imported
from autotune.errors import ConfigurationError, MachineError
from autotune.plan import Precision
from trainer.encode import ids_of
from trainer.folders import check_links
from trainer.memory import is_memory_error
from trainer.model import read_config, save_model, task_of
from trainer.origins import MOE, Recognised, recognise, to_minimind, unwrapped
from trainer.pickled import read_pickled
from trainer.saved import open_model
from trainer.tokenizer import load_tokenizer

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KNOWN_TYPES = (*DTYPES.values(), torch.float64)
PATTERNS = ("model*.safetensors", "pytorch_model*.bin", "*.pth", "*.bin")
"""Of a folder's weights: the first that there are is taken."""
TOKENIZER_PLACES = (".", "tokenizer", "../model", "../model/minimind_tokenizer", "../tokenizer")
"""Where MiniMind's and ChatLM-mini-Chinese's repositories keep theirs, from the weights."""
NAMED = 5
"""Of weights that are missing or too many."""


def import_model(errand: Import, tell: Callable[[str], None]) -> Imported:
    """Read weights as another program left them, hold them against the model that they are of, and write that.

    Raises ConfigurationError for weights that run code, are damaged, too few, too many, or of no known model.
    """
    source = Path(errand.source)
    tell(f"reading {source}")
    try:
        found = _read(source, errand.heads)
        model = _whole(found.config, found.tensors, source)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        if is_memory_error(error):
            raise
        raise ConfigurationError(f"{source}: of no model that can be: {error}") from None
    if errand.heads is not None and errand.heads != found.config.num_attention_heads:
        raise ConfigurationError(
            f"{source} has {found.config.num_attention_heads} heads, which its weights tell", "leave --heads out"
        )
    place = errand.tokenizer or _tokenizer_beside(source if source.is_dir() else source.parent, found.marker)
    tell(f"writing {errand.output}")
    with tempfile.TemporaryDirectory() as kept:
        if place is None and source.suffix == ".gguf":
            place = _tokenizer_of_gguf(source, kept)
        if place is not None:
            _give_tokenizer(model, place, Path(kept))
        save_model(model, Path(kept) if place is not None else None, Path(errand.output), "nothing was written")
    return Imported(
        what=found.what,
        family=found.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        assumed=found.assumed,
        tokenizer=str(source) if place == kept else place,
    )


def _read(source: Path, heads: int | None) -> Recognised:
    if source.suffix == ".gguf":
        return _read_gguf(source)
    if source.is_file():
        return recognise(read_weights([source]), heads, {})
    if not source.is_dir():
        raise ConfigurationError(f"{source}: no such file or folder", "give a .pth or .bin file, or a model's folder")
    check_links(str(source))
    files: list[Path] = []
    for pattern in PATTERNS:
        files = files or sorted(file for file in source.glob(pattern) if file.is_file())
    known = _known(source / "config.json")
    if not files or (not known and len(files) > 1):
        several = f"{len(files)} files of weights, of which one has to be named" if files else "no weights"
        raise ConfigurationError(f"{source}: {several}", "give the file itself: chatlm import FILE")
    tensors = read_weights(files)
    if known.get("model_type", "minimind") == "minimind":  # whose configuration is code of its own
        return recognise(tensors, heads, known)
    config = read_config(str(source))
    if any(getattr(config, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ConfigurationError(MOE, "import a dense model")
    return Recognised("a model of transformers", config, unwrapped(tensors))


def _known(config: Path) -> dict[str, Any]:
    if not config.exists():
        return {}
    try:
        made = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise ConfigurationError(f"{config}: not a configuration")
    return made


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """Read the tensors of files, safetensors or pickled, together."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = _read_safetensors(file) if file.suffix == ".safetensors" else read_pickled(file)
        if twice := tensors.keys() & part.keys():
            raise ConfigurationError(f"{file}: {min(twice)} stands in another file of the folder too")
        tensors |= part
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 # it is no mapping
    except SafetensorError as error:
        raise ConfigurationError(f"{file}: not safetensors: {error}") from None


def _read_gguf(file: Path) -> Recognised:
    """Read what llama.cpp takes, by transformers, which counts out what is quantized."""
    folder, name = str(file.parent), file.name
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, local_files_only=True, dtype="auto")
    except ImportError:
        raise MachineError(f"{file}: reading it takes the package gguf", "pip install 'chatlm[gguf]'") from None
    except Exception as error:  # noqa: BLE001 # whatever it makes of a stranger's file
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(f"{file}: not a model that transformers reads: {said}") from None
    config = model.config
    del config.quantization_config  # it is counted out
    return Recognised(f"a {config.model_type} of llama.cpp", config, dict(model.state_dict()))


def _tokenizer_of_gguf(file: Path, folder: str) -> str:
    """Write the tokenizer that such a file has in it, and return where."""
    try:
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True).save_pretrained(
            folder
        )
    except Exception as error:  # noqa: BLE001 # whatever it makes of a stranger's file
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"{file}: its tokenizer does not load: {said}", "give another: --tokenizer DIR"
        ) from None
    return folder


def _whole(config: Any, tensors: Mapping[str, Tensor], source: Path) -> Any:
    """Return the model with these weights; raises ConfigurationError naming those that lack or are too many."""
    auto = AutoModelForSeq2SeqLM if task_of(config) == "seq2seq" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    names: dict[int, list[str]] = {}
    expected = model.state_dict(keep_vars=True)
    for name, tensor in expected.items():
        names.setdefault(id(tensor), []).append(name)
    stem = model.base_model_prefix
    tensors = {n if n in expected or f"{stem}.{n}" not in expected else f"{stem}.{n}": t for n, t in tensors.items()}
    taken: dict[str, Tensor] = {}
    missing, wrong = [], []
    for group in names.values():
        given = [tensors[name] for name in group if name in tensors]
        shape = expected[group[0]].shape
        if not given:
            missing.append(group[0])
        elif any(tensor.shape != shape for tensor in given):
            wrong.append(f"{group[0]} {tuple(given[0].shape)} in place of {tuple(shape)}")
        elif any(not torch.equal(tensor, given[0]) for tensor in given[1:]):
            wrong.append(f"{' and '.join(group)}, which are one and differ")
        taken |= {name: given[0] for name in group if given}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unexpected = [n for n in tensors if n not in expected and not any(fnmatchcase(n, f"*{i}*") for i in ignored)]
    for what, several in (("missing", missing), ("of another shape", wrong), ("too many", unexpected)):
        if several:
            _refuse(source, what, several)
    dtype = _dtype(taken, source)
    kept: dict[str, Tensor] = {}
    for group in names.values():  # what is tied is converted once
        tensor = taken[group[0]].to(dtype).contiguous()
        if any(tensor.data_ptr() == other.data_ptr() for other in kept.values()):
            tensor = tensor.clone()  # a file may name one for two that are not tied
        kept |= dict.fromkeys(group, tensor)
    model.load_state_dict(kept, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    return model


def _refuse(source: Path, what: str, names: list[str]) -> NoReturn:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise ConfigurationError(
        f"{source}: {len(names)} weights are {what}: {', '.join(sorted(names)[:NAMED])}{more}",
        "it is not the whole of one model: save it again where it was trained",
    )


def _dtype(tensors: Mapping[str, Tensor], source: Path) -> torch.dtype:
    """Return the widest type that there is, fp32 at most; raises ConfigurationError for weights that are no numbers."""
    wide = torch.float16 if all(t.dtype == torch.float16 for t in tensors.values()) else torch.bfloat16
    for name, tensor in tensors.items():
        if tensor.dtype not in KNOWN_TYPES:
            _refuse(source, f"of type {tensor.dtype}", [name])
        if not torch.isfinite(tensor).all():
            _refuse(source, "not finite", [name])
        if tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.dtype != wide:
            wide = torch.float32
    return wide


def _tokenizer_beside(folder: Path, marker: str) -> str | None:
    """Return the first that has the special token which these weights were trained with: others are as large."""
    for place in (folder / name for name in TOKENIZER_PLACES):
        file = place / "tokenizer.json"
        if file.is_file() and (not marker or json.dumps(marker) in file.read_text(encoding="utf-8", errors="replace")):
            return str(place)
    return None


def _give_tokenizer(model: Any, place: str, folder: Path) -> None:
    """Save a tokenizer, and set its special tokens' ids in the model's configurations: where to end, above all."""
    tokenizer = load_tokenizer(place)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigurationError(
            f"the tokenizer in {place} has {len(tokenizer)} tokens, the model {model.config.vocab_size}",
            "give the one that it was trained with: --tokenizer DIR",
        )
    tokenizer.save_pretrained(folder)
    ids = ids_of(tokenizer, task_of(model.config), "sft")
    ends = list(ids.eos) if isinstance(ids.eos, tuple) else ids.eos
    start = getattr(model.config, "decoder_start_token_id", None)
    model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id = ids.pad, ends, ids.bos
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=ids.pad, eos_token_id=ends, bos_token_id=ids.bos, decoder_start_token_id=start
    )


def export_model(errand: Export) -> Exported:
    """Write a model for transformers, in half precision and one file, or as MiniMind's or ChatLM's own code loads it.

    Raises ConfigurationError for a model that the other's code does not compute, and for weights that a half of fp16
    does not hold.
    """
    model = open_model(errand.saved, torch.device("cpu"))
    config, output = model.config, Path(errand.output)
    precision: Precision = errand.precision or ("bf16" if config.model_type in ("t5", "umt5", "mt5") else "fp16")
    _check_range(model, DTYPES[precision])
    if errand.format == "transformers":
        model = model.to(DTYPES[precision])
        folder = Path(errand.saved.tokenizer) if errand.saved.tokenizer else None
        with tempfile.TemporaryDirectory() as kept:
            if folder is not None:
                load_tokenizer(str(folder)).save_pretrained(kept)
            save_model(model, Path(kept) if folder is not None else None, output, "nothing was written")
        size = sum(file.stat().st_size for file in output.iterdir())
        return Exported(precision=precision, bytes=size, needs={})
    tensors = model.to(DTYPES[precision]).state_dict()  # as one, so that what is tied stays so, and is written once
    needs: dict[str, int | float] = {}
    if errand.format == "chatlm-mini":
        if config.model_type != "t5":
            raise ConfigurationError(f"ChatLM-mini-Chinese is a T5, and this a {config.model_type}")
    else:
        of_april = errand.format == "minimind-2025-04"
        tensors = to_minimind(config, tensors, of_april=of_april)
        needs = _needs(config, of_april=of_april)
    _write(tensors, output)
    return Exported(precision=precision, bytes=output.stat().st_size, needs=needs)


def _check_range(model: Any, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    over = [name for name, tensor in model.state_dict().items() if not tensor.abs().max() <= most]
    if over:
        held = str(dtype).removeprefix("torch.")
        raise ConfigurationError(
            f"{len(over)} weights are no numbers that {held} holds, first {over[0]}", "give --precision bf16 or fp32"
        )


def _needs(config: Any, *, of_april: bool) -> dict[str, int | float]:
    """Return what MiniMind's configuration has to be given for these weights, by its own names."""
    common: dict[str, int | float] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rms_norm_eps": config.rms_norm_eps,
    }
    if not of_april:
        return common | {"head_dim": config.head_dim, "max_position_embeddings": config.max_position_embeddings}
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "rope_theta", "norm_eps")
    return dict(zip(names, common.values(), strict=True))


def _write(tensors: Mapping[str, Tensor], output: Path) -> None:
    """Write a state_dict as torch saves it; the file is there whole or not at all."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        torch.save(dict(tensors), partial)
        sync(partial)
        partial.replace(output)
        sync(output.parent)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise MachineError(
            f"{output} could not be written: {error}", "free some of the disk, or give another --output"
        ) from None
