"""Runs and tunings whose truth is known, in the form in which programs leave them."""

import json
import math

import numpy as np

from experiments.records import runs

SETTINGS = {"checkpoint": "a-model", "model": "f1" * 8, "split": "test", "num_examples": None}


def answers(rng, examples, share, like=None, discordance=0.2):
  """Right and wrong answers, `[X]`: a share right, alone or with few changes to others."""
  if like is None:
    return rng.random(examples) < share
  gain = share - like.mean()
  up, down = discordance / 2 + gain / 2, discordance / 2 - gain / 2
  # Of those wrong so many become right, and of those right so many wrong.
  change = rng.random(examples) < np.where(like, down / like.mean(), up / (1 - like.mean()))
  return like ^ change


def write_run(
  path,
  name,
  correct,
  *,
  nll=None,
  fitted_nll=None,
  tokens=None,
  confidences=None,
  fitted_confidences=None,
  outcomes=None,
  task="wordmath",
  metric="exact_match",
  examples=None,
  costs=(),
  settings=None,
):
  """A finished run from `[X]` or `[X, S]` arrays, and lists of events by example."""
  correct = np.asarray(correct, float)
  correct = correct[:, None] if correct.ndim == 1 else correct
  names = examples or [f"{task}/test/{i}" for i in range(len(correct))]
  run = runs.Run(
    path,
    name,
    SETTINGS
    | {"label": name, "method": name, "seeds": list(range(correct.shape[1]))}
    | (settings or {}),
  )

  def of(values, i, seed):
    value = np.asarray(values[i])
    return value[seed] if value.ndim else value

  lines = []
  for i, example in enumerate(names):
    for seed in range(correct.shape[1]):
      metrics = {metric: correct[i, seed]}
      for key, values in (("nll", nll), ("fitted_nll", fitted_nll)):
        if values is not None:
          metrics |= {key: float(of(values, i, seed)), "tokens": int(tokens[i])}
      line = {"task": task, "example": example, "seed": seed, "metrics": metrics}
      for key, values in (
        ("confidences", confidences),
        ("fitted_confidences", fitted_confidences),
        ("correct", outcomes),
      ):
        if values is not None:
          line[key] = np.asarray(values[i]).tolist()
      lines.append(line)
  run.write(lines)
  for cost in costs:
    run.write([], {"task": task, "seed": 0, **cost})
  run.finish()
  return path


def chances(rng, logits, right, sharpness, noise=0.0):
  """Likelihoods and events of texts, by a model too sure of itself by a factor.

  Args:
    rng: of the noise.
    logits: `[X, T]`, true log-odds of the token that is chosen.
    right: `[X, T]` whether it is the text's.
    sharpness: the factor; at the fitted output temperature it is 1.
    noise: standard deviation that is added to the log-odds.

  Returns:
    Arguments of `write_run`.
  """
  noisy = np.abs(logits + noise * rng.standard_normal(logits.shape))
  found = {"tokens": np.full(len(logits), logits.shape[1]), "outcomes": right}
  for prefix, scale in (("", sharpness), ("fitted_", 1.0)):
    p = 1 / (1 + np.exp(-scale * noisy))
    found[prefix + "confidences"] = p
    found[prefix + "nll"] = -np.log(np.where(right, p, 1 - p)).sum(axis=1)
  return found


def write_tuning(path, *, layers=6, trials=30, baseline=1.2, profile=True, confirmed=True):
  """A sweep, then trials that come closer to a best one; some are pruned."""
  rng = np.random.default_rng(1)
  path.mkdir(parents=True)
  lines = []

  def value(temperatures):
    return baseline - 0.02 + 0.02 * float(np.sum((np.array(temperatures) - 0.3) ** 2)) * 3

  for number in range(trials):
    sweep = number < 8
    t = (
      [0.0, *[0.05 * number] * (layers - 2), 0.0]
      if sweep
      else [0.0, *rng.uniform(0, 0.5, layers - 2).round(3).tolist(), 0.0]
    )
    state = "pruned" if number % 5 == 4 and not sweep else "complete"
    lines.append(
      {
        "number": number,
        "kind": "sweep" if sweep else "tpe",
        "state": state,
        "temperatures": t,
        "value": baseline if not any(t) else value(t),
        "seconds": 2.0,
        "tokens": 1000,
      }
    )
  lines.append(
    {
      "number": trials,
      "kind": "tpe",
      "state": "failed",
      "temperatures": t,
      "value": None,
      "seconds": 0.0,
      "tokens": 0,
    }
  )
  (path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if profile:
    best = min(
      (line for line in lines if line["state"] == "complete"), key=lambda line: line["value"]
    )
    (path / "profile.json").write_text(
      json.dumps(
        {
          "temperatures": best["temperatures"],
          "model": {"name": "a-model"},
          "roster": {"num_members": 8},
          "objective": {
            "name": "perplexity",
            "value": best["value"],
            "baseline": baseline,
            "trial": best["number"],
            "confirmed": (
              confirmed
              and {
                "examples": 100,
                "seeds": [1, 2],
                "values": {},
                "differences": [
                  {
                    "of": "tuned",
                    "to": "baseline",
                    "fitted": False,
                    "value": -0.5,
                    "low": -1.1,
                    "high": 0.2,
                    "excludes_zero": False,
                  }
                ],
              }
            )
            or None,
          },
          "data": {"task": "wordmath"},
          "seed": 0,
          "cost": {"tokens": 1000 * trials, "seconds": 2.0 * trials, "trials": trials},
        }
      )
    )
  return path


def write_study(path, examples=160, seed=0):
  """A baseline and methods: much better, the same, with seeds, without likelihoods."""
  rng = np.random.default_rng(seed)
  baseline = answers(rng, examples, 0.4)
  logits = np.abs(rng.normal(1.0, 2.0, (examples, 20)))
  right = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
  texts = chances(rng, logits, right, 1.8)

  def costs(n, seconds):
    return [
      {
        "tokens": 2000,
        "forward_passes": 2000 * n,
        "flops": 1e9 * n,
        "seconds": seconds * s,
        "unique_experts_read": 400 * 8 * (1 - math.exp(-n / 4)),
        "steps": 400,
        "peak_bytes": (50 + n) << 20,
      }
      for s in (1.0, 1.1, 0.9)
    ]

  write_run(path / "baseline", "baseline", baseline, costs=costs(1, 1.0), **texts)
  write_run(
    path / "roster8",
    "roster, n = 8",
    answers(rng, examples, 0.6, baseline, 0.3),
    costs=costs(8, 2.5),
    settings={"roster": {"num_members": 8, "temperatures": [0.3] * 6}, "output_temperature": 1.5},
    **chances(rng, logits, right, 1.5, 0.1),
  )
  seeds = np.stack([answers(rng, examples, baseline.mean(), baseline, 0.1) for _ in range(3)], 1)
  write_run(
    path / "experts4",
    "k' = 4",
    seeds,
    costs=costs(2, 1.3),
    **chances(rng, logits, right, 1.8, 0.02),
  )
  write_run(
    path / "votes",
    "self-consistency, 8 votes",
    answers(rng, examples, baseline.mean() + 0.02, baseline),
    costs=costs(8, 6.0),
  )
  return path
