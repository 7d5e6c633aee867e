"""Claims about tools/cloud.py and tools/edge.py, on loopback, with small networks.

Each docstring ends with the change under which its test was seen to fail.
"""

import argparse
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Listener

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import cema
import common
from tools import cloud, edge, wire

KEY = b"0123456789abcdef"


def small(seed: int, width: int = 1):
    with common.seeded(seed):
        return cema.FromBytes(common.build_model(f"resnet8x{width}", 10).eval(), [0.3] * 3, [0.3] * 3)


def flags(**changes) -> argparse.Namespace:
    args = cloud.parse("--recipe few-classes --select all --frame-s 1 --most-edges 4".split())
    return argparse.Namespace(**vars(args) | {"amp": False} | changes)


@pytest.fixture
def served(tmp_path):
    """A server in this process, and its address."""
    server = cloud.Server(flags(out=str(tmp_path)), [small(0), small(1, 2)], 10, 32)
    listener = Listener(("127.0.0.1", 0), backlog=16)
    threading.Thread(target=server.accept_from, args=(listener, KEY), daemon=True).start()
    return server, listener.address


def images(n: int = 64, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)


def carrier_to(address, name: str = "hall", key: bytes = KEY, net=None) -> edge.Carrier:
    hello = f"{name} {common.crc_of(net or small(0))}".encode()
    carrier = edge.Carrier(address, key, hello, answer_s=30)
    carrier.start()
    return carrier


def an_edge() -> cema.Edge:
    return cema.Edge(small(0), flags(), 10, Counter())


def walk(device: cema.Edge, carrier: edge.Carrier, batches: range) -> list[torch.Tensor]:
    """One batch after the other, each answered by the cloud before the next."""
    answers, inbox = [], wire.Inbox(device)
    for b in batches:
        logits, upload = device.step(images(seed=b), inbox.read(carrier.received()))
        carrier.send(wire.pack_upload(upload, 64))
        carrier.settle(30)
        answers.append(logits)
    return answers


def until(true, seconds: float = 20) -> None:
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "not in time"
        time.sleep(0.02)


def test_two_programs_in_step_are_one_process(served):
    """Every logit, to the bit. Fails if a download comes late, or a cloud works once an upload."""
    _, address = served
    method = cema.CEMA(small(0), small(1, 2), 32, flags())
    there = walk(an_edge(), carrier_to(address), range(8))
    here = [method.step(images(seed=b)) for b in range(8)]
    assert method.edge.good and all(torch.equal(a, b) for a, b in zip(here, there))


def test_edges_have_twins_of_their_own_and_one_foundation(served):
    """Fails if the second edge moves the first one's twin, or brings a foundation model of its own."""
    server, address = served
    walk(an_edge(), carrier_to(address, "hall"), range(2))
    hall = server.clouds["hall"]
    before, f = wire.flat(hall.twin.affine), wire.flat(server.f.affine)
    walk(an_edge(), carrier_to(address, "door"), range(2))
    assert (wire.flat(hall.twin.affine) == before).all() and (wire.flat(server.f.affine) != f).any()
    assert hall.f is server.clouds["door"].f is server.f


def test_a_twin_waits_for_its_edge(served):
    """A new connection of the same name goes on. Fails if it gets a new twin."""
    server, address = served
    device = an_edge()
    walk(device, carrier_to(address), range(2))
    steps = server.clouds["hall"].steps
    walk(device, carrier_to(address), range(2, 4))
    assert server.clouds["hall"].steps > steps and list(server.clouds) == ["hall"]
    until(lambda: sum(t.is_alive() for t in server.threads) == 1)


def knock(address, data: bytes) -> socket.socket:
    """Says these bytes and stays."""
    s = socket.create_connection(address)
    try:
        s.sendall(data)
    except OSError:  # it was refused before
        pass
    return s


def test_what_a_stranger_says_ends_its_connection_and_nothing_else(served):
    """Random bytes, 1 GB, half a frame, silence, a wrong key, too many. Fails if one keeps a thread."""
    (server, address), rng, socks = served, random.Random(0), []
    for _ in range(200):
        frames = [struct.pack("!i", n) + rng.randbytes(n) for n in rng.choices(range(300), k=5)]
        socks.append(knock(address, b"".join(frames)))
    for data in (struct.pack("!i", 2**30) + b"x" * 1000, struct.pack("!iQ", -1, 2**40), b"\0\0", b""):
        socks.append(knock(address, data))
    carrier_to(address, key=b"another key, as long")
    walk(an_edge(), carrier_to(address), range(1))  # served beside all of them
    until(lambda: sum(t.is_alive() for t in server.threads) <= 1)
    assert list(server.clouds) == ["hall"] and common.peak_mib() < 8000


def test_after_the_handshake_a_message_is_still_not_believed(served, capsys):
    """An edge with the key that sends rubbish, or a name with a slash. Fails if that reaches a twin."""
    server, address = served
    for carrier in (carrier_to(address, "bad/name"), carrier_to(address, "other", net=small(5))):
        until(lambda: carrier.connected is False)
    err = capsys.readouterr().err
    assert "it says: no name" in err and "it says: its network is not the cloud's --arch" in err
    liar = carrier_to(address, "liar")
    liar.send(struct.pack(">I", 2**32 - 1) + b"PK" + bytes(1000))
    liar.settle(20)
    assert server.counts["refused_connections"] >= 2 and server.counts["refused_messages"] == 1
    assert list(server.clouds) == ["liar"] and server.clouds["liar"].steps == 0


def test_a_slow_reader_is_let_go(served):
    """Fails if the server waits for it for ever."""
    server, address = served
    conn = edge.Client(address)
    edge.answer_challenge(conn, KEY)
    edge.deliver_challenge(conn, KEY)
    conn.send_bytes(cloud.hello("slow", small(0)))
    assert conn.recv_bytes() == cloud.WELCOME
    answer = server.answer
    server.answer = lambda name, message: bytes(2**26) if name == "slow" else answer(name, message)
    conn.send_bytes(bytes(4))  # and never reads the 64 MiB that come
    until(lambda: "slow" in server.conns)
    until(lambda: "slow" not in server.conns)
    walk(an_edge(), carrier_to(address), range(1))
    conn.close()


@pytest.mark.parametrize("cloud", ["is not there", "hangs"])
def test_an_edge_without_a_cloud_goes_on_and_drops_the_oldest(cloud, capsys):
    """Says so once. Fails if it waits, or if what waits grows without end."""
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    if cloud == "hangs":
        s.listen()
    carrier, device = carrier_to(s.getsockname()), an_edge()
    for b in range(20):
        carrier.send(wire.pack_upload(device.step(images(seed=b), [])[1], 64))
    until(lambda: carrier.connected is False)
    time.sleep(1)
    assert len(carrier.out) == carrier.MOST and carrier.counts["dropped"] == 4
    assert capsys.readouterr().err.count("no cloud") == 1
    s.close()


def test_a_message_that_is_lost_on_its_way_is_counted():
    """A cloud that takes one and is gone. Fails if only what waited too long counts as dropped."""
    listener = Listener(("127.0.0.1", 0))
    carrier = carrier_to(listener.address)
    conn = listener.accept()
    edge.deliver_challenge(conn, KEY)
    edge.answer_challenge(conn, KEY)
    conn.recv_bytes()
    conn.send_bytes(cloud.WELCOME)
    carrier.send(wire.pack_upload(None, 64))
    conn.recv_bytes()
    conn.close()
    listener.close()
    until(lambda: carrier.connected is False)
    assert carrier.counts["dropped"] == 1


@pytest.fixture
def programs(tmp_path):
    """start(role, "--flags") -> a process; all are ended with the test."""
    started, net = [], tmp_path / "nets.py"
    (tmp_path / "key").write_bytes(KEY)
    net.write_text("import common\ndef make(arch, n):\n    with common.seeded(0):\n"
                   "        return common.build_model(arch, n)\n"
                   "def g(n): return make('resnet8', n)\ndef f(n): return make('resnet8x2', n)\n")
    flags = (f"--key-file {tmp_path}/key --arch {net}:g --foundation {net}:f --weights none --no-amp "
             "--foundation-weights none --corruptions fog --select all --recipe few-classes").split()

    def start(role: str, command: str) -> subprocess.Popen:
        words = [sys.executable, f"{common.ROOT}/tools/{role}.py", *flags, *command.split()]
        how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        started.append(subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, **how))
        return started[-1]

    yield start
    for p in started:
        p.kill()
        p.communicate()


def line_with(stream, words: str) -> str:
    for line in stream:
        if words in line:
            return line
    raise AssertionError(f"ended without: {words}")


def fill(folder, device, first: int, last: int) -> list[str]:
    """New images in the folder that an edge watches -> the names that it has answered."""
    for n in range(first, last):
        to_pil_image(images(1, n)[0]).save(folder / f"{n:03d}.png")
    return [json.loads(device.stdout.readline())["image"] for _ in range(first, last)]


def test_a_killed_cloud_comes_back_to_its_edge(programs, tmp_path):
    """kill -9: the edge answers all and learns again. Fails if no state is written, or it gives up."""
    server = programs("cloud", f"--listen 127.0.0.1:0 --out {tmp_path}/c --save-s 0.3")
    address, saved = line_with(server.stdout, "listening").split()[-1], tmp_path / "c/cloud.pt"
    folder = tmp_path / "in"
    folder.mkdir()
    device = programs("edge", f"--connect {address} --watch {folder} --batch-size 16")
    seen = fill(folder, device, 0, 64)
    until(lambda: saved.exists() and torch.load(saved)["clouds"])
    server.kill()
    server.wait()
    seen += fill(folder, device, 64, 96)
    again = programs("cloud", f"--listen {address} --out {tmp_path}/c --save-s 0.3")
    line_with(again.stdout, "going on with")
    line_with(again.stdout, "connected")
    seen += fill(folder, device, 96, 128)
    assert sorted(seen) == [f"{n:03d}.png" for n in range(128)]
    device.kill()
    assert device.stderr.read().count("no cloud") == 1
    line_with(again.stdout, "gone")
    again.terminate()
    assert "cloud.pt: written" in again.stdout.read() and again.wait() == 0


def test_a_restarted_cloud_has_the_same_twins(served):
    """And refuses other flags. Fails if momentum, the buffer or a flag is left out of the file."""
    server, address = served
    walk(an_edge(), carrier_to(address), range(4))
    server.save()
    again = cloud.Server(server.args, [small(0), small(1, 2)], 10, 32)
    again.load()
    message = wire.pack_upload(cema.Upload(images(seed=9), []), 64)
    assert again.answer("hall", message) == server.answer("hall", message) != b""
    again.args = flags(out=server.args.out, lr=1.0)
    with pytest.raises(common.InputError, match="another --lr"):
        again.load()


def test_one_cloud_a_folder_and_only_a_whole_stream_is_finished(programs, tmp_path):
    """An edge that breaks off leaves no end record. Fails without the lock, or if `end` is written."""
    server = programs("cloud", f"--listen 127.0.0.1:0 --out {tmp_path}/c")
    line_with(server.stdout, "listening")
    again = programs("cloud", f"--listen 127.0.0.1:0 --out {tmp_path}/c")
    assert again.wait() == 2 and "another process is writing it" in again.stderr.read()
    device = programs("edge", f"--connect 127.0.0.1:1 --in-step --answer-s 0.1 --out {tmp_path}/e")
    assert device.wait() == 2 and "no answer" in device.stderr.read()
    assert [json.loads(r)["event"] for r in (tmp_path / "e/log.jsonl").open()] == ["start"]


@pytest.mark.parametrize("role, command, says", [
    (cloud, "--seeds 1 2", "give it one --seed"), (cloud, "--listen nowhere", "expected HOST:PORT"),
    (cloud, "--key-file none", "No such file"), (edge, "--name a/b", "expected 1 to 64"),
    (edge, "--watch none", "no such folder"),
    (edge, "--corruptions fog snow", "name one by --corruptions")])
def test_mistakes_are_one_line(role, command, says, fails, monkeypatch):
    """Fails if one is a traceback, or comes after the wire was opened."""
    monkeypatch.setenv("CEMA_KEY", KEY.decode())
    assert says in fails(role, command)
    monkeypatch.delenv("CEMA_KEY")
    assert "no key of 16 characters" in fails(cloud, "")


def test_files_that_grow_are_read_when_they_are_whole(tmp_path, capsys):
    """Fails if half a file ends the watch or is read as it is, or if a broken one is tried for ever."""
    to_pil_image(images(1)[0]).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:1000])
    (tmp_path / "c.txt").write_text("no image")
    watch = edge.watched(tmp_path, 32, 8, patience_s=1.0, once=False)
    x, names = next(watch)
    assert names == ["a.png"] and torch.equal(x[0], images(1)[0])
    (tmp_path / "b.png").write_bytes(whole)
    assert next(watch)[1] == ["b.png"]
    (tmp_path / "d.png").write_bytes(whole[:1000])
    assert list(edge.watched(tmp_path, 32, 8, patience_s=0.5, once=True))[0][1] == ["a.png", "b.png"]
    assert re.search(r"d\.png: not an image", capsys.readouterr().err)
