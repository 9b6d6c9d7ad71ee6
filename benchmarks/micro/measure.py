"""Builds and runs micro.cu: issue rates of the scan's instructions, exponentials by two pipes, memory bandwidth.

python benchmarks/micro/measure.py [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("micro.cu")
WARPS = (1, 2, 4)


def build(program: Path, architecture: str = "native") -> None:
    """Compiles SOURCE for the visible GPU."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc is not on PATH; put CUDA's bin folder there")
    subprocess.run([nvcc, "-std=c++17", "-O3", f"-arch={architecture}", str(SOURCE), "-o", str(program)], check=True)


def measurements(program: Path) -> Iterator[dict[str, Any]]:
    """What the program prints, line by line as it comes."""
    with subprocess.Popen([str(program)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        sys.exit(f"{program} ended with code {process.returncode}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: rates by warps per scheduler in one line, everything else below."""
    lines = ["| measure | 1 warp per scheduler | 2 | 4 | unit |", "|---|---|---|---|---|"]
    names = list(dict.fromkeys(row["measure"] for row in rows if "warps_per_scheduler" in row))
    for name in names:
        found = {row["warps_per_scheduler"]: row for row in rows if row["measure"] == name}
        cells = [f"{found[n]['value']:.2f}" if n in found else "" for n in WARPS]
        lines.append(f"| {' | '.join([name, *cells, next(iter(found.values()))['unit']])} |")
    lines += ["", "| measure | value | unit |", "|---|---|---|"]
    lines += [f"| {r['measure']} | {r['value']} | {r['unit']} |" for r in rows if "warps_per_scheduler" not in r]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append every measurement as soon as it is made")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "micro")
        build(program)
        for row in measurements(program):
            rows.append(row)
            print(row, flush=True)
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(row) + "\n")
    text = f"## What one scheduler and the memory of this GPU do\n\n{table(rows)}"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return rows


if __name__ == "__main__":
    main()
