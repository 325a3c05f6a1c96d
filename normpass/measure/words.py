"""Figures as people read them."""


def counted(count: int, noun: str, plural: str = "s") -> str:
    """`1 norm`, `2 norms`; `plural` is what is added to the noun."""
    return f"{count} {noun}" + ("" if count == 1 else plural)


def format_bytes(count: int) -> str:
    """`170813030` as `162.9 MiB`: binary units, one decimal from KiB up."""
    if abs(count) < 1024:
        return f"{count} B"
    size = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(size) < 1023.95:  # what would print as 1024.0 is 1.0 of the next unit
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
