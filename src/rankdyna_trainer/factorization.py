"""The singular value decomposition of a weight, and a folder that keeps it for the next task (paper, section 1)."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

Factors = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def factorize(weight: Tensor, cache: str | Path | None = None) -> Factors:
    """
    The singular groups of a weight, largest `sigma` first, computed in float64 and given in the weight's dtype.

    Args:
        weight: `(out_features, in_features)`, finite.
        cache: a folder, made if it is missing, in which the groups of this very weight are looked up and kept. A file
            there that cannot be used is replaced, with a warning.

    Returns:
        `u` `(rank, out_features)`, `sigma` `(rank,)` and `v` `(rank, in_features)` with
        `rank = min(out_features, in_features)`, so that `weight = (u.T * sigma) @ v` (eq. 5).
    """
    if cache is None:
        return _decompose(weight)
    file = Path(cache) / f"{_fingerprint(weight)}.safetensors"
    try:
        stored = load_file(file)
        u, sigma, v = (stored[name].to(weight) for name in ("u", "sigma", "v"))
        if _belong_together(weight, u, sigma, v):
            return u, sigma, v
        logger.warning("%s does not hold the factorization of its weight: it is made anew.", file)
    except FileNotFoundError:
        pass
    except (SafetensorError, OSError, KeyError) as error:
        logger.warning("%s cannot be read (%s): it is made anew.", file, error)
    u, sigma, v = _decompose(weight)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that another process never reads half a file.
    handle, beside = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    os.close(handle)
    save_file({"u": u, "sigma": sigma, "v": v}, beside)
    os.replace(beside, file)
    return u, sigma, v


def _decompose(weight: Tensor) -> Factors:
    # Apple's GPUs have no float64.
    exact = (weight.cpu() if weight.device.type == "mps" else weight).double()
    left, sigma, v = torch.linalg.svd(exact, full_matrices=False)
    return left.t().to(weight).contiguous(), sigma.to(weight), v.to(weight).contiguous()


def _fingerprint(weight: Tensor) -> str:
    data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode() + data.tobytes()).hexdigest()


def _belong_together(weight: Tensor, u: Tensor, sigma: Tensor, v: Tensor) -> bool:
    out_features, in_features = weight.shape
    rank = min(weight.shape)
    if (u.shape, sigma.shape, v.shape) != ((rank, out_features), (rank,), (rank, in_features)):
        return False
    probe = torch.linspace(-1, 1, in_features, device=weight.device)
    expected = weight.float() @ probe
    found = u.float().t() @ (sigma.float() * (v.float() @ probe))
    tolerance = 1e-4 if weight.dtype.itemsize >= 4 else 0.1
    return bool((found - expected).norm() <= tolerance * weight.float().norm() * probe.norm())
