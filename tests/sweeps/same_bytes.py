#!/usr/bin/env python3
"""Convert twenty models and write down what came out, to compare two versions of convert.py byte for byte.

    python tests/sweeps/same_bytes.py FOLDER OUT.txt [--convert PATH/convert.py]   # SHA-256, model, name of each file
    diff OLD.txt NEW.txt

FOLDER keeps the inputs (seeded random weights), which are made once: graphs hold the digest of their input.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONVERT = Path(__file__).resolve().parents[2] / "convert.py"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tiny_models, wherever it is started

# Each model: how its input is made in a path, and the options of its conversion.
Maker = Callable[[Path], None]


def module(name: str, **arguments: Any) -> Maker:
    """A complete model of torchvision."""

    def make(path: Path) -> None:
        import torch
        import torchvision

        torch.manual_seed(0)
        torch.save(torchvision.models.get_model(name, weights=None, **arguments).eval(), path)

    return make


def weights(name: str) -> Maker:
    """The weights of a model of timm."""

    def make(path: Path) -> None:
        import timm
        import torch

        torch.manual_seed(0)
        torch.save(timm.create_model(name).state_dict(), path)

    return make


def small(kind: str) -> Maker:
    """A small model of torch's own layers, in one of the formats."""

    def make(path: Path) -> None:
        import torch
        from torch import nn

        torch.manual_seed(0)
        image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
        example = torch.randn(2, 3, 16, 16)
        if kind == "scripted":
            torch.jit.save(torch.jit.script(image), str(path))
        elif kind == "traced":
            torch.jit.save(torch.jit.trace(image, example), str(path))
        elif kind == "program":
            torch.export.save(torch.export.export(image, (example,)), path)
        elif kind == "legacy":
            torch.save(image, path, _use_new_zipfile_serialization=False)
        elif kind == "lstm":
            torch.save(nn.LSTM(8, 16, 2, batch_first=True).eval(), path)
        else:
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            torch.save(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), path)

    return make


def folder(name: str) -> Maker:
    """A tiny Hugging Face model."""

    def make(path: Path) -> None:
        import tiny_models

        tiny_models.make(name, path)

    return make


MODELS: dict[str, tuple[Maker, Sequence[str]]] = {
    "resnet18.pt": (module("resnet18"), ()),
    "mobilenet_v3_small.pt": (module("mobilenet_v3_small"), ("--opset", "17")),
    "squeezenet1_1.pt": (module("squeezenet1_1"), ("--static",)),
    "shufflenet_v2_x0_5.pt": (module("shufflenet_v2_x0_5"), ("--exporter", "dynamo")),
    "efficientnet_b0.pt": (module("efficientnet_b0"), ("--opset", "20")),
    "lraspp.pt": (module("lraspp_mobilenet_v3_large", weights_backbone=None), ()),
    "ssdlite.pt": (module("ssdlite320_mobilenet_v3_large", weights_backbone=None), ()),
    "resnet10t.pth": (weights("resnet10t"), ("--model-class", "timm.models:resnet10t")),
    "vit_tiny.pth": (weights("vit_tiny_patch16_224"), ("--model-class", "timm.models:vit_tiny_patch16_224")),
    "scripted.pt": (small("scripted"), ()),
    "traced.pt": (small("traced"), ()),
    "program.pt2": (small("program"), ()),
    "legacy.pt": (small("legacy"), ()),
    "lstm.pt": (small("lstm"), ()),
    "encoder.pt": (small("encoder"), ("--dtype", "fp32")),
    "bert": (folder("bert"), ()),
    "gpt2": (folder("gpt2"), ()),
    "t5": (folder("t5"), ()),
    "vit": (folder("vit"), ()),
    "whisper": (folder("whisper"), ()),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the inputs that are missing, convert each, and write the digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--convert", type=Path, default=CONVERT)
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (make, options) in MODELS.items():
        source = arguments.folder / name
        if not source.exists():
            make(source)
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, str(arguments.convert), "-i", str(source), "-o", f"{place}/", *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines.append(f"exit {done.returncode} {name}")
            files = sorted(file for file in Path(place).rglob("*") if file.is_file())
            lines += [f"{hashlib.sha256(file.read_bytes()).hexdigest()} {name} {file.name}" for file in files]
        print(lines[-1] if done.returncode == 0 else done.stderr.splitlines()[-1:], flush=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
