"""Tests: the paper's formulas against slow loops, its special cases as equalities, the four stages as processes.

    python -m pytest -q test_usage.py
    python test_usage.py                    speed and memory instead, in about ten minutes
"""

import inspect
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import eval as evaluation
import make_seeds
import usage

HERE = Path(__file__).parent
TEMPERATURES = (0.0, 1e-3, 0.5, 1.0, 30.0, math.inf)


@pytest.fixture(autouse=True)
def fixed_random_numbers():
    torch.manual_seed(0)


def random_labels(images=3, classes=4):
    labels = (torch.rand(images, classes) < 0.5).float()
    labels[0] = 0                                               # an image without any class
    labels[1] = 1
    return labels


# ---- Sec. 4.1 --------------------------------------------------------------------------------------------------------


def slow_distribution(activations, temperature):
    """alpha[c,i] = exp(s[c,i] / tau) / sum_j exp(s[c,j] / tau), position by position in Python's floats."""
    result = torch.zeros_like(activations)
    for b, c in np.ndindex(*activations.shape[:2]):
        s = activations[b, c].flatten().tolist()
        if temperature == 0:
            weights = [1.0 if i == s.index(max(s)) else 0.0 for i in range(len(s))]
        elif temperature == math.inf:
            weights = [1.0] * len(s)
        else:
            weights = [math.exp((value - max(s)) / temperature) for value in s]
        result[b, c] = torch.tensor([weight / sum(weights) for weight in weights]).view(activations.shape[2:])
    return result


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_distribution_equals_the_slow_loop(temperature):
    s = torch.randn(3, 4, 5, 6) * 5
    alpha = usage.spatial_activation_distribution(s, temperature)
    assert alpha.shape == s.shape
    torch.testing.assert_close(alpha, slow_distribution(s, temperature))
    torch.testing.assert_close(alpha.sum((2, 3)), torch.ones(3, 4))


def test_distribution_special_cases_are_exact():
    s = torch.randn(2, 3, 4, 7)
    assert (usage.spatial_activation_distribution(s, math.inf) == 1 / 28).all()
    s[0, 0].fill_(1.0)                                          # a tie: the first position wins
    alpha = usage.spatial_activation_distribution(s, 0)
    assert alpha[0, 0].flatten().tolist() == [1.0] + [0.0] * 27
    assert ((alpha == 0) | (alpha == 1)).all() and (alpha.sum((2, 3)) == 1).all()


@pytest.mark.parametrize("temperature", [-1.0, -math.inf, math.nan])
def test_no_such_temperature(temperature):
    s = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="temperature"):
        usage.spatial_activation_distribution(s, temperature)
    with pytest.raises(ValueError, match="temperature"):
        usage.generation_loss(s, torch.ones(1, 1), temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_extreme_activations_do_not_overflow(dtype):
    s = (torch.randn(2, 3, 4, 4) * 1e4).to(dtype).requires_grad_()
    labels = random_labels(2, 3)
    for temperature in TEMPERATURES:
        with torch.autocast("cpu", torch.bfloat16):
            alpha = usage.spatial_activation_distribution(s, temperature)
            loss = usage.generation_loss(s, labels, temperature) + usage.consistency_loss(alpha, alpha.flip(-1), labels)
        assert alpha.dtype == loss.dtype == torch.float32
        torch.testing.assert_close(alpha.detach().sum((2, 3)), torch.ones(2, 3))
        gradient, = torch.autograd.grad(loss, s)
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_generation_loss_equals_the_slow_loop(temperature):
    s, labels = torch.randn(3, 4, 5, 6) * 3, random_labels()
    alpha, total = slow_distribution(s, temperature), 0.0
    for b, c in np.ndindex(3, 4):
        score = sum(a * v for a, v in zip(alpha[b, c].flatten().tolist(), s[b, c].flatten().tolist()))
        signed = score if labels[b, c] else -score
        total += math.log1p(math.exp(-signed)) / 12
    assert usage.generation_loss(s, labels, temperature).item() == pytest.approx(total, rel=1e-5)
    by_parts = usage.class_scores(s, usage.spatial_activation_distribution(s, temperature))
    torch.testing.assert_close(F.multilabel_soft_margin_loss(by_parts, labels),
                               usage.generation_loss(s, labels, temperature))


def test_cam_is_infinite_temperature():
    """Global average pooling of 1x1-convolved features, trained with the logistic loss: values and gradients."""
    features, classifier, labels = torch.randn(3, 8, 5, 6), nn.Conv2d(8, 4, 1), random_labels()
    cam = F.multilabel_soft_margin_loss(F.linear(F.adaptive_avg_pool2d(features, 1)[:, :, 0, 0],
                                                 classifier.weight[:, :, 0, 0], classifier.bias), labels)
    ours = usage.generation_loss(classifier(features), labels, math.inf)
    torch.testing.assert_close(ours, cam)
    for a, b in zip(torch.autograd.grad(ours, classifier.parameters()), torch.autograd.grad(cam, classifier.parameters())):
        torch.testing.assert_close(a, b)


def test_mil_is_zero_temperature():
    s, labels = torch.randn(3, 4, 5, 6, requires_grad=True), random_labels()
    mil = F.multilabel_soft_margin_loss(F.adaptive_max_pool2d(s, 1)[:, :, 0, 0], labels)
    ours = usage.generation_loss(s, labels, 0)
    torch.testing.assert_close(ours, mil)
    torch.testing.assert_close(torch.autograd.grad(ours, s), torch.autograd.grad(mil, s))
    torch.testing.assert_close(usage.generation_loss(s, labels, 1e-4), mil)          # and its limit


def test_class_to_patch_attention_is_one_more_alpha():
    network = usage.build_network("deit_tiny", 3).eval()
    with torch.no_grad():
        s, attention = network(torch.randn(2, 3, 48, 64), return_attention=True)
    assert s.shape == (2, 3, 3, 4) and attention.shape == (2, 1, 3, 4)
    torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 1))
    scores = usage.class_scores(s, attention)
    for b, c in np.ndindex(2, 3):
        assert scores[b, c].item() == pytest.approx((s[b, c] * attention[b, 0]).sum().item(), abs=1e-5)


# ---- Sec. 4.2 --------------------------------------------------------------------------------------------------------


def test_consistency_loss_equals_the_slow_loop():
    student, teacher = (usage.spatial_activation_distribution(torch.randn(3, 4, 5, 6), 1.0) for _ in range(2))
    labels, pairs = random_labels(), []
    for b, c in np.ndindex(3, 4):
        if labels[b, c]:
            pairs.append(sum(t * math.log(t / s) for t, s in zip(teacher[b, c].flatten().tolist(),
                                                                 student[b, c].flatten().tolist())))
    assert usage.consistency_loss(student, teacher, labels).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


def test_consistency_loss_at_its_edges():
    s = torch.randn(2, 3, 4, 4, requires_grad=True)
    t = torch.randn(2, 3, 4, 4, requires_grad=True)
    student, teacher = (usage.spatial_activation_distribution(a, 0.5) for a in (s, t))
    assert usage.consistency_loss(student, student, torch.ones(2, 3)) == 0
    loss = usage.consistency_loss(student, teacher, torch.ones(2, 3))
    assert loss > 0
    loss.backward()
    assert t.grad is None and s.grad.abs().sum() > 0
    s.grad = None
    nothing = usage.consistency_loss(usage.spatial_activation_distribution(s, 0.5), teacher, torch.zeros(2, 3))
    nothing.backward()
    assert nothing == 0 and (s.grad == 0).all()
    one_hot = usage.spatial_activation_distribution(s, 0), usage.spatial_activation_distribution(t, 0)
    assert usage.consistency_loss(*one_hot, torch.ones(2, 3)).isfinite()


def test_learning_status_and_rates():
    assert usage.learning_status(math.log(2)) == pytest.approx(0) and usage.learning_status(0.0) == 1
    assert usage.learning_status(5.0) == 0
    assert usage.learning_status(0.5 * math.log(2)) == pytest.approx(0.5)
    assert usage.adjustment_rates(0.5, 0.2, 0.3) == (pytest.approx(0.1), pytest.approx(0.03))
    assert usage.adjustment_rates(0.0, 0.2, 0.5) == (0, 0)
    for wrong in (math.nan, -1.0):
        with pytest.raises(ValueError):
            usage.learning_status(wrong)
        with pytest.raises(ValueError):
            usage.adjustment_rates(0.5, wrong, 0.5)


def test_teacher_is_the_moving_average_of_weights_and_buffers():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = usage.ema_teacher(student, 0.9)
    expected, previous = None, None
    for _ in range(4):
        with torch.no_grad():
            student[0].weight += torch.randn(3, 3)
        student(torch.randn(8, 3))
        teacher.update_parameters(student)
        now = torch.cat([student[0].weight.detach().flatten(), student[1].running_mean])
        expected = now if previous is None else 0.9 * expected + 0.1 * now
        previous = now
    got = torch.cat([teacher.module[0].weight.flatten(), teacher.module[1].running_mean])
    torch.testing.assert_close(got, expected)


PAPER = [name for name, function in inspect.getmembers(usage, inspect.isfunction) if function.__module__ == "usage"
         and inspect.getsourcelines(function)[1] < inspect.getsource(usage).split("# 2. The networks")[0].count("\n")]


@pytest.mark.parametrize("name", PAPER)
def test_functions_of_the_paper_stand_alone(name):
    """Each, pasted below `import torch` and `import torch.nn.functional as F`, gives what it gives here."""
    alone = {"torch": torch, "F": F}
    exec(inspect.getsource(getattr(usage, name)), alone)
    s, alpha = torch.randn(2, 3, 4, 4), torch.softmax(torch.randn(2, 3, 16), -1).view(2, 3, 4, 4)
    labels = torch.ones(2, 3)
    network = usage.build_network("mobilenet_v2", 2)
    arguments = {
        "spatial_activation_distribution": (s, 0.7), "class_scores": (s, alpha), "generation_loss": (s, labels, 0.7),
        "consistency_loss": (alpha, alpha.flip(0), labels), "learning_status": (0.3,), "adjustment_rates": (0.3, 0.2, 0.5),
        "set_adjustment": (network, 0.3), "ema_teacher": (nn.Linear(2, 2), 0.9),
        "seed_scores": ([s, s], labels, (9, 9)), "refine_scores": (s, alpha, 0.1), "label_map": (alpha, 0.05)}[name]
    here, there = getattr(usage, name)(*arguments), alone[name](*arguments)
    if name == "ema_teacher":
        here, there = here.module.weight, there.module.weight
    torch.testing.assert_close(here, there)


# ---- Seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [True, False])
def test_seed_scores_equal_the_slow_loop(align_corners):
    maps, labels = [torch.randn(2, 3, 3, 4), torch.randn(2, 3, 6, 7)], random_labels(2, 3)
    scores = usage.seed_scores(maps, labels, (12, 16), align_corners)
    for b, c in np.ndindex(2, 3):
        total = sum(F.interpolate(m[b:b + 1, c:c + 1], (12, 16), mode="bilinear", align_corners=align_corners)[0, 0]
                    for m in maps).clamp(min=0)
        torch.testing.assert_close(scores[b, c], total / total.max() if labels[b, c] else torch.zeros(12, 16))
    assert (usage.seed_scores([-torch.ones(1, 1, 2, 2)], torch.ones(1, 1), (4, 4)) == 0).all()     # nothing positive


def test_refinement_equals_the_slow_loop():
    x, scores = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    p = torch.sigmoid((scores - 0.4) / 0.1)[0]
    positions = [(i, j) for i in range(6) for j in range(7)]
    around = {}                                                 # of each position: its neighbours at dilations 1 and 2
    for i, j in positions:
        steps = [(d * dy, d * dx) for d in (1, 2) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
        around[i, j] = [(min(max(i + dy, 0), 5), min(max(j + dx, 0), 6)) for dy, dx in steps]
    for _ in range(3):
        moved = torch.zeros_like(p)
        for i, j in positions:
            colours = np.array([[x[0, c, m, n].item() for m, n in around[i, j]] for c in range(3)])     # (3, 16)
            here = np.array([[x[0, c, i, j].item()] for c in range(3)])
            affinity = np.exp(-(np.abs(colours - here) / (0.1 * colours.std(1, ddof=1, keepdims=True))).mean(0))
            for weight, (m, n) in zip(affinity / affinity.sum(), around[i, j]):
                moved[:, i, j] += weight * p[:, m, n]
        p = moved
    refined = usage.refine_scores(x, scores, 0.4, dilations=(1, 2), iterations=3)
    torch.testing.assert_close(refined[0], (0.4 + 0.1 * torch.logit(p)).clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_refinement_follows_an_edge():
    image = torch.zeros(1, 3, 40, 200)
    image[..., 100:] = 1
    scores = torch.linspace(0, 1, 200).expand(1, 1, 40, 200)    # exceeds 0.4 from column 80 on
    refined = usage.refine_scores(image + 0.01 * torch.rand(1, 3, 40, 200), scores, 0.4)
    left, right = refined[..., :97].max(), refined[..., 103:].min()
    assert refined.shape == scores.shape and left < right
    constant = usage.refine_scores(torch.rand(1, 3, 20, 20), torch.full((1, 2, 20, 20), 0.3), 0.4)
    torch.testing.assert_close(constant, torch.full((1, 2, 20, 20), 0.3))


def test_uncertain_pixels_become_void(tmp_path):
    levels = torch.tensor([[[0, 90, 102, 130, 255]], [[10, 20, 110, 0, 0]]], dtype=torch.uint8)     # 0.4 is 102
    make_seeds.write_results(tmp_path, "a", torch.tensor([1, 4]), levels, levels, 0.4)
    assert usage.read_mask(tmp_path / "seeds/a.png", (1, 5), 5).tolist() == [[0, 0, 5, 2, 2]]
    assert usage.read_mask(tmp_path / "pseudo_masks/a.png", (1, 5), 5).tolist() == [[0, 255, 255, 2, 2]]


def test_label_map_equals_the_slow_loop():
    scores = torch.rand(2, 3, 5, 5)
    scores[0, :, 0, 0] = 0.5                                    # not above the threshold
    labels = usage.label_map(scores, 0.5)
    for b, i, j in np.ndindex(2, 5, 5):
        pixel = scores[b, :, i, j].tolist()
        assert labels[b, i, j] == (pixel.index(max(pixel)) + 1 if max(pixel) > 0.5 else 0)
    numbers = torch.tensor([7, 0, 3])
    expected = torch.cat([torch.zeros(1, dtype=torch.int64), numbers + 1])[labels]
    assert torch.equal(usage.label_map(scores, 0.5, numbers), expected)
    assert torch.equal(usage.label_map(scores[:, :0], 0.5, numbers[:0]), torch.zeros(2, 5, 5, dtype=torch.int64))


@pytest.mark.parametrize("backbone, side", [("resnet18", 65), ("deit_tiny", 64)])
def test_seed_at_one_scale_is_the_plain_network(backbone, side):
    network = usage.build_network(backbone, 3).eval()
    image = torch.randn(1, 3, side, side)
    with torch.no_grad():
        plain = network(image)
        one, = usage.multi_scale_activations(network, image, (side, side), [1.0], flip=False)
        flipped = usage.multi_scale_activations(network, image, (side, side), [1.0], flip=True)
        mirror = network(image.flip(-1)).flip(-1)
    torch.testing.assert_close(one, plain)
    torch.testing.assert_close(flipped[0], plain)
    torch.testing.assert_close(flipped[1], mirror)


# ---- The networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", usage.BACKBONES)
def test_every_backbone_maps_any_size_and_adjusts(backbone):
    network = usage.build_network(backbone, 3)
    images = torch.randn(2, 3, 50, 81)
    assert network.eval()(images[:1]).shape == (1, 3, 4, 6)
    names = [type(module).__name__ for module in network.modules()]
    blocks = {"mobilenet_v2": 10, "resnet18": 8, "resnet50": 16, "resnet101": 33}.get(backbone, 24)
    assert names.count("StochasticDepth") == blocks
    usage.set_adjustment(network, 0.4)
    rates = [module.p for module in network.modules() if type(module).__name__ == "StochasticDepth"]
    assert rates == sorted(rates) and rates[0] > 0 and rates[-1] == pytest.approx(0.4) and network.dropout.p == 0.4
    with pytest.raises(ValueError):
        usage.set_adjustment(network, 1.5)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "resnet50", "deit_tiny"])
def test_rate_zero_is_the_plain_network(backbone):
    network = usage.build_network(backbone, 3)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        usage.freeze_batchnorm(network.train())                 # BatchNorm aside, training mode must not matter
        usage.set_adjustment(network, 0.5)
        assert not torch.equal(network(images), network(images))
        usage.set_adjustment(network, 0.0)
        adjusted = network(images)
        usage.set_adjustment(network, 0.5)
        torch.testing.assert_close(network.eval()(images), adjusted, rtol=0, atol=0)


def test_resnet_features_are_torchvisions():
    network = usage.build_network("resnet50", 3).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    state = {name.replace("bn3.0.", "bn3."): tensor for name, tensor in network.trunk.state_dict().items()}
    theirs.load_state_dict(state, strict=False)
    body = nn.Sequential(*list(theirs.children())[:-2])
    images = torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        torch.testing.assert_close(network.features(images), body(images))


def test_transformer_features_are_torchvisions_at_224():
    network = usage.build_network("deit_tiny", 3).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        trunk = network.trunk
        tokens = trunk.encoder(torch.cat([trunk.class_token, trunk._process_input(images)], 1))[:, 1:]
        torch.testing.assert_close(network.features(images).flatten(2).transpose(1, 2), tokens)


def published_deit(width=192, blocks=12):
    """A random checkpoint with the names and shapes of deit_tiny_patch16_224."""
    state = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width), "patch_embed.proj.weight": (width, 3, 16, 16),
             "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
             "head.weight": (1000, width), "head.bias": (1000,)}
    for k in range(blocks):
        for name, shape in {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width),
                            "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                            "mlp.fc2": (width, 4 * width)}.items():
            state[f"blocks.{k}.{name}.weight"], state[f"blocks.{k}.{name}.bias"] = shape, shape[:1]
    return {name: torch.randn(shape) * 0.1 for name, shape in state.items()}


def slow_deit(state, images, heads=3):
    """DeiT's forward written from its published code's names: (B, 3, 224, 224) -> patch features (B, 196, D)."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]

    def linear(y, name):
        return F.linear(y, state[name + ".weight"], state[name + ".bias"])

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps=1e-6)

    for k in range(12):
        block = f"blocks.{k}."
        qkv = linear(norm(x, block + "norm1"), block + "attn.qkv").unflatten(-1, (3, heads, -1))
        q, key, v = qkv.permute(2, 0, 3, 1, 4)                  # each (B, heads, 1 + N, D / heads)
        attention = (q @ key.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), block + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
    return norm(x, "norm")[:, 1:]


def test_deit_checkpoint_in_the_published_naming(tmp_path):
    state = published_deit()
    torch.save({"model": state}, tmp_path / "deit.pth")
    network = usage.build_network("deit_tiny", 5, str(tmp_path / "deit.pth")).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(network.features(images).flatten(2).transpose(1, 2), slow_deit(state, images),
                                   rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18"])
def test_torchvision_checkpoint(backbone, tmp_path):
    theirs = torchvision.models.get_model(backbone)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    network = usage.build_network(backbone, 5, str(tmp_path / "weights.pth"))
    first = next(parameter for name, parameter in theirs.named_parameters() if name.endswith("weight"))
    torch.testing.assert_close(next(network.parameters()), first, rtol=0, atol=0)
    with pytest.raises(usage.InputError, match="do not fit"):
        usage.build_network("resnet50", 5, str(tmp_path / "weights.pth"))


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    for backbone in ("resnet18", "deit_tiny"):
        with pytest.raises(usage.InputError, match="--weights FILE"):
            usage.build_network(backbone, 5, "imagenet")
    (tmp_path / "text.pth").write_text("no checkpoint")
    for path, reason in (("text.pth", "not readable as a checkpoint"), ("nowhere.pth", "no such file")):
        with pytest.raises(usage.InputError, match=reason):
            usage.build_network("resnet18", 5, str(tmp_path / path))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(usage.InputError, match="not a checkpoint"):
        usage.build_network("resnet18", 5, str(tmp_path / "list.pth"))


def test_pretrained_weights_go_where_the_published_file_says(monkeypatch):
    """The download's contents, stood in for by made ones, end up in the network."""
    state = published_deit()
    downloads = {usage.DEITS["deit_tiny"][2]: {"model": state}}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: downloads[url])
    network = usage.build_network("deit_tiny", 5, "imagenet")
    assert torch.equal(network.trunk.encoder.ln.weight, state["norm.weight"])
    theirs = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **_: theirs)
    network = usage.build_network("resnet18", 5, "imagenet")
    assert torch.equal(network.trunk.conv1.weight, theirs["conv1.weight"])


# ---- The metrics -----------------------------------------------------------------------------------------------------


def test_metrics_equal_a_brute_force_count():
    truth, predicted = torch.randint(0, 4, (20, 30)), torch.randint(0, 3, (20, 30))
    truth[:3] = usage.VOID
    rates = evaluation.metrics(evaluation.confusion_matrix(truth, predicted, 4))
    for c in range(5):
        tp = fp = fn = 0
        for i, j in np.ndindex(20, 30):
            t, p = truth[i, j].item(), predicted[i, j].item()
            if t != usage.VOID:
                tp, fp, fn = tp + (t == c == p), fp + (p == c != t), fn + (t == c != p)
        if c == 4:                                              # in neither
            assert rates["IoU"][c].isnan()
        else:
            assert [rates[key][c].item() for key in ("IoU", "FPR", "FNR")] == pytest.approx(
                [count / (tp + fp + fn) for count in (tp, fp, fn)])
            assert sum(rates[key][c] for key in rates) == pytest.approx(1)


def test_sweep_equals_separate_evaluations():
    items, expected = [], torch.zeros(101, 4, 4, dtype=torch.int64)
    for classes in ([0, 2], [1], []):
        truth = torch.randint(0, 4, (8, 9), dtype=torch.uint8)
        truth[0] = usage.VOID
        items.append((truth, torch.tensor(classes, dtype=torch.long),
                      torch.randint(0, 256, (len(classes), 8, 9), dtype=torch.uint8)))
    for truth, classes, levels in items:
        scores = torch.zeros(1, 3, 8, 9)
        scores[0, classes] = levels / 255
        for k, threshold in enumerate(torch.arange(101) / 100):
            predicted = usage.label_map(scores, threshold.item())[0]
            expected[k] += evaluation.confusion_matrix(truth, predicted, 3)
    counts = sum(evaluation.count_levels(*item, 3) for item in items)
    for k, threshold in enumerate(torch.arange(101) / 100):
        assert torch.equal(evaluation.at_threshold(counts, threshold), expected[k])


# ---- The data --------------------------------------------------------------------------------------------------------


def digest(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Twelve small toy scenes."""
    return usage.draw_toy(tmp_path_factory.mktemp("data") / "mini", train=8, val=4, side=48)


def test_toy_is_the_same_every_time(toy, tmp_path):
    assert digest(usage.draw_toy(tmp_path / "again", train=8, val=4, side=48)) == digest(toy)
    data = usage.VocFolder(toy)
    for split in ("train", "val"):
        for name, labels in zip(data.split(split), data.labels(data.split(split))):
            mask = usage.read_mask(data.masks / f"{name}.png", (48, 48), 5)
            assert {c + 1 for c in labels.nonzero()[:, 0].tolist()} == set(mask.unique().tolist()) - {0}


def test_vocs_own_annotations_and_folders(toy, tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    shutil.copytree(toy, root)
    (root / "labels.json").unlink()
    (root / "classes.txt").unlink()
    (root / "Annotations").mkdir()
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("train_0000\ntrain_0001\n")
    (root / "Annotations/train_0000.xml").write_text(
        "<annotation><object><name>dog</name><part><name>head</name></part></object><object><name>person</name></object>"
        "<object><name>dog</name></object></annotation>")
    data = usage.VocFolder(tmp_path)                            # the folder that --download was given
    assert data.has_split("train_aug") and len(data.classes) == 20
    assert data.labels(["train_0000"])[0].nonzero()[:, 0].tolist() == [11, 14]
    with pytest.raises(usage.InputError, match="train_0001.xml"):
        data.labels(["train_0001"])


def test_download_of_voc(toy, tmp_path, monkeypatch):
    """torchvision's download, stood in for by one that unpacks the toy where VOC's archive would."""
    def download(root, year, image_set, download):
        assert (year, download) == ("2012", True)
        shutil.copytree(toy, Path(root, "VOCdevkit", "VOC2012"))
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", download)
    assert usage.VocFolder(tmp_path, download=True).split("val")

    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", no_network)
    with pytest.raises(usage.InputError, match="could not be downloaded"):
        usage.VocFolder(tmp_path, download=True)


def draw_coco(root, toy):
    """A small COCO from the toy scenes: each critter an object, as polygons, or as runs, plain or compressed."""
    data, categories = usage.VocFolder(toy), [7, 1, 90, 13, 44]         # with gaps and out of order, as COCO's are
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2014").mkdir()
        images, annotations = [], []
        for number, name in enumerate(data.split(split), start=1):
            shutil.copy(data.images[name], root / f"{split}2014/COCO_{name}.jpg")
            images.append({"id": number, "file_name": f"COCO_{name}.jpg", "height": 48, "width": 48})
            mask = usage.read_mask(data.masks / f"{name}.png", None, 5).numpy()
            for c, kind in zip(data.labels([name])[0].nonzero()[:, 0].tolist(), ("counts", "text", "boxes")):
                inside = mask == c + 1
                runs = {"size": [48, 48], "counts": slow_runs(inside)}
                if kind == "text":
                    runs["counts"] = slow_text(runs["counts"])
                boxes = [[x, y, x + 1, y, x + 1, y + 1, x, y + 1] for y, x in np.argwhere(inside).tolist()]
                annotations.append({"id": len(annotations), "image_id": number, "category_id": categories[c], "iscrowd": 0,
                                    "area": int(inside.sum()), "segmentation": boxes if kind == "boxes" else runs})
        images.append({"id": 99, "file_name": "COCO_empty.jpg", "height": 48, "width": 48})
        Image.new("RGB", (48, 48)).save(root / f"{split}2014/COCO_empty.jpg")
        names = [{"id": number, "name": f"{name}"} for number, name in zip(categories, data.classes)]
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(
            {"info": {}, "images": images, "annotations": annotations, "categories": names}))
    return root


def slow_runs(mask):
    """Run lengths down the columns, background first."""
    runs, value = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            runs, value = [*runs, 0], pixel
        runs[-1] += 1
    return runs


def slow_text(runs):
    """COCO's compression of run lengths, after the description of its maskApi."""
    text = ""
    for k, value in enumerate(runs):
        value -= runs[k - 2] if k > 2 else 0
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
            if not more:
                break
    return text


def test_coco_has_the_labels_and_masks_it_was_made_of(toy, tmp_path):
    coco, voc = usage.open_data(draw_coco(tmp_path / "coco", toy)), usage.VocFolder(toy)
    assert coco.classes == [voc.classes[k] for k in (1, 0, 3, 4, 2)]            # by category id: 1, 7, 13, 44, 90
    assert len(coco.split("train")) == 8 and len(coco.split("val")) == 5        # the empty image only where it is scored
    order = torch.tensor([0, 2, 1, 5, 3, 4])                                    # VOC's label -> COCO's
    for split in ("train", "val"):
        for name in voc.split(split):
            expected = order[voc.mask(name).long()]
            assert torch.equal(coco.mask(f"COCO_{name}", (48, 48)).long(), expected)
            assert {c + 1 for c in coco.labels([f"COCO_{name}"])[0].nonzero()[:, 0].tolist()} == set(
                expected.unique().tolist()) - {0}
    assert (coco.mask("COCO_empty") == 0).all()
    with pytest.raises(usage.InputError, match="48x48"):
        coco.mask("COCO_empty", (48, 50))


def test_coco_outlines(tmp_path):
    expected = np.zeros((5, 7), bool)
    expected[1:4, 2:5], expected[2, 3], expected[0, 6] = True, False, True
    text = ";32NO0124NN"                                        # what pycocotools 2.0 makes of it
    assert (usage.draw_outline({"counts": text, "size": [5, 7]}, 5, 7) == expected).all()
    assert slow_text(slow_runs(expected)) == text
    triangles = [[0, 0, 20, 0, 0, 20], [20, 20, 40, 20, 40, 40]]
    y, x = np.mgrid[:40, :40] + 0.5                             # middles of the pixels
    inside = (x + y < 20) | ((y > 20) & (x > y))
    assert (usage.draw_outline(triangles, 40, 40) != inside).sum() <= 45        # those that the slopes cut


def test_small_objects_lie_over_large_ones_and_crowds_are_void(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)

    def square(side):
        return [[0, 0, side, 0, side, side, 0, side]]

    def change(table):
        table["annotations"] = [
            {"image_id": 1, "category_id": category, "iscrowd": crowd, "area": side ** 2, "segmentation": outline}
            for category, crowd, side, outline in ((1, 0, 10, square(10)), (7, 0, 30, square(30)), (
                90, 1, 48, {"size": [48, 48], "counts": [0, 48 * 48]}))]
    edited(root / "annotations/instances_train2014.json", change)
    mask = usage.CocoFolder(root).mask("COCO_train_0000")
    assert (mask[5, 5], mask[20, 20], mask[40, 40]) == (1, 2, usage.VOID)


def test_palette_is_vocs():
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [tuple(colour) for colour in usage.voc_palette()[:5].tolist()] == known
    assert tuple(usage.voc_palette()[usage.VOID].tolist()) == (224, 224, 192)


def test_images_of_every_mode(tmp_path):
    grey = np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))
    pictures = {"grey.png": Image.fromarray(grey), "cmyk.jpg": Image.fromarray(grey).convert("CMYK"),
                "palette.png": Image.fromarray(grey).convert("P"), "alpha.png": Image.fromarray(grey).convert("RGBA"),
                "deep.png": Image.fromarray(grey.astype(np.uint16) * 257)}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        image = usage.read_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (32, 16), name
        assert np.abs(np.asarray(image)[..., 0].astype(int) - grey).max() <= 12, name
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")  # 400 million pixels in a small file
    with pytest.raises(usage.InputError, match="bomb.png: not readable"):
        usage.read_image(tmp_path / "bomb.png")
    turned = Image.Exif()
    turned[0x0112] = 6                                          # the camera was turned by 90 degrees
    pictures["grey.png"].save(tmp_path / "turned.jpg", exif=turned)
    assert usage.read_image(tmp_path / "turned.jpg").size == (16, 32)


def test_a_checkpoint_is_never_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)
    torch.save({"student": Hostile()}, tmp_path / "classifier.pt")
    with pytest.raises(usage.InputError, match="not readable as a checkpoint"):
        usage.load_checkpoint(tmp_path / "classifier.pt", "")
    assert not (tmp_path / "executed").exists()


def test_no_partial_file_has_the_final_name(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError):
        with usage.written(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, capsys):
    usage.save_checkpoint(tmp_path / "a.pt", {"epoch": 1})

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")         # what torch.save says on a full disk
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as end, usage.one_line_errors("run it again"):
        usage.save_checkpoint(tmp_path / "a.pt", {"epoch": 2})
    assert end.value.code == 2 and "run it again" in capsys.readouterr().err
    assert usage.load_checkpoint(tmp_path / "a.pt", "") == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


# ---- The four stages -------------------------------------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--master-port", 29531, "--nproc-per-node", 2, "--"]
SMALL = ["--weights", "none", "--size", "33", "--batch-size", "4", "--workers", "0", "--reg-epochs", "0"]
BOTH = ["--epochs", "1", *SMALL, "--reg-epochs", "1"]          # an epoch without L_REG, an epoch with it


def stage(script, *arguments, launcher=()):
    """Run a stage as a process; its output."""
    command = [sys.executable, *launcher, HERE / script, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """A run folder after all four stages, and what they printed."""
    run = tmp_path_factory.mktemp("runs") / "mobilenet"
    printed = [stage("train_cls.py", "--data", toy, "--run", run, "--backbone", "mobilenet_v2", *BOTH),
               stage("make_seeds.py", "--run", run, "--scales", 1, 2, "--workers", 1),
               stage("train_seg.py", "--run", run, "--epochs", 1, "--batch-size", 4, "--workers", 0),
               stage("eval.py", "--run", run, "--sweep")]
    return run, printed


def test_four_stages_of_a_cnn(finished, toy):
    run, printed = finished
    assert re.search(r"step 4 +L_GEN [\d.]+ +L_REG [\d.e-]+ .*images/s +0:00 left", printed[0])
    assert "accuracy per label" in printed[0]
    records = [json.loads(line) for line in (run / "classifier.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 4 and math.isfinite(records[-1]["L_GEN"])
    data = usage.VocFolder(toy)
    for folder, split in (("seeds", "train"), ("segmentation", "val")):
        names = data.split(split)
        assert sorted(path.stem for path in (run / folder).glob("*.png")) == sorted(names)
        for name, labels in zip(names, data.labels(names)):
            mask = usage.read_mask(run / folder / f"{name}.png", (48, 48), 5)
            if folder == "seeds":                               # only classes that the image has
                assert set(mask.unique().tolist()) <= {0} | {c + 1 for c in labels.nonzero()[:, 0].tolist()}
    for picture in ("seeds.png", "segmentation.png"):
        assert Image.open(run / picture).size[1] > 100
    report = json.loads((run / "report.json").read_text())
    assert [entry["what"] for entry in report] == ["seeds", "pseudo masks", "seeds, oracle", "segmentation"]
    assert [entry["images"] for entry in report] == [8, 8, 8, 4]
    fixed, _, oracle, _ = report
    assert fixed["mIoU"] == pytest.approx(oracle["mIoU at 0.00, 0.01 ... 1.00"][40])     # the PNGs are the scores at 0.40
    assert oracle["mIoU"] == max(oracle["mIoU at 0.00, 0.01 ... 1.00"]) and "ORACLE" in oracle["threshold"]
    assert "train, 8 images, given labels, threshold 0.4 (fixed beforehand)" in printed[3]
    assert len(list((run / "pseudo_masks").glob("*.png"))) == 8
    pairs = stage("eval.py", "--pred", run / "seeds", "--truth", toy / "SegmentationClass",
                  "--classes", toy / "classes.txt")
    assert f"{fixed['mIoU']:.3f}" in pairs


def test_four_stages_of_a_transformer(toy, tmp_path):
    stage("train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "deit_tiny", *BOTH)
    stage("make_seeds.py", "--run", tmp_path, "--scales", 1, "--workers", 0)
    stage("train_seg.py", "--run", tmp_path, "--epochs", 1, "--batch-size", 4, "--workers", 0)
    stage("eval.py", "--run", tmp_path)
    assert len(json.loads((tmp_path / "report.json").read_text())) == 3


def test_four_stages_on_coco(toy, tmp_path):
    coco, run = draw_coco(tmp_path / "coco", toy), tmp_path / "run"
    stage("train_cls.py", "--data", coco, "--run", run, "--backbone", "mobilenet_v2", "--epochs", 1, *SMALL)
    stage("make_seeds.py", "--run", run, "--scales", 1, "--workers", 1)
    stage("train_seg.py", "--run", run, "--epochs", 1, "--batch-size", 4, "--workers", 0)
    stage("eval.py", "--run", run, "--sweep")
    report = json.loads((run / "report.json").read_text())
    assert [entry["images"] for entry in report] == [8, 8, 8, 5]


def test_photographs_without_labels(finished, tmp_path):
    photos, run = tmp_path / "holiday", tmp_path / "run"
    shutil.copytree(finished[0], run)
    photos.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 30)).save(photos / "turned.jpg", exif=turned)
    Image.new("CMYK", (20, 50)).save(photos / "print.tiff")
    Image.new("LA", (3, 2)).save(photos / "tiny.png")
    for threshold, expected in ((0, 5), (1, 0)):                # every class, none
        shutil.rmtree(run / "images-holiday", ignore_errors=True)
        stage("make_seeds.py", "--run", run, "--images", photos, "--class-threshold", threshold, "--workers", 0)
        labels = json.loads((run / "images-holiday/labels.json").read_text())
        assert {name: len(names) for name, names in labels.items()} == dict.fromkeys(("print", "tiny", "turned"), expected)
        for name, size in (("turned", (30, 60)), ("print", (20, 50)), ("tiny", (3, 2))):
            assert Image.open(run / f"images-holiday/pseudo_masks/{name}.png").size == size
    assert Image.open(run / "images-holiday/seeds.png").size[0] > 100


def test_another_split_gets_predicted_labels(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    stage("make_seeds.py", "--run", run, "--split", "val", "--workers", 0)
    assert "val, 4 images, predicted labels" in stage("eval.py", "--run", run / "val")
    assert len(json.loads((run / "val/labels.json").read_text())) == 4


def test_training_opens_no_mask(toy, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy, data)
    shutil.rmtree(data / "SegmentationClass")
    stage("train_cls.py", "--data", data, "--run", tmp_path / "run", "--backbone", "mobilenet_v2", "--epochs", 1, *SMALL)
    stage("make_seeds.py", "--run", tmp_path / "run", "--scales", 1, "--workers", 0)
    stage("train_seg.py", "--run", tmp_path / "run", "--epochs", 1, "--batch-size", 4, "--workers", 0)


def start(*arguments, **how):
    """Start a stage as a process of its own."""
    return subprocess.Popen([sys.executable, *map(str, (HERE / arguments[0], *arguments[1:]))], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, **how)


def wait_for(path, process):
    while not path.exists():
        time.sleep(0.01)
        assert process.poll() is None, f"ended before {path}"


def kill_when_there(path, *arguments):
    process = start(*arguments)
    wait_for(path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("script, result", [("train_cls.py", "classifier.pt"), ("train_seg.py", "segmenter.pt")])
def test_a_killed_training_ends_with_the_same_weights(script, result, finished, toy, tmp_path):
    states = []
    for name in ("whole", "killed"):
        run = tmp_path / name
        command = [script, "--run", run]
        if script == "train_cls.py":
            command += ["--data", toy, "--backbone", "mobilenet_v2", *BOTH, "--reg-epochs", 2]
        else:
            shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("segment*"))
            command += ["--epochs", 3, "--batch-size", 4, "--workers", 0]
        if name == "killed":
            kill_when_there(run / result, *command)
            assert usage.load_checkpoint(run / result, "")["epoch"] < 3
        stage(*command)
        states.append(usage.load_checkpoint(run / result, ""))
    for part in {"student", "teacher", "segmenter"} & states[0].keys():
        assert all(torch.equal(states[0][part][key], states[1][part][key]) for key in states[0][part])
    assert states[0].get("running") == states[1].get("running") and states[0]["epoch"] == 3


def test_killed_seeds_end_as_the_same(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished[0] / "classifier.pt", run)
    command = ["make_seeds.py", "--run", run, "--scales", 1, 2, "--workers", 0]
    kill_when_there(run / "seeds", *command)
    stage(*command)
    for folder in ("seeds", "pseudo_masks"):
        assert digest(run / folder) == digest(finished[0] / folder)
    assert not list(run.rglob(".partial-*"))


def test_ctrl_c_says_how_to_go_on(toy, tmp_path):
    process = start("train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "mobilenet_v2", "--epochs", 100, *SMALL)
    wait_for(tmp_path / "classifier.pt", process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1].strip().splitlines()
    assert process.returncode == 130 and errors[-1] == "train_cls.py: interrupted; run the same command again", errors


def test_a_disk_that_fills_up(finished, toy, tmp_path):
    """Files can grow to 1 MB only, less than a checkpoint has."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))
    command = ["train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "mobilenet_v2", "--epochs", 50, *SMALL]
    kill_when_there(tmp_path / "classifier.pt", *command)
    before = (tmp_path / "classifier.pt").read_bytes()
    process = start(*command, preexec_fn=limit)
    errors = process.communicate(timeout=60)[1].strip().splitlines()
    assert process.returncode == 2 and len(errors) == 1 and "make room" in errors[0], errors
    assert (tmp_path / "classifier.pt").read_bytes() == before


@pytest.mark.parametrize("script", ["train_cls.py", "train_seg.py"])
def test_a_loss_that_is_not_finite_stops_the_run(script, finished, toy, tmp_path):
    run, result = tmp_path / "run", "segmenter.pt"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("segment*"))
    command = [script, "--run", run, "--epochs", 2, "--lr", 1e30, "--batch-size", 2, "--workers", 0]
    if script == "train_cls.py":
        run, result = tmp_path / "new", "classifier.pt"
        command = [script, "--run", run, "--data", toy, "--backbone", "resnet18", "--weights", "none", "--size", 33,
                   "--reg-epochs", 0, *command[3:]]
    process = start(*command)
    errors = process.communicate()[1].strip().splitlines()
    assert process.returncode == 2 and re.search(r"step \d+: the loss is not finite .*lower --lr", errors[-1]), errors
    assert not (run / result).exists()


def test_seeds_continue_where_they_stopped(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    first, *others = sorted((run / "seeds").glob("*.png"))
    before, kept = first.read_bytes(), [path.stat().st_mtime_ns for path in others]
    first.unlink()
    out = stage("make_seeds.py", "--run", run, "--scales", 1, 2, "--workers", 0)
    assert "7 of them are there" in out and first.read_bytes() == before
    assert [path.stat().st_mtime_ns for path in others] == kept


def test_two_processes(toy, tmp_path):
    stage("train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "mobilenet_v2", "--epochs", 1, *SMALL,
          launcher=TORCHRUN)
    stage("make_seeds.py", "--run", tmp_path, "--scales", 1, "--workers", 0, launcher=TORCHRUN)
    stage("train_seg.py", "--run", tmp_path, "--epochs", 1, "--batch-size", 4, "--workers", 0, launcher=TORCHRUN)
    assert len(list((tmp_path / "seeds").glob("*.png"))) == 8 and len(list((tmp_path / "segmentation").glob("*.png"))) == 4


def losses(run):
    return [[json.loads(line)[key] for key in ("L_GEN", "L_REG", "q")]
            for line in (run / "classifier.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backbone", ["resnet18", "deit_tiny"])
def test_two_processes_give_the_losses_of_one(backbone, toy, tmp_path):
    weights, script = "none", tmp_path / "float32.py"           # bfloat16 rounds so coarsely that runs part within steps
    script.write_text(f"import contextlib, runpy, sys; sys.path[0] = {str(HERE)!r}; import usage\n"
                      "usage.fast_autocast = lambda device: contextlib.nullcontext()\n"
                      f"runpy.run_path({str(HERE / 'train_cls.py')!r}, run_name='__main__')\n")
    if backbone in usage.CNNS:                                  # pretrained: BatchNorm is frozen, no process has its own
        weights = tmp_path / "weights.pth"
        torch.save(torchvision.models.get_model(backbone).state_dict(), weights)
    for number in (1, 2):
        stage(script, "--data", toy, "--run", tmp_path / str(number), "--backbone", backbone, "--weights", weights,
              "--size", 33, "--batch-size", 4, "--workers", number - 1, "--epochs", 0, "--reg-epochs", 5, "--max-rate", 0,
              "--lr", 1e-4, "--reg-temperature", 0.2, "--teacher-temperature", 0.1,
              launcher=[*TORCHRUN[:-2], number, "--"])
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 1 and one[0][1] > 0                      # a record every tenth step
    np.testing.assert_allclose(one, two, rtol=1e-3)


def test_rows_of_the_ablation(toy, tmp_path):
    """Each flag changes L_REG."""
    losses = set()
    for number, flags in enumerate(([], ["--attention"], ["--no-adaptive"], ["--views", "geometric"])):
        stage("train_cls.py", "--data", toy, "--run", tmp_path / str(number), "--backbone", "deit_tiny", *BOTH, *flags)
        records = (tmp_path / str(number) / "classifier.jsonl").read_text().splitlines()
        losses.add(json.loads(records[-1])["L_REG"])
    assert len(losses) == 4 and 0 not in losses


# ---- Bad input: one line, exit code 2, nothing written or lost -------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[:300])


def edited(path, change):
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def in_colour(path, size=(48, 48), mode="RGB", value=0):
    Image.new(mode, size, value).save(path)


def first_image(data):
    return data / "JPEGImages/train_0000.jpg"


TRAIN = ["train_cls.py", "--data", "DATA", "--run", "NEW", "--backbone", "mobilenet_v2", "--epochs", "1", *SMALL]
SEEDS = ["make_seeds.py", "--run", "RUN", "--data", "DATA", "--workers", "0"]
SEGMENT = ["train_seg.py", "--run", "RUN", "--data", "DATA", "--batch-size", "4", "--epochs", "1", "--workers", "0"]
EVAL = ["eval.py", "--run", "RUN", "--data", "DATA"]
BAD_INPUT = {  # what is wrong: the command, what the line must name, what spoils the data or the run
    "missing data folder": (TRAIN, "data: no such folder", lambda data, run: shutil.rmtree(data)),
    "missing data folder, seeds": (SEEDS, "data: no such folder", lambda data, run: shutil.rmtree(data)),
    "missing data folder, segmentation": (SEGMENT, "data: no such folder", lambda data, run: shutil.rmtree(data)),
    "missing data folder, evaluation": (EVAL, "data: no such folder", lambda data, run: shutil.rmtree(data)),
    "missing list": (TRAIN, "train.txt", lambda data, run: (data / "ImageSets/Segmentation/train.txt").unlink()),
    "empty split": (TRAIN, "train.txt: the list is empty",
                    lambda data, run: (data / "ImageSets/Segmentation/train.txt").write_text("\n")),
    "path in a list": (TRAIN, "train.txt", lambda data, run:
                       (data / "ImageSets/Segmentation/train.txt").write_text("../../secret\n")),
    "missing image": (TRAIN, "train_0000.jpg", lambda data, run: first_image(data).unlink()),
    "missing image, seeds": (SEEDS, "train_0000.jpg", lambda data, run: first_image(data).unlink()),
    "unreadable image": (TRAIN, "train_0000.jpg", lambda data, run: truncated(first_image(data))),
    "unreadable image in a worker": ([*TRAIN, "--workers", "1"], "train_0000.jpg",
                                     lambda data, run: truncated(first_image(data))),
    "unreadable image, seeds": (SEEDS, "train_0000.jpg", lambda data, run: (
        truncated(first_image(data)), (run / "seeds/train_0000.png").unlink(), (run / "seeds.json").unlink())),
    "unreadable image, segmentation": (SEGMENT, "train_0000.jpg", lambda data, run: (
        truncated(first_image(data)), (run / "segmenter.pt").unlink())),
    "unknown label": (TRAIN, "'unicorn'", lambda data, run: edited(
        data / "labels.json", lambda table: table["train_0000"].append("unicorn"))),
    "labels of another shape": (TRAIN, "train_0000 has no list", lambda data, run: (data / "labels.json").write_text(
        '["striped"]')),
    "label that is no name": (TRAIN, "unknown class", lambda data, run: edited(
        data / "labels.json", lambda table: table["train_0000"].append(["striped"]))),
    "image without labels": (TRAIN, "train_0000", lambda data, run: edited(
        data / "labels.json", lambda table: table.pop("train_0000"))),
    "broken labels": (TRAIN, "labels.json", lambda data, run: (data / "labels.json").write_text("{")),
    "mask of another size": (EVAL, "train_0000.png", lambda data, run: in_colour(
        data / "SegmentationClass/train_0000.png", (20, 20), "L")),
    "mask value beyond the classes": (EVAL, "value 6", lambda data, run: in_colour(
        data / "SegmentationClass/train_0000.png", mode="L", value=6)),
    "mask in colour": (EVAL, "RGB", lambda data, run: in_colour(data / "SegmentationClass/train_0000.png")),
    "missing mask": (EVAL, "train_0000.png", lambda data, run: (data / "SegmentationClass/train_0000.png").unlink()),
    "seed of another size": (SEGMENT, "train_0000.png", lambda data, run: (
        in_colour(run / "pseudo_masks/train_0000.png", (20, 20), "L"), (run / "segmenter.pt").unlink())),
    "seeds without classifier": (SEEDS, "run train_cls.py", lambda data, run: (run / "classifier.pt").unlink()),
    "segmentation without classifier": (SEGMENT, "run train_cls.py", lambda data, run: (run / "classifier.pt").unlink()),
    "segmentation without seeds": (SEGMENT, "run make_seeds.py", lambda data, run: shutil.rmtree(run / "pseudo_masks")),
    "evaluation of nothing": (["eval.py", "--run", "NEW"], "run make_seeds.py", None),
    "evaluation without scores": ([*EVAL, "--sweep"], "scores/train_0000.npz", lambda data, run:
                                  (run / "scores/train_0000.npz").unlink()),
    "folder without photographs": ([*SEEDS[:3], "--images", "DATA/SegmentationClass/.."], "no image files", None),
    "no folder of photographs": ([*SEEDS[:3], "--images", "nowhere"], "nowhere: no such folder", None),
    "COCO without what it lists": ([*TRAIN, "--data", "DATA/coco"], "COCO_train_0000.jpg", lambda data, run: (
        draw_coco(data / "coco", data), shutil.rmtree(data / "coco/train2014"))),
    "COCO of something else": ([*TRAIN, "--data", "DATA/coco"], "not COCO's instances", lambda data, run: (
        draw_coco(data / "coco", data), edited(data / "coco/annotations/instances_train2014.json", dict.clear))),
    "learning rate that is no number": ([*SEGMENT, "--lr", "nan"], "--lr must be positive", None),
    "no checkpoint": (SEEDS, "classifier.pt", lambda data, run: (run / "classifier.pt").write_text("text")),
    "checkpoint of something else": (SEGMENT, "classifier.pt", lambda data, run: torch.save(
        {"weights": torch.zeros(3)}, run / "classifier.pt")),
    "checkpoint of other classes": (SEEDS, "its 2 classes are not the 5", lambda data, run:
                                    (data / "classes.txt").write_text("cat\ndog\n")),
    "checkpoint of another backbone": ([*TRAIN[:3], "--run", "RUN", *TRAIN[5:6], "resnet18", *TRAIN[7:]],
                                       "data, backbone", None),
    "weights of another backbone": ([*TRAIN, "--weights", "RUN/classifier.pt"], "do not fit mobilenet_v2", None),
    "no weights file": ([*TRAIN, "--weights", "nowhere.pth"], "nowhere.pth", None),
    "too many workers": ([*TRAIN, "--workers", "1000"], "--workers 1000", None),
    "no such device": ([*TRAIN, "--device", "cuda:7"], "--device cuda:7", None),
    "no such device, seeds": ([*SEEDS, "--device", "tpu"], "--device tpu", None),
    "batch larger than the data": ([*TRAIN, "--batch-size", "50"], "8 images", None),
    "attention of a CNN": ([*TRAIN, "--attention"], "--attention", None),
    "negative temperature": ([*TRAIN, "--temperature", "-1"], "--temperature", None),
    "other settings": ([*SEEDS, "--threshold", "0.3"], "another threshold", None),
    "seeds in the folder of the truth": (SEEDS, "true masks", lambda data, run: (
        shutil.rmtree(run / "seeds"), (run / "seeds").symlink_to(data / "SegmentationClass"))),
    "learning from the truth": ([*SEGMENT, "--seeds", "DATA/SegmentationClass"], "true masks", None),
    "comparing the truth with itself": (
        ["eval.py", "--pred", "DATA/SegmentationClass", "--truth", "DATA/SegmentationClass"], "one folder", None),
    "nothing to compare": (["eval.py", "--pred", "DATA/JPEGImages", "--truth", "DATA/SegmentationClass"], "no .png", None),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, toy, finished, tmp_path, monkeypatch, capsys):
    command, expected, spoil = BAD_INPUT[case]
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(toy, data)
    shutil.copytree(finished[0], run)
    for path in (run / "seeds.json", run / "segmentation.json"):        # the copy's own folders
        edited(path, lambda table: table.update(data=str(data)))
    if spoil:
        spoil(data, run)
    before = digest(tmp_path)
    command = [part.replace("DATA", str(data)).replace("RUN", str(run)).replace("NEW", str(tmp_path / "new"))
               for part in command]
    monkeypatch.setattr(sys, "argv", [str(HERE / command[0]), *command[1:]])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / command[0]), run_name="__main__")
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and expected in lines[0], lines
    after = digest(tmp_path)
    lost = [path for path in before if after.get(path) != before[path]]
    assert not lost, f"lost or changed: {lost}"
    new = [path for path in set(after) - set(before) if path.suffix != ".jsonl" and path.name != "seeds.json"]
    assert not new, f"written: {new}"


def test_the_readme_names_flags_that_exist():
    flags = set()
    for script in ("train_cls.py", "make_seeds.py", "train_seg.py", "eval.py"):
        flags |= set(re.findall(r'add\("(--[a-z-]+)"', (HERE / script).read_text()))
    flags |= {flag.replace("--", "--no-") for flag in ("--flip", "--refine", "--adaptive")}
    flags |= {"--nproc-per-node", "--nnodes", "--rdzv-endpoint"}                    # torchrun's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", (HERE / "README.md").read_text()))
    assert len(named) > 20 and named <= flags


def test_a_folder_that_cannot_be_written_to(toy, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    command = [part.replace("DATA", str(toy)).replace("NEW", str(tmp_path / "file/run")) for part in TRAIN]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "train_cls.py"), run_name="__main__")
    assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


# ---- Speed: `python test_usage.py` prints ratios, measured on an otherwise idle machine ------------------------------


def timed(folder, *arguments):
    """Seconds and peak memory (MB) of a stage as a process in a folder."""
    before = time.time()
    process = start(*arguments, cwd=folder)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, process.stderr.read()
    return time.time() - before, used.ru_maxrss / 1024


def seconds_per_record(path, first, last):
    """Seconds between two records of a .jsonl, of which each stands for ten steps or images, divided by their number."""
    seconds = [json.loads(line)["seconds"] for line in path.read_text().splitlines()]
    return (seconds[last] - seconds[first]) / (last - first) / 10


def bare_step(steps=20):
    """Seconds of forward, backward and optimiser step of ResNet-50 on a batch in memory."""
    network = usage.build_network("resnet50", 5).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)
    images = torch.randn(16, 3, 81, 81).contiguous(memory_format=torch.channels_last)
    labels = torch.ones(16, 5)
    for step in range(-3, steps):
        if step == 0:
            start = time.time()
        with usage.fast_autocast(images.device):
            s = network(images)
        optimiser.zero_grad()
        usage.generation_loss(s, labels, math.inf).backward()
        optimiser.step()
    return (time.time() - start) / steps


@torch.no_grad()
def bare_seed(scales, images=30):
    """Seconds of the forwards that one toy image's seed takes, of images in memory."""
    network = usage.build_network("resnet50", 5).to(memory_format=torch.channels_last).eval()
    sides = [usage.fitting_size((81 * scale, 81 * scale), True) for scale in scales]
    views = [torch.randn(2, 3, *side).contiguous(memory_format=torch.channels_last) for side in sides]
    for number in range(-3, images):
        if number == 0:
            start = time.time()
        with usage.fast_autocast(views[0].device):
            [network(view) for view in views]
    return (time.time() - start) / images


def print_ratios(folder):
    """Train, make seeds and evaluate on toy scenes, each beside the bare arithmetic."""
    before = time.time()
    process = start("train_cls.py", cwd=folder)
    wait_for(folder / "runs/toy-resnet50/classifier.jsonl", process)
    print(f"train_cls.py on the toy: the first ten steps are done after {time.time() - before:.1f} s, drawing included")
    process.kill()

    train = [folder, "train_cls.py", "--epochs", 0, "--reg-epochs", 1]
    bare = [bare_step()]
    timed(*train, "--run", "cam", "--reg-weight", 0)
    bare.append(bare_step())
    timed(*train, "--run", "usage")
    step, cam, full = sum(bare) / 2, *(seconds_per_record(folder / name / "classifier.jsonl", 0, 4)
                                       for name in ("cam", "usage"))
    print(f"a step: bare {step:.3f} s, CAM {cam:.3f} s = {cam / step:.2f} x, USAGE {full:.3f} s = {full / cam:.2f} x CAM's")

    scales = 0.5, 1.0, 1.5, 2.0
    forward = [bare_seed(scales)]
    timed(folder, "make_seeds.py", "--run", "cam", "--scales", *scales, "--no-refine")
    forward.append(bare_seed(scales))
    seed = seconds_per_record(folder / "cam/seeds.jsonl", 0, 79)
    bare = sum(forward) / 2
    print(f"a seed: bare {1e3 * bare:.1f} ms, make_seeds.py {1e3 * seed:.1f} ms = {seed / bare:.2f} x")

    once, sweep = (min(timed(folder, "eval.py", "--run", "cam", *flags)[0] for _ in range(3))
                   for flags in ([], ["--sweep"]))
    print(f"eval.py: one threshold {once:.2f} s, 101 {sweep:.2f} s = {sweep / once:.2f} x")

    usage.draw_toy(folder / "few", train=200, val=50)
    for name, data in (("few", "few"), ("many", "data/toy")):
        train = ["train_cls.py", "--data", data, "--weights", "none", "--epochs", 1, "--reg-epochs", 0, "--size", 33]
        peaks = [timed(folder, *command, "--run", name)[1] for command in (
            train, ["make_seeds.py", "--scales", 0.5], ["train_seg.py", "--epochs", 1], ["eval.py", "--sweep"])]
        print(f"peak memory of the four stages, {name} images: " + ", ".join(f"{peak:.0f} MB" for peak in peaks))

    seconds = {}
    for modules in ("torch, torchvision", "usage"):
        command = [sys.executable, "-c", f"import {modules}"]
        seconds[modules] = min(timeit.repeat(lambda: subprocess.run(command, check=True, cwd=HERE), number=1, repeat=5))
    print("import: " + ", ".join(f"{modules} {value:.2f} s" for modules, value in seconds.items()), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print_ratios(Path(folder))
