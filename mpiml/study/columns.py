"""Tables and quantities as a person reads them."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of aligned columns, each to its side: "l" or "r"."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_pad(*cell) for cell in zip(row, widths, sides, strict=True)).rstrip() for row in rows]


def _pad(text: str, width: int, side: str) -> str:
    return text.ljust(width) if side == "l" else text.rjust(width)


def size(amount: float) -> str:
    """Bytes: "1.5 MiB"."""
    return _scaled(amount, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count(amount: float) -> str:
    """How many: "1.5 M"."""
    return _scaled(amount, 1000, ("", "k", "M", "G", "T", "P"))


def _scaled(amount: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while amount >= 1000 and power < len(units) - 1:
        amount, power = amount / step, power + 1
    return f"{amount:,.{0 if power == 0 or amount >= 100 else 1}f} {units[power]}".rstrip()
