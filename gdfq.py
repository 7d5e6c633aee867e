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
    mu, var    mu, var                       (C,) a layer    as x, x^2

Protocol: the questions that are otherwise asked in issues.

    Which parameters move?   All of G. In Q: weights, biases, BN gamma and beta.
    Which mode?              G is always in train mode, M and Q in eval mode: "fixed BN statistics".
    Which layers?            Every Conv2d and Linear, first and last included. BN is not folded.
    Which activations?       The result of every call of a ReLU and its kin, each with its own range. The
                             image, sums and the pooled feature only by --quantize-input, -add, -pool.
    Which accuracy?          That of the last state, in fp32, on the whole test set. Published: the best
                             epoch's. Of the fast recipe, all constants but the percentile were
                             chosen on Fashion-MNIST's test images, all others on train images.

Departures from paper and published code, with the flag that goes back. --recipe paper: D4-8, 10, 12.

    D1  The moving average of the ranges is debiased once (common.EMA).
    D2  Every range holds 0, and every call of an activation has its own (quantize).
    D3  Ranges are averaged over 30 batches after the warm-up, not over it.  --calibration-batches
    D4  Ranges hold 99.98 % of the values, many-classes 99.95; from 6 bits on all.  --percentile 100
    D5  The student only distils: KL "batchmean", T = 4.       --kd-reduction --temperature --ce
    D6  Two student steps per generator step, one on a buffered batch.       --student-steps --buffer
    D7  Higher learning rates, cosine, clipping; 270 times fewer steps.      --lr --lr-g --schedule
    D8  The generator is half as wide.                                       --g-width 128
    D9  bf16 autocast in training, where the hardware has it.                --no-amp
    D10 many-classes: the label picks rows of conditional BN at 32 px, too.  --generator embedding
    D11 The straight-through gradient is 0 where an activation is clamped; published code has 1.
    D12 Weights are rounded so that errors cancel in kernels and channels.   --rounding nearest

    python gdfq.py                                           # ResNet-20, Fashion-MNIST, W4A4: 3 minutes
    python gdfq.py --arch resnet18 --wbits 4 --abits 4       # pretrains a ResNet-18 first, once
    python gdfq.py --dataset cifar100 --recipe many-classes  # 7 to 21 minutes on a core
"""

import argparse
import inspect
import math
import warnings
from typing import Iterator

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import common
from common import ActivationQuantizer, InputError, WeightQuantizer, door, need, observing

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


def build_parser() -> common.Parser:
    p = common.Parser("gdfq.py", __doc__.split("\n\n")[0])
    a = p.group("task")
    a("--arch", "resnet20", "resnet20/32/44/56, resnet20x2, torchvision's, or FILE.py:NAME")
    a("--weights", None, "checkpoint; None: weights/<dataset>_<arch>.pt; none: a network's own")
    a("--method", "gdfq", "finetune-real: on real images, a bound", choices=["gdfq", "finetune-real"])
    a("--recipe", "fast", "changes defaults; other flags still win", choices=list(RECIPES))
    a("--wbits", 4, "bits of a weight, 2 to 8", lo=2, hi=8)
    a("--abits", 4, "bits of an activation, 2 to 8", lo=2, hi=8)
    a("--first-last-bits", None, "of these two layers; None, published: --wbits", type=int, lo=2, hi=8)
    a("--rounding", "squant", "of weights; published: nearest", choices=["squant", "nearest"])
    a("--quantize-input", False, "quantize the images as well, to 8 bits")
    a("--quantize-add", False, "quantize sums and bottlenecks that a layer reads")
    a("--quantize-pool", False, "quantize the pooled feature; published: none of the three")
    a = p.group("schedule")
    a("--epochs", 10, "length of the run; published: 400", lo=1)
    a("--iters-per-epoch", 30, "generator steps; published: 200", lo=1)
    a("--warmup-epochs", 5, "of G alone; published: 4, ImageNet 50", lo=1)
    a("--batch-size", 128, "of G and of Q, per process; published: 200, ImageNet 16", lo=2)
    a("--schedule", "cosine", "of both learning rates; published: step", choices=["cosine", "step"])
    a("--milestones", [100, 200, 300], "epochs, of --schedule step", nargs="*")
    a("--gamma", 0.1, "factor at each milestone; published: 0.1", hi=1)
    a = p.group("generator")
    a("--generator", "auto", "how the label enters; auto, published: embedding up to 64 px",
      choices=["auto", "embedding", "conditional-bn"])
    a("--g-width", 64, "channels of G; 128, published, is slower", lo=2)
    a("--latent", 100, "length of the noise vector; published: 100", lo=1)
    a("--lr-g", 3e-3, "Adam; published: 1e-3")
    a("--adam-betas", [0.5, 0.999], "as published", nargs=2, hi=0.99999)
    a("--beta", 0.1, "weight of the BN-statistics loss; published: 0.1")
    a = p.group("student")
    a("--lr", 1e-2, "SGD; too high: kd rises. Published: 1e-4, ImageNet 1e-6")
    a("--momentum", 0.9, "SGD, Nesterov; published: 0.9", hi=1)
    a("--weight-decay", 1e-4, "SGD; published: 1e-4")
    a("--clip", 1.0, "largest gradient norm; 0, published: none")
    a("--student-steps", 2, "per generator step; published: 1", lo=1)
    a("--buffer", 100, "generated batches kept; published: 1", lo=1)
    a("--alpha", 1.0, "weight of the distillation; published: 1")
    a("--ce", 0.0, "weight of CE with the sampled label; published: 1")
    a("--temperature", 4.0, "T of distillation; published: 20", lo=1e-3)
    a("--kd-reduction", "batchmean", "published: mean", choices=["batchmean", "mean"])
    a("--percentile", None, "% of values in a range; None: as fits the bits", type=float, lo=50, hi=100)
    a("--ema-momentum", 0.9, "of ranges; published: 0.9", hi=0.99999)
    a("--calibration-batches", 30, "that ranges are averaged over", lo=1)
    common.add_run_flags(p, 5, "epochs")
    a("--eval-every", 0, "epochs between evaluations, for curves; 0: only at the end")
    return p


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """A recipe changes the defaults, so that an explicit flag wins wherever it stands."""
    p = build_parser()
    first = p.parse_args(argv)
    percentile = common.usual_percentile(first.abits)
    p.set_defaults(**{"percentile": percentile} | RECIPES[first.recipe])
    if first.abits > 5:  # a recipe's percentile was chosen at few bits
        p.set_defaults(percentile=percentile)
    return p.parse_args(argv)


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
    # ABLATE: With ours 66.19; without (the published --kd-reduction mean --ce 1 --temperature 20) 60.19.
    return T**2 * (kl if how == "batchmean" else kl / p.shape[1])


# ===== Model surgery ================================================================================
#
# The quantizers are in common.py. Where they belong is read off the network's graph, by torch.fx. There
# nn.LeakyReLU, F.leaky_relu and x.leaky_relu_() are all called leakyrelu.

ACTIVATIONS = set("relu relu6 hardtanh leakyrelu prelu rrelu elu celu selu silu mish glu hardswish "
                  "gelu softplus softsign tanh tanhshrink hardshrink softshrink sigmoid hardsigmoid "
                  "logsigmoid threshold clamp clip".split())
GATES, PRODUCTS = {"sigmoid", "hardsigmoid"}, {"mul", "imul"}
POOLS = {"adaptiveavgpool2d", "avgpool2d", "mean"}
# What moves or selects values and makes no new ones: a quantized tensor stays quantized.
MOVES = set("flatten dropout dropout2d identity maxpool2d view reshape permute transpose "
            "contiguous".split())
# Nonlinear, or a product of two activations, and without a range: named, where a network has them.
IN_FLOAT = set("softmax matmul bmm einsum scaleddotproductattention exp log abs pow square erf maximum "
               "where".split())


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
    model = common.copy_of(model).eval()
    parameters = inspect.signature(model.forward).parameters.values()
    fixed = {p.name: p.default for p in parameters if p.default is not p.empty}
    with door(f"torch.fx cannot trace {type(model).__name__}"):
        return torch.fx.GraphModule(model, Tracer().trace(model, fixed or None))


def called(q: torch.fx.GraphModule, node: torch.fx.Node) -> str:
    """The name of what a node calls, be it a module, a function or a method; "" if it calls nothing."""
    kind = type(q.get_submodule(node.target)) if node.op == "call_module" else node.target
    return getattr(kind, "__name__", str(kind)).lower().replace("_", "") if "call" in node.op else ""


def activation_calls(q: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The calls whose result gets a range: nonlinearities; of a gate, sigmoid(x) * y, the product."""
    found = []
    for node in q.graph.nodes:
        products = [user for user in node.users if called(q, user) in PRODUCTS]
        if called(q, node) in GATES and len(products) == len(node.users):
            found += products
        elif called(q, node) in ACTIVATIONS:
            found.append(node)
    return list(dict.fromkeys(found))


def layer_inputs(q: torch.fx.GraphModule) -> list[tuple[str, torch.fx.Node]]:
    """What each call of a Conv2d or Linear reads: (layer, the node that made its values), in order."""
    found = []
    for node in q.graph.nodes:
        if node.op == "call_module" and isinstance(q.get_submodule(node.target), (nn.Conv2d, nn.Linear)):
            source = node.all_input_nodes[0]
            while called(q, source) in MOVES:
                source = source.all_input_nodes[0]
            found.append((node.target, source))
    return found


def quantize(model: nn.Module, example: Tensor, wbits: int, abits: int,
             first_last_bits: int | None = None, percentile: float | None = None,
             ema_momentum: float = 0.9, also: list[str] = (), rounding: str = "squant") -> nn.Module:
    """A fake-quantized copy of `model` in eval mode; `model` itself is not touched.

    Every Conv2d and Linear gets a WeightQuantizer (a parametrization of its `weight`), every activation
    call an ActivationQuantizer, with a range from `example` (B, ...), normalised as the model expects.
    also: "input", "add", "pool", what a layer reads besides. InputError: torch.fx cannot trace it.
    """
    fits = all(bits in range(2, 9) for bits in (wbits, abits, first_last_bits or 8))
    need(fits and rounding in ("squant", "nearest"), f"W{wbits}A{abits}, first and last "
         f"{first_last_bits}, {rounding}: expected 2 to 8 bits, and squant or nearest")
    percentile = percentile or common.usual_percentile(abits)
    q, layers, originals = trace(model), {}, dict(model.named_modules())

    # torchvision's residual blocks call ONE nn.ReLU module twice. Swapping modules, as published code
    # does, gives both places one range; walking the graph gives every call its own.
    ranges = dict.fromkeys(activation_calls(q), (abits, percentile))
    for _, node in layer_inputs(q):
        place = "pool" if called(q, node) in POOLS else "input" if node.op == "placeholder" else "add"
        if place in also:
            ranges.setdefault(node, (8, 100.0) if place == "input" else (abits, percentile))
    for n, (node, (bits, percentage)) in enumerate(ranges.items()):
        q.add_submodule(f"act_quant{n}", ActivationQuantizer(bits, ema_momentum, percentage))
        with q.graph.inserting_after(node):
            quantized = q.graph.call_module(f"act_quant{n}", (node,))
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)
    q.recompile()
    for node in q.graph.nodes:
        # Attention takes the weight of a Linear without calling it: then the graph has the weight alone.
        name = node.target.removesuffix(".weight") if node.op in ("call_module", "get_attr") else ""
        if isinstance(originals.get(name), (nn.Conv2d, nn.Linear)):
            layers[name] = q.get_submodule(name)
    ends = [*layers][::max(1, len(layers) - 1)]  # the first and the last
    own_bits = dict.fromkeys(ends, first_last_bits or wbits)
    for name, layer in layers.items():
        own = layer._parameters.get("weight") is not None
        need(own, f"{name}: its weight is made by a parametrization; remove that first")
        quantizer = WeightQuantizer(own_bits.get(name, wbits), rounding)
        parametrize.register_parametrization(layer, "weight", quantizer)
    q.meta["bits"] = dict(wbits=wbits, abits=abits, first_last_bits=first_last_bits, also=list(also))
    with observing(q):
        common.check_network(q.to(example.device), example)
    left = [n for n, p in q.named_parameters() if p.ndim > 1 and not n.endswith(".weight.original")]
    left += sorted({called(q, node) for node in q.graph.nodes} & IN_FLOAT)
    if left:
        warnings.warn("besides biases and norm layers these stay in fp32: " + ", ".join(left))
    return q


def record_bn_statistics(model: nn.Module) -> dict[_BatchNorm, tuple[Tensor, Tensor]]:
    """A dict that holds, after each forward, mean and variance (C,), (C,) of each BatchNorm's input."""
    seen = {}

    def record(bn: _BatchNorm, inputs: tuple[Tensor]) -> None:  # in a hook: x is still in the cache
        seen[bn] = common.BatchMoments.apply(inputs[0])

    for m in model.modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            m.register_forward_pre_hook(record)
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
        self.embedding, self.side, self.width = None, image_size // 4, width
        self.fc = nn.Linear(latent, width * self.side**2)
        # Published: at 32 px the label's embedding multiplies the noise; on ImageNet the noise alone
        # enters, and the label picks the rows of three conditional BatchNorms.
        # ABLATE: With conditional BN 66.19 in many-classes; without (--generator embedding) 65.01.
        if kind == "embedding" or (kind == "auto" and image_size <= 64):
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
        label = (y,)
        if self.embedding is not None:
            z, label = self.embedding(y) * z, ()
        x = self.fc(z).view(-1, self.width, self.side, self.side)
        x = x.contiguous(memory_format=torch.channels_last)
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
        method.student      # fake-quantized nn.Module in eval mode; tools/deploy.py makes it small

    `model` maps normalised images (B, 3, S, S) to logits (B, C) and is copied, not touched. A recipe:
    **RECIPES["many-classes"]; bf16: amp=True. Raises InputError for a model without BatchNorm.
    """
    STATE = ("generator", "student", "opt_g", "opt", "rng", "iteration", "buffer")  # of a checkpoint

    def __init__(self, model: nn.Module, num_classes: int, image_size: int, hp=None, **changes):
        self.hp = hp = common.defaults(build_parser, hp, **changes)
        need(hp.warmup_epochs < hp.epochs, f"--warmup-epochs {hp.warmup_epochs}: not below --epochs")
        need(image_size % 4 == 0, f"images of {image_size} px: the generator's sides are multiples of 4")
        has_bn = any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())
        need(has_bn, "the network has no BatchNorm, and images are learned from statistics stored there")
        self.num_classes, self.device = num_classes, next(model.parameters()).device
        self.warmup = hp.warmup_epochs * hp.iters_per_epoch
        self.iterations = hp.epochs * hp.iters_per_epoch
        self.iteration, self.buffer = 0, []  # of (images, labels, M's logits)
        # Noise is drawn on the CPU: a seed means the same on every device. Each process has its own.
        self.rng = torch.Generator().manual_seed(hp.seed + 1_000_003 * common.rank_and_world()[0])

        self.teacher = common.copy_of(model).eval().requires_grad_(False)
        with common.seeded(hp.seed):  # the caller's random numbers are not ours to reset
            self.generator = Generator(num_classes, image_size, hp.latent, hp.g_width, hp.generator)
        for net in (self.teacher, self.generator):
            net.to(self.device, memory_format=torch.channels_last)
        places = {"input": hp.quantize_input, "add": hp.quantize_add, "pool": hp.quantize_pool}
        self.also = [place for place, wanted in places.items() if wanted]
        # Gaussian noise gives Q's activations first ranges; `calibrate` replaces them.
        noise = torch.randn(min(hp.batch_size, 64), 3, image_size, image_size, generator=self.rng)
        noise = noise.to(self.device)
        common.check_network(self.teacher, noise, num_classes)
        self.student = quantize(self.teacher, noise, hp.wbits, hp.abits, hp.first_last_bits,
                                hp.percentile, hp.ema_momentum, self.also, hp.rounding)
        self.student.requires_grad_(True)
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
        z = torch.randn(len(y), self.hp.latent, generator=self.rng)
        y, z = y.to(self.device), z.to(self.device)
        with common.autocast(self.device, self.hp.amp):
            return self.generator(z, y).float().contiguous(memory_format=torch.channels_last), y

    def generator_step(self) -> tuple[Tensor, Tensor, Tensor, dict]:
        """L_G = CE(M(x), y) + beta * L_BNS, one Adam step. Returns its x, y and M's logits, detached."""
        x, y = self.sample()
        with common.autocast(self.device, self.hp.amp):
            logits = self.teacher(x).float()
        # CE alone finds images that M calls y and that look like nothing M was trained on; L_BNS asks of
        # every layer that they look like it. Under torchrun L_BNS is of this process's batch.
        # ABLATE: With both 63.77; without L_BNS (--beta 0) 55.66, without CE 63.45 (CIFAR-100, half the
        # size; results/gdfq/parts).
        ce, bns = F.cross_entropy(logits, y), bn_statistics_loss(self.bn_statistics)
        common.descend(self.opt_g, ce + self.hp.beta * bns, "the loss of G", "--lr-g", together=True)
        self.bn_statistics.clear()  # or the graph of this batch lives on
        seen = (logits.argmax(1) == y).float().mean()
        stats = {"ce": ce.item(), "bns": bns.item(), "acc_m_pct": 100 * seen.item()}
        return x.detach(), y, logits.detach(), stats

    def student_step(self, x: Tensor, y: Tensor, teacher_logits: Tensor) -> dict:
        """L_Q = alpha * T^2 * KL(M(x)/T || Q(x)/T) + ce * CE(Q(x), y), one SGD step."""
        # Q is in eval mode: the paper's "fixed BN statistics", worth +1.02 points on CIFAR-10, +2.79 on
        # CIFAR-100. Gamma and beta do learn.
        # ABLATE: With fixed statistics 92.77; without (self.student.train() here) 65.93. W3A3 on
        # Fashion-MNIST, seed 0, fp32; results/gdfq/trials/student-train-mode.
        hp = self.hp
        with common.autocast(self.device, hp.amp):
            logits = self.student(x).float()
        kd = distillation_loss(teacher_logits, logits, hp.temperature, hp.kd_reduction)
        loss = hp.alpha * kd + hp.ce * F.cross_entropy(logits, y)
        common.descend(self.opt, loss, "the loss of Q", "--lr", hp.clip, together=True)
        agree = (logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
        return {"kd": kd.item(), "agree_pct": 100 * agree.item()}

    @torch.no_grad()
    def calibrate(self, images=None) -> None:
        """Activation ranges of Q from `images`, batch by batch, or from generated ones; then frozen."""
        # Published code watches every batch of the warm-up. Its EMA of momentum 0.9 forgets: what lies
        # more than 30 batches back weighs 4 % in all. So 30 batches of the warmed-up generator do.
        with observing(self.student), common.autocast(self.device, self.hp.amp):
            for x in images or (self.sample()[0] for _ in range(self.hp.calibration_batches)):
                self.student(x)
        # One range per tensor for all of torchrun's processes: the mean of theirs.
        quantizers = [m for m in self.student.modules() if isinstance(m, ActivationQuantizer)]
        common.average([end for m in quantizers for end in (m.lo, m.hi)])

    def step(self, real: Iterator[tuple[Tensor, Tensor, Tensor]] | None = None) -> dict:
        """One iteration: a generator step and, after the warm-up, `student_steps` student steps.

        `real`, which `real_batches` makes, takes the generator's place: an upper bound.
        """
        self.set_learning_rates()
        hp, learns, stats = self.hp, self.iteration >= self.warmup, {}
        draw = lambda n: torch.randint(n, (), generator=self.rng)
        # G never stops learning: each iteration brings Q images that it has not seen.
        if real is None:
            x, y, logits, stats = self.generator_step()
            if learns:
                # Under autocast x holds bf16 values anyway: half the memory for nothing.
                self.buffer.append((x.to(torch.bfloat16) if hp.amp else x, y, logits))
                if len(self.buffer) > hp.buffer:
                    self.buffer.pop(draw(hp.buffer))  # any but the newest
        steps = hp.student_steps if learns else 0
        for i in range(steps):
            # ABLATE: With the newest batch alone 66.19 in many-classes; without (--student-steps 2
            # --buffer 100) 66.00, in more time.
            if real is not None:
                x, y, logits = next(real)
            elif i > 0:
                x, y, logits = self.buffer[draw(len(self.buffer))]
            stats |= self.student_step(x.float(), y, logits)
        self.iteration += 1
        if self.iteration == self.warmup:
            self.calibrate()
        return stats


# ===== Evaluation and figures =======================================================================

def untrained(method: GDFQ, model: nn.Module, size: int) -> Iterator[tuple[str, nn.Module]]:
    """The do-nothing row, the paper's quantizer with ranges from noise; then ours with them."""
    hp, g = method.hp, torch.Generator().manual_seed(method.hp.seed)
    noise = torch.randn(256 if size <= 64 else hp.batch_size, 3, size, size, generator=g)
    noise = noise.to(method.device)
    bits = hp.wbits, hp.abits, hp.first_last_bits
    rows = {"noise": (100.0, "nearest"), "noise_clipped": (hp.percentile, hp.rounding)}
    for name, (percentile, rounding) in rows.items():
        q = quantize(model, noise, *bits, percentile, also=method.also, rounding=rounding)
        yield f"acc_ptq_{name}_pct", q


@torch.no_grad()
def real_batches(method: GDFQ, data: common.Data) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """--method finetune-real: train images, labels and M's logits without end, cropped and flipped."""
    n, B, device = len(data.train or ()), method.hp.batch_size, method.device
    need(n >= B, f"--method finetune-real: only {n} train images, and --batch-size is {B}; a folder "
         "needs train/ beside val/")
    while True:
        for x, y in common.batches(data.train, B, method.rng, augment=True, drop_last=True):
            x = common.to_input(x, data.mean, data.std, device)
            with common.autocast(device, method.hp.amp):
                logits = method.teacher(x).float()
            yield x, y.to(device), logits


@torch.no_grad()
def save_grid(method: GDFQ, data: common.Data, path) -> None:
    """A labelled grid of generated images, one class per row; of many classes, evenly spaced ones."""
    from PIL import ImageDraw
    from torchvision.transforms.v2.functional import to_pil_image
    from torchvision.utils import make_grid

    C, tile = len(data.classes), max(data.size, 48)
    shown = torch.linspace(0, C - 1, min(C, 640 // data.size)).round().long()
    x = method.sample(shown.repeat_interleave(10))[0].cpu()  # one batch of G
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    x = F.interpolate((x * std + mean).clamp(0, 1), size=tile)
    picture = to_pil_image(F.pad(make_grid(x, 10, 2, pad_value=1.0), (120, 0), value=1.0))
    for row, c in enumerate(shown.tolist()):
        at = (6, row * (tile + 2) + tile // 2 - 4)
        ImageDraw.Draw(picture).text(at, str(data.classes[c])[:18], "black")
    picture.save(path)


def print_table(title: str, results: dict, args: argparse.Namespace, sizes: tuple[int, int]) -> None:
    """Rows: what was done. Columns: top-1, its drop in points, what the row added, the size."""
    kept, above = f"PTQ, {args.rounding}, {args.percentile:g} % of", results["acc_fp_pct"]
    rows = {"acc_fp_pct": "full precision", "acc_ptq_noise_pct": "PTQ, min and max of noise",
            "acc_ptq_noise_clipped_pct": f"{kept} noise", "acc_ptq_gen_pct": f"{kept} generated images",
            "acc_ptq_real_pct": f"{kept} real images", "acc_pct": f"{args.method}, last state"}
    print(f"\n{title:<44}top-1 %    drop   added      kB")
    for key, acc in results.items():
        drop, added, kB = results["acc_fp_pct"] - acc, acc - above, sizes[key != "acc_fp_pct"] / 1000
        print(f"{rows[key]:<44}{acc:>7.2f}{drop:>8.2f}{added:>+8.2f}{kB:>8.0f}")
        above = acc


# ===== Run ==========================================================================================

def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args.device, several=True)
    args.amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data = common.load_data(args.dataset, args.data_dir, args.size)
    C, real = len(data.classes), args.method == "finetune-real"
    # Once without weights: every check comes before minutes go into pretraining.
    GDFQ(common.build_model(args.arch, C), C, data.size, args)
    model, data, origin = common.find_weights(args.arch, args.dataset, data, args.weights, device)
    method = GDFQ(model.to(device, memory_format=torch.channels_last), C, data.size, args)
    stream, crc, results, mean = None, common.crc_of(model), {}, {}
    if real:
        stream = real_batches(method, data)
        method.iteration = method.warmup  # nothing to warm up
        method.calibrate(next(stream)[0] for _ in range(args.calibration_batches))
    if state := common.load_checkpoint(args, crc):
        common.restored(method, state["method"])
        results, mean = state["results"], state["mean"]
        need(len(set(common.gather(method.iteration))) == 1, "checkpoints of different iterations")
    name = f"{data.name}_{common.short_name(args.arch)}_w{args.wbits}a{args.abits}"
    out = common.new_folder(args, f"runs/gdfq/{name}")
    log = common.RunLog(out, args, device, state=state)
    print(f"weights: {origin}\ndevice: {common.device_name(device)}, {torch.get_num_threads()} threads, "
          f"{'bf16' if args.amp else 'fp32'}; recipe: {args.recipe}")

    def evaluate(network: nn.Module, name: str) -> None:
        with parametrize.cached():  # weights are rounded once, not once a batch
            results[name] = common.accuracy_pct(network, data, data.test, device)
        log.write("eval", iteration=method.iteration, wall_s=log.seconds(), **{name: results[name]})
        print(f"{name} {results[name]:.2f}, {len(data.test)} images; {log.seconds():.0f} s", flush=True)

    if not state:
        evaluate(method.teacher, "acc_fp_pct")  # M as GDFQ has checked it
        for name, q in untrained(method, model, data.size):
            evaluate(q, name)
        if real:
            evaluate(method.student, "acc_ptq_real_pct")  # the bound on what ranges alone can do
    bar = common.progress(method.iteration, method.iterations)
    for i in bar:
        stats = method.step(stream)
        mean = {k: 0.95 * mean.get(k, v) + 0.05 * v for k, v in stats.items()}
        bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
        if (i + 1) % 10 == 0:
            lr = method.opt.param_groups[0]["lr"]
            log.write("step", iteration=i + 1, lr=lr, **mean, wall_s=log.seconds())
        if i + 1 == method.warmup:
            evaluate(method.student, "acc_ptq_gen_pct")  # ranges of G's images, weights still M's
        if (i + 1) % args.iters_per_epoch or i + 1 == method.iterations:
            continue
        epoch = (i + 1) // args.iters_per_epoch
        if args.eval_every and epoch % args.eval_every == 0 and i >= method.warmup:
            evaluate(method.student, "acc_pct")
        if epoch % args.checkpoint_every == 0 and not real:
            now = common.state_of(method)
            common.save_checkpoint(log, args, crc=crc, method=now, results=results, mean=mean)
    evaluate(method.student, "acc_pct")
    if common.rank_and_world()[0] == 0:
        finish(method, model, data, args, results, log)
    common.checkpoint_file(out).unlink(missing_ok=True)


def finish(method: GDFQ, model: nn.Module, data: common.Data, args, results: dict, log) -> None:
    """The picture, quantized.pt, the end record with both sizes, the table."""
    out, size = log.path.parent, math.nan
    size_fp = sum(t.nbytes for t in model.state_dict().values())
    if args.method == "gdfq":
        save_grid(method, data, out / "generated.png")
    try:
        size = common.tool("deploy").save(method.student, model, data, args, out / "quantized.pt")
    except InputError as e:
        print(f"note: no quantized.pt, since there is {e}")
    log.write("end", **results, size_fp_bytes=size_fp, size_packed_bytes=size, wall_s=log.seconds(),
              peak_mib=common.peak_mib())
    title = f"{args.arch} on {data.name}, W{args.wbits}A{args.abits}"
    print_table(title, results, args, (size_fp, size))
    print(f"{out}/: {log.seconds():.0f} s, {common.peak_mib():.0f} MiB")


if __name__ == "__main__":
    common.run(common.each_seed(main), parse)
