"""The cloud of CEMA as a program of its own, for any number of edges (tools/edge.py) on any machines.

    export CEMA_KEY=$(openssl rand -hex 16)        # or --key-file; the same on both sides
    python tools/cloud.py --listen 127.0.0.1:5555
    python tools/edge.py --connect 127.0.0.1:5555 --name hall --corruptions fog

The flags are those of cema.py, and so are networks, uploads and downloads. Each edge has a twin of its
own, all have one foundation model. An edge is known by its --name: after a broken connection it goes on
with its twin. Every minute, and when it is ended, the cloud writes its state to <out>/cloud.pt; the same
command goes on from it.

The wire. multiprocessing.connection's frames and its HMAC challenge, both ways; no pickle. First the
edge sends its name and the checksum of its network, which must be the twin's; then, after each batch of
images, how many they were (4 bytes, big-endian) and its upload, if any. The answer to each is a
download, or nothing. Whoever holds the key is still not believed: a message is what tools/wire.py
accepts, and no larger than that. Nothing is encrypted: over a network that others read, use a tunnel.
"""

import argparse
import errno
import fcntl
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections import Counter
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cema  # noqa: E402
import common  # noqa: E402
from common import need  # noqa: E402
from tools import streams, wire  # noqa: E402

LARGEST = wire.LARGEST + 4
# What ends a connection, and nothing else. AssertionError: of answer_challenge, from a stranger's port.
BROKEN = (OSError, EOFError, AuthenticationError, ValueError, AssertionError)
WELCOME = b"welcome"  # to a name; else the answer is why not


# ===== The wire, of both programs =====================================================================


def with_wire(p: common.Parser, prog: str, about: str):
    """cema.py's flags and those of the wire; returns what adds more of them."""
    p.prog, p.description = prog, about
    a = p.group("wire")
    a("--key-file", None, "file with the shared secret; None: the environment variable CEMA_KEY")
    return a


def parse_with(build_parser, argv: list[str] | None) -> argparse.Namespace:
    p = build_parser()
    p.set_defaults(**cema.RECIPES[p.parse_args(argv).recipe])
    args = p.parse_args(argv)
    seeds = np.atleast_1d(args.seed).tolist()
    need(len(seeds) == 1, "--seeds: this program is one run; give it one --seed")
    args.seed = seeds[0]
    return args


def address_of(text: str, flag: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    fits = host and port.isdigit() and 0 <= int(port) < 65536
    need(fits, f"{flag} {text}: expected HOST:PORT, as in 127.0.0.1:5555")
    return host, int(port)


def hello(name: str, net) -> bytes:
    """What an edge says first. InputError for a name of other letters."""
    fits = re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)
    need(fits, f"--name {name}: expected 1 to 64 letters, digits, _ . -")
    return f"{name} {common.crc_of(net)}".encode()


def key_of(args: argparse.Namespace) -> bytes:
    """The shared secret. Never from the command line, which everybody on the machine can read."""
    file = Path(args.key_file or "")
    key = file.read_bytes().strip() if args.key_file else os.environ.get("CEMA_KEY", "").encode()
    need(len(key) >= 16, "no key of 16 characters or more: set CEMA_KEY, or name a file by --key-file")
    return key


def hurry(conn: Connection, seconds: int) -> None:
    """Whoever stops in the middle of a frame, or of reading one, loses the connection by then."""
    with socket.socket(fileno=os.dup(conn.fileno())) as s:  # the kernel's clock: reads end with EAGAIN
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            s.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


def hang_up(conn: Connection) -> None:
    """Ends a connection of another thread, which then closes it; its number must not be given anew."""
    try:
        with socket.socket(fileno=os.dup(conn.fileno())) as s:
            s.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


# ===== Server =========================================================================================


class Server:
    """Clouds by the name of their edge, and one foundation model. A thread a connection; one learns."""
    def __init__(self, args: argparse.Namespace, nets: list, classes: int, size: int):
        self.args, self.lock, self.counts = args, threading.Lock(), Counter()
        self.clouds, self.conns, self.threads = {}, {}, set()  # the first two by name
        self.make = lambda: cema.Cloud(*nets, args, classes, size, self.counts)
        self.f = cema.CEMA(*nets, size, args).cloud.f  # which also checks that all fits together
        self.crc, self.all_crc = common.crc_of(nets[0]), common.crc_of(*nets)
        self.file = Path(args.out) / "cloud.pt"

    def cloud(self, name: str) -> cema.Cloud:
        if name not in self.clouds:
            if len(self.clouds) >= self.args.most_edges:
                raise ValueError(f"{name}: would be edge {len(self.clouds) + 1}, see --most-edges")
            self.clouds[name] = self.make()
            self.clouds[name].f = self.f  # one for all
        return self.clouds[name]

    def answer(self, name: str, message: bytes) -> bytes:
        """One batch of an edge: its upload is received, and what it sets off is done."""
        if len(message) < 4:
            raise ValueError("half a message")
        images, upload, arrived = struct.unpack(">I", message[:4])[0], message[4:], []
        with self.lock:
            cloud = self.cloud(name)
            if upload:
                self.counts["uploads"] += 1
                try:
                    arrived = [wire.read_upload(upload, cloud)]
                except wire.Refused:
                    self.counts["refused_messages"] += 1
            download = cloud.step(arrived, images)
            return wire.pack_download(download, cloud.steps) if download else b""

    def serve(self, conn: Connection, key: bytes) -> None:
        """A connection from its first byte to its last. Nothing that comes over it ends the program."""
        name, why, welcome = "?", "it left", False
        try:
            hurry(conn, self.args.frame_s)
            deliver_challenge(conn, key)
            answer_challenge(conn, key)
            said = re.fullmatch(r"([\w.-]{1,64}) (\d+)", conn.recv_bytes(100).decode("ascii"))
            name = said[1] if said else "?"
            try:
                if not said or int(said[2]) != self.crc:
                    raise ValueError("its network is not the cloud's --arch" if said else "no name")
                with self.lock:
                    self.cloud(name)
                    old, self.conns[name] = self.conns.get(name), conn
            except ValueError as e:
                conn.send_bytes(str(e).encode())
                raise
            if old:  # the edge came back before its old connection was known to be dead
                hang_up(old)
            conn.send_bytes(WELCOME)
            welcome = True
            place = ", in the place of an older one" if old else ""
            print(f"edge {name}: connected{place}", flush=True)
            while conn.poll(self.args.idle_s):
                conn.send_bytes(self.answer(name, conn.recv_bytes(LARGEST)))
        except BROKEN as e:
            why = " ".join(str(e).split())[:80] or why
        finally:
            conn.close()
            self.counts["refused_connections"] += not welcome
            if self.conns.get(name) is conn:
                del self.conns[name]
            print(f"edge {name}: gone ({why})", flush=True)

    def accept_from(self, listener: Listener, key: bytes) -> None:
        """A thread a connection, without end; more than so many are closed at once."""
        while True:
            try:
                conn = listener.accept()
            except OSError as e:
                if e.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    raise
                time.sleep(0.1)  # until others leave
                continue
            if len(self.threads) >= 2 * self.args.most_edges:
                self.threads = {t for t in self.threads if t.is_alive()}
            if len(self.threads) >= 2 * self.args.most_edges:
                conn.close()
                self.counts["refused_connections"] += 1
                continue
            self.threads.add(t := threading.Thread(target=self.serve, args=(conn, key), daemon=True))
            t.start()

    def save(self) -> None:
        with self.lock:
            states = {name: common.state_of(cloud) for name, cloud in self.clouds.items()}
            for state in states.values():
                del state["f"]
            about = {"args": cema_flags(self.args), "crc": self.all_crc, "f": common.state_of(self.f)}
            common.save_atomic(about | {"clouds": states}, self.file)

    def load(self) -> None:
        if not self.file.exists():
            return
        saved = common.load_file(self.file, ("args", "crc", "f", "clouds"), "what a cloud has written")
        other = [k for k, v in cema_flags(self.args).items() if saved["args"].get(k) != v][:1]
        need(not other, f"{self.file}: was written with another --{' '.join(other)}; name another --out")
        need(saved["crc"] == self.all_crc, f"{self.file}: was written with other weights")
        many = len(saved["clouds"])
        need(many <= self.args.most_edges, f"{self.file}: holds {many} edges; raise --most-edges")
        common.restored(self.f, saved["f"])
        for name, state in saved["clouds"].items():
            common.restored(self.cloud(name), state | {"f": saved["f"]})
        print(f"going on with {', '.join(saved['clouds']) or 'no edges'} of {self.file}")

    def save_now_and_then(self) -> None:
        while True:
            time.sleep(self.args.save_s)
            try:
                self.save()
            except (OSError, RuntimeError) as e:  # a full disk: it may have room again
                print(f"{self.file}: not written ({e})", flush=True)
            steps = sum(cloud.steps for cloud in self.clouds.values())
            figures = " | ".join(f"{k} {v}" for k, v in sorted(self.counts.items()))
            edges = f"{len(self.conns)} of {len(self.clouds)} edges"
            print(f"{edges} | steps {steps} | {figures}", flush=True)


def cema_flags(args: argparse.Namespace) -> dict:
    """Those that may not change from one start to the next."""
    free = "help out device workers amp resume checkpoint_every log_every methods score_foundation"
    known = [action.dest for action in cema.build_parser()._actions if action.dest not in free.split()]
    return {k.replace("_", "-"): getattr(args, k) for k in known}


def own(file: Path):
    """Keeps other programs off it, for two clouds would overwrite each other's twins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_suffix(".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        why = "another process is writing it; name another --out"
        raise common.InputError(f"{file.parent}: {why}") from None
    return lock


# ===== Run ============================================================================================


def build_parser() -> common.Parser:
    p = cema.build_parser()
    a = with_wire(p, "tools/cloud.py", __doc__)
    a("--listen", "127.0.0.1:5555", "port 0: any, which is printed", metavar="HOST:PORT")
    a("--most-edges", 64, "twins, and twice as many connections", lo=1)
    a("--frame-s", 10, "a message takes at most so long, seconds", lo=1)
    a("--idle-s", 3600, "an edge without a word for so long is let go", lo=1)
    a("--save-s", 60.0, "between two writes of the state", lo=0.1)
    p.set_defaults(out="runs/cloud")
    return p


def main(args: argparse.Namespace) -> None:
    key, device = key_of(args), common.pick_device(args.device)
    address = address_of(args.listen, "--listen")
    args.amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data, _, keep = streams.load_domains(args)
    found = streams.networks(args, data, device)
    nets = [cema.FromBytes(net, its.mean, its.std, keep) for net, its in found]
    server = Server(args, nets, len(keep or data.classes), data.size)
    lock = own(server.file)
    server.load()
    try:
        listener = Listener(address, backlog=16)
    except OSError as e:
        raise common.InputError(f"--listen {args.listen}: {e.strerror}; name another port") from None

    def end(*_):
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, end)
    warnings.simplefilter("always")
    threading.Thread(target=server.save_now_and_then, daemon=True).start()
    print("listening at {}:{}".format(*listener.address), flush=True)
    try:
        server.accept_from(listener, key)
    finally:
        listener.close()
        server.save()
        server.lock.acquire()  # for good: a thread in the middle of torch would abort the exit
        lock.close()
        print(f"{server.file}: written", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return parse_with(build_parser, argv)


if __name__ == "__main__":
    common.run(main, parse)
