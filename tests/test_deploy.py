"""Claims about tools/deploy.py. Each docstring ends with the change under which its test fails."""

import math
import re
import subprocess
import sys

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
ALSO = dict(quantize_input=True, quantize_add=True, quantize_pool=True)


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


@pytest.fixture
def packed_file(model, tiny, tmp_path):
    """packed_file(flags) -> a quantized.pt of the tiny network, hardly trained, and its student."""
    def make(**flags):
        student, data = trained(model, **flags).student, common.load_data(str(tiny))
        about = ABOUT | dict(dataset=str(tiny), classes=data.classes, mean=data.mean, std=data.std)
        torch.save(deploy.pack(student) | about, tmp_path / "q.pt")
        return tmp_path / "q.pt", student
    return make


@pytest.mark.parametrize("wbits, first_last", [(4, None), (3, 8), (5, None)])
def test_the_packed_file_is_as_small_as_computed(wbits, first_last, model, tmp_path):
    """Fails if steps or ranges are stored in another precision, or if a key is added."""
    torch.save(deploy.pack(gdfq.quantize(model, X, wbits, 4, first_last)) | ABOUT, tmp_path / "q.pt")
    weights = [p for p in model.parameters() if p.ndim > 1]
    numbers, channels = sum(p.numel() for p in weights), sum(p.shape[0] for p in weights)
    more_bits = (8 - wbits) * (16 * 27 + 64 * 4) if first_last else 0
    floats = 4 + 4 * (channels - 4) + 2 * 7  # fc bias; gamma, beta, mean, var; 7 times lo and hi
    computed = (wbits * numbers + more_bits) / 8 + 5 * channels + 4 * floats
    tensors = [t for t in torch.load(tmp_path / "q.pt").values() if isinstance(t, torch.Tensor)]
    assert abs(sum(t.numel() * t.element_size() for t in tensors) - computed) < 10
    assert (tmp_path / "q.pt").stat().st_size < computed + 4000


@pytest.mark.parametrize("flags", [dict(wbits=4), dict(wbits=3, first_last_bits=8), dict(wbits=5)])
def test_every_logit_comes_back_to_the_bit(flags, packed_file):
    """Fails if the step is stored in half precision, or if a key is renamed."""
    file, student = packed_file(**flags)
    assert torch.equal(deploy.rebuild(file)[0](X), student(X))


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
    assert torch.equal(deploy.unpack(deploy.pack(q), Tied().eval(), X)(X), q(X))


@pytest.mark.parametrize("changes, says", [
    (dict(arch="resnet14"), "another's?"),
    (dict(wbits=3), "another's?"),
    (dict(arch="resnet9"), "no such network"),
    (dict(wbits=9), "expected 2 to 8 bits"),
    (dict(size=32.0), "its size is a float"),
    (dict(), "made for 4 classes; fashion has 10"),
])
def test_a_file_that_does_not_fit_is_one_line(changes, says, model, tmp_path, fails):
    """Another network, other bits, other data. Fails if the lengths of the parts are not compared."""
    packed = deploy.pack(gdfq.quantize(model, X, 4, 4))
    torch.save(packed | ABOUT | changes, tmp_path / "q.pt")
    assert says in fails(deploy, f"evaluate {tmp_path}/q.pt")


@pytest.mark.parametrize("file, says", [
    ("{root}/weights/fashion_resnet20.pt", "not a quantized.pt of gdfq.py"),
    ("{root}/README.md", "a quantized.pt of gdfq.py"),
    ("none.pt", "no such file")])
def test_what_is_no_packed_network_is_one_line(file, says, fails):
    """Fails if a checkpoint's missing keys end in a traceback."""
    assert says in fails(deploy, f"evaluate {file.format(root=common.ROOT)}")


@pytest.mark.parametrize("bits, flags, in_fp32", [(4, ALSO, []), (8, ALSO, []), (4, {}, ["conv1", "fc"])])
def test_integers_compute_what_the_floats_simulate(bits, flags, in_fp32, packed_file, capsys):
    """Every layer within 1e-4, every answer; as published, two read fp32. Fails if a zero point is left out
    of the sums, or if a layer that reads fp32 counts as checked."""
    deploy.main(deploy.parse(["check", str(packed_file(wbits=bits, abits=bits, **flags)[0])]))
    *table, last = capsys.readouterr().out.splitlines()[2:]
    assert len(table) == 10 and [line.split()[0] for line in table if "reads fp32" in line] == in_fp32
    assert all(float(line.split()[-1]) < 1e-4 for line in table if "reads fp32" not in line)
    assert last.startswith("0 of 32 answers differ")


@pytest.mark.parametrize("also, quantized", [((), 34), (("input", "add", "pool"), 53)])
def test_every_layer_of_a_bottleneck_network_reads_integers_if_asked(also, quantized):
    """Fails if MobileNetV2's sums and linear bottlenecks, without an activation, are passed over."""
    net = common.build_model("mobilenet_v2", 5).eval()
    q = gdfq.quantize(net, torch.randn(2, 3, 32, 32), 4, 4, also=also)
    sources = [node for _, node in gdfq.layer_inputs(q)]
    bits = [q.get_submodule(n.target).bits for n in sources if str(n.target).startswith("act_quant")]
    assert len(sources) == 53 and len(bits) == quantized
    assert bits == [8 if also else 4] + [4] * (quantized - 1)  # the image has 8


class Twice(nn.Module):
    """One layer, called on the image and on its own output."""
    def __init__(self):
        super().__init__()
        self.c, self.bn, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.c(torch.relu(self.bn(self.c(x))))))
        return self.head(x.mean((2, 3)))


def test_a_layer_that_is_called_twice_has_two_inputs():
    """Each with its own step. Fails if the second call's input stands for the first one's."""
    net = Twice().eval()
    q = deploy.unpack(deploy.pack(gdfq.quantize(net, X, 8, 8, also=["input", "pool"])), net, X)
    integer = common.copy_of(q)
    watch = deploy.IntegerCheck(integer)
    with torch.no_grad():
        assert torch.allclose(integer(X), q(X), atol=1e-5)
    assert watch.in_fp32 == [] and max(watch.worst.values()) < 1e-4
    q = deploy.unpack(deploy.pack(gdfq.quantize(net, X, 8, 8, also=["pool"])), net, X)
    assert deploy.IntegerCheck(q).in_fp32 == ["c"]


LOAD = """
import sys, torch
net, x, y = torch.export.load(sys.argv[1]).module(), *torch.load(sys.argv[2])
assert "common" not in sys.modules and "gdfq" not in sys.modules
out = net(x)
assert (out - y).abs().max() < 1e-5 and (out.argmax(1) == y.argmax(1)).all()
assert net(x[:1]).shape == (1, 4)
"""


def test_an_exported_network_holds_integers_and_needs_torch_alone(packed_file, tmp_path):
    """In a process that cannot import this repository. Fails if the number of images is fixed, or if
    floats take the codes' place."""
    (file, student), made = packed_file(**ALSO), tmp_path / "new" / "m.pt2"
    deploy.main(deploy.parse(["export", str(file), str(made)]))
    torch.save((X, student(X)), tmp_path / "xy.pt")
    command = [sys.executable, "-I", "-c", LOAD, made, tmp_path / "xy.pt"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = torch.export.load(made).state_dict.values()
    codes = sum(t.numel() for t in held if t.dtype == torch.uint8)
    assert codes == sum(p.numel() for p in student.parameters() if p.ndim > 1)
    assert str(common.ROOT).encode() not in made.read_bytes()


def test_an_onnx_file_gives_the_same_logits(packed_file, tmp_path, monkeypatch, fails):
    """Where onnx is installed, else one clear line. Fails if it is written half."""
    file, _ = packed_file()
    command = f"export {file} {tmp_path}/m.onnx"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install onnx onnxscript" in fails(deploy, command)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["q.pt"]
    monkeypatch.undo()
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    deploy.main(deploy.parse(command.split()))
    assert (tmp_path / "m.onnx").exists()


def test_info_says_where_the_bytes_are(packed_file, capsys):
    """Fails if codes and the rest do not add up to the file, or its entropy is above its bits."""
    file, _ = packed_file(wbits=3)
    deploy.main(deploy.parse(["info", str(file)]))
    *layers, whole = capsys.readouterr().out.splitlines()
    size, codes, bound, rest = map(float, re.findall(r"\d+\.\d", whole))
    assert len(layers) == 10 and all(" 3 bits" in line for line in layers)
    assert codes + rest < size < codes + rest + 4 and 0.5 * codes < bound <= codes


@pytest.mark.parametrize("command", ["export {q}", "export {q} m.pt", "evaluate {q} m.pt2"])
def test_only_export_writes_a_file(command, packed_file, fails):
    """Fails if a file is named and nothing is written, or the other way round."""
    assert "export needs a file to write" in fails(deploy, command.format(q=packed_file()[0]))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 1001])
def test_packing_is_as_small_as_computed_and_loses_nothing(bits, n):
    """Fails if the last, partly filled byte is dropped."""
    q = torch.randint(0, 2**bits, (n,), dtype=torch.uint8)
    packed = deploy.pack_bits(q, bits)
    assert packed.numel() == math.ceil(n * bits / 8)
    assert torch.equal(deploy.unpack_bits(packed, bits, n), q)
