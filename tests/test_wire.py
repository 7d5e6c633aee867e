"""Claims about tools/wire.py. Each docstring ends with the change under which its test fails."""

import io
import math
import os
import pickle

import numpy as np
import pytest
import torch

import cema
import common
from tools import wire
from tools.wire import Refused

UP = {"images": ("u1", (-1, 3, 4, 4)), "stats": ("f4", (-1,))}
DOWN = {"version": ("i8", ()), "affine": ("f4", (3,)), "stats": ("f4", (2,))}
ONES = np.ones(3, np.float32)


def images(n: int, size: int = 4) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=g)


def upload(x: torch.Tensor, stats=()) -> bytes:
    return wire.encode(images=x.numpy(), stats=wire.flat(stats))


def changed(**change) -> bytes:
    """A download that fits DOWN, but for an array that is another, more, or (None) not there."""
    arrays = {"version": np.int64(5), "affine": ONES, "stats": ONES[:2]} | change
    return wire.encode(**{k: v for k, v in arrays.items() if v is not None})


def npy(array) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def new_method() -> cema.CEMA:
    """At 16 px."""
    net = cema.FromBytes(common.build_model("resnet8", 10).eval(), [0.5] * 3, [0.25] * 3)
    return cema.CEMA(net, net, 16, select="all", cloud_batch=8, replay=0, batch_size=16)


@pytest.fixture
def method():
    """After three batches: its edge has taken downloads over."""
    method = new_method()
    for _ in range(3):
        method.step(images(16, 16))
    return method


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_messages_come_back_as_they_were(method):
    """And an upload is its images' bytes and half a kB. Fails if a dtype or an order changes."""
    cloud, inbox = method.cloud, wire.Inbox(method.edge)
    for stats in (cloud.twin.stats, []):
        message = wire.pack_upload(cema.Upload(images(50, 16), stats), 64)
        got = wire.read_upload(message[4:], cloud)
        assert int.from_bytes(message[:4], "big") == 64 and torch.equal(got.images, images(50, 16))
        assert same(got.stats, stats)
        assert len(message) < 50 * 3 * 16 * 16 + 4 * sum(t.numel() for t in stats) + 550
    sent = cema.Download(cloud.twin.affine, cloud.twin.stats)
    got, = inbox.read([wire.pack_download(sent, 7)])
    assert inbox.version == 7 and same(got.affine, sent.affine) and same(got.stats, sent.stats)


@pytest.mark.parametrize("message, expected", [
    (changed(), DOWN), (upload(images(2), [torch.ones(4)]), UP)], ids=["down", "up"])
def test_a_message_with_any_wrong_byte_is_refused_or_means_the_same(message, expected):
    """Each length, each byte. One flip in four passes: a zip has dates. Fails if one hides an array."""
    want, passed = wire.decode(message, **expected), 0
    for i in range(len(message)):
        with pytest.raises(Refused):
            wire.decode(message[:i], **expected)
        for flip in (1, 0x55):
            try:
                got = wire.decode(message[:i] + bytes([message[i] ^ flip]) + message[i + 1:], **expected)
            except Refused:
                continue
            passed += 1
            assert all(np.array_equal(got[k], want[k]) for k in want), i
    assert 0.2 < passed / (2 * len(message)) < 0.3


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


BOMBS = np.array([Bomb()] * 3)
BAD = {"no statistics": changed(stats=None), "no version": changed(version=None),
       "one array too many": changed(more=ONES), "float64": changed(affine=ONES.astype("f8")),
       "big-endian": changed(affine=ONES.astype(">f4")), "a version of 5.0": changed(version=ONES[0]),
       "NaN": changed(affine=ONES * math.nan), "infinite": changed(stats=ONES[:2] * math.inf),
       "a million": changed(affine=ONES * -1e6), "variance of a million": changed(stats=ONES[:2] * 1e6),
       "negative variance": changed(stats=-ONES[:2]), "fewer": changed(affine=ONES[:2]),
       "more": changed(affine=np.ones(4, "f4")), "a matrix": changed(affine=ONES[None]),
       "objects": changed(affine=BOMBS), "an upload": upload(images(1)), "no arrays": wire.encode(),
       "empty": b"", "noise": b"x" * 30, "a pickle": pickle.dumps(Bomb()), "an .npy": npy(ONES),
       "an .npy of objects": npy(BOMBS)}
BAD_UP = {"a download": changed(), "5 px": upload(images(2, 5)),
          "a wrong number of images": upload(images(90)).replace(b"(90, 3", b"(10, 3"),
          "our earlier format": b"CEMU\2\0\0\0\4\0\0\0\0\0\0\0" + bytes(2 * 48 + 4)}


@pytest.mark.parametrize("message, expected", [
    pytest.param(message, expected, id=name)
    for bad, expected in ((BAD, DOWN), (BAD_UP, UP)) for name, message in bad.items()])
def test_a_message_that_does_not_fit_is_refused(message, expected, tmp_path, monkeypatch):
    """And pickles never run. Fails if names, dtype, shape, finiteness, variance or CRC go unchecked."""
    monkeypatch.chdir(tmp_path)
    assert wire.decode(changed(stats=np.float32([-1, 1])), **DOWN)  # a mean may be negative
    with pytest.raises(Refused):
        wire.decode(message, **expected)
    assert not any(tmp_path.iterdir())


def test_a_message_too_large_is_refused_unread(monkeypatch):
    """Also one that is small and claims much. Fails if either size is compared after reading."""
    read, read_array = [], np.lib.format.read_array
    monkeypatch.setattr(np.lib.format, "read_array",
                        lambda *args, **kw: read.append(1) or read_array(*args, **kw))
    np.savez_compressed(file := io.BytesIO(), images=np.zeros((100, 3, 4, 4), "u1"), stats=ONES[:0])
    claims, plain = file.getvalue(), upload(images(100))
    assert len(claims) < 1000 and wire.decode(claims, **UP) and wire.decode(plain, **UP)
    for limit, message in ((len(plain) - 1, plain), (2000, claims), (2000, npy(np.zeros(300)))):
        monkeypatch.setattr(wire, "LARGEST", limit)
        read.clear()
        with pytest.raises(Refused):
            wire.decode(message, **UP)
        assert not read


def hostile(rng: np.random.Generator, good: bytes) -> bytes:
    """Noise, perhaps behind a magic number; any arrays; a good message with 16 bytes overwritten."""
    kind, start = rng.integers(3), [b"", b"PK\x03\x04", b"\x93NUMPY\x01\0"][rng.integers(3)]
    if kind == 0:
        return start + rng.bytes(int(rng.integers(400)))
    if kind == 1:
        names, shape = rng.choice([*UP, *DOWN], 3), rng.integers(0, 5, rng.integers(5))
        return wire.encode(**{n: np.zeros(shape, rng.choice(["u1", "f4", "i8", "S3"])) for n in names})
    at = int(rng.integers(len(good) // 4, len(good) // 2))  # in the data of the largest array
    return good[:at] + rng.bytes(16) + good[at + 16:]


def test_hostile_messages_are_refused_and_good_ones_after_them_are_not(method):
    """150 each way, and such as nearly fit. Fails if anything but Refused is raised."""
    cloud, inbox, rng = method.cloud, wire.Inbox(method.edge), np.random.default_rng(0)
    affine, stats = cloud.twin.affine, cloud.twin.stats
    down = wire.pack_download(cema.Download(affine, stats), 1)
    up = wire.pack_upload(cema.Upload(images(4, 16), stats), 4)[4:]
    near = [wire.pack_download(cema.Download(affine[1:], stats), 1),
            wire.pack_download(cema.Download(affine, stats[1:]), 1)]
    assert inbox.read(near + [hostile(rng, down) for _ in range(150)]) == [] and inbox.refused == 152
    for message in [upload(images(4, 16), stats[1:])] + [hostile(rng, up) for _ in range(150)]:
        with pytest.raises(Refused):
            wire.read_upload(message, cloud)
    assert inbox.read([down]) and inbox.version == 1 and wire.read_upload(up, cloud)


@pytest.mark.parametrize("first, then, taken", [
    (5, 5, 0), (5, 4, 0), (5, -9, 0), (5, 6, 1), (5, -2000, 1), (-2**63, 5, 1), (2**63 - 1, 5, 1)])
def test_only_newer_downloads_are_taken_and_no_number_blocks_all_later_ones(method, first, then, taken):
    """Far below is a cloud that began anew. Fails if a late or forged number turns the edge back."""
    inbox, download = wire.Inbox(method.edge), cema.Download(method.edge.affine, method.edge.stats)
    assert inbox.read([wire.pack_download(download, first)])
    assert len(inbox.read([wire.pack_download(download, then)])) == taken
    assert inbox.version == (then if taken else first)


def test_a_whole_upload_with_variances_of_zero_is_survived():
    """Whatever the twin makes of it. Fails if one device's message stops every device."""
    method, cloud = new_method(), new_method().cloud
    stats = [torch.zeros_like(t) for t in cloud.twin.stats]
    message = wire.pack_upload(cema.Upload(images(16, 16), stats), 16)[4:]
    for _ in range(3):
        method.link.send("up", wire.read_upload(message, cloud))
        assert method.step(images(16, 16)).isfinite().all()
