"""What is written: where, when, and with which bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import forked
import numpy as np
import onnx
import pytest
import tiny_models
from forked import run_forked
from helpers import axes, check_error, lines, onnx_outputs, run_cli

import convert as product


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(entry.name for entry in folder.iterdir())


def test_directories_are_made_and_named(models: Path, tmp_path: Path) -> None:
    """`-o DIR` means DIR/model.onnx; folders that are missing are made; the umask is obeyed."""
    target = tmp_path / "a" / "b"
    result = run_forked("-i", str(models / "flat.pt"), "-o", f"{target}/", umask=0o027)
    assert result.code == 0, result.err
    assert names(target) == ["model.onnx"]
    assert (target / "model.onnx").stat().st_mode & 0o777 == 0o640


def test_folders_that_only_lead_elsewhere(models: Path, tmp_path: Path) -> None:
    """The `a` of `a/../b` is not made."""
    result = run_forked("-i", str(models / "flat.pt"), "-o", "a/../b", cwd=tmp_path)
    assert result.code == 0, result.err
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["model.onnx"]


class Killed(BaseException):
    """Ends a run where it stands."""


FILES = ("config.json", "model.onnx.data", "model.onnx")


def staged_run(folder: Path, old: tuple[str, ...]) -> tuple[Path, list[product.Place]]:
    """A staging folder with new files, and some `old` ones at their places."""
    staging = folder / ".pt2onnx.run.partial"
    (staging / "model").mkdir(parents=True)
    for name in FILES:
        (staging / "model" / name).write_text("new", encoding="utf-8")
    for name in old:
        (folder / name).write_text("older", encoding="utf-8")
    return staging, [product.Place(staging / "model" / name, folder / name) for name in FILES]


def texts(folder: Path) -> dict[str, str]:
    """What the files of a folder hold."""
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}


def cut_short(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the process be killed after so many renames."""
    left = [steps]

    def replace(source: Path, target: Path) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        os.rename(source, target)  # noqa: PTH104  (os.replace is the one that is patched)

    patch.setattr(os, "replace", replace)


@pytest.mark.parametrize("old", [(), FILES, FILES[1:]], ids=["none", "all", "two"])
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("steps", range(9))
def test_moves_that_are_cut_short(
    steps: int,
    links: bool,  # noqa: FBT001
    old: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After any number of renames all files are new, or as they were; on file systems without hard links too."""
    staging, places = staged_run(tmp_path, old)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        cut_short(patch, steps)
        if not links:
            patch.setattr(os, "link", Mock(side_effect=PermissionError))
        product.move_into_place(places, {"status": "ok"}, staging)
    all_new = texts(tmp_path) == dict.fromkeys(FILES, "new")
    for _ in range(2):  # as often as it is killed
        report = product.settle(staging)
        assert texts(tmp_path) == (dict.fromkeys(FILES, "new") if all_new else dict.fromkeys(old, "older"))
        assert (report == {"status": "ok"}) == all_new


def test_what_was_put_there_since_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A next run puts back only what the killed one had replaced."""
    staging, places = staged_run(tmp_path, FILES)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        cut_short(patch, 3)  # the journal's, and two of three files
        product.move_into_place(places, {}, staging)
    places[1].target.write_text("somebody else's", encoding="utf-8")
    assert product.settle(staging) is None
    assert texts(tmp_path) == {**dict.fromkeys(FILES, "older"), FILES[1]: "somebody else's"}


def test_only_what_is_abandoned_is_removed(tmp_path: Path) -> None:
    """Not what a run has locked, nor what a link leads to, nor what another user's run left."""
    held, left, foreign = (tmp_path / f".pt2onnx.{name}.partial" for name in ("held", "left", "foreign"))
    locks = [product.claim(staging) for staging in (held, left, foreign)]
    (tmp_path / ".pt2onnx.link.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    product.remove_abandoned(tmp_path)
    assert len(names(tmp_path)) == 5
    for lock in locks[1:]:
        os.close(lock)
    (left / "moves.json").write_text("damaged", encoding="utf-8")
    if os.getuid() == 0:
        os.chown(foreign, 1, 1)
    product.remove_abandoned(tmp_path)
    (left / "moves.json").unlink()
    assert foreign.exists() == (os.getuid() == 0)
    product.remove_abandoned(tmp_path)
    assert held.exists()
    assert not left.exists()
    assert (tmp_path / "elsewhere").exists()
    os.close(locks[0])


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
    result = run_forked("-i", str(models / "image.pt"), "-o", str(target), "--task", "semantic-segmentation")
    assert result.code == 0, result.err
    model = onnx.load(target)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert model.producer_name == "pt2onnx"
    assert model.producer_version == run_forked("--version").out.split()[1]
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
    bad = run_forked("-i", str(models / "flat.pt"), "-o", str(target), "--atol", "0", "--rtol", "0")
    assert bad.code == 6, bad.err
    assert target.read_bytes() == b"older"
    assert names(tmp_path) == ["model.onnx"]
    good = run_forked("-i", str(models / "flat.pt"), "-o", str(target))
    assert good.code == 0
    assert onnx.load(target).producer_name == "pt2onnx"
    assert names(tmp_path) == ["model.onnx"]


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """The files below a folder: their inodes, when they were written and what they hold."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns, path.read_bytes()) for path in files}


def test_files_of_another_model_stay(tmp_path: Path) -> None:
    """Beside a checkpoint, or a graph of another name, no file is replaced by one of other content: exit 2 at once."""
    for name in ("llama", "gpt2"):
        tiny_models.make(name, tmp_path / name)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "gpt2" / "config.json", tmp_path / "other")
    graph = bytes.fromhex("0808 1207 7074326f6e6e78")  # as ours begin
    (tmp_path / "other" / "a.onnx").write_bytes(graph)
    (tmp_path / "gpt2" / "model.onnx").write_bytes(graph)  # converted in place
    before = contents(tmp_path)
    for target in ("gpt2/", "other/b.onnx"):
        result = run_forked("-i", str(tmp_path / "llama"), "-o", f"{tmp_path}/{target}")
        check_error(result, 2, "config.json", "with other content would be replaced there", "choose another directory")
        assert "load" not in result.err
        assert contents(tmp_path) == before
    config = json.loads((tmp_path / "llama" / "config.json").read_text(encoding="utf-8"))
    content = json.dumps({**config, "auto_map": {"AutoModel": "own.Model"}})  # left out of what is written
    (tmp_path / "llama" / "config.json").write_text(content, encoding="utf-8")
    check_error(
        run_forked("-i", str(tmp_path / "llama"), "-o", f"{tmp_path}/llama/"), 2, "config.json with other content"
    )
    assert (tmp_path / "llama" / "config.json").read_text(encoding="utf-8") == content


def test_conversions_into_one_folder(tmp_path: Path) -> None:
    """In place, elsewhere, and there again after further training: files of the same content are left alone."""
    folder = tmp_path / "in"
    tiny_models.make("gpt2", folder)
    before = contents(folder)
    inner = run_forked("-i", str(folder), "-o", f"{folder}/")
    assert inner.code == 0, inner.err
    assert {name: file for name, file in contents(folder).items() if not name.endswith(".onnx")} == before
    warning = f"trainer_state.json of an earlier conversion in {tmp_path / 'out'} will be replaced"
    for step, words in ((1, []), (2, [warning])):
        (folder / "trainer_state.json").write_text(str(step), encoding="utf-8")
        result = run_forked("-i", str(folder), "-o", f"{tmp_path}/out/")
        assert result.code == 0, result.err
        assert lines(result, "WARN") == words
        assert (tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8") == str(step)


@pytest.mark.parametrize("place", ["", "x.onnx", "onnx/"])
def test_a_snapshot_is_no_output(place: str, models: Path, tmp_path: Path) -> None:
    """The links of the hub's cache are not replaced, and what they point at is not written to: exit 2."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "1").write_text("{}", encoding="utf-8")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (tmp_path / "elsewhere").symlink_to(snapshot)
    before = contents(tmp_path)
    result = run_forked("-i", str(models / "flat.pt"), "-o", f"{tmp_path}/elsewhere/{place}")
    check_error(result, 2, "a snapshot of the hub's cache", "choose another directory")
    assert contents(tmp_path) == before


def constant_model(weights: dict[str, Any]) -> Any:
    """An onnx_ir model whose outputs are its weights."""
    import onnx_ir as ir

    values = [ir.Value(name=name, const_value=ir.tensor(weight, name=name)) for name, weight in weights.items()]
    nodes = []
    for value in values:
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
        node = ir.node("Identity", [value])
        node.outputs[0].name = f"{value.name}_out"
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 14}, name="constants")
    return ir.Model(graph, ir_version=8)


def test_weights_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    """Large and small weights of every dtype: onnx reads the same model from our file as from onnx_ir's own."""
    import onnx_ir as ir
    import torch

    chance = torch.Generator().manual_seed(0)
    weights = {
        f"{size}.{kind}".replace("torch.", ""): (torch.rand(size, 3, generator=chance) * 100).to(kind)
        for size in (0, 5, 70_000)
        for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    }
    weights |= {"scalar": torch.tensor(2.5), "name with ünïcode": torch.rand(1 << 15, generator=chance)}
    ir.save(constant_model(weights), tmp_path / "library.onnx")
    product.write_single_file(constant_model(weights), tmp_path / "ours.onnx")
    library, ours = (onnx.load(tmp_path / name) for name in ("library.onnx", "ours.onnx"))
    onnx.checker.check_model(ours, full_check=True)
    for tensor in ours.graph.initializer:
        assert not tensor.doc_string.strip()
        tensor.ClearField("doc_string")  # spaces, so that the weights begin at multiples of 64
    for model in (library, ours):
        model.graph.initializer.sort(key=lambda tensor: tensor.name)
        del model.graph.value_info[:]  # says again what the initializers say
    assert ours == library
    assert len(ours.graph.initializer) == len(weights)


def test_a_journal_that_came_with_the_input(tmp_path: Path) -> None:
    """The output's folder may be the input's: a journal in it changes nothing outside, and does not keep us."""
    folder = tmp_path / "model"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "kept.txt").write_text("kept", encoding="utf-8")
    kept = product.file_identity(tmp_path / "kept.txt")
    targets = ("../new.txt", "../kept.txt", str(tmp_path / "new.txt"), "onnx/new.txt", "..", "", "onnx/")
    for number, target in enumerate(targets):
        staging = folder / f".pt2onnx.{number}.partial"
        (staging / "old").mkdir(parents=True)
        (staging / "old" / "0").write_text("theirs", encoding="utf-8")
        journal = {"moves": [[target, kept], ["x", [1, 1]]], "report": {}}
        (staging / "moves.json").write_text(json.dumps(journal), encoding="utf-8")
    others: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "device": lambda file: file.symlink_to("/dev/zero"),
        "deep": lambda file: file.write_text("[" * 200_000, encoding="utf-8"),
        "list": lambda file: file.write_text("[]", encoding="utf-8"),
    }
    for name, make in others.items():
        (folder / f".pt2onnx.{name}.partial").mkdir()
        make(folder / f".pt2onnx.{name}.partial" / "moves.json")
    (folder / "onnx").symlink_to(tmp_path / "theirs")
    outcome = forked.in_child(lambda: product.remove_abandoned(folder) or 0, tmp_path)
    assert outcome.code == 0, outcome.err
    assert len(list(folder.glob("*.partial"))) == len(targets) + len(others)
    assert names(tmp_path) == ["kept.txt", "model", "theirs"]
    assert not names(tmp_path / "theirs")


def test_layouts_settle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose size has one byte more or less with the place of its weights, which depends on that: one is right.

    The sizes around 2**14, where that happens to one.
    """
    monkeypatch.setattr(product, "STORED_BYTES", 1000)

    def write_all() -> int:
        for length in range(2**14 - 400, 2**14):
            weight = np.arange(length).astype(np.uint8)
            product.write_single_file(constant_model({"w": weight}), tmp_path / "m.onnx")
            (tensor,) = onnx.load(tmp_path / "m.onnx").graph.initializer
            assert tensor.raw_data == weight.tobytes()
            assert (tmp_path / "m.onnx").read_bytes().index(tensor.raw_data) % product.ALIGNMENT == 0
        return 0

    outcome = forked.in_child(write_all, tmp_path, seconds=30)  # which ends it, if nothing else does
    assert outcome.code == 0, outcome.err


def test_external_data_above_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that one file cannot hold go to NAME.onnx.data (the limit is lowered, to keep the test small)."""
    weights = {"w": np.ones((300, 4), np.float32), "v": np.arange(1000.0)}
    monkeypatch.setattr(product, "SINGLE_FILE_LIMIT", 1000)
    product.write_graph(constant_model(weights), tmp_path / "m.onnx")
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").stat().st_size < 1000
    for name, value in onnx_outputs(tmp_path / "m.onnx", {}).items():
        np.testing.assert_array_equal(value, weights[name.removesuffix("_out")])
