"""Claims about cema.py. Each docstring ends with the change under which the test was seen to fail."""

import copy
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cema
import common
from cema import CEMA, AdaptiveBN, Baseline, Download, Edge, FromBytes, Link, Upload, configure
from common import InputError
from tools import streams
from tools.corruptions import corrupt

CPU = torch.device("cpu")
E0, LOW = 0.4 * math.log(10), 0.02 * math.log(10)


def small(seed: int = 0, classes: int = 10) -> FromBytes:
    """Untrained, on uint8 images; BN statistics are not 0 and 1, and the answers rather sure."""
    torch.manual_seed(seed)
    net = common.build_model("resnet8", classes)
    for _ in range(3):
        net.train()(torch.randn(16, 3, 32, 32))
    net.fc.weight.data.mul_(6)
    return FromBytes(net.eval(), [0.5] * 3, [0.25] * 3)


def images(n: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g)


def hp(**changes):
    return common.defaults(cema.build_parser, **changes)


def quick(edge=None, foundation=None, **changes) -> CEMA:
    """CEMA that learns at once: every image uploaded, 8 a cloud step, replay from 16 on."""
    changes = dict(select="all", cloud_batch=8, replay=64, replay_draw=8, replay_min=16, batch_size=16,
                   seed_images=16) | changes
    return CEMA(edge or small(), foundation or small(1), 32, **changes)


def stepped(steps: int, **changes) -> CEMA:
    method = quick(**changes)
    for t in range(steps):
        method.step(images(16, t))
    return method


def one_edge(model=None, counts=None, **changes) -> Edge:
    changes = dict(warmup_batches=2, seed_images=16) | changes
    return Edge(model or small(), hp(**changes), 10, Counter() if counts is None else counts)


def baseline(kind: str, model=None, counts=None, **changes) -> Baseline:
    return Baseline(kind, model or small(), hp(**changes), 10, Counter() if counts is None else counts)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def fashion():
    """Images and labels, and the shipped networks g and f."""
    data, nets = common.load_data("fashion"), []
    for arch in ("resnet20", "resnet20x2"):
        net, d, _ = common.find_weights(arch, "fashion", data, None, CPU)
        nets.append(FromBytes(net.to(memory_format=torch.channels_last), d.mean, d.std))
    return *data.test.tensors, *nets


@pytest.fixture(scope="module")
def miniature(fashion):
    """768 images under contrast, severity 5, their labels, and each method's logits; CEMA after it."""
    x, y, g, f = fashion
    i = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:768]
    x, ours = corrupt(x[i], "contrast", 5, i), CEMA(g, f, 32, amp=common.has_fast_bf16(CPU))
    methods = {"source": baseline("source", g), "bn": baseline("bn", g), "cema": ours}
    logits = {m: torch.cat([method.step(part) for part in x.split(64)]) for m, method in methods.items()}
    return x, y[i], logits, ours


# ----- equations ---------------------------------------------------------------------------------------


def test_entropy_equals_torch_and_has_its_gradient():
    """Uniform logits have ln C, sure ones 0. Fails if p is detached in -sum p ln p, or with log2."""
    ends = common.entropy(torch.tensor([[0.0, 0, 0], [200.0, 0, 0]])).tolist()
    assert ends == pytest.approx([math.log(3), 0])
    a = torch.randn(5, 10, requires_grad=True)
    b = a.detach().clone().requires_grad_(True)
    want, ours = torch.distributions.Categorical(logits=b).entropy(), common.entropy(a)
    assert torch.allclose(ours, want, atol=1e-6)
    ours.sum().backward(), want.sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_surer_images_weigh_more_and_the_weight_takes_no_gradient():
    """grad mean[w H] = mean[w grad H]. Fails with exp(H - E_0), or without the detach."""
    assert cema.sample_weight(torch.tensor([E0, 0]), E0).tolist() == pytest.approx([1, math.exp(E0)])
    logits = torch.randn(6, 10, requires_grad=True)
    got, = torch.autograd.grad(cema.entropy_loss(logits, E0), logits)
    H = common.entropy(logits)
    want, = torch.autograd.grad(sum(math.exp(E0 - h.item()) * h for h in H) / 6, logits)
    assert torch.allclose(got, want, atol=1e-6)


def test_the_threshold_telescopes_from_the_papers_recursion():
    """E_max^t = E_max^{t-1} mean_t / mean_{t-1}, for lambda 1. Fails if the ratio is turned over."""
    means, recursive = [0.9, 0.8, 0.85, 0.6], E0
    for before, now in zip(means, means[1:]):
        recursive *= now / before
    assert cema.e_max(E0, means[-1], means[0], 1.0) == pytest.approx(recursive)


def test_only_entropies_between_the_thresholds_are_worth_uploading():
    """Fails if either comparison is turned or left out."""
    H = torch.tensor([0.0, LOW, 0.05, 0.5, E0, 1.5])
    assert cema.worth_uploading(H, LOW, E0).tolist() == [False, False, True, True, False, False]


def test_the_redundancy_filter_is_a_cosine():
    """Against NumPy; margin 0 and no history let all pass. Fails without the norms."""
    probs, mean = torch.randn(20, 10).softmax(1), torch.randn(10).softmax(0)
    p, m = probs.numpy(), mean.numpy()
    want = np.abs(p @ m / np.linalg.norm(p, axis=1) / np.linalg.norm(m)) < 0.6
    assert 0 < want.sum() < 20
    assert (cema.not_redundant(probs, mean, 0.6).numpy() == want).all()
    assert cema.not_redundant(probs, mean, 0.0).all() and cema.not_redundant(probs, None, 0.6).all()


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_the_distillation_loss_equals_a_loop(T):
    """Image by image in NumPy. Fails if w(f) is taken from g, or KL is turned over."""
    g, f = torch.randn(7, 10) * 2, torch.randn(7, 10) * 2

    def softmax(v):
        e = np.exp(v - v.max())
        return e / e.sum()

    want = 0.0
    for a, b in zip(g.double().numpy(), f.double().numpy()):
        p, q, pT, qT = softmax(a), softmax(b), softmax(a / T), softmax(b / T)
        H_g, H_f = -(p * np.log(p)).sum(), -(q * np.log(q)).sum()
        w_g, w_f, kl = np.exp(E0 - H_g), np.exp(E0 - H_f), T**2 * (qT * np.log(qT / pT)).sum()
        want += (2 * w_g * H_g + 3 * w_f * kl - 5 * w_f * np.log(p[b.argmax()])) / 7
    assert cema.distillation_loss(g, f, E0, 2, 3, 5, T).item() == pytest.approx(want, rel=1e-5)


# ----- model surgery -----------------------------------------------------------------------------------


def both_bn(mode: str):
    bn = nn.BatchNorm2d(4)
    bn.weight.data.uniform_(0.5, 2), bn.bias.data.uniform_(-1, 1)
    bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.5, 2)
    return bn, AdaptiveBN(copy.deepcopy(bn), mode, 0.1)


def test_source_and_batch_statistics_are_torchs_eval_and_train():
    """Whatever mode the module is in. Fails if "batch" uses the running ones."""
    x = torch.randn(8, 4, 5, 5)
    for mode, train in ((mode, train) for mode in ("source", "batch") for train in (False, True)):
        bn, ours = both_bn(mode)
        assert torch.allclose(ours.train(train)(x), bn.train(mode == "batch")(x), atol=1e-6)


def test_ema_normalises_by_the_running_statistics_and_moves_them_in_training_only():
    """The value is eval's in both modes. Fails if they move before use, or in eval."""
    x = torch.randn(8, 4, 5, 5) * 2 + 1
    bn, ours = both_bn("ema")
    mu, var = ours.running_mean.clone(), ours.running_var.clone()
    assert torch.allclose(ours.eval()(x), bn.eval()(x), atol=1e-5)
    assert torch.equal(ours.running_mean, mu)
    assert torch.allclose(ours.train()(x), bn.eval()(x), atol=1e-5)
    assert torch.allclose(ours.running_mean, 0.9 * mu + 0.1 * x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(ours.running_var, 0.9 * var + 0.1 * x.var((0, 2, 3), correction=0), atol=1e-5)


def test_the_gradient_of_ema_flows_through_the_batch_statistics():
    """That of (x - mu_B) / sd_B r + d with r, d constant. Fails if it goes through eval-mode BN."""
    bn, ours = both_bn("ema")
    x = torch.randn(8, 4, 5, 5, requires_grad=True)
    a = torch.randn(8, 4, 5, 5)
    mu, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    view = lambda t: t.view(1, 4, 1, 1)
    sd = (view(bn.running_var) + bn.eps).sqrt()
    r, d = ((var + bn.eps).sqrt() / sd).detach(), ((mu - view(bn.running_mean)) / sd).detach()
    y = ((x - mu) / (var + bn.eps).sqrt() * r + d) * view(bn.weight) + view(bn.bias)
    want = torch.autograd.grad((a * y).sum(), [x, bn.weight, bn.bias])
    got = torch.autograd.grad((a * ours.train()(x)).sum(), [x, ours.weight, ours.bias])
    assert all(torch.allclose(g, w, atol=1e-4) for g, w in zip(got, want))


@pytest.mark.parametrize("sizes, spread", [
    ((16,), 1.0), ((1, 1, 1, 1), 1.0), ((8, 4, 4), 1.0), ((16, 16, 16, 16), 1e-4)])
def test_averaged_in_statistics_are_those_of_all_images_together(sizes, spread):
    """And never below 0. Fails if variances are averaged, or E[x^2] - E[x]^2 is left to its rounding."""
    x = 30 + spread * (torch.randn(sum(sizes), 4, 5, 5) + 3 * torch.randn(sum(sizes), 4, 1, 1))
    layer, n = nn.Sequential(both_bn("ema")[1]).eval(), 0
    for part in x.split(sizes):
        n += len(part)
        cema.average_in(layer, len(part) / n)
        layer(part)
    assert torch.allclose(layer[0].running_mean, x.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(layer[0].running_var, x.var((0, 2, 3), correction=0), atol=2e-3)
    assert (layer[0].running_var >= 0).all()


def test_only_affine_parameters_of_norm_layers_may_move():
    """And the original is not touched. Fails if convolutions keep requires_grad."""
    model = small()
    before = copy.deepcopy(model.state_dict())
    adapted, affine, stats = configure(model, "ema")
    moving = {id(p) for p in adapted.parameters() if p.requires_grad}
    assert len(affine) == 18 and moving == {id(p) for p in affine} and all(p.ndim == 1 for p in affine)
    layers = [m for m in adapted.modules() if isinstance(m, AdaptiveBN)]
    in_order = [m.running_mean for m in layers] + [m.running_var for m in layers]
    assert len(stats) == 18 and all(a is b for a, b in zip(stats, in_order))
    for p in affine + stats:
        p.data.add_(1)
    assert same(list(model.state_dict().values()), list(before.values()))
    assert not any(isinstance(m, AdaptiveBN) for m in model.modules())
    assert configure(model, "batch")[2] == []


def test_a_layer_with_two_names_adapts_as_one():
    """Fails if its second use stays a plain BatchNorm, which no message reaches."""
    bn = nn.BatchNorm2d(3)
    model, affine, _ = configure(nn.Sequential(bn, nn.ReLU(), bn), "ema")
    assert model[0] is model[2] and isinstance(model[0], cema.AdaptiveBN) and len(affine) == 2


def test_layer_and_group_norm_adapt_too():
    """Affine parameters only. Fails if a kind is mapped to another layer."""
    all_three = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(5), nn.LayerNorm(6))
    for kinds, sizes in ((["gn"], [4]), (["bn"], [5]), (["ln"], [6]), (["gn", "ln"], [4, 6])):
        assert [len(p) for p in configure(all_three, "ema", kinds)[1][::2]] == sizes
    with pytest.raises(InputError, match="nothing can adapt by --affine ln; it has: bn"):
        configure(small(), "ema", ["ln"])
    with pytest.raises(InputError, match="it has: none"):
        configure(nn.Conv2d(3, 4, 3), "ema")


class WithReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Centred(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x - x.mean((2, 3), keepdim=True))


def test_what_else_a_batchnorm_does_it_still_does():
    """After it: an activation. Before it: refused. Fails if a subclass is replaced by a plain one."""
    def net(kind):
        bn = kind(4)
        bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.5, 2), bn.bias.data.uniform_(-1, 1)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2), bn, nn.Flatten(), nn.Linear(4 * 15 * 15, 10))
        return FromBytes(layers.eval(), [0.5] * 3, [0.25] * 3)

    model, x = net(WithReLU), torch.randn(8, 4, 5, 5)
    for mode, train in (("source", False), ("ema", False), ("batch", True)):
        bn = configure(model, mode)[0].net[1]
        assert torch.allclose(bn(x), model.net[1].train(train)(x), atol=1e-5) and (bn(x) == 0).any()
    with pytest.raises(InputError, match="does more than normalise"):
        quick(edge=net(Centred))


def test_masked_classes_are_gone_from_the_logits():
    """Fails if they are set to zero."""
    model, x = small(), images(4)
    kept = FromBytes(model.net, model.mean, model.std, [7, 2])
    assert torch.equal(kept(x), model(x)[:, [7, 2]])


# ----- link --------------------------------------------------------------------------------------------


tensors = lambda value: Download([torch.full((3,), float(value))], [torch.full((2,), float(value))])


def test_a_link_delays_and_keeps_the_order():
    """Two batches, each way on its own. Fails if delay counts from one, or the newest comes first."""
    link, came = Link(hp(link_delay=2), Counter()), []
    for t in range(4):
        link.send("down", tensors(t))
        came.append([int(message.affine[0][0]) for message in link.receive("down")])
        link.now += 1
    assert came == [[], [], [0], [1]] and link.receive("up") == []


@pytest.mark.parametrize("change", [dict(link_drop=0.3), dict(link_corrupt=0.3)])
def test_a_link_loses_as_many_messages_as_told(change):
    """Within 4 sd; bytes count all the same; what arrives is whole. Fails if a share is not read."""
    link = Link(hp(**change), counts := Counter())
    for _ in range(4000):
        link.send("down", tensors(1.0))
    got = link.receive("down")
    assert abs(len(got) / 4000 - 0.7) < 4 * math.sqrt(0.21 / 4000)
    assert all(isinstance(m, Download) and same(m.affine, tensors(1.0).affine) for m in got)
    assert counts["bytes_down"] == 4000 * 20 and counts["bytes_down_stats"] == 4000 * 8
    assert counts["refused_messages"] == (4000 - len(got) if "link_corrupt" in change else 0)


# ----- edge and cloud ----------------------------------------------------------------------------------


def test_the_edge_works_where_backward_raises(monkeypatch):
    """As it does on many devices. Tent does not. Fails if the edge calls backward."""
    monkeypatch.setattr(torch.Tensor, "backward", None)
    logits, upload = one_edge(select="all").step(images(16), [])
    assert logits.shape == (16, 10) and not logits.requires_grad and len(upload.images) == 16
    with pytest.raises(TypeError):
        baseline("tent").step(images(16))


def test_the_edge_holds_no_optimizer_no_gradient_and_nothing_of_the_clouds():
    """No storage is shared. Fails if the twin's network is handed to the edge."""
    method = stepped(4)
    edge, cloud = method.edge, method.cloud
    assert not any(p.requires_grad or p.grad is not None for p in edge.model.parameters())
    theirs = (torch.optim.Optimizer, cema.Cloud, cema.Learner, Link)
    assert not any(isinstance(v, theirs) for v in vars(edge).values())
    f, twin, ours = ({t.data_ptr() for t in net.state_dict().values()}
                     for net in (cloud.f.model, cloud.twin.model, edge.model))
    assert not ours & (f | twin) and not f & twin


def test_the_edge_answers_before_anything_is_learned_of_a_batch():
    """With what had arrived before. Fails if the download of the same batch is applied first."""
    method = quick()
    for t in range(4):
        x, ahead = images(16, t), copy.deepcopy(method.edge)
        want = ahead.step(x, [Download(*parts) for _, parts in method.link.down])[0]
        got = method.step(x)
        (_, newest), = method.link.down
        assert torch.equal(got, want)
        assert not torch.allclose(got, ahead.step(x, [Download(*newest)])[0], atol=1e-3)


def test_a_download_makes_the_edge_the_twin_whatever_was_lost_before():
    """Every tensor equal. Fails if statistics or affine parameters stay behind, or are differences."""
    method = stepped(4)
    twin, (_, newest), = method.cloud.twin, method.link.down[0]
    for edge in (one_edge(), method.edge):
        edge.step(images(16), [Download(*newest)])
        assert same(edge.affine + edge.stats, twin.affine + twin.stats)
    assert not same(twin.affine, twin.source)


def test_the_twin_starts_from_the_edges_statistics():
    """They come with uploads until a download does. Fails if the twin takes those of its first 8."""
    method = quick()
    edge, cloud = method.edge, method.cloud
    cloud.step([edge.step(images(16), [])[1]], 0)
    assert same(edge.stats, cloud.twin.stats) and cloud.twin.has_stats and not cloud.f.has_stats
    assert edge.step(images(16), [cloud.step([], 16)])[1].stats == []


def test_statistics_are_those_of_the_newest_images_until_a_download_comes():
    """Of the first 16, then a moving mean over 16. Fails if what a covered lens saw stays for good."""
    edge, x = one_edge(select="none"), images(32) // torch.arange(1, 33).view(32, 1, 1, 1)
    conv, bn, want = edge.model.net.conv1, edge.model.net.bn1, 0.0
    for part, share in zip(x.split(8), (1, 1 / 2, 1 / 2, 1 / 2)):
        edge.step(part, [])
        seen = conv(common.to_input(part, [0.5] * 3, [0.25] * 3, CPU)).mean((0, 2, 3))
        want = share * seen + (1 - share) * want
        assert torch.allclose(bn.running_mean, want, atol=1e-5)


def test_where_nothing_arrives_the_edge_is_bn_adapt():
    """To the digit, once a batch is as large as --seed-images, whatever it saw before."""
    edge, x = one_edge(seed_images=16), images(16)
    for garbage in (torch.zeros_like(x), images(16, 5)):
        edge.step(garbage, [])
    assert torch.allclose(edge.step(x, [])[0], baseline("bn").step(x), atol=1e-5)


def test_replay_joins_once_the_buffer_holds_enough():
    """u alone, then u and 8 others; f sees each once. Fails if u is remembered before the draw."""
    cloud, seen, old = quick().cloud, [], []
    forward = cloud.twin.forward
    cloud.twin.forward = lambda x, learn: seen.append(x) or forward(x, learn)
    for t, n in enumerate((8, 8, 16, 16)):
        u, before = images(8, t), cloud.counts["cloud_forwards"]
        cloud.step([Upload(u, [])], 16)
        assert len(seen[-1]) == n and torch.equal(seen[-1][:8], u)
        assert cloud.counts["cloud_forwards"] - before == 2 * n  # f and g, once each
        assert all(any(torch.equal(x, v) for v in old) for x in seen[-1][8:])
        old += u


def test_the_replay_buffer_is_first_in_first_out():
    """Of 30 images the newest 20 stay; draws do not repeat. Fails if places or draws are random."""
    cloud, x = quick(replay=20).cloud, images(30)
    for n, part in zip((7, 14, 20, 20, 20), x.split(7)):
        cloud.remember(part)
        assert len(cloud.kept) == n
    for held in (cloud.kept, cloud.draw(20)):
        assert torch.equal(held.unique(dim=0), x[10:].unique(dim=0))
    assert not torch.equal(cloud.draw(20), cloud.draw(20))


def test_uploads_wait_for_a_full_batch_and_replay_alone_comes_when_none_is():
    """28 uploads, 8 a step: 3 steps and 4 left. Fails if these make a step, or the flag is not read."""
    for on in (True, False):
        cloud = quick(replay_only=on).cloud
        assert cloud.step([Upload(images(28), [])], 16) and cloud.steps == 3
        assert (cloud.step([], 16) is not None) == on and cloud.steps == 3 + on
        assert cloud.counts["replay_only_steps"] == on and torch.equal(cloud.pending, images(28)[24:])


def test_a_frozen_foundation_keeps_its_affine_parameters():
    """Its statistics follow --bn. Fails if f learns, or its statistics stand still."""
    for frozen in (True, False):
        f, untouched = stepped(3, freeze_foundation=frozen).cloud.f, quick().cloud.f
        assert same(f.affine, untouched.affine) == frozen
        assert not any(torch.equal(a, b) for a, b in zip(f.stats, untouched.stats))


def test_the_foundation_learns_from_uploads_only_and_not_from_the_twin():
    """A replay-only step leaves f as it was. Fails if f's logits keep their graph."""
    method = stepped(2)
    f, before = method.cloud.f.model, copy.deepcopy(method.cloud.f.model)
    method.cloud.step([], 16)
    assert method.counts["replay_only_steps"] == 1
    assert same(*(list(net.state_dict().values()) for net in (f, before)))


def test_uploads_by_entropy_random_all_and_none():
    """Random takes as many as entropy. Fails if random ignores the budget, or E_min is dropped."""
    logits = torch.randn(400, 10) * torch.linspace(0.1, 20, 400)[:, None]
    entropy, random, every, none = (one_edge(select=select).choose(logits)
                                    for select in ("entropy", "random", "all", "none"))
    H = common.entropy(logits)
    assert torch.equal(entropy, (H > LOW) & (H < E0)) and (H < LOW).any() and (H > E0).any()
    assert random.sum() == entropy.sum() > 0 and not torch.equal(random, entropy)
    assert every.all() and not none.any()


def test_the_threshold_shrinks_as_the_model_gets_surer():
    """After the warm-up, and only with --dynamic. Fails if the warm-up mean keeps moving."""
    for dynamic in (True, False):
        edge, e_max = one_edge(dynamic=dynamic), []
        for scale in (1.0, 1.0, 4.0, 16.0):
            edge.choose(torch.randn(64, 10) * scale)
            e_max.append(edge.e_max)
        assert e_max[:2] == [E0, E0]
        assert (e_max[3] < e_max[2] < E0) if dynamic else e_max[3] == E0


@pytest.mark.parametrize("K", [1, 3])
def test_downloads_come_every_K_batches_and_hold_norm_layers_only(K):
    """Fails if --download-every is not read, or whole networks travel."""
    method, size = stepped(6, download_every=K), lambda tensors: 4 * sum(t.numel() for t in tensors)
    twin, counts = method.cloud.twin, method.counts
    assert method.link.now == 6 and counts["bytes_down_stats"] == 6 // K * size(twin.stats)
    assert counts["bytes_down"] == 6 // K * size(twin.affine + twin.stats)
    assert counts["bytes_up"] - counts["bytes_up_stats"] == 3072 * counts["uploads"]


def test_after_each_reset_both_networks_are_source_again():
    """And without momentum. Fails if a reset misses f, the twin or an optimizer."""
    for every, resets in ((1, 8), (0, 0)):
        method = stepped(4, reset_every=every)
        for net in (method.cloud.f, method.cloud.twin):
            assert same(net.affine, net.source) == bool(every)
            assert bool(net.opt.state) != bool(every)
        assert method.counts["resets"] == resets


def test_single_images_set_off_no_more_cloud_work_than_batches():
    """One replay-only step every 16 images. Fails if each call works."""
    method = quick(select="none")
    method.cloud.remember(images(32))
    for t in range(64):
        method.step(images(1, t))
    assert method.cloud.steps == 4


def test_a_download_that_ends_in_nan_is_undone():
    """Parameters and statistics; the next one counts. Fails if the edge answers NaN, or for good."""
    method = stepped(3)
    edge, twin, x = method.edge, method.cloud.twin, images(16, 9)
    want = copy.deepcopy(edge).step(x, [])[0]
    bad = Download([math.nan * t for t in twin.affine], twin.stats)
    for arrived in ([bad], [bad, bad]):
        at = copy.deepcopy(edge)
        for _ in range(2):  # once more: the way back stays
            assert torch.equal(at.step(x, arrived)[0], want)
            assert same(at.affine + at.stats, edge.affine + edge.stats)
    at.step(x, [Download(twin.affine, twin.stats)])
    assert same(at.affine + at.stats, twin.affine + twin.stats)


def test_one_image_whose_logits_overflow_does_not_end_all_uploads():
    """It is not sent. Fails if its entropy enters the mean that moves E_max."""
    logits = torch.randn(64, 10) * 4
    edge, plain = one_edge(warmup_batches=1), one_edge(warmup_batches=1)
    broken = torch.cat([logits, torch.full((1, 10), math.nan)])
    for _ in range(2):
        chosen, want = edge.choose(broken), plain.choose(logits)
        assert torch.equal(chosen[:64], want) and want.any() and not chosen[64]
    assert edge.e_max == plain.e_max
    assert not one_edge(warmup_batches=1).choose(broken[64:]).any()


@pytest.mark.parametrize("name", ["twin", "f"])
def test_nan_in_the_cloud_begins_anew_and_never_ends_the_edges_loop(name):
    """Statistics, too. Fails if one bad step stops every device, or stays, or goes unsaid."""
    method = stepped(2)
    learner, sent = getattr(method.cloud, name), method.counts["bytes_down"]
    learner.affine[0].data.fill_(math.nan)
    with pytest.warns(UserWarning, match="is nan, its gradient norm nan; lower --lr.* begin anew"):
        method.step(images(16))
    assert same(learner.affine, learner.source) and same(learner.stats, learner.source_stats)
    for t in range(3):
        assert method.step(images(16, t)).isfinite().all()
    assert method.counts["resets"] == 1 and method.counts["bytes_down"] >= 5 / 2 * sent  # it goes on


def test_a_flood_of_uploads_leaves_the_newest_and_work_stays_short():
    """16 batches wait at most. Fails if memory, or the steps of one call, have no bound."""
    cloud, x = quick().cloud, images(600)
    cloud.step([Upload(x, [])], 0)
    assert torch.equal(cloud.pending, x[-256:])
    cloud.step([], 16)
    assert cloud.steps == 32 and not len(cloud.pending)


def test_images_that_are_not_uint8_of_the_right_size_are_one_clear_line():
    """Fails if floats in [0, 1] are taken for nearly black bytes."""
    for x in (torch.rand(2, 3, 32, 32), images(2)[..., :28, :28], images(2)[:0]):
        with pytest.raises(InputError, match="step: images are .* expected uint8 .* S = 32"):
            quick().step(x)


def test_an_edge_network_that_calls_view_takes_channels_last_images(own, tiny):
    """Fails if what is checked is not what tools/edge.py runs."""
    args = cema.parse(["--arch", f"{own}:make", "--weights", "none", "--dataset", str(tiny)])
    (net, own_data), = streams.networks(args, common.load_data(str(tiny)), CPU, ("--arch",))
    assert FromBytes(net, own_data.mean, own_data.std)(images(2)).shape == (2, 4)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_one_value_a_channel_is_normalised_by_what_is_known(mode):
    """A map of 1x1 and a batch of one have no variance. Fails with torch's ValueError, or NaN."""
    bn = nn.BatchNorm2d(4)
    bn.running_mean.fill_(0.5)
    adaptive = cema.AdaptiveBN(bn, mode, 0.1).train()
    x = torch.randn(1, 4, 1, 1)
    assert torch.equal(adaptive(x), bn.eval()(x))


@pytest.mark.parametrize("change, error, words", [
    (dict(edges=2), TypeError, "edges"),
    (dict(recipe="few-classes"), TypeError, "a recipe is unpacked"),
    (dict(replay=10), InputError, "--replay 10: too few"),
    (dict(replay=16), InputError, "--replay 16: too few; expected 0, or 17"),
    (dict(e_min=0.5), InputError, "--e-min 0.5: not below"),
    (dict(dynamic=False, lam=0.04), InputError, "--e-min 0.02: not below"),
    (dict(foundation=small(classes=7)), InputError, "10 classes, the foundation 7")])
def test_keywords_that_make_no_sense_are_refused(change, error, words):
    """Fails if a name is swallowed, or a check goes."""
    with pytest.raises(error, match=words):
        quick(**change)


# ----- baselines ---------------------------------------------------------------------------------------


def test_source_and_bn_adapt_are_eval_and_train_mode():
    """Fails if BN adapt moves anything."""
    model, x = small(), images(32)
    assert torch.allclose(baseline("source", model).step(x), model(x), atol=1e-5)
    bn, train = baseline("bn", model), copy.deepcopy(model).train()
    for _ in range(2):
        assert torch.allclose(bn.step(x), train(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["tent", "eta"])
def test_tent_and_eta_answer_first_and_then_lower_the_entropy(kind):
    """Tent of all images, ETA of reliable ones. Fails if an update comes first, or goes uphill."""
    x, counts = images(64), Counter()
    method = baseline(kind, counts=counts, tent_lr=1e-3, eta_lr=1e-3, eta_d_margin=0.99)
    answer = method.step(x)
    assert torch.allclose(answer, baseline("bn").step(x), atol=1e-5)
    first = common.entropy(answer)
    for _ in range(5):
        last = common.entropy(method.step(x))
    reliable = first < E0
    assert 0 < reliable.sum() < 64 and last[reliable].mean() < first[reliable].mean()
    n = counts["edge_backwards"]
    assert n == 6 * 64 if kind == "tent" else 0 < n < 6 * 64


# ----- runs --------------------------------------------------------------------------------------------

WEIGHTS = common.ROOT / "weights"
TINY = ("--images 48 --batch-size 16 --corruptions gaussian_noise contrast --foundation resnet20 "
        f"--foundation-weights {WEIGHTS}/fashion_resnet20.pt --cloud-batch 8 --replay 64 "
        "--replay-draw 8 --replay-min 16 --log-every 2 --device cpu ")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(command, name): cema.py with these flags, and the records of its log."""
    monkeypatch.setattr(sys, "argv", ["cema.py"])

    def call(command: str, name: str = "run") -> list[dict]:
        out = tmp_path / name
        argv = f"--resume {out}" if command == "--resume" else f"{TINY} {command} --out {out}"
        common.run(common.each_seed(cema.main), cema.parse, argv.split())
        return [json.loads(line) for line in (out / "log.jsonl").open()]

    return call


def test_the_log_holds_what_the_tables_need(run, tmp_path, capsys):
    """Fails if a key is renamed, a method is missing, or a finished run keeps its checkpoint."""
    start, *_, end = run("--checkpoint-every 2")
    assert start["event"] == "start" and end["event"] == "end"
    for m in (*cema.METHODS, "foundation_source", "foundation"):
        accs = end["per_domain"][m]
        assert list(accs) == ["gaussian_noise/5", "contrast/5"]
        assert end[f"acc_{m}_pct"] == pytest.approx(sum(accs.values()) / 2)
    for k in ("bytes_down", "refused_messages", "edge_overhead_pct", "wall_s", "eta_backwards_pct",
              "cloud_ms_per_image", "peak_mib"):
        assert math.isfinite(end[k])
    assert end["bytes_up"] >= 3072 * end["uploads_pct"] / 100 * 96 > 0
    assert "not comparable" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_each_part_of_the_stream_has_its_record(run, capsys):
    """Domains in turn, twice. Fails if these are running means, or the note of --batch-size 1 goes."""
    log = run("--order lifelong --loop 2 --methods source bn --batch-size 1 --images 8")
    evals = [r for r in log if r["event"] == "eval"]
    assert [r["domain"] for r in evals] == ["gaussian_noise/5", "contrast/5"] * 2
    accs = [r["acc_source_pct"] for r in evals]
    assert accs[:2] == accs[2:] and accs[0] != accs[1]
    assert "note: with --batch-size 1" in capsys.readouterr().out


def figures(log: list[dict]) -> list[dict]:
    """The records without what depends on a clock."""
    timed = ("wall_s", "peak_mib", "edge_overhead_pct", "cloud_ms_per_image")
    return [{k: v for k, v in r.items() if k not in timed} for r in log if r["event"] != "start"]


@pytest.mark.parametrize("order", [
    "reset", "lifelong --reset-every 4 --no-score-foundation",
    "mixed --link-delay 1 --link-drop 0.3 --link-corrupt 0.4 --d-margin 0.3"])
def test_interrupted_and_resumed_equals_uninterrupted(order, run, monkeypatch, capsys):
    """Every record but the times, bitwise. Fails if a momentum, a queue or a generator is not saved."""
    command = ("--checkpoint-every 2 --methods tent eta cema --select random --images 24 --batch-size 8 "
               f"--cloud-batch 4 --replay-min 8 --lr 0.05 --tent-lr 0.5 --eta-lr 0.5 --order {order} ")
    step, calls = CEMA.step, []

    def ctrl_c_at_the_fourth(self, x):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, x)

    want = run(command, "a")
    monkeypatch.setattr(CEMA, "step", ctrl_c_at_the_fourth)
    with pytest.raises(SystemExit):
        run(command, "b")
    assert "to go on: python cema.py --resume" in capsys.readouterr().err
    got = run("--resume", "b")
    assert figures(want) == figures(got) and len(calls) == 4 + 6 - 2
    assert want[-1]["cloud_backwards"] > 0 and (want[-1]["refused_messages"] > 0) == ("link" in order)


def test_cema_beats_bn_adapt_beats_source(miniature):
    """Margins are half of the smaller measured ones, 40.8 and 7.0 points over seeds 0 and 1. Fails with
    --select none, without distillation, or if affine parameters of downloads are not applied."""
    _, y, logits, method = miniature
    acc = {m: 100 * (z.argmax(1) == y).float().mean() for m, z in logits.items()}
    assert acc["bn"] > acc["source"] + 20 and acc["cema"] > acc["bn"] + 3.5, acc
    assert 0 < method.counts["uploads"] < 0.6 * 768


def test_the_edge_loop_costs_at_most_five_percent_more_than_inference(fashion):
    """Best of three. Fails if the edge copies its parameters every batch."""
    x, _, g, _ = fashion
    overhead = []
    for _ in range(3):
        edge = one_edge(g, counts := Counter(), select="all")
        t0 = time.perf_counter()
        for _ in range(4):
            edge.step(x[:64], [])
        overhead.append((time.perf_counter() - t0) / counts["edge_inference_s"] - 1)
    assert min(overhead) < 0.05, overhead


def test_every_part_fires_under_default_flags(miniature):
    """Both thresholds, E_max, f, twin, replay, and replay alone. Fails if a default switches one off."""
    x, _, logits, method = miniature
    edge, cloud, counts, H = method.edge, method.cloud, method.counts, common.entropy(logits["cema"])
    assert (H < edge.e_min).any() and (H > edge.e0).any() and edge.e_max != edge.e0 and edge.good
    for net in (cloud.f, cloud.twin):
        assert not same(net.affine, net.source)
    assert len(cloud.kept) >= 256 and counts["cloud_forwards"] > 2 * counts["uploads"]
    for part in x[H.argsort()[:128]].split(64):
        method.step(part)
    assert counts["replay_only_steps"] > 0


@pytest.mark.parametrize("command, words", [
    ("--severity 6", "--severity"), ("--order sideways", "--order"), ("--edges 4", "--edges"),
    ("--link-drop 1.5", "--link-drop"), ("--batch-size 0", "--batch-size"),
    ("--methods magic", "--methods"), ("--device tpu9", "--device tpu9"),
    ("--arch squeezenet1_0", "nothing can adapt"), ("--affine ln", "nothing can adapt by --affine ln"),
    ("--arch resnet99", "--arch resnet99: no such network"), ("--weights nowhere.pt", "nowhere.pt"),
    ("--foundation resnet99", "--foundation resnet99: no such network"),
    (f"--foundation resnet8 --foundation-weights {WEIGHTS}/fashion_resnet20.pt",
     "--foundation is resnet8, and the file"),
    (f"--foundation-weights {WEIGHTS}/cifar100_resnet20.pt --foundation resnet20", "100 classes"),
    ("--out {tmp}/file/x", "cannot be made"),
])
def test_a_users_mistake_gets_one_line(command, words, tmp_path, fails):
    """And leaves nothing behind. Fails if it ends in a traceback."""
    (tmp_path / "file").write_text("")
    assert words in fails(cema, f"{TINY} --out {tmp_path}/o " + command.replace("{tmp}", str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_without_tools_the_script_says_what_is_missing(fails, monkeypatch):
    """Fails if cema.py imports the benchmark at its top."""
    monkeypatch.setitem(sys.modules, "tools.streams", None)
    assert "copy tools/" in fails(cema, "")
    assert "\nfrom tools" not in Path(cema.__file__).read_text()


def test_the_readmes_lines_run():
    """Copied from the README. Fails if a name in them is out of date."""
    blocks = re.findall(r"```python\n(.*?)```", (common.ROOT / "README.md").read_text(), re.S)
    lines, = [b for b in blocks if "from cema import" in b]
    names = dict(my_small_network=small().net, my_large_network=small(1).net, mean=[0.5] * 3,
                 std=[0.25] * 3, my_stream=images(64).split(32))
    exec(lines, names)
    assert names["logits"].shape == (32, 10) and names["method"].counts["edge_forwards"] == 64


def test_a_recipe_sets_its_values_and_flags_still_win():
    """In any order. Fails if the recipe overwrites an explicit flag."""
    args = cema.parse("--lr 0.5 --recipe few-classes".split())
    assert (args.lr, args.bn, args.eta_lr) == (0.5, "batch", cema.RECIPES["few-classes"]["eta_lr"])
    assert cema.parse([]).lr == 2.5e-3 and cema.parse([]).bn == "ema"


def test_help_needs_neither_data_nor_network():
    """Nor the repository around it. Fails if the parser loads something."""
    help_ = [sys.executable, cema.__file__, "--help"]
    assert subprocess.run(help_, capture_output=True, cwd="/").returncode == 0
