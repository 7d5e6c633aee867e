"""Claims about gdfq.pack and tools/deploy.py, which reads what it makes.

Each docstring ends with the change under which its test was seen to fail.
"""

import pytest
import torch
from torch import nn

import common
import gdfq
from tools import deploy

# What gdfq.py has written into every quantized.pt since its first version.
ABOUT = dict(arch="resnet8", dataset="fashion", classes=list("abcd"), mean=[0.5] * 3, std=[0.3] * 3,
             size=32, transform_input=False)
X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(model, **flags) -> gdfq.GDFQ:
    """Four iterations, two of them of the student."""
    least = dict(epochs=6, iters_per_epoch=1, warmup_epochs=2, batch_size=8, g_width=8,
                 calibration_batches=2)
    method = gdfq.GDFQ(model, 4, 32, **least | flags)
    for _ in range(4):
        method.step()
    return method


@pytest.fixture
def model(tiny_weights):
    return common.load_network(tiny_weights, "resnet8")[0].to(memory_format=torch.channels_last)


@pytest.mark.parametrize("wbits, first_last", [(4, None), (3, 8), (5, None)])
def test_the_packed_file_is_as_small_as_computed_and_reproduces_every_logit(wbits, first_last, model,
                                                                            tmp_path):
    """To the bit. Fails if the step is stored in half precision, or if a key is renamed."""
    student = trained(model, wbits=wbits, abits=4, first_last_bits=first_last).student
    packed = gdfq.pack(student)
    weights = [p for p in model.parameters() if p.ndim > 1]
    numbers, channels = sum(p.numel() for p in weights), sum(p.shape[0] for p in weights)
    more_bits = (8 - wbits) * (16 * 27 + 64 * 4) if first_last else 0
    floats = 4 + 4 * (channels - 4) + 2 * 7  # fc bias; gamma, beta, mean, var; 7 times lo and hi
    computed = (wbits * numbers + more_bits) / 8 + 5 * channels + 4 * floats
    tensors = [t for t in packed.values() if isinstance(t, torch.Tensor)]
    assert abs(sum(t.numel() * t.element_size() for t in tensors) - computed) < 10
    torch.save(packed | ABOUT, tmp_path / "q.pt")
    assert (tmp_path / "q.pt").stat().st_size < computed + 4000
    again, _ = deploy.rebuild(tmp_path / "q.pt")
    assert torch.equal(again(X), student(X))


class Tied(nn.Module):
    """Two layers with one weight, the first of them at the end of the module's own order."""

    def __init__(self):
        super().__init__()
        self.ends = nn.ModuleDict({"stem": nn.Conv2d(3, 3, 3), "head": nn.Linear(3, 4)})
        self.body = nn.Conv2d(3, 3, 3)
        self.body.weight = self.ends["stem"].weight

    def forward(self, x):
        x = torch.relu(self.body(torch.relu(self.ends["stem"](x))))
        return self.ends["head"](x.mean((2, 3)))


def test_shared_weights_and_odd_orders_come_back():
    """8 bits at the ends, 4 in between. Fails if bits are guessed from the modules' order, or if the
    second of two layers that share a weight overwrites the first."""
    q = gdfq.quantize(Tied().eval(), X, 4, 4, first_last_bits=8)
    assert torch.equal(deploy.unpack(gdfq.pack(q), Tied().eval(), X)(X), q(X))


@pytest.mark.parametrize("changes, says", [
    (dict(arch="resnet14"), "another network's?"),
    (dict(wbits=3), "another network's?"),
    (dict(arch="resnet9"), "no such network"),
    (dict(wbits=9), "expected 2 to 8 bits"),
    (dict(), "made for 4 classes; fashion has 10"),
])
def test_a_file_that_does_not_fit_is_one_line(changes, says, model, tmp_path, fails):
    """Another network, other bits, other data. Fails if the lengths of the parts are not compared."""
    packed = gdfq.pack(gdfq.quantize(model, X, 4, 4))
    torch.save(packed | ABOUT | changes, tmp_path / "q.pt")
    assert says in fails(deploy, f"evaluate {tmp_path}/q.pt")


@pytest.mark.parametrize("file, says", [
    ("{root}/weights/fashion_resnet20.pt", "not a quantized.pt of gdfq.py"),
    ("{root}/README.md", "a quantized.pt of gdfq.py"),
    ("none.pt", "no such file"),
])
def test_what_is_no_packed_network_is_one_line(file, says, fails):
    """Fails if a checkpoint's missing keys end in a traceback."""
    assert says in fails(deploy, f"evaluate {file.format(root=common.ROOT)}")
