"""``clipfast collection validate``: every file of a collection against its checksums."""

import json

from clipfast.commands import console
from clipfast.commands.collection.validate.options import Options
from clipfast.commands.outcome import FAILED
from clipfast.commands.quantities import plural
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.validating import validate

FORMAT = "clipfast.collection-validate/1"


def run(options: Options) -> int:
    """Prints a line for each finding; returns the exit code.

    Raises:
        InputError: no collection, or one whose settings are damaged.
    """
    manifest = Manifest(options.collection)
    with console.progress("checking units", manifest.plan.count) as advance:
        findings = validate(options.collection, inputs=options.inputs, progress=lambda done, total: advance(1))
    if options.json:
        content = {"format": FORMAT, "collection": str(options.collection), "findings": findings}
        console.say(json.dumps(content, indent=2))
    else:
        for finding in findings:
            console.error(finding)
        units = f"{len(manifest.finished())} of {plural(manifest.plan.count, 'unit')}"
        console.say(f"{options.collection}: {units} checked, {plural(len(findings), 'finding')}")
    return FAILED if findings else 0
