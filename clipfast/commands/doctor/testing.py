"""``clipfast doctor MODEL``: does a model decompose correctly on this device and in this dtype?"""

import json
from dataclasses import asdict

from clipfast.commands import console
from clipfast.commands.doctor.options import Options
from clipfast.commands.loading import DTYPES, check_device
from clipfast.commands.options import DTYPE, parse_size
from clipfast.commands.quantities import plural
from clipfast.dataset.files import find_images
from clipfast.loading import load
from clipfast.selftest import Check, selftest

WRONG = 1
"""Exit code where results differ that must not."""


def test_model(options: Options, name: str) -> int:
    """Tests a model and prints every check; returns the exit code.

    Raises:
        ClipfastError: no such device or backend, a model that cannot be loaded, an image that cannot be read.
    """
    device, dtype = check_device(options.device), DTYPES[options.dtype or DTYPE]
    image_size = parse_size(options.image_size)
    sources, missing, notes = find_images(options.images)
    for note in notes:
        console.note(note)
    if missing:
        raise missing[0].error
    pictures = [source.open() for source in sources]
    with console.status(f"loading {name}"):
        model = load(
            name, options.pretrained, device=device, dtype=dtype, backend=options.backend, image_size=image_size
        )
    with console.status(f"testing {name}"):
        found = selftest(model, pictures)
    failed = [check for check in found.checks if not check.ok]
    if options.json:
        checks = [{**asdict(check), "ok": check.ok} for check in found.checks]
        console.say(
            json.dumps({"model": found.model, "images": found.images, "ok": found.ok, "checks": checks}, indent=2)
        )
    else:
        console.note(f"{found.model}, {plural(found.images, 'image')}")
        console.table(["check", "difference", "at most", "result"], [_row(check) for check in found.checks])
    if failed:
        console.error(f"{len(failed)} of {len(found.checks)} checks failed: results of this model are wrong here")
    return WRONG if failed else 0


def _row(check: Check) -> list[str]:
    result = "ok" if check.ok else f"FAILED{check.where and f': {check.where}'}"
    return [check.what, f"{check.error:.1e}", f"{check.bound:.0e}", result]
