"""Foreign weights: a catalogue of them, a folder they lie in, and hashes and licences that travel with their use.

`neuromf.weights.locate("maisi")` is what everything else calls: the checked file, or how to get it.
"""

from neuromf.weights.catalogue import NOT_PINNED, Entry, Licence, entries, find, recognise
from neuromf.weights.download import Fetched, fetch
from neuromf.weights.integrity import damage
from neuromf.weights.inventory import Checked, Listed, survey, verify
from neuromf.weights.lookup import WeightsFile, by_hand, how_to_get, locate
from neuromf.weights.places import VARIABLE, expected_path, folder, found_path

__all__ = [
    "VARIABLE",
    "NOT_PINNED",
    "Entry",
    "Licence",
    "WeightsFile",
    "Fetched",
    "Listed",
    "Checked",
    "entries",
    "find",
    "recognise",
    "folder",
    "expected_path",
    "found_path",
    "locate",
    "fetch",
    "how_to_get",
    "by_hand",
    "damage",
    "survey",
    "verify",
]
