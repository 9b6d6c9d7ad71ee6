"""What the compiler made of a kernel: resources and machine instructions (SASS) of a cubin, counted per loop.

    python tests/gates/sass.py kernel.cubin [--kernel REGEX] [--opcodes N]

cuobjdump comes from $CUOBJDUMP, PATH or the triton wheel. A loop is the code between the target of a backward branch
and the branch; loops inside it are counted separately, not in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """Per thread: registers and bytes of stack. Per block: bytes of static shared memory."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Loop:
    """Addresses of a loop, its depth (0 outermost), and its own instructions by opcode."""

    begin: int
    end: int
    depth: int
    opcodes: Counter[str]

    @property
    def size(self) -> int:
        """Instructions in one turn, those of inner loops left out."""
        return self.opcodes.total()

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts with one of the prefixes: count("FFMA", "FMUL")."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefixes))


# address, predicate, opcode, operands; padding (NOP) is no instruction
_INSTRUCTION = r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(?!NOP)([A-Z][A-Z0-9_.]*)(.*?);"


def find_cuobjdump() -> str | None:
    """cuobjdump's path, or None; importing triton is not needed to find the one in its wheel."""
    if found := os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(bundled) if bundled and bundled.exists() else None


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise FileNotFoundError("no cuobjdump: put CUDA's bin folder on PATH, set CUOBJDUMP, or install triton")
    return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout


def resources(cubin: Path) -> dict[str, Resources]:
    """Mangled kernel name → resources."""
    text = _cuobjdump("-res-usage", cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: Resources(*(int(value) for value in values)) for name, *values in found}


def instructions(cubin: Path) -> dict[str, list[tuple[int, str, str]]]:
    """Mangled kernel name → (address, opcode, predicate and operands) in order."""
    code: dict[str, list[tuple[int, str, str]]] = {}
    for line in _cuobjdump("-sass", cubin).splitlines():
        if name := re.search(r"Function : (\S+)", line):
            current = code.setdefault(name[1], [])
        elif found := re.match(_INSTRUCTION, line):
            current.append((int(found[1], 16), found[3], (found[2] or "") + found[4]))
    return code


def loops(code: list[tuple[int, str, str]]) -> list[Loop]:
    """The loops of a kernel in order of address. A branch to itself (the trap after the end) is none."""
    ends: dict[int, int] = {}
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            begin = int(target[1], 16)
            ends[begin] = max(address, ends.get(begin, 0))
    spans = sorted(ends.items())
    found = []
    for begin, end in spans:
        inner = [(b, e) for b, e in spans if (b, e) != (begin, end) and begin <= b and e <= end]
        depth = sum((b, e) != (begin, end) and b <= begin and end <= e for b, e in spans)
        own = (op for a, op, _ in code if begin <= a <= end and not any(b <= a <= e for b, e in inner))
        found.append(Loop(begin, end, depth, Counter(own)))
    return found


def busiest_path(code: list[tuple[int, str, str]], loop: Loop, *prefixes: str) -> Counter[str]:
    """Opcodes of one turn of a loop on its way through most instructions that start with one of the prefixes.

    Of equally busy ways it is the shortest. As in `Loop`, inner loops are left out.
    """
    body = [line for line in code if loop.begin <= line[0] <= loop.end]
    place = {address: i for i, (address, _, _) in enumerate(body)}
    inner = [(o.begin, o.end) for o in loops(body) if o.begin > loop.begin]
    ways: list[tuple[int, int, int] | None] = [None] * len(body) + [(0, 0, 0)]  # busy, -length, next
    for i in reversed(range(len(body))):
        address, opcode, operands = body[i]
        successors = {i + 1}
        if opcode.startswith("BRA"):
            target = int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)  # type: ignore[index]
            conditional = re.match(r"\s*(@|!?U?P)", operands) or loop.begin < target <= address
            successors = {i + 1} if conditional else set()
            if target == loop.begin:
                successors.add(len(body))
            elif target > address and target <= loop.end:
                successors.add(next(place[a] for a in range(target, loop.end + 16, 16) if a in place))
        elif opcode == "EXIT" and not operands.startswith("@"):
            successors = set()
        own = not any(begin <= address <= end for begin, end in inner)
        found = [(way[0], way[1], j) for j in successors if (way := ways[j])]
        if found:
            busy, length, after = max(found)
            ways[i] = busy + (own and opcode.startswith(prefixes)), length - own, after
    opcodes: Counter[str] = Counter()
    i = 0
    while i < len(body):
        address, opcode, _ = body[i]
        opcodes[opcode] += not any(begin <= address <= end for begin, end in inner)
        i = ways[i][2]  # type: ignore[index]
    return opcodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cubin", type=Path)
    parser.add_argument("--kernel", default="", help="only kernels whose mangled name matches this expression")
    parser.add_argument("--opcodes", type=int, default=12, help="how many opcodes to show per loop")
    options = parser.parse_args()
    used = resources(options.cubin)
    for name, code in instructions(options.cubin).items():
        if not re.search(options.kernel, name):
            continue
        print(name, used.get(name, ""), f"{len(code)} instructions")
        for loop in loops(code):
            shown = " ".join(f"{op}:{n}" for op, n in loop.opcodes.most_common(options.opcodes))
            print(f"  {'  ' * loop.depth}{loop.begin:#06x} {loop.size:4d}  {shown}")


if __name__ == "__main__":
    main()
