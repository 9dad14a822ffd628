"""Whom a name of a host has led to: asked once the connection stands and before anything is sent over it.

``ALLOWED_HOSTS`` names hosts, and whoever runs a domain says where its names lead, at each moment anew. A name in that list may lead into the network
that its operator meant, such as a hospital's; never to this machine itself, to its link, or to a cloud's metadata service.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from backend.errors import SourceRefused

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Where clouds answer with credentials, beyond the link-local 169.254.169.254: Alibaba, Azure, AWS on IPv6.
_METADATA = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "168.63.129.16", "fd00:ec2::254")))


def refusal(host: str, peer: str) -> str:
    """Why what ``host`` has led to must not be asked; empty if it may be.

    Parameters
    ----------
    host
        As the location names it. One that is an address itself stands in ``ALLOWED_HOSTS`` as it is: that is meant.
    peer
        The address of the other end.
    """
    if _address(host) is not None:
        return ""
    address = _address(peer)
    if address is None:
        return "an address that cannot be read"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback or address.is_unspecified:
        here = host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost")
        return "" if here else "this machine itself"
    if address.is_link_local or address in _METADATA:
        return "this machine's own link, where clouds keep credentials"
    return "no single machine" if address.is_multicast else ""


def _address(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text.strip("[]").split("%", 1)[0])
    except ValueError:
        return None


def guard(url: str, shown: str) -> Callable[[str, Mapping[str, Any]], None]:
    """For httpx' extension ``trace``: ends a request to ``url`` that has been connected to whom it must not be.

    A proxy is asked whoever it is: that it is to be used is the operator's word.

    Raises
    ------
    SourceRefused
        From inside the request.
    """
    wanted = httpx.URL(url).raw_host.decode("ascii")
    connecting: list[str] = []

    def watch(event: str, about: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.started":
            connecting[:] = [str(about["host"])]
        elif event == "connection.connect_tcp.complete" and connecting == [wanted]:
            stream = about["return_value"]
            peer = str(stream.get_extra_info("server_addr")[0])
            why = refusal(wanted, peer)
            if why:
                stream.close()
                raise SourceRefused(
                    f"The name of the host of {shown} leads to {why}.",
                    hint="If that is meant, write the address itself into the location and into ALLOWED_HOSTS.",
                )

    return watch
