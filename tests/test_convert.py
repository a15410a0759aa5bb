"""Each kind of file becomes an ONNX model that gives PyTorch's own answers in ONNX Runtime, in another process."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from forked import run_forked
from helpers import Result, axes, check_error, lines, onnx_outputs
from torch import nn

# Classes of a user's own package, put on PYTHONPATH.
PACKAGE = '''
import collections
import torch
from torch import nn

Pair = collections.namedtuple("Pair", "first second")

class Nested(nn.Module):
    """Returns a dictionary with a list, a named tuple, None and a number in it."""
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(6, width)
    def forward(self, x):
        y = self.layer(x)
        return {"logits": y, "hidden": [y * 2, (y + 1, y - 1)], "pair": Pair(y.sum(1), y[:, :1]), "none": None, "n": 3}

class TwoInputs(nn.Module):
    """Uses one input as an image, another as token ids, a third not at all."""
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layer = nn.Linear(6, 8)
    def forward(self, pixels, ids, unused=None):
        return self.layer(pixels)[:, None] + self.embed(ids)

class Sampler(nn.Module):
    """grid_sample exists in ONNX from opset 16 on."""
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
    def forward(self, x):
        grid = x.permute(0, 2, 3, 1)[..., :2].tanh()
        return nn.functional.grid_sample(self.conv(x), grid, align_corners=False)
'''


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `own.nets` can be imported."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "own").mkdir()
    (folder / "own" / "__init__.py").touch()
    (folder / "own" / "nets.py").write_text(PACKAGE)
    return {**os.environ, "PYTHONPATH": str(folder)}


def own_class(name: str, **arguments: Any) -> nn.Module:
    """The class as a user would import it, apart from the product."""
    space: dict[str, Any] = {"__name__": "own_nets"}
    exec(PACKAGE, space)  # noqa: S102  (the text above)
    torch.manual_seed(1)
    return space[name](**arguments).eval()


def convert(source: Path, target: Path, *options: str, **settings: Any) -> Result:
    """Convert and expect success."""
    result = run_forked("-i", str(source), "-o", str(target), *options, **settings)
    assert result.code == 0, result.err
    return result


def same(model: nn.Module, target: Path, *shapes: tuple[int, ...], dtype: type = np.float32) -> None:
    """ONNX Runtime's single output equals PyTorch's for seeded inputs of each shape."""
    for seed, shape in enumerate(shapes):
        given = np.random.default_rng(seed).normal(size=shape).astype(dtype)
        with torch.no_grad():
            expected = model(torch.from_numpy(given)).numpy()
        actual = next(iter(onnx_outputs(target, {next(iter(axes(target))): given}).values()))
        assert actual.dtype == expected.dtype
        tolerance = 1e-2 if dtype is np.float16 else 1e-4
        np.testing.assert_allclose(
            actual, expected, rtol=tolerance * 10, atol=tolerance * float(np.abs(expected).max())
        )
        assert np.ptp(expected) > 0


@pytest.mark.parametrize(
    ("name", "what", "opset"),
    [
        ("flat.pt", "a complete model (torch.nn.modules.container.Sequential)", 14),
        ("legacy.pt", "a complete model (torch.nn.modules.container.Sequential)", 14),
        ("scripted.pt", "TorchScript (Sequential)", 14),
        ("traced.pt", "TorchScript (Sequential)", 14),
        ("static.pt2", "an exported program", 14),
        ("dynamic.pt2", "an exported program", 18),
    ],
)
def test_kinds_are_told_by_content(name: str, what: str, opset: int, models: Path, tmp_path: Path) -> None:
    """A misleading suffix changes nothing; one [INFO] line says the kind, the mode and the reason."""
    source = shutil.copy(models / name, tmp_path / "weights.bin")
    result = convert(source, tmp_path / "m.onnx", "--json")
    assert (
        len([line for line in lines(result, "INFO") if line.startswith("mode: pytorch; weights.bin holds " + what)])
        == 1
    )
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset
    flat = torch.load(models / "flat.pt", weights_only=False)
    if name == "static.pt2":
        assert axes(tmp_path / "m.onnx") == {"input": [2, 13], "output": [2, 3]}
        same(flat, tmp_path / "m.onnx", (2, 13))
    else:
        assert axes(tmp_path / "m.onnx") == {"input": ["batch_size", 13], "output": ["batch_size", 3]}
        same(flat, tmp_path / "m.onnx", (1, 13), (3, 13), (7, 13))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_forced_exporters_on_archives(exporter: str, models: Path, tmp_path: Path) -> None:
    """--exporter forces one rung, for a ScriptModule too."""
    result = convert(models / "scripted.pt", tmp_path / "m.onnx", "--exporter", exporter, "--opset", "18")
    assert f"export: {exporter}, opset 18" in result.err
    same(torch.load(models / "flat.pt", weights_only=False), tmp_path / "m.onnx", (1, 13), (5, 13))


def test_wrapped_and_half_precision(models: Path, tmp_path: Path) -> None:
    """DataParallel is unwrapped; a half-precision model stays one where --dtype says so."""
    flat = torch.load(models / "flat.pt", weights_only=False)
    torch.save(nn.DataParallel(flat), tmp_path / "parallel.pt")
    convert(tmp_path / "parallel.pt", tmp_path / "m.onnx")
    same(flat, tmp_path / "m.onnx", (3, 13))
    half = torch.load(models / "flat.pt", weights_only=False).half()
    torch.save(half, tmp_path / "half.pt")
    convert(tmp_path / "half.pt", tmp_path / "h.onnx", "--dtype", "fp16")
    same(half, tmp_path / "h.onnx", (3, 13), dtype=np.float16)


def test_torchvision_and_timm_pickles(tmp_path: Path) -> None:
    """Complete pickles of library models, without a flag, at the size that their library tells."""
    import timm

    torch.manual_seed(0)
    for model, size in (
        (torchvision.models.mobilenet_v3_small(), 224),
        (timm.create_model("efficientvit_b0"), 224),
        (torchvision.models.VisionTransformer(64, 32, 2, 4, 64, 128, num_classes=7), 64),
    ):
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        torch.save(model.eval(), tmp_path / "model.pt")
        result = convert(tmp_path / "model.pt", tmp_path / "m.onnx")
        assert f"input: 1,3,{size},{size}" in result.err
        assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 14
        same(model, tmp_path / "m.onnx", (1, 3, size, size), (3, 3, size, size))


def test_state_dict_of_seven_classes(tmp_path: Path) -> None:
    """The output size is told by the weights; wrappers' prefixes come off; nested checkpoints are found."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    weights = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": weights}, tmp_path / "checkpoint.pth")
    result = convert(tmp_path / "checkpoint.pth", tmp_path / "m.onnx", "--model-class", "resnet18")
    assert "their shapes tell num_classes=7" in result.err
    assert axes(tmp_path / "m.onnx")["output"] == ["batch_size", 7]
    same(model, tmp_path / "m.onnx", (1, 3, 224, 224), (2, 3, 224, 224))


@pytest.mark.parametrize("name", ["inception_v3", "googlenet", "mnasnet0_5", "vit_b_32"])
def test_weights_are_loaded_as_they_are(name: str) -> None:
    """Classes that initialise slowly, have auxiliary heads or want module versions: every tensor arrives, at once."""
    import convert as product

    torch.manual_seed(0)
    slow = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    weights = torchvision.models.get_model(name, weights=None, **slow).state_dict()
    start = time.monotonic()
    loaded = product.model_from_weights(name, {}, weights, {}).state_dict()
    assert time.monotonic() - start < 20
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_segmentation_with_an_auxiliary_head(tmp_path: Path) -> None:
    """Two outputs under the model's own keys; five classes and the head are told by the weights."""
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    ).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    result = convert(
        tmp_path / "w.pth", tmp_path / "m.onnx", "--model-class", "lraspp_mobilenet_v3_large",
        "--input-shape", "1,3,96,96", "--dynamic-axes", "2,3",
    )  # fmt: skip
    assert "num_classes=5" in result.err
    assert axes(tmp_path / "m.onnx")["input"] == ["batch_size", 3, "height", "width"]
    given = torch.randn(2, 3, 80, 112)
    with torch.no_grad():
        expected = model(given)["out"].numpy()
    actual = onnx_outputs(tmp_path / "m.onnx", {"input": given.numpy()})["out"]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * float(np.abs(expected).max()), rtol=1e-3)


def test_own_class_with_nested_outputs(package: dict[str, str], tmp_path: Path) -> None:
    """Arguments from --model-args, safetensors weights, and stable names for every tensor of the output."""
    from safetensors.torch import save_file

    model = own_class("Nested", width=5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    options = ("--model-class", "own.nets:Nested", "--model-args", '{"width": 5}')
    convert(tmp_path / "w.safetensors", tmp_path / "m.onnx", *options, env=package)
    given = torch.randn(4, 6)
    with torch.no_grad():
        found = model(given)
    expected = {
        "logits": found["logits"],
        "hidden_0": found["hidden"][0],
        "hidden_1_0": found["hidden"][1][0],
        "hidden_1_1": found["hidden"][1][1],
        "pair_first": found["pair"].first,
        "pair_second": found["pair"].second,
    }
    actual = onnx_outputs(tmp_path / "m.onnx", {"input": given.numpy()})
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(actual[name], tensor.numpy(), atol=1e-5)


def test_two_inputs_by_name(package: dict[str, str], tmp_path: Path) -> None:
    """Without shapes the error says what to pass; named and typed shapes in any order are bound by name."""
    model = own_class("TwoInputs")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    source, target = tmp_path / "w.pth", tmp_path / "m.onnx"
    options = ("--model-class", "own.nets:TwoInputs")
    failed = run_forked("-i", str(source), "-o", str(target), *options, env=package)
    check_error(failed, 2, "takes 2 inputs (pixels, ids): pass --input-shape pixels:SHAPE ids:SHAPE")
    shapes = ("--input-shape", "ids:1,5:int64", "pixels:1,6", "--dynamic-axes", "ids:1=tokens")
    convert(source, target, *options, *shapes, env=package)
    assert axes(target)["ids"] == ["batch_size", "tokens"]
    pixels, ids = torch.randn(3, 6), torch.randint(0, 50, (3, 9))
    with torch.no_grad():
        expected = model(pixels, ids).numpy()
    actual = onnx_outputs(target, {"pixels": pixels.numpy(), "ids": ids.numpy()})["output"]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_an_input_that_does_nothing_stays(package: dict[str, str], tmp_path: Path) -> None:
    """The graph has as many inputs as the model was given, with a [WARN] for the one without influence."""
    model = own_class("TwoInputs")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    shapes = ("--input-shape", "pixels:1,6", "ids:1,5:int64", "unused:1,2")
    options = ("--model-class", "own.nets:TwoInputs", *shapes)
    result = convert(tmp_path / "w.pth", tmp_path / "m.onnx", *options, env=package)
    assert list(axes(tmp_path / "m.onnx"))[:3] == ["pixels", "ids", "unused"]
    assert any("unused has no influence" in line for line in lines(result, "WARN"))


@pytest.mark.parametrize("opset", [9, 17, 21, 25])
def test_the_opset_asked_for_is_delivered(opset: int, models: Path, tmp_path: Path) -> None:
    """Exactly that one, whichever exporter made it."""
    convert(models / "image.pt", tmp_path / "m.onnx", "--opset", str(opset), "--input-shape", "1,3,16,16")
    assert [(entry.domain, entry.version) for entry in onnx.load(tmp_path / "m.onnx").opset_import] == [("", opset)]
    same(torch.load(models / "image.pt", weights_only=False), tmp_path / "m.onnx", (1, 3, 16, 16), (3, 3, 16, 16))


def test_an_operator_that_needs_a_higher_opset(package: dict[str, str], tmp_path: Path) -> None:
    """Without --opset the lowest that works, with a [WARN] that names the operator; with it, an error that names it."""
    model = own_class("Sampler")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    options = ("--model-class", "own.nets:Sampler", "--input-shape", "1,3,8,8")
    source, target = tmp_path / "w.pth", tmp_path / "m.onnx"
    failed = run_forked("-i", str(source), "-o", str(target), *options, "--opset", "14", env=package)
    assert failed.code == 5
    assert "grid_sampler" in lines(failed, "ERROR")[0]
    assert "opset 16 works: pass --opset 16" in lines(failed, "ERROR")[0]
    assert not target.exists()
    result = convert(source, target, *options, env=package)
    warning = next(line for line in lines(result, "WARN") if "instead of 14" in line)
    assert warning.startswith("opset 16 instead of 14")
    assert "grid_sampler" in warning
    assert onnx.load(target).opset_import[0].version == 16
    same(model, target, (1, 3, 8, 8), (3, 3, 8, 8))


def test_dynamo_never_writes_another_opset(models: Path, tmp_path: Path) -> None:
    """Asked for 14 it would silently write 18."""
    result = run_forked(
        "-i", str(models / "flat.pt"), "-o", str(tmp_path / "m.onnx"), "--exporter", "dynamo", "--opset", "14"
    )
    check_error(result, 2, "--exporter dynamo writes opset 18 and up")
    warned = convert(models / "flat.pt", tmp_path / "m.onnx", "--exporter", "dynamo")
    assert lines(warned, "WARN") == ["opset 18 instead of 14: the dynamo exporter starts there"]


def test_detection(tmp_path: Path) -> None:
    """Stable names, a batch that is fixed with a word about it, free height and width, real detections that agree."""
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.5, box_detections_per_img=5
    ).eval()
    for module in model.modules():  # statistics of one batch, and scores that are far apart
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 1.0
    with torch.no_grad():
        model.backbone(torch.randn(2, 3, 224, 224))
        model.eval().roi_heads.box_predictor.cls_score.weight.mul_(75)
        model([torch.rand(3, 224, 224)])  # a trained model has been called
    torch.save(model, tmp_path / "model.pt")
    result = convert(tmp_path / "model.pt", tmp_path / "m.onnx", "--dynamic-axes", "2,3")
    assert any("the batch axis is fixed at 1" in line for line in lines(result, "WARN"))
    names = axes(tmp_path / "m.onnx")
    assert list(names) == ["input", "boxes", "labels", "scores"]
    assert names["input"] == [1, 3, "height", "width"]
    given = torch.rand(1, 3, 200, 240)
    with torch.no_grad():
        expected = model(given)[0]
    actual = onnx_outputs(tmp_path / "m.onnx", {"input": given.numpy()})
    assert len(expected["scores"]) > 0
    np.testing.assert_allclose(actual["scores"], expected["scores"].numpy(), atol=1e-3)
