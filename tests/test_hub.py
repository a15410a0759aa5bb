"""Models on the hub through the command line: a server on this machine stands in for the hub (HF_ENDPOINT).

It answers as the real one does, with its status codes and its X-Error-Code headers; the product and huggingface_hub are
the real ones.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import tiny_models
import transformers
from helpers import Result, check_error, lines, onnx_outputs, run_cli
from test_adapters import adapted, make_parts, save_adapter

COMMIT = "0" * 40
# What the hub answers for a repository that is not given: with a status, X-Error-Code and X-Error-Message.
REFUSALS = {
    "gated/model": (401, "GatedRepo", "Access to model gated/model is restricted."),
    "closed/model": (403, "GatedRepo", "Access to model closed/model is restricted and you are not in the list."),
    "no/model": (401, "RepoNotFound", "Repository not found"),
    "lost/model": (404, "RepoNotFound", "Repository not found"),
}


class Hub(ThreadingHTTPServer):
    """The models in the folders below `root`, which are called as on the hub, owner/name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def address(self) -> str:
        """What HF_ENDPOINT says."""
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """One request: the facts about a model, the list of its files, or one of them."""

    server: Hub

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        """Send an answer; of a HEAD, its headers."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        """Answer."""
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        kind, revision, *file = rest or ("revision", "main")
        if refusal := REFUSALS.get(f"{owner}/{name}"):
            status, code, message = refusal
            self.reply(status, b"{}", X_Error_Code=code, X_Error_Message=message)
        elif revision not in ("main", COMMIT):
            self.reply(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif kind == "resolve":
            content = (self.server.root / owner / name / file[0]).read_bytes()
            self.reply(200, content, ETag=f'"{file[0]}"', X_Repo_Commit=COMMIT)
        else:
            files = [file for file in (self.server.root / owner / name).iterdir() if file.is_file()]
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files]
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            self.reply(200, json.dumps(tree if kind == "tree" else info).encode(), Content_Type="application/json")

    do_HEAD = do_GET  # noqa: N815  (http.server's name)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with nothing on it yet."""
    with Hub(tmp_path / "hub") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def convert(folder: Path, endpoint: str, name: str, *options: str, **variables: str) -> Result:
    """Convert a model on the hub at `endpoint` to folder/out, with a cache of its own and without a token."""
    ours = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_")
    others = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environment = {**others, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), **variables}
    return run_cli("-i", name, "-o", str(folder / "out"), *options, env=environment, cwd=folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gated/model", "its owner gives access on request: ask for it on the model's page and set HF_TOKEN"),
        ("closed/model", "its owner gives access on request"),
        ("no/model", "the hub has no such model, or it is private: check the name, or set HF_TOKEN"),
        ("lost/model", "the hub has no such model"),
    ],
)
def test_refusals(tmp_path: Path, hub: Hub, name: str, words: str) -> None:
    """A gated model without a token, with a token that has no access, and a name that does not exist."""
    check_error(convert(tmp_path, hub.address, name), 3, name, words)
    assert hub.asked
    assert not (tmp_path / "out").exists()


def test_no_such_revision(tmp_path: Path, hub: Hub) -> None:
    """A model that is there, and a --revision that is not."""
    tiny_models.make("bert", hub.root / "some" / "model")
    check_error(convert(tmp_path, hub.address, "some/model", "--revision", "v9"), 3, "some/model", "check --revision")


def test_no_network(tmp_path: Path) -> None:
    """Nobody listens there; and HF_HUB_OFFLINE, which does not even ask."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        check_error(convert(tmp_path, endpoint, "some/model"), 3, "some/model", "the hub cannot be reached", "mount")
        offline = convert(tmp_path, endpoint, "some/model", HF_HUB_OFFLINE="1")
        check_error(offline, 3, "some/model", "cannot be reached")


def test_cached(tmp_path: Path, hub: Hub) -> None:
    """What was downloaded once is converted when the hub has gone."""
    tiny_models.make("bert", hub.root / "some" / "model")
    assert convert(tmp_path, hub.address, "some/model").code == 0
    hub.shutdown()
    hub.server_close()
    (tmp_path / "out" / "model.onnx").unlink()
    result = convert(tmp_path, hub.address, "some/model")
    assert result.code == 0, result.err
    assert "the hub cannot be reached: some/model is what was downloaded before" in lines(result, "WARN")
    assert (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("mark", "library"), [("open_clip_config.json", "OpenCLIP"), ("model_index.json", "diffusers")]
)
def test_other_libraries(tmp_path: Path, hub: Hub, mark: str, library: str) -> None:
    """Named by the list of files: nothing is downloaded. A folder of theirs is told the same."""
    folder = hub.root / "some" / "model"
    folder.mkdir(parents=True)
    (folder / mark).write_text("{}", encoding="utf-8")
    (folder / "weights.safetensors").write_bytes(b"")
    check_error(convert(tmp_path, hub.address, "some/model"), 3, "some/model", library)
    assert not [path for path in hub.asked if "/resolve/" in path]
    check_error(convert(tmp_path, hub.address, str(folder)), 3, str(folder), library)


def test_an_adapter_and_its_base(tmp_path: Path, hub: Hub) -> None:
    """Both on the hub, the base of the revision that the adapter names; PyTorch's files and code stay there."""
    tiny_models.make("bert", hub.root / "some" / "base")
    for name in ("pytorch_model.bin", "modeling_own.py"):
        (hub.root / "some" / "base" / name).write_bytes(b"")
    parts = make_parts(tiny_models.build("bert"), "query")
    save_adapter(hub.root / "some" / "adapter", parts, base_model_name_or_path="some/base", revision=COMMIT)
    check_error(
        convert(tmp_path, hub.address, "some/adapter"), 3, "'some/base'", "pass --base some/base to download it"
    )
    result = convert(tmp_path, hub.address, "some/adapter", "--base", "some/base")
    assert result.code == 0, result.err
    assert "adapter: its base model is some/base" in lines(result, "INFO")
    assert f"/some/base/resolve/{COMMIT}/model.safetensors" in hub.asked
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("A small model", return_tensors="pt", return_token_type_ids=True)
    expected = adapted(tiny_models.build("bert"), parts)(**tokens).logits.detach().numpy()
    actual = onnx_outputs(tmp_path / "out" / "model.onnx", {name: value.numpy() for name, value in tokens.items()})
    np.testing.assert_allclose(actual["logits"], expected, atol=1e-4 * np.abs(expected).max())


def test_an_adapter_without_its_base(tmp_path: Path, hub: Hub) -> None:
    """A base that the hub refuses is named, with how else to supply it."""
    save_adapter(tmp_path / "in", make_parts(tiny_models.build("bert"), "query"), base_model_name_or_path="gated/model")
    result = convert(tmp_path, hub.address, str(tmp_path / "in"), "--base", "gated/model")
    check_error(result, 3, "gated/model", "set HF_TOKEN", "or pass --base FOLDER")
    parts = make_parts(tiny_models.build("bert"), "query")
    save_adapter(tmp_path / "in", parts, base_model_name_or_path="some/base", revision="../../x")
    result = convert(tmp_path, hub.address, str(tmp_path / "in"), "--base", "some/base")
    check_error(result, 3, "revision is '../../x', not a branch, tag or commit")
