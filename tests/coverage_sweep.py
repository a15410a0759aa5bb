#!/usr/bin/env python3
"""Convert every model of torchvision, a choice of timm and the archive formats, and check the results independently.

    OMP_NUM_THREADS=1 taskset -c 1 python tests/coverage_sweep.py [--family F] [--only NAME ...] [--resume]

Each model gets seeded random weights and calibrated batch norms and is saved; a forked child converts it with
convert.main() at the product's own default inputs. The check owes nothing to the product's verification: ONNX Runtime
against PyTorch on other random inputs, at batch 1 and 3, every output within 1e-3 of its largest value, the opset that
was asked for, onnx.checker. Results: coverage.json, kept after every conversion, and coverage.md, beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
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
from torchvision.models import get_model_weights, list_models

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3
TIMEOUT = 600  # seconds for one conversion and its check
Json = dict[str, Any]


class Column(NamedTuple):
    """One way to convert: what is saved, further arguments, and the opset that must come out (None: any)."""

    form: str
    arguments: tuple[str, ...] = ()
    opset: int | None = None


NEWEST = ("--opset", "25")
COLUMNS: dict[str, dict[str, Column]] = {
    "classification": {
        "pickle@14": Column("pickle", (), 14),
        "state_dict@14": Column("weights", (), 14),
        "pickle@25": Column("pickle", NEWEST, 25),
        "state_dict@25": Column("weights", NEWEST, 25),
    },
    "detection": {
        "pickle": Column("pickle", ("--static",)),
        "pickle, axes 2,3": Column("pickle", ("--dynamic-axes", "2,3")),
        "state_dict": Column("weights", ("--static",)),
        "state_dict, axes 2,3": Column("weights", ("--dynamic-axes", "2,3")),
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
LEFT_OUT = {
    name: "a quantised model: with quantize=True its weights are packed int8 objects that only PyTorch's own quantised "
    "kernels take; with the default quantize=False it computes what its float namesake above does"
    for name in list_models()
    if name.startswith("quantized_")
}
EXTRA = {name: ("--input-shape", "1,3,224,224", "1,3,224,224") for name in ("raft_small", "raft_large")}  # two inputs


class Case(NamedTuple):
    """One model of one family."""

    family: str
    name: str

    @property
    def key(self) -> str:
        """Its place in the results."""
        return f"{self.family}/{self.name}"


def cost(name: str) -> float:
    """Gigaflops and millions of parameters of a torchvision model: the order of the sweep."""
    meta = next(iter(get_model_weights(name))).meta
    return float(meta["_ops"] + meta["num_params"] / 3e7)


def list_cases(family: str) -> list[Case]:
    """The models of one family, or of all of them, the cheapest first."""
    if family == "all":
        return [case for name in COLUMNS for case in list_cases(name)]
    if family == "timm":
        return [Case(family, name) for name in TIMM]
    if family == "archives":
        return [Case(family, name) for name in ARCHIVES]
    detection = set(list_models(torchvision.models.detection))
    names = [n for n in list_models() if (n in detection) == (family == "detection") and n not in LEFT_OUT]
    return [Case(family, name) for name in sorted(names, key=cost)]


def list_jobs(family: str) -> list[tuple[Case, list[str]]]:
    """What to run in which order: one column of everything first, so that every family has results early."""
    cases = list_cases(family)
    early = [case for case in cases if case.family != "classification" or cost(case.name) < 30]
    late = [case for case in cases if case not in early]
    turn = {"timm": 0, "archives": 1, "classification": 2, "detection": 3}
    early.sort(key=lambda case: (cases.index(case) // 20 if case.family == "classification" else 2, turn[case.family]))
    first = [(case, list(COLUMNS[case.family])[: None if case.family == "archives" else 1]) for case in early + late]
    rest = [(case, list(COLUMNS[case.family])[1:]) for case in early + late if case.family != "archives"]
    return first + [job for job in rest if job[1]]


# --- making a model ---------------------------------------------------------------------------------------------------


def constructor_arguments(name: str) -> Json:
    """Thresholds that leave a random detector some detections but not thousands."""
    if "rcnn" in name:
        return {"box_score_thresh": 0.4}
    return {"score_thresh": 0.4} if Case("detection", name) in list_cases("detection") else {}


def example_inputs(name: str, batch: int, seed: int = 1) -> list[Tensor]:
    """Inputs of the size that torchvision or timm publish for the model."""
    generator = torch.Generator().manual_seed(seed)
    shape: tuple[int, ...] = (3, 224, 224)
    if name in list_models():
        transforms = next(reversed(list(get_model_weights(name)))).transforms()
        size = getattr(transforms, "crop_size", None) or [224]
        shape = (3, *([16] if len(size) == 2 else []), size[0], size[-1])
    else:
        shape = timm.get_pretrained_cfg(name).input_size
    return [torch.randn(batch, *shape, generator=generator) for _ in range(2 if name in EXTRA else 1)]


def build(case: Case) -> nn.Module:
    """The model with seeded random weights that leave no branch without influence on the output."""
    torch.manual_seed(0)
    if case.family == "timm":
        model = timm.create_model(case.name)
    else:
        builder = torchvision.models.get_model_builder(case.name)
        backbone = {"weights_backbone": None} if case.family == "detection" or case.name in SEGMENTATION else {}
        model = builder(weights=None, **backbone, **constructor_arguments(case.name))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros, and the 1e-6 of layer scales
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.05)
        calibrate(model, case)
    return model


SEGMENTATION = set(list_models(torchvision.models.segmentation))


def calibrate(model: nn.Module, case: Case) -> None:
    """Batch-norm statistics of one batch, so that values neither vanish nor explode, and spread class scores."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001  (no public base class)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    heads = [m for n, m in model.named_modules() if case.family == "detection" and is_class_head(n, m)]
    if norms or heads:
        inputs = example_inputs(case.name, 2, seed=2)
        model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
    seen: dict[nn.Module, float] = {}
    hooks = [h.register_forward_hook(lambda m, _, out: seen.update({m: float(out.std())})) for h in heads]
    if heads:
        model(*inputs)
    for hook in hooks:
        hook.remove()
    for head, spread in seen.items():
        head.weight.mul_(3 / spread)


def is_class_head(name: str, module: nn.Module) -> bool:
    """Whether a detector's layer makes the class scores."""
    last = r"cls_score|cls_logits|classification_head\.module_list\.\d+(\.1)?"
    return "rpn" not in name and isinstance(module, (nn.Linear, nn.Conv2d)) and bool(re.search(f"({last})$", name))


def save(model: nn.Module, form: str, case: Case, path: Path) -> None:
    """Write the model to `path` in the form of a column."""
    inputs = tuple(example_inputs(case.name, 2))
    if form == "pickle":
        torch.save(model, path)
    elif form == "weights":
        torch.save(model.state_dict(), path)
    elif form == "scripted":
        torch.jit.save(torch.jit.script(model), path)
    elif form == "traced":
        torch.jit.save(torch.jit.trace(model, inputs), path)
    else:
        free = {next(iter(model.forward.__code__.co_varnames[1:2])): {0: torch.export.Dim("batch")}}
        program = torch.export.export(model, inputs, dynamic_shapes=free if form == "pt2 batch" else None)
        torch.export.save(program, path)


# --- converting and checking ------------------------------------------------------------------------------------------


def apart(function: Callable[[], None]) -> None:
    """Run `function` in a child, so that its memory goes with it; raises RuntimeError where it fails."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                function()
                code = 0
            except Exception as error:
                traceback.print_exc()
                Path("error.txt").write_text(f"{type(error).__name__}: {error}".partition("\n")[0], encoding="utf-8")
            sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(Path("error.txt").read_text(encoding="utf-8") if Path("error.txt").exists() else "crashed")


def tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401  (models return anything)
    """The tensors of a model's outputs in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def check(path: Path, forms: Path, case: Case, wanted: int | None) -> Json:
    """ONNX Runtime against PyTorch on inputs of our own; raises AssertionError where the file is not as promised."""
    onnx.checker.check_model(str(path), full_check=True)
    opset = next(o.version for o in onnx.load(path, load_external_data=False).opset_import if o.domain in ("", "ai.onnx"))
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    model = torch.load(forms / "model", weights_only=False)
    found: Json = {"opset": opset, "batches": [], "worst": 0.0}
    for batch in (1, 3) if isinstance(session.get_inputs()[0].shape[0], str) else (session.get_inputs()[0].shape[0],):
        generator = torch.Generator().manual_seed(100 + batch)
        fixed = [[n if isinstance(n, int) else 224 for n in value.shape[1:]] for value in session.get_inputs()]
        inputs = [torch.rand(batch, *dims, generator=generator) * 2 - 0.7 for dims in fixed]
        cache = forms / f"reference-{'-'.join(str(tuple(x.shape)) for x in inputs)}.npz".replace(" ", "")
        if not cache.exists():
            with torch.no_grad():
                np.savez(cache, *[x.numpy() for x in tensors(model(*inputs))])
        with np.load(cache) as stored:
            expected = [stored[name] for name in stored.files]
        actual = session.run(None, {v.name: x.numpy() for v, x in zip(session.get_inputs(), inputs, strict=True)})
        if case.family == "detection":
            found["detections"] = len(expected[0])
        shapes = [a.shape for a in actual], [e.shape for e in expected]
        assert shapes[0] == shapes[1], f"shapes {shapes[0]}, PyTorch's {shapes[1]} at batch {batch}"  # noqa: S101  (a test)
        for a, e in zip(actual, expected, strict=True):
            found["worst"] = max(found["worst"], difference(a, e))
            if batch > 1:
                found["signal"] = max(found.get("signal", 0.0), difference(e[0], e[1]))
        found["batches"].append(batch)
    assert found["worst"] <= TOLERANCE, f"differs by {found['worst']:.2g} of the largest value"  # noqa: S101  (a test)
    assert wanted in (None, opset), f"opset {opset} came out, not {wanted}"  # noqa: S101  (a test)
    return found


def difference(actual: Any, expected: Any) -> float:  # noqa: ANN401  (numpy arrays of any dtype)
    """The largest difference, relative to the largest expected value; infinite for NaN."""
    if not expected.size:
        return 0.0
    gap = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max() / max(np.abs(expected).max(), 1e-30)
    return float(gap) if np.isfinite(gap) else float("inf")


def convert_one(case: Case, column: Column, folder: Path, product: Any) -> Json:  # noqa: ANN401  (the product's module)
    """Save, convert and check in the current process, whose standard streams are files."""
    source, target = folder / column.form, folder / "out.onnx"

    def prepare() -> None:
        model = build(case)
        torch.save(model, folder / "model")
        for form in ("pickle", "weights") if column.form in ("pickle", "weights") else (column.form,):
            save(model, form, case, folder / form)

    if not source.exists():
        apart(prepare)
    arguments = ["-i", str(source), "-o", str(target), "--json", *column.arguments, *EXTRA.get(case.name, ())]
    if column.form == "weights":
        arguments += ["--model-class", case.name]
        arguments += ["--model-args", json.dumps(given)] if (given := constructor_arguments(case.name)) else []
    start = time.monotonic()
    try:
        code = int(product.main(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    row: Json = {"code": code, "seconds": round(time.monotonic() - start, 1)}
    log = Path("log").read_text(encoding="utf-8", errors="replace")
    told = re.findall(r"^\[(?:ERROR|WARN)\] (.*)", log, re.MULTILINE)
    row["told"] = told[-1][:600] if told else ""
    if code:
        return {**row, "status": "failed", "reason": row.pop("told")}
    row["exporter"] = json.loads(Path("stdout").read_text(encoding="utf-8").splitlines()[-1])["exporter"]

    def verify() -> None:
        try:
            found = {"status": "ok", **check(target, folder, case, column.opset)}
        except AssertionError as error:
            found = {"status": "opset" if "came out" in str(error) else "wrong", "reason": str(error)}
            found["opset"] = next(o.version for o in onnx.load(target, load_external_data=False).opset_import if not o.domain)
        Path("found").write_text(json.dumps(found), encoding="utf-8")

    apart(verify)
    return {**row, **json.loads(Path("found").read_text(encoding="utf-8"))}


def run_job(case: Case, name: str, folder: Path, product: Any) -> Json:  # noqa: ANN401  (the product's module)
    """One conversion in a child of its own, killed after TIMEOUT seconds; returns its row."""
    desk = folder / "desk"
    shutil.rmtree(desk, ignore_errors=True)
    desk.mkdir(parents=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setpgid(0, 0)
            os.chdir(desk)
            for number, file in ((1, "stdout"), (2, "log")):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            try:
                row = convert_one(case, COLUMNS[case.family][name], folder, product)
            except Exception as error:
                traceback.print_exc()
                row = {"status": "sweep", "reason": f"{type(error).__name__}: {error}"[:500]}
            Path("row").write_text(json.dumps(row), encoding="utf-8")
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - start > TIMEOUT:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.05)
    done = desk / "row"
    row = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {"status": "timeout", "reason": "killed"}
    row["wall"] = round(time.monotonic() - start, 1)
    for leftover in folder.glob("out.onnx*"):
        leftover.unlink()
    return dict(row)


# --- results ----------------------------------------------------------------------------------------------------------


def cell(row: Json | None) -> str:
    """One table cell."""
    if row is None:
        return "not run"
    detail = f"{row.get('exporter', '?')[:5]} {row.get('worst', 0):.0e}, {row.get('seconds', row['wall']):.0f} s"
    if row["status"] == "ok":
        return f"ok {row['opset']} ({detail})"
    return f"**{row['status']}** {row.get('code', '')}" + (f" -> {row['opset']} ({detail})" if "opset" in row else "")


def render(results: Json, target: Path) -> None:
    """Write coverage.md."""
    lines = [
        "# Coverage sweep\n",
        f"`python tests/coverage_sweep.py` on {results['machine']}, one conversion at a time on one core. {results['versions']}.\n",
        "Each cell: status, opset that came out, (exporter, largest difference relative to the output's largest value, "
        "seconds). ok: right at batch 1 and 3 on inputs of the sweep's own; opset: right, but not the opset expected; "
        "wrong: differs from PyTorch; failed: the product's exit code; timeout: over 600 s; sweep: could not be made.\n",
    ]
    rows, parts, failures = results["rows"], [], []
    summary = ["| family | models | column | ok | opset | failed | wrong | timeout | sweep | not run |", "|---" * 10 + "|"]
    for family, columns in COLUMNS.items():
        cases = list_cases(family)
        for name in columns:
            states = [rows.get(case.key, {}).get(name, {}).get("status", "not run") for case in cases]
            counts = [states.count(s) for s in ("ok", "opset", "failed", "wrong", "timeout", "sweep", "not run")]
            summary.append(f"| {family} | {len(cases)} | {name} | {' | '.join(map(str, counts))} |")
        parts += [f"\n## {family}\n", f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for case in sorted(cases, key=lambda case: case.name):
            cells = {name: rows.get(case.key, {}).get(name) for name in columns}
            parts.append(f"| {case.name} | {' | '.join(map(cell, cells.values()))} |")
            bad = {name: row for name, row in cells.items() if row and row["status"] != "ok"}
            for reason in dict.fromkeys((row.get("reason", ""), row.get("told", "")) for row in bad.values()):
                which = ", ".join(n for n, row in bad.items() if (row.get("reason", ""), row.get("told", "")) == reason)
                failures.append(f"- {case.key} ({which}): {'; the product said: '.join(filter(None, reason))}")
    left_out = [f"- {', '.join(n for n in LEFT_OUT if LEFT_OUT[n] == why)}: {why}." for why in dict.fromkeys(LEFT_OUT.values())]
    lines += [*summary, *parts, "\n## Not as promised\n", *failures, "\n## Left out\n", *left_out]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_product(path: Path) -> Any:  # noqa: ANN401  (a module)
    """The product's module, and everything that it imports later, so that the children need not; one thread each."""
    from onnxscript import version_converter  # noqa: F401
    from torch.onnx._internal.exporter import _core  # noqa: F401

    options = onnxruntime.SessionOptions

    def one_thread() -> Any:  # noqa: ANN401
        made = options()
        made.intra_op_num_threads = 1
        return made

    onnxruntime.SessionOptions = one_thread
    torch.set_num_threads(1)
    specification = importlib.util.spec_from_file_location("convert", path)
    assert specification is not None  # noqa: S101  (for the type checker)
    assert specification.loader is not None  # noqa: S101
    product = importlib.util.module_from_spec(specification)
    sys.modules["convert"] = product
    specification.loader.exec_module(product)

    def become_worker(arguments: list[str]) -> None:
        """As the product's, without the new program, whose imports take longer than most conversions."""
        os.environ[product.WORKER_VARIABLE] = str(os.getppid())
        os._exit(product.main(arguments))

    product.become_worker = become_worker
    return product


def main() -> int:
    """Run what is asked for; returns 1 where something is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=(*COLUMNS, "all"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="these columns, such as pickle@14")
    parser.add_argument("--resume", action="store_true", help="leave out what coverage.json has")
    parser.add_argument("--retry", action="store_true", help="as --resume, but what did not succeed is run again")
    parser.add_argument("--product", type=Path, default=HERE.parent / "convert.py", help="the convert.py to test")
    parser.add_argument("--work", type=Path, default=Path("/tmp/pt2onnx-sweep"), help="scratch folder")  # noqa: S108
    parser.add_argument("--results", type=Path, default=HERE / "coverage.json")
    options = parser.parse_args()
    product = load_product(options.product.resolve())
    results: Json = {"rows": {}}
    if options.results.exists():
        results = json.loads(options.results.read_text(encoding="utf-8"))
    results["machine"] = f"{os.cpu_count()} cores ({platform.machine()})"
    results["versions"] = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, timm, onnx, onnxruntime))
    bad = 0
    for case, columns in list_jobs(options.family):
        folder = options.work / case.family / case.name
        for name in columns:
            done = results["rows"].setdefault(case.key, {}).get(name)
            keep = done and (options.resume or (options.retry and done["status"] == "ok"))
            if keep or (options.only and case.name not in options.only) or name not in (options.columns or columns):
                continue
            row = run_job(case, name, folder, product)
            bad += row["status"] != "ok"
            results["rows"][case.key][name] = row
            partial = options.results.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(options.results)
            render(results, options.results.with_suffix(".md"))
            print(f"{time.strftime('%H:%M:%S')} {case.key} {name}: {json.dumps(row)}", flush=True)  # noqa: T201
        for file in folder.glob("*") if folder.exists() else ():
            if file.is_file() and file.suffix != ".npz":
                file.unlink()
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
