"""CEMA: test-time adaptation split between an edge that only runs forwards and a cloud that learns for it.

    "Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy Distillation"
    Yaofo Chen, Shuaicheng Niu, Yaowei Wang, Shoukai Xu, Hengjie Song, Mingkui Tan.
    ICLR 2024, arXiv 2402.17316.

The idea. A small network g on a device meets images unlike its training set, and cannot train itself. It sends the few images
worth learning from to a cloud, which holds a stronger network f and a twin of g. The cloud adapts f to the new images, distils
f into the twin's normalisation parameters, with images replayed from a buffer, and sends those few kilobytes back.

The algorithm.

    edge, for each batch x:
        take over the newest parameters that have arrived
        logits = g(x)                                                    # the answer that is scored
        upload the images with E_min < H(logits) < E_max                 # neither uninformative nor unreliable
    cloud, for every 32 uploads u:
        f    <- f    - lr_f * grad mean[ w(f) H(f(u)) ]                  # w = exp(E_0 - H), no gradient through it
        x    =  u and 96 images from the replay buffer
        twin <- twin - lr * grad mean[ alpha w(g) H(g(x)) + beta w(f) KL(f(x) || g(x)) + gamma w(f) CE(g(x), argmax f(x)) ]
    cloud, when a batch brought no such step:  the second step alone, on 128 replayed images
    cloud, every K batches:  the twin's affine parameters and BN statistics -> edge

Symbols.

    paper              code             shape         unit      flag
    g, f               edge.model, f    uint8 images -> (B, C)  --arch --weights --foundation --foundation-weights
    H, E(x)            H                (B,)          nats
    E_0                e0               float         ln C      --e0
    E_max^t            e_max            float         nats      --lam --dynamic --warmup-batches
    E_min              e_min            float         ln C      --e-min
    S(x)               chosen           (B,) bool               --select
    B (replay)         replay           (n, 3, S, S) uint8      --replay --replay-draw --replay-min
    alpha beta gamma   alpha beta gamma float                   --alpha --beta --gamma
    K                  download_every   int           batches   --download-every

Protocol: the questions that are otherwise asked in issues.

    Which parameters move?     Weight and bias of BatchNorm, LayerNorm and GroupNorm, in f and in the twin. Nothing else.
    Where do BN statistics     --bn ema (default): the edge takes them from its first batch and sends them up with its first
    come from?                 uploads; from then on they move in the cloud only, on uploaded and replayed images, and come down
                               with the parameters. The cloud's forward normalises by these running statistics too; its
                               gradient flows through the batch's (batch renormalisation). --bn batch: those of each batch at
                               hand. --bn source: those of training. --bn edge (ours): a running mean over all images, kept by the
                               edge and sent up with the uploads. BN adapt, Tent and ETA use each batch's, as published.
    Predict or update first?   Predict. An image is scored with parameters that never saw it.
    Who sees labels?           Nobody. They are counted by the loop below, outside every method.
    When is all forgotten?     --order reset: at the start of each corruption, as in the paper's tables.
    What is a budget?          uploads % for CEMA, the share of back-propagated images for ETA. Same thing: images learned from.
    Foundation rows            f scored on every image of the stream, before (source) and while it adapts. Measured for the table
                               only: the edge does not send those images, and their forwards are not counted.

Departures and choices, with the flag that goes back. [?] could not be checked against the paper.

    D1  E_max moves before the batch is filtered, as in the published code; the paper's algorithm moves it after.
    D2  The length of the warm-up is ours [?].                                                      --warmup-batches
    D3  In published code one process holds both ends. Here only bytes pass; so the edge's first uploads carry its BN statistics
        (--bn ema), and a download carries affine parameters and statistics.
    D4  Uploads of less than 32 wait for the next ones. f's targets for u come from the forward that also adapts f: one forward.
    D5  The replay-only step comes once every --batch-size images, also when batches are smaller.
    D6  Frozen f: its affine parameters stay, its BN statistics still follow --bn.                  --freeze-foundation
    D7  bf16 autocast in the cloud, where the hardware has it. The edge computes in fp32.           --no-amp

    D8  --bn edge, and --recipe few-classes, which makes --bn batch and higher learning rates the defaults: with 10 classes the
        uploads are the hard classes, and statistics of uploads alone misfit the easy ones. The README has the figures.

    python cema.py                                      # 5 corruptions x 2,000 images, all methods: 84 s on 2 CPU cores
    python cema.py --corruptions all --images 10000     # the full protocol: not run yet, about 40 minutes on one core
    python cema.py --link-delay 50 --link-drop 0.3 --link-corrupt 0.01
"""

import argparse
import copy
import inspect
import json
import math
import os
import struct
import time
import zlib
from collections import Counter, deque
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import common
from common import InputError, entropy, number

# ===== Hyperparameters ===============================================================================================

METHODS = ("source", "bn", "tent", "eta", "cema")
DEFAULT_CORRUPTIONS = ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")
STREAMS = ("generated", "imagenet-c", "cifar-c", "imagenet-r", "folder")
ORDERS = ("reset", "lifelong", "mixed", "label-shift")
# What changes with 10 classes, chosen on the four held-out corruptions of Fashion-MNIST: the README's results say why.
RECIPES = {"paper": {}, "few-classes": dict(bn="batch", lr=2e-2, tent_lr=1e-1, eta_lr=1e-1)}


def build_parser() -> argparse.ArgumentParser:
    p = common.Parser(prog="cema.py", description=__doc__.split("\n\n")[0])
    a = p.add_argument_group("task").add_argument
    a("--arch", default="resnet20", help="the edge's network g: resnet20/32/44/56, or any torchvision classifier with norm layers")
    a("--weights", default=None, help="its checkpoint; None: weights/<dataset>_<arch>.pt, or torchvision's for 1000 classes")
    a("--foundation", default="resnet20x2", help="the cloud's network f")
    a("--foundation-weights", default=None, help="its checkpoint; None: as for --weights")
    a("--dataset", default="fashion", help="whose test images are corrupted: fashion (embedded), cifar10, cifar100, imagenet, a folder, a .npz")
    a("--data-dir", default="data", help="where cifar, imagenet, and the folders of --stream lie")
    a("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="rows of the table, all over the same stream")
    a("--recipe", default="paper", choices=list(RECIPES), help="few-classes: BN statistics and learning rates for 10 classes; other flags still win")
    a = p.add_argument_group("stream").add_argument
    a("--stream", default="generated", choices=STREAMS,
      help="generated: corruptions of --dataset. imagenet-c: --data-dir/corruption/severity/wnid/*.JPEG. cifar-c: --data-dir/corruption.npy and "
           "labels.npy, of CIFAR-10-C or -100-C as --dataset says. imagenet-r: --data-dir/wnid/*, 200 classes. folder: any ImageFolder")
    a("--corruptions", nargs="+", default=list(DEFAULT_CORRUPTIONS), help="names, or: all (15), held-out (4, for tuning)")
    a("--severity", type=number(int, 1, 5), default=5, help="1 to 5; the paper reports 3 and 5")
    a("--images", type=number(int, 1), default=2000, help="of each corruption, drawn by --seed; the benchmark: all")
    a("--order", default="reset", choices=ORDERS,
      help="reset: new models for each corruption, the paper's. lifelong: one after the other, never reset. mixed: all shuffled together. "
           "label-shift: reset, and each corruption sorted by class")
    a("--loop", type=number(int, 1), default=1, help="the stream that many times over")
    a("--batch-size", type=number(int, 1), default=64, help="images the edge sees at once; published: 64")
    a("--edges", type=number(int, 1), default=1, help="devices that take the batches in turn; the cloud keeps one twin for each, and one f")
    a("--wnids", default=None, help="imagenet-r: a folder with the 1000 class folders, or a text file with the 1000 wnids: which 200 these are")
    a = p.add_argument_group("edge").add_argument
    a("--e0", type=number(float, 0), help="E_0 as a share of ln C; larger uploads more and weighs all losses up. Published: 0.4")
    a("--lam", type=number(float, 0), help="lambda of E_max; larger uploads more, 100 switches E_max off. Published: 1 [?]")
    a("--dynamic", action=argparse.BooleanOptionalAction, help="E_max follows the mean entropy; without: E_max = lambda E_0")
    a("--warmup-batches", type=number(int, 1), help="batches before E_max moves; ours [?]")
    a("--e-min", type=number(float, 0), help="as a share of ln C; 0 uploads the surest images, too. Published: 0.02")
    a("--d-margin", type=number(float, 0, 1), help="EATA's redundancy filter: |cos| with the mean prediction below this; 0: off. Published: off, or 0.05")
    a("--select", choices=["entropy", "random", "all", "none"], help="random: as many images of the batch as entropy would choose")
    a("--seed-images", type=number(int, 1), help="first images whose BN statistics the edge averages (--bn ema, edge). Published: one batch of 64")
    a = p.add_argument_group("cloud").add_argument
    a("--lr", type=number(float, 0), help="SGD on the twin; too high shows as accuracy that falls along the stream. Published: 2.5e-3")
    a("--lr-f", type=number(float, 0), help="SGD on f. Published: 2.5e-4")
    a("--momentum", type=number(float, 0, 1), help="of both. Published: 0.9")
    a("--alpha", type=number(float, 0), help="weight of the twin's own entropy. Published: 3")
    a("--beta", type=number(float, 0), help="weight of KL(f || g). Published: 3")
    a("--gamma", type=number(float, 0), help="weight of CE(g, argmax f). Published: 1")
    a("--temperature", type=number(float, 1e-3), help="T of the KL term. Published: 1")
    a("--cloud-batch", type=number(int, 1), help="uploads a step. Published: 32")
    a("--replay", type=number(int, 0), help="images kept, first in first out; 0: no replay. Published: 10000")
    a("--replay-draw", type=number(int, 1), help="replayed images beside the uploads. Published: 96")
    a("--replay-min", type=number(int, 1), help="images the buffer must hold before it is used. Published: 256")
    a("--replay-only", action=argparse.BooleanOptionalAction, help="a step on replayed images alone when no upload step ran. Published: on")
    a("--freeze-foundation", action=argparse.BooleanOptionalAction, help="f is not adapted")
    a("--download-every", type=number(int, 1), help="K, batches. Published: 1")
    a("--bn", choices=["ema", "batch", "source", "edge"], help="where BN statistics come from, see the protocol block. Published: ema")
    a("--bn-momentum", type=number(float, 0, 1), help="share of a batch in running statistics (--bn ema, edge). Published: 0.1")
    a("--affine", nargs="+", choices=["bn", "ln", "gn"], help="norm layers whose weight and bias move. Published: bn")
    a("--reset-every", type=number(int, 0), help="cloud steps between returns to the source networks (RDumb); 0: never")
    a("--pull-to-source", type=number(float, 0, 1), help="share of the way back to source after each step (ROID: 0.01); 0: none")
    a("--recover-below", type=number(float, 0), help="back to source when the EMA of the twin's entropy falls below this, nats (SAR: 0.2); 0: never")
    a = p.add_argument_group("link").add_argument
    a("--link-delay", type=number(int, 0), default=0, help="batches a message takes, each way")
    a("--link-drop", type=number(float, 0, 1), default=0.0, help="share of messages lost, each way")
    a("--link-corrupt", type=number(float, 0, 1), default=0.0, help="share of messages with a wrong byte or a missing end, each way")
    a = p.add_argument_group("baselines").add_argument
    a("--tent-lr", type=number(float, 0), default=2.5e-4, help="SGD of Tent, on all images. Published: 2.5e-4 (ImageNet)")
    a("--eta-lr", type=number(float, 0), default=2.5e-4, help="SGD of ETA. Published: 2.5e-4 (ImageNet), 5e-3 (CIFAR-10)")
    a("--eta-d-margin", type=number(float, 0, 1), default=0.4, help="its redundancy filter. Published: 0.05 (ImageNet), 0.4 (CIFAR-10)")
    a = p.add_argument_group("run").add_argument
    a("--out", default=None, help="folder for log.jsonl, or the picture of --plot; None: runs/cema/<dataset>_<arch>_<order>_s0")
    a("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of corruptions, order, replay draws and link")
    a("--device", default="auto", help="auto, cpu, cuda, mps")
    a("--amp", action=argparse.BooleanOptionalAction, default=None, help="bf16 autocast in all training; None: where the hardware has it")
    a("--score-foundation", action=argparse.BooleanOptionalAction, default=True, help="the two rows of f; costs a forward of f an image")
    a("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on from the last checkpoint in --out; bitwise on a CPU")
    a("--checkpoint-every", type=number(int, 1), default=500, help="batches between checkpoints")
    a("--log-every", type=number(int, 1), default=10, help="batches between step records")
    a("--plot", nargs="+", metavar="DIR", default=None,
      help="draw the logs of these folders, nothing else. One: accuracy in each pass of --loop. Several: accuracy against uploads. "
           "Writes --out, or <first folder>.png; needs matplotlib")
    # CEMA's own defaults stand in CEMA.__init__, once, for those who import the class.
    p.set_defaults(**method_defaults())
    return p


def method_defaults() -> dict:
    """The keywords of CEMA that are flags, with their defaults."""
    other = ("edge_model", "foundation", "links", "counts", "image_size", "batch_size", "seed", "amp", "device")
    return {k: v.default for k, v in inspect.signature(CEMA).parameters.items() if k not in other}


# ===== Equations =====================================================================================================


def sample_weight(H: Tensor, e0: float) -> Tensor:
    """w(x) = exp(E_0 - H(x)), a constant for the gradient: the surer a prediction, the more it counts.  (B,) -> (B,)."""
    return torch.exp(e0 - H.detach())


def e_max(e0: float, mean_h: float, mean_h_warm: float, lam: float) -> float:
    """E_max^t = lambda E_0 * (mean of H over all images so far) / (that mean at the end of the warm-up), nats.

    The paper's recursion, E_max^t from E_max^{t-1} times the ratio of successive means, telescopes to this for lambda = 1.
    """
    return lam * e0 * mean_h / mean_h_warm


def worth_uploading(H: Tensor, low: float, high: float) -> Tensor:
    """S(x) = [E_min < H(x) < E_max].  (B,) nats -> (B,) bool. Above: unreliable, would teach errors. Below: nothing to learn."""
    return (low < H) & (H < high)


def not_redundant(probs: Tensor, mean_probs: Tensor | None, margin: float) -> Tensor:
    """EATA's filter: |cos(softmax(x), EMA of the mean softmax)| < margin.  (B, C), (C,) -> (B,) bool. margin 0: all pass."""
    if not margin or mean_probs is None:
        return torch.ones(len(probs), dtype=torch.bool, device=probs.device)
    return F.cosine_similarity(probs, mean_probs[None], dim=1).abs() < margin


def entropy_loss(logits: Tensor, e0: float) -> Tensor:
    """mean[ exp(E_0 - H) H ], weight detached: what adapts f, and ETA.  (B, C) -> scalar, nats."""
    H = entropy(logits)
    return (sample_weight(H, e0) * H).mean()


def distillation_loss(g_logits: Tensor, f_logits: Tensor, e0: float, alpha: float, beta: float, gamma: float, T: float) -> Tensor:
    """mean[ alpha w(g) H(g) + beta w(f) T^2 KL(f || g) + gamma w(f) CE(g, argmax f) ].  (B, C), (B, C) -> scalar, nats.

    w(g) and w(f) are sample weights by the entropy of g and of f.
    """
    H_g, w_f = entropy(g_logits), sample_weight(entropy(f_logits), e0)
    log_g, log_f = F.log_softmax(g_logits / T, 1), F.log_softmax(f_logits / T, 1)
    kl = T**2 * (log_f.exp() * (log_f - log_g)).sum(1)  # (B,)
    ce = F.cross_entropy(g_logits, f_logits.argmax(1), reduction="none")  # (B,)
    return (alpha * sample_weight(H_g, e0) * H_g + beta * w_f * kl + gamma * w_f * ce).mean()


# ===== Model surgery =================================================================================================


class FromBytes(nn.Module):
    """uint8 images (B, 3, S, S) -> logits (B, C): a network with its own normalisation; `keep` masks the classes (C,) of a stream
    that knows fewer than the network."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float], keep: list[int] | None = None):
        super().__init__()
        self.net, self.mean, self.std, self.keep = net, mean, std, keep

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(common.to_input(x, self.mean, self.std, next(self.net.parameters()).device))
        return logits if self.keep is None else logits[:, self.keep]


class AdaptiveBN(nn.Module):
    """A BatchNorm whose statistics come from training ("source"), from the batch at hand ("batch"), or from a running mean of the
    test stream ("ema": of what the cloud sees; "edge": of what the edge sees); weight and bias are the original's.

    The last two normalise by the running statistics. In train mode, the cloud's, the gradient flows through the batch's statistics
    (batch renormalisation, Ioffe 2017: x_hat = (x - mu_B) / sd_B * r + d with r, d constant, equal in value to (x - mu) / sd),
    and the running ones move. Without the renormalisation the gradient would not see that weights upstream change mu and sd.
    """

    def __init__(self, bn: _BatchNorm, mode: str, momentum: float):
        super().__init__()
        self.weight, self.bias, self.eps, self.mode, self.momentum = bn.weight, bn.bias, bn.eps, mode, momentum
        self.register_buffer("running_mean", bn.running_mean.clone())
        self.register_buffer("running_var", bn.running_var.clone())
        self.seeding = 0.0  # see `averaging`

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "batch":
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if self.mode == "source" or not (self.training or self.seeding):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        with torch.no_grad():
            mu, var = common.BatchMoments.apply(x)
            if self.seeding:
                square = (self.running_var + self.running_mean**2).lerp_(var + mu**2, self.seeding)  # E[x^2] averages, var does not
                self.running_mean.lerp_(mu, self.seeding)
                self.running_var.copy_(square - self.running_mean**2)
            sd = (self.running_var + self.eps).sqrt()
            r, d = (var + self.eps).sqrt() / sd, (mu - self.running_mean) / sd
            if not self.seeding:
                self.running_mean.lerp_(mu, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        # r and d go into weight and bias: one fused batch_norm, as fast as a plain one.
        return F.batch_norm(x, None, None, self.weight * r, self.bias + self.weight * d, True, 0.0, self.eps)


@contextmanager
def averaging(model: nn.Module, share: float):
    """Within it a forward of `model` averages the batch's statistics into the running ones; share 1 takes them over, 0 does nothing."""
    layers = [m for m in model.modules() if isinstance(m, AdaptiveBN) and m.mode in ("ema", "edge")] if share else []
    for m in layers:
        m.seeding = share
    yield
    for m in layers:
        m.seeding = 0.0


def configure(model: nn.Module, bn: str, kinds: list[str] = ("bn",), momentum: float = 0.1) -> tuple[nn.Module, list[nn.Parameter], list[Tensor]]:
    """A copy of `model` that can be adapted, its affine parameters, and its BN statistics (means and variances; [] unless they run).

    Only the affine parameters of norm layers of these kinds require a gradient. Raises InputError if there are none.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and child.running_mean is not None and child.weight is not None:
                setattr(parent, name, AdaptiveBN(child, bn, momentum))
    types = {"bn": AdaptiveBN, "ln": nn.LayerNorm, "gn": nn.GroupNorm}
    layers = [m for m in model.modules() if isinstance(m, tuple(types[k] for k in kinds)) and m.weight is not None]
    affine = [p.requires_grad_(True) for m in layers for p in (m.weight, m.bias) if p is not None]
    if not affine:
        have = [k for k, t in types.items() if any(isinstance(m, t) for m in model.modules())]
        raise InputError(f"the network has no norm layers of the kinds {' '.join(kinds)}, so nothing can adapt; " +
                         (f"--affine {' '.join(have)}, or another network" if have else "choose another network"))
    stats = [t for m in model.modules() if isinstance(m, AdaptiveBN) and m.mode in ("ema", "edge") for t in (m.running_mean, m.running_var)]
    return model.eval(), affine, stats


# ===== Messages and link =============================================================================================
#
# All that edge and cloud know of each other. No pickle: a damaged or hostile message can be refused, and never executed.
#
#     upload      "CEMU" n S k | n x 3 x S x S bytes | k fp32 BN statistics | crc32
#     download    "CEMD" version a k | a fp32 affine parameters | k fp32 BN statistics | crc32


class Refused(Exception):
    """A message that cannot be used; the receiver keeps what it has, and counts."""


HEADER = struct.Struct("<4sIII")


def floats(tensors: list[Tensor]) -> bytes:
    return torch.cat([t.detach().flatten().float().cpu() for t in tensors]).numpy().astype("<f4").tobytes() if tensors else b""


def encode_upload(images: Tensor, stats: list[Tensor] = ()) -> bytes:
    """uint8 images (n, 3, S, S), as a camera would send them, and BN statistics."""
    body = HEADER.pack(b"CEMU", len(images), images.shape[-1], sum(t.numel() for t in stats)) + images.cpu().numpy().tobytes() + floats(stats)
    return body + struct.pack("<I", zlib.crc32(body))


def encode_download(version: int, affine: list[Tensor], stats: list[Tensor]) -> bytes:
    """All parameters, each time: a lost message harms nobody, since the next one is complete."""
    sizes = [sum(t.numel() for t in part) for part in (affine, stats)]
    body = HEADER.pack(b"CEMD", version, *sizes) + floats(affine) + floats(stats)
    return body + struct.pack("<I", zlib.crc32(body))


def open_message(message: bytes, magic: bytes) -> tuple[tuple[int, int, int], bytes]:
    """The three numbers of the header, and the payload. Raises Refused."""
    if len(message) < HEADER.size + 4:
        raise Refused("too short")
    if zlib.crc32(message[:-4]) != struct.unpack("<I", message[-4:])[0]:
        raise Refused("checksum")
    kind, *numbers = HEADER.unpack(message[:HEADER.size])
    if kind != magic:
        raise Refused("not of this kind")
    return tuple(numbers), message[HEADER.size:-4]


def read_floats(payload: bytes, n: int) -> Tensor:
    if len(payload) != 4 * n:
        raise Refused("wrong size")
    values = torch.from_numpy(np.frombuffer(payload, "<f4").astype(np.float32))
    if not torch.isfinite(values).all():
        raise Refused("not finite")
    return values


def decode_upload(message: bytes, size: int, stats: int) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 3, S, S), and fp32 statistics (stats,) or (0,). Raises Refused for anything else than that."""
    (n, S, k), payload = open_message(message, b"CEMU")
    if S != size or k not in (0, stats) or len(payload) != n * 3 * S * S + 4 * k:
        raise Refused("wrong shape")
    images = torch.from_numpy(np.frombuffer(payload, np.uint8, n * 3 * S * S).copy()).view(n, 3, S, S)
    return images, read_floats(payload[n * 3 * S * S:], k)


def decode_download(message: bytes, affine: int, stats: int, newer_than: int) -> tuple[int, Tensor]:
    """The version, and fp32 (affine + stats,). Raises Refused unless it is newer, whole, finite and of these sizes."""
    (version, a, k), payload = open_message(message, b"CEMD")
    if version <= newer_than:
        raise Refused("stale")
    if (a, k) != (affine, stats):
        raise Refused("wrong shape")
    return version, read_floats(payload, a + k)


def fill(tensors: list[Tensor], values: Tensor) -> None:
    """The inverse of `floats`: a flat vector back into the tensors it was made of."""
    with torch.no_grad():
        for t, part in zip(tensors, values.split([t.numel() for t in tensors])):
            t.copy_(part.view(t.shape))


class Link:
    """Carries byte strings, both ways, late and not always whole. `tick` is one edge batch of time."""

    def __init__(self, delay_batches: int = 0, drop: float = 0.0, corrupt: float = 0.0, seed: int = 0):
        self.delay, self.drop, self.corrupt = delay_batches, drop, corrupt
        self.rng = torch.Generator().manual_seed(seed)
        self.now, self.queues = 0, {"up": deque(), "down": deque()}  # of (due, message)

    def send(self, way: str, message: bytes) -> None:
        if not isinstance(message, bytes):
            raise TypeError(f"a link carries bytes, not {type(message).__name__}")
        lost, broken, cut, where = torch.rand(4, generator=self.rng, dtype=torch.float64).tolist()
        if lost < self.drop:
            return
        if broken < self.corrupt:
            at = int(where * len(message))
            message = message[:at] if cut < 0.5 else message[:at] + bytes([message[at] ^ 0x55]) + message[at + 1:]
        self.queues[way].append((self.now + self.delay, message))

    def receive(self, way: str) -> list[bytes]:
        """What has arrived by now, oldest first."""
        queue, arrived = self.queues[way], []
        while queue and queue[0][0] <= self.now:
            arrived.append(queue.popleft()[1])
        return arrived

    def tick(self) -> None:
        self.now += 1

    def state_dict(self) -> dict:
        as_tensor = lambda message: torch.from_numpy(np.frombuffer(message, np.uint8).copy())
        return {"rng": self.rng.get_state(), "now": self.now} | {w: [(due, as_tensor(m)) for due, m in q] for w, q in self.queues.items()}

    def load_state_dict(self, state: dict) -> None:
        self.rng.set_state(state["rng"])
        self.now = state["now"]
        self.queues = {w: deque((due, m.numpy().tobytes()) for due, m in state[w]) for w in ("up", "down")}


# ===== Method ========================================================================================================


class Edge:
    """A device: forward passes, a threshold, and messages. It holds no optimizer, no gradient, and nothing of the cloud's.

    `model` maps uint8 images (B, 3, S, S) to logits (B, C). `step` answers a batch and returns what to upload.
    """

    def __init__(self, model: nn.Module, counts: Counter, bn: str, affine: list[str], e0: float, e_min: float, lam: float, dynamic: bool,
                 warmup_batches: int, d_margin: float, select: str, seed_images: int, bn_momentum: float, seed: int):
        self.model, self.affine, self.stats = configure(model, bn, affine)
        self.model.requires_grad_(False)
        self.counts, self.e0, self.e_min, self.lam, self.dynamic = counts, e0, e_min, lam, dynamic
        self.warmup_batches, self.d_margin, self.select = warmup_batches, d_margin, select
        self.seed_images, self.bn_momentum = seed_images, bn_momentum
        self.keeps_stats = bn == "edge"
        self.download = self.affine + ([] if self.keeps_stats else self.stats)
        self.sizes = [sum(t.numel() for t in self.affine), 0 if self.keeps_stats else sum(t.numel() for t in self.stats)]
        self.rng = torch.Generator().manual_seed(seed)
        self.version, self.batches, self.h_sum, self.h_n, self.h_warm, self.mean_probs = 0, 0, 0.0, 0, 0.0, None
        self.e_max = e0

    @torch.no_grad()
    def step(self, x: Tensor, arrived: list[bytes]) -> tuple[Tensor, bytes | None]:
        """x: uint8 (B, 3, S, S); arrived: downloads. Returns logits (B, C), and an upload or None."""
        for message in arrived:
            try:
                self.version, values = decode_download(message, *self.sizes, self.version)
                fill(self.download, values)
            except Refused:
                self.counts["refused_messages"] += 1  # and the last good parameters stay
        t0 = time.perf_counter()
        with averaging(self.model, self.share(len(x))):
            logits = self.model(x).float().cpu()  # also waits for an accelerator: the time below is the inference's
        self.counts["edge_inference_s"] += time.perf_counter() - t0
        self.counts["edge_forwards"] += len(x)
        chosen = self.choose(logits)
        # The cloud's twin must normalise as the edge does. Until a download shows that it does, its statistics travel along.
        stats = self.stats if self.version == 0 or self.keeps_stats else []
        return logits, encode_upload(x[chosen.to(x.device)], stats) if chosen.any() else None

    def share(self, n: int) -> float:
        """What a batch of n images weighs in the running statistics that the edge makes: all it has at first, and later nothing.

        ABLATE: without this average over the first images, --batch-size 1 begins with the statistics of one image.
        """
        if self.version and not self.keeps_stats:
            return 0.0  # the cloud's have come
        first = n / (self.h_n + n) if self.h_n < self.seed_images else 0.0
        return max(first, 1 - (1 - self.bn_momentum) ** (n / self.seed_images)) if self.keeps_stats else first

    def choose(self, logits: Tensor) -> Tensor:
        """Which images to upload.  (B, C) -> (B,) bool."""
        H = entropy(logits)
        self.batches += 1
        self.h_sum, self.h_n = self.h_sum + H.sum().item(), self.h_n + len(H)
        if self.batches <= self.warmup_batches:
            self.h_warm, self.e_max = self.h_sum / self.h_n, self.e0 if self.dynamic else self.lam * self.e0
        elif self.dynamic:
            self.e_max = e_max(self.e0, self.h_sum / self.h_n, self.h_warm, self.lam)
        chosen = worth_uploading(H, self.e_min, self.e_max)
        if self.d_margin:
            probs = logits.softmax(1)
            chosen &= not_redundant(probs, self.mean_probs, self.d_margin)
            self.mean_probs = moving_mean(self.mean_probs, probs[chosen])
        if self.select == "random":
            chosen = torch.randperm(len(H), generator=self.rng) < chosen.sum()
        elif self.select != "entropy":
            chosen = torch.full_like(chosen, self.select == "all")
        return chosen

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "rng": self.rng.get_state()} | {
            k: getattr(self, k) for k in ("version", "batches", "h_sum", "h_n", "h_warm", "mean_probs", "e_max")}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.rng.set_state(state["rng"])
        for k in ("version", "batches", "h_sum", "h_n", "h_warm", "mean_probs", "e_max"):
            setattr(self, k, state[k])


def moving_mean(mean: Tensor | None, probs: Tensor) -> Tensor | None:
    """EATA's EMA of the mean softmax of the images kept, 0.9 old and 0.1 new.  (C,) or None, (n, C) -> (C,) or None."""
    if not len(probs):
        return mean
    return probs.mean(0) if mean is None else 0.9 * mean + 0.1 * probs.mean(0)


class Adapted:
    """A network in the cloud that learns: its affine parameters, its optimizer, and the way back to where it began."""

    def __init__(self, model: nn.Module, bn: str, affine: list[str], bn_momentum: float, lr: float, momentum: float):
        self.model, self.affine, self.stats = configure(model, bn, affine, bn_momentum)
        self.opt = torch.optim.SGD(self.affine, lr, momentum)
        self.source, self.seeded = [p.detach().clone() for p in self.affine], False

    def forward(self, x: Tensor, amp: bool, learn: bool) -> Tensor:
        """Logits (B, C), fp32. learn: with a graph, and the running statistics move."""
        self.model.train(learn)
        for m in self.model.modules():
            if not isinstance(m, AdaptiveBN):
                m.training = False  # dropout and stochastic depth stay off
        device = self.affine[0].device
        with torch.set_grad_enabled(learn), common.autocast(device, amp), averaging(self.model, float(learn and not self.seeded)):
            logits = self.model(x).float()
        self.seeded = self.seeded or learn
        return logits

    def descend(self, loss: Tensor, name: str, flag: str, pull: float) -> None:
        if not math.isfinite(loss.item()):
            raise InputError(f"{name} is {loss.item()}; lower {flag}")
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        self.opt.step()
        if pull:
            with torch.no_grad():
                for p, p0 in zip(self.affine, self.source):
                    p.lerp_(p0, pull)

    def reset(self) -> None:
        """Affine parameters and momentum begin anew. Statistics stay: they follow the images, and do not drift."""
        with torch.no_grad():
            for p, p0 in zip(self.affine, self.source):
                p.copy_(p0)
        self.opt.state.clear()

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "opt": self.opt.state_dict(), "seeded": self.seeded}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.seeded = state["seeded"]


class Twin(Adapted):
    """The cloud's copy of one edge's network, with that edge's uploads and replay buffer."""

    def __init__(self, model: nn.Module, bn: str, affine: list[str], bn_momentum: float, lr: float, momentum: float, size: int,
                 replay: int, seed: int):
        # --bn edge: the statistics are the edge's, and nobody else moves them.
        super().__init__(model, bn, affine, 0.0 if bn == "edge" else bn_momentum, lr, momentum)
        self.pending = torch.empty(0, 3, size, size, dtype=torch.uint8)
        self.replay, self.added = torch.empty(replay, 3, size, size, dtype=torch.uint8), 0  # 3 kB an image of 32 px
        self.rng = torch.Generator().manual_seed(seed)
        self.bn = bn
        self.steps, self.version, self.h_ema = 0, 0, None  # a version is a number of steps: the newer one is the larger

    @property
    def replayed(self) -> int:
        return min(self.added, len(self.replay))

    def remember(self, u: Tensor) -> None:
        """First in, first out."""
        u = u[-len(self.replay):] if len(self.replay) else u[:0]
        slots = torch.arange(self.added, self.added + len(u)) % max(1, len(self.replay))
        self.replay[slots] = u
        self.added += len(u)

    def draw(self, n: int) -> Tensor:
        """n images of the buffer, uniformly, without repetition.  -> (n, 3, S, S)"""
        return self.replay[torch.randperm(self.replayed, generator=self.rng)[:n]]

    def state_dict(self) -> dict:
        return super().state_dict() | {"pending": self.pending, "replay": self.replay[:self.replayed].clone(), "added": self.added,
                                       "rng": self.rng.get_state(), "steps": self.steps, "version": self.version, "h_ema": self.h_ema}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for k in ("pending", "added", "steps", "version", "h_ema"):
            setattr(self, k, state[k])
        self.replay[:len(state["replay"])] = state["replay"]
        self.rng.set_state(state["rng"])


class Cloud:
    """The foundation model f, and a twin of each edge's g. `receive` takes uploads, `work` learns and returns downloads."""

    def __init__(self, edge_model: nn.Module, foundation: nn.Module, edges: int, counts: Counter, *, bn, bn_momentum, affine, e0, lr, lr_f, momentum,
                 alpha, beta, gamma, temperature, cloud_batch, replay, replay_draw, replay_min, replay_only, freeze_foundation,
                 download_every, reset_every, pull_to_source, recover_below, image_size, seed, amp):
        self.f = Adapted(foundation, bn, affine, bn_momentum, lr_f, momentum)
        self.twins = [Twin(edge_model, bn, affine, bn_momentum, lr, momentum, image_size, replay, seed + i) for i in range(edges)]
        self.counts, self.e0, self.cloud_batch, self.amp, self.image_size = counts, e0, cloud_batch, amp, image_size
        self.loss_weights, self.temperature = (alpha, beta, gamma), temperature
        self.replay_draw, self.replay_min, self.replay_only, self.freeze = replay_draw, replay_min, replay_only, freeze_foundation
        self.download_every, self.reset_every, self.pull, self.recover_below = download_every, reset_every, pull_to_source, recover_below
        self.rounds = [0] * edges

    def receive(self, message: bytes, edge: int) -> None:
        twin = self.twins[edge]
        n_stats = sum(t.numel() for t in twin.stats)
        try:
            images, stats = decode_upload(message, self.image_size, n_stats)
            if len(stats) and (twin.steps == 0 or twin.bn == "edge"):
                parts = stats.split([t.numel() for t in twin.stats])
                if any((var < 0).any() for var in parts[1::2]):
                    raise Refused("negative variance")
                fill(twin.stats, stats)
                twin.seeded = True
        except Refused:
            self.counts["refused_messages"] += 1
            return
        twin.pending = torch.cat([twin.pending, images])

    def work(self, edge: int) -> bytes | None:
        """What one batch of an edge sets off: steps on its uploads, or one on its replay buffer alone; and a download."""
        twin, before = self.twins[edge], self.twins[edge].steps
        while len(twin.pending) >= self.cloud_batch:
            u, twin.pending = twin.pending.split([self.cloud_batch, len(twin.pending) - self.cloud_batch])
            self.upload_step(twin, u)
        if self.replay_only and twin.steps == before and twin.replayed > self.replay_min:
            x = twin.draw(self.cloud_batch + self.replay_draw)
            self.distil(twin, x, self.foundation(x, learn=False))
            self.counts["replay_only_steps"] += 1
        self.rounds[edge] += 1
        if twin.version < twin.steps and self.rounds[edge] % self.download_every == 0:
            twin.version = twin.steps
            return encode_download(twin.version, twin.affine, [] if twin.bn == "edge" else twin.stats)
        return None

    def foundation(self, x: Tensor, learn: bool) -> Tensor:
        self.counts["cloud_forwards"] += len(x)
        return self.f.forward(x, self.amp, learn)

    def upload_step(self, twin: Twin, u: Tensor) -> None:
        """f learns from the uploads u; its twin learns from f, on u and replayed images."""
        f_logits = self.foundation(u, learn=True)  # (32, C)
        if not self.freeze:
            self.f.descend(entropy_loss(f_logits, self.e0), "the entropy loss of f", "--lr-f", self.pull)
            self.counts["cloud_backwards"] += len(u)
        f_logits, x = f_logits.detach(), u
        # ABLATE: without replayed images (--replay 0) the twin learns from 32 images a step, all of one moment of the stream.
        if twin.replayed >= self.replay_min:
            old = twin.draw(self.replay_draw)
            x, f_logits = torch.cat([u, old]), torch.cat([f_logits, self.foundation(old, learn=False)])  # (128, ...)
        twin.remember(u)
        self.distil(twin, x, f_logits)

    def distil(self, twin: Twin, x: Tensor, f_logits: Tensor) -> None:
        g_logits = twin.forward(x, self.amp, learn=True)
        twin.descend(distillation_loss(g_logits, f_logits, self.e0, *self.loss_weights, self.temperature), "the loss of g", "--lr", self.pull)
        self.counts["cloud_forwards"] += len(x)
        self.counts["cloud_backwards"] += len(x)
        twin.steps += 1
        H = entropy(g_logits.detach()).mean().item()
        twin.h_ema = H if twin.h_ema is None else 0.9 * twin.h_ema + 0.1 * H  # 0.9 is SAR's
        if (self.reset_every and twin.steps % self.reset_every == 0) or twin.h_ema < self.recover_below:
            twin.reset(), self.f.reset()
            twin.h_ema = None
            self.counts["resets"] += 1

    def state_dict(self) -> dict:
        return {"f": self.f.state_dict(), "twins": [t.state_dict() for t in self.twins], "rounds": self.rounds}

    def load_state_dict(self, state: dict) -> None:
        self.f.load_state_dict(state["f"])
        for twin, s in zip(self.twins, state["twins"]):
            twin.load_state_dict(s)
        self.rounds = list(state["rounds"])


class CEMA:
    """Edges, cloud and links, and one `step` of time.

        method = CEMA(edge_model, foundation, image_size=32)    # uint8 images (B, 3, S, S) -> logits (B, C); see FromBytes
        logits = method.step(x)                                 # the edge's answer; learning happens behind it

    Both networks are copied, not touched. Keywords are the flags of build_parser, where each is explained. `links`: one an edge.
    Raises InputError for networks without norm layers or with different classes, for a replay buffer smaller than a draw, and for
    an E_min above E_max.
    """

    def __init__(self, edge_model: nn.Module, foundation: nn.Module, *, image_size: int, links: list[Link] | None = None,
                 counts: Counter | None = None, e0: float = 0.4, lam: float = 1.0, dynamic: bool = True, warmup_batches: int = 10,
                 e_min: float = 0.02, d_margin: float = 0.0, select: str = "entropy", seed_images: int = 64, lr: float = 2.5e-3, lr_f: float = 2.5e-4,
                 momentum: float = 0.9, alpha: float = 3.0, beta: float = 3.0, gamma: float = 1.0, temperature: float = 1.0,
                 cloud_batch: int = 32, replay: int = 10_000, replay_draw: int = 96, replay_min: int = 256, replay_only: bool = True,
                 freeze_foundation: bool = False, download_every: int = 1, bn: str = "ema", bn_momentum: float = 0.1, affine: list[str] = ("bn",),
                 reset_every: int = 0, pull_to_source: float = 0.0, recover_below: float = 0.0, batch_size: int = 64, seed: int = 0,
                 amp: bool = False, device: torch.device | str | None = None):
        device = torch.device(device or next(edge_model.parameters()).device)
        blank = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
        with torch.no_grad():
            classes = [m.to(device).eval()(blank).shape[1] for m in (edge_model, foundation)]
        if classes[0] != classes[1]:
            raise InputError(f"the edge's network knows {classes[0]} classes, the foundation {classes[1]}: one must teach the other the same")
        if 0 < replay < max(replay_min, replay_draw):
            raise InputError(f"--replay {replay}: smaller than --replay-min {replay_min} or --replay-draw {replay_draw}, so it would never be used; "
                             "raise it, or --replay 0 for none")
        if e_min >= e0 * max(1, lam):
            raise InputError(f"--e-min {e_min}: not below E_max, which starts at --e0 {e0}, so nothing would ever be uploaded; lower it")
        e0, e_min = e0 * math.log(classes[0]), e_min * math.log(classes[0])
        self.links, self.counts = links or [Link()], Counter() if counts is None else counts
        self.edges = [Edge(edge_model, self.counts, bn, affine, e0, e_min, lam, dynamic, warmup_batches, d_margin, select, seed_images,
                           bn_momentum, seed + i)
                      for i in range(len(self.links))]
        self.cloud = Cloud(edge_model, foundation, len(self.links), self.counts, bn=bn, bn_momentum=bn_momentum, affine=affine, e0=e0, lr=lr, lr_f=lr_f,
                           momentum=momentum, alpha=alpha, beta=beta, gamma=gamma, temperature=temperature, cloud_batch=cloud_batch,
                           replay=replay, replay_draw=replay_draw, replay_min=replay_min, replay_only=replay_only,
                           freeze_foundation=freeze_foundation, download_every=download_every, reset_every=reset_every,
                           pull_to_source=pull_to_source, recover_below=recover_below, image_size=image_size, seed=seed, amp=amp)
        self.batch_size, self.time, self.since_work = batch_size, 0, [0] * len(self.links)

    def step(self, x: Tensor) -> Tensor:
        """One batch of one edge, which take turns.  uint8 (B, 3, S, S) -> logits (B, C), from before anything was learned of x."""
        i, counts = self.time % len(self.edges), self.counts
        edge, link = self.edges[i], self.links[i]
        t0 = time.perf_counter()
        logits, upload = edge.step(x, link.receive("down"))
        counts["edge_s"] += time.perf_counter() - t0
        if upload is not None:
            counts["uploads"] += HEADER.unpack(upload[:HEADER.size])[1]
            counts["bytes_up"] += len(upload)
            link.send("up", upload)
        t0 = time.perf_counter()
        for message in link.receive("up"):
            self.cloud.receive(message, i)
        self.since_work[i] += len(x)
        if self.since_work[i] >= self.batch_size:
            self.since_work[i] -= self.batch_size
            download = self.cloud.work(i)
            if download is not None:
                counts["bytes_down"] += len(download)
                counts["bytes_down_stats"] += 4 * edge.sizes[1]
                link.send("down", download)
        counts["cloud_s"] += time.perf_counter() - t0
        link.tick()
        self.time += 1
        return logits

    def state_dict(self) -> dict:
        return {"edges": [e.state_dict() for e in self.edges], "links": [link.state_dict() for link in self.links],
                "cloud": self.cloud.state_dict(), "time": self.time, "since_work": self.since_work}

    def load_state_dict(self, state: dict) -> None:
        for objects, states in ((self.edges, state["edges"]), (self.links, state["links"])):
            for o, s in zip(objects, states):
                o.load_state_dict(s)
        self.cloud.load_state_dict(state["cloud"])
        self.time, self.since_work = state["time"], list(state["since_work"])


class Baseline:
    """What needs no cloud. `step` answers a batch as CEMA.step does, and adapts on the spot.

    source  the network as it is
    bn      BN adapt: each batch's own statistics (Nado et al. 2020, Schneider et al. 2020)
    tent    and one entropy step on all images of the batch (Wang et al., ICLR 2021)
    eta     and one weighted entropy step on reliable, not redundant ones (Niu et al., ICML 2022: EATA without its Fisher term)
    """

    def __init__(self, kind: str, model: nn.Module, counts: Counter, num_classes: int, lr: float = 0.0, momentum: float = 0.9,
                 e0: float = 0.4, d_margin: float = 0.0, affine: list[str] = ("bn",), amp: bool = False):
        self.kind, self.counts, self.amp = kind, counts, amp
        self.e0, self.d_margin, self.mean_probs = e0 * math.log(num_classes), d_margin, None
        self.model, self.affine, _ = configure(model, "source" if kind == "source" else "batch", affine)
        self.opt = torch.optim.SGD(self.affine, lr, momentum) if kind in ("tent", "eta") else None

    def step(self, x: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> logits (B, C), from before the update."""
        t0 = time.perf_counter()
        device = self.affine[0].device
        learns = self.opt is not None
        with torch.set_grad_enabled(learns), common.autocast(device, self.amp and learns):
            logits = self.model(x).float()
        if learns:
            self.adapt(logits)
        logits = logits.detach().cpu()
        self.counts["edge_forwards"] += len(x)
        self.counts["edge_s"] += time.perf_counter() - t0
        return logits

    def adapt(self, logits: Tensor) -> None:
        if self.kind == "tent":
            loss, n = entropy(logits).mean(), len(logits)
        else:
            probs = logits.detach().softmax(1)
            kept = (entropy(logits.detach()) < self.e0) & not_redundant(probs, self.mean_probs, self.d_margin)
            self.mean_probs, n = moving_mean(self.mean_probs, probs[kept]), int(kept.sum())
            if not n:
                return
            loss = entropy_loss(logits[kept], self.e0)
        if not math.isfinite(loss.item()):
            raise InputError(f"the loss of {self.kind} is {loss.item()}; lower --{self.kind}-lr")
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        self.opt.step()
        self.counts["edge_backwards"] += n

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "opt": self.opt and self.opt.state_dict(), "mean_probs": self.mean_probs}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.opt:
            self.opt.load_state_dict(state["opt"])
        self.mean_probs = state["mean_probs"] if state["mean_probs"] is None else state["mean_probs"].to(self.affine[0].device)


# ===== Stream ========================================================================================================


class Domain(NamedTuple):
    """A test set under one corruption; `corruption` None: its images are corrupted already."""

    name: str
    split: torch.utils.data.Dataset
    corruption: str | None = None


class Stream(torch.utils.data.Dataset):
    """Images in the order in which the edge sees them. An item is (uint8 image, label, domain, number of the image in its split)."""

    def __init__(self, domains: list[Domain], order: str, images: int, loop: int, seed: int):
        self.domains, self.order = domains, order
        g = torch.Generator().manual_seed(seed)
        parts = []
        for d, domain in enumerate(domains):
            chosen = torch.randperm(len(domain.split), generator=g)[:images]  # files lie sorted by class; the stream must not
            if order == "label-shift":
                chosen = chosen[labels(domain.split)[chosen].argsort(stable=True)]
            parts.append(torch.stack([torch.full_like(chosen, d), chosen], 1))
        if order == "mixed":
            together = torch.cat(parts)
            parts = [together[torch.randperm(len(together), generator=g)]]
        # A new model a domain: then the domain is what repeats. Else: the whole of it.
        parts = [part.repeat(loop, 1) for part in parts] if order in ("reset", "label-shift") else parts * loop
        self.parts, self.where = [len(part) for part in parts], torch.cat(parts)  # (N, 2): domain, image

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, k: int):
        d, i = self.where[k].tolist()
        x, y = self.domains[d].split[i]
        return x, int(y), d, i

    def batches(self, batch_size: int, first: int = 0) -> list[range]:
        """Positions of each batch; none reaches over the end of a part, so that a reset falls between two batches."""
        out, at = [], 0
        for n in self.parts:
            out += [range(k, min(k + batch_size, at + n)) for k in range(at, at + n, batch_size)]
            at += n
        return out[first:]


def labels(split) -> Tensor:
    return split.tensors[1] if hasattr(split, "tensors") else torch.tensor(split.targets)


def as_seen(x: Tensor, d: Tensor, i: Tensor, domains: list[Domain], severity: int, seed: int) -> Tensor:
    """The batch (B, 3, S, S) as the camera delivers it: each image under its own domain's corruption."""
    for k in d.unique().tolist():
        if domains[k].corruption:
            x[d == k] = common.corrupt(x[d == k], domains[k].corruption, severity, i[d == k], seed)
    return x


def corruption_names(words: list[str]) -> list[str]:
    known = common.CORRUPTIONS + common.HELD_OUT
    names = [n for w in words for n in {"all": common.CORRUPTIONS, "held-out": common.HELD_OUT}.get(w, (w,))]
    for name in names:
        if name not in known:
            raise InputError(f"--corruptions {name}: unknown; expected all, held-out, or some of {' '.join(known)}")
    return list(dict.fromkeys(names))


def load_stream(args: argparse.Namespace) -> tuple[common.Data, list[Domain], list[int] | None]:
    """The data (classes, normalisation), the domains, and which classes of the network the stream has (None: all of them)."""
    from torchvision import datasets
    from torchvision.transforms import v2

    root, names = Path(args.data_dir), corruption_names(args.corruptions)
    if args.stream == "generated":
        data = common.load_data(args.dataset, args.data_dir)
        return data, [Domain(f"{n}/{args.severity}", data.test, n) for n in names], None

    if args.stream == "cifar-c":
        if args.dataset not in ("cifar10", "cifar100"):
            raise InputError(f"--stream cifar-c: is made of cifar10 or cifar100; --dataset is {args.dataset}")
        files = [root / f"{n}.npy" for n in (*names, "labels")]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: not there; --stream cifar-c expects the folder of CIFAR-10-C or CIFAR-100-C as --data-dir")
        try:
            *arrays, y = [np.load(file, mmap_mode="r") for file in files]
        except ValueError as e:
            raise InputError(f"{root}: an .npy file cannot be read ({e}); unpack the archive again") from None
        domains, rows = [], slice(10_000 * (args.severity - 1), 10_000 * args.severity)  # 10,000 images a severity, 1 first
        for n, a in zip(names, arrays):
            if a.shape != (50_000, 32, 32, 3) or a.dtype != np.uint8 or len(y) != 50_000:
                raise InputError(f"{root}/{n}.npy: is {a.dtype} {a.shape} with {len(y)} labels; expected uint8 (50000, 32, 32, 3) and 50000")
            x = torch.from_numpy(np.ascontiguousarray(a[rows].transpose(0, 3, 1, 2)))
            domains.append(Domain(f"{n}/{args.severity}", torch.utils.data.TensorDataset(x, torch.from_numpy(y[rows].astype(np.int64)))))
        classes = [str(c) for c in range(10 if args.dataset == "cifar10" else 100)]
        return common.Data(args.dataset, classes, 32, *common.NORMS[args.dataset], None, domains[0].split), domains, None

    crop = [v2.CenterCrop(224), v2.PILToTensor()]  # ImageNet-C lies on disk as 224 px crops
    def folder(path: Path, steps: list) -> datasets.ImageFolder:
        try:
            return datasets.ImageFolder(path, v2.Compose(steps))
        except (FileNotFoundError, NotADirectoryError) as e:
            raise InputError(f"{path}: {str(e).splitlines()[0]}; expected class folders with images in it") from None

    if args.stream == "imagenet-c":
        missing = [n for n in names if not (root / n / str(args.severity)).is_dir()]
        if missing:
            raise InputError(f"{root}: no {missing[0]}/{args.severity} in it; --stream imagenet-c expects corruption/severity/wnid/*.JPEG. "
                             f"Leave it out with --corruptions, or unpack its archive")
        domains = [Domain(f"{n}/{args.severity}", folder(root / n / str(args.severity), crop)) for n in names]
        if len({tuple(d.split.classes) for d in domains}) > 1:
            raise InputError(f"{root}: the corruptions do not have the same class folders; unpack their archives again")
    else:
        domains = [Domain(args.stream, folder(root, [v2.Resize(256), *crop]))]
    classes, keep = domains[0].split.classes, None
    if args.stream == "imagenet-r":
        keep, classes = kept_classes(classes, args.wnids)
    return common.Data("imagenet" if len(classes) == 1000 else root.name, classes, 224, *common.IMAGENET_NORM, None, None), domains, keep


def kept_classes(present: list[str], wnids: str | None) -> tuple[list[int], list[str]]:
    """Which of the network's classes a stream's folders are: (numbers, all wnids). The network's order is that of the sorted wnids."""
    if wnids is None or not Path(wnids).exists():
        raise InputError(f"--stream imagenet-r: --wnids {wnids}: must be a folder with the 1000 class folders of ImageNet (val/ will do), or a "
                         "text file with one wnid a line")
    path = Path(wnids)
    known = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else sorted(path.read_text().split())
    if unknown := [w for w in present if w not in known]:
        raise InputError(f"--wnids {wnids}: does not know {unknown[0]}, a class folder of the stream")
    return [known.index(w) for w in present], known


# ===== Evaluation and figures ========================================================================================


def print_table(rows: dict[str, dict], names: list[str], counts: dict[str, Counter], images: int) -> None:
    """Rows: methods. Columns: accuracy per corruption and their mean, and what it cost. k: a thousand images."""
    short = [n.split("_")[0].split("/")[0][:9] for n in names]
    print("\n" + f"{'top-1 %':<20}" + "".join(f"{s:>10}" for s in short) + f"{'mean':>8}{'learned %':>11}{'MB up':>8}{'kB down':>9}"
          f"{'edge fwd':>10}{'bwd k':>7}{'cloud fwd':>11}{'bwd k':>7}{'edge img/s':>12}")
    for method, accs in rows.items():
        c, line = counts.get(method, Counter()), f"{LABELS[method]:<20}" + "".join(f"{a:>10.2f}" for a in accs.values())
        line += f"{sum(accs.values()) / len(accs):>8.2f}"
        if method in counts:
            learned = c["uploads"] if method == "cema" else c["edge_backwards"]
            line += (f"{100 * learned / images:>11.1f}{c['bytes_up'] / 1e6:>8.1f}{c['bytes_down'] / 1e3:>9.0f}{c['edge_forwards'] / 1e3:>10.1f}"
                     f"{c['edge_backwards'] / 1e3:>7.1f}{c['cloud_forwards'] / 1e3:>11.1f}{c['cloud_backwards'] / 1e3:>7.1f}"
                     f"{c['edge_forwards'] / c['edge_s']:>12.0f}")
        print(line)


LABELS = {"source": "source", "bn": "BN adapt", "tent": "Tent", "eta": "ETA", "cema": "CEMA",
          "foundation_source": "f, source", "foundation": "f, adapted by CEMA"}


def plot(folders: list[str], out: str | None) -> None:
    """One folder: accuracy of each method in each pass over the stream. Several: accuracy against uploads, a line for each --select."""
    runs = [common.finished_logs(folder, "per_domain", "cema.py") for folder in folders]
    plt = common.pyplot()
    fig, ax = plt.subplots(figsize=(8, 4))
    if len(folders) == 1:
        for method in [m for m in LABELS if f"acc_{m}_pct" in runs[0][0][-1]]:
            evals = [[r for r in log if r["event"] == "eval"] for log in runs[0]]
            if not evals[0]:
                raise InputError(f"--plot {folders[0]}: its --order was mixed, which has no passes over single corruptions")
            n = len({r["domain"] for r in evals[0]})  # a pass visits each domain once
            acc = np.array([[r[f"acc_{method}_pct"] for r in e] for e in evals]).reshape(len(evals), -1, n).mean(2)  # (seeds, passes)
            ax.errorbar(range(1, acc.shape[1] + 1), acc.mean(0), acc.std(0, ddof=1) if len(acc) > 1 else None, marker="o", capsize=3,
                        label=LABELS[method])
        ax.set_xlabel("pass over the stream")
    else:
        points = {}
        for logs in runs:
            args = logs[0][0]["args"]
            ends = [log[-1] for log in logs]
            points.setdefault(args["select"], []).append([[e[k] for e in ends] for k in ("uploads_pct", "acc_cema_pct")])
        for select, p in points.items():
            p = np.array(sorted(p, key=lambda q: np.mean(q[0])))  # (runs, 2, seeds)
            ax.errorbar(p[:, 0].mean(1), p[:, 1].mean(1), p[:, 1].std(1, ddof=1) if p.shape[2] > 1 else None, marker="o", capsize=3,
                        label=f"--select {select}")
        ax.set_xlabel("uploads, % of the stream")
    ax.set_ylabel("top-1 %")
    ax.grid(alpha=0.3)
    ax.legend()
    file = Path(out or f"{folders[0].rstrip('/')}.png")
    fig.savefig(file, dpi=110, bbox_inches="tight")
    print(file)


# ===== Run ===========================================================================================================


def main(args: argparse.Namespace) -> None:
    if args.plot:
        return plot(args.plot, args.out)
    device = common.pick_device(args.device)
    amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data, domains, keep = load_stream(args)
    kind = "" if args.recipe == "paper" else f"_{args.recipe}"
    out = common.check_out(Path(args.out or f"runs/cema/{data.name}_{args.arch}_{args.order}{kind}_s{args.seed}"))
    for arch in (args.arch, args.foundation):  # its checks come before minutes go into its weights
        configure(common.build_model(arch, len(data.classes)), args.bn, args.affine)
    nets = []
    for arch, weights in ((args.arch, args.weights), (args.foundation, args.foundation_weights)):
        dataset = "imagenet" if len(data.classes) == 1000 else args.dataset if args.stream in ("generated", "cifar-c") else data.name
        net, d, source = common.find_weights(arch, dataset, data, weights, device)
        nets.append(FromBytes(net.to(device, memory_format=torch.channels_last), d.mean, d.std, keep))
        print(f"{'edge' if len(nets) == 1 else 'cloud'}: {source}")
    C = len(keep or data.classes)
    if args.batch_size == 1 and (args.bn == "batch" or {"bn", "tent", "eta"} & set(args.methods)):
        print("note: with --batch-size 1 a batch's BN statistics are those of one image; BN adapt, Tent and ETA, and CEMA with --bn batch, will "
              "do worse than source")
    print(f"device: {common.device_name(device)}, {torch.get_num_threads()} threads, {'bf16 autocast' if amp else 'fp32'} in training; "
          f"recipe: {args.recipe}")
    if args.recipe != "paper":
        print(f"recipe {args.recipe}: " + ", ".join(f"{k}={getattr(args, k)}" for k in RECIPES[args.recipe]))

    # One set of methods an edge; counts outlive the resets between corruptions.
    counts = {m: Counter() for m in args.methods}
    lrs = {"tent": args.tent_lr, "eta": args.eta_lr}

    def fresh(part: int) -> dict[str, list]:
        made = {m: [Baseline(m, nets[0], counts[m], C, lrs.get(m, 0.0), args.momentum, args.e0, args.eta_d_margin, args.affine, amp)
                    for _ in range(args.edges)] for m in args.methods if m != "cema"}
        if "cema" in args.methods:
            links = [Link(args.link_delay, args.link_drop, args.link_corrupt, args.seed + 1000 * part + i) for i in range(args.edges)]
            made["cema"] = [CEMA(*nets, image_size=data.size, links=links, counts=counts["cema"], batch_size=args.batch_size, amp=amp,
                                 seed=args.seed, device=device, **{k: getattr(args, k) for k in method_defaults()})]
        return made

    stream = Stream(domains, args.order, args.images, args.loop, args.seed)
    plan = stream.batches(args.batch_size)
    scored = [*args.methods] + (["foundation_source", "foundation"] if args.score_foundation and "cema" in args.methods else [])
    hits = {m: [0] * len(domains) for m in scored}
    seen, window, visit, begun, first, wall_s, part = [0] * len(domains), Counter(), Counter(), None, 0, 0.0, 0
    methods = fresh(part)
    checkpoint = out / "checkpoint.pt"
    made_with = {k: v for k, v in common.flat(args).items() if k not in ("out", "resume", "device", "checkpoint_every", "log_every", "plot")}
    if args.resume and checkpoint.exists():
        state = common.load_file(checkpoint, ("methods", "hits", "seen", "first", "begun", "part", "window", "visit", "counts", "made_with"),
                                 "a cema.py checkpoint")
        if changed := [k for k in made_with if state["made_with"].get(k) != made_with[k]]:
            raise InputError(f"--resume: {checkpoint} was made with another --{changed[0].replace('_', '-')} "
                             f"({state['made_with'].get(changed[0])}, now {made_with[changed[0]]}); repeat its flags, or start anew")
        hits, seen, first, begun, part, wall_s = (state[k] for k in ("hits", "seen", "first", "begun", "part", "wall_s"))
        window, visit = Counter(state["window"]), Counter(state["visit"])
        methods = fresh(part)
        for m, states in state["methods"].items():
            counts[m].update(state["counts"][m])
            for method, s in zip(methods[m], states):
                method.load_state_dict(s)
        print(f"resuming at batch {first}")
        lines = (out / "log.jsonl").read_text().splitlines(keepends=True)  # what came after the checkpoint will come again
        (out / "log.jsonl").write_text("".join(line for line in lines if json.loads(line).get("iteration", 0) <= first))
    else:
        checkpoint.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    log = common.RunLog(out, append=first > 0)
    log.start(args, device)

    def score(name: str, logits: Tensor, y: Tensor, d: Tensor) -> None:
        right = logits.argmax(1).cpu() == y
        window[name] += int(right.sum())
        visit[name] += int(right.sum())
        for k in d.unique().tolist():
            hits[name][k] += int(right[d == k].sum())

    in_memory = hasattr(domains[0].split, "tensors")
    loader = torch.utils.data.DataLoader(stream, batch_sampler=plan[first:], num_workers=0 if in_memory else min(8, os.cpu_count() or 1))
    bar = common.Progress(first, len(plan))
    for t, (x, y, d, i) in zip(bar, loader):
        domain = int(d[0])
        if args.order in ("reset", "label-shift") and begun not in (None, domain):
            part += 1
            methods = fresh(part)
        begun = domain
        x = as_seen(x, d, i, domains, args.severity, args.seed).to(device)
        if "foundation" in scored:  # for the table only, see the protocol block
            f, t0 = methods["cema"][0].cloud.f, time.perf_counter()
            with torch.no_grad(), common.autocast(device, amp):
                score("foundation_source", nets[1](x), y, d)
                score("foundation", f.forward(x, amp, learn=False), y, d)
        for m in args.methods:
            score(m, methods[m][t % len(methods[m])].step(x), y, d)
        for k in d.tolist():
            seen[k] += 1
        window["images"] += len(x)
        visit["images"] += len(x)

        c, n = counts.get("cema", Counter()), sum(seen)
        name = "mixed" if args.order == "mixed" else domains[domain].name
        if "cema" in counts:
            edge = methods["cema"][0].edges[0]
            figures = (f"acc {100 * hits['cema'][domain] / seen[domain]:.2f} | H {edge.h_sum / max(1, edge.h_n):.2f} | up {100 * c['uploads'] / n:.1f}% | "
                       f"E_max {edge.e_max:.2f} | {n / (c['edge_s'] + c['cloud_s']):.0f} img/s")
        else:
            figures = " | ".join(f"{m} {100 * hits[m][domain] / seen[domain]:.2f}" for m in args.methods)
        bar.show(f"{name} | {figures}")
        if (t + 1) % args.log_every == 0 or t + 1 == len(plan):
            more = dict(entropy=edge.h_sum / edge.h_n, e_max=edge.e_max, uploads_pct=100 * c["uploads"] / n) if "cema" in counts else {}
            log.write("step", iteration=t + 1, domain=name, window={m: 100 * window[m] / window["images"] for m in scored}, **more)
            window.clear()
        if t + 1 == len(plan) or (args.order != "mixed" and stream.where[plan[t + 1][0], 0] != domain):
            log.write("eval", iteration=t + 1, domain=name, **{f"acc_{m}_pct": 100 * visit[m] / visit["images"] for m in scored})
            visit.clear()
        if (t + 1) % args.checkpoint_every == 0 and t + 1 < len(plan):
            common.save_atomic({"methods": {m: [o.state_dict() for o in objects] for m, objects in methods.items()}, "hits": hits, "seen": seen,
                                "first": t + 1, "begun": begun, "part": part, "window": dict(window), "visit": dict(visit), "counts": {m: dict(c) for m, c in counts.items()},
                                "made_with": made_with, "wall_s": wall_s + time.time() - log.t0}, checkpoint)

    rows = {m: {dom.name: 100 * h / s for dom, h, s in zip(domains, hits[m], seen)} for m in scored}
    end = {f"acc_{m}_pct": sum(accs.values()) / len(accs) for m, accs in rows.items()}
    end["per_domain"] = rows
    if "eta" in counts:
        end["eta_backwards_pct"] = 100 * counts["eta"]["edge_backwards"] / sum(seen)
    if "cema" in counts:
        end |= {"uploads_pct": 100 * c["uploads"] / sum(seen), "edge_overhead_pct": 100 * (c["edge_s"] / c["edge_inference_s"] - 1),
                "cloud_ms_per_image": 1000 * c["cloud_s"] / sum(seen)}
        end |= {k: c[k] for k in ("bytes_up", "bytes_down", "bytes_down_stats", "refused_messages", "cloud_forwards", "cloud_backwards",
                                  "replay_only_steps", "resets")}
    log.write("end", **end, wall_s=wall_s + time.time() - log.t0, peak_mib=common.peak_mib())
    checkpoint.unlink(missing_ok=True)
    print_table(rows, [dom.name for dom in domains], counts, sum(seen))
    if "cema" in counts:
        print(f"the edge's loop costs {end['edge_overhead_pct']:.1f} % more than its inference; the cloud {end['cloud_ms_per_image']:.1f} ms an image; "
              f"{c['refused_messages']} messages refused; {c['bytes_down_stats'] / max(1, c['bytes_down']):.0%} of the bytes down are BN statistics")
    if args.stream == "generated":
        print("corruptions are generated (see common.py): not comparable with numbers on the files of ImageNet-C or CIFAR-10-C")
    print(f"{out}/log.jsonl; {wall_s + time.time() - log.t0:.0f} s, {common.peak_mib():.0f} MiB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """A recipe changes the defaults, so that an explicit flag wins wherever it stands."""
    p = build_parser()
    p.set_defaults(**RECIPES[p.parse_args(argv).recipe])
    return p.parse_args(argv)


if __name__ == "__main__":
    common.run(main, parse)
