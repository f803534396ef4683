"""Figure 5b: what the roster costs against the larger plain model that it equals.

    python -m experiments.reproduce --figure=fig5b --model=olmoe --data_dir=data

For the equivalent sizes of `fig5a` (plain model and rosters as they are), a model of the
same family is made of that size, all widths growing together, with random weights; writing
tokens with it and with the roster take turns (see `overhead`). Where the equivalent size is
not clearly above the model's own there is no larger model to compare with, and it is said
so. The paper saw 30 % less latency and 25 % less memory than the model of 10.5 B that n =
32 equals.

    model      checkpoint (see models.py)              hardware               time beside fig5a
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       15 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    not made: see below
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     not made: see below
    embedded   ships with the package                  two CPU cores          30 seconds

The larger model's weights are made on one device, so that what needs several is refused.
Times are estimated with roe_jax.costs (H100), but for the last one.
"""

import dataclasses

from experiments.analysis import drawing, report_page
from experiments.benchmarks import random_models, timing
from experiments.cli import app, temperature_profiles
from experiments.figures import compared, fig5a, overhead, scaling_law
from experiments.figures.work import Command, Work
from roe_jax.roster import Roster

TITLE = "Cost of the roster against the equivalent larger model"
SAW = (
  "The paper saw 30 % less latency and 25 % less memory for OLMoE with n = 32 than for "
  "the model of 10.5 B that it equals."
)


@dataclasses.dataclass(frozen=True)
class Config(fig5a.Config):
  """Beside the settings of `fig5a` those of the measurement.

  Attributes:
    prompts_of: the task whose prompts are continued.
    prompt_length, new_tokens, rounds: see `overhead.Config`.
    largest: of an equivalent model, as a multiple of the model's size.
  """

  prompts_of: str = "gsm8k"
  prompt_length: int = 128
  new_tokens: int = 128
  rounds: int = 10
  largest: float = 8.0


def _of(config: fig5a.Config, **own) -> Config:
  return Config(**dataclasses.asdict(config), **own)


CONFIGS = {name: _of(fig5a.CONFIGS[name]) for name in ("olmoe", "mixtral", "gpt_oss")} | {
  "embedded": _of(
    fig5a.CONFIGS["embedded"], prompts_of="wordmath", prompt_length=48, new_tokens=32, rounds=7
  )
}


def commands(work: Work) -> list[Command]:
  return fig5a.run_searches(work)


def _equivalents(work):
  """{(n, law): equivalent size}, of rosters as they are; what fig5a has measured is taken from it."""
  config = fig5a.Config(
    **{f.name: getattr(work.config, f.name) for f in dataclasses.fields(fig5a.Config)}
  )
  rows = fig5a.measure(dataclasses.replace(work, figure="fig5a", config=config))[1:]
  return {
    (r["n"], law): r[key]
    for r in rows
    if r["n"] > 1 and not r["is_fitted"]
    for law, key in (("0.076", "by_kaplan"), ("fitted", "by_family"))
  }


def measure(work: Work) -> list[dict]:
  if work.model.mesh:
    raise ValueError(
      f"fig5b makes larger models on one device, and {work.model.title} needs several: "
      "--set=mesh= is for where one is enough"
    )
  config, sizes = work.config, _equivalents(work)
  return work.kept().get("costs", lambda: _measure(work, config, sizes))


def _measure(work, config, sizes):
  params, model, tokenizer = app.open_model(work.model.checkpoint)
  of_overhead = overhead.Config(
    task=config.prompts_of,
    prompt_length=config.prompt_length,
    new_tokens=config.new_tokens,
    batch_sizes=(1,),
    prompts=40,
  )
  prompts = overhead.prompts_of(work, of_overhead, tokenizer)
  own = scaling_law.num_parameters(model)

  def case(of_params, of_config, roster):
    return overhead.case(of_params, of_config, roster, prompts, 1, config.new_tokens)

  cases = {"plain": case(params, model, Roster.create(model))}
  for n in config.members:
    tau = temperature_profiles.read(fig5a.model_profile(work, n)).temperatures
    cases[f"n = {n}"] = case(
      params,
      model,
      Roster.create(model, n, tau, noisy_layers=(0, model.num_layers), cache=work.model.cache),
    )
  for (n, law), size in sizes.items():
    if size["low"] > own and size["value"] <= config.largest * own:
      larger = scaling_law.resized(model, size["value"])
      cases[f"{n}, {law}"] = case(
        random_models.random_params(larger), larger, Roster.create(larger)
      )
  for c in cases.values():
    c.call(1)
  seconds = timing.take_turns({name: c.call for name, c in cases.items()}, config.rounds)

  def told(name):
    return overhead.told(seconds[name], seconds["plain"], config.new_tokens) | {
      "bytes": cases[name].bytes
    }

  found = [{"label": "plain", "n": 1, "law": None, "size": own, **told("plain")}]
  for n in config.members:
    found.append(
      {"label": f"roster, n = {n}", "n": n, "law": None, "size": own, **told(f"n = {n}")}
    )
    for law in ("0.076", "fitted"):
      name, size = f"{n}, {law}", sizes[n, law]
      record = {
        "label": f"its equivalent, α {law}",
        "n": n,
        "law": law,
        "equivalent": size,
        "size": int(size["value"]),
      }
      if name in cases:
        record |= told(name) | {
          "roster_to_it": timing.median_ratio(seconds[f"n = {n}"], seconds[name]),
          "roster_bytes_to_it": cases[f"n = {n}"].bytes / cases[name].bytes
          if cases[name].bytes
          else None,
        }
      else:
        record["why"] = (
          "no larger model: the interval of the equivalent size has the model's own in it"
          if size["low"] <= own
          else f"more than {config.largest:g} times the model's size: not made"
        )
      found.append(record)
  return found


def table(records: list[dict]) -> str:
  rows = []
  for r in records:
    measured = "ms_per_token" in r
    rows.append(
      [
        r["n"],
        r["label"],
        f"{r['size']:,}",
        compared.cell(r["ms_per_token"], 2) if measured else r["why"],
        f"{r['bytes'] / 2**20:.1f}" if measured and r["bytes"] else "",
        f"{r['roster_to_it']:.2f}" if "roster_to_it" in r else "",
        f"{r['roster_bytes_to_it']:.2f}" if r.get("roster_bytes_to_it") else "",
      ]
    )
  return report_page.table(
    [
      "n",
      "",
      "non-embedding parameters",
      "ms per token [quartiles]",
      "memory, MiB",
      "roster to it, time",
      "roster to it, memory",
    ],
    rows,
  )


def findings(records: list[dict]) -> str:
  told = []
  for law in ("0.076", "fitted"):
    rows = [r for r in records if r.get("law") == law]
    made = [r for r in rows if "roster_to_it" in r]
    told.append(
      f"By α {law}: "
      + (
        "; ".join(
          f"n = {r['n']} takes {r['roster_to_it']:.2f} times as long as the model that it equals, in "
          f"{r['roster_bytes_to_it']:.2f} times its memory"
          if r["roster_bytes_to_it"]
          else f"n = {r['n']} takes {r['roster_to_it']:.2f} times as long as the model that it equals"
          for r in made
        )
        if made
        else "no roster equals a clearly larger model that was made"
      )
      + "."
    )
  return " ".join(told)


def draw(records: list[dict]):
  figure, axes = drawing.axes(2, width=4.0, height=3.2)
  measured = [r for r in records if "ms_per_token" in r]
  series = [
    ("roster", [r for r in measured if r["law"] is None]),
    ("equivalent plain model, α = 0.076", [r for r in measured if r["law"] == "0.076"]),
    ("equivalent plain model, fitted α", [r for r in measured if r["law"] == "fitted"]),
  ]
  for index, (label, rows) in enumerate(series):
    style = drawing.line(index)
    if rows:
      values, bars = drawing.bars([compared.read(r["ms_per_token"]) for r in rows])
      axes[0, 0].errorbar([r["n"] for r in rows], values, yerr=bars, label=label, **style)
    rows = [r for r in rows if r["bytes"]]
    if rows:
      axes[0, 1].errorbar(
        [r["n"] for r in rows], [r["bytes"] / 2**20 for r in rows], label=label, **style
      )
  axes[0, 0].set_ylabel("ms per token\n(median, quartiles)")
  axes[0, 1].set_ylabel("memory of the program (MiB)")
  for axis in axes[0]:
    axis.set_ylim(bottom=0)
    drawing.members_axis(axis, sorted({r["n"] for r in records}))
  drawing.legend(figure, axes[0, 0])
  return figure
