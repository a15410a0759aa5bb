"""The judge of converted Hugging Face folders: it owes nothing to the product's own verification.

transformers loads the folder again with its own choice of attention and answers other inputs, at three shapes, with
padding; generation is greedy, with the graph's own cache, against model.generate. Every value that counts must lie
within 1e-3 of the output's largest one; the opset, onnx.checker and the files beside the graph are looked at too.
"""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import onnx
import onnxruntime
import tiny_models
import torch
from tiny_models import MODELS
from transformers import GenerationConfig, GenerationMixin

Json = dict[str, Any]
Arrays = dict[str, Any]
TOLERANCE = 1e-3
OPSET = 14  # the product's default
STEPS = 12  # tokens that are generated
SHAPES = ((1, 5), (3, 11), (5, 21))  # batch and length of texts; the batches of images and sounds too
SPATIAL = ((224, 320), (203, 277), (288, 192))  # where height and width are free: not all are multiples of 32
SAMPLES = (9000, 20011, 13577)  # where the length of a sound is free
FRAMES = (72, 131, 40)  # where the length of a spectrogram is free
WEIGHTS = (".safetensors", ".bin", ".index.json")
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


class Unlike(Exception):  # noqa: N818  (a verdict)
    """What is wrong with a converted folder."""


def open_session(path: Path) -> Any:
    """The graph in ONNX Runtime, after onnx.checker."""
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(path, onnxruntime.SessionOptions(), providers=["CPUExecutionProvider"])


def run(session: Any, given: Arrays) -> Arrays:
    """The graph's outputs by name; of `given` it gets what it asks for."""
    names = [output.name for output in session.get_outputs()]
    asked = [value.name for value in session.get_inputs()]
    if unknown := [name for name in asked if name not in given]:
        raise Unlike(f"the graph asks for {', '.join(unknown)}")
    return dict(zip(names, session.run(None, {name: given[name] for name in asked}), strict=True))


def mask_of(random: Any, shape: Sequence[int], *, left: bool) -> Any:
    """A mask of rows of unequal lengths, the first one full, padded on the left or on the right."""
    rows, length = int(np.prod(shape[:-1])), shape[-1]
    lengths = random.integers(2, length + 1, rows)
    lengths[0] = length
    mask = np.arange(length)[None] < lengths[:, None]
    return (mask[:, ::-1] if left else mask).astype(np.int64).reshape(shape)


def tokens_of(random: Any, config: Any, mask: Any, *, end: bool) -> Any:
    """Random tokens, none of them special but the padding and, where the model looks for it, the end of each row."""
    text = config.get_text_config()
    special = {getattr(text, f"{role}_token_id", None) for role in ("pad", "bos", "eos", "mask", "unk")}
    usual = np.array([token for token in range(6, min(text.vocab_size, 300)) if token not in special])
    ids = random.choice(usual, mask.shape)
    if end and isinstance(text.eos_token_id, int):
        last = mask.shape[-1] - 1 - mask[..., ::-1].argmax(-1)
        np.put_along_axis(ids, last[..., None], text.eos_token_id, -1)
    return np.where(mask == 1, ids, getattr(text, "pad_token_id", None) or 0)


def text_inputs(random: Any, config: Any, shape: Sequence[int], asked: set[str], *, left: bool) -> Arrays:
    """What a tokenizer makes, with padding where the graph takes a mask."""
    end = config.is_encoder_decoder or hasattr(config, "text_config")  # these look for an end token, on the right
    mask = mask_of(random, shape, left=left and not end) if "attention_mask" in asked else np.ones(shape, np.int64)
    made = {"attention_mask": mask, "input_ids": tokens_of(random, config, mask, end=end)}
    made["token_type_ids"] = random.integers(0, 2, shape)
    made["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)
    corners = np.sort(random.integers(0, getattr(config, "max_2d_position_embeddings", 1), (*shape, 2, 2)), -2)
    made["bbox"] = corners.reshape(*shape, 4)
    if "decoder_input_ids" in asked:
        made["decoder_input_ids"] = random.integers(6, 300, (shape[0], 4))
        made["decoder_attention_mask"] = np.ones((shape[0], 4), np.int64)
    return made


def signal_inputs(random: Any, value: Any, turn: int) -> Any:
    """Images of coarse squares with noise, or sound, at sizes that the graph leaves free."""
    batch = SHAPES[turn][0]
    free = {3: (FRAMES[turn],), 2: (SAMPLES[turn],), 4: SPATIAL[turn]}[len(value.shape)]
    sizes = iter(free)
    first, *rest = value.shape
    shape = [batch if isinstance(first, str) else first, *(n if isinstance(n, int) else next(sizes) for n in rest)]
    noise = random.normal(size=shape)
    if len(shape) == 4:
        coarse = random.normal(size=(*shape[:2], 8, 8))
        rows, columns = (np.arange(n) * 8 // n for n in shape[2:])
        noise = coarse[:, :, rows][..., columns] + noise / 4
    return noise.astype(np.float32)


def make_inputs(model: Any, session: Any, turn: int) -> Arrays:
    """Inputs for everything that the graph asks for."""
    random, values = np.random.default_rng(100 + turn), session.get_inputs()
    made: Arrays = {}
    for value in values:
        if value.name in ("input_ids", "attention_mask") and "input_ids" not in made:
            batch, length = SHAPES[turn]
            batch += hasattr(model.config, "vision_config")  # other than the number of images
            shape = (batch, turn + 2, length) if len(value.shape) == 3 else (batch, length)
            asked = {value.name for value in values}
            made = text_inputs(random, model.config, shape, asked, left=turn == 1) | made
        elif value.name in ("pixel_values", "input_values", "input_features"):
            made[value.name] = signal_inputs(random, value, turn)
    return made


def as_tensors(given: Arrays, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Those of `given` as PyTorch's."""
    return {name: torch.from_numpy(np.ascontiguousarray(given[name])) for name in names}


def distance(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value; infinite for NaN and for another shape."""
    if actual.shape != expected.shape or not expected.size:
        return 0.0 if actual.shape == expected.shape else np.inf
    gap = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max() / max(np.abs(expected).max(), 1e-30)
    return float(gap) if np.isfinite(gap) else np.inf


def compare(actual: Any, expected: Any, mask: Any) -> float:
    """The largest difference relative to the largest value, without the places that are padding."""
    if mask is not None and expected.shape[: mask.ndim] == mask.shape and actual.shape == expected.shape:
        actual, expected = actual[mask == 1], expected[mask == 1]
    return distance(actual, expected)


def check_calls(model: Any, session: Any) -> Json:
    """A graph that is called once: every output against the model's output of that name."""
    asked = [value.name for value in session.get_inputs()]
    text = "input_ids" in asked
    if text and "attention_mask" in inspect.signature(model.forward).parameters and "attention_mask" not in asked:
        raise Unlike("the graph takes no attention_mask")
    found: Json = {"worst": 0.0, "checked": []}
    for turn in range(len(SHAPES)):
        given = make_inputs(model, session, turn)
        actual = run(session, given)
        with torch.no_grad():
            output = model(**as_tensors(given, asked), return_dict=True)
        if unknown := actual.keys() - output.keys():
            raise Unlike(f"no such output: {', '.join(sorted(unknown))}")
        mask = given.get("attention_mask") if text else None
        gaps = {name: compare(value, output[name].numpy(), mask) for name, value in actual.items()}
        found["worst"] = max(found["worst"], *gaps.values())
        found["checked"].append([{name: given[name].shape for name in asked}, gaps])
    return found


def empty_cache(session: Any, batch: int) -> Arrays:
    """Zeros for every past input, of length 0."""
    return {
        value.name: np.zeros(
            [n if isinstance(n, int) else batch if "batch" in n else 0 for n in value.shape], NUMPY[value.type]
        )
        for value in session.get_inputs()
        if value.name.startswith("past")
    }


def decode(session: Any, prompt: Any, mask: Any, fixed: Arrays, tokens: Any) -> Any:
    """The last place's logits of the prompt and of each of `tokens` (batch x STEPS) after it, through the cache."""
    cache, ids, logits = empty_cache(session, len(prompt)), prompt, []
    for step in range(STEPS):
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        results = run(session, {**given, "use_cache_branch": np.array([step > 0]), **fixed, **cache})
        logits.append(results["logits"][:, -1])
        for name in cache:
            if step == 0 or ".encoder." not in name:  # what comes from the encoder is computed once
                cache[name] = results[name.replace("past_key_values", "present").replace("past_", "present_")]
        ids = tokens[:, step : step + 1]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
    return np.stack(logits, 1)


def generate(model: Any, given: Arrays) -> tuple[Any, Any]:
    """What transformers generates greedily, never ending: the sequences and the logits (batch x STEPS x vocabulary)."""
    config = model.config if model.config.is_encoder_decoder else model.config.get_text_config()
    ids = {f"{role}_token_id": getattr(config, f"{role}_token_id", None) for role in ("pad", "bos", "decoder_start")}
    settings = {**ids, "pad_token_id": ids["pad_token_id"] or 0}
    model.generation_config = GenerationConfig(**settings, max_new_tokens=STEPS, do_sample=False)
    with torch.no_grad():  # not whisper's own, which adds rules
        result = GenerationMixin.generate(
            model, **as_tensors(given, list(given)), return_dict_in_generate=True, output_logits=True
        )
    return result.sequences.numpy(), torch.stack(result.logits, 1).numpy()


def check_tokens(actual: Any, expected: Any, tokens: Any) -> Json:
    """The logits and the tokens chosen by them; a token may differ where PyTorch's two best nearly tie."""
    best = np.sort(expected, -1)[..., -2:]
    clear = best[..., 1] - best[..., 0] > TOLERANCE * np.abs(expected).max()
    if ((actual.argmax(-1) != tokens) & clear).any():
        raise Unlike(f"other tokens than model.generate's (logits differ by {distance(actual, expected):.0e})")
    return {"worst": distance(actual, expected), "clear": float(clear.mean())}


def check_decoder(model: Any, session: Any) -> Json:
    """Prefill of left-padded prompts and greedy decoding against model.generate."""
    if not empty_cache(session, 1):
        raise Unlike("the graph takes no past")
    found: Json = {"worst": 0.0, "checked": []}
    for turn, shape in enumerate(SHAPES):
        random = np.random.default_rng(200 + turn)
        mask = mask_of(random, shape, left=True)
        prompt = tokens_of(random, model.config, mask, end=False)
        sequences, expected = generate(model, {"input_ids": prompt, "attention_mask": mask})
        tokens = sequences[:, -STEPS:]
        result = check_tokens(decode(session, prompt, mask, {}, tokens), expected, tokens)
        found = {"worst": max(found["worst"], result["worst"]), "checked": [*found["checked"], [shape, result]]}
    return found


def check_pair(model: Any, encoder: Any, decoder: Any) -> Json:
    """An encoder's hidden states and greedy decoding from them against model.generate."""
    found: Json = {"worst": 0.0, "checked": []}
    for turn, shape in enumerate(SHAPES):
        given = make_inputs(model, encoder, turn)
        given = {value.name: given[value.name] for value in encoder.get_inputs()}
        sequences, expected = generate(model, given)
        tokens = sequences[:, -STEPS:]
        hidden = run(encoder, given)["last_hidden_state"]
        mask = given.get("attention_mask", np.ones(hidden.shape[:2], np.int64))
        start = sequences[:, :-STEPS]
        fixed = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        logits = decode(decoder, start, np.ones_like(start), fixed, tokens)
        result = check_tokens(logits, expected, tokens)
        found = {"worst": max(found["worst"], result["worst"]), "checked": [*found["checked"], [shape, result]]}
    return found


def check(name: str, folder: Path) -> Json:
    """What is in the output folder against what transformers makes of the input folder."""
    source, out = folder / "in", folder / "out"
    sessions = {path.stem: open_session(path) for path in sorted(out.glob("*.onnx"))}
    found: Json = {"opset": 0, "files": sorted(path.name for path in out.iterdir())}
    for path in out.glob("*.onnx"):
        opsets = onnx.load(path, load_external_data=False).opset_import
        found["opset"] = max(found["opset"], *(o.version for o in opsets if not o.domain))
    wanted = {path.name for path in source.iterdir() if not path.name.endswith(WEIGHTS)}
    if absent := wanted - set(found["files"]):
        return {**found, "status": "wrong", "told": f"not in the folder: {', '.join(sorted(absent))}"}
    try:
        model = tiny_models.model_class(MODELS[name]).from_pretrained(source, dtype=torch.float32).eval()
        if "decoder_model_merged" in sessions:
            found |= check_pair(model, sessions["encoder_model"], sessions["decoder_model_merged"])
        elif MODELS[name].task == "text-generation":
            found |= check_decoder(model, sessions["model"])
        else:
            found |= check_calls(model, sessions["model"])
    except Unlike as verdict:
        return {**found, "status": "wrong", "told": str(verdict)}
    return {**found, "status": "wrong" if found["worst"] > TOLERANCE else "ok" if found["opset"] == OPSET else "opset"}
