"""TDMR: what a large frozen network knows, reprogrammed for a small network of another architecture.

    "Towards Efficient Task-Driven Model Reprogramming with Foundation Models", Shoukai Xu, Jiangchao
    Yao, Ran Luo, Shuhai Zhang, Zihao Lian, Mingkui Tan, Bo Han, Yaowei Wang. 2023, arXiv 2304.02263.

Read this first. No code was published, and we could read only the abstract. It names a large network of
any architecture, a small one of another, the target task's data alone, a *proxy space* against the
mismatch of tasks and domains, and *progressive distillation* from it. Everything more precise is **our
design**, and no number here is one of the paper's.

The idea. A foundation model F has learned other classes from other images. It stays frozen and runs once
over the target images. A small map, found in seconds, projects its features into a space made for the
target task. The target model S learns to match that space, and ever more its decisions alone.

The algorithm.

    f <- F(x), once for every image and view, kept, standardised on the target's images     # the domain
    step 1, reprogram F, in closed form:
        Sigma <- covariance of f within classes            # what varies within a class is not the task
                 + shrink I, with which the labels of left-out fifths are likeliest
        q <- y where there is a label, else labels spread along the k-NN graph of Sigma^-1/2 f;
             Sigma again, from all q, with less shrink, since there are more images
        phi <- the C-1 directions of Sigma^-1/2 f in which the classes lie apart             # the task
        p <- phi f,   o_P = log-posterior of the classes in p, scaled to a fixed standard deviation
    step 2, reprogram S; t goes from 0 to 1:
        h, o <- S's feature and logits for the same view of the same image
        S, psi <- S, psi - lr * grad [ CE(o, y)                          on labelled images
                                       + a(t) A (1 - cos(psi(h), p))     on unlabelled ones
                                       + b(t) B T^2 KL(o_P/T || o/T) ]   on all of them

Symbols ("paper" is our notation). R counts (view, image) pairs, labelled images first.

    paper       code                  shape            flag
    F, S        foundation, student                    --foundation --foundation-data --target
    f           features              (R, dF), fp16    --taps --views --labelled-views
    q           q                     (R, C)           --neighbours --spread --sharpen
    phi, p      phi, p                (C-1, dF)        --shrink
    o_P         logits                (R, C)           --logit-std
    a(t), b(t)  progress_weights      two floats       --schedule
    A, B, T     the same              float            --feature-weight --kd-weight --temperature

Protocol: the questions that are otherwise asked in issues.

    Which parameters move?   Step 1: phi and the head on it. Step 2: all of S, and psi. F never does: the
                             row `finetune` trains a copy.
    Who sees what?           All methods: the same labelled images, views, batches, initial weights and
                             steps. All that distil: the same unlabelled images and features.
    Where are test images?   In the last state's accuracy alone. Fifths of the labelled images choose the
                             shrinkage and how long the probe trains. Then all are used.

Departures from the spirit of the abstract, with the flag that goes back.

    D1  Features come from several depths of F, not from the last one alone.                  --taps 0
    D2  Unlabelled images take part in step 1, by label propagation.                    --neighbours 0
    D3  The proxy is Fisher's discriminant space, in closed form, and not a trained network.
    D4  Logits are distilled from the first step on.                   --schedule features-then-logits
    D5  bf16 autocast in F and in S's training, where the hardware has it.                    --no-amp

    python tdmr.py                                # 20 labels per class, 4,000 images without: 2 minutes
    python tdmr.py --unlabelled 0                 # labelled images alone: only o_P teaches S
    python tdmr.py --methods all                  # every ablation, and F fine-tuned
    python tdmr.py --foundation swin_t --dataset /path/to/imagefolder --target mobilenet_v3_small
"""

import hashlib
import inspect
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import door, need, seeded

# ===== Hyperparameters ==============================================================================

# Whose features (p) and whose logits teach the student. The last four rows are ablations and a bound.
METHODS = {"scratch": (None, None), "probe": (None, "probe"), "kd": (None, "probe"),
           "fitnet": ("probe", None), "tdmr": ("proxy", "proxy"), "kd-proxy": (None, "proxy"),
           "tdmr-no-proxy": ("probe", "probe"), "tdmr-no-progression": ("proxy", "proxy"),
           "finetune": (None, None)}
SCHEDULES = ["features-then-logits", "fade", "decay", "constant"]
SHRINKS = (10, 3, 1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # that --shrink auto chooses from


def build_parser() -> common.Parser:
    p = common.Parser("tdmr.py", __doc__.split("\n\n")[0])
    a = p.group("task")
    a("--foundation", None, "F: a name or FILE.py:NAME; None: as the weights say, or resnet20x2")
    a("--foundation-data", "cifar100", "picks weights/<data>_<foundation>.pt")
    a("--foundation-weights", None, "checkpoint or state_dict of F; none: its own", metavar="FILE")
    a("--target", "resnet8", "S, from scratch: resnet8, torchvision's, or FILE.py:NAME")
    a("--shots", 20, "labelled images per class", lo=1)
    a("--unlabelled", 4000, "further train images, without labels, at most")
    a("--methods", ["scratch", "probe", "kd", "fitnet", "tdmr"], "rows of the table",
      nargs="+", choices=[*METHODS, "all"])
    a = p.group("features")
    a("--views", 1, "of an unlabelled image: itself, then shifted and flipped", lo=1)
    a("--labelled-views", 8, "of a labelled image; there are few of them", lo=1)
    a("--taps", 9, "depths of F that join f; 0: the last feature alone")
    a = p.group("step 1: the proxy")
    a("--shrink", "auto", "of the covariance within classes; auto: by left-out labels",
      type=float, lo=1e-6, word="auto")
    a("--logit-std", 6.0, "standard deviation of o_P", lo=1e-3)
    a("--neighbours", 10, "in the k-NN graph; 0: no label propagation")
    a("--spread", 0.95, "share taken from the neighbours", hi=0.9999)
    a("--sharpen", 4.0, "power of propagated probabilities", lo=0.1)
    a("--step1-steps", 600, "of the linear probe, at most", lo=10)
    a("--step1-batch", 256, "rows of features in a step", lo=2)
    a("--step1-lr", 3e-3, "AdamW with a cosine schedule")
    a("--step1-weight-decay", 1e-2, "AdamW, on all weights")
    a = p.group("step 2: the target")
    a("--schedule", "fade", "a(t), b(t); fade: features go, logits stay", choices=SCHEDULES)
    a("--feature-weight", 5.0, "A: of the cosine loss to p")
    a("--fitnet-weight", 5.0, "the same for FitNet")
    a("--kd-weight", 1.0, "B: of the distilled logits")
    a("--ce-weight", 1.0, "of the labelled images' cross-entropy")
    a("--temperature", None, "T of o_P; None: 2, or 8 with labelled images alone", type=float, lo=1e-3)
    a("--probe-temperature", 4.0, "T of the probe's logits; usual: 4", lo=1e-3)
    a("--steps", 600, "of every student", lo=1)
    a("--batch-size", 32, "labelled images in a step", lo=2)
    a("--unlabelled-batch", 64, "unlabelled images in a step")
    a("--lr", 0.05, "peak of the one-cycle schedule, SGD")
    a("--momentum", 0.9, "SGD, Nesterov", hi=1)
    a("--weight-decay", 5e-4, "SGD, on all weights")
    a("--warmup", 0.1, "share of the steps in which the learning rate rises", hi=1)
    a("--finetune-lr", 0.01, "peak learning rate of the row finetune")
    common.add_run_flags(p, 1, "finished methods")
    return p


def parse(argv: list[str] | None = None) -> Namespace:
    return build_parser().parse_args(argv)


# ===== Equations ====================================================================================

def progress_weights(t: float, schedule: str) -> tuple[float, float]:
    """(a, b): weights of feature and of logit distillation at the progress t in [0, 1] of step 2. Ours.

    features-then-logits  1 - t, t        decay     1 - t, 1 - t
    fade                  1 - t, 1        constant  1, 1
    """
    # Progression does not pay here. The default fades because the abstract says progressive.
    # ABLATE: With fade 81.35 +- 0.30; without (--schedule constant) 81.56 +- 0.20 (results/tdmr.md).
    a = 1.0 if schedule == "constant" else 1 - t
    b = {"features-then-logits": t, "decay": 1 - t}.get(schedule, 1.0)
    return a, b


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


def class_sums(f: Tensor, q: Tensor) -> list[Tensor]:
    """f (n, d), soft labels q (n, C) -> sums of q (C,), of q f (C, d), of f f^T (d, d), on the CPU."""
    # A soft label makes an image count in several classes, in each by its share. MPS has no eigh.
    return [s.cpu() for s in (q.sum(0), q.T @ f, (f.T * q.sum(1)) @ f)]


def added(parts) -> list[Tensor]:
    """Such sums of several sets of images -> those of all."""
    return [sum(each) for each in zip(*parts)]


def class_moments(n: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Those sums -> class means (C, d), covariance (d, d) within classes over its mean eigenvalue."""
    means = m / n[:, None]
    covariance = (s - (means.T * n) @ means) / n.sum()
    return means, covariance / covariance.diagonal().mean().clamp_min(1e-6)


def whitening(covariance: Tensor, shrink: float) -> Tensor:
    """W (d, d) with W^T (covariance + shrink I) W = I."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors / (eigenvalues.clamp_min(0) + shrink).sqrt()


def discriminant(means: Tensor, covariance: Tensor, shrink: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fisher 1936, Rao 1948: the space in which classes of one common covariance lie apart.

    means (C, d), covariance (d, d) of `class_moments` -> phi (d, C-1), and the head of the log-posterior
    there, all classes as frequent, weight (C, C-1) and bias (C,):
        p = f phi,   o_c = (p - g) . m_c - |m_c|^2 / 2,   g + m_c the mean of class c in p, g that of all
    """
    # Divided by what varies within a class, distances between means tell how far classes lie apart.
    # ABLATE: W = torch.eye(len(W)) is the nearest class mean: 8 to 12 points worse, measured before logs
    # were kept. --shrink 0.3 makes a proxy a point worse at 100 labels per class (results/tdmr.md).
    W, g = whitening(covariance, shrink), means.mean(0)
    m = (means - g) @ W
    # Nothing is lost by keeping only C-1 directions: across them all classes have the same mean.
    vectors = torch.linalg.svd(m, full_matrices=False)[2]
    directions = vectors[:max(1, len(m) - 1)].T
    phi, m = W @ directions, m @ directions
    return phi, m, -(m * m).sum(1) / 2 - m @ (g @ phi)


def propagate_labels(z: Tensor, y: Tensor, classes: int, neighbours: int, spread: float,
                     iterations: int = 40) -> Tensor:
    """Zhou et al. 2004: Q <- spread D^-1/2 W D^-1/2 Q + (1 - spread) Y, rows then scaled to 1.

    z (n, d), y (m,) labels of its first m rows -> (n, C) probabilities; uniform where no label reaches.
    W_ij = max(0, cos(z_i, z_j))^3 among the nearest neighbours, symmetric (Iscen et al. 2019).
    """
    z, n = F.normalize(z, dim=1), len(z)
    top, near = [], []
    for rows in torch.arange(n).split(2000):  # never more than 2000 n similarities at once
        s = z[rows] @ z.T
        s[torch.arange(len(rows)), rows] = -1  # nobody is its own neighbour
        values, index = s.topk(min(neighbours, n - 1), 1)
        top.append(values.clamp_min(0) ** 3)
        near.append(index)
    near = torch.cat(near)
    here = torch.arange(n).to(near)[:, None].expand_as(near)
    # An edge counts half from either end.
    i = torch.cat([here, near]).flatten()
    j = torch.cat([near, here]).flatten()
    w = torch.cat(top).flatten().repeat(2) / 2
    degree = z.new_zeros(n).index_add(0, i, w).clamp_min(1e-8)
    w = (w * (degree[i] * degree[j]).rsqrt())[:, None]
    Y = z.new_zeros(n, classes)
    Y[torch.arange(len(y)), y] = 1
    # Of its own label an image keeps 1 - spread in each round; the rest comes from those like it.
    Q = Y
    for _ in range(iterations):
        from_neighbours = torch.zeros_like(Q).index_add(0, i, w * Q[j])
        Q = spread * from_neighbours + (1 - spread) * Y
    Q = Q + 1e-12
    return Q / Q.sum(1, keepdim=True)


# ===== Model surgery ================================================================================

def last_linear(model: nn.Module, size: int, flag: str, classes: int | None = None) -> nn.Linear:
    """The Linear that the output comes from; its input is the feature. Found by one run of the network.

    Raises InputError where there is none, as in SqueezeNet, or where images of this size do not fit.
    """
    last, training = {}, model.training
    see = lambda m, inputs, out: last.update(layer=m, x=inputs[0], out=out)
    x = torch.zeros(2, 3, size, size, device=next(model.parameters()).device)
    with door(flag), torch.no_grad():
        common.check_network(model.eval(), x, classes)  # after which it takes channels_last images
        hooks = [m.register_forward_hook(see) for m in model.modules() if isinstance(m, nn.Linear)]
        out = model(x)
    for hook in hooks:
        hook.remove()
    model.train(training)
    found = last and last["out"] is out and last["x"].ndim == 2
    need(found, f"{flag}: its feature cannot be found, since its output does not come from a Linear "
         "over one vector per image; ResNets, ConvNeXts, ViTs, Swins end so")
    return last["layer"]


def build(flag: str, arch: str, classes: int, size: int, seed: int) -> nn.Module:
    """A network with initial weights from the seed. InputError, naming the flag, for a wrong one."""
    with seeded(seed):
        net = common.build_model(arch, classes, flag=flag).to(memory_format=torch.channels_last)
    last_linear(net, size, flag, classes)
    return net


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

    They are what enters F's last Linear (the pooled feature, or the CLS token), and at up to `taps`
    depths mean and standard deviation over space, or over tokens: the last layer is F's old task's.
    """
    def __init__(self, foundation: Foundation, taps: int, device: torch.device, amp: bool):
        # A copy: hooks on F itself would go along wherever F goes.
        self.foundation, self.model = foundation, common.copy_of(foundation)
        self.device, self.amp, self.seen = device, amp, []
        head, found = last_linear(self.model, foundation.size, "--foundation"), blocks(self.model.model)
        depths = np.linspace(len(found) - 1, 0, min(taps, len(found)))  # evenly, from the last one
        self.taps = sorted({round(depth) for depth in depths})
        for i in self.taps:
            found[i].register_forward_hook(self.see)
        head.register_forward_pre_hook(lambda m, inputs: self.seen.append(inputs[0].float()))

    def see(self, m: nn.Module, inputs: tuple, out) -> None:
        if isinstance(out, Tensor) and out.ndim in (3, 4):
            self.seen.append(over_space(out))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        self.seen.clear()
        with common.autocast(self.device, self.amp):
            self.model(common.to_input(x, self.model.mean, self.model.std, self.device))
        return torch.cat(self.seen, 1)

    def of_all(self, images: Tensor) -> dict:
        """The features (R, dF) of all images, fp16 on the CPU, and what they cost: forwards, seconds.

        F runs over the same images once: a file in runs/tdmr/features/ keeps what came of it.
        """
        of, code = self.model, inspect.getsource(Extractor) + inspect.getsource(over_space)
        about = f"{common.crc_of(of)} {of} {of.size} {of.mean} {of.std} {self.taps} {self.amp} {code}"
        key = hashlib.sha256(about.encode() + images.numpy().tobytes()).hexdigest()
        file = Path(f"runs/tdmr/features/{key[:16]}.pt")
        if file.exists():
            return common.load_file(file, ("features", "forwards", "seconds"), "features of F")
        t0, parts = time.perf_counter(), []
        step = 250 if of.size <= 64 else 50  # 250 images of 224 px need gigabytes
        for i in common.progress(0, math.ceil(len(images) / step), "F"):
            x = images[i * step:(i + 1) * step]
            parts.append(self(x).half().cpu())
        features = torch.cat(parts)
        finite = features.isfinite().all()
        need(finite, "--foundation: its features are not finite in fp16; are its weights its own?")
        made = dict(features=features, forwards=len(images), seconds=time.perf_counter() - t0)
        common.save_atomic(made, file)
        return made


# ===== Method =======================================================================================

class Rows(NamedTuple):
    """The (view, image) pairs all methods draw from; labelled images' rows come first, view by view."""
    images: Tensor  # (R, 3, S, S) uint8
    of: Tensor  # (R,) which image this is a view of; labelled images have the first numbers
    y: Tensor  # (n_l,) labels of the labelled images
    labelled: int  # how many rows are of labelled images


def make_rows(labelled: Tensor, y: Tensor, unlabelled: Tensor, views_l: int, views_u: int,
              seed: int) -> Rows:
    """View 0 is the image itself; the others are shifted and flipped, fixed by the seed."""
    # ABLATE: With --views 6 --labelled-views 30, ten times F's time, 81.34; without 81.09 (older form).
    g, number = torch.Generator().manual_seed(seed), torch.arange(len(labelled) + len(unlabelled))
    images = [labelled] + [common.crop_and_flip(labelled, g) for _ in range(views_l - 1)]
    images += [unlabelled] + [common.crop_and_flip(unlabelled, g) for _ in range(views_u - 1)]
    of = [number[:len(y)]] * views_l + [number[len(y):]] * views_u
    return Rows(torch.cat(images), torch.cat(of), y, views_l * len(y))


def few_shot(labels: Tensor, classes: list[str], hp: Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the labelled and of the unlabelled train images, by the labels and the seed alone."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == c][:hp.shots] for c in range(len(classes))])
    for name, n in zip(classes, labels[chosen].bincount(minlength=len(classes))):
        need(n == hp.shots, f"--shots {hp.shots}: class {name} has only {n} train images")
    rest = order[~torch.isin(order, chosen)]
    return chosen, rest[:hp.unlabelled]


def take(split, index: Tensor) -> Tensor:
    """Images of a split by index, uint8 (n, 3, S, S)."""
    if isinstance(split, torch.utils.data.TensorDataset):
        return split.tensors[0][index]
    chosen = torch.utils.data.Subset(split, index.tolist())
    none = torch.zeros(0, 3, split.size, split.size).byte()
    return torch.cat([none, *(x for x, _ in common.loader(chosen, batch_size=32))])


def answers(head: list, f: Tensor) -> tuple[Tensor, Tensor]:
    """p (n, dP) and o (n, C) of standardised features (n, dF). phi None: p is all of f."""
    phi, weight, bias = head
    p = f if phi is None else F.linear(f, phi)
    return p, F.linear(p, weight, bias)


class Step1:
    """Everything that is made of F's features (R, dF): the linear probe, and the proxy. hp: the flags.

    Each is a head (phi, weight, bias) on standardised features:  p = phi f, o = weight p + bias.
    """
    def __init__(self, rows: Rows, features: Tensor, classes: int, hp: Namespace, device: torch.device):
        self.rows, self.features, self.hp, self.device = rows, features, hp, device
        # Against the mismatch of domains: the target's own mean and deviation, of rows enough for them.
        some = features[::max(1, len(features) // 20_000)].float().to(device)
        self.mu, self.sd = some.mean(0), some.std(0).clamp_min(1e-4)
        self.f, self.y = self.standard(features), rows.y.to(device)
        # In which fifth of its class a labelled image is; of fewer than five images none is in fifth 0.
        q, of = F.one_hot(rows.y, classes), rows.of[:rows.labelled]
        fifth = 4 - ((q.cumsum(0) - 1) * q).sum(1) % 5
        self.fifth, self.q = fifth[of], q[of].float().to(device)  # of the labelled rows

    def standard(self, f: Tensor) -> Tensor:
        """Features (n, dF) in the target's own units, fp32."""
        return (f.float().to(self.device) - self.mu) / self.sd

    def best_shrinkage(self, fifths: list) -> float:
        """That of SHRINKS by which each fifth of the labelled images is likeliest, given the other four.
        fifths: `class_sums` of each. Of one image per class nothing can be left out: the strongest.
        """
        losses, n_l = [0.0] * len(SHRINKS), len(self.y)
        for k in range(5):
            n, m, s = added(fifths[:k] + fifths[k + 1:])
            left_out = self.fifth[:n_l] == k  # rows of view 0: the images themselves
            if not left_out.any() or n.min() == 0:
                continue
            means, S = class_moments(n, m, s)
            eigenvalues, V = torch.linalg.eigh(S)
            g = means.mean(0)
            m = (means - g) @ V
            f = (self.f[:n_l][left_out].cpu() - g) @ V
            for i, shrink in enumerate(SHRINKS):
                A = m / (eigenvalues.clamp_min(0) + shrink)
                o = f @ A.T - (m * A).sum(1) / 2  # the log-posterior of `discriminant`
                o *= self.hp.logit_std / spread(o)
                losses[i] += F.cross_entropy(o, self.rows.y[left_out], reduction="sum").item()
        # Where images and features are about as many, a second valley can follow, as deep by chance.
        # ABLATE: With the first valley 82.81 and 81.6; without (the least of all losses) 79.41 and 80.0,
        # in two of thirteen draws (results/tdmr.md).
        rises = [after >= loss for loss, after in zip(losses, losses[1:])]
        return SHRINKS[[*rises, True].index(True)]

    def soft_labels(self, W: Tensor) -> Tensor:
        """Labels spread to all images, sharpened: (n, C). W: `whitening`."""
        of, hp, C = self.rows.of, self.hp, self.q.shape[1]
        f = torch.zeros(int(of.max()) + 1, len(self.mu)).index_add(0, of, self.features.float())
        # Which images are alike? Directions in which images of one class differ tell nothing: W.
        z = self.standard(f / of.bincount()[:, None]) @ W.to(self.device)
        q = propagate_labels(z, self.y, C, hp.neighbours, hp.spread)
        sharp = q ** hp.sharpen  # propagated probabilities are too flat
        total = sharp.sum(1, keepdim=True)
        # All numbers of a row may be too small: then the largest one counts alone.
        return torch.where(total > 0, sharp / total, F.one_hot(q.argmax(1), C))

    def proxy(self) -> tuple[list, dict]:
        """The closed form: labels spread, then Fisher's discriminant, its log-posterior scaled."""
        hp, split = self.hp, self.rows.labelled
        f, unlabelled = self.f[:split], self.f[split:]
        fifths = [class_sums(f[self.fifth == k], self.q[self.fifth == k]) for k in range(5)]
        sums = added(fifths)
        shrink = self.best_shrinkage(fifths) if hp.shrink == "auto" else hp.shrink
        choice = {"shrink": shrink}
        if len(unlabelled) and hp.neighbours:
            q = self.soft_labels(whitening(class_moments(*sums)[1], shrink))
            sums = added([sums, class_sums(unlabelled, q[self.rows.of[split:]])])
            if hp.shrink == "auto":  # a covariance of N images is wrong by 1/N, and needs so much less
                shrink *= len(self.y) / len(q)
        phi, weight, bias = discriminant(*class_moments(*sums), shrink)
        head = [x.contiguous().to(self.device) for x in (phi.T, weight, bias)]
        # The log-posterior is far too sure. The scale at which held-out labels are likeliest makes too
        # soft a teacher: 1.5 points worse on held-out CIFAR-10 (two seeds, no log kept).
        scale = spread(answers(head, self.f)[1]).item() / hp.logit_std
        return [head[0], head[1] / scale, head[2] / scale], choice | {"scale": scale}

    def fit_probe(self, keep: Tensor, steps: int) -> tuple[list, list[float]]:
        """The linear probe on the labelled rows `keep`, a mask; its cross-entropy on fifth 0 after each
        tenth of --step1-steps. AdamW with a cosine schedule.
        """
        hp, losses, n_l = self.hp, [], len(self.y)
        f, q, judges = self.f[:len(keep)][keep], self.q[keep], self.fifth[:n_l] == 0
        g = torch.Generator().manual_seed(hp.seed)
        with seeded(hp.seed):
            linear = nn.Linear(f.shape[1], q.shape[1]).to(self.device)
        opt = torch.optim.AdamW(linear.parameters(), hp.step1_lr, weight_decay=hp.step1_weight_decay)
        for i in range(steps):
            at = torch.randint(len(f), (hp.step1_batch,), generator=g)
            opt.param_groups[0]["lr"] = hp.step1_lr * 0.5 * (1 + math.cos(math.pi * i / hp.step1_steps))
            loss = F.cross_entropy(linear(f[at]), q[at])
            common.descend(opt, loss, "the loss of probe", "--step1-lr")
            if (i + 1) % (hp.step1_steps // 10) == 0:
                losses.append(F.cross_entropy(linear(self.f[:n_l][judges]), self.y[judges]).item())
        return [None, linear.weight.detach(), linear.bias.detach()], losses

    def train(self, name: str) -> tuple[list, dict]:
        """The head "probe" or "proxy", and what was chosen for it."""
        if name == "proxy":
            return self.proxy()
        # A fifth of each class says for how long the probe is trained. Then all are used.
        steps = self.hp.step1_steps
        if (self.fifth == 0).any():
            losses = self.fit_probe(self.fifth > 0, steps)[1]
            steps = (int(np.argmin(losses)) + 1) * (steps // 10)
        return self.fit_probe(self.fifth >= 0, steps)[0], {"steps": steps}

    def teach(self, head: list) -> tuple[Tensor, Tensor]:
        """What a student is taught of every row: p without its mean, o_P.  -> (R, dP) fp16, (R, C)"""
        p, o = answers(head, self.f)
        # With its mean most of cos(psi(h), p) would be the same for all images.
        return (p - p.mean(0)).half().cpu(), o.cpu()


class Lesson(NamedTuple):
    """What a student learns from, beside the labels. p and logits None: from scratch."""
    name: str
    p: Tensor | None = None  # (R, dP)
    logits: Tensor | None = None  # (R, C)
    A: float = 0.0
    T: float = 1.0
    schedule: str = "constant"
    by_labels: bool = False  # whether p was made from the labels


def train_student(student: nn.Module, rows: Rows, data: common.Data, lesson: Lesson, hp: Namespace,
                  device: torch.device, log: common.RunLog | None = None) -> nn.Module:
    """Step 2. Which images and views are drawn depends on the seed alone."""
    tap, head = {}, last_linear(student, data.size, "--target")
    hook = head.register_forward_pre_hook(lambda m, inputs: tap.update(h=inputs[0]))
    params = [*student.parameters()]
    if lesson.p is not None:
        with seeded(hp.seed):  # psi maps h to p's width; it is thrown away after the training
            psi = nn.Linear(head.in_features, lesson.p.shape[1]).to(device)
        params += psi.parameters()
    opt = torch.optim.SGD(params, hp.lr, hp.momentum, nesterov=hp.momentum > 0,
                          weight_decay=hp.weight_decay)
    schedule = common.one_cycle(opt, hp.lr, hp.steps, hp.warmup)
    g, R = torch.Generator().manual_seed(hp.seed), len(rows.of)
    taught = lesson.p is not None or lesson.logits is not None
    student.train()
    mean, bar, t0 = {}, common.progress(0, hp.steps, lesson.name), time.perf_counter()
    for i in bar:
        at = mine = torch.randint(rows.labelled, (hp.batch_size,), generator=g)
        if rows.labelled < R:  # drawn for every method, so that all see the same labelled images
            theirs = torch.randint(rows.labelled, R, (hp.unlabelled_batch,), generator=g)
            at = torch.cat([mine, theirs]) if taught else mine
        with common.autocast(device, hp.amp):
            out = student(common.to_input(rows.images[at], data.mean, data.std, device))
        # Inception and GoogLeNet add auxiliary heads while training.
        out = (out if isinstance(out, Tensor) else out[0]).float()
        # CE sees the labelled images alone, the distilled logits all of them.
        a, b = progress_weights(i / hp.steps, lesson.schedule)
        ce = F.cross_entropy(out[:len(mine)], rows.y[rows.of[mine]].to(device))
        terms = {"ce": hp.ce_weight * ce}
        # p lies where the label pulled it: on a labelled image it would teach the label once more.
        # ABLATE: With `known` 37.40; without (known = 0) 36.45, labelled CIFAR-10 alone (no log kept).
        known = len(mine) if lesson.by_labels else 0
        # ABLATE: With this term 81.35; without (kd-proxy) 80.63. On CIFAR-10 it is worth more.
        if lesson.p is not None and known < len(at):
            p = lesson.p[at[known:]].to(device).float()
            terms["feature"] = a * lesson.A * cosine_loss(psi(tap["h"].float())[known:], p)
        if lesson.logits is not None:
            kd = distillation_loss(lesson.logits[at].to(device), out, lesson.T)
            terms["kd"] = b * hp.kd_weight * kd
        common.descend(opt, sum(terms.values()), f"the loss of {lesson.name}", "--lr")
        schedule.step()
        mean = {k: 0.95 * mean.get(k, v.item()) + 0.05 * v.item() for k, v in terms.items()}
        if (i + 1) % 20 == 0 or i + 1 == hp.steps:
            bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
            if log:
                img_per_s = (i + 1) * len(at) / (time.perf_counter() - t0)
                log.write("step", method=lesson.name, iteration=i + 1, lr=opt.param_groups[0]["lr"],
                          a=a, b=b, **mean, img_per_s=img_per_s)
    hook.remove()
    return student.eval()


# ===== Evaluation and figures =======================================================================

def print_table(title: str, tables: list[dict]) -> None:
    """Rows: methods, mean +- sample std over seeds, a table each. Columns: top-1 and what it cost."""
    print(f"\n{title:<30}  top-1 %  step-1 params  F forwards  step 1, s  step 2, s        kB")
    for method in tables[0]:
        runs = [table[method] for table in tables]
        mean = {k: np.mean([run[k] for run in runs]) for k in runs[0]}
        acc = f"{mean['acc_pct']:.2f}"
        if len(runs) > 1:
            acc += f" +- {np.std([run['acc_pct'] for run in runs], ddof=1):.2f}"
        print(f"{method:<24}{acc:>15}{mean['params']:>15.0f}{mean['forwards']:>12.0f}"
              f"{mean['step1_s']:>11.1f}{mean['step2_s']:>11.1f}{mean['bytes'] / 1000:>10.0f}")


# ===== Run ==========================================================================================

def load_foundation(args: Namespace, device: torch.device) -> Foundation:
    """A given file, else weights/<data>_<arch>.pt, else torchvision's weights. Or InputError."""
    arch, about, given = args.foundation or "resnet20x2", {}, args.foundation_weights
    file = common.ROOT / "weights" / f"{args.foundation_data}_{common.short_name(arch)}.pt"
    by_hand = ":" in arch
    if (by_hand and given == "none") or not (given or file.exists()):
        needs_file = common.CIFAR_ARCH.fullmatch(arch) or (by_hand and not given)
        need(not needs_file, f"no weights for {arch} on {args.foundation_data}: expected weights/"
             f"{file.name} or --foundation-weights FILE; make it with: python tools/pretrain.py --arch "
             f"{arch} --dataset {args.foundation_data}")
        model, origin = common.build_model(arch, 1000, "DEFAULT", "--foundation"), "its own weights"
    else:
        model, about = common.load_network(Path(given or file), args.foundation, flag="--foundation")
        origin = Path(given or file).name
    print(f"foundation: {about.get('arch', arch)}, {origin}")
    with door(f"--foundation {arch}"):
        about = common.images_of(model) | about
    mean, std = common.NORMS["imagenet"]
    f = Foundation(model, about.get("size", 224), about.get("mean", mean), about.get("std", std))
    return f.to(device, memory_format=torch.channels_last)


def main(args: Namespace) -> None:
    device = common.pick_device(args.device, several=True)
    rank, world = common.rank_and_world()
    args.amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data = common.load_data(args.dataset, args.data_dir, args.size)
    # Every check comes before anything is written: a folder of nothing would only be in the way of the
    # next run.
    need(data.train, f"--dataset {args.dataset}: has no train images; expected train/ beside val/")
    few_shot(common.labels_of(data.train), data.classes, args, seed=0)
    build("--target", args.target, len(data.classes), data.size, 0)
    extractor = Extractor(load_foundation(args, device), args.taps, device, args.amp)
    print(f"device: {common.device_name(device)}, {torch.get_num_threads()} threads, "
          f"{'bf16' if args.amp else 'fp32'}")
    seeds, tables = np.atleast_1d(args.seed).tolist(), {}
    for seed in seeds[rank::world]:  # torchrun's processes take the seeds in turn
        hp = Namespace(**vars(args) | {"seed": seed})
        if args.out and len(seeds) > 1:
            hp.out = f"{args.out}/seed{seed}"
        tables[seed] = run_seed(hp, data, extractor, device)
    tables = {seed: table for theirs in common.gather(tables) for seed, table in theirs.items()}
    print_table(f"{args.target} on {data.name}", [tables[seed] for seed in seeds])
    print(f"labelled: {args.shots} per class; last state, {len(data.test)} test images")


def run_seed(hp: Namespace, data: common.Data, extractor: Extractor, device: torch.device) -> dict:
    """All methods on the images that one seed draws. Returns the table's rows: method -> figures."""
    methods = [m for m in METHODS if m in hp.methods or "all" in hp.methods]
    crc = common.crc_of(extractor.model)
    state = common.load_checkpoint(hp, crc)
    table = state["table"] if state else {}  # the rows that are finished
    name = f"{data.name}_{common.short_name(hp.target)}_{hp.shots}_{hp.unlabelled}"
    out = common.new_folder(hp, f"runs/tdmr/{name}", alone=True)
    log = common.RunLog(out, hp, device, alone=True, state=state)

    labels = common.labels_of(data.train)
    chosen, rest = few_shot(labels, data.classes, hp, hp.seed)
    labelled, unlabelled = take(data.train, chosen), take(data.train, rest)
    rows = make_rows(labelled, labels[chosen], unlabelled, hp.labelled_views, hp.views, hp.seed)
    features, forwards, features_s = extractor.of_all(rows.images).values()
    f_test = extractor.of_all(take(data.test, torch.arange(len(data.test))))["features"]
    print(f"seed {hp.seed}: {len(labelled)} labelled and {len(unlabelled)} unlabelled images, each with "
          f"{features.shape[1]} features of {len(extractor.taps)} depths and the last one", flush=True)

    # Step 1: probe and proxy, where a method needs them. A run that goes on makes them once more.
    step1 = Step1(rows, features, len(data.classes), hp, device)
    results, taught = {}, {None: (None, None)}
    costs = {None: {"params": 0, "forwards": 0, "step1_s": 0.0}}
    costs["f"] = {"params": 0, "forwards": forwards, "step1_s": features_s}
    for name in dict.fromkeys(source for m in methods for source in METHODS[m] if source):
        t0 = time.perf_counter()
        head, choice = step1.train(name)
        taught[name] = step1.teach(head)
        train_s = time.perf_counter() - t0
        params = sum(x.numel() for x in head if x is not None)
        costs[name] = {"params": params, "forwards": forwards, "step1_s": features_s + train_s}
        right = answers(head, step1.standard(f_test))[1].argmax(1).cpu() == common.labels_of(data.test)
        results[name] = {"acc_pct": 100 * right.sum().item() / len(right), "train_s": train_s}
        if not state:
            log.write("eval", method=name, params=params, **choice, **results[name])
        print(f"step 1: {name} {results[name]['acc_pct']:.2f} %, {train_s:.1f} s", flush=True)

    # Step 2: one student for each method, all from the same initial weights.
    for method in [m for m in methods if m not in table]:
        p_of, logits_of = METHODS[method]
        if method == "probe":
            net, row = extractor.model, {"acc_pct": results["probe"]["acc_pct"], "step2_s": 0.0}
        elif method == "finetune":
            net, row = finetune(rows, data, extractor.foundation, hp, device, log)
        else:
            net, row = distil(method, taught, rows, data, hp, device, log)
        source = logits_of or (p_of and "f")  # FitNet needs F's features alone
        size = sum(t.nbytes for t in net.state_dict().values())
        table[method] = costs[source] | row | {"bytes": size}
        log.write("eval", method=method, **table[method])
        print(f"{method}: {row['acc_pct']:.2f} %", flush=True)
        if method == "tdmr":
            about = {k: getattr(data, k) for k in ("classes", "mean", "std", "size")}
            about |= {"arch": hp.target, "dataset": data.name, "acc_pct": row["acc_pct"]}
            about["state_dict"] = {k: v.cpu().contiguous() for k, v in net.state_dict().items()}
            common.save_atomic(about, out / "tdmr.pt")
        if len(table) < len(methods) and len(table) % hp.checkpoint_every == 0:
            common.save_checkpoint(log, hp, crc=crc, table=table)
    finish(log, results | table, costs, extractor)
    return table


def distil(method: str, taught: dict, rows: Rows, data: common.Data, hp, device, log) -> tuple:
    """Step 2 of one method: the student, its accuracy and seconds."""
    t0, (p_of, logits_of) = time.perf_counter(), METHODS[method]
    # o_P of a labelled image is nearly its label; only softened does it tell more.
    usual = 2.0 if rows.labelled < len(rows.of) else 8.0
    T = hp.probe_temperature if logits_of == "probe" else hp.temperature or usual
    A = hp.fitnet_weight if method == "fitnet" else hp.feature_weight
    schedule = hp.schedule if method in ("tdmr", "tdmr-no-proxy") else "constant"
    lesson = Lesson(method, taught[p_of][0], taught[logits_of][1], A, T, schedule, p_of == "proxy")
    net = build("--target", hp.target, len(data.classes), data.size, hp.seed).to(device)
    net = train_student(net, rows, data, lesson, hp, device, log)
    step2_s = time.perf_counter() - t0
    return net, {"acc_pct": common.accuracy_pct(net, data, data.test, device), "step2_s": step2_s}


def finetune(rows: Rows, data: common.Data, foundation: Foundation, hp, device, log) -> tuple:
    """The upper reference: a copy of F with a new head, all of it trained on the labelled images."""
    t0, net = time.perf_counter(), common.copy_of(foundation).requires_grad_(True)
    head, C = last_linear(net, data.size, "--foundation"), len(data.classes)
    with seeded(hp.seed):
        new = nn.Linear(head.in_features, C).to(device)
    head.weight, head.bias, head.out_features = new.weight, new.bias, C
    task = data._replace(mean=foundation.mean, std=foundation.std)
    slow = Namespace(**vars(hp) | {"lr": hp.finetune_lr})
    net = train_student(net, rows, task, Lesson("finetune"), slow, device, log)
    row = {"params": sum(p.numel() for p in net.parameters()), "forwards": hp.steps * hp.batch_size,
           "step1_s": time.perf_counter() - t0, "step2_s": 0.0}
    return net, row | {"acc_pct": common.accuracy_pct(net, task, data.test, device)}


def finish(log: common.RunLog, results: dict, costs: dict, extractor: Extractor) -> None:
    """The end record: all accuracies, and what TDMR and fine-tuning cost."""
    end = {f"acc_{name.replace('-', '_')}_pct": row["acc_pct"] for name, row in results.items()}
    get = lambda name, key: results.get(name, {}).get(key)
    end |= {key: get("tdmr", key) for key in ("step1_s", "step2_s", "bytes")}
    end |= {"trainable_params_step1": get("tdmr", "params"), "step1_train_s": get("proxy", "train_s"),
            "features_s": costs["f"]["step1_s"], "foundation_forwards": costs["f"]["forwards"],
            "params_foundation": sum(p.numel() for p in extractor.model.parameters()),
            "finetune_s": get("finetune", "step1_s")}
    log.write("end", **end, wall_s=log.seconds(), peak_mib=common.peak_mib())
    out = log.path.parent
    common.checkpoint_file(out, log.alone).unlink(missing_ok=True)
    print(f"{out}/: {log.seconds():.0f} s, {common.peak_mib():.0f} MiB")


if __name__ == "__main__":
    common.run(main, parse)
