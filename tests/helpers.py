"""What the tests share: the command line in a process of its own, its log lines, and ONNX Runtime's answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CONVERT = Path(__file__).resolve().parents[1] / "convert.py"


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


def stay_in_process(product: Any) -> None:
    """Let the product's worker be a fork that goes on, where it would begin anew with Python's and all imports."""

    def go_on(_: str, command: list[str], environment: dict[str, str]) -> None:
        os.environ.clear()
        os.environ.update(environment)
        os._exit(product.main(command[command.index(product.__file__) + 1 :]))

    os.execve = go_on


def onnx_outputs(model: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX Runtime's outputs by name; it knows the file and the inputs, and nothing of the product."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # threads would not survive a fork
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


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


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
