"""What the three scripts share. Copy this file along with any of them. It has four storeys:

    1  the methods' own   entropy, norm layers that follow a test stream, fake quantization, data sets
    2  networks           CIFAR ResNets, every torchvision classifier, yours from a file; their weights
    3  a run              flags, one optimizer step, a new folder for each run, its log, checkpoints
    4  the machine        device, mixed precision, memory, the processes that torchrun starts
"""

import argparse
import copy
import datetime
import difflib
import importlib
import inspect
import json
import math
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import time
import warnings
import zlib
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
YES_NO = argparse.BooleanOptionalAction  # --amp and --no-amp
# On Linux torch then keeps large tensors in large pages: 1.8 times as fast at 224 px on a CPU core.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class InputError(ValueError):
    """A user's mistake: what is wrong, what was expected, what to do. `run` prints it as one line."""


def need(condition, message: str) -> None:
    """Raises InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def reason(e: Exception) -> str:
    """What an exception says, in one line."""
    line = " ".join(str(e).split())[:400]
    return line if isinstance(e, InputError) else f"{type(e).__name__}: {line}"


@contextmanager
def door(what: str):
    """Whatever goes wrong within it comes from outside, and ends in one line that begins with `what`."""
    try:
        yield
    except Exception as e:  # which one, depends on the byte where a file ends, or on a stranger's code
        raise InputError(f"{what}: {reason(e)}") from None


# ===== 1. Entropy and BatchNorm =======================================================================

def entropy(logits: Tensor) -> Tensor:
    """H(x) = -sum_c p_c ln p_c, p = softmax(logits).  (B, C) -> (B,), nats, in [0, ln C]."""
    log_p = log_softmax(logits)
    return -(log_p.exp() * log_p).sum(1)


def log_softmax(logits: Tensor) -> Tensor:
    """ln softmax, with the least finite number in place of -inf: a masked class counts 0 ln 0 = 0."""
    return F.log_softmax(logits, 1).clamp_min(torch.finfo(logits.dtype).min)


class BatchMoments(torch.autograd.Function):
    """Mean and biased variance of x over all but the channel axis.  (B, C, ...) -> (C,), (C,), fp32."""
    # d mu/dx = 1/n and d var/dx = 2 (x - mu) / n: backward is one multiply-add. Forward is F.batch_norm,
    # whose momentum of 1 leaves this batch's statistics; in bf16 an eighth of torch.var_mean's CPU time.
    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, var = x.new_zeros(2, x.shape[1], dtype=torch.float32)
        F.batch_norm(x, mu, var, training=True, momentum=1.0)
        n = x.numel() // x.shape[1]
        var = var * ((n - 1) / n)  # F.batch_norm leaves the unbiased one
        ctx.save_for_backward(x, mu)
        return mu, var

    @staticmethod
    def backward(ctx, grad_mu: Tensor, grad_var: Tensor) -> Tensor:
        x, mu = ctx.saved_tensors
        n, shape = x.numel() // x.shape[1], (1, -1) + (1,) * (x.ndim - 2)
        a = 2 * grad_var / n
        b = grad_mu / n - a * mu
        return torch.addcmul(b.to(x.dtype).view(shape), a.to(x.dtype).view(shape), x)


class AdaptiveBN(nn.Module):
    """A BatchNorm that can follow a test stream. Weight and bias are the original layer's.

    mode "source"   normalises with the statistics of training
         "batch"    with those of the batch at hand
         "ema"      with a running mean over the stream, which moves while `training` is set
    """
    PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

    def __init__(self, bn: _BatchNorm, mode: str, momentum: float):
        super().__init__()
        self.weight, self.bias, self.eps = bn.weight, bn.bias, bn.eps
        self.mode, self.momentum = mode, momentum
        self.share = 0.0  # see `average_in`
        self.register_buffer("running_mean", bn.running_mean.clone())
        self.register_buffer("running_var", bn.running_var.clone())
        self.rest = None if type(bn) in self.PLAIN else neutral(bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x) if self.rest is None else self.rest(self.normalise(x))

    def normalise(self, x: Tensor) -> Tensor:
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        one_value = x.numel() == x.shape[1]  # a channel with a single value has no variance
        if self.mode == "batch" and not one_value:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        moves = self.training or self.share
        if self.mode != "ema" or one_value or not moves:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

        # Batch renormalisation (Ioffe 2017): x_hat = (x - mu_B) / sd_B * r + d, with r and d constant.
        # The value is that of eval mode. The gradient knows that earlier weights change mu and sd.
        with torch.no_grad():
            mu_b, var_b = BatchMoments.apply(x)
            if self.share:  # the batch counts before it is normalised
                square = (var + mean**2).lerp_(var_b + mu_b**2, self.share)  # E[x^2] can be averaged
                mean.lerp_(mu_b, self.share)
                var.copy_((square - mean**2).clamp_min_(0))  # rounding may leave it below 0
            sd = (var + self.eps).sqrt()
            r = (var_b + self.eps).sqrt() / sd
            d = (mu_b - mean) / sd
            if not self.share:  # the batch counts after it was normalised
                mean.lerp_(mu_b, self.momentum)
                var.lerp_(var_b, self.momentum)
        # r and d go into weight and bias: one fused batch_norm, as fast as a plain one.
        return F.batch_norm(x, None, None, weight * r, bias + weight * d, True, 0.0, self.eps)


def neutral(bn: _BatchNorm) -> nn.Module:
    """A copy that leaves x as it is, but still does what else a subclass does, as timm's activations."""
    bn = copy.deepcopy(bn).eval().requires_grad_(False)
    values = {"running_mean": 0.0, "running_var": 1 - bn.eps, "weight": 1.0, "bias": 0.0}
    for name, value in values.items():
        getattr(bn, name).data.fill_(value)
    return bn


def average_in(model: nn.Module, share: float) -> None:
    """From now on a forward first averages its batch into the statistics, at this weight; 0 ends it."""
    for m in model.modules():
        if isinstance(m, AdaptiveBN):
            m.share = share


@torch.no_grad()
def fill(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Each tensor takes the value that stands in its place. One call is faster than a hundred."""
    if tensors:
        torch._foreach_copy_(tensors, values)


def configure(model: nn.Module, bn: str, kinds: list[str] = ("bn",), momentum: float = 0.1):
    """(a copy of `model` in which only norm layers can learn, their weights and biases, BN statistics).

    bn: the mode of AdaptiveBN. kinds: which of bn, ln, gn learn. The statistics are all running means,
    then all running variances. Raises InputError if there is no such layer.
    """
    model = copy_of(model).requires_grad_(False)
    made = {}  # a layer that has two names becomes one AdaptiveBN
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and child.affine and child.running_mean is not None:
                made[child] = made.get(child) or AdaptiveBN(child, bn, momentum)
                parent._modules[name] = made[child]
    types = {"bn": AdaptiveBN, "ln": nn.LayerNorm, "gn": nn.GroupNorm}
    learn = tuple(types[kind] for kind in kinds)
    affine = [p for m in model.modules() if isinstance(m, learn) for p in (m.weight, m.bias)]
    affine = [p.requires_grad_(True) for p in affine if p is not None]
    has = [kind for kind, t in types.items() if any(isinstance(m, t) for m in model.modules())]
    need(affine, f"nothing can adapt by --affine {' '.join(kinds)}; it has: {' '.join(has) or 'none'}")
    layers = [m for m in model.modules() if isinstance(m, AdaptiveBN) and m.mode == "ema"]
    return model.eval(), affine, [m.running_mean for m in layers] + [m.running_var for m in layers]


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy. Raises InputError for what cannot be copied, as a network under weight_norm."""
    with door(f"{type(model).__name__} cannot be copied"):
        return copy.deepcopy(model)


# ===== 1. Fake quantization ===========================================================================
# Uniform affine quantization in which zero is exact. With k bits and a range [a, b] that holds 0:
#
#     s = (b - a) / (2^k - 1)        step, per tensor or per output channel
#     z = round(a / s)               the code of `a`, counted from zero: an integer in [-(2^k - 1), 0]
#     q = clamp(round(x / s) - z, 0, 2^k - 1)            what an integer machine stores
#     x_hat = s * (q + z)                                what a float machine computes with


def step_and_zero(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(s, z) of the range [lo, hi], of any shape, widened to hold 0, so that padding stays 0."""
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    least = torch.finfo(lo.dtype).tiny * 2**20  # an all-zero channel has s > 0, too
    s = ((hi - lo) / (2**bits - 1)).clamp_min(least)
    return s, torch.round(lo / s)


class FakeQuant(torch.autograd.Function):
    """x -> x_hat with the straight-through gradient: 1 where x is inside the range, 0 where clamped."""
    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
        code = torch.round(x / s) - z
        ctx.save_for_backward(code)
        ctx.max = 2**bits - 1
        return (code.clamp(0, ctx.max) + z) * s

    @staticmethod
    def backward(ctx, grad: Tensor):
        code, = ctx.saved_tensors
        # grad * (0 <= code <= max) in one pass; hardtanh's bounds are strict, and codes are integers
        return torch.ops.aten.hardtanh_backward(grad, code, -0.5, ctx.max + 0.5), None, None, None


def fake_quant(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize x with the range [lo, hi], which broadcasts against x."""
    s, z = step_and_zero(lo, hi, bits)
    return FakeQuant.apply(x, s, z, bits)


class EMA:
    """Debiased moving average:  m_t = rho m_{t-1} + (1 - rho) x_t,   value = m_t / (1 - rho^t)."""
    # Published GDFQ code feeds the value back into m: up to 3,900 times too wide a range near step 20.
    def __init__(self, momentum: float):
        self.momentum, self.m, self.weight = momentum, 0.0, 0.0

    def update(self, x: Tensor) -> Tensor:
        self.m = self.momentum * self.m + (1 - self.momentum) * x
        self.weight = self.momentum * self.weight + (1 - self.momentum)
        return self.m / self.weight


class WeightQuantizer(nn.Module):
    """Weight (C_out, ...) -> fake-quantized weight; min and max per output channel, in every forward."""
    def __init__(self, bits: int, rounding: str):
        super().__init__()
        self.bits, self.rounding = bits, rounding

    @torch.no_grad()
    def codes(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The integers in [0, 2^bits - 1], shape of w; step and zero per channel (C_out, 1, ...)."""
        dims, last = tuple(range(1, w.ndim)), 2**self.bits - 1
        s, z = step_and_zero(w.amin(dims, keepdim=True), w.amax(dims, keepdim=True), self.bits)
        code = (torch.round(w / s) - z).clamp_(0, last)
        if self.rounding == "squant":
            kernels = w[0, 0].numel() > 1
            for axis in (2, 1) if kernels else (1,):  # each kernel, then each output channel
                error = w / s - z - code
                code += flips(error.flatten(axis), code.flatten(axis), last).view_as(code)
        return code, s, z

    def forward(self, w: Tensor) -> Tensor:
        code, s, z = self.codes(w)
        return (code + z) * s + (w - w.detach())  # straight through: the first term, with gradient 1


def flips(error: Tensor, code: Tensor, last: int) -> Tensor:
    """-1, 0 or 1 for each code in 0..last, whose rounding errors are given (..., n), in steps."""
    # Added to the codes they bring the sum of a row's errors to within half a step of 0. The codes move
    # that are nearest to their other neighbour. After SQuant (Guo et al. 2022), simplified.
    # What a layer reads has a mean other than 0: errors that add up shift its output, in each image by
    # another value, which no bias mends.
    # ABLATE: with it 58.05 at W3A3 on CIFAR-100, 66.24 at W4A4; without (--rounding nearest) 56.79 and
    # 65.65. Before any training: 50.81 and 63.88; without 32.88 and 60.31 (results/gdfq.md).
    k = error.sum(-1, keepdim=True).round()  # how many codes of the row have to move, and which way
    gain = error * k.sign()
    gain = gain.masked_fill(code == torch.where(k > 0, float(last), 0.0), 0)  # no room at that end
    most = min(error.shape[-1], int(k.abs().max().nan_to_num(0)))
    gain, at = gain.topk(most, -1)
    moves = (torch.arange(most, device=error.device) < k.abs()) & (gain > 0)
    return torch.zeros_like(error).scatter_(-1, at, k.sign() * moves)


def usual_percentile(abits: int) -> float:
    """99.98 up to 5 bits; all values above: a fine step costs less than what clipping cuts off."""
    # Error of the logits on Fashion-MNIST's train images, with ranges from noise. 4 bits: with clipping
    # 20.9 %, without 26.5 %. 6 bits: 18.4 %, without 4.7 %. 8 bits: 18.1 %, without 3.6 %.
    return 99.98 if abits <= 5 else 100.0


def clipped_range(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """(lo, hi), fp32 scalars: `percentile` % of x lie below hi, as many above lo. 100: min and max."""
    # One outlier sets the step of all. At 4 bits clipping is worth more than all the training.
    # ABLATE: with it 66.19; without (--percentile 100, the paper's) 63.37 (results/gdfq/ablation).
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
    """Fake-quantizes with one range per tensor, which follows the values while `observing`."""
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
    """Within it every forward of q moves its activation ranges, which start afresh."""
    quantizers = [m for m in q.modules() if isinstance(m, ActivationQuantizer)]
    for m in quantizers:
        m.emas = EMA(m.momentum), EMA(m.momentum)
    try:
        yield
    finally:
        for m in quantizers:
            m.emas = None


# ===== 1. Data ========================================================================================

class Data(NamedTuple):
    """A classification set. A split: a TensorDataset of uint8 (N, 3, S, S), an ImageFolder, or None."""
    name: str
    classes: list[str]
    size: int  # image side in pixels
    mean: list[float]  # per channel, of images in [0, 1]
    std: list[float]
    train: object
    test: object


NORMS = {
    "fashion": ([0.2190] * 3, [0.3318] * 3),  # of the 60,000 train images, padded to 32 px
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
IMAGE_FILES = torchvision.datasets.folder.IMG_EXTENSIONS
IN_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}


def load_data(dataset: str, data_dir: str = "data", size: int | None = None) -> Data:
    """A data set by name or path. Raises InputError for anything that cannot be read.

    fashion        5,000 train and 10,000 test images of Fashion-MNIST, which lie in data/
    fashion-mnist  all 70,000, through torchvision (downloaded into data_dir when absent)
    cifar10/100    data_dir/cifar10.npz if it is there (MedMNIST keys), else through torchvision
    imagenet       data_dir/val/<wnid>/*.JPEG, and data_dir/train if it is there, at 224 px
    a folder       the same tree, at `size` px; None: 32, 64 or 224 px, by the median side of its images
    a .npz file    MedMNIST keys: train_images, train_labels, test_images, test_labels
    """
    path, npz = Path(dataset), Path(data_dir, f"{dataset}.npz")
    embedded = ROOT / "data" / "fashion_mnist.npz"
    near = difflib.get_close_matches(dataset, ["fashion", "imagenet", *IN_TORCHVISION], 2, 0)
    if dataset == "fashion":
        need(embedded.exists(), f"no {embedded}: copy data/ along")
        data = from_npz(embedded, dataset)
    elif dataset in ("cifar10", "cifar100") and npz.is_file():
        data = from_npz(npz, dataset)
    elif dataset in IN_TORCHVISION:
        with door(f"--dataset {dataset}: not in {data_dir}, and the download failed; put it there, or "
                  f"{npz} with MedMNIST keys"):
            make = getattr(torchvision.datasets, IN_TORCHVISION[dataset])
            sets = [make(data_dir, train=train, download=True) for train in (True, False)]
        splits = [(np.asarray(s.data), np.asarray(s.targets)) for s in sets]
        data = in_memory(dataset.removesuffix("-mnist"), list(sets[0].classes), *splits)
    elif dataset == "imagenet":
        data = from_folder(Path(data_dir), dataset, size or 224)
    elif path.is_dir():
        data = from_folder(path, path.name, size)
    else:
        known = f"no known name (nearest: {', '.join(near)}), no folder, no .npz file"
        need(path.suffix == ".npz", f"--dataset {dataset}: {known}")
        data = from_npz(path, path.stem)
    need(size in (None, data.size), f"{dataset}: has {data.size} px, not {size}; --size is for folders")
    return check_labels(data)


def check_labels(data: Data) -> Data:
    """InputError for a label that is no class; a note for a class without images."""
    labels = torch.cat([labels_of(split) for split in (data.train, data.test) if split is not None])
    C, seen = len(data.classes), labels.unique().tolist()
    need(seen[-1] < C, f"{data.name}: label {seen[-1]} of {C} classes; expected 0 to {C - 1}")
    empty = [data.classes[c] for c in sorted({*range(C)} - {*seen})]
    if empty:
        warnings.warn(f"{data.name}: no image of {len(empty)} of its {C} classes, as {empty[0]}; labels "
                      "count from 0")
    return data


def from_npz(path: Path, name: str) -> Data:
    with door(f"{path}: not a readable .npz file with the MedMNIST keys"), np.load(path) as npz:
        splits = [(npz[f"{s}_images"], npz[f"{s}_labels"]) for s in ("train", "test")]
        classes = [str(c) for c in npz["classes"]] if "classes" in npz else None
    return in_memory(name, classes, *splits)


def in_memory(name: str, classes: list[str] | None, *splits: tuple[np.ndarray, np.ndarray]) -> Data:
    """Images uint8 (N, S, S[, 3]) and labels (N[, 1]) of train and of test. 28 px are padded to 32."""
    made = []
    for a, y in splits:
        square = a.ndim in (3, 4) and a.shape[1] == a.shape[2] and a.shape[3:] in ((), (1,), (3,))
        good = a.dtype == np.uint8 and square
        need(good, f"{name}: images are {a.dtype} {a.shape}; expected uint8 (N, S, S[, 3])")
        good = y.dtype.kind in "iu" and y.size == len(y) == len(a) > 0 and y.astype(np.int64).min() >= 0
        need(good, f"{name}: labels are {y.dtype} {y.shape}; expected 0, 1, 2, ..., one per image")
        x = torch.from_numpy(a.reshape(*a.shape[:3], -1)).permute(0, 3, 1, 2)
        side = max(32, math.ceil(x.shape[-1] / 4) * 4)
        lo = (side - x.shape[-1]) // 2
        x = F.pad(x, (lo, side - x.shape[-1] - lo) * 2).expand(-1, 3, -1, -1).contiguous()
        made.append(TensorDataset(x, torch.from_numpy(y.reshape(-1).astype(np.int64))))
    images, side = made[0].tensors[0], made[0].tensors[0].shape[-1]
    side_test, last = made[1].tensors[0].shape[-1], max(int(labels_of(split).max()) for split in made)
    need(side == side_test, f"{name}: train images have {side} px, test images {side_test}")
    # A class name for each number up to a wild label would take all memory.
    need(classes or last <= len(images), f"{name}: label {last}; labels count from 0")
    std, mean = torch.std_mean(images[:5000].double() / 255, (0, 2, 3))  # of an unknown set
    own = mean.tolist(), std.clamp_min(1e-3).tolist()
    names = classes or [str(c) for c in range(last + 1)]
    return Data(name, names, side, *NORMS.get(name, own), *made)


class ImageFolder(torchvision.datasets.ImageFolder):
    """root/<class>/**/<image> -> (uint8 (3, size, size), the class's number), classes sorted by name."""
    # What a Mac or a notebook leaves is passed over, and so are links that lead back.
    HIDDEN = (".", "__MACOSX", "@eaDir")  # beginnings: .cache, .ipynb_checkpoints

    def __init__(self, root: Path, size: int | None = None, resize: bool = True):
        self.folders = {}  # (class, where a folder really lies) -> the first name it was found by
        with door(f"{root}: expected class folders, <class>/*.jpg or .png"):
            super().__init__(root, loader=read_image, is_valid_file=self.is_image, allow_empty=True)
            need(self.imgs, "no images in it")
        self.size = size or self.usual_size()
        self.transform = usual_transform(self.size, resize)

    def find_classes(self, directory) -> tuple[list[str], dict[str, int]]:
        folders = [p.name for p in Path(directory).iterdir() if p.is_dir()]
        names = sorted(name for name in folders if not name.startswith(self.HIDDEN))
        return names, {name: c for c, name in enumerate(names)}

    def is_image(self, file: str) -> bool:
        folder, name = os.path.split(file)
        parts = Path(folder).relative_to(self.root).parts
        first = self.folders.setdefault((parts[0], os.path.realpath(folder)), folder)
        hidden = name.startswith(".") or any(part.startswith(self.HIDDEN) for part in parts)
        return first == folder and not hidden and name.lower().endswith(IMAGE_FILES)

    def usual_size(self) -> int:
        """32 px for a median side up to 48, 64 px up to 96, else 224, by some 200 images; printed."""
        from PIL import Image

        sides = []
        for file, _ in self.imgs[::len(self.imgs) // 200 + 1]:
            with suppress(Exception), Image.open(file) as image:  # who reads it will say what is wrong
                sides.append(min(image.size))
        median = int(np.median(sides or [224]))
        size = 32 if median <= 48 else 64 if median <= 96 else 224
        print(f"{self.root}: sides of {median} px in the median; read at {size} px (--size)", flush=True)
        return size


def read_image(file: str | Path):
    """A PIL image in RGB, upright. Raises InputError, with the file's name, for what no image is."""
    from PIL import Image, ImageOps

    with door(f"{file}: not an image that can be read"):
        image = Image.open(file)
        need(image.mode != "F", "its pixels are floats")
        if image.mode.startswith("I"):  # 16 bits, which convert would clip at 255
            deep, fits = np.asarray(image), image.format in ("PNG", "PPM") or image.mode != "I"
            need(fits and deep.max() <= 65535, "32 bits a pixel")
            image = Image.fromarray((deep / 257).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert("RGB")


def usual_transform(size: int, resize: bool = True):
    """PIL image -> uint8 (3, size, size), its middle; above 64 px of an image 8/7 as large."""
    from torchvision.transforms import v2

    steps = [v2.Resize(size if size <= 64 else size * 8 // 7)] if resize else []
    return v2.Compose([*steps, v2.CenterCrop(size), v2.PILToTensor()])


def from_folder(root: Path, name: str, size: int | None) -> Data:
    val = root / "val" if (root / "val").is_dir() else root / "test"
    need(val.is_dir(), f"{root}: no val/ folder in it; expected val/<class>/*.jpg, and train/ beside it")
    test = ImageFolder(val, size)
    train = ImageFolder(root / "train", test.size) if (root / "train").is_dir() else None
    other = sorted(set(train.classes) ^ set(test.classes)) if train else []
    need(not other, f"{root}: train/ and {val.name}/ differ in their class folders: {other[:1]}")
    return Data(name, test.classes, test.size, *NORMS["imagenet"], train, test)


def labels_of(split) -> Tensor:
    """The labels of a split, (N,) int64."""
    return split.tensors[1] if isinstance(split, TensorDataset) else torch.as_tensor(split.targets)


def batches(split, batch_size: int, generator: torch.Generator | None = None, augment: bool = False,
            drop_last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over a split: uint8 images (B, 3, S, S), labels (B,). A generator shuffles it."""
    if isinstance(split, TensorDataset):
        images, labels = split.tensors
        n = len(labels)
        order = torch.randperm(n, generator=generator) if generator else torch.arange(n)
        stop = n - n % batch_size if drop_last else n
        pairs = ((images[i], labels[i]) for i in order[:stop].split(batch_size))
    else:
        pairs = loader(split, batch_size=batch_size, shuffle=generator is not None, generator=generator,
                       drop_last=drop_last)
    for x, y in pairs:
        yield (crop_and_flip(x, generator) if augment else x), y


class Workers:
    count: int | None = None  # --workers, set by `run`


def loader(split, **how) -> DataLoader:
    """A DataLoader of images on disk. Workers decode them ahead of the network, several batches each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun's processes, who share the cores
    usual = min(8, max(1, cores // here))
    workers = usual if Workers.count is None else Workers.count
    return DataLoader(split, num_workers=workers, prefetch_factor=4 if workers else None,
                      pin_memory=torch.cuda.is_available(), **how)


def crop_and_flip(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random crop after zero padding by S/8, and a horizontal flip.  (B, 3, S, S) -> the same."""
    B, _, S, _ = x.shape
    pad = S // 8
    dy, dx = torch.randint(0, 2 * pad + 1, (2, B), generator=generator)
    flip = torch.rand(B, generator=generator) < 0.5
    rows = dy[:, None] + torch.arange(S)  # (B, S)
    cols = dx[:, None] + torch.arange(S)
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    x = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)  # (B, S + 2 pad, S + 2 pad, 3)
    return x[torch.arange(B)[:, None, None], rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def to_input(x: Tensor, mean: list[float], std: list[float], device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) -> the normalised float images a network sees, channels_last, on the device."""
    x = x.to(device, non_blocking=x.is_pinned()).float().div_(255)
    x = (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


# ===== 2. Networks ====================================================================================

CIFAR_ARCH = re.compile(r"resnet(8|14|20|32|44|56|110)(?:x([1-9]\d*))?")

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016); a 1x1 projection where the shape changes."""
    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            projection = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + identity)


class CifarResNet(nn.Module):
    """ResNet for 32 px: depth 6n+2, channels 16-32-64 times `width`. ResNet-20: 0.27 M weights."""
    def __init__(self, depth: int, num_classes: int, width: int = 1):
        super().__init__()
        n, w = (depth - 2) // 6, 16 * width
        self.conv1 = nn.Conv2d(3, w, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        stage = lambda cin, cout, stride: nn.Sequential(
            *[BasicBlock(cout if i else cin, cout, 1 if i else stride) for i in range(n)])
        self.layer1 = stage(w, w, 1)
        self.layer2 = stage(w, 2 * w, 2)
        self.layer3 = stage(2 * w, 4 * w, 2)
        self.fc = nn.Linear(4 * w, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 64 width, H/4, W/4)
        return self.fc(x.mean((2, 3)))  # (B, C)


def build_model(arch: str, num_classes: int, weights: str = "", flag: str = "--arch") -> nn.Module:
    """A classifier by name: `resnet20`, `resnet20x2` (twice as wide), any torchvision one, or yours.

    `weights="DEFAULT"` loads torchvision's own. Yours is FILE.py:NAME or package.module:NAME, a function
    of num_classes, or of nothing, that returns an nn.Module, whose attributes size, mean and std, if it
    has them, say which images it expects. Raises InputError, naming the flag, where there is none.
    """
    if m := CIFAR_ARCH.fullmatch(arch):
        return CifarResNet(int(m[1]), num_classes, int(m[2] or 1))
    known = torchvision.models.list_models(module=torchvision.models)
    near = ", ".join(difflib.get_close_matches(arch, ["resnet20", "resnet20x2", *known], 3, 0))
    need(":" in arch or arch in known, f"{flag} {arch}: no such network; nearest names: {near}")
    with door(f"{flag} {arch}"):
        if ":" in arch:
            make = own_function(arch)
            net = make(num_classes) if inspect.signature(make).parameters else make()
            need(isinstance(net, nn.Module), f"gives a {type(net).__name__}; expected an nn.Module")
            return net
        if not weights:
            more = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
            return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **more)
    with door(f"torchvision's weights for {arch} cannot be had; name a file"):
        net = torchvision.models.get_model(arch, weights=weights)
        of = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
        net.mean, net.std = of.mean, of.std  # efficientnet_v2_l has its own
        return net


def own_function(arch: str):
    """What FILE.py:NAME or package.module:NAME names. The file is run."""
    where, _, name = arch.rpartition(":")
    is_file = where.endswith(".py")
    sys.path.insert(0, str(Path(where).resolve().parent if is_file else Path.cwd()))  # what it imports
    try:  # a file by its path, since another module may have its name
        return runpy.run_path(where)[name] if is_file else getattr(importlib.import_module(where), name)
    finally:
        sys.path.pop(0)


def short_name(arch: str) -> str:
    """What a file or folder calls a network: my_net.py:make_net is my_net-make_net."""
    where, _, name = arch.rpartition(":")
    return f"{Path(where).stem}-{name}" if where else arch


@torch.no_grad()
def check_network(model: nn.Module, example: Tensor, num_classes: int | None = None) -> int:
    """The number of classes, by a forward of `example` (B, ...). InputError: it gives no logits."""
    with door(f"{type(model).__name__} on {example.dtype} {tuple(example.shape)}"):
        try:
            out = model(example)
        except RuntimeError as e:  # x.view(B, -1), as in tutorials, wants the other memory format
            if "view size is not compatible" not in str(e):
                raise
            for m in model.to(memory_format=torch.contiguous_format).modules():
                if isinstance(m, nn.Conv2d):
                    m.register_forward_pre_hook(lambda m, inputs: inputs[0].contiguous())
            out = model(example)
        shape = tuple(getattr(out, "shape", ()))
        fits = len(shape) == 2 and num_classes in (None, shape[1])
        need(fits, f"answers a {type(out).__name__} {shape}; expected logits ({len(example)}, "
             f"{num_classes or 'classes'})")
        need(not out.isnan().any(), "answers NaN; are its weights whole?")
    return shape[1]


def load_file(path: str | Path, keys: tuple[str, ...], what: str) -> dict:
    """torch.load of tensors alone: no pickle of a stranger's is run. InputError: it is not `what`."""
    need(Path(path).exists(), f"{path}: no such file; expected {what}")
    with door(f"{path}: cannot be read as {what}, a file of tensors alone, as a state_dict is"):
        obj = torch.load(path, map_location="cpu", weights_only=True)
    lacks = ["a state_dict"] if not isinstance(obj, dict) else [k for k in keys if k not in obj]
    need(not lacks, f"{path}: not {what}; it lacks {', '.join(lacks)}")
    return obj


def images_of(of) -> dict:
    """Size, mean and std of its images, as a file (a dict) or a network (by attributes) says them."""
    get = of.get if isinstance(of, dict) else lambda k: getattr(of, k, None)
    says = {k: v for k in ("size", "mean", "std") if (v := get(k)) is not None and not callable(v)}
    for k in says.keys() - {"size"}:
        values = torch.as_tensor(says[k], dtype=torch.float64).flatten()
        good = len(values) == 3 and values.isfinite().all() and (k == "mean" or values.min() > 0)
        need(good, f"its {k} is {says[k]}; expected three numbers, of images in [0, 1], std above 0")
        says[k] = values.tolist()
    need(isinstance(says.get("size", 1), int), f"its size is {says.get('size')}; expected an integer")
    return says


def load_network(file: Path, arch: str | None, num_classes: int | None = None,
                 flag: str = "--arch") -> tuple[nn.Module, dict]:
    """A network in eval mode, and what its file says: a checkpoint or a bare state_dict. InputError."""
    state, about = load_file(file, (), "a checkpoint"), {}
    names = ["state_dict", "model_state_dict", "model", "net", "module", "state_dict_ema"]
    for key in names + [*state][:len(state) == 1]:  # wrapped, by whatever program; alone under any name
        if isinstance(state.get(key), dict):
            state, about = state[key], state
            break
    with door(str(file)):
        kept = {k: about[k] for k in ("arch", "dataset", "classes", "acc_pct") if k in about}
        about = kept | images_of(about)
        need(isinstance(about.get("classes", []), list), "its classes are no list of names")
        about["acc_pct"] = float(about.get("acc_pct", math.nan))
        bad = [k for k, v in state.items() if isinstance(v, Tensor) and not v.double().isfinite().all()]
        need(not bad, f"{bad[:1]} holds NaN or infinite values")
        # A bare state_dict ends with the bias of its head, one number per class.
        rows = [len(v) for v in state.values() if isinstance(v, Tensor) and v.ndim]
        known = len(about["classes"]) if "classes" in about else num_classes or (rows or [1000])[-1]
        need(num_classes in (None, known), f"was trained for {known} classes, not for {num_classes}")
        holds = about.get("arch", arch)
        need(holds and holds == (arch or holds), f"{flag} is {arch}, and the file holds a "
             f"{holds or 'network without a name'}")
        # A file of weights does not choose what code is run.
        need(arch or ":" not in holds, f"holds a {holds}; repeat that behind {flag}")
        model = build_model(holds, known, flag=flag)
        # DataParallel writes module. before each key, torch.compile _orig_mod., others net. or model.
        own = model.state_dict().keys()
        while not state.keys() & own and len({str(k).split(".")[0] for k in state}) == 1 < len(state):
            state = {str(k).partition(".")[2]: v for k, v in state.items()}
        with door(f"does not fit {holds} with {known} classes"):
            model.load_state_dict(state)
    return model.eval(), about


@torch.no_grad()
def same_classes(model: nn.Module, names: list, data: Data, file) -> None:
    """Puts a network's outputs `names` into the order of the data's classes. InputError: other names."""
    names, wanted = [str(n) for n in names], data.classes
    if names == wanted:
        return
    need(len(set(names)) == len(names), f"{file}: names a class twice")
    one = sorted(set(names) ^ set(wanted))
    numbered = [all(n.isdecimal() for n in known) for known in (names, wanted)]
    if one and any(numbered):  # known by number alone; folders stand as 0, 1, 10, 11, 2
        rank = lambda known: [sorted(known, key=int).index(n) for n in known]
        names, wanted = [rank(known) if are else [*range(len(known))]
                         for known, are in zip((names, wanted), numbered)]
    need(set(names) == set(wanted), f"{file}: its classes are not those of {data.name}: {one[:1]}")
    order = [names.index(n) for n in wanted]
    x = torch.rand(2, 3, data.size, data.size, device=next(model.parameters()).device)
    before = model(x)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    ends = [m for m in layers if len(m.weight) == len(names)]
    for t in (*ends[-1].parameters(), *ends[-1].buffers()) if ends else ():  # rows of the last layer
        t.copy_(t[order])
    same = torch.allclose(model(x), before[:, order], atol=1e-4)
    need(same, f"{file}: has its classes in another order than {data.name}")


def find_weights(arch: str, dataset: str, data: Data, weights: str | None, device: torch.device,
                 flag: str = "--arch") -> tuple[nn.Module, Data, str]:
    """The full-precision network, the data with the network's normalisation, and a line on its origin.

    Looked for in this order: `weights`, where "none" means a network's own; weights/<data>_<arch>.pt;
    torchvision's for imagenet; for the embedded data a short pretraining, which makes that file.
    """
    C, about = len(data.classes), {}
    file = Path(weights or ROOT / "weights" / f"{data.name}_{short_name(arch)}.pt")
    missing = not weights and not file.exists()
    if weights == "none":
        need(":" in arch, f"{flag} {arch}: has no weights of its own; only a FILE.py:NAME may")
        model, origin, names = build_model(arch, C, flag=flag).eval(), "its own weights", data.classes
    elif missing and dataset == "imagenet" and C == 1000 and not CIFAR_ARCH.fullmatch(arch):
        model = build_model(arch, C, "DEFAULT", flag).eval()
        origin, names = "torchvision's DEFAULT weights", [*range(C)]
    else:
        if missing and dataset == "fashion" and ":" not in arch:
            print(f"weights: none for {arch}; pretraining it on 5,000 images, once", flush=True)
            tool("pretrain").short(arch, data, file, device)
        need(weights or file.exists(), f"no weights for {arch} on {data.name}: expected {file}; name "
             "another, or none if the network has its own, or make it: "
             f"python tools/pretrain.py --arch {arch} --dataset {dataset}")
        model, about = load_network(file, arch, C, flag)
        names, origin = about.get("classes", data.classes), os.path.relpath(file, ROOT)
        if not math.isnan(about["acc_pct"]):
            origin += f", {about['acc_pct']:.2f} % by its own record"
    same_classes(model, names, data, file)
    with door(f"{flag} {arch}"):
        own = images_of(model) | images_of(about)  # a network is fed as it was trained
    size = own.get("size", data.size)
    need(size == data.size, f"{file}: for {size} px, not {data.size}; a folder takes --size {size}")
    return model, data._replace(**own), f"{arch}: {origin}"


# ===== 3. Flags and errors ============================================================================

def number(kind: type, lo: float = -math.inf, hi: float = math.inf, word: str = ""):
    """An argparse type: a finite int or float in [lo, hi], or the word."""
    def parse(text: str):
        if word and text == word:
            return word
        with suppress(ValueError):
            if lo <= (value := kind(text)) <= hi and math.isfinite(value):
                return value
        what = f"{kind.__name__} from {lo} to {hi}{word and ' or ' + word}"
        raise argparse.ArgumentTypeError(f"{text}: expected {what}")
    return parse


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors, and in which --resume FOLDER brings the flags of a run."""
    def __init__(self, prog: str, doc: str):
        kinds = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
        help = type("Help", kinds, {})  # the default behind every help text, the docstring as it stands
        super().__init__(prog, description=doc, formatter_class=help, allow_abbrev=False)

    def group(self, title: str):
        """A function that adds flags to a group of --help. The default gives the type."""
        add = self.add_argument_group(title).add_argument

        def flag(names: str, default, help: str, lo=0, hi=math.inf, word="", **more) -> None:
            one = default[0] if isinstance(default, list) and default else default
            kind = more.pop("type", type(one))
            if isinstance(default, bool):
                more["action"] = YES_NO
            elif kind in (int, float):
                more["type"] = number(kind, lo, hi, word)
            add(*names.split(), default=default, help=help.replace("%", "%%"), **more)
        return flag

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")

    def parse_args(self, argv=None, namespace=None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        args = super().parse_args(argv, namespace)
        if not getattr(args, "resume", None):
            return args
        given = {word.split("=")[0] for word in argv if word.startswith("--")}
        other = sorted(given - {"--resume", "--device", "--workers"})
        need(not other, f"--resume goes on with the flags of that run: leave out {' '.join(other)}")
        out = Path(args.resume)
        if (out / "log.jsonl").exists() and not (out / "checkpoint.pt").exists():
            print(f"{out}: has no checkpoint, so this run has ended, or not come to its first one")
            sys.exit(0)
        state = load_file(out / "checkpoint.pt", ("script", "args"), "a checkpoint")
        need(state["script"] == self.prog, f"{out}: is a run of {state['script']}, not of {self.prog}")
        here = {k: getattr(args, k) for k in ("resume", "device", "workers")}
        return argparse.Namespace(**vars(args) | state["args"] | here)


def add_run_flags(p: Parser, every: int, unit: str) -> None:
    """The flags that all three scripts share. `unit`: what --checkpoint-every counts."""
    a = p.group("data")
    a("--dataset", "fashion", "fashion, fashion-mnist, cifar10, cifar100, imagenet, a folder, a .npz")
    a("--data-dir", "data", "where cifar and imagenet lie, or are downloaded to")
    a("--size", None, "px at which a folder is read; None: 32, 64 or 224, as fits", type=int, lo=8)
    a = p.group("run")
    a("--out", None, "folder to make, which must not exist; None: a new one in runs/")
    a("--seed --seeds", 0, "random seeds: of weights, noise, order, draws; each is a run", nargs="+",
      hi=2**31 - 1)
    a("--device", "auto", "auto, cpu, cuda, mps")
    a("--workers", None, "processes that decode a folder's images; None: 1 to 8", type=int, hi=256)
    a("--amp", None, "bf16 autocast in training; None: where the hardware has it", action=YES_NO)
    a("--resume", None, "folder of a run to go on with, by its own flags", metavar="FOLDER")
    a("--checkpoint-every", every, f"{unit} between checkpoints", lo=1)


def defaults(build_parser, hp: argparse.Namespace | None = None, **changes) -> argparse.Namespace:
    """hp, or else the flags' defaults, with changes: hyperparameters for those who import a class."""
    hp = vars(hp or build_parser().parse_args([]))
    unknown = [k for k in changes if k not in hp or k == "recipe"]  # which changes a parser's defaults
    if unknown:
        raise TypeError(f"not a flag: {', '.join(unknown)}; a recipe is unpacked, **RECIPES[name]")
    return argparse.Namespace(**hp | changes)


TROUBLE = {"out of memory|not enough memory|OutOfMemory|MemoryError|allocate|ALLOC_FAILED|overflowed":
           "not enough memory: lower --batch-size, or take a smaller network",
           "PytorchStreamWriter|inline_container": "a file cannot be written: is the disk full?"}


def run(main, parse, argv: list[str] | None = None) -> None:
    """main(parse(argv)), with a user's mistake turned into one line on stderr and exit code 2."""
    prog, rank = Path(sys.argv[0]).name, int(os.environ.get("RANK", 0))
    warnings.formatwarning = lambda message, *where, **more: f"note: {message}\n"
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know the letters of a folder's name
        getattr(stream, "reconfigure", dict)(errors="replace")
    try:
        args = parse(argv)
        Workers.count = getattr(args, "workers", None)
        main(args)
        if rank_and_world()[1] > 1:
            dist.barrier()  # torchrun ends all where one fails, at its exit, too: first all are through
    except (InputError, OSError, RuntimeError, MemoryError) as e:
        line = re.sub(r"(?s)Caught InputError in DataLoader.*InputError: ", "", str(e))  # a worker's
        if not isinstance(e, (InputError, OSError)):  # torch's, which do not say what to do
            line = next((why for words, why in TROUBLE.items() if re.search(words, f"{e!r}")), None)
            if line is None:
                raise
            line += f" ({reason(e)[:120]})"
        time.sleep(10 * (rank > 0))  # torchrun ends the others once the first has said it
        sys.stderr.write(f"{prog}: error: {' '.join(line.split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        again = RunLog.folder and (RunLog.folder / "checkpoint.pt").exists()
        how = f"; to go on: python {sys.argv[0]} --resume {shlex.quote(str(RunLog.folder))}"
        sys.stderr.write(f"\n{prog}: interrupted{how if again else ''}\n")
        sys.exit(130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def each_seed(main):
    """`main` for each number behind --seed; --out is then a folder of folders, seed0, seed1, ..."""
    def mains(args: argparse.Namespace) -> None:
        seeds = np.atleast_1d(args.seed).tolist()
        for n, seed in enumerate(seeds):
            if len(seeds) > 1:
                print(f"seed {seed}, run {n + 1} of {len(seeds)}", flush=True)
            out = args.out and (f"{args.out}/seed{seed}" if len(seeds) > 1 else args.out)
            main(argparse.Namespace(**vars(args) | {"seed": seed, "out": out}))
    return mains


# ===== 3. Training ====================================================================================

def descend(opt: torch.optim.Optimizer, loss: Tensor, what: str, flag: str, clip: float = 0.0,
            together: bool = False) -> None:
    """One optimizer step, the gradient's norm cut to `clip` unless that is 0. InputError: it is NaN."""
    # together: torchrun's processes step by the mean of their gradients.
    opt.zero_grad(set_to_none=True)
    loss.backward()
    params = [p for group in opt.param_groups for p in group["params"]]
    if together:
        average([p.grad for p in params if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(params, clip or math.inf).item()
    advice = f"lower {flag}" if opt.state else "before any step: look at the images and the weights"
    value = loss.item()
    need(math.isfinite(value + norm), f"{what} is {value}, its gradient norm {norm}; {advice}")
    opt.step()


def one_cycle(opt: torch.optim.Optimizer, lr: float, steps: int, warmup: float):
    """The learning rate rises from lr / 25 during a share `warmup` of the steps, then falls to 0."""
    steps = max(2, steps)
    if warmup * steps in (1, steps):  # torch divides by the length of a phase, which here would be 0
        warmup *= 1 - 1e-6
    return torch.optim.lr_scheduler.OneCycleLR(opt, max(lr, 1e-12), steps, pct_start=warmup,
                                               cycle_momentum=False)


@torch.no_grad()
def accuracy_pct(model: nn.Module, data: Data, split, device: torch.device) -> float:
    """Top-1 in percent over a whole split, in eval mode and fp32 (no TF32)."""
    torch.backends.cudnn.allow_tf32 = False
    training, hits = model.training, 0
    model.eval()
    for x, y in batches(split, 250 if data.size <= 64 else 50):
        logits = model(to_input(x, data.mean, data.std, device))
        hits += (logits.argmax(1).cpu() == y).sum().item()
    model.train(training)
    return 100 * hits / len(split)


# ===== 3. Folders, logs, checkpoints ==================================================================

def new_folder(args: argparse.Namespace, base: str, alone: bool = False) -> Path:
    """Makes --out, else <base>/seed0, seed0-2, ...: the first that is not there."""
    # mkdir makes a folder or fails, so no run meets another's files. alone: each process has its own.
    out = first = Path(args.resume or args.out or f"{base}/seed{args.seed}")
    makes, n = not args.resume and (alone or rank_and_world()[0] == 0), 1
    while makes:
        try:
            out.mkdir(parents=True)
            break
        except OSError as e:
            again = isinstance(e, FileExistsError) and out.is_dir() and not args.out
            need(again, f"{out}: cannot be made ({e.strerror}); name another --out")
            n, out = n + 1, first.with_name(f"{first.name}-{n + 1}")
    return out if alone else gather(out)[0]


class RunLog:
    """`log.jsonl`: one JSON object per line, whose `event` is start, step, eval or end."""
    # state: a checkpoint to go on from. What was logged after it goes, since it comes again.
    folder: Path | None = None  # of the newest log of this process

    def __init__(self, out: Path, args: argparse.Namespace, device: torch.device, alone: bool = False,
                 state: dict | None = None):
        silent = rank_and_world()[0] > 0 and not alone  # of several processes the first one writes
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.alone, RunLog.folder = out / "log.jsonl", alone, out
        self.file = open(os.devnull if silent else self.path, "a")
        if not silent:
            self.file.truncate(state["log_bytes"] if state else 0)
        self.t0 = time.perf_counter() - (state["wall_s"] if state else 0.0)
        git, commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"], ""
        with suppress(OSError, subprocess.TimeoutExpired):
            commit = subprocess.run(git, capture_output=True, text=True, timeout=5).stdout.strip()
        self.write("start", argv=command(), args=vars(args), commit=commit, torch=torch.__version__,
                   python=platform.python_version(), device=device_name(device),
                   threads=torch.get_num_threads(), time=time.strftime("%Y-%m-%d %H:%M:%S"))

    def seconds(self) -> float:  # of all stretches of the run together
        return time.perf_counter() - self.t0

    def write(self, event: str, **fields) -> None:
        no_number = lambda v: isinstance(v, float) and not math.isfinite(v)
        fields = {k: None if no_number(v) else v for k, v in fields.items()}
        self.file.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        self.file.flush()


def command() -> str:
    """The command line of this process, as one would type it in the repository."""
    script = Path(sys.argv[0])
    folder = "tools/" if script.resolve().parent == ROOT / "tools" else ""
    return shlex.join(["python", folder + script.name, *sys.argv[1:]])


def progress(first: int, total: int, what: str = "") -> tqdm:
    """range(first, total) under a tqdm bar that says how long it takes; in a file, every 15 seconds."""
    tty = sys.stderr.isatty()
    return tqdm(range(first, total), what, total, initial=first, file=sys.stderr if tty else sys.stdout,
                mininterval=0.2 if tty else 15, dynamic_ncols=True)


def save_atomic(obj: dict, path: Path, save=torch.save) -> None:
    """Saves beside the target, then renames: a reader sees the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(obj, tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)  # a full disk leaves nothing behind


def checkpoint_file(out: Path, alone: bool = False) -> Path:
    """checkpoint.pt; of torchrun's second process checkpoint1.pt: each has its own random numbers."""
    return out / f"checkpoint{'' if alone else rank_and_world()[0] or ''}.pt"


def save_checkpoint(log: RunLog, args: argparse.Namespace, **state) -> None:
    """All that --resume needs, in the folder of the log."""
    about = {"script": Path(sys.argv[0]).name, "args": vars(args)}
    about |= {"wall_s": log.seconds(), "log_bytes": log.file.tell()}
    save_atomic(about | state, checkpoint_file(log.path.parent, log.alone))


def load_checkpoint(args: argparse.Namespace, crc: int) -> dict | None:
    """The checkpoint in the folder of --resume, if that is given. crc: `crc_of` the weights of now."""
    if not args.resume:
        return None
    file = checkpoint_file(Path(args.resume))
    state = load_file(file, ("crc", "wall_s", "log_bytes"), "a checkpoint")
    need(state["crc"] == crc, f"{file}: the run began with other weights than those that are there now")
    return state


def crc_of(*models: nn.Module) -> int:
    """A number that tells networks apart."""
    tensors = [t.detach().cpu().contiguous() for m in models for t in m.state_dict().values()]
    return zlib.crc32(b"".join(t.numpy().tobytes() for t in tensors))


def state_of(x):
    """What a checkpoint needs of x; an object of ours names its attributes in STATE."""
    if hasattr(x, "STATE"):
        return {k: state_of(getattr(x, k)) for k in x.STATE}
    get = getattr(x, "state_dict", None) or getattr(x, "get_state", lambda: x)  # of a torch.Generator
    return get()


def restored(x, state):
    """x as it was when `state = state_of(x)`."""
    for k in getattr(x, "STATE", ()):
        setattr(x, k, restored(getattr(x, k), state[k]))
    load = getattr(x, "load_state_dict", None) or getattr(x, "set_state", None)
    if load:
        load(state)
    return x if load or hasattr(x, "STATE") else state


# ===== 4. Machine =====================================================================================

def pick_device(name: str = "auto", several: bool = False) -> torch.device:
    """`auto` is CUDA, else MPS, else CPU. Raises InputError for a device that is not there."""
    # Under torchrun a program that knows of `several` processes becomes one of them, on its own GPU.
    by_torchrun = dist.is_available() and dist.is_torchelastic_launched()
    processes = int(os.environ["WORLD_SIZE"]) if by_torchrun else 1
    need(processes == 1 or several, f"torchrun started {processes} processes; this program runs as one")
    if name in ("auto", "cuda") and processes > 1 and torch.cuda.is_available():
        torch.cuda.set_device(name := f"cuda:{os.environ['LOCAL_RANK']}")
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with door(f"--device {name}: not usable here; try --device auto"):
        torch.empty(1, device=name)
    if processes > 1 and not dist.is_initialized():
        backend = "nccl" if name.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))  # one may have more to do
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    cpu = f"{device.type} ({platform.machine()})"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 is computed in hardware: emulated, it is several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    caps = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(caps.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, on: bool | None):
    """bf16 autocast; weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


def peak_mib() -> float:
    """Peak memory of this process in MiB: of CUDA if it is used, else resident, as Linux counts it."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    said = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return int(said[1]) / 2**10 if said else math.nan


@contextmanager
def seeded(seed: int):
    """Within it torch's CPU generator starts from the seed; after it, it is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset a GPU's for good
        yield


@contextmanager
def clock(counts: dict, name: str):
    """Adds the seconds spent within it to counts[name]."""
    t0 = time.perf_counter()
    yield
    counts[name] += time.perf_counter() - t0


def tool(name: str):
    """The module tools/<name>.py, late: who imports a class needs none. InputError: it is not there."""
    with door(f"no tools/{name}.py: copy tools/ along"):
        return importlib.import_module(f"tools.{name}")


# torchrun starts N processes, each with its own noise, images or seeds. The first prints and writes.


def rank_and_world() -> tuple[int, int]:
    """Which process this is, and how many there are: 0 of 1 without torchrun."""
    on = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if on else (0, 1)


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Each tensor becomes its mean over all processes, in one all_reduce."""
    world = rank_and_world()[1]
    if world > 1:
        together = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(together)
        for t, mean in zip(tensors, (together / world).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def gather(x) -> list:
    """x of every process, in the order of their ranks. x: anything that can be pickled."""
    everyone = [x] * rank_and_world()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, x)
    return everyone
