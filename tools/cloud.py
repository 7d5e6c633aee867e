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
download, or nothing. Whoever holds the key is still not believed: a message is what cema.decode
accepts, and no larger than that. Nothing is encrypted: over a network that others read, use a tunnel.
"""

import argparse
import errno
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cema  # noqa: E402
import common  # noqa: E402
from common import InputError, number  # noqa: E402
from tools import streams  # noqa: E402

LARGEST = cema.LARGEST_MESSAGE + 4
# What ends a connection, and nothing else. AssertionError: of answer_challenge, from a stranger's port.
BROKEN = (OSError, EOFError, AuthenticationError, ValueError, AssertionError)
WELCOME = b"welcome"  # to a name; else the answer is why not


# ===== The wire, of both programs =====================================================================


def with_wire(p: argparse.ArgumentParser, prog: str, about: str):
    """cema.py's flags and those of the wire; returns what adds more of them."""
    p.prog, p.description = prog, about
    a = p.add_argument_group("wire").add_argument
    a("--key-file", help="file with the shared secret; None: the environment variable CEMA_KEY")
    return a


def parse_with(build_parser, argv: list[str] | None) -> argparse.Namespace:
    p = build_parser()
    p.set_defaults(**cema.RECIPES[p.parse_args(argv).recipe])
    args = p.parse_args(argv)
    if args.seeds:
        raise InputError("--seeds: this program is one run; give it a --seed")
    return args


def address_of(text: str, flag: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise InputError(f"{flag} {text}: expected HOST:PORT, as in 127.0.0.1:5555")
    return host, int(port)


def hello(name: str, net) -> bytes:
    """What an edge says first. InputError for a name of other letters."""
    if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        raise InputError(f"--name {name}: expected 1 to 64 letters, digits, _ . -")
    return f"{name} {common.crc_of(net)}".encode()


def key_of(args: argparse.Namespace) -> bytes:
    """The shared secret. Never from the command line, which everybody on the machine can read."""
    file = Path(args.key_file or "")
    key = file.read_bytes().strip() if args.key_file else os.environ.get("CEMA_KEY", "").encode()
    if len(key) < 16:
        raise InputError("no key of 16 characters or more: set CEMA_KEY, or name a file by --key-file")
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


class Twin:
    """What the cloud holds of one edge."""

    STATE = ("cloud", "since_work")

    def __init__(self, cloud: cema.Cloud):
        self.cloud, self.since_work = cloud, 0


class Server:
    """Twins by name, one foundation model, a thread a connection; one of them learns at a time."""

    def __init__(self, args: argparse.Namespace, nets: list, classes: int, size: int):
        self.args, self.lock, self.counts = args, threading.Lock(), Counter()
        self.twins, self.conns, self.threads = {}, {}, set()  # the first two by name
        self.make = lambda: cema.Cloud(*nets, args, classes, size, self.counts)
        self.f = cema.CEMA(*nets, size, args).cloud.f  # which also checks that all fits together
        self.crc = common.crc_of(nets[0])
        self.batch_size, self.file = args.batch_size, Path(args.out) / "cloud.pt"

    def twin(self, name: str) -> Twin:
        if name not in self.twins:
            if len(self.twins) >= self.args.most_edges:
                raise ValueError(f"{name}: would be edge {len(self.twins) + 1}, see --most-edges")
            self.twins[name] = Twin(self.make())
            self.twins[name].cloud.f = self.f  # one for all
        return self.twins[name]

    def answer(self, name: str, message: bytes) -> bytes:
        """One batch of an edge: its upload is received, and what it sets off is done."""
        if len(message) < 4:
            raise ValueError("half a message")
        n, upload = struct.unpack(">I", message[:4])[0], message[4:]
        with self.lock:
            twin = self.twin(name)
            if upload:
                self.counts["uploads"] += 1
                twin.cloud.receive(upload)
            twin.since_work += n
            if twin.since_work < self.batch_size:
                return b""
            twin.since_work %= self.batch_size
            return twin.cloud.work() or b""

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
                    self.twin(name)
                    old, self.conns[name] = self.conns.get(name), conn
            except ValueError as e:
                conn.send_bytes(str(e).encode())
                raise
            if old:  # the edge came back before its old connection was known to be dead
                hang_up(old)
            conn.send_bytes(WELCOME)
            welcome = True
            print(f"edge {name}: connected" + ", in the place of an older one" * bool(old), flush=True)
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
            state = {name: common.state_of(twin) for name, twin in self.twins.items()}
            f = common.state_of(self.f)
            for of in state.values():
                of["cloud"].pop("f")
            args = cema_flags(self.args)
            common.save_atomic({"args": common.flat(args), "f": f, "twins": state}, self.file)

    def load(self) -> None:
        args = argparse.Namespace(**vars(cema_flags(self.args)) | {"resume": True})
        if saved := common.load_checkpoint(self.file, args):
            if len(saved["twins"]) > self.args.most_edges:
                raise InputError(f"{self.file}: holds {len(saved['twins'])} edges; raise --most-edges")
            common.restored(self.f, saved["f"])
            for name, state in saved["twins"].items():
                common.restored(self.twin(name), state | {"cloud": state["cloud"] | {"f": saved["f"]}})
            print(f"going on with {', '.join(saved['twins']) or 'no edges'} of {self.file}")

    def save_now_and_then(self) -> None:
        while True:
            time.sleep(self.args.save_s)
            try:
                self.save()
            except (OSError, RuntimeError) as e:  # a full disk: it may have room again
                print(f"{self.file}: not written ({e})", flush=True)
            steps = sum(twin.cloud.steps for twin in self.twins.values())
            figures = " | ".join(f"{k} {v}" for k, v in sorted(self.counts.items()))
            edges = f"{len(self.conns)} of {len(self.twins)} edges"
            print(f"{edges} | steps {steps} | {figures}", flush=True)


def cema_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Without those of this program, which may change from one start to the next."""
    known = {action.dest for action in cema.build_parser()._actions} | {"weights_crc"}
    return argparse.Namespace(**{k: v for k, v in vars(args).items() if k in known})


# ===== Run ============================================================================================


def build_parser() -> argparse.ArgumentParser:
    p = cema.build_parser()
    a = with_wire(p, "tools/cloud.py", __doc__)
    a("--listen", default="127.0.0.1:5555", metavar="HOST:PORT", help="port 0: any, which is printed")
    a("--most-edges", type=number(int, 1), default=64, help="twins, and twice as many connections")
    a("--frame-s", type=number(int, 1), default=10, help="a message takes at most so long, seconds")
    a("--idle-s", type=number(int, 1), default=3600, help="an edge without a word for so long is let go")
    a("--save-s", type=number(float, 0.1), default=60, help="between two writes of the state")
    p.set_defaults(out="runs/cloud")
    return p


def main(args: argparse.Namespace) -> None:
    key, device = key_of(args), common.pick_device(args.device)
    address = address_of(args.listen, "--listen")
    common.check_out(Path(args.out))
    args.amp = common.has_fast_bf16(device) if args.amp is None else args.amp
    data, _, keep = streams.load_domains(args)
    nets = cema.networks(args, data, keep, device)
    server = Server(args, nets, len(keep or data.classes), data.size)
    server.file.parent.mkdir(parents=True, exist_ok=True)
    owned = server.file.with_suffix(".lock").open("a")
    common.lock(owned)  # or two clouds would overwrite each other's twins
    server.load()
    try:
        listener = Listener(address, backlog=16)
    except OSError as e:
        raise InputError(f"--listen {args.listen}: {e.strerror}; name another port") from None

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
        print(f"{server.file}: written", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return parse_with(build_parser, argv)


if __name__ == "__main__":
    common.run(main, parse)
