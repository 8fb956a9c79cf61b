"""USAGE in plain PyTorch: seed areas for weakly supervised semantic segmentation.

Peng et al., "USAGE: A Unified Seed Area Generation Paradigm for Weakly Supervised Semantic Segmentation", ICCV 2023
(arXiv 2303.07806). Three sections: 1. the paper, 2. the networks, 3. the data and the run folder. The functions of
section 1 need `import torch` and `import torch.nn.functional as F` and nothing else, not even each other: copy any of
them. `# PAPER` marks what the paper fixes, `# OURS` what it leaves open to us and why we chose so.

Letters: B images, C classes, D channels, h x w positions of the activation map (N = h*w), H x W pixels of the image,
s activation, alpha spatial activation distribution, y in {0, 1} image-level labels.
"""

import colorsys
import json
import math
import os
import shutil
import signal
import sys
import time
import xml.etree.ElementTree
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2

# ======================================================================================================================
# 1. The paper
# ======================================================================================================================

# ---- Sec. 4.1, activation shape controlling: the generation loss -----------------------------------------------------


def spatial_activation_distribution(activations, temperature):
    """How much each position contributes to the score of its class.

        alpha[c,i] = exp(s[c,i] / tau) / sum_j exp(s[c,j] / tau)

    activations (B, C, h, w), any floating type -> alpha (B, C, h, w), float32, every map sums to 1.
    temperature >= 0: `inf` is exactly uniform (CAM), 0 is exactly one-hot at the maximum, the first one on a tie (MIL).
    Raises ValueError for a negative or NaN temperature. Source: Sec. 4.1.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    s = activations.float().flatten(2)                                              # (B, C, h, w) -> (B, C, N)
    if temperature == 0:
        alpha = torch.zeros_like(s).scatter_(-1, s.argmax(-1, keepdim=True), 1.0)
    else:
        alpha = torch.softmax((s - s.amax(-1, keepdim=True).detach()) / temperature, -1)    # the shift avoids overflow
    return alpha.view(activations.shape)                                            # (B, C, N) -> (B, C, h, w)


def class_scores(activations, alpha):
    """The score of each class: its activations, weighted by its distribution.

        s~[c] = sum_i alpha[c,i] * s[c,i]

    activations (B, C, h, w), alpha (B, C, h, w) or (B, 1, h, w) for one distribution shared by all classes, such as a
    class token's attention -> (B, C), float32, unbounded. Source: Sec. 4.1.
    """
    return (alpha * activations.float()).sum((2, 3))                                # (B, C, h, w) -> (B, C)


def generation_loss(activations, labels, temperature):
    """L_GEN: classify the image through alpha, so that the temperature controls the shape of the seed.

        alpha = softmax over positions of s / tau1,   s~[c] = sum_i alpha[c,i] * s[c,i]
        L_GEN = - mean over images and classes of  y log sigmoid(s~) + (1 - y) log sigmoid(-s~)

    activations (B, C, h, w), labels (B, C) in {0, 1}, temperature (tau1) in [0, inf] -> scalar >= 0, float32.
    inf: global average pooling, plain CAM. 0: max pooling, multiple-instance learning.
    Raises ValueError for a negative or NaN temperature. Source: Sec. 4.1.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    s = activations.float().flatten(2)                                              # (B, C, h, w) -> (B, C, N)
    if temperature == 0:
        scores = s.max(-1).values                                                   # (B, C, N) -> (B, C)
    else:
        alpha = torch.softmax((s - s.amax(-1, keepdim=True).detach()) / temperature, -1)
        scores = (alpha * s).sum(-1)                                                # (B, C, N) -> (B, C)
    return F.multilabel_soft_margin_loss(scores, labels.float())


# ---- Sec. 4.2, activation shape regularization: two views by network adjustment --------------------------------------


def consistency_loss(student_alpha, teacher_alpha, labels):
    """L_REG: pull the student's distribution to the teacher's, for the classes that the image has.

        L_REG = mean over pairs (image, c) with y[c] = 1 of  sum_i alpha'[c,i] * log(alpha'[c,i] / alpha[c,i])

    with alpha the student's and alpha' the teacher's: KL(teacher || student).
    OURS: the digest of the paper does not name the distance; KL is the usual one between distributions.

    student_alpha, teacher_alpha (B, C, h, w), maps summing to 1; labels (B, C) in {0, 1} -> scalar >= 0, float32.
    No gradient reaches the teacher. 0 when both agree; 0 with zero gradients when no class is present. Source: Sec. 4.2.
    """
    student, target = student_alpha.float(), teacher_alpha.detach().float()
    tiny = torch.finfo(torch.float32).tiny                                          # log 0 would be -inf, 0 * -inf NaN
    divergence = target * (target.clamp_min(tiny).log() - student.clamp_min(tiny).log())    # (B, C, h, w)
    present = labels.float()
    return (divergence.sum((2, 3)) * present).sum() / present.sum().clamp_min(1)


def learning_status(running_loss):
    """How far the classifier has come: 0 before anything is learnt, towards 1 as L_GEN falls.

        q = clip(1 - running L_GEN / log 2, 0, 1)

    OURS: the paper adapts to the learning status; log 2, the L_GEN of a network that knows nothing, gives it a scale.
    running_loss float >= 0 -> float in [0, 1]. Raises ValueError for a negative or NaN loss. Source: Sec. 4.2.
    """
    if not running_loss >= 0:
        raise ValueError(f"running_loss must be >= 0, got {running_loss}")
    return max(0.0, 1.0 - running_loss / 0.6931471805599453)                        # log 2


def adjustment_rates(status, max_rate, weak_ratio):
    """Drop rates of the two views: strong for the student, weak for the teacher, both growing as the network learns.

        strong = max_rate * q,   weak = weak_ratio * strong

    OURS: linear in q, the simplest rule that is 0 at the start. status (q), max_rate and weak_ratio in [0, 1] ->
    (strong, weak) in [0, 1]. Raises ValueError outside of that. Source: Sec. 4.2.
    """
    if not (0 <= status <= 1 and 0 <= max_rate <= 1 and 0 <= weak_ratio <= 1):
        raise ValueError(f"status, max_rate and weak_ratio must be in [0, 1], got {status}, {max_rate}, {weak_ratio}")
    strong = max_rate * status
    return strong, weak_ratio * strong


def set_adjustment(network, rate):
    """Adjust a network: drop whole residual branches, the deeper the likelier, and features before the classifier.

    Sets `p` of every StochasticDepth (torchvision's; found by its name) to `rate * k / K` for the k-th of K in module
    order, and `p` of `network.dropout` to `rate`. Both act in training mode only; at rate 0 the network is exactly the
    plain one. rate in [0, 1], ValueError outside of it. Source: Sec. 4.2.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    branches = [module for module in network.modules() if type(module).__name__ == "StochasticDepth"]
    for k, branch in enumerate(branches, start=1):
        branch.p = rate * k / len(branches)                     # PAPER: grows with depth; OURS: linearly, the usual way
    network.dropout.p = rate


def ema_teacher(student, decay):
    """The teacher: an exponential moving average of the student's weights and buffers (torch's own AveragedModel).

        teacher <- decay * teacher + (1 - decay) * student,   at each call of `teacher.update_parameters(student)`

    The first call copies the student. The averaged network is `teacher.module`. decay in [0, 1]. Source: Sec. 4.2.
    """
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    return torch.optim.swa_utils.AveragedModel(student, multi_avg_fn=average, use_buffers=True)


# ---- Seeds: the protocol of the field (IRN, SEAM, MCTformer) ---------------------------------------------------------


def seed_scores(activations, labels, size, align_corners=False):
    """From activations at several scales and flips to the seed scores of one image size.

        seed[c] = ReLU(s[c]) / max_i ReLU(s[c,i]),   s = sum over scales and flips,   0 for classes the image has not

    activations: a list of (B, C, h_k, w_k), flips already mirrored back; labels (B, C) in {0, 1}; size (H, W);
    align_corners as in F.interpolate (see section 2) -> (B, C, H, W) in [0, 1], float32.
    Source: IRN (Ahn et al., CVPR 2019) and MCTformer (Xu et al., CVPR 2022), whose protocol the paper follows.
    """
    total = 0.0
    for s in activations:
        total = total + F.interpolate(s.float(), size, mode="bilinear", align_corners=align_corners)   # (B, C, H, W)
    total = total.relu() * labels[:, :, None, None]
    return total / total.amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def label_map(scores, threshold, classes=None):
    """The strongest class of each pixel, background (0) where no class exceeds the threshold.

    scores (B, C, H, W), threshold in the same unit; classes (C,), their numbers, where scores hold only some, or none, of
    them -> (B, H, W) int64 with 0 background and c + 1 for class c.
    """
    if not scores.shape[1]:
        return torch.zeros_like(scores.sum(1), dtype=torch.int64)
    best, winner = scores.max(1)                                                    # (B, C, H, W) -> (B, H, W)
    return torch.where(best > threshold, (winner if classes is None else classes[winner]) + 1, 0)


# ---- Pseudo masks: pixel-adaptive mask refinement, in the place where the authors use PSA -----------------------------


def refine_scores(images, scores, threshold, dilations=(1, 2, 4, 8, 12, 24), iterations=20):
    """Let the edges of seed scores follow those of the image: each pixel takes over from neighbours that look like it.

        p[i] = sigmoid((seed[i] - threshold) / 0.1)
        a[i,j] = softmax over j of  - mean over colours |x[i] - x[j]| / (0.1 * sigma[i])
        p[i] <- sum_j a[i,j] * p[j],  `iterations` times;   back to a score by  threshold + 0.1 * logit(p)

    j runs over the 8 neighbours at each dilation, sigma[i] is the deviation of a colour among all of them.
    images (B, 3, H, W) in any unit, scores (B, C, H, W) in [0, 1], threshold in [0, 1] -> (B, C, H, W) in [0, 1], on
    which the threshold means what it did before. Works at a longer side of 160 pixels at most.
    Source: Araslanov & Roth, CVPR 2020, whose 0.1 and dilations these are. OURS: p, so that the threshold is the
    background's score, as in AFA (Ru et al., CVPR 2022); 20 iterations for their 10; the 160 pixels, which widen the
    reach and cost a quarter of the time: on photographs each of the three gave more than it took.
    """
    size, shrink = scores.shape[-2:], min(1, 160 / max(scores.shape[-2:]))
    h, w = (max(1, round(side * shrink)) for side in size)
    x = F.interpolate(images.float(), (h, w), mode="bilinear", align_corners=False, antialias=True)
    p = F.interpolate(((scores.float() - threshold) / 0.1).sigmoid(), (h, w), mode="bilinear", align_corners=False)
    reach = max(dilations)
    corners = [(reach + d * dy, reach + d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]

    def neighbours(maps):
        """8 maps a dilation, each shifted towards one neighbour."""
        padded = F.pad(maps, (reach,) * 4, mode="replicate")
        return [padded[..., y:y + h, x:x + w] for y, x in corners]

    around = torch.stack(neighbours(x))                                             # (J, B, 3, h, w)
    sigma = around.std(0) + 1e-8                                                    # (B, 3, h, w)
    a = torch.softmax(-((around - x).abs() / (0.1 * sigma)).mean(2), 0)             # (J, B, h, w)
    for _ in range(iterations):
        p = sum(weight[:, None] * neighbour for weight, neighbour in zip(a, neighbours(p)))     # (B, C, h, w)
    p = F.interpolate(p, size, mode="bilinear", align_corners=False).clamp(1e-6, 1 - 1e-6)
    return (threshold + 0.1 * p.logit()).clamp(0, 1)                                # (B, C, H, W)


# ======================================================================================================================
# 2. The networks
# ======================================================================================================================

CNNS = ("mobilenet_v2", "resnet18", "resnet50", "resnet101")
DEITS = {  # name: width D, attention heads, checkpoint of Touvron et al. (facebookresearch/deit)
    "deit_tiny": (192, 3, "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth"),
    "deit_small": (384, 6, "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"),
    "deit_base": (768, 12, "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"),
}
BACKBONES = CNNS + tuple(DEITS)
STRIDE = 16                     # one position of the map for 16 x 16 pixels: the field's custom, and DeiT's patch
TO_TENSOR = v2.Compose([        # a PIL image -> (3, H, W), with ImageNet's mean and deviation
    v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


class ActivationNetwork(nn.Module):
    """Images (B, 3, H, W) of any size, normalised as by TO_TENSOR -> activations (B, C, h, w).

    s[c,i] = w_c . f_i + b_c: a 1x1 convolution on the features f, without ReLU. `align_corners` says where the
    outermost positions of the map sit, in F.interpolate's sense: on the image's corner pixels (CNN, exactly so at sides
    of 16k + 1) or in the middle of equal cells (Transformer, sides of 16k).
    """

    align_corners: bool

    def __init__(self, trunk, channels, num_classes):
        super().__init__()
        self.trunk, self.channels = trunk, channels
        self.dropout = nn.Dropout(0.0)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)

    def features(self, images):
        """(B, 3, H, W) -> (B, D, h, w); each kind of network has its own."""
        raise NotImplementedError

    def forward(self, images):
        return self.classifier(self.dropout(self.features(images)))                 # (B, D, h, w) -> (B, C, h, w)


class ConvolutionalNetwork(ActivationNetwork):
    """A torchvision CNN at stride 16: h = ceil(H / 16)."""

    align_corners = True

    def features(self, images):
        """(B, 3, H, W) -> (B, D, h, w)."""
        return self.trunk(images)


class TransformerNetwork(ActivationNetwork):
    """A torchvision VisionTransformer whose patches are the positions; other sides are resized to the next 16k."""

    align_corners = False

    def features(self, images, return_attention=False):
        """(B, 3, H, W) -> (B, D, h, w), with `return_attention` also the class token's attention (B, 1, h, w).

        The attention is the mean over heads and blocks (OURS: all blocks, so that no depth is chosen), rescaled to sum
        to 1 over the patches: one more alpha for `class_scores`.
        """
        encoder = self.trunk.encoder
        h, w = (math.ceil(side / STRIDE) for side in images.shape[-2:])
        if images.shape[-2:] != (h * STRIDE, w * STRIDE):
            images = F.interpolate(images, (h * STRIDE, w * STRIDE), mode="bilinear", align_corners=False)
        patches = self.trunk.conv_proj(images).flatten(2).transpose(1, 2)           # (B, D, h, w) -> (B, N, D)
        tokens = torch.cat([self.trunk.class_token.expand(len(images), -1, -1), patches], 1)    # (B, 1 + N, D)
        tokens = encoder.dropout(tokens + self.position_embedding(h, w))
        attention = 0.0
        for block in encoder.layers:
            if not return_attention:
                tokens = block(tokens)
                continue
            query = block.ln_1(tokens)                                              # the block's own steps, one by one
            change, weights = block.self_attention(query, query, query)
            tokens = tokens + block.dropout(change)
            tokens = tokens + block.mlp(block.ln_2(tokens))
            attention = attention + weights[:, :1, 1:].float()                      # (B, 1, N), mean over heads
        features = encoder.ln(tokens)[:, 1:].transpose(1, 2).unflatten(2, (h, w))   # (B, 1 + N, D) -> (B, D, h, w)
        if not return_attention:
            return features
        return features, (attention / attention.sum(-1, keepdim=True)).unflatten(2, (h, w))

    def position_embedding(self, h, w):
        """The embedding of the class token and of a h x w grid of patches: (1, 1 + h*w, D), interpolated (bicubic)."""
        embedding = self.trunk.encoder.pos_embedding                                # (1, 1 + n*n, D)
        side = math.isqrt(embedding.shape[1] - 1)
        if (h, w) == (side, side):
            return embedding
        grid = embedding[:, 1:].transpose(1, 2).unflatten(2, (side, side))          # (1, D, n, n)
        grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return torch.cat([embedding[:, :1], grid], 1)

    def forward(self, images, return_attention=False):
        """(B, 3, H, W) -> activations (B, C, h, w), with `return_attention` also the attention (B, 1, h, w)."""
        if not return_attention:
            return super().forward(images)
        features, attention = self.features(images, return_attention=True)
        return self.classifier(self.dropout(features)), attention


def build_network(backbone, num_classes, weights="none"):
    """A network from images to activations, with drop-path on every residual branch, all rates 0.

    backbone: one of BACKBONES. weights: "none"; "imagenet", torchvision's for CNNs (version 1, on which the field's
    CAMs are made) and DeiT's published ones; or the path of a file: a state dict in torchvision's naming or in DeiT's.
    The classifier is new in every case. Raises InputError for an unknown backbone, a file that does not fit and a
    download that fails.
    """
    if backbone not in BACKBONES:
        raise InputError(f"unknown backbone {backbone!r}: take one of {', '.join(BACKBONES)}")
    if backbone in DEITS:
        width, heads, _ = DEITS[backbone]
        trunk = torchvision.models.VisionTransformer(224, STRIDE, 12, heads, width, mlp_dim=4 * width)
        trunk.heads, kind = nn.Identity(), TransformerNetwork
    else:
        trunk, kind = torchvision.models.get_model(backbone), ConvolutionalNetwork
    if weights != "none":
        load_pretrained(trunk, backbone, weights)
    if backbone == "mobilenet_v2":
        trunk, channels = trunk.features, trunk.last_channel
        keep_stride(trunk[14:])
    elif backbone in CNNS:
        channels = trunk.fc.in_features
        keep_stride(trunk.layer4)
        trunk = nn.Sequential(OrderedDict(list(trunk.named_children())[:-2]))       # without avgpool and fc
    else:
        channels = width
    add_drop_path(trunk)
    return kind(trunk, channels, num_classes)


def keep_stride(stage):
    """Let the stage that would go from stride 16 to 32 stay at 16, dilating what follows its strided convolution."""
    for conv in (module for module in stage.modules() if isinstance(module, nn.Conv2d)):
        if conv.stride == (2, 2):
            conv.stride = (1, 1)
        elif conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (2, 2)


def add_drop_path(trunk):
    """Put torchvision's StochasticDepth, rate 0, at the end of every residual branch."""
    def drop_path():
        return StochasticDepth(0.0, mode="row")
    for block in list(trunk.modules()):
        if isinstance(block, BasicBlock):
            block.bn2 = nn.Sequential(block.bn2, drop_path())
        elif isinstance(block, Bottleneck):
            block.bn3 = nn.Sequential(block.bn3, drop_path())
        elif isinstance(block, InvertedResidual) and block.use_res_connect:
            block.conv.append(drop_path())
        elif isinstance(block, EncoderBlock):
            block.dropout = drop_path()                         # follows the attention; torchvision's is idle at rate 0
            block.mlp.append(drop_path())


def load_pretrained(trunk, backbone, weights):
    """Load ImageNet weights into a torchvision network without its classifier. See `build_network` for `weights`."""
    try:
        if weights == "imagenet" and backbone in DEITS:
            state = torch.hub.load_state_dict_from_url(DEITS[backbone][2], progress=False, check_hash=True)
        elif weights == "imagenet":
            versions = torchvision.models.get_model_weights(backbone)
            state = versions["IMAGENET1K_V1"].get_state_dict(progress=False, check_hash=True)
        else:
            state = load_checkpoint(weights, "pass --weights imagenet, none, or the path of a state dict")
    except (OSError, RuntimeError) as error:                    # no network, a full disk; another hash
        raise InputError(f"the ImageNet weights of {backbone} could not be downloaded ({error}): pass --weights FILE "
                         "with a state dict, or --weights none") from error
    state = state.get("model", state)                           # DeiT's files keep the weights under this key
    if "patch_embed.proj.weight" in state:
        state = convert_deit(state)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "classifier.", "heads."))}
    try:
        missing, unexpected = trunk.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError) as error:             # another shape; not a state dict
        missing, unexpected = [str(error).splitlines()[-1].strip()], []
    wrong = [name for name in missing + unexpected if not name.startswith(("fc.", "classifier.", "heads."))]
    if wrong:
        raise InputError(f"weights {weights} do not fit {backbone} (first: {wrong[0]}): pass the --backbone they were "
                         "made for")


def convert_deit(state):
    """DeiT's published names -> torchvision's VisionTransformer's: a state dict without the classifier."""
    renames = (("blocks.", "encoder.layers.encoder_layer_"), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."),
               (".attn.qkv.", ".self_attention.in_proj_"), (".attn.proj.", ".self_attention.out_proj."),
               (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.3."), ("patch_embed.proj.", "conv_proj."),
               ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"))
    converted = {}
    for name, tensor in state.items():
        if name.startswith("norm."):
            name = "encoder.ln." + name.removeprefix("norm.")
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        if not name.startswith("head"):
            converted[name] = tensor
    return converted


def fitting_size(size, align_corners):
    """The (H, W) nearest to `size` on which positions fall exactly: 16k + 1 with aligned corners, else 16k."""
    return tuple(max(1, round(side / STRIDE)) * STRIDE + int(align_corners) for side in size)


def multi_scale_activations(network, image, base, scales, flip):
    """Activations of one image at several scales, each with its mirror image.

    image (1, 3, H, W); base (H, W) of scale 1, changed to a `fitting_size`; scales, a list of floats; flip, a bool ->
    a list of (1, C, h_k, w_k), mirrored back, one for each scale and flip.
    """
    activations = []
    for scale in scales:
        size = fitting_size((base[0] * scale, base[1] * scale), network.align_corners)
        view = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        view = torch.cat([view, view.flip(-1)]) if flip else view                   # (1 or 2, 3, H_k, W_k)
        s = network(view.contiguous(memory_format=torch.channels_last))
        activations += [s[:1], s[1:].flip(-1)] if flip else [s]
    return activations


def score_images(network, images, temperature, attention=False):
    """The class scores s~ that L_GEN sees: images (B, 3, H, W) -> (B, C), float32; `attention` as in train_cls.py."""
    with fast_autocast(images.device):
        s, alpha = network(images, return_attention=True) if attention else (network(images), None)
    return class_scores(s, spatial_activation_distribution(s, temperature) if alpha is None else alpha)


def freeze_batchnorm(network):
    """Let BatchNorm use its statistics and weights as they are; to be called again after network.train()."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def fast_autocast(device):
    """A context of bfloat16 autocast where the device computes in it natively, of plain float32 elsewhere."""
    if device.type == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        native = features.get("avx512_bf16") or features.get("amx_bf16")
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(native))


# ======================================================================================================================
# 3. The data and the run folder
# ======================================================================================================================

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
VOID = 255                      # the value of mask pixels that no metric and no loss counts

# ---- Reading: the layouts of PASCAL VOC and MS COCO ------------------------------------------------------------------


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that says what to do."""


@contextmanager
def one_line_errors(how_to_go_on):
    """End a script on bad input, a full disk or Ctrl-C with one line on stderr: exit code 2, for Ctrl-C 130.

    A script that comes to its end leaves torchrun's process group.
    """
    owner, name = os.getpid(), Path(sys.argv[0]).name

    def stop(*_):                           # at once: an exception can get lost in a callback, and no file is half written
        if os.getpid() == owner:            # loaders' workers leave it to the process that they work for
            os.write(2, f"\n{name}: interrupted; {how_to_go_on}\n".encode())
            os._exit(130)
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except InputError as error:             # out of a loader's worker it comes with a traceback around its message
        message, code = str(error).strip().splitlines()[-1].removeprefix("usage.InputError: "), 2
    except OSError as error:
        message, code = f"{error}: make room or give access there, then {how_to_go_on}", 2
    except torch.OutOfMemoryError:
        message, code = "the device's memory is full: pass a smaller --batch-size or --size", 2
    else:
        if torch.distributed.is_initialized():                  # its threads must end before Python does
            torch.distributed.destroy_process_group()
        return
    finally:
        signal.signal(signal.SIGINT, before)
    sys.stderr.write(f"\n{name}: {message}\n")
    sys.stderr.flush()
    os._exit(code) if torch.distributed.is_initialized() else sys.exit(code)    # other processes may wait in a collective


class VocFolder:
    """A data set in PASCAL VOC's layout.

        JPEGImages/<id>.jpg (or .png)      SegmentationClass/<id>.png, only opened to evaluate
        ImageSets/Segmentation/<split>.txt an id a line
        labels.json                        {id: [class names]}; without it Annotations/<id>.xml
        classes.txt                        a name a line; without it VOC's 20

    root: the folder. Raises InputError, here and in every method, for whatever is missing or does not fit.
    """

    def __init__(self, root, download=False):
        if download:
            try:
                torchvision.datasets.VOCSegmentation(root, year="2012", image_set="train", download=True)
            except (OSError, RuntimeError) as error:
                raise InputError(f"PASCAL VOC 2012 could not be downloaded ({error}): fetch VOCtrainval_11-May-2012.tar "
                                 f"by hand, unpack it in {root} and leave --download away") from error
        nested = Path(root, "VOCdevkit", "VOC2012")             # where the archive of VOC unpacks
        self.root = nested if nested.is_dir() else Path(root)
        if not self.root.is_dir():
            raise InputError(f"{root}: no such folder; pass --data FOLDER in VOC's layout, --data toy, or add --download")
        names = self.root / "classes.txt"
        self.classes = names.read_text().split("\n") if names.is_file() else VOC_CLASSES
        self.classes = [name.strip() for name in self.classes if name.strip()]
        self.masks = self.root / "SegmentationClass"
        images = self.root / "JPEGImages"
        if not images.is_dir():
            raise InputError(f"{images}: no such folder; put the photographs there, as <id>.jpg or <id>.png")
        self.images = {path.stem: path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")}

    def has_split(self, split):
        """Whether there is a list of that name."""
        return (self.root / f"ImageSets/Segmentation/{split}.txt").is_file()

    def split(self, split):
        """The ids of a split, in the list's order."""
        path = self.root / f"ImageSets/Segmentation/{split}.txt"
        if not path.is_file():
            raise InputError(f"{path}: no such list; write the ids of the split into it, one a line")
        ids = path.read_text().split()
        if not ids:
            raise InputError(f"{path}: the list is empty; write the ids of the split into it, one a line")
        for name in ids:
            if name not in self.images:
                raise InputError(f"{self.root / 'JPEGImages' / name}.jpg: no such image; add it or take {name} out of "
                                 f"{path}")
        return ids

    def labels(self, ids):
        """Image-level labels: (len(ids), C), float32 in {0, 1}."""
        index = {name: c for c, name in enumerate(self.classes)}
        labels = torch.zeros(len(ids), len(index))
        path = self.root / "labels.json"
        table = read_json(path) if path.is_file() else None
        for row, name in zip(labels, ids):
            if table is not None and not (isinstance(table, dict) and isinstance(table.get(name), list)):
                raise InputError(f"{path}: image {name} has no list of classes; add \"{name}\": [class names]")
            where = path if table is not None else self.root / f"Annotations/{name}.xml"
            for label in table[name] if table is not None else object_names(where):
                if str(label) not in index:
                    raise InputError(f"{where}: image {name} has the unknown class {label!r}; correct it or add it to "
                                     f"{self.root / 'classes.txt'}")
                row[index[str(label)]] = 1
        return labels

    def mask(self, name, size=None):
        """The true mask of an image as `read_mask` gives it."""
        return read_mask(self.masks / f"{name}.png", size, len(self.classes))


class CocoFolder:
    """MS COCO 2014 as it comes, with the methods of VocFolder.

        train2014/, val2014/        photographs; an id is a file name without its ending
        annotations/instances_train2014.json, annotations/instances_val2014.json

    The 80 classes stand in the order of COCO's category ids, without its gaps. Of a JSON only ids and labels are kept;
    `mask` reads it once more, with the outlines. A split of training leaves out images without any object.
    """

    masks = None

    def __init__(self, root):
        self.root, self.images, self.tables = Path(root), {}, {}
        for folder in ("train2014", "val2014"):
            if (self.root / folder).is_dir():
                self.images |= {path.stem: path for path in (self.root / folder).iterdir() if path.suffix == ".jpg"}
        self.classes = self.table("train")["classes"]

    def has_split(self, split):
        """Whether there is a JSON of that name."""
        return self.annotations(split).is_file()

    def annotations(self, split):
        """The path of a split's JSON."""
        return self.root / f"annotations/instances_{split}2014.json"

    def split(self, split):
        """The ids of a split, in the JSON's order."""
        ids = [name for name, labels in self.table(split)["labels"].items() if labels or split != "train"]
        if not ids:
            raise InputError(f"{self.annotations(split)}: no image with an object in it; take another file")
        for name in ids:
            if name not in self.images:
                raise InputError(f"{self.root}/{split}2014/{name}.jpg: no such image; {self.annotations(split)} lists it")
        return ids

    def labels(self, ids):
        """Image-level labels: (len(ids), C), float32 in {0, 1}. A crowd is an object like others."""
        labels = torch.zeros(len(ids), len(self.classes))
        for row, name in zip(labels, ids):
            row[list(self.table(self.home(name))["labels"][name])] = 1
        return labels

    def home(self, name):
        """The split that an id belongs to."""
        return "train" if name in self.table("train")["labels"] else "val"

    def mask(self, name, size=None):
        """The true mask of an image, drawn from its outlines: small objects over large ones, crowds void."""
        path = self.annotations(self.home(name))
        shape, objects = self.table(self.home(name), outlines=True)["outlines"][name]
        if size is not None and tuple(shape) != tuple(size):
            raise InputError(f"{path}: {name} is {shape[1]}x{shape[0]}, the file {size[1]}x{size[0]}; "
                             "take COCO's own photographs")
        mask = np.zeros(shape, np.uint8)
        for crowd, _, c, outline in sorted(objects, key=lambda entry: (not entry[0], -entry[1])):
            try:
                mask[draw_outline(outline, *shape)] = VOID if crowd else c + 1
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise InputError(f"{path}: an outline of {name} cannot be drawn ({error}); fetch it again") from error
        return torch.from_numpy(mask)

    def table(self, split, outlines=False):
        """What is kept of a JSON: "classes" [name], "labels" {id: {c}}, "outlines" {id: ((H, W), [object])} if wanted."""
        if split in self.tables and (not outlines or "outlines" in self.tables[split]):
            return self.tables[split]
        keep = {"images", "annotations", "categories", "id", "name", "file_name", "height", "width", "image_id",
                "category_id", "iscrowd", "area"} | ({"segmentation", "counts", "size"} if outlines else set())

        def compact(entry):                                     # while the JSON is read: the whole fills gigabytes
            kept = {key: entry[key] for key in keep & entry.keys()}
            if isinstance(kept.get("segmentation"), list):
                kept["segmentation"] = [np.array(polygon, np.float32) for polygon in kept["segmentation"]]
            return kept

        try:
            content = read_json(self.annotations(split), compact)
            names = {entry["id"]: Path(entry["file_name"]).stem for entry in content["images"]}
            categories = {entry["id"]: entry["name"] for entry in content["categories"]}
            index = {number: c for c, number in enumerate(sorted(categories))}
            labels = {name: set() for name in names.values()}
            for entry in content["annotations"]:
                labels[names[entry["image_id"]]].add(index[entry["category_id"]])
            table = {"classes": [categories[number] for number in index], "labels": labels}
            if outlines:
                drawn = {names[entry["id"]]: ((entry["height"], entry["width"]), []) for entry in content["images"]}
                for entry in content["annotations"]:
                    drawn[names[entry["image_id"]]][1].append(
                        (bool(entry["iscrowd"]), entry["area"], index[entry["category_id"]], entry["segmentation"]))
                table["outlines"] = drawn
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.annotations(split)}: not COCO's instances ({error!r}); fetch it again") from error
        self.tables[split] = table
        return table


class PhotoFolder:
    """Anybody's photographs: every image file in a folder, with the classes of a trained run and no labels."""

    masks = None

    def __init__(self, root, classes):
        self.root, self.classes, self.images = Path(root), list(classes), {}
        if not self.root.is_dir():
            raise InputError(f"{root}: no such folder; pass --images FOLDER with photographs in it")
        for path in sorted(self.root.iterdir()):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"):
                if path.stem in self.images:
                    raise InputError(f"{path}: there is another {path.stem}.*; results are named so, rename one of them")
                self.images[path.stem] = path
        if not self.images:
            raise InputError(f"{root}: no image files in it; pass --images FOLDER with photographs in it")

    def split(self, _):
        """The ids: file names without their endings."""
        return list(self.images)


class Photographs(torch.utils.data.Dataset):
    """Image (3, H, W), labels (C,), all 1 where none are given, and the id."""

    def __init__(self, data, ids, labels=None):
        self.ids, self.paths = ids, [data.images[name] for name in ids]
        self.labels = torch.ones(len(ids), len(data.classes)) if labels is None else labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return TO_TENSOR(read_image(self.paths[index])), self.labels[index], self.ids[index]


def draw_outline(outline, height, width):
    """An object of COCO's as (H, W) bool: a list of polygons [x, y, x, y, ...], or runs {"counts": ..., "size": [H, W]}.

    Runs go down the columns, first of background, then of the object, and so on: a list of lengths, or its compressed
    text: base 32 from character 48 on, lowest digits first, 32 for "more follows", from the fourth on as a difference to
    the length two before. Format: COCO's maskApi.
    """
    if isinstance(outline, list):
        fine = 4                                                    # drawn larger: Pillow's polygons include their edges
        canvas = Image.new("L", (fine * width, fine * height))
        for polygon in outline:
            ImageDraw.Draw(canvas).polygon([(fine * x, fine * y) for x, y in zip(polygon[::2], polygon[1::2])], fill=255)
        return np.array(canvas.reduce(fine)) > 127
    runs = outline["counts"]
    if isinstance(runs, str):
        text, runs, value, shift = runs, [], 0, 0
        for digit in (ord(character) - 48 for character in text):
            value |= (digit & 31) << shift
            shift += 5
            if not digit & 32:
                value -= (digit & 16) and 1 << shift                # the highest bit is the sign
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def open_data(root, download=False):
    """The data set in a folder: COCO's layout if it has one, else VOC's; "toy" is drawn to data/toy first."""
    if str(root) == "toy":
        root = draw_toy(Path("data/toy"))
    if Path(root, "annotations/instances_train2014.json").is_file():
        return CocoFolder(root)
    return VocFolder(root, download)


def read_json(path, each=None):
    """The contents of a .json file, `each` applied to every object in it; InputError where it is not one."""
    try:
        return json.loads(Path(path).read_bytes(), object_hook=each)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); repair or remove it") from error


def object_names(path):
    """The class names of the objects in one of VOC's annotation files."""
    try:
        return {node.findtext("name") for node in xml.etree.ElementTree.parse(path).getroot().iter("object")}
    except (OSError, xml.etree.ElementTree.ParseError) as error:
        raise InputError(f"{path}: not readable as an annotation ({error}); add it, or write labels.json") from error


def read_image(path):
    """An image file of any mode, turned upright, as a PIL image in RGB; InputError for a file that is none."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                      # 16-bit grey
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:                                  # PIL raises a dozen kinds on broken files
        raise InputError(f"{path}: not readable as an image ({error}); replace it or take it out of the list") from error


def read_mask(path, size, num_classes):
    """A label PNG as (H, W) uint8: 0 background, c + 1 for class c, 255 void.

    size: the (H, W) that it must have, None for any. InputError if it is missing, unreadable, in colour, of another
    size, or has a value above num_classes.
    """
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except Exception as error:
        raise InputError(f"{path}: not readable as a mask ({error}); add it or take its id out of the list") from error
    if mode not in ("P", "L"):
        raise InputError(f"{path}: a mask must be a palette or grey 8-bit PNG, this one is {mode}; convert it")
    if size is not None and mask.shape != tuple(size):
        raise InputError(f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}; they must "
                         "have one size")
    beyond = mask[(mask > num_classes) & (mask != VOID)]
    if beyond.size:
        raise InputError(f"{path}: value {beyond[0]}, but there are {num_classes} classes; correct the mask or the class "
                         "list")
    return torch.from_numpy(mask)


# ---- The toy scenes --------------------------------------------------------------------------------------------------

TOY_CLASSES = {  # what the head shows: hue that the body hints at, hue of the glow around
    "striped": (0.06, 0.52), "spotted": (0.97, 0.30), "ringed": (0.60, 0.13), "starred": (0.76, 0.42),
    "checked": (0.38, 0.86)}


def draw_toy(root, train=800, val=200, side=128):
    """Write the critters once: scenes in which classifiers find the wrong seeds, for the reasons that the paper names.

    A critter's small patterned head gives its class away; its body only hints at it (a CNN's seed covers the head
    alone). Most critters sit in a soft glow of their class's tint, which is not part of them (a Transformer's seed
    spreads beyond the critter). Headless stones share the bodies' colours. The same pictures on every machine, up to
    the JPEG library.
    Returns root; writes nothing if it is there.
    """
    if root.is_dir():
        return root
    drawn = root.with_name(f".partial-{root.name}")
    shutil.rmtree(drawn, ignore_errors=True)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (drawn / folder).mkdir(parents=True)
    labels = {}
    for split, count in (("train", train), ("val", val)):
        names = [f"{split}_{number:04d}" for number in range(count)]
        for number, name in enumerate(names):
            photo, mask = draw_scene(np.random.default_rng((count, number)), side)
            photo.save(drawn / f"JPEGImages/{name}.jpg", quality=95)
            save_mask(drawn / f"SegmentationClass/{name}.png", mask)
            labels[name] = [c for k, c in enumerate(TOY_CLASSES, start=1) if (mask == k).any()]
        (drawn / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    (drawn / "labels.json").write_text(json.dumps(labels))
    (drawn / "classes.txt").write_text("\n".join(TOY_CLASSES) + "\n")
    os.replace(drawn, root)
    return root


def draw_scene(rng, side):
    """One toy scene: (PIL image, mask (side, side) uint8)."""
    sky, ground = (np.array(colorsys.hsv_to_rgb(rng.uniform(*hues), rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.95)))
                   for hues in ((0.5, 0.65), (0.1, 0.4)))
    fog = Image.fromarray((rng.random((5, 5)) * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    fog = np.asarray(fog)[..., None] / 255 - 0.5
    y, x = np.mgrid[:side, :side] / side                        # pixels in units of the side
    blend = np.clip((y - rng.uniform(0.2, 0.6)) * 4 + fog[..., 0], 0, 1)[..., None]
    scene = sky * (1 - blend) + ground * blend + 0.25 * fog     # (side, side, 3) in about [0, 1]

    critters = []
    for kind in rng.permutation(len(TOY_CLASSES))[:rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])]:
        for _ in range(20):                                     # tries to find a free place
            length = rng.uniform(0.15, 0.23)
            place = rng.uniform(1.4 * length, 1 - 1.4 * length, 2)
            if all(np.hypot(*(place - other[2])) > 1.25 * (length + other[1]) for other in critters):
                critters.append((kind, length, place, rng.uniform(-0.5, 0.5), rng.choice([-1, 1])))
                break
    for kind, length, place, tilt, _ in critters:
        if rng.random() < 0.7:                                  # the glow: no part of the critter
            tint = np.array(colorsys.hsv_to_rgb(list(TOY_CLASSES.values())[kind][1], 0.75, 0.95))
            u, v = rotate(x - place[0], y - place[1], -tilt)
            glow = 0.25 * np.clip(2.3 - np.hypot(u / length, v / (0.75 * length)), 0, 1)[..., None]
            scene = scene * (1 - glow) + tint * glow

    fine = 3                                                    # drawn three times as large, for smooth edges
    photo = Image.fromarray((np.clip(scene, 0, 1) * 255).astype(np.uint8)).resize((fine * side,) * 2)
    mask = Image.new("L", (side, side))
    pens = ImageDraw.Draw(photo), ImageDraw.Draw(mask)
    for _ in range(rng.integers(1, 4)):
        radius, place = rng.uniform(0.03, 0.08), rng.uniform(0.05, 0.95, 2)
        stone = place + radius * ellipse(1.3, 0.9, rng.uniform(0, 3))
        paint(pens, stone, colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.8)), 0, side)
    for kind, length, place, tilt, facing in critters:
        draw_critter(pens, rng, kind, place, length, tilt, facing, side)
    return photo.resize((side, side), Image.Resampling.BOX), np.array(mask)


def draw_critter(pens, rng, kind, place, length, tilt, facing, side):
    """Tail, legs, body, ear, patterned head: into photograph and mask."""
    hue = list(TOY_CLASSES.values())[kind][0] if rng.random() < 0.8 else rng.random()   # the body hints, no more
    value = rng.uniform(0.55, 0.85)
    body, shade, belly = (colorsys.hsv_to_rgb(hue, s, v) for s, v in (
        (0.45, value), (0.5, 0.75 * value), (0.3, min(1, 1.15 * value))))
    face, ink = (colorsys.hsv_to_rgb(list(TOY_CLASSES.values())[kind][0], s, v) for s, v in ((0.35, 1.0), (0.95, 0.35)))

    def part(points, colour):                                   # points in body lengths, the critter facing right
        u, v = rotate(points[:, 0], points[:, 1], tilt)
        paint(pens, place + length * np.stack([facing * u, v], -1), colour, kind + 1, side)

    def at(u, v, points):
        return np.array([u, v]) + points

    part(np.array([[-0.8, -0.1], [-1.35, -0.55], [-1.25, -0.65], [-0.7, -0.35]]), shade)
    for leg in (-0.55, -0.25, 0.3, 0.6):
        part(at(leg, 0.62, ellipse(0.1, 0.3)), shade)
    part(ellipse(1.0, 0.6), body)
    part(at(-0.05, 0.22, ellipse(0.7, 0.3)), belly)
    part(at(0.75, -0.75, ellipse(0.1, 0.25, 0.5)), shade)
    head, radius = np.array([0.9, -0.4]), 0.5
    part(head + ellipse(radius, radius), shade)
    part(head + ellipse(0.9 * radius, 0.9 * radius), face)
    pattern = list(TOY_CLASSES)[kind]
    if pattern == "striped":
        for u in (-0.24, 0.0, 0.24):
            part(head + np.array([[u - 0.06, -0.3], [u + 0.06, -0.3], [u + 0.06, 0.3], [u - 0.06, 0.3]]), ink)
    elif pattern == "spotted":
        for angle in np.arange(5) * 2 * np.pi / 5:
            part(head + 0.26 * np.array([np.cos(angle), np.sin(angle)]) + ellipse(0.1, 0.1), ink)
    elif pattern == "ringed":
        for r, colour in ((0.36, ink), (0.25, face), (0.14, ink)):
            part(head + ellipse(r, r), colour)
    elif pattern == "starred":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2, 0.16, 0.4)
        part(head + np.stack([reach * np.cos(angles), reach * np.sin(angles)], -1), ink)
    else:
        for square in range(0, 9, 2):                           # every other one of 3 x 3
            u, v = 0.21 * (square % 3) - 0.315, 0.21 * (square // 3) - 0.315
            part(head + np.array([[u, v], [u + 0.21, v], [u + 0.21, v + 0.21], [u, v + 0.21]]), ink)


def rotate(x, y, angle):
    """Coordinates turned by an angle in radians."""
    return np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y


def ellipse(a, b, angle=0.0):
    """(32, 2) points of an ellipse around the origin, half axes a and b."""
    t = np.arange(32) * 2 * np.pi / 32
    return np.stack(rotate(a * np.cos(t), b * np.sin(t), angle), -1)


def paint(pens, points, colour, label, side):
    """A filled polygon, points in units of the side, into photograph (drawn larger) and mask."""
    photo, mask = pens
    fine = photo.im.size[0]
    photo.polygon([tuple(p) for p in points * fine], fill=tuple(int(255 * channel) for channel in colour))
    mask.polygon([tuple(p) for p in points * side], fill=int(label))


# ---- Writing: pictures, checkpoints, logs ----------------------------------------------------------------------------


@contextmanager
def written(path):
    """Yield a temporary path in the same folder; at the end it becomes `path`, so that no partial file has that name."""
    path = Path(path)
    temporary = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def voc_palette():
    """VOC's colours: (256, 3) uint8; the bits of the label, spread over the channels from the highest bit down."""
    labels = np.arange(256)[:, None]
    bits = sum((labels >> (3 * bit + np.arange(3)) & 1) << (7 - bit) for bit in range(8))
    return bits.astype(np.uint8)


def save_mask(path, mask):
    """Write (H, W) integer labels as a PNG with VOC's palette."""
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8))
    image.putpalette(voc_palette().tobytes())
    with written(path) as temporary:
        image.save(temporary)


def overlay(photo, mask):
    """(3, H, W) uint8 with the labels of mask (H, W) laid over it in VOC's colours."""
    labels = [label for label in mask.unique().tolist() if label]
    if not labels:
        return photo
    return torchvision.utils.draw_segmentation_masks(photo, torch.stack([mask == label for label in labels]), alpha=0.65,
                                                     colors=[tuple(voc_palette()[label].tolist()) for label in labels])


def heat_map(photo, scores):
    """(3, H, W) uint8: the photograph in grey under scores (H, W) in [0, 1], from black over red to white."""
    heat = torch.stack([3 * scores, 3 * scores - 1, 3 * scores - 2]).clamp(0, 1)
    return (255 * (0.65 * heat + 0.35 * photo.float().mean(0) / 255)).byte()


def save_contact_sheet(path, data, ids, folders, scores=None, side=160):
    """Write one PNG of ten images: photograph | heat map | a label map of each folder | truth, where there are masks.

    scores: the folder of make_seeds.py's scores, for the heat map of the strongest class; None leaves that column out.
    """
    folders = folders + ([data.masks] if data.masks else [])
    tiles = []
    for name in ids[::max(1, len(ids) // 10)][:10]:
        photo = v2.functional.pil_to_tensor(read_image(data.images[name]))          # (3, H, W) uint8
        row = [photo]
        if scores:
            levels = torch.from_numpy(np.load(Path(scores, f"{name}.npz"))["levels"])
            row.append(heat_map(photo, levels.amax(0) / 255 if len(levels) else torch.zeros(photo.shape[1:])))
        for folder in folders:
            mask = Path(folder, f"{name}.png")
            row.append(overlay(photo, read_mask(mask, photo.shape[1:], len(data.classes))) if mask.is_file()
                       else torch.full_like(photo, 255))
        tiles += [v2.functional.resize(tile, [side, side], antialias=True) for tile in row]
    sheet = torchvision.utils.make_grid(tiles, nrow=2 * len(row), padding=4, pad_value=255)     # two images a line
    with written(path) as temporary:
        v2.functional.to_pil_image(sheet).save(temporary)


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values; OSError where it does not fit."""
    with written(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:                           # torch's way to say that the disk is full
            raise OSError(f"{path} could not be written ({str(error).splitlines()[0][:100]})") from error


def load_checkpoint(path, remedy):
    """A dict that torch.save wrote, tensors on the CPU; InputError, ending in `remedy`, where there is none."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not readable as a checkpoint ({reason[:100]}); {remedy}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: not a checkpoint but a {type(state).__name__}; {remedy}")
    return state


def resume(path, settings, parts):
    """Put what an interrupted training left at `path` into `parts` ({name: object with load_state_dict}).

    Returns the whole checkpoint, {} if there is none yet. InputError if it was made with other settings.
    """
    if not Path(path).is_file():
        return {}
    state = load_checkpoint(path, "remove it to start again")
    changed = [key for key in settings if state.get("settings", {}).get(key) != settings[key]]
    if changed:
        raise InputError(f"{path}: made with another {', '.join(changed)}; pass another --run, or remove it to start again")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


def record_settings(path, settings, results):
    """Write what results are made with to a .json file; InputError if those from before were made with something else."""
    before = read_json(path) if Path(path).is_file() else settings
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise InputError(f"{path}: its results were made with another {', '.join(changed)}; remove it and {results} beside "
                         "it to make them anew")
    with written(path) as temporary:
        temporary.write_text(json.dumps(settings))


def load_classifier(run):
    """The student of a finished stage 1 and the settings it was trained with."""
    path = Path(run) / "classifier.pt"
    state = load_checkpoint(path, f"run train_cls.py --run {run} first")
    try:
        settings, epoch = state["settings"], state["epoch"]
        epochs = settings["epochs"] + settings["reg_epochs"]
        network = build_network(settings["backbone"], len(settings["classes"]))
        network.load_state_dict(state["student"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: not a classifier of train_cls.py ({str(error).strip().splitlines()[0][:100]}); run "
                         f"train_cls.py with another --run") from error
    if epoch < epochs:
        raise InputError(f"{path}: {epoch} of {epochs} epochs done; run train_cls.py again, it goes on there")
    return network, settings


def check_classes(data, classes, run):
    """InputError unless the data's classes are those that the run was trained on."""
    if list(data.classes) != list(classes):
        raise InputError(f"{data.root}: its {len(data.classes)} classes are not the {len(classes)} of {run}; pass the "
                         "--data, or the --run, that belong together")


def refuse_truth(folder, data):
    """InputError if a folder of seeds is the folder of the true masks."""
    if data.masks and Path(folder).resolve() == data.masks.resolve():
        raise InputError(f"{folder}: is the folder of the true masks; seeds belong elsewhere, pass another folder")


class Log:
    """Appends a record to a .jsonl file and puts it, with images per second and the time left, into a line."""

    def __init__(self, path, total, done=0):
        self.path, self.total, self.first, self.start = Path(path), total, done, time.time()
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def line(self, done, **values):
        """done: images so far, out of total. Floats get four digits. Returns the line."""
        seconds = time.time() - self.start
        rate = (done - self.first) / max(seconds, 1e-9)
        left = (self.total - done) / max(rate, 1e-9)
        with self.path.open("a") as file:
            file.write(json.dumps({**values, "images_per_s": round(rate, 1), "seconds": round(seconds, 2)}) + "\n")
        shown = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in values.items())
        return f"{shown}  {rate:.1f} images/s  {int(left // 60)}:{int(left % 60):02d} left"


# ---- Processes and random numbers ------------------------------------------------------------------------------------


@contextmanager
def random_numbers(*key):
    """Inside, torch's random numbers on the CPU follow from the key (integers) alone; after it, they go on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash(key))
        yield


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(8, max(1, CORES // 2))        # OURS: on a CPU the rest computes


def start_processes(device, workers):
    """The device to compute on, after joining torchrun's other processes where there are any (nccl or gloo).

    device: "auto" takes CUDA where there is one. Returns (torch.device, rank, number of processes). InputError for a
    device that does not exist and for more loader workers than cores.
    """
    if not 0 <= workers <= CORES:
        raise InputError(f"--workers {workers}: this machine has {CORES} cores; pass 0 to {CORES}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device)
    except Exception as error:                                  # torch raises a different one for each kind of device
        raise InputError(f"--device {device}: not on this machine; pass cpu, or leave it away") from error
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device), int(os.environ.get("RANK", 0)), world
