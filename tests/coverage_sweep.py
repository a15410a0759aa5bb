#!/usr/bin/env python3
"""Convert every model of torchvision, a choice of timm and the archive formats, and check the results independently.

    OMP_NUM_THREADS=1 taskset -c 1 python tests/coverage_sweep.py [--family F] [--only NAME ...] [--resume]

Each model gets seeded random weights and calibrated batch norms and is saved; a forked child converts it with
convert.main() at the product's own default inputs. The check owes nothing to the product's verification: ONNX Runtime
against PyTorch on other random inputs, at batch 1 and 3, every output within 1e-3 of its largest value, the opset that
was asked for, onnx.checker. Results: coverage.json, kept after every conversion, and coverage.md, beside this file.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, get_model_builder, get_model_weights, list_models, segmentation

TOLERANCE = 1e-3
TIMEOUT = 600  # seconds for one conversion and its check
Json = dict[str, Any]


class Column(NamedTuple):
    """One way to convert: what is saved, further arguments, and the opset that must come out (None: any)."""

    form: str
    arguments: tuple[str, ...] = ()
    opset: int | None = None


NEW, AXES = ("--opset", "25"), ("--dynamic-axes", "2,3")
COLUMNS: dict[str, dict[str, Column]] = {
    "classification": {  # and everything else of torchvision that is not detection
        f"{saved}@{opset}": Column(saved, NEW if opset == 25 else (), opset)
        for opset in (14, 25)
        for saved in ("pickle", "state_dict")
    },
    "detection": {
        f"{saved}{', axes 2,3' if more == AXES else ''}": Column(saved, more)
        for saved in ("pickle", "state_dict")
        for more in (("--static",), AXES)
    },
    "timm": {"pickle@14": Column("pickle", (), 14)},
    "archives": {name: Column(name) for name in ("scripted", "traced", "pt2", "pt2 batch")},
}
TIMM = """resnet10t seresnext26d_32x4d resnest14d res2net50_14w_8s densenet121 dpn68 tf_efficientnet_b0
 mobilenetv3_small_050 mobilenetv4_conv_small_050 ghostnet_050 regnety_002 rexnet_100 repvgg_a0 vit_tiny_patch16_224
 swinv2_cr_tiny_224 convnext_atto convnextv2_atto mixer_s32_224 resmlp_12_224 gmlp_ti16_224 poolformer_s12
 coatnet_nano_rw_224 levit_128s edgenext_xx_small mobilevit_xxs efficientformer_l1 efficientvit_b0 fastvit_t8 pvt_v2_b0
 xcit_nano_12_p16_224 crossvit_tiny_240 focalnet_tiny_srf davit_tiny hrnet_w18_small ese_vovnet19b_dw dla34
 nf_resnet50 mambaout_femto starnet_s1 hiera_tiny_224 eva02_tiny_patch14_224 repvit_m0_9""".split()
ARCHIVES = "resnet18 mobilenet_v3_small squeezenet1_1 shufflenet_v2_x0_5 efficientnet_b0 swin_t".split()
DETECTION = list_models(detection)
QUANTISED = [name for name in list_models() if name.startswith("quantized_")]
LEFT_OUT = """with quantize=True their weights are packed int8 objects that only PyTorch's own quantised kernels take;
 with the default quantize=False they compute what their float namesakes above do"""
RAFT = ("raft_small", "raft_large")  # two inputs, which the product asks the user for


class Case(NamedTuple):
    """One model of one family."""

    family: str
    name: str

    @property
    def key(self) -> str:
        """Its place in the results."""
        return f"{self.family}/{self.name}"


def cost(case: Case) -> float:
    """Roughly seconds for one conversion, from gigaflops and parameters: the order of the sweep."""
    if case.family == "timm":
        return 0.0
    meta = next(iter(get_model_weights(case.name))).meta
    return float(meta["_ops"] + meta["num_params"] / 3e7)


def list_cases(family: str) -> list[Case]:
    """The models of one family, or of all of them, the cheapest first."""
    if family == "all":
        return [case for name in COLUMNS for case in list_cases(name)]
    rest = [name for name in list_models() if name not in DETECTION + QUANTISED]
    names = {"timm": TIMM, "archives": ARCHIVES, "detection": DETECTION, "classification": rest}[family]
    return sorted((Case(family, name) for name in names), key=cost)


def list_jobs(family: str) -> list[tuple[Case, list[str]]]:
    """What to run in which order: one column of every family early, the most expensive models last."""
    cases = list_cases(family)
    huge = [case for case in cases if cost(case) > 120 and case.family != "detection"]
    turn = {"timm": 8, "archives": 9, "detection": 10}
    usual = sorted((c for c in cases if c not in huge), key=lambda c: turn.get(c.family, cost(c)))
    first = [(case, [*COLUMNS[case.family]][: 4 if case.family == "archives" else 1]) for case in usual + huge]
    rest = [(case, [*COLUMNS[case.family]][1:]) for case in usual + huge if case.family != "archives"]
    return first[: len(usual)] + rest[: len(rest) - len(huge)] + first[len(usual) :] + rest[len(rest) - len(huge) :]


# --- making a model ---------------------------------------------------------------------------------------------------


def model_arguments(name: str) -> Json:
    """Thresholds that leave a random detector some detections but not thousands."""
    return {("box_score_thresh" if "rcnn" in name else "score_thresh"): 0.4} if name in DETECTION else {}


def example_inputs(case: Case, seed: int) -> list[Tensor]:
    """Two images, one of them darker, of the size that torchvision or timm publish for the model."""
    if case.family == "timm":
        shape = timm.get_pretrained_cfg(case.name).input_size
    else:
        size = getattr([*get_model_weights(case.name)][-1].transforms(), "crop_size", None) or [224]
        shape = (3, *([16] if len(size) == 2 else []), size[0], size[-1])
    generator = torch.Generator().manual_seed(seed)
    dark = torch.arange(2.0).reshape(2, *[1] * len(shape))
    return [torch.randn(2, *shape, generator=generator) - dark for _ in range(2 if case.name in RAFT else 1)]


def build(case: Case) -> nn.Module:
    """The model with seeded random weights that leave no branch without influence on the output."""
    torch.manual_seed(0)
    if case.family == "timm":
        model = timm.create_model(case.name)
    else:
        bare = {"weights_backbone": None} if case.name in (*DETECTION, *list_models(segmentation)) else {}
        model = get_model_builder(case.name)(weights=None, **bare, **model_arguments(case.name))
    with torch.no_grad():
        for parameter in model.parameters():  # zeros, and the 1e-6 of layer scales
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.05)
        calibrate(model.eval(), example_inputs(case, seed=2))
    return model


def calibrate(model: nn.Module, inputs: list[Tensor]) -> None:
    """Batch-norm statistics of one batch, so that values neither vanish nor explode; detectors' class scores spread."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001  (no public base class)
    heads = [m for n, m in model.named_modules() if is_class_head(n, m)]
    for norm in norms:
        norm.train().momentum = 1.0
    model(*inputs)
    for norm in norms:
        norm.eval().momentum = 0.1
        norm.running_var.clamp_(min=float(norm.running_var.mean()) / 10)  # else other inputs may explode
    for head in heads:
        head.register_forward_hook(lambda m, _, out: m.weight.mul_(3 / float(out.std())))
    if heads:
        model(*inputs)
    for head in heads:
        head._forward_hooks.clear()  # noqa: SLF001  (shorter than keeping the handles)


def is_class_head(name: str, module: nn.Module) -> bool:
    """Whether a detector's layer makes the class scores."""
    last = r"(cls_score|cls_logits|classification_head\.module_list\.\d+(\.1)?)$"
    return "rpn" not in name and isinstance(module, (nn.Linear, nn.Conv2d)) and bool(re.search(last, name))


def prepare(case: Case, form: str, folder: Path) -> None:
    """Save the model in the form of a column, and as a pickle for the check."""
    model = build(case)
    torch.save(model, folder / "pickle")
    inputs = tuple(example_inputs(case, seed=1))
    if form == "scripted":
        torch.jit.save(torch.jit.script(model), folder / form)
    elif form == "traced":
        torch.jit.save(torch.jit.trace(model, inputs), folder / form)
    elif form.startswith("pt2"):
        free = ({0: torch.export.Dim("batch")},) if form == "pt2 batch" else None
        torch.export.save(torch.export.export(model, inputs, dynamic_shapes=free), folder / form)
    else:
        torch.save(model.state_dict(), folder / "state_dict")


# --- converting and checking ------------------------------------------------------------------------------------------


def apart(function: Callable[[], None]) -> None:
    """Run `function` in a child, so that its memory goes with it; raises RuntimeError where it fails."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except Exception as error:  # told by the parent
            traceback.print_exc()
            Path("error").write_text(f"{type(error).__name__}: {str(error)[:300]}", encoding="utf-8")
        sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(Path("error").read_text(encoding="utf-8") if Path("error").exists() else "crashed")


def tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401  (models return anything)
    """The tensors of a model's outputs in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def distance(actual: Any, expected: Any) -> float:  # noqa: ANN401  (numpy arrays of any dtype)
    """The largest difference, relative to the largest expected value; infinite for NaN and for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    gap = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max() / max(np.abs(expected).max(), 1e-30)
    return float(gap) if np.isfinite(gap) else float("inf")


def check(path: Path, folder: Path, wanted: int | None) -> Json:
    """What ONNX Runtime computes against PyTorch, on inputs of our own, and the opset in the file."""
    onnx.checker.check_model(str(path), full_check=True)
    imports = onnx.load(path, load_external_data=False).opset_import
    session = onnxruntime.InferenceSession(path, onnxruntime.SessionOptions(), providers=["CPUExecutionProvider"])
    model = torch.load(folder / "pickle", weights_only=False)
    shapes = [value.shape for value in session.get_inputs()]
    found: Json = {"opset": max(o.version for o in imports if o.domain in ("", "ai.onnx")), "checked": [], "worst": 0.0}
    for batch, sizes in ((1, (224, 256)), (3, (192, 320))):
        free = iter(sizes * len(shapes))
        dims = [[n if isinstance(n, int) else next(free) if i else batch for i, n in enumerate(s)] for s in shapes]
        generator = torch.Generator().manual_seed(100 + batch)
        inputs = [torch.rand(*sizes, generator=generator) * 2 - 0.7 for sizes in dims]
        cache = folder / f"{dims}.npz".replace(" ", "")
        if not cache.exists():
            with torch.no_grad():
                np.savez(cache, *[x.numpy() for x in tensors(model(*inputs))])
        with np.load(cache) as stored:
            expected = [stored[name] for name in stored.files]
        actual = session.run(None, {v.name: x.numpy() for v, x in zip(session.get_inputs(), inputs, strict=True)})
        gaps = [distance(a, e) for a, e in zip(actual, expected, strict=True)]
        found["worst"] = max(found["worst"], *gaps)
        found["signal"] = distance(expected[0][-1:], expected[0][:1]) if len(expected[0]) else 0.0
        found["checked"].append([dims, [(a.shape, e.shape, g) for a, e, g in zip(actual, expected, gaps, strict=True)]])
    good = found["worst"] <= TOLERANCE
    found["status"] = "wrong" if not good else "ok" if wanted in (None, found["opset"]) else "opset"
    return found


def convert_one(case: Case, column: Column, folder: Path, product: Any) -> Json:  # noqa: ANN401  (the product's module)
    """Save, convert and check in the current process, whose standard streams are files."""
    source, target = folder / column.form, folder / "out.onnx"
    if not source.exists():
        apart(lambda: prepare(case, column.form, folder))
    arguments = ["-i", str(source), "-o", str(target), "--json", *column.arguments]
    if case.name in RAFT:
        arguments += ["--input-shape", "1,3,224,224", "1,3,224,224"]
    if column.form == "state_dict":
        arguments += ["--model-class", case.name, "--model-args", json.dumps(model_arguments(case.name))]
    start = time.monotonic()
    try:
        code = int(product.main(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    row: Json = {"code": code, "seconds": round(time.monotonic() - start, 1), "status": "failed"}
    told = re.findall(r"^\[(?:ERROR|WARN)\] (.*)", Path("log").read_text(encoding="utf-8"), re.MULTILINE)
    row["told"] = told[-1][:600] if told else ""
    if code == 0:
        row["exporter"] = json.loads(Path("stdout").read_text(encoding="utf-8").splitlines()[-1])["exporter"]
        apart(
            lambda: Path("found").write_text(json.dumps(check(target, folder, column.opset)), encoding="utf-8") and None
        )
        row |= json.loads(Path("found").read_text(encoding="utf-8"))
    return row


def run_job(case: Case, name: str, folder: Path, product: Any) -> Json:  # noqa: ANN401  (the product's module)
    """One conversion in a child of its own, killed after TIMEOUT seconds; returns its row."""
    desk = folder / "desk"
    shutil.rmtree(desk, ignore_errors=True)
    desk.mkdir(parents=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.chdir(desk)
        for number, file in ((1, "stdout"), (2, "log")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        with contextlib.suppress(BaseException):
            try:
                row = convert_one(case, COLUMNS[case.family][name], folder, product)
            except Exception as error:  # of the sweep, not of the product
                row = {"status": "sweep", "told": f"{type(error).__name__}: {str(error)[:300]}"}
            Path("row").write_text(json.dumps(row), encoding="utf-8")
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - start > TIMEOUT:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    done = desk / "row"
    row: Json = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {"status": "timeout", "told": ""}
    for leftover in folder.glob("*out.onnx*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return {**row, "wall": round(time.monotonic() - start, 1)}


# --- results ----------------------------------------------------------------------------------------------------------

STATES = ("ok", "opset", "failed", "wrong", "timeout", "sweep", "not run")
HEAD = """# Coverage sweep

`python tests/coverage_sweep.py`, one conversion at a time on one of the {cores} shared cores. {versions}.

Cells: state, opset (exporter, largest difference relative to the output's largest value, seconds). ok: right at batch 1
and 3 (where the batch is free) on inputs of the sweep's own; opset: right, but another opset than expected came out;
wrong: differs from PyTorch; failed: the product's exit code; timeout: over 600 s; sweep: the input could not be made.

| family | models | column | {states} |
|---|---|---|{rule}"""


def cell(row: Json | None) -> str:
    """One table cell."""
    if row is None:
        return "not run"
    if "opset" not in row:
        return f"**{row['status']}** {row.get('code', '')}"
    mark = row["status"] if row["status"] == "ok" else f"**{row['status']}**"
    return f"{mark} {row['opset']} ({row['exporter']}, {row['worst']:.0e}, {row['seconds']:.0f} s)"


def render(rows: Json, target: Path) -> None:
    """Write coverage.md."""
    modules = (torch, torchvision, timm, onnx, onnxruntime)
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in modules)
    states = {"states": " | ".join(STATES), "rule": "---|" * len(STATES)}
    lines, tables, notes = [HEAD.format(cores=os.cpu_count(), versions=versions, **states)], [], []
    for family, columns in COLUMNS.items():
        cases = sorted(list_cases(family))
        tables += [f"\n## {family}\n", f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for case in cases:
            row = rows.get(case.key, {})
            tables.append(f"| {case.name} | {' | '.join(cell(row.get(name)) for name in columns)} |")
            told = {
                n: (r["told"] or f"differs by {r.get('worst', 0):.1e}") for n, r in row.items() if r["status"] != "ok"
            }
            told |= {n: r["told"] for n, r in row.items() if r["status"] == "ok" and r["told"]}
            notes += [
                f"- {case.key} ({', '.join(n for n in told if told[n] == t)}): {t}"
                for t in dict.fromkeys(told.values())
            ]
        for name in columns:
            seen = [rows.get(case.key, {}).get(name, {}).get("status", "not run") for case in cases]
            lines.append(f"| {family} | {len(cases)} | {name} | {' | '.join(str(seen.count(s)) for s in STATES)} |")
    left_out = ["\n## Left out\n", f"- {', '.join(QUANTISED)}: {' '.join(LEFT_OUT.split())}."]
    notes = ["\n## What the product said (failures, other opsets, warnings)\n", *notes]
    target.write_text("\n".join([*lines, *tables, *notes, *left_out]) + "\n", encoding="utf-8")


def load_product(path: Path) -> Any:  # noqa: ANN401  (a module)
    """The product's module, and what it imports later, so that the children need not; one thread each."""
    from onnxscript import version_converter  # noqa: F401
    from torch.onnx._internal.exporter import _core  # noqa: F401

    options = onnxruntime.SessionOptions

    def one_thread() -> Any:  # noqa: ANN401
        made = options()
        made.intra_op_num_threads, made.log_severity_level = 1, 4
        return made

    onnxruntime.SessionOptions = one_thread
    torch.set_num_threads(1)
    specification = importlib.util.spec_from_file_location("convert", path)
    product = importlib.util.module_from_spec(specification)  # type: ignore[arg-type]
    sys.modules["convert"] = product
    specification.loader.exec_module(product)  # type: ignore[union-attr]

    def become_worker(arguments: list[str]) -> None:
        """As the product's, without the new program, whose imports take longer than most conversions."""
        os.environ[product.WORKER_VARIABLE] = str(os.getppid())
        os._exit(product.main(arguments))

    product.become_worker = become_worker  # type: ignore[attr-defined]
    return product


def main() -> int:
    """Run what is asked for; returns 1 where something is not as promised."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=(*COLUMNS, "all"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="these columns, such as pickle@14")
    parser.add_argument("--jobs", type=int, choices=(1,), default=1, help="conversions at a time")
    parser.add_argument("--resume", action="store_true", help="leave out what coverage.json has")
    parser.add_argument("--retry", action="store_true", help="as --resume, but what is not ok is run again")
    parser.add_argument("--product", type=Path, default=here.parent / "convert.py", help="the convert.py to test")
    parser.add_argument("--work", type=Path, default=Path("/tmp/pt2onnx-sweep"), help="scratch folder")  # noqa: S108
    parser.add_argument("--results", type=Path, default=here / "coverage.json")
    options = parser.parse_args()
    product = load_product(options.product.resolve())
    rows: Json = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    bad = 0
    for case, columns in list_jobs(options.family):
        folder = options.work.resolve() / case.family / case.name
        for name in columns:
            done = rows.setdefault(case.key, {}).get(name)
            keep = done and (options.resume or (options.retry and done["status"] == "ok"))
            if keep or (options.only and case.name not in options.only) or name not in (options.columns or columns):
                continue
            row = rows[case.key][name] = run_job(case, name, folder, product)
            bad += row["status"] != "ok"
            partial = options.results.with_suffix(".partial")
            partial.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(options.results)
            render(rows, options.results.with_suffix(".md"))
            print(f"{time.strftime('%H:%M:%S')} {case.key} {name}: {cell(row)} {row['told']}", flush=True)  # noqa: T201
        for file in folder.glob("*"):
            if file.is_file() and file.suffix != ".npz":
                file.unlink()
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
