"""Claims about tools/pretrain.py. Each docstring ends with the change under which its test failed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import InputError
from tools import pretrain
from tools.pretrain import build_parser

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path):
    """A .npz of 64 train and 32 test images in 2 classes that differ in brightness."""
    rng = np.random.default_rng(0)
    y = np.arange(96) % 2
    x = np.clip(rng.normal(80 + 90 * y[:, None, None], 30, (96, 32, 32)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", train_images=x[:64], train_labels=y[:64], test_images=x[64:],
             test_labels=y[64:])
    return tmp_path / "tiny.npz"


def go(tiny, save, log=None, **changes):
    """Three short epochs, or as `changes` say; the weights of the checkpoint."""
    flags = dict(arch="resnet8", dataset=str(tiny), epochs=3, batch_size=16, warmup=0.3) | changes
    hp = common.defaults(build_parser, **flags)
    pretrain.pretrain(hp, common.load_data(str(tiny)), save, CPU, log)
    return torch.load(save, weights_only=True)["state_dict"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(run, n) stops run() in epoch n, after its last step, before its state is written."""
    evaluate = common.accuracy_pct

    def call(run, n):
        calls = []

        def accuracy_pct(*args):
            calls.append(1)
            if len(calls) == n:
                raise KeyboardInterrupt
            return evaluate(*args)

        with monkeypatch.context() as m:
            m.setattr(common, "accuracy_pct", accuracy_pct)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                run()

    return call


# ----- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"augment": "trivial-noise"}, {"optimizer": "adamw", "lr": 0.003}])
def test_pretraining_resumed_equals_uninterrupted_bitwise(tiny, tmp_path, interrupted, changes):
    """Fails if the shuffling generator or the optimizer is not in the state, or torch is not seeded anew
    each epoch."""
    whole = go(tiny, tmp_path / "whole.pt", **changes)
    interrupted(lambda: go(tiny, tmp_path / "parts.pt", **changes), 3)
    assert torch.load(tmp_path / "parts.pt.resume", weights_only=True)["epoch"] == 1
    assert equal(whole, go(tiny, tmp_path / "parts.pt", resume=True, **changes))
    assert not (tmp_path / "parts.pt.resume").exists()


@pytest.mark.parametrize("flag, other", [
    ("epochs", 4), ("lr", 0.05), ("optimizer", "adamw"), ("augment", "trivial"), ("seed", 1),
    ("arch", "resnet14")])
def test_resuming_with_another_flag_is_refused(tiny, tmp_path, interrupted, flag, other):
    """And names it. Fails if the state does not keep its flags, or they are not compared."""
    interrupted(lambda: go(tiny, tmp_path / "w.pt"), 2)
    with pytest.raises(InputError, match=f"another --{flag} .*now {other}"):
        go(tiny, tmp_path / "w.pt", resume=True, **{flag: other})


def make_older(save):
    """States once were without the flags, and else the same."""
    file = save.with_name(save.name + ".resume")
    state = torch.load(file, weights_only=True)
    del state["args"]
    assert set(state) == {"model", "opt", "sched", "g", "epoch", "wall_s"}
    torch.save(state, file)


def test_an_older_state_without_flags_resumes(tiny, tmp_path, interrupted):
    """Bitwise. Fails if a state without `args` is no state."""
    whole = go(tiny, tmp_path / "whole.pt")
    interrupted(lambda: go(tiny, tmp_path / "parts.pt"), 2)
    make_older(tmp_path / "parts.pt")
    assert equal(whole, go(tiny, tmp_path / "parts.pt", resume=True))


@pytest.mark.parametrize("flag, other", [("arch", "resnet14"), ("epochs", 4), ("optimizer", "adamw")])
def test_an_older_state_that_does_not_fit_is_one_line(tiny, tmp_path, interrupted, flag, other):
    """Fails if load_state_dict's many lines, or the schedule's in the last epoch, reach the user."""
    interrupted(lambda: go(tiny, tmp_path / "w.pt"), 2)
    make_older(tmp_path / "w.pt")
    with pytest.raises(InputError, match="other flags"):
        go(tiny, tmp_path / "w.pt", resume=True, **{flag: other})


def test_the_log_of_a_resumed_run_has_every_epoch_once(tiny, tmp_path, monkeypatch, interrupted):
    """Interrupted between the record of epoch 2 and its state; and wall_s is the time of both stretches.

    Fails if that record stays in the log, or if the clock starts anew.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    command = f"--arch resnet8 --dataset {tiny} --epochs 3 --batch-size 16 --save w.pt --out o".split()
    save_atomic, saved = common.save_atomic, []

    def second_fails(obj, path):
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save_atomic(obj, path)

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(common, "save_atomic", second_fails)
        common.run(pretrain.main, pretrain.parse, command)
    state = torch.load("w.pt.resume", weights_only=True)
    torch.save(state | {"wall_s": 1000.0}, "w.pt.resume")
    common.run(pretrain.main, pretrain.parse, [*command, "--resume"])
    log = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").open()]
    assert [r.get("epoch", r["event"]) for r in log] == ["start", 1, "start", 2, 3, "end"]
    assert log[-1]["wall_s"] > 1000


# ----- training --------------------------------------------------------------------------------------


def test_pretraining_goes_on_from_a_checkpoint(tiny, tmp_path):
    """With next to no learning rate the weights are those of --init. Fails if they are random."""
    a = go(tiny, tmp_path / "first.pt", epochs=1)
    b = go(tiny, tmp_path / "second.pt", epochs=1, lr=1e-12, seed=1, init=str(tmp_path / "first.pt"))
    assert torch.allclose(a["conv1.weight"], b["conv1.weight"], atol=1e-6)


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


def test_adamw_learns(tiny, tmp_path):
    """Bright against dark images, three epochs. Fails if --lr or the schedule does not reach AdamW."""
    go(tiny, tmp_path / "w.pt", optimizer="adamw", lr=0.003, epochs=6)
    assert torch.load(tmp_path / "w.pt", weights_only=True)["acc_pct"] > 90


@pytest.mark.parametrize("warmup, steps", [(0.2, 5), (1.0, 5), (0.0, 5), (0.5, 2), (1.0, 1)])
def test_every_warmup_makes_a_schedule(warmup, steps):
    """Also one step or all of them: torch divides by zero there. Fails if the phases are torch's own."""
    hp = common.defaults(build_parser, warmup=warmup)
    opt = pretrain.optimizer(hp, torch.nn.Linear(2, 2))
    sched, rates = common.one_cycle(opt, hp.lr, steps, hp.warmup), []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        sched.step()
    assert max(rates) <= 0.1 + 1e-9 and all(r >= 0 for r in rates)
    assert warmup == 1 or rates[-1] < 1e-5 or steps == 1


def test_short_pretraining_is_what_find_weights_falls_back_on(tiny, tmp_path, monkeypatch):
    """8 epochs of 64 images a step, lr 0.02, one evaluation.

    Fails if a setting changes: with it goes the accuracy that a first run of gdfq.py starts from.
    """
    seen = {}
    monkeypatch.setattr(pretrain, "pretrain", lambda hp, *args, **kw: seen.update(vars(hp), **kw))
    pretrain.short("resnet8", None, tmp_path / "w.pt", CPU)
    expected = dict(arch="resnet8", epochs=8, batch_size=64, lr=0.02, momentum=0.9, weight_decay=5e-4,
                    warmup=0.2, label_smoothing=0.0, augment="crop-flip", optimizer="sgd", seed=0,
                    init=None, amp=common.has_fast_bf16(CPU), command="short pretraining", eval_every=8)
    assert {k: seen[k] for k in expected} == expected


# ----- the command -----------------------------------------------------------------------------------


def test_pretrain_command_writes_a_checkpoint_that_knows_itself(tiny, tmp_path):
    """Arch, classes, normalisation, accuracy, command and seed, readable with weights_only.

    Fails if one is missing.
    """
    command = f"--arch resnet8 --dataset {tiny} --epochs 4 --batch-size 16 --save {tmp_path}/w.pt"
    common.run(pretrain.main, pretrain.parse, [*command.split(), "--out", f"{tmp_path}/o"])
    ck = torch.load(tmp_path / "w.pt", weights_only=True)
    about = {"state_dict", "arch", "classes", "mean", "std", "size", "acc_pct", "command", "seed"}
    assert about <= set(ck)
    log = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").open()]
    assert [r["event"] for r in log] == ["start", *["eval"] * 4, "end"]
    assert log[-1]["acc_pct"] == ck["acc_pct"]
    data = common.load_data(str(tiny))
    model, data, source = common.find_weights("resnet8", str(tiny), data, str(tmp_path / "w.pt"), CPU)
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


@pytest.mark.parametrize("resume", ["", "--resume"])
def test_shipped_weights_are_not_replaced_by_accident(resume, fails, tmp_path, monkeypatch):
    """By a bare command. Fails if thirty epochs on 5,000 images end in the place of better ones."""
    monkeypatch.chdir(tmp_path)
    assert "fashion_resnet20.pt: is there already; name another" in fails(pretrain, f"--batch-size 16 {resume}")


def test_a_network_that_calls_view_can_be_trained(tiny, tmp_path, monkeypatch):
    """Fails if what is checked is not what is trained."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("""
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).view(len(x), -1))
def make(n):
    return Net(nn.Conv2d(3, 4, 5, 4), nn.Linear(196, n))
""")
    command = f"--arch net.py:make --dataset {tiny} --epochs 1 --batch-size 16 --save w.pt"
    common.run(pretrain.main, pretrain.parse, command.split())
    assert "acc_pct" in torch.load("w.pt", weights_only=True)


@pytest.mark.parametrize("command, says", [
    ("--arch vit_b_16", "(2, 3, 32, 32)"),
    ("--arch resnet1", "no such network"),
    ("--batch-size 65", "only 64 train images"),
    ("--batch-size 1", "at least 2"),
    ("--save /proc/none/w.pt --arch resnet8 --epochs 1 --batch-size 16", "/proc/none"),
    ("--save . --arch resnet8 --batch-size 16", "a folder"),
    ("--init none.pt --arch resnet8 --batch-size 16", "no such file"),
    ("--lr 1e30 --arch resnet8 --epochs 1 --batch-size 16 --save w.pt", "lower --lr"),
    ("--epochs 0", "at least 1"),
    ("embde", "invalid choice"),
])
def test_a_mistake_in_pretraining_is_one_line(tiny, tmp_path, monkeypatch, fails, command, says):
    """Fails if a traceback reaches the user."""
    monkeypatch.chdir(tmp_path)
    assert says in fails(pretrain, f"{command} --dataset {tiny}")
