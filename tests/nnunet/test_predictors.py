"""Predictors by name from the entry-point group, one of them in a fake distribution, and options from outside."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from images import FAKE_PREDICTORS
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import ModelError, UsageError
from nnunet_lowmem.nnunet import predictors


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKE_PREDICTORS))


def test_own_predictor_is_found_and_lazily():
    program = "import sys; from nnunet_lowmem.nnunet import predictors; predictors.find('lowmem')\n"
    program += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert predictors.load("lowmem") is predictors.load("lowmem") is LowMemPredictor


def test_another_package_is_found(fake):
    predictor = predictors.load("echo")
    assert issubclass(predictor, nnUNetPredictor)
    assert predictor.__module__ == "fake_predictors"


def test_broken_plugin_is_named_with_its_error_and_skipped(fake, caplog):
    with caplog.at_level(logging.WARNING):
        assert sorted(predictors.predictors()) == ["echo", "lowmem"]
    assert "'broken'" in caplog.text
    assert "fake-predictors 1.0" in caplog.text
    assert "No module named 'fake_predictors_that_do_not_exist'" in caplog.text


def test_unknown_name_lists_those_that_exist(fake):
    with pytest.raises(UsageError, match=r"'nonsense'; installed are: echo, lowmem"):
        predictors.load("nonsense")


def test_broken_plugin_that_is_asked_for_is_refused(fake):
    with pytest.raises(UsageError, match=r"'broken' .* cannot be loaded: ModuleNotFoundError"):
        predictors.load("broken")


def test_options_come_from_the_environment(monkeypatch):
    for option, text in {"max_ram": "4G", "worker_timeout": "7.5", "kernel_threads": "1", "prefetch": "false"}.items():
        monkeypatch.setenv(f"nnUNet_lowmem_{option}", text)
    options = predictors.options("lowmem", LowMemPredictor)
    assert options == {"max_ram": "4G", "worker_timeout_s": 7.5, "kernel_threads": 1, "prefetch": False}


def test_another_predictor_has_variables_of_its_own(fake, monkeypatch):
    monkeypatch.setenv("nnUNet_lowmem_max_ram", "4G")
    monkeypatch.setenv("nnUNet_echo_volume", "11")
    assert predictors.options("echo", predictors.load("echo")) == {"volume": 11}


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("max_rma", "4G", "has no option 'max_rma'; it has: max_ram, max_vram"),
        ("on_plan", "print", "has no option 'on_plan'"),
        ("kernel_threads", "many", "nnUNet_lowmem_kernel_threads must be of type int"),
        ("prefetch", "perhaps", "must be of type bool"),
    ],
)
def test_wrong_variables_are_refused(monkeypatch, option, text, words):
    monkeypatch.setenv(f"nnUNet_lowmem_{option}", text)
    with pytest.raises(UsageError, match=words):
        predictors.options("lowmem", LowMemPredictor)


def test_options_of_the_plans_are_overruled_by_the_environment(monkeypatch):
    plans = {"predictor": "lowmem", "predictor_options": {"max_ram": "2G", "kernel_threads": 1}}
    assert predictors.options("lowmem", LowMemPredictor, plans) == {"max_ram": "2G", "kernel_threads": 1}
    monkeypatch.setenv("nnUNet_lowmem_max_ram", "4G")
    assert predictors.options("lowmem", LowMemPredictor, plans) == {"max_ram": "4G", "kernel_threads": 1}
    assert predictors.options("lowmem", LowMemPredictor, {**plans, "predictor": "other"}) == {"max_ram": "4G"}


def test_packages_to_trust_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("nnUNet_lowmem_trust", "mine, yours")
    assert predictors.options("lowmem", LowMemPredictor) == {"trust": ("mine", "yours")}


@pytest.mark.parametrize(
    "block", [["max_ram"], {"tmp_dir": "/etc"}, {"trust_model": True}, {"trust": "os"}, {"TRUST_MODEL": 1}]
)
def test_plans_cannot_choose_paths_nor_whom_to_trust(block):
    with pytest.raises((ModelError, UsageError), match=r"JSON object|not for a model|has no option 'TRUST"):
        predictors.options("lowmem", LowMemPredictor, {"predictor": "lowmem", "predictor_options": block})


def test_trace_file_is_no_option(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_lowmem_trace", str(tmp_path / "trace"))
    assert predictors.options("lowmem", LowMemPredictor) == {}
