"""Trains full-precision networks: gdfq.py quantizes them, cema.py and tdmr.py start from them.

    python tools/pretrain.py --arch resnet20 --dataset cifar100 --epochs 50   # 66.9 %; an hour, 2 cores
    python tools/pretrain.py --arch resnet18 --dataset path/to/images         # train/ and val/ in it
    python tools/pretrain.py --resume runs/pretrain/cifar100_resnet20/seed0   # after an interruption
    python tools/pretrain.py embed                                            # data/fashion_mnist.npz

The weights are those of the last epoch, never of the best one. Their file also holds the class names,
the normalisation, the accuracy, the command and the seed.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from common import ROOT, need  # noqa: E402


def build_parser() -> common.Parser:
    p = common.Parser("pretrain.py", __doc__)
    p.add_argument("what", nargs="?", default="pretrain", choices=["pretrain", "embed"],
                   help="embed: make the embedded data from the full Fashion-MNIST")
    a = p.group("network")
    a("--arch", "resnet20", "resnet8/20/.../110, resnet20x2, torchvision's, FILE.py:NAME")
    a("--save", None, "file to write; None: weights/<dataset>_<arch>.pt, or data/fashion_mnist.npz")
    a("--init", None, "checkpoint of the same --arch and classes to start from; None: random weights")
    a = p.group("training")
    a("--epochs", 30, "passes over the train images", lo=1)
    a("--batch-size", 128, "images per step", lo=2)
    a("--optimizer", "sgd", "sgd: with Nesterov momentum", choices=["sgd", "adamw"])
    a("--lr", 0.1, "peak of the one-cycle schedule; for adamw use 3e-3 to 1e-2")
    a("--momentum", 0.9, "of sgd; adamw keeps its betas, 0.9 and 0.999", hi=1)
    a("--weight-decay", 5e-4, "not on biases and norm layers")
    a("--warmup", 0.2, "share of the steps in which the learning rate rises", hi=1)
    a("--label-smoothing", 0.0, "0.1 may add a few tenths; it also raises entropies, which CEMA reads",
      hi=1)
    kinds = ["crop-flip", "trivial", "trivial-noise"]
    a("--augment", kinds[0], "trivial: also TrivialAugment, slower to learn and far better under "
      "corruption; trivial-noise: also Gaussian noise", choices=kinds)
    a = p.group("embed")
    a("--per-class", 500, "train images kept per class", lo=1)
    common.add_run_flags(p, 1, "epochs")
    return p


# ===== Training =====================================================================================


def network(hp: argparse.Namespace, data: common.Data, device: torch.device) -> nn.Module:
    """With random weights, or those of --init. InputError for one that does not fit the data."""
    if hp.init:
        model, about = common.load_network(Path(hp.init), hp.arch, len(data.classes))
        common.same_classes(model, about.get("classes", data.classes), data, hp.init)
    else:
        model = common.build_model(hp.arch, len(data.classes))
    example = torch.zeros(2, 3, data.size, data.size, device=device)
    model.to(device, memory_format=torch.channels_last).eval()
    common.check_network(model, example, len(data.classes))
    return model


def optimizer(hp: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]  # norm layers and biases: no weight decay
    groups = [{"params": decay, "weight_decay": hp.weight_decay}, {"params": other, "weight_decay": 0.0}]
    if hp.optimizer == "adamw":
        return torch.optim.AdamW(groups, hp.lr)
    return torch.optim.SGD(groups, hp.lr, hp.momentum, nesterov=hp.momentum > 0)


def augmented(x: Tensor, kind: str) -> Tensor:
    """What --augment adds to crop and flip.  uint8 (B, 3, S, S) -> the same.

    trivial: one random operation per image on colour, contrast or geometry (TrivialAugment, Mueller &
    Hutter 2021). trivial-noise: half of the images also get Gaussian noise, its sd uniform in [0, 0.15].
    """
    if kind == "crop-flip":
        return x
    from torchvision.transforms import v2
    policy = v2.TrivialAugmentWide()
    x = torch.stack([policy(image) for image in x])
    if kind == "trivial-noise":
        sd = 255 * 0.15 * torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5)
        x = (x + sd * torch.randn(x.shape)).round_().clamp_(0, 255).to(torch.uint8)
    return x


def check_save(save: Path) -> None:
    """InputError if the file cannot be written, now and not after an hour."""
    need(not save.is_dir(), f"--save {save}: a folder; expected a file to write")
    with common.door(f"{save}: cannot be written"):
        save.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=save.parent).close()


def train_epoch(parts: dict, hp: argparse.Namespace, data: common.Data, device: torch.device,
                bar) -> tuple[float, float]:
    """One pass over the train images; the mean loss, and top-1 in percent as training saw it."""
    model, opt, sched, g = parts.values()
    model.train()
    loss_sum, hits, steps = 0.0, 0, 0
    for x, y in common.batches(data.train, hp.batch_size, g, augment=True, drop_last=True):
        x = augmented(x, hp.augment)
        with common.autocast(device, hp.amp):
            logits = model(common.to_input(x, data.mean, data.std, device))
        if not isinstance(logits, Tensor):
            logits = logits[0]  # torchvision's Inception and GoogLeNet add heads while training
        loss = F.cross_entropy(logits.float(), y.to(device), label_smoothing=hp.label_smoothing)
        common.descend(opt, loss, f"the training loss at step {bar.n + 1}", f"--lr, now {hp.lr}")
        sched.step()
        loss_sum += loss.item()
        hits += (logits.argmax(1).cpu() == y).sum().item()
        steps += 1
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        bar.update()
    return loss_sum / steps, 100 * hits / (steps * hp.batch_size)


def pretrain(hp: argparse.Namespace, data: common.Data, save: Path, device: torch.device,
             log: common.RunLog | None = None, state: dict | None = None, eval_every: int = 1) -> float:
    """Trains a network, writes its checkpoint `save`, returns its last-epoch test accuracy in percent.

    log: where records and, for --resume, checkpoints go. state: such a checkpoint, to go on from.
    Raises InputError if the loss is no number, or if the data do not fit the state.
    """
    torch.manual_seed(hp.seed)
    g = torch.Generator().manual_seed(hp.seed)  # order and crops; on the CPU: the same on every device
    model = network(hp, data, device)
    opt = optimizer(hp, model)
    steps = len(data.train) // hp.batch_size  # the last, smaller batch of an epoch is dropped
    sched = common.one_cycle(opt, hp.lr, hp.epochs * steps, hp.warmup)
    parts = {"model": model, "opt": opt, "sched": sched, "g": g}
    first, acc, command = 0, math.nan, "short pretraining"
    if log:
        command = common.command()
    if state:
        first, acc, command = state["epoch"], state["acc"], state["command"]
        for name, part in parts.items():
            common.restored(part, state[name])
        fits = sched.total_steps == max(2, hp.epochs * steps)
        need(fits, f"--resume: {data.name} has {len(data.train)} train images now, another number")

    bar = common.progress(first * steps, hp.epochs * steps)
    for epoch in range(first, hp.epochs):
        # For dropout and TrivialAugment. Seeded in each epoch, so that a resumed run draws the same.
        torch.manual_seed(hp.seed + epoch)
        t0 = time.perf_counter()
        loss, acc_train = train_epoch(parts, hp, data, device, bar)
        rate = steps * hp.batch_size / (time.perf_counter() - t0)
        line = f"epoch {epoch + 1:3d}/{hp.epochs} | loss {loss:.4f} | train {acc_train:.2f}"
        if (epoch + 1) % eval_every == 0 or epoch + 1 == hp.epochs:
            acc = common.accuracy_pct(model, data, data.test, device)
            line += f" | test {acc:.2f}"
        bar.write(f"{line} | {rate:.0f} img/s")
        if log:
            log.write("eval", epoch=epoch + 1, iteration=(epoch + 1) * steps, loss=loss,
                      acc_train_pct=acc_train, acc_pct=acc, img_per_s=rate)
        if log and (epoch + 1) % hp.checkpoint_every == 0:
            states = {name: common.state_of(part) for name, part in parts.items()}
            common.save_checkpoint(log, hp, crc=0, epoch=epoch + 1, acc=acc, command=command, **states)
    bar.close()
    about = {"arch": hp.arch, "dataset": data.name, "classes": data.classes, "mean": data.mean,
             "std": data.std, "size": data.size, "acc_pct": acc, "command": command, "seed": hp.seed}
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    common.save_atomic({"state_dict": weights} | about, save)
    return acc


def short(arch: str, data: common.Data, save: Path, device: torch.device) -> float:
    """What common.find_weights falls back on for the embedded data: a few minutes."""
    check_save(save)
    amp = common.has_fast_bf16(device)
    hp = common.defaults(build_parser, arch=arch, epochs=8, batch_size=64, lr=0.02, amp=amp)
    return pretrain(hp, data, save, device, eval_every=8)


# ===== Embedded data ================================================================================


def write_npz(arrays: dict, path: Path) -> None:
    with path.open("wb") as file:  # given a path, numpy would change the name
        np.savez_compressed(file, **arrays)


def embed(args: argparse.Namespace) -> None:
    """data/fashion_mnist.npz: all test images, and the first train images of each class."""
    from torchvision import datasets

    save = Path(args.save or ROOT / "data" / "fashion_mnist.npz").with_suffix(".npz")
    check_save(save)
    with common.door(f"FashionMNIST: not in {args.data_dir}, and the download failed"):
        train, test = [datasets.FashionMNIST(args.data_dir, t, download=True) for t in (True, False)]
    first = [(train.targets == c).nonzero()[:args.per_class, 0] for c in range(10)]
    keep = torch.cat(first).sort().values
    arrays = dict(classes=np.array(train.classes), train_images=train.data[keep].numpy(),
                  train_labels=train.targets[keep].numpy(), test_images=test.data.numpy(),
                  test_labels=test.targets.numpy())
    common.save_atomic(arrays, save, write_npz)
    print(f"{save}: {len(keep)} train and {len(test)} test images")


# ===== Run ==========================================================================================


def main(args: argparse.Namespace) -> None:
    if args.what == "embed":
        return embed(args)
    device = common.pick_device(args.device)
    if args.amp is None:
        args.amp = common.has_fast_bf16(device)
    data = common.load_data(args.dataset, args.data_dir, args.size)
    need(data.train is not None, f"--dataset {args.dataset}: no train/ folder beside val/")
    n = len(data.train)
    need(n >= args.batch_size, f"--batch-size {args.batch_size}: {data.name} has only {n} train images")
    network(args, data, device)  # a wrong name, size or --init ends here, before anything is written
    save = Path(args.save or ROOT / "weights" / f"{data.name}_{common.short_name(args.arch)}.pt")
    free = args.save or not save.exists()
    need(free, f"{save}: is there already; name another file by --save, or delete it")
    check_save(save)
    # 0 for all weights: the checkpoint holds those of its run, so the file of --init may have changed.
    state = common.load_checkpoint(args, crc=0)
    out = common.new_folder(args, f"runs/pretrain/{save.stem}")
    log = common.RunLog(out, args, device, state=state)
    acc = pretrain(args, data, save, device, log, state)
    log.write("end", acc_pct=acc, wall_s=log.seconds(), peak_mib=common.peak_mib(),
              bytes=save.stat().st_size)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"{save}: {args.arch} on {data.name}, last epoch top-1 {acc:.2f} %")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    seeds = np.atleast_1d(args.seed).tolist()
    need(len(seeds) == 1, "--seed: expected one; a file holds the weights of one run")
    args.seed = seeds[0]
    return args


if __name__ == "__main__":
    common.run(main, parse)
