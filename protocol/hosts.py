"""Host names, as configuration and transport judge them."""

from ipaddress import ip_address


def is_loopback_host(host: str) -> bool:
    """Say whether a host name can be reached from this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
