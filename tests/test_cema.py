"""Claims about cema.py. Each docstring ends with the change under which the test was seen to fail."""

import copy
import json
import math
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cema
import common
from cema import CEMA, AdaptiveBN, Baseline, Domain, Edge, FromBytes, Link, Refused, Stream, configure
from common import InputError

CPU = torch.device("cpu")
E0, LOW = 0.4 * math.log(10), 0.02 * math.log(10)


def small(seed: int = 0, arch: str = "resnet8", classes: int = 10) -> FromBytes:
    """An untrained network on uint8 images, whose BN statistics are not the initial 0 and 1, with surer answers than a fresh one."""
    torch.manual_seed(seed)
    net = common.build_model(arch, classes)
    for _ in range(3):
        net.train()(torch.randn(16, 3, 32, 32))
    list(net.modules())[-1].weight.data.mul_(6)
    return FromBytes(net.eval(), [0.5] * 3, [0.25] * 3)


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def quick(**kw) -> CEMA:
    """CEMA that learns at once: every image uploaded, 8 a cloud step, replay from 16 on."""
    defaults = dict(image_size=32, select="all", cloud_batch=8, replay=64, replay_draw=8, replay_min=16, batch_size=16, seed_images=16)
    return CEMA(kw.pop("edge", None) or small(), kw.pop("foundation", None) or small(1), **(defaults | kw))


def one_edge(**kw) -> Edge:
    defaults = dict(bn="ema", affine=["bn"], e0=E0, e_min=LOW, lam=1.0, dynamic=True, warmup_batches=2, d_margin=0.0, select="entropy",
                    seed_images=16, bn_momentum=0.1, seed=0)
    return Edge(kw.pop("model", None) or small(), kw.pop("counts", Counter()), **(defaults | kw))


def bn_layers(model: nn.Module) -> list[AdaptiveBN]:
    return [m for m in model.modules() if isinstance(m, AdaptiveBN)]


@pytest.fixture(scope="module")
def fashion():
    data = common.load_data("fashion")
    net, data, _ = common.find_weights("resnet20", "fashion", data, None, CPU)
    return FromBytes(net.to(memory_format=torch.channels_last), data.mean, data.std), data


# ----- equations -----------------------------------------------------------------------------------------------------


def test_uniform_logits_have_entropy_ln_C():
    """And sure ones none. Fails with log2."""
    assert common.entropy(torch.zeros(3, 7)).tolist() == pytest.approx([math.log(7)] * 3)
    assert common.entropy(torch.tensor([[200.0, 0, 0]])).item() == 0


def test_entropy_equals_torch_and_has_its_gradient():
    """Against torch.distributions. Fails if p is detached in -sum p ln p."""
    a = torch.randn(5, 10, requires_grad=True)
    b = a.detach().clone().requires_grad_(True)
    want, ours = torch.distributions.Categorical(logits=b).entropy(), common.entropy(a)
    assert torch.allclose(ours, want, atol=1e-6)
    ours.sum().backward(), want.sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_the_sample_weight_takes_no_gradient():
    """grad mean[w H] = mean[w grad H]. Fails without the detach."""
    logits = torch.randn(6, 10, requires_grad=True)
    got, = torch.autograd.grad(cema.entropy_loss(logits, E0), logits)
    H = common.entropy(logits)
    want, = torch.autograd.grad((torch.exp(E0 - H).tolist()[0] * H[0] + sum(torch.exp(E0 - H).tolist()[i] * H[i] for i in range(1, 6))) / 6, logits)
    assert torch.allclose(got, want, atol=1e-6)


def test_surer_images_weigh_more():
    """exp(E_0 - H). Fails with exp(H - E_0)."""
    assert cema.sample_weight(torch.tensor([E0]), E0).item() == pytest.approx(1)
    assert cema.sample_weight(torch.tensor([0.0]), E0).item() == pytest.approx(math.exp(E0))


def test_the_threshold_telescopes_from_the_papers_recursion():
    """E_max^t = E_max^{t-1} * mean_t / mean_{t-1}, for lambda 1. Fails if the ratio is turned over."""
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
        want += (2 * np.exp(E0 - H_g) * H_g + 3 * np.exp(E0 - H_f) * T**2 * (qT * np.log(qT / pT)).sum()
                 - 5 * np.exp(E0 - H_f) * np.log(p[b.argmax()])) / 7
    assert cema.distillation_loss(g, f, E0, 2, 3, 5, T).item() == pytest.approx(want, rel=1e-5)


def test_a_network_is_at_no_distance_from_itself():
    """KL(f || f) = 0, and its gradient. Fails if f and g enter at different temperatures."""
    f = torch.randn(5, 10)
    g = f.clone().requires_grad_(True)
    loss = cema.distillation_loss(g, f, E0, 0, 1, 0, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and g.grad.abs().max() < 1e-6


# ----- model surgery -------------------------------------------------------------------------------------------------


def both_bn(mode: str):
    bn = nn.BatchNorm2d(4)
    bn.weight.data.uniform_(0.5, 2), bn.bias.data.uniform_(-1, 1)
    bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.5, 2)
    return bn, AdaptiveBN(copy.deepcopy(bn), mode, 0.1)


def test_source_and_batch_statistics_are_torchs_eval_and_train():
    """Whatever mode the module is in. Fails if "batch" uses the running ones."""
    x = torch.randn(8, 4, 5, 5)
    bn, ours = both_bn("source")
    for train in (False, True):
        assert torch.allclose(ours.train(train)(x), bn.eval()(x), atol=1e-6)
    bn, ours = both_bn("batch")
    for train in (False, True):
        assert torch.allclose(ours.train(train)(x), bn.train()(x), atol=1e-6)


def test_ema_normalises_by_the_running_statistics_and_moves_them_in_training_only():
    """The value is eval's in both modes. Fails if they move before use, or in eval."""
    x = torch.randn(8, 4, 5, 5) * 2 + 1
    bn, ours = both_bn("ema")
    mu, var = ours.running_mean.clone(), ours.running_var.clone()
    assert torch.allclose(ours.eval()(x), bn.eval()(x), atol=1e-5) and torch.equal(ours.running_mean, mu)
    assert torch.allclose(ours.train()(x), bn.eval()(x), atol=1e-5)
    assert torch.allclose(ours.running_mean, 0.9 * mu + 0.1 * x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(ours.running_var, 0.9 * var + 0.1 * x.var((0, 2, 3), correction=0), atol=1e-5)


def test_the_gradient_of_ema_flows_through_the_batch_statistics():
    """It is that of x_hat = (x - mu_B) / sd_B * r + d with r, d constant. Fails if gradients go through eval-mode BN."""
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


@pytest.mark.parametrize("sizes", [(16,), (1, 1, 1, 1), (8, 4, 4)])
def test_seeding_averages_to_the_statistics_of_all_images_together(sizes):
    """Also one image at a time. Fails if variances are averaged instead of squares."""
    x = torch.randn(sum(sizes), 4, 5, 5) + 3 * torch.randn(sum(sizes), 4, 1, 1)
    layer, n = nn.Sequential(both_bn("ema")[1]).eval(), 0
    for part in x.split(sizes):
        n += len(part)
        with cema.averaging(layer, len(part) / n):
            layer(part)
    assert torch.allclose(layer[0].running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(layer[0].running_var, x.var((0, 2, 3), correction=0), rtol=1e-4)


def test_only_affine_parameters_of_norm_layers_may_move():
    """And the original is not touched. Fails if convolutions keep requires_grad."""
    model = small()
    before = copy.deepcopy(model.state_dict())
    adapted, affine, stats = configure(model, "ema")
    moving = [p for p in adapted.parameters() if p.requires_grad]
    assert len(moving) == len(affine) == 18 and {id(p) for p in moving} == {id(p) for p in affine}
    assert len(stats) == 18 and all(p.ndim == 1 for p in affine)
    for p in affine:
        p.data.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not bn_layers(model)
    assert configure(model, "batch")[2] == []


def test_layer_and_group_norm_adapt_too():
    """Affine parameters only. Fails if a kind is mapped to another layer."""
    vit = common.build_model("vit_b_16", 10)
    assert len(configure(vit, "ema", ["ln"])[1]) == 2 * sum(isinstance(m, nn.LayerNorm) for m in vit.modules())
    gn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    assert len(configure(gn, "ema", ["gn"])[1]) == 2 and len(configure(gn, "ema", ["gn", "bn"])[1]) == 4
    with pytest.raises(InputError, match="--affine ln"):
        configure(vit, "ema")
    with pytest.raises(InputError, match="nothing can adapt"):
        configure(nn.Sequential(nn.Conv2d(3, 4, 3)), "ema")


def test_masked_classes_are_gone_from_the_logits():
    """Fails if they are set to zero."""
    model = small()
    x = images(4)
    kept = FromBytes(model.net, model.mean, model.std, [7, 2])
    assert torch.equal(kept(x), model(x)[:, [7, 2]])


# ----- messages and link ---------------------------------------------------------------------------------------------


def signed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def test_messages_come_back_as_they_were():
    """Fails if a dtype or the byte order changes on the way."""
    x, stats, affine = images(5), [torch.randn(3), torch.rand(3)], [torch.randn(4), torch.randn(2)]
    got, s = cema.decode_upload(cema.encode_upload(x, stats), 32, 6)
    assert torch.equal(got, x) and torch.equal(s, torch.cat(stats))
    got, s = cema.decode_upload(cema.encode_upload(x), 32, 6)
    assert torch.equal(got, x) and not len(s)
    version, values = cema.decode_download(cema.encode_download(7, affine, stats), 6, 6, newer_than=6)
    assert version == 7 and torch.equal(values, torch.cat(affine + stats))


def test_an_upload_is_hardly_larger_than_its_images():
    """uint8, as a camera would send them: 3,072 bytes each. Fails with floats."""
    assert len(cema.encode_upload(images(10))) == 10 * 3072 + 20


def test_a_message_with_any_wrong_byte_is_refused():
    """Each byte in turn, and each length. Fails without the checksum."""
    message = cema.encode_download(1, [torch.randn(3)], [])
    for i in range(len(message)):
        with pytest.raises(Refused):
            cema.decode_download(message[:i] + bytes([message[i] ^ 1]) + message[i + 1:], 3, 0, 0)
        with pytest.raises(Refused):
            cema.decode_download(message[:i], 3, 0, 0)


@pytest.mark.parametrize("version, affine, stats", [
    (3, [1.0, 2.0], [1.0]), (2, [1.0, 2.0], [1.0]), (4, [1.0], [1.0]), (4, [1.0, 2.0], []), (4, [1.0, math.nan], [1.0]),
    (4, [1.0, 2.0], [math.inf])], ids=["same version", "older", "fewer affine", "no statistics", "NaN", "infinite"])
def test_whole_but_unusable_downloads_are_refused(version, affine, stats):
    """The receiver is at version 3. Fails if the version, the sizes or finiteness go unchecked."""
    with pytest.raises(Refused):
        cema.decode_download(cema.encode_download(version, [torch.tensor(affine)], [torch.tensor(stats)]), 2, 1, newer_than=3)


@pytest.mark.parametrize("message", [
    b"", b"x" * 30, cema.encode_download(1, [torch.ones(3)], []), cema.encode_upload(images(2)[..., :16, :16]),
    cema.encode_upload(images(2), [torch.ones(5)]), cema.encode_upload(images(2), [torch.full((4,), math.nan)]),
    signed(cema.HEADER.pack(b"CEMU", 2**31, 32, 0)), signed(cema.HEADER.pack(b"CEMU", 1, 32, 0) + b"\0" * 100)],
    ids=["empty", "noise", "a download", "16 px", "other statistics", "NaN", "2^31 images", "too few bytes"])
def test_malformed_uploads_are_refused(message):
    """Fails if a check of decode_upload goes."""
    with pytest.raises(Refused):
        cema.decode_upload(message, 32, 4)


def test_the_cloud_counts_refused_uploads_and_goes_on():
    """Broken, not finite, negative variance. Fails if the refusal is raised, or the variance goes unchecked."""
    method = quick()
    cloud, n = method.cloud, method.edges[0].sizes[1]
    before = copy.deepcopy(cloud.state_dict())
    good = cema.encode_upload(images(3))
    for bad in (good[:-1], cema.encode_upload(images(3), [torch.full((n,), math.nan)]), cema.encode_upload(images(3), [torch.full((n,), -1.0)])):
        cloud.receive(bad, 0)
    assert method.counts["refused_messages"] == 3 and not len(cloud.twins[0].pending)
    assert all(torch.equal(v, before["twins"][0]["model"][k]) for k, v in cloud.twins[0].model.state_dict().items())
    cloud.receive(good, 0)
    assert len(cloud.twins[0].pending) == 3


def test_a_link_delays_drops_and_corrupts_as_told():
    """Shares within 4 sd of 4,000 messages. Fails if delay counts from one, or drop and corrupt are mixed up."""
    link = Link(delay_batches=2)
    link.send("down", b"a")
    arrived = []
    for t in range(4):
        arrived += [(t, m) for m in link.receive("down")]
        link.tick()
    assert arrived == [(2, b"a")] and link.receive("up") == []
    for kw, share in ((dict(drop=0.3), 0.7), (dict(corrupt=0.3), 0.7)):
        link, message = Link(**kw), bytes(range(50))
        for _ in range(4000):
            link.send("up", message)
        got = link.receive("up")
        assert abs(sum(m == message for m in got) / 4000 - share) < 4 * math.sqrt(0.21 / 4000)
        assert len(got) == 4000 if "corrupt" in kw else len(got) < 4000


def test_only_bytes_pass_a_link():
    """Fails if a tensor can be sent."""
    with pytest.raises(TypeError):
        Link().send("up", images(1))


def test_a_lost_download_harms_nobody():
    """An edge that gets the last download only ends where one that gets all does. Fails if downloads are differences."""
    a, b, twin = one_edge(), one_edge(), configure(small(), "ema")
    for version in (1, 2, 3):
        for t in twin[1] + twin[2]:
            t.data.uniform_(0.5, 1)
        message = cema.encode_download(version, twin[1], twin[2])
        a.step(images(4), [message])
    b.step(images(4), [message])
    assert all(torch.equal(p, q) for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_the_edge_keeps_its_last_good_parameters():
    """Broken, stale and NaN downloads change no logit and are counted. Fails if the values are filled in before the checks."""
    counts = Counter()
    edge, twin, x = one_edge(counts=counts), configure(small(), "ema"), images(4)
    edge.step(x, [cema.encode_download(5, *[[t + 0.1 for t in part] for part in twin[1:]])])
    want, _ = edge.step(x, [])
    good = cema.encode_download(6, *twin[1:])
    bad = [good[:100], good[:50] + bytes([good[50] ^ 1]) + good[51:], cema.encode_download(5, *twin[1:]), cema.encode_download(7, twin[1][:-1], twin[2]),
           cema.encode_download(8, [p * math.nan for p in twin[1]], twin[2])]
    got, _ = edge.step(x, bad)
    assert torch.equal(got, want) and counts["refused_messages"] == len(bad) and edge.version == 5


# ----- edge and cloud ------------------------------------------------------------------------------------------------


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("an edge cannot do this")


class ForwardOnly(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return NoBackward.apply(self.model(x))


def test_the_edge_works_where_backward_raises():
    """A network without a backward serves as edge, and fails as Tent. Fails if the edge ever calls backward."""
    model = ForwardOnly(small())
    edge = one_edge(model=model)
    logits, upload = edge.step(images(16), [])
    assert logits.shape == (16, 10) and not logits.requires_grad
    with pytest.raises(RuntimeError, match="cannot do this"):
        Baseline("tent", model, Counter(), 10, 1e-3).step(images(16))


def test_the_edge_holds_no_optimizer_no_gradient_and_nothing_of_the_clouds():
    """No parameter asks for a gradient, no storage is shared. Fails if the twin's network is handed to the edge."""
    method = quick()
    for t in range(4):
        method.step(images(16, t))
    edge, cloud = method.edges[0], method.cloud
    assert not any(p.requires_grad or p.grad is not None for p in edge.model.parameters())
    assert not any(isinstance(v, (torch.optim.Optimizer, cema.Cloud, cema.Adapted, Link)) for v in vars(edge).values())
    theirs = {t.data_ptr() for net in (cloud.f.model, cloud.twins[0].model) for t in net.state_dict().values()}
    assert not theirs & {t.data_ptr() for t in edge.model.state_dict().values()}


def test_the_edge_answers_before_anything_is_learned_of_a_batch():
    """Logits are those of the parameters before the batch. Fails if the download of the same batch is applied first."""
    method, x = quick(), [images(16, t) for t in range(5)]
    for t in range(5):
        model = copy.deepcopy(method.edges[0].model)
        pending = list(method.links[0].queues["down"])
        got = method.step(x[t])
        if t:
            assert len(pending) == 1
            edge = one_edge()
            cema.fill(edge.download, cema.decode_download(pending[0][1], *edge.sizes, 0)[1])
            assert torch.allclose(got, edge.model(x[t]), atol=1e-5) and not torch.allclose(got, model(x[t]), atol=1e-3)


def test_a_download_makes_the_edge_the_twin():
    """Every tensor equal. Fails if statistics or some affine parameters stay behind."""
    method = quick()
    for t in range(4):
        method.step(images(16, t))
    edge, twin = method.edges[0], method.cloud.twins[0]
    edge.step(images(2), method.links[0].receive("down"))
    assert all(torch.equal(a, b) for a, b in zip(edge.affine + edge.stats, twin.affine + twin.stats))
    assert any(not torch.equal(p, p0) for p, p0 in zip(twin.affine, twin.source))


def test_the_twin_starts_from_the_edges_statistics():
    """They come with the first upload. Fails if the twin takes those of its first 8 uploads."""
    method = quick()
    logits, upload = method.edges[0].step(images(16), [])
    method.cloud.receive(upload, 0)
    assert all(torch.equal(a, b) for a, b in zip(method.edges[0].stats, method.cloud.twins[0].stats)) and method.cloud.twins[0].seeded


@pytest.mark.parametrize("select", ["none", "all"])
def test_an_edge_that_keeps_its_own_statistics_averages_over_all_images(select):
    """--bn edge: also over those it does not upload; the twin takes them over, and downloads hold affine parameters only.
    Fails if the twin moves them, or a download overwrites them."""
    method = quick(bn="edge", select=select, seed_images=16, lr=0.1)
    edge, twin = method.edges[0], method.cloud.twins[0]
    bn, first = bn_layers(edge.model)[0], edge.model.net.conv1
    mean = None
    for t in range(4):
        x = images(16, t) // (t + 1)
        mu = first(common.to_input(x, [0.5] * 3, [0.25] * 3, CPU)).mean((0, 2, 3))
        share = 1.0 if t == 0 else 0.1
        mean = mu if mean is None else (1 - share) * mean + share * mu
        method.step(x)
        assert torch.allclose(bn.running_mean, mean, atol=1e-5)
        if select == "all":
            assert all(torch.equal(a, b) for a, b in zip(edge.stats, twin.stats))
    assert (edge.version > 0) == (method.counts["bytes_down"] > 0) == (select == "all") and method.counts["bytes_down_stats"] == 0


def test_uploads_wait_until_a_cloud_batch_is_full():
    """20 uploads, 8 a step: 2 steps and 4 left. Fails if the rest makes a smaller step."""
    cloud = quick(replay=0).cloud
    cloud.receive(cema.encode_upload(images(20)), 0)
    cloud.work(0)
    assert cloud.twins[0].steps == 2 and len(cloud.twins[0].pending) == 4


def test_replay_joins_once_the_buffer_holds_enough():
    """u alone first, then u and 8 others; f sees each once. Fails if u is drawn from the buffer it was just put into."""
    method = quick()
    cloud, seen = method.cloud, []
    forward = cloud.twins[0].forward
    cloud.twins[0].forward = lambda x, *a, **k: seen.append(x) or forward(x, *a, **k)
    for t in range(4):
        u = images(8, t)
        cloud.receive(cema.encode_upload(u), 0)
        before = cloud.counts["cloud_forwards"]
        cloud.work(0)
        n = 8 if t < 2 else 16
        assert len(seen[-1]) == n and torch.equal(seen[-1][:8], u)
        assert cloud.counts["cloud_forwards"] - before == 2 * n  # f and g, once each
    old = {bytes(x.numpy().tobytes()) for t in range(3) for x in images(8, t)}
    assert all(bytes(x.numpy().tobytes()) in old for x in seen[-1][8:])


def test_the_replay_buffer_is_first_in_first_out():
    """Of 30 images 20 stay, the newest; draws do not repeat. Fails if slots are chosen at random, or drawn with repetition."""
    twin = quick(replay=20).cloud.twins[0]
    x = images(30)
    for part in x.split(7):
        twin.remember(part)
    kept = {bytes(v.numpy().tobytes()) for v in twin.draw(20)}
    assert kept == {bytes(v.numpy().tobytes()) for v in x[10:]} and twin.replayed == 20


def test_a_replay_only_step_comes_when_no_upload_did():
    """More than 16 in the buffer, nothing pending. Fails if the flag is not read."""
    for on in (True, False):
        cloud = quick(replay_only=on).cloud
        cloud.receive(cema.encode_upload(images(24)), 0)
        cloud.work(0)
        assert cloud.twins[0].steps == 3 and not cloud.counts["replay_only_steps"]
        assert (cloud.work(0) is not None) == on
        assert cloud.twins[0].steps == 3 + on and cloud.counts["replay_only_steps"] == on


def test_a_frozen_foundation_keeps_its_affine_parameters():
    """Its statistics follow --bn. Fails if f learns, or its statistics stand still."""
    for frozen in (True, False):
        f = (method := quick(freeze_foundation=frozen)).cloud.f
        stats = [t.clone() for t in f.stats]
        for t in range(3):
            method.step(images(16, t))
        assert all(torch.equal(p, p0) for p, p0 in zip(f.affine, f.source)) == frozen
        assert not any(torch.equal(a, b) for a, b in zip(f.stats, stats))


def test_the_foundation_learns_from_uploads_only_and_not_from_the_twin():
    """A distillation step leaves f as it was. Fails if f's logits keep their graph, or replay moves f's statistics."""
    method = quick()
    for t in range(2):
        method.step(images(16, t))
    f, twin = method.cloud.f, method.cloud.twins[0]
    before = copy.deepcopy(f.model.state_dict())
    method.cloud.work(0)  # nothing pending: replay only
    assert method.counts["replay_only_steps"] == 1
    assert all(torch.equal(v, before[k]) for k, v in f.model.state_dict().items())


def test_uploads_by_entropy_random_all_and_none():
    """Random takes as many as entropy. Fails if random ignores the budget."""
    chosen = {}
    logits = torch.randn(400, 10) * torch.linspace(0.1, 20, 400)[:, None]
    for select in ("entropy", "random", "all", "none"):
        chosen[select] = one_edge(select=select).choose(logits)
    H = common.entropy(logits)
    assert torch.equal(chosen["entropy"], (H > LOW) & (H < E0)) and 0 < chosen["entropy"].sum() < 400
    assert chosen["random"].sum() == chosen["entropy"].sum() and not torch.equal(chosen["random"], chosen["entropy"])
    assert chosen["all"].all() and not chosen["none"].any()


def test_the_threshold_shrinks_as_the_model_gets_surer():
    """After the warm-up, and only with --dynamic. Fails if the warm-up mean keeps moving."""
    for dynamic in (True, False):
        edge, e_max = one_edge(dynamic=dynamic), []
        for scale in (1.0, 1.0, 4.0, 16.0):
            edge.choose(torch.randn(64, 10) * scale)
            e_max.append(edge.e_max)
        assert e_max[:2] == [E0, E0]
        assert (e_max[3] < e_max[2] < E0) if dynamic else e_max[3] == E0


def test_downloads_come_every_K_batches():
    """Fails if --download-every is not read."""
    for K in (1, 3):
        method = quick(download_every=K)
        for t in range(6):
            method.step(images(16, t))
        assert method.links[0].now == 6
        assert method.counts["bytes_down"] // len(cema.encode_download(1, method.edges[0].affine, method.edges[0].stats)) == 6 // K


def test_ways_back_to_source():
    """Pull 1 never leaves source, --reset-every and --recover-below return to it. Fails if one is not applied to f."""
    for kw, resets in ((dict(pull_to_source=1.0), 0), (dict(reset_every=1), 8), (dict(recover_below=100.0), 8)):
        method = quick(**kw)
        for t in range(4):
            method.step(images(16, t))
        for net in (method.cloud.f, method.cloud.twins[0]):
            assert all(torch.allclose(p, p0) for p, p0 in zip(net.affine, net.source)), kw
        assert method.counts["resets"] == resets


def test_several_edges_share_f_and_have_a_twin_each():
    """Batches in turn. Fails if an upload goes to another twin, or a download to another edge."""
    method = quick(links=[Link(), Link(), Link()])
    for t in range(9):
        method.step(images(16, t) // (1 + t % 3))  # each edge sees its own brightness
    edges, twins = method.edges, method.cloud.twins
    assert len(twins) == 3 and all(e.batches == 3 for e in edges)
    assert all(twin.replayed == 48 and twin.replay[:48].max() == 255 // (1 + k) for k, twin in enumerate(twins))
    for e, twin in zip(edges, twins):
        e.step(images(2), method.links[edges.index(e)].receive("down"))
        assert torch.equal(e.affine[0], twin.affine[0])
    assert not torch.equal(twins[0].affine[0], twins[1].affine[0])


def test_single_images_set_off_no_more_cloud_work_than_batches():
    """One replay-only step every 16 images. Fails if each call works."""
    method = quick(select="none")
    method.cloud.twins[0].remember(images(32))
    for t in range(64):
        method.step(images(1, t))
    assert method.cloud.twins[0].steps == 4


def test_with_messages_late_beyond_the_end_the_edge_is_what_it_was():
    """It answers as the same edge alone. Fails if the edge waits, or takes anything but messages."""
    method, alone = quick(links=[Link(delay_batches=100)]), one_edge()
    for t in range(4):
        assert torch.equal(method.step(images(16, t)), alone.step(images(16, t), [])[0])


def test_nan_stops_the_run_with_the_name_of_the_loss():
    """Fails if the loss goes unchecked."""
    method = quick()
    method.cloud.twins[0].affine[0].data.fill_(math.nan)
    with pytest.raises(InputError, match="loss of g is nan.*--lr"):
        method.step(images(16))


def test_bad_parts_are_named():
    """Classes that differ, a buffer that is never used. Fails if a check goes."""
    with pytest.raises(InputError, match="10 classes, the foundation 7"):
        quick(foundation=small(classes=7))
    with pytest.raises(InputError, match="--replay 10"):
        quick(replay=10)


# ----- baselines -----------------------------------------------------------------------------------------------------


def test_source_and_bn_adapt_are_eval_and_train_mode():
    """Fails if BN adapt moves anything."""
    model, x = small(), images(32)
    assert torch.allclose(Baseline("source", model, Counter(), 10).step(x), model(x), atol=1e-5)
    bn = Baseline("bn", model, Counter(), 10)
    train = copy.deepcopy(model).train()
    for _ in range(2):
        assert torch.allclose(bn.step(x), train(x), atol=1e-5)


def test_tent_and_eta_lower_the_entropy_and_count_what_they_learn_from():
    """Tent learns from all images, ETA from reliable ones. Fails if a step goes uphill."""
    x = images(64)
    for kind in ("tent", "eta"):
        method = Baseline(kind, small(), counts := Counter(), 10, lr=1e-3, d_margin=0.99)
        first = common.entropy(method.step(x))
        for _ in range(5):
            last = common.entropy(method.step(x))
        reliable = first < E0
        assert 0 < reliable.sum() < 64
        assert last[reliable].mean() < first[reliable].mean()
        assert counts["edge_backwards"] == 6 * 64 if kind == "tent" else 0 < counts["edge_backwards"] < 6 * 64


def test_eta_with_learning_rate_zero_is_bn_adapt():
    """Fails if ETA answers after its update, or another mode."""
    x = images(32)
    a, b = Baseline("eta", small(), Counter(), 10, lr=0.0), Baseline("bn", small(), Counter(), 10)
    assert torch.allclose(a.step(x), b.step(x)) and torch.allclose(a.step(x), b.step(x))


# ----- streams -------------------------------------------------------------------------------------------------------


def toy(n: int = 30) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(images(n), torch.arange(n) % 3)


def test_orders_and_loops():
    """Fails if images repeat, classes are not sorted, or a batch reaches over a reset."""
    domains = [Domain("a", toy()), Domain("b", toy())]
    for order in cema.ORDERS:
        s = Stream(domains, order, images=20, loop=2, seed=0)
        d, i = s.where.T
        assert len(s) == 80
        for k in (0, 1):
            assert i[d == k].unique(return_counts=True)[1].tolist() == [2] * 20
        one_pass = s.where[:40]
        if order == "mixed":
            assert 5 < one_pass[:20, 0].sum() < 15 and len(one_pass.unique(dim=0)) == 40
        elif order == "lifelong":
            assert d.tolist() == ([0] * 20 + [1] * 20) * 2
        else:
            assert d.tolist() == [0] * 40 + [1] * 40
        if order == "label-shift":
            y = [int(domains[0].split[k][1]) for k in i[:20].tolist()]
            assert y == sorted(y)
        else:
            assert i[:20].tolist() != sorted(i[:20].tolist())
        batches = s.batches(16)
        assert [k for b in batches for k in b] == list(range(80)) and s.batches(16, first=2) == batches[2:]
        if order != "mixed":
            assert all(len({int(s.where[k, 0]) for k in b}) == 1 for b in batches)
    assert not torch.equal(Stream(domains, "mixed", 20, 1, 0).where, Stream(domains, "mixed", 20, 1, 1).where)


def test_an_image_looks_the_same_in_every_order():
    """Corruption depends on image and seed, not on its place. Fails if the index is that of the batch."""
    domains = [Domain("gaussian_noise/5", toy(), "gaussian_noise"), Domain("fog/5", toy(), "fog")]

    def collect(order, batch_size):
        s, out = Stream(domains, order, 30, 1, 0), {}
        for x, y, d, i in torch.utils.data.DataLoader(s, batch_sampler=s.batches(batch_size)):
            for image, *key in zip(cema.as_seen(x, d, i, domains, 5, 0), d.tolist(), i.tolist()):
                out[tuple(key)] = image
        return out

    a, b = collect("reset", 16), collect("mixed", 7)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a[0, 0], toy()[0][0]) and not torch.equal(a[0, 0], a[1, 0])


def jpegs(root: Path, wnids, n: int = 2, size: int = 224) -> None:
    from PIL import Image

    for c, wnid in enumerate(wnids):
        (root / wnid).mkdir(parents=True)
        for k in range(n):
            Image.fromarray(np.full((size, size, 3), 20 * c + k, np.uint8)).save(root / wnid / f"{k}.JPEG", quality=95)


def parsed(command: str):
    return cema.build_parser().parse_args(command.split())


def test_imagenet_c_folders(tmp_path):
    """corruption/severity/wnid. Fails if another severity is read, or the crop changes the pixels."""
    for n in ("fog", "snow"):
        jpegs(tmp_path / n / "3", ["n01", "n02", "n03"])
    data, domains, keep = cema.load_stream(parsed(f"--stream imagenet-c --data-dir {tmp_path} --corruptions fog snow --severity 3"))
    assert [d.name for d in domains] == ["fog/3", "snow/3"] and data.classes == ["n01", "n02", "n03"] and keep is None
    x, y = domains[0].split[5]
    assert x.shape == (3, 224, 224) and x.dtype == torch.uint8 and y == 2 and abs(int(x[0, 0, 0]) - 41) <= 2
    assert torch.equal(cema.as_seen(x[None].clone(), torch.tensor([0]), torch.tensor([5]), domains, 3, 0)[0], x)


def test_cifar_c_files(tmp_path):
    """Severity s is rows 10,000 (s - 1) to 10,000 s. Fails if it is off by one."""
    a = np.zeros((50_000, 32, 32, 3), np.uint8)
    a[:, 0, 0, 0] = np.arange(50_000) // 10_000 + 1
    for n in ("fog", "snow"):
        np.save(tmp_path / f"{n}.npy", a)
    np.save(tmp_path / "labels.npy", np.arange(50_000) % 10)
    data, domains, _ = cema.load_stream(parsed(f"--stream cifar-c --dataset cifar10 --data-dir {tmp_path} --corruptions fog snow --severity 4"))
    x, y = domains[1].split[7]
    assert len(domains[1].split) == 10_000 and x.shape == (3, 32, 32) and x[0, 0, 0] == 4 and y == 7 and len(data.classes) == 10


def test_imagenet_r_is_scored_over_its_own_classes(tmp_path):
    """Positions among the sorted wnids. Fails if the folder's own numbers are used."""
    jpegs(tmp_path / "r", ["n03", "n01"], size=300)
    (tmp_path / "wnids.txt").write_text("n02\nn00\nn03\nn01\n")
    data, domains, keep = cema.load_stream(parsed(f"--stream imagenet-r --data-dir {tmp_path}/r --wnids {tmp_path}/wnids.txt"))
    assert keep == [1, 3] and domains[0].split.classes == ["n01", "n03"] and len(data.classes) == 4
    assert domains[0].split[0][0].shape == (3, 224, 224)


# ----- runs ----------------------------------------------------------------------------------------------------------


TINY = "--images 48 --batch-size 16 --corruptions gaussian_noise contrast --foundation resnet20 --foundation-weights weights/fashion_resnet20.pt " \
       "--cloud-batch 8 --replay 64 --replay-draw 8 --replay-min 16 --log-every 2 --device cpu --out "


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(common.ROOT)


def run(command: str) -> None:
    common.run(cema.main, cema.parse, command.split())


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def test_the_log_holds_what_the_table_needs(tmp_path, at_root, capsys):
    """Fails if a key is renamed, or a row of the table is missing."""
    run(TINY + f"{tmp_path}/a")
    start, *_, end = records(tmp_path / "a")
    assert start["event"] == "start" and end["event"] == "end"
    for m in ("source", "bn", "tent", "eta", "cema", "foundation_source", "foundation"):
        accs = end["per_domain"][m]
        assert list(accs) == ["gaussian_noise/5", "contrast/5"] and end[f"acc_{m}_pct"] == pytest.approx(sum(accs.values()) / 2)
    for k in ("uploads_pct", "bytes_up", "bytes_down", "refused_messages", "edge_overhead_pct", "wall_s", "eta_backwards_pct", "peak_mib"):
        assert math.isfinite(end[k])
    assert end["bytes_up"] >= 3072 * end["uploads_pct"] / 100 * 96
    out = capsys.readouterr().out
    assert all(label in out for label in cema.LABELS.values()) and "not comparable" in out
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


def interrupt(monkeypatch, at: int) -> list:
    """The at-th step of CEMA is a Ctrl-C. Returns a list as long as there were steps."""
    step, calls = CEMA.step, []

    def counted(self, x):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return step(self, x)

    monkeypatch.setattr(CEMA, "step", counted)
    return calls


@pytest.mark.parametrize("order", ["reset", "lifelong --edges 2", "mixed --link-delay 1 --link-drop 0.5 --link-corrupt 0.2 --d-margin 0.3"])
def test_interrupted_and_resumed_equals_uninterrupted(order, tmp_path, at_root, monkeypatch):
    """Every record but the times, bitwise. Fails if an EMA, a momentum, a queue or a generator is left out of the checkpoint."""
    command = TINY + f"{{}} --checkpoint-every 2 --select random --cloud-batch 3 --lr 0.05 --tent-lr 0.5 --eta-lr 0.5 --order {order}"
    run(command.format(tmp_path / "a"))
    calls = interrupt(monkeypatch, at=4)
    with pytest.raises(SystemExit):
        run(command.format(tmp_path / "b"))
    assert (tmp_path / "b" / "checkpoint.pt").exists()
    run(command.format(tmp_path / "b") + " --resume")
    timed = ("wall_s", "peak_mib", "edge_overhead_pct", "cloud_ms_per_image")
    a, b = ([{k: v for k, v in r.items() if k not in timed} for r in records(tmp_path / name) if r["event"] != "start"] for name in "ab")
    assert a == b and len(calls) == 4 + 6 - 2 and a[-1]["uploads_pct"] > 0


def test_resuming_with_other_flags_is_refused(tmp_path, at_root, fails, monkeypatch, capsys):
    """Fails if the flags go unchecked."""
    interrupt(monkeypatch, at=4)
    with pytest.raises(SystemExit):
        run(TINY + f"{tmp_path} --checkpoint-every 2")
    capsys.readouterr()
    assert "another --alpha" in fails(cema, TINY + f"{tmp_path} --checkpoint-every 2 --alpha 1 --resume")


def test_cema_beats_bn_adapt_beats_source(fashion):
    """A miniature: contrast, severity 5, 960 images. Margins are half of the smaller measured ones: 42.0 and 8.3 points over seeds 0, 1.
    Fails with --select none, without distillation, or if affine parameters of downloads are not applied."""
    model, data = fashion
    f, d, _ = common.find_weights("resnet20x2", "fashion", data, None, CPU)
    f = FromBytes(f.to(memory_format=torch.channels_last), d.mean, d.std)
    i = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:960]
    x, y = common.corrupt(data.test.tensors[0][i], "contrast", 5, i), data.test.tensors[1][i]
    methods = {"source": Baseline("source", model, Counter(), 10), "bn": Baseline("bn", model, Counter(), 10),
               "cema": CEMA(model, f, image_size=32, amp=common.has_fast_bf16(CPU))}
    acc = {k: 100 * np.mean([(m.step(part).argmax(1) == t).float().mean() for part, t in zip(x.split(64), y.split(64))]) for k, m in methods.items()}
    assert acc["bn"] > acc["source"] + 20 and acc["cema"] > acc["bn"] + 4, acc
    assert methods["cema"].counts["uploads"] < 0.6 * 960


def test_the_edge_loop_costs_at_most_five_percent_more_than_inference(fashion):
    """Best of three. Fails if the edge copies its parameters every batch."""
    model, data = fashion
    x = data.test.tensors[0][:64]
    overhead = []
    for _ in range(3):
        edge = one_edge(model=model, counts=(counts := Counter()))
        t0 = time.perf_counter()
        for _ in range(8):
            edge.step(x, [])
        overhead.append((time.perf_counter() - t0) / counts["edge_inference_s"] - 1)
    assert min(overhead) < 0.05, overhead


def test_every_part_fires_under_default_flags(fashion):
    """Both thresholds cut, E_max moves, f and twin learn, replay joins, replay-only steps come. Fails if a default switches a part off."""
    model, data = fashion
    method = CEMA(model, model, image_size=32, amp=common.has_fast_bf16(CPU))
    edge, cloud = method.edges[0], method.cloud
    for part in torch.arange(1280).split(64):
        method.step(common.corrupt(data.test.tensors[0][part], "contrast", 5, part))
    assert 0 < method.counts["uploads"] < 1280 and edge.e_max != edge.e0 and edge.version > 0
    for net in (cloud.f, cloud.twins[0]):
        assert any(not torch.equal(p, p0) for p, p0 in zip(net.affine, net.source))
    assert cloud.twins[0].replayed >= 256 and method.counts["replay_only_steps"] > 0


@pytest.mark.parametrize("command, words", [
    ("--corruptions frog", "--corruptions frog: unknown"),
    ("--severity 6", "--severity"),
    ("--order sideways", "--order"),
    ("--replay 50", "--replay 50: smaller"),
    ("--e-min 0.5", "--e-min 0.5: not below E_max"),
    ("--arch squeezenet1_0", "nothing can adapt"),
    ("--plot results/gdfq_fashion_w4a4", "not the logs of finished runs of cema.py"),
    ("--affine ln", "no norm layers of the kinds ln"),
    ("--link-drop 1.5", "--link-drop"),
    ("--batch-size 0", "--batch-size"),
    ("--methods magic", "--methods"),
    ("--arch resnet99", "no such network"),
    ("--weights nowhere.pt", "nowhere.pt"),
    ("--foundation-weights weights/cifar100_resnet20.pt --foundation resnet20", "100 classes"),
    ("--stream imagenet-c --data-dir {tmp}", "no gaussian_noise/5 in it"),
    ("--stream cifar-c --data-dir {tmp}", "is made of cifar10 or cifar100"),
    ("--stream cifar-c --dataset cifar10 --data-dir {tmp}", "gaussian_noise.npy: not there"),
    ("--stream imagenet-r --data-dir {tmp}/r", "--wnids None"),
    ("--stream folder --data-dir {tmp}/none", "expected class folders"),
    ("--stream folder --data-dir {tmp}/r", "no weights for resnet20 on r"),
    ("--plot {tmp}", "no .jsonl log"),
    ("--out {tmp}/file/x", "cannot be written"),
    ("--device tpu9", "--device tpu9"),
])
def test_a_users_mistake_gets_one_line(command, words, tmp_path, at_root, fails):
    """And leaves nothing behind. Fails if it ends in a traceback."""
    jpegs(tmp_path / "r", ["n01"], n=1)
    (tmp_path / "file").write_text("")
    command = f"--foundation resnet20 --foundation-weights weights/fashion_resnet20.pt --images 8 --out {tmp_path}/o " + command.replace("{tmp}", str(tmp_path))
    assert words in fails(cema, command)
    assert not (tmp_path / "o").exists()


def test_a_log_becomes_a_picture(tmp_path, at_root):
    """One point a pass, from the log alone. Fails if eval records hold running means over all passes."""
    pytest.importorskip("matplotlib")
    run(TINY + f"{tmp_path}/a --order lifelong --loop 2 --methods source")
    evals = [r for r in records(tmp_path / "a") if r["event"] == "eval"]
    assert [r["domain"] for r in evals] == ["gaussian_noise/5", "contrast/5"] * 2
    assert [r["acc_source_pct"] for r in evals[:2]] == [r["acc_source_pct"] for r in evals[2:]]
    run(f"--plot {tmp_path}/a --out {tmp_path}/p.png")
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"


def test_the_readmes_lines_run():
    """Copied from the README. Fails if a name in them is out of date."""
    blocks = re.findall(r"```python\n(.*?)```", (common.ROOT / "README.md").read_text(), re.S)
    lines, = [b for b in blocks if "from cema import" in b]
    names = dict(my_small_network=small().net, my_large_network=small(1).net, mean=[0.5] * 3, std=[0.25] * 3, my_stream=images(64).split(32))
    exec(lines, names)
    assert names["logits"].shape == (32, 10) and names["method"].counts["edge_forwards"] == 64


def test_single_images_with_batch_statistics_are_warned_about(tmp_path, at_root, capsys):
    """Fails if the note goes."""
    run(TINY + f"{tmp_path}/a --images 3 --batch-size 1")
    assert "note: with --batch-size 1" in capsys.readouterr().out


def test_a_recipe_sets_its_values_and_flags_still_win():
    """In any order. Fails if the recipe overwrites an explicit flag."""
    args = cema.parse("--lr 0.5 --recipe few-classes".split())
    assert (args.lr, args.bn, args.eta_lr) == (0.5, "batch", cema.RECIPES["few-classes"]["eta_lr"])
    assert cema.parse([]).lr == 2.5e-3 and cema.parse([]).bn == "ema"


def test_every_flag_is_read_and_documented():
    """Fails if a flag is added and forgotten."""
    source = (common.ROOT / "cema.py").read_text()
    for action in cema.build_parser()._actions:
        assert action.help, action.dest
        if action.dest != "help":
            assert f"args.{action.dest}" in source or action.dest in cema.method_defaults(), action.dest
    assert set(cema.method_defaults()) <= {a.dest for a in cema.build_parser()._actions}


def test_help_needs_neither_data_nor_network():
    """Fails if the parser loads something."""
    done = subprocess.run([sys.executable, str(common.ROOT / "cema.py"), "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "--link-delay" in done.stdout
