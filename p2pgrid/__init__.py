"""Run virtual machines on the PCs you already have."""

__version__ = "0.1.0"
