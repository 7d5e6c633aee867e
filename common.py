"""What the three scripts share and no paper talks about. Copy this file along with any of them.

It needs torch, torchvision, numpy and tqdm. From top to bottom:

    errors and machine      one-line user errors, device, mixed precision
    several processes       what torchrun starts: their mean, what each found, a share of the images
    hyperparameters         flags as a namespace for importers, one optimizer step
    networks                CIFAR-style ResNets, every torchvision classifier, yours from a file
    data                    what a data set is, batches of it, augmentation; tools/data.py reads them
    weights                 files written in one go, and read; tools/weights.py finds a network's
    BatchNorm and entropy   batch moments with a fast gradient; H(x)
    fake quantization       the quantizer, its EMA, bit packing
    evaluation and logs     top-1, one flat JSON object a line, a progress bar
    state                   what a checkpoint holds, and the way back
"""

import argparse
import copy
import datetime
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import platform
import re
import subprocess
import sys
import time
import warnings
import zlib
from collections import deque
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent

# On Linux torch then keeps large tensors in large pages, with fewer faults: an EfficientNet-Lite0 on 96
# images of 224 px is 1.8 times as fast on a CPU core. At 32 px it makes no difference.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# ===== Errors and machine ============================================================================


class InputError(ValueError):
    """A user's mistake: what is wrong, what was expected, what to do. One line and exit code 2."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every help text, the docstring as it stands."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors: one line, without the usage text above it."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


def number(kind: type, lo: float = -math.inf, hi: float = math.inf, word: str = ""):
    """An argparse type: a finite int or float in [lo, hi], or the word."""
    above = f" of at least {lo}" if math.isfinite(lo) else ""
    bounds = f" from {lo} to {hi}" if math.isfinite(hi) else above
    expected = f"expected {'an integer' if kind is int else 'a number'}{bounds}"
    expected += f", or {word}" * bool(word)

    def parse(text: str):
        if text and text == word:
            return word
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}': {expected}") from None
        if not (lo <= value <= hi and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text}: {expected}")
        return value
    return parse


def reason(e: Exception) -> str:
    """What an exception says, in one line; an assert may say nothing."""
    return " ".join(str(e).split())[:200]


TROUBLE = {"out of memory|not enough memory|OutOfMemory|MemoryError|allocate|ALLOC_FAILED|overflowed":
           "not enough memory: lower --batch-size, or take a smaller network",
           "PytorchStreamWriter|inline_container": "a file cannot be written: is the disk full?"}


def run(main, parse, argv: list[str] | None = None) -> None:
    """main(parse(argv)), with a user's mistake turned into one line on stderr and exit code 2."""
    prog = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *where, **more: f"note: {message}\n"
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know the letters of a folder's name
        getattr(stream, "reconfigure", dict)(errors="replace")
    rank = int(os.environ["RANK"]) if by_torchrun() else 0
    args = None
    try:
        args = parse(argv)
        Workers.count = getattr(args, "workers", None)
        main(args)
        if rank_and_world()[1] > 1:
            dist.barrier()  # torchrun ends all where one fails, at its exit, too: first all are through
    except (InputError, OSError) as e:  # an OSError: a full disk, a folder that cannot be written
        time.sleep(10 * (rank > 0))  # torchrun ends the others once the first has said it
        text = re.sub(r"(?s)Caught InputError in DataLoader.*InputError: ", "", str(e))  # a worker's
        sys.stderr.write(f"{prog}: error: {' '.join(text.split())}\n")
        sys.exit(2)
    except (RuntimeError, MemoryError) as e:  # torch's, which do not say what to do
        why = next((why for words, why in TROUBLE.items() if re.search(words, f"{e!r}")), None)
        if why is None:
            raise
        sys.stderr.write(f"{prog}: error: {why} ({' '.join(str(e).split())[:120]})\n")
        sys.exit(2)
    except KeyboardInterrupt:
        how = "; where a checkpoint was written, the same command with --resume goes on from it"
        sys.stderr.write(f"\n{prog}: interrupted{how * hasattr(args, 'resume')}\n")
        sys.exit(130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def each_seed(main):
    """`main` for each of --seeds, one run after the other, in <out>/seed0, <out>/seed1, ..."""
    def mains(args: argparse.Namespace) -> None:
        for n, seed in enumerate(args.seeds or [args.seed]):
            if args.seeds:
                print(f"seed {seed}, run {n + 1} of {len(args.seeds)}", flush=True)
            out = f"{args.out}/seed{seed}" if args.out and args.seeds else args.out
            try:
                main(argparse.Namespace(**vars(args) | {"seed": seed, "seeds": None, "out": out}))
            except SystemExit as e:  # --resume found this one finished; the next may not be
                if e.code:
                    raise
    return mains


def pick_device(name: str = "auto", several: bool = False) -> torch.device:
    """`auto` is CUDA, else MPS, else CPU. Raises InputError for a device that is not there.

    Under torchrun a program that knows of `several` processes becomes one of them, on its own GPU.
    """
    processes = int(os.environ["WORLD_SIZE"]) if by_torchrun() else 1
    if processes > 1 and not several:
        raise InputError(f"torchrun started {processes} processes; this program runs as one")
    if name in ("auto", "cuda") and processes > 1 and torch.cuda.is_available():
        torch.cuda.set_device(name := f"cuda:{os.environ['LOCAL_RANK']}")
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(1, device=name)
        if processes > 1:
            join("nccl" if name.startswith("cuda") else "gloo")
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        why = reason(e)
        raise InputError(f"--device {name}: not usable here ({why}); try --device auto") from None


def device_name(device: torch.device) -> str:
    is_cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if is_cuda else f"{device.type} ({platform.machine()})"


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 is computed in hardware. Emulated, it is several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    caps = getattr(torch.cpu, "get_capabilities", dict)()
    older_torch = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    kinds = ("avx512_bf16", "amx_bf16", "bf16")
    return device.type == "cpu" and (any(caps.get(k) for k in kinds) or bool(older_torch()))


def autocast(device: torch.device, on: bool | None):
    """bf16 autocast; weights stay fp32. On two Zen 4 cores gdfq.py makes 1.3 times the images/s with it.

    Accuracy is equal within noise: at W3A3 91.2 % against 91.3 % (results/gdfq/trials/amp-miniature).
    """
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


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"


@contextmanager
def seeded(seed: int):
    """Within it torch's CPU generator starts from the seed; after it, it is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset a GPU's for good
        yield


def tool(name: str):
    """The module tools/<name>.py, late: importers of a class need none. InputError: it is not there."""
    try:
        return importlib.import_module(f"tools.{name}")
    except ImportError as e:
        raise InputError(f"no tools/{name}.py ({e}): copy tools/ along") from None


# ===== Several processes ==============================================================================
#
# torchrun starts N of them, each with its own noise, images or seeds. The first prints and writes.


def by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def join(backend: str) -> None:
    """Becomes one of torchrun's processes. If one dies, torchrun ends the others; if one hangs, they end
    after six hours: so long may one train on its seed or corruption when the others have done theirs.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


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


def shard(split):
    """Every N-th item of a split, from this process's number on."""
    rank, world = rank_and_world()
    if world == 1:
        return split
    if isinstance(split, TensorDataset):
        return TensorDataset(*(t[rank::world] for t in split.tensors))
    return torch.utils.data.Subset(split, range(rank, len(split), world))


# ===== Hyperparameters ===============================================================================


def defaults(build_parser, hp: argparse.Namespace | None = None, **changes) -> argparse.Namespace:
    """hp, or else the flags' defaults, with changes: hyperparameters for those who import a class.

    Raises TypeError for a name that is no flag, InputError for a value that the flag would refuse.
    """
    parser = build_parser()
    flags = {action.dest: action for action in parser._actions if action.dest != "help"}
    if unknown := changes.keys() - flags.keys():
        raise TypeError(f"not a flag of {parser.prog}: {', '.join(sorted(unknown))}")
    if "recipe" in changes:  # it changes the defaults of `parse`, where an explicit flag still wins
        raise TypeError("recipe: no keyword; unpack one of RECIPES, as in **RECIPES[name]")
    for name, value in changes.items():
        switch = isinstance(flags[name], argparse.BooleanOptionalAction)
        if value is not None and switch != isinstance(value, bool):
            expected = "True or False" if switch else f"what --{name.replace('_', '-')} takes"
            raise InputError(f"{name} {value!r}: expected {expected}")
        many, is_list = flags[name].nargs in ("*", "+", 2), isinstance(value, (list, tuple))
        if many != is_list:
            raise InputError(f"{name} {value}: expected {'a list' if many else 'one value'}")
        try:
            for v in value if many else [value]:
                if v is not None and not isinstance(v, bool):  # None: "as the flag left out"
                    parser._check_value(flags[name], parser._get_value(flags[name], str(v)))
        except argparse.ArgumentError as e:
            raise InputError(str(e)) from None
        if isinstance(value, str) and flags[name].type:
            changes[name] = flags[name].type(value)
    return argparse.Namespace(**vars(hp or parser.parse_args([])) | changes)


def descend(opt: torch.optim.Optimizer, loss: Tensor, what: str, flag: str, clip: float = 0.0,
            together: bool = False) -> None:
    """One optimizer step, gradient norm cut to `clip` (0: not at all); of the mean of all processes'
    gradients, if `together`.

    NaN stops the run here, before it reaches a weight or a checkpoint; InputError names the flag.
    """
    opt.zero_grad(set_to_none=True)
    loss.backward()
    params = [p for group in opt.param_groups for p in group["params"]]
    if together:
        average([p.grad for p in params if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(params, clip or math.inf).item()
    if not (math.isfinite(loss.item()) and math.isfinite(norm)):
        advice = f"lower {flag}" if opt.state else "before any step: look at the images and the weights"
        raise InputError(f"{what} is {loss.item()}, its gradient norm {norm}; {advice}")
    opt.step()


def one_cycle(opt: torch.optim.Optimizer, lr: float, steps: int, warmup: float):
    """The rate rises from lr / 25 for a share `warmup` of the steps, then falls to nothing; cosines."""
    steps = max(2, steps)
    if warmup * steps in (1, steps):  # torch divides by the length of a phase, which here would be 0
        warmup *= 1 - 1e-6
    return torch.optim.lr_scheduler.OneCycleLR(opt, max(lr, 1e-12), steps, pct_start=warmup,
                                               cycle_momentum=False)


@torch.no_grad()
def check_network(model: nn.Module, example: Tensor, num_classes: int | None = None) -> int:
    """How many classes a network knows, by one forward of `example` (B, ...). Raises InputError where it
    does not run, or answers anything but logits (B, num_classes) that are numbers.
    """
    about = f"{type(model).__name__} on {example.dtype} {tuple(example.shape)}"
    try:
        try:
            out = model(example)
        except RuntimeError as e:  # x.view(B, -1), as in tutorials, wants the other memory format
            if "view size is not compatible" not in str(e):
                raise
            for m in model.to(memory_format=torch.contiguous_format).modules():
                if isinstance(m, nn.Conv2d):
                    m.register_forward_pre_hook(lambda m, inputs: inputs[0].contiguous())
            out = model(example)
    except Exception as e:  # whatever a forward can raise: its own words are the true reason
        raise InputError(f"{about}: {type(e).__name__}: {reason(e)}") from None
    if not isinstance(out, Tensor) or out.ndim != 2 or num_classes not in (None, out.shape[1]):
        shape = tuple(out.shape) if isinstance(out, Tensor) else ""
        raise InputError(f"{about}: answers a {type(out).__name__} {shape}; expected logits "
                         f"({len(example)}, {num_classes or 'classes'})")
    if out.isnan().any():
        raise InputError(f"{about}: answers NaN; are its weights whole?")
    return out.shape[1]


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy. Raises InputError for what cannot be copied, as a network under weight_norm."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, ValueError) as e:
        raise InputError(f"{type(model).__name__} cannot be copied: {reason(e)}") from None


# ===== Networks ======================================================================================


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


CIFAR_ARCH = re.compile(r"resnet(8|14|20|32|44|56|110)(?:x([1-9]\d*))?")


def build_model(arch: str, num_classes: int, weights: str = "", flag: str = "--arch") -> nn.Module:
    """A classifier by name: `resnet20`, `resnet20x2` (twice as wide), any torchvision one, or yours.

    `weights="DEFAULT"` loads torchvision's own. Yours is FILE.py:NAME or package.module:NAME, a function
    of num_classes, or of nothing, that returns an nn.Module, whose attributes size, mean and std, if it
    has them, say which images it expects. Raises InputError, naming the flag, where there is none.
    """
    if ":" in arch:
        return own_network(arch, num_classes, flag)
    if m := CIFAR_ARCH.fullmatch(arch):
        return CifarResNet(int(m[1]), num_classes, int(m[2] or 1))
    import torchvision  # late: half a second that --help need not pay

    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        ours = ["resnet20", "resnet20x2", "resnet32", "resnet44", "resnet56"]
        near = ", ".join(difflib.get_close_matches(arch, [*ours, *known], 3, 0))
        raise InputError(f"{flag} {arch}: no such network; nearest names: {near}")
    kwargs = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    if not weights:
        return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **kwargs)
    try:
        net = torchvision.models.get_model(arch, weights=weights)
        of = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
        net.mean, net.std = of.mean, of.std  # efficientnet_v2_l has its own
        return net
    except Exception as e:  # URLError, a proxy's answer, a full disk
        raise InputError(f"torchvision's weights for {arch} cannot be had ({e}); name a file") from None


def own_network(arch: str, num_classes: int, flag: str) -> nn.Module:
    """build_model for FILE.py:NAME and package.module:NAME. The file is run."""
    where, _, name = arch.rpartition(":")
    is_file = where.endswith(".py")
    sys.path.insert(0, str(Path(where).resolve().parent if is_file else Path.cwd()))  # what it imports
    try:
        if is_file:  # by its path: another module may have its name
            spec = importlib.util.spec_from_file_location(where, where)
            sys.modules[where] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        make = getattr(module, name)
        net = make(num_classes) if inspect.signature(make).parameters else make()
    except Exception as e:  # no such file, or whatever its code can raise
        raise InputError(f"{flag} {arch}: {type(e).__name__}: {reason(e)}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(net, nn.Module):
        raise InputError(f"{flag} {arch}: gives a {type(net).__name__}; expected an nn.Module")
    return net


def short_name(arch: str) -> str:
    """What a file or folder calls a network: my_net.py:make_net is my_net-make_net."""
    where, _, name = arch.rpartition(":")
    return f"{Path(where).stem}-{name}" if where else arch


# ===== Data ==========================================================================================


class Data(NamedTuple):
    """A classification set. A split: a TensorDataset of uint8 (N, 3, S, S), an ImageFolder, or None."""

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


def load_data(dataset: str, data_dir: str = "data", size: int | None = None) -> Data:
    """A data set by its name, a folder or a .npz, see tools/data.py. InputError: it cannot be read."""
    return tool("data").load(dataset, data_dir, size)


def labels_of(split) -> Tensor:
    """The labels of a split, (N,) int64."""
    return split.tensors[1] if isinstance(split, TensorDataset) else torch.as_tensor(split.targets)


def batches(split, batch_size: int, generator: torch.Generator | None = None, augment: bool = False,
            drop_last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over a split: uint8 images (B, 3, S, S) and int64 labels (B,), on the CPU.

    A generator shuffles. `augment` shifts by up to S/8 pixels and flips, each image on its own.
    """
    if isinstance(split, TensorDataset):
        images, labels = split.tensors
        n = len(labels)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
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
    """A DataLoader of images that lie on disk. Workers decode them ahead of the network, several batches
    each; where there is a GPU, into memory that it can copy from while it computes.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun's processes, who share the cores
    usual = min(8, max(1, (os.cpu_count() or 1) // here))
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


# ===== Weights =======================================================================================


def save_atomic(obj: dict, path: Path, save=torch.save) -> None:
    """Save beside the target, then rename: a reader sees the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(obj, tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)  # a full disk leaves nothing behind


def load_file(path: str | Path, keys: tuple[str, ...], what: str) -> dict:
    """torch.load with weights_only=True, and one clear line for all that can be wrong with a file."""
    try:
        obj = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {what}") from None
    except pickle.UnpicklingError:  # never executed: a whole model, an argparse.Namespace, a text file
        raise InputError(f"{path}: not {what}, or not of tensors alone; save a state_dict") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; expected {what}") from None
    except Exception as e:  # half a zip: which one depends on where it ends
        raise InputError(f"{path}: cannot be read as {what} ({type(e).__name__}); truncated?") from None
    lacks = ["a state_dict"] if not isinstance(obj, dict) else [k for k in keys if k not in obj]
    if lacks:
        raise InputError(f"{path}: not {what}; it lacks {', '.join(lacks)}")
    return obj


def load_network(file: Path, arch: str | None, num_classes: int | None = None,
                 flag: str = "--arch") -> tuple[nn.Module, dict]:
    """A network in eval mode from a checkpoint or a bare state_dict, and what the file says of itself.

    None: what the file says, else 1000 classes. Raises InputError for what does not fit.
    """
    return tool("weights").load_network(file, arch, num_classes, flag)


def find_weights(arch: str, dataset: str, data: Data, weights: str | None, device: torch.device,
                 flag: str = "--arch") -> tuple[nn.Module, Data, str]:
    """The full-precision network, the data with its normalisation, a line on its origin: see there."""
    return tool("weights").find(arch, dataset, data, weights, device, flag)


# ===== BatchNorm and entropy =========================================================================


class BatchMoments(torch.autograd.Function):
    """mu_c, var_c of x over all but the channel axis, biased.  (B, C, ...) -> (C,), (C,), fp32.

    d mu/dx = 1/n and d var/dx = 2 (x - mu) / n, so backward is one fused multiply-add. Forward is
    F.batch_norm's own pass, asked for its running statistics: momentum 1 leaves this batch's in them.
    Its output is thrown away, and still it takes an eighth of torch.var_mean's time on a CPU in bf16.
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


def entropy(logits: Tensor) -> Tensor:
    """H(x) = -sum_c p_c ln p_c, p = softmax(logits).  (B, C) -> (B,), nats, in [0, ln C]."""
    log_p = log_softmax(logits)
    return -(log_p.exp() * log_p).sum(1)


def log_softmax(logits: Tensor) -> Tensor:
    """ln softmax, the least finite number in the place of -inf: a masked class counts 0 ln 0 = 0."""
    return F.log_softmax(logits, 1).clamp_min(torch.finfo(logits.dtype).min)


# ===== Fake quantization =============================================================================
#
# Uniform affine quantization, zero exactly representable. With bits k and a range [a, b] that holds 0:
#
#     s = (b - a) / (2^k - 1)        step, per tensor or per output channel
#     z = round(a / s)               the code of `a`, counted from zero: an integer in [-(2^k - 1), 0]
#     q = clamp(round(x / s) - z, 0, 2^k - 1)            what an integer machine stores
#     x_hat = s * (q + z)                                what a float machine computes with


def step_and_zero(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(s, z) of the range [lo, hi], any shape. The range is widened to hold 0.

    Without that a channel whose weights are all positive gets a zero point no integer format holds, and
    padding and pruned weights are no longer exactly 0.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    s = (hi - lo) / (2**bits - 1)
    s = s.clamp_min(torch.finfo(lo.dtype).tiny * 2**20)  # an all-zero channel has s > 0, too
    return s, torch.round(lo / s)


class FakeQuant(torch.autograd.Function):
    """x -> x_hat with the straight-through gradient: 1 where x is inside the range, 0 where clamped.

    One Function keeps one tensor for backward, a chain of differentiable ops four. The passes are chosen
    for a CPU: there clamp with tensor bounds takes nine times as long on bf16, a comparison four times.
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
        # grad * (0 <= code <= max) in one pass; hardtanh's bounds are strict, and codes are integers
        return torch.ops.aten.hardtanh_backward(grad, code, -0.5, ctx.max + 0.5), None, None, None


def fake_quant(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize x with the range [lo, hi], which broadcasts against x."""
    s, z = step_and_zero(lo, hi, bits)
    return FakeQuant.apply(x, s, z, bits)


def channel_range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Min and max of each output channel of a weight (C_out, ...), to broadcast: (C_out, 1, ...)."""
    dims = tuple(range(1, w.ndim))
    return w.detach().amin(dims, keepdim=True), w.detach().amax(dims, keepdim=True)


class EMA:
    """Debiased moving average:  m_t = rho m_{t-1} + (1 - rho) x_t,   value = m_t / (1 - rho^t).

    The average of a constant is that constant from the first value on. Published GDFQ code feeds the
    debiased value back into m; its range is up to 3,900 times too wide around step 20.
    """

    def __init__(self, momentum: float):
        self.momentum, self.m, self.weight = momentum, 0.0, 0.0

    def update(self, x: Tensor) -> Tensor:
        self.m = self.momentum * self.m + (1 - self.momentum) * x
        self.weight = self.momentum * self.weight + (1 - self.momentum)
        return self.m / self.weight


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits -> flat uint8, ceil(n bits / 8) bytes, most significant bit first."""
    places = torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=q.device)
    b = (q.flatten()[:, None] >> places) & 1  # (n, bits)
    return torch.from_numpy(np.packbits(b.cpu().numpy()))


# ===== Evaluation and logs ===========================================================================


@torch.no_grad()
def accuracy_pct(model: nn.Module, data: Data, split, device, batch_size: int | None = None,
                 together: bool = False) -> float:
    """Top-1 in percent over a whole split, in eval mode and fp32 (no TF32). together: each process takes
    its share, and all get the result.
    """
    batch_size = batch_size or (250 if data.size <= 64 else 50)
    torch.backends.cudnn.allow_tf32 = False
    training, hits, total = [m for m in model.modules() if m.training], 0, 0
    model.eval()
    for x, y in batches(shard(split) if together else split, batch_size):
        hits += (model(to_input(x, data.mean, data.std, device)).argmax(1).cpu() == y).sum().item()
        total += len(y)
    for m in training:
        m.training = True
    hits, total = map(sum, zip(*gather((hits, total)))) if together else (hits, total)
    return 100 * hits / total


def read_log(path: Path) -> list[dict]:
    """The records of a log; half a last line, as a killed run leaves it, is no record."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or "event" not in record:
            break
        records.append(record)
    return records


def is_finished(log: Path) -> bool:
    return log.exists() and any(r.get("event") == "end" for r in read_log(log)[-1:])


def lock(file) -> None:
    """One process a folder, as long as that lives. Raises InputError in the second one."""
    try:
        import fcntl  # not on Windows, which locks open files itself
    except ImportError:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # any other error: a file system without locks
        raise InputError(f"{file.name}: another process is writing it; name another --out") from None
    except OSError:
        pass


class RunLog:
    """`log.jsonl`: one flat JSON object a line; `event` is start, step, eval or end.

    resumed_at > 0: records after that iteration go, since they will come again; new ones are appended.
    alone: the folder is this process's, whatever torchrun's others do.
    """

    def __init__(self, out: Path, resumed_at: int = 0, alone: bool = False):
        out.mkdir(parents=True, exist_ok=True)
        self.t0, self.final = time.time(), out / "log.jsonl"
        # Of several processes the first one writes, once all know at which iteration they go on.
        if not alone and len(set(gather(resumed_at))) > 1:
            raise InputError(f"{out}: checkpoints of different iterations; start anew, without --resume")
        if not alone and rank_and_world()[0]:
            self.path, self.file = self.final, open(os.devnull, "w")
            return
        # The log of a finished run stays until this one has finished, too.
        self.path = out / "log.jsonl.new" if is_finished(self.final) else self.final
        kept = read_log(self.path) if resumed_at and self.path.exists() else []
        self.file = self.path.open("a")
        lock(self.file)
        self.file.truncate(0)
        if not resumed_at:  # or --resume would take up the run before this one
            for file in out.glob("checkpoint*.pt"):
                file.unlink()
        for r in kept:
            if r.get("iteration", 0) <= resumed_at:
                self.write(**r)

    def seconds(self) -> float:
        return time.time() - self.t0

    def write(self, event: str, **fields) -> None:
        self.file.write(json.dumps({"event": event, **fields}) + "\n")
        self.file.flush()
        if event == "end" and self.path != self.final:
            self.path = self.path.replace(self.final)

    def start(self, args: argparse.Namespace, device: torch.device) -> None:
        """What is needed to run this again: command, arguments, commit, versions, device, threads."""
        describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        try:
            done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, timeout=5)
            commit = done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            commit = ""
        self.write("start", argv=command(), args=flat(args), commit=commit, torch=torch.__version__,
                   python=platform.python_version(), device=device_name(device),
                   threads=torch.get_num_threads(), time=time.strftime("%Y-%m-%d %H:%M:%S"))


def command() -> str:
    """The command line of this process, as one would type it in the repository."""
    script = Path(sys.argv[0])
    folder = "tools/" if script.resolve().parent == ROOT / "tools" else ""
    return " ".join(["python", folder + script.name, *sys.argv[1:]])


class Progress:
    """`for i in progress: ...`. A tqdm bar on a terminal; elsewhere a line every `every_s` seconds."""

    def __init__(self, first: int, total: int, every_s: float = 15.0):
        self.first, self.total, self.every_s = first, total, every_s
        self.t0 = time.time()
        self.last = self.t0 - every_s + 3  # the first line soon: it says how long all will take
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
        self.bar = tqdm(initial=first, total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True,
                        bar_format=form)

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


def default_out(script: str, name: str, args, usual: argparse.Namespace, told: str) -> Path:
    """runs/<script>/<name>_<flag>-<value>..: flags away from the `usual` that the name does not tell."""
    for k, v in flat(args).items():
        if k not in (*NO_MATTER, "amp", "data_dir", *told.split()) and v != getattr(usual, k, None):
            text = "+".join(Path(str(part)).name for part in (v if isinstance(v, list) else [v]))
            name += f"_{k.replace('_', '-')}-{text}"
    if len(name) > 150:
        name = f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    out = Path("runs", script, name)
    return out / f"seed{args.seed}" if hasattr(args, "seed") else out


def check_out(path: Path, args=None, checkpoint: Path | None = None) -> Path:
    """Raises InputError where a folder cannot be made, or holds a run of other flags; makes none, lest a
    later mistake leave it. Ends the program where --resume has nothing to do. args: the flags.
    """
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "read-only" if parent.is_dir() else "a file"
        raise InputError(f"{path}: cannot be written, since {parent} is {why}; name another")
    log = path / "log.jsonl"
    if args is not None and log.exists():
        records = read_log(log)
        if not records and log.stat().st_size:
            raise InputError(f"{log}: is the log of another program; name another --out")
        then = next((r.get("args", {}) for r in records if r["event"] == "start"), {})
        same_flags(args, then, f"{path}: holds a run", "name another --out, or delete it")
        going = (checkpoint or path / "checkpoint.pt").exists()
        if getattr(args, "resume", False) and is_finished(log) and not going:
            print(f"{path}: this run is finished; without --resume it starts anew")
            sys.exit(0)
    return path


# ===== State =========================================================================================


def flat(args: argparse.Namespace) -> dict:
    return {k: v for k, v in vars(args).items() if not callable(v)}


def state_of(x):
    """Everything a checkpoint needs of x; an object of ours names its attributes in STATE."""
    if hasattr(x, "STATE"):
        return {k: state_of(getattr(x, k)) for k in x.STATE}
    if isinstance(x, torch.Generator):
        return x.get_state()
    if hasattr(x, "state_dict"):
        return x.state_dict()
    if isinstance(x, Tensor):
        return x.clone()  # of a view only what it shows
    return [state_of(v) for v in x] if isinstance(x, (list, deque)) else x


def restored(x, state):
    """x as it was when `state = state_of(x)`."""
    if hasattr(x, "STATE"):
        for k in x.STATE:
            setattr(x, k, restored(getattr(x, k), state[k]))
    elif isinstance(x, torch.Generator):
        x.set_state(state)
    elif hasattr(x, "load_state_dict"):
        x.load_state_dict(state)
    else:
        return deque(state) if isinstance(x, deque) else state
    return x


def checkpoint_file(out: Path) -> Path:
    """checkpoint.pt, or of torchrun's second process checkpoint1.pt: each has its own random numbers."""
    return out / f"checkpoint{rank_and_world()[0] or ''}.pt"


def crc_of(*models: nn.Module) -> int:
    """A number that tells networks apart: what a run's `args` say of the weights it began with."""
    crc = 0
    for t in (t for m in models for t in m.state_dict().values()):
        crc = zlib.crc32(t.detach().cpu().contiguous().numpy().tobytes(), crc)
    return crc


def load_checkpoint(file: Path, args: argparse.Namespace) -> dict | None:
    """--resume: the last checkpoint, if there is one. InputError if it was made with other flags."""
    if not (args.resume and file.exists()):
        return None
    state = load_file(file, ("args",), "a checkpoint")
    same_flags(args, state["args"], f"--resume: {file} was made", "repeat its flags, or start anew")
    return state


BEFORE = {"rounding": "nearest", "fmix": 0.0}  # what a run had before there was a flag
# Flags that may differ when a run goes on, or is run again in its folder.
NO_MATTER = ("out", "resume", "device", "checkpoint_every", "log_every", "seeds", "workers")


def same_flags(args: argparse.Namespace, then: dict, what: str, advice: str) -> None:
    """InputError where a flag differs from `then`, whose program may not have had all of them."""
    for k, now in flat(args).items():
        if k not in NO_MATTER and (had := then.get(k, BEFORE.get(k, now))) != now:
            flag = "--" + k.replace("_", "-")
            raise InputError(f"{what} with another {flag} ({had}, now {now}): {advice}")
