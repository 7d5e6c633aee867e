"""What the three scripts share and no paper talks about: networks, data, weights, fake-quant, logs.

Copy this file along with any of the scripts. It needs torch, torchvision, numpy and tqdm. From top to bottom:

    errors and machine   one-line user errors, device, mixed precision, seeds
    networks             CIFAR-style ResNets; every torchvision classifier by its name
    data                 embedded Fashion-MNIST, CIFAR, ImageNet, any ImageFolder, any MedMNIST-style .npz
    weights              checkpoints that know their own classes, normalisation and accuracy
    BN and fake-quant    batch moments with a fast gradient; entropy; the quantizer, its EMA, bit packing
    evaluation and logs  top-1, one flat JSON object a line
    pretraining          `python common.py pretrain`: the full-precision networks everything starts from
    corruptions          the 15 of ImageNet-C and 4 more, batched and seeded, for 32 and 224 px

    python common.py pretrain --arch resnet20 --dataset fashion-mnist --save weights/fashion_resnet20.pt
    python common.py embed --data-dir data
"""

import argparse
import difflib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent


# ===== Errors and machine ============================================================================================


class InputError(ValueError):
    """A user's mistake: the message names what is wrong, what was expected and what to do. Exit code 2, no traceback."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors: one line, without the usage text above it."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=120)


def number(kind: type, lo: float = -math.inf, hi: float = math.inf):
    """An argparse type: a finite int or float in [lo, hi]."""
    def parse(text: str):
        expected = f"expected {'an integer' if kind is int else 'a number'}" + (
            f" from {lo} to {hi}" if math.isfinite(hi) else f" of at least {lo}" if math.isfinite(lo) else "")
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}': {expected}") from None
        if not (lo <= value <= hi and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text}: {expected}")
        return value
    return parse


def run(main, parse, argv: list[str] | None = None) -> None:
    """main(parse(argv)), with an InputError turned into one line on stderr and exit code 2."""
    prog = Path(sys.argv[0]).name
    try:
        main(parse(argv))
    except (InputError, OSError) as e:  # an OSError: a full disk, a folder that cannot be written
        sys.stderr.write(f"{prog}: error: {' '.join(str(e).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{prog}: interrupted; where a checkpoint was written, the same command with --resume goes on from it\n")
        sys.exit(130)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else CPU. Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: not usable here ({str(e).splitlines()[0]}); try --device auto") from None


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 is computed in hardware. Emulated bf16 is several times slower than fp32, so it is off elsewhere."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # older torch
            return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
        caps = torch.cpu.get_capabilities()
        return bool(caps.get("avx512_bf16") or caps.get("amx_bf16") or caps.get("bf16"))
    return False


def autocast(device: torch.device, on: bool):
    """bf16 autocast; weights stay fp32. gdfq.py on two Zen 4 cores: 1.3 times the images/s. Accuracy is equal within noise:
    the W3A3 miniature of the tests, mean of seeds 0 and 1, has 91.2 % in bf16 and 91.3 % in fp32 (results/amp_miniature)."""
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


def peak_mib() -> float:
    """Peak memory of this process in MiB: CUDA allocations if there are any, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


# ===== Networks ======================================================================================================


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
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + identity)


class CifarResNet(nn.Module):
    """ResNet for 32 px images, depth 6n+2, widths 16-32-64 times `width`. ResNet-20 has 0.27 M parameters, 41 M MACs."""

    def __init__(self, depth: int, num_classes: int, width: int = 1):
        super().__init__()
        n, w = (depth - 2) // 6, 16 * width
        self.conv1 = nn.Conv2d(3, w, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(*[BasicBlock(w, w, 1) for _ in range(n)])
        self.layer2 = nn.Sequential(*[BasicBlock(2 * w if i else w, 2 * w, 1 if i else 2) for i in range(n)])
        self.layer3 = nn.Sequential(*[BasicBlock(4 * w if i else 2 * w, 4 * w, 1 if i else 2) for i in range(n)])
        self.fc = nn.Linear(4 * w, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 64 width, H/4, W/4)
        return self.fc(x.mean((2, 3)))  # (B, C)


CIFAR_ARCH = re.compile(r"resnet(8|14|20|32|44|56|110)(?:x([1-9]\d*))?")


def build_model(arch: str, num_classes: int, weights: str | None = None) -> nn.Module:
    """A classifier by name: `resnet20`, `resnet20x2` (twice as wide), or any torchvision classification model.

    `weights="DEFAULT"` loads torchvision's own (torchvision names only). Raises InputError for an unknown name.
    """
    if m := CIFAR_ARCH.fullmatch(arch):
        return CifarResNet(int(m[1]), num_classes, int(m[2] or 1))
    import torchvision  # late: half a second that --help need not pay

    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        near = difflib.get_close_matches(arch, ["resnet20", "resnet20x2", "resnet32", "resnet44", "resnet56", *known], 3, 0)
        raise InputError(f"--arch {arch}: no such network; nearest names: {', '.join(near)}")
    if weights:
        return torchvision.models.get_model(arch, weights=weights)
    kwargs = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **kwargs)


# ===== Data ==========================================================================================================


class Data(NamedTuple):
    """A classification set. A split is a TensorDataset of uint8 images (N, 3, S, S), or an ImageFolder, or None."""

    name: str
    classes: list[str]
    size: int  # image side in pixels
    mean: list[float]  # per channel, of images in [0, 1]
    std: list[float]
    train: object
    test: object


IMAGENET_NORM = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
NORMS = {
    "fashion": ([0.2190] * 3, [0.3318] * 3),  # of the 60,000 train images, padded to 32 px
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
}
DATASETS = ("fashion", "fashion-mnist", "cifar10", "cifar100", "imagenet")


def load_data(dataset: str, data_dir: str = "data") -> Data:
    """Load a data set by name or path; see `--dataset` for what is known.

    fashion        5,000 train and 10,000 test images of Fashion-MNIST, embedded in this repository
    fashion-mnist  all 70,000, through torchvision (downloaded into data_dir when absent)
    cifar10/100    data_dir/cifar10.npz if it is there (MedMNIST keys), else torchvision's, downloaded when absent
    imagenet       data_dir/val/<wnid>/*.JPEG, and data_dir/train if it is there; resize 256, crop 224
    a folder       an ImageFolder tree, treated like imagenet
    a .npz file    MedMNIST keys: train_images, train_labels, test_images, test_labels

    Grey images get three channels, 28 px images are padded to 32. Raises InputError for anything it cannot read.
    """
    path = Path(dataset)
    if dataset == "fashion":
        return _from_npz(ROOT / "data" / "fashion_mnist.npz", "fashion", NORMS["fashion"])
    if dataset in ("cifar10", "cifar100"):
        npz = Path(data_dir) / f"{dataset}.npz"
        return _from_npz(npz, dataset, NORMS[dataset]) if npz.is_file() else _from_torchvision(dataset, data_dir)
    if dataset == "fashion-mnist":
        return _from_torchvision(dataset, data_dir)
    if dataset == "imagenet" or path.is_dir():
        return _from_folder(Path(data_dir) if dataset == "imagenet" else path, dataset)
    if path.suffix == ".npz":
        return _from_npz(path, path.stem, None)
    near = difflib.get_close_matches(dataset, DATASETS, 2, 0)
    raise InputError(f"--dataset {dataset}: neither a known name (nearest: {', '.join(near)}), nor a folder, nor a .npz file")


def _images(a: np.ndarray, origin: str) -> Tensor:
    """uint8 (N, H, W) or (N, H, W, 3) or (N, H, W, 1) -> (N, 3, S, S), S a multiple of 4 and at least 32."""
    if a.dtype != np.uint8 or a.ndim not in (3, 4) or a.shape[-1] not in (1, 3) and a.ndim == 4 or a.shape[1] != a.shape[2]:
        raise InputError(f"{origin}: images are {a.dtype} {a.shape}; expected uint8 (N, S, S) or (N, S, S, 3)")
    x = torch.from_numpy(a)
    x = x.unsqueeze(1) if a.ndim == 3 else x.permute(0, 3, 1, 2)
    side = max(32, math.ceil(x.shape[-1] / 4) * 4)
    lo = (side - x.shape[-1]) // 2
    x = F.pad(x, (lo, side - x.shape[-1] - lo) * 2)
    return x.expand(-1, 3, -1, -1).contiguous()


def _from_npz(path: Path, name: str, norm) -> Data:
    try:
        npz = np.load(path)
        arrays = {k: npz[k] for k in ("train_images", "train_labels", "test_images", "test_labels")}
        classes = npz["classes"].tolist() if "classes" in npz else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a .npz with MedMNIST keys") from None
    except KeyError as e:
        raise InputError(f"{path}: {e.args[0]}; expected the MedMNIST keys {{train,test}}_{{images,labels}}") from None
    except Exception as e:  # BadZipFile, zlib.error, ValueError: which one depends on where the file breaks off
        raise InputError(f"{path}: not a readable .npz file ({e}); download or make it again") from None
    splits = {}
    for split in ("train", "test"):
        labels = arrays[f"{split}_labels"]
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]  # MedMNIST's shape
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(arrays[f"{split}_images"]):
            raise InputError(f"{path}: {split}_labels are {labels.dtype} {labels.shape}; expected one integer an image")
        if not len(labels) or labels.min() < 0:
            raise InputError(f"{path}: the {split} split is empty or has negative labels; expected classes 0, 1, 2, ...")
        splits[split] = torch.utils.data.TensorDataset(
            _images(arrays[f"{split}_images"], f"{path}"), torch.from_numpy(labels.astype(np.int64)))
    return _in_memory(name, classes, norm, splits["train"], splits["test"])


def _in_memory(name: str, classes, norm, train, test) -> Data:
    if norm is None:  # an unknown set is normalised by the statistics of its own train images
        sample = train.tensors[0][:5000].double() / 255
        norm = sample.mean((0, 2, 3)).tolist(), sample.std((0, 2, 3)).clamp_min(1e-3).tolist()
    classes = classes or [str(c) for c in range(int(torch.cat([train.tensors[1], test.tensors[1]]).max()) + 1)]
    return Data(name, list(classes), train.tensors[0].shape[-1], list(norm[0]), list(norm[1]), train, test)


def _from_torchvision(dataset: str, data_dir: str) -> Data:
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion-mnist": datasets.FashionMNIST}[dataset]
    try:
        raw = [cls(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as e:  # URLError, a failed checksum, a folder that is not writable: all mean "no data"
        raise InputError(f"--dataset {dataset}: not in {data_dir} and the download failed ({e}); "
                         f"put the files there, or {data_dir}/{dataset}.npz with MedMNIST keys") from None
    train, test = (torch.utils.data.TensorDataset(_images(np.asarray(r.data), dataset), torch.as_tensor(r.targets)) for r in raw)
    name = "fashion" if dataset == "fashion-mnist" else dataset
    return _in_memory(name, raw[0].classes, NORMS[name], train, test)


def _from_folder(root: Path, name: str) -> Data:
    from torchvision import datasets
    from torchvision.transforms import v2

    tf = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    val = next((root / d for d in ("val", "test") if (root / d).is_dir()), None)
    if val is None:
        raise InputError(f"{root}: no val/ folder in it; expected {root}/val/<class>/*.jpg (and train/ to train on real images)")
    try:
        test = datasets.ImageFolder(val, tf)
        train = datasets.ImageFolder(root / "train", tf) if (root / "train").is_dir() else None
    except FileNotFoundError as e:
        raise InputError(f"{root}: {str(e).splitlines()[0]}") from None
    return Data(Path(name).name, test.classes, 224, *IMAGENET_NORM, train, test)


def batches(split, batch_size: int, generator: torch.Generator | None = None, augment: bool = False,
            drop_last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over a split: uint8 images (B, 3, S, S) and int64 labels (B,), on the CPU.

    A generator shuffles. `augment` shifts by up to S/8 pixels (zero padding) and flips, each image on its own.
    """
    if isinstance(split, torch.utils.data.TensorDataset):
        images, labels = split.tensors
        order = torch.arange(len(labels)) if generator is None else torch.randperm(len(labels), generator=generator)
        stop = len(order) - len(order) % batch_size if drop_last else len(order)
        pairs = ((images[i], labels[i]) for i in order[:stop].split(batch_size))
    else:
        pairs = torch.utils.data.DataLoader(split, batch_size, shuffle=generator is not None, generator=generator,
                                            num_workers=min(8, os.cpu_count() or 1), drop_last=drop_last)
    for x, y in pairs:
        yield (crop_and_flip(x, generator) if augment else x), y


def crop_and_flip(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random crop after zero padding by S/8, and a horizontal flip. (B, 3, S, S) -> the same shape, any dtype."""
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
    x = x.to(device).float().div_(255)
    x = (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


# ===== Weights =======================================================================================================


def save_atomic(obj: dict, path: Path) -> None:
    """torch.save beside the target, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    torch.save(obj, tmp)
    os.replace(tmp, path)


def load_file(path: str | Path, keys: tuple[str, ...], what: str) -> dict:
    """torch.load with weights_only=True, and one clear line for everything that can be wrong with a file."""
    try:
        obj = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {what}") from None
    except Exception as e:  # truncated zip, pickle of classes, a folder, a text file ...
        raise InputError(f"{path}: cannot be read as {what} ({type(e).__name__}); it may be truncated") from None
    if not isinstance(obj, dict) or any(k not in obj for k in keys):
        raise InputError(f"{path}: not {what}; expected the keys {', '.join(keys)}")
    return obj


def find_weights(arch: str, dataset: str, data: Data, weights: str | None, device: torch.device) -> tuple[nn.Module, Data, str]:
    """The full-precision network, the data with the network's own normalisation, and a line that says where it is from.

    In this order: `weights` if given; weights/<data>_<arch>.pt; torchvision's DEFAULT for imagenet; for the embedded data a
    short pretraining on its 5,000 train images, cached as weights/<data>_<arch>.pt. Raises InputError otherwise.
    """
    C, shipped = len(data.classes), ROOT / "weights" / f"{data.name}_{arch}.pt"
    model = build_model(arch, C)
    file = Path(weights) if weights else shipped
    if not file.exists() and not weights:
        if dataset == "imagenet" and not CIFAR_ARCH.fullmatch(arch):
            if C != 1000:
                raise InputError(f"torchvision's {arch} knows 1000 classes, --data-dir has {C}: --weights FILE, or the full set")
            try:
                return build_model(arch, C, "DEFAULT").eval(), data, f"{arch}: torchvision's DEFAULT weights"
            except Exception as e:
                raise InputError(f"torchvision's weights for {arch} cannot be had ({e}); download them, then --weights FILE") from None
        if dataset != "fashion":
            raise InputError(f"no weights for {arch} on {data.name}: expected {shipped.relative_to(ROOT)} or --weights FILE; make "
                             f"them with: python common.py pretrain --arch {arch} --dataset {dataset}")
        print(f"weights: none for {arch} on the embedded data; pretraining it on the 5,000 train images, once", flush=True)
        pretrain(arch, data, shipped, epochs=8, batch_size=64, lr=0.02, momentum=0.9, weight_decay=5e-4, warmup=0.2,
                 label_smoothing=0.0, amp=has_fast_bf16(device), seed=0, device=device, resume=False, command="short pretraining", eval_every=8)
    ck = load_file(file, (), "a checkpoint")
    state = ck.get("state_dict", ck)  # a bare state_dict will do
    if C != len(ck.get("classes", data.classes)):
        raise InputError(f"{file}: was trained for {len(ck['classes'])} classes, --dataset {dataset} has {C}")
    if ck.get("size", data.size) != data.size:
        raise InputError(f"{file}: was trained on images of {ck['size']} px, --dataset {dataset} has {data.size} px")
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as e:
        first = str(e).splitlines()[min(1, str(e).count("\n"))].strip()
        raise InputError(f"{file}: does not fit --arch {arch} with {C} classes: {first}") from None
    shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
    source = f"{shown}, {ck['acc_pct']:.2f} % by its own record" if "acc_pct" in ck else f"{shown}"
    return model.eval(), data._replace(mean=ck.get("mean", data.mean), std=ck.get("std", data.std)), f"{arch}: {source}"


# ===== BatchNorm statistics ==========================================================================================


class BatchMoments(torch.autograd.Function):
    """mu_c, var_c of x over all but the channel axis, biased.  (B, C, ...) -> (C,), (C,), fp32.

    d mu/dx = 1/n and d var/dx = 2 (x - mu) / n, so backward is one fused multiply-add. Forward is F.batch_norm's own pass, asked
    for its running statistics: momentum 1 leaves this batch's in them. Its output is thrown away, and still it takes an eighth of
    torch.var_mean's time on a bf16 channels_last tensor on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, var = x.new_zeros(2, x.shape[1], dtype=torch.float32)
        F.batch_norm(x, mu, var, training=True, momentum=1.0)
        n = x.numel() // x.shape[1]
        var = var * ((n - 1) / n)  # running_var is the unbiased one
        ctx.save_for_backward(x, mu)
        return mu, var

    @staticmethod
    def backward(ctx, grad_mu: Tensor, grad_var: Tensor) -> Tensor:
        x, mu = ctx.saved_tensors
        n, shape = x.numel() // x.shape[1], (1, -1) + (1,) * (x.ndim - 2)
        a = 2 * grad_var / n
        b = grad_mu / n - a * mu
        return torch.addcmul(b.to(x.dtype).view(shape), a.to(x.dtype).view(shape), x)


# ===== Entropy =======================================================================================================


def entropy(logits: Tensor) -> Tensor:
    """H(x) = -sum_c p_c ln p_c, p = softmax(logits).  (B, C) -> (B,), nats, in [0, ln C]. The gradient flows through both p."""
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


# ===== Fake quantization =============================================================================================
#
# Uniform affine quantization, zero exactly representable. With bits k and a range [a, b] that holds 0:
#
#     s = (b - a) / (2^k - 1)        step, per tensor or per output channel
#     z = round(a / s)               the code of `a`, counted from zero: an integer in [-(2^k - 1), 0]
#     q = clamp(round(x / s) - z, 0, 2^k - 1)            what an integer machine stores
#     x_hat = s * (q + z)                                what a float machine computes with


def step_and_zero(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(s, z) of the range [lo, hi], any shape. The range is widened to hold 0.

    Without that a channel whose weights are all positive gets a zero point no integer format holds, and padding and
    pruned weights are no longer exactly 0.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    s = ((hi - lo) / (2**bits - 1)).clamp_min(torch.finfo(lo.dtype).tiny * 2**20)  # an all-zero channel has s > 0, too
    return s, torch.round(lo / s)


def quantize_codes(x: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    """The integers q in [0, 2^bits - 1], uint8, shape of x. `s` and `z` broadcast against x."""
    return (torch.round(x / s) - z).clamp_(0, 2**bits - 1).to(torch.uint8)


class FakeQuant(torch.autograd.Function):
    """x -> x_hat with the straight-through gradient: 1 where x is inside the range, 0 where it is clamped.

    One Function instead of a chain of differentiable ops keeps one tensor for backward instead of four. The plain passes are
    chosen for a CPU, where clamp with tensor bounds takes nine times as long as each of these on bf16, and a comparison four times.
    """

    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
        code = torch.round(x / s) - z
        ctx.save_for_backward(code)
        ctx.max = 2**bits - 1
        return (code.clamp(0, ctx.max) + z) * s

    @staticmethod
    def backward(ctx, grad: Tensor):
        code, = ctx.saved_tensors
        # grad * ((code >= 0) & (code <= max)) in one pass; hardtanh's bounds are strict, and codes are integers
        return torch.ops.aten.hardtanh_backward(grad, code, -0.5, ctx.max + 0.5), None, None, None


def fake_quant(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize x with the range [lo, hi], which broadcasts against x."""
    s, z = step_and_zero(lo, hi, bits)
    return FakeQuant.apply(x, s, z, bits)


def channel_range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Min and max of each output channel of a weight (C_out, ...), shaped to broadcast: (C_out, 1, ...)."""
    dims = tuple(range(1, w.ndim))
    return w.detach().amin(dims, keepdim=True), w.detach().amax(dims, keepdim=True)


class EMA:
    """Exponential moving average, correctly debiased: the average of a constant is that constant from the first value on.

        m_t = rho m_{t-1} + (1 - rho) x_t,   value = m_t / (1 - rho^t)

    Published GDFQ code feeds the debiased value back into m; its range is up to 3,900 times too wide around step 20.
    """

    def __init__(self, momentum: float):
        self.momentum, self.m, self.weight = momentum, 0.0, 0.0

    def update(self, x: Tensor) -> Tensor:
        self.m = self.momentum * self.m + (1 - self.momentum) * x
        self.weight = self.momentum * self.weight + (1 - self.momentum)
        return self.m / self.weight


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits, any shape -> a flat uint8 tensor of ceil(n bits / 8) bytes, most significant bit first."""
    b = (q.flatten()[:, None] >> torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=q.device)) & 1  # (n, bits)
    return torch.from_numpy(np.packbits(b.cpu().numpy()))


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of pack_bits: n codes, flat, uint8."""
    b = np.unpackbits(packed.cpu().numpy(), count=n * bits).reshape(n, bits)
    weights = 2 ** np.arange(bits - 1, -1, -1, dtype=np.uint8)
    return torch.from_numpy((b * weights).sum(1, dtype=np.uint8))


# ===== Evaluation and logs ===========================================================================================


@torch.no_grad()
def accuracy_pct(model: nn.Module, data: Data, split, device: torch.device, batch_size: int = 250) -> float:
    """Top-1 in percent over a whole split, fp32 (no TF32), in whatever mode the model is in."""
    torch.backends.cudnn.allow_tf32 = False
    hits = total = 0
    for x, y in batches(split, batch_size):
        hits += (model(to_input(x, data.mean, data.std, device)).argmax(1).cpu() == y).sum().item()
        total += len(y)
    return 100 * hits / total


class RunLog:
    """`log.jsonl`: one flat JSON object a line; `event` is start, step, eval or end."""

    def __init__(self, out: Path, append: bool = False):
        self.path, self.t0 = out / "log.jsonl", time.time()
        self.file = self.path.open("a" if append else "w")

    def write(self, event: str, **fields) -> None:
        self.file.write(json.dumps({"event": event, **fields}) + "\n")
        self.file.flush()

    def start(self, args: argparse.Namespace, device: torch.device) -> None:
        """Everything needed to run this again: command, all arguments, commit, versions, device, threads."""
        def git(*cmd: str) -> str:
            try:
                return subprocess.run(["git", *cmd], cwd=ROOT, capture_output=True, text=True, timeout=5).stdout.strip()
            except (OSError, subprocess.TimeoutExpired):
                return ""
        dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        self.write("start", argv=" ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), args=flat(args),
                   commit=git("rev-parse", "--short", "HEAD") + dirty, torch=torch.__version__, python=platform.python_version(),
                   device=device_name(device), threads=torch.get_num_threads(), time=time.strftime("%Y-%m-%d %H:%M:%S"))


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every `every_s` seconds. Use as `for i in progress: ...`."""

    def __init__(self, first: int, total: int, every_s: float = 15.0):
        self.first, self.total, self.every_s, self.last, self.t0 = first, total, every_s, time.time(), time.time()
        self.bar = tqdm(initial=first, total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def __iter__(self) -> Iterator[int]:
        for self.i in range(self.first, self.total):
            yield self.i
            self.bar.update()
        self.bar.close()

    def show(self, figures: str) -> None:
        self.bar.set_postfix_str(figures, refresh=False)
        if self.bar.disable and (time.time() - self.last > self.every_s or self.i == self.total - 1):
            done, self.last = self.i + 1 - self.first, time.time()
            left = (time.time() - self.t0) / done * (self.total - self.i - 1)
            print(f"{self.i + 1:6d}/{self.total} | {figures} | {left:.0f} s left", flush=True)


def flat(args: argparse.Namespace) -> dict:
    return {k: v for k, v in vars(args).items() if not callable(v)}


def check_out(path: Path) -> Path:
    """Raises InputError where a folder cannot be made; makes nothing, so that a later mistake leaves nothing behind."""
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path}: cannot be written, since {parent} is {'read-only' if parent.is_dir() else 'a file'}; name another")
    return path


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


# ===== Pretraining ===================================================================================================


def pretrain(arch: str, data: Data, save: Path, epochs: int, batch_size: int, lr: float, momentum: float,
             weight_decay: float, warmup: float, label_smoothing: float, amp: bool, seed: int, device: torch.device,
             resume: bool, log: RunLog | None = None, command: str = "", eval_every: int = 1, augment: str = "crop-flip",
             init: str | None = None) -> float:
    """Train a network from scratch, or from the checkpoint `init`; write a checkpoint, return its last-epoch test accuracy in percent.

    SGD Nesterov, one-cycle learning rate, crop and flip. augment="trivial": one random operation more an image (colour,
    contrast, geometry: TrivialAugment, Mueller & Hutter 2021). "trivial-noise": and Gaussian noise, of a standard deviation
    uniform in [0, 0.15], on half of the images. `save` gets state_dict, arch, dataset, classes, mean, std,
    size, acc_pct, command, seed. `save`.resume is written after every epoch; resume=True goes on from it.
    """
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)  # order and augmentation; on the CPU, so every device sees the same images
    model = build_model(arch, len(data.classes))
    if init:
        model.load_state_dict(load_file(init, ("state_dict",), "a checkpoint")["state_dict"])
    model.to(device, memory_format=torch.channels_last)
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]  # BN affine and biases: no weight decay
    opt = torch.optim.SGD([{"params": decay, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}],
                          lr, momentum, nesterov=momentum > 0)
    steps = len(data.train) // batch_size
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs * steps, pct_start=warmup, cycle_momentum=False)
    state_file, first, acc, began = save.with_name(save.name + ".resume"), 0, math.nan, time.time()
    if resume and state_file.exists():
        s = load_file(state_file, ("model", "opt", "sched", "g", "epoch", "wall_s"), "a pretraining state")
        model.load_state_dict(s["model"]), opt.load_state_dict(s["opt"]), sched.load_state_dict(s["sched"])
        if log:
            log.t0 -= s["wall_s"]  # the time of all stretches together
        g.set_state(s["g"])
        first = s["epoch"] + 1
    if augment != "crop-flip":
        from torchvision.transforms import v2

        policy = v2.TrivialAugmentWide()
    for epoch in range(first, epochs):
        model.train()
        torch.manual_seed(seed + epoch)  # of dropout and TrivialAugment: an interrupted run goes on with the same draws
        t0, loss_sum, hits = time.time(), 0.0, 0
        for x, y in batches(data.train, batch_size, g, augment=True, drop_last=True):
            if augment != "crop-flip":
                x = torch.stack([policy(image) for image in x])
            if augment == "trivial-noise":
                sd = 255 * 0.15 * torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5)
                x = (x + sd * torch.randn(x.shape)).round_().clamp_(0, 255).to(torch.uint8)
            with autocast(device, amp):
                logits = model(to_input(x, data.mean, data.std, device))
            if not isinstance(logits, Tensor):
                logits = logits[0]  # torchvision's Inception and GoogLeNet add auxiliary heads while training
            loss = F.cross_entropy(logits.float(), y.to(device), label_smoothing=label_smoothing)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            sched.step()
            loss_sum += loss.item()
            hits += (logits.argmax(1).cpu() == y).sum().item()
        if not math.isfinite(loss_sum):
            raise InputError(f"the training loss became {loss_sum} in epoch {epoch}; lower --lr (now {lr})")
        train_s, n = time.time() - t0, steps * batch_size
        if (epoch + 1) % eval_every == 0 or epoch + 1 == epochs:
            acc = accuracy_pct(model.eval(), data, data.test, device)
        print(f"epoch {epoch + 1:3d}/{epochs} | loss {loss_sum / steps:.4f} | train {100 * hits / n:.2f} | "
              + (f"test {acc:.2f} | " if math.isfinite(acc) else "") + f"{n / train_s:.0f} img/s", flush=True)
        if log:
            log.write("eval", epoch=epoch + 1, loss=loss_sum / steps, acc_train_pct=100 * hits / n, acc_pct=acc,
                      img_per_s=n / train_s)
        save_atomic({"model": model.state_dict(), "opt": opt.state_dict(), "sched": sched.state_dict(),
                     "g": g.get_state(), "epoch": epoch, "wall_s": time.time() - (log.t0 if log else began)}, state_file)
    if first >= epochs:
        acc = accuracy_pct(model.eval(), data, data.test, device)
    state = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    save_atomic({"state_dict": state, "arch": arch, "dataset": data.name, "classes": data.classes, "mean": data.mean,
                 "std": data.std, "size": data.size, "acc_pct": acc, "command": command, "seed": seed}, save)
    state_file.unlink(missing_ok=True)
    return acc


def main_pretrain(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    data = load_data(args.dataset, args.data_dir)
    if data.train is None:
        raise InputError(f"--dataset {args.dataset}: has no train images; expected a train/ folder beside val/")
    try:  # a wrong name or size ends here, before anything is written
        build_model(args.arch, len(data.classes)).eval()(torch.zeros(1, 3, data.size, data.size))
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--arch {args.arch}: does not run on the {data.size} px images of {data.name} ({e})") from None
    if args.init:
        find_weights(args.arch, args.dataset, data, args.init, device)  # says what does not fit
    save = Path(args.save or ROOT / "weights" / f"{data.name}_{args.arch}.pt")
    out = check_out(Path(args.out or Path("runs") / "pretrain" / save.stem))
    check_out(save.parent)
    if len(data.train) < args.batch_size:
        raise InputError(f"--batch-size {args.batch_size}: {data.name} has only {len(data.train)} train images")
    out.mkdir(parents=True, exist_ok=True)
    log = RunLog(out, append=args.resume)
    log.start(args, device)
    amp = has_fast_bf16(device) if args.amp is None else args.amp
    acc = pretrain(args.arch, data, save, args.epochs, args.batch_size, args.lr, args.momentum, args.weight_decay,
                   args.warmup, args.label_smoothing, amp, args.seed, device, args.resume, log,
                   " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), augment=args.augment, init=args.init)
    log.write("end", acc_pct=acc, wall_s=time.time() - log.t0, peak_mib=peak_mib(), bytes=save.stat().st_size)
    print(f"{save}: {args.arch} on {data.name}, last epoch top-1 {acc:.2f} %")


def main_embed(args: argparse.Namespace) -> None:
    """Write data/fashion_mnist.npz: all test images, and the first 500 train images of each class in file order."""
    from torchvision import datasets

    check_out(Path(args.save).parent)
    try:
        train, test = (datasets.FashionMNIST(args.data_dir, train=t, download=True) for t in (True, False))
    except Exception as e:
        raise InputError(f"FashionMNIST is not in {args.data_dir}, and its download failed ({e})") from None
    keep = torch.cat([(train.targets == c).nonzero()[:args.per_class, 0] for c in range(10)]).sort().values
    np.savez_compressed(
        args.save, classes=np.array(train.classes), train_images=train.data[keep].numpy(), train_labels=train.targets[keep].numpy(),
        test_images=test.data.numpy(), test_labels=test.targets.numpy())
    print(f"{args.save}: {len(keep)} train and {len(test)} test images, {os.path.getsize(args.save) / 2**20:.1f} MiB")


# ===== Results table =================================================================================================


# Figures of `end` records that stand beside the accuracies.
COST_COLUMNS = {"drop_pct": "drop", "uploads_pct": "uploads %", "eta_backwards_pct": "eta learns from %", "trainable_params_step1": "step-1 params",
                "features_s": "F s", "step1_train_s": "step 1 s", "finetune_s": "finetune s"}


def results_table(script: str, results: Path = ROOT / "results") -> str:
    """Markdown: one row for each folder results/<script>_*, mean +- sample std over its logs, one log a seed.

    Accuracies are those of the `end` records, the last state. Everything in a row, the command too, is read from the logs.
    """
    rows = []
    for folder in sorted(results.glob(f"{script}_*")):
        starts, ends = [], []
        for log in sorted(folder.glob("*.jsonl")):
            records = [json.loads(line) for line in log.open()]
            starts.append([r for r in records if r["event"] == "start"][0])
            ends.append([r for r in records if r["event"] == "end"][-1])
            if {"acc_fp_pct", "acc_pct"} <= ends[-1].keys():
                ends[-1]["drop_pct"] = ends[-1]["acc_fp_pct"] - ends[-1]["acc_pct"]
        rows.append((folder.name, starts, ends))
    keys = dict.fromkeys(k for _, _, ends in rows for end in ends for k in end)
    columns = [k for k in keys if k.startswith("acc_")] + [k for k in keys if k in COST_COLUMNS]

    def cell(ends: list[dict], key: str) -> str:
        values = [end[key] for end in ends if end.get(key) is not None]
        if not values:
            return ""
        mean = np.mean(values)
        spread = f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 and np.std(values) > 0 else ""
        return (f"{mean:.2f}" if mean < 1000 else f"{mean:.0f}") + spread

    heads = ["**ours**" if k == "acc_pct" else COST_COLUMNS.get(k) or k.removeprefix("acc_").removesuffix("_pct").replace("_", " ")
             for k in columns]
    lines = ["| row | " + " | ".join(heads) + " | seeds | time | device | command |", "|---" * (len(heads) + 5) + "|"]
    for name, starts, ends in rows:
        command = re.sub(r" --(seed|out|resume|data-dir)\b( [^-]\S*)?", "", starts[0]["argv"])
        seconds = np.mean([end["wall_s"] for end in ends])
        device = f"{starts[0]['device']}, {starts[0]['threads']} threads"
        lines.append(f"| [{name.removeprefix(script + '_')}](results/{name}) | " + " | ".join(cell(ends, k) for k in columns)
                     + f" | {len(ends)} | {seconds:.0f} s | {device} | `{command}` |")
    return "\n".join(lines)


def finished_logs(folder: str, key: str, script: str) -> list[list[dict]]:
    """The logs in a folder, for --plot, one list of records a run. Raises InputError unless each `end` record has `key`."""
    logs = [[json.loads(line) for line in log.open()] for log in sorted(Path(folder).rglob("*.jsonl"))]
    if not logs:
        raise InputError(f"--plot {folder}: no .jsonl log in it")
    if not all(key in log[-1] for log in logs):
        raise InputError(f"--plot {folder}: not the logs of finished runs of {script}")
    return logs


def pyplot():
    """matplotlib.pyplot without a window. Raises InputError where matplotlib is not installed: only --plot needs it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    return plt


def main_table(args: argparse.Namespace) -> None:
    """Rewrite the tables between `<!-- table NAME -->` and `<!-- end -->` in the README."""
    text = args.readme.read_text()
    args.readme.write_text(with_tables(text))
    print(f"{args.readme}: {len(re.findall('<!-- table ', text))} tables")


def with_tables(text: str) -> str:
    return re.sub(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{results_table(m[2])}\n{m[3]}", text, flags=re.S)


# ===== Corruptions ===================================================================================================
# ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019), made on the fly. Parameters are the published ones; random
# numbers, frost and spatter are ours, so results are NOT comparable with numbers from the published files.

CORRUPTIONS = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
               "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression")
HELD_OUT = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # for tuning, never in a reported mean

# Severity 1 to 5 for CIFAR-10-C (sides below 100 px), then severity 1 to 5 for ImageNet-C.
SEVERITIES = {
    "gaussian_noise": ((.04, .06, .08, .09, .10), (.08, .12, .18, .26, .38)),  # standard deviation
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),  # photons of a white value
    "impulse_noise": ((.01, .02, .03, .05, .07), (.03, .06, .09, .17, .27)),  # share of values replaced
    "defocus_blur": (((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),  # disk radius, sigma of its soft edge; px
                     ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5))),
    "glass_blur": (((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)),  # sigma px, reach of a swap px, rounds
                   ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, sigma; px
                    ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01)),  # zooms 1, 1 + step, ... below the end
                  ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03))),
    "snow": (((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),  # of the flakes:
              (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)),  # mean, sd, zoom, threshold,
             ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),  # radius, sigma, x's share
              (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55))),
    "frost": (((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)),  # share of the image, share of the ice
              ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75))),
    "fog": (((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay of the roughness
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": ((.05, .1, .15, .2, .3), (.1, .2, .3, .4, .5)),  # added to HSV value
    "contrast": ((.75, .5, .4, .3, .15), (.4, .3, .2, .1, .05)),  # share of contrast kept
    "elastic_transform": (((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03)),  # alpha, sigma, affine;
                          ((2, .7, .1), (2, .08, .2), (.05, .01, .02), (.07, .01, .02), (.12, .01, .02))),  # 1 = 244 px of 224
    "pixelate": ((.95, .9, .85, .75, .65), (.6, .5, .4, .3, .25)),  # side of the small image
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),  # quality
    "speckle_noise": ((.06, .1, .12, .16, .2), (.15, .2, .35, .45, .6)),  # standard deviation at white
    "gaussian_blur": ((.4, .6, .7, .8, 1), (1, 2, 3, 4, 6)),  # sigma px
    "spatter": (((.03, .08, .3), (.03, .12, .35), (.03, .16, .4), (.03, .25, .9), (.03, .35, 1)),  # ours: drop size / side,
                ((.015, .08, .3), (.013, .12, .35), (.01, .16, .4), (.01, .25, .9), (.01, .35, 1))),  # share covered, opacity
    "saturate": (((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)),  # a, b: HSV saturation s -> a s + b
                 ((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2))),
}


def corrupt(x: Tensor, corruption: str, severity: int, index: Tensor, seed: int = 0) -> Tensor:
    """The images under a corruption of ImageNet-C.  uint8 (B, 3, S, S) -> uint8 (B, 3, S, S), on x's device.

    index (B,) numbers the images in their data set: image n gets the same corruption in every batch, because its random numbers
    depend on (seed, corruption, severity, n) alone. Severity is 1 to 5; 0 returns x.
    Raises InputError for an unknown corruption or severity.
    """
    if corruption not in SEVERITIES:
        near = difflib.get_close_matches(corruption, SEVERITIES, 3, 0)
        raise InputError(f"corruption '{corruption}': not known; nearest names: {', '.join(near)}")
    if severity not in range(6):
        raise InputError(f"severity {severity}: expected 0 (clean), 1, 2, 3, 4 or 5")
    if severity == 0:
        return x
    y = corrupted(x.float() / 255, corruption, severity, image_streams(index, x.device, corruption, severity, seed))
    # Round, but with the edge off exactly .5, where means of a few 8-bit values often lie: there the last bit of a sum decides,
    # which may depend on device and batch size (on our CPUs it did not).
    return (255 * y + 0.499).to(torch.uint8)


def image_streams(index: Tensor, device: torch.device, corruption: str, severity: int, seed: int):
    """each(draw) stacks draw(i, generator) over the images; image i's generator depends on (seed, corruption, severity, index[i])
    and on how many draws came before. Numbers are drawn on the CPU, so that every device sees the same."""
    g, calls = torch.Generator(), 0

    def each(draw) -> Tensor:
        nonlocal calls
        calls += 1
        start = np.random.SeedSequence((seed, severity, calls, *corruption.encode())).generate_state(1, np.uint64)[0]
        keys = np.asarray(index.tolist(), np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start  # an odd factor is one to one
        keys &= np.uint64(2**63 - 1)  # in the low 32 bits, too, which are all that torch's CPU generator reads of a seed
        return torch.stack([draw(i, g.manual_seed(key)) for i, key in enumerate(keys.tolist())]).to(device)

    return each


def corrupted(x: Tensor, corruption: str, severity: int, each) -> Tensor:
    """`corrupt` in floats.  x (B, 3, S, S) in [0, 1] -> the same; `each` draws random numbers image by image."""
    S = x.shape[-1]
    p = SEVERITIES[corruption][S >= 100][severity - 1]

    def normal(*shape: int) -> Tensor:
        return each(lambda i, g: torch.randn(shape, generator=g))  # (B, *shape)

    def uniform(*shape: int, lo: float = 0, hi: float = 1) -> Tensor:
        return lo + (hi - lo) * each(lambda i, g: torch.rand(shape, generator=g))

    match corruption:
        case "gaussian_noise":
            x = x + p * normal(3, S, S)
        case "shot_noise":
            rate = (p * x).cpu()
            x = each(lambda i, g: torch.poisson(rate[i], g)) / p
        case "impulse_noise":
            u = uniform(3, S, S)
            x = x.masked_fill(u < p / 2, 0).masked_fill(u > 1 - p / 2, 1)
        case "speckle_noise":
            x = x + p * x * normal(3, S, S)
        case "defocus_blur":
            x = disk_blur(x, *p)
        case "gaussian_blur":
            x = gaussian_blur(x, p)
        case "glass_blur":
            sigma, reach, rounds = p
            x = gaussian_blur(x, sigma)
            x = shuffle_locally(x, reach, rounds, uniform(rounds, 2, S, S))
            x = gaussian_blur(x, sigma)
        case "motion_blur":
            x = motion_blur(x, *p, uniform(lo=-45, hi=45))
        case "zoom_blur":
            end, step = p
            zooms = [1 + k * step for k in range(math.ceil((end - 1) / step - 1e-6))]
            x = (x + sum(zoom(x, z) for z in zooms)) / (len(zooms) + 1)
        case "snow":
            loc, scale, z, threshold, radius, sigma, keep = p
            flakes = zoom(loc + scale * normal(1, S, S), z)
            flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
            flakes = motion_blur(flakes, radius, sigma, uniform(lo=-135, hi=-45))
            x = keep * x + (1 - keep) * torch.maximum(x, 1.5 * grey(x) + 0.5)  # whitened, as under snow light
            x = x + flakes + flakes.rot90(2, (2, 3))
        case "frost":
            x = p[0] * x + p[1] * ice(uniform(3, side_of_2(S), side_of_2(S)), S)
        case "fog":
            c, decay = p
            top = x.amax((1, 2, 3), keepdim=True)
            # Published code draws wibble * U(-wibble, wibble) and divides wibble by `decay`: the amplitude falls by its square.
            fog = plasma(uniform(side_of_2(S), side_of_2(S), lo=-1), decay**2)[:, None, :S, :S]
            x = (x + c * fog) * top / (top + c)
        case "spatter":
            x = spatter(x, *p, mud=severity > 3, noise=normal(S, S))
        case "brightness":  # scaling RGB moves HSV value and nothing else; black has no hue: it becomes grey
            value = x.amax(1, keepdim=True)
            x = torch.where(value > 0, x / value.clamp_min(1e-6) * (value + p).clamp_max(1), p)
        case "contrast":
            mean = x.mean((2, 3), keepdim=True)
            x = (x - mean) * p + mean
        case "saturate":
            x = saturate(x, *p)
        case "elastic_transform":
            alpha, sigma, a = (v * S * (244 / 224 if S >= 100 else 1) for v in p)
            x = elastic(x, alpha, sigma, uniform(3, 2, lo=-a, hi=a), uniform(2, S, S, lo=-1))
        case "pixelate":
            # Pixels fall into int(c S) groups along each side; box-resizing down and up again is a mean over the group.
            group = ((torch.arange(S, device=x.device) + 0.5) * int(p * S) / S).long()
            same = (group[:, None] == group).float()
            A = same / same.sum(1, keepdim=True)
            x = A @ x @ A.T
        case "jpeg_compression":
            from torchvision import io
            images = (255 * x + 0.5).to(torch.uint8).cpu()
            x = torch.stack([io.decode_jpeg(io.encode_jpeg(image, p)) for image in images]).to(x.device) / 255
    return x.clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """Luma (ITU-R 601).  (B, 3, S, S) -> (B, 1, S, S)."""
    from torchvision.transforms.v2 import functional as v2
    return v2.rgb_to_grayscale(x)


def zoom(x: Tensor, z: float) -> Tensor:
    """Magnify by z >= 1 around the centre, bilinear.  (B, C, S, S) -> (B, C, S, S)."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as v2
    return x if z == 1 else v2.affine(x, 0, [0, 0], z, [0, 0], InterpolationMode.BILINEAR)


def side_of_2(S: int) -> int:
    """The power of two that holds S pixels."""
    return 2 ** math.ceil(math.log2(S))


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """G x G', rows of G a Gaussian cut at 4 sigma and mirrored at the borders.  (..., S, S) -> (..., S, S).

    Two products with an (S, S) matrix: for sigma = 6 px ten times as fast as a two-dimensional kernel, and sigma may exceed S.
    """
    S, r = x.shape[-1], int(4 * sigma + 0.5)
    k = torch.arange(-r, r + 1)
    w = torch.exp(-0.5 * (k / max(sigma, 1e-6)) ** 2)
    source = (torch.arange(S)[:, None] + k) % (2 * S)
    source = torch.minimum(source, 2 * S - 1 - source)  # c b a | a b c | c b a
    G = torch.zeros(S, S).scatter_add_(1, source, (w / w.sum()).expand(S, -1)).to(x.device)
    return G @ x @ G.T


def disk_blur(x: Tensor, radius: float, alias: float) -> Tensor:
    """Out of focus: the mean over a disk whose edge is softened by a Gaussian of sigma `alias`.  (B, C, S, S) -> the same."""
    from torchvision.transforms.v2 import functional as v2
    soft = 1 if radius <= 8 else 2
    r = math.floor(radius) + 2 * soft  # so wide that the soft edge does not meet the border, where it would be mirrored
    k = torch.arange(-r, r + 1)
    disk = (k[:, None] ** 2 + k**2 <= radius**2).float()
    disk = v2.gaussian_blur((disk / disk.sum())[None, None], [2 * soft + 1] * 2, [alias] * 2)
    disk, r, C = disk[..., soft:-soft, soft:-soft], r - soft, x.shape[1]
    return F.conv2d(F.pad(x, (r,) * 4, mode="reflect"), disk.to(x.device).expand(C, 1, -1, -1), groups=C)


def motion_blur(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Weighted mean of copies shifted by k = 0, 1, ..., 2 radius px along each image's direction, weights exp(-k^2 / 2 sigma^2).

    (B, C, S, S), degrees (B,) -> (B, C, S, S). One-sided, 2 radius + 1 taps on whole pixels, as ImageMagick's motion blur, with
    which the published files were made. Border pixels are repeated outwards.
    """
    (B, C, S, _), theta = x.shape, degrees.reshape(-1, 1) * math.pi / 180
    k = torch.arange(min(2 * radius, math.ceil(4 * sigma)) + 1, device=x.device)  # beyond 4 sigma nothing is left
    w = torch.exp(-0.5 * (k / sigma) ** 2)
    line = torch.arange(S, device=x.device)
    dx, dy = (k * theta.cos()).round().long(), (k * theta.sin()).round().long()  # (B, taps)
    out, flat = torch.zeros_like(x), x.flatten(2)
    for j, weight in enumerate((w / w.sum()).tolist()):
        rows, cols = ((line + d[:, j:j + 1]).clamp(0, S - 1) for d in (dy, dx))  # (B, S)
        at = (rows[:, :, None] * S + cols[:, None]).flatten(1)  # (B, S S)
        out += weight * flat.gather(2, at[:, None].expand(B, C, -1)).view_as(x)
    return out


def shuffle_locally(x: Tensor, reach: int, rounds: int, u: Tensor) -> Tensor:
    """`rounds` times, each pixel changes places with a random one at most `reach` px away.  u (B, rounds, 2, S, S) uniform.

    Pixels that are 2 reach + 1 apart cannot touch each other's neighbours, so they swap at the same time: real swaps, as in the
    published code, which however goes through the image pixel by pixel, from the last to the first.
    """
    B, C, S, _ = x.shape
    step = 2 * reach + 1
    at = torch.arange(S * S, device=x.device).repeat(B, 1)  # which pixel of x stands here
    move = (u * step).long().clamp_max(step - 1) - reach
    partner = torch.arange(S * S, device=x.device).view(S, S) + S * move[:, :, 0] + move[:, :, 1]  # (B, rounds, S, S)
    for n in range(rounds):
        for top in range(reach, 3 * reach + 1):
            for left in range(reach, 3 * reach + 1):
                here = torch.arange(S * S, device=x.device).view(S, S)[top:S - reach:step, left:S - reach:step].flatten()
                there = partner[:, n, top:S - reach:step, left:S - reach:step].flatten(1)
                moved = at.gather(1, there)
                at.scatter_(1, there, at[:, here])
                at[:, here] = moved
    return x.flatten(2).gather(2, at[:, None].expand(B, C, -1)).view_as(x)


def plasma(u: Tensor, decay: float) -> Tensor:
    """Diamond-square fractal, periodic, stretched to [0, 1].  u (B, N, N) uniform in [-1, 1], N a power of two -> (B, N, N).

    Each new point is the mean of its four neighbours plus u at this point, times an amplitude divided by `decay` at each halving.
    """
    z, step, amplitude = torch.zeros_like(u), u.shape[-1], 1.0
    while step > 1:
        h = step // 2
        corner = z[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        centre = (pair + pair.roll(-1, 2)) / 4 + amplitude * u[:, h::step, h::step]
        z[:, h::step, h::step] = centre
        z[:, h::step, ::step] = (pair + centre + centre.roll(1, 2)) / 4 + amplitude * u[:, h::step, ::step]
        z[:, ::step, h::step] = (corner + corner.roll(-1, 2) + centre + centre.roll(1, 1)) / 4 + amplitude * u[:, ::step, h::step]
        step, amplitude = h, amplitude / decay
    lo, hi = z.amin((1, 2), keepdim=True), z.amax((1, 2), keepdim=True)
    return (z - lo) / (hi - lo)


def ice(u: Tensor, S: int) -> Tensor:
    """Frost on a pane, ours: the published set blends in photographs, which we do not ship.  u (B, 3, N, N) -> (B, 3, S, S).

    Ferns are level lines of two rough plasmas, S / 32 each; they grow where a smooth plasma cloud is bright. In [0, 1].
    """
    cloud = plasma(2 * u[:, 0] - 1, 2.2)
    ferns = [(1 - (S / 16 * plasma(2 * u[:, k] - 1, 1.75) % 2 - 1).abs()) ** 3 for k in (1, 2)]  # 1 on a level line, thin
    frost = (0.15 + 0.5 * cloud + 0.8 * cloud * torch.maximum(*ferns)).clamp(0, 1)
    return frost[:, None, :S, :S] * torch.tensor([0.86, 0.94, 1.0], device=u.device).view(3, 1, 1)


def spatter(x: Tensor, size: float, share: float, opacity: float, mud: bool, noise: Tensor) -> Tensor:
    """Drops of water or mud, ours: where smooth noise exceeds the threshold that leaves `share` of the image.

    (B, 3, S, S), size in image sides, noise (B, S, S) normal -> (B, 3, S, S). Mud hides what is below, water lightens it.
    """
    size = size * x.shape[-1]
    smooth = gaussian_blur(noise, size) + 2 * gaussian_blur(noise, 3 * size)  # two scales: drops of many sizes, in groups
    smooth = (smooth - smooth.mean((1, 2), keepdim=True)) / smooth.std((1, 2), keepdim=True)
    depth = smooth - math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * share)).item()  # in standard deviations, > 0 inside drops
    colour = torch.tensor([0.40, 0.26, 0.13] if mud else [0.69, 0.93, 0.93], device=x.device).view(3, 1, 1)
    alpha = opacity * (depth[:, None] / 0.3).clamp(0, 1)  # the last 0.3 sd are a soft rim
    return x * (1 - alpha) + alpha * colour


def saturate(x: Tensor, a: float, b: float) -> Tensor:
    """HSV saturation s -> a s + b, hue and value fixed.  (B, 3, S, S) -> the same. Grey has hue 0: with b > 0 it turns red."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    s = (value - low) / value.clamp_min(1e-6)
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device).view(3, 1, 1)
    depth = torch.where(value > low, (value - x) / (value - low).clamp_min(1e-6), red)  # 0 for the top channel, 1 for the lowest
    return value * (1 - depth * (a * s + b).clamp(0, 1))


def elastic(x: Tensor, alpha: float, sigma: float, shift: Tensor, u: Tensor) -> Tensor:
    """An affine map that moves three points by `shift`, then a displacement alpha * gaussian_blur(u, sigma); all in px.

    (B, 3, S, S), shift (B, 3, 2), u (B, 2, S, S) uniform in [-1, 1] -> (B, 3, S, S). Both maps are composed and sampled once.
    """
    S = x.shape[-1]
    c, d = S // 2, S // 3
    points = torch.tensor([[c + d, c + d], [c + d, c - d], [c - d, c - d]], dtype=torch.float, device=x.device)
    one = torch.ones_like(shift[:, :, :1])
    back = torch.linalg.solve(torch.cat([points + shift, one], 2), points.expand_as(shift))  # (B, 3, 2): [x y 1] @ back
    grid = torch.arange(S, dtype=torch.float, device=x.device)
    at = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)  # (S, S, 2), pixel (x, y)
    if alpha:
        at = at + alpha * gaussian_blur(u, sigma).movedim(1, -1)
    at = F.pad(at.expand(len(x), S, S, 2), (0, 1), value=1.0).flatten(1, 2) @ back  # (B, S S, 2)
    return F.grid_sample(x, ((2 * at + 1) / S - 1).view(-1, S, S, 2), padding_mode="reflection", align_corners=False)


# ===== Command line ==================================================================================================


def build_parser() -> argparse.ArgumentParser:
    p = Parser(prog="common.py", description=__doc__)
    sub = p.add_subparsers(required=True, metavar="COMMAND")

    t = sub.add_parser("pretrain", help="train a full-precision network")
    t.set_defaults(main=main_pretrain)
    t.add_argument("--arch", default="resnet20", help="resnet8/14/20/32/44/56/110, with a width as in resnet20x2, or a torchvision name")
    t.add_argument("--dataset", default="fashion", help="fashion, fashion-mnist, cifar10, cifar100, imagenet, an ImageFolder, a .npz")
    t.add_argument("--data-dir", default="data", help="where cifar, imagenet and fashion-mnist lie or are downloaded to")
    t.add_argument("--save", default=None, help="checkpoint to write; None: weights/<dataset>_<arch>.pt")
    t.add_argument("--out", default=None, help="folder for log.jsonl; None: runs/pretrain/<dataset>_<arch>")
    t.add_argument("--epochs", type=number(int, 1), default=30, help="passes over the train images")
    t.add_argument("--batch-size", type=number(int, 1), default=128, help="images a step")
    t.add_argument("--lr", type=number(float, 0), default=0.1, help="peak learning rate of the one-cycle schedule")
    t.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="Nesterov momentum")
    t.add_argument("--weight-decay", type=number(float, 0), default=5e-4, help="on convolution and linear weights only")
    t.add_argument("--warmup", type=number(float, 0, 1), default=0.2, help="share of the steps in which the learning rate rises")
    t.add_argument("--label-smoothing", type=number(float, 0, 1), default=0.0,
                   help="0.1 may add a few tenths; it also keeps every prediction's entropy up, and CEMA reads entropies")
    t.add_argument("--augment", default="crop-flip", choices=["crop-flip", "trivial", "trivial-noise"],
                   help="trivial: TrivialAugment after crop and flip; slower to learn, far better under corruption. -noise: and Gaussian noise")
    t.add_argument("--init", default=None, help="checkpoint of the same --arch and classes to start from; None: random weights")
    t.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None, help="bf16 autocast; None: where the hardware has it")
    t.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="initialisation, order and augmentation")
    t.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    t.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on after the last finished epoch")

    e = sub.add_parser("embed", help="make data/fashion_mnist.npz from the full set")
    e.set_defaults(main=main_embed)
    e.add_argument("--data-dir", default="data", help="where torchvision finds, or downloads, FashionMNIST")
    e.add_argument("--per-class", type=number(int, 1), default=500, help="train images kept of each class")
    e.add_argument("--save", default="data/fashion_mnist.npz", help="file to write")

    r = sub.add_parser("table", help="write the README's results tables from the logs in results/")
    r.set_defaults(main=main_table)
    r.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to rewrite")
    return p


if __name__ == "__main__":
    run(lambda args: args.main(args), build_parser().parse_args)
