"""What a site says about the use of its images in the headers of its answers, and what we say of ourselves in ours.

X-Robots-Tag: noai                     to everybody
X-Robots-Tag: pairmill: noai, noindex  to us; words for other robots are not ours
TDM-Reservation: 1                     text and data mining rights are reserved (W3C TDMRep)
"""

import re
from collections.abc import Mapping, Sequence

from pipeline.config import FetchConfig

X_ROBOTS_TAG = "x-robots-tag"
TDM_RESERVATION = "tdm-reservation"
_TOKEN = re.compile(r"[A-Za-z_-]+")
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Directives that have a colon and a value themselves."""


def user_agent(config: FetchConfig) -> str:
    """Our User-Agent header: the name, and in its comment the contact, as crawlers write it."""
    name, contact = config.user_agent, config.contact
    if not contact:
        return name
    contact = f"+{contact}" if "://" in contact else contact
    return f"{name[:-1]}; {contact})" if name.endswith(")") else f"{name} ({contact})"


def product_token(name: str) -> str:
    """The word by which sites address us: the User-Agent's letters before the version (RFC 9309, 2.2.1)."""
    found = _TOKEN.match(name)
    return found[0].lower() if found else ""


def refused_by(headers: Mapping[str, Sequence[str]], config: FetchConfig) -> str | None:
    """The directive that forbids the use of an answer, such as `x-robots-tag: noai`; None if there is none.

    headers: names in lower case.
    """
    if tags := headers.get(X_ROBOTS_TAG):
        token = product_token(config.user_agent)
        forbidden = {directive.strip().lower() for directive in config.disallowed_header_directives}
        for directive in (directive for value in tags for directive in _directives(value, token)):
            if directive in forbidden:
                return f"{X_ROBOTS_TAG}: {directive}"
    if config.tdm_reservation != "ignore" and "1" in [value.strip() for value in headers.get(TDM_RESERVATION, ())]:
        return f"{TDM_RESERVATION}: 1"
    return None


def _directives(value: str, token: str) -> list[str]:
    """The directives of one X-Robots-Tag that are meant for us.

    A robot's name goes before the first directive and holds for the rest of the value.
    """
    name, colon, rest = value.partition(":")
    name = name.strip().lower()
    if colon and name not in _VALUED and "," not in name:
        if name != token:
            return []
        value = rest
    return [part.strip().lower() for part in value.split(",")]
