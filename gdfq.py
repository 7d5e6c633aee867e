"""GDFQ: quantize a pretrained network to few bits without any data.

    "Generative Low-bitwidth Data Free Quantization", Shoukai Xu, Haokun Li, Bohan Zhuang, Jing Liu,
    Jiezhang Cao, Chuangrun Liang, Mingkui Tan. ECCV 2020, arXiv 2003.03603.

The idea. A pretrained network M knows where its class boundaries are (its logits) and what its training
features looked like (the running mean and variance in every BatchNorm). A generator G learns to make
images that M assigns to a wanted label and whose BatchNorm statistics match the stored ones. The copy Q,
quantized, is fine-tuned on those images to answer as M does. No real image is touched before evaluation.

The algorithm.

    Q <- M with fake-quantized weights and activations
    repeat warm-up times:                 y ~ U{1..C}, z ~ N(0, I)
        G <- G - lr_G * grad [ CE(M(G(z,y)), y) + beta * L_BNS ]
    ranges of Q's activations <- EMA of the ends of generated batches' values, then frozen
    repeat:
        one step of G as above; keep the batch and M's logits in a buffer
        for a few batches x from the buffer, the newest first:
            Q <- Q - lr_Q * grad [ alpha * T^2 * KL(M(x)/T || Q(x)/T) + ce * CE(Q(x), y) ]

Symbols.

    paper      code                          shape           unit        flag
    M, Q, G    teacher, student, generator                               --arch --weights
    x          x                             (B, 3, S, S)    normalised  --batch-size
    y, z       y, z                          (B,), (B, L)                --latent
    k          wbits, abits                  int             bits        --wbits --abits
    a, b       lo, hi                        (), (C_out, 1)  as x        --percentile --ema-momentum
    s, z       s, z                          as lo           as x, int   (see common.py)
    mu, var    mu, var                       (C,) a layer    as x, x^2
    alpha, beta, T  the same                 float                       --alpha --beta --temperature

Protocol: the questions that are otherwise asked in issues.

    Which parameters move?   All of G. In Q: weights, biases, BN gamma and beta.
    Which mode?              G always train. M and Q always eval: "fixed BN statistics".
    Which layers?            Every Conv2d and Linear, first and last included; BN is not folded.
    Which activations?       Behind every call of a ReLU and its kin, one range a tensor. The image, sums
                             and bottlenecks, the pooled feature: only by --quantize-input, -add,
                             -pool, as integer layers need them. Residual operands never.
    Which accuracy?          The last state's, fp32 arithmetic, whole test set; published code prints the
                             best epoch's. A run chooses nothing on test images. The fast recipe's
                             constants were chosen on Fashion-MNIST's, but for the percentile; that and
                             many-classes on train images.

Departures from paper and published code, with the flag that goes back. --recipe paper: D4-8, 10, 12.

    D1  The range EMA is debiased once (common.EMA); published ranges freeze late enough to agree.
    D2  Every range holds 0, and every call of an activation has its own (quantize).
    D3  Ranges are averaged over 30 batches after the warm-up, not over it; published ones of ImageNet
        over epochs 0 to 3 of 50.                                                 --calibration-batches
    D4  Ranges hold 99.98 % of the values, many-classes 99.95 %; all from 6 bits on.  --percentile 100
    D5  The student only distils: KL "batchmean", T = 4.            --kd-reduction --temperature --ce
    D6  Two student steps a generator step, one on a buffered batch.        --student-steps --buffer
    D7  Higher rates, cosine, clipping; the run is 270 times shorter.      --lr --lr-g --schedule --clip
    D8  The generator is half as wide.                                            --g-width 128
    D9  bf16 autocast in training, where the hardware has it.                     --no-amp
    D10 many-classes: the label picks rows of conditional BN at 32 px, too.       --generator embedding
    D11 The straight-through gradient is 0 where an activation is clamped; published: 1, which ends at
        63.63 and not at 63.77, within noise (results/gdfq/parts).
    D12 Weights are rounded so that errors cancel in each kernel and channel.      --rounding nearest

    python gdfq.py                                           # ResNet-20, Fashion-MNIST, W4A4: 3 minutes
    python gdfq.py --arch resnet18 --wbits 4 --abits 4       # pretrains a ResNet-18 first, once
    python gdfq.py --dataset cifar100 --recipe many-classes  # 7 to 21 minutes on a core
    python gdfq.py --dataset cifar100 --recipe paper         # the published settings: days on a CPU
"""

import argparse
import copy
import inspect
import itertools
import math
import operator
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import common
from common import InputError, channel_range, fake_quant, number

# ===== Hyperparameters ==============================================================================

# "Published" is the released code's value; most of them are not in the paper's text.
PAPER = dict(epochs=400, iters_per_epoch=200, warmup_epochs=4, batch_size=200, student_steps=1, buffer=1,
             g_width=128, lr_g=1e-3, lr=1e-4, schedule="step", clip=0.0, ce=1.0, temperature=20.0,
             kd_reduction="mean", percentile=100.0, rounding="nearest")
# With 100 classes an embedded label is hardly found in a few hundred steps: M recognises 2 % of the
# images after 190. Rows of a conditional BN are (99 % after 1,000), if their learning rate is high.
MANY = dict(epochs=40, warmup_epochs=20, generator="conditional-bn", lr_g=6e-3, lr=2e-2, student_steps=1,
            buffer=1, percentile=99.95)
RECIPES = {"fast": {}, "many-classes": MANY, "paper": PAPER,
           "paper-imagenet": PAPER | dict(warmup_epochs=50, batch_size=16, lr=1e-6)}


def build_parser() -> argparse.ArgumentParser:
    p = common.Parser(prog="gdfq.py", description=__doc__.split("\n\n")[0])
    share, positive, bits = number(float, 0, 1), number(float, 0), number(int, 2, 8)
    yes_no = argparse.BooleanOptionalAction
    a = p.add_argument_group("task").add_argument
    a("--arch", default="resnet20", help="resnet20/32/44/56, resnet20x2, torchvision's, or FILE.py:NAME")
    a("--dataset", default="fashion", help="fashion, cifar10, cifar100, imagenet, a folder, a .npz")
    a("--data-dir", default="data", help="where cifar and imagenet lie, or are downloaded to")
    a("--size", type=number(int, 8), help="px at which a folder is read; None: 32, 64 or 224, as fits")
    a("--weights", help="checkpoint; None: weights/<dataset>_<arch>.pt, or torchvision's; none: its own")
    a("--method", default="gdfq", choices=["gdfq", "finetune-real"], help="real images: a bound")
    a("--wbits", type=bits, default=4, help="bits of a weight, 2 to 8")
    a("--abits", type=bits, default=4, help="bits of an activation, 2 to 8")
    a("--first-last-bits", type=bits, help="of these layers' weights; None: --wbits, as published")
    a("--rounding", default="squant", choices=["squant", "nearest"],
      help="of weights; squant: errors cancel in each kernel and channel; published: nearest")
    a("--quantize-input", action=yes_no, default=False, help="the images as well, to 8 bits")
    a("--quantize-add", action=yes_no, default=False, help="sums and bottlenecks that a layer reads")
    a("--quantize-pool", action=yes_no, default=False, help="the pooled feature; published: none")
    a = p.add_argument_group("schedule").add_argument
    a("--recipe", default="fast", choices=list(RECIPES), help="other flags still win")
    a("--epochs", type=number(int, 1), default=10, help="length of the run; published: 400")
    a("--iters-per-epoch", type=number(int, 1), default=30, help="generator steps; published: 200")
    a("--warmup-epochs", type=number(int, 1), default=5, help="G alone; published: 4, ImageNet 50")
    a("--batch-size", type=number(int, 2), default=128, help="of G and Q, a process; published: 200, 16")
    a("--schedule", default="cosine", choices=["cosine", "step"], help="of both rates; published: step")
    a("--milestones", type=number(int, 0), nargs="*", default=[100, 200, 300], help="of --schedule step")
    a("--gamma", type=share, default=0.1, help="factor at each milestone; published: 0.1")
    a = p.add_argument_group("generator").add_argument
    a("--generator", default="auto", choices=["auto", "embedding", "conditional-bn"],
      help="how the label enters; auto: embedding up to 64 px, conditional BN above, as published")
    a("--g-width", type=number(int, 2), default=64, help="channels of G; 128, published, is slower")
    a("--latent", type=number(int, 1), default=100, help="length of the noise vector; published: 100")
    a("--lr-g", type=positive, default=3e-3, help="Adam; published: 1e-3")
    a("--adam-betas", type=number(float, 0, 0.99999), nargs=2, default=[0.5, 0.999], help="as published")
    a("--beta", type=positive, default=0.1, help="weight of the BN-statistics loss; published: 0.1")
    a = p.add_argument_group("student").add_argument
    a("--lr", type=positive, default=1e-2, help="SGD; too high: kd rises. Published: 1e-4, or 1e-6")
    a("--momentum", type=share, default=0.9, help="SGD, Nesterov; published: 0.9")
    a("--weight-decay", type=positive, default=1e-4, help="SGD; published: 1e-4")
    a("--clip", type=positive, default=1.0, help="largest gradient norm; 0, published: none")
    a("--student-steps", type=number(int, 1), default=2, help="a generator step; published: 1")
    a("--buffer", type=number(int, 1), default=100, help="generated batches kept; published: 1")
    a("--fmix", type=share, default=0.0, help="share of Q's images mixed of two; published: none")
    a("--alpha", type=positive, default=1.0, help="weight of the distillation; published: 1")
    a("--ce", type=positive, default=0.0, help="weight of CE with the sampled label; published: 1")
    a("--temperature", type=number(float, 1e-3), default=4.0, help="T of distillation; published: 20")
    a("--kd-reduction", default="batchmean", choices=["batchmean", "mean"], help="published: mean")
    a("--percentile", type=number(float, 50, 100), help="kept in range; None: see usual_percentile")
    a("--ema-momentum", type=number(float, 0, 0.99999), default=0.9, help="of ranges; published: 0.9")
    a("--calibration-batches", type=number(int, 1), default=30, help="that ranges are averaged over")
    a = p.add_argument_group("run").add_argument
    a("--out", help="folder of log, picture, quantized.pt; None: runs/gdfq/<flags>/seed0")
    a("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights of G, noise, labels, draws")
    a("--seeds", type=number(int, 0, 2**63 - 1), nargs="+", help="a run and a folder each; None: --seed")
    a("--device", default="auto", help="auto, cpu, cuda, mps")
    a("--workers", type=number(int, 0, 256), help="that decode a folder's images; None: 1 to 8")
    a("--amp", action=yes_no, help="bf16 autocast in training; None: where the hardware has it")
    a("--resume", action=yes_no, default=False, help="from the last checkpoint; not finetune-real")
    a("--checkpoint-every", type=number(int, 1), default=5, help="epochs between checkpoints")
    a("--eval-every", type=number(int, 0), default=0, help="epochs, for curves; 0: only at the end")
    return p


# ===== Equations ====================================================================================


def bn_statistics_loss(statistics: dict[_BatchNorm, tuple[Tensor, Tensor]]) -> Tensor:
    """L_BNS = mean over layers of [ mean_c (mu_c - mu_hat_c)^2 + mean_c (var_c - var_hat_c)^2 ].

    statistics: layer -> mean and biased variance (C,), (C,) of its input; the hats are the stored ones.
    Scalar, in the units of the features; 0 where they match.
    """
    loss = 0.0
    for bn, (mu, var) in statistics.items():
        loss = loss + F.mse_loss(mu, bn.running_mean) + F.mse_loss(var, bn.running_var)
    return loss / len(statistics)


def distillation_loss(teacher_logits: Tensor, student_logits: Tensor, T: float, how: str) -> Tensor:
    """T^2 * KL(softmax(M(x)/T) || softmax(Q(x)/T)).  (B, C), (B, C) -> scalar, nats.

    "batchmean" sums over classes and averages over images: the textbook form. "mean" averages over both:
    published code's, whose distillation all but vanishes beside the cross-entropy at 1000 classes.
    """
    p, q = F.log_softmax(teacher_logits / T, 1), F.log_softmax(student_logits / T, 1)
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    # ABLATE: the published loss, --kd-reduction mean --ce 1 --temperature 20, ends at 60.19 and not at
    # 66.19 (CIFAR-100, W4A4, many-classes; results/gdfq/ablation).
    return T**2 * (kl if how == "batchmean" else kl / p.shape[1])


# ===== Model surgery ================================================================================

SOFT = (nn.MultiheadAttention, nn.Softmin, nn.Softmax, nn.Softmax2d, nn.LogSoftmax)
ACTIVATIONS = tuple(t for t in vars(nn.modules.activation).values() if isinstance(t, type)
                    and issubclass(t, nn.Module) and t not in (nn.Module, *SOFT))
NAMES = ("relu relu_ relu6 hardtanh leaky_relu leaky_relu_ prelu rrelu elu elu_ celu selu silu mish glu "
         "hardswish gelu softplus softsign tanh tanhshrink hardshrink softshrink sigmoid hardsigmoid "
         "logsigmoid threshold clamp clamp_ clip").split()
CALLS = {getattr(of, name) for of in (torch, F) for name in NAMES if hasattr(of, name)} | set(NAMES)
GATES = (nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
# Nonlinear, or a product of two activations, and without a range: named, where a network has them.
IN_FLOAT = set("softmax matmul bmm einsum scaled_dot_product_attention exp log abs pow square erf "
               "maximum where".split())


class Tracer(torch.fx.Tracer):
    """torch.fx's, which would go into subclasses of Conv2d and Linear, and lose their weights there."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.Linear)) or super().is_leaf_module(m, name)

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if m not in self.submodule_paths:  # nn.ReLU()(x) inside a forward: it has no state
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def trace(model: nn.Module) -> torch.fx.GraphModule:
    """The graph of a copy of the model, in eval mode. Raises InputError with torch.fx's own reason."""
    model, tracer = common.copy_of(model).eval(), Tracer()
    parameters = inspect.signature(model.forward).parameters.values()
    fixed = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        return torch.fx.GraphModule(model, tracer.trace(model, fixed or None))
    except Exception as e:
        raise InputError(f"torch.fx cannot trace {type(model).__name__}: {common.reason(e)}") from None


def kind_of(q: torch.fx.GraphModule, node: torch.fx.Node):
    """What a node calls: the class of a module, a function, the name of a method."""
    return type(q.get_submodule(node.target)) if node.op == "call_module" else node.target


def activation_calls(q: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The calls whose result gets a range: nonlinearities, of a gate, sigmoid(x) * y, the product."""
    found = []
    for node in q.graph.nodes:
        kind = kind_of(q, node)
        is_call = node.op in ("call_function", "call_method") and kind in CALLS
        if is_call or node.op == "call_module" and issubclass(kind, ACTIVATIONS):
            products = [user for user in node.users if user.target in PRODUCTS]
            found += products if kind in GATES and len(products) == len(node.users) else [node]
    return list(dict.fromkeys(found))


# What moves or selects values and makes no new ones: a quantized tensor stays quantized.
MOVES = (nn.Flatten, nn.Dropout, nn.Dropout2d, nn.Identity, nn.MaxPool2d, torch.flatten, F.dropout,
         F.max_pool2d, "flatten", "view", "reshape", "permute", "transpose", "contiguous")
POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean, "mean")


def layer_inputs(q: torch.fx.GraphModule) -> list[tuple[str, torch.fx.Node]]:
    """What each call of a Conv2d or Linear reads: (layer, the node that made its values), in order."""
    found = []
    for node in q.graph.nodes:
        if node.op == "call_module" and isinstance(q.get_submodule(node.target), (nn.Conv2d, nn.Linear)):
            source = node.all_input_nodes[0]
            while source.op != "placeholder" and kind_of(q, source) in MOVES:
                source = source.all_input_nodes[0]
            found.append((node.target, source))
    return found


class WeightQuantizer(nn.Module):
    """Weight (C_out, ...) -> fake-quantized weight; min and max per output channel, in every forward."""

    def __init__(self, bits: int, rounding: str):
        super().__init__()
        self.bits, self.rounding = bits, rounding

    @torch.no_grad()
    def codes(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The integers in [0, 2^bits - 1], shape of w; step and zero of each channel (C_out, 1, ...)."""
        (s, z), last = common.step_and_zero(*channel_range(w), self.bits), 2**self.bits - 1
        code = (torch.round(w / s) - z).clamp_(0, last)
        if self.rounding == "squant":
            for axis in (2, 1) if w[0, 0].numel() > 1 else (1,):  # each kernel, then each output channel
                e = w / s - z - code
                code += flips(e.flatten(axis), code.flatten(axis), last).view_as(code)
        return code, s, z

    def forward(self, w: Tensor) -> Tensor:
        code, s, z = self.codes(w)
        return (code + z) * s + (w - w.detach())  # straight through: to the bit the first, of gradient 1


def flips(e: Tensor, code: Tensor, last: int) -> Tensor:
    """-1, 0 or 1 for each code in 0..last, whose rounding errors are e (..., n), in steps.

    Added to the codes they leave errors whose sum in a row is within half a step of 0, if so many codes
    lie on that side and not at that end. Those nearest to their other neighbour move.
    """
    # What a layer reads has no mean of 0, so errors that add up shift a channel of its output, in each
    # image by another value, which no bias mends. After SQuant (Guo et al. 2022), in a simpler form.
    # ABLATE: --rounding nearest, W3A3 on CIFAR-100: 32.88 and not 50.81 before training, 56.79 and not
    # 58.05 after it; W4A4 60.31 and 63.88, 65.65 and 66.24 (results/gdfq.md).
    k = e.sum(-1, keepdim=True).round()
    gain = (e * k.sign()).masked_fill(code == torch.where(k > 0, float(last), 0.0), 0)
    most = min(e.shape[-1], int(k.abs().max().nan_to_num(0)))
    gain, at = gain.topk(most, -1)
    moves = (torch.arange(most, device=e.device) < k.abs()) & (gain > 0)
    return torch.zeros_like(e).scatter_(-1, at, k.sign() * moves)


def usual_percentile(abits: int) -> float:
    """99.98 up to 5 bits; all values above: a fine step costs less than what clipping cuts off."""
    # On train images of Fashion-MNIST, calibrated on noise, 4 bits: 20.9 % error of the logits with it,
    # 26.5 % without. 6 bits: 18.4 % with, 4.7 % without; 8 bits: 18.1 % and 3.6 %.
    return 99.98 if abits <= 5 else 100.0


def clipped_range(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """(lo, hi), fp32 scalars: `percentile` % of x lie below hi, as many above lo. 100: min and max."""
    # One outlier sets everybody's step. At 4 bits and with nearest rounding clipping is worth more than
    # all the training: +1.3 and +0.3 points on Fashion-MNIST, +17 and +5.3 on CIFAR-100.
    # ABLATE: --percentile 100, the paper's, ends at 63.37 and not at 66.19 (results/gdfq/ablation).
    if percentile == 100:
        return x.amin().float(), x.amax().float()
    x = x.flatten()
    if len(x) > 100_000:  # a fixed random sample stands for the rest, since quantile sorts
        pick = torch.randint(len(x), (100_000,), generator=torch.Generator().manual_seed(0))
        x = x[pick.to(x.device)]
    ends = torch.tensor([1 - percentile / 100, percentile / 100], device=x.device)
    lo, hi = torch.quantile(x.float(), ends)
    return lo, hi


class ActivationQuantizer(nn.Module):
    """Fake-quantizes with one range for the tensor, moved while `observing` by the EMA of its ends."""

    def __init__(self, bits: int, momentum: float, percentile: float):
        super().__init__()
        self.bits, self.momentum, self.percentile = bits, momentum, percentile
        self.emas = None  # of lo and hi, while observing
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.emas:
            ends = clipped_range(x.detach(), self.percentile)
            for kept, ema, end in zip((self.lo, self.hi), self.emas, ends):
                kept.copy_(ema.update(end))
        return fake_quant(x, self.lo, self.hi, self.bits)


@contextmanager
def observing(q: nn.Module):
    """Within it, every forward of q moves its activation ranges, which start afresh."""
    quantizers = [m for m in q.modules() if isinstance(m, ActivationQuantizer)]
    for m in quantizers:
        m.emas = common.EMA(m.momentum), common.EMA(m.momentum)
    yield
    for m in quantizers:
        m.emas = None


def quantize(model: nn.Module, example: Tensor, wbits: int, abits: int,
             first_last_bits: int | None = None, percentile: float | None = None,
             ema_momentum: float = 0.9, also: list[str] = (), rounding: str = "squant") -> nn.Module:
    """A fake-quantized copy of `model` in eval mode; `model` itself is not touched.

    Every Conv2d and Linear gets a WeightQuantizer (a parametrization of its `weight`), every activation
    call an ActivationQuantizer, with a range from `example` (B, ...), normalised as the model expects;
    `also`: "input", "add", "pool", where a layer reads what no activation made. Raises InputError for
    bits outside 2..8, another rounding, and a model that torch.fx cannot trace.
    """
    if rounding not in ("squant", "nearest"):
        raise InputError(f"rounding {rounding!r}: expected squant or nearest")
    if any(bits not in range(2, 9) for bits in (wbits, abits, first_last_bits or 8)):
        raise InputError(f"W{wbits}A{abits}, first and last {first_last_bits}: expected 2 to 8 bits")
    percentile = usual_percentile(abits) if percentile is None else percentile
    q, layers, n = trace(model), {}, itertools.count()

    def insert(node: torch.fx.Node, bits: int, percentile: float) -> None:
        name = f"act_quant{next(n)}"
        q.add_submodule(name, ActivationQuantizer(bits, ema_momentum, percentile))
        with q.graph.inserting_after(node):
            quantized = q.graph.call_module(name, (node,))
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)

    # torchvision's residual blocks call ONE nn.ReLU module twice. Swapping modules, as published code
    # does, gives both places one range; walking the graph gives every call its own.
    for node in activation_calls(q):
        insert(node, abits, percentile)
    for node in dict.fromkeys(source for _, source in (layer_inputs(q) if also else ())):
        place = "pool" if kind_of(q, node) in POOLS else "input" if node.op == "placeholder" else "add"
        if place in also and kind_of(q, node) is not ActivationQuantizer:
            insert(node, *((8, 100.0) if place == "input" else (abits, percentile)))  # a camera's bits
    q.recompile()
    originals = dict(model.named_modules())
    for node in q.graph.nodes:
        # Attention takes the weight of a Linear without calling it: then the graph has the weight alone.
        name = node.target.removesuffix(".weight") if node.op in ("call_module", "get_attr") else ""
        if isinstance(originals.get(name), (nn.Conv2d, nn.Linear)):
            layers[name] = q.get_submodule(name)
    for i, (name, layer) in enumerate(layers.items()):
        if layer._parameters.get("weight") is None:
            raise InputError(f"{name}: its weight is made by a parametrization; remove that first")
        bits = first_last_bits if first_last_bits and i in (0, len(layers) - 1) else wbits
        parametrize.register_parametrization(layer, "weight", WeightQuantizer(bits, rounding))
    q.meta["bits"] = {"wbits": wbits, "abits": abits, "first_last_bits": first_last_bits,
                      "also": list(also)}
    with observing(q):
        common.check_network(q.to(example.device), example)
    left = [n for n, p in q.named_parameters() if p.ndim > 1 and not n.endswith(".weight.original")]
    names = {getattr(kind, "__name__", kind).lower() for kind in (kind_of(q, n) for n in q.graph.nodes)}
    if left or names & IN_FLOAT:
        share = sum(q.get_parameter(n).numel() for n in left) / sum(p.numel() for p in q.parameters())
        named = [*left[:3], *["and others"] * (len(left) > 3), *sorted(names & IN_FLOAT)]
        warnings.warn(f"{share:.0%} of the parameters, besides biases and norm layers, stay in fp32, "
                      f"as does what no quantizer knows: {', '.join(named)}")
    return q


def also(hp: argparse.Namespace) -> list[str]:
    asked = {"input": hp.quantize_input, "add": hp.quantize_add, "pool": hp.quantize_pool}
    return [place for place, on in asked.items() if on]


def record_bn_statistics(model: nn.Module) -> dict[_BatchNorm, tuple[Tensor, Tensor]]:
    """A dict that holds, after each forward, mean and variance (C,), (C,) of each BatchNorm's input."""
    seen = {}
    for m in model.modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            # In a hook, not after the forward: the input is still in the cache, and need not be kept.
            m.register_forward_pre_hook(
                lambda m, inputs: seen.__setitem__(m, common.BatchMoments.apply(inputs[0])))
    return seen


# ===== Method =======================================================================================


class ConditionalBN(nn.Module):
    """BatchNorm with one row of weight and bias a class.  (B, C, H, W), (B,) -> (B, C, H, W)"""

    def __init__(self, num_classes: int, channels: int, eps: float):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.weight = nn.Parameter(torch.ones(num_classes, channels))
        self.bias = nn.Parameter(torch.zeros(num_classes, channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = self.weight[y][..., None, None], self.bias[y][..., None, None]
        return torch.addcmul(bias, self.bn(x), weight)


class Generator(nn.Module):
    """Noise z (B, L) and label y (B,) -> images (B, 3, S, S), normalised."""

    def __init__(self, num_classes: int, image_size: int, latent: int, width: int, kind: str):
        super().__init__()
        self.kind, self.latent, self.side, self.width = kind, latent, image_size // 4, width
        self.fc = nn.Linear(latent, width * self.side**2)
        # Published: at 32 px the label's embedding multiplies the noise; on ImageNet the noise alone
        # enters, and the label picks the rows of three conditional BatchNorms.
        # ABLATE: --generator embedding in many-classes ends at 65.01 and not at 66.19 (gdfq/ablation).
        if kind == "embedding":
            self.embedding = nn.Embedding(num_classes, latent)
            bn = lambda channels, eps: nn.BatchNorm2d(channels, eps=eps)
        else:
            bn = lambda channels, eps: ConditionalBN(num_classes, channels, eps)
        # eps = 0.8 is what published code has; it reads as a momentum that landed on eps. Keep it: the
        # smoothing is part of the method that was measured.
        self.bn0 = bn(width, 1e-5)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1), bn(width, 0.8)
        self.conv2, self.bn2 = nn.Conv2d(width, width // 2, 3, 1, 1), bn(width // 2, 0.8)
        # Without parameters: a batch always has the mean and the scale of normalised images.
        self.conv3, self.bn3 = nn.Conv2d(width // 2, 3, 3, 1, 1), nn.BatchNorm2d(3, affine=False)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        embedding = self.kind == "embedding"
        label = () if embedding else (y,)
        x = self.fc(self.embedding(y) * z if embedding else z)
        x = x.view(-1, self.width, self.side, self.side).contiguous(memory_format=torch.channels_last)
        x = F.interpolate(self.bn0(x, *label), scale_factor=2)  # (B, W, S/2, S/2)
        x = F.leaky_relu(self.bn1(self.conv1(x), *label), 0.2)
        x = F.interpolate(x, scale_factor=2)  # (B, W, S, S)
        x = F.leaky_relu(self.bn2(self.conv2(x), *label), 0.2)  # (B, W/2, S, S)
        return self.bn3(torch.tanh(self.conv3(x)))  # (B, 3, S, S)


class GDFQ:
    """Teacher M, generator G and student Q, and one `step` of training them.

        method = GDFQ(my_net, num_classes=10, image_size=32, wbits=4, abits=4)  # keywords are the flags
        for _ in range(method.iterations):
            method.step()
        method.student      # fake-quantized nn.Module in eval mode; `pack` makes it small

    `model` maps normalised images (B, 3, S, S) to logits (B, C) and is copied, not touched. A recipe:
    **RECIPES["many-classes"], from 6 bits on without its percentile; bf16: amp=True. Raises InputError
    for a model without BatchNorm, or sides not of 4 n px.
    """

    STATE = ("generator", "student", "opt_g", "opt", "rng", "iteration", "buffer")

    def __init__(self, model: nn.Module, num_classes: int, image_size: int, hp=None, **changes):
        self.hp = hp = common.defaults(build_parser, hp, **changes)
        if hp.warmup_epochs >= hp.epochs:
            raise InputError(f"--warmup-epochs {hp.warmup_epochs}: not below --epochs {hp.epochs}")
        if not any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules()):
            raise InputError("the network has no BatchNorm, and the images are learned from statistics "
                             "stored there: choose another --arch")
        if image_size % 4 or image_size < 8:
            raise InputError(f"images of {image_size} px: the generator's sides are multiples of 4")
        self.num_classes, self.device = num_classes, next(model.parameters()).device
        self.warmup = hp.warmup_epochs * hp.iters_per_epoch
        self.iterations = hp.epochs * hp.iters_per_epoch
        self.iteration, self.buffer = 0, []  # of (images, labels, M's logits)
        # All noise is drawn on the CPU, so that a seed means the same on every device. Of torchrun's
        # processes each draws its own.
        offset = 1_000_003 * common.rank_and_world()[0]  # the generator reads 32 bits of its seed
        self.rng = torch.Generator().manual_seed((hp.seed + offset) % 2**63)

        self.teacher = common.copy_of(model).eval().requires_grad_(False)
        auto = "embedding" if image_size <= 64 else "conditional-bn"
        kind = auto if hp.generator == "auto" else hp.generator
        with common.seeded(hp.seed):  # the caller's random numbers are not ours to reset
            self.generator = Generator(num_classes, image_size, hp.latent, hp.g_width, kind)
        for net in (self.teacher, self.generator):
            net.to(self.device, memory_format=torch.channels_last)
        # Gaussian noise gives Q's activations first ranges; `calibrate` replaces them.
        noise = torch.randn(min(hp.batch_size, 64), 3, image_size, image_size, generator=self.rng)
        bits = hp.wbits, hp.abits, hp.first_last_bits
        noise = noise.to(self.device)
        common.check_network(self.teacher, noise, num_classes)
        self.student = quantize(self.teacher, noise, *bits, hp.percentile, hp.ema_momentum, also(hp),
                                hp.rounding)
        self.student.requires_grad_(True)
        self.share_ranges()
        # Only now: recorded before the copy, Q would carry the hooks, too.
        self.bn_statistics = record_bn_statistics(self.teacher)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), hp.lr_g, hp.adam_betas, fused=True)
        self.opt = torch.optim.SGD(self.student.parameters(), hp.lr, hp.momentum, fused=True,
                                   weight_decay=hp.weight_decay, nesterov=hp.momentum > 0)

    def set_learning_rates(self) -> None:
        """cosine: from the end of the warm-up down to 0. step: times gamma at each milestone epoch."""
        hp = self.hp
        if hp.schedule == "cosine":
            t = max(0, self.iteration - self.warmup) / (self.iterations - self.warmup)
            factor = 0.5 * (1 + math.cos(math.pi * t))
        else:
            factor = hp.gamma ** sum(self.iteration >= m * hp.iters_per_epoch for m in hp.milestones)
        self.opt.param_groups[0]["lr"] = hp.lr * factor
        self.opt_g.param_groups[0]["lr"] = hp.lr_g * factor

    def sample(self, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Generated images (B, 3, S, S) for the labels y (B,), or for drawn ones; and the labels."""
        if y is None:
            y = torch.randint(self.num_classes, (self.hp.batch_size,), generator=self.rng)
        y, z = y.to(self.device), torch.randn(len(y), self.hp.latent, generator=self.rng).to(self.device)
        with common.autocast(self.device, self.hp.amp):
            return self.generator(z, y).float().contiguous(memory_format=torch.channels_last), y

    def generator_step(self) -> tuple[Tensor, Tensor, Tensor, dict]:
        """L_G = CE(M(x), y) + beta * L_BNS, one Adam step. Returns its x, y and M's logits, detached."""
        x, y = self.sample()
        with common.autocast(self.device, self.hp.amp):
            logits = self.teacher(x).float()
        # Under torchrun L_BNS is of this process's batch, as on one GPU, and gradients are averaged.
        # CE alone finds images that M calls y and that look like nothing M was trained on; L_BNS asks of
        # every layer that they look like it.
        # ABLATE: without L_BNS (--beta 0) 55.66 and not 63.77, without CE 63.45 (CIFAR-100, half size;
        # results/gdfq/parts).
        ce, bns = F.cross_entropy(logits, y), bn_statistics_loss(self.bn_statistics)
        loss = ce + self.hp.beta * bns
        what = f"loss_g at iteration {self.iteration}"
        common.descend(self.opt_g, loss, what, "--lr-g", together=True)
        self.bn_statistics.clear()  # or the graph of this batch lives on
        acc_m_pct = 100 * (logits.argmax(1) == y).float().mean().item()
        stats = {"loss_g": loss.item(), "ce": ce.item(), "bns": bns.item(), "acc_m_pct": acc_m_pct}
        return x.detach(), y, logits.detach(), stats

    def student_step(self, x: Tensor, y: Tensor, teacher_logits: Tensor) -> dict:
        """L_Q = alpha * T^2 * KL(M(x)/T || Q(x)/T) + ce * CE(Q(x), y), one SGD step."""
        # Q is in eval mode: the paper's "fixed BN statistics", worth +1.02 points on CIFAR-10, +2.79 on
        # CIFAR-100. Gamma and beta do learn.
        # ABLATE: self.student.train() here lets the statistics follow the generated images: 65.93 and
        # not 92.77 (W3A3 on Fashion-MNIST, seed 0, fp32; results/gdfq/trials/student-train-mode).
        hp = self.hp
        with common.autocast(self.device, hp.amp):
            logits = self.student(x).float()
        kd = distillation_loss(teacher_logits, logits, hp.temperature, hp.kd_reduction)
        loss = hp.alpha * kd + (hp.ce * F.cross_entropy(logits, y) if hp.ce else 0.0)
        common.descend(self.opt, loss, f"loss_q at iteration {self.iteration}", "--lr", hp.clip,
                       together=True)
        agree = (logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
        return {"loss_q": loss.item(), "kd": kd.item(), "agree_pct": 100 * agree.item()}

    @torch.no_grad()
    def calibrate(self, images=None) -> None:
        """Activation ranges of Q from `images`, batch by batch, or from generated ones; then frozen."""
        # Published code watches every batch of the warm-up. Its EMA of momentum 0.9 forgets: what lies
        # more than 30 batches back weighs 4 % in all. So 30 batches of the warmed-up generator do.
        with observing(self.student), common.autocast(self.device, self.hp.amp):
            for x in images or (self.sample()[0] for _ in range(self.hp.calibration_batches)):
                self.student(x)
        self.share_ranges()

    def share_ranges(self) -> None:
        """One range a tensor for all of torchrun's processes: the mean of theirs."""
        quantizers = [m for m in self.student.modules() if isinstance(m, ActivationQuantizer)]
        common.average([end for m in quantizers for end in (m.lo, m.hi)])

    def step(self, real: Iterator[tuple[Tensor, Tensor]] | None = None) -> dict:
        """One iteration: a generator step and, after the warm-up, `student_steps` student steps.

        `real`, endless (images, labels), takes the generator's place: the upper bound of finetune-real.
        """
        self.set_learning_rates()
        hp, learns, stats = self.hp, self.iteration >= self.warmup, {}
        # G never stops learning: each iteration brings Q images that it has not seen.
        if real is None:
            x, y, logits, stats = self.generator_step()
            if learns:
                # Under autocast x holds bf16 values anyway: half the memory for nothing.
                self.buffer.append((x.to(torch.bfloat16) if hp.amp else x, y, logits))
                if len(self.buffer) > hp.buffer:
                    self.buffer.pop(self.draw(hp.buffer))  # any but the newest
        for i in range(hp.student_steps if learns else 0):
            if real is None:
                # ABLATE: --student-steps 2 --buffer 100 in many-classes: 66.00 and not 66.19, more time.
                batch = self.buffer[-1 if i == 0 else self.draw(len(self.buffer))]
                x, y, logits = (t.to(self.device) for t in batch)
                x, y, logits = self.mix(x.float(), y, logits)
            else:
                x, y = next(real)
                with torch.no_grad(), common.autocast(self.device, hp.amp):
                    logits = self.teacher(x).float()
            stats |= self.student_step(x, y, logits)
        self.iteration += 1
        if self.iteration == self.warmup:
            self.calibrate()
        return stats

    @torch.no_grad()
    def mix(self, x: Tensor, y: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of which --fmix have become two images each, either side of a smooth random line.

        M is asked about those anew, and their label is its answer. After FMix (Harris et al. 2020).
        """
        # A generated image is one texture from edge to edge; in a photograph things lie before others.
        # ABLATE: --fmix 0.5, CIFAR-100: W3A3 ends at 58.65 and not at 58.05, W4A4 gains nothing
        # (results/gdfq.md, "Mixed images").
        n = math.ceil(self.hp.fmix * len(x))
        if n == 0:
            return x, y, logits
        coarse = torch.randn(n, 1, 3, 3, generator=self.rng)
        first = (F.interpolate(coarse, size=x.shape[2:], mode="bicubic") > 0).to(self.device)
        x = torch.cat([torch.where(first, x[:n], x[:n].roll(1, 0)), x[n:]])
        with common.autocast(self.device, self.hp.amp):
            asked = self.teacher(x[:n].contiguous(memory_format=torch.channels_last)).float()
        return x, torch.cat([asked.argmax(1), y[n:]]), torch.cat([asked, logits[n:]])

    def draw(self, n: int) -> int:
        # Of the run's own numbers, so that a resumed run draws the same batches.
        return int(torch.randint(n, (), generator=self.rng))


# ===== Evaluation and figures =======================================================================


def quantized_layers(q: nn.Module) -> list[nn.Module]:
    return [m for m in q.modules() if parametrize.is_parametrized(m, "weight")]


def float_state(q: nn.Module) -> list[Tensor]:
    """What stays fp32 in the packed file: biases, BN affine and statistics, activation ranges."""
    named = q.state_dict(keep_vars=True).items()
    return [t for name, t in named if t.is_floating_point() and not name.endswith("weight.original")]


@torch.no_grad()
def pack(q: nn.Module) -> dict:
    """The integers that a device would store, as four flat tensors; tools/deploy.py reads them back.

    codes   uint8, wbits a weight: 4-bit codes lie two in a byte
    steps   fp32, one s an output channel;  zeros  uint8, one -z an output channel
    floats  fp32, float_state
    and wbits, abits, first_last_bits, also, as `quantize` takes them
    """
    codes, steps, zeros, floats = [], [], [], [t.detach().cpu().flatten() for t in float_state(q)]
    for layer in quantized_layers(q):
        quantizer = layer.parametrizations.weight[0]
        code, s, z = quantizer.codes(layer.parametrizations.weight.original)
        codes.append(common.pack_bits(code.to(torch.uint8), quantizer.bits))
        steps.append(s.flatten().cpu())
        zeros.append((-z).flatten().to(torch.uint8).cpu())
    parts = {"codes": codes, "steps": steps, "zeros": zeros, "floats": floats}
    return {k: torch.cat(v) for k, v in parts.items()} | q.meta["bits"]


@torch.no_grad()
def bn_gap(method: GDFQ) -> list[float]:
    """How far a generated batch's statistics lie from the stored ones, a number a BN layer, no unit:

        gap = mean_c [ ((mu_c - mu_hat_c)^2 + (sigma_c - sigma_hat_c)^2) / sigma_hat_c^2 ]
    """
    # L_BNS has the units of the features, so that its layers cannot be compared; these can.
    rng = method.rng.get_state()
    method.teacher(method.sample()[0])
    method.rng.set_state(rng)  # the run's own numbers stay as they would have been
    gaps = []
    for bn, (mu, var) in method.bn_statistics.items():
        var_hat = bn.running_var + bn.eps
        gap = ((mu - bn.running_mean)**2 + (var.sqrt() - var_hat.sqrt())**2) / var_hat
        gaps.append(gap.mean().item())
    return gaps


@torch.no_grad()
def save_grid(method: GDFQ, data: common.Data, path: Path, per_class: int = 10) -> None:
    """A labelled grid of generated images, one class a row; of many classes, evenly spaced ones."""
    from PIL import ImageDraw
    from torchvision.transforms.v2.functional import to_pil_image
    from torchvision.utils import make_grid

    C, tile = len(data.classes), max(data.size, 48)
    shown = torch.linspace(0, C - 1, min(C, 20 if data.size <= 64 else 4)).round().long()
    x = method.sample(shown.repeat_interleave(per_class))[0].cpu()  # one batch of G
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    x = F.interpolate((x * std + mean).clamp(0, 1), size=tile)
    picture = to_pil_image(F.pad(make_grid(x, per_class, 2, pad_value=1.0), (120, 0), value=1.0))
    for row, c in enumerate(shown.tolist()):
        at = (6, row * (tile + 2) + tile // 2 - 4)
        ImageDraw.Draw(picture).text(at, str(data.classes[c])[:18], "black")
    picture.save(path)


def estimate(method: GDFQ, data: common.Data) -> str:
    """What a whole run takes, by one step of each network; the method is then as it was before."""
    hp, before, took = method.hp, copy.deepcopy(common.state_of(method)), []
    x = torch.zeros(50, 3, data.size, data.size, device=method.device)
    with torch.no_grad():
        images, labels = method.sample()
        logits = method.teacher(images)
    for run in (method.generator_step, lambda: method.student_step(*method.mix(images, labels, logits)),
                lambda: method.teacher(x).sum().item()):
        times = []
        for _ in range(2 if data.size <= 64 else 1):  # the first one also makes room
            t0 = time.time()
            run()
            times.append(time.time() - t0)
        took.append(min(times))
    common.restored(method, before)
    evaluations = took[2] * len(data.test) / 50 * 5
    student = hp.student_steps * (method.iterations - method.warmup) + hp.calibration_batches
    whole_s = took[0] * method.iterations + took[1] * student + evaluations
    return (f"about {common.duration(whole_s)}, by a first step: {took[0]:.2f} s of G, {took[1]:.2f} s "
            f"of Q, {common.peak_mib():.0f} MiB")


def print_table(title: str, results: dict, args: argparse.Namespace, sizes: tuple[int, int]) -> None:
    """Rows: what was done. Columns: top-1, its drop in points, what the row added, the size."""
    kept = f"PTQ, {args.rounding}, {args.percentile:g} % of"
    rows = {"acc_fp_pct": "full precision", "acc_ptq_noise_pct": "PTQ, min and max of noise",
            "acc_ptq_noise_clipped_pct": f"{kept} noise", "acc_ptq_gen_pct": f"{kept} generated images",
            "acc_ptq_real_pct": f"{kept} real images",
            "acc_pct": "GDFQ" if args.method == "gdfq" else "fine-tuned on real images"}
    above = None
    print(f"\n{title:<44}top-1 %    drop   added      kB")
    for key in (key for key in rows if key in results):
        acc, added = results[key], f"{results[key] - above:+8.2f}" if above else 8 * " "
        drop, kB, above = results["acc_fp_pct"] - acc, sizes[key != "acc_fp_pct"] / 1000, acc
        print(f"{rows[key]:<44}{acc:>7.2f}{drop:>8.2f}{added}{kB:>8.0f}")


# ===== Run ==========================================================================================


def real_batches(data: common.Data, args: argparse.Namespace, rng: torch.Generator, device) -> Iterator:
    """--method finetune-real: train images and labels without end, normalised, cropped and flipped."""
    if len(data.train or ()) < args.batch_size:
        raise InputError(f"--method finetune-real: only {len(data.train or ())} train images, and "
                         f"--batch-size is {args.batch_size}; a folder needs train/ beside val/")
    while True:
        for x, y in common.batches(data.train, args.batch_size, rng, augment=True, drop_last=True):
            yield common.to_input(x, data.mean, data.std, device), y.to(device)


def untrained(model: nn.Module, size: int, args, device) -> Iterator[tuple[str, nn.Module]]:
    """The do-nothing row, the paper's quantizer with ranges from noise; then ours with them."""
    g = torch.Generator().manual_seed(args.seed)
    n = 256 if size <= 64 else args.batch_size  # which fits, or G would not
    noise = torch.randn(n, 3, size, size, generator=g).to(device)
    bits, paper = (args.wbits, args.abits, args.first_last_bits), (100.0, "nearest")
    for name, how in {"noise": paper, "noise_clipped": (args.percentile, args.rounding)}.items():
        if name == "noise" or how != paper:
            q = quantize(model, noise, *bits, how[0], also=also(args), rounding=how[1])
            yield f"acc_ptq_{name}_pct", q


def out_folder(args: argparse.Namespace, data: common.Data) -> Path:
    kind = "" if args.recipe == "fast" else f"_{args.recipe}"
    kind += "_real" * (args.method == "finetune-real")
    name = f"{data.name}_{common.short_name(args.arch)}_w{args.wbits}a{args.abits}{kind}"
    told = "dataset arch wbits abits recipe method seed"
    usual = parse(["--recipe", args.recipe, "--abits", f"{args.abits}"])
    return common.check_out(Path(args.out or common.default_out("gdfq", name, args, usual, told)), args)


def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args.device, several=True)
    rank, world = common.rank_and_world()
    args.amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data, real = common.load_data(args.dataset, args.data_dir, args.size), args.method == "finetune-real"
    C, out = len(data.classes), out_folder(args, data)
    # Once without weights: every check comes before minutes go into pretraining.
    GDFQ(common.build_model(args.arch, C), C, data.size, args)
    model, data, source = common.find_weights(args.arch, args.dataset, data, args.weights, device)
    args.weights_crc = common.crc_of(model)  # --resume with another file of the same name is refused
    method = GDFQ(model.to(device, memory_format=torch.channels_last), C, data.size, args)
    print(f"weights: {source}\ndevice: {common.device_name(device)}, {torch.get_num_threads()} threads, "
          f"{'bf16' if args.amp else 'fp32'}; recipe: {args.recipe} {RECIPES[args.recipe] or ''}")
    stream = real_batches(data, args, method.rng, device) if real else None
    if real:
        method.iteration = method.warmup  # nothing to warm up
        method.calibrate(next(stream)[0] for _ in range(args.calibration_batches))

    results, before_s = {}, 0.0
    if state := common.load_checkpoint(common.checkpoint_file(out), args):
        common.restored(method, state["method"])
        results, before_s = state["results"], state["wall_s"]
        print(f"resuming at iteration {method.iteration}")
    log = common.RunLog(out, resumed_at=method.iteration if state else 0)
    log.t0 -= before_s  # the time of all stretches together
    log.start(args, device)

    def evaluate(network: nn.Module, name: str) -> None:
        print(f"{name} ", end="", flush=True)
        with parametrize.cached():  # weights are rounded once, not once a batch
            results[name] = common.accuracy_pct(network, data, data.test, device, together=True)
        log.write("eval", iteration=method.iteration, wall_s=log.seconds(), **{name: results[name]})
        print(f"{results[name]:.2f}, {len(data.test)} images; {log.seconds():.0f} s", flush=True)

    if not state:
        if not real:
            print(estimate(method, data), flush=True)
            log.write("bn_gap", iteration=0, gap=bn_gap(method))
        evaluate(method.teacher, "acc_fp_pct")  # M as GDFQ has checked it
        for name, q in untrained(model, data.size, args, device):
            evaluate(q, name)
        if real:
            evaluate(method.student, "acc_ptq_real_pct")  # the bound on what ranges alone can do

    mean, images, t0 = {}, 0, time.time()
    bar = common.Progress(method.iteration, method.iterations)
    for i in bar:
        if i + 1 == method.warmup:
            print(f"calibrating: ranges of {args.calibration_batches} generated batches", flush=True)
        stats = method.step(stream)
        images += world * args.batch_size * (1 if i < method.warmup else args.student_steps)
        mean = {k: 0.95 * mean.get(k, v) + 0.05 * v for k, v in stats.items()}
        img_per_s = images / (time.time() - t0)
        # Does M see the wanted classes? Then: does Q answer as M does?
        shown = ("ce", "bns", "acc_m_pct") if i < method.warmup else ("acc_m_pct", "kd", "agree_pct")
        figures = [f"{k} {mean[k]:.3f}" for k in shown if k in mean]
        bar.show(" | ".join([*figures, f"{img_per_s:.0f} img/s"]))
        if (i + 1) % 10 == 0:
            log.write("step", iteration=i + 1, lr=method.opt.param_groups[0]["lr"], **mean,
                      img_per_s=img_per_s, wall_s=log.seconds())
        if i + 1 == method.warmup:
            evaluate(method.student, "acc_ptq_gen_pct")  # ranges of G's images, weights still M's
            t0, images = time.time(), 0  # from here on img/s counts the student's images
        epoch, rest = divmod(i + 1, args.iters_per_epoch)
        if rest or i + 1 == method.iterations:
            continue
        if args.eval_every and epoch % args.eval_every == 0 and i >= method.warmup:
            evaluate(method.student, "acc_pct")
        if epoch % args.checkpoint_every == 0 and not real:
            common.save_atomic({"args": common.flat(args), "method": common.state_of(method),
                                "results": results, "wall_s": log.seconds()},
                               common.checkpoint_file(out))
    evaluate(method.student, "acc_pct")
    if rank:
        common.checkpoint_file(out).unlink(missing_ok=True)
        return
    if not real:
        log.write("bn_gap", iteration=method.iteration, gap=bn_gap(method))
        save_grid(method, data, out / "generated.png")
    finish(method, model, data, args, results | {"img_per_s": img_per_s}, log)


def finish(method: GDFQ, model: nn.Module, data: common.Data, args, results: dict, log) -> None:
    """quantized.pt, the end record with both sizes, the table; then the checkpoint may go."""
    out = log.path.parent
    about = {k: getattr(args, k) for k in ("arch", "dataset")}
    about |= {k: getattr(data, k) for k in ("classes", "mean", "std", "size")}
    # torchvision's Inception and GoogLeNet change it with their weights.
    about["transform_input"] = getattr(model, "transform_input", False)
    common.save_atomic(pack(method.student) | about, out / "quantized.pt")
    size_fp = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    sizes = size_fp, (out / "quantized.pt").stat().st_size
    log.write("end", **results, size_fp_bytes=sizes[0], size_packed_bytes=sizes[1], wall_s=log.seconds(),
              peak_mib=common.peak_mib())
    (out / "checkpoint.pt").unlink(missing_ok=True)
    title = f"{common.short_name(args.arch)} on {data.name}, W{args.wbits}A{args.abits}, last state"
    print_table(title, results, args, sizes)
    made = "log.jsonl, quantized.pt" + ("" if args.method == "finetune-real" else ", generated.png")
    if results["acc_pct"] < results.get("acc_ptq_real_pct", results.get("acc_ptq_gen_pct", 0.0)):
        print("note: training ended below the PTQ that it started from: lower --lr, or train for longer")
    print(f"{out}/: {made}; {log.seconds():.0f} s, {common.peak_mib():.0f} MiB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """A recipe changes the defaults, so that an explicit flag wins wherever it stands."""
    p = build_parser()
    first = p.parse_args(argv)
    # A recipe's percentile was chosen at few bits.
    recipe = {k: v for k, v in RECIPES[first.recipe].items() if k != "percentile" or first.abits <= 5}
    p.set_defaults(**{"percentile": usual_percentile(first.abits)} | recipe)
    return p.parse_args(argv)


if __name__ == "__main__":
    common.run(common.each_seed(main), parse)
