#!/usr/bin/env python3
"""Make tiny Hugging Face model folders: seeded random weights, a config, a tokenizer or a processor; no download.

    python tests/tiny_models.py NAME FOLDER [--dtype bfloat16] [--bin] [--shards]   # make one
    python tests/tiny_models.py --list                                              # name, model_type, task, class
    python tests/tiny_models.py --check [NAME ...]                                  # make, reload and run each

Every folder is what a user's is: config.json with `architectures`, the weights, generation_config.json where the model
generates, tokenizer.json or preprocessor_config.json. The weights are drawn wide enough that outputs vary clearly.
"""

import argparse
import json
import math
import re
import string
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Json = dict[str, Any]
VOCABULARY = 320  # the byte alphabet, the special tokens and a few merges fit
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A small model is made for a small test, and it answers in a second.",
    "Every folder holds a config, the weights and a tokenizer.",
    "What is the capital of France? Paris is the capital of France.",
    "She sells sea shells by the sea shore; he reads the paper in the morning.",
    "In the beginning there was nothing, and then there was a test that failed.",
]
WORDS = sorted(set(re.findall(r"\w+", " ".join(SENTENCES).lower())))
CHARACTERS = string.ascii_lowercase + string.digits + ".,;:?!'-"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Style(NamedTuple):
    """How a family's tokenizer is made: the kind of model, its special tokens in the order of their ids, its frame."""

    model: str  # wordpiece, bpe or unigram
    tokens: list[str]
    roles: dict[str, str]
    single: str = "$A"
    pair: str = "$A $B"
    side: str = "right"


class Tiny(NamedTuple):
    """One model: what it is, its task in optimum's words, its small config and what stands beside it."""

    model_type: str
    task: str
    config: Json
    style: str = ""  # of the tokenizer, a key of STYLES
    processor: Json | None = None  # settings of the image processor or the feature extractor
    auto: str = ""  # the auto class, where it is not the task's


STYLES = {
    "bert": Style(
        "wordpiece",
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        "[CLS]:0 $A:0 [SEP]:0",
        "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
    ),
    "roberta": Style(
        "bpe",
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"},
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
    ),
    "gpt": Style(
        "bpe",
        ["<|endoftext|>"],
        dict.fromkeys(("bos", "eos", "unk", "pad"), "<|endoftext|>"),
        side="left",
    ),
    "llama": Style(
        "bpe",
        ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"],
        {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"},
        "<s> $A",
        "<s> $A $B",
        "left",
    ),
    "t5": Style(
        "unigram",
        ["<pad>", "</s>", "<unk>"],
        {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        "$A </s>",
        "$A </s> $B </s>",
    ),
    "clip": Style(
        "bpe",
        ["<|startoftext|>", "<|endoftext|>"],
        {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"},
        "<|startoftext|> $A <|endoftext|>",
    ),
    "opt": Style(
        "bpe",
        ["<s>", "<pad>", "</s>", "<unk>"],
        {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        "</s> $A",
        "</s> $A $B",
        "left",
    ),
    "ctc": Style("", ["<pad>", "<s>", "</s>", "<unk>", "|"], {}),  # letters: Wav2Vec2CTCTokenizer makes it
}

AUTO = {  # the auto class of each task
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "feature-extraction": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "object-detection": "AutoModelForObjectDetection",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "depth-estimation": "AutoModelForDepthEstimation",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForCTC",
}

# Configs ------------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = SIZES | {"max_position_embeddings": 128}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
VIT = SIZES | {"image_size": 32, "patch_size": 8}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32]}
RESNET = STAGES | {"embedding_size": 16, "layer_type": "basic"}
WAV2VEC2 = SIZES | {"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4]}
WAV2VEC2 |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}

ENCODERS: dict[str, tuple[str, Json]] = {  # task: fill-mask
    "bert": ("bert", BERT),
    "distilbert": ("bert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 128}),
    "roberta": ("roberta", BERT | {"type_vocab_size": 1}),
    "xlm-roberta": ("roberta", BERT | {"type_vocab_size": 1}),
    "albert": ("bert", BERT | {"embedding_size": 16}),
    "electra": ("bert", BERT | {"embedding_size": 16}),
    "deberta-v2": (
        "bert",
        BERT
        | {"relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}
        | {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pooler_hidden_size": 32},
    ),
    "deberta": (
        "bert",
        BERT
        | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
        | {"position_biased_input": False, "pooler_hidden_size": 32},
    ),
    "mpnet": ("roberta", BERT),
    "modernbert": ("bert", BERT | {"local_attention": 8, "layer_types": WINDOW["layer_types"]}),
    "camembert": ("roberta", BERT | {"type_vocab_size": 1}),
    "layoutlm": ("bert", BERT | {"max_2d_position_embeddings": 128}),
    "xlm": ("roberta", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}),
    "flaubert": ("roberta", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}),
    "funnel": (
        "bert",
        {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    ),
    "convbert": ("bert", BERT | {"embedding_size": 16, "conv_kernel_size": 3}),
    "mobilebert": ("bert", BERT | {"embedding_size": 16, "intra_bottleneck_size": 16, "intermediate_size": 32}),
    "squeezebert": ("bert", BERT | {"embedding_size": 32}),
    "nystromformer": ("bert", BERT | {"num_landmarks": 16, "segment_means_seq_len": 16, "conv_kernel_size": 5}),
    "big_bird": ("roberta", BERT | {"attention_type": "original_full"}),
    "longformer": ("roberta", BERT | {"attention_window": 8, "type_vocab_size": 1}),
    "rembert": ("bert", BERT | {"input_embedding_size": 16, "output_embedding_size": 32}),
    "ernie": ("bert", BERT),
    "fnet": ("bert", BERT),
    "roformer": ("bert", BERT | {"embedding_size": 16}),
    "megatron-bert": ("bert", BERT),
    "data2vec-text": ("roberta", BERT | {"type_vocab_size": 1}),
    "roberta-prelayernorm": ("roberta", BERT | {"type_vocab_size": 1}),
    "esm": ("roberta", BERT | {"position_embedding_type": "rotary", "token_dropout": False}),
    "eurobert": ("roberta", BERT | {"num_key_value_heads": 4}),
    "nomic_bert": ("bert", BERT),
}
DECODERS: dict[str, tuple[str, Json]] = {  # task: text-generation
    "gpt2": ("gpt", GPT2),
    "gpt_neo": (
        "gpt",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8, "max_position_embeddings": 128}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("gpt", BERT),
    "gpt_bigcode": ("gpt", GPT2),
    "gptj": ("gpt", GPT2 | {"rotary_dim": 4}),
    "codegen": ("gpt", GPT2 | {"rotary_dim": 4}),
    "opt": ("opt", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}),
    "bloom": ("llama", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("llama", GROUPED),
    "mistral": ("llama", GROUPED | {"sliding_window": 8}),
    "mixtral": ("llama", GROUPED | EXPERTS),
    "qwen2": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("llama", GROUPED),
    "qwen3_moe": (
        "llama",
        GROUPED | {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gemma2": ("llama", GROUPED | WINDOW | {"query_pre_attn_scalar": 8}),
    "gemma3_text": ("llama", GROUPED | WINDOW | {"query_pre_attn_scalar": 8}),
    "phi3": ("llama", GROUPED | {"original_max_position_embeddings": 128}),
    "olmo2": ("llama", GROUPED),
    "olmo3": ("llama", GROUPED | WINDOW),
    "falcon": (
        "llama",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    ),
    "granite": ("llama", GROUPED | {"logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.9}),
    "smollm3": ("llama", GROUPED | {"no_rope_layer_interval": 2}),
    "gpt_oss": (
        "llama",
        GROUPED | WINDOW | EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
LATENT |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4}
FINE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}  # many small experts
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
DECODERS |= {
    "qwen2_moe": ("llama", GROUPED | FINE | {"shared_expert_intermediate_size": 32}),
    "qwen3_next": ("llama", GROUPED | FINE | LINEAR | {"shared_expert_intermediate_size": 32}),
    "qwen3_5_text": ("llama", GROUPED | LINEAR),
    "gemma": ("llama", GROUPED),
    "phi": ("llama", GROUPED),
    "olmo": ("llama", GROUPED),
    "granitemoe": ("llama", GROUPED | EXPERTS | {"attention_multiplier": 0.3}),
    "cohere": ("llama", GROUPED | {"logit_scale": 1.0}),
    "cohere2": ("llama", GROUPED | WINDOW | {"logit_scale": 1.0}),
    "stablelm": ("llama", GROUPED),
    "starcoder2": ("llama", GROUPED),
    "mpt": ("gpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128}),
    "biogpt": ("opt", BERT),
    "xglm": (
        "opt",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128},
    ),
    "glm": ("llama", GROUPED),
    "glm4": ("llama", GROUPED),
    "nemotron": ("llama", GROUPED),
    "exaone4": ("llama", GROUPED | WINDOW),
    "ernie4_5": ("llama", GROUPED),
    "deepseek_v2": ("llama", GROUPED | LATENT),
    "deepseek_v3": ("llama", GROUPED | LATENT),
    "llama4_text": (
        "llama",
        GROUPED | EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 16, "no_rope_layer_interval": 2},
    ),
    "mamba": ("llama", MAMBA),
    "falcon_mamba": ("llama", MAMBA),
    "mamba2": ("llama", MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16}),
    "lfm2": ("llama", GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "jamba": (
        "llama",
        GROUPED
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_dt_rank": 4, "mamba_d_state": 8}
        | {"use_mamba_kernels": False},
    ),
    "bamba": (
        "llama",
        GROUPED
        | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
        | {"mamba_chunk_size": 16},
    ),
    "zamba2": (
        "llama",
        SIZES
        | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8}
        | {"n_mamba_heads": 8, "chunk_size": 16, "max_position_embeddings": 128, "use_mamba_kernels": False},
    ),
    "rwkv": (
        "gpt",
        {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        | {"context_length": 128},
    ),
    "recurrent_gemma": (
        "llama",
        SIZES | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "num_key_value_heads": 2},
    ),
    "olmoe": ("llama", GROUPED | FINE),
    "phimoe": ("llama", GROUPED | EXPERTS),
    "glm4_moe": ("llama", GROUPED | LATENT | {"num_key_value_heads": 2}),
    "seed_oss": ("llama", GROUPED),
    "hunyuan_v1_dense": ("llama", GROUPED),
}
SEQ2SEQS: dict[str, tuple[str, Json]] = {  # task: text2text-generation
    "t5": ("t5", T5),
    "mt5": ("t5", T5 | {"feed_forward_proj": "gated-gelu"}),
    "umt5": ("t5", T5 | {"feed_forward_proj": "gated-gelu"}),
    "longt5": ("t5", T5 | {"local_radius": 7}),
    "switch_transformers": (
        "t5",
        T5
        | {
            "num_decoder_layers": 2,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 64,
        },
    ),
    "bart": ("roberta", SEQ2SEQ),
    "mbart": ("roberta", SEQ2SEQ | {"decoder_start_token_id": 2}),
    "m2m_100": ("roberta", SEQ2SEQ),
    "blenderbot": ("roberta", SEQ2SEQ),
    "blenderbot-small": ("roberta", SEQ2SEQ),
    "pegasus": ("t5", SEQ2SEQ | {"scale_embedding": True}),
    "led": (
        "roberta",
        SEQ2SEQ
        | {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 64, "attention_window": 8},
    ),
    "prophetnet": (
        "t5",
        {"hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
        | {"decoder_start_token_id": 0, "num_encoder_layers": 2, "num_decoder_layers": 2}
        | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    ),
    "marian": (
        "t5",
        SEQ2SEQ | {"scale_embedding": True, "decoder_start_token_id": 0, "decoder_vocab_size": VOCABULARY},
    ),
}
SQUARE32 = {"size": {"height": 32, "width": 32}}
CROP32 = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
EDGES = {"size": {"shortest_edge": 64, "longest_edge": 96}}
DETR = SEQ2SEQ | {"backbone_config": RESNET | {"model_type": "resnet"}, "num_queries": 10}
IMAGES: dict[str, tuple[str, Json, Json]] = {  # task, config, image processor
    "vit": ("image-classification", VIT, SQUARE32),
    "convnext": (
        "image-classification",
        STAGES | {"image_size": 32, "layer_scale_init_value": 0.5},
        {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
    ),
    "swin": (
        "image-classification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        SQUARE32,
    ),
    "dinov2": ("image-classification", VIT | {"mlp_ratio": 2}, CROP32),
    "deit": ("image-classification", VIT, CROP32),
    "beit": (
        "image-classification",
        VIT
        | {"use_relative_position_bias": True, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
        | {"auxiliary_channels": 16},
        CROP32,
    ),
    "vit_msn": ("image-classification", VIT, SQUARE32),
    "dinov3_vit": ("feature-extraction", VIT, SQUARE32),
    "convnextv2": (
        "image-classification",
        STAGES | {"image_size": 32},
        {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
    ),
    "swinv2": (
        "image-classification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        SQUARE32,
    ),
    "resnet": ("image-classification", RESNET, {"size": {"shortest_edge": 64}, "crop_pct": 0.875}),
    "regnet": (
        "image-classification",
        STAGES | {"embedding_size": 16, "groups_width": 8},
        {"size": {"shortest_edge": 64}, "crop_pct": 0.875},
    ),
    "mobilevit": (
        "image-classification",
        SIZES
        | {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32], "image_size": 64}
        | {"expand_ratio": 2.0, "aspp_out_channels": 16},
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    ),
    "mobilevitv2": (
        "image-classification",
        {"width_multiplier": 0.25, "image_size": 64, "expand_ratio": 1.0, "n_attn_blocks": [1, 1, 1]},
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    ),
    "mobilenet_v1": ("image-classification", {"depth_multiplier": 0.25, "image_size": 64}, CROP32),
    "mobilenet_v2": ("image-classification", {"depth_multiplier": 0.25, "image_size": 64}, CROP32),
    "efficientnet": (
        "image-classification",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 1.0, "kernel_sizes": [3, 3, 5]}
        | {"in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "strides": [1, 2, 2], "hidden_dim": 320}
        | {"num_block_repeats": [1, 1, 1], "expand_ratios": [1, 2, 2]},
        {"size": {"height": 64, "width": 64}},
    ),
    "levit": (
        "image-classification",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
        | {"key_dim": [8, 8, 8]},
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    ),
    "pvt": (
        "image-classification",
        STAGES | {"image_size": 32, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]},
        SQUARE32,
    ),
    "pvt_v2": (
        "image-classification",
        STAGES | {"image_size": 32, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]},
        SQUARE32,
    ),
    "poolformer": (
        "image-classification",
        STAGES | {"layer_scale_init_value": 0.5},
        CROP32,
    ),
    "cvt": (
        "image-classification",
        {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        {"size": {"shortest_edge": 64}, "crop_pct": 0.875},
    ),
    "dpt": (
        "depth-estimation",
        VIT
        | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16]}
        | {"fusion_hidden_size": 16},
        SQUARE32,
    ),
    "glpn": (
        "depth-estimation",
        STAGES | {"num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16, "mlp_ratios": [2, 2, 2, 2]},
        {"size_divisor": 32},
    ),
    "depth_anything": (
        "depth-estimation",
        {
            "backbone_config": VIT
            | {"model_type": "dinov2", "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
            | {"reshape_hidden_states": False}
        }
        | {"patch_size": 8, "reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 16, 16]}
        | {"fusion_hidden_size": 16, "head_hidden_size": 8},
        SQUARE32,
    ),
    "upernet": (
        "semantic-segmentation",
        {"backbone_config": RESNET | {"model_type": "resnet", "out_indices": [1, 2, 3, 4]}, "hidden_size": 32}
        | {"auxiliary_channels": 16},
        {"size": {"height": 64, "width": 64}},
    ),
    "deformable_detr": ("object-detection", DETR | {"num_feature_levels": 3}, EDGES),
    "conditional_detr": ("object-detection", DETR, EDGES),
    "table-transformer": ("object-detection", DETR, EDGES),
    "segformer": (
        "semantic-segmentation",
        STAGES | {"num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32, "mlp_ratios": [2, 2, 2, 2]},
        {"size": {"height": 64, "width": 64}},
    ),
    "detr": (
        "object-detection",
        SEQ2SEQ | {"backbone_config": RESNET | {"model_type": "resnet"}, "use_timm_backbone": False, "num_queries": 10},
        EDGES,
    ),
    "rt_detr": (
        "object-detection",
        {"backbone_config": RESNET | {"model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}}
        | {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 32, 32], "encoder_ffn_dim": 64, "d_model": 32}
        | {"decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 64, "decoder_layers": 2, "num_queries": 10}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_denoising": 0},
        {"size": {"height": 64, "width": 64}},
    ),
    "yolos": (
        "object-detection",
        VIT | {"image_size": [64, 64], "num_detection_tokens": 10},
        EDGES,
    ),
}
LISTENER = {name: value for name, value in SEQ2SEQ.items() if name != "max_position_embeddings"}
LISTENER |= {"max_target_positions": 64}
AUDIO: dict[str, tuple[str, str, Json, Json]] = {  # task, tokenizer, config, feature extractor
    "whisper": (
        "automatic-speech-recognition",
        "roberta",
        LISTENER
        | {"max_source_positions": 50, "num_mel_bins": 16, "decoder_start_token_id": 0}
        | {"begin_suppress_tokens": None},
        {"feature_size": 16, "chunk_length": 1},
    ),
    "speech_to_text": (
        "automatic-speech-recognition",
        "roberta",
        LISTENER
        | {"max_source_positions": 200, "input_feat_per_channel": 16, "conv_channels": 16, "conv_kernel_sizes": [3, 3]},
        {"feature_size": 16, "num_mel_bins": 16},
    ),
    "moonshine": (
        "automatic-speech-recognition",
        "llama",
        {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128, "decoder_start_token_id": 1}
        | {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2}
        | {"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4},
        {},
    ),
    "wav2vec2": ("automatic-speech-recognition", "ctc", WAV2VEC2, {}),
    "wav2vec2-conformer": (
        "automatic-speech-recognition",
        "ctc",
        WAV2VEC2 | {"position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 5},
        {},
    ),
    "hubert": ("automatic-speech-recognition", "ctc", WAV2VEC2, {}),
    "wavlm": ("automatic-speech-recognition", "ctc", WAV2VEC2 | {"num_buckets": 16, "max_bucket_distance": 32}, {}),
    "sew": ("automatic-speech-recognition", "ctc", WAV2VEC2 | {"squeeze_factor": 2}, {}),
    "data2vec-audio": (
        "automatic-speech-recognition",
        "ctc",
        WAV2VEC2 | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5},
        {},
    ),
    "unispeech-sat": ("automatic-speech-recognition", "ctc", WAV2VEC2, {}),
    "audio-spectrogram-transformer": (
        "audio-classification",
        "",
        SIZES | {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 64, "num_mel_bins": 16},
        {"max_length": 64, "num_mel_bins": 16},
    ),
}
TEXT_TOWER = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "projection_dim": 16}
PAIRS: dict[str, tuple[str, Json, Json]] = {  # task: zero-shot-image-classification
    "clip": (
        "clip",
        {"text_config": TEXT_TOWER, "vision_config": VIT | {"projection_dim": 16}, "projection_dim": 16},
        CROP32,
    ),
    "siglip": ("t5", {"text_config": TEXT_TOWER | {"projection_size": 32}, "vision_config": VIT}, SQUARE32),
    "chinese_clip": (
        "bert",
        {"text_config": TEXT_TOWER, "vision_config": VIT | {"projection_dim": 16}, "projection_dim": 16},
        {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}},
    ),
}
SPEC = "text-classification token-classification question-answering feature-extraction"
SECOND = {  # further tasks of models that are named above
    **dict.fromkeys(
        ["bert", "distilbert", "roberta", "xlm-roberta", "albert", "electra", "deberta-v2", "mpnet", "modernbert"],
        f"{SPEC} multiple-choice",
    ),
    **dict.fromkeys(
        ["gpt2", "gpt_neo", "gpt_neox", "bloom", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"], SPEC
    ),
    **dict.fromkeys(["falcon", "smollm3", "t5"], SPEC),
    **dict.fromkeys(["opt", "bart"], "text-classification question-answering feature-extraction"),
    **dict.fromkeys(
        ["gemma2", "phi3", "gpt_oss", "gemma", "phi"], "text-classification token-classification feature-extraction"
    ),
    **dict.fromkeys(["gemma3_text", "olmo2", "olmo3"], "text-classification feature-extraction"),
    **dict.fromkeys(["granite", "marian", "mamba", "lfm2", "vit", "swin", "dinov2", "clip"], "feature-extraction"),
    **dict.fromkeys(["beit", "mobilevit", "dpt"], "semantic-segmentation"),
    **dict.fromkeys(["segformer", "siglip"], "image-classification"),
    **dict.fromkeys(["wav2vec2", "hubert", "wavlm"], "audio-classification feature-extraction"),
    "whisper": "audio-classification",
}


def _models() -> Iterator[tuple[str, Tiny]]:
    """Every model by its name: the model_type, with the task behind it where that is not the main one."""
    for name, (style, config) in ENCODERS.items():
        yield name, Tiny(name, "fill-mask", config, style)
    for name, (style, config) in DECODERS.items():
        yield name, Tiny(name, "text-generation", config, style)
    for name, (style, config) in SEQ2SEQS.items():
        yield name, Tiny(name, "text2text-generation", config, style)
    for name, (task, config, processor) in IMAGES.items():
        yield name, Tiny(name, task, config, processor=processor)
    for name, (task, style, config, processor) in AUDIO.items():
        auto = "AutoModelForSpeechSeq2Seq" if style not in {"", "ctc"} else ""
        yield name, Tiny(name, task, config, style, processor, auto)
    for name, (style, config, processor) in PAIRS.items():
        yield name, Tiny(name, "zero-shot-image-classification", config, style, processor)


def _second(tiny: Tiny, task: str) -> Tiny:
    """The same model for another task; a classifier of sounds has no tokenizer."""
    return tiny._replace(task=task, auto="", style="" if task == "audio-classification" else tiny.style)


MODELS: dict[str, Tiny] = dict(_models())
MODELS |= {f"{name}-{task}": _second(MODELS[name], task) for name, tasks in SECOND.items() for task in tasks.split()}
SCIPY = "transformers builds its loss with the model and that needs scipy, which the product does not install"
LEFT_OUT: dict[str, str] = {"mask2former": SCIPY, "maskformer": SCIPY}
SCALED = {"t5", "umt5", "longt5", "switch_transformers"}  # the decoder's output is divided by the root of its width
# Where seed 0 gives greedy decoding that ends early, nearly ties or repeats one token, or outputs that hardly vary
SEEDS = {"gpt2": 1, "bloom": 1, "qwen3_5_text": 1, "gemma": 1, "granitemoe": 1, "mpt": 3, "xglm": 1, "glm4": 1}
SEEDS |= {"mt5": 2, "longt5": 4, "bart": 3, "m2m_100": 5, "pegasus": 1, "prophetnet": 2, "marian": 12}
SEEDS |= {"speech_to_text": 1, "mobilevit": 1}

# Weights ------------------------------------------------------------------------------------------------------------


def model_class(tiny: Tiny) -> type["PreTrainedModel"]:
    """The transformers class that the model's auto class names for its config."""
    import transformers

    auto = getattr(transformers, tiny.auto or AUTO[tiny.task])
    found = auto._model_mapping[type(_config(tiny))]
    return found[0] if isinstance(found, tuple) else found


def build(name: str) -> "PreTrainedModel":
    """The model with its seeded weights, in float32, ready for inference."""
    import torch

    tiny = MODELS[name]
    torch.manual_seed(0)
    config = _config(tiny)
    config.architectures = [model_class(tiny).__name__]
    model = model_class(tiny)(config).eval()
    _redraw(model, SEEDS.get(name, 0))
    _calibrate(model, tiny.processor or {})
    return model


def _config(tiny: Tiny) -> Any:
    """The config with the tokenizer's ids and the labels in it."""
    from transformers import CONFIG_MAPPING

    ids = _special_ids(tiny.style)
    if "text_config" in tiny.config:
        settings = tiny.config | {"text_config": tiny.config["text_config"] | ids}
    elif tiny.style:
        settings = tiny.config | ids | {"vocab_size": 32 if tiny.style == "ctc" else VOCABULARY}
    else:
        settings = dict(tiny.config)
    if tiny.task in {"text-classification", "token-classification", "image-classification", "audio-classification"}:
        settings |= {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
    if tiny.task in {"object-detection", "semantic-segmentation"}:
        settings |= {"num_labels": 4}
    return CONFIG_MAPPING[tiny.model_type](**settings)


def _special_ids(style: str) -> dict[str, int]:
    """The special tokens' ids as a config names them."""
    if not style or style == "ctc":
        return {}
    tokens, roles = STYLES[style].tokens, STYLES[style].roles
    return {f"{role}_token_id": tokens.index(roles[role]) for role in ("pad", "bos", "eos") if role in roles}


def _redraw(model: "PreTrainedModel", seed: int) -> None:
    """Draw the weights wide enough to matter: transformers' own 0.02 leaves tiny models with nearly equal logits."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    # Small: where the head is tied to the embedding, a larger one would only repeat the last token. T5 scales it down.
    spread = 0.5 if model.config.model_type in SCALED else 0.1
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.requires_grad and id(weight) not in seen:
                    seen.add(id(weight))
                    _redraw_one(module, name, weight, torch.randn(weight.shape, generator=draw), spread)


def _redraw_one(
    module: "torch.nn.Module", name: str, weight: "torch.Tensor", noise: "torch.Tensor", spread: float
) -> None:
    """Matrices keep the size of what they pass on; vectors (norms, biases, decays) stay near where they started."""
    from torch import nn

    if isinstance(module, nn.Embedding):
        weight.copy_(noise * spread)
        if module.padding_idx is not None:
            weight[module.padding_idx] = 0  # as transformers has it, in some models at every loading
    elif (weight.dim() >= 2 and name in {"weight", "in_proj_weight"}) or weight.dim() == 3:
        fan = weight[0].numel() if "Conv" in type(module).__name__ else weight.shape[-1]
        weight.copy_(noise * 1.5 / math.sqrt(fan))
    else:
        weight.add_(noise * 0.1)


def _calibrate(model: "PreTrainedModel", settings: Json) -> None:
    """Give every batch norm statistics near those of what it sees, or little of the image would pass through."""
    import torch
    from torch import nn

    draw = torch.Generator().manual_seed(0)

    def measure(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        channels = given[0].transpose(0, 1).flatten(1)
        noise = torch.rand((2, len(channels)), generator=draw)
        module.running_var.copy_(channels.var(1).clamp(min=1e-3) * (noise[0] + 0.5))
        module.running_mean.copy_(channels.mean(1) + channels.std(1) * (noise[1] - 0.5))

    norms = [module for module in model.modules() if getattr(module, "running_var", None) is not None]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    if norms:
        with torch.no_grad():
            model(**{model.main_input_name: _noise(model.main_input_name, settings)})
    for hook in hooks:
        hook.remove()


def _noise(kind: str, settings: Json) -> "torch.Tensor":
    """Random images of coarse squares at the processor's size, or sound."""
    import torch

    draw = torch.Generator().manual_seed(0)
    if kind != "pixel_values":
        return torch.randn((4, 4000), generator=draw)
    box = settings.get("crop_size", settings.get("size", {}))
    side = box.get("height", box.get("shortest_edge", 64))
    return torch.rand((4, 3, 8, 8), generator=draw).repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)


# Tokenizers and processors ------------------------------------------------------------------------------------------


def tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with the words of SENTENCES in it."""
    from transformers import PreTrainedTokenizerFast

    style = STYLES[MODELS[name].style]
    roles = {f"{role}_token": token for role, token in style.roles.items()}
    made = PreTrainedTokenizerFast(
        tokenizer_object=_trained(style), padding_side=style.side, model_max_length=128, **roles
    )
    if MODELS[name].model_type == "llama":
        made.chat_template = CHAT_TEMPLATE
    return made


def _trained(style: Style) -> Any:
    """A tokenizer of the `tokenizers` library with the style's model, special tokens and frame."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if style.model == "wordpiece":
        pieces = [*style.tokens, *CHARACTERS, *(f"##{character}" for character in CHARACTERS), *WORDS]
        made = Tokenizer(
            models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token=style.roles["unk"])
        )
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
    elif style.model == "unigram":
        scores = dict.fromkeys(style.tokens, 0.0) | {f"▁{word}": -5.0 for word in WORDS}
        scores |= dict.fromkeys(["▁", *CHARACTERS, *string.ascii_uppercase], -9.0)
        made = Tokenizer(models.Unigram(list(scores.items()), style.tokens.index(style.roles["unk"])))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        options = {"vocab_size": VOCABULARY - 10, "special_tokens": style.tokens, "show_progress": False}
        made.train_from_iterator(SENTENCES, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    special = [(token, style.tokens.index(token)) for token in style.tokens]
    made.post_processor = processors.TemplateProcessing(single=style.single, pair=style.pair, special_tokens=special)
    return made


def _save_ctc_tokenizer(folder: Path) -> None:
    """Letters, as the models of speech recognition have them."""
    from transformers import Wav2Vec2CTCTokenizer

    tokens = [*STYLES["ctc"].tokens, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)


def _save_processor(tiny: Tiny, folder: Path) -> None:
    """preprocessor_config.json of the model's image processor or feature extractor."""
    import transformers
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    if tiny.model_type in FEATURE_EXTRACTOR_MAPPING_NAMES:
        kind = FEATURE_EXTRACTOR_MAPPING_NAMES[tiny.model_type]
    else:
        kind = IMAGE_PROCESSOR_MAPPING_NAMES[tiny.model_type]["torchvision"]
    getattr(transformers, kind)(**tiny.processor).save_pretrained(folder)


# Folders ------------------------------------------------------------------------------------------------------------


def make(name: str, folder: Path, *, dtype: str = "float32", safe: bool = True, shards: bool = False) -> None:
    """Write the model's folder: `safe` off gives pytorch_model.bin, `shards` on several files and an index."""
    import torch

    tiny = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    model = build(name).to(getattr(torch, dtype))
    model.config.dtype = dtype
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3 if shards else size * 2)
    if not safe:
        _to_pickles(folder)
    if tiny.style == "ctc":
        _save_ctc_tokenizer(folder)
    elif tiny.style:
        tokenizer(name).save_pretrained(folder)
    if tiny.processor is not None:
        _save_processor(tiny, folder)


def _to_pickles(folder: Path) -> None:
    """The safetensors files as the pickles of before, with the old names; the index, where there is one, too."""
    import torch
    from safetensors.torch import load_file

    for path in sorted(folder.glob("model*.safetensors")):
        torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


# The check ----------------------------------------------------------------------------------------------------------


def inputs(name: str, folder: Path) -> Json:
    """Example inputs as a user makes them: from the folder's tokenizer and processor, a batch of two, padded."""
    import numpy as np
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    tiny, random, made = MODELS[name], np.random.default_rng(0), {}
    if tiny.style not in {"", "ctc"} and tiny.model_type not in AUDIO:
        texts = [SENTENCES[0], SENTENCES[3][:12], SENTENCES[1], SENTENCES[4]]
        texts = texts if tiny.task == "multiple-choice" else texts[:2]
        made |= AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    if tiny.model_type in AUDIO:
        sound = [random.normal(size=8000).astype("float32"), random.normal(size=6000).astype("float32")]
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        made |= extractor(sound, sampling_rate=16000, return_tensors="pt", **_padding(extractor))
    elif tiny.processor is not None:
        images = random.integers(0, 255, (2, 5, 6, 3)).astype("uint8").repeat(8, 1).repeat(8, 2)
        made |= AutoImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt")
    if tiny.task == "feature-extraction" and "decoder_start_token_id" in tiny.config:
        made["decoder_input_ids"] = made["input_ids"]
    if tiny.task == "multiple-choice":
        made = {key: value.reshape(2, 2, -1) for key, value in made.items()}
    return made


def _padding(extractor: Any) -> Json:
    """Whisper's extractor pads to its own length; the others pad to the longest when told to."""
    return {} if "Whisper" in type(extractor).__name__ else {"padding": True}


def check(name: str, folder: Path) -> str:
    """Make the folder, load it back, run it; what is wrong with it, or nothing."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    make(name, folder)
    kind, tiny = model_class(MODELS[name]), MODELS[name]
    if AutoConfig.from_pretrained(folder).architectures != [kind.__name__]:
        return "config.json names another class"
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if lost:
        return f"keys that do not fit: {lost}"
    if (count := sum(weight.numel() for weight in model.parameters())) > 1_000_000:
        return f"{count} parameters are not tiny"
    if tiny.style and tiny.style != "ctc" and len(AutoTokenizer.from_pretrained(folder)) > VOCABULARY:
        return "the tokenizer is larger than the model's vocabulary"
    given = _accepted(model, inputs(name, folder))
    with torch.no_grad():
        if (model.can_generate() and "generation" in tiny.task) or tiny.auto.endswith("Seq2Seq"):
            return _check_generation(model, given)
        return _check_outputs(build(name), model, given)


def _accepted(model: "PreTrainedModel", given: Json) -> Json:
    """What the model's forward takes of the inputs: a tokenizer's token types are not for every model."""
    from inspect import signature

    return {key: value for key, value in given.items() if key in signature(model.forward).parameters}


def _check_outputs(made: "PreTrainedModel", model: "PreTrainedModel", given: Json) -> str:
    """The reloaded model answers as the made one, finite and different from place to place."""
    import torch

    value, expected = model(**given)[0], made(**given)[0]
    if not torch.isfinite(value).all():
        return "not finite"
    if not torch.allclose(value, expected, rtol=1e-4, atol=1e-5):
        return f"reloaded, it differs by {(value - expected).abs().max()}"
    if value.std() < 0.05 or (value[0] - value[-1]).std() < 0.01:
        return f"outputs hardly vary: {value.std():.4f}, between inputs {(value[0] - value[-1]).std():.4f}"
    return ""


def _check_generation(model: "PreTrainedModel", given: Json) -> str:
    """Eight greedy tokens, none of them the end, each clearly before the next best."""
    result = model.generate(
        **given, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    if len(result.logits) < 8:
        return f"ended after {len(result.logits)} tokens: {result.sequences.tolist()}"
    tokens = result.sequences[:, -8:]
    if (tokens[:, :-1] == model.config.eos_token_id).any():
        return f"a row ends early: {tokens.tolist()}"
    gaps = [(best[:, 0] - best[:, 1]).min().item() for best in (step.topk(2).values for step in result.logits)]
    if min(gaps) < 0.002:
        return f"two tokens nearly tie: {min(gaps):.5f}"
    if tokens.unique().numel() < 4:
        return f"always the same tokens: {tokens.tolist()}"
    return ""


def check_all(names: Sequence[str]) -> int:
    """Check the models and print a line for each; how many failed."""
    failed = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                reason = check(name, Path(folder))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        failed += bool(reason)
        print(f"{name}: {reason or 'ok'}", flush=True)
    print(f"{len(names) - failed} of {len(names)} models are ok")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Make one folder, list the models, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME [FOLDER]", help="a model and its folder, or models to check")
    parser.add_argument("--list", action="store_true", help="print name, model_type, task and class of each")
    parser.add_argument("--check", action="store_true", help="make, reload and run the models (all of them by default)")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--bin", action="store_true", help="pytorch_model.bin, not safetensors")
    parser.add_argument("--shards", action="store_true", help="several weight files and an index")
    options = parser.parse_args(argv)
    if options.list:
        for name, tiny in MODELS.items():
            print(name, tiny.model_type, tiny.task, model_class(tiny).__name__)
        return 0
    if options.check:
        return min(check_all(options.names or list(MODELS)), 1)
    if len(options.names) != 2 or options.names[0] not in MODELS:
        parser.error("give one name of --list and a folder")
    make(options.names[0], Path(options.names[1]), dtype=options.dtype, safe=not options.bin, shards=options.shards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
