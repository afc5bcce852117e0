"""``python -m captum_fusion`` is the command ``captum-fusion``."""

import sys


def main() -> None:
    """Runs the command, or says which extra it needs."""
    try:
        from captum_fusion.cli import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in {"cyclopts", "matplotlib", "PIL", "rich"}:
            raise
        sys.exit(f"captum-fusion: the command needs the package {error.name}: pip install 'captum-fusion[cli]'")
    sys.exit(run())


if __name__ == "__main__":
    main()
