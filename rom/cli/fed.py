"""Federated learning across different architectures: FedFD beside the methods it is compared with.

Every client has a model of one of the --groups and digits of a few classes only (Dirichlet, --alpha). After each round
the groups are averaged, and the server distils all averages into the global model, the first group's, on unlabelled
data. In DIR it leaves rounds.csv, table.md (accuracy after the last round, 95 % intervals over seeds), accuracy.png,
and a checkpoint per method and seed, for --resume.

The data are the 8 x 8 digits that ship with scikit-learn: nothing is downloaded. For other data see
`rom.models.fedfd.Images.from_dataset`.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from rom.cli.options import positive_float, positive_int
from rom.training.errors import TrainingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument(
        "--methods",
        default="fedavg,feddf,features,linear,fedfd,fedfd-householder",
        help="comma-separated (default: all)",
    )
    parser.add_argument("--seeds", type=positive_int, default=3, metavar="N", help="repetitions (default 3)")
    parser.add_argument("--rounds", type=positive_int, default=20, metavar="N", help="of each run (default 20)")
    parser.add_argument("--clients", type=positive_int, default=12, metavar="N", help="in all (default 12)")
    parser.add_argument(
        "--groups",
        default="cnn,deep-cnn,transformer",
        help="architectures, the global model's first: cnn, deep-cnn, transformer, mlp, or cnn@0.5 for half the width",
    )
    parser.add_argument("--alpha", type=positive_float, default=0.3, help="of the Dirichlet partition (default 0.3)")
    parser.add_argument("--local-epochs", type=positive_int, default=4, metavar="N", help="per round (default 4)")
    parser.add_argument(
        "--engine",
        choices=("in-process", "flower"),
        default="in-process",
        help="who runs the clients: this process, or Flower's simulation on Ray; same figures (default in-process)",
    )
    parser.add_argument("--resume", action="store_true", help="go on in DIR (same arguments)")
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default 1)")


def run(args: argparse.Namespace) -> int:
    """Runs the study; 0."""
    needed = ["sklearn", "scipy", "safetensors", "matplotlib"] + ["flwr", "ray"] * (args.engine == "flower")
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        python = " with Python 3.11 or newer" if "flwr" in missing else ""
        raise TrainingError(f"{', '.join(missing)} not installed. Run `pip install 'rom-kernels[fed]'`{python}.")

    import torch  # noqa: PLC0415 - slow, and help and wrong arguments need not wait

    from rom.models import fedfd  # noqa: PLC0415
    from rom.models.fedfd import study  # noqa: PLC0415

    torch.set_num_threads(args.threads)
    try:
        settings = fedfd.Settings(
            groups=tuple(fedfd.Group.parse(name) for name in args.groups.split(",")),
            clients=args.clients,
            alpha=args.alpha,
            rounds=args.rounds,
            local_epochs=args.local_epochs,
        )
        args.out.mkdir(parents=True, exist_ok=True)
        methods = args.methods.split(",")
        engine: study.Engine = fedfd.Federation.run
        if args.engine == "flower":
            from rom.models.fedfd import flower  # noqa: PLC0415

            engine = flower.simulate
        rows = study.run(fedfd.digits(), settings, methods, range(args.seeds), args.out, args.resume, engine)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    text = study.table(rows)
    (args.out / study.TABLE).write_text(text)
    study.plot(rows, args.out / study.PLOT)
    print(text)
    return 0
