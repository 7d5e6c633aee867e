"""Claims about tdmr.py. Each docstring ends with the change under which the test was seen to fail."""

import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import tdmr

CPU = torch.device("cpu")


def images(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def foundation(arch: str = "resnet8", size: int = 32, classes: int = 7) -> tdmr.Foundation:
    """An untrained foundation."""
    return tdmr.Foundation(tdmr.build("--foundation", arch, classes), size, [0.5] * 3, [0.25] * 3)


def extractor(of: tdmr.Foundation, taps: int = 9) -> tdmr.Extractor:
    return tdmr.Extractor(of, taps, CPU, False)


def step1(rows, features, classes: int = 3, **kw) -> tdmr.Step1:
    flags = {k: v for k, v in vars(tdmr.parse([])).items() if k in tdmr.step1_keywords()} | dict(step1_steps=50, pca=4) | kw
    return tdmr.Step1(rows, features, classes, 6, seed=0, device=CPU, **flags)


def clusters(n: int, n_labelled: int, views: int = 2, seed: int = 0):
    """Three clusters in 8 dimensions, wide enough that few labels do not tell them apart; rows, features, all labels."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centre = 2.2 * torch.eye(3, 8)[y] + 0.55 * torch.randn(n, 8, generator=g)
    f = torch.stack([centre + 0.2 * torch.randn(n, 8, generator=g) for _ in range(views)])
    rows = tdmr.Rows(torch.zeros(views * n, 1), y[:n_labelled], views, n_labelled, views, n - n_labelled)
    f = torch.cat([f[:, :n_labelled].flatten(0, 1), f[:, n_labelled:].flatten(0, 1)])
    return rows, f.half(), y


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """300 train and 1,000 test images of Fashion-MNIST."""
    file = tmp_path_factory.mktemp("mini") / "mini.npz"
    z = np.load(common.ROOT / "data" / "fashion_mnist.npz")
    np.savez(file, **{k: z[k] if k == "classes" else z[k][:1500 if k.startswith("train") else 1000] for k in z})
    return file


QUICK = "--shots 5 --unlabelled 40 --views 2 --labelled-views 2 --steps 2 --step1-steps 20 --batch-size 8 --unlabelled-batch 8 --foundation resnet20"


# ----- equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, start, middle, end", [
    ("features-then-logits", (1, 0), (0.5, 0.5), (0, 1)), ("fade", (1, 1), (0.5, 1), (0, 1)),
    ("decay", (1, 1), (0.5, 0.5), (0, 0)), ("constant", (1, 1), (1, 1), (1, 1))])
def test_schedules_at_the_start_the_middle_and_the_end(schedule, start, middle, end):
    """a(t) and b(t) at t = 0, 1/2, 1. Fails if a and b are swapped."""
    assert [tdmr.progress_weights(t, schedule) for t in (0.0, 0.5, 1.0)] == [start, middle, end]


def test_the_cosine_loss_is_zero_for_aligned_features_and_two_for_opposite_ones():
    """Of any length. Fails without the normalisation."""
    h = torch.randn(5, 8)
    scale = torch.rand(5, 1) + 0.5
    assert tdmr.cosine_loss(h, scale * h).abs() < 1e-6 and tdmr.cosine_loss(h, -scale * h).item() == pytest.approx(2)


def test_distillation_at_T_1_has_the_gradient_of_cross_entropy_with_soft_targets():
    """KL and cross-entropy differ by the teacher's entropy alone. Fails if the KL is the other way round, or averaged over classes."""
    teacher, student = torch.randn(2, 6, 10).double()
    student.requires_grad_()
    a, = torch.autograd.grad(tdmr.distillation_loss(teacher, student, 1.0), student)
    b, = torch.autograd.grad(tdmr.soft_cross_entropy(student, teacher.softmax(1)), student)
    c, = torch.autograd.grad(F.cross_entropy(student, teacher.softmax(1)), student)  # torch's own, with probabilities
    assert torch.allclose(a, b) and torch.allclose(b, c)


def test_distillation_scales_with_T_squared():
    """T^2 KL at T by hand, and 0 for equal logits. Fails without the T^2."""
    t, s = torch.randn(2, 6, 10).double()
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    assert tdmr.distillation_loss(t, s, 3.0).item() == pytest.approx(9 * (p * (p / q).log()).sum(1).mean().item())
    assert tdmr.distillation_loss(t, t, 3.0).abs() < 1e-12


def test_class_moments_are_those_of_each_class_pooled():
    """Against torch.cov a class, in uneven chunks; soft labels weigh. Fails if the classes' shares are forgotten."""
    f, y = torch.randn(90, 5).double() * 3 + 1, torch.arange(90) % 3 % 2  # 60 and 30 images
    f += 4 * y[:, None]
    q = F.one_hot(y).double()
    means, S = tdmr.class_moments(zip(f.split(40), q.split(40)))
    want = sum((y == c).double().mean() * torch.cov(f[y == c].T, correction=0) for c in (0, 1))
    assert torch.allclose(means, torch.stack([f[y == c].mean(0) for c in (0, 1)])) and torch.allclose(S, want)
    half = tdmr.class_moments([(f, q), (f, 1 - q), (f, q)])[0]  # every image twice in its class and once in the other
    assert torch.allclose(half[0], (2 * f[y == 0].sum(0) + f[y == 1].sum(0)) / (2 * 60 + 30))


def test_whitening_makes_the_shrunk_covariance_the_identity():
    """W^T (S/mean eigenvalue + shrink I) W = I, also where S is singular. Fails if shrink is added to the root."""
    f = torch.randn(4, 6).double()
    S = 7 * f.T @ f
    W = tdmr.whitening(S, 0.1)
    unit = S / S.diagonal().mean() + 0.1 * torch.eye(6).double()
    assert torch.allclose(W.T @ unit @ W, torch.eye(6).double(), atol=1e-9)
    assert tdmr.whitening(torch.zeros(3, 3), 0.1).isfinite().all()  # one view of one image a class


def test_the_discriminant_is_the_posterior_of_gaussian_classes():
    """Differences of logits equal those of Gaussian log-densities with the shrunk covariance, for any f; C-1 dimensions hold them
    all. Fails if the classes' |m|^2 / 2 is left out, or a direction is lost."""
    f, y = torch.randn(200, 6).double() @ torch.randn(6, 6).double(), torch.arange(200) % 4
    f[:, :4] += 2 * F.one_hot(y)
    means, S = tdmr.class_moments([(f, F.one_hot(y).double())])
    A, weight, bias = tdmr.discriminant(means, S, 0.05)
    o = f @ A @ weight.T + bias - (means.mean(0) @ A @ weight.T)  # the head's zero is the mean of the class means
    unit = S / S.diagonal().mean() + 0.05 * torch.eye(6).double()
    want = torch.stack([torch.distributions.MultivariateNormal(m, unit).log_prob(f) for m in means], 1)
    assert A.shape == (6, 3) and torch.allclose(o - o.mean(1, keepdim=True), want - want.mean(1, keepdim=True))


def test_propagation_equals_the_dense_iteration_and_reaches_the_closed_form():
    """Against dense matrices: (1 - a)(I - a S)^-1 Y. Fails if the graph is not symmetric, or a degree is forgotten."""
    z, y = F.normalize(torch.randn(30, 4).double(), dim=1), torch.tensor([0, 1, 2])
    s = z @ z.T
    s.fill_diagonal_(-1)
    W = torch.zeros(30, 30).double()
    for i in range(30):
        near = s[i].topk(5).indices
        W[i, near] = s[i, near].clamp_min(0) ** 3
    W = (W + W.T) / 2
    d = W.sum(1).rsqrt()
    Y = torch.zeros(30, 3).double()
    Y[[0, 1, 2], y] = 1
    want = 0.1 * torch.linalg.inv(torch.eye(30).double() - 0.9 * d[:, None] * W * d) @ Y
    got = tdmr.propagate_labels(z.float(), y, 3, 5, 0.9, iterations=300)
    assert torch.allclose(got, (want / want.sum(1, keepdim=True)).float(), atol=1e-4)


def test_labels_spread_through_a_cluster():
    """One label a cluster names all its images. Fails if the labels stay where they are."""
    rows, f, y = clusters(150, 3)
    q = tdmr.propagate_labels(rows.image_mean(f.float()), rows.y, 3, 5, 0.95)
    assert (q.argmax(1) == y).float().mean() > 0.95


# ----- surgery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, size, d_last, depths", [
    ("resnet8", 32, 64, 3), ("resnet18", 32, 512, 8), ("convnext_tiny", 32, 768, 8), ("vit_b_16", 224, 768, 9), ("swin_t", 64, 768, 8),
    ("maxvit_t", 224, 512, 6), ("mobilenet_v3_small", 32, 1024, 9)])
def test_features_of_every_family_are_found(arch, size, d_last, depths):
    """CNNs, transformers and their mix, random weights: the last feature is the classifier's input, and every tap adds 2 numbers
    a channel. Fails if Swin's channels, which come last, are taken for rows."""
    model = common.build_model(arch, 7)
    e = tdmr.Extractor(tdmr.Foundation(model, size, [0.5] * 3, [0.25] * 3), 9, CPU, False)
    x = images(2, size)
    with torch.no_grad():
        f = e(x)
        head = tdmr.last_linear(model, size, "--foundation")
        assert torch.allclose(head(f[:, -d_last:]), model(common.to_input(x, [0.5] * 3, [0.25] * 3, CPU)), atol=1e-4)
    assert f.shape[0] == 2 and f.isfinite().all() and f.shape[1] > d_last and e.forwards == 2
    widths = [t.shape[1] for t in e.seen]
    assert len(widths) == depths + 1 and widths[-1] == d_last and all(w % 2 == 0 and w <= 2 * max(d_last, 1024) for w in widths[:-1])


def test_mean_and_deviation_over_space_do_not_depend_on_where_the_channels_are():
    """Channels first, last, and tokens. Fails if one of the three is pooled over its channels."""
    x = torch.randn(2, 5, 4, 4)
    want = torch.cat([x.mean((2, 3)), x.std((2, 3), correction=0)], 1)
    for form in (x, x.permute(0, 2, 3, 1), x.flatten(2).transpose(1, 2)):
        assert torch.allclose(tdmr.over_space(form), want, atol=1e-6)


def test_features_do_not_depend_on_the_batch_and_the_foundation_never_changes():
    """Neither parameters nor BN statistics, through extraction. Fails if F runs in train mode."""
    of = foundation()
    before = {k: v.clone() for k, v in of.state_dict().items()}
    e, x = extractor(of), images(8)
    assert torch.allclose(e(x)[:3], e(x[:3]), atol=1e-5)
    for state in (of.state_dict(), e.model.state_dict()):
        assert all(torch.equal(before[k], v) for k, v in state.items())
    assert not any(p.requires_grad for p in e.model.parameters())


def test_images_of_another_size_are_resized_to_the_foundation():
    """28 px features of a 32 px network are those of the resized image. Fails if F sees another size than it was trained on."""
    of, x = foundation(), images(2, 28)
    seen = []
    of.model.conv1.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape[-1]))
    of(common.to_input(x, of.mean, of.std, CPU))
    assert seen == [32]


# ----- method --------------------------------------------------------------------------------------------------------


def test_every_image_passes_the_foundation_once_a_view_and_a_second_run_not_at_all(tmp_path, capsys):
    """Fails if cached features are not used."""
    e = extractor(foundation())
    rows = tdmr.make_rows(images(3), torch.arange(3), images(5, seed=1), 4, 2, seed=0)
    f = tdmr.cached_features(tmp_path / "f.pt", e, rows.images)
    assert e.forwards == len(rows.images) == 4 * 3 + 2 * 5 == len(f)
    again = tdmr.cached_features(tmp_path / "f.pt", e, rows.images)
    assert e.forwards == 22 and torch.equal(f, again) and "reused" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["images", "weights", "taps", "file"])
def test_the_cache_is_refused_when_data_or_foundation_differ(change, tmp_path, capsys):
    """Fails if the key misses one of them."""
    x, of, file = images(4), foundation(), tmp_path / "f.pt"
    tdmr.cached_features(file, extractor(of), x)
    if change == "images":
        x = x.clone()
        x[0, 0, 0, 0] ^= 1
    if change == "weights":
        of.model.layer1[0].bn1.running_mean[0] += 1e-3
    if change == "file":
        file.write_bytes(file.read_bytes()[:500])
    e = extractor(of, 2 if change == "taps" else 9)
    f = tdmr.cached_features(file, e, x)
    assert e.forwards == 4 and "computed anew" in capsys.readouterr().out and torch.equal(f, e(x).half())


def test_view_0_is_the_image_and_all_views_are_fixed_by_the_seed():
    """Fails if view 0 is augmented, or the views are drawn from torch's global generator."""
    x, u = images(3), images(5, seed=1)
    a, b, c = (tdmr.make_rows(x, torch.arange(3), u, 2, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(a.images, b.images) and not torch.equal(a.images, c.images)
    assert torch.equal(a.images[:3], x) and torch.equal(a.images[6:11], u) and not torch.equal(a.images[11:16], u)
    ids = torch.arange(8)[:, None].float()  # 3 labelled images in 2 views, 5 others in 3
    assert torch.equal(a.image_mean(torch.cat([ids[:3]] * 2 + [ids[3:]] * 3)), ids)


def test_the_few_shots_are_fixed_by_the_seed_and_disjoint_from_the_unlabelled():
    """Fails if the draw depends on anything but the seed, or a labelled image comes again without its label."""
    y = torch.arange(100) % 5
    a, u = tdmr.few_shot(y, list("abcde"), 4, None, 50, 0)
    torch.manual_seed(7)
    b, v = tdmr.few_shot(y, list("abcde"), 4, None, 50, 0)
    assert torch.equal(a, b) and torch.equal(u, v) and not torch.equal(a, tdmr.few_shot(y, list("abcde"), 4, None, 50, 1)[0])
    assert torch.equal(y[a].bincount(), torch.full((5,), 4)) and len(set(a.tolist()) | set(u.tolist())) == 70
    assert torch.equal(a, tdmr.few_shot(y, list("abcde"), 4, None, 0, 0)[0])  # settings (a) and (b) share their labelled images


@pytest.mark.parametrize("proxy", ["discriminant", "mlp"])
def test_the_proxy_beats_the_probe_with_unlabelled_images(proxy):
    """Two labels a class in wide clusters, seeds 0 to 2: it was 19 to 31 points ahead. Fails with --neighbours 0."""
    gain = []
    for seed in range(3):
        rows, f, y = clusters(300, 6, seed=seed)
        s = step1(rows, f, step1_steps=200, proxy=proxy)
        acc = {name: tdmr.head_accuracy_pct(s.train(name)[0], f[12:306], y[6:], CPU) for name in ("probe", "proxy")}
        gain.append(acc["proxy"] - acc["probe"])
    assert np.mean(gain) > 20, gain


def test_the_held_out_labels_never_reach_the_training_that_they_judge():
    """With the held-out images' labels changed, the rows and targets to train on stay. Fails if propagation sees them."""
    rows, f, y = clusters(60, 30)
    keep = torch.arange(30) >= 6
    a = step1(rows, f).targets(keep)
    b = step1(rows._replace(y=torch.where(keep, rows.y, (rows.y + 1) % 3)), f).targets(keep)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    labelled = a[0][a[0] < 60]  # of two views
    assert (labelled % 30 >= 6).all() and len(a[0]) == 2 * (24 + 30)


def test_the_discriminant_ignores_what_varies_within_a_class():
    """Ten labels a class, no unlabelled images, and a direction in which all images differ much: far ahead of shrink = 1e6, which keeps it.
    Fails without whitening."""
    rows, f, y = clusters(300, 30)
    rows, f = rows._replace(n_u=0), f.float()
    f += 10 * torch.randn(len(f), 1, generator=torch.Generator().manual_seed(1))
    labelled, rest = f[:60].half(), f[60:330]
    acc = [tdmr.head_accuracy_pct(step1(rows, labelled, shrink=a).train("proxy")[0], rest, y[30:], CPU) for a in (0.03, 1e6)]
    assert acc[0] > acc[1] + 10, acc


def test_the_discriminants_logits_have_the_wanted_spread():
    """Divided by one number, which moves no decision. Fails if weight or bias is left as it was."""
    rows, f, y = clusters(300, 30)
    s = step1(rows, f, logit_std=3.0)
    net, choice = s.train("proxy")
    raw, _ = s.make("proxy", torch.ones(30, dtype=torch.bool), 0)
    with torch.no_grad():
        o, o_raw = net(f.float())[1], raw(f.float())[1]
    assert torch.allclose(o * choice["scale"], o_raw, atol=1e-3) and (o - o.mean(1, keepdim=True)).std().item() == pytest.approx(3, rel=1e-3)


def test_students_start_alike_and_see_the_same_batches(monkeypatch):
    """Two students without a teacher are one, to the bit, whatever was drawn before; one with a weightless teacher equals CE on
    the same images. Fails if a teacher moves the draws, or psi the initial weights."""
    rows = tdmr.make_rows(images(6), torch.arange(6) % 3, images(10, seed=1), 2, 2, 0)
    data = common.Data("t", list("abc"), 32, [0.5] * 3, [0.25] * 3, None, None)
    how = dict(schedule="constant", A=1.0, B=1.0, ce_weight=1.0, T=4.0, steps=3, batch_size=4, unlabelled_batch=4, lr=0.05,
               momentum=0.9, weight_decay=0.0,
               warmup=0.1, amp=False, seed=0, device=CPU, name="x")
    seen = []
    to_input = common.to_input
    monkeypatch.setattr(common, "to_input", lambda x, *a: seen.append(x) or to_input(x, *a))
    R = len(rows.images)
    for draws, kw in ((0, {}), (5, {}), (2, dict(p=torch.randn(R, 8), logits_p=torch.randn(R, 3)))):
        torch.rand(draws)
        net = tdmr.build("--target", "resnet8", 3, 0)
        seen.append(net.conv1.weight.detach().clone())
        seen.append(tdmr.train_student(net, rows, data, **how, **kw).conv1.weight.detach())
    runs = [seen[i:i + 5] for i in (0, 5, 10)]  # initial weight, three batches, final weight
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0][4], runs[2][4])
    assert all(len(b) == 8 and torch.equal(a, b[:4]) for a, b in zip(runs[0][1:4], runs[2][1:4]))


# ----- the command line ----------------------------------------------------------------------------------------------


def test_tdmr_beats_scratch_in_a_miniature(mini, tmp_path, capsys):
    """5 labels a class and 800 images without, 120 steps, 1,000 test images. Fails with both weights at 0."""
    common.run(tdmr.main, tdmr.parse, f"--dataset {mini} --methods scratch tdmr --shots 5 --unlabelled 800 --views 2 --labelled-views 8 "
                                      f"--steps 120 --step1-steps 200 --foundation resnet20 --out {tmp_path}/run".split())
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    end = log[-1]
    assert {r["event"] for r in log} == {"start", "step", "eval", "end"}
    assert end["acc_tdmr_pct"] > end["acc_scratch_pct"] + 2
    assert end["foundation_forwards"] == 50 * 8 + 800 * 2
    assert end["trainable_params_step1"] == 9 * 736 + 10 * 9 + 10
    assert {"acc_scratch_pct", "acc_proxy_pct", "acc_tdmr_pct", "step1_s", "step2_s", "wall_s", "peak_mib"} <= set(end)
    assert "top-1 %" in capsys.readouterr().out


def test_all_methods_run_over_two_seeds_and_the_network_can_be_used(mini, tmp_path, capsys):
    """One log a seed, one row a method with mean and spread, and a tdmr.pt that common.py loads. Fails if a method is left out."""
    command = f"--dataset {mini} --methods all --seeds 0 1 {QUICK} --out {tmp_path}"
    common.run(tdmr.main, tdmr.parse, command.split())
    text = capsys.readouterr().out
    for seed in (0, 1):
        end = json.loads((tmp_path / f"seed{seed}" / "log.jsonl").read_text().splitlines()[-1])
        assert {f"acc_{m.replace('-', '_')}_pct" for m in tdmr.METHODS} <= set(end) and end["foundation_forwards"] == 180
    rows = text[text.index("top-1 %"):].splitlines()[1:1 + len(tdmr.METHODS)]
    assert [r.split()[0] for r in rows] == list(tdmr.METHODS) and all("+-" in r for r in rows)
    data = common.load_data(str(mini))
    net, data, _ = common.find_weights("resnet8", str(mini), data, str(tmp_path / "seed1" / "tdmr.pt"), CPU)
    assert common.accuracy_pct(net.to(memory_format=torch.channels_last), data, data.test, CPU) == pytest.approx(end["acc_tdmr_pct"], abs=0.2)
    common.run(tdmr.main, tdmr.parse, (command.replace("--methods all", "--methods tdmr")).split())
    assert capsys.readouterr().out.count("F does not run") == 4


def test_a_seed_repeats_a_run(mini, tmp_path):
    """Accuracies and weights, to the bit. Fails if anything is drawn without the seed."""
    for name in "ab":
        torch.rand(3)
        common.run(tdmr.main, tdmr.parse, f"--dataset {mini} --methods tdmr {QUICK} --out {tmp_path}/{name}".split())
    a, b = (torch.load(tmp_path / n / "tdmr.pt", weights_only=True)["state_dict"] for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_few_shots_alone_need_no_unlabelled_images(mini, tmp_path, capsys):
    """Setting (a). Fails if the graph is built without nodes."""
    command = f"--dataset {mini} --methods tdmr fitnet {QUICK} --out {tmp_path}".replace("--unlabelled 40", "--unlabelled 0")
    common.run(tdmr.main, tdmr.parse, command.split())
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["foundation_forwards"] == 100


def test_every_flag_is_read_and_documented():
    """Fails if a flag is added and forgotten."""
    source = inspect.getsource(tdmr)
    for action in tdmr.build_parser()._actions:
        if action.dest != "help":
            assert action.help and len(action.help) > 10, action.dest
            assert f"args.{action.dest}" in source or action.dest in tdmr.step1_keywords(), action.dest
    for name in tdmr.step1_keywords():
        assert name in vars(tdmr.parse([])) and len(re.findall(rf"\b{name}\b", inspect.getsource(tdmr.Step1))) > 1, name


def test_the_docstring_names_every_flag_that_it_promises():
    """Fails if a flag is renamed and the docstring is not."""
    known = {o for action in tdmr.build_parser()._actions for o in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z0-9-]+", tdmr.__doc__)) - {"--seed"} <= known


def test_help_needs_neither_data_nor_network():
    """Fails if the parser loads something."""
    done = subprocess.run([sys.executable, str(common.ROOT / "tdmr.py"), "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "--schedule" in done.stdout


# ----- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, says", [
    ("--shots 501 --unlabelled 0", "has only 500 train images"),
    ("--unlabelled 4801", "only 4800 train images are left"),
    ("--fraction 0.002 --unlabelled 0", "have none of class"),
    ("--foundation squeezenet1_0 --foundation-weights {tmp}/w.pt", "its feature cannot be found"),
    ("--foundation resnet21", "--foundation resnet21: no such network"),
    ("--foundation resnet44", "common.py pretrain --arch resnet44 --dataset cifar100"),
    ("--foundation-weights nowhere.pt", "no such file"),
    ("--foundation-weights {root}/README.md", "cannot be read"),
    ("--foundation resnet32 --foundation-weights {root}/weights/cifar100_resnet20.pt", "holds a resnet20"),
    ("--foundation resnet18 --foundation-weights {tmp}/w.pt", "does not fit resnet18"),
    ("--target resnet21", "--target resnet21: no such network"),
    ("--target squeezenet1_0", "its feature cannot be found"),
    ("--target inception_v3", "--target: does not run on 32 px images"),
    ("--dataset cifar", "cifar10"),
    ("--dataset {tmp}/none.npz", "no such file"),
    ("--methods tdmr magic", "--methods"),
    ("--seeds 1 1", "named twice"),
    ("--shots 0", "--shots"),
    ("--temperature 0", "--temperature"),
    ("--schedule later", "--schedule"),
    ("--out {root}/README.md/x", "cannot be written"),
    ("--device tpu9", "not usable here"),
])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(command, says, fails, tmp_path, monkeypatch):
    """Fails if a traceback reaches the user, or a folder is made before the check."""
    if "w.pt" in command:
        torch.save(common.build_model("squeezenet1_0", 1000).state_dict(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert says in fails(tdmr, command.format(root=common.ROOT, tmp=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_torchvision_weights_that_cannot_be_had_are_one_line(fails, monkeypatch, tmp_path):
    """As without a network. Fails if the URLError comes through."""
    build = common.build_model

    def offline(arch, classes, weights=None):
        if weights:
            raise OSError("no network")
        return build(arch, classes)

    monkeypatch.setattr(common, "build_model", offline)
    monkeypatch.chdir(tmp_path)
    assert "--foundation-weights FILE" in fails(tdmr, "--foundation resnet18")


@pytest.mark.parametrize("function, says", [("cosine_loss", "loss_tdmr (feature) is nan"), ("distillation_loss", "loss_tdmr (kd) is nan"),
                                            ("soft_cross_entropy", "loss_proxy is nan")])
def test_nan_stops_the_run_and_names_the_loss(function, says, mini, tmp_path, monkeypatch, fails):
    """Fails if training goes on with NaN weights."""
    loss = getattr(tdmr, function)
    monkeypatch.setattr(tdmr, function, lambda *a: loss(*a) * float("nan"))
    assert says in fails(tdmr, f"--dataset {mini} --methods tdmr --proxy mlp {QUICK} --out {tmp_path}")


def test_the_picture_is_drawn_from_logs_and_from_nothing_else(tmp_path, fails, capsys):
    """A line a method through all folders. Fails if a folder without logs, or with another script's, draws an empty picture."""
    assert "no .jsonl log" in fails(tdmr, f"--plot {tmp_path}")
    assert "not the logs of finished runs of tdmr.py" in fails(tdmr, f"--plot {common.ROOT}/results/gdfq_fashion_w4a4")
    pytest.importorskip("matplotlib")
    for shots in (5, 20):
        (tmp_path / str(shots)).mkdir()
        for seed in (0, 1):
            records = [{"event": "start", "args": {"shots": shots}},
                       {"event": "end", "acc_tdmr_pct": 70 + shots + seed, "acc_tdmr_no_proxy_pct": 70, "trainable_params_step1": 1}]
            (tmp_path / str(shots) / f"s{seed}.jsonl").write_text("\n".join(map(json.dumps, records)))
    common.run(tdmr.main, tdmr.parse, f"--plot {tmp_path}/5 {tmp_path}/20 --out {tmp_path}/p.png".split())
    assert (tmp_path / "p.png").stat().st_size > 1000 and "p.png" in capsys.readouterr().out
