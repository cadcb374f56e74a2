"""The best settings known of every method on a stream: read from, and written to, one readable file a stream."""

import itertools
from pathlib import Path

from cl_lib.errors import InputError
from cl_lib.files import claimed, replacing

FOLDER = Path("notebooks", "experiments", "best")
CHECKOUT = Path(__file__).resolve().parents[2] / FOLDER
HEAD = """\
# The best settings found for methods on {stream}, by scenario: `settings` are what the search chose, `fixed` and
# `stream` what it was told. `score` is the accuracy on held-out training images of the first tasks after the last of
# them; no test image was looked at. `trials` counts those that were given up (`pruned`) too.
#   python -m cl_lib run METHOD --best
"""


def best(method: str, stream, folder=None) -> dict:
    """The best settings known of a method on a stream like this one: ``run("er", stream, **best("er", stream))``.

    Arguments:
        method: a registry key.
        stream: what ``cl_lib.split`` and its kin return; its name and its scenario count.
        folder: where ``<stream>.yaml`` lies, by default ``notebooks/experiments/best`` here or in the checkout.

    Raises InputError where nobody has searched.
    """
    return settings_of(entry_of(method, stream.name, stream.scenario, folder)[0])


def settings_of(entry: dict) -> dict:
    """What an entry says of training and of the method."""
    return {**entry.get("fixed", {}), **entry["settings"]}


def entry_of(method: str, stream: str, scenario: str, folder=None) -> tuple[dict, Path]:
    """What is known of a method on a stream, by its name, and the file that says it. Raises InputError."""
    place = file_of(stream, folder)
    known = read(place).get(scenario, {})
    if method not in known:
        there = f"{place} has {', '.join(known) or 'none'}" if place.is_file() else f"there is no {place}"
        how = f"python -m cl_lib tune {method} --dataset {stream.partition('-')[2]} --scenario {scenario} --trials 50"
        raise InputError(
            f"No best settings of {method} on {stream}, {scenario}-incremental ({there}): search, `{how}`."
        )
    return known[method], place


def file_of(stream: str, folder=None) -> Path:
    """The file about a stream, by its name; ``split-`` is the usual kind and is left out."""
    name = f"{stream.removeprefix('split-')}.yaml"
    here = FOLDER if (FOLDER / name).is_file() or not CHECKOUT.is_dir() else CHECKOUT
    return Path(folder or here) / name


def read(place: Path) -> dict:
    """Scenario -> method -> what is known. Raises InputError for a file that is damaged."""
    import yaml

    try:
        found = yaml.safe_load(place.read_text("utf-8")) if place.is_file() else {}
        if not isinstance(found, dict) or not all("settings" in e for each in found.values() for e in each.values()):
            raise ValueError("it is no mapping scenario: {method: {settings: …}}")
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{place} cannot be read as best settings ({reason}): mend it or move it away.") from error
    return found


def write(place: Path, stream: str, scenario: str, method: str, entry: dict) -> None:
    """Put one entry into a stream's file; what else it says stays, its first comment too, whoever else writes."""
    import yaml

    with claimed(place.with_name(f".{place.name}.claim"), wait=True):
        known, lines = read(place), place.read_text("utf-8").splitlines(True) if place.is_file() else []
        head = "".join(itertools.takewhile(lambda line: line.startswith("#"), lines)) or HEAD.format(stream=stream)
        known.setdefault(scenario, {})[method] = entry
        ordered = {name: dict(sorted(known[name].items())) for name in sorted(known)}
        text = yaml.safe_dump(ordered, sort_keys=False, width=1000, allow_unicode=True)
        with replacing(place) as temporary:
            temporary.write_text(head + text, "utf-8")
