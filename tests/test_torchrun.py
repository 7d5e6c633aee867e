"""Claims about several processes, seen on two of a CPU. Each docstring ends with what made it fail."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import common
from common import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes by their number")


def torchrun(script, command: str, n: int = 2, **kwargs) -> subprocess.Popen:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}",
             f"--master-port={port}", str(script), *command.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            cwd=kwargs.pop("cwd", ROOT))


def finished(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err[-3000:]
    return out, err


SMALL = ("--epochs 6 --iters-per-epoch 1 --warmup-epochs 1 --batch-size 8 --g-width 8 --no-amp "
         "--device cpu --calibration-batches 1 --percentile 100 --checkpoint-every 1")


def test_gdfqs_processes_share_weights_ranges_and_gradients(tmp_path):
    """After five steps both have the same G and Q, from different images; two batches of B give the
    gradient of one of 2 B. Fails without the mean of the gradients, or with one seed for all.
    """
    (tmp_path / "steps.py").write_text("""
import sys, torch, common
from gdfq import GDFQ, ActivationQuantizer
common.pick_device("cpu", several=True)
rank, world = common.rank_and_world()
torch.manual_seed(0)
net = common.build_model("resnet8", 10).eval()
m = GDFQ(net, 10, 16, epochs=6, iters_per_epoch=1, warmup_epochs=2, batch_size=16, g_width=8,
         calibration_batches=2, lr=1e-3)
for _ in range(5):
    m.step()
ends = [e for q in m.student.modules() if isinstance(q, ActivationQuantizer) for e in (q.lo, q.hi)]
mine = [p.detach() for net in (m.student, m.generator) for p in net.parameters()] + ends
everyone = common.gather([t.clone() for t in mine])
assert all(torch.equal(a, b) for a, b in zip(*everyone)) and ends[1] > 0
x, y = common.gather(m.sample()[0].detach())
assert not torch.equal(x, y), "both draw the same noise"
# Q's gradient: this process's half of a batch, and the whole batch in one process.
both = torch.cat([x, y])
answers = m.teacher(both)
def gradient(at, together):
    m.opt.zero_grad()
    p = [p for p in m.student.parameters()]
    torch.nn.functional.mse_loss(m.student(both[at]), answers[at]).backward()
    if together:
        common.average([q.grad for q in p])
    return torch.cat([q.grad.flatten() for q in p])
half = gradient(slice(16 * rank, 16 * rank + 16), True)
whole = gradient(slice(None), False)
assert torch.allclose(half, whole, rtol=1e-4, atol=1e-6), (half - whole).abs().max()
print("equal", world)
""")
    out, _ = finished(torchrun(tmp_path / "steps.py", ""))
    assert out == "equal 2\n"


def test_a_run_of_gdfq_by_two_goes_on_and_is_one_log(tiny, tiny_weights, tmp_path):
    """--resume, each with its own random numbers; the accuracy is that of all test images. Fails if a
    process reads the other's checkpoint, writes a second log, or counts an image twice.
    """
    command = f"--dataset {tiny} --arch resnet8 --weights {tiny_weights} {SMALL} --resume"
    finished(torchrun(ROOT / "gdfq.py", f"{command} --out {tmp_path}/whole"))
    # Each process ends after its fourth epoch.
    (tmp_path / "four.py").write_text("""
import gdfq, common
step = gdfq.GDFQ.step
def until(self, real=None):
    if self.iteration == 4:
        raise common.InputError("enough")
    return step(self, real)
gdfq.GDFQ.step = until
common.run(common.each_seed(gdfq.main), gdfq.parse)
""")
    process = torchrun(tmp_path / "four.py", f"{command} --out {tmp_path}/parts")
    err = process.communicate(timeout=240)[1]
    assert process.returncode and err.count("error: enough") == 1
    assert (tmp_path / "parts/checkpoint1.pt").exists()
    out, _ = finished(torchrun(ROOT / "gdfq.py", f"{command} --out {tmp_path}/parts"))
    assert out.count("resuming at iteration 4") == 1 and "GDFQ" in out
    ends = [common.read_log(tmp_path / name / "log.jsonl")[-1] for name in ("whole", "parts")]
    assert ends[0]["acc_pct"] == ends[1]["acc_pct"] and ends[0]["acc_fp_pct"] == 100.0
    packed = [torch.load(tmp_path / name / "quantized.pt") for name in ("whole", "parts")]
    assert all(torch.equal(packed[0][k], packed[1][k]) for k in ("codes", "steps", "floats"))
    files = {file.name for file in (tmp_path / "parts").iterdir()}
    assert files == {"log.jsonl", "quantized.pt", "generated.png"}


def test_two_processes_print_the_table_of_cema_that_one_prints(tiny, tiny_weights, tmp_path):
    """To the digit. Fails if a corruption is left out, counted twice, or meets another link or order."""
    command = (f"--dataset {tiny} --arch resnet8 --foundation resnet8 --weights {tiny_weights} --no-amp "
               f"--foundation-weights {tiny_weights} --corruptions fog snow contrast --images 32 "
               "--device cpu --batch-size 8 --cloud-batch 4 --replay-min 8 --replay-draw 4 --e0 2 "
               "--link-drop 0.2")
    tables = []
    for n in (1, 2):
        out, _ = finished(torchrun(ROOT / "cema.py", f"{command} --out {tmp_path}/{n}", n))
        tables.append(out[out.index("top-1 %"):out.index("cost  ")])
    assert tables[0] == tables[1] and "snow/5" in tables[0]
    keys = ("per_domain", "uploads_pct", "bytes_up", "bytes_down", "cloud_backwards")
    ends = [common.read_log(tmp_path / f"{n}/log.jsonl")[-1] for n in (1, 2)]
    assert all(ends[0][k] == ends[1][k] for k in keys)
    out, err = torchrun(ROOT / "cema.py", f"{command} --order mixed").communicate(timeout=240)
    assert err.count("are one stream, for one process") == 1


def test_two_processes_print_the_table_of_tdmr_that_one_prints(tiny, tiny_weights, tmp_path):
    """Seeds in turn, a folder each. Fails if a seed is left out, or if a process waits for ever."""
    command = (f"--dataset {tiny} --target resnet8 --foundation-weights {tiny_weights} --shots 4 "
               "--steps 4 --unlabelled 16 --views 1 --labelled-views 2 --methods scratch tdmr --no-amp "
               "--seeds 0 1 2 --batch-size 8 --unlabelled-batch 8 --device cpu")
    accuracies = []
    for n in (1, 2):
        out, _ = finished(torchrun(ROOT / "tdmr.py", f"{command} --out {tmp_path}/{n}", n))
        lines = [line for line in out.splitlines() if " +- " in line]
        accuracies.append([line[:39] for line in lines])
    assert len(accuracies[0]) == 2 and accuracies[0] == accuracies[1]
    # One seed: F's pass is shared, and the features are those of one process.
    out, _ = finished(torchrun(ROOT / "tdmr.py", f"{command} --seeds 1 --out {tmp_path}/shared"))
    assert out.count("is reused, F does not run") == 2
    one, two = (torch.load(tmp_path / f / "features.pt") for f in ("1/seed1", "shared"))
    assert one["key"] == two["key"] and torch.equal(one["features"], two["features"])


def test_a_killed_process_takes_the_others_along(tiny, tiny_weights, tmp_path):
    """kill -9 of the second. Fails if the first one waits for it."""
    command = f"--dataset {tiny} --arch resnet8 --weights {tiny_weights} {SMALL} --out {tmp_path}"
    process = torchrun(ROOT / "gdfq.py", command.replace("--epochs 6", "--epochs 3000"))
    deadline = time.time() + 120
    while not (tmp_path / "checkpoint1.pt").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0


def test_a_program_for_one_process_says_so():
    """Fails if two of them train the same network."""
    err = torchrun(ROOT / "tools/pretrain.py", "--epochs 1").communicate(timeout=240)[1]
    assert err.count("this program runs as one") == 1


def test_who_fails_as_it_leaves_takes_nobodys_results(tmp_path):
    """torchrun ends all once one has failed. Fails if a process leaves before the others are through."""
    (tmp_path / "leave.py").write_text("""
import argparse, atexit, os, pathlib, time, common
def main(args):
    common.pick_device("cpu", several=True)
    if common.rank_and_world()[0]:
        atexit.register(os.abort)
    else:
        time.sleep(3)
        pathlib.Path(__file__).with_name("written").touch()
common.run(main, lambda argv: argparse.Namespace())
""")
    process = torchrun(tmp_path / "leave.py", "")
    process.communicate(timeout=240)
    assert process.returncode and (tmp_path / "written").exists()
