"""Hugging Face folders through the command line, judged by ONNX Runtime against transformers' own answers.

The judge is judge.py: inputs of its own at three shapes, with padding, and text generated through the
graph's cache against model.generate. The sweep itself runs over every tiny model; here are those of different kinds.
"""

import json
from pathlib import Path
from typing import Any

import judge
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models
import torch
import transformers
from forked import convert_folder, run_forked
from helpers import Result, check_error, edit_config

GENERATORS = {
    "llama": "grouped-query attention, rotary embeddings",
    "gpt2": "tied embeddings, learned positions",
    "gemma2": "a sliding window in every second layer",
    "mixtral": "a mixture of experts",
    "bloom": "positions from the attention mask",
    "mamba": "a state space",
    "lfm2": "convolutions, and attention in every second layer",
    "qwen3_next": "linear attention and experts",
    "t5": "an encoder and a decoder",
    "whisper": "an encoder of sounds",
    "moonshine": "an encoder whose answer is more than its states",
    "llama4_text": "truth values that are added up",
    "switch_transformers": "a loop over the experts that are needed",
    "prophetnet": "int() of a length, one token at a time",
    "led": "chunks of the text, padded to the window",
}
OTHERS = {
    "bert": "fill-mask",
    "vit": "an image of one size",
    "segformer": "an image of any size",
    "clip": "two towers",
    "wav2vec2": "a sound of any length",
    "wav2vec2-conformer": "embeddings kept for the last length",
    "sew": "padding that only some lengths need, the smaller of two sizes",
    "longformer": "strides that follow from the length",
    "deberta": "a tensor made of a length",
    "dinov3_vit": "a branch that returns what lies outside of it",
}


def check(name: str, folder: Path) -> None:
    """The sweep's verdict on folder/out."""
    row = judge.check(name, folder)
    assert row["status"] == "ok", row


def answers(path: Path, **given: Any) -> dict[str, Any]:
    """What the graph returns for those of its inputs that are given."""
    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_outputs()]
    taken = {value.name: given[value.name] for value in session.get_inputs() if value.name in given}
    return dict(zip(names, session.run(None, taken), strict=True))


@pytest.mark.parametrize("name", [*GENERATORS, *OTHERS])
def test_each_kind(tmp_path: Path, name: str) -> None:
    """Opset 14, the folder's files beside the graph, transformers' answers at other shapes."""
    tiny_models.make(name, tmp_path / "in")
    convert_folder(tmp_path)
    check(name, tmp_path)


def test_beyond_the_window(tmp_path: Path) -> None:
    """Local attention is verified with a text that is longer than its window of 8, too."""
    tiny_models.make("longformer", tmp_path / "in")
    assert "input_ids:1x11" in convert_folder(tmp_path)


@pytest.mark.parametrize(
    "way",
    [{"shards": True}, {"safe": False}, {"safe": False, "shards": True}, {"dtype": "bfloat16"}, {"dtype": "float16"}],
    ids=str,
)
def test_how_weights_are_stored(tmp_path: Path, way: dict[str, Any]) -> None:
    """Shards, pickles and half precision give a float32 graph of the same numbers."""
    tiny_models.make("llama", tmp_path / "in", **way)
    convert_folder(tmp_path)
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert {tensor.data_type for tensor in graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
    given: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 9), np.int64)}
    given["position_ids"] = np.arange(9)[None]
    for value in graph.input:
        if value.name.startswith("past_key_values"):
            sizes = value.type.tensor_type.shape.dim
            given[value.name] = np.zeros((1, sizes[1].dim_value, 0, sizes[3].dim_value), np.float32)
    actual = answers(tmp_path / "out" / "model.onnx", **given)["logits"]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_the_users_own_texts(tmp_path: Path) -> None:
    """--verify-data: samples of other sizes are compared and counted; one that lacks an input is told what it lacks."""
    tiny_models.make("bert", tmp_path / "in")
    (tmp_path / "texts").mkdir()
    for length in (4, 9):
        ids = np.arange(3, 3 + length)[None]
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        np.savez(tmp_path / "texts" / f"{length}.npz", **given)

    def convert(folder: Path, samples: str) -> Result:
        target = f"{folder.parent}/out/"
        return run_forked("-i", str(folder), "-o", target, "--verify-data", str(tmp_path / samples))

    said = convert(tmp_path / "in", "texts")
    assert said.code == 0, said.err
    assert "repeated values, sample 4.npz, sample 9.npz" in said.err
    assert "and with 2 samples of yours" in said.err
    check("bert", tmp_path)
    np.savez(tmp_path / "a.npz", input_ids=ids)
    lacks = "a.npz has input_ids, the model takes input_ids, attention_mask, token_type_ids"
    check_error(convert(tmp_path / "in", "a.npz"), 2, lacks)
    tiny_models.make("t5", tmp_path / "several" / "in")
    check_error(convert(tmp_path / "several" / "in", "a.npz"), 2, "--verify-data is for one graph")


def test_images_of_bytes(tmp_path: Path) -> None:
    """An image model is verified with the values of images that nobody scaled, too."""
    tiny_models.make("vit", tmp_path / "in")
    assert "with zeros, negative values, 0 to 255, large values" in convert_folder(tmp_path)


def test_half_precision_on_request(tmp_path: Path) -> None:
    """--dtype fp16: weights and logits are float16, near float32's."""
    tiny_models.make("bert", tmp_path / "in")
    convert_folder(tmp_path, "--dtype", "fp16")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    large = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 64}
    assert large == {onnx.TensorProto.FLOAT16}
    given = {"input_ids": np.arange(3, 12)[None], "attention_mask": np.ones((1, 9), np.int64)}
    given["token_type_ids"] = np.zeros((1, 9), np.int64)
    actual = answers(tmp_path / "out" / "model.onnx", **given)["logits"]
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "in").eval()
    with torch.no_grad():
        expected = model(**{key: torch.from_numpy(value) for key, value in given.items()}).logits.numpy()
    assert actual.dtype == np.float16
    np.testing.assert_allclose(actual, expected, atol=2e-2 * np.abs(expected).max())


def test_decoders_in_half_precision(tmp_path: Path) -> None:
    """--dtype fp16 of a decoder: padded tokens, for which PyTorch and ONNX Runtime round differently, stop nothing."""
    tiny_models.make("llama", tmp_path / "in")
    convert_folder(tmp_path, "--dtype", "fp16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    ids, mask = np.arange(3, 21).reshape(2, 9), np.ones((2, 9), np.int64)
    mask[1, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(-1) - 1, 0)}
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()
    for layer in range(model.config.num_hidden_layers):
        for kind in ("key", "value"):
            given[f"past_key_values.{layer}.{kind}"] = np.zeros((2, 2, 0, 8), np.float16)
    actual = answers(tmp_path / "out" / "model.onnx", **given)["logits"]
    assert actual.dtype == np.float16
    np.testing.assert_allclose(actual[mask == 1], expected[mask == 1], atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize("options", [["--no-cache"], ["--task", "feature-extraction"]], ids=" ".join)
@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_states_without_cache(tmp_path: Path, name: str, options: list[str]) -> None:
    """Models with states read a whole text, padded on either side, without a cache: transformers' answers."""
    tiny_models.make(name, tmp_path / "in")
    convert_folder(tmp_path, *options)
    auto = transformers.AutoModel if "--task" in options else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "in").eval()
    ids, mask = np.arange(3, 36).reshape(3, 11), np.ones((3, 11), np.int64)
    mask[1, :4] = mask[2, 6:] = 0
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        expected = next(iter(model(**given).values())).numpy()
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    found = answers(tmp_path / "out" / "model.onnx", input_ids=ids, attention_mask=mask, position_ids=positions)
    actual = next(iter(found.values()))
    assert len(found) == 1
    np.testing.assert_allclose(actual[mask == 1], expected[mask == 1], atol=1e-4 * np.abs(expected).max())


def test_bfloat16_has_no_judge(tmp_path: Path) -> None:
    """ONNX Runtime lacks bfloat16 on the CPU: exit 2 before the work begins, and a graph on request."""
    tiny_models.make("llama", tmp_path / "in", dtype="bfloat16")
    assert "--dtype fp16" in convert_folder(tmp_path, "--dtype", "bf16", code=2)
    convert_folder(tmp_path, "--dtype", "bf16", "--no-verify")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert onnx.TensorProto.BFLOAT16 in {tensor.data_type for tensor in graph.initializer}
    onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)


def test_without_cache(tmp_path: Path) -> None:
    """--no-cache: neither past nor present."""
    tiny_models.make("llama", tmp_path / "in")
    convert_folder(tmp_path, "--no-cache")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert {value.name for value in graph.input} <= {"input_ids", "attention_mask", "position_ids"}
    assert [value.name for value in graph.output] == ["logits"]


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_decoders_of_one_size(tmp_path: Path, name: str) -> None:
    """--static: the traced sizes alone, PyTorch's answer for other numbers."""
    tiny_models.make(name, tmp_path / "in")
    convert_folder(tmp_path, "--static")
    path = tmp_path / "out" / "model.onnx"
    sizes = {value.name: value.shape for value in onnxruntime.InferenceSession(str(path)).get_inputs()}
    length, total = sizes["input_ids"][1], sizes["attention_mask"][1]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    ids = torch.arange(5, 5 + 2 * total).view(2, total)
    with torch.no_grad():
        before = model(input_ids=ids[:, : total - length], use_cache=True).past_key_values
        given = {name: value.numpy().copy() for name, value in past_of(before).items()}
        expected = model(input_ids=ids, use_cache=True).logits[:, -length:].numpy()
    given |= {"input_ids": ids[:, -length:].numpy(), "attention_mask": np.ones((2, total), np.int64)}
    given["position_ids"] = np.arange(total - length, total)[None].repeat(2, 0)
    actual = answers(path, **given)["logits"]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def past_of(cache: Any) -> dict[str, torch.Tensor]:
    """What transformers keeps, under the names of the graph's inputs."""
    found = {}
    for number, layer in enumerate(cache.layers):
        if hasattr(layer, "conv_states"):
            found[f"past_conv.{number}"] = layer.conv_states[0]
        else:
            found[f"past_key_values.{number}.key"], found[f"past_key_values.{number}.value"] = layer.keys, layer.values
    return found


def test_models_that_disagree_with_themselves(tmp_path: Path) -> None:
    """zamba2 with short time steps: transformers' answers for a text and for its tokens differ, and that is told."""
    tiny_models.make("zamba2", tmp_path / "in")
    assert "transformers itself gives two answers" in convert_folder(tmp_path, code=6)


def test_encoder_decoders_have_a_cache(tmp_path: Path) -> None:
    """Options that would take it away are errors; a T5 that transformers cannot generate with is told as that."""
    tiny_models.make("t5", tmp_path / "in")
    for option in ("--static", "--no-cache"):
        assert f"leave {option} out" in convert_folder(tmp_path, option, code=2)
    config = transformers.T5Config.from_pretrained(tmp_path / "in", num_layers=2, num_decoder_layers=3)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "in")
    assert "PyTorch itself cannot generate" in convert_folder(tmp_path, code=6)


def test_layout_of_transformersjs(tmp_path: Path) -> None:
    """The graph lies in onnx/, the configuration above it."""
    tiny_models.make("bert", tmp_path / "in")
    convert_folder(tmp_path, "--layout", "transformersjs", "-o", str(tmp_path / "out"))
    assert (tmp_path / "out" / "onnx" / "model.onnx").exists()
    assert (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_another_task(tmp_path: Path) -> None:
    """A task that the type cannot do lists those that it can; one that lacks trained weights names them."""
    tiny_models.make("bert", tmp_path / "in")
    told = convert_folder(tmp_path, "--task", "image-classification", code=2)
    assert "fill-mask" in told
    assert "question-answering" in told
    told = convert_folder(tmp_path, "--task", "question-answering", code=3)
    assert "qa_outputs" in told
    convert_folder(tmp_path, "--task", "feature-extraction")
    assert "last_hidden_state" in [v.name for v in onnx.load(tmp_path / "out" / "model.onnx").graph.output]


@pytest.mark.parametrize("name", ["bert-feature-extraction", "t5-feature-extraction"])
def test_a_model_without_a_head(tmp_path: Path, name: str) -> None:
    """Its class is that of feature-extraction; a decoder gets ids of its own."""
    tiny_models.make(name, tmp_path / "in")
    assert "task: feature-extraction" in convert_folder(tmp_path)
    check(name, tmp_path)


@pytest.mark.parametrize(
    ("damage", "code", "word"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), 3, "no weights"),
        (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"), 3, "git lfs pull"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), 3, "config.json is damaged"),
        (lambda folder: edit_config(folder, hidden_size=64), 3, "do not belong together"),
        (lambda folder: edit_config(folder, model_type="unheard_of"), 3, "unheard_of"),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}), 4, "gptq"),
        (lambda folder: (folder / "config.json").unlink(), 3, "model.safetensors"),
    ],
    ids=["no weights", "Git LFS", "damaged config", "other shapes", "unknown type", "quantised", "no config"],
)
def test_bad_folders(tmp_path: Path, damage: Any, code: int, word: str) -> None:
    """One [ERROR] line that names it, and nothing written."""
    tiny_models.make("bert", tmp_path / "in")
    damage(tmp_path / "in")
    assert word in convert_folder(tmp_path, code=code)


def test_code_of_the_folder(tmp_path: Path) -> None:
    """Where only the folder's own code says what the model is: exit code 4, and the file is named and not run."""
    tiny_models.make("bert", tmp_path / "in")
    (tmp_path / "in" / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    content = json.loads((tmp_path / "in" / "config.json").read_text(encoding="utf-8"))
    del content["model_type"]
    content["auto_map"] = {"AutoModel": "modeling_own.Model", "AutoConfig": "modeling_own.Config"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(content), encoding="utf-8")
    told = convert_folder(tmp_path, code=4)
    assert "auto_map" in told
    assert "--trust-remote-code" in told
    assert not (tmp_path / "ran").exists()


def test_truncated_shard(tmp_path: Path) -> None:
    """A shard that a download left half done, and one that is missing."""
    tiny_models.make("llama", tmp_path / "in", shards=True)
    shard = max((tmp_path / "in").glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    told = convert_folder(tmp_path, code=3)
    assert shard.name in told
    assert f"of {len(content)} bytes, {len(content) // 2} of which are there" in told
    shard.unlink()
    assert shard.name in convert_folder(tmp_path, code=3)
    (tmp_path / "in" / "model.safetensors.index.json").unlink()
    told = convert_folder(tmp_path, code=3)
    assert "nor the index of its shards" in told
    assert "load" not in told.partition("[ERROR]")[0]
