"""The record that a build leaves beside a library: the file's size and digest, and the digest of its sources.

A library that is damaged ends the process when it is mapped, and one that is older than its sources computes something
else than they say. So both are compared with the record before the library is loaded: 1 MB to hash takes 1-3 ms.
``setup.py`` runs this file too, where nothing else of the package can be imported: it needs the standard library alone.
"""

import hashlib
import json
from pathlib import Path


def path_for(library: Path) -> Path:
    """Where the record of a library stands."""
    return library.with_suffix(".json")


def sources_digest(csrc: Path) -> str:
    """SHA-256 of the sources in a folder, names and contents, in order of their names."""
    digest = hashlib.sha256()
    for source in sorted((*csrc.glob("*.cpp"), *csrc.glob("*.cu"), *csrc.glob("*.h"))):
        content = source.read_bytes()
        digest.update(f"{source.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def write(library: Path, csrc: Path) -> None:
    """Records a library that was just built from these sources."""
    content = library.read_bytes()
    record = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "sources": sources_digest(csrc),
    }
    path_for(library).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def problem(library: Path, csrc: Path) -> str:
    """Why a library must not be loaded, in one line; empty where it may.

    Args:
        library: the file.
        csrc: the folder of the sources, compared where it exists: in a checkout.
    """
    record_path = path_for(library)
    try:
        record = json.loads(record_path.read_bytes())
        size, sha256, sources = record["size"], record["sha256"], record["sources"]
    except FileNotFoundError:
        return f"{record_path.name}, the record of its build, is missing"
    except (OSError, ValueError, TypeError, KeyError):
        return f"{record_path.name}, the record of its build, cannot be read"
    if (actual := library.stat().st_size) != size:
        return f"{library.name} is damaged: it has {actual:,} bytes, its build left {size:,}"
    if hashlib.sha256(library.read_bytes()).hexdigest() != sha256:
        return f"{library.name} is damaged: its bytes are not those of its build"
    if csrc.is_dir() and sources_digest(csrc) != sources:
        return f"{csrc.name}/ was changed after {library.name} was built"
    return ""
