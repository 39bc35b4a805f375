"""`sws-export plugins build|info`: the library of TensorRT plugins."""

import argparse
import dataclasses
from pathlib import Path

from sws_export.commands.shared import add_output_options, make_progress, print_facts, print_json


def run(arguments: list[str]) -> int:
    """Build the library, or describe it on stdout."""
    parser = argparse.ArgumentParser(
        prog="sws-export plugins", description="Build the library of TensorRT plugins, or say what it holds."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="compile libsws_plugins.so, once for each state of its sources")
    build.add_argument("--architectures", metavar="N[,N…]", help="such as 89,90; default: all supported")
    build.add_argument("--output", type=Path, metavar="DIR", help="default: the user's cache")
    build.add_argument("--force", action="store_true", help="compile even if nothing changed")
    info = verbs.add_parser("info", help="where the library is, what it holds, for which architectures")
    info.add_argument("library", type=Path, nargs="?", help="default: the one that would be used")
    for verb in (build, info):
        add_output_options(verb)
    parsed = parser.parse_args(arguments)
    from sws_export.engines import plugin_library as plugin_build

    progress, _ = make_progress(parsed)
    if parsed.verb == "build":
        chosen = parsed.architectures
        architectures = tuple(chosen.split(",")) if chosen else plugin_build.DEFAULT_ARCHITECTURES
        found = plugin_build.build_plugins(
            architectures=architectures, output=parsed.output, force=parsed.force, progress=progress
        )
    else:
        found = plugin_build.plugin_info(parsed.library)
    facts = dataclasses.asdict(found)
    if parsed.json:
        print_json(facts)
    elif not parsed.quiet:
        print_facts(facts)
    return 0
