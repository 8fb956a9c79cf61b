"""USAGE in plain PyTorch: seed areas for weakly supervised semantic segmentation.

Peng et al., "USAGE: A Unified Seed Area Generation Paradigm for Weakly Supervised Semantic
Segmentation", ICCV 2023 (arXiv 2303.07806). We know the paper's abstract, its overview figure and
a third-party summary. "Source: Sec. 4.x" and PAPER mark what these say. OURS marks what they do not
say (the paper may), with the reason for our choice.

    1. The paper    Sec. 4.1  spatial_activation_distribution (alpha), class_scores (s~),
                              generation_loss (L_GEN)
                    Sec. 4.2  consistency_loss (L_REG), chance_loss, learning_status (q),
                              set_adjustment, ema_teacher
    2. Seeds        seed_maps, spread_activations (patch affinity), label_map, refine_maps:
                    the field's protocol
    3. Networks     build_network: a CNN or a Transformer that maps images to activations
    4. Plumbing     images and masks, the run folder, the loop over epochs

The functions of sections 1 and 2 need `import torch` and `import torch.nn.functional as F` only,
and do not call each other: any one of them can be copied.

Letters: B images, C classes, K classes present in an image, D channels, h x w positions of the
activation map (N = h*w), H x W pixels of the image; s activation, alpha spatial activation
distribution, y in {0, 1} image-level labels, q learning status, beta the distributions that L_REG
compares, u their unit; tau1 temperature of L_GEN, tau2 and tau2' of L_REG. A prime (') marks the
teacher's; in the paper's figure a tilde does, which here marks the class scores s~. Seed: the rough
mask of a class, made from a map of the classifier's activations. CAM: class activation map. MIL:
multiple-instance learning, where an image has a class if one position has it.
"""

import argparse
import datetime
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import textwrap
import time
import traceback
import unicodedata
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

try:
    import fcntl
except ImportError:  # on Windows, where two processes can then write into one folder
    fcntl = None

# ==== 1. The paper ================================================================================

# ---- Sec. 4.1, activation shape controlling: the generation loss ---------------------------------


def spatial_activation_distribution(activations, temperature):
    """alpha: how much each position counts for the score of its class.

        alpha[c,i] = exp(s[c,i] / tau) / sum_j exp(s[c,j] / tau)

    activations (B, C, h, w), any floating type -> (B, C, h, w), float32, every map sums to 1.
    temperature (tau) >= 0: inf is exactly uniform (CAM); 0 is exactly one-hot at the maximum, the
    first one if tied (MIL). Raises ValueError for a negative or NaN temperature. Source: Sec. 4.1.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    # OURS: the softmax runs over positions, with tau inside, so that CAM and MIL are special cases.
    # The figure shows tau1 after alpha, and a box "Normalize" after the product with s.
    s = activations.float().flatten(2)                              # (B, C, h, w) -> (B, C, N)
    if temperature == 0:
        alpha = torch.zeros_like(s).scatter_(-1, s.argmax(-1, keepdim=True), 1.0)
    else:
        alpha = (s / temperature).softmax(-1)
    return alpha.view(activations.shape)                            # (B, C, N) -> (B, C, h, w)


def class_scores(activations, alpha):
    """s~: the score of each class, its activations weighted by its distribution.

        s~[c] = sum_i alpha[c,i] * s[c,i]

    activations (B, C, h, w), alpha (B, C, h, w) or (B, 1, h, w) -> (B, C), float32, unbounded.
    Source: Sec. 4.1.
    """
    return (alpha * activations.float()).sum((2, 3))                # (B, C, h, w) -> (B, C)


def generation_loss(activations, alpha, labels):
    """L_GEN: classify the image by activations weighted with alpha, which shapes the seed.

        s~[c] = sum_i alpha[c,i] * s[c,i]
        L_GEN = - mean over images and classes of
                  y[c] log sigmoid(s~[c]) + (1 - y[c]) log sigmoid(-s~[c])

    activations (B, C, h, w), alpha (B, C, h, w) or (B, 1, h, w), labels (B, C) in {0, 1}
    -> scalar >= 0, float32.
    The choice of alpha: uniform is CAM; one-hot at the maximum is multiple-instance learning; one
    distribution for all classes, such as a class token's attention, is class-to-patch attention.
    Finite temperatures of `spatial_activation_distribution` lie in between. Source: Sec. 4.1.
    """
    scores = (alpha * activations.float()).sum((2, 3))              # (B, C, h, w) -> (B, C)
    # OURS: the logistic loss, usual for several labels; our sources name none.
    return F.multilabel_soft_margin_loss(scores, labels.float())


# ---- Sec. 4.2, activation shape regularization: two views by network adjustment ------------------


def consistency_loss(activations, teacher_activations, labels, temperature, teacher_temperature):
    """L_REG: pull the student's distributions to the teacher's, for the classes of the image.

        u[c]       = max(1, standard deviation over i of s'[c,i])
        beta[c,i]  = softmax over i of s[c,i] / (u[c] * tau2)
        beta'[c,i] = softmax over i of s'[c,i] / (u[c] * tau2')
        L_REG      = mean over pairs (image, c) with y[c] = 1 of
                       sum_i beta'[c,i] * (log beta'[c,i] - log beta[c,i])

    activations (s), teacher_activations (s'): (B, C, h, w), any floating type; labels (B, C) in
    {0, 1}; temperature (tau2), teacher_temperature (tau2') > 0 -> scalar, float32, >= 0 up to
    rounding; 0, with zero gradients, if no class is present. Raises ValueError for other
    temperatures. No gradient reaches the teacher. Source: Sec. 4.2.
    """
    if not (temperature > 0 and teacher_temperature > 0):
        raise ValueError(f"temperatures must be > 0, got {temperature} and {teacher_temperature}")
    s, s_teacher = activations.float(), teacher_activations.detach().float()    # (B, C, h, w)
    # OURS: activations grow in training. In units of the teacher's deviation one tau2 fits all
    # scales; u is at least 1, so that noise is not amplified.
    unit = s_teacher.std((2, 3), correction=0, keepdim=True).clamp_min(1)       # (B, C, 1, 1)
    # Log space keeps the gradient alive where a probability underflows.
    log_beta = (s / unit).flatten(2).div(temperature).log_softmax(-1)           # (B, C, N)
    # OURS: with tau2' < tau2 the target is sharper than the student's own distribution, which
    # keeps student and teacher from pulling each other towards flat maps.
    target = (s_teacher / unit).flatten(2).div(teacher_temperature).softmax(-1)
    # OURS: KL(teacher || student), the usual divergence; our sources name none.
    divergence = F.kl_div(log_beta, target, reduction="none").sum(-1)           # (B, C)
    # OURS: present classes only; an absent one has no seed whose shape could agree.
    present = labels.float()
    return (divergence * present).sum() / present.sum().clamp_min(1)


def chance_loss(labels):
    """The lowest L_GEN of a classifier that ignores the image and knows the class frequencies.

        chance = - mean over classes of  f[c] log f[c] + (1 - f[c]) log(1 - f[c])

    with f[c] the share of images that have c. labels (images, C) in {0, 1}, of the whole training
    set -> float in [0, log 2]; 0 if every class is in all images or in none.
    """
    frequency = labels.double().mean(0)                             # (images, C) -> (C,)
    return (torch.special.entr(frequency) + torch.special.entr(1 - frequency)).mean().item()


def learning_status(running_loss, chance):
    """q: how far the classifier has come: 0 until it beats chance, towards 1 as L_GEN falls.

        q = max(0, 1 - running L_GEN / chance)

    running_loss >= 0, chance > 0 (see `chance_loss`; inf gives 1), floats -> float in [0, 1].
    Raises ValueError otherwise. Source: Sec. 4.2. OURS: the scale. The paper names a "learning
    status"; we measure it against `chance_loss`.
    """
    if not (running_loss >= 0 and chance > 0):
        raise ValueError(
            f"running_loss must be >= 0 and chance > 0, got {running_loss} and {chance}")
    return max(0.0, 1.0 - running_loss / chance)


def set_adjustment(network, rate):
    """Set how much a network drops: residual branches, and features before the classifier.

    Of n branches the k-th, in module order, gets the drop rate `rate * k / n`, and
    `network.dropout` gets `rate`. A branch is recognised by its module of class StochasticDepth
    (torchvision) or DropPath (timm), which skips it for individual images. Existing rates are
    overwritten.
    Both kinds of dropping act in training mode only; at rate 0 the network is the plain one.

    network: may be wrapped, as by DistributedDataParallel or AveragedModel; rate in [0, 1]
    -> the number of branches found. Raises ValueError for any other rate, or without a
    `network.dropout`. Source: Sec. 4.2; the paper's figure shows parts of layers dropped.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    while not hasattr(network, "dropout") and hasattr(network, "module"):
        network = network.module                                    # out of its wrapper
    if not isinstance(getattr(network, "dropout", None), torch.nn.Dropout):
        raise ValueError(
            f"{type(network).__name__} has no nn.Dropout named dropout: add self.dropout = "
            "nn.Dropout(0.0) and apply it to the features before the classifier")
    # OURS: drop-path on branches and dropout on features, as every network can have both.
    names = {"StochasticDepth": "p", "DropPath": "drop_prob"}
    branches = [module for module in network.modules() if type(module).__name__ in names]
    for k, branch in enumerate(branches, start=1):
        # PAPER: the rate grows with depth. OURS: linearly, the usual way.
        setattr(branch, names[type(branch).__name__], rate * k / len(branches))
    network.dropout.p = rate
    return len(branches)


def ema_teacher(student, decay):
    """The teacher: an exponential moving average of the student (torch's own AveragedModel).

        teacher <- decay * teacher + (1 - decay) * student

    at each call of `teacher.update_parameters(student)`; the first call copies the student. Buffers
    are averaged too, integer ones copied. The averaged network is `teacher.module`. It is returned
    in training mode: keep it so, or it does not drop anything. In that mode it also updates its own
    BatchNorm statistics, which the next average mixes with the student's.
    decay in [0, 1], ValueError otherwise. Source: Sec. 4.2.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)

    def average_or_copy(teachers, students, updates):
        """Update a group of the teacher's tensors of one type from the student's."""
        if teachers[0].is_floating_point():
            average(teachers, students, updates)
        else:
            torch._foreach_copy_(teachers, students)

    teacher = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=average_or_copy, use_buffers=True)
    return teacher.train()


# ==== 2. Seeds and pseudo masks: the field's protocol, not the paper ==============================


def seed_maps(activations, size):
    """One map for each class, of the image's size, from activations at several scales and flips.

        m[c]   = sum over scales and flips of ReLU(s[c]), enlarged bilinearly
        map[c] = m[c] / max over pixels of m[c]

    activations: a list of (B, K, h_k, w_k), flips already mirrored back, of all classes or of an
    image's present ones; size (H, W)
    -> (B, K, H, W) in [0, 1], float32; all 0 for a class with no positive activation.
    Source: IRN (Ahn et al., CVPR 2019) and MCTformer (Xu et al., CVPR 2022), which also enlarge
    with align_corners=False. A CNN's outermost positions lie on the outermost pixels if the side is
    16n + 1; enlarging this way shrinks the map towards its middle, to (16n + 1) / (16n + 16). IRN
    enlarges to the next multiple of 16 and crops; we enlarge to the size.
    """
    total = sum(
        F.interpolate(s.float().relu(), size, mode="bilinear", align_corners=False)
        for s in activations)                                       # (B, K, H, W)
    return total / total.amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def spread_activations(activations, affinity):
    """Patch affinity: each patch of a Transformer receives the activations that it attends to.

        s[c,i] <- sum_j A[i,j] * ReLU(s[c,j])

    activations (B, C, h, w), affinity (B, N, N): attention among patches, rows attend to columns
    -> (B, C, h, w), float32, >= 0. Source: MCTformer (Xu et al., CVPR 2022), which sums A over all
    blocks.
    """
    s = activations.float().relu().flatten(2)                       # (B, C, h, w) -> (B, C, N)
    return (s @ affinity.float().transpose(1, 2)).view(activations.shape)


def label_map(maps, threshold, classes=None):
    """The strongest class of each pixel, background (0) where no class exceeds the threshold.

    maps (B, K, H, W), threshold in the same unit; classes (K,): the class index of each map, if
    they are not 0 ... K - 1 -> (B, H, W) int64 with 0 background and c + 1 for class c.
    """
    with_background = F.pad(maps, (0, 0, 0, 0, 1, 0), value=threshold)      # (B, 1 + K, H, W)
    winner = with_background.max(1).indices                         # (B, H, W), 0 for background
    if classes is None:
        return winner
    labels = F.pad(classes + 1, (1, 0))                             # (1 + K,): 0, then each map's
    return labels[winner]


@torch.no_grad()
def refine_maps(images, maps, threshold, dilations=(1, 2, 4, 8, 12, 24), iterations=20):
    """Pixel-adaptive refinement: each pixel moves towards its similarly coloured neighbours.

        p[i]   = sigmoid((map[i] - threshold) / 0.1)
        a[i,j] = softmax over j of  - mean over colours of |x[i] - x[j]| / (0.1 * sigma[i])
        p[i]  <- sum_j a[i,j] * p[j], `iterations` times
        map[i] = threshold + 0.1 * logit(p[i])

    j runs over the 8 neighbours at each dilation; sigma[i] is each colour's standard deviation over
    these 48. images (B, 3, H, W) in any unit, maps (B, K, H, W) in [0, 1], threshold in [0, 1]
    -> (B, K, H, W) in [0, 1], on which the threshold means what it did before. No gradient.
    Images are first reduced to a longer side of at most 160 pixels.
    Source: PAMR (Araslanov & Roth, CVPR 2020), which also gives the dilations and the 0.1 in a, but
    computes sigma over 54 pixels, counting the centre once for each dilation. OURS: p and its width
    of 0.1, so that the threshold is the background's value, as in AFA (Ru et al., CVPR 2022);
    20 iterations instead of 10; the 160 pixels, which widen the reach and save time.
    """
    size = maps.shape[-2:]
    shrink = min(1, 160 / max(size))
    h, w = (max(1, round(side * shrink)) for side in size)
    p = ((maps.float() - threshold) / 0.1).sigmoid()
    p = F.interpolate(p, (h, w), mode="bilinear", align_corners=False)          # (B, K, h, w)
    x = F.interpolate(
        images.float(), (h, w), mode="bilinear", align_corners=False, antialias=True)
    reach = max(dilations)

    def windows(canvas):
        """3 x 3 windows around every pixel, by dilation: 6 views (3, 3, B, _, h, w) of a canvas."""
        views = []
        for d in dilations:
            inner = canvas[..., reach - d:reach + h + d, reach - d:reach + w + d]
            views.append(inner.unfold(2, h, d).unfold(3, w, d).permute(2, 3, 0, 1, 4, 5))
        return views

    # The affinities, from differences in colour. A window's centre does not differ from itself: it
    # adds nothing to sums over the neighbours, and gets no weight.
    n = 8 * len(dilations)
    windows_of_x = windows(F.pad(x, 4 * (reach,), mode="replicate"))
    difference = torch.stack(windows_of_x) - x                      # (6, 3, 3, B, 3, h, w)
    mean = difference.sum((0, 1, 2)) / n                                        # (B, 3, h, w)
    squares = (difference ** 2).sum((0, 1, 2))
    sigma = ((squares - n * mean ** 2).clamp_min(0) / (n - 1)).sqrt() + 1e-8    # (B, 3, h, w)
    logits = difference.abs_().div_(-0.1 * sigma).mean(4, keepdim=True)
    logits[:, 1, 1] = -torch.inf                                    # (6, 3, 3, B, 1, h, w)
    a = logits.flatten(0, 2).softmax(0).view(logits.shape)

    # The iterations. Three dilations at a time: few calls, and products that fit into the cache.
    canvas = F.pad(p, 4 * (reach,), mode="replicate")
    neighbours = windows(canvas)
    products = p.new_empty(3, 3, 3, *p.shape)                       # 3 dilations, 3 x 3 neighbours
    for _ in range(iterations):
        total = 0
        for first in range(0, len(dilations), 3):
            group = range(first, min(first + 3, len(dilations)))
            for k in group:
                torch.mul(a[k], neighbours[k], out=products[k - first])
            total = total + products[:len(group)].sum((0, 1, 2))                # (B, K, h, w)
        canvas.copy_(F.pad(total, 4 * (reach,), mode="replicate"))

    p = canvas[..., reach:reach + h, reach:reach + w]
    p = F.interpolate(p, size, mode="bilinear", align_corners=False).clamp(1e-6, 1 - 1e-6)
    return (threshold + 0.1 * p.logit()).clamp(0, 1)                            # (B, K, H, W)


# ==== 3. The networks =============================================================================

CNNS = ("mobilenet_v2", "resnet18", "resnet50", "resnet101")
DEITS = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12)}   # width D, heads
BACKBONES = CNNS + tuple(DEITS)
STRIDE = 16             # pixels per position of the map: usual in the field, and DeiT's patch size
AFFINITY_BLOCKS = 6     # OURS: the mean over the last blocks, see EVIDENCE; MCTformer sums over all
TO_TENSOR = v2.PILToTensor()            # a PIL image -> 8-bit (3, H, W)
NORMALISE = v2.Compose([                # 8-bit images -> float32, by ImageNet's mean and deviation
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
])


class ActivationNetwork(nn.Module):
    """Images (B, 3, H, W) of any size, normalised as by NORMALISE -> activations (B, C, h, w).

    s[c,i] = w_c . f_i + b_c: a 1x1 convolution on the trunk's features f, without ReLU.
    h = ceil(H / 16). Runs in bfloat16 where the device computes in it.
    """

    def __init__(self, trunk, channels, num_classes, frozen):
        super().__init__()
        self.trunk = trunk
        self.frozen = frozen
        self.dropout = nn.Dropout(0.0)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, images, return_attention=False):
        """(B, 3, H, W) -> activations (B, C, h, w), on request with a Transformer's attention."""
        attention = None
        with fast_autocast(images.device):
            if return_attention:
                features, attention = self.trunk(images, return_attention=True)
            else:
                features = self.trunk(images)                       # (B, D, h, w)
            s = self.classifier(self.dropout(features))             # (B, D, h, w) -> (B, C, h, w)
        if return_attention:
            return s, attention
        return s

    def fitting_size(self, size):
        """An (H, W) near `size` on which positions fall evenly."""
        on_the_edge = 0 if isinstance(self.trunk, PatchTransformer) else 1      # a CNN's: 16n + 1
        return tuple(max(1, round(side / STRIDE)) * STRIDE + on_the_edge for side in size)

    def train(self, mode=True):
        """As torch's; if `frozen`, the trunk's BatchNorm stays fixed, even in training."""
        super().train(mode)
        for module in self.trunk.modules():
            if self.frozen and isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        return self


class PatchTransformer(torchvision.models.VisionTransformer):
    """torchvision's, with the patches as positions.

    An image whose sides are not multiples of 16 is enlarged to the next multiple.
    """

    def forward(self, images, return_attention=False):
        """(B, 3, H, W) -> (B, D, h, w); with `return_attention` also (B, blocks, 1 + N, 1 + N).

        Attention: rows attend to columns, the class token first, the mean over heads.
        """
        h, w = (math.ceil(side / STRIDE) for side in images.shape[-2:])
        if images.shape[-2:] != (h * STRIDE, w * STRIDE):
            images = F.interpolate(
                images, (h * STRIDE, w * STRIDE), mode="bilinear", align_corners=False)
        patches = self.conv_proj(images)                            # (B, D, h, w)

        # The position embedding is a square grid of n x n patches, resized to this image's.
        embedding = self.encoder.pos_embedding                      # (1, 1 + n*n, D)
        n = math.isqrt(embedding.shape[1] - 1)
        grid = embedding[:, 1:].transpose(1, 2).unflatten(2, (n, n))            # (1, D, n, n)
        patches = patches + F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)
        token = (self.class_token + embedding[:, :1]).expand(len(images), -1, -1)   # (B, 1, D)
        tokens = torch.cat([token, patches.flatten(2).transpose(1, 2)], 1)      # (B, 1 + N, D)

        attention = []
        for block in self.encoder.layers:
            query = block.ln_1(tokens)
            change, weights = block.self_attention(
                query, query, query, need_weights=return_attention)
            # build_network adds drop-path to block.dropout and block.mlp.
            tokens = tokens + block.dropout(change)
            tokens = tokens + block.mlp(block.ln_2(tokens))
            attention.append(weights)
        tokens = self.encoder.ln(tokens)[:, 1:]                     # (B, N, D)
        features = tokens.transpose(1, 2).unflatten(2, (h, w))      # (B, D, h, w)
        if return_attention:
            return features, torch.stack(attention, 1).float()
        return features


def build_network(backbone, num_classes, state=None, frozen=False):
    """A network from images to activations, with drop-path on every residual branch, all rates 0.

    backbone: one of BACKBONES; state: its state dict in torchvision's naming, without the
    classifier, which is always new; frozen: BatchNorm stays fixed, the field's custom for
    pretrained CNNs -> an ActivationNetwork in training mode.
    Raises InputError for an unknown backbone and RuntimeError for a state that does not fit.
    """
    if backbone not in BACKBONES:
        raise InputError(f"unknown backbone {backbone!r}: use one of {', '.join(BACKBONES)}")
    if backbone in DEITS:
        channels, heads = DEITS[backbone]
        trunk = PatchTransformer(
            image_size=224, patch_size=STRIDE, num_layers=12, num_heads=heads,
            hidden_dim=channels, mlp_dim=4 * channels)
        trunk.heads = nn.Identity()
    elif backbone == "mobilenet_v2":
        model = torchvision.models.mobilenet_v2()
        trunk, channels = model.features, model.last_channel
    else:
        model = torchvision.models.get_model(backbone)
        without_avgpool_and_fc = list(model.named_children())[:-2]
        trunk = nn.Sequential(OrderedDict(without_avgpool_and_fc))
        channels = model.fc.in_features
    if state is not None:
        trunk.load_state_dict(state)
    if backbone in CNNS:
        keep_stride_16(trunk)
    # Every residual branch ends with torchvision's drop-path.
    branches = {"BasicBlock": ["bn2"], "Bottleneck": ["bn3"], "InvertedResidual": ["conv"],
                "EncoderBlock": ["dropout", "mlp"]}
    for block in list(trunk.modules()):
        if not getattr(block, "use_res_connect", True):     # an InvertedResidual without shortcut
            continue
        for name in branches.get(type(block).__name__, []):
            drop_path = torchvision.ops.StochasticDepth(0.0, mode="row")
            setattr(block, name, nn.Sequential(getattr(block, name), drop_path))
    return ActivationNetwork(trunk, channels, num_classes, frozen).train()


def keep_stride_16(trunk):
    """Make a CNN's last stage, which would go from stride 16 to 32, stay at 16, and dilate it.

    OURS: dilated after its strided convolution, so that a pretrained layer sees the same
    neighbourhood as in its training; IRN does not dilate there.
    """
    stage = trunk.layer4 if hasattr(trunk, "layer4") else trunk[14:]            # of MobileNetV2
    for module in stage.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if module.stride == (2, 2):
            module.stride = (1, 1)
        elif module.kernel_size == (3, 3):
            module.dilation = module.padding = (2, 2)


def activations_and_alpha(network, images, temperature, attention=False):
    """Activations, and the alpha that weights them in L_GEN.

    images (B, 3, H, W) -> s (B, C, h, w) and alpha (B, C, h, w), from a temperature; or with
    `attention` alpha (B, 1, h, w), the class token's attention: its mean over heads and blocks
    (OURS: all blocks, so that no depth is chosen), rescaled to sum to 1 over the patches.
    """
    if not attention:
        s = network(images)
        return s, spatial_activation_distribution(s, temperature)
    s, weights = network(images, return_attention=True)
    weights = weights[:, :, 0, 1:].mean(1)                          # (B, blocks, ...) -> (B, N)
    alpha = weights / weights.sum(1, keepdim=True)
    return s, alpha.view(len(s), 1, *s.shape[2:])


def multi_scale_activations(network, image, longer, scales, flip, affinity=False):
    """Activations of one image at several scales, each with its mirror image.

    image (1, 3, H, W); longer: the longer side in pixels at scale 1, rounded by `fitting_size`;
    scales: floats; flip: a bool; affinity: spread them by the patches' attention
    -> a list of (1, C, h_k, w_k), mirrored back, for each scale and flip.
    """
    activations = []
    sides = image.shape[-2:]
    for scale in scales:
        size = network.fitting_size([scale * (side * longer / max(sides)) for side in sides])
        view = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        if flip:
            view = torch.cat([view, view.flip(-1)])                 # (2, 3, H_k, W_k)
        view = view.contiguous(memory_format=torch.channels_last)
        if affinity:
            s, attention = network(view, return_attention=True)
            s = spread_activations(s, attention[:, -AFFINITY_BLOCKS:, 1:, 1:].mean(1))
        else:
            s = network(view)
        activations.append(s[:1])
        if flip:
            activations.append(s[1:].flip(-1))
    return activations


def fast_autocast(device):
    """A context of bfloat16 autocast where the device computes in it natively, else of float32."""
    if device.type == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        native = features.get("avx512_bf16") or features.get("amx_bf16")
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(native))


# ==== 4. Plumbing: nothing of the paper comes after this line =====================================

# ---- Errors and flags ----------------------------------------------------------------------------


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that says what to do."""


@contextmanager
def reading(path, remedy, any_shape=False):
    """Turn whatever fails inside into an InputError: the path, the reason in short, the remedy.

    An error in this project's own code is raised unchanged, and so is a MemoryError. any_shape: the
    file's contents have not been checked yet, so a TypeError is blamed on them too.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:      # PIL, torch and json raise dozens of kinds on broken files
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        is_ours = raised_in.parent == Path(__file__).parent and not any_shape
        if is_ours and isinstance(error, (AttributeError, NameError, TypeError)):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise InputError(f"{path}: {' '.join(reason.split())[:160]}; {remedy}") from error


@contextmanager
def one_line_errors(how_to_go_on):
    """End a script with one line and exit code 2 on bad input, a full disk, or too little memory.

    Ctrl-C ends it at once with exit code 130: no file is ever half written.
    """
    main_process = os.getpid()
    name = Path(sys.argv[0]).name

    def stop(*_):
        for worker in multiprocessing.active_children():        # or they print tracebacks
            worker.kill()
        if os.getpid() == main_process and RANK == 0:
            os.write(2, f"\n{name}: interrupted; {how_to_go_on}\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # names that a terminal cannot show
    try:
        yield
        print(end="", flush=True)                               # here, where it may still fail
        if torch.distributed.is_initialized():                  # its threads must end first
            torch.distributed.destroy_process_group()
        return
    except InputError as error:     # one from a loader's worker has a traceback before its message
        message = str(error).rpartition("usage.InputError: ")[2]
    except BrokenPipeError:         # nobody reads on, as under "| head"
        os._exit(141)
    except OSError as error:
        message = f"{error}: once this is fixed, {how_to_go_on}"
    except (MemoryError, RuntimeError) as error:
        if WORLD > 1 and "by peer" in str(error):       # another process failed, and says why
            os._exit(2)
        message = memory_error(error)
        if message is None:
            raise
    print(f"\n{name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():                      # others may wait in a collective
        os._exit(2)
    sys.exit(2)


def memory_error(error):
    """What to do about a memory error, a str; None for any other error."""
    text = str(error)
    for sign in ("shared memory", "</torch_", "killed by signal", "exited unexpectedly"):
        if sign in text:
            return ("a process that loads images ran out of (shared) memory: use --workers 0, or "
                    "give the container more, for example with docker run --shm-size 2g")
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "allocate memory" in text:
        return "out of memory: use a smaller --batch-size, --size or --scales, or fewer --workers"
    return None


class CommandLine(argparse.ArgumentParser):
    """The flags of a script; --help ends with the table RECIPES of its defaults."""

    def __init__(self, description, recipes=None):
        lines = []
        if recipes:
            networks, weights = zip(*recipes)
            rows = [("defaults by network", *networks), ("and initial weights", *weights)]
            for key in next(iter(recipes.values())):
                values = [recipe[key] for recipe in recipes.values()]
                rows.append((f"  --{key.replace('_', '-')}", *values))
            lines = [f"{name:24}" + "".join(f"{str(cell):19}" for cell in cells)
                     for name, *cells in rows]
        super().__init__(
            description=description.split("\n")[0],
            epilog="\n".join(lines),
            formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        """Argparse's complaint, in this project's one line."""
        raise InputError(message)


def number(low, high, kind=float):
    """A type for argparse: a number of this kind, from low to high; rejects NaN."""
    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text}: use a {whole}number from {low} to {high}")
    return parse


def take_defaults(args, recipes, backbone, weights):
    """Fill in each flag that was not given (None) from a script's table RECIPES.

    Prints all flags as they are now; returns the row of the table.
    """
    network = "cnn" if backbone in CNNS else "transformer"
    recipe = recipes[network, "scratch" if weights == "none" else "pretrained"]
    for key, value in recipe.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if RANK == 0:
        text = ", ".join(f"{key} {value}" for key, value in vars(args).items())
        print(textwrap.fill(f"settings: {text}", 100, subsequent_indent="  ",
                            break_on_hyphens=False, break_long_words=False))
    return recipe


# ---- Several processes ---------------------------------------------------------------------------

RANK, WORLD, CARD = 0, 1, 0         # this process, how many there are, its CUDA device
if torch.distributed.is_torchelastic_launched():                # by torchrun
    RANK, WORLD, CARD = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(8, max(1, CORES // 2))    # OURS: to load images; on a CPU the other cores compute


def start_processes(device):
    """The torch.device to compute on, after joining torchrun's other processes (nccl or gloo).

    device: "auto" uses CUDA if available. InputError for one that does not exist. Only rank 0
    prints.
    """
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and WORLD > 1:
        raise InputError(f"--device {device}: each process takes a card of its own; use cuda")
    if device == "cuda":
        device = f"cuda:{CARD}"
    remedy = "it is missing or already in use: use cpu or fewer processes"
    with reading(f"--device {device}", remedy):
        torch.zeros(1, device=device).item()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        # The others wait while rank 0 downloads data or labels images alone. A process that fails
        # ends them by itself, so nothing is gained by a shorter limit.
        how = {"backend": "gloo", "timeout": datetime.timedelta(days=2)}
        if device.type == "cuda":
            how |= {"backend": "nccl", "device_id": device}
        torch.distributed.init_process_group(**how)
    return device


def wait_for_all():
    """Wait until every process has reached this point."""
    if WORLD > 1:
        torch.distributed.barrier()


def process_mean(*values):
    """The means of scalar tensors over all processes: floats."""
    means = torch.stack([value.detach().float() for value in values])
    if WORLD > 1:
        torch.distributed.all_reduce(means)
    return (means / WORLD).tolist()


def from_first(function, *arguments):
    """Call a function in rank 0 alone; every process gets its result."""
    result = [None]
    if RANK == 0:
        result = [function(*arguments)]
    if WORLD > 1:
        torch.distributed.broadcast_object_list(result)
    return result[0]


# ---- Images and masks ----------------------------------------------------------------------------

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()
VOID = 255                          # the value of mask pixels that no metric and no loss counts
MAP_SIDE = 1024                     # OURS: the longer side of seed maps is at most this, in pixels
BITS = np.arange(256)[:, None] >> 3 * np.arange(8)[:, None, None] + np.arange(3) & 1
VOC_PALETTE = (BITS << np.arange(7, -1, -1)[:, None, None]).sum(0).astype(np.uint8)     # (256, 3)
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF orientation


def one_form(text):
    """A name in one spelling of Unicode: a Mac's archives write an accent apart from its letter."""
    return unicodedata.normalize("NFC", text)


def read_lines(path, remedy):
    """The lines of a UTF-8 text, at least one, stripped, without empty ones."""
    with reading(path, f"{remedy}, as UTF-8"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    lines = [one_form(line) for line in lines if line]
    if not lines:
        raise InputError(f"{path}: is empty; {remedy}")
    return lines


def read_classes(path):
    """The class names in a text file, one per line; VOC's 20 if path is None."""
    if path is None:
        return VOC_CLASSES
    return check_classes(read_lines(path, "write the class names into it, one per line"), path)


def check_classes(names, path):
    """The class names that a file lists; InputError if one is repeated or there are too many."""
    if len(set(names)) < len(names) or len(names) > VOID - 1:
        raise InputError(f"{path}: {len(names)} names, {len(set(names))} distinct; list at "
                               f"most {VOID - 1}, each once")
    for name in names:
        if name.lower().replace("_", "") == "background":
            raise InputError(f'{path}: "{name}" is label 0, not a class; remove its line')
    return names


ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def image_files(folder, endings=ENDINGS):
    """{id: path} of the images in a folder, at least one; an id is a name without its ending."""
    images = {}
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        name = one_form(path.stem)
        if path.suffix.lower() not in endings or path.name.startswith(".") or not path.is_file():
            continue
        if name in images:
            raise InputError(f"{path}: there is {images[name].name} as well; results are named "
                             "after images, so rename one")
        images[name] = path
    if not images:
        raise InputError(f"{folder}: no such folder, or no {' or '.join(endings)} in it")
    return images


def orientation(image):
    """The EXIF orientation of an open PIL image; 1, upright, if there is none or it is broken."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:               # PIL raises dozens of kinds on broken EXIF
        return 1


def read_image(path):
    """An image file of any mode, turned upright, alpha over white, as a PIL image in RGB."""
    remedy = "cannot be read as an image: replace it or remove it from the list"
    with reading(path, remedy), Image.open(path) as image:
        image.load()                # before the orientation: this already turns a TIFF
        turn = TURNS.get(orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I") or image.mode == "F":
            # Grey beyond 8 bits: 65535, or the maximum of floats, becomes 255.
            grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
            white = max(1e-9, grey.max()) if image.mode == "F" else 65535
            image = Image.fromarray((grey * (255 / white)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def read_mask(path, size, num_classes):
    """A label PNG as (H, W) uint8: 0 background, c + 1 for class c, 255 void.

    size: the (H, W) that it must have, None for any. InputError if it is missing, unreadable, in
    colour, of another size, or has a value above num_classes.
    """
    remedy = "cannot be read as a mask: replace it, or rerun the stage that makes it"
    with reading(path, remedy), Image.open(path) as image:
        mode = image.mode
        mask = np.array(image)
    if mode not in ("P", "L"):
        raise InputError(
            f"{path}: a mask must be a palette or grey 8-bit PNG, not {mode}; convert it")
    if size is not None and mask.shape != tuple(size):
        raise InputError(f"{path}: is {mask.shape[1]}x{mask.shape[0]}, but its image is "
                         f"{size[1]}x{size[0]}; make both the same size")
    beyond = mask[(mask > num_classes) & (mask != VOID)]
    if beyond.size:
        raise InputError(f"{path}: value {beyond[0]}, but there are {num_classes} classes; correct "
                         "the mask or the classes")
    return tv_tensors.Mask(mask)


def save_mask(path, mask):
    """Write (H, W) integer labels as a PNG with VOC's palette."""
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8))
    image.putpalette(VOC_PALETTE.tobytes())
    with written(path) as temporary:
        image.save(temporary)


def map_size(size):
    """The (H, W) of an image's seed maps: its own, its longer side at most MAP_SIDE."""
    shrink = min(1, MAP_SIDE / max(size))
    return tuple(max(1, round(side * shrink)) for side in size)


def resized_labels(labels, size):
    """Integer labels (h, w) at another size (H, W): each pixel takes its nearest one's."""
    rows, columns = (torch.arange(to) * of // to for to, of in zip(size, labels.shape))
    return labels[rows[:, None], columns]


class Photographs(torch.utils.data.Dataset):
    """Pairs of an 8-bit image (3, H, W) and its target, through one v2 transform.

    images: paths. targets: labels (images, C), one row (C,) per item; or a list of paths of label
    maps of num_classes classes, each read as (H, W) uint8. What is random in an item depends on
    the random seed, epoch and index alone, not on the number of workers or processes.
    """

    def __init__(self, images, targets, num_classes, transform, random_seed=0):
        self.images = images
        self.targets = targets
        self.num_classes = num_classes
        self.transform = transform
        self.random_seed = random_seed
        self.epoch = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = read_image(self.images[index])
        target = self.targets[index]
        if isinstance(target, Path):
            target = read_mask(target, image.size[::-1], self.num_classes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.random_seed, self.epoch, index)))
            return self.transform(image, target)


class WholePhotographs(torch.utils.data.Dataset):
    """Pairs of a PIL image, reduced to map_size, and the photograph's own (H, W), for label maps.

    images: paths. An unreadable one raises InputError, or gives (None, None) if `skip` is set.
    """

    def __init__(self, images, skip=False):
        self.images = images
        self.skip = skip

    def loader(self, workers):
        """A DataLoader of single pairs: PIL images, which need no shared memory as tensors do."""
        return torch.utils.data.DataLoader(
            self, batch_size=None, num_workers=workers, collate_fn=tuple)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            image = read_image(self.images[index])
        except InputError:
            if self.skip:
                return None, None
            raise
        size = image.size[::-1]
        if map_size(size) != size:
            image = image.resize(map_size(size)[::-1], Image.Resampling.BILINEAR)
        return image, size


def training_loader(photographs, batch_size, workers, device):
    """A DataLoader of shuffled batches, `batch_size` over all processes; InputError if too few."""
    if batch_size % WORLD or not 2 * WORLD <= batch_size <= len(photographs):
        raise InputError(f"--batch-size {batch_size}: there are {len(photographs)} images; it must "
                         f"be at most that number, a multiple of {WORLD} (the number of "
                         "processes), and at least 2 per process")
    # DistributedSampler adds the epoch to its seed: the orders of two random seeds must not meet.
    sampler = torch.utils.data.DistributedSampler(
        photographs, WORLD, RANK, seed=10**6 * photographs.random_seed, drop_last=True)
    return torch.utils.data.DataLoader(
        photographs, batch_size // WORLD, sampler=sampler, num_workers=workers, drop_last=True,
        pin_memory=device.type == "cuda")


# ---- The run folder ------------------------------------------------------------------------------
#
#     images.json       the data as stage 1 found it: classes, and the image labels of each split
#     settings.json     what stage 1 was run with and what it learnt; if present, stage 1 is done
#     classifier.pt     its networks, optimiser and log after the last complete epoch
#     train/, val/, segmentation/ ...   results of a later stage, complete or not there at all
#
# Later stages read the data from images.json alone. The settings.json of a folder of results
# contains that of the stage before it, whole.


@contextmanager
def written(path):
    """Yield a temporary path that becomes `path` at the end: no partial file has that name."""
    # A name has 255 bytes at most, so only its end is kept.
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name[-40:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, table):
    """Write plain values to a .json file, once for all processes."""
    if RANK == 0:
        with written(path) as temporary:
            temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")


def check_kinds(table, kinds):
    """ValueError if a value is not a dict with keys of these kinds, {key: type}."""
    if not isinstance(table, dict):
        raise ValueError(f"expected an object with keys, not a {type(table).__name__}")
    for key, kind in kinds.items():
        if not isinstance(table.get(key), kind):
            raise ValueError(f"{key} is missing or of the wrong kind")


def read_json(path, kinds, remedy):
    """The object in a .json file. kinds {key: type}: what it must have; InputError otherwise."""
    with reading(path, remedy):
        table = json.loads(path.read_text(encoding="utf-8-sig"))
        check_kinds(table, kinds)
    return table


def fingerprint(*contents):
    """12 hexadecimal digits that tell contents apart: tensors, files (as a Path), plain values."""
    digest = hashlib.sha256()
    for content in contents:
        if isinstance(content, torch.Tensor):
            numbers = content.detach().cpu().flatten()
            digest.update(numbers.view(torch.uint8).numpy().tobytes())
        elif isinstance(content, Path):
            digest.update(content.read_bytes())
        else:
            digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:12]


def sizes_of(images):
    """A fingerprint of the sizes of files in bytes: a cheap sign that one was replaced."""
    sizes = []
    for path in images:
        with reading(path, "restore it, or correct --data"):
            sizes.append(path.stat().st_size)
    return fingerprint(sizes)


def lock(run):
    """Make a run folder, and keep other processes from writing into it until this one ends.

    InputError if one is already writing there.
    """
    if RANK > 0:
        return
    run.mkdir(parents=True, exist_ok=True)
    lock.file = (run / ".lock").open("a")                       # held until the process ends
    try:
        if fcntl:
            fcntl.lockf(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                  # EAGAIN and EACCES: it is held
        raise InputError(f"{run}: another process is already writing there; wait for it, or use "
                         "another --run") from None
    except OSError:
        print(f"warning: {run} is on a file system without locks; run one process there at a time")
    for left in run.glob(".partial-[0-9]*"):                    # by a process that was killed
        left.unlink()


@contextmanager
def whole_folder(path, settings, parts=()):
    """Yield a folder to fill that becomes `path` at the end: `path` is complete or not there.

    parts: folders in it. An interrupted run leaves PATH.partial, which is continued if its settings
    are the same, and removed if they differ. InputError if `path` is not a folder of results.
    """
    partial = path.with_name(f"{path.name}.partial")
    if path.exists() and not (path / "settings.json").is_file():
        raise InputError(f"{path}: is in the way, and is not a folder of results; move it away")
    made_with = partial / "settings.json"
    left_there = [file for file in partial.rglob("[!.]*") if file.is_file()]
    if left_there and not made_with.is_file():
        raise InputError(f"{partial}: is in the way, and no interrupted run left it; move it away")
    wait_for_all()                                      # nobody writes before all have looked
    if RANK == 0:
        wanted = json.dumps(settings, indent=1).encode()        # as write_json writes them
        if not (made_with.is_file() and made_with.read_bytes() == wanted):
            shutil.rmtree(moved_away(partial), ignore_errors=True)
            for folder in (partial, *(partial / part for part in parts)):
                folder.mkdir()
            write_json(made_with, settings)
        for left in partial.rglob(".partial-*"):                # by a process that was killed
            left.unlink()
    wait_for_all()
    yield partial
    wait_for_all()
    if RANK == 0:
        if hasattr(os, "sync"):
            os.sync()               # or a power cut may leave names without contents
        old = moved_away(path)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def moved_away(path):
    """Rename a folder before its removal, which may be interrupted; return the new name."""
    old = path.with_name(f".partial-old-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    return old


def is_there(path):
    """Whether a result is a file with contents: a power cut can leave an empty file."""
    return path.is_file() and path.stat().st_size > 0


def load_checkpoint(path, kinds, remedy):
    """A dict that torch.save wrote, tensors on the CPU, without executing code from the file.

    kinds {key: type}: what it must have; InputError otherwise.
    """
    with reading(path, remedy):
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("is damaged")                      # which torch.load does not notice
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_kinds(state, kinds)
    return state


def read_run(run):
    """The settings.json and images.json of a finished stage 1, unchanged since then."""
    remedy = (f"run train_cls.py --run {run} with your --data and --backbone until it ends, or "
              "correct --run")
    settings = read_json(run / "settings.json", {"fingerprint": str}, remedy)
    data = read_json(run / "images.json", {"root": str}, remedy)
    frozen = {key: value for key, value in settings.items() if key != "fingerprint"}
    if fingerprint(frozen) != settings["fingerprint"]:
        raise InputError(f"{run}/settings.json: was edited; run the same train_cls.py command "
                         "again")
    frozen = {key: value for key, value in data.items() if key != "root"}
    if fingerprint(frozen) != settings["images"]:
        raise InputError(f"{run}/images.json: differs from the data that the classifier was "
                         "trained on; run the same train_cls.py command again")
    return settings, data


def load_classifier(run, settings, num_classes):
    """The student of a finished stage 1."""
    path = run / "classifier.pt"
    remedy = f"run the same train_cls.py command again, or correct --run {run}"
    state = load_checkpoint(path, {"student": dict}, remedy)
    frozen = settings["weights"] != "none"
    network = build_network(settings["backbone"], num_classes, frozen=frozen)
    with reading(path, remedy):
        network.load_state_dict(state["student"])
    if fingerprint(*network.state_dict().values()) != settings["classifier"]:
        raise InputError(f"{path}: is not the classifier of settings.json; {remedy}")
    return network


def read_split(data, split, settings, root=None):
    """A split of images.json: ids, paths, labels (images, C) in {0, 1}.

    root: where the data lies now. InputError if a photograph was replaced since stage 1.
    """
    index = {name: c for c, name in enumerate(data["classes"])}
    entries = data[split]
    labels = torch.zeros(len(entries), len(index))
    for row, (_, names) in zip(labels, entries.values()):
        row[[index[name] for name in names or ()]] = 1          # names: None where unknown
    paths = [Path(root or data["root"], image) for image, _ in entries.values()]
    if sizes_of(paths) != settings["photographs"].get(split):
        raise InputError(f"photographs of {split}: some changed after stage 1; restore them, or "
                         "train again in another --run")
    return list(entries), paths, labels


def true_masks(data, split, root=None):
    """{id: path} of the true masks that exist for a split."""
    folder = Path(root or data["root"], data["masks"][split])
    try:
        masks = image_files(folder, (".png",))
    except InputError:
        return {}
    return {name: masks[name] for name in data[split] if name in masks}


def training_epochs(path, settings, parts, progress, epochs, loader):
    """The loop over epochs: continue where it stopped, yield each remaining epoch, save after it.

    path of the checkpoint, its log beside it; parts {name: object with a state_dict}; progress:
    "epoch", how many are done, "log", a list of records, and what else the loop keeps there.
    Random numbers follow from the random seed, epoch and process alone.
    """
    if path.is_file():
        remedy = "use another --run, or remove it to start again"
        state = load_checkpoint(path, {"settings": dict, "progress": dict}, remedy)
        before = state["settings"]
        changed = [key for key in settings if settings[key] != before.get(key)]
        if changed and changed != ["weights"]:                  # whose contents are in "initial"
            raise InputError(f"{path}: made with different settings: {', '.join(changed)}; "
                             f"{remedy}")
        with reading(path, remedy):
            for name, part in parts.items():
                part.load_state_dict(state[name])
            progress.update(state["progress"])
        write_log(path, progress["log"])
    for epoch in range(progress["epoch"], epochs):
        torch.manual_seed(hash((settings["random_seed"], epoch, RANK)))     # the same if done again
        loader.sampler.set_epoch(epoch)
        loader.dataset.epoch = epoch
        yield epoch
        progress["epoch"] = epoch + 1
        states = {name: part.state_dict() for name, part in parts.items()}
        for tensor in (value for state in states.values() for value in state.values()):
            if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
                raise InputError(f"epoch {epoch + 1}: weights are not finite; lower --lr and, if "
                                 "an epoch is already saved, use a new --run")
        if RANK > 0:
            continue
        with written(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save({"settings": settings, "progress": progress, **states}, file)
            except RuntimeError as error:                       # torch's way of saying: disk full
                raise OSError(f"{path} could not be written") from error
            file.flush()
            os.fsync(file.fileno())     # or a power cut may leave the name without the contents
        write_log(path, progress["log"])


def write_log(path, log):
    """Write the records of a checkpoint's log beside it, once for all processes."""
    if RANK == 0:
        with written(path.with_suffix(".jsonl")) as temporary:
            lines = [json.dumps(record) + "\n" for record in log]
            temporary.write_text("".join(lines), encoding="utf-8")


def counted(items, total, done=0, step=1, log=None):
    """Yield each item with an empty record for its values; print the values and the progress.

    total, done: images in all, and those of earlier epochs; step: images per item; log: a list
    that gets every tenth record, and the last. InputError for a value that is not finite.
    """
    start = time.time()
    first = done
    for item in items:
        record = {}
        yield item, record
        done += step
        for key, value in record.items():
            if not math.isfinite(value):
                raise InputError(f"after {done} images, {key} is {value}: lower --lr and, if an "
                                 "epoch is already saved, use a new --run")
        if done // step % 10 and done < total:
            continue
        speed = (done - first) / max(time.time() - start, 1e-9)
        left = datetime.timedelta(seconds=int((total - done) / speed))
        values = "".join(f"{key} {value:.4g}  " for key, value in record.items())
        print(f"\r{done} images  {values}{speed:.1f} images/s  {left} left  ", end="", flush=True)
        if log is not None:
            log.append({"images": done, **record, "images_per_s": round(speed, 1)})
        if done >= total:
            print()


def load_maps(path, num_classes):
    """One image's classes (K,), its seed maps (K, H, W) uint8, and the same refined."""
    with reading(path, "not seed maps of make_seeds.py: run it again", any_shape=True):
        with np.load(path) as file:
            classes, maps, refined = (
                torch.from_numpy(file[key]) for key in ("classes", "maps", "refined"))
        for levels in (maps, refined):
            shape = (len(classes), *maps.shape[-2:])
            if levels.dtype != torch.uint8 or levels.shape != shape or len(shape) != 3:
                raise ValueError("arrays of the wrong shape or type")
        if not all(c in range(num_classes) for c in classes.tolist()):
            raise ValueError("unknown classes")
    return classes, maps, refined
