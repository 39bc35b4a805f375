"""`sws-export plugins build|info`: the TensorRT plugin library."""

import argparse
import dataclasses
from pathlib import Path

from sws_export.commands.shared import add_output_options, make_progress, print_json, print_values


def run(arguments: list[str]) -> int:
    """Build the library, or print its build information on stdout."""
    parser = argparse.ArgumentParser(
        prog="sws-export plugins", description="Build or describe the TensorRT plugin library."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="compile libsws_plugins.so, unless it is up to date")
    build.add_argument("--architectures", metavar="N[,N…]", help="such as 89,90; default: all supported")
    build.add_argument("--output", type=Path, metavar="DIR", help="default: the cache of the user")
    build.add_argument("--force", action="store_true", help="compile even if the library is up to date")
    info = verbs.add_parser("info", help="show path, operators and architectures of the library")
    info.add_argument("library", type=Path, nargs="?", help="default: the library that exports use")
    for verb in (build, info):
        add_output_options(verb)
    parsed = parser.parse_args(arguments)
    from sws_export.engines import plugin_library

    progress, _ = make_progress(parsed)
    if parsed.verb == "build":
        chosen = parsed.architectures
        architectures = tuple(chosen.split(",")) if chosen else plugin_library.DEFAULT_ARCHITECTURES
        found = plugin_library.build_plugins(
            architectures=architectures, output=parsed.output, force=parsed.force, progress=progress
        )
    else:
        found = plugin_library.plugin_info(parsed.library)
    values = dataclasses.asdict(found)
    if parsed.json:
        print_json(values)
    elif not parsed.quiet:
        print_values(values)
    return 0
