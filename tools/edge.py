"""An edge of CEMA as a program of its own; tools/cloud.py is the other side, and says how to begin.

    python tools/edge.py --connect HOST:5555 --name hall --corruptions fog   # a stream of cema.py's
    python tools/edge.py --connect HOST:5555 --name door --watch incoming/   # a folder being filled

Predictions are JSON lines on stdout, all else goes to stderr. The edge never waits for the cloud: a
thread carries the messages. While there is no cloud it answers with the last good parameters, tries
again ever more seldom, and says so once.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter, deque
from multiprocessing.connection import Client, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cema  # noqa: E402
import common  # noqa: E402
from common import InputError, need  # noqa: E402
from tools import streams, wire  # noqa: E402
from tools.cloud import (BROKEN, LARGEST, WELCOME, address_of, hello, hurry, key_of,  # noqa: E402
                         parse_with, with_wire)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Carrier(threading.Thread):
    """Carries messages to the cloud and its answers back, one by one, in a thread of its own."""

    MOST = 16  # messages wait; a newer one pushes the oldest out

    def __init__(self, address: tuple[str, int], key: bytes, hello: bytes, answer_s: float):
        super().__init__(daemon=True)
        self.address, self.key, self.hello, self.answer_s = address, key, hello, answer_s
        self.out, self.arrived, self.counts = deque(), deque(), Counter()
        self.changed, self.connected = threading.Condition(), None  # None: not known yet

    def send(self, message: bytes) -> None:
        with self.changed:
            if len(self.out) == self.MOST:
                self.out.popleft()
                self.counts["dropped"] += 1
            self.out.append(message)
            self.counts["sent"] += 1
            self.changed.notify_all()

    def received(self) -> list[bytes]:
        """Downloads that have come since the last call."""
        with self.changed:
            new = list(self.arrived)
            self.arrived.clear()
            return new

    def settle(self, seconds: float) -> None:
        """Waits until every message is answered: for --in-step, which an edge in use does not want."""
        done = lambda: self.counts["answered"] == self.counts["sent"]
        with self.changed:
            need(self.changed.wait_for(done, seconds), f"--in-step: no answer in {seconds:.0f} s")

    def run(self) -> None:
        wait_s = 0.2
        while True:
            try:
                self.carry(self.connect())
            except BROKEN as e:
                if self.connected is not False:
                    why = " ".join(str(e).split()) or type(e).__name__
                    say(f"no cloud ({why}): going on with the last good parameters")
                wait_s = 0.2 if self.connected else min(30.0, 2 * wait_s)
                self.connected = False
            time.sleep(wait_s)

    def connect(self):
        conn = Client(self.address)
        hurry(conn, 10)
        answer_challenge(conn, self.key)
        deliver_challenge(conn, self.key)
        conn.send_bytes(self.hello)
        if (answer := conn.recv_bytes(200)) != WELCOME:
            raise ConnectionRefusedError(f"it says: {answer.decode(errors='replace')}")
        say("the cloud is there")
        self.connected = True
        return conn

    def carry(self, conn) -> None:
        with conn:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.out)
                    message = self.out.popleft()
                    self.counts["dropped"] += 1  # until it is answered
                t0 = time.perf_counter()
                conn.send_bytes(message)
                if not conn.poll(self.answer_s):
                    raise TimeoutError(f"no answer in {self.answer_s:.0f} s")
                answer = conn.recv_bytes(LARGEST)
                with self.changed:
                    if answer:
                        self.arrived.append(answer)
                    self.counts["answered"] += 1
                    self.counts["dropped"] -= 1
                    self.counts["trip_s"] += time.perf_counter() - t0
                    self.counts["bytes_up"] += len(message)
                    self.counts["bytes_down"] += len(answer)
                    self.changed.notify_all()


def watched(folder: Path, size: int, batch_size: int, patience_s: float, once: bool) -> Iterator:
    """(uint8 (B, 3, S, S), names) of what comes into a folder, oldest first; `once`: of what is there.

    A file that cannot be read is tried again, as it may be half written, and given up after patience_s.
    """
    seen, tried, transform = set(), {}, common.usual_transform(size)
    while True:
        files = {}  # name -> when it was last written
        for entry in os.scandir(folder):
            image = entry.name.lower().endswith(common.IMAGE_FILES) and entry.name[0] != "."
            if image and entry.name not in seen:
                with contextlib.suppress(OSError):  # taken away again, or a link to itself
                    files[entry.name] = entry.stat().st_mtime
        x, names = [], []
        for name in sorted(files, key=files.get)[:batch_size]:
            try:
                x.append(transform(common.read_image(folder / name)))
                names.append(name)
            except InputError as e:
                now = time.time()
                if now - max(tried.setdefault(name, now), min(files[name], now)) < patience_s:
                    continue
                say(str(e))
            seen.add(name)
        if x:
            yield torch.stack(x), names
        elif once and not files:
            return
        else:
            time.sleep(0.2)


def streamed(args: argparse.Namespace, domains: list) -> Iterator:
    """(uint8 (B, 3, S, S), names, labels) of cema.py's stream."""
    stream = streams.Stream(domains, args.order, args.images, args.loop, args.seed)
    for x, y, d, i in stream.seen(stream.batches(args.batch_size), args.severity, args.seed):
        yield x, [f"{domains[k].name}/{n}" for k, n in zip(d.tolist(), i.tolist())], y


def show(names: list[str], logits: Tensor, classes: list[str]) -> None:
    p, c = logits.softmax(1).max(1)
    for name, p, c in zip(names, p.tolist(), c.tolist()):
        print(json.dumps({"image": name, "class": str(classes[c]), "p": round(p, 4)}))
    sys.stdout.flush()


def build_parser() -> common.Parser:
    p = cema.build_parser()
    a = with_wire(p, "tools/edge.py", __doc__)
    a("--connect", "127.0.0.1:5555", "where the cloud listens", metavar="HOST:PORT")
    a("--name", socket.gethostname()[:60], "of its twin; two edges, two names")
    a("--watch", None, "a folder that is being filled, in place of --stream", metavar="DIR")
    a("--once", False, "of --watch: then end")
    a("--patience-s", 5.0, "of --watch: for a file to become whole")
    a("--answer-s", 60.0, "the cloud hangs if it takes longer", lo=0.1)
    a("--in-step", False, "wait for the cloud after each batch: the very predictions of cema.py")
    return p


def main(args: argparse.Namespace) -> None:
    key, device = key_of(args), common.pick_device(args.device)
    address = address_of(args.connect, "--connect")
    hello(args.name, torch.nn.Identity())  # a wrong name before anything else
    args.amp = False
    need(not args.watch or Path(args.watch).is_dir(), f"--watch {args.watch}: no such folder")
    with contextlib.redirect_stdout(sys.stderr):  # what cema.py's parts print is no prediction
        data, domains, keep = streams.load_domains(args)
        resets = len(domains) > 1 and args.order in ("reset", "label-shift") and not args.watch
        need(not resets, f"--order {args.order}: of {len(domains)} corruptions, and an edge begins anew "
             "for none; name one by --corruptions, or --order lifelong")
        (net, own), = streams.networks(args, data, device, ("--arch",))
    net = cema.FromBytes(net, own.mean, own.std, keep)
    classes = [data.classes[c] for c in keep] if keep else data.classes
    if args.watch:
        parts = (Path(args.watch), data.size, args.batch_size, args.patience_s, args.once)
        batches = ((x, names, None) for x, names in watched(*parts))
    else:
        batches = streamed(args, domains)
    counts, right, log = Counter(), 0, None
    if args.out:
        log = common.RunLog(common.new_folder(args, ""), args, device)
    edge = cema.Edge(net, args, len(classes), counts)
    inbox, carrier = wire.Inbox(edge), Carrier(address, key, hello(args.name, net), args.answer_s)
    carrier.start()
    t0, whole = time.perf_counter(), bool(args.watch)  # a stream of files has no end
    try:
        for x, names, y in batches:
            logits, upload = edge.step(x.to(device), inbox.read(carrier.received()))
            carrier.send(wire.pack_upload(upload, len(x)))
            if upload:
                counts["uploads"] += len(upload.images)
            if y is not None:
                right += (logits.argmax(1) == y).sum().item()
            show(names, logits, classes)
            if args.in_step:
                carrier.settle(args.answer_s)
        whole = True
    finally:
        n, s, sent = max(1, counts["edge_forwards"]), time.perf_counter() - t0, carrier.counts
        end = {} if args.watch else {"acc_cema_pct": 100 * right / n}
        end |= dict(uploads_pct=100 * counts["uploads"] / n, img_per_s=n / s, version=inbox.version,
                    trip_ms=1000 * sent["trip_s"] / max(1, sent["answered"]), dropped=sent["dropped"],
                    bytes_up=sent["bytes_up"], bytes_down=sent["bytes_down"],
                    refused_messages=inbox.refused)
        if log and whole:
            log.write("end", **end, wall_s=log.seconds(), peak_mib=common.peak_mib())
        say(f"{counts['edge_forwards']} images | " + " | ".join(f"{k} {v:.6g}" for k, v in end.items()))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return parse_with(build_parser, argv)


if __name__ == "__main__":
    common.run(main, parse)
