"""Findings about this machine and environment, with one thing at a time made bad; real folders, limits and modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunet_lowmem.doctor import devices, environment, machine
from nnunet_lowmem.doctor.findings import Finding, Verdict
from nnunet_lowmem.system import memory_limits, platform
from nnunet_lowmem.system.memory_limits import RamLimit

GIB = 2**30
FINE, MIND, FAILS = Verdict.FINE, Verdict.MIND, Verdict.FAILS


def told(findings) -> dict[str, Finding]:
    return {finding.about: finding for finding in findings}


def of_machine(output: Path, tmp_dir: str | None = None) -> dict[str, Finding]:
    return told(machine.findings(output, tmp_dir))


def test_this_machine(tmp_path):
    """Nothing here fails, everything has a verdict, and nothing is left behind."""
    found = of_machine(tmp_path / "out", str(tmp_path))
    assert {"RAM", "temporary folder", "output folder", "cores", "processor"} <= set(found)
    assert not [finding for finding in found.values() if finding.verdict is FAILS]
    assert "free" in found["RAM"].seen
    assert "MB/s" in found["temporary folder"].seen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("free, verdict", [(GIB // 2, FAILS), (2 * GIB, MIND), (40 * GIB, FINE)])
def test_the_limit_that_binds_is_named_and_how_to_raise_it(free, verdict, monkeypatch):
    physical = RamLimit(memory_limits.PHYSICAL, 64 * GIB, 20 * GIB)
    slurm = RamLimit("SLURM_MEM_PER_NODE", 41 * GIB, 41 * GIB - free)
    monkeypatch.setattr(memory_limits, "ram_limits", lambda: [physical, slurm])
    (found,) = machine._ram()
    assert found.verdict is verdict
    assert "SLURM_MEM_PER_NODE 41.00 GiB binds (the machine has 64.00 GiB, 44.00 GiB free)" in found.seen
    assert ("sbatch --mem=" in found.advice) == (verdict is FAILS)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_a_temporary_folder_in_ram():
    found = of_machine(Path("."), "/dev/shm")["temporary folder"]
    assert (found.verdict, found.seen) == (MIND, "/dev/shm is kept in RAM")
    assert "--tmp_dir" in found.advice


def test_folders_that_will_not_do(tmp_path):
    (tmp_path / "file").write_text("")
    found = of_machine(tmp_path / "file" / "out", str(tmp_path / "none"))
    assert {about for about, finding in found.items() if finding.verdict is FAILS} == {
        "temporary folder",
        "output folder",
    }
    assert "is not a folder" in found["output folder"].seen


def test_an_output_file_is_where_it_lies(tmp_path):
    (tmp_path / "have.nii.gz").write_text("")
    assert of_machine(tmp_path / "have.nii.gz")["output folder"].verdict is FINE


def test_what_one_part_meets_leaves_the_others(tmp_path, monkeypatch):
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(machine, "try_output", refuse)
    monkeypatch.setattr(machine, "why_nothing_is_spilled", refuse)
    found = of_machine(tmp_path, str(tmp_path))
    for about in ("output folder", "temporary folder"):
        assert (found[about].verdict, "Permission denied" in found[about].seen) == (FAILS, True)
    assert "processor" in found


def test_a_small_disk_and_a_slow_one(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_limits, "free_disk_bytes", lambda path: 300 * 2**20)
    found = of_machine(tmp_path, str(tmp_path))
    assert [found[about].verdict for about in ("temporary folder", "output folder")] == [MIND, MIND]
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_written_bytes_per_s", lambda folder: 20e6)
    monkeypatch.setattr(machine, "_SMALL_TMP_BYTES", 0)
    found = of_machine(tmp_path, str(tmp_path))["temporary folder"]
    assert (found.verdict, "20 MB/s" in found.seen) == (MIND, True)


@pytest.mark.parametrize(
    "flags, verdict, words",
    [
        ("Xeon fpu avx2 avx512f avx512_bf16", FINE, "--fast bfloat16"),
        ("Xeon fpu avx2", FINE, "avx2"),
        ("Xeon fpu sse2 ssse3", MIND, "without AVX2"),
        ("Apple M3", FINE, "no x86"),
    ],
)
def test_processors(flags, verdict, words, monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: flags)
    (found,) = machine._processor()
    assert (found.verdict, words in found.seen) == (verdict, True)


def test_fewer_cores_than_there_are(monkeypatch):
    monkeypatch.setattr(platform, "usable_cores", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (found,) = machine._cores()
    assert (found.verdict, found.seen) == (MIND, "1 of 8 cores may be used")


def test_this_environment():
    found = told(environment.findings({}))
    assert not [finding for finding in found.values() if finding.verdict is FAILS]
    assert {"this package", "nnU-Net", "torch", "nnUNet_results"} <= set(found)


@pytest.mark.parametrize(
    "name, value, verdict, words",
    [
        ("nnUNet_results", "/none/at/all", MIND, "no folder of trained models"),
        ("nnUNet_results", "/", MIND, "no folder of trained models"),
        ("OMP_NUM_THREADS", "0", MIND, "is no number of threads"),
        ("nnUNet_npp", "many", MIND, "is no number: 3"),
        ("nnUNet_def_n_proc", "many", FAILS, "ends nnU-Net"),
        ("nnUNet_def_n_proc", "4", FINE, "at most 4 threads"),
        ("nnUNet_lowmem_max_ram", "lots", FAILS, "'lots' is not a memory size"),
        ("OMP_NUM_THREADS", "1", MIND, "1, of 4 cores"),
        ("OMP_NUM_THREADS", "4", None, ""),
        ("nnUNet_npp", "8", FINE, "8: processes that stock starts"),
        ("nnUNet_compile", "True", MIND, "compiles"),
        ("CUDA_VISIBLE_DEVICES", "", MIND, "hides every GPU"),
        ("nnUNet_lowmem_max_ram", "6G", FINE, "6G"),
        ("nnUNet_lowmem_max_rma", "6G", FAILS, "no such option"),
        ("nnUNet_predictor", "lowmem", FINE, "lowmem"),
        ("nnUNet_predictor", "nobody", FAILS, "no predictor 'nobody'"),
    ],
)
def test_variables(name, value, verdict, words, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(environment, "is_hook_installed", lambda: True)
    found = told(environment.findings({name: value})).get(name)
    assert (found and found.verdict) == verdict
    assert found is None or words in found.seen


def test_a_variable_without_its_hook(monkeypatch):
    monkeypatch.setattr(environment, "is_hook_installed", lambda: False)
    found = told(environment.findings({"nnUNet_predictor": "lowmem"}))["nnUNet_predictor"]
    assert (found.verdict, "hook is not installed" in found.seen) == (MIND, True)


def test_the_hook_is_found_by_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not environment.is_hook_installed()
    (tmp_path / environment.HOOK_FILE).write_text("")
    assert environment.is_hook_installed()


@pytest.mark.parametrize("is_on", [True, False])
def test_tools_that_would_use_it(is_on, tmp_path, monkeypatch):
    """A distribution as pip leaves it, of no files."""
    (tmp_path / "TotalSegmentator-2.18.0.dist-info").mkdir()
    (tmp_path / "TotalSegmentator-2.18.0.dist-info" / "METADATA").write_text(
        "Name: TotalSegmentator\nVersion: 2.18.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "is_hook_installed", lambda: True)
    found = told(environment.findings({"nnUNet_predictor": "lowmem"} if is_on else {}))["TotalSegmentator"]
    assert found.seen == f"2.18.0; its nnU-Net is {'this package' if is_on else 'stock'}"
    assert bool(found.advice) != is_on


@pytest.mark.parametrize(
    "package, version, verdict",
    [
        ("nnunetv2", "2.4.2", FAILS),
        ("nnunetv2", "3.0", FAILS),
        ("nnunetv2", "2.6.4 (nnunetv2-neuropoly)", FINE),
        ("nnunetv2", "unknown", MIND),
        ("torch", "2.5.1+cu121", MIND),
        ("torch", "2.0", FAILS),
        ("torch", "2.14.1", FINE),
    ],
)
def test_versions(package, version, verdict, monkeypatch):
    monkeypatch.setattr(environment, "version_of", lambda name: version if name == package else "2.8")
    about = {"nnunetv2": "nnU-Net", "torch": "torch"}[package]
    assert told(environment.findings({}))[about].verdict is verdict


def test_versions_that_are_judged_are_those_that_pip_asks_for():
    asked = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (least, below), (torch_least, _) = environment._NNUNET, environment._TORCH
    nnunet = f">={'.'.join(map(str, least))},<{'.'.join(map(str, below))}"
    assert f'"nnunetv2{nnunet}"' in asked
    assert f'"torch>={".".join(map(str, torch_least))}"' in asked


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    found = told(environment.findings({}))["nnU-Net"]
    assert (found.verdict, found.advice) == (FAILS, "pip install nnunetv2")


def test_kernels_that_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(devices.compiler, "cache_folder", lambda: tmp_path / "file" / "below")
    assert told(devices.findings())["compiled kernels"].verdict is MIND
    monkeypatch.setattr(devices.compiler, "cache_folder", lambda: tmp_path / "cache")
    assert told(devices.findings())["compiled kernels"].verdict is FINE
    assert list((tmp_path / "cache").iterdir()) == []


def test_gpus(monkeypatch):
    """torch is asked through stand-ins: there is no GPU here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "A card")

    def memory(number: int) -> tuple[int, int]:
        if number == 2:
            raise RuntimeError("CUDA error: out of memory\nand more")
        return (10 * GIB, GIB)[number], 12 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    found = told(devices.findings())
    assert [found[f"GPU {number}"].verdict for number in range(3)] == [FINE, MIND, FAILS]
    assert found["GPU 0"].seen == "A card, 10.00 GiB of 12.00 GiB free"


def test_a_value_that_an_option_does_not_take(monkeypatch):
    monkeypatch.setenv("nnUNet_lowmem_worker_timeout_s", "soon")
    found = told(devices.findings())["our variables"]
    assert (found.verdict, "'soon'" in found.seen) == (FAILS, True)


def test_a_hidden_gpu_is_no_reason_to_install_torch_again(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = told(devices.findings())["GPU"]
    assert (found.verdict, found.advice) == (FINE, "")


def test_mps(monkeypatch):
    """A stand-in: there is no Mac here."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    found = told(devices.findings())["MPS"]
    assert (found.verdict, found.seen) == (MIND, "torch sees Apple's GPU, macOS 15.1")


def test_a_driver_without_a_torch_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = told(devices.findings())["GPU"]
    assert (found.verdict, "torch sees no GPU" in found.seen) == (MIND, True)


def test_what_does_not_need_torch_loads_none():
    program = (
        "import sys; from pathlib import Path; from nnunet_lowmem.doctor import environment, machine\n"
        "list(environment.findings()); list(machine.findings(Path('.'), None))\n"
        "assert not {'torch', 'nnunetv2', 'numba', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
