"""The full-precision networks of the scripts: which file, what it says of itself, and whether it fits.

Every script comes here by `common.find_weights` or `common.load_network`. A checkpoint of
tools/pretrain.py knows its classes, normalisation, size and accuracy; bare state_dicts, and files of
other programs, are read, too.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import common
from common import Data, InputError


def check_kinds(obj: dict, kinds: dict, file, maker: str) -> None:
    """InputError where a value is not of the kind that the program `maker` writes."""
    for key, kind in kinds.items():
        if key in obj and not isinstance(obj[key], kind):
            a = type(obj[key]).__name__
            raise InputError(f"{file}: its {key} is a {a}, which {maker} does not write")


# What a checkpoint may say of itself.
ABOUT = {"classes": list, "mean": list, "std": list, "size": int, "acc_pct": (int, float), "arch": str,
         "dataset": str}


def check_norm(about: dict, file) -> None:
    """InputError where mean or std are not three numbers each, in lists."""
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        values = about.get(key, [0.5] * 3)
        kinds = {type(v) for v in values} <= {int, float}
        if len(values) != 3 or not kinds or not all(least < v < math.inf for v in values):
            raise InputError(f"{file}: its {key} is {values}; expected three numbers"
                             f"{' above 0' * (key == 'std')}, of images in [0, 1]")


def said_by(model: nn.Module, name: str) -> dict:
    """What a network says of the images it expects: its size, an int, mean and std, lists or tensors."""
    said = {k: v for k in ("mean", "std") if not callable(v := getattr(model, k, print))}
    for k, v in said.items():
        try:
            said[k] = torch.as_tensor(v, dtype=torch.float64).flatten().tolist()
        except (TypeError, ValueError):
            said[k] = [v]
    check_norm(said, name)
    return said | ({"size": model.size} if isinstance(getattr(model, "size", None), int) else {})


def load_network(file: Path, arch: str | None, num_classes: int | None = None,
                 flag: str = "--arch") -> tuple[nn.Module, dict]:
    """A network in eval mode from a checkpoint or a bare state_dict, and what the file says of itself.

    None: what the file says, else 1000 classes. Raises InputError for what does not fit.
    """
    state, about = common.load_file(file, (), "a checkpoint"), {}
    alone = state if len(state) == 1 else ()  # under whatever name
    for key in ("state_dict", "model_state_dict", "model", "net", "module", "state_dict_ema", *alone):
        if isinstance(state.get(key), dict):  # a wrapped one, by whatever program
            state, about = state[key], {k: v for k, v in state.items() if k in ABOUT}
            break
    check_kinds(about, ABOUT, file, "tools/pretrain.py")
    check_norm(about, file)
    bad = [k for k, v in state.items() if isinstance(v, Tensor) and not v.double().isfinite().all()]
    if bad:
        raise InputError(f"{file}: {bad[0]} holds NaN or infinite values")
    # A bare state_dict ends with the bias of its head, one number a class.
    rows = [len(v) for v in state.values() if isinstance(v, Tensor) and v.ndim]
    known = len(about["classes"]) if "classes" in about else num_classes or (rows or [1000])[-1]
    if num_classes not in (None, known):
        raise InputError(f"{file}: was trained for {known} classes, the data have {num_classes}")
    if not (arch or "arch" in about) or about.get("arch", arch) != (arch or about["arch"]):
        holds = about.get("arch", "network without a name")
        raise InputError(f"{file}: {flag} is {arch}, and the file holds a {holds}")
    if arch is None and ":" in about["arch"]:  # a file of weights does not choose what code is run
        raise InputError(f"{file}: holds a {about['arch']}; repeat that behind {flag}")
    arch = about.get("arch", arch)
    model = common.build_model(arch, known, flag=flag)
    # DataParallel writes module. before each key, torch.compile _orig_mod., others net. or model.
    own = model.state_dict().keys()
    while not state.keys() & own and len({str(k).split(".")[0] for k in state}) == 1 < len(state):
        state = {str(k).partition(".")[2]: v for k, v in state.items()}
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as e:
        first = " ".join(" ".join(str(e).split("\n")[:2]).split())
        raise InputError(f"{file}: does not fit {arch} with {known} classes: {first[:200]}") from None
    return model.eval(), about


@torch.no_grad()
def same_classes(model: nn.Module, names: list, data: Data, file) -> None:
    """Puts a network's outputs `names` into the order of the data's classes. InputError: other names."""
    names = [str(n) for n in names]
    if names == data.classes:
        return
    one, twice = sorted(set(names) ^ set(data.classes))[:1], len(set(names)) < len(names)
    wanted, digits = data.classes, [all(n.isdecimal() for n in known) for known in (names, data.classes)]
    if one and any(digits) and not twice:  # known by number alone; folders stand as 0, 1, 10, 11, 2
        rank = lambda known: [sorted(known, key=int).index(n) for n in known]
        names, wanted = [rank(known) if are else [*range(len(known))]
                         for known, are in zip((names, wanted), digits)]
        if names == wanted:
            return
    elif one or twice:
        raise InputError(f"{file}: was trained for other classes than those of {data.name}: only one of "
                         f"them knows {one[0]}" if one else f"{file}: names a class twice")
    order = [names.index(n) for n in wanted]
    x = torch.rand(2, 3, data.size, data.size, device=next(model.parameters()).device)
    before = model(x)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    ends = [m for m in layers if len(m.weight) == len(names)]
    for t in (*ends[-1].parameters(), *ends[-1].buffers()) if ends else ():  # rows of the last layer
        t.copy_(t[order])
    if not torch.allclose(model(x), before[:, order], atol=1e-4):
        raise InputError(f"{file}: has its classes in another order than {data.name}")


def find(arch: str, dataset: str, data: Data, weights: str | None, device: torch.device,
         flag: str = "--arch") -> tuple[nn.Module, Data, str]:
    """The full-precision network, the data with the network's normalisation, and a line on its origin.

    In this order: `weights` if given, "none" for a network of yours that has its own;
    weights/<data>_<arch>.pt; torchvision's DEFAULT for imagenet; for the embedded data a short
    pretraining on its 5,000 train images, kept as weights/<data>_<arch>.pt.
    """
    C = len(data.classes)
    shipped = common.ROOT / "weights" / f"{data.name}_{common.short_name(arch)}.pt"
    if weights == "none":
        if ":" not in arch:
            raise InputError(f"{flag} {arch}: has no weights of its own; only a FILE.py:NAME may")
        model = common.build_model(arch, C, flag=flag).eval()
        return (*as_it_says(model, {}, data, arch), f"{arch}: its own weights")
    file = Path(weights) if weights else shipped
    if not file.exists() and not weights:
        if dataset == "imagenet" and C == 1000 and not common.CIFAR_ARCH.fullmatch(arch):
            model = common.build_model(arch, C, "DEFAULT", flag).eval()
            same_classes(model, [*map(str, range(C))], data, arch)
            return (*as_it_says(model, {}, data, arch), f"{arch}: torchvision's DEFAULT weights")
        if dataset != "fashion" or ":" in arch:
            none = ", or none, where the network has its own" * (":" in arch)
            make = f"; make it with: python tools/pretrain.py --arch {arch} --dataset {dataset}"
            raise InputError(f"no weights for {arch} on {data.name}: expected weights/{shipped.name} or "
                             f"a file named by a flag{none}{make * (data.train is not None)}")
        common.check_out(shipped.parent)
        print(f"weights: none for {arch}; pretraining it on the 5,000 embedded images, once", flush=True)
        common.tool("pretrain").short(arch, data, shipped, device)
    model, about = load_network(file, arch, C, flag)
    same_classes(model, about.get("classes", data.classes), data, file)
    model, data = as_it_says(model, about, data, file)
    shown = file.relative_to(common.ROOT) if file.is_relative_to(common.ROOT) else file
    record = f", {about['acc_pct']:.2f} % by its own record" if "acc_pct" in about else ""
    return model, data, f"{arch}: {shown}{record}"


def as_it_says(model: nn.Module, about: dict, data: Data, file) -> tuple[nn.Module, Data]:
    """The data with the normalisation that a file, or a network of yours, says. InputError: other px."""
    of_data = {k: getattr(data, k) for k in ("size", "mean", "std")}
    says = of_data | said_by(model, file) | {k: about[k] for k in of_data if k in about}
    if says["size"] != data.size:
        raise InputError(f"{file}: is for images of {says['size']} px, these have {data.size} px; a "
                         f"folder is read at any: --size {says['size']}")
    return model, data._replace(**says)
