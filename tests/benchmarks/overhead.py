"""The whole command against the shortest script that exports the same model without any proof.

    python tests/benchmarks/overhead.py [--runs 3] [--models resnet50 vit_b_16 efficientnet_b0]

For each model both are run in turn, each in a process of its own, on the same file, with the same exporter and opset.
Time is wall-clock seconds of the whole command, memory the peak resident set of the process (of the largest one, for
the product). The table gives the medians and their ratios; the goals are 1.5 for time and 1.2 for memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

CONVERT = Path(__file__).resolve().parents[2] / "convert.py"
# What a user would write: load, export with a free batch axis at the product's opset, nothing checked.
SHORTEST = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False).eval()
torch.onnx.export(model, (torch.randn(1, 3, 224, 224),), sys.argv[2], dynamo=False, opset_version=14,
                  input_names=["input"], output_names=["output"], dynamic_axes={"input": {0: "batch_size"}})
"""
MAKE = """
import sys, torch, torchvision
torch.manual_seed(0)
torch.save(torchvision.models.get_model(sys.argv[1], weights=None).eval(), sys.argv[2])
"""


class Cost(NamedTuple):
    """Seconds and megabytes of one command."""

    seconds: float
    megabytes: float


def measure(command: list[str]) -> Cost:
    """Run `command`; its peak memory includes that of the children it waited for. Raises CalledProcessError."""
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(time.monotonic() - start, usage.ru_maxrss / 1024)


def compare(name: str, runs: int, folder: Path) -> str:
    """One row of the table."""
    source, target = folder / f"{name}.pt", folder / f"{name}.onnx"
    subprocess.run([sys.executable, "-c", MAKE, name, str(source)], check=True, stderr=subprocess.DEVNULL)
    script: list[Cost] = []
    product: list[Cost] = []
    for _ in range(runs):
        script.append(measure([sys.executable, "-c", SHORTEST, str(source), str(target)]))
        product.append(measure([sys.executable, str(CONVERT), "-i", str(source), "-o", str(target)]))
    source.unlink()
    mine, base = (Cost(*map(statistics.median, zip(*costs, strict=True))) for costs in (product, script))
    return (
        f"| {name} | {base.seconds:.1f} s | {mine.seconds:.1f} s | {mine.seconds / base.seconds:.2f} "
        f"| {base.megabytes:.0f} MB | {mine.megabytes:.0f} MB | {mine.megabytes / base.megabytes:.2f} |"
    )


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16", "efficientnet_b0"])
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {options.runs} runs each\n"
    )
    print("| model | script | pt2onnx | time ratio | script memory | pt2onnx memory | memory ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            print(compare(name, options.runs, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
