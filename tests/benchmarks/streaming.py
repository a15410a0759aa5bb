"""Models larger than memory: what a conversion takes under a hard limit of memory, against other ways to export.

    python tests/benchmarks/streaming.py [--shapes 0.5B 1.5B 3B] [--limit 2] [--ways pt2onnx transformers]
    python tests/benchmarks/streaming.py --layers 8 16 32 64 80

Decoders of the Qwen2 shapes with random weights in bfloat16, in shards, made on the disk and removed again. `experts`
is a Qwen3 mixture of 16 layers with 64 experts each, which lie in the checkpoint one by one. Each way is a process in a
control group of its own (root is needed) with limited memory, of which the page cache gives up its part first; `over`:
it was killed there. Peak: what was resident, with the pages of mapped files.
write / cp: the time in which the weights were written, relative to `cp` and `sync` of as many bytes right after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface import EXPORTER
from overhead import CONVERT

SHAPES: dict[str, dict[str, Any]] = {  # those of Qwen2.5
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
    "experts": {
        "model_type": "qwen3_moe",
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
        "head_dim": 64,
    },
}
COLUMNS = ("decoder", "way", "time", "peak", "anonymous", "written", "write / cp", "verified")
MAKE = """
import json, sys, torch, transformers
from safetensors.torch import save_file
folder, sizes = sys.argv[1], json.loads(sys.argv[2])
config = transformers.AutoConfig.for_model(sizes.pop("model_type", "qwen2"), dtype="bfloat16", **sizes)
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
config.architectures = [type(model).__name__]
config.save_pretrained(folder)
shard, count, index, chance = {}, 0, {}, torch.Generator().manual_seed(0)
shapes = {}
for name, parameter in model.named_parameters():
    if ".experts." not in name:
        shapes[name] = parameter.shape
        continue
    layer, _, kind = name.rpartition(".")  # transformers joins them when it loads them
    sides = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    experts, rows, columns = parameter.shape
    for expert in range(experts):
        for side in sides:
            shapes[f"{layer}.{expert}.{side}.weight"] = (rows // len(sides), columns)
for name, shape in shapes.items():
    tensor = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=chance) / 50
    shard[name] = tensor.bfloat16()
    if sum(tensor.nbytes for tensor in shard.values()) > 1 << 30 or len(index) + len(shard) == len(shapes):
        count += 1
        file = f"model-{count:05d}.safetensors"
        save_file(shard, f"{folder}/{file}", {"format": "pt"})
        index |= dict.fromkeys(shard, file)
        shard = {}
with open(f"{folder}/model.safetensors.index.json", "w") as file:
    json.dump({"metadata": {}, "weight_map": index}, file)
"""


class Run(NamedTuple):
    """How one way went."""

    code: int
    seconds: float
    peak: float  # bytes
    anonymous: float  # bytes, without pages of files
    log: str


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group whose memory is limited to `limit` bytes, of either version of the kernel's interface."""
    old = Path("/sys/fs/cgroup/memory")
    root, name = (old, "memory.limit_in_bytes") if old.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    group = root / f"pt2onnx-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(limit), encoding="ascii")
        yield group
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def resident(group: Path) -> tuple[int, int]:
    """Resident and anonymous bytes of the processes of a group, the largest of them."""
    most = (0, 0)
    for number in (group / "cgroup.procs").read_text(encoding="ascii").split():
        with contextlib.suppress(OSError):
            status = Path("/proc", number, "status").read_text(encoding="utf-8")
            sizes = [
                int(found[1]) << 10 for key in ("VmRSS", "RssAnon") if (found := re.search(rf"{key}:\s+(\d+)", status))
            ]
            most = max(most, (sizes[0], sizes[1])) if len(sizes) > 1 else most
    return most


def run(command: list[str], limit: int) -> Run:
    """Run `command` under `limit` bytes of memory."""
    with control_group(limit) as group, tempfile.TemporaryFile() as log:
        start = time.monotonic()
        enter = lambda: (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")  # noqa: E731
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=enter)  # noqa: PLW1509
        peaks = [(0, 0)]
        while process.poll() is None:
            peaks.append(resident(group))
            time.sleep(0.02)
        log.seek(0)
        seconds = time.monotonic() - start
        return Run(process.returncode, seconds, max(peaks)[0], max(b for _, b in peaks), log.read().decode())


def copy_seconds(size: int, folder: Path) -> float:
    """How long `cp` and `sync` take for a file of `size` bytes that are not all zero, at most 2 GB of it measured."""
    part = min(size, 2 << 30)
    block = os.urandom(1 << 24)
    with (folder / "a").open("wb") as file:
        for _ in range(part // len(block) or 1):
            file.write(block)
        os.fsync(file.fileno())
    start = time.monotonic()
    subprocess.run(["cp", folder / "a", folder / "b"], check=True)
    subprocess.run(["sync", folder / "b"], check=True)
    seconds = time.monotonic() - start
    (folder / "a").unlink()
    (folder / "b").unlink()
    return seconds * size / part


def row(shape: str, way: str, result: Run, target: Path, folder: Path) -> str:
    """One line of the table."""
    if result.code:
        killed = result.code in (-signal.SIGKILL, 7)
        return f"| {shape} | {way} | {'over' if killed else f'exit {result.code}'} {'| ' * (len(COLUMNS) - 2)}".rstrip()
    written = sum(file.stat().st_size for file in target.rglob("*.onnx*"))
    ratio = ""
    copied = re.search(r"write: .*: ([\d.]+) MB in ([\d.]+) s", result.log)
    if copied and float(copied[1]) > 100:
        ratio = f"{float(copied[2]) / max(copy_seconds(int(float(copied[1]) * 1e6), folder), 0.01):.1f}"
    verified = "yes" if "verified at" in result.log else "no"
    sizes = f"{result.peak / 1e9:.2f} GB | {result.anonymous / 1e9:.2f} GB | {written / 1e9:.2f} GB"
    return f"| {shape} | {way} | {result.seconds:.0f} s | {sizes} | {ratio} | {verified} |"


def time_tracing(counts: list[int], folder: Path | None) -> None:
    """Print how long the export alone takes for decoders of small layers, by their number."""
    print("| layers | export | for each layer |\n|---|---|---|")
    for count in counts:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": count, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 100000, "max_window_layers": count}
        with tempfile.TemporaryDirectory(dir=folder) as name:
            source, target = Path(name, "in"), Path(name, "out")
            source.mkdir()
            subprocess.run([sys.executable, "-c", MAKE, str(source), json.dumps(sizes)], check=True)
            command = [sys.executable, str(CONVERT), "-i", str(source), "-o", f"{target}/", "--no-verify", "--json"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds = json.loads(done.stdout)["steps"]["export"]
        print(f"| {count} | {seconds:.1f} s | {seconds / count * 1000:.0f} ms |", flush=True)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B", "3B"])
    parser.add_argument("--ways", nargs="+", choices=("pt2onnx", "transformers"), default=["pt2onnx", "transformers"])
    parser.add_argument("--limit", type=float, default=2, help="GB of memory that a process may have")
    parser.add_argument(
        "--folder", type=Path, help="where the models are made (default: the system's temporary folder)"
    )
    parser.add_argument("--layers", nargs="+", type=int, help="only time the tracing of so many layers")
    options = parser.parse_args()
    if options.layers:
        time_tracing(options.layers, options.folder)
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; at most {options.limit:g} GB of memory\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for shape in options.shapes:
        sizes = {"num_key_value_heads": 2, "tie_word_embeddings": shape != "7B", **SHAPES[shape]}
        sizes["max_window_layers"] = sizes["num_hidden_layers"]
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            for way in options.ways:
                folder = Path(name, way)
                source, target = folder / "in", folder / "out"
                source.mkdir(parents=True)
                make = [sys.executable, "-c", MAKE, str(source), json.dumps(sizes)]
                subprocess.run(make, check=True, stderr=subprocess.DEVNULL)
                command = {
                    "pt2onnx": [sys.executable, str(CONVERT), "-i", str(source), "-o", f"{target}/"],
                    "transformers": [sys.executable, "-c", EXPORTER, str(source), str(target)],
                }[way]
                result = run(command, int(options.limit * 1e9))
                print(row(shape, way, result, target, folder), flush=True)
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
