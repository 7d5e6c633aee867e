"""Measures what an iteration of GDFQ costs, and what reading JPEG files costs.

    python tools/cost.py            # ResNet-20, 100 classes, batch 200, generator width 128; minutes
    python tools/cost.py loader     # images/s of files at 224 px, by the number of workers

The iteration is that of the published configuration. It is compared with the same iteration written
plainly: fp32, NCHW, BatchNorm statistics by mean and var, a quantizer of differentiable ops. Both have
the same networks, losses, optimizers and batch, and they take turns in one process. The last line is the
ratio of images/s. No data is needed, since the time does not depend on the weights.

loader makes JPEG files of 500 x 375 px and about 110 kB, as those of ImageNet are. It reads them as
every script does: first alone, then for a network that runs at the same time. It prints how long that
network waits.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import gdfq  # noqa: E402


def plain_fake_quant(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    s, z = common.step_and_zero(lo, hi, bits)
    q = torch.clamp(x / s - z, 0, 2**bits - 1)
    q = q + (torch.round(q) - q).detach()
    return (q + z) * s


class Plain:
    """One iteration: a generator step, then a student step on the same batch."""

    def __init__(self, method: gdfq.GDFQ):
        nets = method.teacher, method.generator, method.student
        nchw = dict(memory_format=torch.contiguous_format)
        self.teacher, self.generator, self.student = (copy.deepcopy(net).to(**nchw) for net in nets)
        for net in (self.teacher, self.student):
            for m in net.modules():
                m._forward_pre_hooks.clear()
        self.seen, self.hp, self.classes = [], method.hp, method.num_classes
        for m in self.teacher.modules():
            if isinstance(m, _BatchNorm):
                m.register_forward_pre_hook(lambda m, inputs: self.seen.append((m, inputs[0])))
        self.opt_g = torch.optim.Adam(self.generator.parameters(), 1e-3, (0.5, 0.999))
        self.opt = torch.optim.SGD(self.student.parameters(), 1e-4, 0.9, weight_decay=1e-4,
                                   nesterov=True)

    def step(self) -> None:
        y = torch.randint(self.classes, (self.hp.batch_size,))
        z = torch.randn(self.hp.batch_size, self.hp.latent)
        self.seen.clear()
        x = self.generator(z, y)
        logits = self.teacher(x)
        bns = 0.0
        for m, h in self.seen:
            mu, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
            bns = bns + F.mse_loss(mu, m.running_mean) + F.mse_loss(var, m.running_var)
        loss = F.cross_entropy(logits, y) + 0.1 * bns / len(self.seen)
        self.opt_g.zero_grad()
        loss.backward()
        self.opt_g.step()
        out = self.student(x.detach())
        loss = F.cross_entropy(out, y) + gdfq.distillation_loss(logits.detach(), out, 20.0, "mean")
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()


def build_parser() -> common.Parser:
    p = common.Parser("tools/cost.py", __doc__)
    choices = ["iteration", "loader"]
    p.add_argument("what", nargs="?", default=choices[0], choices=choices, help="see above")
    a = p.group("options")
    a("--iterations", 10, "iterations that are timed, after two more", lo=1)
    a("--images", 600, "of loader: files made", lo=1)
    a("--arch", "resnet18", "of loader: the network that waits for them")
    a("--device", "auto", "of loader: where that network runs")
    a("--out", "runs/cost", "folder for log.jsonl")
    return p


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def make_files(folder: Path, n: int) -> None:
    """n JPEG files of smooth noise of all scales, which compresses as photographs do."""
    from torchvision.transforms.v2.functional import to_pil_image

    folder.mkdir(parents=True)
    for i in range(n):
        scales = [torch.randn(1, 3, 375 // 2**k + 1, 500 // 2**k + 1) * 1.1**k for k in range(8)]
        x = sum(F.interpolate(s, size=(375, 500), mode="bilinear") for s in scales)[0]
        x = (x - x.mean()) / x.std() * 60 + 120
        to_pil_image(x.clamp(0, 255).byte()).save(folder / f"{i}.jpg", quality=90)


@torch.no_grad()
def read(split, net, data: common.Data, device) -> tuple[float, float]:
    """(images a second, share of the time in which the network, if any, waits for them)."""
    t0 = time.perf_counter()
    busy = 0.0
    for x, _ in common.batches(split, 50):
        t = time.perf_counter()
        if net:
            net(common.to_input(x, data.mean, data.std, device)).sum().item()
        busy += time.perf_counter() - t
    whole = time.perf_counter() - t0
    return len(split) / whole, 1 - busy / whole


def loader(args: argparse.Namespace) -> None:
    """Writes one line of the log for each number of workers."""
    device = common.pick_device(args.device)
    log = common.RunLog(Path(args.out), args, device)
    net = common.build_model(args.arch, 1000).eval().to(device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder, "val", "a"), args.images)
        data = common.load_data(folder)
        kB = statistics.mean(os.path.getsize(file) for file, _ in data.test.imgs) / 1000
        for workers in (0, 1, 2, 4, 8):
            if workers > 2 and workers > (os.cpu_count() or 1):
                break
            common.Workers.count = workers
            alone, _ = read(data.test, None, data, device)
            together, waits = read(data.test, net, data, device)
            print(f"{workers} workers: {alone:.0f} img/s alone, {together:.0f} img/s with {args.arch}, "
                  f"which waits {waits:.0%} of the time", flush=True)
            log.write("eval", workers=workers, img_per_s=alone, img_per_s_with_net=together,
                      waits_pct=100 * waits)
    ready = torch.utils.data.TensorDataset(torch.zeros(200, 3, data.size, data.size, dtype=torch.uint8),
                                           torch.zeros(200))
    rate, _ = read(ready, net, data, device)
    log.write("end", img_per_s_net=rate, kB=kB, wall_s=log.seconds(), peak_mib=common.peak_mib())
    print(f"{args.arch} alone: {rate:.0f} img/s; files of {kB:.0f} kB")


def main(args: argparse.Namespace) -> None:
    if args.what == "loader":
        return loader(args)
    device, paper = torch.device("cpu"), dict(gdfq.PAPER)
    log = common.RunLog(Path(args.out), args, device)
    torch.manual_seed(0)
    paper |= dict(epochs=100, iters_per_epoch=1000, warmup_epochs=1, amp=common.has_fast_bf16(device))
    method = gdfq.GDFQ(common.build_model("resnet20", 100), 100, 32, **paper)
    plain = Plain(method)
    method.iteration = method.warmup
    method.calibrate()
    plain.student.load_state_dict(method.student.state_dict())

    def plain_step():
        fused, common.fake_quant = common.fake_quant, plain_fake_quant  # quantizers look it up
        plain.step()
        common.fake_quant = fused

    seconds = {"plain": [], "gdfq.py": []}
    for i in range(args.iterations + 2):
        for name, step in (("plain", plain_step), ("gdfq.py", method.step)):
            t0 = time.perf_counter()
            step()
            if i >= 2:
                seconds[name].append(time.perf_counter() - t0)
    mean_s = {name: statistics.mean(s) for name, s in seconds.items()}
    rate = {name: method.hp.batch_size / s for name, s in mean_s.items()}
    for name in seconds:
        print(f"{name:<8} {mean_s[name]:.3f} s an iteration, {rate[name]:.0f} images/s")
    ratio = rate["gdfq.py"] / rate["plain"]
    log.write("end", s_per_iteration_plain=mean_s["plain"], s_per_iteration=mean_s["gdfq.py"],
              img_per_s_plain=rate["plain"], img_per_s=rate["gdfq.py"], ratio=ratio,
              peak_mib=common.peak_mib())
    print(f"ratio {ratio:.2f}; {common.peak_mib():.0f} MiB")


if __name__ == "__main__":
    common.run(main, parse)
