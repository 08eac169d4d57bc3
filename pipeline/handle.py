"""A libcurl handle that makes plain requests, and what all handles of a process share."""

import contextlib
import os
import ssl
from importlib import import_module
from pathlib import Path

import pycurl

from pipeline.config import FetchConfig
from pipeline.directives import user_agent

RECEIVE_BYTES = 2**16


def ca_file() -> str | None:
    """The certificates that servers are checked against: SSL_CERT_FILE, CURL_CA_BUNDLE, the system's, or certifi's."""
    found = [os.environ.get("SSL_CERT_FILE"), os.environ.get("CURL_CA_BUNDLE")]
    found += [ssl.get_default_verify_paths().cafile, "/etc/ssl/certs/ca-certificates.crt"]
    with contextlib.suppress(ImportError):
        found.append(import_module("certifi").where())
    return next((path for path in found if path and Path(path).is_file()), None)


def configured(config: FetchConfig) -> pycurl.Curl:
    """A handle that does nothing but plain requests: no redirects, cookies, proxies or credentials of its own."""
    curl = pycurl.Curl()
    for option, value in (
        (pycurl.NOSIGNAL, 1),
        (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
        (pycurl.PROXY, ""),  # a proxy would connect in our place, where addresses cannot be refused
        (pycurl.NETRC, pycurl.NETRC_IGNORED),
        (pycurl.FOLLOWLOCATION, 0),  # every hop asks the admission and has its host's limits
        (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS),
        (pycurl.USERAGENT, user_agent(config)),
        (pycurl.HTTPHEADER, ["Accept: image/*,*/*;q=0.5"]),
        (pycurl.ENCODING, "identity"),  # ask for none, but undo what a server applies all the same
        (pycurl.CONNECTTIMEOUT_MS, max(1, round(config.connect_timeout_s * 1_000))),
        (pycurl.LOW_SPEED_LIMIT, config.min_speed),
        (pycurl.LOW_SPEED_TIME, config.min_speed_s),
        (pycurl.MAXFILESIZE_LARGE, config.max_bytes),
        (pycurl.BUFFERSIZE, RECEIVE_BYTES),
        (pycurl.TCP_NODELAY, 1),
        (pycurl.SSL_VERIFYPEER, int(config.verify_tls)),
        (pycurl.SSL_VERIFYHOST, 2 * int(config.verify_tls)),
        (pycurl.SHARE, SHARED),
    ):
        curl.setopt(option, value)
    if certificates := ca_file():
        curl.setopt(pycurl.CAINFO, certificates)
    return curl


SHARED = pycurl.CurlShare()
"""TLS sessions outlive a unit: a process does many."""
SHARED.setopt(pycurl.SH_SHARE, pycurl.LOCK_DATA_SSL_SESSION)
