"""Code written for other packages, on our operators: `mamba_ssm` and `causal_conv1d` by their own names.

import rom.compat
rom.compat.install()                    # where the real packages are absent
from mamba_ssm import Mamba             # is rom.compat.mamba_ssm.Mamba now
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

PACKAGES = ("mamba_ssm", "causal_conv1d")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import mamba_ssm.x.y` with `rom.compat.mamba_ssm.x.y`: one module object under two names."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        ours = importlib.util.find_spec(f"{__name__}.{name}")
        if ours is None:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=ours.submodule_search_locations is not None)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{__name__}.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran under its own name already; the import system has just overwritten its spec."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


_finder = _Finder()


def install(packages: Sequence[str] = PACKAGES) -> tuple[str, ...]:
    """Makes `import mamba_ssm` and `import causal_conv1d` find `rom.compat`'s, where the real ones are not installed.

    Args:
        packages: which of them.

    Returns:
        The packages that are ours now; one that is really installed is left alone and not among them. May be called
        again. `uninstall` undoes it.

    Raises:
        ValueError: a package that `rom.compat` does not have.

    >>> import rom.compat
    >>> rom.compat.install()
    ('mamba_ssm', 'causal_conv1d')
    >>> from causal_conv1d import causal_conv1d_fn
    >>> causal_conv1d_fn(torch.ones(1, 1, 3), torch.tensor([[10.0, 1.0]]))
    tensor([[[ 1., 11., 11.]]])
    >>> rom.compat.uninstall()
    """
    if unknown := sorted(set(packages) - set(PACKAGES)):
        raise ValueError(f"rom.compat.install: expected packages of {', '.join(PACKAGES)}, got {', '.join(unknown)}.")
    for package in packages:
        if package not in _finder.packages and importlib.util.find_spec(package) is None:
            _finder.packages.add(package)
    if _finder.packages and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)  # first: a package's path would give submodules a second time
    return tuple(package for package in PACKAGES if package in _finder.packages)


def uninstall() -> None:
    """Undoes `install`: later imports of these names fail again. What was imported stays usable."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in [name for name in sys.modules if name.partition(".")[0] in _finder.packages]:
        del sys.modules[name]
    _finder.packages.clear()
