"""The product in forked children: as quick as calling it, and a crash, a hang or a full memory is only the child's."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import resource
import shutil
import signal
import site
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers import Result, stay_in_process

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
                gc.freeze()  # a session that is garbage here would wait for threads that only the parent has
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


def run_forked(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None, umask: int = -1) -> Result:
    """What helpers.run_cli does, but supervisor and worker are forks of this process, which has its imports done."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                gc.freeze()  # a session that is garbage here would wait for threads that only the parent has
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
                product.LOG.stream = sys.stderr
                stay_in_process(product)
                enter(cwd, env, umask)
                code = int(product.main(arguments))
            except SystemExit as end:  # of argparse
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code, _ = wait(child, time.monotonic() + 300)
        out.seek(0)
        err.seek(0)
        return Result(code, out.read().decode(), err.read().decode())


def enter(folder: Path | None, environment: dict[str, str] | None, umask: int) -> None:
    """Give this process a working directory, environment variables and a umask, as a new one would have them."""
    if folder:
        os.chdir(folder)
    if umask >= 0:
        os.umask(umask)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        for value in vars(product).values():  # such as the folders of libraries
            if hasattr(value, "cache_clear"):
                value.cache_clear()


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


def convert_in_child(source: Path, folder: Path, *options: str, seconds: float = 10, export: bool = True) -> Outcome:
    """Convert `source` with the product's own main(), as its worker process does, and watch what that opens.

    Up to the export, where the model has been built and has answered; without `export` it ends there, with BUILT.
    """
    named = [Path(after) for option, after in itertools.pairwise(options) if option == "--base"]
    go_on = product.produce

    def action() -> int:
        watch = Watch([source, *named], folder)

        def built(*arguments: Any) -> Any:
            if not export:
                os._exit(BUILT)
            watch.ended = True
            return go_on(*arguments)

        product.LOG.stream = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.environ[product.WORKER_VARIABLE] = "1"
        sys.argv = ["convert.py"]
        product.produce = built
        os._exit = functools.partial(watch.exit, os._exit)
        sys.addaudithook(watch.hear)
        return product.main(["-i", str(source), "-o", str(folder / "out" / "model.onnx"), *options])

    outcome = in_child(action, folder, seconds)
    product.remove_debris(folder / "out" / ".pt2onnx.1.partial", [folder / "out"] if outcome.code else [])
    return outcome


BUILT = 42
# What acts on more than this process (https://docs.python.org/3/library/audit_events.html).
ACTS = ("open", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
        "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.mkdir", "os.rmdir",
        "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime",
        "urllib.Request", "webbrowser.open", "sqlite3.connect", "ctypes.dlopen")  # fmt: skip
# The functions of convert.py that may do so while an input is loaded, built or vetted, and where: nothing else may.
NAMED: dict[str, tuple[str, ...]] = {
    "open_input": ("input", "staging"),
    "copy_without_code": ("input", "staging"),  # links to the weights
    "stage_side_files": ("staging",),
    **dict.fromkeys(("rewrite_settings", "read_config", "load_pretrained"), ("staging",)),
    "silence_third_parties": ("/dev/null",),
    "memory_bytes": ("/proc/",),
    "read_architectures": ("architectures.json.xz",),
    "load_exported_program": (".py",),  # torch.export notes the source lines of the code that runs
    "c_library": ("None",),
    "editable_folders": ("site-packages", "dist-packages", "direct_url.json"),  # what pip says of installed packages
    "vet_torchscript": ("<unknown>",),  # where Python looks for the line of a syntax error
}


def final_path(path: Any, *, links: bool) -> str:
    """Where a path of an event leads, its last part too where `links` are followed there."""
    if not isinstance(path, (str, bytes, Path)):
        return "None"
    text = os.fsdecode(path)
    return os.path.realpath(text) if links else os.path.join(os.path.realpath(os.path.dirname(text)), Path(text).name)  # noqa: PTH118, PTH120


class Watch:
    """Hears what Python code in this process opens, starts and connects to, and keeps what no named function did."""

    def __init__(self, inputs: Sequence[Path], folder: Path) -> None:
        roots = [os.path.realpath(path if os.path.isdir(path) else path.parent) for path in inputs]  # noqa: PTH112
        # The hub's cache has links from its snapshots into its blobs.
        roots += [os.path.realpath(path.parent.parent / "blobs") for path in inputs if path.parent.name == "snapshots"]
        self.places = {"input": tuple(roots), "staging": (str(folder / "out"),)}
        self.found: list[str] = []
        self.ended = False
        names = ("stdlib", "platstdlib", "purelib", "platlib")
        libraries = {*map(sysconfig.get_path, names), *site.getsitepackages(), str(Path(torch.__file__).parents[1])}
        self.libraries = tuple(f"{form}/" for place in libraries for form in (place, os.path.realpath(place)))

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook."""
        if self.ended or event not in ACTS or (event == "open" and isinstance(arguments[0], int)):
            return
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != product.__file__:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                return  # an import: convert.py names the modules, and test_policy.py what may be imported
            frame = frame.f_back
        given = arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]
        paths = [final_path(path, links=event == "open" or path is not given[-1]) for path in given]
        reads = event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & 0o3103
        )  # WRONLY, RDWR, CREAT..
        if frame is None or (reads and paths[0].startswith(self.libraries)):
            return
        named = NAMED.get(frame.f_code.co_name, ())
        places = tuple(itertools.chain.from_iterable(self.places.get(place, (place,)) for place in named))
        if not all(path.startswith(places) or path.endswith(places) for path in paths):
            self.found.append(f"{frame.f_code.co_name}: {event}({', '.join(paths)})")

    def exit(self, leave: Callable[[int], None], code: int) -> None:
        """Leave the child; with 73 where something was found, and say what."""
        for item in self.found:
            print(f"outside: {item}", file=product.LOG.stream, flush=True)  # the product closes standard error
        leave(73 if self.found else code)


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


def convert_folder(folder: Path, *options: str, code: int = 0) -> str:
    """Convert folder/in to folder/out; returns what was said. An error is one clean line, and leaves nothing behind."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    outcome = convert_in_child(folder / "in", folder, *options, seconds=60)
    assert outcome.code == code, outcome.err
    if code:
        assert not flaws(outcome, [code])
        left = (folder / "out").iterdir() if (folder / "out").exists() else ()
        assert not [path for path in left if not path.name.endswith(".partial")]  # which the supervisor removes
    return outcome.err
