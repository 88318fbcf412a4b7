"""The exact way of a network: stock's bits, and nobody who watches misses a thing."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_lowmem.network import exact
from nnunet_lowmem.network.exact import exact_network, flips_of
from nnunet_lowmem.network.known import why_watched


def unet(dims: int = 3, cls: type[nn.Module] = PlainConvUNet, dropout: type[nn.Module] | None = None) -> nn.Module:
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
    blocks = ([1, 1, 1], [1, 1])
    return cls(
        1, 3, [8, 16, 24], conv, 3, [1, 2, 2], blocks[0], 4, blocks[1], True, norm, {"eps": 1e-5, "affine": True},
        dropout, {"p": 0.5} if dropout else None, nn.LeakyReLU, {"inplace": True}, deep_supervision=False,
    ).eval()  # fmt: skip


def tile_for(dims: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((1, 1, *[24] * dims), generator=torch.Generator().manual_seed(seed))


def stock(network: nn.Module, tile: torch.Tensor, mirror_axes: tuple[int, ...]) -> torch.Tensor:
    logits = network(tile)
    flips = flips_of(mirror_axes)
    for axes in flips:
        logits += network(tile.flip(axes)).flip(axes)
    return logits / (len(flips) + 1) if flips else logits


def test_nothing_is_concluded_from_a_constant():
    """Normalised it is nothing, of which every way makes the same."""
    layer = exact._NormInPlace(nn.InstanceNorm3d(8))
    layer(torch.ones(1, 8, 4, 4, 4))
    assert layer._is_same is None


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("cls", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("mirrored", [False, True])
def test_bits_are_stocks(dims, cls, mirrored):
    network, axes = unet(dims, cls), tuple(range(dims)) if mirrored else ()
    way = exact_network(network, 2)
    with torch.inference_mode(), way.threads:
        for seed in range(3):  # the first tile is run both ways in places
            tile = tile_for(dims, seed)
            assert_same_bits(way.logits(tile, axes), stock(network, tile, axes))
    quick = [layer for layer in way.body.modules() if isinstance(layer, exact._Quick)]
    assert {type(layer) for layer in quick} == {exact._Transposed, exact._NormInPlace}
    assert all(layer._is_same for layer in quick), "a quick way was found to differ, or never taken"


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


def transposed(way: exact.ExactNetwork) -> list[exact._Transposed]:
    return [layer for layer in way.body.modules() if isinstance(layer, exact._Transposed)]


def test_a_transposed_convolution_that_gives_other_bits_stays_torchs(monkeypatch):
    """Made up: no torch is known where they differ."""
    quickly = exact._Transposed._quickly
    monkeypatch.setattr(exact._Transposed, "_quickly", lambda self, features: quickly(self, features) * (1 + 1e-6))
    network = unet()
    way = exact_network(network, 1)
    with torch.inference_mode():
        for seed in range(2):
            assert torch.equal(way.logits(tile_for(3, seed), ()), network(tile_for(3, seed)))
    assert [layer._is_same for layer in transposed(way)] == [False, False]


def test_new_weights_are_taken_over():
    network, other = unet(), unet()
    for weights in other.parameters():
        weights.data += 0.01
    way = exact_network(network, 1)
    network.load_state_dict(other.state_dict())
    way.refresh()
    with torch.inference_mode():
        assert torch.equal(way.logits(tile_for(3), ()), other(tile_for(3)))


class Own(nn.Module):
    def forward(self, tile: torch.Tensor) -> torch.Tensor:
        return tile


def with_hook(network: nn.Module) -> nn.Module:
    network.encoder.stages[0].register_forward_hook(lambda *_: None)
    return network


def compiled(network: nn.Module) -> nn.Module:
    network.compile()  # nothing is compiled before it is called
    return network


def with_forward(network: nn.Module) -> nn.Module:
    network.decoder.forward = network.decoder.forward
    return network


@pytest.mark.parametrize(
    "network, why",
    [
        (lambda: with_hook(unet()), "a hook is registered on encoder.stages.0"),
        (lambda: with_forward(unet()), "not made of torch's"),
        (lambda: nn.Sequential(unet(), Own()), "not made of torch's"),
        (lambda: unet(dropout=nn.Dropout3d), "drops out"),
        (lambda: compiled(unet()), "the network is compiled"),
    ],
)
def test_nobody_who_watches_misses_anything(network, why):
    made = network()
    assert why in why_watched(made)
    assert exact_network(made, 1) is None


def test_hooks_on_all_modules_are_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert exact_network(unet(), 1) is None
    finally:
        handle.remove()
    assert exact_network(unet(), 1) is not None


def test_weights_of_the_network_stay_as_they_are(caplog):
    network = unet()
    layer, up = network.encoder.stages[0][0].convs[0].conv, network.decoder.transpconvs[0]
    layer.weight.data[:4] *= 1e-40
    up.weight.data[:2] *= 1e-40
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with caplog.at_level(logging.INFO):
        way = exact_network(network, 1)
    assert way.weights.denormals == 4 * 27 + up.weight[:2].numel()
    assert way.own_bytes == (layer.weight.numel() + up.weight.numel()) * 4
    after = network.state_dict()
    assert all(np.array_equal(value.numpy(), after[name].numpy()) for name, value in before.items())
    tile = tile_for(3)
    with torch.inference_mode():
        assert torch.equal(way.logits(tile, ()), network(tile))
