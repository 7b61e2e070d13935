"""Bring all commands of `p2pgrid` together."""

from p2pgrid.cli import disks, grid, jobs, proxy
from p2pgrid.cli.app import app

__all__ = ["app", "disks", "grid", "jobs", "proxy"]
