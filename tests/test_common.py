"""Claims about common.py. Each docstring ends with the change under which its test was seen to fail."""

import argparse
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import common
from common import InputError, ROOT
from tools.deploy import pack_bits, unpack_bits

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


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("lo, hi", [(-1.0, 2.0), (0.3, 2.0), (-2.0, -0.3), (-0.37, 0.91)])
def test_zero_stays_exactly_zero(lo, hi, bits):
    """Padding and pruned weights need it. Fails if z is not rounded, or the range not widened."""
    assert common.fake_quant(torch.zeros(3), *torch.tensor([lo, hi]), bits).abs().max() == 0


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


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 1001])
def test_packing_is_as_small_as_computed_and_loses_nothing(bits, n):
    """Fails if the last, partly filled byte is dropped."""
    q = torch.randint(0, 2**bits, (n,), dtype=torch.uint8)
    packed = pack_bits(q, bits)
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


# ----- data ------------------------------------------------------------------------------------------


def save_images(root: Path, *names: str, image=np.full((8, 8), 200, np.uint8)) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    return root


def save_npz(path: Path, **changes) -> str:
    """A set of 3 train and 2 test images in two classes, with changes."""
    image = lambda n: np.zeros((n, 32, 32), np.uint8)
    arrays = dict(train_images=image(3), train_labels=[0, 1, 1], test_images=image(2), test_labels=[0, 1])
    np.savez(path, **arrays | changes)
    return str(path)


def test_embedded_data_are_balanced_and_padded():
    """500 train and 1,000 test images per class, with a black border. Fails if the padding is missing."""
    data = common.load_data("fashion")
    (x, y), (xt, yt) = data.train.tensors, data.test.tensors
    assert x.shape == (5000, 3, 32, 32) and xt.shape == (10000, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.bincount(y).tolist() == [500] * 10 and torch.bincount(yt).tolist() == [1000] * 10
    assert x[..., :2, :].sum() == 0 and torch.equal(x[:, 0], x[:, 2])


def test_embedded_labels_belong_to_their_images():
    """The nearest class mean is right for two thirds. Fails if labels and images are mixed up."""
    data = common.load_data("fashion")
    (x, y), (xt, yt) = data.train.tensors, data.test.tensors
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
    """val/<class>/*.png at 224 px, ImageNet normalisation. Fails if val/ is taken for a class."""
    names = [f"{split}/{c}/0.png" for split in ("train", "val") for c in ("ant", "bee")]
    save_images(tmp_path, *names, image=np.zeros((240, 230, 3), np.uint8))
    data = common.load_data(str(tmp_path))
    x, y = next(common.batches(data.test, 2))
    assert data.classes == ["ant", "bee"] and data.mean == common.NORMS["imagenet"][0]
    assert x.shape == (2, 3, 224, 224) and x.dtype == torch.uint8 and y.tolist() == [0, 1]
    assert common.labels_of(data.train).tolist() == [0, 1]


def test_without_resizing_an_image_is_only_cut(tmp_path):
    """As corrupted ImageNet is stored. Fails if `resize` goes unread."""
    image = np.random.randint(0, 255, (240, 230, 3), np.uint8)
    save_images(tmp_path, "ant/0.png", image=image)
    x, _ = common.ImageFolder(tmp_path, 224, resize=False)[0]
    assert np.array_equal(x.permute(1, 2, 0), image[8:232, 3:227])


def test_only_images_count_as_images(tmp_path):
    """What a Mac or a notebook leaves is skipped, and so is a link that leads back. Fails if one counts."""
    save_images(tmp_path, *(f"{folder}/0.png" for folder in (
        "ant", "bee/deeper", ".cache", "__MACOSX", "@eaDir", "ant/.ipynb_checkpoints")))
    (tmp_path / "ant/loop").symlink_to(tmp_path / "ant")
    (tmp_path / "ant/._0.png").write_bytes(b"Mac OS X")
    (tmp_path / "ant/notes.txt").write_text("no image")
    folder = common.ImageFolder(tmp_path)
    assert folder.classes == ["ant", "bee"] and folder.targets == [0, 1]


@pytest.mark.parametrize("name", ["0.png", "0.tiff"])
def test_sixteen_bits_become_eight(name, tmp_path):
    """Fails if they are clipped, so that the image is white."""
    save_images(tmp_path, f"ant/{name}", image=np.full((8, 8), 200 * 257, np.uint16))
    x, _ = common.ImageFolder(tmp_path)[0]
    assert x.shape == (3, 32, 32) and (x == 200).all()


def test_an_image_stands_upright(tmp_path):
    """A phone writes how it was held into EXIF tag 274. Fails if the tag goes unread."""
    save_images(tmp_path, "0.jpg", image=np.zeros((8, 24), np.uint8))
    image = Image.open(tmp_path / "0.jpg")
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "1.jpg", exif=exif)
    assert [common.read_image(tmp_path / f"{n}.jpg").size for n in (0, 1)] == [(24, 8), (8, 24)]


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
    """In as many processes as --workers says. Fails if the flag goes unread, or they mix the order up."""
    for n in range(12):
        save_images(tmp_path, f"val/ant/{n:02d}.png", image=np.full((32, 32), 20 * n, np.uint8))
    data, asked, seen = common.load_data(str(tmp_path)), [], []
    monkeypatch.setattr(common.Workers, "count", None)
    monkeypatch.setattr(common, "DataLoader",
                        lambda *a, **k: asked.append(k["num_workers"]) or DataLoader(*a, **k))
    main = lambda args: seen.extend(x[:, 0, 0, 0] for x, _ in common.batches(data.test, 2))
    common.run(main, lambda argv: argparse.Namespace(workers=workers))
    assert asked == [workers] and torch.cat(seen).tolist() == [20 * n for n in range(12)]


@pytest.mark.parametrize("name, image", [
    ("half", np.ones((90, 90), np.uint8)), ("page", b"<html>"), ("float", np.ones((9, 9), np.float32)),
    ("32bits", np.full((9, 9), 2**20, np.int32)), ("dark", np.full((9, 9), 200, np.int32))])
def test_a_broken_image_is_one_clear_line_with_its_name(name, image, tmp_path, capsys):
    """Also from a worker process. Fails if the run ends without the name, or the image is made up."""
    file = tmp_path / f"val/ant/{name}.tiff"
    save_images(tmp_path, f"val/ant/{name}.tiff", image=image if name != "page" else np.ones((9, 9)) > 0)
    if name in ("half", "page"):
        file.write_bytes(file.read_bytes()[:2000] if name == "half" else image)
    data = common.load_data(str(tmp_path))
    with pytest.raises(SystemExit):
        common.run(lambda args: list(common.batches(data.test, 2)), lambda argv: None, [])
    line = capsys.readouterr().err.strip().splitlines()[-1]  # a dying worker may have its say before
    assert f"error: {file}: not an image that can be read" in line and "Traceback" not in line


@pytest.mark.parametrize("changes, says", [
    (dict(train_labels=[0, 10**8, 1]), "label 100000000 for 3 train images"),
    (dict(train_labels=np.array([0, 1, 2**63], np.uint64)), "expected one integer an image"),
    (dict(train_labels=[0, -1, 1]), "expected one integer an image"),
    (dict(train_labels=np.zeros((3, 14), int)), "expected one integer an image"),
    (dict(train_labels=[0, 2, 1], classes=["a", "b"]), "label 2 of 2 classes"),
    (dict(test_labels=[0, 2], classes=["a", "b"]), "label 2 of 2 classes"),
    (dict(classes=2), "classes"),
    (dict(test_images=np.zeros((2, 48, 48), np.uint8)), "train images of 32 px and test images of 48 px"),
    (dict(train_images=np.zeros((3, 32, 32), np.float32)), "expected uint8"),
    (dict(train_images=np.zeros((3, 32, 30), np.uint8)), "expected uint8")])
def test_an_unsuitable_npz_is_one_clear_line(tmp_path, changes, says):
    """Fails if a label above the classes is an IndexError later, or takes all memory now."""
    with pytest.raises(InputError, match=says):
        common.load_data(save_npz(tmp_path / "x.npz", **changes))


@pytest.mark.parametrize("labels, empty", [([1, 2, 2], "1 of its 3 classes have no image, as 0"),
                                           ([0, 1, 3], "1 of its 4 classes have no image, as 2")])
def test_a_class_without_images_is_named(tmp_path, labels, empty):
    """Labels from 1, or 255 for "ignore". Fails if a network with an idle output is made silently."""
    with pytest.warns(UserWarning, match=f"{empty}; labels count from 0"):
        common.load_data(save_npz(tmp_path / "x.npz", train_labels=labels, test_labels=labels[:2]))


@pytest.mark.parametrize("name, says", [("half.npz", "not a readable"), ("other.npz", "MedMNIST keys"),
                                        ("folder", "no val/ folder"), ("fasion", "nearest: fashion")])
def test_what_is_no_data_set_is_one_clear_line(tmp_path, monkeypatch, name, says):
    """Fails if one of them ends in a traceback, or if the nearest name is not listed."""
    monkeypatch.chdir(tmp_path)
    Path("half.npz").write_bytes(b"PK\x03\x04 half a file")
    np.savez("other.npz", images=np.zeros(3))
    Path("folder").mkdir()
    with pytest.raises(InputError, match=says):
        common.load_data(name)


def test_a_size_is_for_folders_alone():
    """Fails if --size goes unread, and a run has images of another size than its flags say."""
    with pytest.raises(InputError, match="fashion: has images of 32 px, not 40"):
        common.load_data("fashion", size=40)


@pytest.mark.parametrize("call, says", [
    (lambda: common.load_data("fashion"), "copy data/ along"),
    (lambda: common.find_weights("resnet8", "fashion", common.Data("x", ["a"], 32, *[[0.5] * 3] * 2, None,
                                                                   None), None, CPU), "copy tools/ along")])
def test_a_copied_script_says_what_to_copy_along(call, says, tmp_path, monkeypatch):
    """Fails if it names a file and not where that comes from."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "tools.pretrain", None)
    with pytest.raises(InputError, match=says):
        call()


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


def test_an_unknown_network_names_the_nearest():
    """Fails if the nearest names are not listed."""
    with pytest.raises(InputError, match="resnet18"):
        common.build_model("resnet1", 10)


@pytest.mark.parametrize("name, least", [
    ("fashion_resnet20", 94), ("fashion_resnet20x2", 93), ("cifar10_resnet20", 91),
    ("cifar100_resnet20", 66), ("cifar100_resnet20x2", 66), ("cifar100_vit-mixed", 59),
    ("cifar100_vit-plain", 57), ("cifar100_resnet20_long", 69), ("cifar100_resnet20x2_cloud", 70)])
def test_shipped_weights_are_the_logged_ones(name, least):
    """Fails if a file of weights is of another run than its log."""
    saved = torch.load(ROOT / "weights" / f"{name}.pt", weights_only=True)
    log = (ROOT / "results" / "pretrain" / name / "log.jsonl").read_text().splitlines()
    assert saved["acc_pct"] == json.loads(log[-1])["acc_pct"] >= least


def test_shipped_weights_are_as_good_as_they_say():
    """Measured again, to the image. Fails if file or normalisation is another one."""
    data = common.load_data("fashion")
    model, data, source = common.find_weights("resnet20", "fashion", data, None, CPU)
    model.to(memory_format=torch.channels_last)
    acc_pct = common.accuracy_pct(model, data, data.test, CPU)
    assert acc_pct == pytest.approx(94.21, abs=0.011) and "94.21 % by its own record" in source


def state_dict(classes: int = 4) -> dict:
    return common.build_model("resnet8", classes).state_dict()


@pytest.mark.parametrize("arch, saved, says", [
    ("resnet8", None, "no such file"),
    ("resnet8", b"PK\x03\x04 half a file", "cannot be read"),
    ("resnet8", lambda: {"state_dict": state_dict(5), "classes": list("abcde")}, "5 classes"),
    ("resnet8", lambda: state_dict(5), "does not fit"),
    ("resnet14", lambda: {"state_dict": state_dict(), "classes": list("0123")}, "does not fit"),
    ("resnet8", lambda: state_dict() | {"fc.bias": torch.full((4,), math.nan)}, "fc.bias.* holds NaN"),
    ("resnet8", lambda: {"weight": torch.zeros(4)}, "does not fit"),  # whose prefix never ended
    ("resnet14", lambda: {"state_dict": state_dict(), "arch": "resnet8"}, "the file holds a resnet8")])
def test_broken_weights_are_one_clear_line(arch, saved, says, tiny, tmp_path):
    """Missing, half, other classes, other network. Fails if a traceback comes through."""
    file = tmp_path / "w.pt"
    if isinstance(saved, bytes):
        file.write_bytes(saved)
    elif saved:
        torch.save(saved(), file)
    with pytest.raises(InputError, match=says) as e:
        common.find_weights(arch, str(tiny), common.load_data(str(tiny)), str(file), CPU)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"model": s}, lambda s: {"whatever": s},
    lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_weight_files_of_other_programs_load(wrap, tmp_path):
    """Bare, wrapped, of DataParallel, of torch.compile. Fails if one prefix or wrapper is not known."""
    state = state_dict(5)
    torch.save(wrap(state), tmp_path / "w.pt")
    loaded = common.load_network(tmp_path / "w.pt", "resnet8", 5)[0].state_dict()
    assert all(torch.equal(state[k], v) for k, v in loaded.items())


@pytest.fixture
def find_named(tiny, tiny_weights, tmp_path):
    """find_named(a, b): the network of tiny, whose classes a file calls b, for data that call them a."""
    def find(of_data: str, of_file: str) -> nn.Module:
        data = common.load_data(str(tiny))._replace(classes=of_data.split())
        saved = torch.load(tiny_weights, weights_only=True) | {"classes": of_file.split()}
        torch.save(saved, tmp_path / "named.pt")
        return common.find_weights("resnet8", str(tiny), data, tmp_path / "named.pt", CPU)[0]
    return find


@pytest.mark.parametrize("of_data, of_file, order", [
    ("ant bee cat dog", "ant bee cat dog", [0, 1, 2, 3]),
    ("ant bee cat dog", "dog cat bee ant", [3, 2, 1, 0]),
    ("0 1 10 2", "0 1 2 10", [0, 1, 3, 2]),  # folders sort 10 before 2
    ("0 1 10 2", "ant bee cat dog", [0, 1, 3, 2]),  # numbers on one side are those of the outputs
    ("ant bee cat dog", "0 1 10 2", [0, 1, 3, 2])])
def test_outputs_move_to_the_place_of_their_class(of_data, of_file, order, find_named, tiny_weights):
    """Fails if classes are matched by number alone."""
    x = torch.randn(4, 3, 32, 32)
    want = common.load_network(tiny_weights, "resnet8")[0](x)[:, order]
    assert torch.equal(find_named(of_data, of_file)(x), want)


@pytest.mark.parametrize("of_file, says", [("car bus van dog", "for other classes .* knows ant"),
                                           ("ant ant bee cat", "names a class twice")])
def test_weights_for_other_classes_are_refused(of_file, says, find_named):
    """Fails if as many classes are taken for the same ones."""
    with pytest.raises(InputError, match=f"named.pt: .*{says}"):
        find_named("ant bee cat dog", of_file)


def test_missing_weights_name_the_command_that_makes_them(tiny):
    """Fails if a network would silently be trained, or evaluated untrained."""
    with pytest.raises(InputError, match="tools/pretrain.py --arch resnet14 --dataset .*tiny.npz"):
        common.find_weights("resnet14", str(tiny), common.load_data(str(tiny)), None, CPU)


def test_a_network_of_ones_own_comes_from_a_file(own, tiny):
    """FILE.py:NAME, with its own normalisation. Fails if it shadows `common`, or is left in training."""
    data = common.load_data(str(tiny))
    net, seen, source = common.find_weights(f"{own}:make", str(tiny), data, "none", CPU)
    assert type(net).__name__ == "Net" and net.fc.out_features == 4 and not net.training
    assert seen.mean == [0.4] * 3 and seen.std == [0.3] * 3 and "its own weights" in source


def test_a_network_of_ones_own_comes_from_a_module(own, tiny, monkeypatch):
    """module:NAME in the folder at hand, a function of nothing. Fails if its weights are lost."""
    data = common.load_data(str(tiny))
    monkeypatch.chdir(own.parent)
    net, seen, _ = common.find_weights("my_net:make_trained", str(tiny), data, "none", CPU)
    assert common.accuracy_pct(net, data, data.test, CPU) == 100.0 and seen.mean == data.mean


@pytest.mark.parametrize("arch, name", [("a/my_net.py:make", "my_net-make"), ("resnet8", "resnet8")])
def test_the_name_of_a_network_can_be_that_of_a_file(arch, name):
    """Fails if a path becomes part of it."""
    assert common.short_name(arch) == name


@pytest.mark.parametrize("mean, says", [
    (torch.full((1, 3, 1, 1), 0.25), None), ((0.25, 0.25, 0.25), None),
    (0.25, "its mean is 0.25; expected three numbers"), ("no", "--arch my:net: ")])
def test_the_normalisation_of_ones_own_network_has_three_numbers(mean, says, monkeypatch):
    """As a buffer of (1, 3, 1, 1), too; a method `size` is no size. Fails if it is taken as it stands."""
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


def test_a_network_that_fails_without_a_word_is_one_clear_line():
    """A bare assert in its forward. Fails if the message is asked for its first line."""
    net = nn.Linear(1, 1)
    net.forward = lambda x: (_ for _ in ()).throw(AssertionError())
    with pytest.raises(InputError, match="AssertionError"):
        common.check_network(net, torch.zeros(2, 1))


@pytest.mark.parametrize("arch, weights, words", [
    ("{}:mak", "none", "--arch .*KeyError.*mak"), ("{}x.py:make", "none", "FileNotFoundError"),
    ("{}:make_list", "none", "gives a list; expected an nn.Module"),
    ("{}:make_trouble", "none", "ValueError: of its own"), ("nowhere.to:make", "none", "ModuleNotFound"),
    ("{}:make", None, "or none where the network has its own"), ("resnet8", "none", "only a FILE.py")])
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


def test_each_run_has_a_new_folder(tmp_path):
    """Fails if the second run takes the folder of the first."""
    names = [common.new_folder(flags(seed=seed), f"{tmp_path}/x").name for seed in (0, 0, 1, 0)]
    assert names == ["seed0", "seed0-2", "seed1", "seed0-3"]


def test_runs_that_start_together_do_not_share_a_folder(tmp_path):
    """Fails if a folder is looked for before it is made."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: common.new_folder(flags(), f"{tmp_path}/x"), range(40)))
    assert len(set(made)) == 40


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


@pytest.mark.parametrize("line, says", [("--lr 0.5", "leave out --lr"), ("--seeds=3", "leave out --seeds")])
def test_resume_refuses_other_flags(parser, line, says):
    """Fails if a flag is ignored without a word."""
    with pytest.raises(InputError, match=says):
        parser.parse_args(["--resume", "old", *line.split()])


def test_a_run_of_another_script_is_not_resumed(parser):
    """Fails if its flags are taken over."""
    parser.prog = "y.py"
    with pytest.raises(InputError, match="old: is a run of x.py, not of y.py"):
        parser.parse_args(["--resume", "old"])


def test_a_finished_run_is_not_begun_again(parser, capsys):
    """It has a log and no checkpoint. Fails if --resume of it starts anew, or is called a mistake."""
    Path("old/checkpoint.pt").unlink()
    with pytest.raises(SystemExit) as e:
        parser.parse_args(["--resume", "old"])
    assert not e.value.code and "this run has ended" in capsys.readouterr().out


def events(folder: Path) -> list:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [r.get("iteration", r["event"]) for r in map(json.loads, lines)]


def test_a_resumed_log_goes_on_where_the_checkpoint_was_written(tmp_path):
    """Half a last line is what a killed run leaves. Fails if it, or a lost iteration, stays."""
    log = common.RunLog(tmp_path, flags(), CPU)
    log.write("step", iteration=10)
    common.save_checkpoint(log, flags(), crc=1)
    log.write("step", iteration=20)
    log.file.write('{"event": "step", "iter')
    log.file.close()
    state = common.load_checkpoint(flags(resume=str(tmp_path)), 1)
    common.RunLog(tmp_path, flags(), CPU, state=state).write("end")
    assert events(tmp_path) == ["start", 10, "start", "end"]


def test_a_resumed_log_counts_the_seconds_of_all_stretches(tmp_path):
    """Fails if the clock starts at 0 again."""
    log = common.RunLog(tmp_path, flags(), CPU, state={"wall_s": 100.0, "log_bytes": 0})
    assert 100 <= log.seconds() < 101


def test_a_log_holds_numbers_that_every_reader_of_json_knows(tmp_path):
    """Fails if NaN is written as it is."""
    common.RunLog(tmp_path, flags(), CPU).write("step", loss=math.nan, best=-math.inf)
    last = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    assert last == '{"event": "step", "loss": null, "best": null}'


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


class Thing:
    def __init__(self, **state):
        self.STATE = tuple(state)
        vars(self).update(state)


def thing(seed: int) -> Thing:
    net, rng = nn.Linear(3, 1), torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    nested = Thing(count=0, rng=torch.Generator().manual_seed(seed))
    return Thing(net=net, opt=opt, rng=rng, sent=[], mean=None, gone=torch.ones(1), nested=nested)


def step(a: Thing) -> list[float]:
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


def command(error: BaseException) -> None:
    def main(args):
        raise error
    common.run(main, lambda argv: None, [])


@pytest.mark.parametrize("error, says", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
     "not enough memory: lower --batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("Storage size calculation overflowed with sizes=[1000000000000]"), "not enough memory"),
    (RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos"), "is the disk full?")])
def test_memory_and_disk_are_one_clear_line(error, says, capsys):
    """Fails with torch's twenty lines."""
    with pytest.raises(SystemExit) as e:
        command(error)
    assert e.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("words", ["shapes do not match", "CUDA error: an illegal memory access"])
def test_a_fault_of_ours_shows_itself(words):
    """Fails if any RuntimeError becomes one line, without the place where it was raised."""
    with pytest.raises(RuntimeError, match=words):
        command(RuntimeError(words))


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_an_interrupted_run_says_how_to_go_on(has_checkpoint, tmp_path, monkeypatch, capsys):
    """Fails if it names a folder from which no run can go on."""
    monkeypatch.setattr(common.RunLog, "folder", tmp_path)
    if has_checkpoint:
        (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(SystemExit) as e:
        command(KeyboardInterrupt())
    err = capsys.readouterr().err
    assert e.value.code == 130 and (f"--resume {tmp_path}" in err) == has_checkpoint
