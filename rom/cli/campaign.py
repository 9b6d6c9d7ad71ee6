"""Inject faults into a model and count what they do: run, resume, merge and report campaigns.

rom campaign run --example digits --out digits.sqlite
    trains a small net on the digits of scikit-learn (no download) and injects faults into every layer and bit
rom campaign run --model nets.py:resnet --data nets.py:images --faults 20000 --bits exponent --out resnet.sqlite
    your own model (a function without arguments that returns it) and evaluation set (one that returns inputs, labels)
rom campaign run … --resume            the same command goes on after Ctrl-C, kill -9 or a power cut
rom campaign run … --shard 0/4         a quarter of it; `rom campaign merge` puts four files together
rom campaign run … --ray auto --shards 16
rom campaign status digits.sqlite
rom campaign report digits.sqlite --html digits.html
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rom.cli.options import natural_int, positive_float, positive_int, select_device
from rom.training.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from rom.campaign import Stop, Summary
    from rom.faults import FaultPlan, Stratum, Survey

TARGETS = {"input": "A", "weight": "B", "bias": "BIAS", "output": "OUTPUT"}
TARGETS |= {"accumulator": "ACCUMULATOR", "before-cast": "BEFORE_CAST"}
EXAMPLE_FAULTS = 9600
INTERRUPTED = 130


# ---------------------------------------------------------------------------------------------------- arguments
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    shape = argparse.RawDescriptionHelpFormatter
    start = actions.add_parser("run", help="run or resume a campaign", description=__doc__, formatter_class=shape)
    _add_run(start)
    status = actions.add_parser("status", help="how far a campaign is, and its outcomes by layer")
    status.add_argument("store", type=Path, metavar="CAMPAIGN")
    report = actions.add_parser("report", help="write the report: one HTML file with plots and intervals")
    report.add_argument("store", type=Path, metavar="CAMPAIGN")
    report.add_argument("--html", type=Path, metavar="PATH", help="(default: CAMPAIGN with .html)")
    merge = actions.add_parser("merge", help="put the shards of a campaign together")
    merge.add_argument("stores", type=Path, nargs="+", metavar="SHARD")
    merge.add_argument("--out", type=Path, required=True, metavar="CAMPAIGN", help="made anew, or added to")
    export = actions.add_parser("export", help="write the results as .csv, or as .parquet with pyarrow")
    export.add_argument("store", type=Path, metavar="CAMPAIGN")
    export.add_argument("table", type=Path, metavar="TABLE")


def _add_run(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is tested")
    what.add_argument("--example", choices=("digits",), help="a model and data that need no download")
    what.add_argument("--model", metavar="MODULE:FUNCTION", help="returns the model; MODULE may be a file, nets.py")
    what.add_argument(
        "--data", metavar="MODULE:FUNCTION", help="returns (inputs, labels); or digits, those of scikit-learn"
    )

    faults = parser.add_argument_group("faults")
    faults.add_argument("--plan", type=Path, metavar="FILE", help="of `FaultPlan.save`, instead of all of these:")
    faults.add_argument("--faults", metavar="N", help=f"how many, or all (default {EXAMPLE_FAULTS} for the example)")
    faults.add_argument(
        "--by",
        choices=("all", "layer", "bit"),
        default="bit",
        help="equally many for every layer, target and bit (bit, default), for every layer and target (layer), or "
        "drawn from all alike, so that large layers get more (all)",
    )
    faults.add_argument(
        "--targets",
        default="output,weight",
        metavar="LIST",
        help=f"of {', '.join(TARGETS)} (default output,weight), where a layer has them",
    )
    faults.add_argument("--layers", metavar="LIST", help="names (default: all products and convolutions)")
    faults.add_argument(
        "--bits", default="all", metavar="WHICH", help="all (default), sign, exponent, mantissa, or 23-30,31"
    )
    faults.add_argument("--kind", choices=("flip", "stuck0", "stuck1"), default="flip", help="(default flip)")
    faults.add_argument("--seed", type=natural_int, default=0, help="of the sample (default 0)")
    faults.add_argument(
        "--clamp",
        choices=("max", "zero", "keep"),
        help="restrict the results of all products to the range seen without faults, as published injectors do; NaN "
        "becomes the largest value, 0, or stays (default: no restriction)",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, metavar="CAMPAIGN", help="the file everything is kept in")
    run.add_argument("--resume", action="store_true", help="go on with CAMPAIGN; --faults may have grown")
    run.add_argument("--shard", metavar="I/N", help="run only part I (from 0) of N")
    run.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: host:port, auto, or local to start one")
    run.add_argument("--shards", type=positive_int, default=2, metavar="N", help="workers on Ray (default 2)")
    run.add_argument(
        "--stop-at",
        type=positive_float,
        metavar="MARGIN",
        help="stop once the rate of silent corruptions is known to ± this (asked after 1024, 2048, 4096, … faults)",
    )
    run.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="(default 32)")
    run.add_argument("--block-size", type=positive_int, metavar="N", help="faults stored at a time (default: by model)")
    run.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's choice)")
    run.add_argument("--device", help="cpu, cuda, … (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Does what `args.action` says; the exit code."""
    from rom.campaign import CampaignError  # noqa: PLC0415 - slow, and help and wrong arguments need not wait

    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": _run,
        "status": _status,
        "report": _report,
        "merge": _merge,
        "export": _export,
    }
    try:
        return actions[args.action](args)
    except (CampaignError, ValueError) as error:
        raise TrainingError(str(error).removeprefix("rom.campaign.run: ")) from error


# ---------------------------------------------------------------------------------------------------- run
def _run(args: argparse.Namespace) -> int:
    if bool(args.example) == bool(args.model or args.data):
        raise TrainingError("give --example digits, or --model and --data of your own.")
    if args.model and not args.data:
        raise TrainingError("--model needs --data: a function that returns (inputs, labels), or digits.")
    if args.data and not args.model:
        raise TrainingError("--data needs --model: a function that returns a model.")
    if not (args.plan or args.faults or args.example):
        raise TrainingError("give --faults N (or all), or a --plan.")
    if not args.out.parent.is_dir():
        raise TrainingError(f"there is no folder {args.out.parent} for --out.")
    shard = _shard(args.shard) if args.shard else None

    import torch  # noqa: PLC0415

    from rom import campaign, faults  # noqa: PLC0415

    if args.threads:
        torch.set_num_threads(args.threads)
    model, inputs, labels = _subject(args)
    found = faults.survey(model, inputs[:2])
    plan = _plan(args, found, inputs, labels)
    stop = campaign.Stop(args.stop_at) if args.stop_at else None
    _describe(args, plan, inputs)
    summary = campaign.run(
        model if args.ray else found,
        plan,
        inputs,
        labels,
        store=args.out,
        resume=args.resume,
        shard=shard,
        ray=args.ray,
        shards=args.shards,
        stop=stop,
        block_size=args.block_size,
        batch_size=args.batch_size,
        bounds=found.profile(inputs.split(args.batch_size)) if args.clamp else None,
        nan_to=args.clamp or "max",
        device=select_device(args.device) if args.device else None,
    )
    return _conclude(args, summary, stop)


def _describe(args: argparse.Namespace, plan: FaultPlan, inputs: torch.Tensor) -> None:
    layers = len({stratum.layer for stratum in plan.strata})
    population = sum(float(stratum.size) for stratum in plan.strata)
    sample = f"{len(plan):,} faults ({plan.scheme}) of {population:.3g} in {layers} layers"
    print(f"{sample}, {len(inputs):,} inputs → {args.out}", flush=True)


def _conclude(args: argparse.Namespace, summary: Summary, stop: Stop | None) -> int:
    if summary.state == "interrupted":
        print(
            f"interrupted: {summary.done:,} of {summary.faults:,} faults are stored; "
            "the same command with --resume goes on."
        )
        return INTERRUPTED
    if args.shard:
        print(f"shard {args.shard} is complete: {summary.done:,} faults. Put all together with `rom campaign merge`.")
        return 0
    if summary.state == "stopped" and stop is not None:
        print(f"stopped after {summary.done:,} of {summary.faults:,} faults: known to ± {stop.margin:g}.")
    _print_status(args.out)
    print(f"\nnext: rom campaign report {args.out}")
    return 0


def _shard(text: str) -> tuple[int, int]:
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
        raise TrainingError(f"--shard is I/N with I from 0 to N - 1, such as 0/4, got {text!r}.")
    return int(index), int(of)


def _subject(args: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The model in evaluation mode, and the evaluation set."""
    import torch  # noqa: PLC0415

    if (args.example or args.data == "digits") and not importlib.util.find_spec("sklearn"):
        raise TrainingError("scikit-learn, which has the digits, is not installed. Run `pip install scikit-learn`.")
    from rom.campaign import digits  # noqa: PLC0415

    model = digits.trained(args.out.parent) if args.example else _call(args.model, "--model")
    data = digits.evaluation_set() if args.example or args.data == "digits" else _call(args.data, "--data")
    if not isinstance(model, torch.nn.Module):
        raise TrainingError(f"--model {args.model}: expected a torch.nn.Module, got {type(model).__name__}.")
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, torch.Tensor) for part in data)
    if not pair:
        raise TrainingError(f"--data {args.data}: expected two tensors, inputs and labels, got {type(data).__name__}.")
    return model.eval(), data[0], data[1]


def _call(name: str, option: str) -> Any:
    """What MODULE:FUNCTION returns; the module is looked for in this folder first."""
    module, _, function = name.partition(":")
    if not (module and function.isidentifier()):
        raise TrainingError(f"{option}: expected MODULE:FUNCTION, such as nets.py:resnet, got {name!r}.")
    path = Path(module)
    if path.suffix == ".py":
        if not path.is_file():
            raise TrainingError(f"{option}: there is no file {module}.")
        folder, module = str(path.parent.resolve()), path.stem
    else:
        folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise TrainingError(f"{option}: {module} cannot be imported ({error}).") from error
    if not callable(getattr(found, function, None)):
        offered = ", ".join(sorted(n for n, v in vars(found).items() if callable(v) and not n.startswith("_")))
        raise TrainingError(f"{option}: {module} has no function {function!r}; it has {offered or 'none'}.")
    if importlib.util.find_spec("ray"):  # its workers do not see this folder: what they get is the code itself
        from ray import cloudpickle  # noqa: PLC0415

        cloudpickle.register_pickle_by_value(found)
    return getattr(found, function)()


# ---------------------------------------------------------------------------------------------------- faults
def _plan(args: argparse.Namespace, found: Survey, inputs: torch.Tensor, labels: torch.Tensor) -> FaultPlan:
    from rom import campaign, faults  # noqa: PLC0415

    if args.plan:
        return faults.FaultPlan.load(args.plan)
    strata = _strata(args, found, len(inputs))
    if args.by == "bit":
        strata = [one for stratum in strata for one in stratum.by_bit()]
    prints = {"model": faults.model_fingerprint(found.graph), "data": campaign.data_fingerprint(inputs, labels)}
    text = args.faults or str(EXAMPLE_FAULTS)
    if text == "all":
        return faults.FaultPlan.exhaustive(strata, **prints)
    if not text.isdecimal() or int(text) < 1:
        raise TrainingError(f"--faults: expected a number of at least 1, or all, got {text!r}.")
    if args.by == "all":
        return faults.FaultPlan.simple(strata, int(text), args.seed, **prints)
    if int(text) < len(strata):
        raise TrainingError(
            f"--faults {text} is less than one for each of the {len(strata)} strata. Give more, fewer --layers, "
            "--targets or --bits, or --by layer or all."
        )
    equal = int(text) // len(strata)
    return faults.FaultPlan.stratified(strata, [min(equal, s.size) for s in strata], args.seed, **prints)


def _strata(args: argparse.Namespace, found: Survey, samples: int) -> list[Stratum]:
    from rom.faults import Target, bits_of  # noqa: PLC0415
    from rom.faults.records import DTYPES  # noqa: PLC0415

    names = args.targets.lower().split(",")
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise TrainingError(f"--targets: expected some of {', '.join(TARGETS)}, got {unknown[0]!r}.")
    strata = found.strata(
        samples,
        [Target[TARGETS[name]] for name in names],
        args.layers.split(",") if args.layers else None,
        kind=args.kind,
    )
    return [replace(s, bits=bits_of(DTYPES[s.dtype], _bits(args.bits))) for s in strata]


def _bits(text: str) -> str | list[int]:
    """ "exponent", or the positions of "23-30,31"."""
    if text.isalpha():
        return text
    positions: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise TrainingError(
                f"--bits: expected all, sign, exponent, mantissa, or positions as 23-30,31, got {text!r}."
            )
        positions += range(int(first), int(last or first) + 1)
    return positions


# ---------------------------------------------------------------------------------------------------- other actions
def _status(args: argparse.Namespace) -> int:
    _print_status(args.store)
    return 0


def _print_status(path: Path) -> None:
    import numpy as np  # noqa: PLC0415

    from rom.campaign import OUTCOMES, Store  # noqa: PLC0415

    with Store(path) as store:
        results, seconds, stopped = store.results(), store.seconds(), store.get("stopped")
    table, golden = results.table, results.golden
    done = f"{len(table):,} of {len(results.plan):,} faults ({len(table) / max(len(results.plan), 1):.0%})"
    print(f"{path}: {done}, {seconds:,.0f} s of work")
    if stopped:
        rate, low, high = stopped["rate"]
        print(f"stopped at {stopped['faults']:,}: silent corruptions {rate:.4g} [{low:.4g}, {high:.4g}]")
    print(f"without faults: accuracy {golden['accuracy']:.4f}, loss {golden['loss']:.4f}, {golden['samples']:,} inputs")
    words = {target: word for word, target in TARGETS.items()}
    groups: dict[tuple[str, str], list[int]] = {}
    for number, stratum in enumerate(results.plan.strata):
        groups.setdefault((stratum.layer, words[stratum.target.name]), []).append(number)
    width = max(len(layer) for layer, _ in groups)
    print(f"\n{'layer':{width}}  {'target':11}  {'faults':>9}" + "".join(f"  {name:>9}" for name in OUTCOMES))
    for (layer, target), numbers in groups.items():
        rows = table[np.isin(table["stratum"], numbers)]
        cells = max(int(rows["cells"].sum()), 1)
        shares = "".join(f"  {rows[name].sum() / cells:9.2%}" for name in OUTCOMES)
        print(f"{layer:{width}}  {target:11}  {len(rows):9,}{shares}")
    print("(shares of the inputs met; the report has intervals)")


def _report(args: argparse.Namespace) -> int:
    from rom.campaign import report  # noqa: PLC0415

    html = args.html or args.store.with_suffix(".html")
    report.write(args.store, html)
    print(f"wrote {html}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from rom import campaign  # noqa: PLC0415

    added = campaign.merge(args.stores, args.out)
    print(f"{added:,} faults added")
    _print_status(args.out)
    return 0


def _export(args: argparse.Namespace) -> int:
    from rom import campaign  # noqa: PLC0415

    results = campaign.read(args.store)
    results.export(args.table)
    print(f"wrote {len(results.table):,} rows to {args.table}")
    return 0
