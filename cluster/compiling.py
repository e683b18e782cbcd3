"""Have torch.compile translate a network into code of its own, in place: its tensors keep their names."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from cluster.checkpoint import brief
from cluster.errors import UserError


def refuse_without_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile does not work on `device`, which a small function shows.

    For a CPU it needs a C++ compiler and Python's headers, for a GPU Triton and a C compiler.
    """
    try:
        torch.compile(lambda numbers: numbers + 1, dynamic=False)(torch.zeros(2, device=device))
    except RuntimeError as error:  # all that torch.compile raises is one, a missing compiler too
        raise UserError(
            f"--compile: torch can't compile on this machine ({brief(error)}); "
            "install g++ and Python's headers, or leave it out"
        ) from None


def uncompiled(compiled: bool) -> contextlib.AbstractContextManager[object]:
    """Where a `compiled` network runs as it is, as on batches of many sizes, each of which takes code.

    Nothing is touched where it is not, since even a stance loads the compiler.
    """
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def compile_part(model: nn.Module, part: str) -> None:
    """Compile the submodule of `model` named `part`, or all of it for "", when it is first called.

    Shapes are compiled as they are seen, never generalised: what is computed then depends on the call alone
    and not on those before it, so a resumed run equals an uninterrupted one. Random numbers are torch's own.
    """
    model.get_submodule(part).compile(dynamic=False, options={"fallback_random": True})
