"""Claims about gdfq.py. Each docstring ends with the change under which its test fails."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_log
from torch import nn

import common
import gdfq
from common import ActivationQuantizer, InputError, WeightQuantizer
from gdfq import GDFQ, quantize
from tools import deploy

CPU = torch.device("cpu")
NOISE = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    """An untrained network whose BN statistics are not the initial 0 and 1."""
    torch.manual_seed(0)
    model = common.build_model("resnet8", 10)
    for _ in range(3):
        model.train()(torch.randn(16, 3, 16, 16))
    return model.eval().to(memory_format=torch.channels_last)


def quick(model=None, size=16, **flags) -> GDFQ:
    """GDFQ in its smallest useful size: 2 warm-up and 4 training iterations of 16 images."""
    least = dict(epochs=6, iters_per_epoch=1, warmup_epochs=2, batch_size=16, g_width=8, buffer=3,
                 calibration_batches=2)
    return GDFQ(model or small(), 10, size, **least | flags)


def stepped(m: GDFQ, n: int) -> GDFQ:
    for _ in range(n):
        m.step()
    return m


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ranges(q: nn.Module) -> list[float]:
    return [float(m.hi) for m in q.modules() if isinstance(m, ActivationQuantizer)]


@pytest.fixture
def go(tiny, tiny_weights, tmp_path, monkeypatch):
    """go("--flag ...", "name"): the command on `tiny`, as small as can be; the log in its folder."""
    monkeypatch.chdir(tmp_path)
    least = (f"--dataset {tiny} --arch resnet8 --weights {tiny_weights} --no-amp --epochs 6 "
             "--iters-per-epoch 1 --warmup-epochs 1 --batch-size 8 --g-width 8 "
             "--calibration-batches 1 --percentile 100")

    def call(flags: str, out: str = "run") -> list[dict]:
        command = flags if "--resume" in flags else f"{least} {flags} --out {out}"
        monkeypatch.setattr(sys, "argv", ["gdfq.py", *command.split()])
        common.run(gdfq.main, gdfq.parse)
        return read_log(Path(out, "log.jsonl"))
    return call


# ----- equations ---------------------------------------------------------------------------------------


def test_bns_is_the_mean_over_layers_of_two_means_over_channels():
    """Against NumPy. Fails if layers are summed, or channels, or if the variance is the unbiased one."""
    model, inputs = small(), {}
    seen = gdfq.record_bn_statistics(model)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.register_forward_pre_hook(lambda bn, x: inputs.__setitem__(bn, x[0].detach().numpy()))
    model(NOISE)
    want = np.mean([((x.mean((0, 2, 3)) - bn.running_mean.numpy())**2).mean()
                    + ((x.var((0, 2, 3)) - bn.running_var.numpy())**2).mean()
                    for bn, x in inputs.items()])
    assert len(seen) == 9 and gdfq.bn_statistics_loss(seen).item() == pytest.approx(want, rel=1e-4)


def test_the_gradient_of_bns_reaches_every_parameter_of_the_generator():
    """With beta alone, CE left out. Fails if the recorded statistics are detached."""
    m = quick()
    m.bn_statistics.clear()
    m.teacher(m.sample()[0])
    gdfq.bn_statistics_loss(m.bn_statistics).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.generator.parameters())
    assert all(p.grad is None for p in m.teacher.parameters())


def test_kd_equals_the_sum_in_the_paper():
    """T^2 sum_c p_c (ln p_c - ln q_c), by hand; "mean" is a C-th of it; 0 for equal logits.

    Fails if teacher and student are swapped, or if T^2 is missing.
    """
    t, s = torch.randn(2, 6, 10).double()
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    want = 9 * (p * (p.log() - q.log())).sum(1).mean().item()
    assert gdfq.distillation_loss(t, s, 3.0, "batchmean").item() == pytest.approx(want)
    assert gdfq.distillation_loss(t, s, 3.0, "mean").item() == pytest.approx(want / 10)
    assert gdfq.distillation_loss(t, t, 3.0, "batchmean").abs() < 1e-12


# ----- surgery -----------------------------------------------------------------------------------------


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


class Odd(nn.Module):
    """Every way to call an activation and to take a weight."""
    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleList([OwnConv(3, 4, 3), nn.BatchNorm2d(4)])
        self.shared, self.relu6, self.silu = nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU()
        self.swish, self.taken, self.fc = nn.Hardswish(), nn.Linear(4, 4), nn.Linear(4, 10)

    def forward(self, x, scale=1.0):
        for layer in self.stem:
            x = layer(x)
        x = self.shared(x)
        x = self.shared(x - 0.1) if scale == 1.0 else x
        x = self.swish(self.silu(self.relu6(x)))
        x = F.gelu(torch.relu(F.relu(x).relu()))
        x = nn.Tanh()(x)  # made on the way
        x = x * x.mean((2, 3), keepdim=True).sigmoid()  # a gate: one range, of the product
        x = F.linear(x.mean((2, 3)), self.taken.weight, self.taken.bias)  # as attention does
        return self.fc(x)


def test_every_way_to_call_an_activation_or_to_take_a_weight_is_quantized():
    """Shared modules, functions, methods, a gate. Fails if modules are swapped instead of calls."""
    q = quantize(Odd(), NOISE, 2, 4)
    assert len(ranges(q)) == 11
    assert deploy.quantized_layers(q) == [q.get_submodule("stem.0"), q.taken, q.fc]
    targets = [node.target for node in q.graph.nodes]
    assert targets[targets.index("sigmoid") + 2].startswith("act_quant")
    assert all(len(row.unique()) <= 4 for row in q.taken.weight.detach())


def test_what_stays_in_full_precision_is_named():
    """A weight of the network's own, products of activations. Fails if the note is gone, or names a
    weight that is quantized."""
    class Attention(Odd):
        def forward(self, x):
            return super().forward(x) @ super().forward(x).softmax(1).mT.abs()

    net = Attention()
    net.stem.append(nn.ConvTranspose2d(4, 4, 2, bias=False))
    with pytest.warns(UserWarning, match=r"stay in fp32: stem\.2\.weight, abs, matmul, softmax$"):
        quantize(net, NOISE, 4, 4)


@pytest.mark.parametrize("name", ["GLU", "LogSigmoid", "RReLU", "Softsign", "Hardshrink", "Tanhshrink"])
def test_rare_activations_are_quantized_as_modules_and_as_functions(name):
    """Fails if a nonlinearity that torch has is passed over without a word."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3, 1, 1), getattr(nn, name)()

        def forward(self, x):
            x = self.act(self.conv(x))
            return getattr(F, name.lower())(torch.cat([x, x], 1)).mean((2, 3))

    assert len(ranges(quantize(Net(), NOISE, 4, 4))) == 2


@pytest.mark.parametrize("arch, activations", [
    ("resnet18", 17), ("mobilenet_v3_small", 42), ("shufflenet_v2_x0_5", 37), ("densenet121", 121),
    ("googlenet", 57), ("efficientnet_b0", 65), ("regnet_y_400mf", 81)])
def test_every_layer_and_every_activation_call_of_torchvisions_families(arch, activations):
    """The last, too; a ReLU called twice has two ranges. Fails if grouped convolutions are left out."""
    model, x = common.build_model(arch, 10).eval(), torch.randn(2, 3, 32, 32)
    q, layers = quantize(model, x, 8, 8), (nn.Conv2d, nn.Linear)
    used = [n for n, m in model.named_modules() if isinstance(m, layers) and "aux" not in n]
    assert len(deploy.quantized_layers(q)) == len(used) and q(x).shape == (2, 10)
    assert len(ranges(q)) == activations


def test_the_original_is_untouched_to_the_bit():
    """Nor the caller's random numbers. Fails if it is not copied, or if hooks are copied to Q."""
    model = small().train()
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    quantize(model, NOISE, 2, 2)
    m = stepped(quick(model), 4)
    assert equal(before, model.state_dict()) and torch.equal(rng, torch.get_rng_state())
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert not any(m._forward_pre_hooks for net in (model, m.student) for m in net.modules())


def test_eight_bits_change_less_than_one_answer_in_a_hundred():
    """The limit of many bits is the float model. Fails if activations have 4."""
    data = common.load_data("fashion")
    model, data, _ = common.find_weights("resnet20", "fashion", data, None, CPU)
    x = common.to_input(data.test.tensors[0][:250], data.mean, data.std, CPU)
    with torch.no_grad():
        same = quantize(model, x[:50], 8, 8)(x).argmax(1) == model(x).argmax(1)
    assert same.float().mean() > 0.99


def test_clipped_range_is_numpys_percentile_and_100_is_min_max():
    """On few values exactly, on many by a sample. Fails if both ends are the upper one."""
    x = torch.randn(5000)
    ends = common.clipped_range(x, 99.0)
    assert list(ends) == pytest.approx(list(np.percentile(x, [1, 99])), abs=1e-4)
    assert common.clipped_range(x, 100.0) == (x.min(), x.max())
    many = torch.rand(1_000_000)
    assert common.clipped_range(many, 99.0)[1].item() == pytest.approx(0.99, abs=0.002)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(64, 6, 3, 3), (64, 1, 3, 3), (64, 40, 1, 1), (64, 40), (64, 1, 5)])
def test_rounding_errors_cancel_in_each_channel_and_pruned_weights_stay(shape, bits):
    """bf16 weights, of which many tie. No weight moves by a whole step, a 0 never. Fails if a flip goes
    the wrong way, or off an end. At 2 and 3 bits a few channels have no code left to move."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).bfloat16().float()
    w[w.abs() < 0.3] = 0
    quantizer = WeightQuantizer(bits, "squant")
    code, s, z = quantizer.codes(w)
    assert code.min() == 0 and code.max() == 2**bits - 1 and torch.equal(quantizer(w), (code + z) * s)
    e = w / s - z - code
    assert e.abs().max() < 1 + 1e-4 and quantizer(w)[w == 0].abs().max() == 0
    off = e.flatten(1).sum(1).abs() > 0.5 + 1e-3
    assert off.float().mean() <= {2: 0.3, 3: 0.1}.get(bits, 0)


@pytest.mark.parametrize("errors, codes, moves", [
    ([0.4, 0.35, 0.3], [1, 1, 1], [1, 0, 0]),
    ([-0.4, -0.3, -0.45], [1, 1, 1], [0, 0, -1]),
    ([0.2, 0.2, 0.0], [1, 1, 1], [0, 0, 0]),
    ([0.4, 0.35, 0.3], [3, 1, 1], [0, 1, 0]),  # the first is at the upper end
    ([-0.4, -0.3, -0.45], [1, 1, 0], [-1, 0, 0]),  # the last is at the lower end
    ([0.4, 0.3, -0.1], [3, 3, 1], [0, 0, 0]),  # nobody is left who gains
    ([float("nan"), 0.5, 0.5], [1, 1, 1], [0, 0, 0]),
    ([0.3] * 9, [1] * 9, [1] * 3)])  # of equal ones, three
def test_as_many_codes_move_as_their_errors_sum_to(errors, codes, moves):
    """Those nearest to a change. Fails if others move, or all that tie, or one beyond its end."""
    moved = common.flips(torch.tensor([errors]), torch.tensor([codes]).float(), 3)[0].tolist()
    assert moved == moves or sorted(moved, reverse=True) == moves + [0] * 6


def test_a_kernels_errors_cancel_before_its_channels():
    """Errors of 0.4, 0.4, 0.3 and -0.1, 0, 0 in two kernels. Fails if the channel's sum comes first."""
    w = torch.tensor([[[3.4, 1.4, 1.3], [0.9, 7.0, 0.0]]])
    assert WeightQuantizer(3, "nearest").codes(w)[0].tolist() == [[[3, 1, 1], [1, 7, 0]]]
    assert WeightQuantizer(3, "squant").codes(w)[0].tolist() == [[[4, 1, 1], [1, 7, 0]]]


@pytest.mark.parametrize("wbits, abits", [(2, 8), (8, 2), (3, 5)])
def test_weights_and_activations_have_at_most_two_to_the_k_values(wbits, abits):
    """Counted. Fails if the two bit widths are swapped."""
    q, seen = quantize(small(), NOISE, wbits, abits), []
    for m in q.modules():
        if isinstance(m, ActivationQuantizer):
            m.register_forward_hook(lambda m, i, o: seen.append(o.detach().unique().numel()))
    q(NOISE)
    assert 2**(abits - 1) < max(seen) <= 2**abits
    weights = [channel for layer in deploy.quantized_layers(q) for channel in layer.weight.detach()]
    assert 2**(wbits - 1) < max(w.unique().numel() for w in weights) <= 2**wbits


# ----- generator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, size", [
    ("embedding", 32), ("conditional-bn", 32), ("auto", 64), ("auto", 72)])
def test_generators_give_normalised_images_and_use_the_label(kind, size):
    """Mean 0 and variance 1 a channel; another label, another image. Fails without the last BN."""
    g = gdfq.Generator(10, size, 100, 16, kind).train()
    z, y = torch.randn(64, 100), torch.randint(10, (64,))
    conditional = isinstance(g.bn0, gdfq.ConditionalBN)
    assert conditional == (kind == "conditional-bn" or size > 64)  # auto: embedding up to 64 px
    if conditional:  # its rows start equal, and part in the first step
        nn.init.normal_(g.bn0.weight)
    x = g(z, y)
    assert x.shape == (64, 3, size, size)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.var((0, 2, 3)) - 1).abs().max() < 1e-2
    assert (g(z, (y + 1) % 10) - x).abs().mean() > 0.1


@pytest.mark.parametrize("kind, lr_g, least", [("embedding", 2e-2, 35), ("conditional-bn", 1e-2, 75)])
def test_the_generator_learns_its_labels(kind, lr_g, least, tiny_weights):
    """M recognises 25 % by chance, and soon far more of them. Fails if the label does not reach G."""
    model, _ = common.load_network(tiny_weights, "resnet8")
    m = GDFQ(model, 4, 32, batch_size=16, g_width=16, lr_g=lr_g, generator=kind)

    @torch.no_grad()
    def recognised_pct() -> float:
        x, y = m.sample(torch.arange(400) % 4)
        return 100 * (m.teacher(x).argmax(1) == y).float().mean().item()

    before = recognised_pct()
    for _ in range(40):
        m.generator_step()
    assert recognised_pct() > least > 34 > before


# ----- method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head, flags, says", [
    (nn.Linear(64, 7), {}, r"answers a Tensor \(16, 7\); expected logits \(16, 10\)"),
    (nn.Unflatten(1, (4, 16)), {}, r"answers a Tensor \(16, 4, 16\)"),
    (nn.Sequential(nn.Linear(64, 10), nn.Threshold(np.inf, np.nan)), {}, "answers NaN"),
    (nn.utils.parametrizations.orthogonal(nn.Linear(64, 10)), {}, "fc: its weight is made by a param"),
    (None, dict(wbits=9), "expected 2 to 8 bits"),
    (None, dict(rounding="up"), "squant or nearest"),
    (None, dict(warmup_epochs=6), "--warmup-epochs 6: not below --epochs"),
    (None, dict(size=30), "multiples of 4"),
    (None, dict(weight_bits=3), "not a flag: weight_bits"),
    (None, dict(recipe="paper"), "not a flag: recipe; a recipe is unpacked")])
def test_a_network_or_a_keyword_that_cannot_work_is_refused(head, flags, says):
    """For those who import the class. Fails if a misspelt keyword is never read."""
    net = small()
    net.fc = head or net.fc
    with pytest.raises((InputError, TypeError), match=says):
        quick(net, **flags)


def test_every_part_fires_and_no_other():
    """G moves in each step; Q only after the warm-up, then every parameter of it. M and the "fixed BN
    statistics" never do. Fails if Q is put into train mode, or if it learns in the warm-up."""
    m, learns = quick(student_steps=2), ("bn1.weight", "bn1.bias", "weight.original", "fc.bias")
    q0, t0 = copy.deepcopy(m.student.state_dict()), copy.deepcopy(m.teacher.state_dict())
    for i in range(m.iterations):
        before = m.generator.conv1.weight.clone()
        stats = m.step()
        assert not torch.equal(before, m.generator.conv1.weight) and equal(t0, m.teacher.state_dict())
        assert ("kd" in stats) == (i >= 2) and len(m.buffer) == min(3, max(0, i - 1))
        moved = [k for k, v in m.student.state_dict().items() if not torch.equal(v, q0[k])]
        learned = [k for k in moved if k.endswith(learns)]
        assert learned == [k for k in q0 if i >= 2 and k.endswith(learns)]
        assert not any("running" in k for k in moved)


def test_ranges_move_at_the_end_of_the_warm_up_only():
    """From those of noise to those of G's images. Fails if training keeps observing."""
    m = quick()
    seen = [ranges(m.student)]
    for _ in range(4):
        m.step()
        seen.append(ranges(m.student))
    assert seen[0] == seen[1] != seen[2] == seen[3] == seen[4]


def test_the_first_student_step_takes_the_newest_batch_and_the_others_any():
    """Fails if the newest may fall out of the buffer, or if all steps take it."""
    m, made, taken = quick(size=8, batch_size=8, student_steps=3, epochs=10), [], []
    generate, learn = m.generator_step, m.student_step
    m.generator_step = lambda: made.append(generate()) or made[-1]
    m.student_step = lambda x, *rest: taken.append(torch.equal(x, made[-1][0])) or learn(x, *rest)
    stepped(m, 10)
    assert all(taken[::3]) and not all(taken[1::3] + taken[2::3])


@pytest.mark.parametrize("schedule, epochs, rates", [
    ("step", 400, {0: 1, 99: 1, 100: 0.1, 250: 0.01, 399: 0.001}),
    ("cosine", 102, {0: 1, 2: 1, 52: 0.5, 102: 0})])
def test_both_learning_rates_follow_the_schedule(schedule, epochs, rates):
    """Published: x0.1 at epochs 100, 200, 300. Fails if iterations and epochs are mixed up."""
    m = quick(schedule=schedule, lr=1.0, lr_g=1.0, iters_per_epoch=200, epochs=epochs)
    for epoch, want in rates.items():
        m.iteration = epoch * 200
        m.set_learning_rates()
        assert m.opt.param_groups[0]["lr"] == pytest.approx(want) == m.opt_g.param_groups[0]["lr"]


def test_a_seed_repeats_a_run_and_another_seed_does_not():
    """Whatever else is drawn in between. Fails if a step draws from torch's global generator."""
    def figures(seed, others):
        m = quick(seed=seed)
        return [torch.rand(others).sum() * 0 + m.step()["ce"] for _ in range(4)]
    assert figures(1, 0) == figures(1, 5) != figures(2, 0)


@pytest.mark.parametrize("amp, stop", [(False, 1), (True, 4)])
def test_resumed_equals_uninterrupted_bitwise(amp, stop, tmp_path):
    """In the warm-up and after. Fails if the buffer, a momentum or the noise's state is not saved."""
    flags = dict(amp=amp, batch_size=4 if amp else 16)  # without the hardware bf16 is slow
    whole, parts = stepped(quick(**flags), stop), quick(**flags)
    torch.save(common.state_of(whole), tmp_path / "c.pt")
    stepped(whole, 6 - stop)
    stepped(common.restored(parts, torch.load(tmp_path / "c.pt", weights_only=True)), 6 - stop)
    assert parts.iteration == 6 and equal(whole.student.state_dict(), parts.student.state_dict())
    assert equal(whole.generator.state_dict(), parts.generator.state_dict())


# ----- the command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The folder of a miniature of the default run, with the paper's min and max, on 500 test images."""
    root, tmp = common.ROOT, tmp_path_factory.mktemp("mini")
    z = np.load(root / "data/fashion_mnist.npz")
    np.savez(tmp / "mini.npz", **{k: v[:500] for k, v in z.items()})
    flags = (f"--dataset {tmp}/mini.npz --weights {root}/weights/fashion_resnet20.pt --no-amp "
             "--wbits 3 --abits 3 --percentile 100 --epochs 2 --warmup-epochs 1 --batch-size 24 "
             f"--g-width 32 --lr-g 1e-2 --student-steps 1 --calibration-batches 5 --out {tmp}/run")
    common.run(gdfq.main, gdfq.parse, flags.split())
    return tmp / "run"


def test_gdfq_beats_ptq_at_three_bits(miniature):
    """Over seeds 0 to 2 it was 5.8 to 12.8 points above PTQ with ranges from noise (asked: 3), and 0.4
    to 3.0 above ranges from G's images. Fails if the student's learning rate is 0."""
    log = read_log(miniature / "log.jsonl")
    end, kd = log[-1], [r["kd"] for r in log if "kd" in r]
    assert end["acc_pct"] > end["acc_ptq_noise_pct"] + 3 and end["acc_pct"] > end["acc_ptq_gen_pct"]
    assert kd[-1] < 0.9 * kd[0]


def test_a_run_leaves_its_log_a_picture_and_a_packed_network(miniature):
    """Fails if a key of them is renamed, or the size in the log is not the file's."""
    log, packed = read_log(miniature / "log.jsonl"), miniature / "quantized.pt"
    keys = {"acc_fp_pct", "acc_ptq_gen_pct", "acc_ptq_noise_clipped_pct", "size_fp_bytes", "peak_mib"}
    assert {r["event"] for r in log} == {"start", "step", "eval", "end"} and keys < {*log[-1]}
    assert log[-1]["size_packed_bytes"] == packed.stat().st_size
    assert torch.load(packed, weights_only=True).keys() == deploy.KINDS.keys()
    assert (miniature / "generated.png").stat().st_size > 10_000
    assert len([*miniature.iterdir()]) == 3


def test_the_packed_network_has_the_accuracy_of_the_run(miniature, capsys):
    """By tools/deploy.py, in its integers. Fails if the file holds M's weights, or other ranges."""
    common.run(deploy.main, deploy.parse, ["evaluate", str(miniature / "quantized.pt")])
    acc = read_log(miniature / "log.jsonl")[-1]["acc_pct"]
    assert capsys.readouterr().out.splitlines()[-1] == f"top-1 {acc:.2f} %"


EVERY = "--checkpoint-every 2 --eval-every 1"


@pytest.fixture
def killed(go, monkeypatch, capsys):
    """A run in the folder b that was killed between two checkpoints, in a log line, and then moved."""
    step = GDFQ.step

    def stops(self, real):
        if self.iteration == 5:
            raise KeyboardInterrupt
        return step(self, real)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(GDFQ, "step", stops)
        go(EVERY, "killed")
    assert e.value.code == 130
    assert "to go on: python gdfq.py --resume killed\n" in capsys.readouterr().err
    with open("killed/log.jsonl", "a") as f:
        f.write('{"event": "eval", "iter')
    return Path("killed").rename("b")


def test_an_interrupted_command_resumes_to_the_same_file_and_log(go, killed):
    """Fails if results or iteration are not in the checkpoint, or if evals after it stay in the log."""
    logs = go(EVERY, "a"), go(f"--resume {killed}", "b")
    files = [torch.load(f"{d}/quantized.pt", weights_only=True) for d in "ab"]
    assert equal(*({k: f[k] for k in ("codes", "steps", "zeros", "floats")} for f in files))
    kept = [[r | {"wall_s": 0} for r in log if r["event"] == "eval"] for log in logs]
    assert kept[0] == kept[1] and [r["iteration"] for r in kept[0] if "acc_pct" in r] == [2, 3, 4, 5, 6]
    assert logs[0][-1].keys() == logs[1][-1].keys() and not (killed / "checkpoint.pt").exists()


def test_a_run_that_began_with_other_weights_does_not_go_on(killed, fails):
    """Fails if their checksum is not compared."""
    state = torch.load(killed / "checkpoint.pt", weights_only=True)
    torch.save(state | {"crc": 0}, killed / "checkpoint.pt")
    assert "the run began with other weights" in fails(gdfq, f"--resume {killed}")


def test_nan_stops_the_run_and_keeps_the_checkpoint(go, monkeypatch, capsys):
    """Fails if training goes on with NaN weights, or if the checkpoint is of after it."""
    loss, factors = gdfq.distillation_loss, iter([1, 1, 1, float("nan")])
    monkeypatch.setattr(gdfq, "distillation_loss", lambda *args: loss(*args) * next(factors))
    with pytest.raises(SystemExit):
        go("--student-steps 1 --checkpoint-every 1")
    assert "the loss of Q is nan, its gradient norm nan; lower --lr\n" in capsys.readouterr().err
    state = torch.load("run/checkpoint.pt", weights_only=True)["method"]
    assert state["iteration"] == 4 and all(v.isfinite().all() for v in state["student"].values())


def test_fine_tuning_on_real_images_runs_in_the_same_table(go, capsys, monkeypatch):
    """It makes no checkpoint. Fails if a generated batch reaches the student."""
    monkeypatch.delattr(GDFQ, "sample")
    monkeypatch.delattr(common, "save_checkpoint")
    log = go("--method finetune-real --checkpoint-every 1 --percentile 99")
    printed = capsys.readouterr().out.splitlines()
    rows = [line[:44].strip() for line in printed if line[44:51].strip().replace(".", "").isdigit()]
    assert rows == ["full precision", "PTQ, min and max of noise", "PTQ, squant, 99 % of noise",
                    "PTQ, squant, 99 % of real images", "finetune-real, last state"]
    assert [r["event"] for r in log] == ["start", *5 * ["eval"], "end"]


def test_without_tools_a_run_ends_without_a_packed_network(go, monkeypatch, capsys):
    """As for one who has copied the script and common.py. Fails if an import at its end is an error."""
    monkeypatch.setitem(sys.modules, "tools.deploy", None)
    end = go("")[-1]
    assert "no quantized.pt, since there is no tools/deploy.py: copy tools/" in capsys.readouterr().out
    assert end["acc_pct"] > 0 and end["size_packed_bytes"] is None


def test_the_lines_in_the_readme_work(tmp_path, monkeypatch):
    """Copied and run, one iteration long. Fails if a name in them is out of date."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (common.ROOT / "README.md").read_text("utf-8"), re.S)
    lines, names = next(b for b in blocks if "from gdfq import" in b), {"my_pretrained_network": small()}
    exec(lines.replace("method.iterations", "1"), names)
    assert Path("small.pt").stat().st_size < 60_000
    assert torch.equal(names["again"](NOISE), names["small"](NOISE))


def test_a_recipe_sets_the_published_values_and_flags_still_win():
    """In any order. Fails if the recipe overwrites an explicit flag, or misspells one."""
    a = gdfq.parse(["--epochs", "20", "--recipe", "paper"])
    assert (a.epochs, a.batch_size, a.temperature, a.kd_reduction, a.lr, a.ce, a.buffer) == (
        20, 200, 20.0, "mean", 1e-4, 1.0, 1)
    for recipe in gdfq.RECIPES.values():
        common.defaults(gdfq.build_parser, **recipe)


def test_a_range_holds_all_values_from_six_bits_on():
    """Fails if a recipe's percentile, chosen at few bits, is taken at many."""
    flags = ("", "--recipe many-classes", "--recipe many-classes --abits 6", "--abits 8 --percentile 99")
    assert [gdfq.parse(f.split()).percentile for f in flags] == [99.98, 99.95, 100, 99]


WATCH = """
import runpy, sys
def hook(event, args):
    if event == "socket.connect" or event == "open" and str(args[0]).endswith((".npz", ".pt")):
        print("SEEN", event, args[0])
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("flags, seen", [("--help", False), ("--arch squeezenet1_1", True)])
def test_help_opens_no_data_no_weights_and_no_connection(flags, seen):
    """Another command does. Fails if importing the script loads anything but code."""
    command = [sys.executable, "-c", WATCH, str(common.ROOT / "gdfq.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    assert ("SEEN" in done.stdout) == seen and ("--wbits" in done.stdout) != seen, done.stderr


# ----- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, says", [
    ("--arch resnet21", "no such network; nearest names: resnet20"),
    ("--dataset cifar", "cifar10"),
    ("--wbits 1", "from 2 to 8"),
    ("--first-last-bits 16", "from 2 to 8"),
    ("--batch-size 0", "--batch-size"),
    ("--ema-momentum 1", "--ema-momentum"),
    ("--adam-betas 0.5 1", "--adam-betas"),
    ("--schedule Cosine", "--schedule: invalid choice: 'Cosine'"),
    ("--lr -1", "--lr"),
    ("--warmup-epochs 10", "not below --epochs"),
    ("--weights nowhere.pt", "no such file"),
    ("--weights {root}/README.md", "a checkpoint"),
    ("--weights {root}/weights/cifar100_resnet20.pt", "trained for 100 classes"),
    ("--dataset {tmp}", "no val/ folder"),
    ("--dataset {tmp}/none.npz", "No such file"),
    ("--arch squeezenet1_1", "no BatchNorm"),
    ("--arch inception_v3", "Kernel size can't be greater"),
    ("--arch resnet8 --weights {weights} --out {root}/README.md/x", "cannot be made (Not a directory)"),
    ("--arch resnet8 --weights {weights} --out {tmp}", "cannot be made (File exists)"),
    ("--device tpu9", "not usable here"),
    ("--arch resnet8 --weights {weights} --method finetune-real --batch-size 65", "only 64 train"),
])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(command, says, fails, tiny, tiny_weights,
                                                         tmp_path, monkeypatch):
    """Fails if a traceback reaches the user, or a folder is made before the check."""
    monkeypatch.chdir(tmp_path)
    command = command.format(root=common.ROOT, tmp=tmp_path, weights=tiny_weights)
    assert says in fails(gdfq, f"--dataset {tiny} --batch-size 4 --g-width 8 {command}")
    assert not list(tmp_path.iterdir())


def test_a_network_of_ones_own_from_the_command_line_and_back(go, own, fails, capsys):
    """--arch FILE.py:NAME, its integers by tools/deploy.py. Fails if deploy runs what the file names."""
    end = go(f"--arch {own}:make_trained --weights none --wbits 8 --abits 8")[-1]
    assert end["acc_fp_pct"] == 100.0
    assert "repeat that behind --arch" in fails(deploy, "evaluate run/quantized.pt")
    capsys.readouterr()
    again = f"evaluate run/quantized.pt --arch {own}:make_trained"
    common.run(deploy.main, deploy.parse, again.split())
    assert capsys.readouterr().out.splitlines()[-1] == f"top-1 {end['acc_pct']:.2f} %"
    go(f"--arch {own}:make --weights none", "untrained")  # it calls x.view
