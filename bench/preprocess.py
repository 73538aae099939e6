"""JPEG files to pixel rows: images a second against transformers' processors and qwen-vl-utils, on two threads.

qwen2vl-fast bench preprocess [--peers NAME ...] [--threads 2] [--json] [--save]

Every contender opens the files, decodes, resizes, normalises and cuts into patches. With --threads 1 processor time is told,
which other work on the machine hardly lengthens. Besides, on a CUDA device: rows made there, in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.timing import ROOT, failed, keep, measure, parser, positive, publish, say, taking_part
from qwen2vl_fast import ops
from qwen2vl_fast.media import MAX_PIXELS, MIN_PIXELS, load_image, preprocess_images, resized
from qwen2vl_fast.reference import IMAGE_STD

PICTURES = ROOT / "qwen2vl_fast" / "assets" / "pictures"
CASES = {  # (source, width, height, pictures in a call)
    "thumbnail 448 x 448": ("photo.jpg", 448, 448, 1),
    "photo 1280 x 720": ("photo.jpg", 1280, 720, 1),
    "photo 1920 x 1080": ("photo.jpg", 1920, 1080, 1),
    "page 1240 x 1754": ("page.png", 1240, 1754, 1),
    "8 photos 1280 x 720 in a call": ("photo.jpg", 1280, 720, 8),
}
OURS, PIL, VISION, UTILS = "qwen2vl_fast", "transformers PIL", "transformers torchvision", "qwen-vl-utils + transformers PIL"
PACKAGES = {VISION: "torchvision", UTILS: "qwen-vl-utils torchvision"}
OURS_CUDA, VISION_CUDA = "qwen2vl_fast, rows on the GPU", "transformers torchvision, on the GPU"
PEERS = (PIL, VISION, UTILS, VISION_CUDA)
LEVEL = 1 / 255 / max(IMAGE_STD)  # a grey level, at least, in normalised rows
ALLOWED = {OURS: 1e-5, OURS_CUDA: LEVEL}  # largest differences of our rows; those on the GPU are bfloat16
Rows = Callable[[list[str]], torch.Tensor]


def ours(paths: list[str]) -> torch.Tensor:
    return preprocess_images(paths)[0]


def ours_on(device: str) -> Rows:
    """The file is decoded on the host; its pixels are resized, normalised and cut on the device."""

    def one(path: str) -> torch.Tensor:
        image = load_image(path)
        size = resized(image.height, image.width, MIN_PIXELS, MAX_PIXELS, path)
        frames = torch.from_numpy(np.array(image)).to(device, non_blocking=True).expand(2, -1, -1, -1)
        return ops.patchify(frames, dtype=torch.bfloat16, size=size)

    return lambda paths: torch.cat([one(path) for path in paths])


def opened(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def transformers_pil() -> Rows:
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:  # before transformers 5 the one on PIL had the plain name
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    processor = Processor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return lambda paths: processor(images=list(map(opened, paths)), return_tensors="pt")["pixel_values"]


def transformers_torchvision(device: str) -> Rows:
    import torchvision  # noqa: F401 -- transformers hands out a placeholder without it
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    more = {"device": device} if device != "cpu" else {}
    return lambda paths: processor(images=list(map(opened, paths)), return_tensors="pt", **more)["pixel_values"]


def qwen_vl_utils() -> Rows:
    from qwen_vl_utils.vision_process import fetch_image

    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    processor = Processor(do_resize=False)

    def rows(paths: list[str]) -> torch.Tensor:
        images = [fetch_image({"image": path, "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}) for path in paths]
        return processor(images=images, return_tensors="pt")["pixel_values"]

    return rows


def contenders(cuda: bool) -> tuple[dict[str, Rows], dict[str, str]]:
    """Who can run, and why the others can't."""
    builders: dict[str, Callable[[], Rows]] = {
        OURS: lambda: ours,
        PIL: transformers_pil,
        VISION: lambda: transformers_torchvision("cpu"),
        UTILS: qwen_vl_utils,
    }
    if cuda:
        builders |= {OURS_CUDA: lambda: ours_on("cuda"), VISION_CUDA: lambda: transformers_torchvision("cuda")}
    found, missing = {}, {}
    for name, build in builders.items():
        try:
            found[name] = build()
        except (ImportError, OSError, RuntimeError) as error:
            missing[name] = " ".join(str(error).split())[:160]
            if name in PACKAGES and isinstance(error, ImportError):
                missing[name] += f"; pip install {PACKAGES[name]}"
    if not cuda:
        missing |= dict.fromkeys((OURS_CUDA, VISION_CUDA), "needs a CUDA device")
    return found, missing


def pictures(folder: Path) -> dict[str, list[str]]:
    """{name: JPEG files of a call}, from the pictures of the repository."""
    paths = {}
    for name, (source, width, height, count) in CASES.items():
        path = folder / f"{width}x{height}.jpg"
        opened(str(PICTURES / source)).resize((width, height), Image.Resampling.LANCZOS).save(path, quality=90)
        paths[name] = [str(path)] * count
    return paths


def name_of() -> str:
    return f"preprocess_{'cuda' if torch.cuda.is_available() else 'cpu'}"


def compare(out: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """How far rows are from transformers' own; "missing" if they are other rows. Resizes differ by a level here and there."""
    if out.shape != expected.shape:
        return {"missing": f"computes something else: rows {tuple(out.shape)} instead of {tuple(expected.shape)}"}
    difference = (out - expected).abs()
    if not difference.mean() < LEVEL:
        return {"missing": f"computes something else: {difference.mean() / LEVEL:.1f} grey levels off in the mean"}
    return {"largest_difference": float(difference.max())}


def race(options: Any, folder: Path) -> list[dict[str, Any]]:
    cuda = torch.cuda.is_available()
    found, missing = contenders(cuda)
    judge, found, missing = found[PIL], taking_part(options, found, PEERS), taking_part(options, missing, PEERS)
    for name, reason in missing.items():
        say(options, f"{name}: {reason}")
    rows = []
    for name, paths in pictures(folder).items():
        expected = judge(paths).float()
        facts: dict[str, dict[str, Any]] = {contender: {"missing": reason} for contender, reason in missing.items()}
        for contender, run in found.items():
            try:
                facts[contender] = compare(run(paths).float().cpu(), expected)
            except Exception as failure:
                if contender in ALLOWED:
                    raise
                facts[contender] = {"missing": failed(failure)}
            if contender in ALLOWED and not facts[contender].get("largest_difference", float("inf")) <= ALLOWED[contender]:
                raise RuntimeError(f"{contender}, {name}: other rows than transformers', {facts[contender]}")

        def one(run: Rows, paths: list[str] = paths) -> Callable[[], None]:
            def call() -> None:
                out = run(paths)
                if out.is_cuda:
                    torch.cuda.synchronize()

            return call

        runs = {contender: one(run) for contender, run in found.items() if "missing" not in facts[contender]}
        seconds = measure(runs, repeats=options.repeats, device="cpu")
        for contender, value in seconds.items():
            facts[contender] |= {"seconds": value, "images_per_second": len(paths) / value["median"]}
        rows.append({"picture": name, "rows": len(expected), "threads": options.threads, "contenders": facts})
        say(options, f"{name}, {len(expected)} rows")
        for contender, value in seconds.items():
            against = f"  {seconds[PIL]['median'] / value['median']:.2f}x {PIL}" if PIL in seconds else ""
            say(options, f"  {contender:<36} {len(paths) / value['median']:8.1f} images/s{against}")
        keep(name_of(), options, rows)
    return rows


def main(argv: list[str] | None = None) -> None:
    arguments = parser("preprocess", __doc__, repeats=9, peers=PEERS)
    arguments.add_argument("--threads", type=positive, default=2, help="of torch (default: 2)")
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = race(options, Path(folder))
    publish(name_of(), options, rows)


if __name__ == "__main__":
    main()
