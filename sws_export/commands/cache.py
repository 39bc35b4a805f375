"""`sws-export cache list|clear`: the cache of results."""

import argparse
import time

from sws_export.commands.shared import add_output_options, print_json, print_line


def run(arguments: list[str]) -> int:
    """List the cached results on stdout, or remove them."""
    parser = argparse.ArgumentParser(
        prog="sws-export cache",
        description="List or remove the cached results of earlier runs.",
        epilog="Environment variables: SWS_EXPORT_CACHE_DIR is the directory of the cache; "
        "SWS_EXPORT_CACHE_SIZE its size limit, such as 50GB (default: 20GB), or 0 to disable it. The least "
        "recently used results are removed first.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, text in (
        ("list", "list the results, most recently used first"),
        ("clear", "remove all results"),
    ):
        add_output_options(verbs.add_parser(name, help=text))
    parsed = parser.parse_args(arguments)
    from sws_export.cache import open_cache

    cache = open_cache()
    if parsed.verb == "clear":
        count, size = cache.clear()
        if parsed.json:
            print_json({"removed": count, "bytes": size})
        elif not parsed.quiet:
            print_line(f"removed {count} results, {size / 1e6:.1f} MB")
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
        print_line(
            f"{entry.kind:<10} {entry.key[:12]} {entry.size / 1e6:>9.1f} MB  {used}  {entry.label}",
            error=False,
        )
    if not parsed.quiet:
        place = cache.root or "the cache, which is disabled (SWS_EXPORT_CACHE_SIZE is 0)"
        print_line(f"{total / 1e9:.2f} of {cache.limit / 1e9:.0f} GB in {place}")
    return 0
