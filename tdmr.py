"""TDMR: what a large frozen network knows, reprogrammed for a small network of another architecture.

    "Towards Efficient Task-Driven Model Reprogramming with Foundation Models"
    Shoukai Xu, Jiangchao Yao, Ran Luo, Shuhai Zhang, Zihao Lian, Mingkui Tan, Bo Han, Yaowei Wang.
    2023, arXiv 2304.02263.

Read this first. No code was published, and we could read only the abstract. It fixes the contract: a foundation model of any
architecture, a small target model of quite another one, only the target task's data, a *proxy space* against the mismatch of
tasks and domains, then *progressive distillation* from it. Everything more precise below is **our design**, every constant is
ours, and no number here is or reproduces one of the paper's.

The idea. A foundation model F learned other classes from other images. It stays frozen and runs once over the target images; a
small map, found in seconds, projects its features into a space made for the target task. The target model S learns to match
that space, and ever more its decisions alone, on labelled and unlabelled target images alike.

The algorithm.

    f <- F(x), once for every image and view, cached, standardised on the target's own images      # F's only forwards; the domain
    step 1, reprogram F, in closed form:
        Sigma <- covariance of f within classes                    # what varies within a class is not the task's
        q <- y where there is a label, else labels spread along the k-NN graph of Sigma^-1/2 f; Sigma again, from all q
        phi <- the C-1 directions of Sigma^-1/2 f in which the classes lie apart                    # the task
        p <- phi f,   o_P = log-posterior of the classes in p, scaled to a fixed standard deviation
    step 2, reprogram S; t goes from 0 to 1:
        h, o <- S's feature and logits for the same view of the same image
        S, psi <- S, psi - lr * grad [ CE(o, y) + a(t) A (1 - cos(psi(h), p)) + b(t) B T^2 KL(o_P/T || o/T) ]

Symbols ("paper" is our notation; see above).

    paper      code             shape              unit        flag
    F          foundation                                      --foundation --foundation-data --foundation-weights
    S          student                                         --target
    f          features         (R, dF), fp16      as F        --taps --views --labelled-views
    q          q                (R, C)             probability --neighbours --spread --sharpen
    phi, p     proxy.phi, p     (dF, C-1), (R, C-1)            --proxy --shrink
    o_P        proxy.head       (R, C)             logits      --logit-std
    a(t), b(t) progress_weights two floats                     --schedule
    A, B, T    A, B, T          float                          --feature-weight --kd-weight --temperature --probe-temperature

    R counts (view, image) pairs, labelled images first; C classes.

Protocol: the questions that are otherwise asked in issues.

    Which parameters move?     Step 1: phi and the head on it. Step 2: all of S, and psi. Never F: neither its weights nor its BN
                               statistics (it is in eval mode), except in the row `finetune`, on a copy.
    What is f?                 What enters F's last Linear (the pooled feature, or the CLS token), and the mean and standard
                               deviation over space, or tokens, at up to --taps depths: the last layer is F's old task's.
    What does F see?           The images S sees, resized to F's size where it differs, normalised as F was trained.
    Who sees what?             All methods: the same labelled images, views, batches, initial weights, steps. Every distilling
                               method: the same unlabelled images too. Probe, KD and FitNet get the same cached f as TDMR.
    Where are test images?     In the accuracy of the last state and nowhere else. How long the probe trains is chosen by a fifth of
                               the labelled images, which are then put back.
    What is a forward?         One image through F for training (test images of the probe's row are not counted).
    Which images?              The draw depends on --seed and the data alone, and is the same for all methods.

Departures from the spirit of the abstract, with the flag that goes back.

    D1  Features of several depths, not the last alone.                                   --taps 0
    D2  Unlabelled images take part in step 1 by label propagation.                       --neighbours 0
    D3  The proxy is Fisher's discriminant space, in closed form, not a trained network.  --proxy mlp
    D4  Logits are distilled from the first step on, beside the features, which fade.  --schedule features-then-logits
    D5  bf16 autocast in F and in S's training, where the hardware has it.                --no-amp

    python tdmr.py                                              # 20 labelled images a class and 4,000 without labels
    python tdmr.py --unlabelled 0 --methods all                 # the labelled images alone; every ablation
    python tdmr.py --foundation swin_t --dataset /path/to/imagefolder --target mobilenet_v3_small   # a GPU, torchvision's weights
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import InputError, number

# ===== Hyperparameters ===============================================================================================

METHODS = ("scratch", "probe", "kd", "fitnet", "tdmr", "kd-proxy", "tdmr-no-proxy", "tdmr-no-progression", "finetune")
SCHEDULES = ("features-then-logits", "fade", "decay", "constant")


def build_parser() -> argparse.ArgumentParser:
    p = common.Parser(prog="tdmr.py", description=__doc__.split("\n\n")[0])
    a = p.add_argument_group("task").add_argument
    a("--foundation", default=None, help="resnet20, resnet20x2, ... or a torchvision name, with torchvision's weights; "
      "None: that of --foundation-weights, or resnet20x2")
    a("--foundation-data", default="cifar100", help="what F was trained on: picks weights/<data>_<foundation>.pt")
    a("--foundation-weights", metavar="FILE", default=None, help="a checkpoint of common.py pretrain, or a state_dict that fits --foundation")
    a("--target", default="resnet8", help="the small network, trained from scratch: resnet8, ... or a torchvision name")
    a("--dataset", default="fashion", help="fashion (embedded), fashion-mnist, cifar10, cifar100, an ImageFolder, a .npz")
    a("--data-dir", default="data", help="where cifar lies, or is downloaded to")
    a("--shots", type=number(int, 1), default=20, help="labelled images a class")
    a("--fraction", type=number(float, 0, 1), default=None, help="labelled share of the train images, in place of --shots")
    a("--unlabelled", type=number(int, 0), default=4000, help="further train images, without their labels; 0: few shots alone")
    a("--methods", nargs="+", default=["scratch", "probe", "kd", "fitnet", "tdmr"], choices=[*METHODS, "all"], metavar="METHOD",
      help=f"rows of the table: {', '.join(METHODS)}, or all. finetune takes as long as all the others")
    a = p.add_argument_group("features").add_argument
    a("--views", type=number(int, 1), default=6, help="cached views of an unlabelled image: itself, then shifted and flipped; 3 S^2 bytes "
      "and one forward of F each")
    a("--labelled-views", type=number(int, 1), default=30, help="the same, of a labelled image; they are few, so F's time hardly grows")
    a("--taps", type=number(int, 0), default=9, help="depths of F whose mean and deviation over space join f; 0: the last feature alone")
    a = p.add_argument_group("step 1: the proxy").add_argument
    a("--proxy", default="discriminant", choices=["discriminant", "mlp"], help="discriminant: closed form. mlp: two layers trained with CE, as "
      "one would expect: TDMR is the same with unlabelled images, 1.4 points worse without")
    a("--shrink", type=number(float, 1e-6), default=0.3, help="added to the eigenvalues of the covariance within classes, in units of their mean; "
      "very large: no whitening, only the nearest class mean, 8 to 12 points worse")
    a("--logit-std", type=number(float, 1e-3), default=6.0, help="standard deviation of o_P over classes and images, as large as a probe's")
    a("--neighbours", type=number(int, 0), default=10, help="of an image in the k-NN graph; 0: no label propagation")
    a("--spread", type=number(float, 0, 0.9999), default=0.95, help="share of its label that an image takes from its neighbours")
    a("--sharpen", type=number(float, 0.1), default=4.0, help="power of the propagated probabilities, which are too flat")
    a("--pca", type=number(int, 1), default=64, help="--proxy mlp: dimensions of the whitened f that it sees")
    a("--dropout", type=number(float, 0, 0.99), default=0.3, help="--proxy mlp: of these, while it trains")
    a("--d-proxy", type=number(int, 1), default=None, help="--proxy mlp: width of phi and of p; None: that of the target's feature")
    a("--step1-steps", type=number(int, 10), default=600, help="of the probe, and of --proxy mlp, at most; the held-out fifth chooses one of ten lengths")
    a("--step1-batch", type=number(int, 2), default=256, help="rows of cached features a step")
    a("--step1-lr", type=number(float, 0), default=3e-3, help="AdamW with a cosine schedule")
    a("--step1-weight-decay", type=number(float, 0), default=1e-2, help="AdamW, on all weights of probe and mlp")
    a("--label-smoothing", type=number(float, 0, 0.99), default=0.0, help="of the targets of the probe and of --proxy mlp; Müller et al. 2019: a smoothed teacher distils worse")
    a = p.add_argument_group("step 2: the target").add_argument
    a("--schedule", default="fade", choices=SCHEDULES, help="a(t), b(t). fade: features go, logits stay; with few steps the logits of "
      "features-then-logits come too late")
    a("--feature-weight", type=number(float, 0), default=5.0, help="A: of the cosine loss to p")
    a("--fitnet-weight", type=number(float, 0), default=5.0, help="the same for FitNet, which has no other teacher")
    a("--kd-weight", type=number(float, 0), default=1.0, help="B: of the distilled logits")
    a("--ce-weight", type=number(float, 0), default=1.0, help="of the labelled images' cross-entropy")
    a("--temperature", type=number(float, 1e-3), default=2.0, help="T of the proxy's logits")
    a("--probe-temperature", type=number(float, 1e-3), default=4.0, help="T of the probe's logits, in kd and tdmr-no-proxy; usual: 4")
    a("--steps", type=number(int, 1), default=600, help="of every student")
    a("--batch-size", type=number(int, 2), default=32, help="labelled images a step")
    a("--unlabelled-batch", type=number(int, 0), default=64, help="unlabelled images a step")
    a("--lr", type=number(float, 0), default=0.05, help="peak of the one-cycle schedule, SGD Nesterov; too high shows as NaN")
    a("--momentum", type=number(float, 0, 1), default=0.9, help="Nesterov momentum")
    a("--weight-decay", type=number(float, 0), default=5e-4, help="on all weights")
    a("--warmup", type=number(float, 0, 1), default=0.1, help="share of the steps in which the learning rate rises")
    a("--finetune-lr", type=number(float, 0), default=0.01, help="the same for `finetune`, which has no warm-up from scratch to do")
    a = p.add_argument_group("run").add_argument
    a("--out", default=None, help="folder for log.jsonl, tdmr.pt and cached features; None: runs/tdmr/<data>_<target>_<shots>_<unlabelled>")
    a("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0], help="one run each; several: one folder seed<N> each, and mean +- std")
    a("--device", default="auto", help="auto, cpu, cuda, mps")
    a("--amp", action=argparse.BooleanOptionalAction, default=None, help="bf16 autocast; None: where the hardware has it")
    a("--plot", nargs="+", metavar="DIR", default=None,
      help="draw accuracy against --shots from the logs of these folders, one number of shots each, nothing else. Writes --out, or "
           "<first folder>.png; needs matplotlib")
    return p


# ===== Equations =====================================================================================================


def progress_weights(t: float, schedule: str) -> tuple[float, float]:
    """(a, b): weights of feature and of logit distillation at the progress t in [0, 1] of step 2. Ours.

    features-then-logits  1 - t, t        decay     1 - t, 1 - t
    fade                  1 - t, 1        constant  1, 1
    """
    return {"features-then-logits": (1 - t, t), "fade": (1 - t, 1.0), "decay": (1 - t, 1 - t), "constant": (1.0, 1.0)}[schedule]


def cosine_loss(h: Tensor, p: Tensor) -> Tensor:
    """mean_i [1 - cos(h_i, p_i)].  (B, d), (B, d) -> scalar in [0, 2]; 0 for aligned features of any length."""
    return (1 - F.cosine_similarity(h, p, dim=1)).mean()


def distillation_loss(teacher_logits: Tensor, student_logits: Tensor, T: float) -> Tensor:
    """Hinton et al. 2015: T^2 KL(softmax(teacher/T) || softmax(student/T)).  (B, C), (B, C) -> scalar, nats.

    At T = 1 its gradient is that of the cross-entropy with soft targets.
    """
    p, q = F.log_softmax(teacher_logits / T, 1), F.log_softmax(student_logits / T, 1)
    return T**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def soft_cross_entropy(logits: Tensor, q: Tensor) -> Tensor:
    """mean_i [- sum_c q_ic ln softmax(logits_i)_c].  (B, C), (B, C) -> scalar, nats."""
    return -(q * F.log_softmax(logits, 1)).sum(1).mean()


def class_moments(rows) -> tuple[Tensor, Tensor]:
    """Class means (C, d) and the covariance (d, d) within classes, from chunks (f (n, d), q (n, C)) with soft labels q.

    With one class for all, q = 1, these are the mean and the covariance.
    """
    n = m = s = 0
    for f, q in rows:
        n, m, s = n + q.sum(0), m + q.T @ f, s + (f.T * q.sum(1)) @ f
    means = m / n[:, None]
    return means, (s - (means.T * n) @ means) / n.sum()


def whitening(covariance: Tensor, shrink: float) -> Tensor:
    """W (d, d) with W^T (S + shrink I) W = I, where S is the covariance in units of its mean eigenvalue."""
    S = covariance / covariance.diagonal().mean().clamp_min(1e-6)
    eigenvalues, vectors = torch.linalg.eigh(S.cpu())  # MPS has no eigh
    return (vectors / (eigenvalues.clamp_min(0) + shrink).sqrt()).to(S.device)


def discriminant(means: Tensor, covariance: Tensor, shrink: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fisher 1936, Rao 1948: the space in which classes of one common covariance lie apart, and their log-posterior there.

    means (C, d), covariance (d, d) within classes -> phi (d, C-1), head weight (C, C-1) and bias (C,):
        p = f phi,   o_c = p . m_c - |m_c|^2 / 2,   m_c the mean of class c in p
    Nothing is lost by keeping only C-1 directions: across them all classes have the same mean.
    """
    W = whitening(covariance, shrink)
    m = (means - means.mean(0)) @ W
    directions = torch.linalg.svd(m.cpu(), full_matrices=False)[2][:max(1, len(m) - 1)].T.to(m.device)
    m = m @ directions
    return W @ directions, m, -(m * m).sum(1) / 2


def propagate_labels(z: Tensor, y: Tensor, classes: int, neighbours: int, spread: float, iterations: int = 40) -> Tensor:
    """Zhou et al. 2004, weights as in Iscen et al. 2019: Q <- spread D^-1/2 W D^-1/2 Q + (1 - spread) Y, rows then scaled to 1.

    z (n, d), y (m,) labels of its first m rows -> (n, C) probabilities. W_ij = max(0, cos(z_i, z_j))^3 among the nearest
    neighbours, symmetric. A row that no label reaches is uniform.
    """
    z, n, k = F.normalize(z, dim=1), len(z), min(neighbours, len(z) - 1)
    top, near = [], []
    for rows in torch.arange(n).split(2000):  # never more than 2000 n similarities at once
        s = z[rows] @ z.T
        s[torch.arange(len(rows)), rows] = -1  # nobody is its own neighbour
        values, index = s.topk(k, 1)
        top.append(values.clamp_min(0) ** 3), near.append(index)
    i, j = torch.arange(n, device=z.device).repeat_interleave(k), torch.cat(near).flatten()
    i, j, w = torch.cat([i, j]), torch.cat([j, i]), torch.cat(top).flatten().repeat(2) / 2  # an edge counts from both its ends
    degree = torch.zeros(n, device=z.device).index_add(0, i, w).clamp_min(1e-8)
    w = (w * (degree[i] * degree[j]).rsqrt())[:, None]
    Y = torch.zeros(n, classes, device=z.device)
    Y[torch.arange(len(y)), y] = 1
    Q = Y
    for _ in range(iterations):
        Q = spread * torch.zeros_like(Q).index_add(0, i, w * Q[j]) + (1 - spread) * Y
    return (Q + 1e-12) / (Q + 1e-12).sum(1, keepdim=True)


# ===== Model surgery =================================================================================================


def last_linear(model: nn.Module, size: int, flag: str) -> nn.Linear:
    """The Linear that the network's output comes from; its input is the feature. Found by running the network once.

    Raises InputError where there is none, as in SqueezeNet, or where the network does not run on images of this size.
    """
    ran, hooks = [], []
    for m in model.modules():
        if isinstance(m, nn.Linear):
            hooks.append(m.register_forward_hook(lambda m, inputs, out: ran.append((m, inputs[0], out))))
    training, device = model.training, next(model.parameters()).device
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(2, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise InputError(f"{flag}: does not run on {size} px images ({str(e).splitlines()[0]})") from None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not ran or ran[-1][2] is not out or ran[-1][1].ndim != 2:
        raise InputError(f"{flag}: its feature cannot be found, since its output does not come from a Linear over one vector an image; "
                         "name a network that ends so, as all ResNets, ConvNeXts, ViTs, Swins and MaxViTs of torchvision do")
    return ran[-1][0]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost compound items of its Sequentials and ModuleLists, in order: residual blocks, stages, encoder layers."""
    found = []
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and any(True for item in child for _ in item.children()):
            found += [item for item in child if any(True for _ in item.children())]
        else:
            found += blocks(child)
    return found


def over_space(x: Tensor) -> Tensor:
    """Mean and standard deviation over positions.  (B, C, H, W) or (B, H, W, C) or (B, N, C) -> (B, 2C), fp32."""
    if x.ndim == 4 and not (x.shape[1] == x.shape[2] != x.shape[3]):  # all but Swin have channels first
        x = x.movedim(1, -1)
    x = x.flatten(1, -2).float()
    return torch.cat([x.mean(1), x.std(1, correction=0)], 1)


class Foundation(nn.Module):
    """F and how to feed it: `mean` and `std` of its normalisation; images are resized to its size where that differs."""

    def __init__(self, model: nn.Module, size: int, mean: list[float], std: list[float]):
        super().__init__()
        self.model, self.size, self.mean, self.std = model.requires_grad_(False), size, mean, std
        self.eval()

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, S, S) normalised -> (B, C)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size,) * 2, mode="bilinear", antialias=True, align_corners=False)
        return self.model(x)


class Extractor:
    """`extractor(x)`: features f of a copy of F, uint8 images (B, 3, S, S) -> (B, dF), fp32. Counts its forwards."""

    def __init__(self, foundation: Foundation, taps: int, device: torch.device, amp: bool):
        self.model, self.device, self.amp, self.forwards, self.seen = copy.deepcopy(foundation), device, amp, 0, []
        self.key = f"{foundation.size} {foundation.mean} {foundation.std} {taps} {amp}"
        head = last_linear(self.model, foundation.size, "--foundation")
        found = blocks(self.model.model)
        keep = sorted({round(i) for i in np.linspace(len(found) - 1, 0, min(taps, len(found)))}) if taps and found else []
        for i in keep:
            found[i].register_forward_hook(lambda m, inputs, out: self.see(out))
        head.register_forward_pre_hook(lambda m, inputs: self.seen.append(inputs[0].float()))

    def see(self, out) -> None:
        if isinstance(out, Tensor) and out.ndim in (3, 4):
            self.seen.append(over_space(out))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        self.seen.clear()
        with common.autocast(self.device, self.amp):
            self.model(common.to_input(x, self.model.mean, self.model.std, self.device))
        self.forwards += len(x)
        return torch.cat(self.seen, 1)


# ===== Method ========================================================================================================


class Reprogrammed(nn.Module):
    """A new head on F's features.  f (B, dF) -> p (B, dP), o_P (B, C):  p = phi((f - mu) / sd), o_P = W_P p.

    mu and sd are the target's statistics and not trained. phi is the identity for the linear probe, one linear map for the
    discriminant proxy, and for --proxy mlp a fixed whitening, dropout and two layers.
    """

    def __init__(self, mu: Tensor, sd: Tensor, phi: nn.Module, d_proxy: int, classes: int):
        super().__init__()
        self.register_buffer("mu", mu)
        self.register_buffer("sd", sd)
        self.phi, self.head = phi, nn.Linear(d_proxy, classes)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        p = self.phi((f - self.mu) / self.sd)
        return p, self.head(p)


def linear(weight: Tensor) -> nn.Linear:  # (d_in, d_out)
    layer = nn.Linear(*weight.shape, bias=False)
    layer.weight.data = weight.T.contiguous()
    return layer


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class Rows(NamedTuple):
    """The (view, image) pairs all methods draw from; labelled images' rows come first, view by view."""

    images: Tensor  # (R, 3, S, S) uint8
    y: Tensor  # (n_l,) labels of the labelled images
    views_l: int
    n_l: int
    views_u: int
    n_u: int

    @property
    def labels(self) -> Tensor:  # (views_l n_l,), of the labelled rows
        return self.y.repeat(self.views_l)

    def image_mean(self, z: Tensor) -> Tensor:
        """(R, d) -> (n_l + n_u, d): the mean over each image's views."""
        split = self.views_l * self.n_l
        parts = [z[:split].view(self.views_l, self.n_l, -1).mean(0)]
        return torch.cat(parts + [z[split:].view(self.views_u, self.n_u, -1).mean(0)] if self.n_u else parts)


def make_rows(labelled: Tensor, y: Tensor, unlabelled: Tensor, views_l: int, views_u: int, seed: int) -> Rows:
    """View 0 is the image itself; the others are shifted and flipped, fixed by the seed."""
    g = torch.Generator().manual_seed(seed)
    parts = [x if v == 0 else common.crop_and_flip(x, g) for x, n in ((labelled, views_l), (unlabelled, views_u)) if len(x) for v in range(n)]
    return Rows(torch.cat(parts), y, views_l, len(labelled), views_u, len(unlabelled))


def few_shot(labels: Tensor, classes: list[str], shots: int, fraction: float | None, unlabelled: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the labelled and of the unlabelled train images. Raises InputError where the set is too small."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if fraction is not None:
        chosen = order[:round(fraction * len(labels))]
        if absent := [classes[c] for c in range(len(classes)) if not (labels[chosen] == c).any()]:
            raise InputError(f"--fraction {fraction}: its {len(chosen)} images have none of class {absent[0]}"
                             f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}; raise it, or name --shots")
    else:
        by_class = [order[labels[order] == c] for c in range(len(classes))]
        for c, found in enumerate(by_class):
            if len(found) < shots:
                raise InputError(f"--shots {shots}: class {classes[c]} has only {len(found)} train images")
        chosen = torch.cat([found[:shots] for found in by_class])
    rest = order[~torch.isin(order, chosen)]
    if len(rest) < unlabelled:
        raise InputError(f"--unlabelled {unlabelled}: only {len(rest)} train images are left beside the {len(chosen)} labelled ones")
    return chosen, rest[:unlabelled]


def cached_features(file: Path, extractor: Extractor, images: Tensor) -> Tensor:
    """f of every image, (R, dF) fp16 on the CPU: read from `file` if it holds those of just these images and this foundation."""
    h = hashlib.sha256(extractor.key.encode() + images.numpy().tobytes())
    for name, t in extractor.model.state_dict().items():
        h.update(name.encode() + t.detach().cpu().contiguous().numpy().tobytes())
    if file.exists():
        try:
            saved = common.load_file(file, ("key", "features"), "cached features")
        except InputError:  # half a file, or something else's
            saved = {"key": ""}
        if saved["key"] == h.hexdigest():
            print(f"features: those of {file} are reused, F does not run", flush=True)
            return saved["features"]
        print(f"features: {file} is of other images, views or another foundation; computed anew", flush=True)
    parts, batch = [], images.split(250)
    bar = common.Progress(0, len(batch))
    for i in bar:
        parts.append(extractor(batch[i]).half().cpu())
        bar.show(f"F runs once over {len(images)} images and views")
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise InputError("--foundation: its features are not finite in fp16; do its weights belong to it?")
    common.save_atomic({"key": h.hexdigest(), "features": features}, file)
    return features


def fit(net: nn.Module, f: Tensor, q: Tensor, *, steps: int, stop: int, batch: int, lr: float, weight_decay: float, seed: int,
        name: str, held_out: tuple[Tensor, Tensor] | None = None) -> tuple[nn.Module, list[float]]:
    """Train probe or proxy on cached features: AdamW, cosine over `steps`, ended after `stop`.

    f (R, dF), q (R, C). Returns the net and, with held_out=(f, y), its cross-entropy there after each tenth of the steps.
    """
    g, losses = torch.Generator().manual_seed(seed), []
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr, weight_decay=weight_decay)
    for i in range(stop):
        rows = torch.randint(len(f), (batch,), generator=g)
        for group in opt.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * i / steps))
        loss = soft_cross_entropy(net.train()(f[rows].to(q.device).float())[1], q[rows])
        check_finite(loss, f"loss_{name}", i, "--step1-lr")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if held_out is not None and (i + 1) % (steps // 10) == 0:
            with torch.no_grad():
                losses.append(F.cross_entropy(net.eval()(held_out[0])[1], held_out[1]).item())
    return net.eval(), losses


class Step1:
    """Everything that is made of F's features: the linear probe, and the proxy. Keywords are the flags."""

    def __init__(self, rows: Rows, features: Tensor, classes: int, d_student: int, *, proxy: str, shrink: float, logit_std: float,
                 neighbours: int, spread: float, sharpen: float, pca: int, dropout: float, d_proxy: int | None, step1_steps: int,
                 step1_batch: int, step1_lr: float, step1_weight_decay: float, label_smoothing: float, seed: int, device: torch.device):
        self.rows, self.features, self.classes, self.device, self.steps, self.seed = rows, features, classes, device, step1_steps, seed
        self.proxy, self.shrink, self.logit_std = proxy, shrink, logit_std
        self.neighbours, self.spread, self.sharpen, self.label_smoothing = neighbours, spread, sharpen, label_smoothing
        self.pca, self.dropout, self.d_proxy = pca, dropout, d_proxy or d_student
        self.how = dict(steps=step1_steps, batch=step1_batch, lr=step1_lr, weight_decay=step1_weight_decay, seed=seed)
        f = features[::max(1, len(features) // 20_000)].float().to(device)  # enough for these two
        self.mu, self.sd = f.mean(0), f.std(0).clamp_min(1e-4)

    def chunks(self, used: Tensor, q: Tensor):
        """Standardised features of the rows `used` (R',) beside q (R', C), some thousands at a time."""
        for at, part in zip(used.split(4096), q.split(4096)):
            yield (self.features[at].float().to(self.device) - self.mu) / self.sd, part

    def one_hot(self, y: Tensor) -> Tensor:
        return F.one_hot(y.to(self.device), self.classes).float()

    def targets(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Rows to make the proxy from and q for them, (R',) and (R', C); labels of images outside `keep` (n_l,) bool are not looked at."""
        r, known = self.rows, keep.nonzero()[:, 0]
        used = keep.repeat(r.views_l).nonzero()[:, 0]
        q = self.one_hot(r.labels[used])
        if not (r.n_u and self.neighbours):
            return used, q
        # Which images are alike? Directions in which images of one class differ tell nothing, so they count less.
        W = whitening(class_moments(self.chunks(used, q))[1], self.shrink)
        order = torch.cat([known, torch.arange(r.n_l, r.n_l + r.n_u)])  # held-out images take no part at all
        z = ((r.image_mean(self.features.float())[order].to(self.device) - self.mu) / self.sd) @ W
        q_u = propagate_labels(z, r.y[known].to(self.device), self.classes, self.neighbours, self.spread)[len(known):] ** self.sharpen
        return (torch.cat([used, torch.arange(r.views_l * r.n_l, len(self.features))]),
                torch.cat([q, (q_u / q_u.sum(1, keepdim=True)).repeat(r.views_u, 1)]))

    def make(self, name: str, keep: Tensor, stop: int, held_out: tuple[Tensor, Tensor] | None = None) -> tuple[nn.Module, list[float]]:
        """Probe or proxy from the labels of `keep`; with held_out=(f, y), also its cross-entropy there after each tenth of the steps."""
        if name == "probe":
            used = keep.repeat(self.rows.views_l).nonzero()[:, 0]
            q, phi, d = self.one_hot(self.rows.labels[used]), nn.Identity(), len(self.mu)
        else:
            used, q = self.targets(keep)
            means, covariance = class_moments(self.chunks(used, q))
            if self.proxy == "discriminant":
                phi, weight, bias = discriminant(means, covariance, self.shrink)
                net = Reprogrammed(self.mu, self.sd, linear(phi), phi.shape[1], self.classes).to(self.device)
                net.head.weight.data, net.head.bias.data = weight, bias
                return net.eval(), []
            W = whitening(covariance, self.shrink)
            total = class_moments(self.chunks(used, torch.ones(len(q), 1, device=self.device)))[1]
            eigenvalues, vectors = torch.linalg.eigh((W.T @ total @ W).cpu())
            W = W @ (vectors[:, -self.pca:] / eigenvalues[-self.pca:].mean().sqrt()).to(self.device)
            d = self.d_proxy
            phi = nn.Sequential(linear(W).requires_grad_(False), nn.Dropout(self.dropout), nn.Linear(W.shape[1], d), nn.BatchNorm1d(d),
                                nn.ReLU(), nn.Linear(d, d))
        q = q * (1 - self.label_smoothing) + self.label_smoothing / self.classes
        net = Reprogrammed(self.mu, self.sd, phi, d, self.classes).to(self.device)
        return fit(net, self.features[used], q, stop=stop, name=name, held_out=held_out, **self.how)

    def train(self, name: str) -> tuple[nn.Module, dict]:
        """Probe or proxy.  -> (net, what was chosen for it)

        The discriminant's log-posterior is far too sure; its spread over classes is scaled to --logit-std. The scale at which held-out
        labels are likeliest makes a softer teacher, 1.5 points worse on held-out CIFAR-10 (two seeds).
        What is trained trains as long as a fifth of the labelled images chooses by cross-entropy, then anew on all of them.
        """
        r = self.rows
        every = torch.ones(r.n_l, dtype=torch.bool)
        if name == "proxy" and self.proxy == "discriminant":
            net, _ = self.make(name, every, 0)
            with torch.no_grad():
                o = torch.cat([net(f.to(self.device).float())[1] for f in self.features.split(4096)])
            scale = (o - o.mean(1, keepdim=True)).std().item() / self.logit_std
            net.head.weight.data /= scale
            net.head.bias.data /= scale
            return net, {"scale": scale}
        keep = every.clone()
        for c in range(self.classes):  # a fifth of each class, none of a class with fewer than five
            mine = (r.y == c).nonzero()[:, 0]
            keep[mine[:len(mine) // 5]] = False
        f, y = self.features[:r.n_l][~keep].float().to(self.device), r.y[~keep].to(self.device)  # view 0: the image itself
        with seeded(self.seed):
            losses = [] if keep.all() else self.make(name, keep, self.steps, (f, y))[1]
        stop = (int(np.argmin(losses)) + 1) * (self.steps // 10) if losses else self.steps
        with seeded(self.seed):
            return self.make(name, every, stop)[0], {"steps": stop}

    @torch.no_grad()
    def teach(self, net: nn.Module) -> tuple[Tensor, Tensor]:
        """What a student is taught: p without its mean, and o_P, of every row.  -> (R, dP) fp16, (R, C) fp32

        ABLATE: without taking off the mean most of cos(psi(h), p) is the same for all images.
        """
        parts = [net(f.to(self.device).float()) for f in self.features.split(4096)]
        p = torch.cat([p.cpu() for p, _ in parts])
        return (p - p.mean(0)).half(), torch.cat([o for _, o in parts])


def train_student(student: nn.Module, rows: Rows, data: common.Data, *, p: Tensor | None = None, logits_p: Tensor | None = None,
                  schedule: str, A: float, B: float, ce_weight: float, T: float, steps: int, batch_size: int, unlabelled_batch: int,
                  lr: float, momentum: float, weight_decay: float, warmup: float, amp: bool, seed: int, device: torch.device, name: str, log=None) -> nn.Module:
    """Step 2. p and logits_p teach every row; without both this is training from scratch. Draws depend on the seed alone."""
    tap, teaches = {}, p is not None or logits_p is not None
    head = last_linear(student, data.size, "--target")
    hook = head.register_forward_pre_hook(lambda m, inputs: tap.__setitem__("h", inputs[0]))
    with seeded(seed):
        psi = nn.Linear(head.in_features, p.shape[1]).to(device) if p is not None else None
    params = [*student.parameters(), *(psi.parameters() if psi else ())]
    opt = torch.optim.SGD(params, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max(lr, 1e-12), max(2, steps), pct_start=warmup, cycle_momentum=False)
    g, split, labels, mean = torch.Generator().manual_seed(seed), rows.views_l * rows.n_l, rows.labels, {}
    student.train()
    bar, t0 = common.Progress(0, steps), time.time()
    for i in bar:
        mine = torch.randint(split, (batch_size,), generator=g)
        theirs = torch.randint(split, len(rows.images), (unlabelled_batch,), generator=g) if rows.n_u else mine[:0]
        at = torch.cat([mine, theirs]) if teaches else mine
        with common.autocast(device, amp):
            out = student(common.to_input(rows.images[at], data.mean, data.std, device))
        out = (out if isinstance(out, Tensor) else out[0]).float()  # Inception and GoogLeNet add auxiliary heads while training
        a, b = progress_weights(i / steps, schedule)
        terms = {"ce": ce_weight * F.cross_entropy(out[:len(mine)], labels[mine].to(device))}
        if p is not None:
            terms["feature"] = a * A * cosine_loss(psi(tap["h"].float()), p[at].to(device).float())
        if logits_p is not None:
            terms["kd"] = b * B * distillation_loss(logits_p[at.to(logits_p.device)].to(device), out, T)
        for term, value in terms.items():
            check_finite(value, f"loss_{name} ({term})", i, "--lr")
        opt.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        opt.step()
        sched.step()
        mean = {k: 0.95 * mean.get(k, v.item()) + 0.05 * v.item() for k, v in terms.items()}
        img_per_s = (i + 1) * len(at) / (time.time() - t0)
        bar.show(f"{name} | " + " | ".join(f"{k} {v:.3f}" for k, v in mean.items()) + f" | a {a:.2f} b {b:.2f} | {img_per_s:.0f} img/s")
        if log and ((i + 1) % 20 == 0 or i + 1 == steps):
            log.write("step", method=name, iteration=i + 1, lr=opt.param_groups[0]["lr"], a=a, b=b, **mean, img_per_s=img_per_s)
    hook.remove()
    return student.eval()


def check_finite(value: Tensor, name: str, iteration: int, flag: str) -> None:
    if not math.isfinite(value.item()):
        raise InputError(f"{name} is {value.item()} at iteration {iteration}; lower {flag}")


@contextmanager
def seeded(seed: int):
    """Within it torch's global generator starts from the seed; after it, it is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ===== Evaluation and figures ========================================================================================


@torch.no_grad()
def head_accuracy_pct(net: nn.Module, features: Tensor, y: Tensor, device: torch.device) -> float:
    """Top-1 in percent of probe or proxy on cached features (R, dF)."""
    hits = sum((net(f.float().to(device))[1].argmax(1).cpu() == t).sum().item() for f, t in zip(features.split(4096), y.split(4096)))
    return 100 * hits / len(y)


def print_table(table: dict[str, list[dict]], title: str) -> None:
    """Rows = methods, mean +- sample std over seeds."""
    print(f"\n{title:<36}{'top-1 %':>15}{'step-1 params':>15}{'F forwards':>12}{'step 1, s':>11}{'step 2, s':>11}{'kB':>8}")
    for name, runs in table.items():
        acc = [r["acc"] for r in runs]
        spread = f" +- {np.std(acc, ddof=1):.2f}" if len(acc) > 1 else ""
        mean = {k: np.mean([r[k] for r in runs]) for k in runs[0]}
        print(f"{name:<36}" + f"{mean['acc']:.2f}{spread}".rjust(15) + f"{mean['params']:>15.0f}{mean['forwards']:>12.0f}"
              f"{mean['step1_s']:>11.1f}{mean['step2_s']:>11.1f}{mean['bytes'] / 1000:>8.0f}")


def plot(folders: list[str], out: str | None) -> None:
    """Accuracy against labelled images a class, mean +- sample std over a folder's logs; a line for each method that all logs have."""
    runs = []
    for folder in folders:
        logs = common.finished_logs(folder, "trainable_params_step1", "tdmr.py")
        runs.append((logs[0][0]["args"]["shots"], [log[-1] for log in logs]))
    runs.sort(key=lambda run: run[0])
    shots = [n for n, _ in runs]
    plt = common.pyplot()
    fig, ax = plt.subplots(figsize=(8, 4))
    for method in METHODS:
        key = "acc_" + method.replace("-", "_") + "_pct"
        if all(key in end for _, ends in runs for end in ends):
            acc = [[end[key] for end in ends] for _, ends in runs]
            ax.errorbar(shots, [np.mean(a) for a in acc], [np.std(a, ddof=1) if len(a) > 1 else 0 for a in acc], marker="o", capsize=3, label=method)
    ax.set_xscale("log")
    ax.set_xticks(shots, [str(n) for n in shots])
    ax.minorticks_off()
    ax.set_xlabel("labelled images a class")
    ax.set_ylabel("top-1 %")
    ax.grid(alpha=0.3)
    ax.legend()
    file = Path(out or f"{folders[0].rstrip('/')}.png")
    fig.savefig(file, dpi=110, bbox_inches="tight")
    print(file)


# ===== Run ===========================================================================================================


def load_foundation(args: argparse.Namespace, device: torch.device) -> Foundation:
    """A given file, else weights/<data>_<arch>.pt, else torchvision's weights. Raises InputError for anything else."""
    arch = args.foundation or "resnet20x2"
    file, ck = Path(args.foundation_weights or common.ROOT / "weights" / f"{args.foundation_data}_{arch}.pt"), {}
    if args.foundation_weights or file.exists():
        ck = common.load_file(file, (), "a checkpoint")
        if args.foundation and ck.get("arch", arch) != arch:
            raise InputError(f"--foundation {arch}: {file} holds a {ck['arch']}")
        arch = ck.get("arch", arch)
        model, state = build("--foundation", arch, len(ck.get("classes", range(1000)))), ck.get("state_dict", ck)
        try:
            model.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as e:
            raise InputError(f"{file}: does not fit {arch}: {str(e).splitlines()[min(1, str(e).count(chr(10)))].strip()}") from None
    elif common.CIFAR_ARCH.fullmatch(arch):
        raise InputError(f"no weights for {arch} on {args.foundation_data}: expected weights/{file.name} or --foundation-weights FILE; "
                         f"make them with: python common.py pretrain --arch {arch} --dataset {args.foundation_data}")
    else:
        model = build("--foundation", arch, 1000)
        try:
            model = common.build_model(arch, 1000, "DEFAULT")
        except Exception as e:
            raise InputError(f"torchvision's weights for {arch} cannot be had ({e}); download them, then --foundation-weights FILE") from None
    print(f"foundation: {arch}, {file.name if ck else 'weights of torchvision'}"
          + (f", {ck['acc_pct']:.2f} % on {ck['dataset']} by its own record" if {"acc_pct", "dataset"} <= set(ck) else ""))
    mean, std = common.IMAGENET_NORM
    foundation = Foundation(model, ck.get("size", 224), ck.get("mean", mean), ck.get("std", std))
    return foundation.to(device, memory_format=torch.channels_last)


def build(flag: str, arch: str, classes: int, seed: int = 0) -> nn.Module:
    """common.build_model with seeded initial weights, and a message that names the flag."""
    try:
        with seeded(seed):
            return common.build_model(arch, classes).to(memory_format=torch.channels_last)
    except InputError as e:
        raise InputError(str(e).replace("--arch", flag)) from None


def take(split, index: Tensor) -> Tensor:
    """Images of a split by index, uint8 (n, 3, S, S)."""
    if isinstance(split, torch.utils.data.TensorDataset):
        return split.tensors[0][index]
    return torch.stack([split[i][0] for i in index.tolist()]) if len(index) else torch.zeros(0, 3, 224, 224, dtype=torch.uint8)


def labels_of(split) -> Tensor:
    return split.tensors[1] if isinstance(split, torch.utils.data.TensorDataset) else torch.as_tensor(split.targets)


def step1_keywords() -> list[str]:
    """The keywords of Step1 that are flags."""
    return [k for k in inspect.signature(Step1).parameters if k not in ("rows", "features", "classes", "d_student", "seed", "device")]


def main(args: argparse.Namespace) -> None:
    if args.plot:
        return plot(args.plot, args.out)
    device = common.pick_device(args.device)
    data = common.load_data(args.dataset, args.data_dir)
    if data.train is None:
        raise InputError(f"--dataset {args.dataset}: has no train images; expected a train/ folder beside val/")
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: one seed is named twice")
    methods = [m for m in METHODS if m in args.methods or "all" in args.methods]
    out = common.check_out(Path(args.out or f"runs/tdmr/{data.name}_{args.target}_"
                                + (f"{args.fraction:g}" if args.fraction is not None else f"{args.shots}") + f"_{args.unlabelled}"))
    for seed in args.seeds:  # every check comes before anything is written
        few_shot(labels_of(data.train), data.classes, args.shots, args.fraction, args.unlabelled, seed)
    last_linear(build("--target", args.target, len(data.classes)), data.size, "--target")
    foundation = load_foundation(args, device)
    amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    extractor = Extractor(foundation, args.taps, device, amp)
    print(f"device: {common.device_name(device)}, {torch.get_num_threads()} threads, {'bf16 autocast' if amp else 'fp32'}")
    table = {}
    for seed in args.seeds:
        folder = out / f"seed{seed}" if len(args.seeds) > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        for name, row in run_seed(args, seed, folder, data, foundation, extractor, methods, device, amp).items():
            table.setdefault(name, []).append(row)
    few = f"{args.shots} labelled images a class" if args.fraction is None else f"{100 * args.fraction:g} % labelled images"
    print_table(table, f"{args.target} on {data.name}")
    print(f"{few}, {args.unlabelled} unlabelled; last state, all {len(data.test)} test images\n"
          f"{out}/: log.jsonl{', tdmr.pt' if 'tdmr' in methods else ''}{', in a folder for each seed' if len(args.seeds) > 1 else ''}")


# What teaches the student: whose space and logits, and whether its features (p) and its logits are used.
TEACHERS = {"scratch": (None, False, False), "kd": ("probe", False, True), "fitnet": ("probe", True, False), "tdmr": ("proxy", True, True),
            "kd-proxy": ("proxy", False, True), "tdmr-no-proxy": ("probe", True, True), "tdmr-no-progression": ("proxy", True, True)}


def run_seed(args: argparse.Namespace, seed: int, folder: Path, data: common.Data, foundation: Foundation, extractor: Extractor,
             methods: list[str], device: torch.device, amp: bool) -> dict[str, dict]:
    """All methods on one draw of images. Returns the table's rows, method -> figures."""
    log, C, results, table = common.RunLog(folder), len(data.classes), {}, {}
    log.start(args, device)
    labels = labels_of(data.train)
    chosen, rest = few_shot(labels, data.classes, args.shots, args.fraction, args.unlabelled, seed)
    rows = make_rows(take(data.train, chosen), labels[chosen], take(data.train, rest), args.labelled_views, args.views, seed)
    before, t0 = extractor.forwards, time.time()
    features = cached_features(folder / "features.pt", extractor, rows.images)
    features_s, forwards = time.time() - t0, extractor.forwards - before

    # Step 1: probe and proxy, each only if a method needs it.
    student = build("--target", args.target, C, seed)
    d_student = last_linear(student, data.size, "--target").in_features
    step1 = Step1(rows, features, C, d_student, seed=seed, device=device, **{k: getattr(args, k) for k in step1_keywords()})
    teachers, train_s, params, test_features = {}, {}, {}, None
    for name in dict.fromkeys("probe" if m == "probe" else TEACHERS.get(m, (None,))[0] for m in methods):
        if name is None:
            continue
        t0 = time.time()
        net, choice = step1.train(name)
        teachers[name], train_s[name], params[name] = step1.teach(net), time.time() - t0, trainable(net)
        if test_features is None:
            test_features = cached_features(folder / "features_test.pt", extractor, take(data.test, torch.arange(len(data.test))))
        results[f"acc_{name}_pct"] = acc = head_accuracy_pct(net, test_features, labels_of(data.test), device)
        log.write("eval", method=name, acc_pct=acc, **choice, params=params[name], train_s=train_s[name])
        print(f"step 1: {name} {acc:.2f} %, {params[name]} parameters, " + " ".join(f"{k} {v:g}" for k, v in choice.items()) + f", {train_s[name]:.1f} s", flush=True)

    # Step 2: one student a method, all from the same initial weights.
    size_f, size_s = (sum(t.numel() * t.element_size() for t in net.state_dict().values()) for net in (foundation, student))
    how = dict(B=args.kd_weight, ce_weight=args.ce_weight, steps=args.steps, batch_size=args.batch_size, seed=seed,
               unlabelled_batch=args.unlabelled_batch, momentum=args.momentum, weight_decay=args.weight_decay, warmup=args.warmup, amp=amp, device=device, log=log)
    for name in methods:
        t0 = time.time()
        if name == "probe":
            row = dict(acc=results["acc_probe_pct"], params=params["probe"], forwards=forwards, step1_s=features_s + train_s["probe"],
                       step2_s=0.0, bytes=size_f)
        elif name == "finetune":  # the upper reference: a copy of F with a new head, all of it trained on the labelled images
            net = copy.deepcopy(foundation).requires_grad_(True)
            head = last_linear(net, data.size, "--foundation")
            with seeded(seed):
                new = nn.Linear(head.in_features, C).to(device)
            head.weight, head.bias, head.out_features = new.weight, new.bias, C
            task = data._replace(mean=foundation.mean, std=foundation.std)
            net = train_student(net, rows, task, schedule="constant", A=0.0, T=1.0, lr=args.finetune_lr, name=name, **how)
            row = dict(acc=0.0, params=trainable(net), forwards=args.steps * args.batch_size, step1_s=time.time() - t0, step2_s=0.0, bytes=size_f)
            row["acc"] = common.accuracy_pct(net, task, data.test, device)
        else:
            source, uses_p, uses_logits = TEACHERS[name]
            p, logits_p = (teachers[source][0] if uses_p else None, teachers[source][1] if uses_logits else None) if source else (None, None)
            net = build("--target", args.target, C, seed).to(device)
            net = train_student(net, rows, data, p=p, logits_p=logits_p, A=args.fitnet_weight if name == "fitnet" else args.feature_weight,
                                schedule=args.schedule if name in ("tdmr", "tdmr-no-proxy") else "constant", lr=args.lr, name=name,
                                T=args.probe_temperature if source == "probe" else args.temperature, **how)
            step1_s = features_s + (train_s[source] if uses_logits or name != "fitnet" else 0) if source else 0.0
            row = dict(acc=0.0, params=params[source] if source and name != "fitnet" else 0, forwards=forwards if source else 0,
                       step1_s=step1_s, step2_s=time.time() - t0, bytes=size_s)
            row["acc"] = common.accuracy_pct(net, data, data.test, device)
        table[name], results[f"acc_{name.replace('-', '_')}_pct"] = row, row["acc"]
        log.write("eval", method=name, acc_pct=row["acc"], **{k: v for k, v in row.items() if k != "acc"})
        print(f"{name}: {row['acc']:.2f} %", flush=True)
        if name == "tdmr":
            state = {k: v.cpu().contiguous() for k, v in net.state_dict().items()}
            common.save_atomic({"state_dict": state, "arch": args.target, "dataset": data.name, "classes": data.classes, "mean": data.mean,
                                "std": data.std, "size": data.size, "acc_pct": row["acc"], "seed": seed}, folder / "tdmr.pt")
    of = table.get("tdmr", {})
    log.write("end", **results, step1_s=of.get("step1_s"), step2_s=of.get("step2_s"), features_s=features_s, step1_train_s=train_s.get("proxy"),
              finetune_s=table.get("finetune", {}).get("step1_s"), foundation_forwards=forwards, trainable_params_step1=params.get("proxy"),
              params_foundation=sum(t.numel() for t in foundation.parameters()), bytes=size_s, wall_s=time.time() - log.t0,
              peak_mib=common.peak_mib())
    return table


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


if __name__ == "__main__":
    common.run(main, parse)
