"""How much memory is free, and loops that halve their batch when it runs out."""

import os
from collections.abc import Callable, Iterator

import torch

from mech_align.errors import OutOfMemory


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Free memory of a device, in bytes; a careful guess where the system does not say."""
    where = torch.device(device)
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def halving(start: int, stop: int, step: int, run: Callable[[int, int], None]) -> Iterator[tuple[int, int]]:
    """Call ``run(first, last)`` over ``[start, stop)`` in steps, halved when memory runs out; yield each piece.

    Raises:
        OutOfMemory: Not even a step of 1 fits.
    """
    at = start
    while at < stop:
        end = min(at + step, stop)
        try:
            run(at, end)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if step == 1:
                raise OutOfMemory(
                    "not even one prompt at a time fits into memory",
                    why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                    hint=[
                        "use shorter prompts or dtype bfloat16",
                        "use a machine with more memory, or device_map='auto'",
                    ],
                ) from error
            step = max(1, step // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield at, end
        at = end
