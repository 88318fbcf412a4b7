"""Limits of memory; cgroups are faked files, the limits of ``setrlimit`` are real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.sizes import parse_size
from nnunet_lowmem.system import memory_held, memory_limits
from nnunet_lowmem.system.memory_held import process_tree_bytes
from nnunet_lowmem.system.memory_limits import (
    RamLimit,
    available_ram,
    free_disk_bytes,
    physical_ram,
    ram_limits,
    total_ram_bytes,
)

MIB = 2**20
GIB = 2**30
PHYSICAL_BYTES = psutil.virtual_memory().total
UNLIMITED_V1 = 9223372036854771712

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def fake_root(folder: Path, own: str, files: dict[str, object]) -> Path:
    """Write `own` as /proc/self/cgroup and `files` below /sys/fs/cgroup."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(own)
    for name, content in files.items():
        file = folder / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return folder


def stat(inactive_file: int) -> str:
    """Both names, as v1 has them: only the hierarchical one counts there."""
    return f"cache 999999\ninactive_file {inactive_file}\nactive_file 5\ntotal_inactive_file {2 * inactive_file}"


CGROUPS = {
    "v2, own group": (
        "0::/job\n",
        {"job/memory.max": GIB, "job/memory.current": 300 * MIB, "job/memory.stat": stat(100 * MIB)},
        ("job/memory.max", GIB, 200 * MIB),
    ),
    "v2, the parent is tighter because its other children use it": (
        "0::/slice/job\n",
        {
            "slice/job/memory.max": GIB,
            "slice/job/memory.current": 100 * MIB,
            "slice/memory.max": 2 * GIB,
            "slice/memory.current": 1900 * MIB,
        },
        ("slice/memory.max", 2 * GIB, 1900 * MIB),
    ),
    "v2, a sibling's limit is not ours": (
        "0::/job\n",
        {"other/memory.max": MIB, "job/memory.max": GIB, "job/memory.current": 0},
        ("job/memory.max", GIB, 0),
    ),
    "v2, own group says max, grandparent does not": (
        "0::/a/b/c\n",
        {"a/b/c/memory.max": "max", "a/b/memory.max": "max", "a/memory.max": GIB, "a/memory.current": 5},
        ("a/memory.max", GIB, 5),
    ),
    "v2, throttled before it is ended": (
        "0::/job\n",
        {"job/memory.max": 2 * GIB, "job/memory.high": GIB, "job/memory.current": 7},
        ("job/memory.high", GIB, 7),
    ),
    "v2, container that sees itself as the root": (
        "0::/\n",
        {"memory.max": GIB, "memory.current": 10},
        ("memory.max", GIB, 10),
    ),
    "v2, path of the host that is not mounted": (
        "0::/kubepods/pod1/abc\n",
        {"memory.max": GIB, "memory.current": 10},
        ("memory.max", GIB, 10),
    ),
    "v2, outside its namespace's root": (
        "0::/../job\n",
        {"memory.max": 2 * GIB, "memory.current": 10, "job/memory.max": GIB, "job/memory.current": 0},
        ("job/memory.max", GIB, 0),
    ),
    "v2, more used than allowed": (
        "0::/job\n",
        {"job/memory.max": GIB, "job/memory.current": 2 * GIB},
        ("job/memory.max", GIB, 2 * GIB),
    ),
    "v1, page cache of the whole subtree counts as free": (
        "5:cpu,cpuacct:/elsewhere\n4:memory:/job\n0::/\n",
        {
            "memory/job/memory.limit_in_bytes": GIB,
            "memory/job/memory.usage_in_bytes": 500 * MIB,
            "memory/job/memory.stat": stat(100 * MIB),
            "memory/memory.limit_in_bytes": UNLIMITED_V1,
        },
        ("memory/job/memory.limit_in_bytes", GIB, 300 * MIB),
    ),
    "v1, nested": (
        "4:hugetlb,memory:/slurm/uid_1/job_2/step_0\n",
        {
            "memory/slurm/uid_1/job_2/step_0/memory.limit_in_bytes": 3 * GIB,
            "memory/slurm/uid_1/job_2/memory.limit_in_bytes": 2 * GIB,
            "memory/slurm/uid_1/job_2/memory.usage_in_bytes": 1,
        },
        ("memory/slurm/uid_1/job_2/memory.limit_in_bytes", 2 * GIB, 1),
    ),
    "hybrid, the limit is in v2": (
        "1:name=systemd:/job\n0::/job\n",
        {"unified/job/memory.max": GIB, "unified/job/memory.current": 3},
        ("unified/job/memory.max", GIB, 3),
    ),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_the_cgroup_that_leaves_least_is_found(name: str, tmp_path: Path) -> None:
    own, files, (file, total_bytes, used_bytes) = CGROUPS[name]
    root = fake_root(tmp_path, own, files)
    limit = available_ram(root, environ={})
    assert limit == RamLimit(f"cgroup {root / 'sys/fs/cgroup' / file}", total_bytes, used_bytes)
    assert limit.free_bytes == max(0, total_bytes - used_bytes)


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/job\n", {}),
        ("0::/job\n", {"job/memory.max": "max", "memory.max": "max"}),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": UNLIMITED_V1}),
        ("4:cpu:/job\n", {"cpu/job/memory.limit_in_bytes": MIB, "memory/job/memory.limit_in_bytes": MIB}),
        ("0::/job\n", {"job/memory.max": "garbage", "job/memory.stat": "\nx y z\ninactive_file"}),
        ("", {"memory.max": MIB}),
        ("no colon at all\n0:only one\n", {"memory.max": MIB}),
    ],
)
def test_without_a_readable_limit_no_cgroup_binds(own: str, files: dict[str, object], tmp_path: Path) -> None:
    root = fake_root(tmp_path, own, files)
    assert [limit for limit in ram_limits(root, environ={}) if limit.source.startswith("cgroup")] == []


@pytest.mark.parametrize(
    ("own", "file"),
    [
        ("0::/job\n", "job/memory.max"),
        ("4:memory:/job\n", "memory/job/memory.limit_in_bytes"),
        (None, "memory.max"),  # in a container without /proc its own group is what is mounted
        (None, "memory/memory.limit_in_bytes"),
    ],
)
def test_cgroup_whose_usage_is_not_told_holds_at_least_this_process(own, file, tmp_path: Path) -> None:
    root = fake_root(tmp_path, own or "", {file: GIB})
    if own is None:
        (root / "proc/self/cgroup").unlink()
    limit = available_ram(root, environ={})
    assert limit is not None
    assert (limit.source, limit.total_bytes) == (f"cgroup {root / 'sys/fs/cgroup' / file}", GIB)
    assert abs(limit.used_bytes - process_tree_bytes()) < 20 * MIB


NOBODY = {"by_psutil": lambda ask: None, "sysconf_bytes": lambda name: None}


def test_physical_ram_is_asked_for_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "by_psutil", NOBODY["by_psutil"])
    limit = physical_ram()
    assert limit is not None
    assert abs(limit.total_bytes - PHYSICAL_BYTES) < 64 * MIB
    assert 0 < limit.free_bytes < PHYSICAL_BYTES


def test_where_nobody_tells_of_memory_there_is_no_bound_and_no_share_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, answer in NOBODY.items():
        monkeypatch.setattr(memory_limits, name, answer)
    assert physical_ram() is None
    assert available_ram(tmp_path, {}) is None
    assert total_ram_bytes(tmp_path, {}) is None
    assert parse_size("6G", None) == 6 * GIB
    with pytest.raises(UsageError, match="write a size instead"):
        parse_size("80%", None)


@linux_only
@pytest.mark.parametrize("status", ["VmData:\t  2048 kB\nVmSize:\t 4096 kB\n", ""], ids=["status", "psutil"])
def test_what_counts_against_process_limits_is_never_taken_for_nothing(status: str, monkeypatch) -> None:
    """In gVisor ``statm``, and so psutil, has 0 for data."""
    memory = psutil.Process().memory_info()._replace(data=0)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: memory)
    monkeypatch.setattr(memory_held, "_read", lambda path: status.encode())
    used = {name: getattr(memory_limits, name)() for name in ("_data_bytes", "_address_bytes", "_resident_bytes")}
    told = (2 * MIB, 4 * MIB, memory.rss) if status else (memory.rss, memory.vms, memory.rss)
    assert tuple(used.values()) == told


@pytest.mark.parametrize(
    ("source", "name", "remedy"),
    [
        ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_NODE 1.00 GiB", "raise it to 1.50 GiB or more (sbatch --mem=1536M)"),
        ("RLIMIT_DATA", "ulimit -d (RLIMIT_DATA) 1.00 GiB", "raise it to 1.50 GiB or more (ulimit -d 1572864)"),
        ("RLIMIT_AS", "ulimit -v (RLIMIT_AS) 1.00 GiB", "raise it to 1.50 GiB or more (ulimit -v 1572864)"),
        ("cgroup /sys/fs/cgroup/job/memory.max", "the cgroup's memory.max 1.00 GiB (/sys/fs/cgroup/job)", "1536 MiB"),
        ("physical RAM", "physical RAM 1.00 GiB", "0.50 GiB more must be free"),
    ],
)
def test_limit_is_named_as_whoever_set_it_knows_it(source: str, name: str, remedy: str) -> None:
    limit = RamLimit(source, GIB, 5)
    assert limit.in_words() == name
    assert remedy in limit.raised_by(GIB // 2)


@pytest.mark.parametrize("needed_bytes", [0, 1, 100 * MIB, 3 * GIB, 400 * GIB])
def test_what_must_be_free_leaves_what_is_needed_and_not_much_more(needed_bytes: int) -> None:
    free_bytes = memory_limits.with_headroom(needed_bytes)
    assert needed_bytes <= memory_limits.less_headroom(free_bytes) <= needed_bytes + 1


def test_without_proc_physical_ram_is_left(tmp_path: Path) -> None:
    limits = ram_limits(tmp_path / "nothing", environ={})
    assert limits[0].source == "physical RAM"
    assert limits[0].total_bytes == PHYSICAL_BYTES
    assert 0 < limits[0].free_bytes < PHYSICAL_BYTES


@linux_only
def test_the_real_machine_can_be_asked() -> None:
    assert 0 < available_ram().free_bytes < total_ram_bytes() <= PHYSICAL_BYTES


@pytest.mark.parametrize(
    ("environ", "source", "total_bytes"),
    [
        ({"SLURM_MEM_PER_NODE": "2000"}, "SLURM_MEM_PER_NODE", 2000 * MIB),
        (
            {"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "4"},
            "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE",
            2000 * MIB,
        ),
        (
            {"SLURM_MEM_PER_GPU": "700", "SLURM_GPUS_ON_NODE": "2"},
            "SLURM_MEM_PER_GPU x SLURM_GPUS_ON_NODE",
            1400 * MIB,
        ),
    ],
)
def test_slurm_allocation_less_what_this_tree_uses(
    environ: dict[str, str], source: str, total_bytes: int, tmp_path: Path
) -> None:
    limit = available_ram(tmp_path, environ)
    assert (limit.source, limit.total_bytes) == (source, total_bytes)
    assert abs(limit.used_bytes - process_tree_bytes()) < 20 * MIB
    assert total_ram_bytes(tmp_path, environ) == total_bytes


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_MEM_PER_NODE": "0"},  # all of the node
        {"SLURM_MEM_PER_NODE": ""},
        {"SLURM_MEM_PER_NODE": "lots"},
        {"SLURM_MEM_PER_NODE": "-5"},
        {"SLURM_MEM_PER_CPU": "500"},  # of how many CPUs is not known
        {"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "4(x2)"},
    ],
)
def test_slurm_without_a_number_does_not_bind(environ: dict[str, str], tmp_path: Path) -> None:
    assert [limit for limit in ram_limits(tmp_path, environ) if "SLURM" in limit.source] == []


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@linux_only
@pytest.mark.parametrize("name", ["RLIMIT_DATA", "RLIMIT_AS", "RLIMIT_RSS"])
def test_a_real_process_limit_binds_by_what_it_leaves(name: str) -> None:
    source, free_bytes, total_bytes = run_python(
        f"import resource; from nnunet_lowmem.system.memory_limits import available_ram, total_ram_bytes\n"
        f"resource.setrlimit(resource.{name}, ({GIB}, {GIB}))\n"
        "held = bytearray(200 * 2**20)\n"
        "limit = available_ram(environ={})\n"
        "print(limit.source, limit.free_bytes, total_ram_bytes(environ={}))"
    ).split()
    assert source == name
    assert int(total_bytes) == GIB
    assert GIB // 4 < int(free_bytes) < GIB - 200 * MIB


@linux_only
def test_what_rlimit_data_leaves_can_be_had_and_not_more() -> None:
    out = run_python(
        f"import resource; from nnunet_lowmem.system.memory_limits import available_ram\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({GIB}, {GIB}))\n"
        "free = available_ram(environ={}).free_bytes\n"
        "held = bytearray(free - 2**20); del held\n"
        "try: bytearray(free + 2**20)\n"
        "except MemoryError: print('refused')"
    )
    assert out.split() == ["refused"]


@linux_only
def test_importing_memory_brings_in_neither_torch_nor_numpy() -> None:
    out = run_python(
        "import sys, nnunet_lowmem.system.memory_limits\n"
        "print([name for name in ('torch', 'numpy', 'nnunetv2') if name in sys.modules])"
    )
    assert out.strip() == "[]"


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    free_bytes = free_disk_bytes(tmp_path / "not" / "yet")
    assert free_bytes > 0
    assert abs(free_bytes - psutil.disk_usage(str(tmp_path)).free) < GIB
