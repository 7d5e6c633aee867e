"""Claims about common.py. Each docstring ends with the change under which the test was seen to fail."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import InputError

CPU = torch.device("cpu")


# ----- fake quantization ---------------------------------------------------------------------------------------------


def loop_fake_quant(values, lo, hi, bits):
    """The quantizer's four lines, one number at a time, in Python floats."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    s = (hi - lo) / (2**bits - 1)
    z = round(lo / s)
    return [s * (min(max(round(v / s) - z, 0), 2**bits - 1) + z) for v in values]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("lo, hi", [(-1.0, 2.0), (0.5, 2.0), (-2.0, -0.5), (0.0, 6.0)])
def test_fake_quant_equals_a_plain_loop(bits, lo, hi):
    """Also for ranges of one sign. Fails if the range is not widened to hold 0, or if codes reach 2^bits."""
    x = torch.empty(500, dtype=torch.float64).uniform_(lo - 1, hi + 1)
    ours = common.fake_quant(x, torch.tensor(lo, dtype=torch.float64), torch.tensor(hi, dtype=torch.float64), bits)
    assert torch.allclose(ours, torch.tensor(loop_fake_quant(x.tolist(), lo, hi, bits), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quant_equals_the_torch_builtin(bits):
    """Against torch.fake_quantize_per_tensor_affine, outside the range, too. Fails if there is one code too many."""
    x = torch.randn(1000)
    s, z = common.step_and_zero(x.min(), x.max(), bits)
    builtin = torch.fake_quantize_per_tensor_affine(2 * x, s, (-z).int(), 0, 2**bits - 1)
    differ = (common.fake_quant(2 * x, x.min(), x.max(), bits) - builtin).abs() > 1e-5
    assert differ.float().mean() < 0.005  # it multiplies by 1/s, which rounds ties the other way


@pytest.mark.parametrize("lo, hi", [(-1.0, 2.0), (0.3, 2.0), (-2.0, -0.3), (-0.37, 0.91)])
def test_zero_stays_exactly_zero(lo, hi):
    """Padding and pruned weights need it, in floats and in codes. Fails if z is not rounded, or the range not widened."""
    for bits in range(2, 9):
        x, lo_t, hi_t = torch.zeros(3), torch.tensor(lo), torch.tensor(hi)
        assert common.fake_quant(x, lo_t, hi_t, bits).abs().max() == 0
        s, z = common.step_and_zero(lo_t, hi_t, bits)
        assert (common.quantize_codes(x, s, z, bits) + z).abs().max() == 0


def test_one_signed_channels_have_codes_that_fit():
    """A channel with only positive, only negative or only zero weights. Fails if the range is not widened to hold 0."""
    w = torch.stack([torch.rand(9) + 0.5, -torch.rand(9) - 0.5, torch.zeros(9), torch.randn(9)])
    for bits in range(2, 9):
        s, z = common.step_and_zero(*common.channel_range(w), bits)
        assert (s > 0).all() and (z <= 0).all() and (z >= -(2**bits - 1)).all()
        w_hat = s * (common.quantize_codes(w, s, z, bits) + z)
        assert (w_hat - w).abs().max() <= s.max() / 2 + 1e-6


def test_gradient_is_straight_through_inside_the_range_and_zero_outside():
    """Fails if a saturated activation passes its gradient."""
    x = torch.tensor([-0.5, 0.1, 0.9, 2.0, 3.4], requires_grad=True)
    common.fake_quant(x, torch.tensor(0.0), torch.tensor(2.0), 4).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_gradient_stops_one_code_beyond_either_end(bits, dtype):
    """The codes -1, 0, 1, the last and one more, in a range of both signs. Fails if an end code counts as clamped, or one beyond does not."""
    last, below, s = 2**bits - 1, 2**(bits - 2), 2**-4  # powers of two: bf16 holds every value exactly
    x = (s * (torch.tensor([-1.0, 0, 1, last, last + 1]) - below)).to(dtype).requires_grad_()
    common.fake_quant(x, torch.tensor(-s * below), torch.tensor(s * (last - below)), bits).sum().backward()
    assert x.grad.dtype == dtype and x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 1001])
def test_packing_is_as_small_as_computed_and_loses_nothing(bits, n):
    """Fails if the last, partly filled byte is dropped."""
    q = torch.randint(0, 2**bits, (n,), dtype=torch.uint8)
    packed = common.pack_bits(q, bits)
    assert packed.numel() == -(-n * bits // 8)
    assert torch.equal(common.unpack_bits(packed, bits, n), q)


def test_ema_of_a_constant_is_that_constant_from_the_first_batch():
    """Fails if the debiased value is fed back, as in published code, or if it is not debiased at all."""
    ema = common.EMA(0.9)
    assert all(abs(float(ema.update(torch.tensor(3.7))) - 3.7) < 1e-5 for _ in range(200))


def test_ema_weighs_values_by_powers_of_the_momentum():
    """Against the explicit weighted mean. Fails if the momentum is applied to the new value."""
    xs, ema = torch.rand(30).double(), common.EMA(0.9)
    last = [float(ema.update(x)) for x in xs][-1]
    assert last == pytest.approx(np.average(xs, weights=0.9 ** np.arange(29, -1, -1)))


# ----- networks and data ---------------------------------------------------------------------------------------------


def test_resnet20_has_the_published_size():
    """270,896 quantizable weights, as in the literature (with projection shortcuts: 273k). Fails if a block is missing."""
    weights = [p.numel() for n, p in common.build_model("resnet20", 10).named_parameters() if p.ndim > 1]
    assert sum(weights) == 270_896


def test_width_multiplies_channels():
    """Fails if the width reaches only some of the layers."""
    a, b = (dict(common.build_model(arch, 10).named_parameters()) for arch in ("resnet20", "resnet20x2"))
    assert all(b[n].shape[0] == 2 * a[n].shape[0] for n in a if not n.startswith("fc"))


def test_embedded_data_are_balanced_and_padded():
    """5,000 train images, 500 a class; 10,000 test images; 3x32x32, border 0; the nearest class mean is right for two thirds of
    the test images. Fails if labels and images are mixed up."""
    data = common.load_data("fashion")
    (x, y), (xt, yt) = data.train.tensors, data.test.tensors
    assert x.shape == (5000, 3, 32, 32) and xt.shape == (10000, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.bincount(y).tolist() == [500] * 10 and torch.bincount(yt).tolist() == [1000] * 10
    assert x[..., :2, :].sum() == 0 and torch.equal(x[:, 0], x[:, 2])
    means = torch.stack([x[y == c, 0].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(xt[:, 0].float().flatten(1), means).argmin(1)
    assert 0.6 < (nearest == yt).float().mean() < 0.75


@pytest.mark.parametrize("shape, label_shape, side", [((6, 28, 28), (6, 1), 32), ((6, 28, 28, 3), (6, 1), 32), ((6, 64, 64), (6,), 64)])
def test_every_medmnist_layout_loads(tmp_path, shape, label_shape, side):
    """Grey or colour, labels (N, 1) or (N,). Fails if grey images are not spread over three channels."""
    images, labels = np.random.randint(0, 255, shape, np.uint8), np.arange(6).reshape(label_shape) % 3
    np.savez(tmp_path / "m.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    data = common.load_data(str(tmp_path / "m.npz"))
    assert data.test.tensors[0].shape == (6, 3, side, side) and len(data.classes) == 3 and data.size == side


def test_an_image_folder_loads(tmp_path):
    """val/<class>/*.png at 224 px, ImageNet normalisation. Fails if val/ is taken for a class."""
    from PIL import Image

    for split in ("train", "val"):
        for c in ("ant", "bee"):
            (tmp_path / split / c).mkdir(parents=True)
            Image.fromarray(np.random.randint(0, 255, (80, 100, 3), np.uint8)).save(tmp_path / split / c / "0.png")
    data = common.load_data(str(tmp_path))
    x, y = next(common.batches(data.test, 2))
    assert data.classes == ["ant", "bee"] and x.shape == (2, 3, 224, 224) and x.dtype == torch.uint8 and y.tolist() == [0, 1]


def test_crop_and_flip_shifts_each_image_by_at_most_an_eighth():
    """A single bright pixel lands where a shift of up to 4 and a flip can put it. Fails if all images get one shift."""
    x = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 16, 10] = 255
    spots = {tuple(s) for s in common.crop_and_flip(x, torch.Generator().manual_seed(0))[:, 0].nonzero()[:, 1:].tolist()}
    rows, cols = {r for r, _ in spots}, {c for _, c in spots}
    assert rows == set(range(12, 21)) and cols == set(range(6, 15)) | set(range(17, 26)) and len(spots) > 60


def test_one_pass_sees_every_image_once():
    """Fails if the last, smaller batch is dropped or the order has repeats."""
    split = torch.utils.data.TensorDataset(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10))
    seen = torch.cat([y for _, y in common.batches(split, 4, torch.Generator().manual_seed(1))])
    assert sorted(seen.tolist()) == list(range(10)) and seen.tolist() != list(range(10))


def test_to_input_has_zero_mean_and_unit_variance_on_the_embedded_data():
    """The generator's last BatchNorm assumes it. Fails if the statistics are those of unpadded images."""
    data = common.load_data("fashion")
    x = common.to_input(data.train.tensors[0], data.mean, data.std, CPU)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and x.is_contiguous(memory_format=torch.channels_last)


# ----- pretraining and weights ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """A .npz of 64 train and 32 test images in 2 classes that differ in brightness."""
    rng = np.random.default_rng(0)
    y = np.arange(96) % 2
    x = np.clip(rng.normal(80 + 90 * y[:, None, None], 30, (96, 32, 32)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", train_images=x[:64], train_labels=y[:64], test_images=x[64:], test_labels=y[64:])
    return tmp_path / "tiny.npz"


@pytest.mark.parametrize("augment", ["crop-flip", "trivial-noise"])
def test_pretraining_resumed_equals_uninterrupted_bitwise(tiny, tmp_path, monkeypatch, augment):
    """Fails if the shuffling generator or the momentum is not in the checkpoint, or torch is not seeded anew each epoch."""
    def go(name, resume=False):
        common.pretrain("resnet8", common.load_data(str(tiny)), tmp_path / name, 3, 16, 0.1, 0.9, 5e-4, 0.3, 0.0, False, 0, CPU, resume,
                        augment=augment)
        return torch.load(tmp_path / name, weights_only=True)["state_dict"]

    whole = go("whole.pt")
    evaluate, calls = common.accuracy_pct, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(common, "accuracy_pct", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go("parts.pt")
    monkeypatch.setattr(common, "accuracy_pct", evaluate)
    parts = go("parts.pt", resume=True)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_pretraining_goes_on_from_a_checkpoint(tiny, tmp_path):
    """With next to no learning rate the weights are those of --init. Fails if they are random."""
    data = common.load_data(str(tiny))
    for name, kw in (("first.pt", {}), ("second.pt", dict(init=str(tmp_path / "first.pt")))):
        common.pretrain("resnet8", data, tmp_path / name, 1, 16, 1e-12 if kw else 0.1, 0.9, 5e-4, 0.3, 0.0, False, 0, CPU, False, **kw)
    a, b = (torch.load(tmp_path / n, weights_only=True)["state_dict"] for n in ("first.pt", "second.pt"))
    assert torch.allclose(a["conv1.weight"], b["conv1.weight"], atol=1e-6)


def test_pretrain_command_writes_a_checkpoint_that_knows_itself(tiny, tmp_path):
    """Arch, classes, normalisation, accuracy, command and seed, readable with weights_only. Fails if one is missing."""
    common.run(lambda a: a.main(a), common.build_parser().parse_args,
               f"pretrain --arch resnet8 --dataset {tiny} --epochs 4 --batch-size 16 --save {tmp_path}/w.pt --out {tmp_path}/o".split())
    ck = torch.load(tmp_path / "w.pt", weights_only=True)
    assert {"state_dict", "arch", "classes", "mean", "std", "size", "acc_pct", "command", "seed"} <= set(ck)
    log = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").open()]
    assert [r["event"] for r in log] == ["start", *["eval"] * 4, "end"] and log[-1]["acc_pct"] == ck["acc_pct"]
    model, data, source = common.find_weights("resnet8", str(tiny), common.load_data(str(tiny)), str(tmp_path / "w.pt"), CPU)
    assert common.accuracy_pct(model, data, data.test, CPU) == ck["acc_pct"] and "w.pt" in source


@pytest.mark.parametrize("dataset, arch, least", [("fashion", "resnet20", 93.5), ("fashion", "resnet20x2", 93.0), ("cifar100", "resnet20", 66.0), ("cifar100", "resnet20x2", 66.0)])
def test_shipped_weights_state_their_accuracy(dataset, arch, least):
    """And on the embedded data it is measured again, to the image. Fails if the file is not the logged one."""
    ck = torch.load(common.ROOT / "weights" / f"{dataset}_{arch}.pt", weights_only=True)
    end = [json.loads(line) for line in (common.ROOT / "results" / f"pretrain_{dataset}_{arch}" / "log.jsonl").open()][-1]
    assert ck["acc_pct"] == end["acc_pct"] >= least
    if dataset == "fashion":
        model, data, _ = common.find_weights(arch, dataset, common.load_data(dataset), None, CPU)
        assert common.accuracy_pct(model, data, data.test, CPU) == pytest.approx(ck["acc_pct"], abs=0.011)


def test_the_tables_in_the_readme_are_those_of_the_logs():
    """`python common.py table` changes nothing. Fails if a number is edited by hand."""
    text = (common.ROOT / "README.md").read_text()
    assert common.with_tables(text) == text and text.count("<!-- table ") == text.count("<!-- end -->") > 0


def test_a_table_row_is_mean_and_sample_std_of_the_last_states(tmp_path):
    """Two made-up logs. Fails if the std is the population's."""
    for seed, acc in enumerate((90.0, 92.0)):
        (tmp_path / "gdfq_x").mkdir(exist_ok=True)
        with (tmp_path / "gdfq_x" / f"s{seed}.jsonl").open("w") as f:
            for r in ({"event": "start", "argv": f"python gdfq.py --wbits 3 --seed {seed}", "device": "cpu", "threads": 2},
                      {"event": "eval", "acc_pct": 99.0}, {"event": "end", "acc_pct": acc, "wall_s": 10.0}):
                f.write(json.dumps(r) + "\n")
    head, _, row = common.results_table("gdfq", tmp_path).splitlines()
    assert head == "| row | **ours** | seeds | time | device | command |" and row.count("|") == 7
    assert "91.00 +- 1.41" in row and "| 2 | 10 s |" in row and "`python gdfq.py --wbits 3`" in row


# ----- bad input -----------------------------------------------------------------------------------------------------


def test_unknown_data_sets_and_networks_name_the_nearest(tmp_path):
    """Fails if the nearest names are not listed."""
    with pytest.raises(InputError, match="nearest: fashion"):
        common.load_data("fasion")
    with pytest.raises(InputError, match="resnet18"):
        common.build_model("resnet1", 10)


@pytest.mark.parametrize("make, says", [
    (lambda p: p.write_bytes(b"PK\x03\x04 half a file"), "not a readable .npz"),
    (lambda p: np.savez(p, images=np.zeros(3)), "MedMNIST keys"),
    (lambda p: np.savez(p, train_images=np.zeros((4, 28, 28), np.float32), train_labels=np.zeros(4, int),
                        test_images=np.zeros((4, 28, 28), np.float32), test_labels=np.zeros(4, int)), "expected uint8"),
    (lambda p: np.savez(p, train_images=np.zeros((4, 28, 30), np.uint8), train_labels=np.zeros(4, int),
                        test_images=np.zeros((4, 28, 30), np.uint8), test_labels=np.zeros(4, int)), "expected uint8"),
    (lambda p: np.savez(p, train_images=np.zeros((4, 28, 28), np.uint8), train_labels=np.zeros((4, 14), int),
                        test_images=np.zeros((4, 28, 28), np.uint8), test_labels=np.zeros((4, 14), int)), "one integer an image"),
])
def test_a_broken_npz_is_one_clear_line(tmp_path, make, says):
    """Truncated, without the keys, float images, not square, multi-label. Fails if any of them ends in a traceback."""
    make(tmp_path / "x.npz")
    with pytest.raises(InputError, match=says):
        common.load_data(str(tmp_path / "x.npz"))


def test_a_folder_without_val_is_one_clear_line(tmp_path):
    """Fails if an empty folder is taken for a data set."""
    with pytest.raises(InputError, match="no val/ folder"):
        common.load_data(str(tmp_path))


def test_broken_weights_are_one_clear_line(tiny, tmp_path):
    """Missing, truncated, other classes, other network. Fails if load_state_dict's many lines reach the user."""
    data = common.load_data(str(tiny))
    model = common.build_model("resnet8", 2)
    torch.save({"state_dict": model.state_dict(), "classes": ["a", "b"]}, tmp_path / "good.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    torch.save({"state_dict": common.build_model("resnet8", 5).state_dict(), "classes": list("abcde")}, tmp_path / "five.pt")
    torch.save(common.build_model("resnet8", 5).state_dict(), tmp_path / "bare.pt")
    for name, arch, says in (("none.pt", "resnet8", "no such file"), ("half.pt", "resnet8", "truncated"),
                             ("five.pt", "resnet8", "5 classes"), ("bare.pt", "resnet8", "does not fit"), ("good.pt", "resnet14", "does not fit")):
        with pytest.raises(InputError, match=says) as e:
            common.find_weights(arch, str(tiny), data, str(tmp_path / name), CPU)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("command, says", [
    ("--arch vit_b_16", "does not run on the 32 px"),
    ("--batch-size 65", "only 64 train images"),
    ("--save /proc/none/w.pt --arch resnet8 --epochs 1 --batch-size 16", "/proc/none"),
    ("--epochs 0", "at least 1"),
])
def test_a_mistake_in_pretraining_is_one_line(tiny, tmp_path, monkeypatch, fails, command, says):
    """Fails if a traceback reaches the user."""
    monkeypatch.chdir(tmp_path)
    assert says in fails(common, f"pretrain --dataset {tiny} {command}")


def test_missing_weights_name_the_command_that_makes_them(tiny):
    """Fails if a network would silently be trained, or evaluated untrained."""
    with pytest.raises(InputError, match="common.py pretrain --arch resnet14"):
        common.find_weights("resnet14", str(tiny), common.load_data(str(tiny)), None, CPU)
