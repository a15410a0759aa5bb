#!/usr/bin/env python3
"""Convert every operator that torch's own tests list (op_db), or every module (--modules), and judge the results.

    OMP_NUM_THREADS=1 python tests/sweeps/operators.py [--modules] [--only NAME ...] [--opset N ...] [--resume]

A model applies one operator to the tensors of one of op_db's samples, everything else in the sample is constant. The
judge is ONNX Runtime against PyTorch on that sample, on others with the same constants and shapes, and on values that
neither op_db nor the product's verification would draw; where an axis is declared free, at other sizes of it.
Results: tests/reports/operators.json (modules.json), kept after every conversion, and a table beside it.
"""

import argparse
import collections
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import types
import unittest
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# tests/ and the folder of convert.py, in place of this one
sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])
# torch's own tests need this package for what is not used here.
sys.modules.setdefault("expecttest", types.ModuleType("expecttest")).TestCase = unittest.TestCase  # type: ignore[attr-defined]
logging.disable(logging.WARNING)

import numpy as np
import onnx
import onnxruntime
import torch
from sweeps import jobs
from sweeps.applied import CALLS, INPUT, Operator
from sweeps.jobs import REPORTS, ROOT, Json, apart, convert, load_product
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_flatten, tree_leaves

jobs.LIMIT = 60
TOLERANCE = 2e-3  # of the largest expected value
MOST_SAMPLES = 40  # of op_db's are looked at
DTYPES = ("float32", "int64", "int32", "bool", "float64", "float16", "bfloat16", "int16", "int8", "uint8")
# What is converted, the most telling first: the dtype, which of the usable samples, and whether the batch is left free.
VARIANTS = {
    "float": (torch.float32, 0, False),
    "int": (torch.int64, 0, False),
    "float 2": (torch.float32, 1, False),
    "free": (torch.float32, 0, True),
}
MODULE_SAMPLES = 8  # of each module, at most
LOUD = ("WRONG", "bug", "timeout", "sweep")  # these should not be: the worst first
VERDICTS = (*LOUD, "refused", "right", "not tried")
OPERATORS = {f"{op.name}.{op.variant_test_name}".rstrip("."): op for op in op_db}
MODULES = {info.name: info for info in module_db}
# By what is done to the tensors of floating-point numbers; "" leaves them as they are.
FLOATS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "": lambda x, _: x,
    "negative": lambda x, _: -x.abs(),
    "positive": lambda x, _: x.abs() + 0.1,
    "normal": lambda x, g: torch.randn(x.shape, generator=g).to(x.dtype),
    "in 0..1": lambda x, g: torch.rand(x.shape, generator=g).to(x.dtype),
    "zero": lambda x, _: torch.zeros_like(x),
    "ties": lambda x, g: (torch.randint(-5, 6, x.shape, generator=g) / 2).to(x.dtype),
    "large": lambda x, g: (torch.randn(x.shape, generator=g) * 100).to(x.dtype),
    "huge": lambda x, g: (torch.randn(x.shape, generator=g) * 1e6).to(x.dtype),
}
INTEGERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "": lambda x, _: x,
    "flipped integers": lambda x, _: x.flip(-1),
    "negated integers": lambda x, _: -x,
    "equal integers": lambda x, _: x.flatten()[:1].expand(x.numel()).reshape(x.shape).contiguous(),
    "integers of both signs": lambda x, g: torch.randint(-9, 10, x.shape, generator=g).to(x.dtype),
    "large integers": lambda x, g: torch.randint(-(1 << 40), 1 << 40, x.shape, generator=g).to(x.dtype),
}


class Unusable(Exception):  # noqa: N818  (a verdict)
    """Why there is nothing to convert."""


class Sample(NamedTuple):
    """The tensors of one of torch's samples, and what makes it another model than other samples do."""

    tensors: list[Tensor]
    leaves: list[Any]
    tree: Any

    def kind(self) -> str:
        """Equal for samples of one model."""
        return repr([self.leaves, str(self.tree), [(tuple(x.shape), x.dtype) for x in self.tensors]])


def is_plain(leaf: Any) -> bool:
    """Whether a tensor can be an input: the product's --input-shape has no place for the others."""
    return type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided and leaf.dim() > 0 and leaf.numel() > 0


def sample_of(first: Any, args: Any, kwargs: Any) -> Sample | None:
    """The sample whose tensors can be inputs; scalars become constants. None where some other tensor is left."""
    leaves, tree = tree_flatten((first, args, kwargs))
    tensors = [leaf.detach().clone() for leaf in leaves if is_plain(leaf)]
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not is_plain(leaf)]
    known = all(str(x.dtype).removeprefix("torch.") in DTYPES for x in tensors)
    if (
        not tensors
        or not known
        or any(type(x) is not Tensor or x.dim() or x.layout is not torch.strided for x in others)
    ):
        return None
    return Sample(tensors, [INPUT if is_plain(leaf) else leaf for leaf in leaves], tree)


def samples_of(op: Any, dtype: torch.dtype) -> list[list[Sample]]:
    """The samples that can be used, by the model that they need; raises Unusable for none."""
    if not op.supports_dtype(dtype, "cpu"):
        raise Unusable(f"it takes no {str(dtype).removeprefix('torch.')}")
    torch.manual_seed(0)
    given = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), MOST_SAMPLES))
    found = [sample for s in given if (sample := sample_of(s.input, s.args, s.kwargs))]
    if not found:
        leaves = [leaf for s in given for leaf in tree_leaves((s.input, s.args, s.kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf.layout is not torch.strided for leaf in leaves):
            raise Unusable("sparse")
        raise Unusable("no sample has a plain tensor of at least one axis" if given else "it has no sample")

    def oddity(sample: Sample) -> tuple[bool, bool]:
        """Scalars are constants here; the product draws indices of 0 and 1."""
        return any(isinstance(leaf, Tensor) for leaf in sample.leaves), any(x.numel() == 1 for x in sample.tensors)

    groups: dict[str, list[Sample]] = collections.defaultdict(list)
    for sample in sorted(found, key=oddity):
        groups[sample.kind()].append(sample)
    return list(groups.values())


def forms_of(values: Sequence[Tensor], rest: Sequence[Sequence[Tensor]]) -> Iterator[tuple[str, list[Tensor]]]:
    """Inputs to judge by, and what is special about them."""
    yield "the sample", list(values)
    for other in rest:
        yield "another sample", list(other)
    changes = [(change, "") for change in FLOATS if change] + [("", change) for change in INTEGERS if change]
    for number, (floats, integers) in enumerate([*changes, ("normal", ""), ("ties", "equal integers")]):
        generator = torch.Generator().manual_seed(number)
        made = [
            (
                FLOATS[floats]
                if x.is_floating_point()
                else (lambda y, _: y)
                if x.dtype is torch.bool
                else INTEGERS[integers]
            )(x, generator)
            for x in values
        ]
        if any(not torch.equal(x, y) for x, y in zip(values, made, strict=True)):
            yield f"{floats} {integers}".strip(), made
    if any(x.dtype is torch.bool for x in values):
        yield "the other truth", [~x if x.dtype is torch.bool else x for x in values]


def answer(model: nn.Module, inputs: Sequence[Tensor], *, double: bool = False) -> list[np.ndarray] | None:
    """PyTorch's outputs; None where it does not accept the inputs, or finds no finite result."""
    given = [x.double() if double and x.dtype is torch.float32 else x.clone() for x in inputs]
    if double:
        model = model.double()
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            leaves = [leaf for leaf in tree_leaves(model(*given)) if isinstance(leaf, Tensor)]
        return [leaf.resolve_conj().resolve_neg().numpy().copy() for leaf in leaves]
    except Exception:
        return None
    finally:
        if double:
            model.float()


def is_finite(outputs: Sequence[np.ndarray] | None) -> bool:
    """Whether there are outputs, without NaN and infinity."""
    return outputs is not None and all(np.isfinite(x).all() for x in outputs if x.dtype.kind in "fc")


def gap(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference in parts of the largest expected value; whole numbers must be equal."""
    if not expected.size:
        return 0.0
    if expected.dtype.kind not in "fc":
        return 0.0 if np.array_equal(actual, expected) else np.inf
    worst = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()
    scale = max(float(np.abs(expected).max()), 1e-6)
    return float(worst / scale) if np.isfinite(worst) else np.inf


def unsteady(model: nn.Module, inputs: Sequence[Tensor], expected: Sequence[np.ndarray]) -> bool:
    """Whether float32 is not enough for this result: then PyTorch's own in float64 is another one."""
    if not any(x.dtype is torch.float32 for x in inputs):
        return False
    double = answer(model, inputs, double=True)
    if double is None or [x.shape for x in double] != [x.shape for x in expected]:
        return False
    return any(not gap(d.astype(e.dtype), e) <= TOLERANCE / 4 for d, e in zip(double, expected, strict=True))


def brief(values: Any) -> str:
    """An array in a few characters."""
    flat = np.asarray(values).reshape(-1)
    items = ", ".join(f"{x:.6g}" if flat.dtype.kind == "f" else str(x) for x in flat[:6])
    return f"{flat.dtype}{list(np.shape(values))} {items}{'...' if flat.size > 6 else ''}"


def differs(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> str:
    """What is wrong with the outputs; "" for nothing."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs instead of {len(expected)}"
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != e.shape or a.dtype != e.dtype:
            return f"output {index} is {a.dtype}{list(a.shape)} instead of {e.dtype}{list(e.shape)}"
        if not (worst := gap(a, e)) <= TOLERANCE:
            place = np.unravel_index(
                np.argmax(
                    a != e
                    if e.dtype.kind not in "fc"
                    else -np.isclose(a, e, TOLERANCE, TOLERANCE * np.abs(e).max()).astype(int)
                ),
                e.shape,
            )
            where = "".join(f"[{i}]" for i in place)
            return f"output {index}{where} is {a[place]} instead of {e[place]} ({worst:.0e} of the scale)"
    return ""


def simplicity(tensors: Sequence[Tensor]) -> tuple[int, float]:
    """Small for inputs that show a fault well: few different values, and no large ones."""
    return sum(len(x.unique()) for x in tensors), max(float(x.double().abs().max()) for x in tensors)


def resized(tensors: Sequence[Tensor], axes: Sequence[Sequence[int | str]], label: str, size: int) -> list[Tensor]:
    """The tensors with every axis of that label at another size: rows come again."""
    made = []
    for tensor, dims in zip(tensors, axes, strict=True):
        result = tensor
        for axis, dim in enumerate(dims):
            if dim == label:
                result = result.index_select(axis, torch.arange(size) % tensor.shape[axis])
        made.append(result.contiguous())
    return made


def judge(path: Path, model: nn.Module, values: Sequence[Tensor], rest: Sequence[Sequence[Tensor]], opset: int) -> Json:
    """Right or WRONG, and why."""
    onnx.checker.check_model(str(path), full_check=True)
    found = max(o.version for o in onnx.load(path).opset_import if not o.domain)
    session = onnxruntime.InferenceSession(path, onnxruntime.SessionOptions(), providers=["CPUExecutionProvider"])
    asked = session.get_inputs()
    row: Json = {"opset": found, "judged": 0, "failed": [], "free": []}
    if len(asked) != len(values):
        return {**row, "verdict": "WRONG", "told": f"the graph has {len(asked)} inputs, PyTorch {len(values)}"}
    axes = [value.shape for value in asked]
    fixed = [tuple(d for d in dims if isinstance(d, int)) for dims in axes]
    if any(set(f) - set(x.shape) for f, x in zip(fixed, values, strict=True)):
        return {**row, "verdict": "WRONG", "told": f"the graph's inputs are {axes}"}
    trials, smaller = list(forms_of(values, rest)), []  # a constant index needs so many rows
    for label in sorted({d for dims in axes for d in dims if isinstance(d, str)}):
        row["free"].append(label)
        usual = next(x.shape[a] for x, dims in zip(values, axes, strict=True) for a, d in enumerate(dims) if d == label)
        for size in {usual + 1, 3 * usual, 7, 2} - {usual}:
            trials.append((f"{label} {size}", resized(values, axes, label, size)))
            smaller += [f"{label} {size}"] if size < usual else []
    failures = []
    for what, inputs in trials:
        expected = answer(model, inputs)
        if expected is None and what.partition(" ")[0] in row["free"] and what not in smaller:
            failures.append(((0, 0.0), f"{what}: the axis is declared free, but PyTorch does not accept this size"))
        if not is_finite(expected) or unsteady(model, inputs, expected or ()):
            continue
        row["judged"] += 1
        try:
            actual = session.run(None, {v.name: x.numpy() for v, x in zip(asked, inputs, strict=True)})
            why = differs(actual, expected or ())
        except Exception as error:
            why = f"ONNX Runtime: {re.sub(chr(10), ' ', str(error))[:160]}"
        if why:
            failures.append(
                (simplicity(inputs), f"{what}: {why}; inputs {'; '.join(brief(x.numpy()) for x in inputs)}")
            )
    row["failed"] = [text.partition(":")[0] for _, text in failures]
    if failures:
        return {**row, "verdict": "WRONG", "told": min(failures)[1][:500]}
    if not row["judged"]:
        return {**row, "verdict": "not tried", "told": "no input with a finite result"}
    wanted = found == opset or (opset == 14 and found > opset)
    return {**row, "verdict": "right" if wanted else "WRONG", "told": "" if wanted else f"opset {found}"}


def is_random(model: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether two seeds give two answers."""
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        answers.append(answer(model, tensors))
    if answers[0] is None or answers[1] is None:
        raise Unusable("PyTorch does not run its own sample, or returns what numpy cannot hold")
    if not answers[0]:
        raise Unusable("it returns no tensor")
    return not all(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc") for a, b in zip(*answers, strict=True))


def operator_model(name: str, variant: str) -> tuple[nn.Module, list[Sample]]:
    """The model of one operator, and the samples that it is for; raises Unusable where there is none."""
    dtype, index, _ = VARIANTS[variant]
    groups = samples_of(OPERATORS[name], dtype)
    if index >= len(groups):
        raise Unusable("there is one model only")
    # The second one is one of other constants, where there are such.
    first = [leaf for leaf in groups[0][0].leaves if leaf is not INPUT]
    others = sorted(groups[1:], key=lambda group: repr([x for x in group[0].leaves if x is not INPUT]) == repr(first))
    samples = [groups[0], *others][index]
    key = f"{name} {variant}"
    CALLS[key] = (OPERATORS[name].get_op(), samples[0].leaves, samples[0].tree)
    return Operator(key), samples


def module_model(name: str, variant: str) -> tuple[nn.Module, list[Sample]]:
    """A module of module_db, in eval mode with seeded weights."""
    info, index = MODULES[name], int(variant) - 1
    torch.manual_seed(0)
    given = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=False)
    usable = []
    for item in given:
        call = item.forward_input
        if call and not call.kwargs and call.args and all(is_plain(x) for x in call.args):
            usable.append((item.constructor_input, list(call.args)))
    if index >= len(usable):
        raise Unusable("no sample has plain tensors alone" if not usable else "there are fewer samples")
    arguments, tensors = usable[index]
    model = info.module_cls(*arguments.args, **arguments.kwargs).eval()
    return model, [Sample([x.detach().clone() for x in tensors], [arguments], None)]


def constants_of(samples: Sequence[Sample]) -> str:
    """What is constant in a model, in a few words."""
    sample = samples[0]
    if sample.tree is None:
        arguments = sample.leaves[0]
        return f"{arguments.args} {arguments.kwargs}"
    first, args, kwargs = torch.utils._pytree.tree_unflatten(
        ["x" if leaf is INPUT else f"{leaf}" for leaf in sample.leaves], sample.tree
    )
    named = [f"{key}={value}" for key, value in kwargs.items()]
    return f"({', '.join([str(first), *map(str, args), *named])})".replace("'", "")


def run_job(product: Any, job: tuple[str, str, int], folder: Path, *, modules: bool) -> Json:
    """Save, convert and judge one model; returns its row."""
    name, variant, opset = job
    try:
        model, samples = (module_model if modules else operator_model)(name, variant)
        random = is_random(model, samples[0].tensors)
    except Unusable as reason:
        return {"verdict": "not tried", "told": str(reason)}
    except Exception as error:
        return {"verdict": "not tried", "told": f"its sample cannot be made: {type(error).__name__}: {error}"[:200]}
    if random:
        return {"verdict": "not tried", "told": "random"}
    values = samples[0].tensors
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.save(model, folder / "model.pt")
    shapes = [f"{','.join(map(str, x.shape))}:{str(x.dtype).removeprefix('torch.')}" for x in values]
    arguments = ["-i", str(folder / "model.pt"), "-o", str(folder / "out" / "model.onnx"), "--json"]
    arguments += ["--input-shape", *shapes, "--allow-class", "sweeps.applied.Operator"]
    arguments += ["--opset", str(opset)] if opset != product.DEFAULT_OPSET else []
    arguments += [] if modules or VARIANTS[variant][2] else ["--static"]
    done = apart(convert, product, arguments, folder)
    base = {"constants": constants_of(samples)[:200], "shapes": shapes, "seconds": done.get("seconds")}
    if done.get("status") == "timeout":
        return {**base, "verdict": "timeout", "told": "the conversion"}
    if done.get("status") == "sweep":
        return {**base, "verdict": "sweep", "told": done["told"]}
    if done["code"]:
        return {
            **base,
            "verdict": "bug" if done["code"] == 1 else "refused",
            "code": done["code"],
            "told": done["told"][:300],
        }
    rest = [sample.tensors for sample in samples[1:6]]
    judged = apart(judge, folder / "out" / "model.onnx", model, values, rest, opset)
    if "verdict" not in judged:
        judged = {"verdict": "timeout" if judged.get("status") == "timeout" else "sweep", "told": judged["told"]}
    return {**base, "exporter": done["exporter"], **judged}


HEAD = """# {title}

`python tests/sweeps/operators.py{flag}` at commit {commit}: {count} of {total}, opset {opsets}. {versions}.
Rows that a run with --only or --resume left alone are of an earlier commit.
Models converted or found not to be possible, by variant: {variants_run}.
Models made for one sample of torch's own ({variants}),
each judged by ONNX Runtime against PyTorch on values and sizes of the sweep's own: {tolerance} of the output's largest
value; whole numbers, shapes, dtypes and the number of outputs the same. Inputs for which PyTorch finds no finite
result, or another one in float64, are left out. A wrong variant counts most, else the first that was tried; what others
say is in brackets. right: with the opset, where 14 cannot express it; refused: the product's exit code; WRONG: exit
code 0, and an answer that is not PyTorch's; bug: exit code 1; not tried: no plain tensor of at least one axis, random,
sparse, or no finite result. Scalars (tensors of no axis) are constants: --input-shape has no form for them.
"""


def summary(rows: Json, opset: int) -> tuple[str, str]:
    """The verdict that counts for one operator at an opset, and the cell of the table.

    A wrong answer counts most, then the first variant that was tried; what others say is told in brackets.
    """
    mine = {key.partition("@")[0]: row for key, row in rows.items() if key.endswith(f"@{opset}")}
    if not mine:
        return "", "not run"
    order = {variant: place for place, variant in enumerate(VARIANTS)}
    tried = sorted((v for v in mine if mine[v]["verdict"] != "not tried"), key=lambda v: (order.get(v, 9), v))
    loud = [v for v in tried if mine[v]["verdict"] in LOUD]
    first = min(loud, key=lambda v: LOUD.index(mine[v]["verdict"])) if loud else next(iter(tried), next(iter(mine)))
    verdict = mine[first]["verdict"]
    text = f"**{verdict}**" if loud else short(mine[first], opset)
    other = [f"{v}: {short(mine[v], opset)}" for v in tried if short(mine[v], opset) != short(mine[first], opset)]
    return verdict, f"{text} ({'; '.join(other)})" if other else text


def short(row: Json, opset: int) -> str:
    """A verdict with the exit code, or with an opset that was not asked for."""
    detail = row.get("code") if row["verdict"] == "refused" else row.get("opset", opset)
    return row["verdict"] if detail == opset else f"{row['verdict']} {detail}"


def escape(text: str) -> str:
    """`text` for a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def render(rows: Json, opsets: Sequence[int], *, modules: bool) -> str:
    """The text of the table."""
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "convert.py"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    names = sorted(MODULES if modules else OPERATORS)
    run = collections.Counter(key for row in rows.values() for key in row)
    lines = [
        HEAD.format(
            title="Modules" if modules else "Operators",
            flag=" --modules" if modules else "",
            commit=commit,
            count=sum(name in rows for name in names),
            total=f"{len(names)} {'modules of module_db' if modules else 'operators of op_db'}",
            versions=", ".join(f"{m.__name__} {m.__version__}" for m in (torch, onnx, onnxruntime)),
            variants="up to eight, the batch free where the product leaves it so" if modules else
            "one of float32, one of int64, a second of float32 with other constants, one with a free batch",
            tolerance=TOLERANCE,
            variants_run=", ".join(f"{variant} {number}" for variant, number in sorted(run.items())),
            opsets=", ".join(map(str, opsets)),
        )
    ]  # fmt: skip
    lines += [f"| opset | {' | '.join(VERDICTS)} |", "|---" * (len(VERDICTS) + 1) + "|"]
    for opset in opsets:
        seen = [summary(row, opset)[0] for row in rows.values()]
        counts = [seen.count(verdict) for verdict in VERDICTS]
        lines.append(f"| {opset} | {' | '.join(map(str, counts))} |")
    wrong = [(n, k, r) for n, row in sorted(rows.items()) for k, r in row.items() if r["verdict"] in LOUD]
    lines += ["\n## Wrong\n", "| name | variant@opset | constants | exporter | what |", "|---" * 5 + "|"]
    for name, key, row in sorted(wrong, key=lambda item: (VERDICTS.index(item[2]["verdict"]), item[0])):
        told = row["told"] if row["verdict"] == "WRONG" else f"{row['verdict']}: {row['told']}"
        parts = name, key, row.get("constants", ""), str(row.get("exporter")), told
        lines.append(f"| {' | '.join(map(escape, parts))} |")
    lines += ["\n## All\n", f"| name | {' | '.join(map(str, opsets))} | why |", "|---" * (len(opsets) + 2) + "|"]
    for name in sorted(rows, key=lambda name: (all(r["verdict"] != "WRONG" for r in rows[name].values()), name)):
        told = [row["told"][:120] for row in rows[name].values() if row["verdict"] not in ("right", "WRONG")]
        parts = [name, *(summary(rows[name], opset)[1] for opset in opsets), next(iter(told), "")]
        lines.append(f"| {' | '.join(map(escape, parts))} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Run what is asked for; returns 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--modules", action="store_true", help="the modules of module_db instead of the operators of op_db")
    add("--only", nargs="+", metavar="NAME", help="these")
    add("--variants", nargs="+", metavar="NAME", help=f"of {', '.join(VARIANTS)}; with --modules the sample's number")
    add("--opset", nargs="+", type=int, default=[14], metavar="N", help="opsets (default: 14; all: 14 17 18 25)")
    add("--resume", action="store_true", help="leave out what the results have")
    add("--product", type=Path, default=ROOT, help="folder of the convert.py to test")
    add("--work", type=Path, default=Path("/tmp/pt2onnx-operators"), help="scratch folder")
    add("--results", type=Path)
    options = parser.parse_args()
    results: Path = options.results or REPORTS / ("modules.json" if options.modules else "operators.json")
    product = load_product(options.product.resolve())
    rows: Json = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    variants = options.variants or ([str(n + 1) for n in range(MODULE_SAMPLES)] if options.modules else list(VARIANTS))
    names = sorted(MODULES if options.modules else OPERATORS)
    wanted = [name for name in names if name in (options.only or names) or name.split(".")[0] in (options.only or ())]
    folder = options.work.resolve() / ("module" if options.modules else "operator")
    due, opsets = 0.0, list(options.opset)
    for opset, variant, name in itertools.product(options.opset, variants, wanted):
        row, key = rows.setdefault(name, {}), f"{variant}@{opset}"
        if key in row and options.resume:
            continue
        if variant == "free" and row.get(f"float@{opset}", {"verdict": "right"})["verdict"] not in ("right", "WRONG"):
            continue  # it would end in the same way
        row[key] = run_job(product, (name, variant, opset), folder, modules=options.modules)
        opsets[:] = sorted({int(key.partition("@")[2]) for row in rows.values() for key in row})
        results.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if time.monotonic() > due:  # writing the table takes as long as a conversion
            results.with_suffix(".md").write_text(render(rows, opsets, modules=options.modules), encoding="utf-8")
            due = time.monotonic() + 30
        print(
            time.strftime("%T"), name, key, row[key].get("seconds"), row[key]["verdict"], row[key]["told"], flush=True
        )
    results.with_suffix(".md").write_text(render(rows, opsets, modules=options.modules), encoding="utf-8")
    return int(any(row["verdict"] in LOUD for columns in rows.values() for row in columns.values()))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    raise SystemExit(main())
