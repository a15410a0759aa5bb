#!/usr/bin/env python3
"""Write architectures.json.xz: the tensors of every model of torchvision and timm, and which models compute the same.

    python tests/generators/architectures.py [--keep-groups]

Two builds on the meta device tell which sizes follow the number of classes (C) and of input channels (I), a third one
which tensors go with the classifier. Models of one layout are then run on the CPU with equal random weights, one at a
time (--keep-groups: the present file's groups are kept where their members have not changed). It takes about an hour
on one core; the same versions give the same bytes.
"""

import contextlib
import functools
import inspect
import json
import lzma
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

DATA = Path(__file__).resolve().parents[2] / "architectures.json.xz"
VERSIONS = {package.__name__: package.__version__.partition("+")[0] for package in (timm, torchvision)}
CLASSES, MORE_CLASSES, CHANNELS, MORE_CHANNELS = 7, 1007, 3, 4
# Layouts that torchvision's own published weights have and that its defaults do not.
VARIANTS = {
    **{name: {"aux_logits": False} for name in ("googlenet", "inception_v3")},
    **{name: {"aux_loss": True} for name in torchvision.models.list_models(torchvision.models.segmentation)
       if not name.startswith("lraspp")},
}  # fmt: skip
EQUAL = 1e-9  # relative, in float64: the same formula in another order of summation errs by 1e-13
LARGE = 250_000_000  # parameters: float64 would take 2 GB, so these run in float32 and must agree in every bit
TOO_LARGE = 700_000_000  # parameters: over 3 GB; these count as different
SENSITIVE = 1e-6  # relative: two images whose outputs are closer than this would hide what the models do to them
SMALL = ((3, 96, 96), (3, 128, 128))  # even sizes, at which kinds of padding differ, down to strides of 32
INITIALISERS = re.compile(r"(kaiming_|xavier_|trunc_)?(normal|uniform)_|trunc_normal_tf_|variance_scaling_|orthogonal_|"
                          r"lecun_normal_|constant_|zeros_|ones_|eye_|dirac_")  # fmt: skip

# Names that only transformers writes, and the family that they tell; the first that occurs counts.
FAMILIES = (
    ("DETR", r"^(model\.)?(query_position_embeddings\.|backbone\.conv_encoder\.)"),
    ("Whisper", r"^(model\.)?encoder\.conv2\.weight$(?s:.*)decoder\.layers\.0\.encoder_attn"),
    ("SigLIP", r"^(siglip\.)?vision_model\.head\.probe$"),
    ("CLIP", r"^(clip\.)?text_model\.encoder\.layers\.0\.self_attn|^(clip\.)?vision_model\.pre_layrnorm\."),
    ("SAM", r"^vision_encoder\.layers\.0\.attn\.qkv\."),
    ("BLIP", r"^text_(model|encoder|decoder)\..*\.layer\.0\.(crossattention|attention\.self)\.|^qformer\."),
    ("wav2vec 2.0", r"^(wav2vec2\.|hubert\.|wavlm\.)?feature_extractor\.conv_layers\.0\.conv\.weight$"),
    ("T5", r"^(decoder|encoder)\.block\.0\.layer\.0\.SelfAttention\.q\."),
    ("BART", r"^(model\.)?decoder\.layers\.0\.encoder_attn\.k_proj\."),
    ("GPT-2", r"^(transformer\.)?h\.0\.attn\.c_attn\."),
    ("GPT-Neo", r"^(transformer\.)?h\.0\.attn\.attention\.q_proj\."),
    ("GPT-J", r"^(transformer\.)?h\.0\.attn\.q_proj\."),
    ("GPT-NeoX", r"^(gpt_neox\.)?layers\.0\.attention\.query_key_value\."),
    ("BLOOM, Falcon", r"^(transformer\.)?h\.0\.self_attention\.query_key_value\."),
    ("OPT", r"^(model\.)?decoder\.layers\.0\.self_attn\.q_proj\."),
    ("Mamba", r"^(backbone\.|model\.)?layers\.0\.mixer\.in_proj\."),
    ("Llama, Mistral, Qwen, Gemma", r"^(.*\.)?layers\.0\.self_attn\.(q|qkv)_proj\."),
    ("DistilBERT", r"^(distilbert\.)?transformer\.layer\.0\.attention\.q_lin\."),
    ("ALBERT", r"^(albert\.)?encoder\.albert_layer_groups\.0\."),
    ("DeBERTa", r"^(deberta\.)?encoder\.(rel_embeddings\.|layer\.0\.attention\.self\.(query_proj|in_proj)\.)"),
    ("RoBERTa", r"^(xlm_)?roberta\.encoder\.layer\.0\."),
    ("ELECTRA", r"^electra\.encoder\.layer\.0\."),
    ("Swin", r"^(swin\.|swinv2\.)?encoder\.layers\.0\.blocks\.0\.attention\.(self\.query|q_proj)\."),
    ("SegFormer", r"^(segformer\.)?(encoder\.patch_embeddings\.0|stages\.0\.patch_embeddings)\.proj\."),
    ("ConvNeXt", r"^(convnext\.|convnextv2\.)?encoder\.stages\.0\.layers\.0\.dwconv\."),
    ("ResNet", r"^(resnet\.)?embedder\.embedder\.convolution\."),
    ("BEiT", r"^beit\.(encoder\.layer|layers)\.0\."),
    ("DINOv2", r"^(dinov2\.)?encoder\.layer\.0\.layer_scale1\."),
    ("ViT, DeiT", r"^(vit\.|deit\.)?(encoder\.layer|layers)\.0\.attention\.(attention\.query|q_proj)\."),
    ("MPNet", r"^(mpnet\.)?encoder\.layer\.0\.attention\.attn\.q\."),
    ("BERT", r"^(\w+\.)?encoder\.layer\.0\.attention\.self\.query\."),
)


class Described(NamedTuple):
    """A model's tensors: name to sizes such as `Cx512`, and the names that go with the classifier."""

    tensors: dict[str, str]
    head: frozenset[str]


def untouched(*arguments: Any, **keywords: Any) -> Any:
    """Stand for an initialiser: the tensor as it is."""
    return arguments[0] if arguments else keywords["tensor"]


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Let initialisers do nothing, wherever the libraries have imported them: most of the time of a build is theirs."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("torch.nn.init", "timm", "torchvis"))]
    found = [(m, n, vars(m)[n]) for m in modules for n in list(vars(m)) if INITIALISERS.fullmatch(n)]
    for module, name, _ in found:
        setattr(module, name, untouched)
    try:
        yield
    finally:
        for module, name, original in found:
            setattr(module, name, original)


def members() -> list[str]:
    """Every model: `timm.models:resnet18`, `torchvision.models:googlenet {"aux_logits": false}`."""
    own = torchvision.models.list_models(exclude="quantized_*")
    plain = [*(f"torchvision.models:{name}" for name in own), *(f"timm.models:{name}" for name in timm.list_models())]
    return [*plain, *(f"torchvision.models:{name} {json.dumps(given)}" for name, given in sorted(VARIANTS.items()))]


def builder(member: str) -> Callable[..., nn.Module]:
    """The function that builds a member with random weights and nothing downloaded."""
    name, _, given = member.partition(" ")
    library, _, name = name.partition(":")
    if library == "timm.models":
        return functools.partial(timm.create_model, name)
    build = torchvision.models.get_model_builder(name)
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(build).parameters else {}
    return functools.partial(build, weights=None, **backbone, **json.loads(given or "{}"))


def shapes(member: str, **arguments: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a member's tensors; raises TypeError where it does not take the arguments."""
    with uninitialised(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build = builder(member)
        try:
            with torch.device("meta"):
                model = build(**arguments)
        except NotImplementedError:  # it computes its widths with tensors; memory that is never filled costs nothing
            model = build(**arguments)
    state = model.state_dict()
    return {name: tuple(state[name].shape) for name in state if not name.endswith("num_batches_tracked")}


def size_text(small: int, large: int) -> str:
    """One size as a formula, from the two builds; raises ValueError where both unknowns are in it."""
    classes, channels = divmod(large - small, MORE_CLASSES - CLASSES)
    if classes and channels:
        raise ValueError(f"{small} and {large}: a size that both unknowns change")
    factor, unknown, value = (classes, "C", CLASSES) if classes else (channels, "I", CHANNELS)
    if not factor:
        return str(small)
    offset = small - factor * value
    return f"{factor if factor > 1 else ''}{unknown}{f'{offset:+d}' if offset else ''}"


def describe(member: str) -> Described:
    """The member's tensors with its unknowns."""
    is_timm = member.startswith("timm.")
    tries: list[tuple[dict[str, int], dict[str, int]]] = [({}, {})]
    tries.insert(0, ({"num_classes": CLASSES}, {"num_classes": MORE_CLASSES}))
    if is_timm:
        tries.insert(0, ({"num_classes": CLASSES}, {"num_classes": MORE_CLASSES, "in_chans": MORE_CHANNELS}))
    for less, more in tries:
        try:
            small, large = shapes(member, **less), shapes(member, **more)
        except (TypeError, RuntimeError, AssertionError, ValueError):
            if not less:
                raise
            continue
        break
    if small.keys() != large.keys():
        raise ValueError(f"{member}: the number of classes or channels changes its names")
    tensors = {
        name: "x".join(size_text(a, b) for a, b in zip(sizes, large[name], strict=True)) or "scalar"
        for name, sizes in small.items()
    }
    bare = shapes(member, num_classes=0) if is_timm else small
    headless = all(name in small and small[name] == sizes for name, sizes in bare.items())
    return Described(tensors, frozenset(small.keys() - bare.keys() if headless else ()))


def random_weights(model: nn.Module) -> None:
    """Fill every parameter and buffer with numbers that its name alone decides, of a size that keeps signals alive."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if tensor.ndim > 1:
                value = noise * (max(tensor[0].numel(), 1) ** -0.5)
            elif name.endswith(("bias", "mean")):
                value = 0.1 * noise
            else:
                value = 1 + 0.1 * noise.clamp(-3, 3)
            tensor.copy_(value)


def preprocessing(member: str) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """The images that a member is made for: channels, height and width, mean and standard deviation."""
    name = member.partition(" ")[0].partition(":")[2]
    if member.startswith("timm."):
        config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
        return (tuple(config.input_size), tuple(config.mean), tuple(config.std))
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    side = getattr(transforms, "crop_size", [224])[0]
    return ((3, side, side), tuple(getattr(transforms, "mean", ())), tuple(getattr(transforms, "std", ())))


def answers(member: str, sizes: Iterable[tuple[int, ...]]) -> list[list[Tensor] | str]:
    """A member's outputs on an image of each size, or why there are none, and on another image of the first that works.

    Nothing for a model that is too large to run.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in builder(member)().parameters())
    if parameters > TOO_LARGE:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = builder(member)(num_classes=CLASSES).eval()
    random_weights(model)
    dtype = torch.float32 if parameters > LARGE else torch.float64
    model.to(dtype)

    def run(size: tuple[int, ...], seed: int) -> list[Tensor] | str:
        image = torch.rand((1, *size), generator=torch.Generator().manual_seed(seed)).to(dtype)
        try:
            with torch.inference_mode():
                return [leaf for leaf in tree_leaves(model(image)) if isinstance(leaf, Tensor)]
        except (RuntimeError, AssertionError, ValueError) as error:
            return type(error).__name__

    found = {size: run(size, 0) for size in sizes}
    works = [size for size, answer in found.items() if not isinstance(answer, str)]
    return [*found.values(), *(run(size, 1) for size in works[:1])]


def close(first: list[Tensor], second: list[Tensor], relative: float) -> bool:
    """Whether two models' outputs have the same shapes and differ by no more than `relative` of the largest."""
    return [a.shape for a in first] == [b.shape for b in second] and all(
        a.numel() > 0 and float((a - b).abs().max()) <= relative * float(a.abs().max())
        for a, b in zip(first, second, strict=True)
    )


def equal(first: list[list[Tensor] | str], second: list[list[Tensor] | str]) -> bool:
    """Whether two members accept the same sizes, give the same answers, and ones that depend on the image."""
    ours, theirs = ([answer for answer in found if not isinstance(answer, str)] for found in (first, second))
    if [isinstance(answer, str) for answer in first] != [isinstance(answer, str) for answer in second]:
        return False
    if not ours or close(ours[0], ours[-1], SENSITIVE):
        return False
    exact = all(tensor.dtype == torch.float32 for tensor in ours[0])
    return all(close(a, b, 0.0 if exact else EQUAL) for a, b in zip(ours, theirs, strict=True))


def group(names: list[str]) -> list[list[str]]:
    """Sort the members of one layout into groups that compute the same.

    The classifier is a random linear map of the features, so what is equal with it is equal without it.
    """
    if len(names) == 1:
        return [names]
    native = sorted({preprocessing(name)[0] for name in names})
    works = all(isinstance(answer, list) for answer in answers(names[0], SMALL))
    sizes = SMALL if works else native  # what accepts any size is not made for one
    groups: list[tuple[list[str], list[list[Tensor] | str]]] = []
    for name in names:
        found = answers(name, sizes)
        others = next((others for others, theirs in groups if equal(theirs, found)), None)
        if others is None:
            groups.append(([name], found))
        else:
            others.append(name)
        print(f"{name}: {[text for text in found if isinstance(text, str)]}, {len(groups)} groups", flush=True)
    return [others for others, _ in groups]


def layouts(described: dict[str, Described]) -> list[tuple[Described, list[str]]]:
    """Each layout with its members; torchvision's three channels are timm's open number of them."""
    found: dict[tuple[tuple[str, str], ...], tuple[Described, list[str]]] = {}
    for member in sorted(described):  # timm's come first
        value = described[member]
        plain = {n: "x".join(three_channels(size) for size in sizes.split("x")) for n, sizes in value.tensors.items()}
        found.setdefault(tuple(sorted(plain.items())), (value, []))[1].append(member)
    return [(value, sorted(names, key=rank)) for value, names in found.values()]


def three_channels(size: str) -> str:
    """`4I` with three channels: 12."""
    match = re.fullmatch(r"(\d*)I([+-]\d+)?", size)
    return str(int(match[1] or 1) * CHANNELS + int(match[2] or 0)) if match else size


def rank(member: str) -> tuple[bool, int, str]:
    """The order in which members that compute the same are preferred: torchvision's, then the shortest name."""
    return member.startswith("timm."), len(member), member


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Ascending neighbours as [first, count]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found


def encode(entries: Iterable[tuple[Described, list[list[str]]]]) -> bytes:
    """The data file."""
    table: dict[tuple[str, str], int] = {}
    written = []
    for value, groups in entries:
        numbers = {name: table.setdefault((name, sizes), len(table)) for name, sizes in value.tensors.items()}
        head = sorted(numbers[name] for name in value.head)
        layout = {"runs": runs(sorted(numbers.values())), "head": head, "groups": groups}
        unlike = [name for names in groups for name in names if preprocessing(name) != preprocessing(names[0])]
        written.append({**layout, **({"unlike": unlike} if unlike else {})})
    content = {
        "versions": VERSIONS,
        "names": [name for name, _ in table],
        "sizes": [sizes for _, sizes in table],
        "layouts": written,
        "families": FAMILIES,
    }
    return lzma.compress(json.dumps(content, separators=(",", ":")).encode(), preset=9 | lzma.PRESET_EXTREME)


def main() -> None:
    """Describe, group and write."""
    described = {}
    for member in members():
        described[member] = describe(member)
        print(member, len(described), flush=True)
    known = {}
    if "--keep-groups" in sys.argv[1:]:
        content = json.loads(lzma.decompress(DATA.read_bytes()))
        known = {frozenset(chain.from_iterable(x["groups"])): x["groups"] for x in content["layouts"]}
    entries = [(value, known.get(frozenset(names)) or group(names)) for value, names in layouts(described)]
    DATA.write_bytes(encode(entries))


if __name__ == "__main__":
    main()
