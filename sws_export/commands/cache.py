"""`sws-export cache list|clear`: results of earlier runs."""

import argparse
import sys
import time

from sws_export.commands.shared import add_output_options, print_json


def run(arguments: list[str]) -> int:
    """List the cache on stdout, or empty it."""
    parser = argparse.ArgumentParser(
        prog="sws-export cache",
        description="Results of earlier runs: list them, or remove them.",
        epilog="SWS_EXPORT_CACHE_DIR: where they lie; SWS_EXPORT_CACHE_SIZE: how much is kept, such as 50GB "
        "(default 20GB), 0 for none. What was used longest ago is removed first.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, text in (("list", "what is kept, last used first"), ("clear", "remove everything")):
        add_output_options(verbs.add_parser(name, help=text))
    parsed = parser.parse_args(arguments)
    from sws_export.cache import open_cache

    cache = open_cache()
    if parsed.verb == "clear":
        count, size = cache.clear()
        if parsed.json:
            print_json({"removed": count, "bytes": size})
        elif not parsed.quiet:
            print(f"removed {count} results, {size / 1e6:.1f} MB", file=sys.stderr)
        return 0
    entries = cache.entries()
    total = sum(entry.size for entry in entries)
    if parsed.json:
        listed = [
            {
                "kind": entry.kind,
                "key": entry.key,
                "label": entry.label,
                "bytes": entry.size,
                "last_used": entry.last_used,
            }
            for entry in entries
        ]
        print_json({"directory": cache.root, "limit": cache.limit, "bytes": total, "entries": listed})
        return 0
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        print(f"{entry.kind:<10} {entry.key[:12]} {entry.size / 1e6:>9.1f} MB  {used}  {entry.label}")
    if not parsed.quiet:
        place = cache.root or "no cache: SWS_EXPORT_CACHE_SIZE is 0"
        print(f"{total / 1e9:.2f} of {cache.limit / 1e9:.0f} GB in {place}", file=sys.stderr)
    return 0
