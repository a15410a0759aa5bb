"""Hugging Face folders through the command line, judged by ONNX Runtime against transformers' own answers."""

from pathlib import Path

import forked
import numpy as np
import onnxruntime
import pytest
import tiny_models
import torch
import transformers


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_one_graph(tmp_path: Path, name: str) -> None:
    """The produced graph gives transformers' logits for inputs of another size."""
    tiny_models.make(name, tmp_path / "model")
    outcome = forked.convert_in_child(tmp_path / "model", tmp_path)
    assert outcome.code == 0, outcome.err
    found = next(tmp_path.rglob("*.onnx"))
    session = onnxruntime.InferenceSession(str(found))
    torch.manual_seed(3)
    given = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 4 if axis == 0 else 9 for axis, size in enumerate(value.shape)]
        ones = torch.ones(shape, dtype=torch.int64)
        given[value.name] = torch.randn(shape) if value.name == "pixel_values" else ones
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForImageClassification
    model = auto.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        expected = model(**given).logits.numpy()
    actual = session.run(["logits"], {key: tensor.numpy() for key, tensor in given.items()})[0]
    assert np.abs(actual - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_is_verified(tmp_path: Path, name: str) -> None:
    """Decoders and encoder-decoder models pass the comparison with model.generate."""
    tiny_models.make(name, tmp_path / "model")
    outcome = forked.convert_in_child(tmp_path / "model", tmp_path, "--json")
    assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "out").glob("*.onnx"))) == (1 if name == "llama" else 2)
