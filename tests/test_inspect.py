"""--inspect: what a file is, told without loading its weights and without executing anything."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from forked import run_forked
from helpers import CONVERT, check_error, lines
from safetensors.torch import save_file
from torch import nn

MARKER = "PT2ONNX_WAS_EXECUTED"


class Payload:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def inspected(path: Path, *options: str, cwd: Path | None = None) -> dict[str, Any]:
    """The JSON object about a file; the same facts stand on standard error."""
    result = run_forked("-i", str(path), "--inspect", "--json", *options, cwd=cwd)
    assert result.code == 0, result.err
    facts: dict[str, Any] = json.loads(result.out)
    told = "\n".join(lines(result, "INFO"))
    assert facts["why"] in told
    for key in ("class", "inputs", "mode", "command"):
        assert str(facts.get(key) or "") in told
    for name in facts.get("globals", {}):
        assert f"global {name}: " in told
    return facts


def elements(state: dict[str, torch.Tensor]) -> int:
    """The number of elements, counted by torch."""
    return sum(tensor.numel() for tensor in state.values())


def test_complete_model(tmp_path: Path) -> None:
    """Class, parameters, inputs, every global, and a command that works as printed."""
    model = torchvision.models.squeezenet1_1()
    torch.save(model, tmp_path / "net.pt")
    facts = inspected(tmp_path / "net.pt")
    assert facts["kind"] == "checkpoint"
    assert facts["what"] == "a complete model"
    assert facts["class"] == "torchvision.models.squeezenet.SqueezeNet"
    assert facts["parameters"] == elements(model.state_dict()) == facts["dtypes"]["float32"]
    assert facts["bytes"] == (tmp_path / "net.pt").stat().st_size
    assert facts["inputs"].startswith("1,3,224,224")
    assert facts["mode"] == "pytorch"
    assert "problem" not in facts
    assert facts["globals"]["torch.nn.modules.conv.Conv2d"] == ""
    command = facts["command"].replace("python convert.py", f"{sys.executable} {CONVERT}")
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "net.onnx").exists()
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".onnx"] == ["net.onnx"]


def test_hostile_pickles(tmp_path: Path) -> None:
    """The name that is not allowed stands among the others, with what a conversion would answer; nothing runs."""
    layer = nn.Linear(2, 2)
    layer.__dict__["extra"] = Payload()
    for value in (layer, {"model": nn.Linear(2, 2).state_dict(), "extra": Payload()}):
        torch.save(value, tmp_path / "bad.pt")
        facts = inspected(tmp_path / "bad.pt", cwd=tmp_path)
        assert facts["globals"]["posix.system"]
        assert facts["globals"]["torch._utils._rebuild_tensor_v2"] == ""
        assert facts["exit_code"] == 4
        assert "posix.system" in facts["problem"]
        assert "command" not in facts
        assert [file.name for file in tmp_path.iterdir()] == ["bad.pt"]
        check_error(run_forked("-i", "bad.pt", "-o", "m.onnx", cwd=tmp_path), 4, "posix.system")


def test_a_class_whose_package_is_missing(tmp_path: Path) -> None:
    """The class is named, and so is the package; other globals are listed all the same."""
    program = b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81cno_such_package.nets\nNet\n)\x81\x86."
    pickle_file = tmp_path / "old.pkl"
    pickle_file.write_bytes(program)
    facts = inspected(pickle_file)
    assert facts["kind"] == "legacy_checkpoint"
    assert facts["globals"]["no_such_package.nets.Net"]
    assert facts["globals"]["torch.nn.modules.linear.Linear"] == ""
    assert facts["exit_code"] in (3, 4)
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(program)


def test_weights(tmp_path: Path) -> None:
    """Checkpoints, safetensors and shards: the entry, tensors, parameters by dtype."""
    state = {"conv.weight": torch.ones(4, 3, 3, 3), "conv.bias": torch.ones(4, dtype=torch.float16)}
    torch.save({"ema": state, "epoch": 3, "optimizer": {"state": {0: torch.ones(9)}}}, tmp_path / "a.ckpt")
    facts = inspected(tmp_path / "a.ckpt")
    assert facts["what"] == "weights in the entry 'ema' of a checkpoint"
    assert facts["tensors"] == 2
    assert facts["dtypes"] == {"float32": 108, "float16": 4}
    assert facts["mode"] == "state_dict"
    save_file(state, tmp_path / "a.safetensors")
    for name in ("conv.weight", "conv.bias"):
        save_file({name: state[name]}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    for name, kind in (("a.safetensors", "safetensors"), ("a.safetensors.index.json", "sharded_weights")):
        facts = inspected(tmp_path / name)
        assert facts["kind"] == kind
        assert facts["parameters"] == 112
        assert facts["tensors"] == 2


def test_shards_that_are_pickles(tmp_path: Path) -> None:
    """Counted, recognised and named as one file would be; a folder of transformers too; a refused shard is told."""
    net = torchvision.models.squeezenet1_1(num_classes=7).half()
    state, folder = net.state_dict(), tmp_path / "bert"
    folder.mkdir()
    weight_map = {name: f"pytorch_model-0000{1 + place % 2}.bin" for place, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    facts = inspected(index)
    assert facts["kind"] == "sharded_weights"
    assert facts["dtypes"] == {"float16": elements(state)}
    assert facts["candidates"] == [["squeezenet1_1"]]
    assert facts["globals"]["torch._utils._rebuild_tensor_v2"] == ""
    assert "problem" not in facts
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    facts = inspected(folder)
    assert facts["parameters"] == elements(state)
    assert "problem" not in facts
    index.write_text(json.dumps({"weight_map": {**weight_map, "more": "pytorch_model-00001.bin"}}))
    assert "lacks 1 tensor (more)" in inspected(index)["problem"]
    torch.save({"extra": Payload()}, folder / "pytorch_model-00002.bin")
    index.write_text(json.dumps({"weight_map": weight_map}))
    facts = inspected(index, cwd=tmp_path)
    assert facts["globals"]["posix.system"]
    assert facts["exit_code"] == 4
    assert not (tmp_path / MARKER).exists()


def test_recognised_weights(tmp_path: Path) -> None:
    """The architecture, and a command that needs no class; several, and one that asks for it."""
    torch.save(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), tmp_path / "net.pth")
    facts = inspected(tmp_path / "net.pth")
    assert facts["candidates"] == [["squeezenet1_1"]]
    assert "num_classes=7" in facts["architecture"]
    assert "--model-class" not in facts["command"]
    command = facts["command"].replace("python convert.py", f"{sys.executable} {CONVERT}")
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "net.safetensors")
    facts = inspected(tmp_path / "net.safetensors")
    assert ["resnet18", "timm.models:resnet18"] in facts["candidates"]
    assert len(facts["candidates"]) == 2
    assert facts["command"].endswith("--model-class CLASS")


def test_archives(models: Path) -> None:
    """TorchScript and .pt2, from their records alone."""
    flat = torch.load(models / "flat.pt", weights_only=False)
    count = elements(flat.state_dict())
    traced = inspected(models / "traced.pt")
    assert traced["what"] == "TorchScript"
    assert traced["class"].endswith("Sequential")
    assert traced["inputs"].startswith("2,13:float32")
    assert traced["parameters"] == count
    assert inspected(models / "scripted.pt")["parameters"] == count
    program = inspected(models / "dynamic.pt2")
    assert program["what"] == "an exported program"
    assert program["parameters"] == count
    assert program["inputs"].startswith("input:s")
    assert program["inputs"].endswith(",13:float32")
    assert inspected(models / "static.pt2")["inputs"] == "input:2,13:float32"


def test_folders_and_what_is_no_model(tmp_path: Path) -> None:
    """A Hugging Face folder is described; a text file, an empty file and no file are errors as ever."""
    folder = tmp_path / "bert"
    folder.mkdir()
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"bert.w": torch.ones(3, 5)}, folder / "model.safetensors")
    facts = inspected(folder)
    assert facts["kind"] == "huggingface"
    assert facts["class"] == "BertForMaskedLM"
    assert facts["parameters"] == 15
    (tmp_path / "x.pt").write_text("hello")
    check_error(run_forked("-i", str(tmp_path / "x.pt"), "--inspect"), 3, "a text file")
    check_error(run_forked("-i", str(tmp_path / "none.pt"), "--inspect"), 3, "No such file")
    check_error(run_forked("-i", str(tmp_path / "x.pt")), 2, "-o/--output", "--inspect")


def test_weights_stay_on_the_disk(tmp_path: Path) -> None:
    """Three gigabytes of weights: the peak memory is that of the libraries."""
    path = tmp_path / "big.pt"
    torch.save({"state_dict": {"a.weight": torch.zeros(3 << 18, 1 << 10)}}, path)
    command = [sys.executable, str(CONVERT), "-i", str(path), "--inspect", "--json"]
    script = (
        f"import resource, subprocess\nsubprocess.run({command!r}, check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    report, megabytes = done.stdout.splitlines()
    assert json.loads(report)["parameters"] == 3 << 28
    assert int(megabytes) < 1000
    path.unlink()
