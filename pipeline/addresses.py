"""Which addresses a downloader may connect to: those of the public internet, and networks that the settings name."""

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

# IANA's special-purpose registries. Our own list: the standard library's differs between patch releases.
_SPECIAL_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # a public address at which Azure's own service answers its virtual machines
    )
)
_UNICAST = IPv6Network("2000::/3")
_SPECIAL_IPV6 = tuple(IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "3fff::/20"))
_NAT64 = IPv6Network("64:ff9b::/96")


@lru_cache(maxsize=65_536)
def is_public(address: str) -> bool:
    """Whether an IP address is a public unicast one.

    Loopback, private, shared, link-local (cloud metadata among them), multicast, documentation, Teredo and reserved
    ranges are not; an IPv6 address that carries an IPv4 one (mapped, 6to4, NAT64) is judged by that one.
    """
    ip = _parsed(address)
    if isinstance(ip, IPv6Address):
        carried = _carried(ip)
        if carried is None:
            return ip in _UNICAST and not any(ip in network for network in _SPECIAL_IPV6)
        ip = carried
    return ip is not None and not any(ip in network for network in _SPECIAL_IPV4)


def is_inside(address: str, networks: Sequence[str]) -> bool:
    """Whether an address lies in one of the networks, written as `10.1.0.0/16` or `fd00::/8`."""
    ip = _parsed(address)
    return ip is not None and any(ip in ip_network(network) for network in networks)


def is_network(text: str) -> bool:
    """Whether a text names a network or an address."""
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=65_536)
def is_address(host: str) -> bool:
    """Whether a URL's host is an address and not a name."""
    return _parsed(host) is not None


def _parsed(address: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(address.partition("%")[0])
    except ValueError:
        return None


def _carried(ip: IPv6Address) -> IPv4Address | None:
    if ip in _NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour
