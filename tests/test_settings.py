"""What files may say of a model: arguments of builders, attributes of configurations, sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny_models
import torch
import transformers
from torch import nn

import convert as product
from convert import Verdict

HARMLESS = {
    "num_classes": 10, "in_chans": 1, "img_size": [224, 224], "depths": (1, 1, 2), "embed_dim": 96, "mlp_ratio": 4.0,
    "qkv_bias": True, "drop_path_rate": 0.1, "drop_rate": 0, "global_pool": "avg", "act_layer": "gelu", "d_model": 8,
    "hidden_size": 8, "n_layers": 2, "dropout": 0.5, "bidirectional": False, "kernel_size": 3, "stride": 2, "nhead": 4,
    "class_token": None, "out_indices": [[0, 1], [2]], "features_only": True, "window_size": 7, "groups": 32,
}  # fmt: skip
HARMFUL = {
    "pretrained": True, "weights": "DEFAULT", "checkpoint_path": "/x", "cache_dir": "/x", "url": "http://x",
    "file": "x",
    "pretrained_cfg": {"url": "x"}, "weights_backbone": "DEFAULT", "device": "cuda", "dtype": "float16",
    "hf_hub_id": "x",
    "path": 1, "repo": "x", "model_dir": "x", "norm_fn": "eval", "callable": 1, "block_cls": "os", "state_dict": "x",
    "num_classes_": 5, "lr": 0.1, "": 1, 5: 1, ("num", "classes"): 2, "num_" * 20 + "classes": 1,
}  # fmt: skip
BAD_VALUES = [
    "a/b", "file:x", "a.b", "x" * 41, "\n", "../x", math.nan, math.inf, 2**25, -(2**60), {"a": 1}, b"x", [[[[1]]]],
    [{"a": 1}], ["a/b"], object(), print, torch.zeros(1), 1j, range(3), [0] * 1001,
]  # fmt: skip


def test_architecture_arguments(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names made of a network's words with plain values, whatever else is there; the others are told in one line."""
    told: list[str] = []
    monkeypatch.setattr(product.LOG, "info", told.append)
    assert product.architecture_arguments(HARMLESS, "x") == HARMLESS
    assert not told
    assert product.architecture_arguments({**HARMLESS, **HARMFUL}, "the hyper_parameters") == HARMLESS
    assert len(told) == 1
    assert told[0].startswith("the hyper_parameters: not used")
    assert "pretrained, weights, checkpoint_path" in told[0]
    assert not capfd.readouterr().err


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: repr(value)[:20])
def test_bad_arguments(value: object) -> None:
    """A good name does not help a value that is no number, flag or short word."""
    assert not product.is_architecture_argument("num_classes", value)


def build_many(count: int) -> nn.Module:
    """A model of many layers."""
    return nn.Sequential(*(nn.Linear(1, 1) for _ in range(count)))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: build_many(10**6), "more than 1080 parameters, and its weights are 10 tensors"),
        (lambda: nn.Sequential(*(nn.Sequential(nn.ReLU()) for _ in range(10**6))), "more than 10400 modules"),
        (lambda: nn.Linear(2**20, 2**20), "of memory beside its weights"),
        (lambda: [0] * 10**10, "memory beside its weights"),
        (lambda: nn.ParameterList([torch.zeros(0)] * 10**7), "more than 1080 parameters"),
    ],
    ids=["parameters", "modules", "tensor", "list", "same"],
)
def test_bounded_build(tmp_path: Path, build: Any, words: str) -> None:
    """Whatever the settings are called: the end comes soon, with what was too much, and nothing stays behind."""

    def action() -> int:
        try:
            with product.bounded_build(10, 1000):
                build()
        except product.DamagedFileError as error:
            build_many(1000)  # neither a hook nor a limit is left
            bytearray(2 << 30)
            return 3 if words in str(error) else 71
        return 0

    outcome = forked.in_child(action, tmp_path)
    assert outcome.code == 3, outcome
    assert outcome.kilobytes - forked.idle_memory() < 2_600_000, outcome  # of which 2 GB are the line above


def test_an_error_inside_a_build_passes() -> None:
    """What is wrong otherwise stays what it is."""
    with pytest.raises(ZeroDivisionError), product.bounded_build(10, 1000):
        build_many(1 // 0)


CONFIG = transformers.BertConfig
ATTRIBUTES = [
    (CONFIG, "hidden_size", 8, Verdict.KEEP),
    (CONFIG, "_name_or_path", "some/model", Verdict.KEEP),
    (CONFIG, "num_labels", 3, Verdict.KEEP),
    (CONFIG, "sliding_window", 8, Verdict.KEEP),  # not BERT's, but the code that all models share reads it
    (CONFIG, "summary_type", "first", Verdict.DROP),  # XLNet's
    (CONFIG, "unknown", {"a": [1, 2.5, "word", None]}, Verdict.DROP),
    (CONFIG, "id2label", {0: "a/b"}, Verdict.KEEP),
    (CONFIG, "unknown", object(), Verdict.DROP),
    (CONFIG, "to_dict", 5, Verdict.DROP),
    (CONFIG, "save_pretrained", "x", Verdict.DROP),
    (CONFIG, "attribute_map", {"a": "b"}, Verdict.DROP),
    (CONFIG, "base_model_tp_plan", {"a": "colwise"}, Verdict.DROP),
    (CONFIG, "extra_files", ["x"], Verdict.DROP),
    (CONFIG, "transformers_weights", "x.safetensors", Verdict.DROP),
    (CONFIG, "index_path", "x", Verdict.DROP),
    (CONFIG, "use_kernels", True, Verdict.DROP),
    (CONFIG, "compile_config", {"backend": "x"}, Verdict.DROP),
    (CONFIG, "auto_map", {"AutoModel": "x.Y"}, Verdict.DROP),
    (CONFIG, "quantization_config", {"quant_method": "x"}, Verdict.REFUSE),
    (CONFIG, "quantization_config", None, Verdict.KEEP),
    (CONFIG, "_attn_implementation_internal", "sdpa", Verdict.KEEP),
    (CONFIG, "_attn_implementation_internal", "a/b", Verdict.REFUSE),
    (CONFIG, "attn_implementation", {"": "a/b"}, Verdict.REFUSE),
    (CONFIG, "dtype", torch.float16, Verdict.KEEP),
    (CONFIG, "torch_dtype", "bfloat16", Verdict.KEEP),
    (CONFIG, "torch_dtype", "load", Verdict.REFUSE),
    (transformers.ResNetConfig, "out_features", ["stage1"], Verdict.KEEP),
    (transformers.GenerationConfig, "max_new_tokens", 5, Verdict.KEEP),
    (transformers.GenerationConfig, "cache_implementation", "static", Verdict.KEEP),
    (transformers.GenerationConfig, "cache_implementation", "quantized", Verdict.DROP),
    (transformers.GenerationConfig, "custom_generate", "a/b", Verdict.DROP),
    (transformers.GenerationConfig, "generate", print, Verdict.DROP),
]


@pytest.mark.parametrize(("cls", "name", "value", "verdict"), ATTRIBUTES)
def test_config_attributes(cls: type, name: str, value: object, verdict: Verdict) -> None:
    """What the class declares or its models read, and nothing that acts."""
    assert product.config_attribute(cls, name, value) is verdict


SWITCHES = ("_use_kernels", "use_kernels", "kernel_config", "hf_device_map", "hf_quantizer", "is_quantized",
            "_auto_class", "quantization_method", "_compiled_call", "_last_compile_config", "generate",
            "anything")  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_of_models(name: str) -> None:
    """A model in a pickle has the attributes that its constructor sets, and no switches that later calls set."""
    assert not product.keeps_attribute(transformers.BertModel, name, 1)
    assert product.keeps_attribute(transformers.BertModel, "embeddings", None)


@pytest.mark.parametrize("name", ["bert", "llama", "whisper", "detr", "t5", "clip", "mamba2", "gemma3_text"])
def test_honest_attributes(name: str) -> None:
    """Nothing of a model as transformers makes it is left out, but marks of how it was loaded."""
    for module in tiny_models.build(name).modules():
        parts = (module, getattr(module, "config", None), getattr(module, "generation_config", None))
        for part in parts if isinstance(module, transformers.PreTrainedModel) else ():
            for key, value in vars(part).items() if part is not None else ():
                kept = product.keeps_attribute(type(part), key, value)
                assert kept or product.LOADING_MARKS.fullmatch(key), (type(part), key)


def pickled(**config: object) -> nn.Module:
    """A module as a pickle may bring it."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    module.pretrained_cfg = config
    return module


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "value",
    [
        CYCLE,
        {1: 2, "a": 3},
        "abc",
        -5,
        [3, -1, 5],
        [3, math.nan, 5],
        [3.5, 4, 5],
        [3, 10**9, 10**9],
        [True] * 3,
        7**99,
        [],
    ],
    ids=lambda value: repr(value)[:20],
)
def test_preprocessing_of_anything(value: object) -> None:
    """What a pickle says of images is plain numbers or left out, and can be written as metadata."""
    known = product.preprocessing(pickled(input_size=value, mean=value, std=value), None)
    assert known == product.Preprocessing()
    known = product.preprocessing(pickled(input_size=(3, 32, 32), mean=value, std=[0.5, 0.5, 0.5]), None)
    assert known.size == (3, 32, 32)
    assert json.loads(known.metadata())["std"] == [0.5, 0.5, 0.5]
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    module.image_size = value
    assert not list(product.library_guess(module, product.Preprocessing()))
