"""Memory that runs out is recognised in the words of every library."""

from __future__ import annotations

import pytest
import torch

from chanfmt.models.out_of_memory import free_cached_memory, is_out_of_memory, out_of_memory_recognised

SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.13 GB)"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: not enough memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SAID, ids=lambda error: str(error)[:40])
def test_every_spelling(error):
    assert is_out_of_memory(error)
    with pytest.raises(torch.OutOfMemoryError), out_of_memory_recognised():
        raise error


def test_a_real_allocation_that_is_too_large():
    with pytest.raises(torch.OutOfMemoryError), out_of_memory_recognised():
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_stay_what_they_are():
    error = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError) as caught, out_of_memory_recognised():
        raise error
    assert caught.value is error


def test_a_device_without_a_cache_has_nothing_to_free():
    free_cached_memory(torch.device("cpu"))
