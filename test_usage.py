"""Tests: the paper's formulas against slow loops, its special cases as equalities, the four stages as a user runs them.

    python -m pytest -q test_usage.py
    python test_usage.py                    speed and memory instead, in about ten minutes
"""

import contextlib
import inspect
import io
import json
import math
import multiprocessing
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
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import eval as evaluation
import make_seeds
import train_cls
import train_seg
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
    if temperature > 0:
        log_alpha = usage.spatial_activation_distribution(s, temperature, log=True)
        held = alpha > 1e-30                                    # the others are subnormal or 0
        torch.testing.assert_close(log_alpha[held], alpha[held].log(), rtol=1e-5, atol=1e-4)
        assert log_alpha.isfinite().all() and (log_alpha[~held] < -69).all()


def test_distribution_special_cases_are_exact():
    s = torch.randn(2, 3, 4, 7)
    assert (usage.spatial_activation_distribution(s, math.inf) == 1 / 28).all()
    s[0, 0].fill_(1.0)                                          # a tie: the first position wins
    alpha = usage.spatial_activation_distribution(s, 0)
    assert alpha[0, 0].flatten().tolist() == [1.0] + [0.0] * 27
    assert ((alpha == 0) | (alpha == 1)).all() and (alpha.sum((2, 3)) == 1).all()


@pytest.mark.parametrize("temperature, log", [(-1.0, False), (-math.inf, True), (math.nan, False), (0, True)])
def test_no_such_temperature(temperature, log):
    with pytest.raises(ValueError, match="temperature"):
        usage.spatial_activation_distribution(torch.randn(1, 1, 2, 2), temperature, log)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_extreme_activations_do_not_overflow(dtype):
    s = (torch.randn(2, 3, 4, 4) * 1e4).to(dtype).requires_grad_()
    labels = random_labels(2, 3)
    for temperature in TEMPERATURES:
        with torch.autocast("cpu", torch.bfloat16):
            alpha = usage.spatial_activation_distribution(s, temperature)
            loss = usage.generation_loss(s, alpha, labels)
            if temperature > 0:
                log_alpha = usage.spatial_activation_distribution(s, temperature, log=True)
                loss = loss + usage.consistency_loss(log_alpha, alpha.flip(-1), labels)
        assert alpha.dtype == loss.dtype == torch.float32
        torch.testing.assert_close(alpha.detach().sum((2, 3)), torch.ones(2, 3))
        gradient, = torch.autograd.grad(loss, s)
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 1, 5, 6)])
def test_generation_loss_equals_the_slow_loop(shape):
    s, labels, total = torch.randn(3, 4, 5, 6) * 3, random_labels(), 0.0
    alpha = usage.spatial_activation_distribution(torch.randn(shape), 0.5)
    for b, c in np.ndindex(3, 4):
        weights = alpha.expand(s.shape)[b, c].flatten().tolist()
        score = sum(a * v for a, v in zip(weights, s[b, c].flatten().tolist()))
        total += math.log1p(math.exp(-score if labels[b, c] else score)) / 12
        assert usage.class_scores(s, alpha)[b, c].item() == pytest.approx(score, abs=1e-5)
    assert usage.generation_loss(s, alpha, labels).item() == pytest.approx(total, rel=1e-5)


def test_cam_is_infinite_temperature():
    """Global average pooling of 1x1-convolved features, trained with the logistic loss: values and gradients."""
    features, classifier, labels = torch.randn(3, 8, 5, 6), nn.Conv2d(8, 4, 1), random_labels()
    cam = F.multilabel_soft_margin_loss(F.linear(F.adaptive_avg_pool2d(features, 1)[:, :, 0, 0],
                                                 classifier.weight[:, :, 0, 0], classifier.bias), labels)
    s = classifier(features)
    ours = usage.generation_loss(s, usage.spatial_activation_distribution(s, math.inf), labels)
    torch.testing.assert_close(ours, cam)
    for a, b in zip(torch.autograd.grad(ours, classifier.parameters()), torch.autograd.grad(cam, classifier.parameters())):
        torch.testing.assert_close(a, b)


def test_mil_is_zero_temperature():
    s, labels = torch.randn(3, 4, 5, 6, requires_grad=True), random_labels()
    mil = F.multilabel_soft_margin_loss(F.adaptive_max_pool2d(s, 1)[:, :, 0, 0], labels)
    ours, limit = (usage.generation_loss(s, usage.spatial_activation_distribution(s, temperature), labels)
                   for temperature in (0, 1e-4))
    torch.testing.assert_close(ours, mil)
    torch.testing.assert_close(torch.autograd.grad(ours, s), torch.autograd.grad(mil, s))
    torch.testing.assert_close(limit, mil)


def test_class_to_patch_attention_is_one_more_alpha(monkeypatch):
    monkeypatch.setattr(usage, "fast_autocast", lambda device: contextlib.nullcontext())
    network, labels = usage.build_network("deit_tiny", 3).eval(), random_labels(2, 3)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected, attention = network(images, return_attention=True)
        s, alpha = usage.activate(network, images, 1.0, attention=True)
        of_a_temperature = usage.activate(network, images, 0.5)[1]
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(of_a_temperature, usage.spatial_activation_distribution(s, 0.5))
    assert s.shape == (2, 3, 3, 4) and alpha.shape == (2, 1, 3, 4) and attention.shape == (2, 12, 13, 13)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 12, 13))        # rows attend to columns
    for b in range(2):
        rows = [[block[0, 1 + i].item() for i in range(12)] for block in attention[b]]
        mean = np.mean(rows, 0)                                                 # of the class token's rows, over blocks
        np.testing.assert_allclose(alpha[b, 0].flatten(), mean / mean.sum(), rtol=1e-4)
    scores = (s * alpha).sum((2, 3))
    torch.testing.assert_close(usage.generation_loss(s, alpha, labels), F.multilabel_soft_margin_loss(scores, labels))


# ---- Sec. 4.2 --------------------------------------------------------------------------------------------------------


def test_consistency_loss_equals_the_slow_loop():
    student, teacher = torch.randn(2, 3, 4, 5, 6)
    log_alpha = usage.spatial_activation_distribution(student, 2.0, log=True)
    alpha, target = slow_distribution(student, 2.0), slow_distribution(teacher, 0.7)
    labels, pairs = random_labels(), []
    for b, c in np.ndindex(3, 4):
        if labels[b, c]:
            pairs.append(sum(t * math.log(t / a) for t, a in zip(target[b, c].flatten().tolist(),
                                                                 alpha[b, c].flatten().tolist())))
    assert usage.consistency_loss(log_alpha, target, labels).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


@pytest.mark.parametrize("teacher_temperature", [0, 1.0])
def test_consistency_loss_where_the_student_underflows(teacher_temperature):
    """Activations thousands of temperatures apart: value and gradient are those of float64, not 0 where it is wrong."""
    s, labels = (torch.randn(2, 3, 4, 4) * 3000).requires_grad_(), torch.ones(2, 3)
    target = usage.spatial_activation_distribution(torch.randn(2, 3, 4, 4), teacher_temperature)
    loss = usage.consistency_loss(usage.spatial_activation_distribution(s, 1.0, log=True), target, labels)
    exact = s.detach().double().requires_grad_()
    log_alpha, t = exact.flatten(2).log_softmax(-1), target.double().flatten(2)
    expected = (torch.xlogy(t, t) - t * log_alpha).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss > 1000
    gradient, = torch.autograd.grad(loss, s)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, exact)[0].float())
    assert gradient.abs().max() > 0.1


def test_consistency_loss_at_its_edges():
    s, t = torch.randn(2, 2, 3, 4, 4).unbind()
    s.requires_grad_(), t.requires_grad_()
    log_alpha, alpha, target = (usage.spatial_activation_distribution(a, 0.5, log) for a, log in (
        (s, True), (s, False), (t, False)))
    assert usage.consistency_loss(log_alpha, alpha, torch.ones(2, 3)).item() == pytest.approx(0, abs=1e-6)
    loss = usage.consistency_loss(log_alpha, target, torch.ones(2, 3))
    loss.backward(retain_graph=True)
    assert loss > 0 and t.grad is None and s.grad.abs().sum() > 0
    s.grad = None
    nothing = usage.consistency_loss(log_alpha, target, torch.zeros(2, 3))
    nothing.backward()
    assert nothing == 0 and (s.grad == 0).all()


def test_activation_unit():
    s = torch.randn(2, 3, 5, 7) * torch.tensor([0.1, 3.0, 40.0])[:, None, None] + 5
    unit = usage.activation_unit(s.requires_grad_())
    for b, c in np.ndindex(2, 3):
        assert unit[b, c, 0, 0].item() == pytest.approx(max(1, np.std(s[b, c].detach().numpy())), rel=1e-5)
    assert unit.shape == (2, 3, 1, 1) and not unit.requires_grad and (unit[:, 0] == 1).all()
    assert usage.activation_unit(s.bfloat16()).dtype == torch.float32
    assert (usage.activation_unit(torch.randn(2, 3, 1, 1)) == 1).all()          # one position has no deviation


def test_chance_is_what_class_frequencies_reach():
    labels, expected = (torch.rand(40, 5) < torch.tensor([0.03, 0.1, 0.5, 0.9, 0.3])).float(), 0.0
    labels[0], labels[1] = 0, 1
    for c in range(5):
        p = labels[:, c].tolist().count(1.0) / 40
        expected -= (p * math.log(p) + (1 - p) * math.log(1 - p)) / 5
    chance = usage.chance_loss(labels)
    assert isinstance(chance, float) and chance == pytest.approx(expected)
    constant = torch.logit(labels.mean(0)).expand(40, 5)[:, :, None, None]      # a classifier that looks at no image
    frequencies_alone = usage.generation_loss(constant, torch.ones(40, 5, 1, 1), labels).item()
    assert frequencies_alone == pytest.approx(chance)
    assert usage.learning_status(frequencies_alone, chance) == pytest.approx(0, abs=1e-5)
    everywhere_and_nowhere = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert usage.chance_loss(everywhere_and_nowhere) == pytest.approx(math.log(2) / 3)
    assert usage.chance_loss(everywhere_and_nowhere[:, :2]) == 0


def test_learning_status():
    assert usage.learning_status(0.4, 0.4) == usage.learning_status(5.0, 0.4) == 0
    assert usage.learning_status(0.0, 0.4) == 1 and usage.learning_status(0.1, 0.4) == pytest.approx(0.75)
    for wrong in ((math.nan, 0.4), (-1.0, 0.4), (0.3, 0.0), (0.3, math.nan), (0.3, -0.4)):
        with pytest.raises(ValueError):
            usage.learning_status(*wrong)


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


def functions_above(banner):
    """The names of usage.py's functions above a banner, in the order of the file."""
    functions = [function for _, function in inspect.getmembers(usage, inspect.isfunction)
                 if function.__module__ == "usage"]
    lines = {inspect.getsourcelines(function)[1]: function.__name__ for function in functions}
    end = inspect.getsource(usage).split(f"\n# ==== {banner}")[0].count("\n")
    return [lines[line] for line in sorted(lines) if line < end]


PAPER, ALONE = functions_above("2. Seeds and pseudo masks"), functions_above("3. The networks")


def test_the_paper_comes_first_in_its_order():
    contents = usage.__doc__.split("1. The paper")[1].split("2. Seeds")[0]
    assert PAPER == re.findall(r"[a-z]+(?:_[a-z]+)+", contents) and len(PAPER) == 9


@pytest.mark.parametrize("name", ALONE)
def test_functions_of_the_paper_stand_alone(name):
    """Each, pasted below `import torch` and `import torch.nn.functional as F`, gives what it gives here."""
    alone = {"torch": torch, "F": F}
    exec(inspect.getsource(getattr(usage, name)), alone)
    s, alpha = torch.randn(2, 3, 4, 4), torch.softmax(torch.randn(2, 3, 16), -1).view(2, 3, 4, 4)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    every = {
        "spatial_activation_distribution": (s, 0.7), "class_scores": (s, alpha), "generation_loss": (s, alpha, labels),
        "activation_unit": (3 * s,), "consistency_loss": (alpha.log(), alpha.flip(0), labels), "chance_loss": (labels,),
        "learning_status": (0.3, 0.4), "ema_teacher": (nn.Linear(2, 2), 0.9),
        "set_adjustment": (SimpleNamespace(modules=list, dropout=nn.Dropout()), 0.3), "seed_maps": ([s, s], (9, 9)),
        "spread_activations": (s, alpha[:, 0].flatten(1)[:, None].expand(2, 16, 16)), "label_map": (alpha, 0.05),
        "refine_maps": (s, alpha, 0.1)}
    assert set(every) == set(ALONE)
    here, there = getattr(usage, name)(*every[name]), alone[name](*every[name])
    if name == "ema_teacher":
        here, there = here.module.weight, there.module.weight
    torch.testing.assert_close(here, there)


# ---- Seeds -----------------------------------------------------------------------------------------------------------


def slow_enlarged(plane, size):
    """Bilinear, the outermost values half a cell inside of the border (align_corners=False), pixel by pixel."""
    (h, w), result = plane.shape, torch.zeros(size)
    for i, j in np.ndindex(*size):
        y, x = (max(0, (k + 0.5) * n / full - 0.5) for k, n, full in ((i, h, size[0]), (j, w, size[1])))
        for m, n in ((m, n) for m in (int(y), int(y) + 1) for n in (int(x), int(x) + 1)):
            result[i, j] += (1 - abs(y - m)) * (1 - abs(x - n)) * plane[min(m, h - 1), min(n, w - 1)]
    return result


def test_seed_maps_equal_the_slow_loop():
    views = [torch.randn(2, 3, 3, 4), torch.randn(2, 3, 6, 7).bfloat16()]
    views[0][1, 2], views[1][1, 2] = -1, -2                     # a class that is positive nowhere
    maps = usage.seed_maps(views, (12, 16))
    assert maps.dtype == torch.float32 and maps.shape == (2, 3, 12, 16)
    for b, c in np.ndindex(2, 3):
        total = sum(slow_enlarged(view[b, c].float().clamp(min=0), (12, 16)) for view in views)     # ReLU of each view
        torch.testing.assert_close(maps[b, c], total / total.max() if total.max() > 0 else total)
    assert (maps[1, 2] == 0).all()


def test_spread_activations_equal_the_slow_loop():
    s, affinity = torch.randn(2, 3, 2, 4), torch.rand(2, 8, 8)
    spread = usage.spread_activations(s, affinity)
    for b, c, i in np.ndindex(2, 3, 8):
        expected = sum(affinity[b, i, j].item() * max(0.0, s[b, c].flatten()[j].item()) for j in range(8))
        assert spread[b, c].flatten()[i].item() == pytest.approx(expected, abs=1e-5)


def test_refinement_equals_the_slow_loop():
    x, maps = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    p = torch.sigmoid((maps - 0.4) / 0.1)[0]
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
    refined = usage.refine_maps(x, maps, 0.4, dilations=(1, 2), iterations=3)
    torch.testing.assert_close(refined[0], (0.4 + 0.1 * torch.logit(p)).clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_refinement_follows_an_edge():
    image = torch.zeros(1, 3, 40, 200)
    image[..., 100:] = 1
    maps = torch.linspace(0, 1, 200).expand(1, 1, 40, 200)      # exceeds 0.4 from column 80 on
    refined = usage.refine_maps(image + 0.01 * torch.rand(1, 3, 40, 200), maps, 0.4)
    left, right = refined[..., :97].max(), refined[..., 103:].min()
    assert refined.shape == maps.shape and left < right
    constant = usage.refine_maps(torch.rand(1, 3, 20, 20), torch.full((1, 2, 20, 20), 0.3), 0.4)
    torch.testing.assert_close(constant, torch.full((1, 2, 20, 20), 0.3))


def test_uncertain_pixels_become_void(tmp_path):
    levels = torch.tensor([[[0, 90, 102, 130, 255]], [[10, 20, 110, 0, 0]]], dtype=torch.uint8)     # 0.4 is 102
    make_seeds.write_results(tmp_path, "a", torch.tensor([1, 4]), levels, levels, 0.4)
    assert usage.read_mask(tmp_path / "seeds/a.png", (1, 5), 5).tolist() == [[0, 0, 5, 2, 2]]
    assert usage.read_mask(tmp_path / "pseudo_masks/a.png", (1, 5), 5).tolist() == [[0, 255, 255, 2, 2]]


def test_label_map_equals_the_slow_loop():
    maps = torch.rand(2, 3, 5, 5)
    maps[0, :, 0, 0] = 0.5                                      # not above the threshold
    labels = usage.label_map(maps, 0.5)
    for b, i, j in np.ndindex(2, 5, 5):
        pixel = maps[b, :, i, j].tolist()
        assert labels[b, i, j] == (pixel.index(max(pixel)) + 1 if max(pixel) > 0.5 else 0)
    numbers = torch.tensor([7, 0, 3])
    expected = torch.cat([torch.zeros(1, dtype=torch.int64), numbers + 1])[labels]
    assert torch.equal(usage.label_map(maps, 0.5, numbers), expected)
    assert torch.equal(usage.label_map(maps[:, :0], 0.5, numbers[:0]), torch.zeros(2, 5, 5, dtype=torch.int64))


@pytest.mark.parametrize("backbone, side, affinity", [("resnet18", 65, False), ("deit_tiny", 64, False),
                                                      ("deit_tiny", 64, True)])
def test_seed_at_one_scale_is_the_plain_network(backbone, side, affinity, monkeypatch):
    monkeypatch.setattr(usage, "fast_autocast", lambda device: contextlib.nullcontext())
    network = usage.build_network(backbone, 3).eval()
    image = torch.randn(1, 3, side, side)

    def plain(image):
        if not affinity:
            return network(image)
        s, attention = network(image, return_attention=True)
        return usage.spread_activations(s, sum(attention[:, k, 1:, 1:] for k in range(6, 12)) / 6)
    with torch.no_grad():
        one, = usage.multi_scale_activations(network, image, side, [1.0], False, affinity)
        flipped = usage.multi_scale_activations(network, image, side, [1.0], True, affinity)
        torch.testing.assert_close(one, plain(image))
        torch.testing.assert_close(flipped[0], plain(image))
        torch.testing.assert_close(flipped[1], plain(image.flip(-1)).flip(-1))


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
def test_rate_zero_is_the_plain_network(backbone, monkeypatch):
    monkeypatch.setattr(usage, "fast_autocast", lambda device: contextlib.nullcontext())    # bfloat16 hides small changes
    network = usage.build_network(backbone, 3, frozen=True)     # BatchNorm aside, training mode must not matter
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
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
        torch.testing.assert_close(network.trunk(images), body(images))


def test_transformer_features_are_torchvisions_at_224():
    network = usage.build_network("deit_tiny", 3).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        trunk = network.trunk
        tokens = trunk.encoder(torch.cat([trunk.class_token, trunk._process_input(images)], 1))[:, 1:]
        torch.testing.assert_close(network.trunk(images).flatten(2).transpose(1, 2), tokens)


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
    """DeiT's forward by its published code's names: patch features (B, 196, D) and attention (B, 12, 197, 197)."""
    attentions = []
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
        attentions.append(attention.mean(1))
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), block + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
    return norm(x, "norm")[:, 1:], torch.stack(attentions, 1)


def test_deit_checkpoint_in_the_published_naming(tmp_path):
    state = published_deit()
    torch.save({"model": state}, tmp_path / "deit.pth")
    ours = train_cls.pretrained_weights("deit_tiny", tmp_path / "deit.pth")
    network = usage.build_network("deit_tiny", 5, ours).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features, attention = network.trunk(images, return_attention=True)
        for ours, theirs in zip((features.flatten(2).transpose(1, 2), attention), slow_deit(state, images)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(network.trunk(images), features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18"])
def test_torchvision_checkpoint(backbone, tmp_path):
    theirs = torchvision.models.get_model(backbone)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    state = train_cls.pretrained_weights(backbone, tmp_path / "weights.pth")
    network = usage.build_network(backbone, 5, state)
    first = next(parameter for name, parameter in theirs.named_parameters() if name.endswith("weight"))
    torch.testing.assert_close(next(network.parameters()), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Missing key"):
        usage.build_network(backbone, 5, dict(list(state.items())[1:]))


def test_pretrained_weights_are_the_published_ones(monkeypatch, tmp_path):
    """The download's contents, stood in for by made ones, end up in the network; without a download, one line."""
    downloads = {train_cls.DEIT_WEIGHTS.format(train_cls.DEIT_FILES["deit_tiny"]): {"model": published_deit()},
                 torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url: torchvision.models.resnet18().state_dict()}

    def download(url, **_):
        if url not in downloads:
            raise OSError("no route to host")
        return downloads[url]
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    for backbone, ours, theirs in (("deit_tiny", "class_token", "cls_token"), ("resnet18", *2 * ["conv1.weight"])):
        network = usage.build_network(backbone, 5, train_cls.pretrained_weights(backbone, "imagenet"))
        files = [state.get("model", state) for state in downloads.values()]
        assert any(torch.equal(network.trunk.state_dict()[ours], file.get(theirs, torch.ones(0))) for file in files)
    downloads.clear()
    for backbone in ("resnet18", "deit_tiny"):
        with pytest.raises(usage.InputError, match="no route to host; pass --weights FILE"):
            train_cls.pretrained_weights(backbone, "imagenet")
    (tmp_path / "text").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list")
    for name, reason in (("text", "pass --weights"), ("nowhere", "No such file"), ("list", "not a checkpoint")):
        with pytest.raises(usage.InputError, match=f"{name}: .*{reason}"):
            train_cls.pretrained_weights("resnet18", tmp_path / name)


# ---- The metrics -----------------------------------------------------------------------------------------------------


def confusion_matrix(truth, predicted, num_classes):
    return evaluation.at_threshold(evaluation.count_levels(truth, predicted, torch.full_like(truth, 255), num_classes), 0)


def test_metrics_equal_a_brute_force_count():
    truth, predicted = torch.randint(0, 4, (20, 30)), torch.randint(0, 3, (20, 30))
    truth[:3] = usage.VOID
    rates = evaluation.metrics(confusion_matrix(truth, predicted, 4))
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


def test_mean_average_precision_and_class_threshold():
    scores, labels = torch.randn(30, 4), (torch.rand(30, 4) < 0.3).float()
    labels[:, 3], averages = 0, []                              # a class without an image does not count
    for c in range(3):
        ranked = labels[scores[:, c].argsort(descending=True), c].tolist()
        precisions = [sum(ranked[:k + 1]) / (k + 1) for k in range(30) if ranked[k]]
        averages.append(sum(precisions) / len(precisions))
    assert train_cls.mean_average_precision(scores, labels) == pytest.approx(sum(averages) / 3)
    threshold = train_cls.class_threshold(scores, labels)
    assert 0 < threshold < 1 and (scores.sigmoid() > threshold).sum() == labels.sum()


def test_sweep_equals_separate_evaluations():
    items, expected = [], torch.zeros(101, 4, 4, dtype=torch.int64)
    for classes in ([0, 2], [1], []):
        truth = torch.randint(0, 4, (8, 9), dtype=torch.uint8)
        truth[0] = usage.VOID
        items.append((truth, torch.tensor(classes, dtype=torch.long),
                      torch.randint(0, 256, (len(classes), 8, 9), dtype=torch.uint8)))
    for truth, classes, levels in items:
        maps = torch.zeros(1, 3, 8, 9)
        maps[0, classes] = levels / 255
        for k, threshold in enumerate(torch.arange(101) / 100):
            predicted = usage.label_map(maps, threshold.item())[0]
            expected[k] += confusion_matrix(truth, predicted, 3)
    counts = sum(evaluation.count_levels(truth, usage.label_map(levels[None], 0, classes)[0],
                                         F.pad(levels, (0, 0, 0, 0, 1, 0)).amax(0), 3) for truth, classes, levels in items)
    for k, threshold in enumerate(torch.arange(101) / 100):
        assert torch.equal(evaluation.at_threshold(counts, threshold), expected[k])

# ---- The data --------------------------------------------------------------------------------------------------------


def digest(folder):
    """{path: contents} of all files but the logs; of checkpoints, which are large, when they were written."""
    return {path.relative_to(folder): path.stat().st_mtime_ns if path.suffix == ".pt" else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".jsonl"}


def true_mask(data, name, size=None):
    return usage.read_mask(data.masks / f"{name}.png", size, len(data.classes))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Twelve small toy scenes."""
    return train_cls.draw_toy(tmp_path_factory.mktemp("data") / "mini", train=8, val=4, side=48)


def test_toy_is_the_same_every_time(toy, tmp_path):
    assert digest(train_cls.draw_toy(tmp_path / "again", train=8, val=4, side=48)) == digest(toy)
    data = usage.DataFolder(toy)
    for split in ("train", "val"):
        for name, labels in zip(data.ids(split), data.labels(data.ids(split))):
            values = set(true_mask(data, name, (48, 48)).unique().tolist())
            assert {c + 1 for c in labels.nonzero()[:, 0].tolist()} == values - {0}
    before = digest(toy)
    assert train_cls.draw_toy(toy) == toy and digest(toy) == before             # what is there stays


def in_processes(function, count, *arguments):
    """Call a function in several forked processes at once; their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=function, args=arguments) for _ in range(count)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    return [process.exitcode for process in processes]


def test_two_processes_that_draw_the_toy_at_once(toy, tmp_path):
    assert in_processes(train_cls.draw_toy, 3, tmp_path / "data" / "toy", 8, 4, 48) == [0, 0, 0]
    assert digest(tmp_path) == {Path("data/toy") / path: content for path, content in digest(toy).items()}


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
    data = usage.DataFolder(tmp_path)                           # the folder that --download was given
    assert data.ids("train_aug") == ["train_0000", "train_0001"] and len(data.classes) == 20
    assert data.labels(["train_0000"])[0].nonzero()[:, 0].tolist() == [11, 14]
    with pytest.raises(usage.InputError, match="train_0001.xml"):
        data.labels(["train_0001"])


def test_texts_of_every_editor(toy, tmp_path):
    """A byte order mark, Windows' line ends, blank lines, names with blanks and umlauts."""
    root = shutil.copytree(toy, tmp_path / "data")
    (root / "JPEGImages/train_0000.jpg").rename(root / "JPEGImages/my cät.JPG")
    lines = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    names = ["big cat", "Käse", "x y z", "d", "e"]
    for path, text in (("classes.txt", [*names[:2], "", *names[2:], " "]),
                       ("ImageSets/Segmentation/train.txt", ["", "my cät ", *lines[1:], ""]),
                       ("labels.json", [json.dumps({"my cät": ["Käse", "big cat"]})])):
        (root / path).write_bytes("\r\n".join(text).encode("utf-8-sig"))
    data = usage.DataFolder(root)
    assert data.classes == names and data.ids("train") == ["my cät", *lines[1:]]
    assert data.labels(["my cät"]).tolist() == [[1, 1, 0, 0, 0]]
    image, labels = usage.Photographs(data, ["my cät"], data.labels(["my cät"]))[0]
    assert image.shape == (3, 48, 48) and labels.tolist() == [1, 1, 0, 0, 0]


def test_download_of_voc(toy, tmp_path, monkeypatch):
    """torchvision's download, stood in for by one that unpacks the toy where VOC's archive would."""
    def download(root, year, image_set, download):
        assert (year, download) == ("2012", True)
        shutil.copytree(toy, Path(root, "VOCdevkit", "VOC2012"))
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", download)
    train_cls.prepare_data(tmp_path, True)
    assert usage.DataFolder(tmp_path).ids("val")

    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", no_network)
    with pytest.raises(usage.InputError, match="no route to host; .*by hand"):
        train_cls.prepare_data(tmp_path, True)


def draw_coco(root, toy):
    """A small COCO from the toy scenes: each critter an object, as polygons or as runs."""
    data, categories = usage.DataFolder(toy), [7, 1, 90, 13, 44]        # with gaps and out of order, as COCO's are
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2014").mkdir()
        images, annotations = [], []
        for number, name in enumerate(data.ids(split), start=1):
            shutil.copy(data.images[name], root / f"{split}2014/COCO_{name}.jpg")
            images.append({"id": number, "file_name": f"COCO_{name}.jpg", "height": 48, "width": 48})
            mask = true_mask(data, name).numpy()
            for c, kind in zip(data.labels([name])[0].nonzero()[:, 0].tolist(), 2 * ("runs", "boxes")):
                inside = mask == c + 1
                runs = {"size": [48, 48], "counts": slow_runs(inside)}
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


def test_coco_has_the_labels_and_masks_it_was_made_of(toy, tmp_path):
    root, voc = draw_coco(tmp_path / "coco", toy), usage.DataFolder(toy)
    train_cls.prepare_data(root, False)
    coco = usage.DataFolder(root)
    assert coco.classes == [voc.classes[k] for k in (1, 0, 3, 4, 2)]            # by category id: 1, 7, 13, 44, 90
    assert len(coco.ids("train")) == 8 and len(coco.ids("val")) == 5            # the empty image only to evaluate
    order = torch.tensor([0, 2, 1, 5, 3, 4])                                    # VOC's label -> COCO's
    for split in ("train", "val"):
        evaluation.draw_coco_masks(coco, split)
        for name in voc.ids(split):
            expected = order[true_mask(voc, name).long()]
            assert torch.equal(true_mask(coco, f"COCO_{name}", (48, 48)).long(), expected)
            assert {c + 1 for c in coco.labels([f"COCO_{name}"])[0].nonzero()[:, 0].tolist()} == set(
                expected.unique().tolist()) - {0}
    assert (true_mask(coco, "COCO_empty") == 0).all() and (coco.labels(["COCO_empty"]) == 0).all()
    with pytest.raises(usage.InputError, match="48x48"):
        true_mask(coco, "COCO_empty", (48, 50))


def test_coco_outlines():
    expected = np.zeros((5, 7), bool)
    expected[1:4, 2:5], expected[2, 3], expected[0, 6] = True, False, True
    runs = [11, 3, 2, 1, 1, 1, 2, 3, 6, 1, 4]                   # what pycocotools 2.0 makes of it
    assert slow_runs(expected) == runs
    assert (evaluation.draw_outline({"counts": runs, "size": [5, 7]}, 5, 7) == expected).all()
    triangles = [[0, 0, 20, 0, 0, 20], [20, 20, 40, 20, 40, 40]]
    y, x = np.mgrid[:40, :40] + 0.5                             # middles of the pixels
    inside = (x + y < 20) | ((y > 20) & (x > y))
    assert (evaluation.draw_outline(triangles, 40, 40) != inside).sum() <= 45   # those that the slopes cut


def test_small_coco_objects_have_their_true_area():
    rng, drawn, true = np.random.default_rng(0), 0, 0
    for _ in range(100):
        a, b, turn, angles = *rng.uniform(2, 5, 2), rng.uniform(0, 3), np.arange(16) * np.pi / 8
        place = (a * np.cos(angles) + 1j * b * np.sin(angles)) * np.exp(1j * turn) + rng.uniform(12, 13, 2) @ (1, 1j)
        x, y = place.real, place.imag
        drawn += evaluation.draw_outline([np.stack([x, y], 1).flatten().tolist()], 25, 25).sum()
        true += abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum()) / 2
    assert drawn / true == pytest.approx(1, abs=0.02)


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
    train_cls.convert_coco(root)
    data = usage.DataFolder(root)
    evaluation.draw_coco_masks(data, "train")
    mask = true_mask(data, "COCO_train_0000")
    assert (mask[5, 5], mask[20, 20], mask[40, 40]) == (1, 2, usage.VOID) and data.ids("train") == ["COCO_train_0000"]


def test_palette_is_vocs():
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [tuple(colour) for colour in usage.VOC_PALETTE[:5].tolist()] == known
    assert tuple(usage.VOC_PALETTE[usage.VOID].tolist()) == (224, 224, 192)


def test_images_of_every_mode(tmp_path):
    grey = np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))
    pictures = {"grey.png": Image.fromarray(grey), "cmyk.jpg": Image.fromarray(grey).convert("CMYK"),
                "palette.png": Image.fromarray(grey).convert("P"), "alpha.png": Image.fromarray(grey).convert("RGBA"),
                "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
                "float.tif": Image.fromarray(grey.astype(np.float32) / 255)}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        image = usage.read_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (32, 16), name
        assert np.abs(np.asarray(image)[..., 0].astype(int) - grey).max() <= 12, name
    for mode in ("RGBA", "LA"):                                 # what nobody sees is white
        Image.new(mode, (4, 4), 0).save(tmp_path / "clear.png")
        assert usage.read_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")  # 400 million pixels in a small file
    with pytest.raises(usage.InputError, match="bomb.png: .*no readable image"):
        usage.read_image(tmp_path / "bomb.png")
    turned = Image.Exif()
    turned[0x0112] = 6                                          # the camera was turned by 90 degrees
    pictures["grey.png"].save(tmp_path / "turned.jpg", exif=turned)
    assert usage.read_image(tmp_path / "turned.jpg").size == (16, 32)


# ---- The run folder --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_never_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)
    torch.save({"student": Hostile()}, tmp_path / "classifier.pt")
    with pytest.raises(usage.InputError, match="classifier.pt: "):
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


def test_a_log_goes_on_where_the_weights_do(tmp_path):
    path = tmp_path / "run" / "a.jsonl"
    lines = [usage.Log.line(log, 2, loss=1.0) for log in [usage.Log(path, 90)] for _ in range(30)]
    assert [k + 1 for k, line in enumerate(lines) if line] == [10, 20, 30] and "60 images  loss 1  " in lines[-1]
    records = [json.loads(line) | {"seconds": 49.0 + k} for k, line in enumerate(path.open())]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    log = usage.Log(path, 90, done=40)                          # the last epoch that was saved ended there
    for _ in range(25):
        log.line(2, loss=0.5)
    first, *records = [json.loads(line) for line in path.open()]
    assert first == {"images": 0, "seconds": 0, "process": os.getpid()}
    assert [record["images"] for record in records] == [20, 40, 60, 80, 90]
    assert [record["loss"] for record in records] == [1, 1, 0.5, 0.5, 0.5]
    assert [int(record["seconds"]) for record in records] == [50, 51, 51, 51, 51]
    with pytest.raises(usage.InputError, match="after 92 images loss is nan: lower --lr"):
        log.line(2, loss=math.nan)


def test_weights_are_finite_before_they_are_saved(tmp_path):
    sampler = mock.MagicMock(__len__=lambda _: 4)
    loader = torch.utils.data.DataLoader(SimpleNamespace(epoch=0), 2, sampler=sampler)
    model, progress, path = nn.Linear(2, 2), {"epoch": 0}, tmp_path / "a.pt"
    epochs = usage.training_epochs(path, {"seed": 0}, {"model": model}, progress, 3, loader)
    assert next(epochs)[0] == 0 and next(epochs)[0] == 1
    saved = path.read_bytes()
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    with pytest.raises(usage.InputError, match="epoch 2: weights are not finite"):
        next(epochs)
    assert path.read_bytes() == saved and usage.load_checkpoint(path, "")["progress"]["epoch"] == 1


def test_a_folder_at_work_is_refused(toy, finished, tmp_path, capsys):
    run, fork = copy_of(finished[0], tmp_path), multiprocessing.get_context("fork")
    ready = fork.Event()

    def work():
        kept = [usage.Log(run / f"{name}.jsonl", 100) for name in ("classifier", "seeds", "segmenter")]
        ready.set()
        time.sleep(60 * len(kept))
    process = fork.Process(target=work)
    process.start()
    assert ready.wait(20)
    before = digest(run)
    commands = [[*AGAIN, "--data", toy, "--run", run], ["make_seeds.py", "--run", run, "--scales", 1, 2],
                [*SEGMENT, "--run", run]]
    for command in commands:
        with pytest.raises(SystemExit):
            stage(*command)
        assert f"another process ({process.pid}) is at work there" in capsys.readouterr().err
    process.kill()
    process.join()
    assert digest(run) == before
    stage(*commands[0])                                         # what is dead is not at work


@pytest.mark.parametrize("error, expected, wants_room", [
    (OSError(28, "No space left on device"), "make room", True), (PermissionError(13, "denied"), "give access", True),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "), "fewer --workers", False),
    (FileExistsError(17, "File exists"), "move away what is there, then run it again", False),
    (TimeoutError(110, "timed out"), "timed out: run it again", False), (MemoryError(), "--batch-size", False),
    (None, "--batch-size", False)])
def test_each_error_has_its_own_remedy(error, expected, wants_room, capsys):
    with pytest.raises(SystemExit) as end, usage.one_line_errors("run it again"):
        if error:
            raise error
        torch.empty(10 ** 14)                                   # more than the CPU has
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and expected in message and ("make room" in message) == wants_room
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("flush", [True, False])
def test_nobody_reads_on(flush):
    """As under "| head": no word, whether the pipe breaks at a line of progress or at the end."""
    code = f"import usage\nwith usage.one_line_errors(''):\n    print('a line', flush={flush})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONUNBUFFERED": ""})
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() != 2


def test_nobody_listens():
    code = "import usage\nwith usage.one_line_errors(''):\n    print('a line')"
    process = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, code], cwd=HERE, capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"")


# ---- The four stages -------------------------------------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--"]
SMALL = ["--weights", "none", "--size", "33", "--batch-size", "4", "--workers", "0", "--reg-epochs", "0"]
BOTH = ["--epochs", "1", *SMALL, "--reg-epochs", "1"]          # an epoch without L_REG, an epoch with it
AGAIN = ["train_cls.py", "--backbone", "mobilenet_v2", *BOTH]   # what `finished` was trained with
SEGMENT = ["train_seg.py", "--epochs", "1", "--batch-size", "4", "--workers", "0"]


def stage(script, *arguments):
    """Run a stage inside this process, which saves Python's start; its output."""
    output = io.StringIO()
    with mock.patch.object(sys, "argv", [str(HERE / script), *map(str, arguments)]), contextlib.redirect_stdout(output):
        runpy.run_path(str(HERE / script), run_name="__main__")
    return output.getvalue()


def torchrun(script, *arguments):
    """Run a stage as two processes, on the CPU, as there may be one card: (exit code, errors)."""
    command = [sys.executable, *TORCHRUN, HERE / script, "--device", "cpu", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=HERE)
    return done.returncode, done.stderr


def copy_of(run, folder, name="run", without=()):
    """A copy; of checkpoints, which are large, links, so that who writes one has to unlink it first."""
    def copy(source, target):
        (os.link if source.endswith(".pt") else shutil.copy2)(source, target)
    return Path(shutil.copytree(run, folder / name, copy_function=copy, ignore=shutil.ignore_patterns(*without)))


def truncated(path, size=300):
    path.write_bytes(path.read_bytes()[:size])


def edited(path, change):
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table, indent=1))


def relabelled(data, kept="train"):
    """Other classes for each image of train, none for those of val."""
    names = (data / "classes.txt").read_text().split()
    ids = (data / f"ImageSets/Segmentation/{kept}.txt").read_text().split()
    (data / "labels.json").write_text(json.dumps({name: [names[k % len(names)]] for k, name in enumerate(ids)}))


@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """A run folder after all four stages, and what they printed."""
    run = tmp_path_factory.mktemp("runs") / "mobilenet"
    return run, [stage(*AGAIN, "--data", toy, "--run", run),
                 stage("make_seeds.py", "--run", run, "--scales", 1, 2, "--workers", 1),
                 stage(*SEGMENT, "--run", run), stage("eval.py", "--run", run, "--sweep")]


def test_four_stages_of_a_cnn(finished, toy, tmp_path):
    run, printed = finished
    assert re.search(r"16 images +L_GEN [\d.]+ +L_REG [\d.e-]+ .*images/s +0:00 left", printed[0])
    assert "4 steps are few: lower --batch-size" in printed[0] and "val, 4 images: mAP" in printed[0]
    for output, script in zip(printed, ("make_seeds.py", "train_seg.py", "eval.py")):
        assert re.search(rf"next: .*python {script} --run {run}\b", output)
    record = [json.loads(line) for line in (run / "classifier.jsonl").read_text().splitlines()][-1]
    assert record["images"] == 16 and math.isfinite(record["L_GEN"]) and record["L_REG"] > 0
    data = usage.DataFolder(toy)
    for folder, split in (("seeds", "train"), ("segmentation", "val")):
        names = data.ids(split)
        assert sorted(path.stem for path in (run / folder).glob("*.png")) == sorted(names)
        for name, labels in zip(names, data.labels(names)):
            mask = usage.read_mask(run / folder / f"{name}.png", (48, 48), 5)
            if folder == "seeds":                               # only classes that the image has
                assert set(mask.unique().tolist()) <= {0} | {c + 1 for c in labels.nonzero()[:, 0].tolist()}
    report = json.loads((run / "report.json").read_text())
    assert [entry["what"] for entry in report] == ["seeds", "pseudo masks", "seeds, oracle", "segmentation"]
    assert [entry["images"] for entry in report] == [8, 8, 8, 4]
    fixed, _, oracle, _ = report
    assert fixed["mIoU"] == pytest.approx(oracle["mIoU at 0.00, 0.01 ... 1.00"][40])     # the PNGs are the maps at 0.40
    assert oracle["mIoU"] == max(oracle["mIoU at 0.00, 0.01 ... 1.00"]) and "ORACLE" in oracle["threshold"]
    assert "train, 8 images, given labels, threshold 0.4 (fixed beforehand)" in printed[3]
    assert len(list((run / "pseudo_masks").glob("*.png"))) == 8 and Image.open(run / "seeds.png").size[0] == 5 * 184
    (tmp_path / "classes.txt").write_text("\ufeff\n" + "\n\n".join(data.classes) + " \n")       # read as the data's are
    for classes in (toy / "classes.txt", tmp_path / "classes.txt"):
        pairs = stage("eval.py", "--pred", run / "seeds", "--truth", toy / "SegmentationClass", "--classes", classes)
        assert f"{fixed['mIoU']:.3f}" in pairs and all(f"\n  {name} " in pairs for name in fixed["classes"])


def test_four_stages_of_a_transformer(toy, tmp_path):
    stage("train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "deit_tiny", *BOTH)
    stage("make_seeds.py", "--run", tmp_path, "--scales", 1, "--workers", 0)
    stage(*SEGMENT, "--run", tmp_path)
    stage("eval.py", "--run", tmp_path)
    assert len(json.loads((tmp_path / "report.json").read_text())) == 3


def test_four_stages_on_coco(toy, tmp_path):
    coco, run = draw_coco(tmp_path / "coco", toy), tmp_path / "run"
    stage("train_cls.py", "--data", coco, "--run", run, "--backbone", "mobilenet_v2", "--epochs", 1, *SMALL)
    assert "eval.py" in stage("make_seeds.py", "--run", run, "--scales", 1, "--workers", 0)
    assert "eval.py" in stage(*SEGMENT, "--run", run)           # which will draw the masks
    assert not (coco / "SegmentationClass").exists()
    stage("eval.py", "--run", run)
    report = (run / "report.json").read_text()
    assert [entry["images"] for entry in json.loads(report)] == [8, 8, 5]
    for name in ("COCO_train_0007", "COCO_val_0003"):           # as if the drawing had been stopped
        (coco / f"SegmentationClass/{name}.png").unlink()
    stage("eval.py", "--run", run)
    assert (run / "report.json").read_text() == report


def test_photographs_without_labels(finished, tmp_path, monkeypatch, capsys):
    photos, run = tmp_path / "holiday", copy_of(finished[0], tmp_path)
    photos.mkdir()
    tiny = "tiny" + 245 * "y"                                   # as long as a name can be
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 30)).save(photos / "turned cat.jpg", exif=turned)
    Image.new("CMYK", (20, 50)).save(photos / "print.TIFF")
    Image.new("LA", (3, 2)).save(photos / f"{tiny}.png")
    others = ["._a.jpg", "IMG_1.HEIC", "broken.jpg", "notes.txt"]
    for name in others:
        (photos / name).write_bytes(b"no image")
    (photos / "nowhere.jpg").symlink_to("nowhere")
    others.append("nowhere.jpg")
    (photos / "more").mkdir()
    monkeypatch.chdir(tmp_path)
    command = ["make_seeds.py", "--run", run, "--workers", 0, "--scales", 1]
    for threshold, expected in ((0, 5), (1, 0)):                # every class, none
        shutil.rmtree(run / "images-holiday", ignore_errors=True)
        output = stage(*command, "--images", photos, "--class-threshold", threshold)
        assert all(name in output.split("left out")[1] for name in (*others, "more/")) and "next:" not in output
        assert f"{expected * 3} classes found; {3 * (not expected)} of 3 images have none" in output
        labels = json.loads((run / "images-holiday/labels.json").read_text())
        assert {name: len(labels[name]) for name in labels} == dict.fromkeys(("print", tiny, "turned cat"), expected)
        for name, size in (("turned cat", (30, 60)), ("print", (20, 50)), (tiny, (3, 2))):
            assert Image.open(run / f"images-holiday/pseudo_masks/{name}.png").size == size
        assert Image.open(run / "images-holiday/seeds.png").size[0] == 4 * 184         # no column for the truth
    again = stage(*command, "--images", "../" + tmp_path.name + "/holiday", "--class-threshold", 1)
    assert "3 are there" in again
    other = tmp_path / "other/holiday"
    shutil.copytree(photos, other, symlinks=True)
    Image.new("LA", (3, 2), 255).save(other / f"{tiny}.png")       # of the same size in bytes, or nearly so
    before = digest(run)
    with pytest.raises(SystemExit):
        stage(*command, "--images", other, "--class-threshold", 1)
    assert "another input_files" in capsys.readouterr().err and digest(run) == before


def test_another_split_gets_predicted_labels(finished, toy, tmp_path):
    run = copy_of(finished[0], tmp_path)
    command = ["make_seeds.py", "--split", "val", "--scales", 1, "--workers", 0]
    assert f"eval.py --run {run}/val" in stage(*command, "--run", run)
    assert "val, 4 images, predicted labels" in stage("eval.py", "--run", run / "val")
    assert len(json.loads((run / "val/labels.json").read_text())) == 4
    thresholds = [json.loads((run / name).read_text())["class_threshold"] for name in ("classifier.json", "val/seeds.json")]
    assert thresholds[0] == thresholds[1] and 0 < thresholds[0] < 1 and thresholds[0] != 0.5


def test_training_opens_no_mask_and_offers_only_what_works(finished, toy, tmp_path):
    """No masks, labels for train only, then no list of val either; then masks for train only."""
    data, run = copy_of(toy, tmp_path, "data", ["SegmentationClass"]), tmp_path / "run"
    relabelled(data)
    command = ["train_cls.py", "--data", data, "--backbone", "mobilenet_v2", "--epochs", 1, *SMALL, "--run"]
    output = stage(*command, run)
    assert "val is not classified" in output and "next: python make_seeds.py" in output
    seeds = stage("make_seeds.py", "--run", run, "--scales", 1, "--workers", 0)
    assert "train_seg.py" in seeds and "eval.py" not in seeds + stage(*SEGMENT, "--run", run)
    assert len(list((run / "segmentation").glob("*.png"))) == 4
    (data / "ImageSets/Segmentation/val.txt").unlink()
    output = stage(*command, tmp_path / "my run")
    assert f"next: python make_seeds.py --run '{tmp_path}/my run'" in output

    data, run = copy_of(toy, tmp_path, "half", ["val_*.png"]), copy_of(finished[0], tmp_path, "of half", ["segm*"])
    output = stage("make_seeds.py", "--data", data, "--run", run, "--split", "val", "--scales", 1, "--workers", 0)
    assert "eval.py" not in output
    assert "eval.py" not in stage(*SEGMENT, "--data", data, "--run", run)


def test_lost_results_are_made_again(finished, tmp_path):
    run = copy_of(finished[0], tmp_path)
    before, seeds = digest(run), sorted(run.glob("seeds/*.png"))
    seeds[0].unlink()
    (run / f"pseudo_masks/{seeds[1].name}").unlink()
    (run / f"maps/{seeds[2].stem}.npz").unlink()
    (run / f"pseudo_masks/{seeds[3].name}").write_bytes(b"")    # what a power cut leaves
    kept = [path.stat().st_mtime_ns for path in seeds[4:]]
    output = stage("make_seeds.py", "--run", run, "--scales", 1, 2, "--workers", 0)
    assert "4 are there" in output and digest(run) == before
    assert [path.stat().st_mtime_ns for path in seeds[4:]] == kept
    (run / "segmentation/val_0002.png").write_bytes(b"")
    stage(*SEGMENT, "--run", run)
    assert digest(run) == before


def test_data_and_runs_can_move(finished, toy, tmp_path):
    data, run = copy_of(toy, tmp_path, "moved"), copy_of(finished[0], tmp_path, "my run")
    before, where = digest(run), ("--data", data, "--run", run)
    assert f"--run '{run}'" in stage(*AGAIN, *where)
    output = stage("make_seeds.py", *where, "--scales", 1, 2)
    assert "8 are there" in output and f"'{run}'" in output
    stage(*SEGMENT, *where)
    assert f"seeds: {data}, train" in stage("eval.py", *where)
    after = digest(run)
    assert {path for path in before if before[path] != after[path]} == set(map(Path, (
        "seeds.json", "segmentation.json", "report.json")))     # which name the folder


def test_means_of_nothing(finished, toy, tmp_path, capsys):
    """All is void: the report is JSON all the same. Then it cannot be written: the table is shown all the same."""
    data, run = copy_of(toy, tmp_path, "data"), copy_of(finished[0], tmp_path)
    for path in (data / "SegmentationClass").iterdir():
        Image.new("L", (48, 48), usage.VOID).save(path)
    stage("eval.py", "--data", data, "--run", run, "--sweep")
    report = json.loads((run / "report.json").read_text(), parse_constant=usage.fail)
    assert [entry["mIoU"] for entry in report] == [None] * 4
    (run / "report.json").unlink()
    (run / "report.json").mkdir()
    with pytest.raises(SystemExit), mock.patch.object(sys, "argv", ["eval.py", "--run", str(run)]):
        runpy.run_path(str(HERE / "eval.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert "\n  mean " in printed.out and len(printed.err.strip().splitlines()) == 1


def test_the_sheet_shows_what_there_is(tmp_path, monkeypatch):
    """Evenly spread photographs in their own shape, no class where none is found, a broken mask as an empty tile."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "truth").mkdir()
    ids, shown = [f"p{k:02d}" for k in range(15)], []
    for name in ids:
        Image.new("RGB", (60, 20), "red").save(tmp_path / f"photos/{name}.png")
        levels = torch.full((int(name != "p00"), 20, 60), 200, dtype=torch.uint8)
        make_seeds.write_results(tmp_path, name, torch.tensor([1][:len(levels)]), levels, levels, 0.4)
        Image.new("L", (60, 20), 2).save(tmp_path / f"truth/{name}.png")
    data = make_seeds.open_photographs(tmp_path / "photos", ["cat", "dog"])
    read = usage.read_image
    monkeypatch.setattr(usage, "read_image", lambda path: shown.append(path.stem) or read(path))
    make_seeds.save_contact_sheet(tmp_path, data, ids)
    gaps = np.diff([ids.index(name) for name in shown])
    assert len(shown) == 10 and (shown[0], shown[-1]) == ("p00", "p14") and set(gaps) <= {1, 2}
    sheet = np.asarray(Image.open(tmp_path / "seeds.png"))
    assert sheet.shape[1] == 4 * 184 and (sheet[20 + 70:20 + 120, :180] == 255).all()  # 180 x 60, not squashed
    assert (sheet[:20].reshape(20, 4, 184, 3) < 100).any((0, 2, 3)).all()              # each column has its heading
    tiles = [sheet[20 + 124 * k:80 + 124 * k, 184 * c:184 * c + 180] for k in (0, 1) for c in (1, 2)]
    words = [(tile == 255).all(2).any() for tile in tiles]                             # with a white edge
    assert words == [True, False, True, True]                                          # "no class", none, "dog" twice
    data.masks = tmp_path / "truth"
    truncated(data.masks / "p00.png", 20)
    make_seeds.save_contact_sheet(tmp_path, data, ids)
    sheet = np.asarray(Image.open(tmp_path / "seeds.png"))
    truth = sheet[20:, 4 * 184:4 * 184 + 180]
    assert sheet.shape[1] == 5 * 184 and (truth[:60] == 255).all() and (truth[124:184] < 200).any()


def test_maps_of_one_position(toy, tmp_path):
    stage("train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "deit_tiny", *BOTH, "--size", 16, "--epochs", 5)
    _, tenth, last = [json.loads(line) for line in (tmp_path / "classifier.jsonl").read_text().splitlines()]
    assert last["L_REG"] == pytest.approx(0, abs=1e-6) and last["images"] == 48
    assert tenth["lr"] == pytest.approx(1e-3 * train_cls.learning_rate(9, 10, 12))      # the step's own


def start(*arguments, **how):
    """Start a stage as a process of its own."""
    return subprocess.Popen([sys.executable, *map(str, (HERE / arguments[0], *arguments[1:]))], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, **how)


def wait_for(path, process):
    while not (path.is_dir() or usage.is_there(path)):
        time.sleep(0.01)
        assert process.poll() is None, f"ended before {path}"


def kill_when_there(path, *arguments):
    process = start(*arguments)
    wait_for(path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("script, result", [("train_cls.py", "classifier.pt"), ("train_seg.py", "segmenter.pt")])
def test_a_killed_training_ends_with_the_same_weights(script, result, finished, toy, tmp_path):
    """On the CPU: CUDA adds up the gradients of an enlarged map in any order."""
    states = []
    for name in ("whole", "killed"):
        run = tmp_path / name
        if script == "train_cls.py":
            command = [*AGAIN, "--data", toy, "--run", run, "--reg-epochs", 2]
        else:
            copy_of(finished[0], tmp_path, name, ["segment*"])
            command = [*SEGMENT, "--run", run, "--epochs", 3]
        command += ["--device", "cpu"]
        if name == "killed":
            kill_when_there(run / result, *command)
            assert usage.load_checkpoint(run / result, "")["progress"]["epoch"] < 3
        stage(*command)
        states.append(usage.load_checkpoint(run / result, ""))
    for part in {"student", "teacher", "segmenter"} & states[0].keys():
        assert all(torch.equal(states[0][part][key], states[1][part][key]) for key in states[0][part])
    one, two = (state["progress"] for state in states)
    assert one.get("running") == two.get("running") and one["epoch"] == two["epoch"] == 3


def test_full_memory_is_no_broken_file_and_no_other_file_is_tidied(tmp_path):
    with pytest.raises(MemoryError), usage.reading("a.json", "repair it"):
        raise MemoryError
    mine, others = tmp_path / "seeds/.partial-1-a.png", tmp_path / "maps/.partial-1-a.npz"
    for path in (mine, others):
        path.parent.mkdir()
        path.touch()
    usage.Log(tmp_path / "seeds.jsonl", 1, folders=[tmp_path / "seeds", tmp_path / "not there"])
    assert not mine.exists() and others.exists()


def test_an_unknown_backbone_is_refused():
    with pytest.raises(usage.InputError, match="unknown backbone 'resnet34'"):      # torchvision has it, undilated
        usage.build_network("resnet34", 5)


def test_killed_seeds_end_as_the_same(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("classifier.pt", "classifier.json"):
        shutil.copy(finished[0] / name, run)
    command = ["make_seeds.py", "--run", run, "--scales", 1, 2, "--workers", 0]
    kill_when_there(run / "seeds", *command)
    (run / "seeds/.partial-1-left.png").touch()
    stage(*command)
    for folder in ("seeds", "pseudo_masks", "maps"):
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
    run = copy_of(finished[0], tmp_path, without=["segment*"])
    before = digest(run)
    process = start(*SEGMENT, "--run", run, preexec_fn=limit)
    errors = process.communicate(timeout=60)[1].strip().splitlines()
    assert process.returncode == 2 and len(errors) == 1 and "make room" in errors[0], errors
    assert digest(run) == before


@pytest.mark.parametrize("script", ["train_cls.py", "train_seg.py"])
def test_weights_that_are_not_finite_stop_the_run(script, finished, toy, tmp_path, capsys):
    run, result = copy_of(finished[0], tmp_path, without=["segment*"]), "segmenter.pt"
    command = [*SEGMENT, "--run", run, "--lr", 1e6, "--batch-size", 2, "--epochs", 4]
    if script == "train_cls.py":
        run, result = tmp_path / "new", "classifier.pt"
        command = [*AGAIN, "--run", run, "--data", toy, "--lr", 1e6, "--weight-decay", 1e6]
    with pytest.raises(SystemExit) as end:
        stage(*command)
    errors = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and re.search("(L_GEN|L_REG|loss|weights) (is|are) .*lower --lr", errors[-1]), errors
    assert not (run / result).exists()


def test_two_processes(finished, toy, tmp_path):
    """Seeds and segmentation; then a process that cannot know what seeds were made with, and none may write any."""
    run = copy_of(finished[0], tmp_path, without=["seg*", "seeds*", "maps", "pseudo_masks"])
    seeds = "make_seeds.py", "--run", run, "--scales", 1, 2, "--workers", 0
    for command in (seeds, (*SEGMENT, "--run", run)):
        assert torchrun(*command) == (0, mock.ANY)
    assert len(list((run / "segmentation").glob("*.png"))) == 4
    for name in usage.DataFolder(toy).ids("train"):             # threads and rounding differ
        one, two = (usage.load_maps(folder / f"maps/{name}.npz", 5)[1].int() for folder in (finished[0], run))
        assert (one - two).abs().float().mean() < 2
    for path in (run / "seeds.json", *sorted(run.glob("seeds/*.png"))[:4]):
        path.unlink()
    before = digest(run)
    code, errors = torchrun(*seeds, "--threshold", 0.2)
    assert code != 0 and "seeds.json: is missing" in errors and digest(run) == before


def test_of_two_processes_the_one_that_fails_says_why(toy, tmp_path):
    (tmp_path / "file").touch()
    code, errors = torchrun("train_cls.py", "--data", toy, "--backbone", "mobilenet_v2", *SMALL, "--run", tmp_path / "file")
    assert code != 0 and "train_cls.py: " in errors and "in wait_for_all" not in errors


@pytest.mark.parametrize("backbone", ["resnet18", "deit_tiny"])
def test_two_processes_give_the_losses_of_one(backbone, toy, tmp_path):
    """Where each image has as many classes, so that each process has as many pairs (image, class)."""
    weights, script = "none", tmp_path / "float32.py"           # bfloat16 rounds so coarsely that runs part within steps
    script.write_text(f"import contextlib, runpy, sys; sys.path[0] = {str(HERE)!r}; import usage\n"
                      "usage.fast_autocast = lambda device: contextlib.nullcontext()\n"
                      f"runpy.run_path({str(HERE / 'train_cls.py')!r}, run_name='__main__')\n")
    data = copy_of(toy, tmp_path, "data")
    relabelled(data)
    if backbone in usage.CNNS:                                  # pretrained: BatchNorm is frozen, no process has its own
        weights = tmp_path / "weights.pth"
        torch.save(torchvision.models.get_model(backbone).state_dict(), weights)
    command = ["--data", data, "--backbone", backbone, *SMALL, "--weights", weights, "--epochs", 0, "--reg-epochs", 5,
               "--max-rate", 0, "--no-adaptive", "--lr", 1e-4, "--reg-temperature", 0.2, "--teacher-temperature", 0.1,
               "--run"]
    with mock.patch.object(usage, "fast_autocast", lambda device: contextlib.nullcontext()):
        stage("train_cls.py", *command, tmp_path / "one", "--device", "cpu")
    assert torchrun(script, *command, tmp_path / "two") == (0, mock.ANY)
    logs = ((tmp_path / run / "classifier.jsonl").read_text().splitlines() for run in ("one", "two"))
    one, two = ([[json.loads(line)[key] for key in ("L_GEN", "L_REG")] for line in log[1:]] for log in logs)
    assert len(one) == 1 and one[0][1] > 0                      # a record every tenth step
    np.testing.assert_allclose(one, two, rtol=1e-3)


def test_weights_are_known_by_their_content(toy, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save(torchvision.models.mobilenet_v2().bfloat16().state_dict(keep_vars=True), weights)
    command = ["train_cls.py", "--data", toy, "--backbone", "mobilenet_v2", *SMALL, "--epochs", 1, "--weights", weights,
               "--run", tmp_path / "run"]
    stage(*command)
    before = digest(tmp_path / "run")
    stage(*command)
    stage(*command, "--weights", shutil.copy(weights, tmp_path / "moved.pth"))
    assert digest(tmp_path / "run") == before
    torch.save(torchvision.models.mobilenet_v2().state_dict(), weights)
    with pytest.raises(SystemExit):
        stage(*command)
    assert "made with another input_files" in capsys.readouterr().err and digest(tmp_path / "run") == before


def test_rows_of_the_ablation(toy, tmp_path):
    """Each flag changes L_REG."""
    losses = set()
    for number, flags in enumerate(([], ["--attention"], ["--no-adaptive"], ["--views", "geometric"])):
        stage("train_cls.py", "--data", toy, "--run", tmp_path / str(number), "--backbone", "deit_tiny", *BOTH, *flags)
        records = (tmp_path / str(number) / "classifier.jsonl").read_text().splitlines()
        losses.add(json.loads(records[-1])["L_REG"])
    assert len(losses) == 4 and 0 not in losses


def test_every_step_learns():
    for first, steps in ((10, 20), (0, 20), (20, 20), (1, 2)):
        rates = [train_cls.learning_rate(step, first, steps) for step in range(steps)]
        assert min(rates) > 0 and max(rates) <= 1 and (first < 10 or max(rates) > 0.9)
        assert first in (0, steps) or max(rates[first:]) <= 0.5


def test_the_toy_has_one_recipe_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def parsed(*flags):
        with mock.patch.object(sys, "argv", ["train_cls.py", *flags]):
            return vars(train_cls.parse_arguments())
    usual = parsed()
    assert usual["weights"] == "none" and usual["run"] == Path("runs/toy-resnet50")
    for name in ("toy", "data/toy", "./data/../data/toy/", str(tmp_path / "data/toy")):
        assert parsed("--data", name) | {"data": None} == usual | {"data": None}
    assert parsed("--data", "photos")["weights"] == "imagenet"
    weight = str(train_cls.RECIPES["cnn", "scratch"]["reg_weight"])
    assert parsed("--temperature", "inf", "--reg-weight", weight, "--seed", "0", "--lr", "1")["run"] == usual["run"]
    runs = {parsed(*flags)["run"] for flags in ([], ["--seed", "1"], ["--seed", "2"], ["--temperature", "3"], [
        "--no-adaptive"], ["--views", "geometric"], ["--backbone", "deit_tiny"], ["--data", "photos"])}
    assert len(runs) == 8


def test_a_backbone_may_have_a_recipe_of_its_own():
    rows = []
    for backbone in ("resnet50", "resnet101"):
        args = SimpleNamespace(**{key: None for key in train_cls.RECIPES["cnn", "scratch"]} | {"lr": 1.0})
        rows.append(usage.take_defaults(args, train_cls.RECIPES, backbone, "none"))
        assert vars(args) == rows[-1] | {"lr": 1.0}             # what was given stays
    assert rows[0] == train_cls.RECIPES["cnn", "scratch"] != rows[1]


# ---- Bad input: one line, exit code 2, nothing written or lost -------------------------------------------------------

TRAIN = ["train_cls.py", "--data", "DATA", "--run", "NEW", "--backbone", "mobilenet_v2", "--epochs", "1", *SMALL]
GO_ON = [*AGAIN, "--data", "DATA", "--run", "RUN"]
SEEDS = ["make_seeds.py", "--run", "RUN", "--data", "DATA", "--scales", "1", "2", "--workers", "0"]
IMAGES = ["make_seeds.py", "--run", "RUN", "--images"]
SEG = [*SEGMENT, "--run", "RUN", "--data", "DATA"]
EVAL = ["eval.py", "--run", "RUN", "--data", "DATA"]
PAIRS = ["eval.py", "--truth", "DATA/SegmentationClass", "--pred"]
LIST, CLASSES, LABELS = "data/ImageSets/Segmentation/train.txt", "data/classes.txt", "data/labels.json"
PHOTO, TWIN = "data/JPEGImages/train_0000.jpg", "data/JPEGImages/train_0000.png"
TRUTH, MAPS, SEED = "data/SegmentationClass/train_0000.png", "run/maps/train_0000.npz", "run/seeds/train_0000.png"
PSEUDO, CLASSIFIER = "run/pseudo_masks/train_0000.png", "run/classifier.pt"


def gone(*names):
    def spoil(path):
        for name in names:
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    return spoil


def cut(*names):
    """The first file ends early, the others are gone."""
    return lambda path: (truncated(path / names[0]), gone(*names[1:])(path))


def zeroed(*names):
    """The first file keeps its size alone, the others are gone."""
    return lambda path: ((path / names[0]).write_bytes(bytes((path / names[0]).stat().st_size)), gone(*names[1:])(path))


def text(name, content, encoding="utf-8"):
    return lambda path: (path / name).unlink() or (path / name).write_text(content, encoding)


def table(name, change):
    return lambda path: edited(path / name, change)


def labels(change):
    return table(LABELS, lambda table: change(table["train_0000"]))


def picture(name, side=48, mode="L", value=0):
    return lambda path: Image.new(mode, (side, side), value).save(path / name)


def arrays(**contents):
    return lambda path: np.savez(path / MAPS, **contents)


def damaged(name):
    """Some bytes in the middle are others."""
    def spoil(path):
        content = bytearray((path / name).read_bytes())
        middle = len(content) // 2
        content[middle:middle + 100] = bytes(byte ^ 64 for byte in content[middle:middle + 100])
        (path / name).unlink()
        (path / name).write_bytes(content)
    return spoil


def checkpoint(**state):
    return lambda path: (path / CLASSIFIER).unlink() or torch.save(state, path / CLASSIFIER)


def retrained(path):
    state = usage.load_checkpoint(path / CLASSIFIER, "")
    state["student"]["classifier.bias"] += 1
    checkpoint(**state)(path)


def without_a_setting(path):
    state = usage.load_checkpoint(path / CLASSIFIER, "")
    del state["settings"]["jitter"]
    checkpoint(**state)(path)


def coco_without_images(path):
    train_cls.convert_coco(draw_coco(path / "data/coco", path / "data"))
    shutil.rmtree(path / "data/coco/train2014")


def coco_of_something_else(path):
    edited(draw_coco(path / "data/coco", path / "data") / "annotations/instances_train2014.json", dict.clear)


def linked_to_the_truth(path):
    shutil.rmtree(path / "run/seeds")
    (path / "run/seeds").symlink_to(path / "data/SegmentationClass")


BAD_INPUT = {  # what is wrong: the command, what the line must name, what spoils the data or the run
    "missing data folder": (TRAIN, "data: no such folder", gone("data")),
    "missing data folder, segmentation": (SEG, "data: no such folder", gone("data")),
    "missing list": (TRAIN, "train.txt", gone(LIST)),
    "empty list": (TRAIN, "train.txt: is empty", text(LIST, "\n")),
    "path in a list": (TRAIN, "train.txt", text(LIST, "../../secret\n")),
    "latin-1 in a list": (TRAIN, "as UTF-8", text(LIST, "Käse\n", "latin-1")),
    "UTF-16 in labels": (TRAIN, "labels.json", text(LABELS, "{}", "utf-16")),
    "missing image, seeds": (SEEDS, "train_0000.jpg", gone(PHOTO)),
    "unreadable image": (TRAIN, "train_0000.jpg", cut(PHOTO)),
    "unreadable image in a worker": ([*TRAIN, "--workers", "1"], "train_0000.jpg", cut(PHOTO)),
    "unreadable image, seeds": (SEEDS, "train_0000.jpg", zeroed(PHOTO, SEED)),
    "another photograph of that name, seeds": (SEEDS, "another input_files", cut(PHOTO)),
    "background as a class": (TRAIN, "background is no class", text(CLASSES, "background\na\nb\nc\nd\n")),
    "no labels at all": (TRAIN, "list its classes in labels.json", gone(LABELS)),
    "classifier.json of another classifier": ([*SEEDS, "--split", "val"], "another classifier; give the same", table(
        "run/classifier.json", lambda table: table.update(classifier="x"))),
    "unreadable image, segmentation": (SEG, "train_0000.jpg", zeroed(PHOTO, "run/segmenter.pt")),
    "two images of one name": (TRAIN, "rename one", picture(TWIN)),
    "two photographs of one name": ([*IMAGES, "DATA/JPEGImages"], "rename one", picture(TWIN)),
    "unknown label": (TRAIN, "unicorn", labels(lambda names: names.append("unicorn"))),
    "label that is no name": (TRAIN, "image train_0000: ", labels(lambda names: names.append(["cat"]))),
    "a word for a list of labels": (TRAIN, "not a list", table(LABELS, lambda table: table.update(train_0000=""))),
    "an object for a list of labels": (TRAIN, "not a list", table(LABELS, lambda table: table.update(
        train_0000={name: False for name in table["train_0000"]}))),
    "labels of another shape": (TRAIN, "labels.json", text(LABELS, '["cat"]')),
    "image without labels": (TRAIN, "image train_0000: ", table(LABELS, lambda table: table.pop("train_0000"))),
    "broken labels": (TRAIN, "labels.json", text(LABELS, "{")),
    "deep labels": (TRAIN, "labels.json", text(LABELS, "[" * 10 ** 5)),
    "no classes at all": (TRAIN, "every image of train has the same classes", table(
        LABELS, lambda table: [names.clear() for names in table.values()])),
    "too many classes": (TRAIN, "at most 254", text(CLASSES, "\n".join(map(str, range(255))))),
    "a class twice": (TRAIN, "classes.txt: 5 names, 4 different", text(CLASSES, "a\nb\nc\nd\na\n")),
    "a class twice, any PNGs": ([*PAIRS, "RUN/seeds", "--classes", "DATA/classes.txt"], "5 names, 4 different",
                                text(CLASSES, "a\nb\nc\nd\na\n")),
    "labels corrected": (GO_ON, "classifier.pt: made with another input_files", labels(list.clear)),
    "labels corrected, seeds": (SEEDS, "seeds.json: made with another input_files", labels(list.clear)),
    "another photograph of that name, segmentation": (SEG, "another input_files", picture(PHOTO, mode="RGB")),
    "another photograph of val, segmentation": (SEG, "another val", picture(PHOTO.replace("train", "val"), mode="RGB")),
    "a class threshold that is none": ([*SEEDS, "--split", "val"], "same train_cls.py command", table(
        "run/classifier.json", lambda table: table.update(class_threshold="0.4"))),
    "a split that is none": ([*SEEDS, "--split", "../Main/val"], "there are train, val", None),
    "another photograph of that name, pseudo masks": (SEG, "seeds.json: made with another input_files", lambda path: (
        (path / PHOTO).write_bytes((path / PHOTO).read_bytes() + b"."), gone("run/segmenter.pt")(path))),
    "segmentation of another segmenter": (SEG, "another segmenter", table(
        "run/segmentation.json", lambda table: table.update(segmenter="x"))),
    "segmentation of another classifier": (EVAL, "segmentation.json: made with another classifier", table(
        "run/segmentation.json", lambda table: table.update(classifier="x"))),
    "pseudo masks of another classifier": (SEG, "another classifier", table("run/seeds.json", lambda table: table.update(
        classifier="0"))),
    "pseudo masks not there": ([*SEG, "--pseudo-masks", "RUN/other"], "correct --pseudo-masks", None),
    "a sweep of two folders": ([*PAIRS, "RUN/seeds", "--sweep"], "no --run, --data or --sweep", None),
    "class names for a run": ([*EVAL, "--classes", "DATA/classes.txt"], "knows its --classes", None),
    "images taken away, seeds": (SEEDS, "another input_files", text(LIST, "train_0001\ntrain_0002\n")),
    "images in another order, segmentation": (SEG, "another input_files", lambda path: text(
        LIST, "\n".join(sorted((path / LIST).read_text().split(), reverse=True)))(path)),
    "another classifier": (SEEDS, "another classifier", retrained),
    "another classifier, segmentation": (SEG, "another classifier", retrained),
    "other pseudo masks": (SEG, "another input_files", picture(PSEUDO)),
    "other settings": ([*SEEDS, "--threshold", "0.3"], "another threshold", None),
    "other settings of the segmentation": ([*SEG, "--no-refine"], "another refine", gone("run/segmenter.pt")),
    "seeds of nobody knows what": ([*SEEDS, "--threshold", "0.2"], "seeds.json: is missing", gone("run/seeds.json")),
    "settings of another shape": (EVAL, "seeds.json", text("run/seeds.json", "[]")),
    "settings of nothing": (EVAL, "seeds.json", text("run/seeds.json", "")),
    "settings without a threshold": (EVAL, "seeds.json", table("run/seeds.json", lambda table: table.pop("threshold"))),
    "settings without classes": (EVAL, "its 5 classes are not", table(
        "run/seeds.json", lambda table: table.update(classes=None))),
    "log of something else": (GO_ON, "classifier.jsonl", text("run/classifier.jsonl", "{")),
    "mask of another size": (EVAL, "train_0000.png", picture(TRUTH, 20)),
    "mask value beyond the classes": (EVAL, "value 6", picture(TRUTH, value=6)),
    "mask in colour": (EVAL, "RGB", picture(TRUTH, mode="RGB")),
    "missing mask": (EVAL, "train_0000.png", gone(TRUTH)),
    "seed of another size": (SEG, "train_0000.png", lambda path: (
        picture(PSEUDO, 20)(path), gone("run/segmenter.pt", "run/segmentation.json", "run/segmentation")(path))),
    "lost pseudo mask": (SEG, "run make_seeds.py", text(PSEUDO, "")),
    "half a segmentation": (EVAL, "remove it and run its stage again", cut("run/segmentation/val_0000.png")),
    "a line's end in a name": (["make_seeds.py", "--run", "two\nlines"], "two lines", None),
    "segmentation without classifier": (SEG, "run train_cls.py", gone(CLASSIFIER)),
    "segmentation without seeds": (SEG, "run make_seeds.py", gone("run/pseudo_masks")),
    "mistyped run": (["make_seeds.py", "--run", "NEW"], "your --data and --backbone first, or correct --run", None),
    "evaluation of nothing": (["eval.py", "--run", "NEW"], "run make_seeds.py", None),
    "evaluation without maps": ([*EVAL, "--sweep"], "maps/train_0000.npz", gone(MAPS)),
    "maps that lost half": (EVAL, "train_0000.npz", arrays(classes=np.arange(1), maps=np.zeros((1, 48, 48), "u1"))),
    "maps of another shape": (EVAL, "train_0000.npz", arrays(classes=np.arange(3), maps=np.zeros((1, 48, 48), "u1"))),
    "maps of unknown classes": (EVAL, "train_0000.npz: classes that there are not", arrays(
        classes=np.array([77]), maps=np.zeros((1, 48, 48), "u1"), refined=np.zeros((1, 48, 48), "u1"))),
    "maps of one dimension": (EVAL, "train_0000.npz: arrays of another shape", arrays(
        classes=np.arange(1), maps=np.zeros(1, "u1"), refined=np.zeros(1, "u1"))),
    "maps of something else": (EVAL, "maps/train_0000.npz", arrays(x=3)),
    "folder without photographs": ([*IMAGES, "DATA/SegmentationClass/.."], "or no .jpg or .jpeg or .png", None),
    "no folder of photographs": ([*IMAGES, "nowhere"], "nowhere: no such folder", None),
    "COCO without what it lists": ([*TRAIN, "--data", "DATA/coco"], "COCO_train_0000.jpg", coco_without_images),
    "COCO of something else": ([*TRAIN, "--data", "DATA/coco"], "not COCO's instances", coco_of_something_else),
    "no checkpoint": (SEEDS, "classifier.pt", text(CLASSIFIER, "text")),
    "checkpoint of another version": (SEEDS, "classifier.pt: 'jitter'", without_a_setting),
    "damaged checkpoint, training": (GO_ON, "classifier.pt: is damaged", damaged(CLASSIFIER)),
    "damaged checkpoint, segmentation": (SEG, "segmenter.pt: is damaged", damaged("run/segmenter.pt")),
    "checkpoint of something else": (SEG, "classifier.pt", checkpoint(weights=torch.zeros(3))),
    "checkpoint of something else, training": (GO_ON, "classifier.pt", checkpoint(settings=[1])),
    "checkpoint of other classes": (SEEDS, "its 2 classes are not", text(CLASSES, "cat\ndog\n")),
    "checkpoint of another backbone": ([*GO_ON, "--backbone", "resnet18"], "another backbone", None),
    "weights of another backbone": ([*TRAIN, "--weights", "RUN/classifier.pt"], "not a state dict of mobilenet_v2", None),
    "no weights file": ([*TRAIN, "--weights", "nowhere.pth"], "nowhere.pth", None),
    "no class threshold": ([*SEEDS, "--split", "val"], "classifier.json", gone("run/classifier.json")),
    "too many workers": ([*TRAIN, "--workers", "1000"], "--workers: invalid number (0 to", None),
    "no such device": ([*TRAIN, "--device", "cuda:7"], "--device cuda:7", None),
    "no such device, seeds": ([*SEEDS, "--device", "tpu"], "--device tpu", None),
    "no real device": ([*TRAIN, "--device", "meta"], "--device meta", None),
    "batch larger than the data": ([*TRAIN, "--batch-size", "50"], "8 images", None),
    "batch of one": ([*TRAIN, "--batch-size", "1", "--size", "16"], "--batch-size: invalid", None),
    "endless seed": ([*TRAIN, "--seed", str(2 ** 70)], "--seed: invalid", None),
    "unknown backbone": ([*TRAIN, "--backbone", "foo"], "invalid choice: 'foo'", None),
    "unknown flag": ([*SEEDS, "--foo"], "--foo", None),
    "download to nowhere": (["train_cls.py", "--download"], "--data FOLDER", None),
    "nothing to train": ([*TRAIN, "--epochs", "0"], "nothing to train", None),
    "attention of a CNN": ([*TRAIN, "--attention"], "--attention", None),
    "affinity of a CNN": ([*SEEDS, "--affinity"], "--affinity", None),
    "images and a split": ([*IMAGES, "DATA", "--split", "val"], "not both", None),
    "seeds in the folder of the truth": (SEEDS, "true masks", linked_to_the_truth),
    "learning from the truth": ([*SEG, "--pseudo-masks", "DATA/SegmentationClass"], "true masks", None),
    "comparing the truth with itself": ([*PAIRS, "DATA/SegmentationClass"], "one folder", None),
    "nothing to compare": ([*PAIRS, "DATA/JPEGImages"], "no .png", None),
    "void in a prediction": ([*PAIRS, "RUN/pseudo_masks", "--classes", "DATA/classes.txt"], "has void",
                             picture(PSEUDO, value=255)),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, toy, finished, tmp_path, monkeypatch, capsys):
    command, expected, spoil = BAD_INPUT[case]
    data, run = copy_of(toy, tmp_path, "data"), copy_of(finished[0], tmp_path)
    for path in (run / "seeds.json", run / "segmentation.json"):        # the copy's own folders
        edited(path, lambda table: table.update(data=str(data)))
    if spoil:
        spoil(tmp_path)
    before = digest(tmp_path)
    command = [part.replace("DATA", str(data)).replace("RUN", str(run)).replace("NEW", str(tmp_path / "new"))
               for part in command]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        stage(*command)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and expected in lines[0] and "train_aug" not in lines[0], lines
    after = digest(tmp_path)
    assert before == {path: after.get(path) for path in before}, "something is lost or changed"
    assert set(after) == set(before), f"written: {set(after) - set(before)}"


@pytest.mark.parametrize("script", [train_cls, make_seeds, train_seg])
def test_numbers_are_finite_and_in_their_range(script):
    flags = re.findall(r'add\("(--[a-z-]+)", type=number', inspect.getsource(script))
    assert len(flags) > 3
    for flag, value in ((flag, value) for flag in flags for value in ("nan", "inf", "-1", "1e999", "two")):
        if (flag, value) in (("--temperature", "inf"), ("--temperature", "1e999")):
            continue
        with mock.patch.object(sys, "argv", ["script", flag, value]), pytest.raises(usage.InputError, match=value):
            script.main()


def test_a_folder_that_cannot_be_written_to(toy, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as end:
        stage(*[part.replace("DATA", str(toy)).replace("NEW", str(tmp_path / "file/run")) for part in TRAIN])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and len(message.splitlines()) == 1 and "make room" not in message
    assert "move away what is there" in message


def test_without_torchrun_there_is_one_process():
    command = [sys.executable, "-c", "import usage; print(usage.RANK, usage.WORLD, usage.start_processes('cpu'))"]
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    assert subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True).stdout == "0 1 cpu\n"


def test_a_cuda_device_has_a_number(monkeypatch):
    """set_device takes no other; here without CUDA, by torch's own check."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(*size))
    monkeypatch.setattr(torch.cuda, "set_device", torch.cuda._utils._get_device_index)
    for device in ("auto", "cuda"):
        assert usage.start_processes(device) == torch.device("cuda:0")
    assert usage.start_processes("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(usage, "WORLD", 2)
    with pytest.raises(usage.InputError, match="one of its own"):
        usage.start_processes("cuda:1")


# ---- README ----------------------------------------------------------------------------------------------------------


def test_the_readme_names_flags_that_exist():
    flags = set()
    for script in ("train_cls.py", "make_seeds.py", "train_seg.py", "eval.py"):
        flags |= set(re.findall(r'add\("(--[a-z-]+)"', (HERE / script).read_text()))
    flags |= {flag.replace("--", "--no-") for flag in ("--flip", "--refine", "--adaptive", "--affinity")}
    flags |= {"--nproc-per-node", "--nnodes", "--rdzv-endpoint"}                    # torchrun's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", (HERE / "README.md").read_text()))
    assert len(named) > 10 and named <= flags


def readme_block(heading, language):
    """The first block of code below a heading of README.md."""
    text = (HERE / "README.md").read_text()
    return text.split(f"\n## {heading}")[1].split("\n## ")[0].split(f"\n```{language}\n")[1].split("\n```")[0]


def test_the_readme_snippet_trains():
    code, steps = readme_block("Take the loss", "python"), []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    names, before = {}, time.time()
    with contextlib.chdir(HERE), contextlib.closing(SimpleNamespace(close=hook.remove)):
        exec(code, names)
    assert steps and time.time() - before < 20
    assert {"activation_unit", "consistency_loss", "ema_teacher", "generation_loss"} <= set(re.findall(r"\w+", code))
    assert all(value.isfinite().all() for value in names.values() if isinstance(value, torch.Tensor))


def test_the_readme_names_the_function_of_each_symbol():
    named = set(re.findall(r"(?<![\w.])(?:usage\.)?([a-z]+(?:_[a-z]+)+)", readme_block("The method in ten lines", "")))
    parameters = {name for function in PAPER for name in inspect.signature(getattr(usage, function)).parameters}
    assert set(PAPER) <= named <= {*dir(usage), *parameters, "sum_i", "sum_j"}


# ---- Speed: `python test_usage.py` prints ratios, measured on an otherwise idle machine ------------------------------


def peak_memory(folder, *arguments):
    """Run a stage as a process in a folder; its peak memory in MB."""
    process = start(*arguments, cwd=folder)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, process.stderr.read()
    return used.ru_maxrss / 1024


def wait_for_lines(path, count, process):
    while not path.is_file() or len(path.read_text().splitlines()) < count:
        time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()


def seconds_per_record(path, first, last):
    """Seconds between two records of a .jsonl, of which each stands for ten steps or images, divided by their number."""
    seconds = [json.loads(line)["seconds"] for line in path.read_text().splitlines()]
    return (seconds[last + 1] - seconds[first + 1]) / (last - first) / 10


def bare_step(steps=20):
    """Seconds of forward, backward and optimiser step of ResNet-50 on a batch in memory."""
    network = usage.build_network("resnet50", 5).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)
    images = torch.randn(16, 3, 81, 81).contiguous(memory_format=torch.channels_last)
    for step in range(-3, steps):
        if step == 0:
            before = time.time()
        s, alpha = usage.activate(network, images, math.inf)
        optimiser.zero_grad()
        usage.generation_loss(s, alpha, torch.ones(16, 5)).backward()
        optimiser.step()
    return (time.time() - before) / steps


@torch.no_grad()
def bare_seed(scales, images=30):
    """Seconds of the forwards that one toy image's seed takes, of images in memory."""
    network = usage.build_network("resnet50", 5).to(memory_format=torch.channels_last).eval()
    sides = [network.fitting_size((81 * scale, 81 * scale)) for scale in scales]
    views = [torch.randn(2, 3, *side).contiguous(memory_format=torch.channels_last) for side in sides]
    for number in range(-3, images):
        if number == 0:
            before = time.time()
        with usage.fast_autocast(views[0].device):
            [network(view) for view in views]
    return (time.time() - before) / images


def seed_seconds(folder, run, flag, records=15):
    """Seconds that make_seeds.py takes for an image, over ten times as many images; its results are removed."""
    process, log = start("make_seeds.py", "--run", run, flag, cwd=folder), folder / run / "seeds.jsonl"
    wait_for_lines(log, records + 2, process)
    process.kill()
    process.communicate()
    seconds = seconds_per_record(log, 0, records)
    [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in (folder / run).iterdir()
     if not path.name.startswith("classifier")]
    return seconds


def print_ratios(folder):
    """Train, make seeds and evaluate on toy scenes, each beside the bare arithmetic, by turns."""
    before = time.time()
    process = start("train_cls.py", cwd=folder)
    wait_for_lines(folder / "runs/toy-resnet50/classifier.jsonl", 2, process)
    print(f"train_cls.py on the toy: the first ten steps are done after {time.time() - before:.1f} s, drawing included")
    process.kill()
    process.wait()

    seconds = {"bare": [], "CAM": [], "USAGE": []}
    for turn in (1, 2):
        seconds["bare"].append(bare_step())
        for name, flags in (("CAM", ["--reg-weight", 0]), ("USAGE", ["--no-adaptive"])):
            run = f"{name}-{turn}"
            peak_memory(folder, "train_cls.py", "--epochs", 0, "--reg-epochs", 1, "--run", run, *flags)
            seconds[name].append(seconds_per_record(folder / run / "classifier.jsonl", 0, 4))
    bare, cam, full = map(np.mean, seconds.values())
    print(f"a step: bare {bare:.3f} s, CAM {cam:.3f} s = {cam / bare:.2f} x, USAGE {full:.3f} s = {full / cam:.2f} x CAM's")

    seconds, scales = {"bare": [], "--no-refine": [], "--refine": []}, make_seeds.RECIPES["cnn", "scratch"]["scales"]
    for turn in (1, 2):
        seconds["bare"].append(bare_seed(scales))
        for flag in ("--no-refine", "--refine"):
            seconds[flag].append(seed_seconds(folder, f"CAM-{turn}", flag))
    bare, plain, refined = map(np.mean, seconds.values())
    print(f"a seed: bare forwards {1e3 * bare:.1f} ms, make_seeds.py without refinement {1e3 * plain:.1f} ms = "
          f"{plain / bare:.2f} x, with it, the default, {1e3 * refined:.1f} ms = {refined / bare:.2f} x")

    train_cls.draw_toy(folder / "few", train=200, val=50)
    for name, data in (("few", "few"), ("many", "data/toy")):
        train = ["train_cls.py", "--data", data, "--weights", "none", "--epochs", 1, "--reg-epochs", 0, "--size", 33]
        peaks = [peak_memory(folder, *command, "--run", f"{name}-run") for command in (
            train, ["make_seeds.py", "--scales", 0.5], ["train_seg.py", "--epochs", 1], ["eval.py", "--sweep"])]
        print(f"peak memory of the four stages, {name} images: " + ", ".join(f"{peak:.0f} MB" for peak in peaks))

    with contextlib.redirect_stdout(io.StringIO()):             # inside this process: without Python's start
        once, sweep = (min(timeit.repeat(lambda: evaluation.measure_run(folder / "few-run", None, with_sweep), number=1,
                                         repeat=3)) for with_sweep in (False, True))
    print(f"eval.py, 200 images: one threshold {once:.2f} s, 101 {sweep:.2f} s = {sweep / once:.2f} x")

    seconds = {}
    for modules in ("torch, torchvision", "usage"):
        command = [sys.executable, "-c", f"import {modules}"]
        seconds[modules] = min(timeit.repeat(lambda: subprocess.run(command, check=True, cwd=HERE), number=1, repeat=5))
    print("import: " + ", ".join(f"{modules} {value:.2f} s" for modules, value in seconds.items()), flush=True)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""                     # all on the CPU, as the bare steps are
    with tempfile.TemporaryDirectory() as folder:
        print_ratios(Path(folder))
