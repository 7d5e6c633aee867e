"""Claims about several processes, seen on two of a CPU. Each docstring ends with what made it fail."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from common import ROOT
from conftest import read_log

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes by their number")

GDFQ = ("--arch resnet8 --epochs 6 --iters-per-epoch 1 --warmup-epochs 1 --batch-size 8 --g-width 8 "
        "--no-amp --device cpu --calibration-batches 1 --percentile 100 --checkpoint-every 1")


def start(script, command: str = "", n: int = 2, cwd=ROOT) -> subprocess.Popen:
    """torchrun, with n processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}",
             f"--master-port={port}", str(ROOT / script), *command.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            cwd=cwd)


def printed(*args, **kwargs) -> str:
    """What a run that ends well writes to stdout."""
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


def complaint(*args) -> str:
    """What a run that fails writes to stderr."""
    process = start(*args)
    err = process.communicate(timeout=240)[1]
    assert process.returncode
    return err


def test_gdfqs_processes_share_weights_ranges_and_gradients(tmp_path):
    """After five steps both have the same G and Q, from different images; two batches of B give the
    gradient of one of 2 B. Fails without the mean of the gradients, or with one seed for all.
    """
    (tmp_path / "steps.py").write_text("""
import torch, common
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
def gradient(x):
    m.opt.zero_grad()
    torch.nn.functional.mse_loss(m.student(x), m.teacher(x)).backward()
    return torch.cat([p.grad.flatten() for p in m.student.parameters()])
mean = gradient([x, y][rank])
common.average([mean])
assert torch.allclose(mean, gradient(torch.cat([x, y])), rtol=1e-4, atol=1e-6)
print("equal", world)
""")
    assert printed(tmp_path / "steps.py") == "equal 2\n"


def test_a_run_of_gdfq_by_two_goes_on_and_is_one_log(tiny, tiny_weights, tmp_path):
    """--resume, each with its own random numbers; the accuracy is that of all test images. Fails if a
    process reads the other's checkpoint, writes a second log, or counts an image twice.
    """
    command = f"--dataset {tiny} --weights {tiny_weights} {GDFQ} --out {tmp_path}"
    printed("gdfq.py", f"{command}/whole")
    # Each process ends after its fourth epoch.
    (tmp_path / "gdfq.py").write_text("""
import sys, common
sys.path.pop(0)
import gdfq
step = gdfq.GDFQ.step
def until(self, real=None):
    if self.iteration == 4:
        raise common.InputError("enough")
    return step(self, real)
gdfq.GDFQ.step = until
common.run(common.each_seed(gdfq.main), gdfq.parse)
""")
    assert complaint(tmp_path / "gdfq.py", f"{command}/parts").count("error: enough") == 1
    assert (tmp_path / "parts/checkpoint1.pt").exists()
    printed("gdfq.py", f"--resume {tmp_path}/parts")
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    assert logs[0][-1]["acc_pct"] == logs[1][-1]["acc_pct"] and logs[0][-1]["acc_fp_pct"] == 100.0
    assert [r["event"] for r in logs[1]].count("start") == 2
    one, two = [torch.load(tmp_path / name / "quantized.pt") for name in ("whole", "parts")]
    assert all(torch.equal(one[k], two[k]) for k in ("codes", "steps", "floats"))
    files = {file.name for file in (tmp_path / "parts").iterdir()}
    assert files == {"log.jsonl", "quantized.pt", "generated.png"}


def test_two_processes_print_the_table_of_cema_that_one_prints(tiny, tiny_weights, tmp_path):
    """To the digit. Fails if a corruption is left out, counted twice, or meets another link or order."""
    command = (f"--dataset {tiny} --arch resnet8 --foundation resnet8 --weights {tiny_weights} --no-amp "
               f"--foundation-weights {tiny_weights} --corruptions fog snow contrast --images 32 "
               "--device cpu --batch-size 8 --cloud-batch 4 --replay-min 8 --replay-draw 4 --e0 2 "
               "--link-drop 0.2")
    outs = [printed("cema.py", f"{command} --out {tmp_path}/{n}", n) for n in (1, 2)]
    tables = [out[out.index("top-1 %"):out.index("cost  ")] for out in outs]
    assert tables[0] == tables[1] and "snow/5" in tables[0]
    ends = [read_log(tmp_path / f"{n}/log.jsonl")[-1] for n in (1, 2)]
    for key in ("per_domain", "uploads_pct", "bytes_up", "bytes_down", "cloud_backwards"):
        assert ends[0][key] == ends[1][key], key


def test_two_processes_print_the_table_of_tdmr_that_one_prints(tiny, tiny_weights, tmp_path):
    """Seeds in turn, a folder each. Fails if a seed is left out, or if a process waits for ever."""
    command = (f"--dataset {tiny} --target resnet8 --foundation-weights {tiny_weights} --shots 4 "
               "--steps 4 --unlabelled 16 --views 1 --labelled-views 2 --methods scratch tdmr --no-amp "
               "--seeds 0 1 2 --batch-size 8 --unlabelled-batch 8 --device cpu --out")
    outs = [printed("tdmr.py", f"{command} {tmp_path}/{n}", n, cwd=tmp_path) for n in (1, 2)]
    rows = [[line[:39] for line in out.splitlines() if " +- " in line] for out in outs]
    assert len(rows[0]) == 2 and rows[0] == rows[1]
    assert [(tmp_path / f"2/seed{seed}/tdmr.pt").exists() for seed in (0, 1, 2)] == [True] * 3


def test_a_killed_process_takes_the_others_along(tiny, tiny_weights, tmp_path):
    """kill -9 of the second. Fails if the first one waits for it."""
    out = tmp_path / "killed"
    command = f"--dataset {tiny} --weights {tiny_weights} {GDFQ} --out {out}"
    process = start("gdfq.py", command.replace("--epochs 6", "--epochs 3000"))
    deadline = time.time() + 120
    while not (out / "checkpoint1.pt").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0


@pytest.mark.parametrize("command, says", [
    ("tools/pretrain.py --epochs 1", "this program runs as one"),
    ("cema.py --order mixed", "are one stream, for one process")])
def test_a_program_for_one_process_says_so(command, says, tmp_path):
    """Once. Fails if two of them train the same network, or see the same stream."""
    assert complaint(*f"{command} --out {tmp_path}/x".split(" ", 1)).count(says) == 1


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
    complaint(tmp_path / "leave.py")
    assert (tmp_path / "written").exists()
