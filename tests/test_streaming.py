"""Weights that stay in the checkpoint: the numbers, the bytes and the memory."""

import hashlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import judge
import numpy as np
import onnx
import pytest
import tiny_models
import torch
import torchvision
import transformers
from helpers import CONVERT, check_error, onnx_outputs, run_cli
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import convert as product

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "mamba", "gemma2", "gemma3_text", "phi3", "gpt2"),
    *("gpt_neox", "opt", "bloom", "falcon", "bert", "t5", "whisper", "vit"),
)
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda w, x: functional.linear(x, w),
    "linear with bias": lambda w, x: functional.linear(x, w, w[:, 0]),
    "a product with the other side": lambda w, x: w @ x.t(),
    "a product of what is not turned": lambda w, x: x @ w[:48].reshape(48, 48),
    "embedding": lambda w, x: functional.embedding((x[:, :3] * 10).long().abs() % len(w), w),
    "rows and columns": lambda w, _: w[3:40:2, 5:].t() * 2,
    "views of views": lambda w, _: w.t().unsqueeze(0).permute(2, 0, 1)[7].contiguous(),
    "parts": lambda w, _: torch.cat([part + 1 for part in w.chunk(3)]),
    "convolution": lambda w, x: functional.conv1d(x[None].mT, w[:, :, None]),
    "other dtypes": lambda w, _: w.double() * w.half(),
    "sums": lambda w, _: w.sum(0) + w.mean(),
}


def stored(tensor: Tensor, folder: Path, dtype: torch.dtype) -> Any:
    """`tensor` as a stored tensor of a safetensors file, cast to `dtype`."""
    save_file({"w": tensor}, folder / "w.safetensors")
    found = product.load(product.detect(folder / "w.safetensors"), trust=False).content["w"]
    return product.stored_class()(found, found.dtype).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_stored_tensors_are_tensors(
    operation: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of operation gives what it gives for the same tensor in memory, a block at a time too."""
    monkeypatch.setattr(product, "BLOCK_BYTES", 1000)
    product.block_memory.cache_clear()
    chance = torch.Generator().manual_seed(0)
    values, x = torch.randn(100, 48, generator=chance).to(dtype), torch.randn(5, 48, generator=chance)
    weight = stored(values, tmp_path, torch.float32)
    expected = OPERATIONS[operation](values.float(), x)
    actual = OPERATIONS[operation](weight, x)
    torch.testing.assert_close(product.in_memory(actual), expected, rtol=1e-6, atol=1e-5)
    product.block_memory.cache_clear()


EXPERTS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda w: w,
    "an expert": lambda w: w[1],
    "the last expert, turned": lambda w: w[-1].T,
    "half of an expert": lambda w: w[2, 3:20].t(),
    "all halves": lambda w: w[:, 20:],
    "across both halves": lambda w: w[1:, 30:60, 5:],
    "columns": lambda w: w[:, :, 7:9].transpose(1, 2),
    "another order": lambda w: w.permute(2, 0, 1)[3],
    "a row": lambda w: w[1][4],
    "parts of experts": lambda w: w.split(2)[1],
    "parts of rows": lambda w: w.split(33, 1)[2],
}


@pytest.mark.parametrize("view", EXPERTS)
def test_joined_experts_stay_stored(view: str, tmp_path: Path) -> None:
    """What transformers does to a layer's experts, stacking and joining, and views of it: the numbers, and no copy."""
    tensors = {f"{side}{i}": torch.randn(40, 16).to(torch.bfloat16) for side in "ab" for i in range(3)}
    save_file(tensors, tmp_path / "w.safetensors")
    found = product.load(product.detect(tmp_path / "w.safetensors"), trust=False).content
    kept = {name: product.stored_class()(tensor, tensor.dtype) for name, tensor in found.items()}
    expected, actual = (
        torch.cat([torch.stack([x[f"{side}{i}"] for i in range(3)]) for side in "ab"], 1).to(torch.float32)
        for x in (tensors, kept)
    )
    lazy = EXPERTS[view](torch.nn.Parameter(actual, requires_grad=False))
    assert isinstance(lazy, product.stored_class())
    torch.testing.assert_close(product.in_memory(lazy), EXPERTS[view](expected), rtol=0, atol=0)
    written = b"".join(bytes(block) for block in product.byte_blocks(lazy))
    assert written == EXPERTS[view](expected).contiguous().numpy().tobytes()


def test_stored_tensors_cannot_be_written_to(tmp_path: Path) -> None:
    """Writing raises, and neither the file nor the values change."""
    values = torch.randn(100, 48)
    weight = stored(values, tmp_path, torch.float32)
    before = (tmp_path / "w.safetensors").read_bytes()
    for write in (weight.zero_, lambda: weight.t()[0].add_(1), lambda: weight[2].copy_(values[0])):
        with pytest.raises(RuntimeError, match="stay in their file"):
            write()
    torch.testing.assert_close(product.in_memory(weight), values, rtol=0, atol=0)
    torch.zeros(100, 48).copy_(weight)  # from it is no writing to it
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_bytes_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written a block at a time is the whole in its logical order, cast and turned."""
    monkeypatch.setattr(product, "BLOCK_BYTES", 700)
    values = torch.randn(101, 33).bfloat16()
    weight = stored(values, tmp_path, torch.float32)
    for view, expected in ((weight, values.float()), (weight.t(), values.float().t()), (weight[5:, 3], values[5:, 3])):
        written = b"".join(product.byte_blocks(view))
        assert written == expected.float().contiguous().numpy().tobytes()
    assert b"".join(product.byte_blocks(torch.tensor(2.5))) == np.float32(2.5).tobytes()


def weights_of(folder: Path) -> dict[str, list[str]]:
    """Digests of the weights in every graph of a folder."""
    return {
        path.name: sorted(
            hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).hexdigest()
            for tensor in onnx.load(path).graph.initializer
            if len(tensor.raw_data) > 64
        )
        for path in folder.glob("*.onnx")
    }


def convert(folder: Path, *options: str, in_memory: bool = False) -> str:
    """Convert folder/in to folder/out in a forked child; returns what was said."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        if in_memory:
            patch.setattr(product, "store_all", lambda weights, *_: dict(weights))
        outcome = forked.convert_in_child(folder / "in", folder, *options, seconds=60)
    assert outcome.code == 0, outcome.err
    return outcome.err


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streamed graph gives transformers' answers, and its weights are the ordinary path's byte for byte."""
    monkeypatch.setattr(product, "STREAM_FROM", 0)
    monkeypatch.setattr(product, "STORED_BYTES", 0)
    tiny_models.make(name, tmp_path / "in", dtype="bfloat16")
    assert "are loaded" not in convert(tmp_path)  # the weights' values, while tracing
    row = judge.check(name, tmp_path)
    assert row["status"] == "ok", row
    streamed = weights_of(tmp_path / "out")
    convert(tmp_path, in_memory=True)
    assert streamed == weights_of(tmp_path / "out")
    assert sum(map(len, streamed.values())) > 10


@pytest.mark.parametrize(("name", "suffix"), [("alexnet", "safetensors"), ("alexnet", "pth"), ("resnet18", "pth")])
def test_state_dicts(name: str, suffix: str, tmp_path: Path) -> None:
    """Weights of torchvision models: the same bytes as without streaming, and PyTorch's answer."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), tmp_path / "in")
    convert(tmp_path, "--model-class", name)
    streamed = weights_of(tmp_path / "out")
    image = torch.rand(2, 3, 224, 224)
    found = onnx_outputs(tmp_path / "out" / "model.onnx", {"input": image.numpy()})["output"]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(image).numpy(), rtol=1e-3, atol=1e-4)
    convert(tmp_path, "--model-class", name, in_memory=True)
    assert streamed == weights_of(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_complete_models(dtype: torch.dtype, tmp_path: Path) -> None:
    """A pickled model, in float32 or not: the same bytes as without streaming, and PyTorch's answer."""
    torch.manual_seed(0)
    model = torchvision.models.alexnet().eval().to(dtype)
    torch.save(model, tmp_path / "in")
    assert "once more" not in convert(tmp_path, "--static")
    streamed = weights_of(tmp_path / "out")
    image = torch.rand(1, 3, 224, 224)
    found = onnx_outputs(tmp_path / "out" / "model.onnx", {"input": image.numpy()})["output"]
    with torch.no_grad():
        np.testing.assert_allclose(found, model.float()(image).numpy(), rtol=1e-3, atol=1e-4)
    convert(tmp_path, "--static", in_memory=True)
    assert streamed == weights_of(tmp_path / "out")


def test_what_needs_memory_gets_it(tmp_path: Path) -> None:
    """A model that asks for the address of its weights cannot be streamed: it is converted all the same."""
    source = """
import torch
class Net(torch.nn.Linear):
    def forward(self, x):
        assert self.weight.data_ptr() % 4 == 0
        return super().forward(x) + self.weight.numpy(force=True).sum()
"""
    (tmp_path / "addresses.py").write_text(source, encoding="utf-8")
    torch.manual_seed(0)
    layer = torch.nn.Linear(4096, 2500).eval()
    torch.save(layer.state_dict(), tmp_path / "in.pth")
    arguments = ["--model-class", "addresses:Net", "--model-args", '{"in_features": 4096, "out_features": 2500}']
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    files = ["-i", str(tmp_path / "in.pth"), "-o", str(tmp_path / "x.onnx")]
    result = run_cli(*files, *arguments, "--input-shape", "1,4096", env=environment)
    assert result.code == 0, result.err
    assert "once more with all weights in memory" in result.err
    given = torch.randn(3, 4096)
    found = onnx_outputs(tmp_path / "x.onnx", {"input": given.numpy()})["output"]
    with torch.no_grad():
        np.testing.assert_allclose(found, (layer(given) + layer.weight.sum()).numpy(), rtol=1e-3, atol=1e-2)


def make_decoder(folder: Path) -> int:
    """A decoder of 230 million parameters in bfloat16, as shards; returns the bytes of its graph in float32."""
    config = transformers.Qwen2Config(
        vocab_size=50_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, max_window_layers=12,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size="200MB")
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def peak(command: list[str]) -> int:
    """The most memory in bytes that a command and its children had."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, told
    return usage.ru_maxrss * (resource.getpagesize() // 4 if sys.platform == "linux" else 1)


def test_memory(tmp_path: Path) -> None:
    """The weights in float32 are not in memory: less than a quarter of them is, beyond what a tiny model takes."""
    (tmp_path / "tiny").mkdir()
    tiny_models.make("qwen2", tmp_path / "tiny" / "in")
    size = make_decoder(tmp_path / "in")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    command = [sys.executable, str(CONVERT), "-i"]
    least = peak([*command, str(tmp_path / "tiny" / "in"), "-o", str(tmp_path / "tiny" / "out/")])
    most = peak([*command, str(tmp_path / "in"), "-o", str(tmp_path / "out/")])
    assert size > 800e6
    assert most - least < size / 4, (most, least, size)


def test_space_is_checked_first(tmp_path: Path) -> None:
    """A disk that is too small is told before the work begins: exit 7 with both sizes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "in.pth")
        result = run_cli("-i", str(tmp_path / "in.pth"), "-o", str(disk / "x.onnx"), "--model-class", "resnet18")
        check_error(result, 7, "46.", "are needed", "are free")
        assert "export" not in result.err
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
