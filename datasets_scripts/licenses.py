"""Names of licenses, and what they allow, for the cards of datasets and models.

To our knowledge, not legal advice.
"""

import re
from collections.abc import Iterable

from huggingface_hub import CardData

# https://huggingface.co/docs/hub/repositories-licenses, and newer ones that the Hub accepts.
_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda
cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community
gemma unknown other
"""
HUB_LICENSES = frozenset(_NAMES.split())
# What is made with these may have any license; all others limit the use.
_FREE = """
apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc0-1.0 isc ncsa pddl postgresql unlicense wtfpl zlib
"""
PERMISSIVE = frozenset(_FREE.split())
# Words of a license that forbids commerce, and of one that forbids more (`amlr` is Apple's for research).
RESEARCH = ("research", "amlr")
NONCOMMERCIAL = ("-nc", "noncommercial", "non-commercial", *RESEARCH)
# Words of those that ask for more than that: what is made of them keeps their own terms.
OWN_TERMS = ("-sa", "-nd")
_FILLERS = {"the", "license", "licence", "version"}


def name_license(stated: str) -> str:
    """The Hub's name of a license in any spelling ("CC BY-NC 4.0", "MIT License"); other text unchanged."""
    words = _join_words(stated).split("-")
    spellings = ("-".join(words), "-".join(word for word in words if word not in _FILLERS))
    return next((name for name in spellings if name in HUB_LICENSES), stated)


def read_license(recorded: str | None) -> str | None:
    """As [`name_license`]; `None` for a record that says that the license is unknown."""
    known = bool(recorded) and not recorded.lower().startswith(("not stated", "unknown"))
    return name_license(recorded) if known else None


def read_card_license(data: CardData) -> str | None:
    """The license that the card of a model names; `None` if it names none, or several."""
    license = data.get("license")
    if license == "other":
        license = data.get("license_name") or license
    return read_license(license) if isinstance(license, str) else None


def check_chosen_license(chosen: str) -> str:
    """The Hub's name of what a user gave as `--license`; raises a `ValueError` if the Hub has none."""
    name = name_license(chosen)
    if name not in HUB_LICENSES:
        raise ValueError(
            f"--license {chosen} is not a name that the Hub knows: give one of "
            "https://huggingface.co/docs/hub/repositories-licenses, such as apache-2.0, or other"
        )
    return name


def has_words(license: str, words: Iterable[str]) -> bool:
    """Whether a license has one of some words, such as `NONCOMMERCIAL`, in any spelling."""
    return any(word in _join_words(license) for word in words)


def keeps_terms(chosen: str, license: str) -> bool:
    """Whether what is made with a license that limits the use may have the chosen one."""
    if chosen in (license, "other"):
        return True
    limits = [words for words in (RESEARCH, NONCOMMERCIAL) if has_words(license, words)]
    # Others, such as the GPL or a model's community license, ask for their own terms.
    if not limits or has_words(license, OWN_TERMS):
        return False
    return all(has_words(chosen, words) for words in limits)


def _join_words(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9.+]+", text.lower()))
