"""``python -m captum_fusion`` is the command ``captum-fusion``."""

import sys

from captum_fusion._app.messages import complain, complaint


def main() -> None:
    """Runs the command, or says which extra it needs."""
    try:
        from captum_fusion.cli import run

        status = run()
    except KeyboardInterrupt:
        complain("interrupted")
        status = 130
    except ModuleNotFoundError as error:
        complain(complaint(error))
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
