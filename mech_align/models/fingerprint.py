"""Which weights are these? A digest that any changed number changes and no thread count does, for one read."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 64


def tensor_digest(value: Tensor) -> str:
    """Digest of shape, type, the sum of the bits read as integers (exact in any order), and some values in order."""
    flat = value.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.is_floating_point() and flat.element_size() > 1:
        flat = flat + 0.0  # -0 and 0 are the same weight; adding an all-zero adapter turns one into the other
    whole = (
        flat.to(torch.uint8) if flat.dtype == torch.bool else flat.contiguous().view(_AS_INTEGERS[flat.element_size()])
    )
    total = int(whole.sum(dtype=torch.int64)) if whole.numel() else 0
    some = whole[:: max(1, whole.numel() // _SAMPLES)].cpu()
    head = f"{tuple(value.shape)} {value.dtype} {total} ".encode()
    return hashlib.sha256(head + some.numpy().tobytes()).hexdigest()


def digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Digest of every tensor by name; meta tensors, which hold no values, are left out."""
    return {name: tensor_digest(value) for name, value in tensors if value.device.type != "meta"}


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Sixteen characters that stand for a whole set of named weights, such as ``model.named_parameters()``."""
    made = digests(tensors)
    return hashlib.sha256("\n".join(f"{name} {made[name]}" for name in sorted(made)).encode()).hexdigest()[:16]
