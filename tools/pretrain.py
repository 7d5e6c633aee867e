"""Full-precision networks: what gdfq.py quantizes, and what cema.py and tdmr.py start from.

    python tools/pretrain.py --arch resnet20 --dataset cifar100 --epochs 50   # 66.9 %; an hour, 2 cores
    python tools/pretrain.py --arch resnet18 --dataset path/to/images         # train/ and val/ in it
    python tools/pretrain.py embed                                            # data/fashion_mnist.npz

The checkpoint knows its own classes, normalisation, accuracy, command and seed. It is of the last epoch,
never of the best. After every epoch <checkpoint>.resume is written; --resume goes on from there.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from common import ROOT, InputError, number  # noqa: E402
from tools.weights import same_classes  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    p = common.Parser(prog="tools/pretrain.py", description=__doc__)
    share, positive, yes_no = number(float, 0, 1), number(float, 0), argparse.BooleanOptionalAction
    p.add_argument("what", nargs="?", default="pretrain", choices=["pretrain", "embed"],
                   help="embed: make the embedded data from the full Fashion-MNIST")
    a = p.add_argument_group("task").add_argument
    a("--arch", default="resnet20", help="resnet8/20/.../110, resnet20x2, torchvision's, FILE.py:NAME")
    a("--dataset", default="fashion",
      help="fashion, fashion-mnist, cifar10, cifar100, imagenet, a folder, a .npz")
    a("--data-dir", default="data", help="where cifar, imagenet, fashion-mnist lie or are downloaded to")
    a("--size", type=number(int, 8), help="px at which a folder is read; None: 32, 64 or 224, as fits")
    a("--save", help="file to write; None: weights/<dataset>_<arch>.pt, or data/fashion_mnist.npz")
    a("--init", help="checkpoint of the same --arch and classes to start from; None: random weights")
    a = p.add_argument_group("training").add_argument
    a("--epochs", type=number(int, 1), default=30, help="passes over the train images")
    a("--batch-size", type=number(int, 2), default=128, help="images a step")
    a("--optimizer", default="sgd", choices=["sgd", "adamw"], help="sgd: Nesterov")
    a("--lr", type=positive, default=0.1, help="peak of the one-cycle schedule; adamw: 3e-3 to 1e-2")
    a("--momentum", type=share, default=0.9, help="of sgd; adamw keeps its betas, 0.9 and 0.999")
    a("--weight-decay", type=positive, default=5e-4, help="not on biases and norm layers")
    a("--warmup", type=share, default=0.2, help="share of the steps in which the learning rate rises")
    a("--label-smoothing", type=share, default=0.0,
      help="0.1 may add a few tenths; it also keeps entropies up, and CEMA reads entropies")
    a("--augment", default="crop-flip", choices=["crop-flip", "trivial", "trivial-noise"],
      help="trivial: TrivialAugment after crop and flip; slower to learn, far better under corruption. "
           "-noise: and Gaussian noise")
    a = p.add_argument_group("run").add_argument
    a("--out", help="folder for log.jsonl; None: runs/pretrain/<dataset>_<arch>")
    a("--seed", type=number(int, 0, 2**63 - 1), default=0, help="initialisation, order and augmentation")
    a("--device", default="auto", help="auto, cpu, cuda, mps")
    a("--workers", type=number(int, 0, 256), help="that decode a folder's images; None: 1 to 8")
    a("--amp", action=yes_no, help="bf16 autocast; None: where the hardware has it")
    a("--resume", action=yes_no, default=False, help="go on after the last finished epoch")
    a("--per-class", type=number(int, 1), default=500, help="of embed: train images kept of each class")
    return p


# ===== Training =====================================================================================

PARTS = ("model", "opt", "sched", "g")  # of a state: with them an interrupted run equals a whole one


def network(hp: argparse.Namespace, data: common.Data, device: torch.device) -> nn.Module:
    """With random weights, or those of --init. InputError for one that does not fit the data."""
    if hp.init:
        model, about = common.load_network(Path(hp.init), hp.arch, len(data.classes))
        same_classes(model, about.get("classes", data.classes), data, hp.init)
    else:
        model = common.build_model(hp.arch, len(data.classes))
    example = torch.zeros(2, 3, data.size, data.size, device=device)
    model.to(device, memory_format=torch.channels_last).eval()
    common.check_network(model, example, len(data.classes))
    return model


def optimizer(hp: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]  # BN affine and biases: no weight decay
    groups = [{"params": decay, "weight_decay": hp.weight_decay}, {"params": other, "weight_decay": 0.0}]
    if hp.optimizer == "adamw":
        return torch.optim.AdamW(groups, hp.lr)
    return torch.optim.SGD(groups, hp.lr, hp.momentum, nesterov=hp.momentum > 0)


def augmented(x: Tensor, kind: str) -> Tensor:
    """What --augment adds to crop and flip.  uint8 (B, 3, S, S) -> the same.

    trivial: one random operation an image (colour, contrast, geometry: TrivialAugment, Mueller & Hutter
    2021). trivial-noise: and Gaussian noise, its sd uniform in [0, 0.15], on half of the images.
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


def last_state(hp: argparse.Namespace, save: Path) -> dict | None:
    """--resume: the state after the last finished epoch, if there is one. InputError for other flags."""
    file = save.with_name(save.name + ".resume")
    if not (hp.resume and file.exists()):
        return None
    state = common.load_file(file, (*PARTS, "epoch", "wall_s"), "a pretraining state")
    if "args" in state:  # older states do not have their flags
        common.load_checkpoint(file, hp)
    return state


def pretrain(hp: argparse.Namespace, data: common.Data, save: Path, device: torch.device,
             log: common.RunLog | None = None, command: str = "", eval_every: int = 1) -> float:
    """Train a network, write its checkpoint `save`, return its last-epoch test accuracy in percent."""
    torch.manual_seed(hp.seed)
    g = torch.Generator().manual_seed(hp.seed)  # order and crops; on the CPU: the same on every device
    model = network(hp, data, device)
    opt = optimizer(hp, model)
    steps = len(data.train) // hp.batch_size  # the last, smaller batch of an epoch is dropped
    sched = common.one_cycle(opt, hp.lr, hp.epochs * steps, hp.warmup)
    file = save.with_name(save.name + ".resume")
    parts = dict(zip(PARTS, (model, opt, sched, g)))
    first, acc = 0, math.nan
    if state := last_state(hp, save):
        try:
            for name, part in parts.items():
                common.restored(part, state[name])
            fits = sched.total_steps == hp.epochs * steps
        except (RuntimeError, ValueError, KeyError):
            fits = False
        if not fits:  # an older state; of the others last_state names the flag
            raise InputError(f"--resume: {file} was made with other flags; repeat them")
        first = state["epoch"] + 1
        print(f"resuming after epoch {first}", flush=True)

    bar = common.Progress(first * steps, hp.epochs * steps)
    ticks = iter(bar)
    for epoch in range(first, hp.epochs):
        model.train()
        # Of dropout and TrivialAugment; each epoch anew, so that --resume goes on with the same draws.
        torch.manual_seed(hp.seed + epoch)
        t0, loss_sum, hits = time.time(), 0.0, 0
        for x, y in common.batches(data.train, hp.batch_size, g, augment=True, drop_last=True):
            x = augmented(x, hp.augment)
            with common.autocast(device, hp.amp):
                logits = model(common.to_input(x, data.mean, data.std, device))
            if not isinstance(logits, Tensor):
                logits = logits[0]  # torchvision's Inception and GoogLeNet add heads while training
            loss = F.cross_entropy(logits.float(), y.to(device), label_smoothing=hp.label_smoothing)
            common.descend(opt, loss, f"the training loss in epoch {epoch + 1}", f"--lr, now {hp.lr}")
            sched.step()
            loss_sum += loss.item()
            hits += (logits.argmax(1).cpu() == y).sum().item()
            next(ticks)
            bar.show(f"epoch {epoch + 1} | loss {loss.item():.3f}")
        n, train_s = steps * hp.batch_size, time.time() - t0
        mean_loss, acc_train = loss_sum / steps, 100 * hits / n
        line = f"epoch {epoch + 1:3d}/{hp.epochs} | loss {mean_loss:.4f} | train {acc_train:.2f}"
        if (epoch + 1) % eval_every == 0 or epoch + 1 == hp.epochs:
            acc = common.accuracy_pct(model, data, data.test, device)
            line += f" | test {acc:.2f}"
        print(f"{line} | {n / train_s:.0f} img/s", flush=True)
        if log:
            log.write("eval", epoch=epoch + 1, iteration=(epoch + 1) * steps, loss=mean_loss,
                      acc_train_pct=acc_train, acc_pct=acc, img_per_s=n / train_s)
        state = {name: common.state_of(part) for name, part in parts.items()}
        common.save_atomic({"args": common.flat(hp), **state, "epoch": epoch,
                            "wall_s": log.seconds() if log else 0.0}, file)
    next(ticks, None)  # closes the bar
    if first >= hp.epochs:  # it was interrupted between its last epoch and its end
        acc = common.accuracy_pct(model, data, data.test, device)
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    about = {"arch": hp.arch, "dataset": data.name, "classes": data.classes, "mean": data.mean,
             "std": data.std, "size": data.size, "acc_pct": acc, "command": command, "seed": hp.seed}
    common.save_atomic({"state_dict": weights} | about, save)
    file.unlink(missing_ok=True)
    return acc


def short(arch: str, data: common.Data, save: Path, device: torch.device) -> float:
    """What common.find_weights falls back on for the embedded data: a few minutes."""
    amp = common.has_fast_bf16(device)
    hp = common.defaults(build_parser, arch=arch, epochs=8, batch_size=64, lr=0.02, amp=amp, resume=True)
    try:
        last_state(hp, save)
    except InputError:  # that of another training
        hp.resume = False
    return pretrain(hp, data, save, device, command="short pretraining", eval_every=8)


# ===== Embedded data ================================================================================


def write_npz(arrays: dict, path: Path) -> None:
    with path.open("wb") as file:  # of a path numpy would change the name
        np.savez_compressed(file, **arrays)


def embed(args: argparse.Namespace) -> None:
    """data/fashion_mnist.npz: all test images, and the first train images of each class."""
    from torchvision import datasets

    save = Path(args.save or ROOT / "data" / "fashion_mnist.npz").with_suffix(".npz")
    common.check_out(save.parent).mkdir(parents=True, exist_ok=True)
    try:
        train, test = [datasets.FashionMNIST(args.data_dir, t, download=True) for t in (True, False)]
    except Exception as e:  # URLError, a failed checksum, a read-only folder: all mean "no data"
        raise InputError(f"FashionMNIST: not in {args.data_dir}, and no download ({e})") from None
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
    args.amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data = common.load_data(args.dataset, args.data_dir, args.size)
    if data.train is None:
        raise InputError(f"--dataset {args.dataset}: no train/ folder beside val/")
    # A wrong name, size or --init ends here, before anything is written.
    network(args, data, device)
    if (n := len(data.train)) < args.batch_size:
        raise InputError(f"--batch-size {args.batch_size}: {data.name} has only {n} train images")
    save = Path(args.save or ROOT / "weights" / f"{data.name}_{common.short_name(args.arch)}.pt")
    if save.is_dir():
        raise InputError(f"--save {save}: a folder; expected a file to write")
    common.check_out(save.parent)
    out = Path(args.out or Path("runs") / "pretrain" / save.stem)
    state_file = save.with_name(save.name + ".resume")
    # Finished is a run whose file is there.
    common.check_out(out, args, state_file if save.exists() else out)
    if save.exists() and not args.save and not (args.resume and state_file.exists()):
        raise InputError(f"{save}: is there already; name another file by --save, or delete it")
    state = last_state(args, save)
    # The log loses the record of an epoch whose state was never written: that epoch comes again.
    log = common.RunLog(out, resumed_at=(state["epoch"] + 1) * (n // args.batch_size) if state else 0)
    if not state:  # or --resume would take up the run before this one
        state_file.unlink(missing_ok=True)
    log.t0 -= state["wall_s"] if state else 0.0  # the time of all stretches together
    log.start(args, device)
    acc = pretrain(args, data, save, device, log, common.command())
    log.write("end", acc_pct=acc, wall_s=log.seconds(), peak_mib=common.peak_mib(),
              bytes=save.stat().st_size)
    print(f"{save}: {args.arch} on {data.name}, last epoch top-1 {acc:.2f} %")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


if __name__ == "__main__":
    common.run(main, parse)
