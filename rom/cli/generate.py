"""Continue a prompt with a model that `rom train` made; the text is printed as it comes."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rom.cli.options import natural_int, positive_float, positive_int, select_device
from rom.training.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the --out of `rom train`")
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="what to continue (default: a new line)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=400, metavar="N", help="bytes to add (default 400)"
    )
    parser.add_argument("--greedy", action="store_true", help="always the most likely byte, instead of drawing one")
    parser.add_argument("--temperature", type=positive_float, default=0.8, help="below 1 plays safe (default 0.8)")
    parser.add_argument(
        "--top-k", type=natural_int, default=0, metavar="K", help="draw among the K likeliest only (0: all)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that sum to P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop bytes below P × the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=positive_float, default=1.0, metavar="X", help="above 1 discourages repeats"
    )
    parser.add_argument(
        "--seed", type=natural_int, help="the same seed draws the same text (default: a new one each time)"
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Generates."""
    import torch  # noqa: PLC0415 - slow, and help must not wait for it

    from rom.training.data import VOCABULARY  # noqa: PLC0415

    if args.threads:
        torch.set_num_threads(args.threads)
    device = select_device(args.device)
    model = _load(args.model, device)
    if model.config.vocab_size != VOCABULARY:
        raise CheckpointError(
            f"{args.model} has a vocabulary of {model.config.vocab_size}; this command writes bytes ({VOCABULARY})."
        )
    prompt = os.fsencode(args.prompt)  # exactly the bytes of the command line, UTF-8 or not
    if not prompt:
        raise TrainingError("--prompt is empty: give at least one character to continue.")
    generator = torch.Generator(device)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    try:
        model.generate(
            torch.tensor([list(prompt)], device=device),
            max_new_tokens=args.max_new_tokens,
            do_sample=not args.greedy,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            streamer=ByteStreamer(),
            generator=generator,
        )
    except ValueError as error:  # a sampling option out of range
        raise TrainingError(str(error)) from error
    return 0


def _load(folder: Path, device: str):  # type: ignore[no-untyped-def]
    from rom.models import RoutingMambaLM  # noqa: PLC0415

    try:
        return RoutingMambaLM.from_pretrained(folder, device=device).eval()
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise CheckpointError(f"cannot load a model from {folder}: {error}") from error


class ByteStreamer:
    """Prints bytes as text, as soon as they make characters; bytes that never will are shown as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks

    def put(self, tokens: torch.Tensor) -> None:
        """Prints the bytes that came."""
        sys.stdout.write(self._decoder.decode(bytes(tokens.flatten().tolist())))
        sys.stdout.flush()

    def end(self) -> None:
        """Prints what is left, and ends the line."""
        print(self._decoder.decode(b"", final=True), flush=True)
