"""The emulation finds what a device would not forgive; else what passes in it would mean little."""

import ctypes
import shutil

import pytest
import torch
from emulation.device import EMULATION, Device, EmulationError, build
from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

KERNELS = [
    *("right", "missing_barrier", "missing_second_barrier", "barrier_of_some", "barriers_apart"),
    *("shuffle_of_some", "reads_behind", "reads_before", "writes_behind", "writes_beside"),
    *("misaligned", "local_index", "shared_behind"),
]
THREADS = 64


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    device = Device(build(tmp_path_factory.mktemp("faulty"), [EMULATION / "faulty.cu"]))
    device.lib.run_faulty.restype = ctypes.c_char_p
    return device


def run(
    device: Device, kernel: str, size: int = THREADS, shared_bytes: int = 4 * THREADS
) -> Tensor:
    with device.buffers() as put:
        data = put.copy(torch.arange(size, dtype=torch.float32))
        error = device.lib.run_faulty(
            KERNELS.index(kernel), data, THREADS, ctypes.c_size_t(shared_bytes)
        )
        if error is not None:
            raise EmulationError(error.decode())
        return put.read(data, torch.float32)


@pytest.mark.parametrize("order", [0, 1, 7])
def test_a_right_kernel_gives_the_same_in_any_order(device: Device, order: int) -> None:
    device.set_order(order)
    expected = torch.arange(THREADS) // 2 * 4 + 1.0
    assert torch.equal(run(device, "right"), expected)


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        ("barrier_of_some", "which has ended"),
        ("barriers_apart", "waits at faulty.cu:.*, but thread 32 "),
        ("shuffle_of_some", "which has ended"),
        ("reads_behind", "access at byte 256 of a buffer of 256 by thread 63"),
        ("reads_before", "access at byte -4096 of a buffer of 256 by thread 0"),
        ("writes_behind", "access at byte 256 of a buffer of 256 by thread 63"),
        ("misaligned", "undefined behaviour"),
        ("local_index", "undefined behaviour"),
        ("shared_behind", "wrote byte 256 of its shared memory, which has 256"),
    ],
)
def test_a_fault_is_an_error(device: Device, kernel: str, found: str) -> None:
    device.set_order(0)
    with pytest.raises(EmulationError, match=found):
        run(device, kernel)
    # and the next kernel runs as if nothing had happened
    assert run(device, "right")[0] == 1


def test_a_write_right_beside_a_buffer_is_found(device: Device) -> None:
    with pytest.raises(EmulationError, match="byte 4 of a buffer of 4 was written"):
        run(device, "writes_beside", size=1)


@pytest.mark.parametrize("kernel", ["missing_barrier", "missing_second_barrier"])
def test_a_missing_barrier_shows_in_some_order(device: Device, kernel: str) -> None:
    results = []
    for order in (0, 1, 7):
        device.set_order(order)
        results.append(run(device, kernel))
    assert not (torch.equal(results[0], results[1]) and torch.equal(results[1], results[2]))


def test_a_launch_that_no_device_takes_is_refused(device: Device) -> None:
    with pytest.raises(EmulationError, match="invalid argument"):
        run(device, "right", shared_bytes=48 * 1024 + 1)
