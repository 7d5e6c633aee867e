"""Claims about common.py. Each docstring ends with the change under which its test was seen to fail."""

import argparse
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import common
from common import InputError, ROOT

CPU = torch.device("cpu")


# ----- entropy and BatchNorm -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 5, 6, 6), (32, 7)])
def test_batch_moments_equal_var_mean_and_its_gradient(shape):
    """Against torch.var_mean, biased. Fails if var is unbiased, or the 2 of d var/dx is missing."""
    x = torch.randn(shape, requires_grad=True)
    dims = tuple(i for i in range(x.ndim) if i != 1)
    var, mean = torch.var_mean(x, dims, correction=0)
    a, b = torch.randn(2, shape[1])
    want, = torch.autograd.grad((a * mean + b * var).sum(), x)
    ours_mean, ours_var = common.BatchMoments.apply(x)
    got, = torch.autograd.grad((a * ours_mean + b * ours_var).sum(), x)
    assert torch.allclose(ours_mean, mean, atol=1e-6) and torch.allclose(ours_var, var, atol=1e-5)
    assert torch.allclose(got, want, atol=1e-6)


# ----- fake quantization -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("lo, hi", [(-1.0, 2.0), (0.5, 2.0), (-2.0, -0.5), (-0.37, 0.91)])
def test_fake_quant_equals_a_plain_loop(bits, lo, hi):
    """Zero stays exactly zero, also where the range has one sign. Fails if it is not widened to hold 0,
    if z is not rounded, or if codes reach 2^bits.
    """
    x = torch.empty(500, dtype=torch.float64).uniform_(lo - 1, hi + 1)
    x[0] = 0
    ours = common.fake_quant(x, *torch.tensor([lo, hi], dtype=torch.float64), bits)
    last = 2**bits - 1
    s = (max(hi, 0) - min(lo, 0)) / last
    z = round(min(lo, 0) / s)
    loop = [s * (min(max(round(v / s) - z, 0), last) + z) for v in x.tolist()]
    assert ours.tolist() == pytest.approx(loop, abs=1e-12) and ours[0] == 0




@pytest.mark.parametrize("bits", range(2, 9))
def test_one_signed_channels_have_codes_that_fit(bits):
    """Only positive, negative or zero weights. Fails if the range is not widened to hold 0."""
    w = torch.stack([torch.rand(9) + 0.5, -torch.rand(9) - 0.5, torch.zeros(9), torch.randn(9)])
    code, s, z = common.WeightQuantizer(bits, "nearest").codes(w)
    assert (s > 0).all() and code.min() >= 0 and code.max() <= 2**bits - 1
    assert (z <= 0).all() and (z >= -(2**bits - 1)).all()
    assert ((code + z) * s - w).abs().max() <= s.max() / 2 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_straight_through_gradient_stops_one_code_beyond_either_end(bits, dtype):
    """The codes -1, 0, 1, last, last + 1. Fails if an end is clamped, or its neighbour is not."""
    last, below, s = 2**bits - 1, 2**(bits - 2), 2**-4  # powers of two: bf16 holds every value exactly
    x = (s * (torch.tensor([-1.0, 0, 1, last, last + 1]) - below)).to(dtype).requires_grad_()
    lo, hi = torch.tensor(-s * below), torch.tensor(s * (last - below))
    common.fake_quant(x, lo, hi, bits).sum().backward()
    assert x.grad.dtype == dtype and x.grad.tolist() == [0, 1, 1, 1, 0]



def test_ema_weighs_values_by_powers_of_the_momentum_from_the_first_one():
    """Against the explicit weighted mean. Fails if the momentum is applied to the new value, if the
    debiased value is fed back, as in published code, or if it is not debiased at all.
    """
    xs, ema = torch.rand(30).double(), common.EMA(0.9)
    ours = [float(ema.update(x)) for x in xs]
    weighted = [np.average(xs[:t], weights=0.9 ** np.arange(t - 1, -1, -1)) for t in range(1, 31)]
    assert ours == pytest.approx(weighted)


# ----- data ------------------------------------------------------------------------------------------


def save_images(root: Path, *names: str, image=np.full((8, 8), 200, np.uint8)) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    return root


def save_npz(path: Path, **changes) -> str:
    """A set of 3 train and 2 test images in two classes, with changes."""
    image = lambda n: np.zeros((n, 32, 32), np.uint8)
    train = dict(train_images=image(3), train_labels=[0, 1, 1])
    test = dict(test_images=image(2), test_labels=[0, 1])
    np.savez(path, **train | test | changes)
    return str(path)


def test_embedded_data_are_balanced_padded_and_rightly_labelled():
    """A nearest class mean is right for two thirds. Fails if labels and images are mixed up."""
    data = common.load_data("fashion")
    (x, y), (xt, yt) = data.train.tensors, data.test.tensors
    assert x.shape == (5000, 3, 32, 32) and xt.shape == (10000, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.bincount(y).tolist() == [500] * 10 and torch.bincount(yt).tolist() == [1000] * 10
    assert x[..., :2, :].sum() == 0 and torch.equal(x[:, 0], x[:, 2])
    means = torch.stack([x[y == c, 0].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(xt[:, 0].float().flatten(1), means).argmin(1)
    assert 0.6 < (nearest == yt).float().mean() < 0.75


def test_to_input_has_zero_mean_and_unit_variance_on_the_embedded_data():
    """The generator's last BatchNorm assumes it. Fails if the statistics are those of 28 px images."""
    data = common.load_data("fashion")
    x = common.to_input(data.train.tensors[0][:2000], data.mean, data.std, CPU)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape, label_shape, side", [
    ((6, 28, 28), (6, 1), 32), ((6, 28, 28, 3), (6, 1), 32), ((6, 64, 64), (6,), 64)])
def test_every_medmnist_layout_loads(tmp_path, shape, label_shape, side):
    """Grey or colour, labels (N, 1) or (N,). Fails if grey images are not spread over three channels."""
    x, y = np.random.randint(0, 255, shape, np.uint8), (np.arange(6) % 3).reshape(label_shape)
    data = common.load_data(save_npz(tmp_path / "m.npz", train_images=x, train_labels=y, test_images=x,
                                     test_labels=y))
    assert data.test.tensors[0].shape == (6, 3, side, side) and data.size == side
    assert data.classes == ["0", "1", "2"] and common.labels_of(data.test).tolist() == [0, 1, 2] * 2


def test_an_image_folder_loads(tmp_path):
    """val/<class>/*.png at 224 px. Fails if val/ is taken for a class, or `resize` goes unread."""
    names = [f"{split}/{c}/0.png" for split in ("train", "val") for c in ("ant", "bee")]
    image = np.random.randint(0, 255, (240, 230, 3), np.uint8)
    save_images(tmp_path, *names, image=image)
    data = common.load_data(str(tmp_path))
    x, y = next(common.batches(data.test, 2))
    assert data.classes == ["ant", "bee"] and data.mean == common.NORMS["imagenet"][0]
    assert x.shape == (2, 3, 224, 224) and x.dtype == torch.uint8 and y.tolist() == [0, 1]
    assert common.labels_of(data.train).tolist() == [0, 1]
    as_it_is, _ = common.ImageFolder(tmp_path / "val", 224, resize=False)[0]
    assert np.array_equal(as_it_is.permute(1, 2, 0), image[8:232, 3:227])


def test_only_images_count_as_images(tmp_path):
    """What a Mac or a notebook leaves is skipped, and so is a link that leads back; 16 bits are scaled.

    Fails if one of them counts, or if the image of 16 bits is white.
    """
    save_images(tmp_path, *(f"{folder}/0.png" for folder in (
        "bee/deeper", ".cache", "__MACOSX", "@eaDir", "ant/.ipynb_checkpoints")))
    save_images(tmp_path, "ant/1.png", "ant/2.tiff", image=np.full((8, 8), 200 * 257, np.uint16))
    (tmp_path / "ant/loop").symlink_to(tmp_path / "ant")
    (tmp_path / "ant/._0.png").write_bytes(b"Mac OS X")
    (tmp_path / "ant/notes.txt").write_text("no image")
    folder = common.ImageFolder(tmp_path)
    assert folder.classes == ["ant", "bee"] and folder.targets == [0, 0, 1]
    assert all((x == 200).all() for x, _ in folder)


@pytest.mark.parametrize("sides, size", [((20, 48, 300), 32), ((49, 90), 64), ((90, 96, 20), 64),
                                         ((97, 150), 224)])
def test_a_folder_is_read_at_a_size_that_fits(tmp_path, sides, size, capsys):
    """By the median side, printed; --size wins. Fails if pictures grow to 224 px, or by the mean."""
    for n, side in enumerate(sides):
        image = np.zeros((side + 40, side), np.uint8)
        save_images(tmp_path, f"train/ant/{n}.png", f"val/ant/{n}.png", image=image)
    data = common.load_data(str(tmp_path))
    assert data.size == data.train.size == data.test[0][0].shape[1] == size
    assert f"read at {size} px" in capsys.readouterr().out
    assert common.load_data(str(tmp_path), size=40).train[0][0].shape == (3, 40, 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_decode_the_same_images_in_the_same_order(workers, tmp_path, monkeypatch):
    """As many processes as --workers says. Fails if the flag goes unread, or the order changes."""
    for n in range(12):
        save_images(tmp_path, f"val/ant/{n:02d}.png", image=np.full((32, 32), 20 * n, np.uint8))
    data, asked, seen = common.load_data(str(tmp_path)), [], []
    monkeypatch.setattr(common.Workers, "count", None)
    monkeypatch.setattr(common, "DataLoader",
                        lambda *a, **k: asked.append(k["num_workers"]) or DataLoader(*a, **k))
    main = lambda args: seen.extend(x[:, 0, 0, 0] for x, _ in common.batches(data.test, 2))
    common.run(main, lambda argv: argparse.Namespace(workers=workers))
    assert asked == [workers] and torch.cat(seen).tolist() == [20 * n for n in range(12)]


@pytest.mark.parametrize("pixels, size", [(np.ones((90, 90), np.uint8), 2000), (np.float32([[1]]), None),
                                          (np.int32([[2**20]]), None), (np.int32([[200]]), None)])
def test_a_broken_image_is_one_clear_line_with_its_name(pixels, size, tmp_path, capsys):
    """Half of one, floats, 32 bits, dark or not. Fails if its name is lost, or the image made up."""
    save_images(tmp_path, "val/ant/0.tiff", image=pixels)
    file = tmp_path / "val/ant/0.tiff"
    file.write_bytes(file.read_bytes()[:size])
    data = common.load_data(str(tmp_path))
    with pytest.raises(SystemExit):  # in a worker process
        common.run(lambda args: list(common.batches(data.test, 2)), lambda argv: None, [])
    line = capsys.readouterr().err.strip().splitlines()[-1]  # a dying worker may have its say before
    assert f"error: {file}: not an image that can be read" in line and "Traceback" not in line


@pytest.mark.parametrize("changes, says", [
    (dict(train_labels=[0, 10**8, 1]), "label 100000000; labels count from 0"),
    (dict(train_labels=np.array([0, 1, 2**63], np.uint64)), "expected 0, 1, 2, .* one per image"),
    (dict(train_labels=[0, -1, 1]), "expected 0, 1, 2, .* one per image"),
    (dict(train_labels=np.zeros((3, 14), int)), "expected 0, 1, 2, .* one per image"),
    (dict(train_labels=[0, 2, 1], classes=["a", "b"]), "label 2 of 2 classes"),
    (dict(test_labels=[0, 2], classes=["a", "b"]), "label 2 of 2 classes"),
    (dict(classes=2), "x.npz: not a readable .npz file"),
    (dict(test_images=np.zeros((2, 48, 48), np.uint8)), "train images have 32 px, test images 48"),
    (dict(train_images=np.zeros((3, 32, 32), np.float32)), "expected uint8"),
    (dict(train_images=np.zeros((3, 32, 30), np.uint8)), "expected uint8")])
def test_an_unsuitable_npz_is_one_clear_line(tmp_path, changes, says):
    """Fails if a label above the classes is an IndexError later, or takes all memory now."""
    with pytest.raises(InputError, match=says):
        common.load_data(save_npz(tmp_path / "x.npz", **changes))


@pytest.mark.parametrize("labels, empty", [([1, 2, 2], "no image of 1 of its 3 classes, as 0"),
                                           ([0, 1, 3], "no image of 1 of its 4 classes, as 2")])
def test_a_class_without_images_is_named(tmp_path, labels, empty):
    """Labels from 1, or 255 for "ignore". Fails if a network with an idle output is made silently."""
    with pytest.warns(UserWarning, match=f"{empty}; labels count from 0"):
        common.load_data(save_npz(tmp_path / "x.npz", train_labels=labels, test_labels=labels[:2]))


@pytest.mark.parametrize("name, size, says", [
    ("half.npz", None, "not a readable"), ("other.npz", None, "MedMNIST keys"),
    ("folder", None, "no val/ folder"), ("fasion", None, "nearest: fashion"),
    ("flat", None, "flat/val: expected class folders"), ("empty", None, "expected .*: no images in it"),
    ("fashion", 40, "fashion: has .*32 px, not 40"), ("cifar10", 40, "cifar10.npz: not a readable")])
def test_what_is_no_data_set_is_one_clear_line(tmp_path, monkeypatch, name, size, says):
    """Fails if one ends in a traceback, if the nearest name is not listed, or if --size goes unread."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "flat/val", "empty/val/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "cifar10.npz").write_bytes(b"<html>")
    np.savez("other.npz", images=np.zeros(3))
    with pytest.raises(InputError, match=says):
        common.load_data(name, ".", size)


def test_a_copied_script_says_what_to_copy_along(tmp_path, monkeypatch):
    """Fails if it names a file and not where that comes from."""
    data = common.load_data("fashion")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "tools.pretrain", None)
    with pytest.raises(InputError, match="copy data/ along"):
        common.load_data("fashion")
    with pytest.raises(InputError, match="no tools/pretrain.py.* copy tools/ along"):
        common.find_weights("resnet8", "fashion", data, None, CPU)


def test_crop_and_flip_shifts_each_image_by_at_most_an_eighth():
    """A bright pixel lands where up to 4 and a flip can put it. Fails if all images get one shift."""
    x = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 16, 10] = 255
    moved = common.crop_and_flip(x, torch.Generator().manual_seed(0))[:, 0]
    spots = {tuple(s) for s in moved.nonzero()[:, 1:].tolist()}
    assert {r for r, _ in spots} == set(range(12, 21)) and len(spots) > 60
    assert {c for _, c in spots} == set(range(6, 15)) | set(range(17, 26))


def test_one_pass_sees_every_image_once():
    """Fails if the last, smaller batch is dropped or the order has repeats."""
    split = TensorDataset(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.arange(10))
    seen = torch.cat([y for _, y in common.batches(split, 4, torch.Generator().manual_seed(1))])
    assert sorted(seen.tolist()) == list(range(10)) != seen.tolist()


# ----- networks and weights --------------------------------------------------------------------------


def test_resnet20_has_the_published_size_and_x2_twice_the_channels():
    """270,896 quantizable weights. Fails if a block is missing, or a width reaches only some layers."""
    a, b = (dict(common.build_model(arch, 10).named_parameters()) for arch in ("resnet20", "resnet20x2"))
    assert sum(p.numel() for p in a.values() if p.ndim > 1) == 270_896
    assert all(b[n].shape[0] == 2 * a[n].shape[0] for n in a if not n.startswith("fc"))



def test_shipped_weights_are_the_logged_ones():
    """Fails if a file of weights is of another run than its log."""
    least = {"fashion": 93, "cifar10": 91, "cifar100": 57}
    for file in (ROOT / "weights").glob("*.pt"):
        log = (ROOT / "results" / "pretrain" / file.stem / "log.jsonl").read_text().splitlines()
        acc_pct = torch.load(file, weights_only=True)["acc_pct"]
        assert acc_pct == json.loads(log[-1])["acc_pct"] >= least[file.stem.split("_")[0]], file


def test_shipped_weights_are_as_good_as_they_say():
    """Measured again, to the image. Fails if file or normalisation is another one."""
    data = common.load_data("fashion")
    model, data, source = common.find_weights("resnet20", "fashion", data, None, CPU)
    acc_pct = common.accuracy_pct(model, data, data.test, CPU)
    assert acc_pct == pytest.approx(94.21, abs=0.011) and "94.21 % by its own record" in source


state = lambda classes=4: common.build_model("resnet8", classes).state_dict()


@pytest.mark.parametrize("arch, weights, says", [
    ("own.py:mak", "none", "--arch .*KeyError.*mak"), ("no.py:make", "none", "FileNotFoundError"),
    ("own.py:make_list", "none", "gives a list; expected an nn.Module"),
    ("own.py:make_trouble", "none", "ValueError: of its own"),
    ("nowhere.to:make", "none", "ModuleNotFound"),
    ("own.py:make", None, "no weights for .*:make"),
    ("resnet8", "none", "only a FILE.py"),
    ("resnet14", None, "tools/pretrain.py --arch resnet14 --dataset .*tiny.npz"),
    ("resnet8", "nowhere.pt", "no such file"), ("resnet8", b"PK\x03\x04 half a file", "cannot be read"),
    ("resnet1", lambda: {"state_dict": state()}, "nearest names: .*resnet18"),
    ("resnet8", lambda: {"state_dict": state(5), "classes": list("abcde")}, "5 classes"),
    ("resnet8", lambda: state(5), "does not fit"),
    ("resnet14", lambda: {"state_dict": state(), "classes": list("0123")}, "does not fit"),
    ("resnet8", lambda: state() | {"fc.bias": torch.full((4,), math.nan)}, "fc.bias.* holds NaN"),
    ("resnet8", lambda: {"weight": torch.zeros(4)}, "does not fit"),  # whose prefix never ended
    ("resnet14", lambda: {"state_dict": state(), "arch": "resnet8"}, "the file holds a resnet8")])
def test_a_network_that_cannot_be_had_is_one_line(arch, weights, says, own, tiny, tmp_path):
    """Fails if a traceback comes, or if a network is trained anew, or evaluated untrained."""
    data, file = common.load_data(str(tiny)), tmp_path / "w.pt"
    if isinstance(weights, bytes):
        weights = file.write_bytes(weights) and file
    elif callable(weights):
        torch.save(weights(), file)
        weights = file
    with pytest.raises(InputError, match=says) as e:
        common.find_weights(arch.replace("own.py", str(own)), str(tiny), data, weights, CPU)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"model": s}, lambda s: {"whatever": s},
    lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_weight_files_of_other_programs_load(wrap, tmp_path):
    """Bare, wrapped, of DataParallel, of torch.compile. Fails if one prefix or wrapper is not known."""
    saved = state(5)
    torch.save(wrap(saved), tmp_path / "w.pt")
    loaded = common.load_network(tmp_path / "w.pt", "resnet8", 5)[0].state_dict()
    assert all(torch.equal(saved[k], v) for k, v in loaded.items())


@pytest.mark.parametrize("of_data, of_file, order", [
    ("ant bee cat dog", "ant bee cat dog", [0, 1, 2, 3]),
    ("ant bee cat dog", "dog cat bee ant", [3, 2, 1, 0]),
    ("0 1 10 2", "0 1 2 10", [0, 1, 3, 2]),  # folders sort 10 before 2
    ("0 1 10 2", "ant bee cat dog", [0, 1, 3, 2]),  # numbers on one side are those of the outputs
    ("ant bee cat dog", "0 1 10 2", [0, 1, 3, 2]),
    ("ant bee cat dog", "car bus van dog", "named.pt: its classes are not those of .*ant"),
    ("ant bee cat dog", "ant ant bee cat", "named.pt: names a class twice")])
def test_classes_are_matched_by_name(of_data, of_file, order, tiny, tiny_weights, tmp_path):
    """Outputs move to the place of their class. Fails if by number, or if other names are taken."""
    x, data = torch.randn(4, 3, 32, 32), common.load_data(str(tiny))._replace(classes=of_data.split())
    saved = torch.load(tiny_weights, weights_only=True)
    torch.save(saved | {"classes": of_file.split()}, tmp_path / "named.pt")
    find = lambda: common.find_weights("resnet8", "tiny", data, tmp_path / "named.pt", CPU)[0]
    if isinstance(order, str):
        with pytest.raises(InputError, match=order):
            find()
    else:
        assert torch.equal(find()(x), common.load_network(tiny_weights, "resnet8")[0](x)[:, order])


def test_a_network_of_ones_own_comes_from_a_file_or_a_module(own, tiny, monkeypatch):
    """FILE.py:NAME, module:NAME; weights and normalisation of its own. Fails if it shadows `common`."""
    data = common.load_data(str(tiny))
    net, seen, source = common.find_weights(f"{own}:make", str(tiny), data, "none", CPU)
    assert type(net).__name__ == "Net" and net.fc.out_features == 4 and not net.training
    assert seen.mean == [0.4] * 3 and seen.std == [0.3] * 3 and "its own weights" in source
    monkeypatch.chdir(own.parent)
    net, seen, _ = common.find_weights("my_net:make_trained", str(tiny), data, "none", CPU)
    assert common.accuracy_pct(net, data, data.test, CPU) == 100.0 and seen.mean == data.mean
    assert common.short_name(f"{own}:make") == "my_net-make"


@pytest.mark.parametrize("mean, says", [
    (torch.full((1, 3, 1, 1), 0.25), None), ((0.25, 0.25, 0.25), None),
    (0.25, "its mean is 0.25; expected three numbers"), ("no", "--arch my:net: ")])
def test_the_normalisation_of_ones_own_network_has_three_numbers(mean, says, monkeypatch):
    """Also in a buffer of (1, 3, 1, 1). A method `size` is no size. Fails if taken as it stands."""
    net, data = nn.Linear(1, 1), common.Data("x", ["a"], 32, [0.5] * 3, [0.5] * 3, None, None)
    net.mean, net.size = mean, lambda: 3
    monkeypatch.setattr(common, "build_model", lambda *a, **k: net)
    find = lambda: common.find_weights("my:net", "x", data, "none", CPU)[1]
    if says:
        with pytest.raises(InputError, match=says):
            find()
    else:
        assert find().mean == [0.25] * 3 and find().size == 32


@pytest.mark.parametrize("arch, mean", [("efficientnet_v2_l", [0.5] * 3),
                                        ("resnet18", common.NORMS["imagenet"][0])])
def test_torchvisions_weights_bring_their_own_normalisation(arch, mean, monkeypatch):
    """That of efficientnet_v2_l is not ImageNet's usual one. Fails without it."""
    monkeypatch.setattr(torchvision.models, "get_model", lambda *a, **k: nn.Linear(1, 1))
    monkeypatch.setattr(common, "same_classes", lambda *a: None)
    classes = [str(i) for i in range(1000)]
    data = common.Data("imagenet", classes, 224, *common.NORMS["imagenet"], None, None)
    assert common.find_weights(arch, "imagenet", data, None, CPU)[1].mean == mean



def test_a_failure_without_a_word_is_one_clear_line():
    """A bare assert in a stranger's network. Fails if the message is asked for its first line."""
    with pytest.raises(InputError, match="my net: AssertionError"), common.door("my net"):
        raise AssertionError


def test_a_file_of_weights_does_not_choose_what_code_is_run(own, tmp_path):
    """Its arch may name any function. Fails if a checkpoint's arch is built where no flag repeats it."""
    net = common.build_model(f"{own}:make", 4)
    torch.save({"state_dict": net.state_dict(), "arch": f"{own}:make"}, file := tmp_path / "w.pt")
    with pytest.raises(InputError, match="repeat that behind --foundation"):
        common.load_network(file, None, flag="--foundation")
    assert common.load_network(file, f"{own}:make", 4)[1]["arch"] == f"{own}:make"


# ----- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [lambda w: w.sum() + math.nan, lambda w: (w - 1).sqrt().sum()])
@pytest.mark.parametrize("steps, advice", [(0, "before any step: look at"), (1, "lower --lr$")])
def test_nan_stops_a_step_before_a_weight_moves_and_names_the_flag(loss, steps, advice):
    """A NaN loss; a loss of 0 whose gradient is infinite. Fails if only one of the two is looked at, or
    if the rate is blamed before a step was taken."""
    w = nn.Parameter(torch.ones(4))
    opt = torch.optim.SGD([w], 0.1, momentum=0.9)
    for _ in range(steps):
        common.descend(opt, 0.0 * w.sum(), "loss_q", "--lr")
    says = rf"loss_q at iteration 4 is (nan|0\.0), its gradient norm (2\.0|inf); {advice}"
    with pytest.raises(InputError, match=says):
        common.descend(opt, loss(w), "loss_q at iteration 4", "--lr")
    assert w.tolist() == [1.0] * 4


@pytest.mark.parametrize("clip, length", [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_a_step_is_as_long_as_the_gradient_or_the_clip(clip, length):
    """Of plain SGD; no gradient of the step before is left in it. Fails if the clip is ignored."""
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    w.grad = torch.ones(2)
    common.descend(torch.optim.SGD([w], 1.0), w.square().sum() / 2, "loss", "--lr", clip)
    assert (torch.tensor([3.0, 4.0]) - w).norm().item() == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_is_that_of_eval_mode_and_moves_nothing(training, tiny, tiny_weights):
    """Whatever the mode, which is put back. Fails if dropout drops, or a running statistic moves."""
    data = common.load_data(str(tiny))
    model = common.load_network(tiny_weights, "resnet8")[0]
    x, y = (t.repeat(10, *[1] * (t.ndim - 1)) for t in data.test.tensors)  # more than one batch
    want = (model(common.to_input(x, data.mean, data.std, CPU)).argmax(1) == y).float().mean()
    net = nn.Sequential(model, nn.Dropout(0.9)).train(training)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    acc_pct = common.accuracy_pct(net, data, TensorDataset(x, y), CPU)
    assert acc_pct == pytest.approx(100 * want.item()) and acc_pct > 90
    assert all(m.training == training for m in net.modules())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_seed_within_leaves_the_callers_random_numbers(monkeypatch):
    """Those of a GPU, too. Fails if torch.manual_seed is called, which resets all devices for good."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    before = torch.get_rng_state()
    with common.seeded(3):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with common.seeded(3):
        assert torch.equal(torch.rand(2), first)


# ----- folders, logs, checkpoints --------------------------------------------------------------------


def flags(**changes) -> argparse.Namespace:
    return argparse.Namespace(**dict(out=None, resume=None, seed=0) | changes)


def test_each_run_has_a_new_folder_though_many_start_together(tmp_path):
    """Fails if a run takes the folder of another, as where a folder is looked for before it is made."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: common.new_folder(flags(), f"{tmp_path}/x"), range(20)))
    assert {p.name for p in made} == {"seed0", *(f"seed0-{n}" for n in range(2, 21))}
    assert common.new_folder(flags(seed=1), f"{tmp_path}/x").name == "seed1"


def test_out_is_literal_and_what_is_there_is_left_alone(tmp_path):
    """A log of another program, for example. Fails if the run goes on in that folder, or in another."""
    args = flags(out=str(tmp_path / "a/b"))
    assert common.new_folder(args, "runs/x") == tmp_path / "a/b"
    with pytest.raises(InputError, match="a/b: cannot be made .*; name another --out"):
        common.new_folder(args, "runs/x")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_several_seeds_are_a_run_and_a_folder_each():
    """Fails if they share a folder, or if one seed is not its own folder."""
    ran = []
    main = common.each_seed(lambda args: ran.append((args.seed, args.out)))
    for seed, out in ((1, None), ([1], "o"), ([3, 5], "o"), ([3, 5], None)):
        main(flags(seed=seed, out=out))
    assert ran == [(1, None), (1, "o"), (3, "o/seed3"), (5, "o/seed5"), (3, None), (5, None)]


@pytest.fixture
def parser(tmp_path, monkeypatch):
    """A parser of x.py with --lr; in the folder `old` there is a checkpoint of x.py --lr 0.5."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    p = common.Parser("x.py", "")
    common.add_run_flags(p, 1, "epochs")
    p.group("method")("--lr", 0.1, "learning rate")
    args = p.parse_args(["--lr", "0.5", "--seed", "3", "--device", "cpu"])
    common.save_checkpoint(common.RunLog(Path("old"), args, CPU), args, crc=1)
    return p


def test_resume_takes_the_flags_of_the_run(parser):
    """But for the machine's. Fails if a flag falls back to its default."""
    args = parser.parse_args("--resume old --device cuda --workers=2".split())
    assert (args.lr, args.seed, args.resume) == (0.5, [3], "old")
    assert (args.device, args.workers) == ("cuda", 2)


@pytest.mark.parametrize("prog, line, says", [
    ("x.py", "--lr 0.5", "leave out --lr"), ("x.py", "--seeds=3", "leave out --seeds"),
    ("y.py", "", "old: is a run of x.py, not of y.py")])
def test_resume_refuses_other_flags_and_scripts(parser, prog, line, says):
    """Fails if a flag is ignored without a word, or if another script's flags are taken over."""
    parser.prog = prog
    with pytest.raises(InputError, match=says):
        parser.parse_args(["--resume", "old", *line.split()])


def test_a_finished_run_is_not_begun_again(parser, capsys):
    """It has a log and no checkpoint. Fails if --resume of it starts anew, or is called a mistake."""
    Path("old/checkpoint.pt").unlink()
    with pytest.raises(SystemExit) as e:
        parser.parse_args(["--resume", "old"])
    assert not e.value.code and "this run has ended" in capsys.readouterr().out


def test_a_resumed_log_goes_on_where_the_checkpoint_was_written(tmp_path):
    """Half a last line is what a killed run leaves. Fails if it, or a lost iteration, stays."""
    log = common.RunLog(tmp_path, flags(), CPU)
    log.t0 -= 100  # seconds, of all stretches together
    log.write("step", iteration=10, loss=math.nan)
    common.save_checkpoint(log, flags(), crc=1)
    log.write("step", iteration=20)
    log.file.write('{"event": "step", "iter')
    log.file.close()
    state = common.load_checkpoint(flags(resume=str(tmp_path)), 1)
    new = common.RunLog(tmp_path, flags(), CPU, state=state)
    text = new.path.read_text()
    assert [json.loads(line).get("iteration") for line in text.splitlines()] == [None, 10, None]
    assert "NaN" not in text and new.seconds() >= 100


def test_a_checkpoint_is_of_the_same_weights(tmp_path):
    """Fails if a file that was replaced under its old name goes unnoticed."""
    net, args = nn.Linear(3, 2), flags(resume=str(tmp_path))
    common.save_checkpoint(common.RunLog(tmp_path, args, CPU), args, crc=common.crc_of(net), x=1)
    assert common.load_checkpoint(args, common.crc_of(net))["x"] == 1
    net.bias.data[0] += 1e-6
    with pytest.raises(InputError, match="the run began with other weights"):
        common.load_checkpoint(args, common.crc_of(net))


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    """Fails if the target itself is opened, or if the temporary file stays."""
    common.save_atomic({"a": 1}, tmp_path / "sub" / "x.pt")

    def half(obj, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        common.save_atomic({"a": 2}, tmp_path / "sub" / "x.pt", half)
    assert [f.name for f in (tmp_path / "sub").iterdir()] == ["x.pt"]
    assert common.load_file(tmp_path / "sub" / "x.pt", ("a",), "ours") == {"a": 1}


def thing(seed: int) -> SimpleNamespace:
    net, rng = nn.Linear(3, 1), [torch.Generator().manual_seed(seed) for _ in range(2)]
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    nested = SimpleNamespace(count=0, rng=rng[0], STATE=("count", "rng"))
    return SimpleNamespace(net=net, opt=opt, rng=rng[1], sent=[], mean=None, gone=1, nested=nested,
                           STATE=("net", "opt", "rng", "sent", "mean", "gone", "nested"))


def step(a: SimpleNamespace) -> list[float]:
    x = torch.randn(4, 3, generator=a.rng)
    common.descend(a.opt, a.net(x).square().mean(), "loss", "--lr")
    a.sent.append((a.nested.count, bytes([a.nested.count])))
    a.mean, a.gone, a.nested.count = x.mean(0), None, a.nested.count + 1
    return [*a.net.weight.tolist(), torch.rand(1, generator=a.nested.rng).item()]


def test_state_goes_through_a_file_and_back(tmp_path):
    """Networks, momenta, generators, lists, None. Fails if one starts afresh."""
    a, b = thing(1), thing(2)
    step(a), step(a)
    torch.save(common.state_of(a), tmp_path / "s.pt")
    nested = b.nested
    assert common.restored(b, torch.load(tmp_path / "s.pt", weights_only=True)) is b
    assert a.sent == b.sent == [(0, b"\0"), (1, b"\1")] and torch.equal(a.mean, b.mean)
    assert b.gone is None and b.nested is nested and nested.count == 2
    assert step(a) == step(b) and step(a) == step(b)


# ----- how a command ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("error, says", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
     "not enough memory: lower --batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("Storage size calculation overflowed with sizes=[10000000000]"), "not enough memory"),
    (RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos"), "is the disk full?"),
    (RuntimeError("shapes do not match"), None), (RuntimeError("an illegal memory access"), None)])
def test_memory_and_disk_are_one_clear_line(error, says, capsys):
    """Fails with torch's twenty lines. Any other RuntimeError is a fault of ours, and shows itself."""
    def main(args):
        raise error

    with pytest.raises(SystemExit if says else RuntimeError) as e:
        common.run(main, lambda argv: None, [])
    assert not says or (e.value.code == 2 and says in capsys.readouterr().err)
