"""Nothing in a file is executed: hostile and malformed files, each with its own trick, and what opens all the same."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from corpus import MARKER, Reduced, archive, hooked, program, saved, touch
from helpers import check_error, lines, run_cli
from torch import nn

import convert as product


def module_with(name: str, value: Any) -> bytes:
    """A pickled Linear layer with one attribute too many."""
    layer = nn.Linear(2, 2)
    layer.__dict__[name] = value
    return saved(layer)


GLOBAL = b"cposix\nsystem\n"
COMMAND = b"X" + struct.pack("<I", len(f"touch {MARKER}")) + f"touch {MARKER}".encode()
TERABYTES = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu\x8a\x06\x00\x00\x00\x00\x00\x40tQ"


def tensor_of(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """An archive whose tensor lies outside its storage of four floats."""
    data = saved({"a": torch.arange(4.0)})
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        program = old.read("archive/data.pkl")
    head, tail = program[: program.index(b"QK") + 1], program[program.index(b"\x89ccollections") :]
    numbers = pickle.dumps((offset, size, stride), protocol=2)[2:-1]
    body = numbers[: numbers.rindex(b"\x87")] if b"\x87" in numbers else numbers
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    changed = head + body + tail
    writer.write_record("data.pkl", changed, len(changed))
    writer.write_record("byteorder", b"little", 6)
    writer.write_record("data/0", bytes(16), 16)
    writer.write_end_of_file()
    return file.getvalue()


def nested_lists(depth: int) -> bytes:
    """A pickle that recurses."""
    return program(b"(" * depth + b"l" * 0 + b"]" + b"t" * depth)


def shared_modules(depth: int) -> bytes:
    """Two to the power of `depth` paths through `depth` modules."""
    layer: nn.Module = nn.ReLU()
    for _ in range(depth):
        layer = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer))
    return saved(layer)


def cyclic_modules() -> bytes:
    """A module that contains itself."""
    layer = nn.Sequential(nn.Linear(2, 2))
    layer._modules["self"] = layer
    return saved(layer)


HOSTILE: dict[str, tuple[Callable[[], bytes], int]] = {
    "system": (lambda: saved(touch()), 4),
    "system-in-a-state-dict": (lambda: saved({"weight": torch.ones(2), "extra": touch()}), 4),
    "eval": (lambda: saved(Reduced(eval, f"__import__('os').system('touch {MARKER}')")), 4),
    "exec": (lambda: saved(Reduced(exec, f"import os; os.system('touch {MARKER}')")), 4),
    "plain-pickle": (lambda: pickle.dumps({"a": touch(), "é": 1}, protocol=2), 4),
    "protocol-4": (lambda: archive(pickle.dumps(touch(), protocol=4)), 4),
    "getattr-chain": (lambda: archive(program(b"cbuiltins\ngetattr\n", GLOBAL, COMMAND, b"\x86R")), 4),
    "getattr-forward": (lambda: saved(Reduced(getattr, nn.Linear, "__init__")), 4),
    "partial": (lambda: saved(__import__("functools").partial(os.system, f"touch {MARKER}")), 4),
    "torch-load": (lambda: archive(program(b"ctorch.serialization\nload\n", COMMAND, b"\x85R")), 4),
    "torch-save": (lambda: archive(program(b"ctorch\nsave\n", b"]", COMMAND, b"\x86R")), 4),
    "from-file": (lambda: archive(program(b"ctorch\nfrom_file\n", COMMAND, b"\x85R")), 4),
    "hub": (lambda: archive(program(b"ctorch.hub\nload\n", COMMAND, b"\x85R")), 4),
    "INST": (lambda: archive(program(b"(", COMMAND, b"iposix\nsystem\n")), 4),
    "OBJ": (lambda: archive(program(b"(", GLOBAL, COMMAND, b"o")), 4),
    "EXT": (lambda: archive(program(b"\x82\x01")), 4),
    "computed-name": (lambda: archive(b"\x80\x04K\x01K\x02\x93."), 3),
    "NEWOBJ": (lambda: archive(program(b"csubprocess\nPopen\n", COMMAND, b"\x85\x81")), 4),
    "BUILD-on-a-class": (lambda: archive(program(b"ctorch.nn.modules.linear\nLinear\n}U\x01aU\x01bsb")), 4),
    "rebuild-from-type": (
        lambda: archive(program(b"ctorch._tensor\n_rebuild_from_type_v2\n(", GLOBAL, GLOBAL, COMMAND, b"\x85}tR")),
        4,
    ),
    "enum-of-nothing": (lambda: archive(program(b"ctorchvision.transforms.functional\nF\n)R")), 3),
    "lazy-module": (lambda: saved(nn.LazyLinear(3)), 4),
    "graph-module": (lambda: saved(torch.fx.symbolic_trace(nn.Linear(2, 2))), 4),
    "dunder-attribute": (lambda: module_with("__del__", print), 4),
    "own-forward": (lambda: module_with("forward", print), 4),
    "own-method": (lambda: module_with("extra_repr", torch.nn.functional.relu), 4),
    "forward-hook": (lambda: hooked("_forward_hooks"), 4),
    "pre-hook": (lambda: hooked("_forward_pre_hooks"), 4),
    "object-array": (lambda: saved({"a": __import__("numpy").array([touch()], dtype=object)}), 4),
    "beyond-the-storage": (lambda: tensor_of((1000,), (1,)), 3),
    "offset-beyond": (lambda: tensor_of((1,), (1,), 10**9), 3),
    "negative-stride": (lambda: tensor_of((2,), (-1,)), 3),
    "huge-stride": (lambda: tensor_of((2,), (2**60,)), 3),
    "cyclic-modules": (cyclic_modules, 3),
    "modules-2-to-the-40": (lambda: shared_modules(40), 3),
    "nested-a-million": (lambda: archive(nested_lists(1_000_000)), 3),
    "unhashable-key": (lambda: archive(program(b"}]K\x01s")), 4),
    "storage-of-terabytes": (lambda: archive(program(TERABYTES)), 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def quick_loader() -> Callable[[Path], Any]:
    """The product's own loading, in this process: a command for each file would take minutes."""

    def load(path: Path) -> Any:
        return product.load(product.detect(path), trust=False).content

    return load


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, quick_loader: Callable[[Path], Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Refused or called damaged, with one line that names the file; the payload never ran."""
    monkeypatch.chdir(tmp_path)
    make, code = HOSTILE[name]
    path = tmp_path / "hostile.pt"
    path.write_bytes(make())
    with pytest.raises(product.ConversionError) as caught:
        quick_loader(path)
    assert caught.value.status == code, str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / MARKER).exists()


def test_hostile_file_through_the_command(tmp_path: Path) -> None:
    """Exit 4, the names, the flag; --trust-pickle opens a harmless one with a [WARN]."""
    (tmp_path / "bad.pt").write_bytes(saved({"a": touch()}))
    result = run_cli("-i", "bad.pt", "-o", "m.onnx", cwd=tmp_path)
    check_error(result, 4, "posix.system", "--trust-pickle")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]
    (tmp_path / "shady.py").write_text("import torch\nclass Net(torch.nn.Linear):\n    pass\n")
    maker = "import torch, shady; torch.save(shady.Net(3, 2), 'own.pt')"
    subprocess.run([sys.executable, "-c", maker], cwd=tmp_path, check=True)
    check_error(run_cli("-i", "own.pt", "-o", "m.onnx", cwd=tmp_path), 3, "shady.Net", "is not installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    trusted = run_cli("-i", "own.pt", "-o", "m.onnx", "--trust-pickle", cwd=tmp_path, env=environment)
    assert trusted.code == 0, trusted.err
    assert any("--trust-pickle" in line for line in lines(trusted, "WARN"))


def test_modules_are_not_taken_from_the_working_directory(tmp_path: Path) -> None:
    """A torchvision.py beside the input, or where the command is run, is never imported."""
    (tmp_path / "resnet.pt").write_bytes(saved(torchvision.models.resnet18()))
    for name in ("torchvision.py", "timm.py", "onnx.py", "json.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / MARKER)!r}, 'w')\n")
    result = run_cli("-i", "resnet.pt", "-o", "m.onnx", "--input-shape", "1,3,32,32", cwd=tmp_path)
    assert result.code == 0, result.err
    assert not (tmp_path / MARKER).exists()


def test_torchscript_that_touches_files(quick_loader: Callable[[Path], Any], tmp_path: Path) -> None:
    """Operators that read and write files are refused before the archive is loaded."""
    path = tmp_path / "script.pt"

    class Reader(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.from_file("/etc/hostname", size=1)

    torch.jit.save(torch.jit.script(Reader()), str(path))
    with pytest.raises(product.ConversionError, match="from_file") as caught:
        quick_loader(path)
    assert caught.value.status == 4


def rename_target(program: Any) -> None:
    """Let a node call something that is no operator."""
    program["graph_module"]["graph"]["nodes"][0]["target"] = "os.system"


def add_expression(program: Any) -> None:
    """Let a range be an expression that runs code."""
    program["range_constraints"] = {"__import__('os')": {}}


def pickle_a_weight(config: Any) -> None:
    """Let a weight be a pickle."""
    next(iter(config["config"].values()))["use_pickle"] = True


PROGRAMS = {
    "operator": ("models/model.json", rename_target),
    "range": ("models/model.json", add_expression),
    "pickled": ("data/weights/model_weights_config.json", pickle_a_weight),
}


@pytest.mark.parametrize("words", PROGRAMS)
def test_exported_programs_that_would_run_code(
    words: str, models: Path, quick_loader: Callable[[Path], Any], tmp_path: Path
) -> None:
    """A .pt2 whose program names other operators, expressions or pickles."""
    record, change = PROGRAMS[words]
    path = tmp_path / "bad.pt2"
    file = torch._C.PyTorchFileWriter(str(path))
    reader = torch._C.PyTorchFileReader(str(models / "static.pt2"))
    for name in reader.get_all_records():
        data = reader.get_record(name)
        if name == record:
            content = json.loads(data)
            change(content)
            data = json.dumps(content).encode()
        if not name.startswith(".data/"):
            file.write_record(name, data, len(data))
    file.write_end_of_file()
    with pytest.raises(product.ConversionError, match=words) as caught:
        quick_loader(path)
    assert caught.value.status == 4


def test_duplicate_records_and_bombs(quick_loader: Callable[[Path], Any], tmp_path: Path) -> None:
    """Two records of one name; a megabyte that says it is a gigabyte."""
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(path, "w") as double:
        double.writestr("a/version", "3")
        for value in ({}, {"b": 1}):
            double.writestr(zipfile.ZipInfo("a/data.pkl"), pickle.dumps(value, protocol=2))
    with pytest.raises(product.ConversionError, match="two records of one name") as caught:
        quick_loader(path)
    assert caught.value.status == 3
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/version", "3")
        bomb.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        bomb.writestr("a/data/0", bytes(300 << 20))
    with pytest.raises(product.ConversionError, match="expands") as caught:
        quick_loader(path)
    assert caught.value.status == 3


def test_an_empty_tensor_anywhere(tmp_path: Path) -> None:
    """A safetensors file may have tensors without elements, and others, at places that fit no number of theirs."""
    import corpus

    header = {
        "a": corpus.tensor(0, 3, [3], "U8"),
        "b": corpus.tensor(3, 3, [0], "F64"),
        "c": corpus.tensor(3, 11, [2], "F32"),
        "d": corpus.tensor(11, 11, [2, 0], "BF16"),
    }
    path = tmp_path / "input.safetensors"
    path.write_bytes(corpus.safetensors(header, b"\1\2\3" + struct.pack("<2f", 0.5, -2.0)))
    content = product.load(product.detect(path), trust=False).content
    assert content["c"].tolist() == [0.5, -2.0]
    assert content["b"].shape == (0,)
    assert content["d"].shape == (2, 0)


# Operators of the namespaces that archives may use which take text, read one by one: none of them takes it for a place.
TEXT_OPERATORS = """
Delete Float Int ModuleContainerIndex RaiseException StringIndex __contains__ __getitem__ __interpolate __upsample
_assert_async _assert_scalar _convolution_mode _functional_assert_async _functional_assert_scalar _linalg_check_errors
_linalg_eigh _linalg_svd _mixed_dtypes_linear _print _segment_reduce_backward _set_item _sparse_mm
_sparse_mm_reduce_impl _sparse_mm_reduce_impl_backward _sparse_semi_structured_linear _sparse_semi_structured_tile
_test_ambiguous_defaults _test_string_default add any capitalize center clear conv1d conv2d conv3d copy count device
dict div div_ divide divide_ einsum endswith eq expandtabs fft_fft fft_fft2 fft_fftn fft_hfft fft_hfft2 fft_hfftn
fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2
fft_rfftn find format ge gelu gelu_ gelu_backward get get_autocast_dtype gt index index_reduce index_reduce_ isalnum
isalpha isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper items join keys le len
linalg_cond linalg_eigh linalg_eigvalsh linalg_lstsq linalg_matrix_norm linalg_norm linalg_qr linalg_svd
linalg_svdvals list ljust lower lstrip lt meshgrid nanquantile ne ord pad pad_sequence partition percentFormat pop
popitem quantile remove replace rfind rindex rjust rpartition rsplit rstrip scatter scatter_ scatter_reduce
scatter_reduce_ searchsorted segment_reduce setdefault slice sort sorted split splitlines startswith stft strip
swapcase title update upper values warn zfill inductor_random
"""


def test_operators_that_take_text() -> None:
    """A new PyTorch may bring an operator that opens a file: those that take text are read before they are allowed."""
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        takes_text = any("str" in str(argument.type) for argument in schema.arguments)
        if takes_text and namespace in product.OPERATOR_NAMESPACES and not product.is_denied_operator([name]):
            found.add(name)
    assert len(found) > 100
    assert found <= set(TEXT_OPERATORS.split())
