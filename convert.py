#!/usr/bin/env python3
"""PT2ONNX: a PyTorch model in, a verified ONNX model out.

In:   a complete model (torch.save(model)), TorchScript (torch.jit.save), an exported program (torch.export.save), or
      weights (a state dict or safetensors file) of a model of torchvision or timm, or together with --model-class.
      Files are told apart by their content.
Out:  one .onnx file (plus NAME.onnx.data from 2 GB on) for which ONNX Runtime gives PyTorch's results, also at
      shapes it was not traced with, at the opset that was asked for; or one [ERROR] line, an exit code and nothing
      written.

The file begins with the types, errors and the log, and then tells the story: main, convert, the three converters and
produce(), in some 480 lines that can be read without the rest. Below it are the rooms that they call, in the order in
which a model travels; calls go down the file only, so what several rooms need lies below them:

    arguments - inspect - Hugging Face folders - adapters - detect - folder - recognise - a model from weights -
    read safely - exported programs - pickles - TorchScript - archives - the graphs of a Hugging Face model -
    inputs and the reference - the exporters - finish and write - verify - supervise - put into place -
    stored weights - modules and tensors - settings - files - libraries - workarounds

Nothing named by an input file is executed (see "pickles"), and nothing but the input is opened while it is loaded and a
model is built from it (see "files").
"""

# ruff: noqa: E402  (signals wait before the other imports)
from __future__ import annotations

import os
import signal

# The kernel discards these signals for process 1 of a container while no handler is installed: entrypoint.sh blocks
# them until there is a handler; from here on they wait, until there is a worker to end.
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# Set for the worker: the run's name. A process id alone is no name: it is 1 in every container.
WORKER_VARIABLE = "PT2ONNX_RUN"
if __name__ == "__main__" and WORKER_VARIABLE not in os.environ:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import bisect
import collections
import contextlib
import copy
import ctypes
import difflib
import enum
import errno
import fcntl
import filecmp
import functools
import gc
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import mmap
import pickle
import re
import shlex
import shutil
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import IntEnum
from inspect import Parameter, signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeVar, cast


class Lazy:
    """Placeholder for the module `name`, bound to the global `alias`; the first use imports it and takes its place.

    The arguments and the input are looked at before anything heavy is imported: importing torch takes two seconds.
    """

    def __init__(self, name: str, alias: str) -> None:
        self.name, self.alias = name, alias

    def __getattr__(self, attribute: str) -> Any:
        module = globals()[self.alias] = importlib.import_module(self.name)
        return getattr(module, attribute)


if TYPE_CHECKING:
    import ast

    import numpy as np
    import onnx
    import onnx_ir as ir
    import torch
    import transformers
    from torch import Tensor, nn
    from torch.onnx import symbolic_helper

    T = TypeVar("T")
else:
    ast, np, onnx, ir = Lazy("ast", "ast"), Lazy("numpy", "np"), Lazy("onnx", "onnx"), Lazy("onnx_ir", "ir")
    torch, nn, transformers = Lazy("torch", "torch"), Lazy("torch.nn", "nn"), Lazy("transformers", "transformers")
    symbolic_helper = Lazy("torch.onnx.symbolic_helper", "symbolic_helper")

__version__ = "0.1.0"

# ---------------------------------------------------------------------------------------------------------------------
# types, errors and the log: what every room may use
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_OPSET = 14
MIN_OPSET = 7  # torch.onnx._constants.ONNX_MIN_OPSET
TORCHSCRIPT_MAX_OPSET = 20  # torch.onnx._constants.ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET
DYNAMO_MIN_OPSET = 18  # below it the exporter writes 18 all the same
LATER_OPSETS = (16, 18, 20)  # with other translations of the TorchScript exporter: from 16 on ScatterElements can sum
MAX_OPSET = 25  # the newest one that onnxscript 0.7's version converter reaches
THREAD_STACK = 10 << 20  # bytes, of each thread of torch's pool: glibc's 8 MB and a guard
SINGLE_FILE_LIMIT = 2_000_000_000  # bytes of weights; protobuf itself ends at 2**31 - 1
ALIGNMENT = 64  # bytes, of weights in a file: what the widest vector instructions want
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
MODES = ("auto", "pytorch", "huggingface", "state_dict")
# What torch, the C library, the C++ runtime and the dynamic loader say when memory runs out.
NO_MEMORY = re.compile(
    r"can't allocate memory|[Cc]annot allocate memory|failed to map segment|std::bad_alloc|[Uu]nable to allocate"
)
SCREEN = 1800  # characters of a message: somewhat less than 24 lines of 80
STEP_BYTES = 200  # of the names of a step and of an attempt that another process reads
LONGEST_WORD = 500  # characters without a space, such as a path


class ExitStatus(IntEnum):
    """Exit codes; the README and --help list them."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    REFUSED = 4
    EXPORT = 5
    VERIFY = 6
    RESOURCES = 7


EXIT_CODES = """exit codes:
  0  done: the ONNX model is written and verified
  1  a bug in this tool (the only case that shows a traceback: please report it)
  2  wrong usage: an option, a shape or an output path that cannot work
  3  the input cannot be read or is not a model
  4  refused: the file would have to be executed to load it
  5  no exporter could express the model
  6  the exported model failed the checker or differs from PyTorch
  7  out of memory, disk or device
  130/143  interrupted by Ctrl-C / SIGTERM (129: SIGHUP) before anything was written: what was there is as it was"""


class ConversionError(Exception):
    """A problem that the user can act on: one line that says what is wrong and what to do next."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class UsageError(ConversionError):
    """An option, a shape or an output path cannot work."""

    def __init__(self, message: str) -> None:
        super().__init__(ExitStatus.USAGE, message)


class InputError(ConversionError):
    """The input cannot be read, or is not a model."""

    def __init__(self, message: str) -> None:
        super().__init__(ExitStatus.INPUT, message)


class RefusedFileError(ConversionError):
    """The file holds what could run code when it is opened in the ordinary way."""

    def __init__(self, message: str) -> None:
        super().__init__(ExitStatus.REFUSED, message)


class DamagedFileError(InputError):
    """The file contradicts itself or ends too early."""


class OutsideError(RefusedFileError):
    """A package would be imported from where no packages are installed."""


class WallError(RefusedFileError, PermissionError):
    """Something would have been opened, started or connected to that the wall is around (see Wall)."""


def and_more(items: Collection[object], shown: int, limit: int = 100) -> str:
    """The first `shown` of `items`, each cut to `limit` characters, and how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(shorten(str(item), limit) for item in itertools.islice(items, shown)) + more


def plural(count: int, noun: str) -> str:
    """`1 input`, `2 inputs`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def word_set(text: str) -> frozenset[str]:
    """The words of a table."""
    return frozenset(text.split())


def full_names(table: str) -> frozenset[str]:
    """The names of a table whose lines say `package.module: name other.name`, each with its package before it."""
    lines = [line.partition(":") for line in table.strip().splitlines()]
    return frozenset(f"{module.strip()}.{name}" for module, _, names in lines for name in names.split())


def printable(text: object) -> str:
    """`text` on one line with control characters escaped: names come from files that nobody has vetted."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def shorten(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters: names from a file may be megabytes long."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(value: object) -> str:
    """A value from a file as messages show it: containers may contain each other, so their text is unbounded."""
    if isinstance(value, (str, bytes, int, float, type(None))):
        return shorten(repr(value[:80] if isinstance(value, (str, bytes)) else value), 60)
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    return f"a {type(value).__name__}"


def is_one_of(value: object, known: Collection[object]) -> bool:
    """Whether a value from a file is one of `known` texts and constants; nothing else is hashed or compared."""
    return isinstance(value, (str, bool, type(None))) and value in known


def fit_screen(text: object) -> str:
    """`text` as one printable line of at most SCREEN characters: words of a file's making are cut, then the middle.

    Every message goes through here, so that no caller can forget it; the advice at the end stays.
    """
    whole = str(text)
    if len(whole) > 8 * SCREEN:
        whole = f"{whole[: 4 * SCREEN]} ... {whole[-4 * SCREEN :]}"
    line = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: shorten(word[0], LONGEST_WORD), printable(whole))
    return line if len(line) <= SCREEN else f"{line[: SCREEN * 3 // 4]} ... {line[-SCREEN // 4 + 5 :]}"


def size_text(count: int) -> str:
    """Bytes in a unit that fits."""
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if count >= pair[0]), (1e3, "kB"))
    return f"{count / unit:.2f} {name}"


def crash_text(name: str, step: str) -> str:
    """What to say of a library that crashed with the signal `name` in a step of an attempt."""
    return f"a library crashed ({name}) in the step {step!r}"


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first non-empty line of an exception, with its type where the text alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[-1] if lines[0].startswith("The following operation failed in the TorchScript") else lines[0]
    text = text.partition("  [Caused by the value")[0]  # what follows is TorchScript's own notation, with paths
    if not text or isinstance(error, (KeyError, AttributeError, IndexError)):
        text = f"{type(error).__name__}: {text}"
    return printable(shorten(text, limit))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, whatever exception type a library uses."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or bool(isinstance(error, (RuntimeError, ImportError, OSError)) and NO_MEMORY.search(str(error)))
    )


def raise_out_of_memory(error: BaseException) -> None:
    """Raise MemoryError where `error` says that memory ran out: called first wherever any exception is caught."""
    if is_out_of_memory(error):
        raise error if isinstance(error, MemoryError) else MemoryError(first_line(error)) from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path before errors about what the file or folder holds."""
    try:
        yield
    except (RefusedFileError, DamagedFileError) as error:
        raise ConversionError(error.status, f"{path}: {shorten(str(error), 1000)}") from None


@contextlib.contextmanager
def explained(status: int, what: str, advice: str) -> Iterator[None]:
    """Turn any exception that unusual settings cause in a library into an error that says `what` cannot be done.

    What is told already passes, and so does the end of memory, which is not the settings' fault.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        raise_out_of_memory(error)
        raise ConversionError(status, f"{what} ({first_line(error)}); {advice}") from error


class Log:
    """The lines that a person reads, on standard error, and the only ones unless --verbose."""

    def __init__(self) -> None:
        self.stream = sys.stderr
        self.verbose = False
        self.advance: Callable[[int], None] = lambda _: None  # tells how many bytes were copied, during `copying`
        self.current: int | None = None  # a file where each step is named when it begins (see STEP_VARIABLE)
        self.attempt = ""  # that the steps belong to: the graph, the exporter and the opset
        self.held: list[str] | None = None  # the warnings of an attempt, which may come to nothing
        self.seconds: dict[str, float] = {}  # that steps of each kind took: the kind is what precedes the colon

    def line(self, prefix: str, text: str) -> None:
        """Write one line; `text` is made printable. A closed standard error does not fail the conversion."""
        with contextlib.suppress(OSError):
            if self.stream:  # None where standard error is closed
                print(f"[{prefix}] {fit_screen(text)}", file=self.stream, flush=True)

    def info(self, text: str) -> None:
        """What happens and why."""
        self.line("INFO", text)

    def warn(self, text: str) -> None:
        """What the user should know although the conversion goes on."""
        if self.held is None:
            self.line("WARN", text)
        else:
            self.held.append(text)

    @contextlib.contextmanager
    def holding_warnings(self) -> Iterator[list[str]]:
        """Collect the warnings, for whoever knows in the end whether they matter."""
        before, self.held = self.held, []
        try:
            yield self.held
        finally:
            self.held = before

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A step that may take long: a spinner on a terminal, a plain line elsewhere; the time is told at the end."""
        start = self.begin(text)
        if self.on_terminal():
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            text_column = TextColumn("{task.description}", markup=False)
            with self.display(SpinnerColumn(), text_column, TimeElapsedColumn()) as progress:
                progress.add_task(printable(text))
                yield
            self.info(f"{text}: {self.spent(text, start):.1f} s")
        else:
            self.info(text)
            yield
            self.spent(text, start)

    def begin(self, text: str) -> float:
        """Name the step for the supervisor; returns the time."""
        if self.current is not None:
            record = [line.encode(errors="replace")[:STEP_BYTES].ljust(STEP_BYTES) for line in (text, self.attempt)]
            os.pwrite(self.current, b"".join(record), 0)
        return time.monotonic()

    def spent(self, text: str, start: float) -> float:
        """Count the seconds since `start` for the step's kind, and return them."""
        seconds, kind = time.monotonic() - start, text.partition(":")[0]
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        return seconds

    @contextlib.contextmanager
    def copying(self, text: str, total: int) -> Iterator[None]:
        """A step that writes `total` bytes and calls `advance`; told at the end, and on a terminal shown as a bar."""
        start = self.begin(text)
        with contextlib.ExitStack() as stack:
            if self.on_terminal():
                from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

                text_column = TextColumn("{task.description}", markup=False)
                bar = stack.enter_context(
                    self.display(text_column, BarColumn(), DownloadColumn(), TransferSpeedColumn())
                )
                task = bar.add_task(printable(text), total=total)
                self.advance = lambda count: bar.advance(task, count)
            stack.callback(setattr, self, "advance", lambda _: None)
            yield
        seconds = self.spent(text, start)
        self.info(f"{text}: {total / 1e6:.1f} MB in {seconds:.1f} s ({total / 1e6 / max(seconds, 1e-3):.0f} MB/s)")

    def on_terminal(self) -> bool:
        """Whether somebody sees a step while it goes on."""
        return self.stream.isatty() and not self.verbose

    def display(self, *columns: Any) -> Any:
        """A progress display on the log's stream, gone when its step ends; other output is none of its business."""
        from rich.console import Console
        from rich.progress import Progress

        screen = Console(file=self.stream)
        return Progress(*columns, console=screen, transient=True, redirect_stdout=False, redirect_stderr=False)

    def silence_third_parties(self, *, verbose: bool) -> int:
        """Keep our lines on the terminal and send everything else nowhere (--verbose: to standard error).

        Libraries print from Python, from C++ and through logging; only the file descriptors catch all of it.
        Returns a descriptor of the real standard output, which then carries nothing but --json.
        """
        self.verbose = verbose
        standard_output = os.dup(1)
        if verbose:
            os.dup2(2, 1)
            import logging

            logging.basicConfig(stream=sys.stderr, level=logging.INFO)
        else:
            self.stream = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        return standard_output


LOG = Log()


class InputShape(NamedTuple):
    """One --input-shape: `dims`, and where given the input's name and dtype."""

    dims: tuple[int, ...]
    name: str | None = None
    dtype: str | None = None

    @property
    def argument(self) -> str:
        """The argument of forward that NAME, or NAME.KEY of a dict or list, belongs to; "" where there is no name."""
        return (self.name or "").partition(".")[0]

    def __str__(self) -> str:
        return f"{self.name + ':' if self.name else ''}{','.join(map(str, self.dims))}" + (
            f":{self.dtype}" if self.dtype else ""
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, with paths in place of texts; copies are made by `replace` only."""

    input: Path
    output: Path = Path()  # the .onnx file
    folder: Path = Path()  # the model's folder; the .onnx file lies in it or in a subfolder
    inspect: bool = False
    mode: str = "auto"
    input_shape: Sequence[InputShape] | None = None
    input_value: Sequence[tuple[str, Sequence[float]]] = ()
    opset: int | None = None
    task: str | None = None
    model_class: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_key: str | None = None
    no_cache: bool = False
    dtype: str = "fp32"
    layout: str = "onnx"
    device: str = "cpu"
    exporter: str = "auto"
    dynamic_axes: Sequence[Sequence[DynamicAxis]] | None = None
    static: bool = False
    run_timeout: float | None = None
    no_verify: bool = False
    verify_data: Path | None = None
    atol: float | None = None
    rtol: float | None = None
    allow_class: Sequence[str] = ()
    trust_pickle: bool = False
    revision: str | None = None
    base: str | None = None
    cache_dir: str | None = None
    trust_remote_code: bool = False
    json: bool = False
    verbose: bool = False


@dataclass
class Run:
    """What one conversion changes as it goes on: the only mutable object that the steps hand on."""

    staging: Path  # the folder that it works in, beside the output
    in_memory: bool = False  # load all weights, also those that could stay in their file until they are written
    streamed: bool = False  # some weights stayed in their file
    crashed: Mapping[str, Sequence[str]] = field(default_factory=dict)  # attempts that ended a worker: signal, step
    metadata: dict[str, str] = field(default_factory=dict)  # of every graph
    produced: dict[str, Produced] = field(default_factory=dict)  # the graphs that are done, by the names of their files


class DynamicAxis(NamedTuple):
    """One --dynamic-axes entry: `axis` of the input called `input_name` (of every input where that is None)."""

    axis: int
    name: str | None
    input_name: str | None


class Kind(IntEnum):
    """What an input file is."""

    CHECKPOINT = 0  # torch.save, zip layout (PyTorch 1.6 and newer)
    LEGACY_CHECKPOINT = 1  # torch.save before 1.6, or a plain pickle
    TORCHSCRIPT = 2
    EXPORTED_PROGRAM = 3
    SAFETENSORS = 4
    HUGGINGFACE = 5
    HUB_ID = 7  # owner/model on the Hugging Face hub
    SHARDED_WEIGHTS = 6  # an index file, NAME.safetensors.index.json or NAME.bin.index.json


class Source(NamedTuple):
    """An input, what it is, and how that was told."""

    path: Path
    kind: Kind
    why: str


def is_text(name: object) -> bool:
    """Whether `name` is text that can be written down: half a surrogate pair cannot."""
    return isinstance(name, str) and not any("\ud800" <= character <= "\udfff" for character in name)


class Loaded(NamedTuple):
    """What came out of a file: a module, a ScriptModule, an ExportedProgram or a checkpoint's dictionary."""

    content: Any
    what: str
    examples: tuple[InputShape, ...] = ()  # the inputs that the file records
    free: tuple[Mapping[int, str], ...] = ()  # for each of them: its axes of free size, and the program's symbols
    around: Mapping[Any, Any] = {}  # the checkpoint that it was taken out of
    eps: Mapping[str, float] = {}  # of layers, by name, where the weights come out of a complete model


class FolderModel(NamedTuple):
    """A Hugging Face model in memory: what it is for, and the outputs that its checkpoint has no weights for."""

    model: Any  # PreTrainedModel, or a model of timm
    task: str
    missing: frozenset[str] = frozenset()
    of_timm: bool = False
    facts: Mapping[str, str] = {}  # for the metadata
    steps: Sequence[Callable[..., Tensor]] = ()  # what makes a sentence's vector of the states

    def describe(self) -> str:
        """Its class."""
        return f"{type(self.model).__name__}{' of timm' if self.of_timm else ''}"


BATCH = "batch_size"


class InputSpec(NamedTuple):
    """One input of the model: `dims` as the user or the model gives them, `axes` the free ones and their names."""

    name: str
    dims: tuple[int, ...]
    dtype: torch.dtype
    axes: Mapping[int, str] = {}

    def resized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every free axis at the size that `sizes` gives its name."""
        return tuple(sizes.get(self.axes.get(axis, ""), size) for axis, size in enumerate(self.dims))


class Guess(NamedTuple):
    """Shapes that the model tells, one per input; `batch_axis` is -1 where there is none."""

    shapes: Sequence[InputShape]
    reason: str
    batch_axis: int = 0


class Preprocessing(NamedTuple):
    """What images a model was made for, as its library says: plain numbers, whatever the file holds."""

    size: tuple[int, ...] | None = None  # pixels: channels, height and width, or the edges alone
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str = ""  # who says so; "" where nobody does

    def metadata(self) -> str:
        """As JSON for the graph's metadata."""
        known = {key: value for key, value in self._asdict().items() if value is not None}
        return json.dumps(known, sort_keys=True)


Arrays = dict[str, Any]  # name -> numpy array
# Seeded inputs for sizes of the free axes and a seed.
Examples = Callable[[Mapping[str, int], int], "list[Tensor]"]


SAMPLE = "sample"  # the word in the labels of the user's own inputs


class Case(NamedTuple):
    """Inputs of one shape and PyTorch's outputs for them."""

    label: str
    inputs: Arrays
    outputs: Arrays
    decisions: Mapping[str, Sequence[str]] = {}  # what the model's code read from tensors, by source line
    values: str = ""  # where the inputs come from, if they are not drawn as usual; the label has it in brackets

    def is_drawn_wide(self) -> bool:
        """Whether the inputs are of one of VALUE_SETS, which may lie outside of what the model is for."""
        return self.values in VALUE_SETS


class Job(NamedTuple):
    """One graph to be made: what to export as which file, and what to compare it with.

    `traced` are the inputs that it is traced with. `further_checks` says more about a session than the cases do, and
    raises AttemptError.
    """

    model: nn.Module
    specs: list[InputSpec]
    outputs: list[str]
    traced: list[Tensor]
    cases: list[Case]
    file: str
    further_checks: Callable[[Any, Job, Options], list[Difference]] | None = None
    step: Job | None = None  # of a model with states: its work on one token, which is exported and then repeated
    parts: tuple[str, ...] = ()  # files of graphs made before, which become one: nothing is exported
    written: bool = True  # False for such a part, which is not kept
    with_fixed_batch: Callable[[], Job] | None = None  # plans it once more, where nobody asked for a free batch


class RejectedInputError(Exception):
    """The model raised when it was called; the cause is the original exception."""


CACHE_FLAG = "use_cache_branch"
SEQUENCE, PAST, TOTAL = "sequence_length", "past_sequence_length", "total_sequence_length"
ENCODER_SEQUENCE, DECODER_SEQUENCE = "encoder_sequence_length", "decoder_sequence_length"


class Graph(NamedTuple):
    """One graph of a model: its file, its module, its inputs at the traced sizes, and how to make examples of them."""

    file: str
    module: nn.Module  # tensors in, by position; a dict of tensors out
    specs: list[InputSpec]
    examples: Examples
    sizes: tuple[dict[str, int], ...]
    further_checks: Callable[[Any, Job, Options], list[Difference]] | None = None
    step: Job | None = None


class Attempt(NamedTuple):
    """One try: an exporter at an opset."""

    exporter: str
    opset: int

    def __str__(self) -> str:
        return f"{self.exporter}, opset {self.opset}"


class AttemptError(Exception):
    """Why an attempt failed. `exported`: there was a model; `needs`: the opset that an operator asks for.

    `slight`: the largest difference from PyTorch, where it is so small that a user may accept it. `case`: the inputs
    for which the model does not hold. `note`: what tracing fixed. `produced`: a graph that passed, but was not shown to
    follow what the model decides by values. `numbers`: the graph runs, and values differ.
    """

    note = ""
    numbers = False
    produced: Produced | None = None

    def __init__(
        self, reason: str, *, exported: bool = False, needs: int | None = None, slight: float | None = None,
        case: Case | None = None,
    ) -> None:  # fmt: skip
        super().__init__(reason)
        self.exported, self.needs, self.slight, self.case = exported, needs, slight, case

    def __str__(self) -> str:
        return f"{super().__str__()}{self.note}"


class Difference(NamedTuple):
    """How far an output is from PyTorch's, and what is wrong with that ("" for nothing)."""

    case: str
    output: str
    largest: float
    allowed: float
    problem: str = ""


class Produced(NamedTuple):
    """A graph in the staging folder that has passed every check."""

    job: Job
    attempt: Attempt
    path: Path
    light: Path  # the same graph, with the weights of `path` (see write_graph)
    differences: list[Difference]
    warnings: Sequence[str] = ()  # that hold for this attempt, and not for others


# ---------------------------------------------------------------------------------------------------------------------
# the story: from a path to a verified model in its place
#
# main watches over a worker that converts. A converter loads the input and plans its graphs (Job); produce() makes
# each: it exports, finishes, writes, checks and verifies. What they call lies below, in the order in which a model
# travels, and calls go down the file only.
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, detect and convert; returns the exit code.

    Runs twice: in the supervisor, which starts the worker and waits for it, and with WORKER_VARIABLE in that.
    """
    for descriptor in range(3):  # a closed one would be taken by the next file that is opened
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)
    arguments = sys.argv[1:] if argv is None else list(argv)
    name, step = os.environ.pop(WORKER_VARIABLE, None), os.environ.pop(STEP_VARIABLE, None)
    crashed = json.loads(os.environ.pop(CRASHED_VARIABLE, "{}"))
    as_json = "--json" in arguments
    try:
        options = parse_arguments(arguments)
        USER_CLASSES.clear()
        USER_CLASSES.update(options.allow_class)
        INPUT_ROOTS.clear()
        source = detect(options.input)
        if name is None:
            return supervise(arguments, options, f"{os.getpid()}.{os.urandom(4).hex()}")
    except (ConversionError, OSError) as error:
        known = as_conversion_error(error)
        if known is None:
            raise
        return report_failure(known, 1, as_json=as_json)
    LOG.current = int(step) if step else None
    # Tearing down torch takes a second and frees what the kernel frees anyway.
    os._exit(work(source, options, Run(staging_folder(options, name), crashed=crashed)))


def work(source: Source, options: Options, run: Run) -> int:
    """The worker's life: convert or inspect, and return the exit code.

    What was converted is reported by the supervisor, which alone knows in the end what lies in the output folder.
    """
    standard_output = LOG.silence_third_parties(verbose=options.verbose)
    try:
        if source.kind is Kind.HUB_ID:
            advice = "or check -i, if a path was meant"
            source = download(str(source.path), options.revision, options, otherwise=advice)
            options = replace(options, input=source.path)
        if not options.inspect:
            convert(source, options, run)
            return ExitStatus.OK
        with WALL.up(unless=options.trust_pickle):
            facts = inspect(source, options)
    except Exception as error:  # the one place where errors become exit codes
        known = as_conversion_error(error)
        if known is None or options.verbose:
            traceback.print_exc(file=LOG.stream)
        bug = f"a bug in pt2onnx {__version__} ({first_line(error)}); please report it with the traceback above"
        return report_failure(known or ConversionError(ExitStatus.BUG, bug), standard_output, as_json=options.json)
    report_inspection(facts)
    if options.json:
        print_report(facts, standard_output)
    return ExitStatus.OK


def convert(source: Source, options: Options, run: Run) -> dict[str, Any]:
    """Convert `source` as `options` say; returns the report that --json prints. Raises ConversionError.

    What fails with weights left in their file, where a model needs them in memory,
    is tried once more with all of them in memory.
    """
    start = time.monotonic()
    try:
        convert_once(source, options, run)
    except ConversionError as error:
        lasting = error.status in (ExitStatus.INPUT, ExitStatus.REFUSED, ExitStatus.RESOURCES)
        if lasting or not run.streamed:
            raise
        LOG.info(f"{error}")
        LOG.info("once more with all weights in memory, should the model need them there")
        empty_staging(run.staging)
        run = Run(run.staging, in_memory=True, crashed=run.crashed)
        convert_once(source, options, run)
    kept = [produced for produced in run.produced.values() if produced.job.written]
    places = choose_places(kept, options, run)
    graphs = [describe_graph(produced, options) for produced in kept]
    report = {
        "status": "ok",
        **graphs[0],
        "files": {str(place.target): place.file.stat().st_size for place in places},
        "steps": {kind: round(seconds, 2) for kind, seconds in LOG.seconds.items()},
        "mode": run.metadata["mode"],
        **({"graphs": graphs} if len(graphs) > 1 else {}),
        "seconds": round(time.monotonic() - start, 2),
    }
    move_into_place(places, report, run.staging)
    return report


def convert_once(source: Source, options: Options, run: Run) -> None:
    """Load `source`, plan its graphs in the mode that takes it, and produce each."""
    if source.kind is Kind.HUGGINGFACE:
        jobs = convert_huggingface_model(source, options, run)
    else:
        check_no_base(options)
        digest = in_background(source_digest, source)  # beside the imports, which leave a core free
        loaded = load_content(source, options)
        mode = choose_mode(source, loaded, options)
        run.metadata = {"source_sha256": digest.result(), "mode": mode}
        converters = {"pytorch": convert_pytorch_model, "state_dict": convert_state_dict_model}
        try:
            jobs = converters[mode](loaded, options, run)
        except InputError as error:
            old = mode == "pytorch" and isinstance(error.__cause__, AttributeError)
            raise (with_class_advice(error, source) if old else error) from error.__cause__
    for job in jobs:
        produce(job, options, run)


def convert_pytorch_model(loaded: Loaded, options: Options, run: Run) -> list[Job]:
    """The graph of a complete model: a pickled module, TorchScript or an exported program."""
    model = loaded.content
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{options.input} holds {loaded.what}, not a model; pass --mode state_dict and --model-class")
    if isinstance(model, torch.jit.ScriptModule) and options.input_value:
        model, options = with_constants(model, options)
    with explained(ExitStatus.INPUT, f"{options.input}: its weights cannot be used", "save its state dict"):
        store_parameters(model, options, run)
    return [plan_loaded(model, loaded, options, run)]


def convert_huggingface_model(source: Source, options: Options, run: Run) -> list[Job]:
    """The graphs of the model in a Hugging Face folder for its task; the files that belong beside them are staged."""
    check_options(options)
    trust = options.trust_remote_code
    outer = vet_folder(source.path, trust=trust)
    adapter = read_adapter(outer, options)
    inner = vet_inner_folder(outer, adapter, trust=trust)
    check_folder(inner)
    digest = in_background(folder_digest, source.path, inner.path)
    folder = copy_without_code(inner, run.staging / "source", trust=trust)
    if adapter:
        copy_without_code(outer, folder, trust=trust, only=PROCESSOR_FILES)
    check_side_files(folder, options)
    found = load_folder_model(outer, folder, adapter, options, run)
    LOG.info(f"mode: huggingface; {source.path.name} holds {found.describe()} for {found.task}: {source.why}")
    RUNS.begin(options, own_code=False)
    what = f"{type(found.model).__name__} cannot be called the way that {found.task} needs"
    advice = "try another --task, or --no-cache"
    bound = memory_bound(
        free_bytes(options, LATER_BYTES), "running the model", "check its settings, or pass --run-timeout", RUNS.start
    )
    with (
        LOG.step("reference: PyTorch's answers"),
        blank_weights(found.model) if options.no_verify else contextlib.nullcontext(),  # shapes alone count then
        without_kept_state(found.model),
        WALL.up(run.staging, unless=has_own_code(options)),
        time_limit(GRAPH_RUNS * run_seconds(options, own_code=False)),
        naming(source.path),
        explained(ExitStatus.EXPORT, what, advice),  # an unusual cache, call or configuration
        bound,
    ):
        graphs = graphs_of(found, folder, options)
        if not found.of_timm:
            found.model.set_attn_implementation("eager")  # the others answer differently where all is masked
        samples = read_samples(options.verify_data) if options.verify_data else {}
        if samples and len(graphs) > 1:
            raise UsageError(f"--verify-data is for one graph, and {found.describe()} becomes several: leave it out")
        jobs = [plan_graph(graph, options, samples) for graph in graphs]
    if not found.of_timm:
        prepare_for_export(found.model)
    if len(jobs) > 1:
        jobs = [jobs[0], *(part._replace(written=False) for part in jobs[1:])]
        jobs.append(merged_decoder(found.model, jobs, options, run))
    run.metadata = {"mode": "huggingface", "task": found.task, **found.facts, "source_sha256": digest.result()}
    stage_side_files(folder, run.staging / "beside")
    return jobs


def convert_state_dict_model(loaded: Loaded, options: Options, run: Run) -> list[Job]:
    """The graph of weights, with the class that --model-class names, or that they are recognised to belong to."""
    weights, hints = loaded.content, loaded.around.get("hyper_parameters")
    check_weights(weights.values(), options.input)
    if not options.model_class:
        options = recognised_class(weights, loaded.around, options)
    size = sum(tensor.nbytes for tensor in weights.values())
    with (
        LOG.step(f"build: {options.model_class}"),
        WALL.up(unless=has_own_code(options)),
        naming(options.input),
        bounded_build(len(weights), size),
    ):
        hints = hints if isinstance(hints, Mapping) else {}
        weights = store_all(weights, options, run)
        model = model_from_weights(str(options.model_class), options.model_args, weights, hints)
        adopt_eps(model, loaded.eps)
    return [plan_loaded(model, loaded, options, run)]


def produce(job: Job, options: Options, run: Run) -> Produced:
    """Export, finish, write, check and verify one graph: the first attempt that passes, at the opset asked for.

    Raises ConversionError (EXPORT or VERIFY).
    """
    if options.no_verify and not job.parts:
        LOG.warn("--no-verify: nothing proves that the exported model computes the same")
    attempts = plan_attempts(options.exporter, options.opset)
    if not attempts:
        raise UsageError(
            f"--exporter dynamo writes opset {DYNAMO_MIN_OPSET} and up; pass such an --opset, or another --exporter"
        )
    if job.parts:
        attempts = [run.produced[job.parts[0]].attempt]
    make = functools.partial(make_graph, job=job, options=options, run=run)
    own_code = is_archive(job.model)
    seconds = math.inf if options.run_timeout else CONVERSION_RUNS * run_seconds(options, own_code=own_code)
    what, advice = "converting the model at guessed sizes", "pass --input-shape, or --run-timeout"
    with (
        naming(options.input),
        WALL.up(run.staging, unless=has_own_code(options)),
        memory_bound(free_bytes(options, LATER_BYTES), what, advice, RUNS.start),
        time_limit(seconds if not has_own_code(options) else math.inf),
    ):
        produced, failures = best_graph(attempts, make, job, higher=options.opset is None and not job.parts)
        if produced is None:
            raise every_attempt_failed(failures, make, job, options)
    for warning in produced.warnings:
        LOG.warn(warning)
    if options.opset is None and produced.attempt.opset != DEFAULT_OPSET and not job.parts:
        why = reasons_of(failures) or f"the {produced.attempt.exporter} exporter starts there"
        LOG.warn(f"opset {produced.attempt.opset} instead of {DEFAULT_OPSET}: {why}")
    run.produced[job.file] = produced
    LOG.attempt = ""
    return produced


def best_graph(
    attempts: Sequence[Attempt], make: Callable[..., Produced], job: Job, *, higher: bool
) -> tuple[Produced | None, list[tuple[Attempt, AttemptError]]]:
    """The first attempt that passes; else one that passes but was not shown to follow what the model decides by values.

    Where no graph has a free batch, and none has wrong numbers, one with the given batch. Both come with a warning.
    """
    produced, failures = first_success(attempts, make, higher=higher)
    if produced is None and (undecided := [error.produced for _, error in failures if error.produced]):
        produced = undecided[0]
        LOG.warn(f"{produced.attempt}: {fixed_decisions(job)}: compare the graph with your own data")
    elif produced is None and job.with_fixed_batch and not any(error.numbers for _, error in failures):
        LOG.info(f"every exporter failed ({reasons_of(failures)}); retrying with a fixed batch size")
        again = functools.partial(make, job=job.with_fixed_batch())
        produced, others = first_success(attempts, again, higher=higher)
        if produced:
            LOG.warn(f"the batch is fixed ({shape_text(produced.job.specs[0].dims)}): {reasons_of(failures)}")
            failures = others
    return produced, failures


def first_success(
    attempts: Sequence[Attempt], make: Callable[[Attempt], Produced], *, higher: bool = True
) -> tuple[Produced | None, list[tuple[Attempt, AttemptError]]]:
    """The first of `attempts` that passes, and why others failed; an operator that wants a `higher` opset gets it."""
    waiting, planned = list(attempts), set(attempts)
    failures: list[tuple[Attempt, AttemptError]] = []
    while waiting:
        attempt = waiting.pop(0)
        try:
            return make(attempt), failures
        except AttemptError as error:
            failures.append((attempt, error))
            LOG.info(f"{attempt}: {error}")
            more: list[Attempt] = []
            if higher and error.needs is not None and error.needs > attempt.opset:
                more = [Attempt(attempt.exporter, error.needs)]
            elif higher and error.exported and not error.note and attempt == Attempt("torchscript", DEFAULT_OPSET):
                more = [Attempt("torchscript", opset) for opset in LATER_OPSETS]
            waiting += [other for other in more if other not in planned]
            planned.update(more)
            if more and error.needs is not None:
                waiting.sort(key=lambda waits: waits.opset)  # the lowest that passes
    return None, failures


def make_graph(attempt: Attempt, job: Job, options: Options, run: Run) -> Produced:
    """One attempt; where tracing fixed what another case needs, once more with that case's inputs."""
    try:
        with LOG.holding_warnings() as warned:
            return make_graph_once(attempt, job, options, run)._replace(warnings=warned)
    except AttemptError as error:
        error.produced = error.produced and error.produced._replace(warnings=warned)
        if not error.note or error.case is None or error.case is job.cases[0]:  # the traced sizes themselves
            raise
        LOG.info(f"{attempt}: {error}; tracing again with those inputs")
        again = job._replace(traced=case_tensors(error.case, job))
        with (
            contextlib.suppress(AttemptError),  # the first one's reason is told
            traced_whole_numbers(job.model),
            LOG.holding_warnings() as warned,
        ):
            return make_graph_once(attempt, again, options, run)._replace(warnings=warned)
        raise


def make_graph_once(attempt: Attempt, job: Job, options: Options, run: Run) -> Produced:
    """Export, finish, write, check and verify, in a folder of the graph's own; raises AttemptError."""
    LOG.attempt = f"{job.file}: {attempt}"
    if LOG.attempt in run.crashed:
        name, step = run.crashed[LOG.attempt]
        raise AttemptError(crash_text(name, step), exported=step != "export")
    folder = run.staging / job.file.removesuffix(".onnx")
    path, work, note = folder / job.file, folder / "work", ""
    with WALL.up(unless="it is our own folder"):  # rmtree names files relative to open folders
        shutil.rmtree(folder, ignore_errors=True)
        work.mkdir(parents=True)
    with LOG.step(f"export: {attempt}" if not job.parts else f"merge: {' and '.join(job.parts)}"):
        if job.parts:
            exported = merge_decoders(*(run.produced[name].light for name in job.parts))
        else:
            exported, note = run_exporter(attempt, job, work)
    graph = finish_graph(exported, job, {**run.metadata, "exporter": exporter_name(attempt)})
    light = write_graph(graph, path)
    del exported, graph
    with WALL.up(unless="it is our own folder"):
        shutil.rmtree(work)
    with LOG.step("check: onnx.checker"):
        check_graph(light, attempt.opset)
    if varying := [name for name in job.outputs if varies_in_rank(name, job)]:
        LOG.warn(f"the number of axes of {and_more(varying, 3)} depends on the input: its shape is not declared")
        for file in {path, light}:
            drop_output_shapes(file, varying)
    if options.no_verify:
        return Produced(job, attempt, path, light, [])
    shapes = "; ".join(dict.fromkeys(case.label.removesuffix(f" ({case.values})") for case in job.cases))
    values = ", ".join(dict.fromkeys(case.values for case in job.cases if case.values))
    with LOG.step(f"verify: ONNX Runtime against PyTorch at {shapes}{values and f', with {values}'}"):
        try:
            produced = Produced(job, attempt, path, light, verify(light, job, options))
        except AttemptError as error:
            error.note = note
            raise
    if note and not is_archive(job.model) and (fixed := fixed_decisions(job)):
        kept = folder.with_name(f"{folder.name}.fixed")
        with WALL.up(unless="they are our own folders"):
            folder.rename(kept)
        undecided = AttemptError(f"it passes, but {fixed}")
        undecided.produced = produced._replace(path=kept / path.name, light=kept / light.name)
        raise undecided
    return produced


def every_attempt_failed(
    failures: Sequence[tuple[Attempt, AttemptError]],
    make: Callable[[Attempt], Produced],
    job: Job,
    options: Options,
) -> ConversionError:
    """The error that says why each attempt failed and what to do; for an opset that was asked for, which one works."""
    choices = [
        "leave out --dynamic-axes" if options.dynamic_axes else "",
        "try another --exporter" if options.exporter != "auto" else "",
        f"leave out --dtype {options.dtype}" if options.dtype != "fp32" else "",
        "change that part of the model"
        if any(error.exported for _, error in failures)
        else "replace the operator in the model",
    ]
    advice = " or ".join(filter(None, choices))
    slight = [error.slight for _, error in failures if error.slight]
    if slight:  # 5 % more than the difference, so that two digits are enough
        advice = f"pass --atol {min(slight) * 1.05:.2g} if you accept such a difference, or {advice}"
    if options.opset is not None and not job.parts:
        LOG.info(f"opset {options.opset} cannot express this model; looking for the lowest one that can")
        others = [other for other in plan_attempts(options.exporter, None) if other.opset != options.opset]
        others += [Attempt(attempt.exporter, error.needs) for attempt, error in failures if error.needs is not None]
        found, _ = first_success(sorted(others, key=lambda other: other.opset), make)
        works = f"opset {found.attempt.opset} works: pass --opset {found.attempt.opset}" if found else ""
        advice = works or "no other opset works either"
    status = ExitStatus.VERIFY if any(error.exported for _, error in failures) else ExitStatus.EXPORT
    return ConversionError(status, f"every exporter failed ({reasons_of(failures)}); {advice}")


def reasons_of(failures: Sequence[tuple[Attempt, AttemptError]]) -> str:
    """Why attempts failed, each reason once."""
    attempts: dict[str, list[Attempt]] = {}
    for attempt, error in failures:
        attempts.setdefault(str(error), []).append(attempt)
    return "; ".join(f"{' and '.join(map(str, alike))}: {reason}" for reason, alike in attempts.items())


def load_content(source: Source, options: Options) -> Loaded:
    """What the file holds: a model, or weights; of a checkpoint, what is inside."""
    with LOG.step(f"load: {source.path}"), WALL.up(unless=options.trust_pickle):
        try:
            loaded = load(source, trust=options.trust_pickle, weights=bool(options.model_class))
        except ConversionError as error:
            raise with_class_advice(error, source) from None
    return unwrap_checkpoint(loaded, options) if isinstance(loaded.content, Mapping) else loaded


def choose_mode(source: Source, loaded: Loaded, options: Options) -> str:
    """The mode that takes what was loaded, told with the reason; raises ConversionError where --mode contradicts it."""
    natural = "state_dict" if isinstance(loaded.content, Mapping) else "pytorch"
    if options.mode not in ("auto", natural):
        raise UsageError(f"--mode {options.mode}: {source.path} holds {loaded.what}; pass --mode {natural}, or none")
    if natural == "pytorch" and (options.model_class or (options.checkpoint_key and not loaded.around)):
        unused = "--model-class" if options.model_class else "--checkpoint-key"
        raise UsageError(f"{unused} is for weights, but {source.path} holds {loaded.what}: leave it out")
    LOG.info(f"mode: {natural}; {source.path.name} holds {loaded.what}: {source.why}")
    return natural


def unwrap_checkpoint(loaded: Loaded, options: Options) -> Loaded:
    """The model or the weights inside a checkpoint; raises ConversionError where that is not clear."""
    if not loaded.content and options.model_class:  # the state dict of a class without weights
        return loaded
    with naming(options.input):
        found = find_weights(loaded.content, options.checkpoint_key)
        if isinstance(found.content, Mapping):
            return loaded._replace(content=found.content, around=loaded.content)
        check_module_graph(found.content)
    what = f"a checkpoint with a model in its entry {found.key!r} ({qualified_name(type(found.content))})"
    return Loaded(found.content, what, around=loaded.content)


def plan_loaded(model: nn.Module, loaded: Loaded, options: Options, run: Run) -> Job:
    """The graph of a module in memory, with PyTorch's answers; raises ConversionError where it is broken.

    Its attributes may be anything: they come from a file.
    """
    check_weights(itertools.chain(model.parameters(), model.buffers()), options.input)
    cls = type(model)
    unusual = f"{options.input}: the attributes of the model in it are not what {cls.__name__} needs"
    advice = "save it again, or its state dict"
    if belongs(cls.__module__, ("timm", "torchvision")):
        advice = "another version saved it: use its weights alone, with --model-class and the model's name"
    with (
        WALL.up(unless=has_own_code(options)),
        naming(options.input),
        explained(ExitStatus.INPUT, unusual, advice),
    ):
        if not isinstance(model, torch.fx.GraphModule):
            model.eval()
        choose_dtype(model, options)
        check_room(model, run)
        for parameter in model.parameters():  # ScriptModule has no requires_grad_()
            parameter.requires_grad_(False)  # noqa: FBT003
        model.to(options.device)
        if isinstance(model, torch.jit.ScriptModule):
            use_device(model, options.device)
        RUNS.begin(options, own_code=is_archive(model))
        with LOG.step("reference: PyTorch's answers"), without_kept_state(model):
            known = preprocessing(model, options.model_class)
            samples = read_samples(options.verify_data) if options.verify_data else {}
            if samples and not options.input_shape:
                options = replace(options, input_shape=shapes_of(next(iter(samples.values())), model))
            job = plan_module(model, loaded, known, options, samples)
    run.metadata |= {"task": options.task} if options.task else {}
    run.metadata |= {"preprocessing": known.metadata()} if known.source else {}
    return job


def case_tensors(case: Case, job: Job) -> list[Tensor]:
    """The case's inputs as the model takes them."""
    return [
        torch.from_numpy(case.inputs[spec.name]).to(given.device, spec.dtype)
        for spec, given in zip(job.specs, job.traced, strict=True)
    ]


def in_background(function: Callable[..., str], *arguments: Any) -> Future[str]:
    """Call a function in a thread of its own."""
    return ThreadPoolExecutor(1).submit(function, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# arguments
#
# Takes the command line, gives Options. Touches nothing but the folders that the output would go to, which it looks
# at.
# ---------------------------------------------------------------------------------------------------------------------

SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_][\w.]*):)?(?P<dims>\d+(?:,\d+)*)(?::(?P<dtype>\w+))?")
AXIS = re.compile(r"(?P<axis>\d+)(?:=(?P<name>[A-Za-z_]\w*))?")


def path_argument(text: str) -> str:
    """A path that is not empty, as an unset variable of a script would be."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return text


def shape_argument(text: str) -> InputShape:
    """`1,3,224,224`, `image:1,3,224,224`, `1,16:int64` or `ids:1,16:int64`."""
    match = SHAPE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1,3,224,224 or ids:1,16:int64")
    dims = tuple(int(number) for number in match["dims"].split(","))
    if min(dims) < 1 or math.prod(dims) > 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} has a dimension of 0, or over 2**31 elements")
    if match["dtype"] not in (None, *DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r} names no dtype of {', '.join(DTYPES)}")
    return InputShape(dims, match["name"], match["dtype"])


def value_argument(text: str) -> tuple[str, tuple[float, ...]]:
    """`lengths=5,3` or `scale=0.5`: an input's name and its numbers, whole ones as int."""
    name, _, numbers = text.partition("=")
    try:
        values = tuple(
            int(part) if re.fullmatch(r"[+-]?\d{1,18}", part) else float(part) for part in numbers.split(",")
        )
    except ValueError:
        values = ()
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or not values:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name and its numbers, such as lengths=5,3")
    return name, values


def axes_argument(text: str) -> list[DynamicAxis]:
    """`0,2,3`, `0=batch_size,2=height` or `image:0,2`: axes of every input, or of the one that is named."""
    name, colon, axes = text.rpartition(":")
    matches = [AXIS.fullmatch(part) for part in axes.split(",")]
    if not all(matches) or (colon and not name):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of axes such as 0,2,3 or image:0=batch_size,2=height")
    return [DynamicAxis(int(match["axis"]), match["name"], name or None) for match in matches if match]


def opset_argument(text: str) -> int:
    """An opset that one of the exporters writes."""
    if not text.isdecimal() or not MIN_OPSET <= int(text) <= MAX_OPSET:
        raise argparse.ArgumentTypeError(f"{text!r} is not an opset from {MIN_OPSET} to {MAX_OPSET}")
    return int(text)


def tolerance_argument(text: str) -> float:
    """A finite number of zero or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of zero or more")
    return value


def seconds_argument(text: str) -> float:
    """A finite number above zero."""
    value = tolerance_argument(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above zero")
    return value


def json_argument(text: str) -> dict[str, Any]:
    """A JSON object: keyword arguments."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"num_classes\": 10}}'")
    return value


def class_argument(text: str) -> str:
    """The type of --allow-class."""
    names = text.split(".")
    if len(names) < 2 or not all(name.isidentifier() for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is not written package.module.Class")
    return text


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are ConversionErrors: one [ERROR] line like every other."""

    def error(self, message: str) -> NoReturn:
        """Raise a usage error for main to report."""
        raise UsageError(f"{message} (--help lists the options)")


def build_parser() -> Parser:
    """The command line; the README's option table is checked against it."""
    parser = Parser(
        prog="convert.py",
        description="Turn a PyTorch model into an ONNX model that has been verified to compute the same.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-i", "--input", required=True, type=path_argument, metavar="PATH", help="model file, directory or hub id")
    add("-o", "--output", type=path_argument, metavar="PATH", help=".onnx file, or directory (for DIR/model.onnx)")
    add("--inspect", action="store_true", help="say what the input is and how to convert it; nothing is written")
    add("-m", "--mode", choices=MODES, default="auto", help="what the input is (default: auto, told by its content)")
    add(
        "--input-shape",
        nargs="+",
        type=shape_argument,
        metavar="[NAME:]DIMS[:DTYPE]",
        help="a shape per input: 1,3,224,224 or ids:1,16:int64 (default: what the model tells, else 1,3,224,224)",
    )
    add(
        "--input-value",
        nargs="+",
        type=value_argument,
        metavar="NAME=NUMBERS",
        default=(),
        help="what an input such as lengths or sizes is called with, where no drawn number will do: lengths=5,3",
    )
    add(
        "--opset",
        type=opset_argument,
        metavar="N",
        help=f"ONNX opset version (default: {DEFAULT_OPSET}, or the lowest that can express the model)",
    )
    add("--task", metavar="NAME", help="what the model is for, e.g. image-classification; kept in the model's metadata")
    add(
        "--model-class",
        metavar="NAME",
        help="class of bare weights: a torchvision or timm name, or package.module:Class (default: recognised)",
    )
    add("--model-args", type=json_argument, default={}, metavar="JSON", help="keyword arguments for --model-class")
    add("--checkpoint-key", metavar="KEY", help="entry of the checkpoint that holds the weights, e.g. ema.module")
    add(
        "--no-cache", action="store_true", help="text generation without past_key_values inputs: the whole text at once"
    )
    add(
        "--dtype",
        choices=tuple(DTYPE_NAMES),
        default="fp32",
        help="of the weights and inputs in the graph (default: fp32)",
    )
    add(
        "--layout",
        choices=("onnx", "transformersjs"),
        default="onnx",
        help="of a Hugging Face model's folder: DIR/model.onnx, or DIR/onnx/model.onnx as transformers.js wants it",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to load, run and export (default: cpu)")
    add(
        "--exporter",
        choices=("auto", "torchscript", "dynamo"),
        default="auto",
        help="use only this exporter (default: auto, try each until one passes verification)",
    )
    axes = parser.add_mutually_exclusive_group()
    axes.add_argument(
        "--dynamic-axes",
        nargs="+",
        type=axes_argument,
        metavar="[NAME:]AXIS[=LABEL],...",
        help="axes of free size besides the batch, e.g. 2,3 or image:2=height,3=width (default: the batch alone)",
    )
    axes.add_argument("--static", action="store_true", help="no axis of free size, not even the batch")
    add(
        "--run-timeout",
        type=seconds_argument,
        metavar="SECONDS",
        help="what one run of the model may take before it is given up as endless (default: by the size of the file)",
    )
    add("--no-verify", action="store_true", help="do not compare with PyTorch (the checker still runs)")
    add(
        "--verify-data",
        type=path_argument,
        metavar="PATH",
        help="compare with your own inputs, too: an .npz file with arrays named as the inputs, or a directory of such",
    )
    add("--atol", type=tolerance_argument, metavar="X", help="absolute tolerance (default: fits dtype and values)")
    add("--rtol", type=tolerance_argument, metavar="X", help="relative tolerance (default: fits dtype and values)")
    add(
        "--allow-class",
        nargs="+",
        action="extend",
        type=class_argument,
        default=[],
        metavar="package.module.Class",
        help="more classes that a pickle may hold, of packages that you installed or put on PYTHONPATH",
    )
    add("--trust-pickle", action="store_true", help="execute the input's pickle or archive as its maker wrote it")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub (default: its main branch)")
    add("--base", type=path_argument, metavar="PATH", help="folder or hub id of the model that an adapter belongs to")
    add("--cache-dir", metavar="PATH", help="where downloads from the hub are kept (default: that of HF_HOME)")
    add("--trust-remote-code", action="store_true", help="allow Python code that a Hugging Face folder brings along")
    add("--json", action="store_true", help="print one JSON object about the result on standard output")
    add("-v", "--verbose", action="store_true", help="show everything that the libraries print, and tracebacks")
    add("--version", action="version", version=f"pt2onnx {__version__}")
    return parser


def parse_arguments(argv: Sequence[str]) -> Options:
    """Parse `argv`; raises UsageError, or ConversionError (RESOURCES) where there is no such device."""
    given = vars(build_parser().parse_args(argv))
    check_encoding(argv, (given["input"], given["cache_dir"] or given["input"]))
    given["input"] = Path(given["input"])
    output = given.pop("output")
    if output is None and not given["inspect"]:
        raise UsageError("the following arguments are required: -o/--output (or pass --inspect)")
    given["verify_data"] = Path(given["verify_data"]) if given["verify_data"] else None
    options = Options(**given)
    if options.dtype == "bf16" and options.device == "cpu" and not options.no_verify:
        raise UsageError(
            "--dtype bf16 cannot be verified here: ONNX Runtime's CPU operators lack bfloat16; pass --dtype fp16, or "
            "--no-verify for a graph without proof"
        )
    if options.verify_data and options.no_verify:
        raise UsageError("--no-verify leaves nothing for --verify-data to do: drop either")
    if not options.inspect:
        folder, output = output_place(output, options.input, options.layout)
        options = replace(options, folder=folder, output=output)
    if options.no_verify and (options.atol is not None or options.rtol is not None):
        raise UsageError("--no-verify leaves nothing for --atol and --rtol to do: drop either")
    if options.device == "cuda" and not cuda_devices():
        raise ConversionError(
            ExitStatus.RESOURCES,
            "--device cuda: no CUDA device is visible; in a container, install the NVIDIA Container Toolkit on the "
            "host and pass --gpus all to docker run, or drop --device cuda",
        )
    return options


def check_encoding(argv: Sequence[str], paths: tuple[str, ...]) -> None:
    """Raise UsageError where `argv` has more than `paths` that is not UTF-8: all text in ONNX files is."""
    for text in argv:
        try:
            text.encode()
        except UnicodeEncodeError:
            if not text.endswith(paths):
                raise UsageError(f"{text} is not UTF-8, as names in ONNX files are") from None


def cuda_devices() -> int:
    """The number of CUDA devices that the driver shows, asked of the driver itself: importing torch takes seconds."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        ok = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except OSError:
        return 0
    return count.value if ok else 0


def output_place(text: str, source: Path, layout: str) -> tuple[Path, Path]:
    """The folder and the .onnx file in it that -o means; raises ConversionError where they can never be written."""
    path = Path(text)
    if path.is_dir() or text.endswith(os.sep) or not path.suffix:
        path = path / ("onnx/model.onnx" if layout == "transformersjs" else "model.onnx")
    elif layout == "transformersjs":
        raise UsageError(f"-o {text}: --layout transformersjs fills a directory; name one")
    elif path.suffix != ".onnx":
        raise UsageError(f"-o {text}: name a .onnx file or a directory")
    if ".." in path.parts and not path.parent.exists():  # nobody wants the folder `a` of a/../b
        path = Path(os.path.realpath(path.parent), path.name)
    broken = next((folder for folder in path.parents if folder.is_symlink() and not folder.exists()), None)
    if broken:
        raise UsageError(f"-o {text}: {broken} is a link to {broken.readlink()}, which is not there")
    if path.exists() and not path.is_file():
        raise UsageError(f"-o {text}: {path} exists and is not a regular file")
    if path.exists() and source.exists() and path.samefile(source):
        raise UsageError(f"-o {text}: the output would replace the input; name another file")
    place = path.parent.resolve()
    if any(is_snapshot(folder) for folder in (place, *place.parents)):
        raise UsageError(f"-o {text}: a snapshot of the hub's cache, where files are links; choose another directory")
    parent = next((folder for folder in path.absolute().parents if folder.exists()), Path("/"))
    if not parent.is_dir():
        raise UsageError(f"-o {text}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"-o {text}: {parent} is not writable by uid {os.getuid()}; choose another directory, change its "
            "permissions, or run the container with --user $(id -u):$(id -g)"
        )
    return path.parent.parent if layout == "transformersjs" else path.parent, path


# ---------------------------------------------------------------------------------------------------------------------
# inspect: say what an input is
#
# Takes a source, gives facts for a person and for --json. The weights stay on the disk, and nothing is written.
# ---------------------------------------------------------------------------------------------------------------------


def describe_graph(produced: Produced, options: Options) -> dict[str, Any]:
    """One graph for the report."""
    job = produced.job
    return {
        "output": str(options.output.with_name(job.file)),
        "exporter": produced.attempt.exporter,
        "opset": produced.attempt.opset,
        "inputs": {spec.name: [spec.axes.get(axis, size) for axis, size in enumerate(spec.dims)] for spec in job.specs},
        "outputs": job.outputs,
        "verified": [difference._asdict() for difference in produced.differences],
    }


def inspect(source: Source, options: Options) -> dict[str, Any]:
    """What `source` is, as --json prints it; "problem" says why it would not convert. Raises ConversionError."""
    facts: dict[str, Any] = {"status": "ok", "path": str(source.path), "kind": source.kind.name.lower()}
    facts["why"] = source.why
    files = [source.path] if source.path.is_file() else [file for file in source.path.rglob("*") if file.is_file()]
    facts["bytes"] = sum(file.stat().st_size for file in files)
    inspectors = {
        Kind.CHECKPOINT: inspect_checkpoint,
        Kind.LEGACY_CHECKPOINT: inspect_checkpoint,
        Kind.TORCHSCRIPT: inspect_torchscript,
        Kind.EXPORTED_PROGRAM: inspect_program,
        Kind.SAFETENSORS: inspect_weight_files,
        Kind.SHARDED_WEIGHTS: inspect_weight_files,
        Kind.HUGGINGFACE: inspect_folder,
    }
    unusual = f"{source.path}: what it holds is not what its classes need"
    try:
        with explained(ExitStatus.INPUT, unusual, "save it again, or its state dict"):
            facts |= inspectors[source.kind](source, options)
    except ConversionError as error:
        facts |= {"problem": str(error), "exit_code": int(error.status)}
    return facts


def count_elements(pairs: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """The number of parameters, and of each dtype, of (dtype, number of elements) pairs."""
    dtypes: dict[str, int] = {}
    for dtype, elements in pairs:
        dtypes[dtype] = dtypes.get(dtype, 0) + elements
    return {"parameters": sum(dtypes.values()), "dtypes": dtypes}


def conversion(source: Source, mode: str, *extra: str) -> dict[str, Any]:
    """The mode and the command that convert `source`."""
    target = source.path.resolve().with_suffix(".onnx").name
    if source.kind is Kind.HUGGINGFACE:
        target = f"{source.path.resolve().name}-onnx/"
    command = ["python", "convert.py", "-i", str(source.path), "-o", target, *extra]
    return {"mode": mode, "command": shlex.join(command)}


def inspect_checkpoint(source: Source, options: Options) -> dict[str, Any]:
    """A complete model or a checkpoint: its globals, and what they make."""
    content, names, storages, problem = take_census(source)
    if problem:
        refusal = ConversionError(problem["exit_code"], problem["problem"])
        problem["problem"] = str(with_class_advice(refusal, source))
    facts = {**problem, "globals": names, **count_elements(storages)}
    content = numbered(content)
    if isinstance(content, nn.Module):
        return facts | inspect_module(source, content)
    if isinstance(content, Mapping):
        return facts | inspect_weights(source, content, options)
    rebuilders = REBUILDERS.keys() | VALUE_CLASSES | {name for name in names if name.endswith("Storage")}
    root = next((name for name in names if name not in rebuilders), None)
    return facts | {"what": "a pickle that is not opened", "class": root}


def inspect_module(source: Source, model: nn.Module, *options: str) -> dict[str, Any]:
    """A complete model: its class, and the inputs that it was made for."""
    known = preprocessing(model, None)
    guess = next(input_guesses(model, Loaded(model, ""), known))
    shapes = " ".join(map(str, guess.shapes))
    return {
        "what": "a complete model",
        "class": qualified_name(type(model)),
        "inputs": f"{shapes}, told by {guess.reason}",
        **conversion(source, "pytorch", *options),
    }


def inspect_weights(source: Source, content: Mapping[Any, Any], options: Options) -> dict[str, Any]:
    """A state dict, bare or in a checkpoint."""
    found = find_weights(content, options.checkpoint_key)
    if not isinstance(found.content, Mapping):
        key = ["--checkpoint-key", options.checkpoint_key] if options.checkpoint_key else []
        return inspect_module(source, found.content, *key) | {
            "what": f"a checkpoint with a model in its entry {found.key!r}"
        }
    shapes = {name: tuple(tensor.shape) for name, tensor in found.content.items()}
    dtypes = ((dtype_name(tensor.dtype), tensor.numel()) for tensor in found.content.values())
    where = f"weights in the entry {found.key!r} of a checkpoint" if found.key else "weights without a model"
    return {"what": where, **count_elements(dtypes), **inspect_shapes(source, shapes, content, options)}


def inspect_shapes(
    source: Source, shapes: Mapping[str, tuple[int, ...]], content: Mapping[Any, Any], options: Options
) -> dict[str, Any]:
    """Weights of which only names and shapes are known: whose they are."""
    recognition = choose_recorded(recognise(shapes), content)
    known = len(recognition.candidates) == 1
    key = ["--checkpoint-key", options.checkpoint_key] if options.checkpoint_key else []
    return {
        "tensors": len(shapes),
        "architecture": recognition.explanation,
        "candidates": recognition.candidates,
        **conversion(source, "state_dict", *key, *([] if known else ["--model-class", "CLASS"])),
    }


class WeightFacts(NamedTuple):
    """What --inspect finds in a file of weights."""

    shapes: dict[str, tuple[int, ...]]
    elements: list[tuple[str, int]]  # dtype and number
    facts: dict[str, Any]  # a pickle's names, and what is wrong with it


def inspect_weight_file(source: Source) -> WeightFacts:
    """The tensors of a safetensors file, from its header alone, or of a state dict; raises DamagedFileError."""
    if source.kind is Kind.SAFETENSORS:
        header = safetensors_header(source.path)
        elements = [(entry["dtype"], math.prod(entry["shape"])) for entry in header.values()]
        return WeightFacts({name: tuple(entry["shape"]) for name, entry in header.items()}, elements, {})
    if source.kind not in (Kind.CHECKPOINT, Kind.LEGACY_CHECKPOINT):
        raise DamagedFileError(f"{source.path.name} does not hold weights")
    content, names, storages, problem = take_census(source)
    tensors = state_dict_of(content) or {}
    elements = [(dtype_name(tensor.dtype), tensor.numel()) for tensor in tensors.values()]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return WeightFacts(shapes, elements or storages, {"globals": names, **problem})


def join_weight_files(files: Iterable[WeightFacts]) -> WeightFacts:
    """What several files hold together; of their problems the first one."""
    shapes: dict[str, tuple[int, ...]] = {}
    elements: list[tuple[str, int]] = []
    facts: dict[str, Any] = {}
    names: dict[str, Any] = {}
    for file in files:
        shapes |= file.shapes
        elements += file.elements
        names |= file.facts.get("globals", {})
        facts = {**file.facts, **facts}
    return WeightFacts(shapes, elements, facts | ({"globals": names} if names else {}))


def inspect_weight_files(source: Source, options: Options) -> dict[str, Any]:
    """A safetensors file, from its header alone, or an index of files of weights, each by the rules of its own kind."""
    shards = shard_files(source.path) if source.kind is Kind.SHARDED_WEIGHTS else {}
    files = [inspect_weight_file(detect_file(source.path.parent / name)) for name in shards]
    for (name, wanted), file in zip(shards.items(), files, strict=True):
        if "problem" not in file.facts:
            check_shard(name, wanted, file.shapes)
    all_files = join_weight_files(files or [inspect_weight_file(source)])
    facts = {"what": "weights without a model", **all_files.facts, **count_elements(all_files.elements)}
    return facts | inspect_shapes(source, all_files.shapes, {}, options)


def inspect_torchscript(source: Source, options: Options) -> dict[str, Any]:  # noqa: ARG001  (one signature)
    """A TorchScript archive: from its pickles' names and its code, which is read and not run."""
    vet_torchscript(source.path)
    reader, _ = open_archive(source.path)
    program = read_record(reader, "data.pkl")
    census = Census(io.BytesIO(program), len(program), lambda record_id: record_id)
    with contextlib.suppress(ConversionError):  # its classes are not ours to build
        census.load()
    root = next((name for name in census.names if name.startswith("__torch__.")), "")
    examples = traced_inputs(source.path)
    return {
        "what": "TorchScript",
        "class": root.removeprefix("__torch__."),
        "globals": census.names,
        **count_elements(census.storages.values()),
        "inputs": " ".join(map(str, examples)) + ", recorded when it was traced" if examples else "not recorded",
        **conversion(source, "pytorch"),
    }


def inspect_program(source: Source, options: Options) -> dict[str, Any]:  # noqa: ARG001
    """An exported program, loaded after vetting."""
    loaded = load(source, trust=False)
    named = zip(loaded.content.graph_signature.user_inputs, loaded.examples, loaded.free, strict=True)
    inputs = [
        f"{name}:{','.join(free.get(axis, str(size)) for axis, size in enumerate(shape.dims))}:{shape.dtype}"
        for name, shape, free in named
    ]
    tensors = loaded.content.state_dict.values()
    return {
        "what": "an exported program",
        **count_elements((dtype_name(tensor.dtype), tensor.numel()) for tensor in tensors),
        "inputs": " ".join(inputs),
        **conversion(source, "pytorch"),
    }


def inspect_folder(source: Source, options: Options) -> dict[str, Any]:
    """A Hugging Face folder: from config.json or adapter_config.json and the headers of its weights."""
    vetted = vet_folder(source.path, trust=options.trust_remote_code)
    names: list[str | None]
    if "adapter_config.json" in vetted.files:
        with naming(source.path):
            settings = vetted.settings("adapter_config.json")
            check_adapter(settings)
            base = settings.name("base_model_name_or_path")
        what, names = f"an adapter (LoRA) of {shorten(str(base), 200)}", []
    else:
        check_folder(vetted)
        settings = vetted.settings("config.json")
        what = f"a Hugging Face model ({shorten(settings.name('model_type') or 'timm', 60)})"
        names = [*settings.names("architectures")] or [settings.name("architecture")]
    patterns = (("*.safetensors",), ("pytorch_model*.bin", "adapter_model.bin"))
    kinds = ([file for pattern in kind for file in sorted(source.path.glob(pattern))] for kind in patterns)
    files = next(filter(None, kinds), [])
    weights = join_weight_files(inspect_weight_file(detect_file(file)) for file in files)
    return {
        "what": what,
        "class": shorten(", ".join(filter(None, names)), 200) or None,
        **weights.facts,
        **count_elements(weights.elements),
        **conversion(source, "huggingface"),
    }


def report_inspection(facts: Mapping[str, Any]) -> None:
    """The facts as lines for a person."""
    LOG.info(f"{facts['path']}: {facts.get('what', facts['kind'])} ({facts['bytes'] / 1e6:.1f} MB); {facts['why']}")
    if "parameters" in facts:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["dtypes"].items())
        LOG.info(f"parameters: {facts['parameters']:,} ({dtypes})")
    for key in ("class", "architecture", "tensors", "inputs", "mode"):
        if facts.get(key) is not None:
            LOG.info(f"{key}: {facts[key]}")
    for name, why in facts.get("globals", {}).items():
        LOG.info(f"global {name}: {why or 'allowed'}")
    if "problem" in facts:
        LOG.warn(f"it would not convert (exit code {facts['exit_code']}): {facts['problem']}")
    if "command" in facts:
        LOG.info(f"convert it with: {facts['command']}")


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders: the task, the class, the model with its weights, and the files beside its graphs
#
# Takes a vetted folder (see "folder"), gives a FolderModel and copies in the staging folder.
# ---------------------------------------------------------------------------------------------------------------------

# Every task that is converted; of several that a class serves (BartForConditionalGeneration), the first counts.
TASKS = ("text2text-generation", "fill-mask", "text-generation", "zero-shot-image-classification",
         "automatic-speech-recognition", "semantic-segmentation", "text-classification", "token-classification",
         "question-answering", "multiple-choice", "image-classification", "object-detection",
         "image-segmentation", "depth-estimation", "audio-classification", "feature-extraction",
         "sentence-similarity")  # fmt: skip
EMBEDDING_TASKS = ("feature-extraction", "sentence-similarity")  # for which a checkpoint may lack the pooler
DEFAULT_TASK = "text-generation"
GENERATION_TASKS = ("text-generation", "text2text-generation", "automatic-speech-recognition")
# What a user of the model needs beside the graph; the index of shards and adapters belong to the weights.
SIDE_FILES = re.compile(r"(?!.*\.index\.json|adapter_config\.json).*\.(json|txt|model|jinja|vocab|bpe|tiktoken)")


def copy_without_code(source: VettedFolder, target: Path, *, trust: bool, only: re.Pattern[str] | None = None) -> Path:
    """A folder of links to the files of `source`, without code and with vetted settings, for transformers to read.

    With `trust` it has everything. With `only`, files of such names replace those that `target` has already.
    """
    target.mkdir(parents=True, exist_ok=True)
    admit(target)
    for entry in sorted(source.path.iterdir()):
        wanted = trust or not (entry.is_dir() or entry.name.endswith((*CODE_FILES, *FOREIGN_FILES)))
        if wanted and (only is None or only.fullmatch(entry.name)):
            (target / entry.name).unlink(missing_ok=True)
            if entry.name in source.files:
                (target / entry.name).write_bytes(source.files[entry.name])
            elif not READ_JSON.fullmatch(entry.name):  # one that came since then is not vetted
                (target / entry.name).symlink_to(entry.resolve())
    return target


MAX_PARTS = 40  # configurations in each other: the largest known model has 12


def fit_settings(file: Path, settings: dict[str, Any], cls: type) -> None:
    """Drop the settings that config_attribute drops, in nested configurations too; other objects (labels) are data.

    Raises RefusedFileError for those that it refuses.
    """
    left: list[str] = []
    parts = itertools.count(1)

    def fit(node: dict[str, Any], owner: type) -> None:
        if next(parts) > MAX_PARTS:
            raise DamagedFileError(f"{file.name} describes more than {MAX_PARTS} models in each other; repair it")
        for key, value in list(node.items()):
            verdict = config_attribute(owner, key, value)
            if verdict is Verdict.REFUSE:
                raise RefusedFileError(f"{file.name}: {shorten(key, 60)} is {shown(value)}, which is not known here")
            if verdict is Verdict.DROP:
                left.append(shorten(key, 40))
                del node[key]
            elif isinstance(value, dict) and (part := part_class(owner, key, value)):
                fit(value, part)

    fit(settings, cls)
    if left:
        LOG.info(f"{file.name}: left out, since models of this kind do not read it: {and_more(left, 8)}")
        rewrite_settings(file, settings)


def part_class(owner: type, key: str, value: Mapping[str, Any]) -> Any:
    """The class of configuration that a part of `owner`'s settings becomes; None for data such as labels."""
    transformers = import_library("transformers")
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    spec = getattr(owner, "sub_configs_defaults", {}).get(key)
    own = getattr(spec, "config_class", None)
    if isinstance(own, type) and issubclass(own, transformers.PreTrainedConfig):
        return own
    name = value.get("model_type") or getattr(spec, "model_type", None)
    return mapping[name] if isinstance(name, str) and name in mapping else None


def read_config(folder: Path, weights: Mapping[str, Tensor], options: Options) -> Any:
    """The configuration as transformers has it; raises InputError.

    What the configuration's class does not know, and does not describe a network, is taken out of config.json.
    """
    trust = options.trust_remote_code
    transformers = import_transformers()
    configurations = transformers.models.auto.configuration_auto
    settings = read_json(folder / "config.json")
    model_type = settings["model_type"]
    if model_type not in configurations.CONFIG_MAPPING_NAMES and not trust:
        known = f"transformers {transformers.__version__} knows no model_type {shorten(repr(model_type), 60)}"
        raise DamagedFileError(f"{known}; check config.json, or pass the model as a file (torch.export.save)")
    with naming(options.input), bounded_build(len(weights), sum(tensor.nbytes for tensor in weights.values())):
        Settings(settings, "config.json").integer("num_labels", 0, MAX_ARGUMENT)  # each gets an entry of id2label
        if not trust:
            fit_settings(folder / "config.json", settings, configurations.CONFIG_MAPPING[model_type])
            if (file := folder / "generation_config.json").exists():
                fit_settings(file, read_json(file), transformers.GenerationConfig)
        try:
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        except Exception as error:  # validation raises a dozen kinds
            raise_out_of_memory(error)
            text = shorten(" ".join(str(error).split()), 200)
            raise DamagedFileError(f"config.json is not accepted by transformers ({text}); repair it") from error


def task_class(task: str, config: Any) -> Any:
    """The class that does `task` for `config`'s architecture, by optimum's table and transformers' own; else None."""
    from optimum.exporters.tasks import TasksManager

    with contextlib.suppress(KeyError, ValueError, AttributeError):
        auto = TasksManager.get_model_class_for_task(task, model_type=config.model_type)
        found = auto._model_mapping[type(config)]  # noqa: SLF001  (there is no public way to ask)
        return found[0] if isinstance(found, (list, tuple)) else found
    return None


def class_of_model(name: object, config: Any) -> Any:
    """The class of transformers that `architectures` names, if it is a model for such a `config`; else None."""
    transformers = import_transformers()
    place = transformers._class_to_module.get(name, "") if isinstance(name, str) else ""  # noqa: SLF001
    if not re.fullmatch(r"models\.\w+\.modeling_\w+", place) or place.startswith("models.auto."):
        return None
    found = getattr(transformers, str(name))
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and isinstance(config, found.config_class or ()) else None


def choose_task(config: Any, options: Options, adapter: Adapter | None, *, embeds_sentences: bool) -> tuple[str, Any]:
    """The task and its class: --task, what the adapter was trained for, or what the class in config.json is for.

    Raises UsageError that lists the tasks that fit.
    """
    from optimum.exporters.tasks import TasksManager

    name = (getattr(config, "architectures", None) or [""])[0]
    own = class_of_model(name, config)
    fitting = {task: cls for task in TASKS if (cls := task_class(task, config)) is not None}
    if own is not None and own not in fitting.values():  # a part, such as an encoder alone
        fitting["feature-extraction"] = own
    if options.task is not None:
        given = options.task.removesuffix("-with-past")
        task = given if given in TASKS else TasksManager.map_from_synonym(given)
    else:
        known = next((task for task, cls in fitting.items() if cls is own), None)
        task, why = (known, f"its class, {name}") if known else (DEFAULT_TASK, "the default")
        trained_for = (adapter.settings.name("task_type") or "") if adapter else ""
        if ADAPTER_TASKS.get(trained_for) in fitting:
            task, why = ADAPTER_TASKS[trained_for], f"the adapter's task_type, {trained_for}"
        if embeds_sentences and "sentence-similarity" in fitting:
            task, why = "sentence-similarity", "modules.json"
        LOG.info(f"task: {task}, told by {why} (--task overrides)")
    if task not in fitting:
        fits = ", ".join(fitting) or "none"
        raise UsageError(f"--task {task} does not fit a model of type {config.model_type}; it can do: {fits}")
    return task, fitting[task]


def load_pretrained(  # noqa: PLR0913, PLR0917
    folder: Path,
    config: Any,
    weights: dict[str, Tensor],
    task: str,
    cls: Any,
    adapter: Adapter | None,
    options: Options,
) -> FolderModel:
    """The model with its weights and its `adapter`'s, in the dtype of --dtype.

    Raises InputError where a weight is missing or has another shape.
    """
    own = adapter.own if adapter else {}
    size = sum(tensor.nbytes for tensor in (*weights.values(), *own.values()))
    what, advice = f"{options.input}: transformers cannot load it", "check config.json, and copy the whole folder again"
    with naming(options.input), explained(ExitStatus.INPUT, what, advice), bounded_build(len(weights) + len(own), size):
        if adapter:
            fit_config(folder, config, cls, adapter)
        model, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=getattr(torch, DTYPE_NAMES[options.dtype]),
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=True,  # they are an error of our own below
        )
    resized = {name: sizes for name, *sizes in report["mismatched_keys"]}
    for name in sorted(resized.keys() - own.keys()):
        stored, wanted = resized[name]
        sizes = f"{name} is {shape_text(stored)} in the weights and {shape_text(wanted)} by config.json"
        raise InputError(f"{options.input}: {sizes}; they do not belong together")
    missing = report["missing_keys"] - own.keys()
    pooler = {name for name in missing if "pooler." in name and task in EMBEDDING_TASKS}
    if needed := sorted(missing - pooler):
        what = f"{options.input} lacks weights that {cls.__name__} needs for {task}: {and_more(needed, 3)}"
        advice = "pass the --task that it was trained for, or the complete checkpoint"
        raise InputError(f"{what}; {advice}")
    if adapter:
        merge_adapter(model, adapter, report["missing_keys"] | resized.keys())
    if extra := sorted(report["unexpected_keys"]):
        LOG.info(
            f"{cls.__name__} has no place for {plural(len(extra), 'tensor')} of the checkpoint, such as {extra[0]}"
        )
    left_out = frozenset({"pooler_output"} if pooler else ())
    return FolderModel(model.eval().requires_grad_(requires_grad=False).to(options.device), task, left_out)


def load_folder(folder: Path, *, trust: bool) -> dict[str, Tensor]:
    """The weights of a folder, read inertly: safetensors first, whole or in shards, then pytorch_model.bin.

    Raises ConversionError where they are incomplete.
    """
    name = next((name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if name is None:
        names = ", ".join(WEIGHT_FILES)
        raise InputError(f"its weights are incomplete: none of {names} is there; copy or download the whole folder")
    file = (folder / name).resolve() if name.endswith(".bin") else folder / name  # messages name a pickle's own place
    content = state_dict_of(load(detect_file(file), trust=trust).content)
    if content is None:
        raise InputError(f"{name} does not hold a state dict; save the model again")
    return content


def pretrained_settings(settings: Settings) -> dict[str, Any]:
    """What timm may know of a config.json's pretrained_cfg: sizes, statistics and layers, and no place of weights."""
    given = settings.section("pretrained_cfg") or Settings({}, settings.where)
    known: dict[str, Any] = {
        "input_size": given.numbers("input_size", 3, 1, MAX_IMAGE_EDGE, whole=True),
        "pool_size": given.numbers("pool_size", 2, 1, MAX_IMAGE_EDGE, whole=True),
        "mean": given.numbers("mean", None, -MAX_STATISTIC, MAX_STATISTIC),
        "std": given.numbers("std", None, -MAX_STATISTIC, MAX_STATISTIC),
        "crop_pct": given.number("crop_pct", 0, 100),
        "crop_mode": given.name("crop_mode"),
        "interpolation": given.name("interpolation"),
        "num_classes": given.integer("num_classes", 0, MAX_ARGUMENT),
        "fixed_input_size": given.flag("fixed_input_size"),
    }
    for key in ("first_conv", "classifier"):  # the names of layers: one, or several
        several = isinstance(given.content.get(key), list)
        known[key] = tuple(given.names(key)) if several else given.name(key)
    return {key: value for key, value in known.items() if value is not None}


def timm_model(folder: Path, weights: dict[str, Tensor], options: Options, run: Run) -> FolderModel:
    """The model of a folder that timm wrote (timm.models.save_for_hf): a classifier, or without classes its features.

    transformers 5.23's own class for it refuses what timm 1.0.31 writes (num_classes among the model_args, too). Raises
    InputError for an architecture that timm does not know, and for weights that do not fit it.
    """
    timm = import_library("timm")
    with naming(options.input):
        settings = Settings(read_json(folder / "config.json"), "config.json")
        name, config = settings.name("architecture"), pretrained_settings(settings)
        arguments = {"num_classes": settings.integer("num_classes", 0, MAX_ARGUMENT)}
        if model_args := settings.section("model_args"):
            arguments |= architecture_arguments(model_args.content, model_args.where)
        if not name or names_a_place(name) or not timm.is_model(name):
            known = f"timm {timm.__version__} knows no architecture {shorten(repr(name), 60)}"
            raise DamagedFileError(f"{known}; check config.json")
        size = sum(tensor.nbytes for tensor in weights.values())
        what, advice = f"{options.input}: timm cannot build {name} as config.json says", "repair config.json"
        with explained(ExitStatus.INPUT, what, advice), bounded_build(len(weights), size), without_initialisation():
            model = timm.create_model(name, pretrained=False, pretrained_cfg=config, checkpoint_path="", **arguments)
    if len(preprocessing(model, None).size or ()) != 3 or not isinstance(getattr(model, "num_classes", None), int):
        what = "needs an input_size and no features_only to be an image model"
        raise InputError(f"{options.input}: config.json {what}; repair it")
    dtype = getattr(torch, DTYPE_NAMES[options.dtype])
    model = model.eval().requires_grad_(requires_grad=False).to(options.device, dtype)
    if refusal := load_weights(model, store_all(weights, options, run)):
        misfit = describe_misfit(model, weights) or refusal
        raise InputError(f"{options.input}: its weights do not fit {name} of config.json: {misfit}; copy both again")
    task = "image-classification" if model.num_classes else "feature-extraction"
    if options.task not in (None, task):
        raise UsageError(f"--task {options.task} does not fit this model of timm; it can do: {task}")
    labels = label_metadata(dict(enumerate(settings.names("label_names"))))
    facts = {"preprocessing": preprocessing(model, None).metadata(), **labels}
    return FolderModel(model, task, of_timm=True, facts=facts)


def module_folder(module: Settings) -> str:
    """The folder of a module of sentence-transformers, beside modules.json or "" for that folder itself."""
    name = module.name("path") or ""
    if name and not is_file_name(name):
        raise module.misfit("path", "the name of a folder beside it")
    return name


def sentence_steps(folder: VettedFolder, *, trust: bool) -> list[SentenceStep]:
    """What a sentence-transformers folder does with the states: functions of states, mask and the vector so far.

    Without modules.json it is the mean, as in sentence-transformers. Raises InputError for an unknown module.
    """
    if "modules.json" not in folder.files:
        LOG.warn("no modules.json says how words become a sentence: it is their mean, as sentence-transformers does")
        return [pooling_step(["mean"])]
    steps: list[SentenceStep] = []
    with naming(folder.path):
        for module in folder.modules()[1:]:
            kind = (module.name("type") or "").rpartition(".")[2]
            if kind == "Pooling":
                steps.append(pooling_step(pooling_modes(module_settings(folder, module))))
            elif kind == "Normalize":
                steps.append(lambda _states, _mask, vector: torch.nn.functional.normalize(vector, dim=-1))
            elif kind == "Dense":
                steps.append(dense_step(folder, module, trust=trust))
            else:
                raise module.misfit("type", "Pooling, Normalize or Dense, which are all that is known here")
    return steps


def module_settings(folder: VettedFolder, module: Settings) -> Settings:
    """The settings of a module of sentence-transformers."""
    name = f"{module_folder(module)}/config.json".lstrip("/")
    return Settings(parse_json(read_bounded(folder.path / name, MAX_JSON_BYTES, name), name), name)


def pooling_modes(settings: Settings) -> list[str]:
    """How words become a sentence, by the settings of a Pooling module; raises DamagedFileError for unknown ways."""
    named = settings.content.get("pooling_mode")
    modes = [named] if isinstance(named, str) else settings.names("pooling_mode")
    flags = [key for key in settings.content if key.startswith("pooling_mode_") and settings.flag(key)]
    modes = modes or [POOLING.get(key, key) for key in flags]
    unknown = [mode for mode in modes if mode not in POOLING.values()]
    if len(set(modes)) < len(modes):
        raise settings.misfit("pooling_mode", "a list of different names")
    if unknown or not modes:
        what = f"the pooling mode {shown(unknown[0])}, which is not known here" if unknown else "no pooling mode"
        raise DamagedFileError(f"{settings.where} names {what}; it can be {', '.join(POOLING.values())}")
    return [mode for mode in POOLING.values() if mode in modes] if flags else modes


def pooling_step(modes: Sequence[str]) -> SentenceStep:
    """The vectors of all `modes`, one after the other."""
    return lambda states, mask, _: torch.cat([pool_states(states, mask, mode) for mode in modes], -1)


def dense_step(folder: VettedFolder, module: Settings, *, trust: bool) -> SentenceStep:
    """The Dense module of sentence-transformers: a linear layer and its activation."""
    settings, name = module_settings(folder, module), module_folder(module)
    activation = (settings.name("activation_function") or "torch.nn.Identity").rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise settings.misfit("activation_function", "an activation of torch.nn that is known here")
    files = [folder.path / name / file for file in ("model.safetensors", "pytorch_model.bin")]
    file = next(filter(os.path.lexists, files), None)
    weights = state_dict_of(load(detect_file(file), trust=trust).content) if file else None
    if not weights or "linear.weight" not in weights:
        raise DamagedFileError(f"{name} has no linear.weight; copy or download the whole folder")
    matrix, bias = weights["linear.weight"], weights.get("linear.bias")
    if matrix.dim() != 2 or not matrix.is_floating_point() or (bias is not None and bias.shape != matrix.shape[:1]):
        raise DamagedFileError(f"{name} has a linear.weight or linear.bias that make no layer; download it again")
    function = getattr(torch.nn, activation)()
    return lambda _states, _mask, vector: function(torch.nn.functional.linear(vector, matrix, bias))


def load_folder_model(
    outer: VettedFolder, folder: Path, adapter: Adapter | None, options: Options, run: Run
) -> FolderModel:
    """The model in `folder`, the staged files of the vetted one, with the adapter and the sentence steps of `outer`."""
    unusual = f"{outer.path}: config.json asks for what cannot be made"
    wall = WALL.up(run.staging, unless=has_own_code(options))
    with LOG.step(f"load: {outer.path}"), wall, naming(outer.path), explained(ExitStatus.INPUT, unusual, "repair it"):
        weights = load_folder(folder, trust=options.trust_pickle)
        if is_timm(read_json(folder / "config.json")):
            if adapter:
                raise InputError(f"{outer.path}: the adapter's base is a model of timm; {MERGE_IT}")
            found = timm_model(folder, weights, options, run)
            check_room(found.model, run)
            return found
        config = read_config(folder, weights, options)
        sentences = "modules.json" in outer.files
        task, cls = choose_task(config, options, adapter, embeds_sentences=sentences)
        is_pair = config.is_encoder_decoder and task in GENERATION_TASKS
        if is_pair:
            check_pair_options(options)
        steps: Sequence[SentenceStep] = ()
        if task == "sentence-similarity" or (sentences and task in EMBEDDING_TASKS):
            steps = sentence_steps(outer, trust=options.trust_pickle)
        found = load_pretrained(folder, config, store_all(weights, options, run), task, cls, adapter, options)
        check_room(found.model, run, copies=2 if is_pair else 1)  # the decoder: twice, then merged
    return found._replace(steps=steps, facts=label_metadata(getattr(found.model.config, "id2label", None)))


def check_options(options: Options) -> None:
    """Raise UsageError for options of the other modes."""
    if options.mode not in ("auto", "huggingface"):
        raise UsageError(f"--mode {options.mode}: {options.input} is a Hugging Face folder; pass one of its files")
    flags = "model-class checkpoint-key input-shape input-value dynamic-axes model-args allow-class"
    for flag in flags.split():
        if getattr(options, flag.replace("-", "_")):
            raise UsageError(f"--{flag} is not for Hugging Face folders, whose config.json determines it: leave it out")


def check_pair_options(options: Options) -> None:
    """Raise UsageError for options that an encoder and its decoder cannot have."""
    if options.output.name != "model.onnx":
        raise UsageError(f"-o {options.output}: this model becomes an encoder and a decoder; name a directory")
    for flag, given in (("--static", options.static), ("--no-cache", options.no_cache)):
        if given:
            what = f"{flag}: this model becomes an encoder and a decoder, whose cache grows"
            raise UsageError(f"{what}; leave {flag} out")


def vet_inner_folder(outer: VettedFolder, adapter: Adapter | None, *, trust: bool) -> VettedFolder:
    """The folder that has the config.json: the adapter's base's, or the first module's of sentence-transformers."""
    if adapter and not adapter.base.samefile(outer.path):
        outer = vet_folder(adapter.base, trust=trust)
    if "modules.json" in outer.files and "config.json" not in outer.files:
        with naming(outer.path):
            name = module_folder(outer.modules()[0]) if outer.modules() else ""
        if name and (outer.path / name).is_dir():
            return vet_folder(outer.path / name, trust=trust)
    return outer


def graphs_of(found: FolderModel, folder: Path, options: Options) -> list[Graph]:
    """The graphs that the model becomes."""
    if found.of_timm:
        return [timm_graph(found.model, "logits" if found.model.num_classes else "pooler_output")]
    if found.task == "text-generation":
        specs = decoder_specs(found.model)
        return [decoder_graph(found, specs, cached=not options.no_cache, verified=not options.no_verify)]
    if found.task in GENERATION_TASKS and found.model.config.is_encoder_decoder:
        encoder = encoder_graph(found)
        return [encoder, *decoder_graphs(found, encoder)]
    return [single_graph(found, folder)]


def merged_decoder(model: Any, jobs: Sequence[Job], options: Options, run: Run) -> Job:
    """The two decoders as one graph, compared as both and by generating; raises ConversionError (VERIFY)."""
    encoder, first, following = jobs
    flag = InputSpec(CACHE_FLAG, (1,), torch.bool)
    specs = list({spec.name: spec for spec in (*first.specs, *following.specs, flag)}.values())
    cases = [widen_case(case, specs, cached=False) for case in first.cases]
    cases += [widen_case(case, specs, cached=True) for case in following.cases]
    check = None
    if not options.no_verify:
        what = "nothing can be compared, since PyTorch itself cannot generate with this model"
        with explained(ExitStatus.VERIFY, what, "repair config.json, or pass --no-verify for graphs without proof"):
            expected = generate_from_encoder(model, encoder)
        encode = functools.partial(encode_example, run.produced, options)
        check = functools.partial(check_generation, expected, specs, encode)
    parts = (first.file, following.file)
    return first._replace(
        specs=specs, cases=cases, file="decoder_model_merged.onnx", further_checks=check, parts=parts, written=True
    )


def widen_case(case: Case, specs: Sequence[InputSpec], *, cached: bool) -> Case:
    """`case` with the inputs of the other branch, which it does not look at, and with the outputs that it hands on."""
    sizes = {
        symbol: case.inputs[spec.name].shape[axis]
        for spec in specs
        if spec.name in case.inputs
        for axis, symbol in spec.axes.items()
    }
    inputs = zeros_for(specs, {PAST: 0, **sizes}) | case.inputs | {CACHE_FLAG: np.array([cached])}
    handed = {name.replace("past_key_values", "present", 1): array for name, array in case.inputs.items()}
    outputs = case.outputs | {name: array for name, array in handed.items() if ".encoder." in name}
    return Case(f"{case.label} {CACHE_FLAG}:{cached}", inputs, outputs)


def plan_graph(graph: Graph, options: Options, samples: Mapping[str, Arrays]) -> Job:
    """PyTorch's answers for the graph's examples at all its sizes, for other kinds of values, and for `samples`."""
    reference = Reference(graph.module, graph.specs, options, functools.partial(valued_examples, graph))
    cases = []
    for seed, sizes in enumerate(graph.sizes[: 1 if options.static else None]):
        try:
            cases.append(reference.run(sizes, seed))
        except RejectedInputError as error:
            what = f"the model does not run at {sizes}: {error}; try another --task"
            raise ConversionError(ExitStatus.EXPORT, what) from error.__cause__
    traced = reference.tensors(graph.sizes[0], 0)
    specs = [spec._replace(dims=tuple(tensor.shape)) for spec, tensor in zip(graph.specs, traced, strict=True)]
    checks = graph.further_checks
    if options.static:
        specs, checks = [spec._replace(axes={}) for spec in specs], None
    if not options.no_verify:
        cases += value_cases(reference, graph.sizes[0], cases[0], watched=False)
        check_deterministic(reference, cases[0], graph.sizes[0], 0)
        check_outputs(cases[0])
        given = Reference(graph.module, specs, options)
        cases += [sample_case(file, sample, given, options, watched=False) for file, sample in samples.items()]
        cases = [case._replace(outputs=mask_padding(case.outputs, case.inputs)) for case in cases]
        for case in cases:
            check_finite(case)
    file = options.output.name if graph.file == "model" else f"{graph.file}.onnx"
    return Job(graph.module, specs, list(cases[0].outputs), traced, cases, file, checks, step=graph.step)


def valued_examples(graph: Graph, sizes: Mapping[str, int], seed: int, values: str = "") -> list[Tensor]:
    """The graph's examples, with `values` (one of VALUE_SETS) for images and signals, or one token over and over.

    Raises RejectedInputError where no input is of that kind.
    """
    drawn = graph.examples(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    changed = False
    for place, (spec, tensor) in enumerate(zip(graph.specs, drawn, strict=True) if values else ()):
        if spec.name == "input_ids" and values == "repeated values":
            drawn[place], changed = tensor[..., :1].expand(tensor.shape).clone(), True
        elif tensor.is_floating_point() and "mask" not in spec.name and not spec.name.startswith("past_"):
            drawn[place], changed = unusual_values(spec, tensor.shape, values, generator).to(tensor), True
    if values and not changed:
        raise RejectedInputError
    return drawn


def label_metadata(labels: object) -> dict[str, str]:
    """The labels of a classifier, by number, as metadata; none where there are none, or no texts."""
    if not isinstance(labels, dict) or not labels or not all(isinstance(label, str) for label in labels.values()):
        return {}
    return {"id2label": json.dumps({str(key): label for key, label in labels.items()})}


def prepare_for_export(model: Any) -> None:
    """Let mixtures of experts and chunked attention run as exporters can follow them, after PyTorch's answers."""
    transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.register("pt2onnx", routed_experts)
    model.set_experts_implementation("pt2onnx")
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, transformers.PreTrainedConfig):
            config.onnx_export = True  # Longformer and LED look for it


def folder_digest(*folders: Path) -> str:
    """SHA-256 of the names and digests of the folders' own files; of the same folder twice, once."""
    files = [
        file
        for folder in dict.fromkeys(folders)
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    ]
    text = "\n".join(f"{file.name} {file_digest(file)}" for file in files)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def side_files(folder: Path) -> list[Path]:
    """What a user of the model needs beside the graph: configuration, tokenizer, processor, chat template."""
    files = [entry for entry in sorted(folder.iterdir()) if entry.is_file() and not entry.name.startswith(".")]
    return [file for file in files if SIDE_FILES.fullmatch(file.name)]


def check_side_files(folder: Path, options: Options) -> None:
    """Raise UsageError before the work begins where files of another model would be replaced.

    Those that an earlier conversion left beside its graph may be, unless weights are there.
    """
    targets = {file: options.folder / file.name for file in side_files(folder)}
    there = {file: target for file, target in targets.items() if os.path.lexists(target)}
    others = [target.name for file, target in there.items() if not same_content(file, target)]
    if not others:
        return
    names = and_more(others, 3)
    graphs = [options.output, options.output.with_name("encoder_model.onnx")]
    if any((options.folder / name).exists() for name in WEIGHT_FILES) or not any(map(is_our_graph, graphs)):
        what = f"{names} with other content would be replaced there"
        raise UsageError(f"-o {options.folder}: {what}; choose another directory, or remove what is not needed")
    LOG.warn(f"{names} of an earlier conversion in {options.folder} will be replaced")


def is_our_graph(path: Path) -> bool:
    """Whether `path` is a graph of an earlier conversion: a protobuf message begins with its lowest fields."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\x12\x07pt2onnx" in file.read(32)  # field 2, producer_name, of 7 bytes


def stage_side_files(folder: Path, target: Path) -> None:
    """Copy what belongs beside the graph."""
    target.mkdir()
    for file in side_files(folder):
        with open_input(file) as content, (target / file.name).open("wb") as copied:
            shutil.copyfileobj(content, copied)


# ---------------------------------------------------------------------------------------------------------------------
# adapters: LoRA's weights, added to those of the model that they were trained on
#
# Takes a folder with an adapter and the model, whose weights it changes. What settings and tensors mean is peft's to
# say: https://huggingface.co/docs/peft/package_reference/lora, and in peft 0.21.2 tuners/lora/layer.py
# (get_delta_weight, merge), tuners/lora/dora.py (get_weight_norm), utils/save_and_load.py.
# ---------------------------------------------------------------------------------------------------------------------


def rewrite_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Put other settings in the place of a file in the folder that transformers reads."""
    file.unlink()
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    admit(file)  # it is the changed one that is read from now on


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What an adapter's folder has of its own beside the weights: it wins over the base's.
PROCESSOR_FILES = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|spiece|sentencepiece|chat_template|(pre)?processor).*"
)
ADAPTER_TASKS = {  # of peft's TaskType
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
# Settings with which an adapter is more than products that are added to weights.
BEYOND_LORA = ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
               "kasa_config", "monteclora_config", "trainable_token_indices", "target_parameters")  # fmt: skip
# Initialisations that leave the base as it is; the others (pissa, olora, corda, lora_ga, loftq) take something off it.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
LORA_TENSOR = re.compile(r"(?P<layer>.+)\.lora_(embedding_)?(?P<part>A|B|magnitude_vector)(\.(?P<kind>weight|bias))?")
# A key of rank_pattern or alpha_pattern, a regular expression: of two repetitions at most, more may take for ever.
LAYER_PATTERN = re.compile(r"(?!(.*[*+]){3})[^(){}?]+")
MAX_PATTERNS = 2000  # each is tried for each layer: one for each of 80 blocks' seven layers are 560
HUB_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)  # the oldest models have no owner there
REVISION = re.compile(r"[\w.-]{1,100}", re.ASCII)
MERGE_IT = "merge it where it was trained (merge_and_unload of peft), and pass the saved result"


class Adapter(NamedTuple):
    """A LoRA adapter: its folder, its base's, its settings, tensors that replace the base's, LoRA's parts by layer."""

    folder: Path
    base: Path
    settings: Settings
    own: dict[str, Tensor]
    layers: dict[str, dict[str, Tensor]]
    beneath: frozenset[str]  # those of `own` that lie under LoRA's parts: the base's, saved since tokens were added


def check_adapter(settings: Settings) -> None:
    """Raise DamagedFileError for an adapter that is not LoRA, or whose settings cannot be used."""
    kind, start = settings.content.get("peft_type"), settings.content.get("init_lora_weights")
    if kind != "LORA":
        what = f"the adapter's peft_type is {shown(kind)}, and only LORA can be merged here"
        raise DamagedFileError(f"{what}; {MERGE_IT}")
    beyond = [key for key in BEYOND_LORA if settings.content.get(key)]
    if isinstance(start, (dict, list)) or start not in PLAIN_STARTS:
        beyond.append(f"init_lora_weights {shown(start)}")
    if beyond:
        raise DamagedFileError(f"the adapter is more than plain LoRA ({beyond[0]}); {MERGE_IT}")
    settings.integer("r", 1, MAX_ARGUMENT)
    settings.number("lora_alpha", -MAX_ARGUMENT, MAX_ARGUMENT)
    settings.name("task_type")
    for flag in ("use_dora", "use_rslora"):
        settings.flag(flag)
    for key, read, low in (("rank_pattern", Settings.integer, 1), ("alpha_pattern", Settings.number, -MAX_ARGUMENT)):
        patterns = settings.section(key) or Settings({}, key)
        if len(patterns.content) > MAX_PATTERNS:
            raise settings.misfit(key, f"one of {MAX_PATTERNS} patterns at most")
        for pattern in patterns.content:
            read(patterns, pattern, low, MAX_ARGUMENT)
            check_layer_pattern(pattern, patterns.where)


@functools.cache
def layer_pattern(key: str) -> re.Pattern[str]:
    """What finds the layers that a key of rank_pattern or alpha_pattern is for, compiled once for all layers."""
    return re.compile(rf"(.*\.)?({key})$")


def check_layer_pattern(pattern: str, where: str) -> None:
    """Raise DamagedFileError for a regular expression that is none, or that could search for ever."""
    try:
        usable = len(pattern) <= 1000 and LAYER_PATTERN.fullmatch(pattern) and re.compile(pattern)
    except re.error:
        usable = None
    if not usable:
        raise DamagedFileError(f"{where} has {shown(pattern)}, a pattern that cannot be used; {MERGE_IT}")


def read_adapter(folder: VettedFolder, options: Options) -> Adapter | None:
    """The adapter in a vetted folder; None where there is none. Raises ConversionError."""
    if "adapter_config.json" not in folder.files:
        check_no_base(options)
        return None
    own: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    with naming(folder.path):
        settings = folder.settings("adapter_config.json")
        check_adapter(settings)
        for name, tensor in adapter_tensors(folder.path, options).items():
            place = name.removeprefix("base_model.model.")
            if match := LORA_TENSOR.fullmatch(place):
                layers.setdefault(match["layer"], {})["bias" if match["kind"] == "bias" else match["part"]] = tensor
            else:
                own[place.replace(".base_layer.", ".")] = tensor
        base = base_folder(folder.path, settings, options)
    beneath = frozenset(name for name in own if name.rpartition(".")[0] in layers)
    return Adapter(folder.path, base, settings, own, layers, beneath)


def adapter_tensors(folder: Path, options: Options) -> dict[str, Tensor]:
    """The tensors of an adapter, read inertly; raises DamagedFileError where there are none."""
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    tensors = state_dict_of(load(detect_file(file), trust=options.trust_pickle).content) if file else None
    if not tensors:
        raise DamagedFileError(f"it has no weights, neither {' nor '.join(ADAPTER_FILES)}; copy or download them")
    check_weights(tensors.values(), folder)
    return tensors


def base_folder(folder: Path, settings: Settings, options: Options) -> Path:
    """The folder of the model that an adapter belongs to: what --base names, else one inside the adapter's own folder.

    A recorded path to another place, here or on the hub, is never followed. Raises InputError that says what to pass.
    """
    recorded = settings.name("base_model_name_or_path") or "."
    base = base_beside(folder, recorded)
    if options.base:
        base = base_from_option(options.base, recorded, settings, options)
    if base is None:
        advice = base_advice(folder, recorded)
        raise DamagedFileError(f"the adapter was trained on {shown(recorded)}, which is not in its folder: {advice}")
    if base.samefile(folder):
        if not (base / "config.json").exists():
            raise DamagedFileError("the adapter names no base model: pass --base FOLDER, or --base OWNER/MODEL")
    elif (base / "adapter_config.json").exists():
        raise DamagedFileError(f"the adapter's base model, {shown(base.name)}, is an adapter itself; merge that first")
    return base


def base_beside(folder: Path, recorded: str) -> Path | None:
    """The folder inside an adapter's own that its settings name; None where they name another place."""
    place = Path(os.path.normpath(recorded))
    if not all(map(is_file_name, place.parts)) or not (folder / place).is_dir():
        return None
    base, root = (folder / place).resolve(), folder.resolve()
    return base if base == root or root in base.parents else None


def base_from_option(name: str, recorded: str, settings: Settings, options: Options) -> Path:
    """The folder, or the model of the hub, that --base names; that one in the revision which the adapter records."""
    if (base := Path(name)).is_dir():
        admit(base)
        return base.resolve()
    if not HUB_NAME.fullmatch(name):
        raise UsageError(f"--base {name}: there is no such folder, nor can the hub have it")
    revision = settings.name("revision") if name == recorded else None
    if revision is not None and not REVISION.fullmatch(revision):
        raise settings.misfit("revision", "a branch, tag or commit")
    LOG.info(f"adapter: its base model is {name}")
    return download(name, revision, options, otherwise="or pass --base FOLDER").path


def base_advice(folder: Path, recorded: str) -> str:
    """The option that supplies an adapter's base, ready to be copied where the recorded name is harmless."""
    usual = "pass --base FOLDER, or --base OWNER/MODEL to download it"
    if not recorded.isprintable() or len(recorded.encode(errors="replace")) > 200 or recorded.startswith("-"):
        return usual
    beside = Path(os.path.normpath(folder / recorded))
    if beside.is_dir():
        return f"pass --base {shlex.quote(str(beside))}"
    if HUB_NAME.fullmatch(recorded):
        return f"pass --base {shlex.quote(recorded)} to download it, or --base FOLDER"
    return usual


def fit_config(folder: Path, config: Any, cls: Any, adapter: Adapter) -> None:
    """Let `config`, and config.json in `folder`, have as many labels and tokens as the adapter's own tensors have."""
    with torch.device("meta"):
        expected = cls(copy.deepcopy(config)).state_dict()
    changes: dict[str, Any] = {"architectures": [cls.__name__]}
    for name, tensor in adapter.own.items():
        if name not in expected or not tensor.dim() or tensor.shape == expected[name].shape:
            continue
        if expected[name].shape[0] == config.num_labels:
            config.num_labels = tensor.shape[0]
            changes |= {"id2label": config.id2label, "label2id": config.label2id}
        elif expected[name].shape[0] == getattr(config, "vocab_size", None):
            changes["vocab_size"] = config.vocab_size = tensor.shape[0]
    content = read_json(folder / "config.json") | changes
    rewrite_settings(folder / "config.json", content)


def merge_adapter(model: Any, adapter: Adapter, lost: Collection[str]) -> None:
    """Replace the tensors of `model` that the adapter brings whole, and merge LoRA's products into its layers.

    `lost` are tensors that the base's files lack or have in other sizes. Raises InputError for a tensor without a
    place, and where another is tied to a lost one.
    """

    def misfit(what: str) -> ConversionError:
        advice = "pass the --task that it was trained for, or its true base with --base"
        where = f"{adapter.folder}: the adapter does not fit {type(model).__name__} of {adapter.base}"
        return InputError(f"{where}: {shorten(what, 300)}; {advice}")

    expected: dict[str, Tensor] = model.state_dict(keep_vars=True)
    own: dict[str, Tensor] = {}
    for name, tensor in adapter.own.items():
        if name not in expected:
            raise misfit(f"that has no {name}")
        if tensor.shape != expected[name].shape:
            raise misfit(f"{name} is {shape_text(tensor.shape)}, not {shape_text(expected[name].shape)}")
        sharing = [other for other in expected if expected[other] is expected[name]] if name in lost else [name]
        lacking = [other for other in sharing if other not in adapter.own]
        if lacking and name not in adapter.beneath:
            raise misfit(f"{lacking[0]} is tied to {name}, but the adapter resizes that alone")
        own |= dict.fromkeys([name, *lacking], tensor.to(expected[name].dtype))
    model.load_state_dict(own, strict=False, assign=True)
    with torch.no_grad():
        for name, parts in adapter.layers.items():
            try:
                merge_layer(model.get_submodule(name), parts, name, adapter.settings)
            except (AttributeError, ValueError) as error:
                raise misfit(f"{name}: {error}") from None
    LOG.info(
        f"adapter: merged into {len(adapter.layers)} layers of {adapter.base}; {plural(len(own), 'tensor')} replaced"
    )


def merge_layer(layer: Any, parts: Mapping[str, Tensor], name: str, settings: Settings) -> None:
    """Add LoRA's product to the weight of `layer`, and scale its rows to DoRA's magnitudes; ValueError for a misfit."""

    def setting(patterns: str, otherwise: str) -> float:
        known = settings.content.get(patterns) or {}
        fitting = (value for key, value in known.items() if layer_pattern(key).match(name))
        usual = settings.content.get(otherwise)
        return next(fitting, 8 if usual is None else usual)

    conv1d = import_library("transformers.pytorch_utils").Conv1D
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if not isinstance(layer, (nn.Linear, nn.Embedding, conv1d, *convolutions)) or getattr(layer, "groups", 1) > 1:
        raise ValueError(f"a {type(layer).__name__} is no layer that LoRA can be merged into here")
    turned = isinstance(layer, (nn.Embedding, conv1d))  # its weight has a column, not a row, for each output
    weight, rank = layer.weight.detach(), setting("rank_pattern", "r")
    rows = (weight.t() if turned else weight.flatten(1)).float()
    wanted: dict[str, tuple[float, ...]] = {"A": (rank, rows.shape[1]), "B": (rows.shape[0], rank)}
    if settings.flag("use_dora"):
        wanted["magnitude_vector"] = (rows.shape[0],)
    if "bias" in parts and getattr(layer, "bias", None) is not None:
        wanted["bias"] = (rows.shape[0],)
    flat = {
        part: (value.flatten(1) if part in "AB" and value.dim() > 1 else value.flatten()).float()
        for part, value in parts.items()
    }
    found = {part: tuple(value.shape) for part, value in flat.items()}
    if rank < 1 or found != wanted:
        raise ValueError(f"LoRA's parts have the sizes {found}, not {wanted}")
    scale = setting("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if settings.flag("use_rslora") else rank)
    rows = rows + scale * (flat["B"] @ flat["A"])
    if settings.flag("use_dora"):
        rows *= flat["magnitude_vector"][:, None] / rows.norm(dim=1, keepdim=True)
    merged = (rows.t() if turned else rows).reshape(weight.shape).to(weight.dtype).contiguous()
    layer.weight = nn.Parameter(merged, requires_grad=False)  # where another layer shares it, that keeps the base's
    if "bias" in flat:
        old: Any = layer.bias  # which is there, as `wanted` says
        bias = (old.float() + scale * flat["bias"]).to(old.dtype)
        layer.bias = nn.Parameter(bias, requires_grad=False)


# ---------------------------------------------------------------------------------------------------------------------
# detect: what the input is, told by its content and without importing anything heavy
#
# Takes what the user named, gives a Source and admits its files (see "files"); fetches a model from the hub.
# ---------------------------------------------------------------------------------------------------------------------

HUB_ID = re.compile(r"(?!.*\.(pt|pth|pt2|bin|ckpt|onnx|zip|json|safetensors)$)[\w-][\w.-]*/[\w.-]+")  # owner/model


def detect(path: Path) -> Source:
    """Tell what the user's input holds, and admit it; raises InputError with advice for what is no model.

    An index of shards brings the folder that it lies in.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise InputError(f"{path} is not a regular file; pass a model file or a directory")
        admit(path)
        source = detect_directory(path) if stat.S_ISDIR(mode) else detect_file(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and HUB_ID.fullmatch(str(path)) and not path.parent.exists():
            return Source(path, Kind.HUB_ID, "there is no such file, and it is written as owner/model")
        raise InputError(f"cannot read {path}: {error.strerror}; check -i") from None
    if source.kind is Kind.SHARDED_WEIGHTS:
        admit(source.path.parent)
    return source


# Directories that other programs write: a name (or how it ends) that tells them, what they are and what to do.
DIRECTORIES: tuple[tuple[str, str], ...] = (
    ("zero_to_fp32.py", "a DeepSpeed checkpoint; run python zero_to_fp32.py . weights.pth in it and pass weights.pth"),
    ("_model_states.pt", "a DeepSpeed checkpoint; run zero_to_fp32.py of the folder above and pass the file it writes"),
    (
        ".distcp",
        "a sharded torch.distributed checkpoint; run python -m torch.distributed.checkpoint.format_utils dcp_to_torch",
    ),
    ("data.pkl", "an unpacked PyTorch archive; pass the original file"),
    ("saved_model.pb", "a TensorFlow model, not a PyTorch one"),
    ("open_clip_config.json", "a model of OpenCLIP; load it there, and pass it as torch.export.save writes it"),
    ("model_index.json", "a pipeline of diffusers; of its folders, pass one of transformers such as text_encoder"),
)
# What tells a Hugging Face folder.
FOLDER_MARKS = ("config.json", "adapter_config.json", "modules.json")


def check_library(place: object, names: Collection[str]) -> None:
    """Raise InputError where the `names` of a folder's files tell another library's."""
    if any(name in names for name in FOLDER_MARKS):
        return
    for mark, what in DIRECTORIES:
        if any(name.endswith(mark) for name in names):
            raise InputError(f"{place} is {what}")


def detect_directory(path: Path) -> Source:
    """A Hugging Face folder, an index of shards, or advice on which file to pass."""
    names = sorted(entry.name for entry in path.iterdir())
    for name in FOLDER_MARKS:
        if name in names:
            return Source(path, Kind.HUGGINGFACE, f"the directory has {name}")
    indices = [name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))]
    if len(indices) == 1:
        return detect_file(path / indices[0])
    check_library(path, names)
    models = [name for name in names if name.endswith((".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors"))]
    if models:
        raise InputError(
            f"{path} is a directory without config.json; pass one of its files: {and_more(models, 5, 255)}"
        )
    what = "holds no model file" if names else "is an empty directory"
    raise InputError(f"{path} {what}; check -i and, in a container, what is mounted there")


def download(name: str, revision: str | None, options: Options, *, otherwise: str) -> Source:
    """The folder of a model on the hub, downloaded into the cache; raises InputError.

    `otherwise` is what to do where the hub was not meant.

    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are huggingface_hub's own. Code and other frameworks' weights stay
    where they are.
    """
    from huggingface_hub import HfApi, snapshot_download

    where: dict[str, Any] = {"revision": revision}
    wanted = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
    unwanted = ["onnx/*", "openvino/*", "flax*", "tf_*"] + ([] if options.trust_remote_code else ["*.py"])
    try:
        with LOG.step(f"download: {name}"):
            if os.environ.get("HF_HUB_OFFLINE", "0") == "0":
                files = HfApi().list_repo_files(name, **where)
                check_library(name, files)
                wanted += [] if any(file.endswith(".safetensors") for file in files) else ["*.bin"]
            folder = snapshot_download(
                name, cache_dir=options.cache_dir, allow_patterns=wanted, ignore_patterns=unwanted, **where
            )
    except ConversionError:
        raise
    except Exception as error:  # httpx, huggingface_hub and the operating system each have their own
        problem = next(
            (text for kind, text in HUB_PROBLEMS if kind in {cls.__name__ for cls in type(error).__mro__}), ""
        )
        if problem is UNREACHABLE:
            with contextlib.suppress(Exception):  # what is not in the cache either is told as unreachable
                folder = snapshot_download(name, cache_dir=options.cache_dir, local_files_only=True, **where)
                LOG.warn(f"the hub cannot be reached: {name} is what was downloaded before")
                return detect(Path(folder))
        raise InputError(f"cannot download {name}: {problem or first_line(error)} ({otherwise})") from error
    return detect(Path(folder))


UNREACHABLE = (
    "the hub cannot be reached; pass its folder, downloaded where there is a network (in a container: mount it)"
)
# The exceptions of huggingface_hub and httpx, the narrower ones first, and what to do about them.
HUB_PROBLEMS = (
    ("GatedRepoError", "its owner gives access on request: ask for it on the model's page and set HF_TOKEN"),
    ("RepositoryNotFoundError", "the hub has no such model, or it is private: check the name, or set HF_TOKEN"),
    ("RevisionNotFoundError", "it has no such revision; check --revision"),
    ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set and it is not in the cache; download it first, or pass its folder"),
    ("LocalEntryNotFoundError", UNREACHABLE),
    ("HTTPError", UNREACHABLE),
)  # fmt: skip


def check_no_base(options: Options) -> None:
    """Raise UsageError for --base with what is no adapter."""
    if options.base:
        what = f"--base {options.base}: {options.input} is no adapter, which alone has a base"
        raise UsageError(f"{what}; leave --base out")


def source_digest(source: Source) -> str:
    """SHA-256 of the input, as hexadecimal digits; of an index of shards, that of the index's and the shards' digests.

    Raises ConversionError for an archive whose records do not have their checksums, which torch does not look at.
    """
    if source.kind is Kind.SHARDED_WEIGHTS:
        shards = [source.path.parent / name for name in sorted(shard_files(source.path))]
        digests = [source_digest(detect_file(shard)) for shard in shards]
        return hashlib.sha256("\n".join([file_digest(source.path), *digests]).encode()).hexdigest()
    if source.kind in (Kind.CHECKPOINT, Kind.TORCHSCRIPT, Kind.EXPORTED_PROGRAM):
        check_records(source.path)
    return file_digest(source.path)


def check_records(path: Path) -> None:
    """Compare the stored records of an archive with their CRC-32; raises InputError.

    A zero means that none was computed (torch.serialization.set_crc32_options).
    """
    try:
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.CRC and entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size:
                    with archive.open(entry) as record:
                        while record.read(1 << 20):
                            pass
    except Exception as error:  # zipfile raises a dozen kinds: offsets before the file, flags of encryption
        message = f"{path} is damaged ({first_line(error)}); copy or download it again"
        raise InputError(message) from None


# ---------------------------------------------------------------------------------------------------------------------
# folder: what a Hugging Face folder may hold
#
# Takes a folder, gives its settings and the names of its files, vetted: no code, no places, no kernels. Opens its
# JSON files and the headers of its weights.
# ---------------------------------------------------------------------------------------------------------------------

# The JSON files of a folder that are read, here or by transformers. The others (tokenizer.json, vocab.json) are only
# copied beside the graph, whatever they hold.
READ_JSON = re.compile(r".*config\.json|modules\.json|.*\.index\.json")
# What settings may ask for, at any depth, that runs code which comes with the folder or is fetched from the hub;
# transformers would follow some of it although its caller said trust_remote_code=False.
OWN_CODE_KEYS = ("auto_map", "auto_mapping", "custom_generate", "custom_pipelines", "trust_remote_code", "use_kernels",
                 "use_pretrained_backbone")  # fmt: skip
# Where configurations hand arguments on to timm's builder, and the names of its models.
TIMM_ARGUMENT_KEYS = ("model_args", "backbone_kwargs", "timm_kwargs")
TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?")  # no scheme: local-dir: and hf-hub: name places
MAX_MODULES = 20  # of sentence-transformers: known models have four
CODE_FILES = (".py", ".pkl", ".pickle", ".so", ".dll", ".pyc", ".joblib", "custom_generate")


class FolderFindings(NamedTuple):
    """What a Hugging Face folder asks for: what cannot be left out, and what can."""

    refused: list[str]
    ignored: list[str]


class VettedFolder(NamedTuple):
    """A Hugging Face folder, and its settings as they were vetted: what is read is these bytes, never the files again.

    What would run code is not in them.
    """

    path: Path
    files: Mapping[str, bytes]  # by name

    def settings(self, name: str) -> Settings:
        """One of the files; raises DamagedFileError where it holds no object."""
        return Settings(parse_json(self.files[name], name), name)

    def modules(self) -> list[Settings]:
        """The parts of a model of sentence-transformers in their order; none where there is no modules.json."""
        if "modules.json" not in self.files:
            return []
        settings = Settings({"modules": parse_json(self.files["modules.json"], "modules.json")}, "modules.json")
        modules = settings.sections("modules")
        if len(modules) > MAX_MODULES:
            raise settings.misfit("modules", f"a list of {MAX_MODULES} modules at most")
        return modules


def vet_folder(path: Path, *, trust: bool) -> VettedFolder:
    """Read the settings of a Hugging Face folder, and take out what would run code.

    Raises ConversionError for what cannot be left out (unless `trust`, --trust-remote-code) and for files that lie
    outside the folder; says in [WARN] lines what is ignored.
    """
    files: dict[str, bytes] = {}
    findings = FolderFindings([], [])
    with naming(path):
        names = sorted(entry.name for entry in path.iterdir())
        values = 0
        for name in names:
            real_input(path / name)
            if READ_JSON.fullmatch(name):
                files[name] = vetted_json(path / name, findings, trust=trust)
                values += count_values(files[name])
            check_values(values, "its settings together")
    findings.ignored.extend(f"the file {name}" for name in names if name.endswith(CODE_FILES))
    if trust:
        LOG.warn(f"--trust-remote-code: code that comes with {path} may run")
        return VettedFolder(path, files)
    if findings.refused:
        advice = "pass --trust-remote-code if you trust its maker"
        raise ConversionError(ExitStatus.REFUSED, f"{path}: {and_more(findings.refused, 4, 120)}; {advice}")
    if findings.ignored:
        what = and_more(findings.ignored, 6, 80)
        LOG.warn(f"{path}: ignored, since it would run code: {what} (--trust-remote-code)")
    return VettedFolder(path, files)


def vetted_json(path: Path, findings: FolderFindings, *, trust: bool) -> bytes:
    """The content of a settings file: as it is where nothing was taken out, else without that."""
    is_index = path.name.endswith(".index.json")
    data = read_bounded(path, MAX_INDEX_BYTES if is_index else MAX_JSON_BYTES)
    content, before = parse_json(data, path.name), len(findings.ignored)
    if is_index:
        check_shards(content, path)
        return data
    vet_settings(content, path.name, findings)
    unchanged = trust or len(findings.ignored) == before
    return data if unchanged else json.dumps(content, indent=2).encode() + b"\n"


def vet_settings(content: Any, file: str, findings: FolderFindings) -> None:
    """Take out of a folder's JSON, at every depth, what would run code, and note it; raises DamagedFileError."""
    waiting = [content]
    if file in ("config.json", "adapter_config.json", "generation_config.json"):
        Settings(content, file)  # an object
    known_type = isinstance(content, dict) and isinstance(content.get("model_type"), str)
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        if not isinstance(node, dict):
            continue
        for key, value in list(node.items()):
            where = f"{key} in {file}"
            check_timm_setting(key, value, file)
            if key == "auto_map" and file == "config.json" and not known_type:
                findings.refused.append(f"{where} is the only thing that says what the model is: its own Python code")
            elif key == "quantization_config" and value:
                method = value.get("quant_method") if isinstance(value, dict) else value
                findings.refused.append(f"{where} needs the code of the quantiser {shown(method)}")
            elif IMPLEMENTATION_KEY.fullmatch(key):
                if not is_one_of(value, IMPLEMENTATIONS):
                    findings.refused.append(f"{where} names the kernel {shown(value)}")
            elif key in OWN_CODE_KEYS or (key == "backbone" and names_a_place(value)):
                if value:
                    findings.ignored.append(where)
            else:
                waiting.append(value)
                continue
            del node[key]


def names_a_place(value: object) -> bool:
    """Whether what stands for a model of timm is something else than its plain name, such as a hub's or a folder's."""
    return isinstance(value, str) and not TIMM_NAME.fullmatch(value)


def check_timm_setting(key: str, value: object, file: str) -> None:
    """Raise DamagedFileError for settings that would make timm's builder open something."""
    if key == "architecture" and names_a_place(value):
        what = "which names no architecture of timm"
        raise DamagedFileError(f"{file}: architecture is {shown(value)}, {what}; repair it")
    if key in TIMM_ARGUMENT_KEYS and value is not None:
        for name, entry in Settings(value, f"{file}: {key}").content.items():
            if not is_architecture_argument(name, entry):
                what = f"{shorten(repr(name), 60)} with the value {shown(entry)}"
                raise DamagedFileError(f"{file}: {key} has {what}, which does not describe a network; remove it")


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SAFETENSORS_FILE = re.compile(r"model.*\.safetensors")  # one file, or its shards
# Files that other programs' weights and training states lie in: never read, never copied.
FOREIGN_FILES = (".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".data", ".pt", ".pth", ".ckpt", ".tflite", ".mlmodel",
                 ".tar", ".gz", ".zip", ".npz")  # fmt: skip


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that timm writes for the hub."""
    return "model_type" not in config and isinstance(config.get("pretrained_cfg"), dict) and "architecture" in config


def check_folder(vetted: VettedFolder) -> None:
    """Raise InputError for what is missing or of a wrong type, before anything heavy is imported."""
    folder = vetted.path
    names = sorted(entry.name for entry in folder.iterdir())
    if "config.json" not in vetted.files:
        raise InputError(f"{folder} holds no config.json; copy or download the whole folder")
    with naming(folder):
        settings = vetted.settings("config.json")
        settings.names("architectures")
        settings.name("model_type")
        settings.section("id2label")
    config = settings.content
    if not config.get("model_type") and not is_timm(config):
        what = "has no model_type; pass the weights' file and --model-class"
        if "_diffusers_version" in config:
            what = "is that of a model of diffusers; pass the model as torch.export.save writes it"
        raise InputError(f"{folder}/config.json {what}")
    weights = [name for name in names if SAFETENSORS_FILE.fullmatch(name)]
    if not weights and not any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in names):
        foreign = [name for name in names if name.endswith(FOREIGN_FILES)]
        there = f" (there is {', '.join(foreign[:3])}, which PyTorch does not read)" if foreign else ""
        raise InputError(
            f"{folder} has no weights, neither model.safetensors nor pytorch_model.bin{there}; copy or download them"
        )
    if not any(name in names for name in WEIGHT_FILES):
        raise InputError(
            f"{folder} has weights, but neither one file of all nor the index of its shards "
            f"({', '.join(WEIGHT_FILES)}); copy or download it too"
        )
    for name in weights:
        detect_file(folder / name)  # says what it is that is none: a pointer of Git LFS, an HTML page
        try:
            safetensors_header(folder / name)
        except DamagedFileError as error:  # of many shards, that one
            raise ConversionError(error.status, f"{folder / name}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# recognise: whose weights these are, told by the names and shapes of the tensors
#
# Takes names and shapes, gives a class and its arguments. ARCHITECTURES lists the tensors of every model of
# torchvision and timm, with the number of classes (C) and of input channels (I) left open, which models of one layout
# compute the same, and what tells the families of transformers apart; tests/generators/architectures.py writes it.
# ---------------------------------------------------------------------------------------------------------------------

SIZE = re.compile(r"(\d*)([CI])([+-]\d+)?")  # 4C+4: four times the number of classes, and four
SHORT_NAME = 200  # characters, and this many names, in which patterns are searched: they look at a name again and again
MAX_SEARCHED = 10_000
NEAR = 0.5  # a layout of which less than half agrees is not worth naming


class Layout(NamedTuple):
    """The tensors that some models share, as numbers of the table; `head` is absent where the classifier is.

    `groups` are the models as `package.module:function` (and JSON arguments); those in one group compute the same.
    `unlike` are those that are made for images of another size, mean or deviation than the first of their group.
    """

    tensors: list[int]
    head: frozenset[int]
    groups: list[list[str]]
    unlike: frozenset[str]


class Architectures(NamedTuple):
    """The data file: the table of tensors by name (each with its number) and the layouts."""

    names: list[str]
    sizes: list[str]  # 64x3x7x7
    numbers: dict[str, int]  # `name sizes` without unknowns
    patterns: dict[str, list[int]]  # those with unknowns, by name
    layouts: list[Layout]
    torchvision: frozenset[str]  # the names that need no package
    families: list[tuple[str, str]]  # of transformers, each with a pattern of names that only it writes


class Recognition(NamedTuple):
    """Whose weights these are.

    `candidates` are names for --model-class: one group is an answer, and any of its members computes the same; several
    groups differ in results; none means unknown. `arguments` are the first candidate's, told by the shapes.
    """

    candidates: tuple[tuple[str, ...], ...]
    arguments: dict[str, Any]
    explanation: str


@functools.cache
def read_architectures() -> Architectures:
    """The data file beside this script; raises UsageError where it is not there."""
    try:
        content = json.loads(lzma.decompress(ARCHITECTURES.read_bytes()))
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise UsageError(f"{ARCHITECTURES.name} cannot be read ({first_line(error)}); pass --model-class") from None
    names, sizes = content["names"], content["sizes"]
    numbers: dict[str, int] = {}
    patterns: dict[str, list[int]] = {}
    for number, (name, text) in enumerate(zip(names, sizes, strict=True)):
        if "C" in text or "I" in text:
            patterns.setdefault(name, []).append(number)
        else:
            numbers[f"{name} {text}"] = number
    layouts = [
        Layout(
            [number for first, count in layout["runs"] for number in range(first, first + count)],
            frozenset(layout["head"]),
            layout["groups"],
            frozenset(layout.get("unlike", ())),
        )
        for layout in content["layouts"]
    ]
    members = itertools.chain.from_iterable(itertools.chain.from_iterable(layout.groups for layout in layouts))
    own = frozenset(re.findall(r"torchvision\.models:(\w+)", "\n".join(members)))
    return Architectures(names, sizes, numbers, patterns, layouts, own, content["families"])


def solve_sizes(sizes: str, shape: Sequence[int]) -> dict[str, int] | None:
    """What the unknowns are where `sizes`, such as 4C+4x256x3x3, describe `shape`; None where they cannot."""
    found: dict[str, int] = {}
    parts = sizes.split("x")
    if len(parts) != len(shape):
        return None
    for part, number in zip(parts, shape, strict=True):
        match = SIZE.fullmatch(part)
        if not match:
            if number != int(part):
                return None
            continue
        value, rest = divmod(number - int(match[3] or 0), int(match[1] or 1))
        if rest or value < 1 or found.setdefault(match[2], value) != value:
            return None
    return found


def match_tensors(shapes: Mapping[str, Sequence[int]]) -> dict[int, dict[str, int]]:
    """The numbers of the table's tensors that are in `shapes`, each with what its unknowns are."""
    known = read_architectures()
    matches: dict[int, dict[str, int]] = {}
    for name, shape in shapes.items():
        number = known.numbers.get(f"{name} {shape_text(shape)}")
        if number is not None:
            matches[number] = {}
        for pattern in known.patterns.get(name, ()):
            found = solve_sizes(known.sizes[pattern], shape)
            if found is not None:
                matches[pattern] = found
    return matches


def layout_fit(layout: Layout, matches: Mapping[int, Mapping[str, int]], count: int) -> dict[str, int] | None:
    """The unknowns for which `layout` is exactly the `count` tensors that were matched; None where there are none.

    C is 0 where the classifier alone is absent, as timm builds it for num_classes=0.
    """
    tensors = layout.tensors
    found: dict[str, int] = {}
    if layout.head and count == len(tensors) - len(layout.head):
        tensors = [number for number in tensors if number not in layout.head]
        found["C"] = 0
    if count != len(tensors):
        return None
    for number in tensors:
        if number not in matches or any(found.setdefault(k, v) != v for k, v in matches[number].items()):
            return None
    return found


def arguments_for(member: str, unknowns: Mapping[str, int]) -> dict[str, Any] | None:
    """The keyword arguments that build `member` of a layout; None where it cannot be built so.

    torchvision's models have three input channels and a classifier.
    """
    name, _, fixed = member.partition(" ")
    channels = unknowns.get("I", IMAGE_CHANNELS)
    if name.startswith("torchvision.") and (channels != IMAGE_CHANNELS or unknowns.get("C") == 0):
        return None
    arguments = {"num_classes": unknowns["C"]} if "C" in unknowns else {}
    return {**arguments, **({"in_chans": channels} if channels != IMAGE_CHANNELS else {}), **json.loads(fixed or "{}")}


def short_name(member: str) -> str:
    """What to pass as --model-class: the bare name where it means this model, else `timm.models:name`."""
    module, _, name = member.partition(" ")[0].partition(":")
    return name if module == "torchvision.models" or name not in read_architectures().torchvision else member


def find_architecture(shapes: Mapping[str, Sequence[int]]) -> Recognition | None:
    """The models whose tensors are exactly `shapes`, torchvision's first; None where there are none."""
    matches = match_tensors(shapes)
    candidates: list[tuple[str, ...]] = []
    texts: list[str] = []
    told: dict[str, Any] = {}
    for layout in read_architectures().layouts:
        unknowns = layout_fit(layout, matches, len(shapes))
        if unknowns is None:
            continue
        for group in layout.groups:
            usable = [member for member in group if arguments_for(member, unknowns) is not None]
            if usable:
                told = told or arguments_for(usable[0], unknowns) or {}
                candidates.append(tuple(short_name(member) for member in usable))
                texts.append(describe_group(usable, layout.unlike))
    if not candidates:
        return None
    arguments = "".join(f", {key}={value}" for key, value in told.items())
    explanation = f"{texts[0]}{arguments}, by the names and shapes of its {plural(len(shapes), 'tensor')}"
    if len(candidates) > 1:
        explanation = f"{len(texts)} models have these tensors but need not compute the same: {'; '.join(texts)}"
    return Recognition(tuple(candidates), told, explanation)


def describe_group(members: Sequence[str], unlike: Collection[str]) -> str:
    """The first of `members`, and the others, which compute the same."""
    first, *others = [short_name(member) + " (other preprocessing)" * (member in unlike) for member in members]
    return first + (f" (the same as {', '.join(others)})" if others else "")


def recognise(shapes: Mapping[str, Sequence[int]]) -> Recognition:
    """The models of torchvision and timm, or the family of transformers, that have tensors of these names and `shapes`.

    Raises ConversionError where the data file is missing or the weights are FSDP's flattened shards.
    """
    tensors = {k: v for k, v in fold_masks(unwrap_names(shapes)).items() if not k.endswith("num_batches_tracked")}
    variants = [{k.removeprefix(prefix): v for k, v in tensors.items()} for prefix in shared_prefixes(tensors)]
    for names in variants:
        found = find_architecture(names)
        if found:
            return found
    for names in variants:
        text = "\n".join(itertools.islice((name for name in names if len(name) <= SHORT_NAME), MAX_SEARCHED))
        families = read_architectures().families
        if family := next((name for name, pattern in families if re.search(pattern, text, re.MULTILINE)), ""):
            advice = "their config is needed too: pass the folder that has config.json beside the weights"
            return Recognition((), {}, f"by their names they are of transformers ({family} or a relative); {advice}")
    return Recognition((), {}, nearest_architectures(variants))


def choose_recorded(recognition: Recognition, content: Mapping[Any, Any]) -> Recognition:
    """`recognition` with the candidate alone that the checkpoint names in its entry `arch`, as training scripts do."""
    name = content.get("arch")
    chosen = tuple(group for group in recognition.candidates if isinstance(name, str) and name in group)
    if len(recognition.candidates) < 2 or len(chosen) != 1:
        return recognition
    explanation = f"{name}, by the tensors, which other models have too, and the checkpoint's entry 'arch'"
    return Recognition(chosen, recognition.arguments, explanation)


def nearest_architectures(variants: Sequence[Mapping[str, Sequence[int]]]) -> str:
    """The models that most of the tensors fit, and what differs; `variants` are the same tensors under other names."""
    scored = []
    for names in variants:
        matches = match_tensors(names)
        for layout in read_architectures().layouts:
            common = sum(number in matches for number in layout.tensors)
            union = len(layout.tensors) + len(names) - common
            if common >= NEAR * union:
                scored.append((common / union, layout, names, matches))
    scored.sort(key=lambda item: -item[0])
    texts = [f"{short_name(item[1].groups[0][0])} ({layout_difference(*item[1:])})" for item in scored[:3]]
    return f"nearest: {'; '.join(texts)}" if texts else "no model of torchvision or timm has such tensors"


def layout_difference(layout: Layout, names: Mapping[str, Sequence[int]], matches: Collection[int]) -> str:
    """`3 of 320 tensors differ: a.weight is 8x4, not 8x3`."""
    known = read_architectures()
    sizes = {known.names[number]: known.sizes[number] for number in layout.tensors}
    agreeing = {known.names[number] for number in layout.tensors if number in matches}
    reshaped = [name for name in names if name in sizes and name not in agreeing]
    differences = [
        *(f"{name} is {shape_text(names[name])}, not {re.sub(SIZE, '?', sizes[name])}" for name in reshaped),
        *(f"{name} is missing" for name in sizes if name not in names),
        *(f"{name} is not in it" for name in names if name not in sizes),
    ]
    if not differences:  # each tensor fits, but they contradict each other
        return "its tensors disagree about the number of classes or channels"
    return f"{len(differences)} of {len(names.keys() | sizes)} tensors differ: {and_more(differences, 2, 200)}"


def with_class_advice(error: ConversionError, source: Source) -> ConversionError:
    """`error`, and where it is about a complete model the --model-class for which its weights alone are enough."""
    if source.kind not in (Kind.CHECKPOINT, Kind.LEGACY_CHECKPOINT):
        return error
    with contextlib.suppress(ConversionError, RecursionError), time_limit(RUN_SECONDS):
        content = numbered(read_checkpoint(source, WeightsUnpickler))
        tensors = state_dict_of(content) if isinstance(content, Saved) else None
        if tensors:
            found = recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()}).candidates
            name = " or ".join(group[0] for group in found[:3]) or "with its class (package.module:Class)"
            return ConversionError(error.status, f"{error}; or use its weights alone: --model-class {name}")
    return error


def recognised_class(weights: Mapping[str, Tensor], content: Mapping[Any, Any], options: Options) -> Options:
    """The options with the class that the `weights` identify; UsageError unless there is exactly one."""
    recognition = choose_recorded(recognise({name: tuple(tensor.shape) for name, tensor in weights.items()}), content)
    if len(recognition.candidates) == 1:
        LOG.info(f"recognised: {recognition.explanation}")
        arguments = {**recognition.arguments, **options.model_args}
        return replace(options, model_class=recognition.candidates[0][0], model_args=arguments)
    some = "".join(f"{name} {shape_text(weights[name].shape)}, " for name in list(weights)[:2])
    what = f"{options.input} holds weights only ({plural(len(weights), 'tensor')}: {some}...)"
    advice = "pass --model-class with their class: a torchvision or timm name, or package.module:Class"
    raise UsageError(f"{what}; {recognition.explanation}; {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# a model from weights: find the weights in a checkpoint, build the class, and let the shapes tell its arguments
#
# Takes a checkpoint's content, gives a module. Arguments that come from a file describe a network and nothing else.
# ---------------------------------------------------------------------------------------------------------------------

# Where training scripts put the weights, the averaged ones first: they are what their authors evaluate.
WEIGHT_KEYS = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "g_ema", "params_ema", "state_dict",
               "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "generator", "netG",
               "student", "teacher", "module")  # fmt: skip
# What lies beside the weights: entries whose tensors are never a model.
OTHER_STATE = re.compile(r"optim|sched|scaler|rng|loop|callback|metric|hyper", re.IGNORECASE)
# Counters of profilers and of weight averaging that lie among the weights.
COUNTERS = ("total_ops", "total_params", "n_averaged")
# What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap.
WRAPPED_NAME = re.compile(r"(module\.)*")
MAX_GUESSES = 60  # arguments that the shapes suggest: each is a model that is built
MAX_PREFIXES = 8  # that may be taken off all names, one after the other
WRAPPER_PARTS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Weights(NamedTuple):
    """A model or its tensors found in a checkpoint: the entry that holds them ("" for the checkpoint itself)."""

    content: Any  # nn.Module or dict[str, Tensor]
    key: str


def find_weights(content: Any, key: str | None) -> Weights:
    """The module or state dict inside a checkpoint: the one at `key` (--checkpoint-key), or the likeliest.

    `key` is an entry, entries joined by dots, or a prefix of the wanted tensors' names. Raises ConversionError that
    lists what there is, where nothing is found, or several things without a usual name.
    """
    seen: set[int] = set()  # a file can name one mapping any number of times

    def entries(value: object, path: str, depth: int) -> Iterator[Weights]:
        if id(value) in seen:
            return
        seen.add(id(value))
        value = numbered(value)
        found = value if isinstance(value, nn.Module) else state_dict_of(value)
        if found is not None:
            yield Weights(found, path)
        elif isinstance(value, Mapping) and depth < 3:
            usual = [name for name in WEIGHT_KEYS if name in value]
            for name in [*usual, *(name for name in value if name not in usual)]:
                if not OTHER_STATE.search(str(name)) or (key is not None and key.startswith(f"{path}{name}")):
                    yield from entries(value[name], f"{path}.{name}" if path else str(name), depth + 1)

    found = list(entries(content, "", 0))
    if key is not None:
        return entry_at(found, key, content)
    if not found:
        raise DamagedFileError(f"no weights found in the checkpoint; it has {keys_of(content)}")
    first, *others = found
    names = ", ".join(item.key for item in others[:4])
    if others and first.key.partition(".")[0] not in WEIGHT_KEYS:
        raise UsageError(
            f"the checkpoint holds several models ({first.key}, {names}); pass --checkpoint-key {first.key} for that "
            "one, or save the module that calls them, if they are parts of one (layers in a row: torch.nn.Sequential)"
        )
    if first.key:
        also = f"; it also has {names} (--checkpoint-key)" if others else ""
        kind = "model" if isinstance(first.content, nn.Module) else "weights"
        LOG.info(f"{kind}: from the entry {first.key!r} of the checkpoint{also}")
    return first


def entry_at(found: Iterable[Weights], key: str, content: Any) -> Weights:
    """The entry of `found` that --checkpoint-key names; raises UsageError that lists what there is."""
    for item in found:
        if item.key == key:
            return item
        if isinstance(item.content, Mapping):
            prefix = f"{key}.".removeprefix(f"{item.key}.")
            part = {n.removeprefix(prefix): tensor for n, tensor in item.content.items() if n.startswith(prefix)}
            if part:
                return Weights(part, key)
    raise UsageError(f"--checkpoint-key {key}: no weights there; it has {keys_of(content)}")


def keys_of(content: Any) -> str:
    """The first keys of a checkpoint, for a message."""
    return (
        f"the keys {and_more(content.keys(), 8)}" if content else "no keys (pass --model-class if its class has none)"
    )


def resolve_model_class(name: str) -> Callable[..., nn.Module]:
    """The class or builder function that --model-class names; raises UsageError with near misses."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        load = import_library if belongs(module, ("torchvision", "timm")) else importlib.import_module
        try:
            target = functools.reduce(getattr, attribute.split("."), load(module))
        except (ImportError, AttributeError, ValueError) as error:
            advice = "install its package, or put its folder on PYTHONPATH"
            raise UsageError(f"--model-class {name}: {first_line(error)}; {advice}") from None
        if not callable(target):
            raise UsageError(f"--model-class {name}: that is a {type(target).__name__}, not a class")
    else:
        target = library_model(name)
    own = belongs(getattr(target, "__module__", ""), ("torchvision",))
    if own and accepts(target, "weights_backbone", by_name=True):  # it would download the backbone's
        return functools.partial(target, weights=None, weights_backbone=None)
    return target


def library_model(name: str) -> Callable[..., nn.Module]:
    """The builder of that name, torchvision's first, or timm's; raises UsageError with near misses."""
    own = import_library("torchvision.models")
    with contextlib.suppress(ValueError):
        return cast("Callable[..., nn.Module]", own.get_model_builder(name))
    timm = import_library("timm")
    if timm.is_model(name):
        return functools.partial(timm.create_model, name)
    lists = (own.list_models(), timm.list_models())
    near = itertools.chain.from_iterable(difflib.get_close_matches(name.lower(), n, n=3, cutoff=0.4) for n in lists)
    text = ", ".join(dict.fromkeys(near)) or "none"
    advice = "a class of another package is written package.module:Class"
    raise UsageError(f"--model-class {name}: torchvision and timm have no such model (near: {text}); {advice}")


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """Disable torch.nn.init's random functions: they take seconds for a large model, and the file has every value.

    Only whole functions are replaced: one that draws until the numbers fit would never end on replaced parts.
    """
    pattern = r"(kaiming_|xavier_|trunc_)?(normal_|uniform_)|orthogonal_"
    names = [name for name in dir(nn.init) if re.fullmatch(pattern, name)]
    with patched(nn.init, **dict.fromkeys(names, lambda tensor, *_, **__: tensor)):
        yield


@contextlib.contextmanager
def bounded_build(tensors: int, size: int) -> Iterator[None]:
    """Limit what is built inside by the file's weights: `tensors` of them, of `size` bytes together.

    Arguments and settings from a file may ask for any number of layers. Parameters and modules are counted as they are
    registered, and memory is limited, whatever the settings are called. Raises DamagedFileError.
    """

    def counting(what: str, limit: int) -> Callable[..., None]:
        places = itertools.count(1)

        def count(*_: object) -> None:
            if next(places) > limit:
                what_else = f"and its weights are {tensors} tensors; check its settings"
                raise DamagedFileError(f"the model that it describes has more than {limit} {what}, {what_else}")

        return count

    hooks = nn.modules.module
    with (
        hooks.register_module_parameter_registration_hook(counting("parameters", 8 * tensors + 1000)),
        hooks.register_module_module_registration_hook(counting("modules", 40 * tensors + 10_000)),
        memory_bound(RUN_BYTES + 4 * size, "building the model that it describes", "check its sizes"),
    ):
        yield


def clean_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`weights` under the names of `model`: without wrappers' prefixes and counters, and only the part that it has.

    The batch counters that PyTorch before 0.4.1 lacked are added. Raises UsageError where two parts fit.
    """
    expected = model.state_dict()
    weights = unwrap_names(weights)
    if not any(name.endswith("_mask") for name in expected):
        weights = fold_masks(weights)
    shared = (prefix for prefix in shared_prefixes(weights) if any(k.removeprefix(prefix) in expected for k in weights))
    prefix = next(shared, "") or part_prefix(weights, expected)
    if prefix:
        left = [name for name in weights if not name.startswith(prefix)]
        others = f"; {plural(len(left), 'tensor')} of other parts left out ({', '.join(left[:3])})" if left else ""
        LOG.info(f"weights: {prefix!r} is taken off the names{others}")
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    for name in expected.keys() - weights.keys():
        if name.endswith("num_batches_tracked"):  # counts training steps; the forward pass in eval mode ignores it
            weights[name] = torch.zeros_like(expected[name])
    return weights


def fold_masks(weights: Mapping[str, Any]) -> dict[str, Any]:
    """`weights` (or their shapes) with what torch.nn.utils.prune split into NAME_orig and NAME_mask as the product."""
    folded = dict(weights)
    for name in [name.removesuffix("_mask") for name in weights if name.endswith("_mask")]:
        if f"{name}_orig" in weights:
            mask, value = folded.pop(f"{name}_mask"), folded.pop(f"{name}_orig")
            is_tensor = isinstance(value, torch.Tensor)
            folded[name] = (in_memory(value) * in_memory(mask)).to(value.dtype) if is_tensor else value
    return folded


def unwrap_names(weights: Mapping[str, T]) -> dict[str, T]:
    """`weights` without counters and without what wrappers put into names; raises ConversionError for FSDP's shards."""
    if any(name.endswith("_flat_param") for name in weights):
        advice = "save a full state dict (StateDictType.FULL_STATE_DICT) instead"
        raise InputError(f"the weights are FSDP's flattened shards; {advice}")
    result = {
        WRAPPER_PARTS.sub("", name): tensor
        for name, tensor in weights.items()
        if name.rpartition(".")[2] not in COUNTERS
    }
    # DataParallel, DDP and AveragedModel, one in the other.
    wraps = min((len(WRAPPED_NAME.match(name)[0]) for name in result), default=0)  # type: ignore[index]  # may be empty
    return {name[wraps:]: tensor for name, tensor in result.items()}


def shared_prefixes(names: Collection[str]) -> list[str]:
    """What all names begin with, up to each of the first dots, the empty text first: Lightning's `model.`."""
    shared = os.path.commonprefix(list(names))  # noqa: RUF071  (of characters)
    return ["", *(shared[: match.end()] for match in itertools.islice(re.finditer(r"\.", shared), MAX_PREFIXES))]


def part_prefix(weights: Collection[str], expected: Iterable[str]) -> str:
    """The prefix of the one part of a larger checkpoint that has exactly the class's names; "" where there is none.

    Raises UsageError where there are several.
    """

    def lasting(names: Iterable[str]) -> set[str]:
        return {name for name in names if not name.endswith("num_batches_tracked")}

    wanted = lasting(expected)
    if not any("." in name for name in wanted):  # a single layer: any layer of its kind has these names
        return ""
    anchor = f".{next(iter(wanted), '')}"
    names = sorted(lasting(weights))
    parts = []
    for prefix in [name.removesuffix(anchor) + "." for name in names if name.endswith(anchor)]:
        start = bisect.bisect_left(names, prefix)
        within = names[start : start + len(wanted) + 1]  # one more than fits is enough to see
        if wanted == {name.removeprefix(prefix) for name in within if name.startswith(prefix)}:
            parts.append(prefix)
    if len(parts) > 1:
        keys = ", ".join(part.rstrip(".") for part in parts[:8])
        raise UsageError(f"the class's weights are there several times; pass --checkpoint-key: {keys}")
    return parts[0] if parts else ""


def argument_guesses(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Keyword arguments that the tensors' shapes suggest: output size, input channels, auxiliary heads."""
    expected = model.state_dict()
    classes: dict[int, None] = {}
    channels: dict[int, None] = {}
    for name in expected.keys() & weights.keys():
        have, want = weights[name].shape, expected[name].shape
        if len(have) == len(want) and have != want and have:
            if have[0] != want[0]:  # heads repeat the classes per anchor or per box side: 4 * 91, 6 * 91
                defaults = (want[0], 1000, 400, 91, 21)
                classes.update(dict.fromkeys(have[0] * n // want[0] for n in defaults if have[0] * n % want[0] == 0))
            if len(have) > 3 and have[1] != want[1]:
                channels[have[1]] = None
    heads: list[dict[str, Any]] = [{}, {"aux_logits": False}, {"aux_logits": True}, {"aux_loss": True}]
    sizes = [{}, *({"num_classes": number} for number in classes)]
    inputs = [{}, *({key: number} for number in channels for key in ("in_chans", "in_channels"))]
    for head, size, planes in itertools.product(heads, sizes, inputs):
        yield {**head, **size, **planes}


# Words of which the names of architecture arguments are made. None of them names a place, weights, a device or code.
NETWORK_WORDS = word_set(
    """aa abs act activation affine align alpha ar attention attn attns aux avg band base basic batch beta bias
    bidirectional blk block blocks bn bottle bottleneck branch branches cardinality causal cell chan channel
    channels chans chs class classes conv coords counts cpe cross crpe decoder dense depth depths depthwise
    dilation dilations dim dims div down downsample downsamples drop dropout dw dynamic emb embed embedding
    embeddings encoder end ends eps exp expand expansion extra factor fc feat feats feature features feedforward
    fewer ffn filter filters final first fixed focal fork fuse fused fusion gamma gate gated global grid group
    groups grow growth gru half head heads height hidden image img in indices inference init inner inplace input
    intermediate interp interpolation kernel kernels key kv last latent layer layers layerscale len length level
    levels linear list local logits loss ls lstm main mask max merge meta mid min mix mixer mixers mlp mode
    momentum mul mult multi multiplier n neck negative neurons no norm normalize noskip num offset only
    orthonormal out outer output outputs overlap pad padding parallel partial partition patch patches per period
    pool pooling pos position positions post pre preact prefix prob proj projection qk qkv query rank rate rates
    ratio ratios reduce reduction ref reg register rel relu rep repeats res residual resolution rnn root rope rot
    rotate scale se section separate seq sequence sequential shape shared shift shortcut size sizes skip slices
    slope small spatial squeeze sr stage stages state std stem strict stride strides swap swiglu tail temperature
    temporal theta time token tokens transformer transition type types union unit units up use value values vocab
    width widths window zero"""
)
NETWORK_NAMES = frozenset({"d_model", "d_ff", "d_kv", "nhead"})
MAX_ARGUMENT = 1 << 24  # of a number that describes a network: vocabularies have a million entries


def is_architecture_argument(name: object, value: object, depth: int = 0) -> bool:
    """Whether an argument from a file says how wide, deep or shaped a network is, by its name and its plain value."""
    if depth == 0:
        short = isinstance(name, str) and len(name) <= 60
        parts = str(name).replace("drop_path", "drop").split("_") if short else [""]  # the only path that is none
        if name not in NETWORK_NAMES and not all(part.strip("0123456789") in NETWORK_WORDS for part in parts):
            return False
    if isinstance(value, (list, tuple)):
        return depth < 3 and len(value) <= 1000 and all(is_architecture_argument("", v, depth + 1) for v in value)
    if isinstance(value, (int, float)) and type(value) in (int, float):
        return -MAX_ARGUMENT <= value <= MAX_ARGUMENT  # NaN is not
    is_word = type(value) is str and re.fullmatch(r"\w{0,40}", value, re.ASCII) is not None
    return is_word or value is None or type(value) is bool


def architecture_arguments(given: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The arguments from a file that may reach a builder; an [INFO] line names the others.

    Those name places, URLs, weights, devices or functions, which the builder would open or run.
    """
    kept = {name: value for name, value in given.items() if is_architecture_argument(name, value)}
    if left := [name for name in given if name not in kept]:
        LOG.info(f"{where}: not used, since they do not describe a network: {and_more(left, 8, 40)}")
    return kept


def model_from_weights(
    name: str, given: Mapping[str, Any], tensors: Mapping[str, Tensor], hints: Mapping[str, Any]
) -> nn.Module:
    """The class `name` with all of `tensors` loaded; arguments not `given` come from `hints` or inferred from shapes.

    `hints` are the hyper_parameters that Lightning stores: those that the constructor names are tried first. Raises
    UsageError that lists what is missing, unexpected or of another shape.
    """
    build = resolve_model_class(name)
    fitting = {key: hints[key] for key in hints if key not in given and accepts(build, str(key), by_name=True)}
    recorded = architecture_arguments(fitting, "hyper_parameters")
    if recorded:
        with contextlib.suppress(ConversionError):
            model = attempt_build(build, {**recorded, **given}, name)
            if not load_weights(model, clean_weights(tensors, model)):
                told = ", ".join(f"{key}={value}" for key, value in recorded.items())
                LOG.info(f"weights: the checkpoint's hyper_parameters tell {told}")
                return model
    first = attempt_build(build, given, name)
    weights = clean_weights(tensors, first)
    refusal = load_weights(first, weights)
    if not refusal:
        return first
    for guess in itertools.islice(argument_guesses(first, weights), MAX_GUESSES):
        if not guess or guess.keys() & given.keys() or not all(accepts(build, key) for key in guess):
            continue
        with contextlib.suppress(ConversionError):
            model = attempt_build(build, {**given, **guess}, name)
            if not load_weights(model, weights):
                LOG.info(f"weights: their shapes tell {', '.join(f'{k}={v}' for k, v in guess.items())}")
                return model
    misfit = describe_misfit(first, weights) or refusal
    advice = "pass the class they were saved from, or its arguments with --model-args"
    raise UsageError(f"the weights do not fit --model-class {name}: {misfit}; {advice}")


def adopt_eps(model: nn.Module, saved: Mapping[str, float]) -> None:
    """Let the layers of `model` add what those that were saved added: timm 0.9 changed mobilenetv3_rw's."""
    changed = []
    for name, module in model.named_modules():
        own = vars(module).get("eps")
        if isinstance(own, float) and saved.get(name, own) != own:
            vars(module)["eps"] = saved[name]
            changed.append(f"{name} {saved[name]:g}, not {own:g}")
    if changed:
        LOG.info(f"weights: with the eps of the file's layers: {and_more(changed, 2)}")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Load `weights` strictly, in the dtypes of the model; returns why they do not fit, or "".

    load_state_dict decides, since modules may rename what older versions wrote (weight_norm's weight_g). It wants their
    versions (`_metadata`), which not every file has: those of the installed classes are used.
    """
    own = model.state_dict()
    state = collections.OrderedDict(
        (key, value.to(own[key].dtype if key in own else value.dtype)) for key, value in weights.items()
    )
    vars(state)["_metadata"] = vars(own)["_metadata"]
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except Exception as error:  # modules with a loader of their own raise anything
        raise_out_of_memory(error)
        return first_line(error)
    return ""


def attempt_build(build: Callable[..., nn.Module], arguments: Mapping[str, Any], name: str) -> nn.Module:
    """Build the class; raises UsageError where its constructor fails."""
    try:
        with without_initialisation():
            model = build(**arguments)
    except Exception as error:  # whatever the user's constructor raises
        raise_out_of_memory(error)
        advice = "pass what its constructor needs with --model-args"
        raise UsageError(f"--model-class {name}: it cannot be built ({first_line(error)}); {advice}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model-class {name}: it made a {type(model).__name__}, not a torch.nn.Module")
    return model


def describe_misfit(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """The first few missing, unexpected and mis-shaped names, and how many more."""
    expected = model.state_dict()
    both = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    reshaped = [f"{key} is {shape_text(weights[key].shape)}, not {shape_text(expected[key].shape)}" for key in both]
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return "; ".join(f"{len(names)} {what} ({and_more(names, 3, 200)})" for what, names in kinds if names)


# ---------------------------------------------------------------------------------------------------------------------
# read safely: open a file without executing anything that it says
#
# Takes a Source, gives what is in it (Loaded): tensors, a module of allowed classes, TorchScript or an exported
# program. Each format has its own way to make code run, and its room below.
# ---------------------------------------------------------------------------------------------------------------------

MAX_HEADER_BYTES = 16 << 20  # safetensors header: some 130,000 tensors; the library itself stops at 100 MB


def load(source: Source, *, trust: bool, weights: bool = False) -> Loaded:
    """Open `source` on the CPU; raises ConversionError that names the file. `trust` runs whatever the file says.

    `weights`: of a pickled model only they are wanted.
    """
    loaders = {
        Kind.CHECKPOINT: load_checkpoint,
        Kind.LEGACY_CHECKPOINT: load_checkpoint,
        Kind.SAFETENSORS: load_safetensors,
        Kind.SHARDED_WEIGHTS: load_shards,
        Kind.TORCHSCRIPT: load_torchscript,
        Kind.EXPORTED_PROGRAM: load_exported_program,
    }
    if weights:
        loaders |= dict.fromkeys((Kind.CHECKPOINT, Kind.LEGACY_CHECKPOINT), load_saved_weights)
    problem: ConversionError | None = None
    try:
        size = input_size(source.path)
        limit = time_limit(RUN_SECONDS + size / BYTES_PER_SECOND) if not trust else contextlib.nullcontext()
        extra = RUN_BYTES + 4 * size if not trust else None
        with limit, memory_bound(extra, "opening it", "save it again"):
            loaded = loaders[source.kind](source, trust=trust)
    except (RefusedFileError, DamagedFileError) as error:
        problem = error
    except RecursionError:
        problem = DamagedFileError("what it holds is nested too deeply")
    try:
        open_input(source.path).close()  # once more: it is still the one that it was
    except (RefusedFileError, DamagedFileError) as error:
        problem = error
    if problem:
        raise ConversionError(problem.status, f"{source.path}: {shorten(str(problem), 1000)}") from None
    return loaded


# torch's names for the dtypes of safetensors 0.8; it has none for F4, F6_E2M3 and F6_E3M2.
SAFETENSORS_DTYPES = dict(
    pair.split(":")
    for pair in word_set(
        """BOOL:bool U8:uint8 I8:int8 I16:int16 U16:uint16 I32:int32 U32:uint32 I64:int64 U64:uint64 F16:float16
        BF16:bfloat16 F32:float32 F64:float64 C64:complex64 F8_E5M2:float8_e5m2 F8_E4M3:float8_e4m3fn
        F8_E5M2FNUZ:float8_e5m2fnuz F8_E4M3FNUZ:float8_e4m3fnuz F8_E8M0:float8_e8m0fnu"""
    )
)
MAX_TENSOR_AXES = 64  # more than any operator of torch takes


def safetensors_header(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file by tensor name, which the library checks against each other and the file.

    Raises DamagedFileError. Format: 8 bytes with the length of a JSON object, that object, the data.
    """
    from safetensors import SafetensorError, safe_open

    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise DamagedFileError(f"its safetensors header would have {length} bytes; copy or download it again")
        text = file.read(length)
    needed = 8 + length
    try:
        if size >= needed:
            header: dict[str, Any] = json.loads(text.decode(), object_pairs_hook=unique_keys)
            header.pop("__metadata__", None)
            needed += max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size >= needed:
            safe_open(path, "np")
            axes = max((len(entry["shape"]) for entry in header.values()), default=0)
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        plain = isinstance(error, (SafetensorError, ValueError, RecursionError))
        problem = json_problem(error) if plain else "an entry says no dtype, shape or place of a tensor"
        advice = "copy or download it again"
        raise DamagedFileError(f"its safetensors header is damaged ({problem}); {advice}") from None
    if size < needed:
        what = f"a safetensors file of {needed} bytes, {size} of which are there"
        raise DamagedFileError(f"it is cut off: {what}; copy or download it again")
    if axes > MAX_TENSOR_AXES:
        raise DamagedFileError(f"it has a tensor of {axes} axes, more than PyTorch takes; save it again")
    return header


def load_safetensors(source: Source, *, trust: bool) -> Loaded:  # noqa: ARG001  (there is nothing to trust)
    """The tensors of a safetensors file, which lie in the mapped file until somebody reads them."""
    header = safetensors_header(source.path)
    unknown = sorted({entry["dtype"] for entry in header.values()} - SAFETENSORS_DTYPES.keys())
    if unknown:
        raise DamagedFileError(f"it holds {', '.join(unknown)} numbers, which PyTorch lacks; save it in another dtype")
    mapped = map_file(source.path)
    size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    data = torch.empty(0, dtype=torch.uint8).set_(mapped)[mapped.nbytes() - size :]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = getattr(torch, SAFETENSORS_DTYPES[entry["dtype"]])
        part = data[begin:end]
        aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        tensors[name] = aligned.view(dtype).view(entry["shape"])
    return Loaded(tensors, "weights without a model (safetensors)")


def shard_files(index: Path) -> dict[str, set[str]]:
    """The tensors that each shard should hold, by the shard's name, which must be plain: a file beside the index."""
    return check_shards(read_json(index), index)


def check_shards(content: Any, index: Path) -> dict[str, set[str]]:
    """The tensors by shard that the `content` of an index tells; raises DamagedFileError, or RefusedFileError."""
    entries = Settings(content, index.name).section("weight_map")
    if entries is None:
        raise DamagedFileError(f"{index.name} has no weight_map; download it again")
    shards: dict[str, set[str]] = {}
    for tensor, name in entries.content.items():
        if not isinstance(name, str) or not is_file_name(name):
            raise RefusedFileError(
                f"{index.name} points at {shown(name)}, outside its own folder; copy the shard there and name it alone"
            )
        if not os.path.lexists(index.parent / name):
            raise DamagedFileError(f"the shard {name} is missing; copy or download it too")
        shards.setdefault(name, set()).add(tensor)
    return shards


def load_shards(source: Source, *, trust: bool) -> Loaded:
    """The tensors of all the shards that an index names, each opened by the rules of its own kind."""
    tensors: dict[str, Tensor] = {}
    for name, wanted in shard_files(source.path).items():
        shard = detect_file(source.path.parent / name)
        if shard.kind not in (Kind.SAFETENSORS, Kind.CHECKPOINT, Kind.LEGACY_CHECKPOINT):
            raise DamagedFileError(f"the shard {name} does not hold weights")
        content = state_dict_of(load(shard, trust=trust).content) or {}
        check_shard(name, wanted, content.keys())
        tensors |= content
    return Loaded(tensors, "weights without a model (sharded)")


def check_shard(name: str, wanted: set[str], found: Collection[str]) -> None:
    """Raise DamagedFileError where a shard has not all the tensors that its index says."""
    missing = sorted(wanted.difference(found))
    if missing:
        raise DamagedFileError(f"the shard {name} lacks {plural(len(missing), 'tensor')} ({', '.join(missing[:3])})")


def load_torchscript(source: Source, *, trust: bool) -> Loaded:
    """A ScriptModule, and the inputs that it was traced with where the archive has them."""
    if trust:
        LOG.warn(f"--trust-pickle: the code in {source.path} is not vetted")
    else:
        vet_torchscript(source.path)
    try:
        with open_input(source.path) as file:
            module = torch.jit.load(file if trust else without_debug_records(file), map_location="cpu")
    except ConversionError:
        raise
    except Exception as error:  # the compiler of TorchScript raises whatever its C++ code does
        if "torchvision::" in str(error) and "torchvision" not in sys.modules:
            import_library("torchvision")  # registers its operators
            return load_torchscript(source, trust=trust)
        raise_out_of_memory(error)
        raise DamagedFileError(f"torch.jit.load cannot open it ({first_line(error)})") from None
    return Loaded(module, f"TorchScript ({module.original_name})", traced_inputs(source.path))


def without_debug_records(file: io.BufferedReader) -> mmap.mmap:
    """A TorchScript archive whose records of source lines have other names, so that torch does not look for them.

    They are pickles that C++ code reads unchecked when a model raises, and they only make its message longer. The name
    is changed wherever it stands: which of two directories is the archive's, readers may see differently. Pages that
    are changed are copied.
    """
    archive = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    place = -1
    while (place := archive.find(b".py.debug_pkl", place + 1)) >= 0:
        archive[place : place + 13] = b".py.debug_off"
    return archive


def traced_inputs(path: Path) -> tuple[InputShape, ...]:
    """The shapes that a TorchScript archive was traced with; empty for a scripted one.

    torch.jit.save records the tensors without their data, so the storages made here are never filled.
    """
    reader, records = open_archive(path)
    if "traced_inputs.pkl" not in records:
        return ()

    def empty_storage(record_id: tuple[Any, ...]) -> tuple[torch.UntypedStorage, torch.dtype]:
        _, dtype, nbytes = parse_storage_id(record_id)
        if nbytes > MAX_EXAMPLE_BYTES:
            raise DamagedFileError("its recorded inputs are larger than any model's")
        return torch.UntypedStorage(nbytes, device="meta"), dtype

    program = read_record(reader, "traced_inputs.pkl")
    recorded = InertUnpickler(io.BytesIO(program), len(program), empty_storage).load()
    examples = recorded.get("forward", []) if isinstance(recorded, dict) else []
    if not all(isinstance(example, torch.Tensor) for example in examples):
        return ()
    return tuple(InputShape(tuple(x.shape), None, dtype_name(x.dtype)) for x in examples)


MAX_NAME = 2_000  # characters of a tensor's name, or of a checkpoint's entry; the longest known have some 200


def state_dict_of(value: object) -> dict[str, Tensor] | None:
    """The tensors of a mapping from names to tensors, beside which plain values may lie; None for anything else.

    Raises DamagedFileError where a name is endless.
    """
    if isinstance(value, Saved):
        value = value.tensors()
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return None
    if not all(map(is_text, value)):
        raise DamagedFileError("a name in it is no text; save its state dict again")
    longest = max(map(len, value), default=0)
    if longest > MAX_NAME:
        raise DamagedFileError(f"a name in it has {longest} characters, as no model's has; save its state dict again")
    numbers = (torch.Tensor, np.ndarray)
    tensors = {key: torch.as_tensor(item) for key, item in value.items() if isinstance(item, numbers)}
    others = [item for item in value.values() if not isinstance(item, numbers)]
    nested = any(isinstance(item, (Mapping, torch.nn.Module, Saved)) for item in others)
    named_like_weights = any("." in name for name in tensors)
    return tensors if tensors and (not others or (named_like_weights and not nested)) else None


# ---------------------------------------------------------------------------------------------------------------------
# exported programs: the JSON of a .pt2 file, from which torch.export.load would evaluate, import and unpickle
#
# It sees a copy without what could run.
# ---------------------------------------------------------------------------------------------------------------------

GRAPH_TARGET = re.compile(r"torch\.ops\.(aten|prims|torchvision|quantized|higher_order)\.(\w+)(\.\w+)?")
# Operators with functions inside; those that call compiled code (aoti_call_delegate, call_torchbind) are missing.
HIGHER_ORDER = word_set(
    """cond while_loop map_impl scan associative_scan wrap_with_set_grad_enabled wrap_with_autocast invoke_subgraph
    out_dtype flex_attention strict_mode hints_wrapper auto_functionalized auto_functionalized_v2
    tag_activation_checkpoint wrap_activation_checkpoint"""
)
PYTHON_TARGETS = full_names(
    """
    _operator: add sub mul truediv floordiv mod pow neg pos eq ne lt le gt ge and_ or_ xor not_ getitem
    math: ceil floor trunc sqrt
    torch: sym_int sym_float sym_not sym_max sym_min sym_ite sym_sqrt _sym_sqrt _check
    """
)
SYMBOLIC_CALLS = word_set(
    """Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs Eq Ne Lt Le Gt Ge And Or Not Piecewise FloorDiv
    ModularIndexing CleanDiv CeilDiv PythonMod CeilToInt FloorToInt TruncToInt IntTrueDiv FloatTrueDiv PowByNatural
    FloatPow ToFloat Where Identity Relational"""
)
SYMBOL = re.compile(r"[a-z]{1,3}\d{1,5}|int_oo|oo|zoo|nan|-?\d{1,20}")
MAX_POWER = 64  # the product of all exponents of an expression: 9**9**9 takes for ever
# Names become Python code when the program is turned into a module.
PROGRAM_NAME = re.compile(r"[A-Za-z0-9_.:]*")
MODULE_PATH = re.compile(r"[\w.\-\[\]'@]*", re.ASCII)


def is_operator(target: object) -> bool:
    """Whether a node of an exported program may call `target`."""
    match = GRAPH_TARGET.fullmatch(target) if isinstance(target, str) else None
    if match is None:
        return target in PYTHON_TARGETS if isinstance(target, str) else False
    return match[2] in HIGHER_ORDER if match[1] == "higher_order" else not is_denied_operator([match[2]])


def is_symbolic_expression(text: object) -> bool:
    """Whether `text` is an expression over sizes and nothing else: torch.export.load has sympy evaluate it."""
    if not isinstance(text, str) or len(text) > 4000 or not text.isascii():
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    shapes = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.keyword, ast.Load, ast.unaryop, ast.cmpop,
              ast.Tuple, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)  # fmt: skip
    power: float = 1
    for node in ast.walk(tree):
        exponent = None
        if isinstance(node, ast.Call):
            good = isinstance(node.func, ast.Name) and node.func.id in SYMBOLIC_CALLS
            if good and "Pow" in ast.unparse(node.func):
                exponent = node.args[1] if len(node.args) == 2 else node
        elif isinstance(node, ast.Name):
            good = node.id in SYMBOLIC_CALLS or SYMBOL.fullmatch(node.id) is not None
        elif isinstance(node, ast.Constant):
            good = type(node.value) in (bool, float) or SYMBOL.fullmatch(str(node.value)) is not None
        else:
            good = isinstance(node, shapes)
            exponent = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) else None
        if exponent is not None:
            number = exponent.value if isinstance(exponent, ast.Constant) else None
            power *= max(1, abs(number)) if isinstance(number, (int, float, complex)) else MAX_POWER + 1
        if not good or power > MAX_POWER:
            return False
    return True


def is_plain_tree(text: object) -> bool:
    """Whether a serialised pytree spec names only built-in containers, and keys that are text or numbers.

    An "__enum__" among the keys would import the module that it names.
    """
    names = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "torch.Size", None}

    def check(node: Any) -> bool:
        context = node["context"]
        keys = json.loads(context) if isinstance(context, str) else context
        plain_keys = keys is None or (isinstance(keys, list) and all(type(key) in (str, int) for key in keys))
        return node["type"] in names and plain_keys and all(map(check, node["children_spec"]))

    try:
        _, tree = json.loads(text if isinstance(text, str) else "")
        return check(tree)
    except (ValueError, TypeError, KeyError):
        return False


def are_identifiers(names: object) -> bool:
    """Whether `names` are argument names, or None."""
    return names is None or (isinstance(names, list) and all(isinstance(n, str) and n.isidentifier() for n in names))


# What the values of some keys must be in the JSON of an exported program, and what to call those that are not.
PROGRAM_CHECKS: dict[str, tuple[Callable[[Any], object], str]] = {
    "expr_str": (is_symbolic_expression, "the expression"),
    "target": (is_operator, "the operator"),
    "as_operator": (is_operator, "the operator"),
    "in_spec": (is_plain_tree, "arguments of a custom class:"),
    "out_spec": (is_plain_tree, "results of a custom class:"),
    "forward_arg_names": (are_identifiers, "the argument names"),
    **dict.fromkeys(("name", "as_name", "class_fqn"), (PROGRAM_NAME.fullmatch, "the name")),
    **{f"{kind}_name": (MODULE_PATH.fullmatch, "the name") for kind in ("parameter", "buffer", "tensor_constant")},
    "fqn": (MODULE_PATH.fullmatch, "the name"),
}


def vet_program(node: object, found: set[str]) -> None:
    """Walk the JSON of an exported program; add every part that would run as code to `found`, and drop its notes."""
    if isinstance(node, list):
        for item in node:
            vet_program(item, found)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        check, what = PROGRAM_CHECKS.get(key, (None, ""))
        if not MODULE_PATH.fullmatch(key):
            found.add(f"the name {shorten(key, 40)!r}")
        elif key == "metadata" and ("target" in node or "signature" in node):
            node[key] = {}
        elif check and isinstance(value, (str, list)):
            if not check(value):
                found.add(f"{what} {shorten(str(value), 60)!r}")
        else:
            vet_program(value, found)


def vet_payloads(reader: Any, records: Collection[str], kind: str) -> Iterator[str]:
    """What the weights or constants of an exported program hold besides plain tensors that fit their records."""
    config = f"data/{kind}/model_{kind}_config.json"
    entries = json.loads(read_record(reader, config))["config"] if config in records else {}
    for key, entry in entries.items():
        name = entry["path_name"]
        if entry.get("use_pickle"):
            yield f"a pickled {kind[:-1]} ({shorten(key, 60)})"
            continue
        if not re.fullmatch(r"(weight|tensor)_\d{1,9}", name):
            yield f"a {kind[:-1]} called {shorten(name, 60)!r}"
            continue
        record = f"data/{kind}/{name}"
        sizes = [size["as_int"] for size in entry["tensor_meta"]["sizes"]]
        if record not in records or not all(type(size) is int and size >= 0 for size in sizes):
            raise DamagedFileError(f"its {kind[:-1]} {shorten(key, 60)} is missing or damaged")
        elements = math.prod(sizes)  # dtypes are a byte or more; torch makes zeros of what an empty record lacks
        if elements > reader.get_record_size(record) + (MAX_OVERLAP if reader.get_record_size(record) else 0):
            raise DamagedFileError(f"its {kind[:-1]} {shorten(key, 60)} is larger than its data")


def rewrite_exported_program(path: Path) -> io.BytesIO:
    """The .pt2 archive at `path` with only what torch.export.load may see: no guards, pickles, libraries or notes."""
    reader, records = open_archive(path)
    found = {
        shorten(name, 80)
        for name in records
        if name.startswith("data/aotinductor/") or name.endswith((".so", ".o", ".cubin", ".cpp", ".py"))
    }
    found |= {f"pickled {name}" for name in ("data/weights/model.pt", "data/constants/model.pt") if name in records}
    programs = [name for name in records if name.startswith("models/")]
    if programs != ["models/model.json"] or read_record(reader, "archive_format") != b"pt2":
        raise DamagedFileError("it does not hold exactly one exported program of PyTorch 2.8 or newer")
    try:
        for kind in ("weights", "constants"):
            found.update(vet_payloads(reader, records, kind))
        program = json.loads(read_record(reader, "models/model.json"))
        program["guards_code"] = []
        program["graph_module"]["treespec_namedtuple_fields"] = {}
        vet_program(program, found)
        ranges = program.get("range_constraints", {})
        found.update(f"the range of {shorten(key, 60)}" for key in ranges if not SYMBOL.fullmatch(key))
        text = json.dumps(program)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"its program is damaged ({json_problem(error)})") from None
    except (TypeError, KeyError, AttributeError):
        raise DamagedFileError("its program is damaged: it lacks parts that torch.export.save writes") from None
    if found:
        raise RefusedFileError(
            f"it holds {', '.join(sorted(found)[:8])}, which torch.export.load would run as code; "
            "pass --trust-pickle if you trust its maker"
        )
    rewritten = io.BytesIO()
    with zipfile.ZipFile(rewritten, "w") as archive:
        for name in records:
            if name == "models/model.json":
                archive.writestr(f"model/{name}", text)
            elif name.startswith("data/sample_inputs/"):  # a pickle; torch.export.load takes an empty one for none
                archive.writestr(f"model/{name}", b"")
            elif name.startswith(
                ("data/weights/", "data/constants/", "archive_", "byteorder", "version", ".data/version")
            ):
                archive.writestr(f"model/{name}", reader.get_record(name))
    rewritten.seek(0)
    return rewritten


@contextlib.contextmanager
def weights_only(*, enforced: bool) -> Iterator[None]:
    """Let no torch.load inside unpickle whatever a file says, not even one that asks for it (where `enforced`)."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1" if enforced else "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({name: before} if before is not None else {})


def load_exported_program(source: Source, *, trust: bool) -> Loaded:
    """An ExportedProgram with its inputs' shapes and free axes."""
    if trust:
        LOG.warn(f"--trust-pickle: {source.path} is opened without vetting it")
    file = source.path if trust else rewrite_exported_program(source.path)
    try:
        with weights_only(enforced=not trust):
            program = torch.export.load(file)
        values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        examples = [(name, values[name]) for name in program.graph_signature.user_inputs]
        sizes = [[getattr(getattr(size, "node", size), "hint", size) for size in value.shape] for _, value in examples]
        shapes = tuple(
            InputShape(tuple(map(int, dims)), None, dtype_name(value.dtype))
            for (_, value), dims in zip(examples, sizes, strict=True)
        )
        free = tuple({axis: str(n) for axis, n in enumerate(v.shape) if not isinstance(n, int)} for _, v in examples)
    except Exception as error:  # torch.export raises whatever its deserialiser met
        raise_out_of_memory(error)
        raise DamagedFileError(f"torch.export.load cannot open it ({first_line(error)})") from error
    if any(math.prod(shape.dims) * 8 > MAX_EXAMPLE_BYTES for shape in shapes):
        raise DamagedFileError("its recorded inputs are larger than any model's")
    return Loaded(program, "an exported program", shapes, free)


# ---------------------------------------------------------------------------------------------------------------------
# pickles: a program for a machine that can call any function; ours runs it with nothing to call
#
# Every name resolves to an inert Token, the few rebuilding functions that real checkpoints use are re-implemented in
# REBUILDERS, and objects are only made of classes that known libraries define, without running their code.
# ---------------------------------------------------------------------------------------------------------------------

# Modules whose nn.Module subclasses, enums, named tuples and dataclasses a pickle may hold.
CLASS_MODULES = tuple(
    full_names(
        """
        torch: nn.modules ao.nn.quantized.modules.functional_modules ao.quantization.stubs
        torchvision: models ops
        timm: models layers
        transformers: models activations backbone_utils configuration_utils decision.configuration_utils
        transformers: generation.configuration_utils modeling_layers modeling_utils pytorch_utils time_series_utils
        ultralytics: nn.modules nn.tasks
        """
    )
)
ENUM_MODULES = ("torchvision.transforms.functional",)
# Never, not even with --allow-class. Lazy modules run their initialisation at the first call, and their state is a
# class swap; auto classes build whatever a name says; the others of ultralytics download and install at their import.
DENIED_MODULES = ("torch.nn.modules.lazy", "torch.fx", "torch.jit", "transformers.models.auto",
                  "ultralytics.nn.autobackend", "ultralytics.nn.backends", "ultralytics.nn.text_model")  # fmt: skip
# The files of transformers.models.NAME that hold models and their configurations; tokenizers, processors and
# converters import much more, and no model has them.
TRANSFORMERS_FILE = re.compile(
    r"transformers\.models\.\w+\.((modeling|configuration|generation|generation_configuration)_\w+"
    r"|quant_modules|perceiver|vision)"
)
# What modules are called in older files.
RENAMED_MODULES = {
    "timm.models.layers": "timm.layers",
    "torchvision.models.mobilenet": "torchvision.models.mobilenetv2",
    "ultralytics.yolo": "ultralytics",
}
# What classes are called in older files; those of torchvision before 0.12 only add a constructor to Sequential.
RENAMED_CLASSES = {
    "torch.nn.modules.linear._LinearWithBias": ("torch.nn.modules.linear", "NonDynamicallyQuantizableLinear"),
    **{f"torchvision.models.{name}": ("torch.nn.modules.container", "Sequential")
       for name in ("mobilenetv2.ConvBNReLU", "mobilenetv2.ConvBNActivation")},
}  # fmt: skip
# Settings that came with torch 1.5 to 1.12 and ultralytics 8.4: set so, a layer computes what it did without them.
NEWER_SETTINGS: dict[str, dict[str, Any]] = {
    "torch.nn.modules.activation.GELU": {"approximate": "none"},
    "torch.nn.modules.activation.MultiheadAttention": {"batch_first": False},
    "torch.nn.modules.sparse.EmbeddingBag": {"include_last_offset": False, "padding_idx": None},
    "torch.nn.modules.transformer.Transformer": {"batch_first": False},
    "torch.nn.modules.transformer.TransformerDecoderLayer": {"norm_first": False},
    "torch.nn.modules.transformer.TransformerEncoder": {"enable_nested_tensor": False, "mask_check": False},
    "torch.nn.modules.transformer.TransformerEncoderLayer": {"norm_first": False},
    "ultralytics.nn.modules.head.v10Detect": {"_end2end": True},  # what `end2end` of the class was
}
# Plain data: objects whose attributes the models read.
DATA_CLASSES = full_names(
    """
    torchvision.models.detection._utils: BalancedPositiveNegativeSampler BoxCoder BoxLinearCoder Matcher SSDMatcher
    torchvision.ops.poolers: LevelMapper
    timm.models: _features.FeatureInfo _pretrained.PretrainedCfg _pretrained.DefaultCfg
    transformers.integrations.heterogeneity.configuration_utils: _HeterogeneitySpec
    transformers.models.omdet_turbo.modeling_omdet_turbo: OmDetTurboLRUCache
    ultralytics.utils: IterableSimpleNamespace
    types: SimpleNamespace
    argparse: Namespace
    """
)
# Bases of transformers' configurations: data, although not all are dataclasses.
CONFIG_CLASSES = full_names(
    "transformers: configuration_utils.PreTrainedConfig generation.configuration_utils.GenerationConfig"
)
# Attention and expert back ends that a configuration may ask for. Other names reach transformers' loader of kernels;
# those that need a GPU compute the same as "eager".
BACK_ENDS = {None: None, "eager": "eager", "sdpa": "sdpa", "batched_mm": "batched_mm", "grouped_mm": "grouped_mm",
             "flash_attention_2": "eager", "flash_attention_3": "eager", "flex_attention": "eager"}  # fmt: skip
# Dictionaries with another name.
DICT_CLASSES = full_names(
    """
    collections: OrderedDict
    lightning.fabric.utilities.data: AttributeDict
    lightning_fabric.utilities.data: AttributeDict
    pytorch_lightning.utilities.parsing: AttributeDict
    """
)
RECONSTRUCTOR = "copyreg._reconstructor"  # protocol 0 and 1's way of making an object
# Classes that a pickle names but never instantiates.
VALUE_CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter", "numpy.ndarray"})
# Pure functions that models keep as attributes; we store them and never call them while loading.
FUNCTIONS = full_names(
    """
    torch.nn.functional: relu relu6 gelu silu mish elu selu celu leaky_relu hardswish hardsigmoid hardtanh sigmoid tanh
    torch.nn.functional: softplus softsign logsigmoid softmax log_softmax glu normalize pad layer_norm interpolate
    torch.nn.functional: max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d dropout linear
    torch.nn.functional: scaled_dot_product_attention
    torch._C._nn: gelu silu mish elu leaky_relu hardswish hardsigmoid hardtanh relu6 softplus linear log_sigmoid
    torch._C._nn: avg_pool2d scaled_dot_product_attention
    torch._C._fft: fft_fftn fft_fft fft_rfft
    torch: relu tanh sigmoid sin cos selu exp abs square softmax erf
    timm.layers.activations: gelu swish mish sigmoid tanh hard_sigmoid hard_swish quick_gelu gelu_tanh
    torchvision.ops.boxes: box_iou generalized_box_iou
    torchvision.models.optical_flow.raft: _pass_through_h
    transformers.modeling_rope_utils: _compute_linear_scaling_rope_parameters _compute_dynamic_ntk_parameters
    transformers.modeling_rope_utils: _compute_yarn_parameters _compute_longrope_parameters _compute_llama3_parameters
    transformers.modeling_rope_utils: _compute_proportional_rope_parameters
    transformers.models.d_fine.modeling_d_fine: multi_scale_deformable_attention_v2
    transformers.models.deimv2.modeling_deimv2: multi_scale_deformable_attention_v2
    transformers.models.rt_detr_v2.modeling_rt_detr_v2: multi_scale_deformable_attention_v2
    transformers.models.xlstm.modeling_xlstm: mlstm_chunkwise_native_autograd mlstm_recurrent_step_native
    transformers.models.xlstm.modeling_xlstm: mlstm_recurrent_sequence_native wrap_chunkwise_pad_zeros
    transformers.models.xlstm.modeling_xlstm: wrap_chunkwise_arbitrary_sequence_length
    transformers.models.ibert.quant_modules: SymmetricQuantFunction
    """  # the last one is an autograd function: its apply
)
# Methods of their own class that models keep as attributes, bound to a module or static.
KEPT_METHODS = re.compile(r"_?forward\w*|_gelu_python")
KEPT_STATIC_METHODS = re.compile(r"compute_\w+|num_patches")
# Layers that models keep as classes, to build more of them. Nothing in these packages evaluates text, imports by name
# or opens files (searched in torch 2.14.1, torchvision 0.29.1 and timm 1.0.31).
VALUE_MODULES = ("torch.nn.modules", "torchvision.ops", "timm.layers", "timm.models.nextvit")
# Library implementations of __setstate__ that were read: they only fill in attributes of older versions.
AUDITED_SETSTATE = full_names(
    """
    torch.nn.modules: module.Module activation.LogSoftmax activation.MultiheadAttention activation.Softmax
    torch.nn.modules: activation.Softmin conv._ConvNd pooling.AvgPool3d rnn.RNNBase upsampling.Upsample
    torch.nn.modules: transformer.TransformerDecoderLayer transformer.TransformerEncoderLayer
    timm.layers.ml_decoder: TransformerDecoderLayerOptimal
    ultralytics.nn.modules.block: AAttn
    """
)
# Hooks whose code is torch's own and that the forward pass needs.
HOOK_CLASSES = full_names(
    """
    torch.nn.utils: weight_norm.WeightNorm spectral_norm.SpectralNorm
    torch.nn.utils.prune: Identity RandomUnstructured L1Unstructured RandomStructured LnStructured CustomFromMask
    """
)
# Objects that only load_state_dict() or training would use, and wrappers around the module that is wanted.
IGNORED_MODULES = ("omegaconf", "typing", "torch.torch_version", "torch.optim", "torch.amp.grad_scaler",
                   "torch._dynamo", "torch.cuda.amp.grad_scaler", "torch.nn.backends", "ultralytics.utils.loss",
                   "ultralytics.utils.tal")  # fmt: skip
IGNORED_CLASSES = full_names(
    """
    contextlib: nullcontext
    torch: _TorchCompileInductorWrapper distributed.algorithms.join._JoinConfig
    torch.nn: modules.module._WrappedHook parallel.distributed._BucketCapacityConfig
    torch.nn.utils.spectral_norm: SpectralNormStateDictHook SpectralNormLoadStateDictPreHook
    """
)
WRAPPER_CLASSES = full_names(
    """
    torch: nn.parallel.data_parallel.DataParallel nn.parallel.distributed.DistributedDataParallel
    torch: optim.swa_utils.AveragedModel
    timm.utils.model_ema: ModelEmaV2 ModelEmaV3
    """
)
# What torch.nn.Module's constructor has made since PyTorch 0.1, and its __setstate__ does not add.
MODULE_STATE = frozenset({"_parameters", "_buffers", "_modules", "_backward_hooks", "_forward_hooks"})
LOADING_HOOKS = frozenset(
    {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
)
CALLED_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"})
# Instance attributes that would be called, or that would change which other attributes are read.
NEVER_ATTRIBUTES = frozenset(
    {"_call_impl", "_wrapped_call_impl", "_slow_forward", "_compiled_call_impl", "eval", "train", "apply",
     "attribute_map"}
)  # fmt: skip
MAX_LAYERS = 64  # of an RNN beyond its parameters: its __setstate__ makes names for each of them
MAX_OPCODES = 5_000_000  # some 3 s; complete pickles of known models have below a million
MAX_OVERLAP = 1 << 20  # elements that a tensor may have beyond its storage's: expanded masks and position numbers
MAX_OVERLAPS = 1 << 24  # the same of all tensors of a file
MAX_CHOSEN_KEYS = 10_000  # in dictionaries and sets: old optimizers have the addresses of their parameters as keys
MAX_MODULE_PATHS = 200_000  # eval() visits every path, so a DAG of shared modules would never end
MIN_MODULE_PATHS = 20_000  # so many are never too many
MAX_SHARING = 100  # paths to each module, beyond that: some models use one layer a few dozen times
MIN_STORAGE_BYTES = 16  # of a legacy file for each storage: its key in the pickle and in the list, and its count
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
ZIP_METHOD_OFFSET = 8  # of the compression method in a local file header (PKWARE APPNOTE 4.3.7)
STORAGE_ALIGNMENT = 8  # bytes; what the largest dtype needs (torch.save aligns to 64)
# --allow-class: classes that the user named, filled in once when the arguments have been read.
USER_CLASSES: set[str] = set()


def holds_models(module: str) -> bool:
    """Whether `module` is one whose classes a pickle may hold."""
    if module.startswith("transformers.models.") and not TRANSFORMERS_FILE.fullmatch(module):
        return False
    return belongs(module, CLASS_MODULES) and not belongs(module, DENIED_MODULES)


def allowed_class(module: str, name: str) -> type | types.FunctionType | None:
    """The class `module.name` if a pickle may hold instances or members of it, else None.

    A function that the user named may be an attribute; it is never called while the file is opened.
    """
    full_name = f"{module}.{name}"
    named = full_name in USER_CLASSES
    listed = full_name in DATA_CLASSES | HOOK_CLASSES
    if not (named or listed or holds_models(module) or module in ENUM_MODULES):
        return None
    cls = vars(import_library(module, named=named)).get(name)
    if cls is None:
        raise DamagedFileError(missing_from(full_name))
    if named and isinstance(cls, types.FunctionType):
        return cls
    if not isinstance(cls, type) or is_special(cls):
        if named:
            raise RefusedFileError(
                f"--allow-class {full_name}: it is not a class of plain modules or data, nor a function"
            )
        return None
    if named or listed or issubclass(cls, enum.Enum):
        return cls
    if not holds_models(cls.__module__):  # re-exported from elsewhere
        return None
    own_reduce = cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
    if issubclass(cls, nn.Module):
        return None if own_reduce or not has_audited_setstate(cls) else cls
    is_record = hasattr(cls, "_fields") or hasattr(cls, "__dataclass_fields__") or is_config(cls)
    return cls if is_record and not hasattr(cls, "__setstate__") else None


def is_special(cls: type) -> bool:
    """Whether instances of `cls` are programs, have their own storage, or run code when they are thrown away."""
    denied = any(belongs(base.__module__, DENIED_MODULES) for base in cls.__mro__)
    return denied or hasattr(cls, "__del__") or issubclass(cls, (torch.Tensor, type))


def has_audited_setstate(cls: type) -> bool:
    """Whether every `__setstate__` that a `cls` has or inherits is one of those that were read."""
    return all(qualified_name(base) in AUDITED_SETSTATE for base in cls.__mro__ if "__setstate__" in vars(base))


def is_config(cls: type) -> bool:
    """Whether `cls` is a configuration of transformers."""
    return any(qualified_name(base) in CONFIG_CLASSES for base in cls.__mro__)


class NumpyDtype:
    """A numpy dtype under construction."""

    CODE = re.compile(r"[<>|=]?([fiu][1248]|b1|f2|c8|c16)")

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not self.CODE.fullmatch(code):
            raise RefusedFileError("the file holds a numpy array of Python objects")
        self.code, self.order = code.lstrip("<>|="), "<"

    def build(self, state: object) -> None:
        """Take the byte order from a dtype's pickle state; nothing else of it matters for plain numbers."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise DamagedFileError("a numpy dtype has a damaged state")
        self.order = state[1]

    def value(self) -> np.dtype[Any]:
        """The dtype."""
        return np.dtype((self.order if self.order in "<>" else "") + self.code)


class NumpyArray:
    """A numpy array under construction: its state is checked before numpy sees it."""

    def __init__(self, *_: object) -> None:
        self.array: Any = None

    def build(self, state: object) -> None:
        """Read (version, shape, dtype, is_fortran, raw bytes)."""
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], NumpyDtype):
            raise DamagedFileError("a numpy array has a damaged state")
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not isinstance(raw, bytes) or not sizes or math.prod(shape) * dtype.value().itemsize != len(raw):
            raise DamagedFileError("a numpy array is larger than its data")
        self.array = np.frombuffer(raw, dtype.value()).reshape(shape, order="F" if fortran else "C").copy()

    def value(self) -> Any:
        """The array."""
        return self.array


def rebuild_numpy_scalar(dtype: NumpyDtype, raw: bytes | str) -> Any:
    """numpy.core.multiarray.scalar."""
    array = NumpyArray()
    array.build((1, (), dtype, False, raw))
    return array.value()[()]


def check_tensor(storage: object, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> None:
    """Raise DamagedFileError unless the elements from `offset` on, with `size` and `stride`, lie in `storage`."""
    if not (isinstance(storage, tuple) and len(storage) == 2 and isinstance(storage[0], torch.UntypedStorage)):
        raise DamagedFileError("a tensor has no storage")
    if not isinstance(size, (tuple, list)) or not isinstance(stride, (tuple, list)):
        raise DamagedFileError("a tensor has no size or stride")
    untyped, dtype = storage
    numbers = (*size, *stride, offset)
    if len(size) != len(stride) or len(size) > 64 or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers):
        raise DamagedFileError("a tensor has a damaged size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    elements = untyped.nbytes() // dtype.itemsize
    if last >= elements or math.prod(size) > elements + MAX_OVERLAP:
        raise DamagedFileError(f"a tensor of size {tuple(size)} does not fit into its storage")


def rebuild_tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    """torch._utils._rebuild_tensor_v2 with the bounds checked: `offset`, `size` and `stride` are in elements."""
    check_tensor(storage, offset, size, stride)
    untyped, dtype = storage
    return torch.empty(0, dtype=dtype, device=untyped.device).set_(untyped, offset, tuple(size), tuple(stride))


def rebuild_meta_tensor(dtype: object, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    """torch._utils._rebuild_meta_tensor_no_storage: sizes without weights; see check_weights."""
    numbers = (*size, *stride)
    if not isinstance(dtype, torch.dtype) or len(size) != len(stride) or len(size) > 64:
        raise DamagedFileError("a tensor has a damaged size or type")
    if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers) or math.prod(size) >= 2**48:
        raise DamagedFileError("a tensor has a damaged size or stride")
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device="meta")


def rebuild_parameter(data: object, requires_grad: object, *_: object) -> nn.Parameter:
    """torch._utils._rebuild_parameter; gradients are of no use here."""
    if not isinstance(data, torch.Tensor) or not isinstance(requires_grad, bool):
        raise DamagedFileError("a parameter has no tensor")
    return torch.nn.Parameter(data, requires_grad=False)


def rebuild_from_type(function: Token, cls: Token, arguments: tuple[Any, ...], *_: object) -> Tensor:
    """torch._tensor._rebuild_from_type_v2, for plain tensors and parameters that carry Python attributes (dropped)."""
    rebuild = REBUILDERS.get(function.name)
    if cls.name not in VALUE_CLASSES or rebuild not in (rebuild_tensor, rebuild_meta_tensor, rebuild_parameter):
        raise RefusedFileError(f"the file holds a tensor of the class {cls.name}")
    return cast("Tensor", rebuild(*arguments))


def rebuild_storage(data: bytes, *, unpickler: Unpickler) -> object:
    """torch.storage._load_from_bytes: a small torch.save file inside a plain pickle, read by the same rules."""
    if not isinstance(data, bytes):
        raise DamagedFileError("an embedded storage has no bytes")
    storage = read_legacy(io.BytesIO(data), len(data), unpickler)
    if not (isinstance(storage, tuple) and len(storage) == 2):
        raise RefusedFileError("torch.storage._load_from_bytes does not hold a storage")
    return storage


def class_attribute(cls: type, name: str) -> object:
    """What `cls` or the nearest of its bases calls `name`, without any code of theirs; None for nothing."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def rebuild_attribute(target: object, name: str) -> object:
    """builtins.getattr, for the uses that models have.

    They are: a member of an enum, a method or static method of a module or of its class, and apply of a listed autograd
    function.
    """
    from torch import autograd

    if type(name) is not str:
        raise DamagedFileError("the file asks for an attribute without a name")
    if isinstance(target, Ignored) or (isinstance(target, nn.Module) and name == "load_hook"):
        return Ignored()  # a method that only load_state_dict() would call
    cls = target.value if isinstance(target, Token) and isinstance(target.value, type) else object
    if issubclass(cls, enum.Enum):
        return enum_member(cls, cls.__members__, name)
    static = issubclass(cls, nn.Module) and isinstance(vars(cls).get(name), staticmethod)
    if static and KEPT_STATIC_METHODS.fullmatch(name):
        return getattr(cls, name)
    if issubclass(cls, autograd.Function) and name == "apply":
        return getattr(cls, name)
    owner = type(target) if isinstance(target, nn.Module) else cls
    if issubclass(owner, nn.Module) and KEPT_METHODS.fullmatch(name):
        function = class_attribute(owner, name)
        if isinstance(function, types.FunctionType):  # of a class it stays a function: ultralytics' Pose.detect
            return types.MethodType(function, target) if owner is not cls else function
    raise RefusedFileError(f"the file asks for the attribute {shorten(name, 80)!r} of an object")


def enum_member(cls: type[enum.Enum], members: Mapping[Any, Any], key: Any) -> Any:
    """A member of an enumeration by its name or value; raises DamagedFileError where this version has none."""
    if hashable(key) not in members:
        what = f"it holds the {qualified_name(cls)} {shown(key)}, which the installed version has not"
        raise DamagedFileError(f"{what}; save it again with that version")
    return members[key]


def rebuild_partial(function: Token) -> functools.partial[Any]:
    """functools.partial over a listed function or a layer; BUILD adds the arguments.

    Not over a function that the user named: with arguments of the file's choosing it may do what he does not expect.
    """
    value = finished(function)
    own = function.name in USER_CLASSES and not isinstance(value, type)
    if not callable(value) or function.name in BUILTIN_TYPES or own:
        raise RefusedFileError(f"the file asks for functools.partial of {function.name}")
    return functools.partial(value)


def rebuild_defaultdict(factory: Token | None = None) -> dict[Any, Any]:
    """collections.defaultdict over a built-in container."""
    factories = {f"builtins.{kind.__name__}": kind for kind in (list, dict, set, int, float)}
    return collections.defaultdict(factories[factory.name] if factory else None)


def rebuild_bytes(text: str, encoding: str) -> bytes:
    """_codecs.encode, as protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise RefusedFileError("the file asks for a codec that pickles of bytes do not use")
    return text.encode("latin1")


def rebuild_size(sizes: Iterable[int] = ()) -> torch.Size:
    """torch.Size."""
    return torch.Size([int(size) for size in only_list(sizes)])


def rebuild_device(*_: object) -> torch.device:
    """torch.device: always the CPU, whichever GPU the file was saved on."""
    return torch.device("cpu")


def rebuild_generator(*_: object) -> torch.Generator:
    """torch.Generator: a fresh one, whose state is not taken from the file."""
    return torch.Generator()


def ordered_dict(items: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """collections.OrderedDict."""
    return collections.OrderedDict((hashable(key), finished(value)) for key, value in only_list(items))


def only_list(items: object) -> Iterable[Any]:
    """`items` if they are a list or tuple: iterating over anything else would run its class's code, maybe for ever."""
    if not isinstance(items, (list, tuple)):
        raise DamagedFileError(f"the pickle makes a container from a {type(items).__name__}")
    return items


def joined_path(*parts: object) -> str:
    """A path of pathlib, as text."""
    if not all(type(part) is str for part in parts):
        raise DamagedFileError("a path in the file is not text")
    return "/".join(map(str, parts))


# Everything that a pickle may call, each re-implemented above or harmless by itself.
REBUILDERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(DICT_CLASSES, ordered_dict),
    "collections.defaultdict": rebuild_defaultdict,
    "builtins.set": lambda items=(): {hashable(item) for item in only_list(items)},
    "builtins.frozenset": lambda items=(): frozenset(hashable(item) for item in only_list(items)),
    "builtins.getattr": rebuild_attribute,
    "builtins.complex": lambda real, imaginary: complex(float(real), float(imaginary)),
    "builtins.slice": lambda *parts: slice(*(None if part is None else int(part) for part in parts)),
    "builtins.range": lambda *parts: range(*(int(part) for part in parts)),
    "_codecs.encode": rebuild_bytes,
    "functools.partial": rebuild_partial,
    "torch.Size": rebuild_size,
    "torch.device": rebuild_device,
    "torch._C.Generator": rebuild_generator,
    "torch._dynamo.eval_frame.OptimizedModule": lambda module, *_: finished(module),  # torch.compile's wrapper
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_meta_tensor_no_storage": rebuild_meta_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    "torch.storage._load_from_bytes": rebuild_storage,
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
    "numpy.dtype": NumpyDtype,
    "numpy.core.multiarray.scalar": rebuild_numpy_scalar,
    "numpy._core.multiarray.scalar": rebuild_numpy_scalar,
    "numpy.core.multiarray._reconstruct": NumpyArray,
    "numpy._core.multiarray._reconstruct": NumpyArray,
    "pathlib.PosixPath": joined_path,
    "pathlib.WindowsPath": joined_path,
}
BUILTIN_TYPES = {f"builtins.{kind.__name__}": kind for kind in (list, dict, tuple, int, float, bool, str, object)}


def hashable(key: Any, depth: int = 0) -> Any:
    """`key` if it is plain data: hashing anything else would run its class's code."""
    if type(key) in (str, float, bool, bytes, type(None), int):
        return key
    if isinstance(key, (torch.dtype, enum.Enum)):
        return key
    if type(key) in (torch.Tensor, torch.nn.Parameter):  # hashed by identity; an optimizer's state has them
        return key
    small = type(key) in (tuple, frozenset) and depth < 3 and len(key) <= 16
    if small and all(hashable(item, depth + 1) is item for item in key):
        return key
    raise RefusedFileError(f"the file uses a {type(key).__name__} as a dictionary key")


def is_chosen_hash(key: Any) -> bool:
    """Whether a file could choose `key` for its hash, as it can all but text and bytes, whose hashes are secret.

    Integers of 20 bits collide too seldom to matter: a mapping has more places than that, or few of them.
    """
    if type(key) is int:
        return not -(2**20) < key < 2**20
    return type(key) in (float, tuple, frozenset)


def finished(value: Any) -> Any:
    """What a container may hold: finished values and listed classes or functions, never a bare Token."""
    if isinstance(value, Token):
        if value.name in BUILTIN_TYPES:
            return BUILTIN_TYPES[value.name]
        if is_ignored(value.name) or value.value is Saved:
            return Ignored()
        kind = value.value if isinstance(value.value, type) else None
        is_layer = kind and belongs(kind.__module__, VALUE_MODULES)
        named = value.name in USER_CLASSES and (kind is None or issubclass(kind, nn.Module))
        if not (value.name in FUNCTIONS or is_layer or named):
            raise RefusedFileError(f"the file uses {value.name} as a value")
        return value.value
    if isinstance(value, (NumpyDtype, NumpyArray)):
        return value.value()
    if isinstance(value, Wrapper):
        return finished(value.module())
    if type(value) is tuple and any(isinstance(item, (Token, NumpyDtype, NumpyArray, Wrapper)) for item in value):
        return tuple(finished(item) for item in value)
    return value


def is_ignored(name: str) -> bool:
    """Whether a global name is one of what the forward pass does not need."""
    return name in IGNORED_CLASSES or belongs(name, IGNORED_MODULES)


class Wrapper:
    """Stands for DataParallel and the like: only the module inside is wanted."""

    state: Mapping[str, Any] = {}

    def module(self) -> Any:
        """The wrapped module."""
        return self.state["_modules"]["module"]


class BoundedFile:
    """The part of `file` that a pickle may read: a declared length is checked before memory is taken for it."""

    def __init__(self, file: io.BufferedIOBase, size: int) -> None:
        self.file, self.left = file, size

    def read(self, size: int) -> bytes:
        """`size` bytes; raises DamagedFileError where the file has fewer."""
        if size > self.left:
            raise DamagedFileError("its pickle is damaged: it ends too early or declares more than the file holds")
        self.left -= size
        return self.file.read(size)

    def readline(self) -> bytes:
        """A line."""
        line = self.file.readline(self.left)
        self.left -= len(line)
        return line


def element_count(value: object) -> int:
    """About how many elements or bytes a rebuilder handles that is given `value`."""
    if type(value) in (str, bytes, list, tuple, dict, set, frozenset, range):
        return 1 + len(value)  # type: ignore[arg-type]
    return 1


def is_installed(package: str) -> bool:
    """Whether a top-level package can be found; nothing is imported."""
    with contextlib.suppress(ValueError):  # __main__
        return package in sys.modules or importlib.util.find_spec(package) is not None
    return True


# What files that were made to do harm call; models have nothing of them.
HARMFUL_MODULES = frozenset(
    {"__builtin__", "_pickle", "builtins", "cloudpickle", "code", "commands", "ctypes", "dill", "importlib", "io",
     "jsonpickle", "marshal", "multiprocessing", "nt", "os", "pdb", "pickle", "pip", "posix", "profile", "pty", "runpy",
     "shutil", "socket", "subprocess", "sys", "timeit", "types", "urllib", "webbrowser"}
)  # fmt: skip

# What PyTorch's own quantised models are made of.
QUANTISED = ("torch._utils._rebuild_qtensor", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.quantized",
             "torch.nn.intrinsic.quantized", "torch.nn.quantized", "torch.nn.quantized.dynamic")  # fmt: skip
# Packages that are there whoever made the file: none of their functions is what a model needs to be allowed.
COMMON_PACKAGES = word_set(
    """PIL accelerate cv2 datasets huggingface_hub joblib matplotlib numpy onnx onnxruntime optimum pandas pip
    pkg_resources requests safetensors scipy setuptools sklearn sympy tensorflow torchvision transformers yaml"""
)


def may_be_advised(name: str) -> bool:
    """Whether a message may tell the user to allow a name from a file: it is well-formed, and its code is his own.

    Names in capitals are classes, of which only plain modules and data can be allowed.
    """
    package, _, rest = name.partition(".")
    common = package in COMMON_PACKAGES and not name.rpartition(".")[2][:1].isupper()
    return bool(rest) and all(part.isidentifier() for part in name.split(".")) and not common


def explain_refusal(names: Sequence[str]) -> ConversionError:
    """The error for a pickle that refers to `names`: what that usually means, and the way out."""
    packages = [name.partition(".")[0] for name in names]
    real = {package for package in packages if package.isidentifier() and len(package) < 80 and package[:2] != "__"}
    missing = sorted(package for package in real - sys.stdlib_module_names if not is_installed(package))
    found = [
        name
        for name, package in zip(names, packages, strict=True)
        if package not in {*missing, *sys.stdlib_module_names, "torch"} and may_be_advised(name)
    ]
    listed = and_more(names, 8)
    trust = "or pass --trust-pickle if you trust its maker"
    if any(belongs(name, ("models.yolo", "models.common", "models.experimental")) for name in names):
        what = f"it is a model of a YOLOv5 or YOLOv7 repository ({listed}), whose classes are in no package"
        way = "export it there to TorchScript (python export.py --include torchscript) or save its state dict"
        return (DamagedFileError if missing else RefusedFileError)(f"{what}; {way}, {trust}")
    if any(belongs(name, ("__main__",)) for name in names):
        what = f"it refers to {listed}: classes that were defined in the script that saved it, so opening it needs that"
        way = "save a state dict there (torch.save(model.state_dict(), PATH)) and pass it with --model-class"
        return RefusedFileError(f"{what}; {way}, {trust}")
    harmful = not HARMFUL_MODULES.isdisjoint(packages)
    if any(belongs(name, QUANTISED) for name in names) and not harmful:
        what = f"it is quantised ({listed}), and such layers are not converted"
        way = "convert the model that it was made from, and quantise the ONNX file"
        return RefusedFileError(f"{what}; {way} (onnxruntime.quantization.quantize_dynamic or quantize_static)")
    if missing and not harmful and all(package in missing for package in packages):
        what = f"it refers to {listed}, but the Python package {', '.join(missing)} is not installed here"
        way = "install it, or put the folder of its maker's code on PYTHONPATH, and pass --allow-class with these names"
        return DamagedFileError(f"{what}; {way}, or save a state dict")
    what = f"it refers to {listed}, outside the known model libraries, so opening it could run code that comes with it"
    if found:
        way = f"if these are of a package that you installed for it, pass --allow-class {' '.join(found)}"
        return RefusedFileError(f"{what}; {way}; else save a state dict, {trust}")
    if harmful:
        what += "; models do not need them, so it may well be made to do harm"
    return RefusedFileError(f"{what}; get the weights as safetensors or a state dict, {trust}")


class Budget:
    """What reading a file's pickles may take, those inside others included: none resets what was used before."""

    def __init__(self, size: int) -> None:
        self.opcodes = iter(range(MAX_OPCODES))
        self.allowance = 4 * size + (1 << 20)  # elements and bytes: a program can name one large object many times
        self.chosen_keys = 0  # of all mappings and sets, those whose hashes the file could choose
        self.overlaps = 0  # elements that all tensors have beyond their storages'

    def spend(self, *values: object) -> None:
        """Take what is done with `values` off the allowance; raises DamagedFileError when that is used up."""
        self.allowance -= sum(map(element_count, values))
        if self.allowance < 0:
            raise DamagedFileError("its pickle builds far more than the file holds")

    def count_keys(self, keys: Iterable[Any]) -> None:
        """Count what a mapping or set will hash; raises DamagedFileError where the keys may be made to collide.

        Python looks through all keys of one hash, so that a mapping of n such keys takes n * n steps.
        """
        self.chosen_keys += sum(map(is_chosen_hash, keys))
        if self.chosen_keys > MAX_CHOSEN_KEYS:
            raise DamagedFileError("its pickle has more unusual dictionary keys than any known model")

    def overlap(self, elements: int) -> None:
        """Count elements that a tensor has beyond its storage's; raises DamagedFileError where all have too many."""
        self.overlaps += max(0, elements)
        if self.overlaps > MAX_OVERLAPS:
            raise DamagedFileError("its tensors have far more elements than the file holds")


class InertUnpickler(pickle._Unpickler):  # noqa: SLF001  (the C version cannot be overridden)
    """Python's own unpickler with every opcode that can call, import or assign replaced by ours.

    `read_storage(persistent_id)` returns (UntypedStorage, dtype). Names that are not allowed are collected in
    `refused`, so that one run tells all of them; from the first one on nothing is built any more. `size` is how many
    bytes of `file` the pickle may take. A pickle inside another one has the `budget` of the outer one.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001
    pop_mark: Callable[[], list[Any]]  # of the class above, in Python's code but not in its annotations

    def __init__(
        self,
        file: io.BufferedIOBase,
        size: int,
        read_storage: Callable[[tuple[Any, ...]], Any],
        budget: Budget | None = None,
    ) -> None:
        self.bounded, self.size = BoundedFile(file, size), size
        super().__init__(self.bounded, fix_imports=True, encoding="latin1")
        self.persistent_load = read_storage  # type: ignore[assignment, method-assign]  # no method: it takes no self
        self.refused: dict[str, None] = {}
        self.budget = budget or Budget(size)
        self.settled: dict[int, object] = {}  # dictionaries that settle_back_ends has seen, by their ids
        self.left_out: dict[str, None] = {}  # attributes that a class does not set itself

    def run(self) -> Any:
        """pickle._Unpickler.load with a limit on the number of opcodes.

        The garbage collector rests meanwhile: nothing is thrown away, and looking for it triples the time.
        """
        self._unframer = pickle._Unframer(self._file_read, self._file_readline)  # type: ignore[attr-defined]  # noqa: SLF001
        self.read, self.readline = self._unframer.read, self._unframer.readline
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        read, dispatch = self.read, self.dispatch
        gc.disable()
        try:
            for _ in self.budget.opcodes:
                dispatch[read(1)[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]  # noqa: SLF001
            return stop.value
        finally:
            gc.enable()
        raise DamagedFileError("its pickle is longer than that of any known model")

    def load(self) -> Any:
        """Run the pickle; raises RefusedFileError naming every global that is not allowed, or DamagedFileError."""
        try:
            result = finished(self.run())
        except ConversionError:
            if not self.refused:
                raise
        except Exception as error:  # a damaged program can make the machine fail anywhere
            raise_out_of_memory(error)
            if not self.refused:
                reason = f" ({first_line(error)})" if type(error) is RuntimeError else ""  # of torch's reader
                place = f"before byte {self.size - self.bounded.left}{reason}"
                raise DamagedFileError(f"its pickle is damaged {place}; copy or download it again") from None
        if self.refused:
            raise explain_refusal(list(self.refused))
        if self.left_out:
            LOG.info(f"left out, since the classes of this version do not set them: {and_more(self.left_out, 6)}")
        return result

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a global name to a Token (or to a dtype, which is data)."""
        if self.proto < 3:  # what Python 2 called it
            module, name = pickle._compat_pickle.NAME_MAPPING.get((module, name), (module, name))  # type: ignore[attr-defined]  # noqa: SLF001
            module = pickle._compat_pickle.IMPORT_MAPPING.get(module, module)  # type: ignore[attr-defined]  # noqa: SLF001
        for old, new in RENAMED_MODULES.items():
            if belongs(module, (old,)):
                module = new + module.removeprefix(old)
        module, name = RENAMED_CLASSES.get(f"{module}.{name}", (module, name))
        full_name = f"{module}.{name}"
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        known = REBUILDERS.keys() | BUILTIN_TYPES.keys() | VALUE_CLASSES | WRAPPER_CLASSES | {RECONSTRUCTOR}
        if full_name in known or is_ignored(full_name) or self.is_storage(module, name):
            return Token(full_name)
        value = self.allowed(module, name) if name.isidentifier() and not name.startswith("__") else None
        if value is None:
            self.refused[full_name] = None
        return Token(full_name, value)

    def allowed(self, module: str, name: str) -> Any:
        """The class or function of that name if it may be a value or the class of one, else None."""
        full_name = f"{module}.{name}"
        named = full_name in USER_CLASSES
        try:
            return (
                getattr(import_library(module, named=named), name)
                if full_name in FUNCTIONS
                else allowed_class(module, name)
            )
        except OutsideError:
            if named:
                raise
            return None  # the user may allow it by name

    @staticmethod
    def is_storage(module: str, name: str) -> bool:
        """Whether the name is one of torch's storage types, which only say a dtype."""
        return module in ("torch", "torch.storage") and name.endswith("Storage") and name.isidentifier()

    def get_extension(self, code: int) -> NoReturn:
        """Copyreg's extension registry: PyTorch never writes it."""
        raise RefusedFileError(f"the pickle uses extension code {code}")

    def run_reduce(self) -> None:
        """REDUCE: call a re-implemented function, or pick an enum's member."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, Token) or type(arguments) is not tuple:
            raise RefusedFileError(f"the pickle calls a {type(function).__name__}")
        if self.refused:
            return
        self.budget.spend(*arguments)
        cls = function.value
        if function.name in REBUILDERS:
            self.stack[-1] = self.rebuild(function.name, arguments)
        elif isinstance(cls, type) and issubclass(cls, enum.Enum) and len(arguments) == 1:
            self.stack[-1] = enum_member(cls, cls._value2member_map_, arguments[0])
        elif is_ignored(function.name):
            self.stack[-1] = Ignored()
        elif function.name == RECONSTRUCTOR:
            self.stack[-1] = self.new_object(arguments[0], ())
        elif isinstance(cls, type) and not arguments and qualified_name(cls) in DATA_CLASSES:
            self.stack[-1] = self.new_object(function, ())
        else:
            raise RefusedFileError(f"the pickle calls {function.name}")

    def rebuild(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Call a re-implemented function; what it makes is bounded for the file as a whole."""
        if arguments and name in ("builtins.set", "builtins.frozenset"):
            self.budget.count_keys(only_list(arguments[0]))
        elif arguments and name in DICT_CLASSES:
            self.budget.count_keys(key for key, _ in only_list(arguments[0]))
        if name == "torch.storage._load_from_bytes":
            return rebuild_storage(*arguments, unpickler=functools.partial(type(self), budget=self.budget))
        made = REBUILDERS[name](*arguments)
        if type(made) is torch.Tensor and not made.is_meta:
            self.budget.overlap(made.numel() - made.untyped_storage().nbytes() // made.itemsize)
        return made

    def run_newobj(self) -> None:
        """NEWOBJ: make an empty object."""
        arguments = self.stack.pop()
        self.stack[-1] = self.new_object(self.stack[-1], arguments)

    def run_newobj_ex(self) -> None:
        """NEWOBJ_EX: the same with keyword arguments, of which no model has any."""
        keywords = self.stack.pop()
        if keywords:
            raise RefusedFileError("the pickle makes an object with keyword arguments")
        self.run_newobj()

    def new_object(self, token: object, arguments: object) -> Any:
        """An instance of an allowed class by `object.__new__`; never its own `__new__` or `__init__`."""
        if not isinstance(token, Token) or type(arguments) is not tuple:
            raise RefusedFileError("the pickle makes an object of something that is not a class")
        if token.name in WRAPPER_CLASSES:
            return Wrapper()
        if is_ignored(token.name):
            return Ignored()
        if token.name in DICT_CLASSES or token.name == "torch.Size":
            return self.rebuild(token.name, arguments)
        cls = token.value
        if self.refused:
            return token
        if isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields"):
            return tuple.__new__(cls, map(finished, arguments))
        if not isinstance(cls, type) or issubclass(cls, enum.Enum) or arguments:
            raise RefusedFileError(f"the pickle makes an object of {token.name}")
        try:
            return (types.SimpleNamespace if issubclass(cls, types.SimpleNamespace) else object).__new__(cls)
        except TypeError:  # a subclass of dict and the like
            raise RefusedFileError(f"a {token.name} is not a plain object") from None

    def run_build(self) -> None:
        """BUILD: give an object its state, after checking it."""
        state = self.stack.pop()
        target = self.stack[-1]
        if self.refused or isinstance(target, (Ignored, torch.Tensor, torch.Generator)):
            return
        self.budget.spend(state, *(state.values() if type(state) is dict else state if type(state) is tuple else ()))
        if isinstance(target, torch.nn.Module):
            set_module_state(target, self.attributes(target, state))
        elif isinstance(target, Wrapper):
            target.state = state
        elif isinstance(target, (NumpyDtype, NumpyArray)):
            target.build(state)
        elif isinstance(target, functools.partial):
            set_partial_state(target, state)
        elif hasattr(target, "items"):  # a state dict's _metadata
            return
        elif isinstance(target, Token):
            raise RefusedFileError(f"the pickle sets attributes of {target.name}")
        else:
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state, None)  # (__dict__, slots)
            set_data_state(target, [self.attributes(target, part) for part in parts if part is not None])

    def attributes(self, target: object, state: object) -> dict[str, Any]:
        """The attributes that `target` gets of `state`, by check_attributes; what is left out is noted."""
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise DamagedFileError(f"the state of a {qualified_name(type(target))} is damaged")
        kept = {key: finished(value) for key, value in state.items() if keeps_attribute(type(target), key, value)}
        self.left_out |= dict.fromkeys(
            f"{key} of {type(target).__name__}"
            for key in state
            if key not in kept and state[key] is not None and not LOADING_MARKS.fullmatch(key)
        )
        check_attributes(target, kept, self.settled)
        return kept

    def run_setitems(self) -> None:
        """SETITEMS."""
        self.put(self.pop_mark())

    def run_setitem(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self.put([key, value])

    def run_dict(self) -> None:
        """DICT."""
        items = self.pop_mark()
        self.append({})
        self.put(items)

    def put(self, items: list[Any]) -> None:
        """Store [key, value, key, value, ...] into the dictionary on the stack."""
        target = self.stack[-1]
        if self.refused or isinstance(target, Ignored):
            return
        if not isinstance(target, dict):
            what = target.name if isinstance(target, Token) else f"a {type(target).__name__}"
            raise RefusedFileError(f"the pickle sets items of {what}")
        self.budget.count_keys(items[::2])
        self.budget.spend(*(value for value in items[1::2] if type(value) is tuple))  # which plain() looks through
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = finished(value)

    def run_append(self) -> None:
        """APPEND."""
        self.extend([self.stack.pop()])

    def run_appends(self) -> None:
        """APPENDS."""
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        """Add items to the list on the stack."""
        target = self.stack[-1]
        if self.refused or isinstance(target, Ignored):
            return
        if type(target) is not list:
            raise RefusedFileError(f"the pickle appends to a {type(target).__name__}")
        self.budget.spend(*(item for item in items if type(item) is tuple))
        target.extend(finished(item) for item in items)

    def run_additems(self) -> None:
        """ADDITEMS."""
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise RefusedFileError("the pickle adds items to something that is not a set")
        self.budget.count_keys(items)
        self.stack[-1].update(hashable(item) for item in items)

    def run_frozenset(self) -> None:
        """FROZENSET."""
        items = self.pop_mark()
        self.budget.count_keys(items)
        self.append(frozenset(hashable(item) for item in items))

    def run_long(self) -> None:
        """LONG4: an integer of any length, of which Python cannot even write the digits; models' fit LONG1."""
        (length,) = struct.unpack("<i", self.read(4))
        if not 0 <= length < 256:
            raise DamagedFileError("its pickle has an integer that is longer than that of any known model")
        self.append(pickle.decode_long(self.read(length)))

    def refuse_opcode(self) -> NoReturn:
        """Opcodes that PyTorch never writes."""
        raise RefusedFileError("the pickle has an opcode that PyTorch never writes")


InertUnpickler.dispatch.update(
    {
        opcode[0]: handler
        for handler, *opcodes in (
            (InertUnpickler.run_reduce, pickle.REDUCE),
            (InertUnpickler.run_newobj, pickle.NEWOBJ),
            (InertUnpickler.run_newobj_ex, pickle.NEWOBJ_EX),
            (InertUnpickler.run_build, pickle.BUILD),
            (InertUnpickler.run_setitems, pickle.SETITEMS),
            (InertUnpickler.run_setitem, pickle.SETITEM),
            (InertUnpickler.run_dict, pickle.DICT),
            (InertUnpickler.run_append, pickle.APPEND),
            (InertUnpickler.run_appends, pickle.APPENDS),
            (InertUnpickler.run_additems, pickle.ADDITEMS),
            (InertUnpickler.run_frozenset, pickle.FROZENSET),
            (InertUnpickler.run_long, pickle.LONG4),
            (InertUnpickler.refuse_opcode, pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4,
             pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
        )
        for opcode in opcodes
    }
)  # fmt: skip


class WeightsUnpickler(InertUnpickler):
    """Reads a complete model of any class for its tensors alone: no class is imported and no other object made."""

    def allowed(self, module: str, name: str) -> Any:
        """`Saved` for every name but those that models have nothing of."""
        harmful = module.partition(".")[0] in HARMFUL_MODULES and f"{module}.{name}" not in DATA_CLASSES
        return None if harmful else Saved

    def run_reduce(self) -> None:
        """REDUCE: make tensors and containers; what else is called is no tensor."""
        function = self.stack[-2]
        if isinstance(function, Token) and (function.value is Saved or function.name in CALLS_ON_CLASSES):
            self.stack[-2:] = [Ignored()]
        else:
            super().run_reduce()

    def new_object(self, token: object, arguments: object) -> Any:
        """A `Saved` for an object of any class."""
        if not isinstance(token, Token) or token.value is not Saved:
            return super().new_object(token, arguments)
        made = Saved()
        made.name = token.name
        return made

    def run_build(self) -> None:
        """BUILD: keep what modules have; other objects' states may be anything."""
        if isinstance(self.stack[-2], Saved):
            state = self.stack.pop()
            self.stack[-1].state = state if isinstance(state, dict) else {}
        else:
            super().run_build()


CALLS_ON_CLASSES = ("builtins.getattr", "functools.partial")
WeightsUnpickler.dispatch = {
    **InertUnpickler.dispatch,
    pickle.REDUCE[0]: WeightsUnpickler.run_reduce, pickle.BUILD[0]: WeightsUnpickler.run_build,
}  # fmt: skip
Unpickler = Callable[[Any, int, Callable[[tuple[Any, ...]], Any]], InertUnpickler]  # (file, size, read_storage)
MODEL_MODULES = ("transformers.models", "transformers.backbone_utils")
# Marks of transformers' loading and of models on several devices, which no answer depends on.
LOADING_MARKS = re.compile(r"_is_hf_initialized|_output_capturing_hooks_installed|_original_object_hash|\w*_plan")


@functools.cache
def assigned_names(cls: type) -> frozenset[str]:
    """The attributes that methods of `cls` and its bases assign to self, and annotate."""
    return frozenset(itertools.chain.from_iterable(map(names_assigned_in, cls.__mro__)))


@functools.cache
def names_assigned_in(cls: type) -> frozenset[str]:
    """The attributes that the methods of this very class assign to self, read off their bytecode, and annotations.

    What the library's own bases assign, and private ones, count where a constructor does it: the others are switches
    that later calls set.
    """
    import dis

    is_model = not belongs(cls.__module__, ("transformers",)) or belongs(cls.__module__, MODEL_MODULES)
    names = set(vars(cls).get("__annotations__", ()) if is_model else ())
    for method, function in vars(cls).items():
        code: Any = getattr(getattr(function, "__wrapped__", function), "__code__", None)
        constructs = method in ("__init__", "__post_init__", "post_init")
        for before, after in itertools.pairwise(dis.get_instructions(code) if code else ()):
            loaded = (
                before.argval[-1:] if isinstance(before.argval, tuple) else (before.argval,)
            )  # from 3.13 on, a pair
            if after.opname == "STORE_ATTR" and code.co_varnames[:1] == loaded:
                names.update({after.argval} if constructs or (is_model and after.argval[0] != "_") else ())
    return frozenset(names)


def keeps_attribute(cls: type, name: str, value: object) -> bool:
    """Whether an instance of `cls` gets the attribute `name` of a pickle; raises RefusedFileError where it may not.

    Asked of transformers' models and configurations, whose library reads switches off them that fetch kernels, compile
    and the like: what their own code does not set or read is left out. Others have no such machinery.
    """
    bases = {qualified_name(base) for base in cls.__mro__}
    if "transformers.modeling_utils.PreTrainedModel" in bases:
        return name in assigned_names(cls) and not (value and ACTING_ATTRIBUTES.fullmatch(name))
    refused_later = name.startswith("__") or name in NEVER_ATTRIBUTES or IMPLEMENTATION_KEY.fullmatch(name)
    if bases.isdisjoint(CONFIG_CLASSES) or refused_later or callable(value):
        return True  # check_attributes says what is wrong with it
    verdict = config_attribute(cls, name, value)
    if verdict is Verdict.REFUSE:
        raise RefusedFileError(f"a {qualified_name(cls)} has {shorten(name, 60)} {shown(value)}")
    return verdict is Verdict.KEEP


def check_attributes(target: object, state: dict[str, Any], settled: dict[int, object]) -> None:
    """Raise RefusedFileError unless `state` is data, and nothing that the class or its forward pass calls by name."""
    name = qualified_name(type(target))
    for key, value in state.items():
        if key.startswith("__") or (key in NEVER_ATTRIBUTES and value is not None):
            raise RefusedFileError(f"a {name} carries its own {key}")
        if callable(value) and replaces_method(target, key, value):
            raise RefusedFileError(f"a {name} carries its own {key}, in place of the class's method")
    settle_back_ends(name, state, settled)


def settle_back_ends(owner: str, attributes: dict[Any, Any], seen: dict[int, object]) -> None:
    """Let `attributes`, and the dictionaries below, name only back ends that can run here; raises RefusedFileError."""
    seen[id(attributes)] = attributes  # kept, so that no other object gets its id
    for key, value in attributes.items():
        if isinstance(key, str) and key.endswith(("_implementation", "_implementation_internal")):
            if not is_one_of(value, BACK_ENDS):
                raise RefusedFileError(f"a {owner} asks for the back end {shown(value)}")
            attributes[key] = BACK_ENDS[value]
        elif isinstance(value, dict) and id(value) not in seen:
            settle_back_ends(owner, value, seen)


def set_module_state(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Give `module` its `__dict__`, if that holds modules, tensors and data and nothing that the model would run."""
    cls = type(module)
    name = qualified_name(cls)
    if not attributes.keys() >= MODULE_STATE:
        raise DamagedFileError(f"a {name} lacks some of nn.Module's own attributes; save it again")
    for key in LOADING_HOOKS & attributes.keys():
        attributes[key] = ordered_dict()
    for key in CALLED_HOOKS & attributes.keys():
        attributes[key] = ordered_dict(
            list(attributes[key].items())
        )  # a copy: what the pickle adds to its own comes too late
        if any(qualified_name(type(hook)) not in HOOK_CLASSES for hook in attributes[key].values()):
            raise RefusedFileError(f"a {name} carries a hook that would run with the model")
    for key, kind in (("_parameters", torch.Tensor), ("_buffers", torch.Tensor), ("_modules", nn.Module)):
        entries = attributes[key]
        if not isinstance(entries, dict):
            raise DamagedFileError(f"{key} of a {name} holds something else")
        attributes[key] = {entry: value for entry, value in entries.items() if not isinstance(value, Ignored)}
        if not all(is_text(k) and (v is None or isinstance(v, kind)) for k, v in attributes[key].items()):
            raise DamagedFileError(f"{key} of a {name} holds something else")
    layers = attributes.get("num_layers", 1)
    if issubclass(cls, nn.RNNBase) and not (
        type(layers) is int and 0 <= layers <= MAX_LAYERS + len(attributes["_parameters"])
    ):
        raise DamagedFileError(f"a {name} has too many layers")
    if issubclass(cls, nn.RNNBase) and "_flat_weights" not in attributes:  # PyTorch 1.0 to 1.3
        attributes["_all_weights"] = [[None]]  # lets __setstate__ make the names anew
    for base in cls.__mro__:
        attributes = NEWER_SETTINGS.get(qualified_name(base), {}) | attributes
    # An audited library implementation (see allowed_class), or for a class that the user named the plain one.
    (cls if has_audited_setstate(cls) else nn.Module).__setstate__(module, attributes)


def replaces_method(target: object, key: str, value: object) -> bool:
    """Whether the attribute `key` hides a method of the class behind a callable that is not one of its own methods."""
    methods = (types.FunctionType, staticmethod, classmethod, property)
    if not isinstance(class_attribute(type(target), key), methods):
        return False
    return not (isinstance(value, types.MethodType) and value.__self__ is target)


def set_data_state(target: object, parts: Sequence[Mapping[str, Any]]) -> None:
    """Give a plain data object, or a hook of HOOK_CLASSES, its attributes; properties and __setattr__ do not run."""
    import inspect

    name = qualified_name(type(target))
    known = name in DATA_CLASSES | HOOK_CLASSES | USER_CLASSES or hasattr(target, "__dataclass_fields__")
    if not known and not is_config(type(target)):
        raise RefusedFileError(f"the pickle sets attributes of a {name}")
    for key, value in itertools.chain.from_iterable(part.items() for part in parts):
        slot = getattr(type(target), key, None)
        if inspect.ismemberdescriptor(slot):
            slot.__set__(target, value)
        else:
            vars(target)[key] = value


def set_partial_state(target: functools.partial[Any], state: object) -> None:
    """Give functools.partial its arguments; the function stays the one that was allowed."""
    if not isinstance(state, tuple) or len(state) != 4 or finished(state[0]) is not target.func:
        raise RefusedFileError("the pickle changes the function of a functools.partial")
    _, arguments, keywords, attributes = state
    if attributes or not isinstance(arguments, tuple) or not isinstance(keywords, dict):
        raise DamagedFileError("a functools.partial has a damaged state")
    cast("Any", target).__setstate__((target.func, tuple(map(finished, arguments)), keywords, None))


def check_module_graph(root: nn.Module) -> None:
    """Refuse module graphs on which eval() or forward() would never end: cycles, and DAGs with too many paths.

    Modules count that lie in a module's other attributes, and in lists and the like there, too; cycles of these are
    harmless, such as a reference to the parent.
    """
    paths: dict[int, int] = {}
    active: set[int] = set()
    entries = iter(range(MAX_OPCODES))

    def others(module: nn.Module) -> Iterator[nn.Module]:
        seen: dict[int, object] = {}
        waiting: list[Any] = [value for name, value in vars(module).items() if name != "_modules"]
        while waiting and next(entries, None) is not None:
            value = waiting.pop()
            if isinstance(value, nn.Module):
                yield from () if id(value) in active else (value,)
            elif isinstance(value, (list, tuple, dict, set)) and id(value) not in seen:
                seen[id(value)] = value
                waiting.extend(value.values() if isinstance(value, dict) else value)
        if waiting:
            raise DamagedFileError("its modules have more attributes than those of any known model")

    def count(module: nn.Module, depth: int) -> int:
        if "_modules" not in vars(module):
            raise DamagedFileError(f"a {qualified_name(type(module))} has no state")
        if id(module) in active or depth > MAX_MODULE_DEPTH:
            raise DamagedFileError("its modules contain each other, or are nested too deeply")
        if id(module) not in paths:
            active.add(id(module))
            # Not children(), which leaves out what is there twice: forward() does not.
            children = [child for child in vars(module)["_modules"].values() if child is not None]
            paths[id(module)] = 1 + sum(count(child, depth + 1) for child in (*children, *others(module)))
            active.discard(id(module))
        if paths[id(module)] > max(MIN_MODULE_PATHS, min(MAX_MODULE_PATHS, MAX_SHARING * len(paths))):
            raise DamagedFileError("its modules are shared so often that walking them would never end")
        return paths[id(module)]

    count(root, 0)


def read_archive(path: Path, unpickler: Unpickler = InertUnpickler) -> Any:
    """The object in a zip checkpoint, read inertly; its tensors lie in the mapped file until somebody reads them."""
    reader, _ = open_archive(path)
    mapped = map_file(path)
    storages: dict[str, torch.UntypedStorage] = {}

    def read_storage(record_id: tuple[Any, ...]) -> tuple[torch.UntypedStorage, torch.dtype]:
        key, dtype, nbytes = parse_storage_id(record_id)
        name = f"data/{key}"
        if name not in storages:
            if not re.fullmatch(r"\d{1,20}", key) or not reader.has_record(name):
                raise DamagedFileError(f"tensor data {name} is missing; the file is truncated or damaged")
            if reader.get_record_size(name) != nbytes:
                raise DamagedFileError(f"tensor data {name} has {reader.get_record_size(name)} bytes, not {nbytes}")
            start = reader.get_record_offset(name)
            method = mapped[reader.get_record_header_offset(name) + ZIP_METHOD_OFFSET]
            if method == zipfile.ZIP_STORED and start % STORAGE_ALIGNMENT == 0 and start + nbytes <= mapped.nbytes():
                storages[name] = mapped[start : start + nbytes]
            else:
                storages[name] = reader.get_storage_from_record(name, nbytes, torch.UntypedStorage).untyped_storage()
        if storages[name].nbytes() < nbytes:
            raise DamagedFileError(f"tensor data {name} is used with two sizes")
        return storages[name], dtype

    program = read_record(reader, "data.pkl")
    try:
        return unpickler(io.BytesIO(program), len(program), read_storage).load()
    except RuntimeError as error:
        raise DamagedFileError(f"the archive is damaged ({first_line(error)})") from None


def read_legacy(file: io.BufferedIOBase, size: int, unpickler: Unpickler = InertUnpickler) -> Any:
    """The object in a pre-1.6 checkpoint or a plain pickle of `size` bytes.

    The layout is torch.serialization._legacy_save's: magic number, protocol, system, object, storage keys, and then
    for each key the number of elements as int64 and the raw elements.
    """
    storages: dict[str, tuple[torch.UntypedStorage, torch.dtype]] = {}
    left = size  # bytes of the file that no storage has claimed

    def read_storage(record_id: tuple[Any, ...]) -> Any:
        nonlocal left
        if record_id[:1] == ("module",) and len(record_id) > 1:  # (.., class, source file, source text): only the class
            return record_id[1]
        key, dtype, nbytes = parse_storage_id(record_id)
        if len(record_id) > 5 and record_id[5] is not None:
            raise DamagedFileError("it holds storage views of PyTorch 0.x; open it there and save it again")
        if key not in storages:
            left -= nbytes + MIN_STORAGE_BYTES
            if left < 0:
                raise DamagedFileError("its tensors are declared larger than the file")
            storages[key] = (torch.UntypedStorage(nbytes), dtype)
        elif storages[key][0].nbytes() < nbytes:
            raise DamagedFileError("a storage is used with two sizes")
        return storages[key][0], dtype

    def load() -> Any:
        return unpickler(file, size - file.tell(), read_storage).load()

    content = load()
    if type(content) is not int or content != LEGACY_MAGIC:
        return content
    load(), load()  # protocol version, system information
    content, keys = load(), load()
    if not isinstance(keys, list) or len(keys) != len(storages) or set(map(str, keys)) != set(storages):
        raise DamagedFileError("its list of storages is damaged")
    for key in keys:
        fill_storage(file, *storages[str(key)])
    return content


def fill_storage(file: io.BufferedIOBase, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
    """Read the next storage of a legacy file: the number of elements as int64, and their bytes."""
    count, raw = file.read(8), file.read(storage.nbytes())
    if len(count) < 8 or struct.unpack("<q", count)[0] * dtype.itemsize != len(raw) or len(raw) < storage.nbytes():
        raise DamagedFileError("the file is truncated; copy or download it again")
    if raw:
        storage.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8).untyped_storage())


IMPLEMENTATION_KEY = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
# Implementations of attention and experts that are part of transformers; anything else names a kernel on the hub.
IMPLEMENTATIONS = frozenset(
    {None, True, False, "", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "batched_mm",
     "grouped_mm"}
)  # fmt: skip


def read_checkpoint(source: Source, unpickler: Unpickler = InertUnpickler) -> Any:
    """The object in a checkpoint of either layout, read inertly."""
    if source.kind is Kind.CHECKPOINT:
        return read_archive(source.path, unpickler)
    with open_input(source.path) as file:
        return read_legacy(file, os.fstat(file.fileno()).st_size, unpickler)


def load_checkpoint(source: Source, *, trust: bool) -> Loaded:
    """A complete module, or a dictionary that holds weights."""
    if trust:
        LOG.warn(f"--trust-pickle: {source.path} is executed as it is opened")
        try:
            content = torch.load(source.path, map_location="cpu", weights_only=False)
        except Exception as error:  # whatever the file's own code raises
            raise_out_of_memory(error)
            raise DamagedFileError(f"it cannot be opened ({first_line(error)})") from error
    else:
        content = read_checkpoint(source)
    if isinstance(content, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        content = content.module
    content = numbered(content)
    if isinstance(content, torch.nn.Module):
        check_module_graph(content)
        return Loaded(content, f"a complete model ({qualified_name(type(content))})")
    if isinstance(content, Mapping):
        return Loaded(content, "weights without a model (a state dict)")
    raise DamagedFileError(f"it holds {type(content).__name__}, neither a model nor a state dict")


def load_saved_weights(source: Source, *, trust: bool) -> Loaded:
    """The weights in a checkpoint for a class that the user names: of a complete model the tensors alone are read."""
    try:
        loaded = load_checkpoint(source, trust=trust)
        entries = loaded.content.values() if isinstance(loaded.content, Mapping) else [loaded.content]
        if trust or not any(isinstance(entry, nn.Module) for entry in entries):
            return loaded
    except (RefusedFileError, DamagedFileError):
        if trust:
            raise
    content = numbered(read_checkpoint(source, WeightsUnpickler))
    eps: dict[str, float] = {}
    if isinstance(content, Saved):
        name = shorten(content.name, 100)
        LOG.warn(f"of the complete model in it ({name}) the weights alone are used: other code may compute otherwise")
        content, eps = content.read()
    if not isinstance(content, Mapping):
        raise DamagedFileError(f"it holds {type(content).__name__}, neither a model nor a state dict")
    return Loaded(content, "weights", eps=eps)


class Verdict(IntEnum):
    """What becomes of an attribute that a file gives to an object of transformers."""

    KEEP = 0
    DROP = 1  # nothing that the model computes depends on it
    REFUSE = 2  # the model cannot be what it was without it, and it would run or fetch code


# What code of transformers acts upon, whoever declares it: kernels, compilers, quantisers, devices, files and code.
ACTING_ATTRIBUTES = re.compile(
    r"_?use_kernels|kernel_config|auto_map(ping)?|custom_(generate|pipelines)|trust_remote_code|transformers_weights"
    r"|use_pretrained_backbone|compile_config|_compiled_call|_last_compile_config|cache_config"
    r"|distributed_config|(hf_)?device_map|hf_quantizer|is_quantized|quantization_method|extra_(config_)?files"
    r"|(base_model_)?_?(tp|pp|ep|fsdp)_(plan|size)|_auto_class|attribute_map|watermarking_config|is_assistant"
    r"|assistant_(confidence_threshold|lookbehind|early_exit|ensemble_weight)"
)
# Caches of transformers that neither quantise nor move what they hold.
CACHES = (None, "dynamic", "dynamic_full", "static", "hybrid", "hybrid_chunked", "sliding_window")
# Attributes with a string of such a name would be a place; _name_or_path is only told in messages.
PLACE_ATTRIBUTE = re.compile(r"(.*_)?(path|paths|file|files|filename|url|uri|repo|repo_id|dir|directory|folder)")
DTYPE_ATTRIBUTE = re.compile(r"(.*_)?dtype")
DTYPE_VALUE = re.compile(r"auto|bool|half|float|double|(b?float|u?int|complex)\d{1,3}(_e\dm\d\w*)?")
# What the bases of configurations and models set or read of themselves, and files may say too.
CONFIG_ATTRIBUTES = word_set(
    """model_type name_or_path _name_or_path _commit_hash num_labels torch_dtype output_attentions _output_attentions
    rope_scaling rope_theta per_layer_config _heterogeneity_spec _post_init_done transformers_version
    ignore_keys_at_rope_validation allow_global_per_layer_attribute_access use_cache bos_token_id eos_token_id
    pad_token_id num_classes label_names _out_features _out_indices"""
)
# The files of transformers, besides those of the model, whose code reads a configuration to compute with it.
SHARED_READERS = (
    "masking_utils.py",
    "cache_utils.py",
    "modeling_rope_utils.py",
    "modeling_layers.py",
    "pytorch_utils.py",
)
READ_NAME = re.compile(r"(?<=config\.)\w+|(?<=config, [\"'])\w+")  # config.name, getattr(config, "name", ...)


@functools.cache
def declared_attributes(cls: type) -> frozenset[str]:
    """The attributes that configurations of this class have by its declaration, or that its models' code reads."""
    import dataclasses
    import inspect

    transformers = import_library("transformers")
    if issubclass(cls, transformers.GenerationConfig):
        return frozenset(vars(transformers.GenerationConfig()))
    names = CONFIG_ATTRIBUTES | assigned_names(cls) | {field.name for field in dataclasses.fields(cls)}
    for owner in cls.__mro__:
        names |= {*vars(owner).get("attribute_map", {}), *vars(owner).get("attribute_map", {}).values()}
        names |= {name for name, value in vars(owner).items() if isinstance(value, property) and value.fset}
        if "__init__" in vars(owner) and owner not in transformers.PreTrainedConfig.__mro__:
            names |= inspect.signature(owner).parameters.keys()
    library, own = Path(transformers.__file__).parent, Path(inspect.getfile(cls)).parent
    for file in (*own.glob("modeling_*.py"), *(library / name for name in SHARED_READERS)):
        names |= frozenset(READ_NAME.findall(file.read_text(encoding="utf-8")))
    return frozenset(names)


def config_attribute(cls: type, name: str, value: object) -> Verdict:
    """Whether a configuration of `cls` (a PreTrainedConfig or GenerationConfig) may have an attribute from a file.

    The same for the JSON of a folder and for an object in a pickle. Kept is what the class declares or its models read,
    and of that nothing that hides a method, or that transformers acts upon.
    """
    if IMPLEMENTATION_KEY.fullmatch(name):
        return Verdict.KEEP if is_one_of(value, IMPLEMENTATIONS) else Verdict.REFUSE
    if name == "quantization_config":
        return Verdict.REFUSE if value else Verdict.KEEP
    if ACTING_ATTRIBUTES.fullmatch(name) or (name == "cache_implementation" and not is_one_of(value, CACHES)):
        return Verdict.DROP if value else Verdict.KEEP
    if DTYPE_ATTRIBUTE.fullmatch(name):
        return Verdict.KEEP if is_dtype(value) else Verdict.REFUSE
    if isinstance(value, str) and PLACE_ATTRIBUTE.fullmatch(name) and name not in CONFIG_ATTRIBUTES:
        return Verdict.DROP
    hides = callable(getattr(cls, name, None)) and not isinstance(getattr(cls, name), type)
    return Verdict.KEEP if name in declared_attributes(cls) and not hides else Verdict.DROP


def is_dtype(value: object) -> bool:
    """Whether a value names dtypes: one, or one for each part of a model."""
    if isinstance(value, dict):
        return all(is_dtype(entry) for entry in value.values() if not isinstance(entry, dict))
    return (
        value is None or isinstance(value, torch.dtype) or bool(isinstance(value, str) and DTYPE_VALUE.fullmatch(value))
    )


class Census(InertUnpickler):
    """An unpickler that notes every name and every storage, and reads on where a name is not allowed."""

    def __init__(self, file: Any, size: int, read_storage: Callable[[tuple[Any, ...]], Any]) -> None:
        self.names: dict[str, str] = {}  # every global: why it is not allowed, or ""
        self.problem: ConversionError | None = None  # the first one that is more than that
        self.storages: dict[str, tuple[str, int]] = {}  # dtype and number of elements

        def note_storage(record_id: tuple[Any, ...]) -> Any:
            if record_id[:1] == ("storage",):
                key, dtype, nbytes = parse_storage_id(record_id)
                self.storages[key] = (dtype_name(dtype), nbytes // dtype.itemsize)
            return read_storage(record_id)

        super().__init__(file, size, note_storage)

    def find_class(self, module: str, name: str) -> Any:
        """As the loader's; what it would refuse is noted with the reason."""
        full_name = f"{module}.{name}"
        try:
            token = super().find_class(module, name)
            why = "not allowed" if isinstance(token, Token) and token.name in self.refused else ""
        except ConversionError as error:
            why, self.problem = str(error), self.problem or error
            self.refused[full_name] = None
            token = Token(full_name)
        self.names[full_name] = "" if module.partition(".")[0] == "__torch__" else why  # TorchScript's own classes
        return token

    def load(self) -> Any:
        """As the loader's, with the error that it raises."""
        try:
            return super().load()
        except ConversionError as error:
            raise self.problem or error from None


class Contents(NamedTuple):
    """What the pickles of a checkpoint hold: the object, unless they are not opened, all their names, all storages."""

    content: Any
    names: dict[str, str]
    storages: list[tuple[str, int]]
    problem: dict[str, Any]  # as `inspect` reports it, where they are not opened


def take_census(source: Source) -> Contents:
    """Read a checkpoint, and note what it holds also where it may not be opened."""
    readers: list[Census] = []

    def census(file: Any, size: int, read_storage: Callable[[tuple[Any, ...]], Any]) -> Census:
        readers.append(Census(file, size, read_storage))
        return readers[-1]

    content, problem = None, {}
    try:
        content = read_checkpoint(source, census)
    except ConversionError as error:
        problem = {"problem": f"{source.path}: {error}", "exit_code": int(error.status)}
    names = {name: why for reader in readers for name, why in reader.names.items()}
    storages = {key: storage for reader in readers for key, storage in reader.storages.items()}
    return Contents(content, names, list(storages.values()), problem)


# ---------------------------------------------------------------------------------------------------------------------
# TorchScript: its code is parsed and vetted before PyTorch's compiler sees it
#
# torch.jit.load runs an archive's __setstate__, default arguments and class constants, and some operators open files.
# ---------------------------------------------------------------------------------------------------------------------

# TorchScript and .pt2 archives are programs too: torch.jit.load runs the archive's __setstate__, default arguments and
# class constants, some operators read and write files, and torch.export.load evaluates expressions from the file,
# imports modules that it names, and unpickles. They are vetted before they are opened.
DENIED_OPERATORS = frozenset(
    {"from_file", "save", "load", "_load", "rpc_sync", "rpc_async", "rpc_remote", "remote", "set_data", "breakpoint",
     "PythonOp", "IgnoredPythonOp", "AddStatValue", "_reinterpret_tensor", "_reshape_alias", "shallow_copy_data_",
     "segment_reduce", "ctc_loss"}
)  # fmt: skip
# Operators that PyTorch's own code calls, and that trust it with indices and sizes: they read and write beside tensors
# where a file calls them. No exporter knows them, but for those that KNOWN_INTERNALS names.
INTERNAL_OPERATOR = re.compile(
    r"_(?!_).*|.*_backward(_.*)?|.*(sparse|nested|_(coo|cs[cr]|bs[cr])(_|$)).*|(mkldnn|cudnn|miopen|mps|fbgemm)_.*"
)
KNOWN_INTERNALS = word_set(
    """_adaptive_avg_pool2d _adaptive_avg_pool3d _addmm_activation _aminmax _assert_async _assert_scalar
    _assert_tensor_metadata _batch_norm_impl_index _batch_norm_no_update _batch_norm_with_update
    _batch_norm_with_update_functional _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long
    _cast_Short _cdist_forward _chunk_cat _conj _conj_physical _convolution _convolution_mode _dim_arange
    _embedding_bag _embedding_bag_forward_only _euclidean_dist _fft_c2c _fft_c2r _fft_r2c _functional_assert_async
    _functional_assert_scalar _functional_sym_constrain_range _functional_sym_constrain_range_for_size _fused_dropout
    _fused_rms_norm _get_tracing_state _grouped_mm _infer_size _int_mm _is_all_true _is_any_true _linalg_check_errors
    _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd _list_to_tensor _local_scalar_dense
    _log_softmax _logcumsumexp _masked_softmax _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _native_multi_head_attention _neg_view _nested_tensor_from_mask
    _nested_tensor_from_mask_left_aligned _no_grad_fill_ _no_grad_normal_ _no_grad_uniform_ _no_grad_zero_
    _pack_padded_sequence _pad_circular _pad_enum _pad_packed_sequence _pdist_forward _prelu_kernel _print
    _reshape_copy _reshape_from_tensor _safe_softmax _sample_dirichlet _scaled_dot_product_attention_math
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _set_item _shape_as_tensor _size_if_not_equal _softmax _stack
    _standard_gamma _tensor_to_list _thnn_fused_gru_cell _thnn_fused_lstm_cell _to_copy _to_cpu
    _transform_bias_rescale_qkv _transformer_encoder_layer_fwd _trilinear _unique _unique2 _unsafe_index
    _unsafe_index_put _unsafe_masked_index _unsafe_view _unwrap_optional _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _weight_norm _weight_norm_interface"""
)
OPERATOR_NAMESPACES = frozenset({"aten", "prim", "prims", "torchvision", "quantized", "prepacked"})
# Classes of C++ whose objects hold packed weights; others (c10d.FileStore) hold files and connections.
SCRIPT_CLASSES = frozenset({"quantized", "rnn", "sparse", "xnnpack", "mkldnn"})
# What code may call that runs while the archive is loaded: how quantised layers unpack their weights.
SETSTATE_CALLS = re.compile(
    r"torch\.(eq|ne|len|size|dim|append|contiguous|dequantize|__\w+__)|ops\.(quantized|prepacked)\.\w+"
    r"|unchecked_cast|annotate|uninitialized|int|float|bool|len|getattr|ops\.prim\.RaiseException"
)
# Operators whose weights are packed for one kind of processor, which no exporter unpacks, and what made them.
PACKED_OPERATORS = {
    r"ops\.prepacked\.\w+": "optimize_for_mobile packed its weights for XNNPACK; convert the archive from before that",
    r"ops\.quantized\.\w+_dynamic\w*": "it was quantised dynamically; convert the float model that it was made from, "
    "and quantise the ONNX file (onnxruntime.quantization.quantize_dynamic)",
}
# What the pickles beside the code may name, each with what our unpickler makes of it.
SCRIPT_REBUILDERS: dict[str, Callable[..., Any]] = {
    **{f"torch.jit._pickle.build_{kind}list": lambda items: items for kind in ("int", "tensor", "double", "bool")},
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
    "torch._utils._rebuild_tensor_v2": check_tensor,
    "torch._utils._rebuild_qtensor": check_tensor,
    "torch._utils._rebuild_sparse_tensor": lambda *_: None,
    "torch.device": rebuild_device,
    "collections.OrderedDict": ordered_dict,
}
MAX_SCRIPT_SIZE = 3_000_000  # nodes of syntax after inlining; an 80-layer language model has some 300,000
SCRIPT_NAME = re.compile(r"__torch__(\.[A-Za-z_]\w*)*")


class ScriptUnpickler(InertUnpickler):
    """Reads a pickle of a TorchScript archive only to check it: its names, and that its tensors fit their storages."""

    def find_class(self, module: str, name: str) -> Any:
        """A Token for what torch.jit.save writes: the archive's own classes, tensors, lists and enumerations."""
        full_name = f"{module}.{name}"
        own = SCRIPT_NAME.fullmatch(full_name) and not denied_script_name(full_name.split("."))
        scheme = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.qscheme))
        if not (own or scheme or full_name in SCRIPT_REBUILDERS or self.is_storage(module, name)):
            self.refused[full_name] = None
        return Token(full_name)

    def run_reduce(self) -> None:
        """REDUCE: check tensors; everything else is only passed on."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, Token) or type(arguments) is not tuple:
            raise DamagedFileError("a pickle of the archive calls something that is not a function")
        self.budget.spend(*arguments)
        rebuild: Callable[..., Any] = SCRIPT_REBUILDERS.get(function.name, lambda *_: None)  # of an enumeration, None
        self.stack[-1] = None if self.refused else rebuild(*arguments)

    def new_object(self, token: object, arguments: object) -> Any:
        """An object of a class of the archive: nothing of it is needed here."""
        if not isinstance(token, Token) or type(arguments) is not tuple:
            raise DamagedFileError("a pickle of the archive makes an object of something that is not a class")
        return Ignored()


ScriptUnpickler.dispatch = {
    **InertUnpickler.dispatch, pickle.REDUCE[0]: ScriptUnpickler.run_reduce,
}  # fmt: skip


def dotted_names(tree: ast.AST) -> Iterator[list[str]]:
    """Every name in a piece of code with the attributes that are taken of it: `a.b.c` as ["a", "b", "c"].

    Attributes of anything else than a name begin with "".
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            yield [node.id, *reversed(attributes)]
            continue
        if attributes:
            yield ["", *reversed(attributes)]
        waiting.extend(ast.iter_child_nodes(node))


def denied_script_name(parts: Sequence[str]) -> bool:
    """Whether a dotted name of TorchScript code is more than a model needs.

    `ops` and the archive's own namespace must be followed up to something known: TorchScript lets a variable stand for
    either (`o = ops` and then `o.aten.save`).
    """
    root, *rest = parts
    if root == "ops":
        return len(rest) < 2 or rest[0] not in OPERATOR_NAMESPACES or is_denied_operator(rest)
    if root == "__torch__":
        known = rest[:2] != ["torch", "classes"] or (len(rest) > 2 and rest[2] in SCRIPT_CLASSES)
        return rest in ([], ["torch"]) or not known
    if root == "torch" and rest in ([], ["autograd"]):  # a variable may stand for them, too
        return True
    return is_denied_operator(rest)


def is_denied_operator(names: Sequence[str]) -> bool:
    """Whether one of `names` is an operator that acts, or one of PyTorch's internals."""
    return not DENIED_OPERATORS.isdisjoint(names) or any(map(is_internal_operator, names))


@functools.cache
def is_internal_operator(name: str) -> bool:
    """Whether `name` is that of an operator, and not of a module's attribute, which only PyTorch's own code calls."""
    if not INTERNAL_OPERATOR.fullmatch(name) or name in KNOWN_INTERNALS:
        return False
    return bool(torch._C._jit_get_schemas_for_operator(f"aten::{name}"))  # noqa: SLF001


def called_while_loading(tree: ast.AST) -> Iterator[str]:
    """What runs as soon as the code is loaded, besides what is plain: __setstate__, defaults and class bodies."""

    def calls(nodes: Iterable[ast.AST], where: str) -> Iterator[str]:
        for node in (inner for outer in nodes for inner in ast.walk(outer)):
            if isinstance(node, (ast.For, ast.While)):
                yield f"a loop in {where}"
            elif isinstance(node, ast.Call) and not SETSTATE_CALLS.fullmatch(ast.unparse(node.func)):
                yield f"{shorten(ast.unparse(node.func), 60)} in {where}"

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            yield from calls([*defaults, *node.decorator_list], "a default argument")
        elif isinstance(node, (ast.ClassDef, ast.Module)):
            methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
            others = [item for item in node.body if not isinstance(item, (ast.FunctionDef, ast.ClassDef))]
            yield from calls(others, "the body of a class")
            waiting, seen = ["__setstate__"], set[str]()
            while waiting:
                name = waiting.pop()
                if name in seen or name not in methods:
                    continue
                seen.add(name)
                found = set(calls(methods[name].body, "__setstate__"))
                own = {f"self.{method} in __setstate__" for method in methods}
                waiting += [call.split(".")[1].split(" ")[0] for call in found & own]
                yield from found - own


def vet_script_code(tree: ast.AST) -> set[str]:
    """What a piece of TorchScript source uses that may touch files, the network or unknown extensions."""
    found = {".".join(parts) for parts in dotted_names(tree) if denied_script_name(parts)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            names = {item.value for item in node.args if isinstance(item, ast.Constant)}
            found.update(f"getattr of {name}" for name in DENIED_OPERATORS & names)
    return found | set(called_while_loading(tree))


class ScriptMethod(NamedTuple):
    """A function or method of TorchScript code: the size of its body, and the full names of what it calls."""

    size: int  # nodes of its syntax tree
    calls: tuple[str, ...]


def script_methods(tree: ast.Module, module: str) -> dict[str, ScriptMethod]:
    """The functions of a file of TorchScript code by their full names, `module.Class.method` and `module.function`.

    What is called is told by the annotations of attributes and arguments, as torch.jit.save writes them for all.
    """
    found: dict[str, ScriptMethod] = {}
    attributes = {
        f"{module}.{cls.name}.{item.target.id}": ast.unparse(item.annotation)
        for cls in tree.body
        if isinstance(cls, ast.ClassDef)
        for item in cls.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    waiting: list[tuple[ast.stmt, str]] = [(node, module) for node in tree.body]
    while waiting:
        node, where = waiting.pop()
        if isinstance(node, ast.ClassDef):
            waiting += [(item, f"{where}.{node.name}") for item in node.body]
        elif isinstance(node, ast.FunctionDef):
            found[f"{where}.{node.name}"] = script_method(node, attributes)
    return found


def script_method(node: ast.FunctionDef, attributes: Mapping[str, str]) -> ScriptMethod:
    """The size and the calls of one function; `attributes` are the types of the classes' attributes by full name."""
    types = {argument.arg: ast.unparse(argument.annotation) for argument in node.args.args if argument.annotation}

    def type_of(value: ast.expr) -> str:
        if isinstance(value, ast.Name):
            return types.get(value.id, "")
        if isinstance(value, ast.Attribute):
            return attributes.get(f"{type_of(value.value)}.{value.attr}", "")
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "getattr" and len(value.args) == 2:
            name = str(value.args[1].value) if isinstance(value.args[1], ast.Constant) else ""
            return attributes.get(f"{type_of(value.args[0])}.{name}", "")
        return ""

    calls, size = [], 0
    for inner in ast.walk(node):  # in the order of the statements of each level
        size += 1
        if isinstance(inner, ast.Assign):
            types |= {name.id: type_of(inner.value) for name in inner.targets if isinstance(name, ast.Name)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
            owner = type_of(inner.func.value) or ast.unparse(inner.func.value)
            calls.append(f"{owner}.{inner.func.attr}")
    return ScriptMethod(size, tuple(calls))


def check_script_size(methods: Mapping[str, ScriptMethod]) -> None:
    """Raise DamagedFileError where the calls, written out as PyTorch does to run them, would make a huge program."""
    sizes: dict[str, int] = {}
    waiting = list(methods)
    while waiting:
        name = waiting[-1]
        inner = [call for call in methods[name].calls if call in methods and call not in sizes]
        if name not in sizes and inner:
            sizes[name] = 0  # until what it calls is known; a call in a circle is an error of PyTorch's
            waiting += inner
            continue
        sizes[waiting.pop()] = methods[name].size + sum(sizes.get(call, 0) for call in methods[name].calls)
        if sizes[name] > MAX_SCRIPT_SIZE:
            raise DamagedFileError("its TorchScript code calls itself so often that running it would never end")


def vet_torchscript(path: Path) -> None:
    """Refuse TorchScript whose code touches files, the network or unknown extensions; the code is parsed, not run.

    Its pickles may only name what torch.jit.save writes, and their tensors must fit their records.
    """
    reader, records = open_archive(path)
    if "model.json" in records:  # PyTorch 1.0's layout: torch.jit.load would take the code from wherever that says
        raise RefusedFileError("it has the layout of PyTorch 1.0 to 1.3; save it again with a newer PyTorch")
    found: set[str] = set()
    methods: dict[str, ScriptMethod] = {}
    for record in records:
        if not (record.startswith("code/") and record.endswith(".py")):
            continue
        try:
            text = read_record(reader, record).decode()
            if not {"\r", "\f", "\v", "\0"}.isdisjoint(text):  # where Python and TorchScript may see different lines
                raise DamagedFileError(f"{record} is not TorchScript code")
            for pattern, advice in PACKED_OPERATORS.items():
                if packed := re.search(pattern, text):
                    raise RefusedFileError(f"its TorchScript code calls {shorten(packed[0], 80)}: {advice}")
            tree = ast.parse(text)
            found |= vet_script_code(tree)
            methods |= script_methods(tree, record.removeprefix("code/").removesuffix(".py").replace("/", "."))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise DamagedFileError(f"{record} is not TorchScript code") from None
    if found:
        names = ", ".join(shorten(name, 80) for name in sorted(found)[:8])
        raise RefusedFileError(f"its TorchScript code uses {names}; pass --trust-pickle if you trust its maker")
    check_script_size(methods)
    for record in records:
        folder, _, name = record.rpartition("/")
        if name.endswith(".pkl") and folder in ("", "code"):
            vet_script_pickle(reader, record)


def vet_script_pickle(reader: Any, record: str) -> None:
    """Check one pickle of a TorchScript archive; its storages lie in the records of a folder of the same name.

    Those of mobile bytecode, which is not run here, may be those of the constants.
    """
    program = read_record(reader, record)
    folder = record.removesuffix(".pkl")

    def check_storage(record_id: tuple[Any, ...]) -> tuple[torch.UntypedStorage, torch.dtype]:
        key, dtype, nbytes = parse_storage_id(record_id)
        name = f"{folder}/{key}"
        if folder == "bytecode" and not reader.has_record(name):
            name = f"constants/{key}"
        if folder != "traced_inputs" and (not reader.has_record(name) or reader.get_record_size(name) < nbytes):
            raise DamagedFileError(f"tensor data {shorten(name, 80)} is missing or too short; the file is damaged")
        return torch.UntypedStorage(nbytes, device="meta"), dtype

    ScriptUnpickler(io.BytesIO(program), len(program), check_storage).load()


# ---------------------------------------------------------------------------------------------------------------------
# archives: PyTorch's zip files, whose records must be spelt exactly as PyTorch writes them
#
# Two readers that disagree on a name would see two different files.
# ---------------------------------------------------------------------------------------------------------------------

MAX_PICKLE_BYTES = 64 << 20  # the largest pickle of a known model is below 10 MB; tensors lie outside it
MAX_MODULE_DEPTH = 400
MAX_USES = 20_000  # of a model that is read for its weights alone, each as often as it is used
MAX_EXPANSION = 64 << 20  # bytes that an archive may hold beyond its size: TorchScript's code is 4 MB, packed to 1 MB


class Ignored:
    """Stands for an object that the forward pass does not need."""


class Saved:
    """Stands for an object that is not made, since only the tensors in it are wanted: its class and attributes."""

    name = ""
    state: Mapping[str, Any] = {}

    def tensors(self) -> dict[str, Any]:
        """What the state_dict of a module would be; raises DamagedFileError where modules contain each other."""
        return self.read()[0]

    def read(self) -> tuple[dict[str, Any], dict[str, float]]:
        """The tensors, and the eps of the modules that have one: state dicts lack it, and libraries change it."""
        found: dict[str, Any] = {}
        eps: dict[str, float] = {}
        waiting = [("", self, 0)]
        for _ in range(MAX_USES):
            if not waiting:
                return found, eps
            prefix, module, depth = waiting.pop()
            if isinstance(module.state.get("eps"), float):
                eps[prefix.removesuffix(".")] = module.state["eps"]
            groups = [module.state.get(f"_{key}") for key in ("parameters", "buffers", "modules")]
            fleeting = module.state.get("_non_persistent_buffers_set")
            fleeting = fleeting if isinstance(fleeting, set) else ()
            for name, value in itertools.chain.from_iterable(g.items() for g in groups if isinstance(g, dict)):
                if isinstance(value, Saved) and depth < MAX_MODULE_DEPTH:
                    waiting.append((f"{prefix}{name}.", value, depth + 1))
                elif isinstance(value, torch.Tensor) and name not in fleeting:
                    found[prefix + name] = value.detach()
        raise DamagedFileError("its modules contain each other, or are too many")


class Token(NamedTuple):
    """What a global name of a pickle resolves to: never callable. `value` is the class or function that may be kept."""

    name: str
    value: Any = None


# The records of PyTorch's archives, and no others: torch's reader takes no notice of case, cuts names at 511 bytes, and
# would find `code/x.PY` where it looks for `code/x.py`. What is spelt exactly so is the same record to every reader.
RECORD_NAME = re.compile(
    r"(data|constants|traced_inputs|bytecode|mobile_debug_handles|attributes)\.pkl|tensors\.json|model\.json"
    r"|version|byteorder|archive_(format|version)|\.format_version|\.storage_alignment"
    r"|\.data/(serialization_id|version)"
    r"|(data|constants|traced_inputs|bytecode|tensors)/\d{1,20}|(constants|bytecode)/\d{1,20}\.storage"
    r"|code/(\w+/)*\w+\.py(\.debug_pkl)?"
    r"|models/[\w.-]+\.json|data/(weights|constants|sample_inputs|aotinductor)/(\w[\w.-]*/)*[\w.-]+"
    r"|extra/[ -~]+",
    re.ASCII,
)
# From the fifth byte on, where a zip archive has what nobody reads. To torch.jit.load the whole file is then a
# flatbuffer (torch/csrc/jit/mobile/file_format.h, getFileFormat).
MOBILE_MARK = b"PTMF"
MAX_RECORD_NAME = 240  # characters, with the folder that is the archive's own


def check_record_names(records: Sequence[str]) -> None:
    """Raise for an archive with records that PyTorch does not write, which its readers may take for one another."""
    if len({name.lower() for name in records}) != len(records):
        raise DamagedFileError("the archive has two records of one name")
    for name in records:
        if name.startswith("/") or not {"..", "."}.isdisjoint(name.split("/")) or "\\" in name:
            raise DamagedFileError(f"the archive has a record outside itself ({shorten(name, 80)})")
        if not RECORD_NAME.fullmatch(name) or len(name) > MAX_RECORD_NAME:
            advice = "save the model again with torch.save, torch.jit.save or torch.export.save"
            raise RefusedFileError(f"PyTorch writes no record called {shorten(name, 80)!r} into an archive; {advice}")


def open_archive(path: Path) -> tuple[Any, list[str]]:
    """Torch's own zip reader and its record names: zipfile disagrees with it on duplicate and mismatched entries."""
    try:
        file = open_input(path)
        if file.peek(8)[4:8] == MOBILE_MARK:
            raise RefusedFileError("torch would not read it as the archive that it is, but as a mobile model")
        reader = torch._C.PyTorchFileReader(file)  # noqa: SLF001
        records = reader.get_all_records()
        check_record_names(records)
        total = sum(reader.get_record_size(name) for name in records)
        if total > os.fstat(file.fileno()).st_size + MAX_EXPANSION:
            raise DamagedFileError("the archive expands to far more than its own size")
        byte_order = reader.get_record("byteorder") if "byteorder" in records else b"little"
    except (ValueError, IndexError):
        raise DamagedFileError("it is a damaged archive: its version is no number that PyTorch writes") from None
    except RuntimeError as error:
        raise DamagedFileError(f"it is a damaged or truncated archive ({first_line(error)})") from None
    if byte_order != b"little":
        raise DamagedFileError("it was saved on a big-endian machine; save it again on a little-endian one")
    return reader, records


def read_record(reader: Any, name: str) -> bytes:
    """One record that is parsed as a whole; raises DamagedFileError where it is missing, damaged or too large."""
    try:
        if reader.get_record_size(name) > MAX_PICKLE_BYTES:
            raise DamagedFileError(f"its {name} is larger than that of any known model")
        return bytes(reader.get_record(name))
    except RuntimeError as error:  # missing, or with a wrong checksum
        raise DamagedFileError(f"its {name} is missing or damaged ({first_line(error)})") from None


def parse_storage_id(record_id: object) -> tuple[str, torch.dtype, int]:
    """(key, dtype, size in bytes) of ("storage", storage type, key, location, number of elements, ...)."""
    if not isinstance(record_id, tuple) or len(record_id) < 5 or record_id[0] not in ("storage", b"storage"):
        raise DamagedFileError("a tensor refers to something that is not a storage")
    token, key, _, elements = record_id[1:5]
    plain_key = type(key) in (str, int, bytes)
    if not isinstance(token, Token) or not plain_key or type(elements) is not int or not 0 <= elements < 2**48:
        raise DamagedFileError("a storage has a damaged record")
    name = token.name.rpartition(".")[2]
    untyped = name == "UntypedStorage"
    try:
        dtype = torch.uint8 if untyped else torch.storage._get_dtype_from_pickle_storage_type(name)  # noqa: SLF001
    except KeyError:
        raise DamagedFileError(f"it has a {shorten(name, 60)}, which PyTorch lacks") from None
    return str(key), dtype, elements * dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# the graphs of a Hugging Face model: modules that take and return flat tensors under the ecosystem's names
#
# Takes a FolderModel, gives Graphs: a module, its inputs, examples of them, and further checks such as generating
# text.
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_CHANNELS = 3  # what torchvision's models take, all of them, and timm's unless told otherwise
# What each task's graph returns; of the others everything that is a tensor.
TASK_OUTPUTS = {
    "feature-extraction": ("last_hidden_state", "pooler_output", "encoder_last_hidden_state"),
    "sentence-similarity": ("last_hidden_state", "sentence_embedding"),
    "question-answering": ("start_logits", "end_logits"),
    "object-detection": ("logits", "pred_boxes"),
    "depth-estimation": ("predicted_depth",),
    "zero-shot-image-classification": ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
}
# Sizes of the free axes: what is traced first, then what is verified beside it. No two axes change alike.
BATCH_SIZES = ({BATCH: 2}, {BATCH: 1}, {BATCH: 3})
TEXT_SIZES = ({BATCH: 2, SEQUENCE: 12}, {BATCH: 1, SEQUENCE: 7}, {BATCH: 3, SEQUENCE: 18})
DECODER_SIZES = tuple(
    {BATCH: batch, PAST: past, SEQUENCE: new} for batch, past, new in ((2, 6, 5), (1, 0, 9), (3, 11, 1), (2, 0, 14))
)
# The decoder behind an encoder: without a past, and with one.
FIRST_SIZES, NEXT_SIZES = (
    tuple(
        {BATCH: batch, ENCODER_SEQUENCE: encoded, PAST: past, SEQUENCE: new}
        for batch, encoded, (past, new) in zip((2, 1, 3), (12, 7, 18), lengths, strict=True)
    )
    for lengths in (((0, 5), (0, 1), (0, 8)), ((6, 3), (1, 1), (11, 1)))
)
WINDOW_BYTES = 512_000_000  # of a cache that is longer than the sliding window: beyond, the window goes unverified
GENERATED = 10  # tokens that PyTorch and ONNX Runtime generate for the same prompts
FEW_GENERATED = 2  # the same of heavy models
HEAVY_BYTES = 8_000_000_000  # of weights: reading them once takes many seconds, and a model is called a dozen times
STEPPED = 5  # tokens that a model with states reads in one call and one after the other
STEPS_APART = 1e-3  # of the largest value: what rounding does to two ways of computing the same
DECODED = 5  # tokens of the decoder where an encoder-decoder model is called once
CHOICES = 3  # answers of a multiple-choice question in the examples
AUDIO_SAMPLES = 16000  # a second, as the feature extractors resample


def padding_mask(batch: int, length: int, *, left: bool) -> Tensor:
    """A mask (int64, batch x length) of ones whose later rows begin (`left`) or end with ever more zeros."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        empty = min(length - 1, row * length // (batch + 1))
        mask[row, : empty if left else 0] = 0
        mask[row, length if left else length - empty :] = 0
    return mask


def token_ids(config: Any, shape: Sequence[int], generator: Any) -> Tensor:
    """Random tokens (int64) of the vocabulary that are none of the special ones."""
    special = {value for key, value in config.to_dict().items() if key.endswith("_token_id") and type(value) is int}
    usual = torch.tensor([token for token in range(min(config.vocab_size, 50000)) if token not in special] or [0])
    return usual[torch.randint(0, len(usual), tuple(shape), generator=generator)]


def example_tensors(
    specs: Sequence[InputSpec], config: Any, sizes: Mapping[str, int], seed: int, *, left: bool = False
) -> list[Tensor]:
    """Seeded inputs at `sizes` as a processor makes them: padded rows (`left` or right), real positions."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for spec in sorted(specs, key=lambda spec: "mask" not in spec.name):  # the masks first: others follow them
        shape = spec.resized(sizes)
        if spec.name in ("attention_mask", "encoder_attention_mask"):
            rows = padding_mask(math.prod(shape[:-1]), shape[-1], left=left)
            made[spec.name] = rows.view(shape)
        elif spec.name == "input_ids":
            made[spec.name] = padded_ids(config, token_ids(config, shape, generator), made.get("attention_mask"))
        elif spec.name == "decoder_input_ids":
            made[spec.name] = token_ids(config, shape, generator)
        elif spec.name == "token_type_ids":
            made[spec.name] = (torch.arange(shape[-1]) >= shape[-1] // 2).to(torch.int64).expand(shape).clone()
        elif spec.name == "position_ids":
            made[spec.name] = (made["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, -shape[-1] :]
        elif spec.name == "bbox":
            limit = min(1000, getattr(config, "max_2d_position_embeddings", 1000) - 1)
            corners = torch.randint(0, limit // 2, (*shape[:-1], 2), generator=generator)
            made[spec.name] = torch.cat([corners, corners + limit // 3], -1)  # left, top, right, bottom
        elif spec.name.startswith("past_") and not sizes[PAST]:  # states before the first token
            made[spec.name] = torch.zeros(shape, dtype=spec.dtype)
        else:
            made[spec.name] = torch.randn(shape, generator=generator).to(spec.dtype)
    return [made[spec.name] for spec in specs]


def on_device_of(model: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the device of `model`."""
    return [tensor.to(model.device) for tensor in tensors]


def padded_ids(config: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """`ids` with the padding token where `mask` is zero, and one end token in every row where the model counts them."""
    if mask is None or mask.shape[-1] < ids.shape[-1]:
        return ids
    mask = mask[..., -ids.shape[-1] :]
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    ids = ids.masked_fill(mask == 0, pad)
    if getattr(config, "is_encoder_decoder", False) and isinstance(config.eos_token_id, int):
        ids.scatter_(-1, mask.sum(-1, keepdim=True) - 1, config.eos_token_id)
    return ids


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument."""
    return accepts(model.forward, name, by_name=True)


def text_specs(model: Any, task: str) -> list[InputSpec]:
    """The inputs of a text encoder, as its tokenizer makes them."""
    names = ["input_ids", "attention_mask"]
    if takes_argument(model, "token_type_ids") and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    if takes_argument(model, "bbox"):
        names.append("bbox")
    dims: tuple[int, ...] = (TEXT_SIZES[0][BATCH], TEXT_SIZES[0][SEQUENCE])
    axes = {0: BATCH, 1: SEQUENCE}
    if task == "multiple-choice":
        dims, axes = (dims[0], CHOICES, dims[1]), {0: BATCH, 1: "num_choices", 2: SEQUENCE}
    specs = [InputSpec(name, dims, torch.int64, axes) for name in names if takes_argument(model, name)]
    if task == "feature-extraction" and model.config.is_encoder_decoder and takes_argument(model, "decoder_input_ids"):
        few = (dims[0], DECODED)
        specs.append(InputSpec("decoder_input_ids", few, torch.int64, {0: BATCH, 1: DECODER_SEQUENCE}))
    return [spec._replace(dims=(*dims, 4)) if spec.name == "bbox" else spec for spec in specs]


MAX_WINDOW = 8192  # tokens: twice the widest local attention that a text is made for


def text_sizes(config: Any) -> tuple[dict[str, int], ...]:
    """The sizes to try, with one that is longer than the window of local attention where the model has one."""
    windows = [getattr(config, name, None) for name in ("attention_window", "local_attention")]
    widest = max((window if isinstance(window, int) else max(window) for window in windows if window), default=0)
    if not 0 < 2 * widest < min(getattr(config, "max_position_embeddings", math.inf), MAX_WINDOW):
        return TEXT_SIZES
    return (*TEXT_SIZES, {BATCH: 1, SEQUENCE: widest + 3})


def config_number(config: Any, names: str, otherwise: int, high: int) -> int:
    """The first of the attributes `names` of a configuration that is set; DamagedFileError unless it is 1 to `high`."""
    settings = Settings({name: getattr(config, name, None) or None for name in names.split()}, "config.json")
    return next(filter(None, (settings.integer(name, 1, high) for name in settings.content)), otherwise)


def processor_size(settings: Settings) -> tuple[int, int, bool] | None:
    """Height and width of the images that a processor makes, and whether it keeps their proportions; None if untold."""
    crops = settings.flag("do_center_crop") and settings.content.get("crop_size")
    key = "crop_size" if crops else "size"
    value = settings.content.get(key)
    if isinstance(value, dict):
        size = Settings(value, f"{settings.where}: {key}")
        edge = size.integer("shortest_edge", 1, MAX_IMAGE_EDGE) or 224
        height, width = (size.integer(name, 1, MAX_IMAGE_EDGE) or edge for name in ("height", "width"))
        return height, width, "longest_edge" in value
    edges = image_edges(value)
    if value is not None and edges is None:
        raise settings.misfit(key, f"whole numbers from 1 to {MAX_IMAGE_EDGE}")
    return (edges[0], edges[-1], False) if edges else None


def image_settings(config: Any, folder: Path) -> tuple[int, int, int, bool]:
    """Channels, height and width of the images, and whether the processor keeps their proportions.

    From preprocessor_config.json, else from the model's image_size; 3, 224 and 224 by default.
    """
    vision = getattr(config, "vision_config", config)
    channels = config_number(vision, "num_channels in_channels", IMAGE_CHANNELS, MAX_IMAGE_EDGE)
    file = folder / "preprocessor_config.json"
    if file.exists() and (size := processor_size(Settings(read_json(file), file.name))):
        return channels, *size
    settings = Settings({"image_size": getattr(vision, "image_size", None)}, "config.json")
    if not isinstance(settings.content["image_size"], (int, list, tuple)):
        return channels, 224, 224, False
    if not (edges := image_edges(settings.content["image_size"])):
        raise settings.misfit("image_size", f"whole numbers from 1 to {MAX_IMAGE_EDGE}")
    return channels, edges[0], edges[-1], False


def image_spec(model: Any, folder: Path, task: str) -> tuple[InputSpec, tuple[dict[str, int], ...]]:
    """pixel_values and the sizes to try: height and width are free where a detector's processor keeps proportions."""
    channels, height, width, free = image_settings(model.config, folder)
    dtype = float_dtype(model)
    if not free or task != "object-detection":
        spec = InputSpec("pixel_values", (2, channels, height, width), dtype, {0: BATCH})
        return spec, BATCH_SIZES
    spec = InputSpec("pixel_values", (2, channels, 256, 320), dtype, {0: BATCH, 2: "height", 3: "width"})
    sizes = ({"height": 256, "width": 320}, {"height": 224, "width": 288}, {"height": 320, "width": 256})
    return spec, tuple({BATCH: batch, **size} for batch, size in zip((2, 1, 3), sizes, strict=True))


MAX_FRAMES = 16_384  # of a spectrogram: Whisper's has 3,000


def audio_spec(model: Any) -> tuple[InputSpec, tuple[dict[str, int], ...]]:
    """input_values (samples, or a spectrogram of fixed length) or input_features (mel spectrogram)."""
    config, name, dtype = model.config, model.main_input_name, float_dtype(model)
    bins = config_number(config, "num_mel_bins input_feat_per_channel", 80, MAX_IMAGE_EDGE)
    if name == "input_values" and getattr(config, "num_mel_bins", None) and getattr(config, "max_length", None):  # AST
        frames = config_number(config, "max_length", 1, MAX_FRAMES)
        return InputSpec(name, (2, frames, bins), dtype, {0: BATCH}), BATCH_SIZES
    if name == "input_values":
        lengths = (AUDIO_SAMPLES, AUDIO_SAMPLES // 2 + 80, AUDIO_SAMPLES + 4321)
        sizes = tuple({**batch, "audio_length": length} for batch, length in zip(BATCH_SIZES, lengths, strict=True))
        return InputSpec(name, (2, AUDIO_SAMPLES), dtype, {0: BATCH, 1: "audio_length"}), sizes
    if getattr(config, "model_type", "") == "whisper":  # bins first, and always 30 seconds
        frames = 2 * config_number(config, "max_source_positions", 1, MAX_FRAMES)
        return InputSpec(name, (2, bins, frames), dtype, {0: BATCH}), BATCH_SIZES
    sizes = tuple({**batch, "frames": frames} for batch, frames in zip(BATCH_SIZES, (96, 64, 160), strict=True))
    return InputSpec(name, (2, 96, bins), dtype, {0: BATCH, 1: "frames"}), sizes


def named_call(model: nn.Module, specs: Sequence[InputSpec], choose: Callable[[Any], dict[str, Tensor]]) -> nn.Module:
    """A module that calls `model` with its inputs by name and returns what `choose` picks."""
    return as_module(model, specs, lambda inner, given: choose(inner(**given, return_dict=True)))


def task_outputs(task: str, missing: Collection[str]) -> Callable[[Any], dict[str, Tensor]]:
    """What picks the task's tensors from a model's output: those of TASK_OUTPUTS, logits, or every tensor."""
    wanted = [name for name in TASK_OUTPUTS.get(task, ("logits",)) if name not in missing]

    def choose(output: Any) -> dict[str, Tensor]:
        tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        return {name: tensors[name] for name in wanted if name in tensors} or tensors

    return choose


def pool_states(states: Tensor, mask: Tensor, mode: str) -> Tensor:
    """One vector for each row of `states` (batch x sequence x size), as sentence_transformers.models.Pooling has it."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    if mode == "cls":
        return states[:, 0]
    if mode == "max":
        return states.masked_fill(weights == 0, -1e9).max(1).values
    if mode == "lasttoken":
        places = torch.arange(mask.shape[1], device=mask.device) * mask
        return torch.take_along_dim(states, places.argmax(1)[:, None, None], 1)[:, 0]
    if mode == "weightedmean":
        weights = weights * (torch.arange(mask.shape[1], device=mask.device)[None, :, None] + 1)
    length = weights.sum(1).clamp(min=1e-9)
    return (states * weights).sum(1) / (length.sqrt() if mode == "mean_sqrt_len_tokens" else length)


POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
           "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_lasttoken": "lasttoken",
           "pooling_mode_weightedmean_tokens": "weightedmean"}  # fmt: skip
# Activations of torch.nn that a Dense module may name; they are built without arguments.
ACTIVATIONS = word_set(
    """CELU ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU SiLU Sigmoid
    Softplus Softsign Tanh Tanhshrink"""
)
SentenceStep = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


def sentence_call(steps: Sequence[SentenceStep], model: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's states, and the sentence's vector, which `steps` make of them."""
    vector = states = model(**given, return_dict=True).last_hidden_state
    for step in steps:
        vector = step(states, given["attention_mask"], vector)
    return {"last_hidden_state": states, "sentence_embedding": vector}


def single_graph(found: FolderModel, folder: Path) -> Graph:
    """The graph of a model that is called once: text, image, audio or both of the first two."""
    model, task = found.model, found.task
    if task == "zero-shot-image-classification":
        image, _ = image_spec(model, folder, task)
        texts = [spec._replace(axes={0: "text_batch_size", 1: SEQUENCE}) for spec in text_specs(model, task)]
        limit = getattr(model.config.text_config, "max_position_embeddings", 1000)
        specs = [*texts[:1], image._replace(axes={0: "image_batch_size"}), *texts[1:]]
        batches = ((2, 3), (1, 2), (4, 1))
        sizes = tuple(
            {"text_batch_size": few, "image_batch_size": many, SEQUENCE: min(size[SEQUENCE], limit - turn)}
            for turn, ((few, many), size) in enumerate(zip(batches, TEXT_SIZES, strict=True))
        )
        config = model.config.text_config
    elif model.main_input_name == "pixel_values":
        image, sizes = image_spec(model, folder, task)
        specs, config = [image], model.config
    elif model.main_input_name in ("input_values", "input_features"):
        audio, sizes = audio_spec(model)
        specs, config = [audio], model.config
    else:
        specs, config = text_specs(model, task), model.config.get_text_config()
        sizes = tuple(
            {**size, "num_choices": CHOICES + turn, DECODER_SEQUENCE: DECODED + turn}
            for turn, size in enumerate(text_sizes(config))
        )
        if task == "feature-extraction" and not found.steps and has_states(config):
            return decoder_graph(found, specs, cached=False, verified=False)
    module = named_call(model, specs, task_outputs(task, found.missing))
    if found.steps and any(spec.name == "attention_mask" for spec in specs):
        module = as_module(model, specs, functools.partial(sentence_call, found.steps))
    return Graph("model", module, specs, functools.partial(example_tensors, specs, config), sizes)


def timm_graph(model: Any, output: str) -> Graph:
    """The graph of a model of timm: images of the size that it was made for, and its one `output`."""
    size = preprocessing(model, None).size or ()  # three: timm_model saw to it
    spec = InputSpec("pixel_values", (2, *size), float_dtype(model), {0: BATCH})
    module = as_module(model, [spec], lambda inner, given: {output: inner(*given.values())})
    return Graph("model", module, [spec], functools.partial(example_tensors, [spec], None), BATCH_SIZES)


def cache_layer(key: Tensor, value: Tensor) -> Any:
    """One layer of a cache that holds `key` and `value` and grows, whatever the model's window is.

    transformers' sliding layers drop what is outside the window; the masks hide it just as well.
    """
    layer = transformers.cache_utils.DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


def cache_of(tensors: Sequence[Tensor]) -> Any:
    """A cache with the layers key, value, key, value, ..."""
    cache = transformers.DynamicCache()
    cache.layers = [cache_layer(key, value) for key, value in zip(tensors[::2], tensors[1::2], strict=True)]
    return cache


def cache_tensors(layers: Iterable[Any], kind: str = "", recurrent: str = "") -> dict[str, Tensor]:
    """`present.N.key` and `present.N.value` of every layer (for encoder-decoder models `present.N.decoder.key`).

    Layers with states have `present_conv.N` and, under the name of `recurrent`, `present_ssm.N`.
    """
    named = {}
    for index, layer in enumerate(layers):
        if getattr(layer, "keys", None) is not None:
            named[f"present.{index}{kind}.key"], named[f"present.{index}{kind}.value"] = layer.keys, layer.values
        named |= {f"present_{name}": states[turn] for name, states, turn in state_places(layer, index, recurrent)}
    return named


def state_places(layer: Any, index: int, recurrent: str) -> list[tuple[str, dict[int, Tensor], int]]:
    """Where a layer of transformers' cache keeps its states, each with its name; none in layers of attention."""
    found = []
    if hasattr(layer, "recurrent_states"):
        for kind, states in (("conv", layer.conv_states), (recurrent, layer.recurrent_states)):
            turns = [turn for turn, state in states.items() if state is not None]
            found += [(f"{kind}.{index}" + (f".{turn}" if len(turns) > 1 else ""), states, turn) for turn in turns]
    return found


class Decoder(NamedTuple):
    """How a decoder is called beside its text inputs."""

    argument: str  # the cache's name
    layers: list[Any]  # of a cache after a single token: what is in them is replaced
    recurrent: str  # what its recurrent states are called
    choose: Callable[[Any], dict[str, Tensor]]  # the task's outputs, each batch x tokens x ...


def decoder_specs(model: Any) -> list[InputSpec]:
    """The inputs of a decoder that reads a text from its beginning."""
    names = [name for name in ("input_ids", "attention_mask", "position_ids") if takes_argument(model, name)]
    return [InputSpec(name, (2, DECODER_SIZES[0][SEQUENCE]), torch.int64, {0: BATCH, 1: SEQUENCE}) for name in names]


def decoder_graph(found: FolderModel, specs: list[InputSpec], *, cached: bool, verified: bool) -> Graph:
    """The graph of a decoder: prefill (an empty past) and decoding in one, or without a cache.

    With states (mamba, lfm2, qwen3_next) it is a loop over the tokens, in prefill as in decoding; without a cache its
    states begin as zeros and are no output. A `verified` graph is also compared by generating text.
    """
    model, config, step = found.model, found.model.config.get_text_config(decoder=True), None
    examples = functools.partial(example_tensors, specs, config, left=True)
    choose, stateful = task_outputs(found.task, ()), has_states(config)
    if not cached and not stateful:
        return Graph("model", named_call(model, specs, choose), specs, examples, TEXT_SIZES)
    decoder = probe_decoder(model, choose)
    past = cache_specs(decoder, float_dtype(model))
    every = [*(spec._replace(axes={0: BATCH, 1: TOTAL}) if "mask" in spec.name else spec for spec in specs), *past]
    call = functools.partial(call_with_cache, decoder)
    if stateful:
        LOG.info("its states go from token to token: the graph is a loop over the tokens")
        step = token_step(decoder, model, every, config)
        if verified and weight_bytes(model) < HEAVY_BYTES:
            check_steps(decoder, model, step, every, config)
        call = functools.partial(read_text, decoder, step)
        if not cached:
            return Graph("model", as_module(model, specs, call), specs, examples, TEXT_SIZES, step=step)
    sizes, tokens = decoder_sizes(model, config, past)
    examples, check = functools.partial(example_tensors, every, config, left=True), None
    if verified and model.can_generate():
        check = functools.partial(check_generation, generate_text(model, config, tokens), every, dict)
    return Graph("model", as_module(model, every, call), every, examples, sizes, check, step)


def probe_decoder(model: Any, choose: Callable[[Any], dict[str, Tensor]]) -> Decoder:
    """How the model is called, and its cache after one token, for whose shapes no stored weights are read.

    Raises ConversionError (EXPORT) where the model keeps its past elsewhere.
    """
    argument = "cache_params" if takes_argument(model, "cache_params") else "past_key_values"
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), blank_weights(model):
        cache: Any = getattr(model(input_ids=token, use_cache=True), argument, None)
    if not hasattr(cache, "layers"):
        what = f"{type(model).__name__} does not keep its past in a cache of transformers, and a graph needs it there"
        raise ConversionError(ExitStatus.EXPORT, f"{what}; try another --task, or --no-cache")
    settings = model.config.get_text_config(decoder=True).to_dict()
    # A state space, or a matrix for each head: transformers.js looks for the one name or the other.
    recurrent = "ssm" if any(re.search(r"mamba|ssm|^state_size$", key) for key in settings) else "recurrent"
    return Decoder(argument, cache.layers, recurrent, choose)


def cache_specs(decoder: Decoder, dtype: torch.dtype) -> list[InputSpec]:
    """The inputs for the cache of a decoder."""
    specs = []
    for name, tensor in cache_tensors(decoder.layers, recurrent=decoder.recurrent).items():
        _, *rest = tensor.shape
        if name.startswith("present."):
            heads, _, size = rest
            specs.append(InputSpec(past_name(name), (2, heads, 6, size), dtype, {0: BATCH, 2: PAST}))
        else:
            specs.append(InputSpec(past_name(name), (2, *rest), tensor.dtype, {0: BATCH}))
    return specs


def decoder_sizes(model: Any, config: Any, past: Sequence[InputSpec]) -> tuple[tuple[dict[str, int], ...], int]:
    """Sizes at which a decoder with a `past` is compared, and how many tokens it generates."""
    every, tokens = (*DECODER_SIZES, *window_sizes(config, [spec.dims for spec in past])), GENERATED
    if (size := weight_bytes(model)) >= HEAVY_BYTES:
        every, tokens = DECODER_SIZES[:2], FEW_GENERATED
        LOG.info(f"verify: each pass reads {size_text(size)}, so only {len(every)} sizes and {tokens} generated tokens")
    return tuple({**size, TOTAL: size[PAST] + size[SEQUENCE]} for size in every), tokens


def has_states(config: Any) -> bool:
    """Whether transformers gives this model's cache layers with states: state spaces and linear attention."""
    kind = transformers.cache_utils.LinearAttentionCacheLayerMixin
    return any(isinstance(layer, kind) for layer in transformers.DynamicCache(config=config).layers)


def take_past(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cache among the inputs `given`, taken out of them."""
    return {name: given.pop(name) for name in list(given) if name.startswith("past_")}


def call_with_cache(decoder: Decoder, model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs for the tokens and the cache after them."""
    cache = cache_with(decoder, take_past(given))
    output = model(**given, **{decoder.argument: cache}, use_cache=True, return_dict=True)
    return {**decoder.choose(output), **cache_tensors(cache.layers, recurrent=decoder.recurrent)}


def token_step(decoder: Decoder, model: Any, specs: Sequence[InputSpec], config: Any) -> Job:
    """The model's work on one token of each row (batch x 1), with the mask up to it and the cache before it.

    The graph of a model with states repeats it: PyTorch's own loop cannot be traced.
    """
    sizes = {BATCH: 2, PAST: 6, SEQUENCE: 1, TOTAL: 7}
    single = [
        spec._replace(
            dims=spec.resized(sizes), axes={axis: name for axis, name in spec.axes.items() if name != SEQUENCE}
        )
        for spec in specs
    ]
    module = as_module(model, single, functools.partial(read_token, decoder))
    traced = on_device_of(model, example_tensors(single, config, sizes, 0, left=True))
    with torch.no_grad(), blank_weights(model):
        return Job(module, single, list(module(*traced)), traced, [], "")


def read_token(decoder: Decoder, model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs for one token of each row, and the cache after it.

    Padding leaves the states as they were: transformers masks it in a whole text, but not in a single token.
    """
    before, mask = dict(given), given["attention_mask"]
    if not any(name.startswith("past_key_values") for name in given):  # nothing looks back at padding
        del given["attention_mask"]
    result = call_with_cache(decoder, model, given)
    for name, after in result.items():
        if name.startswith("present_"):
            real = mask[:, -1].to(torch.bool).view(-1, *[1] * (after.dim() - 1))
            result[name] = torch.where(real, after, before[past_name(name)])
    return without_padding(result, mask)


def read_text(decoder: Decoder, step: Job, model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs for a whole text, as PyTorch reads it, and the cache after it where one is given.

    Not every model continues a past with more than one token: then it goes `step` by step.
    """
    past, mask = take_past(given), given["attention_mask"]
    if mask.shape != given["input_ids"].shape:
        return run_by_token(step, given, [*past.values()])
    output = model(**given, use_cache=True, return_dict=True)
    cache = cache_tensors(output[decoder.argument].layers, recurrent=decoder.recurrent) if past else {}
    return without_padding({**decoder.choose(output), **cache}, mask)


def run_by_token(step: Job, given: Mapping[str, Tensor], past: Sequence[Tensor]) -> dict[str, Tensor]:
    """What `step` makes of the tokens one after the other, beginning with the cache `past`."""
    length, answers = given["input_ids"].shape[1], []
    before = given["attention_mask"].shape[1] - length
    for turn in range(length):
        token = {name: tensor[:, turn : turn + 1] for name, tensor in given.items()}
        token["attention_mask"] = given["attention_mask"][:, : before + turn + 1]
        answers.append(step.model(*token.values(), *past))
        past = [value for name, value in answers[-1].items() if name.startswith("present")]
    return {
        name: value if name.startswith("present") else torch.cat([answer[name] for answer in answers], 1)
        for name, value in answers[-1].items()
    }


def check_steps(decoder: Decoder, model: Any, step: Job, specs: Sequence[InputSpec], config: Any) -> None:
    """Raise ConversionError (VERIFY) where transformers reads a text otherwise than its tokens one by one.

    Only the latter can be exported. zamba2 and nemotron_h bound their time steps from below in whole texts alone.
    """
    sizes = {BATCH: 1, PAST: 0, SEQUENCE: STEPPED, TOTAL: STEPPED}
    tensors = on_device_of(model, example_tensors(specs, config, sizes, 0, left=True))
    given = dict(zip([spec.name for spec in specs], tensors, strict=True))
    past = take_past(given)
    with torch.no_grad():
        text = decoder.choose(model(**given, use_cache=True, return_dict=True))
        single = run_by_token(step, given, [*past.values()])
    for name, expected in text.items():
        apart, scale = (single[name] - expected).abs().max().item(), expected.abs().max().item()
        if apart > STEPS_APART * scale and expected.dtype is not torch.float16:
            raise ConversionError(
                ExitStatus.VERIFY,
                f"transformers itself gives two answers: its {name} for {STEPPED} tokens in one call and one after the "
                f"other are {apart:.2g} apart, of {scale:.2g}; a graph can only be the latter: keep it in PyTorch",
            )


def cache_with(decoder: Decoder, tensors: Mapping[str, Tensor]) -> Any:
    """A cache with the layers of `decoder` that holds `tensors`; models write into copies of the states."""
    cache = transformers.DynamicCache()
    cache.layers = []
    for index, like in enumerate(decoder.layers):
        pair = [tensors[name] for part in ("key", "value") if (name := f"past_key_values.{index}.{part}") in tensors]
        layer = cache_layer(*pair) if pair else copy.copy(like)
        if states := state_places(like, index, decoder.recurrent):
            if pair:  # both in one layer, whatever window it has
                layer = transformers.cache_utils.LinearAttentionAndFullAttentionLayer(like.number_of_states)
                vars(layer).update({**vars(like), **vars(cache_layer(*pair))})
            layer.conv_states, layer.recurrent_states = dict(like.conv_states), dict(like.recurrent_states)
            for name, _, turn in states:
                kept = layer.conv_states if name.startswith("conv") else layer.recurrent_states
                kept[turn] = tensors[f"past_{name}"].clone()
        cache.layers.append(layer)
    return cache


class Generated(NamedTuple):
    """A batch of prompts and what PyTorch generates for them greedily, all as numpy arrays."""

    prompt: Any  # int64, batch x length
    mask: Any  # int64, batch x length: zeros where the rows are padded on the left
    tokens: Any  # int64, batch x count
    logits: Any  # batch x count x vocabulary


def generate(model: Any, config: Any, count: int, prompt: Tensor, mask: Tensor, **given: Tensor) -> Generated:
    """What `model` generates by transformers' own loop: `count` tokens, always the likeliest, whatever its settings."""
    settings = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, num_beams=1, eos_token_id=-1)
    settings.pad_token_id = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    settings.decoder_start_token_id = int(prompt[0, 0])  # of a decoder behind an encoder
    settings.output_logits = settings.return_dict_in_generate = True
    moved: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in given.items()}
    with torch.no_grad():
        result: Any = transformers.GenerationMixin.generate(model, **moved, generation_config=settings)
    tokens, logits = to_numpy(result.sequences[:, prompt.shape[1] :]), to_numpy(torch.stack(result.logits, 1))
    return Generated(prompt.numpy(), mask.numpy(), tokens, logits)


def generate_text(model: Any, config: Any, count: int) -> Generated:
    """What `model` generates after two prompts, the second of them padded."""
    mask = padding_mask(2, 6, left=True)
    prompt = padded_ids(config, token_ids(config, mask.shape, torch.Generator().manual_seed(5)), mask)
    return generate(model, config, count, prompt, mask, inputs=prompt, attention_mask=mask)


def generate_from_encoder(model: Any, encoder: Job) -> Generated:
    """What `model` generates for the encoder's first example."""
    case, config = encoder.cases[0], model.config
    starts = [getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad")]
    start = next((token for token in starts if isinstance(token, int)), 0)
    inputs = {name: torch.tensor(array) for name, array in case.inputs.items()}
    prompt = torch.full((len(next(iter(inputs.values()))), 1), start)
    return generate(model, config, GENERATED, prompt, torch.ones_like(prompt), **inputs, decoder_input_ids=prompt)


def text_inputs(ids: Any, mask: Any) -> Arrays:
    """Tokens, the mask of these and of all before them, and the positions that follow from that."""
    positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def zeros_for(specs: Iterable[InputSpec], sizes: Mapping[str, int]) -> Arrays:
    """Zeros for all inputs, at `sizes`."""
    return {spec.name: np.zeros(spec.resized(sizes), dtype_name(spec.dtype)) for spec in specs}


def generate_with(session: Any, expected: Generated, specs: Sequence[InputSpec], encoded: Arrays) -> Any:
    """The exported graph's logits (batch x count x vocabulary) as it generates: prefill, then token by token."""
    names = [output.name for output in session.get_outputs()]
    ids, mask = expected.prompt, expected.mask
    steps: list[Any] = []
    length = encoded["encoder_hidden_states"].shape[1] if encoded else 0
    given = zeros_for(specs, {BATCH: len(ids), PAST: 0, ENCODER_SEQUENCE: length}) | encoded
    for _ in range(expected.tokens.shape[1]):
        given |= {**text_inputs(ids, mask), CACHE_FLAG: np.array([bool(steps)])}
        results = dict(zip(names, session.run(None, {spec.name: given[spec.name] for spec in specs}), strict=True))
        steps.append(results.pop("logits")[:, -1])
        given |= {past_name(name): value for name, value in results.items()}
        ids = steps[-1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
    return np.stack(steps, 1)


def check_generation(  # noqa: PLR0913, PLR0917
    expected: Generated, specs: Sequence[InputSpec], encode: Callable[[], Arrays], session: Any, job: Job,
    options: Options,
) -> list[Difference]:  # fmt: skip
    """Generate with the exported graph and compare with PyTorch; raises AttemptError.

    `encode` gives the encoder's answer, if there is one. Where PyTorch's best two tokens lie closer than rounding, what
    follows is another text and is not compared.
    """
    encoded = encode()
    label = f"{expected.tokens.shape[1]} tokens after {shape_text(expected.prompt.shape)}"
    found = compare_generated(expected, generate_with(session, expected, specs, encoded), label, job, options)
    by_default = options.atol is None and options.rtol is None
    if by_default and not encoded and any(item.problem for item in found):
        found = compare_in_float64(full_text_case(expected, specs, job, options), {}, found, job, options)
    if bad := [item for item in found if item.problem]:
        raise AttemptError(f"generating {label}: {bad[0].problem}", exported=True)
    return found


def full_text_case(expected: Generated, specs: Sequence[InputSpec], job: Job, options: Options) -> Case:
    """The prompts and what was generated, read by PyTorch in one pass: how far it rounds in that is then known."""
    ids = np.concatenate([expected.prompt, expected.tokens[:, :-1]], 1)
    mask = np.concatenate([expected.mask, np.ones_like(expected.tokens[:, :-1])], 1)
    given = zeros_for(specs, {BATCH: len(ids), PAST: 0}) | text_inputs(ids, mask)
    inputs = {spec.name: given[spec.name] for spec in specs}
    outputs = call_model(job.model, [torch.tensor(x, device=options.device) for x in inputs.values()], list(inputs))
    return Case("", inputs, {name: to_numpy(tensor) for name, tensor in outputs.items()})


def encode_example(produced: Mapping[str, Produced], options: Options) -> Arrays:
    """What the exported encoder, the first of `produced`, answers to its first example."""
    encoder = next(iter(produced.values()))
    inputs = encoder.job.cases[0].inputs
    states = open_session(encoder.light, options.device).run(["last_hidden_state"], inputs)[0]
    return {"encoder_hidden_states": states, "encoder_attention_mask": inputs.get("attention_mask")}


def compare_generated(expected: Generated, logits: Any, label: str, job: Job, options: Options) -> list[Difference]:
    """Compare `logits` (batch x count x vocabulary) row by row, as far as both chose the same tokens."""
    found = []
    for row, tokens in enumerate(logits.argmax(-1)):
        same = next((step for step, token in enumerate(tokens) if token != expected.tokens[row][step]), len(tokens) - 1)
        case = Case(label, {}, {"logits": expected.logits[row, : same + 1]})
        found.append(compare(case, "logits", logits[row, : same + 1], job, options))
    return found


def window_sizes(config: Any, shapes: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """A past that is longer than the sliding window, where the model has one and the cache stays small."""
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    if not isinstance(window, int) or window < 1:
        return []
    if 4 * sum(math.prod(shape) for shape in shapes) * (window + 3) > WINDOW_BYTES:
        LOG.warn(f"the sliding window of {window} tokens is longer than the sequences that are compared")
        return []
    return [{BATCH: 1, PAST: window + 3, SEQUENCE: 2}]


def routed_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A mixture of experts without a loop in the graph: each expert works on the tokens that were routed to it.

    `self` is a transformers module of experts, with the attributes that transformers.integrations.moe's implementations
    read; tokens x hidden in and out. Those branch on values, or copy the weights for every token.
    """

    def weights(name: str, expert: int) -> tuple[Tensor, Tensor | None]:
        matrix = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return (matrix.T if self.is_transposed else matrix), bias

    result = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        token, place = torch.where(top_k_index == expert)
        inner = torch.nn.functional.linear(
            hidden_states[token], *weights("gate_up_proj" if self.has_gate else "up_proj", expert)
        )
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = torch.nn.functional.linear(inner, *weights("down_proj", expert))
        if self.has_post_expert_norm:
            outer = self.post_expert_norm(outer)
        share = (outer * top_k_weights[token, place, None]).to(result.dtype)
        result = result.index_put((token,), result[token] + share)  # a token chooses an expert at most once
    return result


def encoder_graph(found: FolderModel) -> Graph:
    """The encoder of an encoder-decoder model: text or sound in, last_hidden_state out."""
    model = found.model
    encoder = model.get_encoder()
    if model.main_input_name == "input_ids":
        specs, sizes = text_specs(encoder, found.task), text_sizes(model.config)
    else:
        audio, sizes = audio_spec(model)
        specs = [audio]
    module = named_call(encoder, specs, task_outputs("feature-extraction", {"pooler_output"}))
    examples = functools.partial(example_tensors, specs, model.config.get_text_config())
    return Graph("encoder_model", module, specs, examples, sizes)


def decoder_graphs(found: FolderModel, encoder: Graph) -> tuple[Graph, ...]:
    """The decoder of an encoder-decoder model, for the first tokens, and for later ones with the caches of these.

    transformers.js and Optimum know the names of the inputs from Optimum's merged decoders.
    """
    model, dtype, config = found.model, float_dtype(found.model), found.model.config.get_text_config(decoder=True)
    tensors = on_device_of(model, encoder.examples(encoder.sizes[0], 0))
    with torch.no_grad():
        given = zip([spec.name for spec in encoder.specs], tensors, strict=True)
        encoded = model.get_encoder()(**dict(given), return_dict=True)
    frames = encoded.last_hidden_state
    free = any(axis != BATCH for spec in encoder.specs for axis in spec.axes.values())
    fixed = {} if free else {ENCODER_SEQUENCE: frames.shape[1]}
    axes = {0: BATCH, 1: ENCODER_SEQUENCE} if free else {0: BATCH}
    specs = [InputSpec("input_ids", (2, 5), torch.int64, {0: BATCH, 1: SEQUENCE})]
    if model.main_input_name == "input_ids":
        specs.insert(0, InputSpec("encoder_attention_mask", tuple(frames.shape[:2]), torch.int64, axes))
    first_specs = [*specs, InputSpec("encoder_hidden_states", tuple(frames.shape), dtype, axes)]
    call = functools.partial(call_encoder_decoder, type(encoded))
    first = as_module(model, first_specs, call)
    with torch.no_grad():
        answer = first(*on_device_of(model, example_tensors(first_specs, config, {}, 0)))
    lengths = {"decoder": {2: PAST}, "encoder": {2: ENCODER_SEQUENCE} if free else {}}
    next_specs = specs + [
        InputSpec(past_name(name), tuple(tensor.shape), dtype, {0: BATCH, **lengths[name.split(".")[2]]})
        for name, tensor in answer.items()
        if name.startswith("present")
    ]
    following = as_module(model, next_specs, call)
    few = on_device_of(model, example_tensors(next_specs, config, NEXT_SIZES[0] | fixed, 0))
    return tuple(
        Graph(
            file,
            module,
            inputs,
            functools.partial(example_tensors, inputs, config),
            tuple({**size, TOTAL: size[PAST] + size[SEQUENCE], **fixed} for size in sizes),
        )
        for file, module, inputs, sizes in (
            ("decoder_model", first, first_specs, FIRST_SIZES),
            ("decoder_with_past_model", following, next_specs, sizes_after_past(following, few)),
        )
    )


def sizes_after_past(decoder: nn.Module, few: Sequence[Tensor]) -> tuple[dict[str, int], ...]:
    """NEXT_SIZES, with one new token at a time where the decoder rejects `few` after a past, as ProphetNet's does."""
    try:
        call_model(decoder, few, [str(place) for place in range(len(few))])  # by position
    except RejectedInputError as error:
        LOG.warn(f"the decoder takes one token at a time after the first ones ({error})")
        return tuple({**size, SEQUENCE: 1} for size in NEXT_SIZES)
    return NEXT_SIZES


def call_encoder_decoder(answer: type, model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits for new tokens and the caches after them: at first both, later only the decoder's, which grows.

    `answer` is the class of the encoder's output: some models read more of it than the states, of which later calls
    need only the sizes.
    """
    past = list(take_past(given).values())
    own, cross = ([tensor for n, tensor in enumerate(past) if n % 4 in pair] for pair in ((0, 1), (2, 3)))
    if past:
        sizes = cross[0].shape[0], cross[0].shape[2], model.get_encoder().config.hidden_size
        given["encoder_hidden_states"] = cross[0].new_zeros(*sizes)
    output = model(
        encoder_outputs=answer(given["encoder_hidden_states"]),
        decoder_input_ids=given["input_ids"],
        past_key_values=transformers.EncoderDecoderCache(cache_of(own), cache_of(cross)),
        use_cache=True,
        return_dict=True,
        **({"attention_mask": given["encoder_attention_mask"]} if "encoder_attention_mask" in given else {}),
    )
    caches = output.past_key_values
    named = cache_tensors(caches.self_attention_cache.layers, ".decoder")
    if not past:
        named |= cache_tensors(caches.cross_attention_cache.layers, ".encoder")
    ordered = sorted(named, key=lambda name: (int(name.split(".")[1]), name))
    return {"logits": output.logits, **{name: named[name] for name in ordered}}


# ---------------------------------------------------------------------------------------------------------------------
# inputs and the reference: what a model is called with, which axes are free, and PyTorch's own answers
#
# Takes a module, gives a Job with its cases, before any exporter has touched the module. Runs the model, within a
# budget.
# ---------------------------------------------------------------------------------------------------------------------

MAX_EXAMPLE_BYTES = 1 << 27  # of an input that a file records or its model suggests
# Sizes to try, most usual first, where the first layer tells channels but a later layer decides the size.
IMAGE_SIZES = (224, 256, 128, 64, 32, 28, 299, 512, 112, 96, 48, 24, 20, 16, 12, 8, 84, 105, 160, 192, 240, 320, 384)
SIGNAL_LENGTHS = (16000, 8000, 4096, 2048, 1024, 512, 256, 128, 100, 64, 50, 32, 16, 8)
VOLUMES = ((16, 112, 112), (16, 224, 224), (8, 112, 112), (32, 224, 224), (64, 64, 64), (32, 32, 32), (16, 16, 16))
SEQUENCE_LENGTH = 16
AXIS_NAMES = {  # by rank: the names of the axes after the batch
    2: {1: "sequence_length"},
    3: {1: "channels", 2: "time"},
    4: {1: "channels", 2: "height", 3: "width"},
    5: {1: "channels", 2: "depth", 3: "height", 4: "width"},
}
ODD_CASES = 4
FIRST_ODD_CASE = 3  # after the traced, the smaller and the larger one
GIVEN_SEED = 1  # that of the smaller case, which is the given one where the batch alone is free
# Names that a single input keeps: the ecosystem's. Any other single input is called `input`.
USUAL_NAMES = {"input_ids", "pixel_values", "input_values", "input_features"}


def first_layer(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The first layer with weights whose type tells shapes: that type's name in LAYER_SHAPES, and the layer."""
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            names = [cls.__name__ for cls in type(module).__mro__]
            name = next((n for n in (getattr(module, "original_name", ""), *names) if n in LAYER_SHAPES), None)
            if name is not None:
                return name, module
    return None


def image_shapes(layer: Any) -> Iterator[tuple[int, ...]]:
    """Shapes for a Conv2d: channels from the weight (times the groups), square images."""
    planes = layer.weight.shape[1] * getattr(layer, "groups", 1)
    return ((1, planes, size, size) for size in IMAGE_SIZES)


def recurrent_shapes(layer: Any) -> Iterator[tuple[int, ...]]:
    """Shapes for an LSTM, GRU or RNN; the batch is the second axis unless batch_first."""
    features = layer.weight_ih_l0.shape[1]
    first = getattr(layer, "batch_first", False)
    yield (1, SEQUENCE_LENGTH, features) if first else (SEQUENCE_LENGTH, 1, features)


def flat_shapes(layer: Any) -> Iterator[tuple[int, ...]]:
    """Shapes for a Linear layer: rows of features, then sequences of them."""
    features = layer.weight.shape[1]
    yield from ((1, features), (1, SEQUENCE_LENGTH, features))


# The first layer's type tells the shapes to try, in this order.
LAYER_SHAPES: dict[str, Callable[[Any], Iterable[tuple[int, ...]]]] = {
    "Conv2d": image_shapes,
    "ConvTranspose2d": lambda layer: ((1, layer.weight.shape[0], size, size) for size in (1, 4, 7, 8, 16, 32, 64)),
    "Conv1d": lambda layer: ((1, layer.weight.shape[1], size) for size in SIGNAL_LENGTHS),
    "Conv3d": lambda layer: ((1, layer.weight.shape[1], *volume) for volume in VOLUMES),
    "Linear": flat_shapes,
    "Embedding": lambda _: ((1, SEQUENCE_LENGTH),),
    "EmbeddingBag": lambda _: ((1, SEQUENCE_LENGTH),),
    "LSTM": recurrent_shapes,
    "GRU": recurrent_shapes,
    "RNN": recurrent_shapes,
    "MultiheadAttention": lambda layer: ((1, SEQUENCE_LENGTH, layer.out_proj.weight.shape[0]),),
    "BatchNorm1d": lambda layer: ((1, layer.weight.shape[0]), (1, layer.weight.shape[0], 128)),
    "BatchNorm2d": lambda layer: ((1, layer.weight.shape[0], size, size) for size in IMAGE_SIZES),
    "LayerNorm": lambda layer: ((1, *layer.weight.shape), (1, SEQUENCE_LENGTH, *layer.weight.shape)),
}


def torchvision_weights(model: nn.Module, class_name: str | None) -> Any:
    """Torchvision's published weights for this model, whose metadata tell size and preprocessing; None where unknown.

    With no `class_name` (a complete model), the weights whose recorded number of parameters is the model's.
    """
    from enum import Enum

    module = sys.modules.get(type(model).__module__)
    if not type(model).__module__.startswith("torchvision.models.") or module is None:
        return None
    if class_name is not None and ":" not in class_name:
        return next(iter(reversed(list(import_library("torchvision.models").get_model_weights(class_name)))), None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    enums = [value for name, value in vars(module).items() if name.endswith("_Weights") and issubclass(value, Enum)]
    return next((item for enum in enums for item in enum if item.meta.get("num_params") == parameters), None)


MAX_IMAGE_EDGE = 2560  # pixels, or channels: the widest that a known processor makes
MAX_STATISTIC = 1e6  # of a mean or a deviation


def image_edges(value: object) -> tuple[int, ...] | None:
    """Sizes of images from a file or an object of its; None where they are none."""
    edges = plain_numbers([value] if type(value) is int else value, 1, MAX_IMAGE_EDGE, whole=True)
    return edges if edges and len(edges) <= 3 else None


def statistics(value: object) -> tuple[float, ...] | None:
    """A mean or deviation for each channel; None where it is none."""
    return plain_numbers(value, -MAX_STATISTIC, MAX_STATISTIC)


def preprocessing(model: nn.Module, class_name: str | None) -> Preprocessing:
    """Size (pixels), mean and std of the images the model was made for, where its library says so; else empty."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and (size := image_edges(config.get("input_size"))):
        return Preprocessing(size, statistics(config.get("mean")), statistics(config.get("std")), "timm pretrained_cfg")
    weights = torchvision_weights(model, class_name)
    if weights is None:
        return Preprocessing()
    transforms = weights.transforms()
    size = image_edges(getattr(transforms, "crop_size", None)) or image_edges(getattr(transforms, "resize_size", None))
    mean, std = (statistics(getattr(transforms, name, None)) for name in ("mean", "std"))
    return Preprocessing(size, mean, std, f"torchvision {weights}")


def library_guess(model: nn.Module, known: Preprocessing) -> Iterator[Guess]:
    """Shapes from the library's metadata and from the model's own image_size."""
    layer = first_layer(model)
    own = image_edges(getattr(model, "image_size", None)) or image_edges(getattr(model, "img_size", None))
    sizes = known.size or own
    if sizes is None or layer is None or layer[0] != "Conv2d":
        return
    planes = next(iter(image_shapes(layer[1])))[1]
    yield Guess([InputShape((1, planes, *(sizes * 2)[-2:]))], known.source or "the model's image size")


def input_guesses(model: nn.Module, loaded: Loaded, known: Preprocessing) -> Iterator[Guess]:
    """What the model tells about its inputs, the surest first; the spec's 1,3,224,224 last."""
    if loaded.examples:
        yield Guess(list(loaded.examples), "the inputs recorded in the file")
        return
    trained = loaded.around.get("train_args")  # ultralytics
    edges = image_edges(trained.get("imgsz")) if isinstance(trained, Mapping) and not known.size else None
    if edges:
        known = known._replace(size=edges, source="the checkpoint's train_args.imgsz")
    for guess in layer_guesses(model, known):
        if 4 * sum(math.prod(shape.dims) for shape in guess.shapes) <= MAX_EXAMPLE_BYTES:
            yield guess
    yield Guess([InputShape((1, 3, 224, 224))], "no layer of the model, so it is the default")


def layer_guesses(model: nn.Module, known: Preprocessing) -> Iterator[Guess]:
    """What the library's metadata and the first layer tell."""
    yield from library_guess(model, known)
    layer = first_layer(model)
    if layer is not None:
        name, module = layer
        integer = "int64" if name.startswith("Embedding") else None
        recurrent = name in ("LSTM", "GRU", "RNN") and not getattr(module, "batch_first", False)
        for dims in LAYER_SHAPES[name](module):
            yield Guess([InputShape(tuple(dims), None, integer)], f"the first layer ({name})", 1 if recurrent else 0)


def name_inputs(model: nn.Module, shapes: Sequence[InputShape], dtype: torch.dtype) -> list[InputSpec]:
    """Give every shape a name (the user's, else `input`, else forward's) and a dtype."""
    names, _ = forward_parameters(model)
    if len(shapes) == 1 and not set(names[:1]) & USUAL_NAMES and not takes_keywords_only(model):
        names = ["input"]
    names += [f"input_{index}" for index in range(len(names), len(shapes))]
    return [
        InputSpec(shape.name or name, shape.dims, getattr(torch, shape.dtype) if shape.dtype else dtype)
        for shape, name in zip(shapes, names, strict=False)
    ]


def free_axes(specs: Sequence[InputSpec], loaded: Loaded, options: Options, batch_axis: int) -> list[InputSpec]:
    """Mark the batch and --dynamic-axes as free, or the axes that an exported program leaves free.

    Axes of one name have one size, in every input. Raises UsageError for an axis that is not there.
    """
    wanted = list(itertools.chain.from_iterable(options.dynamic_axes or ()))
    for free in wanted:
        check_axis(free, specs)
    if loaded.free and not wanted and not options.static:
        return program_axes(specs, loaded.free)
    result = []
    for spec in specs:
        axes: dict[int, str] = {}
        has_batch = batch_axis < len(spec.dims) and spec.dims[batch_axis] == specs[0].dims[batch_axis]
        if has_batch and not options.static:
            axes[batch_axis] = BATCH
        for axis, label, input_name in wanted:
            if input_name in (None, spec.name):
                axes[axis] = label or (BATCH if axis == batch_axis else axis_name(spec, axis))
        result.append(spec._replace(axes=dict(sorted(axes.items()))))
    return result


def check_axis(wanted: DynamicAxis, specs: Sequence[InputSpec]) -> None:
    """Raise UsageError where no input has the axis."""
    if wanted.input_name is not None and wanted.input_name not in {spec.name for spec in specs}:
        names = ", ".join(spec.name for spec in specs)
        raise UsageError(f"--dynamic-axes: there is no input {wanted.input_name}; there is {names}")
    for spec in specs:
        if wanted.input_name in (None, spec.name) and wanted.axis >= len(spec.dims):
            shape = shape_text(spec.dims)
            raise UsageError(f"--dynamic-axes: {spec.name} is {shape} and has no axis {wanted.axis}")


def axis_name(spec: InputSpec, axis: int) -> str:
    """The usual name of an axis that is not the batch."""
    return AXIS_NAMES.get(len(spec.dims), {}).get(axis, f"dim_{axis}")


def program_axes(specs: Sequence[InputSpec], free: Sequence[Mapping[int, str]]) -> list[InputSpec]:
    """Name the free axes of an exported program; a symbol that stands at several places gets one name."""
    names: dict[str, str] = {}
    for spec, symbols in zip(specs, free, strict=True):
        for axis, symbol in symbols.items():
            name = BATCH if axis == 0 else axis_name(spec, axis)
            names.setdefault(symbol, f"{spec.name}_{name}" if name in names.values() else name)
    return [
        spec._replace(axes={axis: names[symbol] for axis, symbol in symbols.items()})
        for spec, symbols in zip(specs, free, strict=True)
    ]


# What the inputs are usually drawn from, and what is tried where PyTorch rejects that or answers with NaN.
DOMAINS = {
    "": "normal",
    "lengths": "positive and falling integers, as lengths are",
    "0 to 1": "numbers from 0 to 1",
    "your data": "those of --verify-data",
}
# What the inputs are drawn from, beside the usual values: branches, integer arithmetic and saturating functions show
# their other sides there. PyTorch decides which of these a model takes.
VALUE_SETS = ("zeros", "negative values", "0 to 255", "large values", "repeated values")
LARGE = 1e3  # of float values; a layer of sums makes some 1e4 of it, which float16 still holds
LARGE_INTEGER = 1000  # of integers wider than 16 bits: a model may count to it
VALUES_SECONDS = 4  # that PyTorch may take for all sets together: few ones are enough for a large model
MAX_LABELLED = 4  # inputs whose shapes are told in messages


class Domain(NamedTuple):
    """What inputs are drawn from: a key of DOMAINS, and the numbers that some inputs have whatever it is."""

    kind: str = ""
    given: Mapping[str, Sequence[float]] = MappingProxyType({})


USUAL_DOMAIN = Domain()


def make_inputs(  # noqa: PLR0913
    specs: Sequence[InputSpec],
    highest: int | None,
    sizes: Mapping[str, int],
    seed: int,
    values: str = "",
    *,
    domain: Domain = USUAL_DOMAIN,
) -> list[Tensor]:
    """Seeded inputs: normal, uniform and shifted values in turn, so that no branch on a mean or sign goes unseen.

    `values`: one of VALUE_SETS instead. `domain` is for models that do not take the usual values. Integers stay below
    `highest`, if there is one; as lengths they reach from the second axis of other inputs down. Given numbers are
    repeated to the input's size; falling ones fall.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for spec in specs:
        shape = spec.resized(sizes)
        if spec.name in domain.given:
            numbers = np.array(domain.given[spec.name])
            filled = np.resize(numbers, shape)
            drawn = torch.from_numpy(-np.sort(-filled) if (np.diff(numbers) < 0).all() else filled)
        elif values:
            drawn = unusual_values(spec, shape, values, generator)
        elif spec.dtype.is_floating_point and domain.kind == "0 to 1":
            drawn = torch.rand(shape, generator=generator) * 0.98 + 0.01
        elif spec.dtype.is_floating_point:
            drawn = torch.randn(shape, generator=generator) if seed % 3 != 1 else torch.rand(shape, generator=generator)
            drawn = drawn - 1 if seed % 3 == 2 else drawn
        elif spec.dtype is torch.bool or "mask" in spec.name:
            drawn = (torch.rand(shape, generator=generator) < 0.5).to(spec.dtype)
            for place, value in enumerate((False, True)[: shape[-1] if shape else 0]):
                drawn[..., place] = value  # whichever of the two means "ignore", something is left to attend to
        elif domain.kind == "lengths":
            longest = min((n for other in specs for n in other.resized(sizes)[1:2]), default=1)
            drawn = torch.randint(1, longest + 1, shape, generator=generator).sort(descending=True).values
            drawn[..., :1] = longest
        else:
            limit = min(highest or 2, torch.iinfo(spec.dtype).max)
            drawn = torch.randint(0, limit, shape, generator=generator)
        result.append(drawn.to(spec.dtype))
    return result


def unusual_values(spec: InputSpec, shape: Sequence[int], values: str, generator: torch.Generator) -> Tensor:
    """Values of one of VALUE_SETS for an input, as far as its dtype has them."""
    if spec.dtype is torch.bool or "mask" in spec.name:
        return torch.full(shape, values != "zeros")
    if spec.dtype.is_floating_point:
        normal, coin = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.5
        return {
            "zeros": torch.where(coin, 0.0, -0.0),
            "negative values": -10 * normal.abs(),
            "0 to 255": torch.randint(0, 256, shape, generator=generator).float(),
            "large values": LARGE * normal,
            "repeated values": torch.randint(-2, 3, shape, generator=generator) / 2,
        }[values]
    limits = torch.iinfo(spec.dtype)
    low, high = {
        "zeros": (0, 0),
        "negative values": (-100, -1),
        "0 to 255": (0, 255),
        "large values": (-LARGE_INTEGER, LARGE_INTEGER) if limits.bits > 16 else (limits.min, limits.max),
        "repeated values": (-2, 2),
    }[values]
    low, high = max(low, limits.min), min(max(high, 0), limits.max)
    return torch.randint(low, high + 1, shape, generator=generator)


def highest_index(model: nn.Module) -> int | None:
    """Integer inputs stay below this, the number of rows of the smallest embedding; None where there is none."""
    return min(
        (m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))), default=None
    )


class ValueWatch:
    """Notes where the model's code makes Python values of tensors' values, which a trace keeps as they are.

    Sizes are Python's own numbers when a model is just run, so that these are not noted.
    """

    READS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist")

    def __init__(self) -> None:
        self.decisions: dict[str, list[str]] = {}  # the values that a source line read, in their order

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs in context, in this thread."""
        reads = [getattr(torch.Tensor, name) for name in self.READS]

        def call(function: Any, args: Any, kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            if function in reads and (frame := model_frame(sys._getframe())):  # noqa: SLF001
                place = f"{os.path.basename(frame.f_code.co_filename)}({frame.f_lineno})"  # noqa: PTH119
                self.decisions.setdefault(place, []).append(shown(value))
            return value

        with torch_calls(call):
            yield


class Reference:
    """Calls the model at chosen sizes and keeps its answers as cases."""

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[InputSpec],
        options: Options,
        examples: Examples | None = None,
        *,
        domain: Domain = USUAL_DOMAIN,
    ) -> None:
        self.model, self.specs, self.device = model, list(specs), options.device
        self.names = [spec.name for spec in specs]
        self.bytes, self.later_bytes = free_bytes(options, RUN_BYTES), free_bytes(options, LATER_BYTES)
        self.examples: Callable[..., list[Tensor]] = examples or functools.partial(
            make_inputs, self.specs, highest_index(model), domain=domain
        )

    def tensors(self, sizes: Mapping[str, int], seed: int, values: str = "") -> list[Tensor]:
        """Example inputs at `sizes`, of one of VALUE_SETS where that is given."""
        drawn = self.examples(sizes, seed, values) if values else self.examples(sizes, seed)
        return [tensor.to(self.device) for tensor in drawn]

    def run(self, sizes: Mapping[str, int], seed: int, values: str = "", *, watched: bool = False) -> Case:
        """PyTorch's answer at `sizes`; raises RejectedInputError where the model does not accept them.

        `watched`: what the model's code decides by values is noted in the case.
        """
        watch = ValueWatch()
        before, advice = memory_bytes("VmRSS"), "pass --input-shape, or --run-timeout"
        with memory_bound(self.bytes, "running the model at guessed sizes", advice, RUNS.start):
            inputs = self.tensors(sizes, seed, values)
            given = dict(zip(self.names, map(to_numpy, inputs), strict=True))  # before a model writes into its inputs
            with watch.watching() if watched else contextlib.nullcontext():
                outputs = call_model(self.model, inputs, self.names)
        if self.bytes and self.later_bytes:
            taken = memory_bytes("VmHWM") - before
            self.bytes = max(self.bytes, min(LATER_FACTOR * taken, self.later_bytes))
        few = list(given.items())[:MAX_LABELLED]  # not the keys and values of every layer
        label = " ".join(f"{name}:{shape_text(array.shape)}" for name, array in few) + f" ({values})" * bool(values)
        return Case(label, given, {name: to_numpy(tensor) for name, tensor in outputs.items()}, watch.decisions, values)


def check_deterministic(reference: Reference, first: Case, sizes: Mapping[str, int], seed: int) -> None:
    """Call the model a second time with the same inputs; raises ConversionError (VERIFY) where the answers differ.

    This time nobody watches it, so that watching cannot change an answer unnoticed.
    """
    relative, absolute = tolerances(reference.model)  # half precision depends on the kernel that is chosen

    def same(one: Case, other: Case) -> bool:
        return one.outputs.keys() == other.outputs.keys() and all(
            value.shape == other.outputs[name].shape
            and np.allclose(value, other.outputs[name], relative, absolute, equal_nan=True)
            for name, value in one.outputs.items()
        )

    if same(first, reference.run(sizes, seed)):
        return

    def drawn(start: int) -> Case:
        torch.manual_seed(start)
        return reference.run(sizes, seed)

    third, other = drawn(0), drawn(1)
    if same(third, drawn(0)) and not same(third, other):
        why = "it draws random numbers in eval mode; make its dropout or noise depend on self.training"
    else:
        why = "it changes its own state when it is called; make that state an input and an output"
    raise ConversionError(
        ExitStatus.VERIFY, f"PyTorch itself gives two answers for the same input, so no ONNX model can be right: {why}"
    )


def is_finite(case: Case) -> bool:
    """Whether PyTorch's answers are numbers."""
    return all(np.isfinite(value).all() for value in case.outputs.values() if value.dtype.kind in "fc")


def check_finite(case: Case) -> None:
    """Raises ConversionError (VERIFY) where PyTorch's own outputs hold NaN or Inf; warns where they prove little."""
    for name, value in case.outputs.items():
        if value.size and value.dtype.kind == "f" and not np.isfinite(value).all():
            kind = "NaN" if np.isnan(value).any() else "infinite values"
            raise ConversionError(
                ExitStatus.VERIFY,
                f"PyTorch's own output {name!r} holds {kind} for random {case.label}, so nothing can be compared; "
                "give inputs that the model is for (--verify-data, --input-value), or check the weights; "
                "--no-verify exports without proof",
            )


INDEXED = re.compile(r"slices|indices|subscriptable|string|\bstr\b|'?keys?'?|unpack|iterat")  # as a dict or list is
# Names of inputs that are whole numbers, where the dtype is not given.
WHOLE_NUMBERS = re.compile(r"ids?$|tok|text|len|label|ind(ex|ices)|idx|^(src|tgt|steps?|size)$", re.IGNORECASE)


def propose_inputs(model: nn.Module, loaded: Loaded, known: Preprocessing, options: Options) -> Iterator[Guess]:
    """The user's shapes, or what the model tells; raises UsageError where the number cannot be right."""
    names, required = forward_parameters(model)
    shapes = given_shapes(names, options)
    missing = [name for name in names[:required] if name not in {shape.argument for shape in shapes}]
    if options.input_shape or (shapes and not missing):
        count = len({shape.argument or index for index, shape in enumerate(shapes)})
        if not required <= count <= (len(names) or count):
            wanted = ", ".join(names[:required]) or "none"
            raise UsageError(f"--input-shape gives {plural(count, 'input')}, the model needs {required} ({wanted})")
        recurrent = next(iter(input_guesses(model, loaded, known))).batch_axis
        batch_axis = recurrent if len(shapes[0].dims) > recurrent else 0
        yield Guess(shapes, "--input-shape", batch_axis)
        untyped = [shape for shape in shapes if shape.dtype is None]
        whole = [shape for shape in untyped if WHOLE_NUMBERS.search(str(shape.name))]
        for changed in ([whole] if 0 < len(whole) < len(untyped) else []) + ([untyped] if untyped else []):
            typed = [shape._replace(dtype="int64") if shape in changed else shape for shape in shapes]
            yield Guess(typed, "--input-shape, with int64 numbers", batch_axis)
        return
    if required > 1 and len(loaded.examples) < required:
        example = " ".join(f"{name}:SHAPE" for name in missing)
        raise UsageError(
            f"the model takes {required} inputs ({', '.join(names[:required])}): pass --input-shape {example}, "
            "each SHAPE such as 1,16 or 1,16:int64"
        )
    yield from input_guesses(model, loaded, known)


def given_shapes(names: Sequence[str], options: Options) -> list[InputShape]:
    """What --input-shape and --input-value say of the inputs, in the order of forward's `names`.

    Several names of which forward knows none are the entries of its one argument, a dict.
    """
    shapes = list(options.input_shape or ())
    if len(names) == 1 < len(shapes) and all(shape.name and "." not in shape.name for shape in shapes):
        shapes = [shape._replace(name=f"{names[0]}.{shape.name}") for shape in shapes]
    unnamed = (name for name in names if name not in {shape.name for shape in shapes})
    if options.input_value:
        shapes = [shape if shape.name else shape._replace(name=next(unnamed, None)) for shape in shapes]
    for name, numbers in options.input_value:
        if all(shape.name != name for shape in shapes):
            dtype = "int64" if all(isinstance(number, int) for number in numbers) else None
            shapes.append(InputShape((len(numbers),), name, dtype))
    order = {name: place for place, name in enumerate(names)}
    return sorted(shapes, key=lambda shape: order.get(shape.argument, -1)) if order else shapes


def domains(specs: Sequence[InputSpec], options: Options, samples: Mapping[str, Arrays]) -> Iterator[Domain]:
    """What to draw the inputs from, most usual first."""
    given = dict(options.input_value)
    yield Domain("", given)
    if any(spec.dtype in (torch.int64, torch.int32) and spec.name not in given for spec in specs):
        yield Domain("lengths", given)
    yield Domain("0 to 1", given)
    for sample in itertools.islice(samples.values(), 1):
        numbers = {spec.name: sample[spec.name].ravel() for spec in specs if spec.name in sample}
        if numbers and all(array.size for array in numbers.values()):
            yield Domain("your data", {**numbers, **given})


def probed_batch_axis(model: nn.Module, specs: list[InputSpec], guess: Guess, options: Options, domain: Domain) -> int:
    """Which of the first two axes is the batch, where the rank leaves that open: the one whose rows do not mix.

    PyTorch shows it: of two inputs that differ in the first row only, the answers differ in the first row only. Where
    neither axis is so, the guess stays.
    """
    if len(specs[0].dims) not in (2, 3) or not specs[0].dtype.is_floating_point or guess.batch_axis < 0:
        return guess.batch_axis
    for axis in (0, 1):
        if rows_are_independent(model, specs, axis, options, domain):
            if axis or guess.batch_axis:
                LOG.info(f"batch: axis {axis} of {specs[0].name}, along which PyTorch's answers are independent")
            return axis
    return guess.batch_axis


def rows_are_independent(model: nn.Module, specs: list[InputSpec], axis: int, options: Options, domain: Domain) -> bool:
    """Whether each row along `axis` of the inputs has an answer of its own, and every output an axis that follows."""
    size = specs[0].dims[axis]
    free = [
        spec._replace(axes={axis: BATCH} if spec.dims[axis : axis + 1] == (size,) else {}) for spec in specs
    ]  # as in free_axes
    usual = Reference(model, free, options, domain=domain)

    def first_row_changed(sizes: Mapping[str, int], seed: int) -> list[Tensor]:
        first, *others = usual.tensors(sizes, seed)
        first.select(axis, 0).mul_(-2.0).add_(1.0)
        return [first, *others]

    try:
        three, four = usual.run({BATCH: 3}, 0), usual.run({BATCH: 4}, 0)
        changed = Reference(model, free, options, first_row_changed).run({BATCH: 3}, 0)
    except RejectedInputError:
        return False
    same = three.outputs.keys() == four.outputs.keys() == changed.outputs.keys()
    for name, value in three.outputs.items() if same else ():
        pairs = zip(value.shape, four.outputs[name].shape, strict=False)
        grown = [place for place, pair in enumerate(pairs) if pair == (3, 4)]
        other = changed.outputs[name]
        if len(grown) != 1 or value.shape != other.shape:
            return False
        rest = np.take(value, (1, 2), grown[0]), np.take(other, (1, 2), grown[0])
        if not np.allclose(*rest, 1e-4, 1e-5, equal_nan=True) or np.array_equal(value, other):
            return False
    return same and bool(three.outputs)


def settle_inputs(
    model: nn.Module, loaded: Loaded, known: Preprocessing, options: Options, samples: Mapping[str, Arrays]
) -> tuple[Reference, Case]:
    """The first proposed inputs that the model accepts, and its answer at exactly those sizes.

    Raises UsageError (or InputError, where the model itself is the matter) if it accepts none.
    """
    dtype = float_dtype(model)
    rejected: list[tuple[Guess, RejectedInputError]] = []
    for guess in propose_inputs(model, loaded, known, options):
        named, unclear = name_inputs(model, guess.shapes, dtype), None
        for domain in domains(named, options, samples):
            batch_axis = guess.batch_axis
            if not options.static:
                batch_axis = probed_batch_axis(model, named, guess, options, domain)
            reference = Reference(model, free_axes(named, loaded, options, batch_axis), options, domain=domain)
            try:
                case = reference.run({}, GIVEN_SEED, watched=True)
                finite = is_finite(case) and is_finite(reference.run({}, 0))  # uniform values, and normal ones
            except RejectedInputError as error:
                rejected.append((guess, error))
                continue
            unclear = (reference, case, domain)
            if finite:
                break
        if unclear is None:
            continue
        reference, case, domain = unclear
        if domain.kind:
            LOG.info(f"values: {DOMAINS[domain.kind]}, since PyTorch does not take others")
        if not options.input_shape:
            LOG.info(f"input: {' '.join(map(str, guess.shapes))}, told by {guess.reason} (--input-shape overrides)")
        for name in sorted(domain.given):
            LOG.warn(f"input {name}: its values are the same in every check, so other values are not verified")
        check_deterministic(reference, case, {}, GIVEN_SEED)
        return reference, case
    raise no_inputs_accepted(model, rejected, options)


def no_inputs_accepted(
    model: nn.Module, rejected: Sequence[tuple[Guess, RejectedInputError]], options: Options
) -> ConversionError:
    """Why the model accepts none of the inputs tried, and what to pass."""
    guess, failure = rejected[0]
    if isinstance(failure.__cause__, AttributeError):
        return InputError(
            f"the model cannot run: {failure}; was it saved with another version of its library? "
            "Install that version, or save a state dict"
        )
    tried = " ".join(map(str, guess.shapes))
    names, _ = forward_parameters(model)
    if options.input_shape:
        advice = (
            "pass the right --input-shape; if it is right, pass values that the model takes: --input-value NAME=5,3"
        )
        advice += ", or an example with --verify-data"
    else:
        advice = f"pass the right --input-shape, such as {tried}"
    if INDEXED.search(str(failure)) and names:
        advice += f"; entries of a dict or list are {names[0]}.KEY:1,4 or {names[0]}.0:1,4"
    return UsageError(f"the model does not accept {tried}: {failure}; {advice}")


def check_outputs(case: Case) -> None:
    """Raises ConversionError (EXPORT) for a model without tensor outputs; warns of outputs that prove little."""
    if not case.outputs:
        raise ConversionError(ExitStatus.EXPORT, "the model returns no tensor; wrap it so that forward returns tensors")
    for name, value in case.outputs.items():
        if value.size == 0:
            LOG.warn(f"output {name!r} is empty for random input: comparing it proves its shape only")
        elif value.size > 1 and (value == value.flat[0]).all():
            LOG.warn(
                f"output {name!r} is {value.flat[0]} everywhere: comparing it proves little (is the model trained?)"
            )


def other_sizes(size: int, *, larger: bool, turn: int) -> list[int]:
    """Sizes to try beside `size`; `turn` makes two axes of one input differ, so that swapping them shows."""
    steps = (32, 64, 16, 8, 2, 1) if turn % 2 == 0 else (64, 32, 16, 8, 2, 1)
    return [size + step if larger else size - step for step in steps if larger or size > step]


def read_samples(path: Path) -> dict[str, Arrays]:
    """The user's own inputs by the names of their files: an .npz file, or all in a directory; raises UsageError."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    samples: dict[str, Arrays] = {}
    for file in files:
        admit(file)
        try:
            with open_input(file) as content, np.load(content, allow_pickle=False) as arrays:
                samples[file.name] = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
        except (ConversionError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            raise UsageError(f"--verify-data: {file} is no .npz file of plain arrays (numpy.savez)") from None
    if not samples or not all(samples.values()):
        raise UsageError(
            f"--verify-data: {path} holds no arrays; save them with numpy.savez(FILE, name_of_input=array)"
        )
    return samples


def shapes_of(sample: Arrays, model: nn.Module) -> list[InputShape]:
    """What --input-shape would say of a sample, in the order of forward's arguments where these have its names."""
    names, _ = forward_parameters(model)
    ordered = sorted(sample, key=lambda name: names.index(name) if name in names else len(names))
    return [
        InputShape(
            sample[name].shape,
            None if len(sample) == 1 and name not in names else name,  # such as arr_0
            None if sample[name].dtype.kind == "f" else str(sample[name].dtype),  # floats become the model's
        )
        for name in ordered
    ]


def sample_case(file: str, sample: Arrays, reference: Reference, options: Options, *, watched: bool = True) -> Case:
    """PyTorch's answer for a sample of the user's; raises UsageError where it does not fit the inputs."""
    specs, fits = reference.specs, "name arrays as the inputs"
    if len(sample) == len(specs) == 1:
        sample = {specs[0].name: next(iter(sample.values()))}
    if sample.keys() != {spec.name for spec in specs}:
        wanted = ", ".join(spec.name for spec in specs)
        raise UsageError(f"--verify-data: {file} has {and_more(sample, 6)}, the model takes {wanted}; {fits}")
    sizes: dict[str, int] = {}
    for spec in specs:
        shape = sample[spec.name].shape
        if len(shape) == len(spec.dims):
            sizes |= {symbol: shape[axis] for axis, symbol in spec.axes.items()}
        if spec.resized(sizes) != shape:
            what = f"{spec.name} is {shape_text(shape)} in {file}, and {shape_text(spec.dims)} in the graph"
            raise UsageError(f"--verify-data: {what}; pass --dynamic-axes with the axes that may differ")

    def tensors(*_: object) -> list[Tensor]:
        return [torch.from_numpy(sample[spec.name]).to(spec.dtype) for spec in specs]

    try:
        case = Reference(reference.model, specs, options, tensors).run(sizes, 0, watched=watched)
    except RejectedInputError as error:
        raise UsageError(f"--verify-data: the model does not accept {file}: {error}") from error.__cause__
    check_finite(case)
    return case._replace(label=f"{case.label} ({SAMPLE} {file})", values=f"{SAMPLE} {file}")


def plan_module(
    model: nn.Module,
    loaded: Loaded,
    known: Preprocessing,
    options: Options,
    samples: Mapping[str, Arrays] = MappingProxyType({}),
) -> Job:
    """Settle the inputs, find out which axes really are free, and take PyTorch's answers at several sizes.

    And for several kinds of values, and the user's own `samples`.
    """
    reference, given = settle_inputs(model, loaded, known, options, samples)
    base = {name: spec.dims[axis] for spec in reference.specs for axis, name in spec.axes.items()}
    fixed = None  # the same with no other batch, where nobody asked for one
    if BATCH in base and not batch_is_explicit(options):
        fixed = functools.partial(plan_module, model, loaded, known, fixed_batch(options, reference.specs), samples)
    small, large = smaller_and_larger(reference, base, given)
    try:
        cases = size_cases(reference, base, small, large, given)
    except UsageError:
        if fixed is None:
            raise
        why = "the model rejects other batch sizes, or returns other outputs"
        LOG.warn(f"the batch axis is fixed at {base[BATCH]}: {why}")
        return fixed()
    check_outputs(given)
    for case in cases:
        check_finite(case)
    if not options.no_verify:
        cases += value_cases(reference, {**base, BATCH: 1} if BATCH in base else base, given)
        check_deterministic(reference, given, {}, GIVEN_SEED)  # once more, after other inputs
        cases += [sample_case(file, sample, reference, options) for file, sample in samples.items()]
    traced = reference.tensors({name: max(2, size) for name, size in base.items()}, seed=0)
    return Job(
        model,
        reference.specs,
        list(given.outputs),
        traced,
        cases,
        options.output.name,
        with_fixed_batch=fixed,
    )


def smaller_and_larger(
    reference: Reference, base: Mapping[str, int], given: Case
) -> tuple[dict[str, int], dict[str, int]]:
    """Two other sizes for each free axis besides the batch; raises UsageError where the model accepts none."""
    small, large = dict(base), dict(base)
    for turn, name in enumerate(name for name in base if name != BATCH):
        for sizes, larger in ((small, False), (large, True)):
            tries = other_sizes(base[name], larger=larger, turn=turn)
            sizes[name] = accepted_size(reference, base, name, tries, given)
    return small, large


def size_cases(
    reference: Reference, base: Mapping[str, int], small: Mapping[str, int], large: Mapping[str, int], given: Case
) -> list[Case]:
    """PyTorch's answers at several sizes; raises UsageError where the model does not accept them."""
    batch, cases = base.get(BATCH, 1), []
    shapes: list[tuple[Mapping[str, int], tuple[int, ...]]] = [
        (base, (max(2, batch),)),
        (small, (1, 4)),
        (large, tuple(size for size in (3, 5) if size != batch)),  # neither the given one nor 1, which broadcasts
        *((sizes, (batch,)) for sizes in uneven_sizes(base)),
    ]
    for seed, (sizes, batches) in enumerate(shapes):
        same = seed == GIVEN_SEED and sizes == base and batch in batches[:1]
        case = given if same else accepted_case(reference, sizes, batches if BATCH in base else (1,), seed, given)
        if case is not None:
            cases.append(case)
        elif seed < FIRST_ODD_CASE:  # the model may want multiples of something
            raise UsageError(f"the model does not accept the sizes {sizes}; pass other --dynamic-axes, or --static")
    return cases


def value_cases(reference: Reference, sizes: Mapping[str, int], given: Case, *, watched: bool = True) -> list[Case]:
    """PyTorch's answers for each of VALUE_SETS that it takes, and has finite answers for."""
    cases, start = [], time.monotonic()
    for seed, values in enumerate(VALUE_SETS):
        with contextlib.suppress(RejectedInputError, DamagedFileError, AttemptError):  # not in the model's domain
            case = reference.run(sizes, seed, values, watched=watched)
            if is_finite(case) and case.outputs.keys() == given.outputs.keys():
                cases.append(case)
        if time.monotonic() - start > VALUES_SECONDS:
            break
    return cases


def uneven_sizes(base: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """More sizes for the free axes besides the batch, seeded and uneven: rounding hits some sizes and spares others."""
    import random

    chance = random.Random(0)  # noqa: S311  (not for secrets)
    names = [name for name in base if name != BATCH]
    for _ in range(ODD_CASES if names else 0):
        yield {**base, **{name: chance.randint(max(1, base[name] // 2), base[name]) for name in names}}


def accepted_case(
    reference: Reference, sizes: Mapping[str, int], batches: Iterable[int], seed: int, given: Case
) -> Case | None:
    """The answer at `sizes` and the first of `batches` that the model accepts and answers with `given`'s outputs."""
    for batch in batches:
        with contextlib.suppress(RejectedInputError):
            case = reference.run({**sizes, BATCH: batch}, seed, watched=True)
            if case.outputs.keys() == given.outputs.keys():
                return case
    return None


def accepted_size(reference: Reference, base: Mapping[str, int], name: str, tries: Iterable[int], given: Case) -> int:
    """The first of `tries` that the model accepts for the axis `name`; raises UsageError for none."""
    for size in tries:
        if accepted_case(reference, {**base, name: size}, (base.get(BATCH, 1),), 0, given) is not None:
            return size
    if any(size > base[name] for size in tries):
        raise UsageError(f"--dynamic-axes: the model accepts no other {name} than {base[name]}; leave that axis out")
    return base[name]


def batch_is_explicit(options: Options) -> bool:
    """Whether the user named the batch axis: then a batch that cannot vary is an error, not a note."""
    return any(axis.axis == 0 for axis in itertools.chain.from_iterable(options.dynamic_axes or ()))


def fixed_batch(options: Options, specs: Sequence[InputSpec]) -> Options:
    """The same options with a batch axis that is not free; the other free axes stay."""
    axes = [[DynamicAxis(axis, name, spec.name) for axis, name in spec.axes.items() if name != BATCH] for spec in specs]
    shapes = [InputShape(spec.dims, spec.name, dtype_name(spec.dtype)) for spec in specs]
    return replace(options, static=True, dynamic_axes=axes, input_shape=shapes)


# ---------------------------------------------------------------------------------------------------------------------
# the exporters
#
# Takes a Job and an Attempt, gives a graph (ir.Model). The TorchScript exporter is faster and writes opsets 7 to 20;
# the torch.export one ("dynamo") knows more operators, at 18 and up. They fail on different models, so the next one
# is tried when the first one's graph is wrong.
# ---------------------------------------------------------------------------------------------------------------------

GEMM_BYTES = 300 << 20  # a weight of this size is used as it lies in the checkpoint, not stored transposed
GEMM_OPSET = 10  # Slice takes its bounds as inputs from then on


def export_torchscript(flat: nn.Module, job: Job, opset: int, folder: Path) -> ir.Model:
    """Trace and export with torch.onnx's TorchScript exporter; above its newest opset, converted up from there."""
    path = folder / "export.onnx"
    if isinstance(
        job.model, (torch.jit.ScriptModule, torch.fx.GraphModule)
    ):  # the exporter's own tracing fails on them
        with RUNS.one():
            flat = torch.jit.trace(flat, tuple(job.traced), check_trace=False)
    export = functools.partial(
        torch.onnx.export,
        f=str(path),
        dynamo=False,
        opset_version=min(opset, TORCHSCRIPT_MAX_OPSET),
        output_names=job.outputs,
        dynamic_axes={spec.name: dict(spec.axes) for spec in job.specs if spec.axes},
    )
    register_symbolics()
    weights = flat.state_dict(keep_vars=True)
    with fixed_resize(), traced_sizes(), without_complex():
        model = None
        if sum(tensor.nbytes for tensor in weights.values()) >= STREAM_FROM:
            export_graph(flat, job, export)
            model = attach_weights(ir.load(path), job, weights)
        if model is None:
            with stored_weights_as(flat, in_memory):
                export(flat, tuple(job.traced), input_names=[spec.name for spec in job.specs])
            model = ir.load(path)
    if opset > TORCHSCRIPT_MAX_OPSET:
        from onnxscript.version_converter import convert_version

        convert_version(model, opset, fallback=False)
    return model


def export_graph(flat: nn.Module, job: Job, export: Callable[..., Any]) -> None:
    """Export with the weights as inputs: traced with blanks, or with their values where the model needs them.

    The exporter would fold, join and copy weights that it has.
    """
    names = [spec.name for spec in job.specs]
    if any(isinstance(tensor, stored_class()) for _, tensor in state_of(flat)):
        try:
            with weights_as_inputs(flat) as blanks:
                export(flat, (*job.traced, *blanks.values()), input_names=[*names, *blanks], do_constant_folding=False)
        except OSError:
            raise
        except Exception as error:  # whatever the model does with zeros
            raise_out_of_memory(error)
            if LOG.verbose:
                traceback.print_exc(file=LOG.stream)
            LOG.info(f"tracing needs the weights' values ({first_line(error, 100)}): they are loaded")
        else:
            return
    with stored_weights_as(flat, in_memory):
        export(flat, tuple(job.traced), input_names=names, export_params=False, do_constant_folding=False)


def attach_weights(model: ir.Model, job: Job, weights: Mapping[str, Tensor]) -> ir.Model | None:
    """Give a graph that was exported without its weights those of the model: views, read when they are written.

    The exporter itself holds several copies of all of them. A weight that is only used transposed is stored so; one
    that several names share is stored once. None where the exporter would make weights of its own: batch norms after
    convolutions become part of these.
    """
    graph, own = model.graph, {spec.name for spec in job.specs}
    norms = [node.inputs[0] for node in graph if node.op_type == "BatchNormalization"]
    if any(maker.op_type.startswith("Conv") for value in norms if value and (maker := value.producer())):
        return None
    first: dict[tuple[Any, ...], ir.Value] = {}
    for value in [value for value in graph.inputs if value.name not in own]:
        tensor = weights.get(str(value.name))
        if tensor is None:
            return None
        tensor = tensor.detach()
        value.const_value = streamed_class()(tensor, value.name)
        graph.inputs.remove(value)
        address = tensor.address() if isinstance(tensor, stored_class()) else (tensor.data_ptr(), *tensor.stride())
        place = (address, tensor.shape, tensor.dtype)
        if tensor.numel() and place in first:
            ir.convenience.replace_all_uses_with(value, first[place])
            continue
        first[place] = value
        graph.initializers.add(value)
    for value in itertools.chain.from_iterable([split_weight(graph, whole) for whole in first.values()]):
        if not store_transposed(graph, value) and model.opset_imports[""] >= GEMM_OPSET:
            multiply_as_stored(value)
    return model


@functools.cache
def streamed_class() -> Any:
    """The class of the weights that are written a block at a time (onnx-ir is imported late)."""
    from onnx_ir.tensor_adapters import TorchTensor

    class Streamed(TorchTensor):
        """A torch tensor, of any strides and stored or not, in an ONNX graph."""

        def numpy(self) -> Any:
            return TorchTensor(in_memory(self.raw), self.name).numpy()

        def tobytes(self) -> bytes:
            return b"".join(byte_blocks(self.raw))

        def tofile(self, file: Any) -> None:
            for block in byte_blocks(self.raw):
                file.write(block)
                LOG.advance(len(block))

    return Streamed


def split_weight(graph: ir.Graph, value: ir.Value) -> list[ir.Value]:
    """The weight `value` itself, or one for each of its rows where nodes only pick single ones: a layer's experts.

    ONNX Runtime would copy each row when it is picked.
    """
    picks = []
    for node in value.consumers():
        index = node.inputs[1] if node.op_type == "Gather" and node.inputs[0] is value else None
        place = ir.convenience.get_const_tensor(index) if index is not None else None
        if place is None or place.shape.rank() or node.attributes.get_int("axis", 0):
            return [value]
        picks.append((node, int(place.numpy())))
    raw, found = weight_of(value).raw, {}
    for node, row in picks:
        if row not in found:
            name = f"{value.name}.{row}"
            shape = ir.Shape(raw.shape[1:])
            part = ir.Value(name=name, shape=shape, type=value.type, const_value=streamed_class()(raw[row], name))
            found[row] = part
            graph.initializers.add(part)
        ir.convenience.replace_all_uses_with(node.outputs[0], found[row])
        remove_node(node)
    if found:
        del graph.initializers[str(value.name)]
    return list(found.values()) or [value]


def store_transposed(graph: ir.Graph, value: ir.Value) -> bool:
    """Store the weight `value` as its Transpose nodes want it, where they are all that use it and agree."""
    nodes = list(value.consumers())
    orders = {tuple(node.attributes.get_ints("perm", ())) if node.op_type == "Transpose" else None for node in nodes}
    tensor = weight_of(value)
    if len(orders) != 1 or not (order := orders.pop()) or tensor.nbytes >= GEMM_BYTES:
        return False
    turned = tensor.raw.permute(order)
    name = str(value.name)
    del graph.initializers[name]
    new = ir.Value(name=name, shape=ir.Shape(turned.shape), type=value.type, const_value=streamed_class()(turned, name))
    graph.initializers.add(new)
    for node in nodes:
        ir.convenience.replace_all_uses_with(node.outputs[0], new)
        remove_node(node)
    return True


def multiply_as_stored(value: ir.Value) -> None:
    """Let products with the transposed weight `value` be Gemm nodes, which take it as it is: no second copy of it.

    MatMul(x, Transpose(w)) is Reshape(Gemm(Reshape(x, [-1, k]), w, transB=1), [*x.shape[:-1], n]).
    """
    for transpose in list(value.consumers()):
        users = list(transpose.outputs[0].consumers())
        turned = transpose.op_type == "Transpose" and list(transpose.attributes.get_ints("perm", ())) == [1, 0]
        if not turned or not all(user.op_type == "MatMul" and user.inputs[1] is transpose.outputs[0] for user in users):
            continue
        columns, rows = weight_of(value).shape.numpy()
        for user in users:
            add = functools.partial(node_before, user)
            sizes = [add("Constant", [], value=ir.tensor(numbers)) for numbers in ([-1, rows], [0], [-1], [columns])]
            flat, start, end, last = sizes
            x = user.inputs[0]
            product = add("Gemm", [add("Reshape", [x, flat]), value], transB=1)
            leading = add("Slice", [add("Shape", [x]), start, end, start])
            result = add("Reshape", [product, add("Concat", [leading, last], axis=0)])
            result.shape, result.type = user.outputs[0].shape, user.outputs[0].type
            ir.convenience.replace_all_uses_with(user.outputs[0], result, replace_graph_outputs=True)
            remove_node(user)
        remove_node(transpose)


def node_before(place: ir.Node, operator: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
    """The output of a new node before `place`."""
    node = ir.node(operator, inputs, attributes)
    cast("ir.Graph", place.graph).insert_before(place, node)
    return node.outputs[0]


def remove_node(node: ir.Node) -> None:
    """Take a node that nothing uses any more out of its graph."""
    cast("ir.Graph", node.graph).remove(node, safe=True)


def export_dynamo(flat: nn.Module, job: Job, opset: int, folder: Path) -> ir.Model:  # noqa: ARG001
    """Export through torch.export; a ScriptModule is turned into an exported program first.

    What a free axis may be is left to torch.export; where it finds none, or fixes it, the axis is told by name.
    """
    from torch.onnx._internal.exporter._errors import TorchExportError

    names = [spec.name for spec in job.specs]
    if isinstance(flat.inner, torch.jit.ScriptModule):
        from torch._export.converter import TS2EPConverter

        flat = flat_module(TS2EPConverter(flat.inner, tuple(job.traced)).convert().module(), job.specs)
    symbols = {name for spec in job.specs for name in spec.axes.values()}
    failure: Exception | None = None
    for sizes in (dict.fromkeys(symbols, torch.export.Dim.AUTO), {name: torch.export.Dim(name) for name in symbols}):
        shapes = tuple({axis: sizes[name] for axis, name in spec.axes.items()} for spec in job.specs)
        try:
            with stored_weights_as(flat, in_memory):
                program = torch.onnx.export(
                    flat,
                    tuple(job.traced),
                    dynamo=True,
                    opset_version=opset,
                    dynamic_shapes=(shapes,),
                    input_names=names,
                    output_names=job.outputs,
                    verbose=False,
                )
        except TorchExportError as error:
            failure = failure or error
            continue
        model = cast("torch.onnx.ONNXProgram", program).model
        given = dict(zip(names, model.graph.inputs, strict=False))
        fixed = [spec.name for spec in job.specs if any(has_size(given.get(spec.name), axis) for axis in spec.axes)]
        if not fixed:
            return model
        failure = failure or AttemptError(f"torch.export fixes an axis of {fixed[0]} that is free in PyTorch")
    raise cast("Exception", failure)


def has_size(value: ir.Value | None, axis: int) -> bool:
    """Whether an axis of a graph's input has a size that is a number."""
    return value is not None and value.shape is not None and isinstance(value.shape[axis], int)


EXPORTERS = {"torchscript": export_torchscript, "dynamo": export_dynamo}


def plan_attempts(exporter: str, opset: int | None) -> list[Attempt]:
    """What to try, the fast exporter first; without an `opset`, the default one and the lowest of the wide exporter."""
    attempts = [Attempt("torchscript", opset or DEFAULT_OPSET), Attempt("dynamo", opset or DYNAMO_MIN_OPSET)]
    return [
        attempt
        for attempt in attempts
        if exporter in ("auto", attempt.exporter)
        and (attempt.exporter != "dynamo" or attempt.opset >= DYNAMO_MIN_OPSET)
    ]


def run_exporter(attempt: Attempt, job: Job, folder: Path) -> tuple[ir.Model, str]:
    """One exporter's model, and a note on what it may have fixed; raises AttemptError with what stood in the way."""
    disable_fused_attention()
    text, job = job, job.step or job
    flat = flat_module(job.model, job.specs)
    if not isinstance(job.model, torch.fx.GraphModule):  # an exported program has one mode only
        flat.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught, without_kept_state(flat):
            model = EXPORTERS[attempt.exporter](flat, job, attempt.opset, folder)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise AttemptError(first_line(error)) from error
    except Exception as error:  # the exporters raise whatever went wrong inside them
        if NO_MEMORY.search(str(error)):
            raise MemoryError(str(error)) from error
        if LOG.verbose:
            traceback.print_exc(file=LOG.stream)
        needs = re.search(r"(?:added in version|try opset version) (\d+)", str(error))
        raise AttemptError(explain_failure(error, flat, job.traced), needs=int(needs[1]) if needs else None) from error
    for warning in caught:
        warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
    if model.opset_imports.get("") != attempt.opset:
        raise AttemptError(f"it wrote opset {model.opset_imports.get('')} instead")
    if text.step is not None:
        repeat_for_tokens(model, job, text)
    return model, tracing_notes(caught)


def repeat_for_tokens(model: ir.Model, single: Job, text: Job) -> None:
    """Turn the graph of one token in place into that of a text, a Loop around it; raises AttemptError.

    The cache goes from turn to turn, the outputs for each token are stacked, and the weights stay outside.
    """
    graph = model.graph
    before, begin, end = (ir.tape.Tape() for _ in range(3))  # nodes before the loop, and at both ends of a turn
    restore_inputs(graph, single)
    outputs = dict(zip(single.outputs, checked_outputs(graph, single), strict=True))
    nodes = take_nodes(graph)
    for value in itertools.chain.from_iterable(node.outputs for node in nodes):
        value.shape = None  # that of a single token, and of a past that now grows
    inputs = {str(value.name): ir.Value(name=value.name, type=value.type) for value in graph.inputs}
    turn = ir.Value(name="loop/turn", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    going = ir.Value(name="loop/going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    batch, length = (size_on(before, inputs["input_ids"], axis) for axis in (0, 1))
    past = [spec for spec in single.specs if spec.name.startswith("past_")]
    given = {spec.name for spec in text.specs}
    initial = [inputs[spec.name] if spec.name in given else empty_cache(spec, batch, before) for spec in past]
    current = text_at(single, inputs, length, turn, (before, begin))
    current |= {spec.name: ir.Value(name=f"loop/{spec.name}", type=inputs[spec.name].type) for spec in past}
    for value in graph.inputs:
        ir.convenience.replace_all_uses_with(value, current[str(value.name)])
    kept = [name for name in single.outputs if name.startswith("present")]
    stacked = [name for name in single.outputs if name not in kept]
    first = constant_on(before, 0)
    ends = [end.op("Identity", [going]), *(outputs[name] for name in kept)]
    ends += [end.op("Gather", [outputs[name], first], {"axis": 1}) for name in stacked]
    body_inputs = [turn, going, *(current[spec.name] for spec in past)]
    body = ir.Graph(body_inputs, ends, nodes=[*begin.nodes, *nodes, *end.nodes], name="token")
    loop = [before.op("Squeeze", [length]), None, *initial]
    results = before.op_multi_out("Loop", loop, {"body": body}, num_outputs=len(ends) - 1)
    named = dict(zip([*kept, *stacked], results, strict=True))
    named |= {name: before.op("Transpose", [named[name]], {"perm": (1, 0, 2)}) for name in stacked}
    for name, value in named.items():
        value.type = outputs[name].type
    name_nodes([*before.nodes, *begin.nodes, *end.nodes])
    graph.inputs[:] = [inputs[spec.name] for spec in text.specs]
    graph.extend(before.nodes)
    graph.outputs.extend(named[name] for name in text.outputs)


def text_at(
    single: Job, inputs: Mapping[str, ir.Value], length: ir.Value, turn: ir.Value, tapes: Sequence[ir.tape.Tape]
) -> dict[str, ir.Value]:
    """What of a text's `inputs` one turn of the loop reads: its token, and the mask up to that, which spans the past.

    The nodes go to the `tapes`: that of the nodes before the loop, and that of a turn.
    """
    before, begin = tapes
    zero, one = constant_on(before, [0]), constant_on(before, [1])
    place = begin.op("Reshape", [turn, one])
    parts = {}
    for spec in single.specs:
        if TOTAL in spec.axes.values():
            past = before.op("Sub", [size_on(before, inputs[spec.name], 1), length])
            stop = begin.op("Add", [before.op("Add", [past, one]), place])
            parts[spec.name] = begin.op("Slice", [inputs[spec.name], zero, stop, one])
        elif not spec.name.startswith("past_"):
            parts[spec.name] = begin.op("Gather", [inputs[spec.name], place], {"axis": 1})
    return parts


def constant_on(tape: ir.tape.Tape, number: int | list[int]) -> ir.Value:
    """A constant (int64)."""
    return tape.op("Constant", [], {"value": ir.tensor(number)})


def size_on(tape: ir.tape.Tape, value: ir.Value, axis: int) -> ir.Value:
    """The size of an axis of `value` (1)."""
    return tape.op("Gather", [tape.op("Shape", [value]), constant_on(tape, [axis])])


def name_nodes(nodes: Iterable[ir.Node]) -> None:
    """Give nodes around a loop, and what comes out of them, names that no others have."""
    for number, node in enumerate(nodes):
        node.name = f"loop/{node.op_type}_{number}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}/{index}"


def empty_cache(spec: InputSpec, batch: ir.Value, tape: ir.tape.Tape) -> ir.Value:
    """The cache before the first token: no keys and values, and states of zeros, for `batch` (1) rows."""
    sizes = constant_on(tape, [0 if axis in spec.axes else size for axis, size in enumerate(spec.dims)][1:])
    shape = tape.op("Concat", [batch, sizes], {"axis": 0})
    return tape.op("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, dtype_name(spec.dtype)))})


def tracing_notes(caught: Iterable[warnings.WarningMessage]) -> str:
    """A note on the model's own source lines where a tensor became a Python value, which tracing then fixed."""
    library = torch_folder()
    lines = [
        f"{Path(warning.filename).name}({warning.lineno})"
        for warning in caught
        if issubclass(warning.category, torch.jit.TracerWarning) and not warning.filename.startswith(library)
    ]
    lines = list(dict.fromkeys(line for line in lines if not line.startswith(Path(__file__).name)))
    return f"; tracing fixed what is decided by values at {', '.join(lines[:3])}" if lines else ""


def fixed_decisions(job: Job) -> str:
    """What the model's code decides by tensors' values, and decided alike for every case; "" for nothing.

    Where it decided differently, the cases have shown that the graph follows.
    """
    places = {place for case in job.cases for place in case.decisions}
    same = sorted(
        f"{place} reads {and_more(job.cases[0].decisions[place], 2)}"
        for place in places
        if len({tuple(case.decisions.get(place, ())) for case in job.cases}) == 1
    )
    what = f"{and_more(same, 3)} from a tensor for all {len(job.cases)} inputs tried, and the trace keeps that value"
    return what if same else ""


def explain_failure(error: Exception, flat: nn.Module, inputs: list[Tensor]) -> str:
    """The first line of an exporter's error, with the module and source line of the operator it names."""
    cause: BaseException = error
    while cause.__cause__ is not None and type(error).__module__.startswith("torch.onnx._internal.exporter"):
        cause = cause.__cause__
        error = cause if isinstance(cause, Exception) else error
    text = first_line(error)
    operator = re.search(r"(?:'|of |operator |kind:)((?:aten|prim|torchvision|\w+)::\w+)", str(error))
    if operator is None:
        return text
    with contextlib.suppress(Exception):  # the location is a courtesy
        graph = torch.jit.trace(flat, tuple(inputs), check_trace=False, strict=False).inlined_graph
        node = next(iter(graph.findAllNodes(operator[1], recurse=True)))
        lines = re.findall(r"(\S+\.py\(\d+\): \w+)", node.sourceRange())
        line = next((line for line in lines if "/torch/" not in line), lines[0] if lines else "")
        scope = node.scopeName().rpartition("/")[2].removeprefix("__module.inner").lstrip(".")
        where = ", ".join(part for part in (f"module {scope}" if scope else "", os.path.basename(line)) if part)  # noqa: PTH119
        return f"{text} ({where})" if where else text
    return text


# ---------------------------------------------------------------------------------------------------------------------
# finish and write: every graph ends with the same names, axes and metadata, and without traces of this machine
#
# Takes an exporter's graph, gives a file in the staging folder; weights go there from where they lie.
# ---------------------------------------------------------------------------------------------------------------------


def past_name(present: str) -> str:
    """The input that takes what an output gave: `past_key_values.N.key` for `present.N.key`, `past_conv.N`."""
    return present.replace("present", "past_key_values" if present.startswith("present.") else "past", 1)


def finish_graph(model: ir.Model, job: Job, metadata: Mapping[str, str]) -> ir.Model:
    """Give `model` the product's names, axes and metadata in place; raises AttemptError where inputs went missing."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    common.IdentityEliminationPass()(model)
    graph = model.graph
    restore_branch_outputs(graph)
    common.RemoveUnusedNodesPass()(model)
    restore_inputs(graph, job)
    strip_wrapper_names(graph)
    for spec, value in zip(job.specs, graph.inputs, strict=True):
        value.shape = ir.Shape([spec.axes.get(axis, size) for axis, size in enumerate(spec.dims)])
    round_pools_down(model)
    common.OutputFixPass()(model)  # a tensor that is returned twice is two outputs
    for value, name in zip(checked_outputs(graph, job), job.outputs, strict=True):
        value.name = name
    for index, value in enumerate(graph.outputs):
        value.shape = ir.Shape(output_axes(job, index, value) or ())
    graph.name = "model"
    opset = onnx.helper.make_opsetid("", model.opset_imports[""])
    model.ir_version = min(10, max(8, onnx.helper.find_min_ir_version_for([opset])))
    model.producer_name, model.producer_version = "pt2onnx", __version__
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    return model


def checked_outputs(graph: ir.Graph, job: Job) -> list[ir.Value]:
    """The graph's outputs; raises AttemptError where there are not as many as the model's."""
    if len(graph.outputs) != len(job.outputs):
        raise AttemptError(f"its graph has {plural(len(graph.outputs), 'output')}, the model {len(job.outputs)}")
    return list(graph.outputs)


def take_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes of a graph, taken out of it for another one."""
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes


def round_pools_down(model: ir.Model) -> None:
    """Let poolings that round their sizes up round them down instead, where onnx counts them wrongly.

    PyTorch and ONNX Runtime leave a window out that would begin in the padding; onnx's shape inference counts it
    (onnx/defs/nn/defs.cc, convPoolShapeInference), so that onnx.checker contradicts what is declared.
    """
    shapes: dict[ir.Value, ir.Shape | None] = {}
    for node in list(model.graph.all_nodes()):
        if node.op_type in ("AveragePool", "MaxPool") and node.attributes.get_int("ceil_mode", 0) == 1:
            shapes = shapes or inferred_shapes(model)
            given = cast("ir.Value", node.inputs[0])
            if round_down(node, shapes.get(given, given.shape)):
                shapes = {}  # those of all that follows have changed


def inferred_shapes(model: ir.Model) -> dict[ir.Value, ir.Shape | None]:
    """What onnx infers of the shapes of all nodes' outputs; what the graph declares stays as it is."""
    from onnx_ir.passes import common

    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    declared = [value.shape for value in values]
    for value in values:  # where one of them is contradicted, nothing is inferred
        value.shape = None
    common.ShapeInferencePass()(model)
    inferred = {value: value.shape for value in values}
    for value, shape in zip(values, declared, strict=True):
        value.shape = shape
    return inferred


def round_down(pool: ir.Node, known: ir.Shape | None) -> bool:
    """Give a pooling of an input of `known` shape padding with which rounding down is right; whether it was needed."""
    sizes = list(known)[2:] if known is not None else []
    if not all(isinstance(size, int) for size in sizes):
        return False
    axes, wrong, counted = len(sizes), False, np.ones((1, 1), np.float64)
    kernel, pads = pool.attributes.get_ints("kernel_shape", ()), list(pool.attributes.get_ints("pads", (0,) * 2 * axes))
    strides, dilations = (pool.attributes.get_ints(name, (1,) * axes) for name in ("strides", "dilations"))
    for axis, size in enumerate(cast("list[int]", sizes)):
        window, end = dilations[axis] * (kernel[axis] - 1) + 1, size + pads[axis] + pads[axes + axis]
        last = -(-(end - window) // strides[axis])
        if last * strides[axis] >= size + pads[axis]:
            last, wrong = last - 1, True
        starts = strides[axis] * np.arange(last + 1)
        counted = counted[..., None] * np.minimum(window, end - starts) / window  # beyond its padding nothing counts
        pads[axes + axis] = max(0, int(starts[-1]) + window - size - pads[axis])
    if not wrong:
        return False
    pool.attributes["pads"] = ir.AttrInt64s("pads", pads)
    pool.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)
    if pool.attributes.get_int("count_include_pad", 0) and (counted < 1).any():
        average = pool.outputs[0]
        average.name, average.shape = f"{average.name}_of_all", None
        share = ir.tensor(counted.astype(cast("ir.DataType", average.dtype).numpy()), name=f"{average.name}_counted")
        graph = cast("ir.Graph", pool.graph)
        constant = ir.node("Constant", [], {"value": share})
        divided = ir.node("Div", [average, constant.outputs[0]], outputs=[ir.Value(type=average.type)])
        ir.convenience.replace_all_uses_with(average, divided.outputs[0], replace_graph_outputs=True)
        divided.replace_input_with(0, average)
        graph.insert_after(pool, [constant, divided])
    return True


def restore_inputs(graph: ir.Graph, job: Job) -> None:
    """Order the graph's inputs as the model's, and restore those that an exporter dropped.

    That is harmless if no output depends on them, which verification with other values shows.
    """
    found = {value.name: value for value in graph.inputs}
    if not set(found) <= {spec.name for spec in job.specs}:
        if len(graph.inputs) != len(job.specs):
            raise AttemptError(f"its graph has the inputs {', '.join(map(str, found))}")
        found = {spec.name: value for spec, value in zip(job.specs, graph.inputs, strict=True)}
    for spec in job.specs:
        if spec.name not in found:
            LOG.warn(f"input {spec.name} has no influence on the outputs; it stays in the graph, unused")
            dtype = ir.tensor_adapters.from_torch_dtype(spec.dtype)
            found[spec.name] = ir.Value(name=spec.name, type=ir.TensorType(dtype))
    graph.inputs[:] = [found[spec.name] for spec in job.specs]
    for spec in job.specs:
        found[spec.name].name = spec.name


def strip_wrapper_names(graph: ir.Graph) -> None:
    """Give weights and nodes the names that they have in the model, without the wrapper's `inner`."""
    taken = {value.name for value in graph.initializers.values()} | {value.name for value in graph.inputs}
    for value in list(graph.initializers.values()):
        name = str(value.name).removeprefix("inner.")
        if name not in taken:
            value.name = name
    for node in graph.all_nodes():
        if node.name:
            node.name = node.name.replace("/inner/", "/", 1)


def varies_in_rank(name: str, job: Job) -> bool:
    """Whether an output has not the same number of axes for all inputs."""
    return len({case.outputs[name].ndim for case in job.cases}) > 1


def drop_output_shapes(path: Path, names: Collection[str]) -> None:
    """Let a graph not declare the shape of some outputs: onnx.checker wants one, but none would be true."""
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.output:
        if value.name in names:
            value.type.tensor_type.ClearField("shape")
    onnx.save(model, path)


def output_axes(job: Job, index: int, value: ir.Value) -> list[int | str] | None:
    """Names of an output's axes: those of the input axes that they follow, or their own where they vary.

    None where not even their number is the same for all inputs.
    """
    name = job.outputs[index]
    shapes = [case.outputs[name].shape for case in job.cases]
    symbols: dict[str, list[int]] = {}
    for spec in job.specs:
        for axis, symbol in spec.axes.items():
            symbols[symbol] = [case.inputs[spec.name].shape[axis] for case in job.cases]
    if {PAST, SEQUENCE} <= symbols.keys():  # a cache grows by what is new
        symbols[TOTAL] = [sum(sizes) for sizes in zip(symbols[PAST], symbols[SEQUENCE], strict=True)]
    result: list[int | str] = []
    if varies_in_rank(name, job):
        return None
    for axis, sizes in enumerate(zip(*shapes, strict=True)):
        inferred = value.shape[axis] if value.shape is not None and len(value.shape) == len(shapes[0]) else None
        follows = next((symbol for symbol, seen in symbols.items() if list(sizes) == seen), None)
        fixed = len(set(sizes)) == 1 and (isinstance(inferred, int) or not symbols)
        result.append(follows or (sizes[0] if fixed and sizes[0] else f"{name}_dim_{axis}"))
    return result


def merge_decoders(first: Path, following: Path) -> ir.Model:
    """One graph of a decoder without and one with a past: an If on `use_cache_branch`, each weight stored once.

    The branch with a past passes the encoder's keys and values through.
    """
    models = [ir.load(path) for path in (first, following)]
    inputs: dict[str, ir.Value] = {}
    for value in itertools.chain.from_iterable(model.graph.inputs for model in models):
        inputs.setdefault(str(value.name), ir.Value(name=value.name, shape=value.shape, type=value.type))
    inputs[CACHE_FLAG] = ir.Value(name=CACHE_FLAG, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    outputs = [ir.Value(name=value.name, type=value.type) for value in models[0].graph.outputs]
    weights: dict[Any, ir.Value] = {}
    names = [str(value.name) for value in outputs]
    branches = [branch_of(model.graph, inputs, weights, names) for model in models]
    for prefix, branch in zip(("first/", "next/"), branches, strict=True):  # the names of a model are unique
        for node in branch.all_nodes():
            node.name = f"{prefix}{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}{value.name}"
    choice = {"then_branch": branches[1], "else_branch": branches[0]}
    node = ir.node("If", [inputs[CACHE_FLAG]], choice, outputs=outputs)
    graph = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=[node],
        initializers=list(weights.values()),
        opset_imports=models[0].graph.opset_imports,
        name="model",
    )
    return ir.Model(graph, ir_version=models[0].ir_version)


def branch_of(
    graph: ir.Graph, inputs: Mapping[str, ir.Value], weights: dict[Any, ir.Value], names: Sequence[str]
) -> ir.Graph:
    """The nodes of `graph` as a branch that reads `inputs` and `weights`, to which its own are added, outside of it."""
    for value in graph.inputs:
        ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
    taken = {value.name for value in weights.values()}
    for value in list(graph.initializers.values()):
        tensor = weight_of(value)
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest())
        if key not in weights:
            name = f"{value.name}.2" if value.name in taken else value.name
            weights[key] = ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)
        ir.convenience.replace_all_uses_with(value, weights[key])
    found = {str(value.name): value for value in graph.outputs}
    nodes = take_nodes(graph)
    for name in names:
        if name not in found:
            given = inputs[past_name(name)]
            nodes.append(ir.node("Identity", [given], outputs=[ir.Value(name=name, type=given.type)]))
            found[name] = nodes[-1].outputs[0]
    return ir.Graph([], [found[name] for name in names], nodes=nodes, name="branch")


def write_graph(model: ir.Model, path: Path) -> Path:
    """Serialise to `path`, with the weights in `path`.data where one file cannot hold them, and sync to the disk.

    Returns a file to check and run: for a large single file its twin, which refers to the weights in `path`, so that
    nobody has to hold all of them in memory. Raises ConversionError (RESOURCES) where space is short.
    """
    size = sum(weight_of(value).nbytes for value in model.graph.initializers.values())
    check_space(path.parent, size)
    light = path
    with LOG.copying(f"write: {path.name}", size):
        if size > SINGLE_FILE_LIMIT:
            ir.save(model, path, external_data=f"{path.name}.data")
        else:
            light = write_single_file(model, path)
        for file in path.parent.glob(f"{path.name}*"):
            with file.open("rb+") as stream:  # a full disk may only show when the data is really written
                os.fsync(stream.fileno())
    return light


def check_room(model: nn.Module, run: Run, copies: int = 1) -> None:
    """Before the work begins: is there space for all weights? Raises ConversionError (RESOURCES)."""
    check_space(run.staging.parent, copies * weight_bytes(model))


def check_space(folder: Path, needed: int) -> None:
    """Raise ConversionError (RESOURCES) where `needed` bytes do not fit on the disk of `folder`."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        sizes = f"{size_text(needed)} are needed and {size_text(free)} are free on the disk of {place}"
        raise ConversionError(ExitStatus.RESOURCES, f"cannot write: {sizes}; free some space, or choose another -o")


def write_single_file(model: ir.Model, path: Path) -> Path:
    """Serialise `model` with its large weights written from where they lie; they are taken out of `model`.

    The serialiser would copy them twice. A protobuf message is a sequence of fields, so the weights can follow the rest
    of the graph (https://protobuf.dev/programming-guides/encoding; field numbers: onnx.proto). Returns the twin (see
    write_graph), or `path` where it is small.
    """
    large = [value for value in model.graph.initializers.values() if weight_of(value).nbytes >= STORED_BYTES]
    for value in large:
        del model.graph.initializers[str(value.name)]
    proto = ir.to_proto(model)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    rest = proto.SerializeToString(deterministic=True)
    size, width, placed = len(graph) + sum(weight_of(value).nbytes for value in large), 0, []
    while width < len(varint(size)):  # where the weights lie, and with it `size`, depends on how wide `size` is written
        width = len(varint(size))
        place = len(rest + message_head(onnx.ModelProto.GRAPH_FIELD_NUMBER, size, width) + graph)
        placed = place_weights(large, place)
        end = placed[-1].start + placed[-1].tensor.nbytes if placed else place
        size = len(graph) + end - place
    with path.open("wb") as file:
        file.write(rest + message_head(onnx.ModelProto.GRAPH_FIELD_NUMBER, size, width) + graph)
        for weight in placed:
            file.write(weight.head)
            weight.tensor.tofile(file)
    if sum(weight.tensor.nbytes for weight in placed) < STREAM_FROM:
        return path
    proto.graph.ParseFromString(graph)
    return write_twin(proto, placed, path)


class PlacedWeight(NamedTuple):
    """An initializer in a file: its fields other than the data, what stands before these, and where they begin."""

    fields: Mapping[str, Any]
    tensor: Any  # an ir.TensorProtocol with tofile(), which all of them have
    head: bytes
    start: int


def weight_of(value: ir.Value) -> Any:
    """The tensor of an initializer: its class is onnx-ir's own or ours, and only its type says that it may be none."""
    return value.const_value


def place_weights(values: Iterable[ir.Value], place: int) -> list[PlacedWeight]:
    """Initializers one after the other, from `place` of the file on, the data of each aligned."""
    placed = []
    for value in values:
        tensor = weight_of(value)
        fields = {"name": value.name, "dims": tensor.shape.numpy(), "data_type": tensor.dtype.value}
        head = aligned_head(fields, tensor.nbytes, place)
        placed.append(PlacedWeight(fields, tensor, head, place + len(head)))
        place += len(head) + tensor.nbytes
    return placed


def write_twin(proto: onnx.ModelProto, placed: Iterable[PlacedWeight], path: Path) -> Path:
    """Write `proto`, which lacks the weights, beside `path` with references to where they lie in that file."""
    for weight in placed:
        outside = proto.graph.initializer.add(**weight.fields, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", path.name), ("offset", weight.start), ("length", weight.tensor.nbytes)):
            outside.external_data.add(key=key, value=str(value))
    light = path.with_name(f".{path.name}.twin")
    light.write_bytes(proto.SerializeToString(deterministic=True))
    return light


def aligned_head(fields: Mapping[str, Any], length: int, place: int) -> bytes:
    """What precedes the `length` bytes of an initializer at `place` of the file, so that they are aligned.

    Runtimes can then use them in place. A doc_string of spaces fills the gap.
    """
    for spaces in range(2 * ALIGNMENT):
        head: bytes = onnx.TensorProto(**fields, doc_string=" " * spaces).SerializeToString()
        head += message_head(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, length)
        head = message_head(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + length) + head
        if (place + len(head)) % ALIGNMENT == 0:
            break
    return head


def message_head(number: int, length: int, width: int = 1) -> bytes:
    """The key of a protobuf field that holds `length` bytes, a number written in `width` bytes or more."""
    return varint(number << 3 | 2) + varint(length, width)  # 2: bytes, preceded by their number


def varint(number: int, width: int = 1) -> bytes:
    """A number as protobuf writes it: 7 bits a byte, the lowest first, the top bit set on all but the last.

    It is padded to `width` bytes with zeros, which do not count.
    """
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest, width - 1) if rest or width > 1 else bytes([low])


def exporter_name(attempt: Attempt) -> str:
    """The exporter and its version, without the build's suffix, for the metadata."""
    return f"{attempt.exporter} of torch {str(torch.__version__).partition('+')[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# verify: the checker, then ONNX Runtime against PyTorch's answers
#
# Takes a file and its Job, gives the Differences or raises AttemptError. Calls the model again, in float64 and with
# perturbed inputs, where rounding may explain a difference, and to tell where one begins (where_it_differs): what each
# call of torch takes and gives is looked for among the values of the graph. They are paired by their numbers, so that
# the names that exporters and passes give do not matter.
# ---------------------------------------------------------------------------------------------------------------------


def without_padding(tensors: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Zeros in all that belongs to padded tokens, which counts nowhere: outputs, keys and values.

    `mask` (batch x tokens) has zeros for these, and may begin before the outputs (batch x tokens x ...) do.
    """
    padded, hidden = mask == 0, {}
    for name, tensor in tensors.items():
        if name.startswith("present."):
            hidden[name] = tensor.masked_fill(padded[:, None, :, None], 0)
        elif name.startswith("present_"):
            hidden[name] = tensor
        else:
            hidden[name] = tensor.masked_fill(padded[:, -tensor.shape[1] :, None], 0)
    return hidden


# Relative and absolute tolerance by dtype, the absolute one scaled by the output's largest value: float32 keeps about 7
# digits and a deep network loses 2 of them to another order of summation (ResNet-50: 5e-5 of values around 3).
TOLERANCES = {"float64": (1e-7, 1e-8), "float32": (1e-4, 2e-5), "float16": (2e-2, 1e-2), "bfloat16": (5e-2, 3e-2)}
# Of the largest value in the model, for VALUE_SETS: these show wrong operators and branches, not digits, and constant
# inputs leave sums that cancel, which a normalisation then amplifies.
WIDE_ERROR = 1e-4
KERNEL_ERROR = 1e-6  # ONNX Runtime's float32 sigmoid, exp and erf are polynomials with an absolute error of a few 1e-7
SLIGHT = 100  # times the allowed difference: what another algorithm or quantisation costs, and no wrong graph
SCORE_TIE = 1e-3  # scores that rounding may swap
SAME = 1e-3  # of the largest value: two programs' answers for one detection
PERTURBATION = 1e-5  # of each value: what layers of float32 add up to between two right programs
MAX_ROW = 256  # numbers in a row that is compared to find its partner: boxes, labels and keypoints, not masks
LEAN_FROM = 512 << 20  # bytes of a file of weights that ONNX Runtime is not to make copies of
SWEEP_SECONDS = 0.005  # in which a machine reads some dozens of megabytes
SWEPT_BYTES = 128 << 20  # of mapped weights that may be resident
ROUNDING_LIMIT = 0.05
ROUNDING_MARGIN = 4  # a sum in another order may err in the other direction, and as far again in the largest element
ROUNDING_STEPS = 8  # of the largest value's last digit: what is left of values that cancel in a sum


def tolerances(model: nn.Module) -> tuple[float, float]:
    """The relative and the absolute tolerance of the model's dtype."""
    return TOLERANCES[dtype_name(float_dtype(model))]


def compare(case: Case, name: str, actual: Any, job: Job, options: Options) -> Difference:
    """Compare one output with PyTorch's. NaN and Inf never pass; integers and booleans must be equal."""
    expected = case.outputs[name]
    if actual.shape != expected.shape:
        shapes = f"{shape_text(actual.shape)} for {case.label}, PyTorch's has {shape_text(expected.shape)}"
        return Difference(case.label, name, math.inf, 0.0, f"output {name!r} has the shape {shapes}")
    if expected.size == 0:
        return Difference(case.label, name, 0.0, 0.0)
    if expected.dtype.kind not in "fc":
        wrong = int(np.count_nonzero(actual != expected))
        problem = f"output {name!r} differs from PyTorch's in {wrong} of {expected.size} places for {case.label}"
        return Difference(case.label, name, float(wrong), 0.0, problem if wrong else "")
    relative, absolute = tolerances(job.model)
    scale = float(np.abs(expected).max())
    rtol = relative if options.rtol is None else options.rtol
    atol = max(absolute * scale, min(KERNEL_ERROR, scale / 100)) if options.atol is None else options.atol
    if case.is_drawn_wide():  # values that saturate a model leave next to nothing: what is usual there is the measure
        drawn = (other.outputs[name] for other in job.cases if not other.values)
        usual = max(float(np.abs(value).max(initial=0)) for value in drawn)
        atol = max(atol * max(1.0, scale / usual if usual else 1.0), WIDE_ERROR * max(scale, usual))
    difference = np.nan_to_num(np.abs(actual.astype(np.float64) - expected.astype(np.float64)), nan=math.inf)
    largest, allowed = float(difference.max()), float(atol + rtol * scale)
    bounds = atol + rtol * np.abs(expected.astype(np.float64))
    with np.errstate(invalid="ignore"):
        good = bool(np.isfinite(actual).all() and (difference <= bounds).all())
        worst = np.nanargmax(difference - bounds)
    there = f"{difference.flat[worst]:.3g} for {case.label} (allowed: {bounds.flat[worst]:.3g})"
    problem = f"output {name!r} differs from PyTorch's by {there}"
    return Difference(case.label, name, largest, allowed, "" if good else problem)


def judge(case: Case, results: Arrays, job: Job, options: Options) -> list[Difference]:
    """Compare every output and its dtype, after detections of equal score were put in PyTorch's order."""
    results = align_detections(case.outputs, results)
    found = []
    for name, expected in case.outputs.items():
        if results[name].dtype == expected.dtype or float_dtype(job.model) is torch.bfloat16:  # which numpy lacks
            found.append(compare(case, name, results[name], job, options))
        else:
            problem = f"output {name!r} is {results[name].dtype}, PyTorch's is {expected.dtype}"
            found.append(Difference(case.label, name, math.inf, 0.0, problem))
    return found


def detection_scores(outputs: Arrays) -> str | None:
    """The output by which a detector orders its rows: falling scores, beside outputs with as many rows."""
    for name, value in outputs.items():
        if value.ndim == 1 and value.dtype.kind == "f" and (np.diff(value) <= 0).all():
            others = [other for key, other in outputs.items() if key != name and other.shape[:1] == value.shape]
            if len(others) > 1:
                return name
    return None


def align_detections(expected: Arrays, actual: Arrays) -> Arrays:
    """`actual` with its rows in the order of `expected`, as far as only rows of nearly the same score change places.

    Detectors sort by score, and rounding decides between two that are nearly equal.
    """
    scores = detection_scores(expected)
    if scores is None or any(actual[name].shape != expected[name].shape for name in expected):
        return actual
    if not (np.abs(actual[scores] - expected[scores]) <= SCORE_TIE).all():  # not even the scores fall in the same way
        return actual
    rows = [name for name in expected if expected[name].shape[:1] == expected[scores].shape]
    small = [name for name in rows if expected[name][0:1].size <= MAX_ROW]
    order, free = [], set(range(len(expected[scores])))
    for index, score in enumerate(expected[scores]):
        near = sorted(j for j in free if abs(actual[scores][j] - score) <= SCORE_TIE)
        costs = [sum(float(np.abs(actual[n][j] - expected[n][index] * 1.0).max()) for n in small) for j in near]
        best = near[int(np.argmin(costs))] if near else min(free)
        order.append(best)
        free.discard(best)
    return {name: value[order] if name in rows else value for name, value in actual.items()}


def check_graph(path: Path, opset: int) -> None:
    """onnx.checker with shape inference, by path so that any size is accepted; raises AttemptError."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # ValidationError, InferenceError, RuntimeError by version
        lacks = re.search(r"No Op registered for (\w+)|\(op_type:(\w+),.* has unsupported type", str(error))
        needs = first_opset(lacks[1] or lacks[2], opset) if lacks else None
        raise AttemptError(f"onnx.checker: {first_line(error)}", exported=True, needs=needs) from error


def first_opset(operator: str, beyond: int) -> int | None:
    """The first opset above `beyond` that has `operator`, by the schemas of onnx."""
    schemas = onnx.defs.get_all_schemas_with_history()
    versions = [schema.since_version for schema in schemas if schema.name == operator and not schema.domain]
    return min((version for version in versions if version > beyond), default=None)


def open_session(path: Path, device: str) -> Any:
    """An ONNX Runtime session, on the GPU where asked for and possible; raises AttemptError.

    Large weights outside of the graph are used where they lie in the mapped file, without packed or fused copies; small
    models run as they will for their users.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    if device == "cuda":
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        else:
            LOG.info("verify: this ONNX Runtime has no CUDA provider, so it runs on the CPU")
    weights = [file for file in weight_files(path) if file.stat().st_size >= LEAN_FROM]
    if weights and len(providers) == 1:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
        return LeanSession(session, weights) if weights else session
    except Exception as error:
        raise AttemptError(f"ONNX Runtime cannot load it: {first_line(error)}", exported=True) from error


def weight_files(path: Path) -> set[Path]:
    """The files that a graph's weights lie in, other than its own."""
    graph = onnx.load(path, load_external_data=False).graph
    entries = itertools.chain.from_iterable(tensor.external_data for tensor in graph.initializer)
    return {path.with_name(entry.value) for entry in entries if entry.key == "location"}


class LeanSession:
    """A session that lets go of the pages of mapped `weights` while it runs, before they add up to much."""

    def __init__(self, session: Any, weights: Iterable[Path]) -> None:
        self.get_outputs, self.session = session.get_outputs, session
        found = (mapped_ranges(file) for file in weights)
        self.ranges = list(itertools.chain.from_iterable(found))  # the session maps them once, when it is made

    def run(self, names: Sequence[str] | None, inputs: Arrays) -> list[Any]:
        """As InferenceSession.run."""
        done, most = threading.Event(), mapped_bytes() + SWEPT_BYTES

        def sweep() -> None:
            while not done.wait(SWEEP_SECONDS):
                if mapped_bytes() > most:
                    self.let_go()

        sweeper = threading.Thread(target=sweep)
        sweeper.start()
        try:
            return list(self.session.run(names, inputs))
        finally:
            done.set()
            sweeper.join()
            self.let_go()

    def let_go(self) -> None:
        """Give back the memory that the weights take."""
        for first, last in self.ranges:
            drop_pages(first, last)


def mapped_bytes() -> int:
    """The resident memory that mapped files take (proc_pid_statm(5)); 0 on other systems than Linux."""
    with contextlib.suppress(FileNotFoundError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[2]) * PAGE_BYTES
    return 0


def mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """Where in memory a file is mapped (proc_pid_maps(5)); nothing on other systems than Linux."""
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        return [
            (int(first, 16), int(last, 16))
            for first, last in (line.split()[0].split("-") for line in lines if line.endswith(f" {file.resolve()}"))
        ]
    return []


def verify(path: Path, job: Job, options: Options) -> list[Difference]:
    """Every output at every case's sizes against PyTorch; raises AttemptError with what is wrong."""
    session = open_session(path, options.device)
    names = [output.name for output in session.get_outputs()]
    differences: list[Difference] = []
    for case in job.cases:
        try:
            with RUNS.one():
                answers = session.run(None, case.inputs)
            results = mask_padding(dict(zip(names, answers, strict=True)), case.inputs)
        except Exception as error:
            reason = f"ONNX Runtime fails for {case.label}: {first_line(error)}"
            if case.is_drawn_wide():
                LOG.warn(f"{reason}; PyTorch accepts them, so do not give such inputs to the graph")
                continue
            raise AttemptError(reason, exported=True, case=case) from error
        found = judge(case, results, job, options)
        by_default = options.atol is None and options.rtol is None
        if any(item.problem for item in found) and (by_default or case.is_drawn_wide()):
            found = compare_in_float64(case, results, found, job, options)
        bad = [item for item in found if item.problem]
        if bad and case.is_drawn_wide() and are_ties(case, bad, job, options):
            tied = and_more([item.output for item in bad], 3)
            LOG.warn(f"ties decide {tied} for {case.label}, in PyTorch too: any of equal values may come first")
            continue
        if bad:
            worst = max(bad, key=lambda item: item.largest - item.allowed)
            slight = all(item.largest <= SLIGHT * item.allowed for item in bad)
            problem = worst.problem + where_it_differs(path, case, job, options)
            failure = AttemptError(problem, exported=True, slight=worst.largest if slight else None, case=case)
            failure.numbers = not math.isinf(worst.largest)
            raise failure
        differences += found
    if job.further_checks:
        differences += job.further_checks(session, job, options)
    if not differences:  # whatever the exporter
        advice = "convert trained weights, compare your own data (--verify-data), or pass --no-verify"
        raise ConversionError(ExitStatus.VERIFY, f"PyTorch's own answers are too unstable to compare with; {advice}")
    return differences


def are_ties(case: Case, bad: Sequence[Difference], job: Job, options: Options) -> bool:
    """Whether whole numbers alone differ, and PyTorch's own do as soon as the inputs differ by next to nothing.

    Such as the places of equal values in a sorted list, of which neither program promises an order.
    """
    if any(case.outputs[item.output].dtype.kind not in "iu" or math.isinf(item.largest) for item in bad):
        return False
    stirred = perturbed_outputs(case, job, options)
    return all(
        stirred[item.output].shape == case.outputs[item.output].shape
        and np.count_nonzero(stirred[item.output] != case.outputs[item.output]) >= item.largest / 2
        for item in bad
    )


def mask_padding(outputs: Arrays, inputs: Arrays) -> Arrays:
    """A decoder's outputs without what belongs to padded tokens; those of other models as they are.

    Such a token looks at nothing: how the scores of all that is masked round in half precision decides its answer.
    """
    mask = inputs.get("attention_mask")
    if mask is None or not any(name.startswith("past_") for name in inputs):
        return outputs
    tensors = {name: torch.from_numpy(array) for name, array in outputs.items()}
    return {name: tensor.numpy() for name, tensor in without_padding(tensors, torch.from_numpy(mask)).items()}


def compare_in_float64(
    case: Case, results: Arrays, found: list[Difference], job: Job, options: Options
) -> list[Difference]:
    """What is left of `found` when PyTorch's own float64 answer is asked: what rounding explains is no fault.

    Badly scaled models amplify rounding, and sums that cancel leave little else, so that two correct programs differ.
    """
    exact = double_outputs(case, job, options)
    if exact is None:
        return found
    as_sets = compare_detections(case, results, exact.outputs, job, options)
    if as_sets is not None:
        return as_sets
    dtype = float_dtype(job.model)
    kind = dtype_name(dtype)
    result, excused = [], []
    for item in found:
        if not item.problem:
            result.append(item)
            continue
        noise, allowed = rounding_error(case.outputs[item.output], exact.outputs[item.output], exact.largest, dtype)
        allowed = max(allowed, WIDE_ERROR * exact.largest) if case.is_drawn_wide() else allowed
        if item.largest <= allowed:
            excused.append((item.largest / allowed, noise, item))
        result.append(item._replace(problem="", allowed=allowed) if item.largest <= allowed else item)
    if excused and not case.is_drawn_wide():
        _, noise, worst = max(excused)
        others = f", and so in {len(excused) - 1} more outputs" if len(excused) > 1 else ""
        LOG.warn(
            f"the model amplifies rounding: PyTorch's {kind} {worst.output} is {noise:.2g} from its own float64, "
            f"ONNX Runtime's is {worst.largest:.2g} from PyTorch's{others}"
        )
    return result


def compare_detections(
    case: Case, results: Arrays, exact: Arrays, job: Job, options: Options
) -> list[Difference] | None:
    """Compare a detector's rows as sets; None for other models, and where more differs than rounding can explain.

    How many rows rounding decides is measured: those without a partner in PyTorch's float64 answer (`exact`), or in its
    answer to inputs that are PERTURBATION away. ONNX Runtime may leave twice as many without one, or one in a hundred,
    such as the last that a limit keeps. An input where rounding decides more than half proves nothing: an empty list.
    """
    scores = detection_scores(case.outputs)
    if scores is None:
        return None
    rows = [name for name, value in case.outputs.items() if value.shape[:1] == case.outputs[scores].shape]
    if any(results[name].shape[1:] != case.outputs[name].shape[1:] for name in rows):
        return None
    count = len(case.outputs[scores])
    unsteady = max(
        unmatched(matching_rows(case.outputs, other, rows)) for other in (exact, perturbed_outputs(case, job, options))
    )
    if unsteady > count / 2:
        LOG.warn(f"rounding decides {unsteady} of {count} detections for {case.label}: that input is left out")
        return []
    pairs = matching_rows(case.outputs, results, rows)
    apart = unmatched(pairs)
    if apart > max(2 * unsteady, count // 100):
        return None
    if apart:
        LOG.warn(f"rounding decides {apart} of {count} detections for {case.label}: the others agree")
    matched = [(i, int(row.argmax())) for i, row in enumerate(pairs) if row.any()]
    found = [compare(case, name, results[name], job, options) for name in case.outputs if name not in rows]
    for name in rows:
        expected, actual = case.outputs[name], results[name]
        largest = max((float(abs(expected[i] * 1.0 - actual[j]).max(initial=0)) for i, j in matched), default=0.0)
        found.append(Difference(case.label, name, largest, largest))
    return found


def matching_rows(expected: Arrays, actual: Arrays, rows: Sequence[str]) -> Any:
    """Which detections of two answers are the same (a matrix): integers equal, the rest within SAME of the largest.

    Large rows, such as masks, may differ by SAME of their sum: an edge that moves by a hair changes a few values much.
    """
    same = np.ones((len(expected[rows[0]]), len(actual[rows[0]])), dtype=bool)
    for name in sorted(rows, key=lambda name: expected[name][:1].size):
        one, other = expected[name] * 1.0, actual[name] * 1.0
        allowed = SAME * np.abs(one).max(initial=0) if expected[name].dtype.kind == "f" else 0
        if one.ndim == 1:
            same &= np.abs(one[:, None] - other) <= allowed
            continue
        for i, j in np.argwhere(same):
            gap = np.abs(one[i] - other[j])
            large = gap.size > MAX_ROW
            same[i, j] = gap.sum() <= SAME * np.abs(one[i]).sum() if large else gap.max(initial=0) <= allowed
    return same


def unmatched(pairs: Any) -> int:
    """How many detections of one of two answers have no partner in the other."""
    return int(max((~pairs.any(1)).sum(), (~pairs.any(0)).sum()))


def perturbed_outputs(case: Case, job: Job, options: Options) -> Arrays:
    """PyTorch's answer to inputs that differ from the case's by what kernels differ by."""
    random = np.random.default_rng(0)
    inputs = [case.inputs[spec.name] for spec in job.specs]
    stirred = [
        x + PERTURBATION * random.standard_normal(x.shape) * np.where(x == 0, 1, np.abs(x))
        if x.dtype.kind == "f"
        else x
        for x in inputs
    ]
    tensors = [
        torch.tensor(new.astype(old.dtype), device=options.device) for new, old in zip(stirred, inputs, strict=True)
    ]
    outputs = call_model(job.model, tensors, [spec.name for spec in job.specs])
    return {name: to_numpy(tensor) for name, tensor in outputs.items()}


def rounding_error(single: Any, double: Any, largest: float, dtype: torch.dtype) -> tuple[float, float]:
    """What lies between PyTorch's answers in `dtype` and in float64, and what may lie between two right programs' then.

    Nothing (0) where PyTorch's own answer is mostly noise, unless that is as little as a sum leaves of values as large
    as `largest` when they cancel in it.
    """
    if single.shape != double.shape or single.dtype.kind != "f":
        return 0.0, 0.0
    noise, limits = float(np.abs(double - single).max()), torch.finfo(dtype)
    left = max(ROUNDING_LIMIT * float(np.abs(double).max()), ROUNDING_STEPS * limits.eps * largest)
    last_step = limits.smallest_normal * limits.eps  # no two numbers are nearer to each other: 6e-08 in float16
    return noise, max(ROUNDING_MARGIN * noise, last_step) if noise < left else 0.0


class Float64Answer(NamedTuple):
    """PyTorch's float64 answer, and the largest value that its layers passed on."""

    outputs: Arrays
    largest: float


def double_outputs(case: Case, job: Job, options: Options) -> Float64Answer | None:
    """PyTorch's float64 answer for `case`; None where the model has no other dtype than its own."""
    from torch.nn.modules.module import register_module_forward_hook

    dtype = float_dtype(job.model)
    if dtype is torch.float64:
        return None
    names = [spec.name for spec in job.specs]
    inputs = [torch.tensor(case.inputs[name], device=options.device) for name in names]
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    passed = [0.0, *map(largest_value, inputs)]

    def watch(module: nn.Module, _: Any, output: Any) -> None:
        if next(module.children(), None) is None:  # larger ones may pass on masks
            passed.extend(map(largest_value, flatten_outputs(output).values()))

    own = {name: tensor.data for name, tensor in state_of(job.model)}
    watcher = register_module_forward_hook(watch)
    job.model.double()
    try:
        outputs = call_model(job.model, inputs, names)
    except RejectedInputError:  # the model fixes a dtype somewhere
        return None
    finally:
        watcher.remove()
        job.model.to(dtype)
        for name, tensor in state_of(job.model):  # not all need have been of that dtype
            tensor.data = own[name]
    arrays = mask_padding({name: to_numpy(tensor) for name, tensor in outputs.items()}, case.inputs)
    return Float64Answer(arrays, max(passed)) if arrays.keys() == case.outputs.keys() else None


def largest_value(tensor: Tensor) -> float:
    """The largest finite absolute value of a tensor of real numbers, or 0."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(tensor.abs().nan_to_num(0.0, 0.0).max())


SAMPLE_SIZE = 1 << 13  # numbers of a value that are compared: of one wrong channel in a thousand, some eight
CLEARLY = 10  # times what rounding explains: a value that is nearer to one of the graph's is not said to differ


class Step(NamedTuple):
    """A call of torch by the model: the module and the source line that make it, and the values (see StepWatch)."""

    module: str
    line: str
    inputs: Sequence[int]
    outputs: Sequence[int]


class StepWatch:
    """Writes down a model's steps. A value is a number: equal tensors have the same one, and weights have none."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        ours = type(model).__module__ == __name__
        names = [(name.removeprefix("inner").lstrip(".") if ours else name, of) for name, of in model.named_modules()]
        self.names = {id(module): name or type(module).__name__ for name, module in names}
        self.weights = {id(tensor) for _, tensor in state_of(model)}
        self.samples: dict[tuple[int, bool, bytes], int] = {}  # size, whether these are whole numbers, some of them
        self.steps: list[Step] = []
        self.given = self.numbers(inputs)
        self.varying = set(self.given)  # what depends on the inputs

    def call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call `function`, and note the step if a tensor comes out that did not go in."""
        inputs = self.numbers((args, kwargs))
        result = function(*args, **kwargs)
        changed = args[:1] if result is None else result  # such as by __setitem__
        outputs = [number for number in self.numbers(changed) if number not in inputs]
        if outputs:
            if not self.varying.isdisjoint(inputs):
                self.varying.update(outputs)
            self.steps.append(Step(*self.place(), inputs, outputs))
        return result

    def numbers(self, value: Any) -> list[int]:
        """The numbers of the tensors in `value`, without those that have no elements, or none outside of a vmap()."""
        found = []
        for tensor in flatten_outputs(value).values():
            if id(tensor) not in self.weights and tensor.numel():
                with contextlib.suppress(RuntimeError):
                    flat = to_numpy(torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
                    sample = flat[sample_places(flat.size)].astype(np.float64)
                    key = (flat.size, flat.dtype.kind in "iub", sample.tobytes())
                    found.append(self.samples.setdefault(key, len(self.samples)))
        return found

    def place(self) -> tuple[str, str]:
        """The innermost module that is being called, and the innermost line of code that is not torch's."""
        frame: Any = sys._getframe()  # noqa: SLF001
        line, module = model_frame(frame), None
        while not module and frame.f_code is not call_model.__code__:
            frame = frame.f_back
            module = self.names.get(id(frame.f_locals.get("self")))
        return module or "", f"{os.path.basename(line.f_code.co_filename)}:{line.f_lineno}" if line else ""  # noqa: PTH119


def sample_places(size: int) -> Any:
    """The places of the elements of a value of `size` that are compared: up to SAMPLE_SIZE."""
    return np.random.default_rng(0).integers(size, size=SAMPLE_SIZE) if size > SAMPLE_SIZE else np.arange(size)


def graph_samples(path: Path, case: Case, sizes: Collection[int], device: str) -> Iterator[tuple[int, Any]]:
    """The size of each value of a graph that has one of `sizes`, and a sample of it, which the graph itself takes.

    So no more of the values than what is compared is in memory at once.
    """
    model, node = onnx.load(path, load_external_data=False), onnx.helper.make_node
    graph, count = model.graph, len(model.graph.node)
    probe = path.with_name(f".{path.name}.probe")

    def run(nodes: Sequence[onnx.NodeProto], results: Sequence[str]) -> Any:
        del graph.node[count:], graph.output[:]
        graph.node.extend(nodes)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
        onnx.save(model, probe)
        return open_session(probe, device).run(results, case.inputs)

    names = [tensor.name for tensor in graph.initializer if math.prod(tensor.dims) in sizes]
    names += [name for made in graph.node if "Sequence" not in made.op_type for name in made.output if name]
    found = run([node("Size", [name], [f"{name}/size"]) for name in names], [f"{name}/size" for name in names])
    known = {name: int(size) for name, size in zip(names, found, strict=True) if int(size) in sizes}
    for size in {*known.values()}:
        graph.initializer.append(onnx.numpy_helper.from_array(sample_places(size), f"probe/{size}"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "probe/flat"))
    nodes = []
    for name, size in known.items():
        nodes.append(node("Reshape", [name, "probe/flat"], [f"{name}/flat"]))
        nodes.append(node("Gather", [f"{name}/flat", f"probe/{size}"], [f"{name}/some"]))
        nodes.append(node("Cast", [f"{name}/some"], [f"{name}/sample"], to=onnx.TensorProto.DOUBLE))
    yield from zip(known.values(), run(nodes, [f"{name}/sample" for name in known]), strict=True)


def find_in_graph(path: Path, case: Case, watch: StepWatch, dtype: str, device: str) -> tuple[set[int], set[int]]:
    """The model's values that the graph has too, and those that one of its values is near to."""
    by_size: dict[int, list[tuple[int, Any, float, float]]] = {}
    for (size, whole, sample), value in watch.samples.items():
        ours = np.frombuffer(sample)
        relative, absolute = (0.0, 0.0) if whole else TOLERANCES[dtype]
        absolute *= float(np.abs(ours[np.isfinite(ours)]).max(initial=0))
        by_size.setdefault(size, []).append((value, ours, relative, absolute))
    right, near = set(watch.given), set[int]()
    for size, theirs in graph_samples(path, case, by_size, device):
        for value, ours, relative, absolute in by_size[size]:
            for factor, found in ((CLEARLY, near), (1, right)):
                rel, most = factor * relative, factor * absolute
                if not math.isclose(theirs[0], ours[0], rel_tol=rel, abs_tol=most):  # nearly always enough, and fast
                    break
                if np.isclose(theirs, ours, rel, most).all():
                    found.add(value)
    return right, near


def first_difference(watch: StepWatch, right: set[int], near: set[int], outputs: Collection[int]) -> Step | None:
    """The first step that takes what the graph has too and gives what it has not; None where that is not clear.

    A value that is missing because nodes were fused is right where all that is made of it is. What is the same
    everywhere shows nothing of that, nor do whole numbers that were made of others.
    """
    keys = list(watch.samples)
    live, vouched, doubted = set(outputs), set[int](), set[int]()

    def is_right(value: int) -> bool:
        return value in right or value not in watch.varying or (value in vouched and value not in doubted)

    for step in reversed(watch.steps):
        made = live.intersection(step.outputs)
        if made:
            live.update(step.inputs)
        if not all(map(is_right, made)):
            doubted.update(step.inputs)
        for _, whole, sample in (keys[value] for value in made if is_right(value)):
            if np.ptp(np.frombuffer(sample)):
                vouched.update(given for given in step.inputs if keys[given][1] or not whole)
    for step in watch.steps:
        wrong = {value for value in live.intersection(step.outputs) if not is_right(value)}
        if wrong and all(map(is_right, step.inputs)):
            return None if wrong <= near else step
    return None


def where_it_differs(path: Path, case: Case, job: Job, options: Options) -> str:
    """Where the graph first differs from the model for `case`, as the end of a sentence; "" where that is not clear.

    Nothing is looked for in graphs whose nodes lie in branches and loops. It is a courtesy: whatever goes wrong with
    it, the difference itself has been shown.
    """
    if is_archive(job.model) or job.step or job.parts:
        return ""
    inputs = [torch.from_numpy(case.inputs[spec.name]).to(options.device, spec.dtype) for spec in job.specs]
    try:
        watch = StepWatch(job.model, inputs)
        with torch_calls(watch.call):
            outputs = call_model(job.model, inputs, [spec.name for spec in job.specs])
        dtype = dtype_name(float_dtype(job.model))
        right, near = find_in_graph(path, case, watch, dtype, options.device)
        step = first_difference(watch, right, near, watch.numbers(outputs))
    except Exception:  # also for want of memory
        if LOG.verbose:
            traceback.print_exc(file=LOG.stream)
        return ""
    return f"; first differs in {step.module}{step.line and f' ({step.line})'}" if step and step.module else ""


# ---------------------------------------------------------------------------------------------------------------------
# supervise: a light process that watches the one that works
#
# The worker may be ended at any moment, by a signal, by the kernel for its memory, or by a crash in a library. Only
# another process can then still speak, remove the staging folder and choose the exit code.
# ---------------------------------------------------------------------------------------------------------------------

# The number of a descriptor: the worker writes there what it does, for the supervisor to say should it crash.
STEP_VARIABLE = "PT2ONNX_STEP"
# What ended earlier workers, as JSON: the attempts that are not to be repeated, and how each crashed.
CRASHED_VARIABLE = "PT2ONNX_CRASHED"
CRASHES = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGILL)
# Steps that do what the input says, and nothing else: where they crash, it is the input that cannot be used.
INPUT_STEPS = ("load", "build", "reference")
# glibc then asks for 2 MB pages for large blocks: a quarter less time for a 350 MB model, which is copied a few times.
# It is read when a process starts, so the worker is a new program and not only a fork. (glibc manual, "Tunables")
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def describe_success(report: Mapping[str, Any]) -> str:
    """The last line of a run that went well."""
    size = sum(report["files"].values()) / 1e6
    differences = [item for graph in report.get("graphs", [report]) for item in graph["verified"]]
    proof = "not verified"
    if differences:
        usual = [difference for difference in differences if "(" not in difference["case"]]
        shapes = len({difference["case"] for difference in usual})
        worst = max(difference["largest"] for difference in usual)
        proof = f"verified at {plural(shapes, 'shape')}, largest difference {worst:.2g}"
        samples = {item["case"] for item in differences if f" ({SAMPLE} " in item["case"]}
        proof += f", and with {plural(len(samples), 'sample')} of yours" if samples else ""
    names = " and ".join(graph["output"] for graph in report.get("graphs", [report]))
    return f"{names} ({size:.1f} MB, opset {report['opset']}, {report['exporter']} exporter), {proof}"


def cgroup_memory_files() -> Iterator[Path]:
    """The files that may hold a memory limit of this process, of both versions of cgroups (cgroups(7)).

    A limit of any group around the process's own counts. In a container the path may be the one that the host sees;
    what is mounted is then the container's own group, at the end of the walk.
    """
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            root, name = Path("/sys/fs/cgroup", controllers), "limit_in_bytes" if controllers else "max"
            inner = root / group.strip("/")
            yield from (folder / f"memory.{name}" for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def memory_limit() -> str:
    """The memory that this process may use: the smallest limit of its cgroups, or all that the machine has."""
    machine = smallest = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError):  # no Linux
        for file in cgroup_memory_files():
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                smallest = min(smallest, int(file.read_text(encoding="ascii")))
    limited = smallest < machine
    return f"{'the container is limited to' if limited else 'this machine has'} {smallest / 1e9:.3g} GB"


BAD_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
            errno.EISDIR, errno.EEXIST, errno.EBUSY)  # fmt: skip


def as_conversion_error(error: BaseException) -> ConversionError | None:
    """The user's view of an exception: None for a bug of ours."""
    if isinstance(error, ConversionError):
        return error
    if is_out_of_memory(error):
        advice = "give it more, or pass a smaller --input-shape"
        reason = first_line(error) if str(error) else "an allocation failed"
        message = f"out of memory ({reason}); {memory_limit()}: {advice}"
        return ConversionError(ExitStatus.RESOURCES, message)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message = f"cannot write: {error.strerror}; free some space there, or choose another -o"
        return ConversionError(ExitStatus.RESOURCES, message)
    if isinstance(error, OSError) and error.errno in BAD_PATH:
        message = f"cannot use {error.filename}: {error.strerror} (uid {os.getuid()}); check -i and -o"
        return UsageError(message)
    return None


def report_failure(error: ConversionError, standard_output: int, *, as_json: bool) -> int:
    """Print the [ERROR] line, and the JSON object where asked for; returns the exit code."""
    LOG.line("ERROR", str(error))
    if as_json:
        report = {"status": "error", "exit_code": int(error.status), "message": fit_screen(error)}
        print_report(report, standard_output)
    return int(error.status)


def print_report(report: Mapping[str, Any], standard_output: int) -> None:
    """Write the JSON object; a reader that has gone away changes nothing about the conversion."""
    with contextlib.suppress(OSError):
        os.write(standard_output, (json.dumps(report) + "\n").encode())


def become_worker(
    arguments: Sequence[str], run: str, crashed: Mapping[str, Sequence[str]], step: int, supervisor: int
) -> NoReturn:
    """Replace this process, a child of `supervisor`, by one that runs the same command as a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":
        c_library().prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the supervisor
    if os.getppid() != supervisor:  # it died before that
        os._exit(ExitStatus.BUG)
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), HUGE_PAGES)))
    told = {WORKER_VARIABLE: run, STEP_VARIABLE: str(step), CRASHED_VARIABLE: json.dumps(dict(crashed))}
    environment = {**os.environ, **told, "GLIBC_TUNABLES": tunables}
    os.execve(sys.executable, [sys.executable, "-P", __file__, *arguments], environment)  # noqa: S606


class Ended(NamedTuple):
    """How a worker ended: its exit code, or -N where signal N ended it or told us to; its last step and attempt."""

    code: int
    step: str
    attempt: str


def run_worker(
    arguments: Sequence[str], run: str, crashed: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Ended:
    """Run the worker in a child process; `crashed` are the attempts that it is to leave out.

    STOP_SIGNALS are blocked before and after, so that nothing is left half done: they wait until there is a worker to
    end, and change nothing any more once it has ended.
    """
    received: list[int] = []
    supervisor = os.getpid()
    step = os.memfd_create("step", 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where a parent ignores it, there would be nobody to wait for
    worker = os.fork()
    if worker == 0:
        become_worker(arguments, run, crashed, step, supervisor)

    def stop(number: int, _: object) -> None:
        received.append(number)
        os.kill(worker, signal.SIGKILL)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # not reaped yet: its id is nobody else's, so `stop` is safe
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    code = -received[0] if received and code == -signal.SIGKILL else code
    names = [os.pread(step, STEP_BYTES, place).decode(errors="replace").strip() for place in (0, STEP_BYTES)]
    os.close(step)
    return Ended(code, *names)


def worker_error(number: int, step: str, options: Options) -> ConversionError:
    """What it means that signal `number` ended the worker, in `step`, before anything was written."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number in STOP_SIGNALS:
        return ConversionError(128 + number, f"interrupted by {name}: nothing was written; run it again")
    killed = f"killed, most likely for using too much memory; {memory_limit()}: give it more"
    changed = f"{options.input} changed while it was read; convert it once it is whole"
    limit = f"{options.run_timeout:g} s" if options.run_timeout else "a model of its size should"
    patience = f"if it is only slow, pass --run-timeout {10 * (options.run_timeout or 6):g}"
    endless = f"{options.input}: opening it or running the model took longer than {limit}; {patience}"
    crashed = f"{crash_text(name, step)}; run again with --verbose, and try another --exporter"
    if number in CRASHES and (options.inspect or step.partition(":")[0] in INPUT_STEPS):
        broken = f"{options.input}: a library crashed ({name}) on what it holds ({step or 'inspect'})"
        return InputError(f"{broken}; save the model again, or its state dict")
    known: dict[int, ConversionError] = {
        signal.SIGKILL: ConversionError(ExitStatus.RESOURCES, killed),
        signal.SIGBUS: InputError(changed),  # raised when a mapped file was truncated
        signal.SIGALRM: InputError(endless),  # time_limit
    }
    return known.get(number) or ConversionError(ExitStatus.BUG, crashed)


def staging_folder(options: Options, name: str) -> Path:
    """Where a run works: in the model's folder, so that the last step is a rename, and in one folder to remove."""
    return options.folder / f".pt2onnx.{name}.partial"


def supervise(arguments: Sequence[str], options: Options, name: str) -> int:
    """Run the worker; whatever ends it, leave no debris, say what is true and return the exit code."""
    if options.inspect:
        return conclude(run_worker(arguments, name), None, options)
    staging = staging_folder(options, name)
    made = [folder for folder in options.output.absolute().parents if not folder.exists()]
    try:
        claim(staging)
        remove_abandoned(staging.parent)
        ended = run_workers(arguments, name, staging)
    except OSError:
        remove_debris(staging, made)
        raise
    try:
        report = settle(staging)
    except (OSError, ValueError) as error:
        what = f"{options.output} may be half replaced ({first_line(error)}): the older files are in {staging}/old"
        failure = ConversionError(ExitStatus.RESOURCES, f"{what}, and the next run puts them back")
        return report_failure(failure, 1, as_json=options.json)
    remove_debris(staging, made)
    return conclude(ended, report, options)


def run_workers(arguments: Sequence[str], name: str, staging: Path) -> Ended:
    """Run the worker, and another one without the attempt that a library crashed in, until none crashes so."""
    crashed: dict[str, tuple[str, str]] = {}
    while True:
        ended = run_worker(arguments, name, crashed)
        if -ended.code not in CRASHES or not ended.attempt or ended.attempt in crashed:
            return ended
        crashed[ended.attempt] = (signal.Signals(-ended.code).name, ended.step.partition(":")[0])
        LOG.info(f"{ended.attempt}: {crash_text(*crashed[ended.attempt])}; retrying without this attempt")
        empty_staging(staging)


def conclude(ended: Ended, report: Mapping[str, Any] | None, options: Options) -> int:
    """Say what the worker did not: that its files are in place, or which signal ended it; returns the exit code."""
    if report is not None:  # whatever happened afterwards
        LOG.line("SUCCESS", describe_success(report))
        if options.json:
            print_report(report, 1)
        return ExitStatus.OK
    if ended.code < 0:
        return report_failure(worker_error(-ended.code, ended.step, options), 1, as_json=options.json)
    if ended.code == ExitStatus.OK and not options.inspect:
        what = f"{options.output.parent} was removed while the model was converted; run it again"
        return report_failure(UsageError(what), 1, as_json=options.json)
    return ended.code


# ---------------------------------------------------------------------------------------------------------------------
# put into place: all files of a model, or none
#
# A run works in a hidden staging folder beside its output, and at the end renames what it made. One rename is one
# step, but several are not, and a process can be killed between any two. So a journal says beforehand what will be
# renamed, and the files to be replaced are kept until all is done. Who comes after the worker (the supervisor, or the
# next run where that was killed too) sees whether everything has arrived, and where it has not, puts the old files
# back.
# ---------------------------------------------------------------------------------------------------------------------


def same_content(file: Path, other: Path) -> bool:
    """Whether `other` is there and has the same bytes."""
    return other.exists() and filecmp.cmp(file, other, shallow=False)


LOCK = "lock"  # held by the supervisor and the worker; a process id tells nothing, as every container counts its own
JOURNAL = "moves.json"
FINISHED_JOURNAL = "moved.json"  # its name once everything is in place


class Place(NamedTuple):
    """A staged file and its final name."""

    file: Path
    target: Path


def choose_places(produced: Sequence[Produced], options: Options, run: Run) -> list[Place]:
    """Where the staged files belong: the graphs last, for they refer to the others."""
    beside = run.staging / "beside"
    side_files = sorted(beside.iterdir()) if beside.exists() else []
    files = [file for graph in produced for file in graph.path.parent.glob("[!.]*")]
    files.sort(key=lambda file: file.suffix == ".onnx")
    return [
        *(Place(file, options.folder / file.name) for file in side_files),
        *(Place(file, options.output.with_name(file.name)) for file in files),
    ]


def move_into_place(places: Iterable[Place], report: Mapping[str, Any], staging: Path) -> None:
    """Rename staged files to their final names, in this order; `report` is what to say of them.

    Files beside the graph that are there already with the same content are left alone.
    """
    beside = staging / "beside"
    moved = [place for place in places if place.file.parent != beside or not same_content(place.file, place.target)]
    for parent in {place.target.parent for place in moved}:
        parent.mkdir(exist_ok=True)
    write_journal(moved, report, staging)
    if len(moved) > 1:
        (staging / "old").mkdir()
        for number, place in enumerate(moved):
            back_up(place.target, staging / "old" / str(number))
    for place in moved:
        place.file.replace(place.target)
    with contextlib.suppress(OSError):  # everything is in place, whatever happens here
        (staging / JOURNAL).replace(staging / FINISHED_JOURNAL)
        for parent in {place.target.parent for place in moved}:
            descriptor = os.open(parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def write_journal(moved: Iterable[Place], report: Mapping[str, Any], staging: Path) -> None:
    """Note what will be moved where, told from the staging folder's parent, whose own path differs in containers."""
    moves = [(str(place.target.relative_to(staging.parent)), file_identity(place.file)) for place in moved]
    unfinished = staging / f"{JOURNAL}.new"
    with unfinished.open("w", encoding="utf-8") as stream:
        json.dump({"moves": moves, "report": report}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(staging / JOURNAL)


def file_identity(path: Path) -> list[int] | None:
    """What tells a file from another one and stays when it is renamed: size and time; None where there is no file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]


def back_up(file: Path, kept: Path) -> None:
    """Give `file`, if it is there, a second name; on a file system without hard links, only the second one."""
    if file.is_symlink() or file.is_file():
        try:
            os.link(file, kept, follow_symlinks=False)
        except OSError:
            file.replace(kept)


def empty_staging(staging: Path) -> None:
    """Remove what a try left; the lock stays."""
    for folder in staging.glob("*/"):
        shutil.rmtree(folder, ignore_errors=True)


def settle(staging: Path) -> dict[str, Any] | None:
    """The report of a run whose files are all in place; otherwise what it moved is taken back, and there is None.

    Nothing is done to a file that somebody else has put there since. May be repeated after having been killed itself.
    """
    journal = next((file for file in (staging / FINISHED_JOURNAL, staging / JOURNAL) if file.exists()), None)
    if journal is None:
        return None
    moves, report = read_journal(journal)
    if journal.name == FINISHED_JOURNAL or all(file_identity(target) == mark for target, mark in moves):
        return report
    for number, (target, mark) in enumerate(moves):
        kept = staging / "old" / str(number)
        if file_identity(target) not in (None, mark):
            continue
        if os.path.lexists(kept):
            kept.replace(target)
        else:
            target.unlink(missing_ok=True)
    return None


def read_journal(file: Path) -> tuple[list[tuple[Path, Any]], dict[str, Any]]:
    """What a journal says: each target with the identity of its new file, and the report.

    Raises ValueError for one that no run has written. The output's folder may be the input's, and the journal have come
    with that: so it may only name files of the folder.
    """
    staging, status = file.parent, file.lstat()
    plain = stat.S_ISREG(status.st_mode) and status.st_size < MAX_JSON_BYTES and not (staging / "old").is_symlink()
    try:
        content = json.loads(file.read_bytes() if plain else b"")
        moves, report = [(str(target), mark) for target, mark in content["moves"]], dict(content["report"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"its {file.name} is damaged") from None
    for target, _ in moves:
        name = target.removeprefix("onnx/")
        if not is_file_name(name) or (name != target and (staging.parent / "onnx").is_symlink()):
            raise ValueError(f"its {file.name} names what lies elsewhere")
    return [(staging.parent / target, mark) for target, mark in moves], report


def claim(staging: Path) -> int:
    """Make the staging folder and lock it until this process and its child have ended; returns the lock's descriptor.

    Between the two steps another run may take the folder for an abandoned one and remove it: then once more.
    """
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(staging / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            if lock_file(lock) and os.path.samestat(os.fstat(lock), (staging / LOCK).stat()):
                os.set_inheritable(lock, True)  # noqa: FBT003
                return lock
            os.close(lock)


def lock_file(descriptor: int) -> bool:
    """Lock a file unless another process has done so; on a file system without locks, nobody has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def remove_abandoned(folder: Path) -> None:
    """Settle and remove the staging folders of runs that were killed with their supervisors: their locks are free."""
    for staging in folder.glob(".pt2onnx.*.partial"):
        try:
            if staging.is_symlink() or staging.stat().st_uid != os.getuid():
                continue  # nobody else's journal is followed
            lock = os.open(staging / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            with os.fdopen(lock):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                settle(staging)
                shutil.rmtree(staging)
            LOG.info(f"removed {staging.name}, which a killed run had left")
        except (BlockingIOError, FileNotFoundError):  # its run goes on, or another run was quicker
            continue
        except (OSError, ValueError) as error:
            LOG.warn(f"{staging}, which a killed run left, cannot be removed: {first_line(error)}")


def remove_debris(staging: Path, folders: Iterable[Path]) -> None:
    """Remove the staging folder, and those of `folders`, which this run made, that are empty."""
    shutil.rmtree(staging, ignore_errors=True)
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# stored weights: tensors that stay in the mapped checkpoint
#
# They are cast and transposed a block at a time, where they are used.
# ---------------------------------------------------------------------------------------------------------------------

STREAM_FROM = 32 << 20  # bytes of all weights: smaller models are read at once
STORED_BYTES = 1 << 16  # smaller tensors are read at once
BLOCK_BYTES = 64 << 20  # of a stored tensor that are in memory at a time, where the operation allows it
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MADV_DONTNEED = 4  # madvise(2): the pages may go; they are read again from the file when they are touched


@functools.cache
def c_library() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None)


def drop_pages(address: int, end: int) -> None:
    """Let the whole pages between two addresses of an unchanged mapped file go."""
    first, last = -(-address // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
    if sys.platform == "linux" and last > first:
        c_library().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)


def span_bytes(tensor: Tensor) -> int:
    """The bytes from a tensor's first element to its last, whatever lies between them."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + steps) * tensor.itemsize if tensor.numel() else 0


@functools.cache
def stored_class() -> Any:
    """The class of stored tensors (torch is imported late)."""

    class Stored(torch.Tensor):
        """A tensor with the values of `source`, which lies in a mapped file, in another dtype or the same.

        Views and casts of it are stored tensors again, and so is what joins several; products and lookups read it a
        block at a time; any other operation reads it as a whole, for as long as it runs. It cannot be written to: that
        raises RuntimeError.
        https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-native-api
        """

        source: Any  # a tensor; None where it is joined, by a class whose methods do not ask for it
        kept_as: torch.dtype  # in the file

        @staticmethod
        def __new__(cls: Any, source: Tensor, dtype: torch.dtype) -> Any:
            return torch.Tensor._make_wrapper_subclass(  # noqa: SLF001  (the documented way)
                cls, source.shape, strides=source.stride(), dtype=dtype, device=source.device
            )

        def __init__(self, source: Tensor, dtype: torch.dtype) -> None:  # noqa: ARG002  (as in __new__)
            self.source, self.kept_as = source, source.dtype

        def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # mypy drops its name
            return f"{type(self).__name__}({shape_text(self.shape)}, {self.kept_as} as {self.dtype})"

        def read(self) -> Tensor:
            """Its values as an ordinary tensor: of the same dtype those in the mapped file."""
            return cast("Tensor", self.source.to(self.dtype))

        def let_go(self) -> None:
            """Give back the memory that reading took."""
            drop_pages(self.source.data_ptr(), self.source.data_ptr() + span_bytes(self.source))

        def address(self) -> tuple[int, ...]:
            """What tells two stored tensors apart that have the same shape and dtype."""
            return (self.source.data_ptr(), *self.source.stride())

        def cast(self, dtype: torch.dtype) -> Stored:
            """The same numbers in another dtype."""
            return Stored(self.source, dtype)

        def view_by(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            """The view or views of it that `func` makes; None where it has to be read for them."""
            views = func(self.source, *args, **kwargs)
            many = isinstance(views, (list, tuple))
            return [Stored(view, self.dtype) for view in views] if many else Stored(views, self.dtype)

        @classmethod  # while that of ordinary tensors is a function
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            return call_operator(func, args, kwargs or {})

    return Stored


def call_operator(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call an operator of torch with stored tensors among its arguments."""
    aten, first = torch.ops.aten, args[0]
    if isinstance(first, stored_class()):
        viewed = func.is_view or func is aten.detach.default
        if viewed and (views := first.view_by(func, args[1:], kwargs)) is not None:
            return views
        if func is aten._to_copy.default and casts_only(first, kwargs):  # noqa: SLF001
            return first.cast(kwargs.get("dtype", first.dtype))
        if func._schema.is_mutable:  # noqa: SLF001
            raise RuntimeError(f"{func} would write to weights that stay in their file")
    rules: dict[Any, Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]] = {
        aten.embedding.default: look_up_rows,
        aten.mm.default: multiply_in_blocks,
        aten.addmm.default: multiply_in_blocks,
        aten.stack.default: join,
        aten.cat.default: join,
    }
    return rules.get(func, call_with_values)(func, args, kwargs)


@functools.cache
def joined_class() -> Any:
    """The class of stored tensors that are made of several: transformers joins the experts of a layer."""
    Stored = stored_class()  # noqa: N806  (a class)

    class Joined(Stored):  # type: ignore[misc,valid-type]
        """Stored tensors of one dtype, one behind the other along `axis`."""

        @staticmethod
        def __new__(cls: Any, parts: Sequence[Any], axis: int) -> Any:
            shape = list(parts[0].shape)
            shape[axis] = sum(part.shape[axis] for part in parts)
            return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].dtype)  # noqa: SLF001

        def __init__(self, parts: Sequence[Any], axis: int) -> None:
            self.parts, self.axis, self.source, self.kept_as = list(parts), axis, None, parts[0].kept_as

        def read(self) -> Tensor:
            return torch.cat([part.read() for part in self.parts], self.axis)

        def let_go(self) -> None:
            for part in self.parts:
                part.let_go()

        def address(self) -> tuple[int, ...]:
            return tuple(itertools.chain.from_iterable(part.address() for part in self.parts))

        def cast(self, dtype: torch.dtype) -> Any:
            return Joined([part.cast(dtype) for part in self.parts], self.axis)

        def view_by(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            return view_of_joined(self, func, args) if not kwargs else None

    return Joined


def view_of_joined(joined: Any, func: Any, args: Sequence[Any]) -> Any:
    """The view or views of a joined tensor that `func` makes, joined again or one part's; None of unusual kinds."""
    kind = func._schema.name.removeprefix("aten::")  # noqa: SLF001
    if kind == "narrow":
        axis, start, length = args
        return torch.ops.aten.slice.Tensor(joined, axis, start, start + length)
    if kind == "split":
        axis, length = (args[1] if len(args) > 1 else 0), args[0]
        starts = range(0, joined.shape[axis], length)
        return [joined.narrow(axis, start, min(length, joined.shape[axis] - start)) for start in starts]
    if kind in ("slice", "select") and (args[0] if args else 0) % joined.dim() == joined.axis:
        if kind == "select":
            index = args[1] % joined.shape[joined.axis]
            return part_of_joined(joined, index, index + 1).parts[0].select(joined.axis, 0)
        first, last, step = slice(*args[1:]).indices(joined.shape[joined.axis])
        return part_of_joined(joined, first, max(first, last)) if step == 1 else None
    if kind not in ("alias", "detach", "t", "permute", "transpose", "slice", "select"):
        return None
    numbered = torch.empty_strided(joined.shape, tuple(range(1, joined.dim() + 1)), device="meta")  # strides as names
    axis = func(numbered, *args).stride().index(joined.axis + 1)
    return joined_class()([func(part, *args) for part in joined.parts], axis)


def part_of_joined(joined: Any, first: int, last: int) -> Any:
    """What lies from `first` to before `last` along the axis of a joined tensor."""
    found, begin = [], 0
    for part in joined.parts:
        end = begin + part.shape[joined.axis]
        start, stop = max(first, begin), min(last, end)
        if start < stop:
            found.append(part.narrow(joined.axis, start - begin, stop - start))
        begin = end
    return joined_class()(found or [joined.parts[0].narrow(joined.axis, 0, 0)], joined.axis)


def join(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Stack or concatenate: a stored tensor where all parts are, and of one dtype."""
    parts, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    kinds = {(part.kept_as, part.dtype) if isinstance(part, stored_class()) else None for part in parts}
    if len(kinds) > 1 or None in kinds:
        return call_with_values(func, args, kwargs)
    if func is torch.ops.aten.stack.default:
        axis %= parts[0].dim() + 1
        parts = [part.unsqueeze(axis) for part in parts]
    return joined_class()(parts, axis % parts[0].dim())


def casts_only(stored: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether a copy changes the dtype at most, so that casting the source gives the same numbers."""
    lossless = torch.promote_types(stored.kept_as, stored.dtype) is stored.dtype
    on_cpu = wanted.get("device") in (None, torch.device("cpu"))
    return lossless and on_cpu and wanted.get("dtype", stored.dtype).is_floating_point


def look_up_rows(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An embedding that reads only the rows it needs (what else it is given is about gradients)."""
    table, indices = args[:2]
    if not isinstance(table, stored_class()) or table.source is None:
        return call_with_values(func, args, kwargs)
    rows: Tensor = table.source[indices].to(table.dtype)
    table.let_go()
    return rows


def multiply_in_blocks(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A product (mm, or addmm with a vector) whose last factor is read a block of columns at a time."""
    *others, last = args
    if not isinstance(last, stored_class()) or (len(others) > 1 and others[0].dim() > 1):
        return call_with_values(func, args, kwargs)
    step = max(1, BLOCK_BYTES // max(1, last.shape[0] * last.itemsize))
    parts = []
    for start in range(0, last.shape[1], step):
        block = last[:, start : start + step]
        near = [other[start : start + step] if other.dim() == 1 and len(other) > 1 else other for other in others]
        parts.append(func(*map(in_memory, near), read_block(block), **kwargs))
        block.let_go()
    return torch.cat(parts, 1) if len(parts) != 1 else parts[0]


def read_block(stored: Any) -> Tensor:
    """The values of a stored matrix, until the next block is read: a cast one lies where the last one lay."""
    if stored.source is None or stored.kept_as is stored.dtype or stored.nbytes > BLOCK_BYTES:
        return in_memory(stored)
    rows = stored.source.t() if stored.stride(0) < stored.stride(1) else stored.source
    values = block_memory()[: stored.nbytes].view(stored.dtype).view(rows.shape).copy_(rows)
    return values.t() if rows is not stored.source else values


@functools.cache
def block_memory() -> Tensor:
    """BLOCK_BYTES that are taken from the system once: asking again for every block costs more than a cast."""
    return torch.empty(BLOCK_BYTES, dtype=torch.uint8)


def call_with_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call an operator of torch with the values of stored tensors."""
    used: list[Any] = []

    def read(value: Any) -> Any:
        if isinstance(value, stored_class()):
            used.append(value)
            return value.read()
        return value

    args, kwargs = torch.utils._pytree.tree_map(read, (list(args), dict(kwargs)))  # noqa: SLF001
    result = func(*args, **kwargs)
    for stored in used:
        stored.let_go()
    return result


def store_all(weights: Mapping[str, Tensor], options: Options, run: Run) -> dict[str, Tensor]:
    """`weights` with the large ones as stored tensors, unless all are small, or wanted in memory."""
    large = sum(tensor.nbytes for tensor in weights.values()) >= STREAM_FROM
    if run.in_memory or options.device != "cpu" or not large:
        return dict(weights)
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    run.streamed = True
    return {
        name: stored_class()(tensor.detach(), tensor.dtype)
        if tensor.nbytes >= STORED_BYTES and tensor.dtype in floats and is_mapped(tensor)
        else tensor
        for name, tensor in weights.items()
    }


def store_parameters(model: nn.Module, options: Options, run: Run) -> None:
    """Let the large parameters of a model that was loaded whole be stored tensors, by the rules of store_all."""
    places = [place for place in weight_places(model) if isinstance(place[2], nn.Parameter)]
    weights = store_all({str(id(tensor)): tensor for *_, tensor in places}, options, run)
    stored = {
        key: nn.Parameter(tensor, requires_grad=False)
        for key, tensor in weights.items()
        if isinstance(tensor, stored_class())
    }
    for own, name, tensor in places:
        own[name] = stored.get(str(id(tensor)), tensor)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's data lie in a mapped file."""
    address = tensor.data_ptr()
    return any(start <= address and address + span_bytes(tensor) <= end for start, end in MAPPED.items())


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory, or as before where they are."""
    return tensor.read() if isinstance(tensor, stored_class()) else tensor


WeightPlace = tuple[dict[str, Any], str, "Tensor"]  # the dict that a module keeps a weight in, its key, the weight


def weight_places(model: nn.Module) -> Iterator[WeightPlace]:
    """Where the modules of `model` keep the tensors of its state dict: the dict, the key in it and the tensor."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # keeps them elsewhere
            continue
        lost = module._non_persistent_buffers_set  # noqa: SLF001  (there is no public way to ask, as below)
        for own in (module._parameters, module._buffers):  # noqa: SLF001
            yield from ((own, name, tensor) for name, tensor in own.items() if tensor is not None and name not in lost)


def put_weights(places: Iterable[WeightPlace], values: Mapping[int, Any]) -> None:
    """Put values in the places of weights, by these weights' identities; None where there is no value."""
    for owner, name, tensor in places:
        owner[name] = values.get(id(tensor))


@contextlib.contextmanager
def stored_weights_as(model: nn.Module, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While in context, stored weights are the ordinary parameters that `make` makes; shared ones stay shared."""
    places = [place for place in weight_places(model) if isinstance(place[2], stored_class())]
    before = {id(tensor): tensor for *_, tensor in places}
    made = {key: nn.Parameter(make(tensor.detach()), requires_grad=False) for key, tensor in before.items()}
    put_weights(places, made)
    try:
        yield
    finally:
        put_weights(places, before)


def blank_maker(tensors: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """Makes zeros without memory in place of stored tensors, the largest of which is among `tensors`.

    All of them lie in one anonymous mapping, behind which is only the kernel's page of zeros.
    """
    size = max((tensor.nbytes for tensor in tensors), default=0)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    zeros = torch.frombuffer(mmap.mmap(-1, size or 1, flags=flags), dtype=torch.uint8)

    def blank(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, stored_class()):
            return tensor.detach()
        return zeros[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    return blank


def blank_weights(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While in context, blanks stand for the stored weights of `model`: where only the shapes of its answers count."""
    return stored_weights_as(model, blank_maker(tensor for _, tensor in state_of(model)))


@contextlib.contextmanager
def weights_as_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While in context, `model` takes its weights as inputs after its own: those that are yielded, in their order.

    They are named as in the state dict, and blanks where they are stored ones.
    """
    places = list(weight_places(model))
    weights = {id(tensor): tensor for *_, tensor in places}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    blank = blank_maker(weights.values())
    blanks = {names[key]: blank(tensor) for key, tensor in weights.items()}
    forward = model.forward

    def call(*given: Tensor) -> Any:
        put_weights(places, dict(zip(weights, given[-len(weights) :], strict=True)))
        try:
            return forward(*given[: -len(weights)])
        finally:
            put_weights(places, {})

    put_weights(places, {})
    model.forward = call
    try:
        yield blanks
    finally:
        del model.forward
        put_weights(places, weights)


def byte_blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in its logical order, BLOCK_BYTES or less at a time."""
    rows = tensor.shape[0] if tensor.dim() else 1
    step = max(1, BLOCK_BYTES * rows // max(1, tensor.nbytes))
    for part in tensor.split(step) if tensor.dim() else (tensor,):
        yield in_memory(part).contiguous().reshape(-1).view(torch.uint8).numpy().data
        if isinstance(part, stored_class()):
            part.let_go()


# ---------------------------------------------------------------------------------------------------------------------
# modules and tensors: how a model is called, and what it holds
# ---------------------------------------------------------------------------------------------------------------------

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # asm-generic/mman.h; Python names it from 3.13 on
MAPPED: dict[int, int] = {}  # where files lie in memory: the addresses of their begins and ends


def map_file(path: Path) -> torch.UntypedStorage:
    """The bytes of a file, read on demand; writing to them copies the page and leaves the file alone.

    MAP_NORESERVE sets no memory aside for such copies, so that a file may be larger than the memory.
    """
    flags = mmap.MAP_PRIVATE | MAP_NORESERVE
    with open_input(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    storage = torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()
    MAPPED[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
    return storage


def accepts(function: Callable[..., Any], argument: str, *, by_name: bool = False) -> bool:
    """Whether `function` names the keyword `argument` in its signature, or (unless `by_name`) takes any."""
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):
        return False
    any_keyword = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    return argument in parameters or (any_keyword and not by_name)


def shape_text(sizes: Iterable[int]) -> str:
    """`1x3x224x224`."""
    return "x".join(map(str, sizes)) or "scalar"


def forward_parameters(model: nn.Module) -> tuple[list[str], int]:
    """Names of forward's tensor parameters in order, and how many of them it cannot do without."""
    if isinstance(model, torch.jit.ScriptModule):
        arguments = cast("Any", model.forward).schema.arguments[1:]
        required = [argument for argument in arguments if not argument.has_default_value()]
        for argument in required:
            if str(argument.type) in (*NUMBERS, "str"):
                advice = f"pass --input-value {argument.name}=NUMBER, and it becomes a constant of the graph"
                advice = (
                    "wrap the model so that forward takes tensors, and save it again"
                    if str(argument.type) == "str"
                    else advice
                )
                what = f"forward's argument {argument.name} is {argument.type}, which ONNX cannot take as an input"
                raise ConversionError(ExitStatus.EXPORT, f"{what}: {advice}")
        return [argument.name for argument in arguments], len(required)
    several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = [p for p in signature(model.forward).parameters.values() if p.kind not in several]
    return [p.name for p in parameters], sum(p.default is Parameter.empty for p in parameters)


NUMBERS: dict[str, Callable[[float], float]] = {"int": int, "float": float, "bool": bool}  # of TorchScript's types


def with_constants(model: torch.jit.ScriptModule, options: Options) -> tuple[torch.jit.ScriptModule, Options]:
    """`model` without those arguments that are plain numbers and that --input-value gives, and what is left of that."""
    arguments = cast("Any", model.forward).schema.arguments[1:]
    given = dict(options.input_value)
    plain = {
        a.name: NUMBERS[str(a.type)](given[a.name][0]) for a in arguments if a.name in given and str(a.type) in NUMBERS
    }
    if not plain:
        return model, options
    holder = nn.Module()
    holder.inner = model
    scripted = torch.jit.script(holder)
    left = [f"{a.name}: {a.type.annotation_str}" for a in arguments if a.name not in plain]
    values = [f"{a.name}={plain.get(a.name, a.name)}" for a in arguments]
    scripted.define(f"def forward(self, {', '.join(left)}):\n    return self.inner({', '.join(values)})\n")
    for name, value in plain.items():
        LOG.warn(f"{name} is {value} in the graph, a constant (--input-value)")
    return scripted.eval(), replace(options, input_value=[pair for pair in options.input_value if pair[0] not in plain])


def torch_folder() -> str:
    """Where torch's own code lies: a source line is one of its, and not of torchvision, if its path begins so."""
    return os.path.join(os.path.dirname(torch.__file__), "")  # noqa: PTH118, PTH120


class Arguments(NamedTuple):
    """How forward is called with flat tensors: which of `names` belong together, and whether it is told the names."""

    names: Sequence[str]
    parameters: Collection[str]
    keywords_only: bool

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str]) -> Arguments:
        """For inputs called `names`; NAME.KEY are entries of forward's argument NAME, a list where they are numbers."""
        return cls(names, forward_parameters(model)[0], takes_keywords_only(model))

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments by position and by name."""
        values: dict[str, Any] = {}
        for name, tensor in zip(self.names, tensors, strict=True):
            outer, _, key = name.partition(".")
            if key and outer in self.parameters:
                values.setdefault(outer, {})[key] = tensor
            else:
                values[name] = tensor
        for name, value in values.items():
            if isinstance(value, dict) and all(map(str.isdecimal, value)):
                values[name] = list(value.values())
        by_name = (len(values) > 1 or self.keywords_only) and set(values) <= set(self.parameters)
        return ([], values) if by_name else (list(values.values()), {})


def takes_keywords_only(model: nn.Module) -> bool:
    """Whether forward's arguments have to be named."""
    if isinstance(model, torch.jit.ScriptModule):
        return False
    kinds = {parameter.kind for parameter in signature(model.forward).parameters.values()}
    return Parameter.KEYWORD_ONLY in kinds


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point weight: its inputs have the same."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def flatten_outputs(value: Any) -> dict[str, Tensor]:
    """Every tensor of nested outputs, in order, under its own name: `output`, `logits`, `boxes`, `aux_0`.

    Names that are equal once they are spelt as ONNX wants them are numbered.
    """
    found: dict[str, Tensor] = {}

    def walk(item: Any, path: tuple[str, ...]) -> None:
        if isinstance(item, torch.Tensor):
            text = "_".join(path)
            name = re.sub(r"[^\w.]", "_", text if text and not text[0].isdigit() else f"output_{text}".rstrip("_"))
            numbered = (f"{name}_{number}" for number in itertools.count(1))
            found[name if name not in found else next(other for other in numbered if other not in found)] = item
        elif isinstance(item, Mapping):
            for key, entry in item.items():
                walk(entry, (*path, str(key)))
        elif hasattr(item, "_fields"):
            for key, entry in zip(item._fields, item, strict=True):
                walk(entry, (*path, key))
        elif hasattr(item, "__dataclass_fields__"):
            for key in item.__dataclass_fields__:
                walk(getattr(item, key), (*path, key))
        elif isinstance(item, (list, tuple)):
            for index, entry in enumerate(item):
                walk(entry, path if len(item) == 1 else (*path, str(index)))

    walk(value, ())
    return found


def as_module(model: nn.Module, specs: Sequence[InputSpec], call: Callable[[Any, dict[str, Tensor]], Any]) -> nn.Module:
    """A module that takes the tensors of `specs` by position, and returns what `call` makes of `model` and them."""
    names = [spec.name for spec in specs]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *inputs: Tensor) -> Any:
            return call(self.inner, dict(zip(names, inputs, strict=True)))

    return Called()


def flat_module(model: nn.Module, specs: Sequence[InputSpec]) -> nn.Module:
    """`model` as the exporters like it: tensors in by position, a flat tuple of tensors out, no gradients."""
    arguments = Arguments.of(model, [spec.name for spec in specs])

    def call(inner: Any, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        by_position, by_name = arguments(list(given.values()))
        return tuple(flatten_outputs(inner(*by_position, **by_name)).values())

    return as_module(model, specs, call)


def call_model(model: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The model's outputs by name; raises RejectedInputError with what the model said."""
    by_position, by_name = Arguments.of(model, names)(inputs)
    try:
        with torch.no_grad(), RUNS.one():
            result = model(*by_position, **by_name)
    except Exception as error:  # a model may raise anything
        raise_out_of_memory(error)
        raise RejectedInputError(first_line(error)) from error
    outputs = flatten_outputs(result)
    taken = set(names) & outputs.keys()
    return {f"{name}_out" if name in taken else name: tensor for name, tensor in outputs.items()}


def numbered(content: Any) -> Any:
    """A list of models or weights, or a ModuleList, which has no forward, as a checkpoint whose keys are numbers."""
    if type(content) in (nn.ModuleList, nn.ModuleDict):
        return dict(content.named_children())
    if isinstance(content, (list, tuple)) and any(isinstance(entry, (nn.Module, Mapping)) for entry in content):
        return {str(number): entry for number, entry in enumerate(content)}
    return content


@contextlib.contextmanager
def torch_calls(call: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Let `call` make every call of a function of torch's in context: it gets the function, `args` and `kwargs`."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            return call(function, args, kwargs or {})

    with Mode():
        yield


def model_frame(frame: Any) -> Any:
    """The innermost frame, from `frame` outwards, that runs neither torch's code nor this file's; None for none."""
    library = torch_folder()
    while frame is not None and frame.f_code.co_filename.startswith((library, __file__)):
        frame = None if frame.f_code is call_model.__code__ else frame.f_back
    return frame


def is_archive(model: nn.Module) -> bool:
    """Whether the code of `model` came out of a TorchScript or .pt2 archive."""
    return isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule))


def use_device(model: torch.jit.ScriptModule, device: str) -> None:
    """Let what TorchScript's code puts on a GPU lie on `device`: torch.jit.load moves the weights alone."""

    def named(graph: Any) -> list[Any]:
        constants = graph.findAllNodes("prim::Constant")
        devices = [node for node in constants if str(node.output().type()) == "Device"]
        calls = graph.findAllNodes("aten::cuda") if device == "cpu" else []
        return [*calls, *(node for node in devices if node.s("value").partition(":")[0] not in (device, "cpu"))]

    forward: Any = getattr(model, "forward", None)
    if not hasattr(forward, "graph") or not named(model.inlined_graph):
        return
    torch._C._jit_pass_inline(forward.graph)  # noqa: SLF001
    for node in named(forward.graph):
        if node.kind() == "aten::cuda":
            node.output().replaceAllUsesWith(node.inputsAt(0))
            node.destroy()
        else:
            node.s_("value", device)
    LOG.info(f"device: what the TorchScript code puts on another one lies on {device} (--device)")


@contextlib.contextmanager
def without_kept_state(model: nn.Module) -> Iterator[None]:
    """Let the modules forget what they keep between calls, such as embeddings for the last length.

    Exporters would take it for constants. It lies in attributes, or in dicts that are attributes: buffers, hooks. What
    has become another class, as lazy layers do when they are first called, stays that.
    """
    states = [
        (module, type(module), state, dict(state))
        for module in model.modules()
        for own in [module.__dict__]
        for state in (own, *(value for value in own.values() if isinstance(value, dict)))
    ]
    try:
        yield
    finally:
        for module, kind, state, original in states:
            if type(module) is kind:
                state.clear()
                state.update(original)


def to_numpy(tensor: Tensor) -> Any:
    """A numpy copy on the CPU; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy(force=True).copy()


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as numpy and --input-shape call it."""
    return str(dtype).removeprefix("torch.")


def state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of `model` by name."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


def weight_bytes(model: nn.Module) -> int:
    """The bytes of all parameters and buffers, shared ones once."""
    return sum(tensor.numel() * tensor.itemsize for _, tensor in state_of(model))  # sparse ones have no nbytes


def choose_dtype(model: nn.Module, options: Options) -> None:
    """Give a model the dtype of --dtype; by default half-precision weights become float32, as in folders.

    Raises UsageError where that is impossible: an archive's code was written for its own dtype.
    """
    dtype, wanted = float_dtype(model), getattr(torch, DTYPE_NAMES[options.dtype])
    if is_archive(model) and options.dtype != "fp32" and wanted is not dtype:
        raise UsageError(f"--dtype {options.dtype}: an archive's code is made for {dtype}; leave --dtype out")
    half = (torch.bfloat16,) if is_archive(model) else (torch.bfloat16, torch.float16)
    if wanted is not dtype and (options.dtype != "fp32" or dtype in half):
        LOG.info(f"weights: {str(dtype).removeprefix('torch.')} becomes {DTYPE_NAMES[options.dtype]} (--dtype)")
        model.to(wanted)


def check_weights(tensors: Iterable[Tensor], path: Path) -> None:
    """Raise InputError where `tensors` have sizes only."""
    if any(tensor.is_meta for tensor in tensors):
        raise InputError(f"{path} holds no weights, only sizes (the meta device); save it again with its weights")


# ---------------------------------------------------------------------------------------------------------------------
# settings: JSON that came with the input, read once into a form that knows the type of each value
# ---------------------------------------------------------------------------------------------------------------------

MAX_JSON_BYTES = 16 << 20  # of one settings file: the largest known ones, with 20,000 labels, have 1 MB
MAX_JSON_DEPTH = 20  # of objects and lists in each other: configurations of several parts have 6
MAX_JSON_VALUES = 1_000_000  # of all of a folder's settings together: an index has one for each tensor


class Settings:
    """An object of a JSON file that came with the input; a value of another type raises DamagedFileError by its name.

    A key that is missing or null is None, or an empty list.
    """

    def __init__(self, content: object, where: str) -> None:
        self.where = where
        if not isinstance(content, dict):
            raise DamagedFileError(f"{where} holds {shown(content)}, not an object; repair it")
        self.content = content

    def value(self, key: str, kind: type[T], wanted: str) -> T | None:
        """The value of `key`, which must be a `kind`."""
        value: T | None = self.content.get(key)
        if value is not None and type(value) is not kind:
            raise self.misfit(key, wanted)
        return value

    def misfit(self, key: str, wanted: str) -> DamagedFileError:
        """What to raise where the value of `key` is not what is `wanted`."""
        return DamagedFileError(f"{self.where}: {key} is {shown(self.content.get(key))}, not {wanted}; repair it")

    def name(self, key: str) -> str | None:
        """A string."""
        return self.value(key, str, "a string")

    def names(self, key: str) -> list[str]:
        """A list of strings."""
        values = self.value(key, list, "a list of names") or []
        if not all(type(value) is str for value in values):
            raise self.misfit(key, "a list of names")
        return values

    def flag(self, key: str) -> bool:
        """True or false."""
        return self.value(key, bool, "true or false") or False

    def integer(self, key: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.value(key, int, "a whole number")
        if value is not None and not low <= value <= high:
            raise self.misfit(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float | None:
        """A number from `low` to `high`."""
        value = self.content.get(key)
        if value is not None and plain_numbers([value], low, high) is None:
            raise self.misfit(key, f"a number from {low:g} to {high:g}")
        return value

    def numbers(
        self, key: str, count: int | None, low: float, high: float, *, whole: bool = False
    ) -> tuple[Any, ...] | None:
        """`count` numbers, or a few, from `low` to `high`, all of them `whole` where that is asked for."""
        if self.content.get(key) is None:
            return None
        values = plain_numbers(self.content[key], low, high, whole=whole)
        if values is None or count not in (None, len(values)):
            many = "a list of" if count is None else count
            raise self.misfit(key, f"{many} {'whole ' if whole else ''}numbers from {low:g} to {high:g}")
        return values

    def section(self, key: str) -> Settings | None:
        """An object."""
        value = self.content.get(key)
        return None if value is None else Settings(value, f"{self.where}: {key}")

    def sections(self, key: str) -> list[Settings]:
        """A list of objects."""
        values = self.value(key, list, "a list") or []
        return [Settings(value, f"{self.where}: {key}[{place}]") for place, value in enumerate(values)]


def plain_numbers(value: object, low: float, high: float, *, whole: bool = False) -> tuple[Any, ...] | None:
    """The entries of a short list of finite numbers from `low` to `high`; None for anything else."""
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, (list, tuple)) or len(value) > 16:
        return None
    fits = all(type(entry) in kinds and low <= entry <= high for entry in value)  # NaN is in no range
    return tuple(value) if fits else None


def read_bounded(path: Path, limit: int, name: str = "") -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises DamagedFileError that names it, by its own name."""
    name = name or path.name
    if not os.path.lexists(path):
        raise DamagedFileError(f"{name} is missing")
    with open_input(path, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DamagedFileError(f"{name} has more than {limit >> 20} MB, larger than any known one")
    return data


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises DamagedFileError that names it."""
    return parse_json(read_bounded(path, MAX_INDEX_BYTES), path.name)


def count_values(data: bytes) -> int:
    """How many values JSON of these bytes has at most."""
    return sum(data.count(mark) for mark in (b"[", b"{", b","))


def check_values(count: int, where: str) -> None:
    """Raise DamagedFileError for more values than any known model's settings have: each is an object in memory."""
    if count > MAX_JSON_VALUES:
        raise DamagedFileError(f"{where} would have {count} values, more than those of any known model")


def parse_json(data: bytes, file: str) -> Any:
    """The content of JSON, which must be UTF-8, without a key that is there twice; raises DamagedFileError.

    Infinity stands in configurations that transformers wrote (Mamba-2's time_step_limit), NaN in none.
    """

    def constant(name: str) -> float:
        if name == "NaN":
            raise ValueError("NaN is no number")
        return float(name)

    check_values(count_values(data), file)
    try:
        content = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{file} is damaged ({json_problem(error)}); download it again") from None
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            entry
            for node in level
            if isinstance(node, (dict, list))
            for entry in (node.values() if isinstance(node, dict) else node)
        ]
    if level:
        raise DamagedFileError(
            f"{file} is nested more than {MAX_JSON_DEPTH} levels deep, as no known one is; repair it"
        )
    return content


def json_problem(error: Exception) -> str:
    """What keeps a text from being read as JSON, told from what json.loads raised."""
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON from line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 from byte {error.start}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number has too many digits" if "int_max_str_digits" in str(error) else str(error)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError where it has a key twice, which readers take differently."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def is_file_name(name: str) -> bool:
    """Whether text from a file names something in a folder, and not the folder itself or what lies elsewhere."""
    if os.path.basename(name) != name or name in ("", ".", ".."):  # noqa: PTH119  (text)
        return False
    return "\0" not in name and len(name.encode(errors="replace")) < 256  # what file systems take


# ---------------------------------------------------------------------------------------------------------------------
# files: the one way to the input's files, the wall around everything else, and what running the input may take
#
# Takes paths, gives open files. A file of the input lies, resolved, in what the user named, is a regular file and the
# same one each time that it is opened. While the input is loaded and a model is built from it, nothing else is
# opened, started or connected to: whatever a file makes a library try, the wall is there.
# ---------------------------------------------------------------------------------------------------------------------


def is_snapshot(folder: Path) -> bool:
    """Whether `folder` is one that the hub's cache keeps, with links to its `blobs`."""
    return folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()


INPUT_ROOTS: set[Path] = set()  # what the user named: files and folders, as their real paths
SEEN_FILES: dict[Path, tuple[int, ...]] = {}  # the fingerprint of each file of the input when it was first opened


def admit(path: Path) -> None:
    """Let the file `path`, or every file in that folder, be opened as the input, or as a part of it."""
    root = path.resolve()
    INPUT_ROOTS.update({root, root.parent.parent / "blobs"} if is_snapshot(root) else {root})
    for file in [file for file in (*SEEN_FILES,) if file == root or root in file.parents]:  # threads add to it
        del SEEN_FILES[file]


def is_admitted(real: Path) -> bool:
    """Whether the real path of a file is that of an admitted one, or lies in an admitted folder."""
    return not INPUT_ROOTS.isdisjoint((real, *real.parents))


def fingerprint(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def real_input(path: Path, name: str = "") -> Path:
    """The real path of a file or folder of the input; raises RefusedFileError where it lies elsewhere."""
    real = Path(os.path.realpath(path))
    if not is_admitted(real):
        what = f"{name or path.name} is a link that leads out of the folder"
        raise RefusedFileError(f"{what}; copy the file into it")
    return real


def open_input(path: Path, name: str = "") -> io.BufferedReader:
    """Open a file of the input for reading; messages call it by `name`, or the last part of its path.

    Raises RefusedFileError where it lies elsewhere, DamagedFileError where it is not a regular file, or not the one
    that was opened before under this name; OSError.
    """
    real, name = real_input(path, name), name or path.name
    # The last part of a real path is no link unless it just became one; a pipe does not make us wait.
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    problem = "" if stat.S_ISREG(status.st_mode) else f"{name} is not a regular file"
    if SEEN_FILES.setdefault(real, fingerprint(status)) != fingerprint(status):
        problem = problem or f"{name} changed while it was read; convert it once it is whole"
    if problem:
        os.close(descriptor)
        raise DamagedFileError(problem)
    return os.fdopen(descriptor, "rb")


# Events of the audit hook (https://docs.python.org/3/library/audit_events.html) that act on more than this process.
# What begins so is refused while the wall is up, ...
OUTSIDE_EVENTS = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile",
    "pty.", "urllib.", "http.", "ftplib.", "imaplib.", "poplib.", "smtplib.", "telnetlib.", "webbrowser.", "sqlite3.",
)  # fmt: skip
# ... and this is, unless all its paths lie in a folder that we work in: where among the arguments each path stands, and
# the descriptor of the folder that it is relative to, which is -1 for none.
CHANGING_EVENTS = {
    **dict.fromkeys(("os.rmdir", "os.remove"), ((0, 1),)), **dict.fromkeys(("os.mkdir", "os.chmod"), ((0, 2),)),
    **dict.fromkeys(("os.chown", "os.utime"), ((0, 3),)), **dict.fromkeys(("os.rename", "os.link"), ((0, 2), (1, 3))),
    **dict.fromkeys(("os.truncate", "os.setxattr", "os.removexattr"), ((0, 9),)), "os.symlink": ((1, 2),),
}  # fmt: skip
HARMLESS_EVENTS = ("socket.gethostname",)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What libraries ask the system about itself.
SYSTEM_FILES = ("/dev/null", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo", "/proc/self/status", "/proc/self/statm",
                "/proc/self/maps", "/proc/self/cgroup", "/proc/self/mountinfo", "/sys/devices/system",
                "/sys/fs/cgroup")  # fmt: skip


class Wall:
    """While it is up, Python code can open the input and the libraries' own files, and write into `workplaces` alone.

    An audit hook (PEP 578) hears of every file, connection and process that Python code asks for, in any thread, and
    cannot be taken out again. It does not hear what C++ code opens by itself: the operators that do so are refused
    before (see DENIED_OPERATORS).
    """

    def __init__(self) -> None:
        self.is_up, self.installed = False, False
        self.workplaces: tuple[Path, ...] = ()

    @contextlib.contextmanager
    def up(self, *workplaces: Path, unless: object = False) -> Iterator[None]:
        """Refuse what is outside while in context, `unless` the user said that the code that comes along is trusted."""
        if not self.installed:
            library_places()  # imports torch
            sys.addaudithook(self.audit)
            self.installed = True
        before = self.is_up, self.workplaces, sys.dont_write_bytecode
        self.is_up, self.workplaces, sys.dont_write_bytecode = not unless, tuple(map(Path.resolve, workplaces)), True
        try:
            yield
        finally:
            self.is_up, self.workplaces, sys.dont_write_bytecode = before

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The hook: raises WallError for an event that is refused."""
        if self.is_up and event not in HARMLESS_EVENTS and not self.allows(event, arguments) and not is_importing():
            what = ", ".join(shorten(repr(argument), 200) for argument in arguments[:2])
            raise WallError(f"something in it led to {event}({what}), outside of the input and the libraries")

    def allows(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Whether an event stays inside."""
        if event == "open":
            path, _, flags = arguments
            written = isinstance(flags, int) and flags & WRITING
            return not isinstance(path, (str, bytes)) or (self.is_ours(path) if written else self.is_readable(path))
        if event == "ctypes.dlopen":  # a library that the loader finds by its name, or one of a package
            name = str(arguments[0])
            return os.sep not in name or os.path.abspath(name).startswith(library_places())  # noqa: PTH100
        if event in CHANGING_EVENTS:
            places = CHANGING_EVENTS[event]
            return all(self.is_ours(arguments[path], *arguments[folder : folder + 1]) for path, folder in places)
        return not event.startswith(OUTSIDE_EVENTS)

    def is_ours(self, path: Any, folder: int | None = None) -> bool:
        """Whether a path lies in a folder that we work in, or is nowhere.

        `folder`: the path itself is to be changed, not what it may be a link to, and it is relative to the folder of
        this descriptor, if that is not negative.
        """
        given = Path(os.fsdecode(path))
        if folder is not None and folder >= 0:
            given = Path(f"/proc/self/fd/{folder}", given)
        real = Path(os.path.realpath(given)) if folder is None else Path(os.path.realpath(given.parent), given.name)
        return str(real) == os.devnull or any(place in (real, *real.parents) for place in self.workplaces)

    def is_readable(self, path: str | bytes) -> bool:
        """Whether a path is one of a library, of the system's about itself, of the input or of ours."""
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100  (links stay: a virtual environment may be one)
        if name.startswith((*SYSTEM_FILES, *library_places())):
            return True
        return is_admitted(Path(os.path.realpath(name))) or self.is_ours(name)


WALL = Wall()


@functools.cache
def library_places() -> tuple[str, ...]:
    """Where Python's own modules, installed packages and this script lie, each path with a slash at its end."""
    import sysconfig

    places = {*library_folders(), *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))}
    folders = {f"{form}{os.sep}" for place in places for form in (place, place.resolve())}
    return tuple({*folders, str(ARCHITECTURES), __file__})


def is_importing() -> bool:
    """Whether an import is under way: the code of installed packages, whose names do not come from the input."""
    frame: Any = sys._getframe()  # noqa: SLF001  (the documented way to look at the stack)
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


# What running an input may take. A model of a few megabytes answers within a second; the size of the file counts, since
# large models are slow and slow disks are, too. Who gives the shapes knows how long these take.
CODE_SECONDS = 5  # for the code of an archive
RUN_SECONDS = 20  # for that of a library, which ends, and for opening a file
BYTES_PER_SECOND = 10_000_000
SHAPE_FACTOR = 20  # times as long, where --input-shape says what is to be run
LATER_RUNS = 40  # times as long as the first run: batches of 5, and longer axes; ...
MOST_LATER = 3  # ... but no more than so many times what the first one may
ALL_RUNS = 8  # times what the first run may take: all runs together, of PyTorch, in the exporters and in ONNX Runtime
CONVERSION_RUNS = 20  # the same for making one graph, most of which is the exporters' own time
GRAPH_RUNS = 10  # runs that a Hugging Face model's graphs take beside the cases: caches, generated tokens
RUN_BYTES = 1 << 30  # of memory beyond four times the file's size, for building a model and for its first run
LATER_BYTES = 4 << 30  # the same for larger batches and longer axes, and for the exporters and the verification
LATER_FACTOR = 8  # times what the first run took, at most LATER_BYTES


def run_seconds(options: Options, *, own_code: bool) -> float:
    """Seconds that one run of the input's model may take (--run-timeout); `own_code`: an archive brought the code."""
    if options.run_timeout is not None:
        return float(options.run_timeout)
    seconds = (CODE_SECONDS if own_code else RUN_SECONDS) + input_size(options.input) / BYTES_PER_SECOND
    return seconds * (SHAPE_FACTOR if options.input_shape else 1)


def input_size(path: Path) -> int:
    """Bytes of a file; of a folder, of all files right in it; 0 of what is not there (a model on the hub)."""
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else (path,)))
    return 0


class RunBudget:
    """What running the input's model may take: seconds for each run and for all together, and the memory from `start`.

    A file may hold code that is quick four times, and endless from then on.
    """

    def __init__(self) -> None:
        self.each = self.most = self.left = math.inf
        self.start = 0

    def begin(self, options: Options, *, own_code: bool) -> None:
        """Fix the budget of a model that is about to run for the first time."""
        self.each = run_seconds(options, own_code=own_code)
        self.most = MOST_LATER * self.each
        self.left = ALL_RUNS * self.each if options.run_timeout is None else math.inf
        self.start = memory_bytes("VmData") if sys.platform == "linux" else 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """One run: what it takes is taken off, and later ones may take some times as long."""
        start = time.monotonic()
        try:
            with time_limit(min(self.each, self.left)):
                yield
        finally:
            taken = time.monotonic() - start
            self.each = max(self.each, min(LATER_RUNS * taken, self.most))
            self.left = max(self.left - taken, 1e-3)


RUNS = RunBudget()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM, of which the supervisor says why, when what is in context takes longer.

    A loop in C++ code that holds Python's lock listens to nothing less. Without end: no limit but an outer one.
    """
    start, (outer, _) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    within = min(seconds, outer or math.inf)
    signal.setitimer(signal.ITIMER_REAL, within if within < math.inf else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(outer - time.monotonic() + start, 1e-3) if outer else 0)


def free_bytes(options: Options, base: int) -> int | None:
    """Bytes of memory that running the input's model may take; None where the user said what is to be run."""
    if options.input_shape or options.run_timeout is not None:
        return None
    return base + 4 * input_size(options.input)


def memory_bytes(field: str) -> int:
    """Bytes of this process: "VmData" (what RLIMIT_DATA counts), "VmRSS" (in memory now), "VmHWM" (its peak so far)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]  # see proc(5)


@contextlib.contextmanager
def memory_bound(extra: int | None, what: str, advice: str, start: int = 0) -> Iterator[None]:
    """Let allocations fail beyond `extra` bytes more than this process has now, or had at the `start`.

    None, or no Linux: no bound.

    Raises DamagedFileError that says that `what` takes too much, unless a smaller limit of the user's own (ulimit) was
    reached: then the MemoryError stays.
    """
    import resource

    if extra is None or sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = (start or memory_bytes("VmData")) + extra + (os.cpu_count() or 1) * THREAD_STACK
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    ours = not [limit for limit in known if limit < wanted] and resource.getrlimit(resource.RLIMIT_AS)[0] < 0
    resource.setrlimit(resource.RLIMIT_DATA, (min(wanted, *known) if known else wanted, hard))
    try:
        yield
    except Exception as error:
        if ours and is_out_of_memory(error):
            message = f"{what} takes more than {size_text(extra)} of memory beside its weights; {advice}"
            raise DamagedFileError(message) from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# Files that people pass by mistake: how they begin, and what to do about them.
MISTAKES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
    (b"<!DOCTYPE", "an HTML page, probably a download that failed; download the file again"),
    (b"<!doctype", "an HTML page, probably a download that failed; download the file again"),
    (b"<html", "an HTML page, probably a download that failed; download the file again"),
    (b"GGUF", "a GGUF file of llama.cpp; pass the original PyTorch or safetensors model"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras?), not a PyTorch model"),
    (b"\x93NUMPY", "a NumPy array, not a PyTorch model"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x08\x03\x12", "an ONNX model already, by the look of it"),
    (b"\x08\x08\x12", "an ONNX model already, by the look of it"),
)
MAX_INDEX_BYTES = 64 << 20  # of the JSON that says which shard holds which tensor; a model of 10**6 tensors has 100 MB
PICKLE_STARTS = (b"\x80", b"}", b"]", b"(", b"c")  # PROTO, or protocol 0's first opcodes


def detect_file(path: Path) -> Source:
    """Tell what a file of the input holds from its content; raises InputError with advice, or OSError."""
    try:
        with open_input(path) as file:
            head = file.read(512)
            is_index = head[:1] == b"{" and b'"weight_map"' in head + file.read(MAX_INDEX_BYTES)
    except (RefusedFileError, DamagedFileError) as error:
        raise ConversionError(error.status, f"{path}: {error}") from None
    if not head:
        raise InputError(f"{path} is empty; copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        return detect_zip(path)
    for start, what in MISTAKES:
        if head.startswith(start):
            raise InputError(f"{path} is {what}")
    if head[8:9] == b"{" and (head[6:8] == b"\0\0" or not head.startswith(PICKLE_STARTS)):
        return Source(path, Kind.SAFETENSORS, "it begins with a safetensors header")
    if is_index:
        return Source(path, Kind.SHARDED_WEIGHTS, "it is JSON with a weight_map")
    if head[257:262] == b"ustar":
        raise InputError(f"{path} is a tar archive (PyTorch before 0.1.10?); open it there and save it again")
    if head.startswith(PICKLE_STARTS) and not head.isascii():
        return Source(path, Kind.LEGACY_CHECKPOINT, "it begins as a pickle")
    what = "a text file" if head.isascii() else "no format that PyTorch writes"
    raise InputError(f"{path} is {what}; pass a .pt, TorchScript, .pt2 or safetensors file")


def detect_zip(path: Path) -> Source:
    """Tell the zip layouts of PyTorch apart by the records that only one of them has."""
    try:
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except Exception as error:  # zipfile raises a dozen kinds for damaged directories
        message = f"{path} is a damaged or truncated archive ({first_line(error)}); copy or download it again"
        raise InputError(message) from None
    if any(name.startswith((".data/extern", ".data/python")) for name in names):
        raise ConversionError(
            ExitStatus.REFUSED,
            f"{path} is a torch.package archive: it carries Python source that would have to be executed; "
            "save the model itself with torch.save or torch.export.save",
        )
    if "constants.pkl" in names:
        return Source(path, Kind.TORCHSCRIPT, "the archive has constants.pkl, as torch.jit.save writes")
    if "archive_format" in names:
        return Source(path, Kind.EXPORTED_PROGRAM, "the archive has archive_format, as torch.export.save writes")
    if "serialized_exported_program.json" in names or ("version" in names and "data.pkl" not in names):
        raise InputError(f"{path} has an old .pt2 layout; save it again with PyTorch 2.8 or newer")
    if "data.pkl" in names:
        return Source(path, Kind.CHECKPOINT, "the archive has data.pkl, as torch.save writes")
    raise InputError(f"{path} is a zip archive, but none that PyTorch writes")


ARCHITECTURES = Path(__file__).with_name("architectures.json.xz")


def file_digest(path: Path) -> str:
    """SHA-256 of a file of the input."""
    with open_input(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# libraries: imported only from installed packages
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def library_folders() -> tuple[Path, ...]:
    """Where installed packages lie: site-packages and editable installs, never the shell's folder or the input's."""
    import site
    import sysconfig

    texts = [*map(sysconfig.get_path, ("purelib", "platlib")), *site.getsitepackages(), site.getusersitepackages()]
    folders = [Path(torch.__file__).parents[1], *map(Path, texts)]
    return tuple(
        dict.fromkeys(place for folder in (*folders, *editable_folders(texts)) for place in (folder, folder.resolve()))
    )


def editable_folders(site_packages: Sequence[str]) -> Iterator[Path]:
    """The folders of what pip installed with --editable, as the records in `site_packages` say (PEP 610)."""
    import importlib.metadata
    from urllib.parse import unquote, urlparse

    for distribution in importlib.metadata.distributions(path=[text for text in site_packages if Path(text).is_dir()]):
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            record = json.loads(distribution.read_text("direct_url.json") or "{}")
            if record["dir_info"].get("editable") is True:
                yield Path(unquote(urlparse(record["url"]).path))


def check_origin(package: str, origins: Iterable[str | None], *, named: bool) -> None:
    """Raise OutsideError if `package` lies outside site-packages; what the user named may lie on PYTHONPATH too.

    An empty entry of PYTHONPATH means the working directory, which nobody asked for. Installers may put links into
    site-packages (conda, uv): the place of the link counts.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep) if named else []
    folders = {*library_folders(), *(Path(entry).resolve() for entry in entries if entry)}
    for origin in origins:
        places = {Path(origin).resolve(), Path(os.path.abspath(origin))} if origin else set()  # noqa: PTH100  (no links)
        if not any(folders.intersection(place.parents) for place in places):
            also = " or PYTHONPATH" if named else ""
            advice = "install it there, or put its folder on PYTHONPATH" if named else "install it there"
            raise OutsideError(f"the package {package} would be imported from outside site-packages{also}; {advice}")


def import_library(module: str, *, named: bool = False) -> Any:
    """Import `module` from an installed package, after a look at where it would come from; `named` by the user.

    Raises DamagedFileError where it is missing or cannot be imported, OutsideError where it lies elsewhere.
    """
    if module in sys.modules:
        return sys.modules[module]
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None:
        advice = "install it or put its folder on PYTHONPATH" if named else "install it, or save a state dict"
        raise DamagedFileError(f"it needs the Python package {package}, which is not installed here; {advice}")
    check_origin(package, [spec.origin] if spec.origin else spec.submodule_search_locations or [None], named=named)
    try:
        if package in ("torchvision", "timm", "ultralytics"):
            import_torchvision()
        if package == "ultralytics":
            with WALL.up(unless="it is an installed package that makes a folder for its settings"):
                import_ultralytics()
        if package == "transformers":
            os.environ["HF_HUB_OFFLINE"] = "1"  # what a pickle refers to is installed or not: never the network
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and belongs(module, (error.name,)):
            raise DamagedFileError(missing_from(module)) from None
        raise DamagedFileError(f"{package} needs the Python package {error.name}, which is not installed") from None
    except Exception as error:  # whatever a library raises while it is imported
        raise_out_of_memory(error)
        raise DamagedFileError(f"{module} cannot be imported here ({first_line(error)})") from None
    check_origin(package, [getattr(loaded, "__file__", None)], named=named)
    return loaded


def missing_from(full_name: str) -> str:
    """What to say of a module or class that the installed version of its package does not have."""
    import importlib.metadata

    package = full_name.partition(".")[0]
    try:
        version = f" {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        version = ""
    advice = f"install the version of {package} that saved the file, or save the model's state dict with it"
    return f"the installed {package}{version} has no {full_name}; {advice}"


def belongs(module: str, prefixes: Iterable[str]) -> bool:
    """Whether `module` is one of `prefixes` or lies below one."""
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def qualified_name(cls: type) -> str:
    """`package.module.Class`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def import_transformers() -> Any:
    """transformers, told to stay off the network and to be quiet."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ[variable] = "1"
    vars(importlib.import_module("huggingface_hub.constants"))["HF_HUB_OFFLINE"] = True  # a download may have loaded it
    return import_library("transformers")


def has_own_code(options: Options) -> bool:
    """Whether the user brought code for this model, which may open what it likes: his own classes, or trusted ones."""
    own_class = options.model_class or ""
    named = ":" in own_class and not belongs(own_class.partition(":")[0], ("torchvision", "timm"))
    return bool(options.trust_pickle or options.trust_remote_code or options.allow_class or named)


# ---------------------------------------------------------------------------------------------------------------------
# workarounds: what torch, torchvision, onnx-ir and ultralytics need to be told, each with the version it was seen in
#
# Each names the fault and where it is known; tests/test_workarounds.py fails for one that is no longer needed.
# ---------------------------------------------------------------------------------------------------------------------


def import_torchvision() -> None:
    """Import torchvision, and leave out torch's compiler, which takes as long to import as the rest of torch.

    ops/roi_align.py imports it for a question that it asks only where a kernel is missing (seen in torchvision 0.29.1):
    https://github.com/pytorch/vision/pull/8436 meant to avoid that.
    """

    def is_compile_supported(device_type: str) -> bool:
        return bool(importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type))

    if "torch._dynamo" not in sys.modules:
        compiler, utils = types.ModuleType("torch._dynamo"), types.ModuleType("torch._dynamo.utils")
        vars(utils)["is_compile_supported"] = is_compile_supported
        stand_ins = {module.__name__: module for module in (compiler, utils)}
        sys.modules.update(stand_ins)
        try:
            importlib.import_module("torchvision")
        finally:
            for name in stand_ins:
                del sys.modules[name]


def import_ultralytics() -> None:
    """Import ultralytics without its side effects.

    ultralytics.utils writes a settings file into the home directory, asks whether the network is there, sets variables
    for libraries that are loaded later, and lets its checks run pip (seen in ultralytics 8.4.190):
    https://github.com/ultralytics/ultralytics/pull/26214 describes YOLO_AUTOINSTALL.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="pt2onnx.") as folder:
        os.environ |= {"YOLO_CONFIG_DIR": folder, "MPLCONFIGDIR": folder, "YOLO_AUTOINSTALL": "false",
                       "YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false"}  # fmt: skip
        try:
            importlib.import_module("ultralytics.utils")
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ |= before


def disable_fused_attention() -> None:
    """Let nn.TransformerEncoderLayer run without the fused operator that no exporter knows (seen in torch 2.14.1).

    https://github.com/pytorch/pytorch/issues/177013
    """
    torch.backends.mha.set_fastpath_enabled(False)


ADAPTIVE_POOLS = [f"adaptive_{kind}_pool{axes}d" for kind in ("avg", "max") for axes in (1, 2, 3)]


@functools.cache
def register_symbolics() -> None:
    """Give the TorchScript exporter translations where its own are wrong or missing, from some opset on."""
    for name, symbolic, opset in (
        ("repeat_interleave", symbolic_repeat, 13),
        ("cumsum", symbolic_cumsum, 13),
        ("unfold", symbolic_unfold, 13),
        ("as_strided", symbolic_strided, 13),
        ("log_sigmoid", symbolic_log_sigmoid, 9),
        ("floor_divide", symbolic_floor_divide, 10),
        ("atan2", symbolic_atan2, 9),
    ):
        torch.onnx.register_custom_op_symbolic(f"aten::{name}", symbolic, opset)
    for name in ADAPTIVE_POOLS:
        torch.onnx.register_custom_op_symbolic(f"aten::{name}", functools.partial(symbolic_adaptive_pool, name), 13)


def symbolic_log_sigmoid(graph: Any, tensor: Any) -> Any:
    """-softplus(-x); the exporter's own, log(sigmoid(x)), is -inf from -104 on in float32 (seen in torch 2.14.1).

    https://github.com/pytorch/pytorch/pull/14830
    """
    return graph.op("Neg", graph.op("Softplus", graph.op("Neg", tensor)))


def symbolic_atan2(graph: Any, y: Any, x: Any) -> Any:
    """The angle of (x, y) from -pi to pi; the exporter's own is NaN at the origin and ignores -0 (torch 2.14.1).

    https://github.com/pytorch/pytorch/issues/162570. 0/0 is replaced, and y/0 is an infinity, whose arc tangent is
    pi/2.
    """
    dtype = torch.onnx.JitScalarType.from_value(y, torch.onnx.JitScalarType.FLOAT).dtype()
    zero, turn = (graph.op("Constant", value_t=torch.tensor(value, dtype=dtype)) for value in (0.0, math.pi))
    at_origin = graph.op("And", graph.op("Equal", x, zero), graph.op("Equal", y, zero))

    def is_negative(value: Any) -> Any:  # of zeros, too: the reciprocal of -0 is -inf
        return graph.op("Or", graph.op("Less", value, zero), graph.op("Less", graph.op("Reciprocal", value), zero))

    angle = graph.op("Where", at_origin, y, graph.op("Atan", graph.op("Div", y, x)))
    shift = graph.op("Where", is_negative(y), graph.op("Neg", turn), turn)
    return graph.op("Add", angle, graph.op("Where", is_negative(x), shift, zero))


def symbolic_floor_divide(graph: Any, tensor: Any, other: Any) -> Any:
    """Division towards minus infinity, of integers too: the exporter's own truncates these (seen in torch 2.14.1).

    https://github.com/pytorch/pytorch/pull/86146. Mod has the sign of the divisor, so that what it leaves is divided
    without a remainder.
    """
    if symbolic_helper._is_fp(tensor) or symbolic_helper._is_fp(other):  # noqa: SLF001
        return graph.op("Floor", torch.onnx.symbolic_opset9.true_divide(graph, tensor, other))
    whole = graph.op("Sub", tensor, graph.op("Mod", tensor, other))
    return graph.op("Div", whole, other)


def symbolic_repeat(graph: Any, tensor: Any, repeats: Any, dim: Any = None, output_size: Any = None) -> Any:
    """repeat_interleave as the exporter has it, which adds to `dim` in place: other nodes share that constant.

    Seen in torch 2.14.1: `dim += len(input_sizes)` in torch/onnx/_internal/torchscript_exporter/symbolic_opset13.py
    of https://github.com/pytorch/pytorch.
    """
    from torch.onnx import symbolic_opset13

    axis = None if symbolic_helper._is_none(dim) else symbolic_helper._maybe_get_const(dim, "t").clone()  # noqa: SLF001
    return symbolic_opset13.repeat_interleave(graph, tensor, repeats, axis, output_size)


def symbolic_adaptive_pool(name: str, graph: Any, tensor: Any, size: Any) -> Any:
    """Adaptive pooling as the exporter has it; axis by axis where the input is no known multiple of `size`.

    An average is a product with averaging_matrix; maxima are those of what is gathered for each window. The indices of
    the maxima, which are the second result, are not to be had. The exporter refuses these sizes (seen in torch 2.14.1):
    https://github.com/pytorch/pytorch/issues/64806.
    """
    with contextlib.suppress(torch.onnx.errors.SymbolicValueError):
        return getattr(torch.onnx.symbolic_opset9, name)(graph, tensor, size)
    counts = symbolic_helper._parse_arg(size, "is")  # noqa: SLF001
    rank = cast("int", symbolic_helper._get_tensor_rank(tensor))  # noqa: SLF001
    axes = range(rank - len(counts), rank)
    if "max" in name:
        for axis, count in zip(axes, counts, strict=True):
            tensor = windowed_maximum(graph, tensor, axis, count)
        return tensor, None
    for axis, count in zip(axes, counts, strict=True):
        last = [*(other for other in range(rank) if other != axis), axis]
        matrix = graph.op("Transpose", averaging_matrix(graph, tensor, axis, count), perm_i=(1, 0))
        product = graph.op("MatMul", graph.op("Transpose", tensor, perm_i=last), matrix)
        tensor = graph.op("Transpose", product, perm_i=[last.index(place) for place in range(rank)])
    return tensor


def constant_value(graph: Any, value: Any) -> Any:
    """A constant (a number, or nested lists of them) in a graph of the TorchScript exporter."""
    return graph.op("Constant", value_t=torch.tensor(value))


def adaptive_windows(graph: Any, tensor: Any, axis: int, count: int) -> tuple[Any, Any, Any]:
    """The length of `axis`, and where each of `count` windows along it begins and ends (count x 1)."""
    constant = functools.partial(constant_value, graph)
    length = graph.op("Gather", graph.op("Shape", tensor), constant(axis), axis_i=0)
    first = graph.op("Div", graph.op("Mul", constant([[n] for n in range(count)]), length), constant(count))
    # The place behind the last one is rounded up.
    ends = graph.op("Mul", constant([[n + 1] for n in range(count)]), length)
    return length, first, graph.op("Div", graph.op("Add", ends, constant(count - 1)), constant(count))


def averaging_matrix(graph: Any, tensor: Any, axis: int, count: int) -> Any:
    """The matrix (count x length of `axis`) of what each place adds to each of `count` averages."""
    length, first, end = adaptive_windows(graph, tensor, axis, count)
    places = graph.op("Range", constant_value(graph, 0), length, constant_value(graph, 1))
    inside = graph.op("And", graph.op("GreaterOrEqual", places, first), graph.op("Less", places, end))
    dtype = torch.onnx.JitScalarType.from_value(tensor).onnx_type()
    ones = graph.op("Cast", inside, to_i=dtype)
    return graph.op("Div", ones, graph.op("Cast", graph.op("Sub", end, first), to_i=dtype))


def windowed_maximum(graph: Any, tensor: Any, axis: int, count: int) -> Any:
    """The maxima of `count` windows along `axis`; the last place of a shorter window is looked at twice."""
    from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

    constant = functools.partial(constant_value, graph)
    length, first, end = adaptive_windows(graph, tensor, axis, count)
    widest = graph.op("Add", graph.op("Div", length, constant(count)), constant(2))
    places = graph.op("Add", first, graph.op("Range", constant(0), widest, constant(1)))
    windows = graph.op("Gather", tensor, graph.op("Min", places, graph.op("Sub", end, constant(1))), axis_i=axis)
    newer = GLOBALS.export_onnx_opset_version >= 18
    axes = ([constant([axis + 1])], {}) if newer else ([], {"axes_i": [axis + 1]})
    return graph.op("ReduceMax", windows, *axes[0], **axes[1], keepdims_i=0)


def symbolic_cumsum(graph: Any, tensor: Any, dim: Any, dtype: Any = None) -> Any:
    """Cumsum as the exporter has it, which gives it truth values, for which ONNX has none (seen in torch 2.14.1).

    https://github.com/pytorch/pytorch/pull/40044
    """
    from torch.onnx import symbolic_opset11

    if torch.onnx.JitScalarType.from_value(tensor) == torch.onnx.JitScalarType.BOOL:
        tensor = graph.op("Cast", tensor, to_i=torch.onnx.JitScalarType.INT64.onnx_type())
    return symbolic_opset11.cumsum(graph, tensor, dim, dtype)


def symbolic_unfold(graph: Any, tensor: Any, dim: Any, size: Any, step: Any) -> Any:
    """Tensor.unfold as one look-up: the exporter's own knows no axis of free length (seen in torch 2.14.1).

    https://github.com/pytorch/pytorch/issues/69889. Where it knows the length it writes out every window.
    """
    constant = functools.partial(constant_value, graph)
    axis, width, stride = (symbolic_helper._get_const(value, "i", "unfold") for value in (dim, size, step))  # noqa: SLF001
    rank = cast("int", symbolic_helper._get_tensor_rank(tensor))  # noqa: SLF001  (without one it fails below)
    length = graph.op("Gather", graph.op("Shape", tensor), constant(axis), axis_i=0)
    end = graph.op("Sub", length, constant(width - 1))
    starts = graph.op("Unsqueeze", graph.op("Range", constant(0), end, constant(stride)), constant([1]))
    windows = graph.op("Gather", tensor, graph.op("Add", starts, constant(list(range(width)))), axis_i=axis % rank)
    order = list(range(rank + 1))
    order.append(order.pop(axis % rank + 1))  # the places within a window come last
    return graph.op("Transpose", windows, perm_i=order)


def symbolic_strided(graph: Any, tensor: Any, sizes: Any, strides: Any, offset: Any = None) -> Any:
    """as_strided of a contiguous tensor as one look-up: the exporter's own takes strides for constants (torch 2.14.1).

    https://github.com/pytorch/pytorch/issues/90607
    """
    constant = functools.partial(constant_value, graph)

    def entries(numbers: Any) -> list[Any]:
        known = symbolic_helper._maybe_get_const(numbers, "is")  # noqa: SLF001
        return list(map(constant, known)) if isinstance(known, list) else symbolic_helper._unpack_list(numbers)  # noqa: SLF001

    place = constant(0) if symbolic_helper._is_none(offset) else offset  # noqa: SLF001
    for size, stride in zip(entries(sizes), entries(strides), strict=True):
        steps = graph.op("Mul", graph.op("Range", constant(0), size, constant(1)), stride)
        place = graph.op("Add", graph.op("Unsqueeze", place, constant([-1])), steps)
    return graph.op("Gather", graph.op("Reshape", tensor, constant([-1])), place)


@contextlib.contextmanager
def fixed_resize() -> Iterator[None]:
    """Let torchvision's detectors resize, while they are traced, to the size that they resize to otherwise.

    Their tracing branch computes the scale in float32 (seen in torchvision 0.29.1, detection/transform.py), so that one
    in eight image sizes comes out a pixel smaller than in PyTorch; this one uses float64, as their ordinary branch
    does. https://github.com/pytorch/vision/pull/3862
    """
    transform = sys.modules.get("torchvision.models.detection.transform")
    if transform is None:
        yield
        return
    from torch.onnx import operators

    def resize(image: Tensor, smallest: int, largest: int, target: Any = None, fixed_size: Any = None) -> Any:
        if fixed_size is not None:
            return original(image, smallest, largest, target, fixed_size)
        shape = operators.shape_as_tensor(image)[-2:].to(torch.float64)
        limits = torch.tensor([smallest, largest], dtype=torch.float64)
        scale = torch.min(torch.div(limits, torch.stack([shape.min(), shape.max()])))
        size: Any = torch.floor(shape * scale).to(torch.int64)
        options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
        return torch.nn.functional.interpolate(image[None], size=(size[0], size[1]), **options)[0], target

    original = transform._resize_image_and_masks  # noqa: SLF001
    with patched(transform, _resize_image_and_masks=resize):
        yield


@contextlib.contextmanager
def traced_sizes() -> Iterator[None]:
    """Let tracing see what models do in Python with sizes: it would keep the numbers that the traced inputs give."""
    with contextlib.ExitStack() as stack:
        for owner, name, function in tracing_stand_ins():
            stack.enter_context(patched(owner, **{name: function}))
        yield


@functools.cache
def tracing_stand_ins() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Owners, names and functions: each does as the original does, and while tracing what tracing can follow."""
    import builtins

    from torch.jit import _builtins

    def followed(original: Callable[..., Any], traced: Callable[..., Any]) -> Callable[..., Any]:
        def either(*values: Any, **options: Any) -> Any:
            result = traced(*values, **options) if torch.jit.is_tracing() else NotImplemented
            return original(*values, **options) if result is NotImplemented else result

        if name := _builtins._find_builtin(original):  # noqa: SLF001
            _builtins._register_builtin(either, name)  # noqa: SLF001  (for functions that are compiled meanwhile)
        return either

    return [
        (owner, name, followed(getattr(owner, name), traced))
        for owner, name, traced in (
            (torch.Tensor, "unbind", unbind_indices),
            (torch.Tensor, "stride", strides_from_sizes),
            (torch, "tensor", tensor_of_numbers),
            (torch, "as_tensor", tensor_of_numbers),
            (builtins, "min", functools.partial(traced_extremum, torch.minimum)),
            (builtins, "max", functools.partial(traced_extremum, torch.maximum)),
        )
    ]


def unbind_indices(tensor: Tensor, dim: int = 0) -> Any:
    """Stand-in for unbind, which loops over a tensor call: loops over nonzero() trace every index, not only the hits.

    Mixtures of experts loop so over the experts that tokens were routed to; the others get no tokens. Seen in
    transformers 5.23: https://github.com/huggingface/transformers/issues/38518.
    """
    node = torch._C._get_value_trace(tensor).node()  # type: ignore[attr-defined]  # noqa: SLF001  (its stubs lack it)
    sizes: Sequence[int] = node.input().type().sizes() if node.kind() == "aten::nonzero" else ()
    return torch.arange(sizes[0])[:, None].unbind() if dim == 0 and len(sizes) == 1 else NotImplemented


def strides_from_sizes(tensor: Tensor, dim: int | None = None) -> Any:
    """Stand-in for the strides of a contiguous tensor, which a trace keeps as numbers (seen in torch 2.14.1).

    https://github.com/pytorch/pytorch/issues/90607
    """
    if not tensor.is_contiguous():
        return NotImplemented
    strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.dim()))
    return strides if dim is None else strides[dim]


def tensor_of_numbers(data: Any, **options: Any) -> Any:
    """Stand-in for making a tensor of traced numbers, which become constants (seen in torch 2.14.1).

    https://github.com/pytorch/pytorch/issues/42966
    """
    return as_tensor(data).to(options.get("device"), options.get("dtype")) if holds_tensor(data) else NotImplemented


def as_tensor(data: Any) -> Tensor:
    """A number, a tensor, or nested lists of them, as one tensor."""
    if isinstance(data, (list, tuple)):
        return torch.stack(list(map(as_tensor, data)))
    return data if isinstance(data, torch.Tensor) else torch.as_tensor(data)


def holds_tensor(data: Any) -> bool:
    """Whether a tensor lies in the nested lists."""
    return any(map(holds_tensor, data)) if isinstance(data, (list, tuple)) else isinstance(data, torch.Tensor)


def traced_extremum(operator: Callable[[Tensor, Tensor], Tensor], *values: Any, **options: Any) -> Any:
    """Stand-in for the smaller or larger of two numbers, one of them traced: a trace keeps the choice (torch 2.14.1).

    https://github.com/pytorch/pytorch/pull/32458
    """
    pair = len(values) == 2 and not options and holds_tensor(values)
    return operator(*map(as_tensor, values)) if pair else NotImplemented


@contextlib.contextmanager
def traced_whole_numbers(model: nn.Module) -> Iterator[None]:
    """Let int() of a traced number, in the Python modules that define the model, be a traced number.

    A trace would keep the number (seen in torch 2.14.1): https://github.com/pytorch/pytorch/issues/42966. For a second
    try: not all code takes the class that stands in for int.
    """

    class Whole(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, int)

        def __call__(cls, *values: Any) -> Any:
            traced = torch.jit.is_tracing() and holds_tensor(values)
            return values[0].to(torch.int64) if traced else int(*values)

    class Integer(int, metaclass=Whole):
        pass

    names = {type(module).__module__ for module in model.modules()} - {__name__}
    modules = [vars(sys.modules[name]) for name in names if name.partition(".")[0] != "torch" and name in sys.modules]
    spaces = [space for space in modules if "int" not in space]
    for space in spaces:
        space["int"] = Integer
    try:
        yield
    finally:
        for space in spaces:
            del space["int"]


@contextlib.contextmanager
def patched(owner: Any, **stand_ins: Any) -> Iterator[None]:
    """Let `owner` have other attributes for a while."""
    originals = {name: getattr(owner, name) for name in stand_ins}
    for name, value in stand_ins.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


def restore_branch_outputs(graph: ir.Graph) -> None:
    """Let every output of a branch come from a node of that branch, as ONNX wants it.

    IdentityEliminationPass takes the Identity that is all of a branch (seen in onnx-ir 1.1.0):
    https://github.com/onnx/ir-py/issues/120.
    """
    branches = [
        attribute.as_graph()
        for node in graph.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
    ]
    for branch in branches:
        for index, value in enumerate(branch.outputs):
            producer = value.producer()
            if producer is None or producer.graph is not branch:
                node = ir.node("Identity", [value], outputs=[ir.Value(name=f"{value.name}/branch", type=value.type)])
                branch.append(node)
                branch.outputs[index] = node.outputs[0]


# Methods of tensors that do with a complex number what they do with its two parts.
MOVING_METHODS = word_set("to unsqueeze squeeze view reshape flatten transpose permute expand repeat contiguous")


class Complex:
    """A tensor of complex numbers as two real ones: exporters know no others, and rotary embeddings need no more.

    Seen in torch 2.14.1: https://github.com/pytorch/pytorch/issues/59246.
    """

    def __init__(self, real: Tensor, imaginary: Tensor) -> None:
        self.real, self.imaginary = real, imaginary

    @classmethod
    def polar(cls, length: Tensor, angle: Tensor) -> Complex:
        """What torch.polar returns."""
        return cls(length * angle.cos(), length * angle.sin())

    @classmethod
    def from_pairs(cls, pairs: Tensor) -> Complex:
        """What torch.view_as_complex returns."""
        return cls(pairs[..., 0], pairs[..., 1])

    def pairs(self) -> Tensor:
        """What torch.view_as_real returns."""
        return torch.stack([self.real, self.imaginary], -1)

    def __mul__(self, other: Any) -> Complex:
        if not isinstance(other, Complex):
            return Complex(self.real * other, self.imaginary * other)
        real = self.real * other.real - self.imaginary * other.imaginary
        return Complex(real, self.real * other.imaginary + self.imaginary * other.real)

    def __getitem__(self, key: Any) -> Complex:
        return Complex(self.real[key], self.imaginary[key])

    def __getattr__(self, name: str) -> Any:
        if name == "device":
            return self.real.device
        if name not in MOVING_METHODS:
            raise AttributeError(name)
        return lambda *values: Complex(getattr(self.real, name)(*values), getattr(self.imaginary, name)(*values))


@contextlib.contextmanager
def without_complex() -> Iterator[None]:
    """Let models compute with Complex where they would with complex tensors."""
    functions = {"polar": Complex.polar, "view_as_complex": Complex.from_pairs, "view_as_real": Complex.pairs}
    with patched(torch, **functions):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
