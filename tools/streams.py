"""The image streams of cema.py's tables: corrupted test images, made on the fly or read from files.

    generated    the test images of --dataset under tools/corruptions.py
    imagenet-c   --data-dir/<corruption>/<severity>/<wnid>/*.JPEG
    cifar-c      --data-dir/<corruption>.npy and labels.npy, of CIFAR-10-C or -100-C as --dataset says
    imagenet-r   --data-dir/<wnid>/*, 200 classes; --wnids says which of the 1000 these are
    folder       any ImageFolder
"""

import argparse
import difflib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import common
from common import InputError
from tools.corruptions import CORRUPTIONS, HELD_OUT, corrupt, known
from tools.data import ImageFolder, check_labels

ORDERS = ("reset", "lifelong", "mixed", "label-shift")


class Domain(NamedTuple):
    """A test set under one corruption; `corruption` None: its images are corrupted already."""

    name: str
    split: Dataset
    corruption: str | None = None


class Stream(Dataset):
    """Images in the order in which the edge sees them: (uint8 image, label, domain, number there).

    reset        one domain after the other; each is a part, and parts are independent runs
    lifelong     the same order, one run
    mixed        all domains shuffled together
    label-shift  as reset, each domain sorted by class
    """

    def __init__(self, domains: list[Domain], order: str, images: int, loop: int, seed: int):
        g, parts = torch.Generator().manual_seed(seed), []
        for d, domain in enumerate(domains):
            # Files lie sorted by class; the stream must not.
            chosen = torch.randperm(len(domain.split), generator=g)[:images]
            if order == "label-shift":
                chosen = chosen[common.labels_of(domain.split)[chosen].argsort(stable=True)]
            parts.append(torch.stack([torch.full_like(chosen, d), chosen], 1))
        if order == "mixed":
            together = torch.cat(parts)
            parts = [together[torch.randperm(len(together), generator=g)]]
        self.domains, self.resets = domains, order in ("reset", "label-shift")
        # A new model a domain: then the domain is what repeats. Else: the whole of it.
        self.parts = [part.repeat(loop, 1) for part in parts] if self.resets else parts * loop
        self.where = torch.cat(self.parts)  # (N, 2): domain, image

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, k: int):
        d, i = self.where[k].tolist()
        x, y = self.domains[d].split[i]
        return x, int(y), d, i

    def batches(self, batch_size: int) -> list[tuple[int, range]]:
        """(part, positions) of each batch; none reaches over the end of a part.

        torchrun's processes take the parts in turn. InputError where all is one run.
        """
        rank, world = common.rank_and_world()
        if world > 1 and not self.resets:
            raise InputError("--order lifelong and mixed are one stream, for one process, no torchrun")
        out, at = [], 0
        for n, part in enumerate(self.parts):
            end = at + len(part)
            batches = [(n, range(k, min(k + batch_size, end))) for k in range(at, end, batch_size)]
            out += batches if n % world == rank else []
            at = end
        return out

    def loader(self, positions: list[range]) -> DataLoader:
        """Batches at these positions; images that lie on disk are decoded by workers."""
        make = DataLoader if hasattr(self.domains[0].split, "tensors") else common.loader
        return make(self, batch_sampler=positions)


class Tally:
    """Right answers of each method and "images": in each domain, in this visit to it, in this window."""

    STATE = ("domains", "visit", "window")

    def __init__(self, domains: int):
        self.domains, self.visit, self.window = [Counter() for _ in range(domains)], Counter(), Counter()

    def add(self, answers: dict[str, Tensor], y: Tensor, d: Tensor) -> None:
        """answers: method -> logits (B, C); y, d: labels and domains (B,)."""
        right = {m: logits.argmax(1).cpu() == y for m, logits in answers.items()} | {"images": y == y}
        for k in d.unique().tolist():
            hits = {m: int(r[d == k].sum()) for m, r in right.items()}
            for counter in (self.domains[k], self.visit, self.window):
                counter.update(hits)

    @property
    def images(self) -> int:
        return sum(c["images"] for c in self.domains)

    def take(self, counter: str) -> dict[str, float]:
        """Top-1 of each method in "visit" or "window", which starts anew."""
        counted = getattr(self, counter)
        setattr(self, counter, Counter())
        return percent(counted)


def percent(c: Counter) -> dict[str, float]:
    """Method -> top-1."""
    return {m: 100 * hits / c["images"] for m, hits in c.items() if m != "images"}


def together(tally: Tally, counts: dict[str, Counter]) -> tuple[Tally, dict[str, Counter]]:
    """Those of all of torchrun's processes, each of which has seen other domains."""
    for n, (domains, more) in enumerate(common.gather((tally.domains, counts))):
        if n != common.rank_and_world()[0]:
            for mine, other in zip((*tally.domains, *counts.values()), (*domains, *more.values())):
                mine.update(other)
    return tally, counts


LABELS = {"source": "source", "bn": "BN adapt", "tent": "Tent", "eta": "ETA", "cema": "CEMA",
          "foundation_source": "f, source", "foundation": "f, adapted"}
COUNTED = ("bytes_up", "bytes_down", "bytes_down_stats", "refused_messages", "resets", "cloud_forwards",
           "cloud_backwards", "replay_only_steps")


def end_record(accs: dict[str, dict], counts: dict[str, Counter], images: int) -> dict:
    """The log's last line: accuracy in each domain and the mean, what was learned from, the cost."""
    end = {f"acc_{m}_pct": sum(row.values()) / len(row) for m, row in accs.items()}
    end["per_domain"] = accs
    if "eta" in counts:
        end["eta_backwards_pct"] = 100 * counts["eta"]["edge_backwards"] / images
    if c := counts.get("cema"):
        end["uploads_pct"] = 100 * c["uploads"] / images
        end["edge_overhead_pct"] = 100 * (c["edge_s"] / c["edge_inference_s"] - 1)
        end["cloud_ms_per_image"] = 1000 * c["cloud_s"] / images
        end |= {k: c[k] for k in COUNTED}
    return end


def print_table(end: dict, counts: dict[str, Counter], images: int) -> None:
    """Top-1 in each domain, a column a method; then what each method cost. k: a thousand images."""
    accs = end["per_domain"]
    mean = {m: end[f"acc_{m}_pct"] for m in accs}
    rows = {name: {m: accs[m][name] for m in accs} for name in accs[next(iter(accs))]} | {"mean": mean}
    if "source" in accs:
        rows["gain over source"] = {m: a - mean["source"] for m, a in mean.items()}
    print(f"\n{'top-1 %':<22}" + "".join(f"{LABELS[m]:>11}" for m in accs))
    for name, row in rows.items():
        print(f"{name:<22}" + "".join(f"{a:>11.2f}" for a in row.values()))
    heads = ("learned %", "MB up", "kB down", "edge bwd k", "cloud fwd k", "cloud bwd k", "edge img/s")
    print(f"\n{'cost':<11}" + "".join(f"{head:>12}" for head in heads))
    for m, c in counts.items():
        learned = 100 * (c["uploads"] if m == "cema" else c["edge_backwards"]) / images
        keys = ("bytes_down", "edge_backwards", "cloud_forwards", "cloud_backwards")
        thousands, img_per_s = (c[k] / 1e3 for k in keys), c["edge_forwards"] / c["edge_s"]
        row = [learned, c["bytes_up"] / 1e6, *thousands, img_per_s]
        print(f"{LABELS[m]:<11}" + "".join(f"{v:>12.1f}" for v in row))
    if c := counts.get("cema"):
        print(f"the edge's loop costs {end['edge_overhead_pct']:.1f} % more than its inference, the "
              f"cloud {end['cloud_ms_per_image']:.1f} ms an image;\n{c['refused_messages']} messages "
              f"refused; {c['bytes_down_stats'] / max(1, c['bytes_down']):.0%} of the bytes down are BN "
              "statistics")
        if not c["cloud_forwards"]:
            print("note: the cloud never learned, for fewer than --cloud-batch images came to it")


def as_seen(x: Tensor, d: Tensor, i: Tensor, domains: list[Domain], severity: int, seed: int) -> Tensor:
    """The batch (B, 3, S, S) as the camera delivers it: each image under its own domain's corruption."""
    for k in d.unique().tolist():
        if domains[k].corruption:
            x[d == k] = corrupt(x[d == k], domains[k].corruption, severity, i[d == k], seed)
    return x


def corruption_names(words: list[str]) -> list[str]:
    groups = {"all": CORRUPTIONS, "held-out": HELD_OUT}
    names = list(dict.fromkeys(n for w in words for n in groups.get(w, (w,))))
    if unknown := [n for n in names if n not in known()]:
        near = ", ".join(difflib.get_close_matches(unknown[0], known(), 3, 0))
        raise InputError(f"--corruptions {unknown[0]}: unknown; expected all, held-out, or as in {near}")
    return names


def load_domains(args: argparse.Namespace) -> tuple[common.Data, list[Domain], list[int] | None]:
    """The data (classes, normalisation), the domains, and which classes the stream has (None: all)."""
    root, names, severity = Path(args.data_dir), corruption_names(args.corruptions), args.severity
    if args.stream == "generated":
        data = common.load_data(args.dataset, args.data_dir, args.size)
        return data, [Domain(f"{n}/{severity}", data.test, n) for n in names], None
    if args.stream == "cifar-c":
        return *load_cifar_c(root, args.dataset, names, severity), None

    # ImageNet-C lies on disk as 224 px crops: no resizing.
    if args.stream == "imagenet-c":
        if missing := [n for n in names if not (root / n / str(severity)).is_dir()]:
            raise InputError(f"{root}: no {missing[0]}/{severity} in it; --stream imagenet-c expects "
                             "corruption/severity/wnid/*.JPEG. Leave it out (--corruptions), or unpack")
        folders = [root / n / str(severity) for n in names]
        splits = [ImageFolder(folder, args.size or 224, resize=False) for folder in folders]
        domains = [Domain(f"{n}/{severity}", split) for n, split in zip(names, splits)]
    else:
        size = args.size or (224 if args.stream == "imagenet-r" else None)
        domains = [Domain(args.stream, ImageFolder(root, size))]
    classes, keep = domains[0].split.classes, None
    if any(domain.split.classes != classes for domain in domains):
        raise InputError(f"{root}: the corruptions differ in their class folders; unpack them again")
    if args.stream == "imagenet-r":
        keep, classes = kept_classes(classes, args.wnids)
    name = "imagenet" if len(classes) == 1000 else root.name
    size = domains[0].split.size
    return common.Data(name, classes, size, *common.IMAGENET_NORM, None, None), domains, keep


def load_cifar_c(root: Path, dataset: str, names: list[str], severity: int) -> tuple:
    """The data and the domains, as in load_domains."""
    if dataset not in ("cifar10", "cifar100"):
        raise InputError(f"--stream cifar-c: is made of cifar10 or cifar100; --dataset is {dataset}")
    try:
        *arrays, y = [np.load(root / f"{n}.npy", mmap_mode="r") for n in (*names, "labels")]
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"--stream cifar-c: {e}; expected the folder of CIFAR-10-C or CIFAR-100-C as "
                         "--data-dir, with <corruption>.npy and labels.npy") from None
    for n, a in zip((*names, "labels"), (*arrays, y)):
        dtype, shape = ("iu", (50_000,)) if a is y else ("u", (50_000, 32, 32, 3))
        if getattr(a, "shape", None) != shape or a.dtype.kind not in dtype:
            what = "labels" if a is y else "uint8 images"
            raise InputError(f"{root}/{n}.npy: expected {what} {shape}, not "
                             f"{getattr(a, 'dtype', type(a).__name__)} {getattr(a, 'shape', '')}")
    # 10,000 images a severity, 1 first.
    domains, rows = [], slice(10_000 * (severity - 1), 10_000 * severity)
    for n, a in zip(names, arrays):
        x = torch.from_numpy(np.ascontiguousarray(a[rows].transpose(0, 3, 1, 2)))
        split = TensorDataset(x, torch.from_numpy(y[rows].astype(np.int64)))
        domains.append(Domain(f"{n}/{severity}", split))
    classes = [str(c) for c in range(10 if dataset == "cifar10" else 100)]
    data = common.Data(dataset, classes, 32, *common.NORMS[dataset], None, domains[0].split)
    return check_labels(data), domains


def kept_classes(present: list[str], wnids: str | None) -> tuple[list[int], list[str]]:
    """Which of the network's classes these folders are: (numbers, all wnids); it knows them sorted."""
    path = Path(wnids or "")
    if not wnids or not path.exists():
        raise InputError(f"--wnids {wnids}: must be a folder with the 1000 class folders of ImageNet "
                         "(val/ will do), or a text file with one wnid a line")
    words = path.read_text(errors="replace").split() if path.is_file() else [
        p.name for p in path.iterdir() if p.is_dir()]
    known = sorted(words)
    if unknown := [w for w in present if w not in known]:
        raise InputError(f"--wnids {wnids}: does not know {unknown[0]}, a class folder of the stream")
    return [known.index(w) for w in present], known
