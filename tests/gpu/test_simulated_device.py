"""The simulated accelerator notices what it is there for, and `HostBuffer` gives it no reason to."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from simulated_device import CUDA, SimulatedDevice, simulated_device

from nnunet_lowmem.window.host_buffer import HostBuffer


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with simulated_device(1000) as device, torch.inference_mode():
        yield device


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=CUDA)


def test_tensors_of_two_devices_do_not_mix(device):
    with pytest.raises(RuntimeError, match="same device"):
        ones(3) + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        ones(3).numpy()


def test_bytes_count_until_the_last_view_is_gone(device):
    whole = ones(200)
    view = whole[:10].view(2, 5)
    del whole
    assert device.live_bytes == 800
    with pytest.raises(torch.OutOfMemoryError):
        view.repeat(50, 1)
    assert device.live_bytes == device.peak_bytes == 800
    del view
    gc.collect()
    assert device.live_bytes == 0


@pytest.mark.parametrize(
    "operation",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: bool((tensor > 0).all()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.nonzero(tensor),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.copy_(torch.zeros(3)),
        lambda tensor: torch.zeros(3).copy_(tensor, non_blocking=True),
    ],
    ids=["item", "bool", "tolist", "mask", "nonzero", "cpu", "from pageable", "to pageable"],
)
def test_waiting_is_noticed(operation, device):
    tensor = ones(3)
    operation(tensor)
    assert len(device.waits) == 1
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        operation(tensor)


def test_what_is_read_too_early_is_not_there(device):
    buffer = HostBuffer(CUDA)
    received = buffer.receive(ones(4))
    assert received.isnan().all()
    buffer.wait()
    assert received.tolist() == [1, 1, 1, 1]
    assert device.waits == []


def test_what_is_written_too_early_is_noticed(device):
    buffer = HostBuffer(CUDA)
    host = buffer.room((4,), torch.float32).zero_()
    buffer.send(host)
    host[0] = 1
    with pytest.raises(AssertionError, match="while it was being copied"):
        buffer.wait()


def test_a_buffer_waits_before_it_is_used_again(device):
    buffer = HostBuffer(CUDA)
    for value in range(3):
        sent = buffer.send(buffer.room((2, 3), torch.float32).fill_(value))
        assert buffer.receive(sent.half()).dtype == torch.half
    buffer.wait()
    assert sent.device == CUDA
    assert sent.tolist() == [[2, 2, 2], [2, 2, 2]]


def test_beside_another_device_a_copy_is_done_at_once():
    buffer = HostBuffer(torch.device("cpu"))
    assert buffer.receive(torch.arange(3)).tolist() == [0, 1, 2]
    assert buffer.receive(torch.arange(5, dtype=torch.int16)).tolist() == [0, 1, 2, 3, 4]


def test_without_page_locked_memory_a_copy_is_done_at_once(device, caplog):
    device.locks_pages = False
    buffer = HostBuffer(CUDA)
    assert buffer.receive(ones(4)).tolist() == [1, 1, 1, 1]
    sent = buffer.send(buffer.room((3,), torch.float32).fill_(5))
    buffer.room((3,), torch.float32).fill_(7)
    assert sent.tolist() == [5, 5, 5]
    assert caplog.text.count("no page-locked memory of 16 bytes") == 1
