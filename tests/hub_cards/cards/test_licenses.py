"""The license of weights follows from those of their parts, in any spelling."""

import pytest

from hub_cards.cards.licenses import derive_license, list_parts
from training.config import RunConfig


def part(license):
    return {"what": "labels of data", "name": "worker", "license": license}


@pytest.mark.parametrize(
    ("stated", "license"),
    [
        ("Apache-2.0", "apache-2.0"),
        ("MIT", "apache-2.0"),  # the project's own
        ("BSD-2-Clause", "apache-2.0"),
        ("CC-BY-NC-4.0", "cc-by-nc-4.0"),
    ],
)
def test_the_spelling_of_a_license_does_not_matter(stated, license):
    assert derive_license([part(stated)]) == {"license": license}
    assert derive_license([part(stated)], license.upper()) == {"license": license}


@pytest.mark.parametrize("chosen", ["openrail", "OpenRAIL", "apache-2.0", "MIT"])
@pytest.mark.parametrize("stated", ["CC-BY-NC-4.0", "CC BY-NC 4.0", "non-commercial use", "Research only"])
def test_no_spelling_makes_noncommercial_labels_permissive(stated, chosen):
    with pytest.raises(
        ValueError, match=f"--license {chosen.lower()} allows more than labels of data, worker"
    ):
        derive_license([part(stated)], chosen)


def test_labels_of_an_unknown_license_are_asked_for():
    labels = {"main": {"depth": {"models": [{"model": "m", "license": "Unknown"}]}}}
    parts = list_parts(None, {"datasets": [{"name": "d", "labels": labels}]})[1:]
    assert parts == [{"what": "labels of d", "name": "m", "license": None}]
    with pytest.raises(ValueError, match="that of labels of d, m .license unknown. is not"):
        derive_license(parts)


@pytest.mark.parametrize(
    ("stated", "chosen"),
    [
        ("gpl-3.0", "zlib"),
        ("gpl-3.0", "cc-by-nc-4.0"),
        ("cc-by-sa-4.0", "openrail"),
        ("apple-amlr", "cc-by-nc-4.0"),
        ("cc-by-nc-sa-4.0", "cc-by-nc-4.0"),
        ("llama3", "gpl-3.0"),
    ],
)
def test_terms_of_its_own_are_kept(stated, chosen):
    with pytest.raises(ValueError, match="keeps its terms"):
        derive_license([part(stated)], chosen)
    assert derive_license([part(stated)], stated)["license"] == stated
    assert derive_license([part(stated)], "other")["license"] == "other"
    assert derive_license([part("zlib")], chosen)["license"] == chosen


def test_labels_whose_source_was_dropped_are_asked_for():
    data = {"name": "d", "unrecorded_labels": ["observation.points.main"]}
    parts = list_parts(RunConfig(), {"datasets": [data]})
    with pytest.raises(ValueError, match="that of labels of d, observation.points.main .license unknown"):
        derive_license(parts)
