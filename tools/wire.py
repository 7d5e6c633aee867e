"""The messages of cema.py as bytes, for tools/edge.py and tools/cloud.py, which run on two machines.

A message is a .npz file. A zip has a CRC-32 for each array, and without pickle a damaged or hostile
message can be refused and never executed. Here lives everything that distrusts: the edge and the cloud
of cema.py hand each other tensors, and need none of it.
"""

import io
import struct

import numpy as np
import torch
from torch import Tensor

from cema import Cloud, Download, Edge, Upload

LARGEST = 2**28  # bytes of a message, before it is read and after


class Refused(Exception):
    """A message that cannot be used; the receiver keeps what it has, and counts."""


def check(condition, why: str) -> None:
    if not condition:
        raise Refused(why)


def encode(**arrays) -> bytes:
    np.savez(file := io.BytesIO(), **arrays)
    return file.getvalue()


def decode(message: bytes, **expected: tuple) -> dict[str, np.ndarray]:
    """expected: name -> (dtype, shape), -1 for any length. Raises Refused for anything else."""
    check(len(message) <= LARGEST, "too large")
    check(message[:2] == b"PK", "no .npz")  # a lone .npy would be read at once
    try:
        with np.load(io.BytesIO(message), allow_pickle=False) as file:
            size = sum(part.file_size for part in file.zip.infolist())
            check(size <= LARGEST, "claims too much")
            arrays = {name: file[name] for name in file.files}
    except Exception as e:  # BadZipFile, ValueError, EOFError: which one depends on the byte
        raise Refused(type(e).__name__) from None
    # The checksum counts once all is read; a wrong header (128 bytes) could leave a rest unread.
    check(size == sum(a.nbytes + 128 for a in arrays.values()), "not read to its end")
    # Damage in the zip's directory can hide an array.
    check(arrays.keys() == expected.keys(), "arrays missing")
    for name, (dtype, shape) in expected.items():
        a = arrays[name]
        fits = len(a.shape) == len(shape) and all(n in (-1, m) for n, m in zip(shape, a.shape))
        check(fits and a.dtype == dtype, f"{name}: {a.dtype} {a.shape}")
        # No statistic and no parameter of a network that works is near a million; NaN is not below it.
        check(dtype != "f4" or (np.abs(a) < 1e6).all(), f"{name}: beyond belief")
    stats = arrays["stats"]  # means, then variances
    check((stats[len(stats) // 2:] >= 0).all(), "negative variance")
    return arrays


def flat(tensors: list[Tensor]) -> np.ndarray:
    """fp32 (n,): all numbers of the tensors, one after the other."""
    parts = [t.detach().float().cpu().numpy().ravel() for t in tensors]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def shaped(values: np.ndarray, like: list[Tensor]) -> list[Tensor]:
    """The inverse of `flat`."""
    parts = torch.from_numpy(values).split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like)]


def pack_upload(upload: Upload | None, images: int) -> bytes:
    """What goes up after each batch: how many images it had, and the upload, if there is one."""
    count = struct.pack(">I", images)
    if not upload:
        return count
    return count + encode(images=upload.images.numpy(), stats=flat(upload.stats))


def read_upload(message: bytes, cloud: Cloud) -> Upload:
    """Raises Refused for what is not exactly an upload to this cloud."""
    size, n = cloud.pending.shape[-1], sum(t.numel() for t in cloud.twin.stats)
    new = decode(message, images=("u1", (-1, 3, size, size)), stats=("f4", (-1,)))
    check(len(new["stats"]) in (0, n), "statistics of another network")
    stats = shaped(new["stats"], cloud.twin.stats) if len(new["stats"]) else []
    return Upload(torch.from_numpy(new["images"]), stats)


def pack_download(download: Download, version: int) -> bytes:
    """version: how many steps the twin has made. The newer one is the larger."""
    return encode(version=np.int64(version), affine=flat(download.affine), stats=flat(download.stats))


class Inbox:
    """What an edge makes of the messages that come: downloads that are whole, and newer than its own."""
    def __init__(self, edge: Edge):
        self.edge, self.version, self.refused = edge, 0, 0

    def read(self, messages: list[bytes]) -> list[Download]:
        downloads = []
        for message in messages:
            try:
                downloads.append(self.read_one(message))
            except Refused:
                self.refused += 1
        return downloads

    def read_one(self, message: bytes) -> Download:
        affine, stats = self.edge.affine, self.edge.stats
        n, k = (sum(t.numel() for t in part) for part in (affine, stats))
        new = decode(message, version=("i8", ()), affine=("f4", (n,)), stats=("f4", (k,)))
        version = int(new["version"])
        # Far below is no old message: the cloud began anew, or one lied, once, to block all others.
        check(not 0 <= self.version - version < 1000, "stale")
        self.version = version
        return Download(shaped(new["affine"], affine), shaped(new["stats"], stats))
