"""Claims about tdmr.py. Each docstring ends with the change under which the test was seen to fail."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import tdmr

CPU = torch.device("cpu")
GREY = [0.5] * 3, [0.25] * 3


def hyper(**changes):
    return common.defaults(tdmr.build_parser, amp=False, **changes)


def images(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def foundation() -> tdmr.Foundation:
    return tdmr.Foundation(tdmr.build("--foundation", "resnet8", 7, 32, 0), 32, *GREY)


def extractor(of: tdmr.Foundation, taps: int = 9) -> tdmr.Extractor:
    return tdmr.Extractor(of, taps, CPU, False)


def step1(rows, features, **changes) -> tdmr.Step1:
    return tdmr.Step1(rows, features, 3, hyper(**dict(step1_steps=50) | changes), CPU)


def clusters(n: int, n_l: int, seed: int = 0, shared: float = 0.0):
    """Rows of two views of three clusters in 8 dimensions, too wide for few labels; features; all labels.

    shared: deviation along one direction that has nothing to do with the classes.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centre = 2.2 * torch.eye(3, 8)[y] + 0.55 * torch.randn(n, 8, generator=g)
    f = torch.stack([centre + 0.2 * torch.randn(n, 8, generator=g) for _ in range(2)])
    of = torch.cat([torch.arange(n_l).repeat(2), torch.arange(n_l, n).repeat(2)])
    f = torch.cat([f[:, :n_l].flatten(0, 1), f[:, n_l:].flatten(0, 1)])
    f = f + shared * torch.randn(len(f), 1, generator=torch.Generator().manual_seed(1))
    return tdmr.Rows(torch.zeros(2 * n, 1), of, y[:n_l], 2 * n_l), f.half(), y


def accuracy_pct(s: tdmr.Step1, name: str, f: torch.Tensor, y: torch.Tensor) -> float:
    """Of the probe or the proxy, on features it has not seen."""
    head, _ = s.train(name)
    return 100 * (tdmr.answers(head, s.standard(f))[1].argmax(1) == y).float().mean().item()


def train(lesson: tdmr.Lesson, **changes) -> torch.nn.Module:
    """resnet8 after step 2 on 6 labelled and 10 other images of noise, of two views each: 32 rows."""
    rows = tdmr.make_rows(images(6), torch.arange(6) % 3, images(10, seed=1), 2, 2, 0)
    data = common.Data("t", list("abc"), 32, *GREY, None, None)
    hp = hyper(batch_size=4, unlabelled_batch=4, weight_decay=0.0, **changes)
    return tdmr.train_student(tdmr.build("--target", "resnet8", 3, 32, 0), rows, data, lesson, hp, CPU)


def lesson(**changes) -> tdmr.Lesson:
    return tdmr.Lesson("tdmr", torch.randn(32, 8), torch.randn(32, 3), **dict(A=1.0) | changes)


@pytest.mark.parametrize("schedule, start, middle, end", [
    ("features-then-logits", (1, 0), (0.5, 0.5), (0, 1)), ("fade", (1, 1), (0.5, 1), (0, 1)),
    ("decay", (1, 1), (0.5, 0.5), (0, 0)), ("constant", (1, 1), (1, 1), (1, 1))])
def test_schedules_at_the_start_the_middle_and_the_end(schedule, start, middle, end):
    """a(t) and b(t) at t = 0, 1/2, 1. Fails if a and b are swapped."""
    assert [tdmr.progress_weights(t, schedule) for t in (0.0, 0.5, 1.0)] == [start, middle, end]


@pytest.mark.parametrize("length, loss", [(0.7, 0), (3, 0), (-0.7, 2)])
def test_the_cosine_loss_is_zero_for_aligned_features_and_two_for_opposite_ones(length, loss):
    """Of any length. Fails without the normalisation."""
    h = torch.randn(5, 8)
    assert tdmr.cosine_loss(h, length * h).item() == pytest.approx(loss, abs=1e-6)


def test_distillation_scales_with_T_squared_and_at_T_1_has_the_gradient_of_cross_entropy():
    """By hand, ours and torch's own. Fails if the KL is the other way round, averaged over classes, or
    without the T^2.
    """
    t, s = torch.randn(2, 6, 10).double()
    s.requires_grad_()
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    want = 9 * (p * (p / q).log()).sum(1).mean().item()
    assert tdmr.distillation_loss(t, s, 3.0).item() == pytest.approx(want)
    losses = tdmr.distillation_loss(t, s, 1.0), F.cross_entropy(s, t.softmax(1))
    a, b = (torch.autograd.grad(loss, s)[0] for loss in losses)
    assert torch.allclose(a, b)


def test_class_moments_are_those_of_each_class_pooled():
    """Against torch.cov, in two parts; soft labels weigh. Fails if the shares are forgotten."""
    f, y = torch.randn(90, 5).double() * 3 + 1, torch.arange(90) % 3 % 2  # 60 and 30 images
    f += 4 * y[:, None]
    q = F.one_hot(y).double()
    parts = [tdmr.class_sums(f[:40], q[:40]), tdmr.class_sums(f[40:], q[40:])]
    means, S = tdmr.class_moments(*tdmr.added(parts))
    pooled = sum((y == c).double().mean() * torch.cov(f[y == c].T, correction=0) for c in (0, 1))
    assert torch.allclose(means, torch.stack([f[y == c].mean(0) for c in (0, 1)]))
    assert torch.allclose(S, pooled / pooled.diagonal().mean())
    soft = tdmr.class_sums(f, (2 * q + 1) / 3)  # two shares in their class, one in the other
    half = tdmr.class_moments(*soft)[0]
    assert torch.allclose(half[0], (3 * f[y == 0].sum(0) + f[y == 1].sum(0)) / (3 * 60 + 30))


def test_whitening_makes_the_shrunk_covariance_the_identity():
    """W^T (S + shrink I) W = I, S singular, too. Fails if shrink joins the root."""
    f, one = torch.randn(4, 6).double(), torch.eye(6).double()
    W = tdmr.whitening(f.T @ f, 0.1)
    assert torch.allclose(W.T @ (f.T @ f + 0.1 * one) @ W, one, atol=1e-9)
    assert tdmr.whitening(torch.zeros(3, 3), 0.1).isfinite().all()  # one view of one image per class


def test_the_discriminant_is_the_posterior_of_gaussian_classes():
    """Differences of logits are those of Gaussian log-densities with the shrunk covariance, for any f.
    Fails if |m|^2 / 2 is left out, one of the C-1 directions is lost, or f must be centred first.
    """
    f, y = torch.randn(200, 6).double() @ torch.randn(6, 6).double(), torch.arange(200) % 4
    f[:, :4] += 2 * F.one_hot(y)
    means, S = tdmr.class_moments(*tdmr.class_sums(f, F.one_hot(y).double()))
    phi, weight, bias = tdmr.discriminant(means, S, 0.05)
    o = f @ phi @ weight.T + bias
    S += 0.05 * torch.eye(6).double()
    normals = [torch.distributions.MultivariateNormal(m, S) for m in means]
    want = torch.stack([normal.log_prob(f) for normal in normals], 1)
    assert phi.shape == (6, 3)
    assert torch.allclose(o - o.mean(1, keepdim=True), want - want.mean(1, keepdim=True))


def test_a_proxy_of_unbalanced_classes_answers_for_all_of_them():
    """80 and four times 5 % of Gaussian classes. Fails (55.9) if g is left out of the bias."""
    shares, centres = torch.tensor([0.8, 0.05, 0.05, 0.05, 0.05]), 0.8 * torch.randn(5, 20)
    y, yt = torch.multinomial(shares, 1000, True), torch.multinomial(shares, 1000, True)
    f, ft = (centres[labels] + torch.randn(1000, 20) for labels in (y, yt))
    rows = tdmr.Rows(torch.zeros(1000, 1), torch.arange(1000), y, 1000)
    assert accuracy_pct(tdmr.Step1(rows, f.half(), 5, hyper(), CPU), "proxy", ft, yt) > 90


def test_propagation_equals_the_dense_iteration_and_reaches_the_closed_form():
    """Against dense matrices: (1 - a)(I - a S)^-1 Y. Fails if the graph is not symmetric, or a degree is
    forgotten.
    """
    z, y = F.normalize(torch.randn(30, 4).double(), dim=1), torch.tensor([0, 1, 2])
    s = (z @ z.T).fill_diagonal_(-1)
    W = torch.zeros(30, 30).double()
    for i in range(30):
        near = s[i].topk(5).indices
        W[i, near] = s[i, near].clamp_min(0) ** 3
    W = (W + W.T) / 2
    d = W.sum(1).rsqrt()
    want = 0.1 * torch.linalg.inv(torch.eye(30).double() - 0.9 * d[:, None] * W * d)[:, :3]
    got = tdmr.propagate_labels(z.float(), y, 3, 5, 0.9, iterations=300)
    assert torch.allclose(got, (want / want.sum(1, keepdim=True)).float(), atol=1e-4)


@pytest.mark.parametrize("arch, size, d_last, depths", [
    ("mobilenet_v3_small", 32, 1024, 9), ("swin_t", 32, 768, 8), ("maxvit_t", 224, 512, 6)])
def test_features_of_every_family_are_found(arch, size, d_last, depths):
    """A CNN, a transformer, their mix: the last feature is the classifier's input, a tap adds 2 numbers
    per channel. Fails if Swin's channels, which come last, are taken for rows.
    """
    model = common.build_model(arch, 7)
    e, x = extractor(tdmr.Foundation(model, size, *GREY)), images(1, size)
    with torch.no_grad():
        f = e(x)
        logits = tdmr.last_linear(model, size, "--foundation")(f[:, -d_last:])
        assert torch.allclose(logits, model(common.to_input(x, *GREY, CPU)), atol=1e-4)
    widths = [t.shape[1] for t in e.seen]
    assert len(f) == 1 and f.isfinite().all() and len(widths) == depths + 1 and widths[-1] == d_last
    assert all(w % 2 == 0 and w <= 2 * max(d_last, 1024) for w in widths[:-1])


def test_mean_and_deviation_over_space_do_not_depend_on_where_the_channels_are():
    """Channels first, last, and tokens. Fails if one of the three is pooled over its channels."""
    x = torch.randn(2, 5, 4, 4)
    want = torch.cat([x.mean((2, 3)), x.std((2, 3), correction=0)], 1)
    for form in (x, x.permute(0, 2, 3, 1), x.flatten(2).transpose(1, 2)):
        assert torch.allclose(tdmr.over_space(form), want, atol=1e-6)


def test_features_do_not_depend_on_the_batch_and_the_foundation_never_changes():
    """Neither parameters nor BN statistics; images of 28 px are resized to its 32 px. Fails if F runs in
    train mode, or sees another size than it was trained on.
    """
    of, x, sides = foundation(), images(8, 28), []
    e, before = extractor(of), {k: v.clone() for k, v in of.state_dict().items()}
    e.model.model.conv1.register_forward_pre_hook(lambda m, inputs: sides.append(inputs[0].shape[-1]))
    assert torch.allclose(e(x)[:3], e(x[:3]), atol=1e-5) and sides == [32, 32]
    for now in (of, e.model):
        assert all(torch.equal(before[k], v) for k, v in now.state_dict().items())
        assert not any(p.requires_grad for p in now.parameters())


def test_a_target_that_calls_view_takes_channels_last_images(own):
    """Fails if it is refused, or trained in the form in which it was not checked."""
    net = tdmr.build("--target", f"{own}:make", 4, 32, 0)
    assert net(torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)).shape == (2, 4)


@pytest.mark.parametrize("change", ["nothing", "images", "weights", "taps"])
def test_features_are_kept_under_all_that_they_depend_on(change, tmp_path, monkeypatch):
    """And read at the cost of the run that made them. Fails if F runs twice over the same images, or if
    the name of the file misses one of the three.
    """
    monkeypatch.chdir(tmp_path)
    x, of, seen = images(4), foundation(), []
    first = extractor(of).of_all(x)
    if change == "images":
        x[0, 0, 0, 0] ^= 1
    if change == "weights":
        of.model.layer1[0].bn1.running_mean[0] += 1e-3
    e = extractor(of, 2 if change == "taps" else 9)
    e.model.register_forward_hook(lambda m, inputs, out: seen.append(len(out)))
    f = e.of_all(x)
    assert seen == ([] if change == "nothing" else [4]) and f["forwards"] == 4
    assert (f["seconds"] == first["seconds"]) == (change == "nothing")
    assert torch.equal(f["features"], e(x).half())
    assert len([*tmp_path.glob("runs/tdmr/features/*.pt")]) == (1 if change == "nothing" else 2)


def test_view_0_is_the_image_and_all_views_are_fixed_by_the_seed():
    """Fails if view 0 is augmented, or the views are drawn from torch's global generator."""
    x, u = images(3), images(5, seed=1)
    a, b, c = (tdmr.make_rows(x, torch.arange(3), u, 2, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(a.images, b.images) and not torch.equal(a.images, c.images)
    assert torch.equal(a.images[:3], x) and torch.equal(a.images[6:11], u)
    assert not torch.equal(a.images[11:16], u)
    assert a.of.tolist() == [0, 1, 2] * 2 + [3, 4, 5, 6, 7] * 3 and a.labelled == 6


def test_the_few_shots_are_fixed_by_the_seed_and_disjoint_from_the_unlabelled():
    """However many these are. Fails if the draw depends on anything but the seed, or a labelled image
    comes again without its label.
    """
    y, draws = torch.arange(100) % 5, []
    for seed, unlabelled in ((0, 50), (0, 50), (1, 50), (0, 0)):
        torch.rand(3)
        draws.append(tdmr.few_shot(y, list("abcde"), hyper(shots=4, unlabelled=unlabelled), seed))
    (a, u), (b, v), (other, _), (alone, _) = draws
    assert torch.equal(a, b) and torch.equal(u, v) and torch.equal(a, alone)
    assert not torch.equal(a, other)
    assert torch.equal(y[a].bincount(), torch.full((5,), 4)) and len({*a.tolist(), *u.tolist()}) == 70


def test_the_proxy_beats_the_probe_with_unlabelled_images():
    """Two labels per class in wide clusters, seeds 0 to 2: it was 32 to 45 points ahead.

    Fails with --neighbours 0, or if the labels stay where they are.
    """
    gain = []
    for seed in range(3):
        rows, f, y = clusters(300, 6, seed)
        s = step1(rows, f, step1_steps=100)
        gain.append(np.diff([accuracy_pct(s, name, f[12:306], y[6:]) for name in ("probe", "proxy")]))
    assert np.mean(gain) > 20, gain


def test_a_fifth_of_each_class_says_how_long_and_is_then_put_back(monkeypatch):
    """Cross-entropy is least after two tenths of 50 steps. Fails if the fifth trains while it judges, or
    stays out.
    """
    (rows, f, _), calls = clusters(60, 30), []
    fit = lambda self, keep, steps: calls.append((keep, steps)) or ("head", [3.0, 1.0, 2.0])
    monkeypatch.setattr(tdmr.Step1, "fit_probe", fit)
    assert step1(rows, f).train("probe") == ("head", {"steps": 10})
    (keep, steps), (every, stop) = calls
    assert every.all() and len(keep) == rows.labelled == 60 and (steps, stop) == (50, 10)
    assert rows.y[~keep[:30]].bincount().tolist() == [2, 2, 2] and torch.equal(keep[:30], keep[30:])


def test_the_probe_is_judged_by_images_that_it_does_not_learn():
    """By hand, after each tenth. Fails if another fifth judges, or other views than the images."""
    rows, f, _ = clusters(60, 30)
    s = step1(rows, f, step1_steps=10)
    head, losses = s.fit_probe(s.fifth > 0, 10)
    left_out = (s.fifth[:30] == 0).nonzero()[:, 0]
    want = F.cross_entropy(tdmr.answers(head, s.standard(f[left_out]))[1], rows.y[left_out]).item()
    assert len(losses) == 10 and losses[-1] == pytest.approx(want) and len(left_out) == 6


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
def test_the_fifth_that_judges_the_probe_is_of_classes_with_five_images(n):
    """Fails if a class of one image is left without any."""
    rows, f, _ = clusters(60, 3 * n)
    assert (step1(rows, f).fifth[:3 * n] == 0).sum() == 3 * (n // 5)


def fifths_of(s: tdmr.Step1) -> list:
    f = s.f[:s.rows.labelled]
    return [tdmr.class_sums(f[s.fifth == k], s.q[s.fifth == k]) for k in range(5)]


@pytest.mark.parametrize("shared, largest", [(0, 10), (10, 0.03)])
def test_the_shrinkage_is_that_of_held_out_labels(shared, largest):
    """By hand, through `discriminant`; small where a direction in which all images differ must go.
    Fails if a fifth is judged by its own labels, or by another spread of logits.
    """
    rows, f, _ = clusters(300, 30, shared=shared)
    s, losses = step1(rows, f), np.zeros(len(tdmr.SHRINKS))
    fifths = fifths_of(s)
    for k in range(5):
        means, S = tdmr.class_moments(*tdmr.added(fifths[:k] + fifths[k + 1:]))
        at = (s.fifth[:30] == k).nonzero()[:, 0]
        for i, shrink in enumerate(tdmr.SHRINKS):
            phi, weight, bias = tdmr.discriminant(means, S, shrink)
            o = s.standard(f[at]) @ phi @ weight.T + bias
            o = o * 6 / (o - o.mean(1, keepdim=True)).std()
            losses[i] += F.cross_entropy(o, rows.y[at], reduction="sum").item()
    assert s.best_shrinkage(fifths) == tdmr.SHRINKS[losses.argmin()] <= largest
    assert (np.diff(np.sign(np.diff(losses))) != 0).sum() <= 1  # one valley: the first is the least


@pytest.mark.parametrize("losses, at", [([3, 1, 2, 0.5], 1), ([3, 2, 1], 2), ([0, 0, 0], 0), ([1, 2], 0)])
def test_a_second_valley_does_not_choose_the_shrinkage(losses, at, monkeypatch):
    """Fails with the least of all, which a tie between two valleys turns into a coin."""
    rows, f, _ = clusters(300, 30)
    s = step1(rows, f)
    monkeypatch.setattr(tdmr, "SHRINKS", [*range(1, 1 + len(losses))])
    each = iter([torch.tensor(float(loss)) for loss in losses] * 5)
    monkeypatch.setattr(tdmr.F, "cross_entropy", lambda *_, **__: next(each))
    assert s.best_shrinkage(fifths_of(s)) == 1 + at


@pytest.mark.parametrize("labelled, flags", [(3, {}), (6, {"sharpen": 1000.0})])
def test_a_proxy_of_extremes_is_finite(labelled, flags):
    """One label per class leaves no choice of a shrinkage; propagated probabilities of 0 leave the
    likeliest class. Fails if a class is left out of its own training, or with 0/0.
    """
    rows, f, _ = clusters(60, labelled)
    s = step1(rows, f, **flags)
    head, choice = s.train("proxy")
    assert tdmr.answers(head, s.f)[1].isfinite().all() and (labelled > 3 or choice["shrink"] == 10)
    assert torch.allclose(s.soft_labels(torch.eye(8)).sum(1), torch.ones(60))


def test_the_discriminant_ignores_what_varies_within_a_class():
    """Ten labels per class, no unlabelled images, one direction in which all differ much: far ahead of
    shrink = 1e6, which keeps it. Fails without whitening.
    """
    rows, f, y = clusters(300, 30, shared=10)
    rows = rows._replace(of=rows.of[:60])
    white, plain = [accuracy_pct(step1(rows, f[:60], shrink=a), "proxy", f[60:330], y[30:])
                    for a in (0.03, 1e6)]
    assert white > plain + 10, (white, plain)


def test_the_discriminants_logits_have_the_wanted_spread():
    """By one number, which moves no decision. Fails if weight or bias is left as it was."""
    rows, f, _ = clusters(300, 30)
    one, two = (step1(rows, f, logit_std=std) for std in (3.0, 6.0))
    head, twice = one.train("proxy")[0], two.train("proxy")[0]
    assert torch.equal(head[0], twice[0])
    assert all(torch.allclose(2 * x, y) for x, y in zip(head[1:], twice[1:]))
    o = one.teach(head)[1]
    assert (o - o.mean(1, keepdim=True)).std().item() == pytest.approx(3, rel=1e-3)


def test_a_student_is_taught_p_without_its_mean():
    """Of the probe, whose p has one. Fails if it stays in, or is taken off the logits, too."""
    rows, f, _ = clusters(60, 30)
    s = step1(rows, f)
    head, _ = s.train("probe")
    s.f = s.f + 1
    p, o = s.teach(head)
    assert torch.allclose(o, tdmr.answers(head, s.f)[1]) and torch.allclose(p.float(), s.f - s.f.mean(0), atol=1e-2)


@pytest.mark.parametrize("by_labels, known", [(False, 0), (True, 4)])
def test_the_loss_of_a_step_is_that_of_the_docstring(by_labels, known, monkeypatch):
    """CE + a A (1 - cos(psi(h), p)) + b B T^2 KL by hand; what it moves are S's weights and psi's.

    Fails if psi is left out of the optimizer, CE takes unlabelled images, a weight is not read, or a p
    made from labels is taught where they are.
    """
    of, caught, h = lesson(A=3.0, T=4.0, schedule="fade", by_labels=by_labels), [], []
    monkeypatch.setattr(common, "descend", lambda opt, loss, *_: caught.extend((opt, loss)) or opt.step())
    net, g = train(of, steps=1, ce_weight=0.5, kd_weight=2.0), torch.Generator().manual_seed(0)
    x = tdmr.make_rows(images(6), torch.arange(6), images(10, seed=1), 2, 2, 0).images
    at = torch.cat([torch.randint(12, (4,), generator=g), torch.randint(12, 32, (4,), generator=g)])
    net.fc.register_forward_pre_hook(lambda m, inputs: h.append(inputs[0]))
    out = net.train()(common.to_input(x[at], *GREY, CPU))
    with common.seeded(0):
        psi = torch.nn.Linear(64, 8)
    want = 0.5 * F.cross_entropy(out[:4], at[:4] % 3)
    want += 3 * tdmr.cosine_loss(psi(h[0])[known:], of.p[at[known:]])
    want += 2 * tdmr.distillation_loss(of.logits[at], out, 4.0)
    moved = caught[0].param_groups[0]["params"]
    assert caught[1].item() == pytest.approx(want.item(), rel=1e-5) and torch.equal(moved[-2], psi.weight)
    assert len(moved) == len([*net.parameters()]) + 2 and moved[0] is net.conv1.weight


def test_students_start_alike_and_see_the_same_batches(monkeypatch):
    """Two without a teacher are one, to the bit, whatever was drawn before; one with a teacher sees the
    same labelled images. Fails if a teacher moves the draws.
    """
    seen, last, to_input = [], [], common.to_input
    monkeypatch.setattr(common, "to_input", lambda x, *a: seen.append(x) or to_input(x, *a))
    for draws, of in ((0, tdmr.Lesson("x")), (5, tdmr.Lesson("x")), (2, lesson())):
        torch.rand(draws)
        last.append(train(of, steps=3).conv1.weight)
    assert torch.equal(last[0], last[1]) and not torch.equal(last[0], last[2])
    assert all(len(b) == 8 and torch.equal(a, b[:4]) for a, b in zip(seen[:3], seen[6:], strict=True))


@pytest.mark.parametrize("steps, warmup", [(10, 0.1), (4, 1.0), (2, 0.5), (1, 0.1), (3, 0.0)])
def test_every_warmup_makes_a_schedule(steps, warmup):
    """One step of it or all: torch divides by a phase's length. Fails if that is 0."""
    assert train(lesson(), steps=steps, warmup=warmup).fc.weight.isfinite().all()


@pytest.mark.parametrize("function", ["cosine_loss", "distillation_loss"])
def test_nan_stops_the_run_and_names_the_loss(function, monkeypatch):
    """Fails if training goes on with NaN weights."""
    loss = getattr(tdmr, function)
    monkeypatch.setattr(tdmr, function, lambda *a: loss(*a) * float("nan"))
    with pytest.raises(common.InputError, match="the loss of tdmr is nan"):
        train(lesson())
    rows, f, _ = clusters(9, 9)
    with pytest.raises(common.InputError, match="the loss of probe is nan"):
        step1(rows, f * float("nan")).train("probe")


# ----- the command line ------------------------------------------------------------------------------

QUICK = ("--shots 5 --unlabelled 40 --views 2 --labelled-views 2 --steps 2 --step1-steps 20 --no-amp "
         "--batch-size 8 --unlabelled-batch 8 --foundation resnet20")
SOURCES = 5 * 4 * 2 + 40 * 2  # images and views of them
D = 736  # features of resnet20: 2 (16 + 32 + 64) in each of three blocks, and 64


def tdmr_py(command: str) -> None:
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["tdmr.py"])
        common.run(tdmr.main, tdmr.parse, command.split())


def read(folder, event: str) -> dict:
    """The last record of this event for each method; under None that of the run."""
    records = [json.loads(line) for line in (folder / "log.jsonl").open()]
    return {r.get("method"): r for r in records if r["event"] == event}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory, where features go."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def everything(tiny, tmp_path_factory):
    """All methods over two seeds: the folder, tables by seed, each method's Lesson, the extractor."""
    folder, tables, lessons, extractors = tmp_path_factory.mktemp("all"), [], {}, []
    train, run, table = tdmr.train_student, tdmr.run_seed, tdmr.print_table
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(tdmr, "train_student", lambda *a: lessons.update({a[3].name: a[3]}) or train(*a))
        m.setattr(tdmr, "run_seed", lambda *a: extractors.append(a[2]) or run(*a))
        m.setattr(tdmr, "print_table", lambda title, rows: tables.extend(rows) or table(title, rows))
        tdmr_py(f"--dataset {tiny} --methods all --seeds 0 1 --fitnet-weight 3 {QUICK} --out {folder}/o")
    return folder / "o", tables, lessons, extractors[0]


def test_tdmr_beats_scratch_in_a_miniature(here):
    """5 labels per class and 400 images of Fashion-MNIST without, 60 steps, 300 test images; seeds 0 to 2
    gained 4, 19 and 14 points. Fails with both weights at 0.
    """
    z, n = np.load(common.ROOT / "data" / "fashion_mnist.npz"), {"train": 1500, "test": 300}
    np.savez(here / "mini.npz", **{k: z[k][:n.get(k.split("_")[0])] for k in z})
    tdmr_py("--dataset mini.npz --methods scratch tdmr --shots 5 --unlabelled 400 --views 1 --seed 1 "
            "--labelled-views 4 --steps 60 --batch-size 8 --unlabelled-batch 24 --foundation resnet20 "
            "--no-amp --out o")
    end = read(here / "o", "end")[None]
    assert end["acc_tdmr_pct"] > end["acc_scratch_pct"] + 8
    assert {"acc_proxy_pct", "step1_s", "step2_s", "wall_s", "peak_mib"} <= set(end)


def test_all_methods_run_over_two_seeds_and_the_network_can_be_used(everything, tiny):
    """A log for each seed, a row for each method, a tdmr.pt that common.py loads. Fails if one is left
    out, or the features of the test images are made twice.
    """
    folder, tables, _, _ = everything
    assert [[*table] for table in tables] == [[*tdmr.METHODS]] * 2
    for seed, table in enumerate(tables):
        end = read(folder / f"seed{seed}", "end")[None]
        assert all(row["acc_pct"] == end[f"acc_{m.replace('-', '_')}_pct"] for m, row in table.items())
        assert {p.name for p in (folder / f"seed{seed}").iterdir()} == {"log.jsonl", "tdmr.pt"}
    net, about = common.load_network(folder / "seed1" / "tdmr.pt", "resnet8", 4)
    data = common.load_data(str(tiny))
    acc = common.accuracy_pct(net.to(memory_format=torch.channels_last), data, data.test, CPU)
    assert about["mean"] == data.mean and acc == about["acc_pct"] == tables[1]["tdmr"]["acc_pct"]
    assert len([*folder.parent.glob("runs/tdmr/features/*")]) == 2 + 1


def test_every_method_learns_what_its_name_says(everything):
    """Whose p, A, whose logits, T, and a in the second of two steps. Fails if the probe's temperature is
    used for the proxy, or a baseline has the schedule.
    """
    folder, _, lessons, _ = everything
    none, probe, proxy = lessons["scratch"], lessons["tdmr-no-proxy"], lessons["tdmr"]
    assert none.p is none.logits is None and probe.p.shape[1] == D and proxy.p.shape[1] == 3
    expected = {"scratch": (none, 0, none, 0, 1), "finetune": (none, 0, none, 0, 1),
                "kd": (none, 0, probe, 4, 1), "fitnet": (probe, 3, none, 0, 1),
                "tdmr": (proxy, 5, proxy, 2, 0.5), "tdmr-no-proxy": (probe, 5, probe, 4, 0.5),
                "kd-proxy": (none, 0, proxy, 2, 1), "tdmr-no-progression": (proxy, 5, proxy, 2, 1)}
    steps = read(folder / "seed1", "step")
    assert steps.keys() == lessons.keys() == expected.keys() and probe.logits is not proxy.logits
    for method, (p, A, logits, T, a) in expected.items():
        of, step = lessons[method], steps[method]
        assert of.p is p.p and of.logits is logits.logits and of.by_labels == (p is proxy), method
        assert (p is none or of.A == A) and (logits is none or of.T == T), method
        assert (step["a"], step["b"]) == (a, 1), method
        assert ("feature" in step, "kd" in step) == (p is not none, logits is not none), method


@pytest.mark.parametrize("flags, T", [("", 8.0), ("--temperature 3", 3.0)])
def test_labelled_images_alone_are_taught_by_softened_logits(flags, T, tiny, here, monkeypatch):
    """And by no p. Fails if the proxy teaches them as it teaches images whose label it has to tell."""
    lessons, train = [], tdmr.train_student
    monkeypatch.setattr(tdmr, "train_student", lambda *a: lessons.append(a[3]) or train(*a))
    tdmr_py(f"--dataset {tiny} {QUICK} --methods tdmr --unlabelled 0 {flags} --out o")
    step = read(here / "o", "step")["tdmr"]
    assert lessons[0].T == T and "feature" not in step and "kd" in step


def test_the_cost_columns_count_what_a_row_needs(everything):
    """Step 1's parameters and seconds, F's forwards, bytes. Fails if fitnet, which needs F's features
    alone, is charged with the probe, or scratch with F.
    """
    folder, tables, _, e = everything
    end, heads, rows = read(folder / "seed0", "end")[None], read(folder / "seed0", "eval"), tables[0]
    f_s, probe_s = end["features_s"], rows["probe"]["step1_s"]
    probe = D * 4 + 4, SOURCES, probe_s
    proxy = 3 * D + 4 * 3 + 4, SOURCES, f_s + heads["proxy"]["train_s"]
    costs = {"scratch": (0, 0, 0), "probe": probe, "kd": probe, "fitnet": (0, SOURCES, f_s),
             "tdmr": proxy, "kd-proxy": proxy, "tdmr-no-proxy": probe, "tdmr-no-progression": proxy}
    size = lambda net: sum(t.nbytes for t in net.state_dict().values())
    of_f, of_s = size(e.model), size(common.build_model("resnet8", 4))
    for method, cost in costs.items():
        row = rows[method]
        assert (row["params"], row["forwards"], row["step1_s"]) == cost, method
        assert row["bytes"] == (of_f if method == "probe" else of_s), method
    assert probe_s > f_s > 0 and end["step1_train_s"] == heads["proxy"]["train_s"] > 0
    head = (4 - 100) * (64 + 1)  # F's own is for CIFAR-100
    assert rows["finetune"]["params"] == end["params_foundation"] + head
    assert rows["finetune"]["forwards"] == 2 * 8 and end["foundation_forwards"] == SOURCES


def test_finetuning_leaves_the_foundation_as_it_is_and_keeps_nothing(everything):
    """Weights and BN statistics are the file's. Fails if F itself is trained, or a copy with the
    extractor's hooks on it, which keep the activations of every step: 42 MiB each by default.
    """
    *_, e = everything
    file = common.ROOT / "weights" / "cifar100_resnet20.pt"
    state = torch.load(file, weights_only=True)["state_dict"]
    assert all(torch.equal(v, state[k]) for k, v in e.model.model.state_dict().items())
    assert len(e.seen) == 10 and not any(t.requires_grad for t in e.seen)


@pytest.mark.parametrize("weights, says", [("none", "its own weights"), ("w.pt", "w.pt")])
def test_a_foundation_of_your_own_says_what_it_sees(weights, says, own, here, capsys):
    """With its own weights and with a file of weights. Fails if it is fed ImageNet's normalisation
    without a word, or if the first line names torchvision's weights.
    """
    torch.save(common.build_model(f"{own}:make", 4).state_dict(), "w.pt")
    name = "make_three" if weights == "none" else "make"
    args = tdmr.parse(["--foundation", f"{own}:{name}", "--foundation-weights", weights])
    f = tdmr.load_foundation(args, CPU)
    assert (f.mean, f.std, f.size) == ([0.4] * 3, [0.3] * 3, 224)
    assert f"{own}:{name}, {says}" in capsys.readouterr().out


def test_a_seed_repeats_a_row_alone_or_among_all_methods(everything, tiny, here):
    """To the bit. Fails if anything is drawn without the seed."""
    tdmr_py(f"--dataset {tiny} --methods tdmr {QUICK} --out o --seed 1")
    a, b = (torch.load(f / "tdmr.pt", weights_only=True)["state_dict"]
            for f in (everything[0] / "seed1", here / "o"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_interrupted_and_resumed_equals_uninterrupted(tiny, here, monkeypatch, capsys):
    """Every record but its times. Fails if a finished row is trained again, or is lost from the table."""
    command, train, calls = f"--dataset {tiny} --methods scratch probe tdmr {QUICK}", tdmr.train_student, []

    def ctrl_c_at_the_second(*a):
        calls.append(a[3].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*a)

    tdmr_py(f"{command} --out whole")
    monkeypatch.setattr(tdmr, "train_student", ctrl_c_at_the_second)
    with pytest.raises(SystemExit):
        tdmr_py(f"{command} --out parts")
    assert "to go on: python tdmr.py --resume parts" in capsys.readouterr().err
    tdmr_py("--resume parts")
    assert calls == ["scratch", "tdmr", "tdmr"] and not (here / "parts" / "checkpoint.pt").exists()
    timed = lambda k: k.endswith("_s") or k == "peak_mib"
    logs = [[json.loads(line) for line in (here / f / "log.jsonl").open()] for f in ("whole", "parts")]
    whole, parts = [[{k: v for k, v in r.items() if not timed(k)} for r in log if r["event"] != "start"]
                    for log in logs]
    assert whole == parts


def test_images_may_lie_in_folders_and_none_be_without_a_label(here):
    """Bright and dark ones of 224 px; settings (b) and (a). Fails if only tensors are taken, or the
    graph is built without nodes.
    """
    from PIL import Image

    for i in range(10):
        file = here / "set" / ("val" if i < 4 else "train") / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200 * (i % 2) + i,) * 3).save(file)
    for n in (2, 0):
        tdmr_py(f"--dataset set --methods tdmr {QUICK} --shots 2 --unlabelled {n} --steps 1 "
                f"--batch-size 2 --unlabelled-batch 2 --out {n}")
        end = read(here / f"{n}", "end")[None]
        assert end["acc_proxy_pct"] == 100 and end["foundation_forwards"] == 2 * (4 + n)


def test_the_table_fits_100_columns(capsys):
    """Means and deviations of long numbers, each below its head. Fails if a title moves the heads."""
    run = dict(params=1091722, forwards=144000, step1_s=1234.5, step2_s=1234.5, bytes=343_000_000)
    tables = [{m: run | {"acc_pct": acc} for m in tdmr.METHODS} for acc in (0.0, 100.0)]
    tdmr.print_table("mobilenet_v3_small on fashion", tables)
    heads, *rows = capsys.readouterr().out.splitlines()[-len(tdmr.METHODS) - 1:]
    assert max(map(len, [heads, *rows])) <= 100 and all(" 50.00 +- 70.71 " in row for row in rows)
    ends = {"top-1 %": "70.71", "step-1 params": "1091722", "F forwards": "144000", "kB": "343000"}
    for head, value in ends.items():
        assert {row.index(value) + len(value) for row in rows} == {heads.index(head) + len(head)}


def test_the_docstring_promises_no_flag_that_is_not_there():
    """Fails if a flag is renamed and the docstring is not."""
    known = {o for action in tdmr.build_parser()._actions for o in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z0-9-]+", tdmr.__doc__)) <= known


def test_an_unknown_keyword_is_a_type_error():
    """Fails if a misspelt hyperparameter is taken along in silence."""
    with pytest.raises(TypeError, match="not a flag: temprature"):
        hyper(temprature=2.0)


@pytest.mark.parametrize("command, says", [
    ("--shots 501 --unlabelled 0", "--shots 501: class T-shirt/top has only 500 train images"),
    ("--shrink often", "often: expected float"),
    ("--foundation squeezenet1_0 --foundation-weights {tmp}/w.pt", "its feature cannot be found"),
    ("--foundation resnet21", "--foundation resnet21: no such network"),
    ("--foundation resnet44", "tools/pretrain.py --arch resnet44 --dataset cifar100"),
    ("--foundation-weights nowhere.pt", "no such file"),
    ("--foundation resnet8 --foundation-weights {root}/weights/cifar100_resnet20.pt", "a resnet20"),
    ("--foundation resnet18 --foundation-weights {tmp}/w.pt", "does not fit resnet18"),
    ("--target resnet21", "--target resnet21: no such network"),
    ("--target squeezenet1_0", "--target: its feature cannot be found"),
    ("--target alexnet", "--target: AlexNet on torch.float32 (2, 3, 32, 32): RuntimeError"),
    ("--target {own}:make_three", "answers a Tensor (2, 3); expected logits (2, 10)"),
    ("--foundation {own}:make_three", "weights/cifar100_my_net-make_three.pt or --foundation-weights FILE"),
    ("--foundation {own}:nothing --foundation-weights none", "nothing"),
    ("--methods tdmr magic", "--methods"),
    ("--temperature 0", "--temperature"),
    ("--out {root}/README.md/x", "cannot be made"),
    ("--device tpu9", "not usable here"),
])
def test_a_mistake_is_one_line_and_leaves_nothing(command, says, fails, own, here):
    """Fails if a traceback reaches the user, or a folder is made before the check."""
    if "w.pt" in command:
        torch.save(common.build_model("squeezenet1_0", 1000).state_dict(), here / "w.pt")
    before = sorted(here.rglob("*"))
    assert says in fails(tdmr, command.format(root=common.ROOT, tmp=here, own=own))
    assert sorted(here.rglob("*")) == before


def test_torchvision_weights_that_cannot_be_had_are_one_line(fails, monkeypatch, here):
    """As without a network. Fails if what torchvision raises comes through."""
    monkeypatch.setattr("torchvision.models.get_model", lambda *args, **kwargs: 1 / 0)
    assert "weights for resnet18 cannot be had" in fails(tdmr, "--foundation resnet18")


def test_the_readmes_lines_run():
    """Copied from the README, two steps long, with networks of one's own. Fails if a name is out of date."""
    blocks = re.findall(r"```python\n(.*?)```", (common.ROOT / "README.md").read_text(), re.S)
    lines, = [b for b in blocks if "from tdmr import" in b]
    own, mean, std = lambda classes: common.build_model("resnet8", classes), *GREY
    x = images(24)
    names = dict(torch=torch, device=CPU, classes=["a", "b", "c"], mean=mean, std=std, its_mean=mean,
                 its_std=std, my_large_network=own(7), my_small_network=own(3), images=x[:12],
                 labels=torch.arange(12) % 3, more_images=x[12:])
    exec(lines.replace("parse([])", "parse(['--steps', '2'])").replace("224", "32"), names)
    assert names["features"].shape[0] == 8 * 12 + 12 and names["logits"].shape == (108, 3)
    assert not names["small"].training and names["small"](torch.zeros(2, 3, 32, 32)).shape == (2, 3)
