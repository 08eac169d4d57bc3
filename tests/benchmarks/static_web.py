"""A local web server that costs little: a folder over HTTP and HTTPS, on sixteen loopback addresses.

nginx where it is installed (`apt install nginx-light`), else this file run as a program: a thread a connection, bodies
by sendfile. Both answer HTTP/1.1 with keep-alive; nginx also HTTP/2 over TLS. Everything lives in the given folder.
"""

import contextlib
import ctypes
import datetime
import ipaddress
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOSTS = tuple(f"127.0.2.{number}" for number in range(1, 17))
START_TIMEOUT_S = 10.0

NGINX = """
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  types {{ image/jpeg jpg; }}
  keepalive_requests 1000000;
  open_file_cache max=20000 inactive=600s;
  open_file_cache_valid 600s;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  ssl_certificate {folder}/server.pem;
  ssl_certificate_key {folder}/server.key;
  ssl_session_cache shared:tls:10m;
  server {{
    root {root};
{listen}
  }}
}}
"""


@dataclass(frozen=True, kw_only=True)
class StaticWeb:
    """A running server: its ports on every one of HOSTS, its process, and the certificates that clients need."""

    name: str
    http_port: int
    https_port: int
    pid: int
    ca_bundle: Path

    def url(self, scheme: str, number: int, path: str) -> str:
        """The address of a file; numbers spread files over the hosts."""
        port = self.https_port if scheme == "https" else self.http_port
        return f"{scheme}://{HOSTS[number % len(HOSTS)]}:{port}/{path}"


@contextlib.contextmanager
def serve_folder(root: Path, folder: Path) -> Iterator[StaticWeb]:
    """Serve `root`; `folder` takes configuration, certificates and logs. The server stops with the context."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = write_certificates(folder)
    http_port, https_port = _free_ports()
    nginx = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if nginx:
        listen = [f"    listen {host}:{http_port} backlog=4096;" for host in HOSTS]
        listen += [f"    listen {host}:{https_port} ssl http2 backlog=4096;" for host in HOSTS]
        user = "user root;" if os.geteuid() == 0 else ""  # else its worker becomes somebody who may not read `root`
        text = NGINX.format(user=user, folder=folder, root=root, listen="\n".join(listen))
        (folder / "nginx.conf").write_text(text)
        command = [nginx, "-e", str(folder / "nginx.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    else:
        command = [sys.executable, str(Path(__file__).resolve()), str(root), str(folder)]
        command += [str(http_port), str(https_port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=_end_with_parent)
    try:
        for port in (http_port, https_port):
            _wait_for(process, port)
        yield StaticWeb(
            name="nginx" if nginx else "python",
            http_port=http_port,
            https_port=https_port,
            pid=process.pid,
            ca_bundle=bundle,
        )
    finally:
        process.terminate()
        process.communicate()


def write_certificates(folder: Path) -> Path:
    """A new authority and a certificate of its for HOSTS; returns the system's bundle with the authority added."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark authority")])

    def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    is_ca = x509.BasicConstraints(ca=True, path_length=0)
    ca = builder(ca_name, ca_key.public_key()).add_extension(is_ca, critical=True).sign(ca_key, hashes.SHA256())
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host)) for host in HOSTS])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    leaf = builder(subject, key.public_key()).add_extension(names, critical=False).sign(ca_key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (folder / "server.pem").write_bytes(leaf.public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    system = ssl.get_default_verify_paths().cafile
    bundle = folder / "bundle.pem"
    bundle.write_bytes((Path(system).read_bytes() if system else b"") + b"\n" + ca.public_bytes(pem))
    return bundle


def _end_with_parent() -> None:
    """PR_SET_PDEATHSIG: no server outlives a benchmark that is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for listener in (first, second):
            listener.bind((HOSTS[0], 0))
        return first.getsockname()[1], second.getsockname()[1]


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return socket.create_connection((HOSTS[-1], port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the web server did not start: {' '.join(map(str, process.args))}") from None
            time.sleep(0.05)


def _answer(connection: socket.socket, root: Path, context: ssl.SSLContext | None) -> None:
    """GET after GET of one connection."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        stack.enter_context(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            connection = stack.enter_context(context.wrap_socket(connection, server_side=True))
        received = b""
        while True:
            while b"\r\n\r\n" not in received:
                more = connection.recv(65_536)
                if not more:
                    return
                received += more
            head, _, received = received.partition(b"\r\n\r\n")
            path = root / head.split(b" ", 2)[1].decode().partition("?")[0].lstrip("/")
            if not path.is_file():
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            size = path.stat().st_size
            connection.sendall(
                f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {size}\r\n\r\n".encode()
            )
            with open(path, "rb") as file:
                connection.sendfile(file)
            if b"connection: close" in head.lower():
                return


def _listen(host: str, port: int, root: Path, context: ssl.SSLContext | None) -> None:
    with socket.create_server((host, port), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection, root, context), daemon=True).start()


def main() -> None:
    """ROOT FOLDER HTTP_PORT HTTPS_PORT: serve until the standard input ends."""
    root, folder, http_port, https_port = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    for host in HOSTS:
        for port, tls in ((http_port, None), (https_port, context)):
            threading.Thread(target=_listen, args=(host, port, root, tls), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
