"""The verification itself: what it must catch, and what it must not cry wolf about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from forked import run_forked
from helpers import CONVERT, Result, check_error, lines, onnx_outputs
from onnx import numpy_helper
from torch import nn

import convert as product

OPTIONS = product.Options(
    input=Path("model.pt"),
    output=Path("model.onnx"),
    run_timeout=60.0,
)


def export(model: nn.Module, shape: tuple[int, ...], folder: Path) -> tuple[product.Job, Path]:
    """The plan of `model`, and its right export."""
    options = replace(OPTIONS, input_shape=[product.InputShape(shape)], output=folder / "m")
    plan = product.plan_module(model, product.Loaded(None, "a test"), product.Preprocessing(), options)
    flat = product.flat_module(plan.model, plan.specs).eval()
    graph = product.finish_graph(product.export_torchscript(flat, plan, 14, folder), plan, {})
    product.write_graph(graph, folder / "right.onnx")
    return plan, folder / "right.onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[product.Job, Path]:
    """A small network with two outputs, its plan, and its right export."""
    folder = tmp_path_factory.mktemp("exported")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Sigmoid())
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.head(self.body(x).mean((2, 3)))
            return {"logits": y, "scores": y.softmax(1)}

    torch.manual_seed(0)
    return export(Net().eval(), (1, 3, 16, 16), folder)


def change_weight(factor: float, number: int) -> Callable[[onnx.ModelProto], None]:
    """Change one number of one weight."""

    def change(model: onnx.ModelProto) -> None:
        tensors = [tensor for tensor in model.graph.initializer if len(tensor.dims) >= 1 and np.prod(tensor.dims) > 3]
        tensor = tensors[number % len(tensors)]
        values = numpy_helper.to_array(tensor).copy()
        values.flat[values.size // 2] += factor * np.abs(values).max()
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return change


def swap_outputs(model: onnx.ModelProto) -> None:
    """Let two outputs change names."""
    names = {model.graph.output[0].name: model.graph.output[1].name}
    names |= {new: old for old, new in names.items()}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        node.input[:] = [names.get(name, name) for name in node.input]


def softmax_over_the_batch(model: onnx.ModelProto) -> None:
    """Change an attribute."""
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.attribute[0].i = 0


def to_nan(model: onnx.ModelProto) -> None:
    """Divide by zero somewhere."""
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 1)
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))


MUTATIONS: dict[str, Callable[[onnx.ModelProto], None]] = {
    **{f"weight-{number}-{factor}": change_weight(factor, number) for number in range(6) for factor in (0.1, -3.0)},
    "swapped-outputs": swap_outputs,
    "softmax-axis": softmax_over_the_batch,
    "nan": to_nan,
}


def test_the_right_model_passes(exported: tuple[product.Job, Path]) -> None:
    """Two outputs at three sizes and for five kinds of values, within the tolerance."""
    plan, path = exported
    found = product.verify(path, plan, OPTIONS)
    labels = [f"input:{batch}x3x16x16" for batch in (1, 2, 3)]
    labels += [f"input:1x3x16x16 ({values})" for values in product.VALUE_SETS]
    assert {(item.case, item.output) for item in found} == {
        (label, name) for label in labels for name in ("logits", "scores")
    }
    assert all(item.largest <= item.allowed for item in found)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_model_fails(name: str, exported: tuple[product.Job, Path], tmp_path: Path) -> None:
    """One number, one attribute or one name changed after the export."""
    plan, path = exported
    model = onnx.load(path)
    before = model.SerializeToString()
    MUTATIONS[name](model)
    assert model.SerializeToString() != before
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(product.AttemptError, match=r"differs from PyTorch's|cannot load"):
        product.verify(tmp_path / "wrong.onnx", plan, OPTIONS)


class Steps(nn.Module):
    """A convolution that the exporter joins with its norm, attention whose parts it writes otherwise, and a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each step is on a line of its own."""
        y = self.body(x).flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y)[0]
        z = self.head(y.mean(1))
        return torch.where(z > 0, z, torch.tanh(z) * 0.5)


def line_of(text: str) -> str:
    """Where a line of this file that ends with `text` is, as messages tell it."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return f"test_verify.py:{next(number for number, line in enumerate(lines, 1) if line.endswith(text))}"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[product.Job, Path]:
    """Its plan and its right export."""
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # as the product has it
    return export(Steps().eval(), (1, 3, 12, 12), tmp_path_factory.mktemp("steps"))


BODY, ATTENTION = "y = self.body(x).flatten(2).transpose(1, 2)", "y = y + self.attention(y, y, y)[0]"
HEAD, CHOICE = "z = self.head(y.mean(1))", "return torch.where(z > 0, z, torch.tanh(z) * 0.5)"


WRONG = {
    ("Conv", ""): ("body.3", BODY),
    ("Relu", "Abs"): ("body.2", BODY),
    ("Softmax", "Tanh"): ("attention", ATTENTION),
    ("ReduceMean", "ReduceMax"): ("Steps", HEAD),
    ("Gemm", ""): ("head", HEAD),
    ("Tanh", "Sin"): ("Steps", CHOICE),
}


@pytest.mark.parametrize(("operator", "other"), WRONG)
def test_a_difference_is_located(operator: str, other: str, steps: tuple[product.Job, Path], tmp_path: Path) -> None:
    """The module and the line of the step that a changed node belongs to; what is fused before it is not blamed."""
    plan, path = steps
    model = onnx.load(path)
    node = [node for node in model.graph.node if node.op_type == operator][-1]
    if not other:
        del node.input[2:]  # the bias
    elif other == "Tanh":
        del node.attribute[:]
    node.op_type = other or operator
    onnx.save(model, tmp_path / "wrong.onnx")
    module, line = WRONG[operator, other]
    with pytest.raises(product.AttemptError, match=re.escape(f"; first differs in {module} ({line_of(line)})") + "$"):
        product.verify(tmp_path / "wrong.onnx", plan, OPTIONS)


def test_what_differs_nowhere_is_not_located(steps: tuple[product.Job, Path]) -> None:
    """Nor is a graph that is right, nor one that an archive's code made: there is nothing to say."""
    plan, path = steps
    assert product.where_it_differs(path, plan.cases[0], plan, OPTIONS) == ""
    traced = torch.jit.trace(plan.model, torch.ones(1, 3, 12, 12))
    assert product.where_it_differs(path, plan.cases[0], plan._replace(model=traced), OPTIONS) == ""


def test_a_wrong_exporter_ends_in_exit_code_6(models: Path, tmp_path: Path) -> None:
    """End to end: an exporter that errs in one weight writes nothing."""
    text = CONVERT.read_text(encoding="utf-8")
    wrong = text.replace(
        "            model = EXPORTERS",
        "            next(flat.parameters()).data[0] += 0.1\n            model = EXPORTERS",
    )
    assert wrong != text
    (tmp_path / "convert.py").write_text(wrong)
    target = tmp_path / "out" / "m.onnx"
    command = [sys.executable, str(tmp_path / "convert.py"), "-i", str(models / "flat.pt"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert "output 'output' differs from PyTorch's by" in done.stderr
    assert not target.parent.exists()


USER_CODE = """
import torch
import torchvision
from torch import nn
class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
class Random(Base):
    def forward(self, x):
        return nn.functional.dropout(self.layer(x), 0.5, training=True)
class Counter(Base):
    calls = 0.0
    def forward(self, x):
        self.calls = self.calls + 1.0
        return self.layer(x) * self.calls
class Memory(Base):
    state = None
    def forward(self, x):
        y = self.layer(x) + (0 if self.state is None or self.state.shape != x.shape else self.state)
        self.state = y.detach()
        return y
class NaN(Base):
    def forward(self, x):
        return torch.log(self.layer(x) - 100)
class Inf(Base):
    def forward(self, x):
        return self.layer(x) / torch.zeros(4)
class Constant(Base):
    def forward(self, x):
        return self.layer(x) * 0
class InPlace(Base):
    def forward(self, x):
        x.mul_(2).add_(1)
        return self.layer(x)
class Branch(Base):
    def forward(self, x):
        y = self.layer(x)
        return y * 2 if y.sum() > 0 else y - 1
class Masked(Base):
    def forward(self, x, mask):
        return self.layer(x.masked_fill(mask[..., None], float("-inf")).softmax(1))
class Spectrum(Base):
    def forward(self, x):
        return torch.fft.rfft(self.layer(x).repeat(1, 4000)).abs()
class Deformed(Base):
    def forward(self, x):
        kernel = self.layer.weight[None, None, :3, :3]
        return torchvision.ops.deform_conv2d(x, torch.tanh(x).repeat(1, 18, 1, 1), kernel, padding=1)
class Nothing(Base):
    def forward(self, x):
        return {"size": 3, "none": None}
"""
CLEAR = {
    "Random": (6, "two answers for the same input", "it draws random numbers in eval mode"),
    "Counter": (6, "two answers for the same input", "it changes its own state"),
    "Memory": (6, "two answers for the same input", "it changes its own state"),
    "NaN": (6, "PyTorch's own output 'output' holds NaN", "--no-verify"),
    "Inf": (6, "PyTorch's own output 'output' holds", "--no-verify"),
    "Nothing": (5, "returns no tensor", "wrap it"),
}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's module, and weights for all of its classes."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user.py").write_text(USER_CODE)
    torch.manual_seed(0)
    torch.save({f"layer.{key}": value for key, value in nn.Linear(4, 4).state_dict().items()}, folder / "w.pth")
    return folder


@pytest.mark.parametrize("name", CLEAR)
def test_models_that_cannot_be_proved(name: str, user: Path, tmp_path: Path) -> None:
    """Randomness, state, NaN, Inf and no output: refused with the reason."""
    code, *words = CLEAR[name]
    environment = {**os.environ, "PYTHONPATH": str(user)}
    arguments = ("-i", str(user / "w.pth"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "1,4")
    check_error(run_forked(*arguments, "--model-class", f"user:{name}", env=environment), code, *words)
    assert not list(tmp_path.iterdir())


def convert_class(name: str, user: Path, target: Path, *options: str) -> Result:
    """Convert one of the user's classes."""
    arguments = ("-i", str(user / "w.pth"), "-o", str(target), "--model-class", f"user:{name}", *options)
    return run_forked(*arguments, env={**os.environ, "PYTHONPATH": str(user)})


def test_a_model_that_writes_into_its_input(user: Path, tmp_path: Path) -> None:
    """The inputs of the comparison are those before the call."""
    result = convert_class("InPlace", user, tmp_path / "m.onnx", "--input-shape", "1,4")
    assert result.code == 0, result.err
    layer = nn.Linear(4, 4)
    weights = torch.load(user / "w.pth")
    layer.load_state_dict({key.removeprefix("layer."): value for key, value in weights.items()})
    given = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(given) * 2 + 1).numpy()
    np.testing.assert_allclose(onnx_outputs(tmp_path / "m.onnx", {"input": given})["output"], expected, atol=1e-5)


def test_a_branch_on_values_is_located(user: Path, tmp_path: Path) -> None:
    """Tracing takes one side of it: another input shows that, and the line in the model's source is told."""
    line = USER_CODE[: USER_CODE.index("if y.sum()")].count("\n") + 1
    result = convert_class("Branch", user, tmp_path / "m.onnx", "--input-shape", "1,4")
    check_error(result, 6, f"tracing fixed what is decided by values at user.py({line})")


def test_masks_leave_something(user: Path, tmp_path: Path) -> None:
    """A random mask that hides everything would only make NaN."""
    result = convert_class("Masked", user, tmp_path / "m.onnx", "--input-shape", "x:1,3,4", "mask:1,3:bool")
    assert result.code == 0, result.err


def test_a_slight_difference_can_be_accepted(user: Path, tmp_path: Path) -> None:
    """ONNX Runtime's long Fourier transform is less exact than PyTorch's: the line says which --atol it takes."""
    arguments = ("--input-shape", "1,4", "--exporter", "dynamo")
    result = convert_class("Spectrum", user, tmp_path / "m.onnx", *arguments, "--atol", "1e-3")
    assert result.code == 6, result.err
    advised = re.findall(r"pass --atol (\S+) if", result.err)
    assert len(advised) == 1, result.err
    assert convert_class("Spectrum", user, tmp_path / "m.onnx", *arguments, "--atol", advised[0]).code == 0


def test_an_operator_that_the_checker_misses_gets_its_opset(user: Path, tmp_path: Path) -> None:
    """DeformConv exists from opset 19 on; the exporter writes it at 18 all the same."""
    result = convert_class("Deformed", user, tmp_path / "m.onnx", "--input-shape", "1,1,8,8")
    assert result.code == 0, result.err
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 19
    assert any("opset 19 instead of 14" in line for line in lines(result, "WARN"))
    asked = convert_class("Deformed", user, tmp_path / "n.onnx", "--input-shape", "1,1,8,8", "--opset", "18")
    assert asked.code in (5, 6)
    assert "pass --opset 19" in asked.err


def test_constant_output_warns(user: Path, tmp_path: Path) -> None:
    """An output that is zero everywhere proves little, and the log says so."""
    environment = {**os.environ, "PYTHONPATH": str(user)}
    arguments = ("-i", str(user / "w.pth"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "1,4")
    result = run_forked(*arguments, "--model-class", "user:Constant", env=environment)
    assert result.code == 0, result.err
    assert any("proves little" in line for line in lines(result, "WARN"))


def test_tolerances_and_no_verify(models: Path, tmp_path: Path) -> None:
    """--atol and --rtol override; without verification there is a [WARN]."""
    arguments = ("-i", str(models / "image.pt"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "1,3,32,32")
    result = run_forked(*arguments, "--atol", "0", "--rtol", "0")
    check_error(result, 6, "torchscript, opset 14", "output 'output' differs", "dynamo, opset 18")
    loose = run_forked(*arguments, "--no-verify")
    assert loose.code == 0
    assert any(line.startswith("--no-verify") for line in lines(loose, "WARN"))
    assert "not verified" in lines(loose, "SUCCESS")[0]


def test_rounding_is_judged_by_float64(tmp_path: Path) -> None:
    """A model that amplifies rounding passes with a [WARN]; one that turns it into noise does not."""
    for factor, code in ((4.0, 0), (9.0, 6)):
        torch.manual_seed(0)
        deep = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(30)]).eval()
        for layer in deep:
            layer[0].weight.data *= factor
        torch.save(deep, tmp_path / "deep.pt")
        result = run_forked("-i", str(tmp_path / "deep.pt"), "-o", str(tmp_path / "m.onnx"))
        assert result.code == code, result.err
        assert any("amplifies rounding" in line for line in lines(result, "WARN")) == (code == 0)
        assert "first differs" not in result.err  # no step of it does


class Vanishing(nn.Module):
    """Two outputs near zero: one that is small and exact, and one that is what a mean leaves of values that cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The body's means are zero but for rounding, and the head's answer is scaled down."""
        y = self.body(x)
        return {"small": self.head(y.amax((2, 3))) * 1e-8, "cancelled": y.mean((2, 3))}


@pytest.fixture(scope="module")
def vanishing(tmp_path_factory: pytest.TempPathFactory) -> tuple[product.Job, Path]:
    """The plan and the right export of a model whose outputs are nearly zero."""
    torch.manual_seed(0)
    return export(Vanishing().eval(), (1, 3, 32, 32), tmp_path_factory.mktemp("vanishing"))


def weighted_mean(model: onnx.ModelProto) -> None:
    """Let the columns of the mean in which all cancels count unequally, by a thousandth."""
    node = next(node for node in model.graph.node if "cancelled" in node.output)
    factor = numpy_helper.from_array(np.linspace(0.999, 1.001, 30, dtype=np.float32), "factor")
    model.graph.initializer.append(factor)
    wrong = onnx.helper.make_node("Mul", [node.input[0], "factor"], ["weighted"])
    node.input[0] = "weighted"
    model.graph.node.insert(list(model.graph.node).index(node), wrong)


def test_values_that_cancel_are_judged_by_what_flows_in(vanishing: tuple[product.Job, Path]) -> None:
    """Float32 leaves some 1e-8 of values around 1 that cancel, in PyTorch and in ONNX Runtime, but not the same."""
    plan, path = vanishing
    drawn = plan._replace(cases=[case for case in plan.cases if not case.values])
    found = [item for item in product.verify(path, drawn, OPTIONS) if item.output == "cancelled"]
    assert all(0 < item.largest <= item.allowed < 1e-6 for item in found)


@pytest.mark.parametrize("change", [change_weight(1.0, 0), change_weight(1.0, 2), weighted_mean])
def test_a_wrong_graph_near_zero_fails(
    change: Callable[[onnx.ModelProto], None], vanishing: tuple[product.Job, Path], tmp_path: Path
) -> None:
    """Outputs near zero are no reason to let anything pass."""
    plan, path = vanishing
    model = onnx.load(path)
    change(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(product.AttemptError, match="differs from PyTorch's"):
        product.verify(tmp_path / "wrong.onnx", plan, OPTIONS)


def test_float16_ends_before_zero(tmp_path: Path) -> None:
    """Numbers below 6e-5 lose digits in float16, and two of them may differ by a step of 6e-8 whatever their size."""
    torch.manual_seed(0)
    shrinking = nn.Sequential(nn.Conv2d(3, 8, 3), *(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6)))
    for layer in shrinking:
        layer.weight.data *= 0.2
    torch.save(shrinking.half().eval(), tmp_path / "half.pt")
    command = ("-i", str(tmp_path / "half.pt"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "1,3,32,32")
    result = run_forked(*command, "--dtype", "fp16")
    assert result.code == 0, result.err
    assert any("PyTorch's float16 output is" in line for line in lines(result, "WARN"))


def test_the_second_opinion_leaves_the_model_as_it_was(vanishing: tuple[product.Job, Path]) -> None:
    """Weights of two dtypes keep their dtypes and their memory."""
    plan, _ = vanishing
    plan.model.register_buffer("wide", torch.ones(2, dtype=torch.float64))
    before = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in plan.model.state_dict().items()}
    assert product.double_outputs(plan.cases[0], plan, OPTIONS) is not None
    assert before == {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in plan.model.state_dict().items()}


def test_detections_of_equal_score_may_change_places() -> None:
    """Only rows whose scores are nearly equal are put in PyTorch's order; a wrong row stays wrong."""
    expected = {
        "boxes": np.array([[0, 0, 4, 4], [9, 9, 12, 12], [1, 1, 2, 2]], np.float32),
        "scores": np.array([0.9, 0.90001, 0.5], np.float32)[[1, 0, 2]],
        "labels": np.array([1, 2, 3]),
    }
    swapped = {name: value[[1, 0, 2]] for name, value in expected.items()}
    swapped["scores"] = expected["scores"]
    aligned = product.align_detections(expected, swapped)
    np.testing.assert_array_equal(aligned["boxes"], expected["boxes"])
    np.testing.assert_array_equal(aligned["labels"], expected["labels"])
    far = {name: value[[2, 1, 0]] for name, value in expected.items()}  # not in the order of the scores
    assert product.align_detections(expected, far) is far


def test_detections_are_compared_as_sets() -> None:
    """A detection has a partner whatever its place; another box, label, score or mask has none."""
    random = np.random.default_rng(0)
    expected = {
        "boxes": random.uniform(0, 200, (9, 4)).astype(np.float32),
        "labels": random.integers(1, 4, 9),
        "scores": np.sort(random.uniform(0.5, 1, 9).astype(np.float32))[::-1],
        "masks": random.uniform(0, 1, (9, 1, 20, 20)).astype(np.float32),
    }
    rows = list(expected)
    order = random.permutation(9)
    moved = {name: value[order] for name, value in expected.items()}
    assert product.unmatched(product.matching_rows(expected, moved, rows)) == 0
    assert product.unmatched(product.matching_rows(expected, {n: v[:7] for n, v in expected.items()}, rows)) == 2
    for name, step in (("boxes", 1.0), ("labels", 1), ("scores", 0.01), ("masks", 0.01)):
        wrong = {key: value.copy() for key, value in moved.items()}
        wrong[name][3] += step
        assert product.unmatched(product.matching_rows(expected, wrong, rows)) == 1, name


class Detector(nn.Module):
    """The 40 best of some hundred detections, every one of them with others of nearly its score."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Boxes, labels and falling scores."""
        found = self.layer(x)[0].flatten(1).T
        scores, order = (found[:, 0] / 1000).sigmoid().topk(40)
        return {"boxes": found[order, 1:5], "labels": (found[order, 5] > 0).long(), "scores": scores}


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name.startswith("weight")])
def test_a_mutated_detector_fails(name: str, tmp_path: Path) -> None:
    """Sets of detections that differ in a column of the boxes, in labels or in the scores are not the same."""
    torch.manual_seed(0)
    plan, path = export(Detector().eval(), (1, 3, 16, 16), tmp_path)
    product.verify(path, plan, OPTIONS)
    model = onnx.load(path)
    MUTATIONS[name](model)
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(product.AttemptError, match="differs from PyTorch's"):
        product.verify(tmp_path / "wrong.onnx", plan, OPTIONS)


def test_half_precision_models_become_float32(tmp_path: Path) -> None:
    """Inputs and weights, unless --dtype says otherwise; an archive keeps the dtype that its code is made for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1)).half().eval()
    torch.save(model, tmp_path / "half.pt")
    command = ("-i", str(tmp_path / "half.pt"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "1,3,16,16")
    result = run_forked(*command)
    assert result.code == 0, result.err
    assert any("float16 becomes float32" in line for line in lines(result, "INFO"))
    image = torch.rand(2, 3, 16, 16)
    found = onnx_outputs(tmp_path / "m.onnx", {"input": image.numpy()})["output"]
    with torch.no_grad():
        np.testing.assert_allclose(found, model.float()(image).numpy(), rtol=1e-4, atol=1e-5)
    assert run_forked(*command, "--dtype", "fp16").code == 0
    kept = onnx_outputs(tmp_path / "m.onnx", {"input": image.half().numpy()})["output"]
    assert kept.dtype == np.float16
    torch.jit.save(torch.jit.trace(model.float(), image), str(tmp_path / "traced.pt"))
    traced = run_forked("-i", str(tmp_path / "traced.pt"), "-o", str(tmp_path / "n.onnx"), "--dtype", "fp16")
    check_error(traced, 2, "--dtype fp16", "an archive's code is made for torch.float32")


def test_the_size_that_a_checkpoint_was_trained_at(tmp_path: Path) -> None:
    """The train_args of ultralytics tell the edge of the images, and the log says that they did."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    torch.save({"epoch": -1, "model": model, "train_args": {"imgsz": 64}}, tmp_path / "best.pt")
    result = run_forked("-i", str(tmp_path / "best.pt"), "-o", str(tmp_path / "m.onnx"))
    assert result.code == 0, result.err
    assert any("1,3,64,64, told by the checkpoint's train_args.imgsz" in line for line in lines(result, "INFO"))
