"""The process that runs a checkout of the published code; started by :mod:`benchmarks.reference`, never imported.

``reference_worker.py CHECKOUT REQUEST`` loads the checkout's model with the weights of the request. It then
reads one command per line and answers each with one line of JSON: ``run`` times one decomposition, ``write`` runs one
and writes its arrays to a file, ``peak`` reports memory.
"""

import contextlib
import inspect
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def resident_mb() -> float:
    """Current resident size in MB (10⁶ bytes)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_mb() -> float:
    """Highest resident size since the last reset, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Loads the model, then answers commands until the input ends."""
    checkout, request = sys.argv[1], json.loads(sys.argv[2])
    sys.path[0] = checkout  # replaces this folder: the checkout's packages have common names
    os.chdir(checkout)

    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(request["threads"])
    from prs_hook import hook_prs_logger  # type: ignore[import-not-found]
    from utils.factory import create_model_and_transforms  # type: ignore[import-not-found]

    device: str = request["device"]
    spatial: bool = request["spatial"]
    weights = load_file(request["inputs"])
    images = weights.pop("images").to(device)
    model: Any = create_model_and_transforms(request["model"], pretrained=None)[0]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    unfilled = [key for key in missing if key.startswith("visual.")] + list(unexpected)
    if unfilled:
        raise SystemExit(f"the weights do not fit the checkout's model: {', '.join(unfilled[:5])}")
    model = model.to(device).eval()
    options: dict[str, bool] = {}
    if "spatial" in inspect.signature(hook_prs_logger).parameters:
        options["spatial"] = spatial
    elif not spatial:
        raise SystemExit("this checkout has no variant without per-token contributions")
    logger = hook_prs_logger(model, device, **options)
    method = "head" if spatial else "head_no_spatial"

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    @torch.no_grad()
    def decompose() -> tuple[Any, Any, Any]:
        logger.reinit()
        embedding = model.encode_image(images, attn_method=method, normalize=False)
        attentions, mlps = logger.finalize(embedding)
        return embedding, attentions, mlps

    def answer(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # leave the peak during loading out
    loaded = resident_mb()
    answer(ready=True)
    for command in sys.stdin:
        if command.strip() == "peak":
            extra = {} if device == "cpu" else {"device_peak_mb": torch.cuda.max_memory_allocated() / 1e6}
            answer(loaded_mb=loaded, peak_mb=peak_mb(), **extra)
            continue
        wait()
        start = time.perf_counter()
        result = decompose()
        wait()
        elapsed = time.perf_counter() - start
        if command.strip() == "write":
            names = ("embedding", "attentions", "mlps")
            save_file(
                {name: part.detach().cpu().contiguous() for name, part in zip(names, result, strict=True)},
                request["answer"],
            )
        del result
        answer(seconds=elapsed)


if __name__ == "__main__":
    main()
