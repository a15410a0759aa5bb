"""What is written: where, when, and with which bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import CONVERT, axes, onnx_outputs, run_cli

ROOT = os.getuid() == 0


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(entry.name for entry in folder.iterdir())


def popen(source: Path, target: Path, *options: str, before: tuple[str, ...] = (), **settings: Any) -> Any:
    """A conversion that runs beside the test."""
    command = [*before, sys.executable, str(CONVERT), "-i", str(source), "-o", str(target), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **settings)


@pytest.mark.parametrize("given", ["a/b/", "a/b", "here", "."])
def test_directories_are_made_and_named(given: str, models: Path, tmp_path: Path) -> None:
    """`-o DIR` means DIR/model.onnx, whether it exists or not; missing folders are made; the umask is obeyed."""
    (tmp_path / "here").mkdir()
    result = run_cli("-i", str(models / "flat.pt"), "-o", given, "--opset", "11", cwd=tmp_path, umask=0o027)
    assert result.code == 0, result.err
    target = tmp_path / given / "model.onnx"
    assert names(target.parent) == sorted(["model.onnx", *(["here"] if given == "." else [])])
    assert target.stat().st_mode & 0o777 == 0o640
    assert [(entry.domain, entry.version) for entry in onnx.load(target).opset_import] == [("", 11)]
    if given == "a/b":
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


@pytest.fixture(scope="module", params=["torchscript", "dynamo"])
def twice(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model converted twice, with everything around it different: two files that differ in name alone."""
    written = []
    surroundings: list[dict[str, str]] = [
        {"TZ": "Asia/Shanghai", "PYTHONHASHSEED": "1", "LC_ALL": "C", "OMP_NUM_THREADS": "1"},
        {"TZ": "America/New_York", "PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"},
    ]
    for name, variables in zip(("one", "another/two"), surroundings, strict=True):
        folder = tmp_path_factory.mktemp(request.param) / name
        folder.mkdir(parents=True)
        source = folder / f"{folder.name}.bin.pt"
        shutil.copy(models / "image.pt", source)
        target = folder / f"{folder.name}.onnx"
        result = run_cli(
            "-i", source.name, "-o", target.name, "--exporter", request.param, "--input-shape", "1,3,16,16",
            "--task", "semantic-segmentation", cwd=folder, env={**os.environ, **variables},
        )  # fmt: skip
        assert result.code == 0, result.err
        assert names(folder) == [source.name, target.name]
        written.append(target)
    return written[0], written[1]


def test_same_bytes_wherever_the_files_lie(twice: tuple[Path, Path]) -> None:
    """Another folder, name, clock and environment give the same bytes."""
    assert twice[0].read_bytes() == twice[1].read_bytes()


def test_no_trace_of_the_machine(twice: tuple[Path, Path]) -> None:
    """No path, file name, host, home, temporary name or date inside."""
    content = twice[0].read_bytes()
    today = time.localtime()
    secrets = {
        str(twice[0].parent), str(CONVERT.parent), str(Path.cwd()), str(Path.home()) + "/", "/tmp/", "site-packages",
        ".py", ".pt", "partial", socket.gethostname(), time.strftime("%Y-%m-%d", today), time.strftime("%Y%m%d", today),
    }  # fmt: skip
    assert not [secret for secret in secrets if secret.encode() in content]


def test_metadata_names_and_versions(twice: tuple[Path, Path], models: Path) -> None:
    """Producer, source hash, exporter, task; the IR version and opset; the names of inputs, outputs, axes, weights."""
    target = twice[0]
    exporter = "dynamo" if "dynamo" in str(target) else "torchscript"
    model = onnx.load(target)
    onnx.checker.check_model(model, full_check=True)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert model.producer_name == "pt2onnx"
    assert model.producer_version == run_cli("--version").out.split()[1]
    assert facts["source_sha256"] == hashlib.sha256((models / "image.pt").read_bytes()).hexdigest()
    assert facts["task"] == "semantic-segmentation"
    assert facts["exporter"].startswith(f"{exporter} of torch 2.14.1")
    assert model.ir_version <= 10
    opset = {"torchscript": 14, "dynamo": 18}[exporter]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert axes(target) == {"input": ["batch_size", 3, 16, 16], "output": ["batch_size", 2, 16, 16]}
    assert {"0.weight", "3.weight"} & {value.name for value in model.graph.initializer}


def test_the_file_computes_what_the_model_computes(twice: tuple[Path, Path], models: Path) -> None:
    """In ONNX Runtime, in another process, at a batch that was not traced."""
    import torch

    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        expected = torch.load(models / "image.pt", weights_only=False)(torch.from_numpy(images))
    actual = onnx_outputs(twice[0], {"input": images})
    assert list(actual) == ["output"]
    np.testing.assert_allclose(actual["output"], expected, rtol=1e-4, atol=1e-5)


def test_no_task_no_metadata_of_it(models: Path, tmp_path: Path) -> None:
    """What was not said is not written; a file that was there is replaced even where it may only be read."""
    target = tmp_path / "model.onnx"
    target.touch(mode=0o444)
    result = run_cli("-i", str(models / "flat.pt"), "-o", str(target))
    assert result.code == 0, result.err
    assert "task" not in {entry.key for entry in onnx.load(target).metadata_props}


def test_an_older_file_is_replaced_only_by_a_good_one(models: Path, tmp_path: Path) -> None:
    """A failing run leaves it as it was, and nothing else behind."""
    target = tmp_path / "model.onnx"
    target.write_bytes(b"older")
    bad = run_cli(
        "-i", str(models / "flat.pt"), "-o", str(target), "--atol", "0", "--rtol", "0", "--exporter", "torchscript"
    )
    assert bad.code == 6, bad.err
    assert target.read_bytes() == b"older"
    assert names(tmp_path) == ["model.onnx"]


def test_an_older_file_is_there_until_the_end(models: Path, tmp_path: Path) -> None:
    """Whoever reads while a conversion runs gets the older model or the new one, whole, and the older one until then."""
    target, link = tmp_path / "model.onnx", tmp_path / "link"
    target.write_bytes(b"older")
    link.hardlink_to(target)
    process = popen(models / "flat.pt", target)
    verifying, seen = False, []
    os.set_blocking(process.stderr.fileno(), False)
    log = ""
    while process.poll() is None:
        log += process.stderr.read() or ""
        content = target.read_bytes()
        if not seen or content != seen[-1]:
            seen.append(content)
        verifying = verifying or ("verify:" in log and content == b"older")
        time.sleep(0.001)
    assert process.returncode == 0
    assert verifying
    assert [b"older", target.read_bytes()] in (seen, [*seen, target.read_bytes()])
    assert link.read_bytes() == b"older"  # the new file was put in its place, not written over it
    assert target.stat().st_nlink == 1
    assert names(tmp_path) == ["link", "model.onnx"]


def test_nothing_is_written_elsewhere(models: Path, tmp_path: Path) -> None:
    """Neither the current folder, the home nor the folder for temporary files has something new in it afterwards."""
    folders = {name: tmp_path / name for name in ("cwd", "home", "tmp", "out")}
    for folder in folders.values():
        folder.mkdir()
    environment = {**os.environ, "HOME": str(folders["home"]), "TMPDIR": str(folders["tmp"])}
    result = run_cli(
        "-i", str(models / "flat.pt"), "-o", str(folders["out"] / "x.onnx"), "--exporter", "dynamo",
        cwd=folders["cwd"], env=environment,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert names(folders["out"]) == ["x.onnx"]
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {*folders, "out/x.onnx"}


@pytest.mark.skipif(not ROOT or not shutil.which("setpriv"), reason="only root can become somebody else")
def test_a_user_without_a_name_or_a_home(models: Path, tmp_path: Path) -> None:
    """As `docker run --user 12345:12345` does: no entry in /etc/passwd, and only the output folder may be written."""
    target = tmp_path / "out"
    target.mkdir()
    os.chown(target, 12345, 12345)
    environment = {name: value for name, value in os.environ.items() if name not in ("USER", "LOGNAME", "HOME")}
    reading = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")  # to reach this checkout
    before = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", *reading)
    process = popen(models / "flat.pt", target / "x.onnx", "--exporter", "dynamo", before=before, env=environment)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert (target / "x.onnx").stat().st_uid == 12345
    assert names(target) == ["x.onnx"]


@pytest.mark.skipif(not ROOT or not shutil.which("unshare"), reason="only root can have a process of number 1")
def test_containers_that_share_a_folder(models: Path, tmp_path: Path) -> None:
    """Two at once, each with process number 1, do not disturb each other."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("this machine does not let root unshare")
    processes = [
        popen(models / f"{name}.pt", tmp_path / f"{name}.onnx", before=("unshare", "--pid", "--fork"))
        for name in ("flat", "scripted")
    ]
    for process in processes:
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
    assert names(tmp_path) == ["flat.onnx", "scripted.onnx"]


def test_external_data_above_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that one file cannot hold go to NAME.onnx.data (the limit is lowered, to keep the test small)."""
    import onnx_ir as ir

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
    np.testing.assert_allclose(onnx_outputs(tmp_path / "m.onnx", {"x": np.ones((1, 300), np.float32)})["y"], 300)
