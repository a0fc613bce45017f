"""Generates torchft/coordination/proto/ from proto/. With --check: only says whether it is current.

The grpcio-tools version is pinned in pyproject.toml: it decides the oldest protobuf and grpcio the code runs with.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "torchft/coordination/proto"


def generate(out: Path) -> list[Path]:
    """Writes the generated modules below ``out`` and returns their paths."""
    sources = sorted((ROOT / "proto").glob("*.proto"))
    include = resources.files("grpc_tools") / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{PACKAGE}={ROOT / 'proto'}",
            f"-I{include}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *(f"{PACKAGE}/{s.name}" for s in sources),
        ]
    )
    if code != 0:
        sys.exit(code)
    return sorted(p for p in (out / PACKAGE).iterdir() if "_pb2" in p.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the code is not current")
    if not parser.parse_args().check:
        for path in generate(ROOT):
            print(path.relative_to(ROOT))
        return
    with tempfile.TemporaryDirectory() as tmp:
        stale = [
            p.name
            for p in generate(Path(tmp))
            if not (ROOT / PACKAGE / p.name).exists() or (ROOT / PACKAGE / p.name).read_bytes() != p.read_bytes()
        ]
    if stale:
        sys.exit(f"not current: {', '.join(stale)}. Run: python scripts/generate_proto.py")


if __name__ == "__main__":
    main()
