"""The product in forked children: as quick as calling it, and a crash, a hang or a full memory is only the child's."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import convert as product

torch.set_num_threads(1)  # a pool of threads would not survive the fork


class Outcome(NamedTuple):
    """How a child ended."""

    code: int  # exit status, or minus the signal
    err: str
    seconds: float  # of processor time
    kilobytes: int  # the most memory that it had


def in_child(action: Callable[[], int], folder: Path, seconds: float = 10) -> Outcome:
    """Run `action` in a forked child whose working directory is `folder`.

    It is killed after `seconds` of processor time, or after six times as many on a machine that is busy otherwise.
    """
    with tempfile.TemporaryFile() as err:
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(err.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDWR), 1)
                os.chdir(folder)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
                code = action()
            except BaseException as error:  # whatever it is, it is told, and the child must end here
                os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="backslashreplace"))
            finally:
                os._exit(code)
        code, usage = wait(child, start + 6 * seconds)
        err.seek(0)
        text = err.read().decode(errors="backslashreplace")
        return Outcome(code, text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def wait(child: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    """The exit code of `child` and what it used; after the deadline it is killed."""
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


@functools.cache
def idle_memory() -> int:
    """The memory in kilobytes of a child that does nothing."""
    return in_child(lambda: 0, Path.cwd()).kilobytes


def convert_in_child(source: Path, folder: Path, *options: str, seconds: float = 10) -> Outcome:
    """Convert `source` with the product's own main(), as its worker process does; the rest is the other process's."""

    def action() -> int:
        product.LOG.stream = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.environ[product.WORKER_VARIABLE] = "1"
        sys.argv = ["convert.py"]
        return product.main(["-i", str(source), "-o", str(folder / "out" / "model.onnx"), *options])

    outcome = in_child(action, folder, seconds)
    if outcome.code:
        product.remove_debris(folder / "out" / ".pt2onnx.1.partial", [folder / "out"])
    return outcome


def snapshot(folder: Path) -> set[tuple[str, int]]:
    """What lies below a folder."""
    return {(str(path), path.lstat().st_size) for path in folder.rglob("*")}


def flaws(outcome: Outcome, codes: Sequence[int]) -> list[str]:
    """What is wrong with how a conversion ended that should have ended in one clean error."""
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("[ERROR] ")]
    found = []
    if outcome.code not in codes:
        found.append(f"exit code {outcome.code}")
    if len(errors) != 1 or not all(line.startswith(("[INFO] ", "[WARN] ", "[ERROR] ")) for line in lines):
        found.append("not exactly one [ERROR] line")
    if not all(character.isprintable() for line in lines for character in line):
        found.append("control characters")
    if any(len(line) > 6000 for line in lines):  # a path alone may have 4096 characters
        found.append("an endless line")
    return found
