"""LoRA adapters through the command line, judged by PyTorch on the unmerged model.

The judge adds scale * B(A(x)) to the layers' outputs, by hooks of its own or as peft does, and never sees the product's
merged weights.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_sweep
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_huggingface import convert
from torch import nn
from transformers.pytorch_utils import Conv1D

RANK, ALPHA = 4, 6
Tensors = dict[str, torch.Tensor]


def drawn(*shape: int) -> torch.Tensor:
    """Numbers that change a tiny model's answers clearly."""
    return torch.randn(*shape) * 0.4


def save_adapter(folder: Path, tensors: Tensors, **settings: Any) -> None:
    """The two files of an adapter, whose base lies beside its folder."""
    folder.mkdir(exist_ok=True)
    known = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "../base"}
    (folder / "adapter_config.json").write_text(json.dumps(known | settings), encoding="utf-8")
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def make_layers(model: nn.Module, names: str, rank: int = RANK) -> Tensors:
    """Matrices of LoRA for the layers whose last name is one of `names`."""
    torch.manual_seed(1)
    made = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] not in names.split():
            continue
        if isinstance(layer, nn.Embedding):
            made[f"{name}.lora_embedding_A"] = drawn(rank, layer.num_embeddings)
            made[f"{name}.lora_embedding_B"] = drawn(layer.embedding_dim, rank)
        elif isinstance(layer, nn.Conv2d):
            made[f"{name}.lora_A.weight"] = drawn(rank, *layer.weight.shape[1:])
            made[f"{name}.lora_B.weight"] = drawn(layer.out_channels, rank, 1, 1)
        else:
            inputs, outputs = reversed(layer.weight.shape) if isinstance(layer, nn.Linear) else layer.weight.shape
            made[f"{name}.lora_A.weight"] = drawn(rank, inputs)
            made[f"{name}.lora_B.weight"] = drawn(outputs, rank)
    assert made
    return made


def unmerged(model: nn.Module, tensors: Tensors, scale: Callable[[str], float]) -> nn.Module:
    """`model` whose layers add what LoRA's definition says to their outputs."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and f"{name}.lora_embedding_A" in tensors:
            a, b = tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"]

            def add(_: Any, given: Any, y: Any, a: Any = a, b: Any = b, s: float = scale(name)) -> Any:
                return y + s * (a.T[given[0]] @ b.T)

        elif f"{name}.lora_A.weight" in tensors:
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            function: Any = nn.functional.linear
            if isinstance(layer, nn.Conv2d):
                function = nn.functional.conv2d
                strides = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}

                def add(_: Any, given: Any, y: Any, a: Any = a, b: Any = b, s: float = scale(name)) -> Any:
                    return y + s * nn.functional.conv2d(nn.functional.conv2d(given[0], a, **strides), b)

            else:

                def add(_: Any, given: Any, y: Any, a: Any = a, b: Any = b, s: float = scale(name)) -> Any:
                    return y + s * nn.functional.linear(nn.functional.linear(given[0], a), b)

        else:
            continue
        layer.register_forward_hook(add)
    return model


def judge(name: str, model: Any, folder: Path) -> None:
    """The graph in folder/out against `model`, which must not answer as its base does."""
    session = huggingface_sweep.open_session(folder / "out" / "model.onnx")
    check = huggingface_sweep.check_calls
    if tiny_models.MODELS[name].task == "text-generation":
        check = huggingface_sweep.check_decoder
    assert check(model, session)["worst"] < huggingface_sweep.TOLERANCE
    base = tiny_models.build(name)
    try:
        changed = check(base, session)["worst"]
    except huggingface_sweep.Unlike:
        return
    assert changed > 10 * huggingface_sweep.TOLERANCE
