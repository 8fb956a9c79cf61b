"""USAGE in plain PyTorch: seed areas for weakly supervised semantic segmentation.

Peng et al., "USAGE: A Unified Seed Area Generation Paradigm for Weakly Supervised Semantic Segmentation", ICCV 2023
(arXiv 2303.07806). "Source: Sec. 4.x" and `PAPER` mark what we know of the paper (its abstract, its overview figure and a
digest of it), `OURS` what these do not tell, though the paper may, and why we chose so.

    1. The paper         Sec. 4.1  spatial_activation_distribution (alpha), class_scores (s~), generation_loss (L_GEN)
                         Sec. 4.2  activation_unit (u), consistency_loss (L_REG), chance_loss, learning_status (q),
                                   set_adjustment, ema_teacher
    2. Seeds             seed_maps, spread_activations (patch affinity), label_map, refine_maps: the field's protocol
    3. The networks      build_network: a CNN or a Transformer from images to activations; activate; multi_scale_activations
    4. The data          DataFolder, the one layout; Photographs, the one data set; readers of images, masks and text
    5. The run folder    one-line errors, checkpoints, logs, settings, the training loop's frame, masks and seed maps

The functions of 1 and 2 need `import torch` and `import torch.nn.functional as F` and nothing else, not even each
other: copy any of them.

Letters: B images, C classes, K classes that an image has, D channels, h x w positions of the activation map (N = h*w),
H x W pixels of the image, s activation, alpha spatial activation distribution, y in {0, 1} image-level labels, q learning
status, u unit of L_REG, tau1 temperature of L_GEN, tau2 and tau2' of L_REG; a prime (') marks the teacher's. Seed: the pixels
first assigned to a class. CAM: class activation map. MIL: multiple-instance learning, an image has a class if some position has.
"""

import errno
import hashlib
import json
import math
import os
import signal
import sys
import time
import xml.etree.ElementTree
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

try:
    import fcntl  # where there is none (Windows), nothing keeps two processes out of one folder
except ImportError:
    fcntl = None

# ==== 1. The paper ====================================================================================================

# ---- Sec. 4.1, activation shape controlling: the generation loss -----------------------------------------------------


def spatial_activation_distribution(activations, temperature, log=False):
    """alpha: how much each position counts for the score of its class.

        alpha[c,i] = exp(s[c,i] / tau) / sum_j exp(s[c,j] / tau)

    activations (B, C, h, w), any floating type -> (B, C, h, w), float32, every map sums to 1; with `log` log alpha.
    temperature (tau) >= 0: `inf` is exactly uniform (CAM), 0 exactly one-hot at the maximum, the first one on a tie
    (MIL). Raises ValueError for a negative or NaN temperature, and for 0 with `log`. Source: Sec. 4.1.
    """
    if not temperature >= 0 or (log and temperature == 0):
        raise ValueError(f"temperature must be >= 0, for log alpha > 0, got {temperature}")
    s = activations.float().flatten(2)                                              # (B, C, h, w) -> (B, C, N)
    if temperature == 0:
        alpha = torch.zeros_like(s).scatter_(-1, s.argmax(-1, keepdim=True), 1.0)
    else:
        alpha = (torch.log_softmax if log else torch.softmax)(s / temperature, -1)
    return alpha.view(activations.shape)                                            # (B, C, N) -> (B, C, h, w)


def class_scores(activations, alpha):
    """s~: the score of each class, its activations weighted by its distribution.

        s~[c] = sum_i alpha[c,i] * s[c,i]

    activations (B, C, h, w), alpha (B, C, h, w) or (B, 1, h, w) -> (B, C), float32, unbounded. Source: Sec. 4.1.
    """
    return (alpha * activations.float()).sum((2, 3))                                # (B, C, h, w) -> (B, C)


def generation_loss(activations, alpha, labels):
    """L_GEN: classify the image through alpha, whose shape then shapes the seed.

        s~[c] = sum_i alpha[c,i] * s[c,i]
        L_GEN = - mean over images and classes of  y log sigmoid(s~) + (1 - y) log sigmoid(-s~)

    activations (B, C, h, w), alpha (B, C, h, w) or (B, 1, h, w), labels (B, C) in {0, 1} -> scalar >= 0, float32.
    The choice of alpha: uniform is CAM; one-hot at the maximum is multiple-instance learning; one distribution for all
    classes, such as a class token's attention, is class-to-patch attention; everything between is a temperature of
    `spatial_activation_distribution`. Source: Sec. 4.1.
    """
    scores = (alpha * activations.float()).sum((2, 3))                              # (B, C, h, w) -> (B, C)
    return F.multilabel_soft_margin_loss(scores, labels.float())


# ---- Sec. 4.2, activation shape regularization: two views by network adjustment --------------------------------------


def activation_unit(teacher_activations):
    """u: the unit in which student and teacher are compared, so that tau2 need not follow the scale of the activations.

        u[c] = max(1, standard deviation over positions of s'[c,i])

    teacher_activations (s', B, C, h, w) -> (B, C, 1, 1), float32, >= 1, without gradient. OURS: the scale of
    activations grows in training (EVIDENCE.md, The search, has 2.9 to 8); not below 1, lest noise be blown up.
    """
    return teacher_activations.detach().float().std((2, 3), correction=0, keepdim=True).clamp_min(1)


def consistency_loss(student_log_alpha, teacher_alpha, labels):
    """L_REG: pull the student's distribution to the teacher's, for the classes that the image has.

        alpha = softmax over i of s[c,i] / (u[c] * tau2),     alpha' = softmax over i of s'[c,i] / (u[c] * tau2')
        L_REG = mean over pairs (image, c) with y[c] = 1 of  sum_i alpha'[c,i] * (log alpha'[c,i] - log alpha[c,i])

    with s the student's activations, s' the teacher's, u the `activation_unit`: KL(teacher || student). These alphas are not
    L_GEN's: their temperatures are tau2 and tau2'.
    OURS: KL, the usual distance of distributions; what we know of the paper names none. A tau2' below tau2 makes the target
    sharper than a student of the same activations: L_REG then also raises the contrast of s, and keeps student and teacher
    from pulling each other towards flat maps.

    student_log_alpha (B, C, h, w), log-probabilities, so that the gradient lives where the student's alpha underflows;
    teacher_alpha (B, C, h, w), probabilities, zeros allowed; labels (B, C) in {0, 1} -> scalar >= 0, float32.
    No gradient reaches the teacher. 0 with zero gradients when no class is present. Source: Sec. 4.2.
    """
    divergence = F.kl_div(student_log_alpha.float(), teacher_alpha.detach().float(), reduction="none")
    present = labels.float()
    return (divergence.sum((2, 3)) * present).sum() / present.sum().clamp_min(1)    # (B, C, h, w) -> scalar


def chance_loss(labels):
    """The L_GEN that class frequencies alone reach, without a look at the image.

        chance = - mean over classes of  p[c] log p[c] + (1 - p[c]) log(1 - p[c]),   p[c] the share of images with c

    labels (images, C) in {0, 1}, of the whole training set -> float in [0, log 2]; 0 if no class tells images apart.
    """
    p = labels.double().mean(0)                                                     # (images, C) -> (C,)
    return (torch.special.entr(p) + torch.special.entr(1 - p)).mean().item()


def learning_status(running_loss, chance):
    """q: how far the classifier has come: 0 until it beats chance, towards 1 as L_GEN falls.

        q = clip(1 - running L_GEN / chance, 0, 1)

    OURS: the paper adapts to the learning status; what the frequencies of the classes alone reach gives it a scale.
    running_loss >= 0, chance > 0 (`chance_loss`), floats -> float in [0, 1]. Raises ValueError otherwise. Source: Sec. 4.2.
    """
    if not (running_loss >= 0 and chance > 0):
        raise ValueError(f"running_loss must be >= 0 and chance > 0, got {running_loss} and {chance}")
    return max(0.0, 1.0 - running_loss / chance)


def set_adjustment(network, rate):
    """Adjust a network: drop whole residual branches, deeper ones more often, and features before the classifier.

    Call it with rate = max_rate * q for the student and rate = weak_ratio * max_rate * q for the teacher (OURS: linear in q,
    the simplest rule that is 0 at the start).

    Sets `p` of every StochasticDepth (torchvision's drop-path, which drops a branch for single images; found by its name)
    to `rate * k / n` for the k-th of n in module order, and `p` of `network.dropout` to `rate`. Both act in training mode
    only; at rate 0 the network is exactly the plain one. rate in [0, 1], ValueError outside of it. Source: Sec. 4.2; OURS:
    branches and features, where the paper's figure shows parts of layers dropped.
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

    The first call copies the student. The averaged network is `teacher.module`; called in training mode, so that its
    adjustment acts, it also moves its own BatchNorm statistics, which the next average then mixes with the student's.
    decay in [0, 1]. Source: Sec. 4.2.
    """
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    return torch.optim.swa_utils.AveragedModel(student, multi_avg_fn=average, use_buffers=True)


# ==== 2. Seeds and pseudo masks: the field's protocol, not the paper ==================================================


def seed_maps(activations, size):
    """From activations at several scales and flips to one map for each class, of the image's size.

        seed[c] = m[c] / max over pixels of m[c],   m = sum over scales and flips of ReLU(s), enlarged bilinearly

    activations: a list of (B, K, h_k, w_k), of the present classes, flips already mirrored back; size (H, W) ->
    (B, K, H, W) in [0, 1], float32; 0 where a class is positive nowhere.
    Source: IRN (Ahn et al., CVPR 2019), MCTformer (Xu et al., CVPR 2022), like whom we enlarge with align_corners=False. A
    CNN's outermost positions lie on the outermost pixels if the side is 16n + 1, so that this moves everything towards the
    middle, by the factor (16n + 1) / (16n + 16). IRN enlarges to the next multiple of 16 and crops; we enlarge to the size.
    """
    total = sum(F.interpolate(s.float().relu(), size, mode="bilinear", align_corners=False) for s in activations)
    return total / total.amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def spread_activations(activations, affinity):
    """Patch affinity, for Transformers: each patch takes on the activations of the patches that it attends to.

        s[c,i] <- sum_j A[i,j] * ReLU(s[c,j])

    activations (B, C, h, w), affinity (B, N, N): attention among patches, rows attend to columns -> (B, C, h, w),
    float32, >= 0.
    Source: MCTformer (Xu et al., CVPR 2022), which sums A over all blocks.
    """
    s = activations.float().relu().flatten(2)                                       # (B, C, h, w) -> (B, C, N)
    return (s @ affinity.float().transpose(1, 2)).view(activations.shape)           # (B, C, N) -> (B, C, h, w)


def label_map(maps, threshold, classes=None):
    """The strongest class of each pixel, background (0) where no class exceeds the threshold.

    maps (B, K, H, W), threshold in the same unit; classes (K,), the numbers of the classes that the maps are of, where
    they are not 0 ... K - 1 -> (B, H, W) int64 with 0 background and c + 1 for class c.
    """
    winner = F.pad(maps, (0, 0, 0, 0, 1, 0), value=threshold).max(1).indices        # (B, H, W), 0 where none exceeds it
    return winner if classes is None else F.pad(classes + 1, (1, 0))[winner]


def refine_maps(images, maps, threshold, dilations=(1, 2, 4, 8, 12, 24), iterations=20):
    """Pixel-adaptive mask refinement: each pixel of a seed map takes on the values of neighbours that look like it.

        p[i] = sigmoid((seed[i] - threshold) / 0.1)
        a[i,j] = softmax over j of  - mean over colours |x[i] - x[j]| / (0.1 * sigma[i]),  sigma[i] for each colour
        p[i] <- sum_j a[i,j] * p[j],  `iterations` times;   back to a map by  threshold + 0.1 * logit(p)

    j runs over the 8 neighbours at each dilation; sigma[i] is the deviation of a colour among these 48.
    images (B, 3, H, W) in any unit, maps (B, K, H, W) in [0, 1], threshold in [0, 1] -> (B, K, H, W) in [0, 1], on
    which the threshold means what it did before. Works at a longer side of 160 pixels at most.
    Source: PAMR (Araslanov & Roth, CVPR 2020), whose dilations and whose 0.1 in a these are; it takes sigma over 54, the
    centre once for each dilation. OURS: p and its width of 0.1, so that the threshold is the background's value, as in AFA
    (Ru et al., CVPR 2022); 20 iterations for their 10; the 160 pixels, which widen the reach and take less time.
    """
    size, shrink = maps.shape[-2:], min(1, 160 / max(maps.shape[-2:]))
    h, w = (max(1, round(side * shrink)) for side in size)
    x = F.interpolate(images.float(), (h, w), mode="bilinear", align_corners=False, antialias=True)
    p = F.interpolate(((maps.float() - threshold) / 0.1).sigmoid(), (h, w), mode="bilinear", align_corners=False)
    reach = max(dilations)
    corners = [(reach + d * dy, reach + d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]

    def neighbours(picture):
        """48 copies, each shifted towards one neighbour."""
        padded = F.pad(picture, (reach,) * 4, mode="replicate")
        return [padded[..., y:y + h, x:x + w] for y, x in corners]

    around = neighbours(x)                                                          # 48 of (B, 3, h, w)
    mean = sum(around) / len(around)
    sigma = (sum((y - mean) ** 2 for y in around) / (len(around) - 1)).sqrt() + 1e-8                    # (B, 3, h, w)
    a = torch.stack([((y - x).abs() / (-0.1 * sigma)).mean(1, keepdim=True) for y in around]).softmax(0)  # (48, B, 1, h, w)
    for _ in range(iterations):
        spread = torch.zeros_like(p)                                                # (B, K, h, w)
        for weight, neighbour in zip(a, neighbours(p)):
            spread.addcmul_(weight, neighbour)
        p = spread
    p = F.interpolate(p, size, mode="bilinear", align_corners=False).clamp(1e-6, 1 - 1e-6)
    return (threshold + 0.1 * p.logit()).clamp(0, 1)                                # (B, K, H, W)


# ==== 3. The networks =================================================================================================

CNNS = ("mobilenet_v2", "resnet18", "resnet50", "resnet101")
DEITS = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12)}      # width D, attention heads
BACKBONES = CNNS + tuple(DEITS)
STRIDE = 16                     # one position of the map for 16 x 16 pixels: the field's custom, and DeiT's patch
AFFINITY_BLOCKS = 6             # OURS: patch affinity is the mean over the last blocks, see EVIDENCE; MCTformer sums over all
TO_TENSOR = v2.Compose([        # a PIL image -> (3, H, W), with ImageNet's mean and deviation
    v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])


class ActivationNetwork(nn.Module):
    """Images (B, 3, H, W) of any size, normalised as by TO_TENSOR -> activations (B, C, h, w).

    s[c,i] = w_c . f_i + b_c: a 1x1 convolution on the trunk's features f, without ReLU. h = ceil(H / 16). In bfloat16
    where the device computes in it.
    """

    def __init__(self, trunk, channels, num_classes, frozen):
        super().__init__()
        self.trunk, self.frozen = trunk, frozen
        self.dropout = nn.Dropout(0.0)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, images, return_attention=False):
        """(B, 3, H, W) -> activations (B, C, h, w), with `return_attention` also the attention of a PatchTransformer."""
        with fast_autocast(images.device):
            features, attention = self.trunk(images, True) if return_attention else (self.trunk(images), None)
            s = self.classifier(self.dropout(features))                             # (B, D, h, w) -> (B, C, h, w)
        return (s, attention) if return_attention else s

    def fitting_size(self, size):
        """An (H, W) near `size` on which positions fall evenly."""
        beyond = 0 if isinstance(self.trunk, PatchTransformer) else 1       # a CNN's outermost lie on the edge at 16k + 1
        return tuple(max(1, round(side / STRIDE)) * STRIDE + beyond for side in size)

    def train(self, mode=True):
        """As torch's; if `frozen`, the trunk's BatchNorm uses its statistics and weights as they are, in training too."""
        super().train(mode)
        for module in self.trunk.modules():
            if self.frozen and isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        return self


class PatchTransformer(torchvision.models.VisionTransformer):
    """torchvision's, with the patches as positions; an image whose sides are no 16k is resized to the next."""

    def forward(self, images, return_attention=False):
        """(B, 3, H, W) -> (B, D, h, w), and with `return_attention` each block's attention (B, blocks, 1 + N, 1 + N).

        Attention: rows attend to columns, the class token first, the mean over heads.
        """
        encoder, embedding = self.encoder, self.encoder.pos_embedding               # (1, 1 + n*n, D)
        h, w = (math.ceil(side / STRIDE) for side in images.shape[-2:])
        if images.shape[-2:] != (h * STRIDE, w * STRIDE):
            images = F.interpolate(images, (h * STRIDE, w * STRIDE), mode="bilinear", align_corners=False)
        patches = self.conv_proj(images)                                            # (B, D, h, w)
        n = math.isqrt(embedding.shape[1] - 1)
        grid = embedding[:, 1:].transpose(1, 2).unflatten(2, (n, n))                # (1, n*n, D) -> (1, D, n, n)
        patches = patches + F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)
        token = (self.class_token + embedding[:, :1]).expand(len(images), -1, -1)   # (B, 1, D)
        tokens = torch.cat([token, patches.flatten(2).transpose(1, 2)], 1)          # (B, 1 + N, D)
        attention = []
        for block in encoder.layers:
            query = block.ln_1(tokens)
            change, weights = block.self_attention(query, query, query, need_weights=return_attention)
            tokens = tokens + block.dropout(change)         # here and in mlp build_network puts drop-path
            tokens = tokens + block.mlp(block.ln_2(tokens))
            attention.append(weights)
        features = encoder.ln(tokens)[:, 1:].transpose(1, 2).unflatten(2, (h, w))   # (B, 1 + N, D) -> (B, D, h, w)
        return (features, torch.stack(attention, 1).float()) if return_attention else features


def build_network(backbone, num_classes, state=None, frozen=False):
    """A network from images to activations, with drop-path on every residual branch, all rates 0.

    backbone: one of BACKBONES; state: torchvision's state dict of it without the classifier, which is new in every case;
    frozen: BatchNorm stays as it is, the field's custom for pretrained CNNs.
    Raises InputError for an unknown backbone and RuntimeError for a state that does not fit.
    """
    if backbone not in BACKBONES:
        raise InputError(f"unknown backbone {backbone!r}: take one of {', '.join(BACKBONES)}")
    if backbone in DEITS:
        channels, heads = DEITS[backbone]
        trunk = PatchTransformer(224, STRIDE, 12, heads, channels, mlp_dim=4 * channels)     # 12 blocks, for 224 x 224 pixels
        trunk.heads = nn.Identity()
    elif backbone == "mobilenet_v2":
        model = torchvision.models.mobilenet_v2()
        trunk, channels = model.features, model.last_channel
    else:
        model = torchvision.models.get_model(backbone)
        trunk = nn.Sequential(OrderedDict(list(model.named_children())[:-2]))       # without avgpool and fc
        channels = model.fc.in_features
    if state is not None:
        trunk.load_state_dict(state)
    if backbone in CNNS:
        # The stage that would go from stride 16 to 32 stays at 16, dilated after its strided convolution. OURS: IRN does
        # not dilate there; dilated, a pretrained layer sees what it was trained on.
        stage = trunk[14:] if backbone == "mobilenet_v2" else trunk.layer4       # from the first block at stride 32
        for conv in (module for module in stage.modules() if isinstance(module, nn.Conv2d)):
            if conv.stride == (2, 2):
                conv.stride = (1, 1)
            elif conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)
    # Every residual branch ends with torchvision's drop-path; an InvertedResidual may be without a shortcut.
    ends = {"BasicBlock": ["bn2"], "Bottleneck": ["bn3"], "InvertedResidual": ["conv"], "EncoderBlock": ["dropout", "mlp"]}
    for block in list(trunk.modules()):
        if getattr(block, "use_res_connect", True):
            for name in ends.get(type(block).__name__, []):
                setattr(block, name, nn.Sequential(getattr(block, name), torchvision.ops.StochasticDepth(0.0, mode="row")))
    return ActivationNetwork(trunk, channels, num_classes, frozen).train()


def activate(network, images, temperature, attention=False):
    """Activations, and the alpha that L_GEN weighs them by: of a temperature, or the class token's attention.

    images (B, 3, H, W) -> s (B, C, h, w) and alpha (B, C, h, w), or with `attention` (B, 1, h, w): the mean over heads
    and blocks (OURS: all blocks, so that no depth is chosen), rescaled to sum to 1 over the patches.
    """
    if not attention:
        s = network(images)
        return s, spatial_activation_distribution(s, temperature)
    s, weights = network(images, return_attention=True)
    weights = weights[:, :, 0, 1:].mean(1)                                          # (B, blocks, 1 + N, 1 + N) -> (B, N)
    return s, (weights / weights.sum(1, keepdim=True)).view(len(s), 1, *s.shape[2:])


def multi_scale_activations(network, image, longer, scales, flip, affinity=False):
    """Activations of one image at several scales, each with its mirror image.

    image (1, 3, H, W); longer: its longer side at scale 1 in pixels, up to `fitting_size`; scales: floats; flip: a bool;
    affinity: spread them by the patches' attention -> a list of (1, C, h_k, w_k), mirrored back, for each scale and flip.
    """
    activations = []
    for scale in scales:
        size = network.fitting_size([scale * (side * longer / max(image.shape[-2:])) for side in image.shape[-2:]])
        view = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        view = torch.cat([view, view.flip(-1)]) if flip else view                   # (1 or 2, 3, H_k, W_k)
        view = view.contiguous(memory_format=torch.channels_last)
        if affinity:
            s, attention = network(view, return_attention=True)
            s = spread_activations(s, attention[:, -AFFINITY_BLOCKS:, 1:, 1:].mean(1))
        else:
            s = network(view)
        activations += [s[:1], s[1:].flip(-1)] if flip else [s]
    return activations


def fast_autocast(device):
    """A context of bfloat16 autocast where the device computes in it natively, of plain float32 elsewhere."""
    if device.type == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        native = features.get("avx512_bf16") or features.get("amx_bf16")
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(native))


# ==== 4. The data =====================================================================================================

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
VOID = 255                      # the value of mask pixels that no metric and no loss counts
VOC_PALETTE = sum(              # (256, 3): the bits of the label, spread over the channels from the highest bit down
    (np.arange(256)[:, None] >> (3 * bit + np.arange(3)) & 1) << (7 - bit) for bit in range(8)).astype(np.uint8)


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that says what to do."""


def fail(message):
    """Raise InputError: what argparse calls instead of its own usage text."""
    raise InputError(message)


@contextmanager
def reading(path, remedy):
    """Whatever fails inside becomes an InputError: the path, the reason in short, and the remedy."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:                                  # PIL, torch and json raise dozens of kinds on broken files
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise InputError(f"{path}: {' '.join(reason.split())[:160]}; {remedy}") from error


def read_lines(path, remedy):
    """The lines of a UTF-8 text, with or without a byte order mark, stripped, without empty ones; at least one."""
    with reading(path, f"{remedy}, as UTF-8"):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    return [line for line in lines if line] or fail(f"{path}: is empty; {remedy}")


def read_json(path, keys=(), remedy="repair or remove it"):
    """The object in a .json file, which has at least these keys."""
    with reading(path, remedy):
        table = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(table, dict) or not set(keys) <= table.keys():
        raise InputError(f"{path}: not an object with {', '.join(keys) or 'ids'} in it; {remedy}")
    return table


def read_classes(path):
    """The class names in a text file, one a line: at most 254, so that a mask's byte holds them beside background, void."""
    names = read_lines(path, "write the class names into it, one per line")
    if len(set(names)) < len(names) or len(names) > VOID - 1:
        raise InputError(f"{path}: {len(names)} names, {len(set(names))} different; it takes at most {VOID - 1}, each once")
    if "background" in names:
        raise InputError(f"{path}: background is no class but the label 0; take its line out")
    return names


def image_files(folder, endings=(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")):
    """{id: path} of the images in a folder, at least one, hidden files left out; an id is a name without its ending."""
    images = {}
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        if path.suffix.lower() in endings and not path.name.startswith(".") and path.is_file():
            if path.stem in images:
                raise InputError(f"{path}: there is {images[path.stem].name} too; results are named so, rename one")
            images[path.stem] = path
    return images or fail(f"{folder}: no such folder, or no {' or '.join(endings)} in it; put them there, or pass another")


class DataFolder:
    """Photographs, their classes and what else is known of them, in PASCAL VOC's layout.

        JPEGImages/<id>.jpg (.png, .tif, ...) and train2014/, val2014/, where COCO has them
        ImageSets/Segmentation/<split>.txt    one id per line
        labels.json                           {id: [class names]}; without it Annotations/<id>.xml
        classes.txt                           one name per line; without it VOC's 20
        SegmentationClass/<id>.png            true masks, only opened to evaluate and to show them

    root: the folder, or the one that VOC's archive was unpacked in. Attributes: root, is_coco, masks, splits {name},
    classes [name], images {id: path}. Raises InputError, here and in every method, for whatever is missing or does not fit.
    """

    def __init__(self, root):
        nested = Path(root, "VOCdevkit", "VOC2012")             # where the archive of VOC unpacks
        self.root = nested if nested.is_dir() else Path(root)
        if not self.root.is_dir():
            raise InputError(f"{root}: no such folder; pass --data FOLDER in VOC's or COCO's layout, or --data toy")
        self.is_coco = (self.root / "annotations/instances_train2014.json").is_file()
        self.splits = {path.stem for path in self.root.glob("ImageSets/Segmentation/*.txt")}
        self.masks, names = self.root / "SegmentationClass", self.root / "classes.txt"
        self.classes = read_classes(names) if names.is_file() else VOC_CLASSES
        folders = [self.root / folder for folder in ("JPEGImages", "train2014", "val2014")]
        folders = [folder for folder in folders if folder.is_dir()] or folders[:1]
        self.images = {name: path for folder in folders for name, path in image_files(folder).items()}

    def ids(self, split):
        """The ids of a split, in the list's order."""
        path = self.root / f"ImageSets/Segmentation/{split}.txt"
        ids = list(dict.fromkeys(read_lines(path, "write the ids of the split into it, one per line")))
        for name in ids:
            if name not in self.images:
                raise InputError(f"{self.root}/JPEGImages/{name}.jpg: no such image; add it or take its id out of {path}")
        return ids

    def sizes(self, ids):
        """Of the image files, in bytes: a cheap sign that a photograph was replaced."""
        return [self.images[name].stat().st_size for name in ids]

    def labels(self, ids):
        """Image-level labels: (len(ids), C), float32 in {0, 1}."""
        index, path = {name: c for c, name in enumerate(self.classes)}, self.root / "labels.json"
        table, labels = read_json(path) if path.is_file() else None, torch.zeros(len(ids), len(self.classes))
        for row, name in zip(labels, ids):
            where = path if table is not None else self.root / f"Annotations/{name}.xml"
            with reading(f"{where}, image {name}", "list its classes in labels.json, of those in classes.txt (or VOC's)"):
                names = table[name] if table is not None else [
                    node.findtext("name") for node in xml.etree.ElementTree.parse(where).getroot().iter("object")]
                if not isinstance(names, list) or not index.keys() >= set(names):
                    raise ValueError(f"{names!r} is not a list of known classes")
                row[[index[label] for label in names]] = 1
        return labels

    def has_masks(self, ids):
        """Whether some of these images have true masks, or COCO's outlines of which eval.py draws them."""
        return self.is_coco or any((self.masks / f"{name}.png").is_file() for name in ids)


class Photographs(torch.utils.data.Dataset):
    """An image (3, H, W) and its target, through one v2 transform; ids of a DataFolder.

    targets: labels (len(ids), C), of which an item is (C,), or a folder of label maps <id>.png, then (H, W) uint8.
    What is random in an item follows from seed, epoch and index alone, not from the number of workers or processes.
    """

    def __init__(self, data, ids, targets, transform=TO_TENSOR, seed=0):
        self.data, self.ids, self.targets, self.transform, self.seed, self.epoch = data, ids, targets, transform, seed, 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        name = self.ids[index]
        image = read_image(self.data.images[name])
        if isinstance(self.targets, Path):
            target = read_mask(self.targets / f"{name}.png", image.size[::-1], len(self.data.classes))
        else:
            target = self.targets[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, self.epoch, index)))
            return self.transform(image, target)


def training_loader(photographs, batch_size, workers, device):
    """A DataLoader of shuffled batches, `batch_size` over all processes; InputError where there are too few for it."""
    if batch_size % WORLD or not 2 * WORLD <= batch_size <= len(photographs):
        raise InputError(f"--batch-size {batch_size}: there are {len(photographs)} images; pass at most that, a multiple "
                         f"of the {WORLD} processes, and at least 2 for each")
    sampler = torch.utils.data.DistributedSampler(photographs, WORLD, RANK, seed=photographs.seed, drop_last=True)
    return torch.utils.data.DataLoader(photographs, batch_size // WORLD, sampler=sampler, num_workers=workers,
                                       drop_last=True, pin_memory=device.type == "cuda")


def read_image(path):
    """An image file of any mode, turned upright, alpha over white, as a PIL image in RGB."""
    with reading(path, "no readable image: replace it or take it out of the list"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":     # deep grey: 65535, or a float's maximum, becomes 255
            grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
            grey *= 255 / (65535 if image.mode != "F" else max(1e-9, grey.max()))
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def read_mask(path, size, num_classes):
    """A label PNG as (H, W) uint8: 0 background, c + 1 for class c, 255 void.

    size: the (H, W) that it must have, None for any. InputError if it is missing, unreadable, in colour, of another
    size, or has a value above num_classes.
    """
    with reading(path, "no readable mask: add it, or remove it and run its stage again"), Image.open(path) as image:
        mode, mask = image.mode, np.array(image)
    if mode not in ("P", "L"):
        raise InputError(f"{path}: a mask must be a palette or grey 8-bit PNG, this one is {mode}; convert it")
    if size is not None and mask.shape != tuple(size):
        raise InputError(f"{path}: is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}; give them one size")
    beyond = mask[(mask > num_classes) & (mask != VOID)]
    if beyond.size:
        raise InputError(f"{path}: value {beyond[0]}, but there are {num_classes} classes; correct it or the classes")
    return tv_tensors.Mask(mask)


# ==== 5. The run folder ===============================================================================================

RANK, WORLD, CARD = 0, 1, 0                                     # this process, how many there are, its CUDA device
if torch.distributed.is_torchelastic_launched():                # by torchrun
    RANK, WORLD, CARD = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(8, max(1, CORES // 2))        # OURS: loaders of images; on a CPU the rest computes


@contextmanager
def one_line_errors(how_to_go_on):
    """End a script on bad input, a full disk or memory with one line on stderr and exit code 2, on Ctrl-C with 130.

    A script that comes to its end leaves torchrun's process group.
    """
    owner, name = os.getpid(), Path(sys.argv[0]).name

    def stop(*_):                           # at once: an exception can get lost in a callback, and no file is half written
        if os.getpid() == owner:            # loaders' workers leave it to the process that they work for
            os.write(2, f"\n{name}: interrupted; {how_to_go_on}\n".encode())
            os._exit(130)
    before = signal.signal(signal.SIGINT, stop)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # names that the terminal cannot show
    try:
        yield
        print(end="", flush=True)                               # also where stdout is closed
        if torch.distributed.is_initialized():                  # its threads must end before Python does
            torch.distributed.destroy_process_group()
        return
    except InputError as error:             # out of a loader's worker it comes with a traceback around its message
        message = " ".join(str(error).rpartition("usage.InputError: ")[2].split())
    except BrokenPipeError:                 # nobody reads on, as under "| head"
        os._exit(141)
    except OSError as error:
        wants_room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
        in_the_way = error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
        first = "make room or give access there, then " * wants_room + "move away what is there, then " * in_the_way
        message = f"{error}: {first}{how_to_go_on}"
    except (MemoryError, RuntimeError) as error:
        if WORLD > 1 and "by peer" in str(error):               # gloo's words for another process that ended, and says why
            os._exit(2)
        signs = "allocate memory", "killed by signal", "exited unexpectedly"    # the last two of a loader's worker
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(sign in str(error) for sign in signs):
            raise
        message = "the memory is full: pass a smaller --batch-size, --size or --scales, or fewer --workers"
    finally:
        signal.signal(signal.SIGINT, before)
    print(f"\n{name}: {message}", file=sys.stderr, flush=True)
    os._exit(2) if torch.distributed.is_initialized() else sys.exit(2)      # other processes may wait in a collective


def number(low, high, kind=float):
    """A type for argparse: a number of this kind, from low to high; NaN is none, inf only if high is."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    parse.__name__ = f"number ({low} to {high})"                # argparse names it when a value does not fit
    return parse


def take_defaults(args, recipes, backbone, weights):
    """Give each flag that was left out, None, its value of a script's table RECIPES; return these values.

    They are those of the kind of network, and before them what the table may have for this backbone alone.
    """
    kind, start = "cnn" if backbone in CNNS else "transformer", "scratch" if weights == "none" else "pretrained"
    recipe = recipes[kind, start] | recipes.get((backbone, start), {})
    vars(args).update((key, value) for key, value in recipe.items() if getattr(args, key) is None)
    return recipe


def start_processes(device):
    """The torch.device to compute on, after joining torchrun's other processes where there are any (nccl or gloo).

    device: "auto" takes CUDA where there is one. InputError for one that does not exist. Only the first process is heard.
    """
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and WORLD > 1:
        raise InputError(f"--device {device}: each process takes one of its own; pass cuda, or leave it out")
    if device == "cuda":
        device = f"cuda:{CARD}"                                 # torch wants the number
    with reading(f"--device {device}", "not on this machine, or in use: pass cpu, or take fewer processes"):
        torch.zeros(1, device=device).item()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        backend = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        torch.distributed.init_process_group(**backend)
    return device


def wait_for_all():
    """Go on when every process has come here."""
    if WORLD > 1:
        torch.distributed.barrier()


def process_mean(*values):
    """The means of scalar tensors over all processes: floats."""
    means = torch.stack([value.detach().float() for value in values])
    if WORLD > 1:
        torch.distributed.all_reduce(means)
    return (means / WORLD).tolist()


@contextmanager
def written(path):
    """Yield a temporary path in the same folder; at the end it becomes `path`, so that no partial file has that name."""
    path = Path(path)
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name[-40:]}")           # a name has 255 bytes at most
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_there(path):
    """Whether a result is a file with something in it; a power cut can leave the name alone."""
    return path.is_file() and path.stat().st_size > 0


def fingerprint(*contents):
    """12 hexadecimal digits that tell contents apart: tensors, files (as a Path) and plain values."""
    digest = hashlib.sha256()
    for content in contents:
        if isinstance(content, torch.Tensor):
            digest.update(content.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(content.read_bytes() if isinstance(content, Path) else json.dumps(content).encode())
    return digest.hexdigest()[:12]


def check_settings(path, before, settings, remedy):
    """InputError if results at `path` were made with other settings; where data and weights lie may change."""
    changed = [key for key in settings if key not in ("data", "weights") and before.get(key) != settings[key]]
    if changed:
        raise InputError(f"{path}: made with another {', '.join(changed)}; {remedy}")


def check_results(path, settings, folders):
    """InputError if the results in the folders were made with other settings than these, by what `path` recorded."""
    remedy = f"remove it and {', '.join(folder.name for folder in folders)} beside it to make them anew"
    if path.is_file():
        check_settings(path, read_json(path, remedy=remedy), settings, remedy)
    elif any(folder.is_dir() and any(folder.iterdir()) for folder in folders):
        raise InputError(f"{path}: is missing, so nobody knows what the results beside it were made with; {remedy}")
    wait_for_all()                                              # nobody writes before all have looked


def write_json(path, table):
    """Write plain values to a .json file, once for all processes."""
    if RANK == 0:
        with written(path) as temporary:
            temporary.write_text(json.dumps(table, indent=1))


def load_checkpoint(path, remedy):
    """A dict that torch.save wrote, tensors on the CPU, nothing in it executed."""
    with reading(path, remedy):
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()      # torch.load would not notice
        assert not damaged, "is damaged"
        state = torch.load(path, map_location="cpu", weights_only=True)
    return state if isinstance(state, dict) else fail(f"{path}: not a checkpoint but a {type(state).__name__}; {remedy}")


def load_classifier(run):
    """The student of a finished stage 1, and the settings it was trained with beside what classifier.json says of it."""
    path, learnt = Path(run) / "classifier.pt", Path(run) / "classifier.json"
    keys = "data classes split size backbone weights jitter weight_decay temperature attention".split()
    remedy = f"run train_cls.py --run {run} with your --data and --backbone first, or correct --run"
    state = load_checkpoint(path, remedy)
    with reading(path, f"not a classifier of train_cls.py: {remedy}"):
        settings = {key: state["settings"][key] for key in keys}        # what later stages read
        network = build_network(settings["backbone"], len(settings["classes"]), frozen=settings["weights"] != "none")
        network.load_state_dict(state["student"])
    remedy = "give the same train_cls.py command again, to its end"
    with reading(learnt, remedy):
        table = read_json(learnt, ["class_threshold"], remedy)  # what stage 1 writes last
        assert 0 <= table["class_threshold"] <= 1, "class_threshold is no probability"
    check_settings(learnt, table, {"classifier": fingerprint(*state["student"].values())}, remedy)
    return network, settings | table


def open_run_data(run, settings, root=None, folders=()):
    """The data that a run was trained on, where it lies now (root) or lay then, for results in these folders.

    InputError if its classes are others, and if one of the folders is the folder of the true masks.
    """
    data = DataFolder(root or settings["data"])
    if data.classes != settings["classes"]:
        raise InputError(f"{data.root}: its {len(data.classes)} classes are not those of {run}; correct --data or --run")
    for folder in folders:
        if folder.resolve() == data.masks.resolve():
            raise InputError(f"{folder}: is the folder of the true masks; seeds belong elsewhere, pass another folder")
    return data


def training_epochs(path, settings, parts, progress, epochs, loader):
    """The frame of a training: go on where it stopped, yield (epoch, log) for each epoch still to be done, save after it.

    path of the checkpoint, the log beside it; parts {name: object with a state_dict}; progress {"epoch": how many are
    done, and what else the loop keeps there}. Random numbers follow from seed, epoch and process alone.
    """
    if path.is_file():
        remedy = "pass another --run, or remove it to start again"
        state = load_checkpoint(path, remedy)
        with reading(path, remedy):
            check_settings(path, state["settings"], settings, remedy)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            progress.update(state["progress"])
    images = len(loader) * loader.batch_size * WORLD                        # of an epoch
    log = Log(path.with_suffix(".jsonl"), epochs * images, progress["epoch"] * images)
    for epoch in range(progress["epoch"], epochs):
        torch.manual_seed(hash((settings["seed"], epoch, RANK)))            # an epoch done again is the same epoch
        loader.sampler.set_epoch(epoch)
        loader.dataset.epoch = epoch
        yield epoch, log
        progress["epoch"] = epoch + 1
        states = {name: part.state_dict() for name, part in parts.items()}
        tensors = (value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor))
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise InputError(f"epoch {epoch + 1}: weights are not finite; lower --lr, in another --run after an epoch")
        if RANK == 0:
            with written(path) as temporary, temporary.open("wb") as file:
                try:
                    torch.save({"settings": settings, "progress": progress, **states}, file)
                except RuntimeError as error:                   # torch's way to say that the disk is full
                    raise OSError(errno.ENOSPC, f"{path} could not be written") from error
                file.flush()
                os.fsync(file.fileno())                         # or a power cut may leave the name without the contents


class Log:
    """Lines of progress, each also a record of a .jsonl file: every tenth step or image, and the last.

    The first record, of 0 images, names the process, which keeps others from writing there until it ends: InputError.
    """

    def __init__(self, path, total, done=0, folders=()):
        """total and done: images in all, and those that an interrupted run left; its later records are dropped.

        folders: of the results, beside the log's; what a killed process left half written there is removed.
        """
        self.total, self.done, self.first, self.calls, self.start, self.before = total, done, done, 0, time.time(), 0.0
        if RANK == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+", buffering=1)                        # line by line
            try:
                fcntl and fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.seek(0)
                process = json.loads(self.file.readline() or '{"process": "just started"}')["process"]
                fail(f"{path.parent}: another process ({process}) is at work there; wait for it, or pass another --run")
            for folder, name in ((path.parent, f"{path.stem}.*"), *((folder, "*") for folder in folders)):
                for left in folder.glob(f".partial-*-{name}"):
                    left.unlink()
            self.file.seek(0)
            records = [{"images": 0, "seconds": 0.0, "process": os.getpid()}]
            with reading(path, "remove it"):
                records += [record for record in map(json.loads, self.file) if 0 < record["images"] <= done]
                self.before = records[-1]["seconds"]
            self.file.truncate(0)
            self.file.writelines(json.dumps(record) + "\n" for record in records)
        wait_for_all()                                                      # nobody writes before it is tidy

    def line(self, images, **values):
        """The line after so many more images, "" between two records; InputError for a value that is not finite."""
        self.done, self.calls = self.done + images, self.calls + 1
        for key, value in values.items():
            if not math.isfinite(value):
                raise InputError(f"after {self.done} images {key} is {value}: lower --lr, in another --run after an epoch")
        if RANK > 0 or (self.calls % 10 and self.done < self.total):
            return ""
        seconds = time.time() - self.start
        rate = (self.done - self.first) / max(seconds, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        record = {"images": self.done, **values, "images_per_s": round(rate, 1), "seconds": round(self.before + seconds, 2)}
        print(json.dumps(record), file=self.file)
        shown = "".join(f"{key} {value:.4g}  " for key, value in values.items())
        return f"\r{self.done} images  {shown}{rate:.1f} images/s  {int(left // 60)}:{int(left % 60):02d} left  "


def save_mask(path, mask):
    """Write (H, W) integer labels as a PNG with VOC's palette."""
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8))
    image.putpalette(VOC_PALETTE.tobytes())
    with written(path) as temporary:
        image.save(temporary)


def load_maps(path, num_classes):
    """One image's classes (K,), its seed maps (K, H, W) uint8, and the same refined."""
    with reading(path, "not seed maps of make_seeds.py: remove it and run make_seeds.py again"):
        with np.load(path) as file:
            classes, *maps = (torch.from_numpy(file[key]) for key in ("classes", "maps", "refined"))
        shape = len(classes), *maps[0].shape[-2:]
        assert all(levels.dtype == torch.uint8 and levels.shape == shape for levels in maps), "arrays of another shape"
        assert all(c in range(num_classes) for c in classes.tolist()), "classes that there are not"
    return classes, *maps
