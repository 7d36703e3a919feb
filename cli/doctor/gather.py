"""Reads what doctor tells: packages, system, cards, host and environment; has a worker say what torch sees.

No torch, no network. What cannot be read is told as not known.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from autotune.cards import CardState, Survey, find_rates, survey_cards
from autotune.errands import Probe, Probed
from autotune.errors import ConfigurationError, UserError
from autotune.hardware import name_processor, read_control_group_limits, read_hardware
from autotune.plan import Hardware, Precision
from autotune.process import WorkerCrashedError, ask
from cli.choices import choose_precision, has_compiler
from cli.doctor.facts import SHARED_MEMORY, CardFacts, Driver, Facts, Host, Limit, Place, Software, TableRates
from cli.masking import Private, is_secret, mask_setting
from cli.wiring import cache_dir

PACKAGES = ("chatlm", "torch", "transformers", "accelerate", "numpy", "pyarrow", "tokenizers")
FEATURES = (
    *("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"),
    *("asimd", "sve", "bf16", "i8mm"),  # of ARM
)
STEERING = re.compile(
    r"(OMP|KMP|GOMP|MKL|OPENBLAS|ONEDNN|DNNL|ATEN|PYTORCH|TORCH|TORCHINDUCTOR|TORCHDYNAMO|TORCHELASTIC|TRITON|MALLOC"
    r"|CUDA|NVIDIA|NCCL|GLOO|HF|TRANSFORMERS|TOKENIZERS|ACCELERATE|CHATLM)_\w+"
    r"|GLIBC_TUNABLES|LD_PRELOAD|LD_LIBRARY_PATH|PYTHONPATH|XDG_CACHE_HOME|LRU_CACHE_CAPACITY"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|TMPDIR|CXX"
)
"""Variables of the environment that change what we do, or how fast."""
WSL_KERNEL = re.compile("microsoft|wsl", re.IGNORECASE)
SILENT_SECONDS = 30.0
TIME_LIMIT_SECONDS = 120.0


def gather(
    environ: Mapping[str, str] = os.environ, nvml: Any = None, root: Path = Path("/"), *, measure: bool = True
) -> Facts:
    """Read all there is to know; the arguments are what `read_card` takes. Raises MachineError without a disk."""
    survey = survey_cards(nvml, root)
    hardware = read_hardware(Path(), nvml=nvml, environ=environ)
    host = _read_host(root)
    precision = choose_precision("auto", "llama", hardware)
    measured, failed = _measure(hardware, precision) if measure else (None, "nothing was measured")
    return Facts(
        made=time.strftime("%Y-%m-%d"),
        software=_read_software(root),
        host=host,
        driver=Driver(version=survey.driver, cuda=survey.cuda, card_is_seen=survey.hardware, trouble=survey.trouble),
        cards=tuple(map(_card, survey.states)),
        visible=environ.get("CUDA_VISIBLE_DEVICES"),
        hardware=hardware,
        precision=precision,
        t5_precision=choose_precision("auto", "t5", hardware),
        table=_find_table(hardware),
        environment={name: mask_setting(name, environ[name]) for name in sorted(environ) if STEERING.fullmatch(name)},
        measured=measured,
        worker_failed=failed,
        sources=_sources(host, hardware, survey),
    )


def read_private(environ: Mapping[str, str] = os.environ) -> Private:
    """Return what is not to be told: who and where we are, and what variables with names of secrets hold."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        user = ""
    try:
        home = str(Path.home())
    except RuntimeError:
        home = ""
    secrets = tuple(value for name, value in environ.items() if is_secret(name))
    return Private(home=home, user=user, host=socket.gethostname(), secrets=secrets)


def _read_software(root: Path) -> Software:
    release = platform.release()
    return Software(
        versions={name: _version(name) for name in PACKAGES} | {"Python": platform.python_version()},
        torch_cuda=_read_torch_cuda(),
        system=f"{platform.system()} {release} {platform.machine()}{_distribution()}",
        glibc=platform.libc_ver()[1] or None,
        wsl=sys.platform == "linux" and WSL_KERNEL.search(release) is not None,
        windows=sys.platform == "win32",
        container=_find_container(root),
        compiler=has_compiler(),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _read_torch_cuda() -> str | None:
    """Read which CUDA torch was built for, without loading it: it may be what is broken."""
    try:
        file = metadata.distribution("torch").locate_file("torch/version.py")
        text = Path(str(file)).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return found[1] if found else None


def _distribution() -> str:
    try:
        return f" ({platform.freedesktop_os_release()['PRETTY_NAME']})"
    except (OSError, KeyError, AttributeError):
        return ""


def _find_container(root: Path) -> str:
    """Name the kind of container that we are in, by the marks that each leaves."""
    for mark, kind in ((".dockerenv", "docker"), ("run/.containerenv", "podman")):
        if (root / mark).exists():
            return kind
    found = re.search("kubepods|docker|containerd|lxc", _read_text(root / "proc/1/cgroup"))
    return found[0] if found else ""


def _card(state: CardState) -> CardFacts:
    card = state.card
    return CardFacts(
        name=card.name,
        memory_total_bytes=card.memory.total_bytes if card.memory else None,
        memory_free_bytes=card.memory.free_bytes if card.memory else None,
        compute_capability=card.compute_capability,
        fast_bf16=card.fast_bf16,
        mig=state.mig,
        celsius=state.celsius,
        clock_mhz=state.clock_mhz,
        most_clock_mhz=state.most_clock_mhz,
        slowed_by=state.slowed_by,
        others=card.others,
        own_process_ids=tuple(one.process_id for one in card.others if _is_own(one.process_id)),
    )


def _is_own(process_id: int) -> bool:
    """Say whether a process is the user's; one outside our container cannot be."""
    try:
        return psutil.Process(process_id).username() == psutil.Process().username()
    except psutil.Error:
        return False


def _find_table(hardware: Hardware) -> TableRates | None:
    """Find the card in our table, by its name, else by that and its memory, in which cards of one name differ."""
    name = hardware.device_name
    for known in (name, f"{name} {round(hardware.device_memory_total_bytes / 2**30)}GB"):
        precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
        found = {precision: rates for precision in precisions if (rates := find_rates(known, precision))}
        if hardware.device == "cuda" and found:
            flops = {precision: rates.flops for precision, rates in found.items()}
            return TableRates(flops=flops, bytes_per_second=found["fp32"].bytes)
    return None


def _read_host(root: Path) -> Host:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    cpuinfo = _read_text(root / "proc/cpuinfo")
    cores = os.cpu_count() or 1
    return Host(
        processor=name_processor(cpuinfo),
        features=find_features(cpuinfo),
        machine_cores=cores,
        affinity_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        memory_total_bytes=memory.total,
        memory_available_bytes=memory.available,
        limits=tuple(
            Limit(path=group.path, limit_bytes=group.limit_bytes, available_bytes=group.available_bytes)
            for group in read_control_group_limits()
            if group.limit_bytes < memory.total
        ),
        swap_total_bytes=swap.total,
        swap_used_bytes=swap.used,
        shared_memory_bytes=_read_size(root / SHARED_MEMORY[1:]),
        places=(look_at_place("current folder", Path()), _look_at_cache()),
    )


def find_features(cpuinfo: str) -> tuple[str, ...]:
    """Find what decides precision and speed in the text of /proc/cpuinfo, of x86 or ARM."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    told = set(found[1].split()) if found else set()
    return tuple(name for name in FEATURES if name in told)


def _look_at_cache() -> Place:
    try:
        return look_at_place("cache folder", cache_dir())
    except ConfigurationError as error:
        return Place(what="cache folder", path="~/.cache/chatlm", disk="", free_bytes=None, refused=error.message)


def look_at_place(what: Literal["current folder", "cache folder"], folder: Path) -> Place:
    """Say what is free where a folder is, or would be made, and try to write there; nothing is left."""
    path = folder.absolute()
    there, refused = _nearest(path)
    if not refused:
        try:
            with tempfile.TemporaryFile(dir=there if there.is_dir() else path) as file:
                file.write(b"chatlm")
                file.flush()
        except OSError as error:
            refused = error.strerror or str(error)
    return Place(what=what, path=str(path), disk=_find_disk(there), free_bytes=_read_free(there), refused=refused)


def _nearest(path: Path) -> tuple[Path, str]:
    """Return it, or its nearest parent that is there and can be looked at, and why one below that cannot."""
    refused = ""
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            refused = refused or error.strerror or str(error)
            continue
        return place, refused
    return path, refused


def _find_disk(place: Path) -> str:
    try:
        device = place.stat().st_dev
        while place != place.parent and place.parent.stat().st_dev == device:
            place = place.parent
    except OSError:
        return ""
    return str(place)


def _read_free(place: Path) -> int | None:
    try:
        usage = psutil.disk_usage(str(place))
    except OSError:
        return None
    return usage.free if usage.total else None


def _read_size(folder: Path) -> int | None:
    try:
        return psutil.disk_usage(str(folder)).total
    except OSError:
        return None


def _measure(hardware: Hardware, precision: Precision) -> tuple[Probed | None, str]:
    """Have a worker look and measure; whatever becomes of it is told."""
    errand = Probe(device=hardware.device, precisions=tuple(dict.fromkeys(("fp32", precision))))
    try:
        for event in ask(errand, hardware.cores, SILENT_SECONDS, TIME_LIMIT_SECONDS):
            if event["event"] == "result":
                return Probed.model_validate(event.get("result")), ""
    except UserError as error:
        return None, error.message
    except (WorkerCrashedError, ValueError) as error:  # the latter is an answer that is none
        return None, _first_and_last(str(error))
    return None, "the worker gave no answer"


def _first_and_last(words: str) -> str:
    """Return what a worker's end was, and the last line that it said: of a traceback, the error."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return " ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else ""


def _sources(host: Host, hardware: Hardware, survey: Survey) -> dict[str, str]:
    """Say where facts come from, by their names in the JSON; of two that differ here, the one that counts."""
    linux = sys.platform == "linux"
    cores = "affinity" if hardware.cores == host.affinity_cores else "control group's quota"
    return {
        "software.versions": "package metadata",
        "software.torch_cuda": "torch/version.py",
        "software.system": "platform",
        "driver": "NVML, /dev and sysfs" if survey.trouble and linux else "NVML",
        "cards": "NVML",
        "visible": "environment",
        "host.processor": "/proc/cpuinfo" if linux else "platform",
        "hardware.cores": cores,
        "host.memory_total_bytes": "psutil (/proc/meminfo)" if linux else "psutil",
        "host.swap_used_bytes": "psutil",
        "host.shared_memory_bytes": "statvfs",
        "host.places": "statvfs, and a file written",
        "hardware.host_memory_available_bytes": hardware.host_memory_limited_by,
        "precision": "rule" if hardware.device == "cuda" or linux else "rule; features not known",
        "measured": "a worker, now",
        "table": "cards.toml",
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
