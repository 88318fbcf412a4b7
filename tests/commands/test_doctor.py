"""``nnunet-lowmem doctor`` as somebody with a failed run would use it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import ModelSpec

from nnunet_lowmem.commands import cli
from nnunet_lowmem.commands.doctor import _typed
from nnunet_lowmem.doctor.advice import RAM_SIZES, VRAM_SIZES

LOGS = Path(__file__).parents[1] / "data" / "logs"


@pytest.fixture
def model(images, models) -> list[str]:
    """Flags of a real model and a folder with a real image."""
    files = images("head")
    return ["-m", str(models(ModelSpec(), files)), "-i", str(Path(files[0]).parent), "-device", "cpu"]


def doctor(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["doctor", *arguments])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_a_failed_log_tells_why_and_what_to_type(capsys):
    code, out, _ = doctor(capsys, str(LOGS / "preproc_zero_byte.txt"))
    assert code == 1
    assert "What happened: an image that cannot be read line 37" in out
    assert "Which led to: a preprocessing worker has gone (line 55)" in out
    assert "the others at once: nnUNetv2_predict_lowmem FLAGS" in out


def test_with_the_flags_of_the_run_the_command_is_whole(model, capsys):
    code, out, _ = doctor(capsys, str(LOGS / "export_killed.txt"), *model, "-f", "0", "-o", "my out")
    assert code == 1
    command = " ".join(["nnUNetv2_predict_lowmem", *model, "-f", "0", "-o", "'my out'"])
    assert f"What to type now {command}" in out
    assert f"{command} --estimate" in out
    assert "The case: head" in out


def test_a_good_log_and_one_of_nothing_known(tmp_path, capsys):
    code, out, _ = doctor(capsys, str(LOGS / "ok_stock.txt"))
    assert (code, "nothing is missing" in out, "FLAGS --continue_prediction" in out) == (0, True, True)
    (tmp_path / "log").write_text("a stranger's words\n")
    code, out, _ = doctor(capsys, str(tmp_path / "log"))
    assert (code, "None of the known troubles" in out, "a stranger's words" in out) == (0, True, True)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["none.txt"], "none.txt cannot be read"),
        (["-i", "."], "say which model"),
        (["-device", "nonsense"], "-device"),
        (["--max_ram", "nonsense"], "--max_ram"),
        (["-step_size", "4"], "-step_size"),
        (["-m", "none"], "not a trained model folder"),
        (["-d", "4"], "-c CONFIG"),
    ],
)
def test_usage(arguments, word, capsys):
    code, out, err = doctor(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert word in err
    assert len(err.splitlines()) == 1


def test_a_model_without_checkpoints_is_named_behind_the_log(model, tmp_path, capsys):
    shutil.copytree(model[1], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "fold_0")
    code, out, err = doctor(capsys, str(LOGS / "main_killed.txt"), "-m", str(tmp_path / "model"))
    assert (code, "What happened: killed" in out, "no checkpoint_final.pth at all" in err) == (2, True, True)


def test_model_and_images_as_json(model, images, models, tmp_path, capsys):
    """Beside a model of three folds with denormal weights lie another configuration and what is none."""
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    shutil.copytree(model[1], folder)
    shutil.copytree(model[1], tmp_path / "nnUNetTrainer__nnUNetPlans__3d_lowres")
    (tmp_path / "nnUNetTrainer__nnUNetPlans__2d").mkdir()
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    values = next(value for value in checkpoint["network_weights"].values() if value.ndim == 5)
    values.view(-1)[:] = float(np.float32(1e-40))
    torch.save(checkpoint, file)
    code = cli.main(["doctor", "-m", str(folder), *model[2:], "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0
    case = told["largest_case"]
    assert (case["case"], case["fits"]) == ("head", True)
    assert set(case["stages"]) == {"preprocessing", "prediction", "export"}
    assert all(stage["stock_bytes"] > stage["bytes"] > 2**28 for stage in case["stages"].values())
    assert {(cell["ram_gib"], cell["vram_gib"]) for cell in case["hardware"]} == {
        (ram, vram) for ram in RAM_SIZES for vram in (0, *VRAM_SIZES)
    }
    assert all(cell["fits"] for cell in case["hardware"])
    assert list(told["other_configurations"]) == ["nnUNetTrainer__nnUNetPlans__3d_lowres"]
    (weights,) = told["findings"]
    assert (weights["about"], weights["verdict"]) == ("weights", "mind this")
    assert f"{values.numel():,} of" in weights["seen"]


def test_an_error_behind_the_log_leaves_what_was_found_as_json(capsys):
    code = cli.main(["doctor", str(LOGS / "main_killed.txt"), "-m", "none", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["log"]["troubles"][0]["name"]) == (2, "killed")
    assert "not a trained model folder" in told["error"]


def test_a_gpu_that_is_not_here_is_told_and_the_case_is_planned_all_the_same(model, capsys):
    """Flags are those of the command for model folders, where -d is short for -device."""
    code, out, _ = doctor(capsys, *model[:4], "-d", "cuda")
    assert (code, "sees no CUDA device here" in out, "Machines that carry it" in out) == (1, True, True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="root may read everything")
def test_a_model_that_may_not_be_read(model, tmp_path, capsys):
    shutil.copytree(model[1], tmp_path / "model")
    (tmp_path / "model").chmod(0)
    code, _, err = doctor(capsys, "-m", str(tmp_path / "model"))
    (tmp_path / "model").chmod(0o755)
    assert (code, "cannot be read: Permission denied" in err) == (2, True)


@pytest.mark.parametrize(
    "given",
    ["{log} -m out -i in", "-m out -i in {log}", "-m out -i in --disable_tta {log}", "{log} -m out -i in --json"],
)
def test_the_log_is_no_word_of_the_command(given):
    """Whatever its name."""
    options = argparse.Namespace(i="in", m="out", d=None, log="out", o="x")
    rest = [word for word in given.split() if word not in ("{log}", "--json")]
    assert _typed(options, given.format(log="out").split()).split() == ["nnUNetv2_predict_lowmem", *rest]


def test_a_variable_that_no_command_takes_is_found_and_not_met(capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_lowmem_max_ram", "lots")
    code, out, _ = doctor(capsys)
    assert (code, "this will fail nnUNet_lowmem_max_ram 'lots' is not a memory size" in out) == (1, True)


def test_a_case_that_does_not_fit(model, capsys):
    code, out, _ = doctor(capsys, *model, "--max_ram", "300M")
    assert (code, "raise --max_ram to" in out, "Machines that carry it" in out) == (1, True, True)


def test_first_lines_stand_within_a_second(tmp_path):
    """In a process of its own, with its output in a pipe, as a user's."""
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "nnunet_lowmem", "doctor", "-o", str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first, first_s = process.stdout.readline(), time.monotonic() - started
        rest = process.stdout.read()
    assert process.returncode == 0
    assert first.startswith("fine")
    assert "GPU" in rest
    assert first_s < 5, "one second on an idle machine; tests run beside others"
