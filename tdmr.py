"""TDMR: what a large frozen network knows, reprogrammed for a small network of another architecture.

    "Towards Efficient Task-Driven Model Reprogramming with Foundation Models"
    Shoukai Xu, Jiangchao Yao, Ran Luo, Shuhai Zhang, Zihao Lian, Mingkui Tan, Bo Han, Yaowei Wang.
    2023, arXiv 2304.02263.

Read this first. No code was published, and we could read only the abstract. It fixes the contract: a
foundation model of any architecture, a small target model of quite another one, only the target task's
data, a *proxy space* against the mismatch of tasks and domains, then *progressive distillation* from it.
Everything more precise below is **our design**, every constant is ours, and no number here is or
reproduces one of the paper's.

The idea. A foundation model F learned other classes from other images. It stays frozen and runs once
over the target images; a small map, found in seconds, projects its features into a space made for the
target task. The target model S learns to match that space, and ever more its decisions alone, on
labelled and unlabelled target images alike.

The algorithm.

    f <- F(x), once for every image and view, cached, standardised on the target's images   # the domain
    step 1, reprogram F, in closed form:
        Sigma <- covariance of f within classes            # what varies within a class is not the task
                 + shrink I, with which the labels of left-out fifths are likeliest
        q <- y where there is a label, else labels spread along the k-NN graph of Sigma^-1/2 f;
             Sigma again, from all q, shrink less by as much as images are more
        phi <- the C-1 directions of Sigma^-1/2 f in which the classes lie apart             # the task
        p <- phi f,   o_P = log-posterior of the classes in p, scaled to a fixed standard deviation
    step 2, reprogram S; t goes from 0 to 1:
        h, o <- S's feature and logits for the same view of the same image
        S, psi <- S, psi - lr * grad [ CE(o, y)                          on labelled images
                                       + a(t) A (1 - cos(psi(h), p))     on unlabelled ones
                                       + b(t) B T^2 KL(o_P/T || o/T) ]   on all of them

Symbols ("paper" is our notation; see above). R counts (view, image) pairs, labelled images first.

    paper       code              shape            flag
    F, S        foundation, student                --foundation --foundation-data --target
    f           features          (R, dF), fp16    --taps --views --labelled-views
    q           q                 (R, C)           --neighbours --spread --sharpen
    phi, p      proxy.phi, p      (dF, C-1)        --shrink
    o_P         proxy.head        (R, C), logits   --logit-std
    a(t), b(t)  progress_weights  two floats       --schedule
    A, B, T     the same          float            --feature-weight --kd-weight --temperature

Protocol: the questions that are otherwise asked in issues.

    Which parameters move?   Step 1: phi and the head on it. Step 2: all of S, and psi. Never F, except
                             in the row `finetune`, on a copy.
    Who sees what?           All methods: the same labelled images, views, batches, initial weights and
                             steps. Every distilling method: the same unlabelled images and cached f.
    Where are test images?   In the last state's accuracy and nowhere else. Fifths of the labelled images
                             choose the shrinkage and how long the probe trains, and are then put back.

Departures from the spirit of the abstract, with the flag that goes back.

    D1  Features of several depths, not the last alone.                                  --taps 0
    D2  Unlabelled images take part in step 1 by label propagation.                      --neighbours 0
    D3  The proxy is Fisher's discriminant space, in closed form, not a trained network.
    D4  Logits are distilled from the first step on.               --schedule features-then-logits
    D5  bf16 autocast in F and in S's training, where the hardware has it.               --no-amp

    python tdmr.py                                # 20 labels a class, 4,000 images without: 2 minutes
    python tdmr.py --unlabelled 0                 # the labelled images alone: no p, nothing fades
    python tdmr.py --methods all                  # every ablation, and F fine-tuned
    python tdmr.py --foundation swin_t --dataset /path/to/imagefolder --target mobilenet_v3_small
"""

import argparse
import hashlib
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import InputError, number, seeded

# ===== Hyperparameters ==============================================================================

METHODS = ("scratch", "probe", "kd", "fitnet", "tdmr", "kd-proxy", "tdmr-no-proxy",
           "tdmr-no-progression", "finetune")
SCHEDULES = ("features-then-logits", "fade", "decay", "constant")


SHRINKS = (10, 3, 1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # that --shrink auto chooses from


def build_parser() -> argparse.ArgumentParser:
    p = common.Parser(prog="tdmr.py", description=__doc__.split("\n\n")[0])
    share, positive = number(float, 0, 1), number(float, 0)
    whole, count = number(int, 0), number(int, 1)
    a = p.add_argument_group("task").add_argument
    a("--foundation", help="F: a name or FILE.py:NAME; None: as the weights say, or resnet20x2")
    a("--foundation-data", default="cifar100", help="picks weights/<data>_<foundation>.pt")
    a("--foundation-weights", metavar="FILE", help="checkpoint or state_dict of F; none: its own")
    a("--target", default="resnet8", help="S, from scratch: resnet8, torchvision's, or FILE.py:NAME")
    a("--dataset", default="fashion", help="fashion, fashion-mnist, cifar10, cifar100, a folder, a .npz")
    a("--data-dir", default="data", help="where cifar lies, or is downloaded to")
    a("--size", type=number(int, 8), help="px at which a folder is read; None: 32, 64 or 224, as fits")
    a("--shots", type=count, default=20, help="labelled images a class")
    a("--fraction", type=share, help="labelled share of the train images, in place of --shots")
    a("--unlabelled", type=whole, default=4000, help="further train images, without labels, at most")
    a("--methods", nargs="+", default=["scratch", "probe", "kd", "fitnet", "tdmr"], metavar="METHOD",
      choices=[*METHODS, "all"], help=f"rows of the table: {', '.join(METHODS)}, or all")
    a = p.add_argument_group("features").add_argument
    a("--views", type=count, default=1, help="of an unlabelled image: itself, then shifted and flipped")
    a("--labelled-views", type=count, default=8, help="of a labelled image; there are few of them")
    a("--taps", type=whole, default=9, help="depths of F that join f; 0: the last feature alone")
    a = p.add_argument_group("step 1: the proxy").add_argument
    a("--shrink", type=number(float, 1e-6, word="auto"), default="auto",
      help="of the covariance within classes; auto: by left-out labels")
    a("--logit-std", type=number(float, 1e-3), default=6.0, help="standard deviation of o_P")
    a("--neighbours", type=whole, default=10, help="in the k-NN graph; 0: no label propagation")
    a("--spread", type=number(float, 0, 0.9999), default=0.95, help="share taken from the neighbours")
    a("--sharpen", type=number(float, 0.1), default=4.0, help="power of propagated probabilities")
    a("--step1-steps", type=number(int, 10), default=600, help="of the linear probe, at most")
    a("--step1-batch", type=number(int, 2), default=256, help="rows of cached features a step")
    a("--step1-lr", type=positive, default=3e-3, help="AdamW with a cosine schedule")
    a("--step1-weight-decay", type=positive, default=1e-2, help="AdamW, on all weights")
    a = p.add_argument_group("step 2: the target").add_argument
    a("--schedule", default="fade", choices=SCHEDULES, help="a(t), b(t). fade: features go, logits stay")
    a("--feature-weight", type=positive, default=5.0, help="A: of the cosine loss to p")
    a("--fitnet-weight", type=positive, default=5.0, help="the same for FitNet")
    a("--kd-weight", type=positive, default=1.0, help="B: of the distilled logits")
    a("--ce-weight", type=positive, default=1.0, help="of the labelled images' cross-entropy")
    a("--temperature", type=number(float, 1e-3), help="T of o_P; None: 2, 8 with labelled images alone")
    a("--probe-temperature", type=number(float, 1e-3), default=4.0, help="T of the probe's; usual: 4")
    a("--steps", type=count, default=600, help="of every student")
    a("--batch-size", type=number(int, 2), default=32, help="labelled images a step")
    a("--unlabelled-batch", type=whole, default=64, help="unlabelled images a step")
    a("--lr", type=positive, default=0.05, help="peak of the one-cycle schedule, SGD Nesterov")
    a("--momentum", type=share, default=0.9, help="Nesterov momentum")
    a("--weight-decay", type=positive, default=5e-4, help="on all weights")
    a("--warmup", type=share, default=0.1, help="share of the steps in which the rate rises")
    a("--finetune-lr", type=positive, default=0.01, help="peak rate of the row finetune")
    a = p.add_argument_group("run").add_argument
    a("--out", help="folder of log and features; None: runs/tdmr/<flags>/seed0")
    a("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0], help="a run and a folder each")
    a("--device", default="auto", help="auto, cpu, cuda, mps")
    a("--workers", type=number(int, 0, 256), help="that decode a folder's images; None: 1 to 8")
    a("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast; None: where it is fast")
    return p


# ===== Equations ====================================================================================


def progress_weights(t: float, schedule: str) -> tuple[float, float]:
    """(a, b): weights of feature and of logit distillation at the progress t in [0, 1] of step 2. Ours.

    features-then-logits  1 - t, t        decay     1 - t, 1 - t
    fade                  1 - t, 1        constant  1, 1
    """
    # ABLATE: constant weights (tdmr-no-progression) 81.56 +- 0.20, fade 81.35 +- 0.30: progression does
    # not pay. The default fades because the abstract says progressive (results/tdmr.md).
    return {"features-then-logits": (1 - t, t), "fade": (1 - t, 1.0), "decay": (1 - t, 1 - t),
            "constant": (1.0, 1.0)}[schedule]


def cosine_loss(h: Tensor, p: Tensor) -> Tensor:
    """mean_i [1 - cos(h_i, p_i)].  (B, d), (B, d) -> scalar in [0, 2]; 0 for aligned features."""
    return (1 - F.cosine_similarity(h, p, dim=1)).mean()


def distillation_loss(teacher_logits: Tensor, student_logits: Tensor, T: float) -> Tensor:
    """Hinton et al. 2015: T^2 KL(softmax(teacher/T) || softmax(student/T)).  (B, C) x 2 -> scalar, nats.

    At T = 1 its gradient is that of the cross-entropy with soft targets.
    """
    p, q = F.log_softmax(teacher_logits / T, 1), F.log_softmax(student_logits / T, 1)
    return T**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def spread(o: Tensor) -> Tensor:
    """Standard deviation of logits (B, C) around each image's mean."""
    return (o - o.mean(1, keepdim=True)).std()


def class_sums(rows) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks (f (n, d), q (n, C)), q soft labels -> sums of q (C,), of q f (C, d), of f f^T (d, d)."""
    # Sums over chunks: the features of all rows at once, in fp32, need not fit anywhere. Soft labels
    # make an image count in several classes, each in its share.
    n = m = s = 0
    for f, q in rows:
        n, m, s = n + q.sum(0), m + q.T @ f, s + (f.T * q.sum(1)) @ f
    return n, m, s


def class_moments(n: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Those sums -> class means (C, d) and the covariance (d, d) within classes."""
    means = m / n[:, None]
    return means, (s - (means.T * n) @ means) / n.sum()


def in_units(covariance: Tensor) -> Tensor:
    return covariance / covariance.diagonal().mean().clamp_min(1e-6)


def whitening(covariance: Tensor, shrink: float) -> Tensor:
    """W (d, d) with W^T (S + shrink I) W = I, S the covariance in units of its mean eigenvalue."""
    S = in_units(covariance)
    eigenvalues, vectors = torch.linalg.eigh(S.cpu())  # MPS has no eigh
    return (vectors / (eigenvalues.clamp_min(0) + shrink).sqrt()).to(S.device)


def discriminant(means: Tensor, covariance: Tensor, shrink: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fisher 1936, Rao 1948: the space in which classes of one common covariance lie apart.

    means (C, d), covariance (d, d) within classes -> phi (d, C-1), and the head of the log-posterior
    there, all classes as frequent, weight (C, C-1) and bias (C,):
        p = f phi,   o_c = (p - g) . m_c - |m_c|^2 / 2,   g + m_c the mean of class c in p, g that of all
    """
    # Divided by what varies within a class, distances between means tell how far classes lie apart.
    # ABLATE: W = torch.eye(len(W)) is the nearest class mean: 8 to 12 points worse, measured before logs
    # were kept. --shrink 0.3 makes a proxy a point worse at 100 labels a class (results/tdmr.md).
    W, g = whitening(covariance, shrink), means.mean(0)
    m = (means - g) @ W
    # Nothing is lost by keeping only C-1 directions: across them all classes have the same mean.
    vectors = torch.linalg.svd(m.cpu(), full_matrices=False)[2].to(m.device)
    directions = vectors[:max(1, len(m) - 1)].T
    phi, m = W @ directions, m @ directions
    return phi, m, -(m * m).sum(1) / 2 - m @ (g @ phi)


def propagate_labels(z: Tensor, y: Tensor, classes: int, neighbours: int, spread: float,
                     iterations: int = 40) -> Tensor:
    """Zhou et al. 2004: Q <- spread D^-1/2 W D^-1/2 Q + (1 - spread) Y, rows then scaled to 1.

    z (n, d), y (m,) labels of its first m rows -> (n, C) probabilities; uniform where no label reaches.
    W_ij = max(0, cos(z_i, z_j))^3 among the nearest neighbours, symmetric (Iscen et al. 2019).
    """
    z, n, k = F.normalize(z, dim=1), len(z), min(neighbours, len(z) - 1)
    top, near = [], []
    for rows in torch.arange(n).split(2000):  # never more than 2000 n similarities at once
        s = z[rows] @ z.T
        s[torch.arange(len(rows)), rows] = -1  # nobody is its own neighbour
        values, index = s.topk(k, 1)
        top.append(values.clamp_min(0) ** 3)
        near.append(index)
    i, j = torch.arange(n, device=z.device).repeat_interleave(k), torch.cat(near).flatten()
    # An edge counts half from either end.
    i, j, w = torch.cat([i, j]), torch.cat([j, i]), torch.cat(top).flatten().repeat(2) / 2
    degree = torch.zeros(n, device=z.device).index_add(0, i, w).clamp_min(1e-8)
    w = (w * (degree[i] * degree[j]).rsqrt())[:, None]
    Y = torch.zeros(n, classes, device=z.device)
    Y[torch.arange(len(y)), y] = 1
    # Of its own label an image keeps 1 - spread in each round; the rest comes from those like it.
    Q = Y
    for _ in range(iterations):
        Q = spread * torch.zeros_like(Q).index_add(0, i, w * Q[j]) + (1 - spread) * Y
    return (Q + 1e-12) / (Q + 1e-12).sum(1, keepdim=True)


# ===== Model surgery ================================================================================


def last_linear(model: nn.Module, size: int, flag: str) -> nn.Linear:
    """The Linear that the output comes from; its input is the feature. Found by one run of the network.

    Raises InputError where there is none, as in SqueezeNet, or where images of this size do not fit.
    """
    ran, hooks = [], []
    for m in model.modules():
        if isinstance(m, nn.Linear):
            hook = m.register_forward_hook(lambda m, inputs, out: ran.append((m, inputs[0], out)))
            hooks.append(hook)
    training, x = model.training, torch.zeros(2, 3, size, size, device=next(model.parameters()).device)
    try:
        common.check_network(model.eval(), x)  # after which it takes channels_last images
        with torch.no_grad():
            out = model(x)
    except InputError as e:
        raise InputError(f"{flag}: {e}") from None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not ran or ran[-1][2] is not out or ran[-1][1].ndim != 2:
        raise InputError(f"{flag}: its feature cannot be found, since its output does not come from a "
                         "Linear over one vector an image; ResNets, ConvNeXts, ViTs, Swins end so")
    return ran[-1][0]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost compound items of its Sequentials and ModuleLists, in order: blocks, stages."""
    def inside(module: nn.Module) -> list[nn.Module]:
        found = []
        for child in module.children():
            items = list(child) if isinstance(child, (nn.Sequential, nn.ModuleList)) else []
            compound = [item for item in items if [*item.children()]]
            found += compound or inside(child)
        return found

    # Inception and VGG have none of that kind: what they are put together from, then.
    return inside(model) or [m for m in model.children() if [*m.children()]]


def over_space(x: Tensor) -> Tensor:
    """Mean and deviation over positions.  (B, C, H, W) or (B, H, W, C) or (B, N, C) -> (B, 2C), fp32."""
    if x.ndim == 4 and not (x.shape[1] == x.shape[2] != x.shape[3]):  # all but Swin have channels first
        x = x.movedim(1, -1)
    x = x.flatten(1, -2).float()
    return torch.cat([x.mean(1), x.std(1, correction=0)], 1)


class Foundation(nn.Module):
    """F and how to feed it: normalised images (B, 3, S, S), resized to its size, -> logits (B, C)."""

    def __init__(self, model: nn.Module, size: int, mean: list[float], std: list[float]):
        super().__init__()
        self.model, self.size, self.mean, self.std = model.requires_grad_(False), size, mean, std
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            side = (self.size, self.size)
            x = F.interpolate(x, size=side, mode="bilinear", antialias=True, align_corners=False)
        return self.model(x)


class Extractor:
    """`extractor(x)`: features f of a copy of F, uint8 images (B, 3, S, S) -> (B, dF), fp32.

    What enters F's last Linear (the pooled feature, or the CLS token), and mean and standard deviation
    over space, or tokens, at up to `taps` depths: the last layer is F's old task's.
    """

    def __init__(self, foundation: Foundation, taps: int, device: torch.device, amp: bool):
        # A copy: hooks on F itself would go along wherever F goes.
        self.foundation, self.model = foundation, common.copy_of(foundation)
        self.device, self.amp = device, amp
        self.forwards, self.seen = 0, []
        # What features depend on, beside images and weights: cached ones are refused when it differs.
        self.key = f"{foundation.size} {foundation.mean} {foundation.std} {taps} {amp}"
        head, found = last_linear(self.model, foundation.size, "--foundation"), blocks(self.model.model)
        depths = np.linspace(len(found) - 1, 0, min(taps, len(found)))  # evenly, from the last one
        self.taps = sorted({round(depth) for depth in depths})
        for i in self.taps:
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


# ===== Method =======================================================================================
#
# ----- images and features -----


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
        """(R, d) -> (n_l + n_u, d), fp32: the mean over each image's views."""
        labelled, rest = z[:self.views_l * self.n_l], z[self.views_l * self.n_l:]
        parts = [labelled.view(self.views_l, self.n_l, -1).mean(0, dtype=torch.float32)]
        if self.n_u:
            parts.append(rest.view(self.views_u, self.n_u, -1).mean(0, dtype=torch.float32))
        return torch.cat(parts)


def make_rows(labelled: Tensor, y: Tensor, unlabelled: Tensor, views_l: int, views_u: int,
              seed: int) -> Rows:
    """View 0 is the image itself; the others are shifted and flipped, fixed by the seed."""
    # ABLATE: --views 6 --labelled-views 30: ten times F's time; it was 81.34 and not 81.09 (older form).
    g, parts = torch.Generator().manual_seed(seed), []
    for x, views in ((labelled, views_l), (unlabelled, views_u)):
        parts += [x if v == 0 else common.crop_and_flip(x, g) for v in range(views) if len(x)]
    return Rows(torch.cat(parts), y, views_l, len(labelled), views_u, len(unlabelled))


def few_shot(labels: Tensor, classes: list[str], hp, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the labelled and of the unlabelled train images; they depend on labels and seed alone.

    Raises InputError where the set is too small.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if hp.fraction is None:
        chosen = torch.cat([order[labels[order] == c][:hp.shots] for c in range(len(classes))])
        asked, least = f"--shots {hp.shots}", hp.shots
    else:
        chosen = order[:round(hp.fraction * len(labels))]
        asked, least = f"--fraction {hp.fraction}", 1
    for c, n in enumerate(torch.bincount(labels[chosen], minlength=len(classes)).tolist()):
        if n < least:
            raise InputError(f"{asked}: class {classes[c]} has only {n} train images for it")
    rest = order[~torch.isin(order, chosen)]
    # The default takes what is left; a number that was asked for is one.
    if len(rest) < hp.unlabelled != build_parser().get_default("unlabelled"):
        raise InputError(f"--unlabelled {hp.unlabelled}: only {len(rest)} train images are left beside "
                         f"the {len(chosen)} labelled ones")
    return chosen, rest[:hp.unlabelled]


def cached_features(file: Path, extractor: Extractor, images: Tensor, together: bool = False):
    """f of every image, (R, dF) fp16 on the CPU, and what they cost: forwards of F, seconds.

    From `file` if it is of these images and this F: then at the cost of the run that made it.
    together: torchrun's processes share the work.
    """
    rank, world = common.rank_and_world() if together else (0, 1)
    t0 = time.time()
    h = hashlib.sha256(extractor.key.encode() + images.numpy().tobytes())
    for name, t in extractor.model.state_dict().items():
        h.update(name.encode() + t.detach().cpu().contiguous().numpy().tobytes())
    if file.exists():
        try:
            saved = common.load_file(file, ("key", "features", "seconds"), "cached features")
        except InputError:  # half a file, or something else's
            saved = {"key": ""}
        if saved["key"] == h.hexdigest():
            print(f"features: {file.name} of this folder is reused, F does not run", flush=True)
            return saved["features"], len(images), saved["seconds"]
        print(f"features: {file} is of other images, views or another F; computed anew", flush=True)
    size = 250 if extractor.foundation.size <= 64 else 50  # 250 images of 224 px need gigabytes
    parts, batch = {}, list(enumerate(images.split(size)))[rank::world]
    bar = common.Progress(0, len(batch))
    for i in bar:
        n, x = batch[i]
        parts[n] = extractor(x).half().cpu()
        bar.show(f"F runs once over {len(images)} images and views")
    if together:
        parts = {n: f for theirs in common.gather(parts) for n, f in theirs.items()}
    features = torch.cat([parts[n] for n in sorted(parts)])
    if not features.isfinite().all():
        raise InputError("--foundation: its features are not finite in fp16; are its weights its own?")
    seconds = time.time() - t0
    if rank == 0:
        common.save_atomic({"key": h.hexdigest(), "features": features, "seconds": seconds}, file)
    return features, len(images), seconds


# ----- step 1: reprogram F -----


class Reprogrammed(nn.Module):
    """A new head on F's features:  p = phi((f - mu) / sd), o_P = W_P p.  (B, dF) -> (B, dP), (B, C)

    mu and sd are the target's statistics. phi: the identity for the linear probe, else a linear map.
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


class Step1:
    """Everything that is made of F's features: the linear probe, and the proxy. hp: the flags."""

    def __init__(self, rows: Rows, features: Tensor, classes: int, hp, device):
        self.rows, self.features, self.classes = rows, features, classes
        self.hp, self.device = hp, device
        # Against the mismatch of domains: the target's own mean and deviation, of rows enough for them.
        f = features[::max(1, len(features) // 20_000)].float().to(device)
        self.mu, self.sd = f.mean(0), f.std(0).clamp_min(1e-4)
        # In which fifth of its class a labelled image is; of fewer than five images none is in fifth 0.
        self.fifth = torch.zeros(rows.n_l, dtype=torch.long)
        for c in range(classes):
            mine = (rows.y == c).nonzero()[:, 0]
            self.fifth[mine] = 4 - torch.arange(len(mine)) % 5

    def standard(self, at: Tensor) -> Tensor:
        """f of the rows `at` (R',), standardised: (R', dF)."""
        return (self.features[at].float().to(self.device) - self.mu) / self.sd

    def chunks(self, used: Tensor, q: Tensor):
        """f of the rows `used` (R',) beside q (R', C), some thousands at a time."""
        for at, part in zip(used.split(4096), q.split(4096)):
            yield self.standard(at), part

    def labelled(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the labelled images in `keep` (n_l,) bool, and their labels: (R',), (R', C)."""
        used = keep.repeat(self.rows.views_l).nonzero()[:, 0]
        return used, F.one_hot(self.rows.labels[used].to(self.device), self.classes).float()

    def best_shrinkage(self, sums: list[tuple]) -> float:
        """That of SHRINKS by which each fifth of the labelled images is likeliest, given the other four:
        from the strongest one down, until they get less likely.

        sums: class_sums of each fifth. Of one image a class nothing can be left out: the largest.
        """
        fifths = []
        for k in range(5):
            n, m, s = [sum(parts) for parts in zip(*sums[:k], *sums[k + 1:])]
            left_out = (self.fifth == k).nonzero()[:, 0]  # rows of view 0: the images themselves
            if not len(left_out) or n.min() == 0:
                continue
            means, covariance = class_moments(n, m, s)
            f, y = (self.standard(left_out) - means.mean(0)).cpu(), self.rows.y[left_out]
            fifths.append(((means - means.mean(0)).cpu(), in_units(covariance).cpu(), f, y))
        best, least = SHRINKS[0], math.inf
        for shrink in SHRINKS:
            loss = 0.0
            for m, S, f, y in fifths:
                # The log-posterior of `discriminant`, by a linear system: no need of eigenvectors.
                L, indefinite = torch.linalg.cholesky_ex(S + shrink * torch.eye(len(S)))
                A = torch.cholesky_solve(m.T, L)
                o = f @ A - (m.T * A).sum(0) / 2
                o *= self.hp.logit_std / spread(o)
                # By rounding, if shrunk by too little: then no more of it.
                loss += math.inf if indefinite else F.cross_entropy(o, y, reduction="sum").item()
            # Where images and features are about as many, a second valley can follow, as deep by chance.
            # ABLATE: `continue` and not `break` falls into it in two of thirteen draws: 79.41 and not
            # 82.81, 80.0 and not 81.6 (results/tdmr.md).
            if loss >= least:
                break
            best, least = shrink, loss
        return best

    def proxy(self) -> tuple[nn.Module, dict]:
        """The closed form: labels spread, then Fisher's discriminant, its log-posterior scaled."""
        r, hp = self.rows, self.hp
        sums = [class_sums(self.chunks(*self.labelled(self.fifth == k))) for k in range(5)]
        n, m, s = [sum(parts) for parts in zip(*sums)]
        shrink = self.best_shrinkage(sums) if hp.shrink == "auto" else hp.shrink
        choice = {"shrink": shrink}
        if r.n_u and hp.neighbours:
            # Which images are alike? Directions in which images of one class differ tell nothing: W.
            W = whitening(class_moments(n, m, s)[1], shrink)
            f = r.image_mean(self.features).to(self.device)
            z, y = ((f - self.mu) / self.sd) @ W, r.y.to(self.device)
            q = propagate_labels(z, y, self.classes, hp.neighbours, hp.spread)[r.n_l:]
            sure = F.one_hot(q.argmax(1), self.classes)  # what the power below tends to
            q = q ** hp.sharpen  # propagated probabilities are too flat
            total = q.sum(1, keepdim=True)
            q = torch.where(total > 0, q / total, sure).repeat(r.views_u, 1)
            unlabelled = torch.arange(r.views_l * r.n_l, len(self.features))
            n, m, s = [a + b for a, b in zip((n, m, s), class_sums(self.chunks(unlabelled, q)))]
            # A covariance of N images is wrong by 1/N, and so much less it needs to be shrunk.
            shrink *= r.n_l / (r.n_l + r.n_u) if hp.shrink == "auto" else 1
        phi, weight, bias = discriminant(*class_moments(n, m, s), shrink)
        net = Reprogrammed(self.mu, self.sd, linear(phi), phi.shape[1], self.classes)
        net.to(self.device).eval()
        net.head.weight.data, net.head.bias.data = weight, bias
        # The log-posterior is far too sure. The scale at which held-out labels are likeliest makes too
        # soft a teacher: 1.5 points worse on held-out CIFAR-10 (two seeds, no log kept).
        with torch.no_grad():
            o = torch.cat([net(f.to(self.device).float())[1] for f in self.features.split(4096)])
        scale = spread(o).item() / hp.logit_std
        net.head.weight.data /= scale
        net.head.bias.data /= scale
        return net, choice | {"scale": scale}

    def fit_probe(self, keep: Tensor, stop: int, held_out=None) -> tuple[nn.Module, list[float]]:
        """The linear probe on the labels of `keep`: AdamW, cosine over --step1-steps, until `stop`.

        With held_out = (f, y), also its cross-entropy there after each tenth of the steps.
        """
        hp, losses = self.hp, []
        used, q = self.labelled(keep)
        d, g = len(self.mu), torch.Generator().manual_seed(hp.seed)
        with seeded(hp.seed):
            net = Reprogrammed(self.mu, self.sd, nn.Identity(), d, self.classes).to(self.device)
        opt = torch.optim.AdamW(net.parameters(), hp.step1_lr, weight_decay=hp.step1_weight_decay)
        for i in range(stop):
            at = torch.randint(len(used), (hp.step1_batch,), generator=g)
            opt.param_groups[0]["lr"] = hp.step1_lr * 0.5 * (1 + math.cos(math.pi * i / hp.step1_steps))
            loss = F.cross_entropy(net(self.features[used[at]].to(self.device).float())[1], q[at])
            common.descend(opt, loss, f"loss_probe at iteration {i}", "--step1-lr")
            if held_out is not None and (i + 1) % (hp.step1_steps // 10) == 0:
                with torch.no_grad():
                    losses.append(F.cross_entropy(net(held_out[0])[1], held_out[1]).item())
        return net.eval(), losses

    def train(self, name: str) -> tuple[nn.Module, dict]:
        """Probe or proxy, in eval mode, and what was chosen for it."""
        if name == "proxy":
            return self.proxy()
        # A fifth of each class says how long; then all are used.
        stop, judges = self.hp.step1_steps, (self.fifth == 0).nonzero()[:, 0]
        if len(judges):
            held_out = self.features[judges].float().to(self.device), self.rows.y[judges].to(self.device)
            losses = self.fit_probe(self.fifth > 0, stop, held_out)[1]
            stop = (int(np.argmin(losses)) + 1) * (stop // 10)
        return self.fit_probe(self.fifth >= 0, stop)[0], {"steps": stop}

    @torch.no_grad()
    def teach(self, net: nn.Module) -> tuple[Tensor, Tensor]:
        """What a student is taught of every row: p without its mean, o_P.  -> (R, dP) fp16, (R, C)"""
        parts = [net(f.to(self.device).float()) for f in self.features.split(4096)]
        p = torch.cat([p.cpu() for p, _ in parts])
        # With its mean most of cos(psi(h), p) would be the same for all images.
        return (p - p.mean(0)).half(), torch.cat([o for _, o in parts])


# ----- step 2: reprogram S -----


class Lesson(NamedTuple):
    """What a student learns from, beside the labels. p and logits None: from scratch."""

    name: str
    p: Tensor | None = None  # (R, dP)
    logits: Tensor | None = None  # (R, C)
    A: float = 0.0
    T: float = 1.0
    schedule: str = "constant"
    by_labels: bool = False  # whether p was made from the labels


def train_student(student: nn.Module, rows: Rows, data: common.Data, lesson: Lesson, hp, device,
                  log: common.RunLog | None = None) -> nn.Module:
    """Step 2. Which images and views are drawn depends on the seed alone."""
    tap, head = {}, last_linear(student, data.size, "--target")
    hook = head.register_forward_pre_hook(lambda m, inputs: tap.__setitem__("h", inputs[0]))
    psi, params = None, [*student.parameters()]
    if lesson.p is not None:
        with seeded(hp.seed):
            psi = nn.Linear(head.in_features, lesson.p.shape[1]).to(device)
        params += psi.parameters()
    opt = torch.optim.SGD(params, hp.lr, hp.momentum, nesterov=hp.momentum > 0,
                          weight_decay=hp.weight_decay)
    sched = common.one_cycle(opt, hp.lr, hp.steps, hp.warmup)
    g, split, labels = torch.Generator().manual_seed(hp.seed), rows.views_l * rows.n_l, rows.labels
    taught = lesson.p is not None or lesson.logits is not None
    student.train()
    mean, bar, t0 = {}, common.Progress(0, hp.steps), time.time()
    for i in bar:
        at = mine = torch.randint(split, (hp.batch_size,), generator=g)
        if rows.n_u:
            theirs = torch.randint(split, len(rows.images), (hp.unlabelled_batch,), generator=g)
            at = torch.cat([mine, theirs]) if taught else mine
        with common.autocast(device, hp.amp):
            out = student(common.to_input(rows.images[at], data.mean, data.std, device))
        # Inception and GoogLeNet add auxiliary heads while training.
        out = (out if isinstance(out, Tensor) else out[0]).float()
        # CE sees the labelled images alone, the distilled logits all of them.
        a, b = progress_weights(i / hp.steps, lesson.schedule)
        terms = {"ce": hp.ce_weight * F.cross_entropy(out[:len(mine)], labels[mine].to(device))}
        # ABLATE: without the feature term (kd-proxy) 80.63 and not 81.35; on CIFAR-10 it is worth more.
        # psi maps h to p's width; it is thrown away after the training.
        if lesson.p is not None:
            # p lies where the label pulled it: on a labelled image it would teach the label once more.
            # ABLATE: teach it there, too: 36.45, not 37.40, with labelled CIFAR-10 alone (no log kept).
            known = len(mine) if lesson.by_labels else 0
            if known < len(at):
                p = lesson.p[at[known:]].to(device).float()
                terms["feature"] = a * lesson.A * cosine_loss(psi(tap["h"].float())[known:], p)
        if lesson.logits is not None:
            o_p = lesson.logits[at.to(lesson.logits.device)].to(device)
            terms["kd"] = b * hp.kd_weight * distillation_loss(o_p, out, lesson.T)
        common.descend(opt, sum(terms.values()), f"loss_{lesson.name} at iteration {i}", "--lr")
        sched.step()
        mean = {k: 0.95 * mean.get(k, v.item()) + 0.05 * v.item() for k, v in terms.items()}
        img_per_s = (i + 1) * len(at) / (time.time() - t0)
        figures = " | ".join(f"{k} {v:.3f}" for k, v in mean.items())
        bar.show(f"{lesson.name} | {figures} | a {a:.2f} b {b:.2f} | {img_per_s:.0f} img/s")
        if log and ((i + 1) % 20 == 0 or i + 1 == hp.steps):
            log.write("step", method=lesson.name, iteration=i + 1, lr=opt.param_groups[0]["lr"], a=a,
                      b=b, **mean, img_per_s=img_per_s)
    hook.remove()
    return student.eval()


# ===== Evaluation and figures =======================================================================


@torch.no_grad()
def head_accuracy_pct(net: nn.Module, features: Tensor, y: Tensor, device: torch.device) -> float:
    """Top-1 in percent of probe or proxy on cached features (R, dF)."""
    o = torch.cat([net(f.float().to(device))[1].cpu() for f in features.split(4096)])
    return 100 * (o.argmax(1) == y).sum().item() / len(y)


def estimate_s(rows: Rows, students: list, data: common.Data, extractor: Extractor, hp, device) -> float:
    """Seconds of a seed's run, by one batch through F and one step of a student."""
    x = rows.images[:hp.batch_size + hp.unlabelled_batch]
    extractor(x)  # the first one also makes room
    t0 = time.time()
    extractor(x)
    f_s, t0 = (time.time() - t0) / len(x), time.time()
    with seeded(0), common.autocast(device, hp.amp):
        net = build("--target", hp.target, len(data.classes), data.size).to(device).train()
        out = net(common.to_input(x, data.mean, data.std, device))
        (out if isinstance(out, Tensor) else out[0]).float().sum().backward()
    step_s = time.time() - t0
    per_student = hp.steps * step_s + len(data.test) / len(x) * step_s / 3
    finetune_s = 3 * f_s * hp.steps * hp.batch_size * ("finetune" in students)  # F, there and back
    return f_s * (len(rows.images) + len(data.test)) + len(students) * per_student + finetune_s


def print_table(table: dict[str, list[dict]], title: str) -> None:
    """Rows: methods, mean +- sample std over seeds. Columns: top-1 and what it cost."""
    print(f"\n{title}\n{'':<24}{'top-1 %':>15}{'step-1 params':>15}" + "".join(
        f"{head:>11}" for head in ("F forwards", "step 1, s", "step 2, s", "kB")))
    for name, runs in table.items():
        acc, mean = [r["acc"] for r in runs], {k: np.mean([r[k] for r in runs]) for k in runs[0]}
        spread = f" +- {np.std(acc, ddof=1):.2f}" if len(acc) > 1 else ""
        print(f"{name:<24}" + f"{mean['acc']:.2f}{spread}".rjust(15) + f"{mean['params']:>15.0f}"
              f"{mean['forwards']:>11.0f}{mean['step1_s']:>11.1f}{mean['step2_s']:>11.1f}"
              f"{mean['bytes'] / 1000:>11.0f}")


# ===== Run ==========================================================================================

# Whose features (p) and whose logits teach the student.
TEACHERS = {"scratch": (None, None), "kd": (None, "probe"), "fitnet": ("probe", None),
            "tdmr": ("proxy", "proxy"), "kd-proxy": (None, "proxy"), "tdmr-no-proxy": ("probe", "probe"),
            "tdmr-no-progression": ("proxy", "proxy")}


def load_foundation(args: argparse.Namespace, device: torch.device) -> Foundation:
    """A given file, else weights/<data>_<arch>.pt, else torchvision's weights. Or InputError."""
    arch, about, origin = args.foundation or "resnet20x2", {}, "torchvision's weights"
    shipped = common.ROOT / "weights" / f"{args.foundation_data}_{common.short_name(arch)}.pt"
    file = Path(args.foundation_weights or shipped)
    if args.foundation_weights == "none" and ":" in arch:
        model, origin = common.build_model(arch, 1000, flag="--foundation").eval(), "its own weights"
    elif args.foundation_weights or file.exists():
        model, about = common.load_network(file, args.foundation, flag="--foundation")
        origin = file.name
    elif common.CIFAR_ARCH.fullmatch(arch) or ":" in arch:
        raise InputError(f"no weights for {arch} on {args.foundation_data}: expected weights/{file.name}"
                         " or --foundation-weights FILE; make it with: python tools/pretrain.py "
                         f"--arch {arch} --dataset {args.foundation_data}")
    else:
        model = common.build_model(arch, 1000, "DEFAULT", "--foundation")
    if "acc_pct" in about:
        origin += f", {about['acc_pct']:.2f} % on {about.get('dataset')} by its own record"
    print(f"foundation: {about.get('arch', arch)}, {origin}")
    about = common.tool("weights").said_by(model, arch) | about
    mean, std = common.IMAGENET_NORM
    f = Foundation(model, about.get("size", 224), about.get("mean", mean), about.get("std", std))
    return f.to(device, memory_format=torch.channels_last)


def build(flag: str, arch: str, classes: int, size: int = 32, seed: int = 0) -> nn.Module:
    """A network with initial weights from the seed; a wrong one is reported with its flag."""
    with seeded(seed):
        net = common.build_model(arch, classes, flag=flag).to(memory_format=torch.channels_last)
    last_linear(net, size, flag)
    return net


def take(split, index: Tensor) -> Tensor:
    """Images of a split by index, uint8 (n, 3, S, S)."""
    if isinstance(split, torch.utils.data.TensorDataset):
        return split.tensors[0][index]
    chosen = torch.utils.data.Subset(split, index.tolist())
    images = [x for x, _ in common.loader(chosen, batch_size=32)]
    return torch.cat(images) if images else torch.zeros(0, 3, split.size, split.size).byte()


def size_of(net: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values())


def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args.device, several=True)
    rank, world = common.rank_and_world()
    args.amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data = common.load_data(args.dataset, args.data_dir, args.size)
    if data.train is None:
        raise InputError(f"--dataset {args.dataset}: has no train images; expected train/ beside val/")
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: one seed is named twice")
    methods = [m for m in METHODS if m in args.methods or "all" in args.methods]
    shots = f"{args.shots}" if args.fraction is None else f"{args.fraction:g}"
    name = f"{data.name}_{common.short_name(args.target)}_{shots}_{args.unlabelled}"
    told = "dataset target shots fraction unlabelled"
    out = Path(args.out or common.default_out("tdmr", name, args, parse([]), told))
    own = len(args.seeds) > 1 or not args.out  # a folder a seed
    folders = {seed: out / f"seed{seed}" if own else out for seed in args.seeds}
    hps = {seed: argparse.Namespace(**vars(args) | {"out": out, "seed": seed}) for seed in args.seeds}
    # Every check comes before anything is written.
    for seed, hp in hps.items():
        common.check_out(folders[seed], hp)
        few_shot(common.labels_of(data.train), data.classes, hp, seed)
    C = len(data.classes)
    target = build("--target", args.target, C, data.size)
    if (n := last_linear(target, data.size, "--target").out_features) != C:
        raise InputError(f"--target {args.target}: knows {n} classes, the data have {C}")
    extractor = Extractor(load_foundation(args, device), args.taps, device, args.amp)
    print(f"device: {common.device_name(device)}, {torch.get_num_threads()} threads, "
          f"{'bf16' if args.amp else 'fp32'}")
    runs, table = {}, {}
    for seed in args.seeds if world > len(args.seeds) else []:
        share_features(hps[seed], data, extractor, folders[seed])
    for seed in args.seeds[rank::world]:  # torchrun's processes take the seeds in turn
        log = common.RunLog(folders[seed], alone=True)
        log.start(argparse.Namespace(**vars(args) | {"seed": seed}), device)
        runs[seed] = run_seed(hps[seed], methods, data, extractor, log, device)
    every = {seed: rows for runs in common.gather(runs) for seed, rows in runs.items()}
    for seed in args.seeds:
        for method, row in every[seed].items():
            table.setdefault(method, []).append(row)
    print_table(table, f"{args.target} on {data.name}")
    print(f"labelled: {shots} {'a class' if args.fraction is None else 'of all'}; last state, "
          f"{len(data.test)} test images\n{out}/{'seed*/' * own}: "
          f"log.jsonl{', tdmr.pt' * ('tdmr' in methods)}")


def rows_of(hp, data: common.Data) -> Rows:
    """The labelled and unlabelled images of a seed, with their views."""
    labels = common.labels_of(data.train)
    chosen, rest = few_shot(labels, data.classes, hp, hp.seed)
    labelled, unlabelled = take(data.train, chosen), take(data.train, rest)
    return make_rows(labelled, labels[chosen], unlabelled, hp.labelled_views, hp.views, hp.seed)


def share_features(hp, data: common.Data, extractor: Extractor, folder: Path) -> None:
    """More processes than seeds: first all of them run F, and leave its features for `run_seed`."""
    cached_features(folder / "features.pt", extractor, rows_of(hp, data).images, together=True)
    every = take(data.test, torch.arange(len(data.test)))
    cached_features(hp.out / "features_test.pt", extractor, every, together=True)


def run_seed(hp, methods: list[str], data: common.Data, extractor: Extractor, log, device) -> dict:
    """All methods on one draw of images. Returns the table's rows, method -> figures."""
    folder, rows, C = log.path.parent, rows_of(hp, data), len(data.classes)
    print(f"seed {hp.seed}: {rows.n_l} labelled and {rows.n_u} unlabelled images", flush=True)
    students = [m for m in methods if m != "probe"]
    whole_s = estimate_s(rows, students, data, extractor, hp, device)
    print(f"about {common.duration(whole_s)}, by a first step", flush=True)
    features, forwards, features_s = cached_features(folder / "features.pt", extractor, rows.images)
    print(f"features: {features.shape[1]} numbers an image, of F's last feature and of "
          f"{len(extractor.taps)} depths{' (no blocks found)' * (not extractor.taps)}", flush=True)

    # Step 1: probe and proxy, each only if a method needs it.
    student = build("--target", hp.target, C, data.size, hp.seed)
    step1, table, results = Step1(rows, features, C, hp, device), {}, {}
    lessons, train_s, params = {None: (None, None)}, {}, {None: 0}
    needed = [source for m in methods for source in TEACHERS.get(m, ("probe",) if m == "probe" else ())]
    for name in dict.fromkeys(source for source in needed if source):
        t0 = time.time()
        net, choice = step1.train(name)
        lessons[name], train_s[name], params[name] = step1.teach(net), time.time() - t0, trainable(net)
        every = take(data.test, torch.arange(len(data.test)))
        # Of all seeds alike, and so above their folders: F sees 10,000 images once, not once a seed.
        test_features = cached_features(hp.out / "features_test.pt", extractor, every)[0]
        acc = head_accuracy_pct(net, test_features, common.labels_of(data.test), device)
        results[f"acc_{name}_pct"] = acc
        log.write("eval", method=name, acc_pct=acc, **choice, params=params[name], train_s=train_s[name])
        print(f"step 1: {name} {acc:.2f} %, {params[name]} parameters, {train_s[name]:.1f} s",
              flush=True)

    # Step 2: one student a method, all from the same initial weights.
    # o_P of a labelled image is nearly its label; only softened does it tell more.
    temperature = hp.temperature or (2.0 if rows.n_u else 8.0)
    for method in methods:
        t0 = time.time()
        if method == "probe":
            row = dict(acc=results["acc_probe_pct"], params=params["probe"], forwards=forwards,
                       bytes=size_of(extractor.model), step1_s=features_s + train_s["probe"], step2_s=0)
        elif method == "finetune":
            row = finetune(rows, data, extractor.foundation, hp, device, log)
        else:
            of_p, of_logits = TEACHERS[method]
            source = of_logits or of_p
            lesson = Lesson(method, lessons[of_p][0], lessons[of_logits][1], by_labels=of_p == "proxy",
                            A=hp.fitnet_weight if method == "fitnet" else hp.feature_weight,
                            T=hp.probe_temperature if source == "probe" else temperature,
                            schedule=hp.schedule if method in ("tdmr", "tdmr-no-proxy") else "constant")
            net = build("--target", hp.target, C, data.size, hp.seed).to(device)
            net = train_student(net, rows, data, lesson, hp, device, log)
            # FitNet needs F's features alone, nothing that step 1 trains.
            uses_f, step2_s = source is not None, time.time() - t0
            row = dict(params=params[of_logits], forwards=forwards * uses_f, bytes=size_of(student),
                       step1_s=features_s * uses_f + train_s.get(of_logits, 0.0), step2_s=step2_s)
            row["acc"] = common.accuracy_pct(net, data, data.test, device)
        table[method], results[f"acc_{method.replace('-', '_')}_pct"] = row, row["acc"]
        figures = {k: v for k, v in row.items() if k != "acc"}
        log.write("eval", method=method, acc_pct=row["acc"], **figures)
        print(f"{method}: {row['acc']:.2f} %", flush=True)
        if method == "tdmr":
            state = {k: v.cpu().contiguous() for k, v in net.state_dict().items()}
            about = {k: getattr(data, k) for k in ("classes", "mean", "std", "size")}
            common.save_atomic({"state_dict": state, "arch": hp.target, "dataset": data.name, **about,
                                "acc_pct": row["acc"], "seed": hp.seed}, folder / "tdmr.pt")
    of = table.get("tdmr", {})
    log.write("end", **results, step1_s=of.get("step1_s"), step2_s=of.get("step2_s"),
              features_s=features_s, step1_train_s=train_s.get("proxy"), foundation_forwards=forwards,
              finetune_s=table.get("finetune", {}).get("step1_s"),
              trainable_params_step1=params.get("proxy"),
              params_foundation=sum(t.numel() for t in extractor.model.parameters()),
              bytes=size_of(student), wall_s=log.seconds(), peak_mib=common.peak_mib())
    return table


def finetune(rows: Rows, data: common.Data, foundation: Foundation, hp, device, log) -> dict:
    """The upper reference: a copy of F with a new head, all of it trained on the labelled images."""
    t0, net, C = time.time(), common.copy_of(foundation).requires_grad_(True), len(data.classes)
    head = last_linear(net, data.size, "--foundation")
    with seeded(hp.seed):
        new = nn.Linear(head.in_features, C).to(device)
    head.weight, head.bias, head.out_features = new.weight, new.bias, C
    task = data._replace(mean=foundation.mean, std=foundation.std)
    slow = argparse.Namespace(**vars(hp) | {"lr": hp.finetune_lr})
    net = train_student(net, rows, task, Lesson("finetune"), slow, device, log)
    row = dict(params=trainable(net), forwards=hp.steps * hp.batch_size, step1_s=time.time() - t0,
               step2_s=0.0, bytes=size_of(net))
    row["acc"] = common.accuracy_pct(net, task, data.test, device)
    return row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


if __name__ == "__main__":
    common.run(main, parse)
