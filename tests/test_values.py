"""Proved on the values that users have: branches, signs, sizes and types of numbers that few drawn inputs show."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from forked import run_forked
from helpers import axes, check_error, lines, onnx_outputs

MODELS = """
import torch
import torch.nn.utils.prune
import torchvision
from torch import nn

class Scaled(nn.Module):  # images of bytes are scaled, others are not
    def forward(self, x):
        if x.max() > 10:
            x = x / 255.0
        return x.mean((2, 3))

class Guarded(nn.Module):  # no input that anybody would draw takes this branch
    def forward(self, x):
        if x.sum() > 1e30:
            x = x * 2
        return x.abs().log1p()

class BySize(nn.Module):  # sizes decide, and the graph is compared at several
    def forward(self, x):
        return x * 2 if x.shape[-1] > 3 else x

class Halves(nn.Module):
    def forward(self, x):
        return x // 2, x % 3

class Histogram(nn.Module):
    def forward(self, image):
        bins = (image.int() >> 5).reshape(image.shape[0], -1).long()
        return torch.zeros(image.shape[0], 8).scatter_add(1, bins, torch.ones(bins.shape))

class LogSigmoid(nn.Module):
    def forward(self, x):
        return nn.functional.logsigmoid(x)

class Twice(nn.Module):
    def forward(self, x):
        y = x.exp()
        return {"y": y, "same": y, "left-eye": x + 1, "left eye": x + 2, "nested": [x + 3, x + 4], "nested_1": x + 5}

class Squeezed(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)).squeeze()

class Transposed(nn.Module):  # the batch comes first, although the layer wants it second
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 5)

    def forward(self, x):
        return self.rnn(x.transpose(0, 1))[0][-1]

class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 5)

    def forward(self, x):
        return self.rnn(x)[0]

class Lengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]

class Named(nn.Module):
    def forward(self, *, values):
        return values * 2

class Pruned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        nn.utils.prune.l1_unstructured(self.linear, "weight", 0.5)

    def forward(self, x):
        return self.linear(x)

class Looped(nn.Module):
    def forward(self, x, where, steps):
        i = 0
        while i < int(steps):
            x = torch.tanh(x + torch.zeros_like(x).scatter_add(0, where[:, None].expand(-1, 4), x[where]))
            i += 1
        return x

class Suppressed(nn.Module):
    def forward(self, x):
        return x[torchvision.ops.nms(x[:, :4], x[:, 4], 0.5)]

class Logarithm(nn.Module):
    def forward(self, x):
        return x.log() + (1 - x).log()

class Angle(nn.Module):
    def forward(self, x):
        return torch.atan2(x[:, 0], x[:, 1])

class Diagonal(nn.Module):
    def forward(self, x):
        return torch.diagonal(x)

class Best(nn.Module):
    def forward(self, x):
        return x.topk(2)

class Entries(nn.Module):
    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, features):
        return self.u(features["u"]) - self.v(features["v"])

class Listed(nn.Module):
    def forward(self, images):
        return images[0] * 2 - images[1]

class Resized(nn.Module):
    def forward(self, x, size):
        return nn.functional.interpolate(x, size=(int(size[0]), int(size[1])))

class Chosen(nn.Module):
    def forward(self, x, kind):
        return {55: x, 77: x * 2}[int(kind[0])]

class Sampled(nn.Module):
    def forward(self, x, rate: int):
        if rate not in (8000, 16000):
            raise ValueError("not such a rate")
        return x[:, ::2] if rate == 16000 else x

class Rows(nn.Module):  # a list of as many entries as the batch that it is traced with
    def forward(self, x):
        return torch.stack([row * (place + 1) for place, row in enumerate(x.unbind())]) + len(x.tolist())

class Summed(nn.Module):  # a first input of one row is taken for any batch
    def forward(self, x, a, b):
        return torch.addbmm(x, a, b)

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.LazyConv2d(4, 3), nn.LazyLinear(3)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))

class Spectrogram(nn.Module):
    def forward(self, x):
        parts = torch.stft(x, 64, 16, window=torch.hann_window(64), center=False, return_complex=True)
        return torch.view_as_real(parts).permute(0, 3, 1, 2)

class Counting(nn.Module):  # remembers the largest value so far
    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest = torch.maximum(self.largest, x.abs().max())
        return x / (1 + self.largest)
"""


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of models, and each of them as a complete pickle."""
    folder = tmp_path_factory.mktemp("values")
    (folder / "value_models.py").write_text(MODELS)
    return folder


def convert(classes: Path, name: str, out: Path, *options: str) -> Any:
    """Convert the model of a class; returns the result and the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(classes)
        patch.setenv("PYTHONPATH", str(classes))
        spec = importlib.util.find_spec("value_models")
        assert spec is not None
        module = importlib.import_module("value_models")
        torch.manual_seed(0)
        model = getattr(module, name)().eval()
        torch.save(model, out / "input.pt")
        command = ("-i", str(out / "input.pt"), "-o", str(out / "model.onnx"), "--allow-class", f"value_models.{name}")
        return run_forked(*command, *options), model


def largest_difference(model: Any, path: Path, value: torch.Tensor) -> float:
    """Of ONNX Runtime's outputs from PyTorch's, which are as many and of the same shapes."""
    with torch.no_grad():
        expected = model(value.clone())
    name = next(iter(axes(path)))
    found = list(onnx_outputs(path, {name: value.numpy()}).values())

    def flat(item: Any) -> list[np.ndarray]:
        if isinstance(item, torch.Tensor):
            return [item.numpy()]
        return [array for entry in (item.values() if isinstance(item, dict) else item) for array in flat(entry)]

    wanted = flat(expected)
    assert [(array.shape, array.dtype) for array in found] == [(array.shape, array.dtype) for array in wanted]
    return max(float(np.abs(a * 1.0 - b).max(initial=0)) for a, b in zip(found, wanted, strict=True))


SIGNS = (0.0, -0.0, 1.0, -1.0, 3.0, -5.0)


def numbers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Seeded integers."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("Halves", ("--input-shape", "1,6:int64"), lambda: numbers(-50, 50, 4, 6)),
        ("Histogram", ("--input-shape", "1,3,8,8:uint8"), lambda: numbers(0, 256, 2, 3, 8, 8, dtype=torch.uint8)),
        ("LogSigmoid", ("--input-shape", "1,4"), lambda: torch.tensor([[-300.0, 200.0, 9.0, -1.0]])),
        ("Twice", ("--input-shape", "1,4"), lambda: torch.randn(3, 4)),
        ("Squeezed", ("--input-shape", "1,3,8,8"), lambda: torch.randn(4, 3, 8, 8)),
        ("Squeezed", ("--input-shape", "2,3,8,8"), lambda: torch.randn(1, 3, 8, 8)),
        ("Transposed", ("--input-shape", "1,20,6"), lambda: torch.randn(4, 20, 6)),
        ("SequenceFirst", ("--input-shape", "20,1,6"), lambda: torch.randn(20, 4, 6)),
        ("BySize", ("--input-shape", "1,8"), lambda: torch.randn(5, 8)),
        ("Best", ("--input-shape", "1,8"), lambda: torch.randn(3, 8)),
        ("Logarithm", ("--input-shape", "1,8"), lambda: torch.rand(5, 8) * 0.9 + 0.05),
        ("Angle", ("--input-shape", "1,2"), lambda: torch.tensor([[a, b] for a in SIGNS for b in SIGNS])),
        ("Diagonal", ("--input-shape", "5,5:int64", "--static"), lambda: numbers(-9, 9, 5, 5)),
    ],
)
def test_right_there(
    name: str, options: tuple[str, ...], values: Callable[[], torch.Tensor], classes: Path, tmp_path: Path
) -> None:
    """Signs, ranges, ranks, names and batch axes that the traced inputs do not have."""
    result, model = convert(classes, name, tmp_path, *options)
    assert result.code == 0, result.err
    assert largest_difference(model, tmp_path / "model.onnx", values()) < 1e-4


def test_ties(classes: Path, tmp_path: Path) -> None:
    """Which of equal values comes first is nobody's promise: it is told, and no reason to refuse the model."""
    result, _ = convert(classes, "Best", tmp_path, "--input-shape", "1,8")
    assert any("ties decide output_1" in line for line in lines(result, "WARN")), result.err


def test_names_that_collide(classes: Path, tmp_path: Path) -> None:
    """Each tensor is an output of its own, in PyTorch's order, under a name of its own."""
    result, _ = convert(classes, "Twice", tmp_path, "--input-shape", "1,4")
    assert result.code == 0, result.err
    names = [output.name for output in onnx.load(tmp_path / "model.onnx").graph.output]
    assert names == ["y", "same", "left_eye", "left_eye_1", "nested_0", "nested_1", "nested_1_1"]


def test_a_branch_that_values_take(classes: Path, tmp_path: Path) -> None:
    """A trace that keeps one side of a branch is refused, with the line that decides and the values that show it."""
    result, _ = convert(classes, "Scaled", tmp_path, "--input-shape", "1,3,8,8")
    check_error(result, 6, "(0 to 255)", "decided by values at value_models.py(9)")
    assert not (tmp_path / "model.onnx").exists()


def test_a_branch_that_no_value_takes(classes: Path, tmp_path: Path) -> None:
    """Where no drawn value takes the other side, the graph is written, and the line is told."""
    result, model = convert(classes, "Guarded", tmp_path, "--input-shape", "1,4")
    assert result.code == 0, result.err
    assert any("value_models.py(15) reads False" in line for line in lines(result, "WARN")), result.err
    assert largest_difference(model, tmp_path / "model.onnx", torch.randn(2, 4)) < 1e-6
    quiet, _ = convert(classes, "BySize", tmp_path, "--input-shape", "1,8")
    assert not lines(quiet, "WARN")


def test_a_sample_takes_the_branch(classes: Path, tmp_path: Path) -> None:
    """What no drawn value shows, the user's own data do: then the graph is refused."""
    np.savez(tmp_path / "data.npz", x=np.full((2, 4), 1e30, np.float32))
    result, _ = convert(classes, "Guarded", tmp_path, "--verify-data", str(tmp_path / "data.npz"))
    check_error(result, 6, "value_models.py(15)", "(sample data.npz)")


def test_state_that_other_inputs_change(classes: Path, tmp_path: Path) -> None:
    """A model that answers two equal calls alike, and not after others, is told to keep state."""
    result, _ = convert(classes, "Counting", tmp_path, "--input-shape", "1,4")
    check_error(result, 6, "PyTorch itself gives two answers", "changes its own state")


def test_samples(classes: Path, tmp_path: Path) -> None:
    """The first sample tells shapes and dtypes; all are compared and counted."""
    samples = tmp_path / "samples"
    samples.mkdir()
    np.savez(samples / "a.npz", x=np.arange(12).reshape(2, 6))
    np.savez(samples / "b.npz", np.arange(-6, 0).reshape(1, 6))
    result, model = convert(classes, "Halves", tmp_path, "--verify-data", str(samples))
    assert result.code == 0, result.err
    assert "and with 2 samples of yours" in lines(result, "SUCCESS")[0]
    assert largest_difference(model, tmp_path / "model.onnx", numbers(-9, 9, 3, 6)) == 0


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({"x": np.zeros((2, 5))}, ("--input-shape", "1,4"), " is 2x5 in data.npz"),
        ({"x": np.zeros((2, 4)), "y": np.zeros(3)}, ("--input-shape", "1,4"), "data.npz has x, y, the model takes"),
        ({"x": np.array([None])}, (), "is no .npz file of plain arrays"),
        ({}, (), "holds no arrays"),
        ({"x": np.zeros((2, 4))}, ("--no-verify",), "leaves nothing for --verify-data to do"),
    ],
)
def test_samples_that_do_not_fit(
    arrays: dict[str, np.ndarray], options: tuple[str, ...], words: str, classes: Path, tmp_path: Path
) -> None:
    """They are told, and nothing is written."""
    np.savez(tmp_path / "data.npz", **arrays)
    result, _ = convert(classes, "Guarded", tmp_path, "--verify-data", str(tmp_path / "data.npz"), *options)
    check_error(result, 2, "--verify-data", words)


@pytest.mark.parametrize(
    ("name", "options", "inputs"),
    [
        (
            "Entries",
            ("features.u:1,4", "features.v:1,5"),
            lambda: {"features.u": torch.randn(3, 4), "features.v": torch.randn(3, 5)},
        ),
        ("Entries", ("u:1,4", "v:1,5"), lambda: {"features.u": torch.randn(3, 4), "features.v": torch.randn(3, 5)}),
        ("Listed", ("images.0:2,4", "images.1:2,4"), lambda: {f"images.{i}": torch.randn(3, 4) for i in (0, 1)}),
        (
            "Resized",
            ("x:1,3,8,8", "--input-value", "size=6,7"),
            lambda: {"x": torch.randn(2, 3, 8, 8), "size": torch.tensor([6, 7])},
        ),
        ("Spectrogram", ("1,800",), lambda: {"input": torch.randn(2, 800)}),
        ("Named", ("values:1,4",), lambda: {"values": torch.randn(3, 4)}),
        ("Pruned", ("1,4",), lambda: {"input": torch.randn(3, 4)}),
        (
            "Lengths",
            ("x:2,7,6", "lengths:2:int64"),
            lambda: {"x": torch.randn(4, 7, 6), "lengths": torch.tensor([2, 7, 1, 5])},
        ),
    ],
)
def test_what_users_write(
    name: str, options: tuple[str, ...], inputs: Callable[[], dict[str, torch.Tensor]], classes: Path, tmp_path: Path
) -> None:
    """Arguments that have to be named, dicts, lists, sizes, lengths (of which PyTorch rejects zero), pruned weights."""
    result, model = convert(classes, name, tmp_path, "--input-shape", *options)
    assert result.code == 0, result.err
    given = inputs()
    found = onnx_outputs(tmp_path / "model.onnx", {key: value.numpy() for key, value in given.items()})
    with torch.no_grad():
        if name in ("Entries", "Listed"):
            entries = {key.partition(".")[2]: value for key, value in given.items()}
            expected = model(entries if name == "Entries" else list(entries.values()))
        else:
            expected = model(**given) if len(given) > 1 or name == "Named" else model(*given.values())
    np.testing.assert_allclose(next(iter(found.values())), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_scripts_that_need_more(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of torchvision are there when an archive calls them; a later opset has what opset 14 gets wrong."""
    monkeypatch.syspath_prepend(classes)
    module = importlib.import_module("value_models")
    boxes = torch.tensor([[0.0, 0, 9, 9, 0.9], [0, 0, 9, 8, 0.8], [20, 20, 29, 29, 0.7]])
    looped = {"x": torch.randn(5, 4), "where": torch.tensor([0, 1, 1, 3, 4, 0, 1]), "steps": torch.tensor([2])}
    for name, given, options in (
        ("Suppressed", {"input": boxes}, ("3,5", "--static")),
        ("Looped", looped, ("x:5,4:float32", "where:7:int64", "steps:1:int64", "--static")),
    ):
        model = getattr(module, name)().eval()
        torch.jit.save(torch.jit.script(model), str(tmp_path / f"{name}.pt"))
        path = tmp_path / f"{name}.onnx"
        result = run_forked("-i", str(tmp_path / f"{name}.pt"), "-o", str(path), "--input-shape", *options)
        assert result.code == 0, result.err
        names = list(axes(path))[: len(given)]
        arrays = [value.numpy() for value in given.values()]
        found = next(iter(onnx_outputs(path, dict(zip(names, arrays, strict=True))).values()))
        np.testing.assert_allclose(found, model(*given.values()).numpy(), rtol=1e-4, atol=1e-5)


def test_numbers_of_a_script(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument that is a plain number: the error says what to type, and typed it becomes a constant."""
    monkeypatch.syspath_prepend(classes)
    model = importlib.import_module("value_models").Sampled().eval()
    torch.jit.save(torch.jit.script(model), str(tmp_path / "rate.pt"))
    command = ("-i", str(tmp_path / "rate.pt"), "-o", str(tmp_path / "model.onnx"), "--input-shape", "1,8")
    check_error(run_forked(*command), 5, "argument rate is int", "pass --input-value rate=NUMBER")
    result = run_forked(*command, "--input-value", "rate=16000")
    assert result.code == 0, result.err
    assert any("rate is 16000 in the graph" in line for line in lines(result, "WARN"))
    value = torch.randn(3, 8)
    found = next(iter(onnx_outputs(tmp_path / "model.onnx", {"input": value.numpy()}).values()))
    np.testing.assert_array_equal(found, model(value, 16000).numpy())


def test_values_from_the_users_data(classes: Path, tmp_path: Path) -> None:
    """Numbers that no drawn ones are: those of the sample are taken, and it is told that nothing else was tried."""
    np.savez(tmp_path / "data.npz", x=np.ones((1, 4), np.float32), kind=np.array([77]))
    result, model = convert(classes, "Chosen", tmp_path, "--verify-data", str(tmp_path / "data.npz"))
    assert result.code == 0, result.err
    assert any("input kind: its values are the same" in line for line in lines(result, "WARN")), result.err
    assert any("value_models.py" in line and "reads 77 from" in line for line in lines(result, "WARN")), result.err
    given = {"x": torch.randn(3, 4), "kind": torch.tensor([77])}
    found = onnx_outputs(tmp_path / "model.onnx", {name: value.numpy() for name, value in given.items()})
    np.testing.assert_allclose(next(iter(found.values())), model(**given).numpy(), rtol=1e-5)


def test_a_batch_that_tracing_fixes(classes: Path, tmp_path: Path) -> None:
    """Delivered with that batch and a warning; refused where the user asked for a free one."""
    result, model = convert(classes, "Rows", tmp_path, "--input-shape", "3,4")
    assert result.code == 0, result.err
    assert any("the batch is fixed (3x4)" in line for line in lines(result, "WARN")), result.err
    assert axes(tmp_path / "model.onnx")["input"] == [3, 4]
    assert largest_difference(model, tmp_path / "model.onnx", torch.randn(3, 4)) < 1e-6
    result, _ = convert(classes, "Rows", tmp_path, "--input-shape", "3,4", "--dynamic-axes", "0")
    assert result.code in (5, 6), result.err


def test_a_batch_that_only_broadcasts(classes: Path, tmp_path: Path) -> None:
    """A batch of 1, or of what another axis has, is not free because of that."""
    result, _ = convert(classes, "Summed", tmp_path, "--input-shape", "x:5,10", "a:5,5,5", "b:5,5,10")
    assert result.code == 0, result.err
    assert axes(tmp_path / "model.onnx")["x"] == [5, 10]


def test_lazy_layers(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They become what they stand for when they are first called, with the weights of a state dict."""
    monkeypatch.syspath_prepend(classes)
    model = importlib.import_module("value_models").Lazy()
    model.eval()(torch.zeros(1, 3, 8, 8))
    torch.save(model.state_dict(), tmp_path / "lazy.pth")
    result = run_forked(
        "-i", str(tmp_path / "lazy.pth"), "-o", str(tmp_path / "model.onnx"), "--model-class", "value_models:Lazy",
        "--input-shape", "1,3,8,8", env={"PYTHONPATH": str(classes)},
    )  # fmt: skip
    assert result.code == 0, result.err
    assert largest_difference(model, tmp_path / "model.onnx", torch.randn(2, 3, 8, 8)) < 1e-5


POOLS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "average": (lambda: torch.nn.AvgPool2d(3, 3, 1, ceil_mode=True), (20, 21)),
    "average of what is there": (
        lambda: torch.nn.AvgPool2d(3, 3, 1, ceil_mode=True, count_include_pad=False),
        (20, 16),
    ),
    "maximum": (lambda: torch.nn.MaxPool2d(3, 3, 1, ceil_mode=True), (20, 16)),
    "adaptive average": (lambda: torch.nn.AdaptiveAvgPool3d((3, 2, 4)), (5, 7, 6)),
    "adaptive maximum": (lambda: torch.nn.AdaptiveMaxPool2d((3, 5)), (8, 9)),
}


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str, last: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Windows that begin in the padding, or of several widths: right, and declared as what comes out, at opset 14."""
    build, size = POOLS[name]
    convolution = torch.nn.Conv3d if len(size) == 3 else torch.nn.Conv2d
    rest = [] if last else [torch.nn.ReLU(), convolution(4, 2, 1)]
    model = torch.nn.Sequential(convolution(3, 4, 1), build(), *rest).eval()
    torch.save(model, tmp_path / "pool.pt")
    shape = ",".join(map(str, (1, 3, *size)))
    command = ("-i", str(tmp_path / "pool.pt"), "-o", str(tmp_path / "model.onnx"), "--input-shape", shape)
    result = run_forked(*command, "--opset", "14")
    assert result.code == 0, result.err
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert largest_difference(model, tmp_path / "model.onnx", torch.randn(2, 3, *size)) < 1e-5
