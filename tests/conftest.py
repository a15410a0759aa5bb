"""What the tests share: the command line in a process, and ONNX Runtime in another one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

CONVERT = Path(__file__).resolve().parents[1] / "convert.py"
# The judge: it knows the file and the inputs, and nothing of the product.
JUDGE = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
feeds = dict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **dict(zip(names, session.run(names, feeds))))
"""


class Result(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def run_cli(*args: str, timeout: float = 300, **options: Any) -> Result:
    """Run convert.py in a process of its own; `options` go to subprocess.run."""
    done = subprocess.run(
        [sys.executable, str(CONVERT), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def onnx_outputs(model: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX Runtime's outputs by name, from another process."""
    with tempfile.TemporaryDirectory() as folder:
        feeds, results = Path(folder) / "feeds.npz", Path(folder) / "results.npz"
        np.savez(feeds, **inputs)
        subprocess.run([sys.executable, "-c", JUDGE, str(model), str(feeds), str(results)], check=True)
        with np.load(results) as loaded:
            return dict(loaded)


def lines(result: Result, prefix: str) -> list[str]:
    """The log lines of one kind, without their prefix."""
    start = f"[{prefix}] "
    return [line.removeprefix(start) for line in result.err.splitlines() if line.startswith(start)]


def check_error(result: Result, code: int, *words: str) -> None:
    """The exit code, one [ERROR] line that has `words`, only log lines, nothing on standard output."""
    assert result.code == code, result.err
    errors = lines(result, "ERROR")
    assert len(errors) == 1, result.err
    assert not [line for line in result.err.splitlines() if not line.startswith(("[INFO] ", "[WARN] ", "[ERROR] "))]
    for word in words:
        assert word in errors[0]
    assert result.out == ""


def axes(model: Path) -> dict[str, list[int | str]]:
    """Names and axes of a model's inputs and outputs, read with onnx."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


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
