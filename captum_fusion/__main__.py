"""``python -m captum_fusion`` is the command ``captum-fusion``."""

import sys

from captum_fusion._app.messages import format_error, report_error


def main() -> None:
    """Runs the command, or reports the extra that it needs."""
    try:
        from captum_fusion.cli import run

        status = run()
    except KeyboardInterrupt:
        report_error("interrupted")
        status = 130
    except ModuleNotFoundError as error:
        report_error(format_error(error))
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
