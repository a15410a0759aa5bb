"""Save complete models with the libraries of another environment: the part of pickles.py that old Pythons run (3.7 on).

    python tests/sweeps/pickle_maker.py FOLDER

Writes NAME.pt (torch.save of the model) and NAME.npz (its inputs i0, i1 .. and PyTorch's outputs o0, o1 ..) for every
model below that this environment's versions can build, and prints a line for each.
"""

import os
import sys
import warnings

import numpy as np
import torch
from torch import nn

IMAGE = (2, 3, 64, 64)


def layers(*parts):
    """What builds a Sequential of those parts that this version of torch.nn has: [name, arguments ..]."""
    return lambda: nn.Sequential(*(getattr(nn, name)(*arguments) for name, *arguments in parts if hasattr(nn, name)))


ACTIVATIONS = ["ReLU", "ReLU6", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid", "LeakyReLU",
               "PReLU", "Softplus", "Softsign", "Tanhshrink", "Hardtanh", "LogSigmoid", "Sigmoid", "Tanh", "Softshrink",
               "Hardshrink", "RReLU", "Threshold"]  # fmt: skip


def torch_models():
    """Layers of torch.nn."""
    arguments = {"Threshold": [0.1, 0.0]}
    yield "activations", layers(*([name, *arguments.get(name, [])] for name in ACTIVATIONS)), (2, 5)
    yield "pooling", layers(
        ["Conv2d", 3, 8, 3, 1, 1], ["BatchNorm2d", 8], ["MaxPool2d", 2], ["AvgPool2d", 2], ["Dropout2d"],
        ["Upsample", None, 2, "bilinear", False], ["GroupNorm", 2, 8], ["InstanceNorm2d", 8], ["PixelShuffle", 2],
        ["ReflectionPad2d", 1], ["ConvTranspose2d", 2, 4, 3, 2], ["AdaptiveAvgPool2d", 1], ["Flatten"],
        ["Linear", 4, 3], ["Softmax", 1]), IMAGE  # fmt: skip
    yield "sequence", layers(["Conv1d", 3, 8, 3], ["BatchNorm1d", 8], ["ReLU"], ["AvgPool1d", 2]), (2, 3, 20)
    yield "volume", layers(["Conv3d", 1, 4, 3], ["BatchNorm3d", 4], ["ReLU"], ["AvgPool3d", 2]), (1, 1, 8, 8, 8)
    for name in ("LSTM", "GRU", "RNN"):
        layer = getattr(nn, name)
        yield name.lower(), lambda layer=layer: layer(6, 5, 2, batch_first=True, bidirectional=True), (2, 7, 6)
    yield "encoder", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2), (7, 2, 16)
    yield "encoder-gelu", lambda: nn.TransformerEncoderLayer(16, 2, 32, activation="gelu"), (7, 2, 16)
    yield "embedding", layers(["Embedding", 20, 8], ["LayerNorm", 8], ["Linear", 8, 4]), (2, 7, 20)
    yield "weight-norm", normed, (2, 6)
    yield "parallel", lambda: nn.DataParallel(nn.Sequential(nn.Linear(6, 4), nn.ReLU())), (2, 6)
    yield "pruned", pruned, (2, 6)


def normed():
    """Layers whose weights are computed by hooks."""
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.utils.spectral_norm(nn.Linear(6, 4)))


def pruned():
    """Layers whose weights are the product of a weight and a mask."""
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    prune.l1_unstructured(model[0], "weight", 0.4)
    prune.random_structured(model[2], "weight", 1, 0)
    return model


def torchvision_models():
    """One of each family of torchvision."""
    from torchvision import models

    names = ("resnet18 resnext50_32x4d mobilenet_v2 mobilenet_v3_small squeezenet1_1 shufflenet_v2_x0_5 mnasnet0_5 "
             "densenet121 googlenet inception_v3 efficientnet_b0 efficientnet_v2_s regnet_y_400mf convnext_tiny swin_t "
             "swin_v2_t maxvit_t")  # fmt: skip
    for name in filter(lambda name: hasattr(models, name), names.split()):
        size = {"inception_v3": 299, "swin_t": 224, "swin_v2_t": 256, "maxvit_t": 224}.get(name, 64)
        yield name, getattr(models, name), (1, 3, size, size)
    for name in ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        builder = getattr(models.segmentation, name, None)
        newer = builder and "weights_backbone" in getattr(builder, "__wrapped__", builder).__code__.co_varnames
        arguments = {"weights_backbone": None} if newer else {"pretrained_backbone": False}
        yield name, lambda builder=builder, arguments=arguments: builder(**arguments), IMAGE


def timm_models():
    """One of each family of timm."""
    import timm

    names = ("resnet18 efficientnet_lite0 mobilenetv3_small_100 mobilenetv3_rw vit_tiny_patch16_224 "
             "vit_small_patch16_224 deit_tiny_patch16_224 tf_efficientnet_b0 mixnet_s mnasnet_small dpn68 "
             "swin_tiny_patch4_window7_224 convnext_atto convnext_nano mixer_s32_224 regnetx_002 rexnet_100 "
             "ghostnet_100 levit_128s xcit_nano_12_p16_224 mobilevit_xxs edgenext_xx_small pvt_v2_b0 poolformer_s12 "
             "efficientformer_l1 lcnet_050 coat_tiny coat_lite_tiny crossvit_tiny_240 twins_svt_small cait_xxs24_224 "
             "gmlp_ti16_224 resmlp_12_224 hardcorenas_a selecsls42 dla46_c cspresnet50 res2net50_14w_8s skresnet18 "
             "legacy_seresnet18 seresnet18 nf_resnet26 eca_resnet33ts botnet26t_256 halonet26t volo_d1_224 "
             "convmixer_768_32 maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224 mobilenetv4_conv_small fastvit_t8 repvit_m1 "
             "repvit_m0_9 tiny_vit_5m_224 hgnetv2_b0 repghostnet_050 efficientvit_b0 mobileone_s0 inception_next_tiny "
             "eva02_tiny_patch14_224 test_vit test_resnet")  # fmt: skip
    for name in filter(timm.is_model, names.split()):
        yield name, lambda name=name: timm.create_model(name, pretrained=False), None


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37)
CONFIGS = {
    "bert.BertModel": SMALL,
    "bert.BertForSequenceClassification": SMALL,
    "roberta.RobertaModel": SMALL,
    "distilbert.DistilBertModel": dict(dim=32, n_layers=2, n_heads=2, hidden_dim=37),
    "albert.AlbertModel": dict(SMALL, embedding_size=16),
    "electra.ElectraModel": dict(SMALL, embedding_size=16),
    "gpt2.GPT2LMHeadModel": dict(n_embd=32, n_layer=2, n_head=2),
    "xlnet.XLNetModel": dict(d_model=32, n_layer=2, n_head=2, d_inner=37),
    "openai.OpenAIGPTModel": dict(n_embd=32, n_layer=2, n_head=2),
    "deberta_v2.DebertaV2Model": SMALL,
    "mpnet.MPNetModel": SMALL,
    "vit.ViTForImageClassification": dict(SMALL, image_size=32, patch_size=8),
    "deit.DeiTModel": dict(SMALL, image_size=32, patch_size=8),
    "beit.BeitModel": dict(SMALL, image_size=32, patch_size=8),
    "convnext.ConvNextModel": dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "segformer.SegformerForSemanticSegmentation": dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "swin.SwinModel": dict(embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=32, window_size=4),
    "llama.LlamaModel": SMALL,
    "mistral.MistralModel": dict(SMALL, num_key_value_heads=1),
    "qwen2.Qwen2Model": dict(SMALL, num_key_value_heads=1),
    "modernbert.ModernBertModel": SMALL,
    "dinov2.Dinov2Model": dict(SMALL, image_size=28, patch_size=14),
    "wav2vec2.Wav2Vec2Model": SMALL,
}


def transformers_models():
    """Small ones of the widespread families."""
    import transformers

    for name, settings in CONFIGS.items():
        cls = getattr(transformers, name.partition(".")[2], None)
        other = {"convnext": (1, 3, 64, 64), "segformer": (1, 3, 64, 64), "wav2vec2": (1, 4000)}
        size = settings.get("image_size")
        shape = (1, 3, size, size) if size else other.get(name.partition(".")[0], (2, 7, 100))
        config = dict(settings, vocab_size=100) if shape[-1] == 100 else settings
        if cls is not None:
            yield name, lambda cls=cls, config=config: cls(cls.config_class(**config)), shape


def ultralytics_models():
    """Every task of the versions' own models."""
    from ultralytics.nn import tasks

    names = {"": "Detection", "-cls": "Classification", "-seg": "Segmentation", "-pose": "Pose", "-obb": "OBB"}
    for family in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"):
        for suffix, task in names.items() if family in ("yolov8n", "yolo11n", "yolo26n") else [("", "Detection")]:
            cls, file = getattr(tasks, task + "Model", None), family + suffix + ".yaml"
            yield family + suffix, lambda cls=cls, file=file: cls(file, verbose=False), (1, 3, 160, 160)


def flat(value):
    """The tensors of an output, in order."""
    if torch.is_tensor(value):
        return [value]
    values = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in values for tensor in flat(item)]


def whole_numbers(shape):
    """Token ids: shapes whose last entry is a vocabulary of 20 or 100 for two axes of 2 and 7."""
    return shape[:2] == (2, 7) and len(shape) == 3 and shape[2] in (20, 100)


def save(build, shape, path):
    """A model, and its answer to a drawn input."""
    torch.manual_seed(0)
    model = build().eval()
    torch.manual_seed(1)
    with torch.no_grad():  # untrained statistics hide what is wrong
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
        shape = shape or (1,) + tuple(model.default_cfg["input_size"])
        given = torch.randint(0, shape[2], shape[:2]) if whole_numbers(shape) else torch.rand(shape)
        torch.save(model, path + ".pt")
        answers = flat(model(given))
    np.savez(path + ".npz", i0=given.numpy(), **{"o%d" % place: t.float().numpy() for place, t in enumerate(answers)})


def main():
    """Save them all."""
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["YOLO_OFFLINE"] = "1"
    torch.set_num_threads(1)
    for models in (torch_models, torchvision_models, timm_models, transformers_models, ultralytics_models):
        library = models.__name__.split("_")[0]
        try:
            for name, build, shape in models():
                path = os.path.join(sys.argv[1], library + "-" + name)
                try:
                    save(build, shape, path)
                    print("saved", library, name, flush=True)
                except Exception as error:  # what this version cannot build or save
                    print("not saved", library, name, type(error).__name__, str(error)[:100], flush=True)
        except ImportError as error:
            print("no", library, error)


if __name__ == "__main__":
    main()
