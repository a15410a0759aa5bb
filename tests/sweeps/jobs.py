"""What the sweeps share: the product in a forked child, whose memory, settings and crashes go with it."""

import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime
from helpers import stay_in_process

FORK = multiprocessing.get_context("fork")
LIMIT = 1800  # seconds for one step of one model
Json = dict[str, Any]
STATES = ("ok", "opset", "failed", "wrong", "timeout", "sweep", "not run")
ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "tests" / "reports"


def load_product(folder: Path) -> Any:
    """The product's module, whose worker is here a fork: its imports take longer than most conversions."""
    from onnxscript import version_converter  # noqa: F401  (so that the children need not)

    class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads, self.log_severity_level = 1, 4

    onnxruntime.SessionOptions = OneThread
    sys.path.insert(0, str(folder))
    product: Any = importlib.import_module("convert")
    stay_in_process(product)
    return product


def apart(function: Any, *arguments: Any) -> Json:
    """What `function` returns, run in a forked child so that its memory and settings go with it."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send(function(*arguments) or {})
        except Exception as error:  # of the sweep, not of the product
            sender.send({"status": "sweep", "told": f"{type(error).__name__}: {str(error)[:300]}"})

    (child := FORK.Process(target=run)).start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT) else {"status": "timeout", "told": f"over {LIMIT} s"}
    except EOFError:
        return {"status": "sweep", "told": "the sweep's own process was killed: out of memory?"}
    finally:
        child.terminate()  # the product's supervisor then ends its worker
        child.join()


def convert(product: Any, arguments: list[str], folder: Path) -> Json:
    """Run the product in the current process, whose standard streams become files."""
    for number, file in ((1, "stdout"), (2, "log")):
        os.dup2(os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    start = time.monotonic()
    code, seconds = int(product.main(arguments)), round(time.monotonic() - start, 1)
    told = re.findall(r"^\[(?:ERROR|WARN)\] (.*)", (folder / "log").read_text(encoding="utf-8"), re.MULTILINE)
    report = json.loads((folder / "stdout").read_text(encoding="utf-8") or "{}")
    row = {"code": code, "seconds": seconds, "told": told[-1][:600] if told else "", "exporter": report.get("exporter")}
    return row if code == 0 else {**row, "status": "failed"}
