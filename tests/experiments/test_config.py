"""Knobs of plug-ins are checked against what their classes declare; a sweep's folders have names that file systems take."""

import pytest
from omegaconf import OmegaConf

from experiments.config import LONGEST_NAME, _check_link, check_knobs, folder_name
from prefetch.errors import ConfigError

TOP_M = "prefetch.planner.top_m.TopM"


@pytest.mark.parametrize("knobs", [{}, {"m": None}, {"m": 3}, {"min_useful_share": 1}, {"min_useful_share": 0.5}])
def test_values_of_the_declared_type_pass(knobs):
    check_knobs("planner", OmegaConf.create({"_target_": TOP_M, **knobs}))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"m": "two"}, "planner.m=two: it must be of type int or null"),
        ({"m": 1.5}, "planner.m=1.5: it must be of type int or null"),
        ({"extra": None}, "planner.extra=None: it must be of type int"),
        ({"extra": [1]}, r"planner.extra=\[1\]: it must be of type int"),
        ({"min_useful_share": "x"}, "planner.min_useful_share=x: it must be of type float"),
        ({"n": 3}, "planner.n is not an option of .*TopM; its options are: m, extra"),
    ],
)
def test_others_are_named(knobs, said):
    with pytest.raises(ConfigError, match=said):
        check_knobs("planner", OmegaConf.create({"_target_": TOP_M, **knobs}))


def test_a_plug_in_within_a_plug_in_is_checked_too():
    nested = {"_target_": "prefetch.planner.cpu_fallback.CpuFallback", "prefetch": {"_target_": TOP_M, "m": "x"}}
    with pytest.raises(ConfigError, match="planner.prefetch.m=x"):
        check_knobs("planner", OmegaConf.create(nested))


@pytest.mark.parametrize("link", [5, "fast", {"bytes_per_s": 1e9}, {"bytes_per_s": "1GB", "latency_s": 0}])
def test_a_link_is_two_numbers(link):
    with pytest.raises(ConfigError, match="tier.link="):
        _check_link(OmegaConf.create({"link": link}).link)


def test_folder_names_are_short_enough_and_differ():
    assert folder_name("cache.slots=0.25,predictor=gate_reuse") == "cache.slots=0.25,predictor=gate_reuse"
    assert "/" not in folder_name("model.path=a/b")
    long = [folder_name("x=" + "\u00e4" * 300 + end) for end in "ab"]
    assert len(set(long)) == 2 and all(len(name.encode()) <= LONGEST_NAME + 15 for name in long)
