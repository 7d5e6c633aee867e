"""CEMA: test-time adaptation split between an edge that only runs forwards and a cloud that learns.

    "Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy Distillation"
    Yaofo Chen, Shuaicheng Niu, Yaowei Wang, Shoukai Xu, Hengjie Song, Mingkui Tan.
    ICLR 2024, arXiv 2402.17316.

The idea. A small network g on a device meets images unlike its training set, and cannot train itself.
It sends the few images worth learning from to a cloud, which holds a stronger network f and a twin of g.
The cloud adapts f to the new images. It distils f into the twin's normalisation parameters, with images
replayed from a buffer, and sends those few kilobytes back.

The algorithm.

    edge, for each batch x:
        take over the newest parameters that have arrived
        logits = g(x)                                        # the answer that is scored
        upload the images with E_min < H(logits) < E_max     # not uninformative, not unreliable
    cloud, for every 32 uploads u:
        f    <- f    - lr_f * grad mean[ w(f) H(f(u)) ]      # w = exp(E_0 - H), a constant
        x    =  u and 96 images from the replay buffer
        twin <- twin - lr * grad mean[ alpha w(g) H(g(x)) + beta w(f) KL(f(x) || g(x))
                                       + gamma w(f) CE(g(x), argmax f(x)) ]
    cloud, when a batch brought no such step: the second step alone, on 128 replayed images
    cloud, every K batches: the twin's affine parameters and BN statistics -> edge

Symbols.

    paper              code              shape             unit     flag
    g, f               edge.model, f     uint8 -> (B, C)            --arch --foundation
    H, E(x)            H                 (B,)              nats
    E_0, E_min         e0, e_min         float             ln C     --e0 --e-min
    E_max^t            e_max             float             nats     --lam --dynamic --warmup-batches
    S(x)               chosen            (B,) bool                  --select --d-margin
    B (replay)         replay            (n, 3, S, S) uint8         --replay --replay-draw --replay-min
    alpha beta gamma   the same          float                      --alpha --beta --gamma
    K                  download_every    int               batches  --download-every

Protocol: the questions that are otherwise asked in issues.

    Which parameters move?     Weight and bias of norm layers, in f and in the twin. Nothing else.
    Whence BN statistics?      --bn ema: at first from the edge's newest 64 images, after a download from
                               the cloud, where uploaded and replayed images move them. They can lock:
                               after an abrupt change no image may pass the filter (results/cema.md).
    Predict or update first?   Predict. An image is scored with parameters that never saw it.
    Who sees labels?           Nobody. They are counted in `main`, outside every method.
    When is all forgotten?     --order reset: at the start of each corruption, as in the paper's tables.
    What is a budget?          The images learned from: uploads for CEMA, back-propagated ones for ETA.

Departures from paper and published code; [?] could not be checked against the paper.

    D1  E_max moves before the batch is filtered, as in published code. The paper moves it after.
    D2  The length of the threshold's warm-up is ours [?].                             --warmup-batches
    D3  The cloud trains under bf16 autocast, where the hardware has it.                       --no-amp
    D4  --recipe few-classes takes each batch's statistics and higher learning rates: with 10 classes,
        statistics of the uploads alone do not fit the images that stay home (results/cema.md).
    D5  An upload joins the replay buffer after its own step, in published code before. Batch
        renormalisation takes the biased variance, published code the unbiased one. The published ways
        end at 81.36 and 81.22, ours at 81.26.

    python cema.py                                    # 5 corruptions x 2,000 images: 3 minutes a core
    python cema.py --corruptions all --images 10000   # the full protocol: up to 150 minutes a core
    python cema.py --link-delay 50 --link-drop 0.3    # messages come late, or never
"""

import math
import warnings
from argparse import Namespace
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import AdaptiveBN, InputError, average_in, configure, entropy, fill, need

# ===== Hyperparameters ==============================================================================

METHODS = ("source", "bn", "tent", "eta", "cema")
FIVE = ["gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression"]
# What changes with 10 classes, chosen on the four held-out corruptions of Fashion-MNIST.
RECIPES = {"paper": {}, "few-classes": dict(bn="batch", lr=2e-2, tent_lr=1e-1, eta_lr=1e-1)}

# --select: logits (B, C) and what entropy chose (B,) -> which images go up, (B,) bool. Your own rule is
# one more line, as "unsure": lambda logits, chosen, rng: logits.softmax(1).amax(1) < 0.9
SELECT = {
    "entropy": lambda logits, chosen, rng: chosen,
    # ABLATE: With the choice by entropy 84.13; without (--select random, as many images drawn blindly)
    # 84.43 (results/cema/ablation). With 100 classes 43.49; without 43.07 (results/cema/cifar100).
    "random": lambda logits, chosen, rng: torch.randperm(len(chosen), generator=rng) < chosen.sum(),
    "all": lambda logits, chosen, rng: torch.ones_like(chosen),
    "none": lambda logits, chosen, rng: torch.zeros_like(chosen)}


def build_parser() -> common.Parser:
    p = common.Parser("cema.py", __doc__.split("\n\n")[0])
    a = p.group("task")
    a("--arch", "resnet20", "the edge's network g: resnet20, torchvision's, or FILE.py:NAME")
    a("--weights", None, "its checkpoint; None: weights/<dataset>_<arch>.pt; none: a network's own")
    a("--foundation", "resnet20x2", "the cloud's network f")
    a("--foundation-weights", None, "its checkpoint; None: as for --weights")
    a("--methods", list(METHODS), "rows of the table, over the same stream", nargs="+", choices=METHODS)
    a("--recipe", "paper", "changes defaults; other flags still win", choices=list(RECIPES))
    a = p.group("stream")
    a("--stream", "generated", "corrupted test images of --dataset, or files: see tools/streams.py",
      choices=["generated", "imagenet-c", "cifar-c", "imagenet-r", "folder"])
    a("--corruptions", FIVE, "names, or: all (15), held-out (4, to tune on)", nargs="+")
    a("--severity", 5, "1 to 5; the paper reports 3 and 5", lo=1, hi=5)
    a("--images", 2000, "of each corruption; the benchmark takes all", lo=1)
    a("--order", "reset", "reset: new models for each corruption; lifelong: never; mixed: all shuffled; "
      "label-shift: as reset, by class", choices=["reset", "lifelong", "mixed", "label-shift"])
    a("--loop", 1, "how many times the same images come", lo=1)
    a("--batch-size", 64, "images the edge sees at once; published: 64", lo=1)
    a("--wnids", None, "imagenet-r: a folder or file that names ImageNet's 1000 classes")
    a("--score-foundation", True, "two rows of f, which cost a forward of f for every image")
    a("--log-every", 10, "batches between step records", lo=1)
    a = p.group("edge")
    a("--e0", 0.4, "E_0 / ln C; larger uploads more. Published: 0.4")
    a("--lam", 1.0, "lambda of E_max; 100 with --no-dynamic: no E_max. Published: 1 [?]")
    a("--dynamic", True, "E_max follows the mean entropy; in released code it does not")
    a("--warmup-batches", 10, "batches before E_max moves; ours [?]", lo=1)
    a("--e-min", 0.02, "E_min / ln C. Paper: 0.02; released code: 0, none")
    a("--d-margin", 0.0, "margin of EATA's redundancy filter. Paper: 0, none; released code: 0.05")
    a("--select", "entropy", "which images go up; random: as many as by entropy", choices=list(SELECT))
    a("--seed-images", 64, "the newest images, averaged for BN until a download comes", lo=1)
    a = p.group("cloud")
    a("--lr", 2.5e-3, "SGD of the twin; too high: accuracy falls. Published: 2.5e-3")
    a("--lr-f", 2.5e-4, "SGD of f; published: 2.5e-4")
    a("--momentum", 0.9, "of both; published: 0.9", hi=1)
    a("--alpha", 3.0, "weight of the twin's own entropy; published: 3")
    a("--beta", 3.0, "weight of KL(f || g); published: 3")
    a("--gamma", 1.0, "weight of CE(g, argmax f); published: 1")
    a("--temperature", 1.0, "T of the KL term; published: 1", lo=1e-3)
    a("--cloud-batch", 32, "uploads a step; published: 32", lo=1)
    a("--replay", 10_000, "images kept; 0: no replay. Published: 10000")
    a("--replay-draw", 96, "replayed beside the uploads of a step; published: 96", lo=1)
    a("--replay-min", 256, "images held before they are replayed; published: 256", lo=1)
    a("--replay-only", True, "a step on replayed images alone when no upload step ran")
    a("--freeze-foundation", False, "f is not adapted; its BN statistics still follow --bn")
    a("--download-every", 1, "K, in batches; published: 1", lo=1)
    a("--bn", "ema", "BN statistics; published: ema", choices=["ema", "batch", "source"])
    a("--bn-momentum", 0.1, "of running statistics; published: 0.1", hi=1)
    a("--affine", ["bn"], "which norm layers learn", nargs="+", choices=["bn", "ln", "gn"])
    a("--reset-every", 0, "cloud steps between returns to source; 0: never")
    a = p.group("link")
    a("--link-delay", 0, "batches that a message takes, each way")
    a("--link-drop", 0.0, "share of messages lost, each way", hi=1)
    a("--link-corrupt", 0.0, "share damaged, each way, which the receiver refuses", hi=1)
    a = p.group("baselines")
    a("--tent-lr", 2.5e-4, "SGD of Tent; published for ImageNet: 2.5e-4")
    a("--eta-lr", 2.5e-4, "SGD of ETA; published: 2.5e-4, for CIFAR-10 5e-3")
    a("--eta-d-margin", 0.4, "redundancy filter of ETA; published: 0.05 (ImageNet), 0.4 (CIFAR-10)")
    common.add_run_flags(p, 500, "batches")
    return p


def parse(argv: list[str] | None = None) -> Namespace:
    """A recipe changes the defaults, so that an explicit flag wins wherever it stands."""
    p = build_parser()
    p.set_defaults(**RECIPES[p.parse_args(argv).recipe])
    return p.parse_args(argv)


# ===== Equations ====================================================================================

def sample_weight(H: Tensor, e0: float) -> Tensor:
    """w(x) = exp(E_0 - H(x)), a constant for the gradient: sure images count more.  (B,) -> (B,)."""
    return torch.exp(e0 - H.detach())


def e_max(e0: float, mean_h: float, mean_h_warm: float, lam: float) -> float:
    """E_max^t = lambda E_0 (mean of H over all images so far) / (that mean after the warm-up), nats."""
    # The paper's recursion over the ratio of successive means telescopes to this for lambda = 1.
    # As the model gets surer, what was a usual entropy becomes a large one: the threshold follows.
    return lam * e0 * mean_h / mean_h_warm


def worth_uploading(H: Tensor, low: float, high: float) -> Tensor:
    """S(x) = [E_min < H(x) < E_max].  (B,) nats -> (B,) bool. Above: unreliable. Below: known."""
    return (low < H) & (H < high)


def not_redundant(probs: Tensor, mean_probs: Tensor | None, margin: float) -> Tensor:
    """EATA: |cos(softmax(x), EMA of the mean softmax)| < margin.  (B, C), (C,) -> (B,) bool. 0: all."""
    if not margin or mean_probs is None:
        return torch.ones(len(probs), dtype=torch.bool, device=probs.device)
    return F.cosine_similarity(probs, mean_probs[None], dim=1).abs() < margin


def moving_mean(mean: Tensor | None, probs: Tensor) -> Tensor | None:
    """That EMA: 0.9 old, 0.1 the mean softmax of the images kept.  (C,) or None, (n, C) -> the same."""
    if not len(probs):
        return mean
    return probs.mean(0) if mean is None else 0.9 * mean + 0.1 * probs.mean(0)


def entropy_loss(logits: Tensor, e0: float) -> Tensor:
    """mean[ exp(E_0 - H) H ], weight detached: what adapts f, and ETA.  (B, C) -> scalar, nats."""
    H = entropy(logits)
    return (sample_weight(H, e0) * H).mean()


def distillation_loss(g_logits: Tensor, f_logits: Tensor, e0: float, alpha: float, beta: float,
                      gamma: float, T: float) -> Tensor:
    """mean[ alpha w(g) H(g) + beta w(f) T^2 KL(f || g) + gamma w(f) CE(g, argmax f) ], nats.

    (B, C), (B, C) -> scalar. w(g) and w(f) are sample weights by the entropy of g and of f.
    """
    # ABLATE: With all three terms 84.13; without KL (--beta 0) 82.69; without entropy (--alpha 0) 83.67;
    # without CE (--gamma 0) 83.93. few-classes, 1,500 images; results/cema/ablation.
    H_g, w_f = entropy(g_logits), sample_weight(entropy(f_logits), e0)
    log_g, log_f = common.log_softmax(g_logits / T), common.log_softmax(f_logits / T)
    kl = T**2 * (log_f.exp() * (log_f - log_g)).sum(1)  # (B,)
    ce = F.cross_entropy(g_logits, f_logits.argmax(1), reduction="none")  # (B,)
    return (alpha * sample_weight(H_g, e0) * H_g + beta * w_f * kl + gamma * w_f * ce).mean()


# ===== Model surgery ================================================================================
# BatchNorm layers that follow the stream are common.AdaptiveBN, put in place by common.configure.

class FromBytes(nn.Module):
    """uint8 images (B, 3, S, S) -> logits (B, C). `keep`: the classes of a stream that has fewer."""
    def __init__(self, net: nn.Module, mean: list[float], std: list[float], keep=None):
        super().__init__()
        self.net, self.mean, self.std, self.keep = net, mean, std, keep

    def forward(self, x: Tensor) -> Tensor:
        device = next(self.net.parameters()).device
        logits = self.net(common.to_input(x, self.mean, self.std, device))
        return logits if self.keep is None else logits[:, self.keep]


# ===== Method =======================================================================================
# All that edge and cloud know of each other are these two messages. Here they are handed over as they
# are. Between two machines they are bytes, which tools/wire.py writes and checks.

class Upload(NamedTuple):
    images: Tensor  # (n, 3, S, S) uint8
    stats: list[Tensor]  # BN means, then variances; empty once a download has come


class Download(NamedTuple):
    affine: list[Tensor]  # weight and bias of each norm layer
    stats: list[Tensor]


class Link:
    """Carries messages both ways: late, and not all of them. `now` counts batches of the edge."""
    STATE = ("rng", "now", "up", "down")  # of a checkpoint, which holds plain tuples

    def __init__(self, hp: Namespace, counts: Counter):
        self.hp, self.counts, self.now = hp, counts, 0
        self.rng = torch.Generator().manual_seed(hp.seed)
        self.up, self.down = [], []  # of (the batch at which it arrives, the parts of a message)

    def send(self, way: str, message: Upload | Download) -> None:
        self.counts[f"bytes_{way}"] += sum(t.nbytes for part in message for t in part)
        self.counts[f"bytes_{way}_stats"] += sum(t.nbytes for t in message.stats)
        # Four numbers are drawn and two are used, so that earlier runs can be had again.
        lost, damaged, _, _ = torch.rand(4, generator=self.rng, dtype=torch.float64).tolist()
        arrives, refused = lost >= self.hp.link_drop, damaged < self.hp.link_corrupt
        # A damaged message fails its checksum, and then it is a lost one.
        self.counts["refused_messages"] += arrives and refused
        if arrives and not refused:
            getattr(self, way).append((self.now + self.hp.link_delay, tuple(message)))

    def receive(self, way: str) -> list[Upload] | list[Download]:
        """What has arrived by now, oldest first."""
        kind, queue = {"up": (Upload, self.up), "down": (Download, self.down)}[way]
        arrived = [kind(*parts) for due, parts in queue if due <= self.now]
        del queue[:len(arrived)]
        return arrived


class Edge:
    """The device. It runs forwards and keeps a threshold: no optimizer, no gradient, nothing of f."""
    STATE = ("model", "rng", "good", "batches", "images", "h_sum", "h_warm", "e_max", "mean_probs")

    def __init__(self, model: nn.Module, hp: Namespace, classes: int, counts: Counter):
        self.model, self.affine, self.stats = configure(model, hp.bn, hp.affine)
        self.model.requires_grad_(False)
        self.hp, self.counts = hp, counts
        self.rng = torch.Generator().manual_seed(hp.seed)  # of --select random
        self.e0, self.e_min = hp.e0 * math.log(classes), hp.e_min * math.log(classes)
        self.e_max = self.e0
        self.batches, self.images = 0, 0  # seen so far
        self.h_sum, self.h_warm = 0.0, 0.0  # sum of all entropies; their mean at the end of the warm-up
        self.mean_probs = None  # of --d-margin
        self.good = []  # parameters and statistics before the newest download; empty: none has come

    @torch.no_grad()
    def step(self, x: Tensor, arrived: list[Download]) -> tuple[Tensor, Upload | None]:
        """uint8 images (B, 3, S, S) and what the cloud has sent -> logits (B, C), an upload."""
        if arrived:
            # What is there has answered the last batch without NaN. It is the way back.
            self.good = [t.clone() for t in self.affine + self.stats]
            fill(self.affine + self.stats, arrived[-1].affine + arrived[-1].stats)
        # Until the first download BN statistics are the mean of the newest --seed-images images, this
        # batch included. The very first ones alone would keep a covered lens in them for good.
        if not self.good:
            older = min(self.images, max(0, self.hp.seed_images - len(x)))
            average_in(self.model, len(x) / (len(x) + older))
        with common.clock(self.counts, "edge_inference_s"):
            logits = self.model(x).float().cpu()
            if self.good and logits.isnan().any(1).sum() > len(x) / 2:
                fill(self.affine + self.stats, self.good)  # bad parameters, not a bad image
                logits = self.model(x).float().cpu()
        average_in(self.model, 0.0)
        self.counts["edge_forwards"] += len(x)
        chosen = self.choose(logits)
        if not chosen.any():
            return logits, None
        # The twin must normalise as the edge does, so the edge's statistics go up with the images.
        stats = [] if self.good else [t.clone() for t in self.stats]
        return logits, Upload(x[chosen.to(x.device)].cpu(), stats)

    def choose(self, logits: Tensor) -> Tensor:
        """Which images to upload.  (B, C) -> (B,) bool."""
        H, hp = entropy(logits), self.hp
        finite = H[H.isfinite()]  # one image whose logits overflow must not end all uploads
        self.batches += 1
        self.images += len(finite)
        self.h_sum += finite.sum().item()
        mean_h = self.h_sum / max(1, self.images)  # D1: with this batch in it
        if self.batches <= hp.warmup_batches or not self.h_warm:
            self.h_warm = mean_h
            self.e_max = self.e0 if hp.dynamic else hp.lam * self.e0
        elif hp.dynamic:
            self.e_max = e_max(self.e0, mean_h, self.h_warm, hp.lam)
        # ABLATE: With both thresholds 84.13 at 46 % uploads; without E_max (--no-dynamic --lam 100)
        # 85.12 at 55 %; without E_min (--e-min 0) 84.56 at 90 % (results/cema/ablation).
        chosen = worth_uploading(H, self.e_min, self.e_max)
        if hp.d_margin:
            probs = logits.softmax(1)
            chosen &= not_redundant(probs, self.mean_probs, hp.d_margin)
            self.mean_probs = moving_mean(self.mean_probs, probs[chosen])
        return SELECT[hp.select](logits, chosen, self.rng)


class Learner:
    """A network in the cloud, the optimizer of its affine parameters, the way back to their start."""
    STATE = ("model", "opt", "has_stats")

    def __init__(self, model: nn.Module, hp: Namespace, lr: float):
        self.model, self.affine, self.stats = configure(model, hp.bn, hp.affine, hp.bn_momentum)
        self.opt = torch.optim.SGD(self.affine, lr, hp.momentum)
        self.source = [p.detach().clone() for p in self.affine]
        self.source_stats = [t.clone() for t in self.stats]
        self.amp = hp.amp
        self.has_stats = False  # of the stream, no longer those of training

    def forward(self, x: Tensor, learn: bool) -> Tensor:
        """uint8 (B, 3, S, S) -> logits (B, C), fp32. learn: with a graph, and statistics move."""
        # Dropout and stochastic depth stay off.
        for m in self.model.modules():
            m.training = learn and isinstance(m, AdaptiveBN)
        # The very first batch's statistics are taken over whole, unless the edge has sent its own.
        average_in(self.model, float(learn and not self.has_stats))
        self.has_stats = self.has_stats or learn
        with torch.set_grad_enabled(learn), common.autocast(self.affine[0].device, self.amp):
            return self.model(x).float()

    def reset(self, stats: bool = False) -> None:
        """Affine parameters and momentum begin anew. BN statistics follow the images, and may stay."""
        fill(self.affine, self.source)
        self.opt.state.clear()
        if stats:
            fill(self.stats, self.source_stats)
            self.has_stats = False


class Cloud:
    """The foundation model f, and the twin of the edge's g with its uploads and its replay buffer."""
    STATE = ("f", "twin", "rng", "pending", "replay", "added", "steps", "sent", "rounds", "since_work")

    def __init__(self, edge_model: nn.Module, foundation: nn.Module, hp: Namespace, classes: int,
                 size: int, counts: Counter):
        self.f = Learner(foundation, hp, hp.lr_f)
        self.twin = Learner(edge_model, hp, hp.lr)
        self.hp, self.counts, self.e0 = hp, counts, hp.e0 * math.log(classes)
        self.rng = torch.Generator().manual_seed(hp.seed)
        self.pending = torch.empty(0, 3, size, size, dtype=torch.uint8)
        self.replay = torch.empty(hp.replay, 3, size, size, dtype=torch.uint8)  # a ring; 3 kB at 32 px
        self.added = 0  # images ever put into it
        self.steps, self.sent = 0, 0  # of the twin, and how many of them the edge has been told
        self.rounds, self.since_work = 0, 0  # calls of `learn`, and images of the edge since the last

    def step(self, arrived: list[Upload], images: int) -> Download | None:
        """What has come, and how many images the edge has seen since the last call -> a download."""
        for upload in arrived:
            if upload.stats and self.steps == 0:  # later the twin's own statistics are newer
                fill(self.twin.stats, upload.stats)
                self.twin.has_stats = True
            # Of a flood of uploads the newest stay, and `learn` is short.
            most = 16 * max(self.hp.cloud_batch, self.hp.batch_size)
            self.pending = torch.cat([self.pending, upload.images])[-most:]
        # Batches of one image set off no more work than large ones.
        self.since_work += images
        if self.since_work < self.hp.batch_size:
            return None
        self.since_work %= self.hp.batch_size
        try:
            self.learn()
        except InputError as e:  # NaN, by --lr or by hostile images, must not end the edge's loop
            warnings.warn(f"{e}; both networks begin anew")
            self.f.reset(stats=True)
            self.twin.reset(stats=True)
            self.counts["resets"] += 1
        self.rounds += 1
        if self.rounds % self.hp.download_every or self.sent == self.steps:
            return None
        self.sent = self.steps
        # All parameters, each time. A lost message harms nobody, since the next one is complete.
        affine, stats = self.twin.affine, self.twin.stats
        return Download([p.detach().clone() for p in affine], [t.clone() for t in stats])

    def learn(self) -> None:
        """A step of f and of the twin for each full batch of uploads; if there is none, replay alone."""
        hp, before = self.hp, self.steps
        while len(self.pending) >= hp.cloud_batch:
            u, self.pending = self.pending[:hp.cloud_batch], self.pending[hp.cloud_batch:]
            # f learns from the uploads alone, and this same forward gives its targets for them.
            f_logits = self.f.forward(u, learn=True)  # (32, C)
            if not hp.freeze_foundation:
                loss = entropy_loss(f_logits, self.e0)
                common.descend(self.f.opt, loss, "the loss of f", "--lr-f")
                self.counts["cloud_backwards"] += len(u)
            x, f_logits = u, f_logits.detach()
            # ABLATE: With replay 84.13; without (--replay 0) 84.26, for 41 % of the cloud's work. On
            # streams of 24 batches it is worth nothing (results/cema/ablation).
            if len(self.kept) >= hp.replay_min:
                old = self.draw(hp.replay_draw)
                x = torch.cat([u, old])  # (128, 3, S, S)
                f_logits = torch.cat([f_logits, self.f.forward(old, learn=False)])
            self.remember(u)  # only now: an upload is not replayed beside itself
            self.distil(x, f_logits)
        if hp.replay_only and self.steps == before and len(self.kept) > hp.replay_min:
            x = self.draw(hp.cloud_batch + hp.replay_draw)
            self.distil(x, self.f.forward(x, learn=False))
            self.counts["replay_only_steps"] += 1

    def distil(self, x: Tensor, f_logits: Tensor) -> None:
        """One step of the twin towards f, on images (B, 3, S, S) and f's logits (B, C) for them."""
        hp = self.hp
        logits = self.twin.forward(x, learn=True)
        loss = distillation_loss(logits, f_logits, self.e0, hp.alpha, hp.beta, hp.gamma, hp.temperature)
        common.descend(self.twin.opt, loss, "the loss of g", "--lr")
        # ABLATE: here ROID pulls each p of twin.affine 1 % back to source, and SAR returns to it when
        # the entropy's EMA falls below 0.2. Neither was measured.
        self.counts["cloud_forwards"] += 2 * len(x)  # by f and by the twin
        self.counts["cloud_backwards"] += len(x)
        self.steps += 1
        if hp.reset_every and self.steps % hp.reset_every == 0:  # RDumb
            self.f.reset()
            self.twin.reset()
            self.counts["resets"] += 1

    @property
    def kept(self) -> Tensor:
        """The images in the replay buffer, (n, 3, S, S)."""
        return self.replay[:min(self.added, len(self.replay))]

    def remember(self, u: Tensor) -> None:
        """First in, first out."""
        if self.hp.replay:
            u = u[-self.hp.replay:]
            self.replay[torch.arange(self.added, self.added + len(u)) % self.hp.replay] = u
            self.added += len(u)

    def draw(self, n: int) -> Tensor:
        """n images of the buffer, uniformly, without repetition.  -> (n, 3, S, S)"""
        return self.kept[torch.randperm(len(self.kept), generator=self.rng)[:n]]


class CEMA:
    """Edge, link and cloud, and one `step` of time.

        method = CEMA(edge_model, foundation, image_size=32, lam=0.5)  # keywords are the flags
        logits = method.step(x)                                        # learning happens behind it

    Both networks map uint8 images (B, 3, S, S) to logits (B, C), see FromBytes, and are copied; bf16:
    amp=True. Raises InputError for networks without norm layers or with different classes.
    """
    STATE = ("edge", "link", "cloud")

    def __init__(self, edge_model: nn.Module, foundation: nn.Module, image_size: int,
                 hp: Namespace | None = None, counts: Counter | None = None, **changes):
        self.hp = hp = common.defaults(build_parser, hp, **changes)
        self.counts = Counter() if counts is None else counts
        device, g = next(edge_model.parameters()).device, torch.Generator().manual_seed(0)
        noise = torch.randint(256, (2, 3, image_size, image_size), dtype=torch.uint8, generator=g)
        noise = noise.to(device)
        nets = edge_model.to(device).eval(), foundation.to(device).eval()
        C, C_f = (common.check_network(net, noise) for net in nets)
        need(C == C_f, f"the edge's network knows {C} classes, the foundation {C_f}")
        for net in nets:
            with torch.no_grad():
                same, was = configure(net, "source", hp.affine)[0](noise), net(noise)
            fits = torch.allclose(same, was, rtol=1e-3, atol=1e-3)
            need(fits, "answers change once BatchNorms adapt: one of them does more than normalise")
        room = max(hp.replay_min + hp.replay_only, hp.replay_draw)
        need(not 0 < hp.replay < room, f"--replay {hp.replay}: too few; expected 0, or {room} and more")
        most = hp.e0 * (max(1, hp.lam) if hp.dynamic else hp.lam)
        need(hp.e_min < most, f"--e-min {hp.e_min}: not below E_max, {most}: nothing would be uploaded")
        # ABLATE: several edges are several of these, with one `cloud.f` for all: not measured.
        self.edge = Edge(edge_model, hp, C, self.counts)
        self.cloud = Cloud(edge_model, foundation, hp, C, image_size, self.counts)
        self.link = Link(hp, self.counts)

    def step(self, x: Tensor) -> Tensor:
        """One batch.  uint8 (B, 3, S, S) -> logits (B, C), from before anything was learned of x."""
        shape = self.cloud.pending.shape[1:]
        need(x.dtype == torch.uint8 and x.shape[1:] == shape and len(x), f"step: images are {x.dtype} "
             f"{tuple(x.shape)}; expected uint8 (B, 3, S, S) with S = {shape[-1]}")
        # The edge never waits: it answers with what has arrived, and what it uploads is work for later.
        with common.clock(self.counts, "edge_s"):
            logits, upload = self.edge.step(x, self.link.receive("down"))
        if upload:
            self.counts["uploads"] += len(upload.images)
            self.link.send("up", upload)
        with common.clock(self.counts, "cloud_s"):
            download = self.cloud.step(self.link.receive("up"), len(x))
        if download:
            self.link.send("down", download)
        self.link.now += 1
        return logits


# ===== Evaluation and figures =======================================================================
# What CEMA is compared with. tools/streams.py counts right answers and prints the tables.

class Baseline:
    """What needs no cloud; `step` answers a batch as CEMA.step does, and adapts on the spot.

    source  the network as it is
    bn      BN adapt: each batch's own statistics (Nado et al. 2020, Schneider et al. 2020)
    tent    and one entropy step on all images of the batch (Wang et al., ICLR 2021)
    eta     and one weighted step on reliable, not redundant ones (Niu et al., ICML 2022: EATA without
            its Fisher term)
    """

    STATE = ("model", "opt", "mean_probs")

    def __init__(self, kind: str, model: nn.Module, hp: Namespace, classes: int, counts: Counter):
        self.kind, self.hp, self.counts, self.mean_probs = kind, hp, counts, None
        self.e0, self.learns = hp.e0 * math.log(classes), kind in ("tent", "eta")
        bn = "source" if kind == "source" else "batch"
        self.model, self.affine, _ = configure(model, bn, hp.affine)
        lr = {"tent": hp.tent_lr, "eta": hp.eta_lr}.get(kind, 0.0)
        self.opt = torch.optim.SGD(self.affine, lr, hp.momentum)

    def step(self, x: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> logits (B, C), from before the update."""
        with common.clock(self.counts, "edge_s"):
            device, amp = self.affine[0].device, self.hp.amp and self.learns
            with torch.set_grad_enabled(self.learns), common.autocast(device, amp):
                logits = self.model(x).float()
            answer = logits.detach().cpu()
            # As in the original repositories they learn from the very forward that gave the answer.
            kept = torch.full((len(x),), self.learns)
            if self.kind == "eta":
                probs = answer.softmax(1)
                kept = entropy(answer) < self.e0
                kept &= not_redundant(probs, self.mean_probs, self.hp.eta_d_margin)
                self.mean_probs = moving_mean(self.mean_probs, probs[kept])
            if kept.any():
                learned = logits[kept.to(device)]
                loss = entropy_loss(learned, self.e0) if self.kind == "eta" else entropy(learned).mean()
                common.descend(self.opt, loss, f"the loss of {self.kind}", f"--{self.kind}-lr")
        self.counts["edge_forwards"] += len(x)
        self.counts["edge_backwards"] += int(kept.sum())
        return answer


# ===== Run ==========================================================================================

def main(args: Namespace) -> None:
    streams = common.tool("streams")  # the benchmark, which the method does not need
    device = common.pick_device(args.device, several=True)
    args.amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data, domains, keep = streams.load_domains(args)
    stream = streams.Stream(domains, args.order, args.images, args.loop, args.seed)
    plan, tally = stream.batches(args.batch_size), streams.Tally(args, domains)
    nets = [FromBytes(net, own.mean, own.std, keep) for net, own in streams.networks(args, data, device)]

    def fresh(part: int) -> dict:
        """New methods, as at the start of each part of the stream. Their counts outlive them."""
        counts, C = tally.counts, len(keep or data.classes)
        made = {m: Baseline(m, nets[0], args, C, counts[m]) for m in args.methods if m != "cema"}
        if "cema" in args.methods:
            made["cema"] = CEMA(*nets, data.size, args, counts["cema"])
            made["cema"].link.rng.manual_seed(args.seed + 1000 * part)
        return made

    parts = [part for part, _ in plan] or [0]  # of each batch; a process of torchrun may have none
    methods, first, crc = fresh(parts[0]), 0, common.crc_of(*nets)
    state = streams.checkpoint(args, crc)
    if state:
        first = tally.restore(state, methods, len(plan))
    out = common.new_folder(args, f"runs/cema/{data.name}_{common.short_name(args.arch)}_{args.order}")
    log = common.RunLog(out, args, device, state=state)

    bar = common.progress(first, len(plan))
    for t, (x, y, d, i) in zip(bar, stream.seen(plan[first:], args.severity, args.seed)):
        if stream.resets and t and parts[t] != parts[t - 1]:
            methods = fresh(parts[t])
        x, cema = x.to(device), methods.get("cema")
        answers = streams.foundation_rows(nets[-1], cema, x)
        answers |= {m: methods[m].step(x) for m in args.methods}
        tally.add(answers, y, d)
        tally.write(log, bar, t, parts, cema)
        if (t + 1) % args.checkpoint_every == 0 and t + 1 < len(plan):
            common.save_checkpoint(log, args, crc=crc, **tally.state(methods, t + 1, len(plan)))
    streams.finish(tally, log)
    common.checkpoint_file(out).unlink(missing_ok=True)


if __name__ == "__main__":
    common.run(common.each_seed(main), parse)
