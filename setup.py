"""Adds to what pyproject.toml says: the start-up hook, a .pth file beside the package in site-packages."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HOOK = "nnunet_lowmem_startup.pth"
# site executes lines that begin with "import"; this one ends at the variable unless it is set
LINE = 'import os; os.environ.get("nnUNet_predictor") and __import__("nnunet_lowmem.startup")\n'


class BuildWithHook(build_py):
    """Writes the hook where the package goes: into the build folder, or into an editable wheel beside its own .pth."""

    def run(self) -> None:
        """Build the modules, then write the hook."""
        super().run()
        hook = self._hook()
        hook.parent.mkdir(parents=True, exist_ok=True)
        hook.write_text(LINE)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """List what is built, the hook included."""
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(self._hook())]

    def _hook(self) -> Path:
        install = self.get_finalized_command("install")
        return Path(install.install_purelib if self.editable_mode else self.build_lib) / HOOK


setup(cmdclass={"build_py": BuildWithHook})
