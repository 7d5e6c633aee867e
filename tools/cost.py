"""What an iteration of GDFQ's published configuration costs, beside the same iteration written straightforwardly.

    python results/gdfq-cost.py            # ResNet-20, 100 classes, batch 200, generator width 128; minutes on a CPU

Straightforward: fp32, NCHW, one torch op a line: mean and variance of each BN input, a quantizer of differentiable ops with a
detached rounding. Same networks, losses, optimizers and batch, in the same process, alternating. The last line is the ratio of
images/s. Nothing is downloaded and no data is needed: time does not depend on the weights' values.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import gdfq  # noqa: E402


def plain_fake_quant(x, lo, hi, bits):
    s, z = common.step_and_zero(lo, hi, bits)
    q = torch.clamp(x / s - z, 0, 2**bits - 1)
    q = q + (torch.round(q) - q).detach()
    return (q + z) * s


class Plain:
    """One iteration: a generator step, then a student step on the same batch."""

    def __init__(self, method: gdfq.GDFQ):
        nchw = dict(memory_format=torch.contiguous_format)
        self.teacher, self.generator, self.student = (copy.deepcopy(net).to(**nchw) for net in (method.teacher, method.generator, method.student))
        for net in (self.teacher, self.student):
            for m in net.modules():
                m._forward_pre_hooks.clear()
        self.seen, self.batch, self.classes = [], method.batch_size, method.num_classes
        for m in self.teacher.modules():
            if isinstance(m, _BatchNorm):
                m.register_forward_pre_hook(lambda m, inputs: self.seen.append((m, inputs[0])))
        self.opt_g = torch.optim.Adam(self.generator.parameters(), 1e-3, (0.5, 0.999))
        self.opt = torch.optim.SGD(self.student.parameters(), 1e-4, 0.9, weight_decay=1e-4, nesterov=True)

    def step(self) -> None:
        y, z = torch.randint(self.classes, (self.batch,)), torch.randn(self.batch, self.generator.latent)
        self.seen.clear()
        x = self.generator(z, y)
        logits = self.teacher(x)
        bns = 0.0
        for m, h in self.seen:
            bns = bns + F.mse_loss(h.mean((0, 2, 3)), m.running_mean) + F.mse_loss(h.var((0, 2, 3), unbiased=False), m.running_var)
        loss = F.cross_entropy(logits, y) + 0.1 * bns / len(self.seen)
        self.opt_g.zero_grad()
        loss.backward()
        self.opt_g.step()
        out = self.student(x.detach())
        loss = F.cross_entropy(out, y) + gdfq.distillation_loss(logits.detach(), out, 20.0, "mean")
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--iterations", type=common.number(int, 1), default=10, help="timed ones of each, after two more to warm up")
    p.add_argument("--out", default="results/gdfq-cost", help="folder for log.jsonl")
    args = p.parse_args()
    device = torch.device("cpu")
    torch.manual_seed(0)
    paper = {k: v for k, v in gdfq.PAPER.items() if k not in ("epochs", "iters_per_epoch", "warmup_epochs")}
    method = gdfq.GDFQ(common.build_model("resnet20", 100), 100, 32, epochs=100, iters_per_epoch=1000, warmup_epochs=1,
                       amp=common.has_fast_bf16(device), device=device, **paper)
    plain = Plain(method)
    method.iteration = method.warmup
    method.calibrate()
    plain.student.load_state_dict(method.student.state_dict())

    def plain_step():
        fused, gdfq.fake_quant = gdfq.fake_quant, plain_fake_quant  # the quantizers look the name up when they run
        plain.step()
        gdfq.fake_quant = fused

    seconds = {"plain": [], "gdfq.py": []}
    for i in range(args.iterations + 2):
        for name, step in (("plain", plain_step), ("gdfq.py", method.step)):
            t0 = time.perf_counter()
            step()
            if i >= 2:
                seconds[name].append(time.perf_counter() - t0)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    log = common.RunLog(Path(args.out))
    log.start(args, device)
    rate = {name: method.batch_size / (sum(s) / len(s)) for name, s in seconds.items()}
    for name, s in seconds.items():
        print(f"{name:<8} {sum(s) / len(s):.3f} s an iteration, {rate[name]:.0f} images/s")
    log.write("end", s_per_iteration_plain=sum(seconds["plain"]) / args.iterations, s_per_iteration=sum(seconds["gdfq.py"]) / args.iterations,
              img_per_s_plain=rate["plain"], img_per_s=rate["gdfq.py"], ratio=rate["gdfq.py"] / rate["plain"], peak_mib=common.peak_mib())
    print(f"ratio {rate['gdfq.py'] / rate['plain']:.2f}; {common.peak_mib():.0f} MiB")


if __name__ == "__main__":
    main()
