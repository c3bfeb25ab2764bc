"""``python -m rg_engine``: demo, train, train-oft, evaluate, benchmark, convert, packs, languages, train-demo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .errors import ReadoutGuidanceError

#: What can be counted: UNets, and transformers at their real sizes.
COUNTED = ["demo", "small", "sd15", "sdxl", "sd3-m", "flux-dev", "flux.2-klein", "z-image", "qwen-image", "wan2.2-5b"]


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rg_engine", description="Readout guidance outside of ComfyUI's page.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="run the example workflows on the demo model; writes demo.png and report.json")
    demo.add_argument("--out", type=Path, default=Path("demo_out"))
    demo.add_argument("--pictures", type=int, default=8, help="pictures for each head")
    demo.add_argument("--modes", nargs="+", default=["fast"], choices=["fast", "reference"])
    edits = [
        "apply", "boundary", "drag", "drag_object", "drag_photo", "identity", "oft", "optimize_look", "optimize_noise",
        "optimize_text", "train_head",
    ]  # fmt: skip
    demo.add_argument("--edits", nargs="*", default=["drag"], choices=edits, help="further workflows to make a picture of")
    demo.add_argument("--strength", type=float, default=None, help="instead of the workflows' own")
    demo.add_argument("--device", default="auto", choices=["auto", "cpu"])

    train = commands.add_parser("train", help="train a head from folders; also under torchrun, on several processes")
    train.add_argument("--config", type=Path, required=True, help="YAML or JSON; its settings are in docs/training.md")

    oft = commands.add_parser("train-oft", help="train an orthogonal adapter from folders; also under torchrun")
    oft.add_argument("--config", type=Path, required=True, help="YAML or JSON; its settings are in docs/oft.md")

    evaluate = commands.add_parser("evaluate", help="measure heads on the demo world; writes evaluation.json and tables")
    tables = (
        "heads timesteps pairs conventions kept_features drags identity blocks clip doodl doodl_cost boundaries oft "
        "oft_cost controlnet"
    )
    evaluate.add_argument("tables", nargs="*", default=[], help=f"{tables}; all of them unless told")
    evaluate.add_argument("--out", type=Path, default=Path("demo_out"))
    evaluate.add_argument("--pictures", type=int, default=32, help="guided pictures for each figure")
    evaluate.add_argument("--network", default="UNet", choices=["UNet", "transformer"], help="of the demo model")
    evaluate.add_argument("--device", default="auto", choices=["auto", "cpu"])
    evaluate.add_argument(
        "--work", type=Path, default=None, help="controlnet: for pairs and trainings; in --out if not told"
    )
    evaluate.add_argument("--controls", nargs="+", default=None, help="controlnet: pose, depth, edges; all of them")
    evaluate.add_argument("--pairs", nargs="+", type=int, default=None, help="controlnet: trained on; 100, 1000, 20000")
    evaluate.add_argument("--steps", type=int, default=None, help="controlnet: of the ControlNets' training; 500")

    benchmark = commands.add_parser("benchmark", help="what guidance costs, in time and memory; writes benchmark.json")
    benchmark.add_argument("--out", type=Path, default=Path("demo_out"))
    benchmark.add_argument("--shape", nargs="*", default=["demo", "small"], choices=["demo", "small", "sd15", "sdxl"])
    benchmark.add_argument("--turns", type=int, default=5, help="runs of each way, turn by turn")
    benchmark.add_argument("--ways", nargs="+", default=None, help="only these; plain is needed")
    benchmark.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    benchmark.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    benchmark.add_argument("--pictures", nargs="+", type=int, default=[], metavar="STEPS", help="whole pictures as well")
    benchmark.add_argument("--count", nargs="+", default=[], metavar="SHAPE", choices=COUNTED,
                           help="operations and bytes of these shapes, counted without computing")  # fmt: skip
    benchmark.add_argument("--launches", action="store_true", help="kernels and host time of a tiny network's steps")
    benchmark.add_argument("--runs", type=int, default=0, help="so many guided runs, for their memory")
    benchmark.add_argument("--frontier", type=int, default=0, metavar="PICTURES", help="control against cost, demo model")
    benchmark.add_argument("--tries", type=int, default=0, metavar="PICTURES",
                           help="what was tried for more control of each backward pass, demo model")  # fmt: skip

    convert = commands.add_parser("convert", help="authors' .pt to .safetensors, or back")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("--kind", default=None, help="what the head reads, where the file does not say")

    make = commands.add_parser("train-demo", help="make the demo model's files")
    make.add_argument(
        "parts", nargs="*", default=[], help="pictures autoencoder latents denoiser transformer estimator clip heads; all"
    )
    make.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    make.add_argument("--device", default="cpu")
    make.add_argument("--shards", type=int, default=60, help="of 2000 pictures")
    make.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    make.add_argument("--network", default="UNet", choices=["UNet", "transformer"], help="that heads are trained on")
    make.add_argument("--compile", action="store_true", help="the transformer, by torch.compile: twice as fast on a CPU")
    make.add_argument("--heads", nargs="+", default=None, help="of the part heads, only these")
    sizes = (("autoencoder", 3400, 16), ("denoiser", 8000, 1024), ("transformer", 3800, 128), ("estimator", 6000, 64),
             ("clip", 900, 96))  # fmt: skip
    for part, steps, batch in sizes:
        make.add_argument(f"--{part}-steps", type=int, default=steps)
        make.add_argument(f"--{part}-batch", type=int, default=batch)

    packs = commands.add_parser("packs", help="try guidance beside other packs' nodes; writes docs/packs.md and packs.json")
    packs.add_argument("--packs", type=Path, default=None, help="the folder they are in; READOUT_GUIDANCE_PACKS unless told")
    packs.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these; ComfyUI is its own nodes")
    packs.add_argument("--out", type=Path, default=Path("docs/packs.md"))
    packs.add_argument("--pictures", type=int, default=4, help="pictures for each figure")
    packs.add_argument("--device", default="cpu", choices=["auto", "cpu"])

    commands.add_parser("languages", help="make locales/<language>/ of locales/<language>.json").set_defaults(device="cpu")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    try:
        if options.command == "convert":
            from .convert import convert_head

            convert_head(options.source, options.target, options.kind)
            return 0
        from .comfy_host.bootstrap import use_comfyui

        if options.command == "train":
            from .training.config import read_config

            config = read_config(options.config)
            use_comfyui(config.device)
            from .comfy_host.training.files import train_from_files

            train_from_files(config)
            return 0
        if options.command == "train-oft":
            from .adapters.learning.config import read_oft_config

            oft_config = read_oft_config(options.config)
            use_comfyui(oft_config.device)
            from .comfy_host.adapters.training.files import train_oft_from_files

            train_oft_from_files(oft_config)
            return 0
        if options.command == "train-demo":
            from .lab.demo_parts import PARTS, make_pictures

            parts = options.parts or list(PARTS)
            if "pictures" in parts:  # before ComfyUI is there: its processes need nothing of it
                make_pictures(options.work / "data", options.shards, workers=options.workers)
        use_comfyui(options.device)
        if options.command == "benchmark":
            from .lab.cost.benchmark import run_benchmark

            run_benchmark(
                options.out, options.shape, options.turns, options.dtype, options.ways,
                pictures=options.pictures, frontier=options.frontier, runs=options.runs, counted=options.count,
                launches=options.launches, tries=options.tries,
            )  # fmt: skip
            return 0
        if options.command == "evaluate":
            from .lab.evaluate import run_evaluation

            told = {"work": options.work, "controls": options.controls, "pairs": options.pairs, "steps": options.steps}
            control = {name: value for name, value in told.items() if value is not None}
            run_evaluation(options.out, options.pictures, options.tables, options.network, control)
            return 0
        if options.command == "packs":
            from .lab.packs.run import run_packs

            run_packs(options.packs, options.out, options.only, options.pictures)
            return 0
        if options.command == "languages":
            from .lab.languages import write_languages

            write_languages()
            return 0
        if options.command == "demo":
            from .lab.demo_run import run_demo

            run_demo(options.out, options.pictures, options.modes, options.strength, options.edits)
        else:
            from .lab.demo_training import train_demo

            train_demo(parts, options.work, options)
    except ReadoutGuidanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
