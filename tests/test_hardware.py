"""What the machine has and has free, on trees of files, on a fake of NVML, and under real limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fake_nvml import CALLS, CODES, LARGE, OF_GAUGES, SLICE, SLICED, SMALL, FakeCard, FakeNvml, failing

from autotune.errors import MachineError
from autotune.hardware import (
    count_cores,
    count_memory_kills,
    imagine_hardware,
    multiplies_bf16,
    name_processor,
    read_control_group_limits,
    read_hardware,
    read_host_memory,
)

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024**2
GIB = 1024**3
V1_UNLIMITED = "9223372036854771712\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups and enforced limits are Linux's")


# Control groups: /proc/self and the mounted hierarchies as files.


@dataclass
class Tree:
    """A /proc/self and what it mounts, under a directory of the test's."""

    home: Path

    def process(self, cgroup: str, *mounts: tuple[str, str, str, str], status: str = "") -> Path:
        """Write /proc/self; a mount is its root, its point under `home`, its type and its options."""
        lines = ["22 1 0:21 / /proc rw,relatime - proc proc rw"]
        for root, point, kind, options in mounts:
            point = str(self.home / point).replace(" ", r"\040")
            lines.append(f"35 31 0:32 {root} {point} rw,relatime shared:9 - {kind} {kind} {options}")
        self.write("proc", cgroup=cgroup, mountinfo="\n".join(lines) + "\n", status=status)
        return self.home / "proc"

    def write(self, directory: str, **files: str) -> Path:
        """Write files; two underscores in a name stand for a dot."""
        at = self.home / directory
        at.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (at / name.replace("__", ".")).write_text(text)
        return at

    def v1(self, directory: str, limit: int | str, usage: int, inactive: int = 0) -> str:
        stat = f"inactive_file 7\nhierarchical_memory_limit 1\ntotal_inactive_file {inactive}\n"
        return str(
            self.write(
                directory,
                memory__limit_in_bytes=f"{limit}\n",
                memory__usage_in_bytes=f"{usage}\n",
                memory__stat=stat,
            )
        )

    def v2(self, directory: str, maximum: int | str, usage: int, inactive: int = 0, high: int | str = "max") -> str:
        return str(
            self.write(
                directory,
                memory__max=f"{maximum}\n",
                memory__high=f"{high}\n",
                memory__current=f"{usage}\n",
                memory__stat=f"anon 1\ninactive_file {inactive}\nactive_file 5\n",
            )
        )


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


V1 = ("/", "sys/memory", "cgroup", "rw,memory")
V2 = ("/", "sys", "cgroup2", "rw,nsdelegate")


def test_version_1_leaves_the_limit_less_what_cannot_be_reclaimed(tree: Tree) -> None:
    group = tree.v1("sys/memory/job", 1000, usage=700, inactive=200)
    process = tree.process("9:name=systemd:/x\n4:cpuset,memory:/job\n", V1)
    assert read_control_group_limits(process) == [(group, 500, 1000)]


def test_version_2_leaves_the_limit_less_what_cannot_be_reclaimed(tree: Tree) -> None:
    group = tree.v2("sys/user/job", 1000, usage=700, inactive=300)
    assert read_control_group_limits(tree.process("0::/user/job\n", V2)) == [(group, 600, 1000)]


def test_memory_high_is_a_limit_too(tree: Tree) -> None:
    group = tree.v2("sys/job", 1000, usage=100, high=400)
    assert read_control_group_limits(tree.process("0::/job\n", V2)) == [(group, 300, 400)]


def test_every_ancestor_with_a_limit_counts_from_our_own_upwards(tree: Tree) -> None:
    own = tree.v2("sys/a/b/c", 900, usage=10)
    tree.v2("sys/a/b", "max", usage=20)
    top = tree.v2("sys/a", 500, usage=450)
    found = read_control_group_limits(tree.process("0::/a/b/c\n", V2))
    assert found == [(own, 890, 900), (top, 50, 500)]


@pytest.mark.parametrize("limit", ["9223372036854771712", "9223372036854775807", "-1"])
def test_a_huge_number_in_version_1_is_no_limit(tree: Tree, limit: str) -> None:
    tree.v1("sys/memory/job", limit, usage=5)
    tree.v1("sys/memory", V1_UNLIMITED, usage=5)
    assert read_control_group_limits(tree.process("4:memory:/job\n", V1)) == []


def test_max_in_version_2_is_no_limit(tree: Tree) -> None:
    tree.v2("sys/job", "max", usage=5)
    assert read_control_group_limits(tree.process("0::/job\n", V2)) == []


def test_a_hybrid_system_has_its_memory_limits_in_version_1(tree: Tree) -> None:
    group = tree.v1("sys/memory/job", 1000, usage=100)
    tree.write("sys/unified/session", cgroup__procs="1\n")
    mounts = [("/", "sys/cpu", "cgroup", "rw,cpu"), V1, ("/", "sys/unified", "cgroup2", "rw")]
    process = tree.process("4:memory:/job\n1:cpu:/elsewhere\n0::/session\n", *mounts)
    assert read_control_group_limits(process) == [(group, 900, 1000)]


def test_the_group_that_a_container_mounts_as_its_root_is_stripped_from_ours(tree: Tree) -> None:
    top = tree.v1("sys/memory", 800, usage=100)
    inner = tree.v1("sys/memory/part", 500, usage=100)
    mount = ("/docker/1f", "sys/memory", "cgroup", "rw,memory")
    assert read_control_group_limits(tree.process("4:memory:/docker/1f/part\n", mount)) == [
        (inner, 400, 500),
        (top, 700, 800),
    ]


@pytest.mark.parametrize(("root", "group"), [("/docker/1f", "/"), ("/", "/../other"), ("/docker/1", "/docker/1f")])
def test_a_group_beneath_no_mount_is_read_at_the_mount_point(tree: Tree, root: str, group: str) -> None:
    tree.v2("other", 1, usage=0)
    top = tree.v2("sys", 800, usage=100)
    process = tree.process(f"0::{group}\n", (root, "sys", "cgroup2", "rw"))
    assert read_control_group_limits(process) == [(top, 700, 800)]


def test_of_several_mounts_the_one_that_shows_the_most_ancestors_is_read(tree: Tree) -> None:
    tree.v2("bound", 1, usage=0)
    tree.v2("strange", 1, usage=0)
    own, top = tree.v2("sys/a/b", 500, usage=0), tree.v2("sys/a", 400, usage=0)
    mounts = [("/x", "strange", "cgroup2", "rw"), ("/a/b", "bound", "cgroup2", "rw"), V2]
    found = read_control_group_limits(tree.process("0::/a/b\n", *mounts))
    assert [limit.path for limit in found] == [own, top]


def test_a_mount_point_and_a_group_may_hold_blanks_and_colons(tree: Tree) -> None:
    group = tree.v2("my groups/a:b c", 1000, usage=1)
    process = tree.process("0::/a:b c\n", ("/", "my groups", "cgroup2", "rw"))
    assert read_control_group_limits(process) == [(group, 999, 1000)]


def test_what_is_available_lies_between_nothing_and_the_limit(tree: Tree) -> None:
    over = tree.v2("sys/a/b", 100, usage=300)
    under = tree.v2("sys/a", 100, usage=3, inactive=50)
    assert read_control_group_limits(tree.process("0::/a/b\n", V2)) == [(over, 0, 100), (under, 100, 100)]


def test_without_proc_there_is_no_control_group(tmp_path: Path) -> None:
    assert read_control_group_limits(tmp_path / "none") == []
    assert count_cores(tmp_path / "none") == count_cores(tmp_path)


# Host memory: the least of all counts.


def test_the_tightest_ancestor_bounds_the_host_and_is_named(tree: Tree) -> None:
    tree.v2("sys/a/b", 64 * MIB, usage=MIB)
    tightest = tree.v2("sys/a", 80 * MIB, usage=75 * MIB)
    host = read_host_memory(tree.process("0::/a/b\n", V2))
    assert host == (64 * MIB, 5 * MIB, f"control group {tightest}")


def test_a_group_of_more_than_the_machine_has_is_no_limit(tree: Tree) -> None:
    tree.v2("sys/job", 2**50, usage=2**50)
    host = read_host_memory(tree.process("0::/job\n", V2))
    assert host.total_bytes == psutil.virtual_memory().total
    assert "control group" not in host.limited_by


def test_without_limits_the_free_memory_of_the_system_counts(tmp_path: Path) -> None:
    host = read_host_memory(tmp_path)
    assert host.total_bytes == psutil.virtual_memory().total
    assert 0 < host.available_bytes <= host.total_bytes


@linux
@pytest.mark.parametrize(
    ("limit", "field", "name"), [("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d")]
)
def test_a_resource_limit_leaves_what_the_process_does_not_use_yet(limit: str, field: str, name: str) -> None:
    room = 96 * MIB
    found = child(f"""
        import re, resource
        status = open("/proc/self/status").read()
        used = int(re.search(r"{field}:\\s*(\\d+)", status)[1]) * 1024
        resource.setrlimit(resource.{limit}, (used + {room}, resource.RLIM_INFINITY))
        print(json.dumps(read_host_memory()))
    """)
    _, available, limited_by = found[0]
    assert limited_by == name
    assert room - 16 * MIB < available <= room


@pytest.fixture
def group_of_300_mib() -> Iterator[Path]:
    """A real control group, empty; the test is skipped where we may not make one."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else v1.parent) / f"chatlm-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not limit.exists():
            pytest.skip(f"a new control group has no {limit.name} here")
        limit.write_text(str(300 * MIB))
        yield group
    finally:
        group.rmdir()


@linux
def test_a_real_control_group_is_seen_from_inside(group_of_300_mib: Path) -> None:
    before, after = child(f"""
        open("{group_of_300_mib}/cgroup.procs", "w").write(str(os.getpid()))
        print(json.dumps(read_host_memory()))
        held = b"x" * (100 * 1024**2)
        print(json.dumps(read_host_memory()))
    """)
    for total, available, limited_by in (before, after):
        assert total == 300 * MIB
        assert 0 < available < 300 * MIB
        assert limited_by == f"control group {group_of_300_mib}"
    assert 95 * MIB < before[1] - after[1] < 110 * MIB


def child(program: str) -> list[list[object]]:
    """Run a program in a process of its own, and return what it prints, a JSON value a line."""
    lines = ["import json, os", "from autotune.hardware import read_host_memory"]
    lines += [line.strip() for line in program.splitlines()]
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Cores


@pytest.mark.parametrize(("quota", "cores"), [("100000", 1), ("199999", 1), ("1", 1)])
def test_a_quota_is_rounded_down_but_leaves_a_core(tree: Tree, quota: str, cores: int) -> None:
    tree.write("sys/job", cpu__max=f"{quota} 100000\n")
    assert count_cores(tree.process("0::/job\n", V2)) == cores


def test_the_tightest_quota_of_all_ancestors_counts(tree: Tree) -> None:
    tree.write("sys/a/b", cpu__max="max 100000\n")
    tree.write("sys/a", cpu__max="50000 50000\n")
    tree.write("sys", cpu__max="6400000 100000\n")
    assert count_cores(tree.process("0::/a/b\n", V2)) == 1


def test_version_1_has_its_quota_in_two_files(tree: Tree) -> None:
    mount = ("/", "sys/cpu", "cgroup", "rw,cpu,cpuacct")
    tree.write("sys/cpu/job", cpu__cfs_quota_us="20000\n", cpu__cfs_period_us="20000\n")
    assert count_cores(tree.process("4:cpu,cpuacct:/job\n", mount)) == 1


@linux
@pytest.mark.parametrize(
    "files",
    [
        {"cpu__max": "max 100000\n"},
        {"cpu__max": "6400000000 100000\n"},
        {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"},
    ],
)
def test_without_a_quota_the_cores_of_our_affinity_count(tree: Tree, files: dict[str, str]) -> None:
    tree.write("sys/job", **files)
    process = tree.process("0::/job\n3:cpu:/job\n", V2, ("/", "sys", "cgroup", "rw,cpu"))
    assert count_cores(process) == len(psutil.Process().cpu_affinity() or [])


# The processor


def test_the_processor_is_known_by_its_model_name() -> None:
    assert name_processor("processor\t: 0\nmodel name\t: Turtle 7 @ 2 Hz \nflags\t\t: fpu\n") == "Turtle 7 @ 2 Hz"


@pytest.mark.parametrize("cpuinfo", ["", "Features\t: fp asimd\n", "model name\t: \n"])
def test_a_processor_without_a_model_name_has_some_name(cpuinfo: str) -> None:
    assert name_processor(cpuinfo).strip()


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("fpu avx512_bf16 sse", True),
        ("amx_bf16", True),
        ("avx512f avx512_bf16x avx512bw", False),
        ("", False),
    ],
)
def test_bf16_is_fast_where_the_processor_has_instructions_for_it(flags: str, fast: bool) -> None:
    assert multiplies_bf16(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n") is fast


# All of it


def test_on_a_cpu_the_device_has_the_memory_of_the_host(tmp_path: Path) -> None:
    found = read_hardware(tmp_path, world_size=2, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert (found.device, found.world_size) == ("cpu", 2)
    assert found.device_name
    assert found.device_memory_total_bytes == found.host_memory_total_bytes
    assert found.device_memory_free_bytes == found.host_memory_available_bytes // found.world_size


def test_this_machine_can_be_read_and_written_as_json(tmp_path: Path) -> None:
    found = read_hardware(tmp_path)
    assert type(found).model_validate_json(found.model_dump_json()) == found
    assert 0 < found.host_memory_available_bytes <= found.host_memory_total_bytes
    assert 1 <= found.cores <= (os.cpu_count() or 1)


@pytest.mark.parametrize("below", [".", "not/yet/there", "file/below a file"])
def test_the_disk_is_that_of_the_nearest_parent_that_exists(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    found = read_hardware(tmp_path / below, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert found.disk_free_bytes == pytest.approx(psutil.disk_usage(str(tmp_path)).free, abs=GIB)


def test_reading_loads_no_torch() -> None:
    assert child("import sys\nread_host_memory()\nprint(json.dumps(['torch' in sys.modules]))") == [[False]]


def test_an_imagined_card_has_this_host_and_nothing_on_it(tmp_path: Path) -> None:
    found, here = imagine_hardware("rtx 3080 20gb", 2, tmp_path), read_hardware(tmp_path)
    assert (found.device, found.device_name, found.world_size) == ("cuda", "RTX 3080 20GB", 2)
    assert found.device_memory_total_bytes == 20 * GIB
    assert 0.97 < found.device_memory_free_bytes / found.device_memory_total_bytes < 1
    assert (found.compute_capability, found.fast_bf16, found.others, found.notes) == ((8, 6), True, (), ())
    assert (found.host_memory_total_bytes, found.cores) == (here.host_memory_total_bytes, here.cores)


# With a card, on a fake of NVML.


def test_a_card_gives_its_own_name_and_memory_and_the_host_the_rest(tmp_path: Path) -> None:
    found = read_hardware(tmp_path, nvml=FakeNvml([LARGE]), environ={})
    assert (found.device, found.device_name) == ("cuda", LARGE.name)
    assert (found.device_memory_total_bytes, found.device_memory_free_bytes) == (LARGE.total, LARGE.free)
    assert (found.compute_capability, found.fast_bf16, found.notes) == (LARGE.capability, True, ())
    assert found.host_memory_total_bytes == read_host_memory().total_bytes


def test_cuda_visible_devices_chooses_the_card(tmp_path: Path) -> None:
    nvml = FakeNvml([LARGE, SMALL])
    assert read_hardware(tmp_path, nvml=nvml, environ={"CUDA_VISIBLE_DEVICES": "1"}).device_name == "Tesla T4"


def test_a_card_that_shares_the_hosts_memory_has_as_much_as_the_host(tmp_path: Path) -> None:
    found = read_hardware(tmp_path, nvml=FakeNvml([FakeCard("GB10", "GPU-1", 0, 0, (12, 1))]), environ={})
    assert (found.device, found.fast_bf16) == ("cuda", True)
    assert found.device_memory_total_bytes == found.host_memory_total_bytes
    assert found.device_memory_free_bytes == found.host_memory_available_bytes
    assert "GB10" in found.notes[0]


SCENES = [(cards, visible) for cards in ([LARGE, SLICED], [SLICED]) for visible in (None, "0", "GPU-a100", SLICE.uuid)]


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
@pytest.mark.parametrize("name", sorted({*CALLS} - OF_GAUGES))
def test_whatever_nvml_answers_to_whichever_call_there_is_a_card_or_the_reason_why_not(name: str, code: int) -> None:
    asked = 0
    for cards, visible in SCENES:
        nvml = failing(cards, name, code)
        found = read_hardware(Path(), nvml=nvml, environ={"CUDA_VISIBLE_DEVICES": str(visible)} if visible else {})
        asked += name in nvml.calls
        if found.device == "cuda":
            host = (found.host_memory_total_bytes, found.host_memory_available_bytes)
            memory = (found.device_memory_total_bytes, found.device_memory_free_bytes)
            assert memory in [*((card.total, card.free) for card in (LARGE, SLICED, SLICE)), host]
        else:
            assert found.notes or (name, code) == ("nvmlInit", CODES["NVML_ERROR_LIBRARY_NOT_FOUND"])
        assert nvml.open_count == (name == "nvmlShutdown")
    assert asked, "the call is never made"


def test_ranks_take_a_card_each_and_the_one_with_the_least_free_decides(tmp_path: Path) -> None:
    alone = read_hardware(tmp_path, 1, FakeNvml([LARGE, SMALL]), {})
    two = read_hardware(tmp_path, 2, FakeNvml([LARGE, SMALL]), {})
    assert (two.world_size, two.device_name) == (2, read_hardware(tmp_path, 1, FakeNvml([SMALL]), {}).device_name)
    assert two.device_memory_free_bytes == SMALL.free < alone.device_memory_free_bytes
    assert two.cores == max(1, alone.cores // 2)
    with pytest.raises(MachineError, match="3 ranks take 3 cards, 2 can be used") as error:
        read_hardware(tmp_path, 3, FakeNvml([LARGE, SMALL]), {})
    assert "--ranks 2" in error.value.hint
    with pytest.raises(MachineError, match="2 ranks take 2 cards, 1 can be used: no other is visible"):
        read_hardware(tmp_path, 2, FakeNvml([LARGE, SMALL]), {"CUDA_VISIBLE_DEVICES": "1"})


def test_ranks_on_a_processor_share_its_memory_and_its_cores(tmp_path: Path) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    alone, three = (read_hardware(tmp_path, ranks, FakeNvml([]), hidden) for ranks in (1, 3))
    assert three.device_memory_free_bytes == pytest.approx(alone.device_memory_free_bytes / 3, rel=0.2)
    assert three.host_memory_available_bytes == pytest.approx(alone.host_memory_available_bytes, rel=0.2)
    assert three.cores == max(1, alone.cores // 3)


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\n", 2),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n", 5),
        ("memory.stat", "cache 0\n", 0),
    ],
)
def test_what_the_kernel_killed_for_memory_is_read_of_either_version(
    name: str, text: str, count: int, tmp_path: Path
) -> None:
    group = tmp_path / "sys" / "job"
    group.mkdir(parents=True)
    (group / name).write_text(text)
    (tmp_path / "cgroup").write_text("0::/job\n")
    (tmp_path / "mountinfo").write_text(f"30 20 0:26 / {tmp_path}/sys rw - cgroup2 cgroup2 rw\n")
    assert count_memory_kills(tmp_path) == count
