"""Networks of clients see exactly stock's tiles, in stock's order, and make stock's labels."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import ModelSpec
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import INSTALLED, assert_same_array, make_predictor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import BudgetError
from nnunet_lowmem.network.tile_memory import tensor_bytes

Change = Callable[[nnUNetPredictor, list[str]], Any]


@pytest.fixture(scope="module")
def model(images, models) -> str:
    return models(ModelSpec(patch_size=(20, 24, 28), mirror_axes=(1,), spacing=(5.0, 5.0, 5.0)), images("head"))


@pytest.fixture(scope="module")
def array(images) -> tuple[np.ndarray, dict[str, Any]]:
    image, properties = SimpleITKIO().read_images(images("head"))
    return image[:, :30, :34, :34], properties


def seen(value: torch.Tensor) -> str:
    """What a client sees of a tensor; its content, type and shape."""
    return f"{value.dtype}{tuple(value.shape)}{hashlib.sha1(value.float().numpy().tobytes()).hexdigest()}"


class Wrapped(nn.Module):
    """A client's network around nnU-Net's: `way` makes the output of (network, tile, number of the call)."""

    def __init__(self, inner: nn.Module, way: Callable[[nn.Module, torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.way, self.calls = inner, way, 0

    def forward(self, tile: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.way(self.inner, tile, self.calls)

    def load_state_dict(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.load_state_dict(weights, *args, **kwargs)


class Session:
    """What runs elsewhere (ONNX Runtime, TensorRT): no Module, with what stock calls and nothing else."""

    def __init__(self, network: nn.Module, log: list[str]) -> None:
        self._run, self._load, self._log = network.forward, network.load_state_dict, log

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        self._log.append(seen(tile))
        return self._run(tile)

    def to(self, device: torch.device) -> Session:
        return self

    def eval(self) -> Session:
        return self

    def load_state_dict(self, weights: Any) -> None:
        self._log.append(type(weights).__name__)
        if isinstance(weights, dict):
            self._load(weights)


def wrapped(way: Callable[[nn.Module, torch.Tensor, int], torch.Tensor]) -> Change:
    def change(predictor: nnUNetPredictor, log: list[str]) -> None:
        predictor.network = Wrapped(predictor.network, way)

    return change


def keeps_its_output(predictor: nnUNetPredictor, log: list[str]) -> None:
    """Returns one buffer for every tile, as a session with bound outputs does."""
    buffers: list[torch.Tensor] = []

    def way(network: nn.Module, tile: torch.Tensor, call: int) -> torch.Tensor:
        output = network(tile)
        buffers.extend([] if buffers else [torch.zeros(output.shape)])
        return buffers[0].copy_(output)

    predictor.network = Wrapped(predictor.network, way)


def remembers_its_outputs(predictor: nnUNetPredictor, log: list[str]) -> None:
    """Gives the very tensor of the first call once more: stock has multiplied it by the importance meanwhile."""
    first: list[torch.Tensor] = []

    def way(network: nn.Module, tile: torch.Tensor, call: int) -> torch.Tensor:
        first.extend([] if first else [network(tile)])
        return first[0] if call in (1, 5) else network(tile)

    predictor.network = Wrapped(predictor.network, way)


def session(parameters: Any) -> Change:
    def change(predictor: nnUNetPredictor, log: list[str]) -> None:
        predictor.network = Session(predictor.network, log)
        predictor.list_of_parameters = parameters

    return change


def hooked(where: Callable[[nn.Module], nn.Module], after: bool = True) -> Change:
    """Collects what goes in or comes out, and looks at it when all is over."""

    def change(predictor: nnUNetPredictor, log: list[str]) -> Callable[[], None]:
        collected: list[torch.Tensor] = []
        module = where(predictor.network)
        if after:
            module.register_forward_hook(lambda module, inputs, output: collected.append(output))
        else:
            module.register_forward_pre_hook(lambda module, inputs: collected.append(inputs[0]))
        return lambda: log.extend(map(seen, collected))

    return change


def on_predictor(change: Callable[[nnUNetPredictor], Any]) -> Change:
    return lambda predictor, log: change(predictor) and None


def patched_forward(predictor: nnUNetPredictor, log: list[str]) -> None:
    forward = predictor.network.forward

    def logging_forward(tile: torch.Tensor) -> torch.Tensor:
        log.append(seen(tile))
        return forward(tile) * 2

    predictor.network.forward = logging_forward


def override(predictor: nnUNetPredictor, log: list[str]) -> None:
    """Counts tiles in a method of an instance, and changes the tile in place afterwards."""
    stocks = predictor._internal_maybe_mirror_and_predict

    def method(tile: torch.Tensor) -> torch.Tensor:
        log.append(seen(tile))
        logits = stocks(tile)
        tile.zero_()
        return logits

    predictor._internal_maybe_mirror_and_predict = method


def watching_all_modules(predictor: nnUNetPredictor, log: list[str]) -> Callable[[], None]:
    calls: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: calls.append(f"{type(module).__name__} {len(inputs)} {inputs[0].__class__}")
    )

    def over() -> None:
        handle.remove()
        log.append(str(calls))

    return over


def counting_flops(predictor: nnUNetPredictor, log: list[str]) -> Callable[[], None]:
    mode = FlopCounterMode(display=False)
    mode.__enter__()

    def over() -> None:
        mode.__exit__(None, None, None)
        counts = mode.get_flop_counts()
        log.append(str(counts.get("PlainConvUNet")))

    return over


def dropout(network: nn.Module, tile: torch.Tensor, call: int) -> torch.Tensor:
    if call == 1:
        torch.manual_seed(7)
    return nn.functional.dropout(network(tile), 0.4, training=True)


def in_bfloat16(predictor: nnUNetPredictor) -> None:
    network = predictor.network = predictor.network.bfloat16()
    predictor._internal_maybe_mirror_and_predict = lambda tile: network(tile.bfloat16()).float()


NETWORKS: dict[str, Change] = {
    "reads a number off the device": wrapped(lambda network, tile, call: network(tile - tile.mean().item())),
    "branches on what it sees": wrapped(lambda n, x, call: n(x) if x.any() else torch.zeros(1, 4, *x.shape[2:])),
    "fails on a constant tile": wrapped(lambda network, tile, call: network(tile / (1 / float(1 / tile.std())))),
    "goes through numpy": wrapped(lambda network, tile, call: torch.from_numpy(np.tanh(network(tile).numpy()))),
    "adds what is no buffer of it": wrapped(lambda n, x, call: n(x) + torch.arange(4.0).view(1, 4, 1, 1, 1)),
    "counts its calls": wrapped(lambda network, tile, call: network(tile) + (call % 3)),
    "seeded dropout": wrapped(dropout),
    "changes its input": wrapped(lambda network, tile, call: network(tile.mul_(2))),
    "keeps its output": keeps_its_output,
    "remembers its outputs": remembers_its_outputs,
    "half precision": wrapped(lambda network, tile, call: network(tile).half()),
    "channels last": wrapped(lambda n, x, call: n(x).contiguous(memory_format=torch.channels_last_3d)),
    "session without weights": session([None]),
    "session that loads files": session(["fold_0.onnx", Path("fold_1.onnx")]),
    "TorchScript": on_predictor(
        lambda p: setattr(p, "network", torch.jit.trace(p.network.eval(), torch.zeros(1, 1, 20, 24, 28)))
    ),
    "holds a lock": on_predictor(lambda p: setattr(p.network, "lock", threading.Lock())),
    "bfloat16 in an override": on_predictor(in_bfloat16),
    "hook on a stage": hooked(lambda network: network.encoder.stages[-1]),
    "hook on the logits": hooked(lambda network: network),
    "hook on the input": hooked(lambda network: network, after=False),
    "forward of an instance": patched_forward,
    "override of a method": override,
    "hook on all modules": watching_all_modules,
    "mode that counts operations": counting_flops,
}


def outcome(
    cls: type[nnUNetPredictor], model: str, array: tuple[np.ndarray, dict[str, Any]], change: Change, mirrors: bool
) -> tuple[np.ndarray, list[str]]:
    log: list[str] = []
    predictor = make_predictor(cls, model, use_mirroring=mirrors)
    over = change(predictor, log)
    try:
        labels = predictor.predict_single_npy_array(array[0], dict(array[1]))
    finally:
        if over is not None:
            over()
    return labels, log


@pytest.mark.parametrize("mirrors", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "mirrored"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_a_client_is_used_as_by_stock(name, model, array, mirrors):
    if INSTALLED < (2, 6) and name in ("changes its input", "override of a method"):
        pytest.skip("nnU-Net 2.5 hands out a part of the image itself; what is written there the next tiles see")
    expected, seen_by_stock = outcome(nnUNetPredictor, model, array, NETWORKS[name], mirrors)
    labels, seen_by_ours = outcome(LowMemPredictor, model, array, NETWORKS[name], mirrors)
    assert_same_array(expected, labels)
    assert seen_by_ours == seen_by_stock


@pytest.mark.parametrize("array_of", [np.asarray, np.asfortranarray], ids=["C order", "Fortran order"])
def test_array_that_cannot_fit_is_refused_before_it_is_preprocessed(array_of, model, array, monkeypatch):
    monkeypatch.setattr("nnunet_lowmem.predict.loading.preprocess_array", None)
    predictor = make_predictor(LowMemPredictor, model, max_ram="1M")
    with pytest.raises(BudgetError, match="case array does not fit: RAM projected"):
        predictor.predict_single_npy_array(array_of(array[0]), dict(array[1]))


def test_what_the_tensors_take_is_found_unseen():
    """A lower bound where all code is known, and none where running the network could be noticed."""
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.LeakyReLU(inplace=True))
    shape, calls = (1, 1, 16, 16, 16), []
    network.register_forward_hook(lambda *_: calls.append("run"))
    assert tensor_bytes(network, shape) == 4 * 16**3 * (1 + 4)
    with FlopCounterMode(display=False) as counted:
        tensor_bytes(network, shape)
    assert counted.get_total_flops() == 0
    assert tensor_bytes(Wrapped(network, lambda n, x, call: calls.append("run")), shape) is None
    network.forward = lambda tile: calls.append("run")
    assert tensor_bytes(network, shape) is None
    assert calls == []
