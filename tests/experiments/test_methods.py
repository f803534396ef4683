"""Methods: how they are written, what they refuse, and how samples are picked."""

import itertools
import json

import numpy as np
import pytest
import tiny

from experiments import tasks
from experiments.evaluation import methods, picking
from roe_jax.completion import Completion
from roe_jax.roster import Roster

CONFIG = tiny.config("olmoe", num_experts=16, experts_per_token=3)
BASE = Roster.create(CONFIG, 8, [0.0, 0.3, 0.3], seed=5)


def parse(text, config=CONFIG, base=BASE):
  return methods.parse(text, config, base)


def test_a_roster_takes_what_is_not_written_from_the_flags():
  base = Roster.create(CONFIG, 6, [0.0, 0.3, 0.1], seed=5, gate_weights="noisy", noise="gaussian")
  method = parse("roster: aggregation=mean_logit, include_clean=false", base=base)
  settings = method.roster.settings()
  assert settings == base.settings() | {"aggregation": "mean_logit", "include_clean": False}
  assert method.text == "roster:aggregation=mean_logit,include_clean=false"
  assert method.label == "roster, n = 6, mean logit, without clean member"
  np.testing.assert_allclose(parse("roster:n=2,t=0.5,noise=swap").roster.temperatures, 0.5)


def test_a_roster_takes_the_temperatures_of_a_profile(tmp_path):
  folder = tmp_path / "a task"
  folder.mkdir()
  paths = {}
  for name, temperatures in (
    ("profile", [0.1, 0.2, 0.3]),
    ("other", [0, 0, 0]),
    ("long", [0.1] * 4),
  ):
    paths[name] = folder / f"{name}.json"
    paths[name].write_text(json.dumps({"temperatures": temperatures}))
  method = parse(f"roster: n = 4, profile = {paths['profile']}")
  np.testing.assert_allclose(method.roster.temperatures, [0.1, 0.2, 0.3])
  assert method.label == "roster, n = 4, τ of a task" and method.roster.cache == BASE.cache
  assert method.text == f"roster:n=4,profile={paths['profile']}"
  assert not np.any(parse(f"roster:profile={paths['other']}").roster.temperatures)
  both = methods.parse_all(
    [f"roster:profile={paths[n]}" for n in ("profile", "other")], CONFIG, BASE
  )
  assert [m.label for m in both] == ["roster, n = 8, τ of a task", "roster, n = 8, τ of other"]
  for text, message in (
    (f"roster:profile={paths['long']}", "has 4 layers, but the model has 3"),
    (f"roster:t=0.1,profile={paths['profile']}", "t and profile both set the temperatures"),
    (f"roster:profile={folder / 'none.json'}", "temperature profile .*none.json does not exist"),
  ):
    with pytest.raises(ValueError, match=message):
      parse(text)


def test_noise_in_some_layers():
  method = parse("roster:n=2,t=0.5,layers=1-1")
  np.testing.assert_allclose(method.roster.temperatures, [0, 0.5, 0])
  assert method.roster.noisy_layers == (1, 2)
  assert method.label == "roster, n = 2, τ = 0.5, noise in layers 1-1"
  inherited = parse("roster:layers=0-1").roster.temperatures
  np.testing.assert_allclose(inherited, BASE.temperatures * np.array([1, 1, 0]))
  for layers in ("1", "2-1", "1-3", "a-b"):
    with pytest.raises(ValueError, match="layers must be FIRST-LAST within 0-2"):
      parse(f"roster:n=2,t=0.5,layers={layers}")


def test_more_experts_change_the_model_and_not_the_roster():
  method = parse("experts:k=8,gates=rescaled")
  assert (method.config.experts_per_token, method.config.gate_mass_experts) == (8, 3)
  assert method.roster.is_baseline and not method.is_stochastic and method.passes_per_token == 1
  assert parse("experts").config.experts_per_token == 6  # twice the model's


def test_numbers_of_experts_vary_by_layer_by_member_and_by_mass():
  method = parse("experts:k=4-8-2")
  assert method.config.experts_per_token == 8 and method.label == "4-8-2 experts by layer"
  assert np.asarray(method.roster.experts_by_layer).tolist() == [[4, 8, 2]]
  assert method.text == "experts:k=4-8-2" and not method.is_stochastic
  method = parse("experts:mass=0.9,gates=raw")
  assert (method.config.experts_per_token, method.config.expert_mass) == (16, 0.9)
  assert not method.config.normalize_gates
  assert parse("experts:mass=0.9,k=5").config.experts_per_token == 5
  method = parse("roster:n=3,t=0,k=3-2-4")  # members without noise
  assert np.asarray(method.roster.experts_by_layer).tolist() == [[3] * 3, [2] * 3, [4] * 3]
  assert method.roster.noisy_layers == (0, 3) and not method.is_stochastic
  assert method.label == "roster, n = 3, τ = 0, 3-2-4 experts"
  method = parse("roster:n=2,k=5,gates=rescaled")
  assert method.roster.experts_by_layer is None and method.config.gate_mass_experts == 3


def test_sampling_methods_have_their_sampler():
  method = parse("self_consistency:n=5,temperature=0.4")
  assert method.sampler.settings()["temperature"] == pytest.approx(0.4)
  assert method.num_samples == method.passes_per_token == 5 and method.roster.is_baseline
  assert parse("best_of").num_samples == 8  # as many as the roster has members
  assert parse("baseline").sampler.is_greedy and parse("baseline+temperature").sampler.is_greedy
  assert parse("baseline:temperature=0.5").output_temperature == 0.5


def test_scmoe_is_a_strong_and_a_weak_pass():
  roster = parse("scmoe").roster.settings()
  assert (roster["num_members"], roster["noise"], roster["cache"], roster["aggregation"]) == (
    2,
    "second_expert",
    "standard",
    "contrast",
  )
  assert roster["temperatures"] == [1.0] * 3
  assert roster["gate_weights"] == "clean" and parse("scmoe").label == "SCMoE"
  method = parse("scmoe:rank=1-3,beta=0.9,gates=one,k=4,n=5,temperature=0.6")
  roster = method.roster.settings()
  assert (roster["noise"], roster["aggregation"], roster["gate_weights"]) == (
    "rank_experts(ranks=1-3)",
    "contrast(alpha=0.1,beta=0.9)",
    "noisy",
  )
  assert method.config.experts_per_token == 4 and method.select == "vote"
  assert method.passes_per_token == 10 and method.is_stochastic
  assert parse("scmoe:rank=random").is_stochastic and not parse("scmoe:rank=3").is_stochastic
  tried = parse("best_scmoe:rank=3").candidates
  assert [s["beta"] for s, _ in tried] == [0.1, 0.3, 0.5, 0.7, 0.9]
  assert tried[4][1].roster.aggregation == "contrast(alpha=0.1,beta=0.9)"


def test_members_write_sequences_of_their_own():
  method = parse("sequences:n=4,noise=expert_sample(fixed=2,pool=5),gate_weights=noisy")
  roster = method.roster
  assert roster.members == (1,) and roster.cache == "standard" and method.num_samples == 4
  assert roster.noise == "expert_sample(fixed=2,pool=5)" and method.sampler.is_greedy
  assert method.is_stochastic and method.passes_per_token == 4
  assert "selects among samples" in method.no_likelihood
  method = parse("sequences:t=0,k=2-3-5,select=likelihood")
  assert method.sample_experts == (2, 3, 5) and method.config.experts_per_token == 5
  assert method.num_samples == 3 and not method.is_stochastic


@pytest.mark.parametrize(
  "text, stochastic",
  [
    ("baseline", False),
    ("baseline:temperature=0.7", True),
    ("baseline+temperature", False),
    ("roster:n=2", True),
    ("experts:k=6", False),
    ("self_consistency", True),
    ("best_of", True),
    ("scmoe", False),
  ],
)
def test_methods_with_chance_are_marked(text, stochastic):
  assert parse(text).is_stochastic == stochastic


def test_likelihoods_are_defined_where_there_is_a_distribution():
  for text in (
    "baseline",
    "baseline:temperature=0.7",
    "roster",
    "roster:aggregation=majority",
    "experts:k=4",
  ):
    assert parse(text).no_likelihood is None
    assert parse(text).fits_temperature == (text != "baseline:temperature=0.7")
  for text in ("self_consistency", "best_of", "scmoe", "baseline:temperature=0.7,top_p=0.9"):
    assert parse(text).no_likelihood.startswith("not defined")


@pytest.mark.parametrize(
  "text, message",
  [
    (
      "rooster",
      "unknown method 'rooster': choose from baseline, baseline.temperature, best_baseline",
    ),
    ("roster:m=4", "'m=4' must be SETTING=VALUE, each setting once; settings of roster: n, t,"),
    ("roster:n", "'n' must be SETTING=VALUE"),
    ("roster:n=2,n=3", "'n=3' must be SETTING=VALUE"),
    ("scmoe:betas=1", "settings of scmoe: rank, beta, alpha, gates, k, n, temperature"),
    ("scmoe:beta=-1", "beta be at least 0"),
    ("scmoe:rank=0", "ranks must be positive"),
    ("scmoe:rank=two", "rank must be a number, or several such as 8-8-6-4, got 'two'"),
    ("scmoe:gates=two", "gates must be model or one"),
    ("scmoe:n=4", "n samples need a temperature"),
    ("best_scmoe:beta=1", "best_scmoe tunes beta"),
    ("experts:k=4-2", "experts_by_layer must be a positive integer, a list of 3"),
    ("experts:k=0-1-1", "experts_by_layer must be a positive integer"),
    ("experts:mass=2", r"expert_mass must be None or lie in \(0, 1\]"),
    ("roster:n=2,k=3-4-5", "values for 3 members and the roster has 2"),
    ("roster:gates=raw", "gates=raw needs k or mass"),
    ("sequences:t=0", "all samples would be equal"),
    ("sequences:n=3,k=1-2", "k have one number or n"),
    ("sequences:select=best", "select must be one of vote, likelihood, routing, any"),
    ("sequences:noise=expert_sample(fixed=9)", "0 <= fixed <= 3 <= pool"),
    ("roster:", "'' must be SETTING=VALUE"),
    ("roster:n=two", "n must be an integer or null, got 'two'"),
    ("roster:include_clean=no", "must be true or false or null, got 'no'"),
    ("roster:n=1", "it is the baseline"),
    ("roster:t=0", "it is the baseline"),
    ("roster:t=-1", "finite and not negative"),
    ("roster:noise=pink", "unknown noise 'pink'"),
    ("roster:noise=swap,t=2", "probability that an expert is replaced"),
    ("roster:aggregation=contrast,include_clean=false", "needs include_clean"),
    ("experts:k=17", r"must lie in \[1, 16\]"),
    ("experts:gates=big", "unknown gates 'big'"),
    ("self_consistency:n=1", "n must be at least 2"),
    ("best_of:temperature=0", "and temperature above 0"),
    ("baseline:top_p=0", "top_p must lie"),
    ("baseline:temperature=-1", "sampling temperature must be finite"),
  ],
)
def test_what_is_no_method_is_refused_in_a_sentence(text, message):
  with pytest.raises(ValueError, match=message):
    parse(text)


def test_the_same_method_twice_is_refused():
  with pytest.raises(ValueError, match="baseline and baseline have the same"):
    methods.parse_all(["baseline", "roster", "baseline"], CONFIG, BASE)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("n", [2, 8])
def test_default_methods_have_the_forward_rows_of_the_roster_or_one(family, n):
  config = tiny.config(family)
  base = Roster.create(config, n, 0.3)
  found = methods.parse_all(methods.default_texts(config, n), config, base)
  for method in found:
    expected = {
      "baseline": 1,
      "baseline+temperature": 1,
      "best_baseline": 1,
      "experts": 1,
      "best_scmoe": 2,
    }.get(method.name, n)
    assert method.passes_per_token == expected, method.text
  assert {m.name for m in found} == set(methods.METHODS) - {"scmoe", "sequences"}


def test_a_row_with_the_experts_of_all_members_is_among_the_defaults():
  assert "experts:k=12,gates=rescaled" in methods.default_texts(CONFIG, 4)
  assert "experts:k=16,gates=rescaled" in methods.default_texts(CONFIG, 8)  # there are no more


def test_votes_are_counted():
  """All ballots of four over two answers and none, against a plain count."""
  for ballot in itertools.product([7, 12, None], repeat=4):
    index = picking.vote(list(ballot))
    counts = {a: ballot.count(a) for a in (7, 12)}
    if not any(counts.values()):
      assert index == 0
      continue
    assert counts[ballot[index]] == max(counts.values())
    assert index == ballot.index(ballot[index])
    # Of answers with equally many votes the one that came first.
    tied = [a for a in counts if counts[a] == max(counts.values())]
    assert ballot.index(ballot[index]) == min(ballot.index(a) for a in tied)


def completion(text, *log_probs):
  return Completion([1] * len(log_probs), list(log_probs), [1] * len(log_probs), "stop_token", text)


def pick(text, task, samples, texts, **more):
  return picking.SELECTIONS[parse(text).select].pick(picking.Samples(task, texts, samples, **more))


def test_answers_are_picked_by_number_and_by_probability():
  samples = [
    completion(" 1+1=2. #### 2", -0.1, -0.1),
    completion(" #### 3", -3.0),
    completion(" 2+1=3. #### 3", -1.0, -1.0),
  ]
  task = tasks.get("wordmath")
  texts = [sample.text for sample in samples]
  assert pick("self_consistency:n=3", task, samples, texts) == 1
  assert pick("best_of:n=3", task, samples, texts) == 0
  assert pick("sequences:n=3,select=any", task, samples, texts, metrics=[0.0, 0.0, 1.0]) == 2
  texts = ["The result is 5", "so 1,000.", "it is 1000", "no idea"]
  assert pick("self_consistency:n=4", tasks.get("paper/gsm8k"), samples, texts) == 1


def test_the_sample_with_the_most_common_routing_is_picked():
  """Gates of five samples of two layers and three experts; three nearly agree."""
  alike = np.array([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5]])
  other = np.array([[0.0, 0.1, 0.9], [1.0, 0.0, 0.0]])
  routing = [other, alike, other[::-1], alike + [0.1, 0, 0], alike + [0, 0, 0.05]]
  assert picking.densest(np.array(routing)) == 1

  def jaccard(a, b):
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()

  random = np.random.RandomState(0).uniform(size=(4, 2, 3))
  density = [max(jaccard(a, b) for b in random if b is not a) for a in random]
  assert picking.densest(random) == int(np.argmax(density))


def test_tasks_without_an_answer_by_a_method_are_refused():
  for text in ("self_consistency", "best_of", "scmoe"):
    with pytest.raises(ValueError, match="needs the likelihood of its choices"):
      parse(text).check_task(tasks.get("paper/arc_easy"), "choose")
  with pytest.raises(ValueError, match="votes on numbers, which"):
    parse("self_consistency").check_task(tasks.get("paper/humaneval"), "generate")
  parse("best_of").check_task(tasks.get("paper/humaneval"), "generate")
  parse("roster").check_task(tasks.get("paper/arc_easy"), "choose")
