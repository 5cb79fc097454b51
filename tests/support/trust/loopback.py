"""A SuperLink and SuperNodes in processes of their own on this machine, over TLS, every node with a key of its own."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOUSE = Path(__file__).parents[3]
# Python imports it as it starts, in each process of a deployment: a line for each way out that is not this machine.
# gRPC connects in C, out of sight of CPython's audit events, to the addresses that it is given.
WATCHED = """
import os, sys

def local(event, arguments):
    if event.startswith("socket.get"):
        place = arguments[0]
    elif event in ("socket.connect", "socket.sendto"):
        place = arguments[1]
    else:
        return False
    if isinstance(place, tuple):
        place = place[0]
    if isinstance(place, bytes):
        place = place.decode()
    return not isinstance(place, str) or place in ("", "localhost", "::1") or place.startswith(("127.", "/"))

def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request",
                 "http.client.connect") and not local(event, arguments):
        note(f"{event} {arguments!r}")

def note(what):
    line = f"{os.path.basename(sys.argv[0]) if hasattr(sys, 'argv') else sys.orig_argv}: {what}\\n"
    with open(os.environ["WAYS_OUT"], "a") as notes:
        notes.write(line)

sys.addaudithook(hook)
note("watched")
"""
PEM = serialization.Encoding.PEM
OPEN = serialization.NoEncryption()


def _certificate(subject: str, public: Any, signer: tuple[str, Any], *, ca: bool) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    builder = x509.CertificateBuilder(name(signer[0]), name(subject), public, x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if not ca:
        places = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(places), critical=False)
    return builder.sign(signer[1], hashes.SHA256())


def write_certificates(folder: Path, name: str) -> None:
    """An authority ``NAME-ca.pem``, and a server that it signed."""
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    signer = f"{name} authority", authority
    for file, certificate in (
        (f"{name}-ca.pem", _certificate(signer[0], authority.public_key(), signer, ca=True)),
        (f"{name}.pem", _certificate("localhost", server.public_key(), signer, ca=False)),
    ):
        (folder / file).write_bytes(certificate.public_bytes(PEM))
    form = serialization.PrivateFormat.TraditionalOpenSSL
    (folder / f"{name}.key").write_bytes(server.private_bytes(PEM, form, OPEN))


def write_key(folder: Path, name: str) -> None:
    """A SuperNode's key pair."""
    key = ec.generate_private_key(ec.SECP384R1())
    (folder / f"{name}.key").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, OPEN))
    form = serialization.PublicFormat.OpenSSH
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.OpenSSH, form))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Loopback:
    """The processes of a deployment; all of them bear ``FLWR_HOME`` under ``folder``, by which they are found."""

    def __init__(self, folder: Path, clients: int) -> None:
        self.folder, self.clients, self.port = folder, clients, free_port()
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        paths = [str(folder / "watched"), str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "bindings")]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            "FLWR_HOME": str(folder / "home"),
            "WAYS_OUT": str(folder / "ways-out.txt"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }

    def __enter__(self) -> Loopback:
        for name in ("home", "watched"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "watched" / "sitecustomize.py").write_text(WATCHED)
        for name in ("right", "wrong"):
            write_certificates(self.folder, name)
        connection = f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.folder}/right-ca.pem"\n'
        (self.folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\n{connection}'
        )
        words = ["--ssl-certfile", f"{self.folder}/right.pem", "--ssl-keyfile", f"{self.folder}/right.key"]
        words += ["--ssl-ca-certfile", f"{self.folder}/right-ca.pem", "--port", str(self.port)]
        self.start("link", "flower-superlink", *words, "--enable-supernode-auth")
        until(self.listens, 60)
        for client in range(self.clients):
            write_key(self.folder, f"node-{client}")
            self.call("flwr", "supernode", "register", f"{self.folder}/node-{client}.pub", "ours")
            self.start_node(client)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        for started in self.started.values():
            started.wait(30)

    def start_node(self, client: int) -> None:
        words = f'client={client} name="site {client}" cache="{self.folder}/device-{client}"'
        self.start(f"node-{client}", "flower-supernode", *self.node_words(f"node-{client}"), "--node-config", words)

    def node_words(self, key: str, *, authority: str = "right") -> list[str]:
        words = ["--root-certificates", f"{self.folder}/{authority}-ca.pem", "--superlink", f"127.0.0.1:{self.port}"]
        return [*words, "--auth-supernode-private-key", f"{self.folder}/{key}.key", "--port", str(free_port())]

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", "fedmoe_bindings.flower", *words]
            self.started[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def call(self, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedmoe_bindings.flower", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=self.environment)

    def kill(self, name: str) -> None:
        """As a power cut would: the process and what it started, at once."""
        os.killpg(self.started[name].pid, signal.SIGKILL)
        self.started[name].wait(30)

    def processes(self) -> list[int]:
        """Ids of all processes of this deployment, wherever they were started from."""
        mark, found = f"FLWR_HOME={self.folder}/home".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # it has ended, or is not ours
                continue
        return found

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def noted(self) -> list[str]:
        """What the processes noted: that they are watched, and each way out that they tried."""
        return (self.folder / "ways-out.txt").read_text(errors="replace").splitlines()

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


def until(done: Callable[[], bool], seconds: float) -> None:
    """Wait for something to become true.

    Raises:
        TimeoutError: it did not.
    """
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"still waiting after {seconds:g} s")
        time.sleep(0.2)
