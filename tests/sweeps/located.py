#!/usr/bin/env python3
"""Change one node in converted graphs, and count how often the product says in which module they begin to differ.

    OMP_NUM_THREADS=1 nice python tests/sweeps/located.py [--only NAME ...]

Each model is converted by each exporter in a forked child. Before the product's verification of a graph, copies of it
with one change each are verified as well: a weight, an operator, an attribute, a bias, or an order of inputs. The
module that the changed node belongs to is what the exporter wrote into the node's name or metadata, of which the
product knows nothing. Results: tests/reports/located.md.
"""

import argparse
import ast
import collections
import importlib.metadata
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# tests/ and the folder of convert.py, in place of this one
sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

import numpy as np
import onnx
import tiny_models
import torch
import torchvision
from onnx import numpy_helper
from sweeps.jobs import REPORTS, ROOT, Json, apart, convert, load_product
from torch import Tensor, nn

TRIES = 12  # changes of one kind: not every one shows in the outputs


class Attention(nn.Module):
    """Written out, with a gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Over batch x tokens x width."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) / (width // self.heads) ** 0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.out(mixed * torch.sigmoid(self.gate(x)))


class Block(nn.Module):
    """A layer of a transformer with a scale of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        """Two residual parts."""
        x = x + self.attn(self.norm1(x)) * self.scale
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Blocks over numbers, with a mean at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.layers = nn.ModuleList(Block(32) for _ in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Over batch x tokens x 12."""
        x = torch.tanh(self.embed(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Double(nn.Sequential):
    """Two convolutions."""

    def __init__(self, taken: int, given: int) -> None:
        first = (nn.Conv2d(taken, given, 3, padding=1), nn.BatchNorm2d(given), nn.ReLU(inplace=True))
        super().__init__(*first, nn.Conv2d(given, given, 3, padding=1), nn.LeakyReLU(0.2))


class Unet(nn.Module):
    """Down, up, and a connection across."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = Double(3, 8), Double(8, 16), Double(24, 8)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A mask of two channels."""
        high = self.down(x)
        low = self.middle(self.pool(high))
        wide = nn.functional.interpolate(low, scale_factor=2, mode="nearest")
        return torch.sigmoid(self.last(self.up(torch.cat([high, wide], 1))) * 0.5)


class Tagger(nn.Module):
    """Recurrent, with convolutions before and attention weights after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(6, 16, 3, padding=1), nn.ELU())
        self.rnn = nn.GRU(16, 12, batch_first=True, bidirectional=True)
        self.score, self.head = nn.Linear(24, 1), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Over batch x 6 x steps."""
        states, _ = self.rnn(self.conv(x).transpose(1, 2))
        weights = torch.softmax(self.score(torch.tanh(states)), 1)
        return self.head((states * weights).sum(1)).log_softmax(-1)


def vision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    """A model of torchvision with random weights."""
    return lambda: torchvision.models.get_model(name, weights=None, **arguments)


def small_transformer() -> nn.Module:
    """A vision transformer of torchvision, of three layers."""
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    model = torchvision.models.VisionTransformer(**sizes, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # zeros at first, which hide everything
    return model


# Files, with the shape of their inputs; folders of tiny_models.py, with none.
MODELS: dict[str, tuple[Callable[[], nn.Module] | str, str]] = {
    "resnet18": (vision("resnet18"), "1,3,64,64"),
    "mobilenet_v3_small": (vision("mobilenet_v3_small"), "1,3,64,64"),
    "shufflenet_v2_x0_5": (vision("shufflenet_v2_x0_5"), "1,3,64,64"),
    "vision transformer": (small_transformer, "1,3,32,32"),
    "own transformer": (Transformer, "1,7,12"),
    "own U-net": (Unet, "1,3,16,16"),
    "own tagger": (Tagger, "1,6,9"),
    "bert": ("bert", ""),
    "llama": ("llama", ""),
    "vit": ("vit", ""),
}


def randomise(model: nn.Module) -> nn.Module:
    """Let normalisations and biases have values that a change shows in."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def prepare(name: str, path: Path) -> None:
    """Make the input of a model's conversion."""
    torch.manual_seed(0)
    source, _ = MODELS[name]
    if isinstance(source, str):
        tiny_models.make(source, path)
    else:
        torch.save(randomise(source()), path)


Change = Callable[[onnx.GraphProto, onnx.NodeProto], bool]  # in place; whether there was anything to change


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The graph's weights and constants of floating-point numbers that one node alone uses, by name."""
    uses = collections.Counter(name for node in graph.node for name in node.input)
    found = {tensor.name: tensor for tensor in graph.initializer}
    found |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    return {name: tensor for name, tensor in found.items() if tensor.data_type == 1 and uses[name] == 1}


def change_weight(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Change every number of a weight a little, or a constant by a third."""
    known = constants(graph)
    tensor = next((known[name] for name in node.input if name in known), None)
    if tensor is None:
        return False
    values = numpy_helper.to_array(tensor).copy()
    noise = np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
    values += noise * values.std() * 0.3 if values.size > 1 else values / 3
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


# What has the same shape: pairs in both directions, and operators that nothing is swapped for.
SWAPS = {"Sigmoid": "Tanh", "Add": "Sub", "LeakyRelu": "Elu", "Cos": "Sin", "ReduceMean": "ReduceMax"}
SWAPS |= {new: old for old, new in SWAPS.items()}
SWAPS |= {"Relu": "Softplus", "HardSwish": "Softplus", "Erf": "Tanh", "Mul": "Add", "Div": "Mul", "Sqrt": "Exp"}
SWAPS |= {"Gelu": "Mish", "LogSoftmax": "Softmax", "HardSigmoid": "Sigmoid", "ReduceSum": "ReduceMean"}
SWAPS |= {"MaxPool": "AveragePool", "GlobalAveragePool": "GlobalMaxPool"}


def change_operator(_: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Compute something else of the same shape."""
    if node.op_type not in SWAPS:
        return False
    kept = {"axis", "axes", "keepdims", "kernel_shape", "pads", "strides"}
    attributes = [attribute for attribute in node.attribute if attribute.name in kept]
    del node.attribute[:]
    node.attribute.extend(attributes)
    node.op_type = SWAPS[node.op_type]
    return True


def change_attribute(_: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Another epsilon, slope, factor, axis, mode, direction or group."""
    for attribute in node.attribute:
        if attribute.name in ("epsilon", "alpha", "beta"):
            attribute.f = attribute.f + 0.5
        elif attribute.name == "axis" and node.op_type in ("Softmax", "LogSoftmax"):
            attribute.i = 0 if attribute.i else 1
        elif attribute.name == "nearest_mode":
            attribute.s = b"ceil"
        elif attribute.name == "linear_before_reset":
            attribute.i = 1 - attribute.i
        elif attribute.name == "pads" and len(set(attribute.ints)) == 1 and attribute.ints[0]:
            half = len(attribute.ints) // 2
            attribute.ints[:] = [0] * half + [2 * attribute.ints[0]] * half
        else:
            continue
        return True
    return False


def drop_bias(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Leave out what is added."""
    known = constants(graph)
    if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2]:
        del node.input[2:]
        return True
    if node.op_type == "Add" and any(name in known and known[name].dims for name in node.input):
        node.input[:] = [name for name in node.input if name not in known]
        node.op_type = "Identity"
        return True
    return False


def change_order(_: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Inputs, or outputs, in another order."""
    if node.op_type in ("Concat", "Sub", "MatMul") and len(node.input) > 1:
        node.input[:] = list(reversed(node.input))
        return True
    if node.op_type == "Split":
        node.output[:] = list(reversed(node.output))
        return True
    return False


CHANGES: dict[str, Change] = {
    "weight": change_weight,
    "operator": change_operator,
    "attribute": change_attribute,
    "bias": drop_bias,
    "order": change_order,
}


def module_of_path(path: str) -> str:
    """The module in a name that the TorchScript exporter gives a node: `/layer1/layer1.0/conv1/Conv`."""
    parts: list[str] = []
    for part in path.split("/")[1:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def remember_scopes(product: Any) -> dict[str, str]:
    """A table that fills with the modules of nodes, by their names, before the product drops the metadata."""
    scopes: dict[str, str] = {}
    finish = product.finish_graph

    def finish_graph(model: Any, *arguments: Any) -> Any:
        scopes.clear()
        for node in model.graph:
            written = node.metadata_props.get("pkg.torch.onnx.name_scopes")
            if written and len(path := ast.literal_eval(written)) > 1:
                scopes[node.name.replace("/inner/", "/", 1)] = path[-2]
        return finish(model, *arguments)

    product.finish_graph = finish_graph
    return scopes


def changed_graphs(path: Path, scopes: dict[str, str], modules: set[str]) -> Iterator[Json]:
    """Copies of a graph with a change each, shuffled, as rows with `file`; the caller says `seen` of the last."""
    chance = random.Random(0)  # noqa: S311  (not for secrets)
    target = path.with_name("changed.onnx")
    for kind, change in CHANGES.items():
        graph = onnx.load(path).graph
        places = list(range(len(graph.node)))
        chance.shuffle(places)
        tries = 0
        for place in places:
            model = onnx.load(path)
            node = model.graph.node[place]
            scope = scopes.get(node.name) or module_of_path(node.name)
            while scope.startswith("inner"):
                scope = scope.removeprefix("inner").lstrip(".")
            what = node.op_type
            if node.op_type == "Constant" or scope not in modules or not change(model.graph, node):
                continue
            onnx.save(model, target)
            row: Json = {"change": kind, "node": what, "module": scope, "file": target}
            yield row
            tries += 1
            if row["seen"] or tries == TRIES:
                break


def judge(row: Json, named: str, root: str) -> str:
    """How the module that was named lies to the one that the changed node belongs to."""
    if not named:
        return "nothing"
    right = row["module"] or root
    if named == right:
        return "right"
    if root in (named, right) or f"{right}.".startswith(f"{named}.") or f"{named}.".startswith(f"{right}."):
        return "around it" if named == root or f"{right}.".startswith(f"{named}.") else "inside it"
    return "beside it" if named.rpartition(".")[0] == right.rpartition(".")[0] else "elsewhere"


def run(product: Any, name: str, exporter: str, folder: Path) -> Json:
    """Convert a model, with changed graphs verified on the way; their rows lie in `folder` then."""
    scopes, verify, rows = remember_scopes(product), product.verify, []

    def verify_changed(path: Path, job: Any, options: Any) -> Any:
        differences = verify(path, job, options)
        model = job.model if type(job.model).__module__ != product.__name__ else job.model.inner
        modules = {module for module, _ in model.named_modules()}
        for row in changed_graphs(path, scopes, modules) if not rows and not job.parts else ():
            try:
                row["seen"] = not verify(row.pop("file"), job, options)
            except product.AttemptError as error:
                found = re.search(r"first differs in (\S+)(?: \((\S+)\))?$", str(error))
                row["seen"] = "differs from PyTorch's" in str(error)
                row["named"], row["line"] = found.groups() if found else ("", "")
                row["verdict"] = judge(row, row["named"], type(model).__name__)
            if row["seen"]:
                rows.append(row)
        with product.WALL.up(unless="it is the sweep's own file"):
            (folder / "rows").write_text(json.dumps(rows), encoding="utf-8")
        return differences

    product.verify = verify_changed
    shape = MODELS[name][1]
    shapes = ["--input-shape", shape] if shape else []
    return convert(
        product,
        ["-i", str(folder / "in"), "-o", str(folder / "out") + "/" * (not shape), "--exporter", exporter, "--json"]
        + (["--trust-pickle", *shapes] if shape else []),
        folder,
    )


VERDICTS = ("right", "around it", "inside it", "beside it", "elsewhere", "nothing")
HEAD = """# Where a graph differs
`python tests/sweeps/located.py`. {versions}.

One node of a converted graph is changed, and the product's verification says where the graph first differs. right: it
names the module that the node belongs to; around it: one that contains that module; inside it: a part of it; beside it:
one with the same parent; nothing: the product names none. Only changes that the verification notices are counted. That
the node belongs to a module is what the exporter wrote into its name or metadata. The torch.export exporter folds a
normalisation into the convolution before it and gives the node the former's name; the product names the latter, which
is then beside it. Of two outputs in another order (Split) nothing is missing among the graph's values, so that what
takes them is named.
"""


def render(results: list[Json]) -> str:
    """The text of located.md."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnx", "onnxruntime"))
    lines = [HEAD.format(versions=versions), f"| exporter | changes | {' | '.join(VERDICTS)} |", "|---" * 8 + "|"]
    for exporter in ("torchscript", "dynamo"):
        found = collections.Counter(row["verdict"] for row in results if row["exporter"] == exporter)
        lines.append(f"| {exporter} | {found.total()} | {' | '.join(str(found[verdict]) for verdict in VERDICTS)} |")
    lines += ["", "| model | exporter | change | node | its module | named | line | |", "|---" * 8 + "|"]
    for row in results:
        columns = ("model", "exporter", "change", "node", "module", "named", "line", "verdict")
        told = [str(row[column] or "") for column in columns]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Convert what is asked for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(MODELS), help="these models; no report")
    parser.add_argument("--product", type=Path, default=ROOT, help="folder of the convert.py to test")
    parser.add_argument("--work", type=Path, default=Path("/tmp/pt2onnx-located"), help="scratch folder")
    options = parser.parse_args()
    product = load_product(options.product.resolve())
    results: list[Json] = []
    for name in options.only or MODELS:
        folder = options.work.resolve()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        apart(prepare, name, folder / "in")
        for exporter in ("torchscript", "dynamo"):
            (folder / "rows").write_text("[]", encoding="utf-8")
            row = apart(run, product, name, exporter, folder)
            rows = json.loads((folder / "rows").read_text(encoding="utf-8"))
            results += [{"model": name, "exporter": exporter, **changed} for changed in rows]
            print(name, exporter, row.get("code"), row.get("told") if row.get("code") else "", flush=True)
            for changed in rows:
                print(
                    "   ",
                    *(changed[key] for key in ("verdict", "change", "node", "module", "named", "line")),
                    flush=True,
                )
            shutil.rmtree(folder / "out", ignore_errors=True)
    if not options.only:
        (REPORTS / "located.md").write_text(render(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
