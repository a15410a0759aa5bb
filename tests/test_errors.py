"""Every way to fail: one [ERROR] line that helps, the documented exit code, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked import run_forked
from helpers import CONVERT, Result, check_error, run_cli


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes, folders with nothing."""
    files = (path for path in folder.rglob("*") if not path.is_fifo())
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[Path]:
    """A folder with an older output; afterwards it must be as the test left it before the command."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"older")
    yield folder
    assert (folder / "model.onnx").read_bytes() == b"older"
    assert not list(folder.rglob("*.partial"))


def convert_in(folder: Path, source: Path | str, *options: str, **settings: object) -> Result:
    """Convert `source` to folder/model.onnx; the command must not change the folder."""
    before = snapshot(folder)
    command = ("-i", str(source), "-o", str(folder / "model.onnx"), *options)
    forked = settings.keys() <= {"env"}  # else the process itself matters
    result = run_forked(*command, **settings) if forked else run_cli(*command, **settings)
    assert snapshot(folder) == before
    return result


ARCHIVE = "the archive"
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"hello, this is no model\n", "is a text file"),
    "html": (b"<!DOCTYPE html><html></html>", "is an HTML page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "gguf": (b"GGUF\3\0\0\0", "GGUF"),
    "binary": (bytes(range(255, 127, -1)), "no format that PyTorch writes"),
    "safetensors-not-json": (struct.pack("<Q", 9) + b"{not json" + b"\0" * 16, "header is damaged"),
    "safetensors-too-long": (struct.pack("<Q", 1 << 40) + b'{"a": 1}' + b"\0" * 16, "safetensors"),
    "safetensors-beyond-data": (
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64) + b"\0" * 4,
        "a safetensors file of 108 bytes, 76 of which are there",
    ),
    "safetensors-cut-header": (struct.pack("<Q", 64) + b'{"a":{"dtype":"F32"', "of 72 bytes, 27 of which are there"),
    "safetensors-data-left": (struct.pack("<Q", 2) + b"{}" + b"\0" * 4, "header is damaged"),
    "pickle-cut": (pickle.dumps({"a": [1.5] * 300}, protocol=2)[:-40], "damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_models(name: str, clean: Path) -> None:
    """Exit 3, and the line says what the file is."""
    content, words = BAD_FILES[name]
    source = clean / "input.pt"
    source.write_bytes(content)
    check_error(convert_in(clean, source), 3, words, str(source))


def test_truncated_archives(models: Path, clean: Path) -> None:
    """A zip checkpoint that ends too early."""
    whole = (models / "image.pt").read_bytes()
    for size in (len(whole) // 2, len(whole) - 10, 200):
        (clean / "cut.pt").write_bytes(whole[:size])
        check_error(convert_in(clean, clean / "cut.pt"), 3, "damaged or truncated archive")


@pytest.mark.parametrize("name", ["image.pt", "traced.pt", "static.pt2"])
def test_a_flipped_bit(name: str, models: Path, clean: Path) -> None:
    """The lowest bit of one weight: only the archive's checksums can tell, and they do."""
    import torch

    reader = torch._C.PyTorchFileReader(str(models / name))
    records = [record for record in reader.get_all_records() if record.startswith("data/") and "." not in record]
    weight = max(records, key=reader.get_record_size)
    changed = bytearray((models / name).read_bytes())
    changed[reader.get_record_offset(weight)] ^= 1
    (clean / name).write_bytes(changed)
    check_error(convert_in(clean, clean / name), 3, f"{name} is damaged", "Bad CRC-32", weight)


def test_other_zip_archives(clean: Path) -> None:
    """A zip of something else, and a torch.package archive."""
    import zipfile

    for name, code, words in (
        ("a/b.txt", 3, "none that PyTorch writes"),
        ("a/.data/extern_modules", 4, "torch.package"),
    ):
        with zipfile.ZipFile(clean / "other.pt", "w") as archive:
            archive.writestr(name, "x")
        check_error(convert_in(clean, clean / "other.pt"), code, words)


def test_paths_that_cannot_be_read(clean: Path) -> None:
    """No such file, a FIFO, an empty directory, a directory of files, a Hugging Face folder."""
    check_error(convert_in(clean, clean / "none.pt"), 3, "No such file", "check -i")
    os.mkfifo(clean / "pipe")
    check_error(convert_in(clean, clean / "pipe", timeout=20), 3, "not a regular file")
    (clean / "folder").mkdir()
    check_error(convert_in(clean, clean / "folder"), 3, "empty directory")
    (clean / "folder" / "weights.pth").write_bytes(b"x")
    check_error(convert_in(clean, clean / "folder"), 3, "pass one of its files: weights.pth")
    (clean / "folder" / "config.json").write_text("{}")
    check_error(convert_in(clean, clean / "folder"), 3, "no model_type")


def test_outputs_that_cannot_be_written(models: Path, clean: Path) -> None:
    """A directory of that name, the input itself, a file where a folder should be."""
    source = shutil.copy(models / "flat.pt", clean / "source.onnx")
    check_error(run_cli("-i", source, "-o", source), 2, "would replace the input")
    (clean / "other.onnx").mkdir()
    os.mkfifo(clean / "pipe.onnx")
    check_error(run_cli("-i", source, "-o", str(clean / "pipe.onnx")), 2, "not a regular file")
    check_error(run_cli("-i", source, "-o", f"{source}/x.onnx"), 2, "is not a directory")
    for name in ("nowhere", "loop"):
        (clean / "loop").unlink(missing_ok=True)
        (clean / "loop").symlink_to(name)
        check_error(run_cli("-i", source, "-o", f"{clean}/loop/x.onnx"), 2, f"loop is a link to {name}")
    check_error(run_cli("-i", source, "-o", "\udcff.onnx", cwd=clean), 2, "\\udcff.onnx is not UTF-8")
    check_error(run_cli("-i", source, "-o", "x.onnx", "--task", "a\udcff", cwd=clean), 2, "a\\udcff is not UTF-8")


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root to give up root's rights")
def test_without_rights(models: Path, tmp_path: Path) -> None:
    """Without write permission the line names the uid; without read permission the file."""
    source = Path(shutil.copy(models / "flat.pt", tmp_path / "flat.pt"))
    target = tmp_path / "out"
    target.mkdir(mode=0o555)

    def powerless(*arguments: str) -> Result:
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, str(CONVERT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    check_error(powerless("-i", str(source), "-o", f"{target}/x.onnx"), 2, "not writable by uid 0", "--user")
    source.chmod(0)
    check_error(powerless("-i", str(source), "-o", f"{tmp_path}/x.onnx"), 3, "Permission denied", "flat.pt")
    assert not list(target.iterdir())


def test_full_disk(models: Path, tmp_path: Path) -> None:
    """A file that cannot grow (as on a full disk): exit 7, nothing left."""

    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    result = run_cli("-i", str(models / "flat.pt"), "-o", str(tmp_path / "new" / "x.onnx"), preexec_fn=limit_file_size)
    check_error(result, 7, "free some space")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
def test_really_full_disk(models: Path, tmp_path: Path) -> None:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount")
    try:
        (disk / "filler").write_bytes(b"x" * 60_000)
        check_error(
            run_cli("-i", str(models / "flat.pt"), "-o", f"{disk}/x.onnx"),
            7,
            "kB are needed",
            "kB are free on the disk",
        )
        assert [path.name for path in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_wrong_shapes(models: Path, clean: Path) -> None:
    """Exit 2 with the model's own reason, and what to pass."""
    check_error(
        convert_in(clean, models / "flat.pt", "--input-shape", "1,14"), 2, "1,14", "mat1 and mat2", "--input-shape"
    )
    check_error(convert_in(clean, models / "flat.pt", "--input-shape", "1,13", "1,13"), 2, "gives 2 inputs")
    check_error(convert_in(clean, models / "flat.pt", "--dynamic-axes", "5"), 2, "has no axis 5")
    check_error(convert_in(clean, models / "flat.pt", "--dynamic-axes", "other:0"), 2, "there is no input other")
    check_error(
        convert_in(clean, models / "flat.pt", "--dynamic-axes", "1"), 2, "accepts no other sequence_length than 13"
    )


def test_wrong_classes(models: Path, clean: Path) -> None:
    """Unknown, not importable, not buildable, not a module, not fitting; modes and options that contradict the file."""
    weights = models / "flat.pth"
    check_error(convert_in(clean, weights), 2, "weights only (4 tensors: 0.weight 8x13", "pass --model-class")
    check_error(convert_in(clean, weights, "--model-class", "resnet81"), 2, "no such model", "resnet18")
    check_error(convert_in(clean, weights, "--model-class", "no.where:Net"), 2, "No module named 'no'", "PYTHONPATH")
    check_error(convert_in(clean, weights, "--model-class", "torch.nn:Nothing"), 2, "Nothing")
    check_error(convert_in(clean, weights, "--model-class", "torch.nn:Linear"), 2, "cannot be built", "--model-args")
    check_error(convert_in(clean, weights, "--model-class", "builtins:dict"), 2, "made a dict")
    linear = ("--model-class", "torch.nn:Linear", "--model-args", '{"in_features": 3, "out_features": 4}')
    misfit = "2 missing (weight, bias); 4 unexpected (0.weight, 0.bias, 2.weight and 1 more)"
    check_error(convert_in(clean, weights, *linear), 2, misfit)
    check_error(convert_in(clean, weights, "--mode", "pytorch"), 2, "pass --mode state_dict")
    check_error(convert_in(clean, models / "flat.pt", "--mode", "state_dict"), 2, "pass --mode pytorch")
    check_error(convert_in(clean, models / "flat.pt", "--model-class", "resnet18"), 2, "do not fit --model-class")
    check_error(convert_in(clean, weights, "--checkpoint-key", "ema"), 2, "no weights there", "0.weight")


BESSEL = """
import torch
class Head(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 4)
        self.head = Head()
    def forward(self, x):
        return self.head(self.body(x))
"""


def test_operator_without_onnx(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 5 names the operator, its module and its source line; of a traced model, the operator."""
    import torch

    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "bessel.py").write_text(BESSEL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "user")
    from bessel import Net

    net = Net()
    torch.save(net.state_dict(), clean / "weights.pth")
    torch.jit.save(torch.jit.trace(net, torch.randn(2, 4)), str(clean / "traced.pt"))
    line = BESSEL[: BESSEL.index("bessel_j0")].count("\n") + 1
    operator = "'aten::special_bessel_j0' to ONNX opset version 14 is not supported"
    words = ("torchscript, opset 14", "dynamo, opset 18", "replace the operator in the model")
    options = ("--model-class", "bessel:Net", "--input-shape", "1,4")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "user")}
    result = convert_in(clean, clean / "weights.pth", *options, env=environment)
    check_error(result, 5, f"{operator} (module head, bessel.py({line}): forward)", *words)
    result = convert_in(clean, clean / "traced.pt", *options[2:])
    check_error(result, 5, operator, *words)


def test_no_gpu(models: Path, clean: Path) -> None:
    """Exit 7 at once, naming the container toolkit."""
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    start = time.monotonic()
    check_error(convert_in(clean, models / "flat.pt", "--device", "cuda"), 7, "NVIDIA Container Toolkit", "--gpus all")
    assert time.monotonic() - start < 5


def test_out_of_memory(models: Path, clean: Path) -> None:
    """An input far larger than the memory that the process may have."""

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    result = convert_in(clean, models / "image.pt", "--input-shape", "1,3,20000,20000", preexec_fn=limit_memory)
    check_error(result, 7, "out of memory", "GB")


@pytest.mark.parametrize("megabytes", [150, 400, 1500])
def test_too_little_memory_to_begin(megabytes: int, models: Path, clean: Path) -> None:
    """Memory that runs out while the libraries are imported is no bug of ours."""

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    check_error(convert_in(clean, models / "flat.pt", preexec_fn=limit_memory), 7, "memory", "GB")


def test_an_input_that_shrinks(clean: Path) -> None:
    """A file that is cut while it is mapped ends the worker with SIGBUS: that is the input's fault."""
    import torch

    source = clean / "shrinks.pt"
    torch.save(torch.nn.Linear(1 << 12, 1 << 12), source)
    arguments = ["-i", str(source), "-o", str(clean / "x.onnx")]
    process = subprocess.Popen([sys.executable, str(CONVERT), *arguments], stderr=subprocess.PIPE, text=True)
    wait_for(process, "mode:")
    os.truncate(source, 1 << 12)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 3, rest
    assert "changed while it was read" in rest


def start(models: Path, target: Path, *options: str, path: str = "", ignored: int = 0) -> subprocess.Popen[str]:
    """A conversion in a process group of its own that has begun to load."""

    def choose_signals() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells ignore it for what they start in the background
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    return subprocess.Popen(
        [sys.executable, str(CONVERT), "-i", str(models / "image.pt"), "-o", str(target), *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path} if path else None,
        preexec_fn=choose_signals,  # noqa: PLW1509
    )


def twice(pid: int) -> None:
    """The second signal comes while the first one is handled."""
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read the log until a line has `words`."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    pytest.fail(f"no line with {words!r}")


@pytest.mark.parametrize("moment", ["load:", "export:"])
@pytest.mark.parametrize(
    ("send", "code"),
    [
        pytest.param(lambda pid: os.kill(pid, signal.SIGTERM), 143, id="SIGTERM"),
        pytest.param(lambda pid: os.kill(pid, signal.SIGINT), 130, id="SIGINT"),
        pytest.param(lambda pid: os.killpg(pid, signal.SIGINT), 130, id="Ctrl-C"),
        pytest.param(lambda pid: os.killpg(pid, signal.SIGTERM), 143, id="group"),
        pytest.param(twice, 143, id="twice"),
    ],
)
def test_interrupted(moment: str, send: Callable[[int], None], code: int, models: Path, tmp_path: Path) -> None:
    """Within two seconds: one line, the right exit code, no worker and no file left."""
    process = start(models, tmp_path / "new" / "x.onnx", "--exporter", "dynamo")
    wait_for(process, moment)
    begin = time.monotonic()
    send(process.pid)
    _, rest = process.communicate(timeout=20)
    assert time.monotonic() - begin < 2
    assert process.returncode == code
    assert rest.count("[ERROR]") == 1
    assert "interrupted by SIG" in rest
    assert not list(tmp_path.iterdir())
    assert group_ends(process.pid)


EARLY = """import os, sys

class Finder:
    def find_spec(name, *_):
        if name == "bisect":
            os.kill(os.getpid(), {})

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_before_the_imports(number: signal.Signals, models: Path, tmp_path: Path) -> None:
    """A signal that comes as soon as convert.py runs ends it as every later one does."""
    (tmp_path / "sitecustomize.py").write_text(EARLY.format(int(number)), encoding="utf-8")
    process = start(models, tmp_path / "out" / "x.onnx", path=str(tmp_path))
    _, log = process.communicate(timeout=20)
    assert process.returncode == 128 + number, log
    assert log.splitlines() == [f"[ERROR] interrupted by {number.name}: nothing was written; run it again"]
    assert not (tmp_path / "out").exists()


# Read by every Python process: renames take long enough to be interrupted before and after.
SLOW = "import os, time\nreplace = os.replace\nos.replace = lambda *names: (time.sleep(0.5), replace(*names))"


@pytest.mark.parametrize("moved", [False, True])
def test_interrupted_beside_the_rename(moved: bool, models: Path, tmp_path: Path) -> None:  # noqa: FBT001
    """Just before it, nothing was written; just after it, the model was, whatever signal comes then."""
    (tmp_path / "sitecustomize.py").write_text(SLOW, encoding="utf-8")
    target = tmp_path / "out" / "x.onnx"
    target.parent.mkdir()
    target.write_bytes(b"older")
    process = start(models, target, path=str(tmp_path))
    journal = "out/.pt2onnx.*/moves.json"
    while not any(tmp_path.glob(journal)) or (moved and target.read_bytes() == b"older"):
        assert process.poll() is None
        time.sleep(0.01)
    twice(process.pid)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == (0 if moved else 143)
    assert ("[SUCCESS]" in rest) == moved
    assert ("nothing was written" in rest) != moved
    assert (target.read_bytes() == b"older") != moved
    assert [entry.name for entry in target.parent.iterdir()] == ["x.onnx"]


def test_signals_that_were_ignored_stay_so(models: Path, tmp_path: Path) -> None:
    """As nohup does it."""
    process = start(models, tmp_path / "x.onnx", ignored=signal.SIGHUP)
    wait_for(process, "load:")
    os.kill(process.pid, signal.SIGHUP)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 0, rest


def test_killed_supervisor(models: Path, tmp_path: Path) -> None:
    """The worker ends too, and what is left is removed by the next run, even by one that fails."""
    process = start(models, tmp_path / "x.onnx")
    wait_for(process, "export:")
    process.kill()
    process.communicate(timeout=20)
    assert group_ends(process.pid)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".partial"]
    next_one = start(models, tmp_path / "x.onnx")
    wait_for(next_one, "which a killed run had left")
    next_one.terminate()
    next_one.communicate(timeout=20)
    assert not list(tmp_path.iterdir())


def group_ends(group: int) -> bool:
    """Whether every process of the group is gone within some seconds."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_killed_worker(models: Path, tmp_path: Path) -> None:
    """The kernel's kill of the worker becomes exit 7 with the memory there is."""
    process = start(models, tmp_path / "x.onnx", "--exporter", "dynamo")
    wait_for(process, "export:")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 7
    assert rest.count("[ERROR]") == 1
    assert "memory" in rest
    assert not list(tmp_path.iterdir())


def test_crashed_attempt(models: Path, tmp_path: Path) -> None:
    """A crash in a library is the failure of the attempt that it happened in: the next one is tried."""
    process = start(models, tmp_path / "x.onnx")
    wait_for(process, "export: torchscript")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGSEGV)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "opset 18 instead of 14: torchscript, opset 14: a library crashed (SIGSEGV) in the step 'export'" in rest


def test_no_attempt_but_crashes(tmp_path: Path) -> None:
    """Where a library really crashes, and no other exporter is left, that is the reason of exit 5."""
    torch.save(torch.nn.CircularPad2d((3, 0, 2, 1)), tmp_path / "pad.pt")
    command = ("-i", str(tmp_path / "pad.pt"), "-o", str(tmp_path / "x.onnx"), "--input-shape", "3,3,10")
    result = run_forked(*command, "--exporter", "torchscript")
    check_error(result, 5, "torchscript, opset 14", "a library crashed (SIGABRT) in the step 'export'")
    assert run_forked(*command).code == 0


def test_a_bug_of_ours(models: Path, tmp_path: Path) -> None:
    """Exit 1 is the only one with a traceback, and asks for a report."""
    broken = tmp_path / "convert.py"
    text = CONVERT.read_text(encoding="utf-8")
    broken.write_text(
        text.replace("def move_into_place(", "def unused(").replace("move_into_place(result", "missing(result")
    )
    done = subprocess.run(
        [sys.executable, str(broken), "-i", str(models / "flat.pt"), "-o", str(tmp_path / "x.onnx")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "please report it" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["convert.py"]
