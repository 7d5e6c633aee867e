"""Data sets: the embedded Fashion-MNIST, CIFAR, ImageNet, any folder of images, any .npz.

Every script reads its images by `common.load_data`, which comes here.
"""

import difflib
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

import common
from common import Data, InputError

DATASETS = ("fashion", "fashion-mnist", "cifar10", "cifar100", "imagenet")


def load(dataset: str, data_dir: str = "data", size: int | None = None) -> Data:
    """A data set by name or path. Raises InputError for anything that cannot be read.

    fashion        5,000 train and 10,000 test images of Fashion-MNIST, embedded in this repository
    fashion-mnist  all 70,000, through torchvision (downloaded into data_dir when absent)
    cifar10/100    data_dir/cifar10.npz if it is there (MedMNIST keys), else torchvision's, downloaded
    imagenet       data_dir/val/<wnid>/*.JPEG, and data_dir/train if it is there, at 224 px
    a folder       the same tree, at `size` px; None: 32, 64 or 224 px, by the median side of its images
    a .npz file    MedMNIST keys: train_images, train_labels, test_images, test_labels

    Grey images get three channels, 28 px images are padded to 32.
    """
    data = check_labels(_load(dataset, data_dir, size))
    if data.size != (size or data.size):
        raise InputError(f"{dataset}: has images of {data.size} px, not {size}; --size is for folders")
    return data


def check_labels(data: Data) -> Data:
    """Raises InputError for a label that is no class, or a split without images; names empty classes."""
    splits = [common.labels_of(split) for split in (data.train, data.test) if split is not None]
    C, last = len(data.classes), max(int(y.max()) if len(y) else -1 for y in splits)
    if last >= C:
        raise InputError(f"{data.name}: label {last} of {C} classes; expected 0 to {C - 1}")
    seen = torch.cat(splits).unique().tolist()
    if empty := [str(name) for c, name in enumerate(data.classes) if c not in set(seen)]:
        warnings.warn(f"{data.name}: no image of {len(empty)} of its {C} classes: {' '.join(empty[:3])}"
                      f"{' ...' * (len(empty) > 3)}; labels count from 0")
    return data


def _load(dataset: str, data_dir: str, size: int | None) -> Data:
    path = Path(dataset)
    if dataset == "fashion" and not (common.ROOT / "data" / "fashion_mnist.npz").exists():
        raise InputError("no data/fashion_mnist.npz: copy data/ along, or make it anew with: python "
                         "tools/pretrain.py embed")
    if dataset == "fashion":
        return _from_npz(common.ROOT / "data" / "fashion_mnist.npz", "fashion", common.NORMS["fashion"])
    if dataset in ("cifar10", "cifar100"):
        npz = Path(data_dir) / f"{dataset}.npz"
        if npz.is_file():
            return _from_npz(npz, dataset, common.NORMS[dataset])
    if dataset in ("cifar10", "cifar100", "fashion-mnist"):
        return _from_torchvision(dataset, data_dir)
    if dataset == "imagenet":
        return _from_folder(Path(data_dir), dataset, size or 224)
    if path.is_dir():
        return _from_folder(path, dataset, size)
    if path.suffix == ".npz":
        return _from_npz(path, path.stem, None)
    near = ", ".join(difflib.get_close_matches(dataset, DATASETS, 2, 0))
    raise InputError(f"--dataset {dataset}: no known name (nearest: {near}), no folder, no .npz file")


def _images(a: np.ndarray, origin: str) -> Tensor:
    """uint8 (N, H, W) or (N, H, W, 3 or 1) -> (N, 3, S, S), S a multiple of 4 and at least 32."""
    square = a.ndim in (3, 4) and a.shape[1] == a.shape[2]
    if a.dtype != np.uint8 or not square or a.ndim == 4 and a.shape[-1] not in (1, 3):
        raise InputError(f"{origin}: images are {a.dtype} {a.shape}; expected uint8 (N, S, S[, 3])")
    x = torch.from_numpy(a)
    x = x.unsqueeze(1) if a.ndim == 3 else x.permute(0, 3, 1, 2)
    side = max(32, math.ceil(x.shape[-1] / 4) * 4)
    lo = (side - x.shape[-1]) // 2
    x = F.pad(x, (lo, side - x.shape[-1] - lo) * 2)
    return x.expand(-1, 3, -1, -1).contiguous()


def _from_npz(path: Path, name: str, norm) -> Data:
    try:
        with np.load(path) as npz:
            arrays = {k: npz[k] for k in ("train_images", "train_labels", "test_images", "test_labels")}
            classes = npz["classes"].astype(str).tolist() if "classes" in npz else None
    except Exception as e:  # BadZipFile, zlib.error, KeyError: which, depends on where the file ends
        raise InputError(f"{path}: not a readable .npz file ({e}); expected the MedMNIST keys "
                         "{train,test}_{images,labels}") from None
    splits = []
    for split in ("train", "test"):
        images, y = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]  # MedMNIST's shape
        known = y.dtype.kind in "iu" and y.ndim == 1 and images.ndim and len(y) == len(images) > 0
        if not known or y.astype(np.int64).min() < 0:
            raise InputError(f"{path}: {split}_labels are {y.dtype} {y.shape} for {len(images)} images; "
                             "expected one integer an image: 0, 1, 2, ...")
        splits.append(TensorDataset(_images(images, f"{path}"), torch.from_numpy(y.astype(np.int64))))
    return _in_memory(name, classes, norm, *splits)


def _in_memory(name: str, classes, norm, train: TensorDataset, test: TensorDataset) -> Data:
    images = train.tensors[0]
    if images.shape[1:] != test.tensors[0].shape[1:]:
        raise InputError(f"{name}: train images of {images.shape[-1]} px and test images of "
                         f"{test.tensors[0].shape[-1]} px; expected one size")
    if norm is None:  # an unknown set is normalised by the statistics of its own train images
        sample = images[:5000].double() / 255
        norm = sample.mean((0, 2, 3)).tolist(), sample.std((0, 2, 3)).clamp_min(1e-3).tolist()
    if not isinstance(classes, list):  # none, or a number of them
        last = int(torch.cat([train.tensors[1], test.tensors[1]]).max())
        if last > len(images):  # a class name each would take all memory
            raise InputError(f"{name}: label {last} for {len(images)} train images; labels count from 0")
        classes = [str(c) for c in range(last + 1)]
    return Data(name, list(classes), images.shape[-1], list(norm[0]), list(norm[1]), train, test)


def _from_torchvision(dataset: str, data_dir: str) -> Data:
    from torchvision import datasets

    name = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}[dataset]
    try:
        raw = [getattr(datasets, name)(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as e:  # URLError, a failed checksum, a read-only folder: all mean "no data"
        npz = f", or {data_dir}/{dataset}.npz with MedMNIST keys" * (dataset != "fashion-mnist")
        raise InputError(f"--dataset {dataset}: not in {data_dir} and the download failed ({e}); put it "
                         f"there{npz}") from None
    splits = [TensorDataset(_images(np.asarray(r.data), name), torch.as_tensor(r.targets)) for r in raw]
    name = "fashion" if dataset == "fashion-mnist" else dataset
    return _in_memory(name, raw[0].classes, common.NORMS[name], *splits)


HIDDEN = (".", "__MACOSX", "@eaDir")  # beginnings: .cache, .ipynb_checkpoints
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def usual_transform(size: int, resize: bool = True):
    """The middle of an image whose shorter side is resized to `size`, or to 8/7 of it above 64 px, as is
    usual on ImageNet: 256 for 224.  PIL image -> uint8 (3, size, size)
    """
    from torchvision.transforms import v2

    steps = [v2.Resize(size if size <= 64 else size * 8 // 7)] if resize else []
    return v2.Compose([*steps, v2.CenterCrop(size), v2.PILToTensor()])


def read_image(file: Path, transform) -> Tensor:
    """Raises InputError, with the file's name, for what no image is."""
    from PIL import Image

    try:
        image = Image.open(file)
        if image.mode.startswith("I"):  # 16 bits, which convert would clip at 255
            deep = np.asarray(image)
            if image.mode == "I" and image.format not in ("PNG", "PPM") or deep.max() > 65535:
                raise ValueError("32 bits a pixel")
            image = Image.fromarray((deep / 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("its pixels are floats")
        return transform(image.convert("RGB"))
    except Exception as e:  # half a file, a renamed web page: whatever PIL says of it
        raise InputError(f"{file}: not an image that can be read ({e})") from None


class ImageFolder(torch.utils.data.Dataset):
    """root/<class>/**/<image> -> (uint8 (3, size, size), the class's number), classes sorted by name.

    torchvision's takes .cache, __MACOSX and ._x.png for classes and images, and makes 16-bit images
    white. Raises InputError, with the file's name, for what no image is.
    """

    def __init__(self, root: Path, size: int | None = None, resize: bool = True):
        folders = [Path(entry) for entry in os.scandir(root) if entry.is_dir()] if root.is_dir() else []
        folders = sorted(f for f in folders if not f.name.startswith(HIDDEN))
        self.classes, self.files, self.targets = [f.name for f in folders], [], []
        for c, folder in enumerate(folders):
            seen = set()
            for at, _, names in sorted(os.walk(folder, followlinks=True)):
                again = os.path.realpath(at) in seen  # a link to a folder above
                seen.add(os.path.realpath(at))
                hidden = any(part.startswith(HIDDEN) for part in Path(at).relative_to(folder).parts)
                names = [n for n in sorted(names) if n.lower().endswith(IMAGE_FILES) and n[0] != "."]
                names = [] if hidden or again else names
                self.files += [Path(at, n) for n in names]
                self.targets += [c] * len(names)
        if not self.files:
            what = "no images in it" if root.is_dir() else "no such folder"
            raise InputError(f"{root}: {what}; expected class folders, <class>/*.jpg or .png, .tif, ...")
        self.size = size or self.usual_size(root)
        self.transform = usual_transform(self.size, resize)

    def usual_size(self, root: Path) -> int:
        """32 px for a median side up to 48, 64 px up to 96, else 224, by some 200 images; printed."""
        from PIL import Image

        sides = []
        for file in self.files[::len(self.files) // 200 + 1]:
            try:
                with Image.open(file) as image:  # reads no pixels
                    sides.append(min(image.size))
            except Exception:  # `__getitem__` will say what is wrong with it
                continue
        median = int(np.median(sides)) if sides else 224
        size = 32 if median <= 48 else 64 if median <= 96 else 224
        print(f"{root}: sides of {median} px, in the median; read at {size} px (--size)", flush=True)
        return size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return read_image(self.files[i], self.transform), self.targets[i]


def _from_folder(root: Path, name: str, size: int | None) -> Data:
    val = next((root / d for d in ("val", "test") if (root / d).is_dir()), None)
    if val is None:
        raise InputError(f"{root}: no val/ folder in it; expected val/<class>/*.jpg, and train/ too "
                         "to train on real images")
    test = ImageFolder(val, size)
    train = ImageFolder(root / "train", test.size) if (root / "train").is_dir() else None
    if train and train.classes != test.classes:
        other = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(f"{root}: train/ and {val.name}/ differ in their class folders: {other[0]}")
    return Data(Path(name).name, test.classes, test.size, *common.IMAGENET_NORM, train, test)
