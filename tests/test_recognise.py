"""Whose weights these are: told by names and shapes, never guessed, and right in ONNX Runtime."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from forked import run_forked
from generators import architectures
from generators.architectures import Described, describe, members, random_weights
from helpers import CONVERT, check_error, lines, onnx_outputs
from torch import nn

import convert
from convert import Recognition, read_architectures, recognise

Shapes = dict[str, tuple[int, ...]]
SECONDS = 2
SEED = 20  # of the sample that is rebuilt


def shapes_of(model: nn.Module) -> Shapes:
    """Names and shapes as they are in the model's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@cache
def timm_shapes(name: str, **arguments: int) -> Shapes:
    """The same of a timm model that has no memory."""
    with torch.device("meta"):
        return shapes_of(timm.create_model(name, pretrained=False, **arguments))


def only(recognition: Recognition) -> str:
    """The one answer."""
    assert len(recognition.candidates) == 1, recognition.explanation
    return recognition.candidates[0][0]


@cache
def indexed() -> dict[str, Described]:
    """The data file's entries by member, in the form of generators/architectures.py."""
    known = read_architectures()
    found = {}
    for layout in known.layouts:
        value = Described(
            {known.names[number]: known.sizes[number] for number in layout.tensors},
            frozenset(known.names[number] for number in layout.head),
        )
        found.update({member: value for group in layout.groups for member in group})
    return found


def test_the_data_file_is_of_the_pinned_versions() -> None:
    """The file says which versions it was made with: those of requirements.txt, which are installed."""
    import json
    import lzma

    content = json.loads(lzma.decompress(convert.ARCHITECTURES.read_bytes()))
    versions = content["versions"]
    required = dict(re.findall(r"^(\w+)==(\S+)$", CONVERT.with_name("requirements.txt").read_text(), re.MULTILINE))
    assert versions == {name: required[name] for name in ("timm", "torchvision")} == architectures.VERSIONS
    assert [tuple(entry) for entry in content["families"]] == [*architectures.FAMILIES]


def test_the_data_file_has_every_model() -> None:
    """All of torchvision's and timm's lists, no other, each once."""
    listed = [m for layout in read_architectures().layouts for group in layout.groups for m in group]
    assert sorted(listed) == sorted(members())


def test_a_sample_of_the_data_file_built_anew() -> None:
    """Thirty models' entries are what the libraries build now."""
    sample = random.Random(SEED).sample(members(), 30)  # noqa: S311  (nothing secret)
    for member in sample:
        value, expected = describe(member), indexed()[member]
        channels = not member.startswith("torchvision.")  # which share the entry of timm's model of that layout
        tensors = expected.tensors if channels else {k: re.sub("I", "3", v) for k, v in expected.tensors.items()}
        assert value.tensors == tensors, member
        assert not channels or value.head == expected.head, member


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet50", {"num_classes": 7}),
        ("resnet50", {"num_classes": 1000, "in_chans": 1}),
        ("convnext_tiny", {"num_classes": 3, "in_chans": 5}),
        ("vit_tiny_patch16_224", {"num_classes": 0}),
        ("swin_tiny_patch4_window7_224", {"num_classes": 2}),
        ("mobilenetv3_small_050", {"num_classes": 7, "in_chans": 2}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 9}),
        ("tresnet_m", {"num_classes": 7, "in_chans": 1}),
    ],
)
def test_classes_and_channels_are_read_off(name: str, arguments: dict[str, int]) -> None:
    """The arguments found build the same tensors, with the class found and the numbers given."""
    shapes = timm_shapes(name, **arguments)
    found = recognise(shapes)
    assert any(candidate.endswith(name) for candidate in found.candidates[0])
    assert found.arguments["num_classes"] == arguments["num_classes"]
    assert found.arguments.get("in_chans", 3) == arguments.get("in_chans", 3)
    with torch.device("meta"):
        built = convert.resolve_model_class(found.candidates[0][0])(**found.arguments)
    assert shapes_of(built) == shapes


def test_prefixes_and_counters_do_not_matter() -> None:
    """DataParallel, torch.compile, Lightning, profilers, and files from before num_batches_tracked."""
    plain = {name: shape for name, shape in timm_shapes("resnet26", num_classes=4).items() if "num_batches" not in name}
    for prefix in ("module.", "_orig_mod.", "model.", "model.encoder.", "module.model."):
        assert only(recognise({prefix + name: shape for name, shape in plain.items()})) == "resnet26"
    assert only(recognise({**plain, "layer1.total_ops": (1,), "n_averaged": ()})) == "resnet26"


def test_torchvision_comes_first_where_both_libraries_compute_the_same() -> None:
    """resnet34 is torchvision's and timm's; with one channel or without a classifier only timm's can be built."""
    assert recognise(timm_shapes("resnet34", num_classes=7)).candidates == (("resnet34", "timm.models:resnet34"),)
    for arguments in ({"num_classes": 7, "in_chans": 1}, {"num_classes": 0}):
        assert recognise(timm_shapes("resnet34", **arguments)).candidates == (("timm.models:resnet34",),)


def test_models_that_differ_are_all_listed() -> None:
    """The same tensors, another padding or pooling: two candidates, in no shared group."""
    found = recognise(timm_shapes("tf_efficientnet_b0", num_classes=7))
    groups = [group for group in found.candidates if {"timm.models:efficientnet_b0", "tf_efficientnet_b0"} & {*group}]
    assert len(groups) == 2
    assert "need not compute the same" in found.explanation
    found = recognise(timm_shapes("resnet18", num_classes=7))
    assert found.candidates == (("resnet18", "timm.models:resnet18"), ("resnetblur18",))


def test_the_checkpoint_may_name_one_of_several() -> None:
    """The entry `arch` of training scripts settles it, if it is one of those that fit."""
    found = recognise(timm_shapes("tf_efficientnet_b0", num_classes=7))
    assert only(convert.choose_recorded(found, {"arch": "tf_efficientnet_b0"})) == "tf_efficientnet_b0"
    for content in ({}, {"arch": "resnet50"}, {"arch": 7}):
        assert convert.choose_recorded(found, content) == found


def test_the_nearest_are_named_with_what_differs() -> None:
    """One tensor of another shape, a head of the user's own, and nothing alike."""
    shapes = timm_shapes("resnet50", num_classes=7)
    shapes = {**shapes, "layer4.2.conv3.weight": (2048, 512, 3, 3)}
    found = recognise(shapes)
    assert found.candidates == ()
    assert found.explanation.startswith("nearest: resnet50 (1 of 267 tensors differ: layer4.2.conv3.weight is ")
    assert "is 2048x512x3x3, not 2048x512x1x1" in found.explanation
    own_head = {**timm_shapes("resnet26", num_classes=0), "fc.0.weight": (64, 2048), "fc.3.weight": (7, 64)}
    missing = r"fc.(weight|bias) is missing"
    told = rf"nearest: resnet26 \(4 of 149 tensors differ: {missing}, {missing} and 2 more"
    assert re.match(told, recognise(own_head).explanation)
    assert "no model of torchvision or timm" in recognise({"0.weight": (8, 13), "0.bias": (8,)}).explanation


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("BERT", ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight")),
        ("RoBERTa", ("roberta.encoder.layer.0.attention.self.query.weight", "classifier.dense.weight")),
        ("DistilBERT", ("distilbert.transformer.layer.0.attention.q_lin.weight", "classifier.bias")),
        ("GPT-2", ("wte.weight", "h.0.attn.c_attn.weight")),
        ("Llama", ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")),
        ("T5", ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")),
        ("BART", ("model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.encoder_attn.k_proj.weight")),
        ("Whisper", ("model.encoder.conv2.weight", "model.decoder.layers.0.encoder_attn.k_proj.weight")),
        ("CLIP", ("logit_scale", "text_model.encoder.layers.0.self_attn.q_proj.weight")),
        ("ViT", ("vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight")),
        ("wav2vec", ("wav2vec2.feature_extractor.conv_layers.0.conv.weight", "lm_head.weight")),
    ],
)
def test_transformers_families(family: str, names: tuple[str, ...]) -> None:
    """The family by its names, and what is needed to go on."""
    found = recognise(dict.fromkeys(names, (8, 8)))
    assert found.candidates == ()
    assert family in found.explanation
    assert "config.json" in found.explanation


def test_it_answers_in_time() -> None:
    """A recognised and an unknown model in a fresh process, without torch: the processor's time, start included."""
    code = (
        "import json, sys, time, convert; shapes = json.load(sys.stdin); start = time.process_time();"
        "convert.recognise(shapes); shapes.popitem(); shapes['x'] = [1]; convert.recognise(shapes);"
        "print(time.process_time() - start, 'torch' in sys.modules)"
    )
    import json

    text = json.dumps(timm_shapes("tf_efficientnetv2_xl", num_classes=7))
    done = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True, cwd=CONVERT.parent
    )
    seconds, torch_imported = done.stdout.split()
    assert float(seconds) < SECONDS
    assert torch_imported == "False"


def alive(model: nn.Module) -> nn.Module:
    """`model` with weights whose signal reaches the output: an untrained network's may be next to nothing."""
    random_weights(model)
    return model.eval()


def outputs(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Two random images and PyTorch's answers."""
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return images.numpy(), model(images).numpy()


def check_conversion(weights: Path, model: nn.Module, *options: str) -> str:
    """Convert `weights` without --model-class, compare with `model` in ONNX Runtime, return the [INFO] lines."""
    target = weights.with_suffix(".onnx")
    result = run_forked("-i", str(weights), "-o", str(target), *options)
    assert result.code == 0, result.err
    images, expected = outputs(model)
    (actual,) = onnx_outputs(target, {"input": images}).values()
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    return "\n".join(lines(result, "INFO"))


def test_torchvision_weights_need_no_name(tmp_path: Path) -> None:
    """A model of both libraries with seven classes: torchvision's is built."""
    model = alive(torchvision.models.resnet34(num_classes=7))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    told = check_conversion(tmp_path / "weights.pth", model)
    assert "recognised: resnet34 (the same as timm.models:resnet34" in told
    assert "num_classes=7" in told


def test_timm_weights_need_no_name(tmp_path: Path) -> None:
    """A model that only timm has, as Lightning saves it."""
    model = alive(timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=5))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    assert "recognised: mobilenetv3_small_050, num_classes=5" in check_conversion(tmp_path / "last.ckpt", model)


def test_ambiguous_weights_are_a_usage_error_and_the_name_settles_it(tmp_path: Path) -> None:
    """mobilenetv3_small_075's tensors are tf_mobilenetv3_small_075's too; what is named is what is converted."""
    names = ("mobilenetv3_small_075", "tf_mobilenetv3_small_075")
    other, model = (alive(timm.create_model(name, pretrained=False, num_classes=7)) for name in names)
    different, expected = outputs(other)[1], outputs(model)[1]
    assert np.abs(different - expected).max() > 1e-2 * np.abs(expected).max()  # so a guess would be wrong
    weights = tmp_path / "weights.pth"
    torch.save(model.state_dict(), weights)
    result = run_forked("-i", str(weights), "-o", str(tmp_path / "x.onnx"))
    check_error(result, 2, "need not compute the same", *names, "pass --model-class")
    assert not (tmp_path / "x.onnx").exists()
    check_conversion(weights, model, "--model-class", "tf_mobilenetv3_small_075")


def test_unknown_weights_name_the_nearest_or_the_family(tmp_path: Path) -> None:
    """Exit 2 with what differs; weights of transformers ask for their config."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    result = run_forked("-i", str(tmp_path / "own.pth"), "-o", str(tmp_path / "x.onnx"))
    check_error(result, 2, "nearest: resnet18 (6 of 106 tensors differ: fc.", "pass --model-class")
    bert = {"bert.encoder.layer.0.attention.self.query.weight": torch.zeros(4, 4)}
    torch.save(bert, tmp_path / "bert.bin")
    result = run_forked("-i", str(tmp_path / "bert.bin"), "-o", str(tmp_path / "x.onnx"))
    check_error(result, 2, "of transformers (BERT or a relative)", "config.json")


def test_a_missing_data_file_is_told(tmp_path: Path, models: Path) -> None:
    """convert.py alone, without the file beside it."""
    (tmp_path / "convert.py").write_text(CONVERT.read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "convert.py"), "-i", str(models / "flat.pth"), "-o", str(tmp_path / "x.onnx")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "architectures.json.xz cannot be read" in done.stderr


def test_names_of_both_libraries_are_accepted(tmp_path: Path) -> None:
    """--model-class: bare names, explicit forms, and near misses of both libraries."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, package in (
            ("resnet18", "torchvision"),
            ("timm.models:resnet18", "timm"),
            ("torchvision.models:resnet18", "torchvision"),
            ("resnet26", "timm"),
            ("vit_tiny_patch16_224.augreg_in21k", "timm"),
        ):
            assert type(convert.resolve_model_class(name)()).__module__.startswith(package)
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    result = run_forked("-i", str(tmp_path / "w.pth"), "-o", str(tmp_path / "x.onnx"), "--model-class", "convnext_tin")
    check_error(result, 2, "no such model", "convnext_tiny", "convnext_tiny_hnf")


def test_detectors_download_nothing() -> None:
    """The explicit form of a detector leaves its backbone's published weights alone too."""
    build = convert.resolve_model_class("torchvision.models.detection:fasterrcnn_resnet50_fpn")
    with torch.device("meta"):
        assert isinstance(build(num_classes=3), nn.Module)
