import pytest
import torch

from mech_align.errors import OutOfMemory
from mech_align.memory import available_bytes, halving, is_out_of_memory


def test_free_memory_is_a_number() -> None:
    assert available_bytes() > 2**20


@pytest.mark.parametrize(
    ("error", "is_one"),
    [(MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory."), True),
     (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
     (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
     (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
     (RuntimeError("shapes do not match"), False), (ValueError("out of memory"), False), (KeyboardInterrupt(), False)],
)  # fmt: skip
def test_what_counts_as_out_of_memory(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_pieces_cover_everything_once_and_shrink_where_they_must() -> None:
    tried: list[tuple[int, int]] = []

    def run(first: int, last: int) -> None:
        tried.append((first, last))
        if last - first > 3:
            raise MemoryError

    pieces = list(halving(2, 21, 8, run))
    assert [at for first, last in pieces for at in range(first, last)] == list(range(2, 21))
    assert max(last - first for first, last in pieces) == 2 and tried[:3] == [(2, 10), (2, 6), (2, 4)]


def test_other_errors_pass_and_one_at_a_time_is_the_end() -> None:
    def broken(first: int, last: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(halving(0, 4, 2, broken))

    def full(first: int, last: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB\nmore")

    with pytest.raises(OutOfMemory, match="one prompt at a time") as caught:
        list(halving(0, 4, 4, full))
    assert "Tried 1 GiB" in str(caught.value) and "more\n" not in str(caught.value)
