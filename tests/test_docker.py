"""The image, built and run for real, and what the README and guides/containers.md say about it.

tests/docker_engine.sh .venv/bin/python -m pytest -m docker   (brings an engine where none runs)
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from helpers import CONVERT, Result, check_error, lines, onnx_outputs, run_cli

import convert

pytestmark = pytest.mark.docker

ROOT = CONVERT.parent
DATA = ROOT / "tests" / "data"
IMAGE = "pt2onnx:test"
DIGITS = ("-i", "/input/digits.pt", "-o", "/output/digits.onnx")
LOCKED = shlex.split(
    "--network none --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --pids-limit 256"
)
# A user of the host who is neither root nor the image's own: the caller where that holds, else any number.
CALLER = (os.getuid(), os.getgid()) if os.getuid() not in (0, 1000) else (4242, 4343)


class Folders(NamedTuple):
    """What is mounted at /input and /output."""

    source: Path
    target: Path

    def mounts(self, source_mode: str = "ro") -> tuple[str, ...]:
        """The options of `docker run` for both."""
        return ("-v", f"{self.source}:/input:{source_mode}", "-v", f"{self.target}:/output")


def docker(*arguments: str, timeout: float = 120) -> Result:
    """Run the docker command line; what the engine says about its own host is no part of the answer."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    told = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("WARNING: ")]
    return Result(done.returncode, done.stdout, "".join(told))


def build(folder: Path, tag: str) -> None:
    """Build the image from the Dockerfile in `folder`; its log is shown where that fails."""
    options = shlex.split(os.environ.get("PT2ONNX_DOCKER_BUILD", ""))
    done = docker("build", "-t", tag, *options, str(folder), timeout=3600)
    assert done.code == 0, (done.out + done.err)[-3000:]


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """The image of this checkout, built once."""
    if reason := os.environ.get("PT2ONNX_DOCKER_SKIP"):
        pytest.skip(reason)
    if docker("info").code != 0:
        pytest.skip("no Docker engine answers: run this with tests/docker_engine.sh")
    build(ROOT, IMAGE)
    yield IMAGE
    docker("image", "prune", "-f", "--filter", "label=org.opencontainers.image.title=pt2onnx")  # of earlier builds


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Models that all may read and an output folder that all may write, both owned by whoever runs the tests."""
    found = Folders(tmp_path / "in", tmp_path / "out")
    found.source.mkdir()
    found.target.mkdir()
    shutil.copy(DATA / "digits.pt", found.source)
    (found.source / "digits.pt").chmod(0o644)
    found.source.chmod(0o755)
    found.target.chmod(0o777)
    return found


def run_image(image: str, folders: Folders, *arguments: str, options: tuple[str, ...] = ()) -> Result:
    """Run the image as the README says, with more `options` of docker run."""
    return docker("run", "--rm", *folders.mounts(), *options, image, *arguments)


def check_digits(model: Path) -> None:
    """The digit classifier answers in ONNX Runtime, outside the container, what PyTorch did when it was trained."""
    with np.load(DATA / "digits_samples.npz") as samples:
        for images, logits in ((samples["images"], samples["logits"]), (samples["images"][:5], samples["logits"][:5])):
            (found,) = onnx_outputs(model, {"input": images}).values()
            np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)


def check_success(result: Result, folders: Folders) -> None:
    """Exit code 0, one [SUCCESS] line, one file in the output folder and the right numbers in it."""
    assert result.code == 0, result.err
    assert len(lines(result, "SUCCESS")) == 1
    assert [path.name for path in folders.target.iterdir()] == ["digits.onnx"]
    check_digits(folders.target / "digits.onnx")


# ---- the image itself


def test_what_the_image_says(image: str) -> None:
    """Labels, user and entry point; the version is the script's own."""
    (facts,) = json.loads(docker("image", "inspect", image).out)
    config = facts["Config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["version"] == convert.__version__
    assert {"title", "description", "source", "licenses"} <= labels.keys()
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["/app/entrypoint.sh"]
    assert docker("run", "--rm", image, "--version").out == f"pt2onnx {convert.__version__}\n"


def test_nothing_needless_in_the_image(image: str) -> None:
    """No compiler, no package cache, no installer's leftovers, only the product's own files in /app."""
    look = (
        "for name in cc gcc g++ clang ld make; do command -v $name; done; find /root /tmp /var/lib/apt/lists "
        "/var/cache/apt/archives -type f -size +100k; ls /app"
    )
    result = docker("run", "--rm", "--user", "0", "--entrypoint", "sh", image, "-c", look)
    shipped = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()} - {"*"}
    assert set(result.out.split()) == shipped | {"large.txt"}, result


def test_an_edit_rebuilds_in_seconds(image: str, tmp_path: Path) -> None:
    """A changed convert.py leaves every layer of the dependencies as it was."""
    ignored = shutil.ignore_patterns(".*", "tests")
    changed = shutil.copytree(ROOT, tmp_path / "edit", ignore=ignored)
    shutil.copy(ROOT / ".dockerignore", changed)
    with (changed / "convert.py").open("a") as file:
        file.write("# an edit\n")
    begin = time.monotonic()
    build(changed, "pt2onnx:edited")
    seconds = time.monotonic() - begin
    before, after = (
        json.loads(docker("image", "inspect", "-f", "{{json .RootFS.Layers}}", tag).out)
        for tag in (image, "pt2onnx:edited")
    )
    docker("image", "rm", "pt2onnx:edited")
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]
    assert seconds < 30


# ---- volumes and users


@pytest.mark.parametrize(
    ("options", "owner"),
    [
        pytest.param((), (1000, 1000), id="the image's user"),
        pytest.param(("--user", f"{CALLER[0]}:{CALLER[1]}"), CALLER, id="the caller"),
        pytest.param(("--user", "12345"), (12345, 0), id="unknown uid"),
        pytest.param(("--user", "0"), (0, 0), id="root"),
    ],
)
def test_files_belong_to_the_user(
    options: tuple[str, ...], owner: tuple[int, int], image: str, folders: Folders
) -> None:
    """The input is someone else's and read-only; the output is the user's, with ordinary permissions."""
    check_success(run_image(image, folders, *DIGITS, options=options), folders)
    status = (folders.target / "digits.onnx").stat()
    assert (status.st_uid, status.st_gid) == owner
    assert status.st_mode & 0o777 == 0o644


def test_the_readme_command_as_written(image: str, folders: Folders) -> None:
    """The command of the README, with real paths in it."""
    commands = re.findall(r"^docker run -v .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    real = {"/path/to/models": folders.source, "/path/to/output": folders.target, "pt2onnx": image}
    command = re.sub("|".join(real), lambda match: str(real[match[0]]), commands[0])
    shutil.copy(DATA / "digits.pt", folders.source / "model.pt")
    result = docker(*shlex.split(command)[1:])
    assert result.code == 0, result.err
    check_digits(folders.target / "model.onnx")


def test_output_that_is_not_writable(image: str, folders: Folders) -> None:
    """The line names the uid and what to do."""
    folders.target.chmod(0o755)
    result = run_image(image, folders, *DIGITS, options=("--user", "12345"))
    check_error(result, 2, "/output is not writable by uid 12345", "--user $(id -u):$(id -g)")
    assert not list(folders.target.iterdir())
    read_only = run_image(image, folders, "-i", "/input/digits.pt", "-o", "/input/x.onnx", options=("--user", "0"))
    check_error(read_only, 2, "/input", "is not writable")


def test_input_that_is_not_readable(image: str, folders: Folders) -> None:
    """A file that only its owner may read; a path that is not mounted."""
    (folders.source / "digits.pt").chmod(0o600)
    result = run_image(image, folders, *DIGITS, options=("--user", "12345"))
    check_error(result, 3, "/input/digits.pt", "Permission denied")
    check_error(run_image(image, folders, "-i", "/models/x.pt", "-o", "/output"), 3, "/models/x.pt", "No such file")


def test_a_class_from_a_mounted_folder(image: str, folders: Folders, tmp_path: Path) -> None:
    """PYTHONPATH leads to the user's own code."""
    import torch

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text("from torch.nn import Linear\nclass Net(Linear):\n    pass\n")
    layer = torch.nn.Linear(5, 2)
    torch.save(layer.state_dict(), folders.source / "net.pth")
    options = ("-v", f"{tmp_path / 'src'}:/src:ro", "-e", "PYTHONPATH=/src")
    arguments = ("--model-class", "mine:Net", "--model-args", '{"in_features": 5, "out_features": 2}')
    result = run_image(image, folders, "-i", "/input/net.pth", "-o", "/output/net.onnx", *arguments, options=options)
    assert result.code == 0, result.err
    values = torch.randn(4, 5)
    (found,) = onnx_outputs(folders.target / "net.onnx", {"input": values.numpy()}).values()
    np.testing.assert_allclose(found, layer(values).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_two_containers_share_an_output_folder(image: str, folders: Folders) -> None:
    """Every container's process has number 1; the runs must not take each other's files for their own."""
    names = ("a", "b")

    def run(name: str) -> Result:
        return run_image(image, folders, "-i", "/input/digits.pt", "-o", f"/output/{name}.onnx")

    with ThreadPoolExecutor() as pool:
        for result in pool.map(run, names):
            assert result.code == 0, result.err
            assert "opset 14, torchscript" in lines(result, "SUCCESS")[0]  # not the rung after a disturbed one
    assert sorted(path.name for path in folders.target.iterdir()) == ["a.onnx", "b.onnx"]
    for name in names:
        check_digits(folders.target / f"{name}.onnx")


# ---- locked down


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("user", [(), ("--user", "12345")], ids=["image's user", "unknown uid"])
def test_locked_down(user: tuple[str, ...], exporter: str, image: str, folders: Folders) -> None:
    """No network, no writable root, no capability, few processes: both exporters work."""
    options = (*LOCKED, "-e", f"HF_HUB_OFFLINE={int(exporter == 'dynamo')}", *user)
    result = run_image(image, folders, *DIGITS, "--exporter", exporter, "--opset", "18", options=options)
    check_success(result, folders)


def test_without_any_writable_folder_but_the_output(image: str, folders: Folders) -> None:
    """Not even /tmp."""
    check_success(run_image(image, folders, *DIGITS, options=("--read-only",)), folders)


def test_a_hub_id_without_network(image: str, folders: Folders) -> None:
    """The line says why nothing is downloaded, and what to do."""
    result = run_image(image, folders, "-i", "google/vit-base-patch16-224", "-o", "/output", options=tuple(LOCKED))
    check_error(result, 3, "google/vit-base-patch16-224", "the hub cannot be reached", "mount")


def test_exit_codes_pass_through(image: str, folders: Folders) -> None:
    """Usage, no model, refused: as without a container."""
    (folders.source / "text.pt").write_text("hello\n")
    (folders.source / "code.pt").write_bytes(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")
    check_error(docker("run", "--rm", image), 2, "--input")
    check_error(run_image(image, folders, "-i", "/input/text.pt", "-o", "/output"), 3, "is a text file")
    check_error(run_image(image, folders, "-i", "/input/code.pt", "-o", "/output"), 4, "posix.system")


# ---- memory


LARGE = ("--input-shape", "1,3,6000,6000")  # 0.4 GB, and the answers as much


@pytest.fixture
def large(folders: Folders) -> tuple[str, ...]:
    """The arguments of a conversion that needs more than a gigabyte, over an older output."""
    import torch

    torch.save(torch.nn.Conv2d(3, 4, 3), folders.source / "image.pt")
    (folders.target / "image.onnx").write_bytes(b"older")
    return ("-i", "/input/image.pt", "-o", "/output/image.onnx", *LARGE)


def check_untouched(folders: Folders) -> None:
    """The older output, and nothing else."""
    assert [path.name for path in folders.target.iterdir()] == ["image.onnx"]
    assert (folders.target / "image.onnx").read_bytes() == b"older"


@pytest.mark.parametrize(("limit", "told"), [("600m", "0.629 GB"), ("100m", "0.105 GB")])
def test_killed_for_its_memory(limit: str, told: str, large: tuple[str, ...], image: str, folders: Folders) -> None:
    """The kernel's kill becomes exit 7 and a line with the limit; at 100 MB torch cannot even be imported."""
    options = ("-m", limit, "--memory-swap", limit)
    check_error(run_image(image, folders, *large, options=options), 7, "memory", f"limited to {told}")
    check_untouched(folders)


@pytest.fixture
def nested_group() -> Iterator[Path]:
    """A cgroup without a limit of its own inside one that may use 300 MB, in the version of cgroups that runs here."""
    first_version = Path("/sys/fs/cgroup/memory")
    root, name = (first_version, "limit_in_bytes") if first_version.is_dir() else (first_version.parent, "max")
    outer = root / f"pt2onnx-test-{os.getpid()}"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    (outer / f"memory.{name}").write_text("300000000")
    yield inner
    inner.rmdir()
    outer.rmdir()


@pytest.mark.skipif(not os.access("/sys/fs/cgroup", os.W_OK), reason="needs root and a cgroup file system it may write")
@pytest.mark.usefixtures("large")
def test_limit_of_a_group_around(nested_group: Path, folders: Folders) -> None:
    """Without a container: the process's own cgroup has no limit, the one around it has."""

    def enter() -> None:
        (nested_group / "cgroup.procs").write_text(str(os.getpid()))

    files = ("-i", str(folders.source / "image.pt"), "-o", str(folders.target / "image.onnx"))
    check_error(run_cli(*files, *LARGE, preexec_fn=enter), 7, "memory", "limited to 0.3 GB")
    check_untouched(folders)


def test_memory_that_is_refused(large: tuple[str, ...], image: str, folders: Folders) -> None:
    """An allocation that fails is told by the process itself, with the container's limit."""
    options = ("-m", "6g", "--memory-swap", "6g", "--ulimit", "data=1200000000")
    check_error(run_image(image, folders, *large, options=options), 7, "out of memory", "limited to 6.44 GB")
    check_untouched(folders)


def test_enough_memory(image: str, folders: Folders) -> None:
    """More than what the guide says is enough for a small model."""
    check_success(run_image(image, folders, *DIGITS, options=("-m", "1g", "--memory-swap", "1g")), folders)


# ---- signals


class Started(NamedTuple):
    """A container that converts."""

    name: str
    process: subprocess.Popen[str]


@pytest.fixture
def slow(image: str, folders: Folders) -> Iterator[Started]:
    """A conversion of ResNet-50, which takes several seconds, just begun."""
    import torch
    import torchvision

    torch.save(torchvision.models.resnet50(), folders.source / "resnet.pt")
    name = f"pt2onnx-{uuid.uuid4().hex}"
    arguments = ("-i", "/input/resnet.pt", "-o", "/output/new/resnet.onnx")
    command = ["docker", "run", "--rm", "--name", name, *folders.mounts(), image, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    yield Started(name, process)
    docker("rm", "-f", name)
    process.wait(timeout=20)


def wait_for_line(process: subprocess.Popen[str], words: str) -> None:
    """Read the log until a line has `words`."""
    assert process.stderr is not None
    assert any(words in line for line in process.stderr)


@pytest.mark.parametrize("moment", ["", "load:", "export:", "verify:"])
def test_docker_stop(moment: str, slow: Started, folders: Folders) -> None:
    """At any moment, the first one of the container's process included: within two seconds, exit 143, no debris."""
    if moment:
        wait_for_line(slow.process, moment)
    else:
        while "/app/" not in docker("top", slow.name).out:
            time.sleep(0.01)
    begin = time.monotonic()
    stopped = docker("stop", slow.name)
    seconds = time.monotonic() - begin
    assert stopped.code == 0, stopped.err
    _, rest = slow.process.communicate(timeout=20)
    assert slow.process.returncode == 143, rest
    assert rest.count("[ERROR] interrupted by SIGTERM") == 1 or not moment
    assert not list(folders.target.iterdir())
    assert seconds < 2


def test_ctrl_c(image: str, folders: Folders) -> None:
    """Ctrl-C on the terminal of `docker run -it`."""
    import torch
    import torchvision

    torch.save(torchvision.models.resnet50(), folders.source / "resnet.pt")
    arguments = ("-i", "/input/resnet.pt", "-o", "/output/resnet.onnx")
    keyboard, terminal = pty.openpty()
    command = ["docker", "run", "-it", "--rm", *folders.mounts(), image, *arguments]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    screen = b""
    while b"export" not in screen:
        screen += os.read(keyboard, 4096)
    begin = time.monotonic()
    os.write(keyboard, b"\x03")
    assert process.wait(timeout=20) == 130
    assert time.monotonic() - begin < 2
    while b"[ERROR] interrupted by SIGINT" not in screen:
        screen += os.read(keyboard, 4096)
    os.close(keyboard)
    assert not list(folders.target.iterdir())


# ---- GPU


def test_cuda(image: str, folders: Folders) -> None:
    """With a GPU the export and PyTorch's side of the comparison run there; without one: exit 7 at once."""
    gpu = ("--gpus", "all")
    if docker("run", "--rm", *gpu, "--entrypoint", "nvidia-smi", image).code == 0:
        result = run_image(image, folders, *DIGITS, "--device", "cuda", options=gpu)
        check_success(result, folders)
        assert "CUDA provider" in result.err
    else:
        begin = time.monotonic()
        check_error(run_image(image, folders, *DIGITS, "--device", "cuda"), 7, "NVIDIA Container Toolkit", "--gpus all")
        assert time.monotonic() - begin < 5
        assert not list(folders.target.iterdir())


# ---- what the guide says for compose and Kubernetes


def manifest(word: str) -> str:
    """The YAML block of the guide that has `word`."""
    guide = (ROOT / "tests" / "guides" / "containers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if word in block)
    return block


@pytest.fixture
def compose(tmp_path: Path) -> list[str]:
    """`docker compose` for the guide's service, with the image of these tests, in a folder of its own."""
    text = manifest("services:").replace("image: pt2onnx\n", f"image: {IMAGE}\n")
    (tmp_path / "compose.yaml").write_text(text)
    return [str(Path(sys.executable).with_name("docker-compose")), "-f", str(tmp_path / "compose.yaml")]


def test_compose_service_is_valid(compose: list[str]) -> None:
    """Compose itself accepts it; memory is limited, the root read-only and the user not root."""
    done = subprocess.run([*compose, "config", "--format", "json"], capture_output=True, text=True, check=True)
    assert not done.stderr
    (service,) = json.loads(done.stdout)["services"].values()
    assert service["read_only"]
    assert service["user"] == "1000:1000"
    assert int(service["mem_limit"]) == int(service["memswap_limit"]) > 0


@pytest.mark.usefixtures("image")
def test_compose_service_runs(compose: list[str], tmp_path: Path) -> None:
    """`docker compose run` converts what lies in ./models into ./output."""
    folders = Folders(tmp_path / "models", tmp_path / "output")
    folders.source.mkdir()
    folders.target.mkdir()
    folders.target.chmod(0o777)
    shutil.copy(DATA / "digits.pt", folders.source / "model.pt")
    done = subprocess.run([*compose, "run", "--rm", "pt2onnx"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_digits(folders.target / "model.onnx")


def job_manifest() -> Any:
    """The guide's Kubernetes Job."""
    return yaml.safe_load(manifest("kind: Job"))


def test_kubernetes_job_is_valid() -> None:
    """The strict schema of Kubernetes accepts it, and would not accept a misspelt field."""
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job_manifest(), version, strict=True)
    wrong = job_manifest()
    wrong["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRoot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_kubernetes_job_runs(image: str, folders: Folders) -> None:
    """What the Job asks of a node, asked of docker: the same user, limits, mounts and arguments."""
    pod = job_manifest()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not context["allowPrivilegeEscalation"]
    memory = container["resources"]["limits"]["memory"].removesuffix("i").lower()
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert paths == {"/input", "/output", "/tmp"}
    options = ["--read-only", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp", "-m", memory]
    options += ["--user", f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"]
    options += [word for name in context["capabilities"]["drop"] for word in ("--cap-drop", name)]
    shutil.copy(DATA / "digits.pt", folders.source / "model.pt")
    result = run_image(image, folders, *container["args"], options=tuple(options))
    assert result.code == 0, result.err
    check_digits(folders.target / "model.onnx")
