"""What a benchmark writes into a page: the part between two marks of its own."""

from pathlib import Path


def replace_between(path: Path, name: str, text: str) -> None:
    """Exits with a message, and writes nothing, where the page has not both marks, each a line of its own."""
    begins, ends = f"<!-- {name} begins -->\n", f"<!-- {name} ends -->\n"
    before, begun, rest = path.read_text().partition(begins)
    _, ended, after = rest.partition(ends)
    if not (begun and ended):
        raise SystemExit(f"{path} has not the lines {begins.strip()} and {ends.strip()}: nothing was written")
    path.write_text("".join([before, begins, text, "\n", ends, after]))
