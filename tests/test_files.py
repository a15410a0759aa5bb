"""Files as users have them: of older versions, for phones and GPUs, pruned, quantised, in parts, of own code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from corpus import archive, program, text
from forked import run_forked
from helpers import check_error, lines, onnx_outputs, run_cli
from test_policy import allow, load, made, opened, shady  # noqa: F401  (fixtures)
from torch import nn
from torch.nn.utils import prune

import convert as product

OWN = """
import torch
from torch import nn

def swish(x):
    return x * torch.sigmoid(x)

class conv_block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = swish
    def forward(self, x):
        return self.act(self.conv(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.kind = conv_block(), conv_block
    def forward(self, x):
        return self.block(x).mean((2, 3))

class Doubled(nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The user's module, in a folder that is no site-packages."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_files.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    import own_files

    sys.path.remove(str(folder))
    return own_files


def environment(own: Any) -> dict[str, str]:
    """PYTHONPATH with the user's module."""
    return {**os.environ, "PYTHONPATH": str(Path(own.__file__).parent)}


def check_answers(model: Path, reference: nn.Module, *shape: int) -> None:
    """ONNX Runtime answers as PyTorch does for another input than those that were traced."""
    given = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = reference.eval()(given)
    actual = next(iter(onnx_outputs(model, {"input": given.numpy()}).values()))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


OLDER: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[int, ...]]] = {
    "gelu": (nn.GELU, ("approximate",), (2, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16), ("norm_first",), (5, 2, 8)),
    "lstm": (lambda: nn.LSTM(4, 3, 2), ("_flat_weights", "_flat_weights_names"), (5, 2, 4)),
}


@pytest.mark.parametrize("name", OLDER)
def test_layers_of_an_older_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lacks a newer setting computes as it did without it."""
    make, names, shape = OLDER[name]
    torch.manual_seed(0)
    model, given = make().eval(), torch.randn(shape)
    expected = list(product.flatten_outputs(model(given)).values())
    state = {key: value for key, value in model.__reduce_ex__(2)[2].items() if key not in names}
    monkeypatch.setattr(type(model), "__getstate__", lambda _: state)
    torch.save(model, tmp_path / "model.pt")
    monkeypatch.undo()
    actual = list(product.flatten_outputs(load(tmp_path / "model.pt").eval()(given)).values())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_names_of_older_versions() -> None:
    """The classes that stand for what was renamed exist, and the listed layers take the listed settings."""
    for module, name in product.RENAMED_CLASSES.values():
        assert isinstance(getattr(sys.modules[module], name), type)
    for name, settings in product.NEWER_SETTINGS.items():
        if name.startswith("ultralytics."):  # which is not there to ask
            continue
        module, _, cls = name.rpartition(".")
        source = getattr(sys.modules[module], cls).__init__.__code__.co_varnames
        assert settings.keys() <= set(source)


def attribute_of(cls: str, name: str) -> bytes:
    """A pickle of {"a": getattr(cls, name)}."""
    module, _, cls = cls.rpartition(".")
    return archive(
        program(b"}", text("a"), b"cbuiltins\ngetattr\nc", f"{module}\n{cls}\n".encode(), text(name), b"\x86Rs")
    )


def test_a_function_of_an_allowed_class(opened: Callable[[bytes], Any]) -> None:  # noqa: F811
    """getattr(Detect, "forward"), which ultralytics' Pose keeps, is the class's own function, inherited or not."""
    assert opened(attribute_of("torch.nn.modules.linear.Linear", "forward"))["a"] is nn.Linear.forward
    for name in ("__init__", "load_state_dict", "__class__", "__globals__", "forward.__globals__", "apply"):
        with pytest.raises(product.ConversionError):
            opened(attribute_of("torch.nn.modules.linear.Linear", name))
    with pytest.raises(product.ConversionError):
        opened(attribute_of("os.path", "forward"))


def test_functions_and_classes_as_attributes(own: Any, tmp_path: Path) -> None:
    """A class in lower case and a function are named by the error; the line that it prints converts."""
    torch.manual_seed(0)
    model = own.Net()
    torch.save(model, tmp_path / "net.pt")
    command = ("-i", "net.pt", "-o", "net.onnx", "--input-shape", "1,3,8,8")
    refused = run_forked(*command, cwd=tmp_path, env=environment(own))
    check_error(refused, 4, "--allow-class own_files.Net own_files.conv_block own_files.swish;")
    advice = re.search(r"--allow-class [\w. ]+", refused.err)
    assert advice
    inspected = run_forked("-i", "net.pt", "--inspect", cwd=tmp_path, env=environment(own))
    assert advice[0] in inspected.err
    result = run_forked(*command, *advice[0].split(), cwd=tmp_path, env=environment(own))
    assert result.code == 0, result.err
    check_answers(tmp_path / "net.onnx", model, 2, 3, 8, 8)


@pytest.mark.usefixtures("shady")
def test_no_partial_of_a_function_that_the_user_named(
    opened: Callable[[bytes], Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A function may be kept, but not with arguments of the file's choosing, and it is not called."""
    allow(monkeypatch, "shady.mark")
    kept = opened(archive(program(b"}", text("a"), b"cshady\nmark\ns")))
    assert kept["a"].__name__ == "mark"
    for calls in (b"cfunctools\npartial\ncshady\nmark\n\x85R", b"cshady\nmark\n)R"):
        with pytest.raises(product.ConversionError):
            opened(archive(program(b"}", text("a"), calls, b"s")))


def test_what_is_never_advised() -> None:
    """Functions of packages that are there anyway, and what is no name, are not proposed for --allow-class."""
    names = ["numpy.f2py.compile", "pandas.read_pickle", "own.swish", "own.Net", "own.$(id)", "own"]
    assert [name for name in names if product.may_be_advised(name)] == ["own.swish", "own.Net"]


def test_a_package_outside_site_packages(tmp_path: Path) -> None:
    """`pip install --target`: the error has the line, and the line converts; an editable install needs none."""
    folder, work = tmp_path / "target", tmp_path / "work"
    (folder / "ultralytics/nn").mkdir(parents=True)
    work.mkdir()
    for name, code in {"": "", "nn/": "", "nn/tasks.py": "from torch import nn\nclass Tiny(nn.Linear): pass\n"}.items():
        (folder / "ultralytics" / (name if name.endswith(".py") else f"{name}__init__.py")).write_text(code)
    maker = "import torch; from ultralytics.nn.tasks import Tiny; torch.save(Tiny(4, 2), 'tiny.pt')"
    path = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", maker], cwd=work, env=path, check=True)
    command = ("-i", "tiny.pt", "-o", "m.onnx", "--input-shape", "1,4")
    refused = run_cli(*command, cwd=work, env=path)
    check_error(refused, 4, "--allow-class ultralytics.nn.tasks.Tiny;")
    assert "--allow-class ultralytics.nn.tasks.Tiny;" in run_cli("-i", "tiny.pt", "--inspect", cwd=work, env=path).err


def test_editable_installs(tmp_path: Path) -> None:
    """Pip's record of an editable install tells its folder; others tell none."""
    records = {"one": f'{{"url": "file://{tmp_path}/my%20code", "dir_info": {{"editable": true}}}}',
               "two": '{"url": "file:///elsewhere", "dir_info": {}}', "three": "[]", "four": "no JSON"}  # fmt: skip
    for name, record in records.items():
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info/direct_url.json").write_text(record)
    assert list(product.editable_folders([str(tmp_path)])) == [tmp_path / "my code"]


class Shifted(nn.Module):
    """Has a constant tensor, which mobile archives share with their bytecode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 3), torch.arange(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A layer and the constant."""
        return self.layer(x) + self.shift


def test_mobile_archives(tmp_path: Path) -> None:
    """A .ptl file is TorchScript with bytecode beside it."""
    model = Shifted().eval()
    scripted: Any = torch.jit.trace(model, torch.randn(1, 4))
    scripted._save_for_lite_interpreter(str(tmp_path / "m.ptl"))
    assert "m/constants/0.storage" in zipfile.ZipFile(tmp_path / "m.ptl").namelist()
    result = run_forked("-i", "m.ptl", "-o", "m.onnx", cwd=tmp_path)
    assert result.code == 0, result.err
    check_answers(tmp_path / "m.onnx", model, 5, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("ops.prepacked.linear_clamp_run(x, x)", "optimize_for_mobile"),
        ("ops.quantized.linear_dynamic(x, x)", "quantise"),
    ],
)
def test_packed_operators(call: str, words: str, tmp_path: Path) -> None:
    """XNNPACK's and dynamically quantised layers are refused by name, by the conversion and by --inspect."""
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "m.pt", "w") as packed:
        for name in plain.namelist():
            data = plain.read(name)
            packed.writestr(
                name, re.sub(rb"return .*", b"return " + call.encode(), data) if name.endswith(".py") else data
            )
    name = call.partition("(")[0]
    check_error(run_forked("-i", "m.pt", "-o", "m.onnx", cwd=tmp_path), 4, name, words)
    assert name in run_forked("-i", "m.pt", "--inspect", cwd=tmp_path).err


def on_a_gpu(x: torch.Tensor) -> torch.Tensor:
    """A called function, whose code names a GPU."""
    return x.to("cuda") + torch.ones(3, device="cuda:0")


class OnAGpu(nn.Module):
    """Says where its tensors lie."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A layer, a called function, and .cuda()."""
        return on_a_gpu(self.layer(x)) + torch.arange(3, device=torch.device("cuda:0")).to(x.dtype).cuda()


def test_torchscript_of_a_gpu(tmp_path: Path) -> None:
    """cuda:0 in the code, also in functions that it calls, becomes the device at hand."""
    model = OnAGpu().eval()
    torch.jit.save(torch.jit.script(model), tmp_path / "m.pt")
    result = run_forked("-i", "m.pt", "-o", "m.onnx", "--input-shape", "1,4", cwd=tmp_path)
    assert result.code == 0, result.err
    assert len([line for line in lines(result, "INFO") if line.startswith("device: ")]) == 1
    given = torch.randn(2, 4)
    actual = onnx_outputs(tmp_path / "m.onnx", {"input": given.numpy()})["output"]
    np.testing.assert_allclose(actual, (model.layer(given) + 1 + torch.arange(3)).detach(), rtol=1e-5, atol=1e-6)


def layers() -> list[nn.Module]:
    """Two layers."""
    return [nn.Linear(4, 3), nn.Linear(3, 2)]


PARTS: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (layers, "0"),
    "module-list": (lambda: nn.ModuleList(layers()), "0"),
    "nested": (lambda: {"layers": layers(), "epoch": 3}, "layers.0"),
    "two-models": (lambda: dict(zip(("one", "two"), layers(), strict=True)), "one"),
}


@pytest.mark.parametrize("name", PARTS)
def test_several_models(name: str, tmp_path: Path) -> None:
    """The conversion and --inspect say the same, and what they say to pass converts that part."""
    make, key = PARTS[name]
    content = make()
    torch.save(content, tmp_path / "m.pt")
    refused = run_forked("-i", "m.pt", "-o", "m.onnx", cwd=tmp_path)
    check_error(refused, 2, "several models", f"--checkpoint-key {key} ", "torch.nn.Sequential")
    inspected = run_forked("-i", "m.pt", "--inspect", cwd=tmp_path)
    assert lines(refused, "ERROR")[0] in lines(inspected, "WARN")[0]
    result = run_forked("-i", "m.pt", "-o", "m.onnx", "--checkpoint-key", key, cwd=tmp_path)
    assert result.code == 0, result.err
    first = content["layers"][0] if name == "nested" else content["one"] if name == "two-models" else content[0]
    check_answers(tmp_path / "m.onnx", first, 3, 4)


def test_a_class_without_weights(own: Any, tmp_path: Path) -> None:
    """Its state dict is empty, and the class is enough; without one the error says so."""
    torch.save(own.Doubled().state_dict(), tmp_path / "m.pt")
    command = ("-i", "m.pt", "-o", "m.onnx", "--input-shape", "1,4")
    check_error(run_forked(*command, cwd=tmp_path), 3, "no weights found", "pass --model-class")
    result = run_forked(*command, "--model-class", "own_files:Doubled", cwd=tmp_path, env=environment(own))
    assert result.code == 0, result.err
    check_answers(tmp_path / "m.onnx", own.Doubled(), 3, 4)


def pruned() -> nn.Module:
    """A model of timm whose convolutions have masks."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet").eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.3)
    return model


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "state-dict"])
def test_pruned_models(complete: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """weight_orig and weight_mask become the weight: the graph multiplies nothing."""
    import onnx

    model = pruned()
    torch.save(model if complete else model.state_dict(), tmp_path / "m.pt")
    result = run_forked("-i", "m.pt", "-o", "m.onnx", cwd=tmp_path)
    assert result.code == 0, result.err
    check_answers(tmp_path / "m.onnx", model, 2, 3, 160, 160)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert "Mul" not in {node.op_type for node in graph.node}
    assert not [tensor.name for tensor in graph.initializer if "mask" in tensor.name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "state-dict"])
def test_quantised_models(complete: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Exit 4: what it is and what to do, by the conversion and by --inspect."""
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})
    torch.save(model if complete else model.state_dict(), tmp_path / "m.pt")
    refused = run_forked("-i", "m.pt", "-o", "m.onnx", cwd=tmp_path)
    check_error(refused, 4, "it is quantised", "quantise the ONNX file")
    assert lines(refused, "ERROR")[0] in lines(run_forked("-i", "m.pt", "--inspect", cwd=tmp_path), "WARN")[0]


def test_the_weights_of_a_complete_model(tmp_path: Path) -> None:
    """A class that the installed version lacks: the error names a class with these weights, with which it converts."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.01  # which no state dict has
    torch.save(model, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "m.pt", "w") as old:
        for name in new.namelist():
            old.writestr(
                name, new.read(name).replace(b"timm.models.resnet\nBasicBlock", b"timm.models.gone\nBasicBlock")
            )
    refused = run_forked("-i", "m.pt", "-o", "m.onnx", cwd=tmp_path)
    check_error(refused, 3, "has no timm.models.gone", "--model-class test_resnet")
    assert lines(refused, "ERROR")[0] in lines(run_forked("-i", "m.pt", "--inspect", cwd=tmp_path), "WARN")[0]
    result = run_forked("-i", "m.pt", "-o", "m.onnx", "--model-class", "test_resnet", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "the weights alone are used" in lines(result, "WARN")[0]
    check_answers(tmp_path / "m.onnx", model, 2, 3, 160, 160)


def test_weights_alone_are_read_inertly(tmp_path: Path) -> None:
    """--model-class does not make a hostile file harmless: what calls the system is refused, and nothing runs."""
    command = ("-i", "m.pt", "-o", "m.onnx", "--model-class", "torch.nn:Linear")
    (tmp_path / "m.pt").write_bytes(archive(program(b"cos\nsystem\n", text("touch run"), b"\x85R")))
    check_error(run_forked(*command, cwd=tmp_path), 4, "os.system")
    (tmp_path / "m.pt").write_bytes(made("gone.Net", {"_modules": {}, "_parameters": {}, "call": print}))
    check_error(run_forked(*command, cwd=tmp_path), 4, "builtins.print")
    assert not (tmp_path / "run").exists()
