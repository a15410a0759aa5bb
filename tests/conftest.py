"""The fixtures of all tests; helpers.py has their functions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Undo what a test of functions in this process does to the environment, which the next test's commands inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small models, one of each kind of file."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    image = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    torch.save(flat, folder / "flat.pt")
    torch.save(image, folder / "image.pt")
    torch.save(flat.state_dict(), folder / "flat.pth")
    save_file(flat.state_dict(), folder / "flat.safetensors")
    torch.save(flat, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(flat), str(folder / "scripted.pt"))
    torch.jit.save(torch.jit.trace(flat, torch.randn(2, 13)), str(folder / "traced.pt"))
    batch = {"input": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(flat, (torch.randn(2, 13),)), folder / "static.pt2")
    torch.export.save(torch.export.export(flat, (torch.randn(2, 13),), dynamic_shapes=batch), folder / "dynamic.pt2")
    return folder
