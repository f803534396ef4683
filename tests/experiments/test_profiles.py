import dataclasses
import hashlib
import json
import sys

from absl import flags
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from experiments.cli import app
from roe_jax import checkpoint, temperature_profiles
from roe_jax import params as params_lib
from roe_jax.roster import Roster
from roe_jax.temperature_profiles import Profile


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
  return checkpoint.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def profile(model):
  params, config = model
  roster = Roster.create(config, 5, [0.0, 0.25], cache="standard", gate_weights="noisy")
  return Profile(
    (0.0, 0.25),
    temperature_profiles.model_of("tiny", config, params),
    temperature_profiles.roster_of(roster.settings()),
    {"name": "perplexity", "value": 1.5},
    {"task": "wordmath"},
    3,
    {"seconds": 2.5, "trials": 7},
  )


@pytest.fixture
def parsed():
  """`parsed(*arguments)` parses the flags of a program; they are put away afterwards."""
  values = flags.FlagValues()
  original = app.flags.FLAGS

  def parse(*arguments):
    if "checkpoint" not in values:
      for define in (app.define_model_flags, app.define_roster_flags):
        define()
    values([sys.argv[0], "--checkpoint=unused", *arguments])

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(app.flags, "FLAGS", values)
    for kind in ("string", "enum", "integer", "bool"):
      define = getattr(flags, f"DEFINE_{kind}")
      patch.setattr(
        app.flags,
        f"DEFINE_{kind}",
        lambda *a, define=define, **k: define(*a, **k, flag_values=values),
      )
    yield parse
  assert app.flags.FLAGS is original


def write(profile, path):
  path.write_text(profile.to_json())
  return f"--tau={path}"


def test_a_profile_comes_back_as_it_was_written(profile, tmp_path):
  write(profile, tmp_path / "p.json")
  assert temperature_profiles.read(tmp_path / "p.json") == profile


def test_a_roster_takes_a_profiles_settings_except_where_flags_are_given(
  profile, model, tmp_path, parsed
):
  argument = write(profile, tmp_path / "p.json")
  parsed(argument)
  roster = app.roster_from_flags(model[1])
  assert roster.num_members == 5 and roster.cache == "standard" and roster.gate_weights == "noisy"
  assert roster.temperatures.tolist() == [0.0, 0.25] and int(roster.seed) == 0
  parsed(argument, "--num_members=1", "--cache=clean", "--noinclude_clean")
  roster = app.roster_from_flags(model[1])
  assert roster.num_members == 1 and roster.cache == "clean" and not roster.include_clean
  assert roster.gate_weights == "noisy"


def test_a_router_bias_is_read_from_a_file(model, tmp_path, parsed):
  path = tmp_path / "bias.json"
  parsed(f"--router_bias={path}")
  with pytest.raises(ValueError, match="--router_bias=.*bias.json must be an existing JSON file"):
    app.roster_from_flags(model[1])
  bias = [[0.0, 1.5, "-inf", -2.0], [0.0] * 4]
  path.write_text(json.dumps(bias))
  settings = app.roster_from_flags(model[1]).settings()
  assert settings["router_bias"] == bias and settings["num_members"] == 1
  for wrong, sentence in (
    ({"a": 1}, "must be a list"),
    (bias[:1], r"must be numbers \[2, E\]"),
    ([row[1:] for row in bias], r"must have shape \[2, 4\] \(layers, experts .*got \[2, 3\]"),
    ([["a"] * 4] * 2, r"must be numbers \[2, E\]"),
    ([["-inf"] * 3 + [0.0]] * 2, "bans too many experts"),
  ):
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=sentence):
      app.roster_from_flags(model[1])


def test_a_roster_is_created_from_a_profile_in_python(profile, model, tmp_path):
  params, config = model
  write(profile, tmp_path / "p.json")
  roster = Roster.from_profile(tmp_path / "p.json", config, params, seed=2, cache="clean")
  expected = Roster.create(config, 5, [0.0, 0.25], seed=2, gate_weights="noisy")
  assert roster.settings() == expected.settings()
  with pytest.raises(ValueError, match="of the same sizes has routers"):
    Roster.from_profile(
      tmp_path / "p.json", config, params_lib.initialize(config, jax.random.key(1))
    )
  with pytest.raises(ValueError, match="but the model is"):
    Roster.from_profile(tmp_path / "p.json", config.replace(vocab_size=7))
  with pytest.raises(FileNotFoundError, match="no temperature profile"):
    Roster.from_profile(tmp_path / "other.json", config)


def test_a_list_of_temperatures_alone_is_a_profile_of_any_model(model, tmp_path, parsed):
  (tmp_path / "p.json").write_text('{"temperatures": [0.1, 0.2]}')
  parsed(f"--tau={tmp_path / 'p.json'}", "--num_members=3")
  assert app.roster_from_flags(model[1]).num_members == 3
  app.check_profile(model[0])


def test_the_fingerprint_is_the_hash_of_the_routers_in_bfloat16(model):
  router = np.asarray(model[0].layers.router)
  expected = hashlib.sha256(router.astype(ml_dtypes.bfloat16).tobytes()).hexdigest()
  assert temperature_profiles.fingerprint(model[0]) == expected


def test_the_fingerprint_ignores_dtype_format_and_devices(tiny_checkpoint, model, olmoe):
  expected = temperature_profiles.fingerprint(model[0])
  for options in ({"dtype": "bfloat16"}, {"mesh": "expert:2,tensor:2,data:2"}):
    assert (
      temperature_profiles.fingerprint(app.load_params(str(tiny_checkpoint), **options)[0])
      == expected
    )
  config, params = olmoe
  quantized = params_lib.quantize(params, config, "int8")[0]
  assert temperature_profiles.fingerprint(quantized) == temperature_profiles.fingerprint(params)


def test_the_fingerprint_sees_weights_and_biases_of_routers():
  config = tiny.config("gpt_oss")
  params = tiny.params(config)
  found = {temperature_profiles.fingerprint(params)}
  for name in ("router", "router_bias"):
    array = getattr(params.layers, name)
    changed = array.at[(0,) * array.ndim].add(1)
    found.add(
      temperature_profiles.fingerprint(
        params.replace(layers=params.layers.replace(**{name: changed}))
      )
    )
  assert len(found) == 3


def test_another_models_sizes_are_refused_before_its_parameters_are_read(
  profile, model, tmp_path, parsed
):
  parsed(write(profile, tmp_path / "p.json"))
  for changes in ({"num_layers": 3}, {"num_experts": 8}, {"vocab_size": 7}):
    with pytest.raises(ValueError, match="is for tiny, olmoe with 2 layers of 4 experts") as error:
      app.roster_from_flags(model[1].replace(**changes))
    assert str(next(iter(changes.values()))) in str(error.value).split("but the model is")[1]


def test_a_profile_whose_list_is_too_short_for_its_own_model_is_refused(profile, model):
  with pytest.raises(ValueError, match="has 1 layers, but the model has 2"):
    dataclasses.replace(profile, temperatures=(0.1,)).check_sizes(model[1])


def test_other_routers_of_the_same_sizes_are_refused_when_parameters_are_loaded(
  profile, model, tiny_checkpoint, tmp_path, parsed
):
  parsed(write(profile, tmp_path / "p.json"))
  app.load_params(str(tiny_checkpoint))
  params, config = model
  other = params_lib.initialize(config, jax.random.key(1))
  with pytest.raises(ValueError, match="of the same sizes has routers"):
    app.check_profile(other)
  (tmp_path / "files").mkdir()
  checkpoint.save(tmp_path / "other", other, config, files=tmp_path / "files")
  with pytest.raises(ValueError, match="of the same sizes has routers"):
    app.load_params(str(tmp_path / "other"))
  app.check_profile(params)


def test_experts_do_not_matter_to_a_profile(profile, model):
  params, _ = model
  changed = params.replace(
    layers=params.layers.replace(experts=jax.tree.map(jnp.zeros_like, params.layers.experts))
  )
  profile.check_routers(changed)


@pytest.mark.parametrize(
  "damage,message",
  [
    (lambda text: text[:-20], "not a temperature profile"),
    (lambda text: "\x00" + text, "not a temperature profile"),
    (lambda text: text.replace("0.25", "-0.25"), "non-negative"),
    (lambda text: text.replace("0.25", "NaN"), "finite"),
    (lambda text: text.replace("0.25", '"a"'), "not a temperature profile"),
    (lambda text: text.replace('"routers"', '"rooters"'), "model has no routers"),
    (lambda text: text.replace('"gate_weights"', '"gates"'), "unknown keys: gates"),
    (
      lambda text: json.dumps(json.loads(text) | {"model": 3}),
      "model must be a JSON object, got 3",
    ),
    (lambda text: json.dumps(json.loads(text) | {"temperatures": "12"}), "list of non-negative"),
    (lambda text: json.dumps(json.loads(text) | {"temperatures": [True]}), "list of non-negative"),
    (
      lambda text: json.dumps(json.loads(text) | {"roster": {"num_members": "8"}}),
      "num_members of",
    ),
    (lambda text: json.dumps(json.loads(text) | {"seed": [1]}), "seed must be an integer"),
    (lambda text: "[" * 10**5, "not a temperature profile"),
  ],
)
def test_a_damaged_profile_is_refused(profile, tmp_path, damage, message):
  path = tmp_path / "p.json"
  path.write_text(damage(profile.to_json()))
  with pytest.raises(ValueError, match=message):
    temperature_profiles.read(path)
