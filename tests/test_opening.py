"""What may be opened: the input and nothing else, while innocent and hostile files are loaded, vetted and built."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpus
import forked
import pytest
import torch
import torchvision
from helpers import check_error, run_cli
from torch import nn

import convert as product

LAYERS = {"resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf",
          "efficientnet_b0"}  # fmt: skip
TIMM = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet", "test_nfnet", "test_vit2",
        "test_mambaout", "lcnet_035")  # fmt: skip
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", SMALL),
    "roberta": ("RobertaForTokenClassification", SMALL),
    "distilbert": (
        "DistilBertForQuestionAnswering", {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
    "electra": ("ElectraModel", {**SMALL, "embedding_size": 16}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 1}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1,
                                          "num_heads": 2, "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", {**SMALL, "image_size": 32, "patch_size": 8}),
}  # fmt: skip


def saver(make: Callable[[], Any], *, legacy: bool = False) -> Callable[[Path], Path]:
    """What writes the made object with torch.save."""

    def save(folder: Path) -> Path:
        torch.save(make(), folder / "input.pt", _use_new_zipfile_serialization=not legacy)
        return folder / "input.pt"

    return save


def image_model(name: str) -> nn.Module:
    """A model of torchvision or timm."""
    if name in LAYERS:
        import torchvision

        return torchvision.models.get_model(name, weights=None).eval()
    import timm

    return timm.create_model(name, pretrained=False).eval()


def written(name: str) -> Callable[[Path], Path]:
    """What writes a good file of the corpus."""

    def write(folder: Path) -> Path:
        (folder / "input.pt").write_bytes(corpus.good_files()[name])
        return folder / "input.pt"

    return write


def huggingface(name: str, *, safe: bool = True) -> Callable[[Path], Path]:
    """What writes a Hugging Face folder."""

    def save(folder: Path) -> Path:
        import transformers

        cls, settings = FOLDERS[name]
        model = getattr(transformers, cls)(transformers.CONFIG_MAPPING[name](**settings))
        model.save_pretrained(folder / "model")
        if not safe:
            torch.save(model.state_dict(), folder / "model/pytorch_model.bin")
            (folder / "model/model.safetensors").unlink()
        return folder / "model"

    return save


def sentence_folder(folder: Path) -> Path:
    """A folder of sentence-transformers with all that it may have."""
    from safetensors.torch import save_file

    model = huggingface("bert")(folder)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]  # fmt: skip
    (model / "modules.json").write_text(json.dumps(modules))
    for kind in ("1_Pooling", "2_Dense"):
        (model / kind).mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (model / "1_Pooling/config.json").write_text(json.dumps(pooling))
    dense = {"in_features": 16, "out_features": 4, "bias": True,
             "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
    (model / "2_Dense/config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": torch.ones(4, 16), "linear.bias": torch.ones(4)}, model / "2_Dense/model.safetensors")
    return model


def timm_folder(folder: Path) -> Path:
    """A folder that timm writes for the hub."""
    import timm

    timm.models.save_for_hf(image_model("test_vit"), folder / "model", model_args={"num_classes": 1000})
    return folder / "model"


def sharded(folder: Path) -> Path:
    """Weights in two shards and their index."""
    from safetensors.torch import save_file

    weights = image_model("squeezenet1_1").state_dict()
    names = {name: f"model-{turn % 2}.safetensors" for turn, name in enumerate(weights)}
    for shard in set(names.values()):
        save_file({name: weights[name] for name in names if names[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder / "model.safetensors.index.json"


def safe_weights(folder: Path) -> Path:
    """A safetensors file of a known architecture."""
    from safetensors.torch import save_file

    save_file(image_model("shufflenet_v2_x0_5").state_dict(), folder / "input.safetensors")
    return folder / "input.safetensors"


def lightning(hyper: dict[str, Any], name: str = "shufflenet_v2_x0_5") -> Callable[[Path], Path]:
    """What writes a checkpoint of Lightning's with these hyper_parameters."""
    return saver(lambda: {"state_dict": image_model(name).state_dict(), "hyper_parameters": hyper, "epoch": 3})


def scripted(folder: Path) -> Path:
    """TorchScript of a small network, with its code."""
    net = nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    torch.jit.save(torch.jit.script(net), folder / "input.pt")
    return folder / "input.pt"


def archived(folder: Path) -> Path:
    """TorchScript of a convolutional network."""
    torch.jit.save(torch.jit.trace(image_model("squeezenet1_1"), torch.randn(2, 3, 64, 64)), folder / "input.pt")
    return folder / "input.pt"


INNOCENT: dict[str, Callable[[Path], Path]] = {
    **{f"file-{kind}": written(kind) for kind in ("zip", "legacy", "program")},
    **{f"pickle-{name}": saver(lambda name=name: image_model(name)) for name in (*sorted(LAYERS), *TIMM)},
    **{f"weights-{name}": saver(lambda name=name: image_model(name).state_dict())
       for name in ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf", "test_resnet", "test_vit")},
    **{f"legacy-{name}": saver(lambda name=name: image_model(name), legacy=True) for name in ("test_vit", "lcnet_035")},
    **{f"folder-{name}": huggingface(name) for name in FOLDERS},
    "folder-bert-bin": huggingface("bert", safe=False),
    "folder-gpt2-bin": huggingface("gpt2", safe=False),
    "folder-sentences": sentence_folder,
    "folder-timm": timm_folder,
    "shards": sharded,
    "safetensors": safe_weights,
    "traced": archived,
    "scripted": scripted,
    "lightning": lightning({"num_classes": 1000, "learning_rate": 0.1}),
    "lightning-of-a-complete-model": saver(lambda: {"model": image_model("test_resnet"), "epoch": 1}),
    "pickle-lstm": saver(lambda: nn.LSTM(4, 8, batch_first=True).eval()),
    "pickle-transformer": saver(lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()),
    "pickle-embedding": saver(lambda: nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 2)).eval()),
    "pickle-conv1d": saver(lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.BatchNorm1d(4)).eval()),
    "pickle-attention": saver(lambda: nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)).eval()),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Import what loading imports, so that the children inherit it."""
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    corpus.good_files()


@pytest.mark.parametrize("name", INNOCENT)
def test_innocent_files(name: str, tmp_path: Path) -> None:
    """Loaded, built and called, with nothing opened but by the functions that forked.NAMED lists."""
    outcome = forked.convert_in_child(INNOCENT[name](tmp_path), tmp_path, seconds=60, export=False)
    assert outcome.code == forked.BUILT, outcome


def payload(folder: Path) -> dict[str, Any]:
    """Arguments that make timm copy a file of the attacker's choosing to a folder of his choosing."""
    (folder / "payload.pth").write_text("payload\n")
    config = {"url": f"file://{folder}/payload.pth", "num_classes": 1000, "input_size": (3, 224, 224)}
    return {"pretrained": True, "cache_dir": str(folder / "victim"), "pretrained_cfg": config}


PLACES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "timm-copies-a-file": payload,
    "a-checkpoint-path": lambda folder: {"checkpoint_path": str(folder / "victim")},
    "weights-by-name": lambda _: {"weights": "DEFAULT", "progress": True},
    "a-device": lambda _: {"device": "cuda", "dtype": "float16"},
    "code-by-name": lambda _: {"act_layer": "os.system", "norm_layer": "torch.hub.load"},
}


@pytest.mark.parametrize("model", ["test_resnet", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("name", PLACES)
def test_hyper_parameters_are_no_places(name: str, model: str, tmp_path: Path) -> None:
    """What a checkpoint calls its arguments reaches a builder only where it describes the network."""
    source = lightning(PLACES[name](tmp_path), model)(tmp_path)
    before = forked.snapshot(tmp_path)
    named = ["--model-class", "timm.models:test_resnet"] if model == "test_resnet" else []
    outcome = forked.convert_in_child(source, tmp_path, *named, seconds=60, export=False)
    assert outcome.code == forked.BUILT, outcome
    assert forked.snapshot(tmp_path) == before


def test_hyper_parameters_that_describe(tmp_path: Path) -> None:
    """The ones that do are used, and said."""
    from torchvision.models import shufflenet_v2_x0_5

    content = {"state_dict": shufflenet_v2_x0_5(num_classes=7).state_dict(), "hyper_parameters": {"num_classes": 7}}
    torch.save(content, tmp_path / "input.pt")
    outcome = forked.convert_in_child(tmp_path / "input.pt", tmp_path, seconds=60, export=False)
    assert outcome.code == forked.BUILT, outcome


@pytest.mark.parametrize(
    ("larger", "code", "words"),
    [
        ({}, forked.BUILT, "hyper_parameters tell"),
        ({"num_layers": 2**24}, 2, "it cannot be built"),
        ({"image_size": 2**20}, 3, "building the model that it describes takes more than 1.07 GB"),
    ],
    ids=["as-they-are", "layers", "positions"],
)
def test_hyper_parameters_that_are_too_large(larger: dict[str, int], code: int, words: str, tmp_path: Path) -> None:
    """They cannot make a model much larger than its weights are."""
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    weights = torchvision.models.VisionTransformer(**sizes).state_dict()
    torch.save({"state_dict": weights, "hyper_parameters": {**sizes, **larger}}, tmp_path / "input.pt")
    named = ("--model-class", "torchvision.models:VisionTransformer")
    outcome = forked.convert_in_child(tmp_path / "input.pt", tmp_path, *named, export=False)
    assert outcome.code == code, outcome
    assert words in outcome.err


def test_switches_of_a_pickle(tmp_path: Path) -> None:
    """Attributes that transformers' own code does not set in a constructor are left out, and said."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SMALL))
    model._use_kernels = True
    model.hf_quantizer = "x"
    model.is_quantized = True
    torch.save(model, tmp_path / "input.pt")
    outcome = forked.convert_in_child(tmp_path / "input.pt", tmp_path, seconds=60, export=False)
    assert outcome.code == forked.BUILT, outcome
    assert "left out" in outcome.err
    assert "_use_kernels of BertModel" in outcome.err


def behind_the_wall(action: Callable[[], object], folder: Path) -> forked.Outcome:
    """Run `action` in a child with the wall up; it exits with 0 where the wall stood in the way."""

    def attempt() -> int:
        with product.WALL.up(folder / "work"):
            try:
                action()
            except product.WallError:
                return 0
        return 1

    return forked.in_child(attempt, folder)


ACTIONS: dict[str, Callable[[], object]] = {
    "read": lambda: Path("/etc/hostname").read_bytes(),
    "read-by-a-link": lambda: Path("link").read_bytes(),
    "write": lambda: Path("new").write_bytes(b"x"),
    "write-into-a-library": lambda: Path(torch.__file__).with_name("new.py").write_bytes(b"x"),
    "append": lambda: Path(torch.__file__).open("a").close(),
    "folder": lambda: Path("new").mkdir(),
    "remove": lambda: Path("there").unlink(),
    "rename": lambda: Path("there").rename("new"),
    "link": lambda: Path("new").symlink_to("there"),
    "process": lambda: subprocess.run(["true"], check=True),
    "shell": lambda: __import__("os").system("true"),
    "socket": lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
    "name": lambda: socket.getaddrinfo("localhost", 80),
    "download": lambda: urllib.request.urlopen("http://127.0.0.1:9/", timeout=1),
    "file-url": lambda: urllib.request.urlopen("file:///etc/hostname"),  # noqa: S310  (it must not open)
    "library": lambda: __import__("ctypes").CDLL("/tmp/none.so"),
    "torch-hub": lambda: torch.hub.load_state_dict_from_url("http://127.0.0.1:9/a.pth", model_dir="."),
    "torch-load": lambda: torch.load("there", weights_only=True),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_the_wall(name: str, tmp_path: Path) -> None:
    """Nothing outside is read, written, started or connected to while it is up."""
    (tmp_path / "there").write_text("x")
    (tmp_path / "link").symlink_to("/etc/hostname")
    before = forked.snapshot(tmp_path)
    outcome = behind_the_wall(ACTIONS[name], tmp_path)
    assert outcome.code == 0, outcome
    assert forked.snapshot(tmp_path) == before


def test_within_the_wall(tmp_path: Path) -> None:
    """The input, the libraries, imports and the working folder stay open; afterwards everything is."""
    (tmp_path / "work").mkdir()
    source = tmp_path / "input.pt"
    source.write_bytes(corpus.good_files()["zip"])

    def action() -> int:
        product.detect(source)
        with product.WALL.up(tmp_path / "work"):
            source.read_bytes()
            Path(torch.__file__).read_bytes()
            __import__("sndhdr")
            (tmp_path / "work/new").write_bytes(b"x")
        return 0 if Path("/etc/hostname").exists() and Path("/etc/hostname").read_bytes() else 1

    outcome = forked.in_child(action, tmp_path)
    assert outcome.code == 0, outcome


def test_a_link_that_changes(tmp_path: Path) -> None:
    """What was vetted is what is opened: another file under the same name is told."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("one.pt", "two.pt"):
        (folder / name).write_bytes(corpus.good_files()["zip"])
    (folder / "input.pt").symlink_to("one.pt")

    def action() -> int:
        product.detect(folder / "input.pt")
        (folder / "input.pt").unlink()
        (folder / "input.pt").symlink_to("two.pt")
        try:
            product.open_input(folder / "input.pt")
        except product.ConversionError as error:
            return int(error.status)
        return 0

    assert forked.in_child(action, tmp_path).code == 4

    def rewrite() -> int:
        source = product.detect(folder / "two.pt")
        (folder / "two.pt").write_bytes(b"other")
        try:
            product.load(source, trust=False)
        except product.ConversionError as error:
            return int(error.status)
        return 0

    assert forked.in_child(rewrite, tmp_path).code == 3


def endless() -> bytes:
    """TorchScript whose forward never returns."""
    return corpus.script_with("while bool(torch.eq(torch.sum(x), torch.sum(x))):\n      x = torch.add(x, 1)")


def growing() -> bytes:
    """TorchScript whose forward doubles a tensor until the memory is full."""
    return corpus.script_with("for i in range(60):\n      x = torch.cat([x, x])")


def test_code_that_never_ends(tmp_path: Path) -> None:
    """An archive's forward has a budget of time, which the user can raise; the advice is that option."""
    (tmp_path / "input.pt").write_bytes(endless())
    command = ("-i", str(tmp_path / "input.pt"), "-o", str(tmp_path / "out/"))
    check_error(run_cli(*command, timeout=60), 3, "took longer than", "--run-timeout")
    check_error(run_cli(*command, "--run-timeout", "0.5", timeout=60), 3, "took longer than 0.5 s", "--run-timeout")
    assert not (tmp_path / "out").exists()


def test_code_that_fills_the_memory(tmp_path: Path) -> None:
    """It has one of memory, too, which ends the process's allocations and not the machine's."""
    (tmp_path / "input.pt").write_bytes(growing())
    result = run_cli("-i", str(tmp_path / "input.pt"), "-o", str(tmp_path / "out/"), timeout=60)
    check_error(result, 3, "input.pt: running the model", "takes more than 1.07 GB of memory", "--input-shape")


def test_guessed_sizes_have_a_budget(tmp_path: Path) -> None:
    """So do the classes of a library at sizes that nobody gave; the advice lifts it."""
    image = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=40.0), nn.AdaptiveAvgPool2d(2))
    torch.save(image, tmp_path / "input.pt")
    command = ("-i", str(tmp_path / "input.pt"), "-o", str(tmp_path / "out/"))
    check_error(run_cli(*command, timeout=60), 3, "input.pt: running the model", "of memory", "--input-shape")
    assert not (tmp_path / "out").exists()
    assert run_cli(*command, "--input-shape", "1,3,16,16", timeout=120).code == 0


def test_code_that_crashes(tmp_path: Path) -> None:
    """A setting that PyTorch does not look at, and crashes on, is the file's fault."""
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights_backbone=None)
    detector.roi_heads.box_roi_pool.sampling_ratio = 2**30
    torch.save(detector, tmp_path / "input.pt")
    result = run_cli("-i", str(tmp_path / "input.pt"), "-o", str(tmp_path / "out/"), timeout=100)
    check_error(result, 3, "input.pt: a library crashed (SIGSEGV) on what it holds")


def test_records_that_torch_reads_when_a_model_raises(tmp_path: Path) -> None:
    """The source lines in an archive are a pickle that C++ reads unchecked: it never sees them."""
    content = corpus.script_with("x = torch.reshape(x, [7, 7, 7])")
    damaged = corpus.changed(
        content, {"code/__torch__/corpus.py.debug_pkl": b"\x80\x02" + b"(" * 100 + b"R" * 100 + b"."}
    )
    codes = []
    for name, data in (("good.pt", content), ("damaged.pt", damaged)):
        (tmp_path / name).write_bytes(data)
        result = run_cli("-i", str(tmp_path / name), "-o", str(tmp_path / "out/"), timeout=60)
        check_error(result, 2, "shape '[7, 7, 7]' is invalid")
        codes.append(result.err.replace(name, ""))
    assert codes[0] == codes[1]


class Slow(nn.Module):
    """Takes a tenth of a second each time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sleep."""
        time.sleep(0.1)
        return x


@pytest.mark.parametrize(("flag", "code"), [(None, -signal.SIGALRM), (1.0, 0)])
def test_all_runs_together_have_a_budget(
    flag: float | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that is quick enough each time does not run for ever; --run-timeout is for one run, and lifts that."""
    monkeypatch.setattr(product, "RUN_SECONDS", 0.2)
    (tmp_path / "input.pt").write_bytes(b"")

    def action() -> int:
        options = product.Options(input=tmp_path / "input.pt", run_timeout=flag)
        product.RUNS.begin(options, own_code=False)
        for _ in range(25):
            product.call_model(Slow(), [torch.ones(1)], ["x"])
        return 0

    assert forked.in_child(action, tmp_path).code == code


def test_an_inner_limit_does_not_lift_an_outer_one(tmp_path: Path) -> None:
    """A run that may take long ends with what is around it."""

    def action() -> int:
        with product.time_limit(0.2), product.time_limit(50):
            time.sleep(5)
        return 0

    assert forked.in_child(action, tmp_path).code == -signal.SIGALRM


def test_what_runs_keep_counts(tmp_path: Path) -> None:
    """The bound of memory is told from one start, so that what earlier runs left is in it."""

    def action() -> int:
        start, kept = product.memory_bytes("VmData"), []
        for _ in range(8):  # more than the heap has of free memory
            with product.memory_bound(400 << 20, "running it", "stop", start):
                kept.append(torch.ones(200 << 20, dtype=torch.uint8))
        return len(kept)

    outcome = forked.in_child(action, tmp_path)
    assert outcome.code == 70, outcome
    assert "running it takes more than" in outcome.err


def test_patience_is_a_number() -> None:
    """--run-timeout takes seconds above zero."""
    for value in ("0", "-1", "nan", "inf", "x"):
        check_error(run_cli("-i", "x.pt", "-o", "y.onnx", "--run-timeout", value), 2, "--run-timeout")
