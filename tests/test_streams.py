"""Claims about tools/streams.py.

Each docstring ends with the change under which the test was seen to fail.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import cema
from tools import streams
from tools.streams import Domain, Stream, Tally


def toy(n: int = 30) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
    return TensorDataset(x, torch.arange(n) % 3)


def jpegs(root: Path, wnids: list[str], n: int = 2, size: int = 224) -> None:
    for c, wnid in enumerate(wnids):
        (root / wnid).mkdir(parents=True)
        for k in range(n):
            image = Image.fromarray(np.full((size, size, 3), 20 * c + k, np.uint8))
            image.save(root / wnid / f"{k}.JPEG", quality=95)


def load(command: str):
    return streams.load_domains(cema.parse(command.split()))


# ----- order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["reset", "lifelong", "mixed", "label-shift"])
def test_orders_and_loops(order):
    """Each image once a pass. Fails if images repeat, classes stay unsorted, or the seed is not read."""
    domains = [Domain("a", toy()), Domain("b", toy())]
    s, again, other = (Stream(domains, order, images=20, loop=2, seed=seed) for seed in (0, 0, 1))
    d, i = s.where.T
    counts = [i[d == k].unique(return_counts=True)[1].tolist() for k in (0, 1)]
    y = [int(domains[0].split[k][1]) for k in i[:20].tolist()]
    runs = [int(k) for k in d.unique_consecutive()]
    assert counts == [[2] * 20] * 2 and (y == sorted(y)) == (order == "label-shift")
    assert len(runs) > 10 if order == "mixed" else runs == [0, 1] * (2 if order == "lifelong" else 1)
    assert order != "mixed" or len(s.where[:40].unique(dim=0)) == 40
    assert torch.equal(s.where, again.where) and not torch.equal(s.where, other.where)


@pytest.mark.parametrize("order, ends", [
    ("reset", [0, 1]), ("label-shift", [0, 1]), ("lifelong", [0, 1, 2, 3]), ("mixed", [0, 1])])
def test_no_batch_reaches_over_the_end_of_a_part(order, ends):
    """ends: the parts with a smaller batch. Fails if one reaches over a reset, or an image is lost."""
    s = Stream([Domain("a", toy()), Domain("b", toy())], order, images=20, loop=2, seed=0)
    batches = s.batches(16)
    assert [k for _, positions in batches for k in positions] == list(range(80)) == list(range(len(s)))
    assert [part for part, positions in batches if len(positions) < 16] == ends
    assert s.resets == (order in ("reset", "label-shift"))


def test_an_image_looks_the_same_in_every_order():
    """By image and seed, not by place. Fails if the index is the batch's, or the domain another's."""
    domains = [Domain("noise", toy(), "gaussian_noise"), Domain("fog", toy(), "fog"), Domain("c", toy())]

    def collect(order: str, batch_size: int) -> dict:
        s, out = Stream(domains, order, 30, 1, 0), {}
        for x, y, d, i in s.seen(s.batches(batch_size), 5, 0):
            out |= dict(zip(zip(d.tolist(), i.tolist()), x))
        return out

    a, b = collect("reset", 16), collect("mixed", 7)
    assert a.keys() == b.keys() and len(a) == 90 and all(torch.equal(a[k], b[k]) for k in a)
    clean = toy()[0][0]
    assert torch.equal(a[2, 0], clean)  # a domain without corruption
    assert not torch.equal(a[0, 0], clean) and not torch.equal(a[0, 0], a[1, 0])


# ----- files -------------------------------------------------------------------------------------------


def test_imagenet_c_folders(tmp_path):
    """corruption/severity/wnid. Fails if another severity is read, or the crop changes the pixels."""
    for n in ("fog", "snow"):
        jpegs(tmp_path / n / "3", ["n01", "n02", "n03"])
    jpegs(tmp_path / "fog" / "5", ["n09"])
    data, domains, keep = load(f"--stream imagenet-c --data-dir {tmp_path} --corruptions fog snow "
                               "--severity 3")
    assert [d.name for d in domains] == ["fog/3", "snow/3"]
    assert data.classes == ["n01", "n02", "n03"] and keep is None
    x, y = domains[0].split[5]
    assert x.shape == (3, 224, 224) and x.dtype == torch.uint8
    assert y == 2 and abs(int(x[0, 0, 0]) - 41) <= 2
    stream = Stream(domains, "lifelong", 9, 1, 0)
    seen = {(d.item(), i.item()): x for x, y, d, i in stream.seen(stream.batches(1), 3, 0)}
    assert torch.equal(seen[0, 5][0], x)  # no corruption on top


def test_cifar_c_files(tmp_path):
    """Severity s is rows 10,000 (s - 1) to 10,000 s. Fails if it is off by one."""
    a = np.zeros((50_000, 32, 32, 3), np.uint8)
    a[:, 0, 0, 0] = np.arange(50_000) // 10_000 + 1
    np.save(tmp_path / "fog.npy", a)
    np.save(tmp_path / "labels.npy", np.arange(50_000) // 10_000 + np.arange(50_000) % 5)
    data, (domain,), _ = load(f"--stream cifar-c --dataset cifar10 --data-dir {tmp_path} "
                              "--corruptions fog --severity 4")
    x, y = domain.split[7]
    assert len(domain.split) == 10_000 and x.shape == (3, 32, 32) and len(data.classes) == 10
    assert x[0, 0, 0] == 4 and y == 3 + 2 and domain.corruption is None


def test_imagenet_r_is_scored_over_its_own_classes(tmp_path):
    """Numbers among the sorted wnids, of a file or a folder. Fails if the folder's own are used."""
    jpegs(tmp_path / "r", ["n03", "n01"], size=300)
    (tmp_path / "wnids.txt").write_text("n02\nn00\nn03\nn01\n")
    for k in range(4):
        (tmp_path / "val" / f"n0{k}").mkdir(parents=True)
    for wnids in ("wnids.txt", "val"):
        data, domains, keep = load(f"--stream imagenet-r --data-dir {tmp_path}/r "
                                   f"--wnids {tmp_path}/{wnids}")
        assert keep == [1, 3] and data.classes == ["n00", "n01", "n02", "n03"]
    assert domains[0].split.classes == ["n01", "n03"]
    assert domains[0].split[0][0].shape == (3, 224, 224)


def test_groups_of_corruptions_and_no_repetition():
    """15, 4, and a name once. Fails if the held-out four are among the fifteen."""
    all_15, held_out = streams.corruption_names(["all"]), streams.corruption_names(["held-out"])
    assert len(all_15) == 15 and len(held_out) == 4 and not set(all_15) & set(held_out)
    assert streams.corruption_names(["fog", "fog", "all"]) == ["fog"] + [n for n in all_15 if n != "fog"]


@pytest.mark.parametrize("command, words", [
    ("--corruptions frog", "--corruptions frog: unknown"),
    ("--stream imagenet-c --data-dir {tmp}", "no gaussian_noise/5 in it"),
    ("--stream imagenet-c --data-dir {tmp}/c --corruptions fog snow", "differ in their class folders"),
    ("--stream cifar-c --data-dir {tmp}", "is made of cifar10 or cifar100"),
    ("--stream cifar-c --dataset cifar10 --data-dir {tmp}", "gaussian_noise.npy"),
    ("--stream cifar-c --dataset cifar10 --data-dir {tmp}/c --corruptions fog", "expected uint8 images"),
    ("--stream imagenet-r --data-dir {tmp}/r", "--wnids None"),
    ("--stream imagenet-r --data-dir {tmp}/r --wnids {tmp}/c", "does not know n01"),
    ("--stream folder --data-dir {tmp}/none", "expected class folders"),
    ("--stream folder --data-dir {tmp}/r", "no weights for resnet20 on r"),
])
def test_a_stream_that_cannot_be_had_is_one_line(command, words, tmp_path, fails):
    """And leaves nothing behind. Fails if it ends in a traceback."""
    jpegs(tmp_path / "r", ["n01"], n=1)
    jpegs(tmp_path / "c" / "fog" / "5", ["n01"], n=1)
    jpegs(tmp_path / "c" / "snow" / "5", ["n02"], n=1)
    for name in ("fog", "labels"):
        np.save(tmp_path / "c" / f"{name}.npy", np.zeros(3))
    assert words in fails(cema, f"--out {tmp_path}/o " + command.replace("{tmp}", str(tmp_path)))
    assert not (tmp_path / "o").exists()


# ----- tally and tables --------------------------------------------------------------------------------


def tally_of(*methods: str, names=("fog/5", "snow/5")) -> Tally:
    args = cema.parse(["--methods", *methods])
    return Tally(args, [Domain(name, toy()) for name in names])


def test_right_answers_are_counted_once_in_domain_visit_and_window():
    """Over batches of mixed domains. Fails if one is counted twice, or `take` does not start anew."""
    tally, right = tally_of("source", names="abc"), lambda r: {"source": 100 * r.float().mean().item()}
    y, d, logits = torch.randint(5, (4, 20)), torch.randint(3, (4, 20)), torch.randn(4, 20, 5)
    for k in range(4):
        tally.add({"source": logits[k]}, y[k], d[k])
        if k == 2:
            tally.take("window")
    hits = logits.argmax(2) == y
    want = [{"source": hits[d == k].sum().item(), "images": (d == k).sum().item()} for k in range(3)]
    assert tally.domains == want and tally.images == 80
    assert tally.take("visit") == pytest.approx(right(hits))
    assert tally.take("window") == pytest.approx(right(hits[3]))
    assert not tally.visit and not tally.window and tally.images == 80


def test_the_tables_show_accuracy_by_corruption_and_then_the_cost(capsys):
    """Numbers by hand. Fails if rows and columns are swapped, or a unit is off by a thousand."""
    tally = tally_of("source", "eta", "cema")
    scored = ("images", "source", "eta", "cema", "foundation_source", "foundation")
    right = (100, 50, 61, 62, 80, 81), (100, 70, 71, 72, 90, 91)
    tally.domains = [Counter(dict(zip(scored, row))) for row in right]
    tally.counts = {
        "source": Counter(edge_s=2.0, edge_forwards=200),
        "eta": Counter(edge_s=4.0, edge_forwards=200, edge_backwards=140),
        "cema": Counter(edge_s=2.1, edge_inference_s=2.0, cloud_s=10.0, edge_forwards=210, uploads=80,
                        bytes_up=3_000_000, bytes_down=8_000, bytes_down_stats=4_000,
                        cloud_forwards=1_500, cloud_backwards=700, refused_messages=3)}
    end = streams.end_record(tally)
    streams.print_table(end, tally)
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert text.split()[2:6] == ["source", "ETA", "CEMA", "f,"]
    assert rows["fog/5"] == ["50.00", "61.00", "62.00", "80.00", "81.00"]
    assert rows["mean"] == ["60.00", "66.00", "67.00", "85.00", "86.00"]
    assert rows["gain"] == ["over", "source", "0.00", "6.00", "7.00", "25.00", "26.00"]
    assert all(len(line) <= 100 for line in text.splitlines())
    assert rows["ETA"] == ["70.0", "0.0", "0.0", "0.1", "0.0", "0.0", "50.0"]
    assert rows["CEMA"] == ["40.0", "3.0", "8.0", "0.0", "1.5", "0.7", "100.0"]
    assert "costs 5.0 % more" in text and "50.0 ms an image;\n3 messages refused; 50" in text
    assert (end["uploads_pct"], end["eta_backwards_pct"], end["acc_cema_pct"]) == (40, 70, 67)
