"""Folders that timm writes for the hub, judged by ONNX Runtime against the model that was saved."""

import json
import os
from pathlib import Path
from typing import Any

import forked
import numpy as np
import onnx
import pytest
import timm
import torch
from forked import convert_folder
from helpers import axes, edit_config, onnx_outputs

Settings = dict[str, Any]


class Marker:
    """Whose pickle makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def make(folder: Path, name: str, *, safe: bool = True, labels: list[str] | None = None, **settings: Any) -> Any:
    """A model of timm with drawn weights and statistics, saved as timm does for the hub."""
    torch.manual_seed(0)
    model = timm.create_model(name, **settings).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
    config = {"label_names": labels} if labels else None
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=safe)
    return model


def judge(model: Any, folder: Path, output: str) -> None:
    """The graph's one output at two batch sizes, for images of the size in config.json."""
    size = json.loads((folder / "in" / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]["input_size"]
    graph = folder / "out" / "model.onnx"
    assert {name: sizes[0] for name, sizes in axes(graph).items()} == {
        "pixel_values": "batch_size",
        output: "batch_size",
    }
    assert axes(graph)["pixel_values"] == ["batch_size", *size]
    for batch in (1, 4):
        images = torch.randn(batch, *size)
        expected = model(images).detach().numpy()
        actual = onnx_outputs(graph, {"pixel_values": images.numpy()})[output]
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("test_resnet", {"num_classes": 5}),
        ("test_resnet", {"num_classes": 5, "safe": False}),
        ("test_efficientnet", {"num_classes": 3, "in_chans": 1}),
        ("test_vit", {"num_classes": 7, "global_pool": "avg", "class_token": False}),
        # whose tables of positions are computed, and not in the file
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 112, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
        ),
    ],
    ids=str,
)
def test_classifiers(tmp_path: Path, name: str, settings: Settings) -> None:
    """pixel_values of any batch in, logits out, and config.json beside the graph."""
    model = make(tmp_path / "in", name, **settings)
    assert "of timm for image-classification" in convert_folder(tmp_path)
    judge(model, tmp_path, "logits")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "config.json"}


def test_features(tmp_path: Path) -> None:
    """No classes: the pooled features."""
    model = make(tmp_path / "in", "test_resnet", num_classes=0)
    assert "feature-extraction" in convert_folder(tmp_path)
    judge(model, tmp_path, "pooler_output")
    assert "it can do: feature-extraction" in convert_folder(tmp_path, "--task", "image-classification", code=2)


def test_what_the_graph_says(tmp_path: Path) -> None:
    """Labels, preprocessing and task are in its metadata; --dtype is that of its weights."""
    make(tmp_path / "in", "test_resnet", num_classes=2, labels=["cat", "dog"])
    convert_folder(tmp_path, "--dtype", "fp16")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["id2label"]) == {"0": "cat", "1": "dog"}
    assert json.loads(facts["preprocessing"])["size"] == [3, 160, 160]
    assert facts["task"] == "image-classification"
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "resnet_of_mine"}, "knows no architecture 'resnet_of_mine'"),
        ({"architecture": "hf-hub:some/model"}, "'hf-hub:some/model', which names no architecture of timm"),
        ({"architecture": ["x"]}, "architecture is a list of 1 entries, not a string"),
        ({"architecture": "test_resnet", "num_classes": 9, "model_args": {}}, "fc.weight is 5x96, not 9x96"),
        ({"architecture": "test_vit"}, "do not fit test_vit"),
        ({"model_args": {"no_such": 1}}, "'no_such' with the value 1, which does not describe a network"),
        ({"model_args": {"no_depth": 1}}, "cannot build test_resnet"),
        ({"model_args": {"features_only": True}}, "features_only"),
        ({"model_args": 7}, "model_args holds 7, not an object"),
        ({"pretrained_cfg": {"input_size": "large"}}, "input_size is 'large', not 3 whole numbers"),
        ({"pretrained_cfg": {"input_size": [3, -5, 160]}}, "not 3 whole numbers from 1 to 2560"),
    ],
)
def test_bad_folders(tmp_path: Path, changes: Settings, words: str) -> None:
    """One [ERROR] line that says what does not fit."""
    make(tmp_path / "in", "test_resnet", num_classes=5)
    edit_config(tmp_path / "in", **changes)
    assert words in convert_folder(tmp_path, code=3)


def test_nothing_is_executed(tmp_path: Path) -> None:
    """Neither weights that are a program, nor a file that config.json has timm load."""
    make(tmp_path / "in", "test_resnet", num_classes=5)
    torch.save(Marker(tmp_path / "ran"), tmp_path / "in" / "weights.pth")
    edit_config(tmp_path / "in", model_args={"checkpoint_path": str(tmp_path / "in" / "weights.pth")})
    assert "checkpoint_path" in convert_folder(tmp_path, code=3)
    edit_config(tmp_path / "in", model_args={})
    (tmp_path / "in" / "model.safetensors").unlink()
    (tmp_path / "in" / "weights.pth").rename(tmp_path / "in" / "pytorch_model.bin")
    convert_folder(tmp_path, code=4)
    assert not (tmp_path / "ran").exists()


def test_inspect(tmp_path: Path) -> None:
    """--inspect names the architecture."""
    make(tmp_path / "in", "test_resnet", num_classes=5)
    outcome = forked.convert_in_child(tmp_path / "in", tmp_path, "--inspect")
    assert "a Hugging Face model (timm)" in outcome.err
    assert "class: test_resnet" in outcome.err
