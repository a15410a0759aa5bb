"""The loading policy: a pickle that keeps a rule opens, and one that breaks it is refused and runs nothing."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from corpus import MARKER, Reduced, archive, program, saved, text, touch
from forked import run_forked
from helpers import CONVERT, check_error, run_cli
from test_loading import COMMAND, GLOBAL
from torch import nn
from torch.nn import functional
from transformers.models.bert import modeling_bert

import convert as product

# A package that somebody installed: its classes would leave a mark wherever Python lets a class run code.
SHADY = f"""
import enum, pathlib, torch
def mark(*arguments, **keywords):
    pathlib.Path({MARKER!r}).touch()
class Kind(enum.Enum):
    LARGE = 1
class Data:
    def __init__(self): mark()
class Net(torch.nn.Linear):
    def __setstate__(self, state): mark()
    def __reduce__(self): mark()
    def forward(self, x): return super().forward(x) + 1
class Inherits(torch.nn.MultiheadAttention): pass
class Deleted(torch.nn.Linear):
    def __del__(self): mark()
class Dictionary(dict): pass
class Weight(torch.Tensor): pass
class Lazy(torch.nn.LazyLinear): pass
class Property:
    @property
    def value(self): return 1
    @value.setter
    def value(self, value): mark()
    def __setattr__(self, key, value): mark()
"""


def load(path: Path) -> Any:
    """What the product makes of a file, in this process."""
    return product.load(product.detect(path), trust=False).content


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], Any]]:
    """Open the bytes of a file; afterwards no payload has run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"

    def open_bytes(data: bytes) -> Any:
        path.write_bytes(data)
        return load(path)

    yield open_bytes
    assert not (tmp_path / MARKER).exists()


@pytest.fixture
def shady(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The package `shady`, in a folder on PYTHONPATH."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "shady.py").write_text(SHADY)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    import shady

    yield shady
    del sys.modules["shady"]


def allow(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """What --allow-class does."""
    monkeypatch.setattr(product, "USER_CLASSES", set(names))


def made(name: str, state: dict[str, Any]) -> bytes:
    """An archive with an object of the class `name` (module.Class) that has the attributes `state`."""
    module, _, cls = name.rpartition(".")
    attributes = pickle.dumps(state, protocol=2)[2:-1]
    return archive(program(f"c{module}\n{cls}\n".encode(), b")\x81", attributes, b"b"))


def call_global(name: str, *arguments: bytes) -> bytes:
    """An archive that calls `name` (module.function)."""
    module, _, function = name.rpartition(".")
    return archive(program(f"c{module}\n{function}\n(".encode(), *arguments, b"tR"))


def linear_of(**state: Any) -> bytes:
    """A Linear of this state and no other."""
    return made("torch.nn.modules.linear.Linear", {"_parameters": {}, "_buffers": {}, "_modules": {}, **state})


def layer_with(**attributes: Any) -> bytes:
    """A Linear with more attributes, in a Sequential."""
    layer = nn.Linear(2, 2)
    layer.__dict__.update(attributes)
    return saved(nn.Sequential(layer))


def config_with(**attributes: Any) -> bytes:
    """A configuration of transformers with more attributes."""
    config = transformers.BertConfig()
    config.__dict__.update(attributes)
    return saved({"config": config})


def shared_hooks() -> bytes:
    """A module whose (empty) dictionary of hooks gets a hook after the module has got its state."""
    relu = b"ctorch.nn.functional\nrelu\n"
    hooks = b"ccollections\nOrderedDict\n)Rq\x01"
    module = b"ctorch.nn.modules.activation\nReLU\n)\x81}(" + text("_forward_hooks") + hooks
    module += (
        text("_modules") + b"}" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_backward_hooks") + b"}"
    )
    module += text("inplace") + b"\x89ub"
    return archive(program(b"}(", text("model"), module, text("hooks"), b"h\x01K\x00" + relu + b"s", b"u"))


def moved_to_cuda(model: nn.Module) -> bytes:
    """What torch.save writes for a model on a GPU: the same but for the storages' location."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(saved(model)))
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    for name in reader.get_all_records():
        data = reader.get_record(name).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
        if not name.startswith(".data/") and name != "version":
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    assert b"cuda:0" in file.getvalue()
    return file.getvalue()


PARTIAL = b"cfunctools\npartial\nctorch.nn.functional\nrelu\n\x85R"
KERNEL_SPACE = types.SimpleNamespace(_experts_implementation="deepgemm")
FLOAT32_OF_2_TO_THE_60 = (b"ctorch\nfloat32\n", b"(\x8a\x08" + bytes(7) + b"\x10t", b"(K\x01t", b"\x89")
KEPT: dict[str, Callable[[], bytes]] = {
    "library-class": lambda: saved(nn.Linear(2, 2)),
    "layer-class-as-a-value": lambda: layer_with(norm=nn.LayerNorm),
    "listed-function": lambda: layer_with(act=functional.relu),
    "partial-of-a-function": lambda: layer_with(pool=functools.partial(functional.avg_pool2d, kernel_size=2)),
    "partial-of-a-layer": lambda: layer_with(norm=functools.partial(nn.LayerNorm, eps=1e-6)),
    "enum": lambda: layer_with(mode=torchvision.transforms.InterpolationMode.BICUBIC),
    "own-forward-method": lambda: saved(bound_forward("forward")),
    "config": config_with,
    "generation-config": lambda: saved({"config": transformers.GenerationConfig()}),
    "namespace": lambda: saved({"opt": types.SimpleNamespace(lr=1.0), "w": torch.ones(1)}),
    "named-tuple": lambda: saved({"out": torchvision.models.GoogLeNetOutputs(1, 2, 3), "w": torch.ones(1)}),
    "optimizer-object": lambda: saved({"model": nn.Linear(2, 2), "optimizer": optimizer_of(nn.Linear(2, 2))}),
    "slots-of-numpy": lambda: saved({"a": __import__("numpy").arange(3), "w": torch.ones(1)}),
    "meta-tensor": lambda: saved(nn.Linear(2, 2, device="meta")),
}  # fmt: skip
# A file that breaks a rule: how it is made, the exit code and words of the message.
BROKEN: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "function-of-a-model-module": (lambda: call_global("timm.models._hub.load_state_dict_from_hf", COMMAND), 4, "timm"),
    "function-not-listed": (lambda: call_global("torch.hub.download_url_to_file", COMMAND, COMMAND), 4, "torch.hub"),
    "function-is-not-called": (lambda: call_global("torch.nn.functional.relu", b"K\x01"), 4, "calls"),
    "class-is-not-called": (lambda: call_global("torch.nn.modules.linear.Linear", b"K\x01K\x01"), 4, "calls"),
    "class-that-is-imported-there": (lambda: made("torchvision.models.resnet.WeightsEnum", {}), 4, "makes an object"),
    "class-of-another-module": (lambda: made("timm.models.vit.OrderedDict", {}), 3, "timm"),
    "nested-name": (lambda: archive(b"\x80\x04" + text("torch.nn") + text("modules.Linear") + b"\x93."), 4, "torch.nn"),
    "dunder-name": (lambda: call_global("torch.nn.modules.linear.__builtins__"), 4, "__builtins__"),
    "tokenizer": (lambda: made("transformers.models.bert.tokenization_bert.BertTokenizer", {}), 4, "tokenization"),
    "converter": (lambda: made("transformers.models.mt5.convert_mt5.X", {}), 4, "convert_mt5"),
    "auto-class": (lambda: made("transformers.models.auto.modeling_auto.AutoModel", {}), 4, "AutoModel"),
    "script-module": (lambda: made("torch.jit._script.RecursiveScriptModule", {}), 4, "RecursiveScriptModule"),
    "package-importer": (lambda: made("torch.package.package_importer.PackageImporter", {}), 4, "PackageImporter"),
    "lazy-module": (lambda: saved(nn.LazyConv2d(3, 3)), 4, "Lazy"),
    "model-class-as-a-value": (lambda: layer_with(kind=torchvision.models.ResNet), 4, "as a value"),
    "tensor-class-as-a-value": (lambda: layer_with(kind=torch.Tensor), 4, "as a value"),
    "partial-of-a-model": (lambda: layer_with(kind=functools.partial(modeling_bert.BertModel)), 4, "as a value"),
    "partial-of-a-builtin": (lambda: call_global("functools.partial", b"cbuiltins\ndict\n"), 4, "partial"),
    "partial-of-another-function": (
        lambda: archive(program(PARTIAL, b"(", GLOBAL, b")}Ntb")), 4, "system"),
    "partial-changes-its-function": (
        lambda: archive(program(PARTIAL, b"(ctorch.nn.functional\ngelu\n)}Ntb")), 4, "changes the function"),
    "dunder-attribute": (lambda: layer_with(__reduce__=1), 4, "__reduce__"),
    "dunder-attribute-of-a-config": (lambda: config_with(__class__=1), 4, "__class__"),
    "method": (lambda: layer_with(state_dict=functional.relu), 4, "state_dict"),
    "module-for-a-method": (lambda: layer_with(extra_repr=nn.ReLU()), 4, "extra_repr"),
    "call-of-a-module": (lambda: layer_with(_call_impl=functional.relu), 4, "_call_impl"),
    "compiled-call": (lambda: linear_of(_compiled_call_impl=functional.relu), 4, "_compiled_call_impl"),
    "other-objects-forward": (lambda: layer_with(forward=nn.Linear(2, 2).forward), 4, "forward"),
    "eval": (lambda: saved(bound_forward("eval")), 4, "eval"),
    "method-of-a-config": (lambda: config_with(to_dict=functional.relu), 4, "to_dict"),
    "attention-kernel": (lambda: config_with(_attn_implementation_internal="kernels-community/x"), 4, "back end"),
    "expert-kernel": (lambda: config_with(_experts_implementation_internal="sonicmoe"), 4, "back end"),
    "kernel-of-a-layer": (lambda: config_with(id2label={1: {"_experts_implementation": "x"}}), 4, "back end"),
    "attention-by-part": (lambda: config_with(_attn_implementation_internal={"": "a/b"}), 4, "back end"),
    "kernel-in-a-namespace": (lambda: saved({"a": KERNEL_SPACE}), 4, "back end"),
    "kernel-in-a-module": (lambda: layer_with(_attn_implementation="a/b"), 4, "back end"),
    "attribute-map": (lambda: config_with(attribute_map={"_attn_implementation_internal": "x"}), 4, "attribute_map"),
    "hook": (lambda: layer_with(_forward_hooks={0: functional.relu}), 4, "hook"),
    "getattr-of-a-class": (lambda: saved(Reduced(getattr, nn.Linear, "compute_all")), 4, "attribute"),
    "getattr-of-a-function": (lambda: saved(Reduced(getattr, functional.relu, "__globals__")), 4, "attribute"),
    "modules-that-are-none": (lambda: layer_with(_modules={"a": 1}), 3, "_modules"),
    "parameters-that-are-none": (lambda: layer_with(_parameters={"a": "b"}), 3, "_parameters"),
    "rnn-of-a-billion-layers": (lambda: rnn_with(num_layers=10**9), 3, "layers"),
    "meta-tensor-beyond-bounds": (
        lambda: call_global("torch._utils._rebuild_meta_tensor_no_storage", *FLOAT32_OF_2_TO_THE_60), 3, "size"),
    "old-class": (lambda: made("torchvision.models.resnet.OldNet", {}), 3, "the installed torchvision 0.29.1 has no"),
    "old-module": (lambda: made("timm.models.forgotten.Net", {}), 3, "the installed timm 1.0.31 has no"),
    "library-not-installed": (lambda: made("detectron9.nn.Model", {}), 3, "detectron9"),
    "main": (lambda: made("__main__.Net", {}), 4, "the script that saved it"),
    "yolo-v5": (lambda: made("models.yolo.DetectionModel", {}), 3, "YOLOv5"),
    "system-beside-a-missing-package": (
        lambda: saved({"a": touch(), "b": pickle.PickleBuffer}), 4, "made to do harm"),
}  # fmt: skip


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has run a step."""
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


def rnn_with(**attributes: Any) -> bytes:
    """An LSTM with other attributes, of the layout that makes __setstate__ build names for each layer."""
    model = nn.LSTM(2, 2)
    model.__dict__.update(attributes, _all_weights=[[0]])
    return saved(model)


def bound_forward(name: str) -> nn.Module:
    """A module that has its own forward method as the attribute `name`, as fused models do."""
    model = nn.Linear(2, 2)
    model.__dict__[name] = model.forward
    return model


@pytest.mark.parametrize("rule", KEPT)
def test_rule_kept(rule: str, opened: Callable[[bytes], Any]) -> None:
    """What models really hold opens."""
    assert opened(KEPT[rule]()) is not None


@pytest.mark.parametrize("rule", BROKEN)
def test_rule_broken(rule: str, opened: Callable[[bytes], Any]) -> None:
    """What breaks a rule is refused with its reason; the fixture looks for the payload's mark."""
    make, code, words = BROKEN[rule]
    with pytest.raises(product.ConversionError) as caught:
        opened(make())
    assert words in str(caught.value)
    assert caught.value.status == code


def test_back_ends_that_need_a_gpu_become_eager(opened: Callable[[bytes], Any]) -> None:
    """flash_attention_2 computes what eager does, which runs everywhere."""
    config = opened(config_with(_attn_implementation_internal="flash_attention_2"))["config"]
    assert config._attn_implementation == "eager"


def test_hooks_that_are_added_late_do_not_reach_the_module(opened: Callable[[bytes], Any]) -> None:
    """A pickle may change a dictionary that it has handed to a module; the module has its own copy."""
    content = opened(shared_hooks())
    assert content["hooks"] == {0: functional.relu}
    assert content["model"]._forward_hooks == {}


def test_a_plain_pickle_imports_no_other_library(tmp_path: Path) -> None:
    """Transformers and timm are imported by the files that need them; a tokenizer's module by none."""
    (tmp_path / "resnet.pt").write_bytes(saved(torchvision.models.resnet18()))
    (tmp_path / "bad.pt").write_bytes(made("transformers.models.bert.tokenization_bert.BertTokenizer", {}))
    program = """if True:
        import sys, pathlib
        sys.path.insert(0, sys.argv[1])
        import convert
        for name in ("resnet.pt", "bad.pt"):
            try:
                convert.load(convert.detect(pathlib.Path(name)), trust=False)
            except convert.ConversionError as error:
                print(error.status)
        print(*sorted({module.partition(".")[0] for module in sys.modules} & {"transformers", "timm", "ultralytics"}))
    """
    command = [sys.executable, "-c", program, str(CONVERT.parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "4\n\n"


def test_a_model_of_transformers_writes_nothing_and_asks_no_network(tmp_path: Path) -> None:
    """A pickle of a BERT opens in a process whose home directory stays as it was, and the hub is switched off."""
    (tmp_path / "home").mkdir()
    (tmp_path / "bert.pt").write_bytes(saved(tiny_bert()))
    program = """if True:
        import sys, pathlib
        sys.path.insert(0, sys.argv[1])
        import convert
        print(type(convert.load(convert.detect(pathlib.Path("bert.pt")), trust=False).content).__name__)
        print(sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE)
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    command = [sys.executable, "-c", program, str(CONVERT.parent)]
    environment["HOME"] = str(tmp_path / "home")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "BertModel\nTrue\n"
    assert list((tmp_path / "home").iterdir()) == []


def test_weights_of_the_meta_device_end_in_one_line(tmp_path: Path) -> None:
    """Sizes without weights are no model, as a module and as a state dict."""
    model = nn.Linear(2, 2, device="meta")
    (tmp_path / "meta.pt").write_bytes(saved(model))
    (tmp_path / "meta.pth").write_bytes(saved(model.state_dict()))
    check_error(run_forked("-i", "meta.pt", "-o", "m.onnx", cwd=tmp_path), 3, "meta.pt holds no weights")
    class_of_it = ("--model-class", "torch.nn:Linear")
    check_error(
        run_forked("-i", "meta.pth", "-o", "m.onnx", *class_of_it, cwd=tmp_path), 3, "meta.pth holds no weights"
    )


def test_allowed_class_runs_nothing_of_its_own(
    shady: types.ModuleType, opened: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--allow-class: the class is made by object.__new__ and gets its attributes; its own ways to load never run."""
    allow(monkeypatch, "shady.Net", "shady.Data", "shady.Property", "shady.Kind", "shady.Inherits")
    state = pickle.loads(pickle.dumps(vars(nn.Linear(2, 2))))
    content = opened(made("shady.Net", state))
    assert type(content) is shady.Net
    assert torch.equal(content.weight, state["_parameters"]["weight"])
    state = vars(nn.MultiheadAttention(2, 1))
    del state["_qkv_same_embed_dim"]  # what the audited __setstate__ of its base adds
    assert opened(made("shady.Inherits", state))._qkv_same_embed_dim is True
    data = opened(archive(program(b"}", text("a"), b"cshady\nData\n)\x81}", text("x"), b"K\x01sbs")))["a"]
    assert (type(data), data.x) == (shady.Data, 1)
    changed = opened(archive(program(b"}", text("a"), b"cshady\nProperty\n)\x81}", text("value"), b"K\x02sbs")))["a"]
    assert vars(changed) == {"value": 2}
    assert opened(archive(program(b"}", text("a"), b"cshady\nKind\nK\x01\x85Rs")))["a"] is shady.Kind.LARGE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Deleted", "not a class of plain modules"),
        ("Dictionary", "not a plain object"),
        ("Lazy", "not a class of plain modules"),
        ("Weight", "not a class of plain modules"),
        ("Gone", "has no shady.Gone"),
    ],
)
def test_classes_that_cannot_be_allowed(
    name: str, words: str, shady: types.ModuleType, opened: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors, containers, lazy modules and classes with a destructor are not allowed by name either."""
    allow(monkeypatch, f"{shady.__name__}.{name}")
    with pytest.raises(product.ConversionError, match=words):
        opened(made(f"shady.{name}", {}))


@pytest.mark.usefixtures("shady")
def test_message_names_the_class_to_allow(opened: Callable[[bytes], Any]) -> None:
    """Exit 4: what is not allowed, what that means and both flags."""
    with pytest.raises(product.ConversionError) as caught:
        opened(made("shady.Net", {}))
    assert caught.value.status == 4
    for words in ("refers to shady.Net", "--allow-class shady.Net", "--trust-pickle", "could run code", "state dict"):
        assert words in str(caught.value)


def test_allow_class_through_the_command(tmp_path: Path) -> None:
    """The class's package comes from PYTHONPATH, never from the working directory or an empty entry of PYTHONPATH."""
    packages = tmp_path / "packages"
    work = tmp_path / "work"
    packages.mkdir()
    work.mkdir()
    (packages / "shady.py").write_text(SHADY)
    maker = "import torch, shady\ntorch.save(torch.nn.Sequential(shady.Net(3, 2)), 'own.pt')"
    plain = SHADY.replace("    def __reduce__(self): mark()\n", "")
    (work / "shady.py").write_text(plain)
    subprocess.run([sys.executable, "-c", maker], cwd=work, check=True)
    (work / "shady.py").write_text(f"open({MARKER!r}, 'w')")
    command = ("-i", "own.pt", "-o", "m.onnx", "--allow-class", "shady.Net")
    check_error(run_cli(*command[:-2], cwd=work), 3, "the Python package shady is not installed", "--allow-class")
    check_error(run_cli(*command, cwd=work), 3, "needs the Python package shady", "PYTHONPATH")
    empty_entry = {**os.environ, "PYTHONPATH": os.pathsep}
    check_error(run_cli(*command, cwd=work, env=empty_entry), 4, "outside site-packages or PYTHONPATH")
    named = {**os.environ, "PYTHONPATH": str(packages)}
    result = run_cli(*command, cwd=work, env=named)
    assert result.code == 0, result.err
    assert not (work / MARKER).exists()
    check_error(run_cli(*command[:-1], "shady", cwd=work), 2, "package.module.Class")


def tiny_bert() -> nn.Module:
    """A BERT of two small layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes))


def tiny_llama() -> nn.Module:
    """A Llama of two small layers, whose rotary embedding keeps a function."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, **sizes))


def tiny_gpt2() -> nn.Module:
    """A GPT-2 of two small layers."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2))


def tiny_vit() -> nn.Module:
    """A ViT of transformers of two small layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **sizes))


def hooked() -> nn.Module:
    """Layers whose weights are made by hooks."""
    norm = torch.nn.utils
    return nn.Sequential(norm.weight_norm(nn.Linear(6, 6)), norm.spectral_norm(nn.Linear(6, 4)), nn.Tanh())


def perceptron() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))


def averaged() -> nn.Module:
    """Exponential averaging around a model."""
    return torch.optim.swa_utils.AveragedModel(nn.Linear(6, 4))


def distributed() -> nn.Module:
    """A model in DistributedDataParallel, of one process."""
    from torch import distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(nn.Linear(6, 4))


def compound() -> nn.Module:
    """A wrapper below the root, shared layers, tied weights, recurrent and attention layers."""
    layer = nn.Linear(6, 6)
    other = nn.Linear(6, 6)
    other.weight = layer.weight
    return nn.Sequential(nn.DataParallel(layer), other, layer, nn.TransformerEncoderLayer(6, 2, 8, batch_first=True))


ROW = (torch.Size([3, 6]), torch.float32)
IMAGE = (torch.Size([2, 3, 64, 64]), torch.float32)
TOKENS = (torch.Size([2, 7]), torch.int64)
ZIP: dict[str, Any] = {}
LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}
# Name: how it is built, its input, how it is saved.
SAVES: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Size, torch.dtype], dict[str, Any]]] = {
    "resnet18": (torchvision.models.resnet18, IMAGE, ZIP),
    "resnet18-legacy": (torchvision.models.resnet18, IMAGE, LEGACY),
    **{f"protocol-{number}": (perceptron, ROW, {"pickle_protocol": number}) for number in (2, 3, 4, 5)},
    "protocol-4-legacy": (torchvision.models.squeezenet1_1, IMAGE, {**LEGACY, "pickle_protocol": 4}),
    "partials": (lambda: torchvision.models.swin_t(num_classes=5), IMAGE, ZIP),
    "detector": (
        lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
        IMAGE, LEGACY),
    "enum-and-partial": (lambda: nn.Sequential(nn.Linear(6, 4), marked()), ROW, ZIP),
    "timm-efficientnet": (lambda: timm.create_model("efficientnet_lite0"), IMAGE, ZIP),
    "timm-vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), IMAGE, LEGACY),
    "bert": (tiny_bert, TOKENS, ZIP),
    "llama": (tiny_llama, TOKENS, LEGACY),
    "gpt2": (tiny_gpt2, TOKENS, {"pickle_protocol": 5}),
    "vit-of-transformers": (tiny_vit, (torch.Size([2, 3, 32, 32]), torch.float32), ZIP),
    "weight-and-spectral-norm": (hooked, ROW, ZIP),
    "weight-and-spectral-norm-legacy": (hooked, ROW, LEGACY),
    "data-parallel": (lambda: nn.DataParallel(nn.Linear(6, 4)), ROW, ZIP),
    "distributed-data-parallel": (distributed, ROW, ZIP),
    "averaged": (averaged, ROW, LEGACY),
    "compound": (compound, (torch.Size([2, 5, 6]), torch.float32), ZIP),
    "lstm-in-double": (lambda: nn.LSTM(6, 5, 2, bidirectional=True).double(), (ROW[0], torch.float64), ZIP),
    "bfloat16": (lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU()).bfloat16(), (ROW[0], torch.bfloat16), LEGACY),
    "own-forward": (lambda: bound_forward("forward"), (torch.Size([3, 2]), torch.float32), ZIP),
}  # fmt: skip


def marked() -> nn.Module:
    """A layer with an enum's member and a partial among its attributes."""
    layer = nn.Linear(4, 4)
    layer.mode = torchvision.transforms.InterpolationMode.BILINEAR
    layer.norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    return layer


def answers(model: nn.Module, shape: torch.Size, dtype: torch.dtype) -> list[torch.Tensor]:
    """The outputs for an input of a fixed seed."""
    torch.manual_seed(1)
    given = torch.randint(0, 99, shape) if dtype is torch.int64 else torch.randn(shape).to(dtype)
    with torch.inference_mode():
        return list(product.flatten_outputs(model.eval()(given)).values())


@pytest.mark.parametrize("name", SAVES)
def test_saves_compute_the_same_bits(name: str, tmp_path: Path) -> None:
    """What torch.save writes for real models opens without a flag and computes what the saved model computes."""
    build, given, options = SAVES[name]
    torch.manual_seed(0)
    model = build()
    torch.save(model, tmp_path / "model.pt", **options)
    expected = answers(model, *given)
    assert expected
    opened = load(tmp_path / "model.pt")
    assert not isinstance(opened, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    tensors = {key.replace("module.", ""): tensor for key, tensor in model.state_dict().items() if key != "n_averaged"}
    assert tensors.keys() == opened.state_dict().keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in opened.state_dict().items())
    actual = answers(opened, *given)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_only_methods_that_exist_count_as_read() -> None:
    """Every name in the list of library implementations of __setstate__ has one; ultralytics is not there to ask."""
    for name in product.AUDITED_SETSTATE:
        module, _, cls = name.rpartition(".")
        if not module.startswith("ultralytics"):
            assert "__setstate__" in vars(getattr(importlib.import_module(module), cls)), name


OLDER = {
    "LogSoftmax": (nn.LogSoftmax(1), "dim"),
    "Softmax": (nn.Softmax(1), "dim"),
    "Softmin": (nn.Softmin(1), "dim"),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(4, 2, 8), "activation"),
}


@pytest.mark.parametrize("name", OLDER)
def test_setstate_fills_in_what_older_versions_lack(name: str, opened: Callable[[bytes], Any]) -> None:
    """A layer of an older version opens with the attributes that torch.load gives it, and no others."""
    layer, attribute = OLDER[name]
    older = copy.deepcopy(layer)
    del vars(older)[attribute]
    ours, theirs = opened(saved(older)), torch.load(io.BytesIO(saved(older)), weights_only=False)
    assert vars(ours).keys() == vars(theirs).keys()
    assert vars(ours)[attribute] is vars(theirs)[attribute]


def test_gpu_files_map_to_the_cpu(opened: Callable[[bytes], Any]) -> None:
    """Storages that were saved from a GPU, and wrappers inside a checkpoint."""
    model = nn.Linear(2, 2)
    content = opened(moved_to_cuda(nn.DataParallel(model)))
    assert content.weight.device.type == "cpu"
    assert torch.equal(content.weight, model.weight)
    checkpoint = opened(saved({"net": nn.DataParallel(nn.Sequential(model)), "epoch": 3}))
    assert type(checkpoint["net"]) is nn.Sequential
