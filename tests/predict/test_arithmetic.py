"""``--fast bfloat16`` from files to files: how far its labels are from stock's, when it is used, what is kept of it."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from factory import ModelSpec
from images import BUNDLED_MODEL, CT, DATA, read
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import make_predictor, predict_stock, read_voxels, recorded

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.network import choices
from nnunet_lowmem.network.trial import Trial
from nnunet_lowmem.predict import ways
from nnunet_lowmem.system import compiler

pytestmark = pytest.mark.timeout(240)

FASTER = Trial(2.0, 1.0, 0.01, 0.999)
SLOWER = Trial(1.0, 2.0, 0.01, 0.999)
MR = ModelSpec(labels=5, mirror_axes=(1,))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cache for choices alone: kernels, compiled anew, would take half a minute."""
    folder = tmp_path / "choices"
    monkeypatch.setattr(choices, "compiler", SimpleNamespace(cache_folder=lambda: folder, keep=compiler.keep))
    return folder


@pytest.fixture
def found(monkeypatch):
    """Let a trial find what is set here: what a machine would find depends on the machine."""
    held = {"trial": FASTER, "count": 0}

    def try_both(*_: Any, **__: Any) -> Trial:
        held["count"] += 1
        return held["trial"]

    monkeypatch.setattr(ways, "try_both", try_both)
    return held


def predict(predictor: Any, files: list[str], out: Path, **options: Any) -> np.ndarray:
    out.parent.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files([files], [str(out)], **options)
    return read_voxels(out.with_name(out.name + ".nii.gz"))


def arithmetics(folder: Path) -> list[str]:
    return [record["arithmetic"] for record in recorded(folder)]


def dice(stock: np.ndarray, ours: np.ndarray, least_voxels: int) -> np.ndarray:
    sizes = [np.bincount(labels.ravel(), minlength=118) for labels in (stock, ours)]
    there = sizes[0] > least_voxels
    return 2 * np.bincount(stock[stock == ours], minlength=118)[there] / (sizes[0] + sizes[1])[there]


def folds_of_the_bundled_model(folder: Path) -> Path:
    shutil.copytree(BUNDLED_MODEL, folder)
    shutil.copytree(DATA / "ct118_fold_1", folder / "fold_1")
    return folder


@pytest.mark.parametrize(
    "part", [np.s_[20:100, 20:90, 40:90], pytest.param(np.s_[:], marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_labels_are_close_to_stocks_on_the_real_ct(part, tmp_path, found, caplog):
    SimpleITK.WriteImage(read(CT)[part], str(tmp_path / "ct_0000.nii.gz"))
    model, files = folds_of_the_bundled_model(tmp_path / "model"), [str(tmp_path / "ct_0000.nii.gz")]
    is_whole = part == np.s_[:]
    stock = make_predictor(nnUNetPredictor, str(model), (0, 1), use_mirroring=is_whole)
    ours = make_predictor(LowMemPredictor, str(model), (0, 1), fast="bfloat16", use_mirroring=is_whole)
    predict_stock(stock, [files], [str(tmp_path / "stock")])
    expected = read_voxels(tmp_path / "stock.nii.gz")
    with caplog.at_level(logging.INFO):
        labels = predict(ours, files, tmp_path / "ours")
    assert "fast bfloat16 chosen" in caplog.text
    assert arithmetics(tmp_path) == ["bfloat16"]
    scores = dice(expected, labels, 500)
    print(f"{np.count_nonzero(expected != labels)} of {labels.size} differ; {len(scores)} classes, {scores.min():.4f}")
    assert len(scores) > 20, "hardly a class is there to compare"
    assert 0 < np.mean(expected != labels) <= 0.001
    assert scores.mean() >= 0.998
    assert scores.min() >= 0.97


NETWORKS = {
    "plain": ModelSpec(labels=5, mirror_axes=(0, 2)),
    "residual encoder": ModelSpec(labels=5, architecture="ResidualEncoderUNet", mirror_axes=(0,)),
    "two-dimensional": ModelSpec(labels=5, patch_size=(28, 20), spacing=(4.2, 4.3), mirror_axes=(0, 1)),
    "regions": ModelSpec(labels={"background": 0, "all": [1, 2], "one": [2]}, regions_class_order=(1, 2)),
    "two folds": ModelSpec(labels=5, folds=(0, 1)),
}


SLOW = ["two-dimensional", "residual encoder"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS])
def test_networks_of_all_kinds(name, models, images, tmp_path, found):
    files, folds = images("head"), (0, 1) if "folds" in name else (0,)
    model = models(NETWORKS[name], files)
    exact, half = (make_predictor(LowMemPredictor, model, folds, fast=fast) for fast in (False, "bfloat16"))
    maps = [predict(predictor, files, tmp_path / str(n)) for n, predictor in enumerate((exact, half))]
    assert arithmetics(tmp_path) == ["exact", "bfloat16"]
    assert len(np.unique(maps[0])) > 1
    assert np.mean(maps[0] == maps[1]) >= 0.98


def test_a_trial_decides_and_is_kept_for_other_processes(models, images, tmp_path, caplog, own_cache):
    """The only one here that is not told what to find."""
    files = images("head")
    model = models(MR, files)
    with caplog.at_level(logging.INFO):
        predict(make_predictor(LowMemPredictor, model, fast="bfloat16"), files, tmp_path / "first" / "a")
    (line,) = [text for text in caplog.messages if text.startswith("fast bfloat16")]
    chosen = "bfloat16" if " chosen" in line.replace("not chosen", "") else "float32"
    (file,) = own_cache.iterdir()
    assert Trial(**json.loads(file.read_text())).chooses == (chosen == "bfloat16")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        predict(make_predictor(LowMemPredictor, model, fast="bfloat16"), files, tmp_path / "second" / "a")
    assert [text for text in caplog.messages if text.startswith("fast bfloat16")] == [
        line.replace("fast bfloat16", "fast bfloat16 earlier")
    ]
    assert arithmetics(tmp_path / "first") == arithmetics(tmp_path / "second") == [chosen]


def test_a_slow_one_runs_in_float32(models, images, tmp_path, found):
    files, found["trial"] = images("head"), SLOWER
    model = models(MR, files)
    half, single = (make_predictor(LowMemPredictor, model, fast=fast) for fast in ("bfloat16", True))
    maps = [predict(half, files, tmp_path / "a" / "x"), predict(single, files, tmp_path / "b" / "x")]
    assert np.array_equal(*maps)
    assert arithmetics(tmp_path / "a") == ["float32"]
    predict(half, files, tmp_path / "a" / "y")
    assert found["count"] == 1, "the same network is tried once"


def test_a_continued_run_keeps_the_arithmetic_of_its_files(models, images, tmp_path, found, own_cache, caplog):
    files = images("head")
    model = models(MR, files)
    predict(make_predictor(LowMemPredictor, model, fast="bfloat16"), files, tmp_path / "out" / "a")
    shutil.rmtree(own_cache)  # another machine goes on, which would choose otherwise
    found["trial"], found["count"] = SLOWER, 0
    other = make_predictor(LowMemPredictor, model, fast="bfloat16")
    with caplog.at_level(logging.INFO):
        predict(other, files, tmp_path / "out" / "b", overwrite=False)
    assert arithmetics(tmp_path / "out") == ["bfloat16", "bfloat16"]
    assert found["count"] == 0
    assert "the network is run as for the files in" in caplog.text
    other.network.encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match="were made with the network in bfloat16, and would be continued otherwise"):
        predict(other, files, tmp_path / "out" / "c", overwrite=False)


def test_what_torch_has_no_bfloat16_for_runs_exactly(models, images, tmp_path, monkeypatch, caplog):
    """Made up. The weights have had their channels put last by then, which stock's sums are not made with."""
    files = images("head")
    model = models(MR, files)

    def unknown(*_, **__):
        raise NotImplementedError("\"some_layer\" not implemented for 'BFloat16'")

    monkeypatch.setattr(ways, "try_both", unknown)
    image = torch.randn((1, 30, 40, 30), generator=torch.Generator().manual_seed(0))
    half, exact = (make_predictor(LowMemPredictor, model, fast=fast) for fast in ("bfloat16", False))
    assert torch.equal(*(p.predict_sliding_window_return_logits(image) for p in (half, exact)))
    assert "fast bfloat16: the network runs as it does without" in caplog.text
    half = make_predictor(LowMemPredictor, model, fast="bfloat16")
    predict(half, files, tmp_path / "a")
    assert arithmetics(tmp_path) == ["exact"]


def test_whoever_watches_has_stocks_network(models, images, tmp_path, found, caplog):
    files = images("head")
    model = models(MR, files)
    exact, half = (make_predictor(LowMemPredictor, model, fast=fast) for fast in (False, "bfloat16"))
    seen: list[Any] = []
    half.network.encoder.register_forward_hook(lambda *_: seen.append(1))
    maps = [predict(exact, files, tmp_path / "exact"), predict(half, files, tmp_path / "half")]
    assert np.array_equal(*maps)
    assert seen
    assert "fast bfloat16: the network runs as it does without: a hook is registered on encoder" in caplog.text
    assert arithmetics(tmp_path) == ["exact", "exact"]


def test_whoever_overrides_runs_the_network(models, images, tmp_path, found, caplog):
    class Overriding(LowMemPredictor):
        def _internal_maybe_mirror_and_predict(self, x):
            return super()._internal_maybe_mirror_and_predict(x)

    files = images("head")
    model = models(MR, files)
    maps = [
        predict(make_predictor(cls, model, fast=fast), files, tmp_path / cls.__name__)
        for cls, fast in ((LowMemPredictor, False), (Overriding, "bfloat16"))
    ]
    assert np.array_equal(*maps)
    assert "without --fast" in caplog.text


def test_one_predictor_may_change_its_arithmetic(models, images, tmp_path, found):
    """The weights' order in memory decides which sums oneDNN makes: it has to come back."""
    files = images("head")
    predictor = make_predictor(LowMemPredictor, models(MR, files))
    before = predict(predictor, files, tmp_path / "a")
    for number, fast in enumerate((True, "bfloat16")):
        predictor.fast = fast
        predict(predictor, files, tmp_path / f"b{number}")
        predictor.fast = False
        image = np.random.default_rng(0).standard_normal((1, 30, 40, 30), dtype=np.float32)
        fresh = make_predictor(LowMemPredictor, models(MR, files))
        logits = [p.predict_sliding_window_return_logits(torch.from_numpy(image)) for p in (predictor, fresh)]
        assert torch.equal(*logits)
    assert np.array_equal(predict(predictor, files, tmp_path / "c"), before)


def test_logits_of_an_array_are_close(models, images, found):
    model = models(MR, images("head"))
    image = torch.randn((1, 30, 40, 30), generator=torch.Generator().manual_seed(0))
    exact, half = (
        make_predictor(LowMemPredictor, model, fast=fast).predict_sliding_window_return_logits(image).float()
        for fast in (False, "bfloat16")
    )
    assert 0 < (half - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("wrong", ["float16", "", "yes please"])
def test_what_is_no_arithmetic_is_refused(wrong):
    with pytest.raises(UsageError, match="fast must be True, False or 'bfloat16'"):
        LowMemPredictor(device=torch.device("cpu"), fast=wrong)


def test_a_processor_without_bfloat16_is_found_out(models, images, tmp_path):
    """Real: oneDNN is told to use no more than AVX2, where torch's own bfloat16 convolutions run."""
    if "avx512" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no bfloat16 that could be taken away")
    files = images("head")
    model, out = models(ModelSpec(labels=5, features=(16, 32, 32), patch_size=(32, 32, 32)), files), tmp_path / "out"
    program = "import sys; from nnunet_lowmem.commands.cli import predict_entry_point as run; sys.exit(run())"
    flags = ["-f", "0", "-device", "cpu", "--disable_tta", "--fast", "bfloat16"]
    command = [sys.executable, "-c", program, "-i", str(Path(files[0]).parent), "-o", str(out), "-m", model, *flags]
    kernels = compiler.cache_folder()
    shutil.copytree(kernels, tmp_path / "cache" / kernels.parent.name / kernels.name)
    environ = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    environ["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search("fast bfloat16 not chosen, the network runs in float32: a (part of a )?tile takes", done.stdout)
    assert arithmetics(out) == ["float32"]


# -- the exact default


def with_denormals(model: str, folder: Path, change) -> Path:
    """A copy of a model whose first convolution was changed."""
    shutil.copytree(model, folder)
    (file,) = folder.glob("fold_0/*.pth")
    checkpoint = torch.load(file, weights_only=False)
    weights = checkpoint["network_weights"]
    for name, values in weights.items():  # a layer has several names
        if "encoder.stages.0" in name and values.ndim == 5:
            change(values)
        elif name.endswith("bias") and change is smallest_filters:
            values.zero_()
    torch.save(checkpoint, file)
    return folder


def small_half(weights: torch.Tensor) -> None:
    weights[torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)) < 0.5] *= 1e-40


def smallest_filters(weights: torch.Tensor) -> None:
    weights[:] = weights.sign() * 1e-42


@pytest.mark.parametrize(
    "change, words",
    [(small_half, "has the same bits: they are left out"), (smallest_filters, "has other bits: they stay")],
)
def test_denormal_weights_are_left_out_where_no_bit_changes(change, words, models, images, tmp_path, caplog):
    """Where all of a layer's are denormal, and nothing is added anywhere, logits are made of nothing else."""
    files = images("head")
    model = str(with_denormals(models(MR, files), tmp_path / "model", change))
    image = torch.randn((1, 30, 40, 30), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO):
        stock, ours = (make_predictor(cls, model) for cls in (nnUNetPredictor, LowMemPredictor))
        assert torch.equal(*(p.predict_sliding_window_return_logits(image) for p in (stock, ours)))
    assert "weights are below 1.2e-38, which many processors are slow with" in caplog.text
    assert words in caplog.text
    first = ours.network.state_dict()["encoder.stages.0.0.convs.0.conv.weight"]
    assert ((first != 0) & (first.abs() < torch.finfo(torch.float32).tiny)).any(), "the network's own weights changed"


def test_nothing_is_proven_by_a_constant_tile(models, images, tmp_path, caplog):
    files = images("head")
    model = str(with_denormals(models(MR, files), tmp_path / "model", small_half))
    predictor = make_predictor(LowMemPredictor, model)
    with caplog.at_level(logging.INFO):
        predictor.predict_sliding_window_return_logits(torch.full((1, 30, 40, 30), 2.0))
    assert "same bits" not in caplog.text


def test_plain_attributes_of_the_network_may_change(models, images):
    model = models(MR, images("head"))
    image = torch.randn((1, 30, 40, 30), generator=torch.Generator().manual_seed(0))
    both = [make_predictor(cls, model) for cls in (nnUNetPredictor, LowMemPredictor)]
    for slope in (0.01, 0.5):
        for predictor in both:
            for layer in predictor.network.modules():
                if isinstance(layer, torch.nn.LeakyReLU):
                    layer.negative_slope = slope
        assert torch.equal(*(predictor.predict_sliding_window_return_logits(image) for predictor in both))


def test_autocast_on_the_cpu_is_stocks(models, images):
    model = models(MR, images("head"))
    image = torch.randn((1, 30, 40, 30), generator=torch.Generator().manual_seed(0))
    both = [make_predictor(cls, model) for cls in (nnUNetPredictor, LowMemPredictor)]
    both[1].predict_sliding_window_return_logits(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*(predictor.predict_sliding_window_return_logits(image) for predictor in both))


def test_a_copy_of_a_fast_predictor_is_exact_when_told_so(models, images):
    model = models(MR, images("head"))
    image = torch.randn((1, 30, 40, 30), generator=torch.Generator().manual_seed(0))
    fast = make_predictor(LowMemPredictor, model, fast=True)
    fast.predict_sliding_window_return_logits(image)
    other = copy.deepcopy(fast)
    other.fast = False
    exact = make_predictor(nnUNetPredictor, model)
    assert torch.equal(*(predictor.predict_sliding_window_return_logits(image) for predictor in (other, exact)))
