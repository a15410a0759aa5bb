"""Which inputs the model is called with when nobody says, and which axes are really free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from forked import run_forked
from helpers import axes, check_error, lines, onnx_outputs
from torch import nn


def lenet() -> nn.Module:
    """One channel, and a size that only the layer behind the flattening tells."""
    return nn.Sequential(nn.Conv2d(1, 4, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 12 * 12, 10))


TOLD = {
    "one-channel": (lenet, "1,1,28,28", "the first layer (Conv2d)", ["batch_size", 1, 28, 28]),
    "features": (lambda: nn.Sequential(nn.Linear(20, 3)), "1,20", "the first layer (Linear)", ["batch_size", 20]),
    "audio": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 9), nn.AdaptiveAvgPool1d(1)),
        "1,2,16000",
        "the first layer (Conv1d)",
        ["batch_size", 2, 16000],
    ),
    "volume": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1)),
        "1,1,16,112,112",
        "the first layer (Conv3d)",
        ["batch_size", 1, 16, 112, 112],
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)),
        "1,16:int64",
        "the first layer (Embedding)",
        ["batch_size", 16],
    ),
    "batch-second": (lambda: nn.LSTM(5, 6), "16,1,5", "the first layer (LSTM)", [16, "batch_size", 5]),
    "generator": (
        lambda: nn.Sequential(nn.ConvTranspose2d(10, 4, 4), nn.ReLU(), nn.ConvTranspose2d(4, 1, 4, 2)),
        "1,10,1,1",
        "the first layer (ConvTranspose2d)",
        ["batch_size", 10, 1, 1],
    ),
    "library": (
        lambda: torchvision.models.inception_v3(init_weights=False),
        "1,3,299,299",
        "torchvision Inception_V3_Weights.IMAGENET1K_V1",
        ["batch_size", 3, 299, 299],
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_shapes_that_the_model_tells(name: str, tmp_path: Path) -> None:
    """The shape is taken, and the log says which and by what it was told."""
    build, shape, reason, expected = TOLD[name]
    torch.manual_seed(0)
    torch.save(build().eval(), tmp_path / "model.pt")
    result = run_forked("-i", str(tmp_path / "model.pt"), "-o", str(tmp_path / "m.onnx"))
    assert result.code == 0, result.err
    assert f"input: {shape}, told by {reason} (--input-shape overrides)" in lines(result, "INFO")
    assert axes(tmp_path / "m.onnx")["input"] == expected


def test_recorded_inputs(models: Path, tmp_path: Path) -> None:
    """A traced archive and an exported program record what they were made with."""
    for name in ("traced.pt", "dynamic.pt2"):
        result = run_forked("-i", str(models / name), "-o", str(tmp_path / "m.onnx"))
        assert "input: 2,13:float32, told by the inputs recorded in the file" in result.err


def test_nothing_tells(tmp_path: Path) -> None:
    """A model without layers that tell, and that rejects the default: the error says what to pass."""
    torch.save(nn.Sequential(nn.Flatten(), nn.Bilinear(3, 3, 2)).eval(), tmp_path / "model.pt")
    result = run_forked("-i", str(tmp_path / "model.pt"), "-o", str(tmp_path / "m.onnx"))
    check_error(result, 2, "pass the right --input-shape, such as 1,3,224,224")


def test_named_and_typed_shape(tmp_path: Path) -> None:
    """A name becomes the graph's, a dtype is used."""
    torch.save(nn.Sequential(nn.Linear(4, 2)).double().eval(), tmp_path / "model.pt")
    arguments = ("-i", str(tmp_path / "model.pt"), "-o", str(tmp_path / "m.onnx"), "--input-shape")
    result = run_forked(*arguments, "rows:5,4:float64")
    assert result.code == 0, result.err
    assert axes(tmp_path / "m.onnx") == {"rows": ["batch_size", 4], "output": ["batch_size", 2]}
    assert onnx_outputs(tmp_path / "m.onnx", {"rows": np.ones((2, 4))})["output"].dtype == np.float64
    assert "rows:1x4; rows:3x4" in run_forked(*arguments, "rows:5,4").err


def test_free_height_and_width(models: Path, tmp_path: Path) -> None:
    """Named axes at sizes that neither the export nor the product's verification used."""
    image = torch.load(models / "image.pt", weights_only=False)
    target = tmp_path / "m.onnx"
    result = run_forked("-i", str(models / "image.pt"), "-o", str(target), "--dynamic-axes", "input:2=rows,3")
    assert result.code == 0, result.err
    assert axes(target) == {"input": ["batch_size", 3, "rows", "width"], "output": ["batch_size", 2, "rows", "width"]}
    given = torch.randn(2, 3, 17, 41)
    with torch.no_grad():
        expected = image(given).numpy()
    np.testing.assert_allclose(onnx_outputs(target, {"input": given.numpy()})["output"], expected, atol=1e-5)


def test_free_time_of_audio(tmp_path: Path) -> None:
    """The length of a Conv1d model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 9, stride=2), nn.ReLU(), nn.Conv1d(4, 2, 3)).eval()
    torch.save(model, tmp_path / "model.pt")
    target = tmp_path / "m.onnx"
    result = run_forked("-i", str(tmp_path / "model.pt"), "-o", str(target), "--dynamic-axes", "2=time")
    assert result.code == 0, result.err
    assert axes(target)["input"] == ["batch_size", 1, "time"]
    given = torch.randn(1, 1, 777)
    with torch.no_grad():
        expected = model(given).numpy()
    np.testing.assert_allclose(onnx_outputs(target, {"input": given.numpy()})["output"], expected, atol=1e-5)


def test_static(models: Path, tmp_path: Path) -> None:
    """No free axis at all."""
    result = run_forked(
        "-i", str(models / "flat.pt"), "-o", str(tmp_path / "m.onnx"), "--static", "--input-shape", "4,13"
    )
    assert result.code == 0, result.err
    assert axes(tmp_path / "m.onnx") == {"input": [4, 13], "output": [4, 3]}


# Scripts keep control flow; tracing bakes it in. The class is made by the test and saved as a trace.
class Baked(nn.Module):
    """Adds a table that tracing turns into a constant of the traced length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Positions as a Python list."""
        return x + torch.tensor([float(i) for i in range(int(x.shape[1]))])


class Branch(nn.Module):
    """Takes a side by the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Doubles or negates."""
        return x * 2 if bool(x.mean() > 0.1) else -x


def test_axes_that_are_baked_are_refused(tmp_path: Path) -> None:
    """A traced archive with a baked length rejects other sizes itself: the axis cannot be freed."""
    torch.jit.save(torch.jit.trace(Baked(), torch.randn(2, 40)), str(tmp_path / "model.pt"))
    source, target = str(tmp_path / "model.pt"), str(tmp_path / "m.onnx")
    check_error(run_forked("-i", source, "-o", target, "--dynamic-axes", "1"), 2, "no other sequence_length than 40")
    assert run_forked("-i", source, "-o", target).code == 0


USER_CODE = """
import torch
from torch import nn
class Baked(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
    def forward(self, x):
        return x * self.w + torch.tensor([float(i) for i in range(int(x.shape[1]))])
class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
    def forward(self, x):
        return x * 2 * self.w if bool(x.mean() > 0.1) else -x * self.w
"""


@pytest.mark.parametrize("name", ["Baked", "Branch"])
def test_what_tracing_bakes_is_never_accepted(name: str, tmp_path: Path) -> None:
    """PyTorch accepts other sizes and values, the traced graph does not follow: refused, or right; never wrong."""
    (tmp_path / "user.py").write_text(USER_CODE)
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    arguments = ("-i", str(tmp_path / "w.pth"), "-o", str(tmp_path / "m.onnx"), "--model-class", f"user:{name}")
    result = run_forked(*arguments, "--input-shape", "2,40", "--dynamic-axes", "1", env={"PYTHONPATH": str(tmp_path)})
    assert result.code == 6, result.err
    assert "torchscript, opset 14: " in lines(result, "ERROR")[0]
    assert not (tmp_path / "m.onnx").exists()
