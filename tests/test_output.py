"""What is written: where, when, and with which bytes."""

from __future__ import annotations

import hashlib
import shutil
import socket
from pathlib import Path

import onnx
import pytest
from conftest import axes, run_cli


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(entry.name for entry in folder.iterdir())


def test_directories_are_made_and_named(models: Path, tmp_path: Path) -> None:
    """`-o DIR` means DIR/model.onnx; folders that are missing are made; the umask is obeyed."""
    target = tmp_path / "a" / "b"
    result = run_cli("-i", str(models / "flat.pt"), "-o", f"{target}/", umask=0o027)
    assert result.code == 0, result.err
    assert names(target) == ["model.onnx"]
    assert (target / "model.onnx").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_same_bytes_wherever_the_files_lie(exporter: str, models: Path, tmp_path: Path) -> None:
    """Another folder, name and working directory give the same bytes, which name no path and no host."""
    written = []
    for name in ("one", "another/two"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        source = folder / f"{folder.name}.bin.pt"
        shutil.copy(models / "image.pt", source)
        target = folder / f"{folder.name}.onnx"
        result = run_cli(
            "-i", source.name, "-o", target.name, "--exporter", exporter, "--input-shape", "1,3,16,16", cwd=folder
        )
        assert result.code == 0, result.err
        written.append(target.read_bytes())
    assert written[0] == written[1]
    for secret in (str(tmp_path), str(Path.cwd()), "site-packages", ".py", socket.gethostname()):
        assert secret.encode() not in written[0]


def test_metadata_names_and_versions(models: Path, tmp_path: Path) -> None:
    """Producer, source hash, exporter, task; the IR version and opset; the names of inputs, outputs and axes."""
    target = tmp_path / "model.onnx"
    result = run_cli("-i", str(models / "image.pt"), "-o", str(target), "--task", "semantic-segmentation")
    assert result.code == 0, result.err
    model = onnx.load(target)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert model.producer_name == "pt2onnx"
    assert model.producer_version == run_cli("--version").out.split()[1]
    assert facts["source_sha256"] == hashlib.sha256((models / "image.pt").read_bytes()).hexdigest()
    assert facts["task"] == "semantic-segmentation"
    assert facts["exporter"] == "torchscript of torch 2.14.1"
    assert model.ir_version <= 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 14)]
    assert axes(target) == {"input": ["batch_size", 3, 224, 224], "output": ["batch_size", 2, 224, 224]}
    assert {value.name for value in model.graph.initializer} & {"3.weight", "0.weight"}


def test_an_older_file_is_replaced_only_by_a_good_one(models: Path, tmp_path: Path) -> None:
    """A failing run leaves it as it was, a good one replaces it; neither leaves anything else behind."""
    target = tmp_path / "model.onnx"
    target.write_bytes(b"older")
    bad = run_cli("-i", str(models / "flat.pt"), "-o", str(target), "--atol", "0", "--rtol", "0")
    assert bad.code == 6, bad.err
    assert target.read_bytes() == b"older"
    assert names(tmp_path) == ["model.onnx"]
    good = run_cli("-i", str(models / "flat.pt"), "-o", str(target))
    assert good.code == 0
    assert onnx.load(target).producer_name == "pt2onnx"
    assert names(tmp_path) == ["model.onnx"]


def test_external_data_above_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that one file cannot hold go to NAME.onnx.data (the limit is lowered, to keep the test small)."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime

    import convert as product

    weight = np.ones((300, 4), np.float32)
    value = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    value.shape, value.type = ir.Shape([300, 4]), ir.TensorType(ir.DataType.FLOAT)
    given = ir.Value(name="x", shape=ir.Shape([1, 300]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [given, value])
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([1, 4])
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 14})
    monkeypatch.setattr(product, "SINGLE_FILE_LIMIT", 1000)
    product.write_graph(ir.Model(graph, ir_version=8), tmp_path / "m.onnx")
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").stat().st_size < 1000
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    np.testing.assert_allclose(session.run(None, {"x": np.ones((1, 300), np.float32)})[0], 300)
