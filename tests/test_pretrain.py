"""Claims about tools/pretrain.py. Each docstring ends with the change under which its test failed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from tools import pretrain
from tools.pretrain import build_parser

CPU = torch.device("cpu")


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """train("--flag ...") runs three short epochs, or what the flags say, and gives what is in w.pt."""
    monkeypatch.chdir(tmp_path)
    usual = f"--arch resnet8 --dataset {tiny} --epochs 3 --batch-size 16 --warmup 0.3 --save w.pt"

    def call(flags: str = "", usual: str = f"{usual} --out o") -> dict:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *usual.split(), *flags.split()])
        common.run(pretrain.main, pretrain.parse)
        return torch.load("w.pt", weights_only=True)

    return call


@pytest.fixture
def interrupted(train, monkeypatch):
    """interrupted("--flag ...", 2): as train, stopped in the second epoch, after its last step."""
    def call(flags: str, epoch: int) -> None:
        evaluate, calls = common.accuracy_pct, []

        def accuracy_pct(*args):
            calls.append(args)
            if len(calls) == epoch:
                raise KeyboardInterrupt
            return evaluate(*args)

        with monkeypatch.context() as m, pytest.raises(SystemExit):
            m.setattr(common, "accuracy_pct", accuracy_pct)
            train(flags)

    return call


def equal(a: dict, b: dict) -> bool:
    a, b = a["state_dict"], b["state_dict"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "", "--augment trivial-noise", "--optimizer adamw --lr 0.003", "--checkpoint-every 2"])
def test_pretraining_resumed_equals_uninterrupted_bitwise(train, interrupted, flags):
    """And has the command that began it. Fails if the shuffling generator or the optimizer is not in the
    checkpoint, or if torch is not seeded anew in each epoch."""
    whole = train(f"{flags} --out whole")
    interrupted(flags, 3)
    parts = train("--resume o", usual="")
    assert equal(whole, parts) and parts["acc_pct"] == whole["acc_pct"]
    assert parts["command"] == whole["command"].replace(" --out whole", "")
    assert not Path("o/checkpoint.pt").exists()


def test_the_log_of_a_resumed_run_has_every_epoch_once(train, monkeypatch):
    """Interrupted between the record of epoch 2 and its checkpoint. wall_s counts both stretches.

    Fails if that record stays in the log, or if the clock starts anew.
    """
    save, saved = common.save_checkpoint, []

    def second_fails(log, args, **state):
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt
        log.t0 -= 1000
        save(log, args, **state)

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(common, "save_checkpoint", second_fails)
        train()
    train("--resume o", usual="")
    log = [json.loads(line) for line in Path("o/log.jsonl").open()]
    assert [r.get("epoch", r["event"]) for r in log] == ["start", 1, "start", 2, 3, "end"]
    assert log[-1]["wall_s"] > 1000


def test_a_run_whose_images_became_more_does_not_resume(tiny, interrupted, fails, capsys):
    """Its schedule ends elsewhere. Fails if torch's error about the number of steps reaches the user."""
    np.savez("my.npz", **np.load(tiny))
    interrupted("--dataset my.npz", 3)
    arrays = dict(np.load(tiny))
    arrays |= {k: np.concatenate([arrays[k]] * 2) for k in ("train_images", "train_labels")}
    np.savez("my.npz", **arrays)
    capsys.readouterr()
    assert "has 128 train images now" in fails(pretrain, "--resume o")


# ----- training --------------------------------------------------------------------------------------


def test_pretraining_goes_on_from_a_checkpoint(train):
    """With next to no learning rate the weights are those of --init. Fails if they are random."""
    a = train("--epochs 1")
    Path("w.pt").rename("first.pt")
    b = train("--epochs 1 --lr 1e-12 --seed 1 --init first.pt --out second")
    assert torch.allclose(a["state_dict"]["conv1.weight"], b["state_dict"]["conv1.weight"], atol=1e-6)


def test_one_step_of_adamw_moves_every_weight_by_the_learning_rate():
    """Adam's first step is lr sign(gradient); BatchNorm and biases do not decay.

    Fails if --optimizer is not read, or the weight decay is the same in both groups.
    """
    model = common.build_model("resnet8", 2)
    hp = common.defaults(build_parser, optimizer="adamw", lr=0.01, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = pretrain.optimizer(hp, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    for n, p in model.named_parameters():
        kept = 1 - 0.01 * 0.5 if p.ndim > 1 else 1
        assert torch.allclose(p, kept * before[n] - 0.01, atol=1e-6), n


def test_adamw_learns(train):
    """Images of four brightnesses. Fails if --lr or the schedule does not reach AdamW."""
    assert train("--optimizer adamw --lr 0.003 --epochs 12")["acc_pct"] > 70


@pytest.mark.parametrize("warmup, steps", [(0.2, 5), (1.0, 5), (0.0, 5), (0.5, 2), (1.0, 1)])
def test_every_warmup_makes_a_schedule(warmup, steps):
    """Also one step or all of them: torch divides by zero there. Fails if the phases are torch's own."""
    opt = pretrain.optimizer(common.defaults(build_parser), torch.nn.Linear(2, 2))
    sched, rates = common.one_cycle(opt, 0.1, steps, warmup), []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        sched.step()
    assert max(rates) <= 0.1 + 1e-9 and all(r >= 0 for r in rates)
    assert warmup == 1 or rates[-1] < 1e-5 or steps == 1


def test_short_pretraining_is_what_find_weights_falls_back_on(tmp_path, monkeypatch):
    """8 epochs of 64 images per step, lr 0.02, one evaluation.

    Fails if a setting changes: with it goes the accuracy that a first run of gdfq.py starts from.
    """
    seen = {}
    monkeypatch.setattr(pretrain, "pretrain", lambda hp, *args, **kw: seen.update(vars(hp), **kw))
    pretrain.short("resnet8", None, tmp_path / "w.pt", CPU)
    expected = dict(arch="resnet8", epochs=8, batch_size=64, lr=0.02, momentum=0.9, weight_decay=5e-4,
                    warmup=0.2, label_smoothing=0.0, augment="crop-flip", optimizer="sgd", seed=0,
                    init=None, amp=common.has_fast_bf16(CPU), eval_every=8)
    assert {k: seen[k] for k in expected} == expected


# ----- the command -----------------------------------------------------------------------------------


def test_pretrain_command_writes_a_checkpoint_that_knows_itself(train, tiny):
    """Arch, classes, normalisation, accuracy, command and seed, readable with weights_only.

    Fails if one is missing.
    """
    ck = train("--seed 3")
    about = {"state_dict", "arch", "dataset", "classes", "mean", "std", "size", "acc_pct", "command"}
    assert ck.keys() == about | {"seed"} and ck["seed"] == 3 and ck["command"].endswith("--seed 3")
    log = [json.loads(line) for line in Path("o/log.jsonl").open()]
    assert [r["event"] for r in log] == ["start", *["eval"] * 3, "end"]
    assert log[-1]["acc_pct"] == ck["acc_pct"]
    model, data, source = common.find_weights("resnet8", "", common.load_data(str(tiny)), "w.pt", CPU)
    assert common.accuracy_pct(model, data, data.test, CPU) == ck["acc_pct"] and "w.pt" in source


def test_embed_keeps_all_test_images_and_the_first_train_images_of_each_class(tmp_path, monkeypatch):
    """In file order. Fails if other images are kept, or the classes come one after the other."""
    from torchvision import datasets

    class Fake:
        classes = list("abcdefghij")

        def __init__(self, root, train, download):
            n = 200 if train else 40
            g = torch.Generator().manual_seed(n)
            self.data = torch.randint(0, 256, (n, 28, 28), generator=g).byte()
            self.targets = torch.randperm(n, generator=g) % 10

        def __len__(self):
            return len(self.targets)

    monkeypatch.setattr(datasets, "FashionMNIST", Fake)
    file = tmp_path / "f.npz"
    common.run(pretrain.main, pretrain.parse, f"embed --per-class 3 --save {file}".split())
    train, test, npz = Fake("", True, False), Fake("", False, False), np.load(file)
    y = train.targets.tolist()
    first = [i for i in range(200) if y[:i].count(y[i]) < 3]
    assert len(first) == 30 and np.array_equal(npz["train_images"], train.data[first])
    assert npz["train_labels"].tolist() == [y[i] for i in first]
    assert np.array_equal(npz["test_images"], test.data) and len(npz["classes"]) == 10


def test_a_network_that_calls_view_can_be_trained(train):
    """Fails if what is checked is not what is trained."""
    Path("net.py").write_text("""
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).view(len(x), -1))
def make(n):
    return Net(nn.Conv2d(3, 4, 5, 4), nn.Linear(196, n))
""")
    assert "acc_pct" in train("--arch net.py:make --epochs 1")


@pytest.mark.parametrize("flags, says", [
    ("--arch vit_b_16", "(2, 3, 32, 32)"),
    ("--arch resnet1", "no such network"),
    ("--batch-size 65", "only 64 train images"),
    ("--batch-size 1", "--batch-size"),
    ("--save /proc/none/w.pt", "/proc/none/w.pt: cannot be written"),
    ("--save .", "a folder"),
    ("--init none.pt", "no such file"),
    ("--seed 0 1", "--seed: expected one"),
    ("--epochs 0", "--epochs"),
    ("--dataset fashion --arch resnet20", "fashion_resnet20.pt: is there already; name another"),
    ("--resume o", "leave out --arch"),
    ("embde", "invalid choice"),
])
def test_a_mistake_is_one_line_and_writes_nothing(tiny, tmp_path, monkeypatch, fails, flags, says):
    """Shipped weights stay as they are. Fails if the user sees a traceback, or if a file is left."""
    monkeypatch.chdir(tmp_path)
    assert says in fails(pretrain, f"--arch resnet8 --dataset {tiny} --batch-size 16 {flags}")
    assert not list(tmp_path.iterdir())


def test_a_learning_rate_that_makes_nan_is_one_line_and_no_weights(train, capsys):
    """Fails if torch goes on with NaN, or if w.pt is written."""
    with pytest.raises(SystemExit):
        train("--lr 1e30")
    assert "lower --lr" in capsys.readouterr().err and not Path("w.pt").exists()
