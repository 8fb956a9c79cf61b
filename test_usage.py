"""Tests: formulas against slow loops, special cases as equalities, the stages as a user runs them.

    python -m pytest -q test_usage.py
    python -m pytest -q test_usage.py -k generation_loss    the tests of one function, by its name
    python test_usage.py                                    no tests, but how long a step and a seed
                                                            take beside the bare network

Contents, each under a banner:

    Sec. 4.1                spatial_activation_distribution, class_scores, generation_loss
    Sec. 4.2                consistency_loss, chance_loss, learning_status, set_adjustment,
                            ema_teacher
    Functions stand alone   each can be copied out of usage.py
    Seeds                   seed_maps, spread_activations, label_map, refine_maps,
                            multi_scale_activations
    The networks            build_network, and the weights that it is given
    The metrics             metrics, count_levels, means, mean_average_precision, score_threshold
    The data
    The run folder
    The four stages
    Bad input
    Faults that users of similar projects reported
    README                  its flags, its snippet, its symbols
    Speed                   what `python test_usage.py` prints
"""

import ast
import contextlib
import errno
import importlib.metadata
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, PngImagePlugin
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.fixture
def in_float32(monkeypatch):
    """Networks compute in float32 on every machine: bfloat16 hides small differences."""
    monkeypatch.setattr(usage, "fast_autocast", lambda device: contextlib.nullcontext())


def random_labels(images=3, classes=4):
    labels = (torch.rand(images, classes) < 0.5).float()
    labels[0] = 0                                               # an image without any class
    labels[1] = 1
    return labels


def count_operations(function, *arguments):
    """How many operations of torch a call executes, views left out."""
    count = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal count
            on_the_host = operation.__name__.startswith(("eq", "gt", "_local_scalar"))
            count += not operation.is_view and not on_the_host
            return operation(*args, **(kwargs or {}))

    with Counter():
        function(*arguments)
    return count


# ---- Sec. 4.1 ------------------------------------------------------------------------------------


def slow_softmax(values, temperature):
    """exp(s_i / tau) / sum_j exp(s_j / tau) of a list, in Python's floats."""
    if temperature == 0:
        return [1.0 if i == values.index(max(values)) else 0.0 for i in range(len(values))]
    if temperature == math.inf:
        return [1 / len(values)] * len(values)
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def slow_distribution(activations, temperature):
    """alpha[c,i] = exp(s[c,i] / tau) / sum_j exp(s[c,j] / tau), map by map."""
    result = torch.zeros_like(activations)
    for b, c in np.ndindex(*activations.shape[:2]):
        alpha = slow_softmax(activations[b, c].flatten().tolist(), temperature)
        result[b, c] = torch.tensor(alpha).view(activations.shape[2:])
    return result


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_spatial_activation_distribution_equals_the_slow_loop(temperature):
    s = torch.randn(3, 4, 5, 6) * 5
    alpha = usage.spatial_activation_distribution(s, temperature)
    assert alpha.shape == s.shape
    torch.testing.assert_close(alpha, slow_distribution(s, temperature))
    torch.testing.assert_close(alpha.sum((2, 3)), torch.ones(3, 4))


def test_spatial_activation_distribution_has_exact_special_cases():
    s = torch.randn(2, 3, 4, 7)
    assert (usage.spatial_activation_distribution(s, math.inf) == 1 / 28).all()
    s[0, 0].fill_(1.0)                                          # a tie: the first position wins
    alpha = usage.spatial_activation_distribution(s, 0)
    assert alpha[0, 0].flatten().tolist() == [1.0] + [0.0] * 27
    assert ((alpha == 0) | (alpha == 1)).all()
    assert (alpha.sum((2, 3)) == 1).all()
    assert torch.equal(alpha.flatten(2).argmax(-1), s.flatten(2).argmax(-1))


@pytest.mark.parametrize("temperature", [-1.0, -math.inf, math.nan])
def test_spatial_activation_distribution_refuses_other_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature"):
        usage.spatial_activation_distribution(torch.randn(1, 1, 2, 2), temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_generation_loss_and_consistency_loss_do_not_overflow(dtype):
    s = (torch.randn(2, 3, 4, 4) * 1e4).to(dtype).requires_grad_()
    labels = random_labels(2, 3)
    teachers = (s.flip(-1), s.flip(-1) / 1e4)                   # the second has a unit of about 1
    for temperature in TEMPERATURES:
        with torch.autocast("cpu", torch.bfloat16):
            alpha = usage.spatial_activation_distribution(s, temperature)
            losses = [usage.generation_loss(s, alpha, labels)]
            if temperature > 0:
                losses += [
                    usage.consistency_loss(s, s_teacher, labels, temperature, temperature)
                    for s_teacher in teachers]
        assert alpha.dtype == torch.float32
        torch.testing.assert_close(alpha.detach().sum((2, 3)), torch.ones(2, 3))
        for loss in losses:
            gradient, = torch.autograd.grad(loss, s, retain_graph=True)
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 1, 5, 6)])
def test_class_scores_and_generation_loss_equal_the_slow_loop(shape):
    s = torch.randn(3, 4, 5, 6) * 3
    labels = random_labels()
    alpha = usage.spatial_activation_distribution(torch.randn(shape), 0.5)
    scores = usage.class_scores(s, alpha)
    total = 0.0
    for b, c in np.ndindex(3, 4):
        weights = alpha.expand(s.shape)[b, c].flatten().tolist()
        score = sum(a * v for a, v in zip(weights, s[b, c].flatten().tolist()))
        total += math.log1p(math.exp(-score if labels[b, c] else score)) / 12
        assert scores[b, c].item() == pytest.approx(score, abs=1e-5)
    assert usage.generation_loss(s, alpha, labels).item() == pytest.approx(total, rel=1e-5)
    assert usage.generation_loss(s, alpha, labels.bool()).item() == pytest.approx(total, rel=1e-5)


def test_class_scores_of_bfloat16_are_summed_in_float32():
    s = (100 + torch.rand(2, 3, 20, 20)).bfloat16()
    alpha = usage.spatial_activation_distribution(s, math.inf)
    scores = usage.class_scores(s, alpha)
    assert scores.dtype == usage.generation_loss(s, alpha, torch.ones(2, 3)).dtype == torch.float32
    torch.testing.assert_close(scores, s.double().mean((2, 3)).float())
    assert usage.class_scores(s, alpha.bfloat16()).dtype == torch.float32


def test_generation_loss_at_infinite_temperature_is_cam():
    """Global average pooling and a linear classifier, as CAM has it: equal value and gradients."""
    features = torch.randn(3, 8, 5, 6)
    classifier = nn.Conv2d(8, 4, 1)
    labels = random_labels()
    pooled = F.adaptive_avg_pool2d(features, 1)[:, :, 0, 0]
    scores = F.linear(pooled, classifier.weight[:, :, 0, 0], classifier.bias)
    cam = F.multilabel_soft_margin_loss(scores, labels)
    s = classifier(features)
    alpha = usage.spatial_activation_distribution(s, math.inf)
    ours = usage.generation_loss(s, alpha, labels)
    torch.testing.assert_close(ours, cam)
    ours = torch.autograd.grad(ours, classifier.parameters())
    cam = torch.autograd.grad(cam, classifier.parameters())
    for our_gradient, cam_gradient in zip(ours, cam):
        torch.testing.assert_close(our_gradient, cam_gradient)


def test_generation_loss_at_zero_temperature_is_multiple_instance_learning():
    s = torch.randn(3, 4, 5, 6, requires_grad=True)
    labels = random_labels()
    mil = F.multilabel_soft_margin_loss(F.adaptive_max_pool2d(s, 1)[:, :, 0, 0], labels)
    ours, limit = (
        usage.generation_loss(s, usage.spatial_activation_distribution(s, temperature), labels)
        for temperature in (0, 1e-4))
    torch.testing.assert_close(ours, mil)
    torch.testing.assert_close(torch.autograd.grad(ours, s), torch.autograd.grad(mil, s))
    torch.testing.assert_close(limit, mil)


def test_activations_and_alpha_of_class_to_patch_attention(in_float32):
    """The class token's attention is one more alpha."""
    network = usage.build_network("deit_tiny", 3).eval()
    labels = random_labels(2, 3)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected, attention = network(images, return_attention=True)
        s, alpha = usage.activations_and_alpha(network, images, 1.0, attention=True)
        plain, of_a_temperature = usage.activations_and_alpha(network, images, 0.5)
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(
        of_a_temperature, usage.spatial_activation_distribution(plain, 0.5))
    assert s.shape == (2, 3, 3, 4)
    assert alpha.shape == (2, 1, 3, 4)
    assert attention.shape == (2, 12, 13, 13)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 12, 13))    # rows attend to columns
    for b in range(2):
        rows = [[block[0, 1 + i].item() for i in range(12)] for block in attention[b]]
        mean = np.mean(rows, 0)                                 # of the class token's, over blocks
        np.testing.assert_allclose(alpha[b, 0].flatten(), mean / mean.sum(), rtol=1e-4)
    scores = (s * alpha).sum((2, 3))
    torch.testing.assert_close(
        usage.generation_loss(s, alpha, labels), F.multilabel_soft_margin_loss(scores, labels))


# ---- Sec. 4.2 ------------------------------------------------------------------------------------


def three_step_consistency_loss(s, s_teacher, labels, temperature, teacher_temperature):
    """L_REG in three steps: the unit, the two distributions, their divergence."""
    unit = s_teacher.detach().float().std((2, 3), correction=0, keepdim=True).clamp_min(1)
    log_beta = torch.log_softmax((s / unit).float().flatten(2) / temperature, -1)
    target = torch.softmax((s_teacher / unit).float().flatten(2) / teacher_temperature, -1)
    log_beta = log_beta.view(s.shape)
    target = target.detach().view(s.shape)
    divergence = F.kl_div(log_beta, target, reduction="none").sum((2, 3))
    present = labels.float()
    return (divergence * present).sum() / present.sum().clamp_min(1)


def test_consistency_loss_equals_the_slow_loop():
    """Maps of small, medium and large deviation: the unit of the first is 1."""
    scale = torch.tensor([0.1, 1.5, 3.0, 40.0])[:, None, None]
    student = torch.randn(3, 4, 5, 6) * scale
    teacher = torch.randn(3, 4, 5, 6) * scale + 5
    labels = random_labels()
    pairs = []
    for b, c in np.ndindex(3, 4):
        if labels[b, c] == 0:
            continue
        s, s_teacher = (maps[b, c].flatten().tolist() for maps in (student, teacher))
        mean = sum(s_teacher) / 30
        deviation = math.sqrt(sum((value - mean) ** 2 for value in s_teacher) / 30)
        unit = max(1.0, deviation)
        assert (unit == 1) == (c == 0)
        beta = slow_softmax([value / unit for value in s], 2.0)
        target = slow_softmax([value / unit for value in s_teacher], 0.7)
        pairs.append(sum(t * (math.log(t) - math.log(b)) for t, b in zip(target, beta)))
    loss = usage.consistency_loss(student, teacher, labels, 2.0, 0.7)
    assert loss.item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    as_bool = usage.consistency_loss(student, teacher, labels.bool(), 2.0, 0.7)
    assert torch.equal(as_bool, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, 3, 30, 300, 3000])
def test_consistency_loss_is_bit_equal_to_its_three_steps(scale, dtype):
    s = (torch.randn(3, 4, 9, 11) * scale).to(dtype).requires_grad_()
    s_teacher = (torch.randn(3, 4, 9, 11) * scale).to(dtype)
    labels = random_labels()
    for temperatures in ((1.0, 0.7), (1.0, 1.0), (2.0, 0.4)):
        results = []
        for loss_of in (usage.consistency_loss, three_step_consistency_loss):
            loss = loss_of(s, s_teacher, labels, *temperatures)
            results.append((loss, *torch.autograd.grad(loss, s)))
        (ours, our_gradient), (theirs, their_gradient) = results
        assert ours.dtype == torch.float32
        assert our_gradient.dtype == dtype
        assert our_gradient.abs().sum() > 0
        assert torch.equal(ours, theirs)
        assert torch.equal(our_gradient, their_gradient)


@pytest.mark.parametrize("teacher_temperature", [1e-3, 1.0])
def test_consistency_loss_where_the_student_underflows(teacher_temperature):
    """Activations thousands of units apart: value and gradient are those of float64."""
    s = (torch.randn(2, 3, 4, 4) * 3000).requires_grad_()
    s_teacher = torch.randn(2, 3, 4, 4)
    loss = usage.consistency_loss(s, s_teacher, torch.ones(2, 3), 1.0, teacher_temperature)
    exact = s.detach().double().requires_grad_()
    unit = s_teacher.double().std((2, 3), correction=0, keepdim=True).clamp_min(1)
    log_beta = (exact / unit).flatten(2).log_softmax(-1)
    target = (s_teacher.double() / unit / teacher_temperature).flatten(2).softmax(-1)
    expected = (torch.xlogy(target, target) - target * log_beta).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss > 1000
    gradient, = torch.autograd.grad(loss, s)
    exact_gradient, = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient, exact_gradient.float())
    assert gradient.abs().max() > 0.1


def test_consistency_loss_at_its_edges():
    s, s_teacher = torch.randn(2, 2, 3, 4, 4).unbind()
    s.requires_grad_()
    s_teacher.requires_grad_()
    everything = torch.ones(2, 3)
    loss = usage.consistency_loss(s, s_teacher, everything, 0.5, 0.5)
    loss.backward()
    assert loss > 0
    assert s_teacher.grad is None
    assert s.grad.abs().sum() > 0

    s.grad = None
    nothing = usage.consistency_loss(s, s_teacher, torch.zeros(2, 3), 0.5, 0.5)
    nothing.backward()
    assert nothing == 0
    assert (s.grad == 0).all()

    one_position = torch.randn(2, 3, 1, 1, requires_grad=True)  # has no deviation
    loss = usage.consistency_loss(one_position, torch.randn(2, 3, 1, 1), everything, 0.5, 0.5)
    loss.backward()
    assert loss == 0
    assert (one_position.grad == 0).all()


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0, 1000.0])
def test_consistency_loss_is_a_divergence(scale):
    """It is 0 for equal distributions, and otherwise above 0, up to float32's rounding."""
    for _ in range(20):
        s, s_teacher = (scale * torch.randn(2, 2, 3, 6, 6)).unbind()
        everything = torch.ones(2, 3)
        equal = usage.consistency_loss(s, s, everything, 0.7, 0.7)
        assert equal.item() == pytest.approx(0, abs=1e-6)
        for temperatures in ((0.5, 0.5), (2.0, 0.4), (0.4, 2.0)):
            loss = usage.consistency_loss(s, s_teacher, everything, *temperatures)
            assert loss > -1e-6
            assert scale < 1 or loss > 0.01


@pytest.mark.parametrize("wrong", [0, 0.0, -1.0, -math.inf, math.nan])
def test_consistency_loss_refuses_other_temperatures(wrong):
    s = torch.randn(1, 1, 2, 2)
    for temperatures in ((wrong, 1.0), (1.0, wrong), (wrong, wrong)):
        with pytest.raises(ValueError, match="temperatures must be > 0"):
            usage.consistency_loss(s, s, torch.ones(1, 1), *temperatures)


def test_chance_loss_is_what_class_frequencies_reach():
    labels = (torch.rand(40, 5) < torch.tensor([0.03, 0.1, 0.5, 0.9, 0.3])).float()
    labels[0] = 0
    labels[1] = 1
    expected = 0.0
    for c in range(5):
        f = labels[:, c].tolist().count(1.0) / 40
        expected -= (f * math.log(f) + (1 - f) * math.log(1 - f)) / 5
    chance = usage.chance_loss(labels)
    assert isinstance(chance, float)
    assert chance == pytest.approx(expected)
    # A classifier that looks at no image, and knows the frequencies.
    constant = torch.logit(labels.mean(0)).expand(40, 5)[:, :, None, None]
    frequencies_alone = usage.generation_loss(constant, torch.ones(40, 5, 1, 1), labels).item()
    assert frequencies_alone == pytest.approx(chance)
    assert usage.learning_status(frequencies_alone, chance) == pytest.approx(0, abs=1e-5)
    everywhere_and_nowhere = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert usage.chance_loss(everywhere_and_nowhere) == pytest.approx(math.log(2) / 3)
    assert usage.chance_loss(everywhere_and_nowhere[:, :2]) == 0


def test_learning_status_rises_from_0_to_1():
    assert usage.learning_status(0.4, 0.4) == usage.learning_status(5.0, 0.4) == 0
    assert usage.learning_status(0.0, 0.4) == 1
    assert usage.learning_status(0.1, 0.4) == pytest.approx(0.75)
    assert usage.learning_status(0.3, math.inf) == 1
    for wrong in ((math.nan, 0.4), (-1.0, 0.4), (0.3, 0.0), (0.3, math.nan), (0.3, -0.4)):
        with pytest.raises(ValueError, match="running_loss must be >= 0 and chance > 0"):
            usage.learning_status(*wrong)


class DropPath(nn.Module):
    """Stands in for timm's, which calls its rate drop_prob."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob


class Wrapped(nn.Module):
    """Stands in for DistributedDataParallel, which needs several processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Branched(nn.Module):
    """Branches of both kinds with rates of their own, and a dropout on the features."""

    def __init__(self):
        super().__init__()
        self.first = DropPath(0.1)
        self.inner = nn.Sequential(torchvision.ops.StochasticDepth(0.2, "row"), DropPath(0.9))
        self.dropout = nn.Dropout(0.7)
        self.last = torchvision.ops.StochasticDepth(0.3, "row")
        self.other = nn.Dropout(0.25)                           # nobody's business

    def rates(self):
        branches = [self.first.drop_prob, self.inner[0].p, self.inner[1].drop_prob, self.last.p]
        return [*branches, self.dropout.p]


@pytest.mark.parametrize("backbone", usage.BACKBONES)
def test_build_network_and_set_adjustment_of_every_backbone(backbone):
    network = usage.build_network(backbone, 3)
    assert network.training
    assert network.eval()(torch.randn(1, 3, 50, 81)).shape == (1, 3, 4, 6)
    branches = [module for module in network.modules()
                if isinstance(module, torchvision.ops.StochasticDepth)]
    assert {branch.p for branch in branches} == {network.dropout.p} == {0.0}
    blocks = {"mobilenet_v2": 10, "resnet18": 8, "resnet50": 16, "resnet101": 33}.get(backbone, 24)
    assert usage.set_adjustment(network, 0.4) == len(branches) == blocks
    expected = [0.4 * k / blocks for k in range(1, blocks + 1)]
    assert [branch.p for branch in branches] == pytest.approx(expected)
    assert network.dropout.p == 0.4


@pytest.mark.parametrize("wrappers", [
    [], [Wrapped], [Wrapped, Wrapped], [nn.DataParallel], [torch.optim.swa_utils.AveragedModel],
    [torch.optim.swa_utils.AveragedModel, Wrapped]])
def test_set_adjustment_overwrites_rates_in_wrapped_networks(wrappers):
    wrapped = Branched()
    for wrapper in wrappers:
        wrapped = wrapper(wrapped)
    network = next(module for module in wrapped.modules() if isinstance(module, Branched))
    assert usage.set_adjustment(wrapped, 0.4) == 4
    assert network.rates() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert network.other.p == 0.25
    assert usage.set_adjustment(wrapped, 1) == 4
    assert network.rates() == [0.25, 0.5, 0.75, 1, 1]
    assert usage.set_adjustment(wrapped, 0) == 4
    assert network.rates() == [0, 0, 0, 0, 0]


def test_set_adjustment_without_any_branch_says_so():
    network = nn.Sequential()
    network.dropout = nn.Dropout()
    assert usage.set_adjustment(network, 0.3) == 0
    assert network.dropout.p == 0.3


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.inf, math.nan])
def test_set_adjustment_refuses_other_rates(rate):
    network = Branched()
    before = network.rates()
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
        usage.set_adjustment(network, rate)
    assert network.rates() == before


def test_set_adjustment_says_what_to_add():
    transformer = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    assert isinstance(transformer.dropout, float)
    without = Branched()
    del without.dropout
    networks = (torchvision.models.resnet18(), transformer, without)
    for network in (*networks, *map(Wrapped, networks)):
        name = type(getattr(network, "module", network)).__name__
        line = f"{name} has no nn.Dropout named dropout: add self.dropout = nn.Dropout(0.0)"
        with pytest.raises(ValueError, match=re.escape(line)) as error:
            usage.set_adjustment(network, 0.5)
        assert "\n" not in str(error.value)
    assert without.first.drop_prob == 0.1                       # nothing was set
    assert without.last.p == 0.3


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "resnet50", "deit_tiny"])
def test_set_adjustment_to_0_gives_the_plain_network(backbone, in_float32):
    # With BatchNorm fixed, training mode must not matter.
    network = usage.build_network(backbone, 3, frozen=True)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        usage.set_adjustment(network, 0.5)
        assert not torch.equal(network(images), network(images))
        usage.set_adjustment(network, 0.0)
        adjusted = network(images)
        usage.set_adjustment(network, 0.5)
        torch.testing.assert_close(network.eval()(images), adjusted, rtol=0, atol=0)


def test_ema_teacher_is_the_moving_average_of_weights_and_buffers():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = usage.ema_teacher(student, 0.9)
    expected = None
    for step in range(4):
        with torch.no_grad():
            student[0].weight += torch.randn(3, 3)
        student(torch.randn(8, 3))
        teacher.module[1].num_batches_tracked.fill_(1000)       # as if it had seen other batches
        teacher.update_parameters(student)
        now = [*student.parameters(), student[1].running_mean, student[1].running_var]
        now = torch.cat([tensor.detach().flatten() for tensor in now])
        expected = now if step == 0 else 0.9 * expected + 0.1 * now
        assert student[1].num_batches_tracked == step + 1
        assert teacher.module[1].num_batches_tracked == step + 1        # copied
    average = teacher.module
    got = [*average.parameters(), average[1].running_mean, average[1].running_var]
    torch.testing.assert_close(torch.cat([tensor.detach().flatten() for tensor in got]), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_ema_teacher_drops_although_the_student_was_in_eval_mode(frozen, in_float32):
    student = usage.build_network("resnet18", 3, frozen=frozen).eval()
    teacher = usage.ema_teacher(student, 0.9)
    assert not student.training
    assert teacher.training
    assert teacher.module.training
    assert all(module.training is not frozen for module in teacher.modules()
               if isinstance(module, nn.BatchNorm2d))
    assert usage.set_adjustment(teacher, 0.5) == 8
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(teacher(images), teacher(images))
        usage.set_adjustment(teacher, 0)
        assert torch.equal(teacher(images), teacher(images))
    assert student.dropout.p == 0                               # the student's is another one


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_ema_teacher_refuses_other_decays(decay):
    with pytest.raises(ValueError, match="decay"):
        usage.ema_teacher(nn.Linear(2, 2), decay)


def test_ema_teacher_updates_in_few_operations():
    """Not one by one: on a GPU, 53 counters of BatchNorm would take a tenth of a step."""
    student = usage.build_network("resnet50", 3)
    teacher = usage.ema_teacher(student, 0.9)
    teacher.update_parameters(student)                          # the first one copies
    assert count_operations(teacher.update_parameters, student) <= 20


# ---- Functions stand alone -----------------------------------------------------------------------


def functions_above(banner):
    """The names of usage.py's functions above a banner, in the order of the file."""
    functions = [function for _, function in inspect.getmembers(usage, inspect.isfunction)
                 if function.__module__ == "usage"]
    lines = {inspect.getsourcelines(function)[1]: function.__name__ for function in functions}
    end = inspect.getsource(usage).split(f"\n# ==== {banner}")[0].count("\n")
    return [lines[line] for line in sorted(lines) if line < end]


PAPER = functions_above("2. Seeds and pseudo masks")
ALONE = functions_above("3. The networks")


def test_the_paper_comes_first_in_its_order():
    contents = usage.__doc__.split("1. The paper")[1].split("2. Seeds")[0]
    assert PAPER == re.findall(r"[a-z]+(?:_[a-z]+)+", contents)
    assert len(PAPER) == 8


@pytest.mark.parametrize("name", ALONE)
def test_functions_of_the_paper_stand_alone(name):
    """Each, pasted below `import torch` and `import torch.nn.functional as F`, gives the same."""
    alone = {"torch": torch, "F": F}
    exec(inspect.getsource(getattr(usage, name)), alone)
    s = torch.randn(2, 3, 4, 4)
    alpha = torch.softmax(torch.randn(2, 3, 16), -1).view(2, 3, 4, 4)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    affinity = alpha[:, 0].flatten(1)[:, None].expand(2, 16, 16)
    arguments = {
        "spatial_activation_distribution": (s, 0.7),
        "class_scores": (s, alpha),
        "generation_loss": (s, alpha, labels),
        "consistency_loss": (s, 3 * s.flip(0), labels, 2.0, 0.4),
        "chance_loss": (labels,),
        "learning_status": (0.3, 0.4),
        "set_adjustment": (Branched(), 0.3),
        "ema_teacher": (nn.BatchNorm1d(2), 0.9),
        "seed_maps": ([s, s], (9, 9)),
        "spread_activations": (s, affinity),
        "label_map": (alpha, 0.05),
        "refine_maps": (s, alpha, 0.1),
    }
    assert list(arguments) == ALONE
    here = getattr(usage, name)(*arguments[name])
    there = alone[name](*arguments[name])
    if name == "ema_teacher":
        for teacher in (here, there):
            for _ in range(2):
                teacher.update_parameters(nn.BatchNorm1d(2))
        here = dict(here.state_dict())
        there = dict(there.state_dict())
    torch.testing.assert_close(here, there)


# ---- Seeds ---------------------------------------------------------------------------------------


def slow_enlarged(plane, size):
    """Bilinear, the outermost values half a cell inside the border (align_corners=False)."""
    h, w = plane.shape
    result = torch.zeros(size)
    for i, j in np.ndindex(*size):
        y = max(0, (i + 0.5) * h / size[0] - 0.5)
        x = max(0, (j + 0.5) * w / size[1] - 0.5)
        for m in (int(y), int(y) + 1):
            for n in (int(x), int(x) + 1):
                weight = (1 - abs(y - m)) * (1 - abs(x - n))
                result[i, j] += weight * plane[min(m, h - 1), min(n, w - 1)]
    return result


def test_seed_maps_equal_the_slow_loop():
    views = [torch.randn(2, 3, 3, 4), torch.randn(2, 3, 6, 7).bfloat16()]
    views[0][1, 2] = -1                                         # a class that is positive nowhere
    views[1][1, 2] = -2
    maps = usage.seed_maps(views, (12, 16))
    assert maps.dtype == torch.float32
    assert maps.shape == (2, 3, 12, 16)
    for b, c in np.ndindex(2, 3):
        total = sum(slow_enlarged(view[b, c].float().clamp(min=0), (12, 16)) for view in views)
        expected = total / total.max() if total.max() > 0 else total
        torch.testing.assert_close(maps[b, c], expected)
    assert (maps[1, 2] == 0).all()


def test_spread_activations_equal_the_slow_loop():
    s = torch.randn(2, 3, 2, 4)
    affinity = torch.rand(2, 8, 8)
    spread = usage.spread_activations(s, affinity)
    assert spread.shape == s.shape
    for b, c, i in np.ndindex(2, 3, 8):
        received = [affinity[b, i, j].item() * max(0.0, s[b, c].flatten()[j].item())
                    for j in range(8)]
        assert spread[b, c].flatten()[i].item() == pytest.approx(sum(received), abs=1e-5)


def test_label_map_equals_the_slow_loop():
    maps = torch.rand(2, 3, 5, 5)
    maps[0, :, 0, 0] = 0.5                                      # not above the threshold
    maps[0, :, 0, 1] = 0.75                                     # a tie: the first class wins
    labels = usage.label_map(maps, 0.5)
    assert labels.dtype == torch.int64
    for b, i, j in np.ndindex(2, 5, 5):
        pixel = maps[b, :, i, j].tolist()
        assert labels[b, i, j] == (pixel.index(max(pixel)) + 1 if max(pixel) > 0.5 else 0)
    numbers = torch.tensor([7, 0, 3])
    expected = torch.cat([torch.zeros(1, dtype=torch.int64), numbers + 1])[labels]
    assert torch.equal(usage.label_map(maps, 0.5, numbers), expected)
    nothing = usage.label_map(maps[:, :0], 0.5, numbers[:0])
    assert torch.equal(nothing, torch.zeros(2, 5, 5, dtype=torch.int64))


def slow_moves(x, p, dilations, iterations):
    """p[i] <- sum_j a[i,j] * p[j], pixel by pixel: x (3, h, w), p (K, h, w)."""
    h, w = p.shape[1:]
    x = x.double().numpy()
    p = p.double().numpy()
    steps = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)
             if (dy, dx) != (0, 0)]
    rows = {}
    columns = {}
    affinity = {}
    for i, j in np.ndindex(h, w):
        rows[i, j] = [min(max(i + dy, 0), h - 1) for dy, dx in steps]
        columns[i, j] = [min(max(j + dx, 0), w - 1) for dy, dx in steps]
        colours = x[:, rows[i, j], columns[i, j]]                           # (3, neighbours)
        sigma = colours.std(1, ddof=1, keepdims=True)
        distance = np.abs(colours - x[:, i, j, None]) / (0.1 * sigma)
        weights = np.exp(-distance.mean(0))
        affinity[i, j] = weights / weights.sum()
    for _ in range(iterations):
        moved = np.zeros_like(p)
        for i, j in np.ndindex(h, w):
            moved[:, i, j] = p[:, rows[i, j], columns[i, j]] @ affinity[i, j]
        p = moved
    return torch.from_numpy(p).float()


@pytest.mark.parametrize("dilations", [(1,), (1, 2), (2, 1, 3), (1, 2, 3, 5), (1, 2, 4, 8, 12, 24)])
def test_refine_maps_equals_the_slow_loop(dilations):
    images = torch.rand(2, 3, 6, 7)
    maps = torch.rand(2, 2, 6, 7)
    refined = usage.refine_maps(images, maps, 0.4, dilations=dilations, iterations=3)
    assert refined.dtype == torch.float32
    for b in range(2):
        p = slow_moves(images[b], torch.sigmoid((maps[b] - 0.4) / 0.1), dilations, 3)
        expected = (0.4 + 0.1 * torch.logit(p)).clamp(0, 1)
        torch.testing.assert_close(refined[b], expected, rtol=1e-3, atol=1e-4)


def test_refine_maps_of_a_large_image_works_on_160_pixels():
    """The longer side has 320 pixels, and the shorter one 3, of which 2 are left."""
    images = torch.rand(1, 3, 3, 320)
    maps = F.interpolate(torch.rand(1, 2, 1, 20), (3, 320), mode="bilinear", align_corners=False)
    p = F.interpolate(torch.sigmoid((maps - 0.4) / 0.1), (2, 160), mode="bilinear")
    x = F.interpolate(images, (2, 160), mode="bilinear", antialias=True)
    p = slow_moves(x[0], p[0], (1, 2), 3)[None]
    p = F.interpolate(p, (3, 320), mode="bilinear")
    expected = (0.4 + 0.1 * torch.logit(p)).clamp(0, 1)
    refined = usage.refine_maps(images, maps, 0.4, dilations=(1, 2), iterations=3)
    torch.testing.assert_close(refined, expected, rtol=1e-3, atol=1e-4)


def test_refine_maps_follows_an_edge():
    image = torch.zeros(1, 3, 40, 200)
    image[..., 100:] = 1
    maps = torch.linspace(0, 1, 200).expand(1, 1, 40, 200)      # exceeds 0.4 from column 80 on
    refined = usage.refine_maps(image + 0.01 * torch.rand(1, 3, 40, 200), maps, 0.4)
    assert refined.shape == maps.shape
    assert refined[..., :97].max() < refined[..., 103:].min()


@pytest.mark.parametrize("value", [0.0, 0.3, 0.4, 1.0])
@pytest.mark.parametrize("image", [torch.rand(1, 3, 20, 20), torch.zeros(1, 3, 20, 20)],
                         ids=["noise", "black"])
def test_refine_maps_keeps_constant_maps(image, value):
    maps = torch.full((1, 2, 20, 20), value, requires_grad=True)
    refined = usage.refine_maps(image, maps, 0.4)
    assert not refined.requires_grad
    # A level of 8 bits is 4e-3; far from the threshold, p is rounded near to 0 or 1.
    tolerance = 1e-5 if value == 0.3 else 5e-4
    torch.testing.assert_close(refined, maps.detach(), rtol=0, atol=tolerance)


def test_refine_maps_needs_few_operations():
    images = torch.rand(1, 3, 120, 160)
    maps = torch.rand(1, 2, 120, 160)
    assert count_operations(usage.refine_maps, images, maps, 0.4) <= 300


@pytest.mark.parametrize("backbone, side, affinity", [
    ("resnet18", 65, False), ("deit_tiny", 64, False), ("deit_tiny", 64, True)])
def test_multi_scale_activations_at_one_scale_are_the_plain_network(
        backbone, side, affinity, in_float32):
    network = usage.build_network(backbone, 3).eval()
    image = torch.randn(1, 3, side, side)

    def plain(image):
        if not affinity:
            return network(image)
        s, attention = network(image, return_attention=True)
        mean = sum(attention[:, k, 1:, 1:] for k in range(6, 12)) / 6       # of the last 6 blocks
        return usage.spread_activations(s, mean)

    with torch.no_grad():
        one, = usage.multi_scale_activations(network, image, side, [1.0], False, affinity)
        flipped = usage.multi_scale_activations(network, image, side, [1.0], True, affinity)
        assert len(flipped) == 2
        torch.testing.assert_close(one, plain(image))
        torch.testing.assert_close(flipped[0], plain(image))
        torch.testing.assert_close(flipped[1], plain(image.flip(-1)).flip(-1))


def test_multi_scale_activations_keep_the_shape_of_the_image(in_float32):
    network = usage.build_network("resnet18", 3).eval()
    image = torch.randn(1, 3, 30, 60)
    with torch.no_grad():
        views = usage.multi_scale_activations(network, image, 96, [0.5, 1.0, 2.0], True)
        assert [tuple(view.shape) for view in views] == [
            (1, 3, 3, 4), (1, 3, 3, 4), (1, 3, 4, 7), (1, 3, 4, 7), (1, 3, 7, 13), (1, 3, 7, 13)]
        enlarged = F.interpolate(image, (97, 193), mode="bilinear", antialias=True)
        torch.testing.assert_close(views[4], network(enlarged))


def test_uncertain_pixels_become_void(tmp_path):
    for folder in ("seeds", "pseudo_masks", "maps"):
        (tmp_path / folder).mkdir()
    levels = torch.tensor(
        [[[0, 90, 102, 130, 255]], [[10, 20, 110, 0, 0]]], dtype=torch.uint8)   # 102 is 0.4
    present = torch.tensor([1, 4])
    make_seeds.write_results(tmp_path, "a", (1, 5), present, levels, levels, 0.4)
    seed = usage.read_mask(tmp_path / "seeds/a.png", (1, 5), 5)
    assert seed.tolist() == [[0, 0, 5, 2, 2]]
    mask = usage.read_mask(tmp_path / "pseudo_masks/a.png", (1, 5), 5)
    assert mask.tolist() == [[0, 255, 255, 2, 2]]


# ---- The networks --------------------------------------------------------------------------------


def test_build_network_of_a_resnet_has_torchvisions_features():
    network = usage.build_network("resnet50", 3).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    state = {name.replace("bn3.0.", "bn3."): tensor
             for name, tensor in network.trunk.state_dict().items()}
    lacking = theirs.load_state_dict(state, strict=False)
    assert set(lacking.missing_keys) == {"fc.weight", "fc.bias"}
    assert not lacking.unexpected_keys
    body = nn.Sequential(*list(theirs.children())[:-2])
    images = torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        torch.testing.assert_close(network.trunk(images), body(images))


def test_build_network_of_a_transformer_has_torchvisions_features_at_224():
    network = usage.build_network("deit_tiny", 3).eval()
    trunk = network.trunk
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = torch.cat([trunk.class_token, trunk._process_input(images)], 1)
        expected = trunk.encoder(tokens)[:, 1:]
        torch.testing.assert_close(trunk(images).flatten(2).transpose(1, 2), expected)


def test_build_network_refuses_an_unknown_backbone():
    with pytest.raises(usage.InputError, match="unknown backbone 'vgg16': use one of mobilenet_v2"):
        usage.build_network("vgg16", 3)


def published_deit(width=192, blocks=12):
    """A random checkpoint with the names and shapes of deit_tiny_patch16_224."""
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
        "head.weight": (1000, width), "head.bias": (1000,)}
    weights = {
        "norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width),
        "attn.proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for k in range(blocks):
        for name, shape in weights.items():
            shapes[f"blocks.{k}.{name}.weight"] = shape
            shapes[f"blocks.{k}.{name}.bias"] = shape[:1]
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def slow_deit(state, images, heads=3):
    """DeiT's forward, by the names of its published code.

    -> features of the patches (B, 196, D) and attention (B, 12, 197, 197).
    """
    attentions = []
    x = F.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]

    def linear(y, name):
        return F.linear(y, state[name + ".weight"], state[name + ".bias"])

    def norm(y, name):
        weight = state[name + ".weight"]
        return F.layer_norm(y, y.shape[-1:], weight, state[name + ".bias"], eps=1e-6)

    for k in range(12):
        block = f"blocks.{k}."
        qkv = linear(norm(x, block + "norm1"), block + "attn.qkv").unflatten(-1, (3, heads, -1))
        q, key, v = qkv.permute(2, 0, 3, 1, 4)                  # each (B, heads, 1 + N, D / heads)
        attention = (q @ key.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        attentions.append(attention.mean(1))
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), block + "attn.proj")
        hidden = F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1"))
        x = x + linear(hidden, block + "mlp.fc2")
    return norm(x, "norm")[:, 1:], torch.stack(attentions, 1)


def test_build_network_from_a_deit_checkpoint_in_the_published_naming(tmp_path):
    state = published_deit()
    torch.save({"model": state}, tmp_path / "deit.pth")
    weights = train_cls.pretrained_weights("deit_tiny", tmp_path / "deit.pth")
    network = usage.build_network("deit_tiny", 5, weights).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features, attention = network.trunk(images, return_attention=True)
        their_features, their_attention = slow_deit(state, images)
        our_features = features.flatten(2).transpose(1, 2)
        torch.testing.assert_close(our_features, their_features, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(attention, their_attention, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(network.trunk(images), features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18"])
def test_build_network_from_a_torchvision_checkpoint(backbone, tmp_path):
    theirs = torchvision.models.get_model(backbone)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    state = train_cls.pretrained_weights(backbone, tmp_path / "weights.pth")
    network = usage.build_network(backbone, 5, state)
    first = next(parameter for name, parameter in theirs.named_parameters()
                 if name.endswith("weight"))
    torch.testing.assert_close(next(network.parameters()), first, rtol=0, atol=0)
    incomplete = dict(list(state.items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        usage.build_network(backbone, 5, incomplete)


def test_pretrained_weights_are_the_published_ones(monkeypatch):
    """What is downloaded, here made up, ends up in the network; without a network, one line."""
    deit = train_cls.DEIT_WEIGHTS.format(train_cls.DEIT_FILES["deit_tiny"])
    resnet = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    downloads = {
        deit: {"model": published_deit()}, resnet: torchvision.models.resnet18().state_dict()}

    def download(url, **_):
        if url not in downloads:
            raise OSError("no route to host")
        return downloads[url]

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    for backbone, name, expected in (
            ("deit_tiny", "class_token", downloads[deit]["model"]["cls_token"]),
            ("resnet18", "conv1.weight", downloads[resnet]["conv1.weight"])):
        state = train_cls.pretrained_weights(backbone, "imagenet")
        network = usage.build_network(backbone, 5, state)
        assert torch.equal(network.trunk.state_dict()[name], expected)
    downloads.clear()
    for backbone in ("resnet18", "deit_tiny"):
        with pytest.raises(usage.InputError, match="no route to host; pass --weights FILE"):
            train_cls.pretrained_weights(backbone, "imagenet")
    assert train_cls.pretrained_weights("resnet18", "none") is None


@pytest.mark.parametrize("name, reason", [
    ("text", "pass --weights"), ("nowhere", "No such file"), ("list", "not a list")])
def test_pretrained_weights_from_a_file_that_is_none(name, reason, tmp_path):
    (tmp_path / "text").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(usage.InputError, match=f"{name}: .*{reason}"):
        train_cls.pretrained_weights("resnet18", tmp_path / name)


# ---- The metrics ---------------------------------------------------------------------------------


def confusion_matrix(truth, predicted, num_classes):
    counts = evaluation.count_levels(truth, predicted, torch.full_like(truth, 255), num_classes)
    return evaluation.at_threshold(counts, 0)


def slow_rates(truth, predicted, c):
    """IoU, FPR and FNR of a class, pixel by pixel; None if it is in neither."""
    tp = fp = fn = 0
    for t, p in zip(truth.flatten().tolist(), predicted.flatten().tolist()):
        if t == usage.VOID:
            continue
        tp += t == c == p
        fp += p == c != t
        fn += t == c != p
    if tp + fp + fn == 0:
        return None
    return [count / (tp + fp + fn) for count in (tp, fp, fn)]


def test_metrics_equal_a_brute_force_count():
    truth = torch.randint(0, 4, (20, 30))
    predicted = torch.randint(0, 3, (20, 30))
    truth[:3] = usage.VOID
    rates = evaluation.metrics(confusion_matrix(truth, predicted, 4))
    for c in range(5):
        ours = [rates[key][c].item() for key in ("IoU", "FPR", "FNR")]
        expected = slow_rates(truth, predicted, c)
        if c == 4:                                              # in neither
            assert expected is None
            assert np.isnan(ours).all()
        else:
            assert ours == pytest.approx(expected)
            assert sum(ours) == pytest.approx(1)


def test_means_run_over_the_classes_of_the_truth_at_every_threshold():
    """Class 2 is predicted but nowhere true; class 4 is true but never predicted."""
    truth = torch.tensor([0, 1, 3, 4, usage.VOID])[torch.randint(0, 5, (20, 30))]
    labels = torch.randint(1, 4, (20, 30))
    levels = torch.randint(0, 200, (20, 30))
    counts = evaluation.count_levels(truth, labels, levels, 4)
    for threshold in (0.0, 0.3, 0.5, 0.9):                      # at 0.9 all is background
        predicted = torch.where(levels / 255 > threshold, labels, 0)
        rates = [slow_rates(truth, predicted, c) for c in (0, 1, 3, 4)]
        means = evaluation.means(evaluation.at_threshold(counts, threshold))
        ours = [means[key] for key in ("mIoU", "FPR", "FNR")]
        assert ours == pytest.approx(np.mean(rates, 0).tolist())
        valid = truth != usage.VOID
        area = (predicted[valid] > 0).sum() / (truth[valid] > 0).sum()
        assert means["area"] == pytest.approx(area.item())
    only_background = (truth == 0).sum() / valid.sum() / 4      # three of the four classes have 0
    assert means["mIoU"] == pytest.approx(only_background.item())
    assert means["area"] == 0


def test_means_of_nothing_are_none():
    nothing = torch.zeros(3, 3, dtype=torch.int64)
    assert set(evaluation.means(nothing).values()) == {None}
    only_background = nothing.clone()
    only_background[0, 0] = 5
    means = evaluation.means(only_background)
    assert means == {"mIoU": 1.0, "FPR": 0.0, "FNR": 0.0, "area": None}


def test_count_levels_equals_a_brute_force_count():
    truth = torch.randint(0, 4, (8, 9), dtype=torch.uint8)
    truth[0] = usage.VOID
    labels = torch.randint(0, 4, (8, 9))
    levels = torch.randint(0, 256, (8, 9), dtype=torch.uint8)
    levels[3] = 255
    counts = evaluation.count_levels(truth, labels, levels, 3)
    expected = torch.zeros(4, 4, 256, dtype=torch.int64)
    for i, j in np.ndindex(8, 9):
        if truth[i, j] != usage.VOID:
            expected[truth[i, j].item(), labels[i, j].item(), levels[i, j].item()] += 1
    assert torch.equal(counts, expected)


def test_count_levels_is_enough_for_every_threshold():
    """The sweep over thresholds gives what label maps of each threshold would give."""
    expected = torch.zeros(101, 4, 4, dtype=torch.int64)
    counts = 0
    for classes in ([0, 2], [1], []):
        truth = torch.randint(0, 4, (8, 9), dtype=torch.uint8)
        truth[0] = usage.VOID
        levels = torch.randint(0, 256, (len(classes), 8, 9), dtype=torch.uint8)
        maps = torch.zeros(1, 3, 8, 9)
        maps[0, classes] = levels / 255
        for k, threshold in enumerate(torch.arange(101) / 100):
            predicted = usage.label_map(maps, threshold.item())[0]
            expected[k] += confusion_matrix(truth, predicted, 3)
        numbers = torch.tensor(classes, dtype=torch.int64)
        labels = usage.label_map(levels[None], 0, numbers)[0]
        strongest = F.pad(levels, (0, 0, 0, 0, 1, 0)).amax(0)
        counts = counts + evaluation.count_levels(truth, labels, strongest, 3)
    assert len(evaluation.THRESHOLDS) == 101
    for k, threshold in enumerate(evaluation.THRESHOLDS):
        assert torch.equal(evaluation.at_threshold(counts, threshold), expected[k])


@pytest.mark.parametrize("values", [5, 10**6], ids=["ties", "distinct"])
def test_mean_average_precision_equals_a_brute_force_count(values):
    scores = torch.randint(0, values, (30, 4)).float()
    labels = (torch.rand(30, 4) < 0.3).float()
    labels[:, 3] = 0                                            # without an image: does not count
    averages = []
    for c in range(3):
        rows = list(zip(scores[:, c].tolist(), labels[:, c].tolist()))
        precisions = []
        for own, has in rows:
            if has:
                shown = [label for score, label in rows if score >= own]
                precisions.append(sum(shown) / len(shown))
        averages.append(sum(precisions) / len(precisions))
    ours = train_cls.mean_average_precision(scores, labels)
    assert ours == pytest.approx(sum(averages) / 3)


def test_mean_average_precision_of_a_constant_is_the_share_of_images():
    scores = torch.tensor([0.3, -2.0, 0.0, 5.0]).repeat(100, 1)
    labels = torch.zeros(100, 4)
    labels[:25] = 1
    for ordered in (labels, labels.flip(0)):                    # in whatever order the images come
        assert train_cls.mean_average_precision(scores, ordered) == pytest.approx(0.25)
    assert train_cls.mean_average_precision(labels, labels) == 1
    assert math.isnan(train_cls.mean_average_precision(scores, torch.zeros(100, 4)))


@pytest.mark.parametrize("low, high", [(-3, 3), (17, 18), (-18, -17)])
def test_score_threshold_predicts_as_many_classes_as_the_labels_have(low, high):
    """Also where all probabilities are 1 or 0 in float32."""
    scores = (low + (high - low) * torch.randperm(120) / 120).view(30, 4)
    assert len(scores.unique()) == 120
    for share in (0.0, 0.01, 0.3, 0.9):
        labels = (torch.rand(30, 4) < share).float()
        threshold = train_cls.score_threshold(scores, labels)
        assert isinstance(threshold, float)
        assert (scores > threshold).sum() == labels.sum()


# ---- The data ------------------------------------------------------------------------------------


def digest(folder):
    """{path: contents} of all files but logs, which hold speeds, and locks, which are empty.

    Of checkpoints, which are large, it is the time when they were written.
    """
    contents = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".jsonl" or path.name == ".lock":
            continue
        if path.suffix == ".pt":
            contents[path.relative_to(folder)] = path.stat().st_mtime_ns
        else:
            contents[path.relative_to(folder)] = path.read_bytes()
    return contents


def true_mask(path):
    """A true mask of the toy or of what is made of it, as (48, 48) integers."""
    return usage.read_mask(path, (48, 48), 5).long()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Twelve small toy scenes."""
    root = tmp_path_factory.mktemp("data") / "mini"
    return train_cls.draw_toy(root, train=8, val=4, side=48)


def test_draw_toy_draws_the_same_every_time(toy, tmp_path):
    assert digest(train_cls.draw_toy(tmp_path / "again", train=8, val=4, side=48)) == digest(toy)
    data = train_cls.read_voc(toy)
    for split in ("train", "val"):
        for name, (_, labels) in data[split].items():
            values = true_mask(toy / f"SegmentationClass/{name}.png").unique().tolist()
            assert {data["classes"].index(label) + 1 for label in labels} == set(values) - {0}
    before = digest(toy)
    assert train_cls.draw_toy(toy) == toy
    assert digest(toy) == before                                # what is there stays


def in_processes(function, count, *arguments):
    """Call a function in several forked processes at once; their exit codes."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=function, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_draw_toy_in_three_processes_at_once(toy, tmp_path):
    assert in_processes(train_cls.draw_toy, 3, tmp_path / "data/toy", 8, 4, 48) == [0, 0, 0]
    expected = {Path("data/toy") / path: content for path, content in digest(toy).items()}
    assert digest(tmp_path) == expected


def test_read_voc_takes_vocs_own_annotations_and_folders(toy, tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    shutil.copytree(toy, root)
    (root / "labels.json").unlink()
    (root / "classes.txt").unlink()
    (root / "Annotations").mkdir()
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("train_0000\n")
    (root / "Annotations/train_0000.xml").write_text(
        "<annotation><object><name>dog</name><part><name>head</name></part></object>"
        "<object><name>person</name></object><object><name>dog</name></object></annotation>")
    data = train_cls.read_voc(tmp_path)                         # the folder --download was given
    image = "VOCdevkit/VOC2012/JPEGImages/train_0000.jpg"
    assert data["train"] == {"train_0000": [image, ["dog", "person"]]}
    assert data["classes"] == usage.VOC_CLASSES
    assert data["masks"]["val"] == "VOCdevkit/VOC2012/SegmentationClass"
    assert [names for _, names in data["val"].values()] == 4 * [None]
    with (root / "ImageSets/Segmentation/train_aug.txt").open("a") as file:
        file.write("train_0001\n")
    with pytest.raises(usage.InputError, match="image train_0001: has no labels"):
        train_cls.read_voc(tmp_path)


def test_read_voc_takes_texts_of_every_editor(toy, tmp_path):
    """A byte order mark, Windows' line ends, empty lines, names with blanks and umlauts."""
    root = shutil.copytree(toy, tmp_path / "data")
    (root / "JPEGImages/train_0000.jpg").rename(root / "JPEGImages/my cät.JPG")
    lines = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    names = ["big cat", "Käse", "x y z", "d", "e"]
    labels = dict.fromkeys(lines, ["d"]) | {"my cät": ["Käse", "big cat"]}
    texts = {
        "classes.txt": [*names[:2], "", *names[2:], " "],
        "ImageSets/Segmentation/train.txt": ["", "my cät ", *lines[1:], ""],
        "labels.json": [json.dumps(labels)],
    }
    for path, text in texts.items():
        (root / path).write_bytes("\r\n".join(text).encode("utf-8-sig"))
    data = train_cls.read_voc(root)
    assert data["classes"] == names
    assert list(data["train"]) == ["my cät", *lines[1:]]
    assert data["train"]["my cät"] == ["JPEGImages/my cät.JPG", ["Käse", "big cat"]]
    settings = {"photographs": {"train": usage.sizes_of(
        [root / image for image, _ in data["train"].values()])}}
    ids, images, labels = usage.read_split(data, "train", settings, root)
    assert ids == list(data["train"])
    assert labels[0].tolist() == [1, 1, 0, 0, 0]
    image, target = usage.Photographs(images, labels, 5, lambda *pair: pair)[0]
    assert image.size == (48, 48)
    assert target.tolist() == [1, 1, 0, 0, 0]


def test_prepare_data_downloads_voc_as_a_whole_or_not_at_all(toy, tmp_path, monkeypatch):
    """torchvision's download, stood in for by one that copies the toy where VOC would lie."""
    def broken_off(root, year, image_set, download):
        Path(root, "VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True)
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", broken_off)
    with pytest.raises(usage.InputError, match="no route to host; .*by hand"):
        train_cls.prepare_data(tmp_path, True)
    assert not (tmp_path / "VOCdevkit").exists()

    def download(root, year, image_set, download):
        assert (year, download) == ("2012", True)
        shutil.copytree(toy, Path(root, "VOCdevkit/VOC2012"), dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", download)
    assert len(train_cls.prepare_data(tmp_path, True)["val"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"]


def draw_coco(root, toy):
    """A small COCO from the toy scenes: each critter is an object, as polygons or as runs."""
    data = train_cls.read_voc(toy)
    categories = [7, 1, 90, 13, 44]                             # with gaps, out of order, as COCO's
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2014").mkdir()
        images = []
        annotations = []
        for number, (name, (image, labels)) in enumerate(data[split].items(), start=1):
            file = f"COCO_{name}.jpg"
            shutil.copy(toy / image, root / f"{split}2014/{file}")
            images.append({"id": number, "file_name": file, "height": 48, "width": 48})
            mask = true_mask(toy / f"SegmentationClass/{name}.png").numpy()
            for label, kind in zip(labels, 2 * ("runs", "boxes")):
                c = data["classes"].index(label)
                inside = mask == c + 1
                outline = {"size": [48, 48], "counts": slow_runs(inside)}
                if kind == "boxes":
                    outline = [[x, y, x + 1, y, x + 1, y + 1, x, y + 1]
                               for y, x in np.argwhere(inside).tolist()]
                annotations.append({
                    "id": len(annotations), "image_id": number, "category_id": categories[c],
                    "iscrowd": 0, "area": int(inside.sum()), "segmentation": outline})
        images.append({"id": 99, "file_name": "COCO_empty.jpg", "height": 48, "width": 48})
        Image.new("RGB", (48, 48)).save(root / f"{split}2014/COCO_empty.jpg")
        named = [{"id": number, "name": name}
                 for number, name in zip(categories, data["classes"])]
        table = {
            "info": {}, "images": images, "annotations": annotations, "categories": named}
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(table))
    return root


def slow_runs(mask):
    """Run lengths down the columns, background first."""
    runs = [0]
    value = False
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def test_read_coco_and_find_truth_give_back_what_coco_was_made_of(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)
    voc = train_cls.read_voc(toy)
    before = digest(root)
    coco = train_cls.prepare_data(root, False)
    assert digest(root) == before                               # it is read as it was downloaded
    order = (1, 0, 3, 4, 2)                                     # category ids 1, 7, 13, 44, 90
    assert coco["classes"] == [voc["classes"][k] for k in order]
    assert len(coco["train"]) == 8
    assert len(coco["val"]) == 5                                # the empty image only to evaluate
    as_coco = torch.tensor([0, 2, 1, 5, 3, 4])                  # VOC's label -> COCO's
    for split in ("train", "val"):
        truth = evaluation.find_truth(coco, split, root)
        assert list(truth) == list(coco[split])
        for name, (_, labels) in voc[split].items():
            expected = as_coco[true_mask(toy / f"SegmentationClass/{name}.png")]
            assert torch.equal(true_mask(truth[f"COCO_{name}"]), expected)
            image, found = coco[split][f"COCO_{name}"]
            assert image == f"{split}2014/COCO_{name}.jpg"
            assert found == sorted(labels)
    assert coco["val"]["COCO_empty"][1] == []
    assert (true_mask(truth["COCO_empty"]) == 0).all()
    with pytest.raises(usage.InputError, match="48x48"):
        usage.read_mask(truth["COCO_empty"], (48, 50), 5)


def test_find_truth_draws_masks_only_if_there_are_none(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)
    own = root / "SegmentationClass"
    own.mkdir()
    shutil.copy(toy / "SegmentationClass/val_0001.png", own / "COCO_val_0001.png")
    before = digest(root)
    data = train_cls.read_coco(root)
    assert evaluation.find_truth(data, "train", root) == {}
    assert evaluation.find_truth(data, "val", root) == {"COCO_val_0001": own / "COCO_val_0001.png"}
    assert digest(root) == before


def test_find_truth_draws_masks_anew_when_the_annotations_change(toy, tmp_path, capsys):
    root = draw_coco(tmp_path / "coco", toy)
    data = train_cls.read_coco(root)
    truth = evaluation.find_truth(data, "val", root)
    assert "drawing the true masks" in capsys.readouterr().out
    folder = root / "annotations/masks_val2014"
    whole = digest(folder)
    assert evaluation.find_truth(data, "val", root) == truth
    assert "drawing" not in capsys.readouterr().out

    folder.rename(folder.with_name("masks_val2014.partial"))    # as if it had been interrupted
    (folder.with_name("masks_val2014.partial") / "COCO_val_0003.png").unlink()
    assert evaluation.find_truth(data, "val", root) == truth
    assert digest(folder) == whole

    path = root / "annotations/instances_val2014.json"
    edited(path, lambda table: table.update(annotations=[]))
    truth = evaluation.find_truth(data, "val", root)
    assert (true_mask(truth["COCO_val_0000"]) == 0).all()


def test_draw_outline_draws_runs_and_polygons():
    expected = np.zeros((5, 7), bool)
    expected[1:4, 2:5] = True
    expected[2, 3] = False
    expected[0, 6] = True
    runs = [11, 3, 2, 1, 1, 1, 2, 3, 6, 1, 4]                   # what pycocotools 2.0 makes of it
    assert slow_runs(expected) == runs
    drawn = evaluation.draw_outline({"counts": runs, "size": [5, 7]}, 5, 7)
    assert (drawn == expected).all()
    triangles = [[0, 0, 20, 0, 0, 20], [20, 20, 40, 20, 40, 40]]
    y, x = np.mgrid[:40, :40] + 0.5                             # the middles of the pixels
    inside = (x + y < 20) | ((y > 20) & (x > y))
    differ = evaluation.draw_outline(triangles, 40, 40) != inside
    assert differ.sum() <= 45                                   # those that the slopes cut


def test_draw_outline_gives_small_objects_their_true_area():
    rng = np.random.default_rng(0)
    angles = np.arange(16) * np.pi / 8
    drawn = 0
    true = 0
    for _ in range(100):
        a, b = rng.uniform(2, 5, 2)
        turn = rng.uniform(0, 3)
        middle = rng.uniform(12, 13, 2) @ (1, 1j)
        place = (a * np.cos(angles) + 1j * b * np.sin(angles)) * np.exp(1j * turn) + middle
        x = place.real
        y = place.imag
        polygon = np.stack([x, y], 1).flatten().tolist()
        drawn += evaluation.draw_outline([polygon], 25, 25).sum()
        true += abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum()) / 2
    assert drawn / true == pytest.approx(1, abs=0.02)


def test_draw_coco_masks_with_small_objects_on_top_and_crowds_void(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)

    def square(side):
        return [[0, 0, side, 0, side, side, 0, side]]

    objects = (
        (1, 0, 10, square(10)),
        (7, 0, 30, square(30)),
        (90, 1, 48, {"size": [48, 48], "counts": [0, 48 * 48]}),
    )
    annotations = [
        {"image_id": 1, "category_id": category, "iscrowd": crowd, "area": side ** 2,
         "segmentation": outline} for category, crowd, side, outline in objects]
    edited(root / "annotations/instances_train2014.json",
           lambda table: table.update(annotations=annotations))
    data = train_cls.read_coco(root)
    assert list(data["train"]) == ["COCO_train_0000"]
    mask = true_mask(evaluation.find_truth(data, "train", root)["COCO_train_0000"])
    assert (mask[5, 5], mask[20, 20], mask[40, 40]) == (1, 2, usage.VOID)


def test_read_coco_refuses_a_class_twice(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)
    for split in ("train", "val"):
        edited(root / f"annotations/instances_{split}2014.json",
               lambda table: table["categories"].append({"id": 91, "name": "spotted"}))
    with pytest.raises(usage.InputError, match="6 names, 5 distinct"):
        train_cls.read_coco(root)


def test_save_mask_writes_vocs_palette(tmp_path):
    usage.save_mask(tmp_path / "mask.png", np.array([[0, 1, 2, 3, 4, usage.VOID]]))
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert [tuple(pixel) for pixel in np.asarray(image.convert("RGB"))[0].tolist()] == [
            (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (224, 224, 192)]


def test_read_image_of_every_mode(tmp_path):
    grey = np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))
    picture = Image.fromarray(grey)
    pictures = {
        "grey.png": picture,
        "cmyk.jpg": picture.convert("CMYK"),
        "palette.png": picture.convert("P"),
        "alpha.png": picture.convert("RGBA"),
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "float.tif": Image.fromarray(grey.astype(np.float32) / 255),
    }
    for name, saved in pictures.items():
        saved.save(tmp_path / name)
        image = usage.read_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (32, 16)), name
        difference = np.asarray(image)[..., 0].astype(int) - grey
        assert np.abs(difference).max() <= 12, name
    for mode in ("RGBA", "LA"):                                 # what nobody sees is white
        Image.new(mode, (4, 4), 0).save(tmp_path / "clear.png")
        assert usage.read_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")  # 400 million pixels, a small file
    with pytest.raises(usage.InputError, match="bomb.png: .*cannot be read as an image"):
        usage.read_image(tmp_path / "bomb.png")
    turned = Image.Exif()
    turned[0x0112] = 6                                          # the camera was turned to its side
    picture.save(tmp_path / "turned.jpg", exif=turned)
    assert usage.read_image(tmp_path / "turned.jpg").size == (16, 32)


# ---- The run folder ------------------------------------------------------------------------------


def test_load_checkpoint_executes_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"student": Hostile()}, tmp_path / "classifier.pt")
    with pytest.raises(usage.InputError, match="classifier.pt: "):
        usage.load_checkpoint(tmp_path / "classifier.pt", {}, "")
    assert not (tmp_path / "executed").exists()


def test_written_leaves_the_file_as_it_was_or_whole(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError):
        with usage.written(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
    with usage.written(target) as temporary:
        temporary.write_text("after")
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


def test_reading_lets_a_full_memory_and_our_own_mistakes_pass():
    with pytest.raises(MemoryError), usage.reading("a.json", "repair it"):
        raise MemoryError
    with pytest.raises(AttributeError), usage.reading("a.json", "repair it"):
        usage.resized_labels(None, (4, 4))                      # None has no shape
    with pytest.raises(usage.InputError, match="^a.json: two lines; repair it$"):
        with usage.reading("a.json", "repair it"):
            raise ValueError("two\n lines")


def test_counted_prints_and_logs_every_tenth_record_and_the_last(monkeypatch, capsys):
    seconds = iter([100.0, 110.0, 120.0, 125.0])                # at the start and for each line
    monkeypatch.setattr(usage.time, "time", lambda: next(seconds))
    log = [{"images": 40, "loss": 7.0}]                         # of an earlier epoch
    for k, record in usage.counted(range(25), 90, done=40, step=2, log=log):
        record["loss"] = k + 0.5
    first, *records = log
    assert first == {"images": 40, "loss": 7.0}
    assert records == [
        {"images": 60, "loss": 9.5, "images_per_s": 2.0},
        {"images": 80, "loss": 19.5, "images_per_s": 2.0},
        {"images": 90, "loss": 24.5, "images_per_s": 2.0}]
    printed = capsys.readouterr().out
    assert "\r60 images  loss 9.5  2.0 images/s  0:00:15 left" in printed
    assert printed.count("\n") == 1 and printed.endswith("\n")  # one line, written over


def test_counted_stops_at_a_value_that_is_not_finite(capsys):
    for value in (math.nan, math.inf):
        with pytest.raises(usage.InputError, match=f"after 6 images, q is {value}: lower"):
            for k, record in usage.counted(range(9), 18, step=2):
                record["q"] = 0.5 if k < 2 else value


def small_training(path, progress, settings=None, epochs=3, model=None):
    """training_epochs of a linear layer on four "images" in two batches."""
    sampler = mock.MagicMock(__len__=lambda _: 4)
    loader = torch.utils.data.DataLoader(SimpleNamespace(epoch=0), 2, sampler=sampler)
    parts = {"model": model or nn.Linear(2, 2)}
    return usage.training_epochs(
        path, settings or {"random_seed": 0}, parts, progress, epochs, loader)


def test_training_epochs_keep_the_log_in_the_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    progress = {"epoch": 0, "log": []}
    for epoch in small_training(path, progress):
        progress["log"].append({"images": 4 * (epoch + 1), "loss": 1.0})
        if epoch == 1:
            break                                               # it ends before it is saved
    path.with_suffix(".jsonl").write_text("{")                  # as if it had been edited
    progress = {"epoch": 0, "log": []}
    for epoch in small_training(path, progress):
        progress["log"].append({"images": 4 * (epoch + 1), "loss": 0.5})
    expected = [{"images": 4, "loss": 1.0}, {"images": 8, "loss": 0.5}, {"images": 12, "loss": 0.5}]
    assert usage.load_checkpoint(path, {}, "")["progress"] == {"epoch": 3, "log": expected}
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected


def test_counted_records_every_tenth_step_of_all_epochs():
    log = []
    for epoch in range(5):                                      # of six steps of four images
        for _, record in usage.counted(range(6), 5 * 6 * 4, epoch * 6 * 4, 4, log):
            record["loss"] = 1.0
    assert [entry["images"] for entry in log] == [40, 80, 120]


def test_training_epochs_write_the_log_of_a_finished_training(tmp_path):
    path = tmp_path / "a.pt"
    progress = {"epoch": 0, "log": []}
    with contextlib.suppress(Killed), killed(after=3):          # two files of epoch 1, one of 2
        for epoch in small_training(path, progress, epochs=2):
            progress["log"].append({"images": 4 * (epoch + 1)})
    progress = {"epoch": 0, "log": []}
    assert list(small_training(path, progress, epochs=2)) == []
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 2


def test_training_epochs_save_only_finite_weights(tmp_path):
    path = tmp_path / "a.pt"
    model = nn.Linear(2, 2)
    epochs = small_training(path, {"epoch": 0, "log": []}, model=model)
    assert next(epochs) == 0
    assert next(epochs) == 1
    saved = path.read_bytes()
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    with pytest.raises(usage.InputError, match="epoch 2: weights are not finite"):
        next(epochs)
    assert path.read_bytes() == saved
    assert usage.load_checkpoint(path, {}, "")["progress"]["epoch"] == 1


def test_training_epochs_refuse_other_settings_by_name(tmp_path):
    path = tmp_path / "a.pt"
    settings = {"random_seed": 0, "lr": 0.1, "seeds": {"threshold": 0.4}}
    assert list(small_training(path, {"epoch": 0, "log": []}, settings)) == [0, 1, 2]
    for changed in ({"lr": 0.2}, {"seeds": {"threshold": 0.5}}, {"seeds": None}, {"new": 1}):
        name, = changed
        line = f"a.pt: made with different settings: {name}; use another --run"
        with pytest.raises(usage.InputError, match=line):
            list(small_training(path, {"epoch": 0, "log": []}, settings | changed))


def test_lock_refuses_a_folder_at_work(toy, finished, tmp_path, capsys):
    run = copy_of(finished[0], tmp_path)
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def work():
        usage.lock(run)
        ready.set()
        time.sleep(120)

    process = fork.Process(target=work)
    process.start()
    assert ready.wait(20)
    before = digest(run)
    commands = [
        [*AGAIN, "--data", toy, "--run", run],
        ["make_seeds.py", "--run", run, "--scales", 1, "--workers", 0],
        ["make_seeds.py", "--run", run, "--images", toy / "JPEGImages", "--workers", 0],
        [*SEGMENT, "--run", run],
    ]
    for command in commands:
        with pytest.raises(SystemExit):
            stage(*command)
        assert f"{run}: another process is already writing there" in capsys.readouterr().err
    assert digest(run) == before
    stage("eval.py", "--run", run)                              # it reads only what is complete
    process.kill()
    process.join()
    stage(*commands[0])                                         # a process that is gone holds none


def test_lock_removes_what_a_killed_process_left_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    others = [run / "a.txt", run / "seeds/.partial-1-a.png", tmp_path / ".partial-1-a"]
    for path in (run / ".partial-1-classifier.pt", *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    usage.lock(run)
    usage.lock.file.close()
    assert not (run / ".partial-1-classifier.pt").exists()
    assert all(path.exists() for path in others)


def test_whole_folder_continues_only_what_was_made_with_equal_settings(tmp_path):
    path = tmp_path / "train"
    partial = tmp_path / "train.partial"
    path.mkdir()
    (path / "settings.json").write_text("{}")

    def begin(settings, name):
        with usage.whole_folder(path, settings, ["maps"]) as folder:
            (folder / "maps" / name).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin({"threshold": 0.4}, "a")
    (partial / "maps/.partial-1-left").touch()
    with pytest.raises(KeyboardInterrupt):
        begin({"threshold": 0.4}, "b")
    assert {file.name for file in (partial / "maps").iterdir()} == {"a", "b"}
    with pytest.raises(KeyboardInterrupt):
        begin({"threshold": 0.5}, "c")
    assert {file.name for file in (partial / "maps").iterdir()} == {"c"}
    (partial / "settings.json").write_text("")                  # what a power cut leaves
    with pytest.raises(KeyboardInterrupt):
        begin({"threshold": 0.5}, "d")
    assert {file.name for file in (partial / "maps").iterdir()} == {"d"}
    assert (path / "settings.json").read_text() == "{}"         # it stays until the new one is done
    with usage.whole_folder(path, {"threshold": 0.5}, ["maps"]):
        pass
    assert {file.name for file in path.rglob("*")} == {"maps", "d", "settings.json"}
    assert json.loads((path / "settings.json").read_text()) == {"threshold": 0.5}
    assert not partial.exists()


@pytest.mark.parametrize("content", [
    b"[]", b"{", b"null", b'{"threshold": []}', b"\xff"])
def test_whole_folder_makes_a_partial_folder_of_edited_settings_anew(content, tmp_path):
    partial = tmp_path / "train.partial"
    partial.mkdir()
    (partial / "left").touch()
    (partial / "settings.json").write_bytes(content)
    with usage.whole_folder(tmp_path / "train", {"threshold": 0.4}):
        pass
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["settings.json"]


def test_whole_folder_removes_nothing_of_the_user(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/my cat.jpg").touch()
    with contextlib.suppress(usage.InputError):
        with usage.whole_folder(tmp_path / "train", {"threshold": 0.4}):
            pass
    assert (tmp_path / "train/my cat.jpg").exists()


@pytest.mark.parametrize("error, expected", [
    (OSError(28, "No space left on device"), "No space left on device: once this is fixed, run"),
    (PermissionError(13, "denied", "a.txt"), "denied: 'a.txt': once this is fixed, run it again"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "), "--workers 0"),
    (MemoryError(), "out of memory: use a smaller --batch-size"),
    (usage.InputError("two\nlines"), "two lines"),
    (None, "out of memory: use a smaller --batch-size")])
def test_one_line_errors_give_each_error_its_own_remedy(error, expected, capsys):
    with pytest.raises(SystemExit) as end, usage.one_line_errors("run it again"):
        if error:
            raise error
        torch.empty(10 ** 14)                                   # more than the CPU has
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert expected in message
    assert len(message.splitlines()) == 1


def test_one_line_errors_hide_no_mistake_of_ours():
    with pytest.raises(RuntimeError, match="shapes"), usage.one_line_errors("run it again"):
        raise RuntimeError("shapes do not match")
    with pytest.raises(TypeError), usage.one_line_errors("run it again"):
        raise TypeError("no such argument")


# Importing torch takes seconds: one server does it, and forks the processes that are started here.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "torchvision.models.segmentation"])


def forked(code, errors, **variables):
    """Start a process that executes code; what it prints as errors goes into a file."""
    opened = "import os\nos.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)\n"
    variables |= {"errors": str(errors), "folder": str(HERE)}
    process = FORKS.Process(target=exec, args=(opened + code, variables))
    process.start()
    return process


PRINTING = """
import sys
sys.path.insert(0, folder)
import usage
if has_reader:
    sys.stdout = None                                           # no terminal, and no file
else:
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = open(writer, "w")
with usage.one_line_errors(""):
    print("a line", flush=flush)
"""


@pytest.mark.parametrize("has_reader, flush, code", [
    (False, True, 141), (False, False, 141), (True, False, 0)])
def test_one_line_errors_without_a_reader_or_a_terminal(has_reader, flush, code, tmp_path):
    """As under "| head", whether it breaks at a line of progress or at the end; and without any."""
    process = forked(PRINTING, tmp_path / "errors.txt", has_reader=has_reader, flush=flush)
    process.join(60)
    assert (tmp_path / "errors.txt").read_bytes() == b""
    assert process.exitcode == code


# ---- The four stages -----------------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--"]
SMALL = [
    "--weights", "none", "--size", "33", "--batch-size", "4", "--workers", "0", "--reg-epochs", "0"]
BOTH = ["--epochs", "1", *SMALL, "--reg-epochs", "1"]           # an epoch without, one with L_REG
# What `finished` was trained with; this learning rate and seed find something in some images.
AGAIN = ["train_cls.py", "--backbone", "mobilenet_v2", *BOTH, "--lr", "0.006", "--seed", "1"]
SEEDS = ["make_seeds.py", "--scales", "1", "2", "--workers", "0"]
SEGMENT = ["train_seg.py", "--epochs", "1", "--batch-size", "4", "--workers", "0"]


def stage(script, *arguments):
    """Run a stage inside this process, which saves Python's start; its output."""
    output = io.StringIO()
    command = [str(HERE / script), *map(str, arguments)]
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(output):
            runpy.run_path(command[0], run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, on_ctrl_c)
        if hasattr(usage.lock, "file"):                         # as if this process ended
            usage.lock.file.close()
    return output.getvalue()


def torchrun(script, *arguments):
    """Run a stage as two processes, on the CPU, as there may be one card: (exit code, errors)."""
    command = [sys.executable, *TORCHRUN, HERE / script, "--device", "cpu", *arguments]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=HERE)
    return done.returncode, done.stderr


STAGE = """
import resource, runpy, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.environ.update(environment)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.path.insert(0, folder)
sys.argv = command
runpy.run_path(command[0], run_name="__main__")
"""


def start(script, *arguments, errors=os.devnull, environment=None, limit=resource.RLIM_INFINITY):
    """Start a stage as a process of its own. limit: of the bytes in a file."""
    command = [str(HERE / script), *map(str, arguments)]
    return forked(STAGE, errors, command=command, environment=environment or {}, limit=limit)


def in_two_processes(script, *arguments):
    """Run a stage as torchrun does, which takes longer; the exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
              "TORCHELASTIC_RUN_ID": "tests"}
    ranks = [start(script, "--device", "cpu", *arguments,
                   environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(2)]
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks):                # the other would wait for it
            for rank in ranks:
                rank.kill()
        ranks[0].join(0.1)
        ranks[1].join(0.1)
    return [rank.exitcode for rank in ranks]


def copy_of(run, folder, name="run", without=()):
    """A copy; of checkpoints, which are large, links, so that a writer has to unlink them first."""
    def copy(source, target):
        if source.endswith(".pt"):
            os.link(source, target)
        else:
            shutil.copy2(source, target)

    ignore = shutil.ignore_patterns(*without)
    return Path(shutil.copytree(run, folder / name, copy_function=copy, ignore=ignore))


def truncated(path, size=300):
    path.write_bytes(path.read_bytes()[:size])


def edited(path, change):
    """Change the table in a .json file by a function."""
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table, indent=1))


def read(path):
    """What a .json file holds, which must be JSON as other programs read it, infinity aside."""
    def refuse(constant):
        assert constant != "NaN"
        return float(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def relabelled(data, kept="train"):
    """Other classes for each image of train, none for those of val."""
    names = (data / "classes.txt").read_text().split()
    ids = (data / f"ImageSets/Segmentation/{kept}.txt").read_text().split()
    labels = {name: [names[k % len(names)]] for k, name in enumerate(ids)}
    (data / "labels.json").write_text(json.dumps(labels))


@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory):
    """A run folder after all four stages, and what they printed."""
    run = tmp_path_factory.mktemp("runs") / "mobilenet"
    return run, [
        stage(*AGAIN, "--data", toy, "--run", run),
        stage(*SEEDS, "--run", run, "--workers", 1),
        stage(*SEGMENT, "--run", run),
        stage("eval.py", "--run", run, "--sweep")]


def test_stages_of_a_cnn_in_turn(finished, toy, tmp_path):
    run, printed = finished
    progress = r"16 images +L_GEN [\d.]+ +L_REG [\d.e-]+ .*images/s +0:00:00 left"
    assert re.search(progress, printed[0])
    assert "4 steps (few: consider a smaller --batch-size)" in printed[0]
    assert "val, 4 images: mAP" in printed[0]
    for output, script in zip(printed, ("make_seeds.py", "train_seg.py", "eval.py")):
        assert re.search(rf"next: .*python {script} --run {run}\b", output)
    for output, setting in zip(printed, ("temperature inf", "threshold 0.5", "lr 0.0003")):
        output = " ".join(output.split())
        assert output.startswith("settings: run ")
        assert f" {setting}, " in output                        # which nobody gave
    lines = (run / "classifier.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    assert record["images"] == 16
    assert math.isfinite(record["L_GEN"])
    assert record["L_REG"] > 0
    data = read(run / "images.json")
    assert data == {"root": str(toy.resolve()), **train_cls.read_voc(toy)}

    found = set()
    for folder, split in (("train/seeds", "train"), ("segmentation", "val")):
        masks = usage.image_files(run / folder)
        assert sorted(masks) == sorted(data[split])
        for name, (_, labels) in data[split].items():
            values = set(true_mask(masks[name]).unique().tolist())
            if split == "train":                                # only classes that the image has
                assert values <= {0} | {data["classes"].index(label) + 1 for label in labels}
                found |= values
    assert len(found) > 1                                       # or the other tests see nothing
    assert len(list((run / "train/pseudo_masks").glob("*.png"))) == 8
    assert Image.open(run / "train/seeds.png").size[0] == 5 * 184


def test_stages_write_settings_that_contain_those_before(finished):
    run = finished[0]
    trained = read(run / "settings.json")
    seeds = read(run / "train/settings.json")
    segmented = read(run / "segmentation/settings.json")
    assert (trained["backbone"], trained["lr"], trained["epochs"]) == ("mobilenet_v2", 0.006, 1)
    assert seeds["classifier"] == trained
    assert (seeds["threshold"], seeds["scales"], seeds["refine"]) == (0.5, [1.0, 2.0], True)
    assert segmented["classifier"] == trained
    assert segmented["seeds"] == seeds
    assert (segmented["lr"], segmented["refine"]) == (0.0003, True)
    names = {path.name for path in run.iterdir()}
    assert names == {
        ".lock", "images.json", "settings.json", "classifier.pt", "classifier.jsonl", "train",
        "segmenter.pt", "segmenter.jsonl", "segmentation", "report.json"}
    assert {path.name for path in (run / "train").iterdir()} == {
        "maps", "seeds", "pseudo_masks", "seeds.png", "settings.json"}


def test_eval_measures_what_the_stages_wrote(finished, toy, tmp_path):
    run, printed = finished
    report = read(run / "report.json")
    assert [entry["what"] for entry in report] == [
        "seeds", "pseudo masks", "seeds, own threshold", "seeds, oracle",
        "pseudo masks, own threshold", "pseudo masks, oracle", "segmentation"]
    fixed, refined, own, oracle, own_refined, oracle_refined, segmentation = report
    assert fixed["where"] == f"{run}/train, 8 of 8 images of train with a mask, given labels"
    assert segmentation["where"] == f"{run}/segmentation, 4 of 4 images of val with a mask"
    assert own["where"] == own_refined["where"] == f"{fixed['where']}, every second one"
    for at_default, best in ((fixed, oracle), (refined, oracle_refined)):
        curve = best["mIoU at 0.00, 0.01 ... 1.00"]
        assert at_default["mIoU"] == pytest.approx(curve[50])   # the PNGs are the maps at 0.50
        assert best["mIoU"] == max(curve)
        assert "chosen on these very masks" in best["threshold"]
    assert "given labels, threshold 0.5\n" in printed[3]
    names = (toy / "classes.txt").read_text().split()
    (tmp_path / "classes.txt").write_text("\ufeff\n" + "\n\n".join(names) + " \n")
    pairs = ["eval.py", "--pred", run / "train/seeds", "--truth", toy / "SegmentationClass"]
    for classes in (toy / "classes.txt", tmp_path / "classes.txt"):
        output = stage(*pairs, "--classes", classes)
        assert f"{fixed['mIoU']:.3f}" in output
        assert all(f"\n  {name} " in output for name in fixed["classes"])


def test_stages_of_a_transformer_in_turn(toy, tmp_path):
    stage("train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "deit_tiny", *BOTH)
    stage("make_seeds.py", "--run", tmp_path, "--scales", 1, "--workers", 0, "--affinity")
    stage(*SEGMENT, "--run", tmp_path)
    stage("eval.py", "--run", tmp_path)
    assert len(read(tmp_path / "report.json")) == 3


def test_stages_on_coco(toy, tmp_path):
    coco = draw_coco(tmp_path / "coco", toy)
    run = tmp_path / "run"
    before = digest(coco)
    train = ["train_cls.py", "--data", coco, "--run", run, "--backbone", "mobilenet_v2"]
    stage(*train, "--epochs", 1, *SMALL)
    assert "eval.py" in stage("make_seeds.py", "--run", run, "--scales", 1, "--workers", 0)
    assert "eval.py" in stage(*SEGMENT, "--run", run)           # which will draw the masks
    assert digest(coco) == before                               # it is read as it is
    stage("eval.py", "--run", run)
    report = (run / "report.json").read_text()
    counts = [re.search(r"(\d) of (\d) images", entry["where"]).groups()
              for entry in read(run / "report.json")]
    assert counts == [("8", "8"), ("8", "8"), ("5", "5")]
    after = digest(coco)
    assert {path.parent for path in after if path not in before} == {
        Path("annotations/masks_train2014"), Path("annotations/masks_val2014")}
    stage("eval.py", "--run", run)
    assert (run / "report.json").read_text() == report
    assert digest(coco) == after


def test_make_seeds_of_photographs_without_labels(finished, tmp_path, monkeypatch):
    photos = tmp_path / "holiday"
    run = copy_of(finished[0], tmp_path)
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
    (photos / "more").mkdir()
    monkeypatch.chdir(tmp_path)
    command = ["make_seeds.py", "--run", run, "--workers", 0, "--scales", 1]
    results = run / "images-holiday"
    for threshold, each in ((0, 5), (1, 0)):                    # every class, then none
        output = stage(*command, "--images", photos, "--class-threshold", threshold)
        skipped = output.split("skipped, not readable as images: ")[1]
        assert set(skipped.splitlines()[0].split(", ")) == {*others, "nowhere.jpg", "more"}
        assert "next:" not in output
        without = 3 if each == 0 else 0
        assert f"{3 * each} classes predicted; {without} of 3 images have none" in output
        labels = read(results / "labels.json")
        assert {name: len(labels[name]) for name in labels} == dict.fromkeys(
            ("print", tiny, "turned cat"), each)
        for name, size in (("turned cat", (30, 60)), ("print", (20, 50)), (tiny, (3, 2))):
            assert Image.open(results / f"pseudo_masks/{name}.png").size == size
        assert Image.open(results / "seeds.png").size[0] == 4 * 184     # no column for the truth
    assert sorted(path.name for path in (run / "train/seeds").iterdir()) == sorted(
        path.name for path in (finished[0] / "train/seeds").iterdir())

    def continued(images):
        """How many images of the results so far are taken over if those are incomplete."""
        shutil.copytree(results, run / "images-holiday.partial")
        output = stage(*command, "--images", images, "--class-threshold", 1)
        return int(re.search(r"(\d) are already done", output)[1])

    before = digest(results)
    assert continued(f"../{tmp_path.name}/holiday") == 3        # the same by another name
    assert digest(results) == before
    other = shutil.copytree(photos, tmp_path / "other/holiday", symlinks=True)
    Image.new("LA", (3, 2), 255).save(other / f"{tiny}.png")    # of nearly the same size in bytes
    with pytest.raises(SystemExit):                             # other photographs of that name
        stage(*command, "--images", other, "--class-threshold", 1)
    assert digest(results) == before


def test_make_seeds_of_val_predicts_its_labels(finished, tmp_path):
    run = copy_of(finished[0], tmp_path)
    command = ["make_seeds.py", "--split", "val", "--scales", 1, "--workers", 0, "--run", run]
    output = stage(*command)
    assert f"python eval.py --run {run}" in output
    assert "train_seg.py" not in output
    output = stage("eval.py", "--run", run)
    assert f"{run}/val, 4 of 4 images of val with a mask, predicted labels" in output
    what = [entry["what"] for entry in read(run / "report.json")]
    assert what == ["seeds", "pseudo masks", "seeds", "pseudo masks", "segmentation"]
    labels = read(run / "val/labels.json")
    data = read(run / "images.json")
    assert list(labels) == list(data["val"])
    settings = read(run / "settings.json")
    assert math.isfinite(settings["score_threshold"])
    made_with = read(run / "val/settings.json")
    assert made_with["class_threshold"] is None                 # it is the classifier's own
    network = usage.load_classifier(run, settings, 5).eval()
    for name, (image, _) in data["val"].items():                # as stage 1 classifies, but from
        pixels = usage.TO_TENSOR(usage.read_image(Path(data["root"], image)))      # float32
        pixels = usage.NORMALISE(pixels[None])
        view = torch.nn.functional.interpolate(pixels, (33, 33), mode="bilinear", antialias=True)
        with torch.no_grad(), usage.fast_autocast(pixels.device):
            scores = network(view).float().mean((2, 3))[0]      # the temperature is infinite
        expected = {data["classes"][c]
                    for c in (scores > settings["score_threshold"]).nonzero()[:, 0].tolist()}
        near = (scores - settings["score_threshold"]).abs() < 0.02
        unsure = {data["classes"][c] for c in near.nonzero()[:, 0].tolist()}
        assert set(labels[name]) ^ expected <= unsure


def test_stages_without_masks_and_labels_offer_only_what_works(finished, toy, tmp_path):
    """No masks, labels for train only, then no list of val either; then masks for train only."""
    data = copy_of(toy, tmp_path, "data", ["SegmentationClass"])
    run = tmp_path / "run"
    relabelled(data)
    command = ["train_cls.py", "--data", data, "--backbone", "mobilenet_v2", "--epochs", 1, *SMALL]
    output = stage(*command, "--run", run)
    assert "no mAP" in output
    assert "mAP" not in read(run / "settings.json")
    assert "next: python make_seeds.py" in output
    seeds = stage("make_seeds.py", "--run", run, "--scales", 1, "--workers", 0)
    assert "train_seg.py" in seeds
    assert "eval.py" not in seeds
    assert "eval.py" not in stage(*SEGMENT, "--run", run)
    assert len(list((run / "segmentation").glob("*.png"))) == 4

    (data / "ImageSets/Segmentation/val.txt").unlink()
    run = tmp_path / "my run"
    output = stage(*command, "--run", run)
    assert f"next: python make_seeds.py --run '{run}'" in output
    masks = finished[0] / "train/seeds"
    assert "no val images to predict" in stage(*SEGMENT, "--run", run, "--pseudo-masks", masks)
    assert not (run / "segmentation").exists()

    data = copy_of(toy, tmp_path, "half", ["val_*.png"])
    run = copy_of(finished[0], tmp_path, "of half", ["segm*"])
    where = ["--data", data, "--run", run]
    assert "eval.py" not in stage(
        "make_seeds.py", *where, "--split", "val", "--scales", 1, "--workers", 0)
    assert "eval.py" not in stage(*SEGMENT, *where)
    assert f"{run}/val, 0 of 4 images of val with a mask: not measured" in stage("eval.py", *where)


def test_make_seeds_continues_a_partial_folder(finished, tmp_path):
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    partial = (run / "train").rename(run / "train.partial")
    names = sorted(path.stem for path in partial.glob("maps/*"))
    for name in names[:3]:
        (partial / f"maps/{name}.npz").unlink()                 # they are written last
    (partial / f"pseudo_masks/{names[1]}.png").unlink()
    truncated(partial / f"seeds/{names[2]}.png", 20)
    (partial / f"maps/.partial-1-{names[3]}.npz").touch()
    kept = [partial / f"{kind}.{ending}" for kind, ending in (
        (f"maps/{names[4]}", "npz"), (f"seeds/{names[5]}", "png"))]
    times = [path.stat().st_mtime_ns for path in kept]
    output = stage(*SEEDS, "--run", run)
    assert "5 are already done" in output
    assert digest(run) == before
    kept = [run / "train" / path.relative_to(partial) for path in kept]
    assert [path.stat().st_mtime_ns for path in kept] == times


@pytest.mark.parametrize("script, name", [
    ("make_seeds.py", "train.partial/maps/train_0003.npz"),
    ("make_seeds.py", "train.partial/seeds/train_0003.png"),
    ("make_seeds.py", "train.partial/pseudo_masks/train_0003.png"),
    ("train_seg.py", "segmentation.partial/val_0001.png")])
def test_stages_make_empty_files_of_a_power_cut_again(script, name, finished, tmp_path):
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    folder = name.split(".")[0]
    (run / folder).rename(run / f"{folder}.partial")
    (run / name).write_bytes(b"")
    with contextlib.suppress(SystemExit):
        stage(*{"make_seeds.py": SEEDS, "train_seg.py": SEGMENT}[script], "--run", run)
    assert digest(run) == before


def test_stages_make_lost_and_broken_results_anew(finished, tmp_path):
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    (run / "train/seeds/train_0000.png").unlink()
    (run / "train/pseudo_masks/train_0001.png").write_bytes(b"")
    truncated(run / "train/maps/train_0002.npz", 50)
    (run / "segmentation/val_0002.png").write_bytes(b"")
    assert "0 are already done" in stage(*SEEDS, "--run", run)
    stage(*SEGMENT, "--run", run)
    assert digest(run) == before


def test_make_seeds_makes_a_folder_of_other_settings_anew(finished, tmp_path, capsys):
    """README's advice "lower --threshold" works; the segmenter of the other seeds is not theirs."""
    run = copy_of(finished[0], tmp_path)
    before = digest(run / "train")
    (run / "train/of another program").touch()
    output = stage(*SEEDS, "--run", run, "--threshold", 0.05)
    assert "threshold 0.05" in output
    assert read(run / "train/settings.json")["threshold"] == 0.05
    after = digest(run / "train")
    assert after.keys() == before.keys()
    assert after != before
    assert {path.name for path in before if path.suffix == ".npz"} == {
        path.name for path in after if path.suffix == ".npz"}
    with pytest.raises(SystemExit):
        stage(*SEGMENT, "--run", run)
    message = capsys.readouterr().err
    assert "segmenter.pt: made with different settings: pseudo_masks, seeds; use ano" in message
    output = stage("eval.py", "--run", run)
    assert f"{run}/segmentation: made from other seeds, so not measured" in output
    assert [entry["threshold"] for entry in read(run / "report.json")] == [0.05, 0.05]
    stage(*SEEDS, "--run", run)
    assert digest(run / "train") == before


def test_train_seg_refines_anew_without_another_training(finished, tmp_path):
    run = copy_of(finished[0], tmp_path)
    saved = (run / "segmenter.pt").stat().st_mtime_ns
    shutil.copytree(run / "segmentation", run / "segmentation.partial")
    (run / "segmentation.partial/val_9999.png").touch()         # of the old settings
    stage(*SEGMENT, "--run", run, "--no-refine")
    assert read(run / "segmentation/settings.json")["refine"] is False
    assert not list(run.glob("segmentation*/val_9999.png"))
    assert (run / "segmenter.pt").stat().st_mtime_ns == saved
    output = stage("eval.py", "--run", run)
    assert "segmentation" in read(run / "report.json")[-1]["what"]
    assert "threshold none (argmax)\n" in output


def test_eval_leaves_out_results_of_another_classifier(finished, tmp_path, capsys):
    run = copy_of(finished[0], tmp_path)
    edited(run / "segmentation/settings.json",
           lambda table: table["classifier"].update(classifier="x"))
    remark = "made with a different classifier, so not measured"
    assert f"{run}/segmentation: {remark}" in stage("eval.py", "--run", run)
    assert [entry["what"] for entry in read(run / "report.json")] == ["seeds", "pseudo masks"]
    edited(run / "train/settings.json", lambda table: table["classifier"].update(temperature=3.0))
    with pytest.raises(SystemExit):
        stage("eval.py", "--run", run)
    assert f"{run}: nothing to measure" in capsys.readouterr().err


def test_stages_after_the_first_keep_the_labels_it_froze(finished, toy, tmp_path, capsys):
    """Labels, lists and classes that are corrected later concern a new run only."""
    data = copy_of(toy, tmp_path, "data")
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    relabelled(data)
    (data / "classes.txt").write_text("cat\ndog\n")
    lists = data / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("train_0003\ntrain_0001\n")
    (lists / "val.txt").unlink()
    where = ["--run", run, "--data", data]
    stage(*SEEDS, *where)
    stage(*SEGMENT, *where)
    assert digest(run) == before
    shutil.copy(toy / "classes.txt", data)
    with pytest.raises(SystemExit):
        stage(*AGAIN, *where)
    message = capsys.readouterr().err
    assert "classifier.pt: made with different settings: batch_size" not in message
    assert digest(run) == before


def test_stages_find_data_and_runs_that_were_moved(finished, toy, tmp_path, capsys):
    data = copy_of(toy, tmp_path, "moved")
    run = copy_of(finished[0], tmp_path, "my run")
    before = digest(run)
    edited(run / "images.json", lambda table: table.update(root="/nowhere"))
    for command in (SEEDS, SEGMENT):
        with pytest.raises(SystemExit):
            stage(*command, "--run", run)
        assert "No such file" in capsys.readouterr().err
    where = ["--run", run, "--data", data]
    assert f"'{run}'" in stage(*SEEDS, *where)
    stage(*SEGMENT, *where)
    assert f"seeds: {run}/train, 8 of 8 images" in stage("eval.py", *where, "--sweep")
    assert f"--run '{run}'" in stage(*AGAIN, *where)            # it learns nothing, but where it is
    assert read(run / "images.json")["root"] == str(data)
    after = digest(run)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {Path("images.json"), Path("report.json")}        # which name the folders


def test_train_cls_refuses_to_continue_after_a_change_of_the_data(finished, toy, tmp_path, capsys):
    where = ["--data", copy_of(toy, tmp_path, "data"), "--run", copy_of(finished[0], tmp_path)]
    before = digest(where[-1])
    changes = {
        "labels.json": "images",
        "ImageSets/Segmentation/val.txt": "images, photographs",
        "JPEGImages/val_0000.jpg": "photographs",
    }
    for name, different in changes.items():
        path = where[1] / name
        content = path.read_bytes()
        if name == "labels.json":
            edited(path, lambda table: table["train_0000"].clear())
        elif path.suffix == ".txt":
            path.write_bytes(b"\n".join(content.split()[:-1]))
        else:
            path.write_bytes(content + b".")
        with pytest.raises(SystemExit):
            stage(*AGAIN, *where)
        message = capsys.readouterr().err
        assert f"classifier.pt: made with different settings: {different}; use ano" in message
        path.write_bytes(content)
    assert digest(where[-1]) == before


def test_train_cls_again_changes_nothing(finished, toy, tmp_path):
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    stage(*AGAIN, "--data", toy, "--run", run)
    assert digest(run) == before


def test_train_cls_again_on_another_machine_keeps_what_was_learnt(
        finished, toy, tmp_path, monkeypatch):
    """Roundings differ between devices and numbers of threads; results then stay valid."""
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    exact = usage.class_scores
    monkeypatch.setattr(usage, "class_scores", lambda s, alpha: exact(s, alpha) * (1 + 1e-6))
    stage(*AGAIN, "--data", toy, "--run", run)
    assert digest(run) == before


def test_eval_of_a_half_without_any_object(finished, toy, tmp_path, capsys):
    """The report is JSON all the same; where it cannot be written, the table is shown."""
    data = copy_of(toy, tmp_path, "data")
    run = copy_of(finished[0], tmp_path)
    for number, path in enumerate(sorted((data / "SegmentationClass").glob("train_*"))):
        if number > 0:
            Image.new("L", (48, 48)).save(path)
    stage("eval.py", "--data", data, "--run", run, "--sweep")
    report = read(run / "report.json")
    without_area = [entry["what"] for entry in report if entry["area"] is None]
    assert without_area == ["seeds, own threshold", "pseudo masks, own threshold"]
    (run / "report.json").unlink()
    (run / "report.json").mkdir()
    with pytest.raises(SystemExit), mock.patch.object(sys, "argv", ["eval.py", "--run", str(run)]):
        runpy.run_path(str(HERE / "eval.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert "\n  mean " in printed.out
    assert len(printed.err.strip().splitlines()) == 1


def test_save_contact_sheet_shows_what_there_is(tmp_path, monkeypatch):
    """Photographs evenly spread and in their own shape; an empty tile for a broken mask."""
    for folder in ("photos", "truth", "seeds", "pseudo_masks", "maps"):
        (tmp_path / folder).mkdir()
    ids = [f"p{k:02d}" for k in range(15)]
    images = {name: tmp_path / f"photos/{name}.png" for name in ids}
    truth = {name: tmp_path / f"truth/{name}.png" for name in ids}
    for name in ids:
        Image.new("RGB", (60, 20), "red").save(images[name])
        Image.new("L", (60, 20), 2).save(truth[name])
        present = torch.tensor([1])
        if name == "p00":                                       # it has no class
            present = present[:0]
        levels = torch.full((len(present), 20, 60), 200, dtype=torch.uint8)
        make_seeds.write_results(tmp_path, name, (20, 60), present, levels, levels, 0.4)
    shown = []
    read_image = usage.read_image
    monkeypatch.setattr(
        usage, "read_image", lambda path: shown.append(path.stem) or read_image(path))
    make_seeds.save_contact_sheet(tmp_path, ["cat", "dog"], images, {})
    assert len(shown) == 10
    assert (shown[0], shown[-1]) == ("p00", "p14")
    assert set(np.diff([ids.index(name) for name in shown])) <= {1, 2}
    sheet = np.asarray(Image.open(tmp_path / "seeds.png"))
    assert sheet.shape[1] == 4 * 184
    assert (sheet[20 + 70:20 + 120, :180] == 255).all()         # 180 x 60, not squashed
    assert (sheet[:20].reshape(20, 4, 184, 3) < 100).any((0, 2, 3)).all()       # four headings
    tiles = [sheet[20 + 124 * row:80 + 124 * row, 184 * column:184 * column + 180]
             for row in (0, 1) for column in (1, 2)]
    words = [(tile == 255).all(2).any() for tile in tiles]      # they have a white edge
    assert words == [True, False, True, True]                   # "no class", none, "dog" twice
    truncated(truth["p00"], 20)
    make_seeds.save_contact_sheet(tmp_path, ["cat", "dog"], images, truth)
    sheet = np.asarray(Image.open(tmp_path / "seeds.png"))
    assert sheet.shape[1] == 5 * 184
    column = sheet[20:, 4 * 184:4 * 184 + 180]
    assert (column[:60] == 255).all()
    assert (column[124:184] < 200).any()


def test_train_cls_of_maps_of_one_position(toy, tmp_path):
    stage("train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "deit_tiny", *BOTH,
          "--size", 16, "--epochs", 5)
    lines = (tmp_path / "classifier.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["images"] == 48
    assert last["L_REG"] == pytest.approx(0, abs=1e-6)
    assert last["lr"] == pytest.approx(1e-3 * train_cls.learning_rate(11, 10, 12))  # the step's own


def wait_for(path, process):
    """Wait until a process has written a file."""
    while not path.exists():
        time.sleep(0.01)
        assert process.is_alive(), f"ended before {path}"


def kill_when_there(path, *arguments):
    """Start a stage, and kill it as soon as it has written a file."""
    process = start(*arguments)
    wait_for(path, process)
    process.kill()
    process.join()


class Killed(BaseException):
    """What ends a stage in `killed`: no code of ours catches it."""


@contextlib.contextmanager
def killed(after):
    """End what runs inside when it has renamed or removed so many files and folders."""
    left = after

    def counting(function):
        def call(*arguments, **how):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*arguments, **how)
        return call

    with (mock.patch.object(os, "replace", counting(os.replace)),
          mock.patch.object(Path, "rename", counting(Path.rename)),
          mock.patch.object(shutil, "rmtree", counting(shutil.rmtree))):
        yield


def equal_states(one, two, part):
    """Whether a part of two checkpoints is the same, bit for bit."""
    assert one[part].keys() == two[part].keys()
    return all(torch.equal(tensor, two[part][key]) for key, tensor in one[part].items())


def losses_of(state):
    """The log in a checkpoint, without speeds."""
    return [{key: value for key, value in record.items() if key != "images_per_s"}
            for record in state["progress"]["log"]]


@pytest.mark.parametrize("script, result, parts", [
    ("train_cls.py", "classifier.pt", ("student", "teacher")),
    ("train_seg.py", "segmenter.pt", ("segmenter",))])
def test_training_that_was_killed_ends_bit_for_bit_equal(
        script, result, parts, finished, toy, tmp_path):
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
            assert usage.load_checkpoint(run / result, {}, "")["progress"]["epoch"] < 3
        stage(*command)
        states.append(usage.load_checkpoint(run / result, {}, ""))
    one, two = states
    assert all(equal_states(one, two, part) for part in parts)
    assert losses_of(one) == losses_of(two)
    assert one["progress"].get("running_l_gen") == two["progress"].get("running_l_gen")
    assert one["progress"]["epoch"] == two["progress"]["epoch"] == 3
    whole = digest(tmp_path / "whole")
    assert {path: content for path, content in digest(run).items() if path.suffix != ".pt"} == {
        path: content for path, content in whole.items() if path.suffix != ".pt"}


def test_train_cls_killed_between_its_files_is_not_finished(finished, toy, tmp_path, capsys):
    """settings.json is written last: until then, the run is that of no classifier."""
    run = tmp_path / "run"
    command = [*AGAIN, "--data", toy, "--run", run, "--device", "cpu"]
    # Killed after an epoch without its log; after its log and the other epoch; after images.json.
    for after in (1, 2, 2):
        with pytest.raises(Killed), killed(after):
            stage(*command)
        with pytest.raises(SystemExit):
            stage(*SEEDS, "--run", run)
        assert "run train_cls.py" in capsys.readouterr().err
    assert (run / "images.json").exists()
    stage(*command)
    one, two = (usage.load_checkpoint(folder / "classifier.pt", {}, "")
                for folder in (finished[0], run))
    if torch.cuda.is_available():                               # `finished` was trained there
        return
    assert equal_states(one, two, "student")
    assert (run / "settings.json").read_bytes() == (finished[0] / "settings.json").read_bytes()
    assert not list(run.rglob(".partial-*"))


@pytest.mark.parametrize("command, name", [(SEEDS, "train"), (SEGMENT, "segmentation")])
def test_whole_folder_ends_the_same_whenever_its_stage_is_killed(command, name, finished, tmp_path):
    """Killed time after time, after every few files; the folder of before stays until the end."""
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    whole = digest(run / name)
    (run / name / "old").touch()
    times = 0
    finishing = 4                   # seeds.png, renaming both folders, removing the old one
    for after in (0, 1, 2, 3, *range(4, 30)):
        try:
            with killed(after):
                stage(*command, "--run", run)
            break
        except Killed:
            times += 1
            if (run / name).exists() and not (run / name / "old").exists():
                assert digest(run / name) == whole              # never a mixture
    assert times >= finishing
    assert digest(run) == before


def begin_to_remove(path, **how):
    """What a kill leaves of shutil.rmtree: settings.json may be the first file to go."""
    if Path(path).is_dir():
        (Path(path) / "settings.json").unlink()
        raise Killed


def test_whole_folder_ends_the_same_if_killed_while_the_old_one_is_removed(finished, tmp_path):
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    with pytest.raises(Killed), mock.patch.object(shutil, "rmtree", begin_to_remove):
        stage(*SEEDS, "--run", run)
    train = {path: content for path, content in before.items() if path.parts[0] == "train"}
    after = digest(run)
    assert {path: after[path] for path in train} == train       # the new ones are in place
    stage(*SEEDS, "--run", run)
    assert digest(run) == before


def test_whole_folder_ends_the_same_if_killed_while_a_partial_one_is_removed(finished, tmp_path):
    run = copy_of(finished[0], tmp_path)
    before = digest(run)
    shutil.copytree(run / "train", run / "train.partial")
    edited(run / "train.partial/settings.json", lambda table: table.update(threshold=0.3))
    with pytest.raises(Killed), mock.patch.object(shutil, "rmtree", begin_to_remove):
        stage(*SEEDS, "--run", run)
    stage(*SEEDS, "--run", run)
    assert digest(run) == before


def test_make_seeds_that_was_killed_ends_the_same(finished, tmp_path):
    run = copy_of(finished[0], tmp_path, without=["train", "segment*", "report.json"])
    command = [*SEEDS, "--run", run]
    kill_when_there(run / "train.partial/maps/train_0001.npz", *command)
    assert not (run / "train").exists()
    (run / "train.partial/seeds/.partial-1-left.png").touch()
    assert re.search(r"[1-8] are already done", stage(*command))
    assert digest(run / "train") == digest(finished[0] / "train")
    assert not list(run.rglob("*.partial*"))


def test_one_line_errors_say_how_to_go_on_after_ctrl_c(toy, tmp_path):
    process = start("train_cls.py", "--data", toy, "--run", tmp_path, "--backbone", "mobilenet_v2",
                    "--epochs", 100, *SMALL, errors=tmp_path / "errors.txt")
    wait_for(tmp_path / "classifier.pt", process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    errors = (tmp_path / "errors.txt").read_text().strip().splitlines()
    assert process.exitcode == 130
    assert errors == ["train_cls.py: interrupted; run the same command again"]


def test_train_seg_on_a_disk_that_fills_up(finished, tmp_path):
    """Files can grow to 1 MB only, less than a checkpoint has."""
    run = copy_of(finished[0], tmp_path, without=["segment*"])
    before = digest(run)
    process = start(*SEGMENT, "--run", run, errors=tmp_path / "errors.txt", limit=2 ** 20)
    process.join(120)
    errors = (tmp_path / "errors.txt").read_text().strip().splitlines()
    assert process.exitcode == 2
    assert len(errors) == 1, errors
    assert "once this is fixed, run the same command again" in errors[0]
    assert digest(run) == before


@pytest.mark.parametrize("script", ["train_cls.py", "train_seg.py"])
def test_training_stops_at_weights_that_are_not_finite(script, finished, toy, tmp_path, capsys):
    run = copy_of(finished[0], tmp_path, without=["segment*"])
    result = "segmenter.pt"
    command = [*SEGMENT, "--run", run, "--lr", 1e6, "--batch-size", 2, "--epochs", 4]
    if script == "train_cls.py":
        run = tmp_path / "new"
        result = "classifier.pt"
        command = [*AGAIN, "--run", run, "--data", toy, "--lr", 1e6, "--weight-decay", 1e6]
    with pytest.raises(SystemExit) as end:
        stage(*command)
    errors = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert re.search("(L_GEN|L_REG|loss|weights) (is|are) .*lower --lr", errors[-1]), errors
    assert not (run / result).exists()


def test_make_seeds_and_train_seg_in_two_processes(finished, tmp_path):
    """Seeds and segmentation; then other seeds, which replace those."""
    run = copy_of(finished[0], tmp_path, without=["seg*", "train"])
    assert torchrun(*SEEDS, "--run", run) == (0, mock.ANY)
    assert in_two_processes(*SEGMENT, "--run", run) == [0, 0]
    assert len(list((run / "segmentation").glob("*.png"))) == 4
    assert (run / "train/settings.json").read_bytes() == (
        finished[0] / "train/settings.json").read_bytes()
    for path in finished[0].glob("train/maps/*"):               # threads and rounding differ
        one, two = (usage.load_maps(folder / f"train/maps/{path.name}", 5)[1].int()
                    for folder in (finished[0], run))
        assert (one - two).abs().float().mean() < 2
    assert not list(run.rglob("*.partial*"))


def test_of_two_processes_the_one_that_fails_says_why(toy, tmp_path):
    (tmp_path / "file").touch()
    code, errors = torchrun("train_cls.py", "--data", toy, "--backbone", "mobilenet_v2", *SMALL,
                            "--epochs", 1, "--run", tmp_path / "file")
    assert code != 0
    assert re.search("train_cls.py: .*File exists", errors)
    assert "Traceback" not in errors.split("train_cls.py: ")[0]
    assert "in wait_for_all" not in errors


@pytest.mark.parametrize("backbone", ["resnet18", "deit_tiny"])
def test_train_cls_in_two_processes_has_the_losses_of_one(backbone, toy, tmp_path, monkeypatch):
    """Where each image has as many classes, so that each process has as many (image, class)."""
    script = tmp_path / "float32.py"                            # bfloat16 rounds so coarsely that
    script.write_text(                                          # runs part within a few steps
        f"import contextlib, runpy, sys; sys.path[0] = {str(HERE)!r}; import usage\n"
        "usage.fast_autocast = lambda device: contextlib.nullcontext()\n"
        f"runpy.run_path({str(HERE / 'train_cls.py')!r}, run_name='__main__')\n")
    monkeypatch.setattr(usage, "fast_autocast", lambda device: contextlib.nullcontext())
    data = copy_of(toy, tmp_path, "data")
    relabelled(data)
    weights = "none"
    if backbone in usage.CNNS:      # pretrained: BatchNorm is frozen, or each would have its own
        weights = tmp_path / "weights.pth"
        torch.save(torchvision.models.get_model(backbone).state_dict(), weights)
    command = [
        "--data", data, "--backbone", backbone, *SMALL, "--weights", weights, "--epochs", 0,
        "--reg-epochs", 5, "--max-rate", 0, "--no-adaptive", "--lr", 1e-4,
        "--reg-temperature", 0.2, "--teacher-temperature", 0.1]
    stage("train_cls.py", *command, "--run", tmp_path / "one", "--device", "cpu")
    assert in_two_processes(script, *command, "--run", tmp_path / "two") == [0, 0]
    losses = []
    for run in ("one", "two"):
        lines = (tmp_path / run / "classifier.jsonl").read_text().splitlines()
        losses.append([[json.loads(line)[key] for key in ("L_GEN", "L_REG")] for line in lines])
    assert losses[0][-1][1] > 0
    np.testing.assert_allclose(*losses, rtol=5e-3)


def weights_command(toy, tmp_path):
    """A stage 1 from a file of weights, and that file."""
    weights = tmp_path / "weights.pth"
    state = torchvision.models.mobilenet_v2().bfloat16().state_dict(keep_vars=True)
    torch.save(state, weights)
    command = ["train_cls.py", "--data", toy, "--backbone", "mobilenet_v2", *SMALL, "--epochs", 1,
               "--run", tmp_path / "run", "--weights"]
    return command, weights


def test_train_cls_knows_weights_by_their_content(toy, tmp_path, capsys):
    command, weights = weights_command(toy, tmp_path)
    stage(*command, weights)
    before = digest(tmp_path / "run")
    stage(*command, weights)
    assert digest(tmp_path / "run") == before
    stage(*command, shutil.copy(weights, tmp_path / "moved.pth"))
    torch.save(torchvision.models.mobilenet_v2().state_dict(), weights)
    before = digest(tmp_path / "run")
    with pytest.raises(SystemExit):
        stage(*command, weights)
    assert re.search("made with different settings: .*initial", capsys.readouterr().err)
    assert digest(tmp_path / "run") == before


def test_stages_keep_their_results_when_the_file_of_weights_moves(toy, tmp_path):
    command, weights = weights_command(toy, tmp_path)
    stage(*command, weights)
    stage("make_seeds.py", "--run", tmp_path / "run", "--scales", 1, "--workers", 0)
    stage(*command, shutil.move(weights, tmp_path / "moved.pth"))
    stage("eval.py", "--run", tmp_path / "run")


def test_train_cls_has_a_different_l_reg_for_each_row_of_the_ablation(toy, tmp_path):
    losses = set()
    rows = ([], ["--attention"], ["--no-adaptive"], ["--views", "geometric"])
    for number, flags in enumerate(rows):
        run = tmp_path / str(number)
        stage("train_cls.py", "--data", toy, "--run", run, "--backbone", "deit_tiny", *BOTH, *flags)
        records = (run / "classifier.jsonl").read_text().splitlines()
        losses.add(json.loads(records[-1])["L_REG"])
    assert len(losses) == 4
    assert 0 not in losses


def test_learning_rate_is_never_0_and_has_two_cycles():
    for first, steps in ((10, 20), (0, 20), (20, 20), (1, 2)):
        rates = [train_cls.learning_rate(step, first, steps) for step in range(steps)]
        assert min(rates) > 0
        assert max(rates) <= 1
        if first >= 10:
            assert max(rates) > 0.9
        if first not in (0, steps):
            assert max(rates[first:]) <= 0.5


def test_parse_arguments_gives_the_toy_one_recipe_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def parsed(*flags):
        with mock.patch.object(sys, "argv", ["train_cls.py", *flags]):
            return vars(train_cls.parse_arguments())

    usual = parsed()
    assert usual["weights"] == "none"
    assert usual["run"] == Path("runs/toy-resnet50")
    for name in ("toy", "data/toy", "./data/../data/toy/", str(tmp_path / "data/toy")):
        assert parsed("--data", name) | {"data": None} == usual | {"data": None}
    assert parsed("--data", "photos")["weights"] == "imagenet"
    weight = str(train_cls.RECIPES["cnn", "scratch"]["reg_weight"])
    same = ["--temperature", "inf", "--reg-weight", weight, "--seed", "0", "--lr", "1"]
    assert parsed(*same)["run"] == usual["run"]
    others = (["--seed", "1"], ["--seed", "2"], ["--temperature", "3"], ["--no-adaptive"],
              ["--views", "geometric"], ["--backbone", "deit_tiny"], ["--data", "photos"])
    assert len({usual["run"], *(parsed(*flags)["run"] for flags in others)}) == 8
    assert parsed("--views", "geometric")["max_rate"] == 0


@pytest.mark.parametrize("module", [train_cls, make_seeds, train_seg])
def test_take_defaults_fills_in_what_was_not_given(module, capsys):
    kinds = {
        ("resnet101", "none"): ("cnn", "scratch"),
        ("mobilenet_v2", "imagenet"): ("cnn", "pretrained"),
        ("deit_tiny", "none"): ("transformer", "scratch"),
        ("deit_base", "weights.pth"): ("transformer", "pretrained"),
    }
    for (backbone, weights), row in kinds.items():
        recipe = module.RECIPES[row]
        first, *others = recipe
        args = SimpleNamespace(**{first: 17.5}, **dict.fromkeys(others))
        assert usage.take_defaults(args, module.RECIPES, backbone, weights) is recipe
        assert vars(args) == recipe | {first: 17.5}             # what was given stays
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.startswith(f"settings: {first} 17.5, ")
        assert all(f"{key} {recipe[key]}" in printed for key in others)


@pytest.mark.parametrize("script", ["train_cls.py", "make_seeds.py", "train_seg.py", "eval.py"])
def test_command_line_shows_all_flags_and_their_defaults(script, capsys):
    output = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(output):
        with mock.patch.object(sys, "argv", [script, "--help"]):
            runpy.run_path(str(HERE / script), run_name="__main__")
    assert end.value.code == 0
    text = output.getvalue()
    module = {"train_cls.py": train_cls, "make_seeds.py": make_seeds, "train_seg.py": train_seg}
    if script in module:
        recipes = module[script].RECIPES
        for key in next(iter(recipes.values())):
            values = " +".join(re.escape(str(recipe[key])) for recipe in recipes.values())
            assert re.search(rf"--{key.replace('_', '-')} +{values}", text)
    source = (HERE / script).read_text()
    for flag in re.findall(r'add\("(--[a-z-]+)"', source):
        assert flag in text


# ---- Bad input: one line, exit code 2, nothing written or lost -----------------------------------

TRAIN = ["train_cls.py", "--data", "DATA", "--run", "NEW", "--backbone", "mobilenet_v2",
         "--epochs", "1", *SMALL]
GO_ON = [*AGAIN, "--data", "DATA", "--run", "RUN"]
SEED = [*SEEDS, "--run", "RUN", "--data", "DATA"]
IMAGES = ["make_seeds.py", "--run", "RUN", "--images"]
SEG = [*SEGMENT, "--run", "RUN", "--data", "DATA"]
EVAL = ["eval.py", "--run", "RUN", "--data", "DATA"]
PAIRS = ["eval.py", "--truth", "DATA/SegmentationClass", "--pred"]
LIST = "data/ImageSets/Segmentation/train.txt"
CLASSES = "data/classes.txt"
LABELS = "data/labels.json"
PHOTO = "data/JPEGImages/train_0000.jpg"
VAL_PHOTO = "data/JPEGImages/val_0000.jpg"
TWIN = "data/JPEGImages/train_0000.png"
TRUTH = "data/SegmentationClass/train_0000.png"
MAPS = "run/train/maps/train_0000.npz"
PSEUDO = "run/train/pseudo_masks/train_0000.png"
CLASSIFIER = "run/classifier.pt"
SEGMENTER = "run/segmenter.pt"
SETTINGS = "run/settings.json"
OF_SEEDS = "run/train/settings.json"
COCO = "data/coco/annotations/instances_train2014.json"


def both(*spoilers):
    """Do all of it."""
    def spoil(path):
        for one in spoilers:
            one(path)
    return spoil


def gone(*names):
    """These files and folders are not there."""
    def spoil(path):
        for name in names:
            if (path / name).is_dir():
                shutil.rmtree(path / name)
            else:
                (path / name).unlink()
    return spoil


def cut(name):
    """The file ends early."""
    return lambda path: truncated(path / name)


def zeroed(name):
    """The file keeps its size alone, as after a power cut."""
    return lambda path: (path / name).write_bytes(bytes((path / name).stat().st_size))


def longer(name):
    """The file is a different one of the same name."""
    return lambda path: (path / name).write_bytes((path / name).read_bytes() + b".")


def text(name, content, encoding="utf-8"):
    def spoil(path):
        (path / name).unlink(missing_ok=True)
        (path / name).write_text(content, encoding)
    return spoil


def table(name, change=None, **values):
    """A .json file is edited: by a function, or by new values of its keys."""
    if change is None:
        return lambda path: edited(path / name, lambda table: table.update(values))
    return lambda path: edited(path / name, change)


def labels(change):
    """The list of classes of an image is edited."""
    return table(LABELS, lambda table: change(table["train_0000"]))


def picture(name, side=48, mode="L", value=0):
    return lambda path: Image.new(mode, (side, side), value).save(path / name)


def arrays(**contents):
    return lambda path: np.savez(path / MAPS, **contents)


def one_array(path):
    with (path / MAPS).open("wb") as file:
        np.save(file, np.zeros(3))


def damaged(name):
    """Some bytes in the middle are different."""
    def spoil(path):
        content = bytearray((path / name).read_bytes())
        middle = len(content) // 2
        content[middle:middle + 100] = bytes(byte ^ 64 for byte in content[middle:middle + 100])
        (path / name).unlink()
        (path / name).write_bytes(content)
    return spoil


def checkpoint(**state):
    def spoil(path):
        (path / CLASSIFIER).unlink()
        torch.save(state, path / CLASSIFIER)
    return spoil


def retrained(path):
    """The classifier is that of another run."""
    state = usage.load_checkpoint(path / CLASSIFIER, {}, "")
    state["student"]["classifier.bias"] += 1
    checkpoint(**state)(path)


def without_a_setting(path):
    state = usage.load_checkpoint(path / CLASSIFIER, {}, "")
    del state["settings"]["jitter"]
    checkpoint(**state)(path)


def coco_that(change=None, lacks=None):
    """The data has a COCO, whose annotations are edited or which lacks a file or folder."""
    def spoil(path):
        draw_coco(path / "data/coco", path / "data")
        if lacks:
            gone(f"data/coco/{lacks}")(path)
        if change:
            edited(path / COCO, change)
    return spoil


def linked_to_the_truth(path):
    shutil.rmtree(path / "run/train")
    (path / "run/train").symlink_to(path / "data/SegmentationClass")


MAP = np.zeros((1, 48, 48), "u1")
ON_COCO = [*TRAIN, "--data", "DATA/coco"]
OF_VAL = [*SEED, "--split", "val"]

BAD_INPUT = {  # what is wrong: the command, what its line must name, what spoils the data or run
    # -- the data
    "missing data folder": (TRAIN, "data: no such folder", gone("data")),
    "missing data folder, seeds": (SEED, "data/JPEGImages/train_0000.jpg", gone("data")),
    "missing data folder, segmentation": (SEG, "data/JPEGImages/train_0000.jpg", gone("data")),
    "missing list": (TRAIN, "train.txt", gone(LIST)),
    "empty list": (TRAIN, "train.txt: is empty", text(LIST, "\n")),
    "path in a list": (TRAIN, "train.txt", text(LIST, "../../secret\n")),
    "latin-1 in a list": (TRAIN, "as UTF-8", text(LIST, "Käse\n", "latin-1")),
    "UTF-16 in labels": (TRAIN, "labels.json", text(LABELS, "{}", "utf-16")),
    "missing image": (TRAIN, "train.txt: there is no image named train_0000", gone(PHOTO)),
    "missing image, seeds": (SEED, "train_0000.jpg", gone(PHOTO)),
    "missing image, segmentation": (SEG, "val_0000.jpg", gone(VAL_PHOTO)),
    "unreadable image": (TRAIN, "train_0000.jpg", cut(PHOTO)),
    "empty image": (TRAIN, "train_0000.jpg", text(PHOTO, "")),
    "unreadable image in a worker": ([*TRAIN, "--workers", "1"], "train_0000.jpg", cut(PHOTO)),
    "unreadable image, seeds": (SEED, "train_0000.jpg", zeroed(PHOTO)),
    "unreadable image, segmentation": (
        SEG, "train_0000.jpg", both(zeroed(PHOTO), gone(SEGMENTER))),
    "another photograph of that name": (GO_ON, "settings: photographs;", longer(PHOTO)),
    "another photograph of that name, seeds": (SEED, "photographs of train", longer(PHOTO)),
    "another photograph of val, seeds": (OF_VAL, "photographs of val", longer(VAL_PHOTO)),
    "another photograph of that name, segmentation": (SEG, "photographs of train", longer(PHOTO)),
    "another photograph of that name, new segmentation": (
        SEG, "photographs of train", both(longer(PHOTO), gone(SEGMENTER))),
    "another photograph of val, segmentation": (SEG, "photographs of val", longer(VAL_PHOTO)),
    "background as a class": (
        TRAIN, '"background" is label 0', text(CLASSES, "background\na\nb\nc\nd\n")),
    "no labels at all": (TRAIN, "list its classes in labels.json", gone(LABELS)),
    "two images of one name": (TRAIN, "rename one", picture(TWIN)),
    "two photographs of one name": ([*IMAGES, "DATA/JPEGImages"], "rename one", picture(TWIN)),
    "unknown label": (TRAIN, "unicorn", labels(lambda names: names.append("unicorn"))),
    "label that is no name": (
        TRAIN, "image train_0000: ", labels(lambda names: names.append(["cat"]))),
    "a word for a list of labels": (TRAIN, "not a list", table(LABELS, train_0000="")),
    "an object for a list of labels": (
        TRAIN, "not a list", table(LABELS, train_0000={"spotted": False})),
    "nothing for a list of labels": (TRAIN, "not a list", table(LABELS, train_0000=None)),
    "labels of another shape": (TRAIN, "labels.json", text(LABELS, '["cat"]')),
    "image without labels": (
        TRAIN, "image train_0000: ", table(LABELS, lambda table: table.pop("train_0000"))),
    "broken labels": (TRAIN, "labels.json", text(LABELS, "{")),
    "deep labels": (TRAIN, "labels.json", text(LABELS, "[" * 10 ** 5)),
    "no classes at all": (TRAIN, "all images of train have the same classes", table(
        LABELS, lambda table: [names.clear() for names in table.values()])),
    "too many classes": (TRAIN, "at most 254", text(CLASSES, "\n".join(map(str, range(255))))),
    "a class twice": (TRAIN, "classes.txt: 5 names, 4 distinct", text(CLASSES, "a\nb\nc\nd\na\n")),
    "a class twice, any PNGs": (
        [*PAIRS, "RUN/train/seeds", "--classes", "DATA/classes.txt"],
        "5 names, 4 distinct", text(CLASSES, "a\nb\nc\nd\na\n")),
    "labels corrected": (
        GO_ON, "classifier.pt: made with different settings: images", labels(list.clear)),
    "an image left out": (
        GO_ON, "made with different settings: images, photographs", lambda path: text(
            LIST, "\n".join((path / LIST).read_text().split()[1:]))(path)),
    "COCO without photographs": (
        ON_COCO, "train2014: no such folder", coco_that(lacks="train2014")),
    "COCO without a photograph that it lists": (
        ON_COCO, "COCO_val_0002.jpg: missing", coco_that(lacks="val2014/COCO_val_0002.jpg")),
    "COCO of something else": (ON_COCO, "not COCO's instances", coco_that(dict.clear)),
    "COCO's list of nothing": (
        ON_COCO, "not COCO's instances", both(coco_that(), text(COCO, "[]"))),
    "COCO's broken annotations": (
        ON_COCO, "not COCO's instances", both(coco_that(), cut(COCO))),
    "COCO's categories of another shape": (
        ON_COCO, "not COCO's instances", coco_that(lambda table: table.update(categories=[1]))),
    "COCO's image without a name": (ON_COCO, "not COCO's instances", coco_that(
        lambda table: table["images"][0].update(file_name=None))),
    "an object of no image of COCO": (ON_COCO, "not COCO's instances", coco_that(
        lambda table: table["annotations"][0].update(image_id=-1))),
    "too many classes in COCO": (ON_COCO, "at most 254", coco_that(
        lambda table: table["categories"].extend(
            {"id": number, "name": f"class {number}"} for number in range(100, 400)))),
    "other classes for COCO": (ON_COCO, "coco/classes.txt: its names are not", both(
        coco_that(), text("data/coco/classes.txt", "a\nb\n"))),

    # -- the run folder
    "mistyped run": (
        [*SEEDS, "--run", "NEW"], "with your --data and --backbone until it ends, or corr", None),
    "a line's end in a name": ([*SEEDS, "--run", "two\nlines"], "two lines", None),
    "stage 1 not finished": (SEED, "settings.json: No such file", gone(SETTINGS)),
    "settings of stage 1 of another shape": (SEED, "run/settings.json", text(SETTINGS, "[]")),
    "settings of stage 1 of nothing": (SEG, "run/settings.json", text(SETTINGS, "")),
    "settings of stage 1 broken": (EVAL, "run/settings.json", cut(SETTINGS)),
    "settings of stage 1 of zeros": (EVAL, "run/settings.json", zeroed(SETTINGS)),
    "a class threshold that is none": (
        OF_VAL, "settings.json: was edited", table(
            SETTINGS, score_threshold="0.4")),
    "another classifier in settings.json": (
        OF_VAL, "settings.json: was edited", table(SETTINGS, classifier="x")),
    "an unknown backbone in settings.json": (
        SEED, "settings.json: was edited", table(SETTINGS, backbone="resnet34")),
    "another backbone in settings.json": (
        SEED, "settings.json: was edited", table(SETTINGS, backbone="resnet18")),
    "no images.json": (SEED, "images.json", gone("run/images.json")),
    "images.json of another shape": (SEG, "images.json", text("run/images.json", "[]")),
    "images.json of nothing": (EVAL, "images.json", text("run/images.json", "")),
    "images.json of another run": (
        SEED, "images.json: differs from the data that the classifier was",
        table("run/images.json", lambda table: table["train"].popitem())),
    "labels in images.json": (
        SEG, "images.json: differs from the data that the classifier was",
        table("run/images.json", lambda table: table["train"]["train_0000"][1].clear())),
    "classes in images.json": (
        EVAL, "images.json: differs from the data that the classifier was",
        table("run/images.json", classes=None)),
    "no checkpoint": (SEED, "classifier.pt", text(CLASSIFIER, "text")),
    "empty checkpoint": (GO_ON, "classifier.pt", text(CLASSIFIER, "")),
    "checkpoint of another version": (
        GO_ON, "classifier.pt: made with different settings: jitter", without_a_setting),
    "damaged checkpoint, training": (GO_ON, "classifier.pt: is damaged", damaged(CLASSIFIER)),
    "damaged checkpoint, seeds": (SEED, "classifier.pt: is damaged", damaged(CLASSIFIER)),
    "damaged checkpoint, segmentation": (SEG, "segmenter.pt: is damaged", damaged(SEGMENTER)),
    "checkpoint of something else": (
        SEG, "classifier.pt: student is missing", checkpoint(weights=torch.zeros(3))),
    "checkpoint of something else, training": (
        GO_ON, "classifier.pt: settings is missing", checkpoint(settings=[1])),
    "checkpoint of a tensor": (GO_ON, "classifier.pt: expected an object", lambda path: (
        (path / CLASSIFIER).unlink(), torch.save(torch.zeros(3), path / CLASSIFIER))),
    "another classifier": (SEED, "classifier.pt: is not the classifier of sett", retrained),
    "another classifier, segmentation": (
        SEG, "classifier.pt: is not the classifier of settings.json", retrained),
    "checkpoint of another backbone": (
        [*GO_ON, "--backbone", "resnet18"], "made with different settings: backbone", None),
    "training with another lr": ([*GO_ON, "--lr", "0.1"], "made with different settings: lr", None),

    # -- seeds and segmentation
    "seeds in the folder of the truth": (SEED, "run/train: is in the way", linked_to_the_truth),
    "segmentation without classifier": (SEG, "the same train_cls.py command", gone(CLASSIFIER)),
    "segmentation without seeds": (SEG, "run make_seeds.py", gone("run/train")),
    "lost pseudo mask": (SEG, "train_0000.png: missing; run make_seeds.py", gone(PSEUDO)),
    "empty pseudo mask": (
        SEG, "rerun the stage that makes it", both(text(PSEUDO, ""), gone(SEGMENTER))),
    "other pseudo masks": (
        SEG, "segmenter.pt: made with different settings: pseudo_masks", picture(PSEUDO)),
    "a pseudo mask emptied": (
        SEG, "segmenter.pt: made with different settings: pseudo_masks", text(PSEUDO, "")),
    "other pseudo masks than its own": (
        [*SEG, "--pseudo-masks", "RUN/train/seeds"],
        "segmenter.pt: made with different settings: pseudo_masks, seeds",
        picture("run/train/seeds/train_0000.png", value=1)),
    "pseudo mask of another size": (
        SEG, "train_0000.png: is 20x20", both(picture(PSEUDO, 20), gone(SEGMENTER))),
    "pseudo masks of another classifier": (
        SEG, "run/train: made with a different classifier; run make_seeds.py",
        table(OF_SEEDS, lambda table: table["classifier"].update(classifier="0"))),
    "pseudo masks of other labels": (
        SEG, "run/train: made with a different classifier; run make_seeds.py",
        table(OF_SEEDS, lambda table: table["classifier"].update(images="0"))),
    "pseudo masks not there": (
        [*SEG, "--pseudo-masks", "RUN/other"], "run/other: no such folder", None),
    "seeds made with nobody knows what": (SEG, "run make_seeds.py", gone(OF_SEEDS)),
    "segmenter of other seeds": (
        SEG, "segmenter.pt: made with different settings: seeds", table(OF_SEEDS, threshold=0.3)),
    "segmenter of another lr": ([*SEG, "--lr", "0.1"], "made with different settings: lr", None),
    "learning from the truth": (
        [*SEG, "--pseudo-masks", "DATA/SegmentationClass"], "folder of the true masks", None),

    # -- eval.py
    "evaluation of nothing": (["eval.py", "--run", "NEW"], "run train_cls.py", None),
    "evaluation before seeds": (
        EVAL, "nothing to measure; run make_seeds.py", gone("run/train", "run/segmentation")),
    "settings of another shape": (EVAL, "train/settings.json", text(OF_SEEDS, "[]")),
    "settings of nothing": (EVAL, "train/settings.json", text(OF_SEEDS, "")),
    "settings of zeros": (EVAL, "train/settings.json", zeroed(OF_SEEDS)),
    "no settings": (EVAL, "remove", gone(OF_SEEDS)),
    "settings without a threshold": (
        EVAL, "threshold is missing", table(OF_SEEDS, lambda table: table.pop("threshold"))),
    "settings of a segmentation without a word": (
        EVAL, "segmentation/settings.json: refine", text(
            "run/segmentation/settings.json", '{"classifier": {}}')),
    "mask of another size": (EVAL, "train_0000.png: is 20x20", picture(TRUTH, 20)),
    "mask value beyond the classes": (EVAL, "value 6", picture(TRUTH, value=6)),
    "mask in colour": (EVAL, "RGB", picture(TRUTH, mode="RGB")),
    "half a segmentation": (
        EVAL, "val_0000.png: ", cut("run/segmentation/val_0000.png")),
    "lost segmentation": (
        EVAL, "rerun the stage that makes it", gone("run/segmentation/val_0000.png")),
    "evaluation without maps": ([*EVAL, "--sweep"], "maps/train_0000.npz", gone(MAPS)),
    "empty maps": (EVAL, "train_0000.npz: ", text(MAPS, "")),
    "maps cut short": (EVAL, "train_0000.npz: ", cut(MAPS)),
    "maps that lost half": (
        EVAL, "train_0000.npz: ", arrays(classes=np.arange(1), maps=MAP)),
    "maps of another shape": (EVAL, "train_0000.npz: arrays of the wrong shape", arrays(
        classes=np.arange(3), maps=MAP, refined=MAP)),
    "maps of unknown classes": (EVAL, "train_0000.npz: unknown classes", arrays(
        classes=np.array([77]), maps=MAP, refined=MAP)),
    "maps of one dimension": (EVAL, "train_0000.npz: arrays of the wrong shape", arrays(
        classes=np.arange(1), maps=MAP[0, 0], refined=MAP[0, 0])),
    "maps of words": (EVAL, "train_0000.npz: ", arrays(
        classes=np.array(["cat"]), maps=MAP, refined=MAP)),
    "maps of something else": (EVAL, "train_0000.npz: ", arrays(x=3)),
    "maps that are one array": (EVAL, "train_0000.npz: ", one_array),
    "a sweep of two folders": (
        [*PAIRS, "RUN/train/seeds", "--sweep"], "without --run, --data or --sweep", None),
    "class names for a run": (
        [*EVAL, "--classes", "DATA/classes.txt"], "--classes goes with them only", None),
    "one folder to compare": (["eval.py", "--truth", "DATA"], "go together", None),
    "comparing the truth with itself": (
        [*PAIRS, "DATA/SegmentationClass"], "are the same folder", None),
    "nothing to compare": ([*PAIRS, "DATA/JPEGImages"], "no .png", None),
    "void in a prediction": (
        [*PAIRS, "RUN/train/pseudo_masks", "--classes", "DATA/classes.txt"], "contains void",
        picture(PSEUDO, value=255)),

    # -- flags
    "folder without photographs": (
        [*IMAGES, "DATA/SegmentationClass/.."], "or no .jpg or .jpeg or .png", None),
    "no folder of photographs": ([*IMAGES, "nowhere"], "nowhere: no such folder", None),
    "weights of another backbone": (
        [*TRAIN, "--weights", "DATA/resnet.pth"], "not a state dict of mobilenet_v2",
        lambda path: torch.save({"layer1.weight": torch.zeros(3)}, path / "data/resnet.pth")),
    "weights of a run": (
        [*TRAIN, "--weights", "RUN/classifier.pt"], "pass", None),
    "no weights file": ([*TRAIN, "--weights", "nowhere.pth"], "nowhere.pth", None),
    "a split that is none": ([*SEED, "--split", "../Main/val"], "invalid choice", None),
    "too many workers": (
        [*TRAIN, "--workers", "1000"], "--workers: 1000: use a whole number from 0 to", None),
    "no such device": ([*TRAIN, "--device", "cuda:7"], "--device cuda:7", None),
    "no such device, seeds": ([*SEED, "--device", "tpu"], "--device tpu", None),
    "no real device": ([*TRAIN, "--device", "meta"], "--device meta", None),
    "batch larger than the data": ([*TRAIN, "--batch-size", "50"], "8 images", None),
    "batch larger than the pseudo masks": ([*SEG, "--batch-size", "50"], "8 images", None),
    "batch of one": (
        [*TRAIN, "--batch-size", "1", "--size", "16"],
        "--batch-size: 1: use a whole number from 2", None),
    "endless seed": (
        [*TRAIN, "--seed", str(2 ** 70)], "use a whole number from 0 to 4294967296", None),
    "unknown backbone": ([*TRAIN, "--backbone", "foo"], "invalid choice: 'foo'", None),
    "unknown flag": ([*SEED, "--foo"], "--foo", None),
    "download to nowhere": (["train_cls.py", "--download"], "--data FOLDER", None),
    "nothing to train": ([*TRAIN, "--epochs", "0"], "nothing to train", None),
    "attention of a CNN": ([*TRAIN, "--attention"], "--attention", None),
    "affinity of a CNN": ([*SEED, "--affinity"], "--affinity", None),
    "images and a split": ([*IMAGES, "DATA", "--split", "val"], "not both", None),
    "images and the usual split": ([*IMAGES, "DATA", "--split", "train"], "not both", None),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line(case, toy, finished, tmp_path, monkeypatch, capsys):
    command, expected, spoil = BAD_INPUT[case]
    data = copy_of(toy, tmp_path, "data")
    run = copy_of(finished[0], tmp_path)
    if spoil:
        spoil(tmp_path)
    before = digest(tmp_path)
    places = {"DATA": str(data), "RUN": str(run), "NEW": str(tmp_path / "new")}
    for word, place in places.items():
        command = [part.replace(word, place) for part in command]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        stage(*command)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert expected in lines[0]
    assert "train_aug" not in lines[0]
    after = digest(tmp_path)
    lost = {path for path, content in before.items() if after.get(path) != content}
    assert not lost, "something is lost or changed"
    written = {path for path in after if path not in before}
    assert all(any(part.endswith(".partial") for part in path.parts) for path in written), written


WRONG = {"missing": None, "null": None, "word": "x", "list": [], "object": {}}


@pytest.mark.parametrize("name", ["settings.json", "images.json"])
def test_read_run_refuses_edited_tables(name, finished, tmp_path):
    """Each key missing or of another kind: one error, which names the file."""
    run = tmp_path / "run"
    run.mkdir()
    for path in ("settings.json", "images.json"):
        shutil.copy(finished[0] / path, run)
    whole = read(run / name)
    used = {"backbone": str, "weights": str, "size": int, "jitter": float, "weight_decay": float,
            "temperature": float, "attention": bool, "score_threshold": float, "images": str,
            "photographs": dict, "classifier": str}
    if name == "images.json":
        used = {key: type(value) for key, value in whole.items()}
    for key, kind in used.items():
        for what, value in WRONG.items():
            wrong = whole | {key: value}
            if what == "missing":
                del wrong[key]
            elif isinstance(value, kind) and (name, kind) != ("images.json", dict):
                continue                                        # of the right kind: not here
            (run / name).write_text(json.dumps(wrong))
            with pytest.raises(usage.InputError, match=f"run/{name}: "):
                usage.read_run(run)
    for content in ("", "{", "[]", "{}", "null", "5", '"x"', "\0\0", "[" * 10 ** 5):
        (run / name).write_text(content)
        with pytest.raises(usage.InputError, match=f"run/{name}: "):
            usage.read_run(run)
    (run / name).write_bytes(b"\xff\xfe{}")
    with pytest.raises(usage.InputError, match=f"run/{name}: "):
        usage.read_run(run)


@pytest.mark.parametrize("values", [
    {"classifier": "x"}, {"images": "x"}, {"size": 0}, {"size": True}, {"size": 65}, {"jitter": -1},
    {"jitter": math.nan}, {"weight_decay": -1}, {"weight_decay": math.nan}, {"temperature": -1},
    {"temperature": math.nan}, {"temperature": 0}, {"attention": True}, {"photographs": {}},
    {"score_threshold": math.nan}, {"score_threshold": math.inf}, {"score_threshold": 10 ** 400}],
    ids=lambda values: str(values)[:30])
def test_load_classifier_refuses_settings_that_were_edited(values, finished, tmp_path):
    """Each of these would end in a traceback later, or silently in results of other settings."""
    run = copy_of(finished[0], tmp_path)
    edited(run / "settings.json", lambda table: table.update(values))
    with pytest.raises(usage.InputError, match="run/"):
        settings, data = usage.read_run(run)
        usage.load_classifier(run, settings, len(data["classes"]))


@pytest.mark.parametrize("name", ["train", "val", "segmentation"])
def test_stages_never_end_in_a_traceback_after_settings_of_results_were_edited(
        name, finished, tmp_path, monkeypatch):
    run = copy_of(finished[0], tmp_path)
    if name == "val":                                           # of the same kind
        shutil.copytree(run / "train", run / "val")
    settings, data = usage.read_run(run)
    truth = usage.true_masks(data, "train")
    counts = evaluation.count_maps(run / "train", truth, 5)     # once, as it takes time
    monkeypatch.setattr(evaluation, "count_maps", lambda *arguments: counts)
    monkeypatch.setattr(evaluation, "compare", lambda *arguments: sum(counts["seeds"]))
    path = run / name / "settings.json"
    whole = read(path)
    contents = ["", "{", "[]", "{}", "null", "5", "\0"]
    for key in whole:
        for what, value in WRONG.items():
            wrong = whole | {key: value}
            if what == "missing":
                del wrong[key]
            contents.append(json.dumps(wrong))
    contents += [json.dumps(whole | {"threshold": value})
                 for value in (-1, 2, math.nan, math.inf, True)]
    args = SimpleNamespace(run=run, data=None, pseudo_masks=None)
    for content in contents:
        path.write_text(content)
        with contextlib.suppress(usage.InputError):
            for entry in evaluation.measure_run(run, None, False):
                evaluation.show(entry)
        with contextlib.suppress(usage.InputError):
            train_seg.find_pseudo_masks(args, data, settings)


@pytest.mark.parametrize("script", [train_cls, make_seeds, train_seg])
def test_number_flags_take_finite_numbers_in_their_range(script):
    source = inspect.getsource(script)
    flags = re.findall(r'add\("(--[a-z-]+)", (?:dest="[a-z_]+", )?type=number', source)
    assert len(flags) > 3
    for flag in flags:
        for value in ("nan", "inf", "-1", "1e999", "two"):
            if flag == "--temperature" and value in ("inf", "1e999"):
                continue
            with mock.patch.object(sys, "argv", ["script", flag, value]):
                with pytest.raises(usage.InputError, match=value):
                    script.main()


def test_train_cls_into_a_folder_that_cannot_be_made(toy, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    command = [part.replace("DATA", str(toy)) for part in TRAIN]
    with pytest.raises(SystemExit) as end:
        stage(*[part.replace("NEW", str(tmp_path / "file/run")) for part in command])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert len(message.splitlines()) == 1
    assert re.search("file/run': once this is fixed, run the same command again", message)


def test_start_processes_without_torchrun_starts_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")                             # as some clusters set them
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = runpy.run_path(str(HERE / "usage.py"))
    assert (names["RANK"], names["WORLD"]) == (0, 1)
    assert names["start_processes"]("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()


def test_start_processes_gives_a_cuda_device_its_number(monkeypatch):
    """set_device takes no other; here without CUDA, by torch's own check."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(*size))
    monkeypatch.setattr(torch.cuda, "set_device", torch.cuda._utils._get_device_index)
    for device in ("auto", "cuda"):
        assert usage.start_processes(device) == torch.device("cuda:0")
    assert usage.start_processes("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(usage, "WORLD", 2)
    with pytest.raises(usage.InputError, match="each process takes a card of its own"):
        usage.start_processes("cuda:1")


# ---- Faults that users of similar projects reported ----------------------------------------------


def fails(capsys, *command):
    """The one line that a stage ends with, instead of a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        stage(*command)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


def noise(width, height):
    """A smooth photograph, which is quickly written."""
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


# ---- Memory

OUT_OF_SHARED_MEMORY = [            # the words of torch 2.4 to 2.14
    "unable to allocate shared memory(shm) for file </torch_7593_1414_0>: No space left on device "
    "(28)",
    "unable to write to file </torch_7593_1414_0>: No space left on device (28)",
    "unable to mmap 2359296 bytes from file </torch_7593_1414_0>: Cannot allocate memory (12)",
    "DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit.",
    "DataLoader worker (pid(s) 77) exited unexpectedly",
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
    "last):\n  File \"a.py\", line 1\nRuntimeError: unable to open shared memory object "
    "</torch_7_1_0> in read-write mode: No space left on device (28)",
]


@pytest.mark.parametrize("words", OUT_OF_SHARED_MEMORY)
def test_one_line_errors_name_two_remedies_for_a_small_shared_memory(words, capsys):
    with pytest.raises(SystemExit) as end, usage.one_line_errors("run it again"):
        raise RuntimeError(words)
    line, = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert "--workers 0" in line
    assert "--shm-size" in line


def test_one_line_errors_leave_other_errors_of_torch_alone():
    with pytest.raises(RuntimeError, match="size of tensor"), usage.one_line_errors("run it again"):
        torch.zeros(2) + torch.zeros(3)


def test_whole_photographs_arrive_or_fail_where_there_is_no_shared_memory(tmp_path, monkeypatch):
    """torch pickles what a worker returns in a thread whose errors nobody sees: an endless wait."""
    def full(*_):
        raise RuntimeError(OUT_OF_SHARED_MEMORY[0])

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)       # workers inherit it
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    noise(60, 40).save(tmp_path / "a.png")
    photographs = usage.WholePhotographs([tmp_path / "a.png"])
    loader = photographs.loader(1)
    loader.timeout = 5
    try:
        (image, size), = loader
    except RuntimeError as error:
        assert "timed out" not in str(error)
        assert "--shm-size" in usage.memory_error(error)
    else:
        assert tuple(size) == (40, 60)


def test_whole_photographs_of_every_format_leave_a_worker(tmp_path):
    """What a format tells beside its pixels, which is pickled with them, must be no obstacle."""
    photo = noise(40, 30)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("a", "ä", "de", "b")
    extras = {
        "a.jpg": {"exif": exif((0x011A, 5, 1, bytes(4)), turn_by(6)), "dpi": (72, 72),
                  "icc_profile": b"x", "comment": b"a"},
        "b.png": {"pnginfo": text, "dpi": (72.5, 72.5), "exif": exif(turn_by(3))},
        "c.tif": {"dpi": (72.3, 1e-3), "description": "ä", "compression": "tiff_lzw"},
        "d.webp": {"exif": exif(turn_by(3)), "xmp": b"x"},
        "e.gif": {"comment": b"a", "duration": 3},
        "f.bmp": {"dpi": (72, 72)},
    }
    for name, options in extras.items():
        photo.save(tmp_path / name, **options)
    photo.save(tmp_path / "g.jpg", "MPO", save_all=True, append_images=[photo])
    loader = usage.WholePhotographs(sorted(tmp_path.iterdir())).loader(2)
    loader.timeout = 10
    assert [tuple(size) for _, size in loader] == [(40, 30)] + 6 * [(30, 40)]


def mounts():
    """Whether this user may give a process a /dev/shm of its own."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    if not shutil.which("unshare"):
        return False
    return subprocess.run(command, capture_output=True).returncode == 0


def test_make_seeds_never_hangs_where_shared_memory_is_small(finished, tmp_path):
    """A megabyte instead of Docker's 64, and a photograph of 1 instead of 12 megapixels."""
    if not mounts():
        pytest.skip("only root can mount a small /dev/shm")
    run = copy_of(finished[0], tmp_path)
    (tmp_path / "photos").mkdir()
    noise(1400, 1000).save(tmp_path / "photos/large.jpg")
    stage_two = [
        sys.executable, HERE / "make_seeds.py", "--run", run, "--images", tmp_path / "photos",
        "--workers", 1, "--scales", 1, "--no-flip"]
    script = "mount -t tmpfs -o size=1m tmpfs /dev/shm; exec " + shlex.join(map(str, stage_two))
    process = subprocess.Popen(
        ["unshare", "-m", "bash", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=60)             # 15 to 24 s on two busy cores
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 2:
        line, = errors.strip().splitlines()
        assert "--workers 0" in line
        assert "--shm-size" in line
    else:
        assert process.returncode == 0, errors
        mask = usage.read_mask(run / "images-photos/seeds/large.png", (1000, 1400), 5)
        assert mask.shape == (1000, 1400)


def test_map_size_keeps_the_shape_within_the_bound():
    assert usage.map_size((768, 1024)) == (768, 1024)
    assert usage.map_size((3024, 4032)) == (768, 1024)
    assert usage.map_size((8064, 6048)) == (1024, 768)
    assert usage.map_size((1, 10**5)) == (1, 1024)
    assert usage.map_size((1, 1)) == (1, 1)


def test_resized_labels_repeats_pixels_evenly():
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    big = usage.resized_labels(labels, (4, 9))
    assert big.tolist() == 2 * [[1, 1, 1, 2, 2, 2, 3, 3, 3]] + 2 * [[4, 4, 4, 5, 5, 5, 6, 6, 6]]
    assert torch.equal(usage.resized_labels(labels, [2, 3]), labels)
    uneven = usage.resized_labels(labels, (5, 7))
    for i, j in np.ndindex(5, 7):
        assert uneven[i, j] == labels[int(i * 2 / 5), int(j * 3 / 7)]


def test_make_seeds_bounds_maps_and_eval_measures_whole_photographs(
        finished, toy, tmp_path, monkeypatch):
    """As with photographs above MAP_SIDE, by a smaller MAP_SIDE."""
    monkeypatch.setattr(usage, "MAP_SIDE", 20)
    run = copy_of(finished[0], tmp_path, without=["segmentation"])
    stage(*SEEDS, "--run", run, "--threshold", 0.3)
    for name in train_cls.read_voc(toy)["train"]:
        classes, maps, refined = usage.load_maps(run / f"train/maps/{name}.npz", 5)
        assert maps.shape == refined.shape == (len(classes), 20, 20)
        for kind in ("seeds", "pseudo_masks"):
            mask = usage.read_mask(run / f"train/{kind}/{name}.png", (48, 48), 5)
            assert torch.equal(mask[::12, ::12], mask[1::12, 1::12])        # 2.4 pixels of a map's
    stage("eval.py", "--run", run)
    seeds, _ = json.loads((run / "report.json").read_text())
    pairs = [(run / f"train/seeds/{name}.png", toy / f"SegmentationClass/{name}.png")
             for name in train_cls.read_voc(toy)["train"]]
    assert seeds["mIoU"] == pytest.approx(slow_miou(pairs))


def slow_miou(pairs):
    """The mean IoU over the classes of the truth, of pairs of PNGs (prediction, truth)."""
    predicted, true = (np.concatenate([np.array(Image.open(path)).flatten() for path in paths])
                       for paths in zip(*pairs))
    predicted = predicted[true != 255]
    true = true[true != 255]
    scores = []
    for c in np.unique(true):
        both = ((predicted == c) & (true == c)).sum()
        either = ((predicted == c) | (true == c)).sum()
        scores.append(both / either)
    return np.mean(scores)


def test_train_seg_labels_large_photographs_in_their_own_size(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "MAP_SIDE", 20)
    run = copy_of(finished[0], tmp_path, without=["segmentation"])
    stage(*SEGMENT, "--run", run)
    for k in range(4):
        usage.read_mask(run / f"segmentation/val_000{k}.png", (48, 48), 5)


def test_save_contact_sheet_needs_no_memory_for_large_photographs(tmp_path):
    """Of 6 megapixels: NumPy's memory, which for 48 megapixels was 5 GB."""
    for kind in ("seeds", "pseudo_masks", "maps"):
        (tmp_path / kind).mkdir()
    noise(3000, 2000).save(tmp_path / "a.jpg")
    levels = torch.randint(0, 256, (2, 20, 30), dtype=torch.uint8)
    make_seeds.write_results(
        tmp_path, "a", (2000, 3000), torch.tensor([0, 1]), levels, levels, 0.4)
    truth = {"a": tmp_path / "seeds/a.png"}
    tracemalloc.start()
    make_seeds.save_contact_sheet(tmp_path, ["cat", "dog"], {"a": tmp_path / "a.jpg"}, truth)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


# ---- True masks that do not fit the labels


def remasked(toy, folder, change, split=""):
    """A copy of the toy with other true masks: change (H, W) -> (H, W) uint8."""
    data = Path(shutil.copytree(toy, folder / "data"))
    for path in data.glob(f"SegmentationClass/{split}*.png"):
        usage.save_mask(path, change(np.array(Image.open(path))))
    return data


WITHOUT_OBJECTS = {
    "0 and 255": lambda mask: np.where(mask > 0, usage.VOID, 0),
    "all void": lambda mask: np.full_like(mask, usage.VOID),
    "all background": lambda mask: np.zeros_like(mask),
}


@pytest.mark.parametrize("case", WITHOUT_OBJECTS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_eval_refuses_true_masks_without_any_class(case, split, finished, toy, tmp_path, capsys):
    data = remasked(toy, tmp_path, WITHOUT_OBJECTS[case], split)
    run = copy_of(finished[0], tmp_path)
    before = (run / "report.json").read_bytes()
    line = fails(capsys, "eval.py", "--run", run, "--data", data, "--sweep")
    assert "the true masks have no pixel of any class" in line
    assert str(data / "SegmentationClass") in line
    assert (run / "report.json").read_bytes() == before


def test_eval_refuses_a_folder_of_true_masks_without_any_class(finished, toy, tmp_path, capsys):
    data = remasked(toy, tmp_path, WITHOUT_OBJECTS["0 and 255"])
    line = fails(capsys, "eval.py", "--pred", finished[0] / "train/seeds", "--truth",
                 data / "SegmentationClass", "--classes", toy / "classes.txt")
    assert "write class numbers, 1 for the first class" in line


def test_train_seg_refuses_pseudo_masks_without_any_class(finished, toy, tmp_path, capsys):
    data = remasked(toy, tmp_path, WITHOUT_OBJECTS["0 and 255"])
    masks = shutil.move(data / "SegmentationClass", tmp_path / "own")
    line = fails(capsys, *SEGMENT, "--run", copy_of(finished[0], tmp_path), "--pseudo-masks", masks)
    assert "no mask has a pixel of any class" in line


def test_eval_warns_of_named_classes_that_the_true_masks_lack(finished, toy, tmp_path):
    """All objects are drawn as the first class, as by an export for "object or not"."""
    data = remasked(toy, tmp_path, lambda mask: mask > 0)
    run = copy_of(finished[0], tmp_path)
    output = stage("eval.py", "--run", run, "--data", data)
    lacking = ", ".join(list(train_cls.TOY_CLASSES)[1:])
    assert f"warning: labels name {lacking}, but the true masks in {data}" in output
    assert "warning" not in finished[1][3]                      # of the right masks


def test_eval_warns_of_named_classes_of_val(finished, toy, tmp_path):
    data = remasked(toy, tmp_path, lambda mask: mask > 0, "val")
    run = copy_of(finished[0], tmp_path, without=["train"])
    named = {label for _, labels in train_cls.read_voc(toy)["val"].values() for label in labels}
    output = stage("eval.py", "--run", run, "--data", data)
    assert "warning: labels name" in output
    assert all(label in output.split("but the true")[0] for label in named - {"striped"})


def test_prepare_data_warns_of_classes_that_no_label_names(toy, tmp_path, capsys):
    """labelme's file of classes begins with two that are not."""
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    names = ["__ignore__", *train_cls.TOY_CLASSES, "unicorn"]
    (data / "classes.txt").write_text("\n".join(names))
    train_cls.prepare_data(data, False)
    assert "warning: no image of train has __ignore__, unicorn\n" in capsys.readouterr().out
    train_cls.prepare_data(toy, False)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("word", [
    "background", "Background", "_background_", "__background__", "BACKGROUND", " _Background",
    "back_ground"])
def test_read_classes_refuses_the_background_in_every_spelling(word, tmp_path):
    (tmp_path / "classes.txt").write_text(f"{word}\ncat\n")
    with pytest.raises(usage.InputError, match="is label 0, not a class; remove its line"):
        usage.read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("background noise\ncat\n")
    assert usage.read_classes(tmp_path / "classes.txt") == ["background noise", "cat"]


# ---- Photographs that are stored turned


def exif(*entries, order="<", count=None, tail=b""):
    """EXIF of one directory. entries: (tag, type, count, four bytes), written as they are."""
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    length = struct.pack(f"{order}H", len(entries) if count is None else count)
    return b"Exif\0\0" + start + length + body + bytes(4) + tail


def turn_by(orientation):
    return (0x0112, 3, 1, struct.pack("<HH", orientation, 0))


def as_viewed(pixels, orientation):
    """(H, W, ...) stored -> as a viewer shows it, by the words of the EXIF standard."""
    row_0_and_column_0 = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}
    row, column = row_0_and_column_0[orientation]
    if row in ("left", "right"):
        pixels = pixels.swapaxes(0, 1)                          # the stored rows are columns
        row, column = column, row
    if row == "bottom":
        pixels = pixels[::-1]
    if column == "right":
        pixels = pixels[:, ::-1]
    return pixels


STORED = np.zeros((72, 120, 3), np.uint8)                       # three objects, off the middle
BOXES = {1: (slice(8, 32), slice(8, 48)), 2: (slice(40, 56), slice(16, 80)),
         usage.VOID: (slice(16, 64), slice(88, 112))}
for channel, box in enumerate(BOXES.values()):
    STORED[(*box, channel)] = 255


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])      # Pillow turns a TIFF itself
def test_read_image_turns_every_format_upright_once(ending, tmp_path):
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}.{ending}"
        Image.fromarray(STORED).save(path, exif=exif(turn_by(orientation)), quality=95)
        expected = as_viewed(STORED, orientation)
        pixels = np.asarray(usage.read_image(path))
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected.astype(float)).mean() < 9


BROKEN_EXIF = {     # (EXIF, whether its orientation of 6 can be read)
    "a rational for a text": (
        exif((0x010E, 5, 1, struct.pack("<I", 38)), turn_by(6), tail=struct.pack("<II", 1, 0)),
        True),
    "a unit of 70000": (exif((0x0128, 4, 1, struct.pack("<I", 70000)), turn_by(6)), True),
    "a pointer to -1": (exif((0x8769, 9, 1, struct.pack("<i", -1)), turn_by(6)), True),
    "a pointer beyond the end": (exif((0x8769, 4, 1, b"\xff\xff\xff\xff"), turn_by(6)), True),
    "a pointer to itself": (exif((0x8769, 4, 1, struct.pack("<I", 8)), turn_by(6)), True),
    "a text for a pointer": (exif((0x8769, 2, 4, b"abc\0"), turn_by(6)), True),
    "GPS beyond the end": (exif((0x8825, 4, 1, struct.pack("<I", 10**6)), turn_by(6)), True),
    "more entries than there are": (exif(turn_by(6), count=50), True),
    "big-endian": (exif((0x0112, 3, 1, struct.pack(">HH", 6, 0)), order=">"), True),
    "LONG": (exif((0x0112, 4, 1, struct.pack("<I", 6))), True),
    "no entries": (exif(turn_by(6), count=0), False),
    "orientation 0": (exif(turn_by(0)), False),
    "orientation 9": (exif(turn_by(9)), False),
    "orientation as text": (exif((0x0112, 2, 2, b"6\0\0\0")), False),
    "orientation of no type": (exif((0x0112, 77, 1, b"\6\0\0\0")), False),
    "orientation of no value": (exif((0x0112, 3, 0, b"\6\0\0\0")), False),
    "orientation not a number": (exif((0x0112, 11, 1, struct.pack("<f", math.nan))), False),
    "orientation beyond the end": (exif((0x0112, 5, 1, struct.pack("<I", 99999))), False),
    "cut in an entry": (exif(turn_by(6))[:20], False),
    "cut in the header": (exif(turn_by(6))[:10], False),
    "nothing": (b"Exif\0\0", False),
    "noise": (b"Exif\0\0" + b"\x93" * 60, False),
}


@pytest.mark.filterwarnings("ignore")       # Pillow's, of the EXIF
@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_read_image_takes_photographs_whose_exif_is_broken(case, tmp_path):
    content, is_turned = BROKEN_EXIF[case]
    path = tmp_path / "a.jpg"
    Image.fromarray(STORED).save(path, exif=content, quality=95)
    expected = as_viewed(STORED, 6 if is_turned else 1)
    pixels = np.asarray(usage.read_image(path))
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected.astype(float)).mean() < 9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_check_turns_counts_what_read_image_turns(case, tmp_path, capsys):
    content, is_turned = BROKEN_EXIF[case]
    Image.fromarray(STORED).save(tmp_path / "a.jpg", exif=content)
    evaluation.check_turns([tmp_path / "a.jpg"])
    assert ("warning: 1 photographs" in capsys.readouterr().out) == is_turned


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("drawn_on", ["stored", "upright"])
def test_find_truth_turns_outlines_of_coco_like_their_photographs(drawn_on, tmp_path):
    """Each object with itself: where the photograph has its colour and where the mask says it is.

    Outlines on the upright photograph are known by the size, which turns by a quarter change.
    """
    orientations = range(1, 9) if drawn_on == "stored" else (1, 5, 6, 7, 8)
    (tmp_path / "annotations").mkdir()
    categories = [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}]
    for split in ("train", "val"):
        (tmp_path / f"{split}2014").mkdir()
        images = []
        annotations = []
        for turn in orientations:
            file = f"{split}_{turn}.jpg"
            photograph = Image.fromarray(STORED)
            photograph.save(
                tmp_path / f"{split}2014/{file}", exif=exif(turn_by(turn)), quality=95,
                subsampling=0)
            shown = STORED if drawn_on == "stored" else as_viewed(STORED, turn)
            height, width, _ = shown.shape
            images.append({"id": turn, "file_name": file, "height": height, "width": width})
            for channel, label in enumerate(BOXES):
                inside = shown[..., channel] > 0
                outline = {"size": [height, width], "counts": slow_runs(inside)}
                if label == 1:                                  # the others as runs
                    y, x = np.nonzero(inside)
                    left, right = int(x.min()), int(x.max()) + 1
                    top, bottom = int(y.min()), int(y.max()) + 1
                    outline = [[left, top, right, top, right, bottom, left, bottom]]
                annotations.append({
                    "image_id": turn, "category_id": 9 if label == 2 else 5,
                    "iscrowd": int(label == usage.VOID), "area": int(inside.sum()),
                    "segmentation": outline})
        table = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"annotations/instances_{split}2014.json").write_text(json.dumps(table))
    data = train_cls.read_coco(tmp_path)
    for split in ("train", "val"):
        truth = evaluation.find_truth(data, split, tmp_path)
        assert list(truth) == [f"{split}_{turn}" for turn in orientations]
        for name, path in truth.items():
            photograph = np.asarray(usage.read_image(tmp_path / data[split][name][0]))
            mask = usage.read_mask(path, photograph.shape[:2], 2).numpy()
            for channel, label in enumerate(BOXES):
                assert iou(photograph[..., channel] > 127, mask == label) > 0.95, (name, label)


def test_eval_says_how_masks_must_lie_where_photographs_are_stored_turned(finished, toy, tmp_path):
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    for name, turn in (("train_0000", 3), ("train_0001", 6), ("val_0002", 2), ("val_0003", 1)):
        path = data / f"JPEGImages/{name}.jpg"
        Image.open(path).save(path, exif=exif(turn_by(turn)))
    output = stage("eval.py", "--run", copy_of(finished[0], tmp_path), "--data", data)
    assert "warning: 2 photographs have an EXIF orientation; their true masks must be" in output
    assert "warning: 1 photographs" in output
    assert "EXIF" not in finished[1][3]


NO_AREA = {
    "nothing": [], "an empty polygon": [[]], "a point": [[4, 5]], "a line": [[4, 5, 20, 25]],
    "half a point": [[4]], "two lines": [[4, 5, 20, 25], [1, 1, 2, 2]]}


@pytest.mark.parametrize("case", NO_AREA)
def test_draw_outline_of_fewer_than_three_points_covers_nothing(case):
    assert not evaluation.draw_outline(NO_AREA[case], 30, 40).any()
    beside = evaluation.draw_outline([*NO_AREA[case], [0, 0, 20, 0, 20, 10, 0, 10]], 30, 40)
    assert beside.sum() == 200


# ---- Locks, and waiting for each other


@pytest.mark.skipif(usage.fcntl is None, reason="Windows has no such locks")
@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL", "EIO", "EBADF"])
def test_lock_goes_on_where_a_file_system_has_no_locks(code, tmp_path, monkeypatch):
    number = getattr(errno, code)
    refuse = mock.Mock(side_effect=OSError(number, os.strerror(number)))
    monkeypatch.setattr(usage.fcntl, "lockf", refuse)
    usage.lock(tmp_path / "run")
    assert refuse.called
    assert (tmp_path / "run").is_dir()


@pytest.mark.skipif(usage.fcntl is None, reason="Windows has no such locks")
@pytest.mark.parametrize("code", ["EAGAIN", "EACCES"])
def test_lock_refuses_where_it_is_held(code, tmp_path, monkeypatch):
    number = getattr(errno, code)
    monkeypatch.setattr(
        usage.fcntl, "lockf", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(usage.InputError, match="another process is already writing there"):
        usage.lock(tmp_path / "run")


PATIENCE = """
import datetime, sys, time
import torch.distributed.distributed_c10d as c10d
sys.path.insert(0, HERE)
import train_cls, usage

limit = datetime.timedelta(seconds=1)
c10d._get_default_timeout = lambda backend: limit       # the limits that torch sets by itself
c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit


def slowly(function):
    def slow(*arguments):
        if usage.RANK == 0:
            time.sleep(3)
        return function(*arguments)
    return slow


train_cls.prepare_data = slowly(train_cls.prepare_data)
train_cls.classify = slowly(train_cls.classify)
with usage.one_line_errors("run it again"):
    train_cls.main()
"""


def test_train_cls_waits_while_one_process_prepares_and_ends_alone(toy, tmp_path):
    """3 s at the start and at the end where torch's limit is 1 s: as an hour where it is 20 min."""
    script = tmp_path / "patience.py"
    script.write_text(PATIENCE.replace("HERE", repr(str(HERE))))
    command = [
        sys.executable, *TORCHRUN, script, "--data", toy, "--run", tmp_path / "run", "--device",
        "cpu", "--backbone", "mobilenet_v2", "--epochs", 1, *SMALL]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/settings.json").read_text())["mAP"] > 0


# ---- Nothing of the user's is changed, and their lists are understood


def test_stages_keep_a_users_own_lists_and_classes_in_a_coco_folder(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    own = [f"COCO_train_000{k}" for k in (6, 2, 7, 1, 3)]
    (lists / "train.txt").write_text("\n".join(own) + "\n")
    (lists / "val.txt").write_text("COCO_val_0002\n")
    classes = ["ringed", "checked", "striped", "starred", "spotted"]
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    (root / "labels.json").write_text("{}")
    before = digest(root)

    data = train_cls.prepare_data(root, False)
    assert list(data["train"]) == own
    assert list(data["val"]) == ["COCO_val_0002"]
    assert data["classes"] == classes
    new_number = torch.tensor([0, *(classes.index(name) + 1 for name in train_cls.TOY_CLASSES)])
    for split in ("train", "val"):
        truth = evaluation.find_truth(data, split, root)
        for name, path in truth.items():
            original = toy / f"SegmentationClass/{name.removeprefix('COCO_')}.png"
            assert torch.equal(true_mask(path), new_number[true_mask(original)])
    after = digest(root)
    assert before == {path: after[path] for path in before}
    drawn = [path for path in after if path not in before]
    assert {path.parent.as_posix() for path in drawn} == {
        "annotations/masks_train2014", "annotations/masks_val2014"}


def test_read_coco_wants_only_the_photographs_of_a_users_own_lists(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text(f"COCO_{split}_0002\n")
        for path in (root / f"{split}2014").iterdir():
            if path.stem != f"COCO_{split}_0002":
                path.unlink()
    data = train_cls.read_coco(root)
    for split in ("train", "val"):
        assert list(data[split]) == [f"COCO_{split}_0002"]
        mask = evaluation.find_truth(data, split, root)[f"COCO_{split}_0002"]
        assert mask.is_file()
    (lists / "train.txt").write_text("COCO_train_0003\n")
    with pytest.raises(usage.InputError, match="COCO_train_0003"):
        train_cls.read_coco(root)


def test_find_truth_overwrites_no_masks_of_the_user(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)
    own = root / "annotations/masks_val2014"
    own.mkdir()
    usage.save_mask(own / "COCO_val_0000.png", np.ones((48, 48)))
    before = digest(root)
    with pytest.raises(usage.InputError, match="masks_val2014"):
        evaluation.find_truth(train_cls.read_coco(root), "val", root)
    assert digest(root) == before


SPELLINGS = [       # (line of a list, the id that it means)
    ("2007_000032", "2007_000032"),
    ("2007_000032.jpg", "2007_000032"),
    ("2007_000032.JPG", "2007_000032"),
    ("2007_000032.png", "2007_000032"),
    ("2007_000032 1", "2007_000032"),
    ("2007_000032  -1", "2007_000032"),
    ("2007_000032\t1", "2007_000032"),
    ("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", "2007_000032"),
    ("JPEGImages/2007_000032.jpg SegmentationClassAug/2007_000032.png", "2007_000032"),
    ("./VOC2012/JPEGImages/2007_000032.jpg", "2007_000032"),
    ("/JPEGImages/2007_000032.jpg\t/SegmentationClassAug/other.png", "2007_000032"),
    ("v1.5", "v1.5"),
    ("v1.5.jpg", "v1.5"),
    ("v1.5 1", "v1.5"),
    ("cat food 1", "cat food"),
    ("/JPEGImages/v1.5.jpg /SegmentationClass/v1.5.png", "v1.5"),
    ("my cat", "my cat"),
    ("cat 1", "cat 1"),                                         # a photograph of that name
    ("my cat.jpg", "my cat"),
    ("JPEGImages/my cat.jpg", "my cat"),
    ("my cat 1", "my cat"),
]


@pytest.mark.parametrize("line, name", SPELLINGS)
def test_read_ids_understands_the_lines_of_published_lists(line, name, tmp_path):
    names = ("2007_000032", "2007_000033", "v1", "v1.5", "my cat", "cat", "cat 1", "cat food")
    images = {known: tmp_path / f"{known}.jpg" for known in names}
    (tmp_path / "list.txt").write_text(f"2007_000033\n{line}\n{line}\n")
    assert train_cls.read_ids(tmp_path / "list.txt", images) == ["2007_000033", name]


@pytest.mark.parametrize("line", [
    "2007_000099", "2007_000099.jpg 1", "..", "/", "/ x", "2007_000032,1",
    "/JPEGImages/2007_000099.jpg /a/2007_000032.png"])
def test_read_ids_names_a_line_that_is_no_image(line, tmp_path):
    (tmp_path / "list.txt").write_text(f"2007_000032\n{line}\n")
    with pytest.raises(usage.InputError, match=f"no image named {re.escape(line)}; add it"):
        train_cls.read_ids(tmp_path / "list.txt", {"2007_000032": tmp_path})


@pytest.mark.parametrize("file", ["train_aug.txt", "trainaug.txt"])
def test_read_voc_takes_the_augmented_list_as_it_is_published(file, toy, tmp_path):
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    lists = data / "ImageSets/Segmentation"
    ids = lists.joinpath("train.txt").read_text().split()[::-1]
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in ids[:5]]
    (lists / file).write_text("\n".join(lines) + "\n")
    assert list(train_cls.read_voc(data)["train"]) == ids[:5]
    (lists / "train.txt").unlink()
    assert list(train_cls.read_voc(data)["train"]) == ids[:5]


@pytest.mark.parametrize("data", ["toy", "./toy", "toy/", "ABSOLUTE/toy"])
def test_train_cls_takes_the_word_toy_only_where_no_such_folder_is(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = data.replace("ABSOLUTE", str(tmp_path))

    def parsed():
        with mock.patch.object(sys, "argv", ["train_cls.py", "--data", data]):
            return train_cls.parse_arguments()

    if not data.startswith("/"):
        args = parsed()
        assert (args.data, args.weights) == (train_cls.TOY, "none")
    (tmp_path / "toy").touch()                                  # a file is no folder
    if not data.startswith("/"):
        assert parsed().data == train_cls.TOY
    (tmp_path / "toy").unlink()
    (tmp_path / "toy").mkdir()
    args = parsed()
    assert args.data.resolve() == tmp_path / "toy"
    assert args.weights == "imagenet"
    with pytest.raises(usage.InputError, match="JPEGImages"):
        train_cls.prepare_data(args.data, False)                # nothing is drawn into it
    assert list(tmp_path.rglob("*")) == [tmp_path / "toy"]


# ---- The download


def test_prepare_data_leaves_the_host_alone_where_voc_is_complete(toy, tmp_path, monkeypatch):
    host = mock.Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", host)
    with pytest.raises(usage.InputError, match="no route to host"):
        train_cls.prepare_data(tmp_path, True)
    shutil.copytree(toy, tmp_path / "VOCdevkit/VOC2012")        # fetched by hand
    host.reset_mock()
    before = digest(tmp_path)
    for _ in range(2):
        assert len(train_cls.prepare_data(tmp_path, True)["train"]) == 8
    assert not host.called
    assert digest(tmp_path) == before


def test_prepare_data_puts_voc_2012_beside_other_years(toy, tmp_path, monkeypatch):
    def download(root, year, image_set, download):
        shutil.copytree(toy, Path(root, "VOCdevkit/VOC2012"), dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", download)
    shutil.copytree(toy, tmp_path / "VOCdevkit/VOC2007")
    assert len(train_cls.prepare_data(tmp_path, True)["train"]) == 8
    assert {path.name for path in (tmp_path / "VOCdevkit").iterdir()} == {"VOC2007", "VOC2012"}


# ---- Names and texts

PLACES = ("photograph", "list", "labels", "names", "classes", "mask")
NAME = "Übung für Zoë"


def accented(toy, folder, odd, form):
    """A copy of the toy with an accented image and class, spelt by `form` in the place `odd`."""
    data = Path(shutil.copytree(toy, folder / "data"))
    other = "NFD" if form == "NFC" else "NFC"

    def spelt(text, place):
        return unicodedata.normalize(form if place == odd else other, text)

    (data / "JPEGImages/train_0000.jpg").rename(
        data / "JPEGImages" / spelt(f"{NAME}.jpg", "photograph"))
    (data / "SegmentationClass/train_0000.png").rename(
        data / "SegmentationClass" / spelt(f"{NAME}.png", "mask"))
    names = data / "ImageSets/Segmentation/train.txt"
    names.write_text(
        names.read_text().replace("train_0000", spelt(NAME, "list")), encoding="utf-8")
    classes = data / "classes.txt"
    classes.write_text(
        classes.read_text().replace("striped", spelt("gestreift, ähnlich", "classes")),
        encoding="utf-8")
    labels = json.loads((data / "labels.json").read_text())
    labels[spelt(NAME, "labels")] = labels.pop("train_0000")
    text = json.dumps(labels, ensure_ascii=form == "NFC")
    text = text.replace("striped", spelt("gestreift, ähnlich", "names"))
    (data / "labels.json").write_text(text, encoding="utf-8")
    return data


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("odd", PLACES)
def test_read_voc_compares_names_in_one_spelling_of_unicode(odd, form, toy, tmp_path):
    root = accented(toy, tmp_path, odd, form)
    data = train_cls.read_voc(root)
    before = train_cls.read_voc(toy)
    image, names = data["train"][NAME]
    assert list(data["train"])[1:] == list(before["train"])[1:]
    assert (root / image).is_file()
    assert len(names) == len(before["train"]["train_0000"][1])
    assert data["classes"][0] == "gestreift, ähnlich"
    assert evaluation.find_truth(data, "train", root)[NAME].is_file()
    masks = shutil.move(root / "SegmentationClass", tmp_path / "own")
    args = SimpleNamespace(pseudo_masks=masks, run=tmp_path, data=root)
    paths, _ = train_seg.find_pseudo_masks(args, data, None)
    assert all(path.is_file() for path in paths)
    pred = Path(shutil.copytree(masks, tmp_path / "pred"))
    for path in pred.iterdir():
        path.rename(path.with_name(unicodedata.normalize(form, path.name)))
    args = SimpleNamespace(pred=pred, truth=masks, classes=root / "classes.txt")
    entry, = evaluation.compare_folders(args)
    assert entry["mIoU"] == 1


def test_read_voc_opens_annotations_as_they_are_named(toy, tmp_path):
    root = accented(toy, tmp_path, "photograph", "NFD")
    (root / "labels.json").unlink()
    (root / "ImageSets/Segmentation/train.txt").write_text(NAME, encoding="utf-8")
    (root / "Annotations").mkdir()
    text = "<annotation><object><name>gestreift, ähnlich</name></object></annotation>"
    file = unicodedata.normalize("NFD", f"{NAME}.xml")
    (root / "Annotations" / file).write_text(unicodedata.normalize("NFD", text), encoding="utf-8")
    assert train_cls.read_voc(root)["train"][NAME][1] == ["gestreift, ähnlich"]


@pytest.mark.parametrize("odd", ["list", "classes", "photograph", "annotations"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_read_coco_compares_names_in_one_spelling_of_unicode(odd, form, toy, tmp_path):
    """One place has another spelling than all others; the photograph is stored turned."""
    other = "NFD" if form == "NFC" else "NFC"

    def spelt(text, place):
        return unicodedata.normalize(form if place == odd else other, text)

    root = draw_coco(tmp_path / "coco", toy)
    path = root / "train2014/COCO_train_0000.jpg"
    Image.open(path).save(
        root / "train2014" / spelt(f"{NAME}.jpg", "photograph"), exif=exif(turn_by(3)))
    path.unlink()
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}2014.json"
        text = path.read_text().replace("COCO_train_0000", spelt(NAME, "annotations"))
        text = text.replace("striped", spelt("schräg gestreift", "annotations"))
        path.write_text(text, encoding="utf-8")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text(spelt(NAME, "list") + "\nCOCO_train_0003\n", encoding="utf-8")
    classes = ["schräg gestreift", *list(train_cls.TOY_CLASSES)[1:]]
    (root / "classes.txt").write_text(spelt("\n".join(classes), "classes"), encoding="utf-8")
    data = train_cls.read_coco(root)
    assert list(data["train"]) == [NAME, "COCO_train_0003"]
    assert data["classes"] == classes
    assert (root / data["train"][NAME][0]).is_file()
    truth = true_mask(evaluation.find_truth(data, "train", root)[NAME])
    assert torch.equal(truth, true_mask(toy / "SegmentationClass/train_0000.png").flip(0, 1))


def test_train_cls_writes_utf_8_whatever_the_locale_is(toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)
    for path in (root / "annotations").iterdir():
        path.write_text(path.read_text().replace("striped", "Käse, größer"), encoding="utf-8")
    (root / "classes.txt").write_text(
        "\n".join(["Käse, größer", *list(train_cls.TOY_CLASSES)[1:]]), encoding="utf-8")
    command = [
        sys.executable, HERE / "train_cls.py", "--data", root, "--run", tmp_path / "run",
        "--backbone", "resnet18", "--epochs", 1, *SMALL, "--size", 17, "--device", "cpu"]
    in_c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, env=os.environ | in_c)
    assert done.returncode == 0, done.stderr.decode()
    assert usage.read_run(tmp_path / "run")[1]["classes"][0] == "Käse, größer"


def test_no_script_leaves_the_encoding_of_a_text_to_the_locale():
    for script in ("usage", "train_cls", "make_seeds", "train_seg", "eval"):
        for call in ast.walk(ast.parse((HERE / f"{script}.py").read_text(encoding="utf-8"))):
            called = getattr(getattr(call, "func", None), "attr", None)
            if called in ("read_text", "write_text"):
                assert "encoding" in [keyword.arg for keyword in call.keywords]


# ---- Whose mistake it is


@pytest.mark.parametrize("mistake", ["None.size", "an_unknown_name", "len(3)"])
def test_reading_blames_files_for_errors_of_libraries_only(mistake, tmp_path):
    raised = {"None.size": AttributeError, "an_unknown_name": NameError, "len(3)": TypeError}
    ours = compile(mistake, str(Path(usage.__file__).parent / "train_cls.py"), "exec")
    with pytest.raises(raised[mistake]), usage.reading("a.jpg", "replace it"):
        exec(ours, {})
    theirs = compile(mistake, str(tmp_path / "PIL/Image.py"), "exec")
    with pytest.raises(usage.InputError, match="^a.jpg: .*; replace it$"), usage.reading(
            "a.jpg", "replace it"):
        exec(theirs, {})


def test_reading_names_a_library_that_raises_what_we_might():
    with pytest.raises(usage.InputError, match="^a.jpg: .*attribute.*; replace it$"), usage.reading(
            "a.jpg", "replace it"):
        Image.open(3)


@pytest.mark.parametrize("content", [
    "{}", "{", "[]", '"x"', "3", '{"categories": [1], "images": [], "annotations": []}',
    '{"categories": [], "images": ["a.jpg"], "annotations": []}',
    '{"categories": [], "images": [{"id": 1, "file_name": 5}], "annotations": []}',
    '{"categories": [], "images": [], "annotations": [{"image_id": [1], "category_id": 1}]}'])
def test_read_coco_blames_a_file_of_the_wrong_shape(content, toy, tmp_path):
    root = draw_coco(tmp_path / "coco", toy)
    path = root / "annotations/instances_train2014.json"
    path.write_text(content)
    with pytest.raises(usage.InputError, match="instances_train2014.json: .*fetch it again"):
        train_cls.read_coco(root)


@pytest.mark.parametrize("state", [
    {"epoch": 3, "state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}},
    {0: torch.zeros(3)},
    {"model": 3},
], ids=["of a trainer", "without names", "of a model"])
def test_train_cls_refuses_weights_of_another_kind(state, toy, tmp_path, capsys):
    torch.save(state, tmp_path / "weights.pth")
    line = fails(capsys, "train_cls.py", "--data", toy, "--run", tmp_path / "run", "--backbone",
                 "resnet18", *SMALL, "--weights", tmp_path / "weights.pth")
    assert "weights.pth" in line


def test_requirements_have_lower_bounds_that_are_met_here():
    bounds = dict(line.split(">=") for line in (HERE / "requirements.txt").read_text().split())
    assert set(bounds) == {"torch", "torchvision", "numpy", "pillow"}
    for package, bound in bounds.items():
        here = importlib.metadata.version(package).split("+")[0]
        assert [int(part) for part in here.split(".")] >= [int(part) for part in bound.split(".")]
    assert [int(part) for part in bounds["pillow"].split(".")] >= [10, 1]


# ---- The metrics


def test_draw_toy_overwrites_nothing_of_the_user(tmp_path):
    (tmp_path / "toy/JPEGImages").mkdir(parents=True)
    (tmp_path / "toy/JPEGImages/train_0000.jpg").write_bytes(b"mine")
    before = digest(tmp_path)
    with pytest.raises(usage.InputError, match="toy: is in the way"):
        train_cls.draw_toy(tmp_path / "toy", train=2, val=1, side=48)
    assert digest(tmp_path) == before


@pytest.mark.parametrize("name", ["images.json", "settings.json"])
def test_train_cls_overwrites_no_table_of_the_user(name, toy, tmp_path, capsys):
    (tmp_path / name).write_text('{"mine": 1}')
    fails(capsys, "train_cls.py", "--data", toy, "--run", tmp_path, "--epochs", 1,
          "--backbone", "mobilenet_v2", *SMALL)
    assert (tmp_path / name).read_text() == '{"mine": 1}'


@pytest.mark.parametrize("name", ["train.old", "train.partial"])
def test_whole_folder_keeps_what_the_user_put_beside_it(name, tmp_path):
    with usage.whole_folder(tmp_path / "train", {"threshold": 0.4}):
        pass
    (tmp_path / name).mkdir()
    (tmp_path / name / "my notes.txt").write_text("mine")
    with contextlib.suppress(usage.InputError):
        with usage.whole_folder(tmp_path / "train", {"threshold": 0.5}):
            pass
    assert (tmp_path / name / "my notes.txt").read_text() == "mine"


def test_train_cls_takes_the_map_over_the_images_of_val_that_have_labels(toy, tmp_path):
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    edited(data / "labels.json", lambda table: [table.pop(f"val_000{k}") for k in (0, 2)])
    output = stage("train_cls.py", "--data", data, "--run", tmp_path / "run", "--epochs", 1,
                   "--backbone", "mobilenet_v2", *SMALL)
    assert "val, 2 images: mAP" in output


def test_save_contact_sheet_shows_a_photograph_of_one_row(tmp_path):
    for kind in ("seeds", "pseudo_masks", "maps"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (900, 1)).save(tmp_path / "a.png")
    levels = torch.zeros(1, 1, 900, dtype=torch.uint8)
    make_seeds.write_results(tmp_path, "a", (1, 900), torch.tensor([0]), levels, levels, 0.4)
    make_seeds.save_contact_sheet(tmp_path, ["cat"], {"a": tmp_path / "a.png"}, {})
    assert (tmp_path / "seeds.png").is_file()


def test_means_are_over_the_same_classes_at_every_threshold():
    """Class 3 is falsely predicted at low thresholds only; class 4 is neither there nor found."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, (20, 30)).astype(np.uint8)
    truth[0, :9] = usage.VOID
    labels = np.where(generator.random((20, 30)) < 0.7, np.minimum(truth, 2), 3)
    levels = np.where(labels == 3, 130, generator.integers(100, 256, (20, 30)))
    counts = evaluation.count_levels(
        *(torch.from_numpy(array.astype(np.uint8)) for array in (truth, labels, levels)), 4)
    curve = []
    for threshold in (0.0, 0.3, 0.45, 0.6, 0.8, 1.0):
        predicted = np.where(levels / 255 > threshold, labels, 0)
        scores = []
        for c in (0, 1, 2):                                     # the classes of the truth
            inside = truth != usage.VOID
            is_c = (truth == c) & inside
            says_c = (predicted == c) & inside
            scores.append((is_c & says_c).sum() / (is_c | says_c).sum())
        got = evaluation.means(evaluation.at_threshold(counts, threshold))
        assert got["mIoU"] == pytest.approx(np.mean(scores))
        curve.append(got["mIoU"])
    assert curve[-1] < curve[0]


def test_best_threshold_is_not_where_a_false_class_vanishes():
    """60 pixels of background and 40 of class 1; 10 of them are taken for class 2 up to 0.55.

    Above it, class 1 has lost a fifth, so that 0.54 is as good as any, although class 2 is found.
    """
    truth = torch.tensor(60 * [0] + 40 * [1], dtype=torch.uint8)[None]
    labels = torch.tensor(1 * [2] + 59 * [0] + 40 * [1], dtype=torch.uint8)[None]
    levels = torch.tensor(1 * [140] + 59 * [0] + 8 * [140] + 32 * [230], dtype=torch.uint8)[None]
    counts = evaluation.count_levels(truth, labels, levels, 2)
    low, high = (evaluation.means(evaluation.at_threshold(counts, at)) for at in (0.54, 0.56))
    assert low["mIoU"] == pytest.approx((59 / 60 + 1) / 2)
    assert high["mIoU"] == pytest.approx((60 / 68 + 32 / 40) / 2)
    assert evaluation.best_threshold(counts) < 0.55


def only_masks_of(toy, folder, names):
    """A copy of the toy with the true masks of some images."""
    data = Path(shutil.copytree(toy, folder / "data"))
    for path in (data / "SegmentationClass").iterdir():
        if path.stem not in names:
            path.unlink()
    return data


def test_eval_measures_the_images_that_have_masks(finished, toy, tmp_path):
    names = ["train_0001", "train_0004", "train_0006"]
    data = only_masks_of(toy, tmp_path, [*names, "val_0002"])
    run = copy_of(finished[0], tmp_path)
    output = stage("eval.py", "--run", run, "--data", data)
    assert "3 of 8 images of train with a mask, given labels" in output
    assert "1 of 4 images of val with a mask" in output
    report = {entry["what"]: entry for entry in json.loads((run / "report.json").read_text())}
    assert list(report) == ["seeds", "pseudo masks", "segmentation"]
    truth = data / "SegmentationClass"
    pairs = [(run / f"train/seeds/{name}.png", truth / f"{name}.png") for name in names]
    assert report["seeds"]["mIoU"] == pytest.approx(slow_miou(pairs))
    pairs = [(run / "segmentation/val_0002.png", truth / "val_0002.png")]
    assert report["segmentation"]["mIoU"] == pytest.approx(slow_miou(pairs))

    (truth / "val_0002.png").unlink()
    output = stage("eval.py", "--run", run, "--data", data)
    assert "0 of 4 images of val with a mask: not measured" in output


def test_eval_sweeps_over_a_single_mask(finished, toy, tmp_path):
    data = only_masks_of(toy, tmp_path, ["train_0001"])
    run = copy_of(finished[0], tmp_path)
    stage("eval.py", "--run", run, "--data", data, "--sweep")
    report = json.loads((run / "report.json").read_text())
    oracles = [entry for entry in report if entry["what"].endswith("oracle")]
    assert len(oracles) == 2
    for oracle in oracles:
        assert oracle["mIoU"] == max(oracle["mIoU at 0.00, 0.01 ... 1.00"])


@pytest.mark.parametrize("logit", [0.0, 17.5, -40.0, 90.0, 1000.0])
def test_score_threshold_predicts_as_many_as_there_are_where_scores_are_saturated(logit):
    """In float32 the sigmoid of 17 is 1.0: 64 images whose probabilities are all equal."""
    scores = logit + torch.randn(64, 5) / 4
    labels = (torch.rand(64, 5) < 0.3).float()
    threshold = json.loads(json.dumps(train_cls.score_threshold(scores, labels)))
    assert (scores.double() > threshold).sum() == labels.sum()

    values = logit + torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])

    def network(image):
        return values[:, None, None].expand(1, 5, *image.shape[2:])

    network.fitting_size = lambda size: size
    settings = {"size": 32, "temperature": math.inf, "attention": False,
                "score_threshold": logit + 0.25}
    image = torch.zeros(1, 3, 40, 50)
    args = SimpleNamespace(class_threshold=None)
    has = make_seeds.predict_classes(network, image, settings, args)
    assert has.tolist() == [False, False, False, True, True]
    if logit == 17.5:                                           # the logit of a flag, in doubles
        args = SimpleNamespace(class_threshold=1 / (1 + math.exp(-17.25)))
        has = make_seeds.predict_classes(network, image, settings, args)
        assert has.tolist() == [False, False, True, True, True]


def slow_average_precision(scores, has):
    """The mean, over its images, of the precision among all that score at least as high."""
    precisions = []
    for score, is_one in zip(scores, has):
        if is_one:
            shown = [other for value, other in zip(scores, has) if value >= score]
            precisions.append(sum(shown) / len(shown))
    return sum(precisions) / len(precisions)


def test_mean_average_precision_counts_ties_together():
    labels = torch.eye(4).repeat_interleave(25, 0)              # 100 images of 4 classes
    for order in (torch.arange(100), torch.arange(100).flip(0), torch.randperm(100)):
        equal = torch.full((100, 4), 3.0)
        assert train_cls.mean_average_precision(equal, labels[order]) == pytest.approx(0.25)
    scores = torch.randint(0, 6, (60, 3)).float()               # many ties
    labels = (torch.rand(60, 3) < 0.3).float()
    expected = np.mean([slow_average_precision(scores[:, c].tolist(), labels[:, c].tolist())
                        for c in range(3)])
    assert train_cls.mean_average_precision(scores, labels) == pytest.approx(expected)
    shuffled = torch.randperm(60)
    assert train_cls.mean_average_precision(scores[shuffled], labels[shuffled]) == pytest.approx(
        expected)


def test_training_loader_has_another_order_for_each_seed_and_epoch():
    orders = []
    for random_seed in (0, 1, 2, 3, 10**6):
        photographs = usage.Photographs([Path()] * 40, torch.zeros(40, 2), 2, None, random_seed)
        loader = usage.training_loader(photographs, 4, 0, torch.device("cpu"))
        for epoch in range(6):
            loader.sampler.set_epoch(epoch)
            orders.append(tuple(loader.sampler))
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(40)) for order in orders)


# ---- README --------------------------------------------------------------------------------------


def test_the_readme_names_flags_that_exist():
    flags = set()
    for script in ("train_cls.py", "make_seeds.py", "train_seg.py", "eval.py"):
        text = (HERE / script).read_text(encoding="utf-8")
        flags |= set(re.findall(r'add\("(--[a-z-]+)"', text))
    for flag in ("--flip", "--refine", "--adaptive", "--affinity"):
        assert flag in flags
        flags.add(flag.replace("--", "--no-"))
    flags |= {"--nproc-per-node", "--nnodes", "--rdzv-endpoint"}        # torchrun's
    text = (HERE / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert len(named) > 10
    assert named <= flags


def readme_block(heading, language):
    """The first block of code below a heading of README.md."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}")[1].split("\n## ")[0]
    return section.split(f"\n```{language}\n")[1].split("\n```")[0]


def test_the_readme_snippet_trains(monkeypatch):
    """Its loss falls, and no gradient is left over from the step before."""
    code = readme_block("Use the losses in your own code", "python")
    for name in ("consistency_loss", "generation_loss", "learning_status", "chance_loss",
                 "set_adjustment", "ema_teacher", "seed_maps", "label_map"):
        assert re.search(rf"\b{name}\(", code), name
    optimisers = []
    plain_backward = torch.Tensor.backward

    def backward(loss, *args, **kwargs):
        for optimiser in optimisers[-1:]:
            for group in optimiser.param_groups:
                for parameter in group["params"]:
                    assert parameter.grad is None or not parameter.grad.any(), "no zero_grad"
        plain_backward(loss, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.chdir(HERE)
    hook = register_optimizer_step_post_hook(lambda optimiser, *_: optimisers.append(optimiser))
    names = {}
    before = time.thread_time()                                 # does not count other processes
    try:
        exec(code, names)
    finally:
        hook.remove()
    assert time.thread_time() - before < 60
    losses = [float(loss) for loss in names["losses"]]
    assert len(losses) == len(optimisers) >= 10
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    for name, value in names.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.isfinite().all(), name


def test_the_readme_names_the_function_of_each_symbol():
    block = readme_block("The method in ten lines", "")
    named = set(re.findall(r"(?<![\w.])(?:usage\.)?([a-z]+(?:_[a-z]+)+)", block))
    parameters = {name for function in PAPER
                  for name in inspect.signature(getattr(usage, function)).parameters}
    recipe = train_cls.RECIPES["cnn", "scratch"]
    known = {*dir(usage), *parameters, *recipe, *train_cls.OBJECTIVE, "sum_i", "sum_j"}
    assert set(PAPER) <= named
    assert named <= known


# ---- Speed: `python test_usage.py` prints ratios, to be measured on an otherwise idle machine ----


def seconds_of_steps(train, first=3, last=15):
    """The median time between two steps of an optimiser, while a function trains."""
    times = []

    def after_a_step(*_):
        times.append(time.perf_counter())
        if len(times) == last:
            raise StopIteration                                 # out of the training

    hook = register_optimizer_step_post_hook(after_a_step)
    with contextlib.suppress(StopIteration):
        train()
    hook.remove()
    return np.median(np.diff(times[first:]))


def train_bare():
    """Forward, backward and optimiser step of ResNet-50, on a batch in memory."""
    network = usage.build_network("resnet50", 5).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)
    images = torch.randn(16, 3, 81, 81).contiguous(memory_format=torch.channels_last)
    while True:
        optimiser.zero_grad()
        F.softplus(network(images).float().mean((2, 3))).mean().backward()
        optimiser.step()


def train_on_the_toy(run, *flags):
    common = ["--device", "cpu", "--epochs", "0", "--reg-epochs", "1", "--run", run]
    with mock.patch.object(sys, "argv", ["train_cls.py", *common, *flags]):
        train_cls.main()


@torch.no_grad()
def seconds_of_seeds(refine, images=10):
    """The mean time of an image's seed; with refine=None, of the network's forwards alone."""
    network = usage.build_network("resnet50", 5).to(memory_format=torch.channels_last).eval()
    image = torch.randn(1, 3, 128, 128)
    args = SimpleNamespace(**make_seeds.RECIPES["cnn", "scratch"], flip=True, refine=refine)
    for number in range(-2, images):
        if number == 0:
            before = time.perf_counter()
        if refine is None:
            usage.multi_scale_activations(network, image, 81, args.scales, args.flip)
        else:
            make_seeds.seed_of(network, image, torch.tensor([0, 3]), 81, args)
    return (time.perf_counter() - before) / images


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        bare = seconds_of_steps(train_bare)
        cam = seconds_of_steps(lambda: train_on_the_toy("cam", "--reg-weight", "0"))
        full = seconds_of_steps(lambda: train_on_the_toy("usage", "--no-adaptive"))
    print(f"\na step: bare {bare:.3f} s, CAM {cam / bare:.2f} x, USAGE {full / bare:.2f} x")
    bare, plain, refined = (seconds_of_seeds(refine) for refine in (None, False, True))
    print(f"a seed: bare {bare:.3f} s, plain {plain / bare:.2f} x, refined {refined / bare:.2f} x")
