"""What is known of hosts: which names stay on this machine, and since when it has been running."""

import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path


def is_loopback_host(host: str) -> bool:
    """Say whether a host name can be reached from this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def boot_id() -> str:
    """Return what identifies the current start of this machine, or "" if that is unknown."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "kern.bootsessionuuid"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
