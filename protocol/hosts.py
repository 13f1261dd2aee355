"""Which host names stay on this machine, for configuration and transport."""

from ipaddress import ip_address


def is_loopback_host(host: str) -> bool:
    """Say whether a host name can be reached from this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
