"""``python -m captum_fusion`` is the command ``captum-fusion``."""

import sys

_EXTRA = {"cyclopts", "matplotlib", "pandas", "PIL", "rich", "scipy"}


def main() -> None:
    """Runs the command, or says which extra it needs."""
    try:
        from captum_fusion.cli import run

        status = run()
    except KeyboardInterrupt:
        sys.stderr.write("captum-fusion: interrupted\n")
        status = 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f"captum-fusion: the command needs the package {error.name}: pip install 'captum-fusion[cli]'")
    sys.exit(status)


if __name__ == "__main__":
    main()
