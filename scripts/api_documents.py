"""Writes the generated documents: an OpenAPI file a service, and the AsyncAPI file of the topics.

``--check`` writes nothing and fails where a committed file is stale.
"""

import argparse
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

from hostler_common import asyncapi, cli

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("baremetal", "capacity", "precache", "usage")


def documents() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    found = {}
    topologies = {}
    for name in SERVICES:
        app = importlib.import_module(f"hostler_{name}.app")
        settings = importlib.import_module(f"hostler_{name}.settings")
        topologies[name] = importlib.import_module(f"hostler_{name}.messages").TOPOLOGY
        document = cli.openapi_document(settings.Settings, app.http_app)
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        found[ROOT / "docs" / "api" / f"{name}.openapi.json"] = text
    version = importlib.metadata.version("hostler-common")
    found[ROOT / "docs" / "api" / "topics.asyncapi.json"] = asyncapi.render(
        topologies, version=version
    )
    return found


def main() -> int:
    """Write or check; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say which files are stale")
    check = parser.parse_args().check
    stale = []
    for path, text in documents().items():
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if check and stale:
        print(f"stale: {', '.join(stale)}: run 'make docs' and commit", file=sys.stderr)
        return 1
    print(f"{'written' if stale else 'fresh'}: {', '.join(stale) or 'all generated documents'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
