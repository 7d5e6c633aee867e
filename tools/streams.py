"""The benchmark of cema.py: streams of images, made on the fly or read from files, and their tables.

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
from typing import Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import common
from common import ImageFolder, door, need
from tools.corruptions import CORRUPTIONS, HELD_OUT, corrupt, known


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
        alone = world == 1 or self.resets
        need(alone, "--order lifelong and mixed are one stream, for one process, no torchrun")
        out, at = [], 0
        for n, part in enumerate(self.parts):
            end = at + len(part)
            if n % world == rank:
                out += [(n, range(k, min(k + batch_size, end))) for k in range(at, end, batch_size)]
            at = end
        return out

    def seen(self, plan: list[tuple[int, range]], severity: int, seed: int) -> Iterator:
        """(uint8 (B, 3, S, S), labels, domains, numbers there) of each batch, as the camera sees it."""
        # Images that lie on disk are decoded by workers.
        make = DataLoader if isinstance(self.domains[0].split, TensorDataset) else common.loader
        for x, y, d, i in make(self, batch_sampler=[positions for _, positions in plan]):
            for k in d.unique().tolist():  # each image under its own domain's corruption
                kind, here = self.domains[k].corruption, d == k
                if kind:
                    x[here] = corrupt(x[here], kind, severity, i[here], seed)
            yield x, y, d, i


# ===== Score ==========================================================================================


class Tally:
    """Right answers of each method and "images": in each domain, in this visit to it, in this window."""
    STATE = ("domains", "visit", "window")

    def __init__(self, args: argparse.Namespace, domains: list[Domain]):
        self.args, self.names = args, [domain.name for domain in domains]
        self.counts = {m: Counter() for m in args.methods}  # what each method counts itself
        self.domains, self.visit, self.window = [Counter() for _ in domains], Counter(), Counter()
        self.now = 0  # the domain of the newest batch

    def add(self, answers: dict[str, Tensor], y: Tensor, d: Tensor) -> None:
        """answers: method -> logits (B, C); y, d: labels and domains (B,)."""
        self.now = int(d[0])
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

    def write(self, log: common.RunLog, bar, t: int, parts: list[int], cema=None) -> None:
        """The records of batch t: a step now and then, an eval where a part of the stream ends."""
        name = "mixed" if self.args.order == "mixed" else self.names[self.now]
        figures, last = {}, t + 1 == len(parts)
        if cema:
            edge, uploads = cema.edge, cema.counts["uploads"]
            figures = {"e_max": edge.e_max, "uploads_pct": 100 * uploads / self.images,
                       "entropy": edge.h_sum / max(1, edge.images)}
        acc = percent(self.domains[self.now])
        shown = {m: acc[m] for m in self.args.methods} | figures
        bar.set_description(name, refresh=False)
        bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items()}, refresh=False)
        if (t + 1) % self.args.log_every == 0 or last:
            log.write("step", iteration=t + 1, domain=name, window=self.take("window"), **figures)
        if last or parts[t + 1] != parts[t]:
            visit = {f"acc_{m}_pct": pct for m, pct in self.take("visit").items()}
            log.write("eval", iteration=t + 1, domain=name, **visit)

    def state(self, methods: dict, first: int, batches: int) -> dict:
        """What a checkpoint before batch `first` holds."""
        counts = {m: dict(c) for m, c in self.counts.items()}
        states = {m: common.state_of(method) for m, method in methods.items()}
        return {"first": first, "batches": batches, "tally": common.state_of(self), "counts": counts,
                "methods": states}

    def restore(self, state: dict, methods: dict, batches: int) -> int:
        """Tally and methods as they were; returns the batch that comes next."""
        need(state["batches"] == batches, "--resume: that run had another number of processes")
        common.restored(self, state["tally"])
        for m, method in methods.items():
            self.counts[m].update(state["counts"][m])
            common.restored(method, state["methods"][m])
        return state["first"]

    def gather(self) -> None:
        """From now on it counts for all of torchrun's processes, each of which saw other domains."""
        mine = [*self.domains, *self.counts.values()]
        everyone = common.gather([Counter(c) for c in mine])
        for n, counter in enumerate(mine):
            counter.clear()
            for theirs in everyone:
                counter.update(theirs[n])


def percent(c: Counter) -> dict[str, float]:
    """Method -> top-1."""
    return {m: 100 * hits / c["images"] for m, hits in c.items() if m != "images"}


LABELS = {"source": "source", "bn": "BN adapt", "tent": "Tent", "eta": "ETA", "cema": "CEMA",
          "foundation_source": "f, source", "foundation": "f, adapted"}
COUNTED = ("bytes_up", "bytes_down", "bytes_down_stats", "refused_messages", "resets", "cloud_forwards",
           "cloud_backwards", "replay_only_steps")


@torch.no_grad()
def foundation_rows(f: nn.Module, cema, x: Tensor) -> dict[str, Tensor]:
    """What f answers, untouched and adapted. For the table only: the edge does not send these images."""
    if not cema or not cema.hp.score_foundation:
        return {}
    with common.autocast(x.device, cema.hp.amp):
        untouched = f(x)
    return {"foundation_source": untouched, "foundation": cema.cloud.f.forward(x, learn=False)}


def checkpoint(args: argparse.Namespace, crc: int) -> dict | None:
    """That of --resume. One of torchrun's processes that had not come to its first one begins anew."""
    there = args.resume and common.checkpoint_file(Path(args.resume)).exists()
    return common.load_checkpoint(args, crc) if there else None


def finish(tally: Tally, log: common.RunLog) -> None:
    """The end record and the tables, of all processes together."""
    tally.gather()
    if common.rank_and_world()[0] == 0:
        end = end_record(tally)
        log.write("end", **end, wall_s=log.seconds(), peak_mib=common.peak_mib())
        print_table(end, tally)
        if tally.args.stream == "generated":
            print("generated corruptions: not comparable with the files of ImageNet-C or CIFAR-10-C")
        print(f"{log.path}; {log.seconds():.0f} s, {common.peak_mib():.0f} MiB")


def end_record(tally: Tally) -> dict:
    """The log's last line: accuracy in each domain and the mean, what was learned from, the cost."""
    in_domain = {name: percent(c) for name, c in zip(tally.names, tally.domains)}
    scored = list(tally.counts)
    if tally.args.score_foundation and "cema" in scored:
        scored += ["foundation_source", "foundation"]
    accs = {m: {name: acc[m] for name, acc in in_domain.items()} for m in scored}
    end = {f"acc_{m}_pct": sum(row.values()) / len(row) for m, row in accs.items()}
    end["per_domain"] = accs
    if "eta" in tally.counts:
        end["eta_backwards_pct"] = 100 * tally.counts["eta"]["edge_backwards"] / tally.images
    if c := tally.counts.get("cema"):
        end["uploads_pct"] = 100 * c["uploads"] / tally.images
        end["edge_overhead_pct"] = 100 * (c["edge_s"] / c["edge_inference_s"] - 1)
        end["cloud_ms_per_image"] = 1000 * c["cloud_s"] / tally.images
        end |= {k: c[k] for k in COUNTED}
    return end


def print_table(end: dict, tally: Tally) -> None:
    """Top-1 in each domain, a column a method; then what each method cost. k: a thousand images."""
    accs = end["per_domain"]
    rows = {name: {m: accs[m][name] for m in accs} for name in tally.names}
    rows["mean"] = {m: end[f"acc_{m}_pct"] for m in accs}
    if "source" in accs:
        rows["gain over source"] = {m: acc - end["acc_source_pct"] for m, acc in rows["mean"].items()}
    print(f"\n{'top-1 %':<22}" + "".join(f"{LABELS[m]:>11}" for m in accs))
    for name, row in rows.items():
        print(f"{name:<22}" + "".join(f"{acc:>11.2f}" for acc in row.values()))
    heads = ("learned %", "MB up", "kB down", "edge bwd k", "cloud fwd k", "cloud bwd k", "edge img/s")
    print(f"\n{'cost':<11}" + "".join(f"{head:>12}" for head in heads))
    for m, c in tally.counts.items():
        learned = c["uploads"] + c["edge_backwards"]  # each method counts one of them
        keys = ("bytes_down", "edge_backwards", "cloud_forwards", "cloud_backwards")
        thousands = [c[k] / 1e3 for k in keys]
        speed = c["edge_forwards"] / c["edge_s"]
        row = [100 * learned / tally.images, c["bytes_up"] / 1e6, *thousands, speed]
        print(f"{LABELS[m]:<11}" + "".join(f"{v:>12.1f}" for v in row))
    if c := tally.counts.get("cema"):
        share = c["bytes_down_stats"] / max(1, c["bytes_down"])
        print(f"the edge's loop costs {end['edge_overhead_pct']:.1f} % more than its inference, the "
              f"cloud {end['cloud_ms_per_image']:.1f} ms an image;\n{c['refused_messages']} messages "
              f"refused; {share:.0%} of the bytes down are BN statistics")
        if not c["cloud_forwards"]:
            print("note: the cloud never learned, for fewer than --cloud-batch images came to it")


# ===== Where images and networks lie ==================================================================


def corruption_names(words: list[str]) -> list[str]:
    groups = {"all": CORRUPTIONS, "held-out": HELD_OUT}
    names = list(dict.fromkeys(n for w in words for n in groups.get(w, (w,))))
    for name in names:
        near = ", ".join(difflib.get_close_matches(name, known(), 3, 0))
        need(name in known(), f"--corruptions {name}: unknown; expected all, held-out, or as in {near}")
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
        folders = [root / n / str(severity) for n in names]
        for n, folder in zip(names, folders):
            need(folder.is_dir(), f"{root}: no {n}/{severity} in it; --stream imagenet-c expects "
                 "corruption/severity/wnid/*.JPEG. Leave it out (--corruptions), or unpack")
        splits = [ImageFolder(folder, args.size or 224, resize=False) for folder in folders]
        domains = [Domain(f"{n}/{severity}", split) for n, split in zip(names, splits)]
    else:
        size = args.size or (224 if args.stream == "imagenet-r" else None)
        domains = [Domain(args.stream, ImageFolder(root, size))]
    classes, keep = domains[0].split.classes, None
    same = all(domain.split.classes == classes for domain in domains)
    need(same, f"{root}: the corruptions differ in their class folders; unpack them again")
    if args.stream == "imagenet-r":
        keep, classes = kept_classes(classes, args.wnids)
    name = "imagenet" if len(classes) == 1000 else root.name
    size = domains[0].split.size
    return common.Data(name, classes, size, *common.NORMS["imagenet"], None, None), domains, keep


def load_cifar_c(root: Path, dataset: str, names: list[str], severity: int) -> tuple:
    """The data and the domains, as in load_domains."""
    fits = dataset in ("cifar10", "cifar100")
    need(fits, f"--stream cifar-c: is made of cifar10 or cifar100; --dataset is {dataset}")
    with door("--stream cifar-c: expected the folder of CIFAR-10-C or CIFAR-100-C as --data-dir, with "
              "<corruption>.npy and labels.npy"):
        arrays = [np.load(root / f"{n}.npy", mmap_mode="r") for n in names]
        y = np.load(root / "labels.npy", mmap_mode="r")
        for n, a in zip(names, arrays):
            fits = a.dtype == np.uint8 and a.shape == (50_000, 32, 32, 3)
            need(fits, f"{n}.npy: expected uint8 images (50000, 32, 32, 3), not {a.dtype} {a.shape}")
        fits = y.dtype.kind in "iu" and y.shape == (50_000,)
        need(fits, f"labels.npy: expected integers (50000,), not {y.dtype} {y.shape}")
    # 10,000 images a severity, 1 first.
    domains, rows = [], slice(10_000 * (severity - 1), 10_000 * severity)
    for n, a in zip(names, arrays):
        x = torch.from_numpy(np.ascontiguousarray(a[rows].transpose(0, 3, 1, 2)))
        split = TensorDataset(x, torch.from_numpy(y[rows].astype(np.int64)))
        domains.append(Domain(f"{n}/{severity}", split))
    classes = [str(c) for c in range(10 if dataset == "cifar10" else 100)]
    data = common.Data(dataset, classes, 32, *common.NORMS[dataset], None, domains[0].split)
    return common.check_labels(data), domains


def kept_classes(present: list[str], wnids: str | None) -> tuple[list[int], list[str]]:
    """Which of the network's classes these folders are: (numbers, all wnids); it knows them sorted."""
    path = Path(wnids or "")
    need(wnids and path.exists(), f"--wnids {wnids}: must be a folder with the 1000 class folders of "
         "ImageNet (val/ will do), or a text file with one wnid a line")
    if path.is_file():
        known = sorted(path.read_text(errors="replace").split())
    else:
        known = sorted(p.name for p in path.iterdir() if p.is_dir())
    for name in present:
        need(name in known, f"--wnids {wnids}: does not know {name}, a class folder of the stream")
    return [known.index(name) for name in present], known


def networks(args: argparse.Namespace, data: common.Data, device: torch.device,
             flags: tuple[str, ...] = ("--arch", "--foundation")) -> list[tuple[nn.Module, common.Data]]:
    """Networks, and the data as each normalises it. What needs no weights is checked first of all."""
    of = {"--arch": (args.arch, args.weights),
          "--foundation": (args.foundation, args.foundation_weights)}
    print(f"device: {common.device_name(device)}, {torch.get_num_threads()} threads, "
          f"{'bf16' if args.amp else 'fp32'}; recipe: {args.recipe}")
    if args.batch_size == 1 and (args.bn == "batch" or {"bn", "tent", "eta"} & set(args.methods)):
        print("note: with --batch-size 1 a batch's BN statistics are those of one image")
    black, found = torch.zeros(2, 3, data.size, data.size), []
    for flag in flags:
        arch, _ = of[flag]
        net = common.build_model(arch, len(data.classes), flag=flag).eval()
        with door(f"{flag} {arch}"):
            common.check_network(net, black)
            common.configure(net, args.bn, args.affine)
    # Of files, --dataset says nothing.
    name = args.dataset if args.stream in ("generated", "cifar-c") else data.name
    name = "imagenet" if len(data.classes) == 1000 else name
    for flag in flags:
        arch, weights = of[flag]
        net, own, origin = common.find_weights(arch, name, data, weights, device, flag)
        print(f"{flag} {origin}", flush=True)
        common.check_network(net.to(device, memory_format=torch.channels_last), black.to(device))
        found.append((net, own))
    return found
