"""The commit of the code that trained a model."""

import subprocess
from pathlib import Path


def source_commit(file: str | Path = __file__) -> dict[str, str | bool | None]:
    """The `commit` of the running code, and whether files are `changed` since.

    The commit is None without git or if the code is not tracked by a repository, as in an installed wheel.

    Args:
        file: A file of the code.
    """
    file = Path(file).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(file.parent), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # git is not installed
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:
        return {"commit": None, "changed": False}
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
