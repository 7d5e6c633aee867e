"""What several test files need: a seed, a mistake's one line, a data set and its network for seconds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def read_log(path) -> list[dict]:
    """The records of a log.jsonl."""
    return [json.loads(line) for line in open(path)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fails(capsys):
    """fails(script, "--flag ..."): the one line on stderr with which the command exits, code 2."""
    import common

    def call(script, command: str) -> str:
        with pytest.raises(SystemExit) as e:
            common.run(script.main, script.parse, command.split())
        err = capsys.readouterr().err.strip()
        assert e.value.code == 2, err
        assert len(err.splitlines()) == 1 and "error:" in err, err
        return err

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A .npz of 64 train and 32 test images in 4 classes that differ in brightness."""
    rng = np.random.default_rng(0)
    y = np.arange(96) % 4
    x = np.clip(rng.normal(40 + 55 * y[:, None, None], 30, (96, 32, 32)), 0, 255).astype(np.uint8)
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(file, train_images=x[:64], train_labels=y[:64], test_images=x[64:], test_labels=y[64:])
    return file


@pytest.fixture(scope="session")
def own(tiny_weights, tmp_path_factory):
    """A file of a user's: make(4) is an untrained network, make_trained() one with the tiny weights."""
    file = tmp_path_factory.mktemp("own") / "my_net.py"
    file.write_text(f"""
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Config:  # looks for its module among those that are imported
    width: int = 8

class Net(nn.Module):
    mean, std = [0.4, 0.4, 0.4], [0.3, 0.3, 0.3]

    def __init__(self, classes):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
                                    nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, classes)

    def forward(self, x):  # view, as in tutorials, does not take what channels_last images become
        x = self.blocks(x)
        return self.fc(x.view(x.size(0), -1).view(x.size(0), 8, -1).mean(2))

make = Net

def make_trained():
    import common
    return common.load_network({str(tiny_weights)!r}, "resnet8")[0]

def make_three():
    return Net(3)

def make_list(n):
    return [n]

def make_trouble(n):
    raise ValueError("of its own")
""")
    return file


@pytest.fixture(scope="session")
def tiny_weights(tiny, tmp_path_factory):
    """The checkpoint of a ResNet-8 that has learned `tiny`."""
    import common
    from tools import pretrain

    hp = common.defaults(pretrain.build_parser, arch="resnet8", epochs=10, batch_size=16, lr=0.05)
    file = tmp_path_factory.mktemp("weights") / "tiny_resnet8.pt"
    pretrain.pretrain(hp, common.load_data(str(tiny)), file, torch.device("cpu"))
    return file
