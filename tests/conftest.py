"""What the tests share: the command line in a process, and ONNX Runtime in another one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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


def run_cli(*args: str, timeout: float = 300, **options: Any) -> Result:  # noqa: ANN401
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
