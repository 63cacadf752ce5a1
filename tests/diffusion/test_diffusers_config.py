"""scheduler_config.json: read, written, loaded by diffusers without a word, and refused by name."""

import json
import logging

import diffusers
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers.utils import logging as diffusers_logging

from ldm.diffusion.diffusers_config import CLASSES, read_scheduler, read_stepping, write_scheduler
from ldm.diffusion.schedule import Schedule
from ldm.errors import ModelError

ZERO_SNR = Schedule("v_prediction", "squaredcos_cap_v2", rescale_betas_zero_snr=True, spacing="trailing")
SCHEDULES = [
    Schedule(),
    ZERO_SNR,
    Schedule("sample", "linear", beta_start=0.0001, beta_end=0.02, steps_offset=0, set_alpha_to_one=True),
    Schedule("flow", flow_shift=3.0),
    Schedule("flow"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_written_reads_back_the_same(schedule):
    written = json.loads(json.dumps(write_scheduler(schedule)))
    assert read_scheduler(written) == schedule


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffusers_loads_it_without_a_warning_and_keeps_every_setting(schedule, tmp_path, caplog):
    written = write_scheduler(schedule)
    cls = DPMSolverMultistepScheduler if schedule.is_flow else DDIMScheduler
    assert written["_class_name"] == cls.__name__
    (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            peer = cls.from_pretrained(tmp_path)
    finally:
        diffusers_logging.disable_propagation()
    assert not caplog.records
    for key, value in written.items():
        assert key == "_class_name" or peer.config[key] == value
    assert read_scheduler(dict(peer.config)) == schedule  # with all defaults of diffusers spelt out


def test_other_samplers_of_diffusers_can_be_made_from_the_shipped_config():
    for cls in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        peer = cls.from_config(write_scheduler(ZERO_SNR))
        assert peer.config.prediction_type == "v_prediction" and peer.config.rescale_betas_zero_snr
        assert peer.config.timestep_spacing == "trailing" and peer.config.beta_schedule == "squaredcos_cap_v2"


def test_configs_as_published_are_read():
    sd15 = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert read_scheduler(sd15) == Schedule()
    sd21 = {**sd15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    assert read_scheduler(sd21) == Schedule("v_prediction")
    xl = {**sd15, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "sample_max_value": 1.0}
    xl |= {"timestep_spacing": "leading", "use_karras_sigmas": False}
    assert read_scheduler(xl) == Schedule()


@pytest.mark.parametrize("cls", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_settings_left_out_have_the_defaults_of_the_class(cls):
    full = {**cls().config, "clip_sample": False}
    short = read_scheduler({"_class_name": cls.__name__})
    assert short == read_scheduler(full)
    assert (short.beta_schedule, short.beta_end, short.steps_offset) == ("linear", 0.02, 0)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"_class_name": "FlowMatchLCMScheduler"}, "_class_name 'FlowMatchLCMScheduler'"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"variance_type": "learned_range"}, "variance_type 'learned_range'"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"a_new_setting": 0.5}, "a_new_setting 0.5"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'"),
        ({"prediction_type": "flow_prediction"}, "use_flow_sigmas False"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"num_train_timesteps": "many"}, "scheduler_config.json"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, said):
    with pytest.raises(ModelError, match=r"^scheduler_config\.json: ") as caught:
        read_scheduler({**write_scheduler(Schedule()), **change})
    assert said in str(caught.value)


STEPPINGS = {  # class, settings -> (what ours takes, what it says to replace)
    ("DPMSolverMultistepScheduler", ("use_karras_sigmas", True)): ({"sampler": "dpmpp_2m", "spacing": "karras"}, None),
    ("EulerDiscreteScheduler", ("use_karras_sigmas", True)): ({"sampler": "euler", "spacing": "karras"}, None),
    ("UniPCMultistepScheduler", ("use_beta_sigmas", True)): ({"sampler": "unipc", "spacing": "beta"}, None),
    ("DPMSolverMultistepScheduler", ("algorithm_type", "sde-dpmsolver++")): ({"sampler": "dpmpp_2m_sde"}, None),
    ("LCMScheduler", ("original_inference_steps", 50)): ({"sampler": "lcm"}, None),
    ("TCDScheduler", ("original_inference_steps", 50)): ({"sampler": "tcd"}, None),
    ("DEISMultistepScheduler", ("algorithm_type", "deis")): (
        {},
        "DEISMultistep, algorithm_type 'deis' replaced by our",
    ),
    ("EulerDiscreteScheduler", ("final_sigmas_type", "sigma_min")): ({"sampler": "euler"}, "final_sigmas_type 'sigma"),
    ("DDIMScheduler", ("clip_sample", True)): ({"sampler": "ddim"}, "clip_sample True replaced by ddim"),
    ("EulerDiscreteScheduler", ("use_karras_sigmas", False)): ({}, None),
    ("PNDMScheduler", ("skip_prk_steps", True)): ({}, None),
}


@pytest.mark.parametrize(("cls", "setting"), STEPPINGS)
def test_ways_of_stepping_become_ours_or_are_said_to_be_replaced(cls, setting):
    """The betas and the prediction type stay the model's whatever stepped."""
    config = {**write_scheduler(Schedule("v_prediction")), "_class_name": cls, setting[0]: setting[1]}
    assert read_scheduler(config) == read_scheduler({**write_scheduler(Schedule("v_prediction")), "_class_name": cls})
    found, note = read_stepping(config)
    expected, said = STEPPINGS[cls, setting]
    assert found == expected and (note is None if said is None else said in note and "\n" not in note)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_loads_as_diffusers_saves_it(name):
    if not hasattr(diffusers, name) or (
        name == "DPMSolverSDEScheduler" and not diffusers.utils.is_torchsde_available()
    ):
        pytest.skip("this diffusers cannot make one")
    peer = getattr(diffusers, name).from_config(write_scheduler(Schedule("v_prediction")))
    read = read_scheduler({**json.loads(peer.to_json_string()), "_class_name": name})
    assert (read.prediction_type, read.beta_schedule, read.beta_end) == ("v_prediction", "scaled_linear", 0.012)
