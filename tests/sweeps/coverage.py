#!/usr/bin/env python3
"""Convert every model of torchvision, a choice of timm and the archive formats, and check the results independently.

    OMP_NUM_THREADS=1 taskset -c 1 python tests/sweeps/coverage.py [--family F] [--only NAME ...] [--resume]

Each model gets seeded random weights and calibrated batch norms; a forked child converts it with convert.main() at the
product's default inputs. The check owes nothing to the product's: ONNX Runtime against PyTorch on other random inputs,
at batch 1 and 3, every output within 1e-3 of its largest value, the opset that was asked for, onnx.checker. Results:
tests/reports/coverage.json, kept after every conversion, and coverage.md beside it.
"""

import argparse
import functools
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

# tests/ and the folder of convert.py, in place of this one
sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import torchvision
from judge import distance
from sweeps.jobs import LIMIT, REPORTS, ROOT, STATES, Json, apart, convert, load_product
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import detection, get_model_builder, get_model_weights, list_models, segmentation

COLUMNS = {  # what is saved, and the opset that must come out or the free axes; "classification": all but detection
    "classification": ["pickle@14", "state_dict@14", "pickle@25", "state_dict@25"],
    "detection": ["pickle", "pickle 2,3", "state_dict", "state_dict 2,3"],
    "timm": ["pickle@14"],
    "archives": ["scripted", "traced", "pt2", "pt2_batch"],
}
DETECTION = list_models(detection)
LIMITS = (100, 200, 300)  # detections that torchvision's models return at most
# Thresholds that leave a random detector some detections but not thousands; images resized to 320 pixels, not 800.
ARGUMENTS = {
    name: {"box_score_thresh" if "rcnn" in name else "score_thresh": 0.7}
    | ({} if "ssd" in name else {"min_size": 320, "max_size": 480})
    for name in DETECTION
}
NAMES = {
    "classification": [name for name in list_models() if name not in DETECTION],
    "detection": DETECTION,
    "timm": """resnet10t seresnext26d_32x4d resnest14d res2net50_14w_8s densenet121 dpn68 tf_efficientnet_b0 starnet_s1
        mobilenetv3_small_050 mobilenetv4_conv_small_050 ghostnet_050 regnety_002 rexnet_100 repvgg_a0 repvit_m0_9
        vit_tiny_patch16_224 swinv2_cr_tiny_224 convnext_atto convnextv2_atto mixer_s32_224 resmlp_12_224 gmlp_ti16_224
        poolformer_s12 coatnet_nano_rw_224 levit_128s edgenext_xx_small mobilevit_xxs efficientformer_l1 efficientvit_b0
        fastvit_t8 pvt_v2_b0 xcit_nano_12_p16_224 crossvit_tiny_240 focalnet_tiny_srf davit_tiny hrnet_w18_small dla34
        ese_vovnet19b_dw nf_resnet50 mambaout_femto hiera_tiny_224 eva02_tiny_patch14_224""".split(),  # noqa: SIM905
    "archives": ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "efficientnet_b0", "swin_t"],
}


def turn(job: tuple[str, str, str]) -> float:
    """The sweep's order: from cheap to expensive, the first column of every family early."""
    family, name, column = job
    meta = next(iter(get_model_weights(name))).meta if family == "classification" else {"_ops": 0, "num_params": 0}
    cost = {"timm": 8, "archives": 9, "detection": 40}.get(family, meta["_ops"] + meta["num_params"] / 3e7)
    return cost if column == COLUMNS[family][0] or family == "archives" else cost * 4


def example_inputs(family: str, name: str, seed: int) -> tuple[Tensor, ...]:
    """Two images, one of them darker, of the size that torchvision or timm publish for the model."""
    shape = timm.get_pretrained_cfg(name).input_size if family == "timm" else ()
    if family != "timm":
        size = getattr([*get_model_weights(name)][-1].transforms(), "crop_size", None) or [224]
        shape = (3, *([16] if len(size) == 2 else []), size[0], size[-1])
    generator = torch.Generator().manual_seed(seed)
    dark = torch.arange(2.0).reshape(2, *[1] * len(shape))
    return tuple(torch.randn(2, *shape, generator=generator) - dark for _ in range(2 if "raft" in name else 1))


def build(family: str, name: str) -> nn.Module:
    """The model with seeded random weights that leave no branch without influence on the output."""
    torch.manual_seed(0)
    if family == "timm":
        model = timm.create_model(name)
    else:
        bare = {"weights_backbone": None} if name in (*DETECTION, *list_models(segmentation)) else {}
        model = get_model_builder(name)(weights=None, **bare, **ARGUMENTS.get(name, {}))
    with torch.no_grad():
        for parameter in model.parameters():  # zeros, and the 1e-6 of layer scales
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.05)
        calibrate(model.eval(), example_inputs(family, name, seed=2))
    return model


def calibrate(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Batch-norm statistics of one batch, so that values neither vanish nor explode; detectors' class scores spread."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    last = re.compile(r"(?!.*rpn).*(cls_score|cls_logits|classification_head\.module_list\.\d+(\.1)?)$")
    heads = [m for n, m in model.named_modules() if last.match(n) and isinstance(m, (nn.Linear, nn.Conv2d))]
    hooks = [h.register_forward_hook(lambda h, _, y: setattr(h.weight, "data", h.weight * 3 / y.std())) for h in heads]
    for norm in norms:
        norm.train().momentum = 1.0
    model(*inputs)
    for norm in norms:
        norm.eval().momentum = 0.1
        norm.running_var.clamp_(min=float(norm.running_var.mean()) / 10)  # else other inputs may explode
    for hook in hooks:
        hook.remove()


def prepare(family: str, name: str, form: str, folder: Path) -> None:
    """Save the model in the form of a column, and as a pickle for the check."""
    model, inputs = build(family, name), example_inputs(family, name, seed=1)
    torch.save(model, folder / "pickle")
    torch.save(model.state_dict(), folder / "state_dict")
    if form in ("scripted", "traced"):
        torch.jit.save(torch.jit.script(model) if form == "scripted" else torch.jit.trace(model, inputs), folder / form)
    elif form.startswith("pt2"):
        free = ({0: torch.export.Dim("batch")},) if form == "pt2_batch" else None
        torch.export.save(torch.export.export(model, inputs, dynamic_shapes=free), folder / form)


def unmatched(actual: dict[str, Any], expected: dict[str, Any]) -> float:
    """The share of expected detections without a partner: same label, score within 0.01, box, mask, points within 1 %.

    Detectors of random weights amplify rounding, so that rows of nearly equal score change places; where a limit cuts
    the answer off, rounding also decides which of those at the cut is there.
    """
    boxes, scores = expected["boxes"], expected["scores"]
    same = np.abs(actual["boxes"][None] - boxes[:, None]).max(-1) <= 0.01 * max(np.abs(boxes).max(initial=0), 1)
    same &= actual["labels"][None] == expected["labels"][:, None]
    same &= np.abs(actual["scores"][None] - scores[:, None]) < 0.01
    for name in expected.keys() - {"boxes", "labels", "scores"}:
        for i, j in np.argwhere(same):
            gap = np.abs(actual[name][j] - expected[name][i]).mean()
            same[i, j] &= gap <= 0.01 * max(np.abs(expected[name][i]).max(), 1)
    extra = max(len(actual["scores"]) - len(scores), 0)
    cut_off = len(scores) == len(actual["scores"]) and len(scores) in LIMITS
    alone = ~same.any(1) & (scores > (scores.min() + 1e-4 if cut_off else -np.inf))
    return float((alone.sum() + extra) / max(len(scores), 1))


def answer_of(model: nn.Module, inputs: list[Tensor]) -> dict[str, Any]:
    """PyTorch's outputs: a detector's by name, any other model's by position."""
    with torch.no_grad():
        result = model(*inputs)
    if isinstance(result, list) and isinstance(result[0], dict):
        return {name: value.numpy() for name, value in result[0].items()}
    return {str(index): leaf.numpy() for index, leaf in enumerate(tree_leaves(result))}


def stable_answer(model: nn.Module, shapes: list[list[int]], seed: int, cache: Path, *, detector: bool) -> Any:
    """Inputs, PyTorch's answer and, of a detector, how far rounding moves it: of 6 inputs the calmest.

    What rounding does is seen in PyTorch's own float64 and in inputs that are 1e-5 away.
    """
    best: Any = None
    for turn in range(0 if cache.exists() else 6 if detector else 1):
        generator = torch.Generator().manual_seed(seed + 1000 * turn)
        inputs = [torch.rand(*shape, generator=generator) * 2 - 0.7 for shape in shapes]
        answer, noise = answer_of(model, inputs), 0.0
        if detector:
            noise = unmatched(answer_of(model.double(), [x.double() for x in inputs]), answer)
            model.float()
            stirred = [x * (1 + 1e-5 * torch.randn(x.shape, generator=generator)) for x in inputs]
            noise = max(noise, unmatched(answer_of(model, stirred), answer))
        if best is None or noise < best["noise"]:
            best = {"noise": noise, **{f"in {i}": x.numpy() for i, x in enumerate(inputs)}}
            best |= {f"out {name}": value for name, value in answer.items()}
        if noise == 0:
            break
    if best is not None:
        np.savez(cache, **best)
    with np.load(cache) as saved:
        values = dict(saved)
    inputs = [value for key, value in values.items() if key.startswith("in ")]
    answer = {key.removeprefix("out "): value for key, value in values.items() if key.startswith("out ")}
    return inputs, answer, float(values["noise"])


def check(folder: Path, wanted: int | None, *, detector: bool) -> Json:
    """What ONNX Runtime computes against PyTorch, on inputs of our own, and the opset in the file."""
    path = folder / "out" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    opset = max(o.version for o in onnx.load(path, load_external_data=False).opset_import if not o.domain)
    session = onnxruntime.InferenceSession(path, onnxruntime.SessionOptions(), providers=["CPUExecutionProvider"])
    model = torch.load(folder / "pickle", weights_only=False)
    shapes = [value.shape for value in session.get_inputs()]
    found: Json = {"opset": opset, "checked": [], "worst": 0.0}
    for batch, sizes in ((1, (224, 256)), (3, (192, 320))):
        free = iter(sizes * len(shapes))
        dims = [[n if isinstance(n, int) else next(free) if i else batch for i, n in enumerate(s)] for s in shapes]
        cache = folder / f"{batch}-{dims}.npz".replace(" ", "")
        inputs, expected, noise = stable_answer(model, dims, 100 + batch, cache, detector=detector)
        actual = session.run(None, {v.name: x for v, x in zip(session.get_inputs(), inputs, strict=True)})
        names = [output.name for output in session.get_outputs()]
        if detector:
            gaps = [max(unmatched(dict(zip(names, actual, strict=True)), expected) - 2 * noise, 0.0)]
        else:
            gaps = [distance(a, e) for a, e in zip(actual, expected.values(), strict=True)]
        first = next(iter(expected.values()))
        found |= {"worst": max(found["worst"], *gaps), "signal": distance(first[-1:], first[:1])}
        shapes_seen = [(a.shape, e.shape) for a, e in zip(actual, expected.values(), strict=True)]
        found["checked"].append([dims, shapes_seen, gaps, noise])
    return {**found, "status": "wrong" if found["worst"] > 1e-3 else "ok" if wanted in (None, opset) else "opset"}


def run_job(product: Any, family: str, name: str, column: str, folder: Path) -> Json:
    """Save, convert and check one model; returns its row."""
    form, opset, axes = re.fullmatch(r"(\w+)@?(\d*) ?(.*)", column).groups()  # type: ignore[union-attr]
    folder.mkdir(parents=True, exist_ok=True)
    row = {} if (folder / form).exists() else apart(prepare, family, name, form, folder)
    arguments = ["-i", str(folder / form), "-o", str(folder / "out" / "model.onnx"), "--json"]
    arguments += ["--dynamic-axes", axes] if axes else ["--static"] if family == "detection" else []
    arguments += ["--opset", opset] if opset == "25" else []
    arguments += ["--input-shape", *["1,3,224,224"] * 2] if "raft" in name else []  # the product asks for them
    if form == "state_dict":
        arguments += ["--model-class", name, "--model-args", json.dumps(ARGUMENTS.get(name, {}))]
    row = row or apart(convert, product, arguments, folder)
    if "status" not in row:
        row |= apart(functools.partial(check, detector=family == "detection"), folder, int(opset) if opset else None)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return row


HEAD = """# Coverage sweep
`python tests/sweeps/coverage.py`, one conversion at a time on one of {cores} shared cores. {versions}.
Cells: state, opset (exporter, largest difference relative to the output's largest value, seconds). ok: right on inputs
of the sweep's own, at batch 1 and 3 where it is free; opset: right, but not the opset expected; wrong: differs from
PyTorch; failed: the product's exit code; timeout: over {limit} s; sweep: the input could not be made. All of
torchvision's list_models() are here; quantized_* as it builds them, in float: their int8 form (quantize=True) holds
weights that only PyTorch's kernels take, and is refused. Detectors resize to 320 pixels instead of 800; their figure is
the share of detections without a partner, beyond twice what rounding leaves without one in PyTorch itself; the last
of 100, 200 or 300 may be another one of the same score.
"""


def cell(row: Json) -> str:
    """One table cell."""
    if "opset" not in row:
        return f"**{row['status']}** {row.get('code', '')}" if row else "not run"
    return f"{row['status']} {row['opset']} ({row['exporter']}, {row['worst']:.0e}, {row['seconds']:.0f} s)"


def render(rows: Json) -> str:
    """The text of coverage.md."""
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, timm, onnx, onnxruntime))
    lines = [HEAD.format(cores=os.cpu_count(), versions=versions, limit=LIMIT)]
    tables, notes = [], ["\n## What the product said (failures, other opsets, warnings)\n"]
    lines += [f"| family | models | column | {' | '.join(STATES)} |", "|---" * (len(STATES) + 3) + "|"]
    for family, columns in COLUMNS.items():
        tables += [f"\n## {family}\n", f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        table = {name: rows.get(f"{family}/{name}", {}) for name in sorted(NAMES[family])}
        for name, row in table.items():
            tables.append(f"| {name} | {' | '.join(cell(row.get(column, {})) for column in columns)} |")
            told = {c: r["told"] or "differs" for c, r in row.items() if r["told"] or r["status"] != "ok"}
            for text in dict.fromkeys(told.values()):
                notes.append(f"- {family}/{name} ({', '.join(c for c in told if told[c] == text)}): {text}")  # noqa: PERF401  (short)
        for column in columns:
            seen = [row.get(column, {}).get("status", "not run") for row in table.values()]
            lines.append(f"| {family} | {len(seen)} | {column} | {' | '.join(str(seen.count(s)) for s in STATES)} |")
    return "\n".join([*lines, *tables, *notes, ""])


def main() -> int:
    """Run what is asked for; returns 1 where something is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=(*COLUMNS, "all"), default="all")
    add("--only", nargs="+", metavar="NAME", help="these models")
    add("--columns", nargs="+", metavar="NAME", help="these columns, such as pickle@14")
    add("--jobs", type=int, choices=(1,), help="conversions at a time")
    add("--resume", action="store_true", help="leave out what coverage.json has")
    add("--retry", action="store_true", help="as --resume, but what is not ok is run again")
    add("--product", type=Path, default=ROOT, help="folder of the convert.py to test")
    add("--work", type=Path, default=Path("/tmp/pt2onnx-sweep"), help="scratch folder")
    add("--results", type=Path, default=REPORTS / "coverage.json")
    options = parser.parse_args()
    product = load_product(options.product.resolve())
    rows: Json = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    jobs = [(f, n, c) for f in COLUMNS if options.family in ("all", f) for n in NAMES[f] for c in COLUMNS[f]]
    jobs = sorted(
        (job for job in jobs if job[1] in (options.only or job) and job[2] in (options.columns or job)), key=turn
    )
    for index, (family, name, column) in enumerate(jobs):
        folder, row = options.work.resolve() / family / name, rows.setdefault(f"{family}/{name}", {})
        if not (column in row and (options.resume or (options.retry and row[column]["status"] == "ok"))):
            row[column] = run_job(product, family, name, column, folder)
            options.results.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            options.results.with_suffix(".md").write_text(render(rows), encoding="utf-8")
            print(time.strftime("%T"), f"{family}/{name}", column, cell(row[column]), row[column]["told"], flush=True)
        if index + 1 == len(jobs) or jobs[index + 1][:2] != (family, name):
            shutil.rmtree(folder, ignore_errors=True)
    return int(any(row["status"] != "ok" for columns in rows.values() for row in columns.values()))


if __name__ == "__main__":
    raise SystemExit(main())
