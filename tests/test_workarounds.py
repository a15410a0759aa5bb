"""Every workaround is still needed: without it the library's fault shows, with it the numbers are PyTorch's.

A test that fails at its first assertion after an upgrade says that the library has been mended: the workaround goes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.nn import functional

import convert as product


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        """What the function returns."""
        return self.function(*inputs)


class Case(NamedTuple):
    """What a model computes, the inputs that it is traced with, others, and the free axes of the first."""

    function: Callable[..., Any]
    traced: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    free: tuple[int, ...] = ()


def run_model(data: bytes, inputs: tuple[Tensor, ...]) -> list[Any]:
    """ONNX Runtime's outputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    outputs: list[Any] = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return outputs


def is_right(case: Case) -> bool:
    """Whether the TorchScript exporter makes a graph of PyTorch's numbers and their signs, and any graph at all."""
    model, file = Call(case.function).eval(), io.BytesIO()
    free = {axis: f"axis_{axis}" for axis in case.free}
    names = [f"x{number}" for number in range(len(case.traced))]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model, case.traced, file, dynamo=False, opset_version=14, input_names=names, dynamic_axes={"x0": free}
            )
            actual = run_model(file.getvalue(), case.others)
        except Exception:
            return False
    answer = model(*case.others)
    expected = [tensor.numpy() for tensor in (answer if isinstance(answer, tuple) else (answer,))]
    return all(
        one.shape == other.shape and np.allclose(one, other) and np.array_equal(np.signbit(one), np.signbit(other))
        for one, other in zip(actual, expected, strict=True)
    )


@pytest.fixture(autouse=True)
def torch_as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Note the translations that a test registers, and take them back."""
    taken: list[tuple[str, int]] = []
    register = torch.onnx.register_custom_op_symbolic

    def record(name: str, symbolic: Callable[..., Any], opset: int) -> None:
        register(name, symbolic, opset)
        taken.append((name, opset))

    def take_back() -> None:
        product.register_symbolics.cache_clear()
        for name, opset in taken:
            torch.onnx.unregister_custom_op_symbolic(name, opset)
        taken.clear()

    monkeypatch.setattr(torch.onnx, "register_custom_op_symbolic", record)
    product.register_symbolics.cache_clear()
    product.register_symbolics()
    take_back()  # what tests before have registered, too
    yield taken
    take_back()


X = torch.linspace(0.1, 1, 12).view(2, 6)
LONGER = torch.linspace(0.1, 1, 24).view(2, 12)

SYMBOLICS = {
    "repeat_interleave": Case(
        lambda x: (x[None].repeat_interleave(2, dim=-1), x.repeat_interleave(2, dim=-1)), (X,), (X,)
    ),
    "adaptive_avg_pool1d": Case(lambda x: functional.adaptive_avg_pool1d(x[None], 4), (X,), (X + 1,)),
    "adaptive_avg_pool2d": Case(lambda x: functional.adaptive_avg_pool2d(x[None, None], (2, 4)), (X,), (X + 1,)),
    "adaptive_avg_pool3d": Case(lambda x: functional.adaptive_avg_pool3d(x[None, None, None], (1, 2, 4)), (X,), (-X,)),
    "adaptive_max_pool1d": Case(lambda x: functional.adaptive_max_pool1d(x[None], 4), (X,), (X.flip(1),)),
    "adaptive_max_pool2d": Case(lambda x: functional.adaptive_max_pool2d(x[None, None], (2, 4)), (X,), (X.flip(1),)),
    "adaptive_max_pool3d": Case(lambda x: functional.adaptive_max_pool3d(x[None, None, None], (1, 2, 4)), (X,), (-X,)),
    "cumsum": Case(lambda x: (x > 0.5).cumsum(-1), (X,), (X.flip(1),)),
    "unfold": Case(lambda x: x.unfold(-1, 4, 2), (X,), (LONGER,), (1,)),
    "as_strided": Case(lambda x: x.as_strided((2, x.shape[1] // 2), (x.shape[1], 2)), (X,), (LONGER,), (1,)),
    "log_sigmoid": Case(functional.logsigmoid, (X,), (X - 200,)),
    "floor_divide": Case(lambda x: x // torch.tensor(3), (torch.tensor([7, 9]),), (torch.tensor([-7, 7]),)),
    "atan2": Case(torch.atan2, (X[0, :2], X[1, :2]), (torch.tensor([0.0, -0.0]), torch.tensor([0.0, -1.0]))),
}  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLICS)
def test_symbolics(name: str) -> None:
    """What the TorchScript exporter translates wrongly, or not at all."""
    assert not is_right(SYMBOLICS[name])
    product.register_symbolics()
    with product.traced_sizes():
        assert is_right(SYMBOLICS[name])


TRACED = {
    "unbind": Case(
        lambda x: sum(x[row] for row in (x.sum(1) > 0).nonzero()), (X * torch.tensor([[1], [0]]),), (X + 1,)
    ),
    "stride": Case(lambda x: x.new_zeros(x.stride(0)), (X,), (LONGER,), (1,)),
    "tensor": Case(lambda x: x * torch.tensor([x.shape[1]]), (X,), (LONGER,), (1,)),
    "as_tensor": Case(lambda x: x * torch.as_tensor([x.shape[1]]), (X,), (LONGER,), (1,)),
    "min": Case(lambda x: x.new_zeros(min(x.shape[1], 8)), (X,), (LONGER,), (1,)),
    "max": Case(lambda x: x.new_zeros(max(x.shape[1], 8)), (X,), (LONGER,), (1,)),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_sizes(name: str) -> None:
    """What a trace keeps of sizes that Python works with."""
    assert not is_right(TRACED[name])
    with product.traced_sizes():
        assert is_right(TRACED[name])


def test_every_stand_in_is_tested(torch_as_it_is: list[tuple[str, int]]) -> None:
    """The tables above name every translation and every stand-in."""
    product.register_symbolics()
    assert {name.removeprefix("aten::") for name, _ in torch_as_it_is} == SYMBOLICS.keys()
    assert {name for _, name, _ in product.tracing_stand_ins()} == TRACED.keys()


def test_int() -> None:
    """int() of a size is a constant in a trace."""
    case = Case(lambda x: x.new_zeros(int(x.shape[1] * 2)), (X,), (LONGER,), (1,))
    assert not is_right(case)
    with product.traced_whole_numbers(Call(case.function)):
        assert is_right(case)


def test_complex_numbers() -> None:
    """The exporters know no complex numbers."""

    def rotated(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(2, 3, 2)) * torch.polar(torch.ones(3), torch.arange(3.0))
        return torch.view_as_real(turned)

    case = Case(rotated, (X,), (X + 1,))
    assert not is_right(case)
    with product.without_complex():
        assert is_right(case)


def test_fused_attention() -> None:
    """nn.TransformerEncoderLayer uses an operator that no exporter knows."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    case = Case(layer, (X[None],), (X[None] + 1,))
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.no_grad():
            torch.backends.mha.set_fastpath_enabled(True)
            assert not is_right(case)
            product.disable_fused_attention()
            assert is_right(case)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_resized_images() -> None:
    """The detectors of torchvision resize some images to other sizes while they are traced."""
    from torchvision.models.detection import transform

    def sizes(height: int) -> tuple[Any, Any]:
        def resize(image: Tensor) -> Tensor:
            return transform._resize_image_and_masks(image, 80, 133)[0]

        image = torch.zeros(1, height, 50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return resize(image).shape, torch.jit.trace(resize, image, check_trace=False)(image).shape

    heights = range(51, 83)
    assert any(eager != traced for eager, traced in map(sizes, heights))
    with product.fixed_resize():
        assert all(eager == traced for eager, traced in map(sizes, heights))


def test_branches_of_an_identity() -> None:
    """onnx-ir's pass takes the Identity that is all of a branch; ONNX Runtime cannot load what is left."""
    text = """<ir_version: 8, opset_import: ["" : 14]> g (bool flag, float[2] x) => (float[2] y) {
        z = Neg (x)
        y = If (flag) <then_branch = one () => (float[2] a) { a = Identity (z) },
                       else_branch = two () => (float[2] b) { b = Abs (x) }>
    }"""
    inputs = (torch.tensor([True])[0], torch.tensor([1.0, -2.0]))
    model = ir.from_onnx_text(text)
    common.IdentityEliminationPass()(model)
    with pytest.raises(Exception, match="z"):
        run_model(ir.to_proto(model).SerializeToString(), inputs)
    product.restore_branch_outputs(model.graph)
    np.testing.assert_array_equal(run_model(ir.to_proto(model).SerializeToString(), inputs)[0], [-1, 2])


@pytest.mark.parametrize("command", ["import torchvision", "import convert; convert.import_torchvision()"])
def test_importing_torchvision(command: str) -> None:
    """An import of torchvision brings torch's compiler, which it does not need."""
    code = f"{command}\nimport sys; print('torch._dynamo' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str("convert" not in command)


def test_importing_ultralytics(tmp_path: Path) -> None:
    """An import of ultralytics writes into the home directory."""
    pytest.importorskip("ultralytics")
    for command, silent in (
        ("import ultralytics.utils", False),
        ("import convert; convert.import_ultralytics()", True),
    ):
        home = tmp_path / str(silent)
        home.mkdir()
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, check=True)
        assert silent == (not list(home.rglob("*")))


WORKAROUNDS = [
    product.import_torchvision, product.import_ultralytics, product.disable_fused_attention, product.fixed_resize,
    product.traced_whole_numbers, product.restore_branch_outputs, product.Complex, product.unbind_indices,
    product.strides_from_sizes, product.tensor_of_numbers, product.traced_extremum,
    *(value for name, value in vars(product).items() if name.startswith("symbolic_") and inspect.isfunction(value)),
]  # fmt: skip


@pytest.mark.parametrize("workaround", WORKAROUNDS, ids=lambda value: value.__name__)
def test_what_is_said(workaround: Any) -> None:
    """Each names the version that it was seen in, and where the fault is known."""
    said = workaround.__doc__
    assert re.search(r"(torch|torchvision|transformers|onnx-ir|ultralytics) \d+\.\d+", said)
    assert re.search(r"https://github\.com/[\w-]+/[\w-]+", said)
