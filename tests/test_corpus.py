"""Every input of the corpus ends in one clean error: nothing runs, nothing is written, time and memory are bounded."""

from __future__ import annotations

import io
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import corpus
import forked
import pytest
import torch
from corpus import MARKER, Item
from helpers import check_error, run_cli

import convert as product

MEMORY = 1_200_000  # kilobytes beyond the file's size: torch's code, and what opening a file may take


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Import what loading imports, so that the children inherit it."""
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    product.import_transformers()
    corpus.bert_files()
    corpus.vit_files()
    warnings.simplefilter("ignore")
    corpus.good_files()
    torch.export.load(io.BytesIO(corpus.program_archive()))


def named(items: list[Item]) -> list[Any]:
    """The items as pytest's parameters."""
    return [pytest.param(item, id=item.name) for item in items]


@pytest.mark.parametrize("item", named(corpus.HOSTILE + corpus.MALFORMED))
def test_corpus(item: Item, tmp_path: Path) -> None:
    """One [ERROR] line that names the file, the exit code, nothing written, bounded time and memory."""
    assert item.words.strip()  # which rule refuses it, so that another one that does is noticed
    source = item.make(tmp_path)
    before = forked.snapshot(tmp_path)
    outcome = forked.convert_in_child(source, tmp_path)
    codes = item.code if isinstance(item.code, tuple) else (item.code,)
    assert not forked.flaws(outcome, codes), outcome
    assert product.printable(source) in outcome.err, outcome
    assert item.words in outcome.err, outcome
    assert forked.snapshot(tmp_path) == before
    size = sum(length for _, length in before) // 1024
    assert outcome.kilobytes - forked.idle_memory() < MEMORY + size, outcome


@pytest.mark.parametrize("item", named(corpus.setting_items()))
def test_inspection_of_settings(item: Item, tmp_path: Path) -> None:
    """--inspect looks at the same settings, and says what is wrong or nothing, but never a traceback."""
    source = item.make(tmp_path)
    outcome = forked.convert_in_child(source, tmp_path, "--inspect")
    assert outcome.code == 0, outcome
    assert all(line.startswith(("[INFO] ", "[WARN] ")) for line in outcome.err.splitlines()), outcome


TENSORS = (*corpus.GRAPH, "tensor_values")
SPECS = ("graph_module", "signature", "input_specs")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("graph_module",), 5),
        (corpus.GRAPH, []),
        (TENSORS, {}),
        (TENSORS, [1]),
        ((*TENSORS, "input"), 5),
        ((*TENSORS, "input", "sizes"), "x"),
        ((*TENSORS, "input", "sizes", 0), {"as_int": "x"}),
        ((*TENSORS, "input", "sizes", 0), {"as_expr": {"expr_str": {}}}),
        ((*TENSORS, "input", "sizes", 0), {"as_int": -5}),
        ((*TENSORS, "input", "sizes", 0), {}),
        ((*TENSORS, "input", "dtype"), 99),
        ((*TENSORS, "input", "dtype"), -1),
        ((*TENSORS, "input", "dtype"), "x"),
        (SPECS, {}),
        (SPECS, {"a": 1}),
        (SPECS, [5]),
        ((*SPECS, 0), {"parameter": {"arg": {"name": []}}}),
        ((*SPECS, 0), {"parameter": 5}),
        ((*SPECS, 0), {"user_input": None}),
    ],
    ids=str,
)
def test_inspection_of_programs(path: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    """--inspect of an exported program whose JSON has the wrong types: what is wrong, and no traceback."""
    source = tmp_path / "input.pt2"
    source.write_bytes(corpus.edit_program(corpus.set_path(*path, to=value)))
    outcome = forked.convert_in_child(source, tmp_path, "--inspect")
    assert outcome.code == 0, outcome
    assert all(line.startswith(("[INFO] ", "[WARN] ")) for line in outcome.err.splitlines()), outcome


OPENERS = {
    "load": lambda path: torch.load(path, weights_only=False),
    "jit": lambda path: torch.jit.load(path)(torch.ones(2)),
    "export": lambda path: torch.export.load(io.BytesIO(Path(path).read_bytes())).module()(torch.ones(2, 3)),
}


@pytest.mark.parametrize("item", named([item for item in corpus.HOSTILE if item.runs]))
def test_the_payload_runs_elsewhere(item: Item, tmp_path: Path) -> None:
    """The corpus is real: PyTorch's own way of opening the file runs the payload."""
    source = item.make(tmp_path)

    def opening() -> int:
        OPENERS[item.runs](str(source))
        return 0

    outcome = forked.in_child(opening, tmp_path)
    assert (tmp_path / MARKER).exists(), outcome


@pytest.mark.parametrize("name", corpus.DEFUSED)
def test_what_is_left_out(name: str, tmp_path: Path) -> None:
    """Parts of an exported program that would run are not in what torch.export.load sees; the rest opens."""
    path = tmp_path / "input.pt2"
    path.write_bytes(corpus.DEFUSED[name]())

    def opening() -> int:
        module = product.load(product.detect(path), trust=False).content.module()
        return 0 if module(torch.ones(2, 3)).shape == (2, 2) else 1

    outcome = forked.in_child(opening, tmp_path)
    assert outcome.code == 0, outcome
    assert not (tmp_path / MARKER).exists()


def test_good_files_open(tmp_path: Path) -> None:
    """What the corpus is made of is sound: the same files unharmed load."""
    for name, data in corpus.good_files().items():
        path = tmp_path / name
        path.write_bytes(data)
        assert product.load(product.detect(path), trust=False).content is not None


def test_a_file_that_changes(tmp_path: Path) -> None:
    """Written to while it is read: said so."""
    path = tmp_path / "input.pt"
    path.write_bytes(corpus.good_files()["zip"])

    def opening() -> int:
        end = threading.Event()

        def write() -> None:
            while not end.is_set():
                os.utime(path)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(200):  # until the other thread has its turn in the middle of one
                product.load(product.detect(path), trust=False)
        except product.ConversionError as error:
            return int(error.status) if "changed while it was read" in str(error) else 71
        finally:
            end.set()
            writer.join()
        return 0

    assert forked.in_child(opening, tmp_path).code == 3


def test_trusted_folders(tmp_path: Path) -> None:
    """--trust-remote-code lets pass what would run code, with a [WARN], but not what lies outside the folder."""
    items = {item.name: item for item in corpus.folder_items()}
    for name, code in (("attention-kernel", 3), ("auto-map", 3), ("link-out", 4), ("index-parent", 4)):
        place = tmp_path / name
        place.mkdir()
        outcome = forked.convert_in_child(items[f"folder-{name}"].make(place), place, "--trust-remote-code")
        assert not forked.flaws(outcome, [code]), outcome
        assert ("[WARN] --trust-remote-code" in outcome.err) == (code == 3), outcome


COMMANDS = (
    "call-posix.system", "pickle-escape-codes-in-a-name", "file-nested-legacy-file", "script-ops-alias",
    "program-expression", "folder-attention-kernel", "pickle-nested-a-million", "pickle-bytes-of-an-exabyte",
    "archive-bomb", "safetensors-header-of-8-exabytes", "path-link-loop", "cut-script-at-70-percent",
)  # fmt: skip


@pytest.mark.parametrize("item", named([i for i in corpus.HOSTILE + corpus.MALFORMED if i.name in COMMANDS]))
def test_through_the_command_line(item: Item, tmp_path: Path) -> None:
    """The same through the command, with its two processes."""
    source = item.make(tmp_path)
    before = forked.snapshot(tmp_path)
    result = run_cli("-i", str(source), "-o", str(tmp_path / "out" / "m.onnx"), cwd=tmp_path, timeout=30)
    check_error(result, item.code, product.printable(source), item.words)
    assert forked.snapshot(tmp_path) == before
    assert not (tmp_path / MARKER).exists()


def test_innocent_folders(tmp_path: Path) -> None:
    """The hub's cache, whose snapshots are links to its blobs, and usual settings pass without a word."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    config = {**corpus.BERT, "_attn_implementation": "sdpa", "use_cache": True, "quantization_config": None}
    (blobs / "c").write_text(json.dumps(config))
    (blobs / "w").write_bytes(b"")
    (snapshot / "config.json").symlink_to("../../blobs/c")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    index = {"weight_map": {"a": "model.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    outcome = forked.convert_in_child(snapshot, tmp_path)
    assert not forked.flaws(outcome, [3]), outcome
    assert "[WARN]" not in outcome.err


def test_quantised_script_opens(tmp_path: Path) -> None:
    """A quantised TorchScript archive, whose layers unpack their weights in __setstate__, is not taken for hostile."""
    import torch.ao.quantization as ao

    warnings.simplefilter("ignore")
    net = torch.nn.Sequential(ao.QuantStub(), torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), ao.DeQuantStub()).eval()
    net.qconfig = ao.get_default_qconfig("fbgemm")
    prepared = ao.prepare(net)
    prepared(torch.randn(2, 3, 8, 8))
    path = tmp_path / "quantised.pt"
    torch.jit.save(torch.jit.script(ao.convert(prepared)), str(path))
    loaded = product.load(product.detect(path), trust=False).content
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded(x), torch.jit.load(str(path))(x))
