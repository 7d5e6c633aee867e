"""Claims about common.py. Each docstring ends with the change under which its test was seen to fail."""

import argparse
import json
import math
import subprocess
import sys
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import common
from common import InputError
from tools.data import ImageFolder
from tools.deploy import unpack_bits

CPU = torch.device("cpu")
ROOT = common.ROOT


# ----- hyperparameters -------------------------------------------------------------------------------


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


# ----- networks and data -----------------------------------------------------------------------------


def test_resnet20_has_the_published_size_and_x2_twice_the_channels():
    """270,896 quantizable weights. Fails if a block is missing, or a width reaches only some layers."""
    a, b = (dict(common.build_model(arch, 10).named_parameters()) for arch in ("resnet20", "resnet20x2"))
    assert sum(p.numel() for p in a.values() if p.ndim > 1) == 270_896
    assert all(b[n].shape[0] == 2 * a[n].shape[0] for n in a if not n.startswith("fc"))


def test_embedded_data_are_balanced_and_padded():
    """500 train and 1,000 test images a class, border 0; a nearest class mean is right for two thirds.

    Fails if labels and images are mixed up.
    """
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


def write_npz(path, images, labels):
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return str(path)


@pytest.mark.parametrize("shape, label_shape, side", [
    ((6, 28, 28), (6, 1), 32), ((6, 28, 28, 3), (6, 1), 32), ((6, 64, 64), (6,), 64)])
def test_every_medmnist_layout_loads(tmp_path, shape, label_shape, side):
    """Grey or colour, labels (N, 1) or (N,). Fails if grey images are not spread over three channels."""
    images, y = np.random.randint(0, 255, shape, np.uint8), np.arange(6) % 3
    data = common.load_data(write_npz(tmp_path / "m.npz", images, y.reshape(label_shape)))
    assert data.test.tensors[0].shape == (6, 3, side, side) and data.size == side
    assert data.classes == ["0", "1", "2"] and common.labels_of(data.test).tolist() == y.tolist()


def test_an_image_folder_loads(tmp_path):
    """val/<class>/*.png at 224 px, ImageNet normalisation. Fails if val/ is taken for a class."""
    from PIL import Image

    picture = np.random.randint(0, 255, (240, 230, 3), np.uint8)
    for folder in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / folder / "0.png")
    data = common.load_data(str(tmp_path))
    x, y = next(common.batches(data.test, 2))
    assert data.classes == ["ant", "bee"] and data.mean == common.IMAGENET_NORM[0]
    assert x.shape == (2, 3, 224, 224) and x.dtype == torch.uint8 and y.tolist() == [0, 1]
    assert common.labels_of(data.train).tolist() == [0, 1]
    as_it_is = ImageFolder(tmp_path / "val", 224, resize=False)[0][0]
    assert np.array_equal(as_it_is.permute(1, 2, 0), picture[8:232, 3:227])


def test_only_images_count_as_images(tmp_path):
    """Hidden files and folders, as macOS and notebooks leave them, are skipped, 16 bits scaled."""
    from PIL import Image

    grey = Image.fromarray(np.full((8, 8), 200, np.uint8))
    deep = Image.fromarray(np.full((8, 8), 200 * 257, np.uint16))
    for folder in ("ant", "bee/deeper", ".cache", "__MACOSX", "@eaDir", "ant/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
        grey.save(tmp_path / folder / "0.png")
    deep.save(tmp_path / "ant/1.png")
    deep.save(tmp_path / "ant/2.tiff")
    (tmp_path / "ant/loop").symlink_to(tmp_path / "ant")
    (tmp_path / "ant/._0.png").write_bytes(b"Mac OS X")
    (tmp_path / "ant/notes.txt").write_text("no image")
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["ant", "bee"] and folder.targets == [0, 0, 0, 1]
    assert all((x == 200).all() and x.shape == (3, 32, 32) for x, _ in folder)


@pytest.mark.parametrize("sides, size", [((20, 48, 300), 32), ((49, 90), 64), ((90, 96, 20), 64),
                                         ((97, 150), 224)])
def test_a_folder_is_read_at_a_size_that_fits(tmp_path, sides, size, capsys):
    """By the median side, printed; --size wins. Fails if pictures grow to 224 px, or by the mean."""
    from PIL import Image

    for n, side in enumerate(sides):
        for split in ("train", "val"):
            (tmp_path / split / "ant").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side + 40)).save(tmp_path / f"{split}/ant/{n}.png")
    data = common.load_data(str(tmp_path))
    assert data.size == data.train.size == data.test[0][0].shape[1] == size
    assert f"read at {size} px" in capsys.readouterr().out
    assert common.load_data(str(tmp_path), size=40).train[0][0].shape == (3, 40, 40)
    with pytest.raises(InputError, match="fashion: has images of 32 px, not 40"):
        common.load_data("fashion", size=40)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_decode_the_same_images_in_the_same_order(workers, tmp_path, monkeypatch):
    """In as many processes as --workers says. Fails if the flag goes unread, or they mix the order up."""
    from PIL import Image
    from torch.utils.data import DataLoader

    (tmp_path / "val/ant").mkdir(parents=True)
    for n in range(12):
        Image.new("L", (32, 32), 20 * n).save(tmp_path / f"val/ant/{n:02d}.png")
    data, asked, seen = common.load_data(str(tmp_path)), [], []
    monkeypatch.setattr(common, "DataLoader",
                        lambda *a, **k: asked.append(k["num_workers"]) or DataLoader(*a, **k))
    main = lambda args: seen.extend(x[:, 0, 0, 0] for x, _ in common.batches(data.test, 2))
    common.run(main, lambda argv: argparse.Namespace(workers=workers))
    assert asked == [workers] and torch.cat(seen).tolist() == [20 * n for n in range(12)]


@pytest.mark.parametrize("broken", ["half", "page", "float", "32 bits", "dark"])
def test_a_broken_image_is_one_clear_line_with_its_name(broken, tmp_path, capsys):
    """Also from a worker process. Fails if the run ends without the name, or the image is made up."""
    from PIL import Image

    (tmp_path / "val/ant").mkdir(parents=True)
    file = tmp_path / f"val/ant/{broken.replace(' ', '')}.tiff"
    pixels = {"float": np.ones((9, 9), np.float32), "32 bits": np.full((9, 9), 2**20, np.int32),
              "dark": np.full((9, 9), 200, np.int32)}
    Image.fromarray(pixels.get(broken, np.ones((90, 90), np.uint8))).save(file)
    if broken in ("half", "page"):
        file.write_bytes(file.read_bytes()[:2000] if broken == "half" else b"<html>")
    data = common.load_data(str(tmp_path))
    with pytest.raises(SystemExit):
        common.run(lambda args: list(common.batches(data.test, 2)), lambda argv: None, [])
    line = capsys.readouterr().err.strip().splitlines()[-1]  # a dying worker may have its say before
    assert f"error: {file}: not an image that can be read" in line and "Traceback" not in line


def test_without_data_the_script_says_what_to_copy(tmp_path, monkeypatch):
    """Fails if a copied script names a file and not where it comes from."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    with pytest.raises(InputError, match="copy data/ along, or make it anew with"):
        common.load_data("fashion")
    for name in ("data", "weights"):
        monkeypatch.setitem(sys.modules, f"tools.{name}", None)
    with pytest.raises(InputError, match="no tools/data.py .* copy tools/ along"):
        common.load_data("fashion")
    with pytest.raises(InputError, match="no tools/weights.py .* copy tools/ along"):
        common.find_weights("resnet20", "fashion", None, None, "cpu")


def npz_of(path, train_y, test_y, classes=None, side=32):
    image = lambda n, side=32: np.zeros((n, side, side), np.uint8)
    more = {} if classes is None else {"classes": np.array(classes)}
    np.savez(path, train_images=image(len(train_y)), train_labels=np.array(train_y), **more,
             test_images=image(len(test_y), side), test_labels=np.array(test_y))
    return str(path)


@pytest.mark.parametrize("changes, says", [
    (dict(train_y=[0, 10**8]), "label 100000000 for 2 train images"),
    (dict(train_y=np.array([0, 2**63], np.uint64)), "expected one integer an image"),
    (dict(train_y=[0, 2], classes=["a", "b"]), "label 2 of 2 classes"),
    (dict(test_y=[0, 2], classes=["a", "b"]), "label 2 of 2 classes"),
    (dict(side=48), "train images of 32 px and test images of 48 px")])
def test_labels_and_sizes_are_checked_against_the_classes(tmp_path, changes, says):
    """Fails if a label above the classes is an IndexError later, or takes all memory now."""
    arrays = dict(train_y=[0, 1, 1], test_y=[0, 1]) | changes
    with pytest.raises(InputError, match=says):
        common.load_data(npz_of(tmp_path / "x.npz", **arrays))


@pytest.mark.parametrize("labels, empty", [([1, 2, 2], "1 of its 3 classes: 0"),
                                           ([0, 1, 3], "1 of its 4 classes: 2")])
def test_a_class_without_images_is_named(tmp_path, labels, empty):
    """Labels from 1, or 255 for "ignore". Fails if a network with an idle output is made silently."""
    with pytest.warns(UserWarning, match=f"no image of {empty}; labels count from 0"):
        common.load_data(npz_of(tmp_path / "x.npz", labels, labels))


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
    split = torch.utils.data.TensorDataset(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.arange(10))
    seen = torch.cat([y for _, y in common.batches(split, 4, torch.Generator().manual_seed(1))])
    assert sorted(seen.tolist()) == list(range(10)) != seen.tolist()


@pytest.mark.parametrize("images, labels, says", [
    (np.zeros((4, 28, 28), np.float32), np.zeros(4, int), "expected uint8"),
    (np.zeros((4, 28, 30), np.uint8), np.zeros(4, int), "expected uint8"),
    (np.zeros((4, 28, 28), np.uint8), np.zeros((4, 14), int), "one integer an image"),
    (np.zeros((4, 28, 28), np.uint8), -np.ones(4, int), "one integer an image"),
])
def test_an_unsuitable_npz_is_one_clear_line(tmp_path, images, labels, says):
    """Floats, not square, several labels, negative ones. Fails if one check of shape or sign is gone."""
    with pytest.raises(InputError, match=says):
        common.load_data(write_npz(tmp_path / "x.npz", images, labels))


def test_what_is_no_data_set_is_one_clear_line(tmp_path):
    """Half a file, other keys, a folder without val/. Fails if one of them ends in a traceback."""
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 half a file")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    says = {"half.npz": "not a readable", "other.npz": "MedMNIST keys", "": "no val/ folder"}
    for name, says in says.items():
        with pytest.raises(InputError, match=says):
            common.load_data(str(tmp_path / name))


def test_unknown_data_sets_and_networks_name_the_nearest():
    """Fails if the nearest names are not listed."""
    with pytest.raises(InputError, match="nearest: fashion"):
        common.load_data("fasion")
    with pytest.raises(InputError, match="resnet18"):
        common.build_model("resnet1", 10)


# ----- weights ---------------------------------------------------------------------------------------


def test_shipped_weights_are_the_logged_ones():
    """All; one is measured again, to the image. Fails if file or normalisation is another one."""
    least = {"fashion_resnet20": 94, "fashion_resnet20x2": 93, "cifar10_resnet20": 91,
             "cifar100_resnet20": 66, "cifar100_resnet20x2": 66, "cifar100_vit-mixed": 59,
             "cifar100_vit-plain": 57, "cifar100_resnet20_long": 69, "cifar100_resnet20x2_cloud": 70}
    for name, acc_pct in least.items():
        ck = torch.load(common.ROOT / "weights" / f"{name}.pt", weights_only=True)
        end = common.read_log(common.ROOT / "results" / "pretrain" / name / "log.jsonl")[-1]
        assert ck["acc_pct"] == end["acc_pct"] >= acc_pct, name
    data = common.load_data("fashion")
    model, data, source = common.find_weights("resnet20", "fashion", data, None, CPU)
    model.to(memory_format=torch.channels_last)
    acc_pct = common.accuracy_pct(model, data, data.test, CPU)
    assert acc_pct == pytest.approx(94.21, abs=0.011) and "94.21 % by its own record" in source


def test_broken_weights_are_one_clear_line(tiny, tmp_path):
    """Missing, half, other classes, other network. Fails if a traceback comes through."""
    data, state = common.load_data(str(tiny)), common.build_model("resnet8", 4).state_dict()
    five = common.build_model("resnet8", 5).state_dict()
    torch.save({"state_dict": state, "classes": data.classes}, tmp_path / "good.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    torch.save({"state_dict": five, "classes": list("abcde")}, tmp_path / "five.pt")
    torch.save(five, tmp_path / "bare.pt")
    torch.save(state | {"fc.bias": torch.full((4,), math.nan)}, tmp_path / "nan.pt")
    torch.save({"weight": torch.zeros(4)}, tmp_path / "one.pt")  # whose prefix never ended
    torch.save({"state_dict": state, "arch": "resnet8"}, tmp_path / "named.pt")
    for name, arch, says in (("none.pt", "resnet8", "no such file"), ("half.pt", "resnet8", "truncated"),
                             ("five.pt", "resnet8", "5 classes"), ("bare.pt", "resnet8", "does not fit"),
                             ("good.pt", "resnet14", "does not fit"),
                             ("nan.pt", "resnet8", "fc.bias holds NaN"),
                             ("one.pt", "resnet8", "does not fit"),
                             ("named.pt", "resnet14", "the file holds a resnet8")):
        with pytest.raises(InputError, match=says) as e:
            common.find_weights(arch, str(tiny), data, str(tmp_path / name), CPU)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"model": s}, lambda s: {"whatever": s}, lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_weight_files_of_other_programs_load(wrap, tmp_path):
    """Bare, wrapped, of DataParallel, of torch.compile. Fails if one prefix or wrapper is not known."""
    state = common.build_model("resnet8", 5).state_dict()
    torch.save(wrap(state), tmp_path / "w.pt")
    loaded = common.load_network(tmp_path / "w.pt", "resnet8", 5)[0].state_dict()
    assert all(torch.equal(state[k], v) for k, v in loaded.items())


def test_classes_are_matched_by_name(tiny, tiny_weights, tmp_path):
    """The same names in another order: outputs move. Other names: one line. Fails if by number alone."""
    data = common.load_data(str(tiny))._replace(classes=["ant", "bee", "cat", "dog"])
    names, order = ["dog", "cat", "bee", "ant"], [3, 2, 1, 0]
    saved = torch.load(tiny_weights, weights_only=True) | {"classes": data.classes}
    moved = {k: saved["state_dict"][k][order] for k in ("fc.weight", "fc.bias")}
    torch.save(saved, tmp_path / "own.pt")
    other = {"classes": names, "state_dict": saved["state_dict"] | moved}
    torch.save(saved | other, tmp_path / "moved.pt")
    torch.save(saved | {"classes": ["car", "bus", "van", "dog"]}, tmp_path / "other.pt")
    find = lambda name: common.find_weights("resnet8", str(tiny), data, tmp_path / name, "cpu")[0]
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(find("own.pt")(x), find("moved.pt")(x))
    with pytest.raises(InputError, match="other.pt: was trained for other classes .* knows ant"):
        find("other.pt")
    torch.save(saved | {"classes": ["ant", "ant", "bee", "cat"]}, tmp_path / "twice.pt")
    with pytest.raises(InputError, match="other classes"):
        find("twice.pt")
    # Names may be digits: folders sort 10 before 2.
    digits = ["0", "1", "10", "2"]
    numbers = data._replace(classes=digits)
    torch.save(saved | {"classes": ["0", "1", "2", "10"]}, tmp_path / "digits.pt")
    net = common.find_weights("resnet8", str(tiny), numbers, tmp_path / "digits.pt", "cpu")[0]
    assert torch.equal(net(x), find("own.pt")(x)[:, [0, 1, 3, 2]])
    # Numbers on one side alone are those of the outputs, in their own order.
    net = common.find_weights("resnet8", str(tiny), numbers, tmp_path / "own.pt", "cpu")[0]
    assert torch.equal(net(x), find("own.pt")(x)[:, [0, 1, 3, 2]])
    torch.save(saved | {"classes": digits}, tmp_path / "as_strings.pt")
    assert torch.equal(find("as_strings.pt")(x), find("own.pt")(x)[:, [0, 1, 3, 2]])


def test_missing_weights_name_the_command_that_makes_them(tiny):
    """Fails if a network would silently be trained, or evaluated untrained."""
    with pytest.raises(InputError, match="tools/pretrain.py --arch resnet14 --dataset .*tiny.npz"):
        common.find_weights("resnet14", str(tiny), common.load_data(str(tiny)), None, CPU)


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


# ----- BatchNorm -------------------------------------------------------------------------------------


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


def loop_fake_quant(values, lo, hi, bits):
    """The quantizer's four lines, one number at a time, in Python floats."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    s = (hi - lo) / (2**bits - 1)
    z = round(lo / s)
    return [s * (min(max(round(v / s) - z, 0), 2**bits - 1) + z) for v in values]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("lo, hi", [(-1.0, 2.0), (0.5, 2.0), (-2.0, -0.5), (0.0, 6.0)])
def test_fake_quant_equals_a_plain_loop(bits, lo, hi):
    """Also for ranges of one sign. Fails if these are not widened to hold 0, or codes reach 2^bits."""
    x = torch.empty(500, dtype=torch.float64).uniform_(lo - 1, hi + 1)
    ours = common.fake_quant(x, *torch.tensor([lo, hi], dtype=torch.float64), bits)
    loop = torch.tensor(loop_fake_quant(x.tolist(), lo, hi, bits), dtype=torch.float64)
    assert torch.allclose(ours, loop, atol=1e-12)


@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quant_equals_the_torch_builtin(bits):
    """torch.fake_quantize_per_tensor_affine, also out of range. Fails if there is a code too many."""
    x = torch.randn(1000)
    s, z = common.step_and_zero(x.min(), x.max(), bits)
    builtin = torch.fake_quantize_per_tensor_affine(2 * x, s, (-z).int(), 0, 2**bits - 1)
    differ = (common.fake_quant(2 * x, x.min(), x.max(), bits) - builtin).abs() > 1e-5
    assert differ.float().mean() < 0.005  # it multiplies by 1/s, which rounds ties the other way


@pytest.mark.parametrize("lo, hi", [(-1.0, 2.0), (0.3, 2.0), (-2.0, -0.3), (-0.37, 0.91)])
def test_zero_stays_exactly_zero(lo, hi):
    """Padding and pruned weights need it. Fails if z is not rounded, or the range not widened."""
    for bits in range(2, 9):
        x, lo_t, hi_t = torch.zeros(3), torch.tensor(lo), torch.tensor(hi)
        assert common.fake_quant(x, lo_t, hi_t, bits).abs().max() == 0


def test_one_signed_channels_have_codes_that_fit():
    """Only positive, negative or zero weights. Fails if the range is not widened to hold 0."""
    w = torch.stack([torch.rand(9) + 0.5, -torch.rand(9) - 0.5, torch.zeros(9), torch.randn(9)])
    for bits in range(2, 9):
        s, z = common.step_and_zero(*common.channel_range(w), bits)
        assert (s > 0).all() and (z <= 0).all() and (z >= -(2**bits - 1)).all()
        w_hat = common.fake_quant(w, *common.channel_range(w), bits)
        assert (w_hat - w).abs().max() <= s.max() / 2 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_straight_through_gradient_stops_one_code_beyond_either_end(bits, dtype):
    """The codes -1, 0, 1, last, last + 1. Fails if an end is clamped, or its neighbour is not."""
    last, below, s = 2**bits - 1, 2**(bits - 2), 2**-4  # powers of two: bf16 holds every value exactly
    x = (s * (torch.tensor([-1.0, 0, 1, last, last + 1]) - below)).to(dtype).requires_grad_()
    lo, hi = torch.tensor(-s * below), torch.tensor(s * (last - below))
    common.fake_quant(x, lo, hi, bits).sum().backward()
    assert x.grad.dtype == dtype and x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 1001])
def test_packing_is_as_small_as_computed_and_loses_nothing(bits, n):
    """Fails if the last, partly filled byte is dropped."""
    q = torch.randint(0, 2**bits, (n,), dtype=torch.uint8)
    packed = common.pack_bits(q, bits)
    assert packed.numel() == math.ceil(n * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, n), q)


def test_ema_of_a_constant_is_that_constant_from_the_first_batch():
    """Fails if the debiased value is fed back, as in published code, or if it is not debiased at all."""
    ema = common.EMA(0.9)
    assert all(abs(float(ema.update(torch.tensor(3.7))) - 3.7) < 1e-5 for _ in range(200))


def test_ema_weighs_values_by_powers_of_the_momentum():
    """Against the explicit weighted mean. Fails if the momentum is applied to the new value."""
    xs, ema = torch.rand(30).double(), common.EMA(0.9)
    last = [float(ema.update(x)) for x in xs][-1]
    assert last == pytest.approx(np.average(xs, weights=0.9 ** np.arange(29, -1, -1)))


# ----- evaluation and logs ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_is_that_of_eval_mode_and_moves_nothing(training, tiny, tiny_weights):
    """Whatever the mode, which is put back. Fails if dropout drops, or a running statistic moves."""
    data = common.load_data(str(tiny))
    model, data, _ = common.find_weights("resnet8", str(tiny), data, str(tiny_weights), CPU)
    net = nn.Sequential(model, nn.Dropout(0.9)).train(training)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = data.test.tensors
    want = (model.eval()(common.to_input(x, data.mean, data.std, CPU)).argmax(1) == y).float().mean()
    model.train(training)
    acc_pct = common.accuracy_pct(net, data, data.test, CPU, batch_size=5)
    assert acc_pct == pytest.approx(100 * want.item()) and acc_pct > 90
    assert all(m.training == training for m in net.modules())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_half_a_last_line_does_not_hinder_a_resumed_log(tmp_path):
    """What a killed run leaves. Fails if it is an error, or if records of lost iterations stay."""
    log = common.RunLog(tmp_path)
    log.write("start", argv="x")
    for i in (10, 20, 30):
        log.write("step", iteration=i)
    with log.path.open("a") as f:
        f.write('{"event": "step", "iter')
    assert [r.get("iteration") for r in common.read_log(log.path)] == [None, 10, 20, 30]
    common.RunLog(tmp_path, resumed_at=20).write("end", acc_pct=1.0)
    events = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [r.get("iteration", r["event"]) for r in events] == ["start", 10, 20, "end"]
    new = common.RunLog(tmp_path)
    assert new.path.read_text() == ""  # without --resume it starts anew


# ----- state -----------------------------------------------------------------------------------------


class Thing:
    def __init__(self, **state):
        self.STATE = tuple(state)
        vars(self).update(state)


def thing(seed: int) -> Thing:
    net, rng = nn.Linear(3, 1), torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    nested = Thing(count=0, rng=torch.Generator().manual_seed(seed))
    return Thing(net=net, opt=opt, rng=rng, sent=deque(), mean=None, gone=torch.ones(1), nested=nested)


def step(a: Thing) -> list[float]:
    x = torch.randn(4, 3, generator=a.rng)
    common.descend(a.opt, a.net(x).square().mean(), "loss", "--lr")
    a.sent.append((a.nested.count, bytes([a.nested.count])))
    a.mean, a.gone, a.nested.count = x.mean(0), None, a.nested.count + 1
    return [*a.net.weight.tolist(), torch.rand(1, generator=a.nested.rng).item()]


def test_state_goes_through_a_file_and_back(tmp_path):
    """Networks, momenta, generators, queues, None. Fails if one starts afresh, or is a list."""
    a, b = thing(1), thing(2)
    step(a), step(a)
    torch.save(common.state_of(a), tmp_path / "s.pt")
    nested = b.nested
    assert common.restored(b, torch.load(tmp_path / "s.pt", weights_only=True)) is b
    assert a.sent == b.sent == deque([(0, b"\0"), (1, b"\1")]) and torch.equal(a.mean, b.mean)
    assert b.gone is None and b.nested is nested and nested.count == 2
    assert step(a) == step(b) and step(a) == step(b)


def test_a_checkpoint_is_resumed_with_its_own_flags_only(tmp_path):
    """Its place and frequency may change. Fails if these are compared, or others are not."""
    args = SimpleNamespace(resume=True, out="a", device="cpu", checkpoint_every=5, log_every=1, lr=0.1)
    file = tmp_path / "c.pt"
    assert common.load_checkpoint(file, args) is None
    common.save_atomic({"args": common.flat(args), "x": 1}, file)
    moved = SimpleNamespace(**vars(args) | dict(out="b", device="cuda", checkpoint_every=1, log_every=9))
    assert common.load_checkpoint(file, moved)["x"] == 1
    moved.lr = 0.2
    with pytest.raises(InputError, match=r"another --lr \(0.1, now 0.2\)"):
        common.load_checkpoint(file, moved)
    moved.resume = False
    assert common.load_checkpoint(file, moved) is None


# ----- folders and logs --------------------------------------------------------------------------------


def finished(out, **args) -> argparse.Namespace:
    """A run of these flags, with its end."""
    args, log = argparse.Namespace(out=str(out), resume=False, **args), common.RunLog(out)
    log.start(args, torch.device("cpu"))
    log.write("end", acc_pct=1.0)
    return args


def test_a_folder_keeps_its_last_run_until_the_next_one_ends(tmp_path):
    """Fails if a new run, even one that will fail, empties the log of a finished one."""
    args = finished(tmp_path, lr=1.0)
    new = common.RunLog(common.check_out(tmp_path, args))
    new.start(args, torch.device("cpu"))
    assert common.read_log(tmp_path / "log.jsonl")[-1]["acc_pct"] == 1.0
    new.write("end", acc_pct=2.0)
    assert common.read_log(tmp_path / "log.jsonl")[-1]["acc_pct"] == 2.0
    assert [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_folder_of_other_flags_is_refused_and_a_finished_run_not_begun_again(tmp_path, capsys):
    """Fails if --resume of a finished run starts anew, or another --lr takes its folder."""
    args = finished(tmp_path, lr=1.0)
    with pytest.raises(InputError, match=r"another --lr \(1.0, now 2.0\): name another --out"):
        common.check_out(tmp_path, argparse.Namespace(**vars(args) | {"lr": 2.0}))
    args.resume = True
    with pytest.raises(SystemExit) as e:
        common.check_out(tmp_path, args)
    assert not e.value.code and "this run is finished" in capsys.readouterr().out
    (tmp_path / "checkpoint.pt").touch()  # of a second run in the same folder, interrupted
    assert common.check_out(tmp_path, args) == tmp_path
    common.RunLog(tmp_path)  # begun anew: what is resumed later must be this one
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("text", ['{"loss": 1}\n', "[1, 2]\n", "epoch 1\n", "\ufffe"])
def test_the_log_of_another_program_is_left_alone(tmp_path, text):
    """Fails with a traceback, or if the file is emptied."""
    (tmp_path / "log.jsonl").write_text(text, encoding="utf-16")
    with pytest.raises(InputError, match="is the log of another program"):
        common.check_out(tmp_path, argparse.Namespace(resume=False))


def test_a_checkpoint_is_of_the_same_weights(tmp_path):
    """Fails if a file that was replaced under its old name goes unnoticed."""
    net = nn.Linear(3, 2)
    args = argparse.Namespace(resume=True, weights_crc=common.crc_of(net))
    common.save_atomic({"args": common.flat(args)}, tmp_path / "c.pt")
    assert common.load_checkpoint(tmp_path / "c.pt", args)
    net.bias.data[0] += 1e-6
    args.weights_crc = common.crc_of(net)
    with pytest.raises(InputError, match="another --weights-crc"):
        common.load_checkpoint(tmp_path / "c.pt", args)


def test_two_processes_do_not_write_one_folder(tmp_path):
    """The second is refused while the first lives. Fails if their records mix."""
    log = common.RunLog(tmp_path)
    log.write("start")
    code = f"import common, pathlib; common.RunLog(pathlib.Path({str(tmp_path)!r}))"
    second = lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                                    text=True)
    assert "another process is writing it" in second().stderr
    assert [r["event"] for r in common.read_log(log.path)] == ["start"]
    log.file.close()
    assert second().returncode == 0


def test_the_default_folder_tells_every_flag_away_from_its_default():
    """Fails if two runs that differ share a folder."""
    import gdfq

    def folder(line: str) -> str:
        args = gdfq.parse(line.split())
        out = common.default_out("gdfq", "x", args, gdfq.parse([]), "arch seed")
        assert out.name == f"seed{args.seed}"
        return out.parent.name

    assert folder("--arch resnet56 --seed 3 --device cpu") == "x"
    line = "--lr 0.05 --milestones 3 5 --dataset a/b.npz"
    assert folder(line) == "x_dataset-b.npz_milestones-3+5_lr-0.05"
    names = {folder(f"--milestones {' '.join(map(str, range(90, 150)))} --lr {lr}") for lr in (1, 2)}
    assert len(names) == 2 and all(len(name) < 160 for name in names)


def test_several_seeds_are_a_run_and_a_folder_each():
    """Fails if they share a folder, or if --seed alone no longer is one run."""
    ran = []
    main = common.each_seed(lambda args: ran.append((args.seed, args.out)))
    for seeds, out in ((None, None), (None, "o"), ([3, 5], "o"), ([3, 5], None)):
        main(argparse.Namespace(seed=1, seeds=seeds, out=out))
    assert ran == [(1, None), (1, "o"), (3, "o/seed3"), (5, "o/seed5"), (3, None), (5, None)]


@pytest.mark.parametrize("error, says", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
     "not enough memory: lower --batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("Storage size calculation overflowed with sizes=[1000000000000]"), "not enough memory"),
    (RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos"), "is the disk full?")])
def test_memory_and_disk_are_one_clear_line(error, says, capsys):
    """Fails with torch's twenty lines; any other RuntimeError is a fault of ours, and shows itself."""
    def main(args):
        raise error

    with pytest.raises(SystemExit) as e:
        common.run(main, lambda argv: None, [])
    assert e.value.code == 2 and says in capsys.readouterr().err
    for words in ("shapes do not match", "CUDA error: an illegal memory access was encountered"):
        error = RuntimeError(words)
        with pytest.raises(RuntimeError):
            common.run(main, lambda argv: None, [])


# ----- networks of one's own ---------------------------------------------------------------------------


def test_a_network_of_ones_own_comes_from_a_file_or_a_module(own, tiny, monkeypatch):
    """FILE.py:NAME, module:NAME; weights and normalisation of its own. Fails if it shadows `common`."""
    data = common.load_data(str(tiny))
    net, seen, source = common.find_weights(f"{own}:make", str(tiny), data, "none", CPU)
    assert type(net).__name__ == "Net" and net.fc.out_features == 4 and not net.training
    assert seen.mean == [0.4] * 3 and seen.std == [0.3] * 3 and "its own weights" in source
    monkeypatch.chdir(own.parent)
    net, seen, _ = common.find_weights("my_net:make_trained", str(tiny), data, "none", CPU)
    assert common.accuracy_pct(net, data, data.test, CPU) == 100.0 and seen.mean == data.mean
    names = [common.short_name(arch) for arch in (f"{own}:make", "resnet8")]
    assert names == ["my_net-make", "resnet8"]


@pytest.mark.parametrize("mean, says", [
    (torch.full((1, 3, 1, 1), 0.25), None), ((0.25, 0.25, 0.25), None), (0.25, r"mean is \[0.25\]"),
    ("no", "expected three numbers")])
def test_the_normalisation_of_ones_own_network_has_three_numbers(mean, says, monkeypatch):
    """As a buffer of (1, 3, 1, 1), too; a method `size` is no size. Fails if it is taken as it stands."""
    net = torch.nn.Linear(1, 1)
    net.mean, net.size = mean, lambda: 3
    if says:
        with pytest.raises(InputError, match=says):
            common.tool("weights").said_by(net, "mine")
    else:
        assert common.tool("weights").said_by(net, "mine") == {"mean": [0.25] * 3}


def test_torchvisions_weights_bring_their_own_normalisation(monkeypatch):
    """That of efficientnet_v2_l is not ImageNet's usual one. Fails without it."""
    import torchvision
    monkeypatch.setattr(torchvision.models, "get_model", lambda *a, **k: torch.nn.Linear(1, 1))
    data = common.Data("x", [str(i) for i in range(1000)], 224, *common.IMAGENET_NORM, None, None)
    monkeypatch.setattr(common.tool("weights"), "same_classes", lambda *a: None)
    for arch, mean in (("efficientnet_v2_l", [0.5] * 3), ("resnet18", common.IMAGENET_NORM[0])):
        assert common.find_weights(arch, "imagenet", data, None, CPU)[1].mean == mean


def test_a_network_that_fails_without_a_word_is_one_clear_line():
    """A bare assert in its forward. Fails if the message is asked for its first line."""
    net = torch.nn.Linear(1, 1)
    net.forward = lambda x: (_ for _ in ()).throw(AssertionError())
    with pytest.raises(InputError, match="AssertionError"):
        common.check_network(net, torch.zeros(2, 1))


def test_a_seed_within_leaves_the_callers_random_numbers(monkeypatch):
    """Those of a GPU, too. Fails if torch.manual_seed is called, which resets all devices for good."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    before = torch.get_rng_state()
    with common.seeded(3):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with common.seeded(3):
        assert torch.equal(torch.rand(2), first)


@pytest.mark.parametrize("arch, weights, words", [
    ("{}:mak", "none", "--arch .*AttributeError.*mak"), ("{}x.py:make", "none", "FileNotFoundError"),
    ("{}:make_list", "none", "gives a list; expected an nn.Module"),
    ("{}:make_trouble", "none", "ValueError: of its own"), ("nowhere.to:make", "none", "ModuleNotFound"),
    ("{}:make", None, "or none, where the network has its own"), ("resnet8", "none", "only a FILE.py")])
def test_what_is_wrong_with_a_network_of_ones_own_is_one_line(own, tiny, arch, weights, words):
    """Fails if a traceback comes, or if a user's network is trained anew without a word."""
    data = common.load_data(str(tiny))
    with pytest.raises(InputError, match=words):
        common.find_weights(arch.format(own), str(tiny), data, weights, CPU)


def test_a_file_of_weights_does_not_choose_what_code_is_run(own, tmp_path):
    """Its arch may name any function. Fails if a checkpoint's arch is built where no flag repeats it."""
    net = common.build_model(f"{own}:make", 4)
    torch.save({"state_dict": net.state_dict(), "arch": f"{own}:make"}, file := tmp_path / "w.pt")
    with pytest.raises(InputError, match="repeat that behind --foundation"):
        common.load_network(file, None, flag="--foundation")
    assert common.load_network(file, f"{own}:make", 4)[1]["arch"] == f"{own}:make"
