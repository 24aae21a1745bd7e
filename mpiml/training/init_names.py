"""--init-names: a TOML file that says which array of a file each array of the model takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mpiml import documents
from mpiml.documents import shown
from mpiml.errors import ConfigError, OutputError, first_few
from mpiml.nn.patterns import texts

FLAG = "--init-names"
ENTRY = {"name": str, "transpose": bool}  # what a value has that is not the name alone


class Entry(NamedTuple):
    """A line of the map: a model's name or pattern, that in the file, and whether a matrix there is transposed."""

    key: str
    name: str
    transpose: bool

    @property
    def exact(self) -> bool:
        return "*" not in self.key

    def filled(self, stars: Sequence[str]) -> str:
        """The name in the file, with these texts in place of its *."""
        first, *rest = self.name.split("*")
        return first + "".join(text + part for text, part in zip(stars, rest, strict=False))


class Mapped(NamedTuple):
    """What an array of the model takes: an array of the file, by which entry of the map."""

    name: str
    entry: Entry


@dataclass(frozen=True)
class NameMap:
    """The entries of a map, and the path of its file. Raises ConfigError, which begins with the file and the key."""

    path: str
    entries: list[Entry]

    @classmethod
    def read(cls, path: str) -> NameMap:
        """The map in a TOML file."""
        try:
            table = documents.from_toml(documents.read(Path(path)), path)
        except OutputError as error:
            raise ConfigError(f'{FLAG} {error}; a line is "layers.0.weight" = "its.name.in.the.file"') from None
        entries = [_entry(key, value, path) for key, value in _flat(table)]
        for key in {entry.key for entry in entries}:
            if sum(entry.key == key for entry in entries) > 1:
                raise ConfigError(f"{FLAG} {path}: {key} is there twice")
        return cls(path, entries)

    def error(self, entry: Entry, problem: str) -> ConfigError:
        """What is wrong with an entry."""
        return ConfigError(f'{FLAG} {self.path}: "{entry.key}" = "{entry.name}": {problem}')

    def of(self, names: Mapping[str, Sequence[str]], file: Mapping[str, str]) -> dict[str, Mapped]:
        """What arrays of the model take, by their names; those without an entry are left out.

        Args:
            names: what each array of the model may be called in the map. If a pattern is of several of these, or of a
                whole name and of what follows the layer in it, that is taken which the file has.
            file: the names that it may be asked for, and which of its arrays each means.
        """
        mapped: dict[str, Mapped] = {}
        used = set[Entry]()
        for name, aliases in names.items():
            found = {entry: [stars for one in aliases for stars in texts(entry.key, one)] for entry in self.entries}
            fitting = [entry for entry, stars in found.items() if stars]
            used.update(fitting)
            best = [entry for entry in fitting if entry.exact] or fitting
            if len(best) > 1:
                raise self.error(best[0], f'and "{best[1].key}" are both of {name}; let one of them name it alone')
            for entry in best:
                filled = [entry.filled(stars) for stars in found[entry]]
                mapped[name] = Mapped(next((file[source] for source in filled if source in file), filled[0]), entry)
        for entry in self.entries:
            if entry not in used:
                raise self.error(entry, f"the model has no such array; it has {first_few(names, like=entry.key)}")
        self._check_once(mapped)
        return mapped

    def _check_once(self, mapped: Mapping[str, Mapped]) -> None:
        takers: dict[str, str] = {}
        for name, (source, entry) in mapped.items():
            if takers.setdefault(source, name) != name:
                raise self.error(entry, f"{name} and {takers[source]} would both take {source} of the file")


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values; those of tables, as keys with dots that are not quoted make them, under their whole name."""
    for key, value in table.items():
        if isinstance(value, dict) and not ENTRY.keys() & value.keys():
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _entry(key: str, value: Any, path: str) -> Entry:
    """A line of a map. Raises ConfigError for a value that is none."""
    table = value if isinstance(value, dict) else {"name": value}
    where = f"{FLAG} {path}: {key} = {shown(value)}"
    if unknown := table.keys() - ENTRY.keys():
        raise ConfigError(f"{where}: {min(unknown)} is unknown; there are name and transpose")
    wrong = [name for name in table if not isinstance(table[name], ENTRY[name])]
    if wrong or not table.get("name"):
        raise ConfigError(f'{where}: must be a name in the file, or {{ name = "...", transpose = true }}')
    if table["name"].count("*") > key.count("*"):
        raise ConfigError(f"{where}: has more * than {key}, which they stand for")
    return Entry(key, table["name"], table.get("transpose", False))
