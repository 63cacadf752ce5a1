"""The names of samplers and spacings elsewhere, and what goes with what."""

import inspect

import pytest

from ldm.diffusion import names
from ldm.diffusion.names import ETA, FLOW_SAMPLERS, SAMPLER_NAMES, SPACING_NAMES, check, options, resolve
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import PREDICTION_TYPES, Schedule
from ldm.diffusion.spacings import SPACINGS
from ldm.errors import ConfigError


def test_everything_offered_has_names_and_every_name_is_somethings_only():
    assert set(SAMPLER_NAMES) == set(SAMPLERS) and set(SPACING_NAMES) == set(SPACINGS)
    for name, others in SAMPLER_NAMES.items():
        assert {resolve(other) for other in (name, *others)} == {(name, None)}
    for name, others in SPACING_NAMES.items():
        assert {names.resolve_spacing(other) for other in (name, *others)} == {name}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpm++ 2m karras", ("dpmpp_2m", "karras")),
        ("k_dpmpp_2m_ka", ("dpmpp_2m", "karras")),
        ("DPM++ SDE Karras", ("dpmpp_sde", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2S a Karras", ("dpmpp_2s_ancestral", "karras")),
        ("DPM++ 3M SDE", ("dpmpp_3m_sde", None)),
        ("LMS Karras", ("lms", "karras")),
        ("Euler a", ("euler_ancestral", None)),
        ("euler_a", ("euler_ancestral", None)),
        ("k_euler_a", ("euler_ancestral", None)),
        ("sample_euler_ancestral", ("euler_ancestral", None)),
        ("sample_dpm_2", ("dpm2", None)),
        ("dpmpp_2m_sde_gpu", ("dpmpp_2m_sde", None)),
        ("uni_pc", ("unipc", None)),
        ("UniPC SGM Uniform", ("unipc", "sgm_uniform")),
        ("Euler Align Your Steps", ("euler", "ays")),
        ("DPMSolverSDEScheduler", ("dpmpp_sde", None)),
        (" Heun ", ("heun", None)),
    ],
)
def test_labels_of_elsewhere(name, expected):
    assert resolve(name) == expected


@pytest.mark.parametrize(
    "name, said",
    [
        ("dpmpp_2n", "did you mean 'dpmpp_2m'"),
        ("DPM++ 2M SDE Heun", "did you mean"),
        ("DPMSolverSinglestepScheduler", "did you mean"),
        ("Karras", "unknown sampler 'Karras'"),
        ("", "choose from: euler, "),
        (3, "unknown sampler 3"),
        (None, "unknown sampler None"),
        ("x" * 10**6, "choose from"),
    ],
)
def test_unknown_samplers_are_refused_in_one_short_line(name, said):
    with pytest.raises(ConfigError, match=said) as refused:
        resolve(name)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_spacings_by_label():
    assert names.resolve_spacing("Automatic") is None
    assert names.resolve_spacing("Align Your Steps") == "ays"
    with pytest.raises(ConfigError, match="did you mean 'karras'"):
        names.resolve_spacing("karas")
    with pytest.raises(ConfigError, match="unknown spacing 7"):
        names.resolve_spacing(7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_matrix(sampler, prediction_type):
    fine = sampler in FLOW_SAMPLERS if prediction_type == "flow" else sampler != "heun_flow"
    if fine:
        check(sampler, prediction_type)
    else:
        with pytest.raises(ConfigError, match=f"sampler: {sampler} .*flow models"):
            check(sampler, prediction_type)
    assert {"euler", "heun_flow", "dpmpp_2m", "unipc"} <= set(FLOW_SAMPLERS)


def test_spacings_are_refused_for_flow_before_and_by_the_schedule():
    check("euler", "epsilon", "karras")
    with pytest.raises(ConfigError, match="karras does not apply: a flow model has its own"):
        check("euler", "flow", "karras")
    with pytest.raises(ConfigError, match="does not apply"):
        Schedule("flow").sigmas(8, "euler", "karras")


def test_eta_is_known_for_exactly_the_samplers_that_take_it():
    found = {}
    for name, function in SAMPLERS.items():
        parameters = inspect.signature(function).parameters
        if "eta" in parameters:
            found[name] = parameters["eta"].default
    assert found == ETA


def test_eta_reaches_the_samplers_that_take_it_and_is_refused_by_name_elsewhere():
    assert options("ddim", 0.5) == {"eta": 0.5} and options("euler_ancestral", 0) == {"eta": 0.0}
    assert options("ddim", None) == options("euler", None) == options("euler", 0.0) == options("lms", 0) == {}
    for sampler, eta in (("euler", 0.5), ("lcm", 1), ("ddpm", 0)):
        with pytest.raises(
            ConfigError, match=f"the sampler {sampler} takes no eta; leave it out, or choose from: ddim"
        ):
            options(sampler, eta)
    for eta in (-0.1, 1.5, float("nan"), float("inf"), "1", True):
        with pytest.raises(ConfigError, match="eta: expected a number from 0 to 1"):
            options("ddim", eta)


def test_the_help_names_everything_once_and_fits():
    text = names.help_text()
    for table in (SAMPLER_NAMES, SPACING_NAMES):
        for name, others in table.items():
            assert (
                sum(line.startswith(f"  {name}") and line[2:23].strip("* ") == name for line in text.splitlines()) == 1
            )
            assert all(other in text for other in others)
    assert max(map(len, text.splitlines())) <= 160
