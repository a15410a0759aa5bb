"""Where weights lie in a checkpoint: every layout that training scripts write, and what is said about the choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_forked
from helpers import CONVERT, Result, check_error, lines, onnx_outputs
from safetensors.torch import save_file
from torch import nn

import convert as product

MODULE = '''
from torch import nn

class Net(nn.Module):
    """Its width has no default, so that somebody has to tell it."""
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 2)
    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())
'''
CLASS = "own_checkpoints:Net"
WIDTH = {"width": 5}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the class's module, for PYTHONPATH."""
    path = tmp_path_factory.mktemp("own")
    (path / "own_checkpoints.py").write_text(MODULE)
    return path


@pytest.fixture
def net(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model with running statistics that are not the initial ones."""
    monkeypatch.syspath_prepend(str(folder))
    from own_checkpoints import Net

    torch.manual_seed(3)
    model: nn.Module = Net(**WIDTH)
    model(torch.randn(16, 6) * 3 + 1)
    return model.eval()


def other(net: nn.Module) -> State:
    """The same names with other numbers: what must not be taken."""
    return {name: tensor * 0 for name, tensor in net.state_dict().items()}


def prefixed(prefix: str, state: State) -> State:
    """Every name with something before it."""
    return {prefix + name: tensor for name, tensor in state.items()}


def optimizer_state(net: nn.Module) -> dict[str, Any]:
    """What Adam keeps, after a step."""
    optimizer = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer.step()
    net.load_state_dict(before)
    return dict(optimizer.state_dict())


def lightning(net: nn.Module) -> dict[str, Any]:
    """The entries of a Lightning .ckpt, with the weights of a metric beside the model's."""
    return {
        "epoch": 3, "global_step": 120, "pytorch-lightning_version": "2.5.0", "loops": {"fit_loop": {"state_dict": {}}},
        "state_dict": {**prefixed("model.", net.state_dict()), "loss.weight": torch.ones(2)},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer_state(net)], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "width": WIDTH["width"]},
    }  # fmt: skip


def sharded_optimizer(net: nn.Module) -> dict[str, Any]:
    """FSDP's optimizer state has names, and tensors below them."""
    moments = {name: {"exp_avg": tensor, "step": torch.ones(())} for name, tensor in net.state_dict().items()}
    return {"optimizer": {"state": moments, "param_groups": []}, "model": net.state_dict()}


LAYOUTS: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda net: net.state_dict(),
    "state_dict": lambda net: {"epoch": 1, "state_dict": net.state_dict(), "optimizer": optimizer_state(net)},
    "model": lambda net: {"model": net.state_dict(), "best": 0.3, "scaler": {"scale": torch.ones(())}},
    "model_state_dict": lambda net: {"model_state_dict": net.state_dict(), "loss": torch.tensor(0.2)},
    "two levels": lambda net: {"model": {"state_dict": net.state_dict(), "name": "net"}},
    "net": lambda net: {"net": net.state_dict(), "acc": 91.2},
    "params_ema over params": lambda net: {"params": other(net), "params_ema": net.state_dict()},
    "ema over model": lambda net: {"model": other(net), "ema": {"module": net.state_dict()}, "optimizer": {}},
    "state_dict_ema": lambda net: {"arch": "x", "state_dict": other(net), "state_dict_ema": net.state_dict()},
    "generator": lambda net: {"generator": net.state_dict(), "discriminator": {"main.weight": torch.ones(3)}},
    "student": lambda net: {"student": net.state_dict(), "teacher": other(net)},
    "an unusual name": lambda net: {"weights_of_mine": net.state_dict(), "optimizer": optimizer_state(net)},
    "a module inside": lambda net: {"epoch": 1, "model": nn.Sequential(net.first, net.norm, nn.ReLU(), net.last)},
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "torch.compile": lambda net: torch.compile(net).state_dict(),
    "compiled inside DDP": lambda net: prefixed("module._orig_mod.", net.state_dict()),
    "compiled parts": lambda net: {k.replace("first.", "first._orig_mod."): v for k, v in net.state_dict().items()},
    "FSDP": lambda net: {k.replace(".", "._fsdp_wrapped_module."): v for k, v in net.state_dict().items()},
    "AveragedModel": lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "thop": lambda net: {**net.state_dict(), "first.total_ops": torch.ones(1), "total_params": torch.ones(1)},
    "Lightning": lightning,
    "Lightning, net.": lambda net: {"state_dict": prefixed("net.", net.state_dict()), "hyper_parameters": {}},
    "beside plain values": lambda net: {**net.state_dict(), "epoch": 3, "classes": ["cat", "dog"]},
    "arrays": lambda net: {name: tensor.numpy() for name, tensor in net.state_dict().items()},
    "old batch norm": lambda net: {k: v for k, v in net.state_dict().items() if "num_batches" not in k},
    "FSDP's optimizer": sharded_optimizer,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_layouts(name: str, legacy: bool, net: nn.Module, tmp_path: Path) -> None:  # noqa: FBT001
    """The right weights are found, and the model made of them answers bit by bit as the original."""
    path = tmp_path / "checkpoint.pt"
    torch.save(LAYOUTS[name](net), path, _use_new_zipfile_serialization=not legacy)
    loaded = product.load(product.detect(path), trust=False)
    found = product.find_weights(loaded.content, None).content
    if isinstance(found, nn.Module):
        model = found.eval()
    else:
        given = {} if name == "Lightning" else WIDTH
        hints = loaded.content.get("hyper_parameters", {})
        model = product.model_from_weights(CLASS, given, found, hints).eval()
    sample = torch.randn(4, 6)
    with torch.no_grad():
        assert torch.equal(model(sample), net(sample))


def convert_checkpoint(folder: Path, source: Path, *options: str) -> Result:
    """Through the command, with the class on PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    arguments = ("-i", str(source), "-o", str(source.with_name("m.onnx")), "--model-class", CLASS, *options)
    return run_forked(*arguments, env=environment)


def check_answers(net: nn.Module, graph: Path) -> None:
    """ONNX Runtime answers as PyTorch."""
    sample = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(sample)).numpy()
    np.testing.assert_allclose(onnx_outputs(graph, {"input": sample})["output"], expected, atol=1e-6)


def test_lightning_through_the_command(folder: Path, net: nn.Module, tmp_path: Path) -> None:
    """What is taken, what is left and what the hyper-parameters tell is said; ONNX Runtime answers as PyTorch."""
    torch.save(lightning(net), tmp_path / "last.ckpt")
    result = convert_checkpoint(folder, tmp_path / "last.ckpt")
    assert result.code == 0, result.err
    told = "\n".join(lines(result, "INFO"))
    assert "from the entry 'state_dict'" in told
    assert "'model.' is taken off the names; 1 tensor of other parts left out (loss.weight)" in told
    assert "hyper_parameters tell width=5" in told
    check_answers(net, tmp_path / "m.onnx")


def test_the_choice_and_another_one(folder: Path, net: nn.Module, tmp_path: Path) -> None:
    """Several candidates: one is taken and said, --checkpoint-key takes another, a part of the names too."""
    arguments = ("--model-args", json.dumps(WIDTH))
    torch.save({"model": other(net), "ema": net.state_dict()}, tmp_path / "two.pt")
    result = convert_checkpoint(folder, tmp_path / "two.pt", *arguments)
    assert any("from the entry 'ema'" in line and "also has model" in line for line in lines(result, "INFO"))
    check_answers(net, tmp_path / "m.onnx")
    assert convert_checkpoint(folder, tmp_path / "two.pt", *arguments, "--checkpoint-key", "model").code == 0
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_answers(net, tmp_path / "m.onnx")
    torch.save({"a": other(net), "b": net.state_dict()}, tmp_path / "ab.pt")
    check_error(convert_checkpoint(folder, tmp_path / "ab.pt", *arguments), 2, "several models (a, b)")
    assert convert_checkpoint(folder, tmp_path / "ab.pt", *arguments, "--checkpoint-key", "b").code == 0
    both = {**prefixed("left.", other(net)), **prefixed("right.", net.state_dict())}
    torch.save(both, tmp_path / "parts.pt")
    check_error(
        convert_checkpoint(folder, tmp_path / "parts.pt", *arguments),
        2,
        "several times; pass --checkpoint-key: left, right",
    )
    assert convert_checkpoint(folder, tmp_path / "parts.pt", *arguments, "--checkpoint-key", "right").code == 0
    check_answers(net, tmp_path / "m.onnx")


def test_a_module_inside_is_a_model(tmp_path: Path) -> None:
    """The layout of ultralytics' checkpoints: a complete model, and told so, in an entry of a checkpoint."""
    layer = nn.Linear(4, 3).eval()
    torch.save({"epoch": 3, "model": nn.Linear(4, 9), "ema": layer}, tmp_path / "best.pt")
    base = ("-i", str(tmp_path / "best.pt"), "-o", str(tmp_path / "m.onnx"))
    for arguments in (base, (*base, "--mode", "pytorch"), (*base, "--checkpoint-key", "ema")):
        result = run_forked(*arguments)
        assert result.code == 0, result.err
        told = [line for line in lines(result, "INFO") if line.startswith("mode:")]
        what = "best.pt holds a checkpoint with a model in its entry 'ema' (torch.nn.modules.linear.Linear)"
        assert told == [f"mode: pytorch; {what}: the archive has data.pkl, as torch.save writes"]
    sample = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = layer(torch.from_numpy(sample)).detach().numpy()
    np.testing.assert_allclose(onnx_outputs(tmp_path / "m.onnx", {"input": sample})["output"], expected, atol=1e-6)
    check_error(run_forked(*base, "--model-class", "resnet18"), 2, "the weights do not fit --model-class resnet18")


def test_nothing_to_take(folder: Path, net: nn.Module, tmp_path: Path) -> None:
    """A checkpoint of counters, only an optimizer, and FSDP's flattened shards."""
    torch.save({"epoch": 3, "loss": [1.0]}, tmp_path / "none.pt")
    check_error(convert_checkpoint(folder, tmp_path / "none.pt"), 3, "no weights found", "epoch, loss")
    torch.save({"optimizer": optimizer_state(net)}, tmp_path / "adam.pt")
    check_error(convert_checkpoint(folder, tmp_path / "adam.pt"), 3, "no weights found", "optimizer")
    torch.save({"layer._flat_param": torch.ones(9)}, tmp_path / "flat.pt")
    check_error(convert_checkpoint(folder, tmp_path / "flat.pt", "--model-args", json.dumps(WIDTH)), 3, "FSDP")


def shards(folder: Path, net: nn.Module, suffix: str = "safetensors") -> Path:
    """A state dict in two files and an index."""
    state = net.state_dict()
    names = {name: f"model-{1 + index % 2:05}-of-00002.{suffix}" for index, name in enumerate(state)}
    for file in set(names.values()):
        part = {name: tensor.clone() for name, tensor in state.items() if names[name] == file}
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_weights(suffix: str, folder: Path, net: nn.Module, tmp_path: Path) -> None:
    """The index or its folder; a missing shard, a missing tensor and a name outside the folder are errors."""
    index = shards(tmp_path, net, suffix)
    for source in (index, tmp_path):
        loaded = product.load(product.detect(source), trust=False)
        model = product.model_from_weights(CLASS, WIDTH, loaded.content, {}).eval()
        assert torch.equal(model(torch.ones(2, 6)), net(torch.ones(2, 6)))
    content = json.loads(index.read_text())
    for name, code, words in (
        ("../model-00001-of-00002.safetensors", 4, "outside its own folder"),
        ("/etc/hostname", 4, "outside its own folder"),
        ("model-00003.safetensors", 3, "shard model-00003.safetensors is missing"),
        (7, 4, "outside its own folder"),
    ):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], "first.weight": name}}))
        with pytest.raises(product.ConversionError, match=words) as caught:
            product.load(product.detect(index), trust=False)
        assert caught.value.status == code
    index.write_text(
        json.dumps({"weight_map": {**content["weight_map"], "more.weight": f"model-00001-of-00002.{suffix}"}})
    )
    check_error(convert_checkpoint(folder, index, "--model-args", json.dumps(WIDTH)), 3, "lacks 1 tensor (more.weight)")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("zero_to_fp32.py", "latest"), "zero_to_fp32.py . weights.pth"),
        (("mp_rank_00_model_states.pt",), "DeepSpeed"),
        ((".metadata", "__0_0.distcp"), "dcp_to_torch"),
        (("data.pkl", "version"), "an unpacked PyTorch archive"),
        (("saved_model.pb",), "TensorFlow"),
    ],
)
def test_directories_of_other_programs(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    """Each is recognised, and the line says how to make a file of it."""
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    check_error(run_forked("-i", str(tmp_path), "-o", str(tmp_path / "m.onnx")), 3, words)


def test_the_advice_on_distributed_checkpoints_works(folder: Path, net: nn.Module, tmp_path: Path) -> None:
    """torch.distributed's own tool turns its checkpoint into a file that converts."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": net.state_dict()}, checkpoint_id=str(tmp_path / "dcp"))
    check_error(run_forked("-i", str(tmp_path / "dcp"), "-o", str(tmp_path / "m.onnx")), 3, "dcp_to_torch")
    tool = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    subprocess.run([*tool, str(tmp_path / "dcp"), str(tmp_path / "weights.pth")], check=True, capture_output=True)
    assert convert_checkpoint(folder, tmp_path / "weights.pth", "--model-args", json.dumps(WIDTH)).code == 0


def test_a_wrong_checksum_is_noticed(net: nn.Module, tmp_path: Path) -> None:
    """A flipped bit among the weights, which torch.load does not see; no checksum at all is no fault."""
    torch.save(
        {name: tensor.repeat_interleave(64, 0) for name, tensor in net.state_dict().items() if tensor.ndim},
        tmp_path / "a.pt",
    )
    data = bytearray((tmp_path / "a.pt").read_bytes())
    reader = torch._C.PyTorchFileReader(str(tmp_path / "a.pt"))
    data[reader.get_record_offset("data/0") + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    torch.load(tmp_path / "a.pt")
    command = ("-o", str(tmp_path / "m.onnx"), "--model-class", "torch.nn:Identity")
    check_error(run_forked("-i", str(tmp_path / "a.pt"), *command), 3, "a.pt is damaged", "Bad CRC-32", "data/0")
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save(nn.Linear(3, 2), tmp_path / "b.pt")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    assert run_forked("-i", str(tmp_path / "b.pt"), "-o", str(tmp_path / "m.onnx")).code == 0


def test_optimizer_states_stay_on_the_disk(tmp_path: Path) -> None:
    """A gigabyte of optimizer state beside a small model costs no memory: only what is used is read."""
    layer = nn.Linear(4, 3)
    moments = {0: {"exp_avg": torch.zeros(1 << 28)}}
    torch.save({"model": layer.state_dict(), "optimizer": {"state": moments, "param_groups": []}}, tmp_path / "big.pt")
    script = f"""
import resource, sys
sys.path.insert(0, {str(CONVERT.parent)!r})
import torch, convert
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = convert.load(convert.detect(Path({str(tmp_path / "big.pt")!r})), trust=False)
weights = convert.find_weights(loaded.content, None).content
print(float(weights["weight"].sum()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    total, grown = done.stdout.split()[-2:]
    assert float(total) == pytest.approx(float(layer.weight.detach().sum()), abs=1e-5)
    assert int(grown) < 100 << 10  # kB
