"""A license means the same however it is spelled."""

import pytest
from huggingface_hub import ModelCardData

from datasets_scripts.licenses import (
    HUB_LICENSES,
    NONCOMMERCIAL,
    check_chosen_license,
    has_words,
    name_license,
    read_card_license,
    read_license,
)


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("Apache-2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("MIT", "mit"),
        ("MIT License", "mit"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("BSD 3-Clause", "bsd-3-clause"),
        ("DeepFloyd-IF-License", "deepfloyd-if-license"),
        ("Snap Inc., non-commercial research only", "Snap Inc., non-commercial research only"),
    ],
)
def test_a_license_in_another_spelling_has_the_hubs_name(stated, name):
    assert name_license(stated) == read_license(stated) == name


def test_every_name_of_the_hub_is_its_own():
    assert {name: name_license(name) for name in HUB_LICENSES} == {name: name for name in HUB_LICENSES}


@pytest.mark.parametrize("recorded", [None, "", "Not stated", "unknown", "Unknown: see the page"])
def test_what_says_nothing_is_unknown(recorded):
    assert read_license(recorded) is None


def test_words_are_found_in_any_spelling():
    assert has_words("CC BY NC 5.0", NONCOMMERCIAL) and has_words("Non commercial use", NONCOMMERCIAL)
    assert not has_words("NCSA", NONCOMMERCIAL)


@pytest.mark.parametrize(
    ("data", "license"),
    [
        ({"license": "Apache-2.0"}, "apache-2.0"),
        ({"license": "other", "license_name": "research-only"}, "research-only"),
        ({"license": "other"}, "other"),
        ({"license": ["mit", "cc-by-nc-4.0"]}, None),
        ({}, None),
    ],
)
def test_a_card_names_one_license_or_none(data, license):
    assert read_card_license(ModelCardData(**data)) == license


def test_a_choice_that_the_hub_does_not_know_is_refused():
    assert check_chosen_license("Apache-2.0") == "apache-2.0"
    with pytest.raises(ValueError, match="--license cc-nc is not a name that the Hub knows"):
        check_chosen_license("cc-nc")
