"""Generators of hostile and malformed inputs: nothing of them lies in the repository, each is made when it is tested.

HOSTILE holds the tricks that advisories and the issues of public scanners (picklescan, modelscan, fickling) name, and
those that were found while this loader was written; MALFORMED what broken disks, downloads and bored people make.
Every payload would leave a file MARKER in the working directory.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import socket
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

MARKER = "PT2ONNX_WAS_EXECUTED"
COMMAND = f"touch {MARKER}"
PYTHON = f"open({MARKER!r}, 'w')"


class Item(NamedTuple):
    """An input: `make` writes it into a folder and returns its path; converting it exits with `code`."""

    name: str
    make: Callable[[Path], Path]
    code: int | tuple[int, ...]
    words: str = ""  # what the message has: the words of the rule that must refuse it
    runs: str = ""  # how PyTorch would open it, in which case the payload runs: "load", "jit" or "export"


def file(name: str, content: Callable[[], bytes], code: int | tuple[int, ...], words: str = "", runs: str = "") -> Item:
    """An item that is one file."""

    def make(folder: Path) -> Path:
        path = folder / "input.pt"
        path.write_bytes(content())
        return path

    return Item(name, make, code, words, runs)


# ---------------------------------------------------------------------------------------------------------------------
# pickles
# ---------------------------------------------------------------------------------------------------------------------


def value(content: Any) -> bytes:
    """The opcodes that push `content`."""
    data = pickle.dumps(content, protocol=2)
    return data[2:-1]


def text(content: str) -> bytes:
    """The opcode that pushes a string, without memoising it."""
    data = content.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def program(*parts: bytes, protocol: int = 2) -> bytes:
    """A pickle of these opcodes."""
    return bytes((0x80, protocol)) + b"".join(parts) + b"."


def glob(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def stack_global(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which may reach into classes."""
    return text(module) + text(name) + b"\x93"


def call(module: str, name: str, *arguments: Any) -> bytes:
    """The opcodes that call a function."""
    target = stack_global(module, name) if "." in name else glob(module, name)
    return target + value(arguments) + b"R"


def archive(data: bytes, records: Mapping[str, bytes] | None = None) -> bytes:
    """A torch.save archive around a pickle."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in {"data.pkl": data, "byteorder": b"little", **(records or {})}.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return buffer.getvalue()


def saved(content: Any, *, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def calls(module: str, name: str, *arguments: Any) -> bytes:
    """An archive that calls a function."""
    return archive(program(call(module, name, *arguments), protocol=4 if "." in name else 2))


def legacy_stream(body: bytes) -> bytes:
    """The layout before PyTorch 1.6 around the pickle of the object."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(item, protocol=2) for item in head) + body + pickle.dumps([], protocol=2)


def refers(name: str) -> str:
    """What is said of a pickle that refers to a function or class which it must not call."""
    return f"it refers to {name}, outside the known model libraries"


REFERS_TO_SYSTEM = refers("posix.system")
ODD_OPCODE = "an opcode that PyTorch never writes"
TOO_EARLY = "it ends too early or declares more than the file holds"
SYSTEM = call("posix", "system", COMMAND)

# Functions that run, fetch, read, write or import something when a pickle calls them; those in RUN fire as written.
CALLED: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("posix", "system", (COMMAND,)), ("os", "system", (COMMAND,)), ("os", "popen", (COMMAND,)),
    ("nt", "system", (COMMAND,)), ("os", "execv", ("/bin/sh", ["sh", "-c", COMMAND])), ("os", "remove", ("x",)),
    ("posix", "posix_spawn", ("/bin/sh", ["sh"], {})), ("subprocess", "Popen", (["touch", MARKER],)),
    ("subprocess", "run", (["touch", MARKER],)), ("subprocess", "call", (["touch", MARKER],)),
    ("subprocess", "check_output", (["touch", MARKER],)), ("subprocess", "getoutput", (COMMAND,)),
    ("builtins", "eval", (PYTHON,)), ("builtins", "exec", (PYTHON,)), ("builtins", "open", (MARKER, "w")),
    ("__builtin__", "eval", (PYTHON,)), ("__builtin__", "execfile", (MARKER,)), ("__builtin__", "apply", (MARKER,)),
    ("builtins", "compile", (PYTHON, "", "exec")), ("builtins", "__import__", ("antigravity",)),
    ("builtins", "breakpoint", ()), ("builtins", "input", ()), ("builtins", "globals", ()), ("builtins", "vars", ()),
    ("builtins", "map", (MARKER,)), ("builtins", "type", ("X", (), {})), ("builtins", "setattr", (MARKER, "a", 1)),
    ("io", "open", (MARKER, "w")), ("_io", "FileIO", (MARKER, "w")), ("codecs", "open", (MARKER, "w")),
    ("codecs", "decode", (b"x", "zlib")), ("copyreg", "__newobj__", (MARKER,)), ("copyreg", "add_extension", ("a", 1)),
    ("copyreg", "__reduce_ex__", (MARKER, 2)), ("runpy", "run_path", (MARKER,)), ("runpy", "_run_code", (PYTHON, {})),
    ("importlib", "import_module", ("antigravity",)), ("importlib", "reload", (MARKER,)),
    ("importlib.machinery", "SourceFileLoader", ("a", MARKER)), ("pkgutil", "resolve_name", ("os:system",)),
    ("pydoc", "locate", ("os.system",)), ("pydoc", "pipepager", ("", COMMAND)), ("pty", "spawn", ("touch",)),
    ("webbrowser", "open", ("http://localhost/",)), ("pip", "main", (["install", "x"],)),
    ("pip._internal", "main", (["install", "x"],)), ("ensurepip", "_run_pip", (["install"],)),
    ("venv", "create", (MARKER,)), ("timeit", "timeit", ("pass", PYTHON)), ("timeit", "main", ([PYTHON],)),
    ("profile", "run", (PYTHON,)), ("cProfile", "run", (PYTHON,)), ("profile", "Profile.runctx", (PYTHON,)),
    ("bdb", "Bdb.run", (PYTHON,)), ("pdb", "run", (PYTHON,)), ("trace", "Trace.run", (PYTHON,)),
    ("doctest", "debug_script", (PYTHON,)), ("code", "InteractiveInterpreter.runcode", (PYTHON,)),
    ("ctypes", "CDLL", ("libc.so.6",)), ("_ctypes", "dlopen", ("libc.so.6", 2)), ("cffi", "FFI", ()),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start", (COMMAND,)), ("multiprocessing", "Process", ()),
    ("multiprocessing.util", "spawnv_passfds", (b"/bin/sh", [b"sh"], [])), ("threading", "Timer", (1, MARKER)),
    ("idlelib.pyshell", "ModifiedInterpreter.runcommand", (PYTHON,)), ("idlelib.run", "Executive.runcode", (PYTHON,)),
    ("idlelib.debugobj", "ObjectTreeItem.SetText", (PYTHON,)), ("idlelib.autocomplete", "AutoComplete", (PYTHON,)),
    ("idlelib.calltip", "get_entity", (PYTHON,)), ("lib2to3.pgen2.pgen", "ParserGenerator", (MARKER,)),
    ("lib2to3.pgen2.grammar", "Grammar.loads", (MARKER,)), ("distutils.file_util", "write_file", (MARKER, ["x"])),
    ("uuid", "_get_command_stdout", ("touch", MARKER)), ("_osx_support", "_read_output", (COMMAND,)),
    ("_aix_support", "_read_cmd_output", (COMMAND,)), ("imaplib", "IMAP4_stream", (COMMAND,)),
    ("test.support.script_helper", "assert_python_ok", ("-c", PYTHON)), ("logging.config", "dictConfig", ({},)),
    ("smtplib", "SMTP", ("localhost",)), ("ftplib", "FTP", ("localhost",)), ("telnetlib", "Telnet", ("localhost",)),
    ("urllib.request", "urlopen", ("http://localhost/",)), ("http.client", "HTTPSConnection", ("localhost",)),
    ("requests.api", "get", ("http://localhost/",)), ("aiohttp.client", "ClientSession", ()),
    ("socket", "create_connection", (("localhost", 1),)), ("ssl", "get_server_certificate", (("localhost", 1),)),
    ("shutil", "rmtree", ("x",)), ("shutil", "copyfile", ("/etc/hostname", MARKER)), ("sqlite3", "connect", (MARKER,)),
    ("tempfile", "NamedTemporaryFile", ()), ("linecache", "getlines", ("/etc/hostname",)),
    ("zipimport", "zipimporter", (MARKER,)), ("site", "execsitecustomize", ()), ("sys", "settrace", (MARKER,)),
    ("sys", "exit", (0,)), ("signal", "signal", (2, MARKER)), ("gc", "get_objects", ()), ("atexit", "register", ()),
    ("types", "FunctionType", (MARKER, {})), ("types", "CodeType", (0,) * 16), ("marshal", "loads", (b"N",)),
    ("operator", "attrgetter", ("system",)), ("operator", "methodcaller", ("system", COMMAND)),
    ("operator", "itemgetter", (0,)), ("_operator", "attrgetter", ("system",)), ("functools", "reduce", (MARKER, [])),
    ("itertools", "starmap", (MARKER, [])), ("pickle", "loads", (program(SYSTEM),)),
    ("_pickle", "loads", (program(SYSTEM),)), ("pickle", "Unpickler", (MARKER,)), ("shelve", "open", (MARKER,)),
    ("dill", "loads", (program(SYSTEM),)), ("dill._dill", "_create_function", (MARKER, {})),
    ("cloudpickle.cloudpickle", "_make_function", (MARKER,)), ("cloudpickle", "loads", (program(SYSTEM),)),
    ("joblib", "load", (MARKER,)), ("jsonpickle", "decode", ("{}",)), ("yaml", "unsafe_load", ("a",)),
    ("numpy", "load", (MARKER,)), ("numpy.testing._private.utils", "runstring", (PYTHON, {})),
    ("numpy.f2py.crackfortran", "getlincoef", (PYTHON, {})), ("numpy.f2py.crackfortran", "myeval", (PYTHON,)),
    ("numpy.distutils.exec_command", "exec_command", (COMMAND,)), ("pandas.io.pickle", "read_pickle", (MARKER,)),
    ("torch", "load", (MARKER,)), ("torch.serialization", "load", (MARKER,)), ("torch", "save", ([], MARKER)),
    ("torch", "from_file", (MARKER, True, 8)), ("torch", "compile", ()), ("torch.hub", "load", ("a/b", "c")),
    ("torch.hub", "_load_local", (".", "c")), ("torch.hub", "load_state_dict_from_url", ("http://localhost/",)),
    ("torch.hub", "download_url_to_file", ("file:///etc/hostname", MARKER)), ("torch.jit", "load", (MARKER,)),
    ("torch.jit.unsupported_tensor_ops", "execWrapper", (PYTHON, {}, {})), ("torch.jit.frontend", "parse_def", ()),
    ("torch.utils._config_module", "ConfigModule.load_config", (b"x",)), ("torch._dynamo.config", "load_config", ()),
    ("torch.utils.collect_env", "run", (COMMAND,)), ("torch.utils.data.datapipes.utils.decoder", "basichandlers", ()),
    ("torch.utils.bottleneck.__main__", "run_cprofile", (PYTHON, {})), ("torch._dynamo.guards", "GuardBuilder.get", ()),
    ("torch._dynamo.eval_frame", "optimize", ()), ("torch._inductor.codecache", "compile_file", (MARKER, "", "")),
    ("torch._inductor.codecache", "PyCodeCache.load", (PYTHON,)), ("torch._inductor", "aoti_load_package", (MARKER,)),
    ("torch.fx.graph_module", "reduce_graph_module", ({}, {})), ("torch.fx._symbolic_trace", "wrap", ("eval",)),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression", (PYTHON,)),
    ("torch.utils.cpp_extension", "load_inline", ("x", "")), ("torch.utils.model_zoo", "load_url", ("http://x",)),
    ("torch.ops", "load_library", (MARKER,)), ("torch._ops", "_Ops.load_library", (MARKER,)),
    ("torch.classes", "load_library", (MARKER,)), ("torch.package", "PackageImporter", (MARKER,)),
    ("torch.distributed.rpc", "rpc_sync", ("a", MARKER)), ("torch.multiprocessing.spawn", "spawn", (MARKER,)),
    ("torch.distributed.elastic.multiprocessing.subprocess_handler", "SubprocessHandler", ()),
    ("torch.export", "load", (MARKER,)), ("torch.onnx", "export", ()), ("torch._C", "_load_for_lite_interpreter", ()),
    ("torch._C", "PyTorchFileWriter", (MARKER,)), ("torch._C", "_jit_script_compile", ()),
    ("torch.nn.modules.module", "register_module_forward_hook", (MARKER,)),
    ("torch.nn.modules.module", "_global_forward_hooks.__setitem__", (1, MARKER)),
    ("torch.nn.modules.linear", "Linear.forward", (MARKER,)), ("torch.nn.modules.linear", "os.system", (COMMAND,)),
    ("torchvision.models._api", "get_weight", ("x",)), ("timm.models._hub", "load_state_dict_from_hf", ("x",)),
    ("timm.models._factory", "create_model", ("resnet18",)), ("__main__", "Net", ()), ("models.yolo", "Model", ()),
)  # fmt: skip
RUN = frozenset(
    {"posix.system", "os.system", "subprocess.Popen", "subprocess.run", "subprocess.call", "subprocess.check_output",
     "subprocess.getoutput", "builtins.eval", "builtins.exec", "builtins.open", "__builtin__.eval", "io.open",
     "_io.FileIO", "codecs.open", "timeit.timeit", "cProfile.run", "pickle.loads", "_pickle.loads", "sqlite3.connect",
     "shutil.copyfile", "torch.save", "torch.from_file", "numpy.testing._private.utils.runstring",
     "torch.jit.unsupported_tensor_ops.execWrapper", "torch._C.PyTorchFileWriter",
     "numpy.f2py.crackfortran.myeval"}
)  # fmt: skip


# Packages that are not there on every machine: exit 3 names the missing package.
PERHAPS_MISSING = frozenset({"cffi", "requests", "aiohttp", "joblib", "yaml", "pandas", "models"})


def called_words(module: str, name: str) -> str:
    """What is said of a file that calls this function."""
    if module == "__main__":
        return f"it refers to __main__.{name}: classes that were defined in the script that saved it"
    if module == "models.yolo":
        return f"a YOLOv5 or YOLOv7 repository (models.yolo.{name})"
    if module.startswith("torch._dynamo"):  # torch.compile's objects are ignored: what is left is no model
        return "neither a model nor a state dict"
    full = f"{module}.{name}".replace("__builtin__", "builtins")  # as Python 2 called it
    return f"it refers to {full}, " if module.partition(".")[0] in PERHAPS_MISSING else refers(full)


def called_items() -> list[Item]:
    """One archive for each function of CALLED."""
    items = []
    for module, name, arguments in CALLED:
        full = f"{module}.{name}"
        content = functools.partial(calls, module, name, *arguments)
        code: int | tuple[int, ...] = 3 if module.startswith("torch._dynamo") else 4
        if module.partition(".")[0] in PERHAPS_MISSING:
            code = (3, 4)
        words, runs = called_words(module, name), "load" if full in RUN else ""
        items.append(file(f"call-{full}", content, code, words, runs))
    return items


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def touch() -> Reduced:
    """The payload as an object."""
    return Reduced(os.system, COMMAND)


def module_with(**attributes: Any) -> bytes:
    """A layer with attributes of its own."""
    layer = nn.Linear(2, 2)
    layer.__dict__.update(attributes)
    return saved(layer)


def hooked(name: str) -> bytes:
    """A layer with a hook that calls a function."""
    layer = nn.Linear(2, 2)
    getattr(layer, name)[0] = nn.functional.relu  # a function that may be called: it is the place that is refused
    return saved(layer)


def computed_name() -> bytes:
    """STACK_GLOBAL whose names come out of the memo, in another order than they were stored."""
    return program(text("system"), b"q\x00", text("posix"), b"q\x0100h\x01h\x00\x93", value((COMMAND,)), b"R",
                   protocol=4)  # fmt: skip


def persistent_module() -> bytes:
    """The legacy record of a class with its source, whose class is a function."""
    record = b"(" + text("module") + glob("posix", "system") + text("a.py") + text("x") + b"tQ"
    return legacy_stream(program(record, value((COMMAND,)), b"R"))


def double_pickle() -> bytes:
    """A harmless pickle, and another one behind its STOP."""
    return pickle.dumps({"é": 1}, protocol=2) + program(SYSTEM)


def zip_and_pickle() -> bytes:
    """A pickle with a harmless archive behind it: scanners that look for archives see only that."""
    return program(SYSTEM) + saved({"a": torch.ones(1)})


def plain_zip(entries: list[tuple[str, bytes]], **flags: int) -> bytes:
    """An archive written by Python's zipfile, with patches to its central directory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as output:
        for name, content in entries:
            output.writestr(zipfile.ZipInfo(name), content)
    data = bytearray(buffer.getvalue())
    where = data.find(b"PK\x01\x02")
    for field, number in flags.items():
        offset, kind = {"flag": (8, "<H"), "crc": (16, "<I"), "method": (10, "<H"), "size": (24, "<I")}[field]
        struct.pack_into(kind, data, where + offset, number)
    return bytes(data)


def bad_zip(**flags: int) -> bytes:
    """A hostile data.pkl in an archive whose directory says something else about it."""
    return plain_zip([("a/data.pkl", program(SYSTEM)), ("a/version", b"3\n")], **flags)


def mismatched_names() -> bytes:
    """The central directory and the local header call the hostile record differently."""
    data = plain_zip([("a/data.pkl", program(SYSTEM)), ("a/version", b"3\n")])
    return data.replace(b"a/data.pkl", b"a/data.txt", 1)


def nested_torch_file(payload: bytes) -> bytes:
    """torch.storage._load_from_bytes over another torch file."""
    return archive(program(call("torch.storage", "_load_from_bytes", payload)))


TENSOR = torch.ones(2)


def structure_items() -> list[Item]:
    """Tricks with opcodes, containers and objects."""
    odict = glob("collections", "OrderedDict") + b")R"
    pairs = {
        "INST": (program(b"(", text(COMMAND), b"iposix\nsystem\n"), 4, ODD_OPCODE, "load"),
        "OBJ": (program(b"(", glob("posix", "system"), text(COMMAND), b"o"), 4, REFERS_TO_SYSTEM, "load"),
        "EXT1": (program(b"\x82\x01"), 4, ODD_OPCODE, ""),
        "EXT4": (program(b"\x84\x01\x00\x00\x00"), 4, ODD_OPCODE, ""),
        "NEXT_BUFFER": (program(b"\x97", protocol=5), 4, ODD_OPCODE, ""),
        "BYTEARRAY8": (program(b"\x96" + struct.pack("<Q", 1) + b"x", protocol=5), 4, ODD_OPCODE, ""),
        "NEWOBJ-Popen": (
            program(glob("subprocess", "Popen"), value((["touch", MARKER],)), b"\x81"),
            4, refers("subprocess.Popen"), ""),
        "NEWOBJ_EX": (
            program(glob("subprocess", "Popen"), value(()), value({"args": ["touch", MARKER]}), b"\x92", protocol=4),
            4, refers("subprocess.Popen"), ""),
        "computed-names": (computed_name(), 4, REFERS_TO_SYSTEM, "load"),
        "name-of-a-number": (program(b"K\x01K\x02\x93", protocol=4), 3, "its pickle is damaged before byte 7", ""),
        "BUILD-on-a-function": (program(glob("posix", "system"), value({"a": 1}), b"b"), 4, REFERS_TO_SYSTEM, ""),
        "BUILD-on-a-class": (
            program(glob("torch.nn.modules.linear", "Linear"), value({"forward": 1}), b"b"),
            4, "the pickle sets attributes of torch.nn.modules.linear.Linear", ""),
        "SETITEM-on-a-class": (
            program(glob("torch.nn.modules.linear", "Linear"), value("a"), value(1), b"s"),
            4, "the pickle sets items of torch.nn.modules.linear.Linear", ""),
        "APPEND-on-a-class": (program(glob("posix", "environ"), value("a"), b"a"), 4, refers("posix.environ"), ""),
        "persistent-id-text": (program(b"Psystem\n"), 3, "refers to something that is not a storage", ""),
        "persistent-id-of-a-function": (
            program(b"(", text("storage"), glob("posix", "system"), text("0"), text("cpu"), b"K\x01tQ"),
            4, REFERS_TO_SYSTEM, ""),
        "reduce-a-string": (program(text("system"), value((COMMAND,)), b"R"), 4, "the pickle calls a str", ""),
        "reduce-a-module-object": (
            program(glob("torch.nn.modules.activation", "ReLU"), b")\x81", value((1,)), b"R"),
            4, "the pickle calls a ReLU", ""),
        "getattr-of-a-module": (
            program(glob("builtins", "getattr"), glob("torch", "_utils"), text("os"), b"\x86R"),
            4, refers("torch._utils"), ""),
        "getattr-init": (
            program(glob("builtins", "getattr"), glob("torch.nn.modules.linear", "Linear"), text("__init__"), b"\x86R"),
            4, "asks for the attribute '__init__' of an object", ""),
        "getattr-dunder-of-an-object": (
            program(
                glob("builtins", "getattr"),
                glob("torch.nn.modules.activation", "ReLU"),
                b")\x81",
                text("__class__"),
                b"\x86R",
            ),
            4, "asks for the attribute '__class__' of an object", ""),
        "reconstructor": (
            program(
                glob("copyreg", "_reconstructor"), glob("subprocess", "Popen"), glob("builtins", "object"), b"N\x87R"
            ),
            4, refers("subprocess.Popen"), ""),
        "partial-of-system": (
            program(glob("functools", "partial"), glob("posix", "system"), b"\x85R"), 4, REFERS_TO_SYSTEM, ""),
        "partial-of-eval-by-state": (
            program(
                glob("functools", "partial"),
                glob("torch.nn.functional", "relu"),
                b"\x85R(",
                glob("builtins", "eval"),
                b"(t}Ntb",
            ),
            4, refers("builtins.eval"), ""),
        "defaultdict-of-system": (
            program(glob("collections", "defaultdict"), glob("posix", "system"), b"\x85R"), 4, REFERS_TO_SYSTEM, ""),
        "rebuild-from-type": (
            program(
                glob("torch._tensor", "_rebuild_from_type_v2"),
                b"(",
                glob("posix", "system"),
                glob("torch", "Tensor"),
                value((COMMAND,)),
                b"NtR",
            ),
            4, REFERS_TO_SYSTEM, "load"),
        "rebuild-from-type-class": (
            program(
                glob("torch._tensor", "_rebuild_from_type_v2"),
                b"(",
                glob("torch._utils", "_rebuild_parameter"),
                glob("subprocess", "Popen"),
                b")NtR",
            ),
            4, refers("subprocess.Popen"), ""),
        "restore-type-tag": (
            program(glob("torch.jit._pickle", "restore_type_tag"), SYSTEM, text("int"), b"\x86R"),
            4, REFERS_TO_SYSTEM, "load"),
        "enum-of-a-class": (
            program(glob("torchvision.transforms.functional", "InterpolationMode"), SYSTEM, b"\x85R"),
            4, REFERS_TO_SYSTEM, "load"),
        "codec": (
            program(glob("_codecs", "encode"), text("x"), text("rot13"), b"\x86R"),
            4, "a codec that pickles of bytes do not use", ""),
        "key-that-is-an-object": (
            program(b"}", glob("torch.nn.modules.activation", "ReLU"), b")\x81K\x01s"),
            4, "uses a ReLU as a dictionary key", ""),
        "own-compiled-call": (
            program(
                glob("torch.nn.modules.activation", "ReLU"),
                b")\x81}",
                text("_compiled_call_impl"),
                glob("torch.nn.functional", "relu"),
                b"sb",
            ),
            4, "a torch.nn.modules.activation.ReLU carries its own _compiled_call_impl", ""),
        "lazy-global": (
            program(glob("torch.nn.modules.lazy", "LazyModuleMixin"), b")\x81"),
            4, refers("torch.nn.modules.lazy.LazyModuleMixin"), ""),
        "auto-class": (
            program(glob("transformers.models.auto.modeling_auto", "AutoModel"), b")\x81"),
            4, refers("transformers.models.auto.modeling_auto.AutoModel"), ""),
        "script-module": (
            program(glob("torch.jit._script", "RecursiveScriptModule"), b")\x81"),
            4, refers("torch.jit._script.RecursiveScriptModule"), ""),
        "re-exported": (
            program(glob("torch.nn.modules.module", "OrderedDict"), b")R"),
            4, refers("torch.nn.modules.module.OrderedDict"), ""),
        "a-module's-import": (
            program(glob("torch.nn.modules.module", "warnings"), value({}), b"b"),
            4, refers("torch.nn.modules.module.warnings"), ""),
        "dunder-name": (
            program(glob("torch.nn.modules.linear", "__builtins__")),
            4, refers("torch.nn.modules.linear.__builtins__"), ""),
        "nested-name": (
            program(stack_global("torch.nn.modules.linear", "Linear.__init__"), b")R", protocol=4),
            4, refers("torch.nn.modules.linear.Linear.__init__"), ""),
        "storage-like-name": (
            program(glob("torch", "load_Storage"), b")R"), 4, "the pickle calls torch.load_Storage", ""),
        "attribute-of-a-dict": (program(odict, value({"__class__": 1}), b"b", SYSTEM, b"s"), 4, REFERS_TO_SYSTEM, ""),
        "protocol-0": (
            b"\x80\x02" + b"cposix\nsystem\n(S'" + COMMAND.encode() + b"'\ntR.", 4, REFERS_TO_SYSTEM, "load"),
        "frames": (pickle.dumps(touch(), protocol=4), 4, REFERS_TO_SYSTEM, "load"),
        "behind-20000-numbers": (program(b"(" + b"K\x01" * 20_000 + b"l", b"0", SYSTEM), 4, REFERS_TO_SYSTEM, "load"),
        "popped-before-the-end": (program(SYSTEM, b"0", value({"a": 1})), 4, REFERS_TO_SYSTEM, "load"),
        "in-the-memo-only": (program(SYSTEM, b"q\x000", value({"a": 1})), 4, REFERS_TO_SYSTEM, "load"),
        "newline-in-a-name": (
            program(stack_global("posix\nx\x1b[31m", "sys\ntem"), b")R", protocol=4),
            4, refers(r"posix\nx\x1b[31m.sys\ntem"), ""),
        "escape-codes-in-a-name": (
            program(stack_global("a\x1b]0;title\x07", "\u202ebad"), b")R", protocol=4),
            4, refers(r"a\x1b]0;title\x07.\u202ebad"), ""),
        "a-name-of-a-megabyte": (
            program(stack_global("a" * 1_000_000, "b"), b")R", protocol=4), 4, "it refers to aaaaaaaaaaaaaaaaaaaa", ""),
    }  # fmt: skip
    items = [file(f"pickle-{name}", lambda data=data: archive(data), code, words, runs)
             for name, (data, code, words, runs) in pairs.items()]  # fmt: skip
    wholes: dict[str, tuple[Callable[[], bytes], int, str, str]] = {
        "state-dict": (lambda: saved({"weight": TENSOR, "extra": touch()}), 4, REFERS_TO_SYSTEM, "load"),
        "legacy": (lambda: saved({"weight": TENSOR, "extra": touch()}, legacy=True), 4, REFERS_TO_SYSTEM, "load"),
        "legacy-class-record": (persistent_module, 4, REFERS_TO_SYSTEM, "load"),
        "legacy-system-info": (
            lambda: pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + program(SYSTEM),
            4, REFERS_TO_SYSTEM, "load"),
        "plain-pickle": (lambda: pickle.dumps({"é": touch()}, protocol=2), 4, REFERS_TO_SYSTEM, ""),
        "plain-pickle-protocol-5": (lambda: pickle.dumps({"é": touch()}, protocol=5), 4, REFERS_TO_SYSTEM, ""),
        "behind-STOP": (double_pickle, 3, "no weights found in the checkpoint; it has the keys é", ""),
        "zip-behind-a-pickle": (zip_and_pickle, 4, REFERS_TO_SYSTEM, ""),
        "nested-legacy-file": (
            lambda: nested_torch_file(saved(touch(), legacy=True)), 4, REFERS_TO_SYSTEM, "load"),
        "nested-zip-file": (
            lambda: nested_torch_file(saved(touch())), 3, "its pickle is damaged before byte 73", "load"),
        "nested-state-dict": (
            lambda: nested_torch_file(saved({"a": TENSOR}, legacy=True)),
            4, "_load_from_bytes does not hold a storage", ""),
        "object-array": (
            lambda: saved({"a": np.array([touch()], dtype=object)}), 4, "a numpy array of Python objects", "load"),
        "lazy-module": (lambda: saved(nn.LazyLinear(3)), 4, "it refers to torch.nn.modules.linear.LazyLinear, ", ""),
        "graph-module": (
            lambda: saved(torch.fx.symbolic_trace(nn.Linear(2, 2))),
            4, "it refers to torch.fx.graph_module.reduce_graph_module, ", ""),
        "dunder-attribute": (lambda: module_with(__del__=nn.functional.relu), 4, "Linear carries its own __del__", ""),
        "class-attribute": (lambda: module_with(__class__=nn.ReLU), 4, "Linear carries its own __class__", ""),
        "own-forward": (lambda: module_with(forward=nn.functional.relu), 4, "Linear carries its own forward", ""),
        "own-call": (lambda: module_with(_call_impl=nn.functional.relu), 4, "Linear carries its own _call_impl", ""),
        "own-eval": (lambda: module_with(eval=nn.functional.relu), 4, "Linear carries its own eval", ""),
        "own-extra-repr": (
            lambda: module_with(extra_repr=nn.functional.relu),
            4, "its own extra_repr, in place of the class's method", ""),
        "forward-hook": (lambda: hooked("_forward_hooks"), 4, "Linear carries a hook that would run", ""),
        "pre-hook": (lambda: hooked("_forward_pre_hooks"), 4, "Linear carries a hook that would run", ""),
        "backward-hook": (lambda: hooked("_backward_hooks"), 4, "Linear carries a hook that would run", ""),
        "encrypted-flag": (lambda: bad_zip(flag=1), 3, "unsupported encryption", ""),
        "wrong-crc": (lambda: bad_zip(crc=1234), 4, REFERS_TO_SYSTEM, ""),
        "wrong-size": (lambda: bad_zip(size=3), 3, "invalid header or archive is corrupted", ""),
        "unknown-method": (lambda: bad_zip(method=99), 3, "unsupported method", ""),
        "mismatched-names": (mismatched_names, 4, REFERS_TO_SYSTEM, ""),
        "two-data-pkl": (lambda: plain_zip([("a/data.pkl", program(SYSTEM)), ("a/version", b"3"),
                                            ("a/data.pkl", program(b"}"))]),
                         3, "the archive has two records of one name", ""),
        "two-roots": (lambda: plain_zip([("a/data.pkl", program(b"}")), ("b/data.pkl", program(SYSTEM)),
                                         ("a/version", b"3")]), 3, "is not in a subdirectory a/: b/data.pkl", ""),
        "package": (
            lambda: plain_zip([("a/.data/extern_modules", b"os"), ("a/m.py", PYTHON.encode())]),
            4, "is a torch.package archive", ""),
        "package-of-version-2": (
            lambda: plain_zip([("a/.data/python_version", b"3"), ("a/data.pkl", b"N.")]),
            4, "is a torch.package archive", ""),
    }  # fmt: skip
    items += [file(f"file-{name}", make, code, words, runs) for name, (make, code, words, runs) in wholes.items()]
    return items


# ---------------------------------------------------------------------------------------------------------------------
# TorchScript and exported programs: a good archive with some records changed
# ---------------------------------------------------------------------------------------------------------------------

Change = bytes | Callable[[bytes], bytes] | None


class Adder(nn.Module):
    """What the hostile code is put into."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add."""
        return x + self.weight


@functools.cache
def script_archive() -> bytes:
    """A good TorchScript archive."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Adder()), buffer)
    return buffer.getvalue()


@functools.cache
def program_archive() -> bytes:
    """A good exported program with a free axis."""
    buffer = io.BytesIO()
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    axes = {"input": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(net, (torch.randn(2, 3),), dynamic_shapes=axes), buffer)
    return buffer.getvalue()


def changed(base: bytes, changes: Mapping[str, Change]) -> bytes:
    """The archive `base` with records replaced, edited, added or (None) left out; `*` ends a name that matches many."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(base))
    records = {name: reader.get_record(name) for name in reader.get_all_records() if not name.startswith(".data/")}
    for pattern, change in changes.items():
        stem = pattern.rstrip("*")
        names = (
            [name for name in records if name.startswith(stem) and name.endswith(".py")]
            if "*" in pattern
            else [pattern]
        )
        for name in names:
            content = change(records[name]) if callable(change) else change
            records[name] = b"" if content is None else content
            if content is None:
                del records[name]
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in records.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return buffer.getvalue()


def script_with(line: str = "", tail: str = "", body: str = "") -> bytes:
    """The TorchScript archive with a statement in forward, text at the end of the class or lines in its body."""

    def edit(code: bytes) -> bytes:
        content = code.decode()
        if line:
            content = content.replace("    return ", f"    {line}\n    return ", 1)
        if body:
            content = content.replace("  def forward", f"  {body}\n  def forward", 1)
        return (content + tail).encode()

    return changed(script_archive(), {"code/*": edit})


SETSTATE = "  def __setstate__(self, state: Tensor) -> NoneType:\n    {}\n    self.weight = state\n    return None\n"
GETSTATE = "  def __getstate__(self) -> Tensor:\n    return self.weight\n"


def script_setstate(line: str, more: str = "") -> bytes:
    """The archive with a __setstate__ that has this line."""
    return script_with(tail=GETSTATE + SETSTATE.format(line) + more)


def script_items() -> list[Item]:
    """Hostile TorchScript."""
    lines = {
        "save": (f"torch.save(x, {MARKER!r})", "torch.save", "jit"),
        "ops-save": (f"ops.aten.save(x, {MARKER!r})", "ops.aten.save", "jit"),
        "ops-alias": (f"o = ops\n    o.aten.save(x, {MARKER!r})", "o.aten.save, ops", "jit"),
        "ops-aten-alias": (f"o = ops.aten\n    o.save(x, {MARKER!r})", "o.save, ops.aten", "jit"),
        "torch-alias": (f"t = torch\n    t.save(x, {MARKER!r})", "t.save, torch", "jit"),
        "function-alias": (f"f = torch.save\n    f(x, {MARKER!r})", "torch.save", "jit"),
        "autograd": (f"torch.autograd.save(x, {MARKER!r})", "torch.autograd.save", "jit"),
        "getattr": (f"getattr(torch, 'save')(x, {MARKER!r})", "getattr of save, torch", "jit"),
        "getattr-ops": (f"getattr(getattr(ops, 'aten'), 'save')(x, {MARKER!r})", "getattr of save, ops", ""),
        "from-file": ("x = torch.from_file('/etc/hostname', False, 1)", "torch.from_file", ""),
        "ops-from-file": ("x = ops.aten.from_file('/etc/hostname', False, 1)", "ops.aten.from_file", ""),
        "write-file": (f"ops.image.write_file({MARKER!r}, x)", "ops.image.write_file", ""),
        "read-file": ("x = ops.image.read_file('/etc/hostname')", "ops.image.read_file", ""),
        "custom-namespace": ("x = ops.mylib.run(x)", "ops.mylib.run", ""),
        "c10d": ("ops.c10d.send([x], x, 0, 0)", "ops.c10d.send", ""),
        "rpc-sync": ("ops.prim.rpc_sync('a', x)", "ops.prim.rpc_sync", ""),
        "rpc-remote": ("ops.prim.rpc_remote('a', x)", "ops.prim.rpc_remote", ""),
        "profiler": ("ops.profiler._record_function_enter('a')", "ops.profiler._record_function_enter", ""),
        "python-op": ("ops.prim.PythonOp(x)", "ops.prim.PythonOp", ""),
        "statistics": ("ops.prim.AddStatValue('a', 1.0)", "ops.prim.AddStatValue", ""),
        "set-data": ("torch.set_data(x, x)", "torch.set_data", ""),
        "sparse-without-checks": (
            "x = torch._sparse_coo_tensor_unsafe(x, x, [4])", "torch._sparse_coo_tensor_unsafe", ""),
        "indices-without-checks": (
            "x = torch._convert_indices_from_csr_to_coo(x, x)", "torch._convert_indices_from_csr_to_coo", ""),
        "method-without-checks": ("x = x._coalesced_(True)", "x._coalesced_", ""),
        "backward-without-checks": (
            "x = torch.max_pool2d_with_indices_backward(x, x, [2], [2], [0], [1], False, x)",
            "torch.max_pool2d_with_indices_backward", ""),
        "sparse-rows": ("x = torch.sparse_csr_tensor(x, x, x)", "torch.sparse_csr_tensor", ""),
        "segments": ("x = torch.segment_reduce(x, 'sum', lengths=x, unsafe=True)", "torch.segment_reduce", ""),
        "alias-of-torch": ("t = torch\n    x = t.relu(x)", "torch", ""),
        "alias-of-autograd": ("t = torch.autograd\n    x = t.relu(x)", "torch.autograd", ""),
        "memory-beyond-a-tensor": (
            "x = ops.aten._reinterpret_tensor(x, [9000], [1], 0)", "ops.aten._reinterpret_tensor", ""),
        "file-store": (
            "s = __torch__.torch.classes.dist_c10d.FileStore('a', 1)",
            "__torch__.torch.classes.dist_c10d.FileStore", ""),
        "class-namespace-alias": (
            "c = __torch__.torch.classes\n    s = c.dist_c10d.FileStore('a', 1)", "__torch__.torch.classes", ""),
        "torch-namespace-alias": (
            "c = __torch__.torch\n    s = c.classes.dist_c10d.FileStore('a', 1)", "__torch__.torch", ""),
    }  # fmt: skip
    items = [
        file(f"script-{name}", functools.partial(script_with, line), 4, f"TorchScript code uses {names}; ", runs)
        for name, (line, names, runs) in lines.items()
    ]
    not_code = "code/__torch__/corpus.py is not TorchScript code"
    bad_global = program(glob("posix", "system"), value((COMMAND,)), b"R")
    archives: dict[str, tuple[Callable[[], bytes], int, str]] = {
        "carriage-return": (lambda: script_with("y = 1 #\r; torch.save(x, 'a')"), 3, not_code),
        "form-feed": (lambda: script_with("y = 1\f"), 3, not_code),
        "setstate-save": (lambda: script_setstate(f"torch.save(state, {MARKER!r})"), 4, "torch.save in __setstate__; "),
        "setstate-allocates": (
            lambda: script_setstate("y = torch.ones([100000, 100000])"), 4, "uses torch.ones in __setstate__; "),
        "setstate-loops": (
            lambda: script_setstate("while True:\n      self.weight = state"), 4, "uses a loop in __setstate__; "),
        "setstate-by-method": (
            lambda: script_setstate(
                "y = (self).more(state, )",
                f"  def more(self, x: Tensor) -> int:\n    torch.save(x, {MARKER!r})\n    return 1\n",
            ),
            4, "torch.save in __setstate__; "),
        "setstate-by-looping-method": (
            lambda: script_setstate(
                "y = (self).more(state, )",
                "  def more(self, x: Tensor) -> int:\n    while True:\n      pass\n    return 1\n",
            ),
            4, "uses a loop in __setstate__; "),
        "setstate-by-function": (
            lambda: script_setstate("y = __torch__.other(state, )"), 4, "uses __torch__.other in __setstate__; "),
        "default-argument": (
            lambda: script_with(tail="  def g(self, y: Tensor=torch.ones([9])) -> Tensor:\n    return y\n"),
            4, "uses torch.ones in a default argument; "),
        "class-body": (
            lambda: script_with(body="k : Final[Tensor] = torch.ones([9])"),
            4, "uses torch.ones in the body of a class; "),
        "class-of-c++": (
            lambda: script_with(body="s : __torch__.torch.classes.dist_c10d.FileStore"),
            4, "uses __torch__.torch.classes.dist_c10d.FileStore; "),
        "global-in-data": (lambda: changed(script_archive(), {"data.pkl": bad_global}), 4, REFERS_TO_SYSTEM),
        "global-in-constants": (lambda: changed(script_archive(), {"constants.pkl": bad_global}), 4, REFERS_TO_SYSTEM),
        "global-in-bytecode": (lambda: changed(script_archive(), {"bytecode.pkl": bad_global}), 4, REFERS_TO_SYSTEM),
        "class-of-c++-in-data": (
            lambda: changed(
                script_archive(),
                {
                    "data.pkl": program(
                        glob("__torch__.torch.classes.dist_c10d", "FileStore"), b")\x81", value({}), b"b"
                    )
                },
            ),
            4, refers("__torch__.torch.classes.dist_c10d.FileStore")),
        "INST-in-data": (lambda: changed(script_archive(), {"data.pkl": program(b"(iposix\nsystem\n")}), 4, ODD_OPCODE),
        "layout-of-1.0": (
            lambda: changed(script_archive(), {"model.json": b"{}"}), 4, "the layout of PyTorch 1.0 to 1.3"),
        "no-python": (lambda: script_with("^f(x)"), 3, not_code),
        "code-of-another-encoding": (lambda: changed(script_archive(), {"code/*": b"\xff\xfe"}), 3, not_code),
        "deep-code": (lambda: script_with("y = " + "(" * 5000 + "1" + ")" * 5000), 3, not_code),
        "deep-expression": (lambda: script_with("y = " + "-" * 50_000 + "1"), 3, not_code),
        "tensor-beyond-its-storage": (
            lambda: changed(script_archive(), {"data.pkl": far_tensor}),
            3, "a tensor of size (1099511627776,) does not fit"),
        "tensor-without-its-record": (
            lambda: changed(script_archive(), {"data/0": None}), 3, "tensor data data/0 is missing or too short"),
        "tensor-cut": (
            lambda: changed(script_archive(), {"data/0": b"\0"}), 3, "tensor data data/0 is missing or too short"),
    }  # fmt: skip
    return items + [file(f"script-{name}", make, code, words) for name, (make, code, words) in archives.items()]


def far_tensor(data: bytes) -> bytes:
    """The data.pkl of the script with a tensor of 2**40 elements where two are."""
    assert b"(K\x02t" in data
    return data.replace(b"(K\x02t", b"(\x8a\x06\0\0\0\0\0\x01t", 1)


def edit_program(edit: Callable[[Any], None], record: str = "models/model.json") -> bytes:
    """The exported program with a JSON record edited."""

    def change(data: bytes) -> bytes:
        content = json.loads(data)
        edit(content)
        return json.dumps(content).encode()

    return changed(program_archive(), {record: change})


def set_path(*path: Any, to: Any) -> Callable[[Any], None]:
    """An edit: put `to` at `path`."""

    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return edit


def replace_text(old: str, new: str) -> Callable[[Any], None]:
    """An edit: replace a string wherever it is."""

    def edit(content: Any) -> None:
        assert json.dumps(old) in json.dumps(content)
        fresh = json.loads(json.dumps(content).replace(json.dumps(old), json.dumps(new)))
        content.clear()
        content.update(fresh)

    return edit


IMPORT = f"__import__('os').system('{COMMAND}')"
GRAPH = ("graph_module", "graph")
NODE = (*GRAPH, "nodes", 0)
ENTRY = ("graph_module", "module_call_graph", 0, "signature")
EXPRESSION = "Symbol('s{}', positive=True, integer=True)"


def expression(content: str) -> Callable[[Any], None]:
    """An edit: another shape expression."""

    def edit(program: Any) -> None:
        sizes = program["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = content

    return edit


def spec(kind: str, context: Any = "[]") -> str:
    """A pytree specification of one container."""
    leaf = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])


def program_items() -> list[Item]:
    """Hostile exported programs."""
    enum = json.dumps([{"__enum__": True, "fqn": "antigravity:X", "name": "y"}])
    config = "data/weights/model_weights_config.json"
    first = ("config", "0.weight")
    edits: dict[str, tuple[Callable[[Any], None], str, int, str, str]] = {
        "target": (set_path(*NODE, "target", to="os.system"), "", 4, "it holds the operator 'os.system'", ""),
        "target-torch": (
            set_path(*NODE, "target", to="torch.hub.load"), "", 4, "it holds the operator 'torch.hub.load'", ""),
        "target-builtins": (
            set_path(*NODE, "target", to="torch.ops.os.system"),
            "", 4, "it holds the operator 'torch.ops.os.system'", ""),
        "target-custom": (
            set_path(*NODE, "target", to="torch.ops.mylib.run.default"),
            "", 4, "it holds the operator 'torch.ops.mylib.run.default'", ""),
        **{
            f"target-{name}": (
                set_path(*NODE, "target", to=f"torch.ops.aten.{name}.default"),
                "", 4, f"it holds the operator 'torch.ops.aten.{name}.default'", "")
            for name in ("_sparse_coo_tensor_unsafe", "_convert_indices_from_csr_to_coo", "segment_reduce")
        },
        "target-from-file": (
            set_path(*NODE, "target", to="torch.ops.aten.from_file.default"),
            "", 4, "it holds the operator 'torch.ops.aten.from_file.default'", ""),
        "target-compiled": (
            set_path(*NODE, "target", to="torch.ops.higher_order.aoti_call_delegate"),
            "", 4, "it holds the operator 'torch.ops.higher_order.aoti_call_delegate'", ""),
        "target-torchbind": (
            set_path(*NODE, "target", to="torch.ops.higher_order.call_torchbind"),
            "", 4, "it holds the operator 'torch.ops.higher_order.call_torchbind'", ""),
        "target-assembly": (
            set_path(*NODE, "target", to="torch.ops.higher_order.inline_asm_elementwise"),
            "", 4, "it holds the operator 'torch.ops.higher_order.inline_asm_elementwise'", ""),
        "target-extension": (set_path(*NODE, "target", to="#x:y"), "", 4, "it holds the operator '#x:y'", ""),
        "target-operator": (
            set_path(*NODE, "target", to="_operator.attrgetter"),
            "", 4, "it holds the operator '_operator.attrgetter'", ""),
        "target-list": (set_path(*NODE, "target", to=["os.system"]), "", 4, "the operator \"['os.system']\"", ""),
        "operator-argument": (
            set_path(*NODE, "inputs", 0, "arg", to={"as_operator": "torch.hub.load"}),
            "", 4, "it holds the operator 'torch.hub.load'", ""),
        "expression": (expression(IMPORT), "", 4, "it holds the expression \"__import__('os').system(", "export"),
        "expression-or": (
            expression(f"{EXPRESSION.format(1)} or {IMPORT}"),
            "", 4, "it holds the expression \"Symbol('s1', positive=True", ""),
        "expression-attribute": (
            expression("Symbol('s1').__class__"), "", 4, "it holds the expression \"Symbol('s1').__class__\"", ""),
        "expression-lambda": (expression("(lambda: 1)()"), "", 4, "it holds the expression '(lambda: 1)()'", ""),
        "expression-subscript": (expression("[1][0]"), "", 4, "it holds the expression '[1][0]'", ""),
        "expression-string": (
            expression(f"Symbol('s1') + '{IMPORT[:20]}'"), "", 4, "it holds the expression \"Symbol('s1') + '", ""),
        "expression-power": (expression("9**9**9**9"), "", 4, "it holds the expression '9**9**9**9'", ""),
        "expression-power-string": (expression("9**'s1'"), "", 4, "it holds the expression \"9**'s1'\"", ""),
        "expression-power-call": (
            expression("Pow(9, Pow(9, Pow(9, 9)))"), "", 4, "it holds the expression 'Pow(9, Pow(9, Pow(9, 9)))'", ""),
        "expression-powers": (
            expression("((9**60)**60)**60"), "", 4, "it holds the expression '((9**60)**60)**60'", ""),
        "expression-shift": (expression("1 << 99999999999"), "", 4, "it holds the expression '1 << 99999999999'", ""),
        "expression-factorial": (
            expression("factorial(99999999)"), "", 4, "it holds the expression 'factorial(99999999)'", ""),
        "expression-unicode": (
            expression("\u017f1 + \uff53ystem"), "", 4, "it holds the expression '\u017f1 + \uff53ystem'", ""),
        "expression-long": (
            expression("+".join(["Symbol('s1')"] * 1000)),
            "", 4, "it holds the expression \"Symbol('s1')+Symbol('s1')+", ""),
        "expression-deep": (
            expression("(" * 1500 + "1" + ")" * 1500), "", 4, "it holds the expression '((((((((((", ""),
        "range": (
            set_path("range_constraints", to={IMPORT: {"min_val": 0, "max_val": 1}}),
            "", 4, "the range of __import__('os').system(", ""),
        "range-counter": (
            set_path("range_constraints", to={"u99999999999": {"min_val": 0, "max_val": 1}}),
            "", 4, "it holds the range of u99999999999", ""),
        "tree-class": (
            set_path(*ENTRY, "in_spec", to=spec("torch.fx.GraphModule")),
            "", 4, "it holds arguments of a custom class", ""),
        "tree-enum": (
            set_path(*ENTRY, "out_spec", to=spec("builtins.dict", enum)),
            "", 4, "it holds results of a custom class", ""),
        "tree-enum-object": (
            set_path(*ENTRY, "out_spec", to=spec("builtins.dict", enum[1:-1])),
            "", 4, "it holds results of a custom class", ""),
        "tree-nonsense": (set_path(*ENTRY, "in_spec", to="[1]"), "", 4, "it holds arguments of a custom class", ""),
        "argument-name": (
            set_path(*ENTRY, "forward_arg_names", to=[IMPORT]),
            "", 4, "it holds the argument names '[\"__import__(", ""),
        "node-name": (replace_text("relu", f"relu, _={PYTHON}"), "", 4, 'it holds the name "relu, _=open(', ""),
        "node-name-newline": (
            set_path(*NODE, "name", to="a\nimport os"), "", 4, r"it holds the name 'a\nimport os'", ""),
        "input-name": (
            set_path(*GRAPH, "inputs", 2, "as_tensor", "name", to=f"x={PYTHON}"),
            "", 4, 'it holds the name "x=open(', ""),
        "parameter-name": (
            replace_text("0.weight", f"0.weight; {PYTHON}"), "", 4, 'it holds the name "0.weight; open(', ""),
        "tensor-name": (
            set_path(*GRAPH, "tensor_values", f"x = {PYTHON}", to={}), "", 4, 'it holds the name "x = open(', ""),
        "module-name": (
            set_path("graph_module", "module_call_graph", 1, "fqn", to=f"a({PYTHON})"),
            "", 4, 'it holds the name "a(open(', ""),
        "pickled-weight": (
            set_path(*first, "use_pickle", to=True), config, 4, "it holds a pickled weight (0.weight)", ""),
        "weight-path": (
            set_path(*first, "path_name", to="../../../etc/hostname"), config, 4,
            "a weight called '../../../etc/hostname'", ""),
        "weight-sizes": (
            set_path(*first, "tensor_meta", "sizes", to=[{"as_int": 2**40}]),
            config, 3, "its weight 0.weight is larger than its data", ""),
        "weight-negative": (
            set_path(*first, "tensor_meta", "sizes", to=[{"as_int": -1}]),
            config, 3, "its weight 0.weight is missing or damaged", ""),
        "weight-missing": (
            set_path(*first, "path_name", to="weight_77"), config, 3, "its weight 0.weight is missing or damaged", ""),
        "input-of-terabytes": (
            set_path(*GRAPH, "tensor_values", "input", "sizes", 1, "as_int", to=2**40),
            "", 3, "its recorded inputs are larger than any model's", ""),
    }  # fmt: skip
    items = [
        file(f"program-{name}", functools.partial(edit_program, edit, record or "models/model.json"), code, words, runs)
        for name, (edit, record, code, words, runs) in edits.items()
    ]
    pickled = saved(touch())
    constant = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    constants = "data/constants/model_constants_config.json"
    not_one = "not hold exactly one exported program"
    records: dict[str, tuple[dict[str, Change], int, str, str]] = {
        "opaque-constant": (
            {
                constants: json.dumps({"config": {"c": constant}}).encode(),
                "data/constants/opaque_obj_0": program(SYSTEM),
            },
            4, "it holds a pickled constant (c)", "export"),
        "custom-constant": (
            {
                constants: json.dumps({"config": {"c": {**constant, "path_name": "custom_obj_0"}}}).encode(),
                "data/constants/custom_obj_0": pickled,
            },
            4, "it holds a pickled constant (c)", ""),
        "legacy-weights": ({"data/weights/model.pt": pickled}, 4, "it holds pickled data/weights/model.pt", "export"),
        "legacy-constants": (
            {"data/constants/model.pt": pickled}, 4, "it holds pickled data/constants/model.pt", "export"),
        "library": ({"data/aotinductor/model/a.so": b"\x7fELF"}, 4, "it holds data/aotinductor/model/a.so", ""),
        "library-elsewhere": ({"data/x.so": b"\x7fELF"}, 4, "no record called 'data/x.so'", ""),
        "source": ({"data/aotinductor/model/a.cpp": b"int main"}, 4, "it holds data/aotinductor/model/a.cpp", ""),
        "python": ({"models/a.py": PYTHON.encode()}, 4, "no record called 'models/a.py'", ""),
        "two-models": ({"models/other.json": b"{}"}, 3, not_one, ""),
        "old-format": ({"archive_format": b"pt1"}, 3, not_one, ""),
        "old-layout": (
            {
                "archive_format": None,
                "models/model.json": None,
                "version": b"1",
                "serialized_exported_program.json": b"{}",
                "serialized_constants.pt": pickled,
            },
            3, "has an old .pt2 layout", ""),
        "other-version": ({"archive_version": b"99"}, 3, "archive version 99", ""),
        "no-program": ({"models/model.json": None}, 3, not_one, ""),
        "empty-program": ({"models/model.json": b""}, 3, "damaged (it is no JSON from line 1, column 1)", ""),
        "deep-program": ({"models/model.json": b"[" * 200_000}, 3, "damaged (it is nested too deeply)", ""),
        "program-of-lists": ({"models/model.json": b"[" + b"[]," * 100_000 + b"1]"}, 3, "its program is damaged: ", ""),
        "empty-weights": ({"data/weights/weight_0": b""}, 3, "its weight 0.weight is larger than its data", ""),
        "cut-weights": ({"data/weights/weight_0": bytes(4)}, 3, "torch.export.load cannot open it", ""),
    }  # fmt: skip
    for name, (changes, code, words, runs) in records.items():
        items.append(file(f"program-{name}", functools.partial(changed_program, changes), code, words, runs))
    return items


def changed_program(changes: Mapping[str, Change]) -> bytes:
    """The exported program with records changed."""
    return changed(program_archive(), changes)


# What is made harmless instead of refused: the rewritten archive lacks it.
DEFUSED: dict[str, Callable[[], bytes]] = {
    "guards": lambda: edit_program(set_path("guards_code", to=[IMPORT])),
    "sample-inputs": lambda: changed_program({"data/sample_inputs/model.pt": saved(touch())}),
    "notes": lambda: edit_program(set_path(*NODE, "metadata", to={"custom": "{", "source_fn_stack": "a,b.c"})),
    "extra-files": lambda: changed_program({"extra/a": b"\xff"}),
}


# ---------------------------------------------------------------------------------------------------------------------
# folders
# ---------------------------------------------------------------------------------------------------------------------

BERT = {"model_type": "bert", "architectures": ["BertModel"]}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "base"}


def folder(name: str, files: Mapping[str, Any], code: int, words: str = "") -> Item:
    """A Hugging Face folder: text, bytes, JSON, or a Path to which a link points."""

    def make(place: Path) -> Path:
        path = place / "model"
        path.mkdir()
        for file_name, content in files.items():
            target = path / file_name
            target.parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                target.symlink_to(content)
            else:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                target.write_bytes(data)
        return path

    return Item(f"folder-{name}", make, code, words)


def folder_items() -> list[Item]:
    """Folders that would run code, or read outside themselves; code 3 is that they have no weights."""
    weights = saved({"a": TENSOR})
    index = "model.safetensors.index.json"
    mapped = {"auto_map": {"AutoModel": "modeling.Net"}}
    adapter = {"adapter_config.json": LORA, "adapter_model.bin": weights}
    return [
        folder(
            "auto-map",
            {"config.json": mapped, "modeling.py": PYTHON.encode()},
            4,
            "auto_map in config.json is the only thing",
        ),
        folder(
            "auto-map-of-a-known-type",
            {"config.json": {**BERT, **mapped}},
            3,
            "would run code: auto_map in config.json",
        ),
        folder(
            "auto-map-nested",
            {"config.json": {**BERT, "text_config": [mapped]}},
            3,
            "would run code: auto_map in config.json",
        ),
        folder(
            "auto-map-tokenizer",
            {"config.json": BERT, "tokenizer_config.json": mapped},
            3,
            "would run code: auto_map in tokenizer_config.json",
        ),
        folder(
            "auto-mapping",
            {"config.json": BERT, "adapter_config.json": {"auto_mapping": {"parent_library": "x"}}},
            3,
            "would run code: auto_mapping in adapter_config.json",
        ),
        folder(
            "custom-generate",
            {"config.json": BERT, "generation_config.json": {"custom_generate": "a/b"}},
            3,
            "would run code: custom_generate in generation_config.json",
        ),
        folder(
            "custom-generate-folder",
            {"config.json": BERT, "custom_generate/generate.py": PYTHON.encode()},
            3,
            "would run code: the file custom_generate",
        ),
        folder(
            "trust",
            {"config.json": {**BERT, "trust_remote_code": True}},
            3,
            "would run code: trust_remote_code in config.json",
        ),
        folder(
            "pipelines",
            {"config.json": {**BERT, "custom_pipelines": {"x": {"impl": "a.B"}}}},
            3,
            "would run code: custom_pipelines in config.json",
        ),
        folder(
            "attention-kernel",
            {"config.json": {**BERT, "_attn_implementation": "someone/kernel"}},
            4,
            "names the kernel 'someone/kernel'",
        ),
        folder(
            "attention-kernel-nested",
            {"config.json": {**BERT, "vision": {"attn_implementation": "a/b:c"}}},
            4,
            "names the kernel 'a/b:c'",
        ),
        folder(
            "attention-kernel-dict",
            {"config.json": {**BERT, "_attn_implementation": {"": "a/b"}}},
            4,
            "_attn_implementation in config.json names the kernel",
        ),
        folder(
            "attention-internal",
            {"config.json": {**BERT, "_attn_implementation_internal": "a/b"}},
            4,
            "_internal in config.json names the kernel 'a/b'",
        ),
        folder(
            "experts-kernel",
            {"config.json": {**BERT, "experts_implementation": "a/b"}},
            4,
            "experts_implementation in config.json names the kernel",
        ),
        folder(
            "use-kernels",
            {"config.json": {**BERT, "use_kernels": True}},
            3,
            "would run code: use_kernels in config.json",
        ),
        folder(
            "quantiser",
            {"config.json": {**BERT, "quantization_config": {"quant_method": "gptq"}}},
            4,
            "needs the code of the quantiser 'gptq'",
        ),
        folder(
            "quantiser-nested",
            {"config.json": {**BERT, "a": {"quantization_config": {"quant_method": "x\n"}}}},
            4,
            r"the quantiser 'x\n'",
        ),
        folder("adapter-alone", {"adapter_config.json": LORA}, 3, "no weights, neither adapter_model.safetensors"),
        folder(
            "adapter-path",
            {**adapter, "adapter_config.json": {**LORA, "base_model_name_or_path": "../x"}},
            3,
            "the adapter was trained on '../x'",
        ),
        folder(
            "adapter-pattern",
            {**adapter, "adapter_config.json": {**LORA, "rank_pattern": {"(a+)+$": 1}}},
            3,
            "rank_pattern has '(a+)+$', a pattern",
        ),
        folder("adapter-numbers", {**adapter, "adapter_config.json": {**LORA, "r": "4"}}, 3, "r is '4'"),
        folder(
            "adapter-pickle", {"adapter_config.json": LORA, "adapter_model.bin": saved(touch())}, 4, REFERS_TO_SYSTEM
        ),
        folder(
            "adapter-base-code", {**adapter, "base/config.json": mapped}, 4, "auto_map in config.json is the only thing"
        ),
        folder(
            "adapter-base-link",
            {**adapter, "base/config.json": Path("/etc/hostname")},
            4,
            "config.json is a link that leads out",
        ),
        folder("adapter-base-adapter", {**adapter, "base/adapter_config.json": LORA}, 3, "an adapter itself"),
        folder(
            "adapter-base-quantised",
            {**adapter, "base/config.json": {**BERT, "quantization_config": {"quant_method": "gptq"}}},
            4,
            "needs the code of the quantiser 'gptq'",
        ),
        folder(
            "index-parent",
            {"config.json": BERT, index: {"weight_map": {"a": "../outside.safetensors"}}},
            4,
            "points at '../outside.safetensors', outside its own",
        ),
        folder(
            "index-absolute",
            {"config.json": BERT, index: {"weight_map": {"a": "/etc/hostname"}}},
            4,
            "points at '/etc/hostname', outside its own",
        ),
        folder(
            "index-dots",
            {"config.json": BERT, index: {"weight_map": {"a": ".."}}},
            4,
            "points at '..', outside its own",
        ),
        folder(
            "index-number", {"config.json": BERT, index: {"weight_map": {"a": 7}}}, 4, "points at 7, outside its own"
        ),
        folder(
            "index-long", {"config.json": BERT, index: {"weight_map": {"a": "b" * 5000}}}, 4, "..., outside its own"
        ),
        folder(
            "adapter-long",
            {**adapter, "adapter_config.json": {**LORA, "base_model_name_or_path": "x" * 5000}},
            3,
            "the adapter was trained on 'xxx",
        ),
        folder(
            "adapter-zero",
            {**adapter, "adapter_config.json": {**LORA, "base_model_name_or_path": "a\0b"}},
            3,
            r"the adapter was trained on 'a\x00b'",
        ),
        folder(
            "index-missing",
            {"config.json": BERT, index: {"weight_map": {"a": "b.safetensors"}}},
            3,
            "the shard b.safetensors is missing",
        ),
        folder(
            "index-no-map",
            {"config.json": BERT, index: {"weight_map": []}},
            3,
            "model.safetensors.index.json: weight_map holds a list",
        ),
        folder(
            "index-alone",
            {index: {"weight_map": {"a": "../../etc/hostname"}}},
            4,
            "points at '../../etc/hostname', outside its own",
        ),
        folder(
            "link-out",
            {"config.json": BERT, "model.safetensors": Path("/etc/hostname")},
            4,
            "model.safetensors is a link that leads out",
        ),
        folder(
            "link-up", {"config.json": BERT, "model.bin": Path("../other")}, 4, "model.bin is a link that leads out"
        ),
        folder("link-config", {"config.json": Path("/etc/hostname")}, 4, "config.json is a link that leads out"),
        folder(
            "shadows",
            {"config.json": BERT, "torch.py": PYTHON.encode(), "transformers.py": PYTHON.encode()},
            3,
            "would run code: the file torch.py, the file transformers.py",
        ),
        folder(
            "pickled-tokenizer",
            {"config.json": BERT, "tokenizer.pickle": program(SYSTEM)},
            3,
            "would run code: the file tokenizer.pickle",
        ),
        folder(
            "bin", {"config.json": {"hidden_size": 1}, "pytorch_model.bin": weights}, 3, "config.json has no model_type"
        ),
        folder("config-list", {"config.json": [1]}, 3, "config.json holds a list of 1 entries"),
        folder(
            "config-cut", {"config.json": b'{"a": '}, 3, "config.json is damaged (it is no JSON from line 1, column 7)"
        ),
        folder(
            "config-twice", {"config.json": b'{"a": 1, "a": 2}'}, 3, "config.json is damaged (a key is there twice)"
        ),
        folder("config-deep", {"config.json": b"[" * 100_000}, 3, "config.json is damaged (it is nested too deeply)"),
        folder(
            "config-encoding",
            {"config.json": b'{"a": "\xff"}'},
            3,
            "config.json is damaged (it is no UTF-8 from byte 7)",
        ),
        folder(
            "config-number",
            {"config.json": b'{"a": ' + b"9" * 10_000 + b"}"},
            3,
            "config.json is damaged (a number has too many digits)",
        ),
        folder("config-folder", {"config.json/x": b""}, 3, "config.json"),
    ]


def renamed(base: bytes, names: Callable[[str], str], more: Mapping[str, bytes] | None = None) -> bytes:
    """The archive `base` with its records under other names, written by Python's zipfile as nobody checks them."""
    with zipfile.ZipFile(io.BytesIO(base)) as good:
        records = [(names(name), good.read(name)) for name in good.namelist()]
    root = records[0][0].partition("/")[0]
    return plain_zip(records + [(f"{root}/{name}", content) for name, content in (more or {}).items()])


def upper(part: str) -> Callable[[str], str]:
    """What writes a part of a name in capitals."""
    return lambda name: name.replace(part, part.upper())


def name_items() -> list[Item]:
    """Archives whose records have names that readers may take for one another: torch's takes no notice of case."""
    code = b"def f(x: Tensor) -> Tensor:\n  return x\n"
    script, program_ = script_archive, program_archive
    makes: dict[str, tuple[Callable[[], bytes], int, str]] = {
        "code-in-capitals": (lambda: renamed(script(), upper(".py")), 4, "no record called 'code/__torch__/corpus.PY'"),
        "folder-in-capitals": (
            lambda: renamed(script(), upper("code/")), 4, "no record called 'CODE/__torch__/corpus.py'"),
        "constants-in-capitals": (
            lambda: renamed(script(), upper("constants.pkl"), {"constants.pkl": b"."}), 3, "two records of one name"),
        "code-twice": (
            lambda: renamed(script(), str, {"code/__torch__/corpus.PY": code}), 3, "two records of one name"),
        "data-in-capitals": (
            lambda: renamed(saved({"a": TENSOR}), str, {"DATA.PKL": program(SYSTEM)}), 3, "two records of one name"),
        "storage-in-capitals": (lambda: renamed(saved({"a": TENSOR}), upper("data/0")), 4, "no record called 'DATA/0'"),
        "code-beside": (lambda: renamed(script(), str, {"code/x.PY": code}), 4, "no record called 'code/x.PY'"),
        "old-layout": (lambda: renamed(script(), str, {"MODEL.json": b"{}"}), 4, "no record called 'MODEL.json'"),
        "letters-that-fold": (
            lambda: renamed(script(), str, {"code/\u017fave.py": code}), 4, "no record called 'code/\u017fave.py'"),
        "code-with-a-stream": (
            lambda: renamed(script(), str, {"code/x.py::$DATA": code}), 4, "no record called 'code/x.py::$DATA'"),
        "code-with-a-space": (lambda: renamed(script(), str, {"code/x.py ": code}), 4, "no record called 'code/x.py '"),
        "code-in-a-dot": (
            lambda: renamed(script(), str, {"code/./x.py": code}), 3, "a record outside itself (code/./x.py)"),
        "code-behind-two-slashes": (
            lambda: renamed(script(), str, {"code//x.py": code}), 4, "no record called 'code//x.py'"),
        "back-slashes": (
            lambda: renamed(script(), str, {"code\\x.py": code}), 3, "a record outside itself (code\\x.py)"),
        "endless-name": (
            lambda: renamed(script(), str, {f"code/{'x' * 600}.py": code}), 4, "no record called 'code/xxx"),
        "long-name": (lambda: renamed(script(), str, {f"code/{'x' * 300}.py": code}), 4, "no record called 'code/xxx"),
        "note": (lambda: renamed(saved({"a": TENSOR}), str, {"notes.txt": b"x"}), 4, "no record called 'notes.txt'"),
        "program-in-capitals": (
            lambda: renamed(program_(), str, {"models/model.JSON": b"{}"}), 3, "two records of one name"),
        "weights-in-capitals": (
            lambda: renamed(program_(), upper("data/weights")), 4, "no record called 'DATA/WEIGHTS/weight_0'"),
    }  # fmt: skip
    both = "torch would not read it as the archive that it is, but as a mobile model"
    return [
        file("name-of-a-mobile-model", archive_and_mobile_model, 4, both, "jit"),
        *(file(f"name-{name}", make, code, words) for name, (make, code, words) in makes.items()),
    ]


class Saver(nn.Module):
    """Writes its input to MARKER."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Save and return."""
        torch.save(x, "PT2ONNX_WAS_EXECUTED")  # MARKER, which TorchScript does not know
        return x


def archive_and_mobile_model() -> bytes:
    """A harmless TorchScript archive that torch.jit.load takes for the mobile model in one of its records.

    "PTMF" in the fifth byte makes it a flatbuffer, and its first four bytes the place of the root table.
    """
    buffer = io.BytesIO()
    torch.jit.save_jit_module_to_flatbuffer(torch.jit.script(Saver()), buffer)
    model, root = buffer.getvalue(), int.from_bytes(b"PK\3\4", "little")
    start = root - struct.unpack_from("<I", model)[0]
    with zipfile.ZipFile(io.BytesIO(script_archive())) as good:
        records = [(name, good.read(name)) for name in good.namelist()]
    name = f"{records[0][0].partition('/')[0]}/extra/model"
    filled = plain_zip(records).index(b"PK\x01\x02") + 30 + len(name)  # where the content of one more record begins
    data = plain_zip([*records, (name, bytes(start - filled) + model)])
    return data[:4] + b"PTMF" + data[8:]


# ---------------------------------------------------------------------------------------------------------------------
# folders whose settings have the wrong type or size, and are otherwise sound
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def bert_files() -> dict[str, Any]:
    """The files of a tiny BERT: config.json as a dictionary, and its weights."""
    from safetensors.torch import save
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=16, max_position_embeddings=64))
    config = {**model.config.to_dict(), "architectures": ["BertModel"], "dtype": "float32"}
    return {"config.json": config, "model.safetensors": save(model.state_dict())}


@functools.cache
def timm_files() -> dict[str, Any]:
    """The files of a tiny model as timm writes them for the hub."""
    import timm
    from safetensors.torch import save

    model = timm.create_model("test_resnet", num_classes=2)
    known = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "first_conv": "conv1", "classifier": "fc"}
    config = {"architecture": "test_resnet", "num_classes": 2, "num_features": 96, "pretrained_cfg": known}
    return {"config.json": config, "model.safetensors": save(model.state_dict())}


@functools.cache
def vit_files() -> dict[str, Any]:
    """The files of a tiny ViT."""
    from safetensors.torch import save
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16))
    config = {**model.config.to_dict(), "architectures": ["ViTForImageClassification"], "dtype": "float32"}
    return {"config.json": config, "model.safetensors": save(model.state_dict())}


def altered(
    name: str, base: Callable[[], dict[str, Any]], changes: Mapping[str, Any], words: str, *, code: int = 3
) -> Item:
    """A sound folder with other values in config.json, and with other files: keys with a dot in them."""

    def make(place: Path) -> Path:
        files = dict(base())
        settings = {key: value for key, value in changes.items() if "." not in key}
        files["config.json"] = {**files["config.json"], **settings}
        files |= {key: value for key, value in changes.items() if "." in key}
        return folder("", files, 0).make(place)

    return Item(f"folder-{name}", make, code, words)


def sentence(name: str, words: str, *modules: Any, code: int = 3, **files: Any) -> Item:
    """A folder of sentence-transformers with these modules after the first, and these settings of theirs."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}, *modules]
    changes = {f"{key}/config.json": content for key, content in files.items()}
    return altered(f"sentence-{name}", bert_files, {"modules.json": listed, **changes}, words, code=code)


def module_of(kind: Any, path: Any) -> dict[str, Any]:
    """An entry of modules.json."""
    return {"idx": 1, "name": "1", "path": path, "type": kind}


def nested(depth: int) -> dict[str, Any]:
    """Objects in each other."""
    return functools.reduce(lambda inner, _: {"a": inner}, range(depth), {})


def parts_of_parts(depth: int) -> dict[str, Any]:
    """A configuration whose text model has a text model."""
    return functools.reduce(lambda inner, _: {"model_type": "llava", "text_config": inner}, range(depth), BERT)


def nested_models(depth: int) -> dict[str, Any]:
    """The settings of a model of two models, each of which is one of two models, and so on."""
    inner = {"model_type": "bert"} if depth == 0 else nested_models(depth - 1)
    return {"model_type": "llava", "text_config": inner, "vision_config": inner}


def setting_items() -> list[Item]:
    """Wrong types and sizes, one at a time; each is told by its name."""
    pool, dense = "sentence_transformers.models.Pooling", "sentence_transformers.models.Dense"
    dense_settings = {"in_features": 8, "out_features": 4, "bias": True}
    tensor_files = {"model.safetensors": b""}
    bert = [
        ("architectures-number", {"architectures": 5}, "architectures is 5, not a list of names"),
        ("architectures-object", {"architectures": {}}, "architectures is an object of 0 entries"),
        ("architectures-numbers", {"architectures": [5]}, "architectures is a list of 1 entries"),
        ("architectures-text", {"architectures": "BertModel"}, "architectures is 'BertModel'"),
        ("type-number", {"model_type": 5}, "model_type is 5, not a string"),
        ("type-list", {"model_type": ["bert"]}, "model_type is a list of 1 entries"),
        ("type-unknown", {"model_type": "bertt"}, "knows no model_type 'bertt'"),
        ("layers-text", {"num_hidden_layers": "1"}, "Validation error for field 'num_hidden_layers'"),
        ("layers-float", {"num_hidden_layers": 1.5}, "Validation error for field 'num_hidden_layers'"),
        ("layers-list", {"num_hidden_layers": [1]}, "Validation error for field 'num_hidden_layers'"),
        (
            "layers-20000",
            {"num_hidden_layers": 20_000},
            "has more than 1184 parameters, and its weights are 23 tensors",
        ),
        ("layers-hundred-million", {"num_hidden_layers": 10**8}, "has more than 1184 parameters"),
        (
            "labels-billions",
            {"id2label": None, "num_labels": 2 * 10**9},
            "num_labels is 2000000000, not a whole number",
        ),
        ("labels-text", {"id2label": None, "num_labels": "many"}, "num_labels is 'many', not a whole number"),
        ("labels-number", {"id2label": 5}, "id2label holds 5, not an object"),
        ("labels-list", {"id2label": [1]}, "id2label holds a list of 1 entries"),
        ("labels-keys", {"id2label": {"x": "y"}}, "not accepted by transformers (invalid literal"),
        ("vocabulary-trillion", {"vocab_size": 10**12}, "of memory beside its weights"),
        ("vocabulary-null", {"vocab_size": None}, "Validation error for field 'vocab_size'"),
        ("hidden-zero", {"hidden_size": 0}, "transformers cannot load it ("),
        ("hidden-negative", {"hidden_size": -8}, "negative dimension -8"),
        ("hidden-million", {"hidden_size": 2**20, "intermediate_size": 2**20}, "of memory beside its weights"),
        ("hidden-text", {"hidden_size": "8"}, "Validation error for field 'hidden_size'"),
        ("heads-zero", {"num_attention_heads": 0}, "modulo by zero"),
        ("heads-three", {"num_attention_heads": 3}, "not a multiple of the number of attention heads (3)"),
        ("activation-unknown", {"hidden_act": "nope"}, "transformers cannot load it (KeyError: 'nope')"),
        ("activation-number", {"hidden_act": 5}, "Validation error for field 'hidden_act'"),
        ("positions-negative", {"max_position_embeddings": -1}, "negative dimension -1"),
        ("epsilon-text", {"layer_norm_eps": "x"}, "Validation error for field 'layer_norm_eps'"),
        ("padding-text", {"pad_token_id": "x"}, "Validation error for field 'pad_token_id'"),
        ("arguments-number", {"model_args": 5}, "model_args holds 5, not an object"),
        ("arguments-url", {"backbone_kwargs": {"url": "x"}}, "'url' with the value 'x', which"),
        (
            "arguments-deep",
            {"vision_config": {"model_args": {"pretrained": True}}},
            "has 'pretrained' with the value True, which",
        ),
        ("architecture-place", {"vision_config": {"architecture": "local-dir:/tmp"}}, "names no architecture of timm"),
    ]
    refused = [
        ("dtype-function", {"dtype": "load"}, "dtype is 'load'"),
        ("dtype-number", {"torch_dtype": 5}, "torch_dtype is 5"),
        ("dtype-of-a-part", {"router_dtype": "save"}, "router_dtype is 'save'"),
    ]
    timm = [
        ("size-text", {"pretrained_cfg": {"input_size": "abc"}}, "input_size is 'abc', not 3 whole numbers"),
        ("size-negative", {"pretrained_cfg": {"input_size": [3, -5, 5]}}, "input_size is a list of 3 entries"),
        (
            "size-huge",
            {"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}},
            "input_size is a list of 3 entries, not 3",
        ),
        ("mean-text", {"pretrained_cfg": {"input_size": [3, 64, 64], "mean": "x"}}, "mean is 'x'"),
        ("std-object", {"pretrained_cfg": {"input_size": [3, 64, 64], "std": {}}}, "std is an object of 0 entries"),
        ("classifier-number", {"pretrained_cfg": {"input_size": [3, 64, 64], "classifier": 5}}, "classifier is 5"),
        ("classes-text", {"num_classes": "2"}, "num_classes is '2', not a whole number"),
        ("classes-huge", {"num_classes": 2**60}, "num_classes is 1152921504606846976"),
        ("labels-objects", {"label_names": [{}, {}]}, "label_names is a list of 2 entries"),
        ("arguments-list", {"model_args": [1]}, "model_args holds a list of 1 entries"),
        (
            "arguments-place",
            {"model_args": {"checkpoint_path": "/etc/hostname"}},
            "has 'checkpoint_path' with the value '/etc/hostname', which",
        ),
        (
            "arguments-function",
            {"model_args": {"pretrained_cfg_overlay": {"url": "x"}}},
            "has 'pretrained_cfg_overlay' with the value an object",
        ),
        ("arguments-width", {"model_args": {"channels": [2**24] * 4}}, "of memory beside its weights"),
        ("architecture-folder", {"architecture": "local-dir:/etc"}, "names no architecture of timm"),
        ("architecture-number", {"architecture": 5}, "architecture is 5"),
    ]
    images = [
        ("size-text", {"size": "abc"}, "preprocessor_config.json: size is 'abc', not whole numbers"),
        ("size-negative", {"size": -5}, "size is -5"),
        ("size-edges", {"size": {"height": "x"}}, "preprocessor_config.json: size: height is 'x'"),
        ("size-huge", {"size": {"height": 10**9, "width": 10**9}}, "height is 1000000000, not a whole number from 1"),
        ("crop-text", {"do_center_crop": "yes"}, "do_center_crop is 'yes', not true or false"),
        ("crop-size", {"do_center_crop": True, "crop_size": [[]]}, "crop_size is a list of 1 entries"),
        ("list", [1], "preprocessor_config.json holds a list of 1 entries"),
    ]
    many = b"[" + b"0," * 8_000_000 + b"0]"
    return [
        *(altered(f"bert-{name}", bert_files, changes, words) for name, changes, words in bert),
        *(altered(f"bert-{name}", bert_files, changes, words, code=4) for name, changes, words in refused),
        *(altered(f"timm-{name}", timm_files, changes, words) for name, changes, words in timm),
        *(altered(f"image-{name}", vit_files, {"preprocessor_config.json": c}, words) for name, c, words in images),
        altered(
            "bert-many-parts", bert_files, {"architectures": None, **nested_models(6)}, "more than 40 models in each"
        ),
        altered("image-channels", vit_files, {"num_channels": 10**6}, "of memory beside its weights"),
        altered("image-edge", vit_files, {"image_size": [10**5, 10**5]}, "of memory beside its weights"),
        altered("modules-number", bert_files, {"modules.json": 5}, "modules is 5, not a list"),
        altered("modules-object", bert_files, {"modules.json": {}}, "modules is an object of 0 entries"),
        altered("modules-numbers", bert_files, {"modules.json": [5]}, "modules[0] holds 5, not an object"),
        sentence("number", "modules[1] holds 5", 5),
        sentence("type", "type is 5, not a string", module_of(5, "1")),
        sentence("unknown", "type is 'os.system'", module_of("os.system", "1")),
        sentence("outside", "path is '../x'", module_of(pool, "../x")),
        sentence("above", "path is '..'", module_of(pool, "..")),
        sentence("long", "path is 'xxx", module_of(pool, "x" * 5000)),
        sentence("zero", "path is 'a\\x00b'", module_of(pool, "a\0b")),
        sentence("half-a-character", "1\\ud800/config.json is missing", module_of(pool, "1\ud800")),
        sentence("path-number", "path is 5, not a string", module_of(pool, 5)),
        sentence("missing", "1/config.json is missing", module_of(pool, "1")),
        sentence("pooling-list", "1/config.json holds a list", module_of(pool, "1"), **{"1": []}),
        sentence("pooling-none", "names no pooling mode", module_of(pool, "1"), **{"1": {}}),
        sentence("pooling-mode", "the pooling mode 'best'", module_of(pool, "1"), **{"1": {"pooling_mode": "best"}}),
        sentence("pooling-number", "pooling_mode is 5", module_of(pool, "1"), **{"1": {"pooling_mode": 5}}),
        sentence("pooling-flag", "is 'yes'", module_of(pool, "1"), **{"1": {"pooling_mode_mean_tokens": "yes"}}),
        sentence(
            "pooling-new", "pooling_mode_best_tokens", module_of(pool, "1"), **{"1": {"pooling_mode_best_tokens": True}}
        ),
        sentence(
            "activation",
            "activation_function is 'torch.nn.modules.activation.MultiheadAttention'",
            module_of(dense, "1"),
            **{"1": {**dense_settings, "activation_function": "torch.nn.modules.activation.MultiheadAttention"}},
        ),
        sentence(
            "activation-number", "activation_function is 5", module_of(dense, "1"), **{"1": {"activation_function": 5}}
        ),
        sentence("dense-weights", "has no linear.weight", module_of(dense, "1"), **{"1": dense_settings}),
        folder("adapter-rank", {"adapter_config.json": {**LORA, "r": 0}, **tensor_files}, 3, "r is 0"),
        folder("adapter-scale", {"adapter_config.json": {**LORA, "lora_alpha": "x"}}, 3, "lora_alpha is 'x'"),
        folder(
            "adapter-patterns", {"adapter_config.json": {**LORA, "rank_pattern": [1]}}, 3, "rank_pattern holds a list"
        ),
        folder("adapter-task", {"adapter_config.json": {**LORA, "task_type": {}}}, 3, "task_type is an object"),
        folder("adapter-type", {"adapter_config.json": {**LORA, "peft_type": {}}}, 3, "peft_type is an object"),
        folder("json-utf16", {"config.json": json.dumps(BERT).encode("utf-16")}, 3, "config.json is damaged"),
        folder("json-mark", {"config.json": b"\xef\xbb\xbf" + json.dumps(BERT).encode()}, 3, "config.json is damaged"),
        altered("bert-deep", bert_files, {"use_kernels": True, "a": nested(800)}, "nested more than 20 levels deep"),
        altered(
            "bert-quantiser-deep",
            bert_files,
            {"quantization_config": {"quant_method": nested(15)}},
            "an object",
            code=4,
        ),
        altered(
            "bert-parts-of-parts",
            bert_files,
            {"model_type": "llava", "text_config": parts_of_parts(15)},
            "does not fit",
            code=2,
        ),
        sentence(
            "many",
            "modules is a list of 5001 entries",
            *[module_of("sentence_transformers.models.Normalize", "")] * 5000,
        ),
        sentence("pooling-twice", "different names", module_of(pool, "1"), **{"1": {"pooling_mode": ["mean", "mean"]}}),
        folder(
            "adapter-many-patterns",
            {"adapter_config.json": {**LORA, "rank_pattern": {f"layer{place}": 4 for place in range(5000)}}},
            3,
            "rank_pattern is an object of 5000 entries",
        ),
        folder("json-nan", {"config.json": b'{"model_type": "bert", "a": NaN}'}, 3, "NaN is no number"),
        folder(
            "json-values", {"config.json": many[: 12 << 20] + b"0]"}, 3, "values, more than those of any known model"
        ),
        folder(
            "json-large",
            {"config.json": many, "modules.json": many, "generation_config.json": many},
            3,
            "config.json would have 8000001 values",
        ),
        folder(
            "json-60-mb",
            dict.fromkeys(("config.json", "modules.json", "a_config.json"), b'{"a": "' + b"x" * (60 << 20) + b'"}'),
            3,
            "config.json has more than 16 MB",
        ),
        altered("json-beside", bert_files, {"architectures": 5, "vocab.json": many}, "architectures is 5"),
    ]


HOSTILE = (
    called_items()
    + structure_items()
    + script_items()
    + program_items()
    + folder_items()
    + setting_items()
    + name_items()
)


# ---------------------------------------------------------------------------------------------------------------------
# malformed
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def good_files() -> dict[str, bytes]:
    """A good file of each kind; the tensors are large enough to be cut."""
    from safetensors.torch import save

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    return {
        "zip": saved(model), "legacy": saved(model, legacy=True), "safetensors": save(model.state_dict()),
        "script": script_archive(), "program": program_archive(),
        "plain": pickle.dumps({"é": model.state_dict()["0.weight"].numpy()}, protocol=4),
    }  # fmt: skip


def cut(kind: str, percent: int) -> bytes:
    """The beginning of a good file."""
    data = good_files()[kind]
    return data[: len(data) * percent // 100]


def flipped(kind: str, percent: int) -> bytes:
    """A good file with one bit wrong."""
    data = bytearray(good_files()[kind])
    data[len(data) * percent // 100] ^= 4
    return bytes(data)


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; a bytes header is taken as it is."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def tensor(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    """An entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def storage(kind: str = "FloatStorage", key: bytes | None = None, count: int = 4) -> bytes:
    """The opcodes of a persistent id of a storage."""
    return b"(" + text("storage") + glob("torch", kind) + (key or text("0")) + text("cpu") + value(count) + b"tQ"


def tensor_of(
    size: bytes, stride: bytes, offset: int = 0, place: bytes | None = None, data: bytes = bytes(16)
) -> bytes:
    """An archive with one tensor, over a storage of four floats."""
    body = (
        b"("
        + (place or storage())
        + value(offset)
        + size
        + stride
        + b"\x89"
        + glob("collections", "OrderedDict")
        + b")RtR"
    )
    return archive(program(b"}", text("a"), glob("torch._utils", "_rebuild_tensor_v2"), body, b"s"), {"data/0": data})


def sized(size: Any, stride: Any, offset: int = 0) -> Callable[[], bytes]:
    """An archive with a tensor of this size and stride."""
    return lambda: tensor_of(value(size), value(stride), offset)


def shared(times: int, make: bytes, use: bytes) -> bytes:
    """An archive that makes one large object and uses it `times`: `use` finds it in the memo's place 255."""
    return archive(program(make, b"q\xff0(", use * times, b"t"))


def long_list(count: int) -> bytes:
    """The opcodes of a list of numbers."""
    return b"](" + b"K\x01" * count + b"e"


def doubling(levels: int) -> bytes:
    """A tuple of two of a tuple of two of ...: small here, 2**levels when it is written out."""
    return b")q\x00" + b"".join(
        b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels)
    )


def colliding_keys(count: int) -> bytes:
    """A dictionary whose keys have one hash value: building it takes the square of their number."""
    keys = b"".join(b"\x8a\x0a" + (index * (2**61 - 1)).to_bytes(10, "little") + b"N" for index in range(1, count))
    return archive(program(b"}(", keys, b"u"))


def modules(depth: int, *, wide: bool) -> bytes:
    """Modules in modules; `wide` ones contain the same child twice, so that there are 2**depth paths."""
    layer: nn.Module = nn.ReLU()
    for _ in range(depth):
        layer = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer)) if wide else nn.Sequential(layer)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # for pickling
    try:
        return saved(layer)
    finally:
        sys.setrecursionlimit(limit)


def cyclic(*, wrapped: bool) -> bytes:
    """A module that contains itself, in a checkpoint's entry or alone."""
    layer = nn.Sequential(nn.Linear(2, 2))
    layer._modules["self"] = layer
    return saved({"epoch": 1, "model": layer} if wrapped else layer)


def bomb(name: str, size: int) -> bytes:
    """An archive with one record that is packed a thousandfold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as output:
        output.writestr("a/version", "3")
        output.writestr("a/data.pkl", program(b"}") if name != "data.pkl" else b"]" * size)
        if name != "data.pkl":
            output.writestr(f"a/{name}", bytes(size))
        if name.startswith("code/"):
            output.writestr("a/constants.pkl", program(b")"))
    return buffer.getvalue()


def packed(base: bytes) -> bytes:
    """The archive `base` with its records compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(base)) as good, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as output:
        for name in good.namelist():
            output.writestr(name, good.read(name))
    return buffer.getvalue()


def overlapping_entries() -> bytes:
    """A checkpoint whose directory has a thousand records more, which all lie at the same place."""
    base = plain_zip([("a/data.pkl", program(b"}")), ("a/version", b"3")])
    start = base.index(b"PK\x01\x02")
    entries = base[start : base.index(b"PK\x05\x06")]
    content = bytes(1 << 20)
    head = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, len(content), len(content), 8, 0) + b"a/data/0"
    for index in range(1000):
        name = f"a/data/{index}".encode()
        fields = struct.pack(
            "<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, len(content), len(content), len(name), 0, 0, 0, 0, 0, start
        )
        entries += b"PK\x01\x02" + fields + name
    data = base[:start] + head + content
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1002, 1002, len(entries), len(data), 0)
    return data + entries + end


def negative_offset() -> bytes:
    """An archive whose directory says that it lies later than it does, so that records begin before the file."""
    data = bytearray(plain_zip([("a/data.pkl", program(b"}")), ("a/version", b"3")]))
    struct.pack_into("<I", data, len(data) - 6, 20 + struct.unpack_from("<I", data, len(data) - 6)[0])
    return bytes(data)


def entry_named(name: str) -> bytes:
    """A checkpoint with one more record of this name."""
    return plain_zip([("a/data.pkl", program(b"}")), ("a/version", b"3"), (name, b"x")])


def tar_file() -> bytes:
    """The layout before PyTorch 0.1.10, as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as output:
        output.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return buffer.getvalue()


def legacy_with(body: bytes, tail: bytes) -> bytes:
    """A legacy file with another object, list of keys and data."""
    head = legacy_stream(b"")
    return head[: -len(pickle.dumps([], protocol=2))] + body + tail


def legacy_tensor(count: int, keys: Any, stored: int, data: bytes) -> bytes:
    """A legacy file with one storage of `count` floats, of which `data` are there."""
    body = program(b"(", storage(count=count)[1:-2], b"NtQ")
    return legacy_with(body, pickle.dumps(keys, protocol=2) + struct.pack("<q", stored) + data)


def array_of(shape: tuple[Any, ...], dtype: bytes, raw: bytes) -> bytes:
    """The opcodes of a numpy array of this state; `raw` pushes its data."""
    make = (
        glob("numpy.core.multiarray", "_reconstruct") + glob("numpy", "ndarray") + value((0,)) + value(b"b") + b"\x87R"
    )
    return make + b"(K\x01" + value(shape) + dtype + b"\x89" + raw + b"tb"


def numpy_array(shape: tuple[Any, ...], dtype: bytes, raw: bytes) -> bytes:
    """An archive with a numpy array of this state."""
    return archive(program(b"}", text("a"), array_of(shape, dtype, value(raw)), b"s"))


def numpy_dtype(code: str) -> bytes:
    """The opcodes of a numpy dtype."""
    return (
        glob("numpy", "dtype") + value((code, False, True)) + b"R" + value((3, "<", None, None, None, -1, -1, 0)) + b"b"
    )


# What every module's pickle has.
MODULE: dict[str, Any] = {
    "_parameters": {},
    "_buffers": {},
    "_modules": {},
    "_backward_hooks": {},
    "_forward_hooks": {},
}


def pickle_items() -> list[Item]:
    """Broken programs, and programs that would take for ever or fill the memory."""
    exa = struct.pack("<Q", 1 << 60)
    relu = glob("torch.nn.modules.activation", "ReLU") + b")\x81"
    million = long_list(100_000)
    pops = "its pickle is damaged before byte "
    far = "its pickle builds far more than the file holds"
    record = "a storage has a damaged record"
    stride = "a tensor has a damaged size or stride"
    larger = "a numpy array is larger than its data"
    tuple_key = "uses a tuple as a dictionary key"
    makes: dict[str, tuple[Callable[[], bytes], int, str]] = {
        "no-stop": (lambda: archive(b"\x80\x02}"), 3, TOO_EARLY),
        "empty": (lambda: archive(b""), 3, TOO_EARLY),
        "only-stop": (lambda: archive(b"."), 3, pops),
        "protocol-99": (lambda: archive(b"\x80\x63N."), 3, "its pickle is damaged before byte 2"),
        "unknown-opcode": (lambda: archive(b"\x80\x02\xff."), 3, "its pickle is damaged before byte 3"),
        "stack-underflow": (lambda: archive(program(b"0" * 10)), 3, pops),
        "no-mark": (lambda: archive(program(b"}u")), 3, pops),
        "no-memo": (lambda: archive(program(b"j\xff\xff\xff\x7f")), 3, "its pickle is damaged before byte 7"),
        "negative-memo": (lambda: archive(program(b"N", b"p-5\n")), 3, "its pickle is damaged before byte 7"),
        "bytes-of-an-exabyte": (lambda: archive(program(b"\x8e" + exa, protocol=4)), 3, TOO_EARLY),
        "text-of-an-exabyte": (lambda: archive(program(b"\x8d" + exa, protocol=4)), 3, TOO_EARLY),
        "frame-of-an-exabyte": (lambda: archive(program(b"\x95" + exa, protocol=4)), 3, TOO_EARLY),
        "long-of-2-gigabytes": (
            lambda: archive(program(b"\x8b\xff\xff\xff\x7f")), 3, "an integer that is longer than that of any known"),
        "negative-length": (lambda: archive(program(b"T\xff\xff\xff\xff")), 3, "its pickle is damaged before byte 7"),
        "legacy-bytes-of-an-exabyte": (lambda: legacy_stream(program(b"\x8e" + exa, protocol=4)), 3, TOO_EARLY),
        "legacy-text-of-4-gigabytes": (lambda: legacy_stream(program(b"X\xff\xff\xff\xff")), 3, TOO_EARLY),
        "decimal-of-a-million-digits": (
            lambda: archive(program(b"L" + b"9" * 1_000_000 + b"L\n")), 3, "its pickle is damaged before byte 1000005"),
        "no-utf-8": (lambda: archive(program(b"X\x02\0\0\0\xff\xfe")), 3, "its pickle is damaged before byte 9"),
        "nested-a-million": (
            lambda: archive(program(b"(" * 1_000_000 + b"]" + b"t" * 1_000_000)),
            3, "it holds tuple, neither a model"),
        "nested-lists": (
            lambda: archive(program(b"]" * 300_000 + b"a" * 299_999)), 3, "it holds list, neither a model"),
        "thirty-million-opcodes": (
            lambda: archive(program(b"N0" * 15_000_000)), 3, "longer than that of any known model"),
        "a-million-lists": (lambda: archive(program(b"]" * 12_000_000)), 3, "longer than that of any known model"),
        "colliding-keys": (lambda: colliding_keys(60_000), 3, "unusual dictionary keys"),
        "deep-key": (lambda: archive(program(b"}", doubling(40), b"Ns")), 4, tuple_key),
        "wide-key": (lambda: archive(program(b"}(", b"K\x01" * 100_000, b"tNs")), 4, tuple_key),
        "storage-key-of-tuples": (lambda: archive(program(storage(key=doubling(40)))), 3, record),
        "codec-of-tuples": (
            lambda: archive(program(glob("_codecs", "encode"), text("a"), doubling(40), b"\x86R")),
            4, "a codec that pickles of bytes do not use"),
        "attribute-of-tuples": (
            lambda: archive(program(glob("builtins", "getattr"), relu, doubling(40), b"\x86R")),
            3, "asks for an attribute without a name"),
        "path-of-modules": (
            lambda: archive(program(glob("pathlib", "PosixPath"), relu, b"\x85R")),
            3, "a path in the file is not text"),
        "set-of-a-range": (
            lambda: archive(program(glob("builtins", "set"), call("builtins", "range", 1 << 50), b"\x85R")), 3, far),
        "size-of-a-range": (
            lambda: archive(program(glob("torch", "Size"), call("builtins", "range", 1 << 50), b"\x85R")), 3, far),
        "tensor-of-a-range": (lambda: tensor_of(call("builtins", "range", 1 << 50), value((1,))), 3, far),
        "one-text-encoded-often": (
            lambda: shared(
                60_000, text("a" * 1_000_000), glob("_codecs", "encode") + b"h\xff" + text("latin1") + b"\x86R"
            ),
            3, far),
        "one-list-copied-often": (lambda: shared(20_000, million, glob("builtins", "set") + b"h\xff\x85R"), 3, far),
        "one-size-copied-often": (lambda: shared(20_000, million, glob("torch", "Size") + b"h\xff\x85R"), 3, far),
        "one-file-opened-often": (
            lambda: shared(
                20_000,
                value(saved(torch.zeros(20_000).untyped_storage(), legacy=True)),
                glob("torch.storage", "_load_from_bytes") + b"h\xff\x85R",
            ),
            3, far),
        "one-array-copied-often": (
            lambda: shared(20_000, value(bytes(1_000_000)), array_of((250_000,), numpy_dtype("f4"), b"h\xff")), 3, far),
        "array-larger-than-its-data": (lambda: numpy_array((1 << 40,), numpy_dtype("f4"), bytes(16)), 3, larger),
        "array-of-negative-size": (lambda: numpy_array((-4,), numpy_dtype("f4"), bytes(16)), 3, larger),
        "array-of-odd-shape": (lambda: numpy_array(("a",), numpy_dtype("f4"), bytes(16)), 3, larger),
        "array-of-many-axes": (
            lambda: numpy_array((1,) * 100, numpy_dtype("f4"), bytes(4)), 3, "its pickle is damaged before byte 428"),
        "array-of-objects": (
            lambda: numpy_array((1,), numpy_dtype("O8"), bytes(8)), 4, "a numpy array of Python objects"),
        "array-of-records": (
            lambda: numpy_array((1,), numpy_dtype("V8"), bytes(8)), 4, "the file holds a numpy array of"),
        "not-a-model": (lambda: archive(program(value([1, 2]))), 3, "it holds list, neither a model"),
        "a-number": (lambda: archive(program(b"K\x01")), 3, "int, neither a model nor a state dict"),
        "no-weights": (
            lambda: archive(program(value({"a": 1}))), 3, "no weights found in the checkpoint; it has the keys a"),
        "keys-with-escapes": (
            lambda: archive(program(value({"\x1b[31m\n\u202e": 1}))),
            3, r"it has the keys \x1b[31m\n\u202e"),
        "keys-with-half-surrogates": (
            lambda: archive(program(value({"weight\ud800": 1}))), 3, "a name in it is no text"),
        "unknown-storage-type": (lambda: archive(program(storage("StrangeStorage"))), 3, "StrangeStorage"),
        "storage-of-a-string": (
            lambda: archive(program(b"(", text("storage"), text("0"), b"tQ")),
            3, "refers to something that is not a storage"),
        "storage-key-path": (
            lambda: archive(program(storage(key=text("../../etc/passwd")))),
            3, "tensor data data/../../etc/passwd is missing"),
        "storage-of-terabytes": (
            lambda: archive(program(storage(count=1 << 46)), {"data/0": bytes(16)}),
            3, "tensor data data/0 has 16 bytes, not 281474976710656"),
        "storage-of-2**63": (lambda: archive(program(storage(count=1 << 63))), 3, record),
        "storage-of-minus-one": (lambda: archive(program(storage(count=-1))), 3, record),
        "storage-missing": (lambda: archive(program(storage(count=4))), 3, "tensor data data/0 is missing"),
        "storage-of-another-dtype": (
            lambda: tensor_of(value((4,)), value((1,)), place=storage("DoubleStorage")),
            3, "tensor data data/0 has 16 bytes, not 32"),
        "storage-shorter": (
            lambda: tensor_of(value((4,)), value((1,)), data=bytes(8)), 3, "tensor data data/0 has 8 bytes, not 16"),
        "storage-longer": (
            lambda: tensor_of(value((4,)), value((1,)), data=bytes(64)), 3, "tensor data data/0 has 64 bytes, not 16"),
        "storage-empty": (
            lambda: tensor_of(value((4,)), value((1,)), data=b""), 3, "tensor data data/0 has 0 bytes, not 16"),
        "tensor-beyond": (sized((1000,), (1,)), 3, "a tensor of size (1000,) does not fit"),
        "tensor-offset-beyond": (sized((1,), (1,), 1 << 40), 3, "a tensor of size (1,) does not fit"),
        "tensor-negative-offset": (sized((1,), (1,), -1), 3, stride),
        "tensor-negative-stride": (sized((2,), (-1,)), 3, stride),
        "tensor-negative-size": (sized((-2,), (1,)), 3, stride),
        "tensor-huge-stride": (sized((2,), (1 << 60,)), 3, stride),
        "tensor-overlapping-itself": (sized((1 << 40,), (0,)), 3, "a tensor of size (1099511627776,) does not fit"),
        "tensor-overlapping-rows": (
            sized((1 << 20, 1 << 20), (0, 0)), 3, "a tensor of size (1048576, 1048576) does not fit"),
        "tensor-overflowing": (
            sized((1 << 40, 1 << 40), (1 << 40, 1)), 3, "of size (1099511627776, 1099511627776) does not fit"),
        "tensor-of-other-rank": (sized((2, 2), (1,)), 3, stride),
        "tensor-of-100-axes": (sized((1,) * 100, (1,) * 100), 3, stride),
        "tensor-of-text": (sized("ab", "cd"), 3, "a tensor has no size or stride"),
        "tensor-of-floats": (sized((2.5,), (1,)), 3, stride),
        "tensor-without-storage": (
            lambda: tensor_of(value((1,)), value((1,)), place=b"N"), 3, "a tensor has no storage"),
        "state-of-a-module": (
            lambda: archive(program(relu, value([1]), b"b")), 3, "the state of a torch.nn.modules.activation.ReLU"),
        "parts-of-a-module": (
            lambda: archive(program(relu, value({**MODULE, "_modules": [1]}), b"b")),
            3, "_modules of a torch.nn.modules.activation.ReLU holds"),
        "tensors-for-modules": (
            lambda: archive(program(relu, value({**MODULE, "_modules": {"a": 1}}), b"b")),
            3, "_modules of a torch.nn.modules.activation.ReLU holds"),
        "module-without-state": (lambda: archive(program(relu)), 3, "a torch.nn.modules.activation.ReLU has no state"),
        "modules-in-a-cycle": (lambda: cyclic(wrapped=False), 3, "its modules contain each other"),
        "modules-in-a-cycle-in-an-entry": (lambda: cyclic(wrapped=True), 3, "its modules contain each other"),
        "modules-2-to-the-40": (lambda: modules(40, wide=True), 3, "walking them would never end"),
        "modules-450-deep": (
            lambda: modules(450, wide=False), 3, "its modules contain each other, or are nested too deeply"),
    }  # fmt: skip
    return [file(f"pickle-{name}", make, code, words) for name, (make, code, words) in makes.items()]


def keyed(count: int, make: Callable[[int], bytes]) -> bytes:
    """A dictionary whose keys `make` pushes."""
    return archive(program(b"}(", b"".join(make(index) + b"N" for index in range(1, count)), b"u"))


def big_key(index: int) -> bytes:
    """An integer below 2**61 whose lower 40 bits are zero: in every small table its place is the same."""
    return b"\x8a\x08" + (index << 40).to_bytes(8, "little")


def dag_of_dicts(width: int) -> bytes:
    """A dictionary that names one dictionary `width` times, which names another one as often, and so on."""
    inner = b"}(" + b"".join(text(f"c{i}") + b"K\x01" for i in range(width)) + b"uq\x00"
    for level in range(3):
        names = b"".join(text(f"{level}{i}") + b"h" + bytes([level]) for i in range(width))
        inner += b"0}(" + names + b"uq" + bytes([level + 1])
    return archive(program(inner))


def legacy_storages(count: int) -> bytes:
    """A legacy file with many empty storages."""
    one = b"(" + text("storage") + b"h\x00"
    ids = b"".join(one + text(str(i)) + text("cpu") + b"K\x00tQ0" for i in range(count))
    body = b"\x80\x02" + glob("torch", "FloatStorage") + b"q\x000" + ids + b"}."
    return legacy_with(body, pickle.dumps([str(i) for i in range(count)], 2) + bytes(8 * count))


def script_tree(depth: int) -> bytes:
    """TorchScript whose functions each call the one before twice: 2**depth calls, and as many copies when inlined."""
    lines = ["def f0(x: Tensor) -> Tensor:\n  return torch.relu(x)\n"]
    for level in range(1, depth):
        inner = f"__torch__.corpus_tree.f{level - 1}"
        lines.append(f"def f{level}(x: Tensor) -> Tensor:\n  y = {inner}(x, )\n  return {inner}(y, )\n")
    call = f"x = __torch__.corpus_tree.f{depth - 1}(x, )"
    return changed(script_with(call), {"code/__torch__/corpus_tree.py": "".join(lines).encode()})


def overlapping_tensors(count: int) -> bytes:
    """Many tensors of a million elements each over one storage of four."""
    place = storage() + b"q\xf00"
    make = glob("torch._utils", "_rebuild_tensor_v2") + b"q\xf10" + glob("collections", "OrderedDict") + b"q\xf20"
    one = b"h\xf1(h\xf0" + value(0) + value((1_000_000,)) + value((0,)) + b"\x89h\xf2)RtR"
    tensors = b"".join(text(f"a.{i}") + one for i in range(count))
    return archive(program(place, make, b"}(", tensors, b"u"), {"data/0": bytes(16)})


def bound_items() -> list[Item]:
    """Small files that would take minutes or gigabytes."""
    names = {"module." * 1_000_000 + "weight": TENSOR}
    deep = {f"{'a.' * 400}{i}": TENSOR for i in range(20_000)}
    makes: dict[str, tuple[Callable[[], bytes], int, str]] = {
        "keys-below-2**61": (lambda: keyed(60_000, big_key), 3, "unusual dictionary keys"),
        "keys-of-floats": (
            lambda: keyed(60_000, lambda i: b"G" + struct.pack(">d", float(i << 40))), 3, "unusual dictionary keys"),
        "keys-of-tuples": (lambda: keyed(60_000, lambda i: big_key(i) + b"\x85"), 3, "unusual dictionary keys"),
        "set-of-numbers": (
            lambda: archive(program(glob("builtins", "set"), b"](", *map(big_key, range(60_000)), b"e\x85R")),
            3, "unusual dictionary keys"),
        "frozenset-of-numbers": (
            lambda: archive(program(b"(", *map(big_key, range(60_000)), b"\x91", protocol=4)),
            3, "unusual dictionary keys"),
        "storages-150000": (lambda: legacy_storages(150_000), 3, "no weights found"),
        "prefix-a-million-times": (lambda: saved(names), 3, "has 7000006 characters"),
        "name-of-4-megabytes": (
            lambda: saved({"k" * 4_000_000: {"a": TENSOR}, "other": {"b": TENSOR}}), 3, "has 4000000 characters"),
        "names-that-share-prefixes": (lambda: saved(deep), 2, "pass --model-class"),
        "dictionaries-shared": (lambda: dag_of_dicts(2_000), 3, "no weights found"),
        "calls-2-to-the-30": (lambda: script_tree(30), 3, "would never end"),
        "modules-shared-30-deep": (lambda: shared_children(30), 3, "walking them would never end"),
        "modules-shared-15-deep": (lambda: shared_children(15), 3, "walking them would never end"),
        "modules-shared-in-lists": (lambda: listed_children(30), 3, "walking them would never end"),
        "rnn-of-a-million-layers": (lambda: saved(layers_of_rnn(1_000_000)), 3, "too many layers"),
        "rnn-of-a-list-of-layers": (lambda: saved(layers_of_rnn([2])), 3, "too many layers"),
        "storages-in-each-other": (lambda: archive(storages_in_each_other(40)), 3, "far more than the file holds"),
        "back-end-of-tuples": (
            lambda: module_with(attn_implementation=tuple_of_tuples(60)), 4, "the back end a list of 2 entries"),
        "tensors-that-overlap": (lambda: overlapping_tensors(3_000), 3, "more elements than the file holds"),
        "tuple-appended-often": (
            lambda: archive(program(b"(" + b"K\x01" * 200_000 + b"tq\x000](", b"h\x00" * 200_000, b"e")),
            3, "far more than the file holds"),
    }  # fmt: skip
    return [file(f"bound-{name}", make, code, words) for name, (make, code, words) in makes.items()]


def shared_children(depth: int) -> bytes:
    """Sequentials that each hold the one before twice: children() tells one, forward() calls both."""
    module: nn.Module = nn.ReLU()
    for _ in range(depth):
        outer = nn.Sequential()
        outer._modules["0"] = outer._modules["1"] = module
        module = outer
    return saved(module)


def listed_children(depth: int) -> bytes:
    """Modules that each hold the one before twice, in a list that is an attribute and not among their modules."""
    module: nn.Module = nn.ReLU()
    for _ in range(depth):
        outer = nn.Identity()
        outer.__dict__["layers"] = [module, module]
        module = outer
    return saved(module)


def layers_of_rnn(count: Any) -> nn.Module:
    """An LSTM that says it has more layers than it has parameters."""
    module = nn.LSTM(2, 2)
    module.__dict__["num_layers"] = count
    return module


def tuple_of_tuples(depth: int) -> tuple[Any, ...]:
    """A tuple that holds another one twice, and so on: to hash it, or to write it down, would never end."""
    inner: tuple[Any, ...] = ()
    for _ in range(depth):
        inner = (inner, inner)
    return inner


def storages_in_each_other(depth: int) -> bytes:
    """A pickle that opens the one inside it twice, and so on: 2**depth times for the innermost."""
    data = program(storage(count=0))
    for _ in range(depth):
        opened = glob("torch.storage", "_load_from_bytes") + b"h\x00\x85R"
        data = program(b"B" + struct.pack("<I", len(data)) + data + b"q\x000", opened, b"0", opened)
    return data


def archive_items() -> list[Item]:
    """Broken archives."""
    big = good_files()["zip"]
    expands = "the archive expands to far more than its own size"
    no_zip = "is a damaged or truncated archive (File is not a zip file)"
    makes: dict[str, tuple[Callable[[], bytes], int, str]] = {
        "bomb": (lambda: bomb("data/0", 100 << 20), 3, expands),
        "bomb-of-a-pickle": (lambda: bomb("data.pkl", 70 << 20), 3, expands),
        "bomb-of-code": (lambda: bomb("code/a.py", 100 << 20), 3, expands),
        "bomb-of-statements": (
            lambda: packed(script_with("1;" * 15_000_000 + "1")), 3, "corpus.py is not TorchScript code"),
        "bomb-of-json": (
            lambda: packed(changed_program({"models/model.json": b'{"a":[' + b"{}," * 20_000_000 + b"{}]}"})),
            3, "opening it takes more than 1.07 GB of memory"),
        "overlapping-entries": (overlapping_entries, 3, expands),
        "absolute-path": (lambda: entry_named("/etc/passwd"), 3, "is not in a subdirectory a/: /etc/passwd"),
        "parent-path": (lambda: entry_named("a/../../x"), 3, "a record outside itself (../../x)"),
        "parent-path-inside": (
            lambda: entry_named("a/data/../../../x"), 3, "a record outside itself (data/../../../x)"),
        "backslashes": (lambda: entry_named("a/..\\x"), 3, "a record outside itself (..\\x)"),
        "name-with-escapes": (lambda: entry_named("a/\x1b[31m\n"), 4, r"no record called '\x1b[31m\n'"),
        "big-endian": (lambda: archive(program(b"}"), {"byteorder": b"big"}), 3, "saved on a big-endian machine"),
        "odd-byte-order": (lambda: archive(program(b"}"), {"byteorder": b"\x1b[31m"}), 3, "on a big-endian machine"),
        "no-data": (lambda: plain_zip([("a/version", b"3")]), 3, "has an old .pt2 layout"),
        "no-entries": (
            lambda: b"PK\x03\x04" + bytes(30) + b"PK\x05\x06" + bytes(18),
            3, "is a zip archive, but none that PyTorch writes"),
        "only-the-end": (lambda: b"PK\x05\x06" + bytes(18), 3, "pass a .pt, TorchScript, .pt2 or safetensors file"),
        "directory-entry": (
            lambda: plain_zip([("a/data.pkl/", b""), ("a/version", b"3")]), 3, "has an old .pt2 layout"),
        "many-entries": (
            lambda: plain_zip([(f"a/{i}", b"") for i in range(5_000)]),
            3, "is a zip archive, but none that PyTorch writes"),
        "wrong-crc-of-data": (lambda: flip_data(big), 3, "Bad CRC-32 for file 'archive/data/0'"),
        "garbage-behind": (lambda: big + b"\0" * 70_000, 3, no_zip),
        "middle-missing": (lambda: big[: len(big) // 3] + big[len(big) // 2 :], 3, "not a ZIP archive"),
        "zeroed-middle": (
            lambda: big[:2000] + bytes(len(big) - 4000) + big[-2000:], 3, "failed reading file data/0: invalid header"),
        "zeroed-end": (lambda: big[:-3000] + bytes(3000), 3, no_zip),
        "version-of-30-digits": (
            lambda: changed(script_archive(), {"version": b"9" * 30}), 3, "its version is no number"),
        "version-of-text": (lambda: changed(script_archive(), {"version": b"three"}), 3, "parse the version three"),
        "record-before-the-file": (negative_offset, 3, "invalid header or archive is corrupted"),
        "script-without-code": (
            lambda: changed(script_archive(), {"code/*": None}), 3, "Unknown type name '__torch__.corpus.Adder'"),
        "script-without-data": (
            lambda: changed(script_archive(), {"data.pkl": None}), 3, "failed locating file data.pkl"),
        "script-of-nothing": (
            lambda: archive(program(b"}"), {"constants.pkl": program(b")")}), 3, "torch.jit.load cannot open it ("),
        "script-version-999": (
            lambda: changed(script_archive(), {"version": b"999"}), 3, "a PyTorch file with version 999"),
        "script-bad-inputs": (
            lambda: changed(script_archive(), {"traced_inputs.pkl": program(storage(count=1 << 45))}),
            3, "its recorded inputs are larger than any model's"),
    }  # fmt: skip
    return [file(f"archive-{name}", make, code, words) for name, (make, code, words) in makes.items()]


def flip_data(data: bytes) -> bytes:
    """One bit of a tensor's record."""
    wrong = bytearray(data)
    wrong[data.index(b"data/0") + 200] ^= 1
    return bytes(wrong)


def safetensors_items() -> list[Item]:
    """Broken safetensors files."""
    four = bytes(16)
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    overlap_a, overlap_b = (
        f"its safetensors header is damaged (Error while deserializing header: invalid offset for tensor `{name}`"
        for name in "ab"
    )
    damaged = "its safetensors header is damaged (Error while deserializing header: invalid JSON in header: invalid"
    no_entry = "an entry says no dtype, shape or place of a tensor"
    other_size = "invalid shape, data type, or offset for tensor"
    uncovered = "incomplete metadata, file not fully covered"
    makes: dict[str, tuple[Callable[[], bytes], str]] = {
        "header-of-8-exabytes": (
            lambda: safetensors({"a": tensor(0, 16)}, four, length=(1 << 63) - 1),
            "would have 9223372036854775807 bytes"),
        "header-of-16-exabytes": (
            lambda: safetensors({"a": tensor(0, 16)}, four, length=(1 << 64) - 1),
            "would have 18446744073709551615 bytes"),
        "header-of-100-megabytes": (
            lambda: safetensors({"a": tensor(0, 16)}, four, length=100 << 20), "would have 104857600 bytes"),
        "header-too-long-by-one": (
            lambda: safetensors({"a": tensor(0, 16)}, b"", length=80),
            "a safetensors file of 88 bytes, 70 of which are there"),
        "overlap": (lambda: safetensors({"a": tensor(0, 16), "b": tensor(8, 16)}, four), overlap_b),
        "same-place": (
            lambda: safetensors({"a": tensor(0, 16), "b": tensor(0, 16)}, four), "invalid offset for tensor"),
        "gap": (lambda: safetensors({"a": tensor(0, 4), "b": tensor(8, 16)}, four), overlap_b),
        "gap-at-the-start": (lambda: safetensors({"a": tensor(4, 16)}, four), overlap_a),
        "beyond-the-data": (
            lambda: safetensors({"a": tensor(0, 64)}, four), "a safetensors file of 135 bytes, 87 of which are there"),
        "data-left": (lambda: safetensors({"a": tensor(0, 8)}, four), uncovered),
        "backwards": (lambda: safetensors({"a": tensor(16, 0, [4])}, four), overlap_a),
        "negative-offset": (lambda: safetensors({"a": tensor(-16, 0, [4])}, four), damaged),
        "shape-too-large": (lambda: safetensors({"a": tensor(0, 16, [1 << 40])}, four), other_size),
        "shape-overflows": (
            lambda: safetensors({"a": tensor(0, 16, [1 << 47] * 10)}, four), "overflow computing buffer size"),
        "shape-negative": (lambda: safetensors({"a": tensor(0, 16, [-4])}, four), damaged),
        "shape-of-floats": (lambda: safetensors({"a": tensor(0, 16, [4.0])}, four), damaged),
        "shape-of-booleans": (lambda: safetensors({"a": tensor(0, 4, [True])}, four[:4]), damaged),
        "shape-of-100-axes": (lambda: safetensors({"a": tensor(0, 4, [1] * 100)}, four[:4]), "a tensor of 100 axes"),
        "dtype-of-other-size": (lambda: safetensors({"a": tensor(0, 16, [4], "F64")}, four), other_size),
        "dtype-unknown": (
            lambda: safetensors({"a": tensor(0, 16, [4], "\x1b[31m")}, four), r"unknown variant `\x1b[31m`"),
        "dtype-number": (
            lambda: safetensors({"a": {**tensor(0, 16), "dtype": 7}}, four),
            "invalid type: integer `7`"),
        "no-offsets": (lambda: safetensors({"a": {"dtype": "F32", "shape": [4]}}, four), no_entry),
        "three-offsets": (
            lambda: safetensors({"a": {**tensor(0, 16), "data_offsets": [0, 8, 16]}}, four),
            "invalid length 3, expected 2 elements"),
        "entry-of-text": (lambda: safetensors({"a": "b"}, four), no_entry),
        "twice-the-same": (
            lambda: safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(tensor(0, 16)).encode(),) * 2), four),
            "a key is there twice"),
        "not-utf-8": (lambda: safetensors(b'{"\xff\xfe": 1}', four), "it is no UTF-8 from byte 2"),
        "not-json": (
            lambda: safetensors(b"{not json at all}", four),
            "its safetensors header is damaged (it is no JSON from line 1, column 2)"),
        "json-list": (lambda: safetensors(b'{"a": [1]}', four), no_entry),
        "deep-json": (lambda: safetensors(deep, four), "its safetensors header is damaged (it is nested too deeply)"),
        "long-number": (
            lambda: safetensors(b'{"a": ' + b"9" * 100_000 + b"}", four),
            "its safetensors header is damaged (a number has too many digits)"),
        "name-with-escapes": (
            lambda: safetensors({"\x1b]0;x\x07\n\u202e": tensor(0, 16, [-4])}, four),
            "invalid value: integer `-4`"),
        "empty-header": (lambda: safetensors(b"{}", four), uncovered),
        "nan": (lambda: safetensors(b'{"a": NaN}', four), no_entry),
        "only-metadata": (
            lambda: safetensors({"__metadata__": {"a": "b"}}, four), uncovered),
    }  # fmt: skip
    return [file(f"safetensors-{name}", make, 3, words) for name, (make, words) in makes.items()]


def legacy_items() -> list[Item]:
    """Broken files of the layout before PyTorch 1.6."""
    cut_off = "the file is truncated"
    keys = "its list of storages is damaged"
    makes: dict[str, tuple[Callable[[], bytes], int, str]] = {
        "no-data": (lambda: legacy_tensor(4, ["0"], 4, b""), 3, cut_off),
        "less-data": (lambda: legacy_tensor(4, ["0"], 4, bytes(8)), 3, cut_off),
        "other-count": (lambda: legacy_tensor(4, ["0"], 5, bytes(20)), 3, cut_off),
        "negative-count": (lambda: legacy_tensor(4, ["0"], -4, bytes(16)), 3, cut_off),
        "missing-keys": (lambda: legacy_tensor(4, [], 4, bytes(16)), 3, keys),
        "other-keys": (lambda: legacy_tensor(4, ["1"], 4, bytes(16)), 3, keys),
        "keys-of-text": (lambda: legacy_tensor(4, "0", 4, bytes(16)), 3, keys),
        "keys-twice": (lambda: legacy_tensor(4, ["0", "0"], 4, bytes(16)), 3, keys),
        "larger-than-the-file": (
            lambda: legacy_tensor(1 << 40, ["0"], 1 << 40, bytes(16)),
            3, "its tensors are declared larger than the file"),
        "view": (
            lambda: legacy_with(program(b"(", storage()[1:-2], value(("1", 0, 1)), b"tQ"), pickle.dumps(["0"], 2)),
            3, "storage views of PyTorch 0.x"),
        "cut-after-the-object": (lambda: legacy_with(program(b"}"), b""), 3, TOO_EARLY),
        "magic-only": (lambda: pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), 3, TOO_EARLY),
        "wrong-magic": (
            lambda: pickle.dumps(0x1950A86A20F9469CFC6D, protocol=2), 3, "int, neither a model nor a state dict"),
    }  # fmt: skip
    return [file(f"legacy-{name}", make, code, words) for name, (make, code, words) in makes.items()]


def cut_items() -> list[Item]:
    """Good files that end too early, or have a bit wrong where that is noticed."""
    kinds = {"zip": "a damaged or truncated archive", "script": "a damaged or truncated archive", "plain": TOO_EARLY,
             "program": "a damaged or truncated archive", "safetensors": "it is cut off: a safetensors file of",
             "legacy": "the file is truncated"}  # fmt: skip
    cuts = [
        file(
            f"cut-{kind}-at-{percent}-percent",
            functools.partial(cut, kind, percent),
            3,
            TOO_EARLY if kind == "legacy" and percent < 50 else words,  # the pickle is in the first half
        )
        for kind, words in kinds.items()
        for percent in (3, 30, 70, 99)
    ]
    flips = [
        file(
            f"flip-zip-at-{percent}-percent",
            functools.partial(flipped, "zip", percent),
            3,
            "Bad CRC-32 for file 'archive/data/0'",
        )
        for percent in (15, 30, 50, 60, 80)
    ]
    return cuts + flips


def other_items() -> list[Item]:
    """Files of other kinds."""
    makes: dict[str, tuple[Callable[[], bytes], str]] = {
        "empty": (lambda: b"", "is empty"),
        "one-byte": (lambda: b"\x80", "too early"),
        "zeros": (lambda: bytes(5000), "pass a .pt"),
        "text": (lambda: b"hello\n", "text file"),
        "html": (lambda: b"<!DOCTYPE html><html></html>", "HTML"),
        "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "json": (lambda: b'{"a": 1}\n', "text file"),
        "gguf": (lambda: b"GGUF\3\0\0\0" + bytes(99), "GGUF"),
        "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        "gzip": (lambda: b"\x1f\x8b\x08" + bytes(99), "gzip"),
        "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(99), "7z"),
        "numpy": (lambda: b"\x93NUMPY\x01\x00" + bytes(99), "NumPy"),
        "tar": (tar_file, "tar archive"),
    }
    return [file(f"other-{name}", make, 3, words) for name, (make, words) in makes.items()]


def fifo(place: Path) -> Path:
    """A pipe that nobody writes into."""
    os.mkfifo(place / "input.pt")
    return place / "input.pt"


def unix_socket(place: Path) -> Path:
    """A socket."""
    current = Path.cwd()
    os.chdir(place)  # a socket's path may have 108 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("input.pt")
    finally:
        os.chdir(current)
    return place / "input.pt"


def link(target: str, name: str = "input.pt") -> Callable[[Path], Path]:
    """A symbolic link."""

    def make(place: Path) -> Path:
        (place / name).symlink_to(target)
        return place / name

    return make


def linked_index(place: Path) -> Path:
    """A folder whose index is a link to the folder itself."""
    (place / "model.bin.index.json").symlink_to(place)
    return place


def fifo_index(place: Path) -> Path:
    """A folder whose index is a pipe."""
    os.mkfifo(place / "model.bin.index.json")
    return place


def fifo_config(place: Path) -> Path:
    """A Hugging Face folder whose config is a pipe."""
    os.mkfifo(place / "config.json")
    return place


PATHS = [
    Item("path-fifo", fifo, 3, "not a regular file"),
    Item("path-socket", unix_socket, 3, "not a regular file"),
    Item("path-zero-device", lambda _: Path("/dev/zero"), 3, "not a regular file"),
    Item("path-null-device", lambda _: Path("/dev/null"), 3, "not a regular file"),
    Item("path-link-to-a-device", link("/dev/zero"), 3, "not a regular file"),
    Item("path-link-loop", link("input.pt"), 3, "levels of symbolic links"),
    Item("path-dangling-link", link("nowhere"), 3, "No such file"),
    Item("path-escapes", lambda place: place / "\x1b[31m\nx.pt", 3, "No such file"),
    Item("path-too-long", lambda place: place / ("x" * 300), 3, "too long"),
    Item("path-empty-folder", lambda place: place, 3, "empty directory"),
    Item("path-index-of-itself", linked_index, 3, "not a regular file"),
    Item("path-index-fifo", fifo_index, 3, "not a regular file"),
    Item("path-config-fifo", fifo_config, 3, "not a regular file"),
    Item("path-proc-mem", lambda _: Path("/proc/self/mem"), 3, "Input/output error"),
]

MALFORMED = [
    *pickle_items(), *bound_items(), *archive_items(), *safetensors_items(), *legacy_items(), *cut_items(),
    *other_items(), *PATHS,
]  # fmt: skip
