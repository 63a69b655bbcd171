import numpy as np

from chexnet_deploy.datasets.labelled import subgroups


def test_each_image_is_in_one_group_of_a_kind() -> None:
    groups = subgroups(["F", "M", "M", "unknown"], [39.0, 40.0, 60.0, np.nan], ["PA", "AP", "PA", "unknown"])
    assert {name: chosen.tolist() for name, chosen in groups.items()} == {
        "sex F": [True, False, False, False],
        "sex M": [False, True, True, False],
        "age under 40": [True, False, False, False],
        "age 40 to 59": [False, True, False, False],
        "age 60 and over": [False, False, True, False],
        "view AP": [False, True, False, False],
        "view PA": [True, False, True, False],
    }


def test_a_mistaken_age_and_an_empty_group_are_in_none() -> None:
    assert list(subgroups(["F"], [411.0], ["PA"])) == ["sex F", "view PA"]
