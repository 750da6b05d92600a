"""A backend at a time."""

import pytest

from odvla.ops import backends


@pytest.fixture(params=backends.available_backends())
def backend(request, monkeypatch):
    """Each backend that is present here; those for GPUs are skipped where there is none."""
    import torch

    monkeypatch.setattr(backends, "_chosen", None)
    backends.use_backend(request.param)
    if request.param in backends.COMPILED and not torch.cuda.is_available():
        pytest.skip(f"{request.param} needs a GPU")
    return request.param


@pytest.fixture
def device(backend):
    """Where the backend runs."""
    return "cuda" if backend in backends.COMPILED else "cpu"
