"""Hugging Face folders: the whole command against transformers' own exporter, and the speed of the two graphs.

    python tests/benchmarks/huggingface.py [--runs 1] [--models bert-base qwen2-0.5b]

Models with random weights, in float32. transformers.exporters.OnnxExporter writes the graph that is nearest to the
product's: of a decoder one that takes a cache; it checks nothing. Each runs in a process of its own, in turn. Latency:
the median of some runs in ONNX Runtime, at batch 1: 128 tokens, then (of a decoder) one more with these in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from overhead import CONVERT, Cost, measure

MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
name, target = sys.argv[1:]
if name == "bert-base":
    model = transformers.BertForMaskedLM(transformers.BertConfig())
else:  # the shape of Qwen2-0.5B
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        max_window_layers=24, tie_word_embeddings=True))
model.eval().save_pretrained(target)
"""
EXPORTER = """
import sys, torch, transformers
from transformers.exporters import OnnxExporter
from transformers.exporters.configs import OnnxConfig
source, target = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(source)
model = getattr(transformers, config.architectures[0]).from_pretrained(source, dtype=torch.float32).eval()
given = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
if model.can_generate():
    cache = transformers.DynamicCache(config=config)
    size = (2, config.num_key_value_heads, 5, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(size), torch.zeros(size), layer)
    given |= {"attention_mask": torch.ones(2, 8, dtype=torch.int64), "past_key_values": cache}
    given["position_ids"] = torch.arange(5, 8).repeat(2, 1)
OnnxExporter().export(model, given, OnnxConfig(dynamic=True)).save_pretrained(target)
"""
TOKENS = 128


def latency(session: Any, config: Any, past: int, tokens: int) -> float:
    """The median time of a call in milliseconds."""
    given: dict[str, Any] = {}
    for value in session.get_inputs():
        if "float" in value.type:  # of the cache: batch, heads, past, size
            size = config["hidden_size"] // config["num_attention_heads"]
            given[value.name] = np.zeros((1, config["num_key_value_heads"], past, size), np.float32)
        elif value.name == "position_ids":
            given[value.name] = np.arange(past, past + tokens)[None]
        else:
            given[value.name] = np.ones((1, tokens + past * ("mask" in value.name)), np.int64)
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        session.run(None, given)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def row(way: str, costs: list[Cost], source: Path, target: Path) -> str:
    """One line of the table."""
    session = onnxruntime.InferenceSession(next(target.rglob("model.onnx")), providers=["CPUExecutionProvider"])
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    decoder = any("past" in value.name for value in session.get_inputs())
    prompt = latency(session, config, 0, TOKENS)
    step = f"{latency(session, config, TOKENS, 1):.0f} ms" if decoder else ""
    written = sum(path.stat().st_size for path in target.rglob("*.onnx*")) / 1e6
    cost = Cost(*map(statistics.median, zip(*costs, strict=True)))
    figures = f"{cost.seconds:.1f} s | {cost.megabytes:.0f} MB | {written:.0f} MB | {prompt:.0f} ms | {step}"
    return f"| {source.name} | {way} | {figures} |"


def compare(name: str, runs: int, folder: Path) -> None:
    """Print two rows of the table."""
    source = folder / name
    subprocess.run([sys.executable, "-c", MAKE, name, str(source)], check=True, stderr=subprocess.DEVNULL)
    ways = {
        "transformers' exporter": [sys.executable, "-c", EXPORTER, str(source), str(folder / "theirs")],
        "pt2onnx": [sys.executable, str(CONVERT), "-i", str(source), "-o", str(folder / "ours")],
    }
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, command in ways.items():
            costs[way].append(measure(command))
    for way, command in ways.items():
        print(row(way, costs[way], source, Path(command[-1])), flush=True)
    mine, base = (Cost(*map(statistics.median, zip(*costs[way], strict=True))) for way in ("pt2onnx", next(iter(ways))))
    ratios = f"{mine.seconds / base.seconds:.2f} | {mine.megabytes / base.megabytes:.2f}"
    print(f"| {name} | ratio | {ratios} | | | |", flush=True)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["bert-base", "qwen2-0.5b"])
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {options.runs} runs\n")
    print(f"| model | way | time | memory | written | {TOKENS} tokens | one more |\n|---|---|---|---|---|---|---|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            compare(name, options.runs, Path(folder))


if __name__ == "__main__":
    main()
