"""What is said where there is no GPU; on machines with one, `seen` is asked for it."""

# ruff: noqa: E402 - PyTorch first

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mpiml.devices import choice, cuda
from mpiml.errors import ConfigError


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch as if it were built with CUDA: `built(names)` sets the types of the GPUs that it sees."""
    for name in cuda.FIXED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)

    def seeing(*gpus: Any, error: Exception | None = None) -> None:
        def init() -> None:
            if error:
                raise error

        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpus[number])

    yield seeing
    for name in cuda.FIXED:
        os.environ.pop(name, None)


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="PyTorch is built with CUDA")
def test_pytorch_without_cuda() -> None:
    one = choice.candidate("cuda", [0], 0)
    assert one.problem == (
        f"--device cuda: PyTorch {torch.__version__} is built without CUDA; install a build for GPUs, or leave "
        "--device out"
    )


def test_a_driver_without_gpus(built: Any) -> None:
    built()
    with pytest.raises(
        ConfigError, match=r"^--device cuda: there is a driver, but no GPU that .*CUDA_VISIBLE_DEVICES$"
    ):
        cuda.seen("node")


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_no_driver_is_said_in_one_line(built: Any, kind: type[Exception]) -> None:
    built(error=kind("Found no NVIDIA driver\n  on your system."))
    with pytest.raises(ConfigError, match=r"^--device cuda: Found no NVIDIA driver on your system\.$"):
        cuda.seen("node")


@pytest.mark.parametrize("asked", [None, False, True])
def test_what_a_users_code_has_set_does_not_decide_the_bits(
    asked: bool | None,
) -> None:
    """But of TF32, where nothing is said of it, as in a loop of one's own."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    device = object.__new__(cuda.Cuda)
    device.tf32 = asked
    try:
        for precision in ("highest", "high"):
            cudnn.benchmark, cudnn.deterministic = True, False
            torch.set_float32_matmul_precision(precision)
            device.fix_arithmetic()
            assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
            assert products.allow_tf32 is (precision == "high" if asked is None else asked)
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before[:3]
        torch.set_float32_matmul_precision(before[3])


def test_gpus_are_told_apart_also_by_processes_that_see_others(built: Any) -> None:
    built(SimpleNamespace(name="H", uuid="GPU-7"), SimpleNamespace(name="H"))
    assert cuda.seen("node") == [("H", "GPU-7"), ("H", "node, GPU 1")]


def test_libraries_get_work_areas_of_fixed_sizes_before_they_start_but_as_the_user_has_set_them(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(SimpleNamespace(name="H", uuid="GPU-7"))
    cuda.seen("node")
    assert {name: os.environ[name] for name in cuda.FIXED} == cuda.FIXED
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    cuda.seen("node")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
