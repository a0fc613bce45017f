"""Installs the measured peer into `.peer/`: the registry's `torchft`, another implementation of the same API.

It is run only as a separate process, with `.peer/` first on PYTHONPATH and this same interpreter (so with the same
torch), to talk to it in tests/interop and to time it in benchmarks. Nothing of it is imported by the package, and
its source is never read.

Rules: every version is pinned and installed without dependencies, so the environment's torch and protobuf are used.
The folder appears complete or not at all: pip writes into a folder beside it, which is renamed when done. A folder
whose stamp names the same pins and the same Python is left as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

__all__ = ["PEER", "PINS", "ensure_peer", "installed"]

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".peer"
STAMP = "installed.json"
TIMEOUT_SEC = 300.0

PINS = (
    "torchft==0.2.0",
    # What it imports at start-up and this environment does not have.
    "opentelemetry-api==1.45.2",
    "opentelemetry-sdk==1.45.2",
    "opentelemetry-exporter-otlp-proto-http==1.45.2",
    "opentelemetry-exporter-otlp-proto-common==1.45.2",
    "opentelemetry-exporter-otlp-common==0.66b2",
    "opentelemetry-exporter-http-transport==0.66b2",
    "opentelemetry-proto==1.45.2",
    "opentelemetry-semantic-conventions==0.66b2",
    "googleapis-common-protos==1.76.0",
)


def _wanted() -> dict[str, object]:
    return {"pins": list(PINS), "python": sysconfig.get_python_version(), "platform": sysconfig.get_platform()}


def installed(peer: Path = PEER) -> bool:
    """Whether ``peer`` is complete, with these pins and for this Python."""
    try:
        found = json.loads((peer / STAMP).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return bool(found == _wanted())


def ensure_peer(peer: Path = PEER) -> bool:
    """Installs the peer into ``peer`` unless it is there; True if it did something.

    Raises:
        subprocess.CalledProcessError: pip failed, or the peer cannot be imported.
        subprocess.TimeoutExpired: pip took longer than ``TIMEOUT_SEC``.
    """
    if installed(peer):
        return False
    partial = Path(tempfile.mkdtemp(prefix=f"{peer.name}-partial-", dir=peer.parent))
    partial.chmod(0o755)
    try:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        pip += ["--only-binary=:all:", "--target", str(partial), *PINS]
        subprocess.run(pip, check=True, timeout=TIMEOUT_SEC, env={**os.environ, "PIP_USER": "0"})
        check = [sys.executable, "-c", "import torchft, torchft.coordination as c; print(c.LighthouseServer)"]
        env = {**os.environ, "PYTHONPATH": str(partial)}
        subprocess.run(check, check=True, timeout=TIMEOUT_SEC, env=env, stdout=subprocess.DEVNULL, cwd=partial)
        (partial / STAMP).write_text(json.dumps(_wanted(), indent=1) + "\n")
        if peer.exists():  # incomplete, or with other pins
            shutil.rmtree(peer)
        try:
            partial.rename(peer)
        except OSError:
            if not installed(peer):  # otherwise another process was faster, which is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args()
    did = ensure_peer()
    print(f"{PEER.relative_to(ROOT)}: {'installed' if did else 'already has'} {', '.join(PINS)}")


if __name__ == "__main__":
    main()
