"""Files of prompts, one on each line."""

from pathlib import Path

from sws_export.errors import OptionError


def read_prompts(file: Path) -> list[str]:
    """The prompts of a `--prompts` file, without empty lines.

    Raises:
        OptionError: The file cannot be read, or has none.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise OptionError(f"--prompts {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"--prompts {file}: expected text in UTF-8: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise OptionError(f"--prompts {file}: expected one prompt per line, found an empty file")
    return prompts
