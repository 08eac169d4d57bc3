"""Which addresses a downloader may connect to: those of the public internet, and no others."""

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

_NAT64 = IPv6Network("64:ff9b::/96")


@lru_cache(maxsize=65_536)
def is_public(address: str) -> bool:
    """Whether an IP address is a public unicast one.

    Loopback, private, shared, link-local (cloud metadata among them), multicast, documentation and reserved ranges
    are not; an IPv6 address that carries an IPv4 one (mapped, 6to4, NAT64) is judged by that one too.
    """
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    carried = _carried(ip)
    if carried is not None:
        return is_public(str(carried))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _carried(ip: IPv4Address | IPv6Address) -> IPv4Address | None:
    if isinstance(ip, IPv4Address):
        return None
    if ip in _NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour
