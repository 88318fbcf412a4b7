"""Which arithmetic is taken: a bfloat16 that is slow, or wrong, is not; and what was found is kept."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_exact import tile_for, unet

from nnunet_lowmem.network import choices, trial
from nnunet_lowmem.network.fast_network import FastNetwork, fast_network
from nnunet_lowmem.network.trial import Trial, try_both
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.system import compiler

TILE = (1, 1, 24, 24, 24)


class Faked:
    """A network of which features take longer, or are others: what no processor here does by itself."""

    def __init__(self, network: FastNetwork, slow_s: float = 0.0, change=lambda features: features) -> None:
        self._network, self._slow_s, self._change = network, slow_s, change
        self.shapes: list[tuple[int, ...]] = []

    def __getattr__(self, name: str):
        return getattr(self._network, name)

    def features(self, tile, mirror_axes):
        self.shapes.append(tuple(tile.shape))
        time.sleep(self._slow_s)
        return self._change(self._network.features(tile, mirror_axes))


@pytest.fixture(scope="module")
def ways():
    network = unet()
    return tuple(fast_network(network, TILE, 1, a) for a in (Arithmetic.FLOAT32, Arithmetic.BFLOAT16))


def found(ways, single_s=0.0, half_s=0.0, change=lambda features: features, **options) -> Trial:
    single, half = Faked(ways[0], single_s), Faked(ways[1], half_s, change)
    with torch.inference_mode():
        return try_both(single, half, tile_for(3), **{"ranked": True, "has_room": True, **options})


def test_a_fast_and_right_one_is_chosen(ways):
    one = found(ways, single_s=0.8)  # some 0.05 s are computed
    assert one.chooses
    assert one.in_words().startswith("chosen: a tile takes 0.")
    assert 0 < one.error < 0.02
    assert one.same > 0.98


def test_a_slow_one_is_not(ways):
    one = found(ways, single_s=0.5, half_s=0.6)
    assert not one.chooses
    assert "it has to be 1.2 times faster" in one.in_words()


def test_a_hopeless_one_is_not_run_on_a_whole_tile(ways):
    half = Faked(ways[1], 0.8)
    with torch.inference_mode():
        one = try_both(ways[0], half, tile_for(3), ranked=True, has_room=True)
    assert not one.chooses
    assert max(np.prod(shape) for shape in half.shapes) <= np.prod(TILE) // 8
    assert one.error is None
    assert "a part of a tile takes" in one.in_words()


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda features: features * 1.2, "its logits differ by"),
        (lambda features: features.float().fill_(float("nan")), "its logits differ by inf"),
        (lambda features: features.flip(1), "its logits differ by"),
    ],
)
def test_a_wrong_one_is_not(change, why, ways):
    one = found(ways, single_s=0.5, change=change)
    assert not one.chooses
    assert why in one.in_words()


def test_labels_count_where_the_logits_are_close():
    one = Trial(2.0, 1.0, 0.01, 0.97)
    assert not one.chooses
    assert "3.0% of a tile's voxels get another label" in one.in_words()


def test_labels_are_compared_by_regions():
    """Logits that are moved by the same amount have the same largest one, and other signs."""
    features = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    raw = SimpleNamespace(head=lambda: None)
    assert trial._compared(raw, features, features + 1, ranked=True)[1] == 1
    assert trial._compared(raw, features, features + 1, ranked=False)[1] < 0.9
    assert trial._compared(raw, features, features, ranked=False)[1] == 1


def test_where_there_is_no_room_a_part_is_compared(ways):
    single = Faked(ways[0], 0.05)  # a hiccup of the machine does not make the other hopeless
    with torch.inference_mode():
        one = try_both(single, ways[1], tile_for(3), ranked=True, has_room=False)
    assert max(np.prod(shape) for shape in single.shapes) <= np.prod(TILE) // 2
    assert (one.single_s, one.half_s) == (None, None)
    assert one.chooses
    assert one.in_words().startswith("chosen: there is no room for a tile in float32")


def test_a_network_without_a_head_is_compared_by_its_output():
    network = torch.nn.Sequential(unet(), torch.nn.LeakyReLU())
    both = [fast_network(network, TILE, 1, a) for a in (Arithmetic.FLOAT32, Arithmetic.BFLOAT16)]
    assert both[1].head_layer is None
    with torch.inference_mode():
        one = try_both(*both, tile_for(3), ranked=True, has_room=True)
    assert one.error < 0.05


def test_what_was_found_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(
        choices, "compiler", SimpleNamespace(cache_folder=lambda: tmp_path / "made", keep=compiler.keep)
    )
    key, one = choices.key_of(["model"], TILE), Trial(2.0, 1.0, 0.01, 0.999)
    assert choices.remembered(key) is None
    choices.remember(key, one)
    assert choices.remembered(key) == one
    assert choices.remembered(choices.key_of(["another"], TILE)) is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # another machine, as it were
    assert choices.key_of(["model"], TILE) != key
    (file,) = (tmp_path / "made").iterdir()
    for damaged in (b"", b"{", b'{"single_s": 1}', b"[1, 2]", b"\xff"):
        file.write_bytes(damaged)
        assert choices.remembered(key) is None
    choices.remember(key, replace(one, same=0.5))
    assert choices.remembered(key).same == 0.5


def test_a_cache_that_cannot_be_written_ends_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file"):
        stand_in = SimpleNamespace(cache_folder=lambda folder=folder: folder, keep=compiler.keep)
        monkeypatch.setattr(choices, "compiler", stand_in)
        choices.remember("key", Trial(2.0, 1.0))
        assert choices.remembered("key") is None
