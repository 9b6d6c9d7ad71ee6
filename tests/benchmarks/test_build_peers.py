"""How the peers' kernels are built from their source distributions, with a compiler that only pretends."""

import importlib
import os
import sys
import tarfile
from pathlib import Path

import pytest


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "benchmarks"))
    return importlib.import_module("build_peers")


@pytest.fixture
def sdists(tmp_path):
    """Source distributions of the shape of the real ones."""
    texts = {
        "mamba_ssm-2.0/csrc/selective_scan/selective_scan.cpp": "// binding",
        "mamba_ssm-2.0/mamba_ssm/ops/triton/selective_state_update.py": "",
        "mamba_ssm-2.0/mamba_ssm/ops/triton/softplus.py": "",
        "causal_conv1d-1.0/csrc/causal_conv1d.cpp": "// binding",
        **{f"causal_conv1d-1.0/causal_conv1d/{n}.py": ""
           for n in ("__init__", "causal_conv1d_interface", "cpp_functions")},
    }  # fmt: skip
    for way in ("fwd", "bwd", "update"):
        kernels = [f"template void causal_conv1d_{way}_cuda<{dtype}, float>(P &p);" for dtype in ("float", "at::Half")]
        texts[f"causal_conv1d-1.0/csrc/causal_conv1d_{way}.cu"] = "// kernels\n" + "\n".join(kernels)
    for name, text in texts.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for package in ("mamba_ssm-2.0", "causal_conv1d-1.0"):
        with tarfile.open(tmp_path / f"{package}.tar.gz", "w:gz") as file:
            file.add(tmp_path / "src" / package, package)
    return tmp_path


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A compiler that writes its arguments to the output and stumbles over `broken`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f"""#!{sys.executable}
import sys
source = [a for a in sys.argv if a.endswith((".cu", ".cpp"))]
if source and "broken" in open(source[0]).read():
    sys.exit("error: broken")
open(sys.argv[sys.argv.index("-o") + 1], "w").write(" ".join(sys.argv))
"""
    (folder / "nvcc").write_text(script)
    (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_peers_are_compiled_unit_by_unit(peers, sdists, nvcc, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--sdists", str(sdists), "--out", str(out), "--architecture", "90a", "--jobs", "2"]
    assert peers.main(arguments) == 0
    conv = (out / "build/causal_conv1d/bwd_fp16.cu").read_text()
    assert "// kernels" in conv and "<at::Half," in conv and "<float," not in conv
    assert "at::BFloat16, float>" in (out / "build/mamba_ssm/fwd_bf16.cu").read_text()
    assert "compute_90a,code=sm_90a" in (out / "build/mamba_ssm/fwd_bf16.cu.o").read_text()
    assert len(list(out.glob("*.so"))) == 2 and (out / "causal_conv1d/cpp_functions.py").exists()
    assert (out / "mamba_ssm/ops/triton/__init__.py").exists() and (out / "mamba_ssm/__init__.py").exists()
    capsys.readouterr()
    assert peers.main(arguments) == 0 and capsys.readouterr().out.count("already") == 2


def test_a_build_that_was_cut_short_goes_on(peers, nvcc, tmp_path, capsys):
    def run(**units):
        units = {f"{name}.cu": text for name, text in units.items()}
        peers.compile_units(peers.CONV, units, tmp_path, tmp_path, "90a", 1)
        return capsys.readouterr().out.splitlines()

    with pytest.raises(peers.BuildError):
        run(fwd="good", bwd="broken")
    capsys.readouterr()
    (line,) = run(fwd="good", bwd="mended")
    assert "bwd.cu compiled" in line and not run(fwd="good", bwd="mended")


def test_a_peer_that_cannot_be_built_is_named_and_the_other_one_is(peers, sdists, nvcc, tmp_path, capsys):
    out = tmp_path / "out"
    (sdists / "mamba_ssm-2.0.tar.gz").unlink()
    arguments = ["--sdists", str(sdists), "--out", str(out), "--architecture", "90a"]
    assert peers.main(arguments) == 1
    assert "mamba_ssm could not be built: no mamba_ssm-*.tar.gz" in capsys.readouterr().out
    assert [p.name.split(".")[0] for p in out.glob("*.so")] == ["causal_conv1d_cuda"]


def test_what_the_compiler_said_is_shown(peers, nvcc, tmp_path):
    units = {"fwd_fp32.cu": "broken"}
    with pytest.raises(peers.BuildError, match=r"fwd_fp32.cu did not compile(.|\n)*error: broken"):
        peers.compile_units(peers.CONV, units, tmp_path, tmp_path, "90a", 1)
