"""LoRA adapters through the command line, judged by PyTorch on the model that is not merged.

The judge adds scale * B(A(x)) to what the base's layers return, by hooks that follow the definition, or as peft's own
layers do, and never sees a merged weight.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import judge
import pytest
import tiny_models
import torch
import transformers
from helpers import check_error, lines, run_cli
from safetensors.torch import save_file
from torch import nn

import convert as product

RANK, ALPHA = 4, 6
Tensors = dict[str, torch.Tensor]
Settings = dict[str, Any]


def convert(folder: Path, *options: str, code: int = 0) -> str:
    """Convert folder/in, an adapter, with the base in folder/base; returns what was told."""
    return forked.convert_folder(folder, "--base", str(folder / "base"), *options, code=code)


def save_adapter(folder: Path, tensors: Tensors, **settings: Any) -> None:
    """The two files of an adapter whose base lies beside its folder."""
    folder.mkdir(exist_ok=True)
    known = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "../base"}
    (folder / "adapter_config.json").write_text(json.dumps(known | settings), encoding="utf-8")
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")


def make_parts(model: nn.Module, names: str, rank: Callable[[str], int] = lambda _: RANK) -> Tensors:
    """Matrices of LoRA for the layers whose last name is one of `names`."""
    torch.manual_seed(1)
    made: Tensors = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] not in names.split():
            continue
        r, weight = rank(name), layer.weight
        if isinstance(layer, nn.Embedding):
            made[f"{name}.lora_embedding_A"], made[f"{name}.lora_embedding_B"] = (r, len(weight)), (weight.shape[1], r)
        elif isinstance(layer, nn.Conv2d):
            made[f"{name}.lora_A.weight"] = (r, *weight.shape[1:])
            made[f"{name}.lora_B.weight"] = (len(weight), r, 1, 1)
        else:
            outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else reversed(weight.shape)
            made[f"{name}.lora_A.weight"], made[f"{name}.lora_B.weight"] = (r, inputs), (outputs, r)
    assert made
    return {name: torch.randn(*shape) * 0.4 for name, shape in made.items()}


def product_of(layer: nn.Module, a: torch.Tensor, b: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """B(A(x)) for a layer of this kind."""
    if isinstance(layer, nn.Embedding):
        return lambda x: a.T[x] @ b.T
    if isinstance(layer, nn.Conv2d):
        steps = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        return lambda x: nn.functional.conv2d(nn.functional.conv2d(x, a, **steps), b)
    return lambda x: x @ a.T @ b.T


def adapted(model: nn.Module, parts: Tensors, scale: Callable[[str], float] = lambda _: ALPHA / RANK) -> nn.Module:
    """`model` with layers that add what LoRA's definition says to what they return."""

    def add(more: Any, factor: float, _layer: Any, given: Any, result: Any) -> Any:
        return result + factor * more(given[0])

    for name, layer in model.named_modules():
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if f"{name}.{a}" in parts:
                more = product_of(layer, parts[f"{name}.{a}"], parts[f"{name}.{b}"])
                layer.register_forward_hook(functools.partial(add, more, scale(name)))
    return model


def check_graphs(model: Any, folder: Path, base: Any = None) -> None:
    """The graphs in folder/out answer as `model` does, and not as its `base`."""
    sessions = [judge.open_session(path) for path in sorted((folder / "out").glob("*.onnx"), reverse=True)]
    check = judge.check_pair if len(sessions) > 1 else judge.check_calls
    if len(sessions) == 1 and "logits" in {value.name for value in sessions[0].get_outputs()} and model.can_generate():
        check = judge.check_decoder
    assert check(model, *sessions)["worst"] < judge.TOLERANCE
    if base is not None:
        with contextlib.suppress(judge.Unlike):  # other tokens
            assert check(base, *sessions)["worst"] > 10 * judge.TOLERANCE


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", "q_proj down_proj lm_head"),
        ("gpt2", "c_attn c_proj wte"),  # Conv1D, and an embedding whose weight the head shares
        ("bert", "query word_embeddings"),
        ("vit", "projection"),
        ("resnet", "convolution"),
    ],
)
def test_the_definition(tmp_path: Path, name: str, layers: str) -> None:
    """Linear, Conv1D, Embedding and Conv2d: y = Wx + alpha / r * B(A(x))."""
    tiny_models.make(name, tmp_path / "base")
    parts = make_parts(tiny_models.build(name), layers)
    save_adapter(tmp_path / "in", parts)
    assert f"merged into {len(parts) // 2} layers" in convert(tmp_path)
    check_graphs(adapted(tiny_models.build(name), parts), tmp_path, tiny_models.build(name))


@pytest.mark.parametrize("rooted", [False, True], ids=["over the rank", "over its root"])
def test_ranks_and_scales(tmp_path: Path, rooted: bool) -> None:  # noqa: FBT001
    """rank_pattern and alpha_pattern choose by the layer's name, the first one that fits; use_rslora takes the root."""
    tiny_models.make("llama", tmp_path / "base")
    ranks, alphas = {"layers.0.self_attn.q_proj": 2, ".*down_proj": 3}, {"^model.layers.1.self_attn.q_proj": 9, "0": 5}

    def rank(name: str) -> int:
        return 2 if name.endswith("layers.0.self_attn.q_proj") else 3 if name.endswith("down_proj") else RANK

    def scale(name: str) -> float:
        alpha = 9 if name == "model.layers.1.self_attn.q_proj" else ALPHA
        return alpha / (rank(name) ** 0.5 if rooted else rank(name))

    parts = make_parts(tiny_models.build("llama"), "q_proj down_proj", rank)
    save_adapter(tmp_path / "in", parts, use_rslora=rooted, rank_pattern=ranks, alpha_pattern=alphas)
    convert(tmp_path)
    check_graphs(adapted(tiny_models.build("llama"), parts, scale), tmp_path)


def make_with_peft(folder: Path, model: Any, settings: Settings) -> Any:
    """Save an adapter that peft made for `model`, of drawn numbers, and return the model with peft's layers in it."""
    import peft

    torch.manual_seed(2)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False, **settings)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for tensor in (tensor for tensor in wrapped.parameters() if tensor.requires_grad):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    wrapped.peft_config["default"].base_model_name_or_path = "../base"
    wrapped.eval().save_pretrained(folder / "in")
    return wrapped.base_model.model


EMBEDDINGS = {"modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
        ("bert", {"target_modules": ["query", "word_embeddings"], "use_dora": True}),
        ("vit", {"target_modules": ["projection"], "use_dora": True}),
        ("bert", {"target_modules": ["query"], "lora_bias": True}),
        ("bert", {"target_modules": ["query"], "bias": "all"}),
        ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
        ("llama", {"target_modules": ["q_proj"], **EMBEDDINGS}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
        ("gemma", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    ],
    ids=str,
)
def test_as_peft_computes(tmp_path: Path, name: str, settings: Settings) -> None:
    """What peft writes, against peft's own layers."""
    tiny_models.make(name, tmp_path / "base")
    model = make_with_peft(tmp_path, tiny_models.build(name), settings)
    convert(tmp_path)
    check_graphs(model, tmp_path, tiny_models.build(name))


@pytest.mark.parametrize(
    ("base", "head", "task", "labels"),
    [
        ("llama", "SequenceClassification", "SEQ_CLS", 5),
        ("roberta", "TokenClassification", "TOKEN_CLS", 7),
        ("roberta", "QuestionAnswering", "QUESTION_ANS", 2),
    ],
)
def test_a_head_of_its_own(tmp_path: Path, base: str, head: str, task: str, labels: int) -> None:
    """task_type tells the class, and the adapter's own head the number of labels, in the output's config.json, too."""
    tiny_models.make(base, tmp_path / "base")
    auto = getattr(transformers, f"AutoModelFor{head}")
    model = auto.from_pretrained(tmp_path / "base", num_labels=labels)
    settings = {"target_modules": ["q_proj" if base == "llama" else "query"], "task_type": task}
    model = make_with_peft(tmp_path, model, settings)
    convert(tmp_path)
    check_graphs(model, tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (read.architectures, read.num_labels) == ([type(model).__name__], labels)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": ["q_proj"], **EMBEDDINGS}),
        ("gemma", {"target_modules": ["q_proj"], **EMBEDDINGS}),
        ("gemma", {"target_modules": ["q_proj", "embed_tokens"]}),  # the resized table lies under LoRA's parts
    ],
    ids=str,
)
def test_added_tokens(tmp_path: Path, name: str, settings: Settings) -> None:
    """Tables with more rows than the base has; where the head shares the table, it gets them as well."""
    tiny_models.make(name, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(tiny_models.VOCABULARY + 11)
    model = make_with_peft(tmp_path, model, settings)
    convert(tmp_path)
    check_graphs(model, tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").vocab_size == tiny_models.VOCABULARY + 11


def test_added_tokens_of_one_table(tmp_path: Path) -> None:
    """Rows for the embedding alone, whose head shares it and has none: refused, since nobody knows the others."""
    tiny_models.make("gemma", tmp_path / "base")
    table = torch.randn(tiny_models.VOCABULARY + 11, 32)
    parts = make_parts(tiny_models.build("gemma"), "q_proj")
    save_adapter(tmp_path / "in", parts | {"model.embed_tokens.weight": table})
    assert "lm_head.weight is tied to model.embed_tokens.weight" in convert(tmp_path, code=3)


def test_large_bases_stay_in_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the adapter does not change is streamed, what it changes is merged in float32 and in memory."""
    monkeypatch.setattr(product, "STREAM_FROM", 0)
    monkeypatch.setattr(product, "STORED_BYTES", 0)
    tiny_models.make("llama", tmp_path / "base", dtype="bfloat16", shards=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    parts = make_parts(base, "q_proj down_proj")
    save_adapter(tmp_path / "in", {name: part.bfloat16() for name, part in parts.items()})
    told = convert(tmp_path)
    assert "once more" not in told
    check_graphs(adapted(base, {name: part.bfloat16().float() for name, part in parts.items()}), tmp_path)


def test_pickled_and_absolute(tmp_path: Path) -> None:
    """adapter_model.bin, a base that the settings name by its whole path, and a task that --task names."""
    tiny_models.make("bert", tmp_path / "base")
    model = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    parts = make_parts(model, "query")
    save_adapter(tmp_path / "in", {}, base_model_name_or_path=str(tmp_path / "base"))
    (tmp_path / "in" / "adapter_model.safetensors").unlink()
    torch.save(parts, tmp_path / "in" / "adapter_model.bin")
    assert "pass the --task" in convert(tmp_path, code=3)
    convert(tmp_path, "--task", "feature-extraction")
    check_graphs(adapted(model, parts), tmp_path)


def test_files_beside_it(tmp_path: Path) -> None:
    """The adapter's tokenizer and chat template win over the base's; its training's other files are not copied."""
    tiny_models.make("llama", tmp_path / "base")
    save_adapter(tmp_path / "in", make_parts(tiny_models.build("llama"), "q_proj"))
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (tmp_path / "in" / "trainer_state.json").write_text("{}", encoding="utf-8")
    convert(tmp_path)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"
    assert made >= {"tokenizer.json", "config.json", "generation_config.json"}
    assert not made & {"trainer_state.json", "adapter_config.json", "adapter_model.safetensors"}


def test_a_base_in_the_cache(tmp_path: Path) -> None:
    """A base that is named as on the hub comes from the cache, without a network; one that is not there is named."""
    tiny_models.make("bert", tmp_path / "cache" / "hub" / "models--some--base" / "snapshots" / "0")
    (tmp_path / "cache" / "hub" / "models--some--base" / "refs").mkdir()
    (tmp_path / "cache" / "hub" / "models--some--base" / "refs" / "main").write_text("0", encoding="utf-8")
    parts = make_parts(tiny_models.build("bert"), "query")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    where = ("-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
    save_adapter(tmp_path / "in", parts, base_model_name_or_path="some/base")
    check_error(
        run_cli(*where, env=environment), 3, "'some/base'", "pass --base some/base to download it, or --base FOLDER"
    )
    result = run_cli(*where, "--base", "some/base", env=environment)
    assert result.code == 0, result.err
    assert "adapter: its base model is some/base" in lines(result, "INFO")
    check_graphs(adapted(tiny_models.build("bert"), parts), tmp_path)
    check_error(run_cli(*where, "--base", "some/other", env=environment), 3, "some/other", "or pass --base FOLDER")


def test_the_base_is_named(tmp_path: Path) -> None:
    """A base elsewhere is never looked for: the message has the option, quoted, unless the name is none to copy."""
    tiny_models.make("bert", tmp_path / "its base")
    parts = make_parts(tiny_models.build("bert"), "query")
    for name, advice in {
        "../its base": f"pass --base '{tmp_path / 'its base'}'",
        str(tmp_path / "its base"): f"pass --base '{tmp_path / 'its base'}'",
        "../other": "pass --base FOLDER, or --base OWNER/MODEL to download it",
        "--output=/x": "pass --base FOLDER, or",
        "a/b; rm -r x": "pass --base FOLDER, or",
        "a\nb": "pass --base FOLDER, or",
        "x" * 5000: "pass --base FOLDER, or",
        "meta-llama/X": "pass --base meta-llama/X to download it, or --base FOLDER",
    }.items():
        save_adapter(tmp_path / "in", parts, base_model_name_or_path=name)
        told = forked.convert_folder(tmp_path, code=3)
        assert advice in told
        assert len(told) < 1000
    save_adapter(tmp_path / "in", parts, base_model_name_or_path=None)
    assert "names no base model: pass --base FOLDER" in forked.convert_folder(tmp_path, code=3)
    assert "there is no such folder" in forked.convert_folder(tmp_path, "--base", "../other", code=2)


def test_a_base_inside(tmp_path: Path) -> None:
    """A base in the adapter's own folder needs no option, but a link there that leads elsewhere is not followed."""
    tiny_models.make("bert", tmp_path / "in" / "base")
    parts = make_parts(tiny_models.build("bert"), "query")
    save_adapter(tmp_path / "in", parts, base_model_name_or_path="base")
    forked.convert_folder(tmp_path)
    check_graphs(adapted(tiny_models.build("bert"), parts), tmp_path)
    (tmp_path / "in" / "base").rename(tmp_path / "base")
    (tmp_path / "in" / "base").symlink_to("../base")
    assert "base is a link that leads out of the folder" in forked.convert_folder(tmp_path, code=4)


def test_a_base_of_nothing(tmp_path: Path) -> None:
    """--base with what is no adapter."""
    tiny_models.make("bert", tmp_path / "in")
    assert "is no adapter, which alone has a base; leave --base out" in convert(tmp_path, code=2)


@pytest.mark.parametrize(
    ("settings", "extra", "words"),
    [
        *(({"peft_type": kind}, {}, str(kind)) for kind in ("IA3", "PROMPT_TUNING", "PREFIX_TUNING", "ADALORA", None)),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights 'pissa_niter_4'"),
        ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
        ({"r": 8}, {}, "'A': (4, 32)"),
        ({"use_dora": True}, {}, "magnitude_vector"),
        ({}, {"bert.nowhere.lora_A.weight": (4, 32)}, "bert.nowhere"),
        ({}, {"bert.nowhere.weight": (4, 32)}, "bert.nowhere.weight"),
        ({}, {"bert.encoder.layer.0.attention.self.key.lora_A.weight": (4, 32)}, "self.key: LoRA's parts"),
        ({}, {"bert.encoder.layer.0.attention.self.query.lora_B.weight": (16, 4)}, "'B': (16, 4)"),
        ({}, {"bert.embeddings.LayerNorm.lora_A.weight": (4, 32)}, "LayerNorm is no layer"),
        ({}, {"bert.embeddings.LayerNorm.weight": (16,)}, "LayerNorm.weight is 16, not 32"),
        ({}, {"bert.embeddings.token_adapter.trainable_tokens_delta": (2, 32)}, "trainable_tokens_delta"),
    ],
)
def test_refused(tmp_path: Path, settings: Settings, extra: dict[str, tuple[int, ...]], words: str) -> None:
    """What cannot be merged is one [ERROR] line that names it: no tensor is left out in silence."""
    tiny_models.make("bert", tmp_path / "base")
    parts = make_parts(tiny_models.build("bert"), "query")
    save_adapter(tmp_path / "in", parts | {name: torch.zeros(shape) for name, shape in extra.items()}, **settings)
    assert words in convert(tmp_path, code=3)


def test_inspect(tmp_path: Path) -> None:
    """--inspect names the base and reads nothing of it."""
    save_adapter(tmp_path / "in", {"a.lora_A.weight": torch.zeros(4, 2)}, base_model_name_or_path="some/base")
    outcome = forked.convert_in_child(tmp_path / "in", tmp_path, "--inspect")
    assert outcome.code == 0
    assert "an adapter (LoRA) of some/base" in outcome.err
    assert "parameters: 8" in outcome.err
