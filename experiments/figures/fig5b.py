"""Figure 5b: cost of the roster against the equivalent larger baseline model.

    python -m experiments.reproduce --figure=fig5b --model=olmoe --data_dir=data

For each equivalent size of `fig5a` (at T = 1), a model of the same family is made with random
weights, all widths scaled together; generation with it and with the roster take turns (see
`overhead`). If the interval of the equivalent size includes the model's own, there is no
larger model to compare with. The larger model's weights are made on one device, so models that
need several are refused.
"""

import dataclasses

from experiments.analysis import drawing, report_page
from experiments.benchmarks import random_models, timing
from experiments.cli import app
from experiments.figures import compared, fig5a, figure_models, overhead, scaling_law
from experiments.figures.figure_run import FigureRun
from roe_jax import temperature_profiles
from roe_jax.roster import Roster

TITLE = "Cost of the roster against the equivalent larger model"
BACKGROUND = (
  "The paper reports 30 % less latency and 25 % less memory for OLMoE with n = 32 than for the "
  "equivalent model of 10.5 B."
)


@dataclasses.dataclass(frozen=True)
class Config(fig5a.Config):
  """The settings of `fig5a` and those of the measurement.

  Attributes:
    prompts_of: the task whose prompts are continued.
    prompt_length, new_tokens, rounds: see `overhead.Config`.
    largest: size limit of an equivalent model, as a multiple of the model's size.
  """

  prompts_of: str = "paper/gsm8k"
  prompt_length: int = 128
  new_tokens: int = 128
  rounds: int = 10
  largest: float = 8.0


CONFIGS = figure_models.configs(
  Config(),
  embedded=Config(
    **dataclasses.asdict(fig5a.CONFIGS["embedded"]),
    prompts_of="wordmath",
    prompt_length=48,
    new_tokens=32,
    rounds=7,
  ),
)
LAWS = {"0.076": "by_kaplan", "fitted": "by_family"}

commands = fig5a.commands


def _equivalents(run):
  """Returns {(n, law): equivalent size} of rosters at T = 1, as measured by fig5a."""
  names = [f.name for f in dataclasses.fields(fig5a.Config)]
  config = fig5a.Config(**{name: getattr(run.config, name) for name in names})
  records = fig5a.measure(dataclasses.replace(run, figure="fig5a", config=config))[1:]
  return {
    (r["n"], law): r[key]
    for r in records
    if r["n"] > 1 and not r["is_fitted"]
    for law, key in LAWS.items()
  }


def measure(run: FigureRun) -> list[dict]:
  if run.model.mesh:
    raise ValueError(
      f"fig5b makes larger models on one device, and {run.model.title} needs several: "
      "give --set=mesh= if one is enough"
    )
  config, sizes = run.config, _equivalents(run)
  return run.measurements().get("costs", lambda: _measure(run, config, sizes))


def _measure(run, config, sizes):
  params, model, tokenizer = app.open_model(run.model.checkpoint)
  of_overhead = overhead.Config(
    task=config.prompts_of,
    prompt_length=config.prompt_length,
    new_tokens=config.new_tokens,
    batch_sizes=(1,),
    prompts=40,
  )
  prompts = overhead.prompts_of(run, of_overhead, tokenizer)
  own = scaling_law.num_parameters(model)

  def case(of_params, of_config, roster):
    return overhead.case(of_params, of_config, roster, prompts, 1, config.new_tokens)

  cases = {"baseline": case(params, model, Roster.create(model))}
  for n in config.members:
    tau = temperature_profiles.read(run.profile(fig5a.search_name(n))).temperatures
    roster = overhead.all_members(model, n, tau, cache=run.model.cache)
    cases[f"n = {n}"] = case(params, model, roster)
  for (n, law), size in sizes.items():
    if size.low > own and size.value <= config.largest * own:
      larger = scaling_law.resized(model, size.value)
      larger_params = random_models.random_params(larger)
      cases[f"{n}, {law}"] = case(larger_params, larger, Roster.create(larger))
  for c in cases.values():
    c.call(1)
  seconds = timing.take_turns({name: c.call for name, c in cases.items()}, config.rounds)

  def costs(name):
    timings = overhead.timings(seconds[name], seconds["baseline"], config.new_tokens)
    return timings | {"bytes": cases[name].bytes}

  found = [{"label": "baseline", "n": 1, "law": None, "size": own, **costs("baseline")}]
  for n in config.members:
    roster = f"n = {n}"
    found.append({"label": f"roster, n = {n}", "n": n, "law": None, "size": own, **costs(roster)})
    for law in LAWS:
      name, size = f"{n}, {law}", sizes[n, law]
      record = {
        "label": f"its equivalent, α {law}",
        "n": n,
        "law": law,
        "equivalent": size,
        "size": int(size.value),
      }
      if name in cases:
        ours, theirs = cases[roster].bytes, cases[name].bytes
        record |= costs(name) | {
          "roster_time_ratio": timing.median_ratio(seconds[roster], seconds[name]),
          "roster_memory_ratio": ours / theirs if ours and theirs else None,
        }
      elif size.low <= own:
        record["reason"] = (
          "no larger model: the equivalent size's interval includes the model's own"
        )
      else:
        record["reason"] = f"not made: more than {config.largest:g} times the model's size"
      found.append(record)
  return found


def table(records: list[dict]) -> str:
  ratio = lambda r, name: f"{r[name]:.2f}" if r.get(name) else ""
  columns = {
    "n": "n",
    "": "label",
    "non-embedding parameters": lambda r: f"{r['size']:,}",
    "ms per token [quartiles]": lambda r: r.get("reason") or compared.cell(r["ms_per_token"], 2),
    "memory (MiB)": lambda r: report_page.mebibytes(r["bytes"], ".1f") if r.get("bytes") else "",
    "roster's time ratio": lambda r: ratio(r, "roster_time_ratio"),
    "roster's memory ratio": lambda r: ratio(r, "roster_memory_ratio"),
  }
  return report_page.table_of(records, columns)


def findings(records: list[dict]) -> str:
  sentences = []
  for law in LAWS:
    parts = []
    for r in records:
      if r.get("law") == law and "roster_time_ratio" in r:
        parts.append(
          f"n = {r['n']} takes {r['roster_time_ratio']:.2f} times as long as the equivalent model"
        )
        if r["roster_memory_ratio"]:
          parts[-1] += f", in {r['roster_memory_ratio']:.2f} times its memory"
    none = "no roster is equivalent to a significantly larger model that was made"
    sentences.append(f"By α {law}: {'; '.join(parts) or none}.")
  return " ".join(sentences)


def draw(records: list[dict]):
  figure, ((left, right),) = drawing.axes(2, width=4.0, height=3.2)
  labels = {
    None: "roster",
    "0.076": "equivalent baseline model, α = 0.076",
    "fitted": "equivalent baseline model, fitted α",
  }
  for index, (law, label) in enumerate(labels.items()):
    style = drawing.line(index) | {"label": label}
    shown = [r for r in records if r["law"] == law and "ms_per_token" in r]
    if shown:
      drawing.errorbars(left, [r["n"] for r in shown], [r["ms_per_token"] for r in shown], **style)
    memory = [(r["n"], r["bytes"] / 2**20) for r in shown if r["bytes"]]
    if memory:
      right.errorbar(*zip(*memory), **style)
  left.set_ylabel("ms per token\n(median, quartiles)")
  right.set_ylabel("memory of the program (MiB)")
  for axis in (left, right):
    axis.set_ylim(bottom=0)
    drawing.members_axis(axis, sorted({r["n"] for r in records}))
  drawing.legend(figure, left)
  return figure
