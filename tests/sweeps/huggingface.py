#!/usr/bin/env python3
"""Convert every tiny Hugging Face folder of tiny_models.py at default options, and check the results independently.

    OMP_NUM_THREADS=1 nice python tests/sweeps/huggingface.py [--only NAME ...] [--resume] [--retry]

Each folder has seeded random weights; a forked child converts it with convert.main(), and tests/judge.py compares it
with transformers. Results: tests/reports/huggingface.json, kept after every conversion, and huggingface.md beside it.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

# tests/ and the folder of convert.py, in place of this one
sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

import numpy as np
import tiny_models
import transformers
from judge import OPSET, STEPS, check
from sweeps.jobs import REPORTS, ROOT, STATES, Json, apart, convert, load_product
from tiny_models import MODELS

SPEC = ("text-generation", "text-classification", "token-classification", "question-answering", "feature-extraction")


def prepare(name: str, folder: Path) -> None:
    """Make the model's folder."""
    transformers.utils.logging.disable_progress_bar()
    tiny_models.make(name, folder)


def run_job(product: Any, name: str, folder: Path) -> Json:
    """Make, convert and check one model; returns its row."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row = apart(prepare, name, folder / "in")
    row = row or apart(convert, product, ["-i", str(folder / "in"), "-o", str(folder / "out") + "/", "--json"], folder)
    if "status" not in row:
        row |= apart(check, name, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return row


HEAD = """# Hugging Face sweep
`python tests/sweeps/huggingface.py`, one conversion at a time on one of {cores} shared cores. {versions}.
Tiny models with seeded random weights (tiny_models.py), converted at default options: opset {opset} where the model can
be expressed in it. ok: right on inputs of the sweep's own, at three shapes, with padding; text is generated for {steps}
tokens through the graph's cache and compared with model.generate. opset: right, at a higher opset; wrong: differs from
PyTorch; failed: the product's exit code; timeout, sweep: no verdict. Difference: the largest one, relative to the
largest value of the output. Seconds: of a process that has its imports done.
"""


def line_of(name: str, row: Json) -> str:
    """One line of the table."""
    worst = f"{row['worst']:.0e}" if "worst" in row and np.isfinite(row["worst"]) else ""
    state = row.get("status", "not run") + (f" {row['code']}" if row.get("code") else "")
    state = state if state == "ok" else f"**{state}**"
    facts = [state, row.get("opset", ""), row.get("exporter") or "", worst, row.get("seconds", ""), row.get("told", "")]
    told = [str(fact).replace("|", "\\|").replace("\n", " ") for fact in facts]
    return f"| {MODELS[name].model_type} | {MODELS[name].task} | {' | '.join(told)} |"


def render(rows: Json) -> str:
    """The text of huggingface.md."""
    packages = ("torch", "transformers", "optimum", "onnx", "onnxruntime")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [HEAD.format(cores=os.cpu_count(), versions=versions, opset=OPSET, steps=STEPS)]
    lines += [f"| task | models | {' | '.join(STATES)} |", "|---" * (len(STATES) + 2) + "|"]
    for task in dict.fromkeys([*SPEC, *(tiny.task for tiny in MODELS.values())]):
        seen = Counter(rows.get(name, {}).get("status", "not run") for name in MODELS if MODELS[name].task == task)
        lines.append(f"| {task} | {seen.total()} | {' | '.join(str(seen[state]) for state in STATES)} |")
    columns = ("architecture", "task", "state", "opset", "exporter", "difference", "seconds", "what the product said")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [line_of(name, rows.get(name, {})) for name in MODELS]
    return "\n".join([*lines, ""])


def main() -> int:
    """Run what is asked for; returns 1 where something is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", choices=list(MODELS), help="these models")
    add("--resume", action="store_true", help="leave out what the results have")
    add("--retry", action="store_true", help="as --resume, but what is not ok is run again")
    add("--product", type=Path, default=ROOT, help="folder of the convert.py to test")
    add("--work", type=Path, default=Path("/tmp/pt2onnx-huggingface"), help="scratch folder")
    add("--results", type=Path, default=REPORTS / "huggingface.json")
    options = parser.parse_args()
    product = load_product(options.product.resolve())
    from optimum.exporters.tasks import TasksManager  # noqa: F401  (so that the children need not)

    rows: Json = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    rows = {name: row for name, row in rows.items() if name in MODELS}
    for name in options.only or MODELS:
        if name in rows and (options.resume or (options.retry and rows[name]["status"] == "ok")):
            continue
        row = rows[name] = run_job(product, name, options.work.resolve() / name)
        options.results.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        options.results.with_suffix(".md").write_text(render(rows), encoding="utf-8")
        told = [row["status"], row.get("opset", ""), row.get("worst", ""), row.get("seconds", ""), row.get("told", "")]
        print(time.strftime("%T"), name, *told, flush=True)
    return int(any(row["status"] != "ok" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
