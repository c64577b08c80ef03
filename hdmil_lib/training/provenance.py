"""Which code trained a model."""

import subprocess
from pathlib import Path


def source_commit(file: str | Path = __file__) -> dict[str, str | bool | None]:
    """Commit of the code that runs, if it runs from a checkout, and whether files differ from it.

    Without git, in a wheel, or inside another project's repository, the commit is None.

    Args:
        file: A file of the code; the commit is that of the repository that tracks it.
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
